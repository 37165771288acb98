"""The settings of a VLMo network: one frozen dataclass, three presets."""

from __future__ import annotations

import dataclasses
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

__all__ = ["EXPERTS", "MODALITIES", "PRESETS", "MoMEConfig", "describe_fields", "preset", "setting"]

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

T = TypeVar("T")


class Rule(NamedTuple):
    """Which values a setting takes; `must` completes "the setting must ..."."""

    holds: Callable[[Any], bool]
    must: str


POSITIVE = Rule(lambda value: value >= 1, "be at least 1")
COUNT = Rule(lambda value: value >= 0, "be at least 0")
NOT_NEGATIVE = Rule(lambda value: value >= 0, "not be negative")
RATE = Rule(lambda value: 0 <= value < 1, "be in [0, 1)")
POSITIONS = Rule(lambda value: value in ("relative", "absolute"), "be 'relative' or 'absolute'")


def setting(default: T, description: str, rule: Rule | None = None) -> T:
    """A dataclass field with its description and the rule that its values obey beside that of its annotation.

    Args:
        default: the field's default.
        description: what it means, for the docstring of the class.
        rule: which values it takes, or None where its type says so.

    Returns:
        A `dataclasses.Field`; to a type checker it is the default, as `dataclasses.field` is.
    """
    return dataclasses.field(default=default, metadata={"description": description, "rule": rule})


def describe_fields(cls: type[T]) -> type[T]:
    """Write the descriptions of a dataclass's settings into its docstring, in place of `{fields}`."""
    entries = (
        textwrap.fill(f"{f.name}: {f.metadata['description']}", 116, initial_indent=" " * 4, subsequent_indent=" " * 8)
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if "description" in f.metadata
    )
    cls.__doc__ = inspect.cleandoc(cls.__doc__ or "").replace("    {fields}", "\n".join(entries))
    return cls


@describe_fields
@dataclass(frozen=True)
class MoMEConfig:
    """Settings of a `MoMETransformer` (VLMo, arXiv:2111.02358, section 3). The defaults are the base model at 224 px.

    Attributes:
        {fields}

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, or two fields disagree; the message names them.
    """

    hidden_size: int = setting(768, "width D of a token.", POSITIVE)
    num_hidden_layers: int = setting(12, "number L of blocks.", POSITIVE)
    num_attention_heads: int = setting(12, "attention heads of a block; divides `hidden_size`.", POSITIVE)
    intermediate_size: int | None = setting(
        None, "inner width of a modality expert's feed-forward network; None means 4 D.", POSITIVE
    )
    num_vl_layers: int = setting(2, "number F of top blocks that hold a vision-language expert (0 to L).", COUNT)
    image_size: int = setting(224, "side of the square input image, pixels; a multiple of `patch_size`.", POSITIVE)
    patch_size: int = setting(16, "side of a square patch, pixels.", POSITIVE)
    stem_patch_size: int | None = setting(
        None,
        "None projects the patches linearly, as the paper and the release do. A divisor of `patch_size` projects "
        "patches of that size first, then GELU, then a second projection to `patch_size`: for small networks trained "
        "from scratch.",
    )
    num_channels: int = setting(3, "channels of the image.", POSITIVE)
    vocab_size: int = setting(30522, "entries of the text vocabulary.", POSITIVE)
    max_text_length: int = setting(40, "longest text, tokens, [CLS] and [SEP] included.", POSITIVE)
    num_image_types: int = setting(
        1, "rows of the type table that belong to images: 1, or 2 for pairs of images (NLVR2).", POSITIVE
    )
    position_embedding_type: str = setting(
        "relative",
        '"relative" (learned bias per head and distance, BEiT\'s form for images) or "absolute" (learned vectors added '
        "to the tokens).",
        POSITIONS,
    )
    text_relative_span: int = setting(
        196, "text lengths that the relative table covers; at least `max_text_length`.", POSITIVE
    )
    layer_scale_init_value: float | None = setting(
        0.1, "initial value of the per-channel scale of each residual branch; None for no scale."
    )
    hidden_dropout: float = setting(
        0.0, "dropout after the attention projection and after each expert, in [0, 1).", RATE
    )
    text_embedding_dropout: float = setting(
        0.0, "dropout of the text embeddings, in [0, 1); the release trains with its drop path rate.", RATE
    )
    drop_path_rate: float = setting(
        0.0, "stochastic depth of the last block, in [0, 1); grows linearly from 0 at the first.", RATE
    )
    layer_norm_eps: float = setting(1e-6, "epsilon of the blocks' norms and of the final norm.", NOT_NEGATIVE)
    text_layer_norm_eps: float = setting(
        1e-12, "epsilon of the text embedding's norm and of the masked-language head's.", NOT_NEGATIVE
    )
    initializer_range: float = setting(
        0.02,
        "standard deviation of the normal distribution that initialises matrices and embeddings.",
        NOT_NEGATIVE,
    )
    logit_scale_init_value: float = setting(
        math.log(1 / 0.07), "initial logarithm of the contrastive logit scale (released: log(1 / 0.07))."
    )

    def __post_init__(self) -> None:
        if self.intermediate_size is None and _is_int(self.hidden_size):
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name), hints[field.name], field.metadata.get("rule"))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"MoMEConfig: hidden_size must be a multiple of num_attention_heads={self.num_attention_heads}, "
                f"got {self.hidden_size}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"MoMEConfig: image_size must be a multiple of patch_size={self.patch_size}, got {self.image_size}"
            )
        stem = self.stem_patch_size
        if stem is not None and (stem < 1 or self.patch_size % stem):
            raise ValueError(f"MoMEConfig: stem_patch_size must divide patch_size={self.patch_size}, got {stem}")
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
        fields = preset("MoMEConfig", name)
        unknown = sorted(set(overrides) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise TypeError(f"MoMEConfig.from_preset: overrides must be fields of MoMEConfig, got {unknown}")
        return cls(**{**fields, **overrides})

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


def preset(config: str, name: str) -> dict[str, Any]:
    """The fields of a released size; `config` is the class that asks, for the message."""
    if name not in PRESETS:
        raise ValueError(f"{config}.from_preset: name must be one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]


def _check(name: str, value: Any, hint: Any, rule: Rule | None) -> None:
    """Raise if a field's value has not the type of its annotation, or breaks its rule."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in kinds:
        return
    if int in kinds and not _is_int(value):
        raise TypeError(f"MoMEConfig: {name} must be an int, got {value!r}")
    if float in kinds:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"MoMEConfig: {name} must be a number, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"MoMEConfig: {name} must be finite, got {value}")
    if rule is not None and not rule.holds(value):
        raise ValueError(f"MoMEConfig: {name} must {rule.must}, got {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
