"""One block on its way, and what a path does with it.

A :class:`Move` is used by two threads, one after the other: the event loop's makes it and
gets it back, a reactor's runs ``begin`` and ``end``. Its gate decides who owns the
caller's memory when a deadline passes in between.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Literal, Protocol

import xxhash

from kvgds import contention
from kvgds.blocks import NO_CHECKSUM, PAGE, XXH3_128, Stamp, image_bytes
from kvgds.errors import BlockCorrupt, TransferError, TransferTimeout
from kvgds.memory import Arena
from kvgds.transport import LATER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvgds.blocks import BlockKey
    from kvgds.memory import View
    from kvgds.paths.gpu import Room
    from kvgds.paths.ways import Ways
    from kvgds.schedule import Ticket
    from kvgds.transport import File, Later
    from kvgds.transport.contract import Memory, Rows

_NO_ROWS: Rows = []


class Move:
    """One block on its way between a view and an image; a ``transport.Transfer``.

    Attributes:
        status: set by the tier when it ends: ``"hit"``, ``"miss"``, ``"stored"`` or
            ``"present"``; ``error`` is set instead when it failed.
        abandoned: the caller has gone; what arrives must not be published.
        entered: the caller's memory is being used, perhaps by a GPU that nothing can stop.
        mirrored: of a store: the next tier has the block already. Of a load: it is for the next
            tier, and so no use of the block.
    """

    __slots__ = (
        "_gate",
        "abandoned",
        "algorithm",
        "backend",
        "device",
        "device_rows",
        "entered",
        "error",
        "file",
        "generation",
        "key",
        "lease",
        "lease_address",
        "mirrored",
        "namespace",
        "nbytes",
        "offset",
        "owner",
        "path",
        "place",
        "regions",
        "room",
        "slot",
        "status",
        "stream",
        "urgent",
        "view",
        "ways",
        "work",
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
        ways: Ways,
        ticket: Ticket[Any],  # has its lease of the bounce region
        owner: object,
        backend: str,
        urgent: bool = False,
        stream: int = 0,
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
        self.urgent = urgent
        self.status = ""
        self.error: Exception | None = None
        self.abandoned = False
        self.entered = False
        self.mirrored = False
        self.room: Room | None = None  # of a staging buffer
        self.file: File = None  # type: ignore[assignment]  # the tier sets it before submitting
        self.offset = 0
        self.device = view.region.device or 0
        self.device_rows: Rows = _NO_ROWS
        self.stream = stream
        self.work: Work | None = None
        self.generation: int | None = None  # of a load: the one expected; None: any
        self.place = ""
        self.slot = 0  # slab tier only
        self._gate = threading.Lock()
        self.ways = ways
        leased = ticket.offset or 0
        self.lease = ways.arena.bytes[leased : leased + ticket.bounce_bytes]
        self.lease_address = ways.arena.span.address + leased
        self.regions: Sequence[Memory] = (ways.region, *path.regions(self))

    @property
    def direction(self) -> Literal["load", "store"]:
        """Seen from the caller's memory."""
        return "store" if self.write else "load"

    def go_by(self, path: Path) -> None:
        """Reactor: take another way to the same place, with the lease that there is."""
        self.path = path
        self.regions = (self.ways.region, *path.regions(self))

    @property
    def in_room(self) -> list[tuple[int, int]]:
        """Where the payload lies in the staging buffer."""
        return [(self.room.address, self.nbytes)] if self.room is not None else []

    def vacate(self) -> None:
        """Reactor: give back room that nothing touches any more."""
        if self.room is not None:
            self.room.give()
            self.room = None

    def abandon(self) -> bool:
        """Take the caller's memory away from the transfer. False: it is being used just now."""
        if not self._gate.acquire(blocking=False):
            return False
        self.abandoned = True
        return True

    def enter(self) -> bool:
        """Reactor: use the caller's memory from now on. False: the caller took it back."""
        self.entered = self._gate.acquire(blocking=False)
        if not self.entered:
            self.error = self.timeout()
        return self.entered

    def leave(self) -> None:
        """Reactor: the caller's memory is not needed any more."""
        self.entered = False
        self._gate.release()

    def again(self) -> None:
        """After a failure: ready to begin once more, and until then the caller's to take back."""
        self.error = None
        if self.entered:
            self.leave()
        self.work = None
        self.device_rows = _NO_ROWS

    def begin(self) -> Rows | Later | None:
        """Stage what is to be stored; see ``transport.Transfer``."""
        rows = self.path.begin(self) if self.entered or not self.abandoned else None
        if not self.abandoned or rows is LATER:  # a GPU writes into the lease or room, or may yet
            return rows
        self._drop()
        return None

    def end(self) -> Later | None:
        """Check and hand over what was loaded; see ``transport.Transfer``."""
        if self.write or self.entered or not self.abandoned:
            return self.path.end(self)
        self._drop()
        return None

    def _drop(self) -> None:
        """Nobody waits, and nothing has the caller's memory or is written in ours."""
        self.error = self.error or self.timeout()
        self.work = None
        self.vacate()  # a kernel may still read what lies there, but none writes

    def fail(self, error: Exception) -> None:
        """Record why the bytes did not move; see ``transport.Transfer``."""
        self.vacate()
        self.work = None  # it knows this move
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

    def look_again(self) -> None:
        """Read an image once more that was wrong in the caller's memory: others may have used that.

        Only if it is wrong in other memory as well ``error`` stays BlockCorrupt. Blocks.
        """
        try:
            image = Arena(image_bytes(self.nbytes)).bytes
            done, got = 0, PAGE
            while done < len(image) and got and not got % PAGE:  # else it ends there
                got = os.preadv(self.file.fd, [image[done:]], self.offset + done)
                done += got
            self.check(lambda: checksum_of([image[PAGE : PAGE + self.nbytes]]), image)
        except Exception as error:  # noqa: BLE001 - what can't be read proves nothing
            self.fail(error)
        else:
            text = (
                "what is stored is sound, but not what has arrived: was the memory used meanwhile?"
            )
            self.error = TransferError(text, errno=errno.EIO, **self.context)

    def check(self, checksum: Callable[[], bytes] | None, image: memoryview | None = None) -> None:
        """Raise BlockCorrupt unless the stamp is this block's and the payload is whole.

        Args:
            checksum: what the payload's is; None: only the stamp is looked at.
            image: what begins with the stamp; None: the lease does.
        """
        stamp = Stamp.decode((self.lease if image is None else image)[:PAGE])
        if stamp is None:
            raise self.corrupt("there is no whole stamp")
        if (stamp.namespace, stamp.key) != (self.namespace, self.key):
            raise self.corrupt(f"the stamp is of another block, {stamp.key.hex()[:32]}")
        if stamp.nbytes != self.nbytes:
            raise self.corrupt(f"the stamp says {stamp.nbytes} bytes, expected {self.nbytes}")
        if self.generation is not None and stamp.generation != self.generation:
            raise self.corrupt(f"generation {stamp.generation}, expected {self.generation}")
        if (
            checksum is not None
            and self.algorithm != NO_CHECKSUM
            and (stamp.algorithm != self.algorithm or stamp.checksum != checksum())
        ):
            raise self.corrupt("the payload does not match its checksum")

    def corrupt(self, reason: str) -> BlockCorrupt:
        """The error for stored bytes that are wrong."""
        return BlockCorrupt(self.key, reason, self.place)


class Work(Protocol):
    """What a GPU does for a move meanwhile."""

    @property
    def done(self) -> bool:
        """Whether it has ended. Raises what went wrong."""


class Path(Protocol):
    """One way between a view and an image. ``begin`` and ``end`` run on a reactor thread.

    Attributes:
        holds: whether storage uses the caller's memory itself, from ``begin`` to ``end``.
        whole: whether the lease takes the whole image; False: the stamp's page.
    """

    name: str
    holds: bool
    whole: bool

    def regions(self, move: Move) -> tuple[Memory, ...]:  # noqa: ARG002 - nothing, where not told
        """What storage uses beside the bounce region."""
        return ()

    def begin(self, move: Move) -> Rows | Later | None:
        """Make ready what is to be stored; the rows to move, or None if it was abandoned."""

    def end(self, move: Move) -> Later | None:
        """Check what was loaded and put it into the view; raises BlockCorrupt."""


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
