"""Packed tokens: any mixture of images, texts and pairs as one matrix of rows, with no padded token anywhere.

A layout says which row of the matrix is which token. Rows are modality-major, so that each expert of a layer owns one
contiguous range of them and none is gathered, sliced or concatenated for the experts' sake:

    below the fusion layers    [ texts | texts of pairs | images of pairs | images ]
                                 language .............   vision .................
    in the fusion layers       [ texts | texts (VL) | texts of pairs | images of pairs | images (VL) | images ]
                                 language  vl ....................................................... vision

(VL) is the VL branch of a text or an image alone: from the first fusion layer on one more sequence, whose rows are
copied once. Attention runs within sequences; the tokens of a sequence lie in one or two runs of rows.

`pack` plans on the host, with a few vectorised operations and no look at any device; the model only follows the plan.
Shape suffixes: N rows, B sequences, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmo_fast.config import MODALITIES
from vlmo_fast.rows import AttentionPart, Groups, LayerRows
from vlmo_fast.watch import values_are_visible

__all__ = ["Kind", "PackedLayout", "pack", "pack_padded"]

Kind: TypeAlias = Literal["text", "vl_text", "pair", "vl_image", "image"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # in the order of the rows
FUSION_EXPERTS = (MODALITIES[0], "vl", "vl", "vl", MODALITIES[1])  # of these kinds

BIAS_STEP = 8  # texts' share of the bias matrix is a multiple of this, so that few sizes of it occur


@dataclass(frozen=True)
class PackedLayout:
    """Which row is which token, of a packed batch. Made by `pack`.

    Attributes:
        num_texts: texts given to the model.
        longest_text: tokens of the longest of them.
        image_runs: (patches along a side, number of images) of the images given to the model, in order.
        num_sequences: sequences of each kind: texts, texts on the VL branch, pairs, images on the VL branch, images.
        text_index: (N_text,) int64, the text of each text row below the fusion layers.
        text_position: (N_text,) int64, its place in the text.
        image_rows: (N_image,) int64, of each image row its row among the tokens of all images, in their order; None
            where it is that very row.
        text_span: texts' share of the bias matrix.
        windows: patches along a side of the images, each size once, ascending; their shares follow in this order.
        lower: rows below the fusion layers.
        branch_rows: (N,) int64, the lower row that each row of the fusion layers starts from; None where it is that
            very row.
        upper: rows of the fusion layers.
        last: rows of the last layer, which puts out those asked for alone.
        starts: first output row of each sequence's text and image, (B, 2) int64 on the CPU; by kind, and within a kind
            in the caller's order.
        lengths: how many text and image rows of each sequence are put out, (B, 2) int64 on the CPU.
        cls_rows: (B,) int64, the output row of each sequence's first token, in the same order.
    """

    num_texts: int
    longest_text: int
    image_runs: tuple[tuple[int, int], ...]
    num_sequences: tuple[int, ...]
    text_index: Tensor
    text_position: Tensor
    image_rows: Tensor | None
    text_span: int
    windows: tuple[int, ...]
    lower: LayerRows
    branch_rows: Tensor | None
    upper: LayerRows
    last: LayerRows
    starts: Tensor
    lengths: Tensor
    cls_rows: Tensor

    @property
    def fuses(self) -> bool:
        """Whether the fusion layers take the groups of fusion: those of each kind of sequence."""
        return True

    def place_texts(self, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Plan`: of (texts, T) ids those of the rows, (N_text,)."""
        return input_ids[self.text_index, self.text_position], self.text_position

    def place_images(self, tokens: Tensor) -> Tensor:
        """See `Plan`."""
        return tokens if self.image_rows is None else tokens[self.image_rows]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of which there are sequences."""
        return tuple(kind for kind, count in zip(KINDS, self.num_sequences, strict=True) if count)

    def of_kind(self, kind: str) -> slice:
        """Where the sequences of a kind are in `starts`, `lengths` and `cls_rows`."""
        place = KINDS.index(cast("Kind", kind))
        before = sum(self.num_sequences[:place])
        return slice(before, before + self.num_sequences[place])

    def first_tokens(self, hidden: Tensor, kind: str) -> Tensor:
        """The first token of each sequence of a kind, (M, D) output rows -> (B_kind, D), in the caller's order."""
        return hidden[self.cls_rows[self.of_kind(kind)]]

    def token_rows(self, kind: str, sequences: Tensor, positions: Tensor) -> Tensor:
        """Output rows of single text tokens of a kind whose tokens were all asked for.

        Args:
            kind: "text", "vl_text" or "pair".
            sequences: (P,) int64, places among the kind's sequences in the caller's order, on the layout's device.
            positions: (P,) int64, places in the texts.

        Returns:
            (P,) int64.
        """
        return self.cls_rows[self.of_kind(kind)][sequences] + positions

    def unpack(self, hidden: Tensor, kind: str) -> tuple[Tensor, ...]:
        """The output tokens of each sequence of a kind, text before image, in the caller's order.

        Args:
            hidden: (M, D), the last layer's output rows.
            kind: one of `KINDS`.

        Returns:
            A tensor (S, D) for each sequence; (1, D), the first token, where not all were asked for.
        """
        mine = self.of_kind(kind)
        rows = _expand(self.starts[mine].flatten(), self.lengths[mine].flatten())
        return hidden[rows.to(hidden.device)].split(self.lengths[mine].sum(dim=1).tolist())


def pack(
    text_lengths: Sequence[int] | Tensor = (),
    image_windows: Sequence[int] = (),
    *,
    texts: Sequence[int] | Tensor | None = None,
    images: Sequence[int] | Tensor | None = None,
    pairs: Sequence[tuple[int, int]] | Tensor | None = None,
    vl_branch: bool = False,
    all_tokens: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> PackedLayout:
    """Plan one forward over any mixture of texts, images and pairs.

    Args:
        text_lengths: tokens of each text, at least 1, [CLS] among them; on the host.
        image_windows: patches along a side of each image, at least 1.
        texts: which texts to encode alone, by their place in `text_lengths`; a text may serve several sequences. Where
            `texts`, `images` and `pairs` are all None, each text and each image is encoded alone.
        images: which images to encode alone.
        pairs: (text, image) of each pair to encode jointly.
        vl_branch: also run the texts and images alone with the vision-language experts in the fusion layers.
        all_tokens: kinds of which the last layer computes all tokens: "text", "vl_text", "pair", "vl_image", "image".
            Of the others it computes the first token, which is all that pooled and contrastive outputs need.
        device: where the model is.

    Returns:
        The plan; it may be used for any number of forwards.

    Raises:
        ValueError: a length, a window, an index or a kind is out of range, or there is no sequence at all.
        TypeError: an index or a length is no integer.
    """
    length_of_text = _integers("text_lengths", text_lengths, low=1)
    window_of_image = _integers("image_windows", image_windows, low=1)
    if texts is None and images is None and pairs is None:
        texts, images = range(len(length_of_text)), range(len(window_of_image))
    alone_texts = _integers("texts", () if texts is None else texts, low=0, high=len(length_of_text))
    alone_images = _integers("images", () if images is None else images, low=0, high=len(window_of_image))
    both = torch.as_tensor([] if pairs is None else pairs)
    if both.numel() and (both.ndim != 2 or both.shape[1] != 2):
        raise ValueError(f"pack: pairs must be (text, image) each, got shape {tuple(both.shape)}")
    both = both.reshape(-1, 2)
    pair_texts = _integers("pairs", both[:, 0], low=0, high=len(length_of_text), rule="name texts")
    pair_images = _integers("pairs", both[:, 1], low=0, high=len(window_of_image), rule="name images")
    if not len(alone_texts) + len(alone_images) + len(pair_texts):
        raise ValueError("pack: texts, images or pairs must hold a sequence, got none")
    unknown = set(all_tokens) - set(KINDS)
    if unknown:
        raise ValueError(f"pack: all_tokens must be some of {KINDS}, got {sorted(unknown)}")

    # A line for each sequence: kind, text and image (-1 where it has none); by kind, in the caller's order.
    kinds = (
        (alone_texts, None),
        (alone_texts if vl_branch else alone_texts[:0], None),
        (pair_texts, pair_images),
        (None, alone_images if vl_branch else alone_images[:0]),
        (None, alone_images),
    )
    lines = [_lines(number, *members) for number, members in enumerate(kinds)]
    num_sequences = tuple(len(rows) for rows in lines)
    kind, text, image = torch.cat(lines).unbind(dim=1)
    tokens_of_image = window_of_image**2 + 1
    lengths = torch.stack([_or_zero(length_of_text, text), _or_zero(tokens_of_image, image)], dim=1)  # (B, 2)

    # In the order of their rows: by kind, and within a kind by shape, so that sequences of one shape are adjacent.
    longest_text, largest_image = lengths.amax(dim=0).tolist()
    order = ((kind * (largest_image + 1) + lengths[:, 1]) * (longest_text + 1) + lengths[:, 0]).argsort(stable=True)
    kind, text, image, lengths = kind[order], text[order], image[order], lengths[order]

    # The bias has a row for each place in a text, as many as the longest needs, then those of each size of image.
    window = _or_zero(window_of_image, image)
    windows = window[window > 0].unique()
    text_span = -(-longest_text // BIAS_STEP) * BIAS_STEP
    shares = F.pad((windows**2 + 1).cumsum(0), (1, 0)) + text_span
    bias_rows = torch.stack([torch.zeros_like(window), shares[torch.searchsorted(windows, window)]], dim=1)

    has_text = lengths[:, 0] > 0
    wants_all = torch.tensor([name in all_tokens for name in KINDS])[kind]
    wanted = torch.where(wants_all[:, None], lengths, torch.stack([has_text, ~has_text], dim=1).long())
    kept_starts = _starts(wanted)
    is_lower = (kind != KINDS.index("vl_text")) & (kind != KINDS.index("vl_image"))
    lower_lengths = lengths[is_lower]
    image_starts = F.pad(tokens_of_image.cumsum(0), (1, 0))
    image_rows = _expand(image_starts[image[is_lower]], lower_lengths[:, 1])
    lower = upper = _layer(kind[is_lower], lower_lengths, lower_lengths, bias_rows[is_lower], KINDS)
    branch_rows = None
    if vl_branch:
        upper = _layer(kind, lengths, lengths, bias_rows, KINDS)
        t, p, i = torch.arange(len(lower_lengths)).split(num_sequences[::2])
        original = torch.cat([t, t, p, i, i])  # the lower sequence that each sequence starts from
        branch_rows = _expand(_starts(lower_lengths)[original], lengths)
    in_place = len(image_rows) == image_starts[-1] and bool((image_rows.diff() == 1).all())
    callers = order.argsort()  # of each of the caller's sequences its place in the order of the rows
    layout = PackedLayout(
        num_texts=len(length_of_text),
        longest_text=int(length_of_text.max()) if len(length_of_text) else 0,
        image_runs=tuple(
            zip(*(x.tolist() for x in window_of_image.unique_consecutive(return_counts=True)), strict=True)
        ),
        num_sequences=num_sequences,
        text_index=text[is_lower].repeat_interleave(lower_lengths[:, 0]),
        text_position=_expand(torch.zeros_like(lower_lengths[:, 0]), lower_lengths[:, 0]),
        image_rows=None if in_place else image_rows,
        text_span=text_span,
        windows=tuple(windows.tolist()),
        lower=lower,
        branch_rows=branch_rows,
        upper=upper,
        last=_layer(kind, lengths, wanted, bias_rows, all_tokens),
        starts=kept_starts[callers],
        lengths=wanted[callers],
        cls_rows=torch.where(has_text, kept_starts[:, 0], kept_starts[:, 1])[callers],
    )
    return layout if torch.device(device).type == "cpu" else _to_device(layout, torch.device(device))


def pack_padded(
    attention_mask: Tensor | None, windows: tuple[int, ...], *, vl_branch: bool, device: torch.device
) -> PackedLayout | None:
    """The plan of a padded batch whose first tokens alone are asked for, without its padding.

    Args:
        attention_mask: (B, T), or None.
        windows: patches along a side of the images, or none for texts alone.
        vl_branch: as for `pack`.
        device: where the model is.

    Returns:
        None where there is nothing to gain: the mask cannot be looked at for free, no text is padded, or not all
        padding is at the ends.
    """
    if attention_mask is None or not values_are_visible(attention_mask):
        return None
    real = attention_mask != 0
    lengths = real.sum(dim=1)
    is_prefix = torch.equal(real, torch.arange(real.shape[1]) < lengths[:, None])
    if not is_prefix or int(lengths.min()) == real.shape[1]:
        return None
    numbers = torch.arange(len(lengths))
    return pack(
        lengths,
        [window for window in windows for _ in numbers],
        texts=None if windows else numbers,
        pairs=numbers[:, None].expand(-1, 2) if windows else None,
        vl_branch=vl_branch,
        device=device,
    )


def _layer(kind: Tensor, lengths: Tensor, wanted: Tensor, bias_rows: Tensor, all_tokens: Collection[str]) -> LayerRows:
    """The rows of a layer from its sequences, in the order of their rows: all arguments but the last (B,) or (B, 2)."""
    sequences_of = torch.bincount(kind, minlength=len(KINDS)).tolist()
    rows_of, kept_of = (
        torch.zeros(len(KINDS), dtype=torch.int64).index_add_(0, kind, counts.sum(dim=1)).tolist()
        for counts in (lengths, wanted)
    )
    starts = _starts(lengths)
    table = torch.stack([starts, lengths, bias_rows], dim=2) * (lengths > 0)[:, :, None]
    parts, sequence, row = [], 0, 0
    present = [number for number, count in enumerate(sequences_of) if count]
    for whole, run in groupby(present, key=lambda number: KINDS[number] in all_tokens):
        numbers = list(run)
        num_sequences, num_rows = sum(sequences_of[n] for n in numbers), sum(rows_of[n] for n in numbers)
        mine = slice(sequence, sequence + num_sequences)
        segments = table[mine].clone()
        segments[:, :, 0] -= row * (segments[:, :, 1] > 0)
        segments = segments.int()
        num_kept = sum(kept_of[n] for n in numbers)
        longest = int(lengths[mine].sum(dim=1).max())
        parts.append(AttentionPart(row, num_rows, num_kept, not whole, segments, segments, longest))
        sequence, row = sequence + num_sequences, row + num_rows
    fused: dict[str, int] = {}
    for name, count in zip(FUSION_EXPERTS, kept_of, strict=True):
        fused[name] = fused.get(name, 0) + count
    num_text, num_image = wanted.sum(dim=0).tolist()
    return LayerRows(
        modality_groups=_present(dict(zip(MODALITIES, (num_text, num_image), strict=True))),
        fusion_groups=_present(fused),
        parts=tuple(parts),
        kept=None if torch.equal(lengths, wanted) else _expand(starts, wanted),
        segment=torch.arange(2 * len(kind)).view(-1, 2).t().flatten().repeat_interleave(wanted.t().flatten()),
        num_sequences=len(kind),
    )


def _present(groups: dict[str, int]) -> Groups:
    return tuple((name, count) for name, count in groups.items() if count)


def _lines(kind: int, text: Tensor | None, image: Tensor | None) -> Tensor:
    """(B, 3): kind, text, image."""
    present = cast("Tensor", image if text is None else text)
    columns = (torch.full_like(present, kind), text, image)
    return torch.stack([torch.full_like(present, -1) if column is None else column for column in columns], dim=1)


def _or_zero(values: Tensor, index: Tensor) -> Tensor:
    """values[index], and 0 where the index is -1."""
    return F.pad(values, (0, 1))[index]


def _starts(lengths: Tensor) -> Tensor:
    """First rows of texts and images, (B, 2), where all texts come first and then all images, by their lengths."""
    flat = lengths.t().flatten()
    return (flat.cumsum(0) - flat).view(2, -1).t()


def _expand(starts: Tensor, lengths: Tensor) -> Tensor:
    """start, start + 1, ... for each of the texts and then of the images, (B, 2) or (B,) -> (lengths.sum(),)."""
    starts, lengths = starts.t().flatten(), lengths.t().flatten()
    shifts = (starts - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
    return shifts + torch.arange(len(shifts))


def _integers(
    name: str, values: Sequence[int] | Tensor, *, low: int, high: int | None = None, rule: str | None = None
) -> Tensor:
    """A checked 1-d int64 tensor on the CPU."""
    tensor = torch.as_tensor(values)
    if not tensor.numel():
        return torch.zeros(0, dtype=torch.int64)
    if tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"pack: {name} must be integers, got {tensor.dtype}")
    if tensor.device.type != "cpu":
        raise ValueError(f"pack: {name} must be on the host (the plan is made there), got a tensor on {tensor.device}")
    if tensor.ndim != 1:
        raise ValueError(f"pack: {name} must be one-dimensional, got shape {tuple(tensor.shape)}")
    least, most = int(tensor.min()), int(tensor.max())
    if least < low or (high is not None and most >= high):
        span = f"at least {low}" if high is None else f"from {low} to {high - 1}"
        raise ValueError(f"pack: {name} must {rule or 'be'} {span}, got {least if least < low else most}")
    return tensor.to(torch.int64)


def _to_device(layout: PackedLayout, device: torch.device) -> PackedLayout:
    """The layout with what the device needs on the device, moved in one copy."""
    layers = [layout.lower, layout.upper, layout.last]
    optional = (layout.image_rows, layout.branch_rows, *(rows.kept for rows in layers))
    tensors = [layout.text_index, layout.text_position, layout.cls_rows, *(x for x in optional if x is not None)]
    tensors += [tensor for rows in layers for tensor in (rows.segment, *(part.segments for part in rows.parts))]
    buffer = torch.cat([tensor.flatten().long() for tensor in tensors])
    if device.type == "cuda":
        buffer = buffer.pin_memory()
    pieces = buffer.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    on_device = {id(t): piece.view(t.shape).to(t.dtype) for t, piece in zip(tensors, pieces, strict=True)}

    def moved(rows: LayerRows) -> LayerRows:
        return replace(
            rows,
            kept=None if rows.kept is None else on_device[id(rows.kept)],
            segment=on_device[id(rows.segment)],
            parts=tuple(part._replace(segments=on_device[id(part.segments)]) for part in rows.parts),
        )

    return replace(
        layout,
        text_index=on_device[id(layout.text_index)],
        text_position=on_device[id(layout.text_position)],
        image_rows=None if layout.image_rows is None else on_device[id(layout.image_rows)],
        branch_rows=None if layout.branch_rows is None else on_device[id(layout.branch_rows)],
        cls_rows=on_device[id(layout.cls_rows)],
        lower=moved(layout.lower),
        upper=moved(layout.upper),
        last=moved(layout.last),
    )
