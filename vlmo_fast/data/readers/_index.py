"""Where things stand in a large file: found once, kept beside the file, found anew when the file has changed."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]

_logger = logging.getLogger(__name__)


def kept_index(
    path: Path, build: Callable[[Path], Arrays], *, settings: Mapping[str, object], folder: Path | None
) -> Arrays:
    """The index of a file: read if one is kept that fits, else built and kept.

    Args:
        path: the file; its size and time of change are part of the index.
        build: makes the arrays.
        settings: what else the arrays depend on, their format included; as JSON.
        folder: where indices are kept; None is the folder of the file. Where it cannot be written the index is built by
            every process anew, and the log says so.
    """
    status = path.stat()
    facts = {"size": status.st_size, "changed": status.st_mtime_ns, **settings}
    # Files of one name in different folders may share a cache.
    prefix = "" if folder is None else f"{uuid.uuid5(uuid.NAMESPACE_URL, str(path.absolute()))}."
    index = (folder or path.parent) / f"{prefix}{path.name}.index.npz"
    try:
        with np.load(index, allow_pickle=False) as kept:
            if json.loads(str(kept["facts"])) == json.loads(json.dumps(facts)):
                return {name: kept[name] for name in kept.files if name != "facts"}
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as error:  # a zip file that is damaged raises errors of many types
        _logger.warning("%s: cannot be read (%s); built anew", index, error)
    start = time.monotonic()
    arrays = build(path)
    temporary = index.with_name(f".{index.name}.{uuid.uuid4().hex}.part")
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                stored: dict[str, Any] = {"facts": np.array(json.dumps(facts)), **arrays}
                np.savez(file, **stored)
            temporary.replace(index)  # whole or not at all; the last of several ranks wins
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        _logger.warning("%s: cannot be written (%s), so that each process reads all of %s", index, error.strerror, path)
    _logger.info("%s: indexed in %.1f s", path, time.monotonic() - start)
    return arrays


def read_range(path: Path, start: int, end: int) -> bytes:
    """Bytes of a file.

    The file is opened anew for each: nothing to share among processes, and little beside decoding an image.

    Raises:
        OSError: it cannot be read, or ends before.
    """
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        content = bytearray()
        while len(content) < end - start:  # a read may give less than it was asked for
            piece = file.read(end - start - len(content))
            if not piece:
                raise OSError(f"{path}: ends before byte {end:,}")
            content += piece
    return bytes(content)
