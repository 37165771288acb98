"""Packed attention on torch's own operators: sequences of one shape are computed together, as views where they lie so.

The scores of a few sequences are all that exists at a time. That is kind to memory, and on a CPU to the cache: chunks
of 4 MB beat whole buckets (docs/log.md). The backward pass computes the weights anew.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vlmo_fast.ops.packed import PackedAttentionBackend
from vlmo_fast.ops.packed.plan import Bucket, Packing
from vlmo_fast.ops.padded import fused

__all__ = ["MATMULS", "SDPA", "XFORMERS"]

CHUNK_BYTES = {"cpu": 4 << 20}  # scores at a time; docs/log.md
CHUNK_BYTES_ELSEWHERE = 256 << 20


class _Bucketed(PackedAttentionBackend):
    """Chunks of a bucket one after the other; what a chunk's forward pass runs on is a subclass's part."""

    @abstractmethod
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, bucket: Bucket, heads: slice, scale: float
    ) -> Tensor:
        """The result of a chunk, (c, h, Q, d), from its queries (c, h, Q, d), keys and values (c, h, S, d)."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, packing: Packing, scale: float
    ) -> tuple[Tensor, Tensor]:
        plan, cls_only = packing.plan(len(key), bias), packing.cls_only
        out = plan.alloc_like(query, cls_only)
        for bucket in plan.buckets:
            q, k, v = _inputs(query, key, value, bucket, cls_only)
            results = _alloc_results(out, bucket, cls_only)  # (n, Q, H, d)
            for chunk in _chunks(bucket, query, cls_only):
                q_c, k_c, v_c = (x[chunk].transpose(1, 2) for x in (q, k, v))  # (c, h, Q or S, d) each
                results[chunk] = self.attend(q_c, k_c, v_c, bias, bucket, chunk[2], scale).transpose(1, 2)
            _write(out, results, bucket, cls_only)
        return out, self.saved(query, key)

    def saved(self, query: Tensor, key: Tensor) -> Tensor:
        """Nothing."""
        return query.new_empty(0, dtype=torch.float32)

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        out: Tensor,
        saved: Tensor,
        packing: Packing,
        scale: float,
        bias_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `PackedAttentionBackend`.

        With P the weights: dV = P^T dO, dS = P (dO V^T - rowsum(P dO V^T)), dQ = scale dS K, dK = scale dS^T Q, and the
        gradient of the bias is dS summed over the sequences.
        """
        plan, cls_only = packing.plan(len(key), bias), packing.cls_only
        grads = [plan.alloc_like(query, cls_only), plan.alloc_like(key), plan.alloc_like(value)]
        compute_dtype = torch.promote_types(query.dtype, torch.float32)
        d_bias = query.new_zeros(0) if bias is None or not bias_grad else torch.zeros_like(bias, dtype=compute_dtype)
        for bucket in plan.buckets:
            q, k, v = _inputs(query, key, value, bucket, cls_only)
            go = _query_rows(grad, bucket, cls_only)
            results = [
                _alloc_results(grads[0], bucket, cls_only),
                _alloc_results(grads[1], bucket),
                _alloc_results(grads[2], bucket),
            ]
            for chunk in _chunks(bucket, query, cls_only):
                q_c, k_c, v_c, go_c = (
                    x[chunk].transpose(1, 2).flatten(0, 1) for x in (q, k, v, go)
                )  # (c h, Q or S, d)
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


class _Matmuls(_Bucketed):
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, bucket: Bucket, heads: slice, scale: float
    ) -> Tensor:
        weights = _weights(q, k, bias, bucket, heads, scale)
        return (weights.to(v.dtype).flatten(0, 1) @ v.flatten(0, 1)).unflatten(0, q.shape[:2])


class _Fused(_Bucketed):
    def __init__(self, attention: Callable[..., Tensor]) -> None:
        self.attention = attention  # as `padded.fused` has them

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, bucket: Bucket, heads: slice, scale: float
    ) -> Tensor:
        # Detached, since fused kernels refuse a mask that wants a gradient; that is `backward`'s work.
        local = None if bias is None else _bias_of(bias.detach()[heads], bucket, q.shape[2] == 1)  # (h, Q, S)
        return self.attention(q.detach(), k.detach(), v.detach(), local, None, scale)


MATMULS, SDPA, XFORMERS = _Matmuls(), _Fused(fused.sdpa), _Fused(fused.xformers)


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
    spans = [slice(part.bias_row, part.bias_row + part.length) for part in parts]
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
            target = d_bias[:, row.bias_row : row.bias_row + height, column.bias_row : column.bias_row + column.length]
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


def _alloc_results(out: Tensor, bucket: Bucket, cls_only: bool = False) -> Tensor:
    """Where the results of a bucket go, (n, Q, H, d): the rows of `out` where they are one piece, else a tensor."""
    if not cls_only and len(bucket.parts) == 1 and bucket.parts[0].rows is None:
        return _rows(out, bucket)
    return out.new_empty(len(bucket.sequences), 1 if cls_only else bucket.length, *out.shape[1:])


def _write(out: Tensor, results: Tensor, bucket: Bucket, cls_only: bool = False) -> None:
    """Put what `_alloc_results` gave into the rows of a bucket, or into the rows of its sequences."""
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
