"""The thread that moves bytes: it stages transfers, keeps storage busy, and reports what ended.

One lane is one NIXL agent and one thread. NIXL offers no completion callback and no cancel, so a
request is kept until it is done or has failed, whatever became of its awaiter.

The interpreter lock is the resource to spare: while the event loop runs Python, each time
the reactor lets go of the lock it may wait milliseconds for it. So transfers travel in
*flights* of up to 64 rows, only the oldest flight is asked how it is doing, and one call
delivers all that has ended.

When a flight lands the next one, which is staged, leaves at once, before anybody is told; ``sides``
says how much that is.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from kvgds import contention
from kvgds.blocks import PAGE, padded
from kvgds.memory.copies import bytes_at
from kvgds.schedule import coalesce
from kvgds.threads import starting
from kvgds.transport.agent import Agent
from kvgds.transport.contract import LATER, NotMoved
from kvgds.transport.inbox import Inbox, copy_pause, fulfil
from kvgds.transport.sides import BLOCK_ROWS, GROUP_ROWS, Flight, Member

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvgds.schedule import Row
    from kvgds.transport.agent import Descriptors
    from kvgds.transport.contract import File, Rows, Transfer
    from kvgds.transport.sides import Deliver, Side, Sides

_MERGED_BYTES = 1 << 20
_ROW_BYTES = 1 << 30  # Linux moves 2 GiB less a page at a time
_SPIN_S = 100e-6
_SPIN_BYTES = 256 << 10
_SWEEP_S = 10e-3
_SLEEP_S = (100e-6, 1e-3)
_RATE_S = 20e-3
_FIRST_RATE = 2e9  # bytes a second, until measured


class Lane:
    """One agent and its thread, on which run all methods but start, close, submit, call and leak.

    Args:
        name: of the agent and the thread.
        queues: kinds of queue that the agent may have, the best first.
        sides: what goes through it.

    Attributes:
        backend: what moves the bytes, once ``ready``.
        ready: ends when the agent is made, or can't be.
        stopped: ends when the thread does.
    """

    def __init__(self, name: str, queues: Sequence[str], sides: Sides) -> None:
        self.backend = ""
        self.ready: Future[None] = Future()
        self.stopped: Future[None] = Future()
        self._settings = (name, queues)
        self._inbox = Inbox()
        self._sides = sides
        self._alone: deque[Member] = deque()
        self._landing: deque[Member] = deque()  # moved; copies are under way
        self._ended: list[Member] = []
        self._closing = False
        self._rate = _FIRST_RATE
        self._rate_bytes = 0
        self._rate_from = 0.0
        self._moved_at = 0.0
        self._copied_at = 0.0
        self._swept_at = 0.0
        self._agent: Agent
        self._thread = threading.Thread(target=self._main, name=f"kvgds-{name}", daemon=True)

    # --- called from other threads -------------------------------------------------

    def start(self) -> None:
        """Start the thread; see :func:`kvgds.threads.starting`."""
        with starting():
            self._thread.start()

    def close(self) -> Future[None]:
        """End once nothing is under way, or at once if it never began; that is ``stopped``."""
        if self._thread.ident is not None:
            self.call(self._stop)
        elif not self.stopped.done():
            self._finish()
        return self.stopped

    def submit(self, transfers: Sequence[Transfer], deliver: Deliver) -> None:
        """Queue transfers; their ends go to ``deliver``, on the lane's thread."""
        self._inbox.put((transfers, deliver))

    @property
    def load(self) -> int:
        """Bytes that it has and storage has not; a hint for choosing a lane."""
        return sum(side.queued_bytes + side.flying_bytes for side in self._sides)

    def call(self, function: Callable[[], None]) -> Future[None]:
        """Run a function on the lane's thread."""
        future: Future[None] = Future()
        self._inbox.put((function, future))
        return future

    def leak(self) -> None:
        """Keep every object that a wedged transfer may use for as long as the process lives."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

    # --- the reactor ---------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._agent = Agent(*self._settings)
        except Exception as error:  # noqa: BLE001 - it belongs to whoever opens the transport
            self._finish()
            self.ready.set_exception(error)
            return
        if self._agent.ring is not None:
            self._inbox.watch(self._agent.ring)
        self.backend = self._agent.backend
        self.ready.set_result(None)
        while not self._closing or self._working():
            self._inbox.wait(self._pause())
            self._receive()
            self._launch()
            self._poll()
            self._report()
        self._agent.close()
        self._finish()

    def _finish(self) -> None:
        self._inbox.close()
        self.stopped.set_result(None)

    def _stop(self) -> None:
        self._closing = True

    def add_gpu(self) -> None:
        """Add NIXL's plugin for GPU memory."""
        self._agent.add_gpu()

    def forget(self, thing: Any) -> None:  # noqa: ANN401 - a region or a file
        """Deregister what no transfer uses any more."""
        self._agent.forget(thing)

    def _working(self) -> bool:
        return bool(self._alone or self._landing) or any(side.busy() for side in self._sides)

    def _receive(self) -> None:
        """Take what has come in."""
        while (item := self._inbox.take()) is not None:
            what, how = item
            if isinstance(how, Future):
                fulfil(what, how)
                continue
            for transfer in what:
                side = self._sides.of(transfer)
                side.queue(Member(transfer, how, side))

    def _pause(self) -> float | None:
        """How long to wait for news, in seconds; None: until there are some.

        A ring tells of its completions, so that only a lost one would be waited for. Without
        one, and for GPU memory, an eighth of the time that what is in flight should take:
        storage never runs dry meanwhile, and each look costs some 50 µs of CPU. Something small
        is watched without a pause at first, since even the shortest sleep takes as long as it does.
        """
        if self._alone and self._alone[0].side.has_rows():
            return 0.0
        if self._landing or any(side.copying for side in self._sides):
            copying = len(self._landing) + sum(len(side.copying) for side in self._sides)
            return copy_pause(self._copied_at, copying)
        nbytes = sum(side.flying_bytes for side in self._sides)
        if not nbytes:
            stuck = any(side.stuck for side in self._sides)
            return _SWEEP_S if stuck else 0.0 if self._closing else None
        if nbytes <= _SPIN_BYTES and time.monotonic() - self._moved_at < _SPIN_S:
            return 0.0
        if self._agent.ring is not None and not any(side.untold for side in self._sides):
            return _SWEEP_S
        least, most = _SLEEP_S
        return min(max(nbytes / self._rate / 8, least), most)

    # --- staging and launching -----------------------------------------------------

    def _launch(self) -> None:
        """Put transfers in flight, those of a side together; what is waited for first."""
        while self._alone and self._alone[0].side.has_rows():
            flight = Flight()
            flight.add(self._alone.popleft())
            self._post(flight)
        self._sides.hasten()
        for side in self._sides:
            while side.queued_bytes and side.open():
                self._stage(side)
                if not side.staged:
                    break
                self._post(side.board())
        for side in self._sides:  # what will go next, while storage is busy
            if side.flights:
                self._stage(side)

    def _stage(self, side: Side) -> None:
        """Begin as many transfers as a flight takes, unless that many have begun."""
        before = len(side.copying)
        for _ in range(before):
            self._begin(side.copying.popleft(), side)
        left = len(side.copying)
        most = side.group_bytes()
        while side.waiting and side.staged_bytes < most and len(side.staged) < GROUP_ROWS:
            self._begin(side.waiting.popleft(), side)
        if not before == left == len(side.copying):
            self._copied_at = time.monotonic()

    def _begin(self, member: Member, side: Side) -> None:
        transfer = member.transfer
        try:
            self._agent.register(transfer.file, far=False)
            for region in transfer.regions:  # closed: wanted no more, its memory may be gone
                if region.device is not None and not region.closed:
                    self._agent.register(region, far=True)
                    self._agent.register(transfer.file, far=True)
            rows = transfer.begin()
            if isinstance(rows, list) and transfer.nbytes > _ROW_BYTES:
                rows = list(_cut(rows))
            if isinstance(rows, list) and len(rows) > BLOCK_ROWS:
                most = f"{BLOCK_ROWS:,} are the most"
                raise NotMoved(None, f"{len(rows):,} rows, one a fragment and its stamp; {most}")
        except Exception as error:  # noqa: BLE001 - it belongs to this transfer alone
            transfer.fail(error)
            rows = None
        if rows is LATER:
            side.copying.append(member)
        elif rows is None:
            side.queued_bytes -= transfer.nbytes
            self._ended.append(member)
        else:
            member.rows = rows
            side.staged.append(member)
            side.staged_bytes += transfer.nbytes

    def _post(self, flight: Flight) -> None:
        write = flight.members[0].transfer.write
        local: Descriptors = []
        remote: Descriptors = []
        direct = True
        for file, rows in _rows_by_file(flight):
            local += [(address, nbytes, 0) for address, _, nbytes in rows]
            remote += [(offset, nbytes, file.fd) for _, offset, nbytes in rows]
            direct = direct and file.direct
        flight.requests = [self._agent.post(local, remote, write=write, far=False, direct=direct)]
        local, remote = _far_rows(flight)
        if local:
            flight.requests.append(self._agent.post(local, remote, write=write, far=True))
        now = self._moved_at = flight.since = time.monotonic()
        if all(request.done for request in flight.requests):
            self._over(flight)
            return
        if not any(side.flights for side in self._sides):
            self._rate_bytes, self._rate_from = 0, now
        flight.members[0].side.depart(flight)

    # --- landing -------------------------------------------------------------------

    def _poll(self) -> None:
        """Ask the oldest flights; now and then, when one seems stuck, ask them all."""
        now = time.monotonic()
        landing = list(self._landing)
        self._landing.clear()
        self._end(landing)
        if len(self._landing) != len(landing):
            self._copied_at = now
        since = now - _SWEEP_S
        sweep = self._swept_at < since and any(side.stalled(since) for side in self._sides)
        if sweep:
            self._swept_at = now
        for side in self._sides:
            if sweep:
                side.give_up(now)
            for flight in (*side.flights, *(side.stuck if sweep else ())):
                if self._landed(flight, side):
                    self._launch()  # storage first; then those who wait
                    self._over(flight)
                    self._report()
                elif not sweep:
                    break

    def _landed(self, flight: Flight, side: Side) -> bool:
        for request in flight.requests:
            if not self._agent.check(request):
                return False
        now = self._moved_at = time.monotonic()
        side.land(flight, now)
        self._measure(flight.nbytes, now)
        return True

    def _measure(self, nbytes: int, now: float) -> None:
        """Keep the rate at which storage has moved bytes lately, over stretches of busy time."""
        self._rate_bytes += nbytes
        if now - self._rate_from > _RATE_S:
            self._rate = max(self._rate_bytes / (now - self._rate_from), 1e6)
            self._rate_bytes, self._rate_from = 0, now

    def _over(self, flight: Flight) -> None:
        """Every request has ended: only now may what they used be let go."""
        for request in flight.requests:
            self._agent.release(request)
        errors = [request.error for request in flight.requests if request.error is not None]
        if errors:
            self._failed(flight, errors[0])
            return
        before = len(self._landing)
        self._end(flight.members)
        if len(self._landing) != before:
            self._copied_at = time.monotonic()

    def _end(self, members: Sequence[Member]) -> None:
        for member in members:
            try:
                if member.transfer.end() is LATER:
                    self._landing.append(member)
                    continue
            except Exception as error:  # noqa: BLE001 - it belongs to this transfer alone
                member.transfer.fail(error)
            self._ended.append(member)

    def _failed(self, flight: Flight, error: Exception) -> None:
        """NIXL tells only that something in the flight failed: try each member by itself.

        Once more, if then a plain call on its rows succeeds: whatever was wrong has passed. Not if
        some of them lie in GPU memory, where a plain call proves nothing.
        """
        if len(flight.members) > 1:
            self._alone.extend(flight.members)
            return
        (member,) = flight.members
        transfer = member.transfer
        try:
            reason = _diagnose(transfer, member.rows, error)
        except Exception as cause:  # noqa: BLE001 - rows that no call takes; the lane must live
            reason = NotMoved(None, f"{error}: {cause}")
        if reason is None and not (member.retried or transfer.device_rows):
            member.retried = True
            self._alone.append(member)
            return
        transfer.fail(
            reason or NotMoved(None, f"{error}, but a plain call on the same range succeeds")
        )
        self._ended.append(member)

    def _report(self) -> None:
        """Deliver what has ended, with one call for each receiver."""
        ended, self._ended = self._ended, []
        started = time.monotonic()
        groups: dict[Any, list[Transfer]] = {}
        for member in ended:
            groups.setdefault(member.deliver, []).append(member.transfer)
        for deliver, transfers in groups.items():
            deliver(transfers)
        if ended:
            contention.waited(time.monotonic() - started)


def _cut(rows: Rows) -> Iterator[Row]:
    """The same rows, none of them longer than one call moves."""
    for address, offset, nbytes in rows:
        for at in range(0, nbytes, _ROW_BYTES):
            yield address + at, offset + at, min(nbytes - at, _ROW_BYTES)


def _rows_by_file(flight: Flight) -> Iterator[tuple[File, Rows]]:
    """The rows of each run of members that share a file; bounced neighbours become one row."""
    for file, group in itertools.groupby(flight.members, lambda member: member.transfer.file):
        parts = [member.rows for member in group]
        rows = list(itertools.chain.from_iterable(parts))
        yield file, coalesce(rows, _MERGED_BYTES) if 1 < len(parts) == len(rows) else rows


def _far_rows(flight: Flight) -> tuple[Descriptors, Descriptors]:
    """What moves between GPU memory and files."""
    local: Descriptors = []
    remote: Descriptors = []
    for member in flight.members:
        transfer = member.transfer
        for address, offset, nbytes in transfer.device_rows:
            local.append((address, nbytes, transfer.device))
            remote.append((offset, nbytes, transfer.file.fd))
    return local, remote


def _diagnose(transfer: Transfer, rows: Rows, error: Exception) -> NotMoved | None:
    """What the system says of the same rows: NIXL's errors carry no errno. None: nothing."""
    fd = transfer.file.fd
    far = [(0, offset, nbytes) for _, offset, nbytes in transfer.device_rows]
    for address, offset, nbytes in (*rows, *far):
        # Not closed here: an error's traceback still holds on to the view of it.
        scratch = memoryview(mmap.mmap(-1, padded(nbytes)))[:nbytes]
        try:
            if transfer.write:  # what lies in GPU memory can't be written so; nothing reads it
                part = bytes_at(address, nbytes) if address else scratch
                moved = os.pwritev(fd, [part], offset)
                if moved < nbytes:  # a full disk takes what it has room for, and says so next time
                    moved -= moved % PAGE
                    moved += os.pwritev(fd, [part[moved:]], offset + moved)
            else:
                moved = os.preadv(fd, [scratch], offset)
        except OSError as cause:
            return NotMoved(cause.errno, str(error))
        if moved < nbytes:
            verb = "write" if transfer.write else "read"
            return NotMoved(errno.EIO, f"{error}: short {verb}, {moved} of {nbytes} bytes")
    return None
