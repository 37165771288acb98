"""What may be looked past and what may be looked at: modules that nobody watches, tensors whose values are free.

The network's fast paths read parameters and do not call the modules that own them. They may do so only where nothing
else would notice: where a module is of its own class, and neither it nor its class nor torch as a whole is watched by
hooks or patched. Adapters, quantised layers, parametrizations, pruning and whatever else replaces, wraps or observes a
module are called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

__all__ = ["is_plain", "values_are_visible", "watched_from_now_on"]

_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
_CALL, _CALL_IMPL = nn.Module.__call__, nn.Module._call_impl
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_FORWARDS: dict[type[nn.Module], Any] = {}  # of each class, as it was when this package was imported


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module computes what its class does from its parameters, and nobody looks on.

    Args:
        module: what would be called.
        kind: the class that it must be of, itself no subclass.

    Returns:
        False where the module is of another class (a subclass, a parametrized or quantised layer), has a forward or
        backward hook of any kind, is compiled or has a `forward` of its own; where its class's `forward` or a step of
        `nn.Module`'s call is patched; where torch has a global module hook; and where its weight or bias is a tensor
        subclass.
    """
    if type(module) is not kind or any(_GLOBAL_HOOKS):
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    if kind.__call__ is not _CALL or kind._call_impl is not _CALL_IMPL or kind.forward is not _FORWARDS[kind]:
        return False
    own, parameters = module.__dict__, module._parameters
    forward = own.get("forward")
    if forward is not None and not _is_own(forward, module, kind):
        return False
    if module._compiled_call_impl is not None or "_call_impl" in own:
        return False
    # Replicas and the like hold them as plain attributes.
    return all(_is_ordinary(own.get(name, parameters.get(name))) for name in ("weight", "bias"))


def watched_from_now_on(kind: type[nn.Module]) -> type[nn.Module]:
    """Remember a class's `forward`: whoever patches it later is seen. A decorator for the network's own classes."""
    _FORWARDS[kind] = kind.forward
    return kind


for _kind in (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.Conv2d):
    watched_from_now_on(_kind)


def _is_own(forward: Any, module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is the bound method that the module has anyway, which tools leave behind when they go."""
    return getattr(forward, "__func__", None) is kind.forward and getattr(forward, "__self__", None) is module


def _is_ordinary(tensor: Tensor | None) -> bool:
    kind = type(tensor)
    return tensor is None or kind is nn.Parameter or kind is Tensor


def values_are_visible(tensor: Tensor) -> bool:
    """Whether looking at values is free: not where it would wait for a device, break a graph or be traced."""
    if tensor.device.type != "cpu" or type(tensor) is not Tensor or torch.compiler.is_compiling():
        return False
    is_transformed = torch._C._are_functorch_transforms_active() or torch._C._get_dispatch_mode(_PROXY) is not None
    return not torch.jit.is_tracing() and not is_transformed
