"""What may start now: order, budgets and bounce leases, decided without doing any I/O.

Owns the queue of operations that have not started, the budget of each lane (one direction of one
tier) and the address space of the bounce region. Pure: no I/O, no clock (``now`` is passed in), no
asyncio, no threads. It runs on the event loop, for every block, so an operation costs O(log n) of
what is queued, and a `take` that starts nothing O(lanes).

**Order.** One rule gives both priority and aging. At submission an operation gets
``rank = now + handicap_s[priority]``, a virtual arrival time, and the lower rank goes first; equal
ranks go in the order of submission. A demand load therefore overtakes the prefetches and stores
that came a moment before it, while nothing submitted later than ``now + handicap_s`` ever goes
ahead of them: waiting is bounded and no timer has to promote anybody. Stamping each arrival with a
virtual time and serving by stamp is the idea of Virtual Clock (L. Zhang, SIGCOMM 1990) and of
start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996).

**Resources.** A head that its own lane has no room for holds up that lane only. A head that the
bounce region has no room for holds up everything of a later rank that needs bounce bytes, or else
a stream of small operations would starve a big one; operations that need none still go. Within a
lane the order is strictly by rank. The region may be in parts, each for lanes of its own: who waits
for room in one keeps none in another.

Invariants:

- State changes in the decision: an operation that `Scheduler.take` returns holds its budget and
  its lease already, and keeps both until `Scheduler.finish`.
- The first entry of every lane's heap is live; the cancelled entries behind it are no more than
  the live ones, or than a small constant.
- Counters are kept, never recomputed.
"""

from __future__ import annotations

import enum
import math
from bisect import bisect_left
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Generic, Literal, TypeAlias, TypeVar

from kvgds.blocks import PAGE, padded

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "HANDICAP_S",
    "PAGE",
    "Lane",
    "Pages",
    "Priority",
    "Row",
    "Scheduler",
    "Ticket",
    "coalesce",
]

T = TypeVar("T")
Row: TypeAlias = tuple[int, int, int]
"""Memory address, file offset, bytes."""

# Few enough that a take which finds nothing costs two microseconds, and enough that a zone of a
# pool with thousands of leases holds tens of runs, not hundreds.
_ZONES: Final = 64

# Cancelled entries worth keeping in a heap: rebuilding a short one again and again is not free.
_SLACK: Final = 64


class Priority(enum.IntEnum):
    """Who waits for the operation; decides its handicap."""

    DEMAND = 0
    """A request stands still until it is done: a load that the model needs now."""
    PREFETCH = 1
    """It will be wanted soon."""
    BACKGROUND = 2
    """Nobody waits: stores, write-back, promotion."""


HANDICAP_S: Final[Mapping[Priority, float]] = MappingProxyType(
    {Priority.DEMAND: 0.0, Priority.PREFETCH: 0.05, Priority.BACKGROUND: 0.25}
)
"""How much later than it came an operation is taken to have come, in seconds."""


@dataclass(frozen=True, slots=True)
class Lane:
    """Limits on what one direction of one tier may have in flight."""

    ops: int
    """Operations at once, at least 1."""
    bytes: int
    """Bytes at once, at least 1, but for the first operations, see ``least``."""
    part: int = 0
    """Which part of the bounce region its leases lie in; there are as many as lanes name."""
    least: int = 1
    """Operations at once however many bytes they have, at least 1: none may wait for ever."""

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could ever run."""
        if not 1 <= self.least <= self.ops or self.bytes < 1 or self.part < 0:
            rule = "ops >= least >= 1, bytes >= 1 and part >= 0"
            raise ValueError(f"a lane needs {rule}, got {self}")


class Pages:
    """Address space of the bounce region: contiguous leases in whole pages, lowest address first.

    First fit, so that consecutive takes on a fresh pool are neighbours in memory and `coalesce`
    can make one I/O of them. Free runs never touch: neighbours merge when a lease comes back.
    A region that is not a whole number of pages is rounded down, because it is the user's budget.

    Attributes:
        free: free bytes, whether contiguous or not.
    """

    __slots__ = ("_bounds", "_leases", "_sizes", "_span", "_starts", "free")

    def __init__(self, nbytes: int) -> None:
        """Make a pool over ``nbytes`` bytes, all of them free."""
        if nbytes < 0:
            raise ValueError(f"a pool of {nbytes} bytes")
        whole = nbytes - nbytes % PAGE
        self._starts: list[int] = []
        self._sizes: list[int] = []
        self._leases: dict[int, int] = {}
        self.free = 0
        # Per zone of the address space, never less than the biggest run that starts in it: first
        # fit passes by zones full of fragments, and each of their scans is paid for by a give.
        self._span = max(whole // _ZONES, PAGE)
        self._bounds = [0] * (whole // self._span + 1)
        if whole:
            self._release(0, whole)

    @property
    def largest(self) -> int:
        """Bytes of the biggest free run."""
        return max(self._sizes, default=0)

    def take(self, nbytes: int) -> int | None:
        """Lease ``nbytes`` and return their offset, or None if no free run is long enough now.

        Zero bytes cost nothing and lie at offset 0.
        """
        need = _padded(nbytes)
        if need == 0:
            return 0
        sizes = self._sizes
        if not sizes:
            return None
        # Leases of one size nearly always fit the first run.
        if sizes[0] >= need:
            return self._lease(0, need)
        for zone, bound in enumerate(self._bounds):
            if bound >= need:
                index = self._first_fit(zone, need)
                if index is not None:
                    return self._lease(index, need)
        return None

    def give(self, offset: int, nbytes: int) -> None:
        """Give a lease back, with the numbers of its `take`. ValueError if it is not leased."""
        need = _padded(nbytes)
        if need == 0 and offset == 0:
            return
        # Checked, because a lease given back twice would be lent to two operations at once.
        if self._leases.get(offset) != need:
            raise ValueError(f"no lease of {nbytes} bytes at offset {offset}")
        del self._leases[offset]
        self._release(offset, need)

    def _first_fit(self, zone: int, need: int) -> int | None:
        sizes = self._sizes
        first = bisect_left(self._starts, zone * self._span)
        stop = bisect_left(self._starts, (zone + 1) * self._span, first)
        for index in range(first, stop):
            if sizes[index] >= need:
                return index
        self._bounds[zone] = max(sizes[first:stop], default=0)
        return None

    def _lease(self, index: int, need: int) -> int:
        start, size = self._starts[index], self._sizes[index]
        if size == need:
            del self._starts[index], self._sizes[index]
        else:
            self._starts[index] = start + need
            self._sizes[index] = size - need
            self._raise_bound(start + need, size - need)
        self._leases[start] = need
        self.free -= need
        return start

    def _release(self, start: int, size: int) -> None:
        starts, sizes = self._starts, self._sizes
        self.free += size
        index = bisect_left(starts, start)
        if index < len(starts) and starts[index] == start + size:
            size += sizes[index]
            del starts[index], sizes[index]
        if index and starts[index - 1] + sizes[index - 1] == start:
            index -= 1
            start = starts[index]
            size += sizes[index]
            sizes[index] = size
        else:
            starts.insert(index, start)
            sizes.insert(index, size)
        self._raise_bound(start, size)

    def _raise_bound(self, start: int, size: int) -> None:
        zone = start // self._span
        self._bounds[zone] = max(self._bounds[zone], size)


class Ticket(Generic[T]):
    """One operation's place in the schedule. Read-only outside this module."""

    __slots__ = ("bounce_bytes", "lane", "nbytes", "offset", "op", "priority", "since", "state")

    def __init__(
        self, op: T, lane: str, nbytes: int, bounce_bytes: int, *, priority: Priority, since: float
    ) -> None:
        """Use `Scheduler.submit`."""
        self.op = op
        """Gone once it is done: it may hold the ticket, and a cycle waits for the collector."""
        self.lane = lane
        self.nbytes = nbytes
        self.bounce_bytes = bounce_bytes
        self.priority = priority
        self.since = since
        """When it was submitted."""
        self.offset: int | None = None
        """Where its bounce lease lies while it runs (0 if it needs none), else None."""
        self.state: Literal["queued", "running", "done"] = "queued"
        """A cancelled ticket is ``done`` too."""

    def __repr__(self) -> str:
        """Leave the operation out: it may be big."""
        return f"<Ticket {self.state} {self.lane} {self.priority.name} {self.nbytes} bytes>"


_Entry: TypeAlias = tuple[float, int, Ticket[T]]


class _Part:
    """A stretch of the bounce region: lanes of other parts can neither fill nor fragment it."""

    __slots__ = ("base", "nbytes", "pages")

    def __init__(self, base: int, nbytes: int) -> None:
        self.base = base
        self.nbytes = nbytes
        self.pages = Pages(nbytes)

    def take(self, nbytes: int) -> int | None:
        """As `Pages.take`; the offset is the region's, but 0 for no bytes."""
        offset = self.pages.take(nbytes)
        return self.base + offset if offset is not None and nbytes else offset

    def give(self, offset: int, nbytes: int) -> None:
        """As `Pages.give`."""
        self.pages.give(offset - self.base if nbytes else offset, nbytes)


def _parts(bounce_bytes: int, count: int) -> list[_Part]:
    """Parts of one size, but that the first gets the pages that are left over."""
    whole = bounce_bytes - bounce_bytes % PAGE
    share = whole // count // PAGE * PAGE
    first = whole - (count - 1) * share
    return [_Part(0, first), *(_Part(first + n * share, share) for n in range(count - 1))]


class _Queue(Generic[T]):
    """One lane: its limits, what it has in flight, and a heap of what waits."""

    __slots__ = ("bytes", "cancelled", "heap", "limit", "ops", "part")

    def __init__(self, limit: Lane, part: _Part) -> None:
        self.limit = limit
        self.part = part
        self.ops = 0
        self.bytes = 0
        self.heap: list[_Entry[T]] = []
        self.cancelled = 0

    def head(self) -> _Entry[T] | None:
        """Return the entry that starts next, or None while there is none or no room for it."""
        if not self.heap:
            return None
        entry = self.heap[0]
        limit = self.limit
        if self.ops < limit.least:
            return entry
        fits = self.ops < limit.ops and self.bytes + entry[2].nbytes <= limit.bytes
        return entry if fits else None

    def start_head(self) -> None:
        """Move the head out of the heap and onto the lane's budget."""
        self.ops += 1
        self.bytes += heappop(self.heap)[2].nbytes
        if self.cancelled:
            self._sweep()

    def drop(self) -> None:
        """Account for one more cancelled entry."""
        self.cancelled += 1
        self._sweep()

    def _sweep(self) -> None:
        while self.cancelled and self.heap[0][2].state != "queued":
            heappop(self.heap)
            self.cancelled -= 1
        # Behind a head that waits for long, cancelled entries would pile up without bound.
        if self.cancelled > _SLACK and self.cancelled * 2 > len(self.heap):
            self.heap = [entry for entry in self.heap if entry[2].state == "queued"]
            heapify(self.heap)
            self.cancelled = 0


class Scheduler(Generic[T]):
    """Decides what starts, in which order; see the module's docstring for the rules.

    Attributes:
        queued: operations that wait.
        queued_bytes: of those.
        running: operations that have started and not finished.
    """

    __slots__ = (
        "_handicaps", "_lanes", "_parts", "_sequence", "queued", "queued_bytes", "running",
    )  # fmt: skip

    def __init__(
        self,
        lanes: Mapping[str, Lane],
        *,
        bounce_bytes: int,
        handicap_s: Mapping[Priority, float] = HANDICAP_S,
    ) -> None:
        """Start with empty lanes and a whole bounce pool of ``bounce_bytes``."""
        parts = _parts(bounce_bytes, 1 + max((lane.part for lane in lanes.values()), default=0))
        self._parts = parts
        self._lanes: dict[str, _Queue[T]] = {
            name: _Queue(lane, parts[lane.part]) for name, lane in lanes.items()
        }
        # In a tuple by the priority's number, because hashing an enum runs Python code.
        self._handicaps = tuple(handicap_s[priority] for priority in Priority)
        if not all(0 <= handicap < math.inf for handicap in self._handicaps):
            raise ValueError(f"handicap_s must be finite and not negative, got {handicap_s}")
        self._sequence = self.queued = self.queued_bytes = self.running = 0

    @property
    def free_bounce(self) -> int:
        """Free bytes of the bounce pool, whether contiguous or not."""
        return sum(part.pages.free for part in self._parts)

    def submit(
        self, op: T, *, lane: str, nbytes: int, bounce_bytes: int, priority: Priority, now: float
    ) -> Ticket[T]:
        """Queue an operation; `take` starts it. KeyError if there is no such lane.

        ValueError if the lane's part of the bounce pool is too small for it: it could never start.
        """
        queue = self._lanes[lane]
        if bounce_bytes > queue.part.nbytes or nbytes < 0 or bounce_bytes < 0:
            raise _refusal(nbytes, bounce_bytes, queue.part.nbytes)
        ticket = Ticket(op, lane, nbytes, bounce_bytes, priority=priority, since=now)
        # The sequence is unique, so that entries never compare by their tickets.
        heappush(queue.heap, (now + self._handicaps[priority], self._sequence, ticket))
        self._sequence += 1
        self.queued += 1
        self.queued_bytes += nbytes
        return ticket

    def cancel(self, ticket: Ticket[T]) -> bool:
        """Drop a queued operation. False, and no change, if it runs or is done."""
        if ticket.state != "queued":
            return False
        # The entry stays in its heap until it comes up: finding it there would cost O(n).
        ticket.state = "done"
        del ticket.op
        self.queued -= 1
        self.queued_bytes -= ticket.nbytes
        self._lanes[ticket.lane].drop()
        return True

    def hasten(self, ticket: Ticket[T], priority: Priority, now: float) -> Ticket[T]:
        """Let a queued operation start as soon as if it were submitted now; return its ticket.

        That is another one, unless it starts as soon anyway.
        """
        handicaps = self._handicaps
        sooner = now + handicaps[priority] < ticket.since + handicaps[ticket.priority]
        if ticket.state != "queued" or not sooner:
            return ticket
        op, lane = ticket.op, ticket.lane
        self.cancel(ticket)
        return self.submit(
            op,
            lane=lane,
            nbytes=ticket.nbytes,
            bounce_bytes=ticket.bounce_bytes,
            priority=priority,
            now=now,
        )

    def take(self) -> list[Ticket[T]]:
        """Start everything that may start now, and return it in the order to start it."""
        started: list[Ticket[T]] = []
        # Lanes without room for their head are left out, so they hold up nobody else.
        heads = [head for lane in self._lanes.values() if (head := lane.head())]
        heapify(heads)
        reserved: set[_Part] = set()
        while heads:
            ticket = heads[0][2]
            part = self._lanes[ticket.lane].part
            offset = part.take(ticket.bounce_bytes)
            if offset is None:
                # Its part is this ticket's from here on: all that still goes is what needs none.
                reserved.add(part)
                heads = [head for head in heads if not self._held_up(head, reserved)]
                heapify(heads)
                continue
            started.append(ticket)
            head = self._start(ticket, offset)
            if head and not self._held_up(head, reserved):
                heapreplace(heads, head)
            else:
                heappop(heads)
        return started

    def _held_up(self, head: _Entry[T], reserved: set[_Part]) -> bool:
        ticket = head[2]
        return bool(ticket.bounce_bytes) and self._lanes[ticket.lane].part in reserved

    def finish(self, ticket: Ticket[T]) -> None:
        """Take back the budget and the lease of an operation that ended, however it ended.

        Call it only when the hardware is done with the lease: the next `take` hands it out again.
        ValueError if the ticket is not running.
        """
        if ticket.state != "running" or ticket.offset is None:
            raise ValueError(f"{ticket} is not running")
        queue = self._lanes[ticket.lane]
        queue.part.give(ticket.offset, ticket.bounce_bytes)
        ticket.state = "done"
        del ticket.op
        # Whoever still holds the ticket must not reach into the next one's lease.
        ticket.offset = None
        queue.ops -= 1
        queue.bytes -= ticket.nbytes
        self.running -= 1

    def _start(self, ticket: Ticket[T], offset: int) -> _Entry[T] | None:
        """Mark the head of a lane as running and return the lane's next head."""
        ticket.state = "running"
        ticket.offset = offset
        self.queued -= 1
        self.queued_bytes -= ticket.nbytes
        self.running += 1
        queue = self._lanes[ticket.lane]
        queue.start_head()
        return queue.head()


def _refusal(nbytes: int, bounce_bytes: int, room: int) -> ValueError:
    if nbytes < 0 or bounce_bytes < 0:
        return ValueError(f"negative size: nbytes={nbytes}, bounce_bytes={bounce_bytes}")
    return ValueError(
        f"the operation takes {_padded(bounce_bytes)} bytes of the bounce region"
        f" ({bounce_bytes} in whole pages), which has only {room}"
    )


def coalesce(rows: list[Row], max_bytes: int) -> list[Row]:
    """Merge neighbours that are adjacent both in memory and in their file.

    ``rows`` are (memory address, file offset, bytes), all for one file and one memory
    registration (a merged row may not span two); the result has the same order. Greedy from
    the first row: a merged row has at most ``max_bytes``, and one that has more stays as it is.
    """
    merged = rows[:1]
    for address, offset, nbytes in rows[1:]:
        before, start, length = merged[-1]
        joins = address == before + length and offset == start + length
        if joins and length + nbytes <= max_bytes:
            merged[-1] = (before, start, length + nbytes)
        else:
            merged.append((address, offset, nbytes))
    return merged


def _padded(nbytes: int) -> int:
    if nbytes < 0:
        raise ValueError(f"negative size: {nbytes}")
    return padded(nbytes)
