"""Collections: embeddings in their order, nothing encoded twice, what is left out named, awkward names kept."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.numpy import load_file
from test_processing import SIZES, WORDS, photo

import vlmo_fast
from vlmo_fast import VLMoConfig, VLMoProcessor
from vlmo_fast.data.images import ImageError, read_image
from vlmo_fast.data.tables import TableError
from vlmo_fast.embedding import Collection, collect, embed, output_path, write
from vlmo_fast.store import EmbeddingStore, fingerprint

TEXTS = ["a melon", "boar", "a melon left of a boar", "a boar ?", "melon melon", "of", "left left left"]


class Bench:
    """A small model with its processor and store, and a count of the items that it encodes."""

    def __init__(self, folder: Path) -> None:
        config = VLMoConfig(**SIZES, has_itm_head=False)
        vocabulary = folder / "vocab.txt"
        vocabulary.write_text("\n".join(WORDS))
        torch.manual_seed(0)
        self.model = vlmo_fast.VLMoForImageTextRetrieval(config).eval()
        self.processor = VLMoProcessor.from_vocabulary(vocabulary, config)
        self.store = EmbeddingStore(folder / "store" / f"{fingerprint(self.model.backbone)}.sqlite", config.hidden_size)
        self.encoded = 0
        self.model.backbone.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, module: object, args: tuple, kwargs: dict, output: object) -> None:
        self.encoded += len(next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)))

    def run(self, collection: Collection, **options: object):
        self.encoded = 0
        done = embed(self.model, self.processor, collection, self.store, **{"batch_size": 4, **options})
        assert done.computed == self.encoded
        return done

    def wanted(self, collection: Collection) -> tuple[np.ndarray, np.ndarray]:
        """One item at a time through the model."""
        with torch.no_grad():
            images = [self.processor(images=read_image(path), return_tensors="pt") for path in collection.images]
            texts = [self.processor(text=text, return_tensors="pt") for text in collection.texts]
            nothing = torch.zeros(0, self.store.width)
            ours = [self.model.get_image_features(**x).pooler_output for x in images]
            theirs = [self.model.get_text_features(**x).pooler_output for x in texts]
        return torch.cat([nothing, *ours]).numpy(), torch.cat([nothing, *theirs]).numpy()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine photographs of several sizes and modes, two of them the same, in nested folders."""
    photos = tmp_path / "photos"
    (photos / "deep").mkdir(parents=True)
    for number in range(8):
        image = photo(40 + 9 * number, 70 - 5 * number, seed=number).convert(("RGB", "L", "RGBA")[number % 3])
        image.save(photos / ("deep" if number % 2 else ".") / f"{number}.png")
    (photos / "twin.png").write_bytes((photos / "2.png").read_bytes())
    (photos / "notes.txt").write_text("not a picture")
    (tmp_path / "texts.txt").write_text("\n".join([*TEXTS, "boar"]) + "\n")
    return tmp_path


def read(out: Path) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Embeddings and items by kind."""
    if out.suffix == ".safetensors":
        tensors = load_file(out)
        items = json.loads(tensors.pop("items").tobytes())
        return {name.partition("_")[0]: x for name, x in tensors.items()}, {kind[:-1]: x for kind, x in items.items()}
    table = parquet.read_table(out).to_pydict()
    kinds = list(dict.fromkeys(table["kind"]))
    rows = {kind: [row for row, found in enumerate(table["kind"]) if found == kind] for kind in kinds}
    embeds = {kind: np.array([table["embedding"][row] for row in rows[kind]], np.float32) for kind in kinds}
    return embeds, {kind: [table["item"][row] for row in rows[kind]] for kind in kinds}


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors"])
def test_embeddings_in_the_collections_order(suffix: str, bench: Bench, folder: Path) -> None:
    collection = collect(folder / "photos", folder / "texts.txt")
    reported: list[int] = []
    done = bench.run(collection, report=reported.append)
    out = folder / "deep" / f"out{suffix}"
    write(out, collection, done, bench.store)
    embeds, items = read(out)
    assert items == {"image": collection.images, "text": collection.texts}
    assert items["image"] == sorted(map(str, (folder / "photos").rglob("*.png")))
    assert items["text"] == [*TEXTS, "boar"]
    for ours, theirs in zip(embeds.values(), bench.wanted(collection), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
    assert done.computed == 8 + 7  # twins once
    assert sum(reported) == 9 + 8
    assert collection.left_out == [(str(folder / "photos" / "notes.txt"), "not a picture")]


def test_an_array_has_its_items_beside_it(bench: Bench, folder: Path) -> None:
    collection = collect(texts=folder / "texts.txt")
    write(folder / "out.npy", collection, bench.run(collection), bench.store)
    np.testing.assert_allclose(np.load(folder / "out.npy"), bench.wanted(collection)[1], atol=2e-6)
    assert json.loads((folder / "out.npy.json").read_text()) == collection.texts


def test_nothing_is_encoded_twice(bench: Bench, folder: Path) -> None:
    """A second run, a moved folder, more items, another order: only what is new."""
    bench.run(collect(folder / "photos", folder / "texts.txt"))
    bench.run(collect(folder / "photos", folder / "texts.txt"))
    assert bench.encoded == 0
    (folder / "photos").rename(folder / "elsewhere")
    os.utime(folder / "elsewhere" / "0.png", (0, 0))
    photo(50, 50, seed=99).save(folder / "elsewhere" / "new.png")
    (folder / "texts.txt").write_text("\n".join(["left a boar", *reversed(TEXTS)]))
    collection = collect(folder / "elsewhere", folder / "texts.txt")
    done = bench.run(collection)
    assert bench.encoded == 2
    write(folder / "out.parquet", collection, done, bench.store)
    for ours, theirs in zip(read(folder / "out.parquet")[0].values(), bench.wanted(collection), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3])
def test_what_was_done_before_a_stop_is_kept(stop_after: int, bench: Bench, folder: Path) -> None:
    collection = collect(folder / "photos", folder / "texts.txt")
    batches = 0

    def stop(count: int) -> None:
        nonlocal batches
        batches += bool(count)
        if batches > stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(collection, report=stop)
    kept = len(bench.store)
    assert kept >= bench.encoded - 4  # but for the batch that was on its way
    bench.run(collection)
    assert bench.encoded == 15 - kept


def test_another_model_has_a_store_of_its_own(bench: Bench, folder: Path, tmp_path: Path) -> None:
    collection = collect(folder / "photos")
    bench.run(collection)
    before = fingerprint(bench.model.backbone)
    bench.model.backbone.norm.weight.data[0] += 1
    assert fingerprint(bench.model.backbone) != before


def test_broken_pictures_are_named_or_left_out(bench: Bench, folder: Path) -> None:
    whole = (folder / "photos" / "0.png").read_bytes()
    (folder / "photos" / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "photos" / "zero.jpg").write_bytes(b"")
    collection = collect(folder / "photos")
    with pytest.raises(ImageError, match=r"broken\.png: cannot be decoded .*--skip-broken"):
        bench.run(collection)
    done = bench.run(collection, skip_broken=True)
    assert [Path(path).name for path, _ in done.broken] == ["broken.png", "zero.jpg"]
    write(folder / "out.parquet", collection, done, bench.store)
    assert read(folder / "out.parquet")[1]["image"] == [
        p for p in collection.images if not p.endswith(("broken.png", "zero.jpg"))
    ]


def test_missing_files_of_a_list_are_named(bench: Bench, folder: Path) -> None:
    (folder / "list.txt").write_text("photos/0.png\nphotos/none.png\n")
    with pytest.raises(ImageError, match=r"none\.png"):
        bench.run(collect(folder / "list.txt"))
    done = bench.run(collect(folder / "list.txt"), skip_broken=True)
    assert [Path(path).name for path, _ in done.broken] == ["none.png"]


def test_tables_by_the_names_of_their_columns(folder: Path) -> None:
    (folder / "captions.csv").write_text('file,caption\nphotos/0.png,"a boar, left"\nphotos/2.png,melon\n')
    collection = collect(folder / "captions.csv", folder / "captions.csv", image_column="file", text_column="caption")
    assert collection.images == [str(folder / "photos" / name) for name in ("0.png", "2.png")]
    assert collection.texts == ["a boar, left", "melon"]
    with pytest.raises(TableError, match="is a table; --text-column names the column to read"):
        collect(texts=folder / "captions.csv")
    with pytest.raises(TableError, match="is a table; --image-column names the column to read"):
        collect(folder / "captions.csv")
    with pytest.raises(TableError, match="must be a table to have the column 'file', got a folder"):
        collect(folder / "photos", image_column="file")


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match="must hold pictures, got none among 1 files"):
        collect(tmp_path)


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors", ".npy"])
def test_names_that_are_not_utf8(suffix: str, bench: Bench, folder: Path) -> None:
    name = os.fsdecode(b"M\xe4dchen.png")
    (folder / "photos" / "0.png").rename(folder / "photos" / name)
    collection = collect(folder / "photos")
    write(folder / f"out{suffix}", collection, bench.run(collection), bench.store)
    if suffix == ".npy":
        items = json.loads((folder / "out.npy.json").read_text())
    else:
        items = read(folder / f"out{suffix}")[1]["image"]
    assert sum(Path(item).name in (name, "M\\xe4dchen.png") for item in items) == 1


def test_texts_that_are_cut_are_counted(bench: Bench) -> None:
    exact = " ".join(["boar"] * (SIZES["max_text_length"] - 2))
    done = bench.run(Collection([], ["a boar", exact, exact + " melon", "boar " * 5000], []))
    assert done.cut == [2, 3]
    assert done.text_keys[1] == done.text_keys[3]


def test_numbers_that_overflow_are_refused(bench: Bench, folder: Path) -> None:
    bench.model.backbone.norm.weight.data[:] = 1e38
    with pytest.raises(ValueError, match=r"embedding of '.*' must have norm 1, but numbers overflow in float32"):
        bench.run(collect(texts=folder / "texts.txt"))
    assert len(bench.store) == 0


def test_outputs() -> None:
    images, texts = Collection(["a"], [], []), Collection(["a"], ["b"], [])
    assert output_path(Path("out"), texts) == Path("out.parquet")
    assert output_path(Path("out.npy"), images) == Path("out.npy")
    with pytest.raises(ValueError, match=r"must be \.parquet or \.safetensors"):
        output_path(Path("out.npy"), texts)
    with pytest.raises(ValueError, match=r"must end in one of \.parquet"):
        output_path(Path("out.csv"), texts)


def test_pictures_lie_as_they_were_taken(bench: Bench, folder: Path) -> None:
    """A camera's orientation: the turned file and the upright one have one embedding."""
    upright = photo(64, 48, seed=5)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.rotate(90, expand=True).save(folder / "photos" / "turned.png", exif=exif)
    upright.save(folder / "photos" / "upright.png")
    done = bench.run(collect(folder / "photos"))
    assert done.image_keys[-1] == done.image_keys[-3]  # ..., turned, twin, upright
