"""What the ops on a matrix of similarities ask of their arguments, and what they tell the door."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmo_fast.distributed import Ranks, gather
from vlmo_fast.ops.dispatch import capability_of
from vlmo_fast.ops.types import Problem

__all__ = ["check_embeddings", "check_positives", "check_sizes", "check_workspace", "problem_of"]


def check_embeddings(
    op: str,
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    pairs: bool = True,
) -> None:
    """What all ops on a matrix of similarities ask of their arguments; `pairs`: without ids, row i belongs to row i."""
    shapes = f"got {tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}"
    if (image_ids is None) != (text_ids is None):
        raise ValueError(f"{op}: image_ids and text_ids must come together, got one of them")
    if pairs and image_ids is None:
        if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape or not len(image_embeds):
            raise ValueError(f"{op}: image_embeds and text_embeds must be (N, P) alike with N >= 1, {shapes}")
    elif image_embeds.ndim != 2 or text_embeds.ndim != 2 or image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(f"{op}: image_embeds and text_embeds must be (N, P) and (M, P), {shapes}")
    if not image_embeds.numel() or not text_embeds.numel():
        raise ValueError(f"{op}: image_embeds and text_embeds must not be empty, {shapes}")
    if image_embeds.device != text_embeds.device:
        raise ValueError(
            f"{op}: image_embeds and text_embeds must be on one device, "
            f"got {image_embeds.device} and {text_embeds.device}"
        )
    if image_embeds.dtype != text_embeds.dtype or not image_embeds.is_floating_point():
        raise TypeError(
            f"{op}: image_embeds and text_embeds must share one float dtype, "
            f"got {image_embeds.dtype} and {text_embeds.dtype}"
        )
    if logit_scale.ndim:
        raise ValueError(f"{op}: logit_scale must be 0-d, got shape {tuple(logit_scale.shape)}")
    if logit_scale.device != image_embeds.device and logit_scale.device.type != "cpu":
        raise ValueError(f"{op}: logit_scale must be on {image_embeds.device}, got {logit_scale.device}")
    if not logit_scale.is_floating_point():
        raise TypeError(f"{op}: logit_scale must be a float tensor, got {logit_scale.dtype}")
    for name, ids, embeds in (("image_ids", image_ids, image_embeds), ("text_ids", text_ids, text_embeds)):
        if ids is None:
            continue
        if ids.dtype != torch.int64:
            raise TypeError(f"{op}: {name} must be int64, got {ids.dtype}")
        if ids.shape != (len(embeds),):
            raise ValueError(f"{op}: {name} must have shape {(len(embeds),)}, got {tuple(ids.shape)}")
        if ids.device != embeds.device:
            raise ValueError(f"{op}: {name} must be on {embeds.device}, got {ids.device}")


def check_workspace(op: str, workspace_bytes: int) -> None:
    """The memory that may hold similarities cannot be negative."""
    if workspace_bytes < 0:
        raise ValueError(f"{op}: workspace_bytes must be at least 0, got {workspace_bytes}")


def check_positives(op: str, image_ids: Tensor, text_ids: Tensor) -> None:
    """Each image needs a text of its id, and each text an image; looked at on a CPU alone."""
    if image_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return  # a look would wait for the device or break the graph; the loss is NaN instead
    for name, ids, others, other in (
        ("image_ids", image_ids, "text_ids", text_ids),
        ("text_ids", text_ids, "image_ids", image_ids),
    ):
        alone = ~torch.isin(ids, other)
        if alone.any():
            raise ValueError(f"{op}: every id in {name} must occur in {others}; id {ids[alone][0].item()} does not")


def check_sizes(op: str, image_embeds: Tensor, text_embeds: Tensor, ranks: Ranks) -> None:
    """Another N on another rank would hang or be read as something else; looked at where a look costs little."""
    if image_embeds.device.type == "cpu":
        sizes = gather(torch.tensor([[*image_embeds.shape, len(text_embeds)]]), ranks)
        if not (sizes == sizes[0]).all():
            raise ValueError(
                f"{op}: image_embeds and text_embeds must have one size on all ranks, got {sizes.tolist()}"
            )


def problem_of(image_embeds: Tensor, text_embeds: Tensor, ranks: Ranks = Ranks()) -> Problem:  # noqa: B008
    """What is known of the embeddings when an implementation is chosen."""
    needs_grad = torch.is_grad_enabled() and (image_embeds.requires_grad or text_embeds.requires_grad)
    device = image_embeds.device
    capability = capability_of(device)
    return Problem(device.type, image_embeds.dtype, needs_grad, num_ranks=ranks.size, capability=capability)
