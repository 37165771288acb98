"""Attention in C++ (csrc/cpu/attention.cpp), float32: for padded batches, and the calls that packed ones share."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmo_fast import extensions
from vlmo_fast.ops.padded import AttentionBackend, empty_rows, rows

__all__ = ["BACKEND", "backward", "forward", "saved"]


class _Cpu(AttentionBackend):
    """A padded batch is one whose sequences lie one after the other."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (rows(x) for x in (query, key, value))
        out = empty_rows(query)
        stats = forward(q, k, v, _table(query), _table(key), bias, key_mask, scale, rows(out))
        return out, stats

    def saved(self, query: Tensor, key: Tensor) -> Tensor:
        number, heads, length, _width = query.shape
        return saved(query, heads, number * length)

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
        go, q, k, v = (rows(x) for x in (grad, query, key, value))
        d_query, d_key, d_value = (empty_rows(x) for x in (query, key, value))
        d_bias = backward(
            *(go, q, k, v, _table(query), _table(key), bias, key_mask, scale, saved),
            gradients=(rows(d_query), rows(d_key), rows(d_value)),
            bias_grad=bias_grad,
        )
        return d_query, d_key, d_value, d_bias


BACKEND = _Cpu()


def _table(x: Tensor) -> Tensor:
    """Of each of the B sequences of (B, H, S, d) its rows: (B, 2, 3) int32."""
    number, length = x.shape[0], x.shape[2]
    table = x.new_zeros(number, 2, 3, dtype=torch.int32)
    table[:, 0, 0] = torch.arange(number, dtype=torch.int32, device=x.device) * length
    table[:, 0, 1] = length
    return table


def saved(like: Tensor, heads: int, num_queries: int) -> Tensor:
    """The shape of what `forward` returns."""
    return like.new_empty(2, heads, num_queries)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    out: Tensor,
) -> Tensor:
    """softmax(scale * query key^T + bias) value of each head of each sequence.

    Args:
        query: (N_q, H, d) float32.
        key: (N_k, H, d) float32.
        value: (N_k, H, d) float32.
        queries: (B, 2, 3) int32, of each sequence's queries two parts: first row, length, first row of the bias.
        keys: (B, 2, 3) int32, of its keys: first row, length, first column of the bias.
        bias: (H, R_q, R_k), or None.
        key_mask: (B, S_k) bool, False for keys that no query sees, or None.
        scale: factor of the scores.
        out: (N_q, H, d) float32, which is written where a sequence has a query.

    Returns:
        (2, H, N_q) float32, of each query the largest score and the sum of exp(score - largest), for `backward`.
    """
    extensions.load("cpu")
    stats = saved(query, query.shape[1], len(query))
    torch.ops.vlmo_fast.attention_cpu_(
        *(_dense(query), _dense(key), _dense(value), queries.contiguous(), keys.contiguous(), _float(bias)),
        *(None if key_mask is None else key_mask.contiguous(), scale, out, stats),
    )
    return stats


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    stats: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    bias_grad: bool,
) -> Tensor:
    """Gradients from that of the result.

    Args:
        grad: (N_q, H, d) float32, of `forward`'s result.
        query: as there.
        key: as there.
        value: as there.
        queries: as there.
        keys: as there.
        bias: as there.
        key_mask: as there.
        scale: as there.
        stats: what it returned.
        gradients: where those of query, key and value go, shaped like them, contiguous.
        bias_grad: whether that of the bias is wanted.

    Returns:
        The gradient of the bias in its dtype, summed over the sequences in their order; empty where it is not wanted.
    """
    extensions.load("cpu")
    d_bias = query.new_zeros(bias.shape) if bias is not None and bias_grad else None
    torch.ops.vlmo_fast.attention_backward_cpu_(
        *(_dense(grad), _dense(query), _dense(key), _dense(value), queries.contiguous(), keys.contiguous()),
        *(_float(bias), None if key_mask is None else key_mask.contiguous(), scale, stats, *gradients, d_bias),
    )
    return query.new_empty(0) if d_bias is None or bias is None else d_bias.to(bias.dtype)


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else _dense(bias.float())


def _dense(x: Tensor) -> Tensor:
    """The tensor, copied where the numbers of its last dimension do not lie side by side."""
    return x if x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous()
