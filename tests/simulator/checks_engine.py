"""The engine with GPU memory: right bytes by way of the bounce region, in the GPU's own order."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import TYPE_CHECKING, Any

import pytest
from blockbuster import blockbuster_ctx

from kvgds import (
    BlockCorrupt,
    BusyError,
    ConfigError,
    EngineConfig,
    FileTier,
    Namespace,
    PathUnavailable,
    TransferError,
    TransferTimeout,
    open_engine,
)
from kvgds.engine import Engine, running
from kvgds.memory.device import cuda
from kvgds.testing import HeldTransport
from kvgds.transport import NixlTransport
from simulator import Simulator, Vram
from support import spoil, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE, MIB = 4096, 1 << 20
SIZES = (1, 511, PAGE, 3 * PAGE + 5, 300_000)
NAMESPACE = Namespace(model="m", revision="r")


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    """The machine."""
    return Simulator()


@pytest.fixture
def gpu(simulator: Simulator) -> Iterator[Simulator]:
    """The machine, healthy before and after; nothing was freed or unpinned in use."""
    simulator.clear()
    simulator.strict_pinned(strict=True)
    before = simulator.counters()
    yield simulator
    simulator.clear()
    for name in ("freed_in_use", "unpinned_in_use"):
        assert simulator.counter(name) == before[name]


@pytest.fixture(autouse=True)
def _never_blocked() -> Iterator[None]:
    with blockbuster_ctx():
        yield


def config(root: Path, **changes: Any) -> EngineConfig:
    """A small engine."""
    tier = FileTier(root=root, capacity_bytes=64 * MIB, **changes.pop("tier", {}))
    settings: dict[str, Any] = {"bounce_bytes": 16 * MIB, "path": "bounce", "gather_bytes": 0}
    return EngineConfig(namespace=NAMESPACE, tiers=(tier,), **settings | changes)


def filled(gpu: Simulator, nbytes: int, name: object, device: int = 0) -> tuple[Vram, bytes]:
    """GPU memory, and the bytes that are in it."""
    data = random.Random(repr(name)).randbytes(nbytes)
    vram = gpu.allocate(nbytes, device)
    vram.write(data)
    return vram, data


class Rows:
    """GPU memory as a matrix: what a tensor of a paged cache looks like."""

    def __init__(self, vram: Vram, rows: int) -> None:
        self._told = {**vram.__cuda_array_interface__, "shape": (rows, vram.nbytes // rows)}

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self._told


async def looked_at(engine: Engine, late: TransferTimeout) -> asyncio.Future[None]:
    """What ends when the memory is free, once the reactor has looked at it a few times more."""
    assert late.settled is not None
    settled: asyncio.Future[None] = asyncio.ensure_future(late.settled)
    for i in range(5):  # as often at least the reactor has looked
        assert await engine.store(b"%d" % i, bytes(PAGE))
    return settled


@pytest.mark.parametrize("verify", ["full", "stamp"])
@pytest.mark.parametrize("layout", ["slabs", "files"])
async def test_bytes_come_back(gpu: Simulator, tmp_path: Path, layout: str, verify: str) -> None:
    settings = config(tmp_path / "kv", tier={"layout": layout, "verify": verify})
    blocks = {b"%d" % size: filled(gpu, size, size) for size in SIZES}
    async with open_engine(settings) as engine:
        assert [(plan.memory, plan.path) for plan in engine.plan][1:] == [("gpu", "bounce")]
        for key, (vram, _) in blocks.items():
            assert await engine.store(key, engine.register(vram))
    async with open_engine(settings) as engine:
        for key, (vram, data) in blocks.items():
            vram.write(bytes(vram.nbytes))
            assert await engine.load(key, engine.register(vram))
            assert vram.read() == data
            host = bytearray(len(data))  # the image is the same, wherever it came from
            assert await engine.load(key, host)
            assert host == data


async def test_two_devices_and_parts_of_memory(gpu: Simulator, tmp_path: Path) -> None:
    async with open_engine(config(tmp_path / "kv")) as engine:
        memory = [filled(gpu, 10 * PAGE, device, device) for device in (0, 1)]
        regions = [engine.register(vram) for vram, _ in memory]
        parts = [slice(i * PAGE + i, (i + 2) * PAGE + 7) for i in range(6)]
        keys = list(itertools.product((0, 1), range(len(parts))))
        items = [(repr(key).encode(), regions[key[0]][parts[key[1]]]) for key in keys]
        assert {o.status for o in await engine.store_many(items)} == {"stored"}
        for vram, _ in memory:
            vram.write(bytes(10 * PAGE))
        for (device, i), (key, view) in zip(keys, items, strict=True):
            assert await engine.load(key, view)
            part = parts[i]
            read = memory[device][0].read(part.stop - part.start, part.start)
            assert read == memory[device][1][part]


async def test_a_paged_cache(gpu: Simulator, tmp_path: Path) -> None:
    layers = [filled(gpu, 8 * 6000, i) for i in range(5)]
    async with open_engine(config(tmp_path / "kv")) as engine:
        cache = engine.register_cache([Rows(vram, 8) for vram, _ in layers])
        items = [(b"%d" % i, cache.block(i)) for i in range(8)]
        assert {o.status for o in await engine.store_many(items)} == {"stored"}
        for vram, _ in layers:
            vram.write(bytes(8 * 6000))
        back = [(b"%d" % i, cache.block(7 - i)) for i in range(8)]
        assert all(o.hit for o in await engine.load_many(back))
        for vram, data in layers:
            rows = [data[i * 6000 : (i + 1) * 6000] for i in range(8)]
            assert vram.read() == b"".join(reversed(rows))


async def test_a_scattered_block_is_copied_by_one_call(gpu: Simulator, tmp_path: Path) -> None:
    layers = [filled(gpu, 2 * 6000, ("scattered", i)) for i in range(64)]
    async with open_engine(config(tmp_path / "kv")) as engine:
        cache, before = engine.register_cache([Rows(vram, 2) for vram, _ in layers]), gpu.counters()
        assert await engine.store(b"k", cache.block(1))
        assert await engine.load(b"k", cache.block(0))
        calls = {
            name: gpu.counter(name) - before[name] for name in ("copy_batches", "async_copies")
        }
        assert calls == {"copy_batches": 2, "async_copies": 0}
        for vram, data in layers:
            assert vram.read() == 2 * data[6000:]


async def test_a_layer_that_was_freed_is_an_error_of_that_block(
    gpu: Simulator, tmp_path: Path
) -> None:
    """What was copied before it has ended when that is told; its neighbours arrive."""
    layers = [filled(gpu, 2 * PAGE, ("layer", i)) for i in range(8)]
    sound, data = filled(gpu, PAGE, "sound")
    async with open_engine(config(tmp_path / "kv")) as engine:
        cache = engine.register_cache([Rows(vram, 2) for vram, _ in layers])
        region = engine.register(sound)
        layers[3][0].free()
        gpu.copy_delay(0.005)
        with pytest.raises(TransferError):
            await engine.store(b"a", cache.block(0))
        assert not gpu.counter("pending")
        items = [(b"a", cache.block(0)), (b"b", region)]
        assert [o.ok for o in await engine.store_many(items)] == [False, True]
        sound.write(bytes(PAGE))
        assert await engine.load(b"b", region)
        assert sound.read() == data


async def test_many_who_want_one_block(gpu: Simulator, tmp_path: Path) -> None:
    """On GPUs each loads for itself: none of them waits for another's stream."""
    source, data = filled(gpu, 3 * PAGE, "one")
    async with open_engine(config(tmp_path / "kv")) as engine:
        await engine.store(b"k", engine.register(source))
        targets = [gpu.allocate(3 * PAGE, device) for device in (0, 1, 0)]
        host = bytearray(3 * PAGE)
        views = [engine.register(vram) for vram in targets]
        hits = await asyncio.gather(*(engine.load(b"k", view) for view in (*views, host)))
        assert all(hits)
        assert [vram.read() for vram in targets] == [data] * 3
        assert host == data


async def test_a_store_waits_for_what_the_gpu_is_doing(gpu: Simulator, tmp_path: Path) -> None:
    """The default stream has not come to the block yet: what is stored is what it will write."""
    vram, _ = filled(gpu, 2 * PAGE, "before")
    after = random.Random("after").randbytes(2 * PAGE)
    async with open_engine(config(tmp_path / "kv")) as engine:
        region = engine.register(vram)
        gpu.hold(0)
        writing = asyncio.create_task(asyncio.to_thread(vram.write, after))
        await asyncio.to_thread(gpu.wait_counter, "waiting", 1)
        storing = asyncio.create_task(engine.store(b"k", region))
        await asyncio.to_thread(gpu.wait_counter, "pending", 2)  # what it waits for, behind it
        gpu.release(0)
        await writing
        assert await storing
        back = bytearray(2 * PAGE)
        assert await engine.load(b"k", back)
        assert back == after


@pytest.mark.parametrize("direction", ["store", "load"])
async def test_a_copy_past_its_deadline(gpu: Simulator, tmp_path: Path, direction: str) -> None:
    """Told at once; the memory is the GPU's until it says so, and nothing half is there."""
    vram, data = filled(gpu, 2 * PAGE, "late")
    async with open_engine(config(tmp_path / "kv")) as engine:
        region = engine.register(vram)
        await engine.store(b"there", region)
        gpu.hold(await asyncio.to_thread(cuda().stream, 0))
        act, key = (engine.store, b"k") if direction == "store" else (engine.load, b"there")
        with pytest.raises(TransferTimeout) as caught:
            await act(key, region, timeout_s=0.05)
        settled = caught.value.settled
        assert settled is not None
        with pytest.raises(BusyError):
            await engine.load(b"there", region)
        gpu.release()
        await settled
        await until(lambda: not engine.statistics().quarantined_bytes)
        assert await engine.prefix([b"k"]) == 0
        assert await engine.load(b"there", region)
        assert vram.read() == data


async def test_a_copy_past_its_deadline_keeps_its_lease(gpu: Simulator, tmp_path: Path) -> None:
    """Until the GPU has come to it: else it would copy into a block that another loads there."""
    vram, _ = filled(gpu, 2 * PAGE, "late")
    data, back = random.Random("there").randbytes(2 * PAGE), bytearray(2 * PAGE)
    held = HeldTransport(NixlTransport())
    async with running(Engine(config(tmp_path / "kv", tier={"verify": "stamp"}), held)) as engine:
        assert await engine.store(b"there", data)
        ours = await asyncio.to_thread(cuda().stream, 0)
        gpu.hold(ours)
        with pytest.raises(TransferTimeout) as caught:
            await engine.store(b"k", engine.register(vram), timeout_s=0.1)
        settled = await looked_at(engine, caught.value)
        held.hold("landing", lambda transfer: not transfer.write)
        loading = asyncio.create_task(engine.load(b"there", back))
        await held.wait_held("landing")  # it has been read into its lease
        early = settled.done()
        gpu.release(ours)
        await until(lambda: not gpu.counter("pending"))
        held.release()
        assert await loading
        await settled
        assert back == data
        assert not early
        assert await engine.prefix([b"k"]) == 0


@pytest.mark.parametrize("path", ["bounce", "gds"])
@pytest.mark.parametrize("direction", ["store", "load"])
async def test_past_its_deadline_while_its_stream_is_busy(
    gpu: Simulator, tmp_path: Path, direction: str, path: str
) -> None:
    """Nothing has been begun: the memory is free at once, and no lease waits for that stream."""
    vram, data = filled(gpu, 2 * PAGE, "busy")
    stream = gpu.stream()
    async with open_engine(config(tmp_path / "kv", path=path)) as engine:
        region = engine.register(vram)
        assert await engine.store(b"there", region)
        gpu.hold(stream)
        act, key = (engine.store, b"k") if direction == "store" else (engine.load, b"there")
        with pytest.raises(TransferTimeout) as caught:
            await act(key, region, stream=stream, timeout_s=0.1)
        assert caught.value.settled is None
        await until(lambda: not engine.statistics().quarantined_bytes)
        vram.write(bytes(2 * PAGE))
        assert await engine.load(b"there", region)
        assert vram.read() == data
        assert await engine.prefix([b"k"]) == 0


@pytest.mark.parametrize("what", ["deadline", "event", "record", "copy"])
@pytest.mark.parametrize("path", ["bounce", "gds"])
async def test_who_gives_up_leaves_no_event(
    gpu: Simulator, tmp_path: Path, what: str, path: str
) -> None:
    """A stream may be busy for long, and calls of CUDA fail; a driver's events are not for ever."""
    vram, data = filled(gpu, 2 * PAGE, what)
    stream = gpu.stream()
    settings = config(tmp_path / "kv", path=path, tier={"verify": "stamp"})
    async with open_engine(settings) as engine:
        region = engine.register(vram)
        assert await engine.store(b"there", region)
        before = gpu.counter("live_events")
        failing = {"event": "EventCreateWithFlags", "record": "EventRecord", "copy": "MemcpyAsync"}
        for act, key in ((engine.store, b"k"), (engine.load, b"there")):
            if what == "deadline":
                gpu.hold(stream)
                with pytest.raises(TransferTimeout):
                    await act(key, region, stream=stream, timeout_s=0.05)
            elif what != "copy" or path == "bounce":
                gpu.refuse(f"cuda{failing[what]}")
                with pytest.raises(TransferError):
                    await act(key, region)
        gpu.clear()
        await until(lambda: not engine.statistics().in_flight)
        await until(lambda: gpu.counter("live_events") == before)
        vram.write(bytes(2 * PAGE))
        assert await engine.load(b"there", region)
        assert vram.read() == data


async def test_a_call_refused_while_the_gpu_hangs_keeps_no_other_memory(
    gpu: Simulator, tmp_path: Path
) -> None:
    """What had begun before it is waited for, but not by the thread that moves all."""
    vram, data = filled(gpu, 2 * PAGE, "refused")
    async with open_engine(config(tmp_path / "kv")) as engine:
        region = engine.register(vram)
        gpu.hold(await asyncio.to_thread(cuda().stream, 0))
        started = asyncio.create_task(engine.store(b"started", region[:PAGE]))
        await asyncio.to_thread(gpu.wait_counter, "pending", 1)
        gpu.refuse("cudaMemcpyAsync")
        refused = asyncio.create_task(engine.store(b"refused", region[PAGE:]))
        for i in range(3):
            assert await engine.store(b"host %d" % i, bytes(PAGE))
        gpu.release()
        with pytest.raises(TransferError):
            await refused
        assert await started
        back = bytearray(PAGE)
        assert await engine.load(b"started", back)
        assert back == data[:PAGE]


async def test_corrupt_bytes_never_reach_the_gpu(gpu: Simulator, tmp_path: Path) -> None:
    vram, data = filled(gpu, 2 * PAGE, "good")
    async with open_engine(config(tmp_path / "kv")) as engine:
        region = engine.register(vram)
        await engine.store(b"k", region)
        await asyncio.to_thread(spoil, tmp_path / "kv", b"k", PAGE + 9, NAMESPACE)
        with pytest.raises(BlockCorrupt):
            await engine.load(b"k", region)
        assert vram.read() == data


async def test_memory_that_can_not_be_looked_up_is_refused(gpu: Simulator, tmp_path: Path) -> None:
    """The GPU has failed: one error of ours, whoever brings the memory."""
    vram, _ = filled(gpu, PAGE, "unknown")
    async with open_engine(config(tmp_path / "kv")) as engine:
        gpu.refuse("cudaPointerGetAttributes", count=3)
        with pytest.raises(PathUnavailable, match="cudaPointerGetAttributes"):
            engine.register(vram)
        with pytest.raises(PathUnavailable, match="cudaPointerGetAttributes"):
            engine.register_cache([vram])
        with pytest.raises(PathUnavailable, match="cudaPointerGetAttributes"):
            await engine.store(b"k", vram)
        assert await engine.store(b"k", engine.register(vram))


async def test_freed_memory_is_an_error_of_that_block(gpu: Simulator, tmp_path: Path) -> None:
    vram, _ = filled(gpu, PAGE, "freed")
    other, data = filled(gpu, PAGE, "other")
    async with open_engine(config(tmp_path / "kv")) as engine:
        view, sound = engine.register(vram), engine.register(other)
        vram.free()
        outcomes = await engine.store_many([(b"a", view), (b"b", sound)])
        assert isinstance(outcomes[0].error, TransferError)
        assert outcomes[1].ok
        other.write(bytes(PAGE))
        assert await engine.load(b"b", sound)
        assert other.read() == data


async def test_a_cache_lies_on_one_device(gpu: Simulator, tmp_path: Path) -> None:
    one, _ = filled(gpu, PAGE, 0, 0)
    two, _ = filled(gpu, PAGE, 1, 1)
    async with open_engine(config(tmp_path / "kv")) as engine:
        with pytest.raises(ConfigError, match="one device"):
            engine.register_cache([Rows(one, 2), Rows(two, 2)])
