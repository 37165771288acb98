"""Any checkpoint that VLMo can start from, into a folder for `from_pretrained` or a file for the released code."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vlmo_fast.files import write_whole
from vlmo_fast.formats.bert import load_bert_embeddings
from vlmo_fast.formats.conversion import cast
from vlmo_fast.formats.loading import check_path, open_any, processor_of
from vlmo_fast.formats.official import save_official

if TYPE_CHECKING:
    from vlmo_fast.hf.modeling import VLMoPreTrainedModel

__all__ = ["Converted", "convert", "is_released_file"]

_RELEASED_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".th")
_WEIGHTS = re.compile(r"(model|pytorch_model)(-.*)?\.(safetensors|bin)(\.index\.json)?$")


class Converted(NamedTuple):
    """What `convert` made.

    Attributes:
        source: what the checkpoint was: the task that it was saved from, or "beit".
        task: the model's.
        model_class: its class.
        num_parameters: numbers in it.
        image_size: side of its images, pixels.
        max_text_length: its longest text, tokens.
        dtype: "float32", ...
        taken: number of the model's tensors that come from the checkpoint.
        resized: names of those that were fitted to other sizes.
        fresh: names of the model's tensors that the checkpoint had none for.
        unused: names of the checkpoint's tensors that the model has no place for.
        has_vocabulary: whether a processor for texts stands beside the model.
    """

    source: str
    task: str
    model_class: str
    num_parameters: int
    image_size: int
    max_text_length: int
    dtype: str
    taken: int
    resized: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    has_vocabulary: bool


def is_released_file(out: Path) -> bool:
    """Whether a path's suffix says that it is a file for the released code, rather than a folder."""
    return out.suffix in _RELEASED_SUFFIXES


def convert(
    source: Path,
    out: Path | None,
    *,
    dtype: torch.dtype | None = None,
    bert: Path | None = None,
    vocab: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    dry_run: bool = False,
    **settings: Any,
) -> Converted:
    """Convert a checkpoint, and say what became of every tensor.

    The processor of a folder is carried along into a folder. What is written appears whole or not at all, and may take
    the place of what was read: then all else that lay in that folder stays.

    Args:
        source: file or folder, as `load` takes.
        out: a folder, or, with a suffix like .pt, a file for the released code; None only with `dry_run`.
        dtype: to write; None is the checkpoint's.
        bert: a BERT that the text embeddings start from.
        vocab: a WordPiece vocabulary for a processor beside the model, or "bert"; None carries the folder's along.
        seed: for tensors that start fresh; torch's own generator is left as it is.
        overwrite: whether `out` may be there.
        dry_run: do all but write.
        **settings: `task`, `image_size`, `num_attention_heads` and fields of `VLMoConfig`, as `load` takes.

    Raises:
        FileExistsError: `out` is there and is not to be replaced.
        ValueError, FileNotFoundError, ImportError: as `load`; or `out` cannot hold what was asked for.
        OSError: it cannot be written.
    """
    to_file = out is not None and is_released_file(out)
    check_path(source)
    if to_file and vocab is not None:
        raise ValueError(f"convert: a vocabulary needs a folder as OUT, got {out}")
    if out is not None and not dry_run:
        if out.exists() and not overwrite:
            raise FileExistsError(f"convert: OUT must be new (or take --overwrite), got {out}")
        if out.resolve() in source.resolve().parents:
            raise ValueError(f"convert: OUT must not be a folder that IN lies in, since it is replaced, got {out}")
        if out.exists() and out.is_dir() == to_file:
            raise FileExistsError(f"convert: OUT must be a {'file' if to_file else 'folder'} to be replaced, got {out}")
    if to_file and settings.get("task") == "retrieval":
        settings["has_itm_head"] = False  # the release's has none
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conversion = open_any(source, **settings)
        model = conversion.build()
    fresh = set(conversion.report.fresh)
    if bert is not None:
        fresh -= set(load_bert_embeddings(model, bert))
    if dtype is not None:
        model = cast(model, dtype, "convert")
    processor = None if to_file else processor_of(source, model.config, vocab)
    if out is not None and not dry_run:
        out.parent.mkdir(parents=True, exist_ok=True)
        if to_file:
            save_official(model, out)
        else:
            replaces_source = out.exists() and out.samefile(source)
            write_whole(out, lambda folder: _save(model, processor, folder, source if replaces_source else None))
    return Converted(
        source=conversion.report.source,
        task=conversion.report.task,
        model_class=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        image_size=model.config.image_size,
        max_text_length=model.config.max_text_length,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        taken=conversion.report.taken,
        resized=conversion.report.resized,
        fresh=tuple(name for name in conversion.report.fresh if name in fresh),
        unused=conversion.report.unused,
        has_vocabulary=hasattr(processor, "tokenizer"),
    )


def _save(model: VLMoPreTrainedModel, processor: Any, folder: Path, replaced: Path | None) -> None:
    """Write model and processor, and what else lies in the folder that they will replace."""
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    if hasattr(processor, "tokenizer") and model.backbone.image_projection is not None:
        from vlmo_fast.hf.sentence_transformers import describe_for_sentence_transformers

        describe_for_sentence_transformers(folder)
    for path in () if replaced is None else replaced.iterdir():
        target = folder / path.name
        if target.exists() or _WEIGHTS.match(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target, symlinks=True)
        else:
            shutil.copy2(path, target, follow_symlinks=False)
