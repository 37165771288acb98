"""Masked image modelling: the vision stage of pre-training."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import can_return_tuple

from vlmo_fast import losses
from vlmo_fast.hf.configuration import VLMoConfig
from vlmo_fast.hf.modeling.base import VLMoPreTrainedModel

__all__ = ["VLMoForMaskedImageModeling"]


class VLMoForMaskedImageModeling(VLMoPreTrainedModel):
    """BEiT's masked image modelling, the vision stage: predict the visual tokens of masked patches."""

    main_input_name = "pixel_values"

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__(config, add_pooler=False, add_projections=False, add_vl_projections=False, add_mask_token=True)
        self.mim_head = nn.Linear(config.hidden_size, config.image_vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
    ) -> MaskedLMOutput:
        """Predict the visual tokens of masked patches.

        Args:
            pixel_values: (B, C, H, W) float.
            bool_masked_pos: (B, patches) bool, True for masked patches.
            labels: (B, patches) int64 visual tokens; those of masked patches count.
            interpolate_pos_encoding: accept images of another size.
            output_hidden_states: return the hidden states.

        Returns:
            `loss` (nats) where labels are given, and `logits` (B, patches, image_vocab_size).
        """
        output = self.backbone(
            pixel_values=pixel_values,
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_hidden_states=output_hidden_states,
        )
        logits = self.mim_head(output.last_hidden_state[:, 1:])
        loss = None
        if labels is not None:
            loss = losses.masked_token_loss(logits, labels.masked_fill(~bool_masked_pos, losses.IGNORE_INDEX))
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
