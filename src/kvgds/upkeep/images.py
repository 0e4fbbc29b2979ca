"""Reading stored images and telling whether they are what they should be.

Reads are plain ``preadv``, past the page cache where that works, because they are to find
out what the disk says; they are not the data path.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import fcntl
import os
from typing import TYPE_CHECKING, NamedTuple

from kvgds.blocks import NO_CHECKSUM, PAGE, XXH3_128, Stamp, image_bytes
from kvgds.blocks import place_of as path_of
from kvgds.errors import ConfigError
from kvgds.memory import Arena
from kvgds.paths import checksum_of
from kvgds.tiers.space import SLOT_BITS, SLOT_MASK

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

WINDOW = 4 << 20
"""Bytes of one read, where slots are smaller."""
MISMATCH = "the payload does not match its checksum"


class Slab(NamedTuple):
    """A slab as the index has it, or its file's name."""

    id: int
    slot_bytes: int
    slots: int
    path: Path

    @property
    def whole(self) -> int:
        """How many slots the file really has."""
        with contextlib.suppress(FileNotFoundError):
            return min(os.lstat(self.path).st_size // self.slot_bytes, self.slots)
        return 0


class Row(NamedTuple):
    """One row of a slab index, with the namespace's digest; key is None in quarantine."""

    slot: int
    namespace: bytes | None
    key: bytes | None
    generation: int
    nbytes: int
    algorithm: int


def place_of(slot: int) -> str:
    """Where a slot is, as errors of the engine name it."""
    return f"slab {slot >> SLOT_BITS} slot {slot & SLOT_MASK}"


def open_image(path: Path) -> int:
    """Open for reading, with O_DIRECT if the file system takes it."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags)


def read_fully(fd: int, into: memoryview, offset: int) -> int:
    """Read until ``into`` is full or the file ends; how many bytes. Without O_DIRECT if need be."""
    done = 0
    while done < len(into):
        try:
            got = os.preadv(fd, [into[done:]], offset + done)
        except OSError as error:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            continue
        if not got:
            break
        done += got
    return done


def arena_for(slabs: Iterable[Slab]) -> Arena:
    """Memory for a slot of any of them that has one, whatever the index says of the others."""
    nbytes = max((WINDOW, *(slab.slot_bytes for slab in slabs if slab.whole)))
    try:
        return Arena(nbytes)
    except (OSError, OverflowError) as error:
        rule = f"that much memory for one of its blocks can't be had: {error}"
        raise ConfigError("slot_bytes", nbytes, rule) from None


def images(
    slab: Slab, places: Sequence[int], arena: Arena
) -> Iterator[tuple[int, memoryview | OSError]]:
    """The slots at ``places``, ascending: their bytes, or why they can't be read.

    The bytes are good until the next are asked for. The arena holds at least one slot.
    """
    most = max(len(arena.bytes) // slab.slot_bytes, 1)
    fd = open_image(slab.path)
    try:
        start = 0
        while start < len(places):
            stop = bisect.bisect_left(places, places[start] + most, start)
            yield from _window(fd, slab.slot_bytes, places[start:stop], arena)
            start = stop
    finally:
        os.close(fd)


def _window(
    fd: int, slot_bytes: int, places: Sequence[int], arena: Arena
) -> Iterator[tuple[int, memoryview | OSError]]:
    first = places[0]
    window = arena.bytes[: (places[-1] + 1 - first) * slot_bytes]
    try:
        whole = read_fully(fd, window, first * slot_bytes) == len(window)
    except OSError as error:
        if len(places) == 1:
            yield first, error
            return
        whole = False
    if whole:
        for place in places:
            start = (place - first) * slot_bytes
            yield place, window[start : start + slot_bytes]
    elif len(places) == 1:
        yield first, OSError(errno.EIO, "the file ends within it")
    else:  # one of them can't be read: find out which
        for place in places:
            yield from _window(fd, slot_bytes, [place], arena)


def row_fault(row: Row, image: memoryview | OSError) -> str | None:
    """What is wrong with an indexed block, or None."""
    if isinstance(image, OSError):
        return f"it can't be read: {image.strerror}"
    if image_bytes(row.nbytes) > len(image):
        return f"the index says {row.nbytes:,} bytes, more than its place has"
    stamp = Stamp.decode(image[:PAGE])
    if stamp is None:
        return "there is no whole stamp"
    if (stamp.namespace, stamp.key) != (row.namespace, row.key):
        return f"the stamp is of another block, {stamp.key.hex()[:32]}"
    found = (stamp.generation, stamp.nbytes, stamp.algorithm)
    if found != (row.generation, row.nbytes, row.algorithm):
        return "the stamp is of another generation"
    return payload_fault(stamp, image)


def stamp_fault(stamp: Stamp, path: str, size: int, what: str) -> str | None:
    """What is wrong with the stamp of a file or object (``what``) of so many bytes, or None."""
    if path_of(stamp.namespace.hex(), stamp.key) != path:
        return f"the stamp is of another block, {stamp.key.hex()[:32]}"
    if size != image_bytes(stamp.nbytes):
        return f"the {what} has {size:,} bytes, not {image_bytes(stamp.nbytes):,}"
    return _algorithm_fault(stamp)


def _algorithm_fault(stamp: Stamp) -> str | None:
    if stamp.algorithm in (NO_CHECKSUM, XXH3_128):
        return None
    return f"checksum algorithm {stamp.algorithm} is not known; use a newer kvgds"


def payload_fault(stamp: Stamp, image: memoryview) -> str | None:
    """What is wrong with the payload behind a stamp, or None."""
    if stamp.algorithm != XXH3_128:
        return _algorithm_fault(stamp)
    wrong = checksum_of([image[PAGE : PAGE + stamp.nbytes]]) != stamp.checksum
    return MISMATCH if wrong else None
