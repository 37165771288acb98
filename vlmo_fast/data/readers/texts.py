"""Texts without images: plain text files, read where they lie, and columns of tables.

The language stage takes sentences or paragraphs, one a line (BookCorpus, extracts of Wikipedia). Blank lines part
documents and are no texts. A line that is longer than the model's length would be cut there by the tokenizer; with
`max_words` it is split instead, and every word is learned from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from vlmo_fast.data.randomness import stable_id
from vlmo_fast.data.readers._index import Arrays, kept_index, read_range
from vlmo_fast.data.source import PackedStrings, Sample, SourceError, UnreadableItem, check_index, digest
from vlmo_fast.data.tables import is_table, read_table

__all__ = ["TextFile", "TextTable"]

_INDEX_FORMAT = 1
_CHUNK = 2**25  # bytes indexed at once
_UTF8_MARK, _OTHER_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


class TextFile:
    """A `Source` of the lines of a text file, of any size: 8 bytes of memory a text.

    Args:
        path: UTF-8, with or without a byte order mark; lines end at a line feed.
        max_words: a longer line is split into pieces of so many words, of which the last may be shorter; what stands
            between blanks is a word. None: a line is a text. BERT's tokenizer makes about 1.3 tokens of an English
            word, so that 140 words fit into the paper's 196 tokens.
        index_folder: where the index is kept that is made at the first opening; None is the folder of the file.

    Raises:
        FileNotFoundError: there is no such file.
        SourceError: a table, UTF-16, or without any text.
        ValueError: `max_words` is not positive.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_words: int | None = None,
        index_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if max_words is not None and max_words < 1:
            raise ValueError(f"TextFile: max_words must be positive, got {max_words}")
        self.path, self.max_words = Path(path), max_words
        if is_table(self.path):
            raise SourceError(f"{path}: is a table, not lines; read its column with TextTable")
        arrays = kept_index(
            self.path,
            partial(_index, max_words=max_words),
            settings={"format": _INDEX_FORMAT, "max_words": max_words},
            folder=None if index_folder is None else Path(index_folder),
        )
        self._starts = arrays["starts"]  # of each text, and the end of the file
        if not len(self):
            raise SourceError(f"{path}: must hold a text, got none")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        start, end = self._starts[index : index + 2].tolist()
        content = read_range(self.path, start, end)
        try:
            # What lies between two texts is blank: the end of the line, and empty lines.
            text = content.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UnreadableItem(f"not UTF-8 ({error.reason})") from error
        return Sample(None, text, stable_id("text", os.fspath(self.path), index))

    def place(self, index: int) -> str:
        """The file and the byte at which the text begins."""
        return f"{self.path}: byte {self._starts[index]}"

    def fingerprint(self) -> str:
        """Of where the texts stand in the file, and its name."""
        return digest(self.path.name, self._starts)


class TextTable:
    """A `Source` of one column of a table, a text a row.

    Args:
        path: CSV, TSV, JSON Lines or Parquet, as `vlmo_fast.data.tables.read_table` takes them; held in memory.
        column: its name. An empty or null text counts as a sample that cannot be read.

    Raises:
        FileNotFoundError, ImportError, TableError: as in `read_table`.
    """

    def __init__(self, path: str | os.PathLike[str], column: str) -> None:
        self.path = Path(path)
        self._texts = PackedStrings(read_table(self.path, [column], strict=False)[column])

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Sample:
        return Sample(None, self._texts[index], stable_id("text", os.fspath(self.path), index))

    def place(self, index: int) -> str:
        """The file and the row."""
        return f"{self.path}: row {index + 1}"

    def fingerprint(self) -> str:
        """Of the texts."""
        return self._texts.digest()


def _index(path: Path, max_words: int | None) -> Arrays:
    """Where texts start: at a word that is the first of its line, or `max_words` or a multiple behind the first."""
    size = path.stat().st_size
    starts = []
    with path.open("rb") as file:
        mark = file.read(3)
        if mark.startswith(_OTHER_MARKS):
            raise SourceError(f"{path}: must be UTF-8, got UTF-16; convert it")
        position = 3 if mark == _UTF8_MARK else 0
        file.seek(position)
        for chunk in _whole_lines(file):
            starts.append(position + _starts_of(np.frombuffer(chunk, dtype=np.uint8), max_words))
            position += len(chunk)
    return {"starts": np.concatenate([*starts, np.array([size])]).astype(np.int64)}


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """The rest of a file in chunks that end where lines do."""
    pieces: list[bytes] = []
    while piece := file.read(_CHUNK):
        end = piece.rfind(b"\n") + 1
        if end:
            yield b"".join([*pieces, piece[:end]])
            pieces = []
        pieces.append(piece[end:])
    if any(pieces):
        yield b"".join(pieces)


def _starts_of(chunk: npt.NDArray[np.uint8], max_words: int | None) -> npt.NDArray[np.int64]:
    """As `_index`, in a chunk of whole lines, (n,) bytes."""
    blank = (chunk - np.uint8(ord("\t")) <= ord("\r") - ord("\t")) | (chunk == ord(" "))  # what is less wraps around
    words = np.flatnonzero(blank[:-1] & ~blank[1:]) + 1
    words = words if blank[0] else np.concatenate([[0], words])
    lines = np.concatenate([[0], np.flatnonzero(chunk == ord("\n")) + 1])
    first = np.searchsorted(words, lines)  # the number of each line's first word; a blank line has that of the next one
    first = first[(np.diff(first, prepend=-1) > 0) & (first < len(words))]
    if max_words is None:
        return words[first]
    pieces = -(-np.diff(first, append=len(words)) // max_words)  # of each line
    before = np.cumsum(pieces) - pieces
    return words[np.repeat(first - before * max_words, pieces) + np.arange(pieces.sum()) * max_words]
