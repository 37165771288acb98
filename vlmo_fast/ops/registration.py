"""How the package defines a custom op: one idiom, and the schemas of the ops that `csrc/` implements.

A custom op is a node that compilers and autograd do not look into. Its kernel runs below autograd: whatever it calls
records nothing, so it cannot get its gradient from autograd, and its formula is written out as an op of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.utils.flop_counter import register_flop_formula

__all__ = ["autocast_dtype", "register"]

_library = torch.library.Library("vlmo_fast", "FRAGMENT")


def register(
    schema: str,
    kernel: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
    setup_context: Callable[..., None] | None = None,
    autograd: Callable[..., Any] | None = None,
    cast: Callable[..., tuple[Any, ...]] | None = None,
    backward_of: str | None = None,
) -> None:
    """Define `torch.ops.vlmo_fast.<name>`, on every device.

    Args:
        schema: "name(Tensor x, ...) -> ...".
        kernel: computes it. Autograd is off and so is autocast.
        fake: the shapes of its results, without computing.
        flops: operations from the arguments' shapes, for `FlopCounterMode`.
        setup_context: `setup_context(ctx, inputs, output)` keeps what `autograd` needs.
        autograd: `autograd(ctx, *grads)`, one gradient for each argument. None: not differentiable.
        cast: the arguments as autocast wants them, from the arguments; None leaves them as they are.
        backward_of: the public op whose gradient this one computes, which the refusal of a second one names.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vlmo_fast::{name}", fake, lib=_library)
    op = getattr(torch.ops.vlmo_fast, name)
    for device in ("cpu", "cuda"):
        _library.impl(name, _without_autocast(op, device, cast), f"Autocast{device.upper()}")
    if flops is not None:
        register_flop_formula(op)(flops)
    if backward_of is not None:
        autograd = _refusal(backward_of)
    if autograd is not None:
        torch.library.register_autograd(f"vlmo_fast::{name}", autograd, setup_context=setup_context, lib=_library)


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast makes of products on a device; None where it is off."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _without_autocast(op: Any, device: str, cast: Callable[..., tuple[Any, ...]] | None) -> Callable[..., Any]:
    def rule(*arguments: Any) -> Any:
        arguments = arguments if cast is None else cast(*arguments)
        with torch.autocast(device, enabled=False):
            return op(*arguments)

    return rule


def _refusal(op: str) -> Callable[..., NoReturn]:
    def refuse(ctx: Any, *_: Any) -> NoReturn:
        raise NotImplementedError(f'{op}: double backward needs backend="eager"')

    return refuse


# What csrc/ implements. The ops write into their arguments marked with "!", and allocate nothing.

_BLOCK = "Tensor? row_ids, Tensor? column_ids, int? diagonal"  # a `PairMask`
# The log-sum-exps of a block's rows, the running (maximum, sum) of its columns; -inf where the mask says.
_library.define(
    f"similarity_sums_(Tensor(a!) block, {_BLOCK}, Tensor(b!) row_lse, Tensor(c!) column_top, "
    "Tensor(d!) column_total) -> ()"
)
_library.define(
    f"similarity_gradient_(Tensor block, Tensor(a!) out, {_BLOCK}, Tensor row_lse, Tensor row_weight, "
    "Tensor column_lse, Tensor column_weight) -> ()"
)
# The same from the embeddings, on tensor cores, tile by tile.
_library.define(
    f"similarity_tile_sums_(Tensor rows, Tensor columns, Tensor logit_scale, {_BLOCK}, Tensor(a!) row_lse, "
    "Tensor(b!) column_top, Tensor(c!) column_total, int arch) -> ()"
)
_library.define(
    f"similarity_tile_gradient_(Tensor rows, Tensor columns, Tensor logit_scale, Tensor(a!) out, {_BLOCK}, "
    "Tensor row_lse, Tensor row_weight, Tensor column_lse, Tensor column_weight, int arch) -> ()"
)
# Attention of padded and packed batches; `d_bias` must be zeros.
_library.define(
    "attention_cpu_(Tensor query, Tensor key, Tensor value, Tensor queries, Tensor keys, Tensor? bias, "
    "Tensor? key_mask, float scale, Tensor(a!) out, Tensor(b!) stats) -> ()"
)
_library.define(
    "attention_backward_cpu_(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor queries, Tensor keys, "
    "Tensor? bias, Tensor? key_mask, float scale, Tensor stats, Tensor(a!) d_query, Tensor(b!) d_key, "
    "Tensor(c!) d_value, Tensor(d!)? d_bias) -> ()"
)
