"""Which blocks of a shared directory an engine has seen, so that it need not ask for each.

Others remove blocks and tell nobody. So whatever is added pays for a look at some of what was
seen before, folder by folder, round and round: what is remembered stays in proportion to what is
there, and no one look takes long. Belongs to the event loop's thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

    Look: TypeAlias = tuple[int, set[bytes]]  # a folder, and what is known of it
    Sight: TypeAlias = tuple[set[bytes], set[bytes]]  # what has gone from a folder, and has come

_FOLDERS = 256
_ROUND = (128, 0.25)  # names added while all are looked at again: so many, or a share of them
_FOLDER_COST = 8  # of looking into a folder, in names
_LEAST = 256  # names: looks worth a job
_MOST = 4096  # in one job, but for the last folder


def known_as(place: str) -> bytes:
    """The digest at the end of a block's path: smaller to remember."""
    return bytes.fromhex(place[-43:-3])


class Known:
    """Digests of blocks; a set that is looked through again as it grows."""

    __slots__ = ("_count", "_due", "_next", "_parts")

    def __init__(self) -> None:
        self._parts: tuple[set[bytes], ...] = tuple(set() for _ in range(_FOLDERS))
        self._count = 0
        self._due = 0.0  # names to be looked at again
        self._next = 0  # the folder whose turn it is

    def __len__(self) -> int:
        return self._count

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._parts[digest[0]]

    def add(self, digests: Iterable[bytes]) -> None:
        """These were seen just now."""
        for digest in digests:
            part = self._parts[digest[0]]
            if digest not in part:
                part.add(digest)
                self._count += 1
                least, share = _ROUND
                self._due += self._whole / max(least, self._count * share)

    def discard(self, digests: Iterable[bytes]) -> None:
        """These are not there."""
        for digest in digests:
            part = self._parts[digest[0]]
            if digest in part:
                part.remove(digest)
                self._count -= 1

    @property
    def _whole(self) -> int:
        """What it costs to look at all, in names."""
        return self._count + _FOLDERS * _FOLDER_COST

    @property
    def due(self) -> bool:
        """Whether there is something to look at again."""
        return self._due >= _LEAST

    def take_due(self) -> list[Look]:
        """Folders to be looked into now, if it is time, and what is known of them."""
        self._due = min(self._due, self._whole)
        looks: list[Look] = []
        names = 0
        while self._due >= (_FOLDER_COST if looks else _LEAST) and names < _MOST:
            part = self._parts[self._next]
            looks.append((self._next, part.copy()))
            names += _FOLDER_COST + len(part)
            self._due -= _FOLDER_COST + len(part)
            self._next = (self._next + 1) % _FOLDERS
        return looks

    def saw(self, sights: Iterable[Sight]) -> None:
        """Take in what those who looked have found to have gone, and to have come."""
        due = self._due
        for gone, come in sights:
            self.discard(gone)
            self.add(come)
        self._due = due  # what a look has brought pays for no other
