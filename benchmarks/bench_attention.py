"""Attention within packed sequences, with the relative bias of VLMo: one layer of base.

Peers know no packed sequences with a bias: they get the same rows padded to the longest sequence, and a mask, laid out
before the clock runs, and return padded rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.bench_model import caption_lengths
from benchmarks.harness import Bench, Work
from vlmo_fast import ops
from vlmo_fast.ops import reference

HEADS, SIZE, IMAGE = 12, 64, 197
MODES = ("forward", "forward+backward")


class Batch:
    """Sequences of a kind, [text ; image], packed and padded.

    Attributes:
        segments: (B, 2, 3) int32.
        places: (B, S) int64, the packed row of each padded place; rows beyond the last where it is padding.
        real: (B, S) bool.
        lengths: (B,) int64.
        bias_rows: R.
        num_rows: N.
    """

    def __init__(self, kind: str, count: int, device: torch.device) -> None:
        texts = caption_lengths(count, 0) if kind != "images" else torch.zeros(count, dtype=torch.int64)
        images = torch.full_like(texts, IMAGE if kind != "captions" else 0)
        longest = int(texts.max())
        text_starts, image_starts = texts.cumsum(0) - texts, images.cumsum(0) - images + texts.sum()
        zero = torch.zeros_like(texts)
        of_texts = torch.stack([text_starts, texts, zero], dim=1)
        of_images = torch.stack([image_starts, images, zero + longest], dim=1)
        self.host_segments = torch.stack([of_texts, of_images], dim=1).int()
        self.segments = self.host_segments.to(device)
        self.lengths, self.num_rows = texts + images, int((texts + images).sum())
        self.bias_rows = longest + int(images.max())
        place = torch.arange(longest)
        text_real = place < texts[:, None]
        image_place = torch.arange(int(images.max()))
        rows = [
            torch.where(text_real, text_starts[:, None] + place, self.num_rows),
            image_starts[:, None] + image_place,
        ]
        self.real = torch.cat([text_real, torch.ones(count, len(image_place), dtype=torch.bool)], dim=1).to(device)
        self.places = torch.cat(rows, dim=1).to(device)

    def padded(self, x: Tensor) -> Tensor:
        """(N, 3, H, d) to (3, B, H, S, d), zeros at padding."""
        return F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1))[self.places].permute(2, 0, 3, 1, 4).contiguous()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "count"),
    [
        pytest.param("captions", 64, marks=pytest.mark.profile("quick", cpu=3, gpu=8)),
        pytest.param("images", 8, marks=pytest.mark.profile(cpu=3)),
        pytest.param("pairs", 8, marks=pytest.mark.profile(cpu=3)),
        pytest.param("pairs", 2, marks=pytest.mark.profile(cpu=3)),
        pytest.param("pairs", 4, marks=pytest.mark.profile(cpu=3)),
        pytest.param("pairs", 1, marks=pytest.mark.profile(gpu=8)),
        pytest.param("pairs", 256, marks=pytest.mark.profile(gpu=1)),
        pytest.param("images", 256, marks=pytest.mark.profile(gpu=4)),
        pytest.param("captions", 1024, marks=pytest.mark.profile(gpu=8)),
    ],
)
def bench_attention(bench: Bench, kind: str, count: int, mode: str) -> None:
    """With the gradient of the bias in the backward pass."""
    on_gpu, backward = bench.device.type == "cuda", mode == "forward+backward"
    if not on_gpu and count > 64:
        pytest.skip("takes too long on a CPU")
    torch.compiler.reset()  # in one process the compiled peers of the ninth group would else run uncompiled
    batch = Batch(kind, count, bench.device)

    def inputs(seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(bench.device, bench.dtype)

        return {"qkv": draw(batch.num_rows, 3, HEADS, SIZE), "bias": draw(HEADS, batch.bias_rows, batch.bias_rows)}

    def ours(qkv: Tensor, bias: Tensor, backend: str = "triton" if on_gpu else "auto") -> Tensor:
        longest, host = int(batch.lengths.max()), batch.host_segments
        return ops.packed_attention(
            *qkv.unbind(1), batch.segments, bias, host_segments=host, max_length=longest, backend=backend
        )

    def oracle(qkv: Tensor, bias: Tensor) -> Tensor:
        return reference.packed_attention(*qkv.unbind(1), batch.segments, bias, False, SIZE**-0.5)

    def layout(qkv: Tensor, bias: Tensor) -> dict[str, Tensor]:
        return {"qkv": batch.padded(qkv), "bias": bias}

    def on_padded(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda qkv, bias: attend(*qkv, bias)

    def eager(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return reference.attention(query, key, value, bias, None if kind == "images" else batch.real, SIZE**-0.5)

    def sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        mask = bias[None]
        if kind != "images":
            mask = mask.masked_fill(~batch.real[:, None, None, :], float("-inf"))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def sdpa_by(name: str) -> Callable[..., Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def attend(*arguments: Tensor) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, name)):
                return sdpa(*arguments)

        return on_padded(attend)

    pairs_of_tokens = float(batch.lengths.square().sum())
    number = 2 if on_gpu else 4
    traffic = number * (4 * batch.num_rows * HEADS * SIZE + HEADS * batch.bias_rows**2)
    group = bench.group(
        "attention",
        kind,
        inputs,
        oracle=oracle,
        work=Work(
            batch.num_rows,
            "tokens",
            flop=(14 if backward else 4) * pairs_of_tokens * HEADS * SIZE,
            bytes=(3 if backward else 1) * traffic,
        ),
        axes={"size": "base", "sequences": count},
        x="sequences",
        gradients=("qkv", "bias") if backward else (),
    )
    padded_eager = on_padded(eager)

    def peer(name: str, function: Callable[..., Any], **options: Any) -> None:
        group.peer(name, function, layout=layout, oracle=padded_eager, **options)

    group.ours("ours", ours)
    torchs = "bucketed" if backward else "sdpa"
    group.ours("ours, torch's operators", lambda qkv, bias: ours(qkv, bias, torchs))
    if on_gpu:
        on_xformers = lambda qkv, bias: ours(qkv, bias, "xformers")
        group.ours("ours, on xformers", on_xformers, requires=("xformers",), may_refuse=(NotImplementedError,))
    peer("eager", padded_eager)
    refusals = (RuntimeError, NotImplementedError)
    for name, label, on_cpu in (
        ("EFFICIENT_ATTENTION", "SDPA, memory-efficient", False),
        ("CUDNN_ATTENTION", "SDPA, cuDNN", False),
        ("FLASH_ATTENTION", "SDPA, flash", True),
        ("MATH", "SDPA, math", True),
    ):
        if on_gpu or on_cpu:
            peer(label, lambda name=name: sdpa_by(name), make=True, may_refuse=refusals)
    if on_gpu:
        peer("torch.compile of eager", lambda: torch.compile(padded_eager), make=True, slow_start=True)
    flex, xformers = (lambda: on_padded(_flex(kind, batch))), (lambda: on_padded(_xformers(batch)))
    if on_gpu or bench.settings.profile != "cpu" or (kind, count) == ("pairs", 8):  # compiling may take a minute
        peer("FlexAttention", flex, make=True, slow_start=True, may_refuse=refusals)
    peer("xformers", xformers, make=True, requires=("xformers",), may_refuse=refusals)
    if not on_gpu:
        group.promise("ours", "eager", at_least=1.2, key="attention")
    if on_gpu and backward and (kind, count) == ("pairs", 256):
        group.promise("ours", "eager", at_least=3.0, key="gpu-attention")
        for name in ("SDPA, memory-efficient", "SDPA, cuDNN", "SDPA, math", "FlexAttention", "xformers"):
            group.promise("ours", name, at_least=1.5, key="gpu-attention-best")
    group.run()


def _flex(kind: str, batch: Batch) -> Callable[..., Tensor]:
    """The bias read inside the kernel, padding masked by the score."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)
    real = batch.real

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            value = value + bias[h, i, j]
            return value if kind == "images" else torch.where(real[b, j], value, float("-inf"))

        result: Tensor = compiled(query, key, value, score_mod=score)
        return result

    return attend


def _xformers(batch: Batch) -> Callable[..., Tensor]:
    """Its kernels take the bias as one tensor of the batch, padded to a multiple of eight."""
    from xformers.ops import memory_efficient_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        length = query.shape[2]
        padded = -(-length // 8) * 8
        mask = bias[None].masked_fill(~batch.real[:, None, None, :], float("-inf"))
        mask = F.pad(mask, (0, padded - length))[..., :length].expand(len(query), -1, -1, -1)
        parts = (part.transpose(1, 2) for part in (query, key, value))
        result: Tensor = memory_efficient_attention(*parts, attn_bias=mask)
        return result.transpose(1, 2)

    return attend
