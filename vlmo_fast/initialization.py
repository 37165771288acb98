"""The released initial values of each part of the network."""

from __future__ import annotations

from torch import nn

from vlmo_fast.block import Attention, MoMEBlock
from vlmo_fast.config import MoMEConfig
from vlmo_fast.embeddings import ImageEmbeddings, UnusedPositions
from vlmo_fast.positions import RelativePositionBias

__all__ = ["initialize"]


def initialize(module: nn.Module, config: MoMEConfig) -> None:
    """Initialise the parameters that `module` itself owns (not its children's)."""
    std = config.initializer_range
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, ImageEmbeddings):
        for parameter in (module.cls_token, module.mask_token, module.position_embeddings):
            if parameter is not None:
                nn.init.normal_(parameter, std=std)
    elif isinstance(module, UnusedPositions):
        nn.init.zeros_(module.weight)
    elif isinstance(module, RelativePositionBias):
        nn.init.zeros_(module.table)
    elif isinstance(module, Attention):
        nn.init.zeros_(module.q_bias)
        nn.init.zeros_(module.v_bias)
    elif isinstance(module, MoMEBlock) and config.layer_scale_init_value is not None:
        assert module.attention_layer_scale is not None and module.ffn_layer_scale is not None
        nn.init.constant_(module.attention_layer_scale, config.layer_scale_init_value)
        nn.init.constant_(module.ffn_layer_scale, config.layer_scale_init_value)
