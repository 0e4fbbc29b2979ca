"""Slots for stores: handed out, and got by evicting, by making slabs and by giving them up.

Owns who waits for a slot, and what is done about it. One slab at a time is made or given up. A slot
whose block goes is free once its removal is committed; what the index can't take is as it was
before. A store ends refused only when nothing under way can give it a slot any more.

In a stack, blocks that the next tier lacks are spared: stores wait until it has them, or doesn't
answer. Promotions never wait for that, and no such block goes for them.

Belongs to the event loop's thread; files are made and removed in the executor.
"""

from __future__ import annotations

import errno
import sqlite3
import time
from collections import deque
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

from kvgds.errors import StorageFull, TransferError
from kvgds.paths import NO_ROOM
from kvgds.tiers.index import Changes
from kvgds.tiers.slots import Slab
from kvgds.tiers.space import RESERVE, SLOT_BITS, make_slab, remove_slab, slab_name, slot_bytes_for
from kvgds.transport import File

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from kvgds.config import FileTier
    from kvgds.paths import Move
    from kvgds.tiers import Services
    from kvgds.tiers.index import Index
    from kvgds.tiers.slots import Forgotten, SizeClass, Slots

_SLAB_MOST = 4 << 30  # bytes; one takes a while to allocate
_UNMADE = "can't make a slab"
_FULL = (*NO_ROOM, errno.EFBIG)
_SLABS = 64  # a slab is about this part of the capacity
_EVICT = 64  # most blocks that one commit evicts ahead of need
_FULL_S = 1.0  # after which a disk that was full is tried again: others may have freed some of it
_SLOTS_A_TURN = 256  # of a slab that is given up: 1 ms of the loop at most


class Supply:
    """Gives stores their slots.

    Args:
        send: is given the moves that have a slot, and writes them.
        folder: a descriptor of the directory.
        direct: whether slab files are opened with O_DIRECT.
    """

    def __init__(
        self,
        settings: FileTier,
        services: Services,
        index: Index,
        slots: Slots,
        send: Callable[[list[Move]], None],
        *,
        folder: int,
        direct: bool,
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._services = services
        self._index = index
        self._slots = slots
        self._send = send
        self._direct = direct
        self._next_slab = max(slots.slabs, default=-1) + 1
        self._slab_on_its_way = False  # or on its way out
        self._leaving: Slab | None = None  # has no blocks any more, and waits for who uses it
        self._heir: SizeClass | None = None  # for whom a slab is on its way out
        self._full_until = 0.0  # by time.monotonic: the disk takes no slab
        self._dropping = 0

    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not (self._dropping or self._slab_on_its_way)

    # --- stores -----------------------------------------------------------------------

    def ask(self, moves: Sequence[Move]) -> None:
        """Give each store a slot and send it, now or when there is one; or refuse it."""
        refused = []
        for move in moves:
            slot_bytes = slot_bytes_for(move.nbytes)
            if slot_bytes > self._settings.capacity_bytes:
                move.error = self._too_big(slot_bytes)
                refused.append(move)
            else:
                self._slots.size_class(slot_bytes).waiting.append(move)
        if refused:
            self._services.settle(refused)
        self.serve()
        self.stock()

    def serve(self) -> None:
        """Give slots to waiting stores, or see to it that there will be some."""
        self._leave()
        sizes = tuple(self._slots.sizes.values())  # who is refused may let others in, of more sizes
        going = []
        for size in sizes:
            while size.waiting and size.free:
                move = size.waiting.popleft()
                self._slots.take(move, size)
                going.append(move)
        if going:
            self._send(going)
        waiting = [size for size in sizes if size.waiting]
        for size in sorted(waiting, key=lambda size: size is not self._heir):
            if size.waiting:
                self._make_room(size)

    def stock(self) -> None:
        """See to it that the next stores will find slots; after those that wait."""
        for size in tuple(self._slots.sizes.values()):
            if not size.waiting and _low(size):
                self._make_room(size)

    def expire(self) -> None:
        """End the waiting of abandoned stores."""
        for size in tuple(self._slots.sizes.values()):
            self._refuse(size, lambda move: move.timeout(), attrgetter("abandoned"))

    def _refuse(
        self,
        size: SizeClass,
        error_of: Callable[[Move], Exception],
        which: Callable[[Move], bool] = lambda _: True,
    ) -> None:
        """End the waiting of some stores, or of all, each with an error of its own."""
        gone = [move for move in size.waiting if which(move)]
        if gone:
            size.waiting = deque(move for move in size.waiting if not which(move))
            for move in gone:
                move.error = error_of(move)
            self._services.settle(gone)

    def _too_big(self, slot_bytes: int) -> StorageFull:
        capacity = self._settings.capacity_bytes
        return StorageFull(
            f"slabs:{self._settings.root}: no room for a block that takes {slot_bytes:,} bytes "
            f"with its stamp, and nothing to evict; raise capacity_bytes={capacity:,}"
        )

    # --- evicting ---------------------------------------------------------------------

    def _make_room(self, size: SizeClass) -> None:
        if self._slab_on_its_way and self._leaving is None:
            return  # it may be all that is needed
        heir = self._heir  # which may need what several slabs leave
        behind = heir is not None and heir is not size and bool(heir.waiting)
        if self._leaving is None and not behind and self._change_slabs(size):
            return
        slots = self._slots
        self._keep_owed(size)
        needed = len(size.waiting) - size.going
        evicted = self._evict(size, needed, _ahead(size))
        wait = evicted or size.pending or size.used or slots.orphans or self._leaving or behind
        if size.waiting and not wait and not self._steal(size):
            self._refuse(size, lambda _: self._too_big(size.slot_bytes))
        if heir is size and not self._slab_on_its_way:  # no more can be had for it now
            self._heir = None
        self._hasten(size)

    def _change_slabs(self, size: SizeClass) -> bool:
        """Make one for this class, or give one up that is less wanted; whether that is begun."""
        room = self._settings.capacity_bytes - self._slots.slab_bytes
        full = time.monotonic() < self._full_until
        if room >= size.slot_bytes and not (full and size.used):
            self._grow(size, room)
            return True
        if full and not size.waiting:  # room that one slab leaves may be gone before the next
            return False
        slots, spare = self._slots, self._spares(size)
        lost = slots.lost_slab(spare=spare) if size.waiting else None
        slab = lost or slots.older_slab(size, spare=spare)
        if slab is None:
            return False
        self._give_up(slab, size)
        return True

    def _spares(self, size: SizeClass) -> bool:
        """Whether blocks that the next tier lacks stay: until it has them, or for promotions."""
        backlog = self._services.backlog
        return backlog is not None and (not backlog.out or _promotes(size))

    def _hasten(self, size: SizeClass) -> None:
        """Have the next tier take what is to be evicted next, for those who wait and some more."""
        backlog = self._services.backlog
        if backlog is None or backlog.out:
            return
        wanted = min(len(size.waiting) - size.going, _EVICT) + max(_ahead(size), 1)
        keys = self._slots.owed(size, max(wanted - len(size.clean), 0))
        if size.waiting and (slab := self._slots.owing_slab(size)):
            keys += slab.owing(_EVICT)
        if keys:
            backlog.hasten(keys)
            if not size.pending:
                self._turn_away(size)

    def _keep_owed(self, size: SizeClass) -> None:
        """Turn promotions away before blocks go for them that only this tier has.

        While the next tier is out stores don't wait for it. It has what a promotion brings.
        """
        backlog, slots = self._services.backlog, self._slots
        needed = len(size.waiting) - size.going
        if backlog is None or not backlog.out or needed <= 0:
            return
        if len(slots.victims(size, needed, 0)) == needed:
            return
        if size.used or slots.least_wanted_slab(size, spare=True) is None:
            self._turn_away(size)

    def _turn_away(self, size: SizeClass) -> None:
        """Promotions don't wait for the next tier: it may lack what they keep meanwhile."""
        text = f"{self._settings.root}: no room yet for a promotion"
        self._refuse(size, lambda _: StorageFull(text), attrgetter("mirrored"))

    def _evict(self, size: SizeClass, needed: int, ahead: int = 0) -> int:
        """Drop the least recently used blocks that nobody is loading; how many."""
        forced = 0 if self._spares(size) else needed
        victims = self._slots.victims(size, max(needed, ahead), forced)
        gone = [self._slots.forget(slot) for slot in victims]
        self._slots.count_evicted(gone)
        self.drop(gone, partial(self._evicted, size, gone))
        return len(gone)

    def _evicted(self, size: SizeClass, gone: list[Forgotten], error: Exception | None) -> None:
        if error is not None:  # they are back, and would be tried again for ever
            self._slots.count_evicted(gone, -1)
            self._refuse(size, lambda _: commit_error(self._settings.root, error))

    def drop(
        self, gone: list[Forgotten], done: Callable[[Exception | None], None] | None = None
    ) -> None:
        """Commit the removal of forgotten blocks, then free their slots.

        And of unwanted ones that could not be removed: what has replaced them may be among these.
        """
        if not gone:
            return
        slots, unwanted = [block.slot for block in gone], list(self._slots.unwanted)
        for slot in slots:
            self._count_going(slot, 1)
        self._dropping += len(slots)
        ended = partial(self._dropped, gone, unwanted, done)
        self._index.commit(Changes(drop=unwanted + slots), ended)

    def _dropped(
        self,
        gone: list[Forgotten],
        unwanted: list[int],
        done: Callable[[Exception | None], None] | None,
        error: Exception | None,
    ) -> None:
        self._dropping -= len(gone)
        if error is None:
            for slot in self._slots.unwanted.intersection(unwanted):
                self._slots.free(self._slots.forget(slot).slot)
        for block in reversed(gone):
            self._count_going(block.slot, -1)
            if error is None or not self._slots.slabs[block.slot >> SLOT_BITS].indexed:
                self._slots.free(block.slot)
            else:
                self._slots.remember(block)
        if done is not None:
            done(error)
        self.serve()

    def _count_going(self, slot: int, step: int) -> None:
        self._slots.slabs[slot >> SLOT_BITS].size.going += step
        self._slots.pend(slot, step)

    # --- giving up a slab ---------------------------------------------------------------

    def _steal(self, size: SizeClass) -> bool:
        """Give up another class's slab for this one. False: none can be had, ever."""
        spare = self._spares(size)
        slab = self._slots.least_wanted_slab(size, spare=spare)
        if slab is None:
            slabs = self._slots.slabs.values()
            busy = any(slab.busy or (spare and slab.owed) for slab in slabs)
            return busy or bool(self._slots.holds)
        self._give_up(slab, size)
        return True

    def _give_up(self, slab: Slab, size: SizeClass) -> None:
        """The index forgets it first, while all in it still loads: no block may outlive its row.

        Else one that was replaced, or deleted, between would be back after a crash.
        """
        self._slab_on_its_way = True
        self._heir = size
        self._slots.shut_slab(slab)
        self._index.commit(Changes(drop_slab=[slab.id]), partial(self._unindexed, slab))

    def _unindexed(self, slab: Slab, error: Exception | None) -> None:
        if error is not None:
            self._slots.open_slab(slab)
            self._not_grown(error)
            return
        slab.indexed = False
        self._empty(slab, slab.places())

    def _empty(self, slab: Slab, places: range) -> None:
        """Some of its slots in each turn of the loop, for there may be a million."""
        self._slots.empty_slab(slab, places[:_SLOTS_A_TURN])
        if len(places) > _SLOTS_A_TURN:
            self._services.post(self._empty, slab, places[_SLOTS_A_TURN:])
            return
        self._leaving = slab
        self.serve()

    def _leave(self) -> None:
        """Go on with the slab that has no blocks any more, once no load and no delete uses it."""
        slab = self._leaving
        if slab is None or not self._slots.is_idle(slab):
            return
        self._leaving = None
        self._slots.remove_slab(slab)
        detached = self._services.transport.detach(slab.file)
        self._services.run(self._remover(slab, detached), self._removed)

    def _remover(self, slab: Slab, detached: Future[None] | None = None) -> Callable[[], None]:
        return partial(remove_slab, self._folder, slab.path.name, slab.file.fd, detached)

    def _removed(self, future: Future[None]) -> None:
        error = future.exception()
        if error is not None:
            self._not_grown(error, "can't remove a slab")
            return
        self._slab_on_its_way = False
        self._full_until = 0.0  # there is room for another again
        self.serve()

    def _not_grown(self, error: BaseException, what: str = _UNMADE) -> None:
        """The index can't take it, or a file can't be made or won't go: another try ends alike."""
        self._slab_on_its_way, self._heir = False, None
        for size in tuple(self._slots.sizes.values()):
            self._refuse(size, lambda _: self._growth_error(error, what))

    def _growth_error(self, error: BaseException, what: str = _UNMADE) -> Exception:
        if isinstance(error, sqlite3.Error):
            return commit_error(self._settings.root, error)
        why = f"{what}: {error}"
        if _is_full(error):
            return disk_full(self._settings.root, why)
        number = getattr(error, "errno", None)
        return TransferError(f"{self._settings.root}: {why}", direction="store", errno=number)

    # --- making a slab ------------------------------------------------------------------

    def _grow(self, size: SizeClass, room: int) -> None:
        """Make one more slab; in the executor, because allocating it may take a while."""
        capacity = self._settings.capacity_bytes
        part = max(min(capacity // _SLABS, _SLAB_MOST), size.slot_bytes)
        slab_id = self._next_slab
        self._next_slab += 1
        self._slab_on_its_way = True
        path = self._settings.root / slab_name(slab_id, size.slot_bytes)
        make = partial(
            make_slab,
            self._folder,
            path.name,
            size.slot_bytes,
            min(part, room) // size.slot_bytes,
            reserve=min(RESERVE, capacity // 16),
            direct=self._direct,
            sync=self._settings.durable == "power",
        )
        self._services.run(make, partial(self._made, size, slab_id, path))

    def _made(
        self, size: SizeClass, slab_id: int, path: Path, future: Future[tuple[int, int]]
    ) -> None:
        if error := future.exception():
            (self._grown_full if _is_full(error) else self._not_grown)(error)
            return
        fd, slots = future.result()
        slab = Slab(slab_id, slots, path, File(fd, direct=self._direct), size)
        row = (slab_id, size.slot_bytes, slots)
        self._index.commit(Changes(add_slab=[row]), partial(self._indexed, slab))

    def _indexed(self, slab: Slab, error: Exception | None) -> None:
        if error is not None:  # a file that can't be removed goes at the next opening
            self._services.run(self._remover(slab), lambda _: self._not_grown(error))
            return
        self._slab_on_its_way, self._heir = False, None
        self._full_until = 0.0
        slab.used_at = next(self._slots.clock)  # or another class would take it before it is used
        self._slots.add_slab(slab)
        self._slots.open_slab(slab)
        self.serve()
        self.stock()

    def _grown_full(self, error: BaseException) -> None:
        """The disk has no room for another slab: go on with what there is, or say so."""
        self._slab_on_its_way, self._heir = False, None
        self._full_until = time.monotonic() + _FULL_S
        for size in tuple(self._slots.sizes.values()):
            self._keep_owed(size)
            if not self._slab_on_its_way and (size.waiting or _low(size)):
                slab = self._slots.older_slab(size, spare=self._spares(size))
                if slab is not None:
                    self._give_up(slab, size)
                    continue
            if not size.waiting or size.pending or self._evict(size, len(size.waiting)):
                continue
            if size.used or self._slab_on_its_way or self._steal(size):
                self._hasten(size)
                continue
            self._refuse(size, lambda _: self._growth_error(error))


def _ahead(size: SizeClass) -> int:
    """How many blocks to evict at once, though fewer are needed."""
    return min(_EVICT, size.slots // 16)


def _promotes(size: SizeClass) -> bool:
    """Whether nothing waits but promotions."""
    return all(move.mirrored for move in size.waiting)


def _low(size: SizeClass) -> bool:
    """Whether to evict ahead of need; small classes use all their slots instead."""
    return bool(size.used) and size.free + size.going < min(_EVICT // 2, size.slots // 32)


def _is_full(error: BaseException) -> bool:
    """Whether it says that there is no more room, whoever set the limit."""
    return isinstance(error, OSError) and error.errno in _FULL


def commit_error(root: Path, error: Exception) -> Exception:
    """What those are told whose commit failed."""
    if _is_full(error) or (isinstance(error, sqlite3.Error) and "full" in str(error)):
        return disk_full(root, f"the index can't grow: {error}")
    wrapped = TransferError(f"the index of {root} failed: {error}", direction="store")
    wrapped.__cause__ = error
    return wrapped


def disk_full(root: Path, why: str) -> StorageFull:
    """The error for a disk that takes no more."""
    return StorageFull(f"{root}: {why}; free space, or lower capacity_bytes")
