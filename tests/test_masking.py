"""What pre-training hides: the laws of whole words and of blocks, each test with the fault that it catches."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare
from transformers import BertTokenizer

from vlmo_fast.losses import IGNORE_INDEX
from vlmo_fast.training.draws import item_keys, uniform
from vlmo_fast.training.masking import WordPieces, mask_patches, mask_words

FALSE_ALARM = 1e-6  # of each statistical test, were its seed drawn anew; with the seed fixed they are not random
PAD, UNK, CLS, SEP, MASK = range(5)
WORDS, PIECES = range(5, 65), range(65, 105)  # ids that start a word and that continue one
SIZE = 105
IDS = torch.arange(SIZE)
VOCABULARY = WordPieces(IDS.ge(PIECES.start), IDS.lt(WORDS.start), MASK)

texts = st.lists(
    st.lists(st.sampled_from([*WORDS, *PIECES, *PIECES, UNK]), max_size=24), min_size=1, max_size=4
)  # anything between [CLS] and [SEP], broken words included


def batch_of(bodies, length=None):
    """`input_ids` and `attention_mask`, padded to a length or the longest."""
    full = [[CLS, *body, SEP] for body in bodies]
    length = max(map(len, full)) if length is None else length
    ids = torch.tensor([text + [PAD] * (length - len(text)) for text in full])
    return ids, (ids != PAD).long()


def words_of(text):
    """Positions of each word of a list of ids, spelled out."""
    words, before = [], None
    for place, token in enumerate(text):
        if token >= WORDS.start:
            if token in PIECES and before is not None and before >= WORDS.start:
                words[-1].append(place)
            else:
                words.append([place])
        before = token
    return words


def keys_of(count, epoch=0):
    return item_keys(0, epoch, torch.arange(count), "words")


# Words


@settings(deadline=None, max_examples=200)
@given(bodies=texts, epoch=st.integers(0, 1000), rate=st.sampled_from([0.01, 0.15, 0.5, 1.0]))
@example(bodies=[[WORDS[0]] + [PIECES[0]] * 9, []], epoch=0, rate=0.15)  # one word longer than the budget; no word
@example(bodies=[[PIECES[0], UNK, PIECES[1]]], epoch=0, rate=0.15)  # continuations of nothing are words
def test_laws_of_whole_words(bodies, epoch, rate):
    """Catches: a piece hidden without its word, a word over the budget, none at all, special tokens, a label lost."""
    ids, attention_mask = batch_of(bodies)
    masked, labels = mask_words(ids, attention_mask, keys_of(len(ids), epoch), VOCABULARY, rate=rate)
    hidden = labels != IGNORE_INDEX
    assert torch.equal(torch.where(hidden, labels, masked), ids)  # labels give the text back; the rest is untouched
    assert not VOCABULARY.is_special[ids[hidden]].any()
    assert not (VOCABULARY.is_special[masked[hidden]] & (masked[hidden] != MASK)).any()
    for row, text in zip(hidden.tolist(), ids.tolist(), strict=True):
        words = words_of(text)
        sizes = [len(word) for word in words]
        budget = max(1, math.floor(rate * sum(sizes) + 0.5))
        taken = [all(row[place] for place in word) for word in words]
        assert sum(row) == sum(size for size, is_taken in zip(sizes, taken, strict=True) if is_taken)
        if words:
            left = budget - sum(row)
            assert any(taken)
            assert left >= 0 or (sum(taken) == 1 and min(sizes) > budget)
            untaken = [size for size, is_taken in zip(sizes, taken, strict=True) if not is_taken]
            assert left < min(untaken, default=math.inf)  # whatever still fits is taken


@settings(deadline=None, max_examples=100)
@given(bodies=texts, data=st.data())
def test_a_text_is_masked_alike_in_any_batch(bodies, data):
    """By itself, in any order, padded further: catches draws that follow the batch, or one shared generator."""
    ids, attention_mask = batch_of(bodies)
    keys = keys_of(len(ids))
    together = mask_words(ids, attention_mask, keys, VOCABULARY)
    order = torch.tensor(data.draw(st.permutations(range(len(ids)))))
    padded = batch_of(bodies, ids.shape[1] + data.draw(st.integers(1, 9)))
    shuffled = mask_words(padded[0][order], padded[1][order], keys[order], VOCABULARY)
    for whole, part in zip(together, shuffled, strict=True):
        assert torch.equal(whole[order], part[:, : ids.shape[1]])
    for n in range(len(ids)):
        alone = mask_words(ids[n : n + 1], None, keys[n : n + 1], VOCABULARY)  # [PAD] is special: no mask is needed
        assert all(torch.equal(whole[n], part[0]) for whole, part in zip(together, alone, strict=True))


def test_padding_is_what_the_mask_says():
    """Also where ordinary tokens stand there: catches a mask that is not looked at."""
    ids = torch.tensor([[CLS, *WORDS[:10]]]).expand(100, -1)
    attention_mask = (torch.arange(11) < 4).long().expand(100, -1)
    hidden = mask_words(ids, attention_mask, keys_of(100), VOCABULARY).labels != IGNORE_INDEX
    assert hidden.sum(1).eq(1).all() and not hidden[:, 4:].any()


def test_budget_of_words_of_one_piece():
    """Catches another rounding: 0.15 n rounded half up, at least 1, to the token."""
    for count, wanted in ((1, 1), (9, 1), (10, 2), (16, 2), (17, 3), (30, 5), (38, 6)):
        ids, attention_mask = batch_of([list(WORDS[:count])] * 20)
        labels = mask_words(ids, attention_mask, keys_of(20), VOCABULARY).labels
        assert (labels != IGNORE_INDEX).sum(1).tolist() == [wanted] * 20


def test_what_becomes_of_hidden_tokens():
    """80/10/10, random ones uniform over all that is not special: catches swapped shares and ids drawn from a range."""
    ids, attention_mask = batch_of([[WORDS[0]] * 100] * 2000)
    masked, labels = mask_words(ids, attention_mask, keys_of(2000), VOCABULARY, rate=1.0)
    hidden = masked[labels != IGNORE_INDEX]
    assert len(hidden) == 200_000
    num_ordinary = len(WORDS) + len(PIECES)
    counts = hidden.bincount(minlength=SIZE)
    others = counts[WORDS.start :].clone()
    others[0] = 0
    stayed = 0.1 + 0.1 / num_ordinary  # a random token may be the same
    expected = torch.tensor([0.8, stayed, 0.2 - stayed], dtype=torch.float64) * len(hidden)
    assert chisquare([counts[MASK], counts[WORDS[0]], others.sum()], expected).pvalue > FALSE_ALARM
    assert chisquare(others[1:]).pvalue > FALSE_ALARM


def test_every_word_is_as_likely():
    """Whatever its place: catches an order that is not random; words of one piece, a binomial for each place."""
    ids, attention_mask = batch_of([list(WORDS[:20])] * 4000)
    labels = mask_words(ids, attention_mask, keys_of(4000), VOCABULARY).labels
    counts = (labels != IGNORE_INDEX).sum(0)[1:-1]
    assert counts.sum() == 3 * 4000
    for count in counts.tolist():
        assert binomtest(count, 4000, 3 / 20).pvalue > FALSE_ALARM / 20


def test_each_epoch_draws_anew():
    ids, attention_mask = batch_of([list(WORDS[:20])] * 50)
    first, second = (mask_words(ids, attention_mask, keys_of(50, epoch), VOCABULARY).labels for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, mask_words(ids, attention_mask, keys_of(50), VOCABULARY).labels)


def test_pieces_of_a_tokenizer():
    """BERT's way to write continuations; ids beyond the number of entries are covered."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "play": 5, "##ing": 6, "#": 7, "##s": 9}
    pieces = WordPieces.of(BertTokenizer(vocab=vocabulary))
    assert pieces.continues.nonzero().flatten().tolist() == [6, 9]
    assert pieces.is_special.nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert pieces.mask_token_id == 4


def test_what_mask_words_refuses():
    ids, attention_mask = batch_of([[WORDS[0]]])
    for arguments, message in (
        ((ids[0], None, keys_of(1)), r"must be \(B, T\) and \(B,\)"),
        ((ids, None, keys_of(2)), r"must be \(B, T\) and \(B,\)"),
        ((ids, attention_mask[:, 1:], keys_of(1)), "attention_mask must be"),
    ):
        with pytest.raises(ValueError, match=message):
            mask_words(*arguments, VOCABULARY)
    with pytest.raises(ValueError, match="rate must be"):
        mask_words(ids, None, keys_of(1), VOCABULARY, rate=0)
    for arguments, message in (
        ((IDS > 9, IDS[1:] < 5, 4), r"must be \(V,\)"),
        ((IDS > 9, IDS < 4, 4), "mask_token_id must be"),
        ((IDS > 9, IDS >= 0, 4), "False somewhere"),
    ):
        with pytest.raises(ValueError, match=message):
            WordPieces(*arguments)


# Patches


def blocks_one_by_one(key, height, width, rate):
    """The definition, image by image and patch by patch: (N,) bool."""
    wanted = max(1, math.floor(rate * height * width + 0.5))
    least = min(16, wanted)
    hidden = [False] * (height * width)
    for n in range(100):
        size, aspect, top, left, is_cut_in_front = uniform(key[None], (5,), start=5 * n)[0].tolist()
        missing = wanted - sum(hidden)
        size = least + size * max(0, missing - least)
        aspect = math.exp(math.log(0.3) + aspect * (math.log(1 / 0.3) - math.log(0.3)))
        tall, wide = (
            min(max(1, round(math.sqrt(x))), limit) for x, limit in ((size * aspect, height), (size / aspect, width))
        )
        above, before = int(top * (height - tall + 1)), int(left * (width - wide + 1))
        block = [row * width + column for row in range(above, above + tall) for column in range(before, before + wide)]
        new = [place for place in block if not hidden[place]]
        for place in new[:missing] if is_cut_in_front >= 0.5 else new[::-1][:missing]:
            hidden[place] = True
        if sum(hidden) == wanted:
            break
    for place in [place for place, is_hidden in enumerate(hidden) if not is_hidden][: wanted - sum(hidden)]:
        hidden[place] = True
    return torch.tensor(hidden)


@settings(deadline=None, max_examples=60)
@given(
    window=st.one_of(st.integers(1, 30), st.tuples(st.integers(1, 30), st.integers(1, 30))),
    rate=st.sampled_from([0.05, 0.4, 0.75, 1.0]),
    item=st.integers(0, 10**6),
)
@example(window=14, rate=0.4, item=0)
@example(window=(2, 30), rate=0.4, item=0)  # blocks are clipped to two rows
def test_laws_of_blocks(window, rate, item):
    """Exactly so many, as the definition says, in any batch: catches counts off by one, rows taken for columns."""
    height, width = (window, window) if isinstance(window, int) else window
    keys = item_keys(0, 0, [item, item + 1, item + 2], "patches")
    hidden = mask_patches(keys, window, rate=rate)
    assert hidden.shape == (3, height * width) and hidden.dtype == torch.bool
    assert hidden.sum(1).tolist() == [max(1, math.floor(rate * height * width + 0.5))] * 3
    assert torch.equal(hidden[1], mask_patches(keys[1:2], window, rate=rate)[0])
    assert torch.equal(hidden[0], blocks_one_by_one(keys[0], height, width, rate))


def test_blocks_are_blocks():
    """Hidden patches lie in large rectangles: catches patches drawn one by one, which a count would not see.

    Each but those of the cut last block lies in a hidden rectangle of 14 patches or more: 16 are at least 2 x 7 when
    their sides are rounded (0.3 <= r <= 1/0.3).
    """
    hidden = mask_patches(item_keys(0, 0, torch.arange(50), "patches"), 14).view(50, 1, 14, 14).float()
    covered = torch.zeros_like(hidden)
    for tall in range(2, 15):
        for wide in range(2, 15):
            if tall * wide >= 14 and max(tall, wide) <= 4 * min(tall, wide):
                corners = torch.nn.functional.avg_pool2d(hidden, (tall, wide), stride=1) > 1 - 1e-6
                covered = covered.maximum(
                    torch.nn.functional.conv_transpose2d(corners.float(), torch.ones(1, 1, tall, wide)).clamp(max=1)
                )
    outside = (hidden - covered).sum((1, 2, 3))
    assert (outside < 16).all()
    assert outside.mean() < 6


def test_blocks_lie_anywhere():
    """Alike in all four directions: catches blocks that start at the edge, or are cut from one side only, or an aspect
    whose logarithm is not uniform.

    Three means are 0 by symmetry: each is bounded by five standard errors, which a normal variable passes once in 1.7
    million draws.
    """
    num_images = 4000
    hidden = mask_patches(item_keys(0, 0, torch.arange(num_images), "patches"), 14).view(-1, 14, 14).double()
    rows, columns = hidden.sum(2), hidden.sum(1)
    halves = [lines[:, :7].sum(1) - lines[:, 7:].sum(1) for lines in (rows, columns)]
    for difference in (*halves, rows.var(1) - columns.var(1)):
        assert abs(difference.mean()) < 5 * difference.std() / math.sqrt(num_images)
    assert not mask_patches(item_keys(0, 0, torch.arange(99), "patches"), 14).all(0).any()


def test_what_mask_patches_refuses():
    keys = item_keys(0, 0, [0], "patches")
    for options, message in (
        ({"window": 0}, "at least 1"),
        ({"window": 4, "min_block": 0}, "at least 1"),
        ({"window": 4, "rate": 1.5}, "rate and min_aspect"),
        ({"window": 4, "min_aspect": 0}, "rate and min_aspect"),
    ):
        with pytest.raises(ValueError, match=message):
            mask_patches(keys, **options)
    with pytest.raises(ValueError, match=r"keys must be \(B,\)"):
        mask_patches(keys[0], 4)
