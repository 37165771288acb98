"""Every op with each of its implementations, forward and backward, at small shapes: what compute-sanitizer watches.

    python tools/gpu_smoke.py [--small] [OP ...]

On a machine without CUDA it runs what runs there. An implementation that refuses is named; one that gives a number that
is not finite, or another result than the eager one, fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from vlmo_fast import ops


def ffn(device: torch.device, dtype: torch.dtype, rows: int) -> tuple[Callable[[str], Tensor], list[Tensor]]:
    """Three groups of one width that is no power of two, one of them a single row."""
    width = 96

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape) / max(shape[-1], 1) ** 0.5).to(device, dtype).requires_grad_()

    experts = [
        ops.ExpertWeights(
            draw(width), draw(width), draw(4 * width, width), draw(4 * width), draw(width, 4 * width), draw(width)
        )
        for _ in range(3)
    ]
    x, scale = draw(rows, width), draw(width)
    sizes = [1, rows // 2, rows - rows // 2 - 1]
    leaves = [x, scale, *(tensor for expert in experts for tensor in expert)]
    return lambda backend: ops.mome_ffn(x, sizes, experts, scale, backend=backend), leaves


def attention(device: torch.device, dtype: torch.dtype, rows: int) -> tuple[Callable[[str], Tensor], list[Tensor]]:
    """Sequences of text, image and both, odd lengths, a bias."""
    heads, size = 2, 32
    lengths = [(5, 17), (0, 17), (9, 0), (1, 17), (rows % 13 + 1, 0)]
    table, row = [], 0
    for text, image in lengths:
        table.append([[row, text, 0], [row + text, image, 16]])
        row += text + image
    qkv = torch.randn(row, 3, heads, size).to(device, dtype).requires_grad_()
    bias = torch.randn(heads, 33, 33).to(device, dtype).requires_grad_()
    segments = torch.tensor(table, dtype=torch.int32)

    def run(backend: str) -> Tensor:
        query, key, value = qkv.unbind(1)
        return ops.packed_attention(
            query, key, value, segments.to(device), bias, host_segments=segments, max_length=32, backend=backend
        )

    return run, [qkv, bias]


def contrast(device: torch.device, dtype: torch.dtype, rows: int) -> tuple[Callable[[str], Tensor], list[Tensor]]:
    """Two tiles at least, the last one ragged, and a width that needs padding; with and without ids."""
    rows = max(rows, 197) + 3
    images, texts = (
        torch.nn.functional.normalize(torch.randn(rows, 70), dim=-1).to(device, dtype).requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(14.3, device=device, requires_grad=True)
    ids = torch.arange(rows, device=device) // 2

    def run(backend: str) -> Tensor:
        pairs = ops.contrastive_loss(images, texts, scale, backend=backend)
        return pairs + ops.contrastive_loss(images, texts, scale, image_ids=ids, text_ids=ids, backend=backend)

    return run, [images, texts, scale]


# The extension first: where time runs out under a slow tool, what is left is Triton's.
OPS = {"contrastive_loss": contrast, "mome_ffn": ffn, "packed_attention": attention}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", default=list(OPS), help=f"some of {', '.join(OPS)}")
    parser.add_argument("--small", action="store_true", help="the fewest rows, for slow tools")
    options = parser.parse_args(arguments)
    unknown = set(options.ops) - set(OPS)
    if unknown:
        parser.error(f"OP must be one of {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    rows = 70 if options.small else 1030
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    failed = 0
    for name in options.ops:
        for dtype in (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,):
            torch.manual_seed(0)
            run, leaves = OPS[name](device, dtype, rows)
            expected: list[Tensor] | None = None
            backends = ["eager", *(backend for backend in ops.implementations(name) if backend != "eager")]
            for backend in backends:
                try:
                    output = run(backend)
                    results = [output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)]
                    if on_gpu:
                        torch.cuda.synchronize()
                except (NotImplementedError, ImportError) as error:
                    print(f"{name:<18} {dtype!s:<15} {backend:<12} refuses: {str(error).splitlines()[0][:120]}")
                    continue
                expected = expected or results
                pairs = [(a.double(), b.double()) for a, b in zip(results, expected, strict=True)]
                errors = torch.stack([(a - b).norm() / b.norm().clamp(min=1e-12) for a, b in pairs])
                worst = errors.max().item()  # NaN, if any is
                state = "ok" if worst <= (1e-3 if dtype == torch.float32 else 5e-2) else "DIFFERS"
                failed += state != "ok"
                print(f"{name:<18} {dtype!s:<15} {backend:<12} {state}, {worst:.1e} from eager")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
