"""Image-text retrieval, by embeddings or by the matching head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from vlmo_fast import ops
from vlmo_fast.hf.configuration import VLMoConfig
from vlmo_fast.hf.modeling.base import DualEncoder

__all__ = ["VLMoForImageTextRetrieval", "VLMoImageTextRetrievalOutput"]


@dataclass
class VLMoImageTextRetrievalOutput(ModelOutput):
    """Scores of images against texts.

    Attributes:
        loss: 0-d, nats; None where it was not asked for.
        itm_score: (B, 2) matching logits of pairs, class 1 matches; only with `use_itm_head`.
        logits_per_image: (N, M) scaled similarities.
        logits_per_text: (M, N), its transpose.
        image_embeds: (N, D) unit-norm.
        text_embeds: (M, D) unit-norm.
    """

    loss: Tensor | None = None
    itm_score: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


class VLMoForImageTextRetrieval(DualEncoder):
    """Retrieval: contrastive scores of images and texts encoded apart, or matching scores of pairs."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__(config, add_vl_projections=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.itm_head = nn.Linear(config.hidden_size, 2) if config.has_itm_head else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        use_itm_head: bool = False,
        return_loss: bool = False,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> VLMoImageTextRetrievalOutput:
        """Score images against texts.

        Args:
            input_ids: (M, T) token ids.
            pixel_values: (N, C, H, W) float.
            attention_mask: (M, T), 1 for real tokens, or None.
            use_itm_head: score pairs (N = M) with the fusion encoder instead of all N x M by their embeddings.
            return_loss: contrastive loss of N = M matching pairs.
            labels: (B,) int64, 1 for matching pairs; gives the loss of `use_itm_head`.
            interpolate_pos_encoding: accept images of another size.

        Returns:
            `VLMoImageTextRetrievalOutput`.

        Raises:
            ValueError: the model has no matching head, or a loss was asked for that the arguments do not allow.
        """
        if use_itm_head:
            if self.itm_head is None:
                self._fail("use_itm_head", "be False where config.has_itm_head is", True)
            fused = self.backbone(
                input_ids,
                attention_mask,
                pixel_values,
                interpolate_pos_encoding=interpolate_pos_encoding,
                cls_only=True,
            )
            score = self.itm_head(fused.pooler_output)
            loss = None if labels is None else F.cross_entropy(score, labels)
            return VLMoImageTextRetrievalOutput(loss=loss, itm_score=score)
        if labels is not None:
            self._fail("labels", "come with use_itm_head=True (the contrastive loss takes return_loss=True)", "False")
        images = self.backbone(
            pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, cls_only=True
        ).image_embeds
        texts = self.backbone(input_ids, attention_mask, cls_only=True).text_embeds
        scale = self.logit_scale.exp()
        logits_per_image = scale * images @ texts.t()
        return VLMoImageTextRetrievalOutput(
            loss=ops.contrastive_loss(images, texts, scale) if return_loss else None,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.t(),
            image_embeds=images,
            text_embeds=texts,
        )
