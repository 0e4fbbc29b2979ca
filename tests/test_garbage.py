"""Nothing is left to the cyclic garbage collector: servers freeze it, or turn it off.

What it does not collect would keep the caller's memory, and every operation would add to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import mmap
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

import buckets
from kvgds import (
    BlockCorrupt,
    BusyError,
    ConfigError,
    Engine,
    Outcome,
    TransferError,
    TransferTimeout,
    open_engine,
)
from kvgds.testing import skip_time
from support import PAGE, aligned, config, content, opened, spoil, turns, until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    from s3 import JuiceServer

SIZE = 3 * PAGE
KEYS = [b"%d" % i for i in range(8)]
LATE_S = 1000.0


class Uncollected:
    """What the collector would have to free."""

    def __enter__(self) -> Counter[str]:
        gc.collect()
        gc.disable()
        self._found: Counter[str] = Counter()
        return self._found

    def __exit__(self, *_: object) -> None:
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            gc.collect()
            self._found.update(type(each).__name__ for each in gc.garbage)
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()


async def stored(engine: Engine, room: Any) -> None:
    for key in KEYS:
        assert await engine.store(key + b"+", room)
        assert not await engine.store(key + b"+", room)


async def loaded(engine: Engine, room: Any) -> None:
    for key in KEYS:
        assert await engine.load(key, room)
        assert not await engine.load(key + b"-", room)


async def together(engine: Engine, room: Any) -> None:
    """Those that want one block share an I/O."""
    others = [bytearray(SIZE) for _ in range(3)]
    found = await asyncio.gather(*(engine.load(KEYS[0], each) for each in (room, *others)))
    assert all(found)
    assert engine.statistics().joined == 3


async def in_batches(engine: Engine, room: Any) -> None:
    items = [(key, bytearray(SIZE)) for key in KEYS]
    assert all(each.hit for each in await engine.load_many([(KEYS[0], room), *items[1:]]))
    outcomes = [each async for each in engine.load_each(items)]
    assert all(each.hit for each in outcomes)


async def cancelled(engine: Engine, room: Any) -> None:
    """Queued, and under way."""
    tasks = [asyncio.ensure_future(engine.load(key, room)) for key in KEYS[:1]]
    tasks += [asyncio.ensure_future(engine.load(key, bytearray(SIZE))) for key in KEYS]
    for turn in range(2):
        await asyncio.sleep(0)
        for task in tasks[turn::2]:
            task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def cancelled_together(engine: Engine, room: Any) -> None:
    items = [(key, bytearray(SIZE)) for key in KEYS]
    for turn in range(4):
        task = asyncio.ensure_future(engine.load_many([(KEYS[0], room), *items[1:]]))
        for _ in range(turn):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def refused(engine: Engine, room: Any) -> None:
    """Wrong keys and sizes, memory in use, nothing in time."""
    wrong: Any = "text"
    for call in (engine.load, engine.store):
        with contextlib.suppress(ConfigError):
            await call(wrong, room)
        try:
            await call(b"new", room, timeout_s=1e-9)
        except TransferTimeout as late:
            if late.settled is not None:  # it has begun, and still uses the memory
                await late.settled
    with contextlib.suppress(ConfigError):
        await engine.load(KEYS[0], bytearray(SIZE + 1))
    task = asyncio.ensure_future(engine.load(KEYS[0], room))
    await asyncio.sleep(0)
    with contextlib.suppress(BusyError):
        await engine.load(KEYS[1], room)
    assert await task
    items = [(KEYS[0], room), (wrong, bytearray(1)), (KEYS[1], bytearray(7))]
    found = [each.status for each in await engine.load_many(items)]
    assert found == ["hit", "error", "error"]
    with contextlib.suppress(TransferTimeout):
        await engine.prefix(KEYS, timeout_s=1e-9)
    with contextlib.suppress(TransferTimeout):
        await engine.delete(KEYS[7], timeout_s=1e-9)


async def late_alone(engine: Engine, room: Any) -> None:
    """In tasks of their own, each of which keeps the error that ends it."""
    load, prefix = engine.load(b"new", room, timeout_s=1e-9), engine.prefix(KEYS, timeout_s=1e-9)
    delete = engine.delete(KEYS[7], timeout_s=1e-9)
    await asyncio.gather(load, prefix, delete, return_exceptions=True)
    await engine.prefix(KEYS)  # that, and what was given up before, has ended then
    await engine.delete(KEYS[7])


async def dropped(engine: Engine, room: Any) -> None:
    assert await engine.prefix(KEYS) == len(KEYS)
    for key in KEYS:
        assert await engine.delete(key)
    assert not await engine.load(KEYS[0], room)


def uploaded(engine: Engine) -> int:
    relay = engine.statistics().relay
    assert relay is not None
    return relay.uploaded


CALLS = (
    *(stored, loaded, together, in_batches),
    *(cancelled, cancelled_together, refused, late_alone, dropped),
)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("way", ["direct", "bounce"])
@pytest.mark.parametrize("layout", ["slabs", "files"])
async def test_operations_leave_nothing(
    tmp_path: Path, layout: str, way: str, call: Callable[[Engine, Any], Awaitable[None]]
) -> None:
    settings = config(tmp_path / "kv", tier={"layout": layout}, inflight_ops=4)
    async with open_engine(settings) as engine:
        for key in KEYS:
            await engine.store(key, content(key, SIZE))
        room = engine.register(aligned(SIZE)) if way == "direct" else bytearray(SIZE)
        with Uncollected() as found:
            await call(engine, room)
            await until(lambda: not engine.statistics().in_flight)
    assert not found


async def test_registering_leaves_nothing(tmp_path: Path) -> None:
    async with open_engine(config(tmp_path / "kv")) as engine:
        with Uncollected() as found:
            for _ in range(3):
                room = engine.register(aligned(SIZE))
                await engine.store(b"key", room)
                await engine.deregister(room)
                cache = engine.register_cache([aligned(SIZE).reshape(1, SIZE)])
                await engine.load(b"key", cache.block(0))
                await engine.deregister(cache)
    assert not found


async def test_corrupt_blocks_leave_nothing(tmp_path: Path) -> None:
    async with open_engine(config(tmp_path / "kv")) as engine:
        for key in KEYS:
            await engine.store(key, content(key, SIZE))
        for key in KEYS:
            await asyncio.to_thread(spoil, tmp_path / "kv", key)
        with Uncollected() as found:
            for key in KEYS[:4]:
                with contextlib.suppress(BlockCorrupt):
                    await engine.load(key, bytearray(SIZE))
            outcomes = await engine.load_many([(key, bytearray(SIZE)) for key in KEYS[4:]])
            assert all(isinstance(each.error, BlockCorrupt) for each in outcomes)
            del outcomes
    assert not found


@pytest.mark.parametrize("late", [True, False], ids=["late", "in time"])
async def test_a_load_that_is_cancelled_often_leaves_nothing(tmp_path: Path, *, late: bool) -> None:
    """Nor does one that was only left, and is cancelled then."""

    async def leave(arrivals: AsyncGenerator[Outcome, None]) -> None:
        async with contextlib.aclosing(arrivals):
            assert (await anext(arrivals)).status == "miss"
            await engine.held.wait_held("landing")

    async with opened(tmp_path / "kv") as engine:
        await engine.store(KEYS[0], content(KEYS[0], SIZE))
        room = engine.register(aligned(SIZE))
        items = [(b"none", bytearray(SIZE)), (KEYS[0], room)]
        with Uncollected() as found:
            for call in (engine.load, lambda *_, **limit: leave(engine.load_each(items, **limit))):
                engine.held.hold("landing")
                task = asyncio.ensure_future(call(KEYS[0], room, timeout_s=LATE_S))
                await engine.held.wait_held("landing")
                for _ in range(3):
                    await turns()
                    task.cancel()
                if late:
                    skip_time(LATE_S)
                else:
                    engine.held.release()
                with contextlib.suppress(TransferTimeout if late else asyncio.CancelledError):
                    await task
                del task
                engine.held.release()
                await until(lambda: not engine.busy())
    assert not found


async def test_memory_is_free_once_a_call_has_failed(tmp_path: Path) -> None:
    """Not only at the call's deadline, which is much later."""
    async with open_engine(config(tmp_path / "kv")) as engine:
        await engine.store(b"a", content(b"a", SIZE))
        memory = mmap.mmap(-1, SIZE + PAGE)
        with contextlib.suppress(ConfigError):
            await engine.load(b"a", memory)
        memory.close()
        outcomes = await engine.load_many([(b"a", bytes(1)), (b"a", room := mmap.mmap(-1, PAGE))])
        assert [each.status for each in outcomes] == ["error", "error"]
        room.close()


async def test_a_delete_that_fails_leaves_nothing(tmp_path: Path, own_s3: JuiceServer) -> None:
    bucket = buckets.settings(own_s3, own_s3.make_bucket(), retries=0)
    async with open_engine(config(tmp_path / "kv", objects=bucket)) as engine:
        await engine.store(b"a", content("a", SIZE))
        await until(lambda: uploaded(engine) == 1)
        await asyncio.to_thread(own_s3.stop)
        with Uncollected() as found:
            for _ in range(3):
                with contextlib.suppress(TransferError):
                    await engine.delete(b"a")
    assert not found


@pytest.mark.parametrize("way", ["direct", "bounce"])
async def test_a_closed_engine_has_let_go_of_its_memory(tmp_path: Path, way: str) -> None:
    """Its bounce region may be gigabytes, and whoever closed it may keep the engine."""
    with Uncollected():
        async with open_engine(config(tmp_path / "kv")) as engine:
            bounce = weakref.ref(engine._flights.ways.arena)  # noqa: SLF001 - nothing else tells
            room = engine.register(aligned(SIZE)) if way == "direct" else bytearray(SIZE)
            await stored(engine, room)
        await until(lambda: bounce() is None)  # a thread may hold it a moment longer


@pytest.mark.parametrize("write", ["back", "through", "demote"])
async def test_what_moves_between_tiers_leaves_nothing(
    tmp_path: Path, s3: JuiceServer, write: Any
) -> None:
    """Uploads, loads from the bucket, and promotions."""
    bucket = buckets.settings(s3, s3.make_bucket(), write=write)
    settings = config(tmp_path / "kv", objects=bucket)
    async with open_engine(settings) as engine:
        with Uncollected() as found:
            for key in KEYS:
                await engine.store(key, content(key, SIZE))
                assert await engine.load(key, bytearray(SIZE))
            if write != "demote":
                await until(lambda: uploaded(engine) == len(KEYS))
    assert not found
