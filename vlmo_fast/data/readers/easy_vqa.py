"""easy-VQA (https://github.com/vzhou842/easy-VQA, MIT): questions about one coloured shape, from its PyPI package.

5,000 pictures of 64 x 64 pixels, 48,248 questions and 13 answers, in an official split of 4,000 pictures for training
and 1,000 for test. Much of it can be guessed without looking: print `easy_vqa_baselines` beside any result.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from vlmo_fast.data.oracles import majority_accuracy

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

EasyVQASplit: TypeAlias = Literal["train", "validation", "test"]
QuestionType: TypeAlias = Literal["yes/no", "colour", "shape"]

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

# The pictures are drawn without anti-aliasing, on a pale background, in exactly these colours.
_PALETTE = {
    "black": 0x000000, "blue": 0x0000FF, "brown": 0xA52A2A, "gray": 0x808080,
    "green": 0x00FF00, "red": 0xFF0000, "teal": 0x008080, "yellow": 0xFFFF00,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class EasyVQA:
    """One split of easy-VQA: Q questions on N pictures.

    Attributes:
        images: (N, 64, 64, 3) uint8.
        questions: Q of them, as shipped ("what color is the circle?").
        answers: Q of them, each one of 13 words.
        image_index: the picture of each question, (Q,) int64.
    """

    images: npt.NDArray[np.uint8]
    questions: list[str]
    answers: list[str]
    image_index: npt.NDArray[np.int64]

    @property
    def types(self) -> list[QuestionType]:
        """The type of each question, Q of them."""
        return [question_type(question) for question in self.questions]

    @property
    def kinds(self) -> npt.NDArray[np.int64]:
        """Colour and shape of each picture as answers tell them, (N,) int64: 3 colour + shape; -1 where they do not."""
        told = np.full((2, len(self.images)), -1)
        for kind, answer, n in zip(self.types, self.answers, self.image_index.tolist(), strict=True):
            if kind == "colour":
                told[0, n] = COLOURS.index(answer)
            elif kind == "shape":
                told[1, n] = SHAPES.index(answer)
        return np.where((told >= 0).all(axis=0), told[0] * len(SHAPES) + told[1], -1)


class EasyVQABaselines(NamedTuple):
    """Accuracy on test, in [0, 1], of the majority answer in train for what is seen: the question and ..."""

    question: float  # nothing else
    colour: float  # the colour of the shape
    shape: float  # whether it is a circle, a rectangle or a triangle
    colour_and_shape: float


def load_easy_vqa(split: EasyVQASplit, *, num_validation_images: int = 400, seed: int = 0) -> EasyVQA:
    """Load a split of the installed package `easy-vqa`; decodes its pictures anew at each call.

    Args:
        split: "test" is the official one; "train" and "validation" share the pictures of the official training set.
        num_validation_images: how many of those 4,000 are set aside for validation, with all their questions.
        seed: draws which.

    Returns:
        The split, pictures in the order of their official numbers.

    Raises:
        ImportError: easy-vqa or Pillow is missing; names the command that installs it.
        ValueError: `split` is unknown, or `num_validation_images` leaves no picture to train or to validate on.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"load_easy_vqa: split must be 'train', 'validation' or 'test', got {split!r}")
    try:
        from importlib.resources import files

        from PIL import Image

        folder = files("easy_vqa") / "data" / ("test" if split == "test" else "train")
    except ImportError as error:
        raise ImportError(f"load_easy_vqa: {error.name} must be installed: pip install easy-vqa pillow") from error
    records: list[tuple[str, str, int]] = json.loads((folder / "questions.json").read_text())
    chosen = np.unique([image_id for _, _, image_id in records])
    if split != "test":
        if not 1 <= num_validation_images < len(chosen):
            raise ValueError(
                f"load_easy_vqa: num_validation_images must be 1 to {len(chosen) - 1}, got {num_validation_images}"
            )
        shuffled = np.random.Generator(np.random.PCG64(seed)).permutation(chosen)
        chosen = np.sort(
            shuffled[:num_validation_images] if split == "validation" else shuffled[num_validation_images:]
        )

    def decode(file: Traversable) -> npt.NDArray[np.uint8]:
        with file.open("rb") as stream, Image.open(stream) as picture:
            return np.asarray(picture.convert("RGB"))

    row = {image_id: n for n, image_id in enumerate(chosen.tolist())}
    records = [record for record in records if record[2] in row]
    return EasyVQA(
        images=np.stack([decode(folder / "images" / f"{image_id}.png") for image_id in row]),
        questions=[question for question, _, _ in records],
        answers=[answer for _, answer, _ in records],
        image_index=np.array([row[image_id] for _, _, image_id in records], dtype=np.int64),
    )


def question_type(question: str) -> QuestionType:
    """What a question of easy-VQA asks for, from its words.

    Raises:
        ValueError: it is no question of easy-VQA.
    """
    words = re.findall(r"\w+", question.lower())
    if words[:1] in (["is"], ["does"]):
        return "yes/no"
    if words[:1] == ["what"]:
        return "colour" if "color" in words else "shape"
    raise ValueError(f"question_type: question must begin with is, does or what, got {question!r}")


def question_majority_accuracy(train: EasyVQA, test: EasyVQA) -> float:
    """Accuracy on `test` of answering each question with its commonest answer in `train`, without the picture."""
    return majority_accuracy(train.questions, train.answers, test.questions, test.answers)


def easy_vqa_baselines(train: EasyVQA, test: EasyVQA) -> EasyVQABaselines:
    """Accuracy on `test` of the majority answers in `train`, given the question and parts of what the picture shows.

    Returns:
        Four accuracies. The last is the best that this data allows, but for pictures whose shape is cut off.
    """
    keys = []
    for data in (train, test):
        colours, shapes = _attributes(data.images)
        colour, shape = ([words[n] for n in data.image_index.tolist()] for words in (colours, shapes))
        seen = ([data.questions], [data.questions, colour], [data.questions, shape], [data.questions, colour, shape])
        keys.append([list(zip(*parts, strict=True)) for parts in seen])
    return EasyVQABaselines(*(majority_accuracy(a, train.answers, b, test.answers) for a, b in zip(*keys, strict=True)))


def _attributes(images: npt.NDArray[np.uint8]) -> tuple[list[str], list[str]]:
    """Colour and kind of the one shape of each picture, read off the pixels: (N, 64, 64, 3) uint8 -> N and N words."""
    red, green, blue = np.moveaxis(images.astype(np.int32), -1, 0)
    code = red << 16 | green << 8 | blue  # (N, 64, 64)
    names = tuple(_PALETTE)
    best = np.argmax([np.count_nonzero(code == value, axis=(1, 2)) for value in _PALETTE.values()], axis=0)  # (N,)
    inside = code == np.array(list(_PALETTE.values()))[best][:, None, None]
    box = inside.any(axis=1).sum(axis=1) * inside.any(axis=2).sum(axis=1)  # area of its bounding box, (N,)
    filled = inside.sum(axis=(1, 2)) / box  # rectangle 1, circle about pi / 4, triangle about 1 / 2, if not cut off
    shapes = np.select([filled > 0.9, filled > 0.68], ["rectangle", "circle"], "triangle")
    return [names[n] for n in best.tolist()], shapes.tolist()
