"""The recipe's training augmentation of photographs, with Pillow alone.

As in the released code (microsoft/unilm, `vlmo/transforms/square_transform.py`): a random crop of half to all of the
area, resized to a square, bicubic; a mirror image half of the time; then two operations drawn from ten that keep the
colours (captions speak of them), at strength 7 of 10. The operations and their ranges are RandAugment's
(arXiv:1909.13719); each one drawn runs half of the time, as in the code that the release took it from (ALBEF).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from PIL import Image, ImageEnhance, ImageOps

__all__ = ["TrainingAugmentation"]

GRAY = (128, 128, 128)  # where an operation uncovers the canvas
MAX_MAGNITUDE = 10
MAX_SHEAR, MAX_TRANSLATION, MAX_ROTATION = 0.3, 10 / 224, 30  # a ratio, a share of the side, degrees


class TrainingAugmentation:
    """Augments one image; each call draws anew.

    Args:
        size: side of the square result, pixels.
        scale: least and greatest share of the area that the crop keeps.
        num_operations: operations drawn for an image.
        magnitude: their strength, 0 to 10.
        generator: source of randomness; None is torch's global one, which data loaders seed for each worker.

    Example:
        >>> TrainingAugmentation(224)(Image.open("photo.jpg")).size
        (224, 224)
    """

    def __init__(
        self,
        size: int,
        *,
        scale: tuple[float, float] = (0.5, 1.0),
        num_operations: int = 2,
        magnitude: float = 7,
        generator: torch.Generator | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"TrainingAugmentation: size must be at least 1 pixel, got {size}")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"TrainingAugmentation: scale must be 0 < least <= greatest <= 1, got {scale}")
        if not 0 <= magnitude <= MAX_MAGNITUDE:
            raise ValueError(f"TrainingAugmentation: magnitude must be 0 to {MAX_MAGNITUDE}, got {magnitude}")
        self.size, self.scale, self.num_operations = size, scale, num_operations
        self.magnitude, self.generator = magnitude, generator

    def __call__(self, image: Image.Image) -> Image.Image:
        """One augmented (size, size) RGB image."""
        image = image.convert("RGB")
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=self._box(*image.size))
        if self._uniform() < 0.5:
            image = ImageOps.mirror(image)
        for _ in range(self.num_operations):
            operation = _OPERATIONS[int(self._uniform() * len(_OPERATIONS))]
            runs, sign = self._uniform() < 0.5, -1 if self._uniform() < 0.5 else 1
            if runs:
                image = operation(image, self.magnitude / MAX_MAGNITUDE, sign)
        return image

    def _box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """A crop of the wanted area with a side ratio from 3:4 to 4:3, or the central part where none fits."""
        for _ in range(10):
            area = width * height * self._uniform(*self.scale)
            ratio = math.exp(self._uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(self._uniform(0, width - w + 1)), int(self._uniform(0, height - h + 1))
                return left, top, left + w, top + h
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def _uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator).item()


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GRAY)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance], image: Image.Image, strength: float) -> Image.Image:
    return kind(image).enhance(0.1 + 1.8 * strength)


# Each takes the image, a strength from 0 to 1, and a sign.
_OPERATIONS: tuple[Callable[[Image.Image, float, int], Image.Image], ...] = (
    lambda image, strength, sign: image,
    lambda image, strength, sign: ImageOps.autocontrast(image),
    lambda image, strength, sign: ImageOps.equalize(image),
    lambda image, strength, sign: _enhance(ImageEnhance.Brightness, image, strength),
    lambda image, strength, sign: _enhance(ImageEnhance.Sharpness, image, strength),
    lambda image, strength, sign: _affine(image, (1, sign * strength * MAX_SHEAR, 0, 0, 1, 0)),
    lambda image, strength, sign: _affine(image, (1, 0, 0, sign * strength * MAX_SHEAR, 1, 0)),
    lambda image, strength, sign: _affine(image, (1, 0, sign * strength * MAX_TRANSLATION * image.width, 0, 1, 0)),
    lambda image, strength, sign: _affine(image, (1, 0, 0, 0, 1, sign * strength * MAX_TRANSLATION * image.height)),
    lambda image, strength, sign: image.rotate(
        sign * strength * MAX_ROTATION, Image.Resampling.BILINEAR, fillcolor=GRAY
    ),
)
