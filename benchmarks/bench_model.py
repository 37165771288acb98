"""Forward passes of the base model: an image, a text or a pair, whole or [CLS] alone in the last layer.

`make bench`, or `pytest benchmarks`. Two rounds of a group are comparable within one run, not between machines.
"""

from collections.abc import Callable

import pytest
import torch

from vlmo_fast import MoMEConfig, MoMETransformer

BATCH_SIZE = 4
TEXT_LENGTH = 12  # tokens of a typical caption


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def model(device: torch.device) -> MoMETransformer:
    return MoMETransformer(MoMEConfig.from_preset("base")).to(device).eval()


@pytest.mark.parametrize("cls_only", [False, True], ids=["all-tokens", "cls-only"])
@pytest.mark.parametrize("kind", ["image", "text", "pair"])
def bench_forward(
    benchmark: Callable[..., object], model: MoMETransformer, device: torch.device, kind: str, cls_only: bool
) -> None:
    inputs: dict[str, torch.Tensor] = {}
    if kind != "text":
        inputs["pixel_values"] = torch.randn(BATCH_SIZE, 3, 224, 224, device=device)
    if kind != "image":
        inputs["input_ids"] = torch.randint(1000, 30000, (BATCH_SIZE, TEXT_LENGTH), device=device)

    @torch.inference_mode()
    def forward() -> None:
        model(**inputs, cls_only=cls_only)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = kind
    benchmark.pedantic(forward, warmup_rounds=1, rounds=5)
