"""Packed attention: each implementation against the reference in float64, and its life under torch's tools."""

import copy
from contextlib import contextmanager
from dataclasses import replace

import fake_xformers
import pytest
import tolerances
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from vlmo_fast import ops
from vlmo_fast.ops import dispatch, packed, reference
from vlmo_fast.ops.packed import PackedAttentionBackend, bucketed

OP = "packed_attention"
INTERPRETED = ops.Problem("cpu", torch.float32, interpreted=True)
# On a CPU, or interpreted. What cannot run for want of the library is built.
FASTS = [
    row.name
    for row in dispatch.TABLE[OP]
    if row.accepts(INTERPRETED)[0] and isinstance(dispatch.load(OP, row.name), PackedAttentionBackend)
]
FAST = pytest.mark.parametrize("backend", FASTS)
# On any device and in any dtype, in torch alone.
TORCHS = [row.name for row in dispatch.TABLE[OP] if row.accepts(ops.Problem("cpu", torch.float64))[0]]
BUCKETS = pytest.mark.parametrize("backend", [name for name in TORCHS if name in FASTS])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton kernels run; on a CPU they are interpreted


@pytest.fixture(autouse=True)
def _library(request):
    """Builds the CPU library for the tests that run it."""
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "cpu":
        request.getfixturevalue("cpu_extension")


def pack(lengths, *, gap=0, text_places=40):
    """Segments of sequences with (text, image) lengths, rows [texts | pair texts | pair images | images]."""
    table = torch.zeros(len(lengths), 2, 3, dtype=torch.int32)
    kinds = [[i for i, (t, p) in enumerate(lengths) if t and not p], [i for i, (t, p) in enumerate(lengths) if t and p]]
    images = [i for i, (t, p) in enumerate(lengths) if p and not t]
    row = 0
    for part, members in ((0, kinds[0]), (0, kinds[1]), (1, kinds[1]), (1, images)):
        for i in members:
            table[i, part] = torch.tensor([row, lengths[i][part], text_places * part])
            row += lengths[i][part]
        row += gap if members else 0
    return table, row


def problem(
    lengths,
    *,
    heads=3,
    width=8,
    dtype=torch.float64,
    cls_only=False,
    bias=True,
    places=None,
    text_places=None,
    gap=0,
    grad=True,
):
    text_places = max(text for text, _ in lengths) if text_places is None else text_places
    places = text_places + max(image for _, image in lengths) if places is None else places
    segments, num_rows = pack(lengths, gap=gap, text_places=text_places)
    qkv = torch.randn(num_rows, 3, heads, width).to(dtype)
    query, key, value = (x.detach() for x in qkv.unbind(1))  # strided rows, as a projection gives
    if cls_only:
        query = torch.randn(len(lengths), heads, width).to(dtype)
    table = torch.randn(heads, places, places).to(dtype) if bias else None
    tensors = [None if x is None else x.requires_grad_(grad) for x in (query, key, value, table)]
    return tensors, segments, max(map(sum, lengths))


def run(tensors, segments, max_length, **kwargs):
    query, key, value, bias = tensors
    return ops.packed_attention(query, key, value, segments, bias, max_length=max_length, **kwargs)


def oracle(tensors, segments, cls_only=False, scale=None):
    """Values and gradients in float64, the gradients by autograd through the reference."""
    query, key, value, bias = (None if x is None else x.detach().double().requires_grad_() for x in tensors)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = reference.packed_attention(query, key, value, segments, bias, cls_only, scale)
    present = [x for x in (query, key, value, bias) if x is not None]
    return out, present


MIXES = {
    "one text": [(5, 0)],
    "one token": [(1, 0)],
    "one image": [(0, 6)],
    "one pair": [(3, 4)],
    "all kinds": [(3, 0), (0, 5), (2, 4), (7, 0), (0, 5), (2, 4), (1, 6), (3, 0), (3, 0)],
    "an empty sequence": [(3, 0), (0, 0), (2, 4)],
}


@pytest.mark.parametrize("backend", TORCHS)
@pytest.mark.parametrize("cls_only", [False, True], ids=["all", "cls"])
@pytest.mark.parametrize("lengths", MIXES.values(), ids=MIXES)
def test_float64_values_and_gradients(lengths, cls_only, backend):
    check_float64(*problem(lengths, cls_only=cls_only, gap=2), cls_only, backend)


def check_float64(tensors, segments, longest, cls_only, backend):
    """Values and all gradients, to float64's rounding."""
    expected, leaves = oracle(tensors, segments, cls_only)
    out = run(tensors, segments, longest, cls_only=cls_only, backend=backend)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, leaves, seed)
    found = torch.autograd.grad(out, [x for x in tensors if x is not None], seed)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def check_rounding(make, cls_only=False, backend="auto", condition=1.0, device="cpu", dtype=None):
    """Values and all gradients of the problems that `make` draws, within the bounds of `tolerances`."""

    def results():
        tensors, segments, longest = make()
        exact, leaves = oracle(tensors, segments, cls_only)
        moved = [None if x is None else x.detach().to(device).requires_grad_() for x in tensors]
        out = run(moved, segments.to(device), longest, cls_only=cls_only, backend=backend)
        eager = run(tensors, segments, longest, cls_only=cls_only, backend="eager")
        seed = torch.randn_like(eager)
        ours = out, *torch.autograd.grad(out, [x for x in moved if x is not None], seed.to(device))
        others = eager, *torch.autograd.grad(eager, [x for x in tensors if x is not None], seed)
        wanted = exact, *torch.autograd.grad(exact, leaves, seed.double())
        names = ["out", "query", "key", "value", "bias"]
        return {name: (x.cpu(), *rest) for name, x, *rest in zip(names, ours, wanted, others, strict=False)}

    tolerances.check(results, dtype, condition)


ODD = {
    "a token, two, and around 16": [(1, 0), (2, 0), (15, 0), (16, 0), (17, 0), (0, 1), (0, 15), (0, 17)],
    "texts of 196": [(196, 0), (7, 0), (196, 0)],
    "images of 224 px": [(0, 197), (0, 197)],
    "pairs of 237 and 236": [(40, 197), (39, 197)],
    "two image sizes": [(13, 197), (40, 577), (0, 577)],  # 224 and 384 px
    "480 px": [(40, 901)],
}


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("lengths", ODD.values(), ids=ODD)
@BUCKETS
def test_float32_of_odd_lengths(lengths, backend):
    make = lambda: problem(lengths, heads=2, width=16, dtype=torch.float32, places=941, text_places=40)
    check_rounding(make, False, backend)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [16, 32, 34, 64, 128])
@BUCKETS
def test_rounding_of_dtypes_and_head_sizes(backend, dtype, width):
    lengths = [(12, 0), (9, 21), (0, 21), (9, 21), (14, 0)]
    check_rounding(lambda: problem(lengths, width=width, dtype=dtype), False, backend)
    check_rounding(lambda: problem(lengths, width=width, dtype=dtype, cls_only=True), True, backend)


def with_large_bias(drawn):
    """Scores of hundreds, and a row of the bias in which all keys are alike."""
    with torch.no_grad():
        drawn[0][3].mul_(300)
        drawn[0][3][:, 3] = 1e4
    return drawn


@BUCKETS
def test_large_bias(backend):
    """Scores of hundreds: the softmax is nearly one key's, and exp of a score would overflow."""
    make = lambda dtype: with_large_bias(problem([(12, 9), (5, 0), (0, 9)], dtype=dtype))
    check_float64(*make(torch.float64), False, backend)
    check_rounding(lambda: make(torch.float32), False, backend, condition=1e4)


def leave_keys_out(bias):
    """-inf where one row of the bias leaves out its own segment, another the other one, and all rows a key."""
    with torch.no_grad():
        bias[:, 8, :12] = bias[:, 14, :12] = bias[:, :, 7] = float("-inf")


@BUCKETS
def test_keys_that_the_bias_leaves_out(backend):
    tensors, segments, longest = problem([(12, 9), (5, 0)])
    leave_keys_out(tensors[3])
    check_float64(tensors, segments, longest, False, backend)


@BUCKETS
def test_a_thousand_sequences(backend):
    generator = torch.Generator().manual_seed(3)
    lengths = [tuple(torch.randint(0, 5, (2,), generator=generator).tolist()) for _ in range(1000)]
    check_float64(*problem(lengths, heads=1, width=4), False, backend)


def test_chunks_of_sequences_and_of_heads(monkeypatch):
    """A limit of scores that holds two of the small sequences, and one head of the large ones."""
    monkeypatch.setitem(bucketed.CHUNK_BYTES, "cpu", 2 * 3 * 5 * 5 * 8)
    lengths = [(5, 0)] * 5 + [(4, 8)] * 3
    for cls_only in (False, True):
        check_float64(*problem(lengths, cls_only=cls_only), cls_only, "bucketed")


def test_a_sequence_does_not_depend_on_the_others():
    """Nor on where its rows lie: alone, it gives the same to rounding."""
    lengths = [(3, 4), (5, 0), (3, 4), (0, 4)]
    (query, key, value, bias), segments, longest = problem(lengths, grad=False)
    whole = ops.packed_attention(query, key, value, segments, bias, max_length=longest)
    for table in segments:
        rows = torch.cat([torch.arange(int(row), int(row + length)) for row, length, _ in table])
        alone = table.clone()
        alone[:, 0] = torch.tensor([0, int(table[0, 1])])
        picked = (x[rows] for x in (query, key, value))
        out = ops.packed_attention(*picked, alone[None], bias, max_length=longest)
        torch.testing.assert_close(out, whole[rows], rtol=1e-13, atol=1e-14)


def test_cls_only_is_the_first_row_of_each():
    (query, key, value, bias), segments, longest = problem(MIXES["all kinds"], grad=False)
    first = [int(table[0, 0] if table[0, 1] else table[1, 0]) for table in segments]
    whole = ops.packed_attention(query, key, value, segments, bias, max_length=longest)
    short = ops.packed_attention(query[first], key, value, segments, bias, max_length=longest, cls_only=True)
    torch.testing.assert_close(short, whole[first], rtol=1e-13, atol=1e-14)


@BUCKETS
@pytest.mark.parametrize("needed", [0, 1, 2, 3], ids=["query", "key", "value", "bias"])
def test_one_gradient_alone(needed, backend):
    """Also that of the bias alone, at which SDPA's memory-efficient kernel fails."""
    tensors, segments, longest = problem(MIXES["one pair"])
    detached = [x.detach().requires_grad_(index == needed) for index, x in enumerate(tensors)]
    seed = torch.randn_like(tensors[0])
    (ours,) = torch.autograd.grad(run(detached, segments, longest, backend=backend), detached[needed], seed)
    wanted = torch.autograd.grad(run(tensors, segments, longest, backend="eager"), tensors[needed], seed)
    torch.testing.assert_close(ours, wanted[0], rtol=1e-12, atol=1e-13)


def test_gradcheck():
    tensors, segments, longest = problem([(2, 3), (1, 0), (0, 3)], heads=2, width=3)
    assert torch.autograd.gradcheck(lambda *tensors: run(tensors, segments, longest), tensors)


def test_non_contiguous_inputs():
    tensors, segments, longest = problem(MIXES["all kinds"], grad=False)
    query, key, value, bias = tensors
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, key, value)]
    wide = bias.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided[0].is_contiguous()
    assert not wide.is_contiguous()
    torch.testing.assert_close(run([*strided, wide], segments, longest), run(tensors, segments, longest))


def test_a_plan_is_not_kept_for_another_table():
    """The plans of the last tables are kept by value: a table that was changed in place is another."""
    tensors, segments, longest = problem([(4, 0), (4, 0)], grad=False)
    first = run(tensors, segments, longest)
    segments[:, 0, 0] = segments[:, 0, 0].flip(0)
    torch.testing.assert_close(run(tensors, segments, longest), first)
    segments[:, 0, 1] = 3
    assert (run(tensors, segments, longest) - first).abs().max() > 1e-3


# Under torch's tools


def test_autocast():
    """The projections come in bfloat16, the bias in float32; scores are in float32 whatever autocast says."""
    tensors, segments, longest = problem(MIXES["all kinds"], dtype=torch.bfloat16)
    mixed = [*tensors[:3], tensors[3].detach().float().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(mixed, segments, longest)
    plain = run(mixed, segments, longest)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, plain)
    seed = torch.randn_like(ours)
    for one, other in zip(torch.autograd.grad(ours, mixed, seed), torch.autograd.grad(plain, mixed, seed), strict=True):
        assert torch.equal(one, other)
    assert torch.autograd.grad(run(mixed, segments, longest), mixed[3], seed)[0].dtype == torch.float32


def small_problem(backend):
    """Float32, on the device where the implementation runs; for interpreted kernels the fewest tokens."""
    tensors, segments, longest = problem([(2, 3), (4, 0)] if backend == "triton" else MIXES["all kinds"])
    device = DEVICE if backend == "triton" else "cpu"
    return [x.detach().float().to(device).requires_grad_() for x in tensors], segments.to(device), longest


@FAST
def test_activation_checkpointing(backend):
    tensors, segments, longest = small_problem(backend)

    def step(*tensors):
        return run(tensors, segments, longest, backend=backend).square()

    seed = torch.randn_like(tensors[0])
    ours = torch.autograd.grad(checkpoint(step, *tensors, use_reentrant=False), tensors, seed)
    for one, other in zip(ours, torch.autograd.grad(step(*tensors), tensors, seed), strict=True):
        assert torch.equal(one, other)


@FAST
def test_export(backend):
    """Exported once, run on other lengths."""

    class Layer(torch.nn.Module):
        def forward(self, query, key, value, segments, bias):
            return ops.packed_attention(query, key, value, segments, bias, max_length=32, backend=backend)

    def inputs(lengths):
        tensors, segments, _ = problem(lengths, heads=1, places=16, text_places=9, grad=False, dtype=torch.float32)
        device = DEVICE if backend == "triton" else "cpu"
        query, key, value, bias = (x.to(device) for x in tensors)
        return query, key, value, segments.to(device), bias

    rows, sequences = torch.export.Dim("rows", min=2), torch.export.Dim("sequences", min=2)
    shapes = ({0: rows}, {0: rows}, {0: rows}, {0: sequences}, None)
    program = torch.export.export(Layer(), inputs([(3, 4), (2, 0)]), dynamic_shapes=shapes).module()
    others = inputs([(3, 0), (0, 5), (2, 4)])
    torch.testing.assert_close(program(*others), Layer()(*others), rtol=0, atol=0)


def test_flop_formula():
    """Counted as if each sequence had the largest length."""
    tensors, segments, _ = problem([(3, 4), (2, 0)], heads=2, width=8)
    with FlopCounterMode(display=False) as counter:
        run(tensors, segments, 7).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 9 * 2 * 8 * 7


@FAST
@pytest.mark.usefixtures("nan_filled_empty")
def test_deterministic(backend):
    """Under torch's deterministic algorithms, and the same bits twice."""
    torch.use_deterministic_algorithms(True)
    tensors, segments, longest = small_problem(backend)
    seed = torch.randn_like(tensors[0])
    first, second = (
        torch.autograd.grad(run(tensors, segments, longest, backend=backend), tensors, seed) for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@FAST
def test_compiles_whole(backend):
    """Forward and backward in one graph each, with the values of the plain call."""
    tensors, segments, longest = small_problem(backend)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(*tensors):
        return 2 * run(tensors, segments, longest, backend=backend)

    seed = torch.randn_like(tensors[0])
    compiled, plain = step(*tensors), 2 * run(tensors, segments, longest, backend=backend)
    assert torch.equal(compiled, plain)
    results = (torch.autograd.grad(out, tensors, seed) for out in (compiled, plain))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@FAST
def test_second_derivatives_are_refused(backend):
    tensors, segments, longest = small_problem(backend)
    out = run(tensors, segments, longest, backend=backend)
    (first,) = torch.autograd.grad(out.square().sum(), tensors[3], create_graph=True)
    with pytest.raises(NotImplementedError, match='packed_attention: double backward needs backend="eager"'):
        first.sum().backward()


def test_second_derivatives_of_the_reference():
    tensors, segments, longest = problem(MIXES["one pair"])
    out = run(tensors, segments, longest, backend="eager")
    (first,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    first.square().sum().backward()
    assert all(x.grad.count_nonzero() for x in tensors)


@FAST
@pytest.mark.parametrize("cls_only", [False, True], ids=["all", "cls"])
def test_opcheck(backend, cls_only):
    lengths = [(2, 3)] if backend == "triton" else MIXES["all kinds"]  # interpreted, it is slow
    tensors, segments, longest = problem(lengths, cls_only=cls_only, dtype=torch.float32, heads=1)
    query, key, value, bias = (x.detach().to(DEVICE).requires_grad_() for x in tensors)
    segments = segments.to(DEVICE)
    for table in (bias, None):
        arguments = (query, key, value, segments, None, table, longest, cls_only, 0.3, backend)
        torch.library.opcheck(torch.ops.vlmo_fast.packed_attention.default, arguments)
    out, stats = torch.ops.vlmo_fast.packed_attention(*arguments[:5], bias, *arguments[6:])
    grad = torch.randn_like(out)
    arguments = (grad, query, key, value, segments, None, bias, out, stats, longest, cls_only, 0.3, True, backend)
    arguments = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    torch.library.opcheck(torch.ops.vlmo_fast.packed_attention_backward.default, arguments)


def test_many_compositions_compile_twice():
    """Lengths are tensors' values: other mixtures of other sizes need no new graph once the sizes are symbols."""
    compiled_graphs = []

    def count(graph, _):
        compiled_graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def step(query, key, value, segments, bias, max_length):
        return 2 * ops.packed_attention(query, key, value, segments, bias, max_length=max_length)

    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        lengths = [tuple(torch.randint(0, 9, (2,), generator=generator).tolist()) for _ in range(4)]
        lengths = [*lengths[: int(torch.randint(2, 5, (), generator=generator))], (3, 2)]
        tensors, segments, longest = problem(lengths, dtype=torch.float32)
        query, key, value, bias = tensors
        out = step(query, key, value, segments, bias, longest)
        torch.testing.assert_close(out, 2 * run(tensors, segments, longest), rtol=0, atol=0)
        seed = torch.randn_like(out)
        for ours, theirs in zip(
            torch.autograd.grad(out, tensors, seed),
            torch.autograd.grad(2 * run(tensors, segments, longest), tensors, seed),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert len(compiled_graphs) <= 2


# The door


@pytest.mark.usefixtures("cpu_extension")
def test_choices(monkeypatch):
    """On a CPU the library, in float32 and where it is built; else torch's operators, fused in full precision.

    Triton's kernels by name alone, until they have run on a GPU.
    """
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None if name == "xformers" else name)
    monkeypatch.setattr(dispatch, "_has_avx2", lambda: True)
    half, single, double = torch.bfloat16, torch.float32, torch.float64

    def chosen(*problem, **more):
        return ops.select("packed_attention", ops.Problem(*problem, **more))

    for dtype in (half, torch.float16, single):
        assert chosen("cuda", dtype, True, 64) == ("sdpa" if dtype == single else "bucketed")
        assert chosen("cuda", dtype, False, 64) == "sdpa"
        assert ops.select("packed_attention", ops.Problem("cuda", dtype, True, 128), "triton") == "triton"
        with pytest.raises(NotImplementedError, match="takes heads up to 128 wide"):
            ops.select("packed_attention", ops.Problem("cuda", dtype, True, 129), "triton")
    with pytest.raises(NotImplementedError, match=r"needs compute capability 8\.0\); these can: \['sdpa', 'bucketed'"):
        ops.select("packed_attention", ops.Problem("cuda", half, True, 64, capability=(7, 5)), "triton")
    with pytest.raises(NotImplementedError, match="takes float32, float16 and bfloat16"):
        ops.select("packed_attention", ops.Problem("cuda", double), "triton")
    for device in ("cuda", "cpu", "mps"):
        assert chosen(device, double, True, 64) == chosen(device, double, False, 64) == "sdpa"
    for needs_grad in (False, True):
        assert chosen("cpu", half, needs_grad, 64) == "bucketed"
        assert chosen("cpu", single, needs_grad, 64) == "cpu"
    assert chosen("cpu", single, interpreted=True) == "cpu"  # the kernels never by themselves
    monkeypatch.setattr(dispatch, "_is_built", lambda name: False)
    assert chosen("cpu", single, True, 64) == "sdpa"


def test_xformers_is_chosen_where_it_is_installed(monkeypatch):
    """For inference in half precision on GPUs that its kernel for a bias takes; elsewhere by name, or not at all."""
    monkeypatch.setattr(dispatch, "find_spec", lambda name: name)
    inference = ops.Problem("cuda", torch.bfloat16, False, 64, capability=(9, 0))

    def chosen(backend="auto", **change):
        return ops.select("packed_attention", replace(inference, **change), backend)

    for dtype in (torch.bfloat16, torch.float16):
        for capability in ((8, 0), (8, 9), (9, 0)):
            assert chosen(dtype=dtype, capability=capability) == "xformers"
    others = ({"needs_grad": True}, "bucketed"), ({"dtype": torch.float32}, "sdpa"), ({"head_dim": 34}, "xformers")
    for change, name in others:
        assert chosen(**change) == name
        assert chosen("xformers", **change) == "xformers"
    for change, name, why in (
        ({"dtype": torch.float64}, "sdpa", "xformers takes float32, float16 and bfloat16"),
        ({"capability": (10, 0)}, "sdpa", r"up to compute capability 9.0, this device has \(10, 0\)"),
        ({"device": "cpu"}, "bucketed", "xformers runs on CUDA devices, not on cpu"),
    ):
        assert chosen(**change) == name
        with pytest.raises(NotImplementedError, match=why):
            chosen("xformers", **change)


def test_a_missing_triton_is_passed_over(monkeypatch):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert ops.select("packed_attention", ops.Problem("cuda", torch.bfloat16, True, 64)) == "bucketed"
    with pytest.raises(NotImplementedError, match="needs the package triton"):
        ops.select("packed_attention", ops.Problem("cuda", torch.bfloat16), "triton")


def test_a_graph_may_ask_the_door():
    """Choosing for a CUDA device looks for the package; torch.compile takes the answer as a constant."""

    @torch.compile(fullgraph=True, backend="eager")
    def choose(x):
        chosen = ops.select("packed_attention", ops.Problem("cuda", torch.bfloat16, True, 64), "triton")
        return x + 1 if chosen == "triton" else x

    assert choose(torch.zeros(())) == 1


def test_the_kernels_need_cuda_or_the_interpreter(monkeypatch):
    with pytest.raises(NotImplementedError, match=r"'triton' cannot run here \(needs a CUDA device\).*bucketed"):
        ops.select("packed_attention", ops.Problem("cpu", torch.float32), "triton")
    assert ops.select("packed_attention", ops.Problem("cpu", torch.float32, interpreted=True), "triton") == "triton"


@pytest.mark.parametrize("backend", ["auto", *TORCHS])
def test_the_op_runs_what_was_selected(backend, monkeypatch):
    """The code of the row and no other's."""
    tensors, segments, longest = problem([(2, 0)], grad=False)
    wanted = "sdpa" if backend == "auto" else backend
    seen = []
    for row in dispatch.TABLE["packed_attention"]:
        code = dispatch.load("packed_attention", row.name)
        if isinstance(code, PackedAttentionBackend):
            spy = copy.copy(code)
            spy.forward = lambda *a, name=row.name, code=code: seen.append(name) or code.forward(*a)
        else:
            spy = lambda *a, name=row.name, code=code: seen.append(name) or code(*a)
        monkeypatch.setitem(row.__dict__, "implementation", spy)
    run(tensors, segments, longest, backend=backend)
    assert seen == [wanted]


def test_what_xformers_is_given(monkeypatch):
    """Its kernels need a GPU; what reaches them is held to its own rules, and to the reference."""
    fake_xformers.install(monkeypatch)
    monkeypatch.setattr(packed, "select", lambda *_: "xformers")
    for bias, cls_only in ((True, False), (False, False), (True, True)):
        for width in (8, 34):
            tensors, segments, longest = problem(MIXES["all kinds"], bias=bias, cls_only=cls_only, width=width)
            check_float64(tensors, segments, longest, cls_only, "xformers")
    tensors, segments, longest = problem(MIXES["all kinds"], dtype=torch.bfloat16, grad=False)
    tensors[3] = tensors[3].float()  # mixed precision
    assert run(tensors, segments, longest).dtype == torch.bfloat16


@pytest.mark.usefixtures("nan_filled_empty")
def test_kernels_start_on_the_tensors_device(monkeypatch):
    """Triton launches on the current device; both passes make it the query's."""
    from vlmo_fast.kernels import attention as kernels

    current, seen = [], []

    @contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name in ("forward", "backward"):
        launch = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, launch=launch: seen.append(list(current)) or launch(*a))
    tensors, segments, longest = small_problem("triton")
    run(tensors, segments, longest, backend="triton").sum().backward()
    assert seen == [[tensors[0].device]] * 2


# What is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": torch.ones(5, 2)}, ValueError, r"key and value must be \(N, H, d\) alike, got \(5, 2\)"),
        ({"query": torch.ones(4, 2, 4)}, ValueError, r"query must be \(N, H, d\) = \(5, 2, 4\), got \(4, 2, 4\)"),
        ({"cls_only": True}, ValueError, r"query must be \(B, H, d\) = \(1, 2, 4\), got \(5, 2, 4\)"),
        ({"value": torch.ones(5, 2, 4).double()}, TypeError, r"share one float dtype, got torch.float32, .*float64"),
        ({"segments": torch.zeros(2, 3).int()}, ValueError, r"segments must be \(B, 2, 3\), got \(2, 3\)"),
        ({"segments": torch.zeros(1, 2, 3).long()}, TypeError, r"segments must be int32, got torch.int64"),
        ({"bias": torch.ones(2, 3, 4)}, ValueError, r"bias must be \(H, R, R\) with H = 2, got \(2, 3, 4\)"),
        ({"bias": torch.ones(2, 5, 5).int()}, TypeError, r"bias must be of a float dtype, got torch.int32"),
        ({"bias": torch.ones(2, 5, 5, device="meta")}, ValueError, r"bias must be on the query's device cpu, got meta"),
        ({"host_segments": torch.zeros(2, 2, 3).int()}, ValueError, r"host_segments must be \(1, 2, 3\) like segments"),
        ({"host_segments": torch.zeros(1, 2, 3)}, TypeError, r"host_segments must be int32 on the CPU, got .*float32"),
    ],
)
def test_refuses_shapes_and_dtypes(change, error, message):
    tensors = {name: torch.ones(5, 2, 4) for name in ("query", "key", "value")}
    arguments = tensors | {"segments": torch.tensor([[[0, 3, 0], [3, 2, 3]]]).int(), "bias": torch.ones(2, 5, 5)}
    with pytest.raises(error, match=f"^packed_attention: .*{message}"):
        ops.packed_attention(**(arguments | change), max_length=5)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[[0, 3, 0], [3, 3, 3]]], "segments must stay within 5 rows, got 6"),
        ([[[0, 3, 0], [2, 2, 3]]], "segments must not overlap"),
        ([[[0, 3, 0], [3, 2, 4]]], "segments must stay within 5 bias rows, got 6"),
        ([[[0, 3, 0], [3, 2, 2]]], "segments must not share bias rows"),
        ([[[0, -3, 0], [3, 2, 3]]], "segments must not be negative, got -3"),
        ([[[0, 3, -1], [3, 2, 3]]], "segments must not be negative, got -1"),
        ([[[0, 3, 0], [3, 2, 3]]], "max_length must be at least 5 tokens, got 4"),
    ],
)
def test_refuses_impossible_segments(table, message):
    tensors = [torch.ones(5, 2, 4)] * 3
    with pytest.raises(ValueError, match=f"^packed_attention: .*{message}"):
        ops.packed_attention(*tensors, torch.tensor(table).int(), torch.ones(2, 5, 5), max_length=4)
