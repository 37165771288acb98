"""Embeddings that are kept by what they are of, so that no item is encoded twice by one model.

A key is the digest of what the network reads: of pixels after preprocessing, or of token ids. Names, dates and places
of files play no part, nor do the output's name and format. All keys of a store belong to one model: its `fingerprint`
(weights, configuration, dtype) names the file. SQLite keeps it: a batch is there whole or not at all, whatever happens
to the process, and several processes may write at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sqlite3
import zlib
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from vlmo_fast.model import MoMETransformer

__all__ = ["EmbeddingStore", "default_folder", "fingerprint", "key_of"]

WAIT_SECONDS = 120.0  # for another process that writes
_KEYS_AT_ONCE = 500  # SQLite's older limit of parameters is 999


def default_folder() -> Path:
    """Where stores lie if nobody says otherwise: `vlmo_fast/embeddings` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vlmo_fast" / "embeddings"


def fingerprint(model: MoMETransformer) -> str:
    """What an embedding depends on beside its input: weights, configuration and dtype, as 32 hexadecimal digits.

    The same model gives the same digits wherever its files lie, whatever format it came from and whatever heads it has
    beside the backbone.
    """
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(model.config), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def key_of(array: npt.NDArray[np.generic]) -> bytes:
    """The key of an input: a digest of its dtype, shape and numbers, 32 bytes."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


class EmbeddingStore:
    """The embeddings of one model.

    Args:
        path: its file, made where there is none. One that is damaged is put aside (`.damaged`) and begun anew.
        width: numbers of an embedding.

    Raises:
        ValueError: the file is of embeddings of another width.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, width: int) -> None:
        self.path, self.width = path, width
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # no permission, no space, locked: nothing is damaged
                raise OSError(f"{path}: cannot be opened ({error})") from error
            path.replace(path.with_name(f"{path.name}.damaged"))
            self._connection = self._open()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)
        try:
            # A row's first column is its key; checks are those of zlib.
            connection.execute(
                "CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, vector BLOB NOT NULL, checksum INTEGER "
                "NOT NULL) WITHOUT ROWID"
            )
            row = connection.execute("SELECT length(vector) FROM embeddings LIMIT 1").fetchone()
        except BaseException:
            connection.close()
            raise
        if row is not None and row[0] != 4 * self.width:
            connection.close()
            raise ValueError(f"{self.path}: must hold embeddings of width {self.width}, got {row[0] // 4}")
        return connection

    def __len__(self) -> int:
        """Embeddings kept."""
        return int(self._connection.execute("SELECT count(*) FROM embeddings").fetchone()[0])

    def get(self, keys: Sequence[bytes]) -> dict[bytes, npt.NDArray[np.float32]]:
        """Those embeddings, (width,) float32 each, that are there and undamaged."""
        found = {}
        for first in range(0, len(keys), _KEYS_AT_ONCE):
            some = keys[first : first + _KEYS_AT_ONCE]
            query = f"SELECT key, vector, checksum FROM embeddings WHERE key IN ({','.join('?' * len(some))})"
            for key, vector, checksum in self._run(query, some):
                if len(vector) == 4 * self.width and zlib.crc32(vector) == checksum:
                    found[key] = np.frombuffer(vector, "<f4")
        return found

    def put(self, keys: Sequence[bytes], embeddings: npt.NDArray[np.float32]) -> None:
        """Keep a batch, (len(keys), width) of finite numbers: all of it, or, where this raises, nothing.

        Raises:
            ValueError: another shape, or NaN or infinity among the numbers.
            OSError: the disk is full, or the file cannot be written.
        """
        if embeddings.shape != (len(keys), self.width):
            raise ValueError(f"put: embeddings must be {(len(keys), self.width)}, got {embeddings.shape}")
        if not np.isfinite(embeddings).all():
            raise ValueError("put: embeddings must be finite, got NaN or infinity")
        vectors = [row.tobytes() for row in np.ascontiguousarray(embeddings, "<f4")]
        rows = [(key, vector, zlib.crc32(vector)) for key, vector in zip(keys, vectors, strict=True)]
        self._run("BEGIN IMMEDIATE")
        try:
            with closing(self._connection.cursor()) as cursor:
                cursor.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?, ?)", rows)
            self._run("COMMIT")
        except BaseException as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise OSError(f"{self.path}: cannot be written ({error})") from error
            raise

    def _run(self, statement: str, parameters: Iterable[bytes] = ()) -> list[tuple[bytes, bytes, int]]:
        try:
            return self._connection.execute(statement, tuple(parameters)).fetchall()
        except sqlite3.Error as error:
            raise OSError(f"{self.path}: cannot be used ({error})") from error

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def __enter__(self) -> EmbeddingStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
