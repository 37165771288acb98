"""The grouped experts: values and every gradient against float64, torch's tools, and every refusal."""

import copy
from collections.abc import Callable, Sequence

import pytest
import tolerances
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vlmo_fast import ops
from vlmo_fast.kernels import ffn
from vlmo_fast.ops import ExpertWeights, dispatch, matmul, reference
from vlmo_fast.ops.ffn import FFNBackend

# Inside the custom op; those that need a GPU are interpreted where there is none.
BACKENDS = [name for name in ops.implementations("mome_ffn") if isinstance(dispatch.load("mome_ffn", name), FFNBackend)]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def half_of(backend: str) -> torch.dtype:
    """The interpreter cuts off bfloat16 numbers where a GPU rounds them."""
    return torch.float16 if (backend, device_of(backend)) == ("triton", "cpu") else torch.bfloat16


class Problem:
    """Rows, experts and scales; drawn in `dtype`, so that the oracle sees the same numbers."""

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        width: int = 24,
        hidden: int = 56,
        dtype: torch.dtype = torch.float64,
        layer_scale: bool = True,
        row_scale: bool = True,
        x: Tensor | None = None,
        device: str = "cpu",
    ) -> None:
        draw = lambda *shape, std=1.0, mean=0.0: (mean + std * torch.randn(shape, dtype=torch.float64)).to(
            device, dtype
        )
        self.sizes = list(sizes)
        rows = sum(sizes)
        self.x = draw(rows, width) if x is None else x.to(device, dtype)
        self.experts = [
            ExpertWeights(
                draw(width, mean=1.0, std=0.3),
                draw(width, std=0.3),
                draw(hidden, width, std=width**-0.5),
                draw(hidden, std=0.5),
                draw(width, hidden, std=hidden**-0.5),
                draw(width, std=0.5),
            )
            for _ in sizes
        ]
        self.layer_scale = draw(width, std=0.5) if layer_scale else None
        self.row_scale = ((torch.rand(rows) < 0.75) / 0.75).to(device, dtype) if row_scale else None
        self.seed = draw(rows, width)

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x} | ({} if self.layer_scale is None else {"layer_scale": self.layer_scale})
        for index, expert in enumerate(self.experts):
            named |= {f"experts[{index}].{field}": tensor for field, tensor in expert._asdict().items()}
        return named

    def to(self, dtype: torch.dtype) -> "Problem":
        other = copy.copy(self)
        other.x, other.seed = self.x.detach().to(dtype), self.seed.to(dtype)
        other.experts = [ExpertWeights(*(tensor.detach().to(dtype) for tensor in expert)) for expert in self.experts]
        other.layer_scale = None if self.layer_scale is None else self.layer_scale.detach().to(dtype)
        other.row_scale = None if self.row_scale is None else self.row_scale.to(dtype)
        return other

    def run(self, **kwargs: object) -> Tensor:
        return ops.mome_ffn(self.x, self.sizes, self.experts, self.layer_scale, self.row_scale, **kwargs)

    def run_with_gradients(self, **kwargs: object) -> dict[str, Tensor]:
        leaves = self.leaves()
        for leaf in leaves.values():
            leaf.requires_grad_()
        out = self.run(**kwargs)
        found = torch.autograd.grad(out, list(leaves.values()), self.seed)
        return {"out": out} | {f"d {name}": gradient for name, gradient in zip(leaves, found, strict=True)}


def compare(make: Callable[[], Problem], dtype: torch.dtype | None = None, **kwargs: object) -> None:
    """Values and all gradients of the problems that `make` draws, within the bounds of `tolerances`."""

    def results() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        problem = make()
        exact = problem.to(torch.float64).run_with_gradients(backend="eager")
        eager = {name: x.detach() for name, x in problem.run_with_gradients(backend="eager").items()}
        ours = problem.run_with_gradients(**kwargs)
        for name, tensor in ours.items():
            assert tensor.dtype == eager[name].dtype, name
        return {name: (tensor, exact[name], eager[name]) for name, tensor in ours.items()}

    tolerances.check(results, dtype)


def compare_inference(make: Callable[[], Problem], **kwargs: object) -> None:
    """The same of the values alone, where no gradient will be asked for."""

    def results() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        problem = make()
        with torch.no_grad():
            exact, eager = problem.to(torch.float64).run(backend="eager"), problem.run(backend="eager")
            return {"out": (problem.run(**kwargs), exact, eager)}

    tolerances.check(results)


SHAPES = {
    "two experts": {"sizes": (5, 9)},
    "three experts": {"sizes": (4, 3, 8)},
    "one expert": {"sizes": (7,)},
    "an empty expert first": {"sizes": (0, 6)},
    "an empty expert last": {"sizes": (6, 0)},
    "an empty expert between": {"sizes": (3, 0, 4)},
    "one token": {"sizes": (1,)},
    "one token each": {"sizes": (1, 1)},
    "no tokens": {"sizes": (0, 0)},
    "no layer scale": {"sizes": (5, 9), "layer_scale": False},
    "no drop path": {"sizes": (5, 9), "row_scale": False},
    "neither": {"sizes": (5, 9), "layer_scale": False, "row_scale": False},
    "a width that no tile divides": {"sizes": (5, 9), "width": 34, "hidden": 136},  # base_plus / 16
    "a row more and less than a tile": {"sizes": (15, 17, 16)},
    "a column more and less than a tile": {"sizes": (3, 2), "width": 33, "hidden": 63},
    "groups within and beyond the rows whose branch is kept": {"sizes": (40, 8, 1, 60)},
    "a group across the last row whose branch is kept": {"sizes": (47, 2)},
    "more experts than a launch takes": {"sizes": (3, 1, 0, 2, 5), "hidden": 24},
}


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_in_float64(shape):
    compare(lambda: Problem(**shape), backend="torch")


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_in_float32(shape):
    compare(lambda: Problem(**shape, dtype=torch.float32, device=device_of("triton")), backend="triton")


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["three experts", "an empty expert between", "neither"])
def test_values_and_gradients_in_each_dtype(shape, dtype, backend):
    if dtype == torch.bfloat16:
        dtype = half_of(backend)
    compare(lambda: Problem(**SHAPES[shape], dtype=dtype, device=device_of(backend)), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_saved_activation_changes_nothing(backend):
    problem = Problem((5, 9), dtype=torch.float32, device=device_of(backend))
    computed = problem.run_with_gradients(backend=backend)
    saved = problem.run_with_gradients(backend=backend, save_activation=True)
    for name, tensor in computed.items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.usefixtures("nan_filled_empty", "library")
@pytest.mark.parametrize("save_activation", [False, True])
@pytest.mark.parametrize("rows", [256, 257, 259, 260])
def test_products_of_many_rows_in_whole_steps(monkeypatch, rows, save_activation):
    """Zeros fill up what oneDNN multiplies, and none of them is seen outside, nor saved."""
    multiplied = set()
    make = lambda: Problem((5, rows), dtype=torch.float32)
    problem = make()
    library = type(matmul.library_for(problem.x))
    product = library.product
    monkeypatch.setattr(library, "product", lambda self, x, *rest: multiplied.add(len(x)) or product(self, x, *rest))
    compare(make, backend="torch", save_activation=save_activation)
    pads = library is type(matmul.ONEDNN)
    padded = {256: 256, 257: 260, 259: 260, 260: 260}[rows] if pads else rows
    assert multiplied == {5, padded, 24, 56}  # of each expert and of its weights' gradients
    columns = list(map(list, zip(*problem.experts, strict=True)))
    rest = (problem.layer_scale, problem.row_scale, 1e-6, True, save_activation, "torch")
    _, saved = torch.ops.vlmo_fast.mome_ffn(problem.x, problem.sizes, *columns, *rest)
    assert {tensor.shape[0] for tensor in saved if tensor.shape[-1] == 56} == {5, rows}
    compare_inference(make, backend="torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_saves_nothing_and_agrees(backend):
    problem = Problem((5, 9), dtype=torch.float32, device=device_of(backend))
    trained = problem.run_with_gradients(backend=backend)["out"]
    compare_inference(lambda: Problem((5, 9), dtype=torch.float32, device=device_of(backend)), backend=backend)
    columns = list(map(list, zip(*problem.experts, strict=True)))
    rest = (problem.layer_scale, problem.row_scale, 1e-6, False, False, backend)
    _, saved = torch.ops.vlmo_fast.mome_ffn(problem.x, problem.sizes, *columns, *rest)
    assert saved == []
    assert trained.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["single", "half"])
@pytest.mark.parametrize("kind", ["large means", "outlier channels"])
def test_activations_as_trained_transformers_have_them(kind, precision, backend):
    dtype = torch.float32 if precision == "single" else half_of(backend)

    def make() -> Problem:
        x = torch.randn(40, 24, dtype=torch.float64)
        if kind == "large means":
            x += 30 * torch.randn(40, 1, dtype=torch.float64)
        else:
            x[:, 5] *= 100
        return Problem((15, 25), dtype=dtype, x=x, device=device_of(backend))

    compare(make, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["every second row", "columns of a wider tensor", "transposed"])
def test_strided_rows(layout, backend):
    problem = Problem((5, 9), dtype=torch.float32, device=device_of(backend))
    wide = torch.full((28, 48), 1e4, device=problem.x.device)
    x = {
        "every second row": wide[::2, :24],
        "columns of a wider tensor": wide[:14, 8:32],
        "transposed": wide.view(-1)[: 14 * 24].view(24, 14).t(),
    }[layout]
    x.copy_(problem.x)
    expected = problem.run_with_gradients(backend=backend)
    problem.x = x
    for name, tensor in problem.run_with_gradients(backend=backend).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_upstream_gradient_without_strides(backend):

    def make() -> Problem:
        problem = Problem((5, 9), dtype=torch.float32, device=device_of(backend))
        problem.seed = torch.ones((), device=problem.x.device).expand(14, 24)
        assert problem.seed.stride() == (0, 0)
        return problem

    compare(make, backend=backend)
    problem = make()
    problem.x.requires_grad_()
    problem.run(backend=backend).sum().backward()
    assert problem.x.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_products_beside_a_float32_residual_stream(backend):
    """Autocast's and mixed precision's arrangement: only the linear layers are in half precision."""

    def make() -> Problem:
        problem = Problem((5, 9), dtype=half_of(backend), device=device_of(backend)).to(torch.float32)
        problem.experts = [
            expert._replace(
                **{name: getattr(expert, name).to(half_of(backend)) for name in expert._fields if name.startswith("fc")}
            )
            for expert in problem.experts
        ]
        return problem

    compare(make, half_of(backend), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):

    def results() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        problem = Problem((5, 9), dtype=half_of(backend), device=device_of(backend)).to(torch.float32)
        exact = problem.to(torch.float64).run_with_gradients(backend="eager")
        with torch.autocast(device_of(backend), half_of(backend)):
            eager = problem.to(torch.float32).run_with_gradients(backend="eager")
            ours = problem.run_with_gradients(backend=backend)
        assert tolerances.errors(ours["out"], exact["out"]).frobenius > 1e-5  # products were in half precision
        assert all(tensor.dtype == torch.float32 for tensor in ours.values())  # what autocast gives eager, too
        return {name: (tensor, exact[name], eager[name]) for name, tensor in ours.items()}

    tolerances.check(results, half_of(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_experts_cost_no_gradients(backend):
    """Stage-wise pre-training freezes the vision experts while the language experts learn."""
    problem = Problem((5, 9), dtype=torch.float32, device=device_of(backend))
    everything = problem.run_with_gradients(backend=backend)
    for tensor in problem.experts[1]:
        tensor.requires_grad_(False)
    learning = {name: leaf for name, leaf in problem.leaves().items() if leaf.requires_grad}
    assert len(learning) == 8
    with FlopCounterMode(display=False) as counter:
        found = torch.autograd.grad(problem.run(backend=backend), list(learning.values()), problem.seed)
    for name, gradient in zip(learning, found, strict=True):
        torch.testing.assert_close(gradient, everything[f"d {name}"], rtol=0, atol=0)
    assert counter.get_total_flops() == 2 * 24 * 56 * (2 * 14 + 2 * 14 + 2 * 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops(backend):
    problem = Problem((5, 9), dtype=torch.float32, device=device_of(backend))
    with FlopCounterMode(display=False) as ours:
        problem.run_with_gradients(backend=backend)
    with FlopCounterMode(display=False) as eager:
        problem.run_with_gradients(backend="eager")
    assert ours.get_total_flops() == eager.get_total_flops() == 6 * 2 * 14 * 24 * 56


def test_second_derivatives_are_refused_but_by_the_reference():
    problem = Problem((5, 9))
    problem.x.requires_grad_()
    (first,) = torch.autograd.grad(problem.run(backend="torch").square().sum(), problem.x, create_graph=True)
    with pytest.raises(NotImplementedError, match='mome_ffn: double backward needs backend="eager"'):
        first.sum().backward()
    (first,) = torch.autograd.grad(problem.run(backend="eager").square().sum(), problem.x, create_graph=True)
    first.sum().backward()
    assert problem.x.grad is not None


@pytest.mark.parametrize("scales", [True, False], ids=["scales", "no scales"])
def test_gradcheck(scales):
    problem = Problem((2, 0, 3), width=4, hidden=6, layer_scale=scales, row_scale=scales)
    leaves = problem.leaves()
    tensors = [leaf.requires_grad_() for leaf in leaves.values()]

    def run(x, *rest):
        layer_scale, rest = (rest[0], rest[1:]) if scales else (None, rest)
        experts = [ExpertWeights(*rest[first : first + 6]) for first in range(0, len(rest), 6)]
        return ops.mome_ffn(x, problem.sizes, experts, layer_scale, problem.row_scale, backend="torch")

    assert torch.autograd.gradcheck(run, tensors)


def arguments(problem: Problem, *, save: bool, save_activation: bool, backend: str) -> tuple[object, ...]:
    columns = [list(column) for column in zip(*problem.experts, strict=True)]
    scales = (problem.layer_scale, problem.row_scale)
    return (problem.x, problem.sizes, *columns, *scales, 1e-6, save, save_activation, backend)


@pytest.mark.parametrize(
    ("scales", "save_activation", "backend"),
    [
        (True, False, "torch"),
        (True, True, "torch"),
        (False, False, "torch"),
        (False, True, "torch"),
        (True, False, "triton"),  # the interpreter is slow
        (False, True, "triton"),
    ],
)
def test_opcheck(scales, save_activation, backend):
    problem = Problem((5, 3), dtype=torch.float32, layer_scale=scales, row_scale=scales, device=device_of(backend))
    op, backward = torch.ops.vlmo_fast.mome_ffn.default, torch.ops.vlmo_fast.mome_ffn_backward.default
    no_grad = arguments(problem, save=False, save_activation=False, backend=backend)
    torch.library.opcheck(op, no_grad)
    _, saved = op(*arguments(problem, save=True, save_activation=save_activation, backend=backend))
    torch.library.opcheck(backward, (problem.seed, *no_grad[:10], saved, 1e-6, [True, False], backend))
    for leaf in problem.leaves().values():
        leaf.requires_grad_()
    torch.library.opcheck(op, arguments(problem, save=True, save_activation=save_activation, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_compositions_compile_twice(backend):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def step(x, sizes, experts, layer_scale):
        return 2 * ops.mome_ffn(x, sizes, experts, layer_scale, backend=backend)

    problem = Problem((5, 9), dtype=torch.float32, device=device_of(backend))
    for leaf in problem.leaves().values():
        leaf.requires_grad_()
    generator = torch.Generator().manual_seed(1)
    compositions = [[5, 9], [4, 7], *torch.randint(2, 60, (48, 2), generator=generator).tolist()]
    compositions = compositions if backend == "torch" else compositions[:4]  # the interpreter is slow
    for sizes in compositions:
        x = torch.randn(sum(sizes), 24, device=problem.x.device, requires_grad=True)
        leaves = [x, *problem.experts[0], *problem.experts[1], problem.layer_scale]
        results = []
        for run in (step, lambda *args: 2 * ops.mome_ffn(*args, backend=backend)):
            out = run(x, sizes, problem.experts, problem.layer_scale)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert len(graphs) <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_is_traced_whole(backend):
    """Forward and backward become one graph each, in which the op stays one node; under autocast, too."""
    problem = Problem((5, 9), dtype=torch.float32, device=device_of(backend))
    for autocast in (False, True):
        with torch.autocast(device_of(backend), torch.bfloat16, enabled=autocast):
            expected = problem.run_with_gradients(backend=backend)
            run = torch.compile(lambda: problem.run(backend=backend), fullgraph=True, backend="aot_eager")
            leaves = list(problem.leaves().values())
            out = run()
        found = [out, *torch.autograd.grad(out, leaves, problem.seed)]
        for ours, wanted in zip(found, expected.values(), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=0)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_with_tensor_descriptors(dtype):
    """The way of compute capability 9.0 and later, widths that no tile divides included."""

    def results() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        problem = Problem((15, 0, 18), width=40, hidden=88, dtype=dtype, device=device_of("triton"))
        exact = problem.to(torch.float64).run_with_gradients(backend="eager")
        eager = problem.to(dtype).run_with_gradients(backend="eager")
        rest = (problem.sizes, problem.experts, problem.layer_scale, problem.row_scale)
        with torch.no_grad():
            out, saved = ffn.forward(problem.x, *rest, 1e-6, True, False, use_tma=True)
            d_x, d_scale, d_experts = ffn.backward(
                problem.seed, problem.x, *rest, saved, 1e-6, [True] * 3, use_tma=True
            )
        found = [out, d_x, d_scale, *(gradient for expert in d_experts for gradient in expert)]
        return {name: (tensor, exact[name], eager[name]) for tensor, name in zip(found, exact, strict=True)}

    tolerances.check(results)


def test_export():
    class Experts(torch.nn.Module):
        def __init__(self, problem: Problem) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList(tensor for expert in problem.experts for tensor in expert)

        def forward(self, x: Tensor) -> Tensor:
            experts = [ExpertWeights(*list(self.weights)[first : first + 6]) for first in (0, 6)]
            return ops.mome_ffn(x, [5, x.shape[0] - 5], experts)

    problem = Problem((5, 9), dtype=torch.float32, layer_scale=False, row_scale=False)
    module = Experts(problem)
    program = torch.export.export(module, (problem.x,), dynamic_shapes=({0: torch.export.Dim("rows", min=8, max=99)},))
    x = torch.randn(30, 24)
    torch.testing.assert_close(program.module()(x), module(x), rtol=0, atol=0)


def test_activation_checkpointing():
    problem = Problem((5, 9), dtype=torch.float32)
    expected = problem.run_with_gradients()
    out = torch.utils.checkpoint.checkpoint(lambda x: problem.run(), problem.x, use_reentrant=False)
    found = torch.autograd.grad(out, list(problem.leaves().values()), problem.seed)
    for gradient, wanted in zip(found, list(expected.values())[1:], strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_saved_activations_are_less_than_half_of_eager(backend):
    """At most 45 %, x not counted (whoever made it keeps it)."""
    device = device_of(backend)

    def saved_bytes(backend: str) -> int:
        problem = Problem((50, 90), width=96, hidden=384, dtype=torch.float32, row_scale=False, device=device)
        leaves = problem.leaves().values()
        for leaf in leaves:
            leaf.requires_grad_()
        kept: dict[int, int] = {}
        parameters = {leaf.untyped_storage().data_ptr() for leaf in leaves}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = problem.run(backend=backend)
        assert out.requires_grad
        return sum(kept.values())

    ours, eager = saved_bytes(backend), saved_bytes("eager")
    assert 140 * 384 * 4 <= ours <= 0.45 * eager


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [768, 544, 1024])
@pytest.mark.parametrize("sizes", [(13, 197), (0, 2049), (1000, 3000, 97)], ids=str)
def test_real_sizes_on_a_gpu(sizes, width, dtype):
    """One pair, an empty expert beside a row more than tiles, three experts."""
    compare(lambda: Problem(sizes, width=width, hidden=4 * width, dtype=dtype, device="cuda"), backend="triton")


@pytest.mark.gpu
def test_a_graph_replays_forward_and_backward():
    problem = Problem((13, 197), width=768, hidden=3072, dtype=torch.bfloat16, device="cuda")
    expected = problem.run_with_gradients(backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = problem.run_with_gradients(backend="triton")
    graph.replay()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(14)}, ValueError, r"x must be \(N, D\), got \(14,\)"),
        ({"x": torch.ones(14, 24, dtype=torch.int64)}, TypeError, r"x must be of a float dtype, got torch\.int64"),
        ({"sizes": [14]}, ValueError, r"group_sizes must name a size for each expert, one at least, got 1 for 2"),
        ({"sizes": [5, 8]}, ValueError, r"group_sizes must be counts that add up to the 14 rows of x, got \[5, 8\]"),
        ({"sizes": [15, -1]}, ValueError, r"group_sizes must be counts .* got \[15, -1\]"),
        ({"layer_scale": torch.ones(23)}, ValueError, r"layer_scale must be \(24,\), got \(23,\)"),
        ({"layer_scale": torch.ones(24, dtype=torch.int32)}, TypeError, r"layer_scale must be of a float dtype"),
        ({"row_scale": torch.ones(14, 1)}, ValueError, r"row_scale must be \(14,\), got \(14, 1\)"),
        ({"row_scale": torch.ones(14, requires_grad=True)}, ValueError, r"row_scale must not require a gradient"),
        ({"layer_scale": torch.ones(24, device="meta")}, ValueError, r"layer_scale must be on the device of x, cpu"),
        ({"fc1_weight": torch.ones(56, 23)}, ValueError, r"experts\[1\]\.fc1_weight must be \(56, 24\), got \(56, 23"),
        ({"fc1_bias": torch.ones(55)}, ValueError, r"experts\[1\]\.fc1_bias must be \(56,\), got \(55,\)"),
        ({"fc2_weight": torch.ones(56, 24)}, ValueError, r"experts\[1\]\.fc2_weight must be \(24, 56\), got \(56, 24"),
        ({"norm_bias": torch.ones(24, 1)}, ValueError, r"experts\[1\]\.norm_bias must be \(24,\), got \(24, 1\)"),
        ({"fc2_bias": torch.ones(24).half()}, TypeError, r"experts\[1\]\.fc2_bias must be torch\.float32 like experts"),
        ({"x": torch.ones(14, 24).bfloat16()}, TypeError, r"fc1_weight must not be wider than x, which is .*bfloat16"),
    ],
)
def test_refusals(change, error, message):
    problem = Problem((5, 9), dtype=torch.float32)
    for name, value in change.items():
        if name in ExpertWeights._fields:
            problem.experts[1] = problem.experts[1]._replace(**{name: value})
        else:
            setattr(problem, name, value)
    for backend in ("auto", "eager", "torch"):
        with pytest.raises(error, match=f"^mome_ffn: .*{message}"):
            problem.run(backend=backend)


def test_the_door():
    def choice(device: str, dtype: torch.dtype, capability: tuple[int, int] | None = None) -> str:
        return ops.select("mome_ffn", ops.Problem(device, dtype, capability=capability))

    assert choice("cpu", torch.float32) == choice("cpu", torch.bfloat16) == "torch"
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):  # no kernel that never ran on a GPU
        assert choice("cuda", dtype, (9, 0)) == "torch"
    for dtype, capability in ((torch.bfloat16, (9, 0)), (torch.float16, (8, 0)), (torch.float32, (9, 0))):
        assert ops.select("mome_ffn", ops.Problem("cuda", dtype, capability=capability), "triton") == "triton"
    with pytest.raises(NotImplementedError, match=r"needs compute capability 8\.0"):
        ops.select("mome_ffn", ops.Problem("cuda", torch.float16, capability=(7, 5)), "triton")
    with pytest.raises(NotImplementedError, match=r"backend 'triton' cannot run here \(needs a CUDA device\)"):
        ops.select("mome_ffn", ops.Problem("cpu", torch.float32), "triton")


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match=r"mome_ffn: backend must be 'auto' or one of .*, got 'cublas'"):
        Problem((5, 9)).run(backend="cublas")


def test_the_reference_is_the_modules_own_arithmetic():
    """Against torch.nn's modules, written out once more."""
    problem = Problem((5, 9))
    parts = []
    for part, row_scale, expert in zip(
        problem.x.split(problem.sizes), problem.row_scale.split(problem.sizes), problem.experts, strict=True
    ):
        norm, fc1, fc2 = torch.nn.LayerNorm(24, 1e-6), torch.nn.Linear(24, 56), torch.nn.Linear(56, 24)
        for module, weight, bias in zip((norm, fc1, fc2), expert[::2], expert[1::2], strict=True):
            module.weight, module.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        branch = problem.layer_scale * torch.nn.Sequential(norm, fc1, torch.nn.GELU(), fc2)(part)
        parts.append(part + row_scale[:, None] * branch)
    ours = reference.mome_ffn(
        problem.x, problem.sizes, problem.experts, problem.layer_scale, problem.row_scale, eps=1e-6
    )
    torch.testing.assert_close(ours, torch.cat(parts), rtol=1e-14, atol=1e-14)
