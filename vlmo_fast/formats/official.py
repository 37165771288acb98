"""Checkpoints of the released VLMo, in and out.

The one place that knows other people's names: microsoft/unilm, folder `vlmo/`, commit 768a3c87. A checkpoint is a plain
dictionary of tensors whose names tell which task it was saved from; `KINDS` lists the tasks.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vlmo_fast.config import PRESETS, MoMEConfig
from vlmo_fast.files import read_tensors, write_whole
from vlmo_fast.positions import resize_absolute_positions, resize_relative_bias_table

if TYPE_CHECKING:
    from vlmo_fast.hf.configuration import VLMoConfig
    from vlmo_fast.hf.modeling import VLMoPreTrainedModel

__all__ = [
    "Conversion",
    "LoadingReport",
    "load_official",
    "official_names",
    "official_state_dict",
    "open_official",
    "open_saved",
    "save_official",
]

_logger = logging.getLogger(__name__)

TEXT_RELATIVE_SPAN = 196  # text lengths covered by every released relative table, whatever the model's own limit
EXPERTS = {"language": "text", "vision": "imag", "vl": "vl"}
IGNORED = ("relative_position_index", "text_relative_position_index", "text_imag_relative_position_index")
POSITION_IDS = "text_embeddings.position_ids"  # a constant of the released text embedding: 0, 1, 2, ...
_NUM_LABELS = {"vqa": 3129, "nlvr2": 2}
_READ_OFF = (  # settings that the tensors fix
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "stem_patch_size"),
    *("num_channels", "vocab_size", "position_embedding_type", "text_relative_span"),
)


class Kind(NamedTuple):
    """A task that checkpoints are released for: its model class, and the heads that it holds."""

    model_class: str
    heads: tuple[str, ...]


KINDS = {
    "pretrain": Kind("VLMoForPreTraining", ("logit_scale", "vl_logit_scale", "pooler", "mlm", "itm", "itc", "vl_itc")),
    "retrieval": Kind("VLMoForImageTextRetrieval", ("logit_scale", "pooler", "itc")),
    "vqa": Kind("VLMoForQuestionAnswering", ("pooler", "vqa")),
    "nlvr2": Kind("VLMoForImagesAndTextClassification", ("pooler", "nlvr2")),
    "text": Kind("VLMoForMaskedLM", ("pooler", "mlm")),
}  # those that checkpoints are released for
TASKS = {task: kind.model_class for task, kind in KINDS.items()} | {
    "mim": "VLMoForMaskedImageModeling",
    "classification": "VLMoForImageClassification",
}  # model classes that a checkpoint can be fitted to

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


@dataclass(frozen=True)
class LoadingReport:
    """What became of a checkpoint's tensors.

    Attributes:
        source: what the checkpoint is: a key of `KINDS`, or "beit".
        task: the task of the model, a key of `TASKS`.
        taken: number of the model's tensors that come from the checkpoint.
        resized: those of them that were fitted to other sizes (positions, type rows); the model's names.
        fresh: the model's tensors that the checkpoint has none for, newly initialised; the model's names.
        unused: the checkpoint's tensors that the model has no place for; the checkpoint's names.
    """

    source: str
    task: str
    taken: int
    resized: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.task} model from a {self.source} checkpoint: {self.taken} tensors taken"]
        for what, names in (("resized", self.resized), ("fresh", self.fresh), ("unused", self.unused)):
            lines += [f"{len(names)} {what}:", *(f"  {name}" for name in names)] if names else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Conversion:
    """A checkpoint read, checked and fitted to a model, before that model is built.

    Attributes:
        config: the model's configuration.
        tensors: the model's tensors that the checkpoint gives, under the model's names.
        report: what became of each tensor.
    """

    config: VLMoConfig
    tensors: dict[str, Tensor]
    report: LoadingReport

    def build(self) -> VLMoPreTrainedModel:
        """The model, in eval mode; what the checkpoint does not give is drawn from torch's global generator.

        Its dtype is the tensors' own, or the one that holds them all: layers of several cannot run.
        """
        model = _on_meta(self.report.task, self.config)
        dtype = reduce(torch.promote_types, (x.dtype for x in self.tensors.values()))
        fresh = set(self.report.fresh)
        for prefix, module in model.named_modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            if any(f"{prefix}.{name}".lstrip(".") in fresh for name, _ in own):
                for name, tensor in own:
                    empty = torch.empty(tensor.shape, dtype=dtype)
                    setattr(module, name, torch.nn.Parameter(empty) if name in module._parameters else empty)
                model._init_weights(module)
        model.load_state_dict({name: x.to(dtype) for name, x in self.tensors.items()}, strict=False, assign=True)
        model.config.dtype = dtype
        return model.eval()


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
        **settings: other fields of `VLMoConfig`: `drop_path_rate`, `num_labels`, `max_text_length` (text positions are
            cut), `num_vl_layers` (a text-stage checkpoint holds none; the presets' number where it is not given),
            `num_image_types`, `has_itm_head`, ... Sizes of the tensors themselves cannot be changed.

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
    tensors = read_tensors(source, "load_official")
    kind, found = _describe(tensors, num_attention_heads)

    from vlmo_fast.hf.configuration import VLMoConfig

    own = VLMoConfig(**found)
    names = dict(_names(own.mome, KINDS[kind].heads))
    ignored = (*IGNORED, POSITION_IDS)
    shapes = {name: x.shape for name, x in _on_meta(kind, own).state_dict().items()}
    check_tensors(
        tensors, {theirs: shapes[ours] for theirs, ours in names.items()}, ignored, f"load_official: the {kind}"
    )
    state = {ours: tensors.pop(theirs).detach().clone() for theirs, ours in names.items()}

    origin = {ours: theirs for theirs, ours in names.items()}
    return _retarget("load_official", kind, state, origin, own, task, image_size, settings)


def open_saved(
    folder: str | os.PathLike[str], *, task: str | None = None, image_size: int | None = None, **settings: Any
) -> Conversion:
    """Read and check a folder that `save_pretrained` of a `VLMoFor...` wrote; arguments as `load_official`.

    For another task or image size; `from_pretrained` is the plain way to the model that was saved.

    Raises:
        ValueError: no model of ours, or tensors are missing, unexpected, misshapen or not finite.
        FileNotFoundError: there is no such folder.
    """
    from vlmo_fast.hf.configuration import VLMoConfig

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"open_saved: folder must hold config.json, got {path}")
    classes = {model_class: task for task, model_class in TASKS.items()}
    try:
        (architecture,) = json.loads((path / "config.json").read_text(encoding="utf-8"))["architectures"]
        kind = classes[architecture]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"open_saved: folder must hold one of {sorted(classes)}, got {error!r}") from error
    own = VLMoConfig.from_pretrained(path)
    tensors = read_tensors(path, "open_saved")
    shapes = {name: x.shape for name, x in _on_meta(kind, own).state_dict().items()}
    check_tensors(tensors, shapes, (), f"open_saved: the {kind}")
    state = {name: tensors.pop(name).detach().clone() for name in shapes}
    return _retarget("open_saved", kind, state, {name: name for name in shapes}, own, task, image_size, settings)


def _retarget(
    who: str,
    kind: str,
    state: dict[str, Tensor],
    origin: Mapping[str, str],
    own: VLMoConfig,
    task: str | None,
    image_size: int | None,
    settings: Mapping[str, Any],
) -> Conversion:
    """Fit a whole model's tensors to a task and to settings; arguments as `fit`."""
    if task is not None and task not in TASKS:
        raise ValueError(f"{who}: task must be one of {sorted(TASKS)}, got {task!r}")
    task = kind if task is None else task
    for name in _READ_OFF:
        if name in settings and settings[name] != getattr(own, name):
            raise ValueError(f"{who}: {name} must be the checkpoint's {getattr(own, name)}, got {settings[name]}")
    wanted = {**own.to_dict(), **_settings_of_task(who, task, kind, own, settings), **settings}
    if image_size is not None:
        wanted["image_size"] = image_size
    if wanted.get("num_labels", own.num_labels) != own.num_labels:  # their names are those of other labels
        wanted = {name: value for name, value in wanted.items() if name not in ("id2label", "label2id")}
    return fit(who, kind, state, origin, own, task, type(own)(**wanted))


def _settings_of_task(who: str, task: str, kind: str, own: VLMoConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a task changes in the settings of a checkpoint of another kind, as the released fine-tuning does."""
    if task == kind:
        return {}
    changed: dict[str, Any] = {
        "num_image_types": 2 if task == "nlvr2" else 1,
        "has_itm_head": kind in KINDS and "itm" in KINDS[kind].heads,
    }
    if task in _NUM_LABELS:
        changed["num_labels"] = _NUM_LABELS[task]
    elif task == "classification" and "num_labels" not in settings:
        raise ValueError(f"{who}: num_labels must be given for the task 'classification', got None")
    if kind == "text":
        changed["max_text_length"] = min(own.max_text_length, MoMEConfig.max_text_length)
    if own.num_vl_layers == 0 and task in ("pretrain", "retrieval", "vqa", "nlvr2"):
        presets = {preset["num_hidden_layers"]: preset["num_vl_layers"] for preset in PRESETS.values()}
        changed["num_vl_layers"] = settings.get("num_vl_layers", presets.get(own.num_hidden_layers))
        if changed["num_vl_layers"] is None:
            raise ValueError(
                f"{who}: num_vl_layers must be given (the checkpoint holds none, and no preset has "
                f"this depth), got None for {own.num_hidden_layers} layers"
            )
    return changed


def fit(
    who: str,
    source: str,
    state: dict[str, Tensor],
    origin: Mapping[str, str],
    own: VLMoConfig,
    task: str,
    config: VLMoConfig,
    unused: Iterable[str] = (),
) -> Conversion:
    """Fit a checkpoint's tensors to the model of a task: shared heads kept, positions and type rows resized.

    Args:
        who: begins each error message.
        source: what the checkpoint is, a key of `KINDS` or "beit".
        state: its tensors under our names; changed.
        origin: the checkpoint's name of each of them.
        own: the configuration that the tensors have now.
        task: a key of `TASKS`.
        config: the configuration wanted.
        unused: names of further tensors of the checkpoint that no model of ours has a place for.

    Raises:
        ValueError: a tensor does not fit into the model.
    """
    left = []  # heads of other forms under the same names
    if task != source:
        left = [name for name in state if name.startswith(("classifier.", "mim_head."))]
    elif config.num_labels != own.num_labels:
        left = [name for name in state if name.startswith(("classifier.fc2.", "classifier.weight", "classifier.bias"))]
    for name in left:
        del state[name]
    resized = _resize(who, state, own, config)
    shapes = {name: x.shape for name, x in _on_meta(task, config).state_dict().items()}
    taken = {name: x for name, x in state.items() if name in shapes}
    misshapen = [
        f"shape of {origin[name]}: {tuple(x.shape)}, expected {tuple(shapes[name])}"
        for name, x in taken.items()
        if x.shape != shapes[name]
    ]
    if misshapen:
        raise ValueError(
            f"{who}: the {source} checkpoint must fit into the {task} model, got {len(misshapen)} problems:\n  "
            + "\n  ".join(misshapen)
        )
    report = LoadingReport(
        source=source,
        task=task,
        taken=len(taken),
        resized=tuple(name for name in resized if name in taken),
        fresh=tuple(name for name in shapes if name not in taken),
        unused=(*(theirs for ours, theirs in origin.items() if ours not in taken), *unused),
    )
    return Conversion(config, taken, report)


def _resize(who: str, state: dict[str, Tensor], own: VLMoConfig, config: VLMoConfig) -> list[str]:
    """Fit positions and type rows to another configuration; the names of the tensors that changed."""
    table, image, text, types = (
        f"backbone.{name}"
        for name in (
            "relative_position_bias.table",
            "image_embeddings.position_embeddings",
            "text_embeddings.position_embeddings.weight",
            "modality_type_embeddings.weight",
        )
    )
    changed = []
    old, new = own.mome.window_size, config.mome.window_size
    if old != new:
        if table in state:
            state[table] = resize_relative_bias_table(state[table], old, new)
            changed.append(table)
        if image in state:
            state[image] = resize_absolute_positions(state[image], old, new)
            changed.append(image)
    if text in state and own.max_text_length != config.max_text_length:
        added = config.max_text_length - own.max_text_length
        if added > 0 and config.position_embedding_type == "absolute":
            raise ValueError(
                f"{who}: max_text_length must be at most the checkpoint's {own.max_text_length} positions, "
                f"got {config.max_text_length}"
            )
        # Relative models never read theirs: new rows may be anything.
        state[text] = torch.nn.functional.pad(state[text][: config.max_text_length], (0, 0, 0, max(added, 0))).clone()
        changed.append(text)
    if types in state and own.num_image_types != config.num_image_types:
        rows = state[types]
        more = rows[-1:].expand(max(config.num_image_types - own.num_image_types, 0), -1)
        state[types] = torch.cat([rows, more])[: 1 + config.num_image_types].clone()
        changed.append(types)
    return changed


def _on_meta(task: str, config: VLMoConfig) -> VLMoPreTrainedModel:
    """The model of a task without memory."""
    from vlmo_fast.hf import modeling

    with torch.device("meta"):
        model: VLMoPreTrainedModel = getattr(modeling, TASKS[task])(config)
    return model


def check_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], ignored: Container[str], what: str
) -> None:
    """Raise with a list of all tensors that are missing, unexpected, misshapen or of no float dtype."""
    problems = [f"missing: {name}" for name in shapes if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in shapes and name not in ignored]
    for name, shape in shapes.items():
        if name in tensors and tensors[name].shape != shape:
            problems.append(f"shape of {name}: {tuple(tensors[name].shape)}, expected {tuple(shape)}")
        if name in tensors and not tensors[name].is_floating_point():
            problems.append(f"dtype of {name}: {tensors[name].dtype}, expected a float dtype")
    if problems:
        raise ValueError(
            f"{what} checkpoint must hold exactly the tensors of its model, got {len(problems)} problems:\n  "
            + "\n  ".join(problems)
        )


def official_names(model: VLMoPreTrainedModel) -> dict[str, str]:
    """The released name of each of the model's tensors, in the released order, and ours.

    Raises:
        ValueError: the released code has no such model.
    """
    return dict(_names(model.config.mome, KINDS[_kind_of_model(model)].heads))


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
        if name not in tensors or tensors[name].ndim != ndim:
            found = f"shape {tuple(tensors[name].shape)}" if name in tensors else "none"
            raise ValueError(
                f"load_official: a VLMo checkpoint must hold {name} with {ndim} dimensions, got {found} "
                f"among {len(tensors)} tensors"
            )
        return tensors[name].shape

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
        side = math.isqrt(max(rows - 5 - 2 * TEXT_RELATIVE_SPAN, 0))
        if side**2 != rows - 5 - 2 * TEXT_RELATIVE_SPAN or side % 2 == 0 or columns % num_layers:
            raise ValueError(
                "load_official: relative_position_bias_table must have (2 N - 1)^2 + 397 rows for N x N patches and a "
                f"multiple of {num_layers} columns, got {(rows, columns)}"
            )
        heads, window = columns // num_layers, (side + 1) // 2
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
    pattern = re.compile(rf"transformer\.blocks\.(\d+)\.{name}")
    return sorted({int(match.group(1)) for match in map(pattern.match, tensors) if match})


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
        experts = ("language", "vision", "vl") if layer >= config.first_vl_layer else ("language", "vision")
        parameters = [(expert, "norm", f"norm2_{EXPERTS[expert]}") for expert in ("language", "vision")]
        parameters += [(expert, fc, f"mlp_{EXPERTS[expert]}.{fc}") for expert in experts for fc in ("fc1", "fc2")]
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
    for kind, (model_class, _) in KINDS.items():
        if any(base.__name__ == model_class for base in type(model).__mro__):
            unsupported = {"pretrain": model.config.num_vl_layers == 0, "retrieval": getattr(model, "itm_head", None)}
            if unsupported.get(kind):
                raise ValueError(
                    "save_official: model must have the heads of a released kind, got a "
                    f"{type(model).__name__} with num_vl_layers={model.config.num_vl_layers}, "
                    f"has_itm_head={model.config.has_itm_head}"
                )
            return kind
    raise ValueError(
        f"save_official: model must be one of {[kind.model_class for kind in KINDS.values()]}, "
        f"got {type(model).__name__}"
    )
