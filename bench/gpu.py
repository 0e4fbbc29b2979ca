"""GPU memory by each path that can be had here, beside the host copy alone and the disk alone.

    python bench/gpu.py [--root DIR] [--rounds 5] [--only paths,fragments,decode] [--quick]
                        [--verify stamp|full] [--device cuda|cpu] [--out FILE]

One JSON line a contender; speeds are medians of runs that alternate within one process. `--quick`
is one round of small sizes, to see that it runs. `--device cpu` runs the same on host memory,
where there is no GPU to try it on: it says nothing of GPUs, and each row says so.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import shutil
import sys
import tempfile
import time
from collections import deque
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from measure import Sample, alternate, emit, median, quantile, report_gpu, report_machine, timed
from peers import Pool

import kvgds
from kvgds.memory import Arena, pairs
from kvgds.memory.device import cuda

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from peers import Call

    Runs = dict[str, list[Sample]]

KIB, MIB = 1 << 10, 1 << 20
ALIGNMENT = 2 * MIB  # so that every part of a block is whole pages, and GPU pages are not shared
REAL = "GPUDirect Storage is real here; compatibility mode is for where it is not"
HOST = "host memory: nothing here is about a GPU"


@dataclass
class Setup:
    """What is run, and with which engines.

    Attributes:
        engines: by the path that their plan says.
        refused: why another path can't be had.
    """

    root: Path
    device: str
    rounds: int
    quick: bool
    verify: str
    engines: dict[str, kvgds.Engine] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def row(self, scenario: str, **more: object) -> dict[str, object]:
        """What every row says."""
        where: dict[str, object] = {"device": self.device, "verify": self.verify}
        return {"scenario": scenario, **where, **({} if self.on_gpu else {"note": HOST}), **more}


# --- engines --------------------------------------------------------------------------------


async def open_engines(setup: Setup, stack: AsyncExitStack) -> None:
    """An engine for each path that can be had; for the others, why not."""
    if not setup.on_gpu:
        await _open(setup, stack, "bounce", compat=False)  # of host memory, that is direct
        setup.refused = dict.fromkeys(("bounce", "gds-compat", "gds"), HOST)
        return
    await _open(setup, stack, "bounce", compat=False)
    try:
        await _open(setup, stack, "gds", compat=False)
        setup.refused["gds-compat"] = REAL
    except kvgds.PathUnavailable as error:
        setup.refused["gds"] = str(error)
        try:
            await _open(setup, stack, "gds", compat=True)
        except kvgds.PathUnavailable as error:
            setup.refused["gds-compat"] = str(error)


async def _open(
    setup: Setup, stack: AsyncExitStack, path: str, *, compat: bool, **more: int
) -> None:
    root = Path(tempfile.mkdtemp(dir=setup.root))
    tier = kvgds.FileTier(root=root / "kv", capacity_bytes=4 << 30, verify=setup.verify)
    config = kvgds.EngineConfig(
        namespace=kvgds.Namespace(model="bench"),
        tiers=(tier,),
        path=path,
        allow_compat=compat,
        **more,
    )
    engine = await stack.enter_async_context(kvgds.open_engine(config))
    memory = "gpu" if setup.on_gpu else "host"
    (way,) = {plan.path for plan in engine.plan if plan.memory == memory}
    setup.engines[way] = engine


# --- blocks ---------------------------------------------------------------------------------


class Memory:
    """``count`` blocks of ``nbytes``, each cut into so many fragments of a paged cache."""

    def __init__(self, setup: Setup, count: int, nbytes: int, fragments: int) -> None:
        self.count, self.nbytes, self.fragments = count, nbytes, fragments
        total = count * nbytes
        whole = torch.empty(total + ALIGNMENT, dtype=torch.uint8, device=setup.device)
        start = -whole.data_ptr() % ALIGNMENT
        self.flat = whole[start : start + total]
        self.flat.random_(0, 256)
        self.layers = list(self.flat.view(fragments, count, nbytes // fragments))
        self._before = self.flat.clone()
        settle(setup)

    def rows(self, index: int) -> list[tuple[int, int]]:
        """Where a block lies."""
        return [(layer[index].data_ptr(), layer[index].nbytes) for layer in self.layers]

    def clear(self) -> None:
        self.flat.zero_()

    def check(self) -> None:
        """Raise unless everything is as it was made."""
        if not torch.equal(self.flat, self._before):
            raise RuntimeError(f"{self.nbytes:,}-byte blocks came back different")


def settle(setup: Setup) -> None:
    """Wait until the GPU has done everything."""
    if setup.on_gpu:
        torch.cuda.synchronize()


class Blocks:
    """Blocks of one memory, by one engine."""

    def __init__(self, engine: kvgds.Engine, memory: Memory, in_flight: int) -> None:
        self.engine, self.memory, self.in_flight = engine, memory, in_flight
        self.cache = engine.register_cache(memory.layers)
        name = f"{memory.nbytes}-{memory.fragments}-{id(memory)}"
        self.keys = [f"{name}-{i}".encode() for i in range(memory.count)]

    async def run(self, *, store: bool) -> Sample:
        """Move every block once, so many at a time."""
        if store:
            await self.drop()
        sample = Sample(nbytes=self.memory.count * self.memory.nbytes, asked=self.memory.count)
        numbers = iter(range(self.memory.count))

        async def work() -> None:
            for i in numbers:
                started = time.perf_counter()
                moved = await self._move(i, store=store)
                sample.succeeded += moved
                sample.latencies.append(time.perf_counter() - started)

        with timed(sample):
            await asyncio.gather(*(work() for _ in range(self.in_flight)))
        return sample

    async def until(self, stop: asyncio.Event, sample: Sample, *, store: bool) -> None:
        """Move blocks over and over."""

        async def work(first: int) -> None:
            i = first
            while not stop.is_set():
                if store:
                    await self.engine.delete(self.keys[i])
                sample.asked += 1
                moved = await self._move(i, store=store)
                sample.succeeded += moved
                sample.nbytes += self.memory.nbytes
                i = (i + self.in_flight) % self.memory.count

        await asyncio.gather(*(work(i) for i in range(self.in_flight)))

    async def _move(self, i: int, *, store: bool) -> bool:
        call = self.engine.store if store else self.engine.load
        return await call(self.keys[i], self.cache.block(i))

    async def drop(self) -> None:
        await asyncio.gather(*(self.engine.delete(key) for key in self.keys))

    async def close(self) -> None:
        await self.drop()
        await self.engine.deregister(self.cache)


@asynccontextmanager
async def blocks_of(
    setup: Setup, memory: Memory, in_flight: int
) -> AsyncIterator[dict[str, Blocks]]:
    """The memory's blocks by each engine."""
    async with AsyncExitStack() as stack:
        found = {}
        for path, engine in setup.engines.items():
            found[path] = Blocks(engine, memory, in_flight)
            stack.push_async_callback(found[path].close)
        yield found


# --- baselines ------------------------------------------------------------------------------


class TimedPool(Pool):
    """The disk alone: plain calls on threads, from and to the host's memory."""

    def _run(self, call: Call) -> Sample:
        latencies: list[float] = []

        def timed_call(fd: int, parts: list[memoryview], at: int) -> int:
            started = time.perf_counter()
            moved = call(fd, parts, at)
            latencies.append(time.perf_counter() - started)
            return moved

        sample = super()._run(timed_call)
        sample.latencies = latencies
        return sample


class Copies:
    """The copy alone: between the blocks and page-locked memory of the host, fragment for fragment.

    Without a GPU, copies from host memory to host memory.
    """

    def __init__(self, setup: Setup, memory: Memory, in_flight: int) -> None:
        self._setup, self._memory, self._in_flight = setup, memory, in_flight
        self._arena = Arena(memory.count * memory.nbytes)
        if setup.on_gpu:
            cuda().pin(self._arena.span)

    def close(self) -> None:
        if self._setup.on_gpu:
            cuda().unpin(self._arena.span)

    async def store(self) -> Sample:
        return self._run(store=True)

    async def load(self) -> Sample:
        return self._run(store=False)

    def _run(self, *, store: bool) -> Sample:
        memory = self._memory
        copies = [self._copies(i, store=store) for i in range(memory.count)]
        sample = Sample(nbytes=memory.count * memory.nbytes, asked=memory.count)
        flying: deque[tuple[float, Any]] = deque()

        def land() -> None:
            started, copying = flying.popleft()
            while copying is not None and not copying.done:
                time.sleep(0)
            sample.latencies.append(time.perf_counter() - started)
            sample.succeeded += 1

        with timed(sample):
            for each in copies:
                if len(flying) == self._in_flight:
                    land()
                flying.append((time.perf_counter(), self._start(each)))
            while flying:
                land()
        return sample

    def _copies(self, i: int, *, store: bool) -> list[tuple[int, int, int]]:
        block = self._memory.nbytes
        host, rows = [(self._arena.span.address + i * block, block)], self._memory.rows(i)
        return pairs(rows, host) if store else pairs(host, rows)

    def _start(self, copies: list[tuple[int, int, int]]) -> Any:  # noqa: ANN401 - or nothing
        if self._setup.on_gpu:
            return cuda().copy(0, copies)
        for to, source, nbytes in copies:
            ctypes.memmove(to, source, nbytes)
        return None


# --- scenarios ------------------------------------------------------------------------------


def rows_of(setup: Setup, runs: Runs, base: str, **more: object) -> Iterator[dict[str, object]]:
    """A row a contender, with its ratio to the base."""
    for name, samples in runs.items():
        rates = sorted(sample.rate for sample in samples)
        yield setup.row(
            contender=name,
            **more,
            **{
                "GB/s": round(median(samples, "rate"), 3),
                "spread": [round(rates[0], 3), round(rates[-1], 3)],
                "ratio": round(median(samples, "rate") / median(runs[base], "rate"), 3),
                **latencies(samples),
                "cpu_s_per_GiB": round(median(samples, "cpu_per_gib"), 3),
                "succeeded": sum(sample.succeeded for sample in samples),
                "asked": sum(sample.asked for sample in samples),
                "base": base,
            },
        )


def latencies(samples: list[Sample]) -> dict[str, float]:
    """Of one block, over all runs."""
    every = [each for sample in samples for each in sample.latencies]
    return {f"p{q:g}_ms": round(quantile(every, q / 100) * 1e3, 3) for q in (50, 99)}


async def paths(setup: Setup) -> AsyncIterator[dict[str, object]]:
    """Every block size, cut into fragments, few and many in flight, there and back."""
    blocks = (256 * KIB, MIB, 9 * MIB // 4, 16 * MIB)
    for block in (64 * KIB, 256 * KIB) if setup.quick else blocks:
        for fragments in (1, 16) if setup.quick else (1, 16, 64):
            for in_flight in (1, 4) if setup.quick else (1, 16):
                async for row in one_size(setup, block, fragments, in_flight):
                    yield row


async def one_size(
    setup: Setup, block: int, fragments: int, in_flight: int
) -> AsyncIterator[dict[str, object]]:
    total = MIB if setup.quick else 64 * MIB if in_flight == 1 else 256 * MIB
    count = total // block
    memory = Memory(setup, count, block, fragments)
    with ExitStack() as stack:
        disk = stack.enter_context(pool_of(setup, block, count, in_flight))
        copies = Copies(setup, memory, in_flight)
        stack.callback(copies.close)
        async with blocks_of(setup, memory, in_flight) as engines:
            for store in (True, False):
                contenders: dict[str, Callable[[], Awaitable[Sample]]] = {
                    "disk alone": disk.store if store else disk.load,
                    "copy alone": copies.store if store else copies.load,
                }
                for path, mover in engines.items():
                    contenders[path] = partial(mover.run, store=store)
                runs = await alternate(contenders, setup.rounds)
                sizes = {"block": block, "fragments": fragments, "in_flight": in_flight}
                direction = direction_of(store=store)
                for row in rows_of(
                    setup, runs, "disk alone", scenario="paths", **sizes, direction=direction
                ):
                    yield row
            await check(setup, memory, engines)


async def check(setup: Setup, memory: Memory, engines: dict[str, Blocks]) -> None:
    """What each engine loads is what was stored."""
    for mover in engines.values():
        memory.clear()
        settle(setup)
        await mover.run(store=False)
        memory.check()


@contextmanager
def pool_of(setup: Setup, block: int, count: int, threads: int) -> Iterator[TimedPool]:
    path = setup.root / f"pool-{block}"
    pool = TimedPool(path, block, count, threads)
    try:
        yield pool
    finally:
        pool.close()
        path.unlink()


async def fragments(setup: Setup) -> AsyncIterator[dict[str, object]]:
    """2 MiB blocks cut ever smaller against the same in one piece.

    Where a path gathers fragments on the GPU, the same without that stands beside it; the plan of
    the first says up to which size it does.
    """
    block, count, in_flight = (256 * KIB, 4, 4) if setup.quick else (2 * MIB, 128, 16)
    cuts = (1, 64) if setup.quick else (1, 16, 64, 512)
    async with AsyncExitStack() as stack:
        plain = await stack.enter_async_context(without_gathering(setup))
        movers = {}
        for n in cuts:
            for setting in (setup, plain):  # cuFile knows memory once: each has its own
                if setting.engines:
                    memory = Memory(setup, count, block, n)
                    engines = await stack.enter_async_context(blocks_of(setting, memory, in_flight))
                    movers |= {f"{path}, {n} fragments": each for path, each in engines.items()}
        for store in (True, False):
            contenders = {name: partial(mover.run, store=store) for name, mover in movers.items()}
            runs = await alternate(contenders, setup.rounds)
            more = {"block": block, "in_flight": in_flight, "direction": direction_of(store=store)}
            for path in (*setup.engines, *plain.engines):
                ours = {name: runs[name] for name in runs if name.startswith(f"{path}, ")}
                base = f"{path}, 1 fragments"
                for row in rows_of(setup, ours, base, scenario="fragments", **more):
                    yield row


@asynccontextmanager
async def without_gathering(setup: Setup) -> AsyncIterator[Setup]:
    """The same for the paths of GPUDirect Storage alone, with fragments as they lie."""
    other = replace(setup, engines={}, refused={})
    async with AsyncExitStack() as stack:
        for path in ("gds", "gds-compat"):
            if path in setup.engines:
                compat = path == "gds-compat"
                await _open(other, stack, "gds", compat=compat, gather_bytes=0)
        other.engines = {f"{path}, not gathered": each for path, each in other.engines.items()}
        yield other


def direction_of(*, store: bool) -> str:
    return "store" if store else "load"


class Decode:
    """Steps that read many weights for few tokens, as an LLM's decoding does.

    On a GPU a step is a graph on a stream of its own, and its time is CUDA's: what the interpreter
    lock costs shows in the wall time alone.
    """

    def __init__(self, setup: Setup) -> None:
        small = setup.quick or not setup.on_gpu
        layers, width, self.steps = (2, 256, 20) if small else (64, 4096, 1000)
        kind: dict[str, Any] = {"device": setup.device}
        kind["dtype"] = torch.bfloat16 if setup.on_gpu else torch.float32
        weights = (torch.randn(width, width, **kind) for _ in range(layers))
        self._weights = [weight / width**0.5 for weight in weights]
        self._tokens = torch.randn(width, 16, **kind)
        self.run = self._run_on_gpu if setup.on_gpu else self._run_on_host
        if setup.on_gpu:
            self._capture()

    def _step(self) -> None:
        tokens = self._tokens
        for weight in self._weights:
            tokens = weight @ tokens

    def _capture(self) -> None:
        self._stream, self._graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            for _ in range(3):  # what a library sets up at first may not be captured
                self._step()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._step()

    def _run_on_gpu(self) -> list[float]:
        """Seconds of each step."""
        times = []
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            for _ in range(self.steps):
                start.record()
                self._graph.replay()
                stop.record()
                stop.synchronize()
                times.append(start.elapsed_time(stop) / 1e3)
        return times

    def _run_on_host(self) -> list[float]:
        times = []
        for _ in range(self.steps):
            started = time.perf_counter()
            self._step()
            times.append(time.perf_counter() - started)
        return times

    async def alone(self) -> Sample:
        sample = Sample()
        with timed(sample):
            sample.latencies = await asyncio.to_thread(self.run)
        return sample

    async def beside(self, mover: Blocks, *, store: bool) -> Sample:
        """The same steps while blocks move."""
        sample, stop = Sample(), asyncio.Event()
        with timed(sample):
            moving = asyncio.create_task(mover.until(stop, sample, store=store))
            sample.latencies = await asyncio.to_thread(self.run)
            stop.set()
            await moving
        return sample


async def decode(setup: Setup) -> AsyncIterator[dict[str, object]]:
    """How much slower a decoding step is while blocks are stored or loaded."""
    block, count, in_flight = (64 * KIB, 16, 4) if setup.quick else (9 * MIB // 4, 64, 16)
    steps = Decode(setup)
    there, fresh = (Memory(setup, count, block, 16) for _ in range(2))
    async with (
        blocks_of(setup, there, in_flight) as loaded,
        blocks_of(setup, fresh, in_flight) as stored,
    ):
        contenders: dict[str, Callable[[], Awaitable[Sample]]] = {"alone": steps.alone}
        for path in setup.engines:
            await loaded[path].run(store=True)
            contenders[f"{path}, load"] = partial(steps.beside, loaded[path], store=False)
            contenders[f"{path}, store"] = partial(steps.beside, stored[path], store=True)
        runs = await alternate(contenders, setup.rounds)
    alone = latencies(runs["alone"])["p50_ms"]
    for name, samples in runs.items():
        step = latencies(samples)
        wall = median(samples, "seconds") / steps.steps
        yield setup.row(
            "decode",
            contender=name,
            block=block,
            in_flight=in_flight,
            **{"GB/s": round(median(samples, "rate"), 3)},
            step_ms=step,
            step_wall_ms=round(wall * 1e3, 3),
            slowed=round(step["p50_ms"] / alone, 3),
            succeeded=sum(sample.succeeded for sample in samples),
            asked=sum(sample.asked for sample in samples),
        )


SCENARIOS = {"paths": paths, "fragments": fragments, "decode": decode}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(SCENARIOS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--verify", choices=("stamp", "full"), default="stamp")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    if unknown := set(chosen.only.split(",")) - set(SCENARIOS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: choose from {', '.join(SCENARIOS)}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no GPU; --device cpu only tries this out")
    return chosen


async def main() -> None:
    chosen = options()
    rounds = 1 if chosen.quick else chosen.rounds
    root = Path(tempfile.mkdtemp(dir=chosen.root))
    setup = Setup(root, chosen.device, rounds, chosen.quick, chosen.verify)
    try:
        async with AsyncExitStack() as stack:
            await open_engines(setup, stack)
            gc.collect()
            gc.freeze()  # what the imports left is not to be collected meanwhile
            plans = [plan for engine in setup.engines.values() for plan in engine.plan]
            machine = report_machine(root)
            machine |= {"gpu": report_gpu(plans) if setup.on_gpu else HOST}
            emit({"machine": machine, "refused": setup.refused}, chosen.out)
            for name in chosen.only.split(","):
                async for row in SCENARIOS[name](setup):
                    emit(row, chosen.out)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    asyncio.run(main())
