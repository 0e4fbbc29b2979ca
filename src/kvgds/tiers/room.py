"""What is kept and what goes, when several processes fill one directory of files.

Everything blocks and belongs to the executor, with the ledger held, but for what is said to
be the loop's.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import re
import time
from typing import TYPE_CHECKING

from kvgds.tiers.folders import files_in, subfolders
from kvgds.tiers.known import known_as
from kvgds.tiers.ledger import reserved_by

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvgds.tiers.debts import Debts
    from kvgds.tiers.ledger import Ledger, Owner

NAME = re.compile(r"[0-9a-f]{40}\.kv")
SPACE = re.compile(r"[0-9a-f]{32}")
_RECENT = 1 << 16  # how many uses that are not on disk are remembered
_LAST = 1 << 63  # nanoseconds, later than any use: what the next tier lacks goes last
_AHEAD_S = 3600.0  # hosts that share a directory have clocks that differ less
_LOW = 0.95  # of the capacity: evict down to this, so as not to count for every store


def blocks_in(space: str, root: int) -> Iterator[tuple[str, os.stat_result]]:
    """The files of a namespace's blocks, in no order: path and status."""
    for fan in subfolders(space, root):
        for name, found in files_in(f"{space}/{fan}", root):
            if NAME.fullmatch(name):
                yield f"{space}/{fan}/{name}", found


class Room:
    """Counts what is there, and evicts the least recently used of all namespaces.

    Attributes:
        pins: blocks being loaded, which are not evicted; kept by the loop's thread.
        reserved: bytes that unfinished stores of all processes held when last counted.
        evictions: blocks removed to make room.
        dropped: those of them that the next tier of a stack lacked.
    """

    def __init__(
        self,
        root: int,
        ledger: Ledger,
        owner: Owner,
        capacity_bytes: int,
        *,
        space: str,
        debts: Debts,
    ) -> None:
        self.pins: dict[str, int] = {}
        self.reserved = 0
        self.evictions = self.dropped = 0
        self._debts = debts
        self._root = root
        self._ledger = ledger
        self._owner = owner
        self._capacity = capacity_bytes
        self._space = space
        self._recent: dict[str, int] = {}  # uses since a block's modification time; oldest first
        self._evicted: list[bytes] = []

    def note_use(self, place: str) -> None:
        """The loop's: remember a use that the file's modification time may not tell."""
        self._recent.pop(place, None)
        self._recent[place] = time.time_ns()
        if len(self._recent) > _RECENT:
            del self._recent[next(iter(self._recent))]

    def take_evicted(self) -> list[bytes]:
        """The loop's: blocks of this namespace that were evicted since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def make(self, need: int, forced: int) -> int:
        """Count anew; evict until ``need`` fits, and ``forced`` in any case. Bytes evicted."""
        capacity = self._capacity
        low = min(capacity - need, int(capacity * _LOW))
        goal = max(self._ledger.used, capacity) - low + forced
        owed = self._debts.places()
        for _ in range(2):
            total, oldest = self._count(goal, owed)
            target = min(total if total + need <= capacity else low, total - forced)
            if total - target <= goal:
                break
            goal = total - target  # the ledger was too low
        self._ledger.set(total)
        left = total
        for _, place, nbytes in sorted(oldest, reverse=True):
            if left <= target:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(place, dir_fd=self._root)
            if place in owed:
                self._debts.unmark(place)
                self.dropped += 1
            left -= nbytes
            space = place.partition("/")[0]
            self.evictions += space != "quarantine"
            if space == self._space:
                self._evicted.append(known_as(place))
        self._ledger.set(left)
        return total - left

    def _count(self, goal: int, owed: set[str]) -> tuple[int, list[tuple[int, str, int]]]:
        """Bytes taken; and of the files to evict first so many bytes: -recency, path, bytes."""
        total, unfinished, _ = self.sweep()
        self.reserved = total
        ahead = (self._ledger.now() + _AHEAD_S) * 1e9
        heap: list[tuple[int, str, int]] = []  # the newest on top
        held = 0
        for when, place, found in self._walk():
            if found.st_ino in unfinished:
                continue  # linked meanwhile, and counted already
            total += found.st_size
            if place in self.pins:
                continue
            last = max(when, self._recent.get(place, 0))
            if last > ahead:  # by a clock that was wrong: used before it was put right
                last -= _LAST
            last += place in owed and _LAST
            if held >= goal and (not heap or -last <= heap[0][0]):
                continue
            heapq.heappush(heap, (-last, place, found.st_size))
            held += found.st_size
            while heap and held - heap[0][2] >= goal:
                held -= heapq.heappop(heap)[2]
        return total, heap

    def _walk(self) -> Iterator[tuple[int, str, os.stat_result]]:
        """Every stored file: its recency, path and status. Quarantined ones are the oldest."""
        for name, found in files_in("quarantine", self._root):
            yield -_LAST, f"quarantine/{name}", found
        for space in filter(SPACE.fullmatch, subfolders("", self._root)):
            for place, found in blocks_in(space, self._root):
                yield found.st_mtime_ns, place, found

    def sweep(self) -> tuple[int, set[int], int]:
        """Remove what dead owners left.

        Bytes reserved by the living, inodes for which they are, bytes given up.
        """
        reserved, unfinished, freed = 0, set(), 0
        now = self._ledger.now()
        for name, found in files_in("tmp", self._root):
            nbytes = reserved_by(name)
            if self._owner.may_remove(name, now - found.st_mtime):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"tmp/{name}", dir_fd=self._root)
                freed += nbytes if found.st_nlink == 1 else 0
                continue
            reserved += nbytes
            unfinished.add(found.st_ino)
        return reserved, unfinished, freed
