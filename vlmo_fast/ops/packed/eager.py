"""The reference of packed attention, with scores and softmax in float32 whatever autocast says."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmo_fast.ops import reference

__all__ = ["packed_attention"]


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor, bias: Tensor | None, cls_only: bool, scale: float
) -> Tensor:
    """`reference.packed_attention` without autocast; arguments as there."""
    with torch.autocast(query.device.type, enabled=False):
        return reference.packed_attention(query, key, value, segments, bias, cls_only, scale)
