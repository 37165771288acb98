"""Attention functions of transformers' `AttentionInterface`, in place of the network's own attention ops.

Such a function takes padded sequences and one mask that is added to the scores. As in transformers' BEiT, relative
positions and padding are summed in it, so a function that reads no mask, or one for all heads, cannot compute VLMo.

Shape suffixes: B sequences, S tokens of the longest, N rows, M output rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from vlmo_fast.block import Attention
from vlmo_fast.rows import Groups, LayerRows, PaddedRows, Rows

__all__ = ["AttentionFunction", "attend_by"]

# (module, query, key, value, mask, scaling=, dropout=, is_causal=), of (B, heads, S, d) each and a mask of
# (1 or B, 1 or heads, S, S) or None, gives (B, S, heads, d) and the weights or None.
AttentionFunction = Callable[..., tuple[Tensor, Any]]


def attend_by(function: AttentionFunction, network: nn.Module) -> list[RemovableHandle]:
    """Have a function compute the attention of all blocks of a network, until the handles are removed."""
    hook = partial(_hand_over, function)
    return [module.register_forward_pre_hook(hook) for module in network.modules() if isinstance(module, Attention)]


def _hand_over(function: AttentionFunction, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward hook: the rows that an `Attention` is given attend by the function."""
    x, rows, *bias = arguments
    return x, _Rows(rows, module, function), *bias


@dataclass(frozen=True)
class _Rows:
    """Rows that attend by a function of transformers."""

    rows: Rows
    module: nn.Module
    function: AttentionFunction

    @property
    def keeps_all(self) -> bool:
        return self.rows.keeps_all

    def keep(self, x: Tensor) -> Tensor:
        return self.rows.keep(x)

    @property
    def num_sequences(self) -> int:
        return self.rows.num_sequences

    @property
    def modality_groups(self) -> Groups:
        return self.rows.modality_groups

    @property
    def fusion_groups(self) -> Groups:
        return self.rows.fusion_groups

    def per_segment(self, values: Tensor) -> Tensor:
        return self.rows.per_segment(values)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, backends: Mapping[str, str]
    ) -> Tensor:
        """(M, heads, d) from (M, heads, d) and twice (N, heads, d), whatever the backends."""
        rows = self.rows
        if isinstance(rows, PaddedRows):
            index = replace(rows, cls_only=False).padded(torch.arange(len(key), device=key.device))  # (B, S)
            biases = None if bias is None else bias[None]
            return self._call(query, key, value, index, biases, rows.key_mask, rows.cls_only)
        assert isinstance(rows, LayerRows)
        attended = []
        for part, queries in zip(rows.parts, query.split([part.num_kept for part in rows.parts]), strict=True):
            keys = slice(part.first_row, part.first_row + part.num_rows)
            index, place, exists = _tokens(part.segments, part.max_length, part.num_rows)
            biases = None if bias is None else bias[:, place[:, :, None], place[:, None]].transpose(0, 1)
            attended.append(self._call(queries, key[keys], value[keys], index, biases, exists, part.cls_only))
        return torch.cat(attended)

    def _call(
        self,
        query: Tensor,  # (M, heads, d)
        key: Tensor,  # (N, heads, d)
        value: Tensor,
        index: Tensor,  # (B, S), the row of each token; N where there is none
        bias: Tensor | None,  # (1 or B, heads, S, S)
        real: Tensor | None,  # (B, S), False where a key is none
        cls_only: bool,
    ) -> Tensor:
        query, key, value = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (query, key, value))  # row N
        rows = torch.arange(len(index), device=index.device)[:, None] if cls_only else index
        mask = None
        if bias is not None:
            mask = (bias[:, :, :1] if cls_only else bias).to(query.dtype)
        if real is not None:
            mask = query.new_zeros(1, 1, rows.shape[1], index.shape[1]) if mask is None else mask
            mask = mask.masked_fill(~real[:, None, None], torch.finfo(query.dtype).min)
        attended, _ = self.function(
            self.module,
            *(x[i].transpose(1, 2) for x, i in ((query, rows), (key, index), (value, index))),
            mask,
            scaling=query.shape[-1] ** -0.5,
            dropout=0.0,
            is_causal=False,
        )
        return torch.zeros_like(query, dtype=attended.dtype).index_put((rows,), attended)[:-1]


def _tokens(segments: Tensor, length: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of packed sequences, text before image, (B, S) each: their rows, bias rows, and whether they exist."""
    position = torch.arange(length, device=segments.device)
    text, image = segments.long()[..., None].unbind(1)  # (B, 3, 1) each: first row, length, first bias row
    in_text, offset = position < text[:, 1], position - text[:, 1]
    exists = offset < image[:, 1]
    row, place = (torch.where(in_text, text[:, i] + position, image[:, i] + offset) for i in (0, 2))
    return row.where(exists, num_rows), place.where(exists, 0), exists
