"""Hard negatives of image-text matching: draws from the softmax of the similarities, positives left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vlmo_fast.distributed import Ranks, gather
from vlmo_fast.ops import reference
from vlmo_fast.ops.dispatch import load, select
from vlmo_fast.ops.pairs.blocks import blocks, matmul_operand, require, require_finite, similarities
from vlmo_fast.ops.pairs.checks import check_embeddings, check_sizes, problem_of
from vlmo_fast.ops.pairs.lse import accumulation_dtype
from vlmo_fast.ops.types import PairMask

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["HardNegatives", "draw", "draw_eagerly", "sample_hard_negatives"]

TILE = 256  # columns whose weights are summed before one of the sums is chosen


class HardNegatives(NamedTuple):
    """Negatives of image-text matching.

    Attributes:
        image_ids: (M,) int64, for each text the index of an image that is not its own.
        text_ids: (N,) int64, for each image the index of a text that is not its own.
    """

    image_ids: Tensor
    text_ids: Tensor


def sample_hard_negatives(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> HardNegatives:
    """Draw an image for each text, then a text for each image, the likelier the more similar (VLMo, section 3.2).

    Replaces, in linear memory and from the same distribution:
        s = (logit_scale * image_embeds @ text_embeds.T).masked_fill(positive, -inf)
        s.softmax(0).T.multinomial(1), s.softmax(1).multinomial(1)

    One uniform number of float64 a draw decides, first among sums over tiles, then within the tile. The same generator
    state gives the same draws.

    Args:
        image_embeds: unit-norm embeddings, (N, P), any float dtype.
        text_embeds: unit-norm embeddings, (M, P); without ids, N = M at least 2, and row i belongs to image i.
        logit_scale: 0-d multiplier of the similarities, already exponentiated.
        image_ids: (N,) int64, what each image shows, or None; pairs of equal ids are never drawn.
        text_ids: (M,) int64; with `image_ids` or not at all.
        process_group: of `torch.distributed`, or None. With one, negatives come from the batch of all ranks and the
            indices are those of the global batch, rank after rank; `distributed.fetch_samples` gets the samples drawn.
        generator: source of randomness, on the embeddings' device; None for torch's default.
        backend: "auto", or the name of an implementation.

    Returns:
        `HardNegatives`; never a sample's own match. No gradient flows, and the host never waits for an accelerator.

    Raises:
        ValueError: shapes or devices disagree, embeddings are not finite, or there is no negative to draw.
        TypeError: dtypes disagree.
    """
    op = "sample_hard_negatives"
    ranks = Ranks.of(process_group)
    pairs = ranks.size * len(image_embeds)
    if image_ids is None and text_ids is None and (pairs < 2 or len(image_embeds) != len(text_embeds)):
        raise ValueError(
            f"{op}: image_embeds and text_embeds must be at least 2 pairs, "
            f"got {len(image_embeds)} images and {len(text_embeds)} texts"
        )
    check_embeddings(op, image_embeds, text_embeds, logit_scale, image_ids, text_ids)
    draw = load(op, select(op, problem_of(image_embeds, text_embeds, ranks), backend))
    with torch.no_grad(), torch.autocast(image_embeds.device.type, enabled=False):
        require_finite(op, "image_embeds and text_embeds", image_embeds, text_embeds, logit_scale)
        of_texts, of_images = PairMask(diagonal=0), PairMask(diagonal=0)
        all_images, all_texts = image_embeds, text_embeds
        if ranks.size > 1:
            check_sizes(op, image_embeds, text_embeds, ranks)
            all_images, all_texts = gather(image_embeds, ranks), gather(text_embeds, ranks)
            of_texts = of_images = PairMask(diagonal=ranks.own(len(image_embeds)).start)
        if image_ids is not None and text_ids is not None:
            of_texts = PairMask(text_ids, gather(image_ids, ranks))
            of_images = PairMask(image_ids, gather(text_ids, ranks))
        images = draw(text_embeds, all_images, logit_scale, of_texts, generator)
        texts = draw(image_embeds, all_texts, logit_scale, of_images, generator)
    return HardNegatives(images, texts)


def draw_eagerly(
    rows: Tensor, columns: Tensor, logit_scale: Tensor, mask: PairMask, generator: torch.Generator | None
) -> Tensor:
    """As `draw`, from all similarities at once."""
    probabilities = reference.negative_probabilities(rows, columns, logit_scale, *mask)
    return probabilities.multinomial(1, generator=generator).squeeze(1)


def draw(
    rows: Tensor, columns: Tensor, logit_scale: Tensor, mask: PairMask, generator: torch.Generator | None
) -> Tensor:
    """A column for each row from the softmax of its similarities, (N,) int64.

    Args:
        rows: (N, D) float.
        columns: (M, D), dtype and device of the rows.
        logit_scale: 0-d.
        mask: pairs that are never drawn.
        generator: source of randomness, or None.
    """
    uniform = torch.rand(len(rows), dtype=torch.float64, device=rows.device, generator=generator)
    drawn = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    rows, columns = matmul_operand(rows), matmul_operand(columns)
    scale = logit_scale.to(rows.device, accumulation_dtype(rows.dtype))
    for part in blocks(len(rows), len(columns), rows):
        logits = mask.exclude(similarities(rows[part], columns, scale), part.start)  # (R, M)
        drawn[part] = _choose(logits, uniform[part])
    return drawn


def _choose(logits: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of each row's cumulative softmax at `uniform` in [0, 1); a weight of 0 is never chosen."""
    num_columns = logits.shape[1]
    top = logits.amax(1, keepdim=True)
    require(top.isfinite().all(), "sample_hard_negatives: each row must have a negative, got one with none")
    weights = logits.sub_(top).exp_()  # (R, M)
    whole = num_columns // TILE * TILE
    sums = weights[:, :whole].view(len(weights), -1, TILE).sum(2, dtype=torch.float64)  # (R, whole tiles)
    if whole < num_columns:
        rest = weights[:, whole:].sum(1, keepdim=True, dtype=torch.float64)
        sums = torch.cat([sums, rest], dim=1)
    target, tile = _locate(sums, uniform)
    columns = tile[:, None] * TILE + torch.arange(TILE, device=logits.device)  # (R, TILE)
    inside = columns < num_columns
    strip = weights.gather(1, columns.clamp(max=num_columns - 1)).double() * inside
    _, place = _locate(strip, target)
    return tile * TILE + place


def _locate(weights: Tensor, fraction: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative weights of each row pass `fraction` of their total.

    Returns:
        How far within the weight found, in [0, 1), float64; and its index, int64.
    """
    ends = _running_sums(weights)  # (R, K or a few more)
    target = (fraction * ends[:, -1])[:, None]
    index = torch.searchsorted(ends, target, right=True)  # the first that exceeds the target, so its weight is not 0
    weight = weights.gather(1, index)
    inside = (target - (ends.gather(1, index) - weight)) / weight
    return inside.squeeze(1).clamp(0, 1 - 2**-53), index.squeeze(1)


def _running_sums(weights: Tensor) -> Tensor:
    """Cumulative sums of each row, zeros appended up to a power of two: (R, 2^n).

    They never fall, and stay the same to the bit across a weight of 0. On CUDA torch's cumsum promises neither, nor the
    same sums in every run: `torch.use_deterministic_algorithms` refuses it.
    """
    num_rows, num_columns = weights.shape
    sums = weights.new_zeros(num_rows, 1 << (num_columns - 1).bit_length())
    sums[:, :num_columns] = weights
    half = 1
    while half < sums.shape[1]:
        first, second = sums.view(num_rows, -1, 2, half).unbind(2)
        second += first[:, :, -1:]  # what precedes the second half of each piece is the sum of its first half
        half *= 2
    return sums
