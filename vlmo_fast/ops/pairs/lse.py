"""Log-sum-exps of the rows and columns of the similarities S = logit_scale * rows @ columns.T, in linear memory.

`vlmo_fast::contrastive_lse` is the op under the contrastive loss; `LSEBackend` is what computes it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmo_fast.ops.dispatch import load, select
from vlmo_fast.ops.pairs.checks import check_embeddings, check_workspace, problem_of
from vlmo_fast.ops.registration import register
from vlmo_fast.ops.types import PairMask

__all__ = [
    "ContrastiveLSE",
    "LSEBackend",
    "accumulation_dtype",
    "contrastive_lse",
    "log_sum_exps",
    "lse_backward",
    "lse_dtype",
    "lse_forward",
]


class ContrastiveLSE(NamedTuple):
    """Log-sum-exps of the scaled similarities, in nats.

    Attributes:
        image_lse: (N,), over the texts of each image.
        text_lse: (M,), over the images of each text.
    """

    image_lse: Tensor
    text_lse: Tensor


def contrastive_lse(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    exclude_diagonal: bool = False,
    workspace_bytes: int = 0,
    backend: str = "auto",
) -> ContrastiveLSE:
    """Log-sum-exps of the rows and columns of the scaled similarities, for those who build a loss of their own.

    Replaces, in memory linear in N + M and differentiable in all three tensors:
        s = logit_scale * image_embeds @ text_embeds.T
        s.logsumexp(1), s.logsumexp(0)

    Args:
        image_embeds: (N, P), any float dtype.
        text_embeds: (M, P).
        logit_scale: 0-d multiplier of the similarities, already exponentiated.
        image_ids: (N,) int64, or None. Pairs of equal ids are left out.
        text_ids: (M,) int64; with `image_ids` or not at all.
        exclude_diagonal: leave text i out for image i; not together with ids.
        workspace_bytes: as for `contrastive_loss`.
        backend: "auto", or the name of an implementation.

    Returns:
        `ContrastiveLSE`, in float32, or in float64 for float64 embeddings; -inf where everything is left out.

    Raises:
        ValueError: shapes or devices disagree, or the backend is unknown.
        TypeError: dtypes disagree.
        NotImplementedError: the backend cannot run here; names those that can.
    """
    op = "contrastive_lse"
    check_embeddings(op, image_embeds, text_embeds, logit_scale, image_ids, text_ids, pairs=False)
    check_workspace(op, workspace_bytes)
    if exclude_diagonal and image_ids is not None:
        raise ValueError(f"{op}: exclude_diagonal must be False together with ids, got True")
    name = select(op, problem_of(image_embeds, text_embeds), backend)
    implementation = load(op, name)
    mask = PairMask(image_ids, text_ids, 0 if exclude_diagonal else None)
    with torch.autocast(image_embeds.device.type, enabled=False):
        if not isinstance(implementation, LSEBackend):
            return ContrastiveLSE(*implementation(image_embeds, text_embeds, logit_scale, *mask))
        lse = log_sum_exps(image_embeds, text_embeds, logit_scale, mask, workspace_bytes, name)
        dtype = accumulation_dtype(image_embeds.dtype)
        return ContrastiveLSE(lse.image_lse.to(dtype), lse.text_lse.to(dtype))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of similarities, sums and losses: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def lse_dtype(like: Tensor) -> torch.dtype:
    """The dtype of log-sum-exps: float32 would perturb softmax weights by 4e-6 at an LSE of 100."""
    return torch.float32 if like.device.type == "mps" else torch.float64


class LSEBackend(ABC):
    """An implementation of the log-sum-exps inside their custom op."""

    @abstractmethod
    def forward(
        self, rows: Tensor, columns: Tensor, logit_scale: Tensor, mask: PairMask, kept_rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row and column log-sum-exp of S, and the first `kept_rows` of S itself for the backward pass.

        Args:
            rows: (N, D) float.
            columns: (M, D), dtype and device of the rows.
            logit_scale: 0-d, float32 at least.
            mask: elements that do not count.
            kept_rows: rows of S to keep.

        Returns:
            (N,) and (M,), of `lse_dtype`, -inf where all is left out; and what `saved` describes.
        """

    def kept_rows(self, num_rows: int, num_columns: int, itemsize: int, workspace_bytes: int) -> int:
        """How many rows of S fit into the workspace."""
        return min(num_rows, math.floor(workspace_bytes / (num_columns * itemsize)))

    def saved(self, rows: Tensor, columns: Tensor, kept_rows: int) -> Tensor:
        """An empty tensor for the rows of S that are kept, (kept_rows, M)."""
        return rows.new_empty((kept_rows, columns.shape[0]), dtype=accumulation_dtype(rows.dtype))

    @abstractmethod
    def backward(
        self,
        rows: Tensor,
        columns: Tensor,
        logit_scale: Tensor,
        mask: PairMask,
        row: tuple[Tensor, Tensor],
        column: tuple[Tensor, Tensor],
        kept: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of sum(row_weight * row_lse) + sum(column_weight * column_lse).

        Args:
            rows: as in `forward`.
            columns: as in `forward`.
            logit_scale: as in `forward`.
            mask: as in `forward`.
            row: log-sum-exp, of `lse_dtype`, and weight, (N,) each.
            column: log-sum-exp, of `lse_dtype`, and weight, (M,) each.
            kept: the first rows of S, (kept_rows, M).

        Returns:
            (N, D), (M, D) and 0-d, float32 at least: whoever adds up parts should round once.
        """


def log_sum_exps(
    rows: Tensor, columns: Tensor, logit_scale: Tensor, mask: PairMask, workspace_bytes: int, name: str
) -> ContrastiveLSE:
    """As `contrastive_lse` by the implementation of that name, but of `lse_dtype`."""
    dtype = accumulation_dtype(rows.dtype)
    kept_rows = 0
    if torch.is_grad_enabled() and (rows.requires_grad or columns.requires_grad or logit_scale.requires_grad):
        backend: LSEBackend = load("contrastive_lse", name)  # without a backward pass nothing is kept for it
        kept_rows = backend.kept_rows(len(rows), len(columns), dtype.itemsize, workspace_bytes)
    scale = logit_scale.to(rows.device, dtype)
    row_lse, column_lse, _ = lse_forward(rows, columns, scale, mask, kept_rows, name)
    return ContrastiveLSE(row_lse, column_lse)


def lse_forward(
    rows: Tensor, columns: Tensor, logit_scale: Tensor, mask: PairMask, kept_rows: int, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The op; arguments as `LSEBackend.forward`."""
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.vlmo_fast.contrastive_lse(
        rows, columns, logit_scale, *mask, kept_rows, name
    )
    return result


def lse_backward(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    mask: PairMask,
    row: tuple[Tensor, Tensor],
    column: tuple[Tensor, Tensor],
    kept: Tensor,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op of its gradients; arguments as `LSEBackend.backward`."""
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.vlmo_fast.contrastive_lse_backward(
        rows, columns, logit_scale, *mask, *row, *column, kept, name
    )
    return result


# `arguments` are those of the schemas below: a mask, and what each op has of its own.


def _forward(rows: Tensor, columns: Tensor, logit_scale: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *mask, kept_rows, name = arguments
    backend: LSEBackend = load("contrastive_lse", name)
    return backend.forward(rows, columns, logit_scale, PairMask(*mask), kept_rows)


def _fake(rows: Tensor, columns: Tensor, logit_scale: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, kept_rows, name = arguments
    backend: LSEBackend = load("contrastive_lse", name)
    row_lse, column_lse = (rows.new_empty(x.shape[0], dtype=lse_dtype(rows)) for x in (rows, columns))
    return row_lse, column_lse, backend.saved(rows, columns, kept_rows)


def _backward(rows: Tensor, columns: Tensor, logit_scale: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *mask, row_lse, row_weight, column_lse, column_weight, kept, name = arguments
    backend: LSEBackend = load("contrastive_lse", name)
    row, column = (row_lse, row_weight), (column_lse, column_weight)
    return backend.backward(rows, columns, logit_scale, PairMask(*mask), row, column, kept)


def _fake_backward(rows: Tensor, columns: Tensor, logit_scale: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(rows.dtype)
    d_rows, d_columns = (x.new_empty(x.shape, dtype=dtype) for x in (rows, columns))
    return d_rows, d_columns, torch.empty_like(logit_scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, columns, logit_scale, row_ids, column_ids, ctx.diagonal, _, ctx.implementation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(rows, columns, logit_scale, row_ids, column_ids, *output)


def _autograd(
    ctx: Any, row_weight: Tensor | None, column_weight: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    rows, columns, logit_scale, row_ids, column_ids, row_lse, column_lse, kept = ctx.saved_tensors
    row_weight = torch.zeros_like(row_lse) if row_weight is None else row_weight.contiguous()
    column_weight = torch.zeros_like(column_lse) if column_weight is None else column_weight.contiguous()
    d_rows, d_columns, d_scale = lse_backward(
        rows,
        columns,
        logit_scale,
        PairMask(row_ids, column_ids, ctx.diagonal),
        (row_lse, row_weight),
        (column_lse, column_weight),
        kept,
        ctx.implementation,
    )
    return d_rows.to(rows.dtype), d_columns.to(columns.dtype), d_scale, None, None, None, None, None


def _flops(rows: list[int], columns: list[int], *_: object, **__: object) -> int:
    return 2 * rows[0] * columns[0] * rows[1]


def _flops_backward(rows: list[int], columns: list[int], *rest: Any, **__: object) -> int:
    """Two products, and S again where it was not kept."""
    *_, (kept_rows, _columns), _name = rest
    return 2 * (2 * rows[0] + rows[0] - kept_rows) * columns[0] * rows[1]


_INPUTS = "Tensor rows, Tensor columns, Tensor logit_scale, Tensor? row_ids, Tensor? column_ids, SymInt? diagonal"
register(
    f"contrastive_lse({_INPUTS}, SymInt kept_rows, str implementation) -> (Tensor, Tensor, Tensor)",
    _forward,
    fake=_fake,
    flops=_flops,
    setup_context=_setup_context,
    autograd=_autograd,
)
register(
    f"contrastive_lse_backward({_INPUTS}, Tensor row_lse, Tensor row_weight, Tensor column_lse, Tensor column_weight, "
    "Tensor kept, str implementation) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_fake_backward,
    flops=_flops_backward,
    backward_of="contrastive_lse",
)
