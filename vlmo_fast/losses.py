"""VLMo's objectives as pure functions: tensors in, tensors out.

The image-text contrastive loss and the draw of hard negatives are ops: `vlmo_fast.ops.contrastive_loss` and
`vlmo_fast.ops.sample_hard_negatives`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmo_fast.ops import HardNegatives, reference, sample_hard_negatives

__all__ = [
    "HardNegatives",
    "answer_loss",
    "hard_negative_probabilities",
    "masked_token_loss",
    "matching_labels",
    "sample_hard_negatives",
]

IGNORE_INDEX = -100


def masked_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled positions: masked language and masked image modelling.

    Args:
        logits: (..., V), any float dtype; the loss is computed in float32 at least.
        labels: (...) int64; positions with -100 do not count.

    Returns:
        0-d loss in nats; 0 (with zero gradients) where no position is labelled, where the mean would be NaN.
    """
    logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


def answer_loss(logits: Tensor, scores: Tensor) -> Tensor:
    """Binary cross-entropy of VQA's soft answer scores, summed over the answers and averaged over the questions.

    Args:
        logits: (B, A), any float dtype; the loss is computed in float32 at least.
        scores: (B, A), soft targets in [0, 1].

    Returns:
        0-d loss in nats.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.binary_cross_entropy_with_logits(logits, scores.to(logits.dtype)) * logits.shape[1]


def hard_negative_probabilities(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Softmax of the contrastive similarities with each row's own match left out.

    Args:
        image_embeds: (B, P) unit-norm, B at least 2.
        text_embeds: (B, P) unit-norm; row i belongs to image i.
        logit_scale: 0-d multiplier, already exponentiated.

    Returns:
        (B, B) over the images of each text, and (B, B) over the texts of each image; the diagonals are 0.

    Raises:
        ValueError: there is no other pair to draw from.
    """
    if len(image_embeds) < 2 or len(image_embeds) != len(text_embeds):
        raise ValueError(
            "hard_negative_probabilities: image_embeds and text_embeds must be at least 2 pairs, got "
            f"{len(image_embeds)} images and {len(text_embeds)} texts"
        )
    with torch.autocast(image_embeds.device.type, enabled=False):
        return (
            reference.negative_probabilities(text_embeds, image_embeds, logit_scale, diagonal=0),
            reference.negative_probabilities(image_embeds, text_embeds, logit_scale, diagonal=0),
        )


def matching_labels(num_pairs: int, device: torch.device | None = None) -> Tensor:
    """Classes of [matching pairs ; texts with negative images ; negative texts with images], (3 B,) int64: 1, 0, 0."""
    return (torch.arange(3 * num_pairs, device=device) < num_pairs).long()
