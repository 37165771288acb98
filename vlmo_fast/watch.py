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
_CALL = nn.Module.__call__
_FORWARDS: dict[type[nn.Module], Any] = {}  # of each class, as it was when this package was imported


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module computes what its class does from its parameters, and nobody looks on.

    Args:
        module: what would be called.
        kind: the class that it must be of, itself no subclass.

    Returns:
        False where the module is of another class (a subclass, a parametrized or quantised layer), has a forward or
        backward hook of any kind, is compiled or has a `forward` of its own; where its class or `nn.Module.__call__` is
        patched; where torch has a global module hook; and where its weight is a tensor subclass of another package.
    """
    if type(module) is not kind or any(_GLOBAL_HOOKS):
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    own = module.__dict__.get("forward")
    if own is not None and getattr(own, "__func__", None) is not kind.forward:  # a bound method of the class's is none
        return False
    if kind.__call__ is not _CALL or module._compiled_call_impl is not None:
        return False
    weight = module._parameters.get("weight")
    return kind.forward is _FORWARDS[kind] and (weight is None or _is_ordinary(weight))


def watched_from_now_on(kind: type[nn.Module]) -> type[nn.Module]:
    """Remember a class's `forward`: whoever patches it later is seen. A decorator for the network's own classes."""
    _FORWARDS[kind] = kind.forward
    return kind


for _kind in (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.Conv2d):
    watched_from_now_on(_kind)


def _is_ordinary(weight: Tensor) -> bool:
    """Whether it is a tensor of torch's own: what tracers and shards put in a parameter's place is, too."""
    kind = type(weight)
    return kind is nn.Parameter or kind is Tensor or kind.__module__.startswith("torch.")


def values_are_visible(tensor: Tensor) -> bool:
    """Whether looking at values is free: not where it would wait for a device, break a graph or be traced."""
    if tensor.device.type != "cpu" or type(tensor) is not Tensor:
        return False
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing()
