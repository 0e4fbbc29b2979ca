"""The ways between a view and an image on storage, and the bounce region that they lease from.

*Direct*: storage reads and writes the caller's memory; only the stamp's page is leased. *Bounce*:
the whole image is leased and copied. *GDS*: as direct, for GPU memory. Which of them an engine has
is decided once, when it opens.
"""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

from kvgds.blocks import NO_CHECKSUM, PAGE, Stamp, image_bytes
from kvgds.errors import PathUnavailable
from kvgds.memory import copy_pieces, pairs
from kvgds.memory.device import COPIED, NOTHING, cuda
from kvgds.memory.kernels import Checksums
from kvgds.paths.move import checksum_of
from kvgds.transport import LATER

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvgds.memory import Arena, Region, View
    from kvgds.memory.device import Cuda
    from kvgds.memory.kernels import Digests
    from kvgds.paths.gds import Gds
    from kvgds.paths.move import Move, Path, Work
    from kvgds.paths.plan import PathPlan
    from kvgds.transport import Later
    from kvgds.transport.contract import Rows


class _Direct:
    name = "direct"
    holds = True

    def lease_bytes(self, nbytes: int) -> int:  # noqa: ARG002 - only the stamp is leased
        return PAGE

    def begin(self, move: Move) -> Rows | None:
        if not move.enter():
            return None
        if move.write:
            full = move.algorithm != NO_CHECKSUM
            move.stamp(checksum_of(move.view.pieces()) if full else NOTHING)
        return [(move.lease_address, move.offset, PAGE), *_payload_rows(move)]

    def end(self, move: Move) -> None:
        if not move.write:
            move.check(lambda: checksum_of(move.view.pieces()))


def _payload_rows(move: Move) -> Rows:
    rows = []
    offset = move.offset + PAGE
    for address, nbytes in move.view.rows():
        rows.append((address, offset, nbytes))
        offset += nbytes
    return rows


class _Bounce:
    """By way of the lease: a host's copies end at once, a GPU runs them on engines of its own."""

    name = "bounce"
    holds = False

    def lease_bytes(self, nbytes: int) -> int:
        return image_bytes(nbytes)

    def begin(self, move: Move) -> Rows | Later | None:
        if move.write:
            if move.work is None:
                if not move.enter():
                    return None
                move.work = self._copy(move)
            if not move.work.done:
                return LATER
            move.leave()
            _seal(move)
        return [(move.lease_address, move.offset, image_bytes(move.nbytes))]

    def end(self, move: Move) -> Later | None:
        if move.write:
            return None
        if move.work is None:
            move.check(lambda: checksum_of([move.lease[PAGE : PAGE + move.nbytes]]))
            if not move.enter():
                return None
            move.work = self._copy(move)
        return None if move.work.done else LATER

    @staticmethod
    def _copy(move: Move) -> Work:
        view, device = move.view, move.view.region.device
        if device is None:
            payload, pieces = [move.lease[PAGE : PAGE + move.nbytes]], view.pieces()
            copy_pieces(*((pieces, payload) if move.write else (payload, pieces)))
            return COPIED
        lease, memory = [(move.lease_address + PAGE, move.nbytes)], view.rows()
        copies = pairs(memory, lease) if move.write else pairs(lease, memory)
        return _After(move, lambda: move.ways.cuda().copy(device, copies))


def _seal(move: Move) -> None:
    """Complete an image whose payload lies in the lease: padding, checksum and stamp."""
    payload = move.lease[PAGE:]
    payload[move.nbytes :] = bytes(len(payload) - move.nbytes)
    full = move.algorithm != NO_CHECKSUM
    move.stamp(checksum_of([payload[: move.nbytes]]) if full else NOTHING)


class _Relay:
    """A block whose payload lies in the lease, behind its stamp, and stays there."""

    name = "bounce"
    holds = True

    def lease_bytes(self, nbytes: int) -> int:
        return image_bytes(nbytes)

    def begin(self, move: Move) -> Rows | None:
        if not move.enter():
            return None
        if move.write:
            stamp = Stamp.decode(move.lease[:PAGE])
            if stamp is not None and move.algorithm in (NO_CHECKSUM, stamp.algorithm):
                move.stamp(stamp.checksum)  # the one that it was stored with
            else:
                _seal(move)
        return [(move.lease_address, move.offset, image_bytes(move.nbytes))]

    def end(self, move: Move) -> None:
        if not move.write:
            move.check(lambda: checksum_of([move.lease[PAGE : PAGE + move.nbytes]]))


class _GpuDirect:
    """By cuFile, which knows no streams: what uses the memory is waited for before it moves."""

    holds = True

    def __init__(self, name: str) -> None:
        self.name = name
        self._sums: dict[int, _Sums] = {}

    def lease_bytes(self, nbytes: int) -> int:  # noqa: ARG002 - only the stamp is leased
        return PAGE

    def begin(self, move: Move) -> Rows | Later | None:
        full = move.write and move.algorithm != NO_CHECKSUM
        if move.work is None:
            if not move.enter():
                return None
            move.work = _After(move, lambda: self._sum(move) if full else COPIED)
        if not move.work.done:
            return LATER
        if move.write:
            move.stamp(move.work.checksum)
        move.work = None
        move.device_rows = _payload_rows(move)
        return [(move.lease_address, move.offset, PAGE)]

    def end(self, move: Move) -> Later | None:
        if move.write:
            return None
        if move.work is None:
            move.check(None)
            if move.algorithm == NO_CHECKSUM:
                return None
            move.work = self._sum(move)
            return LATER  # others may be summed with it
        if not move.work.done:
            return LATER
        checksum = move.work.checksum
        move.check(lambda: checksum)
        return None

    def _sum(self, move: Move) -> _Summing:
        if move.device not in self._sums:
            self._sums[move.device] = _Sums(move.device)
        return self._sums[move.device].ask(move.view.rows())


class _Sums:
    """The checksums that one GPU makes: those asked for in one turn of a reactor, in one launch.

    The kernels are made by a thread of their own, a second or so; until then nothing is launched.
    All else runs on one reactor: GPU transfers go by one lane.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        self._asked: list[_Summing] = []
        self._maker: Future[Checksums] = Future()
        threading.Thread(target=self._make, name=f"kvgds-kernels-{device}", daemon=True).start()

    def ask(self, rows: list[tuple[int, int]]) -> _Summing:
        summing = _Summing(self, rows)
        self._asked.append(summing)
        return summing

    def _make(self) -> None:
        try:
            self._maker.set_result(Checksums(self._device))
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever wants a checksum
            self._maker.set_exception(error)

    def launch(self) -> None:
        """Start on all that were asked for; what goes wrong is each one's to tell."""
        if not self._asked or not self._maker.done():
            return
        asked, self._asked = self._asked, []
        try:
            stream = cuda().stream(self._device)
            digests = self._maker.result().launch([each.rows for each in asked], stream)
        except Exception as error:  # noqa: BLE001 - see above
            for each in asked:
                each.error = error
            return
        for i, each in enumerate(asked):
            each.digests, each.index = digests, i


class _Summing:
    """A block's checksum, being made on its GPU."""

    def __init__(self, sums: _Sums, rows: list[tuple[int, int]]) -> None:
        self._sums = sums
        self.rows = rows
        self.index = 0
        self.digests: Digests | None = None
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        if self.digests is None and self.error is None:
            self._sums.launch()
        if self.error is not None:
            raise self.error
        return self.digests is not None and self.digests.done

    @property
    def checksum(self) -> bytes:
        return self.digests.read()[self.index] if self.digests is not None else NOTHING


class _After:
    """Work that starts once the caller's stream has done what it was given.

    The reactor looks instead of letting our stream wait: others' work would wait behind that.
    """

    def __init__(self, move: Move, start: Callable[[], Work]) -> None:
        self._before = cuda().reached(move.device, move.stream)
        self._start: Callable[[], Work] | None = start
        self._work: Work | None = None

    @property
    def done(self) -> bool:
        if self._start is not None and self._before.done:
            self._work = self._start()
            self._start = None  # it knows the move, which knows this
            return self._work is COPIED  # else others may start with it, before anybody looks
        return self._work is not None and self._work.done

    @property
    def checksum(self) -> bytes:
        return self._work.checksum if self._work is not None else NOTHING


DIRECT: Path = _Direct()
BOUNCE: Path = _Bounce()
RELAY: Path = _Relay()


class Ways:
    """The ways that one engine has, and its bounce region: host memory that lies in NIXL's hands.

    Attributes:
        gds: how GPU memory moves without a copy, once that is proved; None: it bounces.
        plans: how each kind of memory moves, once that is settled.
    """

    def __init__(self, arena: Arena, region: Region) -> None:
        self.arena = arena
        self.region = region
        self.gds: _GpuDirect | None = None
        self.plans: tuple[PathPlan, ...] = ()
        self._pinned = False
        self._lock = threading.Lock()

    def choose(self, host: PathPlan, gds: Gds) -> None:
        """Settle how memory moves to one more tier, a GPU's too if there is one. Blocks."""
        self.plans += (host, *self._gpu_plans(host, gds))

    def _gpu_plans(self, host: PathPlan, gds: Gds) -> tuple[PathPlan, ...]:
        devices = 0
        with contextlib.suppress(PathUnavailable):
            devices = cuda().devices
        if not devices:
            return ()
        here = f"{devices} GPUs answer"
        if gds.path:
            self.gds = _GpuDirect(gds.path)
            evidence = (here, *gds.evidence, "blocks whose parts are not whole pages bounce")
            backend = f"{gds.plugin}, stamps {host.backend}"
            plan = replace(host, memory="gpu", path=gds.path, backend=backend, alignment=PAGE)
            return (replace(plan, evidence=evidence, refused=gds.refused),)
        evidence = (f"{here}; copies through page-locked host memory",)
        return (replace(host, memory="gpu", path="bounce", evidence=evidence, refused=gds.refused),)

    def path_for(self, view: View, plan: PathPlan) -> Path:
        """The path that a view takes to the tier that has this plan."""
        region = view.region
        if plan.path == "bounce":
            return BOUNCE
        if region.device is None:
            return DIRECT if region.zero_copy and view.alignment >= plan.alignment else BOUNCE
        if self.gds is not None and region.zero_copy and view.alignment >= PAGE:
            return self.gds
        return BOUNCE

    def cuda(self) -> Cuda:
        """The CUDA runtime, once the region is page-locked for it. Blocks the first time."""
        with self._lock:
            if not self._pinned:
                cuda().pin(self.arena.span)
                self._pinned = True
        return cuda()

    def close(self) -> None:
        """Unlock the pages; nothing may copy any more."""
        if self._pinned:
            cuda().unpin(self.arena.span)
            self._pinned = False
