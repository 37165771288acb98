"""FSDP2: which parts of a model are sharded together."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from vlmo_fast.block import MoMEBlock
from vlmo_fast.model import MoMETransformer

__all__ = ["shard"]

Model = TypeVar("Model", bound=nn.Module)


def shard(model: Model, mesh: DeviceMesh | None = None, **options: Any) -> Model:
    """Shard a model over the processes of a device mesh: each block by itself, then the backbone, then the heads.

    A block's parameters are gathered for its own forward and backward pass alone. The backbone is a part of its own, so
    that it may be called by itself; so may the methods that encode images or texts alone. The logit scales, which have
    no axis to shard, stay whole in each process; their gradients are averaged like all others.

    Args:
        model: a `VLMoFor...`, or a `MoMETransformer`; changed in place. Shard it before making its optimiser.
        mesh: the devices; None is a flat mesh of all processes.
        **options: passed on to `torch.distributed.fsdp.fully_shard`: reshard_after_forward, mp_policy, ...

    Returns:
        The model.
    """
    scalars = {parameter for parameter in model.parameters() if not parameter.ndim}
    for parameter in scalars:
        parameter.register_hook(lambda gradient: _mean(gradient, mesh))
    for module in model.modules():
        if isinstance(module, MoMEBlock):
            fully_shard(module, mesh=mesh, **options)
    for module in model.modules():
        if isinstance(module, MoMETransformer) and module is not model:
            fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, ignored_params=scalars, **options)
    for module in model.modules():
        for name in ("forward_packed", "get_image_features", "get_text_features"):
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)
    return model


def _mean(gradient: Tensor, mesh: DeviceMesh | None) -> Tensor:
    groups = [None] if mesh is None else mesh.get_all_groups()
    total = gradient.clone()
    for group in groups:
        distributed.all_reduce(total, group=group)
    return total / (distributed.get_world_size() if mesh is None else mesh.size())
