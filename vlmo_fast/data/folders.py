"""One way to walk through a folder of pictures: all that Pillow reads, and the names of what is left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

__all__ = ["Pictures", "find_pictures"]


class Pictures(NamedTuple):
    """What a folder holds.

    Attributes:
        paths: of the pictures, in the order of their names, folder by folder.
        left_out: (path, reason) of everything else.
    """

    paths: list[Path]
    left_out: list[tuple[Path, str]]


def find_pictures(folder: str | os.PathLike[str]) -> Pictures:
    """The pictures of a folder, at any depth.

    A file counts whose suffix is one that Pillow knows as a picture's (whether it can be decoded is seen when it is
    read), or whose content is one, whatever its name. Links are followed; a folder is walked through once, however many
    links lead to it.

    Args:
        folder: where to look.

    Returns:
        `Pictures`; the same for the same files on every machine.

    Raises:
        NotADirectoryError: it is no folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: must be a folder")
    Image.init()
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = Pictures([], [])
    for path, reason in _files(folder, {_identity(folder)}):
        reason = reason or (None if path.suffix.lower() in suffixes - _DOCUMENTS else _unless_picture(path))
        if reason is None:
            found.paths.append(path)
        else:
            found.left_out.append((path, reason))
    return found


# Pillow knows these suffixes, but cannot read what they hold without help, or they seldom are pictures.
_DOCUMENTS = {".pdf", ".ps", ".eps", ".h5", ".hdf", ".mpg", ".mpeg", ".grib", ".bufr", ".fits", ".fit", ".wmf", ".emf"}


def _files(folder: Path, seen: set[tuple[int, int]]) -> Iterator[tuple[Path, str | None]]:
    """The files below a folder, and why one is left out."""
    try:
        paths = sorted(folder.iterdir(), key=os.fsencode)
    except OSError as error:
        yield folder, f"cannot be opened ({error.strerror})"
        return
    for path in paths:
        try:
            if path.is_dir():
                identity = _identity(path)
                if identity in seen:
                    yield path, "leads to a folder that was walked through before"
                    continue
                seen.add(identity)
                yield from _files(path, seen)
            elif path.is_file():
                yield path, None
            else:
                yield path, "a link to nothing" if path.is_symlink() else "neither a file nor a folder"
        except OSError as error:  # links in a circle, no permission
            yield path, f"cannot be opened ({error.strerror})"


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _unless_picture(path: Path) -> str | None:
    """Why a file is no picture; None if its content is one."""
    try:
        with Image.open(path):
            return None
    except UnidentifiedImageError:
        return "not a picture" if path.stat().st_size else "empty"
    except OSError as error:
        return f"cannot be opened ({error.strerror or error})"
    except Exception:  # a picture's header, damaged: reading it will say how
        return None
