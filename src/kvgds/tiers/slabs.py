"""Blocks in fixed slots of large preallocated files, for a directory of one engine alone.

Owns the directory, its slab files and its index. A slab is cut into slots of one size
class; which slot holds which block is known in memory, and durably in SQLite. Two orders
make it safe to die at any point: a block enters the index only after its bytes are down,
and a slot is used again only after its removal is committed.

All state belongs to the event loop's thread. ``docs/format.md`` describes the files.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sqlite3
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from kvgds.blocks import NO_CHECKSUM
from kvgds.errors import BlockCorrupt, ConfigError, StorageFull, TransferError
from kvgds.paths import PathPlan, try_directory
from kvgds.tiers import Services, TierStatistics, locks
from kvgds.tiers.directory import lock_root, prepare_root
from kvgds.tiers.index import Changes, Index, connect, damaged
from kvgds.tiers.space import (
    SLAB_NAME,
    SLOT_BITS,
    SLOT_MASK,
    SizeClass,
    Slab,
    make_slab,
    open_slab,
    remove_slab,
    room_on_disk,
    slab_name,
    slabs_in,
    slot_bytes_for,
)
from kvgds.transport import File

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from kvgds.blocks import BlockKey, Namespace
    from kvgds.config import FileTier
    from kvgds.paths import Move

_RESERVE = 8 << 20  # bytes of the disk that slabs leave to the index: rows and SQLite's log
_SLAB_MOST = 4 << 30  # bytes; one takes a while to allocate
_SLABS = 64  # a slab is about this part of the capacity
_EVICT = 64  # most blocks that one commit evicts ahead of need
_TOUCHES = 1024  # how many uses may be forgotten by a crash


Block: TypeAlias = tuple[int, int, int, int]  # slot, generation, bytes, when it was last used


class _Forgotten(NamedTuple):
    """A block that is invisible, but still in the index."""

    slot: int
    key: BlockKey | None = None
    block: Block = (0, 0, 0, 0)


class Slabs:
    """The slab layout of a :class:`~kvgds.config.FileTier`; see ``tiers.Tier``."""

    authoritative = True

    def __init__(self, settings: FileTier, namespace: Namespace, services: Services) -> None:
        self.name = f"slabs:{settings.root}"
        self.plan: PathPlan
        self._settings = settings
        self._namespace = namespace
        self._services = services
        self._blocks: dict[BlockKey, Block] = {}
        self._classes: dict[int, SizeClass] = {}
        self._slabs: dict[int, Slab] = {}
        self._class_of: dict[int, SizeClass] = {}  # by slab
        self._holds: dict[int, int] = {}  # loads in flight, by slot
        self._orphans: set[int] = set()  # slots to be freed when their last hold ends
        self._dirty: set[int] = set()  # slabs written since the last commit
        self._touched: dict[int, int] = {}
        self._clock = itertools.count(1)
        self._next_slab = 0
        self._growing = False
        self._disk_full = False
        self._under_way = 0
        self._evictions = 0
        self._quarantined = 0
        self._bytes = 0
        self._slab_bytes = 0
        self._index: Index
        self._namespace_id = 0
        self._lock = -1

    # --- opening and closing, in the executor ---------------------------------------

    def open(self, progress: Callable[[str, int, int], None]) -> None:
        """Take the directory and recover what it holds; see ``Tier.open``."""
        settings = self._settings
        prepare_root(settings.root, "slabs")
        self._lock = lock_root(settings.root)
        try:
            found = try_directory(settings.root, settings.direct_io)
            self.plan = found.path_plan(self.name, self._services.transport.name)
            self._recover(progress)
        except BaseException as error:
            self._close_files()
            if isinstance(error, OSError | sqlite3.Error):
                rule = f"can't be used: {error}"
                if isinstance(error, sqlite3.Error) and room_on_disk(settings.root) < _RESERVE:
                    rule += "; the index needs room on the disk: free some MiB"
                raise ConfigError("root", str(settings.root), rule) from error
            raise

    def _recover(self, progress: Callable[[str, int, int], None]) -> None:
        power = self._settings.durable == "power"
        root = self._settings.root
        there = slabs_in(root)
        database = connect(root / "index.db", power=power, new=not there)
        self._index = Index(database, self._services.post, self._sync if power else _nothing)
        try:
            namespace = self._namespace
            self._namespace_id = self._index.namespace(namespace.digest, namespace.text)
            self._clock = itertools.count((self._index.count_open() << 40) + 1)
            lost = self._open_slabs(there)
            self._load_blocks(progress, lost)
            self._sweep()
            self._shrink()
        except (TypeError, ValueError, OverflowError) as error:  # of values no engine wrote
            self._index.close()
            if isinstance(error, ConfigError):
                raise
            raise damaged(root / "index.db", error) from None
        except BaseException:
            self._index.close()
            raise
        self._index.start()

    def _open_slabs(self, there: dict[int, str]) -> dict[int, int]:
        """Open every slab of the index. For each that lost bytes, how many slots it still has."""
        lost = {}
        for slab_id, slot_bytes, slots in self._index.slabs():
            path = self._settings.root / slab_name(slab_id, slot_bytes)
            if there.get(slab_id, path.name) != path.name:
                rule = (
                    f"is {there[slab_id]} by its name; `kvgds fsck --rebuild` makes the index anew"
                )
                raise ConfigError("root", str(path), rule)
            fd, whole = open_slab(path, slot_bytes * slots, direct=self.plan.direct_io)
            if whole < slot_bytes * slots:
                lost[slab_id] = whole // slot_bytes
            self._add_slab(Slab(slab_id, slots, path, File(fd)), slot_bytes)
            self._next_slab = max(self._next_slab, slab_id + 1)
        return lost

    def _load_blocks(self, progress: Callable[[str, int, int], None], lost: dict[int, int]) -> None:
        total, done = self._index.count(), 0
        wrong: list[int] = []
        taken = set()
        slots = {slab.id: lost.get(slab.id, slab.slots) for slab in self._slabs.values()}
        for chunk in self._index.blocks():
            for row in chunk:
                slot = row[0]
                unusable: int | None = slot
                if slot & SLOT_MASK < slots.get(slot >> SLOT_BITS, 0):
                    taken.add(slot)
                    unusable = self._adopt(row)
                if unusable is not None:
                    taken.discard(unusable)
                    wrong.append(unusable)
            done += len(chunk)
            progress("recovering the index", done, total)
        self._index.apply(Changes(drop=wrong))
        for slab in self._slabs.values():
            base = slab.id << SLOT_BITS
            free = [base + i for i in range(slab.slots) if base + i not in taken]
            self._class_of[slab.id].free.extend(free)
        for size in self._classes.values():
            size.free.sort(reverse=True)

    def _adopt(self, row: tuple[int, int, bytes | None, int, int, int]) -> int | None:
        """Take one row of the index; the slot whose row must go, if one must.

        Blocks of other namespaces wait for eviction. What this engine may not serve, and what
        has been replaced, goes at once: it would come back when the later one is deleted.
        """
        slot, namespace, key, generation, nbytes, algorithm = row
        if key is None:
            self._quarantined += 1
            return None
        size = self._class_of[slot >> SLOT_BITS]
        if namespace != self._namespace_id:
            self._bytes += size.slot_bytes
            size.used[slot] = None
            return None
        rival = self._blocks.get(key)
        unchecked = algorithm == NO_CHECKSUM and self._settings.verify == "full"
        if unchecked or (rival is not None and rival[1] > generation):
            return slot
        gone = None if rival is None else self._forget(rival[0]).slot
        self._bytes += size.slot_bytes
        size.used[slot] = key
        used_at = len(self._blocks)  # rows come in order of use
        self._blocks[key] = (slot, generation, nbytes, used_at)
        self._slabs[slot >> SLOT_BITS].used_at = used_at
        return gone

    def _sweep(self) -> None:
        """Remove what was cut short: temporaries, and slab files that the index does not know."""
        known = {slab.path.name for slab in self._slabs.values()}
        for name in os.listdir(self._settings.root):
            stray = name.startswith((".trial-", ".kvgds.json-"))
            if stray or (SLAB_NAME.fullmatch(name) and name not in known):
                os.unlink(self._settings.root / name)

    def _shrink(self) -> None:
        """Give up slabs until the capacity, which may be less than last time, holds."""
        while self._slab_bytes > self._settings.capacity_bytes:
            slab = self._least_wanted_slab(None)
            if slab is None:  # pragma: no cover - nothing is in flight at open
                return
            self._remove_slab(slab)
            self._index.apply(Changes(drop_slab=[slab.id]))
            os.close(slab.file.fd)
            os.unlink(slab.path)

    def close(self) -> None:
        """See ``Tier.close``."""
        if self._touched:
            self._index.commit(Changes(touch=self._touched), _ignore)
        for slab in self._slabs.values():
            self._services.transport.detach(slab.file).result()
        try:
            self._index.close()
        finally:
            self._close_files()

    def _close_files(self) -> None:
        with contextlib.ExitStack() as stack:  # all of them, even if closing one fails
            stack.callback(locks.close, self._lock)
            for slab in self._slabs.values():
                stack.callback(os.close, slab.file.fd)
            self._slabs.clear()

    def _sync(self) -> None:
        """Make the payloads of the coming commit durable; runs on the index's thread."""
        dirty = set()
        while self._dirty:  # one by one: reactors add to it meanwhile
            dirty.add(self._dirty.pop())
        for slab_id in dirty:
            slab = self._slabs.get(slab_id)
            if slab is not None:
                os.fdatasync(slab.file.fd)

    # --- asking -----------------------------------------------------------------------

    def contains(self, key: BlockKey) -> bool:
        """See ``Tier.contains``."""
        return key in self._blocks

    def prefix(self, keys: Sequence[BlockKey], done: Callable[[int], None]) -> None:
        """See ``Tier.prefix``."""
        missing = (n for n, key in enumerate(keys) if key not in self._blocks)
        done(next(missing, len(keys)))

    def statistics(self) -> TierStatistics:
        """See ``Tier.statistics``."""
        return TierStatistics(
            name=self.name,
            blocks=len(self._blocks),
            bytes_used=self._bytes,
            capacity_bytes=self._settings.capacity_bytes,
            evictions=self._evictions,
            quarantined=self._quarantined,
        )

    def idle(self) -> bool:
        """See ``Tier.idle``."""
        return not self._under_way

    # --- loading ----------------------------------------------------------------------

    def load(self, moves: Sequence[Move]) -> None:
        """See ``Tier.load``."""
        settled, going = [], []
        for move in moves:
            block = self._blocks.get(move.key)
            if block is None:
                move.status = "miss"
            elif block[2] != move.nbytes:
                rule = f"the stored block has {block[2]} bytes; give memory of that size"
                move.error = ConfigError("view", f"{move.nbytes} bytes", rule)
            else:
                self._aim(move, block[0], block[1])
                self._holds[block[0]] = self._holds.get(block[0], 0) + 1
                self._touch(move.key, block)
                going.append(move)
                continue
            settled.append(move)
        self._under_way += len(going)
        if going:
            self._services.transport.submit(going, self._loaded_soon)
        if settled:
            self._services.settle(settled)

    def _aim(self, move: Move, slot: int, generation: int) -> None:
        slab_id, place = slot >> SLOT_BITS, slot & SLOT_MASK
        move.file = self._slabs[slab_id].file
        move.offset = place * self._class_of[slab_id].slot_bytes
        move.generation = generation
        move.place = f"slab {slab_id} slot {place}"
        move.slot = slot

    def _touch(self, key: BlockKey, block: Block) -> None:
        slot, generation, nbytes, _ = block
        now = next(self._clock)
        self._blocks[key] = (slot, generation, nbytes, now)
        self._class_of[slot >> SLOT_BITS].used.move_to_end(slot)
        self._slabs[slot >> SLOT_BITS].used_at = now
        self._touched[slot] = now
        if len(self._touched) >= _TOUCHES:
            self._index.commit(Changes(touch=self._touched), _ignore)
            self._touched = {}

    def _loaded_soon(self, moves: list[Move]) -> None:
        self._services.post(self._loaded, moves)

    def _loaded(self, moves: list[Move]) -> None:
        self._under_way -= len(moves)
        for move in moves:
            if isinstance(move.error, BlockCorrupt):
                self._quarantine(move)
            elif move.error is None:
                move.status = "hit"
            self._unhold(move.slot)
        self._services.settle(moves)
        self._serve_waiting()

    def _unhold(self, slot: int) -> None:
        left = self._holds.pop(slot) - 1
        if left:
            self._holds[slot] = left
        elif slot in self._orphans:
            self._orphans.discard(slot)
            self._free(slot)

    def _quarantine(self, move: Move) -> None:
        """Take the slot of a provably wrong block out of use, for good."""
        block = self._blocks.get(move.key)
        if block is None or block[:2] != (move.slot, move.generation):
            return
        self._forget(block[0])
        self._quarantined += 1
        self._index.commit(Changes(quarantine=[block[0]]), _ignore)

    # --- storing ----------------------------------------------------------------------

    def store(self, moves: Sequence[Move]) -> None:
        """See ``Tier.store``."""
        settled, going = [], []
        for move in moves:
            block = self._blocks.get(move.key)
            if block is not None and block[2] == move.nbytes:
                move.status = "present"
                self._touch(move.key, block)
                settled.append(move)
                continue
            slot_bytes = slot_bytes_for(move.nbytes)
            if slot_bytes > self._settings.capacity_bytes:
                move.error = self._too_big(slot_bytes)
                settled.append(move)
                continue
            size = self._size_class(slot_bytes)
            if size.waiting or not size.free:
                size.waiting.append(move)
            else:
                self._take_slot(move, size)
                going.append(move)
        self._send(going)
        if settled:
            self._services.settle(settled)
        self._serve_waiting()

    def _size_class(self, slot_bytes: int) -> SizeClass:
        size = self._classes.get(slot_bytes)
        if size is None:
            size = self._classes[slot_bytes] = SizeClass(slot_bytes)
        return size

    def _take_slot(self, move: Move, size: SizeClass) -> None:
        self._aim(move, size.free.pop(), next(self._clock))
        self._pend(move.slot, 1)

    def _pend(self, slot: int, step: int) -> None:
        slab = slot >> SLOT_BITS
        self._slabs[slab].busy += step
        self._class_of[slab].pending += step

    def _send(self, moves: list[Move]) -> None:
        if moves:
            self._under_way += len(moves)
            self._services.transport.submit(moves, self._written)

    def _written(self, moves: list[Move]) -> None:
        """On a reactor's thread: hand what is down to the index, the rest to the loop."""
        good = [move for move in moves if move.error is None and not move.abandoned]
        if len(good) < len(moves):
            bad = [move for move in moves if move.error is not None or move.abandoned]
            self._services.post(self._unwritten, bad)
        if not good:
            return
        rows = []
        for move in good:
            number = move.generation or 0
            rows.append(
                (
                    move.slot,
                    self._namespace_id,
                    move.key,
                    number,
                    move.nbytes,
                    move.algorithm,
                    number,
                )
            )
            self._dirty.add(move.slot >> SLOT_BITS)
        self._index.commit(Changes(put=rows), partial(self._committed, good))

    def _unwritten(self, moves: list[Move]) -> None:
        self._under_way -= len(moves)
        for move in moves:
            self._pend(move.slot, -1)
            self._free(move.slot, last=True)  # if the place is bad, the next must not meet it
            if isinstance(move.error, TransferError) and move.error.errno == errno.ENOSPC:
                move.error = self._full(str(move.error))
        self._services.settle(moves)
        self._serve_waiting()

    def _committed(self, moves: list[Move], error: Exception | None) -> None:
        self._under_way -= len(moves)
        drops = []
        for move in moves:
            self._pend(move.slot, -1)
            if error is not None:
                move.error = self._commit_error(error)
                self._free(move.slot)
            elif move.abandoned:
                drops.append(_Forgotten(move.slot))
            else:
                old = self._blocks.get(move.key)
                if old is not None:
                    drops.append(self._forget(old[0]))
                self._publish(move)
        self._drop(drops)
        self._services.settle(moves)
        self._serve_waiting()

    def _publish(self, move: Move) -> None:
        size = self._class_of[move.slot >> SLOT_BITS]
        number = move.generation or 0
        self._blocks[move.key] = (move.slot, number, move.nbytes, number)
        size.used[move.slot] = move.key
        self._slabs[move.slot >> SLOT_BITS].used_at = number
        self._bytes += size.slot_bytes
        move.status = "stored"

    def _commit_error(self, error: Exception) -> Exception:
        full = isinstance(error, sqlite3.Error) and "full" in str(error)
        if full or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
            return self._full(f"the index can't grow: {error}")
        wrapped = TransferError(
            f"the index of {self._settings.root} failed: {error}", direction="store"
        )
        wrapped.__cause__ = error
        return wrapped

    def _full(self, why: str) -> StorageFull:
        return StorageFull(f"{self._settings.root}: {why}; free space, or lower capacity_bytes")

    def expire(self) -> None:
        """See ``Tier.expire``."""
        for size in self._classes.values():
            gone = [move for move in size.waiting if move.abandoned]
            if gone:
                size.waiting = deque(move for move in size.waiting if not move.abandoned)
                for move in gone:
                    move.error = move.timeout()
                self._services.settle(gone)

    # --- making room ------------------------------------------------------------------

    def _serve_waiting(self) -> None:
        """Give slots to waiting stores, and see to it that there will be more."""
        for size in self._classes.values():
            going = []
            while size.waiting and size.free:
                move = size.waiting.popleft()
                self._take_slot(move, size)
                going.append(move)
            self._send(going)
        # Those that wait come first: the room made for them is not to be taken ahead of need.
        for size in sorted(self._classes.values(), key=lambda size: not size.waiting):
            if size.waiting or self._low(size):
                self._make_room(size)

    @staticmethod
    def _low(size: SizeClass) -> bool:
        """Whether to evict ahead of need; small classes use all their slots instead."""
        return bool(size.used) and len(size.free) + size.going < min(_EVICT // 2, size.slots // 32)

    def _make_room(self, size: SizeClass) -> None:
        if self._growing:
            return
        if self._room() >= size.slot_bytes and not (self._disk_full and size.used):
            self._grow(size)
            return
        if size.waiting and self._older_elsewhere(size):
            return
        needed = len(size.waiting) - size.going
        ahead = min(_EVICT, size.slots // 16)
        evicted = self._evict(size, max(needed, ahead))
        wait = evicted or size.pending or size.used or self._orphans
        if size.waiting and not wait and not self._steal(size):
            self._refuse(size)

    def _room(self) -> int:
        return self._settings.capacity_bytes - self._slab_bytes

    def _evict(self, size: SizeClass, wanted: int) -> int:
        """Drop the least recently used blocks that nobody is loading; how many."""
        slots = []
        for slot in itertools.islice(size.used, wanted + len(self._holds)):
            if slot not in self._holds:
                slots.append(slot)
                if len(slots) == wanted:
                    break
        self._evictions += len(slots)
        self._drop([self._forget(slot) for slot in slots], partial(self._evicted, size, len(slots)))
        return len(slots)

    def _evicted(self, size: SizeClass, blocks: int, error: Exception | None) -> None:
        if error is not None:  # they are back, and would be tried again for ever
            self._evictions -= blocks
            self._refuse_moves(size, lambda: self._commit_error(error))

    def _forget(self, slot: int) -> _Forgotten:
        """Make a block invisible; its slot is not free yet."""
        size = self._class_of[slot >> SLOT_BITS]
        key = size.used.pop(slot)
        self._bytes -= size.slot_bytes
        self._touched.pop(slot, None)
        return _Forgotten(slot) if key is None else _Forgotten(slot, key, self._blocks.pop(key))

    def _remember(self, gone: _Forgotten) -> None:
        """The index still names a block, so its slot is not free: go on with it."""
        size = self._class_of[gone.slot >> SLOT_BITS]
        self._bytes += size.slot_bytes
        replaced = gone.key is None or gone.key in self._blocks
        size.used[gone.slot] = None if replaced else gone.key
        size.used.move_to_end(gone.slot, last=False)
        if gone.key is not None and not replaced:
            self._blocks[gone.key] = gone.block

    def _drop(
        self, gone: list[_Forgotten], done: Callable[[Exception | None], None] | None = None
    ) -> None:
        """Commit the removal of forgotten blocks, then free their slots."""
        if not gone:
            return
        slots = [block.slot for block in gone]
        for slot in slots:
            self._class_of[slot >> SLOT_BITS].going += 1
            self._pend(slot, 1)
        self._under_way += len(slots)
        self._index.commit(Changes(drop=slots), partial(self._dropped, gone, done))

    def _dropped(
        self,
        gone: list[_Forgotten],
        done: Callable[[Exception | None], None] | None,
        error: Exception | None,
    ) -> None:
        self._under_way -= len(gone)
        for block in reversed(gone):
            self._class_of[block.slot >> SLOT_BITS].going -= 1
            self._pend(block.slot, -1)
            if error is None:
                self._free(block.slot)
            else:
                self._remember(block)
        if done is not None:
            done(error)
        self._serve_waiting()

    def _free(self, slot: int, *, last: bool = False) -> None:
        """Make a slot free, to be used next or last of all."""
        if slot in self._holds:
            self._orphans.add(slot)
            return
        free = self._class_of[slot >> SLOT_BITS].free
        free.insert(0 if last else len(free), slot)

    def _older_elsewhere(self, size: SizeClass) -> bool:
        """Give up another class's slab if all of it is older than anything of this class."""
        oldest = next(iter(size.used.values()), None)
        slab = None if oldest is None else self._least_wanted_slab(size)
        if slab is None or oldest is None or slab.used_at > self._blocks[oldest][3]:
            return False
        self._give_up(slab)
        return True

    def _steal(self, size: SizeClass) -> bool:
        """Give up another class's slab for this one. False: none can be had, ever."""
        slab = self._least_wanted_slab(size)
        if slab is None:
            return any(slab.busy for slab in self._slabs.values()) or bool(self._holds)
        self._give_up(slab)
        return True

    def _give_up(self, slab: Slab) -> None:
        size = self._class_of[slab.id]
        gone, free = self._remove_slab(slab)
        self._growing = True
        self._under_way += 1
        done = partial(self._unindexed, slab, size, gone, free)
        self._index.commit(Changes(drop_slab=[slab.id]), done)

    def _least_wanted_slab(self, other_than: SizeClass | None) -> Slab | None:
        """The slab of another class that was not used for longest, and that nobody uses now."""
        held = {slot >> SLOT_BITS for slot in self._holds}
        idle = (
            slab
            for slab in self._slabs.values()
            if not slab.busy and slab.id not in held and self._class_of[slab.id] is not other_than
        )
        return min(idle, key=lambda slab: slab.used_at, default=None)

    def _remove_slab(self, slab: Slab) -> tuple[list[_Forgotten], list[int]]:
        """Forget a slab: the blocks and the free slots that it had; the rest is in quarantine."""
        size = self._class_of[slab.id]
        gone = [self._forget(slot) for slot in list(size.used) if slot >> SLOT_BITS == slab.id]
        free = [slot for slot in size.free if slot >> SLOT_BITS == slab.id]
        size.free = [slot for slot in size.free if slot >> SLOT_BITS != slab.id]
        self._evictions += len(gone)
        self._quarantined -= slab.slots - len(gone) - len(free)
        size.slots -= slab.slots
        del self._class_of[slab.id], self._slabs[slab.id]
        self._slab_bytes -= slab.slots * size.slot_bytes
        return gone, free

    def _unindexed(
        self,
        slab: Slab,
        size: SizeClass,
        gone: list[_Forgotten],
        free: list[int],
        error: Exception | None,
    ) -> None:
        if error is not None:  # the index still names it: go on with it
            self._add_slab(slab, size.slot_bytes)
            size.free[:0] = free
            self._evictions -= len(gone)
            self._quarantined += slab.slots - len(gone) - len(free)
            for block in reversed(gone):
                self._remember(block)
            self._not_grown(error)
            return
        detached = self._services.transport.detach(slab.file)
        self._services.run(partial(remove_slab, slab, detached), self._removed)

    def _removed(self, future: Future[None]) -> None:
        error = future.exception()
        if error is not None:
            self._not_grown(error)
            return
        self._growing = False
        self._under_way -= 1
        self._serve_waiting()

    def _not_grown(self, error: BaseException) -> None:
        """The index can't take it, or a file won't go: another try would end alike."""
        self._growing = False
        self._under_way -= 1
        for size in self._classes.values():
            self._refuse_moves(size, lambda: self._growth_error(error))

    def _refuse(self, size: SizeClass) -> None:
        self._refuse_moves(size, lambda: self._too_big(size.slot_bytes))

    def _too_big(self, slot_bytes: int) -> StorageFull:
        capacity = self._settings.capacity_bytes
        return StorageFull(
            f"{self.name}: no room for a block that takes {slot_bytes:,} bytes with its stamp, "
            f"and nothing to evict; raise capacity_bytes={capacity:,}"
        )

    def _refuse_moves(self, size: SizeClass, make: Callable[[], Exception]) -> None:
        moves = list(size.waiting)
        size.waiting.clear()
        for move in moves:
            move.error = make()
        if moves:
            self._services.settle(moves)

    # --- growing ----------------------------------------------------------------------

    def _grow(self, size: SizeClass) -> None:
        """Make one more slab; in the executor, because allocating it may take a while."""
        part = max(min(self._settings.capacity_bytes // _SLABS, _SLAB_MOST), size.slot_bytes)
        slots = min(part, self._room()) // size.slot_bytes
        slab_id = self._next_slab
        self._next_slab += 1
        self._growing = True
        self._under_way += 1
        path = self._settings.root / slab_name(slab_id, size.slot_bytes)
        make = partial(
            make_slab,
            path,
            size.slot_bytes,
            slots,
            reserve=min(_RESERVE, self._settings.capacity_bytes // 16),
            direct=self.plan.direct_io,
            sync=self._settings.durable == "power",
        )
        self._services.run(make, partial(self._made, size, slab_id, path))

    def _made(
        self, size: SizeClass, slab_id: int, path: Path, future: Future[tuple[int, int]]
    ) -> None:
        if error := future.exception():
            self._grown_badly(error)
            return
        fd, slots = future.result()
        slab = Slab(slab_id, slots, path, File(fd))
        self._index.commit(
            Changes(add_slab=[(slab_id, size.slot_bytes, slots)]),
            partial(self._indexed, size, slab),
        )

    def _indexed(self, size: SizeClass, slab: Slab, error: Exception | None) -> None:
        if error is not None:
            self._under_way += 1
            self._services.run(partial(remove_slab, slab), self._unmade)
            self._not_grown(error)
            return
        self._growing = self._disk_full = False
        self._under_way -= 1
        self._add_slab(slab, size.slot_bytes)
        base = slab.id << SLOT_BITS
        size.free[:0] = range(base + slab.slots - 1, base - 1, -1)
        self._serve_waiting()

    def _unmade(self, _: Future[None]) -> None:
        self._under_way -= 1  # what could not be removed goes when the directory is next opened

    def _add_slab(self, slab: Slab, slot_bytes: int) -> None:
        size = self._size_class(slot_bytes)
        self._slabs[slab.id] = slab
        self._class_of[slab.id] = size
        size.slots += slab.slots
        self._slab_bytes += slab.slots * slot_bytes

    def _grown_badly(self, error: BaseException) -> None:
        """The disk has no room for another slab: go on with what there is, or say so."""
        self._growing = False
        self._under_way -= 1
        self._disk_full = True
        for size in self._classes.values():
            if not size.waiting or size.pending or self._evict(size, len(size.waiting)):
                continue
            if size.used or self._steal(size):
                continue
            self._refuse_moves(size, lambda: self._growth_error(error))

    def _growth_error(self, error: BaseException) -> Exception:
        if isinstance(error, sqlite3.Error):
            return self._commit_error(error)
        return self._full(f"can't make a slab: {error}")

    # --- deleting ---------------------------------------------------------------------

    def delete(self, key: BlockKey, done: Callable[[bool, Exception | None], None]) -> None:
        """See ``Tier.delete``."""
        block = self._blocks.get(key)
        if block is None:
            done(False, None)  # noqa: FBT003 - the callback's contract
            return
        self._drop([self._forget(block[0])], lambda error: done(error is None, error))


def _nothing() -> None:
    return


def _ignore(error: Exception | None) -> None:
    """Uses and quarantines are remembered on a best-effort basis."""
