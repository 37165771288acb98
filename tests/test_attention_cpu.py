"""Attention in the CPU library, of padded and of packed batches, on every instruction set."""

from collections.abc import Callable
from typing import Any

import pytest
import tolerances
import torch
from cpu_library import CAPABILITIES, CpuLibrary
from test_packed_attention import MIXES, ODD, leave_keys_out, problem, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from vlmo_fast import ops
from vlmo_fast.ops import dispatch, reference

pytestmark = pytest.mark.usefixtures("cpu_extension")


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest, compiled: CpuLibrary) -> str:
    """Each instruction set in turn."""
    if not compiled.use(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    assert compiled.capability == request.param
    return str(request.param)


def padded(
    batch: int, queries: int, keys: int, *, heads: int = 2, width: int = 16, bias: bool = True, mask: bool = True
) -> tuple[list[Tensor], Tensor | None]:
    """Query, key, value and bias, which want gradients, and a mask of keys here and there."""
    of_queries, of_keys = torch.randn(batch, queries, heads, width), torch.randn(batch, keys, 2, heads, width)
    tensors = [of_queries.transpose(1, 2), *(x.transpose(1, 2) for x in of_keys.unbind(2))]
    if bias:
        tensors.append(torch.randn(heads, queries, keys))
    visible = torch.rand(batch, keys) > 0.3 if mask else None
    if visible is not None:
        visible[:, :1] = True
    return [x.detach().requires_grad_() for x in tensors], visible


def check_draws(
    make: Callable[[], list[Tensor]],
    attend: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    condition: float = 1.0,
) -> None:
    """Values and all gradients of several draws within the bounds of `tolerances`.

    Args:
        make: draws query, key, value and, if there is one, the bias.
        attend: the op, given its backend and these.
        oracle: the reference, given these in float64.
        condition: as in `tolerances`.
    """
    results = []
    for _ in range(tolerances.DRAWS):
        tensors = make()
        exact = [x.detach().double().requires_grad_() for x in tensors]
        outs = attend("cpu", *tensors), oracle(*exact), attend("eager", *tensors)
        seed = torch.randn_like(outs[0])
        results.append(
            [
                (out, *torch.autograd.grad(out, inputs, seed.to(out.dtype)))
                for out, inputs in zip(outs, (tensors, exact, tensors), strict=True)
            ]
        )
    for place, name in enumerate(("out", "query", "key", "value", "bias")[: len(results[0][0])]):
        triples = [(ours[place], wanted[place], eager[place]) for ours, wanted, eager in results]
        tolerances.check_draws(name, triples, condition=condition)


def check_packed(
    lengths: list[tuple[int, int]],
    *,
    cls_only: bool = False,
    edit: Callable[[Tensor], None] = lambda bias: None,
    **shape: Any,
) -> None:
    _, segments, longest = problem(lengths, cls_only=cls_only, dtype=torch.float32, **shape)

    def attend(backend: str, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return run((query, key, value, bias), segments, longest, cls_only=cls_only, backend=backend)

    def oracle(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.packed_attention(query, key, value, segments, bias, cls_only, query.shape[-1] ** -0.5)

    def make() -> list[Tensor]:
        tensors = [x for x in problem(lengths, cls_only=cls_only, dtype=torch.float32, **shape)[0] if x is not None]
        edit(tensors[-1])
        return tensors

    check_draws(make, attend, oracle)


def check_padded(make: Callable[[], tuple[list[Tensor], Tensor | None]], condition: float = 1.0) -> None:
    _, mask = make()

    def attend(backend: str, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.attention(query, key, value, bias, mask, scale=0.4, backend=backend)

    def oracle(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.attention(query, key, value, bias, mask, 0.4)

    check_draws(lambda: make()[0], attend, oracle, condition)


@pytest.mark.usefixtures("capability", "nan_filled_empty")
@pytest.mark.parametrize("lengths", [*MIXES.values(), *list(ODD.values())[:4]], ids=[*MIXES, *list(ODD)[:4]])
@pytest.mark.parametrize("cls_only", [False, True], ids=["all", "cls"])
def test_packed(lengths, cls_only):
    for bias in (True, False):
        check_packed(lengths, cls_only=cls_only, heads=2, width=16, gap=2, bias=bias)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("lengths", list(ODD.values())[4:], ids=list(ODD)[4:])
def test_long_sequences(lengths):
    """On the instruction set that is chosen: the oracle takes its time."""
    check_packed(lengths, heads=2, width=16, places=941, text_places=40)


@pytest.mark.usefixtures("capability", "nan_filled_empty")
@pytest.mark.parametrize("width", [1, 3, 16, 32, 34, 63, 64, 65, 80, 128, 200])
def test_head_sizes(width):
    """Whole vectors, a rest of one, and more than a tile is wide."""
    check_packed([(12, 0), (9, 21), (0, 21), (50, 3)], width=width)


@pytest.mark.usefixtures("capability", "nan_filled_empty")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("mask", [True, False], ids=["mask", "all"])
@pytest.mark.parametrize(
    ("batch", "queries", "keys"),
    [(2, 5, 5), (3, 1, 9), (2, 7, 3), (1, 49, 96), (2, 48, 47), (2, 97, 100), (1, 6, 16), (2, 12, 17), (1, 1, 1)],
)
def test_padded(batch, queries, keys, bias, mask):
    """Around blocks of 48 queries, tiles of 6 and vectors of 4 to 16 keys."""
    check_padded(lambda: padded(batch, queries, keys, bias=bias, mask=mask))


@pytest.mark.usefixtures("capability")
def test_large_scores():
    """Of hundreds, where exp of a score would overflow; whole rows alike."""

    def make() -> tuple[list[Tensor], Tensor | None]:
        tensors, mask = padded(2, 50, 37)
        with torch.no_grad():
            tensors[3].mul_(300)
            tensors[3][:, 3] = 1e4
        return tensors, mask

    check_padded(make, condition=1e4)


@pytest.mark.usefixtures("capability")
def test_keys_that_the_bias_leaves_out():
    check_packed([(12, 9), (5, 0)], edit=leave_keys_out)


@pytest.mark.usefixtures("capability")
def test_what_is_not_finite_stays_in_its_sequence():
    """A NaN among the keys gives NaN where a query sees it, and nowhere else; so does a query that sees no key."""
    (query, key, value, bias), segments, longest = problem([(5, 0), (4, 3), (0, 6)], dtype=torch.float32, grad=False)
    before = run((query, key, value, bias), segments, longest, backend="cpu")
    for bad in (torch.nan, torch.inf):
        other = key.clone()
        other[7, 1, 2] = bad  # the second sequence's
        after = run((query, other, value, bias), segments, longest, backend="cpu")
        rows = torch.cat([torch.arange(int(r), int(r + n)) for r, n, _ in segments[1]])
        mine = torch.zeros(len(key), dtype=torch.bool)
        mine[rows] = True
        if bad != bad:
            assert after[mine][:, 1].isnan().all()
        assert torch.equal(after[~mine], before[~mine])
        assert torch.equal(after[:, 0], before[:, 0])
    query, key, value = (torch.randn(2, 1, 3, 4) for _ in range(3))
    out = ops.attention(query, key, value, key_mask=torch.tensor([[False] * 3, [True] * 3]), backend="cpu")
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_masked_keys_have_no_influence():
    """To the bit, even where they hold huge values; and they get zero gradients."""
    tensors, mask = padded(2, 9, 20)
    assert mask is not None
    query, key, value, bias = tensors
    other_key, other_value = (
        torch.where(mask[:, None, :, None], x, 1e3).detach().requires_grad_() for x in (key, value)
    )
    ours = ops.attention(query, key, value, bias, mask, backend="cpu")
    other = ops.attention(query, other_key, other_value, bias, mask, backend="cpu")
    assert torch.equal(ours, other)
    for gradient in torch.autograd.grad(other.sum(), (other_key, other_value)):
        hidden = gradient.transpose(1, 2)[~mask]
        assert torch.equal(hidden, torch.zeros_like(hidden))


def test_the_result_may_be_changed_in_place():
    """As eager's may: it is no view of anything."""
    tensors, mask = padded(2, 9, 9)
    out = ops.attention(*tensors, mask, backend="cpu")
    wanted = torch.autograd.grad(2 * out.sum(), tensors, retain_graph=True)
    found = torch.autograd.grad(out.mul_(2).sum(), tensors)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    rows = ops.attention(*tensors, mask, backend="cpu").transpose(1, 2)
    torch.autograd.grad(rows.add_(1).sum(), tensors)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_attend(batch, queries, keys):
    tensors, _ = padded(batch, queries, keys, mask=False)
    out = ops.attention(*tensors, backend="cpu")
    assert torch.equal(out, torch.zeros(batch, 2, queries, 16))
    for x, gradient in zip(tensors, torch.autograd.grad(out, tensors, torch.ones_like(out)), strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


def test_threads_do_not_change_a_bit():
    """With the gradient of the bias, which all sequences add to, and without."""
    tensors, segments, longest = problem([(12, 90), (7, 0), (0, 90), (3, 90)] * 3, width=32, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = run(tensors, segments, longest, backend="cpu")
            seed = torch.ones_like(out)
            gradients = torch.autograd.grad(out, tensors, seed, retain_graph=True)
            results.append((out, *gradients, *torch.autograd.grad(out, tensors[:3], seed)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("needed", [0, 1, 2, 3], ids=["query", "key", "value", "bias"])
def test_one_gradient_alone(needed):
    tensors, mask = padded(2, 9, 9)
    detached = [x.detach().requires_grad_(index == needed) for index, x in enumerate(tensors)]
    outs = ops.attention(*detached, mask, backend="cpu"), ops.attention(*tensors, mask, backend="cpu")
    seed = torch.randn_like(outs[0])
    (alone,) = torch.autograd.grad(outs[0], detached[needed], seed)
    assert torch.equal(alone, torch.autograd.grad(outs[1], tensors[needed], seed)[0])


def test_inputs_of_any_layout():
    """Heads first, the last dimension apart, a bias that is a part of a wider one, in another dtype."""
    tensors, mask = padded(2, 9, 9)
    query, key, value, bias = (x.detach() for x in tensors)
    wanted = ops.attention(query, key, value, bias, mask, backend="cpu")
    wide = torch.randn(2, 20, 30)
    wide[:, 4:13, 5:14] = bias
    apart = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (query, key, value)]
    for inputs in ((query.contiguous(), key.contiguous(), value.contiguous()), apart):
        assert torch.equal(ops.attention(*inputs, wide[:, 4:13, 5:14], mask, backend="cpu"), wanted)
    assert mask is not None
    apart_mask = mask.t().contiguous().t()
    assert torch.equal(ops.attention(query, key, value, bias, apart_mask, backend="cpu"), wanted)
    halves = bias.bfloat16().requires_grad_()
    out = ops.attention(query, key, value, halves, mask, backend="cpu")
    torch.testing.assert_close(out, ops.attention(query, key, value, halves.float(), mask, backend="cpu"))
    assert torch.autograd.grad(out.sum(), halves)[0].dtype == torch.bfloat16
    crooked = bias.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(ops.attention(query, key, value, crooked, mask, backend="cpu").sum(), crooked)[0],
        torch.autograd.grad(ops.attention(query, key, value, crooked, mask, backend="eager").sum(), crooked)[0],
    )


def test_defaults_of_torch_do_not_matter():
    """Another default dtype, another default device."""
    tensors, mask = padded(2, 9, 9)
    packed, segments, longest = problem([(3, 4), (2, 0)], dtype=torch.float32, cls_only=True)

    def run_both() -> list[Tensor]:
        outs = (
            ops.attention(*tensors, mask, backend="cpu"),
            run(packed, segments, longest, cls_only=True, backend="cpu"),
        )
        return [
            *outs,
            *torch.autograd.grad(outs[0].sum(), tensors),
            *torch.autograd.grad(outs[1].sum(), packed),
        ]

    wanted = run_both()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            found = run_both()
    finally:
        torch.set_default_dtype(before)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


# Under torch's tools (as the packed op in test_packed_attention.py)


def test_opcheck():
    tensors, mask = padded(2, 4, 5)
    for bias in (tensors[3], None):
        for visible in (mask, None):
            arguments = (*tensors[:3], bias, visible, 0.3, "cpu")
            torch.library.opcheck(torch.ops.vlmo_fast.attention.default, arguments)
    query, key, value, bias = (x.detach() for x in tensors)
    out, stats = torch.ops.vlmo_fast.attention(query, key, value, bias, mask, 0.3, "cpu")
    grad = torch.randn_like(out)
    for bias_grad in (True, False):
        arguments = (grad, query, key, value, bias, mask, stats, 0.3, bias_grad, "cpu")
        torch.library.opcheck(torch.ops.vlmo_fast.attention_backward.default, arguments)


def test_compiles_whole():
    tensors, mask = padded(2, 9, 9)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(*inputs: Tensor) -> Tensor:
        return 2 * ops.attention(*inputs, mask, backend="cpu")

    outs = step(*tensors), 2 * ops.attention(*tensors, mask, backend="cpu")
    assert torch.equal(*outs)
    seed = torch.randn_like(outs[0])
    for one, other in zip(*(torch.autograd.grad(out, tensors, seed) for out in outs), strict=True):
        assert torch.equal(one, other)


def test_activation_checkpointing():
    tensors, mask = padded(2, 9, 9)

    def step(*inputs: Tensor) -> Tensor:
        return ops.attention(*inputs, mask, backend="cpu").square()

    seed = torch.randn_like(tensors[0])
    ours = torch.autograd.grad(checkpoint(step, *tensors, use_reentrant=False), tensors, seed)
    for one, other in zip(ours, torch.autograd.grad(step(*tensors), tensors, seed), strict=True):
        assert torch.equal(one, other)


def test_second_derivatives_are_refused():
    tensors, mask = padded(2, 4, 5)
    (first,) = torch.autograd.grad(
        ops.attention(*tensors, mask, backend="cpu").square().sum(), tensors[3], create_graph=True
    )
    with pytest.raises(NotImplementedError, match='attention: double backward needs backend="eager"'):
        first.sum().backward()


def test_flop_formula():
    tensors, mask = padded(2, 4, 5, heads=3, width=8)
    with FlopCounterMode(display=False) as counter:
        ops.attention(*tensors, mask, backend="cpu").sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 2 * 3 * 4 * 5 * 8


def test_chosen_where_it_gains(monkeypatch):
    single = ops.Problem("cpu", torch.float32)
    for has_avx2, wanted in ((True, ("cpu", "cpu")), (False, ("eager", "sdpa"))):
        monkeypatch.setattr(dispatch, "_has_avx2", lambda has_avx2=has_avx2: has_avx2)
        assert tuple(ops.select(op, single) for op in ("attention", "packed_attention")) == wanted
        assert ops.select("attention", single, "cpu") == "cpu"


def test_where_it_cannot_run(monkeypatch):
    double = ops.Problem("cpu", torch.float64)
    for op in ("attention", "packed_attention"):
        with pytest.raises(
            NotImplementedError, match=r"'cpu' cannot run here \(the cpu extension's attention takes fl"
        ):
            ops.select(op, double, "cpu")
        with pytest.raises(NotImplementedError, match="the cpu extension runs on a CPU"):
            ops.select(op, ops.Problem("cuda", torch.float32), "cpu")
    monkeypatch.setattr(dispatch, "_is_built", lambda name: False)
    with pytest.raises(
        ImportError, match="attention: backend 'cpu' needs the cpu extension, which is not built; build it with: "
    ):
        ops.select("attention", ops.Problem("cpu", torch.float32), "cpu")
