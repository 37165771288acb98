"""The official VLMo's checkpoints and test inputs, from seeded generators instead of downloads.

Names and shapes are those of microsoft/unilm, folder vlmo/, commit 768a3c87. Nothing here imports vlmo_fast: the
goldens, the oracle and the model under test all start from these numbers. See goldens/README.md.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int, ...]

GOLDENS = Path(__file__).parent / "goldens"

PATCH_SIZE = 16
VOCAB_SIZE = 30522
INIT_TEXT_LEN = 196  # T_init: text rows of the relative table, whatever max_text_len is
NUM_VQA_ANSWERS = 3129
KINDS = ("pretrain", "vqa", "nlvr2", "irtr", "textmlm")


@dataclass(frozen=True)
class Arch:
    hidden_size: int
    num_layers: int
    num_heads: int
    first_vl_layer: int
    relative: bool  # relative positions and layer scale; else absolute positions and neither
    image_size: int


ARCHS = {
    "tiny_rel": Arch(64, 4, 4, 2, relative=True, image_size=64),
    "tiny_abs": Arch(68, 4, 2, 2, relative=False, image_size=64),
    "base": Arch(768, 12, 12, 10, relative=True, image_size=224),
    "base_plus": Arch(544, 24, 16, 21, relative=False, image_size=224),
    "large": Arch(1024, 24, 16, 21, relative=True, image_size=224),
}

TINY_LENGTHS = (5, 9, 17, 40)
FULL_LENGTHS = (9, 17)
VQA_TARGETS: tuple[dict[int, float], ...] = ({3: 1.0, 17: 0.3}, {100: 0.6}, {}, {3128: 0.9, 5: 0.3, 7: 0.3})
NLVR2_ANSWERS = (1, 0, 1, 1)


def table_rows(num_patches: int) -> int:
    """Rows of the relative table for num_patches per side: window, 3 image CLS, 2 cross-modal, 2 T_init text."""
    return (2 * num_patches - 1) ** 2 + 3 + 2 + 2 * INIT_TEXT_LEN


def official_shapes(
    kind: str, arch: str, *, image_size: int | None = None, max_text_len: int | None = None
) -> dict[str, Shape]:
    """Names and shapes of an official checkpoint, in state_dict order.

    Args:
        kind: one of KINDS.
        arch: one of ARCHS.
        image_size: pixels per side; None is the arch's own (64 tiny, 224 full size).
        max_text_len: None is 40, or 196 for textmlm. The goldens' textmlm model has 40.
    """
    if kind not in KINDS:
        raise ValueError(f"official_shapes: kind must be one of {KINDS}, got {kind!r}")
    a = ARCHS[arch]
    d, v = a.hidden_size, a.num_layers if kind == "textmlm" else a.first_vl_layer
    n = (image_size or a.image_size) // PATCH_SIZE
    t = max_text_len or (INIT_TEXT_LEN if kind == "textmlm" else 40)
    shapes: dict[str, Shape] = {}

    def linear(name: str, rows: int, cols: int) -> None:
        shapes[f"{name}.weight"] = (rows, cols)
        shapes[f"{name}.bias"] = (rows,)

    def norm(name: str, size: int = d) -> None:
        shapes[f"{name}.weight"] = (size,)
        shapes[f"{name}.bias"] = (size,)

    def mlp(name: str) -> None:
        linear(f"{name}.fc1", 4 * d, d)
        linear(f"{name}.fc2", d, 4 * d)

    if a.relative:
        shapes["relative_position_bias_table"] = (table_rows(n), a.num_layers * a.num_heads)
    if kind in ("pretrain", "irtr"):
        shapes["logit_scale"] = ()
    if kind == "pretrain":
        shapes["logit_vl_scale"] = ()
    shapes["transformer.cls_token"] = (1, 1, d)
    if not a.relative:
        shapes["transformer.pos_embed"] = (1, n * n + 1, d)
    shapes["transformer.patch_embed.proj.weight"] = (d, 3, PATCH_SIZE, PATCH_SIZE)
    shapes["transformer.patch_embed.proj.bias"] = (d,)
    for layer in range(a.num_layers):
        block = f"transformer.blocks.{layer}"
        if a.relative:
            shapes[f"{block}.gamma_1"] = shapes[f"{block}.gamma_2"] = (d,)
        norm(f"{block}.norm1")
        shapes[f"{block}.attn.q_bias"] = shapes[f"{block}.attn.v_bias"] = (d,)
        shapes[f"{block}.attn.qkv.weight"] = (3 * d, d)
        linear(f"{block}.attn.proj", d, d)
        norm(f"{block}.norm2_text")
        norm(f"{block}.norm2_imag")
        mlp(f"{block}.mlp_text")
        mlp(f"{block}.mlp_imag")
        if layer >= v:
            mlp(f"{block}.mlp_vl")
            norm(f"{block}.norm2_vl")
    norm("transformer.norm")

    shapes["text_embeddings.position_ids"] = (1, t)  # the only integer tensor
    shapes["text_embeddings.word_embeddings.weight"] = (VOCAB_SIZE, d)
    shapes["text_embeddings.position_embeddings.weight"] = (t, d)
    shapes["text_embeddings.token_type_embeddings.weight"] = (2, d)
    norm("text_embeddings.LayerNorm")
    shapes["token_type_embeddings.weight"] = (3 if kind == "nlvr2" else 2, d)
    linear("pooler.dense", d, d)

    if kind in ("pretrain", "textmlm"):
        shapes["mlm_score.bias"] = (VOCAB_SIZE,)
        linear("mlm_score.transform.dense", d, d)
        norm("mlm_score.transform.LayerNorm")
        shapes["mlm_score.decoder.weight"] = (VOCAB_SIZE, d)
    if kind == "pretrain":
        linear("itm_score.fc", 2, d)
    if kind in ("pretrain", "irtr"):
        shapes["itc_text_proj.fc.weight"] = shapes["itc_image_proj.fc.weight"] = (d, d)
    if kind == "pretrain":
        shapes["itc_vl_text_proj.fc.weight"] = shapes["itc_vl_image_proj.fc.weight"] = (d, d)
    if kind in ("vqa", "nlvr2"):
        linear(f"{kind}_classifier.0", 2 * d, d if kind == "vqa" else 2 * d)
        norm(f"{kind}_classifier.1", 2 * d)
        linear(f"{kind}_classifier.3", NUM_VQA_ANSWERS if kind == "vqa" else 2, 2 * d)
    return shapes


def num_parameters(shapes: Mapping[str, Shape]) -> int:
    """Number of trainable scalars: everything but position_ids, the one buffer."""
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith("position_ids"))


def fill(name: str, shape: Shape, variant: str) -> Array:
    """The float32 value of one floating tensor; a function of its name, its shape and the variant alone.

    Variant "std" has realistic magnitudes; "hot" has strong residual branches, which show errors that std hides.
    """
    s, c = {"std": (0.02, 0.1), "hot": (0.12, 0.5)}[variant]
    last = name.rpartition(".")[2]
    if last in ("logit_scale", "logit_vl_scale"):
        return np.full(shape, math.log(1 / 0.07), np.float32)
    n = _generator(zlib.crc32(name.encode())).standard_normal(shape)
    if last == "relative_position_bias_table":
        value = 0.5 * n
    elif last in ("gamma_1", "gamma_2"):
        value = c + s * n
    elif last == "weight" and len(shape) == 1:
        value = 1 + s * n
    else:
        value = s * n
    return value.astype(np.float32)


def official_state_dict(
    kind: str, arch: str, variant: str, *, image_size: int | None = None, max_text_len: int | None = None
) -> dict[str, Array]:
    """A filled official checkpoint as numpy arrays (float32, position_ids int64). Arguments as official_shapes."""
    state = {}
    for name, shape in official_shapes(kind, arch, image_size=image_size, max_text_len=max_text_len).items():
        if name.endswith("position_ids"):
            state[name] = np.arange(shape[1], dtype=np.int64)[None]
        else:
            state[name] = fill(name, shape, variant)
    return state


def images(seed: int, batch: int, size: int) -> Array:
    """Normalised pixels, float32, (batch, 3, size, size). Goldens: seed 1001, and 1002 for NLVR2's second image."""
    return _generator(seed).standard_normal((batch, 3, size, size)).astype(np.float32)


def texts(seed: int, lengths: Sequence[int], max_text_len: int = 40) -> tuple[Array, Array]:
    """Token ids and masks, int64, (len(lengths), max_text_len). Goldens: seed 2001, TINY_LENGTHS or FULL_LENGTHS."""
    rng = _generator(seed)
    ids = np.zeros((len(lengths), max_text_len), np.int64)
    masks = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = [101, *rng.integers(1000, 30000, size=length - 2), 102]
        masks[row, :length] = 1
    return ids, masks


def masked_texts(ids: Array, masks: Array) -> tuple[Array, Array]:
    """Every fifth token from position 1, [SEP] excepted, replaced by [MASK]: the new ids and the labels."""
    masked, labels = ids.copy(), np.full_like(ids, -100)
    for row, length in enumerate(masks.sum(axis=1)):
        positions = np.arange(1, length - 1, 5)
        labels[row, positions] = ids[row, positions]
        masked[row, positions] = 103
    return masked, labels


def vqa_targets() -> Array:
    """Soft answer scores of the four tiny rows, float32, (4, NUM_VQA_ANSWERS)."""
    targets = np.zeros((len(VQA_TARGETS), NUM_VQA_ANSWERS), np.float32)
    for row, scores in enumerate(VQA_TARGETS):
        targets[row, list(scores)] = list(scores.values())
    return targets


def retrieval_inputs() -> tuple[Array, Array, Array, Array]:
    """The retrieval set: pixels (12, 3, 64, 64), ids and masks (36, 40), and the image of each text (36,)."""
    lengths = _generator(3003).integers(5, 41, size=36)
    return images(3001, 12, 64), *texts(3002, [int(n) for n in lengths]), np.arange(36) // 3


def load_golden(name: str) -> dict[str, Array]:
    """All arrays of goldens/<name>.npz: tiny_rel_hot, tiny_abs_std or resolution_4to6."""
    with np.load(GOLDENS / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))
