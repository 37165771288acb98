"""Packed tokens: the plan itself, and the packed model against the padded one."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from vlmo_fast import MoMEConfig, MoMETransformer, pack
from vlmo_fast.block import MoMEBlock
from vlmo_fast.packing import KINDS, _to_device
from vlmo_fast.rows import LayerRows

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


def build(kind="relative", *, add_mask_token=False, **options):
    torch.manual_seed(0)
    scale = {"relative": 0.5, "absolute": None}[kind]
    sizes = {**SIZES, "position_embedding_type": kind, "layer_scale_init_value": scale, **options}
    model = MoMETransformer(MoMEConfig(**sizes), add_mask_token=add_mask_token)
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


@pytest.mark.parametrize("vl_layers", [4, 0])
def test_every_layer_fuses_or_none_does(vl_layers):
    """The branch then starts at the embeddings, or there is none."""
    model, ids, pixels = build(num_vl_layers=vl_layers).requires_grad_(False), texts(), images()
    arguments = model, ids, pixels, MIXTURES["all"], vl_layers > 0
    padded, packed = padded_results(*arguments), packed_results(*arguments)
    for kind in KINDS:
        for (ours, _), (wanted, _) in zip(packed[kind], padded[kind], strict=True):
            close(ours, wanted)


@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_image_types_and_masked_patches(kind):
    """Each image's own, also where images of several sizes come as several tensors, and in a drop-in call."""
    model, ids, pixels = build(kind, num_image_types=2, add_mask_token=True).requires_grad_(False), texts(), images()
    types = torch.tensor([1, 2, 2, 2])
    layout = pack((), windows())
    packed = model.forward_packed(layout, None, pixels, image_type_ids=types).image_embeds
    for ours, image, number in zip(packed, pixels, types.tolist(), strict=True):
        alone = model(pixel_values=image, image_type_ids=number, interpolate_pos_encoding=True)
        close(ours, alone.image_embeds[0])
    for wrong, message in ((types + 1, "from 1 to num_image_types=2"), (types[:3], r"an int or \(4,\), got \(3,\)")):
        with pytest.raises(ValueError, match=f"image_type_ids must be {message}"):
            model.forward_packed(layout, None, pixels, image_type_ids=wrong)

    square, masked = torch.cat(images((24, 24))), torch.rand(2, 9) < 0.5
    options = {"image_type_ids": types[:2], "bool_masked_pos": masked}
    padded = model(pixel_values=square, **options)
    close(model.forward_packed(pack((), [3, 3]), None, square, **options).image_embeds, padded.image_embeds)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    pooled = model(ids[:2, :5], mask, square, **options).pooler_output
    close(model(ids[:2, :5], mask, square, cls_only=True, **options).pooler_output, pooled)


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


def test_few_sizes_of_the_bias_occur():
    """Each would be compiled for, or captured, on its own."""
    assert {pack([length]).text_span for length in range(1, 41)} == {8, 16, 24, 32, 40}


def test_moving_a_layout_changes_nothing():
    """One buffer travels to the device; here it comes back to the same one."""
    layout = pack(LENGTHS, windows(), **MIXTURES["all"], vl_branch=True, all_tokens=("pair",))
    moved = _to_device(layout, torch.device("cpu"))

    def same(a, b):
        if isinstance(a, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, LayerRows):
            return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
        return all(map(same, a, b)) if isinstance(a, tuple) else a == b

    for field in dataclasses.fields(layout):
        assert same(getattr(layout, field.name), getattr(moved, field.name)), field.name


def test_padding_is_never_read():
    """What stands in the ids after a text's end is anything; a drop-in call for first tokens skips it too."""
    model, ids = build().requires_grad_(False), texts()[:4, :12]
    mask = torch.arange(12) < torch.tensor(LENGTHS[:4])[:, None]
    plain = model(ids, mask, use_vl_branch=True)
    short = model(ids.masked_fill(~mask, 0), mask, use_vl_branch=True, cls_only=True)
    for name in ("text_embeds", "vl_text_embeds"):
        close(getattr(short, name), getattr(plain, name))
    close(short.last_hidden_state, plain.last_hidden_state[:, :1])
    close(short.vl_last_hidden_state, plain.vl_last_hidden_state[:, :1])
    pixels = torch.cat([image for image, side in zip(images(), SIDES, strict=True) if side == 24])[:2]
    pooled = model(ids[:2], mask[:2], pixels, image_type_ids=1).pooler_output
    close(model(ids[:2], mask[:2], pixels, image_type_ids=1, cls_only=True).pooler_output, pooled)
    holes = mask.clone()
    holes[0, 3] = False  # not padding at the end: computed as padded
    close(model(ids, holes, cls_only=True).text_embeds, model(ids, holes).text_embeds)


def test_drop_path_is_drawn_for_each_sequence():
    """A dropped branch is dropped for all rows of its sequence; the VL branch of a text draws for itself."""
    model = build(drop_path_rate=0.5).train().requires_grad_(False)
    layout = pack([4] * 300, texts=range(300), vl_branch=True, all_tokens=("text", "vl_text"))
    scales, original = [], MoMEBlock._row_scale

    def spy(block, x, rows, num_draws):
        scale = original(block, x, rows, num_draws)
        scales.append((block, rows, scale))
        return scale

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoMEBlock, "_row_scale", spy)
        model.forward_packed(layout, texts((4,) * 300))
    scale = next(scale for block, rows, scale in scales if block is model.blocks[3]).view(600, 4)
    assert torch.equal(scale, scale[:, :1].expand(-1, 4))
    kept = (scale[:, 0] > 0).view(2, 300)
    # four outcomes of (plain, branch), 300 / 4 = 75 each, standard deviation 7.5; five of them
    counts = [int((kept[0] == a).logical_and(kept[1] == b).sum()) for a in (True, False) for b in (True, False)]
    assert all(abs(count - 75) <= 38 for count in counts), counts


def test_drop_path_of_pairs_is_drawn_for_each_half():
    """Where a pair's text and image have experts of their own these are dropped apart; attention for both at once."""
    model = build(drop_path_rate=0.5, num_vl_layers=0).train().requires_grad_(False)
    numbers = torch.arange(300)
    layout = pack([4] * 300, [3] * 300, pairs=numbers[:, None].expand(-1, 2), all_tokens=("pair",))
    attention, experts = (model.blocks[3]._row_scale(torch.zeros(1), layout.last, draws) for draws in (1, 2))
    for scale, apart in ((attention, False), (experts, True)):
        text, image = (part.view(300, -1) for part in scale.split([300 * 4, 300 * 10]))
        for part in (text, image):
            assert torch.equal(part, part[:, :1].expand_as(part))
        agree = int((text[:, 0] == image[:, 0]).sum())
        assert abs(agree - 150) <= 43 if apart else agree == 300  # standard deviation 8.7; five of them


def test_gradient_checkpointing_of_packed_batches():
    """The same bits, and each block really runs twice."""
    model = build()
    gradients, calls = [], []
    model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(model.gradient_checkpointing))
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        layout = pack(LENGTHS, windows(), **MIXTURES["all"], vl_branch=True)
        model.forward_packed(layout, texts(), images()).last_hidden_state.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert calls == [False, True, True]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "texts, images or pairs must hold a sequence, got none"),
        ({"text_lengths": [3, 0]}, ValueError, "text_lengths must be at least 1, got 0"),
        ({"text_lengths": [3.0]}, TypeError, "text_lengths must be integers, got torch.float32"),
        ({"text_lengths": [True]}, TypeError, "text_lengths must be integers, got torch.bool"),
        ({"text_lengths": [[3]]}, ValueError, r"text_lengths must be one-dimensional, got shape \(1, 1\)"),
        ({"image_windows": [-1]}, ValueError, "image_windows must be at least 1, got -1"),
        ({"text_lengths": [3], "texts": [1]}, ValueError, "texts must be from 0 to 0, got 1"),
        ({"text_lengths": [3], "texts": [-1]}, ValueError, "texts must be from 0 to 0, got -1"),
        ({"image_windows": [3], "images": [4]}, ValueError, "images must be from 0 to 0, got 4"),
        (
            {"text_lengths": [3], "image_windows": [3], "pairs": [(0, 1)]},
            ValueError,
            "pairs must name images from 0 to 0, got 1",
        ),
        ({"text_lengths": [3], "pairs": [0]}, ValueError, r"pairs must be \(text, image\) each, got shape \(1,\)"),
        ({"text_lengths": [3], "all_tokens": ["texts"]}, ValueError, r"all_tokens must be some of .* got \['texts'\]"),
        (
            {"text_lengths": torch.ones(2, dtype=torch.int64, device="meta")},
            ValueError,
            "text_lengths must be on the host .* got a tensor on meta",
        ),
    ],
)
def test_pack_refuses(arguments, error, message):
    with pytest.raises(error, match=f"^pack: {message}"):
        pack(**arguments)


def test_forward_packed_refuses():
    model, ids, pixels = build(), texts(), images()
    layout = pack(LENGTHS, windows(), **MIXTURES["all"])
    cases = [
        ((None, pixels), {}, ValueError, "input_ids must be given for a layout of texts, and only then, got None"),
        ((ids[:4], pixels), {}, ValueError, r"input_ids must be the layout's \(5, 196 or more\), got \(4, 196\)"),
        ((ids[:, :100], pixels), {}, ValueError, r"input_ids must be the layout's .* got \(5, 100\)"),
        ((ids, None), {}, ValueError, "pixel_values must be the layout's images .2 of 24 px, 1 of 32 px.*got none"),
        ((ids, pixels[:3]), {}, ValueError, "pixel_values must be the layout's images .*got 2 of 24 px, 1 of 32 px"),
        ((ids, pixels), {"bool_masked_pos": torch.ones(4, 9).bool()}, ValueError, "come with images of one size"),
    ]
    for inputs, options, error, message in cases:
        with pytest.raises(error, match=f"^MoMETransformer.forward_packed: .*{message}"):
            model.forward_packed(layout, *inputs, **options)
    with pytest.raises(ValueError, match="layout was packed with vl_branch=True, but the model has num_vl_layers=0"):
        build(num_vl_layers=0).forward_packed(pack([3], vl_branch=True), ids[:1, :3])
