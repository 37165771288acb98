"""Word-patch alignment against exact solutions, and its laws; each test with the fault that it catches."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from tolerances import CAPS

from vlmo_fast.training.alignment import alignment_distance, alignment_loss, transport_plan

BETA, ITERATIONS = 0.5, 50
SHAPES = [(1, 1), (1, 5), (5, 1), (3, 3), (4, 9), (9, 4), (7, 16)]  # one side alone, square, both orders, like a text


def problem(num_words, num_patches, width=8, seed=0):
    """Words, patches and masks of one pair, float64."""
    generator = torch.Generator().manual_seed(seed)
    words, patches = (
        torch.randn(1, n, width, dtype=torch.float64, generator=generator) for n in (num_words, num_patches)
    )
    return words, patches, *(torch.ones(1, n, dtype=torch.bool) for n in (num_words, num_patches))


def cost_of(words, patches):
    """Cosine distances (N, M), spelled out."""
    return torch.stack([torch.stack([1 - (w @ p) / (w.norm() * p.norm()) for p in patches]) for w in words])


def exact(cost):
    """The least cost of a plan, by linear programming."""
    n, m = cost.shape
    sums = np.zeros((n + m, n * m))
    for i in range(n):
        sums[i, i * m : (i + 1) * m] = 1
    for j in range(m):
        sums[n + j, j::m] = 1
    solved = linprog(cost.numpy().ravel(), A_eq=sums, b_eq=[1 / n] * n + [1 / m] * m, method="highs")
    assert solved.success
    return solved.fun


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_distance_is_the_least_cost(shape, seed):
    """Within the bounds of the method: catches a plan of other marginals, a wrong kernel, too few steps.

    From above: a proximal point method is beta KL(optimum, first plan) / iterations from the optimum, and the
    divergence from the product of the marginals is at most the lesser log of n and m. From below: rows that miss their
    sums by v in all can be mended at a cost of at most 2 v, as no cost is over 2. The first bound is that of exact
    inner steps; with a single one the plan is one of other row sums, which differ by v.
    """
    words, patches, word_mask, patch_mask = problem(*shape, seed=seed)
    cost = cost_of(words[0], patches[0])
    plan = transport_plan(cost[None], word_mask, patch_mask)[0]
    violation = float((plan.sum(1) - 1 / shape[0]).abs().sum())
    assert float((plan.sum(0) - 1 / shape[1]).abs().sum()) < 1e-12
    assert violation < 0.02
    distance = alignment_distance(words, patches, word_mask, patch_mask)[0]
    torch.testing.assert_close(distance, (plan * cost).sum(), rtol=1e-12, atol=1e-12)
    least = exact(cost)
    slack = 2 * violation + 1e-9  # the solver's tolerance
    assert least - slack <= distance <= least + BETA * math.log(min(shape)) / ITERATIONS + slack


def test_more_iterations_come_closer():
    """Catches a plan that is not carried on (T <- A in place of A * T): it would stay at entropic transport's."""
    words, patches, *masks = problem(7, 16)
    least = exact(cost_of(words[0], patches[0]))
    gaps = [float(alignment_distance(words, patches, *masks, num_iterations=n)[0]) - least for n in (1, 10, 100, 1000)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.1
    assert abs(gaps[-1]) < BETA * math.log(7) / 1000 + 1e-6


def test_identical_sets_cost_nothing():
    """Each word finds its own patch, in any order."""
    words, _, mask, _ = problem(6, 6)
    distance = alignment_distance(words, words.flip(1) * 3, mask, mask, num_iterations=500)
    assert -1e-12 < distance < 1e-3


def test_padding_changes_nothing():
    """NaN in it, neither in the value nor in a gradient; nor do the other pairs of a batch."""
    pairs = [problem(n, m, seed=n) for n, m in ((3, 9), (5, 4), (1, 1))]
    words = torch.full((3, 6, 8), math.nan, dtype=torch.float64)
    patches = torch.full((3, 10, 8), math.nan, dtype=torch.float64)
    word_mask, patch_mask = (torch.zeros(x.shape[:2], dtype=torch.bool) for x in (words, patches))
    for n, (w, p, _, _) in enumerate(pairs):
        word_places = torch.arange(6).flip(0)[: w.shape[1]]  # anywhere, not only in front
        words[n, word_places], word_mask[n, word_places] = w[0], True
        patches[n, : p.shape[1]], patch_mask[n, : p.shape[1]] = p[0], True
    words.requires_grad_()
    patches.requires_grad_()
    distance = alignment_distance(words, patches, word_mask, patch_mask)
    single = torch.cat([alignment_distance(*pair) for pair in pairs])
    torch.testing.assert_close(distance, single, rtol=1e-12, atol=1e-12)
    distance.sum().backward()
    for x, mask in ((words, word_mask), (patches, patch_mask)):
        assert torch.equal(x.grad.abs().sum(-1) > 0, mask)


def test_a_pair_without_words_counts_nothing():
    """Zero with a zero gradient, where a mean over none would be NaN."""
    words, patches, word_mask, patch_mask = (x.expand(2, *x.shape[1:]).clone() for x in problem(3, 4))
    word_mask[0] = False
    patch_mask[1] = False
    words.requires_grad_()
    loss = alignment_loss(words, patches, word_mask, patch_mask)
    loss.backward()
    assert loss == 0 and torch.equal(words.grad, torch.zeros_like(words))


def test_gradient_holds_the_plan_fixed():
    """Central differences of <T, C> with the first plan: catches a gradient through the iterations, or none."""
    words, patches, *masks = problem(4, 6)
    words.requires_grad_()
    patches.requires_grad_()
    alignment_distance(words, patches, *masks).sum().backward()
    fixed = transport_plan(cost_of(words[0], patches[0])[None], *masks)[0]
    assert not fixed.requires_grad
    step = 1e-5
    for x in (words, patches):
        numeric = torch.zeros_like(x)
        for place in range(x.numel()):
            sides = []
            for sign in (1, -1):
                moved = {id(y): y.detach().clone() for y in (words, patches)}
                moved[id(x)].view(-1)[place] += sign * step
                sides.append((fixed * cost_of(moved[id(words)][0], moved[id(patches)][0])).sum())
            numeric.view(-1)[place] = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close(x.grad, numeric, rtol=0, atol=1e-9)  # step^2 and eps / step


def test_gradient_is_that_of_the_least_cost():
    """The envelope theorem, on a problem with a plan of its own: the exact solver's differences."""
    words, patches, *masks = problem(4, 4)
    words.requires_grad_()
    alignment_distance(words, patches, *masks, num_iterations=3000).sum().backward()
    moved = words.detach().clone()
    direction = torch.randn(moved.shape, dtype=torch.float64)
    sides = [exact(cost_of((moved + sign * 1e-4 * direction)[0], patches[0])) for sign in (1, -1)]
    assert float((words.grad * direction).sum()) == pytest.approx((sides[0] - sides[1]) / 2e-4, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    words, patches, *masks = problem(7, 16)
    words, patches = words.to(dtype), patches.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = alignment_distance(words, patches, *masks)
    assert distance.dtype == torch.float32
    wanted = alignment_distance(words.double(), patches.double(), *masks)
    assert abs(distance.double() - wanted) <= CAPS[torch.float32] * 2


def test_other_pairs_are_pushed_apart():
    """The sum of matching pairs less the others', over all: catches a mean over each kind."""
    pairs = [problem(3, 4, seed=n) for n in range(3)]
    words, patches, word_mask, patch_mask = (torch.cat(x) for x in zip(*pairs, strict=True))
    distance = alignment_distance(words, patches, word_mask, patch_mask)
    matches = torch.tensor([True, False, False])
    loss = alignment_loss(words, patches, word_mask, patch_mask, matches)
    torch.testing.assert_close(loss, (distance[0] - distance[1] - distance[2]) / 3)
    torch.testing.assert_close(alignment_loss(words, patches, word_mask, patch_mask), distance.mean())
    with pytest.raises(ValueError, match="matches must be"):
        alignment_loss(words, patches, word_mask, patch_mask, matches[:2])


def test_what_is_refused():
    words, patches, word_mask, patch_mask = problem(3, 4)
    for arguments, error, message in (
        ((words, patches, word_mask[:, 1:], patch_mask), ValueError, "word states and mask"),
        ((words, patches, word_mask, patch_mask.long()), TypeError, "patch_mask must be bool"),
        ((words, patches[..., 1:], word_mask, patch_mask), ValueError, "agree in B and D"),
    ):
        with pytest.raises(error, match=message):
            alignment_distance(*arguments)
