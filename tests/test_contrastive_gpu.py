"""The contrastive ops on a CUDA device: `pytest -m gpu -k contrastive`. Not run on a GPU yet."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare
from test_contrastive import (
    antipodal,
    brute_force_ranks,
    differentiate,
    duplicated,
    low,
    matched,
    random,
    unit,
    unlucky,
)
from tolerances import check_draws
from torch import Tensor

from vlmo_fast import build, ops
from vlmo_fast.ops import reference
from vlmo_fast.ops.pairs import blocks, sampling, tiles
from vlmo_fast.ops.types import PairMask

TILES = ("cuda", "cuda-sm90a")

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def cuda_extension() -> Path:
    return build.build("cuda")


def skip_unless_able(backend: str, dtype: torch.dtype) -> None:
    problem = ops.Problem("cuda", dtype, capability=torch.cuda.get_device_capability())
    try:
        ops.select("contrastive_loss", problem, backend)
    except NotImplementedError as error:
        pytest.skip(str(error))


def on_device(*tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to("cuda", dtype) for tensor in tensors]


@pytest.mark.parametrize("backend", [*TILES, "cuda-blocks", "chunked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "width", "scale", "embeddings", "ids"),
    [
        (1, 1, 768, 14.3, random, None),
        (2, 2, 1, 1.0, random, None),  # a width that needs padding
        (127, 127, 64, 100.0, random, None),
        (128, 128, 544, 14.3, random, None),
        (129, 129, 768, 14.3, random, None),
        (1000, 1000, 1024, 14.3, random, None),
        (4096, 4096, 768, 14.3, random, None),
        (200, 200, 256, 100.0, low, None),
        (300, 300, 64, 100.0, matched, None),
        (128, 128, 64, 100.0, antipodal, None),
        (128, 128, 64, 14.3, duplicated, None),
        (100, 500, 64, 14.3, random, 5),
        (1025, 1025, 2048, 14.3, random, 1),
    ],
)
def test_contrastive_loss_and_gradients(
    backend: str, dtype: torch.dtype, rows: int, columns: int, width: int, scale: float, embeddings, ids: int | None
) -> None:
    skip_unless_able(backend, dtype)
    image, text = on_device(*embeddings(rows, columns, width), dtype=dtype)
    factor = torch.tensor(scale, device="cuda")
    keywords: dict[str, Tensor] = {}
    if ids:
        keywords = {
            "image_ids": torch.arange(rows, device="cuda") % rows,
            "text_ids": torch.arange(columns, device="cuda") // ids,
        }
    each = keywords or dict.fromkeys(("image_ids", "text_ids"), torch.arange(rows, device="cuda"))
    eager = differentiate(lambda *x: reference.contrastive_loss(*x, *keywords.values()), image, text, factor)
    exact = differentiate(
        lambda *x: reference.contrastive_loss(*x, *each.values()), *(x.double() for x in (image, text, factor))
    )
    ours = differentiate(lambda *x: ops.contrastive_loss(*x, **keywords, backend=backend), image, text, factor)
    condition = float((scale * image.double() @ text.double().t()).abs().max())
    for what, a, b, c in zip(("loss", "d image", "d text", "d scale"), ours, exact, eager, strict=True):
        # G enters its matmuls in the embeddings' dtype, so that is the dtype of all gradients' bounds
        bounds = torch.float32 if what == "loss" else dtype
        check_draws(what, [(a, b, c if c.ndim else unlucky(b, c))], bounds, condition)


@pytest.mark.parametrize("backend", [*TILES, "cuda-blocks", "chunked"])
@pytest.mark.parametrize("excluded", ["nothing", "diagonal", "ids"])
@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "in pieces"])
def test_contrastive_lse_and_gradients(
    backend: str, excluded: str, in_pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N != M, strided rows, a width of padding; one launch, and many."""
    skip_unless_able(backend, torch.bfloat16)
    if in_pieces:
        monkeypatch.setattr(blocks, "CHUNK_BYTES_DEVICE", 2**18)
        monkeypatch.setattr(tiles, "CACHED_BYTES", 2**15)
        monkeypatch.setattr(tiles, "PIECE_ROWS", 128)
        monkeypatch.setattr(tiles, "PIECE_COLUMNS", 192)
    rows, columns = 300, 500
    image, text = on_device(unit(rows, 140), unit(columns, 70), dtype=torch.bfloat16)
    image, scale = image[:, ::2], torch.tensor(14.3, device="cuda")
    ids = (torch.arange(rows, device="cuda") % 90, torch.arange(columns, device="cuda") % 70)
    keywords, given = {
        "nothing": ({}, ()),
        "diagonal": ({"exclude_diagonal": True}, (None, None, 0)),
        "ids": ({"image_ids": ids[0], "text_ids": ids[1]}, ids),
    }[excluded]
    weights = [torch.rand(n, dtype=torch.float64, device="cuda") / n for n in (rows, columns)]
    of = lambda lse: sum((weight.to(part) * part).sum() for weight, part in zip(weights, lse, strict=True))
    ours = differentiate(lambda *x: of(ops.contrastive_lse(*x, **keywords, backend=backend)), image, text, scale)
    written_out = lambda *x: of(reference.contrastive_lse(*x, *given))
    exact = differentiate(written_out, *(x.double() for x in (image, text, scale)))
    eager = differentiate(written_out, image, text, scale)
    for what, a, b, c in zip(("value", "d image", "d text", "d scale"), ours, exact, eager, strict=True):
        bounds = torch.float32 if what == "value" else torch.bfloat16
        check_draws(what, [(a, b, c if c.ndim else unlucky(b, c))], bounds, 14.3)


@pytest.mark.parametrize("backend", [*TILES, "cuda-blocks", "chunked"])
def test_contrastive_average(backend: str) -> None:
    skip_unless_able(backend, torch.bfloat16)
    image, text = on_device(*random(100, 500, 64), dtype=torch.bfloat16)
    scale = torch.tensor(14.3, device="cuda")
    ids = torch.arange(100, device="cuda"), torch.arange(500, device="cuda") // 5
    keywords = {"image_ids": ids[0], "text_ids": ids[1], "positives": "average"}
    written_out = lambda *x: reference.contrastive_loss(*x, *ids, "average")
    ours = differentiate(lambda *x: ops.contrastive_loss(*x, **keywords, backend=backend), image, text, scale)
    exact = differentiate(written_out, *(x.double() for x in (image, text, scale)))
    eager = differentiate(written_out, image, text, scale)
    for what, a, b, c in zip(("loss", "d image", "d text", "d scale"), ours, exact, eager, strict=True):
        bounds = torch.float32 if what == "loss" else torch.bfloat16
        check_draws(what, [(a, b, c if c.ndim else unlucky(b, c))], bounds, 14.3)


@pytest.mark.parametrize("backend", ["cuda-blocks", "chunked"])
def test_contrastive_in_tf32(backend: str) -> None:
    """By torch's own switch: other numbers than float32's, within TF32's ten bits of a logit; float32 without it."""
    image, text = on_device(*random(500, 500, 768), dtype=torch.float32)
    scale = torch.tensor(14.3, device="cuda")
    loss = lambda *x: ops.contrastive_loss(*x, backend=backend)
    exact = differentiate(reference.contrastive_loss, *(x.double() for x in (image, text, scale)))
    plain = differentiate(loss, image, text, scale)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        rounded = differentiate(loss, image, text, scale)
    finally:
        torch.set_float32_matmul_precision(before)
    for a, b, c in zip(plain, rounded, exact, strict=True):
        errors = [float((x.double() - c).norm() / c.norm()) for x in (a, b)]
        assert errors[0] < 1e-5
        assert errors[1] < 14.3 * 2**-11
        assert errors[0] < errors[1] or not c.ndim  # a single number may be right by luck


@pytest.mark.parametrize("backend", [*TILES, "cuda-blocks"])
def test_contrastive_is_deterministic_on_any_stream_and_in_a_graph(backend: str) -> None:
    skip_unless_able(backend, torch.bfloat16)
    image, text = on_device(*random(1000, 1000, 768), dtype=torch.bfloat16)
    scale = torch.tensor(14.3, device="cuda")
    leaves = [x.requires_grad_() for x in (image, text, scale)]

    def step() -> list[Tensor]:
        loss = ops.contrastive_loss(*leaves, backend=backend)
        return [loss, *torch.autograd.grad(loss, leaves)]

    wanted = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        image.copy_(image.flip(0))
    graph.replay()
    changed = step()
    for a, b, c, d in zip(wanted, other, captured, changed, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, d)
        assert not torch.equal(a, c)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", [*TILES, "cuda-blocks"])
def test_contrastive_on_the_second_device(backend: str) -> None:
    skip_unless_able(backend, torch.bfloat16)
    image, text = on_device(*random(300, 300, 64), dtype=torch.bfloat16)
    scale = torch.tensor(14.3, device="cuda")
    loss = ops.contrastive_loss(image, text, scale, backend=backend)
    other = ops.contrastive_loss(*(x.to("cuda:1") for x in (image, text, scale)), backend=backend)
    assert torch.equal(loss, other.to("cuda:0"))


@pytest.mark.parametrize("backend", [*TILES, "cuda-blocks", "chunked"])
def test_contrastive_nan(backend: str) -> None:
    skip_unless_able(backend, torch.bfloat16)
    for value in (torch.nan, torch.inf):
        image, text = on_device(*random(300, 300, 64), dtype=torch.bfloat16)
        image[200, 3] = value
        assert ops.contrastive_loss(image, text, torch.tensor(14.3, device="cuda"), backend=backend).isnan()


@contextmanager
def no_waiting() -> Iterator[None]:
    """The host waits for the device nowhere in it, or there is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", [*TILES, "cuda-blocks", "chunked"])
def test_contrastive_does_not_wait_for_the_device(backend: str) -> None:
    skip_unless_able(backend, torch.bfloat16)
    image, text = (x.requires_grad_() for x in on_device(*random(300, 300, 64), dtype=torch.bfloat16))
    scale, ids = torch.tensor(14.3, device="cuda"), torch.arange(300, device="cuda") // 2

    def everything() -> None:
        loss = ops.contrastive_loss(image, text, scale, backend=backend)
        average = ops.contrastive_loss(
            image, text, scale, image_ids=ids, text_ids=ids, positives="average", backend=backend
        )
        (loss + average).backward()
        ops.sample_hard_negatives(image, text, scale, image_ids=ids, text_ids=ids)
        ops.retrieval_ranks(image, text, image_ids=ids, text_ids=ids)
        ops.similarity_topk(image, text, 10)

    everything()  # what is loaded and allocated at first may wait
    with no_waiting():
        everything()


def test_contrastive_with_ids_and_draws_under_the_deterministic_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is refused, and all comes out the same to the bit."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    image, text = (x.requires_grad_() for x in on_device(*random(300, 300, 64), dtype=torch.bfloat16))
    scale, ids = torch.tensor(14.3, device="cuda", requires_grad=True), torch.arange(300, device="cuda") // 3

    def everything() -> list[Tensor]:
        results = []
        for positives in ("exclude", "average"):
            loss = ops.contrastive_loss(image, text, scale, image_ids=ids, text_ids=ids, positives=positives)
            results += [loss, *torch.autograd.grad(loss, (image, text, scale))]
        generator = torch.Generator("cuda").manual_seed(1)
        results += ops.sample_hard_negatives(image, text, scale, image_ids=ids, text_ids=ids, generator=generator)
        results += ops.retrieval_ranks(image, text, image_ids=ids, text_ids=ids)
        return [*results, *ops.similarity_topk(image, text, 10)]

    torch.use_deterministic_algorithms(True)
    try:
        first, second = everything(), everything()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contrastive_draws_follow_the_exact_distribution(dtype: torch.dtype) -> None:
    """Chi-square of 3,000 draws for each of 8 rows, as on a CPU; 600 columns are three tiles."""
    rows, columns = on_device(unit(8, 5), unit(600, 5), dtype=dtype)
    scale = torch.tensor(3.0, device="cuda")
    row_ids, column_ids = torch.arange(8, device="cuda"), torch.arange(600, device="cuda") % 10
    excluded = PairMask(row_ids.repeat(3000), column_ids)
    generator = torch.Generator("cuda").manual_seed(1)
    drawn = sampling.draw(rows.repeat(3000, 1), columns, scale, excluded, generator).view(3000, 8)
    probabilities = reference.negative_probabilities(*(x.double() for x in (rows, columns, scale)), row_ids, column_ids)
    for row, wanted in enumerate(probabilities):
        seen = torch.bincount(drawn[:, row], minlength=600)
        assert seen[wanted == 0].sum() == 0
        groups = torch.arange(600, device="cuda") // 20  # enough expected in each for the test to hold
        expected = torch.zeros(30, dtype=torch.float64, device="cuda").index_add(0, groups, wanted) * 3000
        found = torch.zeros(30, dtype=torch.int64, device="cuda").index_add(0, groups, seen)
        assert chisquare(found.cpu().numpy(), expected.cpu().numpy()).pvalue > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_contrastive_ranks_and_topk_with_ties(dtype: torch.dtype) -> None:
    """Small integers, exact in any dtype, most similarities several times."""
    image, text = (torch.randint(-2, 3, (n, 3)).to("cuda", dtype) for n in (21, 105))
    ids = torch.randperm(21), torch.arange(105) // 5
    scores = (image.double() @ text.double().t()).tolist()
    columns = [list(column) for column in zip(*scores, strict=True)]
    ranks = ops.retrieval_ranks(image, text, image_ids=ids[0].cuda(), text_ids=ids[1].cuda())
    same = lambda i, j: bool(ids[0][i] == ids[1][j])
    assert ranks.text_ranks.tolist() == brute_force_ranks(scores, same)
    assert ranks.image_ranks.tolist() == brute_force_ranks(columns, lambda j, i: same(i, j))
    top = ops.similarity_topk(image, text, 17)
    for i, row in enumerate(scores):
        assert top.indices[i].tolist() == sorted(range(105), key=lambda j, row=row: (-row[j], j))[:17]
