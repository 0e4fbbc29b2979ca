"""The file tier: against the machine's limits and other projects, and what it costs an event loop.

    python bench/files.py [--root DIR] [--rounds 5] [--only sizes,models,peers,...] [--gpu N]
                          [--peers DIR] [--quick] [--out FILE]

A row a contender and cell, as JSON lines; contenders take turns. `--quick` is one round of few
blocks, to see that it runs. Peers run in the environments that `bench/peers.py` made.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import itertools
import os
import random
import shutil
import sys
import tempfile
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

from filepeers import PEERS
from peers import FOLDER, Process, python_of, started

from kvgds import EngineConfig, FileTier, Namespace, Priority, open_engine
from kvgds.bench import ending, limits
from kvgds.bench.blocks import Blocks, Content, cold, opened
from kvgds.bench.grid import Field, copies, field_of, moves, ticker
from kvgds.bench.machine import report
from kvgds.bench.measure import (
    Contender,
    Sample,
    alternate,
    drive,
    emit,
    quiet,
    row_of,
    rows_of,
    timed,
    watched,
)
from kvgds.bench.quick import gpus
from kvgds.blocks import XXH3_128
from kvgds.paths import filesystem_of
from kvgds.tiers.directory import prepare_root
from kvgds.tiers.index import Changes, Index, connect
from kvgds.tiers.space import slab_name, slot_bytes_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from kvgds import Engine
    from kvgds.bench.measure import Row

    Rows = AsyncIterator[Row]

KIB, MIB = 1 << 10, 1 << 20
SIZES = [4 * KIB << n for n in range(15)]
"""As NIXL's own benchmark: 4 KiB to 64 MiB, doubling."""
MODELS = ((576 * KIB, 1), (9 * MIB // 4, 1), (640 * KIB, 160), (2 * MIB, 64))
"""Blocks of real models and their fragments: DeepSeek-R1 on 16 GPUs in a row, the same on 8 with
larger pages, 16 tokens of Llama 3.1 70B on one of 8 GPUs, and of 8B: layers, K and V."""
PEER_SIZES = (64 * KIB, 576 * KIB, MIB, 9 * MIB // 4, 16 * MIB)


@dataclass
class Setup:
    """What is run."""

    root: Path
    rounds: int
    quick: bool
    gpu: int | None
    peers: Path

    @property
    def nbytes(self) -> int:
        """Of all blocks of a run."""
        return (4 if self.quick else 256) * MIB

    @property
    def seconds(self) -> float:
        """How long things run that have no end of their own."""
        return 0.05 if self.quick else 1.0

    def some(self, sizes: Sequence[int]) -> Sequence[int]:
        """Of these; a quick run does with the smallest."""
        return sizes[:1] if self.quick else sizes

    def field(self, times: int = 1) -> AbstractAsyncContextManager[Field]:
        """Engines to measure, by runs so many times as long as others."""
        return field_of(self.root, self.gpu, self.rounds, times * self.nbytes)


# --- store and load -------------------------------------------------------------------------


async def sizes(setup: Setup) -> Rows:
    """Blocks of every size, 16 in flight, beside what disk and copies alone take."""
    async with setup.field(times=2) as place:
        for row in await copies(place, MIB):
            yield row
        for block in setup.some(SIZES):
            async for row in moves(place, block, 16):
                yield row


async def depths(setup: Setup) -> Rows:
    """Few blocks of 1 MiB at a time, and many."""
    async with setup.field(times=2) as place:
        for in_flight in setup.some([4, 8, 32, 64]):
            async for row in moves(place, MIB, in_flight):
                yield row


async def single(setup: Setup) -> Rows:
    """One block at a time: what each costs, and how long it takes."""
    async with setup.field() as place:
        for block in setup.some([4 * KIB, 64 * KIB, MIB]):
            async for row in moves(place, block, 1):
                yield row


async def models(setup: Setup) -> Rows:
    """Blocks of real models, scattered over layers as they are."""
    async with setup.field() as place:
        for block, fragments in MODELS[-1:] if setup.quick else MODELS:
            async for row in moves(place, block, 16, fragments):
                yield row


async def batches(setup: Setup) -> Rows:
    """Small blocks, 64 in each call, two calls at a time."""
    async with setup.field() as place:
        for block in setup.some([4 * KIB, 64 * KIB, 256 * KIB]):
            content = Content(block, place.count(block, 16), setup.gpu)
            blocks = {name: Blocks(each, content) for name, each in place.engines.items()}
            for store in (True, False):
                contenders = [
                    replace(
                        each.contender(name, 128, store=store),
                        run=partial(each.move_batches, 64, store=store),
                    )
                    for name, each in blocks.items()
                ]
                cell = place.cell("batch", block, 128, "store" if store else "load")
                for row in await rows_of(cell, contenders, setup.rounds):
                    yield row
            for each in blocks.values():
                await each.close()
            content.close()


async def pages(setup: Setup) -> Rows:
    """Small blocks of a cache one by one, and 16 under each key: neighbours, or scattered ones."""
    many = 16
    async with setup.field() as place:
        for block in setup.some([16 * KIB, 64 * KIB, 256 * KIB]):
            count = place.count(block, many) // many * many or many
            content = Content(block, count, setup.gpu)
            near = list(range(count))
            far = random.Random(0).sample(near, count)
            for name, engine in place.engines.items():
                blocks = Blocks(engine, content)
                for store in (True, False):
                    contenders = [
                        replace(
                            blocks.contender(f"{name}, {what}", 8 * many, store=store),
                            run=partial(
                                blocks.move_groups,
                                [numbers[i : i + size] for i in range(0, count, size)],
                                8 * many // size,
                                store=store,
                            ),
                        )
                        for what, numbers, size in (
                            ("one by one", near, 1),
                            ("16 neighbours", near, many),
                            ("16 scattered", far, many),
                        )
                    ]
                    cell = place.cell("pages", block, 8 * many, "store" if store else "load")
                    for row in await rows_of(cell, contenders, setup.rounds):
                        yield row
                await blocks.close()
            content.close()


# --- what a server does ---------------------------------------------------------------------


async def mixed(setup: Setup) -> Rows:
    """Loads that somebody waits for, alone and while others take all they can; and those."""
    async with opened(setup.root) as engine:
        place = Field(setup.root, None, setup.rounds, setup.nbytes, {"kvgds": engine})
        for block in setup.some([64 * KIB, MIB, 9 * MIB // 4]):
            wanted = Blocks(engine, Content(block, max(8, place.count(block, 4) // 4)))
            others = Blocks(engine, Content(block, 64), name="others")
            for blocks in (wanted, others):
                await blocks.move(16, store=True)
            for loads in setup.some([1, 4, 16]):
                for row in await _mixed(place, wanted, others, loads, setup.rounds):
                    yield row
            await wanted.close()
            await others.close()


async def _mixed(
    place: Field, wanted: Blocks, others: Blocks, loads: int, rounds: int
) -> list[Row]:
    told: dict[str, list[Sample]] = {"stores": [], "prefetch": []}
    alone = wanted.contender("loads alone", loads, store=False)
    cell = place.cell("mixed", wanted.content.block, loads, "load")
    beside = [
        replace(
            alone,
            name=f"loads beside {what}",
            run=partial(_beside, wanted, others, loads, samples, store=what == "stores"),
        )
        for what, samples in told.items()
    ]
    rows = await rows_of(cell, [alone, *beside], rounds)
    for what, samples in told.items():
        several = replace(alone, name=f"{what} beside loads", note="32 at a time; CPU of both")
        way = "store" if what == "stores" else "load"
        rows.append(row_of(replace(cell, direction=way), several, samples[1:]))
    return rows


async def _beside(
    wanted: Blocks, others: Blocks, loads: int, told: list[Sample], *, store: bool
) -> Sample:
    """Loads beside 32 stores at a time, or beside as many loads that nobody waits for."""
    stop, moved = asyncio.Event(), Sample()
    engine = others.engine
    move = engine.store if store else partial(engine.load, priority=Priority.PREFETCH)

    async def work(first: int) -> None:
        for i in itertools.cycle((first, first + 32)):
            if stop.is_set():
                return
            if store:
                await engine.delete(others.keys[i])
            started = time.perf_counter()
            done = await move(others.keys[i], others.memory(i, store=store))
            moved.succeeded += done
            moved.latencies.append(time.perf_counter() - started)
            moved.asked += 1

    async with asyncio.TaskGroup() as working:
        for n in range(32):
            working.create_task(work(n))
        sample = await wanted.move(loads, store=False)
        moved.nbytes = moved.asked * others.content.block
        stop.set()
    moved.seconds, moved.cpu = sample.seconds, sample.cpu
    told.append(moved)
    return sample


async def burst(setup: Setup) -> Rows:
    """16 prompts at once: how much of each is stored, and then all of it, as it arrives.

    The latencies are those of prompts: until their first block is there, and until the last is.
    """
    prompts, blocks_of_each = (4, 4) if setup.quick else (16, 32)
    async with opened(setup.root) as engine:
        place = Field(setup.root, None, setup.rounds, setup.nbytes, {"kvgds": engine})
        for block in setup.some([64 * KIB, 576 * KIB]):
            blocks = Blocks(engine, Content(block, prompts * blocks_of_each))
            await blocks.move(16, store=True)
            for what in ("first block", "whole prompt"):
                contender = replace(
                    blocks.contender(f"kvgds, {what}", 16, store=False),
                    run=partial(_burst, blocks, prompts, first=what == "first block"),
                )
                cell = place.cell("burst", block, prompts * blocks_of_each, "load")
                for row in await rows_of(cell, [contender], setup.rounds):
                    yield row
            await blocks.close()


async def _burst(blocks: Blocks, prompts: int, *, first: bool) -> Sample:
    each = blocks.content.count // prompts
    sample = Sample(nbytes=blocks.content.nbytes, asked=blocks.content.count)

    async def prompt(n: int) -> None:
        numbers = range(n * each, (n + 1) * each)
        started = time.perf_counter()
        found = await blocks.engine.prefix([blocks.keys[i] for i in numbers])
        items = [(blocks.keys[i], blocks.memory(i, store=False)) for i in numbers[:found]]
        times = []
        async for outcome in blocks.engine.load_each(items):
            sample.succeeded += outcome.hit
            times.append(time.perf_counter() - started)
        sample.latencies.append(times[0] if first else times[-1])

    async with watched(sample):
        await asyncio.gather(*(prompt(n) for n in range(prompts)))
    return blocks.content.judged(sample, store=False)


async def evict(setup: Setup) -> Rows:
    """Stores into a tier with room, and into a full one, where each makes another block go."""
    for block in setup.some([64 * KIB, MIB]):
        count = max(64, setup.nbytes // block // (1 if block >= MIB else 4))
        async with AsyncExitStack() as stack:
            engines = {}
            for name, room in (("with room", 4 * count), ("full", count // 2)):
                opening = opened(setup.root, capacity_bytes=room * slot_bytes_for(block))
                engines[name] = await stack.enter_async_context(opening)
            place = Field(setup.root, None, setup.rounds, setup.nbytes, engines)
            content = Content(block, count)
            contenders = []
            for name, engine in engines.items():
                blocks = Blocks(engine, content)
                contenders.append(
                    replace(
                        blocks.contender(f"kvgds, {name}", 16, store=True),
                        run=partial(_fresh, blocks, clear=name == "with room"),
                    )
                )
            cell = place.cell("evict", block, 16, "store")
            for (contender, samples), engine in zip(
                await alternate(contenders, setup.rounds), engines.values(), strict=True
            ):
                evicted = engine.statistics().tiers[0].evictions
                yield row_of(cell, contender, samples, evictions=evicted)


async def _fresh(blocks: Blocks, *, clear: bool) -> Sample:
    """Store every block under a key that was never used."""
    if clear:
        await blocks.clear()
    started = time.perf_counter_ns()
    blocks.keys = [f"{started}-{i}".encode() for i in range(blocks.content.count)]
    sample = Sample(nbytes=blocks.content.nbytes)
    async with watched(sample):
        await drive(blocks.content.count, 16, sample, partial(blocks.move_one, store=True))
    return sample


# --- the event loop -------------------------------------------------------------------------


async def loop(setup: Setup) -> Rows:
    """How much later a 1 ms ticker is with 32 transfers in flight, both ways."""
    async with opened(setup.root) as engine:
        place = Field(setup.root, None, setup.rounds, setup.nbytes, {"kvgds": engine})
        for block in setup.some([256 * KIB, MIB, 9 * MIB // 4]):
            for row in await ticker(place, block, 16, setup.seconds):
                yield row


_ALONE_S = 0.2


class _Hog:
    """Keeps the event loop 80 % busy in Python, so long at a time; counts what it gets done."""

    def __init__(self, slice_s: float, interval_s: float) -> None:
        self.slice_s, self.interval_s = slice_s, interval_s
        self.turns, self.seconds = 0, 0.0
        self.name = f"80 % busy, slices of {slice_s * 1e3:g} ms"
        if interval_s != sys.getswitchinterval():
            self.name += f", switch interval {interval_s * 1e3:g} ms"

    @property
    def rate(self) -> float:
        """Turns a second."""
        return self.turns / self.seconds

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Beside what is done within."""
        before, started = sys.getswitchinterval(), time.perf_counter()
        sys.setswitchinterval(self.interval_s)
        task = asyncio.create_task(self._work())
        try:
            yield
        finally:
            task.cancel()
            self.seconds += time.perf_counter() - started
            sys.setswitchinterval(before)

    async def _work(self) -> None:
        while True:
            end = time.perf_counter() + self.slice_s
            while time.perf_counter() < end:
                self.turns += 1
            await asyncio.sleep(self.slice_s / 4)


async def busy(setup: Setup) -> Rows:
    """What is left while the loop is 80 % busy in Python: of the throughput, and of the loop."""
    default = sys.getswitchinterval()
    kinds = [(each, default) for each in (0.8e-3, 4e-3, 16e-3)] + [(4e-3, 1e-4), (16e-3, 1e-4)]
    async with opened(setup.root) as engine:
        place = Field(setup.root, None, setup.rounds, setup.nbytes, {"kvgds": engine})
        for block in setup.some([256 * KIB, MIB]):
            blocks = Blocks(engine, Content(block, place.count(block, 16)))
            await blocks.move(16, store=True)
            for store in (True, False):
                idle = blocks.contender("idle loop", 32, store=store)
                hogs = [(_Hog(*kind), _Hog(*kind)) for kind in kinds]
                hogged = [
                    replace(idle, name=hog[0].name, run=partial(_hogged, blocks, hog, store=store))
                    for hog in hogs
                ]
                cell = place.cell("busy", block, 32, "store" if store else "load")
                runs = await alternate([idle, *hogged], setup.rounds)
                yield row_of(cell, *runs[0])
                for run, (hog, alone) in zip(runs[1:], hogs, strict=True):
                    yield row_of(cell, *run, loop_left=round(hog.rate / alone.rate, 3))
            await blocks.close()


async def _hogged(blocks: Blocks, hogs: tuple[_Hog, _Hog], *, store: bool) -> Sample:
    """One works beside the transfers, the other alone, just before."""
    hog, alone = hogs
    async with alone.at_work():
        await asyncio.sleep(_ALONE_S)
    if store:
        await blocks.clear()
    sample = Sample(nbytes=blocks.content.nbytes)
    async with watched(sample), hog.at_work():
        await drive(blocks.content.count, 32, sample, partial(blocks.move_one, store=store))
    return blocks.content.judged(sample, store=store)


# --- the index ------------------------------------------------------------------------------


async def prefix(setup: Setup) -> Rows:
    """``engine.prefix`` of 1,000 keys in an index of a million blocks.

    And how long that opens, and how much longer it makes a full run of the garbage collector.
    """
    namespace = Namespace(model="bench")
    root, count = setup.root / "million", 2_000 if setup.quick else 1_000_000
    keys = make_index(root, namespace, count)
    tier = FileTier(root=root, capacity_bytes=16 << 30)
    collecting, started = collector_s(), time.perf_counter()
    async with open_engine(EngineConfig(namespace=namespace, tiers=(tier,))) as engine:
        opening = time.perf_counter() - started
        collecting = collector_s() - collecting

        async def ask() -> Sample:
            sample = Sample(asked=1)
            with timed(sample):
                sample.succeeded = await engine.prefix(keys[:1000]) == len(keys[:1000])
            sample.latencies.append(sample.seconds)
            return sample

        place = Field(setup.root, None, setup.rounds, 0, {"kvgds": engine})
        cell = place.cell("prefix", 4 * KIB, 1, "load")
        (run,) = await alternate([Contender("kvgds", ask, tier="slabs")], setup.rounds)
        more = {"opening_s": round(opening, 2), "collector_ms": round(collecting * 1e3, 1)}
        yield row_of(cell, *run, keys=1000, index=count, **more)
    shutil.rmtree(root)


def collector_s() -> float:
    """How long a full run of the garbage collector takes: the shortest of some."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        gc.collect()
        times.append(time.perf_counter() - started)
    return min(times)


def make_index(root: Path, namespace: Namespace, blocks: int) -> list[bytes]:
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


# --- other projects -------------------------------------------------------------------------


async def peers(setup: Setup) -> Rows:
    """Against what others use, in one run with it: what each writes and reads, by its own ways.

    Loads from a disk begin with a cold page cache, which O_DIRECT does without; those from a warm
    one run at memory's speed. On tmpfs there is no disk, and all ways are one.
    """
    kind = filesystem_of(setup.root)
    if not pythons(setup.peers):
        print("peers: none is here; python bench/peers.py makes them", file=sys.stderr)
    async with AsyncExitStack() as stack:
        engines = {}
        for name, settings in ENGINES.items():
            if kind != "tmpfs" or "page cache" not in name:
                engines[name] = await stack.enter_async_context(opened(setup.root, **settings))
        for block in setup.some(PEER_SIZES):
            async for row in _against_peers(setup, engines, block, kind):
                yield row


ENGINES: dict[str, dict[str, Any]] = {
    "kvgds": {},
    "kvgds, no checksum": {"verify": "stamp"},
    "kvgds, no checksum, 2 threads": {"verify": "stamp", "transport_threads": 2},
    "kvgds, shared directory": {"layout": "files"},
    "kvgds, page cache": {"direct_io": "never"},
    "kvgds, page cache, no checksum": {"direct_io": "never", "verify": "stamp"},
}
BATCHED = ("kvgds", "kvgds, no checksum")
"""These are called for several blocks at once, too, as by a server that wants a whole prompt."""
DISK = (
    (True, "O_DIRECT"),
    (True, "page cache"),
    (False, "page cache, cold"),
    (False, "page cache, warm"),
)
MEMORY = ((True, "tmpfs"), (False, "tmpfs"))


@dataclass
class Entrant:
    """Who takes part, one way and the other, and where its files are."""

    folder: Path
    contender: Callable[..., Contender]
    cached: bool

    def takes_part(self, cache: str) -> bool:
        """Whether it does what a cell is about. Loads from a cold cache everybody does."""
        return cache in ("tmpfs", "page cache, cold") or self.cached == cache.startswith("page")

    def prepared(self, cache: str, *, store: bool) -> Contender:
        """With its files written out before a run, so that it pays for no other's, or dropped."""
        contender = self.contender(store=store)

        async def run() -> Sample:
            os.sync()
            note = cold(self.folder) if cache == "page cache, cold" else None
            if note is not None:
                raise RuntimeError(f"{contender.name}: {note}")
            return await contender.run()

        return replace(contender, run=run) if cache != "tmpfs" else contender


async def _against_peers(setup: Setup, engines: dict[str, Engine], block: int, kind: str) -> Rows:
    place = Field(setup.root, None, setup.rounds, setup.nbytes, engines)
    content = Content(block, place.count(block, 16))
    async with AsyncExitStack() as stack:
        ours = {name: Blocks(each, content) for name, each in engines.items()}
        entrants = [_own(blocks, name) for name, blocks in ours.items()]
        entrants += [_own(ours[name], name, in_a_call=8) for name in BATCHED]
        folder = setup.root / "limit"
        folder.mkdir()
        stack.callback(shutil.rmtree, folder)
        disk = limits.Disk.new(folder / "file", content, direct=place.direct)
        stack.callback(disk.close)
        entrants.append(Entrant(folder, partial(limits.threads, disk, 16), cached=False))
        entrants += await _peers(setup, content, stack)
        for store, cache in MEMORY if kind == "tmpfs" else DISK:
            way = "store" if store else "load"
            there = [each for each in entrants if each.takes_part(cache)]
            contenders = [each.prepared(cache, store=store) for each in there]
            cell = replace(place.cell("peers", block, 16, way), cache=cache)
            for row in await rows_of(cell, contenders, setup.rounds):
                yield row
        for blocks in ours.values():
            await blocks.close()


def _own(blocks: Blocks, name: str, in_a_call: int = 1) -> Entrant:
    """An engine, 16 blocks at a time: each by a call of its own, or two calls of several."""

    def contender(*, store: bool) -> Contender:
        one_by_one = blocks.contender(name, 16, store=store)
        if in_a_call == 1:
            return one_by_one
        run = partial(blocks.move_batches, in_a_call, store=store)
        return replace(one_by_one, name=f"{name}, {in_a_call} in a call", run=run)

    return Entrant(blocks.tier.root, contender, cached=blocks.tier.direct_io == "never")


def pythons(folder: Path) -> dict[str, Path]:
    """The interpreters of those peers that were made."""
    found = {name: python_of(name.partition("-")[0], folder) for name in PEERS}
    return {name: python for name, python in found.items() if python is not None}


async def _peers(setup: Setup, content: Content, stack: AsyncExitStack) -> list[Entrant]:
    """A process for each way in which a peer can work, of those that can here."""
    found: list[Entrant] = []
    for name, python in pythons(setup.peers).items():
        for variant in PEERS[name].variants:
            folder = Path(tempfile.mkdtemp(prefix=name, dir=setup.root))
            stack.callback(shutil.rmtree, folder)
            what = (variant, str(folder), str(content.block), str(content.count), "16")
            command = (str(python), str(Path(__file__).with_name("filepeers.py")), name, *what)
            full = f"{name}, {variant}".rstrip(", ")
            process = await stack.enter_async_context(started(full, *command))
            said = await process.ask(None)
            if "unavailable" in said:
                print(f"{full}: {said['unavailable']}", file=sys.stderr)
            else:
                found.append(_peer(process, folder, said, content.count))
    return found


def _peer(process: Process, folder: Path, said: dict[str, Any], count: int) -> Entrant:
    async def run(way: str) -> Sample:
        try:
            return await process.move(way)
        except RuntimeError as error:  # the others go on
            print(error, file=sys.stderr)
            return Sample(asked=count)

    def contender(*, store: bool) -> Contender:
        return Contender(
            name=process.name,
            run=partial(run, "store" if store else "load"),
            kind="peer",
            path=said["cache"],
            verified=said["verifies"],
            note=f"version {said['version']}",
        )

    return Entrant(folder, contender, cached=said["cache"] != "O_DIRECT")


SCENARIOS: dict[str, Callable[[Setup], Rows]] = {
    "sizes": sizes,
    "depths": depths,
    "single": single,
    "models": models,
    "batches": batches,
    "pages": pages,
    "mixed": mixed,
    "burst": burst,
    "evict": evict,
    "loop": loop,
    "busy": busy,
    "prefix": prefix,
    "peers": peers,
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=ending.directory, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=ending.count, default=5)
    parser.add_argument("--only", default=",".join(SCENARIOS))
    parser.add_argument("--gpu", type=int)
    parser.add_argument("--peers", type=Path, default=FOLDER)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=ending.output)
    chosen = parser.parse_args()
    if unknown := set(chosen.only.split(",")) - set(SCENARIOS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: choose from {', '.join(SCENARIOS)}")
    if chosen.gpu is not None and chosen.gpu not in (there := gpus()):
        parser.error(f"--gpu {chosen.gpu}: there are {len(there)} GPUs that CUDA can use here")
    return chosen


async def main() -> None:
    chosen = options()
    with tempfile.TemporaryDirectory(dir=chosen.root) as root, quiet():
        setup = Setup(
            root=Path(root),
            rounds=1 if chosen.quick else chosen.rounds,
            quick=chosen.quick,
            gpu=chosen.gpu,
            peers=chosen.peers,
        )
        async with setup.field() as place:
            machine = report(setup.root, place.plans)
        emit({"machine": machine}, chosen.out)
        for name in chosen.only.split(","):
            async for row in SCENARIOS[name](setup):
                emit(row, chosen.out)


if __name__ == "__main__":
    ending.run(main())
