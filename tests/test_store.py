"""Embeddings kept by what they are of: nothing lost, nothing half there, several writers at once."""

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from vlmo_fast import MoMEConfig, MoMETransformer
from vlmo_fast.store import EmbeddingStore, default_folder, fingerprint, key_of

WIDTH = 8


def vectors(*numbers: int) -> np.ndarray:
    return np.stack([np.full(WIDTH, number, np.float32) for number in numbers])


def keys(*numbers: int) -> list[bytes]:
    return [key_of(np.array(number)) for number in numbers]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "store.sqlite"


def test_what_was_put_is_there_for_the_next_process(path: Path) -> None:
    with EmbeddingStore(path, WIDTH) as store:
        store.put(keys(1, 2), vectors(1, 2))
        store.put(keys(2, 3), vectors(2, 3))  # one of them again
        assert len(store) == 3
    with EmbeddingStore(path, WIDTH) as store:
        found = store.get(keys(3, 4, 1))
        assert set(found) == set(keys(1, 3))
        assert np.array_equal(found[keys(3)[0]], vectors(3)[0])
        assert store.get([]) == {}


def test_many_keys_at_once(path: Path) -> None:
    numbers = range(2_500)
    with EmbeddingStore(path, WIDTH) as store:
        store.put(keys(*numbers), vectors(*numbers))
        found = store.get(keys(*numbers))
        assert [float(found[key][0]) for key in keys(*numbers)] == list(numbers)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (vectors(1, 2), r"embeddings must be \(1, 8\), got \(2, 8\)"),
        (vectors(1)[:, :4], r"embeddings must be \(1, 8\), got \(1, 4\)"),
        (np.full((1, WIDTH), np.nan, np.float32), "must be finite"),
        (np.full((1, WIDTH), np.inf, np.float32), "must be finite"),
    ],
)
def test_what_is_not_kept(embeddings: np.ndarray, message: str, path: Path) -> None:
    with EmbeddingStore(path, WIDTH) as store:
        with pytest.raises(ValueError, match=message):
            store.put(keys(1), embeddings)
        assert len(store) == 0


def test_another_width_is_refused(path: Path) -> None:
    with EmbeddingStore(path, WIDTH) as store:
        store.put(keys(1), vectors(1))
    with pytest.raises(ValueError, match="must hold embeddings of width 4, got 8"):
        EmbeddingStore(path, 4)


@pytest.mark.parametrize("content", [b"no store", b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_store_is_put_aside(content: bytes, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with EmbeddingStore(path, WIDTH) as store:
        store.put(keys(1), vectors(1))
        assert len(store) == 1
    assert path.with_name("store.sqlite.damaged").read_bytes() == content


def test_a_damaged_embedding_counts_as_none(path: Path) -> None:
    with EmbeddingStore(path, WIDTH) as store:
        store.put(keys(1, 2), vectors(1, 2))
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE embeddings SET vector = ? WHERE key = ?", (b"\1" * 4 * WIDTH, keys(1)[0]))
    connection.close()
    with EmbeddingStore(path, WIDTH) as store:
        assert set(store.get(keys(1, 2))) == set(keys(2))


def test_a_full_disk_loses_nothing(path: Path) -> None:
    with EmbeddingStore(path, WIDTH) as store:
        store.put(keys(1), vectors(1))
        store._connection.execute("PRAGMA max_page_count = 4")
        numbers = range(1_000)
        with pytest.raises(OSError, match=r"store\.sqlite: cannot be written \(database or disk is full\)"):
            store.put(keys(*numbers), vectors(*numbers))
        store._connection.execute("PRAGMA max_page_count = 100000")
        assert len(store) == 1
        store.put(keys(*numbers), vectors(*numbers))
    with EmbeddingStore(path, WIDTH) as store:
        assert len(store) == 1_000


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "store.sqlite").mkdir()
    with pytest.raises(OSError, match=r"store\.sqlite"):
        EmbeddingStore(tmp_path / "store.sqlite", WIDTH)


def _write(path: Path, first: int) -> None:
    with EmbeddingStore(path, WIDTH) as store:
        for start in range(first, first + 200, 10):
            numbers = range(start, start + 10)
            store.put(keys(*numbers), vectors(*numbers))


def test_several_processes_write_at_once(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write, args=(path, first)) for first in (0, 100, 200)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    with EmbeddingStore(path, WIDTH) as store:
        found = store.get(keys(*range(400)))
        assert [float(found[key][0]) for key in keys(*range(400))] == list(range(400))


ENDLESS = """
import sys
from pathlib import Path
import numpy as np
from vlmo_fast.store import EmbeddingStore, key_of
with EmbeddingStore(Path(sys.argv[1]), 8) as store:
    for start in range(0, 10**6, 50):
        numbers = range(start, start + 50)
        store.put([key_of(np.array(n)) for n in numbers], np.stack([np.full(8, n, np.float32) for n in numbers]))
        print(start + 50, flush=True)
"""


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_process_leaves_whole_batches(seed: int, path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", ENDLESS, str(path)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = int(process.stdout.readline())
        time.sleep(0.05 + 0.02 * seed)
        os.kill(process.pid, signal.SIGKILL)
        said = max([said, *(int(line) for line in process.stdout.read().split("\n")[:-1])])
    with EmbeddingStore(path, WIDTH) as store:
        assert len(store) >= said
        assert len(store) % 50 == 0
        found = store.get(keys(*range(len(store))))
        assert [float(found[key][0]) for key in keys(*range(len(store)))] == list(range(len(store)))


def test_keys_tell_inputs_apart() -> None:
    ones = np.ones((2, 3), np.float32)
    different = [ones, ones[:1], ones.reshape(3, 2), ones.astype(np.float64), ones * 2, ones.view(np.int32)]
    assert len({key_of(array) for array in different}) == len(different)
    assert key_of(np.asfortranarray(ones)) == key_of(ones)


def test_the_fingerprint_is_of_what_is_computed() -> None:
    def small(**settings: object) -> MoMETransformer:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_vl_layers": 1}
        return MoMETransformer(MoMEConfig(**{**sizes, "image_size": 16, "vocab_size": 20, **settings}))

    base = fingerprint(small())
    assert len(base) == 32
    assert fingerprint(small().eval()) == base
    changed = small()
    changed.norm.bias.data[3] += 1e-3
    others = [changed, small().half(), small().bfloat16(), small(layer_norm_eps=1e-5), small(max_text_length=30)]
    assert len({base, *map(fingerprint, others)}) == 1 + len(others)


def test_the_default_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "vlmo_fast" / "embeddings"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "vlmo_fast" / "embeddings"
