"""Positions of text and image tokens: the relative-bias table, its index, and the change of resolution.

One learned table holds the biases of all layers and heads, (num_rows, L * heads), layer-major columns. For a window of
N x N patches and a text span of T tokens its rows are, in this order:

    (2N-1)^2   image patch to image patch, by (row distance, column distance), query minus key
    3          image [CLS] to patch, patch to image [CLS], image [CLS] to itself
    2          text query to image key, image query to text key
    2T - 3     text to text, by distance, *key minus query*, from -(T-2) to T-2
    3          text [CLS] to text, text to text [CLS], text [CLS] to itself

The image rows are BEiT's (arXiv:2106.08254); the text and cross rows are those of the released VLMo.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmo_fast.watch import is_plain, values_are_visible, watched_from_now_on

__all__ = [
    "KeptBiases",
    "LayerBiases",
    "RelativePositionBias",
    "num_relative_positions",
    "relative_position_index",
    "resize_absolute_positions",
    "resize_relative_bias_table",
]

ALL_LAYERS_BYTES = 256 << 20
NUM_KEPT = 4  # shapes


def num_relative_positions(window_size: int, text_span: int) -> int:
    """Rows of the table for a `window_size` x `window_size` image and texts up to `text_span` tokens."""
    return (2 * window_size - 1) ** 2 + 3 + 2 + 2 * text_span


def relative_position_index(
    num_text_tokens: int, window_size: int, text_span: int, *, with_image: bool, device: torch.device | None = None
) -> Tensor:
    """Row of the bias table for each (query, key) of the sequence [text ; image [CLS] ; patches].

    Args:
        num_text_tokens: text tokens at the front of the sequence; 0 for an image alone.
        window_size: patches along one side of the image that the table was made for.
        text_span: text lengths that the table covers.
        with_image: whether the image tokens follow the text.
        device: where the index is made.

    Returns:
        (S, S) int64, queries along the first axis; S = num_text_tokens + (1 + window_size^2 if with_image).
    """
    end_of_image = (2 * window_size - 1) ** 2 + 3
    parts = []
    if num_text_tokens:
        parts.append(_text_index(num_text_tokens, end_of_image + 2, text_span, device))
    if with_image:
        parts.append(_image_index(window_size, device))
    if len(parts) == 1:
        return parts[0]
    text, image = parts
    text_to_image = text.new_full((len(text), len(image)), end_of_image)
    image_to_text = text.new_full((len(image), len(text)), end_of_image + 1)
    return torch.cat([torch.cat([text, text_to_image], dim=1), torch.cat([image_to_text, image], dim=1)])


def _image_index(window_size: int, device: torch.device | None) -> Tensor:
    side = torch.arange(window_size, device=device)
    rows, columns = side.repeat_interleave(window_size), side.repeat(window_size)  # (N^2,) each, row-major
    row_distance = rows[:, None] - rows[None, :] + window_size - 1  # query minus key
    column_distance = columns[:, None] - columns[None, :] + window_size - 1
    index = F.pad(row_distance * (2 * window_size - 1) + column_distance, (1, 0, 1, 0))  # [CLS] in front
    end = (2 * window_size - 1) ** 2 + 3
    return _set_cls(index, cls_to_token=end - 3, token_to_cls=end - 2, cls_to_cls=end - 1)


def _text_index(num_tokens: int, first_row: int, text_span: int, device: torch.device | None) -> Tensor:
    position = torch.arange(num_tokens, device=device)
    distance = position[None, :] - position[:, None]  # key minus query
    # Packed batches round the text's share of the bias up; places past the span, which no token has, must index too.
    index = distance.clamp(2 - text_span, text_span - 2) + first_row + text_span - 2
    end = first_row + 2 * text_span
    return _set_cls(index, cls_to_token=end - 3, token_to_cls=end - 2, cls_to_cls=end - 1)


def _set_cls(index: Tensor, *, cls_to_token: int, token_to_cls: int, cls_to_cls: int) -> Tensor:
    """Give the first token of a modality, its [CLS], the rows of its own."""
    first = torch.arange(index.shape[0], device=index.device) == 0
    index = torch.where(first[:, None], cls_to_token, index)  # out of place: inductor cannot lower the assignments
    index = torch.where(first[None, :], token_to_cls, index)
    return torch.where(first[:, None] & first[None, :], cls_to_cls, index)


@watched_from_now_on
class RelativePositionBias(nn.Module):
    """The learned bias table of all layers and its gather.

    Args:
        num_layers: blocks L.
        num_heads: attention heads of a block.
        window_size: patches along one side of the image.
        text_span: text lengths that the table covers.
    """

    def __init__(self, num_layers: int, num_heads: int, window_size: int, text_span: int) -> None:
        super().__init__()
        self.num_layers, self.num_heads = num_layers, num_heads
        self.window_size, self.text_span = window_size, text_span
        self.table = nn.Parameter(torch.zeros(num_relative_positions(window_size, text_span), num_layers * num_heads))

    def forward(self, num_text_tokens: int, window_sizes: tuple[int, ...]) -> LayerBiases:
        """The biases of all layers for sequences of the form [text ; image].

        Args:
            num_text_tokens: tokens of the longest text, 0 for images alone.
            window_sizes: patches along a side of each size of image; none for texts alone. Where a size is not the
                table's own, the table is resized on the fly (differentiably).
        """
        return LayerBiases(self, num_text_tokens, window_sizes)


class LayerBiases:
    """Biases of each layer: `biases[layer]` is (heads, R, R), R = text tokens + tokens of each size of image, in order.

    Between images of different sizes, which no sequence joins, the bias is 0. All layers are gathered at once, but for
    sizes where that takes more than `ALL_LAYERS_BYTES` (large at 480 px: 1.4 GB): there each when it is asked for. They
    are gathered along the contiguous axis of the table's transpose, which a CPU does several times faster than an
    embedding lookup and a permutation, and taken apart at once, so that the gradients of all layers are put together
    once; an index for each layer would fill and add as many numbers as all layers have (docs/log.md).
    """

    def __init__(self, module: RelativePositionBias, num_text_tokens: int, window_sizes: tuple[int, ...]) -> None:
        self._module, self._num_text = module, num_text_tokens
        table, own, span = module.table, module.window_size, module.text_span
        self._sources = []  # for each size of image its table and the table's row for each (query, key)
        for window in window_sizes or (None,):
            size = own if window is None else window
            index = relative_position_index(
                num_text_tokens, size, span, with_image=window is not None, device=table.device
            )
            self._sources.append((resize_relative_bias_table(table, own, size), index))
        self.num_rows = num_text_tokens + sum(len(index) - num_text_tokens for _, index in self._sources)
        num_bytes = module.num_layers * module.num_heads * self.num_rows**2 * table.element_size()
        self.all_layers: Tensor | None = None
        self._layers: tuple[Tensor, ...] = ()
        if num_bytes <= ALL_LAYERS_BYTES:
            self.all_layers = self._gather(0, module.num_layers)
            self._layers = self.all_layers.unbind()

    def __getitem__(self, layer: int) -> Tensor:
        """(heads, R, R)."""
        return self._layers[layer] if self._layers else self._gather(layer, layer + 1)[0]

    def _gather(self, first_layer: int, end_layer: int) -> Tensor:
        """(layers, heads, R, R)."""
        heads = self._module.num_heads
        biases = []
        for table, index in self._sources:
            columns = table[:, first_layer * heads : end_layer * heads].t().contiguous()
            biases.append(columns.index_select(1, index.flatten()).view(end_layer - first_layer, heads, *index.shape))
        if len(biases) == 1:
            return biases[0]
        joint = biases[0].new_zeros(*biases[0].shape[:2], self.num_rows, self.num_rows)
        text, end = torch.arange(self._num_text, device=joint.device), self._num_text
        for bias in biases:
            rows = torch.cat([text, torch.arange(end, end + bias.shape[-1] - self._num_text, device=joint.device)])
            joint[:, :, rows[:, None], rows] = bias
            end += bias.shape[-1] - self._num_text
        return joint


class KeptBiases:
    """Biases of the last few shapes, for as long as the table holds the same numbers, which each call compares.

    In evaluation without gradients on a CPU, where gathering takes longer than comparing. Elsewhere they are gathered
    anew, a CUDA graph's among them, which replays that. Threads may share it: what is kept is replaced whole.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, tuple[tuple[tuple[int, tuple[int, ...]], LayerBiases], ...]] | None = None

    def __call__(self, module: RelativePositionBias, num_text_tokens: int, windows: tuple[int, ...]) -> LayerBiases:
        """What the module returns."""
        key = num_text_tokens, windows
        if module.training or torch.is_grad_enabled() or not is_plain(module, RelativePositionBias):
            return module(*key)
        table = module.table.detach()
        if not values_are_visible(table):
            return module(*key)
        old, kept = self._kept or (None, ())
        if old is None or old.dtype != table.dtype or not torch.equal(old, table):
            old, kept = table.clone(), ()
        for shape, found in kept:
            if shape == key:
                return found
        biases: LayerBiases = module(*key)
        if biases.all_layers is not None:  # else it is gathered from a table that may have been replaced since
            self._kept = old, (*kept[1 - NUM_KEPT :], (key, biases))
        return biases

    def __getstate__(self) -> dict[str, None]:
        """Copies and files keep nothing."""
        return {"_kept": None}


def resize_relative_bias_table(table: Tensor, window_size: int, new_window_size: int) -> Tensor:
    """The bias table of another image size, by the released rule.

    The rows of patch-to-patch distances form, per column, a (2N-1) x (2N-1) grid. It is read as samples at distances
    that grow geometrically from the centre, through which a bicubic spline (not-a-knot) is laid; the spline is
    evaluated at the integer distances of the new grid, and held constant outside the sampled range. All other rows are
    copied.

    Args:
        table: (rows, columns), any float dtype. The arithmetic is float64, the result in the table's dtype.
        window_size: patches along a side that the table was made for; at least 3 where the size changes.
        new_window_size: patches along a side wanted.

    Returns:
        (rows + (2 N_new - 1)^2 - (2 N - 1)^2, columns); the table itself where the sizes agree. Differentiable.

    Raises:
        ValueError: the window is too small for a cubic spline, or the table has too few rows.
    """
    if window_size == new_window_size:
        return table
    side, new_side = 2 * window_size - 1, 2 * new_window_size - 1
    if side < 4:
        raise ValueError(
            "resize_relative_bias_table: window_size must be at least 3 patches (the spline is cubic), "
            f"got {window_size}"
        )
    if new_window_size < 1 or table.shape[0] < side**2:
        raise ValueError(
            f"resize_relative_bias_table: table must have at least {side**2} rows and new_window_size be positive, "
            f"got {table.shape[0]} rows and new_window_size={new_window_size}"
        )
    samples, _ = geometric_distances(side // 2, new_side // 2)
    samples_tensor = torch.tensor(samples, dtype=torch.float64)
    targets = torch.arange(-(new_side // 2), new_side // 2 + 1, dtype=torch.float64)
    weights = _cubic_spline_weights(samples_tensor, targets).to(table.device)  # (new_side, side)
    grid = table[: side**2].double().unflatten(0, (side, side))
    resized = torch.einsum("ai,ijc,bj->abc", weights, grid, weights).flatten(0, 1)
    return torch.cat([resized.to(table.dtype), table[side**2 :]])


def geometric_distances(num_source: int, num_target: int) -> tuple[list[float], float]:
    """Sample distances 0, +-1, +-(1 + q), ... that reach from the source's last distance to the target's.

    The ratio q is found by bisection on [1.01, 1.5]; as in the released code it is the last midpoint tried, and where
    the bracket holds no solution it ends at the bracket's edge.

    Args:
        num_source: largest distance of the source grid, patches.
        num_target: largest distance of the target grid, patches.

    Returns:
        The 2 * num_source + 1 ascending distances, and q.
    """
    low, high, q = 1.01, 1.5, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q**num_source) / (1 - q) > num_target:
            high = q
        else:
            low = q
    positive: list[float] = []
    distance = 0.0
    for power in range(num_source):
        distance += q**power
        positive.append(distance)
    return [-value for value in reversed(positive)] + [0.0] + positive, q


def _cubic_spline_weights(samples: Tensor, targets: Tensor) -> Tensor:
    """Matrix that takes values at `samples` to the not-a-knot cubic spline through them at `targets`.

    Args:
        samples: (n,) ascending float64, n >= 4.
        targets: (m,) float64; those outside the samples are moved to their ends.

    Returns:
        (m, n) float64.
    """
    # Knots: each end four times, every inner sample but the two next to the ends once (the not-a-knot condition).
    knots = torch.cat([samples[:1].repeat(4), samples[2:-2], samples[-1:].repeat(4)])
    targets = targets.clamp(samples[0], samples[-1])
    return _cubic_b_splines(knots, targets) @ torch.linalg.inv(_cubic_b_splines(knots, samples))


def _cubic_b_splines(knots: Tensor, points: Tensor) -> Tensor:
    """Values of the cubic B-splines of a knot vector, (len(points), len(knots) - 4), by the Cox-de Boor recursion."""
    inner = knots[3:-3]
    span = (torch.searchsorted(inner, points, right=True) - 1).clamp(0, len(inner) - 2) + 3  # knots[span] <= point
    basis = F.one_hot(span, len(knots) - 1).to(points.dtype)
    for degree in (1, 2, 3):
        left, right = knots[: -degree - 1], knots[degree + 1 :]
        rise = knots[degree:-1] - left  # support of the lower-degree spline that comes in from the left
        fall = right - knots[1:-degree]
        up = torch.where(rise > 0, (points[:, None] - left) / rise, 0.0)
        down = torch.where(fall > 0, (right - points[:, None]) / fall, 0.0)
        basis = up * basis[:, :-1] + down * basis[:, 1:]
    return basis


def resize_absolute_positions(positions: Tensor, window_size: int, new_window_size: int) -> Tensor:
    """Absolute image positions of another image size: [CLS] kept, the grid resized by bicubic interpolation.

    Args:
        positions: (1, 1 + N^2, D), any float dtype; the arithmetic is at least float32.
        window_size: patches along a side, N.
        new_window_size: patches along a side wanted.

    Returns:
        (1, 1 + N_new^2, D); the argument itself where the sizes agree. Differentiable.
    """
    if window_size == new_window_size:
        return positions
    grid = positions[:, 1:].to(torch.promote_types(positions.dtype, torch.float32))
    grid = grid.unflatten(1, (window_size, window_size)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new_window_size, new_window_size), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)], dim=1)
