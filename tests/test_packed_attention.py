"""Packed attention: each implementation against the reference in float64, and its life under torch's tools."""

import pytest
import torch

from vlmo_fast import ops
from vlmo_fast.ops import _buckets, dispatch, reference

BACKENDS = ["bucketed", "sdpa", "eager"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton kernels run; on a CPU they are interpreted


def pack(lengths, *, gap=0, text_places=40, order=None):
    """Segments of sequences with (text, image) lengths, rows [texts | pair texts | pair images | images]."""
    table = torch.zeros(len(lengths), 2, 3, dtype=torch.int32)
    kinds = [[i for i, (t, p) in enumerate(lengths) if t and not p], [i for i, (t, p) in enumerate(lengths) if t and p]]
    images = [i for i, (t, p) in enumerate(lengths) if p and not t]
    row = 0
    for part, members in ((0, kinds[0]), (0, kinds[1]), (1, kinds[1]), (1, images)):
        for i in sorted(members, key=order) if order else members:
            table[i, part] = torch.tensor([row, lengths[i][part], text_places * part])
            row += lengths[i][part]
        row += gap if members else 0
    return table, row


def problem(lengths, *, heads=3, width=8, dtype=torch.float64, cls_only=False, bias=True, places=60, gap=0, grad=True):
    segments, num_rows = pack(lengths, gap=gap)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls_only", [False, True], ids=["all", "cls"])
@pytest.mark.parametrize("lengths", MIXES.values(), ids=MIXES)
def test_float64_values_and_gradients(lengths, cls_only, backend):
    tensors, segments, longest = problem(lengths, cls_only=cls_only, gap=2)
    expected, leaves = oracle(tensors, segments, cls_only)
    out = run(tensors, segments, longest, cls_only=cls_only, backend=backend)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, leaves, seed)
    found = torch.autograd.grad(out, tensors, seed)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["bucketed", "sdpa", "triton"])
@pytest.mark.parametrize("cls_only", [False, True], ids=["all", "cls"])
def test_opcheck(backend, cls_only):
    lengths = [(2, 3)] if backend == "triton" else MIXES["all kinds"]  # interpreted, it is slow
    tensors, segments, longest = problem(lengths, cls_only=cls_only, dtype=torch.float32, heads=1, places=45)
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


def test_choices():
    """Triton's kernels on CUDA where they take the problem; elsewhere torch's operators, fused without gradients."""
    half, single, double = torch.bfloat16, torch.float32, torch.float64

    def chosen(*problem, **more):
        return ops.select("packed_attention", ops.Problem(*problem, **more))

    for dtype in (half, torch.float16, single):
        assert chosen("cuda", dtype, True, 64) == "triton"
        assert chosen("cuda", dtype, True, 128) == "triton"
        assert chosen("cuda", dtype, True, 129) == "bucketed"
        assert chosen("cuda", dtype, False, 136) == "sdpa"
    assert chosen("cuda", double, True, 64) == "bucketed"
    assert chosen("cuda", double, False, 64) == "sdpa"
    for dtype in (half, single, double):
        assert chosen("cpu", dtype, True, 64) == chosen("cpu", dtype, False, 64) == "bucketed"
        assert chosen("mps", dtype, True, 64) == "bucketed"
    assert chosen("cpu", single, interpreted=True) == "bucketed"  # never by itself


def test_a_missing_triton_is_passed_over(monkeypatch):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert ops.select("packed_attention", ops.Problem("cuda", torch.bfloat16, True, 64)) == "bucketed"
    with pytest.raises(NotImplementedError, match="needs the package triton"):
        ops.select("packed_attention", ops.Problem("cuda", torch.bfloat16), "triton")


def test_a_graph_may_ask_the_door():
    """Choosing for a CUDA device looks for the package; torch.compile takes the answer as a constant."""

    @torch.compile(fullgraph=True, backend="eager")
    def choose(x):
        chosen = ops.select("packed_attention", ops.Problem("cuda", torch.bfloat16, True, 64))
        return x + 1 if chosen == "triton" else x

    assert choose(torch.zeros(())) == 1


def test_the_kernels_need_cuda_or_the_interpreter(monkeypatch):
    with pytest.raises(NotImplementedError, match=r"'triton' cannot run here \(needs a CUDA device\).*bucketed"):
        ops.select("packed_attention", ops.Problem("cpu", torch.float32), "triton")
    assert ops.select("packed_attention", ops.Problem("cpu", torch.float32, interpreted=True), "triton") == "triton"


@pytest.mark.parametrize("backend", ["auto", "bucketed", "sdpa", "eager"])
def test_the_op_runs_what_was_selected(backend, monkeypatch):
    tensors, segments, longest = problem([(2, 0)], grad=False)
    wanted = "bucketed" if backend == "auto" else backend
    seen = []
    attend = _buckets.attend
    monkeypatch.setattr(_buckets, "attend", lambda *a: seen.append("sdpa" if a[-1] else "bucketed") or attend(*a))
    written_out = reference.packed_attention
    monkeypatch.setattr(reference, "packed_attention", lambda *a: seen.append("eager") or written_out(*a))
    run(tensors, segments, longest, backend=backend)
    assert seen == [wanted]


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
