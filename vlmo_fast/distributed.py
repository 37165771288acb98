"""The global batch: what the contrastive ops need of `torch.distributed`, with gradients.

Each rank holds n images and n texts (the same n on every rank); the global batch is theirs, in the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["Ranks", "average_gradients", "fetch_samples", "gather", "log_sum_exp", "pass_on", "scale_gradient"]


class Ranks(NamedTuple):
    """A process group as the ops see it; `Ranks()` is one process alone, for which everything below does nothing.

    Attributes:
        group: the process group, or None.
        rank: of this process in it.
        size: number of its processes.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks:
        """The ranks of a group, or one process alone for None."""
        return cls() if group is None else cls(group, dist.get_rank(group), dist.get_world_size(group))

    def own(self, count: int) -> slice:
        """This rank's part of what `gather` gives, `count` being what each rank holds."""
        return slice(self.rank * count, (self.rank + 1) * count)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, without gradient."""
        tensor = tensor.detach()
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=self.group)
        return tensor


def gather(tensor: Tensor, ranks: Ranks) -> Tensor:
    """All ranks' rows, (W n, ...); the gradient is summed over the ranks and each takes its own rows' (reduce-scatter).

    Args:
        tensor: (n, ...), the same shape on every rank.
        ranks: the group.
    """
    return tensor if ranks.size == 1 else _Gather.apply(tensor, ranks)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        gathered = tensor.new_empty((ranks.size * len(tensor), *tensor.shape[1:]))
        dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=ranks.group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        given = grad.dtype
        grad = grad.to(torch.promote_types(given, torch.float32))  # a sum over ranks in halves would round at each rank
        own = grad.new_empty((len(grad) // ctx.ranks.size, *grad.shape[1:]))
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.ranks.group)
        return own.to(given), None


def pass_on(tensor: Tensor, ranks: Ranks, tag: int = 0) -> Callable[[], Tensor]:
    """Send the tensor to the rank before and receive what the rank after sends: after s times it is that of rank + s.

    Args:
        tensor: contiguous, of one shape on every rank; must not change before the result was called.
        ranks: the group, of at least two.
        tag: of transfers that are under way at the same time.

    Returns:
        Waits for the tensor that arrives (on an accelerator its stream does, not the host) and gives it.
    """
    assert ranks.group is not None
    before, after = (dist.get_global_rank(ranks.group, (ranks.rank + step) % ranks.size) for step in (-1, 1))
    arriving = torch.empty_like(tensor)
    transfers = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, tensor, before, ranks.group, tag),
            dist.P2POp(dist.irecv, arriving, after, ranks.group, tag),
        ]
    )

    def wait() -> Tensor:
        for transfer in transfers:
            transfer.wait()
        return arriving

    return wait


def log_sum_exp(parts: Tensor, ranks: Ranks) -> Tensor:
    """log(sum over ranks of exp(parts)), (M,) on every rank; the gradients of all ranks' uses are summed.

    Args:
        parts: (M,), -inf where a rank adds nothing.
        ranks: the group.
    """
    return parts if ranks.size == 1 else _LogSumExp.apply(parts, ranks)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, ranks: Ranks) -> Tensor:
        top = parts.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=ranks.group)
        top.masked_fill_(top == float("-inf"), 0.0)
        total = (parts - top).exp_()
        dist.all_reduce(total, group=ranks.group)
        lse = total.log_().add_(top)
        ctx.ranks = ranks
        ctx.save_for_backward(parts, lse)
        return lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts, lse = ctx.saved_tensors
        share = (parts - lse.masked_fill(lse == float("-inf"), 0.0)).exp_()
        return ctx.ranks.sum(grad) * share, None


def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """The tensor itself, whose gradient is multiplied by `factor`."""
    return tensor if factor == 1 or not tensor.requires_grad else _ScaleGradient.apply(tensor, factor)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def fetch_samples(samples: Tensor, indices: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """Rows of the global batch by their global index; only these travel, not the batch.

    Args:
        samples: (n, ...), this rank's rows; the same shape on every rank.
        indices: (K,) int64 in [0, W n), which K may differ between ranks.
        process_group: the group, or None for one process alone.

    Returns:
        (K, ...). No gradient flows. The host waits once, for how many rows each rank wants of each other.

    Raises:
        ValueError: an index is out of range; on a GPU indices are not looked at.
    """
    ranks = Ranks.of(process_group)
    count = ranks.size * len(samples)
    if indices.device.type == "cpu" and ((indices < 0) | (indices >= count)).any():
        raise ValueError(f"fetch_samples: indices must be in [0, {count}), got {indices.tolist()}")
    samples = samples.detach()
    if ranks.size == 1:
        return samples[indices]
    owner = indices // len(samples)
    order = owner.argsort(stable=True)
    wanted = torch.bincount(owner, minlength=ranks.size)  # rows that this rank takes from each
    asked = torch.empty_like(wanted)  # rows that it gives to each
    dist.all_to_all_single(asked, wanted, group=ranks.group)
    takes, gives = wanted.tolist(), asked.tolist()
    places = indices.new_empty(sum(gives))
    dist.all_to_all_single(places, indices[order], gives, takes, group=ranks.group)
    fetched = samples.new_empty((len(indices), *samples.shape[1:]))
    given = samples[places - ranks.rank * len(samples)]
    dist.all_to_all_single(fetched, given.contiguous(), takes, gives, group=ranks.group)
    return torch.empty_like(fetched).index_copy_(0, order, fetched)


def average_gradients(parameters: Iterable[nn.Parameter], process_group: dist.ProcessGroup | None) -> None:
    """Replace each gradient by its mean over the ranks, as DDP would: for steps that backpropagate in several parts.

    Args:
        parameters: the same on every rank; one without a gradient counts as zero.
        process_group: the group, or None for one process alone.
    """
    ranks = Ranks.of(process_group)
    if ranks.size == 1:
        return
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, group=ranks.group)
        parameter.grad /= ranks.size
