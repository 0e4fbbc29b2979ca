"""How one block's bytes get from its view into an image on storage, and back.

Owns the two ways there are for host memory. *Direct*: storage reads and writes the
caller's memory; only the stamp's page is leased from the bounce region. *Bounce*: the
whole image is leased there and copied. Which of them a tier's plan allows is decided once,
when the tier opens, from a trial with real reads and writes.

A :class:`Move` is used by two threads, one after the other: the event loop's makes it and
gets it back, a reactor's runs ``begin`` and ``end``. Its gate decides who owns the
caller's memory when a deadline passes in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import xxhash

from kvgds import contention
from kvgds.blocks import NO_CHECKSUM, PAGE, XXH3_128, Stamp, image_bytes
from kvgds.errors import BlockCorrupt, PathUnavailable, TransferError, TransferTimeout
from kvgds.memory import Arena, copy_pieces, pairs
from kvgds.memory.device import COPIED, cuda
from kvgds.schedule import Row
from kvgds.transport import LATER

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path as FilePath

    from kvgds.blocks import BlockKey
    from kvgds.memory import Region, View
    from kvgds.memory.device import Copied, Copying, Cuda
    from kvgds.transport import File, Later

Rows = list[Row]
_NO_ROWS: Rows = []
_TRIAL_BYTES = (PAGE, (1 << 20) + PAGE)
_STATX_DIOALIGN = 0x2000


@dataclass(frozen=True, slots=True)
class PathPlan:
    """How bytes move between one kind of memory and one tier, and how that was decided.

    Attributes:
        tier: the tier, for example ``"slabs:/nvme/kv"``.
        memory: ``"host"``.
        path: ``"direct"`` for aligned registered memory (the rest bounces), or ``"bounce"``.
        backend: what moves the bytes, for example ``"POSIX/uring"``.
        direct_io: whether the page cache is bypassed.
        alignment: what addresses, offsets and lengths must be multiples of, in bytes.
        evidence: what the decision rests on.
        refused: other ways, each with the reason against it.
    """

    tier: str
    memory: str
    path: str
    backend: str
    direct_io: bool
    alignment: int
    evidence: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        cache = "O_DIRECT" if self.direct_io else "page cache"
        lines = [f"{self.tier}: {self.memory} memory {self.path} via {self.backend}, {cache}"]
        lines += [f"  because {line}" for line in self.evidence]
        lines += [f"  not {line}" for line in self.refused]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class DirectoryPlan:
    """What a trial found out about a directory."""

    direct_io: bool
    evidence: tuple[str, ...]
    refused: tuple[str, ...] = ()

    @property
    def alignment(self) -> int:
        """What addresses, offsets and lengths must be multiples of, in bytes."""
        return PAGE if self.direct_io else 1

    def path_plan(self, tier: str, backend: str) -> PathPlan:
        """How host memory moves to a tier in this directory."""
        return PathPlan(
            tier=tier,
            memory="host",
            path="direct",
            backend=backend,
            direct_io=self.direct_io,
            alignment=self.alignment,
            evidence=self.evidence,
            refused=self.refused,
        )


class Move:
    """One block on its way between a view and an image; a ``transport.Transfer``.

    Attributes:
        status: set by the tier when it ends: ``"hit"``, ``"miss"``, ``"stored"`` or
            ``"present"``; ``error`` is set instead when it failed.
        abandoned: the caller has gone; what arrives must not be published.
    """

    __slots__ = (
        "_gate",
        "abandoned",
        "algorithm",
        "backend",
        "bounce",
        "copying",
        "device",
        "device_rows",
        "error",
        "file",
        "generation",
        "key",
        "lease",
        "lease_address",
        "namespace",
        "nbytes",
        "offset",
        "owner",
        "path",
        "place",
        "regions",
        "slot",
        "status",
        "view",
        "write",
    )

    def __init__(
        self,
        *,
        namespace: bytes,
        key: BlockKey,
        view: View,
        write: bool,
        path: Path,
        full: bool,
        owner: object = None,
        backend: str = "",
    ) -> None:
        self.namespace = namespace
        self.key = key
        self.view = view
        self.write = write
        self.path = path
        self.nbytes = view.nbytes
        self.algorithm = XXH3_128 if full else NO_CHECKSUM
        self.owner = owner
        self.backend = backend
        self.status = ""
        self.error: Exception | None = None
        self.abandoned = False
        self.lease: memoryview = memoryview(b"")
        self.lease_address = 0
        self.regions: Sequence[Region] = ()
        self.file: File = None  # type: ignore[assignment]  # the tier sets it before submitting
        self.offset = 0
        self.device = view.region.device or 0
        self.device_rows: Rows = _NO_ROWS
        self.bounce: Bounce
        self.copying: Copying | Copied | None = None
        self.generation: int | None = None  # of a load: the one expected; None: any
        self.place = ""
        self.slot = 0  # slab tier only
        self._gate = threading.Lock()

    @property
    def direction(self) -> Literal["load", "store"]:
        """Seen from the caller's memory."""
        return "store" if self.write else "load"

    def lend(self, bounce: Bounce, offset: int, nbytes: int) -> None:
        """Give the move its lease of the bounce region."""
        self.bounce = bounce
        self.lease = bounce.arena.bytes[offset : offset + nbytes]
        self.lease_address = bounce.arena.span.address + offset
        direct = self.path is DIRECT
        self.regions = (bounce.region, self.view.region) if direct else (bounce.region,)

    def abandon(self) -> bool:
        """Take the caller's memory away from the transfer. False: it is being used just now."""
        if not self._gate.acquire(blocking=False):
            return False
        self.abandoned = True
        return True

    def enter(self) -> bool:
        """Reactor: use the caller's memory from now on. False: the caller took it back."""
        return self._gate.acquire(blocking=False)

    def leave(self) -> None:
        """Reactor: the caller's memory is not needed any more."""
        self._gate.release()

    def again(self) -> None:
        """After a failure: ready to begin once more, and until then the caller's to take back."""
        self.error = None
        if self.path is DIRECT:  # which holds its gate until it ends
            self.leave()
        self.copying = None

    def begin(self) -> Rows | Later | None:
        """Stage what is to be stored; see ``transport.Transfer``."""
        if self.abandoned:
            self.error = self.timeout()
            return None
        return self.path.begin(self)

    def end(self) -> Later | None:
        """Check and hand over what was loaded; see ``transport.Transfer``."""
        return self.path.end(self)

    def fail(self, error: Exception) -> None:
        """Record why the bytes did not move; see ``transport.Transfer``."""
        if isinstance(error, TransferError | BlockCorrupt):
            self.error = error
            return
        number = getattr(error, "errno", None)
        self.error = TransferError(str(error), errno=number, **self.context)
        self.error.__cause__ = error

    def timeout(self) -> TransferTimeout:
        """The error for a deadline that passed."""
        return TransferTimeout("passed its deadline", errno=errno.ETIMEDOUT, **self.context)

    @property
    def context(self) -> dict[str, Any]:
        """What every error about this move says."""
        return {
            "direction": self.direction,
            "key": self.key,
            "path": self.path.name,
            "backend": self.backend,
        }

    def stamp(self, checksum: bytes) -> None:
        """Write the stamp into the lease."""
        stamp = Stamp(
            self.namespace, self.key, self.generation or 0, self.nbytes, self.algorithm, checksum
        ).encode()
        self.lease[: len(stamp)] = stamp
        self.lease[len(stamp) : PAGE] = bytes(PAGE - len(stamp))

    def check(self, pieces: Sequence[memoryview]) -> None:
        """Raise BlockCorrupt unless the stamp is this block's and the payload is whole."""
        stamp = Stamp.decode(self.lease[:PAGE])
        if stamp is None:
            raise self.corrupt("there is no whole stamp")
        if (stamp.namespace, stamp.key) != (self.namespace, self.key):
            raise self.corrupt(f"the stamp is of another block, {stamp.key.hex()[:32]}")
        if stamp.nbytes != self.nbytes:
            raise self.corrupt(f"the stamp says {stamp.nbytes} bytes, expected {self.nbytes}")
        if self.generation is not None and stamp.generation != self.generation:
            raise self.corrupt(f"generation {stamp.generation}, expected {self.generation}")
        if self.algorithm != NO_CHECKSUM and (
            stamp.algorithm != self.algorithm or stamp.checksum != checksum_of(pieces)
        ):
            raise self.corrupt("the payload does not match its checksum")

    def corrupt(self, reason: str) -> BlockCorrupt:
        """The error for stored bytes that are wrong."""
        return BlockCorrupt(self.key, reason, self.place)


class Path(Protocol):
    """One way between a view and an image. Both methods run on a reactor thread."""

    name: str

    def lease_bytes(self, nbytes: int) -> int:
        """Bytes of the bounce region that a block of ``nbytes`` needs, whole pages."""

    def begin(self, move: Move) -> Rows | Later | None:
        """Make ready what is to be stored; the rows to move, or None if it was abandoned."""

    def end(self, move: Move) -> Later | None:
        """Check what was loaded and put it into the view; raises BlockCorrupt."""


class _Direct:
    name = "direct"

    def lease_bytes(self, nbytes: int) -> int:  # noqa: ARG002 - only the stamp is leased
        return PAGE

    def begin(self, move: Move) -> Rows | None:
        if not move.enter():
            move.error = move.timeout()
            return None
        if move.write:
            full = move.algorithm != NO_CHECKSUM
            move.stamp(checksum_of(move.view.pieces()) if full else bytes(16))
        offset = move.offset
        rows = [(move.lease_address, offset, PAGE)]
        offset += PAGE
        for address, nbytes in move.view.rows():
            rows.append((address, offset, nbytes))
            offset += nbytes
        return rows

    def end(self, move: Move) -> None:
        if not move.write:
            move.check(move.view.pieces())


class _Bounce:
    """By way of the lease: a host's copies end at once, a GPU runs them on engines of its own."""

    name = "bounce"

    def lease_bytes(self, nbytes: int) -> int:
        return image_bytes(nbytes)

    def begin(self, move: Move) -> Rows | Later | None:
        if move.write:
            if move.copying is None:
                if not move.enter():
                    move.error = move.timeout()
                    return None
                move.copying = self._copy(move)
            if not move.copying.done:
                return LATER
            move.leave()
            self._seal(move)
        return [(move.lease_address, move.offset, image_bytes(move.nbytes))]

    def end(self, move: Move) -> Later | None:
        if move.write:
            return None
        if move.copying is None:
            move.check([move.lease[PAGE : PAGE + move.nbytes]])
            if not move.enter():
                move.error = move.timeout()
                return None
            move.copying = self._copy(move)
        return None if move.copying.done else LATER

    @staticmethod
    def _copy(move: Move) -> Copying | Copied:
        view, device = move.view, move.view.region.device
        if device is None:
            payload, pieces = [move.lease[PAGE : PAGE + move.nbytes]], view.pieces()
            copy_pieces(*((pieces, payload) if move.write else (payload, pieces)))
            return COPIED
        lease, memory = [(move.lease_address + PAGE, move.nbytes)], view.rows()
        copies = pairs(memory, lease) if move.write else pairs(lease, memory)
        return move.bounce.cuda().copy(device, copies)

    @staticmethod
    def _seal(move: Move) -> None:
        """Complete an image whose payload lies in the lease: padding, checksum and stamp."""
        payload = move.lease[PAGE:]
        payload[move.nbytes :] = bytes(len(payload) - move.nbytes)
        full = move.algorithm != NO_CHECKSUM
        move.stamp(checksum_of([payload[: move.nbytes]]) if full else bytes(16))


DIRECT: Path = _Direct()
BOUNCE: Path = _Bounce()


class Bounce:
    """The bounce region: host memory that belongs to the engine and lies in NIXL's hands."""

    def __init__(self, arena: Arena, region: Region) -> None:
        self.arena = arena
        self.region = region
        self._pinned = False
        self._devices = 0
        self._lock = threading.Lock()

    def probe(self) -> None:
        """Look for a GPU. Blocks."""
        with contextlib.suppress(PathUnavailable):
            self._devices = cuda().devices

    def plans(self, tier: PathPlan) -> tuple[PathPlan, ...]:
        """How GPU memory moves to a tier, if there is a GPU."""
        if not self._devices:
            return ()
        evidence = (f"{self._devices} GPUs answer; copies through page-locked host memory",)
        refused = ("gds: this version does not do it",)
        plan = replace(tier, memory="gpu", path="bounce", evidence=evidence, refused=refused)
        return (plan,)

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


def path_for(view: View, alignment: int) -> Path:
    """The path that a view takes to a tier with this alignment."""
    region = view.region
    direct = region.device is None and region.zero_copy and view.alignment >= alignment
    return DIRECT if direct else BOUNCE


_HELD_BYTES = 64 << 10  # xxhash gives up the lock for more


def checksum_of(pieces: Sequence[memoryview]) -> bytes:
    """xxh3-128 of the pieces in order.

    Hashing a long piece at once lets go of the interpreter lock, so that the event loop runs
    meanwhile. While the loop is busy in Python, taking the lock back costs more than the hashing:
    then long pieces are hashed in stretches that keep it.
    """
    if len(pieces) == 1 and len(pieces[0]) <= _HELD_BYTES:
        return xxhash.xxh3_128_digest(pieces[0])
    started = time.monotonic()
    hold = contention.busy()
    state = xxhash.xxh3_128()
    for piece in pieces:
        step = _HELD_BYTES if hold else len(piece)
        for start in range(0, len(piece), step):
            state.update(piece[start : start + step])
    if not hold:
        contention.waited(time.monotonic() - started - sum(map(len, pieces)) * 1e-9)
    return state.digest()


def try_directory(root: FilePath, mode: Literal["auto", "require", "never"]) -> DirectoryPlan:
    """Find out by real writes and reads whether O_DIRECT works below ``root``. Blocks.

    Some file systems accept O_DIRECT at open and refuse it at write, so only a round trip
    with the sizes that will be used is proof.

    Raises:
        PathUnavailable: ``mode`` is ``"require"`` and it does not work.
        OSError: not even plain files work there.
    """
    path = root / f".trial-{os.getpid()}-{secrets.token_hex(4)}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        evidence = [f"{root} is on {filesystem_of(root)}", *_dio_alignment(path)]
        works, why = (False, "not wanted") if mode == "never" else _try_direct(path)
        if works:
            return DirectoryPlan(direct_io=True, evidence=(*evidence, why))
        if mode == "require":
            raise PathUnavailable(
                f"O_DIRECT does not work in {root}; use another file system or direct_io='auto'",
                (*evidence, why),
            )
        refused = (f"O_DIRECT: {why}",)
        return DirectoryPlan(direct_io=False, evidence=tuple(evidence), refused=refused)
    finally:
        os.close(fd)
        os.unlink(path)


def _try_direct(path: FilePath) -> tuple[bool, str]:
    """Whether O_DIRECT works on a file, and how that is known."""
    arena = Arena(2 * max(_TRIAL_BYTES))
    half = max(_TRIAL_BYTES)
    step = "open"
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        try:
            for nbytes in _TRIAL_BYTES:
                sent, got = arena.bytes[:nbytes], arena.bytes[half : half + nbytes]
                sent[:] = secrets.token_bytes(PAGE) * (nbytes // PAGE)
                step = f"a write of {nbytes:,} bytes"
                if os.pwritev(fd, [sent], 0) != nbytes:
                    return False, f"{step} was short"
                step = f"a read of {nbytes:,} bytes"
                if os.preadv(fd, [got], 0) != nbytes or sent != got:
                    return False, f"{step} gave other bytes"
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False, f"{step} is refused: {error.strerror}"
        if error.errno == errno.ENOSPC:  # what is stored there can be loaded all the same
            return bool(_dio_alignment(path)), "the disk is full: it was not tried, only asked for"
        raise
    sizes = " and ".join(f"{n:,}" for n in _TRIAL_BYTES)
    return True, f"O_DIRECT wrote and read back {sizes} bytes"


def filesystem_of(root: FilePath) -> str:
    """Type of the file system below ``root``, from the longest mount point above it."""
    best, kind = "", "an unknown file system"
    real = os.path.realpath(root)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            left, _, right = line.partition(" - ")
            point = left.split()[4].replace("\\040", " ")
            if len(point) >= len(best) and (real + "/").startswith(point.rstrip("/") + "/"):
                best, kind = point, right.split()[0]
    return kind


def _dio_alignment(path: FilePath) -> list[str]:
    """What statx says of direct I/O, where kernel and C library can say it."""
    statx = getattr(ctypes.CDLL(None), "statx", None)
    page = ctypes.create_string_buffer(256)
    if statx is None or statx(-100, os.fsencode(path), 0, _STATX_DIOALIGN, page) != 0:
        return []
    if not int.from_bytes(page.raw[0:4], "little") & _STATX_DIOALIGN:
        return []
    memory, offset = (int.from_bytes(page.raw[i : i + 4], "little") for i in (0x98, 0x9C))
    if not offset:
        return []
    return [f"statx asks for {memory}-byte memory and {offset}-byte file alignment"]
