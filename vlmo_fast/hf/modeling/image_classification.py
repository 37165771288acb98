"""Image classification."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import can_return_tuple

from vlmo_fast.hf.configuration import VLMoConfig
from vlmo_fast.hf.modeling.base import VLMoPreTrainedModel

__all__ = ["VLMoForImageClassification"]


class VLMoForImageClassification(VLMoPreTrainedModel):
    """Image classification from the mean of the patch tokens, as in BEiT's fine-tuning."""

    main_input_name = "pixel_values"

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__(config, add_pooler=False, add_projections=False, add_vl_projections=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (B, C, H, W) float.
            labels: (B,) int64 classes.
            interpolate_pos_encoding: accept images of another size.
            output_hidden_states: return the hidden states.

        Returns:
            `loss` (nats) where labels are given, and `logits` (B, num_labels).
        """
        output = self.backbone(
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_hidden_states=output_hidden_states,
        )
        logits = self.classifier(output.last_hidden_state[:, 1:].mean(dim=1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
