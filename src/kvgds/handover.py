"""Handing over the interpreter lock, where the event loop never waits.

A thread that wants the lock asks for it only after `sys.getswitchinterval()` in which nobody gave
it up (CPython's ``take_gil``). A loop that always has something ready gives it up in every turn,
but for microseconds, in which no other gets going. With turns shorter than that interval, 5 ms,
no other thread ever has the lock. So while others have work to do for the loop, it is looked
whether they come to it. If nothing is heard of them, and the loop hardly waits, it sleeps for a
moment.

Belongs to the event loop's thread.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

_LEAST_S = 2e-3
_MOST_S = (0.128, 16e-3)  # where nothing is heard: storage is slow, or hangs; and elsewhere
_BUSY = 0.3  # of the time; a loop that waits more often hands over by that
_MOMENT_S = 1e-6  # it comes to some 60 µs


class Handover:
    """Sees to it that other threads have their turn.

    Args:
        loop: the event loop.
        wanted: whether they have work to do for it.

    Attributes:
        news: something was heard of one of them; whoever hears it sets this.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, wanted: Callable[[], bool]) -> None:
        self.news = False
        self._loop = loop
        self._wanted = wanted
        self._waits = 0
        self._timer: asyncio.TimerHandle | None = None
        self._every_s = 0.0
        self._since = (0.0, 0.0)

    def begin(self) -> None:
        """There is work for others: look again and again for as long as there is."""
        if self._timer is None:
            self._arm(_LEAST_S)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait for other threads, whatever ``wanted`` says."""
        self._waits += 1
        self.begin()
        try:
            yield
        finally:
            self._waits -= 1

    def close(self) -> None:
        """Let go of the loop's timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, every_s: float) -> None:
        self._every_s = every_s
        self._since = (time.monotonic(), time.thread_time())
        self.news = False
        self._timer = self._loop.call_later(every_s, self._look)

    def _look(self) -> None:
        self._timer = None
        passed, used = time.monotonic() - self._since[0], time.thread_time() - self._since[1]
        starved = not self.news and used > _BUSY * passed
        if starved:
            time.sleep(_MOMENT_S)
        if self._waits or self._wanted():
            longer_s = min(2 * self._every_s, _MOST_S[self.news])
            self._arm(_LEAST_S if starved else longer_s)
