"""What is under way: a call is a *batch* of *waiters*, one a block, who wait for *flights*.

Waiters for the same block share a flight, one I/O. A waiter has a flight until it has its outcome;
a batch wakes its task when nothing is left, or at every outcome where each is wanted at once.

Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from kvgds.blocks import Outcome
from kvgds.errors import BusyError, ConfigError
from kvgds.memory.device import stream_of
from kvgds.schedule import Priority

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from kvgds.blocks import BlockKey
    from kvgds.deadlines import Deadlines
    from kvgds.errors import Settled
    from kvgds.memory import View
    from kvgds.paths import Move, Path
    from kvgds.schedule import Ticket

T = TypeVar("T")
_PENDING = Outcome(b"", "pending")


def listed(field: str, items: Iterable[T], rule: str) -> list[T]:
    """What a caller gave to go through.

    Raises:
        ConfigError: there is nothing to go through.
    """
    try:
        walk = iter(items)
    except TypeError:
        raise ConfigError(field, type(items).__name__, rule) from None
    return list(walk)


def pairs(items: Iterable[tuple[BlockKey, Any]]) -> list[tuple[BlockKey, Any]]:
    """The blocks of a call.

    Raises:
        ConfigError: they are no pairs.
    """
    rule = "must be pairs: [(key, memory), ...]"
    found = listed("items", items, rule)
    for item in found:
        if not isinstance(item, tuple | list) or len(item) != 2:  # noqa: PLR2004 - a pair
            raise ConfigError("items", type(item).__name__, rule)
    return [(key, memory) for key, memory in found]  # a caller's lists may change meanwhile


class Overdue:
    """Memory that is in use past a deadline; an ``errors.Settled``."""

    def __init__(self, *blocks: asyncio.Future[None]) -> None:
        self.blocks = blocks

    def __await__(self) -> Generator[Any, None, None]:
        """See ``Settled``."""
        for block in self.blocks:
            yield from asyncio.shield(block).__await__()

    def add_done_callback(self, callback: Callable[[Settled], object]) -> None:
        """See ``Settled``."""
        asyncio.gather(*self.blocks).add_done_callback(lambda _: callback(self))

    def set(self) -> None:
        """The memory is free."""
        for block in self.blocks:
            block.set_result(None)


class Batch:
    """One call's blocks; wakes its task once for all, or once for each group that ends."""

    __slots__ = (
        "__weakref__",
        "admission",
        "admitted",
        "arrivals",
        "deadlines",
        "expired",
        "left",
        "loop",
        "outcomes",
        "priority",
        "since",
        "stream",
        "stream_owner",
        "waiters",
        "wakeup",
        "write",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        deadlines: Deadlines[Batch],
        blocks: int,
        priority: Priority,
        *,
        write: bool,
        each: bool,
        stream: object,
    ) -> None:
        self.loop = loop
        self.deadlines = deadlines
        self.write = write
        self.priority = priority
        # What uses the blocks' memory, if that is a GPU's.
        self.stream = 0 if stream is None else stream_of(stream)
        self.stream_owner = stream  # CuPy's are destroyed with their object
        self.since = time.monotonic()  # to measure by: the time of uvloop has milliseconds only
        self.outcomes = [_PENDING] * blocks  # complete once nothing is left
        self.left = blocks
        self.waiters: list[Waiter] = []
        self.admitted = 0  # blocks so far
        self.admission: asyncio.Handle | None = None  # of the next; None: there are no more
        self.arrivals: deque[Outcome] | None = deque() if each else None
        self.wakeup: asyncio.Future[None] | None = None  # of its task
        self.expired = False

    def settle(self, index: int, outcome: Outcome) -> None:
        """One block has ended."""
        self.outcomes[index] = outcome
        self.left -= 1
        if self.arrivals is not None:
            self.arrivals.append(outcome)
        elif self.left:
            return
        if not self.left:
            self._over()
        if self.wakeup is not None and not self.wakeup.done():
            self.wakeup.set_result(None)

    def admit_no_more(self) -> None:
        """Those that were not admitted never will be."""
        if self.admission is None:
            return
        self.admission.cancel()
        self.admission = None
        self.left -= len(self.outcomes) - self.admitted
        if not self.left:
            self._over()

    def _over(self) -> None:
        self.waiters.clear()  # they hold it
        self.deadlines.ended()

    async def news(self) -> None:
        """Wait until something has ended that the task has not seen."""
        if self.wakeup is not None:
            raise BusyError("another task awaits this operation; it wakes one alone")
        self.wakeup = self.loop.create_future()
        try:
            await self.wakeup
        finally:
            self.wakeup = None


class Waiter:
    """One block of one call."""

    __slots__ = ("batch", "flight", "index", "overdue", "view")

    def __init__(self, batch: Batch, index: int, view: View) -> None:
        self.batch = batch
        self.index = index
        self.view = view
        self.flight: Flight | None = None  # None once it has its outcome
        self.overdue: Overdue | None = None  # told of its deadline, memory still in use


class Flight:
    """One I/O on one block, and everybody who waits for it."""

    __slots__ = (
        "copying",
        "doubt",
        "key",
        "landed",
        "lasting",
        "leader",
        "level",
        "mirroring",
        "move",
        "path",
        "priority",
        "ticket",
        "waiters",
        "write",
    )

    def __init__(self, key: BlockKey, leader: Waiter, *, level: int, write: bool) -> None:
        self.key = key
        self.level = level  # number of the tier that it goes to, or comes from
        self.path: Path
        self.write = write
        self.leader = leader  # whose memory moves, even if it waits no longer
        self.priority = leader.batch.priority  # the highest of all who came
        self.waiters = {leader: None}  # in the order in which they came
        self.ticket: Ticket[Any]
        self.move: Move | None = None  # set when it starts
        self.landed = False  # its move has ended, and will be settled in a moment
        self.copying = False
        self.lasting = True  # what it loads may be kept: it was not deleted meanwhile
        self.doubt: Exception | None = None  # what was wrong in the tiers asked so far
        self.mirroring = False  # stored, and waits for the next tier: memory is used no more

    @property
    def urgent(self) -> bool:
        """Whether somebody stands still until it has ended."""
        return self.priority is Priority.DEMAND

    def takes(self, waiter: Waiter) -> bool:
        """Whether one more may share this I/O.

        What is loaded into a GPU's memory does not: a copy between two would wait for both streams.
        """
        one, other = self.leader.view, waiter.view
        on_gpu = one.region.device is not None or other.region.device is not None
        if on_gpu and not self.write:
            return False
        return one.nbytes == other.nbytes and bool(self.waiters) and not self.copying

    def verdict(self, error: Exception | None) -> Exception | None:
        """What is told when the last tier had no block either, or the error that it gave."""
        if error is not None and self.doubt is not None:
            error.add_note(f"and before that: {self.doubt}")
        return error or self.doubt
