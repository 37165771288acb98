"""The demo's report in a real browser: it draws, fits a phone, and asks the network for nothing."""

import json
import re
import subprocess
from collections.abc import Callable
from html import escape, unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_results import fake_results

from vlmo_fast.demo.report import write_report

pytestmark = pytest.mark.slow

Chromium = Callable[..., str]

# Shows the page, unchanged, in a frame as wide as a phone or a desktop and writes what does not fit. Text may scroll
# in an element that says so, if the element itself fits.
PROBE = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>
<pre id="found"></pre>
<script>
document.querySelector("iframe").onload = ({{target}}) => {{
  const page = target.contentDocument, view = target.contentWindow;
  const scrolls = e => e && (view.getComputedStyle(e).overflowX == "auto" || scrolls(e.parentElement));
  const name = e => `${{e.tagName}}.${{e.className}}: ${{e.textContent.trim().slice(0, 40)}}`;
  const all = [...page.body.querySelectorAll("*")].filter(e => !scrolls(e.parentElement) && !e.closest("svg *"));
  document.querySelector("#found").textContent = JSON.stringify({{
    width: view.innerWidth,
    scroll: page.documentElement.scrollWidth,
    outside: all.filter(e => e.getBoundingClientRect().right > view.innerWidth + 0.5).map(name),
    clipped: all.filter(e => !scrolls(e) && e.clientWidth && e.scrollWidth > e.clientWidth + 1).map(name),
    blind: [...page.images].filter(e => !e.complete || !e.naturalWidth).map(name),
    height: page.documentElement.scrollHeight,
  }});
}};
</script>
"""


@pytest.fixture
def report(tmp_path: Path) -> Path:
    pytest.importorskip("PIL")
    path = tmp_path / "report.html"
    write_report(fake_results(), path)
    return path


@pytest.fixture
def chromium(require_tool: Callable[[str], str], tmp_path: Path) -> Chromium:
    """Runs headless Chromium on a file, without a resolver, hence without a network, and returns its output."""
    program = require_tool("chromium")

    def run(page: Path, *flags: str, window: tuple[int, int] = (1280, 900)) -> str:
        quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
        command = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *quiet, "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={window[0]},{window[1]}", *flags, page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_page_is_parsed_as_written(report: Path, chromium: Chromium) -> None:
    """The browser mends nothing: no element moves, none is added."""
    dom = chromium(report, "--dump-dom")
    source = report.read_text(encoding="utf-8")
    tags = [re.findall(r"<([a-z][a-z0-9]*)[\s>/]", text) for text in (source, dom)]
    assert tags[0] == tags[1]
    assert "What one network does" in dom


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_screenshot_is_not_blank(width: int, scheme: str, report: Path, chromium: Chromium, tmp_path: Path) -> None:
    from PIL import Image

    shot = tmp_path / "shot.png"
    flags = [f"--screenshot={shot}", *(["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else [])]
    chromium(report, *flags, window=(width, 3000))
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape == (3000, width, 3)
    background = pixels[1, 1]
    assert (background.mean() < 60) == (scheme == "dark")
    for band in np.split(pixels, 5):  # 600 pixels high
        assert np.mean(np.any(abs(band.astype(int) - background) > 40, axis=-1)) > 0.01
    assert len(np.unique(pixels @ np.array([1 << 16, 1 << 8, 1]))) > 500  # colours: there are pictures


def probe(page: str, width: int, chromium: Chromium, folder: Path) -> dict[str, Any]:
    """What `PROBE` finds."""
    path = folder / "probe.html"
    path.write_text(PROBE.format(width=width, page=escape(page, quote=True)), encoding="utf-8")
    (text,) = re.findall(r'<pre id="found">(.*?)</pre>', chromium(path, "--dump-dom"), re.DOTALL)
    return json.loads(unescape(text))


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_overflows_or_is_clipped(width: int, report: Path, chromium: Chromium, tmp_path: Path) -> None:
    found = probe(report.read_text(encoding="utf-8"), width, chromium, tmp_path)
    assert found["width"] == width
    assert found["scroll"] <= width
    assert found["outside"] == found["clipped"] == found["blind"] == []
    assert found["height"] > 3000


def test_probe_sees_what_does_not_fit(report: Path, chromium: Chromium, tmp_path: Path) -> None:
    misfits = '<p style="width:500px">wide</p><p style="width:50px;overflow:hidden"><b>unbreakable_and_long</b></p>'
    misfits += '<img alt="" src="data:image/png;base64,AAAA">'
    page = report.read_text(encoding="utf-8").replace("</main>", f"{misfits}</main>").replace("overflow-wrap", "--none")
    found = probe(page, 390, chromium, tmp_path)
    assert found["scroll"] > 390
    assert "P.: wide" in found["outside"]
    assert "P.: unbreakable_and_long" in found["clipped"]
    assert found["blind"] == ["IMG.: "]


def requests(log: Path) -> set[str]:
    """What a page asked for, from Chromium's own log; files, and what the browser asks for by itself, do not count."""
    record = json.loads(log.read_text(encoding="utf-8"))
    start = record["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    asked = [event.get("params", {}) for event in record["events"] if event["type"] == start]
    by_pages = {params["url"] for params in asked if "url" in params and params.get("initiator") != "not an origin"}
    return {url for url in by_pages if not url.startswith(("file:", "data:"))}


def test_nothing_is_requested(report: Path, chromium: Chromium, tmp_path: Path) -> None:
    log = tmp_path / "net.json"
    source = report.read_text(encoding="utf-8")
    policy = re.search(r"<meta http-equiv=[^>]*>", source)
    assert policy
    unguarded = source.replace(policy[0], "")
    intruder = '<img alt="" src="http://intruder.invalid/a.png">'
    intruded = {"http://intruder.invalid/a.png"}
    cases = {
        source: set(),
        unguarded: set(),  # not thanks to its policy alone
        unguarded.replace("</main>", f"{intruder}</main>"): intruded,  # this test would see it
        source.replace("</main>", f"{intruder}</main>"): set(),  # the policy holds
    }
    for text, expected in cases.items():
        copy = tmp_path / "copy.html"
        copy.write_text(text, encoding="utf-8")
        chromium(copy, "--dump-dom", f"--log-net-log={log}")
        assert requests(log) == expected
