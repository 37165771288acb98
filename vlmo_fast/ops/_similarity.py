"""The matrix of similarities that never exists: S = logit_scale * rows @ columns.T, one block of rows at a time.

Everything here works on a block of at most `CHUNK_BYTES`, so memory is linear in rows and columns; the matmuls are
torch's. What `forward` and `backward` do between the matmuls, the epilogue, is the implementation's part:

    forward   row log-sum-exp and column log-sum-exp of S                                      2 N M D operations
    backward  G_ij = row_weight_i exp(s_ij - row_lse_i) + column_weight_j exp(s_ij - column_lse_j)
              d rows = logit_scale G columns, d columns = logit_scale G^T rows                 6 N M D operations
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vlmo_fast import extensions

__all__ = [
    "CHUNK_BYTES",
    "Excluded",
    "add_product",
    "backward",
    "blocks",
    "forward",
    "in_range",
    "require",
    "require_finite",
    "similarities",
    "working",
]

CHUNK_BYTES = 2**24  # of one block of S on a CPU: 512 rows of 8,192 columns, tall enough for a fast matmul
CHUNK_BYTES_DEVICE = 2**28  # on an accelerator, whose matmuls want more rows


class Excluded(NamedTuple):
    """Elements of S that count nowhere: column `row + diagonal`, or where ids are equal; none if all are None.

    Attributes:
        row_ids: (N,) int64 or None.
        column_ids: (M,) int64 or None.
        diagonal: the column that row 0 leaves out, row i leaving out i columns further, or None.
    """

    row_ids: Tensor | None = None
    column_ids: Tensor | None = None
    diagonal: int | None = None

    def of_block(self, start: int, num_rows: int) -> Excluded:
        """The same for a block that begins at row `start`, in contiguous tensors."""
        row_ids = None if self.row_ids is None else self.row_ids[start : start + num_rows].contiguous()
        column_ids = None if self.column_ids is None else self.column_ids.contiguous()
        return Excluded(row_ids, column_ids, None if self.diagonal is None else start + self.diagonal)

    def of_columns(self, columns: slice) -> Excluded:
        """The same for a range of the columns, for all rows."""
        column_ids = None if self.column_ids is None else self.column_ids[columns]
        return Excluded(self.row_ids, column_ids, None if self.diagonal is None else self.diagonal - columns.start)

    def apply(self, block: Tensor, start: int) -> Tensor:
        """Write -inf in place into a block of S that begins at row `start`."""
        if self.diagonal is not None:
            block.diagonal(start + self.diagonal).fill_(float("-inf"))
        if self.row_ids is not None and self.column_ids is not None:
            equal = self.row_ids[start : start + len(block), None] == self.column_ids
            block.masked_fill_(equal, float("-inf"))
        return block


def working(tensor: Tensor) -> Tensor:
    """The tensor as it enters a matmul: halves become float32 on a CPU, and stay what they are on an accelerator."""
    if tensor.dtype in (torch.float16, torch.bfloat16) and not tensor.is_cuda:
        return tensor.float()
    return tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of similarities, sums and losses: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def precise(like: Tensor) -> torch.dtype:
    """The dtype of log-sum-exps: rounded to float32, one of size 100 would move every softmax weight by 4e-6."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Left @ right in float32 at least; the tensor cores' float32 sums of half-precision products are kept."""
    if left.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Total += left @ right, in place: the product alone is never stored, which would be read and written once more."""
    if left.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left, right)


def similarities(rows: Tensor, columns: Tensor, logit_scale: Tensor) -> Tensor:
    """A block of S, (R, M) in float32 at least; `rows` and `columns` come from `working`."""
    return matmul(rows, columns.t()).mul_(logit_scale)


def blocks(num_rows: int, num_columns: int, like: Tensor) -> Iterator[slice]:
    """Ranges of rows whose part of S takes no more than the chunk."""
    limit = CHUNK_BYTES if like.device.type == "cpu" else CHUNK_BYTES_DEVICE
    height = max(1, min(2**15, limit // (num_columns * wide(like.dtype).itemsize)))  # 2^16 is a grid's limit on CUDA
    yield from blocks_of(num_rows, height)


def blocks_of(num_rows: int, height: int) -> Iterator[slice]:
    """Ranges of `height` rows, or a little less where that makes it a multiple of 64."""
    height = height if height < 64 else height // 64 * 64
    for start in range(0, num_rows, height):
        yield slice(start, min(start + height, num_rows))


def require(condition: Tensor, message: str) -> None:
    """Raise where a 0-d condition on a CPU is false; on an accelerator, where a look would wait, assert."""
    if condition.device.type != "cpu":
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def require_finite(op: str, names: str, rows: Tensor, columns: Tensor, logit_scale: Tensor | None = None) -> None:
    """Integer results cannot say NaN, so embeddings and the products of the longest are looked at before.

    Args:
        op: for the message.
        names: of rows and columns, for the message.
        rows: (N, D).
        columns: (M, D).
        logit_scale: 0-d, or None for 1.
    """
    longest = [working(x).norm(dim=1).amax().to(wide(x.dtype)) for x in (rows, columns)]
    bound = longest[0] * longest[1]
    if logit_scale is not None:
        bound = bound * logit_scale.to(bound)
    require(bound.isfinite(), f"{op}: {names} must be finite, and so must their products, got NaN or infinity")


class Epilogue(Protocol):
    """What an implementation does with a block of S, between two matmuls."""

    def sums(
        self, block: Tensor, start: int, excluded: Excluded, row_lse: Tensor, column: tuple[Tensor, Tensor]
    ) -> None:
        """Excludes in place; writes the (R,) row log-sum-exp, adds to the columns' running (maximum, sum), (M,) each.

        Log-sum-exp and running sum are `precise`, maxima have the block's dtype.
        """

    def gradient(
        self,
        block: Tensor,
        out: Tensor,
        start: int,
        excluded: Excluded,
        row: tuple[Tensor, Tensor],
        column: tuple[Tensor, Tensor],
    ) -> None:
        """Writes G into `out`, which may be `block`; `row` and `column` are (log-sum-exp, weight)."""


class TorchEpilogue:
    """The epilogue in torch alone: any device, any float dtype."""

    def sums(
        self, block: Tensor, start: int, excluded: Excluded, row_lse: Tensor, column: tuple[Tensor, Tensor]
    ) -> None:
        """See `Epilogue`."""
        excluded.apply(block, start)
        peak, shifted = _shifted(block, 1)
        row_lse.copy_(shifted.exp_().sum(1).to(row_lse.dtype).log_().add_(peak))
        top, total = column
        peak, shifted = _shifted(block, 0)
        of_block = shifted.exp_().sum(0)  # (M,)
        higher = torch.maximum(top, peak)
        total.mul_(_rescale(top, higher, total.dtype)).add_(of_block * _rescale(peak, higher, total.dtype))
        top.copy_(higher)

    def gradient(
        self,
        block: Tensor,
        out: Tensor,
        start: int,
        excluded: Excluded,
        row: tuple[Tensor, Tensor],
        column: tuple[Tensor, Tensor],
    ) -> None:
        """See `Epilogue`."""
        excluded.apply(block, start)
        (row_lse, row_weight), (column_lse, column_weight) = row, column
        of_columns = (block - column_lse).exp_().mul_(column_weight)
        torch.sub(block, row_lse[:, None], out=out).exp_().mul_(row_weight[:, None]).add_(of_columns)


# Writes -inf into `block` where excluded and the rows' log-sum-exp into `row_lse`; joins `column_top`, `column_total`.
torch.library.define(
    "vlmo_fast::similarity_sums_",
    "(Tensor(a!) block, Tensor? row_ids, Tensor? column_ids, int? diagonal, Tensor(b!) row_lse, Tensor(c!) column_top, "
    "Tensor(d!) column_total) -> ()",
)
torch.library.define(
    "vlmo_fast::similarity_gradient_",
    "(Tensor block, Tensor(a!) out, Tensor? row_ids, Tensor? column_ids, int? diagonal, Tensor row_lse, "
    "Tensor row_weight, Tensor column_lse, Tensor column_weight) -> ()",
)


class CompiledEpilogue:
    """The epilogue in `csrc/`: one sweep over a float32 block for the sums, one for the gradient."""

    def __init__(self, extension: str) -> None:
        extensions.load(extension)

    def sums(
        self, block: Tensor, start: int, excluded: Excluded, row_lse: Tensor, column: tuple[Tensor, Tensor]
    ) -> None:
        """See `Epilogue`."""
        torch.ops.vlmo_fast.similarity_sums_(block, *excluded.of_block(start, len(block)), row_lse, *column)

    def gradient(
        self,
        block: Tensor,
        out: Tensor,
        start: int,
        excluded: Excluded,
        row: tuple[Tensor, Tensor],
        column: tuple[Tensor, Tensor],
    ) -> None:
        """See `Epilogue`."""
        torch.ops.vlmo_fast.similarity_gradient_(block, out, *excluded.of_block(start, len(block)), *row, *column)


def epilogue(implementation: str) -> Epilogue:
    """The epilogue of an implementation of the one door.

    Raises:
        ImportError: its extension is not built; names the build command.
    """
    if implementation == "chunked":
        return TorchEpilogue()
    return CompiledEpilogue("cuda" if implementation == "cuda-blocks" else implementation)


def _shifted(block: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The maximum along `dim`, and the block less it (less 0 where it is -inf)."""
    peak = block.amax(dim)
    return peak, block - peak.masked_fill(peak == float("-inf"), 0.0).unsqueeze(dim)


def _rescale(old: Tensor, new: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(old - new), and 1 where both are -inf."""
    return (old.to(dtype) - new).masked_fill(new == float("-inf"), 0.0).exp_()


def forward(
    rows: Tensor, columns: Tensor, logit_scale: Tensor, excluded: Excluded, kept_rows: int, between: Epilogue
) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column log-sum-exp of S, and the first `kept_rows` of S itself for the backward pass.

    Args:
        rows: (N, D) float.
        columns: (M, D), dtype and device of the rows.
        logit_scale: 0-d, float32 at least.
        excluded: elements that do not count.
        kept_rows: rows of S to keep.
        between: the implementation's part.

    Returns:
        (N,) and (M,), `precise`, -inf where all is excluded; and (kept_rows, M), float32 at least.
    """
    rows, columns = working(rows), working(columns)
    dtype = wide(rows.dtype)
    row_lse = rows.new_empty(len(rows), dtype=precise(rows))
    top = rows.new_full((len(columns),), float("-inf"), dtype=dtype)
    total = rows.new_zeros(len(columns), dtype=precise(rows))
    kept = rows.new_empty((kept_rows, len(columns)), dtype=dtype)
    block = None
    for part in blocks(len(rows), len(columns), rows):
        block = _block(rows[part], columns, logit_scale, kept[part] if part.stop <= kept_rows else None, block)
        between.sums(block, part.start, excluded, row_lse[part], (top, total))
        if part.start < kept_rows < part.stop:
            kept[part.start :].copy_(block[: kept_rows - part.start])
        elif part.stop <= kept_rows:
            block = None
    return row_lse, total.log_().add_(top), kept


def _block(rows: Tensor, columns: Tensor, logit_scale: Tensor, out: Tensor | None, old: Tensor | None) -> Tensor:
    """A block of S, written into `out` or over the old block where that has the size."""
    if rows.dtype in (torch.float16, torch.bfloat16):
        block = similarities(rows, columns, logit_scale)
        return block if out is None else out.copy_(block)
    if out is None:
        out = rows.new_empty(len(rows), len(columns)) if old is None or len(old) < len(rows) else old[: len(rows)]
    return torch.mm(rows * logit_scale.to(rows.dtype), columns.t(), out=out)  # (R, M)


def backward(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    excluded: Excluded,
    row: tuple[Tensor, Tensor],
    column: tuple[Tensor, Tensor],
    kept: Tensor,
    between: Epilogue,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(row_weight * row_lse) + sum(column_weight * column_lse).

    Args:
        rows: (N, D) float.
        columns: (M, D), dtype and device of the rows.
        logit_scale: 0-d, float32 at least.
        excluded: elements that do not count.
        row: log-sum-exp, `precise`, and weight, (N,) each.
        column: log-sum-exp, `precise`, and weight, (M,) each.
        kept: the first rows of S, (kept_rows, M).
        between: the implementation's part.

    Returns:
        (N, D), (M, D) and 0-d, float32 at least: whoever adds up parts should round once.
    """
    rows, columns = working(rows), working(columns)
    dtype = wide(rows.dtype)
    half = rows.dtype != dtype
    row, column, factor = in_range(rounded(*row, dtype), rounded(*column, dtype), rows.dtype)
    d_rows = rows.new_empty(rows.shape, dtype=dtype)
    d_columns = rows.new_zeros(columns.shape, dtype=dtype)
    d_scale = rows.new_zeros((), dtype=precise(rows))
    block = None
    for part in blocks(len(rows), len(columns), rows):
        if part.stop <= len(kept):
            source = kept[part]
            if block is None or len(block) < len(source):
                block = torch.empty_like(source)
            block = block[: len(source)]
        else:
            source = block = _block(rows[part], columns, logit_scale, None, block)
        between.gradient(source, block, part.start, excluded, (row[0][part], row[1][part]), column)
        if half:
            low = block.to(rows.dtype)
            d_rows[part] = matmul(low, columns)
            add_product(d_columns, low.t(), rows[part])
        else:
            torch.mm(block, columns, out=d_rows[part])
            add_product(d_columns, block.t(), rows[part])
        d_scale += (d_rows[part] * rows[part]).sum(dtype=precise(rows))
    d_scale = (d_scale / factor).to(dtype)
    scale = logit_scale / factor
    return d_rows.mul_(scale), d_columns.mul_(scale), d_scale


def rounded(lse: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and weight in the dtype of the similarities; the weight takes up what rounding the first loses.

    Where all is excluded the log-sum-exp is -inf, but so is all of S: with 0 in its place exp(-inf) = 0.
    """
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    low = lse.to(dtype)
    return low, (weight * (low - lse).exp_()).to(dtype)


def in_range(
    row: tuple[Tensor, Tensor], column: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor | float]:
    """Weights for a G that is rounded to `dtype`, and the factor by which they are too large.

    Weights are about 1 / 2 N, and softmax over many columns as small again: float16 would lose most of G.
    """
    if dtype != torch.float16:
        return row, column, 1.0
    largest = torch.maximum(row[1].abs().amax(), column[1].abs().amax())
    factor = 2**12 / largest.clamp(min=torch.finfo(largest.dtype).tiny * 2**13)
    return (row[0], row[1] * factor), (column[0], column[1] * factor), factor


def kept_rows(num_rows: int, num_columns: int, itemsize: int, workspace_bytes: int) -> int:
    """How many rows of S fit into the workspace."""
    return min(num_rows, math.floor(workspace_bytes / (num_columns * itemsize)))
