"""FSDP2 on two processes: the loss and the step of one process, and encoders called on their own."""

import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import vlmo_fast
from vlmo_fast.training.fsdp import shard

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_vl_layers": 1,
    "image_size": 16,
    "patch_size": 8,
    "vocab_size": 50,
    "max_text_length": 8,
    "text_relative_span": 8,
    "num_labels": 3,
}


def build(head: str):
    torch.manual_seed(0)
    return getattr(vlmo_fast, head)(vlmo_fast.VLMoConfig(**SIZES))


def batch(size: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(0, 50, (size, 5), generator=generator),
        "pixel_values": torch.randn(size, 3, 16, 16, generator=generator),
        "labels": torch.rand(size, 3, generator=generator),
    }


def step(model, inputs, optimizer) -> None:
    model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def check_rank(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    reference, model = build("VLMoForQuestionAnswering"), shard(build("VLMoForQuestionAnswering"), mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    blocks = model.backbone.blocks
    assert all(type(module).__name__.startswith("FSDP") for module in (model, model.backbone, *blocks))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (reference, model)]
    whole = batch()
    half = {name: x.chunk(world)[rank] for name, x in whole.items()}
    for _ in range(2):
        step(reference, whole, optimizers[0])
        step(model, half, optimizers[1])
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs, msg=lambda text, name=name: f"{name}: {text}")

    retrieval = build("VLMoForImageTextRetrieval").eval()
    wanted = retrieval.get_image_features(whole["pixel_values"]).pooler_output
    texts = retrieval.get_text_features(whole["input_ids"]).pooler_output
    pairs = retrieval.backbone(whole["input_ids"], pixel_values=whole["pixel_values"]).pooler_output
    sharded = shard(build("VLMoForImageTextRetrieval").eval(), mesh=mesh)
    with torch.no_grad():  # each before any forward of the whole: nothing else has gathered the parameters
        torch.testing.assert_close(sharded.get_text_features(whole["input_ids"]).pooler_output, texts)
        torch.testing.assert_close(sharded.get_image_features(whole["pixel_values"]).pooler_output, wanted)
        actual = sharded.backbone(whole["input_ids"], pixel_values=whole["pixel_values"]).pooler_output
        torch.testing.assert_close(actual, pairs)

    # The scale, which is not sharded: the mean of the processes' gradients, as DDP's.
    retrieval = retrieval.train()
    gradients = []
    for chunk in range(world):
        mine = {name: whole[name].chunk(world)[chunk] for name in ("input_ids", "pixel_values")}
        (gradient,) = torch.autograd.grad(retrieval(**mine, return_loss=True).loss, retrieval.logit_scale)
        gradients.append(gradient)
    mine = {name: whole[name].chunk(world)[rank] for name in ("input_ids", "pixel_values")}
    sharded.train()(**mine, return_loss=True).loss.backward()
    torch.testing.assert_close(sharded.logit_scale.grad, sum(gradients) / world)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes():
    run_ranks(check_rank, 2)


def test_meta_models_are_sharded_and_then_filled():
    """Construct without memory, shard, allocate the shards, initialise: what a model too large for one device needs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.device("meta"):
            model = vlmo_fast.MoMETransformer(vlmo_fast.VLMoConfig(**SIZES).mome)
        shard(model, mesh=init_device_mesh("cpu", (1,)))
        model.to_empty(device="cpu")
        model.apply(model.init_weights)
        assert model(pixel_values=batch()["pixel_values"]).image_embeds.isfinite().all()
    finally:
        dist.destroy_process_group()
