"""What pre-training reads from: a `Source` is an array of samples that are looked up by their number.

Any position can be asked for, in any order and by any process, so that an order can be drawn, resumed and shared among
workers. A source finds out at the door what it can without reading every file (`SourceError`); what turns out to be
damaged later is one item that cannot be read (`UnreadableItem`), which the stream counts, names and replaces.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["Concatenation", "ImageSource", "PackedStrings", "Sample", "Source", "SourceError", "UnreadableItem"]

ImageSource: TypeAlias = str | Path | bytes | Image.Image  # what `read_image` takes, open files excepted


class SourceError(ValueError):
    """A data source cannot be opened, or not resumed from; the message names it and says why."""


class UnreadableItem(ValueError):
    """One item cannot be read.

    Args:
        message: says why.
        kind: under which it is counted ("missing file", "broken image", "empty text").
    """

    def __init__(self, message: str, kind: str = "unreadable") -> None:
        super().__init__(message)
        self.kind = kind


class Sample(NamedTuple):
    """One item, before its image is decoded.

    Attributes:
        image: where the image is, or what it is; None for a text alone.
        text: a caption or a text; None for an image alone.
        image_id: equal for samples of one image, whose captions are positives of each other; in [0, 2**63), and
            different in different sources unless they name the same image.
    """

    image: ImageSource | None
    text: str | None
    image_id: int


class Source(Protocol):
    """An array of samples. It is pickled for data workers, and several processes may read from it at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample:
        """The sample of a number in [0, len).

        Raises:
            UnreadableItem, OSError: it cannot be read.
        """
        ...

    def place(self, index: int) -> str:
        """Where a sample stands, for people: a path, and what is needed to find it there."""
        ...

    def fingerprint(self) -> str:
        """Equal for the same samples in the same order, wherever their folder lies."""
        ...


class Concatenation:
    """Sources one after another.

    Args:
        sources: one at least.

    Raises:
        SourceError: there is none.
    """

    def __init__(self, sources: Iterable[Source]) -> None:
        self.sources = tuple(sources)
        if not self.sources:
            raise SourceError("Concatenation: sources must hold one at least, got none")
        self._starts = [0, *accumulate(map(len, self.sources))]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:
        source, index = self._find(index)
        return source[index]

    def place(self, index: int) -> str:
        """Where the sample stands in its source."""
        source, index = self._find(index)
        return source.place(index)

    def fingerprint(self) -> str:
        """Of all sources and their order."""
        return digest(*(source.fingerprint() for source in self.sources))

    def _find(self, index: int) -> tuple[Source, int]:
        check_index(index, len(self))
        n = bisect_right(self._starts, index) - 1
        return self.sources[n], index - self._starts[n]


class PackedStrings(Sequence[str]):
    """N strings in two arrays, UTF-8 end to end and (N,) int64 ends.

    A list of 10 million captions is 10 million objects; each forked worker that looks at one writes its reference count
    and thereby copies its page, until every worker holds all of them. These two are shared as they are, and a third of
    the size. Strings that are not Unicode (names of files, halves of surrogate pairs) come back as they were.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        packed, ends = bytearray(), []
        for string in strings:
            packed += string.encode("utf-8", "surrogatepass")
            ends.append(len(packed))
        self._packed, self._ends = bytes(packed), np.array(ends, dtype=np.int64)

    @classmethod
    def from_arrays(cls, packed: bytes, ends: npt.NDArray[np.int64]) -> PackedStrings:
        """Strings that were packed before; the inverse of `arrays`."""
        strings = cls()
        strings._packed, strings._ends = packed, ends
        return strings

    @property
    def arrays(self) -> tuple[bytes, npt.NDArray[np.int64]]:
        """The bytes, and the end of each string in them, (N,) int64."""
        return self._packed, self._ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override] # no slices
        check_index(index, len(self))
        start = self._ends[index - 1] if index else 0
        return self._packed[start : self._ends[index]].decode("utf-8", "surrogatepass")

    def digest(self) -> str:
        """Equal for equal strings."""
        return digest(self._packed, self._ends)


def check_index(index: int, length: int) -> None:
    """Refuse a number that is not one of a source's samples; IndexError also ends a `for` loop over it."""
    if not 0 <= index < length:
        raise IndexError(f"index must be in [0, {length}), got {index}")


def digest(*parts: str | int | bytes | npt.NDArray[np.int64]) -> str:
    """32 hexadecimal digits that stand for some values in their order."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            content = part.tobytes()
        else:
            content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        state.update(b"%d:" % len(content))
        state.update(content)
    return state.hexdigest()
