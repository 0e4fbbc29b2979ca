"""The only user of NIXL: moves rows of bytes between memory and files.

Owns the NIXL agents. Each lane has one agent and one reactor thread, and every NIXL call
on that agent runs on that thread: NIXL offers no completion callback, no cancel, and
frees memory under a transfer that is released too early, so a handle is kept until it is
done or has failed, whatever became of its awaiter.

The interpreter lock is the resource to spare: while the event loop runs Python, each time
the reactor lets go of the lock it may wait milliseconds for it. So whatever is queued when
the reactor looks goes into one NIXL transfer (up to 64 rows), only the oldest transfer is
asked how it is doing, and one call delivers all that has ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import importlib
import itertools
import logging
import mmap
import os
import select
import threading
import time
from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from kvgds.blocks import padded
from kvgds.errors import ClosedError, PathUnavailable
from kvgds.memory import Region, bytes_at
from kvgds.schedule import coalesce

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvgds.schedule import Row

    Rows = list[Row]

GROUP_ROWS = 64
_FILE_BYTES = 1 << 46  # only a bound on offsets
GROUP_BYTES = 4 << 20
MERGED_BYTES = 1 << 20
_SIDE_FLIGHTS = 4  # of small ones more would only be smaller still, and each costs calls
_LARGE_BYTES = 1 << 20
_COPY_S = 50e-6  # between two looks at copies
_SPIN_S = 100e-6
_SPIN_BYTES = 256 << 10
_SWEEP_S = 10e-3
_SLEEP_S = (100e-6, 1e-3)
_POLL_LEAST_S = 1e-3  # poll(2) counts in milliseconds
_WINDOW_S = 20e-3
_FIRST_RATE = 2e9  # bytes a second, until measured
_GPU_SETTINGS = {"GDS_MT": {"thread_count": "8"}, "GDS": {"batch_pool_size": "16"}}
_ids = itertools.count(1)


class File:
    """An open file that transfers may name. Detach it before closing the descriptor."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd


class Later(enum.Enum):
    """The answer of a transfer that is not ready to go on."""

    LATER = enum.auto()


LATER: Final = Later.LATER


class Transfer(Protocol):
    """One block on its way. Every method runs on a reactor thread.

    The transport calls ``begin`` until it answers, moves the rows, then calls ``end`` until
    that answers (or ``fail`` once, if they did not move), and then delivers the transfer.
    """

    write: bool  # from memory to the file
    file: File
    regions: Sequence[Region]
    nbytes: int
    device: int  # whose memory device_rows name

    @property
    def device_rows(self) -> Rows:
        """Once ``begin`` has answered: what moves between the file and GPU memory."""

    def begin(self) -> Rows | Later | None:
        """The rows of host memory to move: address, file offset, bytes.

        None: not wanted any more. LATER: copies are under way; ask again in a moment.
        """

    def end(self) -> Later | None:
        """All rows have moved. LATER: copies are under way; ask again in a moment."""

    def fail(self, error: Exception) -> None:
        """The rows have not moved; the memory is dirty, but nothing touches it any more."""


class NotMoved(Exception):
    """NIXL failed a transfer; errno and text are those of a plain call on the same rows."""

    def __init__(self, number: int | None, text: str) -> None:
        super().__init__(text)
        self.errno = number


class Transport(Protocol):
    """Moves transfers. Any thread may call any method.

    Preconditions: the memory of a transfer's rows lies in its regions, and its file is
    open. The implementation delivers every submitted transfer exactly once, on a thread
    of its own, and never touches its memory afterwards.
    """

    name: str

    def submit(self, transfers: Sequence[Transfer], deliver: Callable[[list[Any]], None]) -> None:
        """Queue transfers; never blocks. Raises ClosedError after :meth:`close`."""

    def detach(self, thing: File | Region) -> Future[None]:
        """Forget a file or region that no transfer uses any more."""

    def close(self) -> Future[None]:
        """Take no more, finish what was submitted, then let go of everything."""

    def abandon(self) -> None:
        """Leak whatever a wedged transfer still uses, instead of freeing it under it."""


def _import_nixl() -> Any:  # noqa: ANN401 - nixl has no types
    """NIXL's Python API, silenced: it logs to stdout and changes logging for the process."""
    level, raising = os.environ.get("NIXL_LOG_LEVEL"), logging.raiseExceptions
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
    report = []
    try:
        for name in ("nixl_cu12", "nixl_cu13"):
            try:
                return importlib.import_module(f"{name}._api")
            except ImportError as error:
                report.append(f"{name}: {error}")
    finally:
        logging.raiseExceptions = raising
        if level is None:
            del os.environ["NIXL_LOG_LEVEL"]
    raise PathUnavailable("NIXL can't be loaded; pip install 'nixl-cu12>=1.5.1'", tuple(report))


_making_ring = threading.Lock()


def _rings() -> set[int]:
    """Descriptors of this process's io_uring rings."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "io_uring" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(int(name))
    return found


class _Leg:
    """One NIXL transfer."""

    __slots__ = ("done", "error", "handle")

    def __init__(self) -> None:
        self.handle: Any = None
        self.done = False
        self.error: Exception | None = None


class _Flight:
    """Transfers that travel together: a leg for host memory, and one for each GPU's."""

    __slots__ = ("legs", "members", "nbytes", "rows")

    def __init__(self) -> None:
        self.members: list[_Member] = []
        self.rows = 0
        self.nbytes = 0
        self.legs: list[_Leg] = []

    def add(self, member: _Member) -> None:
        self.members.append(member)
        self.rows += len(member.rows) + len(member.transfer.device_rows)
        self.nbytes += member.transfer.nbytes


class _Member:
    __slots__ = ("deliver", "rows", "transfer")

    def __init__(self, transfer: Transfer, deliver: Callable[[list[Any]], None]) -> None:
        self.transfer = transfer
        self.deliver = deliver
        self.rows: Rows = []


class _Side:
    """What goes one way through a lane: loads or stores."""

    def __init__(self) -> None:
        self.waiting: deque[_Member] = deque()
        self.waiting_bytes = 0
        self.staging: deque[_Member] = deque()  # begun; copies are under way
        self.flights: deque[_Flight] = deque()

    def ready(self) -> bool:
        """Whether something may be launched: not small flights when there are many."""
        return bool(self.waiting or self.staging) and (
            len(self.flights) < _SIDE_FLIGHTS or self.waiting_bytes >= _LARGE_BYTES
        )


class _Inbox:
    """What a reactor is asked for, and how it waits: for that, or for a ring's completions."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._bell, select.POLLIN)
        self._waiting = False

    def put(self, item: object) -> None:
        """Leave something; wakes the reactor if it waits."""
        self._items.append(item)
        if self._waiting:
            self._waiting = False
            os.eventfd_write(self._bell, 1)

    def take(self) -> Any:  # noqa: ANN401 - a list of members, or a call
        """The oldest item, or None."""
        return self._items.popleft() if self._items else None

    def watch(self, fd: int) -> None:
        """Let this descriptor end a wait too."""
        self._poll.register(fd, select.POLLIN)

    def wait(self, timeout_s: float | None) -> None:
        """Wait until there is something."""
        if timeout_s == 0.0:
            return
        if timeout_s is not None and timeout_s < _POLL_LEAST_S:
            time.sleep(timeout_s)
            return
        self._waiting = True
        if not self._items:
            ready = self._poll.poll(None if timeout_s is None else timeout_s * 1e3)
            if (self._bell, select.POLLIN) in ready:
                os.eventfd_read(self._bell)
        self._waiting = False

    def close(self) -> None:
        """Let go of the bell; nothing may be put any more."""
        os.close(self._bell)


class _Lane:
    """One agent and its thread. All methods but submit, call and start run on that thread."""

    def __init__(self, name: str, queues: Sequence[str], gpu: str) -> None:
        self.name = name
        self.backend = ""
        self._gpu = gpu
        self.load = 0  # bytes queued or in flight; a hint for choosing a lane
        self.ready: Future[None] = Future()
        self.stopped: Future[None] = Future()
        self._queues = queues
        self._inbox = _Inbox()
        self._ring: int | None = None
        self._sides = (_Side(), _Side())  # loads, stores
        self._rate = _FIRST_RATE
        self._alone: deque[_Member] = deque()
        self._landing: deque[_Member] = deque()  # moved; copies are under way
        self._ended: list[_Member] = []
        self._registered: dict[Region | File, list[tuple[str, Any]]] = {}
        self._closing = False
        self._moved_at = 0.0
        self._window_bytes = 0
        self._window_from = 0.0
        self._swept_at = 0.0
        self._agent: Any = None
        self._nixl: Any = None
        self._thread = threading.Thread(target=self._main, name=f"kvgds-{name}", daemon=True)

    # --- called from other threads -------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def submit(self, transfers: Sequence[Transfer], deliver: Callable[[list[Any]], None]) -> None:
        self.load += sum(transfer.nbytes for transfer in transfers)
        self._inbox.put([_Member(transfer, deliver) for transfer in transfers])

    def call(self, function: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        self._inbox.put((function, future))
        return future

    # --- the reactor ---------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._open()
        except Exception as error:  # noqa: BLE001 - it belongs to whoever opens the transport
            self.ready.set_exception(error)
            self.stopped.set_result(None)
            return
        self.ready.set_result(None)
        while not self._closing or self._alone or self._working():
            self._inbox.wait(self._pause())
            self._receive()
            self._launch()
            self._poll()
            self._report()
        for thing in list(self._registered):
            self.forget(thing)
        self._inbox.close()
        self._agent = None
        self.stopped.set_result(None)

    def _working(self) -> bool:
        under_way = any(side.waiting or side.staging or side.flights for side in self._sides)
        return under_way or bool(self._landing)

    def _open(self) -> None:
        self._nixl = nixl = _import_nixl()
        sync = nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        report = []
        for kind in self._queues:
            config = nixl.nixl_agent_config(enable_prog_thread=False, backends=[], sync_mode=sync)
            agent = nixl.nixl_agent(self.name, config)
            with _making_ring:
                before = _rings()
                try:
                    agent.create_backend("POSIX", {f"use_{kind}": "true", "ios_pool_size": "4096"})
                except Exception as error:  # noqa: BLE001 - nixl's errors share no base class
                    report.append(f"POSIX/{kind}: {error}")
                    continue
                made = _rings() - before
            if len(made) == 1:
                self._ring = made.pop()
                self._inbox.watch(self._ring)
            self._agent, self.backend = agent, f"POSIX/{kind}"
            if self._gpu:
                self._open_gpu()
            return
        raise PathUnavailable("NIXL's POSIX plugin can't be used here", tuple(report))

    def _open_gpu(self) -> None:
        try:
            self._agent.create_backend(self._gpu, _GPU_SETTINGS[self._gpu])
        except Exception as error:  # noqa: BLE001 - nixl's errors share no base class
            raise PathUnavailable(
                f"NIXL's {self._gpu} plugin can't be used here", (str(error),)
            ) from None

    def _receive(self) -> None:
        """Take what has come in."""
        while (item := self._inbox.take()) is not None:
            if isinstance(item, list):
                for member in item:
                    side = self._sides[member.transfer.write]
                    side.waiting.append(member)
                    side.waiting_bytes += member.transfer.nbytes
            else:
                self._call(*item)

    def _pause(self) -> float | None:
        """How long to wait for news, in seconds; None: until there are some.

        A ring tells of its completions, so that only a lost one would be waited for. Without
        a ring, an eighth of the time that what is in flight should take: storage never runs
        dry meanwhile, and each look costs some 50 µs of CPU. Something small is watched without
        a pause at first, since even the shortest sleep takes as long as it does.
        """
        if self._alone or any(side.waiting and side.ready() for side in self._sides):
            return 0.0
        if self._landing or any(side.staging for side in self._sides):
            return _COPY_S
        nbytes = self._in_flight()
        if not nbytes:
            return 0.0 if self._closing else None
        if nbytes <= _SPIN_BYTES and time.monotonic() - self._moved_at < _SPIN_S:
            return 0.0
        if self._ring is not None:
            return _SWEEP_S
        least, most = _SLEEP_S
        return min(max(nbytes / self._rate / 8, least), most)

    def _in_flight(self) -> int:
        return sum(flight.nbytes for side in self._sides for flight in side.flights)

    @staticmethod
    def _call(function: Callable[[], None], future: Future[None]) -> None:
        wanted = future.set_running_or_notify_cancel()
        try:
            function()
        except Exception as error:  # noqa: BLE001 - handed to whoever waits
            if wanted:
                future.set_exception(error)
        else:
            if wanted:
                future.set_result(None)

    def _launch(self) -> None:
        """Put waiting transfers in flight, together if they go the same way; loads first."""
        while self._alone:
            flight = _Flight()
            flight.add(self._alone.popleft())
            self._post(flight)
        for side in self._sides:
            while side.ready():
                flight = self._gather(side)
                if not flight.members:
                    break
                self._post(flight)

    def _gather(self, side: _Side) -> _Flight:
        """Those that can go next, of the ones whose copies were under way and of the others."""
        flight, again = _Flight(), len(side.staging)
        while (again or side.waiting) and flight.rows < GROUP_ROWS and flight.nbytes < GROUP_BYTES:
            if again:
                again -= 1
                member = side.staging.popleft()
            else:
                member = side.waiting.popleft()
                side.waiting_bytes -= member.transfer.nbytes
            self._begin(member, side, flight)
        return flight

    def _begin(self, member: _Member, side: _Side, flight: _Flight) -> None:
        transfer = member.transfer
        try:
            for region in transfer.regions:
                self._register(region)
            self._register(transfer.file)
            rows = transfer.begin()
        except Exception as error:  # noqa: BLE001 - it belongs to this transfer alone
            transfer.fail(error)
            rows = None
        if rows is None:
            self._ended.append(member)
        elif rows is LATER:
            side.staging.append(member)
        else:
            member.rows = rows
            flight.add(member)

    def _register(self, thing: Region | File) -> None:
        if thing in self._registered:
            return
        if isinstance(thing, File):
            entries, kind = [(0, _FILE_BYTES, thing.fd, "")], "FILE"
            backends = ["POSIX", self._gpu] if self._gpu else ["POSIX"]
        elif thing.device is None:
            entries, kind = [(span.address, span.nbytes, 0, "") for span in thing.spans], "DRAM"
            backends = ["POSIX"]
        else:
            device = thing.device
            entries = [(span.address, span.nbytes, device, "") for span in thing.spans]
            kind, backends = "VRAM", [self._gpu]
        done = self._registered[thing] = []
        try:
            for backend in backends:
                registered = self._agent.register_memory(entries, kind, [backend])
                done.append((backend, registered))
        except BaseException:
            self.forget(thing)
            raise

    def forget(self, thing: Region | File) -> None:
        """Deregister, if it was ever used here."""
        for backend, registered in self._registered.pop(thing, ()):
            self._agent.deregister_memory(registered, backends=[backend])

    def _post(self, flight: _Flight) -> None:
        agent = self._agent
        direction = "WRITE" if flight.members[0].transfer.write else "READ"
        for kind, backend, local, remote in self._legs(flight):
            leg = _Leg()
            flight.legs.append(leg)
            try:
                leg.handle = agent.initialize_xfer(
                    direction,
                    agent.get_xfer_descs(local, kind),
                    agent.get_xfer_descs(remote, "FILE"),
                    self.name,
                    b"",
                    [backend],
                )
                leg.done = agent.transfer(leg.handle) == "DONE"
            except Exception as error:  # noqa: BLE001 - nixl's errors share no base class
                leg.done, leg.error = True, error
        now = self._moved_at = time.monotonic()
        if all(leg.done for leg in flight.legs):
            self._over(flight)
            return
        if not self._in_flight():
            self._window_bytes, self._window_from = 0, now
        self._sides[flight.members[0].transfer.write].flights.append(flight)

    def _legs(self, flight: _Flight) -> Iterator[tuple[str, str, Rows, Rows]]:
        """What NIXL is told: memory, backend, (address, bytes, device), (offset, bytes, fd)."""
        local: Rows = []
        remote: Rows = []
        for fd, rows in _rows_by_file(flight):
            local += [(address, nbytes, 0) for address, _, nbytes in rows]
            remote += [(offset, nbytes, fd) for _, offset, nbytes in rows]
        yield "DRAM", "POSIX", local, remote
        far = [member.transfer for member in flight.members if member.transfer.device_rows]
        if far:
            local, remote = [], []
            for each in far:
                local += [(address, nbytes, each.device) for address, _, nbytes in each.device_rows]
                remote += [(offset, nbytes, each.file.fd) for _, offset, nbytes in each.device_rows]
            yield "VRAM", self._gpu, local, remote

    def _poll(self) -> None:
        """Ask the oldest flights; now and then, when it seems stuck, ask them all."""
        now = time.monotonic()
        for _ in range(len(self._landing)):
            self._end(self._landing.popleft())
        sweep = now - max(self._swept_at, self._moved_at) > _SWEEP_S
        if sweep:
            self._swept_at = now
        for side in self._sides:
            for flight in list(side.flights):
                if self._check(flight, side):
                    self._report()  # at once: whoever waits can go on while the next is checked
                elif not sweep:
                    break

    def _check(self, flight: _Flight, side: _Side) -> bool:
        for leg in flight.legs:
            if leg.done:
                continue
            try:
                leg.done = self._agent.check_xfer_state(leg.handle) == "DONE"
            except Exception as error:  # noqa: BLE001 - nixl's errors share no base class
                leg.done, leg.error = True, error
        if not all(leg.done for leg in flight.legs):
            return False
        side.flights.remove(flight)
        now = time.monotonic()
        self._moved_at = now
        self._measure(flight.nbytes, now)
        self._over(flight)
        return True

    def _measure(self, nbytes: int, now: float) -> None:
        """Keep the rate at which storage has moved bytes lately, over stretches of busy time."""
        self._window_bytes += nbytes
        if now - self._window_from > _WINDOW_S:
            self._rate = max(self._window_bytes / (now - self._window_from), 1e6)
            self._window_bytes, self._window_from = 0, now

    def _over(self, flight: _Flight) -> None:
        """Every leg has ended: only now may what they used be let go."""
        for leg in flight.legs:
            if leg.handle is not None:
                self._agent.release_xfer_handle(leg.handle)
        error = next((leg.error for leg in flight.legs if leg.error is not None), None)
        if error is not None:
            self._failed(flight, error)
            return
        for member in flight.members:
            self._end(member)

    def _end(self, member: _Member) -> None:
        try:
            if member.transfer.end() is LATER:
                self._landing.append(member)
                return
        except Exception as error:  # noqa: BLE001 - it belongs to this transfer alone
            member.transfer.fail(error)
        self._ended.append(member)

    def _failed(self, flight: _Flight, error: Exception) -> None:
        """NIXL tells only that something in the flight failed: try each member by itself."""
        if len(flight.members) > 1:
            self._alone.extend(flight.members)
            return
        (member,) = flight.members
        try:
            reason = _diagnose(member.transfer, member.rows, error)
        except Exception as cause:  # noqa: BLE001 - rows that no call takes; the lane must live
            reason = NotMoved(None, f"{error}: {cause}")
        member.transfer.fail(reason)
        self._ended.append(member)

    def _report(self) -> None:
        """Deliver what has ended, with one call for each receiver."""
        ended, self._ended = self._ended, []
        groups: dict[Any, list[Transfer]] = {}
        for member in ended:
            self.load -= member.transfer.nbytes
            groups.setdefault(member.deliver, []).append(member.transfer)
        for deliver, transfers in groups.items():
            deliver(transfers)

    def stop(self) -> None:
        self._closing = True

    def leak(self) -> None:
        """Keep every object that a wedged transfer may use for as long as the process lives."""
        for thing in (
            self,
            self._agent,
            *(leg.handle for side in self._sides for flight in side.flights for leg in flight.legs),
        ):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _rows_by_file(flight: _Flight) -> Iterator[tuple[int, Rows]]:
    """The rows of each run of members that share a file; bounced neighbours become one row."""
    for fd, group in itertools.groupby(flight.members, lambda member: member.transfer.file.fd):
        parts = [member.rows for member in group]
        rows = list(itertools.chain.from_iterable(parts))
        yield fd, coalesce(rows, MERGED_BYTES) if 1 < len(parts) == len(rows) else rows


def _diagnose(transfer: Transfer, rows: Rows, error: Exception) -> NotMoved:
    """What the system says of the same rows: NIXL's errors carry no errno."""
    fd = transfer.file.fd
    far = [(0, offset, nbytes) for _, offset, nbytes in transfer.device_rows]
    for address, offset, nbytes in (*rows, *far):
        # Not closed here: an error's traceback still holds on to the view of it.
        scratch = memoryview(mmap.mmap(-1, padded(nbytes)))[:nbytes]
        try:
            if transfer.write:  # what lies in GPU memory can't be written so; nothing reads it
                part = bytes_at(address, nbytes) if address else scratch
                moved = os.pwritev(fd, [part], offset)
            else:
                moved = os.preadv(fd, [scratch], offset)
        except OSError as cause:
            return NotMoved(cause.errno, str(error))
        if moved < nbytes:
            verb = "write" if transfer.write else "read"
            return NotMoved(errno.EIO, f"{error}: short {verb}, {moved} of {nbytes} bytes")
    return NotMoved(None, f"{error}, but a plain call on the same range succeeds")


class NixlTransport:
    """NIXL's POSIX plugin, one reactor thread for each of ``lanes`` agents.

    ``gpu`` names the plugin for GPU memory, ``"GDS_MT"`` or ``"GDS"``; "": none.
    """

    def __init__(
        self, lanes: int = 1, queues: Sequence[str] = ("uring", "aio"), gpu: str = ""
    ) -> None:
        number = next(_ids)
        self._lanes = [_Lane(f"nixl-{number}-{i}", queues, gpu) for i in range(lanes)]
        self._closed = False
        self.name = ""

    def start(self) -> None:
        """Make the agents; blocks for some hundred milliseconds the first time.

        Raises:
            PathUnavailable: NIXL or its plugin can't be loaded.
        """
        for lane in self._lanes:
            lane.start()
        for lane in self._lanes:
            lane.ready.result()
        self.name = self._lanes[0].backend

    def submit(self, transfers: Sequence[Transfer], deliver: Callable[[list[Any]], None]) -> None:
        """See :class:`Transport`."""
        if self._closed:
            raise ClosedError("the transport is closed")
        if len(self._lanes) == 1:
            self._lanes[0].submit(transfers, deliver)
            return
        for start in range(0, len(transfers), GROUP_ROWS // 4):
            lane = min(self._lanes, key=lambda lane: lane.load)
            lane.submit(transfers[start : start + GROUP_ROWS // 4], deliver)

    def detach(self, thing: File | Region) -> Future[None]:
        """See :class:`Transport`."""
        if self._closed:  # a lane that ends forgets everything
            return _all_of([lane.stopped for lane in self._lanes])
        return _all_of([lane.call(partial(lane.forget, thing)) for lane in self._lanes])

    def close(self) -> Future[None]:
        """See :class:`Transport`."""
        self._closed = True
        for lane in self._lanes:
            lane.call(lane.stop)
        return _all_of([lane.stopped for lane in self._lanes])

    def abandon(self) -> None:
        """See :class:`Transport`."""
        for lane in self._lanes:
            lane.leak()


def _all_of(futures: Sequence[Future[None]]) -> Future[None]:
    """A future that ends when all have; with the first error there was."""
    whole: Future[None] = Future()
    left = [len(futures)]
    lock = threading.Lock()

    def ended(_: Future[None]) -> None:
        with lock:
            left[0] -= 1
            if left[0] or not whole.set_running_or_notify_cancel():
                return
        error = next((e for f in futures if (e := f.exception())), None)
        whole.set_exception(error) if error else whole.set_result(None)

    for future in futures:
        future.add_done_callback(ended)
    return whole
