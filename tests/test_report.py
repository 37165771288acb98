"""The demo's report as a document: well formed, self-contained, escaped, honest, and made of the results alone."""

import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_results import fake_results
from hypothesis import given
from hypothesis import strategies as st

from vlmo_fast.demo.report import _ticks, write_report
from vlmo_fast.demo.results import DemoResults, QuestionResults

pytest.importorskip("PIL")

VOID = {"meta", "link", "img", "br"}
KEPT_KEYS = {"all", "step", "learning_rate"}  # names with a meaning of their own
HOSTILE = "</style></title><script>alert(\"1\")</script><img src=x onerror='alert(2)'>&amp;"


class Page(HTMLParser):
    """A page taken apart; fails where tags are not balanced."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = source
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice: {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert self._open.count("svg"), f"<{tag}/> outside SVG"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def results() -> DemoResults:
    return fake_results()


@pytest.fixture
def render(tmp_path: Path) -> Callable[[DemoResults], Page]:
    def render(results: DemoResults) -> Page:
        path = tmp_path / "report.html"
        write_report(results, path)
        return Page(path.read_text(encoding="utf-8"))

    return render


def rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same results with `change` applied to each leaf and to each name that is a dictionary's key."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: rebuilt(getattr(value, field.name), change) for field in dataclasses.fields(value)}
        return replace(value, **fields)
    if isinstance(value, dict):
        return {
            change(key) if isinstance(key, str) and key not in KEPT_KEYS else key: rebuilt(item, change)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)(rebuilt(item, change) for item in value)
    return change(value)


def changed_examples(results: DemoResults, change: Callable[[list[Any]], list[Any]]) -> DemoResults:
    """The same results with `change` applied to every list of examples."""
    parts = {}
    for name in ("retrieval", "easy_vqa", "scene_questions", "statements"):
        part = getattr(results, name)
        fields = [field.name for field in dataclasses.fields(part) if field.name.endswith("examples")]
        parts[name] = replace(part, **{field: change(getattr(part, field)) for field in fields})
    return replace(results, **parts)


def small(results: DemoResults) -> DemoResults:
    """The same results with three logged steps, one or two examples of each kind, and the corners of their pictures."""

    def corner(value: Any) -> Any:
        return value[:4, :4] if isinstance(value, np.ndarray) else value

    few = changed_examples(results, lambda examples: examples[:2])
    return rebuilt(replace(few, history=results.history[:120:40]), corner)


def without_examples(results: DemoResults) -> DemoResults:
    return changed_examples(results, lambda _: [])


# Structure


def test_document_outline(results: DemoResults, render: Callable[[DemoResults], Page]) -> None:
    page = render(results)
    assert page.source.startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == len(page.all("title")) == len(page.all("main")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_what_assistive_technology_needs(results: DemoResults, render: Callable[[DemoResults], Page]) -> None:
    page = render(results)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {link["href"] for link in page.all("a")} <= {f"#{anchor}" for anchor in ids}
    assert {section["aria-labelledby"] for section in page.all("section")} <= set(ids)
    assert all(picture["alt"] for picture in page.all("img"))
    assert all(header["scope"] in ("col", "row") for header in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) == 5
    for tag, attributes in page.tags:
        if attributes.get("role") in ("img", "region"):
            assert attributes["aria-label"], tag
    assert all("aria-label" in drawing or drawing["aria-hidden"] == "true" for drawing in page.all("svg"))


def test_synthetic_data_is_called_synthetic(results: DemoResults, render: Callable[[DemoResults], Page]) -> None:
    page = render(results)
    assert all("synthetic" in (picture["alt"] or "").lower() for picture in page.all("img"))


def test_nothing_is_loaded(results: DemoResults, render: Callable[[DemoResults], Page]) -> None:
    page = render(results)
    assert not {"script", "iframe", "object", "embed", "base", "form", "video", "audio", "image", "use", "source"} & {
        tag for tag, _ in page.tags
    }
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "xlink:href", "data", "action", "poster"):
                assert re.match(r"#|data:image/png;base64,|data:,$", value or ""), (tag, name, value)
            if name == "style":
                assert "url" not in (value or "")
    assert "url(" not in page.source
    assert "@import" not in page.source
    policies = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_same_results_same_bytes(results: DemoResults, render: Callable[[DemoResults], Page]) -> None:
    assert render(results).source == render(results).source


def test_right_picture_is_marked_once_a_search(results: DemoResults, render: Callable[[DemoResults], Page]) -> None:
    page = render(results)
    marked = sum(example.right is not None for example in results.retrieval.examples)
    assert [item.get("class") for item in page.all("li")].count("right") == marked
    assert f"right one at place 17 of {results.retrieval.num_scenes:,}" in page.text
    captions = page.text.partition("Captions found by picture")[2].partition("Questions: easy-VQA")[0]
    shown = results.retrieval.caption_examples[:4]
    assert captions.count("✓ right") == sum(example.right is not None for example in shown) == 3
    assert f"right one at place 23 of {results.retrieval.num_scenes:,}" in captions


# Every number is of the results


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each value."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), (*path, field.name))
    elif isinstance(value, (dict, list, tuple)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))
    elif value is not None:
        yield path


def changed(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """The results with another value at the end of a path."""
    if not path:
        if isinstance(value, np.ndarray):
            return 255 - value
        if isinstance(value, bool):
            return not value
        return value + "x" if isinstance(value, str) else value + 1 if isinstance(value, int) else 0.7 * value + 0.01
    key, rest = path[0], path[1:]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{key: changed(getattr(value, key), rest)})
    if isinstance(value, dict):
        return {**value, key: changed(value[key], rest)}
    return type(value)(changed(item, rest) if n == key else item for n, item in enumerate(value))


def test_every_value_of_the_results_is_shown(results: DemoResults, tmp_path: Path) -> None:
    results = small(results)
    before, after = tmp_path / "before.html", tmp_path / "after.html"
    write_report(results, before)
    unseen = []
    for path in leaves(results):
        write_report(changed(results, path), after)
        if after.read_bytes() == before.read_bytes():
            unseen.append(path)
    assert unseen == []


def test_no_share_but_those_of_the_results(results: DemoResults, render: Callable[[DemoResults], Page]) -> None:
    """With one value for every share there is one percentage on the page."""

    def same(value: Any) -> Any:
        return 0.123 if isinstance(value, float) else value

    page = render(replace(rebuilt(results, same), history=results.history))
    spoken = " ".join(str(attributes.get("aria-label", "")) for _, attributes in page.tags)
    assert set(re.findall(r"[\d.]+(?=\s%)", f"{page.text} {spoken}")) == {"12.3"}
    cells = set(re.findall(r"<td>([\d.,]+)</td>", page.source))
    assert {cell for cell in cells if "." in cell} == {"12.3"}


def test_headline_says_the_outcome(results: DemoResults, render: Callable[[DemoResults], Page]) -> None:
    (headline,) = re.findall(r"<h1>(.*?)</h1>", render(results).source, re.DOTALL)
    text = re.sub(r"<[^>]+>", "", headline).replace("\u00a0", " ")
    for part in ("9 min 12 s", "84.2 %", "among 1,000", "92.1 %", "88.0 %"):
        assert part in text


# What the prose claims


def with_scores(results: QuestionResults, fusion: float, control: float, guesser: float) -> QuestionResults:
    return replace(
        results,
        num_questions={"all": 1000},
        accuracy={"all": fusion},
        no_fusion={"all": control},
        baselines={"question only": {"all": guesser}},
    )


@pytest.mark.parametrize(
    ("fusion", "control", "guesser", "claims"),
    [
        (0.99, 0.98, 0.67, ["easy-VQA does not need fusion", "percentage points more"]),  # within the noise
        (0.90, 0.98, 0.67, ["better than fusion", "easy-VQA does not need fusion"]),
        (0.99, 0.94, 0.67, ["a gap of 5.0 percentage points", "easy-VQA gains from fusion"]),
        (0.95, 0.60, 0.67, ["a large gap of 35.0 percentage points", "28.0 percentage points more"]),
        (0.50, 0.50, 0.67, ["in this run fusion gained nothing", "the network does not beat it"]),
    ],
    ids=["equal", "worse", "gap", "large gap", "nothing learned"],
)
def test_claims_about_fusion(
    fusion: float,
    control: float,
    guesser: float,
    claims: list[str],
    results: DemoResults,
    render: Callable[[DemoResults], Page],
) -> None:
    part = with_scores(results.easy_vqa, fusion, control, guesser)
    text = render(replace(without_examples(results), easy_vqa=part)).text
    section = text.partition("Questions: easy-VQA")[2].partition("Questions: scenes")[0]
    for claim in claims:
        assert claim in section
    assert ("does not need" in section) + ("gains from" in section) + ("gained nothing" in section) == 1


def test_claims_about_retrieval(results: DemoResults, render: Callable[[DemoResults], Page]) -> None:
    results = without_examples(results)
    assert "the network reads the layout, too" in render(results).text
    poor = replace(results.retrieval, text_to_image={1: 0.26, 5: 0.9})
    text = render(replace(results, retrieval=poor)).text
    assert "nothing here shows that the network reads the layout" in text
    assert "reads the layout, too" not in text


@pytest.mark.parametrize(
    ("share", "claim"),
    [(0.51, "no better than a coin."), (0.6, "better than a coin, but far"), (0.95, "embeddings tell which object")],
)
def test_claims_about_twins(
    share: float, claim: str, results: DemoResults, render: Callable[[DemoResults], Page]
) -> None:
    part = replace(without_examples(results).retrieval, twin_accuracy=share)
    assert claim in render(replace(results, retrieval=part)).text


# Hostile, missing and excessive input


def test_texts_are_escaped(results: DemoResults, render: Callable[[DemoResults], Page]) -> None:
    results = small(results)
    harmless = render(results)
    page = render(rebuilt(results, lambda value: value + HOSTILE if isinstance(value, str) else value))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    assert HOSTILE not in page.source
    assert "<script" not in page.source
    assert page.text.count(HOSTILE) > 50
    assert all(HOSTILE in (picture["alt"] or "") for picture in page.all("img"))


def test_without_examples(results: DemoResults, render: Callable[[DemoResults], Page]) -> None:
    page = render(without_examples(results))
    assert page.all("img") == []
    assert page.text.count("No examples were kept.") == 5


def test_without_anything(results: DemoResults, render: Callable[[DemoResults], Page]) -> None:
    empty = rebuilt(without_examples(results), lambda value: value)
    nothing = {
        name: replace(part, **{f.name: {} for f in dataclasses.fields(part) if isinstance(getattr(part, f.name), dict)})
        for name in ("retrieval", "easy_vqa", "scene_questions", "statements")
        for part in [getattr(empty, name)]
    }
    page = render(replace(empty, **nothing, recipe={}, machine={}, history=[], backends=[], attribution=[]))
    assert "No step was logged." in page.text
    assert "–" in page.text


def test_types_that_some_rows_lack(results: DemoResults, render: Callable[[DemoResults], Page]) -> None:
    """As easy-VQA's oracles are: known for all questions together, not by type."""
    part = replace(results.easy_vqa, baselines={"colour only": {"all": 0.8}}, no_fusion={"shape": 0.9, "new": 0.777})
    page = render(replace(without_examples(results), easy_vqa=part))
    row = re.search(r'<th scope="row">colour only</th>(.*?)</tr>', page.source)
    assert row
    assert re.findall(r"<td>(.*?)</td>", row[1]) == ["–", "–", "–", "–", "80.0"]
    assert "77.7" in page.text


@pytest.mark.parametrize(
    "history",
    [
        [{"step": 1.0, "learning_rate": 0.0, "loss": 2.5}],
        [{"step": float(n), "learning_rate": 1e-5 * n, "loss": math.nan if n == 2 else 0.0} for n in range(4)],
        [{"step": float(n), "learning_rate": 1e-3, "loss": math.inf} for n in range(4)],
        [{"step": 5.0, "loss": -1.0}, {"learning_rate": 1.0}],
    ],
    ids=["one step", "not a number", "infinite", "rows with gaps"],
)
def test_learning_curves_of_odd_histories(
    history: list[dict[str, float]], results: DemoResults, render: Callable[[DemoResults], Page]
) -> None:
    page = render(replace(without_examples(results), history=history))
    drawn = " ".join(attributes["d"] or "" for attributes in page.all("path"))
    assert "nan" not in drawn
    assert "inf" not in drawn


@given(st.floats(-1e9, 0), st.floats(1e-9, 1e9))
def test_ticks_are_few_even_and_around(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    steps = np.diff(ticks)
    assert 3 <= len(ticks) <= 7
    np.testing.assert_allclose(steps, steps[0], rtol=1e-3)
    assert ticks[0] <= low + 0.01 * steps[0]
    assert ticks[-1] >= high - 0.01 * steps[0]


def test_size_is_bounded(results: DemoResults, tmp_path: Path) -> None:
    """Large pictures of pure noise, more examples than the page takes, and a log of every step."""
    rng = np.random.default_rng(0)

    def noise(value: Any) -> Any:
        return rng.integers(0, 256, (224, 300, 3), np.uint8) if isinstance(value, np.ndarray) else value

    rows = results.history * 40
    noisy = replace(rebuilt(results, noise), history=[{**row, "step": float(n)} for n, row in enumerate(rows)])
    path = tmp_path / "report.html"
    write_report(changed_examples(noisy, lambda examples: examples * 3), path)
    assert path.stat().st_size < 2_000_000
    pictures = Page(path.read_text(encoding="utf-8")).all("img")
    assert {(picture["width"], picture["height"]) for picture in pictures} == {("128", "96")}


# The file


def test_a_report_that_fails_leaves_the_old_one(
    results: DemoResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    broken = replace(results, num_parameters="many")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        write_report(broken, path)
    assert [path] == list(tmp_path.iterdir())

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_report(results, path)
    assert [path] == list(tmp_path.iterdir())
    assert path.read_text() == "old"


def test_report_replaces_the_old_one(results: DemoResults, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(results, path)
    assert [path] == list(tmp_path.iterdir())
    assert "old" not in path.read_text(encoding="utf-8")[:10]


def test_missing_pillow_names_the_command(
    results: DemoResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        write_report(results, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_importing_needs_numpy_alone() -> None:
    code = "import sys, vlmo_fast.demo.report; print({'torch', 'PIL', 'transformers', 'matplotlib'} & set(sys.modules))"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
