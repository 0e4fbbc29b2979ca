"""Which blocks of a shared directory the next tier of a stack lacks: an empty file for each.

A marker is made before its block becomes visible, and removed after that has gone: so a death
leaves one too many, which is swept, and never one too few. That two processes store and remove one
block at the same moment may cost its marker; then it is evicted like one that the next tier has.

Everything blocks and belongs to the executor. A tier that stands alone makes no markers, and heeds
none.
"""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING

from kvgds.blocks import PAGE, Stamp, image_bytes
from kvgds.tiers.folders import SAFE, Folders, entries_of, status

if TYPE_CHECKING:
    from kvgds.blocks import BlockKey

_NAME = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{2})\.([0-9a-f]{40}\.kv)")
_STALE_S = 3600.0  # a store that takes longer from its marker to its block has died


def marker_of(place: str) -> str:
    """Path of the marker of the block that has this path."""
    return f"owed/{place.replace('/', '.')}"


def unmark(place: str, root: int) -> bool:
    """Remove a marker; whether there was one."""
    try:
        Folders(root).need("owed")
        os.unlink(marker_of(place), dir_fd=root)
    except FileNotFoundError:
        return False
    return True


class Debts:
    """The markers.

    Args:
        stacked: whether there is a next tier; else every method does nothing.
    """

    def __init__(self, root: int, *, stacked: bool) -> None:
        self._root = root
        self._stacked = stacked

    def mark(self, place: str, folders: Folders) -> None:
        """See to it that a block is marked before it is there."""
        if not self._stacked:
            return
        folders.need("owed", make=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | SAFE  # one that lies there is young again
        os.close(os.open(marker_of(place), flags, 0o600, dir_fd=self._root))
        folders.changed.add("owed")

    def unmark(self, place: str) -> bool:
        """A block is not owed any more; whether it was."""
        return self._stacked and unmark(place, self._root)

    def owes(self, place: str) -> bool:
        """Whether a block is marked."""
        return self._stacked and status(marker_of(place), self._root) is not None

    def places(self) -> set[str]:
        """Paths of the blocks that are marked, of all namespaces."""
        if not self._stacked:
            return set()
        names = (_NAME.fullmatch(entry.name) for entry in entries_of("owed", self._root))
        return {"/".join(name.groups()) for name in names if name}

    def blocks(self, space: str) -> list[tuple[BlockKey, int]]:
        """Keys and payload bytes of a namespace's marked blocks, least recently used first.

        Sweeps markers that have lost their block.
        """
        found = []
        for place in self.places():
            if not place.startswith(space):
                continue
            try:
                block = self._look(place)
            except FileNotFoundError:
                self._sweep(place)
                continue
            except OSError:  # nothing that a load would read
                continue
            if block is not None:
                found.append(block)
        return [block[1:] for block in sorted(found)]

    def _look(self, place: str) -> tuple[int, BlockKey, int] | None:
        """A block's last use, key and bytes."""
        fd, found = Folders(self._root).open(place, 0)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # only the stamp is read
            stamp = Stamp.decode(os.pread(fd, PAGE, 0))
        finally:
            os.close(fd)
        if stamp is None or found.st_size != image_bytes(stamp.nbytes):
            return None
        return found.st_mtime_ns, stamp.key, stamp.nbytes

    def _sweep(self, place: str) -> None:
        found = status(marker_of(place), self._root)
        if found is not None and time.time() - found.st_mtime > _STALE_S:
            unmark(place, self._root)
