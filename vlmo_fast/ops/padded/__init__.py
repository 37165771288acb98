"""Attention with a bias that the batch shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from vlmo_fast.ops.dispatch import load, select
from vlmo_fast.ops.registration import register
from vlmo_fast.ops.types import Problem

__all__ = ["AttentionBackend", "attention", "empty_rows", "rows"]


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
    name = select("attention", problem, backend)
    implementation = load("attention", name)
    out: Tensor
    if isinstance(implementation, AttentionBackend):
        out, _ = torch.ops.vlmo_fast.attention(query, key, value, bias, key_mask, scale, name)
    else:
        out = implementation(query, key, value, bias, key_mask, scale)
    return out


class AttentionBackend(ABC):
    """An implementation of `attention` inside its custom op. Tensors are as there."""

    @abstractmethod
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """The result, laid out as `empty_rows` does, and what `saved` describes."""

    @abstractmethod
    def saved(self, query: Tensor, key: Tensor) -> Tensor:
        """An empty tensor like the one that `forward` saves, by the `new_empty` of the (perhaps fake) query."""

    @abstractmethod
    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        key_mask: Tensor | None,
        saved: Tensor,
        scale: float,
        bias_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, laid out as `empty_rows` does, and of the bias (empty if not wanted)."""


def rows(x: Tensor) -> Tensor:
    """(B, H, S, d) as (B S, H, d): a view where a projection made it, or `empty_rows`."""
    return x.transpose(1, 2).flatten(0, 1)


def empty_rows(like: Tensor) -> Tensor:
    """An empty (B, H, S, d) that lies as (B, S, H, d) does; no view, which autograd would not let change in place."""
    _number, heads, length, width = like.shape
    return like.new_empty_strided(like.shape, (length * heads * width, width, heads * width, 1))


def _forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, key_mask: Tensor | None, scale: float, name: str
) -> tuple[Tensor, Tensor]:
    backend: AttentionBackend = load("attention", name)
    return backend.forward(query, key, value, bias, key_mask, scale)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    saved: Tensor,
    scale: float,
    bias_grad: bool,
    name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backend: AttentionBackend = load("attention", name)
    return backend.backward(grad, query, key, value, bias, key_mask, saved, scale, bias_grad)


def _fake(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    backend: AttentionBackend = load("attention", rest[-1])
    return empty_rows(query), backend.saved(query, key)


def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, bias_grad, _name = rest
    d_bias = bias.new_empty(bias.shape) if bias is not None and bias_grad else query.new_empty(0)
    return empty_rows(query), empty_rows(key), empty_rows(value), d_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.implementation = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _autograd(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    bias_grad = ctx.needs_input_grad[3]
    d_query, d_key, d_value, d_bias = torch.ops.vlmo_fast.attention_backward(
        grad, *ctx.saved_tensors, ctx.scale, bias_grad, ctx.implementation
    )
    return d_query, d_key, d_value, d_bias if bias_grad else None, None, None, None


def _flops(query: Any, key: Any, *_: Any, **__: Any) -> int:
    return 4 * int(query[0] * query[1] * query[2] * query[3] * key[2])


def _flops_backward(grad: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    return 10 * int(query[0] * query[1] * query[2] * query[3] * key[2])


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_mask"
register(
    f"attention({_INPUTS}, float scale, str implementation) -> (Tensor, Tensor)",
    _forward,
    fake=_fake,
    flops=_flops,
    setup_context=_setup_context,
    autograd=_autograd,
)
register(
    f"attention_backward(Tensor grad, {_INPUTS}, Tensor stats, float scale, bool bias_grad, str implementation) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    fake=_fake_backward,
    flops=_flops_backward,
    backward_of="attention",
)
