"""What the ops are told: the experts' weights, the pairs that a matrix of similarities leaves out, the problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ExpertWeights", "PairMask", "Problem"]


@dataclass(frozen=True)
class Problem:
    """What the choice of an implementation may depend on.

    Attributes:
        device: device type, "cpu" or "cuda" (any other type gets the portable implementations).
        dtype: dtype of the op's main input.
        needs_grad: whether a gradient will be asked for.
        head_dim: width of an attention head, for attention.
        interpreted: whether Triton's interpreter runs kernels on CPU tensors.
        num_ranks: processes whose batches make one.
        capability: of a CUDA device, e.g. (9, 0), where the op asks for it.
        only_bias_grad: whether of attention's inputs the bias alone wants a gradient.
        inside: whether a product is part of another op, where neither autograd nor a tracer looks.
        traced: whether a compiler, another tracer or autocast must see torch's own operators.
    """

    device: str
    dtype: torch.dtype
    needs_grad: bool = True
    head_dim: int | None = None
    interpreted: bool = False
    num_ranks: int = 1
    capability: tuple[int, int] | None = None
    only_bias_grad: bool = False
    inside: bool = False
    traced: bool = False


class ExpertWeights(NamedTuple):
    """Parameters of one modality expert: its norm and its two linear layers.

    Attributes:
        norm_weight: (D,).
        norm_bias: (D,).
        fc1_weight: (F, D).
        fc1_bias: (F,).
        fc2_weight: (D, F).
        fc2_bias: (D,).
    """

    norm_weight: Tensor
    norm_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


class PairMask(NamedTuple):
    """Elements of a matrix of similarities: column `row + diagonal`, or where ids are equal; none if all are None.

    Attributes:
        row_ids: (N,) int64 or None.
        column_ids: (M,) int64 or None.
        diagonal: the column that belongs to row 0, row i's being i columns further, or None.
    """

    row_ids: Tensor | None = None
    column_ids: Tensor | None = None
    diagonal: int | None = None

    def of_block(self, start: int, num_rows: int) -> PairMask:
        """The same for a block that begins at row `start`, in contiguous tensors."""
        row_ids = None if self.row_ids is None else self.row_ids[start : start + num_rows].contiguous()
        column_ids = None if self.column_ids is None else self.column_ids.contiguous()
        return PairMask(row_ids, column_ids, None if self.diagonal is None else start + self.diagonal)

    def of_columns(self, columns: slice) -> PairMask:
        """The same for a range of the columns, for all rows."""
        column_ids = None if self.column_ids is None else self.column_ids[columns]
        return PairMask(self.row_ids, column_ids, None if self.diagonal is None else self.diagonal - columns.start)

    def exclude(self, block: Tensor, start: int) -> Tensor:
        """Write -inf in place into the elements of a block, (R, M), that begins at row `start`."""
        if self.diagonal is not None:
            block.diagonal(start + self.diagonal).fill_(float("-inf"))
        if self.row_ids is not None and self.column_ids is not None:
            equal = self.row_ids[start : start + len(block), None] == self.column_ids
            block.masked_fill_(equal, float("-inf"))
        return block
