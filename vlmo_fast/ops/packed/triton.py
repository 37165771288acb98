"""Packed attention in the Triton kernels of `kernels/attention.py`, which are imported when they are first run."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmo_fast.ops.packed import PackedAttentionBackend
from vlmo_fast.ops.packed.plan import Packing, alloc_like

__all__ = ["BACKEND"]


class _Triton(PackedAttentionBackend):
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, packing: Packing, scale: float
    ) -> tuple[Tensor, Tensor]:
        from vlmo_fast.kernels import attention as kernels

        covered, _, alignment = _coverage_and_alignment(query, key, bias, packing)
        out = alloc_like(query, covered)
        with torch.cuda.device_of(query):  # Triton launches on the current device, which need not be the tensors'
            stats = kernels.forward(
                *(query, key, value, packing.segments, bias, packing.max_length, packing.cls_only, scale),
                *(alignment, out),
            )
        return out, stats

    def saved(self, query: Tensor, key: Tensor) -> Tensor:
        """Two numbers a query and head."""
        return query.new_empty((2, key.shape[1], query.shape[0]), dtype=torch.float32)

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
        from vlmo_fast.kernels import attention as kernels

        covered, all_keys, alignment = _coverage_and_alignment(query, key, bias, packing)
        d_query, d_key, d_value = alloc_like(query, covered), alloc_like(key, all_keys), alloc_like(value, all_keys)
        d_bias = None
        if bias is not None and bias_grad:
            d_bias = torch.empty_like(bias, memory_format=torch.contiguous_format)
        with torch.cuda.device_of(query):
            kernels.backward(
                *(grad, query, key, value, packing.segments, bias, out, saved, packing.max_length, packing.cls_only),
                *(scale, alignment, d_query, d_key, d_value, d_bias),
            )
        return d_query, d_key, d_value, query.new_empty(0) if d_bias is None else d_bias


BACKEND = _Triton()


def _coverage_and_alignment(
    query: Tensor, key: Tensor, bias: Tensor | None, packing: Packing
) -> tuple[bool, bool, int]:
    """Whether each query and each key belongs to a sequence, and the alignment of bias rows, as the host knows."""
    if not packing.is_on_host():
        return False, False, 1
    plan = packing.plan(len(key), bias)
    return plan.covers(query, packing.cls_only), plan.covers(key), plan.bias_alignment
