"""System calls on the folders and files below one root, never through a link.

Everything blocks and belongs to the executor. Paths are relative to the root's descriptor;
a job makes sure of a folder before it uses what is in it, and so finds a link planted there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SAFE = os.O_NOFOLLOW | os.O_CLOEXEC
_TOUCH_S = 60.0
_UNABLE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_libc = ctypes.CDLL(None, use_errno=True)


class Folders:
    """What one job sees of the tree.

    Attributes:
        changed: folders in which a name was made or removed.
    """

    def __init__(self, root: int, *, power: bool = False) -> None:
        self.changed: set[str] = set()
        self._root = root
        self._power = power
        self._sound = {""}
        self._lost = 0  # errno of a sync that failed

    def need(self, path: str, *, make: bool = False) -> None:
        """Raise unless the path leads to a folder: FileNotFoundError if to nothing."""
        if path in self._sound:
            return
        above = path.rpartition("/")[0]
        self.need(above, make=make)
        found = status(path, self._root)
        if found is None:
            if not make:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700, dir_fd=self._root)
                self.changed.add(above)
        elif not stat.S_ISDIR(found.st_mode):
            raise _planted(path, "folder")
        self._sound.add(path)

    def regular(self, path: str) -> os.stat_result:
        """Status of a regular file; FileNotFoundError if nothing has this name."""
        self.need(path.rpartition("/")[0])
        found = os.stat(path, dir_fd=self._root, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            raise _planted(path, "regular file")
        return found

    def open(self, path: str, flags: int) -> tuple[int, os.stat_result]:
        """Open a regular file to read it. It is looked at first: to open a pipe would wait."""
        self.regular(path)
        fd = os.open(path, os.O_RDONLY | SAFE | flags, dir_fd=self._root)
        try:
            return fd, os.fstat(fd)
        except BaseException:  # a network file system may have lost it already
            os.close(fd)
            raise

    def sync(self) -> None:
        """If blocks are to survive a loss of power: make changed names durable.

        Once it has failed it fails: a system tells of what was lost but once.
        """
        if self._lost:
            raise OSError(self._lost, os.strerror(self._lost))
        while self.changed and self._power:
            fd = _open_folder(next(iter(self.changed)), self._root)
            try:
                os.fsync(fd)
            except OSError as error:
                self._lost = error.errno or errno.EIO
                raise
            finally:
                os.close(fd)
            self.changed.pop()


def open_own(name: str, root: int) -> int:
    """Open a file that engines share, made if need be; nothing else that has its name."""
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | SAFE, 0o600, dir_fd=root)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _planted(name, "regular file")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _planted(path: str, kind: str) -> OSError:
    text = f"is no {kind}, maybe a symbolic link, which is never followed; remove it"
    return OSError(errno.ELOOP, text, path)


def _open_folder(path: str, root: int) -> int:
    return os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | SAFE, dir_fd=root)


def entries_of(path: str, root: int) -> Iterator[os.DirEntry[str]]:
    """What is in a folder; nothing if that is gone."""
    with contextlib.suppress(FileNotFoundError):
        fd = _open_folder(path, root)
        try:
            with os.scandir(fd) as entries:
                yield from entries
        finally:
            os.close(fd)


def subfolders(path: str, root: int) -> Iterator[str]:
    """Names of the folders in a folder."""
    return (entry.name for entry in entries_of(path, root) if entry.is_dir(follow_symlinks=False))


def files_in(path: str, root: int) -> Iterator[tuple[str, os.stat_result]]:
    """The regular files in a folder, but for those that go meanwhile."""
    for entry in entries_of(path, root):
        try:
            found = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        if stat.S_ISREG(found.st_mode):
            yield entry.name, found


def status(path: str, root: int) -> os.stat_result | None:
    """What has this name, a link itself if it is one; None if nothing has."""
    try:
        return os.stat(path, dir_fd=root, follow_symlinks=False)
    except FileNotFoundError:
        return None


def touch(fd: int, found: os.stat_result | None = None) -> None:
    """Mark a file as used now; given its status, only if the mark is more than a minute off."""
    now = time.time_ns()
    if found is None:
        os.utime(fd, ns=(now, now))
    elif abs(now - found.st_mtime_ns) > _TOUCH_S * 1e9:  # ahead, too: that clock was put right
        with contextlib.suppress(OSError):  # another user's, or a read-only file system
            os.utime(fd, ns=(now, now))


def allocate(fd: int, nbytes: int) -> None:
    """Set a file's length, with its blocks on disk if the file system can do that.

    Not by posix_fallocate: where the file system can't, that writes a byte into every block, which
    takes long, and is refused through a descriptor with O_DIRECT.
    """
    number = errno.EINTR  # by a signal, which large files give more time to come
    while number == errno.EINTR:
        if _libc.fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(nbytes)) == 0:
            return
        number = ctypes.get_errno()
    if number not in _UNABLE:
        raise OSError(number, os.strerror(number))
    os.ftruncate(fd, nbytes)
