"""What every test shares: seeds, threads, the reason why a GPU test is skipped, and tools that CI must have."""

import fcntl
import getpass
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# NumPy's own thread pool and torch's fight over the cores; the oracle's matrices are small. Before NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch
from cpu_library import CpuLibrary

# Without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors. Triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# torch.compile does not tell apart in its cache what it compiled while ATEN_CPU_CAPABILITY held the processor back;
# without the variable those kernels abort (torch 2.13). So what is held back has a cache of its own.
if "ATEN_CPU_CAPABILITY" in os.environ:
    held_back = f"torchinductor_{getpass.getuser()}_{os.environ['ATEN_CPU_CAPABILITY']}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), held_back)))

# Small tensors get slower, not faster, on many threads, so there are four, or what OMP_NUM_THREADS says. Processes that
# share the tests (pytest -n) share the cores, too, as do those that tests start.
PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
torch.set_num_threads(min(int(os.environ.get("OMP_NUM_THREADS", "4")), max(1, CORES // PROCESSES)))
if PROCESSES > 1:
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `pytest -n auto`, which `make test` says: a process for each core, at 1 to 2 GB each; one where a GPU is."""
    return 1 if torch.cuda.is_available() else min(8, CORES)


def pytest_report_header() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {device}, CPU {capability}, {torch.get_num_threads()} threads"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=f"needs a CUDA device; torch {torch.__version__} finds none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers in each test, whichever tests ran before."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def nan_filled_empty() -> Iterator[None]:
    """`torch.empty` and its like hold NaN, so that an output which a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["oneDNN", "MKL"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has each library in turn multiply on a CPU, whichever is the faster one here."""
    monkeypatch.setattr("vlmo_fast.ops.dispatch._mkl_is_faster", lambda: request.param == "MKL")
    return str(request.param)


@pytest.fixture(scope="session")
def cpu_extension() -> Path:
    """The CPU library of `csrc/`, built first where it is not up to date; without g++ as in `require_tool`."""
    from vlmo_fast import build, extensions

    if not extensions.is_built("cpu"):
        _require("g++")
        extensions.FOLDER.mkdir(exist_ok=True)
        with (extensions.FOLDER / "tests.lock").open("w") as lock:  # of the processes that share the tests one builds
            fcntl.flock(lock, fcntl.LOCK_EX)
            build.build("cpu")
    return extensions.library("cpu")


@pytest.fixture
def compiled(cpu_extension: Path) -> Iterator[CpuLibrary]:
    """The CPU library, loaded; afterwards it has its best instruction set again."""
    from vlmo_fast import extensions

    extensions.load("cpu")
    library = CpuLibrary(cpu_extension)
    best = library.capability
    yield library
    assert library.use(best)


@pytest.fixture
def require_tool() -> Callable[[str], str]:
    """`require_tool("nvcc")` gives the tool's path; without the tool the test is skipped, but fails under CI."""

    return _require


def _require(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        message = f"{name} is not on PATH"
        if os.environ.get("CI"):
            pytest.fail(f"{message}; CI must have it")
        pytest.skip(message)
    return path
