"""Statements about two images (NLVR2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple

from vlmo_fast.embeddings import IMAGE_TYPE
from vlmo_fast.hf.configuration import VLMoConfig
from vlmo_fast.hf.modeling.base import VLMoPreTrainedModel
from vlmo_fast.hf.modeling.heads import PairClassifier

__all__ = ["VLMoForImagesAndTextClassification"]


class VLMoForImagesAndTextClassification(VLMoPreTrainedModel):
    """Classification of a statement about two images (NLVR2): both pairs are encoded, their pooled outputs joined."""

    num_images = 2

    def __init__(self, config: VLMoConfig) -> None:
        if config.num_image_types < self.num_images:
            self._fail("config.num_image_types", "be at least 2 (one type row per image)", config.num_image_types)
        super().__init__(config, add_projections=False, add_vl_projections=False)
        self.classifier = PairClassifier(self.num_images * config.hidden_size, config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> SequenceClassifierOutput:
        """Judge statements about two images.

        Args:
            input_ids: (B, T) token ids of the statements.
            pixel_values: (B, 2, C, H, W) float.
            attention_mask: (B, T), 1 for real tokens, or None.
            labels: (B,) int64 classes.
            interpolate_pos_encoding: accept images of another size.

        Returns:
            `loss` (nats) where labels are given, and `logits` (B, num_labels).
        """
        if pixel_values.ndim != 5 or pixel_values.shape[1] != self.num_images:
            self._fail("pixel_values", "be (B, 2, C, H, W)", tuple(pixel_values.shape))
        batch_size = len(input_ids)
        image_types = torch.arange(self.num_images, device=pixel_values.device) + IMAGE_TYPE
        output = self.backbone(  # one pass of 2 B pairs: all first images, then all second ones
            input_ids.repeat(self.num_images, 1),
            None if attention_mask is None else attention_mask.repeat(self.num_images, 1),
            pixel_values.transpose(0, 1).flatten(0, 1),
            image_type_ids=image_types.repeat_interleave(batch_size),
            interpolate_pos_encoding=interpolate_pos_encoding,
            cls_only=True,
        )
        pooled = torch.cat(output.pooler_output.split(batch_size), dim=1)  # (B, 2 D)
        logits = self.classifier(pooled)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
