"""The contrastive loss of images and texts, exact and in linear memory.

The loss is made of the two log-sum-exps of `contrastive_lse`, which leave the positives out, and of the positives'
own logits: log(exp(lse) + exp(s)) - s = softplus(lse - s). So nothing cancels where a model is sure of its answer, and
the same log-sum-exps serve the hard negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from vlmo_fast.distributed import Ranks, gather, log_sum_exp, pass_on, scale_gradient
from vlmo_fast.ops import _similarity, _similarity_tiles, reference
from vlmo_fast.ops._similarity import Excluded
from vlmo_fast.ops.dispatch import Problem, capability_of, select

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ContrastiveLSE", "contrastive_loss", "contrastive_lse"]

GATHERED_BYTES = 2**30  # of the texts of all ranks; beyond it they pass from rank to rank. 700,000 of bfloat16, D = 768


class ContrastiveLSE(NamedTuple):
    """Log-sum-exps of the scaled similarities, in nats.

    Attributes:
        image_lse: (N,), over the texts of each image.
        text_lse: (M,), over the images of each text.
    """

    image_lse: Tensor
    text_lse: Tensor


def contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    positives: str = "exclude",
    process_group: ProcessGroup | None = None,
    gradient: str = "exact",
    workspace_bytes: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Symmetric image-text contrastive loss that never stores the N x N logits.

    Replaces, in memory linear in N (VLMo, arXiv:2111.02358, "Image-Text Contrast"):
        s = logit_scale * image_embeds @ text_embeds.T
        (cross_entropy(s, arange(N)) + cross_entropy(s.T, arange(N))) / 2

    With ids, equal ids are positives, and N and M may differ. Each row's loss is then a mean over its positives p:
        "exclude":  -log(exp(s_p) / (exp(s_p) + sum of exp(s) over the negatives)); other positives count nowhere
        "average":  -log(exp(s_p) / sum of exp(s) over all columns)
    and the loss the mean over rows plus the mean over columns, halved. A row without a positive is an error on a CPU
    and gives NaN elsewhere.

    With a process group the batch is that of all its ranks, n pairs each: a rank's images against all texts, gathered,
    and every rank returns the global loss. Backpropagated on each rank and *averaged* over them, as DDP does, the
    parameters' gradients are those of the global loss on one device (`gradient="exact"`: the embeddings' gradients are
    W times those of the loss). The released VLMo leaves the factor out, so that its encoders, though not its logit
    scale, learn from 1/W of the gradient: `gradient="release"`, also the one to take where gradients are summed.

    Halves are multiplied with float32 sums; float32 exactly, or on CUDA as TF32 where
    `torch.set_float32_matmul_precision("high")` allows it. On CUDA nothing waits for the device, so that a graph can
    record it, and two runs agree to the bit. Not so with ids: to "exclude" positives, their number is waited for, and
    their gradients are added in any order unless `torch.use_deterministic_algorithms` is on.

    Args:
        image_embeds: unit-norm embeddings, (N, P), any float dtype.
        text_embeds: unit-norm embeddings, (M, P); without ids, N = M and row i belongs to image i.
        logit_scale: 0-d multiplier of the similarities, already exponentiated.
        image_ids: (N,) int64, what each image shows, or None.
        text_ids: (M,) int64, what each text describes; with `image_ids` or not at all.
        positives: "exclude" or "average", for a row with several positives. Without ids they are the same.
        process_group: of `torch.distributed`, or None for this process's batch alone. The same N and M on every rank.
            Each gathers the texts of all. Without ids, where those take more than a gigabyte, they pass from rank to
            rank instead, and none holds more than two ranks' at a time.
        gradient: "exact" or "release", with a process group.
        workspace_bytes: memory that may hold similarities from the forward for the backward pass, which then need not
            be computed again: N M 4 bytes for all of them. Not used where texts pass from rank to rank.
        backend: "auto", or the name of an implementation.

    Returns:
        0-d loss in nats, float32, or float64 for float64 embeddings; NaN where embeddings are not finite.

    Raises:
        ValueError: shapes or devices disagree, a row has no positive, or the backend is unknown.
        TypeError: dtypes disagree.
        NotImplementedError: the backend cannot run here; names those that can.
    """
    op = "contrastive_loss"
    _check(op, image_embeds, text_embeds, logit_scale, image_ids, text_ids)
    if positives not in ("exclude", "average"):
        raise ValueError(f"{op}: positives must be 'exclude' or 'average', got {positives!r}")
    if gradient not in ("exact", "release"):
        raise ValueError(f"{op}: gradient must be 'exact' or 'release', got {gradient!r}")
    _check_workspace(op, workspace_bytes)
    ranks = Ranks.of(process_group)
    if ranks.size == 1 and image_ids is not None and text_ids is not None:
        _check_positives(op, image_ids, text_ids)
    implementation = select(op, _problem(image_embeds, text_embeds, ranks), backend)
    with torch.autocast(image_embeds.device.type, enabled=False):
        if implementation == "eager":
            return reference.contrastive_loss(image_embeds, text_embeds, logit_scale, image_ids, text_ids, positives)
        if ranks.size > 1:
            _check_sizes(op, image_embeds, text_embeds, ranks)
            factor = ranks.size if gradient == "exact" else 1
            image_embeds, text_embeds = (scale_gradient(embeds, factor) for embeds in (image_embeds, text_embeds))
            logit_scale = scale_gradient(logit_scale, ranks.size)  # the release, too, computes all of its gradient
        batch = _Batch(image_embeds, text_embeds, logit_scale, image_ids, text_ids, ranks)
        loss = batch.loss(positives, workspace_bytes, implementation)
        return loss if ranks.size == 1 else loss + (ranks.sum(loss) - loss).detach()


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
    _check(op, image_embeds, text_embeds, logit_scale, image_ids, text_ids, pairs=False)
    _check_workspace(op, workspace_bytes)
    if exclude_diagonal and image_ids is not None:
        raise ValueError(f"{op}: exclude_diagonal must be False together with ids, got True")
    implementation = select(op, _problem(image_embeds, text_embeds), backend)
    excluded = Excluded(image_ids, text_ids, 0 if exclude_diagonal else None)
    with torch.autocast(image_embeds.device.type, enabled=False):
        if implementation == "eager":
            return ContrastiveLSE(*reference.contrastive_lse(image_embeds, text_embeds, logit_scale, *excluded))
        lse = _lse(image_embeds, text_embeds, logit_scale, excluded, workspace_bytes, implementation)
        dtype = _similarity.wide(image_embeds.dtype)
        return ContrastiveLSE(lse.image_lse.to(dtype), lse.text_lse.to(dtype))


# Validation


def _check(
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


def _check_workspace(op: str, workspace_bytes: int) -> None:
    if workspace_bytes < 0:
        raise ValueError(f"{op}: workspace_bytes must be at least 0, got {workspace_bytes}")


def _check_positives(op: str, image_ids: Tensor, text_ids: Tensor) -> None:
    if image_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return  # a look would wait for the device or break the graph; the loss is NaN instead
    for name, ids, other, what in (
        ("image_ids", image_ids, text_ids, "text"),
        ("text_ids", text_ids, image_ids, "image"),
    ):
        alone = ~torch.isin(ids, other)
        if alone.any():
            raise ValueError(f"{op}: {name} must each have a {what} of the same id, got {ids[alone][0].item()} without")


def _check_sizes(op: str, image_embeds: Tensor, text_embeds: Tensor, ranks: Ranks) -> None:
    """Another N on another rank would hang or be read as something else; looked at where a look costs little."""
    if image_embeds.device.type == "cpu":
        sizes = gather(torch.tensor([[*image_embeds.shape, len(text_embeds)]]), ranks)
        if not (sizes == sizes[0]).all():
            raise ValueError(
                f"{op}: image_embeds and text_embeds must have one size on all ranks, got {sizes.tolist()}"
            )


def _problem(image_embeds: Tensor, text_embeds: Tensor, ranks: Ranks = Ranks()) -> Problem:  # noqa: B008
    needs_grad = torch.is_grad_enabled() and (image_embeds.requires_grad or text_embeds.requires_grad)
    device = image_embeds.device
    capability = capability_of(device)
    return Problem(device.type, image_embeds.dtype, needs_grad, num_ranks=ranks.size, capability=capability)


# The loss from log-sum-exps


def _lse(
    rows: Tensor, columns: Tensor, logit_scale: Tensor, excluded: Excluded, workspace_bytes: int, implementation: str
) -> ContrastiveLSE:
    """As `contrastive_lse`, but `precise`."""
    dtype = _similarity.wide(rows.dtype)
    kept_rows = _similarity.kept_rows(len(rows), len(columns), dtype.itemsize, workspace_bytes)
    if not (torch.is_grad_enabled() and (rows.requires_grad or columns.requires_grad or logit_scale.requires_grad)):
        kept_rows = 0  # no backward pass will come
    if implementation in _similarity_tiles.ARCHITECTURES:
        kept_rows = 0  # S is never written
    scale = logit_scale.to(rows.device, dtype)
    row_lse, column_lse, _ = _contrastive_lse(rows, columns, scale, *excluded, kept_rows, implementation)
    return ContrastiveLSE(row_lse, column_lse)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); torch's own threshold of 20 would cost float64 half of its digits."""
    return F.softplus(x, threshold=40)


class _Matches(NamedTuple):
    """The positives of each row as ranges of the columns sorted by id: no shape depends on the ids' values."""

    order: Tensor  # (M,) columns by id
    start: Tensor  # (N,) of each row's range
    length: Tensor  # (N,)


def _matches(row_ids: Tensor, column_ids: Tensor) -> _Matches:
    ids, order = column_ids.sort(stable=True)
    start, end = torch.searchsorted(ids, row_ids), torch.searchsorted(ids, row_ids, right=True)
    return _Matches(order, start, end - start)


class _Batch:
    """A batch, or with several ranks this rank's images and all texts: its part of the loss, summed over pairs.

    Each rank owns the pairs of its own images, and the log-sum-exps of its own images and texts.
    """

    def __init__(
        self,
        images: Tensor,
        texts: Tensor,
        logit_scale: Tensor,
        image_ids: Tensor | None,
        text_ids: Tensor | None,
        ranks: Ranks,
    ) -> None:
        self.ranks, self.images, self.own_texts = ranks, images, texts
        self.dtype = _similarity.wide(images.dtype)
        self.logit_scale = logit_scale.to(images.device, self.dtype)
        # With ids a positive may be any rank's, and its embedding is needed once more after the log-sum-exps.
        self.in_ring = image_ids is None and ranks.size > 1 and ranks.size * texts.nbytes > GATHERED_BYTES
        self.texts = texts if self.in_ring else gather(texts, ranks)  # (M, P) of all ranks, in a ring this rank's own
        self.image_ids = image_ids
        self.text_ids = None if text_ids is None else gather(text_ids, ranks)
        self.num_images = ranks.size * len(images)

    def loss(self, positives: str, workspace_bytes: int, implementation: str) -> Tensor:
        """0-d; the sum over ranks is the loss."""
        average = positives == "average"
        if self.image_ids is None:
            excluded = Excluded(diagonal=self.ranks.own(len(self.own_texts)).start)
        else:
            excluded = Excluded() if average else Excluded(self.image_ids, self.text_ids)
        if self.in_ring:
            lse = ContrastiveLSE(*_RingLSE.apply(self.images, self.texts, self.logit_scale, self.ranks, implementation))
        else:
            lse = _lse(self.images, self.texts, self.logit_scale, excluded, workspace_bytes, implementation)
        lse = ContrastiveLSE(lse.image_lse, log_sum_exp(lse.text_lse, self.ranks))
        if self.image_ids is None or self.text_ids is None:
            loss = self._of_diagonal(lse)
        else:
            loss = (self._average if average else self._exclude)(lse, self.image_ids, self.text_ids)
        return torch.where(loss.isfinite(), loss, torch.nan).to(self.dtype)

    def _of_diagonal(self, lse: ContrastiveLSE) -> Tensor:
        """Each image has its text and nothing else."""
        products = self.images.to(self.dtype) * self.own_texts.to(self.dtype)
        logits = self.logit_scale * products.sum(1)  # (N,) of the positives
        text_lse = lse.text_lse[self.ranks.own(len(logits))]
        # An infinite logit would give a loss of 0 or infinity; 0 * infinity is NaN.
        terms = _softplus(lse.image_lse - logits) + _softplus(text_lse - logits) + 0 * logits
        return terms.sum() / (2 * self.num_images)

    def _matches(self, image_ids: Tensor, text_ids: Tensor) -> tuple[_Matches, Tensor, Tensor]:
        """The texts of each image, the number of images (of all ranks) of each text, and whether someone has none."""
        of_images = _matches(image_ids, text_ids)
        num_images = self.ranks.sum(_matches(text_ids, image_ids).length)  # (M,)
        return of_images, num_images, (of_images.length == 0).any() | (num_images == 0).any()

    def _average(self, lse: ContrastiveLSE, image_ids: Tensor, text_ids: Tensor) -> Tensor:
        """Mean log-probability over the positives: their logits enter linearly, sums of embeddings by id are enough."""
        of_images, num_images, alone = self._matches(image_ids, text_ids)
        group = torch.searchsorted(text_ids[of_images.order], text_ids)  # (M,) where a text's id first stands in order
        texts = self.texts.to(self.dtype)
        sums = torch.zeros_like(texts).index_add(0, group, texts)  # (M, P), by group
        shares = torch.zeros_like(texts).index_add(0, group, texts / num_images.to(texts)[:, None])
        own = of_images.start.clamp(max=len(texts) - 1)
        num_texts = of_images.length.to(texts)[:, None]  # (N, 1)
        mean = sums[own] / (num_texts * self.num_images) + shares[own] / len(texts)  # (N, P)
        positives = self.logit_scale * (self.images.to(self.dtype) * mean).sum()
        text_lse = lse.text_lse[self.ranks.own(len(self.own_texts))]
        loss = (lse.image_lse.sum() / self.num_images + text_lse.sum() / len(texts) - positives) / 2
        return loss.masked_fill(alone, torch.nan)

    def _exclude(self, lse: ContrastiveLSE, image_ids: Tensor, text_ids: Tensor) -> Tensor:
        """Each positive against the negatives alone."""
        of_images, num_images, alone = self._matches(image_ids, text_ids)
        image_share = 0.5 / (of_images.length.to(lse.image_lse) * self.num_images)  # (N,)
        text_share = 0.5 / (num_images.to(lse.text_lse) * len(text_ids))  # (M,)
        loss = _positive_terms(self.images, self.texts, self.logit_scale, *lse, *of_images, image_share, text_share)
        return loss.masked_fill(alone, torch.nan)


# vlmo_fast::contrastive_lse: the op under the log-sum-exps


@torch.library.custom_op("vlmo_fast::contrastive_lse", mutates_args=())
def _contrastive_lse(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    diagonal: int | None,
    kept_rows: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    excluded = Excluded(row_ids, column_ids, diagonal)
    if implementation in _similarity_tiles.ARCHITECTURES:
        row_lse, column_lse = _similarity_tiles.forward(rows, columns, logit_scale, excluded, implementation)
        return row_lse, column_lse, rows.new_empty((0, len(columns)), dtype=_similarity.wide(rows.dtype))
    return _similarity.forward(rows, columns, logit_scale, excluded, kept_rows, _similarity.epilogue(implementation))


@_contrastive_lse.register_fake
def _(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    diagonal: int | None,
    kept_rows: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _similarity.wide(rows.dtype)
    num_rows, num_columns = rows.shape[0], columns.shape[0]
    return (
        rows.new_empty(num_rows, dtype=_similarity.precise(rows)),
        rows.new_empty(num_columns, dtype=_similarity.precise(rows)),
        rows.new_empty((kept_rows, num_columns), dtype=dtype),
    )


@torch.library.custom_op("vlmo_fast::contrastive_lse_backward", mutates_args=())
def _contrastive_lse_backward(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    diagonal: int | None,
    row_lse: Tensor,
    row_weight: Tensor,
    column_lse: Tensor,
    column_weight: Tensor,
    kept: Tensor,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    excluded, row, column = Excluded(row_ids, column_ids, diagonal), (row_lse, row_weight), (column_lse, column_weight)
    if implementation in _similarity_tiles.ARCHITECTURES:
        return _similarity_tiles.backward(rows, columns, logit_scale, excluded, row, column, implementation)
    return _similarity.backward(
        rows, columns, logit_scale, excluded, row, column, kept, _similarity.epilogue(implementation)
    )


@_contrastive_lse_backward.register_fake
def _(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    diagonal: int | None,
    row_lse: Tensor,
    row_weight: Tensor,
    column_lse: Tensor,
    column_weight: Tensor,
    kept: Tensor,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _similarity.wide(rows.dtype)
    d_rows, d_columns = (x.new_empty(x.shape, dtype=dtype) for x in (rows, columns))
    return d_rows, d_columns, torch.empty_like(logit_scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, columns, logit_scale, row_ids, column_ids, ctx.diagonal, _, ctx.implementation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(rows, columns, logit_scale, row_ids, column_ids, *output)


def _differentiate(
    ctx: Any, row_weight: Tensor | None, column_weight: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    rows, columns, logit_scale, row_ids, column_ids, row_lse, column_lse, kept = ctx.saved_tensors
    row_weight = torch.zeros_like(row_lse) if row_weight is None else row_weight.contiguous()
    column_weight = torch.zeros_like(column_lse) if column_weight is None else column_weight.contiguous()
    d_rows, d_columns, d_scale = _contrastive_lse_backward(
        rows,
        columns,
        logit_scale,
        row_ids,
        column_ids,
        ctx.diagonal,
        row_lse,
        row_weight,
        column_lse,
        column_weight,
        kept,
        ctx.implementation,
    )
    return d_rows.to(rows.dtype), d_columns.to(columns.dtype), d_scale, None, None, None, None, None


_contrastive_lse.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.vlmo_fast.contrastive_lse)
def _lse_flop(rows: list[int], columns: list[int], *_: object, out_shape: object = None, **__: object) -> int:
    return 2 * rows[0] * columns[0] * rows[1]


@register_flop_formula(torch.ops.vlmo_fast.contrastive_lse_backward)
def _lse_backward_flop(rows: list[int], columns: list[int], *rest: Any, out_shape: object = None, **_: object) -> int:
    """Two products, and S again where it was not kept."""
    (kept_rows, _columns), *_implementation = rest[8:]
    return 2 * (2 * rows[0] + rows[0] - kept_rows) * columns[0] * rows[1]


# The log-sum-exps of several ranks, their texts passing from one to the next


class _RingLSE(torch.autograd.Function):
    """As `_lse` of this rank's images and the texts of all ranks, each text's own image left out.

    A rank holds two ranks' texts at a time, and in the backward pass their gradients, which travel with them, instead
    of the texts of all: O(N / W) instead of O(N). Blocks are on their way while others are worked on.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, logit_scale: Tensor, ranks: Ranks, implementation: str
    ) -> tuple[Tensor, Tensor]:
        ctx.ranks, ctx.implementation = ranks, implementation
        row_lse: Tensor | None = None
        column_lse: dict[int, Tensor] = {}  # of each rank's texts, over this rank's images
        for owner, block in _visitors(texts, ranks):
            diagonal = (ranks.rank - owner) * len(texts)
            of_rows, column_lse[owner], _ = _contrastive_lse(
                images, block, logit_scale, None, None, diagonal, 0, implementation
            )
            row_lse = of_rows if row_lse is None else torch.logaddexp(row_lse, of_rows)
        assert row_lse is not None
        lse = row_lse, torch.cat([column_lse[owner] for owner in range(ranks.size)])
        ctx.save_for_backward(images, texts, logit_scale, *lse)
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_weight: Tensor, column_weight: Tensor) -> tuple[Tensor | None, ...]:
        images, texts, logit_scale, row_lse, column_lse = ctx.saved_tensors
        ranks: Ranks = ctx.ranks
        dtype = _similarity.wide(images.dtype)
        d_images, d_scale = torch.zeros_like(images, dtype=dtype), torch.zeros_like(logit_scale)
        nothing_kept = images.new_empty((0, len(texts)), dtype=dtype)
        travelling: Callable[[], Tensor] | None = None  # the gradient of the texts that were here before
        for owner, block in _visitors(texts, ranks):
            part = slice(owner * len(texts), (owner + 1) * len(texts))
            of_images, of_texts, of_scale = _contrastive_lse_backward(
                images,
                block,
                logit_scale,
                None,
                None,
                (ranks.rank - owner) * len(texts),
                row_lse,
                row_weight.contiguous(),
                column_lse[part],
                column_weight[part].contiguous(),
                nothing_kept,
                ctx.implementation,
            )
            d_images += of_images
            d_scale += of_scale
            travelling = pass_on(of_texts if travelling is None else travelling().add_(of_texts), ranks, tag=1)
        assert travelling is not None  # after as many steps as ranks a gradient is where its texts are
        return d_images.to(images.dtype), travelling().to(texts.dtype), d_scale, None, None


def _visitors(texts: Tensor, ranks: Ranks) -> Iterator[tuple[int, Tensor]]:
    """Each rank and its texts, this rank's first; the next are already on their way."""
    block = texts.contiguous()
    for step in range(ranks.size):
        arriving = pass_on(block, ranks) if step + 1 < ranks.size else None
        yield (ranks.rank + step) % ranks.size, block
        if arriving is not None:
            block = arriving()


# vlmo_fast::contrastive_positives: the terms of all pairs of equal ids, a block of pairs at a time


def _pairs(matches: _Matches, num_columns: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and columns of the positive pairs, as many at a time as there are rows and columns."""
    ends = matches.length.cumsum(0)  # (N,)
    total, size = int(ends[-1]), len(ends) + num_columns
    for first in range(0, total, size):
        pair = torch.arange(first, min(first + size, total), device=ends.device)
        row = torch.searchsorted(ends, pair, right=True)
        yield row, matches.order[matches.start[row] + pair - (ends - matches.length)[row]]


@torch.library.custom_op("vlmo_fast::contrastive_positives", mutates_args=())
def _positive_terms(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    order: Tensor,
    start: Tensor,
    length: Tensor,
    row_share: Tensor,
    column_share: Tensor,
) -> Tensor:
    """Sum over positive pairs of row_share softplus(row_lse - s) + column_share softplus(column_lse - s), 0-d."""
    total = torch.zeros_like(row_lse[0])
    for row, column in _pairs(_Matches(order, start, length), len(columns)):
        x, y = rows[row].to(logit_scale.dtype), columns[column].to(logit_scale.dtype)  # (pairs, D)
        logits = logit_scale * (x * y).sum(1)
        total += (
            row_share[row] * _softplus(row_lse[row] - logits)
            + column_share[column] * _softplus(column_lse[column] - logits)
            + 0 * logits
        ).sum()
    return total


@_positive_terms.register_fake
def _(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    order: Tensor,
    start: Tensor,
    length: Tensor,
    row_share: Tensor,
    column_share: Tensor,
) -> Tensor:
    return row_lse.new_empty(())


@torch.library.custom_op("vlmo_fast::contrastive_positives_backward", mutates_args=())
def _positive_terms_backward(
    grad: Tensor,
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    order: Tensor,
    start: Tensor,
    length: Tensor,
    row_share: Tensor,
    column_share: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = logit_scale.dtype
    d_rows = torch.zeros_like(rows, dtype=dtype)
    d_columns = torch.zeros_like(columns, dtype=dtype)
    d_scale = torch.zeros_like(logit_scale)
    d_row_lse, d_column_lse = torch.zeros_like(row_lse), torch.zeros_like(column_lse)
    for row, column in _pairs(_Matches(order, start, length), len(columns)):
        x, y = rows[row].to(dtype), columns[column].to(dtype)  # (pairs, D)
        similarity = (x * y).sum(1)
        of_row = grad * row_share[row] * torch.sigmoid(row_lse[row] - logit_scale * similarity)
        of_column = grad * column_share[column] * torch.sigmoid(column_lse[column] - logit_scale * similarity)
        d_row_lse.index_add_(0, row, of_row)
        d_column_lse.index_add_(0, column, of_column)
        d_logits = -(of_row + of_column).to(dtype)
        d_scale += (d_logits * similarity).sum()
        d_similarity = (logit_scale * d_logits)[:, None]
        d_rows.index_add_(0, row, d_similarity * y)
        d_columns.index_add_(0, column, d_similarity * x)
    return d_rows.to(rows.dtype), d_columns.to(columns.dtype), d_scale, d_row_lse, d_column_lse


@_positive_terms_backward.register_fake
def _(
    grad: Tensor,
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    order: Tensor,
    start: Tensor,
    length: Tensor,
    row_share: Tensor,
    column_share: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (rows, columns, logit_scale, row_lse, column_lse)
    return tuple(torch.empty_like(tensor) for tensor in inputs)  # type: ignore[return-value]


def _setup_positives(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_positives(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_positive_terms_backward(grad, *ctx.saved_tensors), None, None, None, None, None


_positive_terms.register_autograd(_differentiate_positives, setup_context=_setup_positives)
