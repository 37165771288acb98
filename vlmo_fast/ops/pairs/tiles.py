"""Row and column log-sum-exp of S, and their gradients, from tiles that tensor cores compute and nothing stores.

The forward pass never writes S: kernels leave a maximum and a sum for each row and column of a 128 x 128 tile, which
are joined in a fixed order. The backward pass writes G in half precision, a piece at a time, for two matmuls.

Compiled and inspected for sm_80 and sm_90a; not run on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmo_fast import extensions
from vlmo_fast.ops.pairs.blocks import add_product, blocks_of, in_range, rounded
from vlmo_fast.ops.pairs.lse import LSEBackend, accumulation_dtype, lse_dtype
from vlmo_fast.ops.types import PairMask

__all__ = ["SM80", "SM90A", "Tiles"]

WORKSPACE_BYTES = 2**28
CACHED_BYTES = 2**24  # of rows in one launch: every 128 columns read them anew, so they must stay in the L2 cache
# Rows and columns of a piece of G, 2^28 bytes. For each piece both gradients' parts are read and written: with D = 768
# 1.1 bytes for each number of G, which itself takes 6.
PIECE_ROWS, PIECE_COLUMNS = 2**13, 2**14


class Tiles(LSEBackend):
    """Kernels for bfloat16 and float16 on CUDA.

    Args:
        architecture: 80 for mma.sync, 90 for TMA and WGMMA.
    """

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def kept_rows(self, num_rows: int, num_columns: int, itemsize: int, workspace_bytes: int) -> int:
        """S is never written."""
        return 0

    def forward(
        self, rows: Tensor, columns: Tensor, logit_scale: Tensor, mask: PairMask, kept_rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `LSEBackend`; nothing is kept."""
        extensions.load("cuda")
        row_lse = rows.new_empty(len(rows), dtype=lse_dtype(rows))
        top = rows.new_full((len(columns),), float("-inf"), dtype=torch.float32)
        total = rows.new_zeros(len(columns), dtype=lse_dtype(rows))
        left, right = _operand(rows), _operand(columns)
        # A maximum and a sum, float32, for each row and each column of each tile: R M / 8 bytes.
        height = min(8 * WORKSPACE_BYTES // len(columns), CACHED_BYTES // (2 * left.shape[1]))
        for part in blocks_of(len(rows), max(128, height)):
            torch.ops.vlmo_fast.similarity_tile_sums_(
                left[part],
                right,
                logit_scale,
                *mask.of_block(part.start, part.stop - part.start),
                row_lse[part],
                top,
                total,
                self.architecture,
            )
        return row_lse, total.log_().add_(top), self.saved(rows, columns, 0)

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
        extensions.load("cuda")
        dtype = accumulation_dtype(rows.dtype)
        row, column, factor = in_range(rounded(*row, dtype), rounded(*column, dtype), rows.dtype)
        left, right = _operand(rows), _operand(columns)
        d_rows = torch.zeros_like(rows, dtype=dtype, memory_format=torch.contiguous_format)
        d_columns = torch.zeros_like(columns, dtype=dtype, memory_format=torch.contiguous_format)
        d_scale = rows.new_zeros((), dtype=lse_dtype(rows))
        workspace = rows.new_empty(min(len(rows), PIECE_ROWS) * min(len(columns), PIECE_COLUMNS))
        for part in blocks_of(len(rows), PIECE_ROWS):
            for piece in blocks_of(len(columns), PIECE_COLUMNS):
                shape = part.stop - part.start, piece.stop - piece.start
                block = workspace[: shape[0] * shape[1]].view(shape)  # of G
                torch.ops.vlmo_fast.similarity_tile_gradient_(
                    left[part],
                    right[piece],
                    logit_scale,
                    block,
                    *mask.of_columns(piece).of_block(part.start, len(block)),
                    row[0][part],
                    row[1][part],
                    column[0][piece],
                    column[1][piece],
                    self.architecture,
                )
                add_product(d_rows[part], block, columns[piece])
                add_product(d_columns[piece], block.t(), rows[part])
            d_scale += (d_rows[part] * rows[part]).sum(dtype=lse_dtype(rows))
        d_scale = (d_scale / factor).to(dtype)
        scale = logit_scale / factor
        return d_rows.mul_(scale), d_columns.mul_(scale), d_scale


SM80, SM90A = Tiles(80), Tiles(90)


def _operand(tensor: Tensor) -> Tensor:
    """Contiguous, aligned to 16 bytes, and as wide as a multiple of 8: what TMA and cp.async read."""
    if tensor.shape[1] % 8:
        tensor = F.pad(tensor, (0, -tensor.shape[1] % 8))
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
