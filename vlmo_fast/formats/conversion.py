"""What becomes of a checkpoint's tensors on their way into a model, whatever format they come from.

A reader of a format (`official`, `beit`, a folder of ours) gives the tensors under our names and the configuration that
they have. `retarget` fits them to the task and the settings that are wanted; a `Conversion` builds the model.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmo_fast.config import PRESETS, MoMEConfig
from vlmo_fast.positions import resize_absolute_positions, resize_relative_bias_table

if TYPE_CHECKING:
    from vlmo_fast.hf.configuration import VLMoConfig
    from vlmo_fast.hf.modeling import VLMoPreTrainedModel

__all__ = [
    "NUM_LABELS",
    "TASKS",
    "Conversion",
    "LoadingReport",
    "block_numbers",
    "cast",
    "check_task",
    "check_tensors",
    "fit",
    "on_meta",
    "retarget",
    "shape_of",
    "tie_text_dropout",
    "window_of",
]

_logger = logging.getLogger(__name__)

TASKS = {
    "pretrain": "VLMoForPreTraining",
    "retrieval": "VLMoForImageTextRetrieval",
    "vqa": "VLMoForQuestionAnswering",
    "nlvr2": "VLMoForImagesAndTextClassification",
    "text": "VLMoForMaskedLM",
    "mim": "VLMoForMaskedImageModeling",
    "classification": "VLMoForImageClassification",
}  # model classes that a checkpoint can be fitted to
NUM_LABELS = {"vqa": 3129, "nlvr2": 2}
_READ_OFF = (  # settings that the tensors fix
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "stem_patch_size"),
    *("num_channels", "vocab_size", "position_embedding_type", "text_relative_span"),
)


@dataclass(frozen=True)
class LoadingReport:
    """What became of a checkpoint's tensors.

    Attributes:
        source: what the checkpoint is: a task that it was saved from, a key of `TASKS`, or "beit".
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
        model = on_meta(self.report.task, self.config)
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


def retarget(
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
    task = kind if task is None else check_task(who, task, settings, kind)
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
        "has_itm_head": kind == "pretrain",
    }
    if task in NUM_LABELS:
        changed["num_labels"] = NUM_LABELS[task]
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
        source: what the checkpoint is, a key of `TASKS` or "beit".
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
    shapes = {name: x.shape for name, x in on_meta(task, config).state_dict().items()}
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


def on_meta(task: str, config: VLMoConfig) -> VLMoPreTrainedModel:
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


def check_task(who: str, task: str, settings: Mapping[str, Any], kind: str | None = None) -> str:
    """The task, if there is such a one, and if `settings` say what it needs; `kind`: the checkpoint's own task."""
    if task not in TASKS:
        raise ValueError(f"{who}: task must be one of {sorted(TASKS)}, got {task!r}")
    if task == "classification" and kind != task and "num_labels" not in settings:
        raise ValueError(f"{who}: num_labels must be given for the task 'classification', got None")
    return task


def tie_text_dropout(who: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which the dropout of text embeddings is the drop path rate, as in the release's training.

    Only where the first is not given; a warning says so.
    """
    if "drop_path_rate" not in settings or "text_embedding_dropout" in settings:
        return settings
    rate = settings["drop_path_rate"]
    if rate:
        _logger.warning(
            "%s: text_embedding_dropout is drop_path_rate, %s, as in the release's training; give it to have another",
            who,
            rate,
        )
    return {**settings, "text_embedding_dropout": rate}


def cast(model: VLMoPreTrainedModel, dtype: torch.dtype, who: str) -> VLMoPreTrainedModel:
    """The model in another dtype; changed in place.

    Raises:
        ValueError: numbers are too large for the dtype; names their tensors and the way out. Nothing is changed then.
    """
    state = {name: x for name, x in model.state_dict().items() if x.is_floating_point()}
    broken = [name for name, x in state.items() if not torch.isfinite(x.to(dtype)).all()]
    if broken:
        largest = max(float(state[name].abs().max()) for name in broken)
        raise ValueError(
            f"{who}: dtype must hold numbers up to {largest:.3g}, got {str(dtype).removeprefix('torch.')}, in which "
            f"{len(broken)} tensors would become infinite (bfloat16 and float32 hold them):\n  " + "\n  ".join(broken)
        )
    model.config.dtype = dtype
    return model.to(dtype)


def shape_of(tensors: Mapping[str, Tensor], name: str, ndim: int, what: str) -> torch.Size:
    """The shape of a tensor that a checkpoint must hold.

    Args:
        tensors: the checkpoint's.
        name: of the tensor.
        ndim: its number of dimensions.
        what: begins the error: who asks, and of what checkpoint.
    """
    if name not in tensors or tensors[name].ndim != ndim:
        found = f"shape {tuple(tensors[name].shape)}" if name in tensors else "none"
        raise ValueError(f"{what} must hold {name} with {ndim} dimensions, got {found} among {len(tensors)} tensors")
    return tensors[name].shape


def block_numbers(tensors: Iterable[str], pattern: str) -> list[int]:
    """What the first group of a pattern matches in names of tensors, as numbers, ascending."""
    matches = (re.match(pattern, name) for name in tensors)
    return sorted({int(match[1]) for match in matches if match})


def window_of(rows: int) -> int | None:
    """N for the (2 N - 1)^2 rows of a relative table that belong to N x N patches; None for another number of rows."""
    side = math.isqrt(max(rows, 0))
    return (side + 1) // 2 if side**2 == rows and side % 2 else None
