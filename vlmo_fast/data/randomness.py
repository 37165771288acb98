"""Randomness as a function of (seed, epoch, item): no generator travels along, nothing depends on who draws when.

A generator that is used up item by item ties each draw to all that came before it: to the number of workers, to the
ranks, to where a run was interrupted. Here every draw is looked up instead:

    which item stands at a position      permute(positions, num_items, seed, epoch)
    what is drawn for it                 item_generator(seed, epoch, item, purpose)

`permute` is the swap-or-not shuffle (Hoang, Morris, Rogaway, "An Enciphering Scheme Based on a Card Shuffle",
arXiv:1208.1176): a keyed bijection of any range, computed for the positions that are asked for alone. It stores
nothing, while an array of 100 M indices takes 0.8 GB in every worker, and it consists of integer operations that are
fixed here: a run resumed under another release of NumPy keeps its order.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

__all__ = ["item_generator", "item_seed", "permute", "stable_id"]

# Two positions are told apart by half of the rounds; 96 leave no structure that the tests could find at any size.
_NUM_ROUNDS = 96


def item_seed(seed: int, epoch: int, item: int, purpose: str = "") -> int:
    """A number for what is drawn for one item in one epoch, to seed a generator with.

    Args:
        seed: of the run; any integer.
        epoch: how many times the data was seen before.
        item: index of the item in its source, or any other integer that stands for it.
        purpose: what is drawn ("crop", "words"): draws of different purposes are independent.

    Returns:
        An integer in [0, 2**63); the same on every machine.
    """
    return int.from_bytes(_digest(seed, epoch, item, purpose)[:8], "little") >> 1


def item_generator(seed: int, epoch: int, item: int, purpose: str = "") -> np.random.Generator:
    """NumPy's generator for what is drawn for one item in one epoch; the arguments are those of `item_seed`.

    Returns:
        A Philox generator of its own at its beginning. NumPy fixes the bits that it gives; how a distribution is made
        from them may change between NumPy's releases.
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(seed, epoch, item, purpose), "little")))


def permute(positions: npt.ArrayLike, num_items: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The items at some positions of an epoch's random order.

    Args:
        positions: (n,) integers in [0, num_items).
        num_items: size of the range that is permuted.
        seed: of the run; any integer.
        epoch: each has an order of its own.

    Returns:
        (n,) int64, in [0, num_items): different items for different positions.

    Raises:
        ValueError: a position is out of range.
    """
    x = np.array(positions, dtype=np.int64, ndmin=1)
    if x.size and not 0 <= x.min() <= x.max() < num_items:
        raise ValueError(f"permute: positions must be in [0, {num_items}), got {x.min()} to {x.max()}")
    keys = np.random.Philox(key=int.from_bytes(_digest(seed, epoch, num_items, "order"), "little"))
    for pivot, key in keys.random_raw(2 * _NUM_ROUNDS).reshape(-1, 2).tolist():
        partner = (pivot % num_items - x) % num_items
        # Both partners decide by the same bit, so that they exchange places or both stay.
        bits = _mix(np.maximum(x, partner).astype(np.uint64) ^ np.uint64(key))
        x = np.where(bits >> np.uint64(63), partner, x)
    return x


def stable_id(namespace: str, *parts: str | int) -> int:
    """An integer for a name: equal for equal names, on every machine.

    Args:
        namespace: whose names they are ("coco").
        *parts: the name; 1 and "1" are the same.

    Returns:
        In [0, 2**63). Among 10 million names two collide with a probability of 5e-6.
    """
    return int.from_bytes(_hash(*map(str, (namespace, *parts)))[:8], "little") >> 1


def _digest(seed: int, epoch: int, item: int, purpose: str) -> bytes:
    # Through int, so that NumPy's integers count as what they are.
    return _hash(purpose, str(int(seed)), str(int(epoch)), str(int(item)))


def _hash(*parts: str) -> bytes:
    """16 bytes; the length in front of each part keeps ("ab", "c") and ("a", "bc") apart."""
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    return hashlib.blake2b(b"".join(b"%d:%b" % (len(part), part) for part in encoded), digest_size=16).digest()


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64: every bit of the argument moves each bit of the result with probability 1/2."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
