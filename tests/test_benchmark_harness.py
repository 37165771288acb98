"""The harness that measures: a contender that is wrong fails, and what is stored is what happened."""

import json
import sys

import pytest
import torch
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.harness import Bench, Results, Settings, Work

SETTINGS = Settings("cpu", seconds=0.0, min_rounds=4, sample_seconds=0.0005)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "measure_ceilings", lambda device, dtype: {"flops": 1e11, "bandwidth": 1e10})
    monkeypatch.setattr(harness, "_cache_bytes", lambda device: 2048)
    return Bench(Results(tmp_path / "results.json", "cpu", torch.device("cpu")), SETTINGS, torch.device("cpu"))


def inputs(seed):
    return {"x": torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)), "scale": 3.0}


def gelu(x, scale):
    return {"y": scale * F.gelu(x)}


def group_of(bench, **options):
    return bench.group("toy", "gelu", inputs, oracle=gelu, work=Work(8, "rows", flop=1e3), axes={"rows": 8}, **options)


def test_contenders_are_measured_in_turn_and_stored(bench):
    order = []

    def watched(name):
        def run(x, scale):
            order.append(name)
            return gelu(x, scale)

        return run

    group = group_of(bench)
    group.ours("ours", watched("ours"))
    group.peer("peer", watched("peer"))
    group.yardstick("limit", lambda x, scale: x)
    record = group.run()
    assert record == bench.results.data["groups"][0]
    ours, peer, limit = record["contenders"]
    (stored,) = json.loads(bench.results.path.read_text())["groups"]
    assert stored["contenders"][0]["samples"] == pytest.approx(ours["samples"], rel=1e-5)
    assert [key for key in record if key != "contenders"] == [key for key in stored if key != "contenders"]
    assert [len(c["samples"]) for c in (ours, peer, limit)] == [4, 4, 4]
    assert ours["quartiles"][0] <= ours["median"] <= ours["quartiles"][1]
    assert ours["rate"] == 8 / ours["median"]
    assert ours["flops"] == 1e3 / ours["median"]
    assert ours["of_matmul_ceiling"] == ours["flops"] / 1e11
    assert 0 < ours["error"] < 1e-6
    assert limit["error"] is None
    # the rounds alternate who comes first
    rounds = "".join(name[0] for name in order[-(ours["calls_per_sample"] + peer["calls_per_sample"]) * 5 :])
    assert "op" in rounds and "po" in rounds


def test_a_peer_that_computes_something_else_fails(bench):
    group = group_of(bench)
    group.ours("ours", gelu)
    group.peer("tanh", lambda x, scale: {"y": scale * F.gelu(x, approximate="tanh")})
    with pytest.raises(AssertionError, match=r"tanh computes something else: y has relative error .* against float64"):
        group.run()
    (record,) = bench.results.data["groups"]
    assert "tanh computes something else" in record["failure"]
    assert [c["name"] for c in record["contenders"]] == ["ours"]  # who is right is measured all the same
    assert record["skipped"] == [{"name": "tanh", "reason": "failed: AssertionError"}]


def test_half_precision_may_err_twice_as_much_as_eager_but_never_be_garbage(bench):
    """A difference of nearly equal numbers: eager itself is far off in bfloat16."""

    def half(seed):
        return {"x": torch.randn(64, 16, generator=torch.Generator().manual_seed(seed)).bfloat16()}

    def cancelling(x):
        return {"y": (x + 32) - 32}

    def run(function, eager):
        group = bench.group(
            "toy", "cancel", half, oracle=cancelling, eager=eager, work=Work(1, "x"), dtype=torch.bfloat16
        )
        group.ours("ours", function)
        return group.run()

    with pytest.raises(AssertionError, match="something else"):
        run(cancelling, None)
    assert 0.02 < run(cancelling, cancelling)["contenders"][0]["error"] < 0.2
    run(lambda x: {"y": x + 0}, pytest.fail)  # nobody asks eager where the dtype's own bound is kept
    group = bench.group("toy", "cancel", half, oracle=lambda x: {"y": x}, work=Work(1, "x"), dtype=torch.bfloat16)
    group.ours("ours", cancelling, oracle=cancelling, eager=cancelling)  # its own answer, held to its own eager form
    assert group.run()["contenders"][0]["error"] > 0.02
    for garbage in (torch.zeros_like, torch.empty_like, lambda x: -x):
        with pytest.raises(AssertionError, match="something else"):
            run(lambda x, garbage=garbage: {"y": garbage(x)}, cancelling)


def test_one_bad_row_fails(bench):
    """It hides in the norm of many."""

    def run(x, scale):
        y = scale * F.gelu(x)
        y[3] *= 1 + 5e-4
        return {"y": y}

    def many(seed):
        return {"x": torch.randn(4096, 16, generator=torch.Generator().manual_seed(seed)), "scale": 3.0}

    group = bench.group("toy", "gelu", many, oracle=gelu, work=Work(4096, "rows"))
    group.ours("ours", run)
    with pytest.raises(AssertionError, match=r"relative error 1\.\d+e-05 \(cap 2e-05\), worst row [2-9]\.\d+e-04"):
        group.run()


@pytest.mark.parametrize("garbage", [torch.empty_like, lambda x: torch.full_like(x, float("nan")), torch.zeros_like])
def test_a_kernel_that_returns_garbage_fast_fails(bench, garbage):
    group = group_of(bench)
    group.ours("fast", lambda x, scale: {"y": garbage(x)})
    with pytest.raises(AssertionError, match="fast computes something else"):
        group.run()


def test_a_kernel_that_is_right_once_and_then_returns_what_it_has_fails(bench):
    """The first call is checked, but so is the last timed one, on another buffer."""
    kept = []

    def cached(x, scale):
        if not kept:
            kept.append(gelu(x, scale))
        return kept[0]

    group = group_of(bench)
    group.ours("cached", cached)
    group.promise("cached", at_most=1.0)
    with pytest.raises(AssertionError, match="cached computes something else"):
        group.run()
    (record,) = bench.results.data["groups"]
    assert record["contenders"] == [] and record["promises"][0]["met"] is None


def test_gradients_are_part_of_the_result(bench):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 3.0 * F.gelu(x)

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    group = group_of(bench, gradients=("x",))
    group.yardstick("limit", lambda x, scale: [x @ x.t()] * 2)
    group.peer("right", gelu)
    record = group.run()
    assert set(record["contenders"][1]["errors"]) == {"y", "d x"}
    group = group_of(bench, gradients=("x",))
    group.peer("wrong gradient", lambda x, scale: {"y": Doubled.apply(x)})
    with pytest.raises(AssertionError, match="wrong gradient computes something else: d x"):
        group.run()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, scale: {"y": scale * F.gelu(x.mul_(1.0))}, "changes its inputs"),
        (lambda x, scale: {"z": scale * F.gelu(x)}, r"returns \['z'\], the oracle \['y'\]"),
        (lambda x, scale: {"y": scale * F.gelu(x)[:4]}, r"shape \(4, 16\) instead of \(8, 16\)"),
    ],
    ids=["in place", "other names", "other shape"],
)
def test_other_ways_to_be_wrong(bench, function, message):
    group = group_of(bench)
    group.peer("peer", function)
    with pytest.raises(AssertionError, match=message):
        group.run()


def test_what_cannot_run_here_is_skipped_with_the_reason(bench):
    def refuses(x, scale):
        raise NotImplementedError("no kernel for this\nand more")

    group = group_of(bench)
    group.ours("ours", gelu)
    group.peer("absent", sys.exit, make=True, requires=("no_such_package",))
    group.peer("refuses", refuses, may_refuse=(NotImplementedError,))
    record = group.run()
    assert record["skipped"] == [
        {"name": "absent", "reason": "not installed: no_such_package"},
        {"name": "refuses", "reason": "NotImplementedError: no kernel for this"},
    ]
    group = group_of(bench)
    group.peer("refuses", refuses)
    with pytest.raises(NotImplementedError):
        group.run()


def test_a_package_that_is_there_and_does_not_work_is_skipped_with_the_reason(bench):
    """Whatever it raises, on import or at its first call; but not if what it computes is wrong."""

    def broken():
        raise OSError("libcudart.so.11 is missing\nand more")

    def runs_nowhere(x, scale):
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    group = group_of(bench)
    group.ours("ours", gelu)
    group.peer("broken", broken, make=True, requires=("json",))
    group.peer("runs nowhere", runs_nowhere, requires=("json",))
    record = group.run()
    assert [c["name"] for c in record["contenders"]] == ["ours"]
    assert record["skipped"] == [
        {"name": "broken", "reason": "OSError: libcudart.so.11 is missing"},
        {"name": "runs nowhere", "reason": "RuntimeError: 0 active drivers ([]). There should only be one."},
    ]
    group = group_of(bench)
    group.peer("wrong", lambda x, scale: {"y": x}, requires=("json",))
    with pytest.raises(AssertionError, match="wrong computes something else"):
        group.run()


def test_promises_are_judged_and_none_fails(bench):
    summaries = [
        {
            "name": "ours",
            "median": 2.0,
            "samples": [2.0, 4.0, 2.0],
            "peak_bytes": 100,
            "result_bytes": 90,
            "of_matmul_ceiling": 0.8,
        },
        {"name": "peer", "median": 3.0, "samples": [3.0, 6.0, 3.0], "peak_bytes": 170, "result_bytes": 90},
        {"name": "nothing", "peak_bytes": 90, "result_bytes": 95},
        {"name": "unknown", "median": 1.0, "samples": [1.0] * 3, "peak_bytes": None, "result_bytes": 0},
    ]
    group = group_of(bench)
    group.promise("ours", "peer", at_least=1.5)
    group.promise("ours", "peer", at_most=0.5)
    group.promise("ours", "peer", of="workspace", at_most=1 / 8)
    group.promise("ours", of="memory", at_most=100)
    group.promise("nothing", "peer", of="workspace", at_most=1 / 8)
    group.promise("ours", of="matmul", at_least=0.75)
    group.promise("ours", "absent", at_least=1.0)
    group.promise("ours", "unknown", of="memory", at_most=1.0)
    judged = [harness._judged(promise, summaries) for promise in group._promises]
    assert [(p["measured"], p["met"]) for p in judged] == [
        (1.5, True),
        (2 / 3, False),
        (0.125, True),
        (100, True),
        (1 / 80, True),
        (0.8, True),
        (None, None),
        (None, None),
    ]
    for wrong in ({}, {"at_least": 1.0, "at_most": 1.0}):
        with pytest.raises(ValueError, match="at_most or at_least"):
            group.promise("ours", "peer", **wrong)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is Linux's")
def test_peak_memory_sees_what_a_call_held_and_not_what_was_free_before():
    def held(megabytes):
        def run():
            temporary = torch.ones(megabytes * 2**18)
            return temporary[:10].clone()

        return run

    junk = [torch.ones(2**14) for _ in range(512)]  # 32 MiB in small pieces, then free in the heap
    del junk
    for megabytes in (4, 32):
        # The process is not alone with the call: a thread beside it, or a first use of something, only adds.
        calls = [harness.peak_memory(held(megabytes), torch.device("cpu")) for _ in range(3)]
        assert all(seconds > 0 for _, seconds in calls)
        assert min(measured for measured, _ in calls) == pytest.approx(megabytes * 2**20, rel=0.2)


def test_a_contender_may_answer_in_another_way(bench):
    group = group_of(bench)
    group.ours("ours", gelu)
    group.peer("half", lambda x, scale: {"y": F.gelu(x)}, oracle=lambda x, scale: {"y": F.gelu(x)})
    assert [c["error"] < 1e-6 for c in group.run()["contenders"]] == [True, True]


def test_a_contender_may_want_its_inputs_in_another_layout(bench):
    """Made before the clock runs, with an oracle and an upstream gradient of its own."""
    made = []

    def transposed(x, scale):
        made.append(x)
        return {"x": x.t(), "scale": scale}

    def padded(x, scale):
        return {"x": F.pad(x, (0, 0, 0, 2)), "scale": scale}

    group = group_of(bench, gradients=("x",), num_buffers=3)
    group.ours("ours", gelu)
    group.peer("transposed", gelu, layout=transposed, oracle=gelu)
    group.peer("padded", gelu, layout=padded, oracle=gelu)
    record = group.run()
    assert len(made) == 3
    assert [set(c["errors"]) for c in record["contenders"]] == [{"y", "d x"}] * 3
    group = group_of(bench, gradients=("x",))
    group.peer("wrong", lambda x, scale: {"y": scale * x}, layout=transposed, oracle=gelu)
    with pytest.raises(AssertionError, match="wrong computes something else"):
        group.run()
    with pytest.raises(ValueError, match="needs an oracle"):
        group_of(bench).peer("peer", gelu, layout=transposed)


def test_what_takes_minutes_runs_once(bench):
    calls = []

    def counted(x, scale):
        calls.append(x.dtype)
        return gelu(x, scale)

    group = group_of(bench, once=True)
    group.ours("ours", counted)
    group.promise("ours", of="memory", at_most=1e9)
    record = group.run()
    assert calls == [torch.float32]
    (ours,) = record["contenders"]
    assert len(ours["samples"]) == 1
    assert ours["error"] < 1e-6
    assert record["promises"][0]["met"] is (True if sys.platform == "linux" else None)
    group = group_of(bench, once=True)
    group.ours("ours", lambda x, scale: {"y": x})
    with pytest.raises(AssertionError, match="ours computes something else"):
        group.run()


def test_where_calls_are_long_none_is_made_for_memory_alone(bench):
    calls = []

    def counted(x, scale):
        calls.append(x)
        return gelu(x, scale)

    bench.settings = Settings("cpu", seconds=0.0, min_rounds=4, sample_seconds=0.0)
    for long, extra in ((False, 1), (True, 0)):
        calls.clear()
        group = group_of(bench, long=long, num_buffers=1)
        group.ours("ours", counted)
        (ours,) = group.run()["contenders"]
        assert len(calls) == 1 + extra + 4
        assert (ours["peak_bytes"] is not None) == (sys.platform == "linux")


def test_a_group_that_takes_the_process_along_says_so_in_the_file(bench):
    """What stands in the file while it runs is what stays there."""
    seen = []

    def watched(x, scale):
        seen.append(json.loads(bench.results.path.read_text())["groups"])
        return gelu(x, scale)

    group = group_of(bench)
    group.ours("ours", watched)
    group.run()
    assert all(len(groups) == 1 and "did not end" in groups[0]["failure"] for groups in seen)
    (stored,) = json.loads(bench.results.path.read_text())["groups"]
    assert "failure" not in stored


def test_a_run_is_gone_on_with(bench):
    group = group_of(bench)
    group.ours("ours", gelu)
    group.run()
    path, device = bench.results.path, torch.device("cpu")
    results = Results(path, "cpu", device)
    results.resume()
    results.add({"name": "another"})
    assert [g["name"] for g in json.loads(path.read_text())["groups"]] == ["toy: gelu, rows 8", "another"]
    with pytest.raises(ValueError, match="must be of the same profile, got cpu"):
        Results(path, "quick", device).resume()
    with pytest.raises(ValueError, match="must be of the same commit"):
        Results(path, "cpu", device, "0" * 40).resume()


def test_relative_error_counts_the_worst_row():
    reference = torch.ones(4, 9, dtype=torch.float64)
    result = reference.clone()
    result[2] += 0.1
    frobenius, worst = harness.relative_error(result, reference)
    assert frobenius == pytest.approx(0.05)
    assert worst == pytest.approx(0.1)
    assert harness.relative_error(torch.tensor(3), torch.tensor(4)) == (float("inf"), float("inf"))
    assert harness.relative_error(torch.tensor([4]), torch.tensor([4])) == (0.0, 0.0)


def test_the_table_shows_everything(bench):
    group = group_of(bench)
    group.ours("ours", gelu)
    group.peer("absent", gelu, requires=("no_such_package",))
    group.promise("ours", at_most=1e-9)
    text = harness.table(group.run())
    for part in ("toy: gelu, rows 8", "rows/s", "% of matmul", "MiB", "skipped: not installed", "NOT MET"):
        assert part in text


def test_promises_are_named_by_known_keys(bench):
    with pytest.raises(ValueError, match=r"promises\.py has no key 'nonsense'"):
        group_of(bench).promise("ours", "peer", at_least=1.0, key="nonsense")


def test_a_folder_is_for_a_kind_of_machine():
    """Generations of a processor under one name share it; their reports tell them apart."""
    machine = {"gpu": None, "cpu": "AMD EPYC, family 26 model 2", "cores": 2, "capability": "AVX512"}
    assert harness.machine_name(machine) == "amd-epyc-2-cores-avx512"
    assert harness.machine_name(machine | {"gpu": {"name": "NVIDIA H200"}}) == "nvidia-h200"
