"""Tar shards as webdataset and `img2dataset` write them (CC3M, SBU), read at any position.

    00000.tar     000000000.jpg  000000000.txt  000000000.json  000000001.jpg  ...
    00000.parquet, 00000_stats.json     img2dataset's own reports; not read

A stream of tars can only be resumed by reading it again up to where it stopped, and only be shuffled within a window.
Here the headers of each shard are read once, and where each file stands is kept beside it: a sample is one look-up, the
order one permutation of all samples. That needs a file system in which seeking is cheap.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import tarfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vlmo_fast.data.randomness import stable_id
from vlmo_fast.data.readers._index import Arrays, kept_index, read_range
from vlmo_fast.data.source import PackedStrings, Sample, SourceError, UnreadableItem, check_index, digest

__all__ = ["TarShards"]

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff", "jp2")

_INDEX_FORMAT = 1
_BLOCK = 512  # of a tar
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")

_logger = logging.getLogger(__name__)


class TarShards:
    """A `Source` of the samples of tar shards: the files of one name up to its first dot.

    Args:
        shards: a folder (its `*.tar`), a pattern (`cc3m/*.tar`), or the paths of the shards; read in the order of their
            names. The first opening reads all headers, a second or two for 10,000 samples; with several ranks let
            one open them first.
        captions: the suffix of the captions; None reads images alone.
        caption_field: the captions' field of the `.json` file, in place of a file of their own.
        id_field: a field of the `.json` file that tells equal images apart from others (`"sha256"`, `"url"`); None:
            each sample is an image of its own.
        index_folder: where the indices are kept, some 70 bytes a sample; None is beside the shards.

    Raises:
        FileNotFoundError: no shard of these names.
        SourceError: a shard is compressed, damaged or cut short; or no sample in any.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        captions: str | None = "txt",
        caption_field: str | None = None,
        id_field: str | None = None,
        index_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.paths = _find(shards)
        self.caption_field, self.id_field = caption_field, id_field
        caption_suffix = captions if caption_field is None else None
        wanted = {"image": IMAGE_SUFFIXES, "text": (caption_suffix,), "json": ("json",)}
        keys, counts, ranges = [], [], []
        for number, path in enumerate(self.paths):
            index = kept_index(
                path,
                partial(_index, suffixes=wanted),
                settings={"format": _INDEX_FORMAT, "captions": caption_suffix},
                folder=None if index_folder is None else Path(index_folder),
            )
            keys.append((index["keys"].tobytes(), index["key_ends"]))
            counts.append(len(index["key_ends"]))
            ranges.append(index["ranges"])
            if number % 50 == 49:
                _logger.info("%d of %d shards opened", number + 1, len(self.paths))
        self._shard_starts = np.concatenate([[0], np.cumsum(counts)])
        self._ranges = np.concatenate(ranges)  # (N, 3, 2): start and end of image, caption and json; -1 if absent
        self._keys = _joined(keys)
        self._reads_captions = captions is not None or caption_field is not None
        if not len(self):
            raise SourceError(f"{self.paths[0]}: must hold a sample, got none in {len(self.paths)} shards")

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, index: int) -> Sample:
        path, key = self._find(index)
        image, caption, facts = self._ranges[index].tolist()
        if image[0] < 0:
            raise UnreadableItem("no image of this name in the shard")
        fields = {}
        if self.caption_field is not None or self.id_field is not None:
            fields = _json(path, facts)
        text = None
        if self.caption_field is not None:
            value = fields.get(self.caption_field) or ""
            if not isinstance(value, str):
                raise UnreadableItem(f"{self.caption_field!r} must be text, got {value!r:.40}")
            text = value
        elif self._reads_captions:
            text = _decoded(read_range(path, *caption)) if caption[0] >= 0 else ""
        if self.id_field is None:
            image_id = stable_id("shard", os.fspath(path.absolute()), key)
        elif fields.get(self.id_field) is None:
            raise UnreadableItem(f"no {self.id_field!r} in its .json")
        else:
            image_id = stable_id(self.id_field, str(fields[self.id_field]))
        return Sample(read_range(path, *image), text, image_id)

    def place(self, index: int) -> str:
        """The shard and the sample's name in it."""
        path, key = self._find(index)
        return f"{path}: {key}"

    def fingerprint(self) -> str:
        """Of the names of shards and samples, and where they stand."""
        names = "/".join(path.name for path in self.paths)
        return digest(names, self._keys.digest(), self._ranges)

    def _find(self, index: int) -> tuple[Path, str]:
        check_index(index, len(self))
        shard = int(np.searchsorted(self._shard_starts, index, side="right")) - 1
        return self.paths[shard], self._keys[index]


def _find(shards: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    if not isinstance(shards, (str, os.PathLike)):
        paths = sorted(map(Path, shards))
    elif Path(shards).is_dir():
        paths = sorted(path for path in Path(shards).glob("*.tar") if not path.name.startswith("."))
    elif Path(shards).is_file():
        paths = [Path(shards)]
    else:
        paths = sorted(map(Path, glob.glob(os.fspath(shards), recursive=True)))  # noqa: PTH207 - absolute ones, too
    if not paths:
        raise FileNotFoundError(f"{shards}: there is no shard of this name")
    return paths


def _index(path: Path, suffixes: dict[str, tuple[str | None, ...]]) -> Arrays:
    """Names of the samples, as in `PackedStrings.arrays`, and (n, 3, 2) ranges of their files in bytes."""
    with path.open("rb") as file:
        if file.read(5).startswith(_COMPRESSED):
            raise SourceError(f"{path}: is compressed, so that nothing in it can be sought; unpack it to a plain .tar")
    columns = {suffix: n for n, group in enumerate(suffixes.values()) for suffix in group if suffix is not None}
    samples: dict[str, npt.NDArray[np.int64]] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined] # holds every member that was ever seen
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK if member.isreg() else member.offset_data
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if not member.isreg() or not stem:  # folders; of macOS: ._000000000.jpg
                    continue
                ranges = samples.setdefault(f"{folder}/{stem}" if folder else stem, np.full((3, 2), -1))
                column = columns.get(suffix.lower())
                if column is None:  # a sample all the same, so that one without an image is seen
                    continue
                if member.issparse():
                    raise SourceError(f"{path}: {member.name} is sparse; pack it anew")
                if ranges[column, 0] >= 0:
                    raise SourceError(f"{path}: must hold each sample once, got two files for {member.name}")
                ranges[column] = member.offset_data, member.offset_data + member.size
    except tarfile.TarError as error:
        raise SourceError(f"{path}: cannot be read ({error}); fetch it anew, or remove it") from error
    # tarfile takes whatever it does not understand for the end.
    if len(rest := read_range(path, end, min(end + _BLOCK, path.stat().st_size))) < _BLOCK or any(rest):
        raise SourceError(f"{path}: is damaged or cut short at byte {end:,}; fetch it anew, or remove it")
    packed, key_ends = PackedStrings(samples).arrays
    return {
        "keys": np.frombuffer(packed, dtype=np.uint8),
        "key_ends": key_ends,
        "ranges": np.array(list(samples.values()), dtype=np.int64).reshape(-1, 3, 2),
    }


def _joined(keys: list[tuple[bytes, npt.NDArray[np.int64]]]) -> PackedStrings:
    starts = np.cumsum([0, *(len(packed) for packed, _ in keys)])
    ends = [start + ends for start, (_, ends) in zip(starts[:-1], keys, strict=True)]
    return PackedStrings.from_arrays(b"".join(packed for packed, _ in keys), np.concatenate(ends))


def _json(path: Path, place: tuple[int, int]) -> dict[str, object]:
    if place[0] < 0:
        raise UnreadableItem("no .json of this name in the shard")
    try:
        fields = json.loads(read_range(path, *place))
    except ValueError as error:
        raise UnreadableItem(f"its .json cannot be read ({error})") from error
    if not isinstance(fields, dict):
        raise UnreadableItem("its .json is no object")
    return fields


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UnreadableItem(f"its caption is not UTF-8 ({error.reason})") from error
