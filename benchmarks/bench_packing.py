"""Packing: what planning a batch costs, and a mixture of texts, images and pairs in one forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_model import batch_inputs, caption_lengths, forward_flop, networks, trimmed
from benchmarks.harness import Bench, Work
from benchmarks.peers.released import Released
from vlmo_fast import MoMETransformer, pack

IMAGE = 197  # tokens
WINDOW = 14  # patches along a side


def tokens_of(text: Tensor, position: Tensor) -> Tensor:
    """Each token's number, ascending: a plan may put the texts in any order, but must have every token once."""
    return (1000 * text + position).sort().values


@pytest.mark.profile(cpu=2)
@pytest.mark.parametrize("count", [64, 256, 1024])
def bench_plan(bench: Bench, count: int) -> None:
    """Half of the sequences captions, a quarter images, a quarter pairs; on the host, whatever computes the forward."""
    alone, joint = count // 2, count // 4

    def inputs(seed: int) -> dict[str, Any]:
        return {"lengths": caption_lengths(alone + joint, seed)}

    def ours(lengths: Tensor) -> Tensor:
        pairs = torch.arange(joint)[:, None] + torch.tensor([alone, joint])
        windows = [WINDOW] * (2 * joint)
        layout = pack(lengths, windows, texts=torch.arange(alone), images=torch.arange(joint), pairs=pairs)
        return tokens_of(layout.text_index, layout.text_position)

    def loop(lengths: Tensor) -> Tensor:
        """A third of the plan, text by text and token by token: which token each text row is."""
        rows = [(text, place) for text, length in enumerate(lengths.tolist()) for place in range(int(length))]
        return tokens_of(*torch.tensor(rows).unbind(1))

    tokens = float(caption_lengths(alone + joint, 0).sum()) + 2 * joint * IMAGE
    group = bench.group(
        "packing",
        "plan of a batch",
        inputs,
        oracle=loop,
        work=Work(tokens, "tokens"),
        axes={"sequences": count},
        x="sequences",
    )
    group.ours("ours", ours)
    group.peer("a loop in Python, of the texts alone", loop)
    group.run()


@pytest.mark.profile(cpu=2, gpu=6)
def bench_mixture(bench: Bench) -> None:
    """32 captions, 4 images and 4 pairs; on a GPU 16 times as many."""
    times = 1 if bench.device.type == "cpu" else 16
    texts, images, pairs = 32 * times, 4 * times, 4 * times
    model, released, exact = networks("base", bench.device, bench.dtype)
    make_texts = batch_inputs(bench, model.config, "text", texts + pairs)
    make_images = batch_inputs(bench, model.config, "image", images + pairs)

    def one_forward(input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, lengths: Tensor, **_: Any) -> Any:
        joint = torch.arange(pairs)[:, None] + torch.tensor([texts, images])
        windows = [WINDOW] * (images + pairs)
        layout = pack(lengths, windows, texts=range(texts), images=range(images), pairs=joint, device=bench.device)
        output = model.forward_packed(layout, input_ids, pixel_values)
        return {"text": output.text_embeds, "image": output.image_embeds, "pair": output.pooler_output}

    def separate(network: MoMETransformer, lengths: Tensor, **inputs: Any) -> dict[str, Any]:
        inputs = trimmed(inputs)
        ids, mask, pixels = inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"]
        return {
            "text": network(ids[:texts], mask[:texts], cls_only=True).text_embeds,
            "image": network(pixel_values=pixels[:images], cls_only=True).image_embeds,
            "pair": network(ids[texts:], mask[texts:], pixels[images:], cls_only=True).pooler_output,
        }

    def theirs(passes: Released, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, **_: Any) -> Any:
        return {
            "text": passes.text(input_ids[:texts], attention_mask[:texts]).embedding,
            "image": passes.image(pixel_values[:images]).embedding,
            "pair": passes.pair(input_ids[texts:], attention_mask[texts:], pixel_values[images:]).embedding,
        }

    def inputs(seed: int) -> dict[str, Any]:
        made = make_texts(seed) | make_images(seed)
        return made | {"lengths": made["attention_mask"].sum(dim=1).cpu()}

    lengths = caption_lengths(texts + pairs, 0)
    sequences = torch.cat([lengths[:texts], torch.full((images,), IMAGE), lengths[texts:] + IMAGE])
    group = bench.group(
        "packing",
        "a mixture, embeddings",
        inputs,
        oracle=lambda **inputs: theirs(exact, **inputs),
        work=Work(len(sequences), "sequences", flop=forward_flop(model.config, sequences)),
        axes={"size": "base", "sequences": len(sequences)},
        num_buffers=1,
        min_rounds=5,
    )
    group.ours("ours, one forward", one_forward)
    group.ours("ours, a pass for each kind", lambda **inputs: separate(model, **inputs))
    group.peer("released", lambda **inputs: theirs(released, **inputs))
    group.run()
