"""From results files to the README's tables and plots and to one self-contained page; and what got slower.

    python -m benchmarks.report                       newest file of each machine in benchmarks/results/ -> README, page
    python -m benchmarks.report FILE... --page P      the page alone, from these files
    python -m benchmarks.report FILE... --table       a short table on the terminal
    python -m benchmarks.report --compare OLD NEW     exit status 1 if something of ours got worse beyond the noise

Nothing else writes between the README's markers, and no figure in there comes from anywhere but a results file. A ratio
is the median over the rounds of (other / ours) within the round, its interval the quartiles.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.promises import PROMISES, Promise

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks: written by python -m benchmarks.report -->", "<!-- benchmarks: end -->"
SCHEMA = 1
FAMILIES = {
    "model": "Whole model",
    "ffn": "Modality experts",
    "attention": "Attention",
    "contrastive": "Contrastive loss",
    "sampling": "Hard negatives",
    "retrieval": "Ranks and search",
    "search": "Two encoders against fusion",
    "packing": "Packing",
    "import": "Import",
}
NAMES = {"cpu": "CPU", "cuda": "GPU"}

Run = dict[str, Any]
Group = dict[str, Any]


class ReportError(Exception):
    """A results file cannot be used; the message says why."""


# Reading


def load(path: Path, *, synthetic: bool = False) -> Run:
    """A results file.

    Args:
        path: the JSON file.
        synthetic: accept invented figures, which tests use; a report of the project never does.

    Raises:
        ReportError: it is no results file of this version, or its figures are invented.
    """
    try:
        run: Run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        raise ReportError(f"{path}: not a results file of version {SCHEMA}")
    if run.get("synthetic") and not synthetic:
        raise ReportError(f"{path}: its figures are invented, for tests; no report is made of them")
    run["file"] = path.name
    return run


def newest(folder: Path) -> list[Path]:
    """The newest file of each machine's folder: of the last day that a name begins with, the one that started last.

    Raises:
        ReportError: several files are of that day, and one of them cannot be used.
    """
    machines = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    found = []
    for files in ([*machine.glob("*.json")] for machine in machines):
        last_day = [path for path in files if path.name[:10] == max(other.name[:10] for other in files)]
        found += last_day if len(last_day) < 2 else [max(last_day, key=lambda path: str(load(path)["started"]))]
    return found


def measured(run: Run) -> list[Group]:
    """Groups that were timed."""
    return [group for group in run["groups"] if any("median" in c for c in group.get("contenders", []))]


def failures(run: Run) -> list[Group]:
    """Groups in which something failed, or that did not end; of the first kind, what was right may be timed."""
    return [group for group in run["groups"] if "failure" in group]


def timed(group: Group) -> list[dict[str, Any]]:
    """Contenders that were timed."""
    return [contender for contender in group["contenders"] if "median" in contender]


def key_of(group: Group) -> tuple[str, ...]:
    """What a group is, in any run."""
    return group["name"], group["mode"], group["dtype"], group["device"]


def title(group: Group) -> str:
    """A group on one line, its family left out."""
    axes = ", ".join(f"{name} {number(value)}" for name, value in group["axes"].items())
    mode = "" if group["mode"] == "forward" else ", forward + backward"
    return f"{group['case']}{mode}{': ' if axes else ''}{axes}"


# Reckoning


@dataclass(frozen=True)
class Ratio:
    """How many times the time of `ours` another contender takes; quartiles of the rounds."""

    group: Group
    ours: str
    other: str
    role: str
    median: float
    low: float
    high: float


def ratios(group: Group) -> list[Ratio]:
    """The first of ours against each peer and yardstick."""
    contenders = timed(group)
    first = next((contender for contender in contenders if contender["role"] == "ours"), None)
    if first is None:
        return []
    found = []
    for other in contenders:
        if other["role"] == "ours":
            continue
        values = sorted(b / a for a, b in zip(first["samples"], other["samples"], strict=True))
        low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        found.append(Ratio(group, first["name"], other["name"], other["role"], median, low, high))
    return found


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Slope of the line through the logarithms: 1 is linear. None for fewer than three points."""
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True) if x > 0 and y > 0]
    if len({x for x, _ in points}) < 3:
        return None
    slope, _ = statistics.linear_regression(*zip(*points, strict=True))
    return slope


@dataclass(frozen=True)
class Series:
    """Groups that differ in one number alone, ascending in it."""

    family: str
    label: str
    x: str
    unit: str
    groups: tuple[Group, ...]

    def lines(self, of: str) -> dict[str, tuple[str, list[float], list[float]]]:
        """Of each contender its role, xs and ys; `of` is "median", "peak_bytes" or "error"."""
        lines: dict[str, tuple[str, list[float], list[float]]] = {}
        for group in self.groups:
            for contender in timed(group):
                if contender.get(of):
                    _, xs, ys = lines.setdefault(contender["name"], (contender["role"], [], []))
                    xs.append(group["axes"][self.x])
                    ys.append(contender[of])
        return lines


def series(run: Run) -> list[Series]:
    """All plots along a number that a run allows."""
    found: dict[tuple[Any, ...], list[Group]] = {}
    for group in measured(run):
        x = group["x"]
        if x is None or not isinstance(group["axes"].get(x), int | float):
            continue
        others = tuple((name, value) for name, value in group["axes"].items() if name != x)
        key = (group["family"], group["case"], group["mode"], group["dtype"], group["device"], x, others)
        found.setdefault(key, []).append(group)
    made = []
    for (family, case, mode, dtype, _, x, others), groups in found.items():
        if len({group["axes"][x] for group in groups}) < 2:
            continue
        parts = [case, *(f"{name} {value}" for name, value in others), mode.replace("+", " + "), dtype]
        groups.sort(key=lambda group: group["axes"][x])
        made.append(Series(family, ", ".join(parts), x, groups[0]["work"]["unit"], tuple(groups)))
    return made


@dataclass(frozen=True)
class Judged:
    """A promise, and the least favourable of its measurements."""

    promise: Promise
    measured: str
    met: bool | None
    where: str


def judged(runs: Iterable[Run]) -> list[Judged]:
    """Every promise of the project with what the runs measured, if anything."""
    found: dict[str, list[tuple[dict[str, Any], Group]]] = {}
    for run in runs:
        for group in run["groups"]:
            for promise in group.get("promises", []):
                found.setdefault(promise["key"], []).append((promise, group))
    rows = []
    for promise in PROMISES:
        known = [(p, g) for p, g in found.get(promise.key, []) if p["measured"] is not None]
        if not known:
            rows.append(Judged(promise, "not measured", None, ""))
            continue
        worst, group = min(known, key=lambda pair: _margin(pair[0]))
        value = worst["measured"]
        text = f"{value:.3g} ×" if worst["against"] else amount(value, worst["of"])
        rows.append(Judged(promise, text, all(p["met"] for p, _ in known), title(group) if len(known) > 1 else ""))
    return rows


def _margin(promise: Mapping[str, Any]) -> float:
    """How far inside its bound a promise is, as a factor."""
    if promise["at_least"] is None:
        return float(promise["at_most"] / promise["measured"])
    return float(promise["measured"] / promise["at_least"])


# Comparing


@dataclass(frozen=True)
class Change:
    """A contender of ours in two runs; `factor` is new / old, `noise` what a factor may differ from 1 by chance."""

    name: str
    contender: str
    of: str
    factor: float
    noise: float

    @property
    def worse(self) -> bool:
        """Whether it got worse beyond the noise."""
        return self.factor > 1 + self.noise


def compare(old: Run, new: Run) -> list[Change]:
    """Time, memory and error of ours in both runs.

    The noise of a time is three times what the runs themselves measured: the spread of the samples (half the distance
    of the quartiles), the drift over the rounds, and the change of the matmul ceiling between the runs; 5 % at least.
    Memory may grow by 10 % and 1 MiB, an error may double.
    """
    before = {key_of(group): group for group in measured(old)}
    changes = []
    for group in measured(new):
        earlier = before.get(key_of(group))
        if earlier is None:
            continue
        for now in timed(group):
            was = next((c for c in timed(earlier) if c["name"] == now["name"]), None)
            if was is None or now["role"] != "ours":
                continue
            parts = [_spread(was), _spread(now), earlier["drift"] or 0.0, group["drift"] or 0.0]
            parts.append(group["ceilings"]["flops"] / earlier["ceilings"]["flops"] - 1)
            noise = max(0.05, 3 * math.hypot(*parts))
            name = f"{group['family']}: {title(group)}"
            changes.append(Change(name, now["name"], "time", now["median"] / was["median"], noise))
            if now["peak_bytes"] and was["peak_bytes"]:
                slack = 0.1 + 2**20 / was["peak_bytes"]
                changes.append(Change(name, now["name"], "memory", now["peak_bytes"] / was["peak_bytes"], slack))
            if now["error"] and was["error"]:
                changes.append(Change(name, now["name"], "error", now["error"] / was["error"], 1.0))
    return changes


def _spread(contender: Mapping[str, Any]) -> float:
    low, high = contender["quartiles"]
    return float((high - low) / 2 / contender["median"])


# Words


def number(value: Any) -> str:
    """Thousands apart."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def seconds(value: float) -> str:
    """A time with its unit."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale:
            return f"{_digits(value / scale)} {unit}"
    return f"{_digits(value * 1e9)} ns"


def size(value: float | None) -> str:
    """Bytes with their unit."""
    if value is None:
        return "–"
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= scale:
            return f"{_digits(value / scale)} {unit}"
    return f"{value:.0f} B"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _digits(value: float) -> str:
    """Three digits, never in powers of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def rate(value: float, unit: str) -> str:
    """So many a second."""
    return f"{value:,.3g} {unit}/s" if value < 1e3 else f"{value:,.0f} {unit}/s"


def amount(value: float, of: str) -> str:
    """A time, a size or a share."""
    if of == "matmul":
        return f"{value:.0%}"
    return seconds(value) if of == "time" else size(value)


def machine_line(run: Run) -> str:
    """One line about the machine and the software."""
    machine = run["machine"]
    gpu, versions = machine["gpu"], machine["versions"]
    memory = size(machine["memory"])
    text = f"{machine['cpu']}, {machine['cores']} cores ({machine['capability']}), {memory}, {machine['system']}"
    if gpu:
        text = f"{gpu['name']} ({size(gpu['memory'])}, CUDA {gpu['cuda']}, driver {gpu['driver']}) with {text}"
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    built = ", ".join(machine["extensions"]) or "none"
    return f"{text}; {named}; extensions built: {built}"


def provenance(run: Run) -> str:
    """Commit, day and command of a run."""
    commit = run["commit"]
    identity = "an unknown commit" if not commit["id"] else f"commit {commit['id'][:10]}"
    changed = " with local changes" if commit["changed"] else ""
    profile = "" if run["profile"] == "all" else f" --{run['profile']}"
    return f"{identity}{changed}, {run['started'][:10]}, `pytest benchmarks{profile}`"


def conditions(run: Run) -> str:
    """How quiet the machine was."""
    groups = measured(run)
    others = [g["cpu_share_of_others"] for g in groups if g["cpu_share_of_others"] is not None]
    drifts = [abs(g["drift"]) for g in groups if g["drift"] is not None]
    texts = []
    if others:
        texts.append(
            f"other processes took {statistics.median(others):.0%} of the CPU time (at worst {max(others):.0%})"
        )
    if drifts:
        texts.append(
            f"times drifted by {statistics.median(drifts):.1%} over a group's rounds (at worst {max(drifts):.0%})"
        )
    return "; ".join(texts)


def promised_ratios(runs: Iterable[Run]) -> list[Ratio]:
    """Those of the groups in which something is promised: what the README's plot shows."""
    return [r for run in runs for group in measured(run) if group["promises"] for r in ratios(group)]


def slower(run: Run) -> list[Ratio]:
    """Where a peer is faster than ours, beyond the spread of the rounds."""
    return [r for group in measured(run) for r in ratios(group) if r.role == "peer" and r.high < 1]


# The README


def markdown(runs: Sequence[Run]) -> str:
    """What stands between the README's markers."""
    intro = (
        "Peers run in the same process on the same tensors, each checked against float64 before and after it is timed "
        "([how](benchmarks/harness.py)). Ratios are medians of interleaved rounds; more, with plots, is in "
        "[docs/benchmarks.html](docs/benchmarks.html)."
    )
    lines = [intro, ""]
    for device, text in (("cpu", "two CPU cores, float32"), ("cuda", "one NVIDIA H200, bfloat16")):
        rows = [row for row in judged(runs) if row.promise.device == device]
        if device == "cuda" and all(row.met is None for row in rows):
            lines += [
                f"<details><summary>On {text}: <b>not measured</b>, no GPU was at hand. The targets</summary>",
                "",
            ]
            lines += [f"- {row.promise.what}: {row.promise.bound}" for row in rows]
            lines += ["", "</details>", ""]
            continue
        lines += [f"| promised on {text} | bound | measured | |", "|---|---|---|---|"]
        for row in rows:
            state = {True: "met", False: "**not met**", None: "**not measured**"}[row.met]
            value = "–" if row.met is None else row.measured
            where = f" ({row.where})" if row.where else ""
            lines.append(f"| {row.promise.what}{where} | {row.promise.bound} | {value} | {state} |")
        lines.append("")
    for run in runs:
        lines += [f"Measured on {machine_line(run)}; {provenance(run)}. {sentence(conditions(run))}", ""]
        failed = failures(run)
        if failed:
            lines += ["**Failed**:", ""]
            lines += [f"- {html.escape(group['name'])}: {html.escape(group['failure'])}" for group in failed]
            lines.append("")
        losses = slower(run)
        if losses:
            lines.append("Where it is **not** faster:")
            lines.append("")
            lines += [
                f"- {FAMILIES.get(r.group['family'], r.group['family'])}, {title(r.group)}: {r.other} takes "
                f"{r.median:.2f} × our time"
                for r in losses
            ]
            lines.append("")
    if promised_ratios(runs):
        lines += ["![Time of each peer over ours](docs/benchmarks.svg)", ""]
    for run in runs:
        for family, groups in by_family(run):
            lines += [f"<details><summary>{FAMILIES.get(family, family)}, all figures</summary>", ""]
            lines += ["| problem | ours | rate | of the matmul ceiling | times ours | peak memory | error |"]
            lines += ["|---|---|---|---|---|---|---|"]
            lines += [markdown_row(group) for group in groups]
            lines += ["", "</details>", ""]
    return "\n".join(lines)


def markdown_row(group: Group) -> str:
    """A group as a row: the first of ours, and the others relative to it."""
    contenders = timed(group)
    ours = next((c for c in contenders if c["role"] == "ours"), contenders[0])
    share = ours["of_matmul_ceiling"]
    beside = [f"{r.other} {r.median:.2f}" + (" (a limit)" if r.role == "yardstick" else "") for r in ratios(group)]
    beside += [f"{c['name']} {c['median'] / ours['median']:.2f}" for c in contenders[1:] if c["role"] == "ours"]
    beside += [f"{skip['name']}: {skip['reason']}" for skip in group["skipped"]]
    unit = group["work"]["unit"]
    cells = [
        f"{title(group)} ({group['dtype']})",
        f"{ours['name']}: {seconds(ours['median'])} ± {_spread(ours):.0%}",
        rate(ours["rate"], unit),
        "–" if share is None else f"{share:.0%}",
        "; ".join(beside),
        size(ours["peak_bytes"]),
        "–" if ours["error"] is None else f"{ours['error']:.0e}",
    ]
    return "| " + " | ".join(html.escape(cell, quote=False).replace("|", "/") for cell in cells) + " |"


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def by_family(run: Run) -> list[tuple[str, list[Group]]]:
    """Groups of each family, in the report's order."""
    groups = measured(run)
    order = [*FAMILIES, *sorted({g["family"] for g in groups} - set(FAMILIES))]
    families = ((family, [g for g in groups if g["family"] == family]) for family in order)
    return [(family, members) for family, members in families if members]


def between_markers(readme: str, section: str) -> str:
    """The README with another section between its markers.

    Raises:
        ReportError: the markers are not there once each, in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ReportError(f"README.md: must hold {BEGIN!r} and {END!r} once each, in this order")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{section.strip()}\n{END}{after}"


# Plots

INK, OURS, PEERS, GRID = (
    "#1f2933",
    "#0b7285",
    ("#d9480f", "#862e9c", "#5c940d", "#a61e4d", "#364fc7", "#8d6e3f"),
    "#dfe3e8",
)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams |= {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "svg.hashsalt": "vlmo_fast",
        "svg.fonttype": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK,
        "axes.grid": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    from matplotlib import pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def plot_ratios(found: Sequence[Ratio]) -> str:
    """Bars: the time of each peer over ours, 1 marked; right of it ours is faster."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = _figure(9.0, 0.9 + 0.26 * len(found))
    labels = []
    for place, ratio in enumerate(found):
        color = "#868e96" if ratio.role == "yardstick" else OURS if ratio.median >= 1 else PEERS[0]
        axes.barh(place, ratio.median - 1, left=1, height=0.62, color=color)
        axes.plot([ratio.low, ratio.high], [place, place], color=INK, linewidth=1)
        at = max(ratio.high, ratio.median, 1)
        axes.annotate(f"{ratio.median:.2f}", (at, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        labels.append(f"{ratio.group['family']}: {title(ratio.group)} · {ratio.other}")
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    lowest, highest = min([0.8, *(r.low for r in found)]), max([1.25, *(r.high for r in found)])
    places = (1, 1.2, 1.5, 2, 3, 5, 8) if highest < 5 * lowest else (1, 2, 5)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=places))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(lowest / 1.1, highest * 1.25)
    axes.set_yticks(range(len(found)), labels, fontsize=8)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("time of the other / time of ours (log); lines: quartiles; grey: limits, not rivals", loc="right")
    return _svg(figure)


def plot_lines(line: Series, of: str) -> str:
    """Time or memory along a number, each contender's exponent in the legend."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure, axes = _figure(5.2, 3.7)
    peers = iter(PEERS * 4)
    for name, (role, xs, ys) in line.lines(of).items():
        slope = exponent(xs, ys)
        label = name if slope is None else f"{name}  (exponent {slope:.2f})"
        color = {"ours": OURS, "yardstick": "#868e96"}.get(role) or next(peers)
        style = "--" if role == "yardstick" else "-"
        axes.plot(
            xs, ys, style, marker="o", markersize=4, color=color, label=label, linewidth=2 if role == "ours" else 1.2
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10 if of == "median" else 2)
    if of == "median":
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ticks = sorted({group["axes"][line.x] for group in line.groups})
    axes.set_xticks(ticks, [number(tick) for tick in ticks], rotation=30 if len(ticks) > 6 else 0)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: amount(value, "time" if of == "median" else "memory"))
    )
    axes.set_xlabel(line.x)
    what = "time" if of == "median" else "peak memory beyond the inputs"
    axes.set_title(f"{what}\n{line.label}", fontsize=9, loc="left")
    axes.legend(fontsize=7, frameon=False)
    return _svg(figure)


def plot_roofline(run: Run) -> str | None:
    """Achieved rate against arithmetic intensity, below the two ceilings; None where no group tells its traffic.

    Of ours the first alone: others of ours may compute less than what the problem is counted as, the similarities of a
    contrastive loss once instead of twice, say.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator

    groups = [g for g in measured(run) if g["work"]["flop"] and g["work"]["bytes"]]
    firsts = ((g, next((c for c in timed(g) if c["role"] == "ours"), None)) for g in groups)
    points = [(g, c) for g, c in firsts if c is not None]
    if not points:
        return None
    figure, axes = _figure(7.6, 4.2)
    flops = max(g["ceilings"]["flops"] for g, _ in points)
    bandwidth = max(g["ceilings"]["bandwidth"] for g, _ in points)
    intensities = [g["work"]["flop"] / g["work"]["bytes"] for g, _ in points]
    xs = [min([*intensities, flops / bandwidth]) / 3, flops / bandwidth, max([*intensities, flops / bandwidth]) * 3]
    axes.plot(xs, [min(flops, bandwidth * x) for x in xs], color=INK, linewidth=1.5, label="measured ceilings")
    families = list(dict.fromkeys(g["family"] for g, _ in points))
    for place, family in enumerate(families):
        chosen = [(x, c["flops"]) for x, (g, c) in zip(intensities, points, strict=True) if g["family"] == family]
        color = [OURS, *PEERS][place % 7]
        axes.scatter(*zip(*chosen, strict=True), s=22, color=color, label=FAMILIES.get(family, family), zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte that the problem must move")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e9:,g}"))
    axes.minorticks_off()
    axes.set_ylabel("GFLOP/s")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return _svg(figure)


# The page

STYLE = """
body{font:15px/1.55 system-ui,sans-serif;color:#1f2933;background:#fff;margin:0 auto;max-width:1080px;padding:24px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:20px;margin:36px 0 8px;border-top:1px solid #dfe3e8;padding-top:20px}
h3{font-size:15px;margin:20px 0 4px}p{max-width:76ch}table{border-collapse:collapse;font-size:13px;margin:8px 0 16px}
th,td{padding:3px 10px 3px 0;text-align:left;vertical-align:top;border-bottom:1px solid #eceff3}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}tr.ours{background:#e6f4f6}
tr.yardstick{color:#687076}.met{color:#0b7285;font-weight:600}.not{color:#d9480f;font-weight:600}.none{color:#687076}
.plots{display:flex;flex-wrap:wrap;gap:12px}.plots svg{max-width:100%;height:auto}svg{max-width:100%;height:auto}
td.none,td.met,td.not{white-space:nowrap}.wide{overflow-x:auto}code{font-size:13px;background:#f3f5f7;padding:1px 4px}
"""


def page(runs: Sequence[Run]) -> str:
    """One self-contained page of everything in the files."""
    parts = ["<h1>vlmo_fast: benchmarks</h1>"]
    parts.append(
        "<p>Contenders of a group run interleaved in one process on the same rotating buffers. Each is held to a "
        "float64 oracle before it is timed, and its last timed result again after. Limits (bare matmuls, other models) "
        "are not rivals: they compute less or something else. What is slower is shown like what is faster.</p>"
    )
    parts.append("<h2>What the project promises</h2>" + _promises_table(runs))
    if not runs:
        parts.append("<p>Nothing has been measured yet.</p>")
    for run in runs:
        device = "cuda" if run["machine"]["gpu"] else "cpu"
        name = run["machine"]["gpu"]["name"] if run["machine"]["gpu"] else run["machine"]["cpu"]
        parts.append(f"<h2>{NAMES[device]}: {html.escape(name)}</h2>")
        parts.append(f"<p>{html.escape(machine_line(run))}.<br>Run: {html.escape(provenance(run)).replace('`', '')}; ")
        parts.append(f"file {html.escape(run['file'])}.<br>{html.escape(sentence(conditions(run)))}</p>")
        failed = failures(run)
        parts += [f'<p class="not">{html.escape(g["name"])} failed: {html.escape(g["failure"])}</p>' for g in failed]
        losses = slower(run)
        if losses:
            items = "".join(
                f"<li>{html.escape(r.group['family'])}, {html.escape(title(r.group))}: {html.escape(r.other)} takes "
                f"{r.median:.2f} × our time ({r.low:.2f} to {r.high:.2f})</li>"
                for r in losses
            )
            parts.append(f"<h3>Where ours is not faster</h3><ul>{items}</ul>")
        roofline = plot_roofline(run)
        if roofline:
            parts.append("<h3>Roofline</h3>" + roofline)
        lines = series(run)
        for family, groups in by_family(run):
            parts.append(f"<h2>{html.escape(FAMILIES.get(family, family))} ({NAMES[device]})</h2>")
            found = [ratio for group in groups for ratio in ratios(group)]
            if found:
                parts.append(plot_ratios(found))
            plots = [  # two in a row
                plot_lines(s, of) for s in lines if s.family == family for of in ("median", "peak_bytes") if s.lines(of)
            ]
            if plots:
                parts.append(f'<div class="plots">{"".join(plots)}</div>')
            parts += [_group_table(group) for group in groups]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>vlmo_fast: benchmarks</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _promises_table(runs: Sequence[Run]) -> str:
    rows = []
    for row in judged(runs):
        kind, state = {True: ("met", "met"), False: ("not", "not met"), None: ("none", "not measured")}[row.met]
        where = f" ({row.where})" if row.where else ""
        value = "" if row.met is None else row.measured
        rows.append(
            f"<tr><td>{NAMES[row.promise.device]}</td><td>{html.escape(row.promise.what + where).replace('`', '')}</td>"
            f'<td>{html.escape(row.promise.bound)}</td><td class="n">{html.escape(value)}</td>'
            f'<td class="{kind}">{state}</td></tr>'
        )
    head = '<tr><th></th><th>problem</th><th>bound</th><th class="n">measured</th><th></th></tr>'
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _group_table(group: Group) -> str:
    beside = {ratio.other: ratio for ratio in ratios(group)}
    head = (
        "contender",
        "median",
        "spread",
        "× ours",
        "rate",
        "of matmul",
        "of copy",
        "peak memory",
        "error",
        "worst row",
    )
    rows = []
    for contender in timed(group):
        ratio = beside.get(contender["name"])
        cells = [
            seconds(contender["median"]),
            f"± {_spread(contender):.1%}",
            "" if ratio is None else f"{ratio.median:.2f}",
            rate(contender["rate"], group["work"]["unit"]),
            "" if contender["of_matmul_ceiling"] is None else f"{contender['of_matmul_ceiling']:.0%}",
            "" if contender["of_copy_ceiling"] is None else f"{contender['of_copy_ceiling']:.0%}",
            size(contender["peak_bytes"]),
            "limit" if contender["role"] == "yardstick" else _error(contender["error"]),
            "" if contender["role"] == "yardstick" else _error(contender["worst_row"]),
        ]
        rows.append(
            f'<tr class="{contender["role"]}"><td>{html.escape(contender["name"])}</td>'
            + "".join(f'<td class="n">{html.escape(cell)}</td>' for cell in cells)
            + "</tr>"
        )
    for skip in group["skipped"]:
        text = f'{html.escape(skip["name"])}</td><td colspan="9">skipped: {html.escape(skip["reason"])}'
        rows.append(f'<tr class="yardstick"><td>{text}</td></tr>')
    heads = "".join(f'<th class="{"n" if place else ""}">{name}</th>' for place, name in enumerate(head))
    drift = "" if group["drift"] is None else f", drift {group['drift']:+.1%}"
    others = group["cpu_share_of_others"]
    share = "" if others is None else f", CPU time of others {others:.0%}"
    ceilings = group["ceilings"]
    note = (
        f"{group['rounds']} rounds, {group['num_buffers']} buffers, {group['threads']} threads, {group['dtype']}; "
        f"matmul {ceilings['flops'] / 1e9:,.0f} GFLOP/s, copy {ceilings['bandwidth'] / 1e9:,.1f} GB/s{drift}{share}"
    )
    return (
        f'<h3>{html.escape(title(group))}</h3><div class="wide"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'
        f'<p class="none">{html.escape(note)}</p>'
    )


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="results files; default: the newest of each machine")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="compare two files, write nothing"
    )
    parser.add_argument("--page", type=Path, help="write the page here, and leave the README alone")
    parser.add_argument("--table", action="store_true", help="print a short table, and write nothing")
    options = parser.parse_args(arguments)
    try:
        if options.compare:
            return show_changes(*(load(path) for path in options.compare))
        runs = [load(path) for path in options.files or newest(RESULTS)]
        runs.sort(key=lambda run: run["machine"]["gpu"] is not None)
        if options.table:
            print("\n".join(short_table(run) for run in runs))
            return 0
        if options.page:
            options.page.write_text(page(runs), encoding="utf-8")
            return 0
        write(runs, ROOT)
    except ReportError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    return 0


def write(runs: Sequence[Run], root: Path) -> None:
    """Write the README's section, its plot and the page.

    Raises:
        ReportError: a run's figures are invented, or the README has no markers.
    """
    if any(run.get("synthetic") for run in runs):
        raise ReportError("invented figures do not go into the README")
    readme = root / "README.md"
    text = between_markers(readme.read_text(encoding="utf-8"), markdown(runs))
    found = promised_ratios(runs)
    (root / "docs" / "benchmarks.html").write_text(page(runs), encoding="utf-8")
    if found:
        (root / "docs" / "benchmarks.svg").write_text(plot_ratios(found), encoding="utf-8")
    readme.write_text(text, encoding="utf-8")


def short_table(run: Run) -> str:
    """A line for each group and each promise of a run."""
    lines = [f"{machine_line(run)}\n{provenance(run)}\n{sentence(conditions(run))}"]
    lines += [f"FAILED {g['name']}: {g['failure'][:200]}" for g in failures(run)]
    for group in measured(run):
        first = next((c for c in timed(group) if c["role"] == "ours"), None)
        if first is None:
            continue
        share = "" if first["of_matmul_ceiling"] is None else f" {first['of_matmul_ceiling']:4.0%}"
        beside = ", ".join(f"{r.other} {r.median:.2f}" for r in ratios(group))
        lines.append(f"{group['family']}: {title(group)}: {seconds(first['median'])}{share} | times ours: {beside}")
    lines += [
        f"{'met' if row.met else 'NOT MET':<8}{row.measured:>10} (promised {row.promise.bound}) {row.promise.what}"
        for row in judged([run])
        if row.met is not None
    ]
    return "\n".join(lines)


def show_changes(old: Run, new: Run) -> int:
    """Print what changed between two runs; 1 if something of ours got worse, or failed."""
    changes = compare(old, new)
    if not changes:
        print("the files have no measurement in common")
        return 2
    worse = [change for change in changes if change.worse]
    for change in sorted(changes, key=lambda change: -change.factor):
        mark = "WORSE " if change.worse else "better" if change.factor < 1 / (1 + change.noise) else "      "
        figure = f"{change.of:<6} {change.factor:6.2f} ×  (noise ±{change.noise:.0%})"
        print(f"{mark} {figure}  {change.name}: {change.contender}")
    failed = failures(new)
    for group in failed:
        print(f"FAILED {group['name']}: {group['failure']}")
    before, after = (
        {(*key_of(g), c["name"]) for g in measured(run) for c in timed(g) if c["role"] == "ours"} for run in (old, new)
    )
    for name, *_, contender in sorted(before - after):
        print(f"absent from the new file: {name}: {contender}")
    if machine_line(old) != machine_line(new):
        print(f"not the same machine or software:\n  {machine_line(old)}\n  {machine_line(new)}")
    print(f"{len(worse)} of {len(changes)} figures got worse beyond the noise, {len(failed)} groups failed")
    return 1 if worse or failed else 0


if __name__ == "__main__":
    sys.exit(main())
