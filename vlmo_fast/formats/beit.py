"""BEiT, which VLMo's first stage is.

VLMo's first stage is BEiT (arXiv:2106.08254): its attention, its feed-forward networks and its positions become the
shared attention, the vision experts and the image rows of the relative table. Two spellings of BEiT are known: that of
its release (microsoft/unilm, folder `beit/`), and that of transformers' `BeitModel`, in files and in memory.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmo_fast.config import MoMEConfig
from vlmo_fast.files import read_tensors
from vlmo_fast.formats.conversion import (
    NUM_LABELS,
    Conversion,
    block_numbers,
    check_task,
    check_tensors,
    fit,
    shape_of,
    tie_text_dropout,
    window_of,
)
from vlmo_fast.positions import num_relative_positions

if TYPE_CHECKING:
    from vlmo_fast.hf.modeling import VLMoPreTrainedModel

__all__ = ["load_beit", "open_beit"]

TABLE = "relative_position_bias_table"
POSITIONS = "backbone.relative_position_bias.table"
TYPES = "backbone.modality_type_embeddings.weight"
# transformers' names, oldest spelling first, to the release's
_RELEASED = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^beit\.", ""),
        (r"^encoder\.layer\.", "layers."),
        (r"^encoder\.relative_position_bias\.|^shared_position_bias\.", "rel_pos_bias."),
        (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^layernorm\.", "norm."),
        (r"^pooler\.layernorm\.", "fc_norm."),
        (r"^classifier\.", "head."),
        (r"^layers\.(\d+)\.", r"blocks.\1."),
        (r"^(blocks\.\d+)\.lambda_([12])$", r"\1.gamma_\2"),
        (r"^(blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
        (r"^(blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
        (r"^(blocks\.\d+)\.attention\.output\.dense\.", r"\1.attn.proj."),
        (r"^(blocks\.\d+)\.attention\.o_proj\.", r"\1.attn.proj."),
        (r"^(blocks\.\d+)\.attention\.attention\.relative_position_bias\.", r"\1.attn."),
        (r"^(blocks\.\d+)\.relative_position_bias\.", r"\1.attn."),
        (r"^(blocks\.\d+)\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r"\1.attn.\2_proj."),
        (r"^(blocks\.\d+)\.attention\.([qkv]_proj)\.", r"\1.attn.\2."),
        (r"^(blocks\.\d+)\.attn\.([qv])_proj\.bias$", r"\1.attn.\2_bias"),
        (r"^(blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
        (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    )
)
# What no VLMo has a place for: heads, the norm after mean pooling, constants.
_UNUSED = re.compile(r"(head|lm_head|fc_norm)\.(weight|bias)$|(.*\.)?relative_position_index$")


def load_beit(
    source: str | os.PathLike[str] | Mapping[str, Any] | nn.Module,
    *,
    task: str = "text",
    image_size: int | None = None,
    num_attention_heads: int | None = None,
    **settings: Any,
) -> VLMoPreTrainedModel:
    """A VLMo whose attention, vision experts and positions are a BEiT's; all else is drawn from torch's generator.

    As in the released conversion, language and vision-language experts stay fresh, and so does the final norm where
    BEiT has its norm behind the mean (`fc_norm`). The type row of images is 0: the image path starts as BEiT's own.

    Args:
        source: a file of the BEiT release (any kind: shared or per-layer relative positions, or absolute ones), a file,
            folder or instance of transformers' `BeitModel` or of one with its heads, or a dictionary of tensors.
        task: the model to make, as in `load_official`; VLMo's second stage is "text".
        image_size: side of the images to be used, pixels; positions are resized where BEiT has another.
        num_attention_heads: only needed for absolute positions without BEiT's configuration beside them.
        **settings: fields of `VLMoConfig`: `num_vl_layers` (default: 0 for "text", "mim" and "classification", else 2),
            `vocab_size`, `max_text_length`, `drop_path_rate`, ... Sizes of BEiT's tensors cannot be changed.

    Returns:
        A `VLMoFor...` in eval mode, in BEiT's dtype, on CPU.

    Raises:
        ValueError: not a BEiT, or tensors are missing, unknown, misshapen, not finite or of a wrong dtype; the message
            lists them.
        FileNotFoundError: there is no such file.
        ImportError: transformers is not installed.
    """
    return open_beit(
        source, task=task, image_size=image_size, num_attention_heads=num_attention_heads, **settings
    ).build()


def open_beit(
    source: str | os.PathLike[str] | Mapping[str, Any] | nn.Module,
    *,
    task: str = "text",
    image_size: int | None = None,
    num_attention_heads: int | None = None,
    **settings: Any,
) -> Conversion:
    """Read, check and convert a BEiT, with a report of every tensor; arguments as `load_beit`."""
    check_task("load_beit", task, settings)
    settings = tie_text_dropout("load_beit", settings)
    known = _configuration(source)
    tensors = read_tensors(source.state_dict() if isinstance(source, nn.Module) else source, "load_beit")
    tensors, names = _released(tensors)
    found = _describe(tensors, known, num_attention_heads)
    _check(tensors, found)

    from vlmo_fast.hf.configuration import VLMoConfig

    unused = [names[name] for name in tensors if _UNUSED.match(name)]
    state, origin = _ours(tensors, found)
    origin = {ours: names.get(theirs, theirs) for ours, theirs in origin.items()}
    defaults: dict[str, Any] = {"num_vl_layers": 0 if task in ("text", "mim", "classification") else 2}
    if task == "nlvr2":
        defaults["num_image_types"] = 2
    if task in NUM_LABELS:
        defaults["num_labels"] = NUM_LABELS[task]
    for name in found:
        if name in settings and settings[name] != found[name] and name != "layer_norm_eps":
            raise ValueError(f"load_beit: {name} must be BEiT's {found[name]}, got {settings[name]}")
    own = VLMoConfig(**{**defaults, **found, **settings})
    size = found["image_size"] if image_size is None else image_size
    config = VLMoConfig(**{**defaults, **found, **settings, "image_size": size})
    _complete(state, own.mome)
    conversion = fit("load_beit", "beit", state, origin, own, task, config, unused)
    report = replace(conversion.report, taken=conversion.report.taken - 1, fresh=(TYPES, *conversion.report.fresh))
    return replace(conversion, report=report)


def _configuration(source: Any) -> dict[str, Any]:
    """What transformers' own configuration of BEiT tells beyond the tensors, where it lies beside them."""
    if isinstance(source, nn.Module):
        config: Any = getattr(source, "config", None)
        known: dict[str, Any] = config.to_dict() if config is not None else {}
    elif not isinstance(source, Mapping) and (Path(source) / "config.json").is_file():
        try:
            known = dict(json.loads((Path(source) / "config.json").read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"load_beit: {source}/config.json must be a configuration, got {error}") from error
    else:
        return {}
    if known.get("model_type", "beit") != "beit":
        raise ValueError(f"load_beit: the configuration must be a BEiT's, got model_type {known['model_type']!r}")
    if known.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"load_beit: BEiT's hidden_act must be 'gelu', as VLMo's is, got {known['hidden_act']!r}")
    return known


def _released(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors under the release's names, and the names that they had."""
    renamed: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for name, tensor in tensors.items():
        new = name
        for pattern, replacement in _RELEASED:
            new = pattern.sub(replacement, new)
        if new in renamed:
            raise ValueError(f"load_beit: the checkpoint must hold each tensor once, got {names[new]} and {name}")
        renamed[new], names[new] = tensor, name
    for layer in _layers(renamed):
        query, key, value = (f"blocks.{layer}.attn.{part}_proj.weight" for part in "qkv")
        parts = [renamed[name] for name in (query, key, value) if name in renamed]
        if len(parts) == 3 and len({part.shape for part in parts}) == 1 and parts[0].ndim == 2:
            joined = f"blocks.{layer}.attn.qkv.weight"
            renamed[joined] = torch.cat(parts)
            names[joined] = names[query].replace("query", "{query,key,value}").replace("q_proj", "{q,k,v}_proj")
            for name in (query, key, value):
                del renamed[name]
    return renamed, names


def _layers(tensors: Mapping[str, Tensor]) -> list[int]:
    return block_numbers(tensors, r"blocks\.(\d+)\.")


def _describe(tensors: Mapping[str, Tensor], known: Mapping[str, Any], heads: int | None) -> dict[str, Any]:
    """The settings of a BEiT, read off its tensors."""

    def shape(name: str, ndim: int) -> torch.Size:
        return shape_of(tensors, name, ndim, "load_beit: in its release's names, a BEiT")

    width = shape("cls_token", 3)[-1]
    layers = _layers(tensors)
    if layers != list(range(len(layers))) or not layers:
        raise ValueError(f"load_beit: the blocks must be numbered from 0 without a gap, got {layers}")
    patch_size = shape("patch_embed.proj.weight", 4)[-1]
    tables = [name for name in tensors if name.endswith(TABLE)]
    if bool(tables) == ("pos_embed" in tensors):
        raise ValueError(
            "load_beit: a BEiT must have either relative or absolute positions, got "
            + ("both" if tables else f"neither among {len(tensors)} tensors")
        )
    if tables:
        rows, table_heads = shape(tables[0], 2)
        table_window = window_of(rows - 3)
        if table_window is None:
            raise ValueError(
                f"load_beit: {tables[0]} must have (2 N - 1)^2 + 3 rows for N x N patches, got {(rows, table_heads)}"
            )
        if heads not in (None, table_heads):
            raise ValueError(f"load_beit: num_attention_heads must be the {table_heads} of {tables[0]}, got {heads}")
        heads, window = table_heads, table_window
    else:
        heads = known.get("num_attention_heads") if heads is None else heads
        window = math.isqrt(max(shape("pos_embed", 3)[1] - 1, 0))
        if heads is None:
            raise ValueError("load_beit: num_attention_heads must be given with absolute positions, got None")
    return {
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "intermediate_size": shape("blocks.0.mlp.fc1.weight", 2)[0],
        "patch_size": patch_size,
        "num_channels": shape("patch_embed.proj.weight", 4)[1],
        "image_size": window * patch_size,
        "position_embedding_type": "relative" if tables else "absolute",
        "layer_scale_init_value": 0.1 if any("gamma_" in name for name in tensors) else None,
        "layer_norm_eps": known.get("layer_norm_eps", MoMEConfig.layer_norm_eps),
    }


def _check(tensors: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
    """Raise where tensors are missing, unexpected, misshapen or of a wrong dtype."""
    width, inner, heads = found["hidden_size"], found["intermediate_size"], found["num_attention_heads"]
    window = found["image_size"] // found["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "patch_embed.proj.weight": (width, found["num_channels"], found["patch_size"], found["patch_size"]),
        "patch_embed.proj.bias": (width,),
    }
    if "mask_token" in tensors:
        shapes["mask_token"] = (1, 1, width)
    if {"norm.weight", "norm.bias"} & set(tensors):
        shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    rows = (2 * window - 1) ** 2 + 3
    if found["position_embedding_type"] == "absolute":
        shapes["pos_embed"] = (1, window**2 + 1, width)
    elif f"rel_pos_bias.{TABLE}" in tensors:
        shapes[f"rel_pos_bias.{TABLE}"] = (rows, heads)
    for layer in range(found["num_hidden_layers"]):
        block = {"attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width), "attn.proj.bias": (width,)}
        block |= {f"attn.{name}": (width,) for name in ("q_bias", "v_bias")}
        block |= {f"{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        block |= {"mlp.fc1.weight": (inner, width), "mlp.fc1.bias": (inner,)}
        block |= {"mlp.fc2.weight": (width, inner), "mlp.fc2.bias": (width,)}
        if found["layer_scale_init_value"] is not None:
            block |= {"gamma_1": (width,), "gamma_2": (width,)}
        if found["position_embedding_type"] == "relative" and f"rel_pos_bias.{TABLE}" not in tensors:
            block[f"attn.{TABLE}"] = (rows, heads)
        shapes |= {f"blocks.{layer}.{name}": size for name, size in block.items()}
    ignored = {name for name in tensors if _UNUSED.match(name)}
    check_tensors(tensors, {name: torch.Size(size) for name, size in shapes.items()}, ignored, "load_beit: the BEiT")


def _ours(tensors: Mapping[str, Tensor], found: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors under our names, and the release's name of each."""
    pairs = {
        "cls_token": "image_embeddings.cls_token",
        "mask_token": "image_embeddings.mask_token",
        "pos_embed": "image_embeddings.position_embeddings",
        "patch_embed.proj.weight": "image_embeddings.projection.weight",
        "patch_embed.proj.bias": "image_embeddings.projection.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    }
    for layer in range(found["num_hidden_layers"]):
        block = {"gamma_1": "attention_layer_scale", "gamma_2": "ffn_layer_scale"}
        block |= {f"attn.{name}": f"attention.{name}" for name in ("qkv.weight", "q_bias", "v_bias")}
        for part in ("weight", "bias"):
            block |= {f"norm1.{part}": f"attention_norm.{part}", f"attn.proj.{part}": f"attention.projection.{part}"}
            block |= {f"norm2.{part}": f"experts.vision.norm.{part}"}
            block |= {f"mlp.{fc}.{part}": f"experts.vision.{fc}.{part}" for fc in ("fc1", "fc2")}
        pairs |= {f"blocks.{layer}.{theirs}": f"blocks.{layer}.{ours}" for theirs, ours in block.items()}
    origin = {f"backbone.{ours}": theirs for theirs, ours in pairs.items() if theirs in tensors}
    state = {ours: tensors[theirs].detach().clone() for ours, theirs in origin.items()}
    if found["position_embedding_type"] == "relative":
        shared = f"rel_pos_bias.{TABLE}"
        names = [f"blocks.{layer}.attn.{TABLE}" for layer in range(found["num_hidden_layers"])]
        names = [shared] * len(names) if shared in tensors else names
        state[POSITIONS] = torch.cat([tensors[name] for name in names], dim=1).detach()
        origin[POSITIONS] = names[0] if shared in tensors else f"blocks.*.attn.{TABLE}"
    return state, origin


def _complete(state: dict[str, Tensor], config: MoMEConfig) -> None:
    """Add what BEiT has no rows of: types, zero for images, and relative positions of texts, zero like fresh ones."""
    cls_token = state["backbone.image_embeddings.cls_token"]
    state[TYPES] = cls_token.new_zeros(1 + config.num_image_types, config.hidden_size)
    nn.init.normal_(state[TYPES][:1], std=config.initializer_range)
    if POSITIONS in state:
        rows = num_relative_positions(config.window_size, config.text_relative_span) - len(state[POSITIONS])
        state[POSITIONS] = nn.functional.pad(state[POSITIONS], (0, 0, 0, rows))
