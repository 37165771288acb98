"""Random numbers by item: the published sequence, and laws of keys."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from vlmo_fast.training import draws

FALSE_ALARM = 1e-6  # of each statistical test, were its seed drawn anew; with the seed fixed they are not random
INT64 = st.integers(-(2**63), 2**63 - 1)


def test_numbers_are_splitmix64s():
    """The first five of seed 1234567, as published: catches an arithmetic shift in place of a logical one."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [number % 2**64 for number in draws.bits(torch.tensor([1234567]), (5,))[0].tolist()] == published


@settings(deadline=None)
@given(seed=INT64, epoch=INT64, items=st.lists(INT64, min_size=1, max_size=8, unique=True))
def test_a_key_depends_on_its_item_alone(seed, epoch, items):
    """Not on the rest of the batch; and items of an epoch never share one."""
    keys = draws.item_keys(seed, epoch, items, "words")
    assert keys.tolist() == [draws.item_keys(seed, epoch, [item], "words").item() for item in items]
    assert len(keys.unique()) == len(items)


def test_every_part_of_a_key_counts():
    """Catches a part left out, and two parts joined so that they can be exchanged (seed + epoch)."""
    parts = [(1, 2, [3], "a"), (2, 1, [3], "a"), (1, 3, [2], "a"), (3, 2, [1], "a"), (1, 2, [3], "b"), (1, 2, [4], "a")]
    assert len({draws.item_keys(*part).item() for part in parts}) == len(parts)


def test_numbers_go_on_where_a_longer_draw_does():
    keys = draws.item_keys(0, 0, [5, 6], "words")
    assert torch.equal(draws.bits(keys, (3, 4)), draws.bits(keys, (2, 4, 4))[:, 0, :3])
    assert torch.equal(draws.bits(keys, (3,), start=4), draws.bits(keys, (7,))[:, 4:])


def test_numbers_are_uniform():
    """Along an item, across items, across epochs, and in the last of 53 bits."""
    along = draws.uniform(draws.item_keys(0, 0, [1], "words"), (100_000,))[0]
    items = draws.uniform(draws.item_keys(0, 0, torch.arange(100_000), "words"), (1,))[:, 0]
    epochs = torch.cat([draws.uniform(draws.item_keys(0, n, [1], "words"), (1,))[:, 0] for n in range(2000)])
    for numbers in (along, items, epochs):
        assert numbers.min() >= 0 and numbers.max() < 1
        assert kstest(numbers.numpy(), "uniform").pvalue > FALSE_ALARM
        assert chisquare((numbers * 2**53).long().remainder(2).bincount().numpy()).pvalue > FALSE_ALARM
        pairs = (numbers[0::2] * 10).long() * 10 + (numbers[1::2] * 10).long()  # neighbours are independent
        assert chisquare(pairs.bincount(minlength=100).numpy()).pvalue > FALSE_ALARM


def test_generators_repeat():
    first, second = draws.item_keys(0, 0, [1, 2], "augmentation")
    assert torch.equal(torch.rand(3, generator=draws.generator(first)), torch.rand(3, generator=draws.generator(first)))
    assert not torch.equal(
        torch.rand(3, generator=draws.generator(first)), torch.rand(3, generator=draws.generator(second))
    )
