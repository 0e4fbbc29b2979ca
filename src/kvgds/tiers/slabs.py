"""Blocks in fixed slots of large preallocated files, for a directory of one engine alone.

The tier itself: what is loaded, what is stored, and the order that makes it safe to die at any
point. A block enters the index only after its bytes are down, and a slot is used again only after
its removal is committed. ``recovery`` opens the directory, ``slots`` knows which slot holds which
block, ``supply`` finds slots for stores, and ``index`` makes it all durable.

Belongs to the event loop's thread, but for what a method's docstring says.
``docs/format.md`` describes the files.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from functools import partial
from typing import TYPE_CHECKING

from kvgds.errors import BlockCorrupt, ConfigError, TransferError
from kvgds.paths import NO_ROOM, try_directory
from kvgds.threads import starting
from kvgds.tiers import Services, Tier, TierStatistics, locks
from kvgds.tiers.directory import lock_root, prepare_root
from kvgds.tiers.index import Changes, Index, connect, unusable
from kvgds.tiers.recovery import Recovery
from kvgds.tiers.slots import Block, Forgotten, Slots
from kvgds.tiers.space import SLOT_BITS, overwrite_in_place, slabs_in
from kvgds.tiers.supply import Supply, commit_error, disk_full

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kvgds.blocks import BlockKey, Namespace
    from kvgds.config import FileTier
    from kvgds.paths import Move

_DELETED = "was deleted while the engine had it open"
_TOUCHES = 1024  # about how many uses may be forgotten by a crash


class Slabs(Tier):
    """The slab layout of a :class:`~kvgds.config.FileTier`; see ``tiers.Tier``."""

    authoritative = True

    def __init__(self, settings: FileTier, namespace: Namespace, services: Services) -> None:
        self.name = f"slabs:{settings.root}"
        self.checked = settings.verify == "full"
        self._settings = settings
        self._namespace = namespace
        self._services = services
        self._slots = Slots(stacked=services.backlog is not None)
        self._index: Index
        self._supply: Supply
        self._namespace_id = 0
        self._dirty: set[int] = set()  # slabs written since the last commit
        self._moving = 0
        self._lock = self._folder = -1
        self._index_fds: dict[str, int] = {}  # of its files that must not go, by name
        self._links_count = True  # not on every file system
        self._index_lost = False  # what it had acknowledged may be gone when this process is

    # --- opening and closing, in the executor ---------------------------------------

    def open(self, progress: Callable[[str, int, int], None]) -> None:
        """Take the directory and recover what it holds; see ``Tier.open``."""
        settings = self._settings
        prepare_root(settings.root, "slabs")
        self._lock = lock_root(settings.root)
        try:
            self._folder = os.open(settings.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            overwrite_in_place(self._folder)
            found = try_directory(settings.root, settings.direct_io)
            self.plan = found.path_plan(self.name, self._services.transport.name)
            self._open_index(progress)
        except BaseException as error:
            self._close_files()
            if isinstance(error, OSError | sqlite3.Error):
                raise unusable(settings.root, error) from error
            raise

    def _open_index(self, progress: Callable[[str, int, int], None]) -> None:
        settings, services = self._settings, self._services
        power, direct = settings.durable == "power", bool(self.plan.direct_io)
        path = settings.root / "index.db"
        database = connect(path, power=power, new=not slabs_in(settings.root))
        self._index = index = Index(database, services.post, self._secure)
        try:
            self._watch(path)
            namespace = self._namespace
            self._namespace_id = number = index.namespace(namespace.digest, namespace.text)
            folder, slots = self._folder, self._slots
            found = Recovery(settings, index, slots, folder=folder, namespace=number, direct=direct)
            found.run(progress)
            index.promise(power=power)
            with starting():
                index.start()
        except BaseException:
            index.close()
            raise
        self._supply = Supply(
            settings, services, index, self._slots, self._send, folder=self._folder, direct=direct
        )

    def _watch(self, path: Path) -> None:
        """Keep hold of the index's files: SQLite has both open, and keeps to these."""
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        self._index_fds[path.name] = fd = os.open(path, flags)
        self._links_count = bool(os.fstat(fd).st_nlink)
        log = path.with_name("index.db-wal")
        with contextlib.suppress(FileNotFoundError):  # where SQLite can't do with one
            self._index_fds[log.name] = os.open(log, flags)

    def close(self) -> None:
        """See ``Tier.close``."""
        self._note_uses(1)
        for slab in self._slots.slabs.values():
            self._services.transport.detach(slab.file).result()
        try:
            self._index.close()
        finally:
            self._close_files()

    def _close_files(self) -> None:
        with contextlib.ExitStack() as stack:  # all of them, even if closing one fails
            stack.callback(locks.close, self._lock)
            for fd in (self._folder, *self._index_fds.values()):
                if fd >= 0:
                    stack.callback(os.close, fd)
            for slab in self._slots.slabs.values():
                stack.callback(os.close, slab.file.fd)
            self._slots.slabs.clear()

    def _secure(self) -> None:
        """Before a commit that puts blocks, on the index's thread: see that they will outlive it.

        Who deletes files under an engine is found out here, where neither loop nor reactor waits:
        what has no name any more is gone at the latest when it is closed.
        """
        for name, fd in self._index_fds.items():
            if self._deleted(fd):
                self._index_lost = True
                rule = "close the engine, then `kvgds fsck --rebuild`"
                raise FileNotFoundError(f"{name} {_DELETED}; {rule}")
        dirty = set()
        while self._dirty:  # one by one: reactors add to it meanwhile
            dirty.add(self._dirty.pop())
        for slab in map(self._slots.slabs.get, dirty):
            if slab is not None:
                slab.lost = slab.lost or self._insecure(slab.file.fd)

    def _insecure(self, fd: int) -> OSError | None:
        """Why what was written to a slab may not outlive this process, or a loss of power."""
        if self._deleted(fd):
            return OSError(errno.ENOENT, f"{_DELETED}; keep others out of the directory")
        try:
            if self._settings.durable == "power":
                os.fdatasync(fd)
        except OSError as error:  # for good: the next call would succeed, whatever was lost
            return OSError(error.errno, f"can't be made durable: {error.strerror}; see the disk")
        return None

    def _deleted(self, fd: int) -> bool:
        return self._links_count and not os.fstat(fd).st_nlink

    # --- asking -----------------------------------------------------------------------

    def contains(self, key: BlockKey) -> bool:
        """See ``Tier.contains``."""
        return key in self._slots.keys

    def prefix(
        self,
        keys: Sequence[BlockKey],
        done: Callable[[int], None],
        wanted: Callable[[], bool],  # noqa: ARG002 - it answers at once
    ) -> None:
        """See ``Tier.prefix``."""
        done(self._slots.keys.leading(keys))

    def statistics(self) -> TierStatistics:
        """See ``Tier.statistics``."""
        return TierStatistics(
            name=self.name,
            blocks=len(self._slots.keys),
            bytes_used=self._slots.bytes_used,
            capacity_bytes=self._settings.capacity_bytes,
            evictions=self._slots.evictions,
            quarantined=self._slots.quarantined,
            dropped=self._slots.dropped,
        )

    def idle(self) -> bool:
        """See ``Tier.idle``."""
        return not self._moving and self._supply.idle()

    # --- loading ----------------------------------------------------------------------

    def load(self, moves: Sequence[Move]) -> None:
        """See ``Tier.load``."""
        settled, going = [], []
        for move in moves:
            slot = self._slots.keys.get(move.key)
            if slot is None:
                move.status = "miss"
            elif (nbytes := self._slots.nbytes(slot)) != move.nbytes:
                rule = f"the stored block has {nbytes} bytes; give memory of that size"
                move.error = ConfigError("memory", f"{move.nbytes} bytes", rule)
            else:
                self._slots.hold(move, slot)
                going.append(move)
                continue
            settled.append(move)
        self._moving += len(going)
        if going:
            self._services.transport.submit(going, partial(self._services.post, self._loaded))
            self._note_uses(_TOUCHES)
        if settled:
            self._services.settle(settled)

    def _note_uses(self, least: int) -> None:
        """Tell the index which blocks were used, if so many were; nobody waits for it."""
        if len(self._slots.touched) >= least:
            self._index.commit(Changes(touch=self._slots.take_touched()), _ignore)

    def _loaded(self, moves: list[Move]) -> None:
        doubtful = [
            move for move in moves if isinstance(move.error, BlockCorrupt) and move.path.holds
        ]
        if not doubtful:
            self._end_loads(moves)
            return
        self._services.run(partial(_look_again, doubtful), lambda _: self._end_loads(doubtful))
        self._end_loads([move for move in moves if move not in doubtful])

    def _end_loads(self, moves: list[Move]) -> None:
        self._moving -= len(moves)
        for move in moves:
            if isinstance(move.error, BlockCorrupt):
                self._quarantine(move)
            elif move.error is None:
                move.status = "hit"
            self._slots.unhold(move.slot)
        self._services.settle(moves)
        self._supply.serve()

    def _quarantine(self, move: Move) -> None:
        """Take the slot of a provably wrong block out of use, for good."""
        if self._is_there(move):
            self._slots.quarantine(move.slot)
            self._index.commit(Changes(quarantine=[move.slot]), _ignore)

    def _is_there(self, move: Move) -> bool:
        """Whether the block that was loaded is still the one under its key."""
        block = self._slots.find(move.key)
        return block is not None and block[:2] == (move.slot, move.generation)

    # --- storing ----------------------------------------------------------------------

    def store(self, moves: Sequence[Move]) -> None:
        """See ``Tier.store``."""
        present, new = [], []
        slabs = self._slots.slabs
        for move in moves:
            block = self._slots.find(move.key)
            other = block is not None and block.nbytes != move.nbytes and not move.mirrored
            lost = self._index_lost or (block and slabs[block.slot >> SLOT_BITS].lost)
            if block is None or other or lost:
                new.append(move)
            else:
                move.status = "present"
                self._slots.touch(block.slot)
                present.append(move)
        self._supply.ask(new)
        if present:
            self._note_uses(_TOUCHES)
            self._services.settle(present)

    def _send(self, moves: list[Move]) -> None:
        self._moving += len(moves)
        self._services.transport.submit(moves, self._written)

    def _written(self, moves: list[Move]) -> None:
        """On a reactor's thread: hand what is down to the index, the rest to the loop."""
        good: list[Move] = []
        bad: list[Move] = []
        for move in moves:  # once: another thread may abandon it meanwhile
            (bad if move.error is not None or move.abandoned else good).append(move)
        if bad:
            self._services.post(self._unwritten, bad)
        if not good:
            return
        for move in good:
            self._dirty.add(move.slot >> SLOT_BITS)
        put = [self._row(move) for move in good]
        self._index.commit(Changes(put=put), partial(self._committed, good))

    def _row(self, move: Move) -> tuple[int, int, bytes, int, int, int, int, int]:
        number = move.generation or 0
        block = (move.slot, self._namespace_id, move.key, number, move.nbytes, move.algorithm)
        return (*block, number, int(move.mirrored))

    def _unwritten(self, moves: list[Move]) -> None:
        self._moving -= len(moves)
        for move in moves:
            self._slots.pend(move.slot, -1)
            self._slots.free(move.slot, last=True)  # if the place is bad, the next must not meet it
            if isinstance(move.error, TransferError) and move.error.errno in NO_ROOM:
                move.error = disk_full(self._settings.root, str(move.error))
        self._services.settle(moves)
        self._supply.serve()

    def _committed(self, moves: list[Move], error: Exception | None) -> None:
        self._moving -= len(moves)
        slots, drops, lost = self._slots, [], set()
        for move in moves:
            slots.pend(move.slot, -1)
            if error is not None:
                move.error = commit_error(self._settings.root, error)
                slots.free(move.slot)
            elif move.abandoned:
                drops.append(Forgotten(move.slot))
            elif move.mirrored and move.key in slots.keys:  # stored meanwhile: that counts
                move.status = "present"
                drops.append(Forgotten(move.slot))
            elif (slab := slots.slabs[move.slot >> SLOT_BITS]).lost is not None:
                lost.add(slab)
                text = f"{slab.path} {slab.lost.strerror}, and store the block again"
                move.error = TransferError(text, errno=slab.lost.errno, **move.context)
                drops.append(Forgotten(move.slot))
            else:
                old = slots.keys.get(move.key)
                if old is not None:
                    drops.append(slots.discard(old))
                number = move.generation or 0
                block = Block(move.slot, number, move.nbytes, number)
                slots.put(move.key, block, mirrored=move.mirrored)
                move.status = "stored"
        for slab in lost:
            slots.abandon_slab(slab)
        self._supply.drop(drops)
        self._services.settle(moves)
        self._supply.serve()
        self._supply.stock()

    # --- the next tier ----------------------------------------------------------------

    def owed(self) -> list[tuple[BlockKey, int]]:
        """See ``Tier.owed``."""
        return self._slots.all_owed()

    def mirrored(self, moves: Sequence[Move]) -> None:
        """See ``Tier.mirrored``."""
        slots = self._slots
        still = [move for move in moves if self._is_there(move)]
        still.sort(key=lambda move: slots.used_at(move.slot), reverse=True)  # coldest becomes first
        news = [move.slot for move in still if slots.clear(move.key, mirrored=True)]
        if news:
            self._index.commit(Changes(mirrored=news), _ignore)
        self._supply.serve()
        self._supply.stock()

    def is_mirrored(self, key: BlockKey) -> bool:
        """See ``Tier.is_mirrored``."""
        return self._slots.is_mirrored(key)

    def look_again(self, given_up: Sequence[BlockKey] = ()) -> None:
        """See ``Tier.look_again``."""
        for key in given_up:
            if key in self._slots.keys:
                self._slots.clear(key, mirrored=False)
        self._supply.serve()

    def expire(self) -> None:
        """See ``Tier.expire``."""
        self._supply.expire()

    def delete(self, key: BlockKey, done: Callable[[bool, Exception | None], None]) -> None:
        """See ``Tier.delete``."""
        slot = self._slots.keys.get(key)
        if slot is None:
            done(False, None)  # noqa: FBT003 - the callback's contract
            return
        gone = [self._slots.discard(slot)]
        self._supply.drop(gone, lambda error: done(error is None, error))


def _look_again(moves: Sequence[Move]) -> None:
    for move in moves:
        move.look_again()


def _ignore(error: Exception | None) -> None:
    """Uses and quarantines are remembered on a best-effort basis."""
