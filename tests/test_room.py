"""Eviction from a directory of many files: the oldest go, and no store looks at all of them."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from typing import TYPE_CHECKING

import pytest

from kvgds import BlockCorrupt
from kvgds.tiers.debts import Debts
from kvgds.tiers.folders import Folders
from kvgds.tiers.ledger import Ledger, Owner
from kvgds.tiers.room import Room
from sharing import HOUR, flip, leave, opened, owner, path_of, taken
from support import NAMESPACE, PAGE, digest, image

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

MANY = 2000
SIZE = 2 * PAGE  # of the image of a block of a page
CAPACITY = MANY * SIZE
DEAD = 1 << 22  # no process has this number


class Directory(Room):
    """Full of blocks, named by numbers, and counted as when it is opened; counts looks at files.

    Or empty, with room for so many (``fill``); or the same as a second engine has it (``other``).
    """

    def __init__(
        self,
        path: Path,
        blocks: int = MANY,
        *,
        fill: bool = True,
        other: Directory | None = None,
        owed: bool = False,
    ) -> None:
        self.path = path
        self.capacity = blocks * SIZE
        self.looks = 0
        self.number: Iterator[int] = itertools.count() if other is None else other.number
        self.fd = os.open(path, os.O_RDONLY)
        self.ledger = Ledger(self.fd)
        (path / "tmp").mkdir(exist_ok=True)
        debts = Debts(self.fd, stacked=owed)
        super().__init__(
            self.fd,
            self.ledger,
            Owner.me(),
            self.capacity,
            space=digest(NAMESPACE).hex(),
            debts=debts,
        )
        for number in range(blocks if fill and other is None else 0):
            self.put()
            if owed:
                debts.mark(self.place(number), Folders(self.fd))
        with self.ledger.held():
            self.make(0, 0, alone=True)

    def walk(self) -> Generator[tuple[str, os.stat_result], None, None]:
        for each in super().walk():
            self.looks += 1
            yield each

    def close(self) -> None:
        super().close()
        os.close(self.fd)

    def put(self) -> Path:
        """A new block, used later than all before it."""
        number = next(self.number)
        path = self.at(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(SIZE)
        os.utime(path, ns=(number + 1, number + 1))
        return path

    def at(self, number: int) -> Path:
        return path_of(self.path, b"%d" % number)

    def place(self, number: int) -> str:
        return str(self.at(number).relative_to(self.path))

    def left(self) -> list[int]:
        """Numbers of the blocks that are there."""
        return [number for number in range(next(self.number)) if self.at(number).exists()]

    def promote(self) -> bool:
        """What a promotion of one block does in its first job; whether there is room for it."""
        before = self.looks
        with self.ledger.held():
            self.foresee()
            self.make(SIZE, 0, spare=True)
            there = self.ledger.used + SIZE <= self.capacity
        self.look_ahead(1)
        assert self.looks - before <= 16
        return there

    def store(self) -> int:
        """What a store of one block does in its two jobs; how many files it has looked at."""
        before = self.looks
        with self.ledger.held():
            self.foresee()
            if self.ledger.used + SIZE > self.capacity:
                self.make(SIZE, 0)
            assert self.ledger.used + SIZE <= self.capacity
            self.ledger.add(SIZE)
        self.put()
        for _ in range(2):
            self.look_ahead(1)
        return self.looks - before


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    room = Directory(tmp_path)
    yield room
    room.close()


def test_each_store_looks_at_some_files(directory: Directory) -> None:
    """All are looked at, again and again, but never at once; and yet the oldest go."""
    looks = [directory.store() for _ in range(MANY)]
    assert max(looks) <= 32
    assert 10 * MANY < sum(looks) < 25 * MANY
    left = directory.left()
    assert left == list(range(left[0], 2 * MANY))
    assert MANY - 64 <= len(left) <= MANY
    with directory.ledger.held():
        assert directory.ledger.used == taken(directory.path)


def test_a_directory_that_has_filled_is_not_looked_at_at_once(tmp_path: Path) -> None:
    """Though there were few files, none even, when an engine opened it alone and counted them."""
    room = Directory(tmp_path, fill=False)
    looks = [room.store() for _ in range(MANY + 100)]
    assert max(looks) <= 32
    left = room.left()
    assert left == list(range(left[0], MANY + 100))
    assert MANY - 64 <= len(left) <= MANY
    room.close()


def test_engines_that_evict_from_one_directory_look_at_more(directory: Directory) -> None:
    """Each finds that what it has listed goes by the hand of all; none looks at all at once."""
    others = [Directory(directory.path, other=directory) for _ in range(3)]
    looks = [each.store() for _ in range(MANY // 4) for each in (directory, *others)]
    assert max(looks) <= 2 * (16 + 256)
    left = directory.left()
    assert left == list(range(left[0], 2 * MANY))
    assert MANY - 64 <= len(left) <= MANY
    for each in others:
        each.close()


def test_what_is_used_meanwhile_stays(directory: Directory) -> None:
    """By others, who mark it, and by this engine, which may not; and what is being loaded."""
    directory.store()
    with directory.ledger.held():
        os.utime(directory.at(100))
        directory.note_use(f"{directory.at(101).relative_to(directory.path)}")
        directory.pins[f"{directory.at(102).relative_to(directory.path)}"] = 1
    for _ in range(150):
        directory.store()
    assert [number for number in directory.left() if number < 150] == [100, 101, 102]


def test_what_has_gone_untold_is_noticed(directory: Directory) -> None:
    """Somebody has removed much by hand: soon all is counted, and nothing evicted for a while."""
    directory.store()
    for number in range(1000, 1500):
        directory.at(number).unlink()
    looks = [directory.store() for _ in range(500)]
    assert [look > 32 for look in looks].count(True) == 1
    assert directory.evictions < 200
    with directory.ledger.held():
        assert directory.ledger.used == taken(directory.path)


def test_what_the_dead_reserve_comes_back(directory: Directory) -> None:
    leave(directory.path, owner(os.getpid(), start=1), 100 * SIZE)
    with directory.ledger.held():
        directory.ledger.add(100 * SIZE)
    for _ in range(MANY // 5):
        directory.store()
    assert not os.listdir(directory.path / "tmp")
    with directory.ledger.held():
        assert directory.ledger.used == taken(directory.path)


def test_room_is_made_whatever_others_have_stored(directory: Directory) -> None:
    """Whose capacity is larger: far more is to go than is listed."""
    for _ in range(600):
        directory.put()
    with directory.ledger.held():
        directory.ledger.add(600 * SIZE)
    directory.store()
    assert len(directory.left()) <= MANY


def test_what_the_next_tier_has_taken_since_it_was_listed_goes(tmp_path: Path) -> None:
    room = Directory(tmp_path, owed=True)
    assert not room.promote()
    room.debts.unmark(room.place(0))
    assert room.promote()
    assert room.left() == list(range(1, MANY))
    room.close()


def test_one_block_that_stays_owed_keeps_no_promotion_out(tmp_path: Path) -> None:
    """Though it goes before those that the next tier has taken since they were listed."""
    room = Directory(tmp_path, owed=True)
    assert not any(room.promote() for _ in range(MANY // 8))
    for number in range(1, MANY):
        room.debts.unmark(room.place(number))
    assert any(room.promote() for _ in range(MANY // 4))
    assert room.at(0).exists()
    assert room.dropped == 0
    room.close()


def test_a_few_files_are_counted_each_time(tmp_path: Path) -> None:
    """So that whatever became of them is known at once."""
    room = Directory(tmp_path, 8)
    room.at(7).unlink()
    assert room.store() == 7
    assert room.left() == [0, 1, 2, 3, 4, 5, 6, 8]
    room.close()


async def test_an_engine_on_a_directory_that_is_full(tmp_path: Path) -> None:
    """The oldest go; and if it is closed in the midst of a search, no folder is left open."""
    root = tmp_path / "kv"
    async with opened(root, capacity_bytes=CAPACITY):
        pass
    old = [b"old %d" % i for i in range(MANY)]

    def fill() -> None:
        now = time.time()
        for i, key in enumerate(old):
            path = path_of(root, key)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(image(NAMESPACE, key, 0, bytes(PAGE)))
            os.utime(path, (now - HOUR, now - HOUR + i))

    await asyncio.to_thread(fill)
    async with opened(root, capacity_bytes=CAPACITY) as engine:
        assert await engine.load(old[0], bytearray(PAGE))
        for i in range(130):
            assert await engine.store(b"new %d" % i, bytes(PAGE))
        assert await engine.load(old[0], bytearray(PAGE))
        left = [path_of(root, key).exists() for key in old]
        gone = left.index(False), left.index(True, 1)
        assert gone[0] == 1
        assert 130 < gone[1] < 170
        assert all(left[gone[1] :])
        assert await asyncio.to_thread(taken, root) <= CAPACITY
        flip(path_of(root, old[-1]), PAGE)
        with pytest.raises(BlockCorrupt):
            await engine.load(old[-1], bytearray(PAGE))
        assert len(os.listdir(root / "quarantine")) == 1
        for i in range(64):  # room is made for 33 at a time
            assert await engine.store(b"newer %d" % i, bytes(PAGE))
        assert os.listdir(root / "quarantine") == []
