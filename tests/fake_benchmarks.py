"""An invented benchmark run, labelled as such, for the tests of the report. None of its figures was measured."""

import random
from typing import Any

MACHINE = {
    "cpu": "Invented CPU",
    "cores": 2,
    "capability": "AVX9",
    "memory": 2**34,
    "system": "Linux",
    "gpu": None,
    "extensions": ["cpu"],
    "versions": {"python": "3.11.0", "torch": "2.13.0", "triton": None, "transformers": None, "xformers": None},
}


def contender(name: str, role: str, median: float, seed: int, **fields: Any) -> dict[str, Any]:
    draw = random.Random(seed)
    samples = [median * (1 + draw.uniform(-0.02, 0.02)) for _ in range(8)]
    ordered = sorted(samples)
    defaults = {
        "errors": {},
        "error": None if role == "yardstick" else 3e-7,
        "worst_row": None if role == "yardstick" else 9e-7,
        "peak_bytes": 2**24,
        "result_bytes": 2**20,
        "calls_per_sample": 1,
        "median": (ordered[3] + ordered[4]) / 2,
        "quartiles": [ordered[2], ordered[5]],
        "best": ordered[0],
        "rate": 1000 / median,
        "flops": 1e9 / median,
        "bandwidth": 1e7 / median,
        "of_matmul_ceiling": 1e9 / median / 2e11,
        "of_copy_ceiling": 1e7 / median / 2e10,
        "samples": samples,
    }
    return {"name": name, "role": role} | defaults | fields


def group(
    family: str, case: str, axes: dict[str, Any], contenders: list[dict[str, Any]], **fields: Any
) -> dict[str, Any]:
    defaults = {
        "name": f"{family}: {case}, {axes}",
        "x": next((key for key, value in axes.items() if isinstance(value, int)), None),
        "mode": "forward",
        "dtype": "float32",
        "device": "cpu",
        "threads": 2,
        "work": {"items": 1000, "unit": "tokens", "flop": 1e9, "bytes": 1e7},
        "skipped": [],
        "rounds": 8,
        "num_buffers": 4,
        "ceilings": {"flops": 2e11, "bandwidth": 2e10},
        "ceiling_drift": 0.01,
        "drift": 0.004,
        "cpu_share_of_others": 0.02,
        "contenders": contenders,
        "promises": [],
    }
    return {"family": family, "case": case, "axes": axes} | defaults | fields


def fake_run(slowdown: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """A run in which ours is linear in the tokens and the eager peer quadratic; `slowdown` is a factor on ours."""
    promise = {"of": "time", "at_least": None}
    groups = [
        group(
            "ffn",
            "base, forward",
            {"size": "base", "tokens": tokens},
            [
                contender("ours", "ours", slowdown * tokens * 1e-6, seed + tokens, peak_bytes=tokens * 1000),
                contender("eager", "peer", tokens**2 * 4e-9, seed + tokens + 1, peak_bytes=tokens**2 * 100),
                contender("bare matmuls", "yardstick", tokens * 0.9e-6, seed + tokens + 2),
            ],
            skipped=[{"name": "xformers <b>", "reason": "not installed: xformers | really"}],
            promises=[
                promise
                | {"contender": "ours", "against": "bare matmuls", "at_most": 1.06, "key": "ffn"}
                | {"measured": 1.11, "met": False}
            ],
        )
        for tokens in (64, 256, 1024)
    ]
    name = "import vlmo_fast"
    groups.append(
        group(
            "import",
            "a fresh interpreter",
            {},
            [contender(name, "ours", slowdown * 0.03, seed, peak_bytes=None)],
            promises=[
                promise
                | {"contender": name, "against": "import torch", "at_most": 0.1, "key": "import"}
                | {"measured": 0.02, "met": True}
            ],
        )
    )
    return {
        "schema": 1,
        "synthetic": True,
        "profile": "cpu",
        "started": "2001-01-01T00:00:00+00:00",
        "commit": {"id": "0" * 40, "changed": False},
        "machine": MACHINE,
        "groups": groups,
        "file": "invented.json",
    }
