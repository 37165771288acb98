"""The transformers configuration of VLMo: `MoMEConfig`'s fields beside those of the task heads."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from vlmo_fast.config import MoMEConfig, describe_fields, preset, setting

__all__ = ["VLMoConfig"]

if TYPE_CHECKING:

    class _BackboneFields(MoMEConfig):
        def __init__(self, **fields: Any) -> None: ...  # a transformers configuration takes any keyword

else:
    # The same fields, not frozen: transformers' configurations are not, and so cannot inherit from a class that is.
    _BackboneFields = dataclasses.make_dataclass(
        "_BackboneFields",
        [
            (field.name, field.type, dataclasses.field(default=field.default, metadata=field.metadata))
            for field in dataclasses.fields(MoMEConfig)
        ],
        init=False,
        repr=False,
        eq=False,
        kw_only=True,
        namespace={"__module__": __name__, "__doc__": "The fields of `vlmo_fast.MoMEConfig`."},
    )


@describe_fields
class VLMoConfig(_BackboneFields, PreTrainedConfig):
    """Configuration of the `VLMoFor...` models.

    The fields up to `logit_scale_init_value` are those of `vlmo_fast.MoMEConfig`, which checks them; `mome` is that
    configuration. transformers' own fields (`num_labels`, ...) serve the classifiers.

    Attributes:
        {fields}
    """

    model_type = "vlmo"

    image_vocab_size: int = setting(8192, "visual tokens that masked image modelling predicts (BEiT: 8192).")
    mlm_loss_weight: float = setting(0.25, "weight of masked language modelling in pre-training (released: 0.25).")
    has_itm_head: bool = setting(
        True,
        "whether `VLMoForImageTextRetrieval` holds a matching head; released retrieval checkpoints do not.",
    )

    def __post_init__(self, **kwargs: Any) -> None:
        self.intermediate_size = self.mome.intermediate_size  # type: ignore[misc]  # checks every field
        super().__post_init__(**kwargs)

    @property
    def mome(self) -> MoMEConfig:
        """The backbone's configuration."""
        return MoMEConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(MoMEConfig)})

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> VLMoConfig:
        """One of the released sizes, "base", "base_plus" or "large", with any field overridden."""
        return cls(**{**preset("VLMoConfig", name), **overrides})
