"""The public API: what each call answers, what it shares, what it refuses, what it counts."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import pickle
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest

import kvgds
import sharing
import support
from faults import FaultyDisk, fill_up, small_disk
from kvgds import (
    BlockCorrupt,
    BusyError,
    ClosedError,
    ConfigError,
    Engine,
    EngineConfig,
    Event,
    FileTier,
    KvgdsError,
    Namespace,
    Operation,
    Outcome,
    PathUnavailable,
    Priority,
    QueueFull,
    StorageFull,
    TransferError,
    TransferTimeout,
    open_engine,
)
from kvgds.engine import logged_progress
from support import MIB, PAGE, Watched, aligned, config, content, opened, turns, unaligned

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

SIZE = 3 * PAGE


def soon(coroutine: Awaitable[Any]) -> asyncio.Future[Any]:
    return asyncio.ensure_future(coroutine)


async def store(engine: Engine, *names: bytes, nbytes: int = SIZE) -> None:
    for outcome in await engine.store_many([(name, content(name, nbytes)) for name in names]):
        assert outcome.status == "stored"


async def is_whole(engine: Engine, *names: bytes, nbytes: int = SIZE) -> bool:
    """Whether these blocks are there, and right."""
    memory = [bytearray(nbytes) for _ in names]
    outcomes = await engine.load_many(zip(names, memory, strict=True))
    if not all(outcome.hit for outcome in outcomes):
        return False
    assert memory == [content(name, nbytes) for name in names]
    return True


# --- one block --------------------------------------------------------------------------------


async def test_the_first_screen(tmp_path: Path) -> None:
    """Store, restart, ask for the prefix, load, delete: as the README has it."""
    settings = EngineConfig(
        namespace=Namespace(model="Qwen/Qwen3-8B", block_tokens=16),
        tiers=(FileTier(root=tmp_path / "kv", capacity_bytes=1 << 24),),
        bounce_bytes=1 << 20,
    )
    async with open_engine(settings) as engine:
        assert "direct" in str(engine.plan[0])
        assert await engine.store(b"one", bytearray(b"1" * 5000))
        assert await engine.store(b"two", bytearray(b"2" * 5000))
    async with open_engine(settings) as engine:
        assert await engine.prefix([b"one", b"two", b"three"]) == 2
        memory = bytearray(5000)
        assert await engine.load(b"two", memory)
        assert memory == b"2" * 5000
        assert not await engine.load(b"three", memory)
        assert await engine.delete(b"two")
        assert not await engine.delete(b"two")
        assert await engine.prefix([b"one", b"two"]) == 1


async def test_prefix_stops_at_the_first_gap(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"a", b"b", b"d")
        assert await engine.prefix([]) == 0
        assert await engine.prefix([b"a", b"b", b"c", b"d"]) == 2
        assert await engine.prefix([b"c", b"d"]) == 0
        assert await engine.prefix([b"d", b"b", b"a"]) == 3


async def test_a_block_may_have_so_many_fragments_and_no_more(tmp_path: Path) -> None:
    """What NIXL is given beyond its places would fail half-begun."""
    most = 16_383
    tier = {"capacity_bytes": 256 * MIB}
    async with opened(tmp_path / "kv", tier=tier, bounce_bytes=MIB) as engine:
        memory = aligned((most + 1) * 2 * PAGE)
        memory.reshape(-1, PAGE)[:] = np.arange(2 * (most + 1), dtype=np.uint32)[:, None] % 251
        pages = memory.reshape(most + 1, 2, PAGE)
        many = engine.register_cache([pages], block_axis=1)
        with pytest.raises(TransferError, match=r"16,385 rows, .*; 16,384 are"):
            await engine.store(b"many", many.block(0))
        await engine.deregister(many)
        cache = engine.register_cache([pages[:most]], block_axis=1)
        assert await engine.store(b"most", cache.block(0))
        assert await engine.load(b"most", cache.block(1))
        assert np.array_equal(pages[:most, 0], pages[:most, 1])


async def test_a_long_prefix_leaves_the_loop_to_others(tmp_path: Path) -> None:
    """A million tokens are some 60,000 blocks; what is looked at in one turn is bounded."""
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"a")
        keys = [b"a"] * 5000
        asking = asyncio.ensure_future(engine.prefix([*keys, b"gone", b"a"]))
        await turns(4)
        assert not asking.done()
        assert await asking == 5000
        assert await engine.prefix(keys) == 5000
        with pytest.raises(ConfigError, match="must be bytes"):
            await engine.prefix([*keys, "text"])  # type: ignore[list-item]
        with pytest.raises(TransferTimeout):  # from the call on, not once all keys are checked
            await engine.prefix([*keys, "text"], timeout_s=1e-6)  # type: ignore[list-item]
        closed = asyncio.ensure_future(engine.prefix([*keys, b"gone"]))
        await turns(1)
        await engine.aclose()
        with pytest.raises(ClosedError):
            await closed


async def test_prefix_takes_any_iterable_once(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"a", b"b")
        keys = iter([b"a", b"b", b"c"])
        assert await engine.prefix(key for key in keys) == 2
        assert await engine.prefix({b"a": 1, b"b": 2}) == 2


async def test_memory_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    """It is the caller's mistake, not the block's: that stays."""
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"a")
        memory = bytearray(SIZE + 1)
        with pytest.raises(ConfigError, match=f"{SIZE}"):
            await engine.load(b"a", memory)
        assert memory == bytes(SIZE + 1)
        assert await is_whole(engine, b"a")


async def test_another_length_under_the_same_key_replaces_the_block(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"a")
        assert await engine.store(b"a", content(b"a", 5))
        assert await is_whole(engine, b"a", nbytes=5)
        assert engine.statistics().tiers[0].blocks == 1
    async with opened(tmp_path / "kv") as engine:
        assert await is_whole(engine, b"a", nbytes=5)


@pytest.mark.parametrize("key", ["text", b"", b"x" * 1025, bytearray(b"x"), None, 7])
async def test_what_can_not_be_a_key(tmp_path: Path, key: Any) -> None:
    """One wrong key is an error of its own; its neighbours are stored and loaded."""
    async with opened(tmp_path / "kv") as engine:
        for act in (engine.store, engine.load):
            with pytest.raises(ConfigError, match="key"):
                await act(key, bytearray(8))
        with pytest.raises(ConfigError, match="key"):
            await engine.delete(key)
        items = [(b"a", content(b"a", 8)), (key, bytes(8)), (b"b", content(b"b", 8))]
        outcomes = await engine.store_many(items)
        assert [outcome.status for outcome in outcomes] == ["stored", "error", "stored"]
        assert await is_whole(engine, b"a", b"b", nbytes=8)


async def test_the_longest_key(tmp_path: Path) -> None:
    key = b"\xff" * 1024
    async with opened(tmp_path / "kv") as engine:
        await store(engine, key)
    async with opened(tmp_path / "kv") as engine:
        assert await is_whole(engine, key)


NO_DEADLINES = [0, -1.0, float("nan"), float("inf"), 10**400, "soon", b"5", True]


# Python does not write an integer of so many digits, so that pytest couldn't name it either.
@pytest.mark.parametrize("timeout_s", [*NO_DEADLINES, pytest.param(10**5000, id="huge")])
async def test_a_deadline_lies_ahead(tmp_path: Path, timeout_s: Any) -> None:
    """Every call refuses what can't be one, and says what it was."""
    async with opened(tmp_path / "kv") as engine:
        calls: list[Any] = [
            lambda: engine.store(b"a", bytes(8), timeout_s=timeout_s),
            lambda: engine.load_many([(b"a", bytearray(8))], timeout_s=timeout_s),
            lambda: anext(aiter(engine.load_each([(b"a", bytearray(8))], timeout_s=timeout_s))),
            lambda: engine.prefix([b"a"], timeout_s=timeout_s),
            lambda: engine.delete(b"a", timeout_s=timeout_s),
        ]
        for call in calls:
            with pytest.raises(ConfigError, match="timeout_s=") as caught:
                await call()
            assert caught.value.value is timeout_s
        with pytest.raises(ConfigError, match="timeout_s="):
            engine.store_nowait(b"a", bytes(8), timeout_s=timeout_s)
        await store(engine, b"a")


@pytest.mark.parametrize("priority", [7, -1, None, "x", 1])
async def test_a_priority_is_one_of_three(tmp_path: Path, priority: Any) -> None:
    async with opened(tmp_path / "kv") as engine:
        for act in (engine.store, engine.load):
            with pytest.raises(ConfigError, match=r"Priority\.DEMAND") as caught:
                await act(b"a", bytearray(8), priority=priority)
            assert (caught.value.field, caught.value.value) == ("priority", priority)
        with pytest.raises(ConfigError, match="priority"):
            await engine.store_many([(b"a", bytes(8))], priority=priority)
        await store(engine, b"a")


async def test_a_batch_that_is_no_batch_leaves_nothing_behind(tmp_path: Path) -> None:
    engine: Any
    async with opened(tmp_path / "kv") as engine:
        one = (b"a", bytes(8))
        for wrong in ([one, b"b"], {b"a": bytes(8)}, [(*one, 1)], "ab", None, 7):
            for call in (engine.store_many, engine.load_many):
                with pytest.raises(ConfigError, match=r"items=.*must be pairs"):
                    await call(wrong)
            with pytest.raises(ConfigError, match=r"items=.*must be pairs"):
                [outcome async for outcome in engine.load_each(wrong)]
        for keys in (None, 7):
            with pytest.raises(ConfigError, match=r"keys=.*must be a list of keys"):
                await engine.prefix(keys)
        await turns()
        assert engine.statistics().queued == 0
        assert await engine.prefix([b"a"]) == 0
        assert await engine.store_many([]) == []
        assert [outcome async for outcome in engine.load_each([])] == []


# --- batches ------------------------------------------------------------------------------------


async def test_one_miss_among_64(tmp_path: Path) -> None:
    """Outcomes come in the order asked, whatever order they end in."""
    async with opened(tmp_path / "kv") as engine:
        keys = [b"%d" % i for i in range(64)]
        await store(engine, *keys)
        await engine.delete(keys[17])
        memory = [bytearray(SIZE) for _ in keys]
        outcomes = await engine.load_many(zip(keys, memory, strict=True))
        assert [outcome.key for outcome in outcomes] == keys
        assert [outcome.status for outcome in outcomes] == ["hit"] * 17 + ["miss"] + ["hit"] * 46
        assert all(outcome.ok for outcome in outcomes)
        for i, key in enumerate(keys):
            assert memory[i] == (bytes(SIZE) if i == 17 else content(key, SIZE))


async def test_one_corrupt_block_among_64(tmp_path: Path) -> None:
    """It alone is BlockCorrupt, then a miss, also after a restart; then it can be stored anew."""
    root = tmp_path / "kv"
    keys = [b"%d" % i for i in range(64)]
    async with opened(root) as engine:
        await store(engine, *keys)
        await asyncio.to_thread(support.spoil, root, keys[40])
        memory = [engine.register(aligned(SIZE)) for _ in keys]
        outcomes = await engine.load_many(zip(keys, memory, strict=True))
        assert [outcome.status for outcome in outcomes] == ["hit"] * 40 + ["error"] + ["hit"] * 23
        error = outcomes[40].error
        assert isinstance(error, BlockCorrupt)
        assert (error.key, error.reason) == (keys[40], "the payload does not match its checksum")
        assert "slab" in error.place
        tier = engine.statistics().tiers[0]
        assert (tier.blocks, tier.quarantined) == (63, 1)
        assert not await engine.load(keys[40], memory[40])
        assert await is_whole(engine, *keys[:40], *keys[41:])
    async with opened(root) as engine:
        assert engine.statistics().tiers[0].quarantined == 1
        assert not await engine.load(keys[40], bytearray(SIZE))
        await store(engine, keys[40])
        assert await is_whole(engine, *keys)


async def test_each_arrives_as_it_ends(tmp_path: Path) -> None:
    """A block that is held holds up nobody else; each outcome comes once."""
    async with opened(tmp_path / "kv") as engine:
        keys = [b"%d" % i for i in range(8)]
        stored = [o async for o in engine.store_each([(k, content(k, SIZE)) for k in keys])]
        assert sorted(outcome.key for outcome in stored) == keys
        engine.held.hold("landing", lambda transfer: transfer.key == keys[0])  # type: ignore[attr-defined]
        memory = [bytearray(SIZE) for _ in keys]
        order = []
        async for outcome in engine.load_each(zip(keys, memory, strict=True)):
            assert outcome.hit
            order.append(outcome.key)
            if len(order) == 7:
                engine.held.release()
        assert order[-1] == keys[0]
        assert sorted(order) == keys
        assert memory == [content(key, SIZE) for key in keys]


async def test_each_asks_for_all_blocks_however_long_the_caller_computes(tmp_path: Path) -> None:
    """Whoever has one outcome, and takes the next much later, finds that all others have ended."""
    async with opened(tmp_path / "kv") as engine:
        keys = [b"%d" % i for i in range(100)]
        await store(engine, *keys)
        memory = [bytearray(SIZE) for _ in keys]
        items = [(b"missing", bytearray(SIZE)), *zip(keys, memory, strict=True)]
        arrivals = engine.load_each(items)
        assert (await anext(arrivals)).status == "miss"
        await support.until(lambda: engine.statistics().hits == 100)
        assert {outcome.status async for outcome in arrivals} == {"hit"}
        assert memory == [content(key, SIZE) for key in keys]


async def test_each_of_many_that_are_missing_leaves_the_loop_to_others(tmp_path: Path) -> None:
    """Misses are told at once: that is no reason to take in thousands in one turn of the loop."""
    async with opened(tmp_path / "kv") as engine:
        items = [(b"%d" % i, bytearray(1)) for i in range(1000)]

        async def count() -> int:
            return len([outcome async for outcome in engine.load_each(items)])

        asking = soon(count())
        await turns(4)
        assert not asking.done()
        assert await asking == 1000


async def test_loads_that_share_wait_for_no_file(tmp_path: Path) -> None:
    """The copy from one to the others is made, though all file calls hang."""
    gate = threading.Event()
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"a")
        for _ in range(2):
            engine._executor.submit(gate.wait)  # noqa: SLF001 - no file hangs at will
        try:
            assert await is_whole(engine, *[b"a"] * 3)
        finally:
            gate.set()
        assert engine.statistics().joined == 2


async def test_the_same_key_twice_in_one_batch(tmp_path: Path) -> None:
    """Into two memories: both get it, from one read. Into one memory: the second is refused."""
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"a")
        before = engine.held.submitted
        memory = [bytearray(SIZE), bytearray(SIZE)]
        outcomes = await engine.load_many([(b"a", memory[0]), (b"a", memory[1])])
        assert [outcome.status for outcome in outcomes] == ["hit", "hit"]
        assert memory == [content(b"a", SIZE)] * 2
        assert engine.held.submitted == before + 1
        same = engine.register(aligned(SIZE))
        outcomes = await engine.load_many([(b"a", same), (b"a", same)])
        assert [type(outcome.error) for outcome in outcomes] == [type(None), BusyError]


async def test_many_blocks_stay_within_the_limits(tmp_path: Path) -> None:
    """Hundreds of blocks over few slots in flight and a small bounce region all end."""
    changes = {"inflight_ops": 5, "bounce_bytes": 3 * (PAGE + SIZE)}
    async with opened(tmp_path / "kv", lanes=3, **changes) as engine:
        keys = [b"%d" % i for i in range(300)]
        most: list[int] = []

        def note(_: object) -> bool:
            most.append(engine.statistics().in_flight)
            return False

        engine.held.hold("start", note)
        await store(engine, *keys)
        assert await is_whole(engine, *keys)
        assert 1 <= max(most) <= 6


@pytest.mark.parametrize("ops", [256, 3])
async def test_of_blocks_larger_than_may_be_in_flight_a_few_are(tmp_path: Path, ops: int) -> None:
    """One would be staged only when the one before it has moved."""
    keys = [b"%d" % i for i in range(6)]
    async with opened(tmp_path / "kv", inflight_bytes=PAGE, inflight_ops=ops) as engine:
        engine.held.hold("start")
        storing = soon(store(engine, *keys))
        most = min(ops, 4)
        await engine.held.wait_held("start", most)
        await turns()
        assert (engine.held.held("start"), engine.statistics().in_flight) == (most, most)
        engine.held.release()
        await storing
        assert await is_whole(engine, *keys)


# --- sharing one I/O ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [aligned, unaligned], ids=["direct", "bounce"])
async def test_identical_loads_in_flight_are_one_read(tmp_path: Path, make: Any) -> None:
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"a")
        before = engine.held.submitted
        engine.held.hold("landing")
        memory = [make(SIZE) for _ in range(5)]
        tasks = [soon(engine.load(b"a", engine.register(each))) for each in memory]
        await engine.held.wait_held("landing")
        tasks.append(soon(engine.load(b"a", last := bytearray(SIZE))))
        await turns()
        engine.held.release()
        assert await asyncio.gather(*tasks) == [True] * 6
        assert all(each.tobytes() == content(b"a", SIZE) for each in memory)
        assert last == content(b"a", SIZE)
        assert engine.held.submitted == before + 1
        assert engine.statistics().joined == 5


async def test_identical_stores_in_flight_are_one_write(tmp_path: Path) -> None:
    """The first has stored it, the others find it present; each block written counts once."""
    async with opened(tmp_path / "kv") as engine:
        engine.observe(events := Events())
        engine.held.hold("landing")
        tasks = [soon(engine.store(b"a", content(b"a", SIZE))) for _ in range(5)]
        await engine.held.wait_held("landing")
        tasks.append(soon(engine.store(b"a", content(b"a", 5))))  # not the same block
        await engine.held.wait_held("landing", 2)
        engine.held.release()
        assert await asyncio.gather(*tasks) == [True, False, False, False, False, True]
        assert engine.held.submitted == 2
        counts = engine.statistics()
        assert (counts.stored, counts.joined, counts.errors) == (2, 4, 0)
        assert counts.tiers[0].blocks == 1
        ended = sorted((event.outcome, event.path, event.nbytes) for event in events.seen)
        present = [("present", "none", SIZE)] * 4
        assert ended == [*present, ("stored", "bounce", 5), ("stored", "bounce", SIZE)]
        row = {"direction": "store", "tier": f"slabs:{tmp_path / 'kv'}", "path": "bounce"}
        value = engine.metrics.registry.get_sample_value
        assert value("kvgds_bytes_total", {**row, "outcome": "stored"}) == SIZE + 5


@pytest.mark.parametrize("layout", ["slabs", "files"])
async def test_what_was_asked_for_before_is_not_what_comes_after(
    tmp_path: Path, layout: str
) -> None:
    """Who loads after a delete, or a store, shares no load that looked before it."""
    async with opened(tmp_path / "kv", tier={"layout": layout}) as engine:
        await store(engine, b"key")
        engine.held.hold("start", lambda transfer: not transfer.write)
        memory = [bytearray(SIZE) for _ in range(3)]
        loads = [soon(engine.load(b"key", memory[0]))]
        await engine.held.wait_held("start")
        assert await engine.delete(b"key")
        loads.append(soon(engine.load(b"key", memory[1])))
        await turns()
        assert await engine.store(b"key", b"new" * PAGE)
        loads.append(soon(engine.load(b"key", memory[2])))
        await turns()
        engine.held.release()
        hits = await asyncio.gather(*loads)
        assert memory[0] == content(b"key", SIZE)
        assert memory[2] == b"new" * PAGE
        assert hits[::2] == [True, True]
        assert not hits[1] or memory[1] == b"new" * PAGE  # it may have looked after the store


async def test_who_stores_after_a_delete_shares_no_store_from_before(tmp_path: Path) -> None:
    """Nor one that has ended and is told late, because many others have ended with it."""
    keys = [b"%d" % number for number in range(1500)]
    tier = {"capacity_bytes": 32 * MIB}
    async with opened(
        tmp_path / "kv", tier=tier, inflight_ops=2000, bounce_bytes=16 * MIB
    ) as engine:
        storing = soon(engine.store_many([(key, bytes(PAGE)) for key in keys]))
        while not engine.near(keys[700]):
            await turns(1)
        assert await engine.delete(keys[700])
        assert await engine.store(keys[700], content(b"new", PAGE))
        memory = bytearray(PAGE)
        assert await engine.load(keys[700], memory)
        assert memory == content(b"new", PAGE)
        assert all(outcome.status == "stored" for outcome in await storing)


async def test_those_who_share_a_read_share_its_failure(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    async with opened(root) as engine:
        await store(engine, b"a")
        await asyncio.to_thread(support.spoil, root, b"a", 3)
        engine.held.hold("start")
        tasks = [soon(engine.load(b"a", bytearray(SIZE))) for _ in range(3)]
        await engine.held.wait_held("start")
        engine.held.release()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(error) for error in errors] == [BlockCorrupt] * 3
        assert engine.statistics().tiers[0].quarantined == 1


def spoil(root: Path, layout: str, key: bytes) -> None:
    """Change a byte of a stored payload."""
    if layout == "slabs":
        support.spoil(root, key)
    else:
        sharing.flip(sharing.path_of(root, key), PAGE)


@pytest.mark.parametrize("layout", ["slabs", "files"])
async def test_memory_that_others_use_condemns_no_block(tmp_path: Path, layout: str) -> None:
    """What is wrong in the caller's memory may be right where it came from."""
    async with opened(tmp_path / "kv", tier={"layout": layout}) as engine:
        await store(engine, b"a", b"b")
        memory = aligned(SIZE)
        region = engine.register(memory)
        engine.held.hold("landing")
        loading = soon(engine.load(b"a", region))
        await engine.held.wait_held("landing")
        memory[5] ^= 0xFF
        engine.held.release()
        with pytest.raises(TransferError, match="what is stored is sound") as caught:
            await loading
        assert (type(caught.value), caught.value.errno) == (TransferError, errno.EIO)
        assert engine.statistics().tiers[0].quarantined == 0
        assert await engine.load(b"a", region)
        assert memory.tobytes() == content(b"a", SIZE)
        await asyncio.to_thread(spoil, tmp_path / "kv", layout, b"b")
        with pytest.raises(BlockCorrupt):
            await engine.load(b"b", region)
        assert engine.statistics().tiers[0].quarantined == 1
        assert not await engine.load(b"b", region)


async def test_a_load_goes_before_the_prefetch_that_came_first(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv", inflight_ops=1) as engine:
        keys = [b"first", b"prefetched", b"demanded"]
        await store(engine, *keys)
        order = engine.hold_first()
        loads = [soon(engine.load(keys[0], bytearray(SIZE)))]
        await engine.held.wait_held("start")
        for key, priority in ((keys[1], Priority.PREFETCH), (keys[2], Priority.DEMAND)):
            loads.append(soon(engine.load(key, bytearray(SIZE), priority=priority)))
        await turns()
        engine.held.step("start")
        assert await asyncio.gather(*loads) == [True] * 3
        assert order == [keys[0], keys[2], keys[1]]


# --- nowait -------------------------------------------------------------------------------------


async def test_nowait_refuses_to_queue_more(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv", inflight_ops=1, queue_ops=2) as engine:
        engine.held.hold("start")
        operations = [engine.store_nowait(b"%d" % i, content(i, SIZE)) for i in range(3)]
        with pytest.raises(QueueFull):
            engine.store_nowait(b"late", bytes(8))
        with pytest.raises(QueueFull):
            engine.load_nowait(b"late", bytearray(8))
        waiting = soon(engine.store(b"waits", content("waits", SIZE)))  # awaiting calls wait
        await turns()
        engine.held.release()
        assert [await operation for operation in operations] == [True] * 3
        assert await waiting
        memory = bytearray(SIZE)
        assert await engine.load_nowait(b"1", memory)
        assert memory == content(1, SIZE)
        assert not await engine.load_nowait(b"late", memory)


async def test_an_operation_may_be_awaited_again(tmp_path: Path) -> None:
    """By one task at a time; the memory is free when it has ended, awaited or not."""
    async with opened(tmp_path / "kv") as engine:
        engine.held.hold("landing")
        memory = engine.register(aligned(SIZE, content(b"a", SIZE)))
        operation = engine.store_nowait(b"a", memory)
        first = soon(operation)
        await engine.held.wait_held("landing")
        with pytest.raises(BusyError, match="another task"):
            await operation
        engine.held.release()
        assert await first
        assert await operation
        loading = engine.load_nowait(b"a", memory)
        await support.until(lambda: engine.statistics().hits == 1)
        assert await engine.store(b"b", memory)
        assert await loading


async def test_nowait_goes_on_without_being_awaited(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv") as engine:
        engine.store_nowait(b"a", content(b"a", SIZE))
    async with opened(tmp_path / "kv") as engine:
        assert await is_whole(engine, b"a")


# --- paths --------------------------------------------------------------------------------------


class Events:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[Event] = []

    def settled(self, event: Event) -> None:
        self.seen.append(event)


async def test_each_memory_takes_its_path(tmp_path: Path) -> None:
    """Aligned and registered goes direct; anything else bounces; and the event says which."""
    async with opened(tmp_path / "kv") as engine:
        if not engine.plan[0].direct_io:
            pytest.skip("no direct I/O here, so nothing has to be aligned")
        engine.observe(events := Events())
        region = engine.register(aligned(4 * PAGE, content("x", 4 * PAGE)))
        views = [region[: 2 * PAGE], region[PAGE:], region[1:], region[: PAGE + 512]]
        memory = [*views, bytes(PAGE), aligned(PAGE)]
        for i, each in enumerate(memory):
            assert await engine.store(b"%d" % i, each)
        expected = ["direct", "direct", "bounce", "bounce", "bounce", "bounce"]
        assert [event.path for event in events.seen] == expected
        back = bytearray(4 * PAGE - 1)
        assert await engine.load(b"2", back)
        assert back == content("x", 4 * PAGE)[1:]


@pytest.mark.parametrize(
    ("fragment", "count", "gather_bytes", "path"),
    [
        pytest.param(16 * PAGE, 4, 1, "bounce", id="small pieces"),
        pytest.param(17 * PAGE, 3, 1, "direct", id="larger pieces"),
        pytest.param(16 * PAGE, 1, 1, "direct", id="one piece"),
        pytest.param(16 * PAGE, 5, 1, "direct", id="too much of the bounce region"),
        pytest.param(16 * PAGE, 4, 0, "direct", id="not wanted"),
    ],
)
async def test_a_scattered_block_goes_as_one_piece(
    tmp_path: Path, fragment: int, count: int, gather_bytes: int, path: str
) -> None:
    """Some dozens of small I/Os cost more than a copy; the plan tells of which blocks."""
    data = content(b"a", count * fragment)
    layers = aligned(count * 2 * fragment).reshape(count, 2, fragment)
    layers[:, 0] = np.frombuffer(data, np.uint8).reshape(count, fragment)
    async with opened(tmp_path / "kv", bounce_bytes=8 * MIB, gather_bytes=gather_bytes) as engine:
        rules = [each for each in engine.plan[0].evidence if "pieces have 65,536 or less" in each]
        assert len(rules) == bool(gather_bytes)
        assert all("up to 262,144 bytes, a 32nd of the bounce region" in each for each in rules)
        engine.observe(events := Events())
        cache = engine.register_cache(list(layers))
        assert await engine.store(b"a", cache.block(0))
        assert await engine.load(b"a", cache.block(1))
        assert np.array_equal(layers[:, 0], layers[:, 1])
        assert layers[:, 1].tobytes() == data
        assert [event.path for event in events.seen] == [path, path]


async def test_without_direct_io_nothing_has_to_be_aligned(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv", tier={"direct_io": "never"}) as engine:
        assert not engine.plan[0].direct_io
        engine.observe(events := Events())
        memory = engine.register(unaligned(5001, content("x", 5001)))
        assert await engine.store(b"a", memory)
        assert await engine.store(b"b", content("y", 4097))
        assert await engine.load(b"b", memory[3:4100])
        assert bytes(memory.maps[0][3:4100]) == content("y", 4097)
        assert [event.path for event in events.seen] == ["direct", "bounce", "direct"]


async def test_aligned_memory_goes_direct(tmp_path: Path) -> None:
    memory = kvgds.aligned(3 * PAGE + 5)
    assert (memory.nbytes, bytes(memory)) == (3 * PAGE + 5, bytes(3 * PAGE + 5))
    array = np.frombuffer(kvgds.aligned(SIZE), np.uint8)
    assert array.ctypes.data % PAGE == 0
    async with opened(tmp_path / "kv") as engine:
        engine.observe(events := Events())
        array[:] = np.frombuffer(content(b"a", SIZE), np.uint8)
        await engine.store(b"a", engine.register(array))
        assert await is_whole(engine, b"a")
        assert events.seen[0].path == "direct"
    for wrong in (0, -1, 1.5, "1", True, 1 << 60, 1 << 70):
        with pytest.raises(ConfigError, match="nbytes="):
            kvgds.aligned(wrong)  # type: ignore[arg-type]


async def test_a_bounce_region_too_small_for_a_block(tmp_path: Path) -> None:
    """The error says how many bytes it takes; aligned memory of that size goes direct."""
    async with opened(tmp_path / "kv", bounce_bytes=2 * PAGE) as engine:
        items = [(b"a", bytes(PAGE)), (b"b", bytes(PAGE + 1)), (b"c", bytes(1))]
        outcomes = await engine.store_many(items)
        assert [outcome.status for outcome in outcomes] == ["stored", "error", "stored"]
        error = outcomes[1].error
        assert isinstance(error, ConfigError)
        assert error.field == "bounce_bytes"
        assert f"{3 * PAGE:,}" in error.rule
        memory = aligned(8 * PAGE)
        with pytest.raises(ConfigError, match=r"raise it, or register page-aligned memory$"):
            await engine.store(b"b", memory)  # it is aligned already
        assert await engine.store(b"b", engine.register(memory))


async def test_a_cache_is_a_list_of_tensors(tmp_path: Path) -> None:
    """A tensor alone would be taken for one tensor a row."""
    async with opened(tmp_path / "kv") as engine:
        tensor = aligned(8 * PAGE).reshape(4, 2 * PAGE)
        wrongs: tuple[Any, ...] = (tensor, tensor.data, 7)
        for wrong in wrongs:
            with pytest.raises(ConfigError, match=r"layers=.*must be a list of tensors"):
                engine.register_cache(wrong)
        assert engine.register_cache(iter([tensor])).blocks == 4


# --- being told -----------------------------------------------------------------------------------


async def test_statistics_and_metrics_add_up(tmp_path: Path) -> None:
    """Every way to end is counted once, in a row that names tier and path."""
    async with opened(tmp_path / "kv") as engine:
        direct = engine.register(aligned(SIZE, content(b"a", SIZE)))
        await engine.store(b"a", direct)
        await engine.store(b"a", direct)
        await engine.store(b"b", content(b"b", 100))
        await engine.load(b"a", direct)
        await engine.load(b"a", bytearray(SIZE))
        await engine.load(b"none", bytearray(1))
        with pytest.raises(ConfigError):
            await engine.load(b"a", bytearray(1))
        counts = engine.statistics()
        assert (counts.stored, counts.hits, counts.misses, counts.errors) == (2, 2, 1, 1)
        assert (counts.queued, counts.in_flight, counts.quarantined_bytes) == (0, 0, 0)
        assert counts.tiers[0].blocks == 2
        value = engine.metrics.registry.get_sample_value
        tier = f"slabs:{tmp_path / 'kv'}"
        rows = [
            ("store", "direct", "stored", 1, SIZE),
            ("store", "bounce", "stored", 1, 100),
            ("store", "none", "present", 1, 0),
            ("load", "direct", "hit", 1, SIZE),
            ("load", "bounce", "hit", 1, SIZE),
            ("load", "none", "miss", 1, 0),
            ("load", "none", "error", 1, 0),
        ]
        for direction, path, outcome, ops, nbytes in rows:
            row = {"direction": direction, "tier": tier, "path": path, "outcome": outcome}
            assert value("kvgds_operations_total", row) == ops, row
            assert value("kvgds_bytes_total", row) == nbytes, row
            assert value("kvgds_operation_seconds_count", row) == ops, row
        labels = {"tier": engine.plan[0].tier}
        assert value("kvgds_blocks", labels) == 2
        assert value("kvgds_capacity_bytes", labels) == 16 * MIB
        assert value("kvgds_used_bytes", labels) == counts.tiers[0].bytes_used
        assert value("kvgds_queued") == value("kvgds_in_flight") == 0


async def test_what_was_posted_runs_though_another_post_raises(tmp_path: Path) -> None:
    """The error is the loop's to tell; the others of that turn still come."""
    told: list[Any] = []
    ran = asyncio.Event()

    def fail() -> None:
        raise OSError("of this post alone")

    async with opened(tmp_path / "kv") as engine:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(str(context["exception"])))
        engine._post(fail)  # noqa: SLF001 - nothing that is posted raises
        engine._post(ran.set)  # noqa: SLF001
        async with asyncio.timeout(5):
            await ran.wait()
    assert told == ["of this post alone"]


async def test_two_engines_count_apart(tmp_path: Path) -> None:
    async with opened(tmp_path / "one") as one, opened(tmp_path / "two") as two:
        await store(one, b"a")
        assert (one.statistics().stored, two.statistics().stored) == (1, 0)


@pytest.mark.parametrize("error", [LookupError, asyncio.CancelledError])
@pytest.mark.parametrize("leaves", [False, True])
async def test_an_observer_that_raises_is_removed(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    error: type[BaseException],
    leaves: bool,  # noqa: FBT001
) -> None:
    """Logged once, though it had left; the transfer and the other observer go on."""

    class Broken:
        def settled(self, event: Event) -> None:
            if leaves:
                stop()
            raise error(event.outcome)

    async with opened(tmp_path / "kv") as engine:
        stop = engine.observe(Broken())
        engine.observe(events := Events())
        with caplog.at_level(logging.ERROR, "kvgds"):
            await store(engine, b"a", b"b")
        assert len(caplog.records) == 1
        assert [(event.direction, event.outcome) for event in events.seen] == [
            ("store", "stored")
        ] * 2
        assert {event.key for event in events.seen} == {b"a", b"b"}
        assert all(event.nbytes == SIZE and event.seconds > 0 for event in events.seen)


async def test_an_observer_that_ends_the_program_loses_no_outcome(tmp_path: Path) -> None:
    """The program is told in a turn of its own."""
    told: list[BaseException] = []

    class Ending:
        def settled(self, event: Event) -> None:
            raise KeyboardInterrupt(event.outcome)

    async with opened(tmp_path / "kv") as engine:
        loop = asyncio.get_running_loop()
        real = loop.call_soon

        def call_soon(callback: Any, *args: Any, **settings: Any) -> Any:
            if args and isinstance(args[0], KeyboardInterrupt):
                told.append(args[0])
                return real(lambda: None)
            return real(callback, *args, **settings)

        engine.observe(Ending())
        vars(loop)["call_soon"] = call_soon
        try:
            assert await engine.store(b"a", bytes(SIZE))
        finally:
            del vars(loop)["call_soon"]
    assert [type(error) for error in told] == [KeyboardInterrupt]


async def test_an_observer_may_leave(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv") as engine:
        stop = engine.observe(events := Events())
        await store(engine, b"a")
        stop()
        stop()
        await store(engine, b"b")
        assert [event.key for event in events.seen] == [b"a"]
        with pytest.raises(ConfigError, match="settled"):
            engine.observe(None)  # type: ignore[arg-type]  # that is the mistake


async def test_observers_that_are_equal_are_two(tmp_path: Path) -> None:
    """And one that is named twice is told twice, until both are told to stop."""

    @dataclass
    class Equal:
        fails: bool = field(default=False, compare=False)
        seen: list[bytes] = field(default_factory=list, compare=False)

        def settled(self, event: Event) -> None:
            self.seen.append(event.key)
            if self.fails:
                raise LookupError

    async with opened(tmp_path / "kv") as engine:
        first, second, failing = Equal(), Equal(), Equal(fails=True)
        engine.observe(first)
        engine.observe(failing)
        stops = [engine.observe(second), engine.observe(second)]
        await store(engine, b"a")
        stops[0]()
        stops[0]()
        await store(engine, b"b")
        stops[1]()
        await store(engine, b"c")
    assert (first.seen, failing.seen, second.seen) == (
        [b"a", b"b", b"c"],
        [b"a"],
        [b"a"] * 2 + [b"b"],
    )


# --- opening and closing ------------------------------------------------------------------------


async def test_after_closing_every_call_says_so(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"a")
        region = engine.register(aligned(SIZE))
        assert await engine.load(b"a", region)
        for _ in range(2):
            await engine.aclose()
        memory = bytearray(SIZE)
        calls: list[Any] = [
            lambda: engine.store(b"a", memory),
            lambda: engine.load(b"a", memory),
            lambda: engine.store_many([]),
            lambda: engine.load_many([(b"a", memory)]),
            lambda: engine.prefix([b"a"]),
            lambda: engine.delete(b"a"),
            lambda: anext(aiter(engine.load_each([(b"a", memory)]))),
        ]
        for call in calls:
            with pytest.raises(ClosedError):
                await call()
        with pytest.raises(ClosedError):
            engine.register(memory)
        with pytest.raises(ClosedError):
            engine.register_cache([memory])
        with pytest.raises(ClosedError):
            engine.store_nowait(b"a", memory)
        async with asyncio.timeout(5):
            await engine.deregister(region)


async def test_another_loop_is_refused(tmp_path: Path) -> None:
    """An engine is not for several threads; it says so instead of corrupting itself."""
    async with opened(tmp_path / "kv") as engine:
        for act in (engine.store, engine.load):
            with pytest.raises(ClosedError, match="loop"):
                await asyncio.to_thread(asyncio.run, act(b"a", bytearray(8)))
        await store(engine, b"a")


async def test_another_thread_is_refused(tmp_path: Path) -> None:
    """Where no event loop runs either, and whatever the call is."""

    def by_hand(call: Callable[[], Any]) -> None:
        answer = call()
        if hasattr(answer, "send"):  # a coroutine, begun without a loop
            answer.send(None)

    async with opened(tmp_path / "kv") as engine:
        memory, region = bytearray(8), engine.register(aligned(SIZE))
        calls: list[Callable[[], Any]] = [
            lambda: engine.store(b"a", memory),
            lambda: engine.load_many([(b"a", memory)]),
            lambda: engine.load_each([(b"a", memory)]),
            lambda: engine.store_nowait(b"a", memory),
            lambda: engine.prefix([b"a"]),
            lambda: engine.delete(b"a"),
            lambda: engine.register(memory),
            lambda: engine.register_cache([memory]),
            lambda: engine.deregister(region),
            engine.aclose,
        ]
        for call in calls:
            with pytest.raises(ClosedError, match="no event loop runs here"):
                await asyncio.to_thread(by_hand, call)
        await store(engine, b"a")
        assert await engine.load(b"a", region)


async def test_an_operation_is_not_awaited_elsewhere(tmp_path: Path) -> None:
    """It goes on all the same, and its own loop may await it."""

    async def wait(operation: Operation) -> bool:
        return await operation

    async with opened(tmp_path / "kv") as engine:
        engine.held.hold("landing")
        storing = engine.store_nowait(b"a", content(b"a", SIZE))
        with pytest.raises(ClosedError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, wait(storing))
        engine.held.release()
        assert await storing
        assert await is_whole(engine, b"a")


def test_an_engine_needs_a_loop(tmp_path: Path) -> None:
    opening = open_engine(config(tmp_path / "kv")).__aenter__()
    with pytest.raises(ClosedError, match="no event loop runs here"):
        opening.send(None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [None, "kv", {"tiers": []}, EngineConfig, 7])
def test_what_is_no_configuration(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="must be an EngineConfig"):
        open_engine(wrong)


def test_what_is_no_progress(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="progress"):
        open_engine(config(tmp_path / "kv"), progress=7)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [None, bytearray(8), b"key", 7])
async def test_what_was_not_registered_is_not_deregistered(tmp_path: Path, wrong: Any) -> None:
    async with opened(tmp_path / "kv") as engine:
        part: Any = engine.register(aligned(SIZE))[:PAGE]
        for memory in (wrong, part):
            with pytest.raises(ConfigError, match="register_cache gave"):
                await engine.deregister(memory)


async def test_progress_is_logged_only_when_opening_takes_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing within a second, then a few lines however many steps there are."""
    settings = config(tmp_path / "kv", tier={"layout": "files"})
    caplog.set_level(logging.INFO, "kvgds")
    for _ in range(2):
        async with open_engine(settings) as engine:
            await engine.store_many([(b"%d" % i, b"x") for i in range(100)])
    assert caplog.messages == []
    now = iter(range(101))
    told = logged_progress(lambda: next(now))
    for step in range(100):
        told("looking", step, 100)
    assert 2 <= len(caplog.messages) <= 6
    assert caplog.messages[0] == "looking: 1 of 100"


async def test_an_engine_says_which_it_is(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv") as engine:
        assert repr(engine) == f"<Engine open slabs:{tmp_path / 'kv'}>"
    assert repr(engine).startswith("<Engine closed ")


async def test_closing_that_has_no_time_to_wait_says_nothing_of_gpus(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There are none, and nothing was under way."""
    async with open_engine(config(tmp_path / "kv", drain_timeout_s=1e-9)) as engine:
        assert await engine.store(b"a", bytes(SIZE))
    assert not caplog.records


async def test_another_loop_closes_nothing(tmp_path: Path) -> None:
    """It is refused at once, the engine goes on, and its own loop closes it whole."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        engine.held.hold("landing")
        storing = soon(engine.store(b"a", content(b"a", SIZE)))
        await engine.held.wait_held("landing")
        for _ in range(2):
            with pytest.raises(ClosedError, match="loop"):
                await asyncio.to_thread(asyncio.run, engine.aclose())
        engine.held.release()
        assert await storing
        await store(engine, b"b")
        await engine.aclose()
        with pytest.raises(ClosedError, match="loop"):
            await asyncio.to_thread(asyncio.run, engine.aclose())
    async with opened(root) as engine:
        assert await is_whole(engine, b"a", b"b")


async def test_one_engine_a_directory(tmp_path: Path) -> None:
    """The second is told who has it; the first is not disturbed; then it is free again."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        for _ in range(2):
            with pytest.raises(BusyError, match="in use by process"):
                async with open_engine(config(root)):
                    pass
        await store(engine, b"a")
    async with opened(root) as engine:
        assert await is_whole(engine, b"a")


async def test_an_open_that_fails_lets_go(tmp_path: Path) -> None:
    """After each failure the directory can be opened by others."""
    root = tmp_path / "kv"
    for bounce_bytes in (1 << 60, 1 << 70):
        with pytest.raises(ConfigError, match="bounce_bytes"):
            async with open_engine(config(root, bounce_bytes=bounce_bytes)):
                pass
        async with opened(root):
            pass


# --- capacity -----------------------------------------------------------------------------------


def used_by(engine: Watched) -> int:
    return engine.statistics().tiers[0].bytes_used


async def test_the_least_recently_used_go_first_over_restarts(tmp_path: Path) -> None:
    """A block that was loaded before the restart outlives blocks that were stored after it."""
    tier = {"capacity_bytes": 8 * (PAGE + SIZE)}
    keys = [b"%d" % i for i in range(8)]
    async with opened(tmp_path / "kv", tier=tier) as engine:
        for key in keys:
            await store(engine, key)
        for key in (b"1", b"3"):
            assert await is_whole(engine, key)
        assert not await engine.store(b"5", content(b"5", SIZE))  # present: that is a use too
    async with opened(tmp_path / "kv", tier=tier) as engine:
        assert await engine.prefix(keys) == 8
        for name in (b"a", b"b", b"c", b"d", b"e"):
            await store(engine, name)
        assert [await engine.prefix([key]) for key in keys] == [0, 1, 0, 1, 0, 1, 0, 0]
        assert await is_whole(engine, b"1", b"3", b"5", b"a", b"b", b"c", b"d", b"e")
        await store(engine, b"f")
        assert [await engine.prefix([key]) for key in keys] == [0, 0, 0, 1, 0, 1, 0, 0]


async def test_sizes_take_room_from_each_other(tmp_path: Path) -> None:
    """Blocks of one size fill the tier; those of another get room, and never over the limit."""
    capacity = 2 * MIB
    root = tmp_path / "kv"
    async with opened(root, tier={"capacity_bytes": capacity}) as engine:
        for nbytes in (PAGE, 7 * PAGE, 60 * PAGE, 2 * PAGE, 200 * PAGE, PAGE):
            for i in range(2 * capacity // nbytes // 3):
                key = b"%d %d" % (nbytes, i)
                await store(engine, key, nbytes=nbytes)
                assert used_by(engine) <= capacity
                assert await is_whole(engine, key, nbytes=nbytes)
            on_disk = sum(path.stat().st_size for path in root.glob("slab-*"))
            assert on_disk <= capacity
        assert engine.statistics().tiers[0].evictions > 0
    async with opened(root, tier={"capacity_bytes": capacity}) as engine:
        assert await is_whole(engine, key, nbytes=PAGE)


async def test_less_capacity_at_the_next_opening(tmp_path: Path) -> None:
    """The least recently used go until what is left fits."""
    keys = [b"%d" % i for i in range(256)]
    async with opened(tmp_path / "kv", tier={"capacity_bytes": 8 * MIB}) as engine:
        await store(engine, *keys)
    async with opened(tmp_path / "kv", tier={"capacity_bytes": MIB}) as engine:
        there = [key for key in keys if await engine.prefix([key])]
        assert 32 <= len(there) <= 64
        assert await is_whole(engine, *there)
        assert keys[-1] in there
        await store(engine, b"more")


async def test_stores_wait_for_blocks_being_loaded(tmp_path: Path) -> None:
    """All slots are being read: nothing is evicted under a load, the store waits its turn."""
    tier = {"capacity_bytes": 2 * (PAGE + SIZE)}
    async with opened(tmp_path / "kv", tier=tier) as engine:
        await store(engine, b"a", b"b")
        engine.held.hold("start", lambda transfer: not transfer.write)
        memory = [bytearray(SIZE), bytearray(SIZE)]
        loading = [soon(engine.load(k, m)) for k, m in zip((b"a", b"b"), memory, strict=True)]
        await engine.held.wait_held("start", 2)
        before = engine.held.submitted
        storing = soon(engine.store(b"c", content(b"c", SIZE)))
        await turns()
        assert engine.held.submitted == before
        engine.held.release()
        assert await asyncio.gather(*loading) == [True, True]
        assert memory == [content(b"a", SIZE), content(b"b", SIZE)]
        assert await storing
        assert await is_whole(engine, b"c")


async def test_a_batch_larger_than_the_tier(tmp_path: Path) -> None:
    """Every store is acknowledged in its turn; what is left at the end is right."""
    tier = {"capacity_bytes": 4 * (PAGE + SIZE)}
    keys = [b"%d" % i for i in range(100)]
    async with opened(tmp_path / "kv", tier=tier) as engine:
        await store(engine, *keys)
        there = [key for key in keys if await engine.prefix([key])]
        assert 1 <= len(there) <= 4
        assert await is_whole(engine, *there)


# --- disks that fail ------------------------------------------------------------------------------


async def test_a_disk_smaller_than_the_capacity(tmp_path: Path) -> None:
    """The capacity says 64 MiB, the disk has 10: the least recently used make room."""
    nbytes, tier = MIB // 2 - PAGE, {"capacity_bytes": 64 * MIB}
    with small_disk(tmp_path, 10 * MIB) as disk:
        async with opened(disk / "kv", tier=tier) as engine:
            keys = [b"%d" % i for i in range(40)]
            for n, key in enumerate(keys):
                await store(engine, key, nbytes=nbytes)
                assert await is_whole(engine, *keys[max(0, n - 5) : n + 1], nbytes=nbytes)
            assert await engine.store(b"big", content(b"big", MIB))
            assert await is_whole(engine, b"big", nbytes=MIB)
            await store(engine, keys[0], nbytes=nbytes)
        async with opened(disk / "kv", tier=tier) as engine:
            assert await is_whole(engine, keys[0], nbytes=nbytes)


@pytest.mark.parametrize("layout", ["slabs", "files"])
async def test_a_file_system_that_allocates_nothing(tmp_path: Path, layout: str) -> None:
    """As ext2 and ext3: blocks are stored all the same, and a slab that was cut is made whole."""
    with small_disk(tmp_path, 32 * MIB, "ext2") as disk:
        root, tier = disk / "kv", {"layout": layout, "capacity_bytes": 8 * MIB}
        async with opened(root, tier=tier) as engine:
            await store(engine, b"a", b"b")
            assert await is_whole(engine, b"a", b"b")
        for slab in root.glob("slab-*"):
            os.truncate(slab, slab.stat().st_size - PAGE)
        async with opened(root, tier=tier) as engine:
            assert await is_whole(engine, b"a", b"b")


async def test_a_disk_without_room_for_anything(tmp_path: Path) -> None:
    """The first store says so; with room, the next succeeds."""
    with small_disk(tmp_path, 4 * MIB) as disk:
        async with opened(disk / "kv") as engine:
            fill_up(disk / "ballast")
            with pytest.raises(StorageFull, match="free space"):
                await engine.store(b"a", bytes(SIZE))
            (disk / "ballast").unlink()
            await store(engine, b"a")
            assert await is_whole(engine, b"a")


async def test_a_disk_that_was_full_for_a_moment(tmp_path: Path) -> None:
    """With blocks of one size to evict, too: once there is room again, they stay, and more come."""
    with small_disk(tmp_path, 64 * MIB) as disk:
        async with opened(disk / "kv", tier={"capacity_bytes": 32 * MIB}) as engine:
            await store(engine, *(b"%d" % i for i in range(100)))
            free = os.statvfs(disk)
            with (disk / "ballast").open("wb") as ballast:  # which leaves the index some
                os.posix_fallocate(ballast.fileno(), 0, free.f_bavail * free.f_frsize - MIB)
            await store(engine, *(b"late %d" % i for i in range(100)))
            before = engine.statistics().tiers[0]
            assert before.evictions
            (disk / "ballast").unlink()
            names = (b"later %d" % i for i in itertools.count())
            async with asyncio.timeout(20):
                while engine.statistics().tiers[0].blocks < 2 * before.blocks:
                    await store(engine, next(names))


async def test_a_slab_that_can_not_be_made(tmp_path: Path) -> None:
    """Not for want of room: who waits is told why, nothing is evicted, and later it goes on."""
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv") as engine:
            keys = [b"%d" % i for i in range(40)]
            disk.fail("create", errno.EPERM, match="slab-*", skip=1)
            outcomes = await engine.store_many([(key, content(key, SIZE)) for key in keys])
            good = [outcome.key for outcome in outcomes if outcome.ok]
            errors = {type(outcome.error): outcome.error for outcome in outcomes if not outcome.ok}
            assert list(errors) == [TransferError]
            assert "can't make a slab" in str(errors[TransferError])
            assert getattr(errors[TransferError], "errno", None) == errno.EPERM
            with pytest.raises(TransferError, match="not permitted"):
                await engine.store(b"big", content(b"big", MIB))
            assert engine.statistics().tiers[0].evictions == 0
            assert await is_whole(engine, *good)
            disk.clear()
            await store(engine, *(key for key in keys if key not in good))
            await store(engine, b"big", nbytes=MIB)
            assert await is_whole(engine, *keys)


async def test_a_disk_that_is_full_to_the_last_byte(tmp_path: Path) -> None:
    """Not even the index can grow: whatever is refused is refused whole, and nothing is lost."""
    with small_disk(tmp_path, 4 * MIB) as disk:
        root = disk / "kv"
        async with opened(root, tier={"capacity_bytes": MIB}) as engine:
            keys = [b"%d" % i for i in range(8)]
            await store(engine, *keys)
            fill_up(disk / "ballast")
            refused = 0
            for i in range(300):
                try:
                    await engine.store(b"late %d" % i, content(i, SIZE))
                except StorageFull:
                    refused += 1
            assert refused
            assert await is_whole(engine, *keys)
            (disk / "ballast").unlink()
            await store(engine, b"again")
            assert await is_whole(engine, b"again")
        async with opened(root, tier={"capacity_bytes": MIB}) as engine:
            assert await is_whole(engine, b"again")


@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "btrfs"])
@pytest.mark.parametrize("layout", ["slabs", "files"])
async def test_opening_on_a_full_disk(
    tmp_path: Path, layout: str, kind: Literal["tmpfs", "ext4", "btrfs"]
) -> None:
    """Files need no room to be read; an index does, which the error says, and nothing is lost."""
    with small_disk(tmp_path, (120 if kind == "btrfs" else 24) * MIB, kind) as disk:
        settings = config(disk / "kv", tier={"layout": layout, "capacity_bytes": 4 * MIB})
        async with open_engine(settings) as engine:
            await store(engine, b"a")
        fill_up(disk / "ballast")
        if layout == "files":
            async with open_engine(settings) as engine:
                assert await is_whole(engine, b"a")
        else:
            with pytest.raises(ConfigError, match="free some MiB"):
                async with open_engine(settings):
                    pass
        (disk / "ballast").unlink()
        async with open_engine(settings) as engine:
            assert await is_whole(engine, b"a")


async def test_the_least_recently_used_go_first_whatever_their_size(tmp_path: Path) -> None:
    """Small blocks push out large ones that were not used for longer, and no others."""
    tier = {"capacity_bytes": 4 * MIB}
    async with opened(tmp_path / "kv", tier=tier) as engine:
        await store(engine, b"old", b"older", nbytes=MIB - PAGE)
        await store(engine, b"small", nbytes=15 * PAGE)
        await store(engine, b"kept", nbytes=MIB - PAGE)
        small = [b"%d" % i for i in range(24)]
        for key in small:
            await store(engine, key, nbytes=15 * PAGE)
            assert await is_whole(engine, b"kept", nbytes=MIB - PAGE)
        assert await is_whole(engine, *small, nbytes=15 * PAGE)
        assert not await is_whole(engine, b"old", nbytes=MIB - PAGE)
    async with opened(tmp_path / "kv", tier=tier) as engine:  # their order outlives the engine
        more = [b"more %d" % i for i in range(30)]
        await store(engine, *more, nbytes=15 * PAGE)
        assert await is_whole(engine, *more, *small[-8:], nbytes=15 * PAGE)


async def test_slabs_leave_room_for_the_index(tmp_path: Path) -> None:
    """The disk is smaller than the capacity: slabs stop short of its end, and rows go in on."""
    with small_disk(tmp_path, 12 * MIB) as disk:
        async with opened(disk / "kv", tier={"capacity_bytes": 64 * MIB}) as engine:
            for i in range(600):
                assert await engine.store(b"%d" % i, content(i, SIZE))
            assert engine.statistics().tiers[0].evictions
            free = os.statvfs(disk)
            assert free.f_bavail * free.f_frsize > 2 * MIB


async def test_an_unreadable_block_is_kept(tmp_path: Path) -> None:
    """EIO is no proof that the block is wrong: it stays, and loads once the disk is well."""
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv") as engine:
            keys = [b"%d" % i for i in range(64)]
            await store(engine, *keys)
            place = (await asyncio.to_thread(support.places, disk.root / "kv"))[keys[9]]
            disk.fail("read", match=place.path.name, offset=place.offset + PAGE, length=SIZE)
            memory = [bytearray(SIZE) for _ in keys]
            outcomes = await engine.load_many(zip(keys, memory, strict=True))
            assert [outcome.status for outcome in outcomes] == ["hit"] * 9 + ["error"] + [
                "hit"
            ] * 54
            error = outcomes[9].error
            assert type(error) is TransferError
            assert (error.errno, error.key, error.direction, error.path, error.backend) == (
                errno.EIO,
                keys[9],
                "load",
                "bounce",
                engine.plan[0].backend,
            )
            assert memory[9] == bytes(SIZE)
            disk.clear()
            assert await is_whole(engine, *keys)
            assert engine.statistics().tiers[0].quarantined == 0


async def test_a_block_that_can_not_be_written_is_not_there(tmp_path: Path) -> None:
    """It fails alone; its slot is not the next one to be tried, but is used again at last."""
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv") as engine:
            await store(engine, b"a")
            place = (await asyncio.to_thread(support.places, disk.root / "kv"))[b"a"]
            bad = place.offset + 5 * (PAGE + SIZE)
            disk.fail("write", match="slab-*", offset=bad, length=PAGE)
            keys = [b"%d" % i for i in range(8)]
            outcomes = await engine.store_many([(key, content(key, SIZE)) for key in keys])
            failed = [outcome for outcome in outcomes if not outcome.ok]
            assert [type(outcome.error) for outcome in failed] == [TransferError]
            assert getattr(failed[0].error, "errno", None) == errno.EIO
            assert await engine.prefix([failed[0].key]) == 0
            await store(engine, failed[0].key)
            for i in range(8, 14):
                await store(engine, b"%d" % i)
            disk.clear()
            await store(engine, b"15")
            assert await is_whole(engine, b"a", *keys, b"15")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
async def test_an_index_that_can_not_be_written(tmp_path: Path, number: int) -> None:
    """Nothing is acknowledged that is not in the index; once the disk is well it goes on."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root) as engine:
            await store(engine, b"a")
            disk.fail("write", number, match="index.db*")
            with pytest.raises(StorageFull if number == errno.ENOSPC else TransferError):
                await engine.store(b"b", content(b"b", SIZE))
            assert await engine.prefix([b"b"]) == 0
            assert await is_whole(engine, b"a")
            disk.clear()
            await store(engine, b"b", b"c")
            assert await is_whole(engine, b"a", b"b", b"c")
        async with opened(root) as engine:
            assert await is_whole(engine, b"a", b"b", b"c")


async def test_nothing_is_lost_to_an_index_that_can_not_be_written(tmp_path: Path) -> None:
    """A removal that is not durable has not happened: evicted or deleted, the block stays."""
    tier = {"capacity_bytes": 8 * (PAGE + SIZE)}
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        keys = [b"%d" % i for i in range(8)]
        async with opened(root, tier=tier) as engine:
            await store(engine, *keys)
            disk.fail("write", match="index.db*")
            for _ in range(20):
                with pytest.raises(TransferError, match="index"):
                    await engine.store(b"more", content(b"more", SIZE))
            with pytest.raises(TransferError):
                await engine.delete(keys[3])
            assert await is_whole(engine, *keys)
            assert engine.statistics().tiers[0].evictions == 0
            disk.clear()
            assert await engine.delete(keys[3])
            await store(engine, b"more", b"again")
            assert await is_whole(engine, b"more", b"again")
        async with opened(root, tier=tier) as engine:
            assert await engine.prefix([keys[3]]) == 0
            assert await is_whole(engine, b"more", b"again")


async def test_a_disk_that_hangs(tmp_path: Path) -> None:
    """TransferTimeout at the deadline, direct or bounced; meanwhile the loop goes on."""
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv") as engine:
            await store(engine, b"a", b"b", b"c")
            disk.hang("read", match="slab-*")
            direct = engine.register(aligned(SIZE))
            bounced = unaligned(SIZE)
            late: list[float] = []
            ticking = soon(tick(late))
            started = time.monotonic()
            errors = await asyncio.gather(
                engine.load(b"a", direct, timeout_s=0.5),
                engine.load(b"b", bounced, timeout_s=0.5),
                return_exceptions=True,
            )
            assert 0.5 <= time.monotonic() - started < 5
            ticking.cancel()
            assert len(late) > 5
            assert max(late) < 0.4
            assert [type(error) for error in errors] == [TransferTimeout] * 2
            bounced[:] = 7
            with pytest.raises(BusyError):
                await engine.load(b"c", direct)
            await asyncio.to_thread(disk.release)
            settled = getattr(errors[0], "settled", None)
            assert settled is not None
            assert str(errors[0]).endswith("its memory is in use: await .settled")
            await settled
            assert (bounced == 7).all()
            assert await is_whole(engine, b"a", b"b", b"c")


async def test_a_delete_has_a_deadline(tmp_path: Path) -> None:
    """It says that the block may still be dropped; here it is."""
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv") as engine:
            await store(engine, b"a", b"b")
            disk.hang("write", match="index.db*")
            with pytest.raises(TransferTimeout, match=r"it may still happen$") as caught:
                await engine.delete(b"a", timeout_s=0.05)
            assert (caught.value.direction, caught.value.key) == ("delete", b"a")
            assert caught.value.errno == errno.ETIMEDOUT
            await asyncio.to_thread(disk.release)
            assert await engine.delete(b"b")
            assert await engine.prefix([b"a"]) == 0


async def tick(late: list[float]) -> None:
    """How late each tick of 10 ms comes."""
    while True:
        before = time.monotonic()
        await asyncio.sleep(0.01)
        late.append(time.monotonic() - before - 0.01)


async def test_a_store_survives_power_loss_if_asked_to(tmp_path: Path) -> None:
    """durable="power": the payload and then the index are synced before the acknowledgement."""
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "process") as engine:
            await store(engine, b"a")
        assert disk.seen("fsync", "*slab-*") == []
        async with opened(disk.root / "power", tier={"durable": "power"}) as engine:
            for i in range(3):
                before = len(disk.seen())
                await store(engine, b"%d" % i)
                since = disk.seen()[before:]
                payload = [
                    n for n, seen in enumerate(since) if seen.op == "write" and "slab-" in seen.path
                ]
                synced = [
                    n for n, seen in enumerate(since) if seen.op == "fsync" and "slab-" in seen.path
                ]
                index = [
                    n for n, seen in enumerate(since) if seen.op == "fsync" and "index" in seen.path
                ]
                assert payload[-1] < synced[-1] < index[-1]
            assert await is_whole(engine, b"0", b"1", b"2")


def test_errors_of_this_library_are_its_own() -> None:
    """One except clause catches them all; the builtin kinds catch what they should."""
    for error, kind in (
        (ConfigError("a", 1, "b"), ValueError),
        (TransferError("x"), OSError),
        (TransferTimeout("x"), TimeoutError),
    ):
        assert isinstance(error, KvgdsError)
        assert isinstance(error, kind)
    assert Outcome(b"k", "miss").ok


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("field", lambda: 1, "rule"),
        PathUnavailable("not here", ("one", "two")),
        TransferError("x", direction="load", key=b"k", path="direct", errno=errno.EIO),
        TransferTimeout("x", key=b"k", backend="POSIX/uring", errno=errno.ETIMEDOUT),
        BlockCorrupt(b"k", "reason", "place"),
        StorageFull("full"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_go_to_other_processes(error: KvgdsError) -> None:
    """With all that they tell, but for what only this process can await."""
    if isinstance(error, TransferTimeout):
        error.settled = threading.Lock()  # type: ignore[assignment]  # nothing to be copied either
    there = pickle.loads(pickle.dumps(error))  # noqa: S301 - just made
    assert (type(there), str(there), there.args) == (type(error), str(error), error.args)
    kept = {name: what for name, what in vars(error).items() if name != "settled"}
    if isinstance(error, ConfigError):  # it may be anything
        kept["value"] = repr(error.value)
    assert vars(there) == kept
    assert getattr(there, "errno", None) == getattr(error, "errno", None)
    assert getattr(there, "settled", None) is None


@pytest.mark.parametrize("emptied", [False, True])
async def test_a_lost_index_costs_no_slabs(tmp_path: Path, *, emptied: bool) -> None:
    """Without it the slabs look like leftovers; it is an error that says how to rebuild it."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        await engine.store(b"a", content(b"a", 4096))
    for name in ("index.db", "index.db-wal", "index.db-shm"):
        (root / name).unlink(missing_ok=True)
    if emptied:
        (root / "index.db").touch()
    slabs = sorted(root.glob("slab-*"))
    with pytest.raises(ConfigError, match="--rebuild"):
        async with opened(root):
            pass
    assert slabs
    assert sorted(root.glob("slab-*")) == slabs
