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
_COUNTS = ("start0", "size0", "start1", "size1", "start2", "size2", "num_rows", "num_row_tiles")
SWIZZLE = 8  # row tiles that neighbouring programs share the columns of, for the L2 cache


@triton.jit
def _cdf(z):
    """Standard normal CDF."""
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)


@triton.jit
def _pdf(z):
    """Standard normal density."""
    return 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def _num_row_tiles(size0, size1, size2, BLOCK_M: tl.constexpr):
    """Number of row tiles of all groups; a tile never spans two groups."""
    return tl.cdiv(size0, BLOCK_M) + tl.cdiv(size1, BLOCK_M) + tl.cdiv(size2, BLOCK_M)


@triton.jit
def _locate(
    tile, start0, size0, start1, size1, start2, size2, num_columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWIZZLE: tl.constexpr,
):  # fmt: skip
    """Map a tile's number to (group, first row, end of the group's rows, first column, number of the row tile)."""
    num_n = tl.cdiv(num_columns, BLOCK_N)
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
def _select(group, ptr0, ptr1, ptr2, NUM_GROUPS: tl.constexpr):
    """Select the pointer of a group, 0 to NUM_GROUPS - 1."""
    ptr = ptr0
    if NUM_GROUPS > 1:
        if group == 1:
            ptr = ptr1
    if NUM_GROUPS > 2:
        if group == 2:
            ptr = ptr2
    return ptr


@triton.jit
def _split_in_two(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Split a (BLOCK_M, BLOCK_N) tile into its left and right half, (BLOCK_M, BLOCK_N / 2) each."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _split_columns(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_PARTS: tl.constexpr):
    """Split a tile into 1, 2 or 4 parts of adjacent columns, so that an epilogue holds fewer numbers at a time."""
    if NUM_PARTS == 1:
        return (tile,)
    elif NUM_PARTS == 2:  # noqa: RET505 - Triton leaves out the other branches, but not what follows a return
        return _split_in_two(tile, BLOCK_M, BLOCK_N)
    else:
        left, right = _split_in_two(tile, BLOCK_M, BLOCK_N)
        first, second = _split_in_two(left, BLOCK_M, BLOCK_N // 2)
        third, fourth = _split_in_two(right, BLOCK_M, BLOCK_N // 2)
        return (first, second, third, fourth)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a b; a (M, K), b (K, N), acc (M, N) float32."""
    if PRECISION == "interpreted":  # the interpreter would multiply the bits of bfloat16 numbers as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _accumulate(
    acc,  # (BLOCK_M, BLOCK_N) float32
    a_ptr,  # (num_rows, K), or its descriptor
    b_ptr,  # (num_columns, K); (K, num_columns) if B_IS_ROWS; or its descriptor
    row,
    column,
    num_rows,
    num_columns,
    K,
    B_IS_ROWS: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add to `acc` the tile of a b^T, or of a b if B_IS_ROWS, that begins at (row, column)."""
    if USE_TMA:
        for k in range(0, K, BLOCK_K):
            a = a_ptr.load([row, k])  # (BLOCK_M, BLOCK_K)
            if B_IS_ROWS:
                b = b_ptr.load([k, column])  # (BLOCK_K, BLOCK_N)
            else:
                b = b_ptr.load([column, k]).T  # (BLOCK_K, BLOCK_N)
            acc = _dot(a, b, acc, PRECISION)
    else:
        row_index = row + tl.arange(0, BLOCK_M)
        column_index = column + tl.arange(0, BLOCK_N)
        k_index = tl.arange(0, BLOCK_K)
        # Beyond the end the last row is read, of b as well, and the result is never written.
        row_index = tl.where(row_index < num_rows, row_index, num_rows - 1)
        a_ptrs = a_ptr + row_index.to(tl.int64)[:, None] * K + k_index[None, :]  # (BLOCK_M, BLOCK_K)
        if B_IS_ROWS:
            b_ptrs = b_ptr + k_index.to(tl.int64)[:, None] * num_columns + column_index[None, :]  # (BLOCK_K, BLOCK_N)
        else:
            column_index = tl.where(column_index < num_columns, column_index, num_columns - 1)
            b_ptrs = b_ptr + column_index.to(tl.int64)[None, :] * K + k_index[:, None]  # (BLOCK_K, BLOCK_N)
        for k in range(0, K, BLOCK_K):
            in_k = k_index < K - k
            a = tl.load(a_ptrs, mask=in_k[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
            b_mask = in_k[:, None]
            if B_IS_ROWS:
                b_mask = b_mask & (column_index < num_columns)[None, :]
            b = tl.load(b_ptrs, mask=b_mask, other=0.0)  # (BLOCK_K, BLOCK_N)
            acc = _dot(a, b, acc, PRECISION)
            a_ptrs += BLOCK_K
            if B_IS_ROWS:
                b_ptrs += BLOCK_K * num_columns
            else:
                b_ptrs += BLOCK_K
    return acc


@triton.jit
def _grouped_product(
    group,
    a_ptr,  # (num_rows, K), or its descriptor
    b0_ptr,  # (num_columns, K); (K, num_columns) if B_IS_ROWS; or its descriptor
    b1_ptr,  # like b0
    b2_ptr,  # like b0
    row,
    column,
    num_rows,
    num_columns,
    K,
    NUM_GROUPS: tl.constexpr,
    B_IS_ROWS: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tile of the product of a with its group's b, (BLOCK_M, BLOCK_N) float32.

    A descriptor cannot be selected at run time, so each has a loop of its own. All loops add to one accumulator: with
    one each, ptxas runs out of registers and serialises the products.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if USE_TMA:
        if group == 0:
            acc = _accumulate(
                acc, a_ptr, b0_ptr, row, column, num_rows, num_columns, K,
                B_IS_ROWS, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if NUM_GROUPS > 1:
            if group == 1:
                acc = _accumulate(
                    acc, a_ptr, b1_ptr, row, column, num_rows, num_columns, K,
                    B_IS_ROWS, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
        if NUM_GROUPS > 2:
            if group == 2:
                acc = _accumulate(
                    acc, a_ptr, b2_ptr, row, column, num_rows, num_columns, K,
                    B_IS_ROWS, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
    else:
        b_ptr = _select(group, b0_ptr, b1_ptr, b2_ptr, NUM_GROUPS)
        acc = _accumulate(
            acc, a_ptr, b_ptr, row, column, num_rows, num_columns, K,
            B_IS_ROWS, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=_COUNTS)
def _mome_ffn_norm_kernel(
    x_ptr,  # (N, D), rows x_stride apart
    statistics_ptr,  # (3, N) float32
    normed_ptr,  # (N, D)
    norm_weight0_ptr,  # (D,)
    norm_weight1_ptr,  # (D,)
    norm_weight2_ptr,  # (D,)
    norm_bias0_ptr,  # (D,)
    norm_bias1_ptr,  # (D,)
    norm_bias2_ptr,  # (D,)
    start0,  # first row of group 0
    size0,  # number of its rows
    start1,
    size1,
    start2,
    size2,
    num_rows,  # N
    D,
    x_stride,
    eps,
    HAS_STATISTICS: tl.constexpr,
    SAVE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """LN(x), BLOCK_M rows a program, in one read; the statistics are read with HAS_STATISTICS, written with SAVE.

    They are the mean, the reciprocal standard deviation, and what rounding took from the mean, without which rows whose
    mean is many standard deviations lose digits.
    """
    group, row, end, _, _ = _locate(
        tl.program_id(0), start0, size0, start1, size1, start2, size2, 1, BLOCK_M, BLOCK_N, 1
    )
    row_index = row + tl.arange(0, BLOCK_M)
    column_index = tl.arange(0, BLOCK_N)
    mask = (row_index < end)[:, None] & (column_index < D)[None, :]
    row64 = row_index.to(tl.int64)
    x = tl.load(x_ptr + row64[:, None] * x_stride + column_index[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)  # (BLOCK_M, BLOCK_N)
    in_columns = (column_index < D)[None, :]
    if HAS_STATISTICS:
        mean = tl.load(statistics_ptr + row64, mask=row_index < end, other=0.0)
        rstd = tl.load(statistics_ptr + num_rows + row64, mask=row_index < end, other=0.0)
        remainder = tl.load(statistics_ptr + 2 * num_rows.to(tl.int64) + row64, mask=row_index < end, other=0.0)
        centred = x - mean[:, None] - remainder[:, None]
    else:
        mean = tl.sum(x, 1) / D
        centred = tl.where(in_columns, x - mean[:, None], 0.0)
        remainder = tl.sum(centred, 1) / D
        centred = tl.where(in_columns, centred - remainder[:, None], 0.0)
        rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
        if SAVE:
            tl.store(statistics_ptr + row64, mean, mask=row_index < end)
            tl.store(statistics_ptr + num_rows + row64, rstd, mask=row_index < end)
            tl.store(statistics_ptr + 2 * num_rows.to(tl.int64) + row64, remainder, mask=row_index < end)
    weight_ptr = _select(group, norm_weight0_ptr, norm_weight1_ptr, norm_weight2_ptr, NUM_GROUPS)
    weight = tl.load(weight_ptr + column_index, mask=column_index < D, other=0.0)  # (BLOCK_N,)
    bias_ptr = _select(group, norm_bias0_ptr, norm_bias1_ptr, norm_bias2_ptr, NUM_GROUPS)
    bias = tl.load(bias_ptr + column_index, mask=column_index < D, other=0.0)  # (BLOCK_N,)
    normed = centred * rstd[:, None] * weight.to(tl.float32)[None, :] + bias.to(tl.float32)[None, :]
    target = normed_ptr + row64[:, None] * D + column_index[None, :]
    tl.store(target, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
def _mome_ffn_fwd_fc1_kernel(
    a_ptr,  # (N, D): LN(x); operands a and b are tensor descriptors where USE_TMA
    b0_ptr,  # (F, D): W1
    b1_ptr,  # (F, D)
    b2_ptr,  # (F, D)
    fc1_bias0_ptr,  # (F,)
    fc1_bias1_ptr,  # (F,)
    fc1_bias2_ptr,  # (F,)
    z_ptr,  # (N, F), written if SAVE
    h_ptr,  # (N, F)
    start0,  # first row of group 0
    size0,  # number of its rows
    start1,
    size1,
    start2,
    size2,
    num_rows,  # N
    F,
    D,
    SAVE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    SWIZZLE: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_PARTS: tl.constexpr,
):
    """Write z = a W1^T + b1 and h = gelu(z)."""
    num_tiles = _num_row_tiles(size0, size1, size2, BLOCK_M) * tl.cdiv(F, BLOCK_N)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        group, row, end, column, _ = _locate(
            tile, start0, size0, start1, size1, start2, size2, F, BLOCK_M, BLOCK_N, SWIZZLE
        )
        acc = _grouped_product(
            group, a_ptr, b0_ptr, b1_ptr, b2_ptr, row, column, num_rows, F, D,
            NUM_GROUPS, False, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # (BLOCK_M, BLOCK_N)  # fmt: skip
        row_index = row + tl.arange(0, BLOCK_M)
        bias_ptr = _select(group, fc1_bias0_ptr, fc1_bias1_ptr, fc1_bias2_ptr, NUM_GROUPS)
        parts = _split_columns(acc, BLOCK_M, BLOCK_N, NUM_PARTS)
        for part in tl.static_range(NUM_PARTS):
            column_index = column + part * (BLOCK_N // NUM_PARTS) + tl.arange(0, BLOCK_N // NUM_PARTS)
            offset = row_index.to(tl.int64)[:, None] * F + column_index[None, :]  # (BLOCK_M, BLOCK_N / NUM_PARTS)
            mask = (row_index < end)[:, None] & (column_index < F)[None, :]
            bias = tl.load(bias_ptr + column_index, mask=column_index < F, other=0.0).to(tl.float32)
            rounded = (parts[part] + bias[None, :]).to(h_ptr.dtype.element_ty)  # as the backward pass will read it
            if SAVE:
                tl.store(z_ptr + offset, rounded, mask=mask)
            z = rounded.to(tl.float32)
            tl.store(h_ptr + offset, (z * _cdf(z)).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
def _mome_ffn_fwd_fc2_kernel(
    a_ptr,  # (N, F): h; operands a and b are tensor descriptors where USE_TMA
    b0_ptr,  # (D, F): W2
    b1_ptr,  # (D, F)
    b2_ptr,  # (D, F)
    fc2_bias0_ptr,  # (D,)
    fc2_bias1_ptr,  # (D,)
    fc2_bias2_ptr,  # (D,)
    x_ptr,  # (N, D), rows x_stride apart
    layer_scale_ptr,  # (D,), read if HAS_LAYER_SCALE
    row_scale_ptr,  # (N,), read if HAS_ROW_SCALE
    out_ptr,  # (N, D)
    start0,  # first row of group 0
    size0,  # number of its rows
    start1,
    size1,
    start2,
    size2,
    num_rows,  # N
    D,
    F,
    x_stride,
    HAS_LAYER_SCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    SWIZZLE: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_PARTS: tl.constexpr,
):
    """Write out = x + row_scale * layer_scale * (a W2^T + b2)."""
    num_tiles = _num_row_tiles(size0, size1, size2, BLOCK_M) * tl.cdiv(D, BLOCK_N)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        group, row, end, column, _ = _locate(
            tile, start0, size0, start1, size1, start2, size2, D, BLOCK_M, BLOCK_N, SWIZZLE
        )
        acc = _grouped_product(
            group, a_ptr, b0_ptr, b1_ptr, b2_ptr, row, column, num_rows, D, F,
            NUM_GROUPS, False, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # (BLOCK_M, BLOCK_N)  # fmt: skip
        row_index = row + tl.arange(0, BLOCK_M)
        row64 = row_index.to(tl.int64)[:, None]
        bias_ptr = _select(group, fc2_bias0_ptr, fc2_bias1_ptr, fc2_bias2_ptr, NUM_GROUPS)
        if HAS_ROW_SCALE:
            row_scale = tl.load(row_scale_ptr + row_index, mask=row_index < end, other=0.0).to(tl.float32)[:, None]
        parts = _split_columns(acc, BLOCK_M, BLOCK_N, NUM_PARTS)
        for part in tl.static_range(NUM_PARTS):
            column_index = column + part * (BLOCK_N // NUM_PARTS) + tl.arange(0, BLOCK_N // NUM_PARTS)
            in_columns = column_index < D
            mask = (row_index < end)[:, None] & in_columns[None, :]
            branch = parts[part] + tl.load(bias_ptr + column_index, mask=in_columns, other=0.0).to(tl.float32)[None, :]
            if HAS_LAYER_SCALE:
                layer_scale = tl.load(layer_scale_ptr + column_index, mask=in_columns, other=0.0)
                branch *= layer_scale.to(tl.float32)[None, :]
            if HAS_ROW_SCALE:
                branch *= row_scale
            x = tl.load(x_ptr + row64 * x_stride + column_index[None, :], mask=mask, other=0.0).to(tl.float32)
            target = out_ptr + row64 * D + column_index[None, :]  # (BLOCK_M, BLOCK_N / NUM_PARTS)
            tl.store(target, (x + branch).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
def _mome_ffn_bwd_dgrad2_kernel(
    a_ptr,  # (N, D): the gradient of `out`; operands a and b are tensor descriptors where USE_TMA
    b0_ptr,  # (D, F): layer_scale * W2
    b1_ptr,  # (D, F)
    b2_ptr,  # (D, F)
    shift0_ptr,  # (F,) float32: W1 beta + b1
    shift1_ptr,  # (F,) float32
    shift2_ptr,  # (F,) float32
    slope0_ptr,  # (F,) float32: W1 gamma
    slope1_ptr,  # (F,) float32
    slope2_ptr,  # (F,) float32
    z_ptr,  # (N, F)
    row_scale_ptr,  # (N,), read if HAS_ROW_SCALE
    d_z_ptr,  # (N, F)
    h_ptr,  # (N, F): row_scale * h, written if WRITE_H
    row_sums_ptr,  # (2, column tiles, N) float32: r1 and r2 over each tile's columns
    column_sums_ptr,  # (row tiles, F) float32: sums of dz over each tile's rows
    start0,  # first row of group 0
    size0,  # number of its rows
    start1,
    size1,
    start2,
    size2,
    num_rows,  # N
    F,
    D,
    WRITE_H: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    SWIZZLE: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_PARTS: tl.constexpr,
):
    """Write dz = row_scale * (a W2') * gelu'(z), row_scale * h, and partial sums over rows and columns."""
    num_n = tl.cdiv(F, BLOCK_N)
    num_tiles = _num_row_tiles(size0, size1, size2, BLOCK_M) * num_n
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        group, row, end, column, row_tile = _locate(
            tile, start0, size0, start1, size1, start2, size2, F, BLOCK_M, BLOCK_N, SWIZZLE
        )
        acc = _grouped_product(
            group, a_ptr, b0_ptr, b1_ptr, b2_ptr, row, column, num_rows, F, D,
            NUM_GROUPS, True, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # (BLOCK_M, BLOCK_N)  # fmt: skip
        row_index = row + tl.arange(0, BLOCK_M)
        in_rows = row_index < end
        shift_ptr = _select(group, shift0_ptr, shift1_ptr, shift2_ptr, NUM_GROUPS)
        slope_ptr = _select(group, slope0_ptr, slope1_ptr, slope2_ptr, NUM_GROUPS)
        if HAS_ROW_SCALE:
            row_scale = tl.load(row_scale_ptr + row_index, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        r1 = tl.zeros((BLOCK_M,), tl.float32)
        r2 = tl.zeros((BLOCK_M,), tl.float32)
        parts = _split_columns(acc, BLOCK_M, BLOCK_N, NUM_PARTS)
        for part in tl.static_range(NUM_PARTS):
            column_index = column + part * (BLOCK_N // NUM_PARTS) + tl.arange(0, BLOCK_N // NUM_PARTS)
            in_columns = column_index < F
            offset = row_index.to(tl.int64)[:, None] * F + column_index[None, :]  # (BLOCK_M, BLOCK_N / NUM_PARTS)
            mask = in_rows[:, None] & in_columns[None, :]
            d_h = parts[part]
            z = tl.load(z_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            cdf = _cdf(z)
            h = z * cdf
            if HAS_ROW_SCALE:
                d_h *= row_scale
                h *= row_scale
            if WRITE_H:
                tl.store(h_ptr + offset, h.to(h_ptr.dtype.element_ty), mask=mask)
            rounded = (d_h * (cdf + z * _pdf(z))).to(d_z_ptr.dtype.element_ty)
            tl.store(d_z_ptr + offset, rounded, mask=mask)
            d_z = tl.where(mask, rounded.to(tl.float32), 0.0)  # the numbers that the next product will read
            shift = tl.load(shift_ptr + column_index, mask=in_columns, other=0.0)
            slope = tl.load(slope_ptr + column_index, mask=in_columns, other=0.0)
            r1 += tl.sum(d_z * (z - shift[None, :]), 1)
            r2 += tl.sum(d_z * slope[None, :], 1)
            tl.store(column_sums_ptr + row_tile.to(tl.int64) * F + column_index, tl.sum(d_z, 0), mask=in_columns)
        r1_ptrs = row_sums_ptr + (column // BLOCK_N).to(tl.int64) * num_rows + row_index  # (BLOCK_M,)
        tl.store(r1_ptrs, r1, mask=in_rows)
        tl.store(r1_ptrs + num_n.to(tl.int64) * num_rows, r2, mask=in_rows)


@triton.jit(do_not_specialize=_COUNTS)
def _mome_ffn_bwd_dgrad1_kernel(
    a_ptr,  # (N, F): dz; operands a and b are tensor descriptors where USE_TMA
    b0_ptr,  # (F, D): W1
    b1_ptr,  # (F, D)
    b2_ptr,  # (F, D)
    norm_weight0_ptr,  # (D,): gamma
    norm_weight1_ptr,  # (D,)
    norm_weight2_ptr,  # (D,)
    x_ptr,  # (N, D), rows x_stride apart
    grad_ptr,  # (N, D): the gradient of `out`
    row_scale_ptr,  # (N,), read if HAS_ROW_SCALE
    statistics_ptr,  # (3, N) float32, as the norm kernel wrote them
    row_sums_ptr,  # (2, num_sums, N) float32, as dgrad2 wrote them
    d_x_ptr,  # (N, D)
    column_sums_ptr,  # (3, num_row_tiles, D) float32: sums of d LN(x) x^, d LN(x), row_scale * grad over a tile's rows
    start0,  # first row of group 0
    size0,  # number of its rows
    start1,
    size1,
    start2,
    size2,
    num_rows,  # N
    D,
    F,
    x_stride,
    num_sums,
    num_row_tiles,
    HAS_ROW_SCALE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    SWIZZLE: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_PARTS: tl.constexpr,
):
    """Write dx = grad + rstd (gamma * (a W1) - r2 / D - x^ r1 / D), and the column sums.

    The column sums give d gamma, d beta, and what d b2 and the gradient of the layer scale need.
    """
    num_tiles = _num_row_tiles(size0, size1, size2, BLOCK_M) * tl.cdiv(D, BLOCK_N)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        group, row, end, column, row_tile = _locate(
            tile, start0, size0, start1, size1, start2, size2, D, BLOCK_M, BLOCK_N, SWIZZLE
        )
        acc = _grouped_product(
            group, a_ptr, b0_ptr, b1_ptr, b2_ptr, row, column, num_rows, D, F,
            NUM_GROUPS, True, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # (BLOCK_M, BLOCK_N), d LN(x)  # fmt: skip
        row_index = row + tl.arange(0, BLOCK_M)
        in_rows = row_index < end
        row64 = row_index.to(tl.int64)
        r1 = tl.zeros((BLOCK_M,), tl.float32)
        r2 = tl.zeros((BLOCK_M,), tl.float32)
        for index in range(num_sums):
            r1_ptrs = row_sums_ptr + tl.cast(index, tl.int64) * num_rows + row_index  # (BLOCK_M,)
            r1 += tl.load(r1_ptrs, mask=in_rows, other=0.0)
            r2 += tl.load(r1_ptrs + tl.cast(num_sums, tl.int64) * num_rows, mask=in_rows, other=0.0)
        mean = tl.load(statistics_ptr + row64, mask=in_rows, other=0.0)[:, None]
        rstd = tl.load(statistics_ptr + num_rows + row64, mask=in_rows, other=0.0)[:, None]
        remainder = tl.load(statistics_ptr + 2 * num_rows.to(tl.int64) + row64, mask=in_rows, other=0.0)[:, None]
        if HAS_ROW_SCALE:
            row_scale = tl.load(row_scale_ptr + row_index, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        gamma_ptr = _select(group, norm_weight0_ptr, norm_weight1_ptr, norm_weight2_ptr, NUM_GROUPS)
        step = tl.cast(num_row_tiles, tl.int64) * D  # between the three column sums
        parts = _split_columns(acc, BLOCK_M, BLOCK_N, NUM_PARTS)
        for part in tl.static_range(NUM_PARTS):
            column_index = column + part * (BLOCK_N // NUM_PARTS) + tl.arange(0, BLOCK_N // NUM_PARTS)
            in_columns = column_index < D
            mask = in_rows[:, None] & in_columns[None, :]  # (BLOCK_M, BLOCK_N / NUM_PARTS)
            x = tl.load(x_ptr + row64[:, None] * x_stride + column_index[None, :], mask=mask, other=0.0)
            x_hat = tl.where(mask, (x.to(tl.float32) - mean - remainder) * rstd, 0.0)
            d_normed = tl.where(mask, parts[part], 0.0)
            grad = tl.load(grad_ptr + row64[:, None] * D + column_index[None, :], mask=mask, other=0.0)
            grad = grad.to(tl.float32)
            gamma = tl.load(gamma_ptr + column_index, mask=in_columns, other=0.0).to(tl.float32)
            d_x = gamma[None, :] * d_normed - (r2 / D)[:, None] - x_hat * (r1 / D)[:, None]
            d_x = (grad + rstd * d_x).to(d_x_ptr.dtype.element_ty)
            tl.store(d_x_ptr + row64[:, None] * D + column_index[None, :], d_x, mask=mask)
            if HAS_ROW_SCALE:
                grad *= row_scale
            sums_ptrs = column_sums_ptr + row_tile.to(tl.int64) * D + column_index  # (BLOCK_N / NUM_PARTS,)
            tl.store(sums_ptrs, tl.sum(d_normed * x_hat, 0), mask=in_columns)
            tl.store(sums_ptrs + step, tl.sum(d_normed, 0), mask=in_columns)
            tl.store(sums_ptrs + 2 * step, tl.sum(grad, 0), mask=in_columns)


class Tiles(NamedTuple):
    """Tile sizes of a product, its launch options, and how many programs run on a multiprocessor."""

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
    def bounds(self) -> dict[str, int]:
        """Arguments start0, size0, start1, ... of the kernels; groups that a launch lacks have no rows."""
        missing = [0] * (MAX_GROUPS - len(self.groups))
        starts = {f"start{index}": start for index, start in enumerate(self.starts + missing)}
        sizes = {f"size{index}": size for index, size in enumerate(self.sizes + missing)}
        return starts | sizes

    def tiles(self, kernel: str, columns: int) -> Tiles:
        return tiles_for(kernel, self.capability, self.element_size, sum(self.sizes), columns)

    @property
    def row_tiles(self) -> list[int]:
        return [triton.cdiv(size, self.tiles("fc1", 1).BLOCK_M) for size in self.sizes]

    def pointers(self, name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Arguments {name}0_ptr, {name}1_ptr, ... of the kernels, from a tensor for each group of the caller."""
        picked = [tensors[group] for group in self.groups]
        picked += [picked[0]] * (MAX_GROUPS - len(picked))  # never read
        return {f"{name}{index}_ptr": tensor for index, tensor in enumerate(picked)}

    def run(self, kernel: Any, name: str, num_columns: int, a: Tensor, b: Sequence[Tensor], **arguments: Any) -> None:
        """Launch a kernel around the product of `a` and its group's `b`.

        Args:
            kernel: the kernel.
            name: its name for `tiles_for`.
            num_columns: of the product.
            a: (N, K).
            b: of each of the caller's groups, (num_columns, K); for the dgrad kernels (K, num_columns).
            arguments: those of the kernel that are neither operands, bounds, nor options of all kernels.
        """
        tiles = self.tiles(name, num_columns)
        num_tiles = sum(self.row_tiles) * triton.cdiv(num_columns, tiles.BLOCK_N)
        operands: dict[str, Any] = {"a_ptr": a, **self.pointers("b", b)}
        if self.use_tma:
            b_block = [tiles.BLOCK_N, tiles.BLOCK_K]
            b_block = b_block[::-1] if name.startswith("dgrad") else b_block
            blocks = [[tiles.BLOCK_M, tiles.BLOCK_K]] + [b_block] * MAX_GROUPS
            operands = {
                argument: TensorDescriptor.from_tensor(operand, block)
                for (argument, operand), block in zip(operands.items(), blocks, strict=True)
            }
        settings = tiles._asdict()
        programs = settings.pop("residents") * self.multiprocessors
        kernel[(min(num_tiles, programs),)](
            **operands,
            **arguments,
            **self.bounds,
            NUM_GROUPS=len(self.groups),
            SWIZZLE=SWIZZLE,
            USE_TMA=self.use_tma,
            PRECISION=self.precision,
            **settings,
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
                groups=groups,
                starts=[starts[group] for group in groups],
                sizes=[group_sizes[group] for group in groups],
                capability=capability,
                multiprocessors=multiprocessors,
                element_size=element_size,
                use_tma=aligned and (capability >= 90 if use_tma is None else use_tma),
                precision="interpreted" if capability == 0 else "tf32" if tf32 else "ieee",
            )
        )
    return launches


def _norm(
    x: Tensor, experts: Sequence[Any], statistics: Tensor, launch: _Launch, normed: Tensor, **arguments: Any
) -> None:
    """Launch the norm kernel; `arguments` are those that differ between the passes."""
    block_n = triton.next_power_of_2(x.shape[1])
    block_m = 4 if x.device.type == "cuda" else 16
    grid = (sum(triton.cdiv(size, block_m) for size in launch.sizes),)
    _mome_ffn_norm_kernel[grid](
        x_ptr=x,
        statistics_ptr=statistics,
        normed_ptr=normed,
        **launch.pointers("norm_weight", [e.norm_weight for e in experts]),
        **launch.pointers("norm_bias", [e.norm_bias for e in experts]),
        **launch.bounds,
        num_rows=len(x),
        D=x.shape[1],
        x_stride=x.stride(0),
        NUM_GROUPS=len(launch.groups),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
        **arguments,
    )


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
                _mome_ffn_fwd_fc1_kernel,
                "fc1",
                num_columns=hidden,
                a=normed,
                b=[e.fc1_weight for e in experts],
                **launch.pointers("fc1_bias", [e.fc1_bias for e in experts]),
                z_ptr=z,
                h_ptr=h,
                num_rows=rows,
                F=hidden,
                D=width,
                SAVE=save,
            )
            launch.run(
                _mome_ffn_fwd_fc2_kernel,
                "fc2",
                num_columns=width,
                a=h,
                b=[e.fc2_weight for e in experts],
                **launch.pointers("fc2_bias", [e.fc2_bias for e in experts]),
                x_ptr=x,
                layer_scale_ptr=_dummy_if_none(layer_scale, x),
                row_scale_ptr=_dummy_if_none(row_scale, x),
                out_ptr=out,
                num_rows=rows,
                D=width,
                F=hidden,
                x_stride=x.stride(0),
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
    scaled_fc2 = [
        e.fc2_weight if layer_scale is None else e.fc2_weight * layer_scale.to(dtype)[:, None] for e in experts
    ]
    shifts = [torch.mv(e.fc1_weight.float(), e.norm_bias.float()) + e.fc1_bias.float() for e in experts]
    slopes = [torch.mv(e.fc1_weight.float(), e.norm_weight.float()) for e in experts]
    operands = [upstream, d_z, *scaled_fc2, *(e.fc1_weight for e in experts)]
    for launch in _launches(x, group_sizes, operands, use_tma):
        num_sums, num_row_tiles = triton.cdiv(hidden, launch.tiles("dgrad2", hidden).BLOCK_N), sum(launch.row_tiles)
        row_sums = torch.empty((2, num_sums, rows), dtype=torch.float32, device=x.device)
        d_bias_sums = torch.empty((num_row_tiles, hidden), dtype=torch.float32, device=x.device)
        column_sums = torch.empty((3, num_row_tiles, width), dtype=torch.float32, device=x.device)
        with _device_of(x):
            launch.run(
                _mome_ffn_bwd_dgrad2_kernel,
                "dgrad2",
                num_columns=hidden,
                a=upstream,
                b=scaled_fc2,
                **launch.pointers("shift", shifts),
                **launch.pointers("slope", slopes),
                z_ptr=z,
                row_scale_ptr=_dummy_if_none(row_scale, x),
                d_z_ptr=d_z,
                h_ptr=scaled_h,
                row_sums_ptr=row_sums,
                column_sums_ptr=d_bias_sums,
                num_rows=rows,
                F=hidden,
                D=width,
                WRITE_H=write_h,
                HAS_ROW_SCALE=row_scale is not None,
            )
            launch.run(
                _mome_ffn_bwd_dgrad1_kernel,
                "dgrad1",
                num_columns=width,
                a=d_z,
                b=[e.fc1_weight for e in experts],
                **launch.pointers("norm_weight", [e.norm_weight for e in experts]),
                x_ptr=x,
                grad_ptr=grad,
                row_scale_ptr=_dummy_if_none(row_scale, x),
                statistics_ptr=statistics,
                row_sums_ptr=row_sums,
                d_x_ptr=d_x,
                column_sums_ptr=column_sums,
                num_rows=rows,
                D=width,
                F=hidden,
                x_stride=x.stride(0),
                num_sums=num_sums,
                num_row_tiles=num_row_tiles,
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
    """The tensor itself where its rows are contiguous and do not overlap, else a copy."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _dummy_if_none(tensor: Tensor | None, dummy: Tensor) -> Tensor:
    """The tensor, contiguous; or a valid pointer for an argument that the kernel will not read."""
    return dummy if tensor is None else tensor.contiguous()


def _device_of(x: Tensor) -> Any:
    """Context in which the tensor's device is the current one, on which Triton launches."""
    return torch.cuda.device_of(x)
