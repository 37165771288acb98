"""Any map-style data set of Hugging Face's `datasets`, by the names of its columns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmo_fast.data.randomness import stable_id
from vlmo_fast.data.source import ImageSource, Sample, SourceError, UnreadableItem, check_index, digest

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["DatasetColumns"]

_NUM_FINGERPRINTED = 64  # rows whose texts tell one data set from another


class DatasetColumns:
    """A `Source` of columns of a `datasets.Dataset`.

    Args:
        dataset: map-style (`load_dataset(...)["train"]`, `Dataset.from_parquet`, `load_from_disk`).
        image_column: of the feature `Image`, or the bytes or the path of an image; None reads texts alone.
        text_column: of strings, or of lists of strings, each of which becomes a sample; None reads images alone.
        id_column: integers or strings, equal for equal images; None: each row is an image of its own.
        image_folder: where relative paths begin; None is the current folder.
        name: stands for the data set in messages.

    Raises:
        SourceError: a stream, an unknown column, a column of another type, no column, or no row.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        image_column: str | None = None,
        text_column: str | None = None,
        id_column: str | None = None,
        image_folder: str | os.PathLike[str] | None = None,
        name: str = "dataset",
    ) -> None:
        import datasets

        if not isinstance(dataset, datasets.Dataset):
            kind = type(dataset).__name__
            raise SourceError(f"{name}: must be a datasets.Dataset, whose rows can be looked up, got {kind}")
        columns = [column for column in (image_column, text_column, id_column) if column is not None]
        unknown = [column for column in columns if column not in dataset.column_names]
        if unknown:
            raise SourceError(f"{name}: must have the columns {unknown}, got {dataset.column_names}")
        if image_column is None and text_column is None:
            raise SourceError(f"{name}: image_column or text_column must name one of {dataset.column_names}")
        if not len(dataset):
            raise SourceError(f"{name}: must hold a row, got none")
        dataset = dataset.select_columns(columns)
        if image_column is not None and isinstance(dataset.features[image_column], datasets.Image):
            dataset = dataset.cast_column(image_column, datasets.Image(decode=False))  # `read_image` decodes
        self._image_column, self._text_column, self._id_column = image_column, text_column, id_column
        self._folder, self._name = Path() if image_folder is None else Path(image_folder), name
        self._ends = None if text_column is None else _ends_of_lists(dataset, text_column, name)  # (rows,) or None
        self._dataset = dataset.with_format(None)
        self._fingerprint = self._digest()

    def __len__(self) -> int:
        return len(self._dataset) if self._ends is None else int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        row_number, caption = self._find(index)
        row = self._dataset[row_number]
        image = None if self._image_column is None else self._image(row[self._image_column])
        text = None
        if self._text_column is not None:
            text = row[self._text_column]
            if self._ends is not None:
                text = text[caption] if text else ""
            text = text or ""
        image_id = stable_id(self._fingerprint, row_number)
        if self._id_column is not None:
            value = row[self._id_column]
            if value is None:
                raise UnreadableItem(f"no {self._id_column!r}")
            image_id = stable_id(self._fingerprint, "column", str(value))
        return Sample(image, text, image_id)

    def place(self, index: int) -> str:
        """The name of the data set and the row."""
        return f"{self._name}: row {self._find(index)[0]}"

    def fingerprint(self) -> str:
        """Of the columns, the number of rows, and the texts and ids of some of them."""
        return self._fingerprint

    def _find(self, index: int) -> tuple[int, int]:
        """A sample's row, and which text of it."""
        check_index(index, len(self))
        if self._ends is None:
            return index, 0
        row = int(np.searchsorted(self._ends, index, side="right"))
        return row, index - (int(self._ends[row - 1]) if row else 0)

    def _image(self, value: Any) -> ImageSource:
        if isinstance(value, dict):
            value = value["path"] if value.get("bytes") is None else value["bytes"]
        if not value:
            raise UnreadableItem("no image")
        if isinstance(value, str):
            return self._folder / value
        if isinstance(value, bytes):
            return value
        raise UnreadableItem(f"an image must be bytes or a path, got {type(value).__name__}")

    def _digest(self) -> str:
        rows = np.linspace(0, len(self._dataset) - 1, _NUM_FINGERPRINTED).astype(int).tolist()
        columns = [name for name in (self._text_column, self._id_column) if name is not None]
        some = self._dataset.select_columns(columns)[rows] if columns else {}
        return digest(len(self), len(self._dataset), repr([some[name] for name in columns]))


def _ends_of_lists(dataset: Dataset, column: str, name: str) -> np.ndarray | None:
    """How many texts there are up to each row, (rows,) int64; None for a column of strings.

    A row without texts counts as one, which then is found to be empty.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = dataset.features.arrow_schema.field(column).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return None
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not (
        pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type)
    ):
        raise SourceError(f"{name}: {column!r} must hold strings or lists of strings, got {kind}")
    tables = dataset.select_columns([column]).with_format("arrow").iter(batch_size=10_000)
    counts = [pc.fill_null(pc.list_value_length(table[column]), 0).to_numpy() for table in tables]
    return np.cumsum(np.maximum(np.concatenate(counts), 1), dtype=np.int64)
