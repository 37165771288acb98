"""The contrastive ops on a CUDA device: `pytest -m gpu -k contrastive`. Not run on a GPU yet."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_contrastive import antipodal, differentiate, duplicated, low, matched, random, unlucky
from tolerances import check
from torch import Tensor

from vlmo_fast import build, extensions, ops
from vlmo_fast.ops import reference

ROOT = Path(__file__).resolve().parents[1]
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
        check(what, a, b, c if c.ndim else unlucky(b, c), bounds, condition=condition)


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


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_contrastive_under_compute_sanitizer(tool: str, require_tool) -> None:
    """Small, ragged problems of each kernel; the tool's refusal to start is a failure that shows its words."""
    code = """
import torch
from vlmo_fast import ops
image, text = (torch.nn.functional.normalize(torch.randn(n, 72, device="cuda"), dim=-1) for n in (200, 200))
ids = torch.arange(200, device="cuda") // 2
scale = torch.tensor(14.3, device="cuda", requires_grad=True)
for backend in ("cuda", "cuda-sm90a", "cuda-blocks"):
    for keywords in ({}, {"image_ids": ids, "text_ids": ids}):
        leaves = [x.bfloat16().requires_grad_() for x in (image, text)]
        try:
            ops.contrastive_loss(*leaves, scale, **keywords, backend=backend).backward()
        except NotImplementedError as error:
            print(error)
torch.cuda.synchronize()
"""
    command = [require_tool("compute-sanitizer"), "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert extensions.is_built("cuda")
