"""Files that somebody else removes while an engine has them open."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest

import sharing
from faults import FaultyDisk
from kvgds import Engine, TransferError, open_engine
from kvgds.upkeep import fsck
from sharing import IMAGE, NBYTES
from support import PAGE, config, content, turns
from support import opened as slabs

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 3 * PAGE


# --- slabs, and their index: by hand ----------------------------------------------------------


async def remove(*paths: Path | str) -> None:
    rm = await asyncio.create_subprocess_exec("rm", *paths)
    assert await rm.wait() == 0


async def loads(engine: Engine, key: bytes) -> bool:
    """Whether a block is there; then it is right."""
    memory = bytearray(SIZE)
    there = await engine.load(key, memory)
    assert not there or memory == content(key, SIZE)
    return there


@pytest.mark.parametrize("durable", ["process", "power"])
async def test_a_slab_that_is_deleted_under_an_engine(tmp_path: Path, durable: str) -> None:
    """No store into it is acknowledged; its blocks load for the time being; the next are safe."""
    root = tmp_path / "kv"
    tier = {"capacity_bytes": 64 * 4 * (PAGE + SIZE), "durable": durable}
    async with open_engine(config(root, tier=tier)) as engine:
        assert await engine.store(b"old", content(b"old", SIZE))
        await remove(*root.glob("slab-*"))
        both = [(key, content(key, SIZE)) for key in (b"a", b"b")]
        for outcome in await engine.store_many(both):
            assert isinstance(outcome.error, TransferError)
            assert "deleted" in str(outcome.error)
            assert outcome.error.key == outcome.key
        assert await engine.prefix([b"a"]) == 0
        assert await loads(engine, b"old")
        assert [outcome.status for outcome in await engine.store_many(both)] == ["stored"] * 2
        assert await engine.store(b"old", content(b"old", SIZE))  # present, but not to stay
    async with slabs(root, tier=tier) as engine:
        assert [await loads(engine, key) for key in (b"old", b"a", b"b")] == [True] * 3


async def test_a_deleted_slab_is_given_up_for_room(tmp_path: Path) -> None:
    """Where there is no room but its own: a load from it ends well, and the next store is safe."""
    root, tier = tmp_path / "kv", {"capacity_bytes": PAGE + SIZE}
    async with slabs(root, tier=tier) as engine:
        assert await engine.store(b"a", content(b"a", SIZE))
        await remove(*root.glob("slab-*"))
        engine.held.hold("start", lambda transfer: not transfer.write)
        loading = asyncio.ensure_future(loads(engine, b"a"))
        await engine.held.wait_held("start")
        storing = asyncio.ensure_future(engine.store(b"b", content(b"b", SIZE)))
        await turns()
        engine.held.release()
        assert await loading
        with pytest.raises(TransferError, match="deleted"):
            await storing
        assert await engine.store(b"c", content(b"c", SIZE))
        assert engine.statistics().tiers[0].quarantined == 0
    async with slabs(root, tier=tier) as engine:
        assert await loads(engine, b"c")


async def test_neighbours_of_a_deleted_slab_are_stored(tmp_path: Path) -> None:
    """Committed together with a store into it: one slab's loss fails no other's blocks."""
    root = tmp_path / "kv"
    async with open_engine(config(root)) as engine:
        assert await engine.store(b"small", content(b"small", PAGE))
        (gone,) = root.glob("slab-*")
        assert await engine.store(b"a", content(b"a", SIZE))
        await remove(gone)
        items = [(b"b", content(b"b", SIZE)), (b"c", content(b"c", PAGE))]
        outcomes = await engine.store_many(items)
        assert [outcome.status for outcome in outcomes] == ["stored", "error"]
    async with slabs(root) as engine:
        assert await loads(engine, b"b")
        assert await engine.prefix([b"small"]) == 0


async def test_the_next_directory_of_that_name_is_left_alone(tmp_path: Path) -> None:
    """Renamed under an engine, a directory is still the engine's; what gets its name is not."""
    root, tier = tmp_path / "kv", {"capacity_bytes": 2 * (PAGE + SIZE)}
    async with open_engine(config(root, tier=tier)) as engine:
        assert await engine.store(b"a", content(b"a", SIZE))
        root.rename(tmp_path / "old")
        async with open_engine(config(root, tier=tier)) as other:
            assert await other.store(b"a", content(b"a", SIZE))
            there = {path.name: path.stat().st_ino for path in root.iterdir()}
            for n, size in enumerate((PAGE, SIZE, 9 * PAGE // 2, PAGE)):  # each a slab of its own
                assert await engine.store(b"%d" % n, content(n, size))
            assert {path.name: path.stat().st_ino for path in root.iterdir()} == there
            assert await loads(other, b"a")
    async with slabs(root, tier=tier) as engine:
        assert await loads(engine, b"a")
    async with slabs(tmp_path / "old", tier=tier) as engine:
        assert await engine.prefix([b"3"]) == 1


async def test_a_slab_that_can_not_be_synced_is_used_no_more(tmp_path: Path) -> None:
    """Nor does it fail its neighbours' stores. The system forgets it: the next sync is done."""
    with FaultyDisk(tmp_path) as disk:
        root, tier = disk.root / "kv", {"durable": "power"}
        small, large = content(b"small", PAGE), content(b"large", SIZE)
        async with slabs(root, tier=tier) as engine:
            assert await engine.store(b"small", small)
            (bad,) = root.glob("slab-*")
            assert await engine.store(b"large", large)
            disk.fail("fsync", errno.EIO, match=bad.name)
            for number in range(2):
                items = [(b"s%d" % number, small), (b"l%d" % number, large)]
                outcomes = await engine.store_many(items)
                assert [each.status for each in outcomes] == (
                    ["error", "stored"] if number == 0 else ["stored", "stored"]
                )
                if number == 0:
                    assert getattr(outcomes[0].error, "errno", None) == errno.EIO
            disk.clear()
            assert await engine.prefix([b"s0"]) == 0
            assert await engine.load(b"small", bytearray(PAGE))
            assert await engine.store(b"s0", small)
        async with slabs(root, tier=tier) as engine:
            assert await engine.prefix([b"l0", b"s1", b"l1", b"s0"]) == 4


@pytest.mark.parametrize("durable", ["process", "power"])
@pytest.mark.parametrize("name", ["index.db", "index.db-wal"])
async def test_an_index_that_is_deleted_under_an_engine(
    tmp_path: Path, name: str, durable: str
) -> None:
    """Nothing is acknowledged that it would have to remember, and the error says what to do."""
    root = tmp_path / "kv"
    async with open_engine(config(root, tier={"durable": durable})) as engine:
        assert await engine.store(b"old", content(b"old", SIZE))
        await remove(root / name)
        for _ in range(2):
            with pytest.raises(TransferError, match=rf"{name} was deleted.*fsck --rebuild"):
                await engine.store(b"new", content(b"new", SIZE))
        with pytest.raises(TransferError, match=rf"{name} was deleted.*fsck --rebuild"):
            await engine.store(b"old", content(b"old", SIZE))
        assert await engine.load(b"old", bytearray(SIZE))
        assert await engine.prefix([b"new"]) == 0
    await asyncio.to_thread(fsck, root, rebuild=True)
    async with open_engine(config(root)) as engine:
        assert await loads(engine, b"old")


async def test_a_log_that_is_emptied_is_still_the_log(tmp_path: Path) -> None:
    """SQLite does that when its log has grown long, or is asked to from outside."""
    root = tmp_path / "kv"
    async with open_engine(config(root)) as engine:
        assert await engine.store(b"a", content(b"a", SIZE))
        with contextlib.closing(sqlite3.connect(root / "index.db")) as database:
            assert database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
        assert (root / "index.db-wal").stat().st_size == 0
        assert await engine.store(b"b", content(b"b", SIZE))
    async with slabs(root) as engine:
        assert await engine.prefix([b"a", b"b"]) == 2


async def test_a_file_system_that_counts_no_links(tmp_path: Path) -> None:
    """Says of every file that it has no name: there nothing is taken for deleted."""
    with FaultyDisk(tmp_path, links=False) as disk:
        async with slabs(disk.root / "kv") as engine:
            assert await engine.store(b"a", content(b"a", SIZE))
            assert await loads(engine, b"a")


# --- blocks of the files layout: by another host ------------------------------------------------


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOENT])
@pytest.mark.parametrize("op", ["lookup", "open", "getattr", "read"])
async def test_a_block_that_another_host_has_evicted(tmp_path: Path, op: Any, number: int) -> None:
    """A network file system loses it before it is open, when it is, or as it is read: a miss."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with sharing.opened(disk.backing / "kv") as engine:
            await sharing.put(engine, b"gone", b"here")
        async with sharing.opened(root) as engine:
            disk.fail(op, number, match=sharing.path_of(root, b"gone").name)
            outcomes = await engine.load_many([(k, bytearray(NBYTES)) for k in (b"gone", b"here")])
            assert [outcome.status for outcome in outcomes] == ["miss", "hit"]
            assert engine.statistics().tiers[0].blocks == 1
            disk.clear()
            assert await sharing.there(engine, [b"gone", b"here"]) == [b"gone", b"here"]


async def test_a_file_that_goes_at_any_moment_is_closed(tmp_path: Path) -> None:
    """Whichever look at its status fails, before it is open or after."""
    with FaultyDisk(tmp_path) as disk:
        async with sharing.opened(disk.backing / "kv") as engine:
            await sharing.put(engine, b"key")
        async with sharing.opened(disk.root / "kv") as engine:
            for skip in range(5):
                disk.fail("getattr", errno.ESTALE, match="*.kv", skip=skip)
                hit = await sharing.get(engine, b"key")
                disk.clear()
            assert hit


@pytest.mark.parametrize("op", ["open", "read"])
async def test_a_stale_block_is_stored_anew(tmp_path: Path, op: Any) -> None:
    """That it is there by its name is no reason to say that it is present."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with sharing.opened(disk.backing / "kv") as engine:
            await sharing.put(engine, b"stale")
        async with sharing.opened(root) as engine:
            disk.fail(op, errno.ESTALE, match=sharing.path_of(root, b"stale").name)
            assert await engine.store(b"stale", content(b"stale", NBYTES))
            disk.clear()
            assert await sharing.get(engine, b"stale")
            assert sharing.ledger(root) == sharing.taken(root) == IMAGE


async def test_a_directory_of_files_that_is_deleted(tmp_path: Path) -> None:
    """Stores and removals say what has happened; loads miss."""
    root = tmp_path / "kv"
    async with sharing.opened(root) as engine:
        await sharing.put(engine, b"a")
        await remove("-r", root)
        for _ in range(2):
            says = rf"{root} was deleted while the engine had it open; close the engine"
            with pytest.raises(TransferError, match=says) as caught:
                await sharing.put(engine, b"b")
            assert caught.value.errno == errno.ENOENT
            with pytest.raises(TransferError, match=says):
                await engine.delete(b"a")
        assert not await sharing.get(engine, b"a")
        assert await engine.prefix([b"a"]) == 0
    assert not root.exists()


async def test_files_that_do_not_close_well(tmp_path: Path) -> None:
    """Are closed all the same, each, and what was loaded from them counts."""
    with FaultyDisk(tmp_path) as disk:
        async with sharing.opened(disk.backing / "kv") as engine:
            await sharing.put(engine, b"a", b"b", b"c")
        async with sharing.opened(disk.root / "kv") as engine:
            disk.fail("flush", errno.ESTALE, match="*.kv")
            items = [(key, bytearray(NBYTES)) for key in (b"a", b"b", b"c")]
            outcomes = await engine.load_many(items)
            assert [outcome.status for outcome in outcomes] == ["hit"] * 3
