"""Attention with a bias that the batch shares."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmo_fast.ops import reference
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
        backend: "auto", "eager", "sdpa" or "xformers".

    Returns:
        (B, heads, S_q, d) in the query's dtype.

    Raises:
        ValueError: shapes disagree, or the backend is unknown.
        TypeError: dtypes disagree.
        NotImplementedError: the backend cannot run here; names those that can.
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
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, value, bias))
    problem = Problem(query.device.type, query.dtype, needs_grad, query.shape[-1])
    implementation = select("attention", problem, backend)
    if implementation == "xformers":
        return _xformers(query, key, value, bias, key_mask, scale)
    if implementation == "eager":
        with torch.autocast(query.device.type, enabled=False):  # scores and softmax stay in float32
            return reference.attention(query, key, value, bias, key_mask, scale)
    return _sdpa(query, key, value, bias, key_mask, scale)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, key_mask: Tensor | None, scale: float
) -> Tensor:
    mask: Tensor | None = None
    if key_mask is not None:
        mask = key_mask[:, None, None, :]
    if bias is not None:
        bias = bias.to(query.dtype)[
            None
        ]  # a float32 mask beside bfloat16 queries gives wrong numbers in cuDNN's kernel
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _xformers(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, key_mask: Tensor | None, scale: float
) -> Tensor:
    from xformers.ops import memory_efficient_attention

    (batch, heads, num_queries, _), num_keys = query.shape, key.shape[2]
    mask: Tensor | None = None
    if bias is not None or key_mask is not None:
        # Its kernels want rows of the bias that begin at multiples of 8 elements: a slice of a wider tensor.
        padded = (num_keys + 7) // 8 * 8
        mask = query.new_zeros(1, heads, num_queries, padded)
        if bias is not None:
            mask = mask + F.pad(bias.to(query.dtype), (0, padded - num_keys))
        if key_mask is not None:
            mask = mask.masked_fill(~F.pad(key_mask, (0, padded - num_keys))[:, None, None, :], float("-inf"))
        mask = mask.expand(batch, -1, -1, -1)[..., :num_keys]
    swapped = (part.transpose(1, 2) for part in (query, key, value))  # (B, S, heads, d) each
    output: Tensor = memory_efficient_attention(*swapped, attn_bias=mask, scale=scale)
    return output.transpose(1, 2)
