"""Packed attention in C++ (csrc/cpu/attention.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmo_fast.ops.packed import PackedAttentionBackend
from vlmo_fast.ops.packed.plan import Packing
from vlmo_fast.ops.padded import cpu

__all__ = ["BACKEND"]


class _Cpu(PackedAttentionBackend):
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, packing: Packing, scale: float
    ) -> tuple[Tensor, Tensor]:
        out = packing.plan(len(key), bias).alloc_like(query, packing.cls_only)
        return out, cpu.forward(query, key, value, _queries(packing), packing.segments, bias, None, scale, out)

    def saved(self, query: Tensor, key: Tensor) -> Tensor:
        return cpu.saved(query, query.shape[1], query.shape[0])

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        out: Tensor,
        saved: Tensor,
        packing: Packing,
        scale: float,
        bias_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        plan = packing.plan(len(key), bias)
        gradients = plan.alloc_like(query, packing.cls_only), plan.alloc_like(key), plan.alloc_like(value)
        d_bias = cpu.backward(
            *(grad, query, key, value, _queries(packing), packing.segments, bias, None, scale, saved),
            *(gradients, bias_grad),
        )
        return *gradients, d_bias


BACKEND = _Cpu()


def _queries(packing: Packing) -> Tensor:
    return first_tokens(packing.segments) if packing.cls_only else packing.segments


def first_tokens(segments: Tensor) -> Tensor:
    """The table of the sequences' first tokens where sequence i has the query i, (B, 2, 3) int32.

    Args:
        segments: (B, 2, 3) int32, of all their tokens, as `ops.packed_attention` has them.
    """
    text, image = segments.unbind(1)
    bias_row = torch.where(text[:, 1] > 0, text[:, 2], image[:, 2])
    lengths = (text[:, 1] + image[:, 1]).clamp(max=1)
    table = torch.zeros_like(segments)
    table[:, 0] = torch.stack([torch.arange(len(table), dtype=torch.int32, device="cpu"), lengths, bias_row], dim=1)
    return table
