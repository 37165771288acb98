"""What is released: archives that an index takes; installs with and without a compiler, on each Python, anywhere."""

import base64
import csv
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from test_house import OFFLINE, PIP, ROOT, Built, built, copy_of_checkout, run  # noqa: F401 -- built is a fixture

RUNS = """
import pathlib, sys, torch, vlmo_fast
assert pathlib.Path(vlmo_fast.__file__).is_relative_to(sys.argv[1]), vlmo_fast.__file__
from vlmo_fast import extensions, ops
x, y = (torch.nn.functional.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
names = [name for name in ("cpu",) if extensions.is_built(name)]
for backend in ["auto", *names]:
    loss = ops.contrastive_loss(x, y, torch.tensor(3.0), backend=backend)
    assert torch.allclose(loss, ops.contrastive_loss(x, y, torch.tensor(3.0), backend="eager"))
print(names)
"""


# Archives


@pytest.fixture(scope="module")
def wheel(built: Built) -> zipfile.ZipFile:  # noqa: F811
    return zipfile.ZipFile(built.wheel)


def metadata_of(wheel: zipfile.ZipFile) -> bytes:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return wheel.read(name)


def test_the_record_is_true(wheel: zipfile.ZipFile) -> None:
    """Every file with its digest and its size, as an index checks."""
    (record,) = [name for name in wheel.namelist() if name.endswith("/RECORD")]
    rows = {path: (digest, size) for path, digest, size in csv.reader(io.StringIO(wheel.read(record).decode()))}
    assert set(rows) == {name for name in wheel.namelist() if not name.endswith("/")}
    for name, (digest, size) in rows.items():
        if name != record:
            data = wheel.read(name)
            wanted = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert digest == f"sha256={wanted}", name
            assert int(size) == len(data), name


def test_metadata_that_an_index_takes(built: Built, wheel: zipfile.ZipFile) -> None:  # noqa: F811
    fields = message_from_bytes(metadata_of(wheel))
    assert Version(fields["Metadata-Version"]) >= Version("2.4")
    assert fields["Description-Content-Type"] == "text/markdown"
    assert fields.get_payload().startswith("# vlmo_fast")
    assert fields["Summary"]
    assert len(fields["Summary"]) <= 512
    assert "\n" not in fields["Summary"]
    for line in fields.get_all("Requires-Dist"):
        assert not Requirement(line).url, line  # an index refuses direct references
    classifiers = fields.get_all("Classifier")
    pythons = [c.rpartition(" ")[2] for c in classifiers if re.search(r":: 3\.\d+$", c)]
    assert pythons == ["3.10", "3.11", "3.12", "3.13"]
    assert not [c for c in classifiers if c.startswith("License ::")]  # not beside License-Expression
    assert re.fullmatch(r"vlmo_fast-[\d.]+-py3-none-any\.whl", built.wheel.name)
    assert re.fullmatch(r"vlmo_fast-[\d.]+\.tar\.gz", built.sdist.name)
    with tarfile.open(built.sdist) as archive:
        info = archive.extractfile(f"{built.sdist.name.removesuffix('.tar.gz')}/PKG-INFO")
        assert info
        assert info.read() == metadata_of(wheel)


def test_no_archive_is_large(built: Built) -> None:  # noqa: F811
    """Sources alone: no weights, data or libraries slipped in."""
    assert built.wheel.stat().st_size < 2**20
    assert built.sdist.stat().st_size < 8 * 2**20


def test_build_requirements_do_not_name_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (requires,) = re.findall(r"^requires = \[(.*?)\]", text, re.MULTILINE)
    assert [Requirement(part.strip(' "')).name for part in requires.split(",")] == ["setuptools"]


def pythons() -> list[str]:
    """Other interpreters of this machine that the metadata allows."""
    folders = [*os.environ.get("PATH", "").split(os.pathsep)]
    folders += [str(path / "bin") for path in (Path.home() / ".pyenv" / "versions").glob("3.*")]
    found = {}
    for minor in range(10, 14):
        path = shutil.which(f"python3.{minor}", path=os.pathsep.join(folders))
        if path and subprocess.run([path, "-c", "import zipfile"], capture_output=True).returncode == 0:
            found[minor] = path
    return list(found.values())


def test_every_python_of_this_machine_reads_the_package(
    built: Built,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Imports, prints its version, and parses every file; torch need not be there."""
    zipfile.ZipFile(built.wheel).extractall(tmp_path)
    code = (
        "import compileall, sys, vlmo_fast; from vlmo_fast import cli\n"
        "assert compileall.compile_dir('vlmo_fast', quiet=1, force=True)\n"
        "cli.main(['--version'])"
    )
    interpreters = {sys.executable, *pythons()}
    for interpreter in interpreters:
        assert run(interpreter, "-S", "-c", code, cwd=tmp_path).startswith("vlmo_fast "), interpreter


# Installs


def installed_files(folder: Path) -> list[str]:
    return [path.name for path in (folder / "vlmo_fast").rglob("*.so")]


@pytest.mark.slow
def test_install_without_isolation_compiles_at_once(tmp_path: Path, require_tool: Callable[[str], str]) -> None:
    """Where torch, ninja and a compiler are; the result runs from an empty folder, with the library."""
    require_tool("g++")
    checkout, target, empty = copy_of_checkout(tmp_path), tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    run(*PIP, "install", *OFFLINE, "--target", str(target), str(checkout), cwd=empty, MAX_JOBS="1")
    (library,) = installed_files(target)
    assert library.startswith("vlmo_fast_cpu-")
    (wheel,) = target.glob("*.dist-info/WHEEL")
    assert re.search(r"^Tag: py3-none-(?!any)\w+$", wheel.read_text(), re.MULTILINE)  # any Python, this platform
    out = run(sys.executable, "-c", RUNS, str(target), cwd=empty, PYTHONPATH=str(target))
    assert out.strip() == "['cpu']"


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"], ids=["none", "broken"])
def test_install_without_a_working_compiler(compiler: str, tmp_path: Path) -> None:
    """No library, but everything else: it falls back to torch's own operators."""
    checkout, target, empty = copy_of_checkout(tmp_path), tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    run(*PIP, "install", *OFFLINE, "--target", str(target), str(checkout), cwd=empty, CXX=compiler)
    assert installed_files(target) == []
    (wheel,) = target.glob("*.dist-info/WHEEL")
    assert "Tag: py3-none-any" in wheel.read_text()
    assert run(sys.executable, "-c", RUNS, str(target), cwd=empty, PYTHONPATH=str(target)).strip() == "[]"


@pytest.mark.slow
def test_install_with_isolation(tmp_path: Path) -> None:
    """As `pip install .` does: setuptools alone is fetched, torch is not there, nothing is compiled, nor could be."""
    checkout, target, empty = copy_of_checkout(tmp_path), tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    command = (*PIP, "install", "--no-deps", "--quiet", "--target", str(target), str(checkout))
    run(*command, cwd=empty, CXX="no-such-compiler", CC="no-such-compiler")
    assert installed_files(target) == []
    (wheel,) = target.glob("*.dist-info/WHEEL")
    assert "Tag: py3-none-any" in wheel.read_text()
    assert run(sys.executable, "-c", RUNS, str(target), cwd=empty, PYTHONPATH=str(target)).strip() == "[]"


@pytest.mark.slow
def test_build_from_an_installed_wheel(
    built: Built,  # noqa: F811
    tmp_path: Path,
    require_tool: Callable[[str], str],
) -> None:
    """Whoever installed a wheel without the library compiles it later, in an empty folder, from the wheel's sources."""
    require_tool("g++")
    target, empty = tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    run(*PIP, "install", *OFFLINE, "--target", str(target), str(built.wheel), cwd=empty)
    shown = run(sys.executable, "-m", "vlmo_fast", "build", "cpu", cwd=empty, PYTHONPATH=str(target), MAX_JOBS="1")
    assert str(target / "vlmo_fast" / "_lib") in shown
    assert run(sys.executable, "-c", RUNS, str(target), cwd=empty, PYTHONPATH=str(target)).strip() == "['cpu']"
    assert list(empty.iterdir()) == []
