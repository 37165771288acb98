"""The log-sum-exps of several ranks, their texts passing from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmo_fast.distributed import Ranks, pass_on
from vlmo_fast.ops.pairs.lse import accumulation_dtype, lse_backward, lse_forward
from vlmo_fast.ops.types import PairMask

__all__ = ["RingLSE"]


class RingLSE(torch.autograd.Function):
    """As `log_sum_exps` of this rank's images and the texts of all ranks, each text's own image left out.

    A rank holds two ranks' texts at a time, and in the backward pass their gradients, which travel with them, instead
    of the texts of all: O(N / W) instead of O(N). Blocks are on their way while others are worked on.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, logit_scale: Tensor, ranks: Ranks, name: str
    ) -> tuple[Tensor, Tensor]:
        """(n,) of this rank's images, over all texts; (W n,) of all texts, over this rank's images."""
        ctx.ranks, ctx.implementation = ranks, name
        row_lse: Tensor | None = None
        column_lse: dict[int, Tensor] = {}  # of each rank's texts, over this rank's images
        for owner, block in _visitors(texts, ranks):
            mask = PairMask(diagonal=(ranks.rank - owner) * len(texts))
            block_lse, column_lse[owner], _ = lse_forward(images, block, logit_scale, mask, 0, name)
            row_lse = block_lse if row_lse is None else torch.logaddexp(row_lse, block_lse)
        assert row_lse is not None
        lse = row_lse, torch.cat([column_lse[owner] for owner in range(ranks.size)])
        ctx.save_for_backward(images, texts, logit_scale, *lse)
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_weight: Tensor, column_weight: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of this rank's images and texts, and of the scale."""
        images, texts, logit_scale, row_lse, column_lse = ctx.saved_tensors
        ranks: Ranks = ctx.ranks
        dtype = accumulation_dtype(images.dtype)
        d_images, d_scale = torch.zeros_like(images, dtype=dtype), torch.zeros_like(logit_scale)
        nothing_kept = images.new_empty((0, len(texts)), dtype=dtype)
        travelling: Callable[[], Tensor] | None = None  # the gradient of the texts that were here before
        for owner, block in _visitors(texts, ranks):
            part = slice(owner * len(texts), (owner + 1) * len(texts))
            block_d_images, d_texts, block_d_scale = lse_backward(
                images,
                block,
                logit_scale,
                PairMask(diagonal=(ranks.rank - owner) * len(texts)),
                (row_lse, row_weight.contiguous()),
                (column_lse[part], column_weight[part].contiguous()),
                nothing_kept,
                ctx.implementation,
            )
            d_images += block_d_images
            d_scale += block_d_scale
            travelling = pass_on(d_texts if travelling is None else travelling().add_(d_texts), ranks, tag=1)
        assert travelling is not None  # after as many steps as ranks a gradient is where its texts are
        return d_images.to(images.dtype), travelling().to(texts.dtype), d_scale, None, None


def _visitors(texts: Tensor, ranks: Ranks) -> Iterator[tuple[int, Tensor]]:
    """Each rank and its texts, this rank's first; the next are already on their way."""
    block = texts.contiguous()
    for step in range(ranks.size):
        arriving = pass_on(block, ranks) if step + 1 < ranks.size else None
        yield (ranks.rank + step) % ranks.size, block
        if arriving is not None:
            block = arriving()
