"""A stream's batches: the same for any number of workers and ranks, resumed anywhere, whole whatever cannot be read."""

import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlmo_fast.data.readers.captions import read_caption_table
from vlmo_fast.data.source import Sample, SourceError, UnreadableItem
from vlmo_fast.data.stream import Item, Stream, TooManyUnreadable

ROOT = Path(__file__).resolve().parents[1]


class Numbers:
    """A source of texts "0", "1", ... of which some cannot be read."""

    def __init__(self, count: int, unreadable: Iterable[int] = (), seconds: float = 0) -> None:
        self.count, self.unreadable, self.seconds = count, frozenset(unreadable), seconds
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        self.asked.append(index)
        time.sleep(self.seconds)
        if index in self.unreadable:
            raise UnreadableItem("out of order")
        return Sample(None, str(index), index // 2)

    def place(self, index: int) -> str:
        return f"number {index}"

    def fingerprint(self) -> str:
        return f"numbers to {self.count}"


Drawn = tuple[int, int, float, int]


def drawn(item: Item) -> Drawn:
    """What the item is, and two draws for it: NumPy's, and torch's as the augmentation takes them."""
    generator = torch.Generator().manual_seed(item.seed_for("crop"))
    number = int(torch.randint(2**40, (), generator=generator))
    return item.index, item.epoch, float(item.generator("words").random()), number


def batches(stream: Stream, count: int) -> list[list[Drawn]]:
    return list(itertools.islice(stream, count))


def indices(stream: Stream, count: int) -> list[int]:
    return [item[0] for batch in batches(stream, count) for item in batch]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 30])
def test_each_epoch_holds_each_item_once_whatever_the_batch_size(batch_size: int) -> None:
    """Also where a batch is larger than the source: no batch is incomplete, no item is dropped."""
    stream = Stream(Numbers(11), batch_size, prepare=drawn)
    parts = batches(stream, 33 // batch_size + 1)
    assert {len(batch) for batch in parts} == {batch_size}
    items = [item for batch in parts for item in batch]
    for epoch in range(3):
        part = items[11 * epoch : 11 * epoch + 11]
        assert [item[1] for item in part] == [epoch] * 11
        assert sorted(item[0] for item in part) == list(range(11))
    assert stream.position == len(items)
    assert stream.epoch == len(items) / 11
    assert items[:30] == [item for batch in batches(Stream(Numbers(11), 3, prepare=drawn), 10) for item in batch]


def test_order_and_draws_are_the_seeds() -> None:
    parts = [batches(Stream(Numbers(1000), 10, seed=seed, prepare=drawn), 20) for seed in (0, 0, 1)]
    assert parts[0] == parts[1]
    assert not set(itertools.chain(*parts[0])) & set(itertools.chain(*parts[2]))


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 2), (1, 0), (2, 1)])
def test_interruption_and_resumption(before: int, after: int) -> None:
    """With other workers behind the interruption than before; 3 batches before and 13 behind, over an epoch's end."""
    whole = batches(Stream(Numbers(50, unreadable=[7, 30]), 6, seed=3, prepare=drawn), 16)
    first = Stream(Numbers(50, unreadable=[7, 30]), 6, seed=3, prepare=drawn, num_workers=before)
    given = batches(first, 3)
    state = json.loads(json.dumps(first.state_dict()))
    second = Stream(Numbers(50, unreadable=[7, 30]), 6, seed=3, prepare=drawn, num_workers=after)
    second.load_state_dict(state)
    assert given + batches(second, 13) == whole
    third = Stream(Numbers(50, unreadable=[7, 30]), 6, seed=3, prepare=drawn)
    assert batches(third, 16) == whole
    assert third.state_dict() == second.state_dict(), "what could not be read counts on"


def test_the_state_inside_the_loop_is_behind_the_batch() -> None:
    stream = Stream(Numbers(50), 5, prepare=drawn)
    for number, _ in zip((1, 2, 3), stream, strict=False):
        assert stream.state_dict()["position"] == 5 * number
    assert indices(stream, 2)[:5] == indices(Stream(Numbers(50), 5, prepare=drawn), 4)[15:20], "`for` goes on"


def test_resuming_seeks() -> None:
    source = Numbers(1000)
    stream = Stream(source, 10, prepare=drawn)
    stream.load_state_dict({**stream.state_dict(), "position": 123_450})
    (batch,) = batches(stream, 1)
    assert source.asked == [item[0] for item in batch]
    assert {item[1] for item in batch} == {123}


def test_resuming_with_other_ranks_and_batches() -> None:
    whole = indices(Stream(Numbers(50), 1, prepare=drawn), 80)
    first = Stream(Numbers(50), 8, prepare=drawn)
    given = indices(first, 4)
    for batch_size, world_size in ((4, 1), (12, 3)):
        parts = []
        for rank in range(world_size):
            stream = Stream(Numbers(50), batch_size, prepare=drawn, rank=rank, world_size=world_size)
            stream.load_state_dict(first.state_dict())
            parts.append([[item[0] for item in batch] for batch in batches(stream, 3)])
        rest = [index for step in zip(*parts, strict=True) for part in step for index in part]
        assert given + rest == whole[: len(given) + len(rest)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_batch(world_size: int) -> None:
    whole = batches(Stream(Numbers(50, [4]), 12, prepare=drawn), 10)
    parts = [
        batches(Stream(Numbers(50, [4]), 12, prepare=drawn, rank=r, world_size=world_size), 10)
        for r in range(world_size)
    ]
    assert [list(itertools.chain(*step)) for step in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize(("start_method", "num_workers"), [("fork", 2), ("spawn", 1)])
def test_workers_only_fetch(start_method: str, num_workers: int) -> None:
    stream = Stream(Numbers(50, [4]), 7, prepare=drawn, num_workers=num_workers, start_method=start_method)
    assert batches(stream, 9) == batches(Stream(Numbers(50, [4]), 7, prepare=drawn), 9)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_random_states_are_left_alone(num_workers: int) -> None:
    """Else dropout would depend on how often a run was resumed."""
    states = torch.get_rng_state().clone(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    batches(Stream(Numbers(50), 7, prepare=drawn, num_workers=num_workers), 3)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002


def count(items: list[Drawn]) -> dict[str, torch.Tensor]:
    return {"index": torch.tensor([item[0] for item in items])}


def test_collate_makes_the_batch() -> None:
    stream = Stream(Numbers(9), 4, prepare=drawn, collate=count, num_workers=1)
    assert next(iter(stream))["index"].tolist() == indices(Stream(Numbers(9), 4, prepare=drawn), 1)
    (item,) = next(iter(Stream(Numbers(9), 1)))
    assert item == Item(None, str(item.index), item.index // 2, item.index, 0, 0)


# What cannot be read


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """40 rows, of which those from 3 to 8 cannot be read."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    for n in range(40):
        (tmp_path / f"{n}.png").write_bytes(buffer.getvalue())
    (tmp_path / "3.png").unlink()
    (tmp_path / "4.png").write_bytes(buffer.getvalue()[:40])
    (tmp_path / "6.png").write_text("<html>404</html>")
    captions = {5: "", 7: "  ", 8: "\\ud83d"}
    rows = [{"image": f"{n}.png", "caption": captions.get(n, f"photo {n}")} for n in range(40)]
    lines = [json.dumps(row).replace("\\\\u", "\\u") for row in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return tmp_path / "pairs.jsonl"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_cannot_be_read_is_replaced_counted_and_named(
    num_workers: int, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = read_caption_table(photos, "image", "caption")
    stream = Stream(source, 8, prepare=drawn, num_workers=num_workers, max_unreadable=0.5)
    parts = batches(stream, 10)
    folder = photos.parent
    assert {place.partition(" ")[0]: item.kind for place, item in stream.unreadable.items()} == {
        f"{folder}/3.png": "missing file",
        f"{folder}/4.png": "broken image",
        f"{folder}/5.png": "empty text",
        f"{folder}/6.png": "broken image",
        f"{folder}/7.png": "empty text",
        f"{folder}/8.png": "unreadable",
    }
    assert f"{folder}/5.png (caption 6 of {photos}): empty text" in caplog.text
    assert stream.num_unreadable["empty text"] >= 4
    assert stream.num_read == 80 + sum(stream.num_unreadable.values())
    items = [item[0] for batch in parts for item in batch]
    assert len(items) == 80
    whole = indices(Stream(Numbers(40), 8, prepare=drawn), 10)
    assert not set(items) & set(range(3, 9))
    kept = [n for n, index in enumerate(whole) if not 3 <= index <= 8]
    assert len(kept) == 68
    assert [items[n] for n in kept] == [whole[n] for n in kept], "no other position is moved"


def test_too_many_end_the_run() -> None:
    source = Numbers(2000, unreadable=range(0, 2000, 50))
    stream = Stream(source, 100, max_unreadable=0.01)
    with pytest.raises(TooManyUnreadable) as raised:
        batches(stream, 100)
    number = sum(stream.num_unreadable.values())
    assert 10 < number < 25
    message = str(raised.value)
    assert f"{number} of {stream.num_read} items cannot be read, more than max_unreadable = 0.01 allows" in message
    assert f"({number} x unreadable)" in message
    assert message.count("\n  number ") == 10
    assert ": unreadable: out of order" in message


def test_few_do_not(caplog: pytest.LogCaptureFixture) -> None:
    stream = Stream(Numbers(200, unreadable=[1]), 100, max_unreadable=0.01)
    batches(stream, 40)
    assert stream.num_unreadable["unreadable"] >= 20
    assert caplog.text.count("number 1: unreadable") == 1, "named once, counted each time"
    with pytest.raises(TooManyUnreadable, match="1 of "):
        batches(Stream(Numbers(200, unreadable=[1]), 100, max_unreadable=0), 40)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_can_be_read(num_workers: int) -> None:
    with pytest.raises(TooManyUnreadable, match="64 of 64 items cannot be read"):
        batches(Stream(Numbers(9, unreadable=range(9)), 4, max_unreadable=0.5, num_workers=num_workers), 1)


def refuse(error: Exception) -> Callable[[Item], Any]:
    def prepare(item: Item) -> int:
        if item.index == 2:
            raise error
        return item.index

    return prepare


def test_what_prepare_refuses_is_unreadable_but_its_mistakes_are_errors() -> None:
    stream = Stream(Numbers(9), 9, prepare=refuse(UnreadableItem("no token", "empty text")))
    assert 2 not in batches(stream, 1)[0]
    assert stream.num_unreadable == {"empty text": 1}
    for error, num_workers in ((KeyError("mistake"), 0), (FileNotFoundError("vocab.txt"), 1)):
        with pytest.raises(type(error), match=r"mistake|vocab\.txt"):
            batches(Stream(Numbers(9), 9, prepare=refuse(error), num_workers=num_workers, start_method="fork"), 1)


# Waiting


def test_a_reader_that_cannot_keep_up_is_seen() -> None:
    stream = Stream(Numbers(50, seconds=0.02), 2)
    batches(stream, 5)
    assert stream.waiting_share() > 0.8
    time.sleep(0.05)
    assert stream.waiting_share() < 0.2, "counted anew"
    for _ in itertools.islice(Stream(Numbers(50), 2), 5):
        pass
    stream = Stream(Numbers(50), 2)
    for _ in itertools.islice(stream, 5):
        time.sleep(0.05)
    assert stream.waiting_share() < 0.2


# At the door


def test_a_state_of_other_data_is_refused() -> None:
    state = Stream(Numbers(50), 5).state_dict()
    for stream, name in ((Stream(Numbers(51), 5), "num_items"), (Stream(Numbers(50), 5, seed=1), "seed")):
        with pytest.raises(SourceError, match=f"Stream: {name} must be that of the run to resume"):
            stream.load_state_dict(state)
    with pytest.raises(SourceError, match="fingerprint"):
        Stream(Numbers(50), 5).load_state_dict({**state, "fingerprint": "of letters"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a multiple of world_size = 1, got 0"),
        ({"batch_size": 5, "world_size": 2}, "batch_size must be a multiple of world_size = 2, got 5"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size = 2\), got 2"),
        ({"max_unreadable": 0.6}, r"max_unreadable must be in \[0, 0\.5\], got 0\.6"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stream(Numbers(5), **{"batch_size": 4, **arguments})


def test_an_empty_source() -> None:
    with pytest.raises(SourceError, match="must hold a sample"):
        Stream(Numbers(0), 1)


# All together

RUN = """
import itertools, json, os, pathlib, sys
from vlmo_fast.data.readers.shards import TarShards
from vlmo_fast.data.stream import Stream

def prepare(item):
    return [item.text, item.image.size[0], item.epoch, int(item.generator("crop").integers(2**40))]

folder, num_workers = pathlib.Path(sys.argv[1]), int(sys.argv[2])
stream = Stream(TarShards(folder), 4, seed=5, prepare=prepare, num_workers=num_workers, start_method="fork")
state = folder / "state.json"
if state.exists():
    stream.load_state_dict(json.loads(state.read_text()))
for batch in itertools.islice(stream, 11 - stream.position // 4):
    with (folder / "log.jsonl").open("a") as log:
        print(json.dumps([stream.position, batch]), file=log, flush=True)
    if stream.position % 8 == 0:  # every second step
        state.with_suffix(".part").write_text(json.dumps(stream.state_dict()))
        state.with_suffix(".part").replace(state)
    print("step", flush=True)
    if len(sys.argv) > 3:
        sys.stdin.readline()
"""


def test_a_run_that_is_killed_in_the_middle_of_its_shards_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL behind the fifth batch of a run with two workers; resumed with one from the state of the fourth."""
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        folder.mkdir()
        for number in range(3):
            with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
                for n in range(5 * number, 5 * number + 5):
                    buffer = io.BytesIO()
                    Image.new("RGB", (n + 1, 4)).save(buffer, "JPEG")
                    for suffix, content in (("jpg", buffer.getvalue()), ("txt", f"caption {n}".encode())):
                        member = tarfile.TarInfo(f"{n:09d}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))

    def run(folder: str, num_workers: str) -> None:
        monkeypatch.setattr(sys, "argv", ["run", str(tmp_path / folder), num_workers])
        exec(RUN, {})

    command = [sys.executable, "-c", RUN, str(tmp_path / "killed"), "2", "wait for a line at each step"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as killed:
        run("whole", "0")
        for step in range(5):
            assert killed.stdout.readline() == "step\n"
            if step < 4:
                killed.stdin.write("\n")
                killed.stdin.flush()
        killed.send_signal(signal.SIGKILL)
    run("killed", "1")

    def steps(folder: str) -> list[Any]:
        return [json.loads(line) for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]

    expected, got = steps("whole"), steps("killed")
    assert [position for position, _ in expected] == list(range(4, 48, 4))
    assert got[:5] == expected[:5]
    assert got[5:] == expected[4:], "the fifth batch once more, then what follows"
    assert all(text == f"caption {width - 1}" for _, batch in got for text, width, _, _ in batch)
