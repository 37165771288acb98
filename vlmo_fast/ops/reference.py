"""The operations as the paper writes them: eager, any float dtype, torch alone. The oracle of every fast path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmo_fast.ops.types import ExpertWeights

__all__ = [
    "attention",
    "contrastive_loss",
    "contrastive_lse",
    "mome_ffn",
    "negative_probabilities",
    "packed_attention",
    "positives_of",
    "retrieval_ranks",
    "similarities",
    "similarity_topk",
]


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
        bias_rows = torch.cat([torch.arange(first, first + length) for _, length, first in parts])  # (S,)
        num_queries = min(1, len(rows)) if cls_only else len(rows)
        query_rows = torch.tensor([sequence] * num_queries, dtype=torch.int64) if cls_only else rows
        scores = torch.einsum("qhd,khd->hqk", query[query_rows].to(compute_dtype) * scale, key[rows].to(compute_dtype))
        if bias is not None:
            scores = scores + bias[:, bias_rows[:num_queries]][:, :, bias_rows]
        weights = scores.softmax(dim=-1).to(value.dtype)  # (H, queries, S)
        owned.append(query_rows)
        results.append(torch.einsum("hqk,khd->qhd", weights, value[rows]))
    return torch.zeros_like(query).index_copy(0, torch.cat(owned).to(query.device), torch.cat(results))


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


def similarities(rows: Tensor, columns: Tensor, logit_scale: Tensor) -> Tensor:
    """logit_scale rows columns^T, (N, M), in float32 at least."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return logit_scale.to(rows.device, dtype) * (rows.to(dtype) @ columns.to(dtype).t())


def positives_of(
    logits: Tensor, row_ids: Tensor | None, column_ids: Tensor | None, diagonal: int | None
) -> Tensor | None:
    """(N, M) bool: where ids are equal, or column = row + diagonal; None where nothing was given."""
    if row_ids is not None and column_ids is not None:
        return row_ids[:, None] == column_ids
    if diagonal is None:
        return None
    row, column = (torch.arange(size, device=logits.device) for size in logits.shape)
    return row[:, None] + diagonal == column


def contrastive_lse(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    diagonal: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Row and column log-sum-exp of the similarities, positives left out: (N,) and (M,)."""
    logits = similarities(rows, columns, logit_scale)
    positive = positives_of(logits, row_ids, column_ids, diagonal)
    if positive is not None:
        logits = logits.masked_fill(positive, float("-inf"))
    return logits.logsumexp(1), logits.logsumexp(0)


def contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    positives: str = "exclude",
) -> Tensor:
    """Mean over rows and columns of -log p(positive), averaged over a row's positives, in float32 at least.

    Without ids this is the symmetric cross-entropy of the (N, N) matrix against its diagonal.
    """
    logits = similarities(image_embeds, text_embeds, logit_scale)  # (N, M)
    if image_ids is None or text_ids is None:
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2
    positive = image_ids[:, None] == text_ids
    total = logits.new_zeros(())
    for rows, match in ((logits, positive), (logits.t(), positive.t())):
        if positives == "average":
            terms = rows.logsumexp(1, keepdim=True) - rows
        else:
            negatives = rows.masked_fill(match, float("-inf")).logsumexp(1, keepdim=True)
            terms = F.softplus(negatives - rows, threshold=40)  # log(exp(negatives) + exp(row)) - row
        total = total + (terms.masked_fill(~match, 0.0).sum(1) / match.sum(1)).mean()
    return total / 2


def negative_probabilities(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    diagonal: int | None = None,
) -> Tensor:
    """Softmax over each row of the similarities with the positives left out: (N, M)."""
    logits = similarities(rows, columns, logit_scale)
    positive = positives_of(logits, row_ids, column_ids, diagonal)
    if positive is not None:
        logits = logits.masked_fill(positive, float("-inf"))
    return logits.softmax(1)


def retrieval_ranks(
    image_embeds: Tensor, text_embeds: Tensor, image_ids: Tensor | None = None, text_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Place of the first match in the stable descending order of each row, and of each column: (N,) and (M,) int64."""
    one = torch.ones((), dtype=image_embeds.dtype)
    scores = similarities(image_embeds, text_embeds, one)
    positive = positives_of(scores, image_ids, text_ids, 0)
    assert positive is not None
    ranks = []
    for rows, match, candidates in ((scores, positive, text_embeds), (scores.t(), positive.t(), image_embeds)):
        order = rows[:, first_equal(candidates)].sort(dim=1, descending=True, stable=True).indices
        ranks.append(match.gather(1, order).int().argmax(1) + 1)
    return ranks[0], ranks[1]


def similarity_topk(queries: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k of the stable descending order of each query's similarities: values and indices, (N, k)."""
    scores = similarities(queries, candidates, torch.ones((), dtype=queries.dtype))[:, first_equal(candidates)]
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


def first_equal(rows: Tensor) -> Tensor:
    """Of each row of (M, P) the first that equals it, (M,) int64.

    A matmul may add up equal rows in different orders, by where they stand; what it found for the first holds for all.
    """
    group = torch.unique(rows + 0.0, dim=0, return_inverse=True)[1]  # -0.0 + 0.0 is 0.0: the two zeros are equal
    index = torch.arange(len(rows), device=rows.device)
    return torch.full_like(index, len(rows)).scatter_reduce(0, group, index, "amin")[group]
