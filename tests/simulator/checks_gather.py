"""Scattered blocks by GPUDirect Storage in one piece: gathered and scattered by the GPU itself.

The trial finds that worth it here because every operation of cuFile is made slow for it alone.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import TYPE_CHECKING, Any

import pytest

from kvgds import (
    BlockCorrupt,
    BusyError,
    Engine,
    TransferError,
    TransferTimeout,
    open_engine,
)
from kvgds.memory.device import cuda
from simulator.checks_direct import later
from simulator.checks_engine import NAMESPACE, PAGE, Rows, config, filled, gpu, looked_at, simulator
from support import spoil, until
from test_garbage import Uncollected

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvgds import EngineConfig
    from kvgds.memory import Cache
    from simulator import Simulator

__all__ = ["gpu", "simulator"]  # fixtures

LAYERS = 6
BLOCK = LAYERS * PAGE
SLOW = "delay:400"
KEPT = ("live_buffers", "registered_bytes", "freed_while_registered", "deregistered_in_use")


@pytest.fixture(autouse=True)
def _worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the trial, in its own process: this one has read its environment already."""
    monkeypatch.setenv("SIMCUDA_READ", SLOW)
    monkeypatch.setenv("SIMCUDA_WRITE", SLOW)


@pytest.fixture
def clean(gpu: Simulator) -> Iterator[Simulator]:
    """The machine, on which nothing is left registered."""
    before = gpu.counters()
    yield gpu
    assert {name: gpu.counter(name) for name in KEPT} == {name: before[name] for name in KEPT}


def gathering(root: Path, gather_bytes: int = 64 * PAGE, **tier: Any) -> EngineConfig:
    """An engine that insists on GPUDirect Storage."""
    return config(root, path="gds", gather_bytes=gather_bytes, tier=tier)


class Paged:
    """A paged cache of so many blocks, in fragments of a page, and what is in it."""

    def __init__(self, gpu: Simulator, name: object, blocks: int, device: int = 0) -> None:
        made = [filled(gpu, blocks * PAGE, (name, i), device) for i in range(LAYERS)]
        self.layers = [vram for vram, _ in made]
        self.data = [data for _, data in made]
        self.blocks = blocks

    def register(self, engine: Engine) -> Cache:
        return engine.register_cache([Rows(vram, self.blocks) for vram in self.layers])

    def block(self, i: int) -> bytes:
        return b"".join(data[i * PAGE : (i + 1) * PAGE] for data in self.data)

    def clear(self) -> None:
        for vram in self.layers:
            vram.write(bytes(vram.nbytes))

    def read(self) -> list[bytes]:
        return [vram.read() for vram in self.layers]


def operations(gpu: Simulator, before: dict[str, int]) -> dict[str, int]:
    """What cuFile has done since then."""
    names = ("reads", "writes", "bytes_read", "bytes_written", "bounced")
    return {name: gpu.counter(name) - before[name] for name in names}


@pytest.mark.parametrize(
    ("layout", "verify"), [("slabs", "full"), ("slabs", "stamp"), ("files", "full")]
)
async def test_a_scattered_block_is_one_operation(
    clean: Simulator, tmp_path: Path, layout: str, verify: str
) -> None:
    settings = gathering(tmp_path / "kv", layout=layout, verify=verify)
    caches = [Paged(clean, device, 4, device) for device in (0, 1)]
    items: list[Any] = []
    async with open_engine(settings) as engine:
        plan = engine.plan[1]
        assert (plan.path, plan.refused) == ("gds", ())
        assert any("are gathered on the GPU; 4 MiB to the file" in line for line in plan.evidence)
        for n, paged in enumerate(caches):
            cache = paged.register(engine)
            items += [(b"%d-%d" % (n, i), cache.block(i)) for i in range(4)]
        before = clean.counters()
        assert {o.status for o in await engine.store_many(items)} == {"stored"}
        for paged in caches:
            paged.clear()
        assert all(o.hit for o in await engine.load_many(items))
        assert [paged.read() for paged in caches] == [paged.data for paged in caches]
        assert operations(clean, before) == {
            "reads": 8,
            "writes": 8,
            "bytes_read": 8 * BLOCK,
            "bytes_written": 8 * BLOCK,
            "bounced": 0,
        }
        host = bytearray(BLOCK)  # the image is the same, wherever it came from
        assert await engine.load(b"1-2", host)
        assert host == caches[1].block(2)
    async with open_engine(settings.model_copy(update={"gather_bytes": 0})) as engine:
        before = clean.counters()
        caches[0].clear()
        cache = caches[0].register(engine)
        assert all([await engine.load(b"0-%d" % i, cache.block(i)) for i in range(4)])
        assert caches[0].read() == caches[0].data
        assert operations(clean, before)["reads"] == 4 * LAYERS


@pytest.mark.parametrize(
    ("gather_bytes", "into", "moves"),
    [(64 * PAGE, (1, 3, 0), (1, 1)), (0, (1, 2, 0), (3 * LAYERS, 2 * LAYERS))],
    ids=["gathered", "direct"],
)
async def test_several_blocks_as_one(
    clean: Simulator,
    tmp_path: Path,
    gather_bytes: int,
    into: tuple[int, ...],
    moves: tuple[int, int],
) -> None:
    """One operation if gathered; else one a fragment, and neighbours are one."""
    paged, out = Paged(clean, "several", 4), (0, 3, 1)
    parts = [[data[i * PAGE : (i + 1) * PAGE] for i in out] for data in paged.data]
    async with open_engine(gathering(tmp_path / "kv", gather_bytes)) as engine:
        cache, before = paged.register(engine), clean.counters()
        assert await engine.store(b"k", cache.block(*out))
        host = bytearray(3 * BLOCK)
        assert await engine.load(b"k", host)
        assert host == b"".join(map(b"".join, parts))
        paged.clear()
        assert await engine.load(b"k", cache.block(*into))
        done = operations(clean, before)
        assert (done["writes"], done["reads"]) == moves
        for layer, pages in zip(paged.read(), parts, strict=True):
            came = dict(zip(into, pages, strict=True))
            assert layer == b"".join(came.get(i, bytes(PAGE)) for i in range(4))


async def test_what_is_not_gathered(clean: Simulator, tmp_path: Path) -> None:
    """Longer fragments, a block in one piece, and one that has no room in the staging buffer."""
    large = [filled(clean, 256 * 1024, ("large", i)) for i in range(2)]
    paged, (flat, _) = Paged(clean, "paged", 1), filled(clean, BLOCK, "flat")
    async with open_engine(gathering(tmp_path / "kv", gather_bytes=BLOCK - PAGE)) as engine:
        wide = engine.register_cache([Rows(vram, 1) for vram, _ in large])
        before = clean.counters()
        blocks = [wide.block(0), engine.register(flat), paged.register(engine).block(0)]
        for i, block in enumerate(blocks):
            assert await engine.store(b"%d" % i, block)
        assert operations(clean, before)["writes"] == 2 + 1 + LAYERS


async def test_staging_memory_is_taken_when_needed_and_given_back(
    clean: Simulator, tmp_path: Path
) -> None:
    """On the GPU that the blocks lie in alone; small sums of checksums come and go beside it."""
    paged, much = Paged(clean, "taken", 1, device=1), 32 * BLOCK
    before = clean.counter("live_bytes")
    async with open_engine(gathering(tmp_path / "kv", gather_bytes=much)) as engine:
        flat = engine.register(paged.layers[0])
        assert await engine.store(b"flat", flat)
        assert clean.counter("live_bytes") - before < much
        await engine.deregister(flat)
        assert await engine.store(b"k", paged.register(engine).block(0))
        assert much <= clean.counter("live_bytes") - before < 2 * much
    assert clean.counter("live_bytes") - before < much


async def test_the_first_that_needs_staging_memory_is_a_load(
    clean: Simulator, tmp_path: Path
) -> None:
    """Which could begin in the very turn in which that is there, but not yet registered."""
    paged = Paged(clean, "first", 1)
    async with open_engine(gathering(tmp_path / "kv", verify="stamp")) as engine:
        assert await engine.store(b"k", paged.block(0))
        paged.clear()
        before = clean.counters()
        assert await engine.load(b"k", paged.register(engine).block(0))
        assert paged.read() == paged.data
        assert operations(clean, before)["bounced"] == 0


async def test_many_share_little_room(clean: Simulator, tmp_path: Path) -> None:
    """They wait for each other, loads and stores."""
    paged, other = Paged(clean, "many", 40), Paged(clean, "others", 40)
    async with open_engine(gathering(tmp_path / "kv", gather_bytes=2 * BLOCK + PAGE)) as engine:
        cache = paged.register(engine)
        items = [(b"%d" % i, cache.block(i)) for i in range(40)]
        assert {o.status for o in await engine.store_many(items)} == {"stored"}
        paged.clear()
        more = other.register(engine)
        fresh = [(b"new %d" % i, more.block(i)) for i in range(40)]
        loaded, stored = await asyncio.gather(engine.load_many(items), engine.store_many(fresh))
        assert all(o.hit for o in loaded)
        assert all(o.ok for o in stored)
        assert paged.read() == paged.data
        back = bytearray(BLOCK)
        assert await engine.load(b"new 39", back)
        assert back == other.block(39)


async def test_who_waits_for_room_too_long(clean: Simulator, tmp_path: Path) -> None:
    """Is told at once, and has the memory back; it keeps nobody behind it from its turn."""
    paged = Paged(clean, "late", 3)
    async with open_engine(gathering(tmp_path / "kv", gather_bytes=BLOCK)) as engine:
        cache, held = paged.register(engine), clean.counter("held")
        clean.fault("write", "hold")
        first = asyncio.create_task(engine.store(b"first", cache.block(0)))
        await asyncio.to_thread(clean.wait_counter, "held", held + 1)
        late = asyncio.create_task(engine.store(b"late", cache.block(1), timeout_s=0.2))
        last = asyncio.create_task(engine.store(b"last", cache.block(2)))
        with pytest.raises(TransferTimeout) as caught:
            await late
        assert caught.value.settled is None
        writing = asyncio.create_task(engine.load(b"none", cache.block(1)))  # not BusyError
        assert await writing is False
        clean.release_io()
        assert await first
        assert await last
        assert await engine.prefix([b"late"]) == 0
        paged.clear()
        assert await engine.load(b"last", cache.block(2))
        assert paged.layers[1].read(PAGE, 2 * PAGE) == paged.data[1][2 * PAGE :]


async def test_loads_come_before_stores_that_wait_for_room(
    clean: Simulator, tmp_path: Path
) -> None:
    paged = Paged(clean, "order", 4)
    async with open_engine(gathering(tmp_path / "kv", gather_bytes=BLOCK)) as engine:
        cache, held = paged.register(engine), clean.counter("held")
        assert await engine.store(b"there", cache.block(0))
        clean.fault("write", "hold", count=1)
        clean.fault("write", "delay", 200_000)  # so that an end tells of the beginning
        first = asyncio.create_task(engine.store(b"first", cache.block(0)))
        await asyncio.to_thread(clean.wait_counter, "held", held + 1)
        order: list[str] = []
        begun = clean.counter("events_recorded") + 2
        stores = [asyncio.create_task(engine.store(b"%d" % i, cache.block(i))) for i in (1, 2)]
        for task in stores:
            task.add_done_callback(lambda _: order.append("store"))
        await asyncio.to_thread(clean.wait_counter, "events_recorded", begun)
        assert await engine.store(b"host", bytes(PAGE))  # meanwhile they ask for room
        loading = asyncio.create_task(engine.load(b"there", cache.block(3)))
        loading.add_done_callback(lambda _: order.append("load"))
        assert await engine.load(b"there", bytearray(BLOCK))
        clean.release_io()
        assert all(await asyncio.gather(first, *stores, loading))
        assert order == ["load", "store", "store"]


@pytest.mark.parametrize("direction", ["store", "load"])
async def test_a_busy_stream_is_waited_for_and_takes_no_room(
    clean: Simulator, tmp_path: Path, direction: str
) -> None:
    """There is room for one block only; those of others pass by meanwhile."""
    paged, other = Paged(clean, "mine", 1), Paged(clean, "theirs", 2)
    source, new = filled(clean, PAGE, "new")
    stream = clean.stream()
    async with open_engine(gathering(tmp_path / "kv", gather_bytes=BLOCK)) as engine:
        mine, theirs = paged.register(engine).block(0), other.register(engine)
        assert await engine.store(b"there", mine)
        clean.hold(stream)
        if direction == "store":
            later(clean, paged.layers[0], source, stream)
            busy = asyncio.create_task(engine.store(b"k", mine, stream=stream))
        else:
            paged.clear()
            later(clean, source, paged.layers[0], stream)
            busy = asyncio.create_task(engine.load(b"there", mine, stream=stream))
        assert await engine.store(b"a", theirs.block(0))
        assert await engine.load(b"a", theirs.block(1))
        assert not busy.done()
        clean.release(stream)
        assert await busy
        if direction == "store":
            back = bytearray(BLOCK)
            assert await engine.load(b"k", back)
            assert back == new + paged.block(0)[PAGE:]
        else:
            assert source.read() == bytes(PAGE)
            assert paged.read() == paged.data


@pytest.mark.parametrize("direction", ["store", "load"])
async def test_past_its_deadline_while_a_kernel_uses_the_memory(
    clean: Simulator, tmp_path: Path, direction: str
) -> None:
    """And its room, which a kernel may be about to write to, is nobody else's."""
    paged, settings = Paged(clean, "late", 1), gathering(tmp_path / "kv", verify="stamp")
    async with open_engine(settings) as engine:
        block = paged.register(engine).block(0)
        assert await engine.store(b"there", block)
        ours = await asyncio.to_thread(cuda().stream, 0)
        clean.hold(ours)
        act, key = (engine.store, b"k") if direction == "store" else (engine.load, b"there")
        with pytest.raises(TransferTimeout) as caught:
            await act(key, block, timeout_s=0.2)
        settled = await looked_at(engine, caught.value)
        with pytest.raises(BusyError):
            await engine.load(b"there", block)
        early = settled.done()
        clean.release(ours)
        await settled
        assert not early
        await until(lambda: not engine.statistics().quarantined_bytes)
        assert await engine.prefix([b"k"]) == 0
        paged.clear()
        assert await engine.load(b"there", block)
        assert paged.read() == paged.data


async def test_past_its_deadline_while_its_checksum_is_made(
    clean: Simulator, tmp_path: Path
) -> None:
    """Of the copy in the staging buffer: the memory is free, and soon the room as well."""
    paged = Paged(clean, "summed", 1)
    async with open_engine(gathering(tmp_path / "kv", gather_bytes=BLOCK)) as engine:
        block = paged.register(engine).block(0)
        assert await engine.store(b"there", block)
        clean.copy_delay(0.8)  # two until it is gathered, then five
        with pytest.raises(TransferTimeout) as caught:
            await engine.store(b"k", block, timeout_s=3.6)
        assert caught.value.settled is None
        clean.copy_delay(0)
        assert await engine.store(b"other", block)
        assert await engine.prefix([b"k"]) == 0
        paged.clear()
        assert await engine.load(b"other", block)
        assert paged.read() == paged.data


@pytest.mark.parametrize("direction", ["store", "load"])
async def test_past_its_deadline_while_storage_works(
    clean: Simulator, tmp_path: Path, direction: str
) -> None:
    """The memory is free at once: storage uses the staging buffer, which is not."""
    paged = Paged(clean, "free", 1)
    async with open_engine(gathering(tmp_path / "kv", gather_bytes=2 * BLOCK)) as engine:
        block, held = paged.register(engine).block(0), clean.counter("held")
        assert await engine.store(b"there", block)
        clean.fault("write" if direction == "store" else "read", "hold")
        act, key = (engine.store, b"k") if direction == "store" else (engine.load, b"there")
        late = asyncio.create_task(act(key, block, timeout_s=0.3))
        await asyncio.to_thread(clean.wait_counter, "held", held + 1)
        with pytest.raises(TransferTimeout) as caught:
            await late
        assert caught.value.settled is None
        used = [b"\xee" * PAGE] * LAYERS
        for vram in paged.layers:
            vram.write(b"\xee" * PAGE)
        clean.release_io()
        await until(lambda: not engine.statistics().quarantined_bytes)
        assert paged.read() == used
        assert await engine.prefix([b"k"]) == 0
        assert await engine.load(b"there", block)
        assert paged.read() == paged.data


async def test_what_is_corrupt_never_reaches_the_block(clean: Simulator, tmp_path: Path) -> None:
    paged = Paged(clean, "corrupt", 2)
    async with open_engine(gathering(tmp_path / "kv", gather_bytes=BLOCK)) as engine:
        cache = paged.register(engine)
        items = [(b"%d" % i, cache.block(i)) for i in range(2)]
        assert all(o.ok for o in await engine.store_many(items))
        await asyncio.to_thread(spoil, tmp_path / "kv", b"0", PAGE + 9, NAMESPACE)
        paged.clear()
        outcomes = await engine.load_many(items)
        assert [o.status for o in outcomes] == ["error", "hit"]
        assert isinstance(outcomes[0].error, BlockCorrupt)
        assert paged.read() == [bytes(PAGE) + data[PAGE:] for data in paged.data]


@pytest.mark.parametrize("layout", ["slabs", "files"])
@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.parametrize(("what", "value"), [("error", errno.EIO), ("short", 100)])
async def test_what_fails_gives_its_room_back(  # noqa: PLR0917 - parameters and fixtures
    clean: Simulator, tmp_path: Path, layout: str, operation: Any, what: Any, value: int
) -> None:
    """There is room for one, and everybody who fails has held it."""
    paged = Paged(clean, "fails", 3)
    async with open_engine(gathering(tmp_path / "kv", BLOCK, layout=layout)) as engine:
        cache = paged.register(engine)
        items = [(b"%d" % i, cache.block(i)) for i in range(3)]
        if operation == "read":
            assert all(o.ok for o in await engine.store_many(items))
        clean.fault(operation, what, value)
        act = engine.store_many if operation == "write" else engine.load_many
        assert [type(o.error) for o in await act(items)] == [TransferError] * 3
        clean.clear()
        assert all(o.ok for o in await act(items))
        paged.clear()
        assert all(o.hit for o in await engine.load_many(items))
        assert paged.read() == paged.data


async def test_without_staging_memory_fragments_go_one_by_one(
    clean: Simulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The GPU has none left: it is told, and nothing else changes."""
    paged = Paged(clean, "poor", 4)
    caplog.set_level(logging.WARNING, "kvgds")
    async with open_engine(gathering(tmp_path / "kv", gather_bytes=4 << 30)) as engine:
        before, cache = clean.counters(), paged.register(engine)
        items = [(b"%d" % i, cache.block(i)) for i in range(4)]
        assert {o.status for o in await engine.store_many(items)} == {"stored"}
        paged.clear()
        assert all(o.hit for o in await engine.load_many(items))
        assert paged.read() == paged.data
        assert operations(clean, before)["writes"] == 4 * LAYERS
    how = "scattered blocks go a fragment at a time"
    assert [record.getMessage() for record in caplog.records] == [
        f"GPU 0 gathers nothing, {how}: cudaMalloc: out of memory (2)"
    ]


async def test_staging_memory_that_cufile_refuses_is_an_error(
    clean: Simulator, tmp_path: Path
) -> None:
    paged, pinning_failed = Paged(clean, "refused", 1), 5036
    async with open_engine(gathering(tmp_path / "kv")) as engine:
        block = paged.register(engine).block(0)
        clean.buffer_register(pinning_failed)
        with pytest.raises(TransferError, match="5036"):
            await engine.store(b"k", block)
        clean.buffer_register()
        assert await engine.store(b"k", block)


async def test_layers_that_were_freed_are_an_error_of_their_block(
    clean: Simulator, tmp_path: Path
) -> None:
    """As far as a GPU that has met an illegal address lets anybody go on: it doesn't."""
    paged = Paged(clean, "freed", 1)
    async with open_engine(gathering(tmp_path / "kv", gather_bytes=BLOCK)) as engine:
        block = paged.register(engine).block(0)
        assert await engine.store(b"there", block)
        paged.layers[3].free()
        with pytest.raises(TransferError, match="700"):
            await engine.store(b"k", block)
        clean.clear()  # a new process, in truth
        sound = Paged(clean, "sound", 1)
        assert await engine.load(b"there", sound.register(engine).block(0))
        assert sound.read() == paged.data


@pytest.mark.parametrize("way", ["gathered", "direct", "bounce"])
async def test_a_graph_that_others_capture_is_left_alone(
    clean: Simulator, tmp_path: Path, way: str
) -> None:
    """From the first block, for which everything is made, to the end, when it goes."""
    settings = gathering(tmp_path / "kv", 0 if way == "direct" else 64 * PAGE)
    if way == "bounce":
        settings = config(tmp_path / "kv", path="bounce")
    paged, broken = Paged(clean, way, 2), clean.counter("broken_captures")
    async with open_engine(settings) as engine:
        cache = paged.register(engine)
        clean.capture()
        assert await engine.store(b"k", cache.block(0))
        assert await engine.load(b"k", cache.block(1))
        await engine.deregister(cache)
    clean.clear()
    assert clean.counter("broken_captures") == broken
    assert [vram.read() for vram in paged.layers] == [2 * data[:PAGE] for data in paged.data]


@pytest.mark.parametrize("way", ["gathered", "direct", "bounce"])
async def test_blocks_of_a_gpu_leave_nothing(clean: Simulator, tmp_path: Path, way: str) -> None:
    """See tests/test_garbage.py."""
    settings = gathering(tmp_path / "kv", 0 if way == "direct" else 64 * PAGE)
    if way == "bounce":
        settings = config(tmp_path / "kv", path="bounce")
    paged = Paged(clean, way, 4)
    async with open_engine(settings) as engine:
        cache = paged.register(engine)
        items = [(b"%d" % i, cache.block(i)) for i in range(4)]
        for _ in range(2):  # kernels and staging memory are made once
            with Uncollected() as found:
                assert {each.status for each in await engine.store_many(items)} == {"stored"}
                assert all(each.hit for each in await engine.load_many(items))
                for key, _ in items:
                    assert await engine.delete(key)
                await until(lambda: not engine.statistics().in_flight)
        await engine.deregister(cache)
    assert not found


async def test_a_gpu_that_never_ends_keeps_no_engine_open(
    clean: Simulator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing moves any more, but to free memory CUDA waits for all streams, the callers' too."""
    paged, stream = Paged(clean, "busy", 1), clean.stream()
    settings = config(tmp_path / "kv", path="gds", gather_bytes=64 * PAGE, drain_timeout_s=0.5)
    engine, freed = Engine(settings), clean.counter("live_bytes")
    await engine.open()
    assert await engine.store(b"k", paged.register(engine).block(0))
    clean.hold(stream)
    computing = cuda().reached(0, stream)
    try:
        async with asyncio.timeout(10):
            await engine.aclose()
        assert "a GPU has not ended what it was given" in caplog.text
        async with open_engine(config(tmp_path / "kv")) as other:  # the directory is free
            host = bytearray(BLOCK)
            assert await other.load(b"k", host)
            assert host == paged.block(0)
        assert not computing.done
    finally:
        clean.release(stream)
    await until(lambda: clean.counter("live_bytes") == freed)
