"""The peer for whole models computes what the released implementation computed, and what our models compute."""

import numpy as np
import official
import pytest
import torch

import vlmo_fast
from benchmarks.peers import released
from benchmarks.peers.released import Negatives, Released

GOLDENS = {"tiny_rel_hot": ("tiny_rel", "hot"), "tiny_abs_std": ("tiny_abs", "std")}


@pytest.fixture(scope="module", params=GOLDENS)
def golden(request):
    arch, variant = GOLDENS[request.param]
    state = official.official_state_dict("pretrain", arch, variant)
    heads = official.ARCHS[arch].num_heads
    model = vlmo_fast.load_official({k: torch.from_numpy(v) for k, v in state.items()}, num_attention_heads=heads)
    return official.load_golden(request.param), model.double().eval()


@pytest.fixture(scope="module")
def inputs():
    ids, masks = official.texts(2001, official.TINY_LENGTHS)
    masked, labels = official.masked_texts(ids, masks)
    pixels = torch.from_numpy(official.images(1001, 4, 64)).double()
    return pixels, *(torch.from_numpy(array) for array in (ids, masks, masked, labels))


def close(actual, expected):
    expected = torch.from_numpy(np.asarray(expected)).double()
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-5, atol=5e-6)


def test_the_peer_gives_the_released_features(golden, inputs):
    z, model = golden
    pixels, ids, masks, *_ = inputs
    peer = Released(model)
    image, text = peer.image(pixels, vl_branch=True), peer.text(ids, masks, vl_branch=True)
    pair = peer.pair(ids, masks, pixels)
    close(image.hidden, z["infer_image.image_feats"])
    close(image.embedding, z["infer_image.cls_feats"])
    close(image.vl_embedding, z["infer_image.cls_vlffn_feats"])
    close(text.embedding, z["infer_text.cls_feats"])
    close(text.vl_embedding, z["infer_text.cls_vlffn_feats"])
    real = masks.bool()
    close(text.hidden[real], z["infer_text.text_feats"][real.numpy()])
    close(pair.hidden[:, :40][real], z["infer.text_feats"][real.numpy()])
    close(pair.hidden[:, 40:], z["infer.image_feats"])
    close(pair.embedding, z["infer.cls_feats"])
    assert peer.image(pixels).vl_embedding is None


def test_the_peer_gives_the_released_losses(golden, inputs):
    z, model = golden
    negatives = Negatives(torch.from_numpy(z["itm.image_neg_idx"]), torch.from_numpy(z["itm.text_neg_idx"]))
    pixels, ids, masks, masked, labels = inputs
    losses = Released(model).losses(ids, masks, pixels, masked, labels, negatives)
    for value, name in ((losses.total, "grad.total_loss"), (losses.itc, "itc.loss_total"), (losses.itm, "itm.loss")):
        assert value.item() == pytest.approx(float(z[name]), rel=1e-6)
    assert losses.mlm.item() == pytest.approx(float(z["mlm.loss_raw"]), rel=1e-6)


def test_the_peer_and_our_model_agree_in_float64_with_all_gradients(golden, inputs):
    _, model = golden
    pixels, ids, masks, masked, labels = inputs
    negatives = Negatives(torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2]))
    ours = model(ids, pixels, masks, masked, labels, *negatives)
    theirs = Released(model).losses(ids, masks, pixels, masked, labels, negatives)
    torch.testing.assert_close(theirs.total, ours.loss, rtol=1e-12, atol=0)
    parameters = dict(model.named_parameters())
    gradients = (torch.autograd.grad(loss, list(parameters.values())) for loss in (theirs.total, ours.loss))
    for name, their, our in zip(parameters, *gradients, strict=True):
        assert (their - our).norm() <= 1e-10 * our.norm() + 1e-15, name


def test_our_embeddings_without_padding_are_the_peers_with_it(golden, inputs):
    _, model = golden
    _, ids, masks, *_ = inputs
    peer = Released(model).text(ids, masks)
    for row, length in enumerate(official.TINY_LENGTHS):
        ours = model.backbone(ids[row : row + 1, :length], cls_only=True)
        torch.testing.assert_close(peer.embedding[row : row + 1], ours.text_embeds, rtol=1e-11, atol=1e-13)


def test_the_peer_wants_padded_texts(golden, inputs):
    _, model = golden
    _, ids, masks, *_ = inputs
    with pytest.raises(ValueError, match=r"Released: input_ids must be padded to 40 tokens, got 39"):
        Released(model).text(ids[:, :39], masks[:, :39])
    texts = [row[:length] for row, length in zip(ids, official.TINY_LENGTHS, strict=True)]
    padded, mask = released.pad_texts(texts, 40)
    assert torch.equal(padded, ids) and torch.equal(mask, masks)


def test_negatives_are_never_the_own_partner():
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
    for _ in range(20):
        drawn = released.draw_negatives(images, texts, torch.tensor(3.0))
        for ids in drawn:
            assert (ids != torch.arange(5)).all() and ids.min() >= 0 and ids.max() < 5


def test_block_calls_are_those_of_the_release(golden, inputs, monkeypatch):
    """12 for base without the second branch, 14 with it: L and L + F."""
    _, model = golden
    calls = []
    attend = Released._attend
    monkeypatch.setattr(Released, "_attend", lambda self, *rest: calls.append(rest[0]) or attend(self, *rest))
    pixels, ids, masks, *_ = inputs
    peer = Released(model)
    for run, expected in (
        (lambda: peer.image(pixels), 4),
        (lambda: peer.text(ids, masks, vl_branch=True), 6),
        (lambda: peer.pair(ids, masks, pixels), 4),
    ):
        calls.clear()
        run()
        assert len(calls) == expected


def test_the_released_constants_are_our_defaults():
    config = vlmo_fast.VLMoConfig()
    assert config.mlm_loss_weight == released.MLM_WEIGHT
    assert (config.layer_norm_eps, config.text_layer_norm_eps) == (released.IMAGE_NORM_EPS, released.TEXT_NORM_EPS)
