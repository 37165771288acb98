"""Visual question answering (VQAv2)."""

from __future__ import annotations

from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple

from vlmo_fast import losses
from vlmo_fast.hf.configuration import VLMoConfig
from vlmo_fast.hf.modeling.base import VLMoPreTrainedModel
from vlmo_fast.hf.modeling.heads import PairClassifier

__all__ = ["VLMoForQuestionAnswering"]


class VLMoForQuestionAnswering(VLMoPreTrainedModel):
    """Visual question answering as classification over `num_labels` answers, with soft targets (VQAv2: 3,129)."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__(config, add_projections=False, add_vl_projections=False)
        self.classifier = PairClassifier(config.hidden_size, config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
    ) -> SequenceClassifierOutput:
        """Answer questions about images.

        Args:
            input_ids: (B, T) token ids of the questions.
            pixel_values: (B, C, H, W) float.
            attention_mask: (B, T), 1 for real tokens, or None.
            labels: (B, num_labels) soft scores in [0, 1].
            interpolate_pos_encoding: accept images of another size.
            output_hidden_states: return the hidden states.

        Returns:
            `loss` (binary cross-entropy times num_labels) where labels are given, and `logits` (B, num_labels).
        """
        if labels is not None and labels.shape != (len(input_ids), self.config.num_labels):
            self._fail(
                "labels", f"be (B, num_labels) = {(len(input_ids), self.config.num_labels)}", tuple(labels.shape)
            )
        output = self.backbone(
            input_ids,
            attention_mask,
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            cls_only=not output_hidden_states,
            output_hidden_states=output_hidden_states,
        )
        logits = self.classifier(output.pooler_output)
        loss = None if labels is None else losses.answer_loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
