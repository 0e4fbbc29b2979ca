"""What is kept and what goes, when several processes fill one directory of files.

To find what was not used for longest takes a look at every file. So that no store waits for that,
each looks at some of them in good time, and a search that is over leaves a list, which goes as room
is needed, but for what has been used meanwhile. Only where there is no list are all files looked at
at once; where they are few, always: then they are counted anew as well.

Everything blocks and belongs to the executor, with the ledger held, but for what is said to
be the loop's.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import re
import time
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from kvgds.tiers.folders import files_in, status, subfolders
from kvgds.tiers.known import known_as
from kvgds.tiers.ledger import reserved_by
from kvgds.tiers.maps import KeyQueue

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from kvgds.tiers.debts import Debts
    from kvgds.tiers.ledger import Ledger, Owner

NAME = re.compile(r"[0-9a-f]{40}\.kv")
SPACE = re.compile(r"[0-9a-f]{32}")
_RECENT = 1 << 16  # how many uses that are not on disk are remembered
_LAST = 1 << 63  # nanoseconds, later than any use: what the next tier lacks goes last
_KEPT = ".nfs"  # what was removed under NFS while somebody had it open: goes when that is closed
_AHEAD_S = 3600.0  # hosts that share a directory have clocks that differ less
_LOW = 0.95  # of the capacity: evict down to this, so as not to make room for every store,
_MORE = 32  # but at a time no more files than so many that need not go yet
_LISTED = 0.1  # of the capacity: what a search finds
_SOON = 0.9  # of the capacity: no search before so much is taken
_PACE = 16  # files that each job looks at for each of its stores; each store has two jobs
_HURRY = 256  # files at most, beside those, where others evict as well
_OWED_S = 1.0  # before it is looked again whether nothing may go that is to be spared
_COUNTS = 3  # at a time at most, where what is known of files is old
_FEW = 1024  # files, which are counted for each store that lacks room


def blocks_in(space: str, root: int) -> Iterator[tuple[str, os.stat_result]]:
    """The files of a namespace's blocks, in no order: path and status."""
    for fan in subfolders(space, root):
        for name, found in files_in(f"{space}/{fan}", root):
            if NAME.fullmatch(name):
                yield f"{space}/{fan}/{name}", found


class _File(NamedTuple):
    """One that may go. What goes first is the greatest."""

    newness: int
    place: str
    nbytes: int
    used: int  # when last, as far as that was known
    owed: bool  # the next tier lacked it


class _Search:
    """A look at all files for those that go first, in as many steps as is wanted.

    Args:
        goal: bytes of those to be found.
        ahead: a use later than this is of a clock that was wrong.
        unfinished: inodes of files that are no blocks yet; None: of those with two names.

    Attributes:
        files: how many there are, so far.
        total: their bytes.
    """

    def __init__(self, room: Room, goal: int, ahead: float, unfinished: set[int] | None) -> None:
        self.files = self.total = 0
        self._room = room
        self._goal = goal
        self._ahead = ahead
        self._unfinished = unfinished
        self._walk = room.walk()
        self._heap: list[_File] = []
        self._held = 0

    def look(self, files: int | None) -> bool:
        """Look at so many more, or at all; whether it has seen the last."""
        before = self.files
        for place, found in islice(self._walk, files):
            self.files += 1
            twice = self._unfinished is None and found.st_nlink > 1
            if twice or found.st_ino in (self._unfinished or ()):
                continue  # linked only just, and counted as reserved
            self.total += found.st_size
            if place not in self._room.pins:
                self._consider(place, found)
        return files is None or self.files - before < files

    def _consider(self, place: str, found: os.stat_result) -> None:
        last = used = self._room.last_use(place, found)
        if place.startswith("quarantine/"):
            last = -2 * _LAST
        elif used > self._ahead:
            last -= _LAST  # used before that clock was put right
        if not self._wants(last):
            return
        owed = self._room.debts.owes(place)
        last += owed and _LAST
        if self._wants(last):
            self._keep(_File(-last, place, found.st_size, used, owed))

    def _wants(self, last: int) -> bool:
        heap = self._heap
        return self._held < self._goal or (bool(heap) and -last > heap[0].newness)

    def _keep(self, file: _File) -> None:
        heap = self._heap
        heapq.heappush(heap, file)
        self._held += file.nbytes
        while self._held - heap[0].nbytes >= self._goal:
            self._held -= heapq.heappop(heap).nbytes

    def close(self) -> None:
        """Look no further."""
        self._walk.close()

    def found(self) -> list[_File]:
        """What goes first comes last."""
        return sorted(self._heap)


class Room:
    """Counts what is there, and evicts the least recently used of all namespaces.

    Attributes:
        pins: blocks being loaded, which are not evicted; kept by the loop's thread.
        debts: which blocks the next tier lacks.
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
        self.debts = debts
        self._root = root
        self._ledger = ledger
        self._owner = owner
        self._capacity = capacity_bytes
        self._space = space
        self._recent: KeyQueue[str, int] = KeyQueue()  # uses since a block's modification time
        self._evicted: list[bytes] = []
        self._list: list[_File] = []  # what goes first comes last
        self._listed = 0  # bytes of those
        self._files = _FEW  # that there were when last counted, nearly full; or maybe as many
        self._search: _Search | None = None  # under way
        self._behind = 0  # files that it would have looked at, had we removed what others have
        self._owed_until = 0.0  # by time.monotonic: all that might go is owed
        self._doubted = False  # the list: the next tier may have taken other blocks since
        self._misled = False  # by what was known of a file
        self._total: int | None = None  # bytes seen by the one that has just ended

    def close(self) -> None:
        """Nothing more is stored."""
        if self._search is not None:
            self._search.close()

    def note_use(self, place: str) -> None:
        """The loop's: remember a use that the file's modification time may not tell."""
        self._recent.append(place, time.time_ns())
        self._recent.keep(_RECENT)

    def take_evicted(self) -> list[bytes]:
        """The loop's: blocks of this namespace that were evicted since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def last_use(self, place: str, found: os.stat_result) -> int:
        """When a block was last used, as far as this engine knows; nanoseconds."""
        return max(found.st_mtime_ns, self._recent.get(place) or 0)

    def make(self, need: int, forced: int, *, alone: bool = False, spare: bool = False) -> int:
        """Evict until ``need`` fits, and ``forced`` in any case. Bytes evicted.

        Counts anew if what is listed does not do, or in any case if nobody else has the directory
        (``alone``). To spare means that nothing goes which the next tier lacks, so that less may be
        evicted.
        """
        known = self._ledger.sound and not alone
        freed = self._evict(need, forced, spare=spare) if known else 0
        # What is left in a list was owed when it was made, and so was all else.
        spared = known and spare and (self._list or time.monotonic() < self._owed_until)
        if not spared and (not known or not self._fits(need) or freed < forced):
            for _ in range(_COUNTS):
                self._misled = False
                self._count(need, max(forced - freed, 0), alone=alone)
                freed += self._evict(need, forced - freed, spare=spare)
                if not self._misled or (self._fits(need) and freed >= forced):
                    break
            if spare and not self._fits(need):
                self._owed_until = time.monotonic() + _OWED_S
        if self._files < _FEW:
            self._relist([])
        return freed

    def goes_first(self, place: str, found: os.stat_result) -> None:
        """A file has been quarantined just now: list it, for the next search may be far."""
        if found.st_nlink == 1:  # else it was linked only just, and is counted as reserved
            used = self.last_use(place, found)
            self._list.append(_File(2 * _LAST, place, found.st_size, used, owed=False))
            self._listed += found.st_size

    def _fits(self, need: int) -> bool:
        return self._ledger.used + need <= self._capacity

    def _low(self, need: int) -> int:
        return min(self._capacity - need, int(self._capacity * _LOW))

    def _count(self, need: int, forced: int, *, alone: bool) -> None:
        """Look at every file; the ledger may have been too low to know how many are to go."""
        for _ in range(2):
            surplus = max(self._ledger.used, self._capacity) - self._low(need) + forced
            goal = max(surplus, int(self._capacity * _LISTED))
            self.reserved, unfinished, _ = self.sweep(alone=alone)
            search = self._new_search(goal, unfinished)
            search.look(None)
            self._ledger.set(self.reserved + search.total)
            if self._ledger.used - self._low(need) + forced <= goal:
                break
        self._end_search(search)

    def _evict(self, need: int, forced: int, *, spare: bool) -> int:
        """Evict what is listed until ``need`` fits, and then some that the next tier has."""
        capacity, used, freed = self._capacity, self._ledger.used, 0
        more = 0 if self._fits(need) or self._ledger.stuck else _MORE  # that is soon forgotten
        try:
            while self._list:
                fits = used - freed + need <= capacity and freed >= forced
                if (fits or spare) and self._is_owed(self._list[-1]):
                    self._doubted |= not fits
                    break
                if fits:
                    if used - freed <= self._low(need) or not more:
                        break
                    more -= 1
                freed += self._remove(self._take())
        finally:
            self._ledger.add(-freed)
        return freed

    def _is_owed(self, file: _File) -> bool:
        """Whether the next tier still lacks it."""
        return file.owed and self.debts.owes(file.place)

    def _remove(self, file: _File) -> int:
        """Remove a file, unless it has been used since it was listed. Bytes that are free so."""
        place = file.place
        found = status(place, self._root)
        if found is None or place in self.pins or self.last_use(place, found) != file.used:
            return 0
        freed, space = found.st_size, place.partition("/")[0]
        try:
            os.unlink(place, dir_fd=self._root)
            self.evictions += space != "quarantine"
        except FileNotFoundError:
            # What is known of it was old: another host has removed it, and has counted that. Or the
            # network has asked twice; then the count stays too high, which is safe.
            freed, self._misled = 0, True
        if file.owed:
            self.dropped += self.debts.unmark(place)
        if space == self._space:
            self._evicted.append(known_as(place))
        return freed

    # --- searching --------------------------------------------------------------------

    def foresee(self) -> None:
        """Begin to look for what goes next, if that will soon be asked for."""
        if self._total is not None:
            self._check(self._total)
        self._forget_gone()
        soon = self._ledger.used > self._capacity * _SOON
        if not soon:
            self._files = _FEW  # however few there were: there may be many once it is full
        short = self._listed < self._capacity * _LISTED / 2 or self._doubted
        if soon and short and self._files >= _FEW and self._search is None:
            self._search = self._new_search(int(self._capacity * _LISTED), None)
            self._behind = 0
            self._doubted = False

    def _forget_gone(self) -> None:
        """Others evict what goes first as well: the list lasts no longer than all of them take."""
        with contextlib.suppress(OSError):  # whoever is to remove it will be told
            while self._list and status(self._list[-1].place, self._root) is None:
                self._take()
                self._behind += 2 * _PACE

    def _check(self, total: int) -> None:
        """Whether what a search has found may be relied upon. All has been counted anew if not."""
        self._total = None
        self.reserved, _, given_up = self.sweep()
        self._ledger.add(-given_up)
        missing = self._ledger.used - self.reserved - total
        if self._files < _FEW or missing > self._capacity * _LISTED:
            self._relist([])

    def look_ahead(self, stores: int) -> None:
        """Go on with that, for a job of so many stores. The ledger need not be held."""
        search = self._search
        hurry = min(self._behind, stores * _HURRY)
        self._behind -= hurry
        if search is not None and search.look(stores * _PACE + hurry):
            self._end_search(search)
            self._total = search.total

    def _new_search(self, goal: int, unfinished: set[int] | None) -> _Search:
        ahead = (self._ledger.now() + _AHEAD_S) * 1e9
        return _Search(self, goal, ahead, unfinished)

    def _end_search(self, search: _Search) -> None:
        self._search = self._total = None
        self._files = search.files
        self._relist(search.found())

    def _relist(self, files: list[_File]) -> None:
        self._list = files
        self._listed = sum(file.nbytes for file in files)

    def _take(self) -> _File:
        """What goes first of those listed."""
        file = self._list.pop()
        self._listed -= file.nbytes
        return file

    def walk(self) -> Generator[tuple[str, os.stat_result], None, None]:
        """Every stored file: its path and status."""
        for name, found in files_in("quarantine", self._root):
            if not name.startswith(_KEPT):
                yield f"quarantine/{name}", found
        for space in filter(SPACE.fullmatch, subfolders("", self._root)):
            yield from blocks_in(space, self._root)

    def sweep(self, *, alone: bool = False) -> tuple[int, set[int], int]:
        """Remove what dead owners left; no other owner of anything lives (``alone``).

        Bytes reserved by the living, inodes for which they are, bytes given up.
        """
        reserved, unfinished, freed = 0, set(), 0
        now = self._ledger.now()
        for name, found in files_in("tmp", self._root):
            if name.startswith(_KEPT):
                continue
            nbytes = reserved_by(name)
            if (alone and nbytes) or self._owner.may_remove(name, now - found.st_mtime):
                with contextlib.suppress(FileNotFoundError):  # by another, who has counted it
                    os.unlink(f"tmp/{name}", dir_fd=self._root)
                    freed += nbytes if found.st_nlink == 1 else 0
                continue
            reserved += nbytes
            unfinished.add(found.st_ino)
        return reserved, unfinished, freed
