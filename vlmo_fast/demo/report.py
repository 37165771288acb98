"""The report of the demo: one HTML file that needs nothing else, no network, no script, no font.

Each section of the page is a function from results to a string, in the order of the page. Texts of the results pass
`_text`; every number on the page comes from them. What the prose claims is chosen by comparing numbers beyond their
sampling noise (`_compare`), so that a poor run reads as one.
"""

from __future__ import annotations

import base64
import io
import math
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from .results import (
        CaptionExample,
        DemoResults,
        Image,
        QuestionExample,
        QuestionResults,
        RetrievalExample,
        RetrievalResults,
        StatementExample,
        StatementResults,
    )

__all__ = ["write_report"]

# 96 pictures at most, of 64 x 64 x 3 bytes at most: the page stays below 2 MB even if they were pure noise.
_MAX_SIDE = 64
_MAX_QUERIES = 8
_MAX_MATCHES = 5
_MAX_CAPTIONED = 4
_MAX_QUESTIONS = 6  # right ones, and as many wrong ones, of either kind of question
_MAX_STATEMENTS = 6  # likewise

_SHOWN_SIDE = 128  # of a picture on the page, in CSS pixels
_MAX_POINTS = 300  # of a learning curve
_LARGE_GAP = 0.1  # from here on the prose calls a difference of accuracies large
_MISSING = "–"
_NBSP = "\u00a0"
_EMPTY = "<p>No examples were kept.</p>"


def write_report(results: DemoResults, path: Path) -> None:
    """Write the results as one self-contained HTML page; the file appears whole or not at all.

    Args:
        results: what the demo found.
        path: the file to write; its folder must exist, a file that is there is replaced.

    Raises:
        ImportError: Pillow is missing; names the command that installs it.
    """
    from vlmo_fast.files import write_whole  # imports torch, which making a page does not need

    page = _page(results)

    def write(unfinished: Path) -> None:
        unfinished.write_text(page, encoding="utf-8")

    write_whole(path, write)


def _page(results: DemoResults) -> str:
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>vlmo_fast demo: what one network learned</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
{_header(results)}
<main>
{_abilities(results)}
{_retrieval(results.retrieval)}
{_easy_vqa(results.easy_vqa)}
{_scene_questions(results.scene_questions)}
{_statements(results.statements)}
{_learning_curves(results.history)}
{_backends(results.backends)}
{_run(results)}
{_credits(results.attribution)}
</main>
</body>
</html>
"""


# The sections, in the order of the page


def _header(results: DemoResults) -> str:
    retrieval = results.retrieval
    k = _first_k(retrieval)
    found = "" if k == 1 else f" among its first {k} guesses"
    facts = {
        "parameters": _millions(results.num_parameters),
        "training": _duration(results.training_seconds),
        "the whole demo": _duration(results.total_seconds),
        "scenes in the gallery": f"{retrieval.num_scenes:,}",
    }
    links = {
        "retrieval": "Retrieval",
        "easy-vqa": "easy-VQA",
        "scene-questions": "Scene questions",
        "statements": "Statements",
        "curves": "Learning curves",
        "run": "This run",
    }
    fact_list = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    link_list = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name in links.items())
    return f"""<header>
<p class="eyebrow">vlmo_fast · report of the demo</p>
<h1>One network, trained in {_duration(results.training_seconds)}, finds the picture for
<em>{_percent(retrieval.text_to_image.get(k))}</em> of captions among {retrieval.num_scenes:,}{found}, answers
<em>{_percent(results.scene_questions.accuracy.get("all"))}</em> of questions about scenes, and judges
<em>{_percent(results.statements.accuracy.get("all"))}</em> of statements about two pictures.</h1>
<p class="lede">A VLMo of {_millions(results.num_parameters)} parameters was trained on synthetic captioned scenes and
on easy-VQA (third-party questions on synthetic pictures). It was tested on pictures that it had never seen; in the
scenes among them, objects meet that never met in training. Beside every result stands what a guesser scores that sees
only a part of the input.</p>
<dl class="facts">{fact_list}</dl>
<nav aria-label="Sections">{link_list}</nav>
</header>"""


def _abilities(results: DemoResults) -> str:
    return _section(
        "abilities",
        "What one network does",
        f"""<p>The same weights do all three. In each block one attention is shared by all inputs, and feed-forward
experts specialise: on pictures, on text and, in the last blocks, on both together.</p>
<div class="cards">
{_retrieval_card(results.retrieval)}
{_question_card(results.scene_questions, results.easy_vqa)}
{_statement_card(results.statements)}
</div>""",
    )


def _retrieval(results: RetrievalResults) -> str:
    rows = [
        _Row("caption → picture", "model", results.text_to_image),
        _Row("picture → caption", "model", results.image_to_text),
        _Row("knows objects, not layout", "baseline", results.objects_oracle),
        _Row("chance", "chance", results.chance),
    ]
    columns = {k: f"R@{k}" for k in sorted({k for row in rows for k in row.shares})}
    title = (
        f"How often the right one of {results.num_scenes:,} synthetic scenes is among the first k (recall at k, R@k)"
    )
    queries = [_query(example, results.num_scenes) for example in results.examples[:_MAX_QUERIES]]
    captioned = [_captioned(example, results.num_scenes) for example in results.caption_examples[:_MAX_CAPTIONED]]
    return _section(
        "retrieval",
        "Retrieval: find the picture",
        f"""<p>As a dual encoder the network embeds pictures and captions apart from each other; a caption finds the
pictures whose embeddings are nearest. The gallery holds {results.num_scenes:,} synthetic scenes, each with one caption.
Every pair of objects is there in all its layouts, so that it is not enough to know which objects are shown.</p>
{_note(_layout_note(results))}
{_note(_twin_note(results))}
{_bar_chart(title, columns, rows)}
{_score_table(title, columns, rows)}
<h3>Pictures found by caption</h3>
<p class="muted">Synthetic scenes, best match first. The right one is outlined and marked; each picture carries its own
caption and the cosine similarity to the query.</p>
{"".join(queries) or _EMPTY}
<h3>Captions found by picture</h3>
<p class="muted">The other way round: a synthetic scene asks for its caption, best match first.</p>
{f'<ul class="examples wide">{"".join(captioned)}</ul>' if captioned else _EMPTY}""",
    )


def _easy_vqa(results: QuestionResults) -> str:
    lead = (
        "easy-VQA is third-party data: a synthetic picture of one coloured shape, and a question with one of a few "
        "answers. As a fusion encoder the network reads picture and question together."
    )
    return _question_section("easy-vqa", "Questions: easy-VQA", lead, "easy-VQA", results)


def _scene_questions(results: QuestionResults) -> str:
    lead = (
        "Questions about synthetic scenes of four objects, in blocks that balance the answers: neither the question "
        "alone nor the picture alone tells the answer."
    )
    return _question_section("scene-questions", "Questions: scenes", lead, "this kind of question", results)


def _statements(results: StatementResults) -> str:
    columns = _types(results.num_statements, results.accuracy)
    rows = [
        _Row("fusion encoder", "model", results.accuracy),
        *(_Row(_words(name), "baseline", {"all": share}) for name, share in results.baselines.items()),
    ]
    title = "Share of statements about two synthetic scenes judged right, by type"
    note = _baseline_note(results.accuracy.get("all"), _best(results.baselines), results.num_statements.get("all", 0))
    marked = [(example.given == example.label, _statement(example)) for example in results.examples]
    return _section(
        "statements",
        "Statements about two pictures",
        f"""<p>Is a statement about two pictures true? The pictures are synthetic scenes of two objects. True and false
statements come in blocks that share words and pictures, so that any two of statement, left and right picture leave the
truth open. As a fusion encoder the network reads the statement with each picture.</p>
{_note(note)}
{_bar_chart(title, columns, rows)}
{_score_table(title, columns, rows, ("number of statements", results.num_statements))}
{_right_and_wrong(marked, _MAX_STATEMENTS, "wide")}""",
    )


def _learning_curves(history: Sequence[Mapping[str, float]]) -> str:
    names = dict.fromkeys(key for row in history for key in row if key not in ("step", "learning_rate"))
    curves = [("total loss" if name == "loss" else _words(name), "loss", _curve(history, name)) for name in names]
    curves.append(("learning rate", "", _curve(history, "learning_rate")))
    panels = [_panel(name, unit, steps, values) for name, unit, (steps, values) in curves if steps.size]
    return _section(
        "curves",
        "Learning curves",
        f"""<p>The loss of each objective over the steps of training, each on its own scale.</p>
<p class="legend"><span>{_SWATCH.format("raw")} as logged</span> <span>{_SWATCH.format("mean")} running mean</span></p>
<div class="panels">{"".join(panels)}</div>"""
        if panels
        else "<p>No step was logged.</p>",
    )


def _backends(rows: Sequence[tuple[str, ...]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    head = ("op", "device", "dtype", "implementation", "reason")
    title = "The implementation that each op uses here, by device and dtype, and why"
    return _section("backends", "Backends", _table(title, head, body, "words") if rows else "<p>No op was listed.</p>")


def _run(results: DemoResults) -> str:
    timings = {
        "training": _duration(results.training_seconds),
        "the whole demo": _duration(results.total_seconds),
        "trainable parameters": f"{results.num_parameters:,}",
    }
    return _section(
        "run",
        "This run",
        f"""<div class="columns">
{_settings("Recipe", results.recipe)}
{_settings("Machine and versions", results.machine)}
{_settings("Timings and size", timings)}
</div>""",
    )


def _credits(attribution: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in attribution)
    return _section("credits", "Credits", f"<ul>{items}</ul>" if items else "<p>None were given.</p>")


# The cards


def _retrieval_card(results: RetrievalResults) -> str:
    k = _first_k(results)
    bars = [
        _Bar("network", "model", results.text_to_image.get(k)),
        _Bar("knows objects, not layout", "baseline", results.objects_oracle.get(k)),
        _Bar("chance", "chance", results.chance.get(k)),
    ]
    example = _first_right([(example.right == 0, example) for example in results.examples if example.images])
    shown = ""
    if example:
        picture = _picture(example.images[0], f"Synthetic scene: {example.captions[0]}")
        shown = _illustration(picture, example.caption, "found", example.right == 0)
    return _card(
        "Retrieval",
        "Finds the picture that a caption describes. Both are encoded apart, so that a gallery is encoded once.",
        shown,
        f"R@{k} among {results.num_scenes:,} scenes",
        bars,
        _layout_note(results),
    )


def _question_card(scenes: QuestionResults, easy: QuestionResults) -> str:
    bars = [
        _Bar("network", "model", scenes.accuracy.get("all")),
        _Bar("control without fusion", "control", scenes.no_fusion.get("all")),
        *_best_guesser(_overall(scenes.baselines)),
    ]
    example = _first_right([(example.given == example.answer, example) for example in scenes.examples])
    shown = ""
    if example:
        picture = _picture(example.image, f"Synthetic scene for the question: {example.question}")
        shown = _illustration(picture, example.question, example.given, example.given == example.answer)
    others = [f"control without fusion {_percent(easy.no_fusion.get('all'))}"]
    others += [f"{bar.name} {_percent(bar.share)}" for bar in _best_guesser(_overall(easy.baselines))]
    return _card(
        "Questions",
        "Answers a question about a picture. Both are read together, word by word and patch by patch.",
        shown,
        f"of {_count(scenes.num_questions.get('all'))} questions about scenes",
        bars,
        f"On easy-VQA: {_percent(easy.accuracy.get('all'))} ({', '.join(others)}).",
    )


def _statement_card(results: StatementResults) -> str:
    share, rival = results.accuracy.get("all"), _best(results.baselines)
    example = _first_right([(example.given == example.label, example) for example in results.examples])
    shown = ""
    if example:
        verdict = "true" if example.given else "false"
        shown = _illustration(_pair(example), example.statement, verdict, example.given == example.label)
    return _card(
        "Two-picture statements",
        "Judges whether a statement about two pictures is true, which takes both of them.",
        shown,
        f"of {_count(results.num_statements.get('all'))} statements",
        [_Bar("network", "model", share), *_best_guesser(results.baselines)],
        _baseline_note(share, rival, results.num_statements.get("all", 0)),
    )


def _card(title: str, what: str, illustration: str, unit: str, bars: Sequence[_Bar], note: str) -> str:
    return f"""<article class="card">
<h3>{title}</h3>
<p>{what}</p>
{illustration}
<p class="score"><strong>{_percent(bars[0].share)}</strong> <span>{_text(unit)}</span></p>
{_bars(bars, title)}
<p class="muted">{_text(note)}</p>
</article>"""


def _illustration(pictures: str, said: str, answer: str, right: bool) -> str:
    return f"""<div class="illustration"><div class="pictures">{pictures}</div>
<p>{_text(said)}<br><strong>{_text(answer)}</strong> {_mark(right)}</p></div>"""


def _best_guesser(baselines: Mapping[str, float]) -> list[_Bar]:
    best = _best(baselines)
    return [_Bar(f"best guesser ({_words(best[0])})", "baseline", best[1])] if best else []


# Both kinds of questions


def _question_section(anchor: str, title: str, lead: str, subject: str, results: QuestionResults) -> str:
    columns = _types(results.num_questions, results.accuracy, results.no_fusion, *results.baselines.values())
    rows = [
        _Row("fusion encoder", "model", results.accuracy),
        _Row("control without fusion", "control", results.no_fusion),
        *(_Row(_words(name), "baseline", accuracy) for name, accuracy in results.baselines.items()),
    ]
    rival = _best(_overall(results.baselines))
    what = "Share of questions about synthetic pictures answered right, by type"
    marked = [(example.given == example.answer, _question(example)) for example in results.examples]
    return _section(
        anchor,
        title,
        f"""<p>{lead}</p>
{_note(_fusion_note(results, subject))}
{_note(_baseline_note(results.accuracy.get("all"), rival, results.num_questions.get("all", 0)))}
{_bar_chart(what, columns, rows)}
{_score_table(what, columns, rows, ("number of questions", results.num_questions))}
{_right_and_wrong(marked, _MAX_QUESTIONS, "narrow")}""",
    )


def _types(*tables: Mapping[str, Any]) -> dict[str, str]:
    """Every type that some table knows, in the order of first mention, "all" last, with its heading."""
    found = dict.fromkeys(kind for table in tables for kind in table)
    return {kind: _words(kind) for kind in sorted(found, key=lambda kind: kind == "all")}


# Examples


def _query(example: RetrievalExample, num_scenes: int) -> str:
    matches = list(zip(example.images, example.scores, example.captions, strict=True))[:_MAX_MATCHES]
    items = (_match(*match, right=place == example.right) for place, match in enumerate(matches))
    return f"""<div class="query"><p><q>{_text(example.caption)}</q>
<span class="muted">right one at place {example.rank:,} of {num_scenes:,}</span></p>
<ol>{"".join(items)}</ol></div>"""


def _match(image: Image, score: float, caption: str, *, right: bool) -> str:
    return f"""<li{' class="right"' if right else ""}>{_picture(image, f"Synthetic scene: {caption}")}
<span>{_mark(right=True) if right else ""} {_text(caption)} <span class="muted">{score:.2f}</span></span></li>"""


def _captioned(example: CaptionExample, num_scenes: int) -> str:
    found = list(zip(example.captions, example.scores, strict=True))[:_MAX_MATCHES]
    items = "".join(
        f"<li>{_text(caption)} {_mark(right=True) if place == example.right else ''}"
        f'<span class="muted"> {score:.2f}</span></li>'
        for place, (caption, score) in enumerate(found)
    )
    return f"""<li class="captioned">{_picture(example.image, f"Synthetic scene, found for it: {example.captions[0]}")}
<div><ol>{items}</ol><p class="muted">right one at place {example.rank:,} of {num_scenes:,}</p></div></li>"""


def _question(example: QuestionExample) -> str:
    right = example.given == example.answer
    truth = "" if right else f"<br>The true answer is <strong>{_text(example.answer)}</strong>."
    return f"""{_picture(example.image, f"Synthetic picture for the question: {example.question}")}
<p>{_text(example.question)} <span class="muted">({_text(_words(example.type))})</span><br>
{_mark(right)} <strong>{_text(example.given)}</strong> <span class="muted fixed">probability
{_percent(example.probability)}</span>{truth}</p>"""


def _statement(example: StatementExample) -> str:
    given, true = ("true" if value else "false" for value in (example.given, example.label))
    truth = "" if given == true else f"<br>In truth it is <strong>{true}</strong>."
    return f"""<div class="pictures">{_pair(example)}</div>
<p>{_text(example.statement)} <span class="muted">({_text(_words(example.type))})</span><br>
{_mark(given == true)} <strong>{given}</strong> <span class="muted fixed">probability of true
{_percent(example.probability)}</span>{truth}</p>"""


def _pair(example: StatementExample) -> str:
    sides = (("Left", example.left), ("Right", example.right))
    return "".join(_picture(image, f"{side} synthetic scene for: {example.statement}") for side, image in sides)


def _right_and_wrong(marked: Sequence[tuple[bool, str]], limit: int, style: str) -> str:
    """Some right and some wrong examples; as many of each as there are, so that their shares say nothing."""
    parts = []
    for wanted, title in ((True, "Right answers"), (False, "Wrong answers")):
        items = [f"<li>{item}</li>" for right, item in marked if right == wanted][:limit]
        if items:
            parts.append(f'<h3>{title}</h3><ul class="examples {style}">{"".join(items)}</ul>')
    remark = "Synthetic pictures, chosen to show right and wrong answers: how many there are of each says nothing."
    return f'{"".join(parts)}<p class="muted">{remark}</p>' if parts else _EMPTY


def _mark(right: bool) -> str:
    return '<span class="mark yes">✓ right</span>' if right else '<span class="mark no">✗ wrong</span>'


def _first_right(marked: Sequence[tuple[bool, Any]]) -> Any:
    """The first right example, else the first one, else None."""
    return next((example for right, example in marked if right), marked[0][1] if marked else None)


# What the numbers say


def _compare(score: float, other: float, count: int) -> int:
    """1 if the score is higher, -1 if lower, 0 if within two standard errors of the difference of such shares."""
    variance = max(score * (1 - score) + other * (1 - other), 0.0) / max(count, 1)
    noise = 2 * math.sqrt(variance)
    return 0 if abs(score - other) <= noise else 1 if score > other else -1


def _layout_note(results: RetrievalResults) -> str:
    k = _first_k(results)
    score, oracle = results.text_to_image.get(k), results.objects_oracle.get(k)
    if score is None or oracle is None:
        return ""
    facts = f"Knowing the objects but not the layout would give an R@{k} of {_percent(oracle)}"
    if _compare(score, oracle, results.num_scenes) > 0:
        return f"{facts}: the network reads the layout, too."
    return f"{facts}: nothing here shows that the network reads the layout."


def _twin_note(results: RetrievalResults) -> str:
    share, coin = results.twin_accuracy, 0.5
    if _compare(share, coin, results.num_scenes) <= 0:
        verdict = "no better than a coin"
    elif share - coin < coin / 2:
        verdict = "better than a coin, but far from always"
    else:
        verdict = "so the embeddings tell which object is where"
    return (
        "A caption and its twin, with the two objects exchanged, have the same words. The right one scores higher in "
        f"{_percent(share)} of scenes, {verdict}."
    )


def _fusion_note(results: QuestionResults, subject: str) -> str:
    score, control = results.accuracy.get("all"), results.no_fusion.get("all")
    if score is None or control is None:
        return ""
    count, rival = results.num_questions.get("all", 0), _best(_overall(results.baselines))
    facts = f"The control without fusion, which sees only the two separate embeddings, scores {_percent(control)}"
    order = _compare(score, control, count)
    if order > 0:
        size = "a large gap" if score - control >= _LARGE_GAP else "a gap"
        gap = f"{size} of {_points(score - control)}"
        return f"{facts}, fusion {_percent(score)}: {gap}, so {subject} gains from fusion."
    verdict = "better than" if order < 0 else "as good as"
    if rival and _compare(control, rival[1], count) <= 0:
        return f"{facts}, {verdict} fusion at {_percent(score)}: in this run fusion gained nothing."
    return f"{facts}, {verdict} fusion at {_percent(score)}: {subject} does not need fusion."


def _baseline_note(score: float | None, rival: tuple[str, float] | None, count: int) -> str:
    if score is None or rival is None:
        return ""
    facts = f"The best guesser that sees a part of the input only ({_words(rival[0])}) scores {_percent(rival[1])}"
    if _compare(score, rival[1], count) > 0:
        return f"{facts}, the network {_points(score - rival[1])} more."
    return f"{facts}, and the network does not beat it."


def _best(baselines: Mapping[str, float]) -> tuple[str, float] | None:
    return max(baselines.items(), key=lambda item: item[1], default=None)


def _overall(baselines: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {name: accuracy["all"] for name, accuracy in baselines.items() if "all" in accuracy}


def _first_k(results: RetrievalResults) -> int:
    return min(results.text_to_image, default=1)


# Parts of a page


def _section(anchor: str, title: str, body: str) -> str:
    return f"""<section id="{anchor}" aria-labelledby="{anchor}-title">
<h2 id="{anchor}-title">{title}</h2>
{body}
</section>"""


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>' if text else ""


class _Row(NamedTuple):
    """Shares in [0, 1] by column; `style` is "model", "control", "baseline" or "chance"."""

    name: str
    style: str
    shares: Mapping[Any, float]


def _score_table(
    title: str, columns: Mapping[Any, str], rows: Sequence[_Row], counts: tuple[str, Mapping[Any, int]] | None = None
) -> str:
    """The shares of all rows; `columns` gives the heading for each key of the shares, `counts` adds a last row."""
    cells = [(row.name, [_percent(row.shares.get(key), unit="") for key in columns]) for row in rows]
    if counts:
        cells.append((counts[0], [_count(counts[1].get(key)) for key in columns]))
    body = "".join(
        f'<tr><th scope="row">{_text(name)}</th>' + "".join(f"<td>{cell}</td>" for cell in values) + "</tr>"
        for name, values in cells
    )
    return _table(f"{title}; in %", ["", *columns.values()], body, "numbers")


def _table(title: str, columns: Sequence[str], body: str, style: str) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' if name else "<td></td>" for name in columns)
    return f"""<div class="scroll" role="region" aria-label="{_text(title)}" tabindex="0"><table class="{style}">
<caption>{_text(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"""


def _settings(title: str, values: Mapping[str, Any]) -> str:
    items = "".join(
        f"<div><dt>{_text(_words(name))}</dt><dd>{_text(_setting(value))}</dd></div>" for name, value in values.items()
    )
    return f'<div><h3>{title}</h3><dl class="settings">{items}</dl></div>'


class _Bar(NamedTuple):
    """One share of a `_Row`; None where it is missing."""

    name: str
    style: str
    share: float | None


def _bar_chart(title: str, columns: Mapping[Any, str], rows: Sequence[_Row]) -> str:
    """The same shares as in `_score_table`, one panel a column; a row without a share there has no bar there."""
    panels = ""
    for key, heading in columns.items():
        bars = [_Bar(row.name, row.style, row.shares[key]) for row in rows if key in row.shares]
        panels += f"<div><h3>{_text(heading)}</h3>{_bars(bars, heading)}</div>" if bars else ""
    return f'<figure class="chart"><figcaption>{_text(title)}</figcaption><div class="panels">{panels}</div></figure>'


def _bars(bars: Sequence[_Bar], title: str) -> str:
    """Horizontal bars on a scale from nothing to all."""
    spoken = f"{title}: " + "; ".join(f"{bar.name} {_percent(bar.share)}" for bar in bars)
    rows = "".join(
        f'<div class="bar {bar.style}"><span>{_text(bar.name)}</span><span>{_percent(bar.share)}</span>'
        f'<i><b style="width:{100 * _clipped(bar.share):.2f}%"></b></i></div>'
        for bar in bars
    )
    return f'<div class="bars" role="img" aria-label="{_text(spoken)}">{rows}</div>'


def _picture(image: Image, alt: str) -> str:
    height, width = image.shape[:2]
    scale = _SHOWN_SIDE / max(height, width)
    return (
        f'<img src="data:image/png;base64,{_png(image)}" alt="{_text(alt)}" '
        f'width="{round(width * scale)}" height="{round(height * scale)}">'
    )


def _png(image: Image) -> str:
    """A picture, made smaller if it is larger than the page can afford, as PNG in base 64."""
    try:
        from PIL import Image as pillow
    except ImportError as error:
        raise ImportError("write_report: Pillow must be installed: pip install pillow") from error
    picture = pillow.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")


# Learning curves

_Floats: TypeAlias = npt.NDArray[np.float64]

_WIDTH, _HEIGHT = 320, 200  # of a panel, in the units of its drawing
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 10, 38  # margins, with room for the labels
_SWATCH = '<svg class="swatch" viewBox="0 0 28 8" aria-hidden="true"><path class="{}" d="M2 4H26"/></svg>'


def _curve(history: Sequence[Mapping[str, float]], name: str) -> tuple[_Floats, _Floats]:
    """Steps and values of the rows that have both, finite."""
    rows = [(row["step"], row[name]) for row in history if "step" in row and name in row]
    points = np.array([row for row in rows if all(map(math.isfinite, row))], dtype=np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _panel(name: str, unit: str, steps: _Floats, values: _Floats) -> str:
    """A curve with its axes, and the running mean of a loss where there are points enough for one."""
    low, high = float(steps.min()), float(steps.max())
    x_ticks = [tick for tick in _ticks(low, high) if low <= tick <= high]
    y_ticks = _ticks(min(0.0, float(values.min())), max(0.0, float(values.max())))

    def x(step: _Floats | float) -> Any:
        return _LEFT + (step - low) / ((high - low) or 1.0) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: _Floats | float) -> Any:
        return _HEIGHT - _BOTTOM - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (_HEIGHT - _TOP - _BOTTOM)

    grid = "".join(
        f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:,g}</text>'
        for tick in y_ticks
    )
    grid += "".join(
        f'<text x="{x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{tick:,g}</text>'
        for tick in x_ticks
    )
    lines = f'<path class="raw" d="{_path(x(steps), y(values))}"/>'
    window = max(5, len(values) // 20 | 1)
    if unit and len(values) > 4 * window:
        lines += f'<path class="mean" d="{_path(x(steps), y(_running_mean(values, window)))}"/>'
    spoken = f"{name}: {values[0]:.3g} at step {steps[0]:,g}, {values[-1]:.3g} at step {steps[-1]:,g}"
    return f"""<figure><figcaption>{_text(name)}</figcaption>
<svg class="curve" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(spoken)}">{grid}
<path class="axis" d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>{lines}
<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:g}" y="{_HEIGHT - 5}" text-anchor="middle">step</text>
<text transform="translate(11 {(_TOP + _HEIGHT - _BOTTOM) / 2:g}) rotate(-90)" text-anchor="middle">{_text(unit)}</text>
</svg></figure>"""


def _path(x: _Floats, y: _Floats) -> str:
    """The data of an SVG path through at most `_MAX_POINTS` of the points; one point alone becomes a dot."""
    chosen = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MAX_POINTS)).round().astype(int))
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x[chosen], y[chosen], strict=True)) + "h0"


def _running_mean(values: _Floats, window: int) -> _Floats:
    """The mean of the values around each, fewer at both ends."""
    box = np.ones(window)
    return np.convolve(values, box, "same") / np.convolve(np.ones_like(values), box, "same")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, evenly spaced, three to seven of them, that enclose the range."""
    span = (high - low) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= span / 4 * 0.999)
    first, last = math.floor(low / step + 0.001), math.ceil(high / step - 0.001)
    return [float(f"{n * step:.6g}") for n in range(first, max(last, first + 1) + 1)]


# Texts and numbers


def _text(value: object) -> str:
    return escape(str(value), quote=True)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _percent(share: float | None, unit: str = f"{_NBSP}%") -> str:
    return _MISSING if share is None or not math.isfinite(share) else f"{100 * share:.1f}{unit}"


def _points(difference: float) -> str:
    return f"{100 * difference:.1f} percentage points"


def _clipped(share: float | None) -> float:
    return min(max(share, 0.0), 1.0) if share is not None and math.isfinite(share) else 0.0


def _count(number: int | None) -> str:
    return _MISSING if number is None else f"{number:,}"


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f}{_NBSP}million" if number >= 1_000_000 else f"{number:,}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}{_NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{_NBSP}min {rest}{_NBSP}s"
    return f"{minutes // 60}{_NBSP}h {minutes % 60}{_NBSP}min"


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_words(str(key))} {_setting(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_setting, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


_STYLE = """
:root {
  --page: #f5f6fa; --card: #ffffff; --text: #1a1f2e; --muted: #566074; --line: #dde1ea; --track: #e9ecf3;
  --model: #2f5bd0; --control: #b8600b; --baseline: #7f8aa0; --chance: #b3bac9;
  --yes: #157a3c; --no: #b3261e; --tint: #e8eefc;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #10131a; --card: #191e29; --text: #e8ebf2; --muted: #a5aec0; --line: #303848; --track: #262d3b;
    --model: #82a6ff; --control: #f0a04b; --baseline: #7d89a1; --chance: #565f74;
    --yes: #52d483; --no: #ff8a80; --tint: #1b2540;
  }
}
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body {
  margin: 0; background: var(--page); color: var(--text); overflow-wrap: break-word;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
header, main { max-width: 70rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 3rem; }
main { padding-bottom: 4rem; }
p { max-width: 46rem; margin: 0 0 .9rem; }
h1 {
  max-width: 60rem; margin: 0 0 1.2rem; font-size: clamp(1.5rem, 1rem + 2.1vw, 2.4rem); line-height: 1.22;
  letter-spacing: -.02em; text-wrap: balance;
}
h1 em { font-style: normal; color: var(--model); white-space: nowrap; }
h2 { margin: 0 0 .8rem; font-size: 1.5rem; line-height: 1.25; letter-spacing: -.01em; }
h3 { margin: 1.6rem 0 .6rem; font-size: 1.1rem; }
.eyebrow { margin-bottom: .7rem; color: var(--muted); font-size: .85rem; letter-spacing: .04em; }
.lede { font-size: 1.1rem; }
.muted { color: var(--muted); font-size: .88rem; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem 2.4rem; margin: 1.6rem 0; }
.facts dt { color: var(--muted); font-size: .85rem; }
.facts dd { margin: 0; font-size: 1.25rem; font-weight: 650; }
nav { display: flex; flex-wrap: wrap; gap: .5rem; }
nav a {
  padding: .3rem .8rem; border: 1px solid var(--line); border-radius: 2rem; background: var(--card);
  color: var(--text); font-size: .9rem; text-decoration: none;
}
nav a:hover { border-color: var(--model); color: var(--model); }
:focus-visible { outline: 2px solid var(--model); outline-offset: 2px; }
section {
  margin-top: 2rem; padding: 1.75rem; border: 1px solid var(--line); border-radius: 1rem; background: var(--card);
}
section#abilities { padding: 0; border: 0; background: none; margin-top: 2.75rem; }
.note { padding: .6rem .9rem; border-left: 4px solid var(--model); border-radius: .3rem; background: var(--tint); }

.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: 1.25rem; }
.card {
  display: grid; grid-row: span 6; grid-template-rows: subgrid; gap: .9rem; padding: 1.5rem;
  border: 1px solid var(--line); border-radius: 1rem; background: var(--card);
}
.card > * { margin: 0; }
.illustration { display: grid; gap: .7rem; align-content: start; }
.illustration p { margin: 0; font-size: .95rem; }
.pictures { display: flex; gap: .5rem; }
.score { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 .6rem; color: var(--muted); font-size: .9rem; }
.score strong { color: var(--model); font-size: 2.3rem; line-height: 1.1; letter-spacing: -.02em; }

img { display: block; max-width: 100%; height: auto; border-radius: .5rem; }
.mark { font-weight: 650; font-size: .85rem; white-space: nowrap; }
.yes { color: var(--yes); }
.no { color: var(--no); }
.examples, .query ol { display: grid; gap: 1.25rem 1rem; margin: 0 0 1rem; padding: 0; list-style: none; }
.examples p { margin: .5rem 0 0; font-size: .92rem; }
.fixed { white-space: nowrap; }
.narrow { grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(17.5rem, 100%), 1fr)); }
.query { display: grid; grid-template-columns: 13rem 1fr; gap: .5rem 1.5rem; padding: 1.3rem 0; }
.query { border-top: 1px solid var(--line); }
.query > p { margin: 0; }
.query q { display: block; font-weight: 600; }
.query ol { grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); margin: 0; }
.query li { font-size: .88rem; line-height: 1.4; }
.query img { margin: 0 0 .45rem; }
.query .right img { outline: 4px solid var(--yes); outline-offset: 2px; }
.captioned { display: grid; grid-template-columns: minmax(4rem, 8rem) 1fr; gap: .9rem; align-items: start; }
.captioned ol { margin: 0; padding-left: 1.2rem; font-size: .88rem; line-height: 1.5; }

figure { margin: 0; }
.chart { margin: 1.5rem 0; }
.chart h3 { margin: 0 0 .5rem; font-size: .95rem; }
figcaption, caption { margin: 0 0 .8rem; color: var(--muted); font-size: .88rem; text-align: left; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: 1.5rem 2rem; }
.chart .panels { grid-template-columns: repeat(auto-fit, minmax(min(13rem, 100%), 1fr)); }
.panels figcaption { margin-bottom: .2rem; color: var(--text); font-weight: 600; }
.bars { display: grid; gap: .5rem; align-content: start; }
.bar { display: grid; grid-template-columns: 1fr auto; gap: .15rem .75rem; font-size: .85rem; line-height: 1.35; }
.bar span:nth-child(2) { align-self: end; font-variant-numeric: tabular-nums; font-weight: 600; }
.bar i { grid-column: 1 / -1; height: .55rem; border-radius: .3rem; background: var(--track); overflow: hidden; }
.bar b { display: block; height: 100%; min-width: 2px; background: var(--bar); }
.model { --bar: var(--model); }
.model span { font-weight: 650; }
.control { --bar: var(--control); }
.baseline { --bar: var(--baseline); }
.chance { --bar: var(--chance); }

.scroll { margin: 1.25rem 0; overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .92rem; }
th, td { padding: .45rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; }
.numbers tr > :first-child { padding-left: 0; }
.numbers td, .numbers thead th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.words { min-width: 38rem; }

.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; color: var(--muted); font-size: .88rem; }
.swatch { width: 1.75rem; height: .5rem; }
.curve { display: block; width: 100%; height: auto; }
.curve text { fill: var(--muted); font-size: 11px; }
path { fill: none; stroke-linecap: round; stroke-linejoin: round; }
.grid { stroke: var(--line); }
.axis { stroke: var(--muted); }
.raw { stroke: var(--model); stroke-width: 1.5; opacity: .45; }
.curve .raw:last-of-type { opacity: 1; }
.mean { stroke: var(--model); stroke-width: 2.5; }

.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: 0 2.5rem; }
.columns h3 { margin-top: .5rem; }
.settings { margin: 0; font-size: .9rem; }
.settings div { display: flex; justify-content: space-between; gap: 1rem; padding: .3rem 0; }
.settings div { border-bottom: 1px solid var(--line); }
.settings dt { color: var(--muted); }
.settings dd { margin: 0; min-width: 0; text-align: right; }

@media (max-width: 40rem) {
  header { padding-top: 1.75rem; }
  header, main { padding-left: .9rem; padding-right: .9rem; }
  section { padding: 1.1rem .9rem; }
  .card { padding: 1.1rem; }
  .query { grid-template-columns: 1fr; }
  .query ol { grid-template-columns: repeat(auto-fill, minmax(5rem, 1fr)); gap: 1rem .8rem; }
  .chart .panels { gap: 1.1rem; }
  table { font-size: .84rem; }
  th, td { padding: .4rem .25rem; }
  .numbers thead th { font-size: .78rem; }
  .numbers tr > :last-child { padding-right: 0; }
  .words { min-width: 34rem; }
}
@media print {
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  :root { --page: #ffffff; }
  html { font-size: 11px; }
  header, main { max-width: none; padding: 0; }
  img { width: 6.5rem; }
  nav { display: none; }
  section { padding: 0; border: 0; }
  .scroll { overflow: visible; }
  .words { min-width: 0; }
  h2, h3, h3 + p, figcaption, .legend { break-after: avoid; }
  .card, .query, .examples li, .chart > .panels > div, .panels figure, table, .note { break-inside: avoid; }
}
"""
