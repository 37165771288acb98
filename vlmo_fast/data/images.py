"""One way to read a picture, whoever asks: upright, 8 bits a channel, RGB, or refused with the reason.

Pillow decodes; what it leaves to its callers is decided here:

    orientation   EXIF's, as cameras write it, is applied
    depth         16 bits a channel are scaled to 8; 32-bit integers and floats only where their range is known
    palette, CMYK, gray, bilevel    become RGB; an alpha channel is dropped, as in the released pipeline
    animation     the first frame of a file; of a picture that is open already, the frame that it stands at
    broken        truncated, empty, hostile (too many pixels) or not a picture: `ImageError`, never half a picture
"""

from __future__ import annotations

import io
import os
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["MAX_PIXELS", "ImageError", "read_image"]

MAX_PIXELS = 178_956_970  # 512 MiB of RGB; where Pillow, too, speaks of a decompression bomb

_SIXTEEN_BITS = 2**16 - 1
_MIN_SAMPLE_TAGS, _MAX_SAMPLE_TAGS = (280, 340), (281, 341)  # TIFF: (S)MinSampleValue, (S)MaxSampleValue
_RGB_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")


class ImageError(ValueError):
    """A picture cannot be read; the message names it and says why."""


def read_image(
    source: str | os.PathLike[str] | bytes | BinaryIO | Image.Image, *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """A picture as upright 8-bit RGB.

    Args:
        source: a path, the bytes of a file, an open file, or a picture of Pillow's (which is not changed; one that
            was opened from a file and carries an EXIF orientation is turned as its file would be).
        max_pixels: width times height beyond which a picture is refused before it is decoded.

    Returns:
        Mode RGB, a picture of its own.

    Raises:
        ImageError: no picture, damaged, too large, or of numbers whose range is not known.
        FileNotFoundError: there is no such file.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the image", max_pixels)
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(getattr(source, "name", source))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` decides
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return _to_rgb(image, name, max_pixels)
    except (ImageError, FileNotFoundError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not a picture that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError) as error:
        # Pillow's decoders raise all of these for damaged files.
        raise ImageError(f"{name}: {_reason(error)}") from error


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if not width or not height:
        raise ImageError(f"{name}: must have pixels, got {width} x {height}")
    if width * height > max_pixels:
        raise ImageError(f"{name}: must have at most {max_pixels:,} pixels, got {width} x {height}")
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode in _RGB_MODES:
        # Pillow warns that a palette's transparency were better kept; it is dropped on purpose.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
            return upright.convert("RGB") if upright.mode != "RGB" or upright is image else upright
    if upright.mode == "LAB":
        raise ImageError(f"{name}: must be RGB, CMYK, gray or a palette, got LAB; convert it first")
    return Image.fromarray(_eight_bits(upright, image, name)).convert("RGB")


def _eight_bits(image: Image.Image, original: Image.Image, name: str) -> np.ndarray:
    """Numbers of more than 8 bits, (H, W), as 8 bits."""
    numbers = np.asarray(image)
    known = _known_range(original)
    if known is not None and not image.mode.startswith("I;16"):
        low, high = known
    elif image.mode.startswith("I;16"):
        low, high = 0.0, float(_SIXTEEN_BITS)
    elif image.mode == "I":
        low, high = 0.0, float(_SIXTEEN_BITS)  # Pillow's own use of 32-bit integers: pictures of 16 bits
        least, most = int(numbers.min()), int(numbers.max())
        if least < 0 or most > _SIXTEEN_BITS or 0 < most < 256:
            raise ImageError(
                f"{name}: 32-bit integers must be those of a 16-bit picture, got {least} to {most}, which may be of "
                "any range; convert it to 8 or 16 bits"
            )
    else:
        raise ImageError(f"{name}: mode {image.mode} holds numbers of no known range; convert it to 8 or 16 bits")
    scaled = (numbers.astype(np.float64) - low) * (255 / (high - low))
    if not np.isfinite(scaled).all():
        raise ImageError(f"{name}: must hold finite numbers, got NaN or infinity")
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _known_range(image: Image.Image) -> tuple[float, float] | None:
    """What a TIFF says of its least and greatest numbers."""
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return None

    def tag(numbers: tuple[int, int]) -> float | None:
        for number in numbers:
            value = tags.get(number)
            if value is not None:
                return float(value[0] if isinstance(value, tuple) else value)
        return None

    low, high = tag(_MIN_SAMPLE_TAGS), tag(_MAX_SAMPLE_TAGS)
    return None if high is None or high <= (low or 0.0) else (low or 0.0, high)


def _reason(error: Exception) -> str:
    text = str(error)
    return f"cannot be decoded ({text})" if text else f"cannot be decoded ({type(error).__name__})"
