"""Faulty file systems for tests: real mounts, so that every way of doing I/O meets the fault (O_DIRECT, AIO, io_uring).

``FaultyDisk`` fails, hangs, delays, cuts short or loses requests on command. ``small_disk`` runs out of space.
``read_only`` refuses writes. All need root, and skip the test where this machine can't mount them.

Each is a context manager that leaves nothing behind: no mount, no process, and nobody waiting on a disk that is gone.
"""

import ctypes
import errno
import fcntl
import fnmatch
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypedDict, Unpack

import pytest

SERVER = Path(__file__).with_name("faultfs.py")
POLL_S = 0.002
STOP_S = 5.0
ANSWER_S = 20.0

MS_RDONLY, MS_REMOUNT, MS_BIND = 1, 32, 4096
MNT_DETACH = 2
LOOP_SET_FD, LOOP_CLR_FD, LOOP_CTL_GET_FREE = 0x4C00, 0x4C01, 0x4C82
LOOP_MAJOR = 7
FS_IOC_SHUTDOWN, FS_GOING_DOWN_NOLOGFLUSH = 0x8004587D, 2

libc = ctypes.CDLL(None, use_errno=True)

Op = Literal[
    "read", "write", "open", "create", "fsync", "fsyncdir", "fallocate", "truncate", "setattr", "flush",
    "unlink", "rename", "link", "mkdir", "rmdir", "opendir", "readdir", "lookup", "getattr", "statfs",
]  # fmt: skip


class Where(TypedDict, total=False):
    """Which requests of its kind a rule strikes; without any of these, all of them."""

    match: str
    """Shell pattern for the file's name, or for its path below the root. A rename matches by either name."""
    offset: int
    """Strike requests that overlap `length` bytes from here (reads, writes, fallocate)."""
    length: int
    count: int
    """Strike this often, then no more."""
    skip: int
    """Let this many matching requests pass first."""
    direct: bool
    """Strike only requests through a descriptor opened with (True) or without (False) O_DIRECT."""


class Seen(NamedTuple):
    """One request that reached the disk, struck or not. `path` is below the root; of a rename, the new name."""

    op: str
    path: str
    offset: int
    length: int


class FaultyDisk:
    """A file system mounted at `root` that passes everything through to `backing`, except what rules strike.

    Rules hold from the moment the call returns until they are spent or cleared; the oldest that applies decides.
    The kernel cuts I/O into requests of at most 1 MiB. Reads that the page cache answers never get here.
    All methods may be called from any thread; they wait for the server's answer, so not from an event loop under guard.
    Without `links` it counts none, as some real ones do: every file seems to have been deleted.
    """

    def __init__(self, where: Path, backing: Path | None = None, *, links: bool = True) -> None:
        self.root = where / "disk"
        self.backing = backing or where / "backing"
        self._options = [] if links else ["no links"]
        self._lock = threading.Lock()
        self._vanished = False

    def __enter__(self) -> Self:
        self.root.mkdir(parents=True, exist_ok=True)
        self.backing.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [str(self.root), str(self.backing.resolve()), str(theirs.fileno())]
            self._server = subprocess.Popen(
                [sys.executable, "-I", str(SERVER), *arguments, *self._options],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the test; its teardown still needs the disk
            )
        ours.settimeout(ANSWER_S)
        self._control, self._answers = ours, ours.makefile("rb")
        hello = self._answer()
        if "error" in hello:
            self._stop()
            pytest.skip(f"no FUSE file system can be mounted here: {hello['error']}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.clear()
            _unmount(
                self.root
            )  # while the server lives, so that what mmap left dirty gets to the backing
        finally:
            self._stop()

    def _stop(self) -> None:
        """End the server; with it the kernel ends every request it still has."""
        self._answers.close()
        self._control.close()
        try:
            self._server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        _unmount(self.root)

    def fail(self, op: Op, error: int = errno.EIO, **where: Unpack[Where]) -> None:
        """Answer with `error`, doing nothing."""
        self._rule("fail", op, error, where)

    def hang(self, op: Op, **where: Unpack[Where]) -> None:
        """Hold requests, before they do anything, until `release` or `clear`."""
        self._rule("hang", op, 0, where)

    def delay(self, op: Op, seconds: float, **where: Unpack[Where]) -> None:
        """Hold requests, before they do anything, for so long."""
        self._rule("delay", op, seconds, where)

    def short(self, op: Literal["read", "write"], keep: int, **where: Unpack[Where]) -> None:
        """Move only the first `keep` bytes, and say so."""
        self._rule("short", op, keep, where)

    def drop(self, op: Literal["write"], **where: Unpack[Where]) -> None:
        """Lose writes: say that all is well, and do nothing."""
        self._rule("drop", op, 0, where)

    def release(self, error: int = 0) -> None:
        """End every `hang`: what is held goes ahead now, or fails with `error`, in the order it came."""
        self._ask("release", error=error)

    def clear(self) -> None:
        """Be a healthy disk again: no rules, nothing held or delayed. Too late for one that vanished."""
        if not self._vanished:
            self._ask("clear")

    def vanish(self) -> None:
        """Be unplugged, for good: what is held fails (ECONNABORTED), and everything after it (ENOTCONN)."""
        self._vanished = True
        self._server.kill()
        self._server.wait()

    def waiting(self) -> int:
        """How many requests `hang` holds now."""
        return int(self._ask("waiting"))

    def wait_waiting(self, count: int) -> None:
        """Block this thread until at least `count` requests are held."""
        deadline = time.monotonic() + STOP_S
        while (held := self.waiting()) < count:
            if time.monotonic() > deadline:
                message = f"{held} requests held after {STOP_S} s, not {count}"
                raise TimeoutError(message)
            time.sleep(POLL_S)

    def seen(self, op: Op | None = None, match: str = "*") -> list[Seen]:
        """Requests so far, oldest first (the last 65536; look-ups and attribute reads are not recorded)."""
        journal = [Seen(*entry) for entry in self._ask("journal")]
        return [
            seen
            for seen in journal
            if op in (None, seen.op) and fnmatch.fnmatchcase(seen.path, match)
        ]

    def _rule(self, action: str, op: str, value: float, where: Where) -> None:
        self._ask("rule", action=action, op=op, value=value, **where)

    def _ask(self, do: str, **arguments: Any) -> Any:
        with self._lock:
            self._control.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
            return self._answer()

    def _answer(self) -> Any:
        answer = self._answers.readline()
        if not answer:
            message = "the file system's server is gone; its traceback is on stderr"
            raise RuntimeError(message)
        return json.loads(answer)


def fill_up(path: Path) -> None:
    """Take all the space that is left, with a file at ``path``."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


@contextmanager
def small_disk(
    where: Path, size: int, kind: Literal["tmpfs", "ext4", "ext2", "btrfs"] = "tmpfs"
) -> Iterator[Path]:
    """Mount a file system of `size` bytes (but on tmpfs, its metadata included, at least 2 MiB) and yield its directory."""
    root = where / f"small-{kind}"
    root.mkdir(parents=True)
    with _tmpfs(root, size) if kind == "tmpfs" else _formatted_disk(root, size, kind):
        yield root


class PowerDisk:
    """A disk of 64 MiB whose power may fail: of what was not synced nothing need be left."""

    def __init__(self, where: Path) -> None:
        self.root = where / "powered"
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.root.mkdir()
        image = _formatted(self.root.with_suffix(".img"), 64 << 20)
        self._device = self._stack.enter_context(_loop_device(image))
        _mount_or_skip(self._device, self.root, "ext4", "")
        self._stack.callback(lambda: _unmount(self.root))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def cut(self) -> None:
        """Lose what the file system's journal has not on the disk; then it answers EIO."""
        fd = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, FS_IOC_SHUTDOWN, struct.pack("I", FS_GOING_DOWN_NOLOGFLUSH))
        finally:
            os.close(fd)

    def restore(self) -> None:
        """Mount it again, once nobody has it mounted, or a file of it open."""
        _unmount(self.root)
        _wait_unused(self._device)
        _mount_or_skip(self._device, self.root, "ext4", "")


def _wait_unused(device: str) -> None:
    """Until no name space has it mounted: another that was made meanwhile has all that we had."""
    deadline = time.monotonic() + STOP_S
    while True:
        try:
            os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)
        else:
            return


@contextmanager
def _tmpfs(root: Path, size: int) -> Iterator[None]:
    _mount_or_skip("tmpfs", root, "tmpfs", f"size={size}")
    try:
        yield
    finally:
        _unmount(root)


@contextmanager
def _formatted_disk(root: Path, size: int, kind: str) -> Iterator[None]:
    if kind == "btrfs":
        image = _formatted(root.with_suffix(".img"), size, mkfs="mkfs.btrfs")
    else:  # no journal and no blocks kept back for root: nearly all of `size` is for files
        options = ("-t", kind, "-m", "0", "-O", "^has_journal")
        image = _formatted(root.with_suffix(".img"), size, *options)
    with _loop_device(image) as device:
        _mount_or_skip(device, root, kind, "")
        try:
            yield
        finally:
            _unmount(root)


def _formatted(image: Path, size: int, *options: str, mkfs: str = "mkfs.ext4") -> Path:
    found = shutil.which(mkfs, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{mkfs} (Debian packages e2fsprogs, btrfs-progs) is not installed")
    with image.open("xb") as file:
        file.truncate(size)
    subprocess.run([found, "-q", *options, str(image)], check=True, capture_output=True)
    return image


@contextmanager
def _loop_device(image: Path) -> Iterator[str]:
    with image.open("r+b") as backing:
        device, node = _attach(backing.fileno())
        try:
            yield node
        finally:
            fcntl.ioctl(
                device, LOOP_CLR_FD
            )  # takes effect with the last user, if a lazy unmount left one
            os.close(device)


def _attach(backing: int) -> tuple[int, str]:
    """Bind a free loop device; another process may take the one we were offered, then ask again."""
    while True:
        try:
            with Path("/dev/loop-control").open("rb") as control:
                number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
            node = f"/dev/loop{number}"
            if not Path(node).exists():
                os.mknod(node, 0o600 | 0o060000, os.makedev(LOOP_MAJOR, number))
            device = os.open(node, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            pytest.skip(f"no loop device can be had here: {error}")
        try:
            fcntl.ioctl(device, LOOP_SET_FD, backing)
        except OSError as error:
            os.close(device)
            if error.errno != errno.EBUSY:
                raise
        else:
            return device, node


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Make everything below `directory` read-only (EROFS, for root as well), whatever file system it is on.

    By a read-only bind mount: it binds whoever opens files by path from now on, not descriptors that are open already.
    For those: ``FaultyDisk.fail("write", errno.EROFS)``.
    """
    _mount_or_skip(str(directory), directory, None, "", MS_BIND)
    try:
        _mount_or_skip("none", directory, None, "", MS_BIND | MS_REMOUNT | MS_RDONLY)
        yield
    finally:
        _unmount(directory)


def _mount_or_skip(
    source: str, target: Path, kind: str | None, options: str, flags: int = 0
) -> None:
    raw_kind = kind.encode() if kind else None
    if (
        libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            raw_kind,
            ctypes.c_ulong(flags),
            options.encode(),
        )
        != 0
    ):
        reason = os.strerror(ctypes.get_errno())
        pytest.skip(
            f"mounting {kind or 'a bind mount'} needs root and a kernel that has it: {reason}"
        )


def _unmount(target: Path) -> None:
    """Unmount now, and for those who still use it as soon as they end. Fine if nothing is mounted."""
    libc.umount2(os.fsencode(target), MNT_DETACH)
