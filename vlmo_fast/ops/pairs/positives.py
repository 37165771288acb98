"""The positives of a batch with ids, and their terms of the loss, a block of pairs at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmo_fast.ops.registration import register

__all__ = ["Matches", "matches_of", "positive_terms", "softplus"]


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); torch's own threshold of 20 would cost float64 half of its digits."""
    return F.softplus(x, threshold=40)


class Matches(NamedTuple):
    """The positives of each row as ranges of the columns sorted by id: no shape depends on the ids' values."""

    order: Tensor  # (M,) columns by id
    start: Tensor  # (N,) of each row's range
    length: Tensor  # (N,)


def matches_of(row_ids: Tensor, column_ids: Tensor) -> Matches:
    """The columns of each row; ids are (N,) and (M,) int64."""
    ids, order = column_ids.sort(stable=True)
    start, end = torch.searchsorted(ids, row_ids), torch.searchsorted(ids, row_ids, right=True)
    return Matches(order, start, end - start)


def positive_terms(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    matches: Matches,
    row_share: Tensor,
    column_share: Tensor,
) -> Tensor:
    """Sum over positive pairs of row_share softplus(row_lse - s) + column_share softplus(column_lse - s), 0-d.

    Args:
        rows: (N, D) float.
        columns: (M, D), dtype and device of the rows.
        logit_scale: 0-d, float32 at least.
        row_lse: (N,), over the negatives.
        column_lse: (M,), over the negatives.
        matches: the columns of each row.
        row_share: (N,) weight of a row's pairs; without gradient.
        column_share: (M,) weight of a column's pairs; without gradient.
    """
    total: Tensor = torch.ops.vlmo_fast.contrastive_positives(
        rows, columns, logit_scale, row_lse, column_lse, *matches, row_share, column_share
    )
    return total


def _pairs(matches: Matches, num_columns: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and columns of the positive pairs, as many at a time as there are rows and columns."""
    ends = matches.length.cumsum(0)  # (N,)
    total, size = int(ends[-1]), len(ends) + num_columns
    for first in range(0, total, size):
        pair = torch.arange(first, min(first + size, total), device=ends.device)
        row = torch.searchsorted(ends, pair, right=True)
        yield row, matches.order[matches.start[row] + pair - (ends - matches.length)[row]]


def _forward(
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
    total = torch.zeros_like(row_lse[0])
    for row, column in _pairs(Matches(order, start, length), len(columns)):
        x, y = rows[row].to(logit_scale.dtype), columns[column].to(logit_scale.dtype)  # (pairs, D)
        logits = logit_scale * (x * y).sum(1)
        total += (
            row_share[row] * softplus(row_lse[row] - logits)
            + column_share[column] * softplus(column_lse[column] - logits)
            + 0 * logits
        ).sum()
    return total


def _fake(rows: Tensor, columns: Tensor, logit_scale: Tensor, row_lse: Tensor, *_: Tensor) -> Tensor:
    return row_lse.new_empty(())


def _backward(
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
    for row, column in _pairs(Matches(order, start, length), len(columns)):
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


def _fake_backward(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in inputs[:5])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.vlmo_fast.contrastive_positives_backward(grad, *ctx.saved_tensors)
    return *gradients, None, None, None, None, None


_INPUTS = (
    "Tensor rows, Tensor columns, Tensor logit_scale, Tensor row_lse, Tensor column_lse, Tensor order, Tensor start, "
    "Tensor length, Tensor row_share, Tensor column_share"
)
register(
    f"contrastive_positives({_INPUTS}) -> Tensor",
    _forward,
    fake=_fake,
    setup_context=_setup_context,
    autograd=_autograd,
)
register(
    f"contrastive_positives_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    fake=_fake_backward,
    backward_of="contrastive_loss",
)
