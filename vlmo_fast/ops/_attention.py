"""Attention with a bias that the batch shares."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vlmo_fast.ops import _attention_cpu, _fused, reference
from vlmo_fast.ops.dispatch import Problem, select

__all__ = ["attention"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multi-head attention with a bias that the batch shares: softmax(scale * query key^T + bias) value.

    The bias is VLMo's relative-position term: added to the scaled scores, (heads, S_q, S_k), learned.

    Args:
        query: (B, heads, S_q, d); any float dtype.
        key: (B, heads, S_k, d), dtype and device of the query.
        value: (B, heads, S_k, d), dtype and device of the query.
        bias: (heads, S_q, S_k), any float dtype, or None.
        key_mask: (B, S_k) bool, False for padding keys, or None. Each row must keep at least one key.
        scale: factor of the scores; None means d ** -0.5.
        backend: "auto", or one of `ops.implementations("attention")`.

    Returns:
        (B, heads, S_q, d) in the query's dtype. Differentiable in query, key, value and bias; any number of times with
        "eager".

    Raises:
        ValueError: shapes disagree, or the backend is unknown.
        TypeError: dtypes disagree.
        NotImplementedError: the backend cannot run here (names those that can), or has no second derivative.
        ImportError: the backend must be built first; names the command.
    """
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape or query.shape[:2] != key.shape[:2]:
        raise ValueError(
            "attention: query, key and value must be (B, heads, S, d) with key and value alike, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"attention: key must have the query's head size {query.shape[-1]}, got {key.shape[-1]}")
    if not (query.dtype == key.dtype == value.dtype and query.is_floating_point()):
        raise TypeError(
            "attention: query, key and value must share one float dtype, got "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    if bias is not None and bias.shape != (query.shape[1], query.shape[2], key.shape[2]):
        raise ValueError(
            "attention: bias must be (heads, S_q, S_k) = "
            f"{(query.shape[1], query.shape[2], key.shape[2])}, got {tuple(bias.shape)}"
        )
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(f"attention: key_mask must be bool, got {key_mask.dtype}")
        if key_mask.shape != (key.shape[0], key.shape[2]):
            raise ValueError(
                f"attention: key_mask must be (B, S_k) = {(key.shape[0], key.shape[2])}, got {tuple(key_mask.shape)}"
            )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    bias_grad = torch.is_grad_enabled() and bias is not None and bias.requires_grad
    others_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    problem = Problem(
        *(query.device.type, query.dtype, bias_grad or others_grad, query.shape[-1]),
        only_bias_grad=bias_grad and not others_grad,
    )
    implementation = select("attention", problem, backend)
    if implementation == "cpu":
        out: Tensor = torch.ops.vlmo_fast.attention(query, key, value, bias, key_mask, scale)[0]
        return out
    if implementation == "xformers":
        return _fused.xformers(query, key, value, bias, key_mask, scale)
    if implementation == "eager":
        with torch.autocast(query.device.type, enabled=False):  # scores and softmax stay in float32
            return reference.attention(query, key, value, bias, key_mask, scale)
    return _fused.sdpa(query, key, value, bias, key_mask, scale)


# The CPU library's implementation, as a custom op: it takes sequences on rows that lie one after the other.


def _rows(x: Tensor) -> Tensor:
    """(B, H, S, d) as (B S, H, d): a view where a projection made it, or `_empty`."""
    return x.transpose(1, 2).flatten(0, 1)


def _empty(like: Tensor) -> Tensor:
    """An empty (B, H, S, d) that lies as (B, S, H, d) does; no view, which autograd would not let change in place."""
    _number, heads, length, width = like.shape
    return like.new_empty_strided(like.shape, (length * heads * width, width, heads * width, 1))


def _table(x: Tensor) -> Tensor:
    """Of each of the B sequences of (B, H, S, d) its rows: (B, 2, 3) int32."""
    number, length = x.shape[0], x.shape[2]
    table = x.new_zeros(number, 2, 3, dtype=torch.int32)
    table[:, 0, 0] = torch.arange(number, dtype=torch.int32, device=x.device) * length
    table[:, 0, 1] = length
    return table


def _forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = (_rows(x) for x in (query, key, value))
    out = _empty(query)
    stats = _attention_cpu.forward(q, k, v, _table(query), _table(key), bias, key_mask, scale, _rows(out))
    return out, stats


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    stats: Tensor,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    go, q, k, v = (_rows(x) for x in (grad, query, key, value))
    d_query, d_key, d_value = (_empty(x) for x in (query, key, value))
    d_bias = _attention_cpu.backward(
        *(go, q, k, v, _table(query), _table(key), bias, key_mask, scale, stats),
        gradients=(_rows(d_query), _rows(d_key), _rows(d_value)),
        bias_grad=bias_grad,
    )
    return d_query, d_key, d_value, d_bias


def _fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    number, heads, length, _width = query.shape
    return _empty(query), query.new_empty(2, heads, number * length)


def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_bias = bias.new_empty(bias.shape) if bias is not None and rest[-1] else query.new_empty(0)
    return _empty(query), _empty(key), _empty(value), d_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _autograd(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    bias_grad = ctx.needs_input_grad[3]
    d_query, d_key, d_value, d_bias = torch.ops.vlmo_fast.attention_backward(
        grad, *ctx.saved_tensors, ctx.scale, bias_grad
    )
    return d_query, d_key, d_value, d_bias if bias_grad else None, None, None


def _no_second_derivative(ctx: Any, *_: Any) -> NoReturn:
    raise NotImplementedError("attention: backend must be 'eager' for derivatives of derivatives, got another")


torch.library.define(
    "vlmo_fast::attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_mask, float scale) -> (Tensor, Tensor)",
)
torch.library.define(
    "vlmo_fast::attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_mask, Tensor stats, float scale, "
    "bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("vlmo_fast::attention", "CPU", _forward)
torch.library.impl("vlmo_fast::attention_backward", "CPU", _backward)
torch.library.register_fake("vlmo_fast::attention", _fake)
torch.library.register_fake("vlmo_fast::attention_backward", _fake_backward)
torch.library.register_autograd("vlmo_fast::attention", _autograd, setup_context=_setup_context)
torch.library.register_autograd("vlmo_fast::attention_backward", _no_second_derivative)


@register_flop_formula(torch.ops.vlmo_fast.attention)
def _flops(query: Any, key: Any, *_: Any, **__: Any) -> int:
    return 4 * int(query[0] * query[1] * query[2] * query[3] * key[2])


@register_flop_formula(torch.ops.vlmo_fast.attention_backward)
def _flops_backward(grad: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    return 10 * int(query[0] * query[1] * query[2] * query[3] * key[2])
