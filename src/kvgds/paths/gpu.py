"""What a GPU does for blocks that storage reads from it or writes to it, and the two ways there.

*Direct*: storage uses the caller's memory, whatever pieces it is in. *Gathered*: a block of many
small pieces goes as one, by way of a staging buffer on its GPU, and kernels copy between the two.
Everything runs on one reactor, because GPU transfers go by one lane; but what takes long to make,
kernels and staging memory, is made by threads of its own.

Invariants: staging memory never grows; who waits for room holds nothing, and is overtaken only as
the scheduler would let it be; who waits for a caller's stream holds no room.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

from kvgds.blocks import NO_CHECKSUM, PAGE
from kvgds.memory import Span
from kvgds.memory.copies import pairs
from kvgds.memory.device import COPIED, NOTHING, CudaError, cuda
from kvgds.memory.kernels import Digests, Kernels
from kvgds.schedule import HANDICAP_S, Pages, Priority
from kvgds.transport import LATER

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from kvgds.memory.kernels import Launch
    from kvgds.paths.move import Move, Work
    from kvgds.transport import Later
    from kvgds.transport.contract import Memory, Rows

_log = logging.getLogger("kvgds")
_GPU_PAGE = 64 << 10  # what cuFile pins at a time: shared with nobody


def payload_rows(move: Move) -> Rows:
    """The rows of a block that moves from or to where it lies."""
    rows = []
    offset = move.offset + PAGE
    for address, nbytes in move.view.rows():
        rows.append((address, offset, nbytes))
        offset += nbytes
    return rows


class Steps:
    """Work step by step: what a generator yields is done before that goes on."""

    def __init__(self, steps: Iterator[Work]) -> None:
        self._steps = steps
        self._now: Work | None = COPIED

    @property
    def done(self) -> bool:
        """Whether the last step is. Raises what went wrong."""
        while self._now is not None and self._now.done:
            self._now = next(self._steps, None)
        return self._now is None


def after_stream(move: Move, start: Callable[[], Work]) -> Steps:
    """Work on the caller's memory, once their stream has done what it was given.

    The reactor looks instead of letting our stream wait: others' work would wait behind that.
    """

    def steps() -> Iterator[Work]:
        yield cuda().reached(move.device, move.stream)
        if move.enter():
            yield start()

    return Steps(steps())


class _Asked:
    """What kernels were asked for, until they have run."""

    def __init__(self, gpu: _Gpu, what: Sequence[tuple[int, ...]]) -> None:
        self._gpu = gpu
        self.what = what
        self.launched: Launch | None = None
        self.index = 0
        self.error: Exception | None = None
        self._looked = False

    @property
    def done(self) -> bool:
        if self.launched is None and self.error is None:
            if not self._looked:  # others of this turn may ask yet, and share the launch
                self._looked = True
                return False
            self._gpu.launch()
        if self.error is not None:
            raise self.error
        return self.launched is not None and self.launched.done

    @property
    def checksum(self) -> bytes:
        return self.launched.read()[self.index] if isinstance(self.launched, Digests) else NOTHING


class _Gpu:
    """The kernels of one GPU: those asked for in one turn of a reactor are launched together.

    They are made by a thread, a second or so; until then nothing is launched.
    """

    def __init__(self, device: int) -> None:
        self.device = device
        self.kernels: Future[Kernels] = Future()
        self._sums: list[_Asked] = []
        self._copies: list[_Asked] = []
        threading.Thread(target=self._make, name=f"kvgds-kernels-{device}", daemon=True).start()

    def _make(self) -> None:
        try:
            cuda().enter(self.device)
            self.kernels.set_result(Kernels(self.device))
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever wants them
            self.kernels.set_exception(error)

    @property
    def failed(self) -> bool:
        """Whether they could not be made; who wants them has been told."""
        return self.kernels.done() and self.kernels.exception() is not None

    def sum(self, rows: Sequence[tuple[int, int]]) -> _Asked:
        """The checksum of a block."""
        self._sums.append(_Asked(self, rows))
        return self._sums[-1]

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> _Asked:
        """Copies (to, from, bytes)."""
        self._copies.append(_Asked(self, copies))
        return self._copies[-1]

    def launch(self) -> None:
        """Start on all that was asked for, copies first: sums may be of what they write.

        What goes wrong is each one's to tell.
        """
        if not self.kernels.done():
            return
        for asked, start in ((self._copies, self._start_copies), (self._sums, self._start_sums)):
            these = asked.copy()
            asked.clear()
            try:
                launched = start([each.what for each in these]) if these else None
            except Exception as error:  # noqa: BLE001 - see above
                for each in these:
                    each.error = error
                continue
            for i, each in enumerate(these):
                each.launched, each.index = launched, i

    def _start_sums(self, blocks: list[Any]) -> Launch:
        return self.kernels.result().checksums(blocks, cuda().stream(self.device))

    def _start_copies(self, parts: list[Any]) -> Launch:
        copies = [copy for part in parts for copy in part]
        return self.kernels.result().copy(copies, cuda().stream(self.device))


class Room(NamedTuple):
    """Part of a staging buffer, until it is given back."""

    address: int
    give: Callable[[], None]


class _Staging:
    """A buffer on one GPU, through which its scattered blocks go; a ``transport.contract.Memory``.

    A thread allocates it when it is first wanted. As work, it is done when it may be used, or can't
    be had.
    """

    def __init__(self, device: int, nbytes: int) -> None:
        self.device = device
        self.spans: Sequence[Span] = ()
        self.closed = True
        self.failed = False
        self._making = False
        self._nbytes = nbytes
        self._pages = Pages(nbytes)
        self._waiting: tuple[deque[_Turn], deque[_Turn]] = deque(), deque()  # loads, stores
        self._allocated = 0
        self._over = False
        self._lock = threading.Lock()

    def make(self, gpu: _Gpu) -> _Staging:
        """See to it that it will be there."""
        if not self._making:
            name = f"kvgds-gather-{self.device}"
            threading.Thread(target=self._make, args=(gpu,), name=name, daemon=True).start()
            self._making = True  # last: a thread may not be had, or only later
        return self

    def _make(self, gpu: _Gpu) -> None:
        try:
            gpu.kernels.result()
            address = cuda().allocate(self.device, self._nbytes + _GPU_PAGE)
        except BaseException as error:  # noqa: BLE001 - told here; blocks go as if nothing were gathered
            text = "GPU %d gathers nothing, scattered blocks go a fragment at a time: %s"
            _log.warning(text, self.device, error)
            self.failed = True
            return
        with self._lock:
            self._allocated = address
            self.spans = (Span(address + -address % _GPU_PAGE, self._nbytes),)
            if self._over:
                self._free()

    @property
    def done(self) -> bool:
        """Whether it may be used: from the turn on in which it is registered before that."""
        if self.closed and self.spans:
            self.closed = False
            return False
        return self.failed or not self.closed

    def turn(self, move: Move) -> _Turn:
        """Wait for room: first come first served, but loads before stores as in the scheduler."""
        turn = _Turn(self, move)
        self._waiting[move.write].append(turn)
        return turn

    def lend(self, turn: _Turn) -> bool:
        """Give a move room, if it is its turn and there is some."""
        for queue in self._waiting:
            while queue and queue[0] is not turn and queue[0].gone:
                queue.popleft()
        first = min((queue[0] for queue in self._waiting if queue), key=lambda each: each.rank)
        nbytes = turn.move.nbytes
        offset = self._pages.take(nbytes) if first is turn else None
        if offset is None:
            return False
        self._waiting[turn.move.write].popleft()
        address = self.spans[0].address + offset
        turn.move.room = Room(address, lambda: self._pages.give(offset, nbytes))
        return True

    def close(self) -> None:
        """Free it; nothing may use it any more, and NIXL has forgotten it. Blocks."""
        with self._lock:
            self._over = True
            self._free()

    def _free(self) -> None:
        if self._allocated:
            try:
                cuda().free(self.device, self._allocated)
            except CudaError as error:  # the GPU has failed: that is no reason not to close
                text = "GPU %d keeps its staging memory until this process ends: %s"
                _log.warning(text, self.device, error)
            self._allocated = 0


class _Turn:
    """Room for a move, once it is its turn."""

    def __init__(self, staging: _Staging, move: Move) -> None:
        self._staging = staging
        self.move = move
        self.rank = time.monotonic() + move.write * HANDICAP_S[Priority.BACKGROUND]

    @property
    def gone(self) -> bool:
        """Whether it will not be asked for again."""
        return self.move.abandoned or self.move.error is not None

    @property
    def done(self) -> bool:
        return self._staging.lend(self)


class GpuDirect:
    """By cuFile, which knows no streams: what uses the memory is waited for before it moves."""

    holds = True
    whole = False

    def __init__(self, name: str) -> None:
        self.name = name
        self._gpus: dict[int, _Gpu] = {}

    def gpu(self, device: int) -> _Gpu:
        """The kernels of a GPU; those that could not be made are made anew."""
        if device not in self._gpus or self._gpus[device].failed:
            self._gpus[device] = _Gpu(device)
        return self._gpus[device]

    def regions(self, move: Move) -> tuple[Memory, ...]:
        """See ``Path``."""
        return (move.view.region,)

    def begin(self, move: Move) -> Rows | Later | None:
        """See ``Path``."""
        if move.work is None:
            move.work = Steps(self._departing(move))
        if not move.work.done:
            return LATER
        move.work = None
        if not move.entered:
            return None
        move.device_rows = payload_rows(move)
        return [(move.lease_address, move.offset, PAGE)]

    def _departing(self, move: Move) -> Iterator[Work]:
        yield cuda().reached(move.device, move.stream)
        if move.enter() and move.write:
            checksum = NOTHING
            if move.algorithm != NO_CHECKSUM:
                checksum = yield from _summed(self.gpu(move.device), move.view.rows())
            move.stamp(checksum)

    def end(self, move: Move) -> Later | None:
        """See ``Path``."""
        if move.write:
            return None
        if move.work is None:
            move.work = Steps(_checked(self.gpu(move.device), move, move.view.rows()))
        return None if move.work.done else LATER


def _summed(gpu: _Gpu, rows: Sequence[tuple[int, int]]) -> Generator[Work, None, bytes]:
    summing = gpu.sum(rows)
    yield summing
    return summing.checksum


def _checked(gpu: _Gpu, move: Move, rows: Sequence[tuple[int, int]]) -> Iterator[Work]:
    """Raise BlockCorrupt unless what was loaded, and lies there, is this block, whole."""
    move.check(None)
    if move.algorithm != NO_CHECKSUM:
        checksum = yield from _summed(gpu, rows)
        move.check(lambda: checksum)


class GpuGathered:
    """By cuFile too, but as one piece, which kernels gather from or scatter to the block's pieces.

    Only while they do is the caller's memory used. What can't be had staging memory for goes
    directly, as if it had been sent that way.
    """

    holds = False
    whole = False

    def __init__(self, direct: GpuDirect, nbytes: int) -> None:
        self.name = direct.name
        self.direct = direct  # the way of what is not gathered
        self._nbytes = nbytes
        self._stagings: dict[int, _Staging] = {}

    def regions(self, move: Move) -> tuple[Memory, ...]:
        """See ``Path``."""
        if move.device not in self._stagings:
            self._stagings[move.device] = _Staging(move.device, self._nbytes)
        return (self._stagings[move.device],)

    def begin(self, move: Move) -> Rows | Later | None:
        """See ``Path``."""
        if move.work is None:
            move.work = Steps(self._departing(move))
        if not move.work.done:
            return LATER
        move.work = None
        if move.path is not self:
            return LATER  # what it names now is registered first
        if move.room is None:
            return None
        move.device_rows = [(move.room.address, move.offset + PAGE, move.nbytes)]
        return [(move.lease_address, move.offset, PAGE)]

    def _departing(self, move: Move) -> Iterator[Work]:
        staging = self._stagings[move.device]
        yield cuda().reached(move.device, move.stream)
        if not staging.failed:
            gpu = self.direct.gpu(move.device)
            yield staging.make(gpu)
        if staging.failed:
            move.go_by(self.direct)
            return
        yield staging.turn(move)
        if move.write:
            yield from self._gather(gpu, move)

    @staticmethod
    def _gather(gpu: _Gpu, move: Move) -> Iterator[Work]:
        if not move.enter():
            move.vacate()
            return
        gathering = gpu.copy(pairs(move.view.rows(), move.in_room))
        full = move.algorithm != NO_CHECKSUM
        summing = gpu.sum(move.in_room) if full else None
        yield gathering  # first: should the sum fail, nothing writes into the room any more
        move.leave()
        if summing is not None:
            yield summing
        move.stamp(summing.checksum if summing is not None else NOTHING)

    def end(self, move: Move) -> Later | None:
        """See ``Path``."""
        if not move.write:
            if move.work is None:
                move.work = Steps(self._landing(move))
            if not move.work.done:
                return LATER
        move.vacate()
        return None

    def _landing(self, move: Move) -> Iterator[Work]:
        gpu = self.direct.gpu(move.device)
        yield from _checked(gpu, move, move.in_room)
        if move.enter():
            yield gpu.copy(pairs(move.in_room, move.view.rows()))

    def close(self) -> None:
        """Free the staging memory; see ``_Staging.close``."""
        for staging in self._stagings.values():
            staging.close()
