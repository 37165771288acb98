"""Contrastive embeddings of a collection of pictures and texts, into one file.

What is encoded once stays in a store (`vlmo_fast.store`), by what the network read. So a run that was stopped, a
collection that grew, another output or another format encode only what is new; the output is then made of the store, in
the collection's order. An embedding does not depend on what it was encoded beside, but for rounding (some 1e-7).
"""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vlmo_fast.data.folders import find_pictures
from vlmo_fast.data.images import ImageError, read_image
from vlmo_fast.data.tables import TableError, is_table, read_lines, read_table
from vlmo_fast.files import write_whole
from vlmo_fast.requirements import require
from vlmo_fast.store import EmbeddingStore, key_of

if TYPE_CHECKING:
    from vlmo_fast.hf.modeling import VLMoPreTrainedModel

__all__ = ["FORMATS", "Collection", "Embedded", "collect", "embed", "output_path", "write"]

FORMATS = (".parquet", ".safetensors", ".npy")
TEXTS_AT_ONCE = 4096  # sorted by length, so that a batch is of texts alike
ROWS_AT_ONCE = 8192  # from the store into the output


class Collection(NamedTuple):
    """What is to be embedded.

    Attributes:
        images: paths, as the output names them.
        texts: the texts.
        left_out: (path, reason) of files in a folder that are no pictures.
    """

    images: list[str]
    texts: list[str]
    left_out: list[tuple[str, str]]


def collect(
    images: Path | None = None,
    texts: Path | None = None,
    *,
    image_column: str | None = None,
    text_column: str | None = None,
) -> Collection:
    """The items of a collection.

    Args:
        images: a folder, walked through; a text file with a path a line; or a table. Paths in files are relative to the
            file's folder.
        texts: a text file with a text a line, or a table.
        image_column: the column of paths where `images` is a table.
        text_column: the column of texts where `texts` is a table.

    Raises:
        FileNotFoundError: a source is not there.
        ValueError: it holds nothing, or is not in order; the message names file and line.
    """
    found = Collection([], [], [])
    if images is not None and images.is_dir():
        if image_column is not None:
            raise TableError(f"{images}: must be a table to have the column {image_column!r}, got a folder")
        pictures = find_pictures(images)
        if not pictures.paths:
            raise ValueError(f"{images}: must hold pictures, got none among {len(pictures.left_out)} files")
        found.images.extend(str(path) for path in pictures.paths)
        found.left_out.extend((str(path), reason) for path, reason in pictures.left_out)
    elif images is not None:
        found.images.extend(str(images.parent / name) for name in _items(images, image_column, paths=True))
    if texts is not None:
        found.texts.extend(_items(texts, text_column))
    return found


def _items(path: Path, column: str | None, *, paths: bool = False) -> list[str]:
    if column is not None:
        return read_table(path, [column])[column]
    if is_table(path):
        option = "image" if paths else "text"
        raise TableError(f"{path}: is a table; --{option}-column names the column to read")
    return read_lines(path, paths=paths)


@dataclass
class Embedded:
    """What became of a collection.

    Attributes:
        width: numbers of an embedding.
        image_keys: key of each image, in order; None where it could not be read.
        text_keys: key of each text, in order.
        computed: items that were encoded now; all others came from the store, or are the same as another.
        broken: (path, reason) of images that could not be read.
        cut: places in the collection of texts that were longer than the model takes.
    """

    width: int
    image_keys: list[bytes | None] = field(default_factory=list)
    text_keys: list[bytes] = field(default_factory=list)
    computed: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)


def embed(
    model: VLMoPreTrainedModel,
    processor: Any,
    collection: Collection,
    store: EmbeddingStore,
    *,
    batch_size: int = 64,
    threads: int = 4,
    skip_broken: bool = False,
    report: Callable[[int], None] = lambda count: None,
) -> Embedded:
    """Have the embeddings of a collection in the store.

    Args:
        model: with a contrastive head, in evaluation mode.
        processor: `VLMoProcessor`, or `VLMoImageProcessor` where there are no texts.
        collection: the items.
        store: the model's.
        batch_size: items that are encoded, and then kept, together.
        threads: that read pictures while the model works.
        skip_broken: leave out pictures that cannot be read, instead of raising.
        report: called with the number of items that are done, again and again.

    Returns:
        `Embedded`, for `write`.

    Raises:
        ImageError: a picture cannot be read; what was done before is kept.
        ValueError: an embedding does not have norm 1: numbers overflow on the way.
    """
    done = Embedded(store.width)
    with torch.inference_mode():
        _Encoder(model, store, batch_size, done, report).images(collection.images, processor, threads, skip_broken)
        _Encoder(model, store, batch_size, done, report).texts(collection.texts, processor)
    return done


class _Item(NamedTuple):
    key: bytes
    array: npt.NDArray[Any]  # what the network reads: pixels (3, H, W) or token ids (T,)
    name: str


class _Encoder:
    """Looks items up, encodes those that are missing in batches, and keeps each batch at once."""

    def __init__(
        self,
        model: VLMoPreTrainedModel,
        store: EmbeddingStore,
        batch_size: int,
        done: Embedded,
        report: Callable[[int], None],
    ) -> None:
        self.model, self.store, self.batch_size, self.done, self.report = model, store, batch_size, done, report
        self.missing: dict[bytes, _Item] = {}
        self.uses: Counter[bytes] = Counter()  # of what is missing: how many items are the same

    def images(self, paths: Sequence[str], processor: Any, threads: int, skip_broken: bool) -> None:
        waiting: list[_Item] = []
        for path, future in _ahead(paths, lambda path: _pixels(path, processor), threads, 2 * self.batch_size):
            try:
                pixels = future.result()
            except (ImageError, OSError) as error:
                if not skip_broken:
                    raise ImageError(f"{error} (--skip-broken leaves such pictures out)") from error
                self.done.broken.append((path, str(error)))
                self.done.image_keys.append(None)
                self.report(1)
                continue
            waiting.append(_Item(key_of(pixels), pixels, path))
            self.done.image_keys.append(waiting[-1].key)
            if len(waiting) == self.batch_size:
                self._add(waiting, self._encode_images)
                waiting = []
        self._add(waiting, self._encode_images, last=True)

    def texts(self, texts: Sequence[str], processor: Any) -> None:
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            some = list(texts[first : first + TEXTS_AT_ONCE])
            encoded = processor.tokenizer(some, truncation=True, padding=False, return_attention_mask=False)
            limit = processor.tokenizer.model_max_length
            lengths = [len(ids) for ids in encoded["input_ids"]]
            full = [place for place, length in enumerate(lengths) if length == limit]
            asked = [some[place] for place in full]
            whole = processor.tokenizer(asked, truncation=False, verbose=False)["input_ids"] if full else []
            self.done.cut += [first + place for place, ids in zip(full, whole, strict=True) if len(ids) > limit]
            arrays = [np.array(ids, dtype=np.int64) for ids in encoded["input_ids"]]
            items = [_Item(key_of(ids), ids, text) for ids, text in zip(arrays, some, strict=True)]
            self.done.text_keys += [item.key for item in items]
            items.sort(key=lambda item: len(item.array))
            self._add(items, self._encode_texts, last=True)

    def _add(self, items: list[_Item], encode: Callable[[list[_Item]], torch.Tensor], *, last: bool = False) -> None:
        """Look items up; encode what is missing as soon as it fills a batch, or at once if these are the `last`."""
        there = self.store.get([item.key for item in items])
        missing = [item for item in items if item.key not in there]
        self.missing |= {item.key: item for item in missing}
        self.uses.update(item.key for item in missing)
        self.report(len(items) - len(missing))
        while len(self.missing) >= self.batch_size or (last and self.missing):
            batch = list(self.missing.values())[: self.batch_size]
            embeds = encode(batch).float().cpu().numpy()
            # What overflows on the way ends as NaN, or, divided by an infinite norm, as zeros.
            norms = np.linalg.norm(embeds, axis=1)
            broken = [f"{item.name[:80]!r}" for item, norm in zip(batch, norms, strict=True) if not 0.9 < norm < 1.1]
            if broken:
                dtype = str(self.model.dtype).removeprefix("torch.")
                raise ValueError(
                    f"the embedding of {broken[0]} must have norm 1, but numbers overflow in {dtype} (as do those of "
                    f"{len(broken) - 1} more of {len(batch)}); float32 is the widest dtype"
                )
            self.store.put([item.key for item in batch], embeds)
            for item in batch:
                del self.missing[item.key]
            self.done.computed += len(batch)
            self.report(sum(self.uses.pop(item.key) for item in batch))

    def _encode_images(self, batch: list[_Item]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack([item.array for item in batch]))
        output = self.model.backbone(pixel_values=pixels.to(self.model.device, self.model.dtype), cls_only=True)
        return output.image_embeds

    def _encode_texts(self, batch: list[_Item]) -> torch.Tensor:
        longest = max(len(item.array) for item in batch)
        ids, mask = torch.zeros(2, len(batch), longest, dtype=torch.int64)
        for row, item in enumerate(batch):
            ids[row, : len(item.array)] = torch.from_numpy(item.array)
            mask[row, : len(item.array)] = 1
        device = self.model.device
        output = self.model.backbone(input_ids=ids.to(device), attention_mask=mask.to(device), cls_only=True)
        return output.text_embeds


def _pixels(path: str, processor: Any) -> npt.NDArray[np.float32]:
    image_processor = getattr(processor, "image_processor", processor)
    pixels = image_processor(read_image(path), return_tensors="np")["pixel_values"][0]
    return np.ascontiguousarray(pixels, np.float32)


def _ahead(
    items: Sequence[str], work: Callable[[str], Any], threads: int, lead: int
) -> Iterator[tuple[str, Future[Any]]]:
    """Each item and what is made of it, in order; threads are at most `lead` items ahead."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[str, Future[Any]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) >= lead:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, future in waiting:
                future.cancel()


# The output


def output_path(out: Path, collection: Collection) -> Path:
    """Where the output goes: Parquet if `out` has no suffix.

    Raises:
        ValueError: a format that is not known, or that cannot hold the collection. Asked before the work begins.
        ImportError: a format whose package is not installed.
    """
    if not out.suffix:
        out = out.with_name(f"{out.name}.parquet")
    if out.suffix not in FORMATS:
        raise ValueError(f"OUT must end in one of {', '.join(FORMATS)}, got {out}")
    if out.suffix == ".npy" and collection.images and collection.texts:
        raise ValueError("OUT must be .parquet or .safetensors for images and texts together, got .npy")
    if out.suffix == ".parquet":
        require(f"{out}", "pyarrow")
    return out


def write(out: Path, collection: Collection, done: Embedded, store: EmbeddingStore) -> None:
    """Write the embeddings in the collection's order; the file appears whole or not at all.

    `.parquet` has the columns kind ("image" or "text"), item and embedding; `.safetensors` has image_embeds (N, D) and
    text_embeds (M, D) and, as UTF-8 bytes of JSON, the items in `items`; `.npy` has one array, its items in OUT.json.
    Bytes of a name that are not UTF-8 are written as Python escapes them (surrogates), in Parquet as backslash escapes.
    """
    rows = {
        "image": [(name, key) for name, key in zip(collection.images, done.image_keys, strict=True) if key is not None],
        "text": list(zip(collection.texts, done.text_keys, strict=True)),
    }
    rows = {kind: pairs for kind, pairs in rows.items() if pairs}
    if not rows:
        raise ValueError("the collection must hold a picture that can be read, or a text, got neither")
    items = {kind: [name for name, _ in pairs] for kind, pairs in rows.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".parquet":
        write_whole(out, lambda path: _write_parquet(path, rows, store))
        return
    embeds = {kind: _all_of([key for _, key in pairs], store) for kind, pairs in rows.items()}
    if out.suffix == ".safetensors":
        from safetensors.numpy import save_file

        text = json.dumps({f"{kind}s": names for kind, names in items.items()}).encode()
        tensors = {f"{kind}_embeds": array for kind, array in embeds.items()}
        tensors["items"] = np.frombuffer(text, np.uint8)
        write_whole(out, lambda path: save_file(tensors, path))
    else:
        ((kind, array),) = embeds.items()

        def save(path: Path) -> None:
            with path.open("xb") as file:
                np.save(file, array)

        write_whole(out.with_name(f"{out.name}.json"), lambda path: _write_text(path, json.dumps(items[kind])))
        write_whole(out, save)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_parquet(path: Path, rows: dict[str, list[tuple[str, bytes]]], store: EmbeddingStore) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema(
        [("kind", pa.string()), ("item", pa.string()), ("embedding", pa.list_(pa.float32(), store.width))]
    )
    with parquet.ParquetWriter(path, schema) as writer:
        for kind, pairs in rows.items():
            for first in range(0, len(pairs), ROWS_AT_ONCE):
                some = pairs[first : first + ROWS_AT_ONCE]
                array = _all_of([key for _, key in some], store)
                names = [os.fsencode(name).decode("utf-8", "backslashreplace") for name, _ in some]
                columns = [
                    pa.array([kind] * len(some)),
                    pa.array(names),
                    pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), store.width),
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _all_of(keys: list[bytes], store: EmbeddingStore) -> npt.NDArray[np.float32]:
    """Their embeddings, (len(keys), width)."""
    array = np.empty((len(keys), store.width), np.float32)
    for first in range(0, len(keys), ROWS_AT_ONCE):
        some = keys[first : first + ROWS_AT_ONCE]
        there = store.get(some)
        lost = sum(key not in there for key in some)
        if lost:
            raise OSError(f"{store.path}: {lost} embeddings were lost while the output was written; run it again")
        array[first : first + len(some)] = [there[key] for key in some]
    return array
