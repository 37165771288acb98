"""The contrastive loss and what else asks questions of the N x N similarities: hard negatives and ranks.

Beyond 8,192 pairs the inputs repeat 4,096 pairs, so that the float64 oracle can answer from the small problem: a row's
softmax over r copies is the small one's divided by r, its log-sum-exp larger by log r, each copy's gradient 1/r of the
small row's. No contender knows, or is any faster by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Bench, Work
from vlmo_fast import ops
from vlmo_fast.ops import reference

WIDTH = 768
DISTINCT = 4096
EAGER_LIMIT = {"cpu": 8192, "cuda": 65536}  # pairs; beyond it eager's matrices do not fit


def eager_twice(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """As in CLIP's code on one device: the logits of each direction by a product of their own."""
    scale = logit_scale.to(image_embeds.dtype)
    target = torch.arange(len(image_embeds), device=image_embeds.device)
    per_image, per_text = scale * image_embeds @ text_embeds.t(), scale * text_embeds @ image_embeds.t()
    return (F.cross_entropy(per_image.float(), target) + F.cross_entropy(per_text.float(), target)) / 2


def linear_cross_entropy(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """The loss of a product that torch has since 2.13, once for each direction."""
    scale = logit_scale.to(image_embeds.dtype)
    target = torch.arange(len(image_embeds), device=image_embeds.device)
    per_image = F.linear_cross_entropy(scale * image_embeds, text_embeds, target)
    return (per_image + F.linear_cross_entropy(scale * text_embeds, image_embeds, target)) / 2


def open_clip() -> Callable[..., Tensor]:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda image_embeds, text_embeds, logit_scale: loss(
        image_embeds, text_embeds, logit_scale.to(image_embeds.dtype)
    )


def inf_cl() -> Callable[..., Tensor]:
    from inf_cl import cal_flash_loss

    def run(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
        per_image = cal_flash_loss(image_embeds, text_embeds, scale=logit_scale).mean()
        return (per_image + cal_flash_loss(text_embeds, image_embeds, scale=logit_scale).mean()) / 2

    return run


def cut_cross_entropy() -> Callable[..., Tensor]:
    """Without its filter of small gradients, which drops most of a contrastive one."""
    from cut_cross_entropy import linear_cross_entropy as cce

    def run(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
        scale = logit_scale.to(image_embeds.dtype)
        target = torch.arange(len(image_embeds), device=image_embeds.device)
        per_image = cce(scale * image_embeds, text_embeds, target, filter_eps=None)
        return (per_image + cce(scale * text_embeds, image_embeds, target, filter_eps=None)) / 2

    return run


def liger() -> Callable[..., Tensor]:
    """Its fused loss of a product, once for each direction."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()

    def run(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
        scale = logit_scale.to(image_embeds.dtype)
        target = torch.arange(len(image_embeds), device=image_embeds.device)
        per_image = loss(text_embeds, scale * image_embeds, target)
        return (per_image + loss(image_embeds, scale * text_embeds, target)) / 2

    return run


def named(backend: str) -> Callable[..., Tensor]:
    return lambda **inputs: ops.contrastive_loss(**inputs, backend=backend)


def exact(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """The oracle: eager, on the distinct pairs where pairs repeat."""
    copies = max(len(image_embeds) // DISTINCT, 1) if len(image_embeds) > 2 * DISTINCT else 1
    images, texts = (x.unflatten(0, (copies, -1)).mean(0) for x in (image_embeds, text_embeds))
    return reference.contrastive_loss(images, texts, logit_scale) + math.log(copies)


@pytest.mark.parametrize(
    ("pairs", "mode"),
    [
        pytest.param(1024, "forward+backward", marks=pytest.mark.profile("quick", cpu=2, gpu=5)),
        pytest.param(2048, "forward+backward", marks=pytest.mark.profile(cpu=2)),
        pytest.param(4096, "forward+backward", marks=pytest.mark.profile(cpu=2, gpu=5)),
        pytest.param(8192, "forward+backward", marks=pytest.mark.profile("cpu", gpu=5)),
        pytest.param(8192, "forward", marks=pytest.mark.profile(cpu=2, gpu=5)),
        *(
            pytest.param(pairs, mode, marks=pytest.mark.profile(gpu=2 if pairs == 32768 else 3))
            for pairs in (32768, 65536, 262144)
            for mode in ("forward", "forward+backward")
        ),
    ],
)
def bench_contrastive(bench: Bench, pairs: int, mode: str) -> None:
    """One process, D = 768."""
    on_gpu = bench.device.type == "cuda"
    if not on_gpu and pairs > 8192:
        pytest.skip("takes too long on a CPU")
    backward = mode == "forward+backward"
    group = bench.group(
        "contrastive",
        "loss",
        lambda seed: embeddings(bench, pairs, seed),
        oracle=exact,
        work=Work(
            pairs,
            "pairs",
            flop=(8 if backward else 2) * pairs**2 * WIDTH,
            bytes=(4 if backward else 2) * pairs * WIDTH * (2 if on_gpu else 4),
        ),
        axes={"N": pairs},
        x="N",
        gradients=("image_embeds", "text_embeds", "logit_scale") if backward else (),
        num_buffers=None if on_gpu or pairs < 8192 else 1,
        min_rounds=5,
    )
    everything = on_gpu or pairs < 8192  # else only what the promises need
    fits = pairs <= EAGER_LIMIT[bench.device.type]
    all_similarities = 4 * pairs**2 + 2**20
    group.ours("ours", ops.contrastive_loss)
    if backward and pairs <= 65536:
        group.ours(
            "ours, similarities kept", lambda **inputs: ops.contrastive_loss(**inputs, workspace_bytes=all_similarities)
        )
    if everything:
        group.ours("ours, chunked torch", lambda **inputs: ops.contrastive_loss(**inputs, backend="chunked"))
    if on_gpu:
        for backend in ("cuda-sm90a", "cuda", "cuda-blocks"):
            group.ours(f"ours, {backend}", named(backend), may_refuse=(NotImplementedError, ImportError))
    if fits:
        group.peer("eager", reference.contrastive_loss)
    if fits and everything:
        group.peer("eager, logits twice", eager_twice)
        refusals = (NotImplementedError, AttributeError)  # from torch 2.13 on
        group.peer("torch's linear_cross_entropy", linear_cross_entropy, may_refuse=refusals)
        if on_gpu or pairs <= 2048:
            compiled = lambda: torch.compile(reference.contrastive_loss)
            group.peer("torch.compile", compiled, make=True, slow_start=True)
        group.peer("open_clip's ClipLoss", open_clip, make=True, requires=("open_clip",))
    if on_gpu:
        group.peer("Inf-CL", inf_cl, make=True, requires=("inf_cl",))
        group.peer("cut-cross-entropy, exact", cut_cross_entropy, make=True, requires=("cut_cross_entropy",))
        group.peer("Liger", liger, make=True, requires=("liger_kernel",))
    if fits:
        group.yardstick("bare matmuls", lambda **inputs: bare_matmuls(backward, **inputs))
    if backward and not on_gpu and pairs == 8192:
        group.promise("ours", "eager", at_least=1.1, key="contrast")
        group.promise("ours", "eager", of="workspace", at_most=1 / 8, key="contrast-memory")
        group.promise("ours, similarities kept", "eager", at_least=1.35, key="contrast-workspace")
    if backward and on_gpu and pairs >= 32768:
        group.promise("ours", "ours, chunked torch", at_least=1.2, key="gpu-contrast-chunked")
        if fits:
            group.promise("ours", "eager", at_least=2.3, key="gpu-contrast-eager")
        group.promise("ours", of="matmul", at_least=0.75, key="gpu-contrast-rate")
        group.promise("ours", "Inf-CL", at_least=4.0, key="gpu-contrast-infcl")
        if pairs == 262144:
            group.promise("ours", of="workspace", at_most=4e9, key="gpu-contrast-262144")
    group.run()


@pytest.mark.profile(cpu=1)
def bench_contrastive_once(bench: Bench) -> None:
    """65,536 pairs on a CPU: minutes, but a gigabyte, where eager would want seventeen for each of its matrices."""
    pairs = 65536
    group = bench.group(
        "contrastive",
        "loss, one call",
        lambda seed: embeddings(bench, pairs, seed),
        oracle=exact,
        work=Work(pairs, "pairs", flop=8 * pairs**2 * WIDTH, bytes=16 * pairs * WIDTH),
        axes={"N": pairs},
        gradients=("image_embeds", "text_embeds", "logit_scale"),
        once=True,
    )
    group.ours("ours", ops.contrastive_loss)
    group.promise("ours", of="workspace", at_most=1e9, key="contrast-65536")
    group.run()


def embeddings(bench: Bench, pairs: int, seed: int) -> dict[str, Tensor]:
    """Unit-norm pairs, a little alike, and the released scale."""
    generator = torch.Generator().manual_seed(seed)
    distinct = DISTINCT if pairs > 2 * DISTINCT else pairs
    images = torch.randn(distinct, WIDTH, generator=generator)
    texts = images + 3 * torch.randn(distinct, WIDTH, generator=generator)
    images, texts = (
        F.normalize(x, dim=-1).to(bench.device, bench.dtype).repeat(pairs // distinct, 1) for x in (images, texts)
    )
    return {"image_embeds": images, "text_embeds": texts, "logit_scale": torch.tensor(14.3, device=bench.device)}


def bare_matmuls(backward: bool, image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> list[Tensor]:
    """The similarities; with a backward pass also the two products that make gradients of them."""
    similarities = image_embeds @ text_embeds.t()
    return [similarities, similarities @ text_embeds, similarities.t() @ image_embeds] if backward else [similarities]


@pytest.mark.profile(cpu=3, gpu=6)
@pytest.mark.parametrize("pairs", [1024, 4096])
def bench_sampling(bench: Bench, pairs: int) -> None:
    """Hard negatives. Each pair has a twin so near that nothing else is ever drawn: the draws are known."""
    pairs = pairs if bench.device.type == "cpu" else 8 * pairs

    def inputs(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        scenes = F.normalize(torch.randn(pairs // 2, WIDTH, generator=generator), dim=-1).repeat_interleave(2, 0)
        scenes = scenes.to(bench.device, bench.dtype)
        scale = torch.tensor(100.0, device=bench.device)
        return {"image_embeds": scenes, "text_embeds": scenes.clone(), "logit_scale": scale}

    def twins(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> dict[str, Tensor]:
        other = torch.arange(len(image_embeds), device=image_embeds.device) ^ 1
        return {"image_ids": other, "text_ids": other}

    def drawn(**inputs: Tensor) -> dict[str, Tensor]:
        return ops.sample_hard_negatives(**inputs)._asdict()

    def eager(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> dict[str, Tensor]:
        logits = logit_scale * (text_embeds.float() @ image_embeds.float().t())
        logits.fill_diagonal_(float("-inf"))
        of_texts, of_images = logits.softmax(dim=1), logits.t().softmax(dim=1)
        return {"image_ids": of_texts.multinomial(1)[:, 0], "text_ids": of_images.multinomial(1)[:, 0]}

    def sample_by_sample(**inputs: Tensor) -> dict[str, Tensor]:
        from benchmarks.peers.released import draw_negatives

        scale = inputs["logit_scale"].to(inputs["image_embeds"].dtype)
        images, texts = draw_negatives(inputs["image_embeds"], inputs["text_embeds"], scale)
        return {"image_ids": images, "text_ids": texts}

    group = bench.group(
        "sampling",
        "hard negatives",
        inputs,
        oracle=twins,
        work=Work(2 * pairs, "draws", flop=2 * pairs**2 * WIDTH),
        axes={"N": pairs},
        x="N",
    )
    group.ours("ours", drawn)
    group.peer("eager", eager)
    group.peer("released", sample_by_sample)
    group.run()


@pytest.mark.profile(cpu=3, gpu=6)
@pytest.mark.parametrize("images", [250, 500, 1000])
def bench_ranks(bench: Bench, images: int) -> None:
    """Ranks of N images among 5 N captions, and the other way; five times as many on a GPU, where 5,000 are COCO's.

    Embeddings of small integers: products are exact in any precision, so ranks are too, ties included.
    """
    images = images if bench.device.type == "cpu" else 5 * images

    def inputs(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(-2, 3, (images, WIDTH), generator=generator).float()
        captions = codes.repeat_interleave(5, 0)
        noise = torch.randint(-3, 4, captions.shape, generator=generator).float()
        captions = (captions + noise).clamp(-4, 4)
        ids = torch.arange(images, device=bench.device)
        return {
            "image_embeds": codes.to(bench.device, bench.dtype),
            "text_embeds": captions.to(bench.device, bench.dtype),
            "image_ids": ids,
            "text_ids": ids.repeat_interleave(5),
        }

    def eager(image_embeds: Tensor, text_embeds: Tensor, image_ids: Tensor, text_ids: Tensor) -> dict[str, Tensor]:
        """By sorting the whole matrix."""
        precise = torch.promote_types(image_embeds.dtype, torch.float32)
        scores = image_embeds.to(precise) @ text_embeds.to(precise).t()
        matches = image_ids[:, None] == text_ids

        def first(scores: Tensor, matches: Tensor) -> Tensor:
            order = scores.argsort(dim=1, descending=True, stable=True)
            return matches.gather(1, order).int().argmax(dim=1) + 1

        return {"image": first(scores, matches), "text": first(scores.t(), matches.t())}

    def ours(**inputs: Tensor) -> dict[str, Tensor]:
        return dict(zip(("image", "text"), ops.retrieval_ranks(**inputs), strict=True))

    group = bench.group(
        "retrieval",
        "ranks, five captions an image",
        inputs,
        oracle=eager,
        work=Work(6 * images, "queries", flop=2 * 5 * images**2 * WIDTH),
        axes={"N": images},
        x="N",
        num_buffers=2,
        min_rounds=3,
    )
    group.ours("ours", ours)
    group.peer("eager, sorting", eager)
    group.run()
