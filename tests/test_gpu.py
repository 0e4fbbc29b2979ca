"""GPU memory on a real GPU: `pytest -m gpu`, by every path that can be had there.

Each test is written over a kind of memory (`memories.py`). Run on the host's, which it does
everywhere, it proves itself; `simulator/checks_gpu.py` runs the same on the simulated GPU.
"""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvgds import BlockCorrupt, BusyError, PathUnavailable, TransferTimeout, open_engine
from memories import CupyGpu, Host, Kind, TorchGpu, settings
from support import MIB, NAMESPACE, PAGE, content, spoil, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvgds import Engine, Event

ALIGNED = (PAGE, 3 * PAGE, MIB, 9 * MIB // 4)
ODD = (1, 511, PAGE + 1, 300_001, MIB - 8)
NBYTES = 8 * PAGE

# A trial in a child process, the plugin, kernels compiled for the first time: not in 60 s for sure.
SLOW = (pytest.mark.gpu, pytest.mark.timeout(240))
KINDS: dict[str, Callable[[], Kind]] = {
    "host": Host,
    "bounce": lambda: TorchGpu("bounce"),
    "gds": lambda: TorchGpu("gds"),
}


@pytest.fixture(params=[pytest.param(name, marks=SLOW if name != "host" else ()) for name in KINDS])
def kind(request: pytest.FixtureRequest) -> Kind:
    """Memory of torch, and the path that it takes."""
    return KINDS[request.param]()


@pytest.fixture(params=[pytest.param(path, marks=SLOW) for path in ("bounce", "gds")])
def cupys(request: pytest.FixtureRequest) -> Kind:
    """Memory of CuPy, and the path that it takes."""
    return CupyGpu(request.param)


class Paths:
    """Which path each block took."""

    def __init__(self, engine: Engine) -> None:
        self.taken: dict[tuple[str, bytes], str] = {}
        engine.observe(self)

    def settled(self, event: Event) -> None:
        self.taken[event.direction, event.key] = event.path


def planned(engine: Engine, kind: Kind) -> str:
    """The path that the engine has for this kind of memory."""
    (path,) = {plan.path for plan in engine.plan if plan.memory == kind.memory}
    return path


def filled(kind: Kind, name: object, nbytes: int = NBYTES, device: int = 0) -> tuple[Any, bytes]:
    """Memory, and what is in it."""
    data = content(name, nbytes)
    return kind.make(data, device), data


# --- bytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["full", "stamp"])
@pytest.mark.parametrize("layout", ["slabs", "files"])
async def test_bytes_come_back(kind: Kind, tmp_path: Path, layout: str, verify: str) -> None:
    """Of every size, by the path that the plan says, into the same memory and into the host's."""
    tier: dict[str, Any] = {"layout": layout, "verify": verify}
    blocks = {b"%d" % n: filled(kind, n, n) for n in (*ALIGNED, *ODD)}
    async with kind.opened(tmp_path / "kv", **tier) as engine:
        paths, way = Paths(engine), planned(engine, kind)
        for key, (memory, _) in blocks.items():
            assert await engine.store(key, engine.register(memory))
            straight = len(blocks[key][1]) in ALIGNED
            assert paths.taken["store", key] == (way if straight else "bounce")
    async with kind.opened(tmp_path / "kv", **tier) as engine:
        paths = Paths(engine)
        for key, (memory, data) in blocks.items():
            kind.write(memory, bytes(len(data)))
            assert await engine.load(key, engine.register(memory))
            assert kind.read(memory) == data
            assert paths.taken["load", key] == (way if len(data) in ALIGNED else "bounce")
            host = bytearray(len(data))
            assert await engine.load(key, host)
            assert host == data


@pytest.mark.parametrize("verify", ["full", "stamp"])
async def test_blocks_of_the_host_are_loaded(kind: Kind, tmp_path: Path, verify: str) -> None:
    async with kind.opened(tmp_path / "kv", verify=verify) as engine:
        for nbytes in (*ALIGNED, *ODD):
            key, data = b"%d" % nbytes, content(("host", nbytes), nbytes)
            assert await engine.store(key, data)
            memory = kind.make(bytes(nbytes))
            assert await engine.load(key, engine.register(memory))
            assert kind.read(memory) == data
            borrowed = kind.make(bytes(nbytes))
            assert await engine.load(key, borrowed)
            assert kind.read(borrowed) == data


async def test_parts_of_a_region(kind: Kind, tmp_path: Path) -> None:
    """What lies around a part that is loaded into stays as it was."""
    async with kind.opened(tmp_path / "kv", verify="stamp") as engine:
        memory = kind.make(bytes(4 * PAGE))
        region = engine.register(memory)
        for start, stop in ((0, PAGE), (PAGE, 3 * PAGE), (7, 9), (PAGE - 1, 2 * PAGE + 1)):
            data, key = content((start, stop), stop - start), b"%d-%d" % (start, stop)
            assert await engine.store(key, data)
            kind.write(memory, b"\xee" * (4 * PAGE))
            assert await engine.load(key, region[start:stop])
            around = b"\xee" * start, b"\xee" * (4 * PAGE - stop)
            assert kind.read(memory) == around[0] + data + around[1]


async def test_neighbours_within_one_page_of_the_gpu(kind: Kind, tmp_path: Path) -> None:
    """Two registrations that a GPU, whose pages are 64 KiB, can only pin together."""
    memory, data = filled(kind, "whole", 4 * PAGE)
    halves = [kind.part(memory, start, start + 2 * PAGE) for start in (0, 2 * PAGE)]
    async with kind.opened(tmp_path / "kv", verify="stamp") as engine:
        regions = [engine.register(half) for half in halves]
        items = list(zip((b"a", b"b"), regions, strict=True))
        assert [o.status for o in await engine.store_many(items)] == ["stored"] * 2
        await engine.deregister(regions[0])
        kind.write(memory, bytes(4 * PAGE))
        back = [(b"a", engine.register(halves[0])), items[1]]
        assert [o.status for o in await engine.load_many(back)] == ["hit"] * 2
        assert kind.read(memory) == data


async def test_many_blocks_at_once(kind: Kind, tmp_path: Path) -> None:
    """More than one group, more than the bounce region."""
    memory, data = filled(kind, "many", 40 * MIB)
    async with kind.opened(tmp_path / "kv", verify="stamp") as engine:
        region = engine.register(memory)
        items = [(b"%d" % i, region[i * MIB : (i + 1) * MIB]) for i in range(40)]
        assert {o.status for o in await engine.store_many(items)} == {"stored"}
        kind.write(memory, bytes(40 * MIB))
        assert {o.status for o in await engine.load_many(items)} == {"hit"}
        assert kind.read(memory) == data


async def test_blocks_of_every_gpu(kind: Kind, tmp_path: Path) -> None:
    """Of two where there are two; each block then goes to the other one."""
    devices = range(kind.devices)
    blocks = [filled(kind, (device, i), device=device) for i in range(4) for device in devices]
    async with kind.opened(tmp_path / "kv", verify="stamp") as engine:
        regions = [engine.register(memory) for memory, _ in blocks]
        keys = [b"%d" % i for i in range(len(blocks))]
        stored = await engine.store_many(zip(keys, regions, strict=True))
        assert {o.status for o in stored} == {"stored"}
        turned = [*regions[1:], regions[0]]
        assert {o.status for o in await engine.load_many(zip(keys, turned, strict=True))} == {"hit"}
        moved = [kind.read(memory) for memory, _ in blocks]
        assert [*moved[1:], moved[0]] == [data for _, data in blocks]


async def test_many_who_want_one_block(kind: Kind, tmp_path: Path) -> None:
    """On a host one I/O, then copies; on GPUs each for itself: no stream waits for another."""
    source, data = filled(kind, "one")
    async with kind.opened(tmp_path / "kv", verify="stamp") as engine:
        assert await engine.store(b"k", engine.register(source))
        targets = [kind.make(bytes(NBYTES), i % kind.devices) for i in range(3)]
        host = bytearray(NBYTES)
        views = [*map(engine.register, targets), host]
        assert all(await asyncio.gather(*(engine.load(b"k", view) for view in views)))
        assert [kind.read(memory) for memory in targets] == [data] * 3
        assert host == data


# --- paged caches ---------------------------------------------------------------------------

PAGES = (16, 2, 64)  # tokens, heads, and two bytes for each of so many: one page
SHREDS = (16, 3, 20)
CACHES = {
    "K and V in one": ((2, 6, *PAGES), 1, 2),
    "K and V apart": ((6, *PAGES), 0, 4),
    "block first": ((6, 2, *PAGES), 0, 2),
    "block last but one": ((2, 4, 6, 2048), -2, 1),
    "many layers": ((6, *PAGES), 0, 64),
    "many layers, no pages": ((6, *SHREDS), 0, 64),
    "K and V in one, no pages": ((2, 6, *SHREDS), 1, 2),
    "K and V apart, no pages": ((6, *SHREDS), 0, 4),
}


async def test_the_plan_says_what_becomes_of_scattered_blocks(kind: Kind, tmp_path: Path) -> None:
    async with kind.opened(tmp_path / "kv", verify="stamp") as engine:
        plans = [plan for plan in engine.plan if plan.memory == kind.memory]
        rules = ("are gathered on the GPU", "scattered blocks go a fragment at a time")
        said = [line for plan in plans for line in plan.evidence if any(r in line for r in rules)]
        assert len(said) == planned(engine, kind).startswith("gds")


@pytest.mark.parametrize("verify", ["full", "stamp"])
async def test_paged_caches(kind: Kind, tmp_path: Path, verify: str) -> None:
    """Blocks come back in other places, and are what numpy finds there."""
    async with kind.opened(tmp_path / "kv", verify=verify) as engine:
        small_pieces_bounce = kind.memory == "host"
        await turn_all(engine, kind, "bounce" if small_pieces_bounce else planned(engine, kind))


@pytest.mark.parametrize("verify", ["full", "stamp"])
async def test_paged_caches_of_the_host_a_piece_at_a_time(tmp_path: Path, verify: str) -> None:
    kind = Host(gather_bytes=0)
    async with kind.opened(tmp_path / "kv", verify=verify) as engine:
        await turn_all(engine, kind, "direct")


async def turn_all(engine: Engine, kind: Kind, path: str) -> None:
    """Turn each of the caches round; blocks of whole pages are to take this path."""
    for case, (shape, axis, count) in CACHES.items():
        way = "bounce" if case.endswith("no pages") else path
        nbytes = 2 * math.prod(shape)
        arrays = [
            np.frombuffer(content((case, i), nbytes), np.uint16).reshape(shape)
            for i in range(count)
        ]
        await turn_round(engine, kind, arrays, axis, way)


async def turn_round(
    engine: Engine, kind: Kind, arrays: list[np.ndarray[Any, Any]], axis: int, way: str
) -> None:
    """Store the blocks of a cache with this in it, and load them in the opposite order."""
    tensors = [kind.make(array.tobytes(), shape=array.shape) for array in arrays]
    paths, cache = Paths(engine), engine.register_cache(tensors, axis)
    last = cache.blocks - 1
    keys = [content((arrays[0].sum(), i), 16) for i in range(cache.blocks)]
    items = [(key, cache.block(i)) for i, key in enumerate(keys)]
    assert {o.status for o in await engine.store_many(items)} == {"stored"}
    for tensor in tensors:
        kind.write(tensor, bytes(arrays[0].nbytes))
    back = [(key, cache.block(last - i)) for i, key in enumerate(keys)]
    assert {o.status for o in await engine.load_many(back)} == {"hit"}
    assert set(paths.taken.values()) == {way}
    expected = [np.flip(array, axis).tobytes() for array in arrays]
    assert [kind.read(tensor) for tensor in tensors] == expected
    flat = bytearray(cache.block_bytes)  # a block is its parts of all tensors, in order
    assert await engine.load(keys[2], flat)
    assert flat == b"".join(array.take(2, axis).tobytes() for array in arrays)


# --- streams --------------------------------------------------------------------------------


async def warm(engine: Engine, *regions: Any) -> None:
    """Store and load once, so that what is done but once does not hold anything up later."""
    for i, region in enumerate(regions):
        assert await engine.store(b"warm-%d" % i, region)
        assert await engine.load(b"warm-%d" % i, region)


@pytest.mark.parametrize("verify", ["full", "stamp"])
async def test_a_store_waits_for_its_stream(kind: Kind, tmp_path: Path, verify: str) -> None:
    """The stream has yet to write the block; blocks that other streams wrote don't wait for it."""
    block, _ = filled(kind, "old")
    source, new = filled(kind, "new")
    other, _ = filled(kind, "other")
    stream = kind.stream()
    async with kind.opened(tmp_path / "kv", verify=verify) as engine:
        region, beside = engine.register(block), engine.register(other)
        await warm(engine, region, beside)
        with kind.occupied(engine, b"k", stream):
            kind.copy(block, source, stream)
            storing = asyncio.create_task(engine.store(b"k", region, stream=stream))
            for i in range(3):
                assert await engine.store(b"%d" % i, beside)
            assert not storing.done()
        assert await storing
        back = bytearray(NBYTES)
        assert await engine.load(b"k", back)
        assert back == new


@pytest.mark.parametrize("verify", ["full", "stamp"])
async def test_a_load_waits_for_its_stream(kind: Kind, tmp_path: Path, verify: str) -> None:
    """The stream has yet to read what is overwritten."""
    block, stored = filled(kind, "stored")
    copy, _ = filled(kind, "copy")
    other, _ = filled(kind, "other")
    used, stream = content("used", NBYTES), kind.stream()
    async with kind.opened(tmp_path / "kv", verify=verify) as engine:
        region, beside = engine.register(block), engine.register(other)
        await warm(engine, region, beside)
        assert await engine.store(b"k", region)
        kind.write(block, used)
        with kind.occupied(engine, b"k", stream):
            kind.copy(copy, block, stream)
            loading = asyncio.create_task(engine.load(b"k", region, stream=stream))
            for i in range(3):
                assert await engine.store(b"%d" % i, beside)
            assert not loading.done()
        assert await loading
        assert kind.read(block) == stored
        assert kind.read(copy) == used


@pytest.mark.parametrize("direction", ["store", "load"])
async def test_a_deadline_while_the_gpu_is_busy(kind: Kind, tmp_path: Path, direction: str) -> None:
    """Told at once, and nothing half is there.

    What waits for a stream has begun nothing: its memory is free. What storage has is in use until
    it says so.
    """
    block, data = filled(kind, "late")
    stream = kind.stream()
    async with kind.opened(tmp_path / "kv", verify="stamp") as engine:
        region = engine.register(block)
        await warm(engine, region)
        assert await engine.store(b"there", region)
        act, key = (engine.store, b"k") if direction == "store" else (engine.load, b"there")
        with kind.occupied(engine, key, stream):
            with pytest.raises(TransferTimeout) as caught:
                await act(key, region, timeout_s=0.1, stream=stream)
            settled = caught.value.settled
            if kind.memory == "gpu":
                assert settled is None
                await until(lambda: not engine.statistics().quarantined_bytes)
            else:
                assert settled is not None
                with pytest.raises(BusyError):
                    await engine.load(b"there", region)
        if settled is not None:
            await settled
        await until(lambda: not engine.statistics().quarantined_bytes)
        assert await engine.prefix([b"k"]) == 0
        kind.write(block, bytes(NBYTES))
        assert await engine.load(b"there", region)
        assert kind.read(block) == data


# --- what is refused ------------------------------------------------------------------------


async def test_corrupt_bytes_are_never_a_hit(kind: Kind, tmp_path: Path) -> None:
    """A byte of the stamp or of the payload; its neighbour, which travels with it, arrives."""
    block, _ = filled(kind, "spoilt")
    sound, data = filled(kind, "sound")
    async with kind.opened(tmp_path / "kv", verify="full") as engine:
        paths, regions = Paths(engine), [engine.register(memory) for memory in (block, sound)]
        assert await engine.store(b"sound", regions[1])
        for at in (9, PAGE, PAGE + NBYTES // 2, PAGE + NBYTES - 1):
            assert await engine.store(b"k", regions[0])
            await asyncio.to_thread(spoil, tmp_path / "kv", b"k", at, NAMESPACE)
            kind.write(sound, bytes(NBYTES))
            items = list(zip((b"k", b"sound"), regions, strict=True))
            outcomes = await engine.load_many(items)
            assert [o.status for o in outcomes] == ["error", "hit"], at
            assert isinstance(outcomes[0].error, BlockCorrupt)
            assert kind.read(sound) == data
            assert await engine.load(b"k", regions[0]) is False
        assert set(paths.taken.values()) - {"none"} == {planned(engine, kind)}


async def refusal(root: Path) -> PathUnavailable | None:
    """Why GPUDirect Storage is refused, without leave for compatibility mode; None: it is real."""
    insisting = settings(root, verify="stamp").model_copy(update={"path": "gds"})
    try:
        async with open_engine(insisting) as engine:
            assert [plan.path for plan in engine.plan] == ["direct", "gds"]
    except PathUnavailable as error:
        return error
    return None


@pytest.mark.parametrize("devices", ["none needed", pytest.param("a gpu", marks=SLOW)])
@pytest.mark.timeout(240)
async def test_gds_is_real_or_refused_by_name(tmp_path: Path, devices: str) -> None:
    refused = await refusal(tmp_path / "kv")
    if refused is not None:
        assert "GPUDirect Storage can't be had here" in str(refused)
        assert refused.report
        assert all(line.startswith("gds: ") for line in refused.report)
    async with open_engine(settings(tmp_path / "kv", verify="stamp")) as engine:
        ways = [plan.path for plan in engine.plan if plan.memory == "gpu"]
        expected = ["bounce" if refused else "gds"]
        assert ways == (expected if ways or devices == "a gpu" else [])


# --- another library ------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["full", "stamp"])
async def test_cupys_memory(cupys: Kind, tmp_path: Path, verify: str) -> None:
    await test_bytes_come_back(cupys, tmp_path / "1", "slabs", verify)
    await test_paged_caches(cupys, tmp_path / "2", verify)


async def test_cupys_streams(cupys: Kind, tmp_path: Path) -> None:
    await test_a_store_waits_for_its_stream(cupys, tmp_path / "1", "stamp")
    await test_a_load_waits_for_its_stream(cupys, tmp_path / "2", "stamp")


# --- the switch -----------------------------------------------------------------------------

SKIPS = """
import pytest
@pytest.fixture
def library():
    return pytest.importorskip("no_library_of_this_name")
@pytest.mark.gpu
def test_no_library(library): pass
@pytest.mark.gpu
def test_no_device(): pytest.skip("no device")
@pytest.mark.skip(reason="of something else")
def test_without_a_gpu(): pass
"""


@pytest.mark.parametrize(("required", "skipped"), [("", 3), ("0", 3), ("1", 1)])
def test_where_a_gpu_is_required_nothing_of_it_is_skipped(
    tmp_path: Path, required: str, skipped: int
) -> None:
    (tmp_path / "test_skips.py").write_text(SKIPS)
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    ours = str(here.parent / "pyproject.toml")
    options = ["-p", "conftest", "-p", "no:cacheprovider", "-c", ours]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(tmp_path), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "KVGDS_REQUIRE_GPU": required},
        check=False,
    )
    assert f"{skipped} skipped" in done.stdout.splitlines()[-1]
    assert done.stdout.count("KVGDS_REQUIRE_GPU is set, but: ") >= 3 - skipped
    assert done.returncode == (skipped == 1)
