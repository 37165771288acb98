"""The settings of a VLMo network: one frozen dataclass, three presets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

__all__ = ["EXPERTS", "MODALITIES", "PRESETS", "MoMEConfig"]

MODALITIES = ("language", "vision")
EXPERTS = (*MODALITIES, "vl")

PRESETS: dict[str, dict[str, Any]] = {
    "base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_vl_layers": 2,
        "position_embedding_type": "relative",
        "layer_scale_init_value": 0.1,
    },
    "base_plus": {
        "hidden_size": 544,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_vl_layers": 3,
        "position_embedding_type": "absolute",
        "layer_scale_init_value": None,
    },
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_vl_layers": 3,
        "position_embedding_type": "relative",
        "layer_scale_init_value": 0.1,
    },
}


@dataclass(frozen=True)
class MoMEConfig:
    """Settings of a `MoMETransformer` (VLMo, arXiv:2111.02358, section 3). The defaults are the base model at 224 px.

    Attributes:
        hidden_size: width D of a token.
        num_hidden_layers: number L of blocks.
        num_attention_heads: attention heads of a block; divides `hidden_size`.
        intermediate_size: inner width of a modality expert's feed-forward network; None means 4 D.
        num_vl_layers: number F of top blocks that hold a vision-language expert (0 to L).
        image_size: side of the square input image, pixels; a multiple of `patch_size`.
        patch_size: side of a square patch, pixels.
        stem_patch_size: None projects the patches linearly, as the paper and the release do. A divisor of `patch_size`
            projects patches of that size first, then GELU, then a second projection to `patch_size`: for small
            networks trained from scratch.
        num_channels: channels of the image.
        vocab_size: entries of the text vocabulary.
        max_text_length: longest text, tokens, [CLS] and [SEP] included.
        num_image_types: rows of the type table that belong to images: 1, or 2 for pairs of images (NLVR2).
        position_embedding_type: "relative" (learned bias per head and distance, BEiT's form for images) or
            "absolute" (learned vectors added to the tokens).
        text_relative_span: text lengths that the relative table covers; at least `max_text_length`.
        layer_scale_init_value: initial value of the per-channel scale of each residual branch; None for no scale.
        hidden_dropout: dropout after the attention projection and after each expert, in [0, 1).
        text_embedding_dropout: dropout of the text embeddings, in [0, 1); the release trains with its drop path rate.
        drop_path_rate: stochastic depth of the last block, in [0, 1); grows linearly from 0 at the first.
        layer_norm_eps: epsilon of the blocks' norms and of the final norm.
        text_layer_norm_eps: epsilon of the text embedding's norm and of the masked-language head's.
        initializer_range: standard deviation of the normal distribution that initialises matrices and embeddings.
        logit_scale_init_value: initial logarithm of the contrastive logit scale (released: log(1 / 0.07)).

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, or two fields disagree; the message names them.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    num_vl_layers: int = 2
    image_size: int = 224
    patch_size: int = 16
    stem_patch_size: int | None = None
    num_channels: int = 3
    vocab_size: int = 30522
    max_text_length: int = 40
    num_image_types: int = 1
    position_embedding_type: str = "relative"
    text_relative_span: int = 196
    layer_scale_init_value: float | None = 0.1
    hidden_dropout: float = 0.0
    text_embedding_dropout: float = 0.0
    drop_path_rate: float = 0.0
    layer_norm_eps: float = 1e-6
    text_layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    logit_scale_init_value: float = math.log(1 / 0.07)

    def __post_init__(self) -> None:
        if self.intermediate_size is None and _is_int(self.hidden_size):
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        for name in _COUNTS:
            minimum = 0 if name == "num_vl_layers" else 1
            value = getattr(self, name)
            if not _is_int(value):
                raise TypeError(f"MoMEConfig: {name} must be an int, got {value!r}")
            if value < minimum:
                raise ValueError(f"MoMEConfig: {name} must be at least {minimum}, got {value}")
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is None and name == "layer_scale_init_value":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"MoMEConfig: {name} must be a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"MoMEConfig: {name} must be finite, got {value}")
        for name in ("hidden_dropout", "text_embedding_dropout", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"MoMEConfig: {name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("layer_norm_eps", "text_layer_norm_eps", "initializer_range"):
            if getattr(self, name) < 0:
                raise ValueError(f"MoMEConfig: {name} must not be negative, got {getattr(self, name)}")
        if self.position_embedding_type not in ("relative", "absolute"):
            raise ValueError(
                "MoMEConfig: position_embedding_type must be 'relative' or 'absolute', "
                f"got {self.position_embedding_type!r}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"MoMEConfig: hidden_size must be a multiple of num_attention_heads={self.num_attention_heads}, "
                f"got {self.hidden_size}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"MoMEConfig: image_size must be a multiple of patch_size={self.patch_size}, got {self.image_size}"
            )
        if self.stem_patch_size is not None:
            if not _is_int(self.stem_patch_size):
                raise TypeError(f"MoMEConfig: stem_patch_size must be an int or None, got {self.stem_patch_size!r}")
            if self.stem_patch_size < 1 or self.patch_size % self.stem_patch_size:
                raise ValueError(
                    f"MoMEConfig: stem_patch_size must divide patch_size={self.patch_size}, got {self.stem_patch_size}"
                )
        if self.num_vl_layers > self.num_hidden_layers:
            raise ValueError(
                f"MoMEConfig: num_vl_layers must be at most num_hidden_layers={self.num_hidden_layers}, "
                f"got {self.num_vl_layers}"
            )
        if self.position_embedding_type == "relative" and self.max_text_length > self.text_relative_span:
            raise ValueError(
                f"MoMEConfig: max_text_length must be at most text_relative_span={self.text_relative_span} "
                f"with relative positions, got {self.max_text_length}"
            )

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> MoMEConfig:
        """One of the released sizes: "base", "base_plus" or "large", with any field overridden.

        Args:
            name: the preset.
            **overrides: fields of `MoMEConfig`.

        Raises:
            ValueError: the preset is unknown.
            TypeError: an override is no field of `MoMEConfig`.
        """
        if name not in PRESETS:
            raise ValueError(f"MoMEConfig.from_preset: name must be one of {sorted(PRESETS)}, got {name!r}")
        unknown = sorted(set(overrides) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise TypeError(f"MoMEConfig.from_preset: overrides must be fields of MoMEConfig, got {unknown}")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def window_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_image_tokens(self) -> int:
        """Tokens of one image: [CLS] and the patches."""
        return 1 + self.window_size**2

    @property
    def first_vl_layer(self) -> int:
        """Index of the first block that holds a vision-language expert; L where there is none."""
        return self.num_hidden_layers - self.num_vl_layers


_COUNTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "num_vl_layers",
    "image_size",
    "patch_size",
    "num_channels",
    "vocab_size",
    "max_text_length",
    "num_image_types",
    "text_relative_span",
)
_NUMBERS = (
    "layer_scale_init_value",
    "hidden_dropout",
    "text_embedding_dropout",
    "drop_path_rate",
    "layer_norm_eps",
    "text_layer_norm_eps",
    "initializer_range",
    "logit_scale_init_value",
)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
