"""Endless, shuffled batches of a source, which go on where they stopped.

A stream is a function of numbers, not a process with a history:

    order      position p of a run is item `permute(p mod N)` of epoch p div N: each item once an epoch. A batch that
               reaches beyond the end of an epoch goes on with the next one, so that no batch is incomplete and no item
               is dropped.
    draws      of (seed, epoch, item, purpose): `Item.generator`, `Item.seed_for`
    ranks      `batch_size` is that of the whole run; rank r of W takes the r-th of W equal parts of each batch.
    workers    only fetch: each takes the next batch that nobody has.
    faults     an item that cannot be read is replaced by ones that are drawn from (seed, epoch, position), until one
               can be read: batches stay whole, and all other positions keep their items. Each is counted and named, and
               more of them than a stated share end the run: early, since they are spread over the order.

So the same batches come with any number of workers and, taken together, with any number of ranks; a state is one
position, which may be resumed from with others of both, and with another batch size.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from vlmo_fast.data.images import ImageError, read_image
from vlmo_fast.data.randomness import item_generator, item_seed, permute
from vlmo_fast.data.source import Source, SourceError, UnreadableItem

__all__ = ["Item", "Stream", "TooManyUnreadable", "Unreadable"]

_MIN_COUNTED = 1000  # a share means something only over many items: up to here it is one of so many
_MAX_TRIES = 64  # of which one at least is readable, with a probability of 1 - 2**-64 where half of the items are
_MAX_LOGGED, _MAX_NAMED = 100, 10  # in the log; in the message that ends a run

_logger = logging.getLogger(__name__)


class TooManyUnreadable(RuntimeError):
    """More items than allowed cannot be read; the message counts and names them."""


@dataclass(frozen=True)
class Item:
    """What a batch is made of.

    Attributes:
        image: upright 8-bit RGB, or None.
        text: not blank, or None.
        image_id: equal for items whose texts are positives of each other, in [0, 2**63).
        index: the item's number in the source.
        epoch: how often the source was seen before.
        seed: of the stream.
    """

    image: Image.Image | None
    text: str | None
    image_id: int
    index: int
    epoch: int
    seed: int

    def generator(self, purpose: str) -> np.random.Generator:
        """NumPy's generator for a draw, the same whenever and wherever this item is seen in this epoch."""
        return item_generator(self.seed, self.epoch, self.index, purpose)

    def seed_for(self, purpose: str) -> int:
        """As `generator`, for generators of other makes: `torch.Generator().manual_seed(item.seed_for("crop"))`."""
        return item_seed(self.seed, self.epoch, self.index, purpose)


class Unreadable(NamedTuple):
    """An item that cannot be read: of which kind, where it stands, and what is wrong with it."""

    kind: str
    place: str
    message: str


class Stream:
    """Batches without end; `for` goes on from `position`, and stops when the caller does.

    Args:
        source: N samples, one at least.
        batch_size: items in a batch of the whole run, all ranks together.
        seed: of order and draws.
        prepare: what is kept of an item (crop, token ids); runs in the workers, and may raise `UnreadableItem`. Its
            draws come from the item's generators, since the global ones are others in each worker. None keeps the item.
        collate: a batch made of what `prepare` gave; runs in the workers. None keeps the list.
        rank: of this process.
        world_size: number of ranks; divides `batch_size`.
        num_workers: processes that fetch; 0 fetches in this one.
        prefetch_factor: batches that each worker is ahead.
        start_method: of the workers ("fork", "spawn", "forkserver"); None is the platform's.
        pin_memory: whether tensors of a batch are put into pinned memory.
        max_unreadable: the share of the items, at most one half, that may be unreadable; among fewer than 1,000, as
            many as among 1,000. Each rank counts its own.

    Attributes:
        position: items of the run given so far, by all ranks.
        num_read: items this rank has tried to read.
        num_unreadable: how many of them could not be read, by kind.
        unreadable: those that this stream has met since it was made, by place.

    Raises:
        ValueError: an argument is out of range.
        SourceError: the source is empty.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        seed: int = 0,
        prepare: Callable[[Item], Any] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        start_method: str | None = None,
        pin_memory: bool = False,
        max_unreadable: float = 0.01,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"Stream: rank must be in [0, world_size = {world_size}), got {rank}")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"Stream: batch_size must be a multiple of world_size = {world_size}, got {batch_size}")
        if not 0 <= max_unreadable <= 0.5:
            raise ValueError(f"Stream: max_unreadable must be in [0, 0.5], got {max_unreadable}")
        if not len(source):
            raise SourceError("Stream: source must hold a sample, got none")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.rank, self.world_size, self.max_unreadable = rank, world_size, max_unreadable
        self.position = self.num_read = 0
        self.num_unreadable: Counter[str] = Counter()
        self.unreadable: dict[str, Unreadable] = {}
        self._fingerprint = source.fingerprint()
        self._fetcher = _Fetcher(source, batch_size // world_size, seed, prepare, collate)
        self._loading: dict[str, Any] = {
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "prefetch_factor": prefetch_factor if num_workers else None,
            "multiprocessing_context": start_method if num_workers else None,
        }
        self._waited, self._since = 0.0, time.perf_counter()  # what `waiting_share` compares

    @property
    def epoch(self) -> float:
        """How often the source was seen: 1.5 in the middle of the second epoch."""
        return self.position / len(self.source)

    def __iter__(self) -> Iterator[Any]:
        own = self.position + self.rank * (self.batch_size // self.world_size)
        loader: DataLoader[_Fetched] = DataLoader(
            self._fetcher,
            batch_size=None,  # an index is a batch already
            sampler=_Positions(own, self.batch_size),
            collate_fn=_unchanged,
            # Else a number would be taken from torch's global generator, and the model's draws depend on it.
            generator=torch.Generator(),
            **self._loading,
        )
        self._waited, self._since = 0.0, time.perf_counter()
        batches = iter(loader)
        while True:
            start = time.perf_counter()
            fetched: _Fetched = next(batches)
            self._waited += time.perf_counter() - start
            self._count(fetched)
            # Before the caller has it: a state that is saved while a batch is being used is one behind that batch.
            self.position += self.batch_size
            yield fetched.batch

    def waiting_share(self) -> float:
        """The share of the time since the last call, or since `for` began, that was spent waiting for data, in [0, 1].

        Near 0 the data keeps up; what is above is time that more workers, or faster storage, would give back.
        """
        now = time.perf_counter()
        share = self._waited / max(now - self._since, 1e-9)
        self._waited, self._since = 0.0, now
        return min(share, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """All that going on needs, as numbers and strings; the same on each rank but for the counts."""
        return {
            "fingerprint": self._fingerprint,
            "num_items": len(self.source),
            "seed": self.seed,
            "position": self.position,
            "num_read": self.num_read,
            "num_unreadable": dict(self.num_unreadable),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the next `for` seeks to it, and reads nothing that came before.

        Raises:
            SourceError: the state is of other data or of another seed, so that the order would be another one.
        """
        for name, own in (("num_items", len(self.source)), ("fingerprint", self._fingerprint), ("seed", self.seed)):
            if state[name] != own:
                raise SourceError(
                    f"Stream: {name} must be that of the run to resume, {state[name]}, got {own}; begin a new run for "
                    "other data or another seed"
                )
        self.position, self.num_read = int(state["position"]), int(state["num_read"])
        self.num_unreadable = Counter(state["num_unreadable"])

    def _count(self, fetched: _Fetched) -> None:
        self.num_read += fetched.num_read
        for item in fetched.unreadable:
            self.num_unreadable[item.kind] += 1
            if item.place not in self.unreadable and len(self.unreadable) < _MAX_LOGGED:
                further = "; further ones are not logged" if len(self.unreadable) == _MAX_LOGGED - 1 else ""
                _logger.warning("%s: %s: %s%s", item.place, item.kind, item.message, further)
            self.unreadable[item.place] = item
        total = sum(self.num_unreadable.values())
        if fetched.failed or total > self.max_unreadable * max(self.num_read, _MIN_COUNTED):
            kinds = ", ".join(f"{count:,} x {kind}" for kind, count in self.num_unreadable.most_common())
            some = itertools.islice(self.unreadable.values(), _MAX_NAMED)
            named = "".join(f"\n  {item.place}: {item.kind}: {item.message}" for item in some)
            raise TooManyUnreadable(
                f"{total:,} of {self.num_read:,} items cannot be read, more than max_unreadable = "
                f"{self.max_unreadable:g} allows ({kinds}). The first of this run:{named}"
            )


class _Fetched(NamedTuple):
    batch: Any
    num_read: int
    unreadable: list[Unreadable]
    failed: bool  # no replacement could be read


class _Positions(Sampler[int]):
    def __init__(self, first: int, step: int) -> None:
        self.first, self.step = first, step

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first, self.step)


class _Fetcher(Dataset[_Fetched]):
    """This rank's part of a batch, looked up by the position of its first item."""

    def __init__(
        self,
        source: Source,
        num_items: int,
        seed: int,
        prepare: Callable[[Item], Any] | None,
        collate: Callable[[list[Any]], Any] | None,
    ) -> None:
        self.source, self.num_items, self.seed, self.prepare, self.collate = source, num_items, seed, prepare, collate

    def __getitem__(self, first: int) -> _Fetched:
        epochs, positions = np.divmod(np.arange(first, first + self.num_items), len(self.source))
        items: list[Any] = []
        unreadable: list[Unreadable] = []
        for epoch in np.unique(epochs).tolist():  # two where one ends, more where the source is small
            within = positions[epochs == epoch]
            order = permute(within, len(self.source), self.seed, epoch)
            for position, index in zip(within.tolist(), order.tolist(), strict=True):
                for attempt in range(_MAX_TRIES):
                    if attempt:
                        index = item_seed(self.seed, epoch, position, f"replacement {attempt}") % len(self.source)
                    try:
                        item = self._load(index, epoch)
                        items.append(item if self.prepare is None else self.prepare(item))
                        break
                    except UnreadableItem as error:
                        unreadable.append(Unreadable(error.kind, self.source.place(index), str(error)))
                else:
                    return _Fetched(None, len(items) + len(unreadable), unreadable, failed=True)
        batch = items if self.collate is None else self.collate(items)
        return _Fetched(batch, len(items) + len(unreadable), unreadable, failed=False)

    def _load(self, index: int, epoch: int) -> Item:
        try:
            image, text, image_id = self.source[index]
            _check_text(text)
            picture = None if image is None else read_image(image)
        except FileNotFoundError as error:
            raise UnreadableItem(str(error), "missing file") from error
        except ImageError as error:
            raise UnreadableItem(str(error), "broken image") from error
        except OSError as error:
            raise UnreadableItem(str(error)) from error
        return Item(picture, text, image_id, index, epoch, self.seed)


def _check_text(text: str | None) -> None:
    if text is None:
        return
    if not text.strip():
        raise UnreadableItem("there is no text", "empty text")
    try:
        text.encode("utf-8")  # tokenizers refuse half a surrogate pair, which JSON can hold
    except UnicodeEncodeError as error:
        raise UnreadableItem(f"the text is not Unicode ({error.reason})") from error


def _unchanged(fetched: Any) -> Any:
    return fetched
