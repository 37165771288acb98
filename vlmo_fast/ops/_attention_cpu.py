"""The CPU library's attention (csrc/cpu/attention.cpp), which packed and padded batches share. float32."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmo_fast import extensions

__all__ = ["backward", "first_tokens", "forward"]

# They write into `out` and `stats`, or into the gradients; `d_bias` must be zeros.
torch.library.define(
    "vlmo_fast::attention_cpu_",
    "(Tensor query, Tensor key, Tensor value, Tensor queries, Tensor keys, Tensor? bias, Tensor? key_mask, "
    "float scale, Tensor(a!) out, Tensor(b!) stats) -> ()",
)
torch.library.define(
    "vlmo_fast::attention_backward_cpu_",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor queries, Tensor keys, Tensor? bias, "
    "Tensor? key_mask, float scale, Tensor stats, Tensor(a!) d_query, Tensor(b!) d_key, Tensor(c!) d_value, "
    "Tensor(d!)? d_bias) -> ()",
)


def first_tokens(segments: Tensor) -> Tensor:
    """The table of the sequences' first tokens where sequence i has the query i, (B, 2, 3) int32.

    Args:
        segments: (B, 2, 3) int32, of all their tokens, as `ops.packed_attention` has them.
    """
    text, image = segments.unbind(1)
    place = torch.where(text[:, 1] > 0, text[:, 2], image[:, 2])
    lengths = (text[:, 1] + image[:, 1]).clamp(max=1)
    table = torch.zeros_like(segments)
    table[:, 0] = torch.stack([torch.arange(len(table), dtype=torch.int32, device="cpu"), lengths, place], dim=1)
    return table


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
    stats = query.new_empty(2, query.shape[1], len(query))
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
