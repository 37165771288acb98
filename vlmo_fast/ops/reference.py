"""The operations as the paper writes them: eager, any float dtype, torch alone. The oracle of every fast path."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["attention", "contrastive_loss"]


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, key_mask: Tensor | None, scale: float
) -> Tensor:
    """softmax(scale * query key^T + bias) value, with scores and softmax in float32 at least.

    Args:
        query: (B, heads, S_q, d).
        key: (B, heads, S_k, d).
        value: (B, heads, S_k, d).
        bias: (heads, S_q, S_k), added to the scaled scores, or None.
        key_mask: (B, S_k) bool, False for keys that nothing attends to, or None.
        scale: factor of the scores.

    Returns:
        (B, heads, S_q, d) in the query's dtype.
    """
    compute_dtype = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(compute_dtype) * scale) @ key.to(compute_dtype).transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    return scores.softmax(dim=-1).to(value.dtype) @ value


def contrastive_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of the (N, N) similarity matrix against its diagonal, in float32 at least."""
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    logits = logit_scale.to(dtype) * (image_embeds.to(dtype) @ text_embeds.to(dtype).t())  # (N, N)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2
