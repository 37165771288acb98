"""Options, profiles and the fixture `bench` of everything under `benchmarks/`; how it measures: `harness.py`.

    pytest benchmarks --quick             a smoke run of about three minutes
    pytest benchmarks --cpu               every ratio promised for a CPU; at most 20 minutes on two cores
    pytest benchmarks --gpu --time-limit 300      on a CUDA device, the most important first, until the time is up
    pytest benchmarks -k ffn              one family, everything that this machine can run

`--results FILE` says where the JSON goes (else `.benchmarks/<date>-<commit>.json`); `--keep` puts it where the report
reads it, `benchmarks/results/<machine>/`; `--resume` with `--results` leaves out what stands in FILE and adds the rest.
`python -m benchmarks.report` then makes tables, plots and the page.

A kernel that crashes takes the CUDA context along, and with it every later benchmark of the process: the run then stops
with exit status 75. One that hangs ends the process after three minutes. `--resume` goes on behind it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import PROFILES, ROOT, Bench, Results, machine_name, synchronize

RESULTS = pytest.StashKey[Results]()
STARTED = pytest.StashKey[float]()
DEVICE_LOST = 75  # exit status: what comes next needs a process of its own
HANGS = 180  # seconds that no benchmark on a GPU takes, its compilations included


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vlmo_fast benchmarks")
    for name, text in (
        ("--quick", "a smoke run of about three minutes"),
        ("--cpu", "every ratio promised for a CPU, on the CPU"),
        ("--gpu", "on a CUDA device, by priority"),
    ):
        group.addoption(name, dest="profile", action="store_const", const=name.strip("-"), help=text)
    group.addoption(
        "--time-limit", type=float, default=None, metavar="SECONDS", help="start no benchmark after this time"
    )
    group.addoption("--seconds", type=float, default=None, metavar="SECONDS", help="time for the rounds of one group")
    group.addoption("--keep", action="store_true", help="write the JSON file to benchmarks/results/, for the report")
    group.addoption("--results", type=Path, default=None, metavar="FILE", help="the JSON file to write")
    group.addoption("--resume", action="store_true", help="run only what is not in --results FILE, and add it there")
    group.addoption("--commit", default=None, metavar="ID", help="the checkout's commit, where git is not there to ask")


def pytest_configure(config: pytest.Config) -> None:
    options = config.option
    if options.profile == "gpu" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--gpu needs a CUDA device; torch {torch.__version__} finds none")
    if options.resume and options.results is None:
        raise pytest.UsageError("--resume needs --results FILE")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    profile, done = config.option.profile, measured(config)
    on_gpu = torch.cuda.is_available() and profile != "cpu"
    # A thread, since a process that waits for the device hears no signal.
    limit = pytest.mark.timeout(HANGS, method="thread", func_only=True) if on_gpu else pytest.mark.timeout(3600)
    chosen, others = [], []
    for item in items:
        item.add_marker(limit)
        wanted = (profile is None or profile in profiles(item)) and item.nodeid not in done
        (chosen if wanted else others).append(item)
    if profile is not None:
        chosen.sort(key=lambda item: profiles(item)[profile])
    if others:
        config.hook.pytest_deselected(items=others)
    items[:] = chosen


def measured(config: pytest.Config) -> set[str]:
    """What --resume leaves out: benchmarks that stand in the results file, however they ended."""
    path = config.option.results
    if not config.option.resume or not path.is_file():
        return set()
    return {group["benchmark"] for group in json.loads(path.read_text(encoding="utf-8"))["groups"]}


def profiles(item: pytest.Item) -> dict[str, int]:
    """The profiles that run a benchmark, by all its marks together (a parameter's add to the function's)."""
    found: dict[str, int] = {}
    for marker in item.iter_markers("profile"):
        found |= dict.fromkeys(marker.args, 0) | marker.kwargs
    return found


@pytest.fixture(scope="session")
def extensions_built() -> None:
    """The libraries of `csrc/` that this machine can build and use."""
    from vlmo_fast import cli

    cli.main(["build", "--optional", "cpu", *(["cuda"] if torch.cuda.is_available() else [])])


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any, extensions_built: None) -> Iterator[Bench]:
    """The door to the harness: `bench.group(...)`."""
    config = request.config
    options = config.option
    started = config.stash.setdefault(STARTED, time.monotonic())
    profile = options.profile or "all"
    limit = PROFILES[profile].limit if options.time_limit is None else options.time_limit
    if limit is not None and time.monotonic() - started > limit:
        benchmark.skipped = True
        pytest.skip(f"the time limit of {limit:g} s is up")
    device = torch.device("cuda" if torch.cuda.is_available() and profile != "cpu" else "cpu")
    settings = PROFILES[profile]
    if options.seconds is not None:
        settings = replace(settings, seconds=options.seconds)
    if RESULTS not in config.stash:
        results = Results(options.results, profile, device, options.commit)
        if options.resume and results.path.is_file():
            try:
                results.resume()
            except ValueError as error:
                pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
        if benchmark.enabled and results.path is None:
            folder = ROOT / ".benchmarks"
            if options.keep:
                folder = ROOT / "benchmarks" / "results" / machine_name(results.data["machine"])
            now = datetime.now(timezone.utc).strftime("%Y-%m-%d-%H%M%S" if not options.keep else "%Y-%m-%d")
            results.path = folder / f"{now}-{(results.data['commit']['id'] or 'unknown')[:8]}.json"
        config.stash[RESULTS] = results
    torch.manual_seed(0)
    yield Bench(config.stash[RESULTS], settings, device, benchmark, _writer(config))
    leave(device)


def leave(device: torch.device) -> None:
    """End the process if a kernel took the CUDA context along."""
    try:
        synchronize(device)
    except RuntimeError as error:
        pytest.exit(f"the GPU no longer answers: {str(error).splitlines()[0]}", returncode=DEVICE_LOST)


def _writer(config: pytest.Config) -> Callable[[str], None]:
    reporter = config.pluginmanager.getplugin("terminalreporter")
    capture = config.pluginmanager.getplugin("capturemanager")

    def write(text: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            for line in text.split("\n"):
                reporter.write_line(line)

    return write


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash.get(RESULTS, None)
    if results is not None and results.path is not None and results.data["groups"]:
        terminalreporter.write_line(f"benchmark results: {results.path}")
