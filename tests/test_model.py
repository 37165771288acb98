"""Laws of `MoMETransformer`: what each path gives and touches, and what leaves it as it is."""

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import FIELDS, PATHS, POSITIONS, SIZES, build, inputs, positions, run, shared, tensors, visible
from torch import nn

from vlmo_fast import MoMEConfig, MoMEOutput, MoMETransformer, ops, pack
from vlmo_fast.block import MoMEBlock
from vlmo_fast.ops import ffn, packed, padded
from vlmo_fast.rows import PaddedRows

IDS, MASK, PIXELS = inputs()


# Outputs

PRESENT = {
    "image": {"last_hidden_state", "image_embeds"},
    "text": {"last_hidden_state", "text_embeds"},
    "image_vl": {"last_hidden_state", "image_embeds", "vl_last_hidden_state", "vl_image_embeds"},
    "text_vl": {"last_hidden_state", "text_embeds", "vl_last_hidden_state", "vl_text_embeds"},
    "pair": {"last_hidden_state", "pooler_output"},
}
LENGTHS = {"image": 10, "text": 6, "pair": 16}


@positions
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("states", [False, True])
def test_fields_of_each_path(kind, path, states):
    out = run(shared(kind), path, output_hidden_states=states)
    expected = set(PRESENT[path])
    if states:
        expected |= {"hidden_states"} | ({"vl_hidden_states"} if path.endswith("_vl") else set())
    assert {name for name in FIELDS if getattr(out, name) is not None} == expected
    sequence = (3, LENGTHS[path.removesuffix("_vl")], 24)
    for name in expected:
        value = getattr(out, name)
        if name in ("hidden_states", "vl_hidden_states"):
            assert [tuple(x.shape) for x in value] == [sequence] * (5 if name == "hidden_states" else 2)
        else:
            assert tuple(value.shape) == (sequence if name.endswith("last_hidden_state") else (3, 24)), name


@positions
@pytest.mark.parametrize("path", PATHS)
def test_relations_between_fields(kind, path):
    """Norm of the last state, tanh of the pooled [CLS], unit embeddings of [CLS], each by its own layer."""
    model = shared(kind)
    out = run(model, path, output_hidden_states=True)
    assert torch.equal(out.last_hidden_state, model.norm(out.hidden_states[-1]))
    if out.vl_last_hidden_state is not None:
        assert torch.equal(out.vl_last_hidden_state, model.norm(out.vl_hidden_states[-1]))
    if out.pooler_output is not None:
        assert torch.equal(out.pooler_output, torch.tanh(model.pooler(out.last_hidden_state[:, 0])))
    for name, hidden in (("", out.last_hidden_state), ("vl_", out.vl_last_hidden_state)):
        for modality in ("image", "text"):
            embeds = getattr(out, f"{name}{modality}_embeds")
            if embeds is not None:
                projected = getattr(model, f"{name}{modality}_projection")(hidden[:, 0])
                torch.testing.assert_close(embeds, projected / projected.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize(
    ("flag", "fields"),
    [
        ("add_pooler", {"pooler_output"}),
        ("add_projections", {"image_embeds", "text_embeds"}),
        ("add_vl_projections", {"vl_image_embeds", "vl_text_embeds"}),
    ],
)
def test_heads_that_a_model_is_made_without(flag, fields):
    model = build(**{flag: False})
    for path in PATHS:
        out = run(model, path)
        assert {name for name in FIELDS if getattr(out, name) is not None} == PRESENT[path] - fields


def test_no_vl_layers():
    model = build(num_vl_layers=0)
    assert model.vl_image_projection is None
    assert {name for block in model.blocks for name in block.experts} == {"language", "vision"}
    for path in ("image", "text", "pair"):
        assert run(model, path).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match="use_vl_branch must be False where num_vl_layers is 0, got True"):
        run(model, "image_vl")


def test_all_layers_vl():
    """The branch then starts at the embeddings."""
    model = build(num_vl_layers=4)
    out = run(model, "image_vl", output_hidden_states=True)
    assert len(out.vl_hidden_states) == 4
    rows = PaddedRows(len(PIXELS), 0, 10)
    x, bias = out.hidden_states[0].flatten(0, 1), model.relative_position_bias(0, (3,))[0]
    again = model.blocks[0](x, rows, rows.fusion_groups, bias)
    torch.testing.assert_close(rows.padded(again), out.vl_hidden_states[0])


@pytest.mark.parametrize("path", ["image", "text"])
def test_vl_branch_leaves_the_own_branch_alone(path):
    alone, both = run(shared(), path), run(shared(), f"{path}_vl")
    assert torch.equal(alone.last_hidden_state, both.last_hidden_state)
    assert not torch.equal(both.last_hidden_state, both.vl_last_hidden_state)


IDS, MASK, PIXELS = inputs()


# Embeddings


def test_image_type_ids():
    """An int, a tensor of them, and None mean rows of one table; row 2 is the second image of a pair."""
    model = build(num_image_types=2)
    default = run(model, "image", output_hidden_states=True)
    for ids in (1, torch.tensor([1, 1, 1]), torch.tensor([1, 1, 1], dtype=torch.int32)):
        assert torch.equal(default.image_embeds, run(model, "image", image_type_ids=ids).image_embeds)
    table = model.modality_type_embeddings.weight
    mixed = run(model, "image", image_type_ids=torch.tensor([1, 2, 1]), output_hidden_states=True)
    difference = mixed.hidden_states[0] - default.hidden_states[0]
    wanted = torch.zeros_like(difference)
    wanted[1] = table[2] - table[1]
    torch.testing.assert_close(difference, wanted)
    assert torch.equal(mixed.image_embeds[[0, 2]], default.image_embeds[[0, 2]])
    assert torch.equal(
        run(model, "pair", image_type_ids=2).pooler_output[1],
        run(model, "pair", image_type_ids=torch.tensor([1, 2, 1])).pooler_output[1],
    )


def test_text_embedding_by_hand():
    """Both type embeddings of the release, and positions in the absolute model alone."""
    for kind in POSITIONS:
        model = shared(kind)
        embedding = model.text_embeddings
        ids = IDS[:1]
        e = embedding.word_embeddings.weight[ids[0]] + embedding.token_type_embeddings.weight[0]
        if kind == "absolute":
            e = e + embedding.position_embeddings.weight[:6]
        e = (e - e.mean(-1, keepdim=True)) / (e.var(-1, unbiased=False, keepdim=True) + 1e-12).sqrt()
        e = e * embedding.norm.weight + embedding.norm.bias + model.modality_type_embeddings.weight[0]
        torch.testing.assert_close(model(ids, output_hidden_states=True).hidden_states[0][0], e)


def test_image_embedding_by_hand():
    """Row-major patches behind [CLS]; absolute positions also on [CLS]; the image's type row on all."""
    for kind in POSITIONS:
        model = shared(kind)
        embedding = model.image_embeddings
        weight, rows = embedding.projection.weight.flatten(1), [embedding.cls_token[0, 0]]
        for y in range(3):
            for x in range(3):
                patch = PIXELS[0, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].flatten()
                rows.append(weight @ patch + embedding.projection.bias)
        wanted = torch.stack(rows) + model.modality_type_embeddings.weight[1]
        if kind == "absolute":
            wanted = wanted + embedding.position_embeddings[0]
        out = model(pixel_values=PIXELS[:1], output_hidden_states=True)
        torch.testing.assert_close(out.hidden_states[0][0], wanted, rtol=1e-5, atol=1e-5)  # sums of 192


@positions
def test_mask_token(kind):
    """Masked patches: the token instead of the patch, before positions; the other patches are untouched."""
    model = build(kind, add_mask_token=True)
    masked = torch.zeros(3, 9, dtype=torch.bool)
    masked[0, [0, 4]] = masked[2] = True
    plain = run(model, "image", output_hidden_states=True).hidden_states[0]
    out = run(model, "image", bool_masked_pos=masked, output_hidden_states=True)
    state = out.hidden_states[0]
    assert torch.equal(state[:, 1:][~masked], plain[:, 1:][~masked])
    assert torch.equal(state[:, 0], plain[:, 0])
    wanted = (model.image_embeddings.mask_token + model.modality_type_embeddings.weight[1]).expand(3, 9, -1)
    if kind == "absolute":
        wanted = wanted + model.image_embeddings.position_embeddings[:, 1:]
    torch.testing.assert_close(state[:, 1:][masked], wanted[masked])
    hidden = masked.unflatten(1, (3, 3)).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    other = torch.where(hidden, 9.0, PIXELS)
    again = model(pixel_values=other, bool_masked_pos=masked)
    assert torch.equal(again.last_hidden_state, out.last_hidden_state)  # what was masked is not seen


def norm_by_hand(x, module, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * module.weight + module.bias


@positions
@pytest.mark.parametrize("cls_only", [False, True])
def test_block_by_hand(kind, cls_only):
    """One block of a pair, head by head, in float64; epsilons large enough to show which norm has which."""
    model = build(kind, layer_norm_eps=0.25, text_layer_norm_eps=0.5).double().requires_grad_(False)
    block, groups = model.blocks[1], (("language", 6), ("vision", 10))
    x = torch.randn(2, 16, 24, dtype=torch.float64)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 4:6] = False
    bias = torch.randn(2, 16, 16, dtype=torch.float64)
    h = norm_by_hand(x, block.attention_norm, 0.25)
    attention = block.attention
    query, key, value = (h @ part.t() for part in attention.qkv.weight.split(24))
    query, value = query + attention.q_bias, value + attention.v_bias
    heads = []
    for head, columns in enumerate((slice(0, 12), slice(12, 24))):
        scores = query[..., columns] / 12**0.5 @ key[..., columns].transpose(1, 2) + bias[head]
        weights = scores.exp() * mask[:, None]
        heads.append(weights / weights.sum(-1, keepdim=True) @ value[..., columns])
    attended = torch.cat(heads, dim=-1) @ attention.projection.weight.t() + attention.projection.bias
    scales = (block.attention_layer_scale, block.ffn_layer_scale) if kind == "relative" else (1.0, 1.0)
    x1 = x + scales[0] * attended
    rows = []
    for (name, _), part in zip(groups, x1.split([6, 10], dim=1), strict=True):
        expert = block.experts[name]
        h = norm_by_hand(part, expert.norm, 0.25) @ expert.fc1.weight.t() + expert.fc1.bias
        h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
        rows.append(part + scales[1] * (h @ expert.fc2.weight.t() + expert.fc2.bias))
    wanted = torch.cat(rows, dim=1)
    rows = PaddedRows(2, 6, 10, mask, cls_only)
    matrix = torch.cat([x[:, :6].flatten(0, 1), x[:, 6:].flatten(0, 1)])
    close(rows.padded(block(matrix, rows, rows.modality_groups, bias)), wanted[:, :1] if cls_only else wanted)


def test_final_norm_by_hand():
    model = build(layer_norm_eps=0.25, text_layer_norm_eps=0.5).double().requires_grad_(False)
    for path in ("image_vl", "text_vl", "pair"):
        out = run(model, path, output_hidden_states=True)
        close(out.last_hidden_state, norm_by_hand(out.hidden_states[-1], model.norm, 0.25))
    assert model.text_embeddings.norm.eps == 0.5


# Which expert sees which token

EXPERT_INPUTS = {  # (layers below 2, layers from 2 on): calls of each expert, (tokens from, tokens to) of the sequence
    "image": ({"vision": [(0, 10)]}, {"vision": [(0, 10)]}),
    "text": ({"language": [(0, 6)]}, {"language": [(0, 6)]}),
    "image_vl": ({"vision": [(0, 10)]}, {"vision": [(0, 10)], "vl": [(0, 10)]}),
    "text_vl": ({"language": [(0, 6)]}, {"language": [(0, 6)], "vl": [(0, 6)]}),
    "pair": ({"language": [(0, 6)], "vision": [(6, 16)]}, {"vl": [(0, 16)]}),
}


def by_sequence(rows, lengths):
    parts = rows.split([3 * length for length in lengths])
    return torch.cat([part.unflatten(0, (3, -1)) for part in parts], dim=1)


@positions
@pytest.mark.parametrize("path", PATHS)
def test_which_expert_runs_on_which_tokens(kind, path):
    """Each expert's input and output are the named slice of the block's residual stream; nothing else runs."""
    model, seen = build(kind).requires_grad_(False), {}
    for layer, block in enumerate(model.blocks):
        for name, expert in block.experts.items():
            expert.register_forward_hook(
                lambda _, args, out, key=(layer, name): seen.setdefault(key, []).append((args[0], out))
            )
    out = run(model, path, output_hidden_states=True)
    wanted = {(layer, name): spans for layer in range(4) for name, spans in EXPERT_INPUTS[path][layer >= 2].items()}
    assert set(seen) == set(wanted)
    for (layer, name), calls in seen.items():
        assert len(calls) == len(wanted[layer, name])
        for (x, y), (start, stop) in zip(calls, wanted[layer, name], strict=True):
            # rows of three sequences, texts before images
            halves = [(start, stop)] if stop <= 6 or path != "pair" or start >= 6 else [(0, 6), (6, 16)]
            assert len(x) == 3 * (stop - start)
            x, y = (by_sequence(rows, [b - a for a, b in halves]) for rows in (x, y))
            scale = model.blocks[layer].ffn_layer_scale
            result = x + (y if scale is None else scale * y)
            states = out.vl_hidden_states if name == "vl" and path != "pair" else out.hidden_states[1:]
            state = states[layer - 2] if states is out.vl_hidden_states else states[layer]
            assert torch.equal(state[:, start:stop], result)


def perturb(parameters):
    for parameter in parameters:
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))


# Outputs that a change of an expert's weights must reach, by (path, expert, layer in the vl part): all others must not.
REACHES = {
    ("image", "vision", False): {"image"},
    ("image", "vision", True): {"image"},
    ("image_vl", "vision", False): {"image", "vl_image"},
    ("image_vl", "vision", True): {"image"},
    ("image_vl", "vl", True): {"vl_image"},
    ("text", "language", False): {"text"},
    ("text", "language", True): {"text"},
    ("text_vl", "language", False): {"text", "vl_text"},
    ("text_vl", "language", True): {"text"},
    ("text_vl", "vl", True): {"vl_text"},
    ("pair", "language", False): {"pair"},
    ("pair", "vision", False): {"pair"},
    ("pair", "vl", True): {"pair"},
}


def answers(out: MoMEOutput) -> dict[str, torch.Tensor]:
    named = {
        "image": out.image_embeds,
        "text": out.text_embeds,
        "vl_image": out.vl_image_embeds,
        "vl_text": out.vl_text_embeds,
        "pair": out.pooler_output,
    }
    return {name: value for name, value in named.items() if value is not None}


@pytest.mark.parametrize("path", PATHS)
def test_which_output_depends_on_which_expert(path):
    """Every expert of every layer, shared attention and norms: what must change changes, no bit else."""
    model = build().requires_grad_(False)
    before = answers(run(model, path))
    original = copy.deepcopy(model.state_dict())
    for layer, block in enumerate(model.blocks):
        for name, expert in block.experts.items():
            for part in (expert.norm, expert.fc1, expert.fc2):
                perturb(part.parameters())
                after = answers(run(model, path))
                changed = {key for key in before if not torch.equal(before[key], after[key])}
                assert changed == REACHES.get((path, name, layer >= 2), set()), (layer, name, part)
                model.load_state_dict(original)
        for part in (block.attention, block.attention_norm):
            perturb(part.parameters())
            after = answers(run(model, path))
            assert not any(torch.equal(before[key], after[key]) for key in before), (layer, part)
            model.load_state_dict(original)
    perturb(model.norm.parameters())
    after = answers(run(model, path))
    assert not any(torch.equal(before[key], after[key]) for key in before)


@positions
@pytest.mark.parametrize("path", PATHS)
def test_exactly_the_used_parameters_get_gradients(kind, path):
    model = build(kind)
    out = run(model, path)
    sum(value.sum() for value in answers(out).values()).backward()
    modality = path.partition("_")[0]
    unused = set()
    for name, parameter in model.named_parameters():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
        expert = next((e for e in ("language", "vision", "vl") if f"experts.{e}." in name), None)
        if expert is not None:
            used = expert in EXPERT_INPUTS[path][layer >= 2]
        elif name.startswith("text_embeddings.position_embeddings"):
            used = kind == "absolute" and modality != "image"
        elif name.startswith("text_embeddings"):
            used = modality != "image"
        elif name.startswith("image_embeddings"):
            used = modality != "text"
        elif name.startswith("pooler"):
            used = modality == "pair"
        elif "_projection" in name and layer is None:
            used = name.startswith(modality) or (path.endswith("_vl") and name.startswith(f"vl_{modality}"))
        else:
            used = True
        has_gradient = parameter.grad is not None
        assert has_gradient == used, name
        if used:
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().sum() > 0, name
        else:
            unused.add(name)
    assert unused


def test_unused_text_positions_are_frozen():
    """They stay in relative models for the released checkpoints' sake only."""
    for kind in POSITIONS:
        weight = shared(kind).text_embeddings.position_embeddings.weight
        fresh = MoMETransformer(MoMEConfig(**SIZES, position_embedding_type=kind))
        assert fresh.text_embeddings.position_embeddings.weight.requires_grad == (kind == "absolute")
        assert weight.shape == (10, 24)


# Implementations by name


def test_backends_reach_the_door(monkeypatch):
    """Each op on its own, attention in both its forms at once, and back to auto."""
    model, seen, ids = build(), {}, inputs()[0]
    for module in (padded, packed, ffn):
        monkeypatch.setattr(
            module,
            "select",
            lambda op, problem, name: seen.setdefault(op, set()).add(name) or ops.select(op, problem, name),
        )

    def asked_for():
        seen.clear()
        with torch.no_grad():
            model(ids)
            model.forward_packed(pack([4, 3, 6]), ids)
        return {op: names.pop() for op, names in seen.items() if len(names) == 1}

    auto = dict.fromkeys(("attention", "packed_attention", "mome_ffn"), "auto")
    assert asked_for() == auto
    for op, name in (("mome_ffn", "eager"), ("packed_attention", "bucketed"), ("attention", "sdpa")):
        model.set_backend(op, name)
        assert asked_for() == {**auto, op: name}
        model.set_backend(op, "auto")
    model.set_attention_backend("eager")
    assert asked_for() == {**auto, "attention": "eager", "packed_attention": "eager"}
    model.set_attention_backend("xformers")
    with pytest.raises(NotImplementedError, match=r"attention: backend 'xformers' cannot run here"):
        asked_for()
    with pytest.raises(ValueError, match=r"MoMETransformer: op must be one of \['attention', 'mome_ffn', .*got 'norm'"):
        model.set_backend("norm", "auto")
    with pytest.raises(ValueError, match=r"MoMETransformer: mome_ffn backend must be one of .*'triton'.* got 'sdpa'"):
        model.set_backend("mome_ffn", "sdpa")
    with pytest.raises(ValueError, match=r"MoMETransformer: attention backend must be one of .* got 'bucketed'"):
        model.set_attention_backend("bucketed")


# [CLS] alone in the last layer


@positions
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("vl_layers", [2, 0, 4])
def test_cls_only(kind, path, vl_layers):
    """The same answers and gradients from one token of the last layer; the layers below are as ever."""
    if path.endswith("_vl") and not vl_layers:
        pytest.skip("no branch without vl layers")
    model = build(kind, num_vl_layers=vl_layers).double()
    ids, mask, pixels = inputs(dtype=torch.float64)
    results, tokens = [], []
    for expert in model.blocks[3].experts.values():
        expert.register_forward_pre_hook(lambda _, args: tokens.append(len(args[0])))
    for cls_only in (False, True):
        tokens.clear()
        model.zero_grad(set_to_none=True)
        out = run(model, path, ids, mask, pixels, cls_only=cls_only, output_hidden_states=True)
        sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in answers(out).values()).backward()
        results.append((out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert set(tokens) == {len(pixels)}  # a row for each sequence
    assert len(tokens) == (2 if path.endswith("_vl") else 1)
    (full, full_gradients), (short, gradients) = results
    for name, value in answers(full).items():
        close(answers(short)[name], value)
    for name in ("last_hidden_state", "vl_last_hidden_state"):
        if getattr(full, name) is not None:
            close(getattr(short, name), getattr(full, name)[:, :1])
    for name in ("hidden_states", "vl_hidden_states"):
        if getattr(full, name) is not None:
            assert all(
                torch.equal(a, b) for a, b in zip(getattr(short, name)[:-1], getattr(full, name)[:-1], strict=True)
            )
            close(getattr(short, name)[-1], getattr(full, name)[-1][:, :1])
    for name, gradient in full_gradients.items():  # what cls_only never computes had a zero gradient
        close(gradients.get(name, torch.zeros_like(gradient)), gradient)
    assert gradients.keys() <= full_gradients.keys()


def test_cls_only_draws_as_ever():
    """In training, too: the first token's row takes its own half's draw of stochastic depth."""
    model = build(num_vl_layers=0, drop_path_rate=0.5).double().train()
    arguments, pooled = inputs(batch=8, dtype=torch.float64), []
    for cls_only in (False, True):
        torch.manual_seed(3)
        pooled.append(run(model, "pair", *arguments, cls_only=cls_only, output_hidden_states=True).pooler_output)
    close(pooled[1], pooled[0])


# Independence of samples and padding


@positions
@pytest.mark.parametrize("path", PATHS)
def test_batch_permutation(kind, path):
    """Permuting a batch permutes its outputs. Not to the bit: GEMMs may tile another row differently."""
    ids, mask, pixels = inputs(batch=5)
    order = torch.tensor([3, 0, 4, 1, 2])
    out = run(shared(kind), path, ids, mask, pixels)
    permuted = run(shared(kind), path, ids[order], mask[order], pixels[order])
    for a, b in zip(tensors(out), tensors(permuted), strict=True):
        torch.testing.assert_close(a[order], b)


@pytest.mark.parametrize("path", PATHS)
def test_samples_do_not_see_each_other(path):
    ids, mask, pixels = inputs(batch=3)
    other_ids, other_pixels = ids.clone(), pixels.clone()
    other_ids[1], other_pixels[1] = 7, 3.0
    out, other = run(shared(), path, ids, mask, pixels), run(shared(), path, other_ids, mask, other_pixels)
    for a, b in zip(tensors(out), tensors(other), strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert not torch.equal(a[1], b[1])


@given(
    kind=st.sampled_from(POSITIONS),
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=3),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_padding_law(kind, lengths, data):
    """Any amount of padding, with any ids in it, leaves every text and pair as it is alone (float64)."""
    model = double(kind)
    total = data.draw(st.integers(max(lengths), 10))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 49), min_size=total, max_size=total))).repeat(len(lengths), 1)
    ids = (ids + torch.arange(len(lengths))[:, None]) % 50
    mask = (torch.arange(total) < torch.tensor(lengths)[:, None]).long()
    pixels = inputs(batch=len(lengths), dtype=torch.float64)[2]
    text, pair = run(model, "text_vl", ids, mask), run(model, "pair", ids, mask, pixels)
    for row, length in enumerate(lengths):
        alone_ids = ids[row : row + 1, :length]
        alone = run(model, "text_vl", alone_ids)
        for field in ("text_embeds", "vl_text_embeds"):
            close(getattr(text, field)[row], getattr(alone, field)[0])
        close(text.last_hidden_state[row, :length], alone.last_hidden_state[0])
        fused = model(alone_ids, None, pixels[row : row + 1])
        close(pair.pooler_output[row], fused.pooler_output[0])
        close(pair.last_hidden_state[row, total:], fused.last_hidden_state[0, length:])
        close(pair.last_hidden_state[row, :length], fused.last_hidden_state[0, :length])


@given(order=st.permutations(range(4)), kind=st.sampled_from(POSITIONS))
@settings(max_examples=15, deadline=None)
def test_joint_permutation_law(order, kind):
    """Pairs are a set: permuting texts and images together permutes the outputs, and permuting one of them does not."""
    ids, mask, pixels = inputs(batch=4, dtype=torch.float64)
    order = list(order)
    out = run(double(kind), "pair", ids, mask, pixels).pooler_output
    close(run(double(kind), "pair", ids[order], mask[order], pixels[order]).pooler_output, out[order])
    if order != sorted(order):
        mismatched = run(double(kind), "pair", ids[order], mask[order], pixels).pooler_output
        assert (mismatched - out[order]).abs().max() > 1e-6


@cache
def double(kind):
    return build(kind).requires_grad_(False).double()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)  # float64, values of order 1, 4 layers


def test_masks_may_be_bool_or_float():
    ids, mask, pixels = inputs()
    out = run(shared(), "pair", ids, mask, pixels).pooler_output
    for other in (mask.bool(), mask.float(), mask.int(), mask.to(torch.uint8)):
        assert torch.equal(run(shared(), "pair", ids, other, pixels).pooler_output, out)
    full = torch.ones_like(mask)
    close_enough = run(shared(), "pair", ids, full, pixels).pooler_output
    torch.testing.assert_close(close_enough, shared()(ids, pixel_values=pixels).pooler_output)


def test_padding_may_lie_anywhere_but_at_cls():
    """The mask is a key mask, not a length: a hole in the middle takes that token out for all others."""
    ids, _, pixels = inputs()
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]]).expand(3, 6)
    other = ids.clone()
    other[:, 2] = 9
    a, b = (run(shared(), "pair", x, mask, pixels) for x in (ids, other))
    assert torch.equal(a.pooler_output, b.pooler_output)
    assert torch.equal(a.last_hidden_state[:, 3:], b.last_hidden_state[:, 3:])


# Inputs of all kinds


@positions
def test_one_token_texts(kind):
    ids = IDS[:, :1]
    out = shared(kind)(ids, use_vl_branch=True)
    pair = shared(kind)(ids, pixel_values=PIXELS)
    assert out.last_hidden_state.shape == (3, 1, 24)
    assert pair.last_hidden_state.shape == (3, 11, 24)
    padded, mask = torch.cat([ids, ids], 1), torch.tensor([[1, 0]]).expand(3, 2)
    torch.testing.assert_close(shared(kind)(padded, mask).text_embeds, out.text_embeds)
    torch.testing.assert_close(shared(kind)(padded, mask, PIXELS).pooler_output, pair.pooler_output)


def test_int32_ids():
    for path in ("text_vl", "pair"):
        assert torch.equal(
            visible(run(shared(), path, IDS.int(), MASK, PIXELS)), visible(run(shared(), path, IDS, MASK, PIXELS))
        )


@pytest.mark.parametrize("layout", ["permuted", "channels_last", "expanded", "sliced"])
def test_memory_layouts_of_pixels(layout):
    """The same numbers in other memory; only the convolution's summation order may differ."""
    pixels = PIXELS
    if layout == "permuted":
        other = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    elif layout == "channels_last":
        other = pixels.to(memory_format=torch.channels_last)
    elif layout == "expanded":
        pixels = pixels[:1].repeat(3, 1, 1, 1)
        other = pixels[:1].expand(3, -1, -1, -1)
    else:
        other = torch.zeros(3, 3, 48, 24)[..., ::2, :]
        other.copy_(pixels)
    assert layout == "expanded" or not other.is_contiguous()
    out = run(shared(), "pair", IDS, MASK, other)
    torch.testing.assert_close(out.pooler_output, run(shared(), "pair", IDS, MASK, pixels).pooler_output)


def test_non_contiguous_ids():
    ids = IDS.repeat_interleave(2, dim=1)[:, ::2]
    assert not ids.is_contiguous()
    assert torch.equal(run(shared(), "text", ids, MASK).text_embeds, run(shared(), "text", IDS, MASK).text_embeds)


# Relative Frobenius error of any output. Through 4 layers with these strong weights the worst of 6 seeds, both kinds of
# positions and all paths was 15 eps in float32, 3.3 in bfloat16, 4.5 in float16 and, under autocast, 2.8 of bfloat16's;
# the caps are about twice that. An error in a formula is off by orders of magnitude.
DTYPES = {torch.float64: 0.0, torch.float32: 32 * 2**-23, torch.bfloat16: 8 * 2**-7, torch.float16: 8 * 2**-10}


@positions
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_float_dtype(kind, path, dtype):
    """Outputs in the parameters' dtype, close to float64 with the same (rounded) weights and inputs."""
    model = build(kind).requires_grad_(False).to(dtype)
    exact = copy.deepcopy(model).double()
    ids, mask, pixels = inputs(dtype=dtype)
    out = run(model, path, ids, mask, pixels, output_hidden_states=True)
    wanted = run(exact, path, ids, mask, pixels.double(), output_hidden_states=True)
    for a, b in zip(tensors(out), tensors(wanted), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= DTYPES[dtype] * b.norm()


@pytest.mark.parametrize("path", PATHS)
def test_autocast(path):
    """bfloat16 products around a float32 residual stream, for training; gradients come in the parameters' dtype."""
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        out = run(model, path, *inputs())
        loss = sum(value.float().square().sum() for value in answers(out).values())
    loss.backward()
    assert out.last_hidden_state.dtype == torch.float32
    wanted = run(model, path, *inputs())
    for a, b in zip(tensors(out), tensors(wanted), strict=True):
        assert (a.double() - b.double()).norm() <= DTYPES[torch.bfloat16] * b.double().norm()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


# Randomness


def test_drop_path_law():
    """All rows of a sequence together; kept branches are scaled so that the mean stays."""
    block = build(drop_path_rate=0.3).blocks[3].train()
    x, rows = torch.zeros(20_000 * 5, 24, dtype=torch.float64), PaddedRows(20_000, 2, 3)
    for num_draws in (1, 2):
        text, image = block._row_scale(x, rows, num_draws).split([40_000, 60_000])
        text, image = text.view(-1, 2), image.view(-1, 3)
        for part in (text, image):
            assert torch.equal(part, part[:, :1].expand_as(part))
            kept = part[:, 0] > 0
            torch.testing.assert_close(part[kept], torch.full_like(part[kept], 1 / 0.7), rtol=1e-12, atol=0)
            # 20,000 draws at 0.7: standard deviation 0.0032; five of them
            assert kept.double().mean().item() == pytest.approx(0.7, abs=0.017)
        assert torch.equal(text[:, 0], image[:, 0]) == (num_draws == 1)
    assert block.eval()._row_scale(x, rows, 1) is None


@pytest.mark.parametrize(("layers", "rates"), [(4, [0, 0.1, 0.2, 0.3]), (1, [0]), (2, [0, 0.3])])
def test_drop_path_grows_linearly(layers, rates):
    config = MoMEConfig(**{**SIZES, "num_hidden_layers": layers, "num_vl_layers": 1}, drop_path_rate=0.3)
    assert [block.drop_path_rate for block in MoMETransformer(config).blocks] == pytest.approx(rates)


def test_drop_path_draws(monkeypatch):
    """One draw a sequence for each branch, but two where a pair's text and image have experts of their own."""
    calls, original = [], MoMEBlock._row_scale

    def spy(block, x, rows, num_draws):
        scale = original(block, x, rows, num_draws)
        calls.append((block.drop_path_rate, num_draws, None if scale is None else tuple(scale.shape)))
        return scale

    monkeypatch.setattr(MoMEBlock, "_row_scale", spy)
    model = build(drop_path_rate=0.3).train()
    run(model, "pair")
    rows = (3 * 16,)
    assert [(pytest.approx(rate), draws, shape) for rate, draws, shape in calls] == [
        *((0.0, 1, None), (0.0, 2, None)),
        *((0.1, 1, rows), (0.1, 2, rows)),
        *((0.2, 1, rows), (0.2, 1, rows)),
        *((0.3, 1, rows), (0.3, 1, rows)),
    ]
    calls.clear()
    run(model.eval(), "pair")
    assert {shape for *_, shape in calls} == {None}


def test_halves_draw_separately():
    """With one layer at rate 0.5 and zeroed attention: text and image halves of a sample are dropped independently."""
    model = build(num_hidden_layers=2, num_vl_layers=0, drop_path_rate=0.5).train().requires_grad_(False)
    model.blocks[1].attention_layer_scale.zero_()
    ids, _, pixels = (x.repeat(80, *[1] * (x.ndim - 1))[:240] for x in inputs())
    out = model(ids, None, pixels, output_hidden_states=True)
    change = (out.hidden_states[2] - out.hidden_states[1]).abs()
    text, image = change[:, :6].amax((1, 2)) > 0, change[:, 6:].amax((1, 2)) > 0
    seen = [int((text == a).logical_and(image == b).sum()) for a in (True, False) for b in (True, False)]
    # each of the four outcomes has 240 / 4 = 60 expected, standard deviation 6.7; five of them
    assert all(abs(count - 60) <= 34 for count in seen), seen


def test_drop_path_scales_the_branch():
    """In training a kept branch counts 1 / (1 - rate) times, in evaluation once."""
    model = build(num_hidden_layers=2, num_vl_layers=0, drop_path_rate=0.5).requires_grad_(False)
    model.blocks[1].attention_layer_scale.zero_()
    pixels = PIXELS[:1].repeat(32, 1, 1, 1)
    evaluated = model.eval()(pixel_values=pixels, output_hidden_states=True).hidden_states
    trained = model.train()(pixel_values=pixels, output_hidden_states=True).hidden_states
    branch, dropped = evaluated[2] - evaluated[1], trained[2] - trained[1]
    kept = dropped.abs().amax((1, 2)) > 0
    assert 0 < int(kept.sum()) < 32
    torch.testing.assert_close(dropped[kept], 2 * branch[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "random"),
    [
        ("hidden_dropout", {"image", "text", "image_vl", "text_vl", "pair"}),
        ("text_embedding_dropout", {"text", "text_vl", "pair"}),
        ("drop_path_rate", {"image", "text", "image_vl", "text_vl", "pair"}),
    ],
)
def test_randomness_only_where_configured(field, random):
    """In training the named paths differ from call to call, the others and evaluation do not."""
    model = build(**{field: 0.5}).requires_grad_(False)
    for path in PATHS:
        model.train()
        first, second = (visible(run(model, path)) for _ in range(2))
        assert torch.equal(first, second) == (path not in random), path
        model.eval()
        first, second = (visible(run(model, path)) for _ in range(2))
        assert torch.equal(first, second)
    plain = build().requires_grad_(False)
    for path in PATHS:
        assert torch.equal(visible(run(plain.train(), path)), visible(run(plain.eval(), path)))


def test_hidden_dropout_is_where_it_says():
    """After the attention projection and after each expert, nowhere else; text embeddings have their own."""
    model = build(hidden_dropout=0.25, text_embedding_dropout=0.5)
    found = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    wanted = {"text_embeddings.dropout": 0.5}
    for layer, block in enumerate(model.blocks):
        wanted[f"blocks.{layer}.attention.dropout"] = 0.25
        wanted |= {f"blocks.{layer}.experts.{name}.dropout": 0.25 for name in block.experts}
    assert found == wanted


def test_dropout_after_each_expert_alone():
    """Without the attention's: what is left is the experts', though a block else computes them as one op."""
    model = build(hidden_dropout=0.5).requires_grad_(False).train()
    for block in model.blocks:
        block.attention.dropout.p = 0.0
    for path in PATHS:
        assert not torch.equal(visible(run(model, path)), visible(run(model, path))), path


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


@pytest.mark.parametrize("path", PATHS)
def test_dropout_is_the_last_step_of_each_branch(path):
    """With each dropout replaced by zero no branch adds anything, bit for bit; with one of the two kinds, one does."""
    model = build(hidden_dropout=0.1).requires_grad_(False)
    for layer, block in enumerate(model.blocks):
        for expert in block.experts.values():
            expert.dropout = Zero()
        block.attention.dropout = Zero()
        out = run(model, path, output_hidden_states=True)
        assert torch.equal(out.hidden_states[layer + 1], out.hidden_states[layer])
    for state in (*out.hidden_states, *(out.vl_hidden_states or ())):
        assert torch.equal(state, out.hidden_states[0])


# Gradient checkpointing


def gradients_of(model, path: str) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(11)
    out = run(model, path)
    loss = sum((value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum() for value in answers(out).values())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_gradient_checkpointing(path, rate):
    """Bit-equal gradients, drop path and dropout drawn again from the same state; each block really runs twice."""
    model = build(drop_path_rate=rate, hidden_dropout=rate / 2).train()
    plain = gradients_of(model, path)
    calls = []
    for layer, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, layer=layer: calls.append(layer))
    model.gradient_checkpointing = True
    recomputed = gradients_of(model, path)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name
    forward = [0, 1, 2, 3, *((2, 3) if path.endswith("_vl") else ())]
    assert sorted(calls) == sorted(forward * 2)
    calls.clear()
    with torch.no_grad():
        run(model, path)
    assert calls == forward


def test_gradient_checkpointing_stores_less():
    """Tensors kept for the backward pass: without it every block's activations, with it the blocks' inputs alone."""
    model = build(add_mask_token=True).train()
    saved = []

    def bytes_saved():
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x):
            run(model, "pair")
        return sum(saved)

    plain = bytes_saved()
    model.gradient_checkpointing = True
    assert bytes_saved() < plain / 2


# Change of image size


@positions
@pytest.mark.parametrize("size", [8, 16, 32, 40])
def test_interpolation(kind, size):
    """Smaller and larger images: finite, unit-norm, and another image's patches still count."""
    ids, mask, pixels = inputs(size=size)
    model = shared(kind)
    image = model(pixel_values=pixels, interpolate_pos_encoding=True, use_vl_branch=True)
    pair = model(ids, mask, pixels, interpolate_pos_encoding=True)
    assert image.last_hidden_state.shape == (3, 1 + (size // 8) ** 2, 24)
    for out in (image, pair):
        assert all(x.isfinite().all() for x in tensors(out))
    torch.testing.assert_close(image.image_embeds.norm(dim=-1), torch.ones(3))
    assert not torch.equal(image.image_embeds[0], image.image_embeds[1])


@positions
@pytest.mark.parametrize("path", PATHS)
def test_interpolation_at_the_native_size_is_a_no_op(kind, path):
    plain = run(shared(kind), path)
    same = run(shared(kind), path, interpolate_pos_encoding=True)
    assert all(torch.equal(a, b) for a, b in zip(tensors(plain), tensors(same), strict=True))


@positions
def test_interpolation_leaves_the_weights_alone(kind):
    model = build(kind)
    before = copy.deepcopy(model.state_dict())
    model(pixel_values=inputs(size=40)[2], interpolate_pos_encoding=True).image_embeds.sum().backward()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    source = model.relative_position_bias.table if kind == "relative" else model.image_embeddings.position_embeddings
    assert source.grad.abs().sum() > 0


# As a module


def expected_keys(kind: str) -> set[str]:
    keys = {
        *(f"text_embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")),
        *("text_embeddings.norm.weight", "text_embeddings.norm.bias"),
        *("image_embeddings.cls_token", "image_embeddings.projection.weight", "image_embeddings.projection.bias"),
        *("modality_type_embeddings.weight", "norm.weight", "norm.bias", "pooler.weight", "pooler.bias"),
        *("image_projection.weight", "text_projection.weight"),
        *("vl_image_projection.weight", "vl_text_projection.weight"),
    }
    keys.add("relative_position_bias.table" if kind == "relative" else "image_embeddings.position_embeddings")
    for layer in range(4):
        block = f"blocks.{layer}"
        if kind == "relative":
            keys |= {f"{block}.attention_layer_scale", f"{block}.ffn_layer_scale"}
        keys |= {f"{block}.attention_norm.weight", f"{block}.attention_norm.bias"}
        keys |= {f"{block}.attention.{name}" for name in ("q_bias", "v_bias", "qkv.weight")}
        keys |= {f"{block}.attention.projection.weight", f"{block}.attention.projection.bias"}
        for expert in ("language", "vision", *(("vl",) if layer >= 2 else ())):
            for module in ("norm", "fc1", "fc2"):
                keys |= {f"{block}.experts.{expert}.{module}.{part}" for part in ("weight", "bias")}
    return keys


@positions
def test_names_are_public(kind):
    """State-dict names are an interface: files outlive the code. The one buffer: text positions that nothing reads."""
    model = shared(kind)
    buffers = {"text_embeddings.position_embeddings.weight"} if kind == "relative" else set()
    assert set(model.state_dict()) == expected_keys(kind)
    assert set(dict(model.named_buffers())) == buffers
    assert set(dict(model.named_parameters())) == expected_keys(kind) - buffers
    with_token = build(kind, add_mask_token=True)
    assert set(with_token.state_dict()) == expected_keys(kind) | {"image_embeddings.mask_token"}


def test_two_stage_patches_by_hand():
    """Patches of stem_patch_size, GELU, then patches of those: the same window, one projection more."""
    model = MoMETransformer(MoMEConfig(**{**SIZES, "stem_patch_size": 4}))
    assert model.config.patch_size > 4
    embeddings = model.image_embeddings
    pixels = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    small = torch.nn.functional.gelu(torch.nn.functional.conv2d(pixels, embeddings.stem.weight, None, stride=4))
    ratio = model.config.patch_size // 4
    patches = torch.nn.functional.conv2d(small, embeddings.projection.weight, None, stride=ratio).flatten(2)
    actual = embeddings(pixels, model.config.window_size, None)[:, 1:]
    torch.testing.assert_close(actual, patches.transpose(1, 2))


def test_initial_values():
    """The released start: normal matrices, norms at identity, zero biases, tables at 0, layer scale as configured."""
    model = MoMETransformer(MoMEConfig(**{**SIZES, "hidden_size": 64, "initializer_range": 0.02}), add_mask_token=True)
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if "layer_scale" in name:
            assert (parameter == 0.1).all(), name
        elif "norm" in name and last == "weight":
            assert (parameter == 1).all(), name
        elif last in ("bias", "q_bias", "v_bias", "table"):
            assert (parameter == 0).all(), name
        else:
            # at least 64 draws: the standard deviation of their standard deviation is 0.02 / sqrt(2 * 64) = 0.0018
            assert parameter.std().item() == pytest.approx(0.02, abs=5 * 0.02 / (2 * parameter.numel()) ** 0.5), name
            assert abs(parameter.mean().item()) < 5 * 0.02 / parameter.numel() ** 0.5, name


def test_example_of_the_docstring():
    with torch.device("meta"):
        model = MoMETransformer(MoMEConfig.from_preset("base"))
    assert model(pixel_values=torch.rand(2, 3, 224, 224, device="meta")).image_embeds.shape == torch.Size([2, 768])
