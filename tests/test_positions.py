"""Relative and absolute positions: index, table, and change of resolution, each against a second derivation."""

import numpy as np
import official
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RectBivariateSpline

import vlmo_fast.positions
from vlmo_fast.positions import (
    RelativePositionBias,
    geometric_distances,
    num_relative_positions,
    relative_position_index,
    resize_absolute_positions,
    resize_relative_bias_table,
)


def row_of(query: int, key: int, num_text: int, n: int, t_init: int) -> int:
    """Row for one (query, key), written out from the release's rule, pair by pair."""
    r = (2 * n - 1) ** 2 + 3
    a = r + 2 * t_init + 2
    query_is_text, key_is_text = query < num_text, key < num_text
    if query_is_text and key_is_text:
        if query == 0 and key == 0:
            return a - 1
        if query == 0:
            return a - 3
        if key == 0:
            return a - 2
        return r + 2 + (t_init - 2) + (key - query)
    if query_is_text:
        return r
    if key_is_text:
        return r + 1
    i, j = query - num_text, key - num_text
    if i == 0 and j == 0:
        return r - 1
    if i == 0:
        return r - 3
    if j == 0:
        return r - 2
    (y_i, x_i), (y_j, x_j) = divmod(i - 1, n), divmod(j - 1, n)
    return (y_i - y_j + n - 1) * (2 * n - 1) + (x_i - x_j + n - 1)


@pytest.mark.parametrize(
    ("num_text", "n", "t_init", "with_image"),
    [
        (0, 3, 8, True),  # an image alone
        (0, 1, 8, True),  # one patch
        (8, 3, 8, False),  # a text alone, as long as the span allows
        (1, 3, 8, False),  # [CLS] alone
        (2, 3, 8, False),  # [CLS] and one token
        (1, 2, 5, True),  # a pair with a one-token text
        (5, 3, 8, True),
        (40, 4, 196, True),  # the goldens' sizes
    ],
)
def test_index_against_the_formula(num_text, n, t_init, with_image):
    index = relative_position_index(num_text, n, t_init, with_image=with_image)
    size = num_text + (1 + n * n if with_image else 0)
    assert index.dtype == torch.int64
    assert index.shape == (size, size)
    wanted = [[row_of(query, key, num_text, n, t_init) for key in range(size)] for query in range(size)]
    assert index.tolist() == wanted


def test_index_against_the_goldens():
    z = official.load_golden("tiny_rel_hot")
    for name, num_text, with_image in (("image", 0, True), ("text", 40, False), ("text_image", 40, True)):
        ours = relative_position_index(num_text, 4, 196, with_image=with_image)
        assert np.array_equal(ours.numpy(), z[f"idx.{name}"].astype(np.int64)), name


@given(num_text=st.integers(1, 12), n=st.integers(1, 5), extra=st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_index_laws(num_text, n, extra):
    """Inside the table; a shorter text has the top left corner of a longer one's; a pair holds both parts' own."""
    span = num_text + extra
    joint = relative_position_index(num_text, n, span, with_image=True)
    assert 0 <= int(joint.min()) <= int(joint.max()) < num_relative_positions(n, span)
    text = relative_position_index(num_text, n, span, with_image=False)
    image = relative_position_index(0, n, span, with_image=True)
    assert torch.equal(joint[:num_text, :num_text], text)
    assert torch.equal(joint[num_text:, num_text:], image)
    shorter = relative_position_index(max(num_text - 1, 1), n, span, with_image=False)
    assert torch.equal(text[: len(shorter), : len(shorter)], shorter)


@pytest.mark.parametrize(
    ("window", "span", "rows"),
    [(14, 196, 1126), (24, 196, 2606), (30, 196, 3878), (4, 196, 446), (1, 1, 8)],  # 224, 384, 480 px; tiny; least
)
def test_row_counts(window, span, rows):
    assert num_relative_positions(window, span) == rows
    assert RelativePositionBias(2, 3, window, span).table.shape == (rows, 6)


def test_the_whole_table_is_used():
    """At full text length each row is some (query, key)'s: none is dead, none is missing."""
    index = relative_position_index(9, 3, 9, with_image=True)
    # Distances are at most T - 2 = 7 apart, [CLS] having rows of its own; the rows -(T-2)..T-2 are the table's 2 T - 3.
    assert set(index.flatten().tolist()) == set(range(num_relative_positions(3, 9)))


def all_layers(module: RelativePositionBias, num_text: int, window: int | None) -> torch.Tensor:
    """(L, heads, S, S)."""
    biases = module(num_text, () if window is None else (window,))
    return torch.stack([biases[layer] for layer in range(module.num_layers)])


def test_bias_is_layer_major():
    """Column layer * heads + head of the table is head `head` of layer `layer`."""
    module = RelativePositionBias(num_layers=3, num_heads=2, window_size=2, text_span=6)
    with torch.no_grad():
        module.table.copy_(torch.randn_like(module.table))
    for num_text, window in ((4, 2), (0, 2), (4, None)):
        index = relative_position_index(num_text, 2, 6, with_image=window is not None)
        bias = all_layers(module, num_text, window)
        assert bias.shape == (3, 2, *index.shape)
        for layer in range(3):
            for head in range(2):
                assert torch.equal(bias[layer, head], module.table[:, 2 * layer + head][index])


def test_bias_of_another_window_is_the_resized_tables():
    module = RelativePositionBias(num_layers=1, num_heads=2, window_size=3, text_span=6)
    with torch.no_grad():
        module.table.copy_(torch.randn_like(module.table))
    table = resize_relative_bias_table(module.table, 3, 5)
    index = relative_position_index(4, 5, 6, with_image=True)
    assert torch.equal(all_layers(module, 4, 5)[0, 1], table[:, 1][index])
    all_layers(module, 4, 5).sum().backward()
    assert module.table.grad.abs().sum() > 0


def test_bias_of_two_windows():
    """Each size of image has its block and its blocks with the text; there is nothing between the two sizes."""
    module = RelativePositionBias(num_layers=2, num_heads=2, window_size=3, text_span=6)
    with torch.no_grad():
        module.table.copy_(torch.randn_like(module.table))
    joint, small, large = (module(4, windows) for windows in ((3, 5), (3,), (5,)))
    assert joint.num_rows == 4 + 10 + 26
    rows = torch.arange(4 + 10), torch.cat([torch.arange(4), torch.arange(14, 40)])
    for layer in range(2):
        for alone, mine in zip((small, large), rows, strict=True):
            assert torch.equal(joint[layer][:, mine[:, None], mine], alone[layer])
        assert not joint[layer][:, 4:14, 14:].any()
        assert not joint[layer][:, 14:, 4:14].any()
    for windows in ((3, 5), (3,), (5,)):  # what the text rows get, they get once
        module.zero_grad()
        module(4, windows).all_layers[:, :, :4, :4].sum().backward()
        assert module.table.grad.sum() == 2 * 2 * 16


def test_layers_one_by_one_where_all_are_too_many(monkeypatch):
    module = RelativePositionBias(num_layers=3, num_heads=2, window_size=3, text_span=6)
    with torch.no_grad():
        module.table.copy_(torch.randn_like(module.table))
    together = module(4, (3, 5))
    monkeypatch.setattr(vlmo_fast.positions, "ALL_LAYERS_BYTES", 3 * 2 * 40**2 * 4 - 1)
    apart = module(4, (3, 5))
    assert together.all_layers is not None and apart.all_layers is None
    assert all(torch.equal(together[layer], apart[layer]) for layer in range(3))


def test_bias_gradient_counts_the_uses():
    """Each row's gradient of the sum is the number of (query, key) that read it."""
    module = RelativePositionBias(num_layers=2, num_heads=2, window_size=2, text_span=6)
    all_layers(module, 4, 2).sum().backward()
    counts = torch.bincount(relative_position_index(4, 2, 6, with_image=True).flatten(), minlength=len(module.table))
    assert torch.equal(module.table.grad, counts[:, None].expand(-1, 4).float())


# Change of resolution


def scipy_resize(table: np.ndarray, n_source: int, n_target: int) -> np.ndarray:
    """The released rule by scipy's own spline."""
    side, n, m = 2 * n_source - 1, (2 * n_source - 1) // 2, (2 * n_target - 1) // 2
    left, right, q = 1.01, 1.5, 0.0
    while right - left > 1e-6:
        q = (left + right) / 2
        left, right = (left, q) if sum(q**k for k in range(n)) > m else (q, right)
    positive = [sum(q**j for j in range(k + 1)) for k in range(n)]
    x = np.array([-value for value in reversed(positive)] + [0.0] + positive)
    t = np.clip(np.arange(-m, m + 1, dtype=np.float64), x[0], x[-1])
    grids = table[: side**2].T.astype(np.float64).reshape(-1, side, side)
    resized = np.stack([RectBivariateSpline(x, x, grid, kx=3, ky=3, s=0)(t, t).ravel() for grid in grids], axis=1)
    return np.concatenate([resized, table[side**2 :].astype(np.float64)])


RESIZES = [
    (14, 24),  # 224 -> 384 px, the released fine-tuning
    (14, 30),  # 224 -> 480 px
    (4, 6),  # q at the bracket's upper edge: the outermost ring is clamped
    (6, 4),  # q at its lower edge: the centre is cut out
    (3, 5),  # fewest patches that a cubic spline takes: 5 samples
    (14, 7),
    (14, 1),  # down to one patch
]


@pytest.mark.parametrize(("source", "target"), RESIZES)
def test_resized_table_against_scipy(source, target):
    """In float64, so that only the spline's own arithmetic differs.

    Both sides solve the same 5- to 27-point spline system; its collocation matrices have condition numbers below 10,
    so that 10 * 2.2e-16 per axis leaves 1e-13 with room to spare. Values are of order 1.
    """
    table = torch.randn(num_relative_positions(source, 10), 3, dtype=torch.float64)
    resized = resize_relative_bias_table(table, source, target)
    assert resized.shape == (num_relative_positions(target, 10), 3)
    assert (resized - torch.from_numpy(scipy_resize(table.numpy(), source, target))).abs().max() < 1e-13
    kept = len(table) - (2 * source - 1) ** 2
    assert kept == 5 + 2 * 10
    assert torch.equal(resized[-kept:], table[-kept:])  # bit for bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_resized_table_is_rounded_once(dtype):
    """Arithmetic in float64, one rounding at the end: within half a unit in the last place of the exact result."""
    table = torch.randn(num_relative_positions(4, 10), 2).to(dtype)
    resized = resize_relative_bias_table(table, 4, 6)
    exact = torch.from_numpy(scipy_resize(table.double().numpy(), 4, 6))
    assert resized.dtype == dtype
    half_ulp = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).tiny
    assert ((resized.double() - exact).abs() <= half_ulp * (1 + 1e-6) + 1e-12).all()
    assert torch.equal(resized[-25:], table[-25:])


@pytest.mark.parametrize(("source", "target", "q"), [(14, 24, 1.090307), (14, 30, 1.125056), (4, 6, 1.5), (6, 4, 1.01)])
def test_ratio(source, target, q):
    """The released ratios; the bisection stops within 1e-6, so six decimals are all it determines."""
    distances, ratio = geometric_distances(source - 1, target - 1)
    assert ratio == pytest.approx(q, abs=1.5e-6)
    assert len(distances) == 2 * source - 1
    assert distances == sorted(distances)
    assert distances[source - 1] == 0
    assert distances[source] == 1


def test_spline_keeps_cubics():
    """A cubic of the two distances is its own spline: exact wherever the new grid lies inside the samples."""
    source, target = 14, 24
    samples = np.array(geometric_distances(source - 1, target - 1)[0])

    def cubic(y, x):
        return 1e-3 * (y**3 - 2 * x**3 + y * x - 4 * y + 7)

    table = np.zeros((num_relative_positions(source, 3), 1))
    table[: (2 * source - 1) ** 2, 0] = cubic(samples[:, None], samples[None, :]).ravel()
    resized = resize_relative_bias_table(torch.from_numpy(table), source, target)
    t = np.clip(np.arange(-(target - 1), target, dtype=np.float64), samples[0], samples[-1])
    wanted = cubic(t[:, None], t[None, :]).ravel()
    assert np.abs(resized[: (2 * target - 1) ** 2, 0].numpy() - wanted).max() < 1e-10 * np.abs(wanted).max()


def test_unchanged_size_is_the_tensor_itself():
    table, positions = torch.randn(num_relative_positions(4, 9), 2), torch.randn(1, 17, 5)
    assert resize_relative_bias_table(table, 4, 4) is table
    assert resize_absolute_positions(positions, 4, 4) is positions
    tiny = torch.randn(num_relative_positions(1, 9), 2)
    assert resize_relative_bias_table(tiny, 1, 1) is tiny  # too small for a spline, and none is needed


def test_resizing_refuses():
    for window in (1, 2):
        with pytest.raises(ValueError, match=rf"window_size must be at least 3 patches .*got {window}"):
            resize_relative_bias_table(torch.zeros(num_relative_positions(window, 9), 1), window, 4)
    with pytest.raises(ValueError, match=r"at least 49 rows .*got 48 rows and new_window_size=6"):
        resize_relative_bias_table(torch.zeros(48, 1), 4, 6)
    with pytest.raises(ValueError, match=r"new_window_size be positive, got 446 rows and new_window_size=0"):
        resize_relative_bias_table(torch.zeros(446, 1), 4, 0)


@pytest.mark.parametrize(("source", "target"), [(3, 4), (4, 3)])
def test_gradients_of_resizing(source, target):
    table = torch.randn(num_relative_positions(source, 2), 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resize_relative_bias_table(x, source, target), table)
    positions = torch.randn(1, 1 + source**2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resize_absolute_positions(x, source, target), positions)


def test_gradient_of_the_gather():
    module = RelativePositionBias(num_layers=2, num_heads=1, window_size=3, text_span=4).double()

    def bias(table, window):
        return torch.func.functional_call(module, {"table": table}, (3, (window,))).all_layers

    table = torch.randn_like(module.table).requires_grad_()
    for window in (3, 4):
        assert torch.autograd.gradcheck(lambda x, w=window: bias(x, w), table)


# Absolute positions


def keys_cubic(x: float) -> float:
    """Keys' cubic convolution kernel, a = -0.75, by its two polynomials."""
    a, x = -0.75, abs(x)
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a if x < 2 else 0.0


def bicubic(grid: np.ndarray, target: int) -> np.ndarray:
    """(N, N) -> (target, target), point by point: half-pixel centres, border repeated, no antialiasing."""
    n = len(grid)
    result = np.zeros((target, target))
    for y in range(target):
        for x in range(target):
            centre_y, centre_x = (y + 0.5) * n / target - 0.5, (x + 0.5) * n / target - 0.5
            for j in range(int(np.floor(centre_y)) - 1, int(np.floor(centre_y)) + 3):
                for i in range(int(np.floor(centre_x)) - 1, int(np.floor(centre_x)) + 3):
                    weight = keys_cubic(centre_y - j) * keys_cubic(centre_x - i)
                    result[y, x] += weight * grid[min(max(j, 0), n - 1), min(max(i, 0), n - 1)]
    return result


@pytest.mark.parametrize(("source", "target"), [(4, 6), (6, 4), (3, 5), (2, 3), (14, 24)])
def test_resized_absolute_positions(source, target):
    """float64 against the definition: 16 products of order 1, so 1e-13 is some hundred units of rounding."""
    positions = torch.randn(1, 1 + source**2, 3, dtype=torch.float64)
    resized = resize_absolute_positions(positions, source, target)
    assert resized.shape == (1, 1 + target**2, 3)
    assert resized.dtype == torch.float64
    assert torch.equal(resized[:, 0], positions[:, 0])
    for channel in range(3):
        wanted = bicubic(positions[0, 1:, channel].reshape(source, source).numpy(), target)
        assert np.abs(resized[0, 1:, channel].reshape(target, target).numpy() - wanted).max() < 1e-13


def test_absolute_positions_in_half_precision():
    """bfloat16 in, bfloat16 out, computed in float32 between: one rounding away from the float32 result."""
    positions = torch.randn(1, 17, 8).bfloat16()
    resized = resize_absolute_positions(positions, 4, 6)
    assert resized.dtype == torch.bfloat16
    assert torch.equal(resized, resize_absolute_positions(positions.float(), 4, 6).bfloat16())
