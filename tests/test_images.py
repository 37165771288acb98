"""Pictures in every awkward form: the same picture, or refused with the reason."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from vlmo_fast.data.images import ImageError, read_image

RAMP = np.tile(np.arange(256, dtype=np.uint8), (4, 1))  # (4, 256)
ORIENTATION = 0x0112
TURNS = {1: 0, 3: 180, 6: 270, 8: 90}  # EXIF orientation: degrees counter-clockwise that put the picture upright


def gray(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    assert image.mode == "RGB"
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def scene() -> Image.Image:
    """No symmetry: red in the upper left corner."""
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[:12, :20] = (250, 0, 0)
    pixels[12:, 20:] = (0, 0, 250)
    return Image.fromarray(pixels)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_cameras_orientation_is_applied(orientation: int, suffix: str, tmp_path: Path) -> None:
    upright = scene()
    lying = upright.rotate(-TURNS[orientation], expand=True)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"quality": 95} if suffix == ".jpg" else {"lossless": True} if suffix == ".webp" else {}
    path = saved(lying, tmp_path / f"photo{suffix}", exif=exif, **options)
    with Image.open(path) as opened:
        for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes()), opened):
            found = read_image(source)
            assert found.size == upright.size
            assert np.abs(np.asarray(found).astype(int) - np.asarray(upright)).mean() < 4
            assert found.getexif().get(ORIENTATION, 1) == 1  # nobody turns it once more


@pytest.mark.parametrize("form", ["png", "tif", "tif-big-endian", "memory", "int32", "int32.tif"])
def test_sixteen_bits_are_the_same_ramp(form: str, tmp_path: Path) -> None:
    wide = RAMP.astype(np.uint16) * 257
    if form == "memory":
        source: object = Image.fromarray(wide)
    elif form == "int32":
        source = Image.fromarray(wide.astype(np.int32))
    elif form == "int32.tif":
        source = saved(Image.fromarray(wide.astype(np.int32)), tmp_path / "ramp.tif")
    elif form == "tif-big-endian":
        source = saved(Image.frombytes("I;16B", (256, 4), wide.astype(">u2").tobytes()), tmp_path / "ramp.tif")
    else:
        source = saved(Image.fromarray(wide), tmp_path / f"ramp.{form}")
    assert np.array_equal(gray(read_image(source)), RAMP)


def test_floats_need_a_known_range(tmp_path: Path) -> None:
    image = Image.fromarray(RAMP.astype(np.float32) / 255)
    with pytest.raises(ImageError, match=r"mode F holds numbers of no known range; convert it"):
        read_image(image)
    path = saved(image, tmp_path / "ramp.tif", tiffinfo={340: 0.0, 341: 1.0})  # SMinSampleValue, SMaxSampleValue
    assert np.array_equal(gray(read_image(path)), RAMP)


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-5, 40000), (0, 70000)])
def test_integers_of_unknown_range_are_refused(low: int, high: int) -> None:
    numbers = np.linspace(low, high, 64).astype(np.int32).reshape(8, 8)
    with pytest.raises(ImageError, match=f"must be those of a 16-bit picture, got {low} to {high}"):
        read_image(Image.fromarray(numbers))


def test_black_has_no_range() -> None:
    assert not gray(read_image(Image.fromarray(np.zeros((4, 4), np.int32)))).any()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = scene().convert(mode)
    found = read_image(image)
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(image.convert("RGB")))


def test_cmyk_of_a_file(tmp_path: Path) -> None:
    path = saved(scene().convert("CMYK"), tmp_path / "print.jpg", quality=95)
    assert np.abs(np.asarray(read_image(path)).astype(int) - np.asarray(scene())).mean() < 6


def test_palette_with_transparency_gives_no_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    image = scene().quantize(8)
    image.info["transparency"] = b"\x00\x80"
    path = saved(image, tmp_path / "palette.png", transparency=b"\x00\x80")
    assert np.array_equal(np.asarray(read_image(path)), np.asarray(scene()))
    assert not recwarn.list


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
def test_animations_give_their_first_frame(suffix: str, tmp_path: Path) -> None:
    frames = [scene(), Image.new("RGB", (40, 24), (0, 255, 0))]
    options = {"lossless": True} if suffix == ".webp" else {}
    path = saved(frames[0], tmp_path / f"film{suffix}", save_all=True, append_images=frames[1:], **options)
    assert np.abs(np.asarray(read_image(path)).astype(int) - np.asarray(scene())).max() < 8
    with Image.open(path) as image:
        image.seek(1)
        assert (np.abs(np.asarray(read_image(image)).astype(int) - (0, 255, 0)) < 8).all()  # the caller chose it
        assert image.tell() == 1


def test_the_callers_picture_stays_as_it_is() -> None:
    image = scene()
    found = read_image(image)
    found.putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) == (250, 0, 0)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".gif", ".tif", ".bmp", ".avif", ".jp2"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_files_are_refused(suffix: str, share: float, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(Image.fromarray(noise), tmp_path / f"photo{suffix}")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ImageError, match=f"photo{suffix}: "):
        read_image(path)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (15_000, 15_000)])
def test_bombs_are_refused_before_they_are_decoded(width: int, height: int, recwarn: pytest.WarningsRecorder) -> None:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(ImageError, match=r"pixels"):
        read_image(bomb)
    assert not recwarn.list


def test_the_limit_is_the_callers() -> None:
    with pytest.raises(ImageError, match="must have at most 100 pixels, got 40 x 24"):
        read_image(scene(), max_pixels=100)


@pytest.mark.parametrize("content", [b"", b"\0", b"hello", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"<svg/>", b"\xff\xd8\xff"])
def test_what_is_no_picture(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    for source, name in ((path, "photo.jpg"), (content, f"{len(content)} bytes")):
        with pytest.raises(ImageError, match=name):
            read_image(source)


def test_a_missing_file_is_that(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.jpg")


def test_damage_never_raises_anything_else() -> None:
    """Bytes changed at random: a picture, or `ImageError`."""
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    outcomes = set()
    for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000"):
        file = io.BytesIO()
        noise.save(file, form)
        for _ in range(60):
            content = bytearray(file.getvalue())
            for place in generator.integers(0, len(content), 3):
                content[place] = generator.integers(256)
            try:
                outcomes.add(read_image(bytes(content)).mode)
            except ImageError:
                outcomes.add("refused")
    assert outcomes == {"RGB", "refused"}
