"""VLMo's task heads as transformers models; each holds its `MoMETransformer` as `.backbone`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedLMOutput,
    ModelOutput,
    SequenceClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from vlmo_fast import losses, ops
from vlmo_fast.distributed import fetch_samples
from vlmo_fast.embeddings import IMAGE_TYPE
from vlmo_fast.hf.attention import AttentionFunction, attend_by
from vlmo_fast.hf.configuration import VLMoConfig
from vlmo_fast.model import MoMETransformer
from vlmo_fast.packing import pack

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.utils.hooks import RemovableHandle

__all__ = [
    "VLMoForImageClassification",
    "VLMoForImageTextRetrieval",
    "VLMoForImagesAndTextClassification",
    "VLMoForMaskedImageModeling",
    "VLMoForMaskedLM",
    "VLMoForPreTraining",
    "VLMoForQuestionAnswering",
    "VLMoImageTextRetrievalOutput",
    "VLMoModel",
    "VLMoModelOutput",
    "VLMoPreTrainedModel",
    "VLMoPreTrainingOutput",
]

# In names of transformers' own functions that would leave out the relative positions of some heads or of all.
NO_BIAS_PER_HEAD = ("flash", "flex_attention", "paged|", "/")


@dataclass
class VLMoModelOutput(ModelOutput):
    """The fields of `vlmo_fast.MoMEOutput`, where they are described; None where a path did not run."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    vl_last_hidden_state: Tensor | None = None
    vl_image_embeds: Tensor | None = None
    vl_text_embeds: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    vl_hidden_states: tuple[Tensor, ...] | None = None


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


class MaskedLMHead(nn.Module):
    """BERT's prediction head: dense, GELU, norm, decoder. The decoder is not tied to the word embeddings."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.text_layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.norm(F.gelu(self.dense(hidden))))
        return logits


class PairClassifier(nn.Module):
    """Classifier over pooled pairs: Linear to 2 D, LayerNorm, GELU, Linear."""

    def __init__(self, input_size: int, config: VLMoConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_size, 2 * config.hidden_size)
        self.norm = nn.LayerNorm(2 * config.hidden_size)
        self.fc2 = nn.Linear(2 * config.hidden_size, config.num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        logits: Tensor = self.fc2(F.gelu(self.norm(self.fc1(pooled))))
        return logits


class VLMoPreTrainedModel(PreTrainedModel):
    """Loading, saving, initialisation and the choice of attention that all heads share.

    `attn_implementation` is a name that the attention op knows ("sdpa", "eager", "xformers") or that of a function that
    was registered in transformers' `AttentionInterface`. The default, "auto", leaves the choice to the op: "sdpa" on a
    GPU, and elsewhere what is fastest there (`vlmo_fast.ops.explain()`).
    """

    config: VLMoConfig
    config_class = VLMoConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ("MoMEBlock",)
    _supports_sdpa = True
    _supports_attention_backend = True

    backbone: MoMETransformer

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; weights that `device_map` leaves on the CPU or the disk are loaded by block."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if {"cpu", "disk"} & set(map(str, getattr(model, "hf_device_map", {}).values())):
            from vlmo_fast.hf.offload import load_parts_whole

            load_parts_whole(model)
        return loaded

    def post_init(self) -> None:
        """As in transformers; the attention that the configuration asks for then reaches the blocks."""
        super().post_init()
        self._attention_hooks: list[RemovableHandle] = []
        self._choose_attention()

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The name itself where it can be used; "auto" where none was asked for."""
        if requested_attention is None:
            return "auto"
        self._attention_function(requested_attention)
        return requested_attention

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers."""
        super().set_attn_implementation(*args, **kwargs)
        self._choose_attention()

    def _choose_attention(self) -> None:
        """Have all blocks attend as the configuration names it."""
        name = self.config._attn_implementation
        function = self._attention_function(name)
        for hook in self._attention_hooks:
            hook.remove()
        self._attention_hooks = [] if function is None else attend_by(function, self.backbone)
        self.backbone.set_attention_backend(name if function is None else "auto")

    def _attention_function(self, name: str) -> AttentionFunction | None:
        """The registered function of that name, or None for a name of the attention op's."""
        known = ("auto", *ops.implementations("attention"))
        if name == "xformers" and find_spec("xformers") is None:
            from vlmo_fast.doctor import install_command

            raise ImportError(
                f"{type(self).__name__}: attn_implementation 'xformers' needs the package xformers, which is not "
                f"installed. To install it: {install_command('xformers')}"
            )
        if name in known:
            return None
        if name not in ALL_ATTENTION_FUNCTIONS or any(part in name for part in NO_BIAS_PER_HEAD):
            rule = f"be one of {list(known)}, or registered in AttentionInterface and take a mask for each head"
            self._fail("attn_implementation", rule, repr(name))
        function: AttentionFunction = ALL_ATTENTION_FUNCTIONS[name]
        return function

    def _init_weights(self, module: nn.Module) -> None:
        self.backbone.init_weights(module)
        for name in ("logit_scale", "vl_logit_scale"):
            if isinstance(module, VLMoPreTrainedModel) and hasattr(module, name):
                nn.init.constant_(getattr(module, name), self.config.logit_scale_init_value)

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.backbone.text_embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        assert isinstance(value, nn.Embedding)
        self.backbone.text_embeddings.word_embeddings = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; the backbone then takes the new ids too."""
        embeddings: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        self.backbone.config = self.config.mome
        return embeddings

    def get_output_embeddings(self) -> nn.Linear | None:
        """The decoder over the vocabulary, in models that predict words."""
        head = getattr(self, "mlm_head", None)
        return None if head is None else head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the decoder over the vocabulary."""
        self.mlm_head.decoder = value

    def _fail(self, argument: str, rule: str, actual: object) -> NoReturn:
        raise ValueError(f"{type(self).__name__}: {argument} must {rule}, got {actual}")


class _DualEncoder(VLMoPreTrainedModel):
    """The features of images and texts alone."""

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling:
        """Encode images alone.

        Args:
            pixel_values: (B, C, H, W) float.
            interpolate_pos_encoding: accept images of another size.
            output_hidden_states: return the hidden states.

        Returns:
            `last_hidden_state` (B, P, D), and as `pooler_output` the unit-norm contrastive embedding (B, D).
        """
        output = self.backbone(
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_hidden_states=output_hidden_states,
        )
        return BaseModelOutputWithPooling(output.last_hidden_state, output.image_embeds, output.hidden_states)

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling:
        """Encode texts alone.

        Args:
            input_ids: (B, T) integers.
            attention_mask: (B, T), 1 for real tokens, or None.
            output_hidden_states: return the hidden states.

        Returns:
            `last_hidden_state` (B, T, D), and as `pooler_output` the unit-norm contrastive embedding (B, D).
        """
        output = self.backbone(input_ids, attention_mask, output_hidden_states=output_hidden_states)
        return BaseModelOutputWithPooling(output.last_hidden_state, output.text_embeds, output.hidden_states)


class VLMoModel(_DualEncoder):
    """The backbone alone: embeddings of images and texts, fused pairs."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__(config)
        self.backbone = MoMETransformer(config.mome)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_type_ids: Tensor | int | None = None,
        use_vl_branch: bool = False,
        interpolate_pos_encoding: bool = False,
        cls_only: bool = False,
        output_hidden_states: bool = False,
    ) -> VLMoModelOutput:
        """Encode images, texts, or pairs; arguments as those of `vlmo_fast.MoMETransformer.forward`."""
        output = self.backbone(
            input_ids,
            attention_mask,
            pixel_values,
            image_type_ids=image_type_ids,
            use_vl_branch=use_vl_branch,
            interpolate_pos_encoding=interpolate_pos_encoding,
            cls_only=cls_only,
            output_hidden_states=output_hidden_states,
        )
        return VLMoModelOutput(**output._asdict())


class VLMoForPreTraining(_DualEncoder):
    """The vision-language stage: image-text contrast, masked language modelling, matching with hard negatives."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__(config)
        self.backbone = MoMETransformer(config.mome)
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


class VLMoForMaskedLM(VLMoPreTrainedModel):
    """Masked language modelling on texts (the language stage) or on image-text pairs."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__(config)
        self.backbone = MoMETransformer(config.mome, add_projections=False, add_vl_projections=False)
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


class VLMoForMaskedImageModeling(VLMoPreTrainedModel):
    """BEiT's masked image modelling, the vision stage: predict the visual tokens of masked patches."""

    main_input_name = "pixel_values"

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__(config)
        self.backbone = MoMETransformer(
            config.mome, add_pooler=False, add_projections=False, add_vl_projections=False, add_mask_token=True
        )
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


class VLMoForImageTextRetrieval(_DualEncoder):
    """Retrieval: contrastive scores of images and texts encoded apart, or matching scores of pairs."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__(config)
        self.backbone = MoMETransformer(config.mome, add_vl_projections=False)
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


class VLMoForQuestionAnswering(VLMoPreTrainedModel):
    """Visual question answering as classification over `num_labels` answers, with soft targets (VQAv2: 3,129)."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__(config)
        self.backbone = MoMETransformer(config.mome, add_projections=False, add_vl_projections=False)
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


class VLMoForImagesAndTextClassification(VLMoPreTrainedModel):
    """Classification of a statement about two images (NLVR2): both pairs are encoded, their pooled outputs joined."""

    num_images = 2

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__(config)
        if config.num_image_types < self.num_images:
            self._fail("config.num_image_types", "be at least 2 (one type row per image)", config.num_image_types)
        self.backbone = MoMETransformer(config.mome, add_projections=False, add_vl_projections=False)
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


class VLMoForImageClassification(VLMoPreTrainedModel):
    """Image classification from the mean of the patch tokens, as in BEiT's fine-tuning."""

    main_input_name = "pixel_values"

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__(config)
        self.backbone = MoMETransformer(config.mome, add_pooler=False, add_projections=False, add_vl_projections=False)
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
