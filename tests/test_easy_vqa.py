"""The loader of easy-VQA against the package's own reader, and its baselines against figures known from elsewhere."""

import sys

import numpy as np
import pytest

from vlmo_fast.data.readers import easy_vqa
from vlmo_fast.data.readers.easy_vqa import (
    EasyVQA,
    easy_vqa_baselines,
    load_easy_vqa,
    question_majority_accuracy,
    question_type,
)

package = pytest.importorskip("easy_vqa", reason="pip install easy-vqa")
pytest.importorskip("PIL", reason="pip install pillow")

COLOURS = {
    "black": (0, 0, 0), "blue": (0, 0, 255), "brown": (165, 42, 42), "gray": (128, 128, 128),
    "green": (0, 255, 0), "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def train() -> EasyVQA:
    return load_easy_vqa("train")


@pytest.fixture(scope="module")
def validation() -> EasyVQA:
    return load_easy_vqa("validation")


@pytest.fixture(scope="module")
def test() -> EasyVQA:
    return load_easy_vqa("test")


def test_test_split_is_the_official_one_in_the_official_order(test: EasyVQA) -> None:
    questions, answers, image_ids = package.get_test_questions()
    assert (test.questions, test.answers, test.image_index.tolist()) == (questions, answers, image_ids)
    assert test.images.shape == (1000, 64, 64, 3)
    assert test.images.dtype == np.uint8


def test_train_and_validation_share_out_the_official_pictures(train: EasyVQA, validation: EasyVQA) -> None:
    assert len(train.images) == 3600
    assert len(validation.images) == 400
    assert not {i.tobytes() for i in train.images} & {i.tobytes() for i in validation.images}
    questions, answers, _ = package.get_train_questions()
    mine = zip(train.questions + validation.questions, train.answers + validation.answers, strict=True)
    assert sorted(mine) == sorted(zip(questions, answers, strict=True))
    for data in (train, validation):
        assert np.array_equal(np.unique(data.image_index), np.arange(len(data.images)))


def test_validation_depends_on_the_seed_alone(validation: EasyVQA) -> None:
    assert np.array_equal(validation.images, load_easy_vqa("validation").images)
    assert not np.array_equal(validation.images, load_easy_vqa("validation", seed=1).images)
    assert len(load_easy_vqa("validation", num_validation_images=7).images) == 7


def test_kinds_are_what_the_pixels_show_where_answers_tell_them(train: EasyVQA) -> None:
    asked = {(kind, n) for kind, n in zip(train.types, train.image_index.tolist(), strict=True)}
    told = [n for n in range(len(train.images)) if {("colour", n), ("shape", n)} <= asked]
    kinds = train.kinds
    assert np.flatnonzero(kinds >= 0).tolist() == told
    for n in told[::20]:
        colour, shape = easy_vqa.COLOURS[kinds[n] // 3], easy_vqa.SHAPES[kinds[n] % 3]
        inside = (train.images[n] == COLOURS[colour]).all(axis=-1)
        assert inside.any()
        if np.argwhere(inside).min() > 10 and np.argwhere(inside).max() < 53:  # not cut off
            share = {"rectangle": 1, "circle": np.pi / 4, "triangle": 0.5}[shape]
            box = inside.any(axis=0).sum() * inside.any(axis=1).sum()
            assert inside.sum() / box == pytest.approx(share, abs=0.12)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_colour_asked_for_is_in_the_picture(split: str, request: pytest.FixtureRequest) -> None:
    data: EasyVQA = request.getfixturevalue(split)
    asked = [n for n, kind in enumerate(data.types) if kind == "colour"]
    assert len(asked) > 400
    for n in asked:
        image = data.images[data.image_index[n]]
        assert np.count_nonzero((image == COLOURS[data.answers[n]]).all(axis=-1)) >= 8, (n, data.questions[n])


def test_types_follow_from_the_answers(train: EasyVQA) -> None:
    kinds = {"yes": "yes/no", "no": "yes/no", **dict.fromkeys(COLOURS, "colour")}
    assert train.types == [kinds.get(answer, "shape") for answer in train.answers]


def test_baselines(train: EasyVQA, test: EasyVQA) -> None:
    baselines = easy_vqa_baselines(train, test)
    assert baselines.question == question_majority_accuracy(train, test)
    # 67.0 % is known; the oracles are held to what pixels give and to what both attributes together leave open.
    assert baselines.question == pytest.approx(0.670, abs=0.002)
    assert baselines.colour == pytest.approx(0.846, abs=0.005)
    assert baselines.shape == pytest.approx(0.820, abs=0.005)
    assert baselines.colour_and_shape > 0.999


@pytest.mark.parametrize("module", ["easy_vqa", "PIL"])
def test_a_missing_package_is_named_with_its_remedy(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"load_easy_vqa: {module} must be installed: pip install easy-vqa pillow"):
        load_easy_vqa("test")


def test_errors() -> None:
    with pytest.raises(ValueError, match="load_easy_vqa: split must be 'train', 'validation' or 'test', got 'val'"):
        load_easy_vqa("val")  # type: ignore[arg-type]
    for count in (0, 4000):
        with pytest.raises(ValueError, match=f"num_validation_images must be 1 to 3999, got {count}"):
            load_easy_vqa("train", num_validation_images=count)
    with pytest.raises(ValueError, match="question_type: question must begin with is, does or what, got 'hello'"):
        question_type("hello")
