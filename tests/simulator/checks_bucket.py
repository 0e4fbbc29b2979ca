"""GPU memory and a bucket: by the bounce region, whatever way the directory in front has."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from blockbuster import blockbuster_ctx

import buckets
from kvgds import (
    EngineConfig,
    FileTier,
    Namespace,
    RelayStatistics,
    TransferError,
    TransferTimeout,
    open_engine,
)
from s3 import JuiceServer
from simulator import Simulator
from simulator.checks_engine import SIZES, filled
from support import until
from wire import Wire
from wirefaults import s3_error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE, MIB = 4096, 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JuiceServer]:
    with JuiceServer(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(server: JuiceServer) -> str:
    return server.make_bucket()


@pytest.fixture
def wire(server: JuiceServer) -> Iterator[Wire]:
    with Wire(server.host, server.port) as wire:
        yield wire


@pytest.fixture
def gpu() -> Simulator:
    simulator = Simulator()
    simulator.clear()
    simulator.strict_pinned(strict=True)
    return simulator


@pytest.fixture(autouse=True)
def _never_blocked() -> Iterator[None]:
    with blockbuster_ctx():
        yield


def config(*tiers: Any, **changes: Any) -> EngineConfig:
    given = {"namespace": Namespace(model="m"), "bounce_bytes": 16 * MIB, **changes}
    return EngineConfig(tiers=tiers, **given)


@pytest.mark.parametrize("backend", ["nixl", "obstore"])
async def test_a_bucket_alone(
    gpu: Simulator, server: JuiceServer, bucket: str, backend: str
) -> None:
    settings = config(buckets.settings(server, bucket, backend=backend))
    blocks = {b"%d" % size: filled(gpu, size, size) for size in SIZES}
    async with open_engine(settings) as engine:
        assert [(plan.memory, plan.path) for plan in engine.plan] == [
            ("host", "bounce"),
            ("gpu", "bounce"),
        ]
        for key, (vram, _) in blocks.items():
            assert await engine.store(key, engine.register(vram))
    async with open_engine(settings) as engine:
        for key, (vram, data) in blocks.items():
            vram.write(bytes(vram.nbytes))
            assert await engine.load(key, engine.register(vram))
            assert vram.read() == data


@pytest.mark.parametrize("path", ["gds", "bounce"])
async def test_behind_a_directory(
    gpu: Simulator, server: JuiceServer, bucket: str, tmp_path: Path, path: str
) -> None:
    """Another machine loads it from the bucket into its GPU, and once more from its directory."""

    def machine(name: str) -> EngineConfig:
        near = FileTier(root=tmp_path / name, capacity_bytes=64 * MIB)
        return config(near, buckets.settings(server, bucket, write="through"), path=path)

    vram, data = filled(gpu, 6 * PAGE, path)
    async with open_engine(machine("one")) as engine:
        assert [(plan.memory, plan.path) for plan in engine.plan] == [
            ("host", "direct"),
            ("gpu", path),
            ("host", "bounce"),
            ("gpu", "bounce"),
        ]
        assert await engine.store(b"key", engine.register(vram))
    async with open_engine(machine("other")) as engine:
        region = engine.register(vram)
        for _ in range(2):
            vram.write(bytes(6 * PAGE))
            assert await engine.load(b"key", region)
            assert vram.read() == data
            await until(lambda: engine.statistics().relay == RelayStatistics(0, 0, 0, 1))


@pytest.mark.parametrize("backend", ["nixl", "obstore"])
@pytest.mark.parametrize("direction", ["store", "load"])
async def test_a_gpu_that_fails_says_nothing_of_the_bucket(
    gpu: Simulator, server: JuiceServer, bucket: str, direction: str, backend: str
) -> None:
    """However often: what lies in other memory goes there and back as before."""
    vram, data = filled(gpu, 5 * PAGE, direction)
    async with open_engine(config(buckets.settings(server, bucket, backend=backend))) as engine:
        region, back = engine.register(vram), bytearray(PAGE)
        parts = [slice(i * PAGE, (i + 1) * PAGE) for i in range(5)]
        there = [(b"%d" % i, data[part]) for i, part in enumerate(parts)]
        assert await engine.store(b"other", data[:PAGE])
        for key, _ in there:  # so that no store asks whether it is there: that would be answered
            assert not await engine.load(key, bytearray(PAGE))
        act = engine.store_many
        if direction == "load":
            assert all(outcome.ok for outcome in await engine.store_many(there))
            act = engine.load_many
        items = [(key, region[part]) for (key, _), part in zip(there, parts, strict=True)]
        gpu.refuse("cudaEventCreateWithFlags", count=-1)
        outcomes = await act(items)
        assert all("cudaEventCreateWithFlags" in str(outcome.error) for outcome in outcomes)
        assert engine.statistics().tiers[0].out == ""
        assert await engine.load(b"other", back)
        assert back == data[:PAGE]
        gpu.clear()
        assert all(outcome.ok for outcome in await act(items))
        assert vram.read() == data


async def test_a_store_that_was_never_sent_is_no_answer(
    gpu: Simulator, server: JuiceServer, bucket: str, wire: Wire
) -> None:
    """Else a server that fails would be asked on and on while streams keep stores waiting."""
    vram, data = filled(gpu, PAGE, "never sent")
    stream = gpu.stream()
    settings = buckets.settings(server, bucket, endpoint=wire.endpoint, retries=0)
    async with open_engine(config(settings)) as engine:
        region, keys = engine.register(vram), (b"0", b"1")
        assert await engine.store(b"there", data)
        for key in keys:  # so that no store asks whether it is there
            assert not await engine.load(key, bytearray(PAGE))
        gpu.hold(stream)
        await asyncio.to_thread(wire.answer, s3_error(500, "InternalError"))
        for key in keys:
            with pytest.raises(TransferError, match="500"):
                await engine.load(b"there", bytearray(PAGE))
            with pytest.raises(TransferTimeout):
                await engine.store(key, region, stream=stream, timeout_s=0.05)
            await until(lambda: not engine.statistics().in_flight)
        assert engine.statistics().tiers[0].out == ""
        with pytest.raises(TransferError, match="500"):
            await engine.load(b"there", bytearray(PAGE))
        assert "500" in engine.statistics().tiers[0].out
