"""Attention within packed sequences of a text and an image segment, with a bias that the batch shares.

    S = scale Q K^T + bias,   P = softmax(S),   O = P V                       for each sequence and head
    dV = P^T dO,   dS = P (dO V^T - rowsum(dO O)),   dQ = scale dS K,   dK = scale dS^T Q,   dbias = sum of dS

Layout: query, key and value are (N, H, d) with any row and head stride, rows of a segment adjacent; `segments` is
(B, 2, 3) int32, (first row, length, first bias row) of a sequence's text and image; bias is (H, R, R), contiguous along
a row, its strides in units of ALIGN, which tells the compiler how wide its loads may be (a hint on an argument does
not). With CLS_ONLY the query is (B, H, d), one first token a sequence.

Saved are O and, for each query and head, the largest score (base 2) and 1 / sum of exp2(score - largest), (2, H, N)
float32: as one number, the usual log-sum-exp, they would cost weights in float32 up to three bits. Scores are
recomputed, a tile at a time, by each of three backward kernels. The bias is read tile by tile and stays in the L2
cache, which all sequences share (1.3 MB for 12 heads of 237 tokens in bfloat16). Its gradient has a kernel of its own:
a program owns one tile of one head, goes through the sequences of its chunk in order and adds their dS in registers,
so nothing is added atomically, results are the same in each run, and a chunk's partial sum is written once.

Products of S x S x d, in units of 2 S^2 d FLOP: forward 2, dQ 3 (in float32 5), dK and dV 4, dbias 2. Traffic with
device memory, in bytes a token and layer of width D = H d at 2 bytes a number: forward 8 D (Q, K, V in, O out), dQ
12 D, dK and dV 12 D, dbias 8 D for each pair of tiles that misses the L2 cache. At S = 237 and d = 64 the exponentials
(one in the forward pass, three in the backward one, for each score) take as long as the products; both are far above
what memory takes.

Keys are read segment by segment, so that the bias row of neighbouring keys is known to be adjacent: full tiles without
masks, then a tail of narrow ones. Queries of both segments share a tile.

Of a tile, M and N are the queries and keys, D is d rounded up to a power of two.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# What changes from batch to batch: a kernel is not built anew for a number that 16 divides, or for 1.
_COUNTS = ("num_rows", "num_tiles", "num_sequences", "num_bias_rows", "bias_head_stride", "bias_row_stride")


@triton.jit
def _rows(token, row0, len0, row1):
    """Rows of a sequence's tokens, text before image; or with first bias rows their bias rows."""
    return tl.where(token < len0, row0 + token, row1 + token - len0)


@triton.jit
def _load_rows(pointer, row, column, row_stride, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load (rows, BLOCK_D) of one head of an (N, H, d) tensor, from the head's pointer; 0 where masked or beyond d."""
    if HEAD_DIM == BLOCK_D:
        keep = mask[:, None]
    else:
        keep = mask[:, None] & (column < HEAD_DIM)[None, :]
    return tl.load(pointer + row.to(tl.int64)[:, None] * row_stride + column[None, :], mask=keep, other=0.0)


@triton.jit
def _load_keys(
    pointer,  # (keys, d) of a segment and head
    token,  # (N,) within the segment
    column,  # (BLOCK_D,)
    row_stride,
    mask,  # (N,)
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Load (N, BLOCK_D) keys or values of a segment; `pointer` includes its first row, so offsets fit 32 bits."""
    offset = token[:, None] * row_stride + column[None, :]
    if HEAD_DIM == BLOCK_D and not MASKED:
        keys = tl.load(pointer + offset)
    elif HEAD_DIM == BLOCK_D:
        keys = tl.load(pointer + offset, mask=mask[:, None], other=0.0)
    elif not MASKED:
        keys = tl.load(pointer + offset, mask=(column < HEAD_DIM)[None, :], other=0.0)
    else:
        keys = tl.load(pointer + offset, mask=mask[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
    return keys


@triton.jit
def _scores(
    q,  # (M, D)
    k,  # (N, D)
    bias_ptr,  # (R, R) of a head, at the segment's first bias row
    bias_m,  # (M,) offsets of the queries' bias rows
    token_n,  # (N,) within the segment
    mask_m,  # (M,)
    num_keys,  # of the segment
    scale,
    MASKED: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Base-2 scores of a tile, (M, N) float32; -inf beyond the segment's last key.

    The mask of the bias is constant over ALIGN keys, which lets the loads be that wide; rows of the bias are padded.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)  # (M, N)
    if HAS_BIAS:
        keep = mask_m[:, None]
        if MASKED:
            keep &= (token_n < tl.cdiv(num_keys, ALIGN) * ALIGN)[None, :]
        bias = tl.load(bias_ptr + bias_m[:, None] + token_n[None, :], mask=keep, other=0.0)  # (M, N)
        scores += bias.to(tl.float32) * LOG2_E
    if MASKED:
        scores = tl.where((token_n < num_keys)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _fwd_step(
    acc,  # (M, D) float32
    row_max,  # (M,) float32
    row_sum,  # (M,) float32
    q,  # (M, D)
    k_ptr,  # (keys, d) of a segment and head
    v_ptr,  # (keys, d) of a segment and head
    bias_ptr,  # (R, R) of a head, at the segment's first bias row
    bias_m,  # (M,) offsets of the queries' bias rows
    mask_m,  # (M,)
    start,  # first key of the tile
    num_keys,  # of the segment
    k_row_stride,
    v_row_stride,
    scale,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over one tile of keys."""
    token_n = start + tl.arange(0, BLOCK)  # (N,) within the segment
    column = tl.arange(0, BLOCK_D)
    k = _load_keys(k_ptr, token_n, column, k_row_stride, token_n < num_keys, MASKED, HEAD_DIM, BLOCK_D)  # (N, D)
    scores = _scores(q, k, bias_ptr, bias_m, token_n, mask_m, num_keys, scale, MASKED, ALIGN, HAS_BIAS, PRECISION)
    new_max = tl.maximum(row_max, tl.max(scores, 1))  # (M,)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # a bias may leave out all keys so far
    p = tl.math.exp2(scores - shift[:, None])  # (M, N)
    rescale = tl.math.exp2(row_max - shift)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    v = _load_keys(v_ptr, token_n, column, v_row_stride, token_n < num_keys, MASKED, HEAD_DIM, BLOCK_D)  # (N, D)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)  # (M, D)
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=_COUNTS)
def _packed_attention_fwd_kernel(
    q_ptr,  # (N, H, d); (B, H, d) if CLS_ONLY
    k_ptr,  # (N, H, d)
    v_ptr,  # (N, H, d)
    segments_ptr,  # (B, 2, 3) int32
    bias_ptr,  # (H, R, R), read if HAS_BIAS
    out_ptr,  # like q, contiguous
    stats_ptr,  # (2, H, N) float32; (2, H, B) if CLS_ONLY
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    bias_head_stride,  # in units of ALIGN
    bias_row_stride,  # in units of ALIGN
    num_rows,  # N, of q
    num_heads,  # H
    num_tiles,  # of a sequence and head
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CLS_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the output and statistics of one tile of queries of one sequence and head."""
    tile = tl.program_id(0) % num_tiles
    head = (tl.program_id(0) // num_tiles % num_heads).to(tl.int64)
    sequence = tl.program_id(0) // num_tiles // num_heads
    table = segments_ptr + sequence * 6
    row0, len0, bias_row0 = tl.load(table), tl.load(table + 1), tl.load(table + 2)
    row1, len1, bias_row1 = tl.load(table + 3), tl.load(table + 4), tl.load(table + 5)
    num_queries = tl.minimum(len0 + len1, 1) if CLS_ONLY else len0 + len1
    if tile * BLOCK_M >= num_queries:
        return
    token_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
    mask_m = token_m < num_queries
    row_m = sequence + token_m if CLS_ONLY else _rows(token_m, row0, len0, row1)
    bias_m = _rows(token_m, bias_row0, len0, bias_row1) * (bias_row_stride * ALIGN)
    column = tl.arange(0, BLOCK_D)
    bias_ptr += head * (bias_head_stride * ALIGN)
    q = _load_rows(q_ptr + head * q_head_stride, row_m, column, q_row_stride, mask_m, HEAD_DIM, BLOCK_D)  # (M, D)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for segment in range(2):
        row, num_keys = tl.load(table + segment * 3).to(tl.int64), tl.load(table + segment * 3 + 1)
        bias_row = tl.multiple_of(tl.load(table + segment * 3 + 2), ALIGN)
        k_segment_ptr = k_ptr + row * k_row_stride + head * k_head_stride
        v_segment_ptr = v_ptr + row * v_row_stride + head * v_head_stride
        full = num_keys // BLOCK_N * BLOCK_N
        for start in range(0, full, BLOCK_N):
            acc, row_max, row_sum = _fwd_step(
                acc, row_max, row_sum, q, k_segment_ptr, v_segment_ptr, bias_ptr + bias_row, bias_m, mask_m,
                start, num_keys, k_row_stride, v_row_stride, scale,
                BLOCK=BLOCK_N, MASKED=False, ALIGN=ALIGN, HAS_BIAS=HAS_BIAS,
                HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, PRECISION=PRECISION,
            )  # fmt: skip
        for start in range(full, num_keys, BLOCK_TAIL):
            acc, row_max, row_sum = _fwd_step(
                acc, row_max, row_sum, q, k_segment_ptr, v_segment_ptr, bias_ptr + bias_row, bias_m, mask_m,
                start, num_keys, k_row_stride, v_row_stride, scale,
                BLOCK=BLOCK_TAIL, MASKED=True, ALIGN=ALIGN, HAS_BIAS=HAS_BIAS,
                HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, PRECISION=PRECISION,
            )  # fmt: skip
    inv_sum = 1.0 / row_sum  # (M,)
    out = acc * inv_sum[:, None]
    row_m = row_m.to(tl.int64)
    target = out_ptr + (row_m[:, None] * num_heads + head) * HEAD_DIM + column[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & (column < HEAD_DIM)[None, :])
    tl.store(stats_ptr + head * num_rows + row_m, row_max, mask=mask_m)
    tl.store(stats_ptr + (num_heads + head) * num_rows + row_m, inv_sum, mask=mask_m)


@triton.jit
def _bwd_dq_step(
    acc,  # (M, D) float32; (M,) if TO_DELTA
    q,  # (M, D)
    d_out,  # (M, D)
    row_max,  # (M,) float32
    delta,  # (M,) float32
    k_ptr,  # (keys, d) of a segment and head
    v_ptr,  # (keys, d) of a segment and head
    bias_ptr,  # (R, R) of a head, at the segment's first bias row
    bias_m,  # (M,) offsets of the queries' bias rows
    mask_m,  # (M,)
    start,  # first key of the tile
    num_keys,  # of the segment
    k_row_stride,
    v_row_stride,
    scale,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    TO_DELTA: tl.constexpr,
):
    """Add one tile of keys to dQ, or to rowsum(P dO V^T) if TO_DELTA; both still without the factor 1 / sum."""
    token_n = start + tl.arange(0, BLOCK)  # (N,) within the segment
    column = tl.arange(0, BLOCK_D)
    k = _load_keys(k_ptr, token_n, column, k_row_stride, token_n < num_keys, MASKED, HEAD_DIM, BLOCK_D)  # (N, D)
    v = _load_keys(v_ptr, token_n, column, v_row_stride, token_n < num_keys, MASKED, HEAD_DIM, BLOCK_D)  # (N, D)
    scores = _scores(q, k, bias_ptr, bias_m, token_n, mask_m, num_keys, scale, MASKED, ALIGN, HAS_BIAS, PRECISION)
    p = tl.math.exp2(scores - row_max[:, None])  # (M, N)
    dp = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)  # (M, N)
    if TO_DELTA:
        acc += tl.sum(p * dp, 1)  # (M,)
    else:
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)  # (M, D)
    return acc


@triton.jit
def _bwd_dq_pass(
    acc,  # (M, D) float32; (M,) if TO_DELTA
    q,  # (M, D)
    d_out,  # (M, D)
    row_max,  # (M,) float32
    delta,  # (M,) float32
    k_ptr,  # (N, d) of a head
    v_ptr,  # (N, d) of a head
    bias_ptr,  # (R, R) of a head
    bias_m,  # (M,) offsets of the queries' bias rows
    mask_m,  # (M,)
    table,  # (2, 3) int32 of the sequence
    k_row_stride,
    v_row_stride,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    TO_DELTA: tl.constexpr,
):
    """Apply `_bwd_dq_step` to all keys of a sequence."""
    for segment in range(2):
        row, num_keys = tl.load(table + segment * 3).to(tl.int64), tl.load(table + segment * 3 + 1)
        bias_row = tl.multiple_of(tl.load(table + segment * 3 + 2), ALIGN)
        k_segment_ptr, v_segment_ptr = k_ptr + row * k_row_stride, v_ptr + row * v_row_stride
        full = num_keys // BLOCK_N * BLOCK_N
        for start in range(0, full, BLOCK_N):
            acc = _bwd_dq_step(
                acc, q, d_out, row_max, delta, k_segment_ptr, v_segment_ptr, bias_ptr + bias_row, bias_m, mask_m,
                start, num_keys, k_row_stride, v_row_stride, scale,
                BLOCK=BLOCK_N, MASKED=False, ALIGN=ALIGN, HAS_BIAS=HAS_BIAS,
                HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, PRECISION=PRECISION, TO_DELTA=TO_DELTA,
            )  # fmt: skip
        for start in range(full, num_keys, BLOCK_TAIL):
            acc = _bwd_dq_step(
                acc, q, d_out, row_max, delta, k_segment_ptr, v_segment_ptr, bias_ptr + bias_row, bias_m, mask_m,
                start, num_keys, k_row_stride, v_row_stride, scale,
                BLOCK=BLOCK_TAIL, MASKED=True, ALIGN=ALIGN, HAS_BIAS=HAS_BIAS,
                HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, PRECISION=PRECISION, TO_DELTA=TO_DELTA,
            )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=_COUNTS)
def _packed_attention_bwd_dq_kernel(
    q_ptr,  # (N, H, d); (B, H, d) if CLS_ONLY
    k_ptr,  # (N, H, d)
    v_ptr,  # (N, H, d)
    segments_ptr,  # (B, 2, 3) int32
    bias_ptr,  # (H, R, R), read if HAS_BIAS
    out_ptr,  # like q, contiguous
    d_out_ptr,  # like q
    stats_ptr,  # (2, H, N) float32; (2, H, B) if CLS_ONLY
    delta_ptr,  # (H, N) float32; (H, B) if CLS_ONLY
    dq_ptr,  # like q, contiguous
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    d_out_row_stride,
    d_out_head_stride,
    bias_head_stride,  # in units of ALIGN
    bias_row_stride,  # in units of ALIGN
    num_rows,  # N, of q
    num_heads,  # H
    num_tiles,  # of a sequence and head
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CLS_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Write dQ of one tile of queries, and rowsum(dO O) for the kernels that follow.

    EXACT takes the equal rowsum(P dO V^T) instead, which cancels against dO V^T as exactly as written-out attention
    does where a query attends to one key; O would bring in a rounding of its own.
    """
    tile = tl.program_id(0) % num_tiles
    head = (tl.program_id(0) // num_tiles % num_heads).to(tl.int64)
    sequence = tl.program_id(0) // num_tiles // num_heads
    table = segments_ptr + sequence * 6
    row0, len0, bias_row0 = tl.load(table), tl.load(table + 1), tl.load(table + 2)
    row1, len1, bias_row1 = tl.load(table + 3), tl.load(table + 4), tl.load(table + 5)
    num_queries = tl.minimum(len0 + len1, 1) if CLS_ONLY else len0 + len1
    if tile * BLOCK_M >= num_queries:
        return
    token_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # (M,)
    mask_m = token_m < num_queries
    row_m = sequence + token_m if CLS_ONLY else _rows(token_m, row0, len0, row1)
    bias_m = _rows(token_m, bias_row0, len0, bias_row1) * (bias_row_stride * ALIGN)
    column = tl.arange(0, BLOCK_D)
    bias_ptr += head * (bias_head_stride * ALIGN)
    d_out_ptr += head * d_out_head_stride
    q = _load_rows(q_ptr + head * q_head_stride, row_m, column, q_row_stride, mask_m, HEAD_DIM, BLOCK_D)  # (M, D)
    d_out = _load_rows(d_out_ptr, row_m, column, d_out_row_stride, mask_m, HEAD_DIM, BLOCK_D)  # (M, D)
    stats_index = head * num_rows + row_m.to(tl.int64)
    row_max = tl.load(stats_ptr + stats_index, mask=mask_m, other=float("inf"))  # (M,)
    inv_sum = tl.load(stats_ptr + num_heads * num_rows + stats_index, mask=mask_m, other=0.0)  # (M,)
    k_ptr += head * k_head_stride
    v_ptr += head * v_head_stride
    if EXACT:
        delta = tl.zeros((BLOCK_M,), tl.float32)
        delta = _bwd_dq_pass(
            delta, q, d_out, row_max, inv_sum, k_ptr, v_ptr, bias_ptr, bias_m, mask_m, table,
            k_row_stride, v_row_stride, scale,
            BLOCK_N=BLOCK_N, BLOCK_TAIL=BLOCK_TAIL, ALIGN=ALIGN, HAS_BIAS=HAS_BIAS,
            HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, PRECISION=PRECISION, TO_DELTA=True,
        )  # fmt: skip
        delta *= inv_sum  # (M,)
    else:
        out = _load_rows(out_ptr + head * HEAD_DIM, row_m, column, num_heads * HEAD_DIM, mask_m, HEAD_DIM, BLOCK_D)
        delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)  # (M,)
    tl.store(delta_ptr + stats_index, delta, mask=mask_m)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq = _bwd_dq_pass(
        dq, q, d_out, row_max, delta, k_ptr, v_ptr, bias_ptr, bias_m, mask_m, table,
        k_row_stride, v_row_stride, scale,
        BLOCK_N=BLOCK_N, BLOCK_TAIL=BLOCK_TAIL, ALIGN=ALIGN, HAS_BIAS=HAS_BIAS,
        HEAD_DIM=HEAD_DIM, BLOCK_D=BLOCK_D, PRECISION=PRECISION, TO_DELTA=False,
    )  # fmt: skip
    dq *= (inv_sum * scale)[:, None]  # (M, D)
    target = dq_ptr + (row_m.to(tl.int64)[:, None] * num_heads + head) * HEAD_DIM + column[None, :]
    tl.store(target, dq.to(dq_ptr.dtype.element_ty), mask=mask_m[:, None] & (column < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=_COUNTS)
def _packed_attention_bwd_dkv_kernel(
    q_ptr,  # (N, H, d); (B, H, d) if CLS_ONLY
    k_ptr,  # (N, H, d)
    v_ptr,  # (N, H, d)
    segments_ptr,  # (B, 2, 3) int32
    bias_ptr,  # (H, R, R), read if HAS_BIAS
    d_out_ptr,  # like q
    stats_ptr,  # (2, H, N) float32; (2, H, B) if CLS_ONLY
    delta_ptr,  # (H, N) float32; (H, B) if CLS_ONLY
    dk_ptr,  # (N, H, d), contiguous
    dv_ptr,  # (N, H, d), contiguous
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    d_out_row_stride,
    d_out_head_stride,
    bias_head_stride,  # in units of ALIGN
    bias_row_stride,  # in units of ALIGN
    num_rows,  # N, of q
    num_heads,  # H
    num_tiles,  # of a sequence and head
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CLS_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write dK and dV of one tile of keys of one segment and head; scores are transposed, (N, M), keys first.

    Keys beyond the segment's end need no mask: their results, be they NaN, are not stored. Queries beyond the last one
    have an infinite largest score, and so no weight.
    """
    tile = tl.program_id(0) % num_tiles
    head = (tl.program_id(0) // num_tiles % num_heads).to(tl.int64)
    sequence = tl.program_id(0) // num_tiles // num_heads
    table = segments_ptr + sequence * 6
    row0, len0, bias_row0 = tl.load(table), tl.load(table + 1), tl.load(table + 2)
    row1, len1, bias_row1 = tl.load(table + 3), tl.load(table + 4), tl.load(table + 5)
    num_text_tiles = tl.cdiv(len0, BLOCK_N)
    in_text = tile < num_text_tiles
    segment = table + (0 if in_text else 3)
    row, num_keys, bias_row = tl.load(segment), tl.load(segment + 1), tl.multiple_of(tl.load(segment + 2), ALIGN)
    start = (tile if in_text else tile - num_text_tiles) * BLOCK_N
    if start >= num_keys:
        return
    token_n = start + tl.arange(0, BLOCK_N)  # (N,) within the segment
    mask_n = token_n < num_keys
    row_n = row + token_n
    column = tl.arange(0, BLOCK_D)
    k = _load_rows(k_ptr + head * k_head_stride, row_n, column, k_row_stride, mask_n, HEAD_DIM, BLOCK_D)  # (N, D)
    v = _load_rows(v_ptr + head * v_head_stride, row_n, column, v_row_stride, mask_n, HEAD_DIM, BLOCK_D)  # (N, D)
    q_ptr += head * q_head_stride
    d_out_ptr += head * d_out_head_stride
    bias_ptr += head * (bias_head_stride * ALIGN) + bias_row

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    num_queries = 1 if CLS_ONLY else len0 + len1
    for first in range(0, num_queries, BLOCK_M):
        token_m = first + tl.arange(0, BLOCK_M)  # (M,)
        mask_m = token_m < num_queries
        row_m = sequence + token_m if CLS_ONLY else _rows(token_m, row0, len0, row1)
        q = _load_rows(q_ptr, row_m, column, q_row_stride, mask_m, HEAD_DIM, BLOCK_D)  # (M, D)
        d_out = _load_rows(d_out_ptr, row_m, column, d_out_row_stride, mask_m, HEAD_DIM, BLOCK_D)  # (M, D)
        stats_index = head * num_rows + row_m.to(tl.int64)
        row_max = tl.load(stats_ptr + stats_index, mask=mask_m, other=float("inf"))  # (M,)
        inv_sum = tl.load(stats_ptr + num_heads * num_rows + stats_index, mask=mask_m, other=0.0)  # (M,)
        delta = tl.load(delta_ptr + stats_index, mask=mask_m, other=0.0)  # (M,)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E)  # (N, M)
        if HAS_BIAS:
            bias_m = _rows(token_m, bias_row0, len0, bias_row1) * (bias_row_stride * ALIGN)
            keep = mask_m[:, None] & (token_n < tl.cdiv(num_keys, ALIGN) * ALIGN)[None, :]  # constant over ALIGN keys
            bias = tl.load(bias_ptr + bias_m[:, None] + token_n[None, :], mask=keep, other=0.0)  # (M, N)
            scores += tl.trans(bias).to(tl.float32) * LOG2_E
        p = tl.math.exp2(scores - row_max[None, :]) * inv_sum[None, :]  # (N, M)
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)  # (N, D)
        dp = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)  # (N, M)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)  # (N, D)
    offset = (row_n.to(tl.int64)[:, None] * num_heads + head) * HEAD_DIM + column[None, :]
    keep = mask_n[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(dk_ptr + offset, (dk * scale).to(dk_ptr.dtype.element_ty), mask=keep)
    tl.store(dv_ptr + offset, dv.to(dv_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=_COUNTS)
def _packed_attention_bwd_dbias_kernel(
    q_ptr,  # (N, H, d); (B, H, d) if CLS_ONLY
    k_ptr,  # (N, H, d)
    v_ptr,  # (N, H, d)
    segments_ptr,  # (B, 2, 3) int32
    bias_ptr,  # (H, R, R)
    d_out_ptr,  # like q
    stats_ptr,  # (2, H, N) float32; (2, H, B) if CLS_ONLY
    delta_ptr,  # (H, N) float32; (H, B) if CLS_ONLY
    d_bias_ptr,  # (chunks, H, R, R), contiguous
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    d_out_row_stride,
    d_out_head_stride,
    bias_head_stride,  # in units of ALIGN
    bias_row_stride,  # in units of ALIGN
    num_rows,  # N, of q
    num_heads,  # H
    num_sequences,  # B
    num_bias_rows,  # R
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGN: tl.constexpr,
    CLS_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradient of one tile of the bias of one head, summed in order over a chunk of CHUNK sequences."""
    num_tiles_n = tl.cdiv(num_bias_rows, BLOCK_N)
    num_tiles = tl.cdiv(num_bias_rows, BLOCK_M) * num_tiles_n
    tile = tl.program_id(0) % num_tiles
    head = (tl.program_id(0) // num_tiles % num_heads).to(tl.int64)
    chunk = tl.program_id(0) // num_tiles // num_heads
    first_m, first_n = tile // num_tiles_n * BLOCK_M, tile % num_tiles_n * BLOCK_N
    bias_row_m = first_m + tl.arange(0, BLOCK_M)  # (M,) rows of the bias
    bias_row_n = first_n + tl.arange(0, BLOCK_N)  # (N,)
    column = tl.arange(0, BLOCK_D)
    keep = (bias_row_m < num_bias_rows)[:, None] & (bias_row_n < num_bias_rows)[None, :]
    offset = bias_row_m.to(tl.int64)[:, None] * (bias_row_stride * ALIGN) + bias_row_n[None, :]
    bias = tl.load(bias_ptr + head * (bias_head_stride * ALIGN) + offset, mask=keep, other=0.0)  # (M, N)
    q_ptr += head * q_head_stride
    k_ptr += head * k_head_stride
    v_ptr += head * v_head_stride
    d_out_ptr += head * d_out_head_stride

    # The sequences from the first to the last of the chunk that have tokens in both sides of the tile.
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    exists = index < num_sequences
    rows = segments_ptr + index * 6
    text_len, text = tl.load(rows + 1, mask=exists, other=0), tl.load(rows + 2, mask=exists, other=0)
    image_len, image = tl.load(rows + 4, mask=exists, other=0), tl.load(rows + 5, mask=exists, other=0)
    if CLS_ONLY:
        cls = tl.where(text_len > 0, text, image)
        in_m = (text_len + image_len > 0) & (cls >= first_m) & (cls < first_m + BLOCK_M)
    else:
        in_m = (text_len > 0) & (text < first_m + BLOCK_M) & (text + text_len > first_m)
        in_m |= (image_len > 0) & (image < first_m + BLOCK_M) & (image + image_len > first_m)
    in_n = (text_len > 0) & (text < first_n + BLOCK_N) & (text + text_len > first_n)
    in_n |= (image_len > 0) & (image < first_n + BLOCK_N) & (image + image_len > first_n)
    start = tl.min(tl.where(in_m & in_n, index, num_sequences), 0)
    stop = tl.max(tl.where(in_m & in_n, index + 1, 0), 0)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for sequence in range(start, stop):
        table = segments_ptr + sequence * 6
        row0, len0, bias_row0 = tl.load(table), tl.load(table + 1), tl.load(table + 2)
        row1, len1, bias_row1 = tl.load(table + 3), tl.load(table + 4), tl.load(table + 5)
        # Tokens of either segment that the bias rows stand for.
        text_n, image_n = bias_row_n - bias_row0, bias_row_n - bias_row1
        in_text_n = (text_n >= 0) & (text_n < len0)
        mask_n = in_text_n | ((image_n >= 0) & (image_n < len1))
        row_n = tl.where(in_text_n, row0 + text_n, row1 + image_n)
        if CLS_ONLY:
            mask_m = bias_row_m == tl.where(len0 > 0, bias_row0, bias_row1)
            mask_m &= len0 + len1 > 0
            row_m = sequence + tl.zeros_like(bias_row_m)
        else:
            text_m, image_m = bias_row_m - bias_row0, bias_row_m - bias_row1
            in_text_m = (text_m >= 0) & (text_m < len0)
            mask_m = in_text_m | ((image_m >= 0) & (image_m < len1))
            row_m = tl.where(in_text_m, row0 + text_m, row1 + image_m)
        q = _load_rows(q_ptr, row_m, column, q_row_stride, mask_m, HEAD_DIM, BLOCK_D)  # (M, D)
        k = _load_rows(k_ptr, row_n, column, k_row_stride, mask_n, HEAD_DIM, BLOCK_D)  # (N, D)
        v = _load_rows(v_ptr, row_n, column, v_row_stride, mask_n, HEAD_DIM, BLOCK_D)  # (N, D)
        d_out = _load_rows(d_out_ptr, row_m, column, d_out_row_stride, mask_m, HEAD_DIM, BLOCK_D)  # (M, D)
        stats_index = head * num_rows + row_m.to(tl.int64)
        row_max = tl.load(stats_ptr + stats_index, mask=mask_m, other=float("inf"))  # (M,)
        inv_sum = tl.load(stats_ptr + num_heads * num_rows + stats_index, mask=mask_m, other=0.0)  # (M,)
        delta = tl.load(delta_ptr + stats_index, mask=mask_m, other=0.0)  # (M,)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)  # (M, N)
        scores += bias.to(tl.float32) * LOG2_E
        scores = tl.where(mask_n[None, :], scores - row_max[:, None], float("-inf"))
        p = tl.math.exp2(scores) * inv_sum[:, None]  # (M, N)
        dp = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)  # (M, N)
        acc += p * (dp - delta[:, None])
    offset = ((chunk * num_heads + head) * num_bias_rows + bias_row_m[:, None]) * num_bias_rows + bias_row_n[None, :]
    tl.store(d_bias_ptr + offset, acc.to(d_bias_ptr.dtype.element_ty), mask=keep)


def _tiles(max_length: int, width: int, dtype: torch.dtype, capability: int) -> dict[str, dict[str, int]]:
    """Tile sizes, warps and pipeline stages of each kernel; from host numbers alone, so that a graph can keep them.

    The sizes are those at which the compiler spills no register; the tests build them. Not tuned on a GPU yet.

    Args:
        max_length: tokens of the longest sequence.
        width: head size, 1 to 128.
        dtype: of the query.
        capability: the GPU's major number, 8 to 12.
    """
    roomy = width in (16, 32, 64)  # other sizes need masks for their lanes, or twice the registers
    if dtype == torch.float32 and width > 64:  # dbias spills even so: its operands, split in TF32 parts, fill a thread
        sizes = {"fwd": (16, 16, 4), "bwd_dq": (16, 16, 8), "bwd_dkv": (16, 16, 4), "bwd_dbias": (16, 16, 8)}
    elif dtype == torch.float32:  # 3xTF32: operands are split in registers
        sizes = {"fwd": (32, 32, 8), "bwd_dq": (16, 32, 4), "bwd_dkv": (32, 32, 8), "bwd_dbias": (16, 32, 4)}
        if not roomy:
            sizes["bwd_dq"] = sizes["bwd_dbias"] = (16, 32, 8)
    elif roomy and capability >= 9:
        sizes = {"fwd": (64, 64, 4), "bwd_dq": (64, 64, 4), "bwd_dkv": (64, 64, 4), "bwd_dbias": (64, 64, 8)}
    else:
        sizes = {"fwd": (64, 32, 4), "bwd_dq": (64, 32, 8), "bwd_dkv": (32, 64, 8), "bwd_dbias": (64, 32, 8)}
        if capability < 9:
            sizes["bwd_dkv"] = (64, 32, 8) if width > 32 else (32, 32, 4)
    limit = max(16, triton.next_power_of_2(max_length))  # short texts fill no large tile
    tiles = {}
    for name, (queries, keys, warps) in sizes.items():
        if limit < max(queries, keys):
            queries, keys = min(queries, limit), min(keys, limit)
            warps = max(2, max(queries, keys) // 16)
        elif capability >= 10:
            warps = 8
        # Triton up to 3.7 lets one warp issue the next iteration's products into tensor memory that other warps still
        # read (triton-lang/triton#10263). Unpipelined, the barrier between a product and the copy of its operands keeps
        # them apart.
        stages = 1 if name == "bwd_dbias" and capability in (10, 11) else 2
        # Without maxnreg, ptxas spills for the sake of more blocks in a multiprocessor.
        tiles[name] = {"BLOCK_M": queries, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages, "maxnreg": 255}
    for name in ("fwd", "bwd_dq"):
        tiles[name]["BLOCK_TAIL"] = min(32, tiles[name]["BLOCK_N"])
    return tiles


def _last_dim_contiguous(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _capability(x: torch.Tensor) -> int:
    """Major compute capability of the tensor's GPU."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9  # the interpreter's tiles: any


def _precision(dtype: torch.dtype) -> str:
    """float32 products in three TF32 ones, exact to about float32's rounding; the other dtypes have but one way."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


class _Call:
    """What the launchers share: tensors with a contiguous last dimension, and the arguments common to all kernels."""

    def __init__(self, query, key, value, segments, bias, max_length, cls_only, scale, place_alignment) -> None:
        query, key, value = _last_dim_contiguous(query), _last_dim_contiguous(key), _last_dim_contiguous(value)
        self.num_sequences, self.num_heads, head_dim = len(segments), key.shape[1], key.shape[2]
        self.num_rows = len(query)
        self.tiles = _tiles(max_length, head_dim, query.dtype, _capability(query))
        self.has_bias = bias is not None
        align = 1
        if bias is None:
            bias = query.new_empty(1, 1, 1)
        else:
            bias, align = _aligned(_last_dim_contiguous(bias), place_alignment)
        self.arguments = {
            "q_ptr": query,
            "k_ptr": key,
            "v_ptr": value,
            "segments_ptr": segments,
            "bias_ptr": bias,
            "q_row_stride": query.stride(0),
            "q_head_stride": query.stride(1),
            "k_row_stride": key.stride(0),
            "k_head_stride": key.stride(1),
            "v_row_stride": value.stride(0),
            "v_head_stride": value.stride(1),
            "bias_head_stride": bias.stride(0) // align,
            "bias_row_stride": bias.stride(1) // align,
            "num_rows": self.num_rows,
            "num_heads": self.num_heads,
            "scale": scale,
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "ALIGN": align,
            "CLS_ONLY": cls_only,
            "PRECISION": _precision(query.dtype),
        }


def _aligned(bias: torch.Tensor, alignment: int) -> tuple[torch.Tensor, int]:
    """A bias whose rows start at multiples of `alignment` elements and may be read to the next multiple; the alignment.

    Rows of 237 numbers would be read one number at a time; padding them to 240 costs one copy of the bias.
    """
    heads, places, width = bias.shape
    padded_width = triton.cdiv(width, 8) * 8
    held = bias.untyped_storage().size() // bias.element_size() - bias.storage_offset()
    end = (heads - 1) * bias.stride(0) + (places - 1) * bias.stride(1) + padded_width
    if alignment > 1 and (bias.stride(1) % alignment or bias.stride(1) < padded_width or held < end):
        padded = bias.new_empty(heads, places, padded_width)
        padded[..., :width].copy_(bias)
        bias = padded[..., :width]
    if bias.data_ptr() % (alignment * bias.element_size()) or bias.stride(0) % alignment:
        return bias, 1
    return bias, alignment


def forward(query, key, value, segments, bias, max_length, cls_only, scale, place_alignment, out):
    """Write the attention into `out`; rows of no sequence stay as they are.

    Args:
        query: (N, H, d), or (B, H, d) with `cls_only`; float32, float16 or bfloat16.
        key: (N, H, d).
        value: (N, H, d).
        segments: (B, 2, 3) int32.
        bias: (H, R, R) or None.
        max_length: tokens of the longest sequence, or an upper bound.
        cls_only: whether a sequence has one query, its first token.
        scale: factor of the scores.
        place_alignment: a power of two up to 8 that divides every first bias row.
        out: like the query, contiguous.

    Returns:
        (2, H, N or B) float32: of each query the largest score, base 2, and 1 / sum of exp2(score - largest).
    """
    call = _Call(query, key, value, segments, bias, max_length, cls_only, scale, place_alignment)
    stats = torch.empty((2, call.num_heads, call.num_rows), dtype=torch.float32, device=query.device)
    tiles = call.tiles["fwd"]
    num_tiles = 1 if cls_only else triton.cdiv(max_length, tiles["BLOCK_M"])
    grid = num_tiles * call.num_heads * call.num_sequences
    if grid:
        _packed_attention_fwd_kernel[(grid,)](
            **call.arguments,
            out_ptr=out,
            stats_ptr=stats,
            num_tiles=num_tiles,
            HAS_BIAS=call.has_bias,
            **tiles,
        )
    return stats


def backward(
    grad,
    query,
    key,
    value,
    segments,
    bias,
    out,
    stats,
    max_length,
    cls_only,
    scale,
    place_alignment,
    dq,
    dk,
    dv,
    d_bias,
):
    """Write the gradients of query, key and value, and of the bias where `d_bias` is not None.

    Args: as for `forward`, and
        grad: gradient of `out`, any row and head stride.
        out: what `forward` wrote.
        stats: what `forward` returned.
        dq: like the query, contiguous.
        dk: like the key, contiguous.
        dv: like the value, contiguous.
        d_bias: (H, R, R) contiguous, or None.
    """
    call = _Call(query, key, value, segments, bias, max_length, cls_only, scale, place_alignment)
    num_programs = call.num_heads * call.num_sequences  # for each tile of a sequence
    if not num_programs or not max_length:
        if d_bias is not None:
            d_bias.zero_()
        return
    grad = _last_dim_contiguous(grad)
    delta = torch.empty_like(stats[0])
    arguments = call.arguments | {
        "d_out_ptr": grad,
        "d_out_row_stride": grad.stride(0),
        "d_out_head_stride": grad.stride(1),
        "stats_ptr": stats,
        "delta_ptr": delta,
    }
    tiles = call.tiles["bwd_dq"]
    num_tiles = 1 if cls_only else triton.cdiv(max_length, tiles["BLOCK_M"])
    _packed_attention_bwd_dq_kernel[(num_tiles * num_programs,)](
        **arguments,
        out_ptr=out,
        dq_ptr=dq,
        num_tiles=num_tiles,
        HAS_BIAS=call.has_bias,
        EXACT=query.dtype == torch.float32,
        **tiles,
    )
    tiles = call.tiles["bwd_dkv"]
    num_tiles = triton.cdiv(max_length, tiles["BLOCK_N"]) + 1  # each segment may end in a tile that is not full
    _packed_attention_bwd_dkv_kernel[(num_tiles * num_programs,)](
        **arguments,
        dk_ptr=dk,
        dv_ptr=dv,
        num_tiles=num_tiles,
        HAS_BIAS=call.has_bias,
        **tiles,
    )
    if d_bias is None:
        return
    tiles, num_bias_rows = call.tiles["bwd_dbias"], bias.shape[1]
    num_tiles = triton.cdiv(num_bias_rows, tiles["BLOCK_M"]) * triton.cdiv(num_bias_rows, tiles["BLOCK_N"])
    chunk = _chunk(call.num_sequences, num_tiles * call.num_heads)
    num_chunks = triton.cdiv(call.num_sequences, chunk)
    partial = d_bias if num_chunks == 1 else d_bias.new_empty((num_chunks, *d_bias.shape), dtype=torch.float32)
    _packed_attention_bwd_dbias_kernel[(num_tiles * call.num_heads * num_chunks,)](
        **arguments,
        d_bias_ptr=partial,
        num_sequences=call.num_sequences,
        num_bias_rows=num_bias_rows,
        CHUNK=chunk,
        **tiles,
    )
    if num_chunks > 1:
        torch.sum(partial, 0, out=d_bias) if d_bias.dtype == torch.float32 else d_bias.copy_(partial.sum(0))


def _chunk(num_sequences: int, num_programs: int) -> int:
    """Number of sequences that a program of the bias gradient adds up: a power of two that keeps a GPU busy.

    About a thousand programs is four to eight a multiprocessor; a chunk of partial sums costs as much traffic as 16
    sequences of its tile, so chunks are no smaller.
    """
    wanted = triton.cdiv(num_sequences * num_programs, 1024)
    return min(max(16, triton.next_power_of_2(wanted)), triton.next_power_of_2(num_sequences), 1024)
