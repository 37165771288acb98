"""How everything under `benchmarks/` is measured: peers side by side, right before fast, and nothing hidden.

A benchmark is a pytest function that takes the fixture `bench`, describes one *group* (one problem, several contenders)
and runs it. `bench_model.py` is the living example; this is the shape of all of them:

    @pytest.mark.profile("quick", "cpu", gpu=1)              # which profiles run it; with a priority ("cpu" is cpu=0),
                                                             # 0 first: a profile stops where its time is up
    @pytest.mark.parametrize("tokens", [256, 2048])
    def bench_ffn_forward(bench: Bench, tokens: int) -> None:
        def inputs(seed: int) -> dict[str, Any]:              # called once for each rotating buffer
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(tokens, 768, generator=generator)
            return {"x": x.to(bench.device, bench.dtype), ...}

        group = bench.group(
            "ffn", "base, forward", inputs,
            oracle=reference.ffn,                             # gets the same inputs, promoted to float64
            axes={"tokens": tokens, "size": "base"}, x="tokens",
            work=Work(tokens, "tokens", flop=16 * 768**2 * tokens),
            # gradients=("x", "weights"),                     # forward + backward, every float tensor of these inputs
        )
        group.ours("ours", ops.mome_ffn)                      # each contender is called as contender(**inputs)
        group.peer("eager", reference.ffn)
        group.peer("torch.compile", lambda: torch.compile(reference.ffn), make=True, slow_start=True)
        group.peer("xformers", make_xformers, make=True, requires=("xformers",), may_refuse=(NotImplementedError,))
        group.yardstick("bare matmuls", bare_matmuls)         # not the same result: a limit to compare with
        group.promise("ours", "bare matmuls", at_most=1.06, key="ffn")  # of time; keys are those of promises.py
        group.promise("ours", "eager", at_least=1.0, key="ffn-loop")    # "at least as fast as"
        group.promise("ours", "eager", of="memory", at_most=1 / 8, key=...)
        group.run()

What `run` does, in this order:

1. Makes the buffers: as many as exceed the last cache, so that no contender meets its inputs warm. All share them.
2. Runs the oracle in float64 on the first and the last buffer. With `gradients`, all get one seeded upstream gradient.
3. Calls each contender once on the first buffer and compares *every* output and gradient: relative Frobenius error, and
   the worst row. Inside the cap of the dtype the error is stored beside the time. Beyond it the contender is not timed
   and the benchmark fails, after the others have been measured. So it does if a contender changes its inputs.
4. Measures its peak memory in one more call (where calls are long, in the first): bytes beyond what was there before,
   and how many of those are its results. CUDA: torch's allocator. CPU: the high-water mark of the process's resident
   memory, which the kernel keeps and which sees every allocator; free heap pages are handed back and the mark reset
   before the call (Linux only, else None).
5. Times all contenders in turn, round by round, in an order that rotates: a slow minute of the machine hits all alike.
   A sample loops over the buffers until it lasts long enough, then synchronises; all samples are stored.
6. Checks the last timed result of each contender, on the last buffer: what was timed is what is right.
7. Measures the matmul and the copy ceiling before and after; their change, the samples' change over the rounds and the
   CPU time that other processes took meanwhile are stored as well.

Nothing here asserts a time: a promise that is not met is stored as not met, and the report shows it. A group that kills
the process, or hangs until somebody does, stands in the file as one that did not end; `--resume` goes on behind it.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.promises import PROMISES
from vlmo_fast import extensions

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1

# Relative error at which a contender no longer computes the same thing: (Frobenius, worst row).
CAPS = {
    torch.float64: (1e-10, 1e-9),
    torch.float32: (2e-5, 2e-4),
    torch.float16: (5e-3, 5e-2),
    torch.bfloat16: (2e-2, 2e-1),
}


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        profile: "quick", "cpu", "gpu" or "all".
        seconds: time for the rounds of one group.
        min_rounds: rounds even where they take longer.
        max_rounds: rounds at most.
        sample_seconds: a sample loops until it takes about this long.
        limit: seconds after which no further group is started; None for no limit.
    """

    profile: str = "all"
    seconds: float = 6.0
    min_rounds: int = 7
    max_rounds: int = 60
    sample_seconds: float = 0.02
    limit: float | None = None


PROFILES = {
    "all": Settings(),
    "quick": Settings("quick", seconds=1.0, min_rounds=3, max_rounds=20, sample_seconds=0.005, limit=150.0),
    "cpu": Settings("cpu", seconds=4.0, min_rounds=7, limit=1140.0),
    "gpu": Settings("gpu", seconds=1.0, min_rounds=10, sample_seconds=0.01, limit=500.0),
}


@dataclass(frozen=True)
class Work:
    """What one call does, for the rates.

    Attributes:
        items: how many of `unit`.
        unit: "tokens", "pairs", "images", "texts", ...
        flop: floating-point operations that the problem needs (a multiply-add is 2), whoever computes it. 0: not told.
        bytes: traffic to memory that the problem needs. 0: not told.
    """

    items: float
    unit: str
    flop: float = 0.0
    bytes: float = 0.0


@dataclass
class _Contender:
    name: str
    role: str  # "ours", "peer" or "yardstick"
    function: Callable[..., Any]
    make: bool
    requires: tuple[str, ...]
    may_refuse: tuple[type[BaseException], ...]
    slow_start: bool
    oracle: Callable[..., Any]
    eager: Callable[..., Any] | None
    layout: Callable[..., Mapping[str, Any]] | None
    calls: int = 1
    seen: int = 0  # calls so far, to rotate the buffers
    samples: list[float] = field(default_factory=list)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    peak_bytes: int | None = None
    result_bytes: int = 0


@dataclass
class _Side:
    """What contenders with the same inputs and the same answer share."""

    oracle: Callable[..., Any]
    buffers: list[dict[str, Any]]
    upstream: list[Tensor] = field(default_factory=list)  # one gradient for each differentiable output
    known: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # the oracle's results on a buffer
    eager_errors: dict[str, tuple[float, float]] = field(default_factory=dict)


class Group:
    """One problem and its contenders; made by `Bench.group`."""

    def __init__(
        self,
        bench: Bench,
        family: str,
        case: str,
        inputs: Callable[[int], Mapping[str, Any]],
        oracle: Callable[..., Any],
        axes: Mapping[str, Any],
        x: str | None,
        work: Work,
        gradients: Sequence[str],
        num_buffers: int | None,
        dtype: torch.dtype,
        settings: Settings,
        once: bool,
        long: bool,
        memory: bool,
        eager: Callable[..., Any] | None,
    ) -> None:
        self.eager = eager
        self.bench, self.family, self.case = bench, family, case
        self.inputs, self.oracle, self.axes, self.x, self.work = inputs, oracle, dict(axes), x, work
        self.gradients, self.num_buffers, self.dtype, self.settings = tuple(gradients), num_buffers, dtype, settings
        self.once, self.long, self.memory = once, long, memory
        self._sides: dict[Any, _Side] = {}
        self._contenders: list[_Contender] = []
        self._promises: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.failures: list[Exception] = []

    @property
    def name(self) -> str:
        """Family, case and axes on one line."""
        return ", ".join([f"{self.family}: {self.case}", *(f"{key} {value}" for key, value in self.axes.items())])

    def ours(self, name: str, function: Callable[..., Any], **options: Any) -> None:
        """Add one of this project's implementations; options as for `peer`."""
        self._add("ours", name, function, **options)

    def peer(self, name: str, function: Callable[..., Any], **options: Any) -> None:
        """Add an implementation to compare with.

        Args:
            name: unique in the group.
            function: called as `function(**inputs)`; returns tensors like the oracle's, in any nesting.
            **options: `make`: `function()` is called first and returns the contender, so that imports and compilation
                happen only if it runs; `requires`: other packages' modules, without which it is skipped, the reason
                stored, as it is when they are there and their first call raises anything at all; `may_refuse`:
                exceptions of the first call that mean "not on this machine", for all others;
                `slow_start`: left out of --quick; `oracle`, and `eager` of `Bench.group` with it: its own, where it
                answers the question in another way;
                `layout`: `layout(**inputs)` gives its own form of the inputs (padded, stacked), made before the clock
                runs; its oracle then gets that form, too.
        """
        self._add("peer", name, function, **options)

    def yardstick(self, name: str, function: Callable[..., Any], **options: Any) -> None:
        """Add a limit to compare with, such as the bare matmuls of the problem.

        It is called without recording gradients, in groups with a backward pass too, and its result is not checked.
        """
        self._add("yardstick", name, function, **options)

    def _add(
        self,
        role: str,
        name: str,
        function: Callable[..., Any],
        *,
        make: bool = False,
        requires: Sequence[str] = (),
        may_refuse: tuple[type[BaseException], ...] = (),
        slow_start: bool = False,
        oracle: Callable[..., Any] | None = None,
        eager: Callable[..., Any] | None = None,
        layout: Callable[..., Mapping[str, Any]] | None = None,
    ) -> None:
        if name in [contender.name for contender in self._contenders]:
            raise ValueError(f"{self.name}: contender {name!r} is there already")
        if layout is not None and oracle is None:
            raise ValueError(f"{self.name}: {name!r} has a layout of its own and needs an oracle for it")
        if oracle is None:
            oracle, eager = self.oracle, self.eager
        contender = _Contender(
            name, role, function, make, tuple(requires), may_refuse, slow_start, oracle, eager, layout
        )
        self._contenders.append(contender)

    def promise(
        self,
        contender: str,
        against: str | None = None,
        *,
        of: str = "time",
        at_most: float | None = None,
        at_least: float | None = None,
        key: str = "",
    ) -> None:
        """Record what the project promises; the report shows it as met or not, the run never fails by it.

        Args:
            contender: whose figure.
            against: the contender compared with; None for an absolute bound (seconds, or bytes).
            of: "time"; "memory", the peak beyond the inputs; "workspace", the peak beyond inputs and results; or
                "matmul", the share of the matmul ceiling, which is absolute.
            at_most: bound of figure / the other's figure.
            at_least: bound of the other's figure / figure: how many times better; of "matmul" the share.
            key: its key in `promises.py`, by which the report finds it.
        """
        if (at_most is None) == (at_least is None):
            raise ValueError(f"{self.name}: a promise takes either at_most or at_least")
        if against is None and (at_least is None) == (of == "matmul"):
            raise ValueError(f"{self.name}: an absolute promise takes at_most, of matmul at_least")
        if key and key not in [known.key for known in PROMISES]:
            raise ValueError(f"{self.name}: promises.py has no key {key!r}")
        promise = {"contender": contender, "against": against, "of": of, "at_most": at_most, "at_least": at_least}
        self._promises.append(promise | {"key": key})

    # Measuring

    def run(self) -> dict[str, Any]:
        """Check, measure and store; returns the group's record.

        Raises:
            AssertionError: a contender computes something else.
        """
        self.bench.begin(self._describe() | {"failure": "did not end: the process died, or its time was up"})
        try:
            record = self._run()
        except Exception as error:
            self.failures.append(error)
            record = self._describe()
        if self.failures:
            record["failure"] = "; ".join(f"{type(error).__name__}: {error}" for error in self.failures)
        self.bench.store(record)
        if "contenders" in record:
            self.bench.show(self, record)
        if self.failures:
            raise self.failures[0]
        return record

    def _run(self) -> dict[str, Any]:
        device = self.bench.device
        buffers = self._buffers()
        self._sides = {None: _Side(self.oracle, buffers)}
        self._sides[self.oracle, None] = self._sides[None]
        ceilings = [measure_ceilings(device, self.dtype)]
        clock = _CpuClock()
        contenders = [contender for contender in self._contenders if self._or_fail(contender, self._prepare)]
        if not self.bench.timed:
            return self._describe() | {"contenders": [self._summary(c) for c in contenders], "promises": []}

        if not self.once:
            clock = _CpuClock()
            contenders = self._rounds(contenders)
        others = clock.share_of_others()
        ceilings.append(measure_ceilings(device, self.dtype))

        best = {key: max(ceiling[key] for ceiling in ceilings) for key in ceilings[0]}
        summaries = [self._summary(contender, best) for contender in contenders]
        relative = [[s / statistics.median(c.samples) for s in c.samples] for c in contenders]
        by_round = [statistics.median(column) for column in zip(*relative, strict=True)]
        first, last = by_round[: (len(by_round) + 1) // 2], by_round[len(by_round) // 2 :]
        return self._describe() | {
            "rounds": len(by_round),
            "num_buffers": len(buffers),
            "ceilings": best,
            "ceiling_drift": ceilings[1]["flops"] / ceilings[0]["flops"] - 1,
            "drift": statistics.median(last) / statistics.median(first) - 1 if by_round else None,
            "cpu_share_of_others": others,
            "contenders": summaries,
            "promises": [_judged(promise, summaries) for promise in self._promises],
        }

    def _or_fail(self, contender: _Contender, step: Callable[[_Contender], bool]) -> bool:
        """Whether a contender goes on: a wrong one gets no figures, and fails the benchmark after the rest has run."""
        try:
            return step(contender)
        except Exception as error:
            self.failures.append(error)
            self.skipped.append({"name": contender.name, "reason": f"failed: {type(error).__name__}"})
            return False

    def _rounds(self, contenders: list[_Contender]) -> list[_Contender]:
        """Time all in turn, then hold the last timed result of each to the oracle, on the last buffer."""
        deadline = time.perf_counter() + self.settings.seconds
        results: dict[str, dict[str, Tensor]] = {}
        rounds = 0
        while rounds < self.settings.min_rounds or (
            time.perf_counter() < deadline and rounds < self.settings.max_rounds
        ):
            for turn in range(len(contenders)):
                contender = contenders[(turn + rounds) % len(contenders)]
                seconds, last = self._sample(contender)
                contender.samples.append(seconds)
                if len(self._side(contender).buffers) == 1:
                    results[contender.name] = last
                del last
            rounds += 1

        def still_right(contender: _Contender) -> bool:
            if contender.role == "yardstick":
                return True
            side = self._side(contender)
            count = len(side.buffers)
            if count > 1:  # one more sample, such that its last call is on the last buffer
                contender.seen = count - contender.calls % count
                results[contender.name] = self._sample(contender)[1]
            self._check(contender, results.pop(contender.name), self._expected(side, count - 1))
            return True

        return [contender for contender in contenders if self._or_fail(contender, still_right)]

    def _describe(self) -> dict[str, Any]:
        return {
            "benchmark": getattr(self.bench.benchmark, "fullname", None),
            "family": self.family,
            "case": self.case,
            "name": self.name,
            "axes": self.axes,
            "x": self.x,
            "mode": "forward+backward" if self.gradients else "forward",
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.bench.device.type,
            "threads": torch.get_num_threads(),
            "work": vars(self.work),
            "skipped": self.skipped,
        }

    def _buffers(self) -> list[dict[str, Any]]:
        first = self._buffer(0)
        size = sum(tensor.nbytes for _, tensor in _tensors(first))
        wanted = 2 + math.floor(_cache_bytes(self.bench.device) / max(size, 1))
        count = 1 if self.once else self.num_buffers or min(max(wanted, 2), 8)
        return [first, *(self._buffer(seed) for seed in range(1, count))]

    def _buffer(self, seed: int) -> dict[str, Any]:
        return self._with_leaves(dict(self.inputs(seed)))

    def _with_leaves(self, buffer: dict[str, Any]) -> dict[str, Any]:
        for leaf in self._leaves(buffer):
            leaf.requires_grad_()
        return buffer

    def _side(self, contender: _Contender) -> _Side:
        """The buffers and answers of a contender, made when the first of its kind asks."""
        key = (contender.oracle, contender.layout)
        if key not in self._sides:
            buffers = self._sides[None].buffers
            if contender.layout is not None:
                with torch.no_grad():
                    made = [_map_tensors(dict(contender.layout(**buffer)), _own) for buffer in buffers]
                buffers = [self._with_leaves(buffer) for buffer in made]
            self._sides[key] = _Side(contender.oracle, buffers)
        return self._sides[key]

    def _leaves(self, buffer: Mapping[str, Any]) -> list[Tensor]:
        return [tensor for _, tensor in _tensors(self._chosen(buffer)) if tensor.is_floating_point()]

    def _chosen(self, buffer: Mapping[str, Any]) -> dict[str, Any]:
        return {name: buffer[name] for name in self.gradients}

    def _expected(self, side: _Side, index: int) -> dict[str, Tensor]:
        """The oracle's results on a buffer, in float64."""
        if index not in side.known:
            results = self._call(side, side.oracle, _map_tensors(side.buffers[index], _promote))
            side.known[index] = {name: tensor.detach() for name, tensor in results.items()}
        return side.known[index]

    def _results(self, contender: _Contender, index: int) -> dict[str, Tensor]:
        side = self._side(contender)
        if contender.role == "yardstick":
            with torch.no_grad():
                return dict(_tensors(contender.function(**side.buffers[index])))
        return self._call(side, contender.function, side.buffers[index])

    def _call(self, side: _Side, function: Callable[..., Any], buffer: Mapping[str, Any]) -> dict[str, Tensor]:
        """Named results of one call: its outputs, and with `gradients` those of the leaves."""
        if not self.gradients:
            with torch.no_grad():
                return dict(_tensors(function(**buffer)))
        results = dict(_tensors(function(**buffer)))
        outputs = [tensor for tensor in results.values() if tensor.requires_grad]
        if not side.upstream:  # the oracle comes first
            generator = torch.Generator().manual_seed(0)
            drawn = [torch.randn(o.shape, generator=generator) if o.ndim else torch.ones(()) for o in outputs]
            side.upstream = [tensor.to(self.bench.device, self.dtype) for tensor in drawn]
        upstream = [g.to(o.device, o.dtype) for g, o in zip(side.upstream, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, self._leaves(buffer), upstream)
        names = [name for name, tensor in _tensors(self._chosen(buffer)) if tensor.is_floating_point()]
        return results | {f"d {name}": gradient for name, gradient in zip(names, gradients, strict=True)}

    def _prepare(self, contender: _Contender) -> bool:
        """First calls: skip what cannot run here, check the results, measure memory, choose the length of a sample."""
        device, settings = self.bench.device, self.settings

        def skip(reason: str) -> bool:
            self.skipped.append({"name": contender.name, "reason": reason})
            return False

        missing = [name for name in contender.requires if importlib.util.find_spec(name) is None]
        if missing:
            return skip(f"not installed: {', '.join(missing)}")
        if contender.slow_start and settings.profile == "quick":
            return skip("takes long to start; left out of --quick")
        side = self._side(contender)
        checked = contender.role != "yardstick"
        expected = self._expected(side, 0) if checked else {}
        results: dict[str, Tensor] = {}

        def call() -> None:
            results.update(self._results(contender, 0))

        refusals = (Exception,) if contender.requires else contender.may_refuse
        versions = [tensor._version for _, tensor in _tensors(side.buffers[0])]
        try:
            if contender.make:
                contender.function = contender.function()
            if self.once or self.long:
                contender.peak_bytes, seconds = peak_memory(call, device)
            else:
                call()
                synchronize(device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return skip("out of memory")
        except refusals as error:
            return skip(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])
        if versions != [tensor._version for _, tensor in _tensors(side.buffers[0])]:
            raise AssertionError(f"{self.name}: {contender.name} changes its inputs")
        if checked:
            self._check(contender, results, expected)
        contender.result_bytes = sum(tensor.nbytes for tensor in results.values())
        results.clear()
        if self.once:
            contender.samples.append(seconds)
        elif self.bench.timed:
            if not self.long:
                contender.peak_bytes, seconds = peak_memory(call, device)
                results.clear()
            if seconds < settings.sample_seconds:
                seconds = min(self._sample(contender)[0] for _ in range(2))
            contender.calls = max(1, math.ceil(settings.sample_seconds / seconds))
        if not self.memory:
            contender.peak_bytes = None
        return True

    def _sample(self, contender: _Contender) -> tuple[float, dict[str, Tensor]]:
        """Seconds a call of one sample, and the last call's results."""
        device, count = self.bench.device, len(self._side(contender).buffers)
        collecting = gc.isenabled()
        gc.disable()
        try:
            synchronize(device)
            start = time.perf_counter()
            for _ in range(contender.calls):
                results = self._results(contender, contender.seen % count)
                contender.seen += 1
            synchronize(device)
            return (time.perf_counter() - start) / contender.calls, results
        finally:
            if collecting:
                gc.enable()

    def _check(self, contender: _Contender, results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        if set(results) != set(expected):
            raise AssertionError(
                f"{self.name}: {contender.name} returns {sorted(results)}, the oracle {sorted(expected)}"
            )
        for name, reference in expected.items():
            frobenius, worst_row = relative_error(results[name], reference)
            cap, row_cap = CAPS[self.dtype]
            if contender.eager is not None and not (frobenius <= cap and worst_row <= row_cap):
                cap, row_cap = self._wider_caps(contender, name)
            if not (frobenius <= cap and worst_row <= row_cap):  # NaN fails
                raise AssertionError(
                    f"{self.name}: {contender.name} computes something else: {name} has relative error {frobenius:.2e} "
                    f"(cap {cap:.0e}), worst row {worst_row:.2e} (cap {row_cap:.0e}) against float64"
                )
            before = contender.errors.get(name, (0.0, 0.0))
            contender.errors[name] = (max(frobenius, before[0]), max(worst_row, before[1]))

    def _wider_caps(self, contender: _Contender, name: str) -> tuple[float, float]:
        """Bounds that follow from what eager itself errs in the dtype."""
        assert contender.eager is not None
        side = self._side(contender)
        if not side.eager_errors:
            expected = self._expected(side, 0)
            results = self._call(side, contender.eager, side.buffers[0])
            side.eager_errors = {name: relative_error(results[name], expected[name]) for name in expected}
        errors = zip(CAPS[self.dtype], side.eager_errors[name], strict=True)
        frobenius, worst_row = (max(cap, min(2 * error, 0.9)) for cap, error in errors)
        return frobenius, worst_row

    def _summary(self, contender: _Contender, ceilings: Mapping[str, float] | None = None) -> dict[str, Any]:
        errors = {name: {"frobenius": f, "worst_row": w} for name, (f, w) in contender.errors.items()}
        summary: dict[str, Any] = {
            "name": contender.name,
            "role": contender.role,
            "errors": errors,
            "error": max((f for f, _ in contender.errors.values()), default=None),
            "worst_row": max((w for _, w in contender.errors.values()), default=None),
            "peak_bytes": contender.peak_bytes,
            "result_bytes": contender.result_bytes,
        }
        if not contender.samples or ceilings is None:
            return summary
        median = statistics.median(contender.samples)
        several = len(contender.samples) > 1
        low, _, high = statistics.quantiles(contender.samples, n=4) if several else [median] * 3
        work = self.work
        return summary | {
            "calls_per_sample": contender.calls,
            "median": median,
            "quartiles": [low, high],
            "best": min(contender.samples),
            "rate": work.items / median,
            "flops": work.flop / median or None,
            "bandwidth": work.bytes / median or None,
            "of_matmul_ceiling": work.flop / median / ceilings["flops"] or None,
            "of_copy_ceiling": work.bytes / median / ceilings["bandwidth"] or None,
            "samples": contender.samples,
        }


class Bench:
    """What the fixture `bench` is: the device, the dtype, and where results go."""

    def __init__(
        self, results: Results, settings: Settings, device: torch.device, benchmark: Any = None, show: Any = None
    ) -> None:
        self.results, self.settings, self.device = results, settings, device
        self.benchmark = benchmark  # pytest-benchmark's fixture
        self.timed = benchmark is None or benchmark.enabled
        self._show = show

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that benchmarks use here unless they say otherwise: bfloat16 on a GPU, else float32."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def group(
        self,
        family: str,
        case: str,
        inputs: Callable[[int], Mapping[str, Any]],
        *,
        oracle: Callable[..., Any],
        work: Work,
        axes: Mapping[str, Any] | None = None,
        x: str | None = None,
        gradients: Sequence[str] = (),
        num_buffers: int | None = None,
        dtype: torch.dtype | None = None,
        seconds: float | None = None,
        min_rounds: int | None = None,
        once: bool = False,
        long: bool = False,
        memory: bool = True,
        eager: Callable[..., Any] | None = None,
    ) -> Group:
        """Describe a group.

        Args:
            family: "ffn", "attention", "contrastive", "model", ...: a section of the report.
            case: what distinguishes this group within the family, apart from the axes; short, for people.
            inputs: `inputs(seed)` gives the keyword arguments of one buffer: tensors on the device, in any nesting.
            oracle: called as `oracle(**inputs)` with each float tensor promoted to float64 (and gradients wanted).
            work: what a call does.
            axes: sizes of this case, e.g. {"tokens": 2048, "size": "base"}: the report plots along numbers.
            x: the axis that a plot runs along.
            gradients: names of inputs; if any, forward and backward are measured, with gradients for their tensors.
            num_buffers: rotating buffers; None takes enough to exceed the caches, from 2 to 8.
            dtype: dtype of the error caps and of the matmul ceiling; None for `bench.dtype`.
            seconds: time for the rounds; None for the profile's.
            min_rounds: rounds even where they take longer; None for the profile's.
            once: for what takes minutes: each contender runs a single time, checked and measured in that one call.
            long: a call takes many seconds: memory is measured in the first one, not in one more.
            memory: whether this process's memory says anything about the contenders.
            eager: for long computations, the oracle's in the inputs' own dtype: twice its error is then allowed where
                that exceeds the cap of the dtype, but never an error of 0.9 (zeros make 1).
        """
        changes = {key: value for key, value in (("seconds", seconds), ("min_rounds", min_rounds)) if value is not None}
        settings = Settings(**(vars(self.settings) | changes)) if self.settings.profile != "quick" else self.settings
        dtype = self.dtype if dtype is None else dtype
        return Group(
            self,
            family,
            case,
            inputs,
            oracle,
            axes or {},
            x,
            work,
            gradients,
            num_buffers,
            dtype,
            settings,
            once,
            long,
            memory,
            eager,
        )

    def begin(self, record: dict[str, Any]) -> None:
        """Put into the results file what stands there if the group never ends."""
        self.results.add(record)

    def store(self, record: dict[str, Any]) -> None:
        """Put a group's record in place of its first one and, row by row, into pytest-benchmark's table."""
        self.results.replace(record)
        if self.benchmark is None:
            return
        self.benchmark._mode = "bench"  # its own clock is not used: the rows come from here
        for contender in record.get("contenders", []):
            if "samples" not in contender:
                continue
            row = copy.copy(self.benchmark)
            row.name, row.group = contender["name"], record["name"]
            row.fullname = f"{self.benchmark.fullname}::{record['name']}::{contender['name']}"
            row.extra_info = {key: contender[key] for key in contender if key != "samples"} | {
                "work": record["work"],
                "drift": record["drift"],
            }
            stats = row._make_stats(iterations=1)
            for sample in contender["samples"]:
                stats.update(sample)

    def show(self, group: Group, record: dict[str, Any]) -> None:
        """Print a group's table, where there is someone to print to."""
        if self._show is not None:
            self._show(table(record))


class Results:
    """The results file: written anew before and after each group, so that an interrupted run keeps what it measured.

    Args:
        path: the file; None writes none.
        profile: "quick", "cpu", "gpu" or "all".
        device: what is measured.
        identity: the commit, where git cannot be asked.
    """

    def __init__(self, path: Path | None, profile: str, device: torch.device, identity: str | None = None) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "profile": profile,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": {"id": identity, "changed": None} if identity else commit(),
            "machine": machine(device),
            "groups": [],
        }

    def resume(self) -> None:
        """Take over the groups of the run that wrote the file.

        Raises:
            ValueError: another profile, commit or machine was measured.
        """
        assert self.path is not None
        earlier = json.loads(self.path.read_text(encoding="utf-8"))
        for key in ("schema", "profile", "commit", "machine"):
            if earlier[key] != json.loads(json.dumps(self.data[key])):
                raise ValueError(f"--resume: {self.path} must be of the same {key}, got {earlier[key]}")
        self.data = earlier

    def add(self, record: dict[str, Any]) -> None:
        """Append a record and write the file."""
        self.data["groups"].append(record)
        self._write()

    def replace(self, record: dict[str, Any]) -> None:
        """Put a record in place of the last one and write the file."""
        self.data["groups"][-1] = record
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(to_json(self.data), encoding="utf-8")
        part.replace(self.path)


def to_json(data: dict[str, Any]) -> str:
    """Indented, with samples on one line and to six digits."""
    text = json.dumps(data, indent=1, allow_nan=False)
    numbers = re.compile(r"\[\s*(-?[\d.e+-]+(?:,\s*-?[\d.e+-]+)*)\s*\]")
    return numbers.sub(lambda found: f"[{', '.join(f'{float(n):.6g}' for n in found[1].split(','))}]", text) + "\n"


# Figures


def _judged(promise: dict[str, Any], summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """A promise with `measured`, the ratio or the figure, and `met`, whether it holds; None where unknown."""
    by_name = {summary["name"]: summary for summary in summaries}
    ours, other = (by_name.get(promise[side]) for side in ("contender", "against"))
    measured = None
    if promise["against"] is None:
        measured = _figure(ours, promise["of"])
    elif promise["of"] == "time":
        measured = _times_faster(ours, other)
    else:
        figure, others = _figure(ours, promise["of"]), _figure(other, promise["of"])
        if figure is not None and others is not None:
            measured = max(others, 1) / max(figure, 1)  # bytes; no workspace at all is no division by zero
    if measured and promise["against"] and promise["at_least"] is None:
        measured = 1 / measured
    met = None
    if measured is not None:
        met = measured <= promise["at_most"] if promise["at_least"] is None else measured >= promise["at_least"]
    return promise | {"measured": measured, "met": met}


def _times_faster(ours: dict[str, Any] | None, other: dict[str, Any] | None) -> float | None:
    """Median over the rounds of the other's time over ours in the round, as everywhere in the report."""
    if not ours or not other or not ours.get("samples") or not other.get("samples"):
        return None
    return statistics.median(b / a for a, b in zip(ours["samples"], other["samples"], strict=True))


def _figure(summary: dict[str, Any] | None, of: str) -> float | None:
    if summary is None:
        return None
    if of in ("time", "matmul"):
        return summary.get("median" if of == "time" else "of_matmul_ceiling")
    if summary["peak_bytes"] is None:
        return None
    if of == "memory":
        return summary["peak_bytes"]
    if of == "workspace":
        return max(summary["peak_bytes"] - summary["result_bytes"], 0)
    raise ValueError(f"a promise must be of time, memory, workspace or matmul, got {of!r}")


def relative_error(result: Tensor, reference: Tensor) -> tuple[float, float]:
    """Relative Frobenius error of a tensor, and the worst row's error relative to the root mean square of row norms."""
    if result.shape != reference.shape:
        raise AssertionError(f"shape {tuple(result.shape)} instead of {tuple(reference.shape)}")
    if not reference.is_floating_point():
        return (0.0, 0.0) if torch.equal(result, reference) else (math.inf, math.inf)
    rows = max(reference.numel() // reference.shape[-1], 1) if reference.ndim and reference.numel() else 1
    difference = (result.detach().to(reference.device, torch.float64) - reference).reshape(rows, -1)
    norm = reference.norm().item()
    total, worst = difference.norm().item(), difference.norm(dim=1).max().item()
    if norm == 0.0:
        return total, worst
    return total / norm, worst / (norm / math.sqrt(rows))


def table(record: dict[str, Any]) -> str:
    """A group's results as lines of text: time, spread, against the first of ours, rate, ceilings, memory, error."""
    lines = [f"{record['name']} [{record['mode']}, {record['dtype']}, {record['device']}]"]
    timed = [contender for contender in record["contenders"] if "median" in contender]
    base = next((contender for contender in timed if contender["role"] == "ours"), timed[0] if timed else None)
    for contender in timed:
        low, high = contender["quartiles"]
        peak = "-" if contender["peak_bytes"] is None else f"{contender['peak_bytes'] / 2**20:.1f} MiB"
        share = contender["of_matmul_ceiling"]
        error = "-" if contender["error"] is None else f"{contender['error']:.1e}"
        lines.append(
            f"  {contender['name']:<28} {contender['median'] * 1e3:>10.3f} ms "
            f"±{(high - low) / 2 / contender['median']:>4.0%} {contender['median'] / base['median']:>6.2f}x "
            f"{contender['rate']:>12,.0f} {record['work']['unit']}/s "
            f"{'' if share is None else f'{share:.0%} of matmul'} {peak} "
            f"{'yardstick' if contender['role'] == 'yardstick' else error}"
        )
    lines += [f"  {skip['name']:<28} skipped: {skip['reason']}" for skip in record["skipped"]]
    for promise in record["promises"]:
        state = {True: "met", False: "NOT MET", None: "not measured"}[promise["met"]]
        bound = f"<= {promise['at_most']:.4g}" if promise["at_least"] is None else f">= {promise['at_least']:.4g}"
        measured = "-" if promise["measured"] is None else f"{promise['measured']:.4g}"
        against = f" against {promise['against']}" if promise["against"] else ""
        lines.append(f"  promise: {promise['of']} of {promise['contender']}{against} {bound}: {measured}, {state}")
    return "\n".join(lines)


# The machine


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Best rate of a square matmul in `dtype` (FLOP/s) and of a copy (bytes/s, read and write), of a few tries."""
    (a, b, c), (source, target) = _ceiling_tensors(device, torch.float32 if dtype == torch.float64 else dtype)

    def best(function: Callable[[], Any]) -> float:
        times = []
        for _ in range(10 if device.type == "cuda" else 4):
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times)

    with torch.no_grad():
        return {
            "flops": 2 * len(a) ** 3 / best(lambda: torch.mm(a, b, out=c)),
            "bandwidth": 2 * len(source) / best(lambda: target.copy_(source)),
        }


@cache
def _ceiling_tensors(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    side, copied = (8192, 2**30) if device.type == "cuda" else (2048, 2**26)
    matrices = [torch.randn(side, side, device=device).to(dtype) for _ in range(3)]
    return matrices, [torch.ones(copied, dtype=torch.uint8, device=device) for _ in range(2)]


def peak_memory(function: Callable[[], Any], device: torch.device) -> tuple[int | None, float]:
    """What a call needs.

    Returns:
        Bytes that it holds at its peak beyond what was there before, its results included (None if unknown here), and
        the seconds that it took.
    """
    gc.collect()
    before: int | None = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            before = _status("VmRSS")
        except (OSError, AttributeError):
            pass
    start = time.perf_counter()
    function()
    synchronize(device)
    seconds = time.perf_counter() - start
    if before is None:
        return None, seconds
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")
    return max(peak - before, 0), seconds


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found[1]) * 1024


class _CpuClock:
    """How much of the machine's CPU time others took since it was made (Linux; elsewhere unknown)."""

    def __init__(self) -> None:
        self.start = self._read()

    def share_of_others(self) -> float | None:
        """CPU time of other processes and of the hypervisor, as a share of all cores' time."""
        end = self._read()
        if self.start is None or end is None:
            return None
        busy, everything, own = (after - before for before, after in zip(self.start, end, strict=True))
        return min(max((busy - own) / max(everything, 1e-9), 0.0), 1.0)

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        try:
            fields = [int(part) for part in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        tick = os.sysconf("SC_CLK_TCK")
        idle, own = fields[3] + fields[4], os.times()
        return (sum(fields) - idle) / tick, sum(fields) / tick, sum(own[:4])


def _cache_bytes(device: torch.device) -> int:
    """Size of the last cache; inputs that exceed it are cold."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20))
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()).groups()
        sizes.append(int(number) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[unit])
    return max(sizes) or 32 * 2**20


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to: processor, memory, GPU, versions."""
    cpu = platform.processor() or platform.machine()
    memory = None
    try:
        told = dict(re.findall(r"^([a-z ]+?)\s*:[ \t]*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
        cpu = told.get("model name", cpu)
        if "cpu family" in told and "model" in told:  # a virtual machine's name may be that of several generations
            cpu += f", family {told['cpu family']} model {told['model']}"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        pass
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    peers = ("xformers", "open-clip-torch", "inf-cl", "cut-cross-entropy", "liger-kernel")
    versions |= {name: _installed(name) for name in ("triton", "transformers", *peers)}
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "name": properties.name,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return {
        "cpu": re.sub(r"\s+", " ", cpu).strip(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory": memory,
        "system": platform.system(),
        "gpu": gpu,
        "versions": versions,
        "extensions": [name for name in extensions.NAMES if extensions.is_built(name)],
    }


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_name(description: Mapping[str, Any]) -> str:
    """A folder's name for a kind of machine: nvidia-h200, amd-epyc-2-cores-avx512."""
    gpu, cpu = description["gpu"], description["cpu"].partition(", family")[0]
    text = gpu["name"] if gpu else f"{cpu} {description['cores']} cores {description['capability']}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def commit() -> dict[str, Any]:
    """The checkout's commit, and whether files differ from it; None outside a checkout."""
    identity = _output("git", "rev-parse", "HEAD")
    return {"id": identity, "changed": bool(_output("git", "status", "--porcelain")) if identity else None}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


# Nested tensors


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of a nesting of mappings, sequences and named tuples, with dotted names; other values are passed over."""
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from _tensors(value._asdict(), name)
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _tensors(part, f"{name}.{index}" if name else str(index))


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map_tensors(part, function) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_tensors(part, function) for part in value))
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(part, function) for part in value)
    return value


def _own(tensor: Tensor) -> Tensor:
    """A copy that is a leaf."""
    return tensor.detach().clone()


def _promote(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(torch.float64).requires_grad_(tensor.requires_grad)
