"""The vision-language stage of pre-training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from vlmo_fast import losses, ops
from vlmo_fast.distributed import fetch_samples
from vlmo_fast.hf.configuration import VLMoConfig
from vlmo_fast.hf.modeling.base import DualEncoder
from vlmo_fast.hf.modeling.heads import MaskedLMHead
from vlmo_fast.packing import pack

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["VLMoForPreTraining", "VLMoPreTrainingOutput"]


@dataclass
class VLMoPreTrainingOutput(ModelOutput):
    """Losses, logits and embeddings of one pre-training step.

    Attributes:
        loss: 0-d, mlm_loss_weight * mlm_loss + itc_loss + itm_loss.
        itc_loss: 0-d, mean of the contrastive losses of the plain and of the vision-language branch, nats.
        mlm_loss: 0-d, nats; None where no masked text was given.
        itm_loss: 0-d, nats.
        mlm_logits: (P, vocab_size), at the P positions to predict, text by text.
        itm_logits: (3 B, 2): matching pairs, texts with negative images, negative texts with images; class 1 matches.
        image_embeds: (B, D) unit-norm.
        text_embeds: (B, D) unit-norm.
        vl_image_embeds: (B, D) unit-norm, of the vision-language branch.
        vl_text_embeds: (B, D) unit-norm, of the vision-language branch.
        negative_image_ids: (B,) int64, the image drawn for each text.
        negative_text_ids: (B,) int64, the text drawn for each image.
    """

    loss: Tensor | None = None
    itc_loss: Tensor | None = None
    mlm_loss: Tensor | None = None
    itm_loss: Tensor | None = None
    mlm_logits: Tensor | None = None
    itm_logits: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    vl_image_embeds: Tensor | None = None
    vl_text_embeds: Tensor | None = None
    negative_image_ids: Tensor | None = None
    negative_text_ids: Tensor | None = None


class VLMoForPreTraining(DualEncoder):
    """The vision-language stage: image-text contrast, masked language modelling, matching with hard negatives."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__(config)
        self.mlm_head = MaskedLMHead(config)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.vl_logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        input_ids_masked: Tensor | None = None,
        mlm_labels: Tensor | None = None,
        negative_image_ids: Tensor | None = None,
        negative_text_ids: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> VLMoPreTrainingOutput:
        """One pre-training step on B matching pairs, in two packed passes.

        Nothing is computed for padding, and words are predicted only where there is something to predict. On a GPU the
        step waits for the device once, for the negatives that were drawn, if `attention_mask` and `mlm_labels` are left
        on the CPU; each of them that is on the GPU costs one more wait.

        Args:
            input_ids: (B, T) token ids, B at least 2.
            pixel_values: (B, C, H, W); image i belongs to text i.
            attention_mask: (B, T), 1 for real tokens, which come first, or None.
            input_ids_masked: (B, T), the texts with some tokens masked; None leaves masked language modelling out.
            mlm_labels: (B, T), the original ids at the positions to predict, -100 elsewhere.
            negative_image_ids: (B,) for each text an image that is not its own; None draws it from the similarities.
            negative_text_ids: (B,) for each image a text that is not its own; None draws it from the similarities.
            interpolate_pos_encoding: accept images of another size.
            process_group: of `torch.distributed`; contrast and negatives are then those of the batch of all its ranks
                (texts padded alike), negative ids count its pairs, and only the samples drawn travel. The embeddings'
                gradients are right where a wrapper averages them over the ranks, as DDP does.

        Returns:
            `VLMoPreTrainingOutput`.

        Raises:
            ValueError: fewer than two pairs, or only one of two arguments that belong together.
        """
        if len(input_ids) < 2 and process_group is None:
            self._fail("input_ids", "hold at least 2 pairs (each is the others' negative)", len(input_ids))
        if (input_ids_masked is None) != (mlm_labels is None):
            self._fail("input_ids_masked and mlm_labels", "come together", "one of them")
        if (negative_image_ids is None) != (negative_text_ids is None):
            self._fail("negative_image_ids and negative_text_ids", "come together", "one of them")
        num_pairs = len(input_ids)
        lengths = self._text_lengths(input_ids, attention_mask)
        windows = [self.backbone.window_of(pixel_values, interpolate_pos_encoding)] * num_pairs
        numbers = torch.arange(num_pairs)

        # First pass: images, texts, both again on the VL branch, and the pairs with masked texts.
        texts, text_lengths, masked_pairs = input_ids, lengths, None
        if input_ids_masked is not None:
            texts, text_lengths = torch.cat([input_ids, input_ids_masked]), lengths.repeat(2)
            masked_pairs = torch.stack([num_pairs + numbers, numbers], dim=1)
        layout = pack(
            text_lengths,
            windows,
            texts=numbers,
            images=numbers,
            pairs=masked_pairs,
            vl_branch=self.config.num_vl_layers > 0,
            all_tokens=("pair",),
            device=input_ids.device,
        )
        encoded = self.backbone.forward_packed(layout, texts, pixel_values)
        image_embeds, text_embeds = encoded.image_embeds, encoded.text_embeds
        vl_image_embeds, vl_text_embeds = encoded.vl_image_embeds, encoded.vl_text_embeds
        assert image_embeds is not None
        assert text_embeds is not None
        scale = self.logit_scale.exp()
        itc_loss = ops.contrastive_loss(image_embeds, text_embeds, scale, process_group=process_group)
        if vl_image_embeds is not None and vl_text_embeds is not None:
            vl_loss = ops.contrastive_loss(
                vl_image_embeds, vl_text_embeds, self.vl_logit_scale.exp(), process_group=process_group
            )
            itc_loss = (itc_loss + vl_loss) / 2

        mlm_logits = mlm_loss = None
        if mlm_labels is not None:
            labels = mlm_labels.cpu()
            text, position = (labels != losses.IGNORE_INDEX).nonzero(as_tuple=True)
            if bool((position >= lengths[text]).any()):
                self._fail("mlm_labels", f"be {losses.IGNORE_INDEX} at padding", "something to predict there")
            rows = layout.token_rows("pair", text.to(input_ids.device), position.to(input_ids.device))
            mlm_logits = self.mlm_head(encoded.last_hidden_state[rows])
            mlm_loss = losses.masked_token_loss(mlm_logits, labels[text, position].to(mlm_logits.device))

        # Second pass: matching pairs, each text with a negative image, each image with a negative text.
        if negative_image_ids is None or negative_text_ids is None:
            negative_image_ids, negative_text_ids = ops.sample_hard_negatives(
                image_embeds, text_embeds, scale, process_group=process_group
            )
        if process_group is None:
            negatives = torch.stack([negative_image_ids, negative_text_ids]).cpu()  # the step's one wait
            texts, images = input_ids, pixel_values
        else:  # those drawn from other processes travel, and follow this process's own
            texts = torch.cat([input_ids, fetch_samples(input_ids, negative_text_ids, process_group)])
            images = torch.cat([pixel_values, fetch_samples(pixel_values, negative_image_ids, process_group)])
            fetched = fetch_samples(lengths.to(input_ids.device), negative_text_ids, process_group)
            lengths, windows = torch.cat([lengths, fetched.cpu()]), windows * 2
            negatives = (num_pairs + numbers).expand(2, -1)
        paired = torch.cat([numbers, numbers, negatives[1]]), torch.cat([numbers, negatives[0], numbers])
        layout = pack(lengths, windows, pairs=torch.stack(paired, dim=1), device=input_ids.device)
        fused = self.backbone.forward_packed(layout, texts, images)
        itm_logits = self.itm_head(fused.pooler_output)
        itm_loss = F.cross_entropy(itm_logits, losses.matching_labels(num_pairs, itm_logits.device))
        loss = itc_loss + itm_loss
        if mlm_loss is not None:
            loss = loss + self.config.mlm_loss_weight * mlm_loss
        return VLMoPreTrainingOutput(
            loss=loss,
            itc_loss=itc_loss,
            mlm_loss=mlm_loss,
            itm_loss=itm_loss,
            mlm_logits=mlm_logits,
            itm_logits=itm_logits,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            vl_image_embeds=vl_image_embeds,
            vl_text_embeds=vl_text_embeds,
            negative_image_ids=negative_image_ids,
            negative_text_ids=negative_text_ids,
        )

    def _text_lengths(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Real tokens of each text, (B,) int64 on the CPU."""
        if attention_mask is None:
            return torch.full((len(input_ids),), input_ids.shape[1])
        if attention_mask.shape != input_ids.shape:
            self._fail("attention_mask", f"be {tuple(input_ids.shape)} like input_ids", tuple(attention_mask.shape))
        real = attention_mask.cpu() != 0
        lengths = real.sum(dim=1)
        if not torch.equal(real, torch.arange(real.shape[1]) < lengths[:, None]) or not bool(lengths.all()):
            self._fail("attention_mask", "keep [CLS] and have its zeros at the ends of the texts", "others")
        return lengths
