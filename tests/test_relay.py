"""Two tiers at once: what races, what is given up half-way, and who must not wait for whom."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

import buckets
import support
from buckets import name_of
from faults import FaultyDisk
from kvgds import Event, Outcome, TransferError, TransferTimeout
from kvgds.testing import skip_time
from sharing import locked
from support import PAGE, content, turns, until
from test_maps import followed
from test_stack import SIZE, SLOT, Place, fill, load, relay
from wire import Wire
from wirefaults import s3_error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from s3 import JuiceServer
    from support import Watched


@pytest.fixture
def place(tmp_path: Path, s3: JuiceServer) -> Iterator[Place]:
    with Wire(s3.host, s3.port) as wire:
        yield Place(tmp_path / "kv", s3, wire)


async def test_prometheus_is_told_what_statistics_say(place: Place, tmp_path: Path) -> None:
    names = ("kvgds_owed", "kvgds_uploaded_total", "kvgds_upload_failures_total")

    def told(engine: Watched) -> tuple[float | None, ...]:
        value = engine.metrics.registry.get_sample_value
        return tuple(value(name) for name in (*names, "kvgds_promoted_total"))

    async with place.opened("back") as engine:
        await fill(engine, b"one", b"two")
        await until(lambda: relay(engine)[:2] == (0, 2))
        assert told(engine) == relay(engine)
        place.wire.answer(s3_error(500, "InternalError"), method="PUT")
        await fill(engine, b"three")
        await until(lambda: relay(engine)[2] > 0)
        assert told(engine)[0] == 1
        place.wire.ok()
        await until(lambda: relay(engine)[0] == 0)
        assert told(engine) == relay(engine)
    async with place.opened(root=tmp_path / "other") as engine:
        assert await load(engine, b"one")
        await until(lambda: relay(engine)[3] == 1)
        assert told(engine) == relay(engine)


# --- deletes ------------------------------------------------------------------------------------


async def test_a_delete_drops_what_was_stored_during_another(place: Place) -> None:
    """It does not take the answer of one that was called before the store."""
    async with place.opened("back") as engine:
        await fill(engine, b"key")
        await until(lambda: relay(engine)[0] == 0)
        place.wire.hold(method="DELETE")
        first = asyncio.ensure_future(engine.delete(b"key"))
        await asyncio.to_thread(place.wire.wait_held, 1)
        await fill(engine, b"key")
        second = asyncio.ensure_future(engine.delete(b"key"))
        await turns()
        place.wire.ok()
        assert await first
        assert await second
        assert await load(engine, b"key") is None
        await until(lambda: not engine.busy())
        assert await asyncio.to_thread(place.there) == {}


async def test_what_was_loaded_before_a_delete_is_not_taken_for_there_after_it(
    place: Place, tmp_path: Path
) -> None:
    """Stored again, it is uploaded again."""
    async with place.opened() as engine:
        await fill(engine, b"key")
        await until(lambda: relay(engine)[0] == 0)
    async with place.opened("through", root=tmp_path / "other") as engine:
        place.wire.hold(method="GET", target="*.kv")
        loading = asyncio.ensure_future(load(engine, b"key"))
        await asyncio.to_thread(place.wire.wait_held, 1)
        assert await engine.delete(b"key")
        place.wire.ok()
        assert await loading == content(b"key", SIZE)
        await fill(engine, b"key")
        assert await asyncio.to_thread(place.there) == {name_of(b"key"): content(b"key", SIZE)}


async def test_what_was_loaded_during_a_delete_is_not_taken_back(
    place: Place, tmp_path: Path
) -> None:
    async with place.opened() as engine:
        await fill(engine, b"key")
        await until(lambda: relay(engine)[0] == 0)
    async with place.opened(root=tmp_path / "other") as engine:
        place.wire.hold(method="HEAD")
        deleting = asyncio.ensure_future(engine.delete(b"key"))
        await asyncio.to_thread(place.wire.wait_held, 1)
        assert engine.held_objects is not None
        engine.held_objects.hold("landing", lambda transfer: not transfer.write)
        loading = asyncio.ensure_future(load(engine, b"key"))
        await engine.held_objects.wait_held("landing")
        place.wire.ok()
        assert await deleting
        engine.held_objects.release()
        assert await loading == content(b"key", SIZE)
        await until(lambda: not engine.busy())
        assert await load(engine, b"key") is None


async def test_who_left_past_its_deadline_lends_no_memory_to_the_bucket(place: Place) -> None:
    """The directory's block proves damaged after that: those who still wait load it alone."""
    async with place.opened(bounce_bytes=support.MIB) as engine:
        payload = content(b"key", 2 * support.MIB // 16)
        assert await engine.store(b"key", payload)
        await until(lambda: relay(engine)[0] == 0)
        await asyncio.to_thread(support.spoil, place.root, b"key")
        engine.held.hold("landing")
        buffer, other = support.aligned(len(payload)), bytearray(len(payload))
        lent = engine.register(buffer)
        late = asyncio.ensure_future(engine.load(b"key", lent, timeout_s=1000))
        await engine.held.wait_held("landing")
        loading = asyncio.ensure_future(engine.load(b"key", other, timeout_s=10000))
        await turns()
        skip_time(1000)
        with pytest.raises(TransferTimeout) as caught:
            await late
        assert caught.value.settled is not None
        assert engine.held_objects is not None
        engine.held_objects.hold("start")
        engine.held.release()
        await caught.value.settled
        buffer[:] = 7
        await engine.held_objects.wait_held("start")
        engine.held_objects.release()
        assert await loading
        assert other == payload
        assert set(buffer.tobytes()) == {7}


async def test_a_delete_waits_for_an_upload_that_reads_the_block(place: Place) -> None:
    """Else the bucket would be given the block once it had been asked to drop it."""
    async with place.opened("back") as engine:
        engine.held.hold("start", lambda transfer: not transfer.write)
        await fill(engine, b"key")
        await engine.held.wait_held("start")
        deleting = asyncio.ensure_future(engine.delete(b"key"))
        await turns()
        assert engine.near(b"key")
        engine.held.release()
        assert await deleting
        await until(lambda: not engine.busy())
        assert not engine.near(b"key")
        assert await asyncio.to_thread(place.there) == {}


async def test_a_delete_waits_for_a_promotion(place: Place) -> None:
    """Else the directory would be given the block once it had been asked to drop it."""
    place.put(b"key")
    async with place.opened() as engine:
        engine.held.hold("landing", lambda transfer: transfer.write)
        assert await load(engine, b"key") == content(b"key", SIZE)
        await engine.held.wait_held("landing")
        place.wire.hold(method="HEAD")
        deleting = asyncio.ensure_future(engine.delete(b"key"))
        await turns()
        assert engine._flights.relay.far.idle()  # noqa: SLF001
        place.wire.ok()
        engine.held.release()
        assert await deleting
        await until(lambda: not engine.busy())
        assert not engine.near(b"key")
        assert await load(engine, b"key") is None


async def test_what_is_being_promoted_is_not_promoted_again(place: Place) -> None:
    """It is loaded once more meanwhile: the first to end would end the other's bookkeeping, too."""
    place.put(b"key")
    async with place.opened() as engine:
        engine.held.hold("start", lambda transfer: transfer.write)
        assert await load(engine, b"key") == content(b"key", SIZE)
        await engine.held.wait_held("start")
        assert await load(engine, b"key") == content(b"key", SIZE)
        await turns()
        assert engine.held.held("start") == 1
        engine.held.release()
        await until(lambda: not engine.busy())
        assert relay(engine)[3] == 1


async def test_no_load_brings_back_what_was_deleted_during_it(place: Place) -> None:
    """Though another load of the key, into memory of another size, has begun since."""
    place.put(b"key")
    async with place.opened() as engine:
        assert engine.held_objects is not None
        engine.held_objects.hold("landing")
        loading = asyncio.ensure_future(load(engine, b"key"))
        await engine.held_objects.wait_held("landing")
        other = asyncio.ensure_future(engine.load(b"key", bytearray(PAGE)))
        await engine.held_objects.wait_held("landing", 2)
        assert await engine.delete(b"key")
        engine.held_objects.release()
        assert await loading == content(b"key", SIZE)
        await asyncio.gather(other, return_exceptions=True)
        await until(lambda: not engine.busy())
        assert not engine.near(b"key")
        assert await load(engine, b"key") is None


async def test_what_is_stored_while_the_bucket_is_asked_for_it_is_found(place: Place) -> None:
    """By who asks after the store: it shares no load that was told that there is nothing."""
    async with place.opened() as engine:
        place.wire.hold(method="GET", target="*.kv")
        before = asyncio.ensure_future(load(engine, b"key"))
        await asyncio.to_thread(place.wire.wait_held, 1)
        await fill(engine, b"key")
        after = asyncio.ensure_future(load(engine, b"key"))
        await turns()
        place.wire.ok()
        assert await after == content(b"key", SIZE)
        await asyncio.gather(before, return_exceptions=True)  # an upload may have come meanwhile


async def test_what_was_kept_of_a_store_past_its_deadline_is_found(place: Place) -> None:
    """By who asks once that was told: it shares no load that was told that there is nothing."""
    async with place.opened("through") as engine:
        place.wire.hold(when=lambda request: request.method in ("GET", "PUT"))
        before = asyncio.ensure_future(engine.load(b"key", bytearray(SIZE), timeout_s=1e5))
        await asyncio.to_thread(place.wire.wait_held, 1)
        storing = asyncio.ensure_future(engine.store(b"key", content(b"key", SIZE)))
        await asyncio.to_thread(place.wire.wait_held, 2)
        skip_time(60)
        with pytest.raises(TransferTimeout, match="has the block"):
            await storing
        after = asyncio.ensure_future(load(engine, b"key"))
        await turns()
        place.wire.ok()
        assert await after == content(b"key", SIZE)
        await asyncio.gather(before, return_exceptions=True)  # it may find that, too, or neither


async def test_who_shares_a_store_waits_on_when_its_first_leaves(place: Place) -> None:
    """It was stored, and waits for the bucket alone: nothing is begun anew."""
    async with place.opened("through") as engine:
        place.wire.hold(method="PUT", target="*.kv")
        payload = content(b"key", SIZE)
        first = asyncio.ensure_future(engine.store(b"key", payload))
        second = asyncio.ensure_future(engine.store(b"key", payload, timeout_s=1e5))
        await asyncio.to_thread(place.wire.wait_held, 1)
        await until(lambda: len(engine._flights.relay._waiting) == 1)  # noqa: SLF001
        skip_time(60)
        with pytest.raises(TransferTimeout, match="has the block"):
            await first
        await turns()
        scheduler = engine._flights.scheduler  # noqa: SLF001
        assert (scheduler.queued, scheduler.running, second.done()) == (0, 1, False)
        assert [len(each) for each in engine._flights.relay._waiting.values()] == [1]  # noqa: SLF001
        place.wire.ok()
        await second
        await until(lambda: not engine.busy())
        assert await asyncio.to_thread(place.there) == {name_of(b"key"): payload}


async def test_who_loads_after_a_store_shares_no_load_that_passes_by_the_first_tier(
    place: Place,
) -> None:
    """One that another has left to those who shared it looks there again."""
    async with place.opened("demote") as engine:
        place.wire.hold(method="GET", target="*.kv")
        late = asyncio.ensure_future(load(engine, b"key"))
        other = asyncio.ensure_future(engine.load(b"key", bytearray(SIZE), timeout_s=1e5))
        await asyncio.to_thread(place.wire.wait_held, 1)
        skip_time(60)
        with pytest.raises(TransferTimeout):
            await late
        await fill(engine, b"key")
        place.wire.hold(method="GET", target="*.kv")  # the next; lets that one go
        await until(lambda: engine.statistics().quarantined_bytes == 0)
        after = asyncio.ensure_future(load(engine, b"key"))
        await turns()
        place.wire.ok()
        assert await after == content(b"key", SIZE)
        assert await other


async def test_who_stores_after_a_delete_waits_for_no_upload_of_what_it_has_dropped(
    place: Place, tmp_path: Path
) -> None:
    """A store that was there before waits for it, and is told that there is nothing any more."""
    with FaultyDisk(tmp_path) as disk:
        async with place.opened("through", disk.root / "kv", tier={"layout": "files"}) as engine:
            await fill(engine, b"other")
            engine.held.hold("landing", lambda transfer: transfer.write)
            before = asyncio.ensure_future(engine.store(b"key", content(b"key", SIZE)))
            await engine.held.wait_held("landing")
            disk.hang("unlink", match="*.kv")
            others = asyncio.ensure_future(engine.delete(b"other"))
            await asyncio.to_thread(disk.wait_waiting, 1)
            engine.held.release()
            await until(lambda: engine.held.delivered == engine.held.submitted)
            place.wire.hold(method="HEAD")
            deleting = asyncio.ensure_future(engine.delete(b"key"))
            await turns()
            disk.release()
            await asyncio.to_thread(place.wire.wait_held, 2)
            disk.hang("lookup", match="*.kv")
            place.wire.ok()
            assert await others
            await deleting
            after = asyncio.ensure_future(engine.store(b"key", content(b"key", SIZE)))
            await turns()
            disk.release()
            with pytest.raises(TransferError, match="can't give it any more"):
                await before
            assert await after
            assert await load(engine, b"key") == content(b"key", SIZE)


async def test_a_block_that_can_not_be_deleted_is_still_owed(place: Place) -> None:
    """It is there as before, and gets to the bucket as if nobody had asked."""
    async with place.opened("back") as engine:
        place.wire.answer(s3_error(500, "InternalError"), method="PUT", target="*.kv")
        await fill(engine, b"key")
        await until(lambda: relay(engine)[2] > 0)
        with support.rows_kept(place.root), pytest.raises(TransferError, match=": no"):
            await engine.delete(b"key")
        place.wire.ok()
        await until(lambda: relay(engine)[0] == 0)
        assert await asyncio.to_thread(place.there) == {name_of(b"key"): content(b"key", SIZE)}


async def test_a_store_that_a_delete_overtakes_is_told_so(place: Place) -> None:
    """Its upload never comes: another delete was called before it was stored."""
    async with place.opened("through", drain_timeout_s=5.0) as engine:
        await fill(engine, b"key")
        place.wire.hold(method="DELETE")
        first = asyncio.ensure_future(engine.delete(b"key"))
        await asyncio.to_thread(place.wire.wait_held, 1)
        second = asyncio.ensure_future(engine.delete(b"key"))
        await turns()
        storing = asyncio.ensure_future(engine.store(b"key", content(b"key", SIZE)))
        await until(lambda: engine.near(b"key"))
        await turns()
        place.wire.ok()
        assert await first
        assert await second
        with pytest.raises(TransferError, match="deleted meanwhile"):
            await storing


async def test_room_is_made_of_what_was_stored_during_a_delete(place: Place) -> None:
    """It is asked for while nothing of the key may be carried: that is not forgotten."""
    async with place.opened("demote", tier={"capacity_bytes": SLOT}) as engine:
        await fill(engine, b"key")
        place.wire.hold(method="HEAD")
        deleting = asyncio.ensure_future(engine.delete(b"key"))
        await asyncio.to_thread(place.wire.wait_held, 1)
        await fill(engine, b"key")
        storing = asyncio.ensure_future(engine.store(b"other", content(b"other", SIZE)))
        await turns()
        place.wire.ok()
        assert await deleting
        assert await storing
        assert await load(engine, b"key") == content(b"key", SIZE)


# --- closing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", ["back", "demote"])
async def test_closing_ends_stores_that_wait_for_room(place: Place, write: str) -> None:
    """They wait for uploads, which go on for them."""
    tier = {"capacity_bytes": 2 * SLOT}
    async with place.opened(write, tier=tier, drain_timeout_s=5.0) as engine:  # type: ignore[arg-type]
        place.wire.hold(method="PUT")
        await fill(engine, b"0", b"1")
        stores = [
            asyncio.ensure_future(engine.store(b"%d" % n, content(b"%d" % n, SIZE)))
            for n in range(2, 7)
        ]
        await asyncio.to_thread(place.wire.wait_held, 1)
        closing = asyncio.ensure_future(engine.aclose())
        await turns()
        place.wire.ok()
        await closing
        assert await asyncio.gather(*stores) == [True] * 5
        assert engine.statistics().tiers[0].dropped == 0


async def test_closing_ends_a_delete_that_waits_for_an_upload(place: Place) -> None:
    """Of a block whose upload has not begun."""
    async with place.opened("back", bounce_bytes=4 * SLOT, drain_timeout_s=5.0) as engine:
        place.wire.hold(method="PUT")
        await fill(engine, b"0", b"1", b"2")
        await asyncio.to_thread(place.wire.wait_held, 1)
        deletes = [asyncio.ensure_future(engine.delete(b"%d" % n)) for n in range(3)]
        await turns()
        closing = asyncio.ensure_future(engine.aclose())
        await turns()
        place.wire.ok()
        await closing
        assert await asyncio.gather(*deletes) == [True] * 3


async def test_closing_goes_on_after_an_upload_has_failed(place: Place) -> None:
    """The store that waits for it has its room in the end, and nothing is dropped."""
    tier = {"capacity_bytes": SLOT}
    async with place.opened("demote", tier=tier, drain_timeout_s=10.0) as engine:
        await fill(engine, b"0")
        place.wire.hold(method="HEAD")
        storing = asyncio.ensure_future(engine.store(b"2", content(b"2", SIZE)))
        await asyncio.to_thread(place.wire.wait_held, 1)
        closing = asyncio.ensure_future(engine.aclose())
        await turns()
        place.wire.answer(s3_error(400, "BadRequest"), method="PUT", times=1)
        await closing
        assert await storing
        assert (relay(engine)[2], engine.statistics().tiers[0].dropped) == (1, 0)


# --- room on the way ----------------------------------------------------------------------------


async def test_a_store_that_waits_keeps_no_upload_from_its_lease(place: Place) -> None:
    """Large blocks: wherever the store's memory lies, there is enough in one piece."""
    size = 15 * PAGE
    tier = {"capacity_bytes": 18 * PAGE}
    async with place.opened("demote", tier=tier, bounce_bytes=32 * PAGE) as engine:
        await engine.store(b"small", bytes(PAGE))
        await engine.store(b"0", content(b"0", size))
        engine.held.hold("start", lambda transfer: transfer.nbytes == PAGE)
        loading = asyncio.ensure_future(engine.load(b"small", bytearray(PAGE)))
        await engine.held.wait_held("start")
        storing = asyncio.ensure_future(engine.store(b"1", content(b"1", size)))
        await turns()
        engine.held.release()
        assert await loading
        assert await storing
        assert engine.statistics().tiers[0].dropped == 0


async def test_a_promotion_that_waits_keeps_no_upload_from_its_lease(
    place: Place, tmp_path: Path
) -> None:
    """It does not wait: what makes room for it is the upload."""
    size = 15 * PAGE
    async with place.opened() as engine:
        for n in range(4):
            await engine.store(b"small %d" % n, bytes(PAGE))
        await until(lambda: relay(engine)[0] == 0)
    near, root = {"capacity_bytes": 16 * PAGE}, tmp_path / "other"
    async with place.opened("demote", root, tier=near, bounce_bytes=32 * PAGE) as engine:
        await engine.store(b"0", content(b"0", size))
        loads = [engine.load(b"small %d" % n, bytearray(PAGE)) for n in range(4)]
        assert await asyncio.gather(*loads) == [True] * 4
        assert await engine.store(b"1", content(b"1", size))


async def test_what_hangs_leaves_the_directory_its_memory(place: Place, tmp_path: Path) -> None:
    """An upload and a load, each of as much as may be: stores and loads there still move."""
    async with place.opened(root=tmp_path / "other") as engine:
        await fill(engine, b"far")
        await until(lambda: relay(engine)[0] == 0)
    async with place.opened("back", bounce_bytes=2 * SLOT) as engine:
        assert engine.held_objects is not None
        engine.held_objects.hold("landing")
        await fill(engine, b"0")
        loading = asyncio.ensure_future(load(engine, b"far"))
        await engine.held_objects.wait_held("landing")
        await turns()
        async with asyncio.timeout(10):
            await fill(engine, *(b"%d" % n for n in range(1, 9)))
            for n in range(9):
                assert await load(engine, b"%d" % n) == content(b"%d" % n, SIZE)
        engine.held_objects.release()
        assert await loading == content(b"far", SIZE)


@pytest.mark.parametrize("nbytes", [PAGE, 15 * PAGE, 90 * PAGE])
async def test_loads_go_on_while_promotions_hang(place: Place, tmp_path: Path, nbytes: int) -> None:
    """The directory takes nothing any more: what the bucket has is loaded all the same."""
    blocks = [(b"%d" % n, content(b"%d" % n, nbytes)) for n in range(40)]
    async with place.opened() as engine:
        await engine.store_many(blocks)
        await until(lambda: relay(engine)[0] == 0)
    async with place.opened(root=tmp_path / "other", timeout_s=10.0) as engine:
        engine.held.hold("start", lambda transfer: transfer.write)
        for key, payload in blocks:
            memory = bytearray(nbytes)
            assert await engine.load(key, memory)
            assert memory == payload


async def test_loads_go_on_while_another_process_has_the_ledger(
    place: Place, tmp_path: Path
) -> None:
    """One that is stopped, perhaps: promotions wait for it, and loads don't."""
    keys = [b"%d" % n for n in range(40)]
    async with place.opened() as engine:
        await fill(engine, *keys)
        await until(lambda: relay(engine)[0] == 0)
    other = tmp_path / "other"
    async with place.opened(root=other, tier={"layout": "files"}, timeout_s=10.0) as engine:
        with locked(other):
            for key in keys:
                assert await load(engine, key) == content(key, SIZE)


@pytest.mark.parametrize("layout", ["slabs", "files"])
async def test_no_promotion_drops_what_only_the_directory_has(place: Place, layout: str) -> None:
    """A bucket that can be read, but takes nothing: stores don't wait for it, and evict."""
    await asyncio.to_thread(place.put, b"far", b"farther")
    tier = {"layout": layout, "capacity_bytes": 4 * SLOT}
    keys = [b"%d" % n for n in range(4)]
    async with place.opened("back", tier=tier) as engine:
        await fill_untaken(place, engine, *keys)
        for key in (b"far", b"farther"):
            assert await load_once_it_answers(engine, key) == content(key, SIZE)
        await until(lambda: not engine._flights.relay._promoting)  # noqa: SLF001
        for key in keys:
            assert await load(engine, key) == content(key, SIZE)
        assert relay(engine)[3] == engine.statistics().tiers[0].dropped == 0
        await fill(engine, b"new")
        assert engine.statistics().tiers[0].dropped == 1
        place.wire.ok()


async def test_what_the_bucket_has_gives_way_to_promotions(place: Place) -> None:
    """In a directory that is else full of what the bucket does not take."""
    keys = [b"%d" % n for n in range(3)]
    await asyncio.to_thread(place.put, b"far", b"farther")
    for layout in ("slabs", "files"):
        tier = {"layout": layout, "capacity_bytes": 4 * SLOT}
        async with place.opened("back", place.root.with_name(layout), tier=tier) as engine:
            await fill_untaken(place, engine, *keys)
            for count, key in enumerate((b"far", b"farther", b"far"), 1):
                assert await load_once_it_answers(engine, key) == content(key, SIZE)
                await until(lambda: relay(engine)[3] == count)  # noqa: B023
            near = engine.statistics().tiers[0]
            assert (near.evictions, near.dropped) == (2, 0)
            place.wire.ok()


async def test_slabs_of_what_the_bucket_has_give_way_to_promotions(place: Place) -> None:
    """Of blocks of another size, of which there are none yet; while the bucket takes nothing."""
    large = content(b"large", 2 * SIZE)
    for number in range(8):
        await asyncio.to_thread(place.put, b"%d" % number)
    await asyncio.to_thread(buckets.put, place.server, place.bucket, b"large", large)
    async with place.opened("back", tier={"capacity_bytes": 8 * SLOT}) as engine:
        await fill_untaken(place, engine, b"owed")
        for count in range(1, 8):
            assert await load_once_it_answers(engine, b"%d" % count)
            await until(lambda: relay(engine)[3] == count)  # noqa: B023
        memory = bytearray(2 * SIZE)
        assert await engine.load(b"large", memory)
        await until(lambda: not engine._flights.relay._promoting)  # noqa: SLF001
        assert (bytes(memory), relay(engine)[3]) == (large, 8)
        assert engine.near(b"owed")
        assert engine.statistics().tiers[0].dropped == 0
        place.wire.ok()


async def test_a_shared_directory_evicts_ahead_of_need_only_what_the_bucket_has(
    place: Place,
) -> None:
    """What it lacks may have come there before its room is needed."""
    tier = {"layout": "files", "capacity_bytes": 60 * SLOT}
    async with place.opened("back", tier=tier) as engine:
        place.wire.hold(method="PUT")
        await fill(engine, *(b"%d" % n for n in range(61)))
        assert engine.statistics().tiers[0].dropped == 1
        place.wire.ok()


# --- blocks of other sizes ----------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["slabs", "files"])
async def test_through_waits_for_the_block_that_was_stored(place: Place, layout: str) -> None:
    """Not for the one of another size that it has replaced, whose upload was under way."""
    async with place.opened("through", tier={"layout": layout}) as engine:
        place.wire.hold(method="PUT")
        first = asyncio.ensure_future(engine.store(b"key", content(b"key", SIZE)))
        await asyncio.to_thread(place.wire.wait_held, 1)
        second = asyncio.ensure_future(engine.store(b"key", content(b"new", 2 * SIZE)))
        await until(lambda: len(engine._flights.relay._waiting.get(b"key", ())) == 2)  # noqa: SLF001
        if layout == "files":
            owed = place.root / "owed"
            assert await asyncio.to_thread(lambda: len(list(owed.iterdir()))) == 1
        place.wire.hold(method="PUT")  # lets go of the first
        await asyncio.to_thread(place.wire.wait_requests, 4, "PUT")  # two were of opening
        await turns()
        assert not second.done()
        if layout == "files":
            assert await asyncio.to_thread(lambda: len(list(owed.iterdir()))) == 1
        place.wire.ok()
        await asyncio.gather(first, second)
        assert await asyncio.to_thread(place.there) == {name_of(b"key"): content(b"new", 2 * SIZE)}


async def test_through_waits_for_what_has_replaced_a_damaged_block(place: Place) -> None:
    """That the first can't be read any more says nothing of the second."""
    async with place.opened("through") as engine:
        engine.held.hold("start", lambda transfer: not transfer.write)
        first = asyncio.ensure_future(engine.store(b"key", content(b"key", SIZE)))
        await engine.held.wait_held("start")
        await asyncio.to_thread(support.spoil, place.root, b"key")
        new = content(b"new", 2 * SIZE)
        second = asyncio.ensure_future(engine.store(b"key", new))
        await until(lambda: relay(engine)[0] == 2)
        engine.held.release()
        assert await second
        await asyncio.gather(first, return_exceptions=True)
        assert await asyncio.to_thread(place.there) == {name_of(b"key"): new}


async def test_an_upload_that_fails_leaves_owed_what_has_replaced_its_block(place: Place) -> None:
    """Of another size: asked for with the first one's it could not be read, nor ever uploaded."""
    async with place.opened("back") as engine:
        assert engine.held_objects is not None
        engine.held_objects.hold("start", lambda transfer: transfer.write)
        await fill(engine, b"key")
        await engine.held_objects.wait_held("start")
        new = content(b"new", 2 * SIZE)
        assert await engine.store(b"key", new)
        place.wire.answer(s3_error(500, "InternalError"), method="PUT", target="*.kv")
        engine.held_objects.release()
        await until(lambda: relay(engine)[2] == 1)
        place.wire.ok()
        await until(lambda: relay(engine)[0] == 0)
        assert await asyncio.to_thread(place.there) == {name_of(b"key"): new}


@pytest.mark.parametrize("layout", ["slabs", "files"])
async def test_a_promotion_replaces_nothing(place: Place, tmp_path: Path, layout: str) -> None:
    """A block of another size that was stored meanwhile stays, and gets to the bucket."""
    async with place.opened() as engine:
        await fill(engine, b"key")
        await until(lambda: relay(engine)[0] == 0)
    async with place.opened(root=tmp_path / "other", tier={"layout": layout}) as engine:
        engine.held.hold("landing", lambda transfer: transfer.write)
        assert await load(engine, b"key") == content(b"key", SIZE)
        await engine.held.wait_held("landing")
        engine.held.hold("landing", lambda _: False)
        new = content(b"new", 2 * SIZE)
        assert await engine.store(b"key", new)
        engine.held.release()
        await until(lambda: relay(engine)[0] == 0 and not engine.busy())
        memory = bytearray(2 * SIZE)
        assert await engine.load(b"key", memory)
        assert memory == new
        assert await asyncio.to_thread(place.there) == {name_of(b"key"): new}


async def test_a_block_that_replaces_another_stays_owed(place: Place, tmp_path: Path) -> None:
    """Though the bucket gets that one just then. Killed now, the engine uploads it later."""
    with FaultyDisk(tmp_path) as disk:
        async with place.opened("back", disk.root / "kv", tier={"layout": "files"}) as engine:
            place.wire.hold(method="PUT")
            await fill(engine, b"key")
            await asyncio.to_thread(place.wire.wait_held, 1)
            disk.hang("write", match="ledger", skip=1)  # with the new one in its place
            storing = asyncio.ensure_future(engine.store(b"key", content(b"new", 2 * SIZE)))
            await asyncio.to_thread(disk.wait_waiting, 1)
            place.wire.hold(method="PUT")  # lets go of the first
            await until(lambda: relay(engine)[1] == 1)
            disk.release()
            assert await storing
            await asyncio.to_thread(place.wire.wait_held, 1)
            await until(engine.tier_idle)
            owed = disk.backing / "kv" / "owed"
            assert await asyncio.to_thread(lambda: len(list(owed.iterdir()))) == 1
            place.wire.ok()
            await until(lambda: relay(engine)[:2] == (0, 2) and engine.tier_idle())
            assert await asyncio.to_thread(lambda: len(list(owed.iterdir()))) == 0


async def test_through_says_what_was_evicted_before_its_upload(place: Place) -> None:
    """At once, and closing does not wait for it: a shared directory waits for no upload."""
    tier = {"layout": "files", "capacity_bytes": 4 * SLOT}
    async with place.opened("through", tier=tier) as engine:
        assert engine.held_objects is not None
        engine.held_objects.hold("start")
        items = [(b"%d" % n, content(b"%d" % n, SIZE)) for n in range(60)]
        storing = asyncio.ensure_future(engine.store_many(items))
        await until(lambda: engine.statistics().tiers[0].dropped >= 50)
        await turns(100)
        engine.held_objects.release()
        outcomes = await storing
    there = await asyncio.to_thread(place.there)
    for key, status, error in outcomes:
        if status == "stored":
            assert there[name_of(key)] == content(key, SIZE)
        else:
            assert "evicted" in str(error)


async def test_through_sees_to_what_others_have_stored(place: Place) -> None:
    """In a shared directory: a store ends when the bucket has it, whoever was to upload it."""
    tier = {"layout": "files"}
    async with support.opened(place.root, tier=tier) as engine:
        await fill(engine, b"key")
    async with place.opened("through", tier=tier) as engine:
        assert not await engine.store(b"key", content(b"key", SIZE))
        assert await asyncio.to_thread(place.there) == {name_of(b"key"): content(b"key", SIZE)}
        puts = place.wire.requests
        assert not await engine.store(b"key", content(b"key", SIZE))
        assert place.wire.requests == puts


async def test_through_looks_no_more_for_what_is_deleted(place: Place) -> None:
    """Whether the bucket has it says nothing any more to a store that was told of the delete."""
    tier = {"layout": "files"}
    async with support.opened(place.root, tier=tier) as engine:
        await fill(engine, b"key")
    place.put(b"key")
    async with place.opened("through", tier=tier) as engine:
        place.wire.hold(method="HEAD")
        storing = asyncio.ensure_future(engine.store(b"key", content(b"key", SIZE)))
        await asyncio.to_thread(place.wire.wait_held, 1)
        deleting = asyncio.ensure_future(engine.delete(b"key"))
        with pytest.raises(TransferError, match="deleted meanwhile"):
            await storing
        place.wire.ok()
        assert await deleting
        await until(lambda: not engine.busy())
        assert relay(engine)[:3] == (0, 0, 0)
        assert await asyncio.to_thread(place.there) == {}


async def test_through_sees_to_what_could_not_be_read_once(place: Place, tmp_path: Path) -> None:
    """That a slab has it says nothing of the bucket, which has never got it."""
    with FaultyDisk(tmp_path) as disk:
        async with place.opened("through", disk.root / "kv") as engine:
            disk.fail("read", match="slab-*")
            for _ in range(2):
                with pytest.raises(TransferError, match="can't give it any more"):
                    await engine.store(b"key", content(b"key", SIZE))
            disk.clear()
            assert not await engine.store(b"key", content(b"key", SIZE))
            assert await asyncio.to_thread(place.there) == {name_of(b"key"): content(b"key", SIZE)}
            puts = place.wire.requests
            assert not await engine.store(b"key", content(b"key", SIZE))
            assert place.wire.requests == puts


# --- prefixes -----------------------------------------------------------------------------------


async def test_a_long_prefix_goes_on_beyond_the_first_part(place: Place) -> None:
    """What the directory lacks of it is looked for in the bucket part by part."""
    async with place.opened("through", tier={"capacity_bytes": 4 * SLOT}) as engine:
        await fill(engine, b"far", *(b"%d" % n for n in range(8)))
        keys = [b"far"] * 3000
        assert await engine.prefix([b"7", *keys]) == 3001
        assert await engine.prefix([*keys, b"gone", b"far"]) == 3000
        assert await engine.prefix([*keys, b"7", b"gone"]) == 3001


@pytest.mark.parametrize("rest", [b"far", b"near"])
async def test_a_long_prefix_leaves_the_loop_to_others(place: Place, rest: bytes) -> None:
    """Though the bucket need not be asked of any of its blocks, or of one alone."""
    parts = 300
    async with place.opened("through", tier={"capacity_bytes": 4 * SLOT}) as engine:
        await fill(engine, b"far", *(b"%d" % n for n in range(7)), b"near")
        asking = asyncio.ensure_future(engine.prefix([b"far", *[rest] * (parts * 1024)]))
        await turns(3 * parts // 2)  # two thirds of them for the keys to be checked
        assert not asking.done()
        assert await asking == parts * 1024 + 1


async def test_closing_waits_for_a_long_prefix(place: Place) -> None:
    """Though neither tier is busy with it between two parts: whoever asked is told."""
    async with place.opened("back") as engine:
        await fill(engine, b"near")
        await until(lambda: not engine.busy())
        asking = asyncio.ensure_future(engine.prefix([*[b"near"] * 300_000, b"gone"]))
        await turns(300)  # the keys are checked
        assert not asking.done()
        await engine.aclose()
        assert asking.done()
        assert await asking == 300_000


# --- a bucket that takes nothing ----------------------------------------------------------------


async def test_stores_go_on_when_the_bucket_can_only_be_read(place: Place) -> None:
    """However well it answers loads: what it refuses to take is no reason to refuse stores."""
    async with place.opened("demote", tier={"capacity_bytes": 4 * SLOT}) as engine:
        await fill(engine, *(b"%d" % n for n in range(6)))
        place.wire.answer(s3_error(403, "AccessDenied"), method="PUT")
        stop = asyncio.Event()

        async def read() -> None:
            while not stop.is_set():
                await load(engine, b"0")
                await engine.prefix([b"nowhere"])
                await asyncio.sleep(0)  # what is known at once gives others no turn

        reading = asyncio.ensure_future(read())
        await asyncio.wait_for(fill(engine, *(b"more %d" % n for n in range(8))), 18)
        stop.set()
        await reading
        place.wire.ok()


@pytest.mark.parametrize("write", ["back", "demote"])
async def test_stores_go_on_while_an_upload_drips(place: Place, write: str) -> None:
    """A request without an answer is enough, and nobody else has to ask."""
    tier = {"capacity_bytes": 2 * SLOT}
    async with place.opened(write, patience_s=0.5, tier=tier) as engine:  # type: ignore[arg-type]
        place.wire.drip(5, method="PUT")
        await asyncio.wait_for(fill(engine, *(b"%d" % n for n in range(6))), 18)
        place.wire.ok()
        place.wire.drop()


async def test_uploads_go_on_after_one_has_hung(place: Place) -> None:
    """Nothing else happens meanwhile."""
    async with place.opened("back", patience_s=0.5) as engine:
        place.wire.drip(5, method="PUT")
        await fill(engine, b"0")
        await until(lambda: engine.statistics().tiers[1].out != "")
        await fill(engine, b"1", b"2")
        place.wire.ok()
        place.wire.drop()
        await place.wait_there(b"0", b"1", b"2")


async def test_uploads_go_on_though_the_block_to_try_it_with_is_gone(place: Place) -> None:
    """A bucket that answers again is asked to take blocks again, whichever of them."""
    async with place.opened("demote", tier={"capacity_bytes": 4 * SLOT}) as engine:
        names = (b"%d" % n for n in itertools.count())
        place.wire.refuse()
        while relay(engine)[2] < 3:
            await fill(engine, next(names))
        await until_out(engine)
        await until(lambda: engine._flights.relay._pause is None)  # noqa: SLF001
        await fill(engine, *itertools.islice(names, 20))  # nobody waits: what was there goes
        place.wire.ok()
        async with asyncio.timeout(20):
            while not relay(engine)[1]:
                await fill(engine, next(names))


async def test_a_block_that_cannot_be_read_keeps_no_store_waiting(place: Place) -> None:
    """It will never be uploaded, so it goes when there is need of its room."""
    async with place.opened("demote", tier={"capacity_bytes": SLOT}) as engine:
        await fill(engine, b"0")
        (slab,) = place.root.glob("slab-*")
        await asyncio.to_thread(os.truncate, slab, 0)
        await fill(engine, b"1", b"2")
        assert engine.statistics().tiers[0].dropped == 1
        assert relay(engine)[2] == 1
        await load(engine, b"2")


async def test_what_grew_too_large_to_be_carried_on_keeps_no_store_waiting(place: Place) -> None:
    """The bounce region has become smaller: it will never be uploaded, so it may go."""
    tier = {"capacity_bytes": SLOT}
    async with place.opened("demote", tier=tier) as engine:
        await fill(engine, b"large")
    async with place.opened("demote", tier=tier, bounce_bytes=6 * PAGE) as engine:
        assert relay(engine)[0] == 0
        assert await engine.store(b"small", content(b"small", PAGE))
        assert not engine.near(b"large")


async def test_a_block_that_another_has_replaced_is_not_tried_for_ever(place: Place) -> None:
    """In a shared directory: whoever stored the other size uploads that."""
    async with place.opened("back", tier={"layout": "files"}) as engine:
        place.wire.refuse()
        await until_out(engine)
        await fill(engine, b"key", b"other")
        there = place.root / name_of(b"key")
        whole = support.image(support.NAMESPACE, b"key", 0, bytes(PAGE))
        await asyncio.to_thread(there.write_bytes, whole)
        place.wire.ok()
        await until(lambda: relay(engine)[0] == 0)
        assert relay(engine)[1:3] == (1, 1)


# --- what nobody can read -----------------------------------------------------------------------


async def test_a_bucket_that_goes_out_ends_a_few_stores_each_turn(place: Place) -> None:
    """Thousands may wait for it, and others use the loop too."""
    ended = [0]

    class Observer:
        def settled(self, event: Event) -> None:
            ended[-1] += event.direction == "store"

    async with place.opened("through") as engine:
        storing = await storing_through(place, engine, 400)
        engine.observe(Observer())
        place.wire.refuse()
        outing = asyncio.ensure_future(until_out(engine))
        while not storing.done():
            await asyncio.sleep(0)
            ended.append(0)
        await outing
        waited = [outcome for outcome in await storing if "left alone" in str(outcome.error)]
        assert len(waited) > 300  # of the others the upload was under way
        assert sum(ended) == 400
        assert max(ended) < 100
        place.wire.ok()


async def test_closing_waits_for_no_trial_of_a_bucket_that_went_out(place: Place) -> None:
    """Once the last of those who waited for it has been told, nothing is under way."""
    async with place.opened("through", tier={"capacity_bytes": 64 << 20}) as engine:
        storing = await storing_through(place, engine, 2000)
        closing = asyncio.ensure_future(engine.aclose())
        place.wire.refuse()
        await storing
        await until(lambda: not engine.busy())
        await turns()
        assert engine._flights._idle.done()  # noqa: SLF001
        await closing
        place.wire.ok()


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="there each dict is followed")
async def test_the_collector_follows_nothing_that_is_owed(place: Place) -> None:
    """A full run of it takes as long with a million blocks as with none."""
    async with place.opened("demote", tier={"capacity_bytes": 1 << 30}) as engine:
        await fill(engine, b"first")  # its slab has room for all
        before = followed()
        await fill(engine, *(b"%d" % n for n in range(400)))
        assert relay(engine)[0] == 401
        assert followed() < before + 400


async def test_what_is_owed_stays_bounded_without_the_bucket(place: Place) -> None:
    """What was evicted meanwhile is not remembered."""
    async with place.opened("back", tier={"capacity_bytes": 4 * SLOT}) as engine:
        place.wire.refuse()
        await until_out(engine)
        await fill(engine, *(b"more %d" % n for n in range(60)))
        assert relay(engine)[0] <= 10
        place.wire.ok()


async def fill_untaken(place: Place, engine: support.Watched, *keys: bytes) -> None:
    """Store what a bucket that can be read does not take, until stores don't wait for it."""
    place.wire.answer(s3_error(403, "AccessDenied"), method="PUT")
    await fill(engine, *keys)
    await until(lambda: relay(engine)[2] >= 3)


async def storing_through(place: Place, engine: Any, count: int) -> asyncio.Future[list[Outcome]]:
    """So many stores, all of which wait for the bucket, which answers none."""
    place.wire.hold(method="PUT")
    blocks = [(b"%d" % n, bytes(PAGE)) for n in range(count)]
    storing: asyncio.Future[Any] = asyncio.ensure_future(engine.store_many(blocks))
    await until(lambda: len(engine._flights.relay._waiting) == count)  # noqa: SLF001
    return storing


async def load_once_it_answers(engine: support.Watched, key: bytes) -> bytes:
    """Load what only the bucket has, which is a miss while that is left alone."""
    async with asyncio.timeout(20):
        while (found := await load(engine, key)) is None:
            await turns(1)
    return found


async def until_out(engine: support.Watched) -> None:
    while not engine.statistics().tiers[1].out:
        with contextlib.suppress(TransferError):
            await engine.load(b"nowhere", bytearray(SIZE))
