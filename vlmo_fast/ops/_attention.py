"""Attention with a bias that the batch shares."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmo_fast.ops import _fused, reference
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
    bias_grad = torch.is_grad_enabled() and bias is not None and bias.requires_grad
    others_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    problem = Problem(
        *(query.device.type, query.dtype, bias_grad or others_grad, query.shape[-1]),
        only_bias_grad=bias_grad and not others_grad,
    )
    implementation = select("attention", problem, backend)
    if implementation == "xformers":
        return _fused.xformers(query, key, value, bias, key_mask, scale)
    if implementation == "eager":
        with torch.autocast(query.device.type, enabled=False):  # scores and softmax stay in float32
            return reference.attention(query, key, value, bias, key_mask, scale)
    return _fused.sdpa(query, key, value, bias, key_mask, scale)
