"""The one table of error bounds for fast paths, and the comparison that uses it.

The oracle is the eager reference in float64, on inputs drawn in the dtype under test and then promoted. Two bounds hold
at once: the cap of the dtype, and twice the error that the same eager reference makes in the dtype under test, plus the
band of one rounding (where eager happens to round nothing, the fast path may still round its result).

A fast path adds up in another order, so in one draw eager's error, of a gradient of 24 numbers say, may be small by
luck. Where a draw exceeds the second bound more are made, and the mean of all is held to it; a fault stays (`check`).

Two errors are bounded: relative Frobenius, and the worst row, in which one bad tile or token cannot hide behind the
rest. The norm of a row is floored at the root mean square of all rows, so that rows which nearly cancel do not decide.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

# In units of the dtype's eps. float32 sums a few thousand products; the others round once per intermediate tensor.
CAPS = {
    torch.float64: 256 * torch.finfo(torch.float64).eps,
    torch.float32: 16 * torch.finfo(torch.float32).eps,
    torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 2 * torch.finfo(torch.float16).eps,
}
WORST_ROW = 4  # the cap of the worst row, in caps
DRAWS = 24  # whose mean is held to eager's, where the first one exceeds it
BANDS = (0.25, 0.5)  # one rounding in units of eps: root mean square over many numbers (0.29 at most), worst number


class Errors(NamedTuple):
    """Of a tensor against the oracle."""

    frobenius: float
    worst_row: float


def errors(actual: Tensor, exact: Tensor) -> Errors:
    """Relative errors; rows lie along the last axis, and each element of a vector is a row."""
    assert actual.shape == exact.shape, f"{tuple(actual.shape)} instead of {tuple(exact.shape)}"
    exact = exact.detach().double()
    difference = actual.detach().double() - exact
    if exact.ndim < 2:
        exact, difference = exact.reshape(-1, 1), difference.reshape(-1, 1)
    sizes = exact.norm(dim=-1)
    if not sizes.count_nonzero():  # nothing to be relative to: anything but zeros is infinitely wrong
        error = float("inf") if not bool((difference == 0).all()) else 0.0
        return Errors(error, error)
    floor = sizes.square().mean().sqrt()
    rows = difference.norm(dim=-1) / sizes.clamp(min=floor)
    return Errors(float(difference.norm() / exact.norm()), float(rows.max()))


def check(
    draw: Callable[[], Mapping[str, Sequence[Tensor]]], dtype: torch.dtype | None = None, condition: float = 1.0
) -> None:
    """Hold all tensors of a problem to the bounds: of one draw, and where that exceeds eager's error, of more.

    Args:
        draw: draws the problem's inputs anew and gives its tensors by name, each as (actual, exact, eager): the fast
            path's, the oracle's in float64, and the eager reference's, computed in the dtype under test.
        dtype: whose bounds hold; None means that of the fast path's tensors.
        condition: by how much the operation itself multiplies a relative error of its first rounded intermediate: a
            logit of size s, once rounded, moves exp(s) by s roundings. It multiplies the cap, not eager's error.
    """
    draws = [draw()]
    try:
        for what, tensors in draws[0].items():
            check_draws(what, [tensors], dtype, condition)
    except AboveEager:
        draws += [draw() for _ in range(DRAWS - 1)]
        for what in draws[0]:
            check_draws(what, [tensors[what] for tensors in draws], dtype, condition)


class AboveEager(AssertionError):
    """An error is within the cap, and more than twice eager's."""


def check_draws(
    what: str,
    draws: Sequence[Sequence[Tensor]],
    dtype: torch.dtype | None = None,
    condition: float = 1.0,
) -> None:
    """Hold a tensor of several draws of one problem to the bounds: the cap in each, the other one in the mean.

    Args:
        what: named in the failure.
        draws: (actual, exact, eager) of each, as for `check`.
        dtype: as there.
        condition: as there.

    Raises:
        AssertionError: the cap is exceeded; `AboveEager` where it is the other bound alone.
    """
    dtype = draws[0][0].dtype if dtype is None else dtype
    ours, theirs = (
        [errors(results[place], results[1]) for results in draws] for place in (0, 2)
    )  # of each draw (frobenius, worst row)
    caps = tuple(max(1.0, condition) * factor * CAPS[dtype] for factor in (1, WORST_ROW))
    for name, found, others, cap, band in zip(
        Errors._fields, zip(*ours, strict=True), zip(*theirs, strict=True), caps, BANDS, strict=True
    ):
        error, other, worst = fmean(found), fmean(others), max(found)
        bound = 2 * other + band * torch.finfo(dtype).eps
        if dtype == torch.float64:  # the oracle's own dtype
            bound = cap
        assert worst <= cap, f"{what}: {name} error {worst:.2e} > cap {cap:.2e} (eager {other:.2e})"
        if error > bound:
            raise AboveEager(f"{what}: {name} error {error:.2e} > {bound:.2e} (eager {other:.2e}, cap {cap:.2e})")
