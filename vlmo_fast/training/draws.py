"""Random numbers that are functions of seed, epoch and item, and of nothing else.

What is drawn for an item stays the same whatever batch it comes in, whichever worker prepares it and wherever a run was
resumed, since no generator is carried from one item to the next: number n of an item is hashed from its key and n.

    state_n  = key + n * 0x9e3779b97f4a7c15        (n = 1, 2, ...; modulo 2^64)
    number_n = mix(state_n)                        SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
                                                   generators", OOPSLA 2014), which passes BigCrush

A key is that of `vlmo_fast.data.randomness.item_seed`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vlmo_fast.data.randomness import item_seed

__all__ = ["bits", "generator", "item_keys", "uniform"]

GOLDEN_RATIO, FIRST_FACTOR, SECOND_FACTOR = (  # as int64, which wraps modulo 2^64 like uint64
    constant - (1 << 64) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def item_keys(seed: int, epoch: int, items: Tensor | Sequence[int], purpose: str) -> Tensor:
    """The keys from which the numbers of some items are drawn.

    Args:
        seed: of the run; any int64.
        epoch: pass over the data; any int64.
        items: (B,) int64 numbers of the items, on any device: places in the data set, or steps for what is drawn once a
            step.
        purpose: what is drawn ("words", "patches", "augmentation"); two purposes share no numbers.

    Returns:
        (B,) int64 on the items' device.
    """
    items = torch.as_tensor(items, dtype=torch.int64)
    keys = [item_seed(seed, epoch, item, purpose) for item in items.tolist()]
    return torch.tensor(keys, dtype=torch.int64, device=items.device)


def bits(keys: Tensor, shape: Sequence[int], *, start: int = 0) -> Tensor:
    """The numbers of each key after the first `start`, all 64 bits random: (B, *shape) int64, the last axis fastest.

    Args:
        keys: (B,) int64.
        shape: of what each key gets. More rows or a larger `start` go on in the same sequence.
        start: how many numbers of each key to pass over.
    """
    count = torch.arange(start + 1, start + math.prod(shape) + 1, device=keys.device)
    return _mix(keys[:, None] + count * GOLDEN_RATIO).view(len(keys), *shape)


def uniform(keys: Tensor, shape: Sequence[int], *, start: int = 0) -> Tensor:
    """Like `bits`, as float64 in [0, 1): multiples of 2^-53, all equally likely."""
    return _shift(bits(keys, shape, start=start), 11).double() * 2**-53


def generator(key: Tensor, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for code that draws by itself (augmentation, hard negatives), seeded by one key, 0-d.

    On a CPU torch keeps 32 bits of a seed: two given items draw the same with probability 2^-32.
    """
    return torch.Generator(device).manual_seed(int(key))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * FIRST_FACTOR
    x = (x ^ _shift(x, 27)) * SECOND_FACTOR
    return x ^ _shift(x, 31)


def _shift(x: Tensor, places: int) -> Tensor:
    """To the right, zeros from the left: torch's own shift repeats the sign."""
    return (x >> places) & ((1 << (64 - places)) - 1)
