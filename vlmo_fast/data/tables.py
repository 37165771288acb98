"""One way to read lines and tables: each item in its place, or refused with the line that is wrong.

    lines      end at a line feed, with or without a carriage return before it, and at nothing else (U+2028 is text)
    encoding   UTF-8, with or without a byte order mark; UTF-16 with one
    tables     CSV, TSV, JSON Lines, Parquet, by the names of their columns
    emptiness  an empty line or field is an error that names it, since leaving it out would shift all that follow

A file is what its suffix says. A table is never read as lines: its header and its quotes would become items.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmo_fast.requirements import require

__all__ = ["TABLE_SUFFIXES", "TableError", "is_table", "read_lines", "read_table"]

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


class TableError(ValueError):
    """A file of lines or a table cannot be read; the message names the file, and the line where there is one."""


def is_table(path: str | os.PathLike[str]) -> bool:
    """Whether the suffix is that of a table: `TABLE_SUFFIXES`."""
    return Path(path).suffix.lower() in TABLE_SUFFIXES


def read_lines(path: str | os.PathLike[str], *, paths: bool = False) -> list[str]:
    """The lines of a text file.

    Args:
        path: the file.
        paths: whether the lines are names of files, which need not be UTF-8: such bytes are kept as Python keeps them
            in file names (surrogate escapes).

    Returns:
        The lines without their ends, one at least; without blanks around them unless they are `paths`.

    Raises:
        FileNotFoundError: there is no such file.
        TableError: a table, not of the encodings above, no line at all, or an empty one.
    """
    path = Path(path)
    if is_table(path):
        raise TableError(f"{path}: is a table, not lines; name the column to read")
    lines = _split(_decoded(path, "surrogateescape" if paths else "strict"))
    lines = lines if paths else [line.strip() for line in lines]
    if not lines:
        raise TableError(f"{path}: must hold a line, got none")
    for number, line in enumerate(lines, 1):
        if not line:
            raise TableError(f"{path}: line {number} is empty; remove it, or say what it should hold")
    return lines


def read_table(path: str | os.PathLike[str], columns: Sequence[str], *, strict: bool = True) -> dict[str, list[str]]:
    """Columns of a table, as text.

    Args:
        path: a file whose suffix is one of `TABLE_SUFFIXES`. CSV and TSV have a header; a line of JSON Lines is an
            object; Parquet needs the package pyarrow.
        columns: their names.
        strict: whether each field must be text that is not empty. Otherwise whoever asks judges each row: an empty or
            null field is "", an integer its digits.

    Returns:
        For each name its fields in the order of the rows, one at least; blanks around them are kept.

    Raises:
        FileNotFoundError: there is no such file.
        TableError: another suffix, a column that is not there (names those that are), a row that is not like the
            header, a field that is empty or no text, or no row at all.
        ImportError: Parquet without pyarrow; names the command that installs it.
    """
    path = Path(path)
    if not is_table(path):
        raise TableError(f"{path}: must be a table ({', '.join(TABLE_SUFFIXES)}) to have columns")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        rows = _parquet_rows(path, columns)
    elif suffix == ".jsonl":
        rows = _json_rows(path)
    else:
        rows = _delimited_rows(path, columns, "\t" if suffix == ".tsv" else ",")
    return _collect(path, columns, rows, strict)


def _collect(
    path: Path, columns: Sequence[str], rows: Iterable[tuple[str, Mapping[str, Any]]], strict: bool
) -> dict[str, list[str]]:
    """Fields by column, from rows and where each stands in the file."""
    table: dict[str, list[str]] = {name: [] for name in columns}
    for place, row in rows:
        for name, fields in table.items():
            if name not in row:
                raise TableError(f"{path}: {place} must have {name!r}, got {', '.join(map(repr, row)) or 'nothing'}")
            field = row[name]
            if not strict and (field is None or (isinstance(field, int) and not isinstance(field, bool))):
                field = "" if field is None else str(field)
            if not isinstance(field, str):
                raise TableError(f"{path}: {name!r} of {place} must be text, got {field!r}")
            if strict and not field.strip():
                raise TableError(f"{path}: {name!r} of {place} is empty; remove the row, or say what it should hold")
            fields.append(field)
    if not all(table.values()):
        raise TableError(f"{path}: must hold a row, got none")
    return table


def _json_rows(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(_split(_decoded(path)), 1):
        place = f"line {number}"
        if not line.strip():
            raise TableError(f"{path}: {place} is empty; remove it, or say what it should hold")
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TableError(f"{path}: {place} must be JSON, got {error}") from error
        if not isinstance(row, dict):
            raise TableError(f"{path}: {place} must be an object of JSON, got {line.strip()[:40]}")
        yield place, row


def _delimited_rows(path: Path, columns: Sequence[str], delimiter: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    lines = io.StringIO(_decoded(path), newline="\n")  # with their ends, since a quoted field may hold some
    # In TSV a quote is a letter like any other.
    plain = delimiter == "\t"
    reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL, strict=True)
    try:
        header = next(reader, [])
        missing = [name for name in columns if name not in header]
        if missing:
            raise TableError(f"{path}: must have the columns {missing}, got {header}")
        if len(set(header)) < len(header):
            raise TableError(f"{path}: must name each column once, got {header}")
        first = reader.line_num + 1
        for fields in reader:
            place = f"line {first}" if first == reader.line_num else f"lines {first} to {reader.line_num}"
            first = reader.line_num + 1
            if not fields:
                raise TableError(f"{path}: {place} is empty; remove it")
            if len(fields) != len(header):
                raise TableError(f"{path}: {place} must have {len(header)} fields, got {len(fields)}")
            yield place, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise TableError(f"{path}: line {reader.line_num} cannot be read ({error})") from error


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    require(str(path), "pyarrow")
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        missing = [name for name in columns if name not in names]
        if missing:
            raise TableError(f"{path}: must have the columns {missing}, got {names}")
        number = 0
        for batch in file.iter_batches(columns=list(columns)):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (OSError, ValueError) as error:
        raise error if isinstance(error, TableError) else TableError(f"{path}: cannot be read ({error})") from error


def _decoded(path: Path, errors: str = "strict") -> str:
    """The text of a file, without its byte order mark."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    content = path.read_bytes()
    mark, encoding = next(((mark, name) for mark, name in _MARKS if content.startswith(mark)), (b"", "utf-8"))
    content = content[len(mark) :]
    try:
        text = content.decode(encoding, errors)
    except UnicodeDecodeError as error:
        number = content[: error.start].decode(encoding, "replace").count("\n") + 1
        raise TableError(
            f"{path}: line {number} is not {encoding.upper()} ({error.reason}); convert the file"
        ) from error
    if "\0" in text:
        number = text[: text.index("\0")].count("\n") + 1
        raise TableError(f"{path}: line {number} holds a zero byte: no text, or UTF-16 without a byte order mark")
    return text


def _split(text: str) -> list[str]:
    """Lines without their ends; what follows the last end is a line only if it holds something."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]
