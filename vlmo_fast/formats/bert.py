"""BERT's embeddings, which the text side starts from."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmo_fast.files import read_tensors
from vlmo_fast.formats.conversion import check_tensors

if TYPE_CHECKING:
    from vlmo_fast.hf.modeling import VLMoPreTrainedModel

__all__ = ["load_bert_embeddings"]


def load_bert_embeddings(
    model: VLMoPreTrainedModel | nn.Module, source: str | os.PathLike[str] | Mapping[str, Any] | nn.Module
) -> tuple[str, ...]:
    """Give a model the embeddings of a BERT: words, token types and norm, and positions where the model adds them.

    Args:
        model: a `VLMoFor...` or a `MoMETransformer`; changed in place. Its width and vocabulary must be BERT's.
        source: a BERT file, folder, instance or dictionary of tensors, with or without a head.

    Returns:
        Names of the model's tensors that were set.

    Raises:
        ValueError: not a BERT, or it does not fit the model; the message lists the tensors. Nothing is changed then.
        FileNotFoundError: there is no such file.
    """
    tensors = read_tensors(source.state_dict() if isinstance(source, nn.Module) else source, "load_bert_embeddings")
    embeddings = {}
    for name, tensor in tensors.items():
        last = re.fullmatch(r"(?:.*\.)?embeddings\.(\w+)\.(weight|gamma|bias|beta)", name)
        if last:
            part = {"gamma": "weight", "beta": "bias"}.get(last[2], last[2])
            embeddings[f"{last[1]}.{part}"] = tensor
    target: Any = getattr(model, "backbone", model).text_embeddings
    wanted = {
        "word_embeddings.weight": target.word_embeddings.weight,
        "token_type_embeddings.weight": target.token_type_embeddings.weight,
        "LayerNorm.weight": target.norm.weight,
        "LayerNorm.bias": target.norm.bias,
    }
    if target.adds_positions:
        wanted["position_embeddings.weight"] = target.position_embeddings.weight
        positions = embeddings.get("position_embeddings.weight")
        if positions is not None and positions.ndim == 2:
            embeddings["position_embeddings.weight"] = positions[: len(target.position_embeddings.weight)]
    shapes = {name: parameter.shape for name, parameter in wanted.items()}
    check_tensors(embeddings, shapes, ("position_embeddings.weight",), "load_bert_embeddings: the BERT")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(embeddings[name])
    by_identity = {id(parameter): name for name, parameter in model.named_parameters()}
    return tuple(by_identity[id(parameter)] for parameter in wanted.values())
