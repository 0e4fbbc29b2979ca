"""Replays a trace of requests against an engine, and checks every byte that comes back.

A trace is Mooncake's: JSON lines with ``hash_ids``, one for each 512 tokens of the prompt.
Ids chain over the prefix, so what can be reused of a request is the longest run of its
first ids that is stored. Each request asks for that run, loads it, checks it, and stores
the rest. There is no pacing: as many requests as wanted are under way at any time.

The content of a block follows from its id. Requests run on the event loop; making and
checking content, and reading the trace, in its threads. Memory is bounded: each request
under way has one buffer to load into and one to store from, and long requests go through
them in parts.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import reprlib
import stat
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvgds.blocks import PAGE, Namespace, image_bytes
from kvgds.config import EngineConfig, FileTier
from kvgds.engine import open_engine
from kvgds.errors import ConfigError
from kvgds.memory import Arena
from kvgds.tiers.space import slot_bytes_for
from kvgds.upkeep import listing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from kvgds.blocks import BlockKey, Outcome
    from kvgds.engine import Engine
    from kvgds.memory import Region

    Words = npt.NDArray[np.uint64]

TOKENS = 512
"""Tokens of a block in Mooncake's traces."""

_PART_BLOCKS = 64  # most blocks of one call
_POOL_BYTES = 512 << 20  # of all buffers, unless single blocks are larger
_IDS = 1 << 63
_AHEAD = 64  # requests read at a time
_SHOWN = 20  # errors told one by one
_MODEL = "kvgds-replay"
_PAGE_WORDS = PAGE // 8


# --- the trace ----------------------------------------------------------------------------


def requests_of(trace: Path, limit: int | None = None) -> Iterator[tuple[int, ...]]:
    """The ids of each request, in order. Blocks.

    Raises:
        ConfigError: the trace can't be read, or a line of it is not a request.
    """
    try:
        if not stat.S_ISREG(os.stat(trace).st_mode):
            rule = "can't be read: it is read twice, so it must be a regular file and no pipe"
            raise ConfigError("trace", os.fspath(trace), rule)
        with open(trace, encoding="utf-8") as lines:
            numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
            for number, line in itertools.islice(numbered, limit):
                yield _ids_of(line, f"{trace}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("trace", os.fspath(trace), f"can't be read: {error}") from None


def _ids_of(line: str, where: str) -> tuple[int, ...]:
    try:
        request = json.loads(line)
    except ValueError as error:
        raise ConfigError("trace", where, f"is not JSON: {error}") from None
    except RecursionError:
        raise ConfigError("trace", where, "is nested too deeply for a request") from None
    ids = request.get("hash_ids") if isinstance(request, dict) else None
    if not isinstance(ids, list):
        raise ConfigError("trace", where, "must be an object with a list `hash_ids`")
    for block_id in ids:
        if type(block_id) is not int or not 0 <= block_id < _IDS:
            shown = reprlib.repr(block_id)
            raise ConfigError("trace", where, f"hash_ids: {shown} is no id of 0 to 2^63 - 1")
    return tuple(ids)


# --- content ------------------------------------------------------------------------------


def namespace(block_bytes: int) -> Namespace:
    """What the blocks of replays belong to: those of one size, whatever trace they are from."""
    return Namespace(_MODEL, layout=f"pattern-{block_bytes}", block_tokens=TOKENS)


def key_of(block_id: int) -> BlockKey:
    """The key of a hash id."""
    return b"id" + block_id.to_bytes(8, "big")


class Pattern:
    """The content of blocks: each page differs from every other of any block.

    A page is one random page, each word of it XORed with a number that follows from the
    block's id and the page's place in the block.
    """

    def __init__(self, block_bytes: int) -> None:
        self._pages = block_bytes // PAGE
        self._page: Words = np.random.default_rng(0x6B766764).integers(
            0, 1 << 64, _PAGE_WORDS, np.uint64
        )
        steps = np.arange(1, self._pages + 1, dtype=np.uint64)
        self._steps = steps * np.uint64(0xD1342543DE82EF95)

    def fill(self, ids: Sequence[int], memory: memoryview) -> None:
        """Write blocks, one behind the other."""
        np.bitwise_xor(self._page, self._marks(ids), out=self._words(memory, len(ids)))

    def differing(self, ids: Sequence[int], memory: memoryview) -> list[int]:
        """Which of the blocks in memory are not theirs; clears the memory.

        The memory is cleared so that a load that does nothing can't pass for a good one.
        """
        got = self._words(memory, len(ids))
        np.bitwise_xor(got, self._page, out=got)
        np.bitwise_xor(got, self._marks(ids), out=got)
        wrong = np.flatnonzero(got.any(axis=(1, 2)))
        got[:] = 0
        return [int(nth) for nth in wrong]

    def _words(self, memory: memoryview, blocks: int) -> Words:
        return np.frombuffer(memory, np.uint64).reshape(blocks, self._pages, _PAGE_WORDS)

    def _marks(self, ids: Sequence[int]) -> Words:
        """A number for each page, blocks x pages x 1: splitmix64 of id and page."""
        mixed = np.array(ids, np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15) + self._steps
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        marks: Words = (mixed ^ (mixed >> np.uint64(31)))[:, :, None]
        return marks


# --- what came of it ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Latency:
    """Of one kind of call, in milliseconds."""

    calls: int
    p50_ms: float
    p95_ms: float
    p99_ms: float


class Stopwatch:
    """Durations of calls, and the time in which at least one was under way."""

    def __init__(self) -> None:
        self.busy_s = 0.0
        self._durations: list[float] = []
        self._running = 0
        self._since = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what is inside."""
        started = time.perf_counter()
        if not self._running:
            self._since = started
        self._running += 1
        try:
            yield
        finally:
            now = time.perf_counter()
            self._durations.append(now - started)
            self._running -= 1
            if not self._running:
                self.busy_s += now - self._since

    def latency(self) -> Latency:
        """Percentiles of the durations."""
        if not self._durations:
            return Latency(0, 0.0, 0.0, 0.0)
        points = np.percentile(self._durations, (50, 95, 99)) * 1e3
        return Latency(len(self._durations), *(round(float(point), 3) for point in points))


@dataclass(frozen=True, slots=True)
class Result:
    """What a replay has done.

    Attributes:
        asked: blocks of all requests: those found and those not.
        hits: blocks loaded and right.
        misses: blocks that were not there, or had gone when they were to be loaded.
        stored: blocks written.
        bytes_verified: bytes compared with what they have to be.
        load_gb_s: bytes loaded over the time in which loads were under way.
        errors: blocks that failed or were wrong.
        messages: the first of those.
        path: how the bytes moved.
    """

    requests: int
    asked: int
    hits: int
    misses: int
    hit_rate: float
    stored: int
    evictions: int
    bytes_loaded: int
    bytes_stored: int
    bytes_verified: int
    load_gb_s: float
    store_gb_s: float
    seconds: float
    prefix: Latency
    load_many: Latency
    store_many: Latency
    errors: int
    messages: tuple[str, ...]
    path: str


@dataclass(slots=True)
class _Counts:
    requests: int = 0
    asked: int = 0
    loaded: int = 0
    hits: int = 0
    stored: int = 0
    errors: int = 0
    messages: list[str] = field(default_factory=list)
    prefixes: Stopwatch = field(default_factory=Stopwatch)
    loads: Stopwatch = field(default_factory=Stopwatch)
    stores: Stopwatch = field(default_factory=Stopwatch)

    def fault(self, text: str) -> None:
        self.errors += 1
        if len(self.messages) < _SHOWN:
            self.messages.append(text)


# --- the replay ---------------------------------------------------------------------------


class Settings(NamedTuple):
    """How a trace is replayed.

    Attributes:
        root: directory of the blocks.
        block_bytes: size of a block, whole pages.
        capacity_bytes: most bytes of blocks kept.
        in_flight: requests under way at a time.
        limit: most requests replayed; None: all.
        layout: of the directory.
    """

    root: Path
    block_bytes: int = 64 << 10
    capacity_bytes: int = 2 << 30
    in_flight: int = 8
    limit: int | None = None
    layout: str = "slabs"


async def replay(
    trace: Path, settings: Settings, progress: Callable[[str, int, int], None]
) -> Result:
    """Replay a trace to its end.

    The whole trace is looked through first, so that a bad line costs no I/O.

    Raises:
        ConfigError: a bad line or setting, or others' blocks lie there. Whatever opening an engine
            raises.
    """
    blocks = part_blocks(settings)
    total = await asyncio.to_thread(lambda: sum(1 for _ in requests_of(trace, settings.limit)))
    if not total:
        raise ConfigError("trace", os.fspath(trace), "is empty; it must hold a request a line")
    await asyncio.to_thread(_check_alone, settings.root)
    config = EngineConfig(
        namespace=namespace(settings.block_bytes),
        tiers=(
            FileTier(
                root=settings.root,
                capacity_bytes=settings.capacity_bytes,
                layout=settings.layout,  # type: ignore[arg-type]  # the model checks it
            ),
        ),
        bounce_bytes=64 << 20,
    )
    async with open_engine(config) as engine:
        run = Run(engine, settings.block_bytes, blocks, settings.in_flight)
        started = time.perf_counter()
        await run.all(requests_of(trace, settings.limit), lambda n: progress("requests", n, total))
        return run.result(time.perf_counter() - started)


def _check_alone(root: Path) -> None:
    """A replay would evict the blocks of others."""
    try:
        spaces = listing(root).namespaces
    except ConfigError:  # there is nothing yet; or an engine will tell what is wrong
        return
    if any(space.blocks and space.fields.get("model") != _MODEL for space in spaces):
        rule = "holds blocks of others, which a replay would evict; name another directory"
        raise ConfigError("root", os.fspath(root), rule)


def part_blocks(settings: Settings) -> int:
    """Blocks of one call, so that all buffers together stay within bounds.

    Raises:
        ConfigError: a setting can't be, or even one block a buffer would take too much memory.
    """
    size, in_flight = settings.block_bytes, settings.in_flight
    if size < PAGE or size % PAGE:
        raise ConfigError("block_bytes", size, f"must be a multiple of {PAGE}")
    if in_flight < 1:
        raise ConfigError("in_flight", in_flight, "must be at least 1")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 2 * in_flight * size > memory // 2:
        rule = f"{in_flight} requests with 2 blocks each need more than half of the memory"
        raise ConfigError("block_bytes", size, rule)
    need = image_bytes(size) if settings.layout == "files" else slot_bytes_for(size)
    if settings.capacity_bytes < need:
        rule = f"must be at least {need:,}, which one block takes with its stamp"
        raise ConfigError("capacity_bytes", settings.capacity_bytes, rule)
    return max(1, min(_PART_BLOCKS, _POOL_BYTES // (2 * in_flight * size)))


class Buffers(NamedTuple):
    """Memory of one request under way."""

    load: int  # offsets in the pool
    store: int


class Run:
    """One replay over an open engine."""

    def __init__(self, engine: Engine, block_bytes: int, part_blocks: int, in_flight: int) -> None:
        self._engine = engine
        self._block_bytes = block_bytes
        self._part = part_blocks
        self._pattern = Pattern(block_bytes)
        self._counts = _Counts()
        part_bytes = part_blocks * block_bytes
        self._arena = Arena(2 * in_flight * part_bytes)
        self._region: Region = engine.register(self._arena.bytes)
        self._free = [
            Buffers(2 * i * part_bytes, (2 * i + 1) * part_bytes) for i in range(in_flight)
        ]

    async def all(self, requests: Iterator[tuple[int, ...]], told: Callable[[int], None]) -> None:
        """Serve the requests, each as soon as there are buffers for it."""
        queue: asyncio.Queue[tuple[int, ...] | None] = asyncio.Queue(_AHEAD)
        try:
            async with asyncio.TaskGroup() as tasks:
                for buffers in self._free:
                    tasks.create_task(self._work(queue, buffers, told))
                while ahead := await asyncio.to_thread(
                    lambda: list(itertools.islice(requests, _AHEAD))
                ):
                    for request in ahead:
                        await queue.put(request)
                for _ in self._free:
                    await queue.put(None)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _work(
        self,
        queue: asyncio.Queue[tuple[int, ...] | None],
        buffers: Buffers,
        told: Callable[[int], None],
    ) -> None:
        while (ids := await queue.get()) is not None:
            await self.serve(ids, buffers)
            self._counts.requests += 1
            told(self._counts.requests)

    async def serve(self, ids: tuple[int, ...], buffers: Buffers) -> None:
        """Do what a server would for one request."""
        counts = self._counts
        counts.asked += len(ids)
        keys = [key_of(block_id) for block_id in ids]
        with counts.prefixes.running():
            n = await self._engine.prefix(keys)
        rest: list[int] = []
        for part in self._parts(ids[:n]):
            rest += await self.load(part, buffers.load)
        for part in self._parts((*rest, *ids[n:])):
            await self.store(part, buffers.store)

    def _parts(self, ids: Sequence[int]) -> Iterator[Sequence[int]]:
        for start in range(0, len(ids), self._part):
            yield ids[start : start + self._part]

    async def load(self, ids: Sequence[int], offset: int) -> list[int]:
        """Load blocks and check them; return those that have gone since they were seen."""
        counts = self._counts
        with counts.loads.running():
            outcomes = await self._engine.load_many(self._items(ids, offset))
        memory = self._arena.bytes[offset : offset + len(ids) * self._block_bytes]
        wrong = set(await asyncio.to_thread(self._pattern.differing, ids, memory))
        gone = []
        for nth, (block_id, outcome) in enumerate(zip(ids, outcomes, strict=True)):
            if not outcome.ok:
                counts.fault(f"load of id {block_id}: {outcome.error}")
            elif not outcome.hit:
                gone.append(block_id)
            else:
                counts.loaded += 1
                if nth in wrong:
                    counts.fault(f"id {block_id}: other bytes were loaded than were stored")
                else:
                    counts.hits += 1
        return gone

    async def store(self, ids: Sequence[int], offset: int) -> None:
        """Make blocks and store them."""
        counts = self._counts
        memory = self._arena.bytes[offset : offset + len(ids) * self._block_bytes]
        await asyncio.to_thread(self._pattern.fill, ids, memory)
        with counts.stores.running():
            outcomes: list[Outcome] = await self._engine.store_many(self._items(ids, offset))
        for block_id, outcome in zip(ids, outcomes, strict=True):
            if not outcome.ok:
                counts.fault(f"store of id {block_id}: {outcome.error}")
        counts.stored += sum(outcome.status == "stored" for outcome in outcomes)

    def _items(self, ids: Sequence[int], offset: int) -> list[tuple[BlockKey, object]]:
        size = self._block_bytes
        starts = range(offset, offset + len(ids) * size, size)
        return [
            (key_of(block_id), self._region[start : start + size])
            for block_id, start in zip(ids, starts, strict=True)
        ]

    def result(self, seconds: float) -> Result:
        """What came of it."""
        counts = self._counts
        loaded, stored = counts.loaded * self._block_bytes, counts.stored * self._block_bytes
        return Result(
            requests=counts.requests,
            asked=counts.asked,
            hits=counts.hits,
            misses=counts.asked - counts.loaded,
            hit_rate=round(counts.hits / counts.asked, 4) if counts.asked else 0.0,
            stored=counts.stored,
            evictions=self._engine.statistics().tiers[0].evictions,
            bytes_loaded=loaded,
            bytes_stored=stored,
            bytes_verified=loaded,
            load_gb_s=round(loaded / counts.loads.busy_s / 1e9, 3) if loaded else 0.0,
            store_gb_s=round(stored / counts.stores.busy_s / 1e9, 3) if stored else 0.0,
            seconds=round(seconds, 3),
            prefix=counts.prefixes.latency(),
            load_many=counts.loads.latency(),
            store_many=counts.stores.latency(),
            errors=counts.errors,
            messages=tuple(counts.messages),
            path="; ".join(str(plan).splitlines()[0] for plan in self._engine.plan),
        )
