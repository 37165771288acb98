"""Whole models: base, inference and a pre-training step, against the release's passes and against other models.

The release (`peers/released.py`) pads every text to 40 tokens and computes every token of every layer, in a pass for
each kind of input. Captions have the lengths of real ones: about 12 tokens.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import Bench, Group, Work
from benchmarks.peers.released import Negatives, Released, pad_texts
from vlmo_fast import MoMEConfig, MoMETransformer
from vlmo_fast.serving import Captured


def caption_lengths(count: int, seed: int) -> Tensor:
    """Tokens of captions, (count,): a normal distribution of mean 13 and deviation 3, from 6 to 40."""
    drawn = 13 + 3 * torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return drawn.round().clamp(6, 40).long()


def captions(count: int, seed: int) -> list[Tensor]:
    """Random token ids between [CLS] and [SEP], of caption lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.cat(
            [torch.tensor([101]), torch.randint(1000, 30000, (length - 2,), generator=generator), torch.tensor([102])]
        )
        for length in caption_lengths(count, seed).tolist()
    ]


@cache
def networks(size: str, device: torch.device, dtype: torch.dtype) -> tuple[MoMETransformer, Released, Released]:
    """Our model, the release's passes on the same weights, and those in float64: the oracle."""
    torch.manual_seed(0)
    model = MoMETransformer(MoMEConfig.from_preset(size)).eval()
    with torch.no_grad():
        assert model.relative_position_bias is not None
        model.relative_position_bias.table.normal_(std=0.5)
    model = model.to(device, dtype)
    return model, Released(model), Released(copy.deepcopy(model).double())


def batch_inputs(bench: Bench, config: MoMEConfig, kind: str, batch: int) -> Callable[[int], dict[str, Any]]:
    def inputs(seed: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        if kind != "image":
            texts = captions(batch, seed)
            ids, mask = pad_texts(texts, config.max_text_length)
            made |= {"input_ids": ids.to(bench.device), "attention_mask": mask.to(bench.device)}
            made["longest"] = max(map(len, texts))  # known on the host, as it is to whoever made the batch
        if kind != "text":
            generator = torch.Generator().manual_seed(seed)
            pixels = torch.randn(batch, 3, config.image_size, config.image_size, generator=generator)
            made["pixel_values"] = pixels.to(bench.device, bench.dtype)
        return made

    return inputs


def trimmed(inputs: dict[str, Any]) -> dict[str, Any]:
    """Without the columns of padding that no text of the batch needs."""
    longest = inputs.get("longest")
    texts = ("input_ids", "attention_mask", "input_ids_masked", "mlm_labels")
    return {name: value[:, :longest] if name in texts else value for name, value in inputs.items() if name != "longest"}


def real_rows(hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Rows of the real tokens of (B, S, D); text first, images have no padding."""
    if attention_mask is None:
        return hidden.flatten(0, 1)
    length = attention_mask.shape[1]
    return torch.cat([hidden[:, :length][attention_mask.bool()], hidden[:, length:].flatten(0, 1)])


CASES = {  # kind, batch, how much faster than the release's pass the embedding is promised to be
    "captions": ("text", 64, 3.1),
    "pairs": ("pair", 8, 1.2),
    "images": ("image", 8, 1.1),
}


@pytest.mark.parametrize(
    ("case", "output", "parts"),
    [
        pytest.param("captions", "embedding", 1, marks=pytest.mark.profile("quick", "cpu", gpu=3)),
        pytest.param("pairs", "embedding", 1, marks=pytest.mark.profile("cpu", gpu=3)),
        pytest.param("images", "embedding", 1, marks=pytest.mark.profile("cpu", gpu=3)),
        pytest.param("captions", "all tokens", 1, marks=pytest.mark.profile(cpu=2, gpu=3)),
        pytest.param("pairs", "all tokens", 1, marks=pytest.mark.profile(cpu=2, gpu=3)),
        pytest.param("images", "all tokens", 1, marks=pytest.mark.profile(cpu=2, gpu=3)),
        pytest.param("pairs", "embedding", 2, marks=pytest.mark.profile(cpu=3, gpu=5)),
        pytest.param("pairs", "embedding", 4, marks=pytest.mark.profile(cpu=3, gpu=5)),
        pytest.param("captions", "embedding", 4, marks=pytest.mark.profile(cpu=3, gpu=5)),
        pytest.param("captions", "embedding", 16, marks=pytest.mark.profile(cpu=3, gpu=5)),
    ],
)
def bench_inference(bench: Bench, case: str, output: str, parts: int) -> None:
    """The release's passes of fine-tuning (12 block calls) against ours; and of such a part of the batch."""
    kind, batch, promised = CASES[case]
    batch = (batch if bench.device.type == "cpu" else 32 * batch) // parts
    model, released, exact = networks("base", bench.device, bench.dtype)
    config = model.config

    def ours(**inputs: Any) -> Tensor:
        inputs = trimmed(inputs)
        result = model(**inputs, cls_only=output == "embedding")
        if output == "all tokens":
            return real_rows(result.last_hidden_state, inputs.get("attention_mask"))
        embedding = {"image": result.image_embeds, "text": result.text_embeds, "pair": result.pooler_output}[kind]
        assert embedding is not None
        return embedding

    def theirs(passes: Released, longest: int = 0, **inputs: Any) -> Tensor:
        features = getattr(passes, kind)(**inputs)
        return features.embedding if output == "embedding" else real_rows(features.hidden, inputs.get("attention_mask"))

    lengths = caption_lengths(batch, 0) * (kind != "image") + 197 * (kind != "text")
    group = bench.group(
        "model",
        f"{case}, {output}",
        batch_inputs(bench, config, kind, batch),
        oracle=lambda **inputs: theirs(exact, **inputs),
        eager=lambda **inputs: theirs(released, **inputs),
        work=Work(batch, case, flop=forward_flop(config, lengths)),
        axes={"size": "base", "batch": batch},
        x="batch",
        num_buffers=1,  # the weights alone exceed the caches
        seconds=10 if parts == 1 else 3,
        min_rounds=5 if parts == 1 else 3,
    )
    group.ours("ours", ours)
    group.peer("released", lambda **inputs: theirs(released, **inputs))
    if bench.device.type == "cuda":  # on a CPU it compiles for minutes
        compiled = lambda: torch.compile(lambda **inputs: theirs(released, **inputs))
        group.peer("released, torch.compile", compiled, make=True, slow_start=True)
    if output == "all tokens":
        group.yardstick("bare matmuls", bare_matmuls(model, lengths, kind))
    elif parts == 1:
        other_models(group, kind, bench)
        group.promise("ours", "released", at_least=promised, key=case)
    group.run()


def bare_matmuls(model: MoMETransformer, lengths: Tensor, kind: str) -> Callable[..., Tensor]:
    """The products of all blocks' matrices with as many rows, each of them random."""
    config, parameters = model.config, dict(model.named_parameters())
    weight = next(model.parameters())
    images = 0 if kind == "text" else 197 * len(lengths)
    rows = {"language": int(lengths.sum()) - images, "vision": images, "vl": int(lengths.sum())}
    narrow, wide = (
        {name: torch.randn(count, width, device=weight.device, dtype=weight.dtype) for name, count in rows.items()}
        for width in (config.hidden_size, config.intermediate_size)
    )

    def run(**inputs: Any) -> Tensor:
        for layer in range(config.num_hidden_layers):
            block = f"blocks.{layer}"
            fused = kind == "pair" and layer >= config.first_vl_layer
            for name in ("qkv", "projection"):
                product = narrow["vl"] @ parameters[f"{block}.attention.{name}.weight"].t()
            for expert in ("vl",) if fused else ("language", "vision"):
                for name, x in (("fc1", narrow[expert]), ("fc2", wide[expert])):
                    product = x @ parameters[f"{block}.experts.{expert}.{name}.weight"].t()
        return product

    return run


def other_models(group: Group, kind: str, bench: Bench) -> None:
    """Models of the same size that answer the same need; random weights, not the same function: yardsticks."""

    def clip_image() -> Callable[..., Any]:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(patch_size=16)).to(bench.device, bench.dtype).eval()
        return lambda pixel_values: clip(pixel_values).image_embeds

    def beit() -> Callable[..., Any]:
        from transformers import BeitConfig, BeitModel

        model = BeitModel(BeitConfig(use_relative_position_bias=True)).to(bench.device, bench.dtype).eval()
        return lambda pixel_values: model(pixel_values).last_hidden_state

    def clip_text() -> Callable[..., Any]:
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        clip = CLIPTextModelWithProjection(CLIPTextConfig()).to(bench.device, bench.dtype).eval()

        return lambda **inputs: clip(**trimmed(inputs)).text_embeds

    def vilt() -> Callable[..., Any]:
        from transformers import ViltConfig, ViltModel

        config = ViltConfig(patch_size=16, image_size=224, max_image_length=196)
        model = ViltModel(config).to(bench.device, bench.dtype).eval()
        return lambda **inputs: model(**trimmed(inputs)).pooler_output

    models = {
        "image": (("CLIP ViT-B/16", clip_image), ("BEiT base", beit)),
        "text": (("CLIP's text encoder, width 512", clip_text),),
        "pair": (("ViLT, patch 16", vilt),),
    }
    for name, make in models[kind]:
        group.yardstick(f"transformers' {name}", make, make=True, requires=("transformers",), slow_start=True)


@pytest.mark.profile(cpu=1, gpu=4)
def bench_pretraining_step(bench: Bench) -> None:
    """Forward and backward of contrast, masked words and matching, each side with the same negatives."""
    pytest.importorskip("transformers")
    from vlmo_fast import VLMoConfig, VLMoForPreTraining

    on_cpu = bench.device.type == "cpu"
    batch = 3 if on_cpu else 16  # the fewest whose negatives are all different; what the float64 oracle can hold
    torch.manual_seed(0)
    config = VLMoConfig()
    model = VLMoForPreTraining(config).eval()  # dropout and drop path off: the same function on both sides
    with torch.no_grad():
        model.backbone.relative_position_bias.table.normal_(std=0.5)
    model = model.to(bench.device, bench.dtype)
    exact = copy.deepcopy(model).double()
    make_batch = batch_inputs(bench, config.mome, "pair", batch)

    def inputs(seed: int) -> dict[str, Any]:
        made = make_batch(seed)
        ids, mask = made["input_ids"], made["attention_mask"]
        places = torch.arange(ids.shape[1], device=ids.device)
        following = (torch.arange(batch, device=ids.device) + 1) % batch  # no pair twice among the negatives
        masked = (places % 6 == 2) & (places < mask.sum(dim=1, keepdim=True) - 1)  # about 15 % of the real tokens
        return made | {
            "input_ids_masked": ids.masked_fill(masked, 103),
            "mlm_labels": ids.masked_fill(~masked, -100),
            "negative_image_ids": following,
            "negative_text_ids": following,
        }

    def our_loss(**inputs: Any) -> Tensor:
        loss: Tensor = model(**trimmed(inputs)).loss
        return loss

    def their_loss(network: nn.Module, longest: int, **inputs: Any) -> Tensor:
        negatives = Negatives(inputs.pop("negative_image_ids"), inputs.pop("negative_text_ids"))
        return Released(network).losses(**inputs, negatives=negatives).total

    group = bench.group(
        "model",
        "pre-training step",
        inputs,
        oracle=lambda **inputs: step(exact, lambda: their_loss(exact, **inputs), all_gradients=False),
        eager=lambda **inputs: step(model, lambda: their_loss(model, **inputs), all_gradients=False),
        work=Work(batch, "pairs"),
        axes={"size": "base", "batch": batch},
        num_buffers=1,
        seconds=1,
        min_rounds=3 if on_cpu else 10,
        long=on_cpu,
    )
    group.ours("ours", lambda **inputs: step(model, lambda: our_loss(**inputs)))
    group.peer("released", lambda **inputs: step(model, lambda: their_loss(model, **inputs)))
    group.promise("ours", "released", at_least=1.5, key="step")
    group.run()


def step(model: nn.Module, loss_of: Callable[[], Tensor], all_gradients: bool = True) -> dict[str, Tensor]:
    """The loss, and of the gradients those of vectors and of the bias table, all layers' together.

    Args:
        model: whose parameters want gradients.
        loss_of: computes its loss.
        all_gradients: compute those of the matrices too, as training does; what only says what is right need not.
    """
    parameters = dict(model.named_parameters())
    compared = {name: p for name, p in parameters.items() if p.ndim == 1 or name.endswith("table")}
    with torch.enable_grad():
        loss = loss_of()
        wanted = parameters if all_gradients else compared
        gradients = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
    kept: dict[str, list[Tensor]] = {}
    for name in compared:
        kept.setdefault(re.sub(r"\.\d+\.", ".", name), []).append(gradients[name].flatten())
    return {"loss": loss.detach(), **{f"d {name}": torch.cat(parts) for name, parts in kept.items()}}


@pytest.mark.profile(gpu=5)
@pytest.mark.parametrize("kind", ["image", "text", "pair"])
def bench_one(bench: Bench, kind: str) -> None:
    """The latency of one image, one caption, one pair."""
    model, released, exact = networks("base", bench.device, bench.dtype)

    def embedding(network: Any, **inputs: Any) -> Tensor:
        result = network(**trimmed(inputs), cls_only=True)
        output = {"image": result.image_embeds, "text": result.text_embeds, "pair": result.pooler_output}[kind]
        assert output is not None
        return output

    def theirs(passes: Released, longest: int = 0, **inputs: Any) -> Tensor:
        features = getattr(passes, kind)(**inputs)
        return features.embedding

    lengths = caption_lengths(1, 0) * (kind != "image") + 197 * (kind != "text")
    group = bench.group(
        "model",
        f"one {kind}, embedding",
        batch_inputs(bench, model.config, kind, 1),
        oracle=lambda **inputs: theirs(exact, **inputs),
        eager=lambda **inputs: theirs(released, **inputs),
        work=Work(1, f"{kind}s", flop=forward_flop(model.config, lengths)),
        axes={"size": "base", "batch": 1},
    )
    group.ours("ours", lambda **inputs: embedding(model, **inputs))
    if bench.device.type == "cuda":
        captured = Captured(model)
        group.ours("ours, captured", lambda **inputs: embedding(captured, **inputs))
        compiled = lambda: torch.compile(lambda **inputs: theirs(released, **inputs), mode="reduce-overhead")
        group.peer("released, torch.compile, reduce-overhead", compiled, make=True, slow_start=True)
    group.peer("released", lambda **inputs: theirs(released, **inputs))
    group.run()


def forward_flop(config: MoMEConfig, lengths: Tensor) -> float:
    """FLOPs of the blocks' matmuls for sequences of these lengths, every token computed in every layer."""
    width, hidden = config.hidden_size, config.intermediate_size
    assert hidden is not None
    per_layer = 2 * lengths * (4 * width**2 + 2 * width * hidden) + 4 * lengths**2 * width
    return config.num_hidden_layers * float(per_layer.sum())
