"""Containers for millions of entries in which no one call ever takes long.

A large ``dict`` or ``OrderedDict`` keeps its caller for a tenth of a second per million entries
whenever it grows or makes its holes good, and each full run of the garbage collector for as long
again. These have small parts, and nothing for the collector to follow.

Slots are numbered as ``space`` says: the slab's id, then the place in the slab.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np

from kvgds.tiers.space import SLOT_BITS, SLOT_MASK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

K = TypeVar("K")
V = TypeVar("V")
_MASK = 0x3FF  # of a key's hash
_CHUNK = 1024  # keys of a queue that follow each other
_END = (1 << 64) - 1


class KeyMap(Generic[K]):
    """Which slot has which key; or any other number."""

    __slots__ = ("_count", "_parts")

    def __init__(self) -> None:
        self._parts: tuple[dict[K, int], ...] = tuple({} for _ in range(_MASK + 1))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: K | None) -> bool:
        return key in self._parts[hash(key) & _MASK]

    def __getitem__(self, key: K) -> int:
        return self._parts[hash(key) & _MASK][key]

    def get(self, key: K) -> int | None:
        """The slot of a key, if it has one."""
        return self._parts[hash(key) & _MASK].get(key)

    def leading(self, keys: Sequence[K]) -> int:
        """How many of the first keys have slots."""
        parts = self._parts
        for number, key in enumerate(keys):
            if key not in parts[hash(key) & _MASK]:
                return number
        return len(keys)

    def add(self, key: K, slot: int) -> None:
        """Give a slot to a key that has none."""
        self._parts[hash(key) & _MASK][key] = slot
        self._count += 1

    def remove(self, key: K) -> None:
        """Take a key's slot from it."""
        del self._parts[hash(key) & _MASK][key]
        self._count -= 1


class KeyQueue(Generic[K, V]):
    """Keys in the order in which they came, each with a value; any of them may leave."""

    __slots__ = ("_chunk_of", "_chunks", "_newest")

    def __init__(self) -> None:
        self._chunk_of: KeyMap[K] = KeyMap()
        self._chunks: OrderedDict[int, dict[K, V]] = OrderedDict()  # oldest first
        self._newest = 0

    def __len__(self) -> int:
        return len(self._chunk_of)

    def __contains__(self, key: K) -> bool:
        return key in self._chunk_of

    def __iter__(self) -> Iterator[K]:
        """From the oldest on; nothing may come or leave meanwhile."""
        for chunk in self._chunks.values():
            yield from chunk

    def get(self, key: K) -> V | None:
        """The value of a key. Others than who owns the queue may miss one that is just renewed."""
        place = self._chunk_of.get(key)
        chunk = self._chunks.get(place) if place is not None else None
        return chunk.get(key) if chunk is not None else None

    def append(self, key: K, value: V) -> None:
        """Make a key the newest, whether it was there or not."""
        if key in self:
            self.pop(key)
        chunk = self._chunks.get(self._newest)
        if chunk is None or len(chunk) == _CHUNK:
            self._newest += 1
            chunk = self._chunks[self._newest] = {}
        chunk[key] = value
        self._chunk_of.add(key, self._newest)

    def keep(self, most: int) -> list[V]:
        """Let the oldest leave while there are more than so many: their values."""
        return [self.pop(next(iter(self))) for _ in range(len(self) - most)]

    def pop(self, key: K) -> V:
        """Let a key leave that is there: its value."""
        place = self._chunk_of[key]
        self._chunk_of.remove(key)
        chunk = self._chunks[place]
        value = chunk.pop(key)
        if not chunk:
            del self._chunks[place]
        elif place != self._newest and not len(chunk) & (len(chunk) - 1):  # a power of two
            self._chunks[place] = dict(chunk)  # that has become small keeps its memory, this not
        return value


def column(length: int) -> memoryview[int]:
    """Numbers from 0 to 2**64 - 1, all 0; takes memory where it is written to."""
    return np.zeros(length, np.uint64).data


class Links(NamedTuple):
    """For each place of a slab, its slot's neighbours in an order."""

    before: memoryview[int]
    after: memoryview[int]


class Order:
    """Slots in an order of their own: a doubly linked list. A slot is in one at a time.

    Args:
        links: of each slab, by id; shared between orders.
    """

    __slots__ = ("_count", "_links", "first", "last")

    def __init__(self, links: dict[int, Links]) -> None:
        self._links = links
        self._count = 0
        self.first = self.last = _END

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        slot = self.first
        while slot != _END:
            yield slot
            slot = self._links[slot >> SLOT_BITS].after[slot & SLOT_MASK]

    def append(self, slot: int) -> None:
        """Make it the last."""
        before, after = self._links[slot >> SLOT_BITS]
        place, last = slot & SLOT_MASK, self.last
        before[place], after[place] = last, _END
        if last == _END:
            self.first = slot
        else:
            self._links[last >> SLOT_BITS].after[last & SLOT_MASK] = slot
        self.last = slot
        self._count += 1

    def prepend(self, slot: int) -> None:
        """Make it the first."""
        before, after = self._links[slot >> SLOT_BITS]
        place, first = slot & SLOT_MASK, self.first
        before[place], after[place] = _END, first
        if first == _END:
            self.last = slot
        else:
            self._links[first >> SLOT_BITS].before[first & SLOT_MASK] = slot
        self.first = slot
        self._count += 1

    def renew(self, slot: int) -> None:
        """Make one of them the last, as each load does: so by itself, not by two calls."""
        last, links = self.last, self._links
        if slot == last:
            return
        before, after = links[slot >> SLOT_BITS]
        place = slot & SLOT_MASK
        left, right = before[place], after[place]
        if left == _END:
            self.first = right
        else:
            links[left >> SLOT_BITS].after[left & SLOT_MASK] = right
        links[right >> SLOT_BITS].before[right & SLOT_MASK] = left
        before[place], after[place] = last, _END
        links[last >> SLOT_BITS].after[last & SLOT_MASK] = slot
        self.last = slot

    def remove(self, slot: int) -> None:
        """Take it out."""
        links = self._links
        before, after = links[slot >> SLOT_BITS]
        left, right = before[slot & SLOT_MASK], after[slot & SLOT_MASK]
        if left == _END:
            self.first = right
        else:
            links[left >> SLOT_BITS].after[left & SLOT_MASK] = right
        if right == _END:
            self.last = left
        else:
            links[right >> SLOT_BITS].before[right & SLOT_MASK] = left
        self._count -= 1
