"""Triton kernels of the grouped modality experts, forward and backward.

    out = x + row_scale * layer_scale * (gelu(z) W2^T + b2),  z = LN(x) W1^T + b1,  gelu(z) = z cdf(z)

The rows of `x` (N, D) lie in groups, one after the other, and each group has its own LN, W1 (F, D), b1, W2 (D, F), b2.

Forward, three launches: the norm; fc1 with bias and GELU in its epilogue; fc2 with bias, layer scale, row scale and
residual in its. Saved: x, the norm's statistics, z; GELU's output h only if asked.
Backward, with g = row_scale * grad, W2' = layer_scale * W2 and ^ for the normed, not yet scaled x:

    1  dgrad2  dz = row_scale * (grad W2') * gelu'(z); the epilogue also writes row_scale * h, the row sums
               r1 = sum dz (z - W1 beta - b1) and r2 = sum dz (W1 gamma), and column sums of dz (db1)
    2  wgrad2  Q = grad^T (row_scale * h); dW2 = layer_scale * Q; d layer_scale = rowsum(Q * W2) + b2 sum g
    3  dgrad1  a = gamma * (dz W1); the epilogue is the rest: dx = grad + rstd (a - r2 / D - x^ r1 / D), and column sums
               for d gamma, d beta and sum g
    4  wgrad1  dW1 = dz^T LN(x), with LN(x) made anew

r1 and r2 are the two means of the norm's backward pass, taken in the F hidden channels, where they are known before
dgrad1 starts: x^ gamma W1^T = z - W1 beta - b1. So no pass over (N, D) or (N, F) is left outside a product, but for the
norm. Products 2 and 4 have K = rows and nothing to fuse: they are torch.mm, a group at a time, on the group's own rows.

Traffic a token, 2-byte numbers, beyond what the products of the same shapes move: forward 4D bytes for the norm, 2D for
the residual and 8D for z; backward 4D for the norm, 16D for z and h, 4D for x and grad. Bound: forward 16 D^2, backward
32 D^2 operations a token at F = 4D; base, 790 TFLOP/s: 11.9 and 23.9 ns.

Tiles are BLOCK_M rows of one group times BLOCK_N columns; programs stay and take every num_programs-th tile. Epilogues
go over a tile in parts of its columns, so that their numbers stay in registers. From compute capability 9.0 on,
operands come through tensor descriptors (TMA), which also fill up widths that no tile divides (544) with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["backward", "forward"]

MAX_GROUPS = 3  # of one launch; a block has language, vision and vl
# What changes from batch to batch: a kernel is not built anew for a number that 16 divides, or for 1.
_COUNTS = ("start0", "size0", "start1", "size1", "start2", "size2", "rows", "num_row_tiles")
SWIZZLE = 8  # row tiles that neighbouring programs share the columns of, for the L2 cache


@triton.jit
def _cdf(z):
    """Of the normal distribution."""
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)


@triton.jit
def _pdf(z):
    return 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def _num_row_tiles(size0, size1, size2, BLOCK_M: tl.constexpr):
    return tl.cdiv(size0, BLOCK_M) + tl.cdiv(size1, BLOCK_M) + tl.cdiv(size2, BLOCK_M)


@triton.jit
def _locate(
    tile, start0, size0, start1, size1, start2, size2, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SWIZZLE: tl.constexpr,
):  # fmt: skip
    """Group of a tile, its first row, the end of its group's rows, its first column, and its row tile's number."""
    num_n = tl.cdiv(columns, BLOCK_N)
    m0 = tl.cdiv(size0, BLOCK_M)
    m1 = tl.cdiv(size1, BLOCK_M)
    in1 = tile >= m0 * num_n
    in2 = tile >= (m0 + m1) * num_n
    group = in1.to(tl.int32) + in2.to(tl.int32)
    first_m = tl.where(in2, m0 + m1, tl.where(in1, m0, 0))
    start = tl.where(in2, start2, tl.where(in1, start1, start0))
    size = tl.where(in2, size2, tl.where(in1, size1, size0))
    local = tile - first_m * num_n
    band = local // (SWIZZLE * num_n)
    in_band = local - band * SWIZZLE * num_n
    height = tl.minimum(tl.cdiv(size, BLOCK_M) - band * SWIZZLE, SWIZZLE)
    m = band * SWIZZLE + in_band % height
    n = in_band // height
    return group, start + m * BLOCK_M, start + size, n * BLOCK_N, first_m + m


@triton.jit
def _pick(group, of0, of1, of2, NUM_GROUPS: tl.constexpr):
    """The pointer of a group."""
    pointer = of0
    if NUM_GROUPS > 1:
        if group == 1:
            pointer = of1
    if NUM_GROUPS > 2:
        if group == 2:
            pointer = of2
    return pointer


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _parts(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_PARTS: tl.constexpr):
    """Columns of a tile in parts, one after the other, so that an epilogue holds fewer numbers at a time."""
    if NUM_PARTS == 1:
        return (tile,)
    elif NUM_PARTS == 2:  # noqa: RET505 - Triton leaves out the other branches, but not what follows a return
        return _halves(tile, BLOCK_M, BLOCK_N)
    else:
        left, right = _halves(tile, BLOCK_M, BLOCK_N)
        first, second = _halves(left, BLOCK_M, BLOCK_N // 2)
        third, fourth = _halves(right, BLOCK_M, BLOCK_N // 2)
        return (first, second, third, fourth)


@triton.jit
def _dot(left, right, total, PRECISION: tl.constexpr):
    if PRECISION == "interpreted":  # the interpreter would multiply the bits of bfloat16 numbers as integers
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def _product_of(
    total, a, b, row, column, rows, columns, K,
    B_IS_ROWS: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add a tile of a b^T, where b is (columns, K), or with B_IS_ROWS of a b, where b is (K, columns), to `total`."""
    if USE_TMA:
        for k in range(0, K, BLOCK_K):
            left = a.load([row, k])  # (BLOCK_M, BLOCK_K)
            if B_IS_ROWS:
                right = b.load([k, column])  # (BLOCK_K, BLOCK_N)
            else:
                right = b.load([column, k]).T
            total = _dot(left, right, total, PRECISION)
    else:
        row_index = row + tl.arange(0, BLOCK_M)
        column_index = column + tl.arange(0, BLOCK_N)
        k_index = tl.arange(0, BLOCK_K)
        # Beyond the end the last row is read, of b as well, and the result is never written.
        row_index = tl.where(row_index < rows, row_index, rows - 1)
        left_at = a + row_index.to(tl.int64)[:, None] * K + k_index[None, :]
        if B_IS_ROWS:
            right_at = b + k_index.to(tl.int64)[:, None] * columns + column_index[None, :]
        else:
            column_index = tl.where(column_index < columns, column_index, columns - 1)
            right_at = b + column_index.to(tl.int64)[None, :] * K + k_index[:, None]
        for k in range(0, K, BLOCK_K):
            inside = k_index < K - k
            left = tl.load(left_at, mask=inside[None, :], other=0.0)
            right_inside = inside[:, None]
            if B_IS_ROWS:
                right_inside = right_inside & (column_index < columns)[None, :]
            right = tl.load(right_at, mask=right_inside, other=0.0)
            total = _dot(left, right, total, PRECISION)
            left_at += BLOCK_K
            if B_IS_ROWS:
                right_at += BLOCK_K * columns
            else:
                right_at += BLOCK_K
    return total


@triton.jit
def _product(
    group, a, b0, b1, b2, row, column, rows, columns, K,
    NUM_GROUPS: tl.constexpr, B_IS_ROWS: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile with the weight of its group. Descriptors cannot be picked at run time: each has a loop of its own.

    All loops add to one accumulator: with one each, ptxas runs out of registers and serialises the products.
    """
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if USE_TMA:
        if group == 0:
            total = _product_of(
                total, a, b0, row, column, rows, columns, K,
                B_IS_ROWS, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if NUM_GROUPS > 1:
            if group == 1:
                total = _product_of(
                    total, a, b1, row, column, rows, columns, K,
                    B_IS_ROWS, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
        if NUM_GROUPS > 2:
            if group == 2:
                total = _product_of(
                    total, a, b2, row, column, rows, columns, K,
                    B_IS_ROWS, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
    else:
        b = _pick(group, b0, b1, b2, NUM_GROUPS)
        total = _product_of(
            total, a, b, row, column, rows, columns, K, B_IS_ROWS, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
    return total


@triton.jit(do_not_specialize=_COUNTS)
def _mome_ffn_norm_kernel(
    x, statistics, normed, weight0, weight1, weight2, bias0, bias1, bias2,
    start0, size0, start1, size1, start2, size2, rows, D, x_stride, eps,
    HAS_STATISTICS: tl.constexpr, SAVE: tl.constexpr, NUM_GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """LN(x), a block of rows a program, in one read; statistics are written, or read if they are there.

    They are (3, N) float32: the mean, the reciprocal deviation, and what rounding took from the mean, without which
    rows with a mean of many deviations lose digits.
    """
    group, row, end, _, _ = _locate(
        tl.program_id(0), start0, size0, start1, size1, start2, size2, 1, BLOCK_M, BLOCK_N, 1
    )
    row_index = row + tl.arange(0, BLOCK_M)
    column_index = tl.arange(0, BLOCK_N)
    inside = (row_index < end)[:, None] & (column_index < D)[None, :]
    row64 = row_index.to(tl.int64)
    values = tl.load(x + row64[:, None] * x_stride + column_index[None, :], mask=inside, other=0.0)
    values = values.to(tl.float32)  # (BLOCK_M, BLOCK_N)
    in_columns = (column_index < D)[None, :]
    if HAS_STATISTICS:
        mean = tl.load(statistics + row64, mask=row_index < end, other=0.0)
        rstd = tl.load(statistics + rows + row64, mask=row_index < end, other=0.0)
        remainder = tl.load(statistics + 2 * rows.to(tl.int64) + row64, mask=row_index < end, other=0.0)
        centred = values - mean[:, None] - remainder[:, None]
    else:
        mean = tl.sum(values, 1) / D
        centred = tl.where(in_columns, values - mean[:, None], 0.0)
        remainder = tl.sum(centred, 1) / D
        centred = tl.where(in_columns, centred - remainder[:, None], 0.0)
        rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
        if SAVE:
            tl.store(statistics + row64, mean, mask=row_index < end)
            tl.store(statistics + rows + row64, rstd, mask=row_index < end)
            tl.store(statistics + 2 * rows.to(tl.int64) + row64, remainder, mask=row_index < end)
    weight = tl.load(
        _pick(group, weight0, weight1, weight2, NUM_GROUPS) + column_index, mask=column_index < D, other=0.0
    )
    bias = tl.load(_pick(group, bias0, bias1, bias2, NUM_GROUPS) + column_index, mask=column_index < D, other=0.0)
    result = centred * rstd[:, None] * weight.to(tl.float32)[None, :] + bias.to(tl.float32)[None, :]
    tl.store(normed + row64[:, None] * D + column_index[None, :], result.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def _mome_ffn_fwd_fc1_kernel(
    a, b0, b1, b2, bias0, bias1, bias2, z, h,
    start0, size0, start1, size1, start2, size2, rows, F, D,
    SAVE: tl.constexpr, NUM_GROUPS: tl.constexpr, SWIZZLE: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_PARTS: tl.constexpr,
):  # fmt: skip
    """Both z = a W1^T + b1 and h = gelu(z)."""
    num_tiles = _num_row_tiles(size0, size1, size2, BLOCK_M) * tl.cdiv(F, BLOCK_N)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        group, row, end, column, _ = _locate(
            tile, start0, size0, start1, size1, start2, size2, F, BLOCK_M, BLOCK_N, SWIZZLE
        )
        total = _product(
            group, a, b0, b1, b2, row, column, rows, F, D,
            NUM_GROUPS, False, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # (BLOCK_M, BLOCK_N)  # fmt: skip
        row_index = row + tl.arange(0, BLOCK_M)
        bias_of = _pick(group, bias0, bias1, bias2, NUM_GROUPS)
        parts = _parts(total, BLOCK_M, BLOCK_N, NUM_PARTS)
        for part in tl.static_range(NUM_PARTS):
            column_index = column + part * (BLOCK_N // NUM_PARTS) + tl.arange(0, BLOCK_N // NUM_PARTS)
            at = row_index.to(tl.int64)[:, None] * F + column_index[None, :]
            inside = (row_index < end)[:, None] & (column_index < F)[None, :]
            bias = tl.load(bias_of + column_index, mask=column_index < F, other=0.0).to(tl.float32)
            rounded = (parts[part] + bias[None, :]).to(h.dtype.element_ty)  # as the backward pass will read it
            if SAVE:
                tl.store(z + at, rounded, mask=inside)
            value = rounded.to(tl.float32)
            tl.store(h + at, (value * _cdf(value)).to(h.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def _mome_ffn_fwd_fc2_kernel(
    a, b0, b1, b2, bias0, bias1, bias2, x, layer_scale, row_scale, out,
    start0, size0, start1, size1, start2, size2, rows, D, F, x_stride,
    HAS_LAYER_SCALE: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, NUM_GROUPS: tl.constexpr, SWIZZLE: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_PARTS: tl.constexpr,
):  # fmt: skip
    """The result, x + row_scale * layer_scale * (a W2^T + b2)."""
    num_tiles = _num_row_tiles(size0, size1, size2, BLOCK_M) * tl.cdiv(D, BLOCK_N)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        group, row, end, column, _ = _locate(
            tile, start0, size0, start1, size1, start2, size2, D, BLOCK_M, BLOCK_N, SWIZZLE
        )
        total = _product(
            group, a, b0, b1, b2, row, column, rows, D, F,
            NUM_GROUPS, False, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # (BLOCK_M, BLOCK_N)  # fmt: skip
        row_index = row + tl.arange(0, BLOCK_M)
        row64 = row_index.to(tl.int64)[:, None]
        bias_of = _pick(group, bias0, bias1, bias2, NUM_GROUPS)
        if HAS_ROW_SCALE:
            factor = tl.load(row_scale + row_index, mask=row_index < end, other=0.0).to(tl.float32)[:, None]
        parts = _parts(total, BLOCK_M, BLOCK_N, NUM_PARTS)
        for part in tl.static_range(NUM_PARTS):
            column_index = column + part * (BLOCK_N // NUM_PARTS) + tl.arange(0, BLOCK_N // NUM_PARTS)
            in_columns = column_index < D
            inside = (row_index < end)[:, None] & in_columns[None, :]
            branch = parts[part] + tl.load(bias_of + column_index, mask=in_columns, other=0.0).to(tl.float32)[None, :]
            if HAS_LAYER_SCALE:
                branch *= tl.load(layer_scale + column_index, mask=in_columns, other=0.0).to(tl.float32)[None, :]
            if HAS_ROW_SCALE:
                branch *= factor
            residual = tl.load(x + row64 * x_stride + column_index[None, :], mask=inside, other=0.0).to(tl.float32)
            tl.store(out + row64 * D + column_index[None, :], (residual + branch).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def _mome_ffn_bwd_dgrad2_kernel(
    a, b0, b1, b2, shift0, shift1, shift2, slope0, slope1, slope2, z, row_scale, dz, h, row_sums, column_sums,
    start0, size0, start1, size1, start2, size2, rows, F, D,
    WRITE_H: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, NUM_GROUPS: tl.constexpr, SWIZZLE: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_PARTS: tl.constexpr,
):  # fmt: skip
    """Gradient of z, dz = row_scale * (a W2') * gelu'(z), then row_scale * h, and the sums.

    shift is W1 beta + b1, slope is W1 gamma, (F,) float32 each. row_sums is (2, column tiles, N): r1 and r2 of each
    tile; column_sums is (row tiles, F): of dz.
    """
    num_n = tl.cdiv(F, BLOCK_N)
    num_tiles = _num_row_tiles(size0, size1, size2, BLOCK_M) * num_n
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        group, row, end, column, row_tile = _locate(
            tile, start0, size0, start1, size1, start2, size2, F, BLOCK_M, BLOCK_N, SWIZZLE
        )
        total = _product(
            group, a, b0, b1, b2, row, column, rows, F, D,
            NUM_GROUPS, True, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # (BLOCK_M, BLOCK_N)  # fmt: skip
        row_index = row + tl.arange(0, BLOCK_M)
        in_rows = row_index < end
        shift_of = _pick(group, shift0, shift1, shift2, NUM_GROUPS)
        slope_of = _pick(group, slope0, slope1, slope2, NUM_GROUPS)
        if HAS_ROW_SCALE:
            factor = tl.load(row_scale + row_index, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        sum1 = tl.zeros((BLOCK_M,), tl.float32)
        sum2 = tl.zeros((BLOCK_M,), tl.float32)
        parts = _parts(total, BLOCK_M, BLOCK_N, NUM_PARTS)
        for part in tl.static_range(NUM_PARTS):
            column_index = column + part * (BLOCK_N // NUM_PARTS) + tl.arange(0, BLOCK_N // NUM_PARTS)
            in_columns = column_index < F
            at = row_index.to(tl.int64)[:, None] * F + column_index[None, :]
            inside = in_rows[:, None] & in_columns[None, :]
            d_activation = parts[part]
            value = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
            cdf = _cdf(value)
            activation = value * cdf
            if HAS_ROW_SCALE:
                d_activation *= factor
                activation *= factor
            if WRITE_H:
                tl.store(h + at, activation.to(h.dtype.element_ty), mask=inside)
            rounded = (d_activation * (cdf + value * _pdf(value))).to(dz.dtype.element_ty)
            tl.store(dz + at, rounded, mask=inside)
            d_value = tl.where(inside, rounded.to(tl.float32), 0.0)  # the numbers that the next product will read
            shift = tl.load(shift_of + column_index, mask=in_columns, other=0.0)
            slope = tl.load(slope_of + column_index, mask=in_columns, other=0.0)
            sum1 += tl.sum(d_value * (value - shift[None, :]), 1)
            sum2 += tl.sum(d_value * slope[None, :], 1)
            tl.store(column_sums + row_tile.to(tl.int64) * F + column_index, tl.sum(d_value, 0), mask=in_columns)
        sums_at = row_sums + (column // BLOCK_N).to(tl.int64) * rows + row_index
        tl.store(sums_at, sum1, mask=in_rows)
        tl.store(sums_at + num_n.to(tl.int64) * rows, sum2, mask=in_rows)


@triton.jit(do_not_specialize=_COUNTS)
def _mome_ffn_bwd_dgrad1_kernel(
    a, b0, b1, b2, gamma0, gamma1, gamma2, x, grad, row_scale, statistics, row_sums, dx, column_sums,
    start0, size0, start1, size1, start2, size2, rows, D, F, x_stride, num_sums, num_row_tiles,
    HAS_ROW_SCALE: tl.constexpr, NUM_GROUPS: tl.constexpr, SWIZZLE: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_PARTS: tl.constexpr,
):  # fmt: skip
    """Gradient of x, grad + rstd (gamma * (a W1) - r2 / D - x^ r1 / D), and column sums (3, row tiles, D).

    The column sums are those of d LN(x) x^, d LN(x) and row_scale * grad: d gamma, d beta, and what b2 and the layer
    scale need.
    """
    num_tiles = _num_row_tiles(size0, size1, size2, BLOCK_M) * tl.cdiv(D, BLOCK_N)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        group, row, end, column, row_tile = _locate(
            tile, start0, size0, start1, size1, start2, size2, D, BLOCK_M, BLOCK_N, SWIZZLE
        )
        total = _product(
            group, a, b0, b1, b2, row, column, rows, D, F,
            NUM_GROUPS, True, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # (BLOCK_M, BLOCK_N), d LN(x)  # fmt: skip
        row_index = row + tl.arange(0, BLOCK_M)
        in_rows = row_index < end
        row64 = row_index.to(tl.int64)
        sum1 = tl.zeros((BLOCK_M,), tl.float32)
        sum2 = tl.zeros((BLOCK_M,), tl.float32)
        for index in range(num_sums):
            sums_at = row_sums + tl.cast(index, tl.int64) * rows + row_index
            sum1 += tl.load(sums_at, mask=in_rows, other=0.0)
            sum2 += tl.load(sums_at + tl.cast(num_sums, tl.int64) * rows, mask=in_rows, other=0.0)
        mean = tl.load(statistics + row64, mask=in_rows, other=0.0)[:, None]
        rstd = tl.load(statistics + rows + row64, mask=in_rows, other=0.0)[:, None]
        remainder = tl.load(statistics + 2 * rows.to(tl.int64) + row64, mask=in_rows, other=0.0)[:, None]
        if HAS_ROW_SCALE:
            factor = tl.load(row_scale + row_index, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        gamma_of = _pick(group, gamma0, gamma1, gamma2, NUM_GROUPS)
        step = tl.cast(num_row_tiles, tl.int64) * D
        parts = _parts(total, BLOCK_M, BLOCK_N, NUM_PARTS)
        for part in tl.static_range(NUM_PARTS):
            column_index = column + part * (BLOCK_N // NUM_PARTS) + tl.arange(0, BLOCK_N // NUM_PARTS)
            in_columns = column_index < D
            inside = in_rows[:, None] & in_columns[None, :]
            values = tl.load(x + row64[:, None] * x_stride + column_index[None, :], mask=inside, other=0.0)
            unit = tl.where(inside, (values.to(tl.float32) - mean - remainder) * rstd, 0.0)  # x^
            d_normed = tl.where(inside, parts[part], 0.0)
            upstream = tl.load(grad + row64[:, None] * D + column_index[None, :], mask=inside, other=0.0)
            upstream = upstream.to(tl.float32)
            gamma = tl.load(gamma_of + column_index, mask=in_columns, other=0.0).to(tl.float32)
            through = gamma[None, :] * d_normed - (sum2 / D)[:, None] - unit * (sum1 / D)[:, None]
            result = (upstream + rstd * through).to(dx.dtype.element_ty)
            tl.store(dx + row64[:, None] * D + column_index[None, :], result, mask=inside)
            if HAS_ROW_SCALE:
                upstream *= factor
            sums_at = column_sums + row_tile.to(tl.int64) * D + column_index
            tl.store(sums_at, tl.sum(d_normed * unit, 0), mask=in_columns)
            tl.store(sums_at + step, tl.sum(d_normed, 0), mask=in_columns)
            tl.store(sums_at + 2 * step, tl.sum(upstream, 0), mask=in_columns)


class Tiles(NamedTuple):
    """How a product is cut up, and how many programs run on a multiprocessor."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    NUM_PARTS: int
    num_warps: int
    num_stages: int
    residents: int


def tiles_for(kernel: str, capability: int, element_size: int, rows: int, columns: int) -> Tiles:
    """The tiles of a kernel ("fc1", "fc2", "dgrad2", "dgrad1") for a GPU (80, 89, ...; 0: the interpreter) and a size.

    Chosen on paper, by registers that do not spill and bytes from the L2 cache; not measured yet. Few rows take smaller
    tiles, or most multiprocessors would have none. BLOCK_M depends on the rows alone.
    """
    backward = kernel.startswith("dgrad")
    if capability == 0:
        return Tiles(16, 32, 16, 2, 4, 1, 3)
    block_k = 128 // element_size
    roomy = capability in (80, 90, 100, 103)  # at least 163 KiB of shared memory a block; elsewhere 99
    if rows <= 512:
        if kernel == "fc2":  # few columns, a long sum: many small tiles, two steps of the sum at a time
            return Tiles(64, 32, 2 * block_k, 1, 4, 4 if roomy else 3, 2)
        return Tiles(64, 64, block_k, 1, 4, 4, 2)
    if capability < 90:
        if kernel == "dgrad2":
            return Tiles(128, 128, block_k // 2, 4, 8, 4, 1)
        return Tiles(128, 128, block_k, 4 if backward else 2, 8, 3, 1)
    if not roomy:
        return Tiles(128, 128, block_k // 2, 4, 8, 3, 1)
    if backward or columns % 256 or element_size > 2:
        return Tiles(128, 128, block_k, 4, 8, 3, 1)
    return Tiles(128, 256, block_k, 4, 8, 3, 1)


class _Launch(NamedTuple):
    """What all launches of a call share: groups without rows are gone, the largest comes first."""

    groups: list[int]  # of the caller's
    starts: list[int]
    sizes: list[int]
    capability: int
    multiprocessors: int
    element_size: int
    use_tma: bool
    precision: str

    @property
    def bounds(self) -> list[int]:
        """start0, size0, ... as the kernels take them."""
        pairs = list(zip(self.starts, self.sizes, strict=True)) + [(0, 0)] * (MAX_GROUPS - len(self.groups))
        return [number for pair in pairs for number in pair]

    def tiles(self, kernel: str, columns: int) -> Tiles:
        return tiles_for(kernel, self.capability, self.element_size, sum(self.sizes), columns)

    @property
    def row_tiles(self) -> list[int]:
        return [triton.cdiv(size, self.tiles("fc1", 1).BLOCK_M) for size in self.sizes]

    def of_groups(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A tensor for each of the three places."""
        picked = [tensors[group] for group in self.groups]
        return picked + [picked[0]] * (MAX_GROUPS - len(picked))

    def run(
        self, kernel: Any, name: str, columns: int, a: Tensor, weights: Sequence[Tensor], *rest: Any, **options: Any
    ) -> None:
        """Launch a product of `a` with the groups' weights, which gives `columns` columns."""
        tiles = self.tiles(name, columns)
        num_tiles = sum(self.row_tiles) * triton.cdiv(columns, tiles.BLOCK_N)
        sides: list[Any] = [a, *self.of_groups(weights)]
        if self.use_tma:
            b_block = [tiles.BLOCK_N, tiles.BLOCK_K]
            b_block = b_block[::-1] if name.startswith("dgrad") else b_block
            blocks = [[tiles.BLOCK_M, tiles.BLOCK_K]] + [b_block] * MAX_GROUPS
            sides = [TensorDescriptor.from_tensor(side, block) for side, block in zip(sides, blocks, strict=True)]
        settings = tiles._asdict()
        programs = settings.pop("residents") * self.multiprocessors
        kernel[(min(num_tiles, programs),)](
            *sides,
            *rest,
            NUM_GROUPS=len(self.groups),
            SWIZZLE=SWIZZLE,
            USE_TMA=self.use_tma,
            PRECISION=self.precision,
            **settings,
            **options,
        )


def _launches(x: Tensor, group_sizes: Sequence[int], operands: Sequence[Tensor], use_tma: bool | None) -> list[_Launch]:
    """One launch for up to three groups with rows; `use_tma` None means where the GPU has it."""
    element_size, dtype = operands[0].element_size(), operands[0].dtype
    starts = [sum(group_sizes[:index]) for index in range(len(group_sizes))]
    present = sorted((g for g, size in enumerate(group_sizes) if size), key=lambda g: -group_sizes[g])
    capability, multiprocessors = 0, 1
    if x.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(x.device)
        capability = 10 * major + minor
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    aligned = all(t.shape[-1] * element_size % 16 == 0 and t.data_ptr() % 16 == 0 for t in operands)
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    launches = []
    for first in range(0, len(present), MAX_GROUPS):
        groups = present[first : first + MAX_GROUPS]
        launches.append(
            _Launch(
                groups,
                [starts[group] for group in groups],
                [group_sizes[group] for group in groups],
                capability,
                multiprocessors,
                element_size,
                aligned and (capability >= 90 if use_tma is None else use_tma),
                "interpreted" if capability == 0 else "tf32" if tf32 else "ieee",
            )
        )
    return launches


def _norm(
    x: Tensor, experts: Sequence[Any], statistics: Tensor, launch: _Launch, normed: Tensor, **kwargs: Any
) -> None:
    block_n = triton.next_power_of_2(x.shape[1])
    block_m = 4 if x.device.type == "cuda" else 16
    grid = (sum(triton.cdiv(size, block_m) for size in launch.sizes),)
    parameters = [
        *launch.of_groups([e.norm_weight for e in experts]),
        *launch.of_groups([e.norm_bias for e in experts]),
    ]
    _mome_ffn_norm_kernel[grid](
        x, statistics, normed, *parameters, *launch.bounds, len(x), x.shape[1], x.stride(0),
        NUM_GROUPS=len(launch.groups), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4, **kwargs,
    )  # fmt: skip


def forward(
    x: Tensor,
    group_sizes: Sequence[int],
    experts: Sequence[Any],
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    eps: float,
    save: bool,
    save_activation: bool,
    use_tma: bool | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The residual branch; arguments and result as in `ops/_ffn_torch.py`.

    Saved are the statistics (3, N), z (N, F), and if asked for h (N, F). `use_tma` None means where the GPU has it.
    """
    x, experts = _rows_contiguous(x), [type(expert)(*(t.contiguous() for t in expert)) for expert in experts]
    (rows, width), hidden, dtype = x.shape, len(experts[0].fc1_bias), experts[0].fc1_weight.dtype
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    statistics = torch.empty((3, rows) if save else (0,), dtype=torch.float32, device=x.device)
    normed = torch.empty((rows, width), dtype=dtype, device=x.device)
    h = torch.empty((rows, hidden), dtype=dtype, device=x.device)
    z = torch.empty_like(h) if save else h
    operands = [normed, h, *(weight for e in experts for weight in (e.fc1_weight, e.fc2_weight))]
    for launch in _launches(x, group_sizes, operands, use_tma):
        with _device_of(x):
            _norm(x, experts, statistics, launch, normed, eps=eps, HAS_STATISTICS=False, SAVE=save)
            launch.run(
                *(_mome_ffn_fwd_fc1_kernel, "fc1", hidden, normed, [e.fc1_weight for e in experts]),
                *launch.of_groups([e.fc1_bias for e in experts]),
                *(z, h, *launch.bounds, rows, hidden, width),
                SAVE=save,
            )
            launch.run(
                *(_mome_ffn_fwd_fc2_kernel, "fc2", width, h, [e.fc2_weight for e in experts]),
                *launch.of_groups([e.fc2_bias for e in experts]),
                *(x, _or(layer_scale, x), _or(row_scale, x), out, *launch.bounds, rows, width, hidden, x.stride(0)),
                HAS_LAYER_SCALE=layer_scale is not None,
                HAS_ROW_SCALE=row_scale is not None,
            )
    return out, [statistics, z, *([h] if save_activation else [])] if save else []


def backward(
    grad: Tensor,
    x: Tensor,
    group_sizes: Sequence[int],
    experts: Sequence[Any],
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    saved: Sequence[Tensor],
    eps: float,
    trained: Sequence[bool],
    use_tma: bool | None = None,
) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
    """Gradients of `forward`; arguments and results as in `ops/_ffn_torch.py`."""
    x, experts = _rows_contiguous(x), [type(expert)(*(t.contiguous() for t in expert)) for expert in experts]
    (rows, width), hidden, dtype = x.shape, len(experts[0].fc1_bias), experts[0].fc1_weight.dtype
    statistics, z, *h = saved
    grad = grad.contiguous()
    upstream = grad.to(dtype)
    d_x = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    d_z = torch.empty((rows, hidden), dtype=dtype, device=x.device)
    write_h = row_scale is not None or not h
    scaled_h = torch.empty_like(d_z) if write_h else h[0]
    normed = torch.empty((rows, width), dtype=dtype, device=x.device)
    d_layer_scale = torch.zeros(0 if layer_scale is None else width, dtype=torch.float32, device=x.device)
    d_experts: list[tuple[Tensor, ...]] = [
        tuple(torch.zeros_like(t) if wanted else t.new_empty(0) for t in expert) if not size or not wanted else ()
        for expert, size, wanted in zip(experts, group_sizes, trained, strict=True)
    ]
    # Weight-sized: W2 with the layer scale, and W1 against the norm's two parameters.
    fc2 = [e.fc2_weight if layer_scale is None else e.fc2_weight * layer_scale.to(dtype)[:, None] for e in experts]
    shifts = [torch.mv(e.fc1_weight.float(), e.norm_bias.float()) + e.fc1_bias.float() for e in experts]
    slopes = [torch.mv(e.fc1_weight.float(), e.norm_weight.float()) for e in experts]
    operands = [upstream, d_z, *fc2, *(e.fc1_weight for e in experts)]
    for launch in _launches(x, group_sizes, operands, use_tma):
        num_sums, num_row_tiles = triton.cdiv(hidden, launch.tiles("dgrad2", hidden).BLOCK_N), sum(launch.row_tiles)
        row_sums = torch.empty((2, num_sums, rows), dtype=torch.float32, device=x.device)
        d_bias_sums = torch.empty((num_row_tiles, hidden), dtype=torch.float32, device=x.device)
        column_sums = torch.empty((3, num_row_tiles, width), dtype=torch.float32, device=x.device)
        with _device_of(x):
            launch.run(
                *(_mome_ffn_bwd_dgrad2_kernel, "dgrad2", hidden, upstream, fc2),
                *launch.of_groups(shifts),
                *launch.of_groups(slopes),
                *(z, _or(row_scale, x), d_z, scaled_h, row_sums, d_bias_sums),
                *(*launch.bounds, rows, hidden, width),
                WRITE_H=write_h,
                HAS_ROW_SCALE=row_scale is not None,
            )
            launch.run(
                *(_mome_ffn_bwd_dgrad1_kernel, "dgrad1", width, d_z, [e.fc1_weight for e in experts]),
                *launch.of_groups([e.norm_weight for e in experts]),
                *(x, grad, _or(row_scale, x), statistics, row_sums, d_x, column_sums),
                *(*launch.bounds, rows, width, hidden, x.stride(0), num_sums, num_row_tiles),
                HAS_ROW_SCALE=row_scale is not None,
            )
            if any(trained[group] for group in launch.groups):
                _norm(x, experts, statistics, launch, normed, eps=eps, HAS_STATISTICS=True, SAVE=False)
        split_bias_sums = d_bias_sums.split(launch.row_tiles)
        split_sums = column_sums.split(launch.row_tiles, dim=1)
        for index, group in enumerate(launch.groups):
            if layer_scale is None and not trained[group]:
                continue
            span = slice(launch.starts[index], launch.starts[index] + launch.sizes[index])
            expert = experts[group]
            d_gamma, d_beta, total = (part.sum(0) for part in split_sums[index])  # (D,) each
            q = torch.mm(upstream[span].t(), scaled_h[span])  # (D, F)
            if layer_scale is not None:
                d_layer_scale += (q * expert.fc2_weight).sum(1, dtype=torch.float32) + expert.fc2_bias * total
                q *= layer_scale.to(dtype)[:, None]
                total = total * layer_scale
            if trained[group]:
                d_fc1 = torch.mm(d_z[span].t(), normed[span]), split_bias_sums[index].sum(0)
                gradients = (d_gamma, d_beta, *d_fc1, q, total)
                d_experts[group] = tuple(d.to(weight.dtype) for d, weight in zip(gradients, expert, strict=True))
    return d_x, d_layer_scale if layer_scale is None else d_layer_scale.to(layer_scale.dtype), d_experts


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    """A pointer for an argument that the kernel will not read."""
    return placeholder if tensor is None else tensor.contiguous()


def _device_of(x: Tensor) -> Any:
    return torch.cuda.device_of(x)
