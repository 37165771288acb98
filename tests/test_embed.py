"""`vlmo-fast embed`: options, checks before the model is loaded, what is kept, what is left out and said."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet
from test_processing import SIZES, WORDS, photo

import vlmo_fast
from vlmo_fast import VLMoConfig, VLMoProcessor, cli, embedding
from vlmo_fast.formats import loading
from vlmo_fast.store import EmbeddingStore

ROOT = Path(__file__).parents[1]
TEXTS = ["a melon", "boar", "a melon left of a boar"]


@pytest.fixture
def collection(tmp_path, monkeypatch, capsys):
    """A model with its processor, four photographs, a file that is none, three texts; and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = VLMoConfig(**SIZES, has_itm_head=False)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    model = vlmo_fast.VLMoForImageTextRetrieval(config).eval()
    model.save_pretrained(tmp_path / "model")
    VLMoProcessor.from_vocabulary(tmp_path / "vocab.txt", config).save_pretrained(tmp_path / "model")
    vlmo_fast.save_official(model, tmp_path / "released.pt")
    (tmp_path / "photos").mkdir()
    for number in range(4):
        photo(40 + 9 * number, 70 - 5 * number, seed=number).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    capsys.readouterr()
    return tmp_path


def run(capsys, folder: Path, out: str, *options: object, model: str = "model") -> dict:
    arguments = [folder / model, folder / out, *options, "--json", "--batch-size", 2]
    status = cli.main(["embed", *map(str, arguments)])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    return json.loads(shown.out)


def refuse(capsys, *arguments: object) -> str:
    assert cli.main(["embed", *map(str, arguments)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("vlmo-fast embed: ")
    assert shown.err.count("vlmo-fast embed") == 1
    assert "Traceback" not in shown.err
    return shown.err


def both(folder: Path) -> tuple:
    return "--images", folder / "photos", "--texts", folder / "texts.txt"


def test_nothing_is_encoded_twice(collection, capsys):
    """By whatever name and from whatever file the model comes; another dtype or store is another matter."""
    first = run(capsys, collection, "out.parquet", *both(collection))
    assert (first["images"], first["texts"], first["width"], first["computed"]) == (4, 3, 24, 7)
    assert first["left_out"] == first["cut"] == []
    assert Path(first["store"]).is_relative_to(collection / "cache" / "vlmo_fast" / "embeddings")
    table = parquet.read_table(collection / "out.parquet").to_pydict()
    assert table["item"][4:] == TEXTS
    assert not (collection / "out.parquet.left-out.jsonl").exists()
    again = run(capsys, collection, "other.safetensors", *both(collection))
    assert (again["computed"], again["store"]) == (0, first["store"])
    assert run(capsys, collection, "third", "--images", collection / "photos", model="released.pt")["computed"] == 0
    assert (collection / "third.parquet").is_file()
    half = run(capsys, collection, "half.npy", "--texts", collection / "texts.txt", "--dtype", "bfloat16")
    assert half["computed"] == 3
    elsewhere = run(capsys, collection, "x.npy", "--texts", collection / "texts.txt", "--store", collection / "store")
    assert elsewhere["computed"] == 3
    assert Path(elsewhere["store"]).parent == collection / "store"


def test_tables(collection, capsys):
    (collection / "table.csv").write_text('path,caption\nphotos/3.png,"a melon, left"\nphotos/0.png,boar\n')
    table = collection / "table.csv"
    columns = ("--images", table, "--image-column", "path", "--texts", table, "--text-column", "caption")
    run(capsys, collection, "out.parquet", *columns)
    items = parquet.read_table(collection / "out.parquet").to_pydict()["item"]
    assert items == [str(collection / "photos/3.png"), str(collection / "photos/0.png"), "a melon, left", "boar"]


def test_what_is_left_out_is_counted_and_named(collection, capsys):
    """On the terminal the first few, all of them in the file beside the output and in the JSON."""
    photos = collection / "photos"
    (photos / "broken.png").write_bytes((photos / "0.png").read_bytes()[:60])
    for number in range(7):
        (photos / f"note-{number}.txt").write_text("not a picture")
    (collection / "texts.txt").write_text("\n".join([*TEXTS, "a boar " * 100]))
    out = collection / "out.parquet"
    message = refuse(capsys, collection / "model", out, "--images", photos)
    assert re.search(r"broken\.png: .*--skip-broken", message)
    assert cli.main(["embed", *map(str, (collection / "model", out, *both(collection), "--skip-broken"))]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"4 images and 4 texts, 24 numbers each, 8 encoded now: {out}\n"
    beside = collection / "out.parquet.left-out.jsonl"
    assert f"8 files are left out (all of them: {beside}):" in shown.err
    assert shown.err.count("note-") == 5
    assert "1 texts are longer than the model takes, and cut" in shown.err
    assert "cut to 8 tokens" in shown.err
    rows = [json.loads(line) for line in beside.read_text().splitlines()]
    assert sorted(Path(row["item"]).name for row in rows[:8]) == ["broken.png", *(f"note-{n}.txt" for n in range(7))]
    assert all(row["reason"] for row in rows)
    report = run(capsys, collection, "out.parquet", *both(collection), "--skip-broken", "--replace")
    assert report["left_out"] + report["cut"] == rows
    assert (report["images"], report["computed"], report["cut"][0]["row"]) == (4, 0, 3)
    (collection / "one.txt").write_text("photos/0.png\n")
    run(capsys, collection, "out.parquet", "--images", collection / "one.txt", "--replace")
    assert not beside.exists()  # that of another run


def test_stopped_and_gone_on(collection, capsys, monkeypatch):
    """Ctrl-C: one line says what is kept and how to go on; then only the rest is encoded."""
    put, puts = EmbeddingStore.put, []

    def stop(self, keys, embeddings):
        if len(puts) == 2:
            raise KeyboardInterrupt
        puts.append(keys)
        put(self, keys, embeddings)

    arguments = [collection / "model", collection / "out.parquet", *both(collection), "--batch-size", 2]
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingStore, "put", stop)
        assert cli.main(["embed", *map(str, arguments)]) == 130
    wanted = "\nvlmo-fast embed: stopped; 4 embeddings are kept; the same command goes on from there\n"
    assert capsys.readouterr().err.endswith(wanted)
    assert not (collection / "out.parquet").exists()
    assert run(capsys, collection, "out.parquet", *both(collection))["computed"] == 3


def test_released_checkpoints(collection, capsys):
    """A file without a processor: images need none, texts a vocabulary."""
    texts = ("--texts", collection / "texts.txt", "--vocab", collection / "vocab.txt")
    run(capsys, collection, "texts.npy", *texts, model="released.pt")
    run(capsys, collection, "images.npy", "--images", collection / "photos", model="released.pt")
    for name in ("texts.npy", "images.npy"):
        assert np.allclose(np.linalg.norm(np.load(collection / name), axis=1), 1, atol=1e-5)


def test_what_can_be_wrong_is_checked_before_the_model_is_loaded(collection, capsys, monkeypatch):
    monkeypatch.setattr(loading, "open_any", lambda *_, **__: pytest.fail("the model was read"))
    model, texts = collection / "model", ("--texts", collection / "texts.txt")
    (collection / "there.npy").touch()
    (collection / "folder.npy").mkdir()
    (collection / "empty").mkdir()
    (collection / "gap.txt").write_text("boar\n\nmelon\n")
    out = collection / "o.npy"
    cases = [
        ((model, "out.csv", *texts), r"OUT must end in one of \.parquet, \.safetensors, \.npy"),
        ((model, "out.npy", *both(collection)), "for images and texts together, got .npy"),
        ((model, collection / "there.npy", *texts), "OUT must be new \\(or take --replace\\)"),
        ((model, collection / "folder.npy", *texts, "--replace"), "OUT must be a file, got the folder"),
        ((model, collection / "there.npy" / "x.npy", *texts), "OUT must lie in a folder that can be written to"),
        ((model, out, "--texts", collection / "none.txt"), "none.txt: there is no such file"),
        ((model, out, "--texts", collection / "gap.txt"), "line 2 is empty"),
        ((model, out, "--images", collection / "empty"), "must hold pictures, got none"),
        ((model, out, *texts, "--device", "banana"), "device must be one that torch can use here, got 'banana'"),
        ((model, out, *texts, "--device", "cuda:99"), "device must be one that torch can use here, got 'cuda:99'"),
        ((model, out, *texts, "--vocab", collection / "none.txt"), "vocab must be a file or 'bert'"),
        ((collection / "none", out, *texts), "path must be a folder or a checkpoint file"),
        ((collection / "released.pt", out, *texts), "--vocab must be given"),
    ]
    before = sorted(collection.rglob("*"))
    for arguments, message in cases:
        assert re.search(message, refuse(capsys, *arguments))
    assert sorted(collection.rglob("*")) == before
    for arguments, message in (
        ((), "nothing to embed: give --images, --texts or both"),
        ((*texts, "--batch-size", 0), "--batch-size: must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["embed", *map(str, (model, out, *arguments))])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_models_that_cannot_embed(collection, capsys, monkeypatch):
    vlmo_fast.VLMoForQuestionAnswering(VLMoConfig(**SIZES)).save_pretrained(collection / "vqa")
    capsys.readouterr()
    arguments = (collection / "vqa", collection / "out.npy", "--images", collection / "photos")
    assert "must have a contrastive head, got a VLMoForQuestionAnswering" in refuse(capsys, *arguments)
    monkeypatch.setattr(embedding, "write", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    arguments = (collection / "model", collection / "out.npy", "--images", collection / "photos")
    assert refuse(capsys, *arguments).endswith("vlmo-fast embed: the disk is full\n")


def test_the_command_line(collection):
    command = [sys.executable, "-m", "vlmo_fast", "embed"]
    arguments = [collection / "model", collection / "out.safetensors", "--texts", collection / "texts.txt"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 images and 3 texts, 24 numbers each, 3 encoded now" in done.stdout
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    for word in ("--images", "--image-column", "--store", "--replace", ".parquet", "examples:"):
        assert word in shown
