"""Packed attention on torch's own operators: sequences of one shape are computed together, as views where they lie so.

The scores of a few sequences are all that exists at a time. That is kind to memory, and on a CPU to the cache: chunks
of 4 MB beat whole buckets (docs/log.md). The backward pass computes the weights anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vlmo_fast.ops import _fused

__all__ = ["Plan", "attend", "attend_backward", "plan"]

CHUNK_BYTES = {"cpu": 4 << 20}  # scores at a time; docs/log.md
CHUNK_BYTES_ELSEWHERE = 256 << 20
PLANS_KEPT = 8  # a training step attends over two or three packings, in every layer


class Part(NamedTuple):
    """The tokens of one modality in a bucket's sequences.

    Attributes:
        first_row: their first row, where all of them lie one after the other; otherwise None.
        rows: (n * length,) int64 of their rows, where they do not.
        length: tokens a sequence.
        place: row of the bias of the first token.
    """

    first_row: int | None
    rows: Tensor | None
    length: int
    place: int


class Bucket(NamedTuple):
    """Sequences of the same lengths.

    Attributes:
        sequences: their numbers in the batch.
        parts: text and image, those that are there.
        length: tokens a sequence.
    """

    sequences: Tensor
    parts: tuple[Part, ...]
    length: int


class Plan(NamedTuple):
    """A packing on the host.

    Attributes:
        buckets: its sequences by shape, without empty ones.
        num_tokens: tokens of all sequences.
        end_row: one past the last row used.
        end_place: one past the last row of the bias used.
        max_length: tokens of the longest sequence.
        lowest: the smallest number in the table, which must not be negative.
        overlaps: whether a row belongs to two segments, which must not be.
        empty_sequences: whether a sequence has no tokens.
        shared_places: whether text and image of a sequence share rows of the bias, which they must not.
        place_alignment: the largest power of two, at most 8, that divides every first bias row.
    """

    buckets: tuple[Bucket, ...]
    num_tokens: int
    end_row: int
    end_place: int
    max_length: int
    lowest: int
    overlaps: bool
    empty_sequences: bool
    shared_places: bool
    place_alignment: int


_plans: tuple[tuple[Tensor, Plan], ...] = ()  # the last tables seen, newest first; every layer asks for the same


def plan(segments: Tensor) -> Plan:
    """The buckets of a table of segments, (B, 2, 3) int32 on the CPU."""
    global _plans  # noqa: PLW0603 - a cache: replaced whole, never changed in place
    kept = _plans
    for table, made in kept:
        if torch.equal(table, segments):
            return made
    made = _plan(segments)
    _plans = ((segments.clone(), made), *kept)[:PLANS_KEPT]
    return made


def _plan(segments: Tensor) -> Plan:
    groups: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    intervals = []
    num_tokens = end_row = end_place = max_length = places = 0
    shared_places = False
    table: list[list[int]] = segments.flatten(1).tolist()
    for sequence, (text, num_text, text_place, image, num_image, image_place) in enumerate(table):
        shape = (num_text, text_place if num_text else 0, num_image, image_place if num_image else 0)
        groups.setdefault(shape, []).append((text, image, sequence))
        num_tokens += num_text + num_image
        max_length = max(max_length, num_text + num_image)
        if num_text and num_image:
            shared_places |= text_place < image_place + num_image and image_place < text_place + num_text
        for row, length, place in ((text, num_text, text_place), (image, num_image, image_place)):
            if length:
                end_row, end_place = max(end_row, row + length), max(end_place, place + length)
                intervals.append((row, row + length))
                places |= place
    buckets = []
    for (num_text, text_place, num_image, image_place), members in groups.items():
        if num_text + num_image > 0:
            members.sort()
            texts, images, sequences = zip(*members, strict=True)
            parts = (_part(texts, num_text, text_place), _part(images, num_image, image_place))
            present = tuple(part for part in parts if part.length)
            buckets.append(Bucket(torch.tensor(sequences), present, num_text + num_image))
    lowest = min((min(row) for row in table), default=0)
    empty = any(num_text + num_image == 0 for num_text, _, num_image, _ in groups)
    intervals.sort()
    overlaps = any(second < end for (_, end), (second, _) in pairwise(intervals))
    alignment = min(places & -places or 8, 8)
    return Plan(
        *(tuple(buckets), num_tokens, end_row, end_place, max_length, lowest),
        *(overlaps, empty, shared_places, alignment),
    )


def _part(firsts: tuple[int, ...], length: int, place: int) -> Part:
    if all(second - first == length for first, second in pairwise(firsts)):
        return Part(firsts[0], None, length, place)
    rows = torch.tensor(firsts)[:, None] + torch.arange(length)
    return Part(None, rows.flatten(), length, place)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Plan,
    bias: Tensor | None,
    cls_only: bool,
    scale: float,
    engine: str,
) -> Tensor:
    """softmax(scale * query key^T + bias) value within each sequence.

    Args:
        query: (N, H, d), or (B, H, d) with `cls_only`.
        key: (N, H, d).
        value: (N, H, d).
        packing: the sequences.
        bias: (H, R, R) or None.
        cls_only: whether each sequence has one query, that of its first token.
        scale: factor of the scores.
        engine: what computes a chunk: written-out matrix products ("bucketed"), "sdpa" or "xformers".

    Returns:
        Like the query, contiguous.
    """
    out = _like_rows(query, packing, cls_only)
    for bucket in packing.buckets:
        q, k, v = _inputs(query, key, value, bucket, cls_only)
        results = _room(out, bucket, cls_only)  # (n, Q, H, d)
        for chunk in _chunks(bucket, query, cls_only):
            q_c, k_c, v_c = (x[chunk].transpose(1, 2) for x in (q, k, v))  # (c, h, Q or S, d) each
            results[chunk] = _attend_chunk(q_c, k_c, v_c, bias, bucket, chunk[2], scale, engine).transpose(1, 2)
        _write(out, results, bucket, cls_only)
    return out


def _attend_chunk(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, bucket: Bucket, heads: slice, scale: float, engine: str
) -> Tensor:
    if engine == "bucketed":
        weights = _weights(q, k, bias, bucket, heads, scale)
        return (weights.to(v.dtype).flatten(0, 1) @ v.flatten(0, 1)).unflatten(0, q.shape[:2])
    # Detached, since fused kernels refuse a mask that wants a gradient; that is `attend_backward`'s work.
    local = None if bias is None else _bias_of(bias.detach()[heads], bucket, q.shape[2] == 1)  # (h, Q, S)
    attend_fused = _fused.sdpa if engine == "sdpa" else _fused.xformers
    return attend_fused(q.detach(), k.detach(), v.detach(), local, None, scale)


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Plan,
    bias: Tensor | None,
    cls_only: bool,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias (empty without `bias_grad`) from that of `attend`'s result.

    With P the weights: dV = P^T dO, dS = P (dO V^T - rowsum(P dO V^T)), dQ = scale dS K, dK = scale dS^T Q, and the
    gradient of the bias is dS summed over the sequences.
    """
    grads = [_like_rows(query, packing, cls_only), _like_rows(key, packing), _like_rows(value, packing)]
    compute_dtype = torch.promote_types(query.dtype, torch.float32)
    d_bias = query.new_zeros(0) if bias is None or not bias_grad else torch.zeros_like(bias, dtype=compute_dtype)
    for bucket in packing.buckets:
        q, k, v = _inputs(query, key, value, bucket, cls_only)
        go = _query_rows(grad, bucket, cls_only)
        results = [_room(grads[0], bucket, cls_only), _room(grads[1], bucket), _room(grads[2], bucket)]
        for chunk in _chunks(bucket, query, cls_only):
            q_c, k_c, v_c, go_c = (x[chunk].transpose(1, 2).flatten(0, 1) for x in (q, k, v, go))  # (c h, Q or S, d)
            size = (-1, chunk[2].stop - chunk[2].start)
            weights = _weights(q_c.unflatten(0, size), k_c.unflatten(0, size), bias, bucket, chunk[2], scale)
            p = weights.flatten(0, 1)  # (c h, Q, S)
            d_p = _product(go_c, v_c.transpose(1, 2))
            d_s = torch._softmax_backward_data(d_p, p, -1, p.dtype)
            if bias is not None and bias_grad:
                _add_bias_grad(d_bias[chunk[2]], d_s.unflatten(0, size), bucket)
            d_s = d_s.to(q.dtype)
            d_v = p.to(v.dtype).transpose(1, 2) @ go_c
            d_q, d_k = (d_s @ k_c) * scale, (d_s.transpose(1, 2) @ q_c) * scale
            for result, part in zip(results, (d_q, d_k, d_v), strict=True):
                result[chunk] = part.unflatten(0, size).transpose(1, 2)
        _write(grads[0], results[0], bucket, cls_only)
        _write(grads[1], results[1], bucket)
        _write(grads[2], results[2], bucket)
    if bias is not None and bias_grad:
        d_bias = d_bias.to(bias.dtype)
    return grads[0], grads[1], grads[2], d_bias


def _weights(q: Tensor, k: Tensor, bias: Tensor | None, bucket: Bucket, heads: slice, scale: float) -> Tensor:
    """softmax(scale * q k^T + bias), (c, h, Q, S), in float32 at least."""
    scores = _product(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).unflatten(0, q.shape[:2])  # (c, h, Q, S)
    if bias is None:
        scores *= scale
    else:
        local = _bias_of(bias[heads], bucket, q.shape[2] == 1).to(scores.dtype)
        torch.add(local, scores, alpha=scale, out=scores)
    return torch.softmax(scores, dim=-1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The batched matrix product with a result in float32 at least."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.device.type == "cuda":
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _bias_of(bias: Tensor, bucket: Bucket, first_query: bool) -> Tensor:
    """The bias between the tokens of one sequence of a bucket: (h, S, S), or (h, 1, S) of its first token."""
    parts = bucket.parts
    spans = [slice(part.place, part.place + part.length) for part in parts]
    if len(parts) == 2 and spans[0].stop == spans[1].start:
        spans = [slice(spans[0].start, spans[1].stop)]
    if first_query:
        rows = [slice(spans[0].start, spans[0].start + 1)]
    else:
        rows = spans
    blocks = [[bias[:, row, column] for column in spans] for row in rows]
    if len(spans) == 1:
        return blocks[0][0]
    return torch.cat([torch.cat(line, dim=2) for line in blocks], dim=1)


def _add_bias_grad(d_bias: Tensor, d_scores: Tensor, bucket: Bucket) -> None:
    """Add the gradient of a chunk's scores, (c, h, Q, S), into that of the bias."""
    summed = d_scores.sum(0) if len(d_scores) > 1 else d_scores[0]  # (h, Q, S)
    first_query = summed.shape[1] == 1
    top = 0
    for row in bucket.parts[:1] if first_query else bucket.parts:
        height = 1 if first_query else row.length
        left = 0
        for column in bucket.parts:
            target = d_bias[:, row.place : row.place + height, column.place : column.place + column.length]
            target += summed[:, top : top + height, left : left + column.length]
            left += column.length
        top += height


def _inputs(query: Tensor, key: Tensor, value: Tensor, bucket: Bucket, cls_only: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(n, Q, H, d), (n, S, H, d) and (n, S, H, d) of a bucket."""
    return _query_rows(query, bucket, cls_only), _rows(key, bucket), _rows(value, bucket)


def _query_rows(query: Tensor, bucket: Bucket, cls_only: bool) -> Tensor:
    if cls_only:
        return query[bucket.sequences.to(query.device)][:, None]
    return _rows(query, bucket)


def _rows(x: Tensor, bucket: Bucket) -> Tensor:
    """The rows of a bucket, (n, S, H, d); a view where it has one part that lies in one piece."""
    number = len(bucket.sequences)
    pieces = []
    for part in bucket.parts:
        if part.rows is None:
            assert part.first_row is not None
            piece = x[part.first_row : part.first_row + number * part.length]
        else:
            piece = x.index_select(0, part.rows.to(x.device))
        pieces.append(piece.unflatten(0, (number, part.length)))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _room(out: Tensor, bucket: Bucket, cls_only: bool = False) -> Tensor:
    """Where the results of a bucket go, (n, Q, H, d): the rows of `out` where they are one piece, else a tensor."""
    if not cls_only and len(bucket.parts) == 1 and bucket.parts[0].rows is None:
        return _rows(out, bucket)
    return out.new_empty(len(bucket.sequences), 1 if cls_only else bucket.length, *out.shape[1:])


def _write(out: Tensor, results: Tensor, bucket: Bucket, cls_only: bool = False) -> None:
    """Put what `_room` gave into the rows of a bucket, or into the rows of its sequences."""
    if cls_only:
        out[bucket.sequences.to(out.device)] = results[:, 0]
        return
    if len(bucket.parts) == 1 and bucket.parts[0].rows is None:
        return
    for part, piece in zip(bucket.parts, results.split([part.length for part in bucket.parts], dim=1), strict=True):
        if part.rows is None:
            assert part.first_row is not None
            target = out[part.first_row : part.first_row + len(piece) * part.length]
            target.unflatten(0, piece.shape[:2]).copy_(piece)
        else:
            out[part.rows.to(out.device)] = piece.flatten(0, 1)


def _like_rows(x: Tensor, packing: Plan, cls_only: bool = False) -> Tensor:
    """An empty contiguous tensor like `x`, with zeros where rows belong to no sequence."""
    whole = not packing.empty_sequences if cls_only else packing.num_tokens == len(x)
    make = torch.empty if whole else torch.zeros
    return make(x.shape, dtype=x.dtype, device=x.device)


def _chunks(bucket: Bucket, query: Tensor, cls_only: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Slices (sequences, all rows, heads) whose scores fit the limit, or a single head's of a single sequence."""
    heads, number = query.shape[1], len(bucket.sequences)
    limit = CHUNK_BYTES.get(query.device.type, CHUNK_BYTES_ELSEWHERE)
    per_head = (1 if cls_only else bucket.length) * bucket.length * max(4, query.element_size())
    head_step = max(1, min(heads, limit // per_head))
    step = max(1, limit // (per_head * heads))
    for first in range(0, number, step):
        for head in range(0, heads, head_step):
            yield slice(first, min(first + step, number)), slice(None), slice(head, min(head + head_step, heads))
