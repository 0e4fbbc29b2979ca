"""One file a block, for directories that several processes and hosts share.

The tier itself: what is under way, what waits for room, and which blocks have been seen.
All state belongs to the event loop's thread; ``tree`` makes the file-system calls, in the
executor: loads at once, and everything that stores or removes in one job at a time, so that
a thread is always left for loads however long another process holds the ledger. In that
thread a load waits for no more than the piece of one prefix that is being looked at.

Recency is a file's modification time, which a load sets at most once a minute: that much of
it a restart forgets, and other processes don't see. All who share a directory need to be
one user, and a file system whose flock works between them.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kvgds.blocks import image_bytes
from kvgds.errors import BlockCorrupt, ConfigError, StorageFull, TransferError, explain
from kvgds.paths import try_directory
from kvgds.tiers import Services, Tier, TierStatistics
from kvgds.tiers.directory import prepare_root
from kvgds.tiers.known import Known, known_as
from kvgds.tiers.tree import Delete, Errands, Store, Tree, close_files, fail

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from kvgds.blocks import BlockKey, Namespace
    from kvgds.config import FileTier
    from kvgds.paths import Move
    from kvgds.tiers.folders import Folders
    from kvgds.tiers.tree import Opened

_PAUSE_S = 10e-3  # between looks for room that other processes have reserved
_PIECE = 64  # keys of a prefix that are looked for before loads have their turn


@dataclass(eq=False, slots=True)
class _Prefix:
    """A question how many of the first keys are there.

    Attributes:
        folders: what it has seen of the tree; its pieces share that, as one job would.
        length: keys found so far.
    """

    keys: tuple[BlockKey, ...]
    done: Callable[[int], None]
    wanted: Callable[[], bool]
    folders: Folders
    length: int = 0


class Files(Tier):
    """The files layout of a :class:`~kvgds.config.FileTier`; see ``tiers.Tier``.

    What it knows without asking the directory are the blocks it has seen; others come and
    go by the hand of other processes. So that tells what need not be stored or is worth a wait,
    and never that a load would miss. Whether the next tier has a block it does not say, for it
    would have to look for a marker; and no store waits for that: what it lacks goes last, but goes.
    """

    authoritative = False

    def __init__(self, settings: FileTier, namespace: Namespace, services: Services) -> None:
        self.name = f"files:{settings.root}"
        self.checked = settings.verify == "full"
        self._settings = settings
        self._services = services
        self._tree = Tree(settings, namespace, stacked=services.backlog is not None)
        self._owed: list[tuple[BlockKey, int]] = []  # until they are asked for
        self._known = Known()
        self._errands = Errands()
        self._waiting: list[Store] = []  # for room; in order
        self._moving: dict[Move, Store] = {}
        self._prefixes: deque[_Prefix] = deque()  # the first is being looked for
        self._busy = False  # a job is doing errands
        self._under_way = 0
        self._progress = 0

    # --- opening and closing, in the executor -----------------------------------------

    def open(self, progress: Callable[[str, int, int], None]) -> None:
        """Join those who use the directory; see ``Tier.open``."""
        settings = self._settings
        prepare_root(settings.root, "files")
        try:
            self._tree.open()
            found = try_directory(settings.root / "tmp", settings.direct_io)
            self.plan = found.path_plan(self.name, self._services.transport.name)
            self._tree.direct = os.O_DIRECT if found.direct_io else 0
            self._tree.recover()
            self._known.saw((set(), found) for found in self._tree.listing(progress))
            self._owed = self._tree.owed()
        except OSError as error:
            self._tree.close()
            rule = f"can't be used: {explain(error)}"
            raise ConfigError("root", str(settings.root), rule) from error
        except BaseException:
            self._tree.close()
            raise

    def close(self) -> None:
        """See ``Tier.close``."""
        self._tree.close()

    # --- asking -----------------------------------------------------------------------

    def contains(self, key: BlockKey) -> bool:
        """See ``Tier.contains``."""
        return known_as(self._tree.place(key)) in self._known

    def prefix(
        self, keys: Sequence[BlockKey], done: Callable[[int], None], wanted: Callable[[], bool]
    ) -> None:
        """See ``Tier.prefix``."""
        self._under_way += 1
        self._prefixes.append(_Prefix(tuple(keys), done, wanted, self._tree.folders()))
        if len(self._prefixes) == 1:
            self._look_for_piece()

    def _look_for_piece(self) -> None:
        """Of the first prefix alone: its pieces take one thread, and queue behind loads."""
        asked = self._prefixes[0]
        piece = asked.keys[asked.length : asked.length + _PIECE]
        look = partial(self._tree.prefix, piece, asked.folders)
        self._services.run(look, partial(self._found, asked, len(piece)))

    def _found(self, asked: _Prefix, looked_for: int, future: Future[list[bytes]]) -> None:
        failed = future.exception() is not None
        seen = [] if failed else future.result()
        self._known.add(seen)
        asked.length += len(seen)
        lacks = len(seen) < looked_for
        ended = lacks or asked.length == len(asked.keys) or not asked.wanted()
        if ended:
            self._prefixes.popleft()
        else:
            self._prefixes.rotate(-1)  # short ones don't wait for long ones
        if self._prefixes:
            self._look_for_piece()
        if not ended:
            return
        if lacks and not failed:  # others may have dropped it
            self._known.discard([known_as(self._tree.place(asked.keys[asked.length]))])
        asked.done(0 if failed else asked.length)
        self._end([], 1)

    def statistics(self) -> TierStatistics:
        """See ``Tier.statistics``; the bytes are those of the ledger when it was last read."""
        return TierStatistics(
            name=self.name,
            blocks=len(self._known),
            bytes_used=self._tree.ledger.used,
            capacity_bytes=self._settings.capacity_bytes,
            evictions=self._tree.room.evictions,
            quarantined=self._tree.quarantined,
            dropped=self._tree.room.dropped,
        )

    def idle(self) -> bool:
        """See ``Tier.idle``."""
        return not self._under_way

    # --- loading ----------------------------------------------------------------------

    def load(self, moves: Sequence[Move]) -> None:
        """See ``Tier.load``."""
        self._under_way += len(moves)
        pins = self._tree.room.pins
        for move in moves:
            move.place = self._tree.place(move.key)
            move.generation = None
            pins[move.place] = pins.get(move.place, 0) + 1
        self._services.run(partial(self._open_all, moves), partial(self._opened, moves))

    def _open_all(self, moves: Sequence[Move]) -> list[Move]:
        """In the executor: open the files, and read them. Those that have ended already."""
        ended, going = self._tree.open_blocks(moves)
        if going:
            self._services.transport.submit(going, self._arrived)
        return ended

    def _opened(self, moves: Sequence[Move], future: Future[list[Move]]) -> None:
        ended: Sequence[Move] = moves
        if error := future.exception():
            for move in moves:
                fail(move, error)
        else:
            ended = future.result()
        corrupt = [move for move in ended if isinstance(move.error, BlockCorrupt)]
        self._ask_to_quarantine(self._detached(corrupt))
        self._end_loads([move for move in ended if move not in corrupt])

    def _arrived(self, moves: list[Move]) -> None:
        """On a reactor's thread."""
        self._services.post(self._loaded, self._detached(moves))

    def _detached(self, moves: Sequence[Move]) -> list[Opened]:
        """Moves whose files NIXL is to forget; on any thread."""
        detach = self._services.transport.detach
        return [(move, detach(move.file)) for move in moves]

    def _loaded(self, loads: list[Opened]) -> None:
        corrupt = [load for load in loads if isinstance(load[0].error, BlockCorrupt)]
        self._ask_to_quarantine(corrupt)
        sound = [load for load in loads if load not in corrupt]
        if not sound:
            return
        for move, _ in sound:
            if move.error is None:
                move.status = "hit"
            else:
                fail(move, move.error)
        self._under_way += 1
        self._services.run(partial(close_files, sound), lambda _: self._end([], 1))
        self._end_loads([move for move, _ in sound])

    def _ask_to_quarantine(self, loads: list[Opened]) -> None:
        self._errands.corrupt += loads
        self._do_errands()

    def _end_loads(self, moves: list[Move]) -> None:
        for move in moves:
            self._unpin(move.place)
            if move.status == "hit":
                self._known.add([known_as(move.place)])
                if not move.mirrored:
                    self._tree.room.note_use(move.place)
            elif move.status == "miss":
                self._known.discard([known_as(move.place)])
        self._end(moves, len(moves))

    def _unpin(self, place: str) -> None:
        left = self._tree.room.pins.pop(place) - 1
        if left:
            self._tree.room.pins[place] = left

    def _end(self, moves: Sequence[Move], under_way: int) -> None:
        """Something has ended: hand moves back, and try again what waits for room."""
        self._under_way -= under_way
        self._progress += 1
        if moves:
            self._services.settle(moves)
        self._errands.stores[:0] = self._waiting
        self._waiting = []
        self._do_errands()

    # --- the next tier ----------------------------------------------------------------

    def owed(self) -> list[tuple[BlockKey, int]]:
        """See ``Tier.owed``; other processes may owe them as well."""
        owed, self._owed = self._owed, []
        return owed

    def mirrored(self, moves: Sequence[Move]) -> None:
        """See ``Tier.mirrored``."""
        self._under_way += len(moves)
        self._errands.mirrored += moves
        self._do_errands()

    # --- storing, quarantining, deleting ----------------------------------------------

    def store(self, moves: Sequence[Move]) -> None:
        """See ``Tier.store``."""
        capacity = self._settings.capacity_bytes
        stores = [Store(move, self._tree.place(move.key)) for move in moves]
        too_big = [store.move for store in stores if store.nbytes > capacity]
        fitting = [store for store in stores if store.nbytes <= capacity]
        for move in too_big:
            move.error = self._no_room(move, "that is more than its capacity")
        self._under_way += len(stores)
        (self._waiting or self._errands.stores).extend(fitting)
        self._do_errands()
        if too_big:
            self._end(too_big, len(too_big))

    def _no_room(self, move: Move, why: str) -> StorageFull:
        capacity = self._settings.capacity_bytes
        return StorageFull(
            f"{self.name}: no room for a block that takes {image_bytes(move.nbytes):,} bytes "
            f"with its stamp: {why}; raise capacity_bytes={capacity:,}"
        )

    def delete(self, key: BlockKey, done: Callable[[bool, Exception | None], None]) -> None:
        """See ``Tier.delete``."""
        self._under_way += 1
        self._errands.deletes.append(Delete(self._tree.place(key), done))
        self._do_errands()

    def expire(self) -> None:
        """See ``Tier.expire``."""
        queued = (*self._waiting, *self._errands.stores)
        gone = [each for each in queued if each.state == "wanted" and each.move.abandoned]
        if gone:
            self._waiting = [store for store in self._waiting if store not in gone]
            self._errands.stores = [store for store in self._errands.stores if store not in gone]
            for store in gone:
                store.move.error = store.move.timeout()
            self._end([store.move for store in gone], len(gone))

    def _do_errands(self) -> None:
        """Start the next job, unless one is running: it will start the next when it ends."""
        errands = self._errands
        wanted = errands.stores or errands.corrupt or errands.deletes or errands.mirrored
        if self._busy or not (wanted or self._known.due):
            return
        self._errands = Errands()
        errands.looks = self._known.take_due()
        self._under_way += len(errands.looks)
        self._busy = True
        ran = partial(self._ran, errands, self._progress)
        self._services.run(partial(self._tree.run, errands), ran)

    def _ran(self, errands: Errands, progress: int, future: Future[None]) -> None:
        self._busy = False
        self._under_way -= len(errands.looks)
        if error := future.exception():
            for store in errands.stores:
                if store.state != "ended":
                    fail(store.move, error)
                    store.state = "ended"
        stored = [store for store in errands.stores if store.move.status]
        self._known.saw(errands.sights)
        self._known.add(known_as(store.place) for store in stored)
        self._known.discard(self._tree.room.take_evicted())
        self._go_on(errands)
        ended = [store.move for store in errands.stores if store.state == "ended"]
        for move, _ in errands.corrupt:
            self._unpin(move.place)
            if not isinstance(move.error, ConfigError | TransferError):  # that block is there
                self._known.discard([known_as(move.place)])
            ended.append(move)
        self._known.discard(known_as(delete.place) for delete in errands.deletes)
        others = len(errands.deletes) + len(errands.mirrored)
        if ended or others:
            self._end(ended, len(ended) + others)
        for delete in errands.deletes:  # after the stores: it may have dropped what they stored
            failed = delete.error or (TransferError(str(error)) if error else None)
            delete.done(delete.there, failed)
        self._look_after_waiting(progress)
        self._do_errands()

    def _go_on(self, errands: Errands) -> None:
        """Move the bytes of stores that have a file; queue those that need another job."""
        going = [store for store in errands.stores if store.state == "open"]
        for store in going:
            self._moving[store.move] = store
        if going:
            self._services.transport.submit([store.move for store in going], self._written)
        again = [store for store in errands.stores if store.state == "wanted"]
        self._errands.stores[:0] = again
        waits = [store for store in errands.stores if store.state == "waits"]
        for store in waits:
            store.state = "ended" if store.move.abandoned else "wanted"
            if store.move.abandoned:
                store.move.error = store.move.timeout()
        self._waiting[:0] = [store for store in waits if store.state == "wanted"]

    def _look_after_waiting(self, progress: int) -> None:
        """See to it that those who wait for room have something to wait for."""
        if not self._waiting:
            return
        if self._progress == progress and self._under_way > len(self._waiting):
            return  # what is under way will call for them when it ends
        waiting, self._waiting = self._waiting, []
        if self._progress == progress and not self._tree.room.reserved:
            for store in waiting:
                store.move.error = self._no_room(store.move, "there is nothing to evict")
            self._end([store.move for store in waiting], len(waiting))
            return
        self._errands.stores[:0] = waiting
        self._errands.pause_s = _PAUSE_S if self._progress == progress else 0.0

    def _written(self, moves: list[Move]) -> None:
        """On a reactor's thread."""
        self._services.post(self._moved, self._detached(moves))

    def _moved(self, moved: list[Opened]) -> None:
        for move, detached in moved:
            store = self._moving.pop(move)
            store.state = "moved"
            store.detached = detached
            self._errands.stores.append(store)
        self._do_errands()
