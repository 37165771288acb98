"""The transformers configuration of VLMo: `MoMEConfig`'s fields beside those of the task heads."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from transformers import PreTrainedConfig

from vlmo_fast.config import PRESETS, MoMEConfig

__all__ = ["VLMoConfig"]


class VLMoConfig(PreTrainedConfig):
    """Configuration of the `VLMoFor...` models.

    The fields up to `logit_scale_init_value` are those of `vlmo_fast.MoMEConfig`, where they are described and checked;
    `mome` is that configuration. transformers' own fields (`num_labels`, ...) serve the classifiers.

    Attributes:
        image_vocab_size: visual tokens that masked image modelling predicts (BEiT: 8192).
        mlm_loss_weight: weight of masked language modelling in pre-training (released: 0.25).
        has_itm_head: whether `VLMoForImageTextRetrieval` holds a matching head; released retrieval checkpoints do not.
    """

    model_type = "vlmo"

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

    image_vocab_size: int = 8192
    mlm_loss_weight: float = 0.25
    has_itm_head: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.intermediate_size = self.mome.intermediate_size  # checks every field
        super().__post_init__(**kwargs)

    @property
    def mome(self) -> MoMEConfig:
        """The backbone's configuration."""
        return MoMEConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(MoMEConfig)})

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> VLMoConfig:
        """One of the released sizes, "base", "base_plus" or "large", with any field overridden."""
        if name not in PRESETS:
            raise ValueError(f"VLMoConfig.from_preset: name must be one of {sorted(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **overrides})
