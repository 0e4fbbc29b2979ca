"""One timer of the event loop for all deadlines.

Most operations end long before their deadline. A timer of asyncio for each would cost more
than the rest of its bookkeeping: timers are objects that compare themselves in Python.
"""

from __future__ import annotations

import heapq
import itertools
import math
import weakref
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


class Finite(Protocol):
    """Something that has a deadline."""

    left: int  # 0: it has ended, and its deadline means nothing any more


T = TypeVar("T", bound=Finite)

_AT_ONCE = 256
_SLACK = 64  # ended entries worth keeping: rebuilding a short heap again and again is not free


class Deadlines(Generic[T]):
    """Calls ``expire`` with whatever has not ended by its deadline."""

    def __init__(self, loop: asyncio.AbstractEventLoop, expire: Callable[[T], None]) -> None:
        self._loop = loop
        self._expire = expire
        # Weak: who has ended and is wanted no more does not wait here for its deadline.
        self._heap: list[tuple[float, int, weakref.ref[T]]] = []
        self._numbers = itertools.count()
        self._ended = 0
        self._timer: asyncio.Handle | None = None
        # Not asked of the timer: uvloop's for what is due at once can't tell.
        self._due = math.inf

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, thing: T, when: float) -> None:
        """Set a deadline, in the loop's time."""
        heapq.heappush(self._heap, (when, next(self._numbers), weakref.ref(thing)))
        if when < self._due:
            self._arm()

    def ended(self) -> None:
        """One thing has ended in time; forget such things now and then."""
        self._ended += 1
        if self._ended > _SLACK and self._ended * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if (thing := entry[2]()) and thing.left]
            heapq.heapify(self._heap)
            self._ended = 0

    def close(self) -> None:
        """Let go of the loop's timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        self.close()
        self._due = self._heap[0][0] if self._heap else math.inf
        self._timer = self._loop.call_at(self._due, self._fire) if self._heap else None

    def _fire(self) -> None:
        now = self._loop.time()
        for _ in range(_AT_ONCE):  # the others in the next turn of the loop
            if not self._heap or self._heap[0][0] > now:
                break
            thing = heapq.heappop(self._heap)[2]()
            if thing is not None and thing.left:
                self._expire(thing)
        self._arm()
