"""Encoders as whole graphs: few compilations over many batches, programs for any batch and length, packages."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import vlmo_fast
from vlmo_fast import MoMEConfig, MoMETransformer, ops
from vlmo_fast.export import export_encoder, package_encoder, without_custom_ops
from vlmo_fast.nn import ExpertFeedForward

pytestmark = pytest.mark.usefixtures("cpu_extension")  # what is exported has its ops

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_vl_layers": 1,
    "image_size": 16,
    "patch_size": 8,
    "vocab_size": 50,
    "max_text_length": 12,
    "text_relative_span": 12,
}
OUTPUTS = {"image": "image_embeds", "text": "text_embeds", "pair": "pooler_output"}
encoders = pytest.mark.parametrize("encoder", OUTPUTS)
cases = pytest.mark.parametrize(  # a graph takes seconds: the less common positions in their most complex use alone
    ("positions", "encoder"), [("relative", "image"), ("relative", "text"), ("relative", "pair"), ("absolute", "pair")]
)


def build(positions: str = "relative", **options) -> MoMETransformer:
    """A model all of whose parameters matter."""
    layer_scale = 0.5 if positions == "relative" else None
    config = MoMEConfig(
        **{**SIZES, "position_embedding_type": positions, "layer_scale_init_value": layer_scale, **options}
    )
    model = MoMETransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def arguments(encoder: str, batch: int = 3, length: int = 7) -> dict[str, torch.Tensor]:
    mask = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1))).long()
    every = {
        "input_ids": torch.randint(0, 50, (batch, length)),
        "attention_mask": mask,
        "pixel_values": torch.randn(batch, 3, 16, 16),
    }
    names = {"image": ["pixel_values"], "text": ["input_ids", "attention_mask"], "pair": list(every)}[encoder]
    return {name: every[name] for name in names}


def custom_ops(program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "vlmo_fast" in str(node.target)]


BATCHES = [(3, 7), (1, 12), (5, 2), (2, 9), (8, 3), (3, 12)]


@cases
def test_few_compilations_over_many_batches(positions, encoder):
    """Fullgraph; after the first batch at most two more graphs: dynamic sizes, and a batch of one."""
    torch._dynamo.reset()
    model, counter = build(positions), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch, length in BATCHES:
        inputs = arguments(encoder, batch, length)
        output = getattr(compiled(**inputs, cls_only=True), OUTPUTS[encoder])
        torch.testing.assert_close(output, getattr(model(**inputs, cls_only=True), OUTPUTS[encoder]))
    assert counter.frame_count <= 3


def test_few_compilations_of_training():
    """Forward and backward, without an attention mask on some batches."""
    torch._dynamo.reset()
    model = build().train()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch, length in BATCHES:
        compiled(**arguments("pair", batch, length)).pooler_output.sum().backward()
    assert counter.frame_count <= 3


@cases
def test_programs_take_any_batch_and_length(positions, encoder, tmp_path):
    """Saved and loaded, for sizes other than those it was traced with, the ends of the ranges among them."""
    model = build(positions)
    exported = export_encoder(model, encoder, max_batch_size=64)
    assert not custom_ops(exported)
    torch.export.save(exported, tmp_path / "encoder.pt2")
    program = torch.export.load(tmp_path / "encoder.pt2").module()
    for batch, length in [(1, 2), (1, 12), (64, 3), (5, 7)]:
        inputs = arguments(encoder, batch, length)
        wanted = getattr(model(**inputs), OUTPUTS[encoder])
        torch.testing.assert_close(program(*inputs.values()), wanted)
    with pytest.raises((AssertionError, RuntimeError)):
        program(*arguments(encoder, 65, 3).values())


def test_custom_ops_become_torchs_own():
    """Each group's size may be dynamic; the result runs where the ops are not."""
    ffn = ExpertFeedForward(8, ("language", "vision"), layer_scale_init_value=0.5).eval()

    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = ffn

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.ffn(x, (("language", 3), ("vision", 2)))

    x, batch = torch.randn(4, 5, 8), torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(Pair(), (x,), dynamic_shapes=({0: batch},), strict=True)
    assert custom_ops(program)
    program = without_custom_ops(program)
    assert not custom_ops(program)
    for size in (1, 4, 9):
        x = torch.randn(size, 5, 8)
        torch.testing.assert_close(program.module()(x), Pair()(x))


def test_attention_becomes_torchs_own():
    """As the model uses it: what follows reads the result as it lies in memory."""

    class Layer(torch.nn.Module):
        def forward(self, qkv: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            query, key, value = (x.transpose(1, 2) for x in qkv.unbind(2))
            return ops.attention(query, key, value, bias, mask, backend="cpu").transpose(1, 2).flatten(0, 1)

    def inputs(number: int) -> tuple[torch.Tensor, ...]:
        mask = torch.rand(number, 5) > 0.3
        mask[:, 0] = True
        return torch.randn(number, 5, 3, 2, 4), torch.randn(2, 5, 5), mask

    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(Layer(), inputs(4), dynamic_shapes=({0: batch}, None, {0: batch}), strict=True)
    assert custom_ops(program)
    program = without_custom_ops(program)
    assert not custom_ops(program)
    for number in (1, 4, 9):
        given = inputs(number)
        torch.testing.assert_close(program.module()(*given), Layer()(*given))


def test_export_takes_heads_and_leaves_the_model_as_it_was():
    model = vlmo_fast.VLMoForImageTextRetrieval(vlmo_fast.VLMoConfig(**SIZES)).train()
    before = copy.deepcopy(model.state_dict())
    inputs = arguments("image")
    program = export_encoder(model, "image").module()
    assert model.training
    assert model.backbone.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    torch.testing.assert_close(program(*inputs.values()), model.eval()(torch.ones(1, 3).long(), **inputs).image_embeds)


def test_export_refuses():
    with pytest.raises(ValueError, match=r"encoder must be one of \['image', 'pair', 'text'\], got 'x'"):
        export_encoder(build(), "x")
    with pytest.raises(ValueError, match=r"model must be a MoMETransformer or hold one as \.backbone, got Linear"):
        export_encoder(torch.nn.Linear(2, 2), "image")
    bare = MoMETransformer(MoMEConfig(**SIZES), add_pooler=False, add_projections=False)
    for encoder in OUTPUTS:
        with pytest.raises(ValueError, match=f"must have the head of the {encoder} encoder, got one without"):
            export_encoder(bare, encoder)
    with pytest.raises(ValueError, match=r"path must end in \.pt2, got encoder\.so"):
        package_encoder(build(), "image", "encoder.so")


@pytest.mark.slow
@encoders
def test_packages(encoder, tmp_path, require_tool):
    """Compiled ahead of time by AOTInductor, loaded, and run on other sizes."""
    require_tool("g++")
    model = build()
    path = package_encoder(model, encoder, tmp_path / "encoder.pt2", max_batch_size=64)
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.pt2"]
    program = torch._inductor.aoti_load_package(str(path))
    for batch, length in [(1, 2), (5, 7), (64, 12)]:
        inputs = arguments(encoder, batch, length)
        wanted = getattr(model(**inputs), OUTPUTS[encoder])
        torch.testing.assert_close(program(*inputs.values()), wanted, rtol=1e-4, atol=1e-5)
