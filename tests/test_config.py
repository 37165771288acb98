"""The settings: presets, every rule with its message, and the transformers classes that come from them."""

import dataclasses
import inspect
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import vlmo_fast
from vlmo_fast.config import EXPERTS, MODALITIES, POSITIVE, PRESETS, MoMEConfig, describe_fields, setting

ROOT = Path(__file__).resolve().parents[1]

COUNTS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size"),
    *("num_channels", "vocab_size", "max_text_length", "num_image_types", "text_relative_span"),
)
NUMBERS = (
    *("layer_scale_init_value", "hidden_dropout", "text_embedding_dropout", "drop_path_rate", "layer_norm_eps"),
    *("text_layer_norm_eps", "initializer_range", "logit_scale_init_value"),
)
FIELDS = {field.name: field for field in dataclasses.fields(MoMEConfig)}


def described(cls):
    """The fields that a class's docstring explains."""
    text = inspect.getdoc(cls).partition("Attributes:")[2].partition("Raises:")[0]
    return re.findall(r"^    (\w+): \S", text, re.MULTILINE)


def test_every_field_is_covered_here():
    assert set(FIELDS) == {*COUNTS, *NUMBERS, "num_vl_layers", "position_embedding_type", "stem_patch_size"}


def test_modalities_and_experts():
    assert EXPERTS == (*MODALITIES, "vl") == ("language", "vision", "vl")


def test_every_field_is_documented():
    assert [name for name in FIELDS if name not in described(MoMEConfig)] == []


# The presets of the release: layers, width, heads, vl layers, positions, layer scale, and what follows from them.
@pytest.mark.parametrize(
    ("preset", "layers", "width", "heads", "vl_layers", "positions", "layer_scale", "head_dim", "first_vl_layer"),
    [
        ("base", 12, 768, 12, 2, "relative", 0.1, 64, 10),
        ("base_plus", 24, 544, 16, 3, "absolute", None, 34, 21),
        ("large", 24, 1024, 16, 3, "relative", 0.1, 64, 21),
    ],
)
def test_presets(preset, layers, width, heads, vl_layers, positions, layer_scale, head_dim, first_vl_layer):
    for config in (MoMEConfig.from_preset(preset), vlmo_fast.VLMoConfig.from_preset(preset).mome):
        assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (layers, width, heads)
        assert (config.num_vl_layers, config.position_embedding_type) == (vl_layers, positions)
        assert config.layer_scale_init_value == layer_scale
        assert (config.head_dim, config.first_vl_layer, config.intermediate_size) == (
            head_dim,
            first_vl_layer,
            4 * width,
        )
        assert (config.image_size, config.patch_size, config.window_size, config.num_image_tokens) == (224, 16, 14, 197)
        assert (config.vocab_size, config.max_text_length, config.text_relative_span) == (30522, 40, 196)


def test_defaults_are_the_base_model():
    assert MoMEConfig() == MoMEConfig.from_preset("base")
    assert set(PRESETS) == {"base", "base_plus", "large"}


def test_released_constants():
    """As released: norm epsilons 1e-6 and 1e-12, logit scale log(1 / 0.07), no dropout."""
    config = MoMEConfig()
    assert (config.layer_norm_eps, config.text_layer_norm_eps) == (1e-6, 1e-12)
    assert config.logit_scale_init_value == math.log(1 / 0.07)
    assert config.hidden_dropout == config.text_embedding_dropout == config.drop_path_rate == 0
    assert config.initializer_range == 0.02


def test_overrides():
    config = MoMEConfig.from_preset("large", image_size=384, num_vl_layers=0, intermediate_size=100)
    assert (config.window_size, config.num_image_tokens, config.first_vl_layer) == (24, 577, 24)
    assert (config.hidden_size, config.intermediate_size) == (1024, 100)
    wider = MoMEConfig.from_preset("base", hidden_size=96)
    assert wider.intermediate_size == 384


def test_presets_are_not_shared_state():
    MoMEConfig.from_preset("base", hidden_size=96)
    assert PRESETS["base"]["hidden_size"] == 768


def test_intermediate_size_stays_when_replaced():
    """`dataclasses.replace` hands the resolved size over; a new width needs a new inner width too."""
    assert dataclasses.replace(MoMEConfig(), hidden_size=96).intermediate_size == 3072
    assert dataclasses.replace(MoMEConfig(), hidden_size=96, intermediate_size=None).intermediate_size == 384


def test_unknown_preset_and_override():
    with pytest.raises(ValueError, match=r"name must be one of \['base', 'base_plus', 'large'\], got 'huge'"):
        MoMEConfig.from_preset("huge")
    with pytest.raises(ValueError, match=r"name must be one of \['base', 'base_plus', 'large'\], got 'huge'"):
        vlmo_fast.VLMoConfig.from_preset("huge")
    with pytest.raises(TypeError, match=r"overrides must be fields of MoMEConfig, got \['heads', 'layers'\]"):
        MoMEConfig.from_preset("base", layers=3, heads=4)


def test_frozen_and_hashable():
    config = MoMEConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 3
    assert len({config, MoMEConfig(), MoMEConfig(image_size=32)}) == 2


@pytest.mark.parametrize("name", [*COUNTS, "num_vl_layers"])
def test_counts(name):
    minimum = 0 if name == "num_vl_layers" else 1
    with pytest.raises(ValueError, match=rf"^MoMEConfig: {name} must be at least {minimum}, got {minimum - 1}$"):
        MoMEConfig(**{name: minimum - 1})
    for wrong in (2.0, "2", True, [2]):
        with pytest.raises(TypeError, match=rf"^MoMEConfig: {name} must be an int, got {wrong!r}".replace("[", r"\[")):
            MoMEConfig(**{name: wrong})
    if name != "intermediate_size":
        with pytest.raises(TypeError, match=rf"{name} must be an int, got None"):
            MoMEConfig(**{name: None})


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name):
    for wrong in ("0.1", True, [0.1]):
        with pytest.raises(TypeError, match=rf"^MoMEConfig: {name} must be a number, got "):
            MoMEConfig(**{name: wrong})
    for wrong in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match=rf"^MoMEConfig: {name} must be finite, got {wrong}"):
            MoMEConfig(**{name: wrong})
    if name != "layer_scale_init_value":
        with pytest.raises(TypeError, match=rf"{name} must be a number, got None"):
            MoMEConfig(**{name: None})
    assert getattr(MoMEConfig(**{name: 0}), name) == 0


@pytest.mark.parametrize("name", ["hidden_dropout", "text_embedding_dropout", "drop_path_rate"])
def test_rates(name):
    for wrong in (-0.1, 1, 1.0, 2.5):
        with pytest.raises(ValueError, match=rf"^MoMEConfig: {name} must be in \[0, 1\), got {wrong}$"):
            MoMEConfig(**{name: wrong})
    assert getattr(MoMEConfig(**{name: 0.999}), name) == 0.999


@pytest.mark.parametrize("name", ["layer_norm_eps", "text_layer_norm_eps", "initializer_range"])
def test_not_negative(name):
    with pytest.raises(ValueError, match=rf"^MoMEConfig: {name} must not be negative, got -1e-06$"):
        MoMEConfig(**{name: -1e-6})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"position_embedding_type": "rotary"},
            "position_embedding_type must be 'relative' or 'absolute', got 'rotary'",
        ),
        ({"position_embedding_type": None}, "position_embedding_type must be 'relative' or 'absolute', got None"),
        ({"hidden_size": 770}, "hidden_size must be a multiple of num_attention_heads=12, got 770"),
        ({"stem_patch_size": 3}, "stem_patch_size must divide patch_size=16, got 3"),
        ({"stem_patch_size": 0}, "stem_patch_size must divide patch_size=16, got 0"),
        ({"image_size": 225}, "image_size must be a multiple of patch_size=16, got 225"),
        ({"num_vl_layers": 13}, "num_vl_layers must be at most num_hidden_layers=12, got 13"),
        (
            {"max_text_length": 197},
            "max_text_length must be at most text_relative_span=196 with relative positions, got 197",
        ),
    ],
)
@pytest.mark.parametrize("make", [MoMEConfig, vlmo_fast.VLMoConfig], ids=["MoMEConfig", "VLMoConfig"])
def test_fields_that_disagree(make, fields, message):
    """Both configurations refuse at construction, with the same words."""
    with pytest.raises(ValueError, match=f"^MoMEConfig: {message}$"):
        make(**fields)


def test_edges_are_allowed():
    assert MoMEConfig(num_vl_layers=12).first_vl_layer == 0
    assert MoMEConfig(num_vl_layers=0).first_vl_layer == 12
    assert MoMEConfig(max_text_length=196).max_text_length == 196
    assert MoMEConfig(max_text_length=512, position_embedding_type="absolute").max_text_length == 512
    assert MoMEConfig(image_size=16).num_image_tokens == 2


def test_transformers_configuration_has_the_fields():
    """Same names in the same order, same annotations, same defaults, same words; what VLMoConfig adds is listed."""
    of_transformers = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    theirs = {f.name: f for f in dataclasses.fields(vlmo_fast.VLMoConfig) if f.name not in of_transformers}
    assert list(theirs) == [*FIELDS, "image_vocab_size", "mlm_loss_weight", "has_itm_head"]
    parameters = inspect.signature(vlmo_fast.VLMoConfig).parameters
    for name, field in FIELDS.items():
        assert (theirs[name].type, theirs[name].default) == (field.type, field.default), name
        assert (parameters[name].annotation, parameters[name].default) == (field.type, field.default), name
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY, name
        assert getattr(vlmo_fast.VLMoConfig, name) == field.default, name
        assert type(getattr(vlmo_fast.VLMoConfig, name)) is type(field.default), name
    assert set(described(MoMEConfig)) == set(FIELDS)
    assert set(described(vlmo_fast.VLMoConfig)) == set(theirs)
    assert vlmo_fast.VLMoConfig().mome == MoMEConfig()


def test_a_field_of_a_subclass_is_checked():
    """By its annotation, and by its rule where it has one."""

    @describe_fields
    @dataclasses.dataclass(frozen=True)
    class Hearing(MoMEConfig):
        """Settings of a network that hears.

        Attributes:
            {fields}
        """

        num_mel_bins: int = setting(80, "bins of a spectrogram.", POSITIVE)
        sound_dropout: float | None = 0.0

    assert Hearing(num_mel_bins=1, sound_dropout=None).hidden_size == 768
    assert "num_mel_bins" in described(Hearing)
    for fields, error, message in (
        ({"num_mel_bins": 0}, ValueError, "num_mel_bins must be at least 1, got 0"),
        ({"num_mel_bins": None}, TypeError, "num_mel_bins must be an int, got None"),
        ({"sound_dropout": "none"}, TypeError, "sound_dropout must be a number, got 'none'"),
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
    ):
        with pytest.raises(error, match=f"^MoMEConfig: {message}$"):
            Hearing(**fields)


def test_a_field_is_one_line(tmp_path):
    """A line more in `config.py` and one in `outputs.py`: transformers' classes have the fields, files keep them."""
    code = r"""
import importlib.util, inspect, sys

def with_line(name, after, line):
    spec = importlib.util.find_spec(name)
    source = spec.loader.get_source(name)
    assert source.count(after) == 1
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    exec(compile(source.replace(after, after + line), spec.origin, "exec"), module.__dict__)

num_channels = "    num_channels: int = setting(3, \"channels of the image.\", POSITIVE)\n"
with_line("vlmo_fast.config", num_channels, "    num_mel_bins: int = setting(80, 'bins of a sound.', POSITIVE)\n")
vl_states = "    vl_hidden_states: tuple[Tensor, ...] | None = None\n"
with_line("vlmo_fast.outputs", vl_states, "    sound: Tensor | None = None\n")

import torch
from vlmo_fast import VLMoConfig, VLMoModel
from vlmo_fast.hf.modeling import VLMoModelOutput

parameter = inspect.signature(VLMoConfig).parameters["num_mel_bins"]
assert (parameter.annotation, parameter.default) == ("int", 80)
assert "    num_mel_bins: bins of a sound.\n" in inspect.getdoc(VLMoConfig)
try:
    VLMoConfig(num_mel_bins=0)
except ValueError as error:
    assert str(error) == "MoMEConfig: num_mel_bins must be at least 1, got 0"
else:
    raise AssertionError
small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_vl_layers=0, image_size=16, vocab_size=9)
model = VLMoModel(VLMoConfig(num_mel_bins=64, **small))
model.save_pretrained(FOLDER)
again = VLMoModel.from_pretrained(FOLDER)
assert again.config.num_mel_bins == again.backbone.config.num_mel_bins == 64

assert inspect.signature(VLMoModelOutput).parameters["sound"].default is None
again.backbone.register_forward_hook(lambda module, inputs, output: output._replace(sound=torch.ones(2)))
output = again(torch.tensor([[1, 2]]))
assert type(output) is VLMoModelOutput
assert output.sound is output["sound"] is output.to_tuple()[-1]
assert torch.utils._pytree.tree_map(lambda x: x + 1, output).sound.tolist() == [2, 2]
"""
    subprocess.run([sys.executable, "-c", f"FOLDER = {str(tmp_path)!r}\n{code}"], cwd=ROOT, check=True)


def test_type_checkers_see_the_fields(tmp_path):
    """What mypy makes of both classes that come from others, and of names that the package imports late."""
    lines = {
        "reveal_type(vlmo_fast.VLMoConfig(hidden_size=64, num_labels=3).hidden_size)": '"int"',
        "reveal_type(vlmo_fast.VLMoConfig().layer_scale_init_value)": '"float | None"',
        "reveal_type(vlmo_fast.VLMoConfig().has_itm_head)": '"bool"',
        "reveal_type(vlmo_fast.VLMoConfig().mome)": '"vlmo_fast.config.MoMEConfig"',
        "reveal_type(VLMoModelOutput(last_hidden_state=states).hidden_states)": '"tuple[Any, ...] | None"',
        "reveal_type(vlmo_fast.pack([3]))": '"vlmo_fast.packing.PackedLayout"',
        "reveal_type(vlmo_fast.ops.implementations('attention'))": '"tuple[str, ...]"',
        "vlmo_fast.MoMEConfig(no_such_field=3)": 'Unexpected keyword argument "no_such_field"',
        "vlmo_fast.no_such_name": 'Module has no attribute "no_such_name"',
    }
    head = "from typing import Any\nimport vlmo_fast\nfrom vlmo_fast.hf.modeling import VLMoModelOutput\nstates: Any\n"
    (tmp_path / "user.py").write_text(head + "\n".join(lines))
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nfollow_imports = silent\n"
        "[mypy-torch.*,transformers.*,numpy.*,PIL.*,triton.*]\nfollow_imports = skip\nignore_missing_imports = true\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", ".cache", "user.py"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("user.py:")]
    assert len(said) == len(lines), done.stdout + done.stderr
    for number, (line, (code, wanted)) in enumerate(zip(said, lines.items(), strict=True), 1 + head.count("\n")):
        assert line.startswith(f"user.py:{number}: "), code
        assert wanted in line, code


# A value other than the default for each field, valid together.
OTHER = {
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "intermediate_size": 100,
    "num_vl_layers": 1,
    "image_size": 60,
    "patch_size": 20,
    "stem_patch_size": 5,
    "num_channels": 4,
    "vocab_size": 99,
    "max_text_length": 13,
    "num_image_types": 2,
    "position_embedding_type": "absolute",
    "text_relative_span": 17,
    "layer_scale_init_value": None,
    "hidden_dropout": 0.1,
    "text_embedding_dropout": 0.2,
    "drop_path_rate": 0.3,
    "layer_norm_eps": 1e-5,
    "text_layer_norm_eps": 1e-7,
    "initializer_range": 0.5,
    "logit_scale_init_value": 1.5,
}


def test_every_field_passes_through(tmp_path):
    """Each field, off its default, reaches the backbone's configuration and survives JSON, in memory and in a file."""
    assert all(OTHER[name] != field.default for name, field in FIELDS.items())
    config = vlmo_fast.VLMoConfig(**OTHER, num_labels=7, image_vocab_size=11, mlm_loss_weight=0.5, has_itm_head=False)
    assert dataclasses.asdict(config.mome) == OTHER
    config.save_pretrained(tmp_path)
    for back in (
        vlmo_fast.VLMoConfig.from_dict(config.to_dict()),
        vlmo_fast.VLMoConfig.from_json_file(tmp_path / "config.json"),
        vlmo_fast.VLMoConfig.from_pretrained(tmp_path),
    ):
        assert back.mome == config.mome
        assert (back.num_labels, back.image_vocab_size, back.mlm_loss_weight, back.has_itm_head) == (7, 11, 0.5, False)
        assert back.model_type == "vlmo"


def test_json_round_trip_of_the_defaults():
    config = vlmo_fast.VLMoConfig()
    assert vlmo_fast.VLMoConfig.from_dict(config.to_dict()).mome == MoMEConfig()
    assert config.intermediate_size == 3072  # resolved, so that the saved file tells the size


def test_a_bad_file_is_refused(tmp_path):
    config = vlmo_fast.VLMoConfig()
    config.image_size = 225  # transformers' configurations are mutable; the check comes again when it is read
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size=16, got 225"):
        vlmo_fast.VLMoConfig.from_pretrained(tmp_path)
