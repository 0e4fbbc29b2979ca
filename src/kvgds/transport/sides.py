"""What goes through a lane on one *side*: what waits, what moves, and how much may.

There are three: loads that somebody waits for, other loads, and stores.

Storage tends to end what it was given together at one moment. Were everything in its hands, it
would then stand idle while the event loop answers and asks for more. So half of what is moved at a
time waits here, staged, in *windows*: when a flight lands the next one leaves at once, before
anybody is told. And what storage has in its hands goes before whatever comes next: so beside loads
that somebody waits for, in whichever lane, the others have no more there than those, or one flight.

Belongs to the reactor's thread; those of other lanes look at what they make way for.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from kvgds import contention
from kvgds.transport.agent import POOL_ROWS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvgds.transport.agent import Request
    from kvgds.transport.contract import Rows, Transfer

    Deliver = Callable[[list[Any]], None]

GROUP_ROWS = 64
BLOCK_ROWS = POOL_ROWS // 4
_SIDE_ROWS = POOL_ROWS // 3 - BLOCK_ROWS - GROUP_ROWS  # each side may have one more flight
_GROUP_BYTES = 4 << 20
_CONTENDED_GROUP_BYTES = 32 << 20
_WINDOW_BYTES = (2 << 20, 8 << 20)  # less than that need not wait: of quick storage, of slow
_QUICK_S = 4e-3  # a flight; where it takes longer, depth counts, and not the time until the next
_SIDE_FLIGHTS = 4  # of small ones more would only be smaller still, and each costs calls
_LARGE_BYTES = 1 << 20
_LATELY = 8  # flights
_MOMENT_S = 10e-3  # in which who has loaded loads again
_STUCK_S = 0.2  # a flight that takes as long holds up no window


class Member:
    """A transfer on its way through a lane."""

    __slots__ = ("deliver", "retried", "rows", "side", "transfer")

    def __init__(self, transfer: Transfer, deliver: Deliver, side: Side) -> None:
        self.transfer = transfer
        self.deliver = deliver
        self.side = side
        self.rows: Rows = []
        self.retried = False

    @property
    def gpu(self) -> int | None:
        """The GPU with whose memory storage moves it; None: with the host's. Once it has begun."""
        return self.transfer.device if self.transfer.device_rows else None


class Flight:
    """Transfers that travel together: a request for host memory, and perhaps one for a GPU's."""

    __slots__ = ("members", "nbytes", "requests", "rows", "since")

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.rows = 0
        self.nbytes = 0
        self.requests: list[Request] = []
        self.since = 0.0

    def add(self, member: Member) -> None:
        """Take one more along."""
        self.members.append(member)
        self.rows += len(member.rows) + len(member.transfer.device_rows)
        self.nbytes += member.transfer.nbytes


class Side:
    """What goes through a lane beside other sides, from stage to stage."""

    def __init__(self, before: Sequence[Side] = ()) -> None:
        self.before = before  # of all lanes, the loads that somebody waits for; none for those
        self.waiting: deque[Member] = deque()
        self.copying: deque[Member] = deque()  # begun; copies are under way
        self.staged: deque[Member] = deque()  # its rows may move
        self.flights: deque[Flight] = deque()
        self.stuck: list[Flight] = []  # for so long that nothing waits for them any more
        self.queued_bytes = 0  # of those not in flight
        self.staged_bytes = 0
        self.flying_bytes = 0  # but those stuck
        self.flying_rows = 0  # those stuck, too
        self.landed_at = 0.0
        self.untold = 0  # flights that no ring tells of: GPU memory's
        self.took = 0.0  # the last flight, in seconds
        self.crowd = 0  # the most bytes that it had lately

    def queue(self, member: Member) -> None:
        """Take what has come in."""
        self.waiting.append(member)
        self.expect(member.transfer.nbytes)

    def expect(self, nbytes: int) -> None:
        """Count bytes that are to be moved."""
        self.queued_bytes += nbytes
        self.crowd = max(self.crowd, self.flying_bytes + self.queued_bytes)

    def busy(self) -> bool:
        """Whether anything is on its way."""
        return bool(self.queued_bytes or self.flights or self.stuck)

    def has_rows(self) -> bool:
        """Whether NIXL takes one more flight, whatever its size."""
        return self.flying_rows < _SIDE_ROWS

    def open(self) -> bool:
        """Whether one more flight may leave: within the window, and not of little among many."""
        if not self.has_rows():
            return False
        return self.flying_bytes < self.window() and (
            len(self.flights) < _SIDE_FLIGHTS or self.queued_bytes >= _LARGE_BYTES
        )

    def window(self) -> int:
        """Bytes that storage has at most: half of what there was lately, unless that is little.

        Not of what there is: while the loop has the rest, storage would be given ever less.

        Beside loads that somebody waits for, a side of all lanes has no more there than those, or a
        flight. Else there is no limit while the interpreter lock is wanted: then each flight costs
        a wait.
        """
        least = _WINDOW_BYTES[self.took > _QUICK_S]
        half = max(least, self.crowd // 2)
        if any(side.at_work() for side in self.before):
            most = max(_GROUP_BYTES, sum(side.flying_bytes for side in self.before))
            return min(half, most // len(self.before))
        return sys.maxsize if contention.busy() else half

    def at_work(self) -> bool:
        """Whether anything is in flight, or was a moment ago."""
        return bool(self.flying_bytes) or time.monotonic() - self.landed_at < _MOMENT_S

    def group_bytes(self) -> int:
        """How large a flight may be: several make a window, but each costs waits for the lock."""
        most = _CONTENDED_GROUP_BYTES if contention.busy() else _GROUP_BYTES
        return min(most, self.window())

    def board(self) -> Flight:
        """The staged transfers that go next, of one memory: a GPU that hangs keeps no other's."""
        flight, others = Flight(), deque[Member]()
        most, gpu = self.group_bytes(), self.staged[0].gpu
        while self.staged and flight.rows < GROUP_ROWS and flight.nbytes < most:
            member = self.staged.popleft()
            if member.gpu == gpu:
                flight.add(member)
            else:
                others.append(member)
        self.staged.extendleft(reversed(others))
        self.queued_bytes -= flight.nbytes
        self.staged_bytes -= flight.nbytes
        return flight

    def depart(self, flight: Flight) -> None:
        """Count a flight that storage has."""
        self.flights.append(flight)
        self.flying_bytes += flight.nbytes
        self.flying_rows += flight.rows
        self.untold += len(flight.requests) > 1

    def land(self, flight: Flight, now: float) -> None:
        """Count a flight that is over."""
        self.took = now - flight.since
        self.crowd -= (self.crowd - self.flying_bytes - self.queued_bytes) // _LATELY
        self.landed_at = now
        self.flying_rows -= flight.rows
        if flight in self.stuck:
            self.stuck.remove(flight)
        else:
            self._leave(flight)

    def _leave(self, flight: Flight) -> None:
        self.flights.remove(flight)
        self.flying_bytes -= flight.nbytes
        self.untold -= len(flight.requests) > 1

    def stalled(self, since: float) -> bool:
        """Whether nothing has landed since, though a flight left before then; or one is stuck."""
        if self.stuck:
            return True
        return bool(self.flights) and max(self.landed_at, self.flights[0].since) < since

    def give_up(self, now: float) -> None:
        """Set aside flights that take so long that others should not wait for their window."""
        for flight in [each for each in self.flights if now - each.since > _STUCK_S]:
            self._leave(flight)
            self.stuck.append(flight)


class Sides(NamedTuple):
    """Those of one lane.

    Attributes:
        first: loads that somebody waits for.
        loads: the others.
        stores: all of them.
    """

    first: Side
    loads: Side
    stores: Side

    def of(self, transfer: Transfer) -> Side:
        """Which a transfer belongs to."""
        if transfer.write:
            return self.stores
        return self.first if transfer.urgent else self.loads

    def hasten(self) -> None:
        """Loads that somebody has come to wait for meanwhile go first, unless they have left."""
        first, loads = self.first, self.loads
        for late, sooner in ((loads.waiting, first.waiting), (loads.staged, first.staged)):
            for member in [each for each in late if each.transfer.urgent]:
                late.remove(member)
                sooner.append(member)
                member.side = first
                nbytes = member.transfer.nbytes
                loads.queued_bytes -= nbytes
                first.expect(nbytes)
                if late is loads.staged:
                    loads.staged_bytes -= nbytes
                    first.staged_bytes += nbytes


def sides(lanes: int) -> list[Sides]:
    """Those of so many lanes."""
    first = [Side() for _ in range(lanes)]
    return [Sides(each, Side(before=first), Side(before=first)) for each in first]
