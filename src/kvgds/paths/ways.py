"""The ways between a view and an image on storage, and the bounce region that they lease from.

*Direct*: storage reads and writes the caller's memory; only the stamp's page is leased. *Bounce*:
the whole image is leased and copied. *GDS*: as direct, for GPU memory, see ``gpu``. Which of them
an engine has is decided once, when it opens.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from kvgds.blocks import NO_CHECKSUM, PAGE, Stamp, image_bytes
from kvgds.errors import PathUnavailable
from kvgds.memory import region_of
from kvgds.memory.copies import pairs
from kvgds.memory.device import COPIED, NOTHING, CudaError, cuda
from kvgds.paths.gpu import GpuDirect, GpuGathered, after_stream, payload_rows
from kvgds.paths.move import Path, checksum_of
from kvgds.transport import LATER
from kvgds.transport.agent import GPU_PLUGIN

if TYPE_CHECKING:
    from kvgds.memory import Arena, Region, View
    from kvgds.memory.device import Cuda
    from kvgds.paths.gds import Gds
    from kvgds.paths.move import Move, Work
    from kvgds.paths.plan import PathPlan
    from kvgds.transport import Later
    from kvgds.transport.contract import Memory, Rows

_FRAGMENT = 64 << 10  # a piece of so little costs more as an I/O of its own than to be copied
_SHARE = 32  # of the bounce region no block has more for that alone
_log = logging.getLogger("kvgds")


class _Direct:
    name = "direct"
    holds = True
    whole = False

    def regions(self, move: Move) -> tuple[Memory, ...]:
        return (move.view.region,)

    def begin(self, move: Move) -> Rows | None:
        if not move.enter():
            return None
        if move.write:
            full = move.algorithm != NO_CHECKSUM
            move.stamp(checksum_of(move.view.pieces()) if full else NOTHING)
        return [(move.lease_address, move.offset, PAGE), *payload_rows(move)]

    def end(self, move: Move) -> None:
        if not move.write:
            move.check(lambda: checksum_of(move.view.pieces()))


class _Bounce(Path):
    """By way of the lease: a host's copies end at once, a GPU runs them on engines of its own."""

    name = "bounce"
    holds = False
    whole = True

    def begin(self, move: Move) -> Rows | Later | None:
        if move.write:
            if move.work is None:
                move.work = self._copy(move)
            if not move.work.done:
                return LATER
            if not move.entered:
                return None
            move.leave()
            _seal(move)
        return [(move.lease_address, move.offset, image_bytes(move.nbytes))]

    def end(self, move: Move) -> Later | None:
        if move.write:
            return None
        if move.work is None:
            move.check(lambda: checksum_of([move.lease[PAGE : PAGE + move.nbytes]]))
            move.work = self._copy(move)
        return None if move.work.done else LATER

    @staticmethod
    def _copy(move: Move) -> Work:
        view, device = move.view, move.view.region.device
        if device is None:
            if move.enter():
                view.copy(move.lease[PAGE : PAGE + move.nbytes], write=move.write)
            return COPIED
        lease, memory = [(move.lease_address + PAGE, move.nbytes)], view.rows()
        copies = pairs(memory, lease) if move.write else pairs(lease, memory)
        return after_stream(move, lambda: move.ways.cuda(device).copy(device, copies))


def _seal(move: Move) -> None:
    """Complete an image whose payload lies in the lease: padding, checksum and stamp."""
    payload = move.lease[PAGE:]
    payload[move.nbytes :] = bytes(len(payload) - move.nbytes)
    full = move.algorithm != NO_CHECKSUM
    move.stamp(checksum_of([payload[: move.nbytes]]) if full else NOTHING)


class _Relay(Path):
    """A block whose payload lies in the lease, behind its stamp, and stays there."""

    name = "bounce"
    holds = True
    whole = True

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


DIRECT: Path = _Direct()
BOUNCE: Path = _Bounce()
RELAY: Path = _Relay()


class _Scattered(NamedTuple):
    """Which blocks go as one piece though they could move from where they lie.

    Attributes:
        block: bytes of a block, at most.
        fragment: and of its fragments on average.
    """

    block: int
    fragment: int

    @property
    def rule(self) -> str:
        """For a plan of memory that bounces for it."""
        pieces = f"their pieces have {self.fragment:,} or less on average"
        most = f"{self.block:,} bytes, a {_SHARE}nd of the bounce region,"
        return f"blocks up to {most} bounce if {pieces}"

    def has(self, view: View) -> bool:
        """Whether this is one of them."""
        return view.fragments > 1 and view.nbytes <= min(self.block, self.fragment * view.fragments)


_NEVER = _Scattered(0, 0)


class Ways:
    """The ways that one engine has, and its bounce region: host memory that lies in NIXL's hands.

    Attributes:
        gds: how GPU memory moves to storage and back, once that is proved; None: it bounces.
        plans: how each kind of memory moves, once that is settled.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.region = region_of(arena.bytes)
        self.gds: GpuGathered | None = None
        self.plans: tuple[PathPlan, ...] = ()
        self._most_gathered = _NEVER  # of a GPU's memory
        self._most_bounced = _NEVER  # of the host's
        self._pinned: int | None = None  # on which GPU
        self._lock = threading.Lock()

    def choose(self, host: PathPlan, gds: Gds, gather_bytes: int) -> None:
        """Settle how memory moves to one more tier, a GPU's too if there is one. Blocks."""
        if gather_bytes and host.path == "direct":
            self._most_bounced = most = _Scattered(self.arena.span.nbytes // _SHARE, _FRAGMENT)
            host = replace(host, evidence=(*host.evidence, most.rule))
        self.plans += (host, *self._gpu_plans(host, gds))
        if gds.path:
            self.gds = GpuGathered(GpuDirect(gds.path), gather_bytes)
            self._most_gathered = _Scattered(gather_bytes, gds.gather)

    def _gpu_plans(self, host: PathPlan, gds: Gds) -> tuple[PathPlan, ...]:
        try:
            here = f"{cuda().devices} GPUs answer"
        except PathUnavailable:
            return ()
        plan = replace(host, memory="gpu", path=gds.path or "bounce", refused=gds.refused)
        if not gds.path:
            return (replace(plan, evidence=(f"{here}; copies through page-locked host memory",)),)
        evidence = (here, *gds.evidence, "blocks whose parts are not whole pages bounce")
        backend = f"{GPU_PLUGIN}, stamps {host.backend}"
        return (replace(plan, backend=backend, alignment=PAGE, evidence=evidence),)

    def path_for(self, view: View, plan: PathPlan) -> Path:
        """The path that a view takes to the tier that has this plan."""
        region = view.region
        if plan.path == "bounce":
            return BOUNCE
        if region.device is None:
            direct = region.zero_copy and view.alignment >= plan.alignment
            return DIRECT if direct and not self._most_bounced.has(view) else BOUNCE
        if self.gds is None or not region.zero_copy or view.alignment < PAGE:
            return BOUNCE
        return self.gds if self._most_gathered.has(view) else self.gds.direct

    def spares_bounce(self, region: Region, plan: PathPlan) -> bool:
        """Whether such memory would move without the bounce region, registered and aligned."""
        return plan.path != "bounce" and (region.device is None or self.gds is not None)

    def cuda(self, device: int) -> Cuda:
        """The CUDA runtime, once the region is page-locked for it. Blocks the first time."""
        with self._lock:
            if self._pinned is None:
                cuda().pin(device, self.arena.span)
                self._pinned = device
        return cuda()

    def close(self) -> None:
        """Unlock the pages, free staging memory; nothing may copy any more. Blocks."""
        if self.gds is not None:
            self.gds.close()
        if self._pinned is not None:
            try:
                cuda().unpin(self._pinned, self.arena.span)
            except CudaError as error:  # the GPU has failed: that is no reason not to close
                _log.warning("the bounce region stays page-locked: %s", error)
            self._pinned = None
