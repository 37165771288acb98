"""The oracle against the official model's arrays, and proof that those arrays can fail.

Run with -s for the worst relative error of each group of arrays.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import official
import oracle
import pytest
import torch
from oracle import Array, Oracle

TOLERANCE = 2e-6  # float32 noise of the official run, relative to the largest element of an array
VISIBLE = 10 * TOLERANCE  # what a planted error must exceed


@cache
def weights(kind: str, arch: str, variant: str, image_size: int | None = None) -> Mapping[str, Array]:
    return official.official_state_dict(kind, arch, variant, image_size=image_size, max_text_len=40)


@dataclass(frozen=True)
class Case:
    """One golden file with the inputs that made it."""

    file: str
    arch: str
    variant: str
    golden: dict[str, Array] = field(repr=False)

    def model(self, kind: str = "pretrain") -> Oracle:
        return Oracle(weights(kind, self.arch, self.variant), official.ARCHS[self.arch].num_heads)

    @property
    def pixels(self) -> Array:
        return official.images(1001, 4, 64)

    @property
    def texts(self) -> tuple[Array, Array]:
        return official.texts(2001, official.TINY_LENGTHS)

    @property
    def masked_texts(self) -> tuple[Array, Array]:
        return official.masked_texts(*self.texts)

    @property
    def negatives(self) -> tuple[Array, Array]:
        return self.golden["itm.image_neg_idx"], self.golden["itm.text_neg_idx"]


CASES = [
    Case("tiny_rel_hot", "tiny_rel", "hot", official.load_golden("tiny_rel_hot")),
    Case("tiny_abs_std", "tiny_abs", "std", official.load_golden("tiny_abs_std")),
]
RESOLUTION = official.load_golden("resolution_4to6")


# What the oracle computes for each group of golden arrays; the group is the part of the name before the dot

Arrays = dict[str, Any]


def infer_image(case: Case) -> Arrays:
    out = case.model().infer_image(case.pixels)
    return {
        "image_feats": out.feats,
        "cls_feats": out.cls_feats,
        "cls_vlffn_feats": out.cls_vlffn_feats,
        "raw_cls_feats": out.raw_cls_feats,
        "hidden_cls": out.hidden_cls,
    }


def infer_text(case: Case) -> Arrays:
    out = case.model().infer_text(*case.texts)
    return {
        "text_feats": out.feats,
        "cls_feats": out.cls_feats,
        "cls_vlffn_feats": out.cls_vlffn_feats,
        "raw_cls_feats": out.raw_cls_feats,
        "hidden_cls": out.hidden_cls,
    }


def infer_image_ft(case: Case) -> Arrays:
    out = case.model("irtr").infer_image_ft(case.pixels)
    return {"cls_feats": out.cls_feats, "raw_cls_feats": out.raw_cls_feats}


def infer_text_ft(case: Case) -> Arrays:
    out = case.model("irtr").infer_text_ft(*case.texts)
    return {"cls_feats": out.cls_feats, "raw_cls_feats": out.raw_cls_feats}


def infer(case: Case) -> Arrays:
    return case.model().infer(case.pixels, *case.texts)._asdict()


def itc(case: Case) -> Arrays:
    model = case.model()
    total, base, vl = model.itc_loss(model.infer_image(case.pixels), model.infer_text(*case.texts))
    return {
        "loss_total": total,
        "loss_base": base.loss,
        "loss_vlffn": vl.loss,
        "i2t_logits": base.i2t_logits,
        "t2i_logits": base.i2t_logits.T,
        "vl_i2t_logits": vl.i2t_logits,
        "logit_scale_exp": np.exp(model.p("logit_scale")),
    }


def itm(case: Case) -> Arrays:
    model = case.model()
    logits = model.itm_pair_logits(case.pixels, *case.texts, *case.negatives)
    i2t = itc(case)["i2t_logits"]
    return {
        "logits": logits,
        "loss": oracle.itm_loss(logits),
        "weights_i2t": oracle.hard_negative_weights(i2t),
        "weights_t2i": oracle.hard_negative_weights(i2t.T),
    }


def itm_score(case: Case) -> Arrays:
    return {"pos_logits": case.model().itm_logits(infer(case)["cls_feats"])}


def masked_language(model: Oracle, feats: Array, labels: Array) -> Arrays:
    logits = model.mlm_logits(feats)
    return {
        "text_feats": feats,
        "logits_v127": logits[..., ::127],
        "logsumexp": oracle.logsumexp(logits),
        "argmax": logits.argmax(axis=-1),
        "loss": oracle.mlm_loss(logits, labels),
    }


def mlm(case: Case) -> Arrays:
    (ids, labels), (_, masks) = case.masked_texts, case.texts
    model = case.model()
    out = masked_language(model, model.infer(case.pixels, ids, masks).text_feats, labels)
    loss = out.pop("loss")
    return {**out, "loss_raw": loss, "loss_times_quarter": 0.25 * loss}


def textmlm(case: Case) -> Arrays:
    (ids, labels), (_, masks) = case.masked_texts, case.texts
    model = case.model("textmlm")
    return masked_language(model, model.infer_text_mlm(ids, masks), labels)


def grad(case: Case) -> Arrays:
    return {"total_loss": case.model().pretrain_loss(case.pixels, *case.texts, *case.masked_texts, *case.negatives)}


def vqa(case: Case) -> Arrays:
    model, targets = case.model("vqa"), official.vqa_targets()
    logits = model.vqa_logits(model.infer(case.pixels, *case.texts).cls_feats)
    return {
        "logits": logits,
        "loss": oracle.vqa_loss(logits, targets),
        "score": oracle.vqa_score(logits, targets),
    }


def nlvr2(case: Case) -> Arrays:
    model = case.model("nlvr2")
    first = model.infer(case.pixels, *case.texts, image_token_type=1).cls_feats
    second = model.infer(official.images(1002, 4, 64), *case.texts, image_token_type=2).cls_feats
    logits = model.nlvr2_logits(first, second)
    return {
        "infer1_cls_feats": first,
        "infer2_cls_feats": second,
        "logits": logits,
        "loss": oracle.cross_entropy(logits, official.NLVR2_ANSWERS),
    }


def irtr(case: Case) -> Arrays:
    model = case.model("irtr")
    image, text = model.infer_image_ft(case.pixels), model.infer_text_ft(*case.texts)
    return oracle.contrastive_loss(image.cls_feats, text.cls_feats, model.p("logit_scale"))._asdict()


GROUPS: dict[str, Callable[[Case], Arrays]] = {
    f.__name__: f
    for f in (
        infer_image, infer_text, infer_image_ft, infer_text_ft, infer, itc, itm, itm_score, mlm, textmlm, grad, vqa,
        nlvr2, irtr,
    )
}  # fmt: skip

# Rows of padded positions depend on how padding is computed, so only real tokens count
TOKEN_ARRAYS = {"text_feats", "logits_v127", "logsumexp", "argmax"}

# Arrays that no group computes: tests below compare them, or say here why not
ELSEWHERE = {
    "in.": "test_inputs, test_weights",
    "idx.": "test_index_tables",
    "itm.labels": "test_itm_labels_and_negatives",
    "itm.image_neg_idx": "a random draw, taken as given; test_itm_labels_and_negatives sees that it is a legal one",
    "itm.text_neg_idx": "the same",
    "grad.names": "test_gradient_norms",
    "grad.l2norm": "test_gradient_norms*; numpy has no backward pass: exact for five tensors, statistical for the rest",
}


def relative_error(actual: Any, golden: Array) -> float:
    """Largest difference over largest element."""
    assert np.shape(actual) == golden.shape
    difference, scale = np.abs(actual - golden).max(), np.abs(golden).max()
    return float(difference / scale) if scale else float(difference)


def error(case: Case, group: str, array: str, arrays: Arrays) -> float:
    actual, golden = arrays[array], case.golden[f"{group}.{array}"]
    if array in TOKEN_ARRAYS:
        real = case.texts[1] == 1
        actual, golden = actual[real], golden[real]
    if array == "argmax":
        return float((actual != golden).mean())
    return relative_error(actual, golden)


@cache
def computed(file: str, group: str) -> Arrays:
    """A group without planted errors, computed once."""
    return GROUPS[group](next(case for case in CASES if case.file == file))


@pytest.fixture(scope="module")
def worst() -> Iterator[dict[str, tuple[float, str]]]:
    errors: dict[str, tuple[float, str]] = {}
    yield errors
    for path, (size, array) in errors.items():
        print(f"\n{path:32} {size:.1e} {array}", end="")


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_golden_group(case: Case, group: str, worst: dict[str, tuple[float, str]]) -> None:
    arrays = computed(case.file, group)
    errors = {array: error(case, group, array, arrays) for array in arrays}
    worst[f"{case.file} {group}"] = max((size, array) for array, size in errors.items())
    assert {array: size for array, size in errors.items() if not size < TOLERANCE} == {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_every_golden_array_is_used(case: Case) -> None:
    compared = {f"{group}.{array}" for group in GROUPS for array in computed(case.file, group)}
    left = [name for name in case.golden if name not in compared and not name.startswith(tuple(ELSEWHERE))]
    assert left == []
    assert compared <= set(case.golden)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_inputs(case: Case) -> None:
    ids, masks = case.texts
    ids_mlm, labels_mlm = case.masked_texts
    for name, array in {"ids": ids, "masks": masks, "ids_mlm": ids_mlm, "labels_mlm": labels_mlm}.items():
        np.testing.assert_array_equal(array, case.golden[f"in.text_{name}"])
    np.testing.assert_allclose(case.pixels.sum(dtype=np.float64), case.golden["in.image_sum"], rtol=1e-12)
    np.testing.assert_array_equal(case.pixels.ravel()[:8], case.golden["in.image_first8"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_weights(case: Case) -> None:
    state = weights("pretrain", case.arch, case.variant)
    names = case.golden["in.weight_checksum_names"]
    assert set(names) == set(state) - {"text_embeddings.position_ids"}
    sums = [state[name].sum(dtype=np.float64) for name in names]
    np.testing.assert_allclose(sums, case.golden["in.weight_checksum_sum"], rtol=0, atol=1e-9)


def test_index_tables() -> None:
    golden = CASES[0].golden
    np.testing.assert_array_equal(oracle.image_index(4), golden["idx.image"])
    np.testing.assert_array_equal(oracle.text_index(40, 4), golden["idx.text"])
    np.testing.assert_array_equal(oracle.joint_index(40, 4), golden["idx.text_image"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_itm_labels_and_negatives(case: Case) -> None:
    np.testing.assert_array_equal(case.golden["itm.labels"], np.repeat([1, 0, 0], 4))
    image_neg, text_neg = case.negatives
    assert (case.golden["itm.weights_t2i"][np.arange(4), image_neg] > 0).all()
    assert (case.golden["itm.weights_i2t"][np.arange(4), text_neg] > 0).all()


# Gradients: forward differences of the float64 loss, good to about 1e-6


class Slopes:
    """Derivatives of the pre-training loss of one case."""

    def __init__(self, case: Case) -> None:
        self.golden = dict(zip(map(str, case.golden["grad.names"]), case.golden["grad.l2norm"], strict=True))
        self.model = case.model()
        self.model.state = self.state = {name: self.model.p(name) for name in self.golden}
        self.batch = (case.pixels, *case.texts, *case.masked_texts, *case.negatives)
        self.loss = self.model.pretrain_loss(*self.batch)

    def along(self, name: str, direction: Any) -> float:
        step = 1e-6 / max(1.0, float(np.linalg.norm(direction)))
        value = self.state[name]
        self.state[name] = value + step * direction
        moved = self.model.pretrain_loss(*self.batch)
        self.state[name] = value
        return float((moved - self.loss) / step)

    def norm(self, name: str) -> float:
        """One loss per element."""
        shape = self.state[name].shape
        basis = np.eye(self.state[name].size).reshape(-1, *shape)
        return float(np.linalg.norm([self.along(name, direction) for direction in basis]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_gradient_norms(case: Case) -> None:
    slopes = Slopes(case)
    assert set(slopes.golden) == set(case.golden["in.weight_checksum_names"])
    for name in ("logit_scale", "logit_vl_scale", "itm_score.fc.bias"):
        assert slopes.norm(name) == pytest.approx(slopes.golden[name], rel=1e-4), name
    without = [name for name, norm in slopes.golden.items() if norm < 0]
    assert without == (["text_embeddings.position_embeddings.weight"] if case.arch == "tiny_rel" else [])
    assert [slopes.along(name, np.array(1.0)) for name in without] == [0] * len(without)


@pytest.mark.slow  # hundreds of losses
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_gradient_norms_of_all_tensors(case: Case) -> None:
    slopes = Slopes(case)
    for name in {
        "tiny_rel_hot": ("transformer.blocks.1.gamma_1", "transformer.blocks.2.norm2_vl.bias"),
        "tiny_abs_std": ("transformer.norm.weight", "transformer.blocks.0.attn.q_bias"),
    }[case.file]:
        assert slopes.norm(name) == pytest.approx(slopes.golden[name], rel=1e-4), name

    # Along a normal direction the slope is normal with deviation |g|, so the sum of n squares of slope / |g| is
    # chi-squared: mean n, deviation sqrt(2 n)
    rng = np.random.default_rng(0)
    tensors = {name: norm for name, norm in slopes.golden.items() if norm > 0}
    ratios = [slopes.along(name, rng.standard_normal(slopes.state[name].shape)) / tensors[name] for name in tensors]
    squares = np.square(ratios)
    assert abs(squares.sum() - len(squares)) < 4 * np.sqrt(2 * len(squares))
    assert squares.max() < 4.5**2


# Resolution change


@pytest.mark.parametrize(("src", "dst", "q"), [(6, 4, 1.01), (14, 24, 1.090307), (14, 30, 1.125056)])
def test_geometric_ratio(src: int, dst: int, q: float) -> None:
    assert oracle.geometric_ratio(src, dst) == pytest.approx(q, abs=1e-6)


def test_relative_table_resolution() -> None:
    src = official.fill("relative_position_bias_table", (446, 16), "std")
    np.testing.assert_array_equal(src, RESOLUTION["rel_4to6.src"])
    assert oracle.geometric_ratio(4, 6) == pytest.approx(float(RESOLUTION["rel_4to6.q"]), abs=1e-14)
    dst = oracle.resize_table(src, 4, 6)
    assert relative_error(dst, RESOLUTION["rel_4to6.dst"]) < 1e-7  # only the last rounding to float32
    np.testing.assert_array_equal(dst[121:], src[49:])


def test_absolute_positions_resolution() -> None:
    src = official.fill("transformer.pos_embed", (1, 17, 68), "std")
    np.testing.assert_array_equal(src, RESOLUTION["abs_4to6.src"])
    assert relative_error(oracle.resize_positions(src, 4, 6), RESOLUTION["abs_4to6.dst"]) < 5e-7


@pytest.mark.parametrize(("src", "dst"), [(4, 6), (6, 4), (14, 24)])  # up, down (no antialiasing), the real one
def test_bicubic_is_torchs(src: int, dst: int) -> None:
    pos_embed = official.fill("transformer.pos_embed", (1, src * src + 1, 8), "std").astype(np.float64)
    grid = torch.from_numpy(pos_embed[:, 1:]).reshape(1, src, src, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (dst, dst), mode="bicubic", align_corners=False)
    actual = oracle.resize_positions(pos_embed, src, dst)
    np.testing.assert_allclose(actual[:, 1:], expected.flatten(2).mT.numpy(), rtol=0, atol=1e-14)
    np.testing.assert_array_equal(actual[:, 0], pos_embed[:, 0])


@pytest.mark.parametrize("arch", ["tiny_rel", "tiny_abs"])
def test_model_at_another_resolution(arch: str) -> None:
    tag, name, resize = {
        "tiny_rel": ("rel_4to6", "relative_position_bias_table", oracle.resize_table),
        "tiny_abs": ("abs_4to6", "transformer.pos_embed", oracle.resize_positions),
    }[arch]
    small, state = weights("pretrain", arch, "std"), dict(weights("pretrain", arch, "std", 96))
    resized = resize(small[name], 4, 6)
    assert resized.shape == state[name].shape
    state[name] = resized
    model = Oracle(state, official.ARCHS[arch].num_heads)
    pixels, text = official.images(1001, 4, 96), official.texts(2001, official.TINY_LENGTHS)
    image_cls, joint_cls = model.infer_image(pixels).cls_feats, model.infer(pixels, *text).cls_feats
    assert relative_error(image_cls, RESOLUTION[f"{tag}.infer_image_cls_feats"]) < TOLERANCE
    assert relative_error(joint_cls, RESOLUTION[f"{tag}.infer_cls_feats"]) < TOLERANCE


# Retrieval. The official scores are not among the goldens, so the rules are tested by hand


def test_recalls() -> None:
    image_of = np.array([0, 0, 1, 1])
    scores = np.array([[0.9, 0.1, 0.8, 0.2], [0.5, 0.4, 0.3, 0.6]])
    assert oracle.recalls(scores, image_of, 1) == (0.5, 1.0)  # texts 1, 2 prefer the other image
    assert oracle.recalls(scores[:, [2, 1, 0, 3]], image_of, 1) == (0.5, 0.5)  # image 0 now prefers text 2
    assert oracle.recalls(scores[::-1], image_of, 1) == (0.5, 0.0)
    assert oracle.recalls(scores[::-1], image_of, 2) == (1.0, 1.0)


def test_reranked() -> None:
    scores = np.array([[0.9, 0.1, 0.8], [0.5, 0.4, 0.3]])
    itm_logits = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    per_image, per_text = oracle.reranked(scores, itm_logits, 1)
    np.testing.assert_allclose(per_image, [[1.9, -99.9, -99.2], [4.5, -99.6, -99.7]])
    np.testing.assert_allclose(per_text, [[1.9, -99.9, 3.8], [-99.5, 5.4, -99.7]])


def test_retrieval_scores_ignore_the_batch() -> None:
    """Each pair's score is its own, whatever else is in the batch."""
    pixels, ids, masks, image_of = official.retrieval_inputs()
    assert pixels.shape == (12, 3, 64, 64)
    assert ids.shape == masks.shape == (36, 40)
    assert image_of.shape == (36,)
    model = CASES[0].model("irtr")
    text = model.infer_text_ft(ids, masks).cls_feats
    scores = oracle.retrieval_scores(model.infer_image_ft(pixels).cls_feats, text)
    few = oracle.retrieval_scores(model.infer_image_ft(pixels[3:5]).cls_feats, text[7:9])
    np.testing.assert_allclose(scores[3:5, 7:9], few, atol=1e-12)
    assert np.abs(scores).max() < 1


# Sizes and provenance


@pytest.mark.parametrize(
    ("arch", "counts"),
    {
        "base": (202445470, 182014617, 178388834, 177200737, 190756506),
        "base_plus": (184980734, 170866457, 168053570, 167455713, 176766874),
        "large": (599127102, 571108665, 566799618, 564691201, 569903162),
    }.items(),
)
def test_parameter_counts(arch: str, counts: tuple[int, ...]) -> None:
    actual = tuple(official.num_parameters(official.official_shapes(kind, arch)) for kind in official.KINDS)
    assert actual == counts


@pytest.mark.parametrize(
    ("kind", "counts"),
    {
        "pretrain": (293, 503, 551),
        "vqa": (285, 495, 543),
        "nlvr2": (285, 495, 543),
        "irtr": (282, 492, 540),
        "textmlm": (273, 477, 525),
    }.items(),
)
def test_key_counts(kind: str, counts: tuple[int, ...]) -> None:
    assert tuple(len(official.official_shapes(kind, arch)) for arch in ("base", "base_plus", "large")) == counts


@pytest.mark.parametrize("file", sorted(official.GOLDENS.glob("*.npz")), ids=lambda file: file.stem)
def test_goldens_are_unchanged(file: Any) -> None:
    assert hashlib.sha256(file.read_bytes()).hexdigest() in (official.GOLDENS / "README.md").read_text()


# Planted errors: each is a mistake that somebody re-implementing VLMo could make, and must break the array it names

Plant = Callable[[pytest.MonkeyPatch], None]


def edit_index(name: str, edit: Callable[[Array, int], None]) -> Plant:
    """edit(index, T) changes an index table in place; T is 0 for the image's."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = getattr(oracle, name)

        def wrong(*args: int) -> Array:
            index: Array = real(*args)
            edit(index, args[0] if name != "image_index" else 0)
            return index

        patch.setattr(oracle, name, wrong)

    return plant


def flip_sign(index: Array, _: int) -> None:
    index[1:, 1:] = index[1:, 1:].T.copy()


def swap_cls(index: Array, _: int) -> None:
    index[0, 1:] += 1
    index[1:, 0] -= 1


def swap_modalities(index: Array, t: int) -> None:
    index[:t, t:] += 1
    index[t:, :t] -= 1


def constant(name: str, value: Any) -> Plant:
    return lambda patch: patch.setattr(oracle, name, value)


def method(name: str, wrong: Callable[..., Any]) -> Plant:
    """wrong(real, self, *args) replaces a method of the oracle."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = getattr(Oracle, name)
        patch.setattr(Oracle, name, lambda self, *args, **kwargs: wrong(real, self, *args, **kwargs))

    return plant


def renamed(old: str, new: str) -> Plant:
    """Another tensor is used in the place of one."""
    return method("p", lambda real, self, name: real(self, name.replace(old, new)))


def tanh_gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def unbiased_layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    variance = x.var(axis=-1, ddof=1, keepdims=True)
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(variance + eps) * weight + bias


def absolute_positions(real: Any, self: Oracle, ids: Array) -> Array:
    self.relative = False
    x: Array = real(self, ids)
    self.relative = True
    return x


def column_major_patches(real: Any, self: Oracle, *args: Any, **kwargs: Any) -> Array:
    x: Array = real(self, *args, **kwargs)
    order = np.arange(16).reshape(4, 4).T.ravel()
    return np.concatenate([x[:, :1], x[:, 1:][:, order]], axis=1)


def interleaved_heads(real: Any, self: Oracle, name: str) -> Array:
    """The rows of qkv read as [head][q, k, v] instead of [q, k, v][head]."""
    w: Array = real(self, name)
    if name.endswith("qkv.weight"):
        w = w.reshape(self.num_heads, 3, -1, w.shape[1]).swapaxes(0, 1).reshape(w.shape)
    return w


def head_major_bias(_: Any, self: Oracle, layer: int, index: Array) -> Array:
    return self.p("relative_position_bias_table")[:, layer :: self.num_layers][index].transpose(2, 0, 1)


def late_vl_experts(real: Any, self: Oracle, *args: Any) -> None:
    real(self, *args)
    self.first_vl_layer += 1


PLANTED: dict[str, tuple[str, str, Plant]] = {
    # name: (file, array, error)
    "text relative position: sign": ("tiny_rel_hot", "infer_text.cls_feats", edit_index("text_index", flip_sign)),
    "image relative position: sign": ("tiny_rel_hot", "infer_image.cls_feats", edit_index("image_index", flip_sign)),
    "text CLS row and column exchanged": ("tiny_rel_hot", "infer_text.cls_feats", edit_index("text_index", swap_cls)),
    "image CLS row and column exchanged": (
        "tiny_rel_hot", "infer_image.cls_feats", edit_index("image_index", swap_cls),
    ),
    "text to image and image to text exchanged": (
        "tiny_rel_hot", "infer.cls_feats", edit_index("joint_index", swap_modalities),
    ),
    "bias columns head-major": ("tiny_rel_hot", "infer.cls_feats", method("bias", head_major_bias)),
    "bias scaled like the scores": (
        "tiny_rel_hot", "infer.cls_feats", method("bias", lambda real, self, *args: real(self, *args) / 4),
    ),
    "tanh GELU": ("tiny_rel_hot", "infer.cls_feats", constant("gelu", tanh_gelu)),
    "unbiased variance": ("tiny_rel_hot", "infer.cls_feats", constant("layer_norm", unbiased_layer_norm)),
    "block norm eps 1e-5": ("tiny_rel_hot", "infer_image.cls_feats", constant("BLOCK_EPS", 1e-5)),
    "BERT norm eps 1e-6": ("tiny_abs_std", "infer_text.raw_cls_feats", constant("BERT_EPS", 1e-6)),
    "MLM norm eps 1e-6": ("tiny_abs_std", "mlm.logits_v127", constant("MLM_EPS", 1e-6)),
    "final norm eps 1e-5": ("tiny_abs_std", "infer_image.image_feats", constant("FINAL_EPS", 1e-5)),  # hot hides it
    "VQA norm eps 1e-12": ("tiny_abs_std", "vqa.logits", constant("HEAD_EPS", 1e-12)),
    "NLVR2 norm eps 1e-12": ("tiny_abs_std", "nlvr2.logits", constant("HEAD_EPS", 1e-12)),
    "image norm before the text FFN": ("tiny_rel_hot", "infer_text.cls_feats", renamed("norm2_text", "norm2_imag")),
    "text expert for image tokens": (
        "tiny_rel_hot", "infer.cls_feats",
        method("split_ffn", lambda _, self, x, layer, text_len: self.ffn(x, layer, "text")),
    ),
    "VL experts one layer late": ("tiny_rel_hot", "infer.cls_feats", method("__init__", late_vl_experts)),
    "VL branch one layer late": ("tiny_rel_hot", "infer_image.cls_vlffn_feats", method("__init__", late_vl_experts)),
    "VL branch with the plain projection": (
        "tiny_rel_hot", "infer_text.cls_vlffn_feats", renamed("itc_vl_text_proj", "itc_text_proj"),
    ),
    "absolute text positions in the relative model": (
        "tiny_rel_hot", "infer_text.cls_feats", method("embed_text", absolute_positions),
    ),
    "no absolute text positions in the absolute model": (
        "tiny_abs_std", "infer_text.cls_feats",
        method("p", lambda real, self, name: real(self, name) * (".position_emb" not in name)),
    ),
    "image with the text's type": (
        "tiny_rel_hot", "infer_image.cls_feats",
        method("embed_image", lambda real, self, pixels, _=0: real(self, pixels, 0)),
    ),
    "second NLVR2 image with the first one's type": (
        "tiny_rel_hot", "nlvr2.logits",
        method("embed_image", lambda real, self, pixels, _=0: real(self, pixels, 1)),
    ),
    "patches column-major": ("tiny_rel_hot", "infer_image.cls_feats", method("embed_image", column_major_patches)),
    "q and v biases exchanged": ("tiny_rel_hot", "infer_image.cls_feats", renamed("q_bias", "v_bias")),
    "qkv rows head by head": ("tiny_rel_hot", "infer_image.cls_feats", method("p", interleaved_heads)),
    "no layer scale": (
        "tiny_rel_hot", "infer_image.cls_feats",
        method("p", lambda real, self, name: np.ones(()) if "gamma" in name else real(self, name)),
    ),
    "padding seen": (
        "tiny_rel_hot", "infer_text.cls_feats",
        method("attention", lambda real, self, x, layer, index, mask: real(self, x, layer, index, mask * 0 + 1)),
    ),
    "raw CLS after the final norm": (
        "tiny_rel_hot", "infer_text.raw_cls_feats",
        method("unimodal", lambda real, *args: (out := real(*args))._replace(raw_cls_feats=out.feats[:, 0])),
    ),
    "no tanh in the pooler": (
        "tiny_rel_hot", "infer.cls_feats", method("pool", lambda _, self, cls: self.linear(cls, "pooler.dense")),
    ),
    "MLM decoder tied to the embeddings": (
        "tiny_rel_hot", "mlm.logits_v127",
        renamed("mlm_score.decoder.weight", "text_embeddings.word_embeddings.weight"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_error_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, path, plant = PLANTED[name]
    case = next(case for case in CASES if case.file == file)
    plant(monkeypatch)
    group, array = path.split(".")
    size = error(case, group, array, GROUPS[group](case))
    print(f"\n{size:.1e} {path}: {name}", end="")
    assert size > VISIBLE
