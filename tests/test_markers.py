"""What a tier of files tells the next tier by markers, also of neighbours, and after deaths."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import sharing
from faults import FaultyDisk
from kvgds import BlockCorrupt, ConfigError, Namespace, TransferError
from kvgds.upkeep import fsck, gc, listing
from sharing import HOUR, flip, is_late, ledger, make_old, path_of, taken, temporaries
from stacks import SIZE, SLOT, Stacked
from stacks import sharing as stacked
from support import NAMESPACE, PAGE, content, digest, turns, until

if TYPE_CHECKING:
    from collections.abc import Sequence

A, B, C, D, E, F = (bytes([letter]) for letter in b"abcdef")


def marker(root: Path, key: bytes, namespace: Namespace = NAMESPACE) -> Path:
    """Where docs/format.md has the marker of a block."""
    path = path_of(root, key, namespace)
    return root / "owed" / f"{digest(namespace).hex()}.{path.parent.name}.{path.name}"


def marked(root: Path, *keys: bytes) -> list[bytes]:
    """Those of the keys that have a marker; there are no others."""
    found = [key for key in keys if marker(root, key).exists()]
    assert len(found) == len(os.listdir(root / "owed"))
    return found


async def settled(engine: Stacked) -> None:
    """Wait until nothing is under way."""
    await until(engine.tier_idle)


async def put_aged(root: Path, engine: Stacked, keys: Sequence[bytes]) -> None:
    """Store blocks, the first of them used longest ago."""
    await engine.fill(*keys)
    for age, key in enumerate(reversed(keys), 1):
        make_old(path_of(root, key), age * HOUR)


async def test_a_block_is_marked_until_the_next_tier_has_it(tmp_path: Path) -> None:
    """By an empty file that only the owner may read; a promotion never is."""
    root = tmp_path / "kv"
    async with stacked(root) as engine:
        assert list(engine.tier.owed()) == []
        await engine.fill(A, B)
        await engine.promote(C)
        assert marked(root, A, B, C) == [A, B]
        status = marker(root, A).lstat()
        assert (status.st_size, oct(status.st_mode)) == (0, "0o100600")
        await engine.upload(A)
        await settled(engine)
        assert marked(root, A, B, C) == [B]
        await engine.upload(A, C)  # once more does no harm
        await settled(engine)
        assert await engine.there(A, B, C) == [A, B, C]
        assert ledger(root) == taken(root) == 3 * SLOT


async def test_a_tier_that_stands_alone_marks_nothing(tmp_path: Path) -> None:
    """And minds no markers: what others owe is evicted in its turn."""
    root = tmp_path / "kv"
    async with sharing.opened(root, capacity_bytes=4 * SLOT) as alone:
        assert await alone.store(A, content(A, SIZE))
        assert not (root / "owed").exists()
        make_old(path_of(root, A), HOUR)
        async with stacked(root) as engine:
            await put_aged(root, engine, [B, C])
        make_old(path_of(root, B), 2 * HOUR)
        for key in (D, E):
            assert await alone.store(key, content(key, SIZE))
        assert await alone.prefix([B]) == 0
        assert await alone.prefix([A, C, D, E]) == 4
        assert alone.statistics().tiers[0].dropped == 0


async def test_the_next_opening_knows_what_is_owed(tmp_path: Path) -> None:
    """The least recently used first, with its bytes; not what was stored without a next tier."""
    root = tmp_path / "kv"
    other = Namespace(model="other", revision="1")
    async with sharing.opened(root, capacity_bytes=64 * SLOT) as alone:
        await alone.store(D, content(D, SIZE))
    async with stacked(root) as engine:
        await put_aged(root, engine, [B, C])
        await engine.fill(A, nbytes=SIZE - 5)
        await engine.upload(C)
        make_old(path_of(root, A), 5 * HOUR)
    async with stacked(root, namespace=other) as engine:
        assert list(engine.tier.owed()) == []
        await engine.fill(F)
    async with stacked(root) as engine:
        assert list(engine.tier.owed()) == [(A, SIZE - 5), (B, SIZE)]
        assert list(engine.tier.owed()) == []
    assert marker(root, F, other).exists()


async def test_a_neighbours_debts_are_told_as_well(tmp_path: Path) -> None:
    """It may die before it has paid; and who pays first, pays for both."""
    root = tmp_path / "kv"
    async with stacked(root) as one:
        await one.fill(A)
        async with stacked(root) as two:
            assert two.owed() == [A]
            await two.upload(A)
            await settled(two)
            assert marked(root, A) == []
            assert not await two.store(A, content(A, SIZE))
            assert marked(root, A) == []
            await one.upload(A)


async def test_what_the_next_tier_has_goes_first(tmp_path: Path) -> None:
    """Then the rest, which is counted; nobody waits. To be taken on is no use of a block."""
    root = tmp_path / "kv"
    async with stacked(root, 5) as engine:
        await put_aged(root, engine, [A, B, C, D])
        await engine.upload(D, C)
        await settled(engine)
        await engine.fill(E, F)
        assert await engine.there(A, B, C, D, E, F) == [A, B, D, E, F]
        assert engine.evicted == (1, 0)
        await engine.fill(b"g", b"h")
        assert await engine.there(A, B, D, E, F, b"g", b"h") == [B, E, F, b"g", b"h"]
        assert engine.evicted == (3, 1)
        assert engine.backlog.hastened == []
        assert marked(root, A, B, D, E, F, b"g", b"h") == [B, E, F, b"g", b"h"]
        engine.tier.look_again([B])


async def test_a_marker_goes_with_its_block(tmp_path: Path) -> None:
    """Deleted or corrupt; replaced by another, it stays, and a promotion replaces nothing."""
    root = tmp_path / "kv"
    async with stacked(root) as engine:
        await engine.fill(A, B, C, D)
        assert await engine.delete(A)
        engine.tier.marked.add(B)
        assert not await engine.store(B, content(B, SIZE - 5))
        assert await engine.store(C, content(C, SIZE - 5))
        flip(path_of(root, D), PAGE)
        with pytest.raises(BlockCorrupt):
            await engine.load(D, bytearray(SIZE))
        assert marked(root, A, B, C, D) == [B, C]


async def test_a_promotion_that_is_replaced_is_owed(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    async with stacked(root) as engine:
        await engine.promote(A)
        assert await engine.store(A, content(A, SIZE - 5))
        assert marked(root, A) == [A]


async def test_markers_that_have_lost_their_block_are_swept(tmp_path: Path) -> None:
    """An hour later: until then there may be somebody who is about to give them one."""
    root = tmp_path / "kv"
    async with stacked(root) as engine:
        await engine.fill(A, B, C)
    for key in (A, B):
        path_of(root, key).unlink()
    for key in (A, C):
        make_old(marker(root, key), 2 * HOUR)
    (root / "owed" / "no marker").touch()
    async with stacked(root) as engine:
        assert engine.owed() == [C]
        assert [key for key in (A, B, C) if marker(root, key).exists()] == [B, C]
        make_old(marker(root, B), 2 * HOUR)
        await engine.fill(B)
        async with stacked(root) as other:
            assert other.owed() == [C, B]
    assert marker(root, B).lstat().st_mtime > path_of(root, C).stat().st_mtime - HOUR


async def test_what_no_load_would_read_is_owed_to_nobody(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    async with stacked(root) as engine:
        await engine.fill(A, B, C, D)
    flip(path_of(root, A), 40)
    os.truncate(path_of(root, B), PAGE)
    path_of(root, C).unlink()
    path_of(root, C).symlink_to(path_of(root, D))
    async with stacked(root) as engine:
        assert engine.owed() == [D]


async def test_a_block_is_marked_before_it_can_be_seen(tmp_path: Path) -> None:
    """What can't be marked is not stored; and a store that was given up leaves nothing but that."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with stacked(root, timeout_s=20.0) as engine:
            disk.fail("create", errno.EIO, match="*.*.*.kv")
            with pytest.raises(TransferError) as raised:
                await engine.store(A, content(A, SIZE))
            assert raised.value.errno == errno.EIO
            assert await engine.there(A) == []
            disk.clear()
            disk.hang("link")
            storing = engine.start(A)
            await asyncio.to_thread(disk.wait_waiting, 1)
            assert (disk.backing / "kv" / "owed" / marker(root, A).name).exists()
            assert not (disk.backing / path_of(root, A).relative_to(disk.root)).exists()
            disk.release()
            assert await storing
            disk.hang("link")
            await is_late(disk, engine.store(B, bytes(SIZE)))
            disk.release()
            await engine.fill(C)
            assert marked(root, A, B, C) == [A, C]
            assert temporaries(root) == []


async def test_of_two_that_store_one_block_it_is_owed_once(tmp_path: Path) -> None:
    """Also where there are no links, and it is renamed under the lock instead."""
    with FaultyDisk(tmp_path) as disk:
        disk.fail("link", errno.EPERM)
        root = disk.root / "kv"
        async with stacked(root) as one, stacked(root) as two:
            for engine in (one, two):
                engine.held.hold("landing")
            stores = [engine.start(A) for engine in (one, two)]
            for engine in (one, two):
                await engine.held.wait_held("landing")
                engine.held.release()
            assert sorted(await asyncio.gather(*stores)) == [False, True]
            assert marked(root, A) == [A]


async def test_a_marker_that_goes_while_its_block_comes_is_made_again(tmp_path: Path) -> None:
    """Without links: whoever removed the block that was there has removed the marker as well."""
    with FaultyDisk(tmp_path) as disk:
        disk.fail("link", errno.EPERM)
        root = disk.root / "kv"
        async with stacked(root) as engine:
            engine.held.hold("landing")
            storing = engine.start(A)
            await engine.held.wait_held("landing")
            with sharing.locked(root):
                engine.held.release()
                await until(marker(root, A).exists)
                marker(root, A).unlink()
            assert await storing
            assert marked(root, A) == [A]


async def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "kv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    async with stacked(root) as engine:
        await engine.fill(A)
        (elsewhere / marker(root, A).name).touch()
        (root / "owed").rename(tmp_path / "aside")
        (root / "owed").symlink_to(elsewhere)
        with pytest.raises(TransferError):
            await engine.store(B, content(B, SIZE))
        await engine.upload(A)
        await settled(engine)
    with pytest.raises(ConfigError, match="root="):
        async with stacked(root):
            pass
    with pytest.raises(ConfigError, match="root="):
        await asyncio.to_thread(gc, root, keep_bytes=0)
    assert os.listdir(elsewhere) == [marker(root, A).name]


async def test_upkeep_knows_markers(tmp_path: Path) -> None:
    """They are nothing wrong, count for nothing, and go with what gc and repairs remove."""
    root = tmp_path / "kv"
    async with stacked(root) as engine:
        await put_aged(root, engine, [A, B, C])
    assert (await asyncio.to_thread(fsck, root)).problems == []
    found = await asyncio.to_thread(listing, root)
    assert (found.namespaces[0].blocks, found.allocated_bytes) == (3, 3 * SLOT)
    done = await asyncio.to_thread(gc, root, keep_bytes=2 * SLOT)
    assert (done.blocks, done.freed_bytes) == (1, SLOT)
    assert marked(root, A, B, C) == [B, C]
    flip(path_of(root, B), PAGE)
    assert (await asyncio.to_thread(fsck, root, repair=True)).clean
    assert marked(root, A, B, C) == [C]


# --- killed -----------------------------------------------------------------------------------


async def live(root: Path) -> None:
    async with stacked(root) as engine:
        await engine.fill(A, B)
        await engine.upload(A)
        await engine.delete(A[:0] + b"whatever")  # comes after the marker was removed
        engine.held.hold("landing")
        engine.start(C)
        await engine.held.wait_held("landing")
        await turns()
        os.kill(os.getpid(), signal.SIGKILL)


async def test_killed_with_debts(tmp_path: Path) -> None:
    """What the next tier had not got yet is owed by whoever comes next."""
    root = tmp_path / "kv"
    child = await asyncio.create_subprocess_exec(sys.executable, __file__, os.fspath(root))
    assert await child.wait() == -signal.SIGKILL
    async with stacked(root) as engine:
        assert engine.owed() == [B]
        assert await engine.there(A, B, C) == [A, B]


if __name__ == "__main__":
    asyncio.run(live(Path(sys.argv[1])))
