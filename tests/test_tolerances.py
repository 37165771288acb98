"""The comparison that every fast path goes through can fail, in each way that it should."""

import pytest
import tolerances
import torch


def test_accepts_what_eager_does() -> None:
    exact = torch.randn(50, 40, dtype=torch.float64)
    eager = exact.bfloat16()
    tolerances.check_draws("x", [(eager, exact, eager)])


@pytest.mark.parametrize("dtype", list(tolerances.CAPS), ids=str)
def test_refuses_more_than_the_cap_however_bad_eager_is(dtype: torch.dtype) -> None:
    exact = torch.randn(50, 40, dtype=torch.float64)
    off = exact * (1 + 1.1 * tolerances.CAPS[dtype])
    with pytest.raises(AssertionError, match="x: frobenius error"):
        tolerances.check_draws("x", [(off, exact, off)], dtype)


def test_refuses_four_times_the_eager_error() -> None:
    exact = torch.randn(50, 40, dtype=torch.float64)
    eager = exact.bfloat16()
    worse = exact + 4 * (eager.double() - exact)
    assert tolerances.errors(worse, exact).frobenius < tolerances.CAPS[torch.bfloat16]
    with pytest.raises(AssertionError, match="x: frobenius error"):
        tolerances.check_draws("x", [(worse, exact, eager)], torch.bfloat16)


def test_of_several_draws_the_mean_is_held_to_eager_and_each_to_the_cap() -> None:
    exact = torch.randn(50, 40, dtype=torch.float64)
    eager = exact.float()
    lucky, usual, bad = (exact + factor * (eager.double() - exact) for factor in (0.1, 4, 12))
    with pytest.raises(AssertionError, match="x: frobenius error"):
        tolerances.check_draws("x", [(usual, exact, lucky)], torch.float32)
    tolerances.check_draws("x", [(usual, exact, lucky), (usual, exact, usual)], torch.float32)
    with pytest.raises(AssertionError, match="x: frobenius error"):
        tolerances.check_draws("x", [(bad, exact, usual), (bad, exact, lucky)], torch.float32)
    off = exact * (1 + 1.1 * tolerances.CAPS[torch.float32])
    poor = exact * (1 + tolerances.CAPS[torch.float32])
    with pytest.raises(AssertionError, match=r"x: frobenius error .* > cap"):
        tolerances.check_draws("x", [(off, exact, poor), (usual, exact, poor)], torch.float32)


def products(fault: float = 0.0) -> dict[str, tuple[torch.Tensor, ...]]:
    """A layer's output and weight gradient, added up in another order than eager does; one side off by `fault`."""
    x, weight, grad = torch.randn(50, 96), torch.randn(8, 96), torch.randn(50, 8)
    order, rows = torch.randperm(96), torch.randperm(50)
    ours = x[:, order] @ weight[:, order].t(), grad[rows].t() @ x[rows] * (1 + fault)
    exact = x.double() @ weight.double().t(), grad.double().t() @ x.double()
    eager = x @ weight.t(), grad.t() @ x
    return {name: each for name, *each in zip(("out", "d weight"), ours, exact, eager, strict=True)}


def test_another_order_of_sums_passes_and_a_fault_of_a_few_ulp_does_not() -> None:
    """In every one of 50 problems; and luck costs more draws, not the test."""
    eps = torch.finfo(torch.float32).eps
    for _ in range(50):
        tolerances.check(products)
        with pytest.raises(tolerances.AboveEager, match="d weight: frobenius"):
            tolerances.check(lambda: products(3 * eps))
    lucky = iter([True])
    drawn = []

    def one_lucky_draw() -> dict[str, tuple[torch.Tensor, ...]]:
        name, (actual, exact, eager) = next(iter(products().items()))
        drawn.append(name)
        return {name: (actual, exact, exact.float() if next(lucky, False) else eager)}

    tolerances.check(one_lucky_draw)
    assert len(drawn) == tolerances.DRAWS


def test_the_cap_holds_in_the_first_draw() -> None:
    drawn = []
    with pytest.raises(AssertionError, match=r"d weight: frobenius error .* > cap"):
        tolerances.check(lambda: drawn.append(1) or products(1e-4))
    assert len(drawn) == 1


def test_refuses_one_bad_row_that_the_norm_hides() -> None:
    exact = torch.randn(5000, 8, dtype=torch.float64)
    actual = exact.clone()
    actual[17] += 0.05
    assert tolerances.errors(actual, exact).frobenius < 0.001
    with pytest.raises(AssertionError, match="x: worst_row error"):
        tolerances.check_draws("x", [(actual, exact, exact.bfloat16())], torch.bfloat16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_what_is_not_finite(bad: float) -> None:
    exact = torch.randn(50, 40, dtype=torch.float64)
    actual = exact.clone()
    actual[3, 3] = bad
    with pytest.raises(AssertionError, match="x: frobenius error"):
        tolerances.check_draws("x", [(actual, exact, exact.float())], torch.float32)


def test_zeros_must_be_zeros() -> None:
    zeros = torch.zeros(3, 4, dtype=torch.float64)
    tolerances.check_draws("x", [(zeros.bfloat16(), zeros, zeros)])
    with pytest.raises(AssertionError, match="frobenius error inf"):
        tolerances.check_draws("x", [(zeros.bfloat16() + 1e-30, zeros, zeros)])


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match=r"\(3,\) instead of \(3, 1\)"):
        tolerances.errors(torch.zeros(3), torch.zeros(3, 1))


@pytest.mark.usefixtures("nan_filled_empty")
def test_empty_is_nan_where_asked() -> None:
    assert torch.empty(1000).isnan().all()
    assert torch.empty_like(torch.ones(10, 10)).isnan().all()
