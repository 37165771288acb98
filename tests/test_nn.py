"""Building blocks in other people's models: against the definition in float64, and in a stranger's ViT."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vlmo_fast import MoMEConfig, MoMETransformer
from vlmo_fast.nn import ContrastiveLoss, ExpertBlock, ExpertFeedForward, RelativeAttention
from vlmo_fast.positions import relative_position_index


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[1] / "examples" / "vit_with_experts.py"
    spec = importlib.util.spec_from_file_location("vit_with_experts", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def drawn(module: nn.Module) -> nn.Module:
    """All parameters away from their simple initial values; float64."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module.double()


# Experts


@pytest.mark.parametrize("shape", [(2, 9), (9,), (2, 3, 9)])
@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_experts_by_hand(shape, layer_scale):
    """Each token through its own expert, whatever the leading axes; a group may be empty or come twice."""
    names = ("language", "vision", "vl")
    ffn = drawn(ExpertFeedForward(8, names, intermediate_size=12, layer_scale_init_value=layer_scale))
    groups = (("vision", 4), ("vl", 0), ("language", 3), ("vision", 2))
    x = torch.randn(*shape, 8, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(shape, dtype=torch.float64)
    order = [name for name, count in groups for _ in range(count)]
    tokens = []
    for position, name in enumerate(order):
        e, token = ffn.experts[name], x[..., position, :]
        inner = F.linear(F.layer_norm(token, (8,), e.norm.weight, e.norm.bias, 1e-6), e.fc1.weight, e.fc1.bias)
        branch = F.linear(0.5 * inner * (1 + torch.erf(inner / math.sqrt(2))), e.fc2.weight, e.fc2.bias)
        branch = branch if layer_scale is None else ffn.layer_scale * branch
        tokens.append(token + scale[..., position, None] * branch)
    wanted = torch.stack(tokens, dim=-2)
    actual = ffn(x, groups, scale)
    torch.testing.assert_close(actual, wanted)
    used = [p for name, p in ffn.named_parameters() if ".vl." not in name]
    weight = torch.randn_like(wanted)
    for ours, theirs in zip(*(torch.autograd.grad(y, [x, *used], weight) for y in (actual, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_experts_begin_as_the_networks_do():
    ffn = ExpertFeedForward(64)
    for expert in ffn.experts.values():
        assert expert.fc1.weight.shape == (256, 64)
        assert expert.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert (expert.fc1.bias == 0).all()
    assert ffn.layer_scale is None


def test_experts_from_a_dense_network():
    """To the dtype of the weights, the norm's epsilon included."""
    norm, fc1, fc2 = nn.LayerNorm(8, eps=1e-3), nn.Linear(8, 20), nn.Linear(20, 8)
    for module in (norm, fc1, fc2):
        drawn(module)
    ffn = ExpertFeedForward.from_dense(norm, fc1, fc2, ("a", "b"))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(ffn(x, (("a", 2), ("b", 3))), x + fc2(F.gelu(fc1(norm(x)))))
    assert len({id(parameter) for parameter in ffn.parameters()}) == 12  # none is shared
    with pytest.raises(ValueError, match=r"must be over D, D to F and F to D, got .* 8 to 20 and 21 to 8"):
        ExpertFeedForward.from_dense(norm, fc1, nn.Linear(21, 8))


def test_experts_refuse():
    ffn = ExpertFeedForward(8)
    with pytest.raises(ValueError, match=r"groups must add up to the 5 tokens of x, got \[2, 2\]"):
        ffn(torch.ones(2, 5, 8), (("vision", 2), ("vl", 2)))
    with pytest.raises(ValueError, match=r"groups must name experts among \['language', 'vision', 'vl'\], got 'audio'"):
        ffn(torch.ones(2, 5, 8), (("audio", 5),))


# Attention


@pytest.mark.parametrize(("num_text", "with_image"), [(0, True), (4, False), (4, True)])
def test_attention_by_hand(num_text, with_image):
    """Images, texts, and both joined; padded texts; a bias that matters."""
    module = drawn(RelativeAttention(12, 3, window_size=2, text_span=6))
    tokens = num_text + (5 if with_image else 0)
    x = torch.randn(2, tokens, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    if num_text:
        mask[1, 2:num_text] = False
    a = module.attention
    projected = F.linear(x, a.qkv.weight, torch.cat([a.q_bias, torch.zeros_like(a.q_bias), a.v_bias]))
    query, key, value = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in projected.chunk(3, dim=-1))
    index = relative_position_index(num_text, 2, 6, with_image=with_image)
    scores = query @ key.transpose(-2, -1) / 2 + module.bias.table[index].permute(2, 0, 1)
    weights = scores.masked_fill(~mask[:, None, None], float("-inf")).softmax(dim=-1)
    wanted = F.linear((weights @ value).transpose(1, 2).flatten(2), a.projection.weight, a.projection.bias)
    actual = module(x, num_text, mask)
    torch.testing.assert_close(actual, wanted)
    leaves, weight = [x, *module.parameters()], torch.randn_like(wanted)
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, weight) for y in (actual, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_attention_refuses_other_lengths():
    module = RelativeAttention(8, 2, window_size=3, text_span=6)
    with pytest.raises(ValueError, match="x must have 2 text tokens and 0 or 10 of an image, got 11 in all"):
        module(torch.randn(1, 11, 8), 2)
    with pytest.raises(ValueError, match="RelativeAttention: num_text_tokens must be at most text_span=6, got 7"):
        module(torch.randn(1, 7, 8), 7)


# Block


@pytest.mark.parametrize("inputs", ["image", "text", "pair"])
@pytest.mark.parametrize("layer_scale", [None, 0.3])
@pytest.mark.parametrize("fuses", [False, True])
def test_the_block_is_the_networks(fuses, layer_scale, inputs):
    """With the weights of a network of one layer it gives what that layer gives, gradients too."""
    sizes = {"hidden_size": 12, "intermediate_size": 20, "layer_scale_init_value": layer_scale}
    config = MoMEConfig(
        **sizes,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_vl_layers=int(fuses),
        image_size=4,
        patch_size=2,
        vocab_size=9,
        max_text_length=6,
        text_relative_span=6,
    )
    network = drawn(MoMETransformer(config).eval())
    block = ExpertBlock(
        12,
        3,
        window_size=2,
        text_span=6,
        fuses=fuses,
        intermediate_size=20,
        layer_scale_init_value=layer_scale,
    ).double()
    block.block.load_state_dict(network.blocks[0].state_dict())
    block.bias.load_state_dict(network.relative_position_bias.state_dict())
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    text = {"input_ids": torch.randint(0, 9, (2, 4)), "attention_mask": mask} if inputs != "image" else {}
    image = {"pixel_values": torch.randn(2, 3, 4, 4, dtype=torch.float64)} if inputs != "text" else {}
    before, wanted = network(**text, **image, output_hidden_states=True).hidden_states
    num_text = 4 if text else 0
    key_mask = F.pad(mask.bool(), (0, before.shape[1] - 4), value=True) if text else None
    x = before.detach().requires_grad_()
    actual = block(x, num_text, key_mask)
    torch.testing.assert_close(actual, wanted)
    weight = torch.randn_like(wanted)
    wanted.backward(weight)
    actual.backward(weight)
    pairs = [*zip(block.block.parameters(), network.blocks[0].parameters(), strict=True)]
    pairs.append((block.bias.table, network.relative_position_bias.table))
    for ours, theirs in pairs:
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_block_begins_as_the_networks_does():
    block = ExpertBlock(64, 4, window_size=3, layer_scale_init_value=0.3)
    assert set(block.block.experts) == {"language", "vision"}
    assert set(ExpertBlock(64, 4, window_size=3, fuses=True).block.experts) == {"language", "vision", "vl"}
    assert block.block.experts["vision"].fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (block.block.attention_layer_scale == 0.3).all()
    assert (block.block.ffn_layer_scale == 0.3).all()
    assert (block.bias.table == 0).all()


def test_the_block_drops_branches_in_training_alone():
    block = ExpertBlock(8, 2, window_size=1, drop_path_rate=0.5)
    x = torch.randn(400, 2, 8)
    assert torch.equal(block.eval()(x), block(x))
    kept = (block.train()(x) != x).any(dim=(1, 2)).float().mean().item()
    assert kept == pytest.approx(1 - 0.5**2, abs=0.1)  # either branch changes an image


def test_the_block_refuses_other_lengths():
    block = ExpertBlock(8, 2, window_size=3, text_span=6)
    with pytest.raises(ValueError, match="ExpertBlock: x must have 2 text tokens and 0 or 10 of an image, got 11"):
        block(torch.randn(1, 11, 8), 2)
    with pytest.raises(ValueError, match="ExpertBlock: num_text_tokens must be at most text_span=6, got 7"):
        block(torch.randn(1, 7, 8), 7)


# Loss


def test_contrastive_loss_by_hand():
    images, texts = (F.normalize(torch.randn(5, 6, dtype=torch.float64), dim=-1).requires_grad_() for _ in range(2))
    loss = ContrastiveLoss().double()
    scores, each = images @ texts.t() / 0.07, torch.arange(5)
    wanted = (F.cross_entropy(scores, each) + F.cross_entropy(scores.t(), each)) / 2
    torch.testing.assert_close(loss(images, texts), wanted, rtol=1e-6, atol=1e-6)
    loss(images, texts).backward()
    assert loss.logit_scale.grad.isfinite()
    assert loss.logit_scale.grad != 0
    clamped = ContrastiveLoss(math.log(1000), max_logit_scale=100).double()
    scores = 100 * images @ texts.t()
    wanted = (F.cross_entropy(scores, each) + F.cross_entropy(scores.t(), each)) / 2
    torch.testing.assert_close(clamped(images, texts), wanted)


def test_contrastive_loss_with_equal_captions():
    """A caption that occurs twice is no negative of its twin."""
    images, texts = (F.normalize(torch.randn(4, 6), dim=-1) for _ in range(2))
    ids = torch.tensor([0, 1, 1, 2])
    assert ContrastiveLoss()(images, texts, ids, ids) != ContrastiveLoss()(images, texts)


# A stranger's model


def test_an_upgraded_vit_sees_what_it_saw(example):
    """The experts begin as its own network, the bias at zero: images give what they gave, to rounding."""
    vit = drawn(example.TinyViT()).eval()
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    before = vit(pixels)
    reader = example.with_experts(vit, 9).double()
    torch.testing.assert_close(reader.vit(pixels), before)


def test_an_upgraded_vit_compiles_whole(example):
    torch._dynamo.reset()
    reader = example.with_experts(example.TinyViT(), 9).eval()
    ids = torch.randint(0, 9, (2, 3))
    compiled = torch.compile(reader.encode_texts, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), reader.encode_texts(ids))
    pixels = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(reader.match, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(pixels, ids), reader.match(pixels, ids))


def test_an_upgraded_vit_learns_to_read(example):
    """Pictures of two marked quarters, twelve captions: from chance, 8 %, to most, by words that it had never seen."""
    torch.manual_seed(0)
    reader = example.with_experts(example.TinyViT(), 9)
    found, told = example.train(reader)
    assert found > 0.9
    assert told > 0.8
    experts = reader.vit.blocks[0].ffn.experts
    assert not torch.equal(experts["vision"].fc1.weight, experts["language"].fc1.weight)
    assert (reader.vit.blocks[0].attn.bias.table != 0).any()
