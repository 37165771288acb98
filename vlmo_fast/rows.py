"""Which row is which token: what the blocks are told of the matrix of tokens that they work on.

Tokens travel as one matrix of rows, those of texts before those of images, so that each expert owns a contiguous range.
A plan says which is which before the forward pass starts, and the model follows it: `PaddedPlan` is that of a padded
batch, whose sequences share one shape; `vlmo_fast.PackedLayout` is that of any mixture of texts, images and pairs.

Shape suffixes: B sequences, S tokens of a sequence, N rows, M output rows, R rows of the bias, D width, d width of a
head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmo_fast import ops
from vlmo_fast.config import MODALITIES

__all__ = ["AttentionPart", "Groups", "LayerRows", "PaddedPlan", "PaddedRows", "Plan", "Rows", "plan_padded"]

Groups: TypeAlias = tuple[tuple[str, int], ...]  # expert and number of rows of adjacent groups of rows


class Rows(Protocol):
    """The rows of one layer: which belong together, which are whose expert's, and which the layer puts out."""

    @property
    def num_sequences(self) -> int:
        """B."""

    @property
    def keeps_all(self) -> bool:
        """Whether all rows are put out."""

    @property
    def modality_groups(self) -> Groups:
        """Groups of output rows where no expert fuses modalities."""

    @property
    def fusion_groups(self) -> Groups:
        """Groups of output rows in the fusion layers."""

    def keep(self, x: Tensor) -> Tensor:
        """The output rows of x, (N, ...) -> (M, ...)."""

    def per_segment(self, values: Tensor) -> Tensor:
        """Values of each sequence's text and image, (B, 2), as one of each output row, (M,)."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, backends: Mapping[str, str]
    ) -> Tensor:
        """Attention within sequences.

        Args:
            query: (M, heads, d), of the output rows.
            key: (N, heads, d).
            value: (N, heads, d).
            bias: (heads, R, R), or None.
            backends: of the ops "attention" and "packed_attention", "auto" or one of their implementations.

        Returns:
            (M, heads, d).
        """


class Plan(Protocol):
    """Which row is which token, from the embeddings to the last layer."""

    @property
    def text_span(self) -> int:
        """Texts' share of the bias matrix."""

    @property
    def windows(self) -> tuple[int, ...]:
        """Patches along a side of the images, each size once."""

    @property
    def fuses(self) -> bool:
        """Whether the fusion layers take the groups of fusion, not those of the modalities."""

    @property
    def lower(self) -> Rows:
        """Rows below the fusion layers."""

    @property
    def branch_rows(self) -> Tensor | None:
        """The lower row, (N,) int64, that each row of the fusion layers starts from; None where it is that very row."""

    @property
    def upper(self) -> Rows:
        """Rows of the fusion layers."""

    @property
    def last(self) -> Rows:
        """Rows of the last layer."""

    def place_texts(self, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Ids (..., T) in the order of their rows, and their places in the texts; None for 0, 1, ... in each."""

    def place_images(self, tokens: Tensor) -> Tensor:
        """The images' tokens, (N_image, D) in the images' order, in the order of their rows."""


@dataclass(frozen=True)
class PaddedRows:
    """The rows of a padded batch, whose sequences share one shape: those of all texts, then those of all images.

    Attributes:
        num_sequences: B.
        num_text: tokens of a text, padding among them; 0 where there is none.
        num_image: tokens of an image; 0 where there is none.
        key_mask: (B, S) bool, False for padding, or None.
        cls_only: whether the first token of each sequence is all that is put out.
    """

    num_sequences: int
    num_text: int
    num_image: int
    key_mask: Tensor | None = None
    cls_only: bool = False

    @property
    def keeps_all(self) -> bool:
        """Whether all rows are put out."""
        return not self.cls_only

    @property
    def modality_groups(self) -> Groups:
        """Groups of output rows where no expert fuses modalities."""
        if self.cls_only:
            return ((MODALITIES[0 if self.num_text else 1], self.num_sequences),)
        counts = zip(MODALITIES, (self.num_text, self.num_image), strict=True)
        return tuple((name, self.num_sequences * count) for name, count in counts if count)

    @property
    def fusion_groups(self) -> Groups:
        """Groups of output rows where the vision-language expert takes them all."""
        return (("vl", sum(count for _, count in self.modality_groups)),)

    def keep(self, x: Tensor) -> Tensor:
        """The output rows of x, (N, ...) -> (M, ...)."""
        if not self.cls_only:
            return x
        tokens = self.num_text or self.num_image
        return x[: self.num_sequences * tokens].unflatten(0, (self.num_sequences, tokens))[:, 0]

    def per_segment(self, values: Tensor) -> Tensor:
        """Values of each sequence's text and image, (B, 2), as one of each output row, (M,)."""
        text, image = values.unbind(dim=1)
        if self.cls_only:
            return text if self.num_text else image
        return torch.cat([text.repeat_interleave(self.num_text), image.repeat_interleave(self.num_image)])

    def padded(self, x: Tensor) -> Tensor:
        """Output rows (M, ...) by sequence, text before image: (B, S, ...); (B, 1, ...) with `cls_only`."""
        if self.cls_only:
            return x[:, None]
        num_text_rows = self.num_sequences * self.num_text
        parts = [
            part.unflatten(0, (self.num_sequences, count))
            for part, count in ((x[:num_text_rows], self.num_text), (x[num_text_rows:], self.num_image))
            if count
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, backends: Mapping[str, str]
    ) -> Tensor:
        """See `Rows`; R is S, the tokens of a sequence."""
        everything = replace(self, cls_only=False)
        if bias is not None and self.cls_only:
            bias = bias[:, :1]
        query = self.padded(query).transpose(1, 2)  # (B, heads, S, d)
        key, value = (everything.padded(x).transpose(1, 2) for x in (key, value))
        attended = ops.attention(query, key, value, bias, self.key_mask, backend=backends["attention"]).transpose(1, 2)
        if self.cls_only:
            return attended[:, 0]
        if not self.num_text or not self.num_image:
            return attended.flatten(0, 1)
        text, image = attended.split([self.num_text, self.num_image], dim=1)
        return torch.cat([text.flatten(0, 1), image.flatten(0, 1)])


@dataclass(frozen=True)
class PaddedPlan:
    """The plan of a padded batch.

    Attributes:
        lower: the rows of all layers but the last.
        last: those of the last layer.
        fuses: whether the vision-language expert takes all rows in the fusion layers: those of pairs, and those of a
            text or an image alone on the VL branch.
        windows: patches along a side of the images, none for texts alone.
    """

    lower: PaddedRows
    last: PaddedRows
    fuses: bool
    windows: tuple[int, ...]
    branch_rows: None = None

    @property
    def upper(self) -> PaddedRows:
        """Rows of the fusion layers."""
        return self.lower

    @property
    def text_span(self) -> int:
        """Texts' share of the bias matrix."""
        return self.lower.num_text

    def place_texts(self, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Plan`."""
        return input_ids, None

    def place_images(self, tokens: Tensor) -> Tensor:
        """See `Plan`."""
        return tokens


class AttentionPart(NamedTuple):
    """Sequences on adjacent rows that attend in one call.

    Attributes:
        first_row: where their rows begin.
        num_rows: how many rows they have.
        num_kept: how many of these are put out.
        cls_only: whether the output rows are the sequences' first tokens.
        segments: (B, 2, 3) int32, of each sequence its text and its image: first row (counted from `first_row`),
            length (0 where it has none) and first row of the bias matrix.
        host_segments: the same on the CPU.
        max_length: tokens of the longest sequence.
    """

    first_row: int
    num_rows: int
    num_kept: int
    cls_only: bool
    segments: Tensor
    host_segments: Tensor
    max_length: int


@dataclass(frozen=True)
class LayerRows:
    """The rows of one layer.

    Attributes:
        modality_groups: expert and number of output rows of each group, in order, where no expert fuses modalities.
        fusion_groups: the same for the fusion layers.
        parts: how attention is called.
        kept: (M,) int64, the output rows; None where all are.
        segment: (M,) int64, of each output row twice the number of its sequence, plus 1 where it is an image's.
        num_sequences: B.
    """

    modality_groups: Groups
    fusion_groups: Groups
    parts: tuple[AttentionPart, ...]
    kept: Tensor | None
    segment: Tensor
    num_sequences: int

    @property
    def keeps_all(self) -> bool:
        """Whether all rows are put out."""
        return self.kept is None

    def keep(self, x: Tensor) -> Tensor:
        """The output rows of x, (N, ...) -> (M, ...)."""
        return x if self.kept is None else x[self.kept]

    def per_segment(self, values: Tensor) -> Tensor:
        """Values of each sequence's text and image, (B, 2), as one of each output row, (M,)."""
        return values.flatten()[self.segment]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, backends: Mapping[str, str]
    ) -> Tensor:
        """See `Rows`."""
        attended = []
        for part, rows in zip(self.parts, query.split([part.num_kept for part in self.parts]), strict=True):
            keys = slice(part.first_row, part.first_row + part.num_rows)
            attended.append(
                ops.packed_attention(
                    rows,
                    key[keys],
                    value[keys],
                    part.segments,
                    bias,
                    host_segments=part.host_segments,
                    max_length=part.max_length,
                    cls_only=part.cls_only,
                    backend=backends["packed_attention"],
                )
            )
        return attended[0] if len(attended) == 1 else torch.cat(attended)


def plan_padded(
    num_sequences: int, num_text: int, windows: tuple[int, ...], attention_mask: Tensor | None, *, cls_only: bool
) -> PaddedPlan:
    """The plan of a padded batch.

    Args:
        num_sequences: B.
        num_text: tokens of a text, padding among them; 0 for images alone.
        windows: patches along a side of the images, none for texts alone.
        attention_mask: (B, num_text), 0 for padding, or None; image tokens are always real.
        cls_only: whether the last layer puts out the first token of each sequence alone.
    """
    num_image = sum(1 + window**2 for window in windows)
    key_mask = None if attention_mask is None else F.pad(attention_mask != 0, (0, num_image), value=True)
    rows = PaddedRows(num_sequences, num_text, num_image, key_mask)
    return PaddedPlan(rows, replace(rows, cls_only=cls_only), fuses=bool(num_text and num_image), windows=windows)
