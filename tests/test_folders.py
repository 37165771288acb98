"""Folders of pictures: all that can be read is found, everything else is named."""

import os
from pathlib import Path

import pytest
from PIL import Image

from vlmo_fast.data.folders import find_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    (root / "b").mkdir(parents=True)
    image = Image.new("RGB", (4, 4))
    for name in ("a.jpg", "A.JPG", "b/c.avif", "b/d.jfif", "b/e.jp2", "b/f.webp", ".hidden.jpg"):
        image.save(root / name, {".jfif": "JPEG"}.get(Path(name).suffix))
    image.save(root / "no-suffix", "PNG")
    image.save(root / "IMG.0001", "PNG")
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff")  # a picture by its name: whoever reads it says what is wrong
    (root / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (root / "captions.json").write_text("[]")
    (root / "empty").write_bytes(b"")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    image.save(elsewhere / "far.png")
    (root / "linked").symlink_to(elsewhere)
    (root / "z-again").symlink_to(elsewhere)
    (root / "b" / "up").symlink_to(root)
    (root / "dangling.jpg").symlink_to(root / "nothing.jpg")
    (root / "circle.jpg").symlink_to(root / "circle.jpg")
    (root / "link.jpg").symlink_to(root / "a.jpg")
    return root


def test_every_picture_is_found_and_everything_else_named(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    found = find_pictures(folder)
    assert [path.relative_to(folder).as_posix() for path in found.paths] == [
        ".hidden.jpg",
        "A.JPG",
        "IMG.0001",
        "a.jpg",
        *("b/c.avif", "b/d.jfif", "b/e.jp2", "b/f.webp"),
        "broken.jpg",
        "link.jpg",
        "linked/far.png",
        "no-suffix",
    ]
    assert {path.relative_to(folder).as_posix(): reason for path, reason in found.left_out} == {
        ".DS_Store": "not a picture",
        "b/up": "leads to a folder that was walked through before",
        "captions.json": "not a picture",
        "circle.jpg": "a link to nothing",
        "dangling.jpg": "a link to nothing",
        "empty": "empty",
        "pipe.png": "neither a file nor a folder",
        "z-again": "leads to a folder that was walked through before",
    }


def test_names_need_not_be_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"M\xe4dchen.png")
    try:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 names alone")
    assert find_pictures(tmp_path).paths == [tmp_path / name]


def test_no_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none", Path(__file__)):
        with pytest.raises(NotADirectoryError, match="must be a folder"):
            find_pictures(path)
