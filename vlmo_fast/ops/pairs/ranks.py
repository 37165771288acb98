"""Scores of retrieval without the matrix of similarities: ranks of the true matches, and the best few candidates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmo_fast.ops import reference
from vlmo_fast.ops.dispatch import load, select
from vlmo_fast.ops.pairs.blocks import blocks, matmul_operand, require, require_finite, similarities
from vlmo_fast.ops.pairs.checks import check_embeddings, check_positives, problem_of
from vlmo_fast.ops.pairs.lse import accumulation_dtype
from vlmo_fast.ops.types import Problem

__all__ = [
    "RetrievalRanks",
    "SimilarityTopk",
    "ranks_in_blocks",
    "recall_at_k",
    "retrieval_ranks",
    "similarity_topk",
    "topk_in_blocks",
]


class RetrievalRanks(NamedTuple):
    """Ranks of the best true match, from 1.

    Attributes:
        text_ranks: (N,) int64, for each image the rank of its best text.
        image_ranks: (M,) int64, for each text the rank of its best image.
    """

    text_ranks: Tensor
    image_ranks: Tensor


class SimilarityTopk(NamedTuple):
    """The candidates nearest to each query.

    Attributes:
        values: (N, k) similarities, descending.
        indices: (N, k) int64; of equal similarities the lower index comes first.
    """

    values: Tensor
    indices: Tensor


def retrieval_ranks(
    image_embeds: Tensor,
    text_embeds: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    backend: str = "auto",
) -> RetrievalRanks:
    """Rank of the best true match of each image among all texts and of each text among all images, in linear memory.

    rank = 1 + candidates with a greater similarity + candidates with an equal one and a lower index.

    On a CPU equal candidates have equal similarities, wherever they stand; elsewhere that is left to the matmul.

    Args:
        image_embeds: (N, P), any float dtype; similarities are dot products in float32 at least.
        text_embeds: (M, P); without ids, N = M and row i belongs to image i.
        image_ids: (N,) int64, what each image shows, or None. Equal ids match: five captions of an image share its id.
        text_ids: (M,) int64; with `image_ids` or not at all.
        backend: "auto", or the name of an implementation.

    Returns:
        `RetrievalRanks`; `recall_at_k` makes recalls of them. No gradient flows.

    Raises:
        ValueError: shapes or devices disagree, embeddings are not finite, or a row has no match.
        TypeError: dtypes disagree.
    """
    op = "retrieval_ranks"
    one = torch.ones((), dtype=image_embeds.dtype, device=image_embeds.device)
    check_embeddings(op, image_embeds, text_embeds, one, image_ids, text_ids)
    if image_ids is not None and text_ids is not None:
        check_positives(op, image_ids, text_ids)
    find = load(op, select(op, problem_of(image_embeds, text_embeds), backend))
    with torch.no_grad(), torch.autocast(image_embeds.device.type, enabled=False):
        require_finite(op, "image_embeds and text_embeds", image_embeds, text_embeds)
        return RetrievalRanks(*find(image_embeds, text_embeds, image_ids, text_ids))


def ranks_in_blocks(
    image_embeds: Tensor, text_embeds: Tensor, image_ids: Tensor | None, text_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference.retrieval_ranks` in linear memory; arguments and results as there."""
    of_images = _ranks(image_embeds, text_embeds, image_ids, text_ids)
    return of_images, _ranks(text_embeds, image_embeds, text_ids, image_ids)


def _ranks(rows: Tensor, columns: Tensor, row_ids: Tensor | None, column_ids: Tensor | None) -> Tensor:
    ranks = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    rows, columns = matmul_operand(rows), matmul_operand(columns)
    one = torch.ones((), dtype=accumulation_dtype(rows.dtype), device=rows.device)
    index = torch.arange(len(columns), device=rows.device)
    first = _first_equal(columns)
    for part in blocks(len(rows), len(columns), rows):
        scores = similarities(rows[part], columns, one)  # (R, M)
        scores = scores if first is None else scores[:, first]
        if row_ids is None or column_ids is None:
            match = index[part, None]  # (R, 1)
        else:
            negative = row_ids[part, None] != column_ids
            match = scores.masked_fill(negative, float("-inf")).argmax(1, keepdim=True)
            require(~negative.all(1).any(), "retrieval_ranks: each row must have a match, got one with none")
        best = scores.gather(1, match)
        ranks[part] = 1 + ((scores > best) | ((scores == best) & (index < match))).sum(1)
    return ranks


def recall_at_k(ranks: Tensor, k: int) -> Tensor:
    """Part of the queries whose best true match is among the first k: 0-d float32 in [0, 1].

    Args:
        ranks: (N,) of `retrieval_ranks`.
        k: at least 1.
    """
    return (ranks <= k).float().mean()


def similarity_topk(queries: Tensor, candidates: Tensor, k: int, *, backend: str = "auto") -> SimilarityTopk:
    """The k candidates of largest dot product with each query, in a stable descending order and linear memory.

    Replaces:
        (queries @ candidates.T).sort(dim=1, descending=True, stable=True), cut off after k

    On a CPU equal candidates have equal similarities, wherever they stand; elsewhere that is left to the matmul.

    Args:
        queries: (N, P), any float dtype; similarities are dot products in float32 at least.
        candidates: (M, P), dtype and device of the queries.
        k: from 1 to M.
        backend: "auto", or the name of an implementation.

    Returns:
        `SimilarityTopk`. No gradient flows.

    Raises:
        ValueError: shapes or devices disagree, embeddings are not finite, or k is out of range.
        TypeError: dtypes disagree.
    """
    op = "similarity_topk"
    shapes = f"got {tuple(queries.shape)} and {tuple(candidates.shape)}"
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1]:
        raise ValueError(f"{op}: queries and candidates must be (N, P) and (M, P), {shapes}")
    if not queries.numel() or not candidates.numel():
        raise ValueError(f"{op}: queries and candidates must not be empty, {shapes}")
    if queries.device != candidates.device:
        raise ValueError(
            f"{op}: queries and candidates must be on one device, got {queries.device} and {candidates.device}"
        )
    if queries.dtype != candidates.dtype or not queries.is_floating_point():
        raise TypeError(
            f"{op}: queries and candidates must share one float dtype, got {queries.dtype} and {candidates.dtype}"
        )
    if not 1 <= k <= len(candidates):
        raise ValueError(f"{op}: k must be from 1 to {len(candidates)}, got {k}")
    find = load(op, select(op, Problem(queries.device.type, queries.dtype, False), backend))
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        require_finite(op, "queries and candidates", queries, candidates)
        return SimilarityTopk(*find(queries, candidates, k))


def topk_in_blocks(queries: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`reference.similarity_topk` in linear memory; arguments and results as there."""
    dtype = accumulation_dtype(queries.dtype)
    values = torch.empty(len(queries), k, dtype=dtype, device=queries.device)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    rows, columns = matmul_operand(queries), matmul_operand(candidates)
    one = torch.ones((), dtype=dtype, device=queries.device)
    first = _first_equal(columns)
    for part in blocks(len(rows), len(columns), rows):
        scores = similarities(rows[part], columns, one)  # (R, M)
        scores = scores if first is None else scores[:, first]
        if dtype == torch.float32:
            indices[part] = _key(scores).topk(k).values.bitwise_and_(0xFFFFFFFF).bitwise_xor_(0xFFFFFFFF)
        else:
            indices[part] = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
        values[part] = scores.gather(1, indices[part])
    return values, indices


def _key(scores: Tensor) -> Tensor:
    """int64 keys in the order of (score, -column): the float's bits, made monotonic, above the inverted column."""
    bits = (scores + 0.0).view(torch.int32).long()  # -0.0 + 0.0 is 0.0: the two zeros are equal
    ordered = torch.where(
        bits < 0, bits ^ 0x7FFFFFFF, bits
    )  # of negative floats the larger bits are the smaller number
    column = torch.arange(scores.shape[1], device=scores.device)
    return (ordered << 32) | (column ^ 0xFFFFFFFF)


def _first_equal(columns: Tensor) -> Tensor | None:
    """As the reference's, (M,); None where no two are equal, and on accelerators, where a look would wait."""
    if columns.device.type != "cpu":
        return None
    # Eight bytes of a vector tell most vectors apart. -0.0 + 0.0 is 0.0: the two zeros are equal.
    head = F.pad(columns[:, :2], (0, max(0, 2 - columns.shape[1]))) + 0.0
    key, order = head.view(torch.int64)[:, 0].sort(stable=True)
    like_next = key[1:] == key[:-1]
    alike = F.pad(like_next, (1, 0)) | F.pad(like_next, (0, 1))  # (M,), in the keys' order
    if not alike.any():
        return None
    some = order[alike].sort().values
    first = torch.arange(len(columns))
    first[some] = some[reference.first_equal(columns[some])]
    return first
