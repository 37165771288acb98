"""What pre-training hides: whole words of texts, blocks of patches of images.

Both are functions of each item's key (`vlmo_fast.training.draws`) and run over a batch at once, on any device. The
other items of the batch, their order and the padding change nothing.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmo_fast.losses import IGNORE_INDEX
from vlmo_fast.training.draws import uniform

__all__ = ["MaskedWords", "WordPieces", "mask_patches", "mask_words"]

MASKED, REPLACED = 0.8, 0.1  # shares of the tokens to predict that become [MASK] and another token; the rest stays
MAX_BLOCKS = 100  # tried for an image before what is missing is filled up


class WordPieces:
    """What masking must know of a WordPiece vocabulary of V entries.

    Args:
        continues: (V,) bool, True for pieces that continue a word ("##ing").
        is_special: (V,) bool, True for [PAD], [UNK], [CLS], [SEP], [MASK] and their like.
        mask_token_id: of [MASK].

    Raises:
        ValueError: the tables disagree, [MASK] is not special, or everything is.
    """

    def __init__(self, continues: Tensor, is_special: Tensor, mask_token_id: int) -> None:
        size = len(continues)
        if continues.shape != (size,) or is_special.shape != (size,):
            got = f"{tuple(continues.shape)} and {tuple(is_special.shape)}"
            raise ValueError(f"WordPieces: continues and is_special must be (V,), got {got}")
        if not 0 <= mask_token_id < size or not bool(is_special[mask_token_id]):
            raise ValueError(f"WordPieces: mask_token_id must be one of {size} ids and special, got {mask_token_id}")
        if bool(is_special.all()):
            raise ValueError("WordPieces: is_special must be False somewhere, got True for every id")
        self.continues, self.is_special, self.mask_token_id = continues.bool(), is_special.bool(), mask_token_id
        self.ordinary_ids = (~self.is_special).nonzero().flatten()

    @classmethod
    def of(cls, tokenizer: Any) -> WordPieces:
        """Those of a transformers tokenizer whose continuations begin with "##", as BERT's do."""
        vocabulary = tokenizer.get_vocab()
        size = 1 + max(vocabulary.values())
        continues, is_special = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
        continues[[token_id for token, token_id in vocabulary.items() if token.startswith("##")]] = True
        is_special[list(tokenizer.all_special_ids)] = True
        return cls(continues, is_special, tokenizer.mask_token_id)

    def to(self, device: torch.device | str) -> WordPieces:
        """The same on a device."""
        return WordPieces(self.continues.to(device), self.is_special.to(device), self.mask_token_id)


class MaskedWords(NamedTuple):
    """Texts for masked language modelling.

    Attributes:
        input_ids: (B, T) int64, the texts with some tokens replaced.
        labels: (B, T) int64, the original ids at the positions to predict, -100 elsewhere.
    """

    input_ids: Tensor
    labels: Tensor


def mask_words(
    input_ids: Tensor, attention_mask: Tensor | None, keys: Tensor, pieces: WordPieces, *, rate: float = 0.15
) -> MaskedWords:
    """Whole-word masking (BERT, arXiv:1810.04805, and its whole-word release; VLMo, arXiv:2111.02358, section 3.2).

    A word is a piece that continues none and the pieces that continue it; special tokens and padding belong to no word.
    A text of n tokens in words has a budget of max(1, floor(rate * n + 1/2)) tokens. Its words are taken in random
    order, each if it fits into what is left of the budget; if none fits, the first is taken all the same. So a text
    with a word has something to predict: at most the budget's tokens, unless every word is longer; exactly the budget's
    where all words are of one piece. Of the tokens to predict, each by itself, 80 % become [MASK], 10 % a random token
    that is not special (perhaps the same), and 10 % stay.

    Args:
        input_ids: (B, T) int64.
        attention_mask: (B, T), 0 for padding, or None.
        keys: (B,) int64, one a text, of `item_keys(..., "words")`.
        pieces: of the vocabulary, on the same device.
        rate: share of the tokens to predict, in (0, 1].

    Returns:
        `MaskedWords`; `input_ids` is a new tensor.

    Raises:
        ValueError: shapes disagree or the rate is out of range.
    """
    if input_ids.ndim != 2 or keys.shape != input_ids.shape[:1]:
        got = f"{tuple(input_ids.shape)} and {tuple(keys.shape)}"
        raise ValueError(f"mask_words: input_ids and keys must be (B, T) and (B,), got {got}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        shape = tuple(input_ids.shape)
        raise ValueError(
            f"mask_words: attention_mask must be {shape} like input_ids, got {tuple(attention_mask.shape)}"
        )
    if not 0 < rate <= 1:
        raise ValueError(f"mask_words: rate must be in (0, 1], got {rate}")
    in_word = ~pieces.is_special[input_ids]
    if attention_mask is not None:
        in_word &= attention_mask != 0
    starts = in_word.clone()  # a continuation after a special token, or first of all, starts a word
    starts[:, 1:] &= ~(pieces.continues[input_ids[:, 1:]] & in_word[:, :-1])
    draws = uniform(keys, (input_ids.shape[1], 3))  # by position, so that padding at the end changes none
    hidden = _choose_words(starts, in_word, draws[..., 0], rate)
    fate = draws[..., 1]
    other = pieces.ordinary_ids[(draws[..., 2] * len(pieces.ordinary_ids)).long()]
    masked = torch.where(hidden & (fate < MASKED + REPLACED), other, input_ids)
    masked = masked.masked_fill(hidden & (fate < MASKED), pieces.mask_token_id)
    return MaskedWords(masked, input_ids.masked_fill(~hidden, IGNORE_INDEX))


def _choose_words(starts: Tensor, in_word: Tensor, draws: Tensor, rate: float) -> Tensor:
    """Which tokens to predict, (B, T) bool; `starts` are the words' first tokens, `draws` decide their order."""
    num_texts, num_tokens = starts.shape
    word = torch.where(in_word, starts.cumsum(1) - 1, num_tokens)  # (B, T), those in none in a word of their own
    sizes = torch.zeros(num_texts, num_tokens + 1, dtype=torch.int64, device=starts.device)
    sizes = sizes.scatter_add_(1, word, in_word.long()).gather(1, word) * starts  # (B, T), at the start of each word
    order = draws.masked_fill(~starts, 1).argsort(
        dim=1, stable=True
    )  # the words in random order, then what starts none
    ordered = sizes.gather(1, order)
    budget = (rate * in_word.sum(1) + 0.5).long().clamp(min=1)
    taken = torch.zeros_like(budget)
    takes = torch.zeros_like(starts)
    for n in range(int(starts.sum(1).max()) if starts.numel() else 0):
        size = ordered[:, n]
        takes[:, n] = fits = (size > 0) & (taken + size <= budget)
        taken += size * fits
        if bool((taken >= budget).all()):
            break
    takes[:, 0] |= (taken == 0) & (ordered[:, 0] > 0)
    chosen = torch.zeros_like(starts).scatter_(1, order, takes)
    of_word = torch.zeros(num_texts, num_tokens + 1, dtype=torch.int64, device=starts.device)
    return (of_word.scatter_add_(1, word, chosen.long()).gather(1, word) > 0) & in_word


def mask_patches(
    keys: Tensor,
    window: int | tuple[int, int],
    *,
    rate: float = 0.4,
    min_block: int = 16,
    min_aspect: float = 0.3,
) -> Tensor:
    """Block-wise masking of images (BEiT, arXiv:2106.08254, algorithm 1), exactly floor(rate * N + 1/2) of N patches.

    Rectangles are added until so many patches are hidden:

        s ~ U(m, max(m, what is missing)),  m = min_block, or all that shall be hidden if that is less
        r ~ exp(U(log min_aspect, -log min_aspect))
        height, width = sqrt(s r), sqrt(s / r), rounded, at least 1 and at most the window's; place uniform

    The last rectangle is cut to what is missing, from its first patch or back from its last, at random. So all images
    of a size hide equally many, where the paper's algorithm hides more and the released one fewer. What 100 rectangles
    leave missing, at rates near 1, is filled up from the first patch on.

    Args:
        keys: (B,) int64, one an image, of `item_keys(..., "patches")`.
        window: patches along a side, or (height, width).
        rate: share of the patches to hide, in (0, 1]; at least one is.
        min_block: patches of the smallest rectangle, before its sides are rounded.
        min_aspect: least height over width, and width over height, before rounding; in (0, 1].

    Returns:
        (B, N) bool, True for hidden patches, row by row: a model's `bool_masked_pos`.

    Raises:
        ValueError: an argument is out of range.
    """
    height, width = (window, window) if isinstance(window, int) else window
    if keys.ndim != 1:
        raise ValueError(f"mask_patches: keys must be (B,), got {tuple(keys.shape)}")
    if min(height, width, min_block) < 1:
        got = f"{height} x {width} and {min_block}"
        raise ValueError(f"mask_patches: window and min_block must be at least 1, got {got}")
    if not 0 < rate <= 1 or not 0 < min_aspect <= 1:
        raise ValueError(f"mask_patches: rate and min_aspect must be in (0, 1], got {rate} and {min_aspect}")
    wanted = max(1, math.floor(rate * height * width + 0.5))
    least = min(min_block, wanted)
    rows = torch.arange(height, device=keys.device)[None, :, None]
    columns = torch.arange(width, device=keys.device)[None, None, :]
    hidden = torch.zeros(len(keys), height * width, dtype=torch.bool, device=keys.device)
    missing = torch.full((len(keys), 1), wanted, device=keys.device)
    for n in range(MAX_BLOCKS):
        size, aspect, top, left, is_cut_in_front = uniform(keys, (5,), start=5 * n).unbind(1)
        size = least + size * (missing[:, 0] - least).clamp(min=0)
        aspect = torch.exp((1 - 2 * aspect) * math.log(min_aspect))
        tall = (size * aspect).sqrt().round().long().clamp(1, height)
        wide = (size / aspect).sqrt().round().long().clamp(1, width)
        above, before = ((top * (height - tall + 1)).long(), (left * (width - wide + 1)).long())
        tall, wide, above, before = (x[:, None, None] for x in (tall, wide, above, before))
        block = (rows >= above) & (rows < above + tall) & (columns >= before) & (columns < before + wide)
        new = block.flatten(1) & ~hidden
        place = new.cumsum(1)  # 1 for the first new patch
        count = place[:, -1:]
        place = torch.where(is_cut_in_front[:, None] < 0.5, count + 1 - place, place)
        hidden |= new & (place <= missing)
        missing = (missing - count).clamp(min=0)
        if not bool(missing.any()):
            return hidden
    return hidden | (~hidden & ((~hidden).cumsum(1) <= missing))
