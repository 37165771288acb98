"""Every one of N images against every one of M texts: two encoders and a product, or fusion of all N x M pairs.

The two answer in different ways (a similarity, a matching logit), so each has an oracle of its own; either answer is a
number near zero made of many, and in half precision held to what eager errs. What the paper promises is the growth:
N + M encodings against N x M.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_model import batch_inputs, forward_flop, networks, trimmed
from benchmarks.harness import Bench, Work
from benchmarks.peers.released import Released
from vlmo_fast import MoMETransformer

CHUNK = 64  # pairs that fusion encodes at a time


@pytest.mark.profile(cpu=2, gpu=6)
@pytest.mark.parametrize("count", [1, 2, 3])
def bench_search(bench: Bench, count: int) -> None:
    """N = M on a CPU; 16 times that on a GPU."""
    count = count if bench.device.type == "cpu" else 16 * count
    model, released, exact = networks("base", bench.device, bench.dtype)

    def dual(network: MoMETransformer, **inputs: Any) -> Tensor:
        inputs = trimmed(inputs)
        images = network(pixel_values=inputs.pop("pixel_values"), cls_only=True)
        texts = network(**inputs, cls_only=True)
        assert texts.text_embeds is not None and images.image_embeds is not None
        return images.image_embeds @ texts.text_embeds.t()  # (N, M)

    def dual_of(passes: Released, **inputs: Any) -> Tensor:
        texts = passes.text(inputs["input_ids"], inputs["attention_mask"])
        return passes.image(inputs["pixel_values"]).embedding @ texts.embedding.t()

    def fusion(network: Any, **inputs: Any) -> Tensor:
        """First component of each pair's pooled output, (N, M): a head would be one more row of it."""
        inputs = inputs if isinstance(network, Released) else trimmed(inputs)
        ids, mask, pixels = inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"]
        rows = torch.arange(count * count, device=pixels.device)
        scores = []
        for chunk in rows.split(CHUNK):
            image, text = chunk // count, chunk % count
            if isinstance(network, Released):
                pooled = network.pair(ids[text], mask[text], pixels[image]).embedding
            else:
                pooled = network(ids[text], mask[text], pixels[image], cls_only=True).pooler_output
            scores.append(pooled[:, 0])
        return torch.cat(scores).view(count, count)

    both = torch.tensor([197.0] * count + [13.0] * count)
    group = bench.group(
        "search",
        "N images by N texts",
        batch_inputs(bench, model.config, "pair", count),
        oracle=lambda **inputs: dual_of(exact, **inputs),
        eager=lambda **inputs: dual_of(released, **inputs),
        work=Work(count * count, "scores", flop=forward_flop(model.config, both)),
        axes={"size": "base", "N": count},
        x="N",
        num_buffers=1,
        min_rounds=3,
    )
    fused = {"oracle": lambda **inputs: fusion(exact, **inputs), "eager": lambda **inputs: fusion(released, **inputs)}
    group.ours("ours, two encoders", lambda **inputs: dual(model, **inputs))
    group.ours("ours, fusion", lambda **inputs: fusion(model, **inputs), **fused)
    group.peer("released, two encoders", lambda **inputs: dual_of(released, **inputs))
    group.peer("released, fusion", lambda **inputs: fusion(released, **inputs), **fused)
    group.run()
