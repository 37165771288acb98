"""The contrastive loss of images and texts, exact and in linear memory.

The loss is made of the two log-sum-exps of `contrastive_lse`, which leave the positives out, and of the positives'
own logits: log(exp(lse) + exp(s)) - s = softplus(lse - s). So nothing cancels where a model is sure of its answer, and
the same log-sum-exps serve the hard negatives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmo_fast.distributed import Ranks, gather, log_sum_exp, scale_gradient
from vlmo_fast.ops.dispatch import load, select
from vlmo_fast.ops.pairs.checks import check_embeddings, check_positives, check_sizes, check_workspace, problem_of
from vlmo_fast.ops.pairs.lse import ContrastiveLSE, LSEBackend, accumulation_dtype, log_sum_exps
from vlmo_fast.ops.pairs.positives import Matches, matches_of, positive_terms, softplus
from vlmo_fast.ops.pairs.ring import RingLSE
from vlmo_fast.ops.types import PairMask

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["contrastive_loss"]

GATHERED_BYTES = 2**30  # of the texts of all ranks; beyond it they pass from rank to rank. 700,000 of bfloat16, D = 768


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
    check_embeddings(op, image_embeds, text_embeds, logit_scale, image_ids, text_ids)
    if positives not in ("exclude", "average"):
        raise ValueError(f"{op}: positives must be 'exclude' or 'average', got {positives!r}")
    if gradient not in ("exact", "release"):
        raise ValueError(f"{op}: gradient must be 'exact' or 'release', got {gradient!r}")
    check_workspace(op, workspace_bytes)
    ranks = Ranks.of(process_group)
    if ranks.size == 1 and image_ids is not None and text_ids is not None:
        check_positives(op, image_ids, text_ids)
    name = select(op, problem_of(image_embeds, text_embeds, ranks), backend)
    implementation = load(op, name)
    with torch.autocast(image_embeds.device.type, enabled=False):
        if not isinstance(implementation, LSEBackend):
            eager: Tensor = implementation(image_embeds, text_embeds, logit_scale, image_ids, text_ids, positives)
            return eager
        if ranks.size > 1:
            check_sizes(op, image_embeds, text_embeds, ranks)
            factor = ranks.size if gradient == "exact" else 1
            image_embeds, text_embeds = (scale_gradient(embeds, factor) for embeds in (image_embeds, text_embeds))
            logit_scale = scale_gradient(logit_scale, ranks.size)  # the release, too, computes all of its gradient
        batch = _Batch(image_embeds, text_embeds, logit_scale, image_ids, text_ids, ranks)
        loss = batch.loss(positives, workspace_bytes, name)
        return loss if ranks.size == 1 else loss + (ranks.sum(loss) - loss).detach()


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
        self.ranks, self.images, self.local_texts = ranks, images, texts
        self.dtype = accumulation_dtype(images.dtype)
        self.logit_scale = logit_scale.to(images.device, self.dtype)
        # With ids a positive may be any rank's, and its embedding is needed once more after the log-sum-exps.
        self.in_ring = image_ids is None and ranks.size > 1 and ranks.size * texts.nbytes > GATHERED_BYTES
        self.texts = texts if self.in_ring else gather(texts, ranks)  # (M, P) of all ranks, in a ring this rank's own
        self.image_ids = image_ids
        self.text_ids = None if text_ids is None else gather(text_ids, ranks)
        self.num_images = ranks.size * len(images)

    def loss(self, positives: str, workspace_bytes: int, name: str) -> Tensor:
        """0-d; the sum over ranks is the loss."""
        average = positives == "average"
        if self.image_ids is None:
            mask = PairMask(diagonal=self.ranks.own(len(self.local_texts)).start)
        else:
            mask = PairMask() if average else PairMask(self.image_ids, self.text_ids)
        if self.in_ring:
            lse = ContrastiveLSE(*RingLSE.apply(self.images, self.texts, self.logit_scale, self.ranks, name))
        else:
            lse = log_sum_exps(self.images, self.texts, self.logit_scale, mask, workspace_bytes, name)
        lse = ContrastiveLSE(lse.image_lse, log_sum_exp(lse.text_lse, self.ranks))
        if self.image_ids is None or self.text_ids is None:
            loss = self._of_diagonal(lse)
        else:
            loss = (self._average if average else self._exclude)(lse, self.image_ids, self.text_ids)
        return torch.where(loss.isfinite(), loss, torch.nan).to(self.dtype)

    def _of_diagonal(self, lse: ContrastiveLSE) -> Tensor:
        """Each image has its text and nothing else."""
        products = self.images.to(self.dtype) * self.local_texts.to(self.dtype)
        logits = self.logit_scale * products.sum(1)  # (N,) of the positives
        text_lse = lse.text_lse[self.ranks.own(len(logits))]
        # An infinite logit would give a loss of 0 or infinity; 0 * infinity is NaN.
        terms = softplus(lse.image_lse - logits) + softplus(text_lse - logits) + 0 * logits
        return terms.sum() / (2 * self.num_images)

    def _matches(self, image_ids: Tensor, text_ids: Tensor) -> tuple[Matches, Tensor, Tensor]:
        """The texts of each image, the number of images (of all ranks) of each text, and whether someone has none."""
        of_images = matches_of(image_ids, text_ids)
        num_images = self.ranks.sum(matches_of(text_ids, image_ids).length)  # (M,)
        return of_images, num_images, (of_images.length == 0).any() | (num_images == 0).any()

    def _average(self, lse: ContrastiveLSE, image_ids: Tensor, text_ids: Tensor) -> Tensor:
        """Mean log-probability over the positives: their logits enter linearly, sums of embeddings by id are enough."""
        of_images, num_images, alone = self._matches(image_ids, text_ids)
        group = torch.searchsorted(text_ids[of_images.order], text_ids)  # (M,) where a text's id first stands in order
        texts = self.texts.to(self.dtype)
        sums = torch.zeros_like(texts).index_add(0, group, texts)  # (M, P), by group
        shares = torch.zeros_like(texts).index_add(0, group, texts / num_images.to(texts)[:, None])
        first = of_images.start.clamp(max=len(texts) - 1)  # (N,) where an image's id first stands in order
        num_texts = of_images.length.to(texts)[:, None]  # (N, 1)
        mean = sums[first] / (num_texts * self.num_images) + shares[first] / len(texts)  # (N, P)
        positives = self.logit_scale * (self.images.to(self.dtype) * mean).sum()
        text_lse = lse.text_lse[self.ranks.own(len(self.local_texts))]
        loss = (lse.image_lse.sum() / self.num_images + text_lse.sum() / len(texts) - positives) / 2
        return loss.masked_fill(alone, torch.nan)

    def _exclude(self, lse: ContrastiveLSE, image_ids: Tensor, text_ids: Tensor) -> Tensor:
        """Each positive against the negatives alone."""
        of_images, num_images, alone = self._matches(image_ids, text_ids)
        image_share = 0.5 / (of_images.length.to(lse.image_lse) * self.num_images)  # (N,)
        text_share = 0.5 / (num_images.to(lse.text_lse) * len(text_ids))  # (M,)
        loss = positive_terms(self.images, self.texts, self.logit_scale, *lse, of_images, image_share, text_share)
        return loss.masked_fill(alone, torch.nan)
