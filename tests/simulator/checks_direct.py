"""GPU memory by GPUDirect Storage: right bytes, in the streams' order, and no other path ever."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import weakref
from typing import TYPE_CHECKING, Any, Literal

import pytest

from kvgds import BlockCorrupt, BusyError, ConfigError, TransferError, TransferTimeout, open_engine
from kvgds.memory.device import cuda
from simulator.checks_engine import (
    MIB,
    NAMESPACE,
    PAGE,
    Rows,
    config,
    filled,
    gpu,
    looked_at,
    simulator,
)
from support import spoil, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from kvgds import Engine, EngineConfig
    from simulator import Simulator, Vram

__all__ = ["gpu", "simulator"]  # fixtures

PINNING_FAILED, UNSUPPORTED_FILE = 5036, 5008


def direct(root: Path, layout: str = "slabs", verify: str = "full") -> EngineConfig:
    """An engine that insists on GPUDirect Storage."""
    return config(root, path="gds", tier={"verify": verify, "layout": layout})


@pytest.fixture(params=[("slabs", "full"), ("slabs", "stamp"), ("files", "full")])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> EngineConfig:
    return direct(tmp_path / "kv", *request.param)


class Part:
    """A piece of GPU memory."""

    def __init__(self, vram: Vram, start: int, nbytes: int) -> None:
        told = {"shape": (nbytes,), "data": (vram.address + start, False)}
        self.__cuda_array_interface__ = {**vram.__cuda_array_interface__, **told}


def moved(gpu: Simulator, before: dict[str, int]) -> dict[str, int]:
    """What cuFile has done since then."""
    names = ("bytes_read", "bytes_written", "bounced")
    return {name: gpu.counter(name) - before[name] for name in names}


async def test_payload_goes_by_cufile_and_comes_back(
    gpu: Simulator, settings: EngineConfig
) -> None:
    size = 6 * PAGE
    blocks = {b"%d" % i: filled(gpu, size, i, i % 2) for i in range(5)}
    async with open_engine(settings) as engine:
        plan = engine.plan[1]
        assert (plan.memory, plan.path, plan.refused) == ("gpu", "gds", ())
        assert any("nvidia-fs" in line for line in plan.evidence)
        before = gpu.counters()
        items = [(key, engine.register(vram)) for key, (vram, _) in blocks.items()]
        assert {o.status for o in await engine.store_many(items)} == {"stored"}
        assert moved(gpu, before) == {"bytes_read": 0, "bytes_written": 5 * size, "bounced": 0}
    async with open_engine(settings) as engine:
        before = gpu.counters()
        for key, (vram, data) in blocks.items():
            vram.write(bytes(size))
            assert await engine.load(key, engine.register(vram))
            assert vram.read() == data
            host = bytearray(size)  # the image is the same, wherever it came from
            assert await engine.load(key, host)
            assert host == data
        assert moved(gpu, before) == {"bytes_read": 5 * size, "bytes_written": 0, "bounced": 0}
        rows = engine.metrics.registry.get_sample_value
        labels = {"direction": "load", "tier": engine.plan[0].tier, "outcome": "hit"}
        assert rows("kvgds_operations_total", {**labels, "path": "gds"}) == 5


async def test_a_paged_cache_and_parts_that_are_no_pages(gpu: Simulator, tmp_path: Path) -> None:
    for step, path in ((2 * PAGE, "gds"), (6000, "bounce")):
        layers = [filled(gpu, 4 * step, (step, i)) for i in range(3)]
        async with open_engine(direct(tmp_path / path)) as engine:
            cache = engine.register_cache([Rows(vram, 4) for vram, _ in layers])
            before = gpu.counters()
            items = [(b"%d" % i, cache.block(i)) for i in range(4)]
            assert {o.status for o in await engine.store_many(items)} == {"stored"}
            for vram, _ in layers:
                vram.write(bytes(4 * step))
            assert all(o.hit for o in await engine.load_many(items))
            assert [vram.read() for vram, _ in layers] == [data for _, data in layers]
            whole = 12 * step if path == "gds" else 0
            assert moved(gpu, before) == {
                "bytes_read": whole,
                "bytes_written": whole,
                "bounced": 0,
            }


async def test_cufile_is_told_of_memory_once(gpu: Simulator, tmp_path: Path) -> None:
    """Registered twice and let go once, it would move by cuFile's own copies."""
    vram, _ = filled(gpu, 4 * PAGE, "twice")
    part = Part(vram, PAGE, PAGE)
    async with open_engine(direct(tmp_path / "kv")) as engine:
        region = engine.register(vram)
        assert engine.register(vram) is region
        with pytest.raises(ConfigError, match="registered already"):
            engine.register(part)
        await engine.deregister(region)
        assert await engine.store(b"k", engine.register(part))
        before = gpu.counter("bounced")
        assert await engine.load(b"k", engine.register(part))
        assert gpu.counter("bounced") == before


# --- streams --------------------------------------------------------------------------------------


def later(gpu: Simulator, to: Vram, source: Vram, stream: int) -> None:
    """Queue a copy between pieces of GPU memory."""
    ends = ctypes.c_void_p(to.address), ctypes.c_void_p(source.address)
    size, kind = ctypes.c_size_t(source.nbytes), 3
    gpu.call("cudaMemcpyAsync", *ends, size, kind, ctypes.c_void_p(stream))


@contextlib.asynccontextmanager
async def storing_behind(
    gpu: Simulator, root: Path, path: str, stream: int
) -> AsyncIterator[tuple[Engine, int]]:
    """A store, and what its stream writes before it, go on behind what is done meanwhile.

    The engine, and the bytes that cuFile had written before.
    """
    vram, _ = filled(gpu, 2 * PAGE, "old")
    source, new = filled(gpu, 2 * PAGE, "new")
    async with open_engine(config(root, path=path, tier={"verify": "stamp"})) as engine:
        region, before = engine.register(vram), gpu.counter("bytes_written")
        gpu.hold(stream)
        later(gpu, vram, source, stream)
        storing = asyncio.create_task(engine.store(b"k", region, stream=stream))
        yield engine, before
        assert not storing.done()
        gpu.release(stream)
        assert await storing
        back = bytearray(2 * PAGE)
        assert await engine.load(b"k", back)
        assert back == new


@pytest.mark.parametrize("path", ["gds", "bounce"])
async def test_a_store_waits_for_its_stream(gpu: Simulator, tmp_path: Path, path: str) -> None:
    others = [filled(gpu, 2 * PAGE, i)[0] for i in range(3)]
    async with storing_behind(gpu, tmp_path / "kv", path, gpu.stream()) as (engine, before):
        for i, other in enumerate(others):  # which another stream has written
            assert await engine.store(b"%d" % i, engine.register(other), stream=None)
        payload = 6 * PAGE if path == "gds" else 0
        assert gpu.counter("bytes_written") - before == payload


class OwnStream:
    """A stream that is destroyed with the object, as CuPy's are."""

    def __init__(self, gpu: Simulator) -> None:
        self.ptr = gpu.stream()
        weakref.finalize(self, gpu.call, "cudaStreamDestroy", ctypes.c_void_p(self.ptr))


@pytest.mark.parametrize("path", ["gds", "bounce"])
async def test_a_stream_lives_as_long_as_it_is_needed(
    gpu: Simulator, tmp_path: Path, path: str
) -> None:
    """To ask one that was destroyed is undefined."""
    settings = config(tmp_path / "kv", path=path, tier={"verify": "stamp"})
    vram, data = filled(gpu, 2 * PAGE, "lives")
    async with open_engine(settings) as engine:
        region = engine.register(vram)
        assert await engine.store_nowait(b"k", region, stream=OwnStream(gpu))
        vram.write(bytes(2 * PAGE))
        assert await engine.load_nowait(b"k", region, stream=OwnStream(gpu))
        assert vram.read() == data


PER_THREAD = 2  # cudaStreamPerThread, CuPy's Stream.ptds


@pytest.mark.parametrize("path", ["gds", "bounce"])
async def test_a_store_waits_for_the_default_stream_of_its_callers_thread(
    gpu: Simulator, tmp_path: Path, path: str
) -> None:
    """Whose handle names another stream in every thread, in those of the engine, too."""
    async with storing_behind(gpu, tmp_path / "kv", path, PER_THREAD) as (engine, _):
        for i in range(5):
            assert await engine.store(b"%d" % i, bytes(PAGE))


@pytest.mark.parametrize("path", ["gds", "bounce"])
async def test_a_load_overwrites_nothing_that_a_stream_reads(
    gpu: Simulator, tmp_path: Path, path: str
) -> None:
    settings = config(tmp_path / "kv", path=path, tier={"verify": "stamp"})
    vram, stored = filled(gpu, 2 * PAGE, "stored")
    copy, _ = filled(gpu, 2 * PAGE, "copy")
    stream = gpu.stream()
    async with open_engine(settings) as engine:
        region = engine.register(vram)
        await engine.store(b"k", region)
        vram.write(bytes(2 * PAGE))
        gpu.hold(stream)
        later(gpu, copy, vram, stream)
        loading = asyncio.create_task(engine.load(b"k", region, stream=stream))
        assert await engine.store(b"other", bytes(PAGE))
        assert not loading.done()
        gpu.release(stream)
        assert await loading
        assert (copy.read(), vram.read()) == (bytes(2 * PAGE), stored)


async def test_a_stream_that_is_busy_holds_up_no_other_load(gpu: Simulator, tmp_path: Path) -> None:
    """Not of the same block either, nor what else the engine does in threads."""
    settings = config(tmp_path / "kv", path="bounce", tier={"verify": "stamp"})
    source, data = filled(gpu, 2 * PAGE, "shared")
    one, two = (filled(gpu, 2 * PAGE, i)[0] for i in range(2))
    stream = gpu.stream()
    async with open_engine(settings) as engine:
        await engine.store(b"k", engine.register(source))
        gpu.hold(stream)
        later(gpu, two, source, stream)
        loads = [engine.load(b"k", engine.register(one))]
        loads += [engine.load(b"k", engine.register(two), stream=stream, timeout_s=0.5)]
        hit, late = await asyncio.gather(*loads, return_exceptions=True)
        assert hit is True
        assert isinstance(late, TransferTimeout)
        gpu.release(stream)
        assert late.settled is None  # nothing had been begun
        await until(lambda: not engine.statistics().quarantined_bytes)
        assert (one.read(), two.read()) == (data, data)


@pytest.mark.parametrize("start", [0, PAGE])
async def test_two_engines_never_share_what_cufile_knows_once(
    gpu: Simulator, tmp_path: Path, start: int
) -> None:
    """Nor parts of it: whose registration a transfer then goes by is cuFile's to choose."""
    vram, _ = filled(gpu, 2 * PAGE, "both")
    async with open_engine(direct(tmp_path / "a")) as a, open_engine(direct(tmp_path / "b")) as b:
        mine, other = a.register(vram), b.register(Part(vram, start, PAGE))
        assert await a.store(b"k", mine)
        with pytest.raises(TransferError, match="another engine"):
            await b.store(b"k", other)
        await a.deregister(mine)
        before = gpu.counter("bounced")
        assert await b.store(b"k", other)
        assert gpu.counter("bounced") == before


async def test_lanes_tell_cufile_of_each_file_once(gpu: Simulator, tmp_path: Path) -> None:
    settings = config(tmp_path / "kv", path="gds", transport_threads=3)
    vram, data = filled(gpu, 64 * PAGE, "lanes")
    async with open_engine(settings) as engine:
        region = engine.register(vram)
        items = [(b"%d" % i, region[i * PAGE : (i + 1) * PAGE]) for i in range(64)]
        assert {o.status for o in await engine.store_many(items)} == {"stored"}
        vram.write(bytes(64 * PAGE))
        host = [(b"%d" % i, bytearray(PAGE)) for i in range(64)]
        assert all(o.hit for o in await engine.load_many([*items, *host]))
        assert vram.read() == b"".join(memory for _, memory in host) == data


# --- failures -------------------------------------------------------------------------------------


async def absent(engine: Engine, key: bytes, nbytes: int) -> None:
    """Nothing is stored under a key, and no slot is lost: another block takes it."""
    assert await engine.prefix([key]) == 0
    assert await engine.load(key, bytearray(nbytes)) is False


async def test_memory_that_cufile_refuses_is_an_error(
    gpu: Simulator, settings: EngineConfig
) -> None:
    """NIXL would go on through cuFile's own copies: a path that nobody chose."""
    vram, _ = filled(gpu, 2 * PAGE, "refused")
    sound, data = filled(gpu, 2 * PAGE, "sound")
    async with open_engine(settings) as engine:
        known = engine.register(sound)
        assert await engine.store(b"sound", known)
        region, before = engine.register(vram), gpu.counters()
        gpu.buffer_register(PINNING_FAILED)
        for act in (engine.store(b"k", region), engine.load(b"sound", region)):
            with pytest.raises(TransferError, match="5036"):
                await act
        sound.write(bytes(2 * PAGE))
        assert await engine.load(b"sound", known)
        assert sound.read() == data
        gpu.buffer_register()
        assert moved(gpu, before)["bounced"] == 0
        await absent(engine, b"k", 2 * PAGE)
        assert await engine.store(b"k", region)


@pytest.mark.parametrize("most", [16 * MIB, 39 * MIB])
async def test_memory_that_cufile_takes_in_pieces_only(
    gpu: Simulator, tmp_path: Path, most: int
) -> None:
    """Blocks may lie across the cuts, beside memory that is whole; all goes directly."""
    size = 40 * MIB
    big, data = filled(gpu, size, "big")
    small, little = filled(gpu, 8 * PAGE, "small")
    async with open_engine(direct(tmp_path / "kv", verify="stamp")) as engine:
        gpu.buffer(most)
        before, region, whole = gpu.counters(), engine.register(big), engine.register(small)
        cut = -big.address % (16 * MIB) or 16 * MIB  # within it, wherever it begins
        places = [slice(0, PAGE), slice(size - PAGE, size), slice(cut - PAGE, cut)]
        places += [slice(cut, cut + PAGE), slice(cut - PAGE, cut + PAGE), slice(PAGE, size - PAGE)]
        items = [(b"%d" % i, region[place]) for i, place in enumerate(places)]
        items.append((b"small", whole[:]))
        assert {o.status for o in await engine.store_many(items)} == {"stored"}
        for place, (key, view) in zip(places, items, strict=False):
            big.write(bytes(size))
            assert await engine.load(key, view)
            around = bytes(place.start), bytes(size - place.stop)
            assert big.read() == around[0] + data[place] + around[1]
        small.write(bytes(8 * PAGE))
        assert await engine.load(b"small", whole)
        assert small.read() == little
        assert gpu.counter("live_buffers") - before["live_buffers"] > 2
        assert moved(gpu, before)["bounced"] == 0
        await engine.deregister(region)
        await engine.deregister(whole)
        for name in ("live_buffers", "registered_bytes"):
            assert gpu.counter(name) == before[name]


@pytest.mark.parametrize(
    ("limit", "most"), [("buffer", 16 * MIB - PAGE), ("bar", 60 * MIB), ("bar", 36 * MIB)]
)
async def test_memory_that_cufile_takes_in_no_pieces_is_an_error(
    gpu: Simulator, tmp_path: Path, limit: str, most: int
) -> None:
    """Not even small ones; each layer whole, but not all of them; each piece, but not all."""
    layers = [filled(gpu, 40 * MIB, (most, i))[0] for i in range(2)]
    other, data = filled(gpu, MIB, "other")
    async with open_engine(direct(tmp_path / "kv")) as engine:
        cache, region = engine.register_cache([Rows(vram, 40) for vram in layers]), None
        gpu.bar(most) if limit == "bar" else gpu.buffer(most)
        before = gpu.counters()
        with pytest.raises(TransferError, match="5036"):
            await engine.store(b"k", cache.block(1))
        assert gpu.counter("live_buffers") == before["live_buffers"]
        region = engine.register(other)
        assert await engine.store(b"other", region)
        gpu.clear()
        assert await engine.store(b"k", cache.block(1))
        assert moved(gpu, before)["bounced"] == 0
        other.write(bytes(MIB))
        assert await engine.load(b"other", region)
        assert other.read() == data


async def test_kernels_that_can_not_be_made_are_made_later(gpu: Simulator, tmp_path: Path) -> None:
    """The GPU has no memory for a moment: that is no reason to fail for ever."""
    vram, data = filled(gpu, 2 * PAGE, "kernels")
    async with open_engine(direct(tmp_path / "kv")) as engine:
        region = engine.register(vram)
        gpu.refuse("cudaMalloc")
        with pytest.raises(TransferError, match="cudaErrorMemoryAllocation"):
            await engine.store(b"k", region)
        assert await engine.store(b"k", region)
        vram.write(bytes(2 * PAGE))
        assert await engine.load(b"k", region)
        assert vram.read() == data


async def test_a_file_that_cufile_refuses_is_an_error(gpu: Simulator, tmp_path: Path) -> None:
    """A file for each block, registered when it is first used: no slab that is known already."""
    vram, _ = filled(gpu, 2 * PAGE, "file")
    async with open_engine(direct(tmp_path / "kv", "files")) as engine:
        region = engine.register(vram)
        gpu.handle_register(UNSUPPORTED_FILE)
        with pytest.raises(TransferError):
            await engine.store(b"k", region)
        gpu.handle_register()
        await absent(engine, b"k", 2 * PAGE)
        assert await engine.store(b"k", region)


@pytest.mark.parametrize(
    ("what", "value"), [("error", errno.EIO), ("error", UNSUPPORTED_FILE), ("short", 100)]
)
@pytest.mark.parametrize("operation", ["read", "write"])
async def test_what_cufile_fails_at_is_an_error(
    gpu: Simulator, settings: EngineConfig, operation: Any, what: Any, value: int
) -> None:
    """Of that block alone: its neighbours, which travel with it, arrive."""
    blocks = [filled(gpu, 2 * PAGE, (operation, i)) for i in range(4)]
    async with open_engine(settings) as engine:
        regions = [engine.register(vram) for vram, _ in blocks]
        items = [(b"%d" % i, region) for i, region in enumerate(regions)]
        if operation == "read":
            assert all(o.ok for o in await engine.store_many(items))
            for vram, _ in blocks:
                vram.write(bytes(2 * PAGE))
        gpu.fault(operation, what, value, skip=1, count=1)
        act = engine.store_many if operation == "write" else engine.load_many
        failed = [o for o in await act(items) if not o.ok]
        gpu.clear()
        assert len(failed) <= 1  # none if it travelled with others: then each is tried alone
        assert all(isinstance(o.error, TransferError) for o in failed)
        assert all(o.ok for o in await act(items))
        gpu.fault(operation, what, value)
        other = b"other" if operation == "write" else b"0"
        if operation == "write":
            with pytest.raises(TransferError):
                await engine.store(other, regions[0])
            gpu.clear()
            await absent(engine, other, 2 * PAGE)
        else:
            with pytest.raises(TransferError):
                await engine.load(other, regions[0])
            gpu.clear()
        assert all(o.hit for o in await engine.load_many(items))
        assert [vram.read() for vram, _ in blocks] == [data for _, data in blocks]


async def test_a_stamp_of_another_block_is_corrupt(gpu: Simulator, tmp_path: Path) -> None:
    vram, data = filled(gpu, 2 * PAGE, "stamped")
    async with open_engine(direct(tmp_path / "kv")) as engine:
        region = engine.register(vram)
        for key in (b"k", b"sound"):
            await engine.store(key, region)
        await asyncio.to_thread(spoil, tmp_path / "kv", b"k", 9, NAMESPACE)
        outcomes = await engine.load_many([(b"k", region)])
        assert isinstance(outcomes[0].error, BlockCorrupt)
        assert await engine.load(b"sound", region)
        assert vram.read() == data


async def test_a_payload_that_is_not_its_checksum_is_corrupt(
    gpu: Simulator, tmp_path: Path
) -> None:
    """Of its neighbours, summed in the same launch, nothing is said."""
    blocks = [filled(gpu, 2 * PAGE, ("sum", i)) for i in range(6)]
    async with open_engine(direct(tmp_path / "kv")) as engine:
        items = [(b"%d" % i, engine.register(vram)) for i, (vram, _) in enumerate(blocks)]
        assert all(o.ok for o in await engine.store_many(items))
        await asyncio.to_thread(spoil, tmp_path / "kv", b"3", PAGE + 9, NAMESPACE)
        outcomes = await engine.load_many(items)
        assert [o.status for o in outcomes] == ["hit"] * 3 + ["error"] + ["hit"] * 2
        assert isinstance(outcomes[3].error, BlockCorrupt)
        assert [o.status for o in await engine.load_many(items)].count("miss") == 1


async def test_blocks_that_begin_together_are_summed_together(
    gpu: Simulator, tmp_path: Path
) -> None:
    """All have come to where they wait for the caller's stream; then that goes on."""
    vram, data = filled(gpu, 32 * PAGE, "together")
    stream = gpu.stream()
    async with open_engine(direct(tmp_path / "kv")) as engine:
        region = engine.register(vram)
        items = [(b"%d" % i, region[i * PAGE : (i + 1) * PAGE]) for i in range(32)]
        assert all(o.ok for o in await engine.store_many(items[:1]))  # the kernels are made
        before, events = gpu.counter("launches"), gpu.counter("live_events")
        gpu.hold(stream)
        storing = asyncio.ensure_future(engine.store_many(items[1:], stream=stream))
        await until(lambda: gpu.counter("live_events") == events + 31)
        gpu.release(stream)
        assert all(o.ok for o in await storing)
        assert gpu.counter("launches") - before <= 2 * 3  # kernels, for at most two turns
        vram.write(bytes(32 * PAGE))
        assert all(o.hit for o in await engine.load_many(items))
        assert vram.read() == data


@pytest.mark.parametrize("direction", ["store", "load"])
async def test_past_its_deadline(gpu: Simulator, settings: EngineConfig, direction: str) -> None:
    """Told at once; the memory is cuFile's until that has ended, and nothing half is there."""
    vram, data = filled(gpu, 2 * PAGE, "late")
    async with open_engine(settings) as engine:
        region = engine.register(vram)
        await engine.store(b"there", region)
        gpu.fault("write" if direction == "store" else "read", "hold")
        act, key = (engine.store, b"k") if direction == "store" else (engine.load, b"there")
        with pytest.raises(TransferTimeout) as caught:
            await act(key, region, timeout_s=0.2)
        settled = caught.value.settled
        assert settled is not None
        with pytest.raises(BusyError):
            await engine.load(b"there", region)
        gpu.clear()
        gpu.release_io()
        await settled
        await until(lambda: not engine.statistics().quarantined_bytes)
        await absent(engine, b"k", 2 * PAGE)
        assert await engine.load(b"there", region)
        assert vram.read() == data


async def test_past_its_deadline_while_a_kernel_reads_the_memory(
    gpu: Simulator, tmp_path: Path
) -> None:
    """For the checksum: the memory may not be freed before that has run."""
    vram, data = filled(gpu, 2 * PAGE, "summed")
    async with open_engine(direct(tmp_path / "kv")) as engine:
        region = engine.register(vram)
        assert await engine.store(b"there", region)
        ours = await asyncio.to_thread(cuda().stream, 0)
        gpu.hold(ours)
        with pytest.raises(TransferTimeout) as caught:
            await engine.store(b"k", region, timeout_s=0.2)
        settled = await looked_at(engine, caught.value)
        early = settled.done()
        gpu.release(ours)
        await settled
        assert not early
        await until(lambda: not engine.statistics().quarantined_bytes)
        assert await engine.prefix([b"k"]) == 0
        assert await engine.load(b"there", region)
        assert vram.read() == data


async def test_cancelled_it_is_waited_for(gpu: Simulator, settings: EngineConfig) -> None:
    vram, data = filled(gpu, 2 * PAGE, "cancelled")
    async with open_engine(settings) as engine:
        region = engine.register(vram)
        await engine.store(b"there", region)
        held = gpu.counter("held")
        gpu.fault("read", "hold")
        loading = asyncio.create_task(engine.load(b"there", region))
        await asyncio.to_thread(gpu.wait_counter, "held", held + 1)
        loading.cancel()
        assert await engine.store(b"other", bytes(PAGE))
        assert not loading.done()
        gpu.clear()
        gpu.release_io()
        with pytest.raises(asyncio.CancelledError):
            await loading
        assert await engine.load(b"there", region)
        assert vram.read() == data


@pytest.mark.parametrize("way", ["read", "write"])
async def test_a_gpu_that_hangs_keeps_no_other_memory(
    gpu: Simulator, settings: EngineConfig, way: Literal["read", "write"]
) -> None:
    """Though all of it was asked for in one turn of the loop."""
    vrams = [filled(gpu, 2 * PAGE, "hangs", device)[0] for device in range(2)]
    async with open_engine(settings) as engine:
        act = engine.load if way == "read" else engine.store
        memory: list[Any] = [*map(engine.register, vrams), bytearray(2 * PAGE)]
        for i, each in enumerate(memory):
            assert await engine.store(b"%d" % i, each)
        names = [b"%d" % i if way == "read" else b"new %d" % i for i in range(3)]
        gpu.fault(way, "hold", count=1)
        try:
            given = zip(names, memory, strict=True)
            tasks = [asyncio.create_task(act(*each)) for each in given]
            await until(lambda: sum(task.done() for task in tasks) == 2)
            assert tasks[2].done()  # the host's
        finally:
            gpu.release_io()
        assert await asyncio.gather(*tasks) == [True] * 3


async def test_memory_is_let_go_before_it_is_freed(gpu: Simulator, tmp_path: Path) -> None:
    names = ("freed_while_registered", "closed_while_registered", "deregistered_in_use")
    before = [gpu.counter(name) for name in names]
    vram, _ = filled(gpu, 2 * PAGE, "let go")
    async with open_engine(direct(tmp_path / "kv", "files")) as engine:
        region = engine.register(vram)
        await engine.store(b"k", region)
        await engine.deregister(region)
        vram.free()
    assert [gpu.counter(name) for name in names] == before


async def test_more_than_a_group_at_once(gpu: Simulator, tmp_path: Path) -> None:
    vram, data = filled(gpu, 32 * MIB, "many")
    async with open_engine(direct(tmp_path / "kv")) as engine:
        region = engine.register(vram)
        items = [(b"%d" % i, region[i * MIB : (i + 1) * MIB]) for i in range(32)]
        assert all(o.ok for o in await engine.store_many(items))
        vram.write(bytes(32 * MIB))
        assert all(o.hit for o in await engine.load_many(items))
        assert vram.read() == data
