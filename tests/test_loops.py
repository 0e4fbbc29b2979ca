"""One engine's life on the event loops that servers run: uvloop, asyncio's debug mode, eager tasks.

uvloop's clock has whole milliseconds and its timers are its own; debug mode refuses calls from
other threads; an eager task runs up to its first wait before who made it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from kvgds import Event, TransferTimeout
from support import PAGE, aligned, content, opened, turns, unaligned, until

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path
    from typing import TypeAlias

    from kvgds.memory import Region
    from support import Watched

    Run: TypeAlias = Callable[[Coroutine[Any, Any, None]], None]

SIZE = 3 * PAGE
KEYS = [b"%d" % i for i in range(40)]  # more than are admitted in one turn of the loop
SOON_S = 0.2  # enough for a transfer to begin
LIMIT_S = 20.0  # of every wait: uvloop only logs what the signal of pytest's own limit raises


def debugging() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_debug(True)
    return loop


def eager() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    if sys.version_info >= (3, 12):
        loop.set_task_factory(asyncio.eager_task_factory)
    return loop


OLD = pytest.mark.skipif(sys.version_info < (3, 12), reason="no eager tasks before Python 3.12")
LOOPS = [
    pytest.param(uvloop.new_event_loop, id="uvloop"),
    debugging,
    pytest.param(eager, marks=OLD),
]


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[Run]:
    """Run a coroutine on a loop of its own, in which no callback may raise."""
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield runner.run
    assert [each.message for each in caplog.records if each.levelno >= logging.ERROR] == []


def soon(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(coroutine)


async def is_cancelled(task: asyncio.Task[Any]) -> None:
    with pytest.raises(asyncio.CancelledError):
        await task


async def two_stored(engine: Watched) -> Region:
    """The memory of two blocks, "a" and "b", that storage has."""
    memory = engine.register(aligned(2 * SIZE, content("a", SIZE) * 2))
    assert await engine.store(b"a", memory[:SIZE])
    assert await engine.store(b"b", memory[SIZE:])
    return memory


@pytest.mark.parametrize("make", [aligned, unaligned], ids=["direct", "bounce"])
def test_blocks_come_back(tmp_path: Path, run: Run, make: Any) -> None:
    """By tasks of their own, in a batch, as they arrive; what is there or not is told, too."""

    async def scenario() -> None:
        async with opened(tmp_path / "kv", timeout_s=LIMIT_S) as engine:
            buffers = [make(SIZE, content(key, SIZE)) for key in KEYS]
            memory = [engine.register(buffer) for buffer in buffers]
            items = list(zip(KEYS, memory, strict=True))
            assert all(await asyncio.gather(*(soon(engine.store(*item)) for item in items)))
            assert not any(await asyncio.gather(*(soon(engine.store(*item)) for item in items)))
            assert await engine.prefix([*KEYS, b"none"]) == len(KEYS)

            async def arrive() -> None:
                assert {each.key async for each in engine.load_each(items) if each.hit} == {*KEYS}

            async def load_alone() -> None:
                assert all(await asyncio.gather(*(soon(engine.load(*item)) for item in items)))

            async def load_together() -> None:
                assert all(each.hit for each in await engine.load_many(items))

            for load in (arrive, load_alone, load_together):
                for buffer in buffers:
                    buffer[:] = 0
                await soon(load())
                assert [each.tobytes() for each in buffers] == [content(key, SIZE) for key in KEYS]
            assert not await soon(engine.load(b"none", memory[0]))
            assert await soon(engine.delete(KEYS[0]))
            assert not await soon(engine.load(*items[0]))

    run(scenario())


def test_cancels(tmp_path: Path, run: Run) -> None:
    """Just made, queued and under way; the last is waited for, until its memory is free."""

    async def scenario() -> None:
        async with opened(tmp_path / "kv", timeout_s=LIMIT_S, inflight_ops=1) as engine:
            memory = await two_stored(engine)
            first = soon(engine.load(b"a", memory[:SIZE]))
            first.cancel()
            await is_cancelled(first)
            engine.held.hold("landing")
            running = soon(engine.load(b"a", memory[:SIZE]))
            await engine.held.wait_held("landing")
            queued = soon(engine.load(b"b", memory[SIZE:]))
            await turns()
            assert engine.statistics().queued == 1
            queued.cancel()
            await is_cancelled(queued)
            running.cancel()
            await turns()
            assert not running.done()
            engine.held.release()
            await is_cancelled(running)
            assert await engine.load(b"b", memory[SIZE:])

    run(scenario())


def test_leaving_early(tmp_path: Path, run: Run) -> None:
    """By `aclosing`, and by letting go of the iterator, which the loop then closes."""

    async def scenario() -> None:
        async with opened(tmp_path / "kv", timeout_s=LIMIT_S, inflight_ops=2) as engine:
            items = [(key, unaligned(SIZE, content(key, SIZE))) for key in KEYS]
            assert all(each.ok for each in await engine.store_many(items))
            async with contextlib.aclosing(engine.load_each(items)) as arrivals:
                assert (await anext(arrivals)).hit
            await until(lambda: not engine.busy())
            assert (await anext(engine.load_each(items))).hit
            await until(lambda: not engine.busy())

    run(scenario())


def test_deadlines(tmp_path: Path, run: Run) -> None:
    """Of what is queued, and of what is under way and keeps its memory until it has settled."""

    async def scenario() -> None:
        async with opened(tmp_path / "kv", timeout_s=LIMIT_S, inflight_ops=1) as engine:
            memory = await two_stored(engine)
            engine.held.hold("landing")
            running = soon(engine.load(b"a", memory[:SIZE], timeout_s=SOON_S))
            await engine.held.wait_held("landing")
            queued = soon(engine.load(b"b", memory[SIZE:], timeout_s=SOON_S))
            with pytest.raises(TransferTimeout) as caught:
                await running
            assert caught.value.settled is not None
            with pytest.raises(TransferTimeout) as other:
                await queued
            assert other.value.settled is None
            engine.held.release()
            await caught.value.settled
            assert await engine.load(b"a", memory[SIZE:])

    run(scenario())


def test_a_call_while_a_deadline_is_due(tmp_path: Path, run: Run) -> None:
    """There is no timer of uvloop's for what is less than half a millisecond away."""

    async def scenario() -> None:
        async with opened(tmp_path / "kv", timeout_s=LIMIT_S, inflight_ops=1) as engine:
            engine.held.hold("landing")
            running = soon(engine.store(b"a", content("a", SIZE)))
            await engine.held.wait_held("landing")
            calls = (engine.store(b"b", bytes(SIZE), timeout_s=1e-4 / n) for n in (1, 2, 3))
            ends = await asyncio.gather(*map(soon, calls), return_exceptions=True)
            assert [type(end) for end in ends] == [TransferTimeout] * 3
            engine.held.release()
            assert await running

    run(scenario())


def test_times_are_finer_than_the_loops(tmp_path: Path, run: Run) -> None:
    """The clock of uvloop would tell most blocks that they took no time at all."""

    class Seen(list[float]):
        def settled(self, event: Event) -> None:
            self.append(event.seconds)

    async def scenario() -> None:
        async with opened(tmp_path / "kv", timeout_s=LIMIT_S) as engine:
            engine.observe(seen := Seen())
            for key in KEYS:
                assert not await engine.load(key, bytearray(SIZE))
            assert min(seen) > 0
            assert len({*seen}) > 1

    run(scenario())


def test_closing_waits(tmp_path: Path, run: Run) -> None:
    """For what is under way, though who closes is cancelled; what comes meanwhile is refused."""

    async def scenario() -> None:
        async with opened(tmp_path / "kv", timeout_s=LIMIT_S) as engine:
            engine.held.hold("landing")
            running = soon(engine.store(b"a", content("a", SIZE)))
            await engine.held.wait_held("landing")
            closing = soon(engine.aclose())
            await turns()
            closing.cancel()
            await is_cancelled(closing)
            assert not running.done()
            engine.held.release()
            await soon(engine.aclose())
            assert await running

    run(scenario())
