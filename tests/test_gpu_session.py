"""The one-call GPU script, as far as it goes without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlmo_fast import ops

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tools" / "gpu_session.sh"


def session(*options, **environment):
    env = {key: value for key, value in os.environ.items() if key != "OUT"} | {"PYTHON": sys.executable} | environment
    return subprocess.run([str(SCRIPT), *options], env=env, capture_output=True, text=True)


def test_it_explains_itself_and_refuses_what_it_does_not_know():
    assert os.access(SCRIPT, os.X_OK)
    done = session("--help")
    assert done.returncode == 0
    assert "under ten minutes" in done.stdout and "--dry-run" in done.stdout and "set -uo" not in done.stdout
    done = session("--nonsense")
    assert done.returncode == 2
    assert "unknown option --nonsense" in done.stderr


def test_every_op_runs_with_each_of_its_implementations():
    """The program that compute-sanitizer watches."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_smoke.py"), "--small"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for op in ("mome_ffn", "packed_attention", "contrastive_loss"):
        assert any(line.startswith(op) and "ok" in line for line in done.stdout.splitlines())
    assert "DIFFERS" not in done.stdout


@pytest.mark.parametrize("status", [0, 9])
def test_the_extension_is_watched_by_three_tools(status, tmp_path):
    """With a compute-sanitizer that only writes down how it was called; 9 is what a finding gives."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/calls"\nexit {status}\n')
    tool.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = session("--only", "sanitizer", "--out", str(tmp_path / "out"), PATH=path)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[1] for call in calls] == ["memcheck", "racecheck", "initcheck"]
    assert all("--error-exitcode 9" in call and call.endswith("tools/gpu_smoke.py --small") for call in calls)
    assert done.returncode == (1 if status else 0)
    assert done.stdout.count("failed (9)") == (3 if status else 0)


def test_a_gradient_that_is_not_finite_is_no_result(monkeypatch, capsys):
    """Also where it is not the first of them."""
    spec = importlib.util.spec_from_file_location("gpu_smoke", ROOT / "tools" / "gpu_smoke.py")
    smoke = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(smoke)
    right = ops.contrastive_loss

    def planted(images, texts, scale, *, backend, **ids):
        if backend != "eager":
            scale = scale * 1
            scale.register_hook(lambda gradient: gradient * float("nan"))
        return right(images, texts, scale, backend=backend, **ids)

    assert smoke.main(["--small", "contrastive_loss"]) == 0
    monkeypatch.setattr(ops, "contrastive_loss", planted)
    assert smoke.main(["--small", "contrastive_loss"]) == 1
    assert "DIFFERS, nan from eager" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        smoke.main(["nonsense"])


def test_a_step_that_fails_is_told_and_the_rest_goes_on(tmp_path):
    done = session("--dry-run", "--only", "tests,benchmarks", "--out", str(tmp_path / "out"), PYTHON="false")
    assert done.returncode == 1
    steps = [line for line in (tmp_path / "out" / "table.txt").read_text().splitlines() if "failed (1)" in line]
    names = [line.split()[0] for line in steps]
    assert names[0] == "tests-smoke" and names[-1] == "benchmarks"
    assert {"tests-test_ffn", "tests-test_contrastive_gpu", "tests-test_serving"} <= set(names)
    assert "out of time" not in done.stdout


@pytest.mark.parametrize(
    ("statuses", "state"),
    [
        ((0,), "ok"),
        ((75, 1, 5), "failed (1)"),  # a lost GPU, then one that hangs, then nothing is left
        ((2, 2, 2), "failed (1)"),  # it dies before it writes anything new: no third time
    ],
)
def test_benchmarks_go_on_behind_what_took_their_process_along(statuses, state, tmp_path):
    calls = tmp_path / "calls"
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/bash
        [[ $* == *"pytest benchmarks"* ]] || exit 0
        echo "$*" >>{calls}
        statuses=({" ".join(map(str, statuses))})
        status=${{statuses[$(($(wc -l <{calls}) - 1))]}}
        [[ $* =~ results.([^ ]+) ]]
        echo $((status == 2 ? 0 : $(wc -l <{calls}))) >"${{BASH_REMATCH[1]}}"
        exit "$status"
        """
    )
    python.chmod(0o755)
    done = session("--dry-run", "--only", "benchmarks", "--out", str(tmp_path), "--commit", "abc", PYTHON=str(python))
    lines = calls.read_text().splitlines()
    assert len(lines) == min(len(statuses), 2 if 2 in statuses else 3)
    assert all("--resume" in line and "--commit abc" in line for line in lines)
    (row,) = [line for line in (tmp_path / "table.txt").read_text().splitlines() if line.startswith("benchmarks")]
    assert row.endswith(state)
    assert done.returncode == (state != "ok")


def test_no_step_starts_after_the_limit(tmp_path):
    done = session("--dry-run", "--limit", "1", "--out", str(tmp_path))
    assert "no time left" in done.stdout
    assert not (tmp_path / "benchmarks.json").exists()


@pytest.mark.slow
def test_the_whole_session_without_a_gpu(tmp_path):
    before = {path.name for path in ROOT.iterdir()}
    done = session("--dry-run", "--out", str(tmp_path), "--limit", "500")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "benchmarks.json").read_text())
    assert [group["family"] for group in results["groups"]] == ["import"]
    assert "<svg" in (tmp_path / "benchmarks.html").read_text()
    assert "import vlmo_fast" in done.stdout
    log = (tmp_path / "log.txt").read_text()
    for step in ("install", "build", "tests-smoke", "tests-test_ffn", "benchmarks"):
        assert f"=== {step} (at most" in log
    files = {"log.txt", "table.txt", "benchmarks.json", "benchmarks.html"}
    assert {path.name for path in tmp_path.iterdir()} == files  # few, to be carried back
    assert {path.name for path in ROOT.iterdir()} == before
