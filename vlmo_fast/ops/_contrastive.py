"""The contrastive loss of images and texts, exact and in linear memory.

The loss is made of the two log-sum-exps of `contrastive_lse`, which leave the positives out, and of the positives'
own logits: log(exp(lse) + exp(s)) - s = softplus(lse - s). So nothing cancels where a model is sure of its answer, and
the same log-sum-exps serve the hard negatives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmo_fast.ops import _similarity, reference
from vlmo_fast.ops._similarity import Excluded
from vlmo_fast.ops.dispatch import Problem, select

__all__ = ["ContrastiveLSE", "contrastive_loss", "contrastive_lse"]


class ContrastiveLSE(NamedTuple):
    """Log-sum-exps of the scaled similarities, in nats.

    Attributes:
        image_lse: (N,), over the texts of each image.
        text_lse: (M,), over the images of each text.
    """

    image_lse: Tensor
    text_lse: Tensor


def contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    positives: str = "exclude",
    workspace_bytes: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Symmetric image-text contrastive loss that never stores the N x N logits.

    Replaces, in memory linear in N (VLMo, arXiv:2111.02358, "Image-Text Contrast"):
        s = logit_scale * image_embeds @ text_embeds.T
        (cross_entropy(s, arange(N)) + cross_entropy(s.T, arange(N))) / 2

    With ids, equal ids are positives, and N and M may differ. Each row's loss is then a mean over its positives p:
        "exclude":  -log(exp(s_p) / (exp(s_p) + sum of exp(s) over the negatives)); other positives count nowhere
        "average":  -log(exp(s_p) / sum of exp(s) over all columns)
    and the loss the mean over rows plus the mean over columns, halved. A row without a positive is an error on a CPU
    and gives NaN elsewhere.

    Args:
        image_embeds: unit-norm embeddings, (N, P), any float dtype.
        text_embeds: unit-norm embeddings, (M, P); without ids, N = M and row i belongs to image i.
        logit_scale: 0-d multiplier of the similarities, already exponentiated.
        image_ids: (N,) int64, what each image shows, or None.
        text_ids: (M,) int64, what each text describes; with `image_ids` or not at all.
        positives: "exclude" or "average", for a row with several positives. Without ids they are the same.
        workspace_bytes: memory that may hold similarities from the forward for the backward pass, which then need not
            be computed again: N M 4 bytes for all of them.
        backend: "auto", or the name of an implementation.

    Returns:
        0-d loss in nats, float32, or float64 for float64 embeddings; NaN where embeddings are not finite.

    Raises:
        ValueError: shapes or devices disagree, a row has no positive, or the backend is unknown.
        TypeError: dtypes disagree.
        NotImplementedError: the backend cannot run here; names those that can.
    """
    op = "contrastive_loss"
    _check(op, image_embeds, text_embeds, logit_scale, image_ids, text_ids)
    if positives not in ("exclude", "average"):
        raise ValueError(f"{op}: positives must be 'exclude' or 'average', got {positives!r}")
    _check_workspace(op, workspace_bytes)
    if image_ids is not None and text_ids is not None:
        _check_positives(op, image_ids, text_ids)
    implementation = select(op, _problem(image_embeds, text_embeds, image_ids), backend)
    with torch.autocast(image_embeds.device.type, enabled=False):
        if implementation == "eager":
            return reference.contrastive_loss(image_embeds, text_embeds, logit_scale, image_ids, text_ids, positives)
        excluded = Excluded(diagonal=0) if image_ids is None else Excluded(image_ids, text_ids)
        if positives == "average" and image_ids is not None:
            excluded = Excluded()
        lse = _lse(image_embeds, text_embeds, logit_scale, excluded, workspace_bytes, implementation)
        if image_ids is None or text_ids is None:
            return _diagonal_loss(image_embeds, text_embeds, logit_scale, lse)
        if positives == "average":
            return _average_loss(image_embeds, text_embeds, logit_scale, lse, image_ids, text_ids)
        return _exclude_loss(image_embeds, text_embeds, logit_scale, lse, image_ids, text_ids)


def contrastive_lse(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    exclude_diagonal: bool = False,
    workspace_bytes: int = 0,
    backend: str = "auto",
) -> ContrastiveLSE:
    """Log-sum-exps of the rows and columns of the scaled similarities, for those who build a loss of their own.

    Replaces, in memory linear in N + M and differentiable in all three tensors:
        s = logit_scale * image_embeds @ text_embeds.T
        s.logsumexp(1), s.logsumexp(0)

    Args:
        image_embeds: (N, P), any float dtype.
        text_embeds: (M, P).
        logit_scale: 0-d multiplier of the similarities, already exponentiated.
        image_ids: (N,) int64, or None. Pairs of equal ids are left out.
        text_ids: (M,) int64; with `image_ids` or not at all.
        exclude_diagonal: leave text i out for image i; not together with ids.
        workspace_bytes: as for `contrastive_loss`.
        backend: "auto", or the name of an implementation.

    Returns:
        `ContrastiveLSE`, in float32, or in float64 for float64 embeddings; -inf where everything is left out.

    Raises:
        ValueError: shapes or devices disagree, or the backend is unknown.
        TypeError: dtypes disagree.
        NotImplementedError: the backend cannot run here; names those that can.
    """
    op = "contrastive_lse"
    _check(op, image_embeds, text_embeds, logit_scale, image_ids, text_ids, pairs=False)
    _check_workspace(op, workspace_bytes)
    if exclude_diagonal and image_ids is not None:
        raise ValueError(f"{op}: exclude_diagonal must be False together with ids, got True")
    implementation = select(op, _problem(image_embeds, text_embeds, image_ids), backend)
    excluded = Excluded(image_ids, text_ids, 0 if exclude_diagonal else None)
    with torch.autocast(image_embeds.device.type, enabled=False):
        if implementation == "eager":
            return ContrastiveLSE(*reference.contrastive_lse(image_embeds, text_embeds, logit_scale, *excluded))
        lse = _lse(image_embeds, text_embeds, logit_scale, excluded, workspace_bytes, implementation)
        dtype = _similarity.wide(image_embeds.dtype)
        return ContrastiveLSE(lse.image_lse.to(dtype), lse.text_lse.to(dtype))


# Validation


def _check(
    op: str,
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    pairs: bool = True,
) -> None:
    """What all ops on a matrix of similarities ask of their arguments; `pairs`: without ids, row i belongs to row i."""
    shapes = f"got {tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}"
    if (image_ids is None) != (text_ids is None):
        raise ValueError(f"{op}: image_ids and text_ids must come together, got one of them")
    if pairs and image_ids is None:
        if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape or not len(image_embeds):
            raise ValueError(f"{op}: image_embeds and text_embeds must be (N, P) alike with N >= 1, {shapes}")
    elif image_embeds.ndim != 2 or text_embeds.ndim != 2 or image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(f"{op}: image_embeds and text_embeds must be (N, P) and (M, P), {shapes}")
    if not image_embeds.numel() or not text_embeds.numel():
        raise ValueError(f"{op}: image_embeds and text_embeds must not be empty, {shapes}")
    if image_embeds.device != text_embeds.device:
        raise ValueError(
            f"{op}: image_embeds and text_embeds must be on one device, "
            f"got {image_embeds.device} and {text_embeds.device}"
        )
    if image_embeds.dtype != text_embeds.dtype or not image_embeds.is_floating_point():
        raise TypeError(
            f"{op}: image_embeds and text_embeds must share one float dtype, "
            f"got {image_embeds.dtype} and {text_embeds.dtype}"
        )
    if logit_scale.ndim:
        raise ValueError(f"{op}: logit_scale must be 0-d, got shape {tuple(logit_scale.shape)}")
    if logit_scale.device != image_embeds.device and logit_scale.device.type != "cpu":
        raise ValueError(f"{op}: logit_scale must be on {image_embeds.device}, got {logit_scale.device}")
    if not logit_scale.is_floating_point():
        raise TypeError(f"{op}: logit_scale must be a float tensor, got {logit_scale.dtype}")
    for name, ids, embeds in (("image_ids", image_ids, image_embeds), ("text_ids", text_ids, text_embeds)):
        if ids is None:
            continue
        if ids.dtype != torch.int64:
            raise TypeError(f"{op}: {name} must be int64, got {ids.dtype}")
        if ids.shape != (len(embeds),):
            raise ValueError(f"{op}: {name} must have shape {(len(embeds),)}, got {tuple(ids.shape)}")
        if ids.device != embeds.device:
            raise ValueError(f"{op}: {name} must be on {embeds.device}, got {ids.device}")


def _check_workspace(op: str, workspace_bytes: int) -> None:
    if workspace_bytes < 0:
        raise ValueError(f"{op}: workspace_bytes must be at least 0, got {workspace_bytes}")


def _check_positives(op: str, image_ids: Tensor, text_ids: Tensor) -> None:
    if image_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return  # a look would wait for the device or break the graph; the loss is NaN instead
    for name, ids, other, what in (
        ("image_ids", image_ids, text_ids, "text"),
        ("text_ids", text_ids, image_ids, "image"),
    ):
        alone = ~torch.isin(ids, other)
        if alone.any():
            raise ValueError(f"{op}: {name} must each have a {what} of the same id, got {ids[alone][0].item()} without")


def _problem(image_embeds: Tensor, text_embeds: Tensor, image_ids: Tensor | None) -> Problem:
    return Problem(
        image_embeds.device.type,
        image_embeds.dtype,
        torch.is_grad_enabled() and (image_embeds.requires_grad or text_embeds.requires_grad),
    )


# The loss from log-sum-exps


def _lse(
    rows: Tensor, columns: Tensor, logit_scale: Tensor, excluded: Excluded, workspace_bytes: int, implementation: str
) -> ContrastiveLSE:
    """As `contrastive_lse`, but `precise`."""
    dtype = _similarity.wide(rows.dtype)
    kept_rows = _similarity.kept_rows(len(rows), len(columns), dtype.itemsize, workspace_bytes)
    if not (torch.is_grad_enabled() and (rows.requires_grad or columns.requires_grad or logit_scale.requires_grad)):
        kept_rows = 0
    scale = logit_scale.to(rows.device, dtype)
    row_lse, column_lse, _ = _contrastive_lse(rows, columns, scale, *excluded, kept_rows, implementation)
    return ContrastiveLSE(row_lse, column_lse)


def _diagonal_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, lse: ContrastiveLSE, diagonal: int = 0
) -> Tensor:
    """The loss where each image has its text and nothing else."""
    dtype = _similarity.wide(image_embeds.dtype)
    logits = logit_scale.to(dtype) * (image_embeds.to(dtype) * text_embeds.to(dtype)).sum(1)  # (N,) of the positives
    # An infinite logit would give a loss of 0 or infinity; 0 * infinity is NaN.
    terms = _softplus(lse.image_lse - logits) + _softplus(lse.text_lse - logits) + 0 * logits
    return _or_nan(terms.mean() / 2).to(dtype)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); torch's own threshold of 20 would cost float64 half of its digits."""
    return F.softplus(x, threshold=40)


def _or_nan(loss: Tensor) -> Tensor:
    return torch.where(loss.isfinite(), loss, torch.nan)


class _Matches(NamedTuple):
    """The positives of each row as ranges of the columns sorted by id: no shape depends on the ids' values."""

    order: Tensor  # (M,) columns by id
    start: Tensor  # (N,) of each row's range
    length: Tensor  # (N,)


def _matches(row_ids: Tensor, column_ids: Tensor) -> _Matches:
    ids, order = column_ids.sort(stable=True)
    start, end = torch.searchsorted(ids, row_ids), torch.searchsorted(ids, row_ids, right=True)
    return _Matches(order, start, end - start)


def _average_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    lse: ContrastiveLSE,
    image_ids: Tensor,
    text_ids: Tensor,
) -> Tensor:
    """Mean log-probability over the positives; their logits enter linearly, so sums of embeddings by id are enough."""
    dtype = _similarity.wide(image_embeds.dtype)
    of_images, of_texts = _matches(image_ids, text_ids), _matches(text_ids, image_ids)
    sorted_ids = text_ids[of_images.order]
    group = torch.searchsorted(sorted_ids, text_ids)  # (M,) where a text's id first stands in the order
    texts = text_embeds.to(dtype)
    images_of_text = of_texts.length.to(dtype)[:, None]  # (M, 1)
    sums = torch.zeros_like(texts).index_add(0, group, texts)  # (M, P), by group
    shares = torch.zeros_like(texts).index_add(0, group, texts / images_of_text)
    own = of_images.start.clamp(max=len(text_ids) - 1)
    texts_of_image = of_images.length.to(dtype)[:, None]  # (N, 1)
    mean = sums[own] / (texts_of_image * len(image_ids)) + shares[own] / len(text_ids)  # (N, P)
    positives = logit_scale.to(dtype) * (image_embeds.to(dtype) * mean).sum()
    loss = (lse.image_lse.mean() + lse.text_lse.mean() - positives) / 2
    alone = (texts_of_image == 0).any() | (images_of_text == 0).any()
    return _or_nan(loss.masked_fill(alone, torch.nan)).to(dtype)


def _exclude_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    lse: ContrastiveLSE,
    image_ids: Tensor,
    text_ids: Tensor,
) -> Tensor:
    """Each positive against the negatives alone."""
    dtype = _similarity.wide(image_embeds.dtype)
    of_images, of_texts = _matches(image_ids, text_ids), _matches(text_ids, image_ids)
    image_share = 0.5 / (of_images.length.to(lse.image_lse) * len(image_ids))  # (N,)
    text_share = 0.5 / (of_texts.length.to(lse.text_lse) * len(text_ids))  # (M,)
    scale = logit_scale.to(image_embeds.device, dtype)
    loss = _positive_terms(image_embeds, text_embeds, scale, *lse, *of_images, image_share, text_share)
    alone = (of_images.length == 0).any() | (of_texts.length == 0).any()
    return _or_nan(loss.masked_fill(alone, torch.nan)).to(dtype)


# vlmo_fast::contrastive_lse: the op under the log-sum-exps


@torch.library.custom_op("vlmo_fast::contrastive_lse", mutates_args=())
def _contrastive_lse(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    diagonal: int | None,
    kept_rows: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    excluded = Excluded(row_ids, column_ids, diagonal)
    return _similarity.forward(rows, columns, logit_scale, excluded, kept_rows, _similarity.epilogue(implementation))


@_contrastive_lse.register_fake
def _(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    diagonal: int | None,
    kept_rows: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _similarity.wide(rows.dtype)
    num_rows, num_columns = rows.shape[0], columns.shape[0]
    return (
        rows.new_empty(num_rows, dtype=_similarity.precise(rows)),
        rows.new_empty(num_columns, dtype=_similarity.precise(rows)),
        rows.new_empty((kept_rows, num_columns), dtype=dtype),
    )


@torch.library.custom_op("vlmo_fast::contrastive_lse_backward", mutates_args=())
def _contrastive_lse_backward(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    diagonal: int | None,
    row_lse: Tensor,
    row_weight: Tensor,
    column_lse: Tensor,
    column_weight: Tensor,
    kept: Tensor,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _similarity.backward(
        rows,
        columns,
        logit_scale,
        Excluded(row_ids, column_ids, diagonal),
        (row_lse, row_weight),
        (column_lse, column_weight),
        kept,
        _similarity.epilogue(implementation),
    )


@_contrastive_lse_backward.register_fake
def _(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    diagonal: int | None,
    row_lse: Tensor,
    row_weight: Tensor,
    column_lse: Tensor,
    column_weight: Tensor,
    kept: Tensor,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(columns), torch.empty_like(logit_scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, columns, logit_scale, row_ids, column_ids, ctx.diagonal, _, ctx.implementation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(rows, columns, logit_scale, row_ids, column_ids, *output)


def _differentiate(
    ctx: Any, row_weight: Tensor | None, column_weight: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    rows, columns, logit_scale, row_ids, column_ids, row_lse, column_lse, kept = ctx.saved_tensors
    row_weight = torch.zeros_like(row_lse) if row_weight is None else row_weight.contiguous()
    column_weight = torch.zeros_like(column_lse) if column_weight is None else column_weight.contiguous()
    gradients = _contrastive_lse_backward(
        rows,
        columns,
        logit_scale,
        row_ids,
        column_ids,
        ctx.diagonal,
        row_lse,
        row_weight,
        column_lse,
        column_weight,
        kept,
        ctx.implementation,
    )
    return *gradients, None, None, None, None, None


_contrastive_lse.register_autograd(_differentiate, setup_context=_setup_context)


# vlmo_fast::contrastive_positives: the terms of all pairs of equal ids, a block of pairs at a time


def _pairs(matches: _Matches, num_columns: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and columns of the positive pairs, as many at a time as there are rows and columns."""
    ends = matches.length.cumsum(0)  # (N,)
    total, size = int(ends[-1]), len(ends) + num_columns
    for first in range(0, total, size):
        pair = torch.arange(first, min(first + size, total), device=ends.device)
        row = torch.searchsorted(ends, pair, right=True)
        yield row, matches.order[matches.start[row] + pair - (ends - matches.length)[row]]


@torch.library.custom_op("vlmo_fast::contrastive_positives", mutates_args=())
def _positive_terms(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    order: Tensor,
    start: Tensor,
    length: Tensor,
    row_share: Tensor,
    column_share: Tensor,
) -> Tensor:
    """Sum over positive pairs of row_share softplus(row_lse - s) + column_share softplus(column_lse - s), 0-d."""
    total = torch.zeros_like(row_lse[0])
    for row, column in _pairs(_Matches(order, start, length), len(columns)):
        x, y = rows[row].to(logit_scale.dtype), columns[column].to(logit_scale.dtype)  # (pairs, D)
        logits = logit_scale * (x * y).sum(1)
        total += (
            row_share[row] * _softplus(row_lse[row] - logits)
            + column_share[column] * _softplus(column_lse[column] - logits)
            + 0 * logits
        ).sum()
    return total


@_positive_terms.register_fake
def _(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    order: Tensor,
    start: Tensor,
    length: Tensor,
    row_share: Tensor,
    column_share: Tensor,
) -> Tensor:
    return row_lse.new_empty(())


@torch.library.custom_op("vlmo_fast::contrastive_positives_backward", mutates_args=())
def _positive_terms_backward(
    grad: Tensor,
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    order: Tensor,
    start: Tensor,
    length: Tensor,
    row_share: Tensor,
    column_share: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = logit_scale.dtype
    d_rows = torch.zeros_like(rows, dtype=dtype)
    d_columns = torch.zeros_like(columns, dtype=dtype)
    d_scale = torch.zeros_like(logit_scale)
    d_row_lse, d_column_lse = torch.zeros_like(row_lse), torch.zeros_like(column_lse)
    for row, column in _pairs(_Matches(order, start, length), len(columns)):
        x, y = rows[row].to(dtype), columns[column].to(dtype)  # (pairs, D)
        similarity = (x * y).sum(1)
        of_row = grad * row_share[row] * torch.sigmoid(row_lse[row] - logit_scale * similarity)
        of_column = grad * column_share[column] * torch.sigmoid(column_lse[column] - logit_scale * similarity)
        d_row_lse.index_add_(0, row, of_row)
        d_column_lse.index_add_(0, column, of_column)
        d_logits = -(of_row + of_column).to(dtype)
        d_scale += (d_logits * similarity).sum()
        d_similarity = (logit_scale * d_logits)[:, None]
        d_rows.index_add_(0, row, d_similarity * y)
        d_columns.index_add_(0, column, d_similarity * x)
    return d_rows.to(rows.dtype), d_columns.to(columns.dtype), d_scale, d_row_lse, d_column_lse


@_positive_terms_backward.register_fake
def _(
    grad: Tensor,
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    order: Tensor,
    start: Tensor,
    length: Tensor,
    row_share: Tensor,
    column_share: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (rows, columns, logit_scale, row_lse, column_lse)
    return tuple(torch.empty_like(tensor) for tensor in inputs)  # type: ignore[return-value]


def _setup_positives(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_positives(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_positive_terms_backward(grad, *ctx.saved_tensors), None, None, None, None, None


_positive_terms.register_autograd(_differentiate_positives, setup_context=_setup_positives)
