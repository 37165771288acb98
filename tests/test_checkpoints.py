"""Released checkpoints in and out: bit-exact both ways, and every damaged file refused with its reason."""

import argparse
import importlib
import json
import logging
import os
import pickle
import re
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import official
import pytest
import safetensors.torch
import torch
from torch import Tensor

import vlmo_fast
from vlmo_fast.formats.official import (
    IGNORED,
    load_official,
    official_names,
    official_state_dict,
    open_official,
    save_official,
)
from vlmo_fast.positions import resize_absolute_positions, resize_relative_bias_table

CLASSES = {
    "pretrain": "VLMoForPreTraining",
    "vqa": "VLMoForQuestionAnswering",
    "nlvr2": "VLMoForImagesAndTextClassification",
    "irtr": "VLMoForImageTextRetrieval",
    "textmlm": "VLMoForMaskedLM",
}
ARCHS = ("tiny_rel", "tiny_abs")
kinds = pytest.mark.parametrize("kind", CLASSES)
archs = pytest.mark.parametrize("arch", ARCHS)


@cache
def _filled(kind: str, arch: str) -> Mapping[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in official.official_state_dict(kind, arch, "std").items()}


def filled(kind: str, arch: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A released checkpoint of a small model; only `position_ids` is of integers."""
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in _filled(kind, arch).items()}


def load(source, arch: str, **options):
    return load_official(source, num_attention_heads=official.ARCHS[arch].num_heads, **options)


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Names, their order, dtypes and bits."""
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


# There and back


@kinds
@archs
def test_round_trip(kind, arch):
    state = filled(kind, arch)
    model = load(state, arch)
    assert type(model).__name__ == CLASSES[kind]
    assert not model.training
    assert_same(official_state_dict(model), state)
    assert len(official_names(model)) == len(model.state_dict()) == len(state) - 1  # all but position_ids


@kinds
@archs
def test_round_trip_through_files(kind, arch, tmp_path):
    state = filled(kind, arch)
    torch.save(state, tmp_path / "theirs.pt")
    model = load(tmp_path / "theirs.pt", arch)
    save_official(model, tmp_path / "ours.pt")
    written = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert list(written) == ["state_dict"]
    assert_same(written["state_dict"], state)
    assert_same(official_state_dict(load(str(tmp_path / "ours.pt"), arch)), state)


@archs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_kept(arch, dtype, tmp_path):
    state = filled("pretrain", arch, dtype)
    model = load(state, arch)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert_same(official_state_dict(model), state)
    save_official(model, tmp_path / "half.pt")
    assert_same(torch.load(tmp_path / "half.pt", weights_only=True)["state_dict"], state)


def test_several_dtypes_become_the_one_that_holds_them_all():
    """Scales or norms that were kept in float32 beside half-precision matrices; layers of two dtypes cannot run."""
    state = filled("irtr", "tiny_rel", torch.bfloat16)
    for dtype in (torch.float32, torch.float16):
        mixed = {name: x.to(dtype) if "norm" in name else x for name, x in state.items()}
        model = load(mixed, "tiny_rel")
        assert {x.dtype for x in model.state_dict().values()} == {torch.float32}
        assert model.config.dtype == torch.float32
        for name, tensor in official_state_dict(model).items():
            assert torch.equal(tensor, mixed[name].to(tensor.dtype)), name


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state},
        lambda state: {"state_dict": state, "epoch": 3, "global_step": 7, "hyper_parameters": {"image_size": 224}},
        lambda state: {"module": {f"module.{name}": x for name, x in state.items()}},
        lambda state: {"module": state, "optimizer": [1, 2]},
        lambda state: {"model": state},
        lambda state: {"state_dict": state, "module": {"x": 1}, "model": {"y": 2}},  # the released order of precedence
        lambda state: {"module": state, "model": {"y": 2}},
    ],
)
def test_wrappers(wrap, tmp_path):
    state = filled("irtr", "tiny_rel")
    assert_same(official_state_dict(load(wrap(state), "tiny_rel")), state)
    torch.save(wrap(state), tmp_path / "wrapped.pt")
    assert_same(official_state_dict(load(tmp_path / "wrapped.pt", "tiny_rel")), state)


def test_index_buffers_of_released_files_are_ignored():
    """The released base file holds three index tables that the code no longer saves."""
    assert IGNORED == (
        "relative_position_index",
        "text_relative_position_index",
        "text_imag_relative_position_index",
    )
    state = filled("vqa", "tiny_rel")
    buffers = {name: torch.zeros(3, 3, dtype=torch.int64) for name in IGNORED}
    assert_same(official_state_dict(load({**buffers, **state}, "tiny_rel")), state)


def test_position_ids_may_be_missing():
    state = filled("vqa", "tiny_rel")
    without = {name: x for name, x in state.items() if name != "text_embeddings.position_ids"}
    assert_same(official_state_dict(load(without, "tiny_rel")), state)


def test_nothing_is_shared_with_the_caller():
    state = filled("irtr", "tiny_abs")
    model = load(state, "tiny_abs")
    before = {name: x.clone() for name, x in official_state_dict(model).items()}
    for tensor in state.values():
        tensor.zero_()
    assert_same(official_state_dict(model), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3)
    assert all((x == 0).all() for x in state.values())


def test_settings_are_read_off_the_tensors():
    for arch in ARCHS:
        a = official.ARCHS[arch]
        for kind in CLASSES:
            config = load(filled(kind, arch), arch).config
            assert (config.hidden_size, config.num_hidden_layers) == (a.hidden_size, 4)
            assert (config.num_attention_heads, config.intermediate_size) == (a.num_heads, 4 * a.hidden_size)
            assert config.num_vl_layers == (0 if kind == "textmlm" else 2)
            assert (config.image_size, config.patch_size, config.num_channels) == (64, 16, 3)
            assert (config.vocab_size, config.max_text_length) == (30522, 196 if kind == "textmlm" else 40)
            assert config.position_embedding_type == ("relative" if a.relative else "absolute")
            assert (config.layer_scale_init_value is None) != a.relative
            assert config.num_image_types == (2 if kind == "nlvr2" else 1)
            assert config.text_relative_span == 196
            if kind in ("vqa", "nlvr2"):
                assert config.num_labels == {"vqa": 3129, "nlvr2": 2}[kind]
            assert (config.layer_norm_eps, config.text_layer_norm_eps) == (1e-6, 1e-12)


def test_loaded_parameters_train():
    """All of them; the text positions that relative models never read are no parameter."""
    frozen = {name for name, p in load(filled("vqa", "tiny_rel"), "tiny_rel").named_parameters() if not p.requires_grad}
    assert not frozen
    assert all(p.requires_grad for p in load(filled("vqa", "tiny_abs"), "tiny_abs").parameters())


# Damaged checkpoints. A model of a few numbers, since every key is damaged in turn.

SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_vl_layers": 1,
    "image_size": 12,
    "patch_size": 4,
    "vocab_size": 20,
    "max_text_length": 6,
}


@cache
def _small(kind: str, relative: bool) -> Mapping[str, Tensor]:
    torch.manual_seed(3)
    options = {**SMALL, "position_embedding_type": "relative" if relative else "absolute"}
    if not relative:
        options["layer_scale_init_value"] = None
    if kind == "nlvr2":
        options["num_image_types"] = 2
    if kind == "irtr":
        options["has_itm_head"] = False
    if kind == "textmlm":
        options["num_vl_layers"] = 0
    model = getattr(vlmo_fast, CLASSES[kind])(vlmo_fast.VLMoConfig(**options))
    return {name: x.clone() for name, x in official_state_dict(model).items()}


def small(kind: str = "pretrain", relative: bool = True) -> dict[str, Tensor]:
    return dict(_small(kind, relative))


def refusal(state: Mapping[str, Tensor]) -> str:
    with pytest.raises(ValueError, match=r"^load_official: ") as caught:
        load_official(state, num_attention_heads=2)
    return str(caught.value)


def names_of(kind: str, relative: bool = True) -> list[str]:
    return [name for name in _small(kind, relative) if name != "text_embeddings.position_ids"]


SAMPLED = {  # of the other kinds: what is peculiar to them
    "vqa": ("vqa_classifier.0.weight", "vqa_classifier.1.bias", "vqa_classifier.3.weight", "vqa_classifier.3.bias"),
    "nlvr2": ("nlvr2_classifier.0.bias", "nlvr2_classifier.1.weight", "nlvr2_classifier.3.weight", "pooler.dense.bias"),
    "irtr": ("itc_text_proj.fc.weight", "itc_image_proj.fc.weight", "logit_scale"),
    "textmlm": ("mlm_score.bias", "mlm_score.decoder.weight", "transformer.blocks.1.mlp_text.fc2.bias"),
}
DAMAGED = [("pretrain", True, name) for name in names_of("pretrain")]
DAMAGED += [(kind, True, name) for kind, names in SAMPLED.items() for name in names]
DAMAGED += [("pretrain", False, "transformer.pos_embed"), ("vqa", False, "transformer.cls_token")]
damaged = pytest.mark.parametrize(("kind", "relative", "name"), DAMAGED, ids=str)


@damaged
def test_a_missing_tensor_is_named(kind, relative, name):
    state = small(kind, relative)
    del state[name]
    assert name in refusal(state).replace(f"{name}_", "")


@damaged
def test_a_renamed_tensor_is_named(kind, relative, name):
    """The stranger is named wherever the layout could be read, and the missing one with it."""
    state = small(kind, relative)
    state["stranger.weight"] = state.pop(name)
    message = refusal(state)
    if not name.endswith(("vqa_classifier.3.weight", "nlvr2_classifier.3.weight")):
        if "problems:" in message:
            assert "unexpected: stranger.weight" in message
            assert f"missing: {name}" in message
        else:
            assert name in message


@damaged
def test_a_tensor_with_another_number_of_dimensions_is_named(kind, relative, name):
    state = small(kind, relative)
    state[name] = state[name][None]
    assert name in refusal(state)


@damaged
def test_a_tensor_of_another_length_is_refused(kind, relative, name):
    """One row more. Where a size is read off this very tensor, another one is named that does not fit any more."""
    state = small(kind, relative)
    tensor = state[name]
    state[name] = torch.cat([tensor, tensor[-1:]]) if tensor.ndim else tensor.repeat(2)
    if name in ("text_embeddings.position_embeddings.weight", "token_type_embeddings.weight"):
        # A longer text and one more image type are models of their own.
        config = load_official(state).config
        assert (config.max_text_length, config.num_image_types) in ((7, 1), (6, 2))
    else:
        message = refusal(state)
        sized = ("word_embeddings.weight", "blocks.0.mlp_text.fc1.weight", "classifier.3.weight")
        assert name in message or name.endswith(sized)


@damaged
def test_a_tensor_of_integers_is_named(kind, relative, name):
    state = small(kind, relative)
    state[name] = state[name].long()
    message = refusal(state)
    assert f"dtype of {name}: torch.int64, expected a float dtype" in message
    assert "got 1 problems" in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_tensor_of_bytes_is_named(dtype):
    """A float dtype, in which no layer computes and which torch does not even look through for NaN."""
    state = small()
    state["pooler.dense.bias"] = state["pooler.dense.bias"].to(dtype)
    message = f"pooler.dense.bias must be of float16, bfloat16, float32, float64 or integers, got {dtype}"
    assert message in refusal(state)


def test_a_complex_tensor_is_named():
    state = small()
    state["pooler.dense.bias"] = state["pooler.dense.bias"].to(torch.complex64)
    assert "dtype of pooler.dense.bias: torch.complex64, expected a float dtype" in refusal(state)


def test_all_problems_are_listed_at_once():
    state = small()
    del state["itm_score.fc.bias"]
    state["extra"] = torch.ones(2)
    state["pooler.dense.bias"] = torch.ones(9)
    state["transformer.norm.bias"] = torch.ones(8, dtype=torch.int32)
    message = refusal(state)
    for line in (
        "got 4 problems",
        "missing: itm_score.fc.bias",
        "unexpected: extra",
        "shape of pooler.dense.bias: (9,), expected (8,)",
        "dtype of transformer.norm.bias: torch.int32, expected a float dtype",
    ):
        assert line in message


@pytest.mark.parametrize("rows", [1, 396, 397, 398, 421, 423, 8])
def test_a_table_of_no_window_is_refused(rows):
    """3 x 3 patches have 25 + 397 rows; 397 + 24, + 26, ... belong to no window."""
    state = small()
    assert len(state["relative_position_bias_table"]) == 422
    state["relative_position_bias_table"] = torch.zeros(rows, 4)
    if rows == 398:  # one patch: a model of its own, whose table fits
        assert load_official(state).config.image_size == 4
    else:
        message = refusal(state)
        assert "relative_position_bias_table must have (2 N - 1)^2 + 397 rows" in message
        assert f"got {(rows, 4)}" in message


def test_a_table_of_another_number_of_layers_is_refused():
    state = small()
    state["relative_position_bias_table"] = torch.zeros(422, 5)
    assert "a multiple of 2 columns, got (422, 5)" in refusal(state)


def test_a_gap_in_the_blocks_is_refused():
    state = {name.replace("blocks.1.", "blocks.2."): x for name, x in small().items()}
    assert "blocks must be numbered from 0 without a gap" in refusal(state)
    below = {name.replace("blocks.0.", "blocks.9.").replace("blocks.1.", "blocks.0.") for name in small()}
    swapped = {name.replace("blocks.9.", "blocks.1.") for name in below}
    state = dict(zip(sorted(swapped), (torch.ones(1) for _ in swapped), strict=True))
    state["transformer.cls_token"] = torch.ones(1, 1, 8)
    assert "those with a vl expert on top, got blocks [0, 1] and vl experts in [0]" in refusal(state)


def test_a_backbone_without_head_is_refused():
    heads = ("mlm_score", "itm_score", "itc_", "logit_", "pooler")
    state = {name: x for name, x in small().items() if not name.startswith(heads)}
    assert "must hold the head of one of the tasks" in refusal(state)


# What is no checkpoint at all


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"weight": torch.ones(3)},
        {"model": {}},
        {"features.0.weight": torch.ones(3, 3), "classifier.weight": torch.ones(2)},
    ],
)
def test_foreign_dictionaries(content):
    assert "a VLMo checkpoint must hold transformer.cls_token" in refusal(content)


def test_values_that_are_no_tensors():
    assert "must map names to tensors, got 'epoch' of type int" in refusal({**small(), "epoch": 3})
    assert "got 7 of type Tensor" in refusal({7: torch.ones(1)})


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), 3])
def test_files_that_hold_no_dictionary(content, tmp_path):
    torch.save(content, tmp_path / "list.pt")
    with pytest.raises(ValueError, match=rf"list\.pt must hold a dictionary, got {type(content).__name__}"):
        load_official(tmp_path / "list.pt")


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "file.pt"
    torch.save(small(), path)
    whole = path.read_bytes()
    for data in (b"", b"a poem", whole[: len(whole) // 2], whole[:-10], b"\x80\x04."):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"file\.pt must be a readable torch checkpoint") as caught:
            load_official(path)
        assert caught.value.__cause__ is not None


def test_what_is_wrong_with_a_file_is_said_in_our_words(tmp_path):
    """Never with torch's advice to load it unprotected."""
    path = tmp_path / "file.pt"
    cases = {
        b"": "got an empty file",
        b"import os\nos.abort()\n": "got a file that begins with b'import os",
        b"\x80\x04.": "got .+",
        pickle.dumps(os.system): "got one that holds something else",
    }
    for content, reason in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=reason) as caught:
            load_official(path)
        message = str(caught.value)
        assert "weights_only" not in message
        assert "\n" not in message
        assert len(message) < 300 + len(str(path))


def test_absent_files(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"must be a checkpoint file.*, got {path}$"):
            load_official(path)


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_hostile_file_runs_nothing(tmp_path):
    """Both formats that torch.load reads; that the mark appears under pickle proves that it is armed."""
    mark, path = tmp_path / "mark", tmp_path / "hostile.pt"
    for write in (
        lambda: torch.save({**small(), "payload": Hostile(mark)}, path),
        lambda: torch.save({**small(), "payload": Hostile(mark)}, path, _use_new_zipfile_serialization=False),
        lambda: path.write_bytes(pickle.dumps(Hostile(mark))),
    ):
        write()
        with pytest.raises(ValueError, match="must be a readable torch checkpoint of tensors alone"):
            load_official(path)
        assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()


# Heads


def test_heads_come_from_the_relative_table():
    state = filled("irtr", "tiny_rel")
    assert load_official(state).config.num_attention_heads == 4
    assert load_official(state, num_attention_heads=4).config.num_attention_heads == 4
    with pytest.raises(ValueError, match="num_attention_heads must be the 4 of the bias table, got 8"):
        load_official(state, num_attention_heads=8)


def test_heads_of_absolute_models_must_be_known():
    with pytest.raises(ValueError, match=r"num_attention_heads must be given .*got None for width 68"):
        load_official(filled("irtr", "tiny_abs"))
    for heads in (3, 5, 0, -2):  # 68 = 4 x 17
        with pytest.raises(ValueError, match="num_attention_heads"):
            load_official(filled("irtr", "tiny_abs"), num_attention_heads=heads)


def on_meta(kind: str, arch: str, **options) -> dict[str, Tensor]:
    shapes = official.official_shapes(kind, arch, **options)
    integer = {"text_embeddings.position_ids"}
    return {
        name: torch.empty(shape, dtype=torch.int64 if name in integer else torch.float32, device="meta")
        for name, shape in shapes.items()
    }


# Of the released code's own models (microsoft/unilm, vlmo/, commit 768a3c87): all nn.Parameters
PARAMETERS = {
    ("base", "pretrain"): 202445470,
    ("base", "vqa"): 182014617,
    ("base", "nlvr2"): 178388834,
    ("base", "irtr"): 177200737,
    ("base", "textmlm"): 190756506,
    ("base_plus", "pretrain"): 184980734,
    ("base_plus", "vqa"): 170866457,
    ("base_plus", "nlvr2"): 168053570,
    ("base_plus", "irtr"): 167455713,
    ("base_plus", "textmlm"): 176766874,
    ("large", "pretrain"): 599127102,
    ("large", "vqa"): 571108665,
    ("large", "nlvr2"): 566799618,
    ("large", "irtr"): 564691201,
    ("large", "textmlm"): 569903162,
}


@pytest.mark.parametrize(("preset", "kind"), PARAMETERS)
def test_full_size_models(preset, kind):
    """On the meta device: the released shapes load, count as released, and are those of the preset."""
    model = load_official(on_meta(kind, preset))
    assert type(model).__name__ == CLASSES[kind]
    # The release counts its unused text positions, which are a buffer here.
    counted = [*model.parameters(), *model.buffers()]
    assert sum(p.numel() for p in counted) == PARAMETERS[preset, kind]
    config = vlmo_fast.MoMEConfig.from_preset(
        preset,
        num_vl_layers=0 if kind == "textmlm" else vlmo_fast.MoMEConfig.from_preset(preset).num_vl_layers,
        max_text_length=196 if kind == "textmlm" else 40,
        num_image_types=2 if kind == "nlvr2" else 1,
    )
    assert model.config.mome == config


# Image size


@archs
@pytest.mark.parametrize("size", [48, 96])
def test_other_image_sizes(arch, size, tmp_path):
    """Positions resized, all else bit-equal; the result saves, loads again, and gives what interpolation gives."""
    state = filled("vqa", arch)
    resized, kept = load(state, arch, image_size=size), load(state, arch)
    assert (resized.config.image_size, kept.config.image_size) == (size, 64)
    assert resized.backbone.config.image_size == size
    name = "relative_position_bias_table" if arch == "tiny_rel" else "transformer.pos_embed"
    resize = resize_relative_bias_table if arch == "tiny_rel" else resize_absolute_positions
    wanted = {**state, name: resize(state[name], 4, size // 16)}
    assert_same(official_state_dict(resized), wanted)
    save_official(resized, tmp_path / "resized.pt")
    again = load(tmp_path / "resized.pt", arch)
    assert again.config.image_size == size
    assert_same(official_state_dict(again), wanted)
    ids = torch.randint(0, 999, (2, 7))
    pixels = torch.randn(2, 3, size, size)
    torch.testing.assert_close(
        resized(ids, pixels).logits, kept(ids, pixels, interpolate_pos_encoding=True).logits, rtol=0, atol=0
    )


def test_the_same_image_size_changes_nothing():
    state = filled("vqa", "tiny_rel")
    assert_same(official_state_dict(load(state, "tiny_rel", image_size=64)), state)


@pytest.mark.parametrize("size", [65, 8, 0, -64])
def test_impossible_image_sizes(size):
    with pytest.raises(ValueError, match="image_size must be"):
        load(filled("vqa", "tiny_rel"), "tiny_rel", image_size=size)


# Saving


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_saving_is_all_or_nothing(error, tmp_path, monkeypatch):
    """A failure half-way leaves the old file as it was and nothing beside it."""
    path = tmp_path / "model.pt"
    path.write_bytes(b"the old file")
    model = load(filled("vqa", "tiny_rel"), "tiny_rel")

    def fail(_, file):
        file.write(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(error):
            save_official(model, path)
    assert path.read_bytes() == b"the old file"
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
    save_official(model, path)
    assert_same(torch.load(path, weights_only=True)["state_dict"], filled("vqa", "tiny_rel"))
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_saved_files_are_as_readable_as_others(tmp_path):
    save_official(load(filled("irtr", "tiny_rel"), "tiny_rel"), tmp_path / "model.pt")
    (tmp_path / "other").touch()
    assert (tmp_path / "model.pt").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_saving_keeps_the_model_as_it_is(tmp_path):
    model = load(filled("irtr", "tiny_rel"), "tiny_rel").train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    save_official(model, tmp_path / "model.pt")
    assert model.training
    assert all(p.grad is None and not p.grad_fn for p in model.parameters())
    assert_same(model.state_dict(), before)
    assert not any(x.requires_grad for x in official_state_dict(model).values())


def test_models_that_the_release_has_no_name_for():
    options = {**SMALL, "num_labels": 3}
    for name in ("VLMoForImageClassification", "VLMoForMaskedImageModeling"):
        model = getattr(vlmo_fast, name)(vlmo_fast.VLMoConfig(**options))
        with pytest.raises(ValueError, match=f"model must be one of .*got {name}"):
            official_state_dict(model)
    for name, change in (
        ("VLMoForImageTextRetrieval", {"has_itm_head": True}),
        ("VLMoForPreTraining", {"num_vl_layers": 0}),
    ):
        model = getattr(vlmo_fast, name)(vlmo_fast.VLMoConfig(**{**options, **change}))
        with pytest.raises(ValueError, match=f"must have the heads of a released kind, got a {name}"):
            official_state_dict(model)


def test_a_text_span_that_the_release_does_not_have():
    model = vlmo_fast.VLMoForQuestionAnswering(vlmo_fast.VLMoConfig(**SMALL, text_relative_span=12))
    with pytest.raises(ValueError, match="text_relative_span"):
        official_state_dict(model)


# One task from another's checkpoint

TASK_OF = {"pretrain": "pretrain", "vqa": "vqa", "nlvr2": "nlvr2", "irtr": "retrieval", "textmlm": "text"}
HEADS_OF = {  # what the model of a task holds beside its backbone's blocks, by our names
    "pretrain": {"pooler", "itc", "vl_itc", "mlm", "itm", "logit_scale", "vl_logit_scale"},
    "retrieval": {"pooler", "itc", "logit_scale", "itm"},
    "vqa": {"pooler", "vqa"},
    "nlvr2": {"pooler", "nlvr2"},
    "text": {"pooler", "mlm"},
    "mim": {"mask_token", "mim"},
    "classification": {"classification"},
}
TASK_CLASSES = {TASK_OF[kind]: name for kind, name in CLASSES.items()} | {
    "mim": "VLMoForMaskedImageModeling",
    "classification": "VLMoForImageClassification",
}


def head_of(name: str, task: str) -> str | None:
    """The head that one of our names belongs to; None for the backbone's own."""
    if name.startswith("classifier"):
        return task
    heads = {
        "backbone.pooler": "pooler",
        "backbone.image_projection": "itc",
        "backbone.text_projection": "itc",
        "backbone.vl_image_projection": "vl_itc",
        "backbone.vl_text_projection": "vl_itc",
        "backbone.image_embeddings.mask_token": "mask_token",
        "mlm_head": "mlm",
        "mim_head": "mim",
        "itm_head": "itm",
        "logit_scale": "logit_scale",
        "vl_logit_scale": "vl_logit_scale",
    }
    return next((head for start, head in heads.items() if name.startswith(start)), None)


@archs
@pytest.mark.parametrize("task", TASK_CLASSES)
@kinds
def test_any_task_from_any_other(kind, task, arch):
    """Backbone and shared heads to the bit, everything else fresh and finite, and the report has it all."""
    state, source = filled(kind, arch), TASK_OF[kind]
    options = {"num_labels": 7} if task == "classification" else {}
    if kind == "textmlm" and task in ("pretrain", "retrieval", "vqa", "nlvr2"):
        options["num_vl_layers"] = 2
    heads = official.ARCHS[arch].num_heads
    conversion = open_official(state, task=task, num_attention_heads=heads, **options)
    report, model = conversion.report, conversion.build()
    assert type(model).__name__ == TASK_CLASSES[task]
    theirs = {ours: name for name, ours in official_names(load(state, arch)).items()}
    shared = HEADS_OF[source] & HEADS_OF[task]
    shared |= {"itm"} if source == "retrieval" == task else set()
    taken = 0
    for name, value in model.state_dict().items():
        assert value.isfinite().all(), name
        head = head_of(name, task)
        if name in theirs and (head is None or head in shared):
            wanted = state[theirs[name]]
            if name == "backbone.modality_type_embeddings.weight":
                rows = 3 if task == "nlvr2" else 2
                wanted = torch.cat([wanted, wanted[1:2]])[:rows] if source != "nlvr2" else wanted[:rows]
            if name == "backbone.text_embeddings.position_embeddings.weight":
                wanted = wanted[: 196 if source == task == "text" else 40]
            assert torch.equal(value, wanted), name
            taken += 1
        else:
            assert name in report.fresh, name
    assert report.taken == taken == len(model.state_dict()) - len(report.fresh)
    assert len(report.unused) == len(theirs) - taken
    assert model.config.max_text_length == (196 if source == task == "text" else 40)


def test_the_third_type_row_comes_and_goes():
    """NLVR2 starts with its second image's type a copy of the first's; other tasks drop it again."""
    name = "token_type_embeddings.weight"
    state = filled("pretrain", "tiny_rel")
    nlvr2 = load(state, "tiny_rel", task="nlvr2")
    rows = official_state_dict(nlvr2)[name]
    assert torch.equal(rows, state[name][[0, 1, 1]])
    trained = filled("nlvr2", "tiny_rel")
    assert not torch.equal(trained[name][1], trained[name][2])
    back = load(trained, "tiny_rel", task="vqa")
    assert torch.equal(official_state_dict(back)[name], trained[name][:2])
    assert "backbone.modality_type_embeddings.weight" in open_official(trained, task="vqa").report.resized
    kept = load(trained, "tiny_rel", task="vqa", num_image_types=2)
    assert torch.equal(official_state_dict(kept)[name], trained[name])


def test_the_text_stage_gets_vl_experts_as_the_preset_says():
    assert load_official(on_meta("textmlm", "base"), task="pretrain").config.num_vl_layers == 2
    assert open_official(on_meta("textmlm", "large"), task="vqa").config.num_vl_layers == 3
    with pytest.raises(ValueError, match=r"num_vl_layers must be given .* got None for 4 layers"):
        load(filled("textmlm", "tiny_rel"), "tiny_rel", task="pretrain")
    assert load(filled("textmlm", "tiny_rel"), "tiny_rel", task="mim").config.num_vl_layers == 0


def test_text_positions_are_cut_and_grow_only_where_unused():
    state = filled("vqa", "tiny_rel")
    name = "text_embeddings.position_embeddings.weight"
    assert_same(
        official_state_dict(load(state, "tiny_rel", max_text_length=16)),
        {**state, name: state[name][:16], "text_embeddings.position_ids": torch.arange(16)[None]},
    )
    longer = official_state_dict(load(state, "tiny_rel", max_text_length=64))[name]
    assert torch.equal(longer[:40], state[name])
    assert (longer[40:] == 0).all()
    with pytest.raises(ValueError, match="max_text_length must be at most the checkpoint's 40 positions, got 64"):
        load(filled("vqa", "tiny_abs"), "tiny_abs", max_text_length=64)


def test_another_number_of_answers():
    """The last layer alone starts fresh."""
    state = filled("vqa", "tiny_rel")
    conversion = open_official(state, num_labels=10)
    assert conversion.report.fresh == ("classifier.fc2.weight", "classifier.fc2.bias")
    assert conversion.report.unused == ("vqa_classifier.3.weight", "vqa_classifier.3.bias")
    assert conversion.build().classifier.fc2.weight.shape == (10, 128)
    with pytest.raises(ValueError, match="num_labels must be given for the task 'classification'"):
        open_official(state, task="classification")


def test_fresh_heads_are_drawn_as_in_a_new_model(caplog):
    with caplog.at_level(logging.WARNING, "vlmo_fast.formats.official"):
        model = load(filled("textmlm", "tiny_rel"), "tiny_rel", task="pretrain", num_vl_layers=2)
    for line in ("pretrain model from a text checkpoint", "fresh:", "itm_head.weight", "experts.vl.fc1.weight"):
        assert line in caplog.text
    expert = model.backbone.blocks[3].experts["vl"]
    assert expert.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (expert.fc1.bias == 0).all()
    assert (expert.norm.weight == 1).all()
    assert model.logit_scale.item() == model.vl_logit_scale.item() == pytest.approx(2.659, abs=1e-3)
    half = load(filled("vqa", "tiny_rel", torch.bfloat16), "tiny_rel", task="retrieval")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_plain_load_warns_of_nothing(caplog):
    with caplog.at_level(logging.WARNING, "vlmo_fast"):
        load(filled("vqa", "tiny_rel"), "tiny_rel")
    assert not caplog.records


def test_settings_reach_the_model():
    model = load(filled("vqa", "tiny_rel"), "tiny_rel", drop_path_rate=0.2, text_embedding_dropout=0.3)
    assert model.backbone.blocks[3].drop_path_rate == pytest.approx(0.2)
    assert model.backbone.text_embeddings.dropout.p == 0.3
    with pytest.raises(ValueError, match="load_official: hidden_size must be the checkpoint's 64, got 32"):
        load(filled("vqa", "tiny_rel"), "tiny_rel", hidden_size=32)
    with pytest.raises(ValueError, match="load_official: task must be one of"):
        load(filled("vqa", "tiny_rel"), "tiny_rel", task="captioning")


@pytest.mark.parametrize("reader", [load_official, vlmo_fast.load], ids=lambda reader: reader.__name__)
def test_text_dropout_is_the_drop_path_rate_as_in_the_release(reader, tmp_path, caplog):
    """Unless it is given; a line says so."""
    torch.save(small("irtr"), tmp_path / "in.pt")

    def rates(**settings):
        model = reader(tmp_path / "in.pt", **settings)
        backbone = getattr(model, "model", model).backbone
        return backbone.blocks[-1].drop_path_rate, backbone.text_embeddings.dropout.p

    with caplog.at_level(logging.WARNING, "vlmo_fast"):
        assert rates(drop_path_rate=0.3) == (pytest.approx(0.3), 0.3)
        assert len(caplog.records) == 1
        assert "text_embedding_dropout is drop_path_rate, 0.3, as in the release" in caplog.text
        caplog.clear()
        assert rates(drop_path_rate=0.3, text_embedding_dropout=0.0) == (pytest.approx(0.3), 0.0)
        assert rates() == (0.0, 0.0)
        assert not caplog.records


# Every damage to the values and the bytes


@damaged
def test_a_tensor_that_is_not_finite_is_named(kind, relative, name):
    for value in (float("nan"), float("-inf")):
        state = small(kind, relative)
        state[name] = state[name].clone()
        state[name].view(-1)[-1] = value
        assert refusal(state).endswith(f"got NaN or infinity in 1 of {len(state)} tensors:\n  {name}")


def test_tensors_that_claim_more_than_is_stored(tmp_path):
    """A view of one number can claim a terabyte, in memory and in a file; so can a sparse tensor."""
    name = "text_embeddings.word_embeddings.weight"
    huge = torch.zeros(1).expand(2**37, 8)
    path = tmp_path / "huge.pt"
    torch.save({**small(), name: huge}, path)
    assert path.stat().st_size < 2**20
    with pytest.raises(ValueError, match=f"{name} must be stored in full, got a view of shape"):
        load_official(path)
    sparse = torch.sparse_coo_tensor(torch.zeros(2, 1), torch.ones(1), (2**30, 8))
    assert f"{name} must be a dense tensor, got layout torch.sparse_coo" in refusal({**small(), name: sparse})


def formats(state: Mapping[str, Tensor], folder: Path) -> dict[str, Path]:
    """One checkpoint in every format, each under a suffix that lies about it."""
    paths = {"zip": folder / "zip.safetensors", "legacy": folder / "legacy.zip", "safetensors": folder / "safe.pt"}
    torch.save(state, paths["zip"])
    torch.save({"state_dict": state}, paths["legacy"], _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(dict(state), paths["safetensors"])
    return paths


def test_the_content_decides_the_format(tmp_path):
    for path in formats(small(), tmp_path).values():
        assert_same(official_state_dict(load_official(path)), small())


@pytest.mark.parametrize("name", ["zip", "legacy", "safetensors"])
def test_truncation_at_any_offset_is_one_clear_error(name, tmp_path):
    """Sixty offsets, the ends densely; and no other exception, no silence, no model."""
    whole = formats(small("irtr"), tmp_path)[name].read_bytes()
    path = tmp_path / "cut.pt"
    step = len(whole) // 40
    offsets = {*range(12), *range(0, len(whole), step), *range(len(whole) - 12, len(whole))}
    for offset in sorted(offsets):
        path.write_bytes(whole[:offset])
        with pytest.raises(ValueError, match=r"^load_official: .*cut\.pt must be a readable"):
            load_official(path)


def test_training_records_beside_the_weights(tmp_path):
    """A command line kept as a Namespace is a plain record; what would run code is refused (see below)."""
    path = tmp_path / "trained.pt"
    arguments = argparse.Namespace(lr=1e-3, output_dir="runs")
    torch.save({"model": small(), "args": arguments, "epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}}, path)
    assert_same(official_state_dict(load_official(path)), small())


class Payload:
    """Pickles to a call of `function` with `arguments`."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_no_hostile_pickle_runs(tmp_path):
    """In each format and place of a checkpoint, by several ways to a shell or to the file system."""
    mark, path = tmp_path / "mark", tmp_path / "hostile.bin"
    payloads = (
        Payload(os.system, f"touch {mark}"),
        Payload(eval, f"open({str(mark)!r}, 'w')"),
        Payload(exec, f"open({str(mark)!r}, 'w')"),
        Payload(subprocess.call, ["touch", str(mark)]),
        Payload(Path(mark).touch),
        Payload(importlib.import_module, "this"),
        Payload(torch.load, str(mark)),
    )
    for payload in payloads:
        for content in ({**small(), "x": payload}, {"state_dict": small(), "args": payload}, [payload], payload):
            for number in range(3):
                if number == 2:
                    path.write_bytes(pickle.dumps(content, protocol=2))
                else:
                    torch.save(content, path, _use_new_zipfile_serialization=number == 0)
                with pytest.raises(ValueError, match="must be a readable torch checkpoint of tensors alone"):
                    load_official(path)
                assert not mark.exists()


def test_folders_of_shards(tmp_path):
    """An index that leads out of its folder, or does not agree with its shards, is refused."""
    state, index = small(), tmp_path / "model.safetensors.index.json"
    names = list(state)
    shards = {"a.safetensors": names[:30], "b.safetensors": names[30:]}
    for shard, part in shards.items():
        safetensors.torch.save_file({name: state[name] for name in part}, tmp_path / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same(official_state_dict(load_official(tmp_path)), state)
    for change, message in (
        ({names[0]: "../secret.safetensors"}, "must name files beside it, got '../secret.safetensors'"),
        ({names[0]: "c.safetensors"}, "c.safetensors"),
        ({"stranger": "a.safetensors"}, "must list the tensors of its shards, got other ones for ['stranger']"),
    ):
        index.write_text(json.dumps({"weight_map": {**weight_map, **change}}))
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
            load_official(tmp_path)
    for text in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="must be an index of shards"):
            load_official(tmp_path)
