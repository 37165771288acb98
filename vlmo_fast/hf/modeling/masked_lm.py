"""Masked language modelling: the language stage of pre-training, and fused pairs."""

from __future__ import annotations

from torch import Tensor
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import can_return_tuple

from vlmo_fast import losses
from vlmo_fast.hf.configuration import VLMoConfig
from vlmo_fast.hf.modeling.base import VLMoPreTrainedModel
from vlmo_fast.hf.modeling.heads import MaskedLMHead

__all__ = ["VLMoForMaskedLM"]


class VLMoForMaskedLM(VLMoPreTrainedModel):
    """Masked language modelling on texts (the language stage) or on image-text pairs."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__(config, add_projections=False, add_vl_projections=False)
        self.mlm_head = MaskedLMHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
    ) -> MaskedLMOutput:
        """Predict masked tokens.

        Args:
            input_ids: (B, T) token ids, some masked.
            attention_mask: (B, T), 1 for real tokens, or None.
            pixel_values: (B, C, H, W) for pairs, or None for texts alone.
            labels: (B, T), the original ids at the positions to predict, -100 elsewhere.
            interpolate_pos_encoding: accept images of another size.
            output_hidden_states: return the hidden states.

        Returns:
            `loss` (nats) where labels are given, and `logits` (B, T, vocab_size).
        """
        output = self.backbone(
            input_ids,
            attention_mask,
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_hidden_states=output_hidden_states,
        )
        logits = self.mlm_head(output.last_hidden_state[:, : input_ids.shape[1]])
        loss = None if labels is None else losses.masked_token_loss(logits, labels)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
