"""`vlmo-fast embed`: the model's own embeddings in three formats, resumed to the bit, refused with one message."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import load_file
from test_processing import SIZES, WORDS, photo

import vlmo_fast
from vlmo_fast import VLMoConfig, VLMoProcessor, cli, embed

ROOT = Path(__file__).parents[1]
TEXTS = ["a melon", "boar", "a melon left of a boar", "a boar ?", "melon melon", "of", "left left left"]


@pytest.fixture
def collection(tmp_path):
    """A model with its processor, seven photographs of several sizes and modes in nested folders, seven texts."""
    config = VLMoConfig(**SIZES, has_itm_head=False)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    model = vlmo_fast.VLMoForImageTextRetrieval(config).eval()
    model.save_pretrained(tmp_path / "model")
    VLMoProcessor.from_vocabulary(tmp_path / "vocab.txt", config).save_pretrained(tmp_path / "model")
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for number in range(7):
        image = photo(40 + 9 * number, 70 - 5 * number, seed=number)
        folder = tmp_path / "photos" / ("deep" if number % 2 else ".")
        image.convert(("RGB", "L", "RGBA")[number % 3]).save(folder / f"{number}.png")
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n\n")
    return tmp_path


def run(capsys, folder: Path, out: str, *options: object) -> dict:
    arguments = [folder / "model", folder / out, *options, "--json", "--batch-size", 2, "--part-size", 3]
    status = embed.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    return json.loads(shown.out)


def refuse(capsys, *arguments: object) -> str:
    assert embed.main([str(argument) for argument in arguments]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("vlmo-fast embed: ")
    return shown.err


def wanted(folder: Path, images: list[str], texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """One item at a time through the model."""
    model = vlmo_fast.VLMoForImageTextRetrieval.from_pretrained(folder / "model")
    processor = VLMoProcessor.from_pretrained(folder / "model")
    with torch.no_grad():
        inputs = [processor(images=Image.open(path).convert("RGB"), return_tensors="pt") for path in images]
        image_embeds = [model.get_image_features(**x).pooler_output for x in inputs]
        inputs = [processor(text=text, return_tensors="pt") for text in texts]
        text_embeds = [model.get_text_features(**x).pooler_output for x in inputs]
    nothing = torch.zeros(0, SIZES["hidden_size"])
    return torch.cat([nothing, *image_embeds]), torch.cat([nothing, *text_embeds])


def both(folder: Path) -> tuple:
    return "--images", folder / "photos", "--texts", folder / "texts.txt"


def test_images_and_texts(collection, capsys):
    """In the collection's order, whatever the order of work, beside the items that they are of."""
    report = run(capsys, collection, "out.safetensors", *both(collection))
    tensors = load_file(collection / "out.safetensors")
    with safe_open(collection / "out.safetensors", "pt") as file:
        images, texts = (json.loads(file.metadata()["items"])[name] for name in ("images", "texts"))
    assert texts == TEXTS
    assert images == sorted(str(path) for path in (collection / "photos").rglob("*.png"))
    for ours, theirs in zip(
        (tensors["image_embeds"], tensors["text_embeds"]), wanted(collection, images, texts), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert report["images"] == report["texts"] == 7
    assert report["width"] == 24
    assert not list(collection.glob(".*"))


def test_other_formats_hold_the_same(collection, capsys):
    run(capsys, collection, "out.safetensors", *both(collection))
    tensors = load_file(collection / "out.safetensors")
    run(capsys, collection, "out.parquet", *both(collection))
    table = parquet.read_table(collection / "out.parquet").to_pydict()
    assert table["kind"] == ["image"] * 7 + ["text"] * 7
    assert table["item"][7:] == TEXTS
    everything = torch.cat([tensors["image_embeds"], tensors["text_embeds"]])
    assert torch.equal(torch.tensor(table["embedding"]), everything)
    run(capsys, collection, "texts.npy", "--texts", collection / "texts.txt")
    assert np.array_equal(np.load(collection / "texts.npy"), tensors["text_embeds"].numpy())
    assert json.loads((collection / "texts.npy.json").read_text()) == TEXTS


def test_a_list_of_images(collection, capsys):
    """Paths relative to the list, in its order."""
    (collection / "list.txt").write_text("photos/deep/3.png\nphotos/0.png\n")
    run(capsys, collection, "out.npy", "--images", collection / "list.txt")
    paths = [str(collection / name) for name in ("photos/deep/3.png", "photos/0.png")]
    assert json.loads((collection / "out.npy.json").read_text()) == paths
    torch.testing.assert_close(torch.from_numpy(np.load(collection / "out.npy")), wanted(collection, paths, [])[0])


def test_resumed_to_the_bit(collection, capsys, monkeypatch):
    """Stopped after two of six parts: those are not computed again, and the output is that of one go."""
    run(capsys, collection, "whole.safetensors", *both(collection))
    save, saved = embed._save_part, []

    def stop(folder, part, *tensors):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(part)
        save(folder, part, *tensors)

    with monkeypatch.context() as patch:
        patch.setattr(embed, "_save_part", stop)
        arguments = [collection / "model", collection / "out.safetensors", *both(collection), "--part-size", 3]
        with pytest.raises(SystemExit) as stopped:
            cli.main(["embed", *map(str, arguments), "--batch-size", "2", "--json"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\nvlmo-fast embed: stopped\n"
    assert not (collection / "out.safetensors").exists()
    again = []
    monkeypatch.setattr(embed, "_save_part", lambda folder, part, *x: again.append(part) or save(folder, part, *x))
    report = run(capsys, collection, "out.safetensors", *both(collection))
    assert report["resumed_parts"] == 2
    assert len(again) == 4
    assert not set(again) & set(saved)
    assert (collection / "out.safetensors").read_bytes() == (collection / "whole.safetensors").read_bytes()


def test_another_run_is_not_resumed(collection, capsys, monkeypatch):
    """Parts of another collection would be silently wrong."""
    monkeypatch.setattr(embed, "_write", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    arguments = (collection / "model", collection / "out.npy", "--texts", collection / "texts.txt")
    assert "the disk is full" in refuse(capsys, *arguments)
    monkeypatch.undo()
    for change in (("--dtype", "bfloat16"), ("--part-size", 2), ("--vocab", collection / "vocab.txt")):
        assert "--restart forgets them" in refuse(capsys, *arguments, *change)
    (collection / "texts.txt").write_text("boar\n")
    assert "--restart forgets them" in refuse(capsys, *arguments)
    pictures = (collection / "model", collection / "pictures.npy", "--images", collection / "photos")
    with monkeypatch.context() as patch:
        patch.setattr(embed, "_write", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        assert "the disk is full" in refuse(capsys, *pictures)
    photo(50, 50, seed=9).save(collection / "photos" / "0.png")  # the same name, another picture
    assert "--restart forgets them" in refuse(capsys, *pictures)
    report = run(capsys, collection, "out.npy", "--texts", collection / "texts.txt", "--restart")
    assert (report["texts"], report["resumed_parts"]) == (1, 0)
    assert "OUT must be new (or take --restart)" in refuse(capsys, *arguments)


def test_broken_images(collection, capsys):
    """One message that names the file; or left out, and said so."""
    broken = collection / "photos" / "1b.png"
    broken.write_bytes((collection / "photos" / "0.png").read_bytes()[:60])
    (collection / "photos" / "zz.jpg").write_text("a poem")
    out = collection / "out.npy"
    message = refuse(capsys, collection / "model", out, "--images", collection / "photos")
    assert re.search(r"(1b\.png|zz\.jpg) must be an image that can be read \(or take --skip-broken\)", message)
    report = run(capsys, collection, "out.npy", "--images", collection / "photos", "--skip-broken", "--restart")
    assert report["skipped"] == [str(broken), str(collection / "photos" / "zz.jpg")]
    assert report["images"] == len(np.load(out)) == 7
    only = collection / "only"
    only.mkdir()
    (only / "zz.jpg").write_text("a poem")
    arguments = ("--images", only, "--skip-broken", "--restart")
    assert "got none" in refuse(capsys, collection / "model", out, *arguments)


def test_released_checkpoints(collection, capsys):
    """A file without a processor: images need none, texts a vocabulary."""
    model = vlmo_fast.VLMoForImageTextRetrieval(VLMoConfig(**SIZES, has_itm_head=False))
    vlmo_fast.save_official(model, collection / "released.pt")
    texts = ("--texts", collection / "texts.txt")
    arguments = (collection / "released.pt", collection / "out.npy")
    assert "--vocab must be given" in refuse(capsys, *arguments, *texts)
    assert (
        embed.main([*map(str, arguments), *map(str, texts), "--restart", "--vocab", str(collection / "vocab.txt")]) == 0
    )
    images = (collection / "released.pt", collection / "images.npy", "--images", collection / "photos")
    assert embed.main([*map(str, images), "--dtype", "bfloat16"]) == 0
    assert "7 images and 0 texts, 24 numbers each" in capsys.readouterr().out
    assert np.allclose(np.linalg.norm(np.load(collection / "images.npy"), axis=1), 1, atol=0.01)


def test_refused(collection, capsys, tmp_path):
    model, texts = collection / "model", ("--texts", collection / "texts.txt")
    vqa = vlmo_fast.VLMoForQuestionAnswering(VLMoConfig(**SIZES))
    vqa.save_pretrained(tmp_path / "vqa")
    capsys.readouterr()
    (tmp_path / "empty.txt").write_text("\n\n")
    cases = [
        ((model, "out.csv", *texts), r"OUT must end in one of \.safetensors, \.npy, \.parquet"),
        ((model, "out.npy", *both(collection)), "for images and texts together, got .npy"),
        ((model, tmp_path / "o.npy", "--texts", tmp_path / "none.txt"), "must be a file with one item a line"),
        ((model, tmp_path / "o.npy", "--texts", tmp_path / "empty.txt"), "must hold one item a line, got none"),
        ((model, tmp_path / "o.npy", "--images", model), "must lead to images .* got none in"),
        ((model, tmp_path / "o.npy", *texts, "--batch-size", 0), "--batch-size must be at least 1, got 0"),
        ((tmp_path / "none", tmp_path / "o.npy", *texts), "No such file|must be a checkpoint file"),
        (
            (tmp_path / "vqa", tmp_path / "p.npy", *texts),
            "must have a contrastive head, got a VLMoForQuestionAnswering",
        ),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in cases:
        assert re.search(message, refuse(capsys, *arguments))
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(SystemExit):
        embed.main([str(model), "out.npy"])
    assert "nothing to embed" in capsys.readouterr().err


def test_the_command_line(collection):
    command = [sys.executable, "-m", "vlmo_fast", "embed"]
    arguments = [collection / "model", collection / "out.safetensors", "--texts", collection / "texts.txt"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 images and 7 texts, 24 numbers each" in done.stdout
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    for word in ("--images", "--restart", ".parquet", "examples:"):
        assert word in shown
