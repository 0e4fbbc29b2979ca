"""Cancels and deadlines at every stage of an operation: what the caller gets, whose the memory is.

Stages: *queued* in the engine; at its *start*, handed to the transport but not begun; and
*landed*, its bytes moved but not reported, as they are all the while that a disk takes its time.
Leaving `opened` checks each time that nothing that was lent is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import random
from typing import TYPE_CHECKING, Any

import pytest

from faults import FaultyDisk
from kvgds import (
    BusyError,
    ClosedError,
    ConfigError,
    Outcome,
    Priority,
    TransferTimeout,
    open_engine,
)
from kvgds.engine import running
from kvgds.testing import HeldTransport, Stage, skip_time
from kvgds.transport import NixlTransport
from support import (
    MIB,
    PAGE,
    Watched,
    aligned,
    config,
    content,
    opened,
    turns,
    unaligned,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from pathlib import Path

LATE_S = 1000.0
SIZE = 3 * PAGE
WORD = 0xA5

PATHS = pytest.mark.parametrize("make", [aligned, unaligned], ids=["direct", "bounce"])
STAGES = pytest.mark.parametrize("stage", ["start", "landing"])


def soon(coroutine: Awaitable[Any]) -> asyncio.Future[Any]:
    return asyncio.ensure_future(coroutine)


async def late(
    engine: Watched, operation: Awaitable[Any], stage: Stage | None = None
) -> TransferTimeout:
    """Let an operation's deadline pass, once it has come as far as `stage`."""
    task = soon(operation)
    await turns()
    if stage is not None:
        await engine.held.wait_held(stage)
    skip_time(LATE_S)
    with pytest.raises(TransferTimeout) as caught:
        await task
    return caught.value


async def is_cancelled(task: asyncio.Future[Any]) -> None:
    with pytest.raises(asyncio.CancelledError):
        await task


async def store(engine: Watched, *names: bytes) -> None:
    for name in names:
        assert await engine.store(name, content(name, SIZE))


# --- queued ---------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [True, False], ids=["store", "load"])
async def test_cancelled_while_queued_it_never_starts(tmp_path: Path, *, write: bool) -> None:
    """It ends at once, though what it queued behind goes on, and its memory is free."""
    async with opened(tmp_path / "kv", inflight_ops=1) as engine:
        await store(engine, b"a", b"b")
        before = engine.held.submitted
        engine.held.hold("start")
        act = engine.store if write else engine.load
        first = soon(act(b"c" if write else b"a", unaligned(SIZE)))
        await engine.held.wait_held("start")
        memory = engine.register(aligned(SIZE))
        second = soon(act(b"d" if write else b"b", memory))
        await turns()
        assert engine.statistics().queued == 1
        second.cancel()
        await is_cancelled(second)
        now = engine.statistics()
        assert (now.queued, now.cancelled, now.errors) == (0, 1, 0)  # nothing has gone wrong
        await engine.deregister(memory)
        assert not first.done()
        engine.held.release()
        assert await first
        await engine.load(b"a", bytearray(SIZE))
        assert engine.held.submitted == before + 2
        assert await engine.prefix([b"d"]) == 0


@pytest.mark.parametrize("write", [True, False], ids=["store", "load"])
async def test_past_its_deadline_while_queued_it_never_starts(
    tmp_path: Path, *, write: bool
) -> None:
    async with opened(tmp_path / "kv", inflight_ops=1) as engine:
        await store(engine, b"a", b"b")
        before = engine.held.submitted
        engine.held.hold("start")
        act = engine.store if write else engine.load
        first = soon(act(b"c" if write else b"a", unaligned(SIZE)))
        await engine.held.wait_held("start")
        memory = engine.register(aligned(SIZE))
        error = await late(engine, act(b"d" if write else b"b", memory, timeout_s=LATE_S))
        assert error.settled is None
        assert (error.key, error.direction) == ((b"d", "store") if write else (b"b", "load"))
        assert (error.path, error.errno) == ("", errno.ETIMEDOUT)
        await engine.deregister(memory)
        engine.held.release()
        assert await first
        assert engine.held.submitted == before + 1
        assert await engine.prefix([b"d"]) == 0


async def test_a_store_without_a_slot_leaves_at_its_deadline(tmp_path: Path) -> None:
    """Every slot is being written: the next store waits in the tier, and can be given up there."""
    async with opened(tmp_path / "kv", tier={"capacity_bytes": 2 * (PAGE + SIZE)}) as engine:
        engine.held.hold("start")
        writing = [soon(engine.store(b"%d" % i, content(i, SIZE))) for i in range(2)]
        await engine.held.wait_held("start", 2)
        error = await late(engine, engine.store(b"late", content(b"late", SIZE), timeout_s=LATE_S))
        assert error.settled is None
        assert engine.statistics().quarantined_bytes == 0
        assert engine.statistics().in_flight == 2
        engine.held.release()
        assert await asyncio.gather(*writing) == [True, True]
        assert await engine.prefix([b"late"]) == 0
        assert engine.held.submitted == 2


# --- in flight: cancelled ---------------------------------------------------------------------


@PATHS
@STAGES
async def test_a_cancelled_load_is_waited_for(tmp_path: Path, make: Any, stage: Stage) -> None:
    """However often it is cancelled, it ends with CancelledError once the memory is its own."""
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"a")
        engine.held.hold(stage)
        buffer = make(SIZE)
        memory = engine.register(buffer)
        task = soon(engine.load(b"a", memory))
        await engine.held.wait_held(stage)
        for _ in range(3):
            task.cancel()
            await turns()
        assert not task.done()
        with pytest.raises(BusyError):
            await engine.deregister(memory)
        engine.held.release()
        await is_cancelled(task)
        buffer[:] = WORD  # ours again: nothing may write to it from here on
        await engine.deregister(memory)
        assert (buffer == WORD).all()


@PATHS
@STAGES
async def test_a_cancelled_store_is_waited_for(tmp_path: Path, make: Any, stage: Stage) -> None:
    """Its memory may change only after that; the block that was stored is the one from before."""
    async with opened(tmp_path / "kv") as engine:
        engine.held.hold(stage)
        buffer = make(SIZE, content("a", SIZE))
        task = soon(engine.store(b"a", engine.register(buffer)))
        await engine.held.wait_held(stage)
        task.cancel()
        await turns()
        assert not task.done()
        engine.held.release()
        await is_cancelled(task)
        buffer[:] = WORD
        assert await engine.load(b"a", buffer)
        assert buffer.tobytes() == content("a", SIZE)


async def test_a_cancelled_batch_drops_what_is_queued_and_waits_for_the_rest(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path / "kv", inflight_ops=2) as engine:
        engine.held.hold("landing")
        keys = [b"%d" % i for i in range(6)]
        task = soon(engine.store_many([(key, content(key, SIZE)) for key in keys]))
        await engine.held.wait_held("landing", 2)
        task.cancel()
        await turns()
        assert engine.statistics().queued == 0
        assert not task.done()
        engine.held.release()
        await is_cancelled(task)
        assert engine.held.submitted == 2
        assert await engine.prefix(keys) == 2


async def test_nowait_cancelled_while_awaited(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv") as engine:
        engine.held.hold("landing")
        operation = engine.store_nowait(b"a", content("a", SIZE))

        async def wait() -> bool:
            return await operation

        task = soon(wait())
        await engine.held.wait_held("landing")
        task.cancel()
        await turns()
        assert not task.done()
        engine.held.release()
        await is_cancelled(task)


async def test_a_cancelled_delete_still_happens(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"a")
        task = soon(engine.delete(b"a"))
        await asyncio.sleep(0)
        task.cancel()
        await is_cancelled(task)
        assert await engine.prefix([b"a"]) == 0


# --- in flight: past the deadline ---------------------------------------------------------------


@PATHS
async def test_a_load_that_has_not_begun_lets_go_at_its_deadline(tmp_path: Path, make: Any) -> None:
    """The transport has it, but not yet the memory: that is free at once, and stays untouched."""
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"a")
        engine.held.hold("start")
        buffer = make(SIZE)
        memory = engine.register(buffer)
        error = await late(engine, engine.load(b"a", memory, timeout_s=LATE_S), "start")
        assert error.settled is None
        assert engine.statistics().quarantined_bytes > 0
        buffer[:] = WORD
        await engine.deregister(memory)
        engine.held.release()
        assert await engine.load(b"a", bytearray(SIZE))
        assert (buffer == WORD).all()
        assert engine.statistics().quarantined_bytes == 0


@PATHS
async def test_a_store_that_has_not_begun_is_not_published(tmp_path: Path, make: Any) -> None:
    async with opened(tmp_path / "kv") as engine:
        engine.held.hold("start")
        buffer = make(SIZE)
        memory = engine.register(buffer)
        error = await late(engine, engine.store(b"a", memory, timeout_s=LATE_S), "start")
        assert error.settled is None
        buffer[:] = WORD
        engine.held.release()
        assert await engine.store(b"b", memory)
        assert await engine.prefix([b"a"]) == 0


async def test_a_direct_load_past_its_deadline_settles_later(tmp_path: Path) -> None:
    """TransferTimeout at once; the memory answers BusyError until `settled`, then works again."""
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"a", b"b")
        engine.held.hold("landing")
        buffer = aligned(2 * SIZE)
        memory = engine.register(buffer)
        error = await late(engine, engine.load(b"a", memory[:SIZE], timeout_s=LATE_S), "landing")
        assert error.settled is not None
        assert (error.path, error.direction, error.key) == ("direct", "load", b"a")
        assert engine.statistics().quarantined_bytes == PAGE
        settled = [soon(wait_for(error)) for _ in range(2)]
        for act in (engine.load, engine.store):
            with pytest.raises(BusyError):
                await act(b"b", memory[SIZE - 1 : SIZE + 1])
        with pytest.raises(BusyError):
            await engine.deregister(memory)
        engine.held.hold("landing", lambda _: False)
        assert await engine.load(b"b", memory[SIZE:])  # its neighbour is nobody else's business
        assert not any(task.done() for task in settled)
        engine.held.release()
        await asyncio.gather(*settled)
        await error.settled  # again, and now at once
        assert await engine.load(b"b", memory[:SIZE])
        assert buffer.tobytes() == content(b"b", SIZE) * 2


async def wait_for(error: TransferTimeout) -> None:
    assert error.settled is not None
    await error.settled


async def test_a_direct_store_past_its_deadline_is_not_published(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"b")
        engine.held.hold("landing")
        buffer = aligned(SIZE)
        memory = engine.register(buffer)
        error = await late(engine, engine.store(b"a", memory, timeout_s=LATE_S), "landing")
        assert error.settled is not None
        with pytest.raises(BusyError):
            await engine.load(b"b", memory)
        with pytest.raises(BusyError):
            await engine.deregister(memory)
        engine.held.release()
        await error.settled
        assert await engine.prefix([b"a"]) == 0
        buffer[:] = WORD
        assert await engine.store(b"a", memory)


async def test_cancelled_after_all_a_settled_timeout_names_its_settled(tmp_path: Path) -> None:
    """Cancelled, then past its deadline too: the caller must learn that the memory is not free."""
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"a")
        engine.held.hold("landing")
        memory = engine.register(aligned(SIZE))
        task = soon(engine.load(b"a", memory, timeout_s=LATE_S))
        await engine.held.wait_held("landing")
        task.cancel()
        error = await late(engine, task, "landing")
        assert error.settled is not None
        engine.held.release()
        await error.settled


async def test_a_bounced_load_past_its_deadline_leaves_the_memory_alone(tmp_path: Path) -> None:
    """Free at once: what lands afterwards stays in the bounce region, which is whole again then."""
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"a")
        engine.held.hold("landing")
        buffer = unaligned(SIZE)
        memory = engine.register(buffer)
        error = await late(engine, engine.load(b"a", memory, timeout_s=LATE_S), "landing")
        assert error.settled is None
        assert error.path == "bounce"
        assert engine.statistics().quarantined_bytes == PAGE + SIZE
        buffer[:] = WORD
        await engine.deregister(memory)
        engine.held.release()
        again = bytearray(SIZE)
        assert await engine.load(b"a", again)
        assert again == content(b"a", SIZE)
        assert (buffer == WORD).all()
        assert engine.statistics().quarantined_bytes == 0


async def test_a_bounced_store_past_its_deadline_is_not_published(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv") as engine:
        engine.held.hold("landing")
        buffer = unaligned(SIZE)
        memory = engine.register(buffer)
        error = await late(engine, engine.store(b"a", memory, timeout_s=LATE_S), "landing")
        assert error.settled is None
        buffer[:] = WORD
        await engine.deregister(memory)
        engine.held.release()
        await store(engine, b"b")
        assert await engine.prefix([b"a"]) == 0
        assert engine.statistics().quarantined_bytes == 0


@PATHS
async def test_a_store_past_its_deadline_while_the_index_commits(tmp_path: Path, make: Any) -> None:
    """Its bytes are down and its row is being written: all the same it is never seen."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root) as engine:
            await store(engine, b"sound")
            disk.hang("write", match="index.db*")
            task = soon(engine.store(b"a", engine.register(make(SIZE)), timeout_s=LATE_S))
            await asyncio.to_thread(disk.wait_waiting, 1)
            error = await late(engine, task)
            assert await engine.prefix([b"a"]) == 0
            await asyncio.to_thread(disk.release)
            if error.settled is not None:
                await error.settled
            await until(engine.tier_idle)
            assert await engine.prefix([b"a"]) == 0
        async with opened(root) as engine:
            assert await engine.prefix([b"a"]) == 0
            assert await engine.prefix([b"sound"]) == 1


async def test_a_store_cancelled_while_the_index_commits(tmp_path: Path) -> None:
    """It is waited for, and it is there: the commit can't be called back."""
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.root / "kv") as engine:
            await store(engine, b"sound")
            disk.hang("write", match="index.db*")
            task = soon(engine.store(b"a", content(b"a", SIZE)))
            await asyncio.to_thread(disk.wait_waiting, 1)
            task.cancel()
            await turns()
            assert not task.done()
            await asyncio.to_thread(disk.release)
            await is_cancelled(task)
            assert await engine.load(b"a", bytearray(SIZE))


async def test_a_leased_slot_is_not_lent_again_before_the_transfer_is_done(tmp_path: Path) -> None:
    """The bounce region is as big as one block: until the late one has landed, the next waits."""
    async with opened(tmp_path / "kv", bounce_bytes=PAGE + SIZE) as engine:
        await store(engine, b"a", b"b")
        engine.held.hold("landing")
        await late(engine, engine.load(b"a", bytearray(SIZE), timeout_s=LATE_S), "landing")
        memory = bytearray(SIZE)
        waiting = soon(engine.load(b"b", memory))
        await turns()
        assert engine.statistics().queued == 1
        engine.held.release()
        assert await waiting
        assert memory == content(b"b", SIZE)


# --- sharing an I/O with one who leaves ---------------------------------------------------------


@PATHS
@pytest.mark.parametrize("stage", ["queued", "start", "landing"])
@pytest.mark.parametrize("leave", ["cancel", "deadline"])
async def test_followers_get_their_bytes(tmp_path: Path, make: Any, stage: str, leave: str) -> None:
    """Two load one block; the one whose memory the bytes go to leaves, the other gets them."""
    async with opened(tmp_path / "kv", inflight_ops=1) as engine:
        await store(engine, b"a", b"ahead")
        blocker = soon(asyncio.sleep(0))
        if stage == "queued":
            engine.held.hold("start")
            blocker = soon(engine.load(b"ahead", bytearray(SIZE)))
            await engine.held.wait_held("start")
        else:
            engine.held.hold("start" if stage == "start" else "landing")
        buffer, other = make(SIZE), make(SIZE)
        timeout_s = LATE_S if leave == "deadline" else None
        leader = soon(engine.load(b"a", engine.register(buffer), timeout_s=timeout_s))
        await turns()
        follower = soon(engine.load(b"a", engine.register(other)))
        await turns()
        assert engine.statistics().joined == 1
        if leave == "cancel":
            leader.cancel()
            await turns()
        else:
            error = await late(engine, leader, "landing" if stage == "landing" else "start")
            if error.settled is None:
                buffer[:] = WORD
        assert not follower.done()
        engine.held.release()
        assert await follower
        await blocker
        assert other.tobytes() == content(b"a", SIZE)
        if leave == "cancel":
            await is_cancelled(leader)
        elif error.settled is None:
            assert (buffer == WORD).all()
        else:
            await error.settled


@PATHS
@STAGES
async def test_a_follower_of_a_store_is_stored(tmp_path: Path, make: Any, stage: Stage) -> None:
    async with opened(tmp_path / "kv") as engine:
        engine.held.hold(stage)
        first, second = (engine.register(make(SIZE, content("a", SIZE))) for _ in range(2))
        leader = soon(engine.store(b"a", first, timeout_s=LATE_S))
        await engine.held.wait_held(stage)
        follower = soon(engine.store(b"a", second))
        error = await late(engine, leader, stage)
        engine.held.release()
        assert await follower
        if error.settled is not None:
            await error.settled
        memory = bytearray(SIZE)
        assert await engine.load(b"a", memory)
        assert memory == content("a", SIZE)


async def test_a_follower_leaves_at_its_own_deadline(tmp_path: Path) -> None:
    """Nothing moves into a follower's memory before the end, so it is free at once."""
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"a")
        engine.held.hold("landing")
        leader = soon(engine.load(b"a", engine.register(aligned(SIZE))))
        await engine.held.wait_held("landing")
        buffer = aligned(SIZE)
        memory = engine.register(buffer)
        error = await late(engine, engine.load(b"a", memory, timeout_s=LATE_S), "landing")
        assert error.settled is None
        buffer[:] = WORD
        await engine.deregister(memory)
        engine.held.release()
        assert await leader
        assert (buffer == WORD).all()


async def test_nobody_joins_a_load_that_was_given_up(tmp_path: Path) -> None:
    """Storage may never end it: who comes later has its own, though some still wait for that."""
    async with opened(tmp_path / "kv") as engine:
        assert await engine.store(b"a", content(b"a", SIZE))
        memory = [unaligned(SIZE) for _ in range(3)]
        engine.held.hold("landing")
        first = soon(engine.load(b"a", memory[0], timeout_s=LATE_S))
        await engine.held.wait_held("landing")
        second = soon(engine.load(b"a", memory[1], timeout_s=1e9))
        await turns()
        skip_time(LATE_S)
        with pytest.raises(TransferTimeout):
            await first
        engine.held.hold("landing", lambda _: False)
        third = soon(engine.load(b"a", memory[2], timeout_s=1e9))
        await until(third.done)
        assert not second.done()
        engine.held.release()
        assert await second
        assert await third
        assert all(each.tobytes() == content(b"a", SIZE) for each in memory[1:])


async def test_all_leave_one_after_the_other(tmp_path: Path) -> None:
    """A direct load nobody waits for any more is quarantined, and its memory comes back."""
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"a")
        engine.held.hold("landing")
        memory = [engine.register(aligned(SIZE)) for _ in range(3)]
        tasks = [
            soon(engine.load(b"a", each, timeout_s=LATE_S * (3 - i)))
            for i, each in enumerate(memory)
        ]
        await engine.held.wait_held("landing")
        for task in reversed(tasks):
            await late(engine, task)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [TransferTimeout] * 3
        settled = [outcome.settled for outcome in outcomes if isinstance(outcome, TransferTimeout)]
        assert [each is None for each in settled] == [False, True, True]
        assert engine.statistics().quarantined_bytes == PAGE
        engine.held.release()
        assert settled[0] is not None
        await settled[0]
        assert engine.statistics().quarantined_bytes == 0


async def test_what_ended_in_time_is_told_though_the_loop_was_late(tmp_path: Path) -> None:
    """The deadline passes while the loop has no time to look: nobody is told of a timeout."""
    async with opened(tmp_path / "kv") as engine:
        keys = [b"%d" % i for i in range(20)]
        await store(engine, *keys)
        engine.held.hold("landing")
        memory = [engine.register(aligned(SIZE)) for _ in keys]
        pairs = zip(keys, memory, strict=True)
        loads = [soon(engine.load(*pair, timeout_s=LATE_S)) for pair in pairs]
        stores = [soon(engine.store(b"s" + key, bytes(SIZE), timeout_s=LATE_S)) for key in keys]
        await engine.held.wait_held("landing", 40)
        engine.held.release()
        while engine.held.delivered < engine.held.submitted:
            pass  # the loop is busy with something else
        skip_time(LATE_S)
        assert await asyncio.gather(*loads) == [True] * 20
        ended = await asyncio.gather(*stores, return_exceptions=True)
        for key, outcome in zip(keys, ended, strict=True):  # their commits may have come too late
            assert (outcome is True) == await engine.prefix([b"s" + key])


async def test_a_cancelled_call_says_when_all_of_its_memory_is_free(tmp_path: Path) -> None:
    """Several of its blocks are in use past their deadline: one error, settled after the last."""
    async with opened(tmp_path / "kv") as engine:
        keys = [b"%d" % i for i in range(3)]
        await store(engine, *keys)
        engine.held.hold("landing")
        memory = [engine.register(aligned(SIZE)) for _ in keys]
        task = soon(engine.load_many(zip(keys, memory, strict=True), timeout_s=LATE_S))
        await engine.held.wait_held("landing", 3)
        task.cancel()
        await turns()
        error = await late(engine, task)
        assert "3 blocks" in str(error)
        assert error.settled is not None
        told: list[object] = []
        error.settled.add_done_callback(told.append)
        settled, gone = soon(error.settled), soon(error.settled)
        await turns()
        gone.cancel()  # is told no more, unlike who is called back
        for left in (2, 1, 0):
            assert not settled.done()
            assert not told
            engine.held.step("landing", 1)
            await until(lambda: sum(each.uses for each in memory) == left)  # noqa: B023 - used at once
        await settled
        assert gone.cancelled()
        assert told == [error.settled]
        for each in memory:
            await engine.deregister(each)
        error.settled.add_done_callback(told.append)  # it has ended already
        await turns()
        assert told == [error.settled] * 2


# --- many who want one block ----------------------------------------------------------------------


@pytest.mark.parametrize("leave", ["cancel", "deadline"])
async def test_the_first_of_many_leave_one_after_another(tmp_path: Path, leave: str) -> None:
    """Each time the next one leads; nobody boards anew, or loses the place in the queue."""
    async with opened(tmp_path / "kv", inflight_ops=1) as engine:
        await store(engine, b"hot", b"ahead", b"behind")
        order = engine.hold_first()
        ahead = soon(engine.load(b"ahead", bytearray(SIZE)))
        await engine.held.wait_held("start")
        memory = [make(SIZE) for make in (aligned, unaligned) * 50]
        regions = [engine.register(each) for each in memory]
        timeouts = [None if leave == "cancel" else LATE_S] * 97 + [None] * 3
        loads = [
            soon(engine.load(b"hot", region, timeout_s=timeout_s))
            for region, timeout_s in zip(regions, timeouts, strict=True)
        ]
        await turns()
        behind = soon(engine.load(b"behind", bytearray(SIZE)))
        await turns()
        assert engine.statistics().joined == 99
        if leave == "cancel":
            for load in loads[:97]:
                load.cancel()
        else:
            skip_time(LATE_S)
        await asyncio.wait(loads[:97])
        assert engine.statistics().joined == 99
        engine.held.step("start")
        assert await asyncio.gather(ahead, *loads[97:], behind) == [True] * 5
        assert order == [b"ahead", b"hot", b"behind"]
        for each in memory[97:]:
            assert each.tobytes() == content(b"hot", SIZE)
        assert not any(each.any() for each in memory[:97])


async def test_one_that_can_not_follow_is_passed_over(tmp_path: Path) -> None:
    """The first has left, the second needs more bounce memory than there is: the third leads."""
    size = 3 * MIB
    async with opened(tmp_path / "kv", inflight_ops=1) as engine:
        assert await engine.store(b"hot", engine.register(aligned(size, 1)))
        await store(engine, b"ahead")
        engine.hold_first()
        ahead = soon(engine.load(b"ahead", bytearray(SIZE)))
        await engine.held.wait_held("start")
        memory = engine.register(aligned(size)), bytearray(size), engine.register(aligned(size))
        first, second, third = (soon(engine.load(b"hot", each)) for each in memory)
        await turns()
        assert engine.statistics().joined == 2
        first.cancel()
        await is_cancelled(first)
        with pytest.raises(ConfigError, match="bounce_bytes"):
            await second
        engine.held.release()
        assert await ahead
        assert await third


async def test_who_joins_hastens(tmp_path: Path) -> None:
    """A request needs what is being prefetched: it waits no longer than for a load of its own."""
    async with opened(tmp_path / "kv", inflight_ops=1) as engine:
        await store(engine, b"ahead", b"early", b"wanted")
        order = engine.hold_first()
        loads = [soon(engine.load(b"ahead", bytearray(SIZE)))]
        await engine.held.wait_held("start")
        for key, priority in (
            (b"early", Priority.PREFETCH),
            (b"wanted", Priority.BACKGROUND),
            (b"wanted", Priority.DEMAND),
            (b"wanted", Priority.BACKGROUND),
        ):
            loads.append(soon(engine.load(key, bytearray(SIZE), priority=priority)))
            await turns()
        engine.held.step("start")
        assert await asyncio.gather(*loads) == [True] * 5
        assert order == [b"ahead", b"wanted", b"early"]


async def test_who_joins_what_has_waited_for_long_is_waited_for(tmp_path: Path) -> None:
    """It has waited longer than its handicap, so that nothing goes before it anyway."""
    async with opened(tmp_path / "kv", inflight_ops=1) as engine:
        await store(engine, b"ahead", b"wanted")
        begun: list[Any] = []

        def is_first(transfer: Any) -> bool:
            begun.append(transfer)
            return len(begun) == 1

        engine.held.hold("start", is_first)
        ahead = soon(engine.load(b"ahead", bytearray(SIZE)))
        await engine.held.wait_held("start")
        early = soon(engine.load(b"wanted", bytearray(SIZE), priority=Priority.BACKGROUND))
        await turns()
        skip_time(1.0)
        wanted = soon(engine.load(b"wanted", bytearray(SIZE)))
        await turns()
        engine.held.step("start")
        assert all(await asyncio.gather(ahead, early, wanted))
        assert [each.urgent for each in begun] == [True, True]


async def test_who_joins_what_has_started_hastens(tmp_path: Path) -> None:
    """What storage does not have yet then goes before what nobody waits for."""
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"wanted")
        started: list[Any] = []

        def note(transfer: Any) -> bool:
            started.append(transfer)
            return True

        engine.held.hold("start", note)
        loads = []
        for priority in (Priority.BACKGROUND, Priority.PREFETCH, Priority.DEMAND):
            loads.append(soon(engine.load(b"wanted", bytearray(SIZE), priority=priority)))
            await engine.held.wait_held("start")
            await turns()
            (transfer,) = started
            assert transfer.urgent == (priority is Priority.DEMAND)
        engine.held.release()
        assert await asyncio.gather(*loads) == [True] * 3


@pytest.mark.parametrize("leave", ["cancel", "deadline", "each"])
async def test_many_leave_in_many_turns(tmp_path: Path, leave: str) -> None:
    """The loop goes on while a call of thousands of blocks is called off."""
    async with opened(tmp_path / "kv", inflight_ops=1) as engine:
        await store(engine, b"ahead")
        engine.held.hold("start")
        ahead = soon(engine.load(b"ahead", bytearray(SIZE)))
        await engine.held.wait_held("start")
        items = [(b"%d" % i, bytes(PAGE)) for i in range(2000)]
        timeout_s = LATE_S if leave == "deadline" else None

        async def each() -> None:
            async with contextlib.aclosing(engine.store_each(items, timeout_s=timeout_s)) as ends:
                async for _ in ends:
                    pass

        if leave == "each":
            call = soon(each())
        else:
            call = soon(engine.store_many(items, timeout_s=timeout_s))
        await until(lambda: engine.statistics().queued == 1999)  # one has begun
        if leave == "deadline":
            skip_time(LATE_S)
        else:
            call.cancel()
        left = [1999]
        while left[-1]:
            await asyncio.sleep(0)
            left.append(engine.statistics().queued)
        assert max(a - b for a, b in itertools.pairwise(left)) <= 64
        engine.held.release()
        await asyncio.wait([call])
        assert await ahead


async def test_calls_called_off_half_admitted_keep_no_deadline(tmp_path: Path) -> None:
    """All that was admitted has ended at once: the rest never comes."""
    async with opened(tmp_path / "kv") as engine:
        items = [(b"%d" % i, bytearray(1)) for i in range(100)]
        for _ in range(200):
            call = soon(engine.load_many(items))
            await turns(1)
            call.cancel()
            await is_cancelled(call)
        assert engine.deadlines() < 100


# --- iterators ----------------------------------------------------------------------------------


async def test_lists_that_change_during_the_call(tmp_path: Path) -> None:
    """What was asked for when it began is done: not all of it is taken in at once."""
    async with opened(tmp_path / "kv") as engine:
        items: Any = [[b"%d" % i, bytes(PAGE)] for i in range(100)]
        storing = soon(engine.store_many(items))
        await asyncio.sleep(0)
        for item in items:
            item.clear()
        assert {outcome.status for outcome in await storing} == {"stored"}


@pytest.mark.parametrize("thrown", [False, True])
async def test_load_each_left_early(tmp_path: Path, thrown: bool) -> None:  # noqa: FBT001
    """What is queued is dropped, what is in flight is waited for, before the loop is left.

    By leaving it, or by an error that is thrown into it.
    """
    async with opened(tmp_path / "kv", inflight_ops=2) as engine:
        keys = [b"%d" % i for i in range(8)]
        await store(engine, *keys)
        before = engine.held.submitted
        memory = [engine.register(aligned(SIZE)) for _ in keys]
        engine.held.hold("landing")
        arrivals = engine.load_each(zip(keys, memory, strict=True))

        async def leave_after_one() -> Outcome:
            if thrown:
                outcome = await anext(arrivals)
                with pytest.raises(LookupError):
                    await arrivals.athrow(LookupError())
                return outcome
            async with contextlib.aclosing(arrivals):
                async for outcome in arrivals:
                    return outcome
            raise AssertionError("nothing arrived")

        task = soon(leave_after_one())
        await engine.held.wait_held("landing", 2)
        engine.held.step("landing", 1)
        await until(lambda: not engine.statistics().queued)
        assert not task.done()
        assert engine.held.held("landing") == 1
        engine.held.release()
        assert (await task).hit
        assert engine.held.submitted == before + 2
        for each in memory:
            await engine.deregister(each)


@pytest.mark.parametrize("how", ["cancelled", "timed out", "timed out, then cancelled"])
async def test_cancelled_while_it_leaves_load_each(tmp_path: Path, how: str) -> None:
    """The wait is finished, as the memory is in use, but the cancel is not lost to it.

    Nor is what it says: a cancel scope of anyio knows its own by that.
    """
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"a", b"b")
        memory = [engine.register(aligned(SIZE)) for _ in range(2)]
        engine.held.hold("landing")
        arrivals = engine.load_each(zip([b"a", b"b"], memory, strict=True))
        leaving = asyncio.timeout(None)

        async def leave_after_one() -> None:
            async with leaving:
                async with contextlib.aclosing(arrivals):
                    await anext(arrivals)
                raise AssertionError("went on")

        task = soon(leave_after_one())
        await engine.held.wait_held("landing", 2)
        engine.held.step("landing", 1)
        await until(lambda: engine.statistics().hits == 1)
        await turns()
        if how == "cancelled":
            task.cancel("over")
        else:
            leaving.reschedule(asyncio.get_running_loop().time())
            await until(leaving.expired)
            await turns()
            if how != "timed out":
                task.cancel("over")
        await turns()
        assert not task.done()
        engine.held.release()
        if how == "timed out":
            with pytest.raises(TimeoutError):
                await task
        else:
            with pytest.raises(asyncio.CancelledError, match=r"^over$"):
                await task
        for each in memory:
            await engine.deregister(each)


async def test_left_cancelled_and_late_it_tells_of_both(tmp_path: Path) -> None:
    """The memory is still in use past the deadline: the error comes from the cancel."""
    async with opened(tmp_path / "kv", inflight_ops=1) as engine:
        await store(engine, b"a")
        engine.held.hold("landing")
        items = [(b"none", bytearray(SIZE)), (b"a", engine.register(aligned(SIZE)))]

        async def leave_after_one() -> None:
            arrivals = engine.load_each(items, timeout_s=LATE_S)
            async with contextlib.aclosing(arrivals):
                assert (await anext(arrivals)).status == "miss"
                await engine.held.wait_held("landing")
                leaving.set()

        leaving = asyncio.Event()
        task = soon(leave_after_one())
        await leaving.wait()
        await turns()
        task.cancel("over")
        error = await late(engine, task)
        assert isinstance(error.__cause__, asyncio.CancelledError)
        assert error.__cause__.args == ("over",)
        assert error.settled is not None
        engine.held.release()
        await error.settled


async def test_cancelled_between_two_arrivals_and_late_it_tells_of_both(tmp_path: Path) -> None:
    """The cancel ended what the caller did with an outcome: nobody but the iterator can tell."""
    async with opened(tmp_path / "kv", inflight_ops=1) as engine:
        await store(engine, b"a")
        engine.held.hold("landing")
        items = [(b"none", bytearray(SIZE)), (b"a", engine.register(aligned(SIZE)))]
        computing = asyncio.Event()

        async def compute() -> None:
            async with contextlib.aclosing(engine.load_each(items, timeout_s=LATE_S)) as arrivals:
                async for outcome in arrivals:
                    assert outcome.status == "miss"
                    await engine.held.wait_held("landing")
                    computing.set()
                    await asyncio.Event().wait()

        task = soon(compute())
        await computing.wait()
        task.cancel("whose it is")
        error = await late(engine, task)
        assert isinstance(error.__cause__, asyncio.CancelledError)
        assert error.__cause__.args == ("whose it is",)
        assert error.settled is not None
        engine.held.release()
        await error.settled


async def test_store_each_cancelled(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv", inflight_ops=2) as engine:
        engine.held.hold("start")
        items = [(b"%d" % i, content(i, SIZE)) for i in range(5)]

        async def drain() -> list[Outcome]:
            return [outcome async for outcome in engine.store_each(items)]

        task = soon(drain())
        await engine.held.wait_held("start", 2)
        task.cancel()
        await turns()
        assert not task.done()
        engine.held.release()
        await is_cancelled(task)
        assert engine.held.submitted == 2


# --- the engine itself --------------------------------------------------------------------------


async def test_closing_drains(tmp_path: Path) -> None:
    """What was asked for before is done; what is asked for afterwards is refused."""
    async with opened(tmp_path / "kv", inflight_ops=2) as engine:
        engine.held.hold("landing")
        storing = soon(engine.store_many([(b"%d" % i, content(i, SIZE)) for i in range(6)]))
        await engine.held.wait_held("landing", 2)
        closing = soon(engine.aclose())
        await turns()
        assert not closing.done()
        with pytest.raises(ClosedError):
            await engine.store(b"late", bytes(1))
        engine.held.release()
        await closing
        assert [outcome.status for outcome in await storing] == ["stored"] * 6
        await engine.aclose()


async def test_closing_is_cancelled_only_when_it_is_done(tmp_path: Path) -> None:
    """Whoever leaves ``async with`` may remove the directory, however often it was cancelled."""
    settings = config(tmp_path / "kv")
    engine = Watched(settings, HeldTransport(NixlTransport()))
    storing: list[asyncio.Future[bool]] = []

    async def serve() -> None:
        async with running(engine):
            engine.held.hold("landing")
            storing.append(soon(engine.store(b"a", content("a", SIZE))))
            await asyncio.Event().wait()

    serving = soon(serve())
    await until(lambda: bool(storing))
    await engine.held.wait_held("landing")
    for _ in range(4):
        serving.cancel()
        await turns()
        assert not serving.done()
    engine.held.release()
    await is_cancelled(serving)
    assert await storing[0]
    async with opened(tmp_path / "kv") as engine:
        assert await engine.prefix([b"a"]) == 1


@pytest.mark.parametrize("turn", range(0, 60, 4))
async def test_closing_goes_on_when_every_task_is_cancelled(tmp_path: Path, turn: int) -> None:
    """As asyncio.run does at its end, and servers do when they are told to end at once."""

    async def serve() -> None:
        async with open_engine(config(tmp_path / "kv")) as engine:
            engine.store_nowait(b"a", content("a", SIZE))
            await asyncio.sleep(0)

    serving = soon(serve())
    before = asyncio.all_tasks()
    await until(lambda: serving.done() or bool(asyncio.all_tasks() - before))
    await turns(turn)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    async with opened(tmp_path / "kv") as engine:
        assert await engine.prefix([b"b"]) == 0


@pytest.mark.parametrize("turn", [0, 1, 3, 10, 100])
async def test_opening_is_undone_when_every_task_is_cancelled(tmp_path: Path, turn: int) -> None:
    async def serve() -> None:
        async with open_engine(config(tmp_path / "kv")):
            await asyncio.Event().wait()

    serving = soon(serve())
    await turns(turn)
    for _ in range(3):
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await turns(2)
    await is_cancelled(serving)
    async with opened(tmp_path / "kv") as engine:
        assert await engine.prefix([b"a"]) == 0


async def test_closing_with_a_wedged_transfer_fails_at_its_own_deadline(tmp_path: Path) -> None:
    """Loudly, and nobody gets the directory meanwhile; what waits ends by its own deadline."""
    settings = config(tmp_path / "kv", drain_timeout_s=0.1)
    engine = Watched(settings, HeldTransport(NixlTransport()))
    await engine.open()
    engine.held.hold("landing")
    storing = soon(engine.store(b"a", content("a", SIZE), timeout_s=LATE_S))
    await engine.held.wait_held("landing")
    for _ in range(2):
        with pytest.raises(TransferTimeout, match="in flight"):
            await engine.aclose()
    with pytest.raises(BusyError):
        async with open_engine(settings):
            pass
    await late(engine, storing, "landing")
    engine.held.release()
    await asyncio.wrap_future(engine.held.close())
    await until(engine.tier_idle)
    await engine.close_tier()
    async with opened(tmp_path / "kv") as engine:
        assert await engine.prefix([b"a"]) == 0


async def test_closing_waits_for_the_index_too(tmp_path: Path) -> None:
    """A removal or an eviction that nobody waits for is no reason to hang, or to be cut short."""
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"a")
        task = soon(engine.delete(b"a"))
        await asyncio.sleep(0)
        task.cancel()
        async with asyncio.timeout(5):
            await engine.aclose()
    async with opened(tmp_path / "kv") as engine:
        assert await engine.prefix([b"a"]) == 0


async def test_opening_can_be_cancelled(tmp_path: Path) -> None:
    """Whatever it had got hold of is let go: the directory opens again at once."""
    for delay in range(6):
        task = soon(open_engine(config(tmp_path / "kv")).__aenter__())
        for _ in range(delay):
            await asyncio.sleep(0)
        task.cancel()
        await is_cancelled(task)
        async with opened(tmp_path / "kv"):
            pass


async def stormy(engine: Watched, chance: random.Random) -> None:
    """One store or load that may be given up; afterwards its memory is really its own."""
    make = chance.choice([aligned, unaligned])
    name, timeout_s = b"%d" % chance.randrange(12), chance.choice([0.002, 0.01, 20.0])
    write = chance.random() < 0.5
    buffer = make(SIZE, content(name, SIZE) if write else 0)
    memory = engine.register(buffer)
    act = engine.store if write else engine.load
    try:
        if await act(name, memory, timeout_s=timeout_s):
            assert buffer.tobytes() == content(name, SIZE)
    except TransferTimeout as error:
        if error.settled is not None:
            await error.settled
    finally:
        with contextlib.suppress(BusyError):
            await engine.deregister(memory)
            buffer[:] = WORD


def weather(engine: Watched, chance: random.Random, tasks: list[asyncio.Task[None]]) -> None:
    """Hold something, let something go, or cancel somebody."""
    stage: Stage = chance.choice(["start", "landing"])
    match chance.randrange(6):
        case 0:
            engine.held.hold(stage, lambda _: chance.random() < 0.3)
        case 1 | 2:
            engine.held.step(stage)
        case 3:
            engine.held.release()
        case 4:
            chance.choice(tasks).cancel()


@pytest.mark.parametrize("seed", range(4))
async def test_a_storm_of_cancels_and_deadlines(tmp_path: Path, seed: int) -> None:
    """Whatever is given up, and wherever: no wrong byte, nothing lost, nothing left behind."""
    chance = random.Random(seed)
    changes = {"inflight_ops": 6, "bounce_bytes": 12 * PAGE, "tier": {"capacity_bytes": MIB // 2}}
    async with opened(tmp_path / "kv", lanes=2, **changes) as engine:
        tasks: list[asyncio.Task[None]] = []
        for _ in range(400):
            tasks.append(asyncio.create_task(stormy(engine, chance)))
            weather(engine, chance, tasks)
            if chance.random() < 0.3:
                await asyncio.to_thread(int)  # long enough for something to land
            else:
                await asyncio.sleep(0)
        engine.held.release()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        allowed = (type(None), asyncio.CancelledError)
        assert [end for end in ends if not isinstance(end, allowed)] == []


async def test_closing_while_a_batch_is_taken_in(tmp_path: Path) -> None:
    """A batch is taken in some blocks at a time; those that come after the closing are refused."""
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"there")
        items = [*((b"%d" % i, bytearray(SIZE)) for i in range(100)), (b"there", bytearray(SIZE))]
        task = soon(engine.load_many(items))
        await asyncio.sleep(0)
        await engine.aclose()
        outcomes = await task
        assert {outcome.status for outcome in outcomes[:32]} == {"miss"}
        assert {type(outcome.error) for outcome in outcomes[32:]} <= {type(None), ClosedError}
        assert type(outcomes[-1].error) is ClosedError or outcomes[-1].hit


async def test_closing_between_two_arrivals(tmp_path: Path) -> None:
    """Whoever takes a batch slowly learns that the engine has closed, block by block."""
    async with opened(tmp_path / "kv") as engine:
        outcomes = []
        async for outcome in engine.load_each([(b"%d" % i, bytearray(1)) for i in range(80)]):
            outcomes.append(outcome)
            if len(outcomes) == 1:
                await engine.aclose()
        assert len(outcomes) == 80
        assert outcomes[0].status == "miss"
        assert type(outcomes[-1].error) is ClosedError


async def test_a_batch_cancelled_while_it_is_taken_in(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv") as engine:
        keys = [b"%d" % i for i in range(200)]
        task = soon(engine.store_many([(key, content(key, SIZE)) for key in keys]))
        await asyncio.sleep(0)
        task.cancel()
        await is_cancelled(task)
        assert 0 < await engine.prefix(keys) + engine.held.submitted < 200


async def test_a_deadline_that_passes_while_a_batch_is_taken_in(tmp_path: Path) -> None:
    """Blocks that come after the deadline don't start; every block gets its outcome."""
    async with opened(tmp_path / "kv") as engine:
        engine.held.hold("start")
        items: list[tuple[Any, bytes]] = [(b"%d" % i, content(i, SIZE)) for i in range(200)]
        items.append(("text", bytes(1)))
        *outcomes, wrong = await engine.store_many(items, timeout_s=1e-4)
        errors: list[Any] = [outcome.error for outcome in outcomes]
        told = {(type(error), error.direction, error.errno) for error in errors}
        assert told == {(TransferTimeout, "store", errno.ETIMEDOUT)}
        assert type(wrong.error) is ConfigError
        engine.held.release()
        assert await engine.prefix([b"0"]) == 0


async def test_blocks_taken_in_long_after_the_deadline(tmp_path: Path) -> None:
    """All that came before has ended, so that nobody looks for late ones any more: none starts."""
    async with opened(tmp_path / "kv") as engine:
        await store(engine, b"there")
        items = [(b"%d" % i, bytearray(SIZE)) for i in range(300)]
        task = soon(engine.load_many([*items, (b"there", bytearray(SIZE))], timeout_s=LATE_S))
        await turns(1)
        skip_time(LATE_S)
        *misses, last = await task
        assert misses[0].status == "miss"
        assert type(last.error) is TransferTimeout
        assert engine.held.submitted == 1


async def test_who_is_being_copied_to_is_waited_for(tmp_path: Path) -> None:
    """Past its deadline, too: until the copy has ended, the memory is not the caller's."""
    size = 4 * MIB
    async with opened(tmp_path / "kv") as engine:
        payload = content(b"a", size)
        assert await engine.store(b"a", engine.register(aligned(size, payload)))
        engine.held.hold("start")
        memory = [bytearray(size) for _ in range(12)]
        loads = [engine.load(b"a", engine.register(aligned(size)), timeout_s=LATE_S)]
        loads += [engine.load(b"a", each, timeout_s=LATE_S) for each in memory]
        loading = asyncio.gather(*loads)
        await engine.held.wait_held("start")
        engine.held.release()
        running = engine._flights.running  # noqa: SLF001 - what is copied just now
        await until(lambda: loading.done() or any(flight.copying for flight in running))
        skip_time(LATE_S)
        assert await loading == [True] * 13
        assert all(each == payload for each in memory)


async def test_an_engine_is_busy_while_it_copies_to_those_who_share_a_load(tmp_path: Path) -> None:
    """Closing waits for that: closed, it writes to nobody's memory any more."""
    size = 4 * MIB
    async with opened(tmp_path / "kv") as engine:
        payload = content(b"a", size)
        assert await engine.store(b"a", engine.register(aligned(size, payload)))
        engine.held.hold("landing")
        memory = [bytearray(size) for _ in range(12)]
        loads = [engine.load(b"a", engine.register(aligned(size)))]
        loading = asyncio.gather(*loads, *(engine.load(b"a", each) for each in memory))
        await engine.held.wait_held("landing")
        engine.held.release()
        await until(lambda: not engine.busy())
        await turns()
        assert loading.done()
        assert await loading == [True] * 13
        assert all(each == payload for each in memory)
