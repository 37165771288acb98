"""The compiled libraries of `csrc/`: where they lie, whether they are built, how they are loaded.

A library's name holds the release of torch that it was built against and a digest of its sources and of the module that
compiles them. So one that was built from other sources, with other flags or for another torch counts as not built, and
libraries for several releases of torch lie side by side.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

__all__ = ["NAMES", "build_command", "cpu_capability", "is_built", "library", "load", "sources"]

NAMES = ("cpu", "cuda")
PACKAGE = Path(__file__).resolve().parent
FOLDER = PACKAGE / "_lib"


def sources(name: str) -> list[Path]:
    """The files of `csrc/` that make up the library, headers included."""
    return sorted(path for path in (PACKAGE / "csrc" / name).rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu"))


@cache
def library(name: str) -> Path:
    """Where `vlmo-fast build` puts the library, whether or not it is there."""
    digest = hashlib.sha256()
    for path in (*sources(name), PACKAGE / "build.py"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return FOLDER / f"{prefix(name)}{digest.hexdigest()[:12]}.so"


def prefix(name: str) -> str:
    """How the file names of the library begin that fit the torch that is installed, whatever their sources."""
    # torch keeps its ABI within a minor release; a CPU and a CUDA build of one (2.13.0+cpu, +cu130) share theirs.
    release = ".".join(metadata.version("torch").split(".")[:2])
    return f"vlmo_fast_{name}-torch{release}-"


def is_built(name: str) -> bool:
    """Whether the library is there."""
    return library(name).is_file()


def build_command(name: str) -> str:
    """The command that builds the library."""
    return f"{sys.executable} -m vlmo_fast build {name}"


@cache
def load(name: str) -> None:
    """Load the library, which registers its kernels.

    Raises:
        ImportError: it is not built, or does not fit this torch; names the build command.
    """
    import torch

    if not is_built(name):
        raise ImportError(f"vlmo_fast: the {name} extension is not built; to build it: {build_command(name)}")
    try:
        torch.ops.load_library(library(name))
    except OSError as error:
        raise ImportError(
            f"vlmo_fast: the {name} extension does not load ({error}); to build it anew: {build_command(name)} --force"
        ) from error
    if name == "cpu":
        _hold_back()


def cpu_capability() -> str:
    """The instruction set that the CPU library's kernels use: baseline, avx2 or avx512.

    Raises:
        ImportError: as in `load`.
    """
    load("cpu")
    of_library = ctypes.CDLL(str(library("cpu"))).vlmo_fast_cpu_capability
    of_library.restype = ctypes.c_char_p
    return str(of_library().decode())


def _hold_back() -> None:
    """Have the CPU library use no better instruction set than torch does, which ATEN_CPU_CAPABILITY may hold back.

    The library cannot ask: torch's stable ABI does not tell.
    """
    import torch

    use = ctypes.CDLL(str(library("cpu"))).vlmo_fast_cpu_use
    use.restype = ctypes.c_bool
    better = {"AVX512": 0, "AVX2": 1}.get(torch.backends.cpu.get_cpu_capability(), 2)
    any(use(name) for name in (b"avx512", b"avx2", b"baseline")[better:])
