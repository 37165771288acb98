"""Linear layers on either library: values and every gradient against float64, and where they are torch's own."""

import pytest
import tolerances
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vlmo_fast import MoMEConfig, MoMETransformer, ops, pack
from vlmo_fast.ops import dispatch, linear, matmul

BACKENDS = [c.implementation for c in ops.explain("linear", ops.Problem("cpu", torch.float32)) if c.rank]

pytestmark = pytest.mark.usefixtures("library")
HAS_ONEDNN = torch.backends.mkldnn.is_available()

SHAPES = {
    "a few rows": (5, 24, 56),
    "one row": (1, 24, 56),
    "many rows": (259, 24, 56),
    "many rows, a multiple of the step": (260, 24, 56),
    "one column": (7, 24, 1),
    "no rows": (0, 24, 56),
}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).float()


def with_gradients(function, tensors, seed):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, seed)]


def compare(draw_tensors, draw_seed, of_leaves=lambda *leaves: leaves, backend="auto"):
    """Our layer against F.linear in float64, of what `of_leaves` makes of the tensors."""

    def results():
        tensors, seed = draw_tensors(), draw_seed()
        exact = with_gradients(lambda *x: F.linear(*of_leaves(*x)), [t.double() for t in tensors], seed.double())
        eager = with_gradients(lambda *x: F.linear(*of_leaves(*x)), tensors, seed)
        ours = with_gradients(lambda *x: linear(*of_leaves(*x), backend=backend), tensors, seed)
        return {
            name: each for name, *each in zip(("out", "d x", "d weight", "d bias"), ours, exact, eager, strict=False)
        }

    tolerances.check(results)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape, has_bias, backend):
    rows, width, out = shape
    tensors = lambda: [draw(rows, width), draw(out, width), *([draw(out)] if has_bias else [])]
    compare(tensors, lambda: draw(rows, out), backend=backend)


@pytest.mark.parametrize("case", ["every second row", "transposed", "one row expanded", "half of a weight"])
def test_strides(case):
    of_leaves = {
        "every second row": lambda x, weight: (x.reshape(12, 2, 24)[:, 0], weight),
        "transposed": lambda x, weight: (x.t().reshape(24, 24).t(), weight),
        "one row expanded": lambda x, weight: (x[:1].expand(9, -1), weight),
        "half of a weight": lambda x, weight: (x, weight[20:]),
    }[case]
    tensors = lambda: [draw(24, 24), draw(56, 24)]
    rows, out = F.linear(*of_leaves(*tensors())).shape
    compare(tensors, lambda: draw(rows, out), of_leaves)
    compare(tensors, lambda: torch.ones(()).expand(rows, out), of_leaves)


def test_only_the_gradients_that_are_wanted():
    x, weight, bias = draw(5, 24), draw(56, 24).requires_grad_(), draw(56)
    linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(56, -1))
    assert x.grad is None and bias.grad is None
    with torch.no_grad():
        assert not linear(x, weight, bias).requires_grad


def test_second_derivatives():
    def of(tensors, function, dtype=torch.float32):
        leaves = [tensor.to(dtype).detach().clone().requires_grad_() for tensor in tensors]
        first = torch.autograd.grad(function(*leaves).tanh().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    def results():
        tensors = [draw(5, 24), draw(8, 24), draw(8)]
        each = of(tensors, linear), of(tensors, F.linear, torch.float64), of(tensors, F.linear)
        return dict(zip(("x", "weight", "bias"), zip(*each, strict=True), strict=True))

    tolerances.check(results)


@pytest.mark.skipif(not HAS_ONEDNN, reason="needs a torch with oneDNN")
def test_when_it_is_torchs_own(monkeypatch, library):
    used = []
    monkeypatch.setattr(type(matmul.ONEDNN), "product", lambda self, *a: used.append(1) or F.linear(*a))
    x, weight = draw(5, 24), draw(56, 24)
    linear(x, weight)
    assert bool(used) == (library == "oneDNN")
    used.clear()
    linear(x.double(), weight.double())
    linear(x.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        linear(x, weight)
    assert not used
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))
    assert not used


@pytest.mark.parametrize("rows", [5, 259])
def test_products_of_the_experts(rows, library):
    """What the experts call: the rows filled up for oneDNN alone, GELU with the product."""

    def results():
        x, weight, bias = draw(rows, 24), draw(56, 24), draw(56)
        chosen = matmul.library_for(weight)
        padded = chosen.pad_rows(x)
        assert len(padded) == (260 if (rows, library, HAS_ONEDNN) == (259, "oneDNN", True) else rows)
        exact = F.linear(x.double(), weight.double(), bias.double())
        eager = F.linear(x, weight, bias)
        ours, activated = (f(padded, weight, bias)[:rows] for f in (chosen.product, chosen.product_gelu))
        return {"product": (ours, exact, eager), "gelu": (activated, F.gelu(exact), F.gelu(eager))}

    tolerances.check(results)


@pytest.mark.parametrize("rows", [5, 259])
def test_opcheck(rows):
    arguments = (draw(rows, 24).requires_grad_(), draw(56, 24).requires_grad_(), draw(56).requires_grad_())
    for backend in BACKENDS:
        torch.library.opcheck(torch.ops.vlmo_fast.linear, (*arguments, backend))


def faked(monkeypatch, capability, has_mkl=True):
    monkeypatch.undo()  # `library`
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)


@pytest.mark.skipif(not HAS_ONEDNN, reason="needs a torch with oneDNN")
@pytest.mark.parametrize(
    ("capability", "has_mkl", "chosen"),
    [
        ("AVX512", True, "onednn"),
        ("AVX2", True, "torch"),
        ("AVX2", False, "onednn"),
        ("DEFAULT", True, "onednn"),  # not measured
        ("SVE256", False, "onednn"),
    ],
)
def test_the_rule(monkeypatch, capability, has_mkl, chosen):
    """By instruction set, as torch has it; bfloat16 is oneDNN's wherever the processor multiplies it."""
    half = ops.Problem("cpu", torch.bfloat16, inside=True)
    of_half = ops.select("linear", half)
    faked(monkeypatch, capability, has_mkl)
    for inside in (False, True):
        assert ops.select("linear", ops.Problem("cpu", torch.float32, inside=inside)) == chosen
        assert ops.select("linear", ops.Problem("cpu", torch.float64, inside=inside)) == "torch"
    assert ops.select("linear", half) == of_half


def test_the_rule_is_a_constant_to_the_compiler(monkeypatch):
    """A trace does not follow torch's own questions about the processor."""
    faked(monkeypatch, "AVX2")
    run = torch.compile(lambda x: 2 * x if dispatch._mkl_is_faster() else x, fullgraph=True, backend="eager")
    assert run(torch.ones(2)).tolist() == [2, 2]


def test_flops():
    x, weight = draw(5, 24).requires_grad_(), draw(56, 24).requires_grad_()
    counts = []
    for function in (linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            function(x, weight).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 5 * 24 * 56


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_projection_that_was_replaced_or_is_watched_is_called():
    torch.manual_seed(0)
    config = MoMEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_vl_layers=1, image_size=32, vocab_size=50
    )
    model = MoMETransformer(config).eval()
    ids, layout = torch.randint(1, 50, (2, 5)), pack([5, 3])
    with torch.no_grad():
        plain = model.forward_packed(layout, ids).text_embeds
        projection = model.blocks[0].attention.projection
        seen = []
        handle = projection.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
        torch.testing.assert_close(model.forward_packed(layout, ids).text_embeds, plain)
        assert seen == [(8, 32)]
        handle.remove()
        doubled = Doubled(32, 32)
        doubled.load_state_dict({name: tensor / 2 for name, tensor in projection.state_dict().items()})
        model.blocks[0].attention.projection = doubled
        torch.testing.assert_close(model.forward_packed(layout, ids).text_embeds, plain)
        nn.init.zeros_(doubled.weight)
        assert not torch.allclose(model.forward_packed(layout, ids).text_embeds, plain)
