"""Forward passes of the base model: an image, a text or a pair, whole or [CLS] alone in the last layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from benchmarks.harness import Bench, Work
from vlmo_fast import MoMEConfig, MoMETransformer

BATCH_SIZE = 4
TEXT_LENGTH = 12  # tokens of a typical caption


@pytest.mark.profile("cpu", gpu=3)
@pytest.mark.parametrize("kind", ["image", pytest.param("text", marks=pytest.mark.profile("quick")), "pair"])
def bench_cls_only(bench: Bench, kind: str) -> None:
    """What computing the last layer for [CLS] alone saves."""
    config = MoMEConfig.from_preset("base")
    torch.manual_seed(0)
    model = MoMETransformer(config).to(bench.device, bench.dtype).eval()
    exact = copy.deepcopy(model).double()

    def inputs(seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        made: dict[str, Any] = {}
        if kind != "text":
            pixels = torch.randn(BATCH_SIZE, 3, config.image_size, config.image_size, generator=generator)
            made["pixel_values"] = pixels.to(bench.device, bench.dtype)
        if kind != "image":
            ids = torch.randint(1000, 30000, (BATCH_SIZE, TEXT_LENGTH), generator=generator)
            made["input_ids"] = ids.to(bench.device)
        return made

    def embed(network: MoMETransformer, cls_only: bool, **inputs: Any) -> torch.Tensor:
        output = network(**inputs, cls_only=cls_only)
        embedding = {"image": output.image_embeds, "text": output.text_embeds, "pair": output.pooler_output}[kind]
        assert embedding is not None
        return embedding

    length = {"image": 197, "text": TEXT_LENGTH, "pair": 197 + TEXT_LENGTH}[kind]
    group = bench.group(
        "model",
        f"{kind}, embedding",
        inputs,
        oracle=lambda **inputs: embed(exact, True, **inputs),
        work=Work(BATCH_SIZE, f"{kind}s", flop=BATCH_SIZE * forward_flop(config, length)),
        axes={"size": "base", "batch": BATCH_SIZE},
        x="batch",
    )
    group.ours("last layer for [CLS] alone", lambda **inputs: embed(model, True, **inputs))
    group.peer("all tokens", lambda **inputs: embed(model, False, **inputs))
    group.run()


def forward_flop(config: MoMEConfig, length: int) -> float:
    """FLOPs of all matmuls of the blocks for one sequence with every token computed."""
    width, hidden = config.hidden_size, config.intermediate_size
    assert hidden is not None
    per_layer = 2 * length * (4 * width**2 + 2 * width * hidden) + 4 * length**2 * width
    return config.num_hidden_layers * per_layer
