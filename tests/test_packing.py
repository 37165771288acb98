"""Packed tokens: the plan itself, and the packed model against the padded one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from vlmo_fast import MoMEConfig, MoMETransformer, pack
from vlmo_fast.packing import KINDS

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_vl_layers": 2,
    "image_size": 24,
    "patch_size": 8,  # 3 x 3 patches: the fewest that the bicubic spline of another size takes
    "vocab_size": 50,
    "max_text_length": 196,
    "initializer_range": 0.3,  # strong weights, so that every path shows in the outputs
}
LENGTHS = (9, 3, 1, 6, 196)
SIDES = (24, 24, 32, 24)  # pixels; windows of 3, 3, 4 and 3 patches
EMBEDDINGS = {kind: f"{kind}_embeds" for kind in ("text", "vl_text", "vl_image", "image")}


def build(kind="relative", **options):
    torch.manual_seed(0)
    scale = {"relative": 0.5, "absolute": None}[kind]
    model = MoMETransformer(MoMEConfig(**SIZES, position_embedding_type=kind, layer_scale_init_value=scale, **options))
    if model.relative_position_bias is not None:
        torch.nn.init.normal_(model.relative_position_bias.table, std=0.5)
    return model.double()


def texts(lengths=LENGTHS):
    torch.manual_seed(1)
    return torch.randint(0, 50, (len(lengths), max(lengths)))


def images(sides=SIDES):
    torch.manual_seed(2)
    return [torch.randn(1, 3, side, side, dtype=torch.float64) for side in sides]


def windows(sides=SIDES):
    return [side // 8 for side in sides]


MIXTURES = {
    "texts": {"texts": [3, 0, 4, 1]},
    "images": {"images": [2, 0, 1]},
    "pairs": {"pairs": [(0, 2), (2, 0), (4, 1), (3, 3)]},
    "one-token text": {"texts": [2]},
    "196-token pair": {"pairs": [(4, 0)]},
    "no pair": {"texts": [0, 1], "images": [3, 2]},
    "no text": {"images": [2, 1], "pairs": [(1, 1), (0, 2)]},
    "no image": {"texts": [1], "pairs": [(1, 1)]},
    "all": {"texts": [2, 4, 0], "images": [1, 2], "pairs": [(1, 0), (0, 2), (3, 3), (1, 1)]},
    "repeated": {"texts": [1, 1], "images": [0, 0], "pairs": [(1, 0), (1, 0)]},
}


def padded_results(model, ids, pixels, mixture, vl_branch):
    """What `forward` gives for each sequence, one at a time and without any padding."""
    results = {kind: [] for kind in KINDS}
    for text in mixture.get("texts", ()):
        out = model(ids[text : text + 1, : LENGTHS[text]], use_vl_branch=vl_branch)
        results["text"].append((out.text_embeds[0], out.last_hidden_state[0]))
        if vl_branch:
            results["vl_text"].append((out.vl_text_embeds[0], out.vl_last_hidden_state[0]))
    for text, image in mixture.get("pairs", ()):
        out = model(ids[text : text + 1, : LENGTHS[text]], pixel_values=pixels[image], interpolate_pos_encoding=True)
        results["pair"].append((out.pooler_output[0], out.last_hidden_state[0]))
    for image in mixture.get("images", ()):
        out = model(pixel_values=pixels[image], use_vl_branch=vl_branch, interpolate_pos_encoding=True)
        results["image"].append((out.image_embeds[0], out.last_hidden_state[0]))
        if vl_branch:
            results["vl_image"].append((out.vl_image_embeds[0], out.vl_last_hidden_state[0]))
    return results


def packed_results(model, ids, pixels, mixture, vl_branch, all_tokens=()):
    layout = pack(
        LENGTHS if "texts" in mixture or "pairs" in mixture else (),
        windows() if "images" in mixture or "pairs" in mixture else (),
        **mixture,
        vl_branch=vl_branch,
        all_tokens=all_tokens,
    )
    out = model.forward_packed(layout, ids if layout.num_texts else None, pixels if layout.image_runs else None)
    embeddings = {kind: getattr(out, name) for kind, name in EMBEDDINGS.items()} | {"pair": out.pooler_output}
    results = {}
    for kind in KINDS:
        tokens = layout.unpack(out.last_hidden_state, kind)
        assert (embeddings[kind] is None) == (not tokens)
        results[kind] = list(zip(embeddings[kind], tokens, strict=True)) if tokens else []
    return results


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["relative", "absolute"])
@pytest.mark.parametrize("vl_branch", [False, True], ids=["plain", "branch"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_packed_against_padded(kind, vl_branch, mixture):
    """Embeddings, every token, and every gradient (the bias table's among them), with all tokens and without."""
    model, ids, pixels = build(kind), texts(), images()

    def run(function, *args):
        model.zero_grad(set_to_none=True)
        results = function(model, ids, pixels, MIXTURES[mixture], vl_branch, *args)
        sum(
            (embedding * torch.linspace(-1, 1, embedding.numel())).sum()
            for of_kind in results.values()
            for embedding, _ in of_kind
        ).backward()
        return results, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    padded, gradients = run(padded_results)
    for all_tokens in (KINDS, ("pair",), ()):
        packed, packed_gradients = run(packed_results, all_tokens)
        for name in KINDS:
            assert len(packed[name]) == len(padded[name])
            for (ours, tokens), (wanted, all_wanted) in zip(packed[name], padded[name], strict=True):
                close(ours, wanted)
                close(tokens, all_wanted if name in all_tokens else all_wanted[:1])
        for name, gradient in gradients.items():
            close(packed_gradients.get(name, torch.zeros_like(gradient)), gradient)
        assert packed_gradients.keys() <= gradients.keys()


sequences = st.fixed_dictionaries(
    {
        "texts": st.lists(st.integers(0, len(LENGTHS) - 2), max_size=4),
        "images": st.lists(st.integers(0, len(SIDES) - 1), max_size=3),
        "pairs": st.lists(st.tuples(st.integers(0, len(LENGTHS) - 2), st.integers(0, len(SIDES) - 1)), max_size=4),
    }
).filter(lambda mixture: any(mixture.values()))


@settings(max_examples=40, deadline=None)
@given(sequences, st.booleans(), st.sets(st.sampled_from(KINDS)))
def test_unpack_undoes_pack(mixture, vl_branch, all_tokens):
    """Tokens put into rows by the plan come back, sequence by sequence, in the caller's order."""
    layout = pack(LENGTHS, windows(), **mixture, vl_branch=vl_branch, all_tokens=all_tokens)
    tokens_of_image = torch.tensor([window**2 + 1 for window in windows()])
    text_tokens = [[(1, text, place) for place in range(length)] for text, length in enumerate(LENGTHS)]
    image_tokens = [[(2, image, place) for place in range(count)] for image, count in enumerate(tokens_of_image)]
    flat = torch.tensor([token for tokens in image_tokens for token in tokens])
    rows = torch.stack([torch.ones_like(layout.text_index), layout.text_index, layout.text_position], dim=1)
    rows = torch.cat([rows, flat if layout.image_rows is None else flat[layout.image_rows]])
    assert sum(count for _, count in layout.lower.modality_groups) == len(rows)
    rows = rows if layout.branch_rows is None else rows[layout.branch_rows]
    assert sum(count for _, count in layout.upper.fusion_groups) == len(rows)
    wanted = layout.last.keep(rows)
    assert sum(count for _, count in layout.last.fusion_groups) == len(wanted)
    pairs = [text_tokens[text] + image_tokens[image] for text, image in mixture["pairs"]]
    alone = {"text": [text_tokens[i] for i in mixture["texts"]], "image": [image_tokens[i] for i in mixture["images"]]}
    branch = {f"vl_{kind}": tokens if vl_branch else [] for kind, tokens in alone.items()}
    for kind, expected in {**alone, **branch, "pair": pairs}.items():
        unpacked = layout.unpack(wanted, kind)
        assert [x.tolist() for x in unpacked] == [
            [list(token) for token in (tokens if kind in all_tokens else tokens[:1])] for tokens in expected
        ]
        assert layout.first_tokens(wanted, kind).tolist() == [list(tokens[0]) for tokens in expected]


@settings(max_examples=15, deadline=None)
@given(sequences, st.randoms(use_true_random=False))
def test_order_and_neighbours_do_not_matter(mixture, random):
    """A permutation of the batch permutes the results, and each sequence alone gives what it gives among others."""
    model, ids, pixels = build().requires_grad_(False), texts(), images()
    results = packed_results(model, ids, pixels, mixture, True)
    orders = {name: random.sample(range(len(members)), len(members)) for name, members in mixture.items()}
    shuffled = {name: [members[i] for i in orders[name]] for name, members in mixture.items()}
    again = packed_results(model, ids, pixels, shuffled, True)
    names = {"text": "texts", "vl_text": "texts", "pair": "pairs", "vl_image": "images", "image": "images"}
    for kind, name in names.items():
        for (ours, _), place in zip(again[kind], orders[name], strict=True):
            close(ours, results[kind][place][0])
    name = random.choice([name for name, members in mixture.items() if members])
    alone = packed_results(model, ids, pixels, {name: mixture[name][:1]}, True)
    for kind in KINDS:
        if names[kind] == name:
            close(alone[kind][0][0], results[kind][0][0])


def compositions(count):
    """Batches of different numbers of texts, images and pairs, of different lengths."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda low, high, *shape: torch.randint(low, high, shape, generator=generator)
    for _ in range(count):
        lengths = draw(2, 12, int(draw(4, 9)))
        num_images = int(draw(4, 9))
        texts, images, pairs = (int(draw(2, 7)) for _ in range(3))
        yield (
            lengths,
            num_images,
            {
                "texts": draw(0, len(lengths), texts),
                "images": draw(0, num_images, images),
                "pairs": torch.stack([draw(0, len(lengths), pairs), draw(0, num_images, pairs)], dim=1),
            },
        )


@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_fifty_compositions_compile_at_most_twice(kind):
    """The whole model as one graph; what changes from batch to batch is symbols and tensors."""
    torch._dynamo.reset()
    model, counter = build(kind).requires_grad_(False), CompileCounter()
    compiled = torch.compile(model.forward_packed, fullgraph=True, dynamic=True, backend=counter)
    for number, (lengths, num_images, mixture) in enumerate(compositions(50)):
        ids = torch.randint(0, 50, (len(lengths), 11))
        pixels = torch.randn(num_images, 3, 24, 24, dtype=torch.float64)
        layout = pack(lengths, [3] * num_images, **mixture, vl_branch=True, all_tokens=("pair",))
        out = compiled(layout, ids, pixels)
        if number % 10 == 0:
            wanted = model.forward_packed(layout, ids, pixels)
            for actual, expected in zip(out, wanted, strict=True):
                close(actual, expected)
    assert counter.frame_count <= 2
