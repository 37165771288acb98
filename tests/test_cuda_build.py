"""The CUDA kernels without a GPU: their tile code on the host, lane by lane, and what nvcc made of them."""

import importlib.util
import os
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vlmo_fast import build, extensions
from vlmo_fast.ops import reference

ROOT = Path(__file__).resolve().parents[1]
NO_DIAGONAL = -(2**31)


# The tile code on the host


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX", "g++")
    target = tmp_path_factory.mktemp("emulation") / "emulation"
    command = [compiler, "-std=c++20", "-O2", "-pthread", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc' / 'cuda'}"]
    try:
        subprocess.run([*command, str(ROOT / "tests" / "cuda_emulation.cpp"), "-o", str(target)], check=True)
    except FileNotFoundError:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{compiler} is not on PATH")
    return target


def joined(top: np.ndarray, total: np.ndarray) -> torch.Tensor:
    """Log-sum-exp, in nats, of the parts of all tiles."""
    parts = torch.from_numpy(top).double() + torch.from_numpy(total).double().log2()
    return torch.logsumexp(parts.masked_fill(torch.from_numpy(total) == 0, -torch.inf) * np.log(2), 0)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("rows", "columns", "depth", "scale", "excluded"),
    [
        (1, 1, 8, 14.3, "diagonal"),  # nothing left
        (130, 260, 40, 14.3, "none"),  # ragged in all three; one exponential
        (130, 130, 72, 100.0, "diagonal"),  # logits from -100 to 100: two exponentials
        (200, 129, 64, 14.3, "ids"),
        (129, 130, 16, 3000.0, "ids"),  # any fixed shift under- or overflows
    ],
)
def test_tiles_on_the_host(
    arch: int, rows: int, columns: int, depth: int, scale: float, excluded: str, emulation: Path, tmp_path: Path
) -> None:
    """Shared memory, ldmatrix, fragments, reductions over lanes and warps, exclusion and edges: all but the copies."""
    image, text = (torch.nn.functional.normalize(torch.randn(n, depth), dim=-1) for n in (rows, columns))
    if scale > 50:
        image[::3] = image[0]
        text[1::2] = -image[0]
    image, text = image.bfloat16().float(), text.bfloat16().float()
    ids = (torch.arange(rows) % 5, torch.arange(columns) % 7) if excluded == "ids" else (None, None)
    diagonal = 0 if excluded == "diagonal" else None
    exact = [x.double() for x in (image, text, torch.tensor(scale))]
    row_lse, column_lse = reference.contrastive_lse(*exact, *ids, diagonal)
    weights = torch.rand(rows), torch.rand(columns)
    finite = [x.masked_fill(x == -torch.inf, 0.0) for x in (row_lse, column_lse)]
    data = [
        struct.pack("<6i", arch, rows, columns, depth, NO_DIAGONAL if diagonal is None else 0, ids[0] is not None),
        struct.pack("<f", scale),
    ]
    tensors = [image, text, finite[0].float(), weights[0], finite[1].float(), weights[1]]
    data += [x.contiguous().numpy().tobytes() for x in [*tensors, *(i for i in ids if i is not None)]]
    (tmp_path / "in").write_bytes(b"".join(data))
    subprocess.run([str(emulation), str(tmp_path / "in"), str(tmp_path / "out")], check=True)
    output = np.fromfile(tmp_path / "out", dtype=np.float32)
    of_rows, of_columns = -(-columns // 128) * rows, -(-rows // 128) * columns
    parts = np.split(output, np.cumsum([of_rows, of_rows, of_columns, of_columns]))
    band = 4 * scale * 2**-23 + 1e-6  # of a float32 logit
    for wanted, top, total in ((row_lse, *parts[:2]), (column_lse, *parts[2:4])):
        ours = joined(top.reshape(-1, len(wanted)), total.reshape(-1, len(wanted)))
        torch.testing.assert_close(ours, wanted, rtol=1e-7, atol=band)
    logits = reference.similarities(*exact)
    positive = reference.positives_of(logits, *ids, diagonal)
    gradient = weights[0][:, None] * (logits - finite[0][:, None]).exp() + weights[1] * (logits - finite[1]).exp()
    gradient = gradient if positive is None else gradient.masked_fill(positive, 0.0)
    ours = torch.from_numpy(parts[4]).view(rows, columns).double()
    torch.testing.assert_close(ours, gradient, rtol=4 * band, atol=4 * band * 1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tiles_pass_on_what_is_not_finite(value: float, emulation: Path, tmp_path: Path) -> None:
    """Row 3 of the images: its sum and those of every column become NaN; other rows stay finite."""
    image, text = torch.randn(20, 8), torch.randn(30, 8)
    image[3, 2] = value
    data = [struct.pack("<6i", 80, 20, 30, 8, NO_DIAGONAL, 0), struct.pack("<f", 2.0)]
    data += [x.numpy().tobytes() for x in (image, text, *(torch.ones(n) for n in (20, 20, 30, 30)))]
    (tmp_path / "in").write_bytes(b"".join(data))
    subprocess.run([str(emulation), str(tmp_path / "in"), str(tmp_path / "out")], check=True)
    output = np.fromfile(tmp_path / "out", dtype=np.float32)
    row_total, column_total = output[20:40], output[70:100]
    assert np.isnan(row_total[3])
    assert np.isfinite(np.delete(row_total, 3)).all()
    if np.isnan(value):
        assert np.isnan(column_total).all()
    else:  # minus infinity, where the text's number is negative, adds nothing to a column
        assert (np.isnan(column_total) == (text[:, 2] > 0).numpy()).all()


# What nvcc made of them


@pytest.fixture(scope="module")
def cuda_extension() -> Path:
    """The CUDA library, built first where it is not up to date: about a minute and a half on one core."""
    missing = [name for name, there in (("nvcc", build.find_nvcc()), ("nvidia-cutlass", has_cutlass())) if not there]
    if missing and not extensions.is_built("cuda"):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"not here: {', '.join(missing)}")
    build.build("cuda", jobs=1)
    return extensions.library("cuda")


def has_cutlass() -> bool:
    return "CUTLASS_PATH" in os.environ or importlib.util.find_spec("cutlass_library") is not None


def cuobjdump(*arguments: str) -> str:
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), *arguments], check=True, capture_output=True, text=True).stdout


@pytest.mark.timeout(600)
def test_registers_and_spills(cuda_extension: Path) -> None:
    """No kernel has a stack or local memory, and each keeps the occupancy that it was written for."""
    usage = cuobjdump("--dump-resource-usage", str(cuda_extension))
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    kernels = {name: [int(x) for x in numbers] for name, *numbers in found}
    tiles = [name for name in kernels if "_similarity_" in name and ("sums_sm" in name or "gradient_sm" in name)]
    assert len(tiles) == 8  # sums and gradient, bfloat16 and float16, two instructions
    for name, (registers, stack, _, local) in kernels.items():
        assert (stack, local) == (0, 0), name
        if "sm80" in name:
            assert registers <= 128, name  # two blocks of 256 threads on a multiprocessor
        if "sm90" in name:
            assert registers == 168, name  # 384 threads: what 40 and 232 after their exchange add up to


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("arch", "instruction", "copy"), [("sm_80", "HMMA.16816.F32", "LDGSTS"), ("sm_90a", "HGMMA.64x128x16", "UTMALDG")]
)
def test_instructions(arch: str, instruction: str, copy: str, cuda_extension: Path) -> None:
    """Tensor cores in a loop whose operands come by asynchronous copies; nothing goes through local memory."""
    sass = cuobjdump("--dump-sass", "--gpu-architecture", arch, str(cuda_extension))
    functions = re.split(r"\n\s*Function : ", sass)[1:]
    tiles = [
        text
        for text in functions
        if "_similarity_" in text.partition("\n")[0] and f"_{arch[:5].replace('_', '')}_" in text
    ]
    assert len(tiles) == 4
    for text in tiles:
        name = text.partition("\n")[0]
        products = [match.start() for match in re.finditer(re.escape(instruction), text)]
        assert len(products) >= 4, name
        assert copy in text, name
        assert not re.search(r"\b(LDL|STL)\b", text), name
        assert loops_around(text, products), f"{name}: no loop around {instruction}"


def loops_around(sass: str, places: list[int]) -> bool:
    """Whether some branch jumps back over an instruction at one of the places."""
    address = {match.start(): int(match[1], 16) for match in re.finditer(r"/\*([0-9a-f]{4,})\*/ ", sass)}
    lines = sorted(address)
    own = [max((line for line in lines if line <= place), default=0) for place in places]
    for match in re.finditer(r"\bBRA\S*\s[^;\n]*?(0x[0-9a-f]+)", sass):
        here = address[max(line for line in lines if line <= match.start())]
        if any(int(match[1], 16) <= address[line] <= here for line in own if line):
            return True
    return False


@pytest.mark.timeout(600)
def test_library_waits_for_cuda_alone(cuda_extension: Path) -> None:
    """Libtorch and the C library: no Python, no CUDA runtime, so one file serves all; the CPU library needs neither.

    Where torch has CUDA, the current stream comes from libtorch_cuda.so, which is found through libtorch.so alone.
    """
    needed = subprocess.run(["readelf", "-d", str(cuda_extension)], check=True, capture_output=True, text=True).stdout
    libraries = set(re.findall(r"Shared library: \[lib(\w+)", needed))
    assert libraries <= {"torch", "torch_cpu", "c10", "stdc", "m", "gcc_s", "c", "pthread", "dl", "rt"}
    assert "torch" in libraries
    log = extensions.FOLDER / "build-cuda" / "log.txt"
    assert not log.is_file() or "C7510" not in log.read_text()


def test_missing_headers_name_their_package(
    monkeypatch: pytest.MonkeyPatch, require_tool: Callable[[str], str]
) -> None:
    require_tool("nvcc")
    monkeypatch.setenv("CUTLASS_PATH", "nowhere")
    with pytest.raises(build.BuildError, match=r"CUTLASS's headers are missing.*pip install --no-deps nvidia-cutlass"):
        build.build("cuda", force=True)
