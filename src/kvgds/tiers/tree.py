"""The directory of the files layout, as the executor sees it.

Owns every file-system call of the layout::

    kvgds.json                          which layout this is
    ledger                              bytes that are taken; changed only under its lock
    openers                             locked (shared) by every engine that has it open
    tmp/<owner>.<random>.<bytes>        being written, for which so many bytes are reserved
    quarantine/                         what proved to be corrupt; the first to be evicted
    owed/<namespace>.<2 hex>.<40 hex>.kv  in a stack: the next tier lacks this block
    <namespace>/namespace.json          what the namespace is, for people
    <namespace>/<2 hex>/<40 hex>.kv     a block's image, named by the blake2b of its key

Names are given without a lock: a block is written as a temporary file, and linked to its
own name once it is whole. Whoever reserves bytes or removes a name holds the ledger's lock;
the ledger counts bytes from before they can be on disk until they are gone, so that a death
at any point leaves it too high, never too low, until all is counted anew (``room``).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from kvgds.blocks import NO_CHECKSUM, PAGE, Stamp, image_bytes, place_of
from kvgds.errors import (
    BlockCorrupt,
    ConfigError,
    KvgdsError,
    StorageFull,
    TransferError,
    explain,
)
from kvgds.paths import NO_ROOM
from kvgds.tiers import locks
from kvgds.tiers.debts import Debts
from kvgds.tiers.folders import (
    SAFE,
    Folders,
    allocate,
    entries_of,
    files_in,
    open_own,
    status,
    subfolders,
    touch,
)
from kvgds.tiers.known import known_as
from kvgds.tiers.ledger import Ledger, Owner, forget_temporary, reserved_by
from kvgds.tiers.room import NAME, Room
from kvgds.transport import File

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

    from kvgds.blocks import BlockKey, Namespace
    from kvgds.config import FileTier
    from kvgds.paths import Move
    from kvgds.tiers.known import Look, Sight

    Opened: TypeAlias = tuple[Move, Future[None]]  # a load with an open file, and its detachment

_RETRIES = 2  # of a store that the disk has no room for: once for its bytes, once for its name
_IN_VAIN = 4
_NO_NAMES_S, _NO_NAMES_MOST_S = 1.0, 64.0
_UNLINKABLE = (errno.EEXIST, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(eq=False, slots=True)
class Store:
    """A store under way.

    Attributes:
        place: path of the block's file.
        state: ``wanted`` until it has a temporary file and is ``open``; ``moved`` when its
            bytes are down; then ``linked``, or ``contested`` if that takes the lock.
        temporary: path of the temporary file, while there is one.
        detached: when NIXL has let go of the descriptor.
        forced: how often the disk was full: something has to be evicted first.
        swept: its temporary was lost once.
    """

    move: Move
    place: str
    state: Literal["wanted", "open", "waits", "moved", "contested", "linked", "ended"] = "wanted"
    temporary: str = ""
    fd: int = -1
    detached: Future[None] | None = None
    forced: int = 0
    swept: bool = False

    @property
    def nbytes(self) -> int:
        """What it takes on disk."""
        return image_bytes(self.move.nbytes)

    @property
    def may_retry(self) -> bool:
        """Whether to try again for want of room, of whatever kind: blocks, inodes, names."""
        over = self.move.abandoned or self.state == "linked"
        return self.forced < _RETRIES and not over

    def again(self) -> None:
        """Begin anew: its temporary is gone, or will be."""
        self.state, self.temporary = "wanted", ""
        self.move.again()


@dataclass(eq=False, slots=True)
class Delete:
    """A block to be removed, and whom to tell."""

    place: str
    done: Callable[[bool, Exception | None], None]
    there: bool = False
    error: Exception | None = None


@dataclass(eq=False, slots=True)
class Errands:
    """What the next job is to do, after a pause if need be; and what it has seen."""

    stores: list[Store] = field(default_factory=list)
    corrupt: list[Opened] = field(default_factory=list)
    deletes: list[Delete] = field(default_factory=list)
    mirrored: list[Move] = field(default_factory=list)  # loads of blocks that are not owed now
    looks: list[Look] = field(default_factory=list)
    sights: list[Sight] = field(default_factory=list)
    pause_s: float = 0.0


class Tree:
    """The directory. Opened and closed with nothing else going on.

    ``run`` is for one thread at a time; loads may be opened beside it.

    Args:
        stacked: whether there is a next tier.

    Attributes:
        direct: O_DIRECT, or 0.
        ledger: the bytes taken by everybody.
        room: what is kept and what goes.
        quarantined: files moved to quarantine.
    """

    def __init__(self, settings: FileTier, namespace: Namespace, *, stacked: bool) -> None:
        self.direct = 0
        self._stacked = stacked
        self._debts: Debts
        self.ledger: Ledger
        self.room: Room
        self.quarantined = 0
        self._settings = settings
        self._power = settings.durable == "power"
        self._namespace = namespace
        self._space = namespace.digest.hex()
        self._owner: Owner
        self._root = self._openers = -1
        self._dropped: list[str] = []  # temporaries to be removed under the lock
        self._in_vain = 0  # stores since something helped that was evicted
        self._no_names_s = _NO_NAMES_S  # how long nothing goes for names, the next time
        self._no_names_until = 0.0

    # --- opening and closing ----------------------------------------------------------

    def open(self) -> None:
        """Make the folders."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        self._root = os.open(self._settings.root, flags)
        self._owner = Owner.me()
        self.ledger = Ledger(self._root)
        capacity = self._settings.capacity_bytes
        self._debts = Debts(self._root, stacked=self._stacked)
        self.room = Room(
            self._root,
            self.ledger,
            self._owner,
            capacity,
            space=self._space,
            debts=self._debts,
        )
        folders = Folders(self._root, power=self._power)
        for name in ("tmp", "quarantine", self._space, *(("owed",) if self._stacked else ())):
            folders.need(name, make=True)
        description = f"{self._space}/namespace.json"
        if status(description, self._root) is None:
            name = self._owner.temporary(0)
            with open(self._create(name), "w", encoding="utf-8") as file:
                json.dump(json.loads(self._namespace.text), file, indent=1)
            self._rename(name, description)
        folders.sync()

    def recover(self) -> None:
        """Clear what dead owners left, and count anew if nobody else has the directory."""
        self._openers = open_own("openers", self._root)
        try:
            locks.lock_nowait(self._openers, fcntl.LOCK_EX)
            alone = True
        except BlockingIOError:
            alone = False
        with self.ledger.held():
            if self.ledger.sound and not alone:  # who counts anew sweeps as well
                self.ledger.add(-self.room.sweep()[2])
            self.room.make(0, 0, alone=alone)
        locks.lock(self._openers, fcntl.LOCK_SH)

    def listing(self, progress: Callable[[str, int, int], None]) -> Iterator[set[bytes]]:
        """The blocks of the namespace, as digests of their keys."""
        fans = list(subfolders(self._space, self._root))
        for done, fan in enumerate(fans, 1):
            yield self._blocks_in(fan)
            progress("listing the blocks", done, len(fans))

    def _blocks_in(self, fan: str) -> set[bytes]:
        entries = entries_of(f"{self._space}/{fan}", self._root)
        return {known_as(entry.name) for entry in entries if NAME.fullmatch(entry.name)}

    def owed(self) -> list[tuple[BlockKey, int]]:
        """Keys and bytes of the namespace's blocks that the next tier may lack."""
        return self._debts.blocks(self._space)

    def close(self) -> None:
        """Let go of the directory."""
        if self._dropped:  # what can't be removed at once is swept by whoever comes next
            with contextlib.suppress(OSError, KvgdsError), self.ledger.held(wait=False):
                if self.ledger.sound:
                    self._drop_all()
        if self._openers >= 0:
            self.room.close()
        for fd in (self._openers, self._root):
            if fd >= 0:
                locks.close(fd)
        self._openers = self._root = -1

    def _create(self, path: str, flags: int = 0) -> int:
        flags |= os.O_RDWR | os.O_CREAT | os.O_EXCL | SAFE
        return os.open(path, flags, 0o600, dir_fd=self._root)

    def _rename(self, path: str, to: str) -> None:
        os.rename(path, to, src_dir_fd=self._root, dst_dir_fd=self._root)

    def place(self, key: BlockKey) -> str:
        """Path of a block's file."""
        return place_of(self._space, key)

    # --- loading ----------------------------------------------------------------------

    def folders(self) -> Folders:
        """What a job that is done in pieces sees of the tree, and hands from piece to piece."""
        return Folders(self._root)

    def prefix(self, keys: Sequence[BlockKey], folders: Folders) -> list[bytes]:
        """What the first keys, as many of them as are there, are known as."""
        seen: list[bytes] = []
        for place in map(self.place, keys):
            try:
                folders.regular(place)
            except OSError:  # not there, or nothing that a load would read
                break
            seen.append(known_as(place))
        return seen

    def open_blocks(self, moves: Sequence[Move]) -> tuple[list[Move], list[Move]]:
        """Open the files of blocks to be loaded: the moves that ended, those that can go."""
        ended: list[Move] = []
        going: list[Move] = []
        folders = Folders(self._root)
        for move in moves:
            try:
                self._open_block(move, folders)
            except Exception as error:  # noqa: BLE001 - it belongs to this move alone
                fail(move, error)
            (ended if move.status or move.error else going).append(move)
        return ended, going

    def _open_block(self, move: Move, folders: Folders) -> None:
        fd, found = folders.open(move.place, self.direct)
        move.file = File(fd, direct=bool(self.direct))
        wanted = image_bytes(move.nbytes)
        if found.st_size != wanted:
            move.error = move.corrupt(f"the file has {found.st_size:,} bytes, not {wanted:,}")
        elif not move.mirrored:
            touch(fd, found)

    def _judge_all(self, moves: Sequence[Move], folders: Folders) -> None:
        for move in moves:
            if isinstance(move.error, BlockCorrupt):
                with contextlib.suppress(OSError):  # it stays, and will be found out again
                    self._judge(move, folders)

    def _judge(self, move: Move, folders: Folders) -> None:
        """Put away a file that did not give its block, unless it is the move that is wrong."""
        fd = move.file.fd
        stamp = _whole_stamp(fd, move)
        if stamp is not None and stamp.nbytes != move.nbytes:
            had = f"the block stored under this key has {stamp.nbytes} bytes"
            rule = f"{had}; give memory of that size"
            move.error = ConfigError("memory", f"{move.nbytes} bytes", rule)
        elif stamp is not None and stamp.algorithm != move.algorithm != NO_CHECKSUM:
            move.error, move.status = None, "miss"  # stored unchecked, and all must be checked
        elif os.path.samestat(found := os.fstat(fd), folders.regular(move.place)):
            folders.need("quarantine", make=True)
            place = f"quarantine/{move.place.replace('/', '.')}.{secrets.token_hex(4)}"
            self._rename(move.place, place)
            self.room.goes_first(place, found)
            self._debts.unmark(move.place)
            self.quarantined += 1

    # --- errands ----------------------------------------------------------------------

    def run(self, errands: Errands) -> None:
        """Do all of it; every part gets an end of its own, or a state to go on from."""
        time.sleep(errands.pause_s)
        folders = Folders(self._root, power=self._power)
        try:
            with contextlib.suppress(OSError):  # no longer, or not just now: that can wait
                errands.sights = [self._look_into(fan, before) for fan, before in errands.looks]
            for move in errands.mirrored:
                with contextlib.suppress(OSError):  # it stays owed
                    self._unmark(move)
            for store in errands.stores:
                step = self._publish if store.state == "moved" else self._look
                self._try(store, step, folders)
            self._settle_accounts(errands, folders)
            for store in errands.stores:
                if store.state == "open":
                    self._try(store, self._allocate, folders)
                elif store.state == "linked":
                    self._try(store, self._acknowledge, folders)
            if self._dropped:
                self._settle_accounts(Errands(), folders)
            with contextlib.suppress(OSError):  # where it is needed that will be told
                self.room.look_ahead(len(errands.stores))
        finally:
            close_files(errands.corrupt)

    def _unmark(self, move: Move) -> None:
        """The next tier has a block that was loaded for it; perhaps another has replaced it."""
        found = status(move.place, self._root)
        if found is None or found.st_size == image_bytes(move.nbytes):
            self._debts.unmark(move.place)

    def _look_into(self, number: int, before: set[bytes]) -> Sight:
        """What has gone from a folder, and come. Who reads it while it changes may miss a name."""
        fan = f"{number:02x}"
        seen = self._blocks_in(fan)
        places = {f"{self._space}/{fan}/{each.hex()}.kv": each for each in before - seen}
        gone = {each for place, each in places.items() if status(place, self._root) is None}
        return gone, seen - before

    def _try(self, store: Store, step: Callable[[Store, Folders], None], folders: Folders) -> None:
        try:
            step(store, folders)
        except Exception as error:  # noqa: BLE001 - it belongs to this store alone
            if self._was_swept(store, error):
                store.swept = True
                store.again()
                return
            self._give_up(store, error)

    def _give_up(self, store: Store, error: Exception) -> None:
        """End a store; or begin it anew, once something has been evicted, if that may help."""
        self._drop_later(store)
        full = _lacks_room(error)
        # Bytes that go make room for bytes. Room for a name may be of another kind.
        for_name = full and isinstance(error, OSError) and store.state != "open"
        if full and store.may_retry and not (for_name and time.monotonic() < self._no_names_until):
            store.forced += 1
            store.again()
            return
        if for_name and store.forced:
            self._count_in_vain()
        fail(store.move, error)
        store.state = "ended"

    def _count_in_vain(self) -> None:
        """What was evicted for a name did not help: not all blocks are to go for that.

        Others may have been quicker, so it takes some such stores in a row.
        """
        self._in_vain += 1
        now = time.monotonic()
        if self._in_vain >= _IN_VAIN and now >= self._no_names_until:
            self._no_names_until = now + self._no_names_s
            self._no_names_s = min(2 * self._no_names_s, _NO_NAMES_MOST_S)

    def _was_swept(self, store: Store, error: Exception) -> bool:
        """Whether a store has lost its temporary: who can't see us live goes by clocks alone."""
        wanted = store.temporary and not (store.swept or store.move.abandoned)
        return bool(wanted and _is_gone(error) and status(store.temporary, self._root) is None)

    def _look(self, store: Store, folders: Folders) -> None:
        """End the store of a block that is there already, and stays."""
        if self._serves(store, folders) and not self._may_go(store.place):
            store.state, store.move.status = "ended", "present"

    def _may_go(self, place: str) -> bool:
        """Whether a block was linked only just: a late owner may yet take it back, or just has."""
        found = status(place, self._root)
        if found is None or found.st_nlink == 1:
            return found is None
        new = any(each.st_ino == found.st_ino for _, each in files_in("tmp", self._root))
        return new or status(place, self._root) is None

    @classmethod
    def _serves(cls, store: Store, folders: Folders) -> bool:
        """Whether there is a file that would do instead; then it has been used just now."""
        try:
            return cls._holds(store, folders)
        except OSError as error:
            if _is_gone(error):
                return False
            raise

    @staticmethod
    def _holds(store: Store, folders: Folders) -> bool:
        move = store.move
        fd, found = folders.open(store.place, 0)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # only the stamp is read
            stamp = _whole_stamp(fd, move)
            if stamp is None or (stamp.nbytes != move.nbytes and not move.mirrored):
                return False  # a promotion replaces nothing
            if move.algorithm not in (NO_CHECKSUM, stamp.algorithm):
                return False
            touch(fd, found)
            return True
        finally:
            os.close(fd)

    def _publish(self, store: Store, folders: Folders) -> None:
        """Give a file whose bytes are down the name of its block."""
        move = store.move
        if store.detached is not None:
            store.detached.result()  # raises: NIXL may still name the descriptor, so leak it
        sound = move.error is None and not move.abandoned
        try:
            if sound:
                touch(store.fd)
            if sound and self._power:
                os.fdatasync(store.fd)
        finally:
            os.close(store.fd)
        if sound:
            self._link(store, folders)
        else:
            self._give_up(store, move.error or move.timeout())

    def _link(self, store: Store, folders: Folders) -> None:
        folder = store.place.rpartition("/")[0]
        folders.need(folder, make=True)
        if not store.move.mirrored:
            self._debts.mark(store.place, folders)
        try:
            os.link(
                store.temporary,
                store.place,
                src_dir_fd=self._root,
                dst_dir_fd=self._root,
                follow_symlinks=False,
            )
        except OSError as error:
            if error.errno not in _UNLINKABLE:
                raise
            store.state = "contested"
            return
        folders.changed.add(folder)
        if store.move.abandoned:  # only just: to be taken back
            store.state = "contested"
            return
        store.state = "linked"
        try:
            os.unlink(store.temporary, dir_fd=self._root)
        except OSError:
            self._drop_later(store)

    def _drop_later(self, store: Store) -> None:
        if store.temporary:
            self._dropped.append(store.temporary)
            store.temporary = ""

    def _acknowledge(self, store: Store, folders: Folders) -> None:
        folders.sync()
        if store.forced:
            self._in_vain, self._no_names_s = 0, _NO_NAMES_S
        store.state, store.move.status = "ended", "stored"

    @staticmethod
    def _allocate(store: Store, _: Folders) -> None:
        """Not under the lock: give the file its length and its blocks on disk."""
        try:
            allocate(store.fd, store.nbytes)
        except OSError:
            os.close(store.fd)
            raise

    # --- errands under the ledger's lock ----------------------------------------------

    def _settle_accounts(self, errands: Errands, folders: Folders) -> None:
        """Whatever reserves bytes or removes names."""
        contested = [store for store in errands.stores if store.state == "contested"]
        wanted = [store for store in errands.stores if store.state == "wanted"]
        corrupt = [move for move, _ in errands.corrupt]
        if not (contested or wanted or self._dropped or corrupt or errands.deletes):
            return
        _look_again(corrupt)
        try:
            with self.ledger.held():
                if not self.ledger.sound:
                    self.room.make(0, 0)
                self._drop_all()
                for store in contested:
                    self._try(store, self._conclude, folders)
                self._judge_all(corrupt, folders)
                for delete in errands.deletes:
                    self._delete(delete, folders)
                self._reserve(wanted, folders)
        except (OSError, KvgdsError) as error:
            for store in (*contested, *wanted):
                if store.state in ("contested", "wanted"):
                    self._drop_later(store)
                    fail(store.move, error)
                    store.state = "ended"
            for delete in errands.deletes:
                delete.error = delete.error or error

    def _drop_all(self) -> None:
        while self._dropped:
            self._drop(self._dropped[-1])
            self._dropped.pop()

    def _drop(self, temporary: str) -> None:
        """Remove a temporary; what it reserved is free, unless it is a block by now."""
        found = status(temporary, self._root)
        if found is not None:
            with contextlib.suppress(FileNotFoundError):  # asked twice, as a network may have been
                os.unlink(temporary, dir_fd=self._root)
            if found.st_nlink == 1:
                self.ledger.add(-reserved_by(temporary))

    def _conclude(self, store: Store, folders: Folders) -> None:
        """End a store that could not just be linked, or was abandoned when it was."""
        move = store.move
        there, mine = status(store.place, self._root), status(store.temporary, self._root)
        linked = there is not None and mine is not None and os.path.samestat(there, mine)
        if move.abandoned:
            if linked:  # and nobody has been told that it is there: that takes our temporary
                self._remove(store.place)
            move.error, store.state = move.timeout(), "ended"
        elif linked:
            store.state = "linked"
        elif there is not None and self._serves(store, folders):
            if there.st_nlink > 1:
                forget_temporary(there.st_ino, self._root)
            move.status, store.state = "present", "ended"
        else:
            self._replace(store, there, folders)
            return
        self._drop(store.temporary)
        store.temporary = ""

    def _replace(self, store: Store, there: os.stat_result | None, folders: Folders) -> None:
        """Rename what could not be linked to its block's name; what has that goes."""
        move = store.move
        if not move.mirrored:  # again: who removed what was there has removed the marker too
            self._debts.mark(store.place, folders)
        if there is not None and there.st_nlink > 1:  # linked only just: it is counted once
            forget_temporary(there.st_ino, self._root)
        self._rename(store.temporary, store.place)
        store.state, store.temporary = "linked", ""
        if move.mirrored:
            self._debts.unmark(store.place)
        self.ledger.add(-there.st_size if there is not None else 0)
        folders.changed.add(store.place.rpartition("/")[0])
        if move.abandoned:  # only just
            self._remove(store.place)
            self.ledger.add(-store.nbytes)
            move.error, store.state = move.timeout(), "ended"

    def _delete(self, delete: Delete, folders: Folders) -> None:
        try:
            found = folders.regular(delete.place)
            if found.st_nlink > 1:  # linked only just
                forget_temporary(found.st_ino, self._root)
            self._remove(delete.place)
            self.ledger.add(-found.st_size)
            folders.changed.add(delete.place.rpartition("/")[0])
            folders.sync()
            delete.there = True
        except FileNotFoundError:
            return
        except OSError as error:
            delete.error = error

    def _remove(self, place: str) -> None:
        """Take a block's name away, and its marker."""
        os.unlink(place, dir_fd=self._root)
        self._debts.unmark(place)

    def _reserve(self, wanted: list[Store], folders: Folders) -> None:
        """Give stores their bytes and a temporary file each, as far as the capacity goes."""
        if not wanted:
            return
        self.room.foresee()
        folders.need("tmp", make=True)
        self._reserve_all([store for store in wanted if not store.move.mirrored], folders)
        promotions = [store for store in wanted if store.move.mirrored]
        self._reserve_all(promotions, folders, spare=True)
        for store in promotions:
            if store.state == "waits":  # the next tier may lack what it would have to wait for
                store.move.error = StorageFull("there is no room yet for a promotion")
                store.state = "ended"

    def _reserve_all(self, wanted: list[Store], folders: Folders, *, spare: bool = False) -> None:
        if not wanted:
            return
        capacity = self._settings.capacity_bytes
        need = min(sum(store.nbytes for store in wanted), capacity)
        forced = sum(store.nbytes for store in wanted if store.forced)
        if forced or self.ledger.used + need > capacity:
            freed = self.room.make(need, forced, spare=spare)
            for store in wanted:
                if store.forced and not freed:
                    store.move.error = _disk_full("there is nothing to evict")
                    store.state = "ended"
        for store in wanted:
            if store.state == "wanted":
                if self.ledger.used + store.nbytes > capacity:
                    store.state = "waits"
                else:
                    self._try(store, self._open_temporary, folders)

    def _open_temporary(self, store: Store, _: Folders) -> None:
        path = self._owner.temporary(store.nbytes)
        self.ledger.add(store.nbytes)
        try:
            store.fd = self._create(path, self.direct)
        except BaseException:
            with contextlib.suppress(OSError):  # made all the same, if only the answer was lost
                os.unlink(path, dir_fd=self._root)
            self.ledger.add(-store.nbytes)
            raise
        store.temporary, store.state = path, "open"
        store.move.file, store.move.offset = File(store.fd, direct=bool(self.direct)), 0


def _whole_stamp(fd: int, move: Move) -> Stamp | None:
    """The stamp of a file that is the move's block and as long as it says, else None."""
    with mmap.mmap(-1, PAGE) as page:  # aligned, for direct I/O
        stamp = Stamp.decode(page[: os.preadv(fd, [page], 0)])
    if stamp is None or (stamp.namespace, stamp.key) != (move.namespace, move.key):
        return None
    return stamp if os.fstat(fd).st_size == image_bytes(stamp.nbytes) else None


def _look_again(moves: Sequence[Move]) -> None:
    """At those that came into the caller's memory. Of a file of another length nothing has come."""
    for move in moves:
        with contextlib.suppress(OSError):
            whole = os.fstat(move.file.fd).st_size == image_bytes(move.nbytes)
            if move.path.holds and whole:
                move.look_again()


def close_files(loads: list[Opened]) -> None:
    """Close the files of loads that have ended."""
    for move, detached in loads:
        if detached.exception() is None:  # else NIXL may still name it: leak it
            with contextlib.suppress(OSError):  # closed all the same, and nothing was written
                os.close(move.file.fd)


def fail(move: Move, error: BaseException) -> None:
    """Record why a move could not go on; a load of what is gone is a miss."""
    if _is_gone(error) and not move.write:
        move.error, move.status = None, "miss"
    elif move.write and _lacks_room(error):
        move.error = _disk_full(explain(error) if isinstance(error, OSError) else str(error))
    elif isinstance(error, KvgdsError):
        move.error = error
    elif isinstance(error, OSError):
        move.error = TransferError(explain(error), errno=error.errno, **move.context)
        move.error.__cause__ = error
    else:
        move.fail(error)  # type: ignore[arg-type]


def _is_gone(error: BaseException | None) -> bool:
    """Whether somebody, perhaps on another host, has removed the file meanwhile."""
    return isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ESTALE)


def _lacks_room(error: BaseException) -> bool:
    """Whether the disk has no room for it; evicting may make some."""
    return isinstance(error, OSError | TransferError) and error.errno in NO_ROOM


def _disk_full(why: str) -> StorageFull:
    return StorageFull(f"the disk is full: {why}; free space, or lower capacity_bytes")
