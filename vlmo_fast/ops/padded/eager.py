"""The reference of attention, with scores and softmax in float32 whatever autocast says."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmo_fast.ops import reference

__all__ = ["attention"]


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, key_mask: Tensor | None, scale: float
) -> Tensor:
    """`reference.attention` without autocast; arguments as there."""
    with torch.autocast(query.device.type, enabled=False):
        return reference.attention(query, key, value, bias, key_mask, scale)
