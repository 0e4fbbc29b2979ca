"""The slab layout against the contract, and what only it can get wrong."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import shutil
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import support
from faults import FaultyDisk, fill_up, read_only, small_disk
from kvgds import (
    BlockCorrupt,
    ConfigError,
    FileTier,
    Namespace,
    PathUnavailable,
    StorageFull,
    TransferError,
    TransferTimeout,
    open_engine,
)
from kvgds.testing import FileTierContract, HeldTransport
from kvgds.tiers.space import slabs_in, slot_bytes_for
from kvgds.transport import NixlTransport
from support import (
    MIB,
    PAGE,
    Watched,
    aligned,
    config,
    content,
    index_held,
    opened,
    places,
    read_at,
    rows_kept,
    spoil,
    stored,
    turns,
    until,
    write_at,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZE = 3 * PAGE


class TestSlabs(FileTierContract):
    def make_tiers(self, root: Path, **changes: Any) -> tuple[FileTier]:
        return (FileTier(**{"root": root, "capacity_bytes": 64 << 20, **changes}),)

    def side_get(self, root: Path, namespace: Namespace, key: bytes) -> bytes | None:
        return support.stored(root, key, namespace)

    def side_set(self, root: Path, namespace: Namespace, key: bytes, payload: bytes) -> None:
        support.put(root, key, payload, namespace)

    def side_spoil(self, root: Path, namespace: Namespace, key: bytes, at: int) -> None:
        support.spoil(root, key, at, namespace)


# --- the order of things ------------------------------------------------------------------------


async def test_the_index_names_a_block_only_once_it_is_down(tmp_path: Path) -> None:
    """While its bytes are not reported as written, nothing on disk says that it exists."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        engine.held.hold("landing")
        storing = asyncio.ensure_future(engine.store(b"a", content(b"a", SIZE)))
        await engine.held.wait_held("landing")
        assert await engine.prefix([b"a"]) == 0
        assert await asyncio.to_thread(places, root) == {}
        engine.held.release()
        assert await storing
        assert list(await asyncio.to_thread(places, root)) == [b"a"]


async def test_a_slot_is_used_again_only_once_its_removal_is_durable(tmp_path: Path) -> None:
    """The disk keeps the index's commit waiting: until then, the old block's bytes stay."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root, tier={"capacity_bytes": PAGE + SIZE}) as engine:
            assert await engine.store(b"old", content(b"old", SIZE))
            place = (await asyncio.to_thread(places, root))[b"old"]
            disk.hang("write", match="index.db*")
            storing = asyncio.ensure_future(engine.store(b"new", content(b"new", SIZE)))
            await asyncio.to_thread(disk.wait_waiting, 1)
            await turns()
            assert engine.held.submitted == 1
            backing = disk.backing / "kv" / place.path.name
            assert read_at(backing, place.offset + PAGE, SIZE) == content(b"old", SIZE)
            await asyncio.to_thread(disk.release)
            assert await storing
            assert stored(disk.backing / "kv", b"new") == content(b"new", SIZE)


async def test_a_slot_that_is_being_read_is_not_used_again(tmp_path: Path) -> None:
    """Deleted under a load: the load gets its bytes, and only then is the slot free."""
    async with opened(tmp_path / "kv", tier={"capacity_bytes": PAGE + SIZE}) as engine:
        assert await engine.store(b"old", content(b"old", SIZE))
        engine.held.hold("start", lambda transfer: not transfer.write)
        memory = bytearray(SIZE)
        loading = asyncio.ensure_future(engine.load(b"old", memory))
        await engine.held.wait_held("start")
        assert await engine.delete(b"old")
        before = engine.held.submitted
        storing = asyncio.ensure_future(engine.store(b"new", content(b"new", SIZE)))
        await turns()
        assert engine.held.submitted == before
        engine.held.release()
        assert await loading
        assert memory == content(b"old", SIZE)
        assert await storing


# --- stored bytes that are wrong ------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["full", "stamp"])
async def test_another_blocks_image_is_not_this_block(tmp_path: Path, verify: str) -> None:
    """A whole, sound image in the wrong slot: the stamp tells."""
    root = tmp_path / "kv"
    async with opened(root, tier={"verify": verify}) as engine:
        for key in (b"a", b"b"):
            assert await engine.store(key, content(key, SIZE))
    one, two = (support.places(root)[key] for key in (b"a", b"b"))
    write_at(two.path, two.offset, read_at(one.path, one.offset, PAGE + SIZE))
    async with opened(root, tier={"verify": verify}) as engine:
        with pytest.raises(BlockCorrupt, match="another block"):
            await engine.load(b"b", bytearray(SIZE))
        assert await engine.load(b"a", bytearray(SIZE))


@pytest.mark.parametrize("verify", ["full", "stamp"])
async def test_an_older_image_of_the_same_key_is_not_this_block(
    tmp_path: Path, verify: str
) -> None:
    """What the slot held before, under the same key: the generation tells."""
    root = tmp_path / "kv"
    tier = {"verify": verify, "capacity_bytes": PAGE + SIZE}
    async with opened(root, tier=tier) as engine:
        assert await engine.store(b"a", content("older", SIZE))
    place = support.places(root)[b"a"]
    older = read_at(place.path, place.offset, PAGE + SIZE)
    async with opened(root, tier=tier) as engine:
        assert await engine.delete(b"a")
        assert await engine.store(b"a", content("newer", SIZE))
        await asyncio.to_thread(write_at, place.path, place.offset, older)
        with pytest.raises(BlockCorrupt, match="generation"):
            await engine.load(b"a", bytearray(SIZE))


@pytest.mark.parametrize("verify", ["full", "stamp"])
async def test_a_whole_image_of_another_length_is_not_this_block(
    tmp_path: Path, verify: str
) -> None:
    """Right key, right generation, right checksum of its own payload: the length tells."""
    root = tmp_path / "kv"
    async with opened(root, tier={"verify": verify}) as engine:
        assert await engine.store(b"a", content(b"a", SIZE))
        place = (await asyncio.to_thread(places, root))[b"a"]
        other = support.image(support.NAMESPACE, b"a", place.generation, content(b"a", SIZE - 1))
        await asyncio.to_thread(write_at, place.path, place.offset, other)
        with pytest.raises(BlockCorrupt, match="bytes"):
            await engine.load(b"a", bytearray(SIZE))


@pytest.mark.parametrize("at", [0, 8, 12, 16, 32, 40, 48, 64, 65, 70])
async def test_every_byte_of_a_stamp_counts(tmp_path: Path, at: int) -> None:
    """Magic, version, algorithm, lengths, namespace, generation, checksums, key."""
    root = tmp_path / "kv"
    async with opened(root, tier={"verify": "stamp"}) as engine:
        assert await engine.store(b"a", content(b"a", SIZE))
        await asyncio.to_thread(support.spoil, root, b"a", at)
        with pytest.raises(BlockCorrupt, match="stamp"):
            await engine.load(b"a", bytearray(SIZE))


async def test_a_corrupt_slot_is_never_used_again(tmp_path: Path) -> None:
    """Quarantine outlives the engine: of two slots, only one is left."""
    root = tmp_path / "kv"
    tier = {"capacity_bytes": 2 * (PAGE + SIZE)}
    async with opened(root, tier=tier) as engine:
        assert await engine.store(b"a", content(b"a", SIZE))
        bad = (await asyncio.to_thread(places, root))[b"a"].slot
        await asyncio.to_thread(support.spoil, root, b"a")
        with pytest.raises(BlockCorrupt):
            await engine.load(b"a", bytearray(SIZE))
    for _ in range(2):
        async with opened(root, tier=tier) as engine:
            for key in (b"b", b"c", b"d"):
                await engine.store(key, content(key, SIZE))
                assert bad not in {place.slot for place in places(root).values()}
            assert await engine.prefix([b"d"]) == 1


async def test_a_slot_that_could_not_be_written_is_used_last(tmp_path: Path) -> None:
    """If the place is bad, who stores again is not to meet it."""
    tier = {"capacity_bytes": 64 * 3 * (PAGE + SIZE)}  # a slab has three slots
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv", tier=tier) as engine:
            for key in (b"a", b"b", b"c"):
                assert await engine.store(key, content(key, SIZE))
            there = places(disk.root / "kv")
            for key in (b"a", b"b"):
                assert await engine.delete(key)
            disk.fail("write", match="slab-*")
            with pytest.raises(TransferError):
                await engine.store(b"d", content(b"d", SIZE))
            disk.clear()
            assert await engine.store(b"d", content(b"d", SIZE))
            assert places(disk.root / "kv")[b"d"].slot == there[b"a"].slot


async def test_who_waits_for_room_gets_the_slot_of_a_store_that_fails(tmp_path: Path) -> None:
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv", tier={"capacity_bytes": PAGE + SIZE}) as engine:
            engine.held.hold("start")
            first = asyncio.ensure_future(engine.store(b"a", content(b"a", SIZE)))
            await engine.held.wait_held("start")
            second = asyncio.ensure_future(engine.store(b"b", content(b"b", SIZE)))
            await turns()
            disk.fail("write", match="slab-*")
            engine.held.step("start")
            with pytest.raises(TransferError):
                await first
            disk.clear()
            engine.held.release()
            await until(second.done)
            assert await second


async def test_two_rows_for_one_key(tmp_path: Path) -> None:
    """A death between a replacement and the removal of the old row: the newer one counts."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        assert await engine.store(b"a", content("first", SIZE))
    row = index_rows(root)[0]
    async with opened(root) as engine:
        assert await engine.store(b"a", content("second", SIZE - 5))
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database, database:
        # used later than the newer one, as when it was loaded while that was being written
        database.execute("INSERT INTO block VALUES (?,?,?,?,?,?,?,0)", (*row[:6], 1 << 60))
    async with opened(root, tier={"capacity_bytes": MIB}) as engine:
        memory = bytearray(SIZE - 5)
        assert await engine.load(b"a", memory)
        assert memory == content("second", SIZE - 5)
        for i in range(100):  # both rows are evicted in their turn
            assert await engine.store(b"%d" % i, content(i, SIZE))
        assert await engine.prefix([b"a"]) == 0


def index_rows(root: Path) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database:
        return database.execute("SELECT * FROM block").fetchall()


# --- directories that are not as they should be -------------------------------------------------


async def filled(root: Path) -> list[bytes]:
    """Three slabs of blocks."""
    keys = [b"%d" % i for i in range(40)]
    async with opened(root) as engine:
        for key in keys:
            assert await engine.store(key, content(key, SIZE))
    return keys


async def whole(root: Path, keys: list[bytes]) -> list[bytes]:
    """Which blocks are there; those that are there are right."""
    async with opened(root) as engine:
        there = []
        for key in keys:
            memory = bytearray(SIZE)
            if await engine.load(key, memory):
                assert memory == content(key, SIZE)
                there.append(key)
        await engine.store(b"one more", content(b"one more", SIZE))
        return there


async def test_what_was_left_lying_about_is_swept(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    keys = await filled(root)
    for name in (
        "slab-00000077-16384.kv",
        ".trial-1-0a",
        ".kvgds.json-0a",
        "slab-00000000-4096.kv",
    ):
        (root / name).write_bytes(b"x")
    assert await whole(root, keys) == keys


async def test_of_two_slabs_of_one_number_the_index_knows_which_is_its_own(tmp_path: Path) -> None:
    """Whichever the file system lists first."""
    root = tmp_path / "kv"
    keys = await filled(root)
    slab = min(root.glob("slab-*"))
    for pages in range(50, 80):
        (root / f"slab-00000000-{pages * PAGE}.kv").write_bytes(b"x")
    slab.rename(tmp_path / "slab")
    shutil.copy(tmp_path / "slab", slab)
    assert await whole(root, keys) == keys


async def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    await filled(root)
    for name in ("README", "slab-1.kv", "slab-00000001-16384.kv.bak"):
        (root / name).write_text("somebody else's")
    async with open_engine(config(root)):
        pass
    for name in ("README", "slab-1.kv", "slab-00000001-16384.kv.bak"):
        assert (root / name).read_text() == "somebody else's"


async def test_a_slab_that_lost_its_end(tmp_path: Path) -> None:
    """Blocks behind the cut are misses, those before it load, and the slab is whole again."""
    root = tmp_path / "kv"
    keys = await filled(root)
    slab = min(root.glob("slab-*"))
    size = slab.stat().st_size
    os.truncate(slab, 5 * (PAGE + SIZE) + 100)
    assert await whole(root, keys) == [*keys[:5], *keys[16:]]
    assert slab.stat().st_size == size


async def test_a_slab_that_is_gone(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    keys = await filled(root)
    min(root.glob("slab-*")).unlink()
    assert await whole(root, keys) == keys[16:]


def plant_link(root: Path, name: str) -> Path:
    """Put a link to a file that would do just as well in the place of one of ours."""
    target = root.parent / "target"
    (root / name).rename(target)
    (root / name).symlink_to(target)
    return target


@pytest.mark.parametrize("name", ["kvgds.json", "lock", "index.db", "slab"])
async def test_a_planted_symlink_is_not_followed(tmp_path: Path, name: str) -> None:
    root = tmp_path / "kv"
    await filled(root)
    target = plant_link(root, min(root.glob("slab-*")).name if name == "slab" else name)
    before = target.read_bytes()
    for _ in range(2):
        with pytest.raises(ConfigError):
            async with open_engine(config(root)):
                pass
    assert target.read_bytes() == before


def make_file(root: Path) -> None:
    root.write_text("a file")


def make_marker(text: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        root.mkdir()
        (root / "kvgds.json").write_text(text)

    return make


def make_index(*statements: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        root.mkdir()
        with contextlib.closing(sqlite3.connect(root / "index.db")) as database, database:
            for statement in statements:
                database.execute(statement)

    return make


def make_garbage(root: Path) -> None:
    root.mkdir()
    (root / "index.db").write_bytes(b"garbage" * 4096)


def make_slab_folder(root: Path) -> None:
    root.mkdir()
    (root / "slab-00000000-16384.kv").mkdir()


def make_index_folder(root: Path) -> None:
    root.mkdir()
    (root / "index.db").mkdir()


BAD_ROOTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no parent": (lambda root: root.parent.rmdir(), "parent"),
    "a file": (make_file, "not a directory"),
    "another layout": (make_marker('{"format": 1, "layout": "files"}'), "layout"),
    "a newer marker": (make_marker('{"format": 2, "layout": "slabs"}'), "layout"),
    "no marker at all": (make_marker("[1]"), "layout"),
    "a garbled marker": (make_marker("{"), "can't be read.* write .*slabs"),
    "another program's database": (make_index("CREATE TABLE t (x)"), "not an index"),
    "a newer index": (
        make_index(
            "PRAGMA application_id=1802921828", "PRAGMA user_version=99", "CREATE TABLE t (x)"
        ),
        "newer",
    ),
    "a garbled index": (make_garbage, "damaged"),
    "a folder named like a slab": (make_slab_folder, "can't be used"),
    "a folder named like the index": (make_index_folder, "can't be opened"),
}


@pytest.mark.parametrize("case", BAD_ROOTS)
async def test_roots_that_can_not_be_used(tmp_path: Path, case: str) -> None:
    """One error that says what is wrong; and nothing is left locked or running."""
    make, said = BAD_ROOTS[case]
    root = tmp_path / "parent" / "kv"
    root.parent.mkdir()
    make(root)
    for _ in range(2):
        with pytest.raises(ConfigError, match=said):
            async with open_engine(config(root)):
                pass
    if root.parent.exists():
        root.rename(tmp_path / "aside")
        async with opened(root):
            pass


async def test_a_read_only_directory(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    keys = await filled(root)
    with read_only(root), pytest.raises(ConfigError, match=r"written|used|opened"):
        async with open_engine(config(root)):
            pass
    assert await whole(root, keys) == keys


@pytest.mark.parametrize("op", ["create", "write", "fallocate"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
async def test_a_disk_that_refuses_at_opening(tmp_path: Path, op: Any, number: int) -> None:
    """An error of ours, and with the disk well again the directory opens."""
    with FaultyDisk(tmp_path) as disk:
        disk.fail(op, number)
        with contextlib.suppress(ConfigError):
            async with open_engine(config(disk.root / "kv")) as engine:
                with pytest.raises((StorageFull, TransferError)):
                    await engine.store(b"a", bytes(8))
        disk.clear()
        async with opened(disk.root / "kv") as engine:
            assert await engine.store(b"a", bytes(8))


async def test_a_disk_that_vanishes(tmp_path: Path) -> None:
    """Every operation fails with an error of ours, and closing does not hang."""
    with FaultyDisk(tmp_path) as disk:
        engine = Watched(config(disk.root / "kv"), HeldTransport(NixlTransport()))
        await engine.open()
        await engine.store(b"a", content(b"a", SIZE))
        disk.vanish()
        for _ in range(2):
            with pytest.raises(TransferError):
                await engine.load(b"a", bytearray(SIZE))
            with pytest.raises((TransferError, StorageFull)):
                await engine.store(b"b", content(b"b", SIZE))
        with contextlib.suppress(OSError, sqlite3.Error):
            await engine.aclose()


async def test_direct_io_that_only_seems_to_work(tmp_path: Path) -> None:
    """Accepted at open, refused at write: `require` says so, `auto` decides once, and says so."""
    with FaultyDisk(tmp_path) as disk:
        disk.fail("write", errno.EINVAL, direct=True)
        with pytest.raises(PathUnavailable, match="O_DIRECT") as caught:
            async with open_engine(config(disk.root / "kv", tier={"direct_io": "require"})):
                pass
        assert any("write" in line for line in caught.value.report)
        async with opened(disk.root / "kv") as engine:
            plan = engine.plan[0]
            assert not plan.direct_io
            assert any("O_DIRECT" in line for line in plan.refused)
            assert await engine.store(b"a", content(b"a", SIZE))
            disk.clear()
            assert engine.plan == (plan,)
        async with opened(disk.root / "kv", tier={"direct_io": "require"}) as engine:
            assert engine.plan[0].direct_io
            assert await engine.load(b"a", bytearray(SIZE))


# --- sizes ----------------------------------------------------------------------------------------


@given(st.integers(1, 1 << 40))
def test_slots_are_little_larger_than_their_blocks(nbytes: int) -> None:
    """Whole pages, room for stamp and payload, at most a 64th more."""
    slot = slot_bytes_for(nbytes)
    image = PAGE + -(-nbytes // PAGE) * PAGE
    assert slot % PAGE == 0
    assert image <= slot <= image + max(PAGE - 1, image // 64)
    assert slot_bytes_for(nbytes + 1) >= slot


def test_there_are_few_sizes_of_slots() -> None:
    sizes = {slot_bytes_for(nbytes) for nbytes in range(1, 64 * MIB, 4097)}
    assert len(sizes) < 64 * 14


# --- rows that must not come back ---------------------------------------------------------------


async def test_a_replaced_block_stays_gone(tmp_path: Path) -> None:
    """The process died after a replacement was committed and before the old row went."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        await engine.store(b"k", bytes(SIZE))
        await engine.store(b"other", bytes(SIZE))
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database, database:
        old = database.execute("SELECT * FROM block WHERE key = ?", (b"k",)).fetchone()
    async with opened(root) as engine:
        await engine.store(b"k", bytes(2 * SIZE))
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database, database:
        database.execute("INSERT INTO block VALUES (?,?,?,?,?,?,?,?)", old)
    async with opened(root) as engine:
        assert await engine.load(b"k", bytearray(2 * SIZE))
        assert await engine.delete(b"k")
    async with opened(root) as engine:
        assert await engine.prefix([b"k"]) == 0
        assert await engine.prefix([b"other"]) == 1


async def replaced(engine: Watched) -> bytes:
    """Store a block and, of another size, what takes its place: that."""
    assert await engine.store(b"key", content(b"old", SIZE))
    new = content(b"new", 2 * SIZE)
    assert await engine.store(b"key", new)
    await until(engine.tier_idle)
    return new


async def test_a_block_whose_removal_fails_does_not_come_back(tmp_path: Path) -> None:
    """Another of its key has taken its place: that stays the one, and counts once."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        with rows_kept(root):
            new = await replaced(engine)
            memory = bytearray(2 * SIZE)
            assert await engine.load(b"key", memory)
            assert memory == new
            assert engine.statistics().tiers[0].blocks == 1
    async with opened(root) as engine:
        memory = bytearray(2 * SIZE)
        assert await engine.load(b"key", memory)
        assert memory == new


async def test_what_was_replaced_and_could_not_be_removed_is_deleted_as_well(
    tmp_path: Path,
) -> None:
    """It would be back after a restart."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        with rows_kept(root):
            new = await replaced(engine)
            with pytest.raises(TransferError, match=": no"):
                await engine.delete(b"key")
            memory = bytearray(2 * SIZE)
            assert await engine.load(b"key", memory)
            assert memory == new
        assert await engine.delete(b"key")
        assert engine.statistics().tiers[0].bytes_used == 0
    async with opened(root) as engine:
        assert await engine.prefix([b"key"]) == 0


async def test_what_was_replaced_and_evicted_in_vain_is_deleted_as_well(tmp_path: Path) -> None:
    """An index from which nothing can be removed seldom fails once alone."""
    root, tier = tmp_path / "kv", {"capacity_bytes": 2 * 64 * (PAGE + SIZE)}
    async with opened(root, tier=tier) as engine:
        with rows_kept(root):
            await replaced(engine)
            items = [(b"%d" % i, content(i, SIZE)) for i in range(2 * 64)]
            outcomes = await engine.store_many(items)
            assert any(": no" in str(each.error) for each in outcomes)
            await until(engine.tier_idle)
        assert await engine.delete(b"key")
    async with opened(root, tier=tier) as engine:
        assert await engine.prefix([b"key"]) == 0


async def test_a_late_store_that_could_not_be_removed_is_deleted_as_well(tmp_path: Path) -> None:
    """It has a row that leads to nothing here, but would after a restart."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        assert await engine.store(b"other", content(b"other", SIZE))  # there is a slab then
        with rows_kept(root):
            with index_held(root), pytest.raises(TransferTimeout):
                await engine.store(b"key", content(b"old", SIZE), timeout_s=0.5)
            await until(engine.tier_idle)
            assert await engine.prefix([b"key"]) == 0
            assert await engine.store(b"key", content(b"new", 2 * SIZE))
            await until(engine.tier_idle)
        assert await engine.delete(b"key")
    async with opened(root) as engine:
        assert await engine.prefix([b"key"]) == 0


async def test_a_block_without_a_checksum_does_not_outlive_a_stricter_engine(
    tmp_path: Path,
) -> None:
    """It can't be served, so deleting its key must be the end of it."""
    root, loose = tmp_path / "kv", {"verify": "stamp"}
    async with opened(root, tier=loose) as engine:
        await engine.store(b"k", bytes(SIZE))
    async with opened(root) as engine:
        assert await engine.prefix([b"k"]) == 0
        assert await engine.store(b"k", bytes(SIZE))
        assert await engine.delete(b"k")
    async with opened(root, tier=loose) as engine:
        assert await engine.prefix([b"k"]) == 0


async def test_a_slab_of_another_geometry_is_not_removed(tmp_path: Path) -> None:
    """One wrong number in the index: refused, and a rebuild has every block."""
    root = tmp_path / "kv"
    await filled(root)
    before = sorted(path.name for path in root.glob("slab-*"))
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database, database:
        database.execute("UPDATE slab SET slot_bytes = slot_bytes + 4096 WHERE id = 0")
    with pytest.raises(ConfigError, match="--rebuild"):
        async with open_engine(config(root)):
            pass
    assert sorted(path.name for path in root.glob("slab-*")) == before


async def test_quarantine_goes_with_its_slab(tmp_path: Path) -> None:
    """A slab that another size takes over leaves nothing in the index, and nothing counted."""
    root = tmp_path / "kv"
    async with opened(root, tier={"capacity_bytes": MIB}) as engine:
        await engine.store(b"bad", content("bad", SIZE))
        spoil(root, b"bad")
        with pytest.raises(BlockCorrupt):
            await engine.load(b"bad", bytearray(SIZE))
        assert engine.statistics().tiers[0].quarantined == 1
        await engine.store(b"big", bytes(MIB - PAGE))
        assert engine.statistics().tiers[0].quarantined == 0
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database:
        assert database.execute("SELECT count(*) FROM block").fetchone() == (1,)


ROWS = 1900
SPARE = 100


async def large_slabs(root: Path, count: int = 1) -> Watched:
    """An engine with slabs of many slots, nearly all used, which are all that there is room for."""
    slot_bytes = slot_bytes_for(PAGE)
    settings: Any = {"tier": {"capacity_bytes": count * (ROWS + SPARE) * slot_bytes}}
    async with opened(root, **settings):
        pass
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database, database:
        rows = [(number, slot_bytes, ROWS + SPARE) for number in range(count)]
        database.executemany("INSERT INTO slab VALUES (?, ?, ?)", rows)
    engine = Watched(config(root, **settings), HeldTransport(NixlTransport(1)))
    await engine.open()
    for start in range(0, count * (ROWS + SPARE) - SPARE, 475):
        some = [b"%d" % i for i in range(start, start + 475)]
        await engine.store_many([(key, content(key, PAGE)) for key in some])
    return engine


def rows_of(root: Path) -> int:
    """How many blocks the index knows."""
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database:
        count: int = database.execute("SELECT count(*) FROM block").fetchone()[0]
        return count


def blocks(engine: Watched) -> int:
    return engine.statistics().tiers[0].blocks


async def some_gone(engine: Watched) -> None:
    """Wait for the first part of a slab to be forgotten; the rest follows in a few turns."""
    before = blocks(engine)
    for _ in range(10_000_000):
        if blocks(engine) < before:
            return
        await asyncio.sleep(0)


async def test_a_slab_is_given_up_in_many_turns(tmp_path: Path) -> None:
    """However many blocks it has, the loop goes on; what is used meanwhile is used to its end."""
    engine = await large_slabs(tmp_path / "kv")
    try:
        last = b"%d" % (ROWS - 1)
        assert blocks(engine) == ROWS
        engine.held.hold("start", lambda transfer: transfer.key == last)  # type: ignore[attr-defined]
        storing = asyncio.create_task(engine.store(b"big", bytes(MIB)))
        loading = deleting = None
        steps = [ROWS]
        before = engine.held.submitted
        while blocks(engine) > 0:
            await asyncio.sleep(0)
            steps.append(blocks(engine))
            if loading is None and steps[-1] < ROWS:
                memory = bytearray(PAGE)
                loading = asyncio.create_task(engine.load(last, memory))
            elif deleting is None and engine.held.submitted > before:
                deleting = asyncio.create_task(engine.delete(last))
        assert max(a - b for a, b in itertools.pairwise(steps)) <= 257
        await engine.held.wait_held("start", 1)
        await turns()
        assert not storing.done()
        assert rows_of(tmp_path / "kv") == 0  # else those that were forgotten would be back one day
        engine.held.release()
        assert loading is not None
        assert await loading
        assert memory == content(last, PAGE)
        assert deleting is not None
        assert await deleting
        assert await storing
        assert await engine.load(b"big", bytearray(MIB))
        assert not await engine.load(last, bytearray(PAGE))
    finally:
        engine.held.release()
        await engine.aclose()
    engine.check()


async def test_stores_go_on_while_a_slab_waits_for_a_load(tmp_path: Path) -> None:
    """Of another slab something is evicted, though one that is given up can't go yet."""
    engine = await large_slabs(tmp_path / "kv", 2)
    try:
        storing = asyncio.create_task(engine.store(b"big", bytes(MIB)))
        await some_gone(engine)
        first = engine.key_in_shut_slab(ROWS)
        engine.held.hold("landing", lambda transfer: transfer.key == first)  # type: ignore[attr-defined]
        memory = bytearray(PAGE)
        loading = asyncio.create_task(engine.load(first, memory))
        await engine.held.wait_held("landing", 1)
        outcomes = await engine.store_many([(b"new %d" % i, bytes(PAGE)) for i in range(300)])
        assert {outcome.status for outcome in outcomes} == {"stored"}
        assert not storing.done()
        engine.held.release()
        assert await loading
        assert memory == content(first, PAGE)
        assert await storing
    finally:
        engine.held.release()
        await engine.aclose()
    engine.check()


@pytest.mark.usefixtures("hasty_index")
async def test_a_delete_that_fails_in_a_slab_that_goes(tmp_path: Path) -> None:
    """It fails, and its block goes with the slab all the same."""
    root = tmp_path / "kv"
    engine = await large_slabs(root)
    try:
        last = b"%d" % (ROWS - 1)
        storing = asyncio.create_task(engine.store(b"big", bytes(MIB)))
        await some_gone(engine)
        with index_held(root), pytest.raises(TransferError, match="locked"):
            await engine.delete(last)
        assert await engine.prefix([last]) == 0
        with contextlib.suppress(TransferError):  # its slab could not be made meanwhile
            await storing
        assert await engine.store(b"big again", bytes(MIB))
        assert await engine.store(last, content(last, PAGE))
    finally:
        await engine.aclose()
    engine.check()


async def test_new_sizes_on_a_full_disk_at_once(tmp_path: Path) -> None:
    """Each needs a slab that another size has: they take one after the other."""
    with small_disk(tmp_path, 48 * MIB) as disk:
        async with opened(disk / "kv", tier={"capacity_bytes": 1 << 30}) as engine:
            for i in range(100):
                await engine.store(b"a%d" % i, bytes(MIB // 2))
            sizes = [MIB + i * 64 * PAGE for i in range(4)]
            memory = [engine.register(aligned(size)) for size in sizes]  # none waits for a lease
            stores = [engine.store(b"b%d" % each.nbytes, each) for each in memory]
            ended = await asyncio.gather(*stores, return_exceptions=True)
            assert {type(each) for each in ended} <= {bool, StorageFull}
            assert True in ended


async def test_a_slab_that_can_not_be_given_up_is_as_it_was(tmp_path: Path) -> None:
    """Its index fails when all blocks are forgotten already: they are back, oldest first."""
    root = tmp_path / "kv"
    engine = await large_slabs(root)
    try:
        with rows_kept(root, "slab"):
            before = engine.statistics().tiers[0]
            with pytest.raises(TransferError, match="index"):
                await engine.store(b"big", bytes(MIB))
            assert engine.statistics().tiers[0] == before
        keys = [b"%d" % i for i in range(ROWS)]
        assert await engine.prefix(keys) == ROWS
        for key in (keys[0], keys[-1]):
            memory = bytearray(PAGE)
            assert await engine.load(key, memory)
            assert memory == content(key, PAGE)
        await engine.store_many([(b"more %d" % i, bytes(PAGE)) for i in range(SPARE)])
        assert [await engine.prefix([key]) for key in (keys[0], keys[1], keys[-1])] == [1, 0, 1]
        assert await engine.store(b"big", bytes(MIB))
    finally:
        await engine.aclose()
    engine.check()


async def test_many_deletes_are_told_in_many_turns(tmp_path: Path) -> None:
    """The index takes them in one commit; the loop goes on all the same."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        keys = [b"%d" % i for i in range(1000)]
        await engine.store_many([(key, bytes(PAGE)) for key in keys])
        with index_held(root):  # until all have asked
            deletes = [asyncio.ensure_future(engine.delete(key)) for key in keys]
            await until(lambda: not blocks(engine))
        told = [0]
        while told[-1] < 1000:
            await asyncio.sleep(0)
            told.append(sum(delete.done() for delete in deletes))
        assert max(b - a for a, b in itertools.pairwise(told)) <= 100
        assert all(delete.result() for delete in deletes)


async def test_loads_and_deletes_evict_nothing(tmp_path: Path) -> None:
    """Only stores make room; a tier that is full stays so as long as it is only read."""
    root = tmp_path / "kv"
    keys = [b"%d" % i for i in range(192)]
    async with opened(root, tier={"capacity_bytes": 256 * slot_bytes_for(PAGE)}) as engine:
        await engine.store_many([(key, bytes(PAGE)) for key in keys])
    async with opened(root, tier={"capacity_bytes": 128 * slot_bytes_for(PAGE)}) as engine:
        assert (before := blocks(engine)) > 124  # all that there is room for
        await engine.load_many([(key, bytearray(PAGE)) for key in keys])
        assert blocks(engine) == before
        assert await engine.delete(keys[-1])
        assert blocks(engine) == before - 1


async def test_a_capacity_far_above_the_disk(tmp_path: Path) -> None:
    """Slabs are made as large as there is room for."""
    with small_disk(tmp_path, 24 * MIB) as disk:
        async with opened(disk / "kv", tier={"capacity_bytes": 1 << 40}) as engine:
            assert await engine.store(b"k", bytes(SIZE))
            assert await engine.load(b"k", bytearray(SIZE))


async def test_a_full_disk_goes_from_one_size_to_another(tmp_path: Path) -> None:
    """What slabs of another size give up is taken again, far as the capacity may be."""
    with small_disk(tmp_path, 48 * MIB) as disk:
        async with opened(disk / "kv", tier={"capacity_bytes": 1 << 30}) as engine:
            for i in range(100):
                await engine.store(b"a%d" % i, bytes(MIB // 2))
            before = engine.statistics().tiers[0].bytes_used
            for i in range(100):
                await engine.store(b"b%d" % i, bytes(MIB))
            assert engine.statistics().tiers[0].bytes_used >= before * 3 // 4
            assert await engine.load(b"b99", bytearray(MIB))


async def test_blocks_of_another_size_take_the_place_of_what_is_older(tmp_path: Path) -> None:
    """A slab that nobody has used since goes before blocks of one's own, also ahead of need."""
    async with opened(tmp_path / "kv", tier={"capacity_bytes": 16 * MIB}) as engine:
        for i in range(16 * MIB // slot_bytes_for(PAGE)):
            await engine.store(b"old %d" % i, bytes(PAGE))
        keys = [b"%d" % i for i in range(8 * MIB // slot_bytes_for(2 * PAGE))]
        for key in keys:
            await engine.store(key, bytes(2 * PAGE))
        assert await engine.prefix(keys) == len(keys)
        assert engine.statistics().tiers[0].bytes_used > 15 * MIB


async def test_blocks_of_another_namespace_that_are_newer_stay(tmp_path: Path) -> None:
    """After a new opening, too: what others have stored since is not older than one's own."""
    root, tier = tmp_path / "kv", {"capacity_bytes": 16 * MIB}
    async with opened(root, tier=tier) as engine:
        await engine.store_many([(b"old %d" % i, bytes(PAGE)) for i in range(1000)])
    other, keys = Namespace("another"), [b"%d" % i for i in range(500)]
    async with opened(root, tier=tier, namespace=other) as engine:
        await engine.store_many([(key, bytes(3 * PAGE)) for key in keys])
    async with opened(root, tier=tier) as engine:
        for i in range(700):
            await engine.store(b"new %d" % i, bytes(PAGE))
    async with opened(root, tier=tier, namespace=other) as engine:
        assert await engine.prefix(keys) == len(keys)


async def test_blocks_of_another_size_take_the_place_of_what_was_deleted(tmp_path: Path) -> None:
    """Even if that was used last."""
    async with opened(tmp_path / "kv", tier={"capacity_bytes": 16 * MIB}) as engine:
        keys = [b"%d" % i for i in range(430)]  # of 32 KiB with their stamps
        for key in keys[:230]:
            await engine.store(key, bytes(7 * PAGE))
        gone = [b"gone %d" % i for i in range(480)]
        for key in gone:
            await engine.store(key, bytes(3 * PAGE))
        for key in gone:
            await engine.delete(key)
        for key in keys[230:]:
            await engine.store(key, bytes(7 * PAGE))
        assert await engine.prefix(keys) == len(keys)
        assert engine.statistics().tiers[0].evictions == 0


async def test_a_size_that_comes_slowly_to_a_full_disk_gets_its_share(tmp_path: Path) -> None:
    with small_disk(tmp_path, 16 * MIB) as disk:
        async with opened(disk / "kv", tier={"capacity_bytes": 64 * MIB}) as engine:
            for i in range(650):
                await engine.store(b"old %d" % i, bytes(3 * PAGE))
            keys = [b"%d" % i for i in range(400)]
            for key in keys:
                await engine.store(key, bytes(7 * PAGE))
            assert await engine.prefix(keys[::-1]) > 200


async def test_many_small_stores_keep_no_large_one_waiting(tmp_path: Path) -> None:
    """What slabs leave for it is its own, though it takes several."""
    settings: dict[str, Any] = {"tier": {"capacity_bytes": 16 * MIB}, "bounce_bytes": 40 * MIB}
    async with opened(tmp_path / "kv", **settings) as engine:
        numbers, before, done = itertools.count(), 0, asyncio.Event()

        async def store_small() -> None:
            while not done.is_set():
                await engine.store(b"%d" % next(numbers), bytes(3 * PAGE))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(64):
                tasks.create_task(store_small())
            await until(lambda: engine.statistics().tiers[0].evictions > 0)
            before = next(numbers)
            large = tasks.create_task(engine.store(b"large", bytes(4000 * 1024)))
            await until(lambda: large.done() or next(numbers) > before + 20_000)
            assert large.done()
            done.set()


async def test_a_store_that_can_get_no_room_now_keeps_none_from_others(tmp_path: Path) -> None:
    """A large one waits for loads that hold slabs: a small one may have the room of others."""
    settings: dict[str, Any] = {"tier": {"capacity_bytes": 16 * MIB}, "bounce_bytes": 40 * MIB}
    async with opened(tmp_path / "kv", **settings) as engine:
        await engine.store_many([(b"%d" % i, bytes(3 * PAGE)) for i in range(1024)])
        engine.held.hold("start", lambda transfer: not transfer.write)
        held = [
            asyncio.create_task(engine.load(b"%d" % i, bytearray(3 * PAGE)))
            for i in range(128, 960, 16)
        ]
        await turns(60)
        large = asyncio.create_task(engine.store(b"large", bytes(4000 * 1024)))
        unheld = [b"%d" % i for i in (*range(120), *range(960, 1024))]
        await until(lambda: not any(map(engine.near, unheld)))
        async with asyncio.timeout(10):
            assert await engine.store(b"small", bytes(PAGE))
        assert not large.done()
        engine.held.release()
        assert await asyncio.gather(*held) == [True] * len(held)
        assert await large


async def test_who_stores_and_deletes_keeps_the_slab_for_it(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    async with opened(root, tier={"capacity_bytes": 16 * MIB}) as engine:
        for i in range(1200):
            await engine.store(b"%d" % i, bytes(3 * PAGE))
        for i in range(1200, 2400, 8):
            await engine.store(b"one", bytes(PAGE))
            await engine.delete(b"one")
            await engine.store_many([(b"%d" % n, bytes(3 * PAGE)) for n in range(i, i + 8)])
    assert max(await asyncio.to_thread(slabs_in, root)) < 70  # 64 are there


async def test_two_sizes_in_turns_leave_each_other_their_slabs(tmp_path: Path) -> None:
    sizes, root = (PAGE, 3 * PAGE), tmp_path / "kv"
    async with opened(root, tier={"capacity_bytes": 16 * MIB}) as engine:
        for i in range(1500):
            for nbytes in sizes:
                await engine.store(b"%d of %d" % (i, nbytes), bytes(nbytes))
        both = 16 * MIB // sum(map(slot_bytes_for, sizes))
        for nbytes in sizes:
            keys = [b"%d of %d" % (i, nbytes) for i in range(1500 - both // 2, 1500)]
            assert await engine.prefix(keys) == len(keys)
        assert engine.statistics().tiers[0].bytes_used > 14 * MIB
    assert max(await asyncio.to_thread(slabs_in, root)) < 150  # of which 64 are there


async def test_an_index_that_takes_nothing_loses_nothing(tmp_path: Path) -> None:
    """Its disk is full when a slab is to change hands: refused, and all is there as before."""
    with small_disk(tmp_path, 4 * MIB) as disk:
        root = disk / "kv"
        async with opened(root, tier={"capacity_bytes": MIB}) as engine:
            keys = [b"%d" % i for i in range(60)]
            for key in keys:
                await engine.store(key, content(key, SIZE))
            there = [key for key in keys if await engine.prefix([key])]
            fill_up(disk / "ballast")
            for i in range(40):
                with contextlib.suppress(StorageFull):
                    await engine.store(b"big %d" % i, bytes(20 * SIZE + i))
            allocated = sum(path.stat().st_size for path in root.glob("slab-*"))
            assert allocated <= MIB
            left = [key for key in there if await engine.prefix([key])]
            for key in left:
                memory = bytearray(SIZE)
                assert await engine.load(key, memory)
                assert memory == content(key, SIZE)
            (disk / "ballast").unlink()
            assert await engine.store(b"again", bytes(SIZE))


@pytest.mark.usefixtures("hasty_index")
async def test_an_index_that_another_holds(tmp_path: Path) -> None:
    """Something reads it with a lock: stores fail with that reason, and slabs don't pile up."""
    root = tmp_path / "kv"
    async with opened(root, tier={"capacity_bytes": 4 * MIB}) as engine:
        await engine.store(b"k", bytes(PAGE))
        with index_held(root):
            for i in range(4):
                with pytest.raises(TransferError, match="locked"):
                    await engine.store(b"%d" % i, bytes(MIB // 2 + i * 5 * PAGE))
        await until(lambda: len(list(root.glob("slab-*"))) == 1)
        assert await engine.store(b"after", bytes(MIB // 2))
