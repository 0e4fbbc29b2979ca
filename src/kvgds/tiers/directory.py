"""A tier's directory: made, marked with its layout, taken for one engine alone.

Anything may lie where a file of ours should: links are not followed, and nothing is read that is
no regular file, because to open or read a pipe would wait for ever. Everything blocks.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import stat
from typing import TYPE_CHECKING

from kvgds.errors import BusyError, ConfigError
from kvgds.paths import NO_ROOM, filesystem_of
from kvgds.tiers import locks

if TYPE_CHECKING:
    from pathlib import Path

MARKERS = {layout: {"format": 1, "layout": layout} for layout in ("slabs", "files")}
"""What kvgds.json says, by layout."""

# Where flock on a directory excludes all who could use it. Network file systems keep such a lock to
# the one host, so there, and where that is not known, it is the lock file that is locked.
_LOCAL = frozenset(
    ("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs")
)


def prepare_root(root: Path, layout: str) -> None:
    """Make the directory if need be, and make sure that it holds this layout. Blocks.

    Raises:
        ConfigError: it can't be made or written, is no directory, or has another layout.
    """
    marker = root / "kvgds.json"
    try:
        with contextlib.suppress(FileExistsError):
            root.mkdir(mode=0o700)
        if not root.is_dir():
            raise ConfigError("root", str(root), "is not a directory; name one or remove it")
        try:
            found = read_marker(root)
        except FileNotFoundError:
            _mark(marker, layout)
            found = read_marker(root)
    except FileNotFoundError:
        raise ConfigError("root", str(root), f"make its parent {root.parent} first") from None
    except OSError as error:
        raise ConfigError("root", str(root), f"can't be used: {error}") from None
    if found != MARKERS[layout]:
        rule = f"holds {found}, not layout={layout!r}; use another directory"
        raise ConfigError("root", str(root), rule)
    if layout == "slabs":
        check_index(root)


def read_marker(root: Path) -> object:
    """What kvgds.json says.

    Raises:
        ConfigError: it is no regular file, or says nothing that can be understood.
    """
    path = root / "kvgds.json"
    with open(_open_regular(path, os.O_RDONLY), encoding="utf-8") as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            layouts = " or ".join(json.dumps(marker) for marker in MARKERS.values())
            rule = f"can't be read: {error}; write {layouts} there, whichever lies beside it"
            raise ConfigError("root", str(path), rule) from None


def check_index(root: Path) -> None:
    """Make sure that what SQLite is going to open are regular files, if they are there.

    Raises:
        ConfigError: one is something else.
    """
    for name in ("index.db", "index.db-wal", "index.db-shm"):
        with contextlib.suppress(FileNotFoundError):
            _check_regular(os.lstat(root / name), root / name)


def _open_regular(path: Path, flags: int) -> int:
    """Open a file of ours, without waiting for whatever it may be instead."""
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    try:
        _check_regular(os.fstat(fd), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_regular(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        rule = f"can't be opened: {path.name} is no regular file (a link, a pipe?); remove it"
        raise ConfigError("root", str(path), rule)


def _mark(marker: Path, layout: str) -> None:
    """Make the marker, whole or not at all, unless somebody else just has."""
    temporary = marker.with_name(f".kvgds.json-{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            json.dump(MARKERS[layout], file)
            file.flush()
            os.fsync(fd)
        _publish(temporary, marker)
        sync_folder(marker.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def sync_folder(folder: Path) -> None:
    """Let names that were made or changed there outlive loss of power. Blocks."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _publish(temporary: Path, marker: Path) -> None:
    try:
        os.link(temporary, marker)
    except FileExistsError:
        return
    except OSError:  # no hard links here
        os.rename(temporary, marker)


def lock_root(root: Path) -> int:
    """Take the directory for this engine alone; the descriptor to give to `locks.close`.

    Where that is enough it is the directory itself that is locked: a lock file that somebody
    removes would be made anew by the next engine, and be free.

    Raises:
        BusyError: another engine has it.
        ConfigError: it can't be written.
    """
    ours = False
    try:
        fd = _open_lock(root, os.O_RDWR | os.O_CREAT)
        try:
            locks.lock_nowait(fd, fcntl.LOCK_EX)
            _sign(root / "lock")
        except BaseException:
            ours = locks.is_ours(fd)
            locks.close(fd)
            raise
    except BlockingIOError:
        which = ", this one: an engine is open, or its event loop ended before it was closed"
        raise BusyError(
            f"{root} is in use by process {_signed(root / 'lock')}{which if ours else ''}; "
            "one engine a slab directory (layout='files' can be shared)"
        ) from None
    except OSError as error:
        raise ConfigError("root", str(root), f"can't be written: {error}") from None
    return fd


def owner_of(root: Path) -> str:
    """The process that has a slab directory, "unknown", or "" if none has.

    Shares the lock for a moment to find out.
    """
    try:
        fd = _open_lock(root, os.O_RDONLY)
    except FileNotFoundError:
        return ""
    try:
        locks.lock_nowait(fd, fcntl.LOCK_SH)
    except BlockingIOError:
        return _signed(root / "lock")
    finally:
        locks.close(fd)
    return ""


def _open_lock(root: Path, flags: int) -> int:
    if filesystem_of(root) in _LOCAL:
        return os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return _open_regular(root / "lock", flags)


def _sign(path: Path) -> None:
    """Leave word of who has the lock, if the disk has room for it."""
    fd = _open_regular(path, os.O_RDWR | os.O_CREAT)
    try:
        os.truncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
    finally:
        os.close(fd)


def _signed(path: Path) -> str:
    try:
        fd = _open_regular(path, os.O_RDONLY)
    except FileNotFoundError:
        return "unknown"
    try:
        return os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
    finally:
        os.close(fd)
