"""One engine on a directory of files: blocks are whole or absent, private, and bounded.

What several engines and processes do to each other is in test_sharing.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import struct
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from faults import FaultyDisk, Op, read_only, small_disk
from kvgds import (
    BlockCorrupt,
    ConfigError,
    Event,
    FileTier,
    Namespace,
    StorageFull,
    TransferError,
    TransferTimeout,
)
from kvgds.testing import FileTierContract, skip_time
from kvgds.tiers.directory import prepare_root
from sharing import (
    HOUR,
    IMAGE,
    NBYTES,
    failure,
    flip,
    get,
    is_late,
    ledger,
    locked,
    make_old,
    open_files,
    opened,
    path_of,
    put,
    settings,
    taken,
    temporaries,
    there,
    write_ledger,
)
from support import NAMESPACE, PAGE, aligned, content, digest, image, turns, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvgds.engine import Engine


class TestContract(FileTierContract):
    """What every tier must pass."""

    def make_tiers(self, root: Path, **changes: Any) -> tuple[FileTier]:
        return (settings(root, **{"capacity_bytes": 16 << 20, **changes}),)

    def side_get(self, root: Path, namespace: Namespace, key: bytes) -> bytes | None:
        path = path_of(root, key, namespace)
        if not path.exists():
            return None
        whole = path.read_bytes()
        nbytes = struct.unpack_from("<Q", whole, 40)[0]
        return whole[PAGE : PAGE + nbytes]

    def side_set(self, root: Path, namespace: Namespace, key: bytes, payload: bytes) -> None:
        path = path_of(root, key, namespace)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(namespace, key, 7, payload))

    def side_spoil(self, root: Path, namespace: Namespace, key: bytes, at: int) -> None:
        flip(path_of(root, key, namespace), at)


# --- what lies there ------------------------------------------------------------------------


async def test_a_block_is_one_private_file_that_tells_what_it_is(tmp_path: Path) -> None:
    """Its image and nothing else, under a name that no key can steer, readable by nobody else."""
    root = tmp_path / "kv"
    keys = [b"key", b"../../../../escaped", b"/etc/passwd", b"\0\n", b"k" * 1024]
    old = os.umask(0)
    try:
        async with opened(root) as engine:
            await put(engine, *keys)
    finally:
        os.umask(old)
    found = {path: path.lstat() for path in root.rglob("*")}
    blocks = {path_of(root, key) for key in keys}
    assert {path for path in found if path.suffix == ".kv"} == blocks
    for key in keys:
        assert path_of(root, key).read_bytes() == image(NAMESPACE, key, 0, content(key, NBYTES))
    modes = {path.is_dir(): oct(status.st_mode & 0o7777) for path, status in found.items()}
    assert modes == {True: "0o700", False: "0o600"}
    told = json.loads((root / digest(NAMESPACE).hex() / "namespace.json").read_text())
    assert told == asdict(NAMESPACE)
    assert sorted(os.listdir(tmp_path)) == ["kv"]
    assert temporaries(root) == []
    assert ledger(root) == taken(root) == len(keys) * IMAGE


async def test_blocks_survive_a_restart(tmp_path: Path) -> None:
    """Of any size, from aligned memory or not; and one of another size replaces one."""
    root, sizes = tmp_path / "kv", (1, PAGE, PAGE + 1, 300_001)
    memory = aligned(4 * PAGE, content("aligned", 4 * PAGE))
    async with opened(root) as engine:
        for nbytes in sizes:
            assert await engine.store(b"%d" % nbytes, content(b"%d" % nbytes, nbytes))
        assert await engine.store(b"aligned", engine.register(memory))
        assert await engine.store(b"changed", bytes(100))
        assert await engine.store(b"changed", content(b"changed", 101))  # as long on disk
        assert ledger(root) == taken(root)
    async with opened(root) as engine:
        assert engine.statistics().tiers[0].blocks == len(sizes) + 2
        for nbytes in sizes:
            assert await get(engine, b"%d" % nbytes, nbytes)
        assert await get(engine, b"changed", 101)
        memory[:] = 0
        assert await engine.load(b"aligned", engine.register(memory))
        assert bytes(memory) == content("aligned", 4 * PAGE)


async def test_the_other_size_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    """Loading with memory of another size names the right one; the block stays."""
    async with opened(tmp_path / "kv") as engine:
        await put(engine, b"key")
        for nbytes in (NBYTES + 1, NBYTES + PAGE, 1):
            error = await failure(engine, b"key", nbytes)
            assert type(error) is ConfigError
            assert (error.field, error.value) == ("memory", f"{nbytes} bytes")
            assert f"{NBYTES} bytes" in str(error)
        tier = engine.statistics().tiers[0]
        assert (tier.blocks, tier.quarantined) == (1, 0)
        assert await get(engine, b"key")


@pytest.mark.parametrize("durable", ["process", "power"])
@pytest.mark.parametrize("direct_io", ["auto", "never"])
async def test_a_store_that_is_not_durable_fails(
    tmp_path: Path, durable: str, direct_io: str
) -> None:
    """With durable="power" a failing fsync fails the store; without, there is none."""
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv", durable=durable, direct_io=direct_io) as engine:
            await put(engine, b"sound")
            disk.fail("fsync", errno.EIO)
            if durable == "process":
                await put(engine, b"key")
                return
            with pytest.raises(TransferError) as raised:
                await put(engine, b"key")
            assert raised.value.errno == errno.EIO
            assert not await get(engine, b"key")
            assert await get(engine, b"sound")
            assert temporaries(disk.root / "kv") == []


# --- room -----------------------------------------------------------------------------------


async def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    """Also when the uses were before a restart, or a moment ago and not on disk yet."""
    root, capacity = tmp_path / "kv", 4 * IMAGE
    async with opened(root, capacity_bytes=capacity) as engine:
        await put(engine, b"a", b"b", b"c", b"d")
    for age, key in enumerate((b"d", b"c", b"b", b"a"), 1):
        make_old(path_of(root, key), age * HOUR)
    async with opened(root, capacity_bytes=capacity) as engine:
        assert await get(engine, b"a")
        marked = path_of(root, b"a").stat().st_mtime_ns
        assert await get(engine, b"a")
        assert path_of(root, b"a").stat().st_mtime_ns == marked  # once a minute is enough
    async with opened(root, capacity_bytes=capacity) as engine:
        await put(engine, b"e", b"f")
        assert await there(engine, [b"a", b"b", b"c", b"d", b"e", b"f"]) == [b"a", b"d", b"e", b"f"]
        for key in (b"a", b"e", b"f", b"d"):
            assert await get(engine, key)
        await put(engine, b"g")
        assert await there(engine, [b"a", b"d", b"e", b"f", b"g"]) == [b"d", b"e", b"f", b"g"]
        assert engine.statistics().tiers[0].evictions == 3


async def test_what_a_clock_that_was_ahead_has_marked_goes_first(tmp_path: Path) -> None:
    """Else nothing used since it was put right would stay. What is used since then counts."""
    root, capacity = tmp_path / "kv", 4 * IMAGE
    keys = [b"a", b"b", b"c", b"d"]
    async with opened(root, capacity_bytes=capacity) as engine:
        await put(engine, *keys)
    for age, key in zip((-48, -24, -24, 24), keys, strict=True):
        make_old(path_of(root, key), age * HOUR)
    async with opened(root, capacity_bytes=capacity) as engine:
        assert await get(engine, b"c")
    assert path_of(root, b"c").stat().st_mtime <= time.time()
    async with opened(root, capacity_bytes=5 * IMAGE) as engine:
        (root / "quarantine" / "bad").write_bytes(bytes(IMAGE))  # before all of them
        write_ledger(root, 5 * IMAGE)
        for key, left in ((b"e", b"abcd"), (b"f", b"acd"), (b"g", b"cd"), (b"h", b"c")):
            await put(engine, key)
            assert b"".join(key for key in keys if path_of(root, key).exists()) == left


async def test_what_is_being_loaded_stays(tmp_path: Path) -> None:
    """However old it is, and however much is stored meanwhile."""
    async with opened(tmp_path / "kv", capacity_bytes=4 * IMAGE) as engine:
        await put(engine, b"old")
        engine.held.hold("landing", lambda transfer: not transfer.write)
        loading = asyncio.ensure_future(get(engine, b"old"))
        await engine.held.wait_held("landing")
        make_old(path_of(tmp_path / "kv", b"old"), HOUR)
        await put(engine, *(b"%d" % n for n in range(8)))
        assert await engine.prefix([b"old"]) == 1
        engine.held.release()
        assert await loading
        assert await get(engine, b"old")


async def test_more_at_once_than_there_is_room(tmp_path: Path) -> None:
    """Stores wait for those before them; every one is done, and the last ones are there."""
    root, capacity = tmp_path / "kv", 8 * IMAGE
    keys = [b"%d" % i for i in range(40)]
    async with opened(root, capacity_bytes=capacity) as engine:
        outcomes = await engine.store_many([(key, content(key, NBYTES)) for key in keys])
        assert {outcome.status for outcome in outcomes} == {"stored"}
        left = await there(engine, keys)
        assert 6 <= len(left) <= 8
        assert ledger(root) == taken(root) == len(left) * IMAGE


async def test_waiting_for_room_has_an_end(tmp_path: Path) -> None:
    """Room that others have reserved is waited for: until they end, or until the deadline."""
    root, capacity = tmp_path / "kv", 2 * IMAGE
    changes: dict[str, Any] = {"capacity_bytes": capacity}
    async with opened(root, **changes) as one, opened(root, **changes) as two:
        one.held.hold("landing")
        stores = [asyncio.ensure_future(put(one, key)) for key in (b"a", b"b")]
        await one.held.wait_held("landing", 2)
        with pytest.raises(TransferTimeout):
            await two.store(b"late", bytes(NBYTES), timeout_s=0.1)
        await two.delete(b"x")  # comes after whatever was going on
        assert two.statistics().quarantined_bytes == 0
        waiting = asyncio.ensure_future(put(two, b"c"))
        queued = asyncio.ensure_future(one.store(b"d", bytes(NBYTES), timeout_s=0.1))
        with pytest.raises(TransferTimeout):
            await queued
        assert one.statistics().quarantined_bytes == 0
        one.held.release()
        await asyncio.gather(*stores, waiting)
        assert await get(two, b"c")
        assert ledger(root) == taken(root) <= capacity


async def test_a_smaller_capacity_holds_from_the_start(tmp_path: Path) -> None:
    """Opened with less, it shrinks to that at once."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        await put(engine, *(b"%d" % i for i in range(10)))
        async with opened(root, capacity_bytes=5 * IMAGE) as small:
            assert ledger(root) == taken(root) <= 5 * IMAGE
            assert small.statistics().tiers[0].evictions >= 5


async def test_a_disk_that_takes_no_new_file_opens_and_loads(tmp_path: Path) -> None:
    """Some file systems have no room for a name when they are full."""
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv") as engine:
            await put(engine, b"key")
        disk.fail("create", errno.ENOSPC, match=".trial-*")
        async with opened(disk.root / "kv") as engine:
            assert await get(engine, b"key")
            assert engine.plan[0].direct_io is False
            assert engine.plan[0].refused == ("O_DIRECT: the disk is full: it was not tried",)
        with pytest.raises(ConfigError, match="No space left"):
            async with opened(disk.root / "kv", direct_io="require"):
                pass


@pytest.mark.parametrize("memory", ["aligned", "unaligned"])
async def test_a_full_disk_costs_the_oldest_blocks(tmp_path: Path, memory: str) -> None:
    """When a write finds no room something is evicted and the store tried once more."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root) as engine:
            held = aligned(NBYTES + 100, 1)
            block = engine.register(held) if memory == "aligned" else bytes(held)
            await put(engine, b"old")
            make_old(path_of(root, b"old"), HOUR)
            await put(engine, b"young")
            # As NIXL meets it, and as the plain call that is to find out why NIXL failed.
            disk.fail("write", errno.ENOSPC, match="*.*", offset=0, length=1, count=2)
            assert await engine.store(b"new", block)
            assert await engine.prefix([b"new", b"young"]) == 2
            assert not await get(engine, b"old")
            assert await engine.delete(b"young")
            disk.fail("write", errno.ENOSPC, match="*.*")
            with pytest.raises(StorageFull, match="free space"):
                await engine.store(b"never", block)
            assert ledger(root) == taken(root)
            assert temporaries(root) == []


FULL_FOR: dict[str, tuple[Op, str]] = {
    "a file": ("create", "*.*"),
    "a folder": ("mkdir", "*"),
    "a name": ("link", "*.kv"),
}


@pytest.mark.parametrize("want", FULL_FOR)
async def test_a_disk_that_is_full_for_names_costs_the_oldest_block(
    tmp_path: Path, want: str
) -> None:
    """Where inodes run out, or a folder can't grow, evicting helps as well: all is there again."""
    op, match = FULL_FOR[want]
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root) as engine:
            await put(engine, b"old", b"young")
            make_old(path_of(root, b"old"), HOUR)
            disk.fail(op, errno.ENOSPC, match=match, count=1)
            await put(engine, b"new")
            assert await engine.prefix([b"new", b"young"]) == 2
            assert not await get(engine, b"old")
            assert temporaries(root) == []
            disk.fail(op, errno.ENOSPC, match=match)
            with pytest.raises(StorageFull, match="free space"):
                await put(engine, b"never")
            disk.clear()
            await put(engine, b"again")
            assert ledger(root) == taken(root)
            assert temporaries(root) == []


async def test_a_disk_that_is_full_for_names_for_good_costs_few_blocks(tmp_path: Path) -> None:
    """What evicting does not help is not tried with each store."""
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv") as engine:
            keys = [b"%d" % i for i in range(24)]
            await put(engine, *keys)
            disk.fail("mkdir", errno.ENOSPC)
            for i in range(40):
                with contextlib.suppress(StorageFull):  # some folders are there
                    await engine.store(b"new %d" % i, bytes(NBYTES))
            assert len(await there(engine, keys)) >= 12


async def test_a_name_that_others_took_is_tried_for_again(tmp_path: Path) -> None:
    """By the next store: once in vain is not always."""
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv") as engine:
            await put(engine, *(b"%d" % i for i in range(16)))
            for i in range(5):
                disk.fail("create", errno.ENOSPC, match="*.*", count=3)
                with pytest.raises(StorageFull):
                    await put(engine, b"never")
                disk.fail("create", errno.ENOSPC, match="*.*", count=1)
                await put(engine, b"new %d" % i)


async def test_a_count_that_the_disk_has_no_room_for(tmp_path: Path) -> None:
    """As on a full btrfs: it stays too high, one block goes for another, and no call fails."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root) as engine:
            await put(engine, b"old", b"young", b"key")
            make_old(path_of(root, b"old"), HOUR)
            disk.fail("write", errno.ENOSPC, match="*/ledger")
            await put(engine, b"new")
            assert await there(engine, [b"old", b"young", b"key", b"new"]) == [
                b"young",
                b"key",
                b"new",
            ]
            assert await engine.delete(b"young")
            assert taken(root) < ledger(root)
        async with opened(root) as engine:
            disk.clear()
            assert await there(engine, [b"key", b"new"]) == [b"key", b"new"]
        async with opened(root):
            assert ledger(root) == taken(root)


async def test_a_count_that_stays_too_high_costs_no_more_blocks(tmp_path: Path) -> None:
    """Where there are many: those that would go ahead of need would go for each store anew."""
    many = 1100
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv", capacity_bytes=many * 2 * PAGE) as engine:
            items = [(b"%d" % i, bytes(PAGE)) for i in range(many)]
            await engine.store_many(items)
            disk.fail("write", errno.ENOSPC, match="*/ledger")
            for i in range(12):
                assert await engine.store(b"new %d" % i, bytes(PAGE))
            assert engine.statistics().tiers[0].evictions <= 12 + 32


async def test_a_stored_block_whose_name_can_not_be_made_durable_costs_nothing(
    tmp_path: Path,
) -> None:
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv", durable="power") as engine:
            await put(engine, b"old")
            disk.fail("fsyncdir", errno.ENOSPC, count=1)
            with pytest.raises(StorageFull):
                await put(engine, b"new")
            assert await get(engine, b"old")


async def test_a_late_store_costs_nothing_on_a_full_disk(tmp_path: Path) -> None:
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv") as engine:
            await put(engine, b"old")
            disk.hang("link")
            await is_late(disk, engine.store(b"late", content(b"late", NBYTES)))
            disk.release(errno.ENOSPC)
            await engine.delete(b"x")  # comes after whatever was going on
            assert await get(engine, b"old")


async def test_a_name_may_cost_one_more_block_than_the_bytes(tmp_path: Path) -> None:
    """What the first made room for is taken by the bytes once more."""
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv") as engine:
            await put(engine, b"old", b"young", b"youngest")
            make_old(path_of(disk.root / "kv", b"old"), 2 * HOUR)
            make_old(path_of(disk.root / "kv", b"young"), HOUR)
            disk.fail("mkdir", errno.ENOSPC, count=2)
            await put(engine, b"new")
            assert await there(engine, [b"old", b"young", b"youngest", b"new"]) == [
                b"youngest",
                b"new",
            ]


async def test_what_another_host_has_evicted_makes_no_room_here(tmp_path: Path) -> None:
    """That host has counted it; this one's cache does not know yet that it has gone."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root, capacity_bytes=4 * IMAGE) as engine:
            await put(engine, b"0", b"1", b"2", b"3")
            disk.fail("unlink", errno.ENOENT, match="*.kv", count=2)  # here they stay: to be seen
            await put(engine, b"new")
            assert len(disk.seen("unlink", match="*.kv")) == 3
            assert ledger(root) == taken(root) == 4 * IMAGE


async def test_a_disk_smaller_than_the_capacity(tmp_path: Path) -> None:
    """Goes on within what there is; refuses, with advice, what can't fit."""
    with small_disk(tmp_path, 3 << 20, "ext4") as disk:
        root = disk / "kv"
        keys = [b"%d" % i for i in range(80)]
        async with opened(root, capacity_bytes=1 << 30) as engine:
            await put(engine, *keys)
            left = await there(engine, keys)
            assert left == keys[-len(left) :]
            assert len(left) >= 8
            assert ledger(root) == taken(root) == len(left) * IMAGE
            with pytest.raises(StorageFull, match="lower capacity_bytes"):
                await engine.store(b"big", bytes(3 << 20))
            assert temporaries(root) == []
            await put(engine, b"small")


# --- damage ---------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, PAGE)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    os.truncate(path, IMAGE + PAGE)


def swap(path: Path) -> None:
    """Another block's file under this name."""
    path.write_bytes(image(NAMESPACE, b"other", 0, content(b"other", NBYTES)))


def flip_stamp(path: Path) -> None:
    flip(path, 40)


def flip_payload(path: Path) -> None:
    flip(path, PAGE + NBYTES - 1)


@pytest.mark.parametrize(
    "spoil", [truncate, empty, lengthen, swap, flip_stamp, flip_payload], ids=lambda f: f.__name__
)
async def test_damaged_files(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """Are found out, put aside and counted; then it is a miss; neighbours load; a store heals."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        await put(engine, b"before", b"key", b"after")
        spoil(path_of(root, b"key"))
        outcomes = await engine.load_many(
            [(key, bytearray(NBYTES)) for key in (b"before", b"key", b"after")]
        )
        assert [type(outcome.error) for outcome in outcomes] == [
            type(None),
            BlockCorrupt,
            type(None),
        ]
        assert str(outcomes[1].error).count(path_of(root, b"key").name) == 1
        assert engine.statistics().tiers[0].quarantined == 1
        assert len(os.listdir(root / "quarantine")) == 1
        assert not await get(engine, b"key")
        await put(engine, b"key")
        assert await there(engine, [b"before", b"key", b"after"]) == [b"before", b"key", b"after"]
    async with opened(root, capacity_bytes=4 * IMAGE) as engine:
        assert ledger(root) == taken(root)
        await put(engine, b"more")
        assert not sum(path.stat().st_size for path in root.glob("quarantine/*"))  # first to go
        assert await there(engine, [b"before", b"key", b"after", b"more"])


async def test_a_damaged_file_is_replaced_by_a_store(tmp_path: Path) -> None:
    """A stamp that is not whole is no block that is there already."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        await put(engine, b"key")
        flip_stamp(path_of(root, b"key"))
        await put(engine, b"key")
        assert await get(engine, b"key")
        assert ledger(root) == taken(root) == IMAGE
        truncate(path_of(root, b"key"))
        await put(engine, b"key")
        assert await get(engine, b"key")
        assert temporaries(root) == []


async def test_a_file_of_another_length_is_put_aside_whatever_memory_asks(tmp_path: Path) -> None:
    """Also for memory that storage writes to itself, though the image in front is whole."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        await engine.store(b"key", bytes(2 * PAGE))
        path = path_of(root, b"key")
        os.truncate(path, path.stat().st_size + PAGE)
        region = engine.register(aligned(2 * PAGE))
        with pytest.raises(BlockCorrupt):
            await engine.load(b"key", region)
        assert not await engine.load(b"key", region)
        assert engine.statistics().tiers[0].quarantined == 1


async def test_a_good_file_is_never_put_aside_for_a_bad_one(tmp_path: Path) -> None:
    """Replaced while the bad one was being read, it stays."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        await put(engine, b"key")
        flip_payload(path_of(root, b"key"))
        engine.held.hold("landing", lambda transfer: not transfer.write)
        loading = asyncio.ensure_future(failure(engine, b"key"))
        await engine.held.wait_held("landing")
        fresh = tmp_path / "fresh"
        fresh.write_bytes(image(NAMESPACE, b"key", 0, content(b"key", NBYTES)))
        fresh.rename(path_of(root, b"key"))
        engine.held.release()
        assert type(await loading) is BlockCorrupt
        assert engine.statistics().tiers[0].quarantined == 0
        assert await get(engine, b"key")


def plant_link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def plant_folder(path: Path, _: Path) -> None:
    path.mkdir()


def plant_pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


def plant_folder_link(path: Path, target: Path) -> None:
    path.parent.rmdir()
    path.parent.symlink_to(target.parent)


@pytest.mark.parametrize(
    "plant", [plant_link, plant_folder, plant_pipe, plant_folder_link], ids=lambda f: f.__name__
)
async def test_what_is_no_file_is_refused(
    tmp_path: Path, plant: Callable[[Path, Path], None]
) -> None:
    """Load, store and delete say what to remove; nothing is followed, read or changed."""
    root, path = tmp_path / "kv", path_of(tmp_path / "kv", b"key")
    target = tmp_path / "elsewhere" / path.name
    target.parent.mkdir()
    async with opened(root) as engine:
        await put(engine, b"key", b"neighbour")
        path.rename(target)
        make_old(target, HOUR)
        before = target.stat()
        plant(path, target)
        outcomes = await engine.store_many([(b"key", bytes(1))])
        for error in (outcomes[0].error, await failure(engine, b"key")):
            assert isinstance(error, TransferError)
            assert error.errno == errno.ELOOP
            assert "remove it" in str(error)
        with pytest.raises(TransferError, match="remove it"):
            await engine.delete(b"key")
        assert await get(engine, b"neighbour")
        assert temporaries(root) == []
        assert engine.statistics().tiers[0].quarantined == 0
    assert target.read_bytes() == image(NAMESPACE, b"key", 0, content(b"key", NBYTES))
    assert target.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("name", ["ledger", "openers"])
async def test_a_planted_pipe_is_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "kv"
    await asyncio.to_thread(prepare_root, root, "files")
    os.mkfifo(root / name)
    with pytest.raises(ConfigError, match=r"no regular file.*remove it"):
        async with opened(root):
            pass


@pytest.mark.parametrize("name", ["tmp", "quarantine", "ledger", "openers", "namespace"])
async def test_a_planted_root_entry_is_refused(tmp_path: Path, name: str) -> None:
    """Opening fails rather than follow a link, and leaves nothing behind it."""
    root, elsewhere = tmp_path / "kv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    await asyncio.to_thread(prepare_root, root, "files")
    (root / (digest(NAMESPACE).hex() if name == "namespace" else name)).symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="root="):
        async with opened(root):
            pass
    assert os.listdir(elsewhere) == []


async def test_directories_that_can_not_be_used(tmp_path: Path) -> None:
    """Each is refused with what is wrong with it."""
    await asyncio.to_thread(prepare_root, tmp_path / "slabs", "slabs")
    (tmp_path / "file").touch()
    for root, why in (
        (tmp_path / "slabs", "layout"),
        (tmp_path / "file", "not a directory"),
        (tmp_path / "no" / "parent", "parent"),
    ):
        with pytest.raises(ConfigError, match=why):
            async with opened(root):
                pass
    root = tmp_path / "kv"
    async with opened(root) as engine:
        await put(engine, b"key")
    with read_only(root), pytest.raises(ConfigError, match="Read-only"):
        async with opened(root):
            pass


# --- faults ---------------------------------------------------------------------------------


async def test_a_file_system_without_hard_links(tmp_path: Path) -> None:
    """There blocks are renamed under the lock instead; two at once are still counted once."""
    with FaultyDisk(tmp_path) as disk:
        disk.fail("link", errno.EPERM)
        root = disk.root / "kv"
        async with opened(root) as one, opened(root) as two:
            for engine in (one, two):
                engine.held.hold("landing")
            payload = content(b"key", NBYTES)
            stores = [asyncio.ensure_future(each.store(b"key", payload)) for each in (one, two)]
            for engine in (one, two):
                await engine.held.wait_held("landing")
                engine.held.release()
            assert sorted(await asyncio.gather(*stores)) == [False, True]
            assert await get(one, b"key")
            assert ledger(root) == taken(root) == IMAGE


async def is_taken_back(disk: FaultyDisk, engine: Engine, block: Any) -> None:
    """A store whose deadline passes while the disk hangs; another may be stored then."""
    root = disk.root / "kv"
    await is_late(disk, engine.store(b"key", block))
    disk.release()
    await put(engine, b"after")
    assert not path_of(root, b"key").exists()
    assert temporaries(root) == []


@pytest.mark.parametrize("memory", ["aligned", "unaligned"])
async def test_a_store_abandoned_while_it_is_linked_is_taken_back(
    tmp_path: Path, memory: str
) -> None:
    """Past its deadline nothing of it becomes visible, and nothing stays reserved."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root) as engine:
            held = aligned(NBYTES + 100, 1)
            block = engine.register(held) if memory == "aligned" else bytes(held)
            await put(engine, b"before")
            disk.hang("link")
            await is_taken_back(disk, engine, block)
            assert ledger(root) == taken(root) == 2 * IMAGE


@pytest.mark.parametrize("before", [0, NBYTES - PAGE])
async def test_a_store_abandoned_while_it_is_renamed_is_taken_back(
    tmp_path: Path, before: int
) -> None:
    """So it is where there are no hard links, or a block of another size, which is gone then."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root) as engine:
            if before:
                assert await engine.store(b"key", bytes(before))
            else:
                disk.fail("link", errno.EPERM)
            disk.hang("rename", match="*.kv")
            await is_taken_back(disk, engine, bytes(NBYTES))
            assert ledger(root) == taken(root) == IMAGE


async def test_what_another_has_linked_is_not_taken_back(tmp_path: Path) -> None:
    """By a store of the same block that finds it there, and passes its deadline just then."""
    root = tmp_path / "kv"
    async with opened(root) as late, opened(root) as other:
        late.held.hold("landing")
        storing = asyncio.ensure_future(late.store(b"key", content(b"key", NBYTES)))
        await late.held.wait_held("landing")
        await put(other, b"key")
        with locked(root):
            late.held.release()
            await until(lambda: not open_files(root))  # it tries to link, and waits for the lock
            skip_time(HOUR)
            with pytest.raises(TransferTimeout):
                await storing
        await late.delete(b"x")  # comes after whatever was going on
        assert await get(other, b"key")
        assert temporaries(root) == []
        assert ledger(root) == taken(root) == IMAGE


async def test_what_was_written_in_vain_does_not_stay(tmp_path: Path) -> None:
    """Another has the name, and the ledger can't be opened: who comes next removes it."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root) as engine, opened(root) as other:
            engine.held.hold("landing")
            storing = asyncio.ensure_future(engine.store(b"key", content(b"key", NBYTES)))
            await engine.held.wait_held("landing")
            await put(other, b"key")
            disk.fail("open", errno.EIO, match="ledger")
            engine.held.release()
            with pytest.raises(TransferError):
                await storing
            disk.clear()
            await put(engine, b"next")
            assert temporaries(root) == []
            assert ledger(root) == taken(root) == 2 * IMAGE


async def test_a_temporary_that_is_a_block_by_now_frees_nothing(tmp_path: Path) -> None:
    """It could not be removed when the block had its name, and is when the next one comes."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root) as engine:
            disk.fail("unlink", errno.EIO, match="*/tmp/*")
            await put(engine, b"key")
            assert len(temporaries(root)) == 1
            disk.clear()
            await put(engine, b"next")
            assert temporaries(root) == []
            assert ledger(root) == taken(root) == 2 * IMAGE


async def test_who_stores_after_a_delete_shares_no_store_that_it_has_dropped(
    tmp_path: Path,
) -> None:
    """Though one job did both, and the store is told late, for many others ended with it."""
    keys = [b"%d" % number for number in range(32)]
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv") as engine:
            await put(engine, b"other")
            engine.held.hold("landing")
            storing = asyncio.ensure_future(engine.store_many([(key, bytes(PAGE)) for key in keys]))
            await engine.held.wait_held("landing", len(keys))
            disk.hang("unlink", match="*.kv")
            first = asyncio.ensure_future(engine.delete(b"other"))
            await asyncio.to_thread(disk.wait_waiting, 1)
            engine.held.release()
            await until(lambda: engine.held.delivered == engine.held.submitted)
            second = asyncio.ensure_future(engine.delete(keys[-1]))
            await turns()
            disk.release()
            assert await first
            assert await second
            assert await engine.store(keys[-1], content(keys[-1], NBYTES)[:PAGE])
            assert await engine.load(keys[-1], bytearray(PAGE))
            assert {outcome.status for outcome in await storing} == {"stored"}


async def test_where_nothing_moves_there_is_no_path(tmp_path: Path) -> None:
    """A block that is there, one that is not, memory of another size, no room: path "none"."""

    class Events:
        def settled(self, event: Event) -> None:
            seen.append((event.outcome, event.path))

    seen: list[tuple[str, str]] = []
    async with opened(tmp_path / "kv") as engine:
        engine.observe(Events())
        memory = engine.register(aligned(NBYTES))
        assert await engine.store(b"a", memory)
        assert not await engine.store(b"a", memory)
        assert not await engine.load(b"b", memory)
        for nbytes in (PAGE, NBYTES - 1):
            with pytest.raises(ConfigError):
                await engine.load(b"a", bytearray(nbytes))
        with pytest.raises(StorageFull):
            await engine.store(b"c", engine.register(aligned(65 * IMAGE)))
        assert await engine.load(b"a", memory)
    assert seen == [
        ("stored", "bounce"),
        ("present", "none"),
        ("miss", "none"),
        *[("error", "none")] * 3,
        ("hit", "bounce"),
    ]


async def test_prefix_and_delete_have_deadlines(tmp_path: Path) -> None:
    """The directory does not answer; those who ask are told in time, and it all ends well."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root) as engine:
            await put(engine, b"here")
            async with opened(root) as other:
                await put(other, b"there")
            disk.hang("lookup", match="*.kv")
            with pytest.raises(TransferTimeout, match=r"prefix passed its deadline$"):
                await engine.prefix([b"there"], timeout_s=0.05)
            disk.release()
            assert await engine.prefix(iter([b"here", b"there", b"gone"])) == 2
            with locked(root), pytest.raises(TransferTimeout, match=r"it may still happen$"):
                await engine.delete(b"here", timeout_s=0.05)
            assert await engine.delete(b"there")
            assert await engine.prefix([b"here"]) == 0


async def test_closing_waits_for_no_lock(tmp_path: Path) -> None:
    """Whoever has the ledger may be stopped: what would still be removed stays."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root) as engine:
            engine.held.hold("landing")
            storing = asyncio.ensure_future(engine.store(b"key", bytes(NBYTES), timeout_s=0.05))
            await engine.held.wait_held("landing")
            with pytest.raises(TransferTimeout):
                await storing
            disk.fail("unlink", errno.EIO)
            engine.held.release()
            await until(lambda: not engine.statistics().in_flight)
            disk.clear()
            with locked(root):
                async with asyncio.timeout(10):
                    await engine.aclose()
            assert len(temporaries(root)) == 1


async def test_a_temporary_that_was_made_all_the_same_goes(tmp_path: Path) -> None:
    """A network file system may lose the answer. Its owner lives, so nobody else removes it."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root) as engine:
            disk.hang("create", match="*.*.*")
            storing = asyncio.ensure_future(put(engine, b"key"))
            await asyncio.to_thread(disk.wait_waiting, 1)
            (disk.backing / "kv" / disk.seen("create")[-1].path.partition("/")[2]).touch()
            disk.release(errno.EIO)
            with pytest.raises(TransferError):
                await storing
            assert temporaries(root) == []
            assert ledger(root) == taken(root) == 0


async def test_a_temporary_that_has_gone_fails_no_other_store(tmp_path: Path) -> None:
    """A network file system that asked twice says of its removal that there was nothing."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root) as engine:
            engine.held.hold("landing")
            with pytest.raises(TransferTimeout):
                await engine.store(b"late", bytes(NBYTES), timeout_s=0.05)
            await engine.held.wait_held("landing")
            (gone,) = temporaries(root)
            disk.hang("unlink", match=gone)
            with locked(root):
                deleting = asyncio.ensure_future(engine.delete(b"x"))
                await asyncio.sleep(0)  # its job waits for the ledger; the next does both
                engine.held.release()
                await until(lambda: engine.held.delivered == engine.held.submitted)
                storing = asyncio.ensure_future(put(engine, b"key"))
                await turns()
            await asyncio.to_thread(disk.wait_waiting, 1)
            (disk.backing / "kv" / "tmp" / gone).unlink()
            disk.release()
            assert not await deleting
            await storing
            assert temporaries(root) == []
            assert ledger(root) == taken(root) == IMAGE


@pytest.mark.parametrize("how", ["linked", "renamed"])
async def test_names_outlast_power_before_anybody_is_told(tmp_path: Path, how: str) -> None:
    """Its folder, which was there before, is synced; so it is when a name goes."""
    folder = str(path_of(Path("kv"), b"key").parent)
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv", durable="power") as engine:
            await put(engine, b"key")
            before = len(disk.seen("fsyncdir", folder))
            assert await engine.delete(b"key")
            assert len(disk.seen("fsyncdir", folder)) == before + 1
            if how == "renamed":
                disk.fail("link", errno.EPERM)
            await put(engine, b"key")
            assert len(disk.seen("fsyncdir", folder)) == before + 2


async def test_an_abandoned_store_is_never_linked(tmp_path: Path) -> None:
    """Not even for the moment that another process would need to see it."""
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv") as engine:
            await put(engine, b"before")
            linked = len(disk.seen("link"))
            engine.held.hold("landing")
            with pytest.raises(TransferTimeout):
                await engine.store(b"key", bytes(NBYTES), timeout_s=0.05)
            await engine.held.wait_held("landing")
            engine.held.release()
            await put(engine, b"after")
            assert len(disk.seen("link")) == linked + 1


@pytest.mark.parametrize(
    ("op", "match"),
    [
        ("create", "*.*.*"),
        ("fallocate", "*"),
        ("mkdir", "*"),
        ("write", "*.*.*"),
        ("write", "ledger"),
        ("setattr", "*.*.*"),
        ("link", "*"),
        ("fsync", "*.*.*"),
        ("fsyncdir", "*"),
    ],
)
async def test_a_store_that_meets_an_error(tmp_path: Path, op: Any, match: str) -> None:
    """Says which, once, and leaves neither bytes nor reservations; loads don't mind."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root, durable="power") as engine:
            await put(engine, b"sound")
            disk.fail(op, errno.EIO, match=match)
            outcomes = await engine.store_many([(k, content(k, NBYTES)) for k in (b"a", b"b")])
            assert [type(outcome.error) for outcome in outcomes] == [TransferError] * 2
            assert {getattr(outcome.error, "errno", 0) for outcome in outcomes} == {errno.EIO}
            assert await get(engine, b"sound")
            disk.clear()
            await engine.store_many([(k, content(k, NBYTES)) for k in (b"a", b"b")])
            assert await there(engine, [b"a", b"b"]) == [b"a", b"b"]
            assert temporaries(root) == []
            assert ledger(root) == taken(root) == 3 * IMAGE


async def test_a_folder_that_can_not_be_synced_fails_all_that_counted_on_it(tmp_path: Path) -> None:
    """The system tells of it once, but two stores of one job wait for the folder."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root, durable="power") as engine:
            await put(engine, b"sound")
            engine.held.hold("landing")
            blocks = [(key, content(key, NBYTES)) for key in (b"a", b"b")]
            storing = asyncio.ensure_future(engine.store_many(blocks))
            await engine.held.wait_held("landing", 2)
            disk.fail("fsyncdir", errno.EIO, count=1)
            engine.held.release()
            outcomes = await storing
            assert [type(outcome.error) for outcome in outcomes] == [TransferError] * 2
            await put(engine, b"c")


@pytest.mark.parametrize(("op", "count"), [("open", 1), ("read", 2)])
async def test_a_load_that_meets_an_error(tmp_path: Path, op: Any, count: int) -> None:
    """Is no proof against the block: it stays."""
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv") as engine:
            await put(engine, b"bad", b"good")
            disk.fail(op, errno.EIO, count=count)
            error = await failure(engine, b"bad")
            assert isinstance(error, TransferError)
            assert error.errno == errno.EIO
            assert await there(engine, [b"bad", b"good"]) == [b"bad", b"good"]


async def test_who_waits_long_for_the_ledger_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, by the log: that a deadline passed tells nobody why."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        with locked(root):
            with pytest.raises(TransferTimeout):
                await engine.store(b"late", bytes(NBYTES), timeout_s=0.05)
            await until(lambda: "locked" in caplog.text)
        await put(engine, b"late")
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"another process has had {root}/ledger locked for 1 s")


async def test_loads_do_not_wait_for_the_ledger(tmp_path: Path) -> None:
    """However long somebody else holds it; stores do, until their deadline."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        await put(engine, b"key")
        with locked(root):
            for _ in range(3):
                with pytest.raises(TransferTimeout):
                    await engine.store(b"late", bytes(NBYTES), timeout_s=0.05)
            deleting = asyncio.ensure_future(engine.delete(b"key"))
            assert await get(engine, b"key")
            assert await engine.prefix([b"key", b"late"]) == 1
        assert await deleting
        await put(engine, b"late")
        assert ledger(root) == taken(root) == IMAGE


# --- prefixes beside loads ------------------------------------------------------------------


def plant_blocks(root: Path, keys: list[bytes]) -> None:
    """Files that a prefix finds: it asks for no more than their names."""
    for key in keys:
        path_of(root, key).parent.mkdir(mode=0o700, exist_ok=True)
        path_of(root, key).touch(0o600)


async def test_prefixes_leave_a_thread_to_loads(tmp_path: Path) -> None:
    """However many are asked for: one is looked for at a time, and the others are told as well."""
    keys = [b"%d" % n for n in range(100)]
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root) as engine:
            await put(engine, b"wanted")
            plant_blocks(disk.backing / "kv", keys)
            disk.hang("lookup", match=path_of(root, keys[0]).name)
            asked = [asyncio.ensure_future(engine.prefix(keys[n % 2 :])) for n in range(8)]
            await asyncio.to_thread(disk.wait_waiting, 1)
            assert await get(engine, b"wanted")
            assert not any(each.done() for each in asked)
            disk.release()
            disk.clear()
            assert await asyncio.gather(*asked) == [100, 99] * 4
            assert engine.statistics().tiers[0].blocks == 101


async def test_a_load_waits_for_one_piece_of_a_prefix(tmp_path: Path) -> None:
    """Where the other thread waits for the ledger: not for a whole prefix, nor for all of them."""
    keys = [b"%d" % n for n in range(300)]
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root) as engine:
            await put(engine, b"wanted")
            plant_blocks(disk.backing / "kv", keys)
            with locked(root):
                deleting = asyncio.ensure_future(engine.delete(b"gone"))
                await asyncio.sleep(0)  # its job is first in line
                # A piece, and perhaps one that was in line already; and the block's own.
                disk.hang("lookup", match="*.kv", skip=2 * 64 + 1)
                asked = [asyncio.ensure_future(engine.prefix(keys)) for _ in range(4)]
                await asyncio.sleep(0)  # and then they
                assert await get(engine, b"wanted")
                await asyncio.to_thread(disk.wait_waiting, 1)
                assert not any(each.done() for each in (*asked, deleting))
                disk.release()
                disk.clear()
                assert await asyncio.gather(*asked) == [300] * 4
            await deleting


async def test_a_prefix_that_nobody_waits_for_is_looked_for_no_further(tmp_path: Path) -> None:
    """Than the piece that is under way."""
    keys = [b"%d" % n for n in range(300)]
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root) as engine:
            plant_blocks(disk.backing / "kv", keys)
            disk.hang("lookup", match="*.kv")
            with pytest.raises(TransferTimeout):
                await engine.prefix(keys, timeout_s=0.05)
            disk.release()
            disk.clear()
            for _ in range(5):  # in turns with it
                assert await engine.prefix([b"gone"]) == 0
            assert engine.statistics().tiers[0].blocks == 64


async def test_closing_waits_for_a_prefix(tmp_path: Path) -> None:
    """All its pieces: whoever asked is told."""
    keys = [b"%d" % n for n in range(300)]
    async with opened(tmp_path / "kv") as engine:
        plant_blocks(tmp_path / "kv", keys)
        asked = [asyncio.ensure_future(engine.prefix(keys)) for _ in range(3)]
        await asyncio.sleep(0)
        await engine.aclose()
        assert await asyncio.gather(*asked) == [300] * 3
