"""Checkpoints of the released VLMo, in and out.

The one place that knows other people's names: microsoft/unilm, folder `vlmo/`, commit 768a3c87. A checkpoint is a plain
dictionary of tensors whose names tell which task it was saved from; `KINDS` lists the tasks.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmo_fast.config import EXPERTS, MODALITIES, PRESETS, MoMEConfig
from vlmo_fast.files import read_tensors, write_whole
from vlmo_fast.formats.conversion import (
    TASKS,
    Conversion,
    block_numbers,
    check_tensors,
    on_meta,
    retarget,
    shape_of,
    tie_text_dropout,
    window_of,
)

if TYPE_CHECKING:
    from vlmo_fast.hf.modeling import VLMoPreTrainedModel

__all__ = [
    "load_official",
    "official_names",
    "official_state_dict",
    "open_official",
    "save_official",
]

_logger = logging.getLogger(__name__)

TEXT_RELATIVE_SPAN = 196  # text lengths covered by every released relative table, whatever the model's own limit
_EXPERTS = {"language": "text", "vision": "imag", "vl": "vl"}  # the release's names of them
IGNORED = ("relative_position_index", "text_relative_position_index", "text_imag_relative_position_index")
POSITION_IDS = "text_embeddings.position_ids"  # a constant of the released text embedding: 0, 1, 2, ...
KINDS = {
    "pretrain": ("logit_scale", "vl_logit_scale", "pooler", "mlm", "itm", "itc", "vl_itc"),
    "retrieval": ("logit_scale", "pooler", "itc"),
    "vqa": ("pooler", "vqa"),
    "nlvr2": ("pooler", "nlvr2"),
    "text": ("pooler", "mlm"),
}  # the tasks that checkpoints are released for, and the heads that each holds

# (released, ours) prefixes or names of each head; a name without suffix stands for .weight and .bias.
_HEADS: dict[str, tuple[tuple[str, str], ...]] = {
    "logit_scale": (("logit_scale", "logit_scale"),),
    "vl_logit_scale": (("logit_vl_scale", "vl_logit_scale"),),
    "pooler": (("pooler.dense.weight", "backbone.pooler.weight"), ("pooler.dense.bias", "backbone.pooler.bias")),
    "mlm": (
        ("mlm_score.bias", "mlm_head.decoder.bias"),
        ("mlm_score.transform.dense.weight", "mlm_head.dense.weight"),
        ("mlm_score.transform.dense.bias", "mlm_head.dense.bias"),
        ("mlm_score.transform.LayerNorm.weight", "mlm_head.norm.weight"),
        ("mlm_score.transform.LayerNorm.bias", "mlm_head.norm.bias"),
        ("mlm_score.decoder.weight", "mlm_head.decoder.weight"),
    ),
    "itm": (("itm_score.fc.weight", "itm_head.weight"), ("itm_score.fc.bias", "itm_head.bias")),
    "itc": (
        ("itc_text_proj.fc.weight", "backbone.text_projection.weight"),
        ("itc_image_proj.fc.weight", "backbone.image_projection.weight"),
    ),
    "vl_itc": (
        ("itc_vl_text_proj.fc.weight", "backbone.vl_text_projection.weight"),
        ("itc_vl_image_proj.fc.weight", "backbone.vl_image_projection.weight"),
    ),
    "vqa": tuple(
        (f"vqa_classifier.{theirs}.{kind}", f"classifier.{ours}.{kind}")
        for theirs, ours in ((0, "fc1"), (1, "norm"), (3, "fc2"))
        for kind in ("weight", "bias")
    ),
    "nlvr2": tuple(
        (f"nlvr2_classifier.{theirs}.{kind}", f"classifier.{ours}.{kind}")
        for theirs, ours in ((0, "fc1"), (1, "norm"), (3, "fc2"))
        for kind in ("weight", "bias")
    ),
}


def load_official(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    task: str | None = None,
    image_size: int | None = None,
    num_attention_heads: int | None = None,
    **settings: Any,
) -> VLMoPreTrainedModel:
    """The model of a released VLMo checkpoint, with its weights.

    The kind of the checkpoint decides the class, unless `task` asks for another: then the backbone and the heads that
    both tasks have are taken, and the other heads start fresh, which a warning lists. Tensors may stand in the file
    itself or under "state_dict", "module" or "model". Opening a file runs no code from it.

    Args:
        source: a file written by the released code, in either of torch's formats or as safetensors, or its dictionary.
        task: "pretrain", "retrieval", "vqa", "nlvr2", "text", "mim" (masked images) or "classification"; None is the
            checkpoint's own.
        image_size: side of the images to be used, pixels; positions are resized where the checkpoint has another.
            None keeps the checkpoint's.
        num_attention_heads: only needed for absolute positions in a width that no preset has.
        **settings: other fields of `VLMoConfig`: `drop_path_rate` (also `text_embedding_dropout`, if that is not given,
            as in the release's training), `num_labels`, `max_text_length` (text positions are cut), `num_vl_layers` (a
            text-stage checkpoint holds none; the presets' number where it is not given), `num_image_types`,
            `has_itm_head`, ... Sizes of the tensors themselves cannot be changed.

    Returns:
        A `VLMoFor...` in eval mode, in the checkpoint's dtype, on CPU; its backbone is `.backbone`.

    Raises:
        ValueError: not a VLMo checkpoint, or tensors are missing, unknown, misshapen, not finite or of a wrong dtype;
            the message lists them. Or a setting that the tensors do not allow.
        FileNotFoundError: there is no such file.
        ImportError: transformers is not installed.
    """
    conversion = open_official(
        source, task=task, image_size=image_size, num_attention_heads=num_attention_heads, **settings
    )
    if conversion.report.fresh or (task and conversion.report.unused):
        _logger.warning("load_official: %s", conversion.report)
    return conversion.build()


def open_official(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    task: str | None = None,
    image_size: int | None = None,
    num_attention_heads: int | None = None,
    **settings: Any,
) -> Conversion:
    """Read, check and convert a released checkpoint, with a report of every tensor; arguments as `load_official`."""
    settings = tie_text_dropout("load_official", settings)
    tensors = read_tensors(source, "load_official")
    kind, found = _describe(tensors, num_attention_heads)

    from vlmo_fast.hf.configuration import VLMoConfig

    own = VLMoConfig(**found)
    names = dict(_names(own.mome, KINDS[kind]))
    ignored = (*IGNORED, POSITION_IDS)
    shapes = {name: x.shape for name, x in on_meta(kind, own).state_dict().items()}
    check_tensors(
        tensors, {theirs: shapes[ours] for theirs, ours in names.items()}, ignored, f"load_official: the {kind}"
    )
    state = {ours: tensors.pop(theirs).detach().clone() for theirs, ours in names.items()}

    origin = {ours: theirs for theirs, ours in names.items()}
    return retarget("load_official", kind, state, origin, own, task, image_size, settings)


def official_names(model: VLMoPreTrainedModel) -> dict[str, str]:
    """The released name of each of the model's tensors, in the released order, and ours.

    Raises:
        ValueError: the released code has no such model.
    """
    return dict(_names(model.config.mome, KINDS[_kind_of_model(model)]))


def official_state_dict(model: VLMoPreTrainedModel) -> dict[str, Tensor]:
    """The model's weights under the released names, in the released order; detached, on the model's device.

    Args:
        model: a `VLMoFor...` of one of the released kinds.

    Raises:
        ValueError: the released code has no such model.
    """
    state = model.state_dict()
    named = {theirs: state[ours].detach() for theirs, ours in official_names(model).items()}
    length = named["text_embeddings.position_embeddings.weight"].shape[0]
    result = {}
    for name, tensor in named.items():
        if name.startswith("text_embeddings.") and POSITION_IDS not in result:
            result[POSITION_IDS] = torch.arange(length, device=tensor.device)[None]
        result[name] = tensor
    return result


def save_official(model: VLMoPreTrainedModel, path: str | os.PathLike[str]) -> None:
    """Write a model as a checkpoint that the released code loads: a file appears whole or not at all.

    Args:
        model: a `VLMoFor...` of one of the released kinds.
        path: the file to write; replaced if it is there.

    Raises:
        ValueError: the released code has no such model.
    """
    state = {name: tensor.cpu().contiguous() for name, tensor in official_state_dict(model).items()}

    def write(temporary: Path) -> None:
        with temporary.open("xb") as file:
            torch.save({"state_dict": state}, file)

    write_whole(Path(path), write)


def _describe(tensors: Mapping[str, Tensor], num_attention_heads: int | None) -> tuple[str, dict[str, Any]]:
    """Kind and settings of a checkpoint, read off its names and shapes."""

    def shape(name: str, ndim: int) -> torch.Size:
        return shape_of(tensors, name, ndim, "load_official: a VLMo checkpoint")

    width = shape("transformer.cls_token", 3)[-1]
    layers = _layers(tensors, "")
    vl_layers = _layers(tensors, r"(?:mlp|norm2)_vl\.")
    num_layers = len(layers)
    if layers != list(range(num_layers)) or vl_layers != layers[num_layers - len(vl_layers) :]:
        raise ValueError(
            "load_official: the blocks must be numbered from 0 without a gap, those with a vl expert on top, got "
            f"blocks {layers} and vl experts in {vl_layers}"
        )
    settings: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_vl_layers": len(vl_layers),
        "intermediate_size": shape("transformer.blocks.0.mlp_text.fc1.weight", 2)[0],
        "patch_size": shape("transformer.patch_embed.proj.weight", 4)[-1],
        "num_channels": shape("transformer.patch_embed.proj.weight", 4)[1],
        "vocab_size": shape("text_embeddings.word_embeddings.weight", 2)[0],
        "max_text_length": shape("text_embeddings.position_embeddings.weight", 2)[0],
        "num_image_types": shape("token_type_embeddings.weight", 2)[0] - 1,
        "layer_scale_init_value": 0.1 if _layers(tensors, "gamma_") else None,
    }
    if "relative_position_bias_table" in tensors:
        rows, columns = shape("relative_position_bias_table", 2)
        table_window = window_of(rows - 5 - 2 * TEXT_RELATIVE_SPAN)
        if table_window is None or columns % num_layers:
            raise ValueError(
                "load_official: relative_position_bias_table must have (2 N - 1)^2 + 397 rows for N x N patches and a "
                f"multiple of {num_layers} columns, got {(rows, columns)}"
            )
        heads, window = columns // num_layers, table_window
        if num_attention_heads not in (None, heads):
            raise ValueError(
                f"load_official: num_attention_heads must be the {heads} of the bias table, got {num_attention_heads}"
            )
        settings["position_embedding_type"] = "relative"
    elif "transformer.pos_embed" not in tensors:
        raise ValueError(
            "load_official: a VLMo checkpoint must hold relative_position_bias_table or transformer.pos_embed, got "
            f"neither among {len(tensors)} tensors"
        )
    else:
        window = math.isqrt(max(shape("transformer.pos_embed", 3)[1] - 1, 0))
        widths = {preset["hidden_size"]: preset["num_attention_heads"] for preset in PRESETS.values()}
        heads = num_attention_heads if num_attention_heads is not None else widths.get(width, 0)
        if not heads:
            raise ValueError(
                "load_official: num_attention_heads must be given (absolute positions do not tell it, and no preset "
                f"has this width), got None for width {width}"
            )
        settings["position_embedding_type"] = "absolute"
    if heads < 1 or width % heads:
        raise ValueError(f"load_official: num_attention_heads must divide the width {width}, got {heads}")
    settings |= {"num_attention_heads": heads, "image_size": window * settings["patch_size"]}

    holds = {head: any(theirs in tensors for theirs, _ in names) for head, names in _HEADS.items()}
    if holds["vqa"]:
        kind = "vqa"
        settings["num_labels"] = shape("vqa_classifier.3.weight", 2)[0]
    elif holds["nlvr2"]:
        kind = "nlvr2"
        settings["num_labels"] = shape("nlvr2_classifier.3.weight", 2)[0]
    elif holds["mlm"]:
        kind = "pretrain" if holds["itm"] or holds["itc"] else "text"
    elif holds["itc"]:
        kind = "retrieval"
        settings["has_itm_head"] = False
    else:
        raise ValueError(
            "load_official: the checkpoint must hold the head of one of the tasks "
            f"{sorted(KINDS)}, got none among {len(tensors)} tensors"
        )
    return kind, settings


def _layers(tensors: Mapping[str, Tensor], name: str) -> list[int]:
    """Indices of the blocks that hold a tensor whose name begins with the pattern `name`."""
    return block_numbers(tensors, rf"transformer\.blocks\.(\d+)\.{name}")


def _names(config: MoMEConfig, heads: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(released, ours) names of all tensors of a model, in the released order."""
    if config.position_embedding_type == "relative":
        yield "relative_position_bias_table", "backbone.relative_position_bias.table"
    for head in ("logit_scale", "vl_logit_scale"):
        if head in heads:
            yield from _HEADS[head]
    yield "transformer.cls_token", "backbone.image_embeddings.cls_token"
    if config.position_embedding_type == "absolute":
        yield "transformer.pos_embed", "backbone.image_embeddings.position_embeddings"
    for part in ("weight", "bias"):
        yield f"transformer.patch_embed.proj.{part}", f"backbone.image_embeddings.projection.{part}"
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"transformer.blocks.{layer}", f"backbone.blocks.{layer}"
        if config.layer_scale_init_value is not None:
            yield f"{theirs}.gamma_1", f"{ours}.attention_layer_scale"
            yield f"{theirs}.gamma_2", f"{ours}.ffn_layer_scale"
        for part in ("weight", "bias"):
            yield f"{theirs}.norm1.{part}", f"{ours}.attention_norm.{part}"
        for name in ("q_bias", "v_bias", "qkv.weight"):
            yield f"{theirs}.attn.{name}", f"{ours}.attention.{name}"
        for part in ("weight", "bias"):
            yield f"{theirs}.attn.proj.{part}", f"{ours}.attention.projection.{part}"
        experts = EXPERTS if layer >= config.first_vl_layer else MODALITIES
        parameters = [(expert, "norm", f"norm2_{_EXPERTS[expert]}") for expert in MODALITIES]
        parameters += [(expert, fc, f"mlp_{_EXPERTS[expert]}.{fc}") for expert in experts for fc in ("fc1", "fc2")]
        parameters += [("vl", "norm", "norm2_vl")] if "vl" in experts else []
        for expert, module, released in parameters:
            for part in ("weight", "bias"):
                yield f"{theirs}.{released}.{part}", f"{ours}.experts.{expert}.{module}.{part}"
    for part in ("weight", "bias"):
        yield f"transformer.norm.{part}", f"backbone.norm.{part}"
    for table in ("word", "position", "token_type"):
        yield f"text_embeddings.{table}_embeddings.weight", f"backbone.text_embeddings.{table}_embeddings.weight"
    for part in ("weight", "bias"):
        yield f"text_embeddings.LayerNorm.{part}", f"backbone.text_embeddings.norm.{part}"
    yield "token_type_embeddings.weight", "backbone.modality_type_embeddings.weight"
    for head in heads:
        if head not in ("logit_scale", "vl_logit_scale"):
            yield from _HEADS[head]


def _kind_of_model(model: VLMoPreTrainedModel) -> str:
    config = model.config.mome
    if config.stem_patch_size is not None:
        raise ValueError(
            "save_official: model must project patches linearly, as the release does, got "
            f"stem_patch_size={config.stem_patch_size}"
        )
    if config.position_embedding_type == "relative" and config.text_relative_span != TEXT_RELATIVE_SPAN:
        raise ValueError(
            f"save_official: model must have text_relative_span={TEXT_RELATIVE_SPAN}, as the release does, "
            f"got {config.text_relative_span}"
        )
    for kind in KINDS:
        if any(base.__name__ == TASKS[kind] for base in type(model).__mro__):
            unsupported = {"pretrain": model.config.num_vl_layers == 0, "retrieval": getattr(model, "itm_head", None)}
            if unsupported.get(kind):
                raise ValueError(
                    "save_official: model must have the heads of a released kind, got a "
                    f"{type(model).__name__} with num_vl_layers={model.config.num_vl_layers}, "
                    f"has_itm_head={model.config.has_itm_head}"
                )
            return kind
    raise ValueError(
        f"save_official: model must be one of {[TASKS[kind] for kind in KINDS]}, got {type(model).__name__}"
    )
