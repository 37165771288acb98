"""Captured inference: results are the module's, in memory of their own, one recording a shape."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlmo_fast import MoMEConfig, MoMETransformer, serving
from vlmo_fast.serving import Captured

CONFIG = MoMEConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_vl_layers=1, image_size=32, vocab_size=50
)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, twice: bool = False) -> dict[str, Tensor]:
        return {"y": self.weight * x * (2 if twice else 1)}


class FakeRecording(serving._Recording):
    """As the real one, but for the graph: its replay calls the module on the buffers, and fills the same results."""

    made = 0

    def __init__(self, module: nn.Module, inputs: Mapping[str, Any], num_warmups: int) -> None:
        FakeRecording.made += 1
        self.buffers = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        self.results = module(**self.buffers)
        self.graph = SimpleNamespace(replay=lambda: self.results["y"].copy_(module(**self.buffers)["y"]))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[FakeRecording]:
    monkeypatch.setattr(serving, "_Recording", FakeRecording)
    monkeypatch.setattr(Captured, "_records", lambda self, device: True)
    FakeRecording.made = 0
    return FakeRecording


def test_a_cpu_just_calls_the_module() -> None:
    model = MoMETransformer(CONFIG).eval()
    encode = Captured(model)
    pixels = torch.randn(1, 3, 32, 32)
    result = encode(pixel_values=pixels)
    assert torch.equal(result.image_embeds, model(pixel_values=pixels).image_embeds)
    assert not result.image_embeds.requires_grad
    assert encode.num_graphs == 0


def test_one_recording_a_shape_and_option(recorded: type[FakeRecording]) -> None:
    encode = Captured(Scale().eval())
    for _ in range(3):
        for size in (2, 3):
            for twice in (False, True):
                x = torch.randn(size)
                assert torch.equal(encode(x=x, twice=twice)["y"], x * (4 if twice else 2))
    assert recorded.made == encode.num_graphs == 4
    encode(x=torch.ones(2, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        encode(x=torch.ones(2))
    assert recorded.made == 6


def test_results_are_not_overwritten_and_inputs_not_kept(recorded: type[FakeRecording]) -> None:
    encode = Captured(Scale().eval())
    x = torch.ones(2)
    first = encode(x=x)["y"]
    second = encode(x=3 * x)["y"]
    assert (first.tolist(), second.tolist()) == ([2, 2], [6, 6])
    assert torch.equal(x, torch.ones(2))


def test_changed_parameters_are_seen(recorded: type[FakeRecording]) -> None:
    module = Scale().eval()
    encode = Captured(module)
    encode(x=torch.ones(2))
    with torch.no_grad():
        module.weight.fill_(5)
    assert encode(x=torch.ones(2))["y"].tolist() == [5, 5]
    assert recorded.made == 1
    encode.reset()
    encode(x=torch.ones(2))
    assert recorded.made == 2


def test_the_least_recently_used_goes(recorded: type[FakeRecording]) -> None:
    encode = Captured(Scale().eval(), max_graphs=2)
    for size in (1, 2, 1, 3, 1):  # 3 replaces 2, not 1
        encode(x=torch.ones(size))
    assert (recorded.made, encode.num_graphs) == (3, 2)
    encode(x=torch.ones(2))
    assert recorded.made == 4


def test_refusals() -> None:
    module = Scale()
    with pytest.raises(ValueError, match=r"Captured: module must be in evaluation mode .*, got training=True"):
        Captured(module)(x=torch.ones(2))
    encode = Captured(module.eval())
    with pytest.raises(ValueError, match="Captured: x must be on the module's device cpu, got meta"):
        encode(x=torch.ones(2, device="meta"))
    with pytest.raises(TypeError, match="Captured: twice must be a tensor or hashable, got list"):
        encode(x=torch.ones(2), twice=[])
    for options in ({"max_graphs": 0}, {"num_warmups": 0}):
        with pytest.raises(ValueError, match="Captured: max_graphs and num_warmups must be at least 1"):
            Captured(module, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_network_on_a_gpu(dtype: torch.dtype) -> None:
    """An image, texts of two lengths and a pair, each twice, in turn: as the model gives them, to the bit."""
    model = MoMETransformer(CONFIG).to("cuda", dtype).eval()
    encode = Captured(model)
    for _ in range(2):
        for num_text, has_image in ((0, True), (5, False), (9, False), (5, True)):
            inputs = {"input_ids": torch.randint(1, 50, (1, num_text), device="cuda")} if num_text else {}
            if has_image:
                inputs["pixel_values"] = torch.randn(1, 3, 32, 32, device="cuda", dtype=dtype)
            with torch.no_grad():
                expected = model(**inputs).last_hidden_state
            assert torch.equal(encode(**inputs).last_hidden_state, expected)
    assert encode.num_graphs == 4
