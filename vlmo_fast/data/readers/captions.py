"""Image files with their captions: folders, tables, and the annotation files of COCO and Visual Genome.

    read_image_folder     images without captions
    read_caption_table    CSV, TSV, JSON Lines or Parquet with a column of paths and one of captions
    read_karpathy         dataset_coco.json, dataset_flickr30k.json: Karpathy's splits
    read_coco_captions    captions_train2014.json and its like: COCO's own files
    read_visual_genome    region_descriptions.json

A sample is one caption with its image: an image of five captions is five samples of one `image_id`. Annotations are
read at once, images when they are asked for, so that a file that is absent or damaged is found then.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlmo_fast.data.folders import find_pictures
from vlmo_fast.data.randomness import stable_id
from vlmo_fast.data.source import PackedStrings, Sample, SourceError, check_index, digest
from vlmo_fast.data.tables import read_table

__all__ = [
    "CaptionedImages",
    "read_caption_table",
    "read_coco_captions",
    "read_image_folder",
    "read_karpathy",
    "read_visual_genome",
]

_NAMED = 5  # files that are left out, named in the log; the others are counted

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CaptionedImages:
    """A `Source` of N captions on M image files, or of M image files alone.

    `dataclasses.replace(source, captions=None, image_of=None)` gives the images of a captioned one, each once.

    Attributes:
        origin: the file or folder that says so, for messages.
        folder: where the images are.
        paths: of the images, relative to the folder; M of them.
        captions: N of them, or None.
        image_of: the image of each caption, (N,) int64, or None.
        image_ids: (M,) int64; None: a file is an image of its own, whichever source names it.
    """

    origin: Path
    folder: Path
    paths: PackedStrings
    captions: PackedStrings | None = None
    image_of: npt.NDArray[np.int64] | None = None
    image_ids: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if not len(self):
            raise SourceError(f"{self.origin}: must hold {'an image' if self.captions is None else 'a caption'}")

    def __len__(self) -> int:
        return len(self.paths if self.captions is None else self.captions)

    def __getitem__(self, index: int) -> Sample:
        image = self._image(index)
        path = self.folder / self.paths[image]
        caption = None if self.captions is None else self.captions[index]
        if self.image_ids is None:
            return Sample(path, caption, _id_of_file(path))
        return Sample(path, caption, int(self.image_ids[image]))

    def place(self, index: int) -> str:
        """The path of the image, and which caption of the file."""
        path = str(self.folder / self.paths[self._image(index)])
        return path if self.captions is None else f"{path} (caption {index + 1} of {self.origin})"

    def fingerprint(self) -> str:
        """Of names and captions, not of the folder or the pixels."""
        captions = "" if self.captions is None else self.captions.digest()
        return digest(self.paths.digest(), captions, b"" if self.image_of is None else self.image_of)

    def _image(self, index: int) -> int:
        check_index(index, len(self))
        return index if self.image_of is None else int(self.image_of[index])


def read_image_folder(folder: str | os.PathLike[str]) -> CaptionedImages:
    """The images of a folder, at any depth, in the order of their names; what else lies there is counted in the log.

    Raises:
        NotADirectoryError: it is no folder.
        SourceError: it holds no image.
    """
    folder = Path(folder)
    found = find_pictures(folder)
    if found.left_out:
        named = "".join(f"\n  {path}: {reason}" for path, reason in found.left_out[:_NAMED])
        further = f"\n  and {len(found.left_out) - _NAMED:,} more" if len(found.left_out) > _NAMED else ""
        _logger.warning("%s: %d left out, being no images:%s%s", folder, len(found.left_out), named, further)
    paths = PackedStrings(path.relative_to(folder).as_posix() for path in found.paths)
    return CaptionedImages(folder, folder, paths)


def read_caption_table(
    path: str | os.PathLike[str],
    image_column: str,
    caption_column: str,
    *,
    id_column: str | None = None,
    image_folder: str | os.PathLike[str] | None = None,
) -> CaptionedImages:
    """A table of captions and paths of images, one pair a row.

    Args:
        path: CSV, TSV, JSON Lines or Parquet, as `vlmo_fast.data.tables.read_table` takes them.
        image_column: its paths are relative to `image_folder`, or absolute.
        caption_column: an empty or null caption counts as a sample that cannot be read.
        id_column: text or integers; rows of equal ids, also in other tables of the same folder, show the same image.
            None, and where the field is empty: rows of equal paths do.
        image_folder: None is the table's folder.

    Raises:
        FileNotFoundError, ImportError, TableError: as in `read_table`.
    """
    path = Path(path)
    columns = [image_column, caption_column, *([] if id_column is None else [id_column])]
    table = read_table(path, columns, strict=False)
    folder = path.parent if image_folder is None else Path(image_folder)
    # A path that is named by several rows is kept once, as long as the ids do not tell the rows apart.
    names = table[image_column]
    keys = names if id_column is None else list(zip(names, table[id_column], strict=True))
    number = {key: n for n, key in enumerate(dict.fromkeys(keys))}
    paths = PackedStrings(key if isinstance(key, str) else key[0] for key in number)
    ids = None
    if id_column is not None:
        namespace = os.fspath(path.parent.absolute())
        ids = np.array(
            [
                stable_id("column", namespace, id_column, value) if value else _id_of_file(folder / name)
                for name, value in number
            ],
            dtype=np.int64,
        )
    image_of = np.fromiter((number[key] for key in keys), dtype=np.int64, count=len(keys))
    return CaptionedImages(path, folder, paths, PackedStrings(table[caption_column]), image_of, ids)


def read_karpathy(
    path: str | os.PathLike[str],
    image_folder: str | os.PathLike[str],
    *,
    splits: Sequence[str] = ("train", "restval"),
) -> CaptionedImages:
    """A file of Karpathy's splits: of COCO or Flickr30K, five captions or more an image.

    Args:
        path: `dataset_coco.json`, `dataset_flickr30k.json`.
        image_folder: holds the images by `filepath`/`filename` (COCO: `train2014`, `val2014`), or by `filename` where
            the file names no `filepath`.
        splits: of "train", "restval" (COCO's validation images outside "val" and "test"), "val", "test".

    Raises:
        FileNotFoundError: there is no such file.
        SourceError: not of this format, or no caption in these splits.
    """
    path = Path(path)
    content = _json(path)
    with _format_of(path, "Karpathy's splits"):
        dataset = content.get("dataset", path.stem)
        images = [image for image in content["images"] if image["split"] in splits]
        if not images:
            known = sorted({image["split"] for image in content["images"]})
            raise SourceError(f"{path}: must hold images of the splits {list(splits)}, got {known}")
        return _collect(
            path,
            Path(image_folder),
            (
                (
                    "/".join(filter(None, (image.get("filepath"), image["filename"]))),
                    stable_id(dataset, image.get("cocoid", image["filename"])),
                    [sentence["raw"] for sentence in image["sentences"]],
                )
                for image in images
            ),
        )


def read_coco_captions(path: str | os.PathLike[str], image_folder: str | os.PathLike[str]) -> CaptionedImages:
    """A file of COCO's own captions.

    Args:
        path: `captions_train2014.json`, `captions_val2017.json` and their like.
        image_folder: holds the images by `file_name` (`train2014`).

    Raises:
        FileNotFoundError: there is no such file.
        SourceError: not of this format, or no caption in it.
    """
    path = Path(path)
    content = _json(path)
    with _format_of(path, "COCO's captions"):
        captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        return _collect(
            path,
            Path(image_folder),
            (
                (image["file_name"], stable_id("coco", image["id"]), captions[image["id"]])
                for image in content["images"]
            ),
        )


def read_visual_genome(path: str | os.PathLike[str], image_folder: str | os.PathLike[str]) -> CaptionedImages:
    """Visual Genome's regions: each phrase with the whole image, as in the paper's pre-training.

    Args:
        path: `region_descriptions.json`. It is decoded image by image: its 0.7 GB would take ten times as much at once.
        image_folder: holds `VG_100K` and `VG_100K_2`, in one of which each image lies, or the images themselves.

    Raises:
        FileNotFoundError: there is no such file.
        SourceError: not of this format, or no region in it.
    """
    path, folder = Path(path), Path(image_folder)
    second = _names(folder / "VG_100K_2")
    first = "VG_100K/" if (folder / "VG_100K").is_dir() else ""

    def located(image_id: int) -> str:
        name = f"{image_id}.jpg"
        return f"VG_100K_2/{name}" if name in second else f"{first}{name}"

    with _format_of(path, "Visual Genome's regions"):
        return _collect(
            path,
            folder,
            (
                (
                    located(image["id"]),
                    stable_id("visual genome", image["id"]),
                    [region["phrase"] for region in image["regions"]],
                )
                for image in _elements(path)
            ),
        )


def _collect(path: Path, folder: Path, images: Iterable[tuple[str, int, list[str]]]) -> CaptionedImages:
    """From (relative path, id, captions) of each image; one without captions is left out."""
    ids: list[int] = []
    counts: list[int] = []
    names: list[str] = []
    without = []

    def captions() -> Iterator[str]:
        for name, image_id, texts in images:
            if not texts:
                without.append(name)
                continue
            names.append(name)
            ids.append(image_id)
            counts.append(len(texts))
            yield from texts

    packed = PackedStrings(captions())
    if without:
        _logger.warning("%s: %d images without a caption are left out, %s the first", path, len(without), without[0])
    image_of = np.repeat(np.arange(len(names), dtype=np.int64), counts)
    return CaptionedImages(path, folder, PackedStrings(names), packed, image_of, np.array(ids, dtype=np.int64))


def _id_of_file(path: Path) -> int:
    return stable_id("file", os.path.abspath(path))  # noqa: PTH100 - a/../b is b


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise SourceError(f"{path}: must be JSON, got {error}") from error


def _elements(path: Path) -> Iterator[Any]:
    """The elements of a list in JSON, one after another."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: must be UTF-8, got {error}") from error
    decode, blank = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n]*")
    start = blank.match(text).end()  # type: ignore[union-attr] # matches everywhere
    mark, end = "[", "]"
    try:
        while text[start : start + 1] == mark:
            start = blank.match(text, start + 1).end()  # type: ignore[union-attr]
            if mark == "[" and text[start : start + 1] == end:
                break
            element, start = decode(text, start)
            yield element
            start = blank.match(text, start).end()  # type: ignore[union-attr]
            mark = ","
    except ValueError as error:
        raise SourceError(f"{path}: must be JSON, got {error}") from error
    if text[start : start + 1] != end:
        raise SourceError(f"{path}: must be a list in JSON, got {text[start : start + 20]!r} at character {start}")


@contextmanager
def _format_of(path: Path, what: str) -> Iterator[None]:
    """Refuse a file of another format by the first thing in it that is not as it should be."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise SourceError(f"{path}: must be a file of {what}, got one in which there is {reason}") from error


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()  # noqa: PTH208 - names alone
