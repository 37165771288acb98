"""Files of tensors: opened without running anything that they hold, written whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmo_fast.requirements import missing

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # in which a model can compute
WRAPPERS = ("state_dict", "module", "model")  # keys under which training codes keep the tensors, in order


def read_tensors(source: str | os.PathLike[str] | Mapping[str, Any], who: str) -> dict[str, Tensor]:
    """The flat dictionary of tensors in a file, a folder or a wrapped dictionary.

    The content decides the format, whatever the suffix: torch's zip format, its legacy format, or safetensors. A folder
    is one that transformers wrote, sharded or not.

    Args:
        source: the file, folder or dictionary.
        who: begins each error message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unreadable, or not a dictionary of dense, finite tensors.
        ImportError: a safetensors file, and the package is not installed.
    """
    loaded: Any = source
    if not isinstance(source, Mapping):
        path = Path(source)
        loaded = _read_folder(path, who) if path.is_dir() else _read_file(path, who)
    for wrapper in WRAPPERS:
        if isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
            break
    tensors = {}
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"{who}: the checkpoint must map names to tensors, got {name!r} of type {kind}")
        name = name.removeprefix("module.")
        if name in tensors:
            raise ValueError(f"{who}: the checkpoint must hold each tensor once, got {name} twice")
        tensors[name] = value
    _check_values(tensors, who)
    return tensors


def _check_values(tensors: Mapping[str, Tensor], who: str) -> None:
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{who}: {name} must be a dense tensor, got layout {tensor.layout}")
        if tensor.is_floating_point() and tensor.dtype not in FLOATS:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise ValueError(f"{who}: {name} must be of {names} or integers, got {tensor.dtype}")
        # A few stored numbers can claim any shape by their strides; copying it would fill the memory.
        if not tensor.is_meta and tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ValueError(f"{who}: {name} must be stored in full, got a view of shape {tuple(tensor.shape)}")
    broken = [name for name, x in tensors.items() if not x.is_meta and not torch.isfinite(x).all()]
    if broken:
        raise ValueError(
            f"{who}: the checkpoint must hold finite numbers, got NaN or infinity in {len(broken)} of {len(tensors)} "
            "tensors:\n  " + "\n  ".join(broken)
        )


def _read_file(path: Path, who: str) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{who}: path must be a checkpoint file, got {path}")
    with path.open("rb") as file:
        if file.read(9)[8:] == b"{":  # eight bytes of length, then JSON
            return _read_safetensors(path, who)
    try:
        # Training codes keep their command line beside the weights; a Namespace is a plain record. Given a path rather
        # than an open file, torch would believe its suffix.
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load's own errors are of many types
        raise ValueError(
            f"{who}: {path} must be a readable torch checkpoint of tensors alone, or safetensors, got "
            + _what_is_wrong(path, error)
        ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{who}: {path} must hold a dictionary, got {type(loaded).__name__}")
    return loaded


def _what_is_wrong(path: Path, error: Exception) -> str:
    """Why torch cannot open a file. Not in torch's words where they advise to switch its protection off."""
    with path.open("rb") as file:
        head = file.read(12)
    if not head:
        return "an empty file"
    if not head.startswith((b"PK", b"\x80")):  # a zip archive, a pickle
        return f"a file that begins with {head!r}"
    text = str(error)
    if "weights_only" in text:
        _, _, text = text.partition("WeightsUnpickler error: ")
        text = f"one that holds something else ({' '.join(text.split('.')[0].split()[:12])})"
    return text or type(error).__name__


def _read_safetensors(path: Path, who: str) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise missing(f"{who}: {path}", "safetensors") from error
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:  # a Rust error, or OSError
        raise ValueError(f"{who}: {path} must be a readable safetensors file, got {error}") from error
    return tensors


def _read_folder(folder: Path, who: str) -> dict[str, Tensor]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return dict(_read_file(folder / name, who))
        if index.is_file():
            return _read_shards(index, who)
    raise FileNotFoundError(
        f"{who}: path must be a checkpoint file, or a folder with model.safetensors or pytorch_model.bin, got {folder}"
    )


def _read_shards(index: Path, who: str) -> dict[str, Tensor]:
    try:
        shard_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{who}: {index} must be an index of shards, got {error!r}") from error
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(map(str, shard_of.values()))):
        if Path(shard).name != shard:
            raise ValueError(f"{who}: {index} must name files beside it, got {shard!r}")
        tensors |= _read_file(index.parent / shard, who)
    if set(tensors) != set(shard_of):
        differing = sorted(set(tensors) ^ set(shard_of))
        raise ValueError(f"{who}: {index} must list the tensors of its shards, got other ones for {differing[:8]}")
    return tensors


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file or folder beside `path` and move it there: it appears whole or not at all.

    What stood there before is replaced, and stays as it was where `write` fails; a link stays a link. Permissions are
    those of any new file of the user's, whatever library writes.

    Raises:
        OSError: it cannot be written: the disk is full, say.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        write(temporary)
        _open_to_others(temporary)
        if path.is_dir():
            path.rename(aside)
        temporary.replace(path)
    except BaseException as error:
        if aside.exists():
            aside.rename(path)
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
        reason = _failed_write(error)
        if reason is not None:
            raise OSError(f"{path} cannot be written: {reason}") from error
        raise
    if aside.exists():
        shutil.rmtree(aside)


def _failed_write(error: BaseException) -> str | None:
    """What the system said, where the error does not name the file: a library has wrapped it, or written to it."""
    if isinstance(error, OSError):
        return error.strerror if error.filename is None else None
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):  # torch
        return error.__context__.strerror
    if type(error).__name__ == "SafetensorError":
        return str(error).partition("I/O error: ")[2] or None
    return None


def _open_to_others(path: Path) -> None:
    """The permissions that the user's umask gives; some libraries write 0600."""
    paths = [path, *path.rglob("*")] if path.is_dir() else [path]
    probe = path.with_name(f"{path.name}.mode")  # the umask itself can only be read by setting it
    try:
        probe.touch()
        mode = probe.stat().st_mode & 0o666
    finally:
        probe.unlink(missing_ok=True)
    for each in paths:
        if each.is_file() and not each.is_symlink():
            each.chmod(each.stat().st_mode & 0o111 | mode)
