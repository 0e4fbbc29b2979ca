"""The engine against plain system calls, its cost to the event loop, and its small operations.

    python bench/engine.py [--root DIR] [--rounds 5] [--only disk,small,loop,busy,latency,prefix]
                           [--quick] [--out FILE]

One JSON line a comparison; every speed is a ratio of medians of alternating runs. `--quick` is one
round of few blocks, to see that it runs.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import os
import queue
import shutil
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from typing import TYPE_CHECKING

from measure import Sample, alternate, emit, median, quantile, report_machine, timed
from peers import FilePerBlock, Pool

import kvgds
from kvgds.blocks import XXH3_128
from kvgds.memory import Arena
from kvgds.tiers.directory import prepare_root
from kvgds.tiers.index import Changes, Index, connect
from kvgds.tiers.space import slab_name, slot_bytes_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Busy = Callable[[], Awaitable[tuple[list[float], int]]]

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    rounds: int
    quick: bool

    def few(self, count: int) -> int:
        """So many; a quick run does with less."""
        return min(count, max(8, count // 64)) if self.quick else count

    @property
    def tick_s(self) -> float:
        """How long a ticker runs."""
        return 0.05 if self.quick else 1.0


class Blocks:
    """An engine with memory for ``count`` blocks, and ways to move them all."""

    def __init__(self, engine: kvgds.Engine, block: int, count: int) -> None:
        self.engine, self.block, self.count = engine, block, count
        arena = Arena(block * count)
        self.region = engine.register(arena.bytes)
        self.keys = [f"{block}-{i}".encode() for i in range(count)]

    def item(self, i: int) -> tuple[bytes, kvgds.View]:
        return self.keys[i], self.region[i * self.block : (i + 1) * self.block]

    async def clear(self) -> None:
        await asyncio.gather(*(self.engine.delete(key) for key in self.keys))

    async def one_by_one(self, *, store: bool, in_flight: int) -> Sample:
        """Move every block by a call of its own, so many at a time."""
        if store:
            await self.clear()
        call = self.engine.store if store else self.engine.load
        numbers = iter(range(self.count))
        sample = Sample(nbytes=self.block * self.count, asked=self.count)

        async def work() -> None:
            for i in numbers:
                moved = await call(*self.item(i))
                sample.succeeded += moved

        with timed(sample):
            await asyncio.gather(*(work() for _ in range(in_flight)))
        return sample

    async def many(self, *, store: bool, batch: int) -> Sample:
        """Move every block in calls of ``batch`` blocks, two calls at a time."""
        if store:
            await self.clear()
        call = self.engine.store_many if store else self.engine.load_many
        starts = iter(range(0, self.count, batch))
        sample = Sample(nbytes=self.block * self.count, asked=self.count)

        async def work() -> None:
            for start in starts:
                stop = min(start + batch, self.count)
                outcomes = await call([self.item(i) for i in range(start, stop)])
                sample.succeeded += sum(o.status in ("stored", "hit") for o in outcomes)

        with timed(sample):
            await asyncio.gather(work(), work())
        return sample


@asynccontextmanager
async def opened(root: Path, **tier: object) -> AsyncIterator[kvgds.Engine]:
    """An engine on a fresh directory."""
    root = Path(tempfile.mkdtemp(dir=root))
    settings = {"capacity_bytes": 4 << 30} | tier
    config = kvgds.EngineConfig(
        namespace=kvgds.Namespace(model="bench"),
        tiers=(kvgds.FileTier(root=root / "kv", **settings),),
    )
    try:
        async with kvgds.open_engine(config) as engine:
            yield engine
    finally:
        shutil.rmtree(root)


def compare(
    scenario: str, runs: dict[str, list[Sample]], base: str, **more: object
) -> list[dict[str, object]]:
    """A row a contender, with ratios to the base."""
    rate, cpu = median(runs[base], "rate"), median(runs[base], "cpu_per_gib")
    return [
        {
            "scenario": scenario,
            **more,
            "contender": name,
            "GB/s": round(median(samples, "rate"), 3),
            "ratio": round(median(samples, "rate") / rate, 3),
            "cpu_s_per_GiB": round(median(samples, "cpu_per_gib"), 3),
            "cpu_over_base": round(median(samples, "cpu_per_gib") - cpu, 3),
            "spread": [round(f(s.rate for s in samples) / rate, 3) for f in (min, max)],
            "succeeded": sum(s.succeeded for s in samples),
            "asked": sum(s.asked for s in samples),
            "base": base,
        }
        for name, samples in runs.items()
    ]


async def disk(root: Path, scale: Scale) -> AsyncIterator[dict[str, object]]:
    """1 and 2.25 MiB blocks, 16 in flight, O_DIRECT, against a tuned thread pool."""
    for block, whole in ((MIB, 384), (9 * MIB // 4, 170)):
        count = scale.few(whole)
        async with AsyncExitStack() as stack:
            pool = Pool(root / f"pool-{block}", block, count, threads=16)
            stack.callback(os.unlink, root / f"pool-{block}")
            stack.callback(pool.close)
            plain = Blocks(
                await stack.enter_async_context(opened(root, verify="stamp")), block, count
            )
            full = Blocks(
                await stack.enter_async_context(opened(root, verify="full")), block, count
            )
            for store in (True, False):
                contenders = {
                    "pool": pool.store if store else pool.load,
                    "pool, awaited": pool.await_store if store else pool.await_load,
                    "engine": lambda store=store: plain.one_by_one(store=store, in_flight=16),
                    "engine+checksum": lambda store=store: full.one_by_one(
                        store=store, in_flight=16
                    ),
                }
                runs = await alternate(contenders, scale.rounds)
                direction = "store" if store else "load"
                for row in compare(
                    "disk", runs, "pool", block=block, direction=direction, in_flight=16
                ):
                    yield row


async def small(root: Path, scale: Scale) -> AsyncIterator[dict[str, object]]:
    """64 and 256 KiB stores in slabs against one file a block."""
    for block, whole in ((64 * KIB, 4096), (256 * KIB, 1024)):
        count = scale.few(whole)
        async with AsyncExitStack() as stack:
            blocks = Blocks(
                await stack.enter_async_context(opened(root, verify="stamp")), block, count
            )
            full = Blocks(await stack.enter_async_context(opened(root)), block, count)
            contenders: dict[str, Callable[[], Awaitable[Sample]]] = {}
            for direct in (True, False):
                name = "file a block, " + ("O_DIRECT" if direct else "page cache")
                where = root / f"files-{block}-{direct}"
                stack.callback(shutil.rmtree, where)
                contenders[name] = FilePerBlock(where, block, count, 4, direct=direct).store
            contenders["engine"] = lambda: blocks.many(store=True, batch=64)
            contenders["engine+checksum"] = lambda: full.many(store=True, batch=64)
            runs = await alternate(contenders, scale.rounds)
            for row in compare(
                "small", runs, "file a block, O_DIRECT", block=block, direction="store"
            ):
                yield row


async def ticks(seconds: float) -> list[float]:
    """How late a 1 ms ticker is, each time."""
    late, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        due = time.perf_counter() + 1e-3
        await asyncio.sleep(1e-3)
        late.append(time.perf_counter() - due)
    return late


@asynccontextmanager
async def by_engine(root: Path, block: int, scale: Scale) -> AsyncIterator[Busy]:
    """16 tasks that store and delete, and 16 that load, each its next block when it has one."""
    async with opened(root) as engine:
        there, fresh = Blocks(engine, block, 64), Blocks(engine, block, 64)
        await there.one_by_one(store=True, in_flight=16)
        fresh.keys = [b"f" + key for key in fresh.keys]

        async def mover(i: int, stop: asyncio.Event, *, store: bool) -> int:
            done, n = 0, i
            while not stop.is_set():
                n = (n + 16) % 64
                if store:
                    await engine.store(*fresh.item(n))
                    await engine.delete(fresh.keys[n])
                else:
                    await engine.load(*there.item(n))
                done += 1
            return done

        async def busy() -> tuple[list[float], int]:
            stop = asyncio.Event()
            tasks = [
                asyncio.create_task(mover(i, stop, store=store))
                for i in range(16)
                for store in (True, False)
            ]
            late = await ticks(scale.tick_s)
            stop.set()
            return late, sum(await asyncio.gather(*tasks))

        yield busy


@asynccontextmanager
async def by_threads(root: Path, block: int, scale: Scale) -> AsyncIterator[Busy]:
    """The same in 16 threads that write and 16 that read, by system calls alone."""
    pools = [Pool(root / f"ticked-{name}", block, 64, threads=16) for name in ("store", "load")]
    pools[1].store_now()  # else its reads find nothing written, and no disk reads anything

    async def busy() -> tuple[list[float], int]:
        stop = threading.Event()

        def work(run: Callable[[], Sample]) -> int:
            moved = 0
            while not stop.is_set():
                moved += run().succeeded
            return moved

        runs = (pools[0].store_now, pools[1].load_now)
        with ThreadPoolExecutor(2) as drivers:
            futures = [drivers.submit(work, run) for run in runs]
            late = await ticks(scale.tick_s)
            stop.set()
            return late, sum([await asyncio.wrap_future(future) for future in futures])

    try:
        yield busy
    finally:
        for name, pool in zip(("store", "load"), pools, strict=True):
            pool.close()
            os.unlink(root / f"ticked-{name}")


async def loop(root: Path, scale: Scale) -> AsyncIterator[dict[str, object]]:
    """How much later a ticker is with 32 transfers in flight, both directions busy."""
    for block in (256 * KIB, MIB, 9 * MIB // 4):
        async with by_threads(root, block, scale) as threads, by_engine(root, block, scale) as own:
            late: dict[str, list[list[float]]] = {"idle": [], "threads": [], "engine": []}
            moved = {"threads": 0, "engine": 0}
            for _ in range(scale.rounds + 1):
                late["idle"].append(await ticks(scale.tick_s))
                for name, busy in (("threads", threads), ("engine", own)):
                    ran, blocks = await busy()
                    late[name].append(ran)
                    moved[name] += blocks
            p99 = {
                k: statistics.median(quantile(run, 0.99) for run in v[1:]) for k, v in late.items()
            }
            worst = {k: statistics.median(max(run) for run in v[1:]) for k, v in late.items()}
            for name, blocks in moved.items():
                yield {
                    "scenario": "loop",
                    "block": block,
                    "in_flight": 32,
                    "contender": name,
                    "idle_p99_ms": round(p99["idle"] * 1e3, 3),
                    "p99_more_ms": round((p99[name] - p99["idle"]) * 1e3, 3),
                    "worst_more_ms": round((worst[name] - worst["idle"]) * 1e3, 3),
                    "blocks_moved": blocks,
                    "GB/s": round(blocks * block / (scale.rounds + 1) / scale.tick_s / 1e9, 2),
                }


async def hog(period: float, share: float, stop: asyncio.Event) -> None:
    """Keep the loop's thread busy in Python for a share of the time."""
    while not stop.is_set():
        end = time.perf_counter() + period * share
        while time.perf_counter() < end:
            pass
        await asyncio.sleep(period * (1 - share))


async def busy(root: Path, scale: Scale) -> AsyncIterator[dict[str, object]]:
    """Throughput left while the loop is 80 % busy in Python."""
    for block, whole, batch in ((MIB, 384, 0), (256 * KIB, 1536, 64)):
        count = scale.few(whole)
        async with opened(root) as engine:
            blocks = Blocks(engine, block, count)
            await blocks.one_by_one(store=True, in_flight=16)
            for store in (True, False):

                async def idle(*, store: bool = store) -> Sample:
                    if batch:
                        return await blocks.many(store=store, batch=batch)
                    return await blocks.one_by_one(store=store, in_flight=32)

                def beside(
                    period: float, run: Callable[[], Awaitable[Sample]] = idle
                ) -> Callable[[], Awaitable[Sample]]:
                    async def hogged() -> Sample:
                        stop = asyncio.Event()
                        task = asyncio.create_task(hog(period, 0.8, stop))
                        sample = await run()
                        stop.set()
                        await task
                        return sample

                    return hogged

                contenders = {"idle loop": idle}
                for period in (1e-3, 5e-3, 20e-3):
                    contenders[f"80 % busy, {period * 1e3:g} ms period"] = beside(period)
                runs = await alternate(contenders, scale.rounds)
                direction = "store" if store else "load"
                for row in compare(
                    "busy", runs, "idle loop", block=block, direction=direction, batch=batch
                ):
                    yield row


class Hop:
    """A thread that reads 4 KiB when asked to, and tells the loop: the least there is to do."""

    def __init__(self, path: Path) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd = os.open(path, os.O_RDONLY)
        self._page = [bytearray(4 * KIB)]
        self._asked: queue.SimpleQueue[asyncio.Future[int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def _main(self) -> None:
        while (future := self._asked.get()) is not None:
            moved = os.preadv(self._fd, self._page, 0)
            self._loop.call_soon_threadsafe(future.set_result, moved)

    async def load(self, _number: int) -> bool:
        future: asyncio.Future[int] = self._loop.create_future()
        self._asked.put(future)
        return await future == 4 * KIB

    def close(self) -> None:
        self._asked.put(None)
        self._thread.join()
        os.close(self._fd)


async def latency(_root: Path, scale: Scale) -> AsyncIterator[dict[str, object]]:
    """One awaited 4 KiB load from the page cache, engine otherwise idle."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        async with opened(Path(memory), capacity_bytes=64 * MIB) as engine:
            blocks = Blocks(engine, 4 * KIB, 256)
            await blocks.many(store=True, batch=64)
            (Path(memory) / "page").write_bytes(bytes(4 * KIB))
            hop = Hop(Path(memory) / "page")
            contenders: dict[str, Callable[[int], Awaitable[bool]]] = {
                "bare hop": hop.load,
                "engine": lambda n: engine.load(*blocks.item(n % 256)),
            }
            runs: dict[str, list[list[float]]] = {name: [] for name in contenders}
            for _ in range(scale.rounds + 1):
                for name, load in contenders.items():
                    times = []
                    for n in range(scale.few(2000)):
                        started = time.perf_counter()
                        if not await load(n):
                            raise RuntimeError(f"{name}: block {n} was not read")
                        times.append(time.perf_counter() - started)
                    runs[name].append(times)
            hop.close()
            for name in contenders:
                quantiles = {
                    f"p{q * 100:g}_us": round(
                        statistics.median(quantile(r, q) for r in runs[name][1:]) * 1e6, 1
                    )
                    for q in (0.1, 0.5, 0.9, 0.99)
                }
                yield {
                    "scenario": "latency",
                    "block": 4 * KIB,
                    "path": "tmpfs",
                    "contender": name,
                    **quantiles,
                }


MILLION = 1_000_000


def make_index(root: Path, namespace: kvgds.Namespace, blocks: int) -> list[bytes]:
    """Write the index of a slab directory that holds so many 4 KiB blocks; their keys."""
    slot_bytes = slot_bytes_for(4 * KIB)
    root.mkdir()
    prepare_root(root, "slabs")
    with (root / slab_name(0, slot_bytes)).open("wb") as slab:
        slab.truncate(slot_bytes * blocks)
    index = Index(connect(root / "index.db"), lambda *_: None, lambda: None)
    number = index.namespace(namespace.digest, namespace.text)
    keys = [hashlib.blake2b(b"%d" % i, digest_size=16).digest() for i in range(blocks)]
    index.apply(Changes(add_slab=[(0, slot_bytes, blocks)]))
    rows = [(i, number, key, i, 4 * KIB, XXH3_128, i, 0) for i, key in enumerate(keys)]
    index.apply(Changes(put=rows))
    index.close()
    return keys


async def prefix(root: Path, scale: Scale) -> AsyncIterator[dict[str, object]]:
    """Opening an index of a million blocks, and ``engine.prefix`` of 1,000 keys in it."""
    namespace = kvgds.Namespace(model="bench")
    blocks = scale.few(MILLION)
    keys = make_index(root / "million", namespace, blocks)
    tier = kvgds.FileTier(root=root / "million", capacity_bytes=16 << 30)
    config = kvgds.EngineConfig(namespace=namespace, tiers=(tier,))
    started = time.perf_counter()
    async with kvgds.open_engine(config) as engine:
        opening = time.perf_counter() - started
        times = []
        for n in range(scale.rounds + 1):
            asked = keys[n * 7919 :][:1000]
            started = time.perf_counter()
            found = await engine.prefix(asked)
            times.append(time.perf_counter() - started)
            if found != len(asked):
                raise RuntimeError(f"{found} of {len(asked)} keys found")
    yield {
        "scenario": "prefix",
        "index": blocks,
        "keys": 1000,
        "opening_s": round(opening, 2),
        "prefix_ms": round(statistics.median(times[1:]) * 1e3, 3),
    }


SCENARIOS = {
    "disk": disk,
    "small": small,
    "loop": loop,
    "busy": busy,
    "latency": latency,
    "prefix": prefix,
}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(SCENARIOS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(SCENARIOS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: choose from {', '.join(SCENARIOS)}")
    scale = Scale(1 if options.quick else options.rounds, options.quick)
    with tempfile.TemporaryDirectory(dir=options.root) as root:
        # What the imports left behind is not to be collected meanwhile: a full collection stops the
        # loop for tens of milliseconds, whatever runs on it.
        gc.collect()
        gc.freeze()
        emit({"machine": report_machine(Path(root))}, options.out)
        for name in options.only.split(","):
            async for row in SCENARIOS[name](Path(root), scale):
                emit(row, options.out)


if __name__ == "__main__":
    asyncio.run(main())
