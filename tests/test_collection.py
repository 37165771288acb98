"""A collection in every awkward form through `vlmo-fast embed`: stopped, killed, resumed, extended, renamed.

Rows, order and values are those of an uninterrupted run, and nothing is computed twice beyond one batch.
"""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from test_processing import SIZES, WORDS

import vlmo_fast
from vlmo_fast import VLMoConfig, VLMoProcessor

ROOT = Path(__file__).resolve().parents[1]
BATCH = 16
pytestmark = pytest.mark.slow


def awkward(number: int, folder: Path) -> str:
    """Picture `number` in one of the awkward forms, and the name of its file in the folder."""
    generator = np.random.default_rng(number)
    height, width = generator.integers(8, 40, 2)
    image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    form = number % 12
    path = folder / f"shelf {number % 7}" / f"{number:05d}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == 0:
        exif = Image.Exif()
        exif[0x0112] = int(generator.integers(2, 9))
        path = path.with_suffix(".jpg")
        image.save(path, exif=exif)
    elif form == 1:
        path = path.with_suffix(".png")
        Image.fromarray((generator.integers(0, 2**16, (height, width))).astype(np.uint16)).save(path)
    elif form == 2:
        path = path.with_suffix(".png")
        image.quantize(16).save(path)
    elif form == 3:
        path = path.with_suffix(".jpg")
        image.convert("CMYK").save(path)
    elif form == 4:
        path = path.with_suffix(".gif")
        image.save(path, save_all=True, append_images=[Image.new("RGB", image.size)])
    elif form == 5:
        path = path.with_suffix(".avif")
        image.save(path)
    elif form == 6:
        path = path.with_name(os.fsdecode(f"{number:05d}-".encode() + b"M\xe4rz.png"))
        image.save(path)
    elif form == 7:  # no suffix
        image.save(path, "PNG")
    elif form == 8:
        path = path.with_suffix(".tif")
        image.convert("L").save(path)
    elif form == 9:
        outside = folder.parent / "outside" / f"{number:05d}.webp"
        outside.parent.mkdir(exist_ok=True)
        image.save(outside)
        path = path.with_suffix(".webp")
        path.symlink_to(outside)
    elif form == 10:
        path = path.with_suffix(".png")
        image.convert("RGBA").save(path)
    else:
        path = path.with_suffix(".jpg")
        image.convert("L").save(path)
    return os.fspath(path.relative_to(folder))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, 2,000 pictures, broken and empty files among them, and a table of captions."""
    place = tmp_path_factory.mktemp("collection")
    config = VLMoConfig(**SIZES, has_itm_head=False)
    torch.manual_seed(0)
    vlmo_fast.VLMoForImageTextRetrieval(config).save_pretrained(place / "model")
    (place / "vocab.txt").write_text("\n".join(WORDS))
    VLMoProcessor.from_vocabulary(place / "vocab.txt", config).save_pretrained(place / "model")
    names = [awkward(number, place / "photos") for number in range(2_000)]
    whole = (place / "photos" / names[11]).read_bytes()
    (place / "photos" / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (place / "photos" / "empty.png").write_bytes(b"")
    (place / "photos" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (place / "photos" / "dangling.jpg").symlink_to(place / "nothing.jpg")
    chosen = random.Random(0)
    lines = ["id,caption", *(f'{n},"{" ".join(chosen.choices(WORDS[5:], k=1 + n % 9))}, {n}"' for n in range(500))]
    (place / "captions.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    return place


def command(place: Path, out: str, store: str, *options: str) -> list[str]:
    arguments = [
        *(str(place / "model"), str(place / out), "--images", str(place / "photos"), "--skip-broken"),
        *("--texts", str(place / "captions.csv"), "--text-column", "caption"),
        *("--store", str(place / store), "--batch-size", str(BATCH), "--json", *options),
    ]
    return [sys.executable, "-m", "vlmo_fast", "embed", *arguments]


def run(place: Path, out: str, store: str, *options: str) -> dict:
    done = subprocess.run(command(place, out, store, *options), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def kept(place: Path, store: str) -> int:
    files = list((place / store).glob("*.sqlite"))
    if not files:
        return 0
    with sqlite3.connect(files[0]) as connection:
        return int(connection.execute("SELECT count(*) FROM embeddings").fetchone()[0])


def table(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    columns = parquet.read_table(path).to_pydict()
    return columns["kind"], columns["item"], np.array(columns["embedding"], np.float32)


def test_stopped_killed_resumed_extended_renamed(place: Path) -> None:
    wanted = table_of(run(place, "whole.parquet", "store-of-one-run"), place, "whole.parquet")
    assert len(wanted[0]) == 2_000 + 500
    total = kept(place, "store-of-one-run")

    chosen, before = random.Random(1), 0
    for stop in (signal.SIGINT, signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        with subprocess.Popen(
            command(place, "stopped.parquet", "store"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            goal, began = before + chosen.randint(2, 25) * BATCH, time.monotonic()
            while process.poll() is None and kept(place, "store") < goal and time.monotonic() - began < 120:
                time.sleep(0.01)
            process.send_signal(stop)
            _, said = process.communicate()
        assert not (place / "stopped.parquet").exists()
        if stop is signal.SIGINT and process.returncode != 0:
            assert b"Traceback" not in said
        assert kept(place, "store") >= before
        before = kept(place, "store")
    report = run(place, "stopped.parquet", "store")
    assert report["computed"] == total - before  # nothing that was kept is computed again
    agree(table_of(report, place, "stopped.parquet"), wanted)

    again = run(place, "renamed.parquet", "store")
    assert again["computed"] == 0
    agree(table_of(again, place, "renamed.parquet"), wanted)
    (place / "model").rename(place / "moved")
    (place / "moved" / ".DS_Store").write_bytes(b"\0")
    (place / "model").symlink_to(place / "moved")
    assert run(place, "moved.safetensors", "store")["computed"] == 0

    Image.new("RGB", (9, 9), (1, 2, 3)).save(place / "photos" / "zz new.png")
    extended = run(place, "extended.parquet", "store")
    assert extended["computed"] == 1
    kind, items, embeds = table_of(extended, place, "extended.parquet")
    new = [number for number, item in enumerate(items) if item.endswith("zz new.png")]
    agree(
        (kind[: new[0]] + kind[new[0] + 1 :], items[: new[0]] + items[new[0] + 1 :], np.delete(embeds, new, 0)), wanted
    )


def table_of(report: dict, place: Path, out: str) -> tuple[list[str], list[str], np.ndarray]:
    left_out = {Path(row["item"]).name for row in report["left_out"]}
    assert left_out == {"truncated.jpg", "empty.png", ".DS_Store", "dangling.jpg"}
    return table(place / out)


def agree(found: tuple, wanted: tuple) -> None:
    assert found[:2] == wanted[:2]
    np.testing.assert_allclose(found[2], wanted[2], atol=2e-6)


def test_several_processes_share_the_work(place: Path) -> None:
    processes = [
        subprocess.Popen(command(place, f"shared{n}.parquet", "shared"), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    reports = [json.loads(process.communicate()[0]) for process in processes]
    assert all(process.returncode == 0 for process in processes)
    agree(table(place / "shared0.parquet"), table(place / "shared1.parquet"))
    assert sum(report["computed"] for report in reports) >= kept(place, "shared")
