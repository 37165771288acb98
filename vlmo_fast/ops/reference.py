"""The operations as the paper writes them: eager, any float dtype, torch alone. The oracle of every fast path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from vlmo_fast.ops._ffn import ExpertWeights

__all__ = ["attention", "contrastive_loss", "mome_ffn", "packed_attention"]


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


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    bias: Tensor | None,
    cls_only: bool,
    scale: float,
) -> Tensor:
    """Attention within each sequence of a packed batch, one sequence after the other.

    Args:
        query: (N, H, d), or (B, H, d) with `cls_only`.
        key: (N, H, d).
        value: (N, H, d).
        segments: (B, 2, 3) integers, (first row, length, first bias row) of each sequence's text and of its image.
        bias: (H, R, R), added to the scaled scores, or None.
        cls_only: whether each sequence has one query, that of its first token.
        scale: factor of the scores.

    Returns:
        (N, H, d), or (B, H, d) with `cls_only`, in the query's dtype; 0 in rows that no sequence owns.
    """
    compute_dtype = torch.promote_types(query.dtype, torch.float32)
    owned, results = [torch.empty(0, dtype=torch.int64)], [query[:0]]
    for sequence, parts in enumerate(segments.tolist()):
        rows = torch.cat([torch.arange(row, row + length) for row, length, _ in parts])  # (S,)
        places = torch.cat([torch.arange(place, place + length) for _, length, place in parts])  # (S,) rows of bias
        num_queries = min(1, len(rows)) if cls_only else len(rows)
        query_rows = torch.tensor([sequence] * num_queries, dtype=torch.int64) if cls_only else rows
        scores = torch.einsum("qhd,khd->hqk", query[query_rows].to(compute_dtype) * scale, key[rows].to(compute_dtype))
        if bias is not None:
            scores = scores + bias[:, places[:num_queries]][:, :, places]
        weights = scores.softmax(dim=-1).to(value.dtype)  # (H, queries, S)
        owned.append(query_rows)
        results.append(torch.einsum("hqk,khd->qhd", weights, value[rows]))
    return torch.zeros_like(query).index_copy(0, torch.cat(owned).to(query.device), torch.cat(results))


def contrastive_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of the (N, N) similarity matrix against its diagonal, in float32 at least."""
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    logits = logit_scale.to(dtype) * (image_embeds.to(dtype) @ text_embeds.to(dtype).t())  # (N, N)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def mome_ffn(
    x: Tensor,
    group_sizes: Sequence[int],
    experts: Sequence[ExpertWeights],
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    eps: float,
) -> Tensor:
    """X + row_scale * layer_scale * fc2(gelu(fc1(layer_norm(x)))), each group of rows with an expert of its own.

    Args:
        x: (N, D).
        group_sizes: rows of each group; they add up to N.
        experts: parameters of each group's expert; the dtype of the linear layers is that of the products.
        layer_scale: (D,) or None.
        row_scale: (N,) or None.
        eps: epsilon of the norms.

    Returns:
        (N, D) in the dtype of x.
    """
    parts = []
    for part, expert in zip(x.split(list(group_sizes)), experts, strict=True):
        norm = (expert.norm_weight.to(x.dtype), expert.norm_bias.to(x.dtype))
        normed = F.layer_norm(part, part.shape[1:], *norm, eps).to(expert.fc1_weight.dtype)
        hidden = F.gelu(F.linear(normed, expert.fc1_weight, expert.fc1_bias))  # (n, F)
        parts.append(F.linear(hidden, expert.fc2_weight, expert.fc2_bias))  # (n, D)
    branch = torch.cat(parts).to(x.dtype)
    if layer_scale is not None:
        branch = branch * layer_scale.to(x.dtype)
    if row_scale is not None:
        branch = branch * row_scale.to(x.dtype)[:, None]
    return x + branch
