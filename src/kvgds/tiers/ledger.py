"""What all who share a directory agree on: the bytes taken, and whose a temporary file is.

Everything blocks and belongs to the executor.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvgds.paths import NO_ROOM
from kvgds.tiers import locks
from kvgds.tiers.folders import files_in, open_own

if TYPE_CHECKING:
    from collections.abc import Iterator

_TEMPORARY = re.compile(r"([0-9a-f]{32}\.\d+)\.(\d{1,9})\.(\d+)\.[0-9a-f]{16}\.(\d+)")
_COUNT = re.compile(rb"\d{20}\n")
_STALE_S = 3600.0


class Ledger:
    """A count of bytes, in a file that is locked to be read and changed.

    Attributes:
        used: the count when it was last read.
        stuck: whether there is too high a one, because there was no room for that below it.
    """

    def __init__(self, root: int) -> None:
        self.used = 0
        self.stuck = False
        self._written = 0  # -1: nothing that is a count
        self._root = root
        self._fd = -1

    @property
    def sound(self) -> bool:
        """Whether there was a count when it was last read."""
        return self._written >= 0

    @contextlib.contextmanager
    def held(self, *, wait: bool = True) -> Iterator[None]:
        """Hold the lock, and know the count. BlockingIOError: who may not wait has to."""
        self._fd = self._open()
        try:
            (locks.lock if wait else locks.lock_nowait)(self._fd, fcntl.LOCK_EX)
            text = os.pread(self._fd, 32, 0)
            self._written = int(text) if _COUNT.fullmatch(text) else -1
            self.used = max(self._written, 0)
            yield
        finally:
            locks.close(self._fd)

    def _open(self) -> int:
        try:
            return open_own("ledger", self._root)
        except FileNotFoundError:  # it would have been made, if there were a place for it
            path = os.readlink(f"/proc/self/fd/{self._root}").removesuffix(" (deleted)")
            rule = "close the engine, and keep others out of the directory"
            text = f"{path} was deleted while the engine had it open; {rule}"
            raise FileNotFoundError(errno.ENOENT, text) from None

    def add(self, nbytes: int) -> None:
        """Change the count."""
        self.set(self.used + nbytes)

    def set(self, nbytes: int) -> None:
        """Replace the count.

        A full btrfs has no room even for that. Then what was freed is known here alone, until a
        count can be written again; that one too high stays there is safe.
        """
        nbytes = max(nbytes, 0)
        if nbytes != self._written:
            try:
                os.pwrite(self._fd, b"%020d\n" % nbytes, 0)
            except OSError as error:
                if error.errno not in NO_ROOM or nbytes > self._written:
                    raise
                self.stuck = True
            else:
                self._written, self.stuck = nbytes, False
        self.used = nbytes

    def now(self) -> float:
        """The time by the clock that stamps files here, which may be another host's."""
        os.utime(self._fd)
        return os.fstat(self._fd).st_mtime


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, told from all others on all hosts.

    Attributes:
        world: boot and name spaces of processes and time: who can tell whether it lives.
        pid: its number there.
        start: when it started, because numbers come again.
    """

    world: str
    pid: int
    start: str

    @classmethod
    def me(cls) -> Owner:
        """This process."""
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip().replace("-", "")
        if os.readlink("/proc/self") != str(os.getpid()):  # it knows processes by other numbers
            boot = secrets.token_hex(16)
        # When a process started is told by the clock of who asks.
        spaces = [f"/proc/self/ns/{kind}" for kind in ("pid", "time")]
        numbers = [os.stat(path).st_ino for path in spaces if os.path.exists(path)]
        world = f"{boot}.{''.join(map(str, numbers)) or '0'}"
        return cls(world, os.getpid(), _state_and_start("self")[1])

    def temporary(self, nbytes: int) -> str:
        """A new path for a temporary file of this owner, for which bytes are reserved."""
        return f"tmp/{self.world}.{self.pid}.{self.start}.{secrets.token_hex(8)}.{nbytes}"

    def may_remove(self, name: str, age_s: float) -> bool:
        """Whether a temporary is stale.

        That is, if its owner is dead; where this can't be seen (another host, container or
        boot, or no name of ours), an hour after the last write; or before it, by a clock that was
        put right since. A living owner begins again.
        """
        parts = _TEMPORARY.fullmatch(name)
        if parts is None or parts[1] != self.world:
            return abs(age_s) > _STALE_S
        return not _alive(int(parts[2]), parts[3])


def reserved_by(temporary: str) -> int:
    """Bytes that a temporary file reserves, by its name or path."""
    parts = _TEMPORARY.fullmatch(temporary.rpartition("/")[2])
    return int(parts[4]) if parts else 0


def forget_temporary(inode: int, root: int) -> None:
    """Remove the temporary name of a block before its owner does: it counts no more."""
    for name, found in files_in("tmp", root):
        if found.st_ino == inode:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"tmp/{name}", dir_fd=root)


def _alive(pid: int, start: str) -> bool:
    """Whether the process that started then still runs; True if that can't be seen."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        state, started = _state_and_start(pid)
    except OSError:
        return True
    return started == start and state not in ("Z", "X")


def _state_and_start(pid: int | str) -> tuple[str, str]:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    return fields[0], fields[19]
