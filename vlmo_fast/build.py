"""Compiles the libraries of `csrc/` with ninja, against the torch that is installed.

Needs g++ (or what CXX names) and, for CUDA, nvcc; no GPU. Nothing else of vlmo_fast compiles anything.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from vlmo_fast import extensions

__all__ = ["BuildError", "build", "find_nvcc"]

STABLE_ABI = ("-DTORCH_TARGET_VERSION=0x020a000000000000",)  # torch 2.10: the library runs with all later ones


class BuildError(RuntimeError):
    """A tool is missing or a compiler failed; the message says which and what to do."""


class _Object(NamedTuple):
    """One compilation: a source file, the object's name, and flags beyond those that all share."""

    source: Path
    name: str
    flags: tuple[str, ...]
    rule: str = "cxx"


def build(
    name: str,
    *,
    jobs: int | None = None,
    force: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Compile one library.

    Args:
        name: "cpu" or "cuda".
        jobs: compilations at a time; None means MAX_JOBS, or ninja's own choice.
        force: build even what is up to date.
        report: called with the number of files that are compiled, and of all, from 0 on.

    Returns:
        The library.

    Raises:
        BuildError: a tool is missing, or a compiler failed.
    """
    if find_spec("torch") is None:
        raise BuildError("torch is missing; extensions are built against the torch that is installed")
    target = extensions.library(name)
    if target.is_file() and not force:
        return target
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if ninja is None:
        raise BuildError("ninja is missing; to install it: " + f"{sys.executable} -m pip install ninja")
    folder = extensions.FOLDER / f"build-{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{extensions.FOLDER} cannot be written ({error.strerror})") from error
    rules = _cpu() if name == "cpu" else _cuda()
    unfinished = folder / target.name
    (folder / "build.ninja").write_text(_ninja_file(rules, unfinished))
    jobs = jobs or int(os.environ.get("MAX_JOBS", "0"))
    command = [ninja, "-C", str(folder), *(["-j", str(jobs)] if jobs else []), unfinished.name]
    if force:
        subprocess.run([ninja, "-C", str(folder), "-t", "clean"], capture_output=True, check=False)
    report(0, len(rules.objects) + 1)
    log = ""
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log += line
            progress = re.match(r"\[(\d+)/(\d+)\]", line)
            if progress:
                report(int(progress[1]), int(progress[2]))
    (folder / "log.txt").write_text(log)
    if process.returncode:
        raise BuildError(f"the {name} extension did not compile:\n{log[-8000:]}")
    if "C7510" in log:
        raise BuildError(f"ptxas serialised wgmma (C7510), which costs most of its speed:\n{log[-6000:]}")
    for old in extensions.FOLDER.glob(f"{extensions.prefix(name)}*.so"):
        old.unlink()
    unfinished.replace(target)  # in one step: a process that loads it never sees half of it
    return target


class _Rules(NamedTuple):
    cxx: str  # commands, with $flags, $in and $out
    nvcc: str | None
    link: str
    objects: list[_Object]


def _cpu() -> _Rules:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise BuildError(f"{compiler} is missing; `vlmo-fast doctor` says how to install a C++ compiler")
    folder = extensions.PACKAGE / "csrc" / "cpu"
    sets: list[tuple[str, str, tuple[str, ...]]] = [("baseline", "kBaseline", ())]
    if platform.machine().lower() in ("x86_64", "amd64"):
        avx512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512")
        sets += [("avx2", "kAvx2", ("-mavx2", "-mfma")), ("avx512", "kAvx512", avx512)]
    objects = [
        _Object(folder / f"{name}.cpp", f"{name}.o", STABLE_ABI) for name in ("attention", "capability", "similarity")
    ]
    objects += [
        _Object(folder / f"{kind}_kernels.cpp", f"{kind}-{name}.o", (f"-DVLMO_FAST_KERNELS={table}", *flags))
        for kind in ("attention", "similarity")
        for name, table, flags in sets
    ]
    flags = "-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -fopenmp-simd -Wall -Wextra"
    torch = _torch()
    return _Rules(
        cxx=f"{compiler} {flags} -isystem {_quote(torch / 'include')} $flags -MD -MF $out.d -c $in -o $out",
        nvcc=None,
        link=f"{compiler} -shared $in -L{_quote(torch / 'lib')} -ltorch -ltorch_cpu -lc10 -o $out",
        objects=objects,
    )


def _cuda() -> _Rules:
    nvcc, torch, cutlass = _nvcc(), _torch(), _cutlass()
    folder = extensions.PACKAGE / "csrc" / "cuda"
    portable = (
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
    )  # and PTX for the rest
    hopper = ("-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr", f"-I{_quote(cutlass)}")
    objects = [
        _Object(folder / "similarity.cu", "similarity.o", (*portable, *STABLE_ABI, "-DUSE_CUDA"), "nvcc"),
        _Object(folder / "similarity_sm80.cu", "similarity_sm80.o", portable, "nvcc"),
        _Object(folder / "similarity_sm90.cu", "similarity_sm90.o", hopper, "nvcc"),
    ]
    # -DNDEBUG: with its assertions, CUTLASS's loop makes ptxas serialise wgmma (C7510). -v: registers and spills.
    flags = "-std=c++20 -O3 -DNDEBUG -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v"
    # libtorch.so has no symbol of its own and would be left out, but a torch with CUDA brings libtorch_cuda.so by it.
    # In one -Xlinker: nvcc moves libraries behind all of those.
    libraries = "-Xlinker --push-state,--no-as-needed,-ltorch,--pop-state -ltorch_cpu -lc10"
    return _Rules(
        cxx="false",
        nvcc=f"{_quote(nvcc)} {flags} -isystem {_quote(torch / 'include')} $flags -MD -MF $out.d -c $in -o $out",
        link=f"{_quote(nvcc)} -shared -cudart static $in -L{_quote(torch / 'lib')} {libraries} -o $out",
        objects=objects,
    )


def _cutlass() -> Path:
    """CUTLASS's headers: what CUTLASS_PATH names, or those in the package nvidia-cutlass."""
    given = os.environ.get("CUTLASS_PATH")
    spec = None if given else find_spec("cutlass_library")
    if spec is not None and spec.origin is not None:
        given = str(Path(spec.origin).parent / "source")
    if given is None or not Path(given, "include", "cutlass", "cutlass.h").is_file():
        raise BuildError(
            "CUTLASS's headers are missing; to install them (and nothing else): "
            f"{sys.executable} -m pip install --no-deps nvidia-cutlass"
        )
    return Path(given) / "include"


def _nvcc() -> str:
    path = find_nvcc()
    if path is None:
        raise BuildError("nvcc is missing; `vlmo-fast doctor` says how to install the CUDA toolkit")
    return path


def find_nvcc() -> str | None:
    """CUDA's compiler, on PATH or where CUDA_HOME says."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


def _torch() -> Path:
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _quote(path: Path | str) -> str:
    return '"' + str(path) + '"'


def _escape(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja_file(rules: _Rules, target: Path) -> str:
    lines = [f"rule cxx\n  command = {rules.cxx}\n  depfile = $out.d\n  deps = gcc"]
    if rules.nvcc:
        lines.append(f"rule nvcc\n  command = {rules.nvcc}\n  depfile = $out.d\n  deps = gcc")
    lines.append(f"rule link\n  command = {rules.link}")
    lines += [
        f"build {item.name}: {item.rule} {_escape(item.source)}\n  flags = {' '.join(item.flags)}"
        for item in rules.objects
    ]
    lines.append(f"build {_escape(target.name)}: link {' '.join(item.name for item in rules.objects)}")
    return "\n".join(lines) + "\n"
