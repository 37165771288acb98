"""The matrix of similarities that never exists: S = logit_scale * rows @ columns.T, one block of rows at a time.

Everything here works on a block of at most `CHUNK_BYTES`, so memory is linear in rows and columns; the matmuls are
torch's. What the passes do between the matmuls, the epilogue, is the implementation's part:

    forward   row log-sum-exp and column log-sum-exp of S                                      2 N M D operations
    backward  G_ij = row_weight_i exp(s_ij - row_lse_i) + column_weight_j exp(s_ij - column_lse_j)
              d rows = logit_scale G columns, d columns = logit_scale G^T rows                 6 N M D operations
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from vlmo_fast import extensions
from vlmo_fast.ops.pairs.lse import LSEBackend, accumulation_dtype, lse_dtype
from vlmo_fast.ops.types import PairMask

__all__ = [
    "CHUNKED",
    "CPU",
    "CUDA",
    "Blocks",
    "CompiledEpilogue",
    "TorchEpilogue",
    "add_product",
    "blocks",
    "blocks_of",
    "in_range",
    "matmul_operand",
    "require",
    "require_finite",
    "rounded",
    "similarities",
]

CHUNK_BYTES = 2**24  # of one block of S on a CPU: 512 rows of 8,192 columns, tall enough for a fast matmul
CHUNK_BYTES_DEVICE = 2**28  # on an accelerator, whose matmuls want more rows


def matmul_operand(tensor: Tensor) -> Tensor:
    """The tensor as it enters a matmul: halves become float32 on a CPU, and stay what they are on an accelerator."""
    if tensor.dtype in (torch.float16, torch.bfloat16) and not tensor.is_cuda:
        return tensor.float()
    return tensor


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Left @ right in float32 at least; the tensor cores' float32 sums of half-precision products are kept."""
    if left.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Total += left @ right; accumulates in place, saving one write and one read of the product."""
    if left.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left, right)


def similarities(rows: Tensor, columns: Tensor, logit_scale: Tensor) -> Tensor:
    """A block of S, (R, M) in float32 at least; `rows` and `columns` come from `matmul_operand`."""
    return matmul(rows, columns.t()).mul_(logit_scale)


def blocks(num_rows: int, num_columns: int, like: Tensor) -> Iterator[slice]:
    """Ranges of rows whose part of S takes no more than the chunk."""
    limit = CHUNK_BYTES if like.device.type == "cpu" else CHUNK_BYTES_DEVICE
    row_bytes = num_columns * accumulation_dtype(like.dtype).itemsize
    height = max(1, min(2**15, limit // row_bytes))  # 2^16 is a grid's limit on CUDA
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
    longest = [matmul_operand(x).norm(dim=1).amax().to(accumulation_dtype(x.dtype)) for x in (rows, columns)]
    bound = longest[0] * longest[1]
    if logit_scale is not None:
        bound = bound * logit_scale.to(bound)
    require(bound.isfinite(), f"{op}: {names} must be finite, and so must their products, got NaN or infinity")


class Epilogue(Protocol):
    """What an implementation does with a block of S, between two matmuls."""

    def sums(self, block: Tensor, start: int, mask: PairMask, row_lse: Tensor, column: tuple[Tensor, Tensor]) -> None:
        """Excludes in place; writes the (R,) row log-sum-exp, adds to the columns' running (maximum, sum), (M,) each.

        Log-sum-exp and running sum are of `lse_dtype`, maxima have the block's dtype.
        """

    def gradient(
        self,
        block: Tensor,
        out: Tensor,
        start: int,
        mask: PairMask,
        row: tuple[Tensor, Tensor],
        column: tuple[Tensor, Tensor],
    ) -> None:
        """Writes G into `out`, which may be `block`; `row` and `column` are (log-sum-exp, weight)."""


class TorchEpilogue:
    """The epilogue in torch alone: any device, any float dtype."""

    def sums(self, block: Tensor, start: int, mask: PairMask, row_lse: Tensor, column: tuple[Tensor, Tensor]) -> None:
        """See `Epilogue`."""
        mask.exclude(block, start)
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
        mask: PairMask,
        row: tuple[Tensor, Tensor],
        column: tuple[Tensor, Tensor],
    ) -> None:
        """See `Epilogue`."""
        mask.exclude(block, start)
        (row_lse, row_weight), (column_lse, column_weight) = row, column
        of_columns = (block - column_lse).exp_().mul_(column_weight)
        torch.sub(block, row_lse[:, None], out=out).exp_().mul_(row_weight[:, None]).add_(of_columns)


class CompiledEpilogue:
    """The epilogue in `csrc/`: one sweep over a float32 block for the sums, one for the gradient."""

    def __init__(self, extension: str) -> None:
        extensions.load(extension)

    def sums(self, block: Tensor, start: int, mask: PairMask, row_lse: Tensor, column: tuple[Tensor, Tensor]) -> None:
        """See `Epilogue`."""
        torch.ops.vlmo_fast.similarity_sums_(block, *mask.of_block(start, len(block)), row_lse, *column)

    def gradient(
        self,
        block: Tensor,
        out: Tensor,
        start: int,
        mask: PairMask,
        row: tuple[Tensor, Tensor],
        column: tuple[Tensor, Tensor],
    ) -> None:
        """See `Epilogue`."""
        torch.ops.vlmo_fast.similarity_gradient_(block, out, *mask.of_block(start, len(block)), *row, *column)


def _shifted(block: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The maximum along `dim`, and the block less it (less 0 where it is -inf)."""
    peak = block.amax(dim)
    return peak, block - peak.masked_fill(peak == float("-inf"), 0.0).unsqueeze(dim)


def _rescale(old: Tensor, new: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(old - new), and 1 where both are -inf."""
    return (old.to(dtype) - new).masked_fill(new == float("-inf"), 0.0).exp_()


class Blocks(LSEBackend):
    """A block of rows at a time; `epilogue` makes the part between the matmuls, for which a library may be loaded."""

    def __init__(self, epilogue: Callable[[], Epilogue]) -> None:
        self.epilogue = epilogue

    def forward(
        self, rows: Tensor, columns: Tensor, logit_scale: Tensor, mask: PairMask, kept_rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `LSEBackend`."""
        epilogue = self.epilogue()
        rows, columns = matmul_operand(rows), matmul_operand(columns)
        dtype = accumulation_dtype(rows.dtype)
        row_lse = rows.new_empty(len(rows), dtype=lse_dtype(rows))
        top = rows.new_full((len(columns),), float("-inf"), dtype=dtype)
        total = rows.new_zeros(len(columns), dtype=lse_dtype(rows))
        kept = rows.new_empty((kept_rows, len(columns)), dtype=dtype)
        block = None
        for part in blocks(len(rows), len(columns), rows):
            block = _block(rows[part], columns, logit_scale, kept[part] if part.stop <= kept_rows else None, block)
            epilogue.sums(block, part.start, mask, row_lse[part], (top, total))
            if part.start < kept_rows < part.stop:
                kept[part.start :].copy_(block[: kept_rows - part.start])
            elif part.stop <= kept_rows:
                block = None
        return row_lse, total.log_().add_(top), kept

    def backward(
        self,
        rows: Tensor,
        columns: Tensor,
        logit_scale: Tensor,
        mask: PairMask,
        row: tuple[Tensor, Tensor],
        column: tuple[Tensor, Tensor],
        kept: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `LSEBackend`."""
        epilogue = self.epilogue()
        rows, columns = matmul_operand(rows), matmul_operand(columns)
        dtype = accumulation_dtype(rows.dtype)
        half = rows.dtype != dtype
        row, column, factor = in_range(rounded(*row, dtype), rounded(*column, dtype), rows.dtype)
        d_rows = rows.new_empty(rows.shape, dtype=dtype)
        d_columns = rows.new_zeros(columns.shape, dtype=dtype)
        d_scale = rows.new_zeros((), dtype=lse_dtype(rows))
        block = None
        for part in blocks(len(rows), len(columns), rows):
            if part.stop <= len(kept):
                source = kept[part]
                if block is None or len(block) < len(source):
                    block = torch.empty_like(source)
                block = block[: len(source)]
            else:
                source = block = _block(rows[part], columns, logit_scale, None, block)
            epilogue.gradient(source, block, part.start, mask, (row[0][part], row[1][part]), column)
            if half:
                low = block.to(rows.dtype)
                d_rows[part] = matmul(low, columns)
                add_product(d_columns, low.t(), rows[part])
            else:
                torch.mm(block, columns, out=d_rows[part])
                add_product(d_columns, block.t(), rows[part])
            d_scale += (d_rows[part] * rows[part]).sum(dtype=lse_dtype(rows))
        d_scale = (d_scale / factor).to(dtype)
        scale = logit_scale / factor
        return d_rows.mul_(scale), d_columns.mul_(scale), d_scale


CHUNKED, CPU, CUDA = (
    Blocks(TorchEpilogue),
    Blocks(lambda: CompiledEpilogue("cpu")),
    Blocks(lambda: CompiledEpilogue("cuda")),
)


def _block(rows: Tensor, columns: Tensor, logit_scale: Tensor, out: Tensor | None, old: Tensor | None) -> Tensor:
    """A block of S, written into `out` or over the old block where that has the size."""
    if rows.dtype in (torch.float16, torch.bfloat16):
        block = similarities(rows, columns, logit_scale)
        return block if out is None else out.copy_(block)
    if out is None:
        out = rows.new_empty(len(rows), len(columns)) if old is None or len(old) < len(rows) else old[: len(rows)]
    return torch.mm(rows * logit_scale.to(rows.dtype), columns.t(), out=out)  # (R, M)


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
