"""Packed attention: each implementation against the reference in float64, and its life under torch's tools."""

import pytest
import torch

from vlmo_fast import ops
from vlmo_fast.ops import reference

BACKENDS = ["bucketed", "sdpa", "eager"]


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


@pytest.mark.parametrize("backend", ["bucketed", "sdpa"])
@pytest.mark.parametrize("cls_only", [False, True], ids=["all", "cls"])
def test_opcheck(backend, cls_only):
    (query, key, value, bias), segments, longest = problem(MIXES["all kinds"], cls_only=cls_only, dtype=torch.float32)
    for table in (bias, None):
        arguments = (query, key, value, segments, None, table, longest, cls_only, 0.3, backend)
        torch.library.opcheck(torch.ops.vlmo_fast.packed_attention.default, arguments)
    grad, lse = torch.randn_like(query), torch.empty(0)
    arguments = (grad, query, key, value, segments, segments, bias, grad, lse, longest, cls_only, 0.3, True, backend)
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
