"""What this machine has, which implementation each op will use and why, and how to get the rest.

Only torch is imported; of all other packages the metadata is read.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from vlmo_fast import extensions
from vlmo_fast.requirements import PACKAGES, Package, install_command

__all__ = ["examine", "render"]


class _Tool(NamedTuple):
    name: str
    linux: str  # how to get it
    mac: str
    purpose: str


_TOOLS = (
    _Tool("g++", "sudo apt-get install g++", "xcode-select --install", "building the CPU extension"),
    _Tool(
        "nvcc",
        "sudo apt-get install nvidia-cuda-toolkit",
        "(CUDA does not run on macOS)",
        "building the CUDA extension",
    ),
)


_EXTENSIONS = {"cpu": "attention and the contrastive loss on a CPU", "cuda": "the contrastive loss on an NVIDIA GPU"}


def examine() -> dict[str, Any]:
    """Everything that `doctor` prints, as plain data."""
    torch_report = _examine_torch()
    return {
        "vlmo_fast": {"version": _version("vlmo_fast"), "path": str(Path(__file__).resolve().parent)},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": {"system": platform.platform(), "machine": platform.machine()},
        "torch": torch_report,
        "packages": [_examine_package(package) for package in PACKAGES],
        "tools": [_examine_tool(tool) for tool in _TOOLS],
        "extensions": [_examine_extension(name) for name in extensions.NAMES] if torch_report else [],
        "implementations": _implementations() if torch_report else [],
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _examine_package(package: Package) -> dict[str, str | None]:
    there = find_spec(package.module) is not None
    version = (_version(package.distribution) or "unknown version") if there else None
    applies = package.distribution not in ("triton", "xformers") or sys.platform == "linux"
    remedy = install_command(package.extra) if applies else "(Linux only)"
    return {
        "name": package.distribution,
        "version": version,
        "purpose": package.purpose,
        "install": None if there else remedy,
    }


def _examine_tool(tool: _Tool) -> dict[str, str | None]:
    path = shutil.which(tool.name)
    version = None
    if path:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        release = [line for line in lines if "release" in line]  # nvcc's first line is its name
        version = (release or lines or ["unknown version"])[0]
    remedy = tool.mac if sys.platform == "darwin" else tool.linux
    return {
        "name": tool.name,
        "path": path,
        "version": version,
        "purpose": tool.purpose,
        "install": None if path else remedy,
    }


def _examine_extension(name: str) -> dict[str, str | None]:
    built = extensions.is_built(name)
    capability = None
    if built and name == "cpu":
        try:
            capability = extensions.cpu_capability()
        except ImportError:  # whoever needs it gets the message
            capability = "does not load"
    return {
        "name": f"{name} extension",
        "path": str(extensions.library(name)) if built else None,
        "version": "built" if built else None,
        "purpose": _EXTENSIONS[name],
        "install": None if built else extensions.build_command(name),
        "capability": capability,
    }


def _examine_torch() -> dict[str, Any] | None:
    if find_spec("torch") is None:
        return None
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU", "capability": None, "memory_gib": None})
    built_for = torch.version.cuda and f"CUDA {torch.version.cuda}"
    built_for = built_for or (torch.version.hip and f"ROCm {torch.version.hip}") or "CPU"
    return {
        "version": torch.__version__,
        "build": built_for,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "devices": devices,
        "advice": _advice(torch.version.cuda is not None, bool(devices)),
    }


def _advice(cuda_build: bool, has_device: bool) -> str | None:
    if has_device or shutil.which("nvidia-smi") is None:
        return None
    if cuda_build:
        return "an NVIDIA driver is installed, but torch finds no device: compare `nvidia-smi` with the CUDA of torch"
    reinstall = f"{sys.executable} -m pip install --force-reinstall torch"
    return f"an NVIDIA driver is installed, but torch is a CPU build; for a CUDA build: {reinstall}"


def _implementations() -> list[dict[str, Any]]:
    from vlmo_fast import ops

    return [choice._asdict() for choice in ops.explain()]


def render(report: dict[str, Any]) -> str:
    """The report of `examine` as text."""
    torch = report["torch"]
    rows = [
        ("vlmo_fast", f"{report['vlmo_fast']['version'] or 'not installed'} ({report['vlmo_fast']['path']})"),
        ("python", f"{report['python']['version']} ({report['python']['executable']})"),
        ("platform", report["platform"]["system"]),
    ]
    if torch:
        threads = torch["num_threads"]
        rows += [
            ("torch", f"{torch['version']}, built for {torch['build']}"),
            ("cpu", f"{torch['cpu_capability']}, {threads} thread{'s' if threads != 1 else ''}"),
        ]
        rows += [(part["name"], part["capability"]) for part in report["extensions"] if part["capability"]]
        rows += [(device["device"], _describe(device)) for device in torch["devices"]]
        rows += [] if torch["devices"] else [("gpu", "none that torch can use")]
    sections = ["\n".join(_table(rows))]

    parts = report["packages"] + report["tools"] + report["extensions"]
    there = [(part["name"], part["version"] or "-", part["purpose"]) for part in parts]
    sections.append("\n".join(["Parts", *_table([("name", "version", "for"), *there], indent="  ")]))

    if report["implementations"]:
        header = ("op", "device", "dtype", "implementation", "reason")
        body = [tuple(row[field] for field in header) for row in report["implementations"] if row["rank"] == 1]
        sections.append(
            "\n".join(["What each op runs (every candidate: --json)", *_table([header, *body], indent="  ")])
        )

    commands: dict[str, list[str]] = {}
    for part in parts:
        if part["install"]:
            commands.setdefault(part["install"], []).append(part["name"])
    missing = [f"  {', '.join(names)}:\n    {command}" for command, names in commands.items()]
    if torch and torch["advice"]:
        missing.append(f"  GPU: {torch['advice']}")
    sections.append("\n".join(["Missing", *missing]) if missing else "Nothing is missing.")
    return "\n\n".join(sections)


def _describe(device: dict[str, Any]) -> str:
    capability = device["capability"] and f"compute capability {device['capability']}"
    memory = device["memory_gib"] and f"{device['memory_gib']} GiB"
    return ", ".join(part for part in (device["name"], capability, memory) if part)


def _table(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [indent + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
