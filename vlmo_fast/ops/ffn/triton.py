"""The modality experts in the Triton kernels of `kernels/ffn.py`, which are imported when they are first run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmo_fast.ops.ffn import FFNBackend
from vlmo_fast.ops.types import ExpertWeights

__all__ = ["BACKEND"]


class _Triton(FFNBackend):
    def forward(
        self,
        x: Tensor,
        group_sizes: Sequence[int],
        experts: Sequence[ExpertWeights],
        layer_scale: Tensor | None,
        row_scale: Tensor | None,
        eps: float,
        save: bool,
        save_activation: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        from vlmo_fast.kernels import ffn

        return ffn.forward(x, group_sizes, experts, layer_scale, row_scale, eps, save, save_activation)

    def saved(
        self, x: Tensor, group_sizes: Sequence[int], hidden: int, dtype: torch.dtype, scaled: bool, activation: bool
    ) -> list[Tensor]:
        """Statistics (3, N), and one z and h for all groups."""
        rows = x.shape[0]
        statistics = x.new_empty((3, rows), dtype=torch.promote_types(x.dtype, torch.float32))
        return [statistics, *(x.new_empty((rows, hidden), dtype=dtype) for _ in range(1 + activation))]

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        group_sizes: Sequence[int],
        experts: Sequence[ExpertWeights],
        layer_scale: Tensor | None,
        row_scale: Tensor | None,
        saved: Sequence[Tensor],
        eps: float,
        trained: Sequence[bool],
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
        from vlmo_fast.kernels import ffn

        return ffn.backward(grad, x, group_sizes, experts, layer_scale, row_scale, saved, eps, trained)


BACKEND = _Triton()
