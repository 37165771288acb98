"""The contrastive loss in linear memory: values and every gradient against float64, and the laws that it obeys."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from scipy.stats import chisquare
from tolerances import check, check_draws
from torch import Tensor
from torch.nn import functional as F

from vlmo_fast import extensions, ops
from vlmo_fast.ops import dispatch, reference
from vlmo_fast.ops.pairs import blocks, lse, sampling, tiles
from vlmo_fast.ops.pairs.positives import matches_of
from vlmo_fast.ops.types import PairMask

SINGLE = ops.Problem("cpu", torch.float32)
# On a CPU, but for the oracle. What cannot run for want of the library is built by `cpu_extension`.
IMPLEMENTATIONS = [
    row.name
    for row in dispatch.TABLE["contrastive_lse"]
    if row.accepts(SINGLE)[0] and isinstance(dispatch.load("contrastive_lse", row.name), lse.LSEBackend)
]

each_implementation = pytest.mark.parametrize("backend", IMPLEMENTATIONS)

pytestmark = pytest.mark.usefixtures("cpu_extension")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 rows at 1,000 columns, so that most problems here take several, the last one ragged."""
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 2**18)


def unit(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


def low(rows: int, columns: int, width: int) -> tuple[Tensor, Tensor]:
    """Unit vectors whose every similarity is below 0.1."""
    first, second = (unit(n, width - 1) * math.sqrt(0.75) for n in (rows, columns))
    half = torch.full((max(rows, columns), 1), 0.5, dtype=torch.float64)
    image, text = torch.cat([first, half[:rows]], 1), torch.cat([second, -half[:columns]], 1)
    assert (image @ text.t()).max() < 0.1
    return image, text


def matched(rows: int, columns: int, width: int) -> tuple[Tensor, Tensor]:
    """A trained model's: a pair's similarity is about 0.9, and most of the loss is tiny."""
    image = unit(rows, width)
    return image, F.normalize(image + 0.5 * unit(columns, width), dim=-1)


def antipodal(rows: int, columns: int, width: int) -> tuple[Tensor, Tensor]:
    """Similarities from -1 to 1 in one block: no shift that the block shares is right for all of its rows."""
    image, text = unit(1, width) + 0.1 * unit(rows, width), unit(1, width) + 0.1 * unit(columns, width)
    image[::2] *= -1
    text[: columns // 3] = -image[: columns // 3]
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def duplicated(rows: int, columns: int, width: int) -> tuple[Tensor, Tensor]:
    return unit(rows // 4, width).repeat(4, 1), unit(columns // 4, width).repeat_interleave(4, 0)


def random(rows: int, columns: int, width: int) -> tuple[Tensor, Tensor]:
    return unit(rows, width), unit(columns, width)


class Case(NamedTuple):
    """A problem, and why it is here."""

    why: str
    rows: int
    columns: int
    width: int
    scale: float = 14.3
    embeddings: Callable[[int, int, int], tuple[Tensor, Tensor]] = random
    dtype: torch.dtype = torch.float32
    ids: str | None = None  # how many rows and columns share an id
    positives: str = "exclude"


CASES = [
    Case("no negative at all", 1, 1, 768),
    Case("vectors of one number", 2, 2, 1, 1.0),
    Case("below a tile", 127, 127, 64, 100.0),
    Case("a tile, and base_plus's width", 128, 128, 544),
    Case("beyond a tile", 129, 129, 768),
    Case("large's width", 1000, 1000, 1024),
    Case("the widest that the tile kernels are made for", 129, 129, 2048),
    Case("many blocks", 4096, 4096, 64, 100.0),
    Case("scale 1", 129, 129, 64, 1.0),
    Case("all similarities low: a fixed shift underflows", 200, 200, 256, 100.0, low),
    Case("sure of its answers: 1 - p cancels", 300, 300, 64, 100.0, matched),
    Case("rows that differ by 200 in one block", 128, 128, 64, 100.0, antipodal),
    Case("equal embeddings", 128, 128, 64, 14.3, duplicated),
    Case("bfloat16", 129, 129, 768, 14.3, random, torch.bfloat16),
    Case("bfloat16, sharp", 129, 129, 768, 100.0, matched, torch.bfloat16),
    Case("float16", 129, 129, 64, 14.3, random, torch.float16),
    Case("float64", 130, 130, 64, 14.3, random, torch.float64),
    Case("five captions an image", 100, 500, 64, 14.3, random, torch.float32, "captions"),
    Case("five captions an image, averaged", 100, 500, 64, 14.3, random, torch.float32, "captions", "average"),
    Case("false negatives in a batch", 129, 129, 64, 100.0, matched, torch.float32, "duplicates"),
    Case("false negatives, averaged", 129, 129, 64, 14.3, random, torch.float32, "duplicates", "average"),
    Case("ids that are all different", 129, 129, 64, 14.3, random, torch.float32, "pairs"),
    Case("ids that are all equal", 20, 30, 64, 14.3, random, torch.float32, "one"),
    Case("all equal, averaged", 20, 30, 64, 14.3, random, torch.float32, "one", "average"),
    Case("ids, bfloat16", 129, 645, 64, 14.3, random, torch.bfloat16, "captions"),
]


def ids_of(case: Case) -> dict[str, Tensor]:
    row, column = torch.arange(case.rows), torch.arange(case.columns)
    if case.ids is None:
        return {}
    if case.ids == "captions":  # neither in order nor aligned
        pair = row * 7 - 3, (column // 5)[torch.randperm(case.columns)] * 7 - 3
    elif case.ids == "duplicates":
        pair = row // 3, column // 3
    elif case.ids == "one":
        pair = row * 0, column * 0
    else:
        pair = row, column
    return {"image_ids": pair[0], "text_ids": pair[1]}


def differentiate(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The value, then the gradient of each input."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = function(*leaves)
    return [value, *torch.autograd.grad(value, leaves)]


def unlucky(exact: Tensor, eager: Tensor) -> Tensor:
    """Eager's single number, which may be right by luck, moved away by two roundings: what its order of sums can do."""
    return exact + (eager - exact).abs() + 2 * torch.finfo(eager.dtype).eps * exact.abs()


@pytest.mark.usefixtures("small_blocks")
@each_implementation
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_loss_and_gradients(case: Case, backend: str) -> None:
    scale, ids = torch.tensor(case.scale), ids_of(case)
    if case.dtype == torch.float64:
        scale = scale.double()
        backend = "auto"
    # Pairs as ids: the reference then takes the softplus, which float64 needs too where the loss is 1e-20.
    each = ids or {"image_ids": torch.arange(case.rows), "text_ids": torch.arange(case.columns)}
    wider = torch.promote_types(case.dtype, torch.float32)

    def results() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        image, text = (x.to(case.dtype) for x in case.embeddings(case.rows, case.columns, case.width))
        eager = differentiate(
            lambda x, y, s: reference.contrastive_loss(x, y, s, *ids.values(), case.positives), image, text, scale
        )
        exact = differentiate(
            lambda x, y, s: reference.contrastive_loss(x, y, s, *each.values(), case.positives),
            *(x.double() for x in (image, text, scale)),
        )
        found = {}
        for part in (0, 0.4, 1) if case.rows < 1000 else (0,):  # of the similarities, kept for the backward pass
            ours = differentiate(
                lambda x, y, s, part=part: ops.contrastive_loss(
                    x,
                    y,
                    s,
                    **ids,
                    positives=case.positives,
                    workspace_bytes=int(part * 4 * case.rows * case.columns),
                    backend=backend,
                ),
                image,
                text,
                scale,
            )
            for what, a, b, c in zip(("loss", "d image", "d text", "d scale"), ours, exact, eager, strict=True):
                assert a.dtype == c.dtype == (case.dtype if what in ("d image", "d text") else wider)
                found[f"{what}, {part} kept"] = a, b, c if c.ndim else unlucky(b, c)
        return found

    check(results, condition=condition_of(case))


def condition_of(case: Case) -> float:
    """The largest similarity: how far exp moves it in roundings."""
    image, text = (x.to(case.dtype).double() for x in case.embeddings(case.rows, case.columns, case.width))
    return float((case.scale * image @ text.t()).abs().max())


@pytest.mark.usefixtures("small_blocks")
@each_implementation
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_lse(case: Case, backend: str) -> None:
    """The log-sum-exps of the same problems, of all similarities and of the negatives."""
    scale, ids = torch.tensor(case.scale), ids_of(case)
    if case.dtype == torch.float64:
        scale, backend = scale.double(), "auto"
    dtype = torch.promote_types(case.dtype, torch.float32)

    def results() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        image, text = (x.to(case.dtype) for x in case.embeddings(case.rows, case.columns, case.width))
        found = {}
        for keywords, excluded in (({}, ()), (ids or {"exclude_diagonal": True}, (*ids.values(),) or (None, None, 0))):
            ours = ops.contrastive_lse(image, text, scale, **keywords, backend=backend)
            exact = reference.contrastive_lse(*(x.double() for x in (image, text, scale)), *excluded)
            eager = reference.contrastive_lse(image, text, scale, *excluded)
            for name, a, b, c in zip(ours._fields, ours, exact, eager, strict=True):
                nothing = b == -math.inf
                assert torch.equal(a == -math.inf, nothing)
                a, b, c = (x[~nothing] for x in (a, b, c))
                assert a.dtype == dtype
                found[f"{name} {', '.join(keywords)}"] = a, b, unlucky(b, c)
        return found

    check(results, condition=condition_of(case))


@each_implementation
def test_lse_and_gradients(backend: str) -> None:
    """N x M, with weights of both signs; nothing, the diagonal or equal ids left out."""
    row_ids, column_ids = torch.arange(70) % 11, torch.arange(90) % 13

    def results(keywords: dict[str, Any], excluded: tuple[Any, ...]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        inputs = [unit(70, 32).float(), unit(90, 32).float(), torch.tensor(20.0)]
        row_weight, column_weight = torch.randn(70, dtype=torch.float64), torch.randn(90, dtype=torch.float64)

        def of(lse: tuple[Tensor, Tensor]) -> Tensor:
            return (row_weight.to(lse[0]) * lse[0]).sum() + (column_weight.to(lse[1]) * lse[1]).sum()

        ours = lambda *x: ops.contrastive_lse(*x, **keywords, backend=backend)
        written_out = lambda *x: reference.contrastive_lse(*x, *excluded)
        runs = (ours, inputs), (written_out, [x.double() for x in inputs]), (written_out, inputs)
        values = zip(*(function(*x) for function, x in runs), strict=True)
        gradients = zip(*(differentiate(lambda *y, f=f: of(f(*y)), *x)[1:] for f, x in runs), strict=True)
        found = dict(zip(("row", "column", "d image", "d text", "d scale"), (*values, *gradients), strict=True))
        return {name: (a, b, c if c.ndim else unlucky(b, c)) for name, (a, b, c) in found.items()}

    for keywords, excluded in (
        ({}, ()),
        ({"exclude_diagonal": True}, (None, None, 0)),
        ({"image_ids": row_ids, "text_ids": column_ids}, (row_ids, column_ids)),
    ):
        check(lambda k=keywords, e=excluded: results(k, e), condition=20)


@each_implementation
def test_one_log_sum_exp_may_be_used_alone(backend: str) -> None:
    image, text = unit(9, 4).float(), unit(7, 4).float()
    for index in (0, 1):
        ours = differentiate(
            lambda x, y, i=index: ops.contrastive_lse(x, y, torch.tensor(3.0), backend=backend)[i].sum(), image, text
        )
        eager = differentiate(
            lambda x, y, i=index: reference.contrastive_lse(x, y, torch.tensor(3.0))[i].sum(), image, text
        )
        torch.testing.assert_close(ours, eager)


@each_implementation
def test_everything_left_out(backend: str) -> None:
    """A row without a negative has the log-sum-exp of nothing, and no gradient goes through it."""
    image, text = (unit(3, 4).float().requires_grad_() for _ in range(2))
    scale = torch.tensor(3.0, requires_grad=True)
    ids = torch.tensor([0, 0, 0])
    lse = ops.contrastive_lse(image, text, scale, image_ids=ids, text_ids=ids, backend=backend)
    for part in lse:
        assert part.tolist() == [-math.inf] * 3
    assert ops.contrastive_loss(image, text, scale, image_ids=ids, text_ids=ids, backend=backend) == 0
    gradients = torch.autograd.grad(sum(part.exp().sum() for part in lse), (image, text, scale))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@each_implementation
def test_inputs_with_strides(backend: str) -> None:
    """Every second column of a wider tensor, and a transposed one: the same numbers as their copies."""
    image, text = unit(40, 64).float()[:, ::2], unit(32, 40).float().t()
    assert not image.is_contiguous() and not text.is_contiguous()
    loss = lambda x, y: ops.contrastive_loss(x, y, torch.tensor(10.0), backend=backend)
    with_strides = differentiate(loss, image, text)
    copies = differentiate(loss, image.contiguous(), text.contiguous())
    torch.testing.assert_close(with_strides, copies)


def test_gradcheck() -> None:
    image, text = (unit(n, 3).requires_grad_() for n in (4, 6))
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    image_ids, text_ids = torch.tensor([0, 1, 2, 1]), torch.tensor([2, 0, 1, 1, 0, 2])
    for positives in ("exclude", "average"):
        keywords = {"image_ids": image_ids, "text_ids": text_ids, "positives": positives, "workspace_bytes": 100}
        assert torch.autograd.gradcheck(lambda *x, k=keywords: ops.contrastive_loss(*x, **k), (image, text, scale))
    for keywords in ({}, {"exclude_diagonal": True}, {"image_ids": image_ids, "text_ids": text_ids}):
        assert torch.autograd.gradcheck(lambda *x, k=keywords: ops.contrastive_lse(*x, **k), (image, text, scale))
    assert torch.autograd.gradcheck(lambda x, y, s: ops.contrastive_loss(x, y[:4], s), (image, text, scale))


@each_implementation
def test_opcheck(backend: str) -> None:
    image, text = (unit(n, 3).float().requires_grad_() for n in (4, 6))
    scale = torch.tensor(5.0, requires_grad=True)
    image_ids, text_ids = torch.tensor([0, 1, 2, 1]), torch.tensor([2, 0, 1, 1, 0, 2])
    for excluded, kept_rows in (((image_ids, text_ids, None), 0), ((None, None, 0), 2), ((None, None, None), 4)):
        op = torch.ops.vlmo_fast.contrastive_lse
        torch.library.opcheck(op, (image, text, scale, *excluded, kept_rows, backend))
        plain = [x.detach() for x in (image, text, scale)]
        row_lse, column_lse, kept = op(*plain, *excluded, kept_rows, backend)
        arguments = (*plain, *excluded, row_lse, torch.rand(4), column_lse, torch.rand(6), kept, backend)
        torch.library.opcheck(torch.ops.vlmo_fast.contrastive_lse_backward, arguments)
    matches = matches_of(image_ids, text_ids)
    of_negatives = [torch.randn(4, requires_grad=True), torch.randn(6, requires_grad=True)]
    arguments = (image, text, scale, *of_negatives, *matches, torch.rand(4), torch.rand(6))
    torch.library.opcheck(torch.ops.vlmo_fast.contrastive_positives, arguments)
    plain = [x.detach() for x in arguments]
    torch.library.opcheck(torch.ops.vlmo_fast.contrastive_positives_backward, (torch.tensor(1.0), *plain))


@pytest.mark.parametrize("positives", [None, "exclude", "average"])
def test_compiles_as_one_graph(positives: str | None) -> None:
    image, text, scale = unit(6, 4).float(), unit(6, 4).float(), torch.tensor(5.0)
    ids = torch.tensor([0, 1, 2, 0, 1, 2])
    keywords = {"image_ids": ids, "text_ids": ids, "positives": positives} if positives else {}
    loss = lambda *x: ops.contrastive_loss(*x, **keywords)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(differentiate(compiled, image, text, scale), differentiate(loss, image, text, scale))


@pytest.mark.parametrize("keywords", [{}, {"positives": "exclude"}, {"positives": "average"}], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@each_implementation
def test_what_is_not_finite_gives_nan(backend: str, value: float, keywords: dict[str, str]) -> None:
    """One bad number anywhere, in any of the three tensors, and in one dimension, where infinities keep a sign."""
    ids = {"image_ids": torch.arange(5), "text_ids": torch.arange(5)} if keywords else {}
    for width, which in itertools.product((1, 4), range(3)):
        inputs = [unit(5, width).float(), unit(5, width).float(), torch.tensor(2.0)]
        inputs[which].view(-1)[-1] = value
        assert ops.contrastive_loss(*inputs, **ids, **keywords, backend=backend).isnan()
        if which < 2:
            alone = [x[-1:] if x.ndim else x for x in inputs]
            assert ops.contrastive_loss(*alone, backend=backend).isnan()


@each_implementation
def test_laws(backend: str) -> None:
    """Exchanging the modalities, permuting the pairs or renaming the ids changes nothing but rounding."""
    image, text, scale = unit(50, 8).float(), unit(50, 8).float(), torch.tensor(14.0)
    ids = torch.arange(50) % 20
    order = torch.randperm(50)
    for positives in ("exclude", "average"):
        loss = lambda x, y, a, b, p=positives: ops.contrastive_loss(
            x, y, scale, image_ids=a, text_ids=b, positives=p, backend=backend
        )
        wanted = loss(image, text, ids, ids)
        for other in (
            loss(text, image, ids, ids),
            loss(image[order], text, ids[order], ids),
            loss(image, text, 1000 - ids, 1000 - ids),
        ):
            torch.testing.assert_close(other, wanted)
        assert not torch.isclose(loss(image, text[order], ids, ids), wanted)
    assert not torch.isclose(wanted, ops.contrastive_loss(image, text, scale, image_ids=ids, text_ids=ids))
    torch.testing.assert_close(
        ops.contrastive_loss(image, text, scale, image_ids=order, text_ids=order, backend=backend),
        ops.contrastive_loss(image, text, scale, backend=backend),
    )


def test_memory_is_linear() -> None:
    """No tensor of a pass has N x M elements, whatever allocates it; with a workspace one has."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    count = 3000
    image, text = (unit(count, 8).float().requires_grad_() for _ in range(2))
    ids = torch.arange(count) // 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "CHUNK_BYTES", 2**20)
        for keywords in (
            {},
            {"image_ids": ids, "text_ids": ids},
            {"image_ids": ids, "text_ids": ids, "positives": "average"},
        ):
            with Largest() as seen:
                ops.contrastive_loss(image, text, torch.tensor(9.0), **keywords, backend="chunked").backward()
            assert seen.elements < count * count / 16
        with torch.no_grad(), Largest() as seen:
            ops.sample_hard_negatives(image, text, torch.tensor(9.0))
            ops.retrieval_ranks(image, text, image_ids=ids, text_ids=ids)
            ops.similarity_topk(image, text, 10)
        assert seen.elements < count * count / 16
        with Largest() as seen:
            ops.contrastive_loss(image, text, torch.tensor(9.0), workspace_bytes=4 * count**2)
        assert seen.elements == count**2


def test_workspace_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all similarities kept, the backward pass multiplies twice, and without three times."""
    image, text = (unit(64, 8).float().requires_grad_() for _ in range(2))
    calls = []
    original = blocks._block
    monkeypatch.setattr(blocks, "_block", lambda *x: calls.append(x) or original(*x))
    for workspace, expected in ((0, 2), (4 * 64 * 64, 1)):
        calls.clear()
        ops.contrastive_loss(image, text, torch.tensor(9.0), workspace_bytes=workspace).backward()
        assert len(calls) == expected
    with torch.no_grad():  # nothing is kept for a backward pass that will not come
        forward = blocks.Blocks.forward
        monkeypatch.setattr(blocks.Blocks, "forward", lambda *x: pytest.fail("kept") if x[-1] else forward(*x))
        ops.contrastive_loss(image, text, torch.tensor(9.0), workspace_bytes=10**9)


@each_implementation
def test_operations_are_counted(backend: str) -> None:
    """2 N M D forward; 6 N M D backward, and a third less where all similarities were kept."""
    from torch.utils.flop_counter import FlopCounterMode

    image, text = (unit(64, 8).float().requires_grad_() for _ in range(2))
    for workspace, backward in ((0, 6), (4 * 64 * 64, 4), (4 * 64 * 32, 5)):
        with FlopCounterMode(display=False) as counter:
            loss = ops.contrastive_loss(image, text, torch.tensor(9.0), workspace_bytes=workspace, backend=backend)
            forward = counter.get_total_flops()
            loss.backward()
        assert forward == 2 * 64 * 64 * 8
        assert counter.get_total_flops() - forward == backward * 64 * 64 * 8


# The tile kernels' surroundings


@pytest.fixture
def tiles_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tile kernels' ops in torch, in small pieces, so that all that surrounds them runs without a GPU."""

    def block_of(rows: Tensor, columns: Tensor, scale: Tensor, *vectors: Tensor | None) -> Tensor:
        for operand in (rows, columns):
            assert operand.is_contiguous() and operand.shape[1] % 8 == 0 and operand.data_ptr() % 16 == 0
        assert all(vector is None or vector.is_contiguous() for vector in vectors)
        return scale * rows.float() @ columns.float().t()

    def sums(rows, columns, scale, row_ids, column_ids, diagonal, row_lse, top, total, arch):
        block = block_of(rows, columns, scale, row_ids, column_ids, row_lse, top, total)
        mask = PairMask(row_ids, column_ids, diagonal)
        blocks.TorchEpilogue().sums(block, 0, mask, row_lse, (top, total))

    def gradient(rows, columns, scale, out, row_ids, column_ids, diagonal, *vectors_and_arch):
        vectors = vectors_and_arch[:-1]
        block = block_of(rows, columns, scale, row_ids, column_ids, out, *vectors)
        mask = PairMask(row_ids, column_ids, diagonal)
        blocks.TorchEpilogue().gradient(block, block, 0, mask, vectors[:2], vectors[2:])
        out.copy_(block)

    library = torch.library.Library("vlmo_fast", "IMPL")
    library.impl("similarity_tile_sums_", sums, "CPU")
    library.impl("similarity_tile_gradient_", gradient, "CPU")
    monkeypatch.setattr(extensions, "load", lambda name: None)
    # on a CPU torch has no product of halves with a float32 result
    add = lambda total, left, right: total.add_(left.float() @ right.float())
    monkeypatch.setattr(tiles, "add_product", add)
    monkeypatch.setattr(tiles, "CACHED_BYTES", 2**15)
    monkeypatch.setattr(tiles, "PIECE_ROWS", 128)
    monkeypatch.setattr(tiles, "PIECE_COLUMNS", 192)
    yield
    library._destroy()


@pytest.mark.usefixtures("tiles_on_cpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("excluded", ["nothing", "diagonal", "ids"])
def test_what_surrounds_the_tile_kernels(excluded: str, dtype: torch.dtype) -> None:
    """Launches, pieces of G, padding, strides, exclusion in pieces, the factor of float16: against float64."""
    rows, columns = (300, 300) if excluded == "diagonal" else (300, 500)
    image = unit(rows, 140, dtype=dtype)[:, ::2]  # 70 wide: neither contiguous nor a multiple of 8
    text, scale = unit(columns, 70, dtype=dtype), torch.tensor(14.3)
    ids = (torch.arange(rows) % 90, torch.arange(columns) % 70) if excluded == "ids" else (None, None)
    diagonal = 0 if excluded == "diagonal" else None
    weights = torch.rand(rows, dtype=torch.float64) / rows, torch.rand(columns, dtype=torch.float64) / columns

    def of(row: Tensor, column: Tensor) -> Tensor:
        return (weights[0].to(row) * row).sum() + (weights[1].to(column) * column).sum()

    def ours(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return of(*lse.log_sum_exps(x, y, s, PairMask(*ids, diagonal), 0, "cuda"))

    lse_of = lambda x, y, s: of(*reference.contrastive_lse(x, y, s, *ids, diagonal))
    found = differentiate(ours, image, text, scale)
    exact = differentiate(lse_of, *(x.double() for x in (image, text, scale)))
    eager = differentiate(lse_of, image, text, scale)
    for what, a, b, c in zip(("value", "d image", "d text", "d scale"), found, exact, eager, strict=True):
        # G is rounded to the embeddings' dtype, so theirs are all gradients' bounds
        bounds = torch.float32 if what == "value" else dtype
        check_draws(what, [(a, b, c if c.ndim else unlucky(b, c))], bounds, 14.3)


def test_which_gpu_takes_which_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """WGMMA's machine code runs on Hopper alone, not on what followed; and nothing is automatic yet."""
    monkeypatch.setattr(dispatch, "_is_built", lambda name: True)
    takes = {"cuda": [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], "cuda-sm90a": [(9, 0)]}
    for capability in [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0), None]:
        problem = ops.Problem("cuda", torch.bfloat16, capability=capability)
        assert ops.select("contrastive_loss", problem) == "chunked"
        for backend, able in takes.items():
            if capability in able:
                assert ops.select("contrastive_loss", problem, backend) == backend
            else:
                with pytest.raises(NotImplementedError, match="needs compute capability"):
                    ops.select("contrastive_loss", problem, backend)
    for backend in takes:
        with pytest.raises(NotImplementedError, match="take bfloat16 and float16"):
            ops.select("contrastive_loss", ops.Problem("cuda", torch.float32, capability=(9, 0)), backend)


# Refusals


def test_refusals() -> None:
    x, ids, one = torch.ones(3, 2), torch.arange(3), torch.tensor(1.0)
    loss = ops.contrastive_loss
    for error, message, call in [
        (
            ValueError,
            r"image_ids and text_ids must come together, got one of them",
            lambda: loss(x, x, one, image_ids=ids),
        ),
        (ValueError, r"positives must be 'exclude' or 'average', got 'x'", lambda: loss(x, x, one, positives="x")),
        (ValueError, r"workspace_bytes must be at least 0, got -1", lambda: loss(x, x, one, workspace_bytes=-1)),
        (
            TypeError,
            r"image_ids must be int64, got torch.int32",
            lambda: loss(x, x, one, image_ids=ids.int(), text_ids=ids),
        ),
        (
            ValueError,
            r"text_ids must have shape \(3,\), got \(2,\)",
            lambda: loss(x, x, one, image_ids=ids, text_ids=ids[:2]),
        ),
        (
            ValueError,
            r"text_ids must be on cpu, got meta",
            lambda: loss(x, x, one, image_ids=ids, text_ids=ids.to("meta")),
        ),
        (
            ValueError,
            r"every id in image_ids must occur in text_ids; id 2 does not",
            lambda: loss(x, x, one, image_ids=ids, text_ids=ids.clamp(max=1)),
        ),
        (
            ValueError,
            r"every id in text_ids must occur in image_ids; id 2 does not",
            lambda: loss(x, x, one, image_ids=ids.clamp(max=1), text_ids=ids),
        ),
        (TypeError, r"logit_scale must be a float tensor, got torch.int64", lambda: loss(x, x, torch.tensor(1))),
        (ValueError, r"must not be empty, got \(3, 0\) and \(3, 0\)", lambda: loss(x[:, :0], x[:, :0], one)),
    ]:
        with pytest.raises(error, match=f"^contrastive_loss: .*{message}"):
            call()
    with pytest.raises(
        ValueError, match=r"^contrastive_lse: exclude_diagonal must be False together with ids, got True"
    ):
        ops.contrastive_lse(x, x, one, image_ids=ids, text_ids=ids, exclude_diagonal=True)
    with pytest.raises(
        ValueError, match=r"^contrastive_lse: image_embeds and text_embeds must be \(N, P\) and \(M, P\)"
    ):
        ops.contrastive_lse(x, torch.ones(3, 4), one)
    for bad, message in ((x[:0], "must not be empty"), (torch.full((3, 2), math.nan), "must be finite")):
        with pytest.raises(ValueError, match=f"^similarity_topk: queries and candidates {message}"):
            ops.similarity_topk(x, bad, 1)
    for k in (0, 4):
        with pytest.raises(ValueError, match=rf"^similarity_topk: k must be from 1 to 3, got {k}"):
            ops.similarity_topk(x, x, k)
    with pytest.raises(TypeError, match=r"^similarity_topk: .* one float dtype, got torch.float32 and torch.float64"):
        ops.similarity_topk(x, x.double(), 1)
    for value in (math.nan, math.inf, 1e30):  # 1e30 squared is no float32
        with pytest.raises(ValueError, match=r"^retrieval_ranks: .* must be finite, and so must their products"):
            ops.retrieval_ranks(x * value, x * value)
        with pytest.raises(ValueError, match=r"^sample_hard_negatives: .* must be finite, and so must their products"):
            ops.sample_hard_negatives(x * value, x * value, one)
    with pytest.raises(ValueError, match=r"^retrieval_ranks: every id in text_ids must occur in image_ids; id 2"):
        ops.retrieval_ranks(x, x, image_ids=ids.clamp(max=1), text_ids=ids)
    with pytest.raises(ValueError, match=r"^sample_hard_negatives: each row must have a negative, got one with none"):
        ops.sample_hard_negatives(x, x, one, image_ids=ids * 0, text_ids=ids * 0)


# Hard negatives


@pytest.mark.parametrize("tile", [2, 3, 256], ids="tiles of {}".format)
@pytest.mark.parametrize("with_ids", [False, True], ids=["pairs", "ids"])
def test_draws_follow_the_exact_distribution(with_ids: bool, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square of 3,000 draws for each of 8 rows, over whole, ragged and single tiles, many blocks.

    With a fixed seed nothing is random; a right sampler gives p > 1e-4 in all 8 tests for 99.9 % of all seeds. Which
    direction is which is for test_losses.py.
    """
    monkeypatch.setattr(sampling, "TILE", tile)
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 4 * 10 * 700)  # 640 rows a block
    rows, columns, scale = unit(8, 5).float(), unit(10, 5).float(), torch.tensor(3.0)
    row_ids, column_ids = (
        (torch.arange(8) % 4, torch.arange(10) % 4) if with_ids else (torch.arange(8), torch.arange(10))
    )
    excluded = PairMask(row_ids.repeat(3000), column_ids)
    drawn = sampling.draw(rows.repeat(3000, 1), columns, scale, excluded, torch.Generator().manual_seed(1))
    probabilities = reference.negative_probabilities(rows, columns, scale, row_ids, column_ids)
    for row, wanted in enumerate(probabilities.double()):
        seen = torch.bincount(drawn.view(3000, 8)[:, row], minlength=10)
        possible = wanted > 0
        assert seen[~possible].sum() == 0
        expected = wanted[possible] / wanted.sum() * 3000
        assert chisquare(seen[possible].numpy(), expected.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("with_ids", [False, True], ids=["pairs", "ids"])
def test_no_draw_is_a_positive(with_ids: bool) -> None:
    """The public function, N != M with ids: each index in range, of the other modality, and never a match."""
    images, texts = (20, 50) if with_ids else (30, 30)
    ids = {"image_ids": torch.arange(images) % 7, "text_ids": torch.arange(texts) % 7} if with_ids else {}
    own = [*ids.values()] or [torch.arange(images)] * 2
    image, text = random(images, texts, 8)
    for scale in (1.0, 100.0):
        drawn = ops.sample_hard_negatives(image, text, torch.tensor(scale), **ids)
        assert drawn.image_ids.shape == (texts,)
        assert drawn.text_ids.shape == (images,)
        assert (own[0][drawn.image_ids] != own[1]).all()
        assert (own[1][drawn.text_ids] != own[0]).all()


@pytest.mark.parametrize("num_columns", [1, 2, 3, 256, 1000])
def test_running_sums_never_fall(num_columns: int) -> None:
    """Nor move to the bit across a weight of 0, from 1e-30 to 1: what is found by them has a weight."""
    weights = 10 ** (-30 * torch.rand(50, num_columns, dtype=torch.float64)) * (torch.rand(50, num_columns) < 0.7)
    sums = sampling._running_sums(weights)
    torch.testing.assert_close(sums[:, :num_columns], weights.cumsum(1), rtol=1e-14, atol=0)
    steps = torch.nn.functional.pad(sums, (1, 0)).diff(dim=1)
    assert (steps >= 0).all()
    assert (steps[:, :num_columns][weights == 0] == 0).all()
    assert (steps[:, num_columns:] == 0).all()


def test_extreme_uniforms_find_a_weight() -> None:
    """0 and the largest number below 1 give the first and the last column whose weight is not 0."""
    logits = torch.tensor([[-math.inf, 0.0, -200.0, 1.0, -math.inf]]).repeat(2, 1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sampling._choose(logits, ends).tolist() == [1, 3]
    wide = torch.full((2, 1000), -math.inf)
    wide[:, 300], wide[:, 700] = 0.0, 0.0
    assert sampling._choose(wide.clone(), ends).tolist() == [300, 700]
    assert sampling._choose(wide, torch.tensor([0.4999, 0.5001], dtype=torch.float64)).tolist() == [300, 700]


# Retrieval


def brute_force_ranks(scores: list[list[float]], match: Callable[[int, int], bool]) -> list[int]:
    ranks = []
    for i, row in enumerate(scores):
        places = [
            1 + sum(other > value or (other == value and k < j) for k, other in enumerate(row))
            for j, value in enumerate(row)
            if match(i, j)
        ]
        ranks.append(min(places))
    return ranks


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_ranks_and_topk_with_ties(dtype: torch.dtype) -> None:
    """Small integers: exact in any dtype, and most similarities occur several times."""
    image, text = (torch.randint(-2, 3, (n, 3)).to(dtype) for n in (21, 105))
    image_ids, text_ids = torch.randperm(21), torch.arange(105) // 5
    scores = (image.double() @ text.double().t()).tolist()
    columns = [list(column) for column in zip(*scores, strict=True)]
    ranks = ops.retrieval_ranks(image, text, image_ids=image_ids, text_ids=text_ids, backend="chunked")
    same = lambda i, j: bool(image_ids[i] == text_ids[j])
    assert ranks.text_ranks.tolist() == brute_force_ranks(scores, same)
    assert ranks.image_ranks.tolist() == brute_force_ranks(columns, lambda j, i: same(i, j))
    square = ops.retrieval_ranks(image, text[:21])
    assert square.text_ranks.tolist() == brute_force_ranks([row[:21] for row in scores], lambda i, j: i == j)
    assert square.image_ranks.tolist() == brute_force_ranks(columns[:21], lambda i, j: i == j)
    for k in (1, 7, 105):
        top = ops.similarity_topk(image, text, k, backend="chunked")
        for i, row in enumerate(scores):
            order = sorted(range(105), key=lambda j, row=row: (-row[j], j))[:k]
            assert top.indices[i].tolist() == order
            assert top.values[i].tolist() == [row[j] for j in order]


def test_the_references_agree() -> None:
    image, text = unit(40, 6), unit(200, 6)
    ids = {"image_ids": torch.randperm(40), "text_ids": torch.arange(200) // 5}
    for name in ("chunked", "eager"):
        ours, other = (ops.retrieval_ranks(image, text, **ids, backend=b) for b in (name, "auto"))
        assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))
        assert torch.equal(
            ops.similarity_topk(image, text, 9, backend=name).indices, ops.similarity_topk(image, text, 9).indices
        )


def test_zeros_of_either_sign_are_equal() -> None:
    queries = torch.tensor([[1.0, 0.0]])
    candidates = torch.tensor([[-0.0, 1.0], [0.0, 1.0], [-1e-40, 0.0], [-0.0, 0.0], [-1.0, 0.0]])
    top = ops.similarity_topk(queries, candidates, 5)
    assert top.indices.tolist() == [[0, 1, 3, 2, 4]]


def test_recall_with_five_captions() -> None:
    """An image counts once if any of its captions is among the first k; a caption if its image is."""
    image, text = matched(50, 50, 16)
    text = F.normalize(text.repeat_interleave(5, 0) + 0.6 * unit(250, 16), dim=-1)
    image_ids, text_ids = torch.arange(50), torch.arange(250) // 5
    ranks = ops.retrieval_ranks(image, text, image_ids=image_ids, text_ids=text_ids)
    scores = image @ text.t()
    for k in (1, 5, 10):
        found = text_ids[scores.topk(k, dim=1).indices] == image_ids[:, None]
        assert ops.recall_at_k(ranks.text_ranks, k) == found.any(1).float().mean()
        found = scores.topk(k, dim=0).indices == text_ids
        assert ops.recall_at_k(ranks.image_ranks, k) == found.any(0).float().mean()
    assert 0 < ops.recall_at_k(ranks.image_ranks, 1) < 1


@pytest.mark.parametrize("backend", ops.implementations("similarity_topk"))
@pytest.mark.parametrize(
    ("dtype", "width", "size"), [(torch.float32, 768, 10), (torch.float64, 64, 1002), (torch.float32, 4, 77)]
)
def test_twins_have_one_similarity(dtype: torch.dtype, width: int, size: int, backend: str) -> None:
    """A matmul adds up equal vectors in other orders by where they stand: ties were broken by rounding."""
    generator = torch.Generator().manual_seed(0)
    originals = F.normalize(torch.randn(size // 2, width, dtype=dtype, generator=generator), dim=1)
    copies = torch.cat([originals, originals])[torch.randperm(2 * len(originals), generator=generator)]
    copies[3, 0], copies[5, 0] = 0.0, -0.0
    copies[5, 1:] = copies[3, 1:]
    equal = (copies[:, None] == copies).all(2)
    for number in (1, 5, 33):
        queries = F.normalize(torch.randn(number, width, dtype=dtype, generator=generator), dim=1)
        values, indices = ops.similarity_topk(queries, copies, len(copies), backend=backend)
        scores = torch.empty_like(values).scatter_(1, indices, values)
        assert torch.equal(scores, scores[:, equal.int().argmax(1)])
        assert torch.equal(indices, scores.sort(dim=1, descending=True, stable=True).indices)
    ids = equal.int().argmax(1)  # twins are one another's matches, so each query's rank is that of the first of them
    ranks = ops.retrieval_ranks(copies, copies, backend=backend)
    position = scores.new_tensor([(equal[i, :i]).sum() for i in range(len(copies))]).long()
    assert torch.equal(ranks.text_ranks, 1 + position)
    assert torch.equal(ranks.image_ranks, 1 + position)
    assert (ops.retrieval_ranks(copies, copies, image_ids=ids, text_ids=ids, backend=backend).text_ranks == 1).all()
