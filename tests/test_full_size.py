"""The released sizes end to end, in float64, against the independent oracle. Minutes: `make test-slow`."""

import gc

import numpy as np
import official
import pytest
import torch
from oracle import Oracle, resize_table

import vlmo_fast

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Both sides are float64 from the same float32 weights and differ by rounding alone: 12 to 24 layers of sums of up to
# 4,096 products, each right to about 4,096 * 1.1e-16 = 5e-13 at worst. Relative Frobenius error of an output.
TOLERANCE = 1e-11
COUNTS = {"base": 202445470, "base_plus": 184980734, "large": 599127102}  # of the released pre-training models


def check(ours: torch.Tensor, exact: np.ndarray, what: str, tolerance: float = TOLERANCE) -> None:
    wanted = torch.from_numpy(exact)
    assert ours.shape == wanted.shape, what
    error = ours.double() - wanted
    assert error.norm() <= tolerance * wanted.norm(), f"{what}: {error.norm() / wanted.norm():.1e}"
    rows, sizes = error.flatten(0, -2).norm(dim=-1), wanted.flatten(0, -2).norm(dim=-1)
    assert (rows <= 10 * tolerance * sizes).all(), f"{what}: worst row {(rows / sizes).max():.1e}"


def compare(model, exact: Oracle, size: int, tolerance: float = TOLERANCE) -> None:
    """Image, text and pair; both branches of the first two; the heads over pairs."""
    dtype = next(model.parameters()).dtype
    pixels, (ids, masks) = official.images(1001, 2, size), official.texts(2001, official.FULL_LENGTHS)
    ours_pixels = torch.from_numpy(pixels).to(dtype)
    ours_ids, ours_masks = torch.from_numpy(ids), torch.from_numpy(masks)
    real = masks.astype(bool)
    with torch.inference_mode():
        image = model.backbone(pixel_values=ours_pixels, use_vl_branch=True)
        text = model.backbone(ours_ids, ours_masks, use_vl_branch=True)
        pair = model.backbone(ours_ids, ours_masks, ours_pixels)
        short = model.backbone(ours_ids[:, :17], ours_masks[:, :17], ours_pixels, cls_only=True)
    wanted = exact.infer_image(pixels)
    check(image.last_hidden_state, wanted.feats, "image tokens", tolerance)
    check(image.image_embeds, wanted.cls_feats, "image embedding", tolerance)
    check(image.vl_image_embeds, wanted.cls_vlffn_feats, "image embedding, vl branch", tolerance)
    wanted = exact.infer_text(ids, masks)
    check(text.last_hidden_state[real], wanted.feats[real], "text tokens", tolerance)
    check(text.text_embeds, wanted.cls_feats, "text embedding", tolerance)
    check(text.vl_text_embeds, wanted.cls_vlffn_feats, "text embedding, vl branch", tolerance)
    wanted = exact.infer(pixels, ids, masks)
    check(pair.last_hidden_state[:, :40][real], wanted.text_feats[real], "text tokens of a pair", tolerance)
    check(pair.last_hidden_state[:, 40:], wanted.image_feats, "image tokens of a pair", tolerance)
    check(pair.pooler_output, wanted.cls_feats, "pooled pair", tolerance)
    check(short.pooler_output, wanted.cls_feats, "pooled pair without padding, [CLS] only", tolerance)
    words = official.masked_texts(ids, masks)[1] >= 0  # where words would be predicted
    with torch.inference_mode():
        matching, predicted = model.itm_head(pair.pooler_output), model.mlm_head(pair.last_hidden_state[:, :40][words])
    # Two sums of 768 or 1,024 terms that nearly cancel: as wrong as the pooled pair may be, which goes through them.
    error = matching.double() - torch.from_numpy(exact.itm_logits(wanted.cls_feats))
    pooled, rows = torch.from_numpy(wanted.cls_feats).norm(dim=1), model.itm_head.weight.detach().double().norm(dim=1)
    bound = (tolerance * pooled[:, None] * rows).clamp(max=2e-5)  # the goldens' tolerance of logits
    assert (error.abs() <= bound).all(), f"matching logits: {error.abs().max():.1e}"
    check(predicted, exact.mlm_logits(wanted.text_feats[words]), "word logits", tolerance)


@pytest.mark.parametrize("variant", ["std", "hot"])
@pytest.mark.parametrize("preset", ["base", "base_plus", "large"])
def test_released_size(preset, variant):
    state = official.official_state_dict("pretrain", preset, variant)
    model = vlmo_fast.load_official({name: torch.from_numpy(x) for name, x in state.items()})
    # The release counts its unused text positions, which are a buffer here.
    assert sum(p.numel() for p in (*model.parameters(), *model.buffers())) == COUNTS[preset]
    assert model.config.mome == vlmo_fast.MoMEConfig.from_preset(preset)
    compare(model.double(), Oracle(state, official.ARCHS[preset].num_heads), 224)
    del model, state
    gc.collect()


def test_released_size_in_float32():
    """The dtype that is used; the bound is the goldens' relative tolerance for features."""
    state = official.official_state_dict("pretrain", "base", "std")
    model = vlmo_fast.load_official({name: torch.from_numpy(x) for name, x in state.items()})
    compare(model, Oracle(state, 12), 224, tolerance=1e-5)


def test_other_resolution():
    """Base from 224 to 384 px: the float64 table is resized by the loader here, by scipy there."""
    state = official.official_state_dict("pretrain", "base", "std")
    table = state["relative_position_bias_table"].astype(np.float64)  # both sides then round nothing
    tensors = {name: torch.from_numpy(x) for name, x in state.items()}
    tensors["relative_position_bias_table"] = torch.from_numpy(table)
    model = vlmo_fast.load_official(tensors, image_size=384)
    assert model.config.mome == vlmo_fast.MoMEConfig.from_preset("base", image_size=384)
    state["relative_position_bias_table"] = resize_table(table, 14, 24)
    compare(model.double(), Oracle(state, 12), 384)
