"""A packing on the host: which sequences have one shape and where they lie, checked and kept."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Bucket", "Packing", "Part", "Plan", "alloc_like", "plan"]

PLANS_KEPT = 8  # a training step attends over two or three packings, in every layer


class Packing(NamedTuple):
    """How sequences lie in a packed batch.

    Attributes:
        segments: (B, 2, 3) int32 on the query's device, as `ops.packed_attention` has them.
        host_segments: the same on the CPU, or None.
        max_length: tokens of the longest sequence, or an upper bound.
        cls_only: whether each sequence has one query, that of its first token.
    """

    segments: Tensor
    host_segments: Tensor | None
    max_length: int
    cls_only: bool

    def is_on_host(self) -> bool:
        """Whether `plan` need not wait for a device."""
        return self.segments.device.type == "cpu" or self.host_segments is not None

    def plan(self, num_rows: int, bias: Tensor | None) -> Plan:
        """The packing on the host, checked.

        Args:
            num_rows: N, rows of the keys.
            bias: (H, R, R) or None.

        Raises:
            ValueError: segments overlap, leave their range, or are longer than `max_length`.
        """
        host = self.host_segments
        found = plan(self.segments.cpu() if host is None or self.segments.device.type == "cpu" else host)
        if found.lowest < 0:
            raise ValueError(f"packed_attention: segments must not be negative, got {found.lowest}")
        if found.end_row > num_rows:
            raise ValueError(f"packed_attention: segments must stay within {num_rows} rows, got {found.end_row}")
        if found.overlaps:
            raise ValueError("packed_attention: segments must not overlap, got a row in two of them")
        if bias is not None and found.shared_bias_rows:
            raise ValueError(
                "packed_attention: segments must not share bias rows in one sequence, got a text that does"
            )
        if bias is not None and found.end_bias_row > bias.shape[1]:
            raise ValueError(
                f"packed_attention: segments must stay within {bias.shape[1]} bias rows, got {found.end_bias_row}"
            )
        if found.max_length > self.max_length:
            raise ValueError(
                f"packed_attention: max_length must be at least {found.max_length} tokens, got {self.max_length}"
            )
        return found


class Part(NamedTuple):
    """The tokens of one modality in a bucket's sequences.

    Attributes:
        first_row: their first row, where all of them lie one after the other; otherwise None.
        rows: (n * length,) int64 of their rows, where they do not.
        length: tokens a sequence.
        bias_row: row of the bias of the first token.
    """

    first_row: int | None
    rows: Tensor | None
    length: int
    bias_row: int


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
        end_bias_row: one past the last row of the bias used.
        max_length: tokens of the longest sequence.
        lowest: the smallest number in the table, which must not be negative.
        overlaps: whether a row belongs to two segments, which must not be.
        empty_sequences: whether a sequence has no tokens.
        shared_bias_rows: whether text and image of a sequence share rows of the bias, which they must not.
        bias_alignment: the largest power of two, at most 8, that divides every first bias row.
    """

    buckets: tuple[Bucket, ...]
    num_tokens: int
    end_row: int
    end_bias_row: int
    max_length: int
    lowest: int
    overlaps: bool
    empty_sequences: bool
    shared_bias_rows: bool
    bias_alignment: int

    def covers(self, rows: Tensor, cls_only: bool = False) -> bool:
        """Whether each row belongs to a sequence: of (N, H, d), or with `cls_only` of (B, H, d)."""
        return not self.empty_sequences if cls_only else self.num_tokens == len(rows)

    def alloc_like(self, rows: Tensor, cls_only: bool = False) -> Tensor:
        """A contiguous tensor for results like `rows`: zeros where some rows belong to no sequence, else empty."""
        return alloc_like(rows, self.covers(rows, cls_only))


def alloc_like(rows: Tensor, covered: bool) -> Tensor:
    """A contiguous tensor like `rows`, empty where each row will be written, else of zeros."""
    make = torch.empty if covered else torch.zeros
    return make(rows.shape, dtype=rows.dtype, device=rows.device)


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
    num_tokens = end_row = end_bias_row = max_length = bias_rows = 0
    shared_bias_rows = False
    table: list[list[int]] = segments.flatten(1).tolist()
    for sequence, (text, num_text, text_bias_row, image, num_image, image_bias_row) in enumerate(table):
        shape = (num_text, text_bias_row if num_text else 0, num_image, image_bias_row if num_image else 0)
        groups.setdefault(shape, []).append((text, image, sequence))
        num_tokens += num_text + num_image
        max_length = max(max_length, num_text + num_image)
        if num_text and num_image:
            shared_bias_rows |= text_bias_row < image_bias_row + num_image and image_bias_row < text_bias_row + num_text
        for row, length, bias_row in ((text, num_text, text_bias_row), (image, num_image, image_bias_row)):
            if length:
                end_row, end_bias_row = max(end_row, row + length), max(end_bias_row, bias_row + length)
                intervals.append((row, row + length))
                bias_rows |= bias_row
    buckets = []
    for (num_text, text_bias_row, num_image, image_bias_row), members in groups.items():
        if num_text + num_image > 0:
            members.sort()
            texts, images, sequences = zip(*members, strict=True)
            parts = (_part(texts, num_text, text_bias_row), _part(images, num_image, image_bias_row))
            present = tuple(part for part in parts if part.length)
            buckets.append(Bucket(torch.tensor(sequences), present, num_text + num_image))
    lowest = min((min(row) for row in table), default=0)
    empty = any(num_text + num_image == 0 for num_text, _, num_image, _ in groups)
    intervals.sort()
    overlaps = any(second < end for (_, end), (second, _) in pairwise(intervals))
    alignment = min(bias_rows & -bias_rows or 8, 8)
    return Plan(
        *(tuple(buckets), num_tokens, end_row, end_bias_row, max_length, lowest),
        *(overlaps, empty, shared_bias_rows, alignment),
    )


def _part(firsts: tuple[int, ...], length: int, bias_row: int) -> Part:
    if all(second - first == length for first, second in pairwise(firsts)):
        return Part(firsts[0], None, length, bias_row)
    rows = torch.tensor(firsts)[:, None] + torch.arange(length)
    return Part(None, rows.flatten(), length, bias_row)
