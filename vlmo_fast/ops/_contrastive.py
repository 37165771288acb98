"""The contrastive loss of images and texts."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmo_fast.ops import reference
from vlmo_fast.ops.dispatch import Problem, select

__all__ = ["contrastive_loss"]


def contrastive_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Symmetric image-text contrastive loss (VLMo, arXiv:2111.02358, "Image-Text Contrast").

    Replaces:
        s = logit_scale * image_embeds @ text_embeds.T
        (cross_entropy(s, arange(N)) + cross_entropy(s.T, arange(N))) / 2

    Args:
        image_embeds: unit-norm embeddings, (N, P), any float dtype.
        text_embeds: unit-norm embeddings, (N, P); row i belongs to image i.
        logit_scale: 0-d multiplier of the similarities, already exponentiated.
        backend: "auto" or "eager".

    Returns:
        0-d loss in nats, computed in float32, or in float64 for float64 embeddings.

    Raises:
        ValueError: shapes or devices disagree, or the backend is unknown.
        TypeError: dtypes disagree.
    """
    if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape or not len(image_embeds):
        raise ValueError(
            "contrastive_loss: image_embeds and text_embeds must be (N, P) alike with N >= 1, got "
            f"{tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}"
        )
    if image_embeds.device != text_embeds.device:
        raise ValueError(
            "contrastive_loss: image_embeds and text_embeds must be on one device, got "
            f"{image_embeds.device} and {text_embeds.device}"
        )
    if image_embeds.dtype != text_embeds.dtype or not image_embeds.is_floating_point():
        raise TypeError(
            "contrastive_loss: image_embeds and text_embeds must share one float dtype, got "
            f"{image_embeds.dtype} and {text_embeds.dtype}"
        )
    if logit_scale.ndim:
        raise ValueError(f"contrastive_loss: logit_scale must be 0-d, got shape {tuple(logit_scale.shape)}")
    select("contrastive_loss", Problem(image_embeds.device.type, image_embeds.dtype), backend)
    with torch.autocast(image_embeds.device.type, enabled=False):
        return reference.contrastive_loss(image_embeds, text_embeds, logit_scale)
