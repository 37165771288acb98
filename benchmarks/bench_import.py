"""What `import vlmo_fast` costs, in a fresh interpreter: nothing beyond the interpreter itself is the promise."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.harness import ROOT, Bench, Work


@pytest.mark.profile("quick", "cpu")
def bench_import(bench: Bench) -> None:
    """Interpreters started one after the other; with the file system's cache warm."""

    def running(code: str) -> Callable[..., dict[str, Any]]:
        def run() -> dict[str, Any]:
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
            return {}

        return run

    group = bench.group(
        "import",
        "a fresh interpreter",
        lambda seed: {},
        oracle=dict,
        work=Work(1, "imports"),
        num_buffers=1,
        memory=False,
        seconds=2,
        min_rounds=3,
    )
    group.ours("import vlmo_fast", running("import vlmo_fast"))
    group.yardstick("nothing", running("pass"))
    group.yardstick("import torch", running("import torch"))
    group.ours("import vlmo_fast.ops", running("import vlmo_fast.ops"))
    group.promise("import vlmo_fast", "import torch", at_most=0.1, key="import")
    group.run()
