"""The package as an object: what importing it costs, what wheel and sdist hold, how it installs, what it names."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet")

# Makes the named packages impossible to find, whether they are installed or not.
BLOCK = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {names!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


def run(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(code: str, *flags: str, cwd: Path = ROOT, **environment: str) -> str:
    return run(sys.executable, *flags, "-c", code, cwd=cwd, **environment)


def copy_of_checkout(folder: Path) -> Path:
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "demo-output", "_lib")
    return Path(shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=ignore))


# Importing


def test_import_costs_nothing() -> None:
    loaded = json.loads(python("import json, sys, vlmo_fast; print(json.dumps(sorted(sys.modules)))"))
    heavy = {"torch", "numpy", "triton", "transformers", "xformers", "PIL", "importlib.metadata"}
    assert heavy.isdisjoint(loaded)
    assert [name for name in loaded if name.startswith("vlmo_fast")] == ["vlmo_fast", "vlmo_fast._autoclasses"]


def test_command_line_imports_only_what_it_runs() -> None:
    code = "import json, sys, vlmo_fast.cli, vlmo_fast.commands.doctor; print(json.dumps(sorted(sys.modules)))"
    assert {"torch", "numpy", "triton", "transformers", "xformers", "PIL"}.isdisjoint(json.loads(python(code)))


def test_model_runs_with_torch_alone() -> None:
    """Every kind of input, padded and packed, forward and backward, and the contrastive loss."""
    blocked = ("triton", "transformers", "xformers", "PIL", "numpy", "scipy", "safetensors", "tqdm")
    code = """
import torch, vlmo_fast
from vlmo_fast import ops
config = vlmo_fast.MoMEConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_vl_layers=1,
                              image_size=32, patch_size=16, vocab_size=50, max_text_length=8)
model = vlmo_fast.MoMETransformer(config).eval()
ids, pixels = torch.randint(0, 50, (2, 8)), torch.randn(2, 3, 32, 32)
pair = model(input_ids=ids, pixel_values=pixels)
assert pair.last_hidden_state.shape == (2, 8 + 5, 32)
image, text = model(pixel_values=pixels, use_vl_branch=True), model(input_ids=ids, use_vl_branch=True)
packed = model.forward_packed(vlmo_fast.pack([8, 3], [2, 2], pairs=[(1, 0)], texts=[0]), ids, pixels)
loss = ops.contrastive_loss(image.image_embeds, text.text_embeds, torch.tensor(3.0))
loss = loss + pair.pooler_output.sum() + packed.pooler_output.sum() + packed.text_embeds.sum()
assert loss.isfinite()
loss.backward()
assert model.blocks[0].attention.qkv.weight.grad.isfinite().all()
assert not [name for name in sys.modules if name.partition(".")[0] in BLOCKED]
"""
    python(BLOCK.format(names=blocked) + code.replace("BLOCKED", repr(blocked)))


def test_every_exported_name_is_there() -> None:
    pytest.importorskip("transformers")
    code = """
from vlmo_fast import *
import vlmo_fast
for name in vlmo_fast.__all__: assert getattr(vlmo_fast, name).__name__ == name and name in globals()
"""
    python(code)


def test_every_submodule_is_there() -> None:
    """`import vlmo_fast` is enough to write `vlmo_fast.export.export_encoder`."""
    pytest.importorskip("transformers")
    code = """
import vlmo_fast
submodules, _ = vlmo_fast._public_names()
for name in submodules:
    vars(vlmo_fast).pop(name, None)  # which an earlier one may have imported
    assert getattr(vlmo_fast, name).__name__ == f"vlmo_fast.{name}"
print(*submodules)
"""
    assert {"export", "formats", "hf", "losses", "nn", "ops", "serving", "training"} <= set(python(code).split())


def test_exports_are_listed_once() -> None:
    """In the stub, as names that it hands on: type checkers ignore those that are not imported as themselves."""
    import vlmo_fast

    body = ast.parse((ROOT / "vlmo_fast" / "__init__.pyi").read_text(encoding="utf-8")).body
    aliases = [alias for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert [alias.name for alias in aliases] == [alias.asname for alias in aliases]
    submodules = vlmo_fast._public_names()[0]
    assert sorted([*submodules, *vlmo_fast.__all__]) == sorted(alias.name for alias in aliases)
    assert {*submodules, *vlmo_fast.__all__, "__version__"} < set(dir(vlmo_fast))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = vlmo_fast.no_such_name


def test_missing_transformers_names_the_command() -> None:
    """Whichever way leads there: a head by its name, or the configuration that `load_official` fills."""
    code = """
import vlmo_fast
for way in ("vlmo_fast.VLMoForPreTraining", "__import__('vlmo_fast.hf.configuration')"):
    try:
        eval(way)
    except ImportError as error:
        print(error)
"""
    lines = python(BLOCK.format(names=("transformers",)) + code).splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("vlmo_fast.hf: the package transformers must be installed, got none; to install it: ")
        assert re.search(r'-m pip install (-e )?"(transformers|.*\[transformers\])', line)


def test_hugging_face_kernels_are_not_shadowed(tmp_path: Path) -> None:
    """Our top-level folder must lose against a distribution named `kernels`, wherever Python is started."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("mark = 'the distribution'\n")
    code = "import kernels, vlmo_fast.kernels; print(kernels.mark)"
    assert python(code, PYTHONPATH=str(tmp_path)).strip() == "the distribution"


def test_transformers_imports_from_the_root() -> None:
    pytest.importorskip("transformers")
    python("import transformers; transformers.PreTrainedModel; transformers.Trainer")


# The checkout


@pytest.mark.parametrize("name", ["kernels", "csrc"])
def test_symlinks(name: str) -> None:
    link = ROOT / "vlmo_fast" / name
    if not link.is_symlink():
        pytest.skip("not a checkout: an sdist holds the folder itself")
    assert link.readlink() == Path("..", name)  # relative, so that it survives a move
    assert link.is_dir()
    assert not list((ROOT / name).rglob("__init__.py"))


def test_linters_see_what_is_linked_once() -> None:
    """Also where a hook hands them the names of single files."""
    pytest.importorskip("ruff")
    ruff = (sys.executable, "-m", "ruff", "check", "--force-exclude", "--show-files")
    shown = {Path(line).relative_to(ROOT).as_posix() for line in run(*ruff).splitlines()}
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").glob("*.py")} <= shown
    assert not [name for name in shown if name.startswith(("vlmo_fast/kernels/", "vlmo_fast/csrc/"))]
    assert run(*ruff, "vlmo_fast/kernels/ffn.py").splitlines() == []


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_documents_name_files_that_are_there(name: str) -> None:
    """By their path or the end of it."""
    named = re.findall(r"`([\w./-]+(?:\.(?:py|md|sh|toml|txt)|/))`", (ROOT / name).read_text(encoding="utf-8"))
    folders = ("vlmo_fast", "kernels", "csrc", "tests", "benchmarks", "tools", "docs", "examples")
    paths = [*ROOT.iterdir(), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    there = [f"/{path.relative_to(ROOT).as_posix()}" for path in paths]
    there += [f"/{folder}" for folder in folders]
    assert named
    assert [name for name in named if not any(path.endswith(f"/{name.rstrip('/')}") for path in there)] == []


def test_first_screen_of_the_readme() -> None:
    """Two commands, an example of five lines and the picture of the report, in this order, above all else."""
    screen = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    found = re.search(r"make demo .*\nmake test .*```python\n(.*?)```.*!\[[^]]+\]\((.*?)\)", screen, re.DOTALL)
    assert found
    assert len([line for line in found[1].splitlines() if line]) == 5  # test_readme.py runs them
    assert (ROOT / found[2]).read_bytes().startswith(b"\x89PNG")


def test_files_name_no_machine_and_no_registry(require_tool: Callable[[str], str]) -> None:
    git = require_tool("git")
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = run(git, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    # Written in halves, so that this file passes its own test.
    parts = [
        *(r"py" + r"pi\.org", r"python" + r"hosted\.org", r"download\.py" + r"torch\.org", r"pypi\.nv" + r"idia\.com"),
        *(r"files\.py" + r"thon", r"/wo" + r"rk/", r"/opt/(py" + r"pi|wheels)", r"/ro" + r"ot/", r"/ho" + r"me/\w"),
    ]
    forbidden = re.compile("|".join(parts).encode())
    found = []
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            found += [f"{name}: {match.group().decode()}" for match in forbidden.finditer(path.read_bytes())]
    assert not found


# Imports


def imports(path: Path, *, at_import: bool = False) -> set[str]:
    """Modules of vlmo_fast that a file imports, in functions too unless `at_import`; not those for type checkers."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            children: list[ast.AST] = list(node.orelse)
        elif at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            children = []
        else:
            children = list(ast.iter_child_nodes(node))
        for child in children:
            yield from walk(child)

    found = set()
    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    modules = {name for name in map(module_of_import, found) if name}
    return modules - {module_name(path)}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def module_of_import(name: str) -> str | None:
    """The module that an imported name lies in."""
    while name.partition(".")[0] == "vlmo_fast":
        path = ROOT.joinpath(*name.split("."))
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return name
        name = name.rpartition(".")[0]
    return None


MODULES = {
    module_name(path): path
    for path in sorted((ROOT / "vlmo_fast").rglob("*.py"))
    if not {"kernels", "csrc", "__pycache__"} & set(path.parts)
}

# Who may import whom: each line what stands on the lines above it, and what stands beside it, but not in a circle.
LAYERS = (
    ("requirements", "extensions", "config", "distributed", "outputs", "watch", "serving"),
    ("build", "files", "kernels", "ops"),
    ("positions", "rows", "packing", "losses"),
    ("_validation", "embeddings", "block", "initialization", "model", "nn"),
    ("data", "export", "store"),
    ("hf", "training"),
    ("_autoclasses", "formats", "embedding"),
    ("", "demo", "doctor"),
    ("commands",),
    ("cli",),
    ("__main__",),
)


def test_imports_go_one_way() -> None:
    """Inside functions, too. A module that is new is put on a line of `LAYERS`."""
    layer = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
    room = lambda module: module.partition(".")[2].partition(".")[0]
    assert {room(module) for module in MODULES} - set(layer) == set()
    upwards = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in imports(path)
        if other != "vlmo_fast" and layer[room(other)] > layer[room(module)]
    ]
    assert upwards == []


def test_no_imports_in_a_circle() -> None:
    graph = {module: imports(path, at_import=True) - {"vlmo_fast"} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_library_file_imports_a_command() -> None:
    commands = re.compile(r"vlmo_fast\.(commands\b|cli$)")
    importers = {module for module, path in MODULES.items() for other in imports(path) if commands.match(other)}
    assert {module for module in importers if not module.startswith("vlmo_fast.commands.")} == {
        "vlmo_fast.__main__",
        "vlmo_fast.cli",
    }


# Installing


class Built(NamedTuple):
    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An sdist of a copy of the checkout, and a wheel made from that sdist; no network, and no compiler."""
    folder = tmp_path_factory.mktemp("built")
    checkout = copy_of_checkout(folder)
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder))
    run(*command, cwd=checkout, CXX="no-such-compiler")
    return Built(next(folder.glob("*.whl")), next(folder.glob("*.tar.gz")))


def sources(folder: str, *suffixes: str) -> set[str]:
    return {
        f"vlmo_fast/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }


def python_files() -> set[str]:
    files = (path.relative_to(ROOT) for path in (ROOT / "vlmo_fast").rglob("*.py"))
    return {path.as_posix() for path in files if "__pycache__" not in path.parts}


CSRC_SUFFIXES = (".md", ".cpp", ".cc", ".cu", ".cuh", ".h", ".hpp")


def expected_files() -> set[str]:
    typed = {"vlmo_fast/py.typed", "vlmo_fast/__init__.pyi"}
    return python_files() | typed | sources("kernels", ".py", ".md") | sources("csrc", *CSRC_SUFFIXES)


def test_wheel_holds_the_package(built: Built) -> None:
    names = set(zipfile.ZipFile(built.wheel).namelist())
    assert expected_files() <= names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"vlmo_fast", "vlmo_fast-0.1.0.dist-info"}
    assert not [name for name in names if "__pycache__" in name or name.endswith(".so")]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_holds_the_package_and_its_tests(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    beside = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "constraints.txt", "Makefile", "tests/conftest.py"}
    assert expected_files() | beside <= set(members)
    assert not [name for name, member in members.items() if member.issym() or "__pycache__" in name]


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run(*PIP, "install", *OFFLINE, "--target", str(target), str(built.wheel))
    return target


def test_wheel_imports_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    # -S leaves out the site-packages of this environment: torch is not needed to import the package
    code = """
import pathlib, vlmo_fast, vlmo_fast.kernels, vlmo_fast.csrc
print(vlmo_fast.__file__, vlmo_fast.__version__, pathlib.Path(vlmo_fast.csrc.__path__[0], "README.md").is_file())
"""
    out = python(code, "-S", cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert out == [str(installed / "vlmo_fast" / "__init__.py"), "0.1.0", "True"]


def test_metadata(installed: Path) -> None:
    (distribution,) = metadata.distributions(name="vlmo_fast", path=[str(installed)])
    fields = distribution.metadata
    assert (fields["Name"], fields["Version"]) == ("vlmo_fast", "0.1.0")
    assert (fields["License-Expression"], fields.get_all("License-File")) == ("Apache-2.0", ["LICENSE"])
    assert fields["Requires-Python"] == ">=3.10"
    base = [line.replace("'", '"') for line in distribution.requires or [] if "extra ==" not in line]
    assert base == ["torch>=2.10", 'triton>=3.6; platform_system == "Linux"']
    extras = {"transformers", "demo", "data", "xformers", "build", "benchmark", "test", "dev"}
    assert set(fields.get_all("Provides-Extra")) == extras
    # An extra that named torch could replace the build (CPU, CUDA) that the user chose.
    extras = [line for line in distribution.requires or [] if "extra ==" in line]
    assert extras
    assert not [line for line in extras if re.match(r"(torch|triton|torchvision|nvidia)\b", line)]
    (script,) = distribution.entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("vlmo-fast", "vlmo_fast.cli:main")


def test_license_text() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def installed_here() -> list[tuple[str, str]]:
    """What pip finds of the package in the environment that runs the tests: version and origin."""
    code = """
import json
from importlib import metadata
found = metadata.distributions(name="vlmo_fast")
print(json.dumps(sorted((str(d.locate_file("")), d.read_text("direct_url.json") or "") for d in found)))
"""
    return [tuple(each) for each in json.loads(python(code, cwd=Path(sys.prefix)))]


def test_editable_install(tmp_path: Path) -> None:
    """Into a folder of its own, without a look at what this environment has installed, which --prefix would remove."""
    before = installed_here()
    checkout = copy_of_checkout(tmp_path)
    site_packages = tmp_path / "site-packages"
    run(*PIP, "install", *OFFLINE, "--target", str(site_packages), "-e", str(checkout), cwd=tmp_path)
    assert installed_here() == before
    code = f"""
import site
site.addsitedir({str(site_packages)!r})
import importlib.util, vlmo_fast, vlmo_fast.kernels, vlmo_fast.csrc
assert importlib.util.find_spec("kernels") is None  # the top-level folder must not become importable
print(vlmo_fast.__file__, vlmo_fast.__version__)
"""
    out = python(code, "-S", cwd=tmp_path).split()
    assert out == [str(checkout / "vlmo_fast" / "__init__.py"), "0.1.0"]
    (distribution,) = metadata.distributions(name="vlmo_fast", path=[str(site_packages)])
    assert json.loads(distribution.read_text("direct_url.json") or "")["dir_info"] == {"editable": True}


# make


@pytest.mark.parametrize(
    ("interpreter", "message"),
    [
        (None, "no {python} here; name one: make PYTHON=python3.x"),
        (
            "import sys; sys.version_info = (3, 9, 2); sys.version = '3.9.2 (fake)'",
            "needs Python 3.10 or later, {python} is 3.9.2",
        ),
        ("import sys; sys.modules['ensurepip'] = None", "{python} lacks the module venv"),
    ],
    ids=["missing", "too old", "without venv"],
)
def test_make_says_what_is_wrong_with_python(
    interpreter: str | None, message: str, tmp_path: Path, require_tool: Callable[[str], str]
) -> None:
    make = require_tool("make")
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    fake = tmp_path / "fake-python"
    if interpreter:  # this interpreter, after the line that breaks it; the caller's code comes as -c CODE
        fake.write_text(f"#!{sys.executable}\n{interpreter}\nexec(sys.argv[2])\n")
        fake.chmod(0o755)
    done = subprocess.run([make, "venv", f"PYTHON={fake}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert message.format(python=fake) in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_help_lists_every_target(require_tool: Callable[[str], str]) -> None:
    text = run(require_tool("make"))
    targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    assert all(f"make {target} " in text for target in targets[1].split() if target != "help")


def test_a_missing_tool_fails_in_ci_and_skips_elsewhere(
    require_tool: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no-such-tool is not on PATH; CI must have it"):
        require_tool("no-such-tool")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="no-such-tool is not on PATH"):
        require_tool("no-such-tool")


def test_ci_runs_the_targets_of_make() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    targets = ["venv", "check", "test", "test-avx2", "test-triton", "test-slow"]
    assert re.findall(r"^step \S+ make (.+)$", script, re.MULTILINE) == targets
    assert "\nexport CI=true\n" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# The command line


def test_doctor_json() -> None:
    report = json.loads(run(sys.executable, "-m", "vlmo_fast", "doctor", "--json"))
    assert report["torch"]["version"] == metadata.version("torch")
    packages = {package["name"]: package for package in report["packages"]}
    assert packages["torch"]["version"]
    assert packages["torch"]["install"] is None
    assert report["implementations"]
    assert set(report["implementations"][0]) == {"op", "device", "dtype", "rank", "implementation", "reason"}


def test_doctor_names_the_command_for_what_is_missing() -> None:
    code = """
import vlmo_fast.cli as cli, vlmo_fast.doctor as doctor
find_spec = doctor.find_spec
doctor.find_spec = lambda name: None if name == "emoji" else find_spec(name)
cli.main(["doctor"])
"""
    text = python(code)
    missing = text.partition("\nMissing\n")[2]
    assert re.search(r'emoji:\n +\S+ -m pip install (-e )?".*(emoji|\[demo\])', missing)
    for op in ("attention", "contrastive_loss"):
        assert re.search(rf"^  {op} +cpu +float32 +\w+ +\w+", text, re.MULTILINE)


def test_installed_commands_need_no_index(installed: Path) -> None:
    """The printed pip command names the packages themselves, not vlmo_fast[...], which no index need know."""
    code = "from vlmo_fast.requirements import install_command as c; print(c('demo')); print(c())"
    demo, base = python(code, "-S", cwd=installed, PYTHONPATH=str(installed)).splitlines()
    assert '"easy-vqa>=1.0"' in demo
    assert "vlmo_fast[" not in demo
    assert base.endswith('-m pip install "torch>=2.10" "triton>=3.6"')


def test_unknown_command_names_the_known_ones() -> None:
    done = subprocess.run([sys.executable, "-m", "vlmo_fast", "nope"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "demo" in done.stderr
    assert "doctor" in done.stderr


def test_help_and_version() -> None:
    text = run(sys.executable, "-m", "vlmo_fast", "--help")
    assert "doctor" in text
    assert "--json" in run(sys.executable, "-m", "vlmo_fast", "doctor", "--help")
    assert re.fullmatch(r"vlmo_fast \S+\n", run(sys.executable, "-m", "vlmo_fast", "--version"))


def test_without_a_command_there_is_help() -> None:
    assert run(sys.executable, "-m", "vlmo_fast") == run(sys.executable, "-m", "vlmo_fast", "--help")


COMMAND = """
from vlmo_fast.commands import options


def configure(parser):
    parser.description = "Greet."
    parser.add_argument("name")
    options.add_json(parser)


def run(args):
    if args.name == "nobody":
        raise ValueError("greet: name must be somebody's, got nobody")
    if args.name == "torch":
        import no_such_package
    if args.name == "you":
        raise KeyboardInterrupt("one greeting is kept")
    print(f"hello, {args.name}")
"""


def test_a_command_is_one_file_and_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And has help, one message for what is wrong, and a way to stop; nothing else is to be written."""
    from vlmo_fast import cli, commands

    (tmp_path / "greet.py").write_text(COMMAND)
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    monkeypatch.setitem(cli.COMMANDS, "greet", "say hello")
    try:
        assert cli.main(["greet", "world"]) == 0
        assert capsys.readouterr().out == "hello, world\n"
        for name, status, message in (
            ("nobody", 1, "vlmo-fast greet: name must be somebody's, got nobody\n"),
            (
                "torch",
                1,
                "vlmo-fast greet: No module named 'no_such_package'; `vlmo-fast doctor` says how to install it\n",
            ),
            ("you", 130, "\nvlmo-fast greet: stopped; one greeting is kept\n"),
        ):
            assert cli.main(["greet", name]) == status
            assert capsys.readouterr().err == message
        assert cli.main([]) == 0
        assert "  greet    say hello\n" in capsys.readouterr().out
        for arguments, status, text in (
            (["--help"], 0, "usage: vlmo-fast greet"),
            (["a", "--no"], 2, "usage: vlmo-fast greet"),
        ):
            with pytest.raises(SystemExit) as stopped:
                cli.main(["greet", *arguments])
            assert stopped.value.code == status
            shown = capsys.readouterr()
            assert text in shown.out + shown.err
    finally:
        sys.modules.pop("vlmo_fast.commands.greet", None)


def test_the_command_of_the_contributing_guide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As printed there: the file, and the row."""
    from vlmo_fast import cli, commands

    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (file,) = re.findall(r"```python\n(# vlmo_fast/commands/count\.py\n.*?)```", guide, re.DOTALL)
    (name, purpose) = re.findall(r'`"(count)": "([^"]+)",`', guide)[0]
    (tmp_path / f"{name}.py").write_text(file)
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    monkeypatch.setitem(cli.COMMANDS, name, purpose)
    try:
        assert cli.main([name, str(ROOT / "LICENSE")]) == 0
        assert int(capsys.readouterr().out) == len((ROOT / "LICENSE").read_text().splitlines())
        assert cli.main([name, str(tmp_path / "none")]) == 1
        assert capsys.readouterr().err.startswith("vlmo-fast count: [Errno 2] No such file")
    finally:
        sys.modules.pop(f"vlmo_fast.commands.{name}", None)


def test_every_command_has_a_short_file_of_its_own() -> None:
    from vlmo_fast import cli

    files = {path.stem: path for path in (ROOT / "vlmo_fast" / "commands").glob("*.py")}
    assert set(files) == {*cli.COMMANDS, "__init__", "options"}
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in files.items()}
    assert {name: length for name, length in lengths.items() if length > 150} == {}
