"""Captured inference: results are the module's, in memory of their own, one recording a shape."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vlmo_fast import MoMEConfig, MoMETransformer, pack
from vlmo_fast.rows import plan_padded
from vlmo_fast.serving import Captured, graphs

CONFIG = MoMEConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_vl_layers=1, image_size=32, vocab_size=50
)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, twice: bool = False) -> dict[str, Tensor]:
        return {"y": self.weight * x * (2 if twice else 1)}


class FakeRecording(graphs._Recording):
    """As the real one, but for the graph: its replay calls the module on the buffers, and fills the same results."""

    made = 0

    def __init__(self, function: Callable[..., Any], inputs: Mapping[str, Any], num_warmups: int) -> None:
        FakeRecording.made += 1
        self.buffers = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        self.results = function(**self.buffers)
        self.graph = SimpleNamespace(replay=lambda: self._fill(function(**self.buffers)))

    def _fill(self, results: Any) -> None:
        for mine, new in zip(tree_leaves(self.results), tree_leaves(results), strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(new)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[FakeRecording]:
    monkeypatch.setattr(graphs, "_Recording", FakeRecording)
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


def test_the_model_offers_it(recorded: type[FakeRecording]) -> None:
    """An image, a text and a pair are a recording each, whatever their numbers; other calls are as the model's."""
    model = MoMETransformer(CONFIG).eval()
    encode = model.captured(max_graphs=3)
    for _ in range(2):
        ids, pixels = torch.randint(1, 50, (1, 5)), torch.randn(1, 3, 32, 32)
        for inputs in ({"pixel_values": pixels}, {"input_ids": ids}, {"input_ids": ids, "pixel_values": pixels}):
            with torch.no_grad():
                expected = model(**inputs, cls_only=True)
            for ours, wanted in zip(encode(**inputs, cls_only=True), expected, strict=True):
                assert (ours is None) == (wanted is None)
                assert wanted is None or torch.equal(ours, wanted)
    assert recorded.made == encode.num_graphs == 3
    with pytest.raises(ValueError, match=r"Captured: module must be in evaluation mode .*, got training=True"):
        model.train().captured()(pixel_values=torch.ones(1, 3, 32, 32))


def test_a_packed_layout_is_recorded_once(recorded: type[FakeRecording]) -> None:
    model = MoMETransformer(CONFIG).eval()
    encode = model.captured(packed=True)
    layout = pack([5, 3], [2], texts=[1], pairs=[(0, 0)])
    for _ in range(2):
        ids, pixels = torch.randint(1, 50, (2, 5)), torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            expected = model.forward_packed(layout, ids, pixels)
        found = encode(layout=layout, input_ids=ids, pixel_values=pixels)
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(found.pooler_output, expected.pooler_output)
    assert recorded.made == 1
    with pytest.raises(TypeError, match="Captured: pixel_values must be a tensor or hashable, got tuple"):
        encode(layout=layout, input_ids=ids, pixel_values=(pixels,))


def test_a_recording_takes_no_bias_that_may_go() -> None:
    """What a CPU keeps is dropped some day: a graph would go on reading its memory, and miss a changed table.

    So nothing is kept where values cannot be looked at for free, on any GPU.
    """
    model = MoMETransformer(CONFIG).eval()
    meta = MoMETransformer(CONFIG).eval().to("meta")
    with torch.no_grad():
        for each, keeps in ((model, True), (meta, False)):
            plan = plan_padded(1, 5, (2,), None, cls_only=False)
            assert (each._biases(plan) is each._biases(plan)) is keeps


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
@pytest.mark.parametrize("backends", [{}, {"mome_ffn": "triton"}], ids=["auto", "triton"])
def test_the_network_on_a_gpu(backends: dict[str, str], dtype: torch.dtype) -> None:
    """An image, texts of two lengths and a pair, each twice, in turn: as the model gives them, to the bit."""
    model = MoMETransformer(CONFIG).to("cuda", dtype).eval()
    for op, name in backends.items():
        model.set_backend(op, name)
    encode = model.captured()
    for _ in range(2):
        for num_text, has_image in ((0, True), (5, False), (9, False), (5, True)):
            inputs = {"input_ids": torch.randint(1, 50, (1, num_text), device="cuda")} if num_text else {}
            if has_image:
                inputs["pixel_values"] = torch.randn(1, 3, 32, 32, device="cuda", dtype=dtype)
            with torch.no_grad():
                expected = model(**inputs).last_hidden_state
            assert torch.equal(encode(**inputs).last_hidden_state, expected)
    assert encode.num_graphs == 4


@pytest.mark.gpu
def test_a_packed_batch_on_a_gpu() -> None:
    """Kernels in Triton plan nothing at run time; the table is changed in place between two replays."""
    model = MoMETransformer(CONFIG).to("cuda", torch.bfloat16).eval()
    for op in ("packed_attention", "mome_ffn"):
        model.set_backend(op, "triton")
    encode = model.captured(packed=True)
    layout = pack([5, 9, 3], [2, 2], texts=[1], images=[0, 1], pairs=[(0, 0), (2, 1)], device="cuda")
    for step in range(3):
        with torch.no_grad():
            model.relative_position_bias.table.normal_(std=0.1 * step)
            ids, pixels = torch.randint(1, 50, (3, 9)), torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
            inputs = {"layout": layout, "input_ids": ids.cuda(), "pixel_values": pixels.cuda()}
            expected = model.forward_packed(**inputs).last_hidden_state
        assert torch.equal(encode(**inputs).last_hidden_state, expected)
    assert encode.num_graphs == 1
