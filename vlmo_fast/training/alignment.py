"""Word-patch alignment: the cost of moving a text's words onto an image's patches by optimal transport.

    C_ij     = 1 - cos(word_i, patch_j)
    distance = min <T, C> over plans T >= 0 with row sums 1/n and column sums 1/m

The plan comes from IPOT, an inexact proximal point method (Xie et al., arXiv:1802.04307), as in UNITER
(arXiv:1909.11740) and ViLT (arXiv:2102.03334): by the envelope theorem the gradient of the distance is that of <T, C>
with T held fixed, so no gradient flows through the iterations.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["alignment_distance", "alignment_loss", "transport_plan"]


@torch.no_grad()
def transport_plan(
    cost: Tensor, row_mask: Tensor, column_mask: Tensor, *, beta: float = 0.5, num_iterations: int = 50
) -> Tensor:
    """Nearly optimal plans between uniform distributions, by IPOT with one inner step.

        T <- diag(d) (exp(-C / beta) * T) diag(e),   d, e such that rows sum to 1/n and then columns to 1/m

    Args:
        cost: (B, N, M), any float dtype; computed in float32 at least.
        row_mask: (B, N) bool, True for the n rows that take part.
        column_mask: (B, M) bool, True for the m columns that take part.
        beta: weight of the proximal term; less is nearer to the optimum for the same number of iterations.
        num_iterations: of the outer loop. After t of them the cost exceeds the optimum by about beta * log(n m) / t.

    Returns:
        (B, N, M), without gradient; 0 where a mask is False, and everywhere in a problem without rows or columns.
        Columns sum to 1/m up to rounding, rows to 1/n in the limit.
    """
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    both = row_mask[:, :, None] & column_mask[:, None, :]
    row_sums, column_sums = (_uniform(both.any(axis), cost.dtype) for axis in (2, 1))
    kernel = torch.exp(-cost / beta) * both
    plan = both.to(cost.dtype)
    column_scale = column_sums
    for _ in range(num_iterations):
        plan = plan * kernel
        row_scale = _quotient(row_sums, torch.einsum("bnm,bm->bn", plan, column_scale))
        column_scale = _quotient(column_sums, torch.einsum("bnm,bn->bm", plan, row_scale))
        plan = plan * row_scale[:, :, None] * column_scale[:, None, :]
    return plan


def _uniform(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return mask.to(dtype) / mask.sum(1, keepdim=True).clamp(min=1)


def _quotient(share: Tensor, total: Tensor) -> Tensor:
    """`share / total`, 0 where there is no share: nothing takes part there and the total is 0 too."""
    return share / total.masked_fill(share == 0, 1)


def alignment_distance(
    words: Tensor,
    patches: Tensor,
    word_mask: Tensor,
    patch_mask: Tensor,
    *,
    beta: float = 0.5,
    num_iterations: int = 50,
) -> Tensor:
    """<T, C> of each pair, with T of `transport_plan` held fixed: gradients reach both sides through the costs.

    Args:
        words: (B, N, D) last hidden states of the texts, any float dtype; computed in float32 at least.
        patches: (B, M, D) last hidden states of the images.
        word_mask: (B, N) bool, True for the tokens to align. UNITER and ViLT leave [CLS], [SEP] and padding out.
        patch_mask: (B, M) bool, True for the patches to align; they leave the image's [CLS] out.
        beta: as in `transport_plan`.
        num_iterations: as there.

    Returns:
        (B,), from 0 to 2 up to rounding; 0 for a pair without words or patches.

    Raises:
        ValueError: shapes disagree.
        TypeError: a mask is not bool.
    """
    for name, states, mask in (("word", words, word_mask), ("patch", patches, patch_mask)):
        if states.ndim != 3 or mask.shape != states.shape[:2]:
            got = f"{tuple(states.shape)} and {tuple(mask.shape)}"
            raise ValueError(f"alignment_distance: {name} states and mask must be (B, L, D) and (B, L), got {got}")
        if mask.dtype != torch.bool:
            raise TypeError(f"alignment_distance: {name}_mask must be bool, got {mask.dtype}")
    if len(words) != len(patches) or words.shape[2] != patches.shape[2]:
        got = f"{tuple(words.shape)} and {tuple(patches.shape)}"
        raise ValueError(f"alignment_distance: words and patches must agree in B and D, got {got}")
    with torch.autocast(words.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(words.dtype, patches.dtype), torch.float32)
        words, patches = (_directions(x.to(dtype), mask) for x, mask in ((words, word_mask), (patches, patch_mask)))
        cost = 1 - words @ patches.mT  # (B, N, M)
        plan = transport_plan(cost, word_mask, patch_mask, beta=beta, num_iterations=num_iterations)
        return (plan * cost).sum((1, 2))


def _directions(states: Tensor, mask: Tensor) -> Tensor:
    """Unit vectors, 0 where the mask is False, whatever was there: padding may hold NaN."""
    return F.normalize(states.masked_fill(~mask[:, :, None], 0), dim=-1)


def alignment_loss(
    words: Tensor,
    patches: Tensor,
    word_mask: Tensor,
    patch_mask: Tensor,
    matches: Tensor | None = None,
    *,
    beta: float = 0.5,
    num_iterations: int = 50,
) -> Tensor:
    """Mean alignment distance, of matching pairs; others are pushed apart (UNITER, ViLT; their weight in ViLT: 0.1).

        (sum of the distances of matching pairs - sum of the others') / B

    Args:
        words: as in `alignment_distance`.
        patches: as there.
        word_mask: as there.
        patch_mask: as there.
        matches: (B,) bool, or None where all pairs match.
        beta: as there.
        num_iterations: as there.

    Returns:
        0-d loss.

    Raises:
        ValueError: shapes disagree.
        TypeError: a mask is not bool.
    """
    distance = alignment_distance(words, patches, word_mask, patch_mask, beta=beta, num_iterations=num_iterations)
    if matches is None:
        return distance.mean()
    if matches.shape != distance.shape:
        raise ValueError(f"alignment_loss: matches must be ({len(distance)},), got {tuple(matches.shape)}")
    return torch.where(matches, distance, -distance).mean()
