"""The object tier against the contract, on real servers, and through a wire that misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import re
import time
from typing import TYPE_CHECKING, Any

import pytest

import buckets
from buckets import name_of, payload_of, settings
from kvgds import (
    BlockCorrupt,
    ConfigError,
    Engine,
    EngineConfig,
    Namespace,
    ObjectTier,
    PathUnavailable,
    TransferError,
    TransferTimeout,
    open_engine,
)
from kvgds.testing import Bench, HeldTransport, PlainTransfer, TierContract, skip_time
from kvgds.transport import File, NixlTransport
from kvgds.transport.objects import ObjectTransport
from support import MIB, NAMESPACE, PAGE, Copying, Watched, content, image, turns, until
from wire import Wire
from wirefaults import response, s3_error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from s3 import JuiceServer, MotoServer, S3Server

BACKENDS = ("nixl", "obstore")
SIZE = 3 * PAGE + 5
SOON_S = 1.0


# --- the transport ------------------------------------------------------------------------------


class Carried(PlainTransfer):
    """A transfer of one piece of the bench's memory to or from an object."""

    def __init__(self, bench: Bench, place: str, at: int, nbytes: int, *, write: bool) -> None:
        rows = [(bench.base + at, 0, nbytes)]
        super().__init__(File(-1), [bench.region], rows, write=write, place=place)


@pytest.fixture(params=BACKENDS)
def bench(request: pytest.FixtureRequest, s3: JuiceServer) -> Iterator[ObjectBench]:
    bucket = s3.make_bucket()
    tier = settings(s3, bucket, prefix="some/where", backend=request.param, connections=4)
    transport = ObjectTransport(tier)
    transport.start()
    bench = ObjectBench(transport, s3, bucket)
    try:
        yield bench
    finally:
        transport.close().result(20)


class ObjectBench(Bench):
    """A transport of objects, and the server and bucket that it goes to."""

    def __init__(self, transport: ObjectTransport, server: S3Server, bucket: str) -> None:
        super().__init__(transport)
        self.server = server
        self.bucket = bucket

    def get(self, name: str) -> bytes | None:
        return self.server.get(self.bucket, f"some/where/{name}")

    def put(self, name: str, data: bytes) -> None:
        self.server.put(self.bucket, f"some/where/{name}", data)


def test_bytes_reach_the_object(bench: ObjectBench) -> None:
    data = os.urandom(2 * MIB + 1)
    bench.arena.bytes[PAGE : PAGE + len(data)] = data
    transfer = Carried(bench, "a/b", PAGE, len(data), write=True)
    bench.run(transfer)
    assert transfer.calls == ["begin", "end"]
    assert bench.get("a/b") == data


def test_bytes_reach_the_memory(bench: ObjectBench) -> None:
    """And the memory around them is untouched."""
    data = os.urandom(2 * MIB)
    bench.put("a/b", data)
    bench.arena.bytes[:] = b"\xee" * len(bench.arena.bytes)
    transfer = Carried(bench, "a/b", PAGE, len(data), write=False)
    bench.run(transfer)
    assert transfer.calls == ["begin", "end"]
    assert bench.arena.bytes[PAGE : PAGE + len(data)] == data
    assert bench.arena.bytes[:PAGE] == b"\xee" * PAGE
    assert bench.arena.bytes[PAGE + len(data) :][:PAGE] == b"\xee" * PAGE


def test_one_of_64_is_missing(bench: ObjectBench) -> None:
    """More at once than there are connections: each ends by itself."""
    for i in range(64):
        if i != 17:
            bench.put(f"{i}", b"%02d" % i * PAGE)
    transfers = [Carried(bench, f"{i}", 2 * i * PAGE, 2 * PAGE, write=False) for i in range(64)]
    bench.run(*transfers)
    for i, transfer in enumerate(transfers):
        if i == 17:
            assert transfer.calls == ["begin", "fail"]
            assert getattr(transfer.error, "errno", None) == errno.ENOENT
        else:
            assert transfer.calls == ["begin", "end"]
            there = bench.arena.bytes[2 * i * PAGE : 2 * (i + 1) * PAGE]
            assert there == b"%02d" % i * PAGE


def test_a_short_object_leaves_no_old_stamp(bench: ObjectBench) -> None:
    """NIXL says that it has come whole: what lay there before must not be taken for it."""
    bench.put("short", b"x" * 10)
    bench.arena.bytes[: 2 * PAGE] = b"\xee" * (2 * PAGE)
    bench.run(Carried(bench, "short", 0, 2 * PAGE, write=False))
    assert bench.arena.bytes[:PAGE] == b"x" * 10 + bytes(PAGE - 10)


async def test_a_cut_object_is_no_hit_by_what_lies_in_memory(far: Far) -> None:
    """Its end was brought there by the load before."""
    data = content(b"key", SIZE)
    async with far.engine() as engine:
        await engine.store(b"key", data)
        memory = bytearray(SIZE)
        assert await engine.load(b"key", memory)
        whole = await asyncio.to_thread(far.server.get, far.bucket, name_of(b"key"))
        assert whole is not None
        await asyncio.to_thread(far.server.put, far.bucket, name_of(b"key"), whole[:-PAGE])
        with pytest.raises(BlockCorrupt):
            await engine.load(b"key", memory)


def test_rows_that_do_not_join_are_refused(bench: ObjectBench) -> None:
    """An object is one piece; a neighbour arrives."""
    scattered = PlainTransfer(
        File(-1),
        [bench.region],
        [(bench.base, 0, PAGE), (bench.base + 2 * PAGE, PAGE, PAGE)],
        write=True,
        place="scattered",
    )
    sound = Carried(bench, "sound", 0, PAGE, write=True)
    bench.run(scattered, sound)
    assert (scattered.calls, sound.calls) == (["begin", "fail"], ["begin", "end"])
    assert bench.get("scattered") is None


def test_a_busy_stream_is_looked_at_ever_less_often(bench: ObjectBench) -> None:
    """As a transport of files does."""
    row = (bench.base, 0, PAGE)
    transfer = Copying(File(-1), [bench.region], [row], write=True, place="copied")
    bench.run(transfer)
    transfer.check()


def test_memory_detached_and_used_again(bench: ObjectBench) -> None:
    bench.put("a", b"x" * PAGE)
    for _ in range(2):
        bench.arena.bytes[:PAGE] = bytes(PAGE)
        bench.run(Carried(bench, "a", 0, PAGE, write=False))
        bench.transport.detach(bench.region).result(20)
        assert bench.arena.bytes[:PAGE] == b"x" * PAGE


def test_who_gives_up_a_detach_leaves_the_closing_alone(bench: ObjectBench) -> None:
    transfers = [Carried(bench, f"{i}", 0, PAGE, write=True) for i in range(40)]
    bench.transport.submit(transfers, bench.desk.put)
    closing = bench.transport.close()
    assert bench.transport.detach(bench.region).cancel()
    closing.result(20)
    bench.transport.detach(bench.region).result(20)


def test_closing_finishes_what_was_submitted(bench: ObjectBench) -> None:
    transfers = [Carried(bench, f"{i}", 0, PAGE, write=True) for i in range(40)]
    bench.transport.submit(transfers, bench.desk.put)
    bench.transport.close().result(20)
    bench.wait(transfers)
    assert len(bench.server.names(bench.bucket)) == 40


# --- the contract -------------------------------------------------------------------------------


class Objects(TierContract):
    """What every tier must pass, in a bucket."""

    backend = "nixl"
    late_stores_appear = True

    @pytest.fixture(autouse=True)
    def _server(self, s3: JuiceServer) -> None:
        self.server: S3Server = s3
        self.bucket = s3.make_bucket()

    def make_tiers(self, root: Path, **changes: Any) -> tuple[ObjectTier]:
        tier = settings(self.server, self.bucket, prefix=root.name, backend=self.backend)
        return (tier.model_copy(update=changes),)

    def name(self, root: Path, namespace: Namespace, key: bytes) -> str:
        return name_of(key, namespace, f"{root.name}/")

    def side_get(self, root: Path, namespace: Namespace, key: bytes) -> bytes | None:
        return payload_of(self.server.get(self.bucket, self.name(root, namespace, key)))

    def side_set(self, root: Path, namespace: Namespace, key: bytes, payload: bytes) -> None:
        whole = image(namespace, key, 0, payload)
        self.server.put(self.bucket, self.name(root, namespace, key), whole)

    def side_spoil(self, root: Path, namespace: Namespace, key: bytes, at: int) -> None:
        buckets.spoil(self.server, self.bucket, self.name(root, namespace, key), at)


class TestNixl(Objects):
    """NIXL's OBJ plugin."""


class TestObstore(Objects):
    """obstore, where the plugin can't be had."""

    backend = "obstore"


class TestMoto(Objects):
    """Another server."""

    @pytest.fixture(autouse=True)
    def _server(self, moto_s3: MotoServer) -> None:
        self.server = moto_s3
        self.bucket = moto_s3.make_bucket()


# --- engines on a wire --------------------------------------------------------------------------


class Far:
    """A bucket behind a wire, with an engine of it alone."""

    def __init__(self, server: S3Server, wire: Wire, backend: str) -> None:
        self.server = server
        self.wire = wire
        self.bucket = server.make_bucket()
        self.tier = settings(
            server,
            self.bucket,
            endpoint=wire.endpoint,
            backend=backend,
            connect_timeout_s=2.0,
            request_timeout_s=2.0,
            retries=0,
        )

    @contextlib.asynccontextmanager
    async def engine(self, **changes: Any) -> AsyncIterator[Watched]:
        config = EngineConfig(
            namespace=NAMESPACE,
            tiers=(self.tier,),
            **{"bounce_bytes": 2 * MIB, "timeout_s": 20.0, "drain_timeout_s": 20.0, **changes},
        )
        engine = Watched(config, HeldTransport(NixlTransport()))
        await engine.open()
        try:
            yield engine
        finally:
            self.wire.ok()
            self.wire.drop()
            await engine.aclose()
        engine.check()

    def stored(self, key: bytes) -> bytes | None:
        return payload_of(self.server.get(self.bucket, name_of(key)))


def told_once(engine: Watched) -> None:
    """Whether of each transfer it was told once that it has ended."""
    carrier = engine.held_objects
    assert carrier is not None
    assert carrier.delivered == carrier.submitted


@pytest.fixture(params=BACKENDS)
def far(request: pytest.FixtureRequest, s3: JuiceServer) -> Iterator[Far]:
    with Wire(s3.host, s3.port) as wire:
        yield Far(s3, wire, request.param)


FAULTS: dict[str, Callable[[Wire], None]] = {
    "refused": Wire.refuse,
    "reset": Wire.reset,
    "reset in the body": lambda wire: wire.reset(after=2000),
    "cut in the head": lambda wire: wire.truncate(after=30),
    "cut in the body": lambda wire: wire.truncate(after=2000),
    "503": lambda wire: wire.answer(s3_error(503, "SlowDown")),
    "500": lambda wire: wire.answer(s3_error(500, "InternalError")),
    "403": lambda wire: wire.answer(s3_error(403, "AccessDenied")),
    "no HTTP": lambda wire: wire.answer(b"what do you mean?\r\n\r\n", close=True),
}
UPLOAD_FAULTS = FAULTS | {
    "reset in the body": lambda wire: wire.reset(after=2000, of="upload"),
    "cut in the body": lambda wire: wire.truncate(after=2000, of="upload"),
}
WRONG: dict[str, Callable[[Wire], None]] = {
    "short": lambda wire: wire.answer(response(206, b"x" * 1000), method="GET"),
    "empty": lambda wire: wire.answer(response(206), method="GET"),
    "other bytes": lambda wire: wire.corrupt(at=PAGE + 7, method="GET", times=1),
    "other stamp": lambda wire: wire.corrupt(at=20, method="GET", times=1),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_load_fails_with_an_error_of_its_own(far: Far, fault: str) -> None:
    """The memory is untouched, nothing is leaked, and it loads once the server is well again."""
    data = content(b"key", SIZE)
    async with far.engine() as engine:
        await engine.store(b"key", data)
        FAULTS[fault](far.wire)
        memory = bytearray(b"\xee" * SIZE)
        with pytest.raises(TransferError) as caught:
            await engine.load(b"key", memory, timeout_s=15.0)
        assert not isinstance(caught.value, TransferTimeout)
        assert (caught.value.key, caught.value.direction) == (b"key", "load")
        assert memory == b"\xee" * SIZE
        far.wire.ok()
        assert await engine.load(b"key", memory)
        assert memory == data


@pytest.mark.parametrize("fault", UPLOAD_FAULTS)
async def test_a_store_fails_with_an_error_of_its_own(far: Far, fault: str) -> None:
    async with far.engine() as engine:
        UPLOAD_FAULTS[fault](far.wire)
        with pytest.raises(TransferError) as caught:
            await engine.store(b"key", content(b"key", SIZE), timeout_s=15.0)
        assert not isinstance(caught.value, TransferTimeout)
        far.wire.ok()
        assert await engine.store(b"other", content(b"other", SIZE))
        assert await asyncio.to_thread(far.stored, b"other") == content(b"other", SIZE)


@pytest.mark.parametrize("fault", UPLOAD_FAULTS)
async def test_only_the_upload_fails(far: Far, fault: str) -> None:
    """The look before it goes well: what the server has then is the block, or nothing."""
    async with far.engine() as engine:
        strike = UPLOAD_FAULTS[fault]
        far.wire.hold(method="HEAD")
        storing = asyncio.ensure_future(engine.store(b"key", content(b"key", SIZE), timeout_s=15.0))
        await asyncio.to_thread(far.wire.wait_held, 1)
        strike(far.wire)
        with contextlib.suppress(TransferError):
            await storing
        found = await asyncio.to_thread(far.stored, b"key")
        assert found in (None, content(b"key", SIZE))


@pytest.mark.parametrize("fault", WRONG)
async def test_wrong_bytes_never_reach_the_caller(far: Far, fault: str) -> None:
    """What the server has is sound: the load fails, and the object stays where it is."""
    data = content(b"key", SIZE)
    async with far.engine() as engine:
        await engine.store(b"key", data)
        WRONG[fault](far.wire)
        memory = bytearray(b"\xee" * SIZE)
        with pytest.raises((TransferError, BlockCorrupt)):
            await engine.load(b"key", memory)
        assert memory == b"\xee" * SIZE
        far.wire.ok()
        assert await engine.load(b"key", memory)
        assert memory == data
        assert engine.statistics().tiers[0].quarantined == 0


@pytest.mark.parametrize("fault", ["black_hole", "drip"])
async def test_no_answer_costs_no_more_than_the_deadline(far: Far, fault: str) -> None:
    """Nor does it keep the caller's memory; the bounce memory comes back with the request's end."""
    data = content(b"key", SIZE)
    async with far.engine() as engine:
        await engine.store(b"key", data)
        if fault == "drip":
            far.wire.drip(20)
        else:
            far.wire.black_hole()
        memory = bytearray(b"\xee" * SIZE)
        began = time.monotonic()
        with pytest.raises(TransferError) as caught:
            await engine.load(b"key", memory, timeout_s=SOON_S)
        assert time.monotonic() - began < 2 * SOON_S
        assert getattr(caught.value, "settled", None) is None
        memory[:] = bytes(SIZE)
        far.wire.ok()
        far.wire.drop()
        await until(lambda: engine.statistics().quarantined_bytes == 0)
        assert memory == bytes(SIZE)


@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_what_passes_is_tried_again(far: Far, method: str) -> None:
    """As often as was asked for, and no more."""
    data, memory = content(b"key", SIZE), bytearray(SIZE)
    far.tier = far.tier.model_copy(update={"retries": 2})
    async with far.engine() as engine:
        if method == "GET":
            assert await engine.store(b"key", data)

        async def act() -> bool:
            one = engine.store(b"key", data) if method == "PUT" else engine.load(b"key", memory)
            return await one

        for times, tries in ((3, 3), (2, 3)):
            before = far.wire.requests[method]
            error = s3_error(500, "InternalError")
            far.wire.answer(error, method=method, target="*.kv*", times=times)
            if times == tries:
                with pytest.raises(TransferError):
                    await act()
            else:
                assert await act()
            assert far.wire.requests[method] - before == tries
        assert method == "PUT" or memory == data
        assert await asyncio.to_thread(far.stored, b"key") == data


@pytest.mark.parametrize("far", ["nixl"], indirect=True)
@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_what_nobody_waits_for_is_not_tried_again(far: Far, method: str) -> None:
    """Between two tries its memory is let go, however long the pause would have been."""
    data = content(b"key", SIZE)
    # Five tries may take longer than the 2 s after which a server would be left alone.
    far.tier = far.tier.model_copy(update={"retries": 10, "request_timeout_s": 20.0})
    async with far.engine() as engine:
        assert await engine.store(b"key", data)
        before = far.wire.requests[method]
        far.wire.answer(s3_error(500, "InternalError"), method=method, target="*.kv*")
        act = (
            engine.load(b"key", bytearray(SIZE)) if method == "GET" else engine.store(b"new", data)
        )
        late = asyncio.ensure_future(act)
        await asyncio.to_thread(far.wire.wait_requests, before + 5, method)
        carrier = engine.held_objects and engine.held_objects.inner
        assert isinstance(carrier, ObjectTransport)
        await until(lambda: bool(carrier._pausing))  # noqa: SLF001 - for 0.8 s at least
        skip_time(60)
        with pytest.raises(TransferTimeout):
            await late
        tried = far.wire.requests[method]  # one more if that pause was over before the deadline
        await until(lambda: engine.statistics().quarantined_bytes == 0)
        assert far.wire.requests[method] == tried
        far.wire.ok()
        assert await engine.load(b"key", bytearray(SIZE))
    told_once(engine)


async def test_what_waits_for_a_connection_is_let_go_at_its_deadline(far: Far) -> None:
    """Not only once the one before it has its answer."""
    far.tier = far.tier.model_copy(update={"connections": 1, "request_timeout_s": 20.0})
    async with far.engine() as engine:
        for key in (b"first", b"next"):
            assert await engine.store(key, content(key, SIZE))
        far.wire.hold(method="GET", target="*.kv*")
        first = asyncio.ensure_future(engine.load(b"first", bytearray(SIZE)))
        await asyncio.to_thread(far.wire.wait_held, 1)
        with pytest.raises(TransferTimeout):
            await engine.load(b"next", bytearray(SIZE), timeout_s=0.2)
        await until(lambda: engine.statistics().quarantined_bytes == 0)
        assert not first.done()
        far.wire.ok()
        assert await first
    told_once(engine)


async def test_a_store_after_a_miss_does_not_look_again(far: Far) -> None:
    """Who asks first, as servers do, pays for one look, not for two."""
    async with far.engine() as engine:
        assert await engine.prefix([b"asked", b"more"]) == 0
        assert not await engine.load(b"loaded", bytearray(SIZE))
        before = far.wire.requests["HEAD"]
        for key in (b"asked", b"loaded"):
            assert await engine.store(key, content(key, SIZE))
        assert far.wire.requests["HEAD"] == before
        assert await engine.store(b"new", content(b"new", SIZE))
        assert far.wire.requests["HEAD"] == before + 1


async def test_a_long_prefix_of_what_was_seen_there_leaves_the_loop_to_others(far: Far) -> None:
    parts = 20
    async with far.engine() as engine:
        await engine.store(b"key", content(b"key", SIZE))
        asking = asyncio.ensure_future(engine.prefix([b"key"] * (parts * 1024)))
        await turns(3 * parts // 2)  # two thirds of them for the keys to be checked
        assert not asking.done()
        assert await asking == parts * 1024
        assert await engine.prefix([*[b"key"] * 3000, b"gone", b"key"]) == 3000


async def test_what_was_seen_there_is_not_believed_for_ever(far: Far) -> None:
    """Others delete too: `kvgds gc`, and the bucket's own rules."""
    async with far.engine() as engine:
        data = content(b"key", SIZE)
        await engine.store(b"key", data)
        await asyncio.to_thread(far.server.delete, far.bucket, name_of(b"key"))
        assert not await engine.store(b"key", data)
        assert await engine.prefix([b"key"]) == 1
        skip_time(600)
        assert await engine.prefix([b"key"]) == 0
        assert await engine.store(b"key", data)
        assert await asyncio.to_thread(far.stored, b"key") == data


async def test_a_missing_block_is_no_failure(far: Far) -> None:
    """However many there are, the breaker stays closed."""
    far.tier = far.tier.model_copy(update={"request_timeout_s": 5.0})  # 64 at once take their time
    async with far.engine() as engine:
        keys = [b"%d" % i for i in range(64)]
        items = [(key, bytearray(SIZE)) for key in keys]
        await engine.store_many([(key, content(key, SIZE)) for key in keys if key != b"17"])
        outcomes = await engine.load_many(items)
        assert [outcome.status for outcome in outcomes].count("hit") == 63
        assert outcomes[17].status == "miss"
        for key, memory in items:
            if key != b"17":
                assert memory == content(key, SIZE)
        assert await engine.prefix(keys) == 17
        for _ in range(5):
            assert not await engine.load(b"nowhere", bytearray(SIZE))
        assert engine.statistics().tiers[0].out == ""


async def test_a_server_that_hangs_is_left_alone_however_short_the_deadlines_are(far: Far) -> None:
    """Longer than NIXL waits by itself, and than any caller does."""
    far.tier = far.tier.model_copy(update={"request_timeout_s": 4.0})
    async with far.engine() as engine:
        far.wire.hold()
        numbers = itertools.count()
        async with asyncio.timeout(15.0):
            while not engine.statistics().tiers[0].out:
                with pytest.raises(TransferError):
                    await engine.load(b"%d" % next(numbers), bytearray(SIZE), timeout_s=0.5)
        with pytest.raises(TransferError, match="is left alone"):
            await engine.load(b"another", bytearray(SIZE))


async def test_a_question_that_hangs_is_as_bad_as_a_transfer(
    far: Far, caplog: pytest.LogCaptureFixture
) -> None:
    """The tier goes out, says so, and comes back."""
    far.tier = far.tier.model_copy(update={"request_timeout_s": 1.0})
    async with far.engine() as engine:
        far.wire.hold(method="HEAD")
        asking = asyncio.ensure_future(engine.prefix([b"key"]))
        await until(lambda: engine.statistics().tiers[0].out != "")
        assert "left alone" in caplog.text
        assert await engine.prefix([b"other"]) == 0
        far.wire.ok()
        assert await asking == 0
        await until(lambda: not engine.statistics().tiers[0].out)
        assert await engine.store(b"key", content(b"key", SIZE))


async def test_who_stores_what_arrives_late_is_told_once_it_is_there(far: Far) -> None:
    """Its deadline has passed when it arrives."""
    data = content(b"key", SIZE)
    async with far.engine() as engine:
        far.wire.hold(method="PUT")
        storing = asyncio.ensure_future(engine.store(b"key", data))
        await asyncio.to_thread(far.wire.wait_held, 1)
        skip_time(100)
        with pytest.raises(TransferTimeout):
            await storing
        again = asyncio.ensure_future(engine.store(b"key", data))
        await asyncio.wait({again}, timeout=0.2)  # it would be done, if it did not wait
        far.wire.ok()
        await again
        assert await asyncio.to_thread(far.stored, b"key") == data


async def test_a_late_store_takes_back_nothing_that_another_was_told_of(far: Far) -> None:
    """Two engines: the second finds the block there, and counts on it."""
    data = content(b"key", SIZE)
    async with far.engine() as engine, contextlib.AsyncExitStack() as stack:
        far.wire.hold(method="PUT", target="*.kv")
        storing = asyncio.ensure_future(engine.store(b"key", data))
        await asyncio.to_thread(far.wire.wait_held, 1)
        skip_time(100)
        with pytest.raises(TransferTimeout):
            await storing
        direct = far.tier.model_copy(update={"endpoint": far.server.endpoint})
        config = EngineConfig(namespace=NAMESPACE, tiers=(direct,), bounce_bytes=2 * MIB)
        other = await stack.enter_async_context(open_engine(config))
        await other.store(b"key", data)
        far.wire.ok()
        await until(lambda: not engine.busy())
        assert await asyncio.to_thread(far.stored, b"key") == data
        assert await other.load(b"key", bytearray(SIZE))


async def test_a_store_that_waits_for_another_ends_at_its_deadline(far: Far) -> None:
    """They are of one block in two sizes."""
    async with far.engine() as engine:
        far.wire.hold(method="HEAD")
        storing = asyncio.ensure_future(engine.store(b"key", content(b"key", SIZE), timeout_s=1e6))
        await asyncio.to_thread(far.wire.wait_held, 1)
        late = asyncio.ensure_future(engine.store(b"key", bytes(PAGE)))
        await turns()
        skip_time(100)
        with pytest.raises(TransferTimeout):
            await late
        assert engine.statistics().in_flight == 1
        far.wire.ok()
        assert await storing


async def test_stored_and_deleted_at_once(far: Far) -> None:
    """Whichever came first: what is stored afterwards is there."""
    data = content(b"key", SIZE)
    async with far.engine() as engine:
        for method in ("HEAD", "PUT", "DELETE"):
            far.wire.hold(method=method)
            storing = asyncio.ensure_future(engine.store(b"key", data))
            await turns()
            deleting = asyncio.ensure_future(engine.delete(b"key"))
            await asyncio.to_thread(far.wire.wait_held, 1)
            far.wire.ok()
            await asyncio.gather(storing, deleting)
            await engine.store(b"key", data)
            assert await asyncio.to_thread(far.stored, b"key") == data
            await engine.delete(b"key")


async def test_a_load_that_is_late_says_nothing_of_what_is_there_now(far: Far) -> None:
    """A block of another size has replaced what it found, and can be replaced again."""
    async with far.engine() as engine:
        assert await engine.store(b"key", bytes(SIZE))
        far.wire.hold(method="GET")
        loading = asyncio.ensure_future(engine.load(b"key", bytearray(SIZE)))
        await asyncio.to_thread(far.wire.wait_held, 1)
        assert await engine.store(b"key", bytes(PAGE))
        far.wire.ok()
        assert await loading
        assert await engine.store(b"key", content(b"key", SIZE))
        assert await asyncio.to_thread(far.stored, b"key") == content(b"key", SIZE)


async def test_a_store_that_failed_may_have_come_all_the_same(far: Far) -> None:
    """What was seen there before is not believed any more: a block of that size is stored again."""
    async with far.engine() as engine:
        assert await engine.store(b"key", bytes(SIZE))
        far.wire.reset(method="PUT")
        with pytest.raises(TransferError):
            await engine.store(b"key", bytes(PAGE))
        far.wire.ok()
        assert await asyncio.to_thread(far.stored, b"key") == bytes(PAGE)
        assert await engine.store(b"key", content(b"key", SIZE))
        assert await asyncio.to_thread(far.stored, b"key") == content(b"key", SIZE)


async def test_an_answer_that_is_late_says_nothing_of_what_was_put_away(far: Far) -> None:
    """Stored again, a block is written, though somebody has just heard that it is there."""
    whole = image(NAMESPACE, b"key", 0, content(b"key", SIZE))
    async with far.engine() as engine:
        await asyncio.to_thread(far.server.put, far.bucket, name_of(b"key"), bytes(len(whole)))
        far.wire.hold(method="HEAD", times=1)
        asking = asyncio.ensure_future(engine.prefix([b"key"]))
        await asyncio.to_thread(far.wire.wait_held, 1)
        with pytest.raises(BlockCorrupt):
            await engine.load(b"key", bytearray(SIZE))
        far.wire.ok()
        assert await asking == 1
        assert await engine.store(b"key", content(b"key", SIZE))
        assert await asyncio.to_thread(far.stored, b"key") == content(b"key", SIZE)


@pytest.mark.parametrize("nbytes", [0, 10, PAGE, SIZE, MIB])
async def test_garbage_is_put_away_and_costs_nobody_else(far: Far, nbytes: int) -> None:
    """However long, and though the server refuses to read from an empty object."""
    async with far.engine() as engine:
        await asyncio.to_thread(far.server.put, far.bucket, name_of(b"bad"), b"x" * nbytes)
        await engine.store(b"good", content(b"good", SIZE))
        with pytest.raises(BlockCorrupt):
            await engine.load(b"bad", bytearray(SIZE))
        assert not await engine.load(b"bad", bytearray(SIZE))
        assert await engine.load(b"good", bytearray(SIZE))
        assert engine.statistics().tiers[0].quarantined == 1


async def test_the_block_of_another_key_is_put_away(far: Far) -> None:
    """Sound as it is: no load would ever have it, and no store replace it."""
    other = image(NAMESPACE, b"other", 0, content(b"other", SIZE))
    async with far.engine() as engine:
        await asyncio.to_thread(far.server.put, far.bucket, name_of(b"key"), other)
        with pytest.raises(BlockCorrupt, match="another block"):
            await engine.load(b"key", bytearray(SIZE))
        assert not await engine.load(b"key", bytearray(SIZE))
        assert await engine.store(b"key", content(b"key", SIZE))
        assert await asyncio.to_thread(far.stored, b"key") == content(b"key", SIZE)


async def doubting(far: Far, engine: Watched, *keys: bytes) -> asyncio.Future[list[bool]]:
    """Loads that take blocks for damaged, their memory being of another size, held as they look."""
    for key in keys:
        await asyncio.to_thread(buckets.put, far.server, far.bucket, key, bytes(SIZE))
    far.wire.hold(method="HEAD")
    loading = asyncio.gather(*(engine.load(key, bytearray(PAGE)) for key in keys))
    await asyncio.to_thread(far.wire.wait_held, len(keys))
    return loading


async def test_what_another_has_just_stored_is_not_put_away(far: Far) -> None:
    """A block of another size, between two looks at what was taken for damaged."""
    async with far.engine() as engine:
        loading = await doubting(far, engine, b"key")
        await asyncio.to_thread(buckets.put, far.server, far.bucket, b"key", bytes(PAGE))
        far.wire.ok()
        with pytest.raises(TransferError, match="changed it meanwhile"):
            await loading
        assert await engine.load(b"key", bytearray(PAGE))


async def test_what_is_deleted_while_it_is_taken_for_damaged_is_a_miss(far: Far) -> None:
    """Memory of another size makes it look so. That several are gone is no fault of the server."""
    keys = [b"%d" % n for n in range(4)]
    async with far.engine() as engine:
        loading = await doubting(far, engine, *keys)
        for key in keys:
            await asyncio.to_thread(far.server.delete, far.bucket, name_of(key))
        far.wire.ok()
        assert await loading == [False] * 4
        tier = engine.statistics().tiers[0]
        assert (tier.quarantined, tier.out) == (0, "")


async def test_a_prefix_that_nobody_waits_for_is_looked_for_no_further(far: Far) -> None:
    """Each look is a request that is paid for: no more follow than are under way."""
    keys = [b"%d" % n for n in range(9)]
    async with far.engine() as engine:
        await engine.store_many([(key, content(key, SIZE)) for key in keys])
    async with far.engine() as engine:
        far.wire.hold(method="HEAD")
        asking = asyncio.ensure_future(engine.prefix(keys))
        await asyncio.to_thread(far.wire.wait_held, 1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        looks = far.wire.requests["HEAD"]
        far.wire.ok()
        await engine.aclose()  # which waits for all that is asked
        assert far.wire.requests["HEAD"] == looks


async def test_closing_waits_for_no_queue_of_questions(far: Far) -> None:
    """There are more than threads to ask them: those that wait are not asked any more."""
    async with far.engine() as engine:
        far.wire.black_hole()
        asked = [asyncio.ensure_future(engine.prefix([b"%d" % n])) for n in range(600)]
        await turns()
        await engine.aclose()
        assert await asyncio.gather(*asked) == [0] * 600


# --- the breaker --------------------------------------------------------------------------------


async def test_a_dead_server_is_left_alone_and_comes_back(
    far: Far, caplog: pytest.LogCaptureFixture
) -> None:
    """After some failures operations end at once, without a request; one trial ends that."""
    async with far.engine() as engine:
        await engine.store(b"key", content(b"key", SIZE))
        far.wire.refuse()
        while not engine.statistics().tiers[0].out:
            with pytest.raises(TransferError):
                await engine.load(b"key", bytearray(SIZE))
        connections = far.wire.connections
        (load,) = await engine.load_many([(b"key", bytearray(SIZE))])
        (store,) = await engine.store_many([(b"new", bytes(SIZE))])
        for outcome in (load, store):
            assert isinstance(outcome.error, TransferError)
            assert outcome.error.errno == errno.EHOSTDOWN
            assert "left alone" in str(outcome.error)
            assert "Host is down" not in str(outcome.error)  # nobody knows: it is left alone
        why = engine.statistics().tiers[0].out  # holds for the next request as well
        assert not re.search(r"\.kv|retries| in \d|of block", why), why
        with pytest.raises(TransferError, match="left alone"):
            await engine.delete(b"key")
        assert await engine.prefix([b"other"]) == 0
        assert far.wire.connections == connections
        far.wire.ok()
        async with asyncio.timeout(10):
            await until(lambda: engine.statistics().tiers[0].out == "")
        assert await engine.load(b"key", bytearray(SIZE))
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert ["left alone" in line for line in said] == [True, False]
    assert "answers again" in said[-1]


async def test_late_loads_speak_for_the_server(far: Far) -> None:
    """What arrives after its caller's deadline has arrived."""
    far.tier = far.tier.model_copy(update={"request_timeout_s": 5.0})
    async with far.engine() as engine:
        keys = [b"%d" % n for n in range(5)]
        for key in keys:
            await engine.store(key, content(key, SIZE))
        far.wire.delay(0.2)
        for key in keys:
            with pytest.raises(TransferTimeout):
                await engine.load(key, bytearray(SIZE), timeout_s=0.05)
        await until(lambda: not engine.busy())
        assert engine.statistics().tiers[0].out == ""


async def test_failures_are_in_a_row_only_without_answers_in_between(far: Far) -> None:
    async with far.engine() as engine:
        for n in range(6):
            far.wire.answer(s3_error(403, "AccessDenied"), method="PUT")
            with pytest.raises(TransferError):
                await engine.store(b"%d" % n, content(b"key", SIZE))
            far.wire.ok()
            assert not await engine.load(b"nowhere", bytearray(SIZE))
        for n in range(2):
            assert await engine.prefix([b"nowhere %d" % n]) == 0
        assert engine.statistics().tiers[0].out == ""


async def test_what_was_asked_before_a_trial_says_nothing_after_it(
    far: Far, caplog: pytest.LogCaptureFixture
) -> None:
    """Questions that hung come to their end one after the other, while the server is well."""
    far.tier = far.tier.model_copy(update={"request_timeout_s": 2.0})
    async with far.engine() as engine:
        far.wire.black_hole()
        asked = []
        for n in range(10):
            asked.append(asyncio.ensure_future(engine.prefix([b"%d" % n])))
            await asyncio.wait(asked[-1:], timeout=0.1)
        await until(lambda: engine.statistics().tiers[0].out != "")
        far.wire.ok()
        await asyncio.gather(*asked)
        await until(lambda: engine.statistics().tiers[0].out == "")
        for _ in range(20):
            await asyncio.wait([asyncio.ensure_future(engine.prefix([b"more"]))])
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert ["left alone" in line for line in said] == [True, False]


async def test_a_namespace_that_can_not_be_described_keeps_nobody_out(far: Far) -> None:
    def deny() -> None:
        far.wire.answer(s3_error(403, "AccessDenied"), method="PUT", target="*namespace.json*")

    deny()
    async with far.engine() as engine:
        (plan,) = engine.plan
        assert "namespace.json could not be written" in plan.evidence[0]
        assert await engine.store(b"key", content(b"key", SIZE))
        far.wire.refuse()
        while not engine.statistics().tiers[0].out:
            with pytest.raises(TransferError):
                await engine.load(b"key", bytearray(SIZE))
        deny()
        await until(lambda: engine.statistics().tiers[0].out == "")
    names = await asyncio.to_thread(far.server.names, far.bucket)
    assert [name.rpartition("/")[2] for name in names] == [name_of(b"key").rpartition("/")[2]]


async def test_a_hanging_server_is_left_alone(far: Far) -> None:
    """One request without an answer is enough."""
    async with far.engine() as engine:
        await engine.store(b"key", content(b"key", SIZE))
        far.wire.drip(20)
        loading = asyncio.ensure_future(engine.load(b"key", bytearray(SIZE), timeout_s=8.0))
        async with asyncio.timeout(7):
            await until(lambda: engine.statistics().tiers[0].out != "")
        (outcome,) = await engine.load_many([(b"other", bytearray(SIZE))])
        assert isinstance(outcome.error, TransferError)
        far.wire.ok()
        far.wire.drop()
        await asyncio.gather(loading, return_exceptions=True)


# --- opening ------------------------------------------------------------------------------------


async def _open(tier: ObjectTier) -> Engine:
    config = EngineConfig(namespace=NAMESPACE, tiers=(tier,), bounce_bytes=MIB)
    async with open_engine(config) as engine:
        return engine


async def test_the_plan_says_what_it_rests_on(s3: JuiceServer) -> None:
    bucket = s3.make_bucket()
    for backend, name in (("auto", "OBJ"), ("nixl", "OBJ"), ("obstore", "obstore")):
        engine = await _open(settings(s3, bucket, backend=backend))
        (plan,) = engine.plan
        assert (plan.path, plan.backend, plan.direct_io) == ("bounce", name, None)
        assert plan.evidence == ("an object went there and back",)
        assert str(plan).startswith(f"objects:{bucket}/: host memory bounce via {name}\n")
    names = await asyncio.to_thread(s3.names, bucket)
    assert [name.rpartition("/")[2] for name in names] == ["namespace.json"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"secret_key": "not-the-secret"}, r"see to secret_key: .*403"),
        ({"access_key": "nobody"}, r"see to access_key and endpoint: .*403"),
        ({"bucket": "no-such-bucket"}, r"make the bucket, or see to .*NoSuchBucket"),
    ],
)
async def test_wrong_settings_are_told_before_anything_is_stored(
    s3: JuiceServer, backend: str, changes: dict[str, str], says: str
) -> None:
    tier = settings(s3, **{"bucket": s3.make_bucket(), "backend": backend, **changes})
    with pytest.raises(ConfigError, match=f"bucket=.*can't be used; {says}") as caught:
        await _open(tier)
    assert "not-the-secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_keys_that_may_not_write_are_told_when_it_opens(far: Far) -> None:
    far.wire.answer(s3_error(403, "AccessDenied"), method="PUT")
    with pytest.raises(ConfigError, match=r"see to the keys, and what those may do.*403"):
        async with far.engine():
            pass


async def test_opened_at_once(s3: JuiceServer) -> None:
    """Many in one process: what the SDK is told by the environment is as it was before."""
    before, bucket = dict(os.environ), s3.make_bucket()
    for _ in range(4):
        await asyncio.gather(*(_open(settings(s3, bucket, backend="nixl")) for _ in range(12)))
    assert dict(os.environ) == before


async def test_a_bounce_region_too_small_for_a_block(s3: JuiceServer) -> None:
    """Objects always bounce: to register memory, or to align it, would be no help."""
    tier = settings(s3, s3.make_bucket(), backend="obstore")
    config = EngineConfig(namespace=NAMESPACE, tiers=(tier,), bounce_bytes=2 * PAGE)
    async with open_engine(config) as engine:
        with pytest.raises(ConfigError, match=r"raise it$"):
            await engine.store(b"key", bytes(PAGE + 1))


@pytest.mark.parametrize("backend", BACKENDS)
async def test_nobody_there(s3: JuiceServer, backend: str) -> None:
    with Wire(s3.host, s3.port) as wire:
        wire.refuse()
        tier = settings(s3, s3.make_bucket(), endpoint=wire.endpoint, backend=backend, retries=0)
        with pytest.raises(PathUnavailable, match="start the server, or see to endpoint") as caught:
            await _open(tier)
        assert str(caught.value).count("Connection refused") == 1


@pytest.mark.parametrize("backend", BACKENDS)
async def test_tls_with_an_authority_of_our_own(s3: JuiceServer, backend: str) -> None:
    with Wire(s3.host, s3.port, tls=True) as wire:
        bucket = s3.make_bucket()
        tier = settings(s3, bucket, endpoint=wire.endpoint, backend=backend, retries=0)
        with pytest.raises(PathUnavailable, match="name the authority of the server's certificate"):
            await _open(tier)
        trusting = settings(
            s3, bucket, endpoint=wire.endpoint, backend=backend, ca_bundle=wire.ca_bundle
        )
        config = EngineConfig(namespace=NAMESPACE, tiers=(trusting,), bounce_bytes=2 * MIB)
        async with open_engine(config) as engine:
            assert await engine.store(b"key", content(b"key", SIZE))
            memory = bytearray(SIZE)
            assert await engine.load(b"key", memory)
            assert memory == content(b"key", SIZE)
        assert await asyncio.to_thread(s3.names, bucket)


@pytest.mark.parametrize("text", ["", "no certificate"])
async def test_an_authority_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ca.pem"
    if text:
        path.write_text(text)
    tier = ObjectTier(
        bucket="kvgds",
        endpoint="https://127.0.0.1:9",
        ca_bundle=path,
    )
    with pytest.raises(ConfigError, match="ca_bundle="):
        await _open(tier)
