"""Each format of pre-training's data, from a small file as its publisher writes it; and what is wrong in such files."""

import dataclasses
import io
import json
import logging
import os
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmo_fast.data.images import read_image
from vlmo_fast.data.readers import texts as texts_module
from vlmo_fast.data.readers.captions import (
    CaptionedImages,
    read_caption_table,
    read_coco_captions,
    read_image_folder,
    read_karpathy,
    read_visual_genome,
)
from vlmo_fast.data.readers.hf_datasets import DatasetColumns
from vlmo_fast.data.readers.scenes import SceneCaptions
from vlmo_fast.data.readers.shards import TarShards
from vlmo_fast.data.readers.texts import TextFile, TextTable
from vlmo_fast.data.source import Concatenation, PackedStrings, Source, SourceError, UnreadableItem
from vlmo_fast.data.synthetic.scenes import SceneWorld, shape_sprites
from vlmo_fast.data.tables import TableError


def picture(shade: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, content: bytes | str | object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)
    return path


def shade(source: Source, index: int) -> int:
    image = source[index].image
    assert image is not None
    return int(np.asarray(read_image(image))[0, 0, 0])


def contents(source: Source) -> list[tuple[str | None, int]]:
    """Text and shade of each sample, after a journey to another process."""
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint()
    assert all(0 <= copy[n].image_id < 2**63 for n in range(len(copy)))
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source[index]
    return [(copy[n].text, shade(copy, n)) for n in range(len(copy))]


# Folders of images


def test_an_image_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [b"a.png", b"sub/M\xe4dchen.png", b"sub/no-suffix"]
    for n, name in enumerate(names):
        put(tmp_path / os.fsdecode(name), picture(n))
    put(tmp_path / ".DS_Store", b"\0\0\0\1Bud1")
    source = read_image_folder(tmp_path)
    assert "1 left out" in caplog.text and ".DS_Store: not a picture" in caplog.text
    assert contents(source) == [(None, 0), (None, 1), (None, 2)]
    assert [os.fsencode(source.place(n)) for n in range(3)] == [os.fsencode(tmp_path) + b"/" + name for name in names]
    assert len({source[n].image_id for n in range(3)}) == 3


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="must hold an image"):
        read_image_folder(tmp_path)
    with pytest.raises(NotADirectoryError):
        read_image_folder(tmp_path / "nothing")


def test_a_fingerprint_is_of_the_content_not_the_place(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("here", "there", "other")]
    for folder in folders:
        put(folder / ("b.png" if folder.name == "other" else "a.png"), picture(0))
    here, there, other = (read_image_folder(folder).fingerprint() for folder in folders)
    assert here == there != other


# Tables


ROWS = [
    {"image": "a.png", "caption": "a cat", "id": 1},
    {"image": "b.png", "caption": "a dog", "id": 2},
    {"image": "a.png", "caption": "the same cat", "id": 1},
    {"image": "copy of a.png", "caption": "", "id": 1},
]


def table(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".parquet":
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.Table.from_pylist([{**row, "caption": row["caption"] or None} for row in rows]), path)
        return path
    if path.suffix == ".jsonl":
        return put(path, "".join(json.dumps(row) + "\n" for row in rows))
    comma = "\t" if path.suffix == ".tsv" else ","
    return put(path, "\n".join([comma.join(rows[0]), *(comma.join(map(str, row.values())) for row in rows)]) + "\n")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_table_of_captions(suffix: str, tmp_path: Path) -> None:
    for n, name in enumerate(("a.png", "b.png", "copy of a.png")):
        put(tmp_path / "images" / name, picture(n))
    path = table(tmp_path / f"pairs{suffix}", ROWS)
    by_path = read_caption_table(path, "image", "caption", image_folder=tmp_path / "images")
    assert contents(by_path) == [("a cat", 0), ("a dog", 1), ("the same cat", 0), ("", 2)]
    ids = [by_path[n].image_id for n in range(4)]
    assert ids[0] == ids[2] and len(set(ids)) == 3
    by_id = read_caption_table(path, "image", "caption", id_column="id", image_folder=tmp_path / "images")
    assert contents(by_id) == contents(by_path)
    ids = [by_id[n].image_id for n in range(4)]
    assert ids[0] == ids[2] == ids[3] != ids[1]
    blank = table(tmp_path / f"blank{suffix}", [{**row, "id": ""} for row in ROWS])
    by_nothing = read_caption_table(blank, "image", "caption", id_column="id", image_folder=tmp_path / "images")
    assert [by_nothing[n].image_id for n in range(4)] == [by_path[n].image_id for n in range(4)]
    images = dataclasses.replace(by_id, captions=None, image_of=None)
    assert contents(images) == [(None, 0), (None, 1), (None, 2)]
    assert [images[n].image_id for n in range(3)] == [ids[0], ids[1], ids[0]]
    assert by_path.place(2) == f"{tmp_path}/images/a.png (caption 3 of {path})"


def test_a_table_finds_its_images_beside_it_or_anywhere(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture(1))
    elsewhere = put(tmp_path / "elsewhere" / "b.png", picture(2))
    path = put(tmp_path / "pairs.csv", f"image,caption\na.png,one\n{elsewhere},two\n")
    assert contents(read_caption_table(path, "image", "caption")) == [("one", 1), ("two", 2)]
    assert read_caption_table(path, "image", "caption")[0].image_id == read_image_folder(tmp_path)[0].image_id


def test_a_table_is_refused_at_the_door_where_rows_would_shift(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="line 3 must have 2 fields, got 1"):
        read_caption_table(put(tmp_path / "pairs.csv", "image,caption\na,b\nc\n"), "image", "caption")
    with pytest.raises(TableError, match="must have the columns"):
        read_caption_table(put(tmp_path / "pairs.csv", "image,text\na,b\n"), "image", "caption")
    with pytest.raises(TableError, match=r"'caption' of line 1 must be text, got 1\.5"):
        read_caption_table(put(tmp_path / "p.jsonl", '{"image": "a", "caption": 1.5}'), "image", "caption")


# COCO, Flickr30K, Visual Genome


def karpathy_image(split: str, cocoid: int, *captions: str) -> dict[str, object]:
    return {
        "filepath": "val2014",
        "sentids": list(range(len(captions))),
        "filename": f"COCO_val2014_{cocoid:012d}.jpg",
        "imgid": 0,
        "split": split,
        "sentences": [
            {"tokens": text.lower().split(), "raw": text, "imgid": 0, "sentid": n} for n, text in enumerate(captions)
        ],
        "cocoid": cocoid,
    }


def test_karpathys_splits_of_coco(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [
        karpathy_image("test", 391895, "A man with a red helmet on a small moped on a dirt road. "),
        karpathy_image("restval", 522418, "A woman cutting a cake.", "A cake is cut."),
        karpathy_image("train", 184613, "A child holding an umbrella."),
        karpathy_image("train", 7),
        karpathy_image("val", 318219, "A boy with headphones."),
    ]
    path = put(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    for n, image in enumerate(images):
        put(tmp_path / "coco" / "val2014" / str(image["filename"]), picture(n, "JPEG"))
    source = read_karpathy(path, tmp_path / "coco")
    assert contents(source) == [
        ("A woman cutting a cake.", 1),
        ("A cake is cut.", 1),
        ("A child holding an umbrella.", 2),
    ]
    assert "1 images without a caption are left out, val2014/COCO_val2014_000000000007.jpg" in caplog.text
    ids = [source[n].image_id for n in range(3)]
    assert ids[0] == ids[1] != ids[2]
    assert [text for text, _ in contents(read_karpathy(path, tmp_path / "coco", splits=["val"]))] == [
        "A boy with headphones."
    ]
    with pytest.raises(SourceError, match=r"\['dev'\], got \['restval', 'test', 'train', 'val'\]"):
        read_karpathy(path, tmp_path, splits=["dev"])


def test_karpathys_splits_of_flickr(tmp_path: Path) -> None:
    images = [
        {
            "sentids": [0, 1],
            "imgid": 0,
            "sentences": [
                {"tokens": ["two"], "raw": raw, "imgid": 0, "sentid": n} for n, raw in enumerate(("Two.", "2"))
            ],
            "split": "train",
            "filename": "1000092795.jpg",
        }
    ]
    path = put(tmp_path / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    put(tmp_path / "1000092795.jpg", picture(9, "JPEG"))
    assert contents(read_karpathy(path, tmp_path)) == [("Two.", 9), ("2", 9)]


def test_cocos_own_captions(tmp_path: Path) -> None:
    content = {
        "info": {"year": 2014},
        "images": [
            {"id": 522418, "file_name": "COCO_train2014_000000522418.jpg", "height": 4, "width": 4, "license": 1},
            {"id": 318219, "file_name": "COCO_train2014_000000318219.jpg", "height": 4, "width": 4, "license": 1},
        ],
        "licenses": [],
        "annotations": [
            {"image_id": 318219, "id": 48, "caption": "A boy."},
            {"image_id": 522418, "id": 49, "caption": "A cake."},
            {"image_id": 318219, "id": 50, "caption": "Headphones."},
        ],
    }
    path = put(tmp_path / "captions_train2014.json", content)
    for n, image in enumerate(content["images"]):
        put(tmp_path / "train2014" / image["file_name"], picture(n, "JPEG"))
    source = read_coco_captions(path, tmp_path / "train2014")
    assert contents(source) == [("A cake.", 0), ("A boy.", 1), ("Headphones.", 1)]
    karpathy = {"images": [karpathy_image("train", 522418, "A cake.")], "dataset": "coco"}
    same = read_karpathy(put(tmp_path / "dataset_coco.json", karpathy), tmp_path)
    assert same[0].image_id == source[0].image_id, "one image is itself in both files"


def region(image_id: int, phrase: str) -> dict[str, object]:
    return {"region_id": 1382, "width": 82, "height": 139, "image_id": image_id, "phrase": phrase, "y": 57, "x": 421}


@pytest.mark.parametrize("blank", ["", " \n"])
def test_visual_genomes_regions(blank: str, tmp_path: Path) -> None:
    images = [
        {"regions": [region(1, "the clock is green in colour"), region(1, "shade is along the street ")], "id": 1},
        {"regions": [region(2, "road is gray")], "id": 2},
        {"regions": [region(3, "nowhere")], "id": 3},
    ]
    text = f"{blank}[{blank}" + f"{blank},{blank}".join(map(json.dumps, images)) + f"{blank}]{blank}"
    path = put(tmp_path / "region_descriptions.json", text)
    put(tmp_path / "VG_100K" / "1.jpg", picture(1, "JPEG"))
    put(tmp_path / "VG_100K_2" / "2.jpg", picture(2, "JPEG"))
    source = read_visual_genome(path, tmp_path)
    samples = [source[n] for n in range(len(source))]
    assert [sample.text for sample in samples] == [region["phrase"] for image in images for region in image["regions"]]
    assert [shade(source, n) for n in range(3)] == [1, 1, 2]
    assert samples[0].image_id == samples[1].image_id != samples[2].image_id
    assert samples[3].image == tmp_path / "VG_100K" / "3.jpg"  # found missing when it is read
    both = put(tmp_path / "flat" / "1.jpg", picture(1, "JPEG")).parent
    assert read_visual_genome(path, both)[0].image == both / "1.jpg"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "must be JSON"),
        ("[]", "must hold a caption"),
        ("\ufeff[]", "must hold a caption"),
        (b'["\xff"]', "must be UTF-8"),
        ("{}", "must be a list in JSON, got '{}' at character 0"),
        ('[{"id": 1, "regions": []}', "must be a list in JSON"),
        ('[{"id": 1, "regions": []},]', "must be JSON"),
        ('[{"id": 1}]', "Visual Genome's regions, got one in which there is no 'regions'"),
    ],
)
def test_regions_that_are_wrong(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message):
        read_visual_genome(put(tmp_path / "region_descriptions.json", content), tmp_path)


def test_annotations_of_another_format(tmp_path: Path) -> None:
    path = put(tmp_path / "a.json", {"images": [{"id": 1}], "annotations": []})
    with pytest.raises(SourceError, match="Karpathy's splits, got one in which there is no 'split'"):
        read_karpathy(path, tmp_path)
    with pytest.raises(SourceError, match="COCO's captions, got one in which there is no 'file_name'"):
        read_coco_captions(path, tmp_path)
    with pytest.raises(SourceError, match="must be JSON"):
        read_coco_captions(put(tmp_path / "b.json", "no"), tmp_path)
    with pytest.raises(FileNotFoundError):
        read_karpathy(tmp_path / "c.json", tmp_path)


# Texts


def text_of(source: Source) -> list[str | None]:
    return [source[n].text for n in range(len(source))]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("closed", [True, False])
def test_lines_of_a_text_file(mark: bytes, end: str, closed: bool, tmp_path: Path) -> None:
    lines = ["The first.", "", "  ", "Ein Mädchen\u2028und ein Hund.", "\t", "猫", ""]
    path = put(tmp_path / "books.txt", mark + (end.join(lines) + (end if closed else "")).encode())
    source = pickle.loads(pickle.dumps(TextFile(path)))
    assert text_of(source) == ["The first.", "Ein Mädchen\u2028und ein Hund.", "猫"]
    assert source[0].image is None
    assert source.place(0) == f"{path}: byte {len(mark)}"
    assert path.read_bytes()[int(source.place(2).rpartition(" ")[2]) :].decode().split() == ["猫"]


@settings(deadline=None)
@given(
    lines=st.lists(st.text(st.sampled_from("ab é猫 \t\r")), max_size=8),
    max_words=st.none() | st.integers(1, 4),
    chunk=st.integers(1, 40),
)
def test_no_word_is_lost_and_none_changes_its_line(lines: list[str], max_words: int | None, chunk: int) -> None:
    content = "\n".join(lines).encode()
    position, starts = 0, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts_module, "_CHUNK", chunk)
        for piece in texts_module._whole_lines(io.BytesIO(content)):
            found = texts_module._starts_of(np.frombuffer(piece, dtype=np.uint8), max_words)
            starts += (position + found).tolist()
            position += len(piece)
    assert position == len(content)
    texts = [
        content[a:b].decode().split() for a, b in zip(starts, [*starts[1:], len(content)][: len(starts)], strict=True)
    ]
    step = max_words or 10**6
    words = [line.split() for line in lines]
    assert texts == [line[n : n + step] for line in words for n in range(0, len(line), step)]


def test_long_lines_are_split_not_cut(tmp_path: Path) -> None:
    path = put(tmp_path / "wiki.txt", "one two  three four\tfive\n\nsix\n")
    assert text_of(TextFile(path, max_words=2)) == ["one two", "three four", "five", "six"]
    assert text_of(TextFile(path)) == [
        "one two  three four\tfive",
        "six",
    ]  # the index that is kept is of other settings
    assert TextFile(path).fingerprint() != TextFile(path, max_words=2).fingerprint()


def test_texts_that_are_wrong(tmp_path: Path) -> None:
    source = TextFile(put(tmp_path / "a.txt", b"fine\nM\xe4dchen\n"))
    assert source[0].text == "fine"
    with pytest.raises(UnreadableItem, match="not UTF-8"):
        source[1]
    with pytest.raises(SourceError, match="must hold a text"):
        TextFile(put(tmp_path / "b.txt", b" \n\n"))
    with pytest.raises(SourceError, match="must be UTF-8, got UTF-16"):
        TextFile(put(tmp_path / "c.txt", "a".encode("utf-16")))
    with pytest.raises(SourceError, match="is a table"):
        TextFile(put(tmp_path / "d.csv", b"a\n"))
    with pytest.raises(FileNotFoundError):
        TextFile(tmp_path / "e.txt")
    with pytest.raises(ValueError, match="max_words must be positive, got 0"):
        TextFile(tmp_path / "a.txt", max_words=0)


def test_a_column_of_texts(tmp_path: Path) -> None:
    source = pickle.loads(pickle.dumps(TextTable(table(tmp_path / "texts.csv", ROWS), "caption")))
    assert text_of(source) == ["a cat", "a dog", "the same cat", ""]
    assert source.place(1) == f"{tmp_path}/texts.csv: row 2"


# Shards


def shard(path: Path, samples: dict[str, dict[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for key, files in samples.items():
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def img2dataset_sample(n: int, caption: str = "") -> dict[str, bytes]:
    """As `img2dataset --output_format webdataset` writes one."""
    caption = caption or f"caption {n}"
    facts = {
        "caption": caption, "url": f"http://example.org/{n // 2}.jpg", "key": f"{n:09d}", "status": "success",
        "error_message": None, "width": 4, "height": 4, "original_width": 4, "original_height": 4, "exif": "{}",
        "sha256": f"{n // 2:064x}",
    }  # fmt: skip
    return {"jpg": picture(n, "JPEG"), "txt": caption.encode(), "json": json.dumps(facts).encode()}


@pytest.fixture
def cc3m(tmp_path: Path) -> Path:
    folder = tmp_path / "cc3m"
    for number in range(2):
        keys = range(10_000 * number, 10_000 * number + 3)
        shard(folder / f"{number:05d}.tar", {f"{n:09d}": img2dataset_sample(n % 10_000 + 3 * number) for n in keys})
        put(folder / f"{number:05d}_stats.json", {"count": 3, "successes": 3})
        put(folder / f"{number:05d}.parquet", b"")
    return folder


def test_shards_of_img2dataset(cc3m: Path) -> None:
    source = TarShards(cc3m)
    assert contents(source) == [(f"caption {n}", n) for n in range(6)]
    assert source.place(4) == f"{cc3m}/00001.tar: 000010001"
    assert len({source[n].image_id for n in range(6)}) == 6
    assert TarShards(str(cc3m / "*.tar")).fingerprint() == source.fingerprint()
    assert contents(TarShards([cc3m / "00001.tar"])) == contents(source)[3:]
    assert contents(TarShards(cc3m / "00001.tar")) == contents(source)[3:]
    same = TarShards(cc3m, id_field="sha256")
    assert Counter(same[n].image_id for n in range(6)).most_common()[0][1] == 2
    assert contents(TarShards(cc3m, captions=None)) == [(None, n) for n in range(6)]
    assert contents(TarShards(cc3m, caption_field="url"))[3] == ("http://example.org/1.jpg", 3)
    with pytest.raises(FileNotFoundError):
        TarShards(cc3m / "no*.tar")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_of_other_writers(form: int, tmp_path: Path) -> None:
    """Long names, folders, names that are not UTF-8, what macOS adds, and fields that nobody asked for."""
    long = "x" * 120 if form != tarfile.USTAR_FORMAT else "x" * 40
    samples = {
        f"{long}/a.b/000": {"PNG": picture(1), "txt": b"one\n", "cls": b"3"},
        "M\udce4dchen": {"webp": picture(2, "WEBP"), "txt": b"zwei"},
        "._M": {"txt": b"\0"},
    }
    source = TarShards(shard(tmp_path / "a.tar", samples, form))
    assert [(source[n].text, shade(source, n)) for n in range(len(source))] == [("one", 1), ("zwei", 2)]
    assert source.place(0).endswith(f"a.tar: {long}/a.b/000")
    assert source.place(1).endswith("M\udce4dchen")


def test_samples_that_are_incomplete(tmp_path: Path) -> None:
    samples = {
        "no-image": {"txt": b"a"},
        "no-text": {"jpg": picture(0)},
        "latin-1": {"jpg": picture(0), "txt": b"M\xe4dchen"},
        "no-json": {"jpg": picture(0), "txt": b"a"},
        "bad-json": {"jpg": picture(0), "txt": b"a", "json": b"{"},
        "list": {"jpg": picture(0), "txt": b"a", "json": b"[]"},
        "no-id": {"jpg": picture(0), "txt": b"a", "json": b'{"caption": 3}'},
    }
    source = TarShards(shard(tmp_path / "a.tar", samples))
    assert source[1].text == ""  # the stream counts it
    for n, message in ((0, "no image"), (2, "not UTF-8")):
        with pytest.raises(UnreadableItem, match=message):
            source[n]
    source = TarShards(tmp_path / "a.tar", id_field="sha256")
    for n, message in ((3, "no .json"), (4, "cannot be read"), (5, "is no object"), (6, "no 'sha256'")):
        with pytest.raises(UnreadableItem, match=message):
            source[n]
    with pytest.raises(UnreadableItem, match="'caption' must be text, got 3"):
        TarShards(tmp_path / "a.tar", caption_field="caption")[6]


@pytest.mark.parametrize("cut", [0, 1, 100, 512, 1000, 1536, 2048, 2560, 3000])
def test_a_shard_that_is_cut_short_is_refused(cut: int, cc3m: Path) -> None:
    """Wherever the end fell: tarfile itself takes a header that is cut, or missing, for the end of the archive."""
    path = cc3m / "00000.tar"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(SourceError, match=r"00000\.tar: .*(cut short|cannot be read)"):
        TarShards(cc3m)


def test_shards_that_cannot_be_sought(cc3m: Path, tmp_path: Path) -> None:
    content = bytearray((cc3m / "00000.tar").read_bytes())
    with tarfile.open(cc3m / "00000.tar") as tar:
        header = tar.getmembers()[4].offset
    content[header : header + 20] = b"\xff" * 20
    with pytest.raises(SourceError, match=f"damaged or cut short at byte {header:,}"):
        TarShards(put(tmp_path / "a.tar", bytes(content)))
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        tar.add(cc3m)
    with pytest.raises(SourceError, match="is compressed"):
        TarShards(tmp_path / "b.tar")
    shard(tmp_path / "c.tar", {"a": {"jpg": b"", "png": b""}})
    with pytest.raises(SourceError, match=r"two files for a\.png"):
        TarShards(tmp_path / "c.tar")
    with pytest.raises(SourceError, match="must hold a sample, got none in 1 shards"):
        TarShards(shard(tmp_path / "d.tar", {}))


def test_an_index_is_kept_and_made_anew_for_another_file(cc3m: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = TarShards(cc3m)
    assert sorted(path.name for path in cc3m.glob("*.npz")) == ["00000.tar.index.npz", "00001.tar.index.npz"]
    assert not list(cc3m.glob(".*"))
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        assert TarShards(cc3m).fingerprint() == first.fingerprint()
    shard(cc3m / "00000.tar", {"new": img2dataset_sample(9)})
    assert contents(TarShards(cc3m))[0] == ("caption 9", 9)
    put(cc3m / "00001.tar.index.npz", b"PK, but no zip file")
    assert len(TarShards(cc3m)) == 4


def test_an_index_that_cannot_be_kept(cc3m: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A read-only data set, or a disk that is full: the log says why each process takes its time."""
    blocked = put(tmp_path / "a-file", b"")
    assert len(TarShards(cc3m, index_folder=blocked / "folder")) == 6
    assert caplog.text.count("cannot be written") == 2
    assert not list(cc3m.glob("*.npz"))
    assert len(TarShards(cc3m, index_folder=tmp_path / "kept")) == 6
    assert len(list((tmp_path / "kept").glob("*.npz"))) == 2
    assert not list(cc3m.glob("*.npz"))


def test_a_shard_that_disappears_is_an_error_of_its_items(cc3m: Path) -> None:
    source = TarShards(cc3m)
    (cc3m / "00001.tar").unlink()
    assert source[0].text == "caption 0"
    with pytest.raises(FileNotFoundError):
        source[3]
    put(cc3m / "00001.tar", b"short")
    with pytest.raises(OSError, match="ends before byte"):
        source[3]


# Hugging Face's datasets


def test_columns_of_a_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for n in range(3):
        put(tmp_path / f"{n}.png", picture(n))
    paths = [str(tmp_path / f"{n}.png") for n in range(3)]
    columns = {"path": paths, "image": paths, "raw": [picture(n) for n in range(3)], "text": ["a", "b", None]}
    columns |= {"texts": [["a", "b"], [], ["c"]], "photo": [7, 8, 7]}
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    for column in ("path", "image", "raw"):
        source = DatasetColumns(dataset, image_column=column, text_column="text", name="mine")
        assert contents(source) == [("a", 0), ("b", 1), ("", 2)]
        assert len({source[n].image_id for n in range(3)}) == 3
        assert source.place(2) == "mine: row 2"
    source = DatasetColumns(dataset, image_column="raw", text_column="texts", id_column="photo")
    assert contents(source) == [("a", 0), ("b", 0), ("", 1), ("c", 2)]
    ids = [source[n].image_id for n in range(4)]
    assert ids[0] == ids[1] == ids[3] != ids[2]
    turned = dataset.select([2, 0])
    assert contents(DatasetColumns(turned, image_column="raw", text_column="texts")) == [("c", 2), ("a", 0), ("b", 0)]
    assert contents(DatasetColumns(dataset.with_format("numpy"), image_column="raw")) == [(None, n) for n in range(3)]
    assert text_of(DatasetColumns(dataset, text_column="texts")) == ["a", "b", "", "c"]
    relative = datasets.Dataset.from_dict({"path": ["1.png"]})
    assert contents(DatasetColumns(relative, image_column="path", image_folder=tmp_path)) == [(None, 1)]
    dataset.to_parquet(tmp_path / "d.parquet")
    again = datasets.Dataset.from_parquet(str(tmp_path / "d.parquet"), cache_dir=str(tmp_path / "cache"))
    fingerprints = [DatasetColumns(d, image_column="raw", text_column="text").fingerprint() for d in (dataset, again)]
    assert fingerprints[0] == fingerprints[1]


def test_data_sets_that_are_wrong() -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"image": [b"", None, b"x"], "number": [1, 2, 3], "id": [1, 1, None]})
    with pytest.raises(SourceError, match=r"must have the columns \['caption'\], got \['image', 'number', 'id'\]"):
        DatasetColumns(dataset, text_column="caption")
    with pytest.raises(SourceError, match="'number' must hold strings or lists of strings, got int64"):
        DatasetColumns(dataset, text_column="number")
    with pytest.raises(SourceError, match="image_column or text_column must name one of"):
        DatasetColumns(dataset)
    with pytest.raises(SourceError, match="got IterableDataset"):
        DatasetColumns(dataset.to_iterable_dataset(), image_column="image")
    with pytest.raises(SourceError, match="must hold a row"):
        DatasetColumns(dataset.select([]), image_column="image")
    source = DatasetColumns(dataset, image_column="image", id_column="id")
    for n, message in ((0, "no image"), (1, "no image"), (2, "no 'id'")):
        with pytest.raises(UnreadableItem, match=message):
            source[n]
    with pytest.raises(UnreadableItem, match="must be bytes or a path, got int"):
        DatasetColumns(dataset, image_column="number")[0]


# Scenes


def test_scenes() -> None:
    world = SceneWorld(shape_sprites(12, size=16), image_size=32, num_test_pairs=8, num_validation_pairs=4)
    source = SceneCaptions(world, num_scenes=300)
    samples = [pickle.loads(pickle.dumps(source))[n] for n in range(300)]
    assert np.array_equal(np.asarray(samples[7].image), np.asarray(source[7].image))
    assert len({np.asarray(sample.image).tobytes() for sample in samples}) == 300
    by_caption = {sample.text: sample.image_id for sample in samples}
    assert all(by_caption[sample.text] == sample.image_id for sample in samples)
    assert len(by_caption) == len(set(by_caption.values())) > 100
    assert SceneCaptions(world, num_scenes=300, seed=1).fingerprint() != source.fingerprint()
    with pytest.raises(ValueError, match="num_scenes must be positive"):
        SceneCaptions(world, num_scenes=0)
    with pytest.raises(ValueError, match="split"):
        SceneCaptions(world, "dev")  # type: ignore[arg-type]


# What they are made of


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=()))))
def test_packed_strings_are_the_strings(strings: list[str]) -> None:
    packed = PackedStrings(strings)
    assert list(packed) == strings
    assert list(PackedStrings.from_arrays(*pickle.loads(pickle.dumps(packed)).arrays)) == strings
    assert packed.digest() == PackedStrings(iter(strings)).digest()
    assert packed.digest() != PackedStrings([*strings, ""]).digest()


def test_concatenation(cc3m: Path, tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "x\ny\n")
    parts = [TextFile(tmp_path / "a.txt"), TarShards(cc3m), TextFile(tmp_path / "a.txt")]
    source = pickle.loads(pickle.dumps(Concatenation(parts)))
    assert text_of(source) == ["x", "y", *(f"caption {n}" for n in range(6)), "x", "y"]
    assert source.place(3) == parts[1].place(1)
    assert source.fingerprint() != Concatenation(parts[::-1][1:]).fingerprint()
    with pytest.raises(SourceError, match="must hold one at least"):
        Concatenation([])


def test_captions_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(SourceError, match=r"origin\.json: must hold a caption"):
        CaptionedImages(Path("origin.json"), tmp_path, PackedStrings(), PackedStrings(), np.array([]))
