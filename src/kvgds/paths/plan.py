"""What is decided when a tier opens: how bytes move, and the trial that it rests on."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvgds.blocks import PAGE
from kvgds.errors import PathUnavailable
from kvgds.memory import Arena

if TYPE_CHECKING:
    from pathlib import Path as FilePath

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_TRIAL_BYTES = (PAGE, (1 << 20) + PAGE)
_STATX_DIOALIGN = 0x2000
_ESCAPE = re.compile(rb"\\([0-7]{3})")  # a byte that would be taken for the end of a mount point
_FULL = "the disk is full: it was not tried"


@dataclass(frozen=True, slots=True)
class PathPlan:
    """How bytes move between one kind of memory and one tier, and how that was decided.

    Attributes:
        tier: the tier, for example ``"slabs:/nvme/kv"``.
        memory: ``"host"`` or ``"gpu"``.
        path: ``"direct"`` for aligned registered memory (the rest bounces), ``"bounce"``, and for
            GPU memory ``"gds"`` or ``"gds-compat"``.
        backend: what moves the bytes, for example ``"POSIX/uring"``.
        direct_io: whether the page cache is bypassed; None: there is none on the way.
        alignment: what addresses, offsets and lengths must be multiples of, in bytes.
        evidence: what the decision rests on.
        refused: other ways, each with the reason against it.
    """

    tier: str
    memory: str
    path: str
    backend: str
    direct_io: bool | None
    alignment: int
    evidence: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    @property
    def how(self) -> str:
        """The decision in one line, without the tier."""
        caches = {True: ", O_DIRECT", False: ", page cache", None: ""}
        return f"{self.memory} memory {self.path} via {self.backend}{caches[self.direct_io]}"

    def __str__(self) -> str:
        lines = [f"{self.tier}: {self.how}"]
        lines += [f"  because {line}" for line in self.evidence]
        lines += [f"  not {line}" for line in self.refused]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class DirectoryPlan:
    """What a trial found out about a directory."""

    direct_io: bool
    evidence: tuple[str, ...]
    refused: tuple[str, ...] = ()

    def path_plan(self, tier: str, backend: str) -> PathPlan:
        """How host memory moves to a tier in this directory."""
        return PathPlan(
            tier=tier,
            memory="host",
            path="direct",
            backend=backend,
            direct_io=self.direct_io,
            alignment=PAGE if self.direct_io else 1,
            evidence=self.evidence,
            refused=self.refused,
        )


def trial_path(root: FilePath) -> FilePath:
    """A new name for a file to try things with; slabs sweep what is left of such."""
    return root / f".trial-{os.getpid()}-{secrets.token_hex(4)}"


def try_directory(root: FilePath, mode: Literal["auto", "require", "never"]) -> DirectoryPlan:
    """Find out by real writes and reads whether O_DIRECT works below ``root``. Blocks.

    Some file systems accept O_DIRECT at open and refuse it at write, so only a round trip
    with the sizes that will be used is proof.

    Raises:
        PathUnavailable: ``mode`` is ``"require"`` and it does not work.
        OSError: not even plain files work there.
    """
    path, there = trial_path(root), f"{root} is on {filesystem_of(root)}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in NO_ROOM or mode == "require":
            raise  # else what is stored there can be loaded
        return DirectoryPlan(direct_io=False, evidence=(there,), refused=(f"O_DIRECT: {_FULL}",))
    try:
        evidence = [there, *_dio_alignment(path)]
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
        if error.errno in NO_ROOM:  # what is stored there can be loaded all the same
            return bool(_dio_alignment(path)), f"{_FULL}, only asked for"
        raise
    sizes = " and ".join(f"{n:,}" for n in _TRIAL_BYTES)
    return True, f"O_DIRECT wrote and read back {sizes} bytes"


def filesystem_of(root: FilePath) -> str:
    """Type of the file system below ``root``, from the longest mount point above it."""
    best, kind = b"", b"an unknown file system"
    real = os.fsencode(os.path.realpath(root))
    with open("/proc/self/mountinfo", "rb") as mounts:
        for line in mounts:
            left, _, right = line.partition(b" - ")
            point = _ESCAPE.sub(lambda found: bytes([int(found[1], 8)]), left.split(b" ")[4])
            if len(point) >= len(best) and (real + b"/").startswith(point.rstrip(b"/") + b"/"):
                best, kind = point, right.split()[0]
    return kind.decode(errors="replace")


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
