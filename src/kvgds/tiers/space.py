"""A slab directory's space: the names of slab files, how they are cut, and the calls on them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import sys
from typing import TYPE_CHECKING

from kvgds.blocks import PAGE, image_bytes
from kvgds.errors import ConfigError
from kvgds.tiers.folders import allocate

if TYPE_CHECKING:
    from collections.abc import Iterable
    from concurrent.futures import Future
    from pathlib import Path

SLOT_BITS = 32  # a slot's number: the slab's id, then its place in the slab
SLOT_MASK = (1 << SLOT_BITS) - 1
# Where what is overwritten is put beside what it replaces, and a full disk has no room for that.
COPIES_ON_WRITE = frozenset(("bcachefs", "btrfs"))
_GET_FLAGS, _SET_FLAGS, _NOCOW = 0x80086601, 0x40086602, 0x00800000  # of Linux's <linux/fs.h>
RESERVE = 8 << 20  # bytes of the disk that slabs leave to the index: rows and SQLite's log
SLAB_NAME = re.compile(r"slab-(\d{8})-(\d+)\.kv")


def slot_bytes_for(nbytes: int) -> int:
    """Size of the slots that blocks of ``nbytes`` go to: their image, at most 1/64 more.

    Steps of a 64th of the next lower power of two bound the number of classes.
    """
    image = image_bytes(nbytes)
    step = max(PAGE, 1 << max(image.bit_length() - 7, 0))
    return -(-image // step) * step


def overwrite_in_place(folder: int) -> None:
    """Let files made in a directory from now on keep their places, as btrfs can. Blocks."""
    with contextlib.suppress(OSError):  # others refuse it, for theirs keep them anyway
        flags = int.from_bytes(fcntl.ioctl(folder, _GET_FLAGS, bytes(8)), sys.byteorder)
        fcntl.ioctl(folder, _SET_FLAGS, (flags | _NOCOW).to_bytes(8, sys.byteorder))


def slab_name(slab_id: int, slot_bytes: int) -> str:
    """File name of a slab; tells its geometry, so that stamps alone can rebuild an index."""
    return f"slab-{slab_id:08d}-{slot_bytes}.kv"


def slabs_in(root: Path) -> dict[int, str]:
    """The slab files that lie there: id to name."""
    with os.scandir(root) as entries:
        matches = (SLAB_NAME.fullmatch(entry.name) for entry in entries if entry.is_file())
        return {int(match[1]): match[0] for match in matches if match}


def later_slabs(root: Path, there: dict[int, str], known: Iterable[int]) -> list[int]:
    """Of the slabs that lie there, and have slots, those later than all that an index knows.

    A death leaves one at most. Of more the index is older.
    """
    last = max(known, default=-1)
    return [number for number in there if number > last and slots_in(root / there[number])]


def slots_in(path: Path) -> int:
    """How many whole slots a file has that is named like a slab; 0 if it can be none."""
    match, status = SLAB_NAME.fullmatch(path.name), os.lstat(path)
    slot_bytes = int(match[2]) if match else 0
    if slot_bytes == 0 or slot_bytes % PAGE or not stat.S_ISREG(status.st_mode):
        return 0
    return min(status.st_size // slot_bytes, 1 << SLOT_BITS)


def room_on_disk(where: Path | int) -> int:
    """Bytes that are free there; a path or a descriptor."""
    disk = os.statvfs(where)
    return disk.f_bavail * disk.f_frsize


def make_slab(
    folder: int, name: str, slot_bytes: int, slots: int, *, reserve: int, direct: bool, sync: bool
) -> tuple[int, int]:
    """Make and allocate a slab file, if asked so that it outlives loss of power. Blocks.

    In the directory that a descriptor stands for: its path may be another's meanwhile.

    Returns:
        Its descriptor, and its slots: fewer where the disk has not room for all.

    Raises:
        OSError: among others, if one slot would leave less than ``reserve`` bytes of the disk.
    """
    slots = min(slots, (room_on_disk(folder) - reserve) // slot_bytes)
    if slots < 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags | (os.O_DIRECT if direct else 0), 0o600, dir_fd=folder)
    try:
        allocate(fd, slots * slot_bytes)
        if sync:
            os.fsync(fd)
            os.fsync(folder)
    except BaseException:
        os.close(fd)
        os.unlink(name, dir_fd=folder)
        raise
    return fd, slots


def open_slab(path: Path, nbytes: int, *, direct: bool) -> tuple[int, int]:
    """Open a slab file, made whole again if it was cut or lost; how many bytes it had. Blocks."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | (os.O_DIRECT if direct else 0), 0o600)
        try:
            had = os.fstat(fd).st_size
            if had < nbytes:
                allocate(fd, nbytes)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise ConfigError("root", str(path), f"a slab can't be opened: {error}") from None
    return fd, min(had, nbytes)


def remove_slab(folder: int, name: str, fd: int, detached: Future[None] | None = None) -> None:
    """Delete a slab file once NIXL, if it knows it, has forgotten its descriptor. Blocks."""
    if detached is not None:
        detached.result()
    os.close(fd)
    with contextlib.suppress(FileNotFoundError):  # somebody else did
        os.unlink(name, dir_fd=folder)
