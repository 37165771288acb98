"""The compiled extensions: how they are built, found and refused, and their kernels on every instruction set."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cpu_library import CAPABILITIES, CpuLibrary
from torch import Tensor

from vlmo_fast import build, cli, extensions, ops
from vlmo_fast.ops.pairs.blocks import CompiledEpilogue, TorchEpilogue
from vlmo_fast.ops.types import PairMask

ROOT = Path(__file__).resolve().parents[1]


def finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -torch.inf, 0.0).float()


def on_both(block: Tensor, mask: PairMask, start: int) -> list[tuple[Tensor, ...]]:
    """(row lse, column maxima, column sums, G) of the torch epilogue and of the compiled one, over two blocks."""
    rows, columns = block.shape
    half = rows // 2
    results = []
    for epilogue in (TorchEpilogue(), CompiledEpilogue("cpu")):
        copy = block.clone()
        row_lse = torch.empty(rows, dtype=torch.float64)
        column = torch.full((columns,), -torch.inf), torch.zeros(columns, dtype=torch.float64)
        for part in (slice(0, half), slice(half, rows)):
            epilogue.sums(copy[part], start + part.start, mask, row_lse[part], column)
        column_lse = column[0] + column[1].log()
        out = torch.full_like(block, torch.nan)
        generator = torch.Generator().manual_seed(1)
        row = finite(row_lse), torch.rand(rows, generator=generator)
        other = finite(column_lse), torch.rand(columns, generator=generator)
        epilogue.gradient(block, out, start, mask, row, other)
        results.append((row_lse, column_lse, out))
    return results


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_on_every_instruction_set(capability: str, compiled: CpuLibrary) -> None:
    """Ragged panels and tiles; logits from tiny to 300; each kind of exclusion; a row and a column left out whole."""
    if not compiled.use(capability):
        pytest.skip(f"this CPU has no {capability}")
    assert compiled.capability == capability
    for rows, columns, scale in ((3, 5, 1.0), (130, 513, 20.0), (300, 1100, 100.0)):
        block = torch.randn(rows, columns) * scale
        ids = torch.randint(0, 9, (rows + 10,)), torch.randint(0, 9, (columns,))
        whole = torch.zeros(rows + 10, dtype=torch.int64), torch.zeros(columns, dtype=torch.int64)
        for mask, start in (
            (PairMask(), 0),
            (PairMask(diagonal=-3), 7),
            (PairMask(*ids), 7),
            (PairMask(*whole), 0),
        ):
            wanted, ours = on_both(block, mask, start)
            for a, b in zip(ours, wanted, strict=True):
                # a logit of size s is rounded to s * 2^-24, which moves an exponential by as much; 10 for the sums
                torch.testing.assert_close(a, b, rtol=10 * 2**-24 * max(1.0, 4 * scale), atol=1e-9)


def test_the_best_instruction_set_is_chosen(compiled: CpuLibrary) -> None:
    """The order of preference is the order of torch's own capabilities."""
    name = torch.backends.cpu.get_cpu_capability().lower()
    assert compiled.capability == extensions.cpu_capability()
    assert compiled.capability == {"avx512": "avx512", "avx2": "avx2"}.get(name, "baseline")
    assert not compiled.use("no such set")


@pytest.mark.usefixtures("cpu_extension")
@pytest.mark.parametrize("held_back", ["avx2", "default"])
def test_no_better_instruction_set_than_torchs(held_back: str) -> None:
    """As ATEN_CPU_CAPABILITY has it in a process of its own; the doctor shows both."""
    done = run("--json", command="doctor", ATEN_CPU_CAPABILITY=held_back)
    report = json.loads(done.stdout)
    known = {"AVX2": "avx2", "AVX512": "avx512"}
    assert report["torch"]["cpu_capability"] in ("DEFAULT", held_back.upper())  # DEFAULT: there is no AVX2
    assert report["extensions"][0]["capability"] == known.get(report["torch"]["cpu_capability"], "baseline")
    text = run(command="doctor", ATEN_CPU_CAPABILITY=held_back).stdout
    assert re.search(rf"^cpu extension +{report['extensions'][0]['capability']}$", text, re.MULTILINE)


@pytest.mark.usefixtures("cpu_extension")
def test_logits_far_below_zero() -> None:
    """Whole panels and tiles left out beside logits of -2,000: nothing times exp(2,000) must not become NaN."""
    block = torch.randn(300, 1100) - 2000
    row_ids, column_ids = torch.arange(300) // 150, torch.arange(1100) // 600
    wanted, ours = on_both(block, PairMask(row_ids, column_ids), 0)
    assert not any(tensor.isnan().any() for tensor in ours)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-9)  # a logit of 2,000 is rounded to 1e-4


@pytest.mark.usefixtures("cpu_extension")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_kernels_pass_on_what_is_not_finite(value: float) -> None:
    block = torch.randn(130, 600)
    block[77, 555] = value
    _, (row_lse, column_lse, out) = on_both(block, PairMask(), 0)
    assert row_lse.isnan().nonzero().tolist() == [[77]]
    assert column_lse.isnan().nonzero().tolist() == [[555]]
    assert out[77].isnan().all()
    assert out[:, 555].isnan().all()


@pytest.mark.usefixtures("cpu_extension")
def test_threads_do_not_change_a_bit() -> None:
    image, text = (torch.nn.functional.normalize(torch.randn(1500, 16), dim=-1) for _ in range(2))
    block = (20 * image @ text.t()).contiguous()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(on_both(block, PairMask(diagonal=0), 0)[1])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# The door


@pytest.mark.usefixtures("cpu_extension")
def test_chosen_where_it_is_built() -> None:
    for op in ("contrastive_loss", "contrastive_lse"):
        assert ops.select(op, ops.Problem("cpu", torch.float32)) == "cpu"
        assert ops.select(op, ops.Problem("cpu", torch.bfloat16)) == "cpu"
        assert ops.select(op, ops.Problem("cpu", torch.float64)) == "chunked"
        assert ops.select(op, ops.Problem("mps", torch.float32)) == "chunked"
        with pytest.raises(
            NotImplementedError, match=rf"{op}: backend 'cpu' cannot run here \(.* computes in float32\)"
        ):
            ops.select(op, ops.Problem("cpu", torch.float64), "cpu")


def test_missing_extension_names_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extensions, "library", lambda name: tmp_path / "none.so")
    assert ops.select("contrastive_loss", ops.Problem("cpu", torch.float32)) == "chunked"
    command = r"\S+ -m vlmo_fast build cpu"
    message = rf"^contrastive_loss: backend 'cpu' needs the cpu extension, which is not built; build it with: {command}"
    with pytest.raises(ImportError, match=message):
        ops.contrastive_loss(torch.ones(2, 3), torch.ones(2, 3), torch.tensor(1.0), backend="cpu")
    extensions.load.cache_clear()
    with pytest.raises(ImportError, match=rf"the cpu extension is not built; to build it: {command}"):
        extensions.load("cpu")
    (tmp_path / "none.so").write_text("no library")
    with pytest.raises(
        ImportError, match=rf"the cpu extension does not load .*{command.replace('it', 'it anew')} --force"
    ):
        extensions.load("cpu")
    extensions.load.cache_clear()


@pytest.fixture
def rekeyed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """The file name of the CPU library, looked up anew, for the torch that is installed or for another."""

    def name(torch_version: str | None = None) -> str:
        extensions.library.cache_clear()
        with monkeypatch.context() as patch:
            if torch_version:
                patch.setattr(extensions.metadata, "version", {"torch": torch_version}.__getitem__)
            return extensions.library("cpu").name

    yield name
    extensions.library.cache_clear()


def test_a_library_of_other_sources_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rekeyed: Callable[..., str]
) -> None:
    """A changed byte in `csrc/`, or in what compiles it, gives the library another name."""
    folder = tmp_path / "csrc" / "cpu"
    folder.mkdir(parents=True)
    monkeypatch.setattr(extensions, "PACKAGE", tmp_path)
    names = []
    for source, flags in (("one", "-O3"), ("two", "-O3"), ("one", "-O2"), ("one", "-O3")):
        (folder / "a.cpp").write_text(source)
        (tmp_path / "build.py").write_text(flags)
        names.append(rekeyed())
    assert names[0] == names[3]
    assert len(set(names)) == 3


def test_a_library_for_another_torch_does_not_count(rekeyed: Callable[..., str]) -> None:
    """The release counts, its patches and builds do not."""
    assert re.match(rf"vlmo_fast_cpu-torch{'.'.join(torch.__version__.split('.')[:2])}-\w{{12}}\.so$", rekeyed())
    assert rekeyed("2.13.0+cpu") == rekeyed("2.13.1+cu130") == rekeyed("2.13.0a0+git123")
    assert len({rekeyed(version) for version in ("2.13.0", "2.1.3", "2.14.0", "3.13.0")}) == 4


# vlmo-fast build


def run(*arguments: str, command: str = "build", **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "vlmo_fast", command, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.usefixtures("cpu_extension")
def test_build_leaves_alone_what_is_up_to_date() -> None:
    before = extensions.library("cpu").stat().st_mtime_ns
    done = run("cpu")
    assert done.returncode == 0
    assert done.stdout.strip() == f"vlmo-fast build: {extensions.library('cpu')}"
    assert json.loads(run("cpu", "--json").stdout) == {"cpu": str(extensions.library("cpu"))}
    assert extensions.library("cpu").stat().st_mtime_ns == before


def test_build_from_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, require_tool: Callable[[str], str]
) -> None:
    """In another folder, so that the libraries in use stay what they are; then with a compiler that fails."""
    require_tool("g++")
    monkeypatch.setattr(extensions, "FOLDER", tmp_path / "_lib")
    extensions.library.cache_clear()
    try:
        (tmp_path / "_lib").mkdir()
        outdated = tmp_path / "_lib" / f"{extensions.prefix('cpu')}000000000000.so"
        others = tmp_path / "_lib" / "vlmo_fast_cpu-torch2.9-000000000000.so"
        for library in (outdated, others):
            library.touch()
        path = build.build("cpu", jobs=1)
        assert path.parent == tmp_path / "_lib"
        assert not outdated.exists()
        assert others.exists()
        symbols = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True).stdout
        ours = [line.split()[-1] for line in symbols.splitlines() if "vlmo" in line]
        assert sorted(ours) == ["vlmo_fast_cpu_capability", "vlmo_fast_cpu_use"]
        libraries = subprocess.run(["readelf", "-d", path], capture_output=True, text=True).stdout
        assert "libtorch_python" not in libraries  # one library for every Python
        monkeypatch.setenv("CXX", "false")
        with pytest.raises(build.BuildError, match="the cpu extension did not compile"):
            build.build("cpu", force=True)
    finally:
        extensions.library.cache_clear()


def test_build_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run("gpu")
    assert done.returncode == 2
    assert "NAME must be one of cpu, cuda, got gpu" in done.stderr
    monkeypatch.setattr(extensions, "FOLDER", tmp_path)
    extensions.library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(build, "find_spec", lambda name: None)
        with pytest.raises(build.BuildError, match="torch is missing"):
            build.build("cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no-such-compiler is missing; `vlmo-fast doctor` says how"):
        build.build("cpu")
    assert cli.main(["build", "cpu"]) == 1
    assert cli.main(["build", "cpu", "--optional"]) == 0
    capsys.readouterr()
    assert cli.main(["build", "cpu", "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {}
    assert "no-such-compiler is missing" in shown.err
    extensions.library.cache_clear()
