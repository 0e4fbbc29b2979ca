"""What a tier of slabs knows of the next tier: which blocks that lacks, and which may go.

Without a next tier nothing of this is to be seen: the rest of the tests show that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kvgds.tiers.slabs
from kvgds import StorageFull, TransferError, TransferTimeout
from kvgds.tiers.index import Changes, Index
from kvgds.upkeep import fsck, listing
from stacks import SIZE, SLOT, Stacked, marks, stacked
from support import MIB, PAGE, config, content, index_held, opened, rows_kept, spoil, turns, until

if TYPE_CHECKING:
    from collections.abc import Sequence

A, B, C, D, E, F, G = (bytes([letter]) for letter in b"abcdefg")


# --- what goes first ------------------------------------------------------------------------


async def test_what_the_next_tier_has_goes_first(tmp_path: Path) -> None:
    """By its last use, in whatever order it was taken; to be taken on is no use of a block."""
    async with stacked(tmp_path / "kv") as engine:
        await engine.fill(A, B, C, D)
        await engine.upload(C)
        await engine.upload(B)
        await engine.fill(E)
        assert await engine.there(A, B, C, D, E) == [A, C, D, E]
        await engine.fill(F)
        assert await engine.there(A, C, D, E, F) == [A, D, E, F]
        assert engine.evicted == (2, 0)


async def test_a_use_counts_among_those_that_the_next_tier_has(tmp_path: Path) -> None:
    async with stacked(tmp_path / "kv") as engine:
        await engine.fill(A, B, C, D)
        await engine.upload(A, B)
        assert await engine.load(A, bytearray(SIZE))
        await engine.fill(E)
        assert await engine.there(A, B, C, D, E) == [A, C, D, E]


async def test_a_promotion_is_nothing_that_is_owed(tmp_path: Path) -> None:
    """The next tier has it: it may go at once, also after a restart."""
    root = tmp_path / "kv"
    async with stacked(root) as engine:
        await engine.fill(A)
        await engine.promote(B, C)
    assert marks(root) == {A: 0, B: 1, C: 1}
    async with stacked(root) as engine:
        assert engine.owed() == [A]
        await engine.fill(D, E)
        assert await engine.there(A, B, C, D, E) == [A, C, D, E]
        assert engine.evicted == (1, 0)


async def test_what_was_replaced_meanwhile_is_still_owed(tmp_path: Path) -> None:
    """The next tier got the block that was there before, not the one that is there now."""
    root = tmp_path / "kv"
    async with stacked(root) as engine:
        await engine.fill(A, B)
        moves = [await engine.bring(A), await engine.bring(B)]
        assert await engine.delete(A)
        assert await engine.delete(B)
        await engine.fill(A)
        engine.tier.mirrored(moves)
    assert marks(root) == {A: 0}
    async with stacked(root) as engine:
        assert engine.owed() == [A]


# --- waiting --------------------------------------------------------------------------------


async def test_a_store_waits_until_the_next_tier_has_a_block(tmp_path: Path) -> None:
    """The coldest are asked for, and a few more: then those behind it need not wait."""
    async with stacked(tmp_path / "kv") as engine:
        await engine.fill(A, B, C, D)
        assert engine.backlog.hastened == []
        storing = engine.start(E)
        await until(lambda: bool(engine.backlog.hastened))
        await turns()
        assert engine.backlog.hastened == [A, B]
        assert await engine.there(A, B, C, D, E) == [A, B, C, D]
        await engine.upload(A, B)
        assert await storing
        await engine.fill(F)
        assert engine.backlog.hastened == [A, B, C]
        assert await engine.there(A, B, C, D, E, F) == [C, D, E, F]
        assert engine.evicted == (2, 0)


async def test_many_that_wait_are_served_as_room_comes(tmp_path: Path) -> None:
    async with stacked(tmp_path / "kv", 3) as engine:
        await engine.fill(A, B, C)
        stores = [engine.start(key) for key in (D, E, F)]
        await until(lambda: engine.backlog.hastened == [A, B, C])
        await engine.upload(B)
        assert await stores[0]
        await engine.upload(A, C)
        await asyncio.gather(*stores)
        assert await engine.there(A, B, C, D, E, F) == [D, E, F]


async def test_waiting_ends_with_the_deadline(tmp_path: Path) -> None:
    async with stacked(tmp_path / "kv", 2) as engine:
        await engine.fill(A, B)
        with pytest.raises(TransferTimeout):
            await engine.store(C, content(C, SIZE), timeout_s=0.05)
        assert await engine.there(A, B, C) == [A, B]
        await engine.upload(B)
        await engine.fill(D)
        assert await engine.there(A, B, C, D) == [A, D]


async def test_nobody_waits_for_a_next_tier_that_does_not_answer(tmp_path: Path) -> None:
    """Those that wait go on when that is known; what goes is counted. Later, they wait."""
    async with stacked(tmp_path / "kv") as engine:
        await engine.fill(A, B, C, D)
        storing = engine.start(E)
        await until(lambda: bool(engine.backlog.hastened))
        engine.backlog.out = True
        engine.tier.look_again()
        assert await storing
        await engine.upload(D)
        await engine.fill(F, G)
        assert await engine.there(A, B, C, D, E, F, G) == [C, E, F, G]
        assert engine.evicted == (3, 2)
        engine.backlog.out = False
        engine.backlog.hastened.clear()
        waiting = engine.start(A)
        await until(lambda: engine.backlog.hastened == [C, E])
        await engine.upload(C)
        assert await waiting
        assert engine.evicted == (4, 2)


async def test_what_the_next_tier_will_never_take_holds_up_nobody(tmp_path: Path) -> None:
    """Given up, it may go as if it had been taken, and is counted; a restart tries it again."""
    root = tmp_path / "kv"
    async with stacked(root, 2) as engine:
        await engine.fill(A, B)
        storing = engine.start(C)
        await until(lambda: bool(engine.backlog.hastened))
        engine.tier.look_again([B, A, b"unknown"])
        assert await storing
        assert await engine.there(A, B, C) == [B, C]
        assert engine.evicted == (1, 1)
        await engine.upload(B)
        await engine.fill(D)
        assert engine.evicted == (2, 1)
        engine.tier.look_again([C])
    async with stacked(root, 2) as engine:
        assert engine.owed() == [C, D]


async def test_one_slot_is_enough(tmp_path: Path) -> None:
    """The only block is owed, is being taken on, and turns out to be corrupt."""
    root = tmp_path / "kv"
    async with stacked(root, 1) as engine:
        await engine.fill(A)
        storing = engine.start(B)
        await until(lambda: engine.backlog.hastened == [A])
        await engine.upload(A)
        assert await storing
        for nbytes in (SIZE // 2, SIZE):  # the slab changes hands
            storing = engine.start(C, nbytes)
            await until(lambda: B in engine.backlog.hastened or C in engine.backlog.hastened)
            key = (await engine.there(B, C))[0]
            await engine.upload(key, nbytes=SIZE if key == B else SIZE // 2)
            assert await storing
        storing = engine.start(D)
        spoil(root, C)
        with pytest.raises(kvgds.BlockCorrupt):
            await engine.load(C, bytearray(SIZE))
        with pytest.raises(StorageFull):
            await storing
        assert engine.evicted == (3, 0)


async def test_a_slot_that_is_being_read_is_waited_for(tmp_path: Path) -> None:
    """The only block that may go is being loaded: it goes when that has ended."""
    async with stacked(tmp_path / "kv", 2) as engine:
        await engine.fill(A, B)
        await engine.upload(A)
        engine.held.hold("landing", lambda transfer: not transfer.write)
        loading = asyncio.ensure_future(engine.load(A, bytearray(SIZE)))
        await engine.held.wait_held("landing")
        storing = engine.start(C)
        await turns()
        assert not storing.done()
        engine.held.release()
        assert await loading
        assert await storing
        assert await engine.there(A, B, C) == [B, C]


async def test_room_is_made_ahead_of_need_from_what_the_next_tier_has(tmp_path: Path) -> None:
    """A larger tier keeps some slots free: of blocks that may go, else it asks for some."""
    keys = [b"%d" % i for i in range(64)]
    async with stacked(tmp_path / "kv", 64, inflight_ops=1) as engine:
        await engine.fill(*keys[:63])
        await until(lambda: engine.backlog.hastened == keys[:4])
        engine.backlog.out = True
        engine.tier.look_again()
        await turns()
        assert engine.evicted == (0, 0)  # nobody needs it yet
        engine.backlog.out = False
        await engine.upload(*keys[:2])
        await until(lambda: engine.evicted == (2, 0))
        assert await engine.there(*keys[:3]) == [keys[2]]


# --- slabs that change hands ----------------------------------------------------------------


async def test_a_slab_is_given_up_only_when_all_of_it_was_taken(tmp_path: Path) -> None:
    """All room belongs to small blocks, and a large one comes."""
    keys = [b"%d" % i for i in range(64)]
    async with stacked(tmp_path / "kv", 64) as engine:
        await engine.fill(*keys)
        engine.backlog.hastened.clear()
        storing = engine.start(b"large", 30 * SLOT)
        taken: list[bytes] = []
        while not storing.done():
            await until(lambda: storing.done() or bool(set(engine.backlog.hastened) - set(taken)))
            for key in set(engine.backlog.hastened) - set(taken):
                await engine.upload(key)
                taken.append(key)
            await turns()
        assert await storing
        left = await engine.there(*keys)
        assert {*keys} - {*left} <= {*taken}
        assert engine.evicted == (len(keys) - len(left), 0)
        assert engine.evicted[0] >= 30


async def test_older_blocks_of_another_size_are_asked_for_before_newer_of_this(
    tmp_path: Path,
) -> None:
    """As they would be evicted before these without a next tier."""
    async with stacked(tmp_path / "kv") as engine:
        await engine.fill(A, nbytes=SIZE - PAGE)
        await engine.fill(B, C, D)
        storing = engine.start(E)
        await until(lambda: A in engine.backlog.hastened)
        await engine.upload(A, nbytes=SIZE - PAGE)
        assert await storing
        assert await engine.there(A, B, C, D, E) == [B, C, D, E]


async def test_one_slab_is_asked_for_after_the_other(tmp_path: Path) -> None:
    """While its blocks are on their way to the next tier, it is still the one to be given up."""
    async with stacked(tmp_path / "kv", 2) as engine:
        await engine.fill(A, B)
        storing = engine.start(C, SIZE + PAGE)
        await until(lambda: engine.backlog.hastened == [A])
        engine.held.hold("landing", lambda transfer: not transfer.write)
        bringing = asyncio.ensure_future(engine.upload(A))
        await engine.held.wait_held("landing")
        engine.tier.look_again()
        assert engine.backlog.hastened == [A]
        engine.held.release()
        await bringing
        await until(lambda: engine.backlog.hastened == [A, B])
        await engine.upload(B)
        assert await storing


async def test_a_slab_goes_at_once_when_the_next_tier_does_not_answer(tmp_path: Path) -> None:
    async with stacked(tmp_path / "kv", 2) as engine:
        await engine.fill(A, B)
        storing = engine.start(C, SIZE + PAGE)
        await until(lambda: bool(engine.backlog.hastened))
        engine.backlog.out = True
        engine.tier.look_again()
        assert await storing
        assert engine.evicted == (2, 2)


async def test_a_smaller_capacity_costs_first_what_the_next_tier_has(tmp_path: Path) -> None:
    """Opened with less, it shrinks at once: there is nobody to wait for yet."""
    root = tmp_path / "kv"
    async with stacked(root) as engine:
        await engine.fill(A, B, C, D)
        await engine.upload(C)
    async with stacked(root, 2) as engine:
        assert await engine.there(A, B, C, D) == [B, D]
        assert engine.evicted == (2, 1)


# --- what is remembered ---------------------------------------------------------------------


async def test_what_is_owed_survives_a_restart(tmp_path: Path) -> None:
    """Least recently used first, with its bytes."""
    root = tmp_path / "kv"
    async with stacked(root) as engine:
        assert list(engine.tier.owed()) == []
        await engine.fill(A, B, C)
        await engine.fill(D, nbytes=SIZE - 5)
        await engine.upload(B)
        assert await engine.load(A, bytearray(SIZE))
    async with stacked(root) as engine:
        assert list(engine.tier.owed()) == [(C, SIZE), (D, SIZE - 5), (A, SIZE)]
        await engine.fill(E)
        assert await engine.there(A, B, C, D, E) == [A, C, D, E]


async def test_what_was_stored_without_a_next_tier_is_owed_to_it(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    async with opened(root, tier={"capacity_bytes": 4 * SLOT}) as engine:
        for key in (A, B):
            await engine.store(key, content(key, SIZE))
    async with stacked(root) as engine:
        assert engine.owed() == [A, B]
    async with opened(root, tier={"capacity_bytes": 4 * SLOT}) as engine:
        for key in (C, D, E):  # it waits for nobody
            await engine.store(key, content(key, SIZE))
        assert engine.statistics().tiers[0].evictions == 1
        assert engine.statistics().tiers[0].dropped == 0


async def test_blocks_of_another_namespace_are_nobodys_debt(tmp_path: Path) -> None:
    """They can't be taken on from here: they go as without a next tier, and are counted."""
    root = tmp_path / "kv"
    async with stacked(root, namespace=kvgds.Namespace(model="other", revision="1")) as engine:
        await engine.fill(A, B)
        await engine.upload(A)
    async with stacked(root) as engine:
        assert engine.owed() == []
        await engine.fill(C, D, E, F)
        assert engine.backlog.hastened == [C]
        assert engine.evicted == (2, 1)


def age(root: Path) -> None:
    """Make an index what it was before it knew of a next tier."""
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database, database:
        database.execute("ALTER TABLE block DROP COLUMN mirrored")
        database.execute("PRAGMA user_version = 1")


async def test_an_index_that_knows_of_no_next_tier(tmp_path: Path) -> None:
    """Of an earlier version: read as it is; opened, it has all of its blocks, all of them owed."""
    root = tmp_path / "kv"
    async with stacked(root) as engine:
        await engine.fill(A, B)
        await engine.upload(A)
    age(root)
    assert (await asyncio.to_thread(listing, root)).namespaces[0].blocks == 2
    assert (await asyncio.to_thread(fsck, root)).blocks == 2
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (1,)
    for _ in range(2):
        async with stacked(root) as engine:
            assert engine.owed() == [A, B]
            memory = bytearray(SIZE)
            assert await engine.load(A, memory)
            assert memory == content(A, SIZE)
            assert await engine.load(B, memory)
    age(root)
    assert (await asyncio.to_thread(fsck, root, repair=True)).clean
    assert marks(root) == {A: 0, B: 0}
    async with stacked(root) as engine:
        await engine.upload(B)
    assert (await asyncio.to_thread(fsck, root, rebuild=True)).blocks == 2
    assert marks(root) == {A: 0, B: 0}  # stamps don't tell


async def test_an_index_that_lies_about_it_is_damaged(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    async with stacked(root) as engine:
        await engine.fill(A)
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database, database:
        database.execute("UPDATE block SET mirrored = 'perhaps'")
    with pytest.raises(kvgds.ConfigError, match="damaged"):
        async with stacked(root):
            pass


async def none_is_stored(engine: Stacked, *keys: bytes) -> None:
    outcomes = await engine.store_many([(key, content(key, SIZE)) for key in keys])
    assert [type(outcome.error) for outcome in outcomes] == [TransferError] * len(keys)


@pytest.mark.usefixtures("hasty_index")
async def test_an_index_that_takes_nothing_changes_nothing(tmp_path: Path) -> None:
    """An eviction that fails leaves blocks as they were: those that may go, and those that not."""
    root = tmp_path / "kv"
    async with stacked(root, 2) as engine:
        await engine.fill(A, B)
        await engine.upload(B)
        await until(lambda: marks(root)[B] == 1)
        with index_held(root):
            engine.backlog.out = True
            await none_is_stored(engine, C, D)
            with pytest.raises(TransferError):  # a slab that stays
                await engine.store(C, bytes(SIZE + PAGE))
        engine.backlog.out = False
        assert engine.evicted == (0, 0)
        await engine.fill(C)
        assert await engine.there(A, B, C) == [A, C]
        assert engine.evicted == (1, 0)


@pytest.mark.usefixtures("hasty_index")
async def test_an_eviction_that_fails_leaves_given_up_what_was(tmp_path: Path) -> None:
    """The next tier will not take it, so nobody may wait for that."""
    root = tmp_path / "kv"
    async with stacked(root, 2) as engine:
        await engine.fill(A, B)
        engine.tier.look_again([A, B])
        with index_held(root):
            await none_is_stored(engine, C, D)
        assert await engine.there(A, B) == [A, B]
        assert await engine.store(C, content(C, SIZE), timeout_s=10)
        assert engine.backlog.hastened == []
        assert engine.evicted == (1, 1)


async def test_what_was_replaced_and_could_not_be_removed_is_not_owed(tmp_path: Path) -> None:
    """No key leads to it any more: it waits for no next tier, but goes when there is need."""
    root = tmp_path / "kv"
    async with stacked(root, 4) as engine:
        await engine.fill(A)
        with rows_kept(root):
            await engine.fill(A, nbytes=2 * SIZE)
            await until(engine.tier_idle)
        await engine.fill(B)
        assert await engine.store(C, content(C, SIZE), timeout_s=10)
        assert await engine.there(A, B, C) == [A, B, C]


@pytest.mark.usefixtures("hasty_index")
async def test_an_eviction_that_fails_leaves_what_another_namespace_owes(tmp_path: Path) -> None:
    """It is not spared, but counted once it has gone."""
    root = tmp_path / "kv"
    async with stacked(root, 2) as engine:
        await engine.fill(A, B)
    async with stacked(root, 2, namespace=kvgds.Namespace(model="other", revision="1")) as engine:
        with index_held(root), pytest.raises(TransferError):
            await engine.store(C, content(C, SIZE))
        assert engine.evicted == (0, 0)
        await engine.fill(C)
        assert engine.evicted == (1, 1)


async def test_no_promotion_takes_a_slab_of_what_the_next_tier_lacks(tmp_path: Path) -> None:
    """Though that is older than all of its size, and nobody waits for the next tier."""
    async with stacked(tmp_path / "kv", 3) as engine:
        await engine.fill(A, nbytes=SIZE + PAGE)
        await engine.promote(B)
        engine.backlog.out = True
        await engine.promote(C)
        assert await engine.there(A, B, C) == [A, C]


async def test_a_load_of_another_block_keeps_no_promotion_out(tmp_path: Path) -> None:
    """Of one that is owed, say, while the next tier takes nothing: another may go."""
    async with stacked(tmp_path / "kv", 2) as engine:
        await engine.fill(A)
        await engine.promote(B)
        engine.backlog.out = True
        engine.held.hold("landing", lambda transfer: not transfer.write)
        loading = asyncio.ensure_future(engine.bring(A))
        await engine.held.wait_held("landing")
        await engine.promote(C)
        engine.held.release()
        await loading
        assert await engine.there(A, B, C) == [A, C]


# --- anything at all --------------------------------------------------------------------------


class Diligent(Stacked):
    """Takes on what it is asked for, in its own time."""

    def work(self, sizes: dict[bytes, int]) -> None:
        self.sizes = sizes
        self.taken: set[bytes] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.backlog.hasten = self.take  # type: ignore[method-assign]  # it is the test's own

    def take(self, keys: Sequence[bytes]) -> None:
        for key in set(keys) - self.taken:
            self.taken.add(key)
            task = asyncio.create_task(self.upload(key, nbytes=self.sizes[key]))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)


@pytest.mark.parametrize("seed", range(4))
async def test_no_store_waits_for_ever_and_nothing_goes_too_early(
    tmp_path: Path, seed: int
) -> None:
    """Blocks of several sizes through a small tier: all are stored, and none is dropped."""
    dice = random.Random(seed)
    sizes = {
        b"%d" % n: dice.choice((1, SIZE, 7 * PAGE + 11, MIB // 4, MIB - PAGE)) for n in range(160)
    }
    # Stores that wait keep their bounce memory: there must be some for what they wait for.
    tier = {"capacity_bytes": MIB}
    engine = Diligent(config(tmp_path / "kv", tier=tier, bounce_bytes=32 * MIB, timeout_s=20))
    engine.work(sizes)
    await engine.open()
    names = list(sizes)
    for start in range(0, len(names), 4):
        some = [(key, content(key, sizes[key])) for key in names[start : start + 4]]
        outcomes = await engine.store_many(some)
        assert [outcome.status for outcome in outcomes] == ["stored"] * 4
    gone = {*names} - {*await engine.there(*names)}
    assert gone <= engine.taken
    assert engine.evicted == (len(gone), 0)
    await asyncio.gather(*engine.tasks)
    await engine.aclose()
    engine.check()


# --- killed -----------------------------------------------------------------------------------


class Mortal(Index):
    """Dies before it notes that the next tier has a block that the test names."""

    def apply(self, changes: Changes) -> None:
        if len(changes.mirrored) > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        super().apply(changes)


async def live(root: Path) -> None:
    vars(kvgds.tiers.slabs)["Index"] = Mortal
    async with stacked(root) as engine:
        await engine.fill(A, B, C, D)
        await engine.upload(B)
        await engine.delete(D)  # comes after whatever was to be noted
        await engine.upload(A, C)
        await asyncio.sleep(60)


async def test_killed_before_it_is_noted_that_the_next_tier_has_a_block(tmp_path: Path) -> None:
    """Then it is owed, and taken once more; what was noted is not."""
    root = tmp_path / "kv"
    child = await asyncio.create_subprocess_exec(sys.executable, __file__, os.fspath(root))
    assert await child.wait() == -signal.SIGKILL
    async with stacked(root) as engine:
        assert engine.owed() == [A, C]
        assert await engine.there(A, B, C, D) == [A, B, C]


if __name__ == "__main__":
    asyncio.run(live(Path(sys.argv[1])))
