"""The backbone alone as a transformers model, and what all models share: loading, initialisation, attention."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from typing import TYPE_CHECKING, Any, NoReturn, get_type_hints

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from vlmo_fast import ops
from vlmo_fast.hf.attention import AttentionFunction, attend_by
from vlmo_fast.hf.configuration import VLMoConfig
from vlmo_fast.model import MoMETransformer
from vlmo_fast.outputs import MoMEOutput
from vlmo_fast.requirements import PACKAGES, require

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["DualEncoder", "VLMoModel", "VLMoModelOutput", "VLMoPreTrainedModel"]

# In names of transformers' own functions that would leave out the relative positions of some heads or of all.
NO_BIAS_PER_HEAD = ("flash", "flex_attention", "paged|", "/")

if TYPE_CHECKING:

    class _BackboneOutput(MoMEOutput):
        def __getitem__(self, key: Any) -> Any: ...  # by name, too

else:
    # transformers' outputs are dataclasses, all of whose fields may be None.
    _BackboneOutput = make_dataclass(
        "_BackboneOutput",
        [(name, hint | None, None) for name, hint in get_type_hints(MoMEOutput).items()],
        init=False,
        repr=False,
        eq=False,
        namespace={"__module__": __name__, "__doc__": "The fields of `vlmo_fast.MoMEOutput`."},
    )


@dataclass
class VLMoModelOutput(_BackboneOutput, ModelOutput):  # type: ignore[misc] # mypy sees a dataclass of a named tuple
    """The fields of `vlmo_fast.MoMEOutput`, where they are described; None where a path did not run."""


class VLMoPreTrainedModel(PreTrainedModel):
    """Loading, saving, initialisation and the choice of attention that all heads share.

    `attn_implementation` is a name that the attention op knows ("sdpa", "eager", "xformers") or that of a function that
    was registered in transformers' `AttentionInterface`. The default, "auto", leaves the choice to the op: "sdpa" on a
    GPU, and elsewhere what is fastest there (`vlmo_fast.ops.explain()`).

    Args:
        config: sizes and options.
        **parts: which parts the backbone has, as `MoMETransformer` takes them (`add_pooler`, ...).
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

    def __init__(self, config: VLMoConfig, **parts: bool) -> None:
        super().__init__(config)
        self.backbone = MoMETransformer(config.mome, **parts)

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
        if any(package.distribution == name for package in PACKAGES):  # xformers
            require(f"{type(self).__name__}: attn_implementation {name!r}", name)
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


class DualEncoder(VLMoPreTrainedModel):
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


class VLMoModel(DualEncoder):
    """The backbone alone: embeddings of images and texts, fused pairs."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__(config)
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
