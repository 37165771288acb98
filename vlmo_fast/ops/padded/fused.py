"""The fused attention of torch and of xformers: what their CUDA kernels must be given to run, and to be right.

- The bias in the query's dtype: cuDNN's kernel reads a float32 mask beside bfloat16 queries as something else.
- Heads whose size is a multiple of 8, where there is a mask: for others (34, base_plus) torch would store the scores,
  and xformers refuses. Zeros are appended, which change no score, and cut off again.
- For xformers the mask of each head of each sample, in rows that begin at multiples of 8 numbers, contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["sdpa", "xformers"]


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, key_mask: Tensor | None, scale: float
) -> Tensor:
    """`ops.attention` on torch's scaled_dot_product_attention; arguments as there."""
    mask, width = _mask(query, bias, key_mask), value.shape[-1]
    if mask is not None and query.device.type != "cpu":
        query, key, value = (_pad_lanes(x) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)[..., :width]


def xformers(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, key_mask: Tensor | None, scale: float
) -> Tensor:
    """`ops.attention` on xformers' memory_efficient_attention; arguments as there."""
    from xformers.ops import memory_efficient_attention

    mask, width, num_keys = _mask(query, bias, key_mask), value.shape[-1], key.shape[2]
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
        mask = _pad_lanes(mask.contiguous()).expand(*query.shape[:3], -1)[..., :num_keys]  # (B, heads, S_q, S_k)
    swapped = (_pad_lanes(x).transpose(1, 2) for x in (query, key, value))  # (B, S, heads, d) each
    output: Tensor = memory_efficient_attention(*swapped, attn_bias=mask, scale=scale)
    return output.transpose(1, 2)[..., :width]


def _mask(query: Tensor, bias: Tensor | None, key_mask: Tensor | None) -> Tensor | None:
    """Bias and mask as one: (1 or B, heads, S_q, S_k) in the query's dtype; without a bias (B, 1, 1, S_k) bool."""
    visible = None if key_mask is None else key_mask[:, None, None, :]
    if bias is None:
        return visible
    bias = bias.to(query.dtype)[None]
    return bias if visible is None else bias.masked_fill(~visible, float("-inf"))


def _pad_lanes(x: Tensor) -> Tensor:
    """The tensor with zeros appended along its last dimension, up to a multiple of 8."""
    missing = -x.shape[-1] % 8
    return F.pad(x, (0, missing)) if missing else x
