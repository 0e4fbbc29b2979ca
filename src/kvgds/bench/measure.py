"""Runs, and the rows made of them.

Machines are shared and noisy. So contenders take turns within one process group, a row has
the median of each with the range it was in, and beside every rate stands how many
operations succeeded out of those asked.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import statistics
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
    from pathlib import Path

    Row = dict[str, Any]

TICK_S = 5e-3
"""Of the ticker beside a run: rare enough to cost it nothing, and still 200 looks a second."""


@dataclass
class Sample:
    """One run of one contender.

    Attributes:
        nbytes: bytes that were to be moved.
        seconds: it took.
        cpu: CPU-seconds of the process and of children that have ended, kernel time included.
        asked: operations.
        succeeded: of them; a load only with the right bytes.
        latencies: seconds of each operation.
        late: seconds that a ticker on the event loop was late, each time; empty: there is no loop.
        path: how its bytes moved, where that was seen: a plan does not tell of each block.
    """

    nbytes: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    asked: int = 0
    succeeded: int = 0
    latencies: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    path: str = ""

    @property
    def rate(self) -> float:
        """GB/s."""
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def cpu_per_gib(self) -> float:
        """CPU-seconds a GiB."""
        return self.cpu / (self.nbytes / 2**30) if self.nbytes else 0.0


async def _not_run() -> Sample:
    raise NotImplementedError("its samples come from elsewhere")


@dataclass(frozen=True)
class Contender:
    """Whoever takes part.

    Attributes:
        name: in results.
        run: runs it once; not needed of one whose samples come from elsewhere.
        kind: of what: kvgds, what the machine gives without it, or what others use instead.
        tier: of an engine: ``slabs``, ``files``, ``bucket``.
        path: how bytes move.
        verified: whether it checks the bytes that it loads.
        slots: the engine in whose slots it moves bytes; None: it doesn't keep to any.
        anew: whether each run starts a process of its own, which so has nothing to warm up.
        note: what a reader has to know of its numbers.
    """

    name: str
    run: Callable[[], Awaitable[Sample]] = _not_run
    kind: Literal["engine", "limit", "peer"] = "engine"
    tier: str | None = None
    path: str | None = None
    verified: bool = False
    slots: str | None = None
    anew: bool = False
    note: str | None = None


@dataclass(frozen=True)
class Cell:
    """What contenders have in common that may be compared.

    Attributes:
        memory: ``host`` or ``gpu``.
        block: bytes of a block.
        fragments: pieces that it lies in.
        in_flight: blocks asked for at a time.
        direction: ``store``, ``load`` or ``both``.
        cache: what stands between memory and storage: ``O_DIRECT``, ``page cache, cold``, ...
    """

    scenario: str
    memory: str
    block: int
    fragments: int
    in_flight: int
    direction: str
    cache: str
    filesystem: str


async def alternate(
    contenders: Sequence[Contender], rounds: int
) -> list[tuple[Contender, list[Sample]]]:
    """Let each run once a round, the order turning; a first round, to warm up, doesn't count."""
    runs: list[tuple[Contender, list[Sample]]] = [(each, []) for each in contenders]
    for turn in range(rounds + 1):
        first = turn % len(runs)
        for contender, samples in runs[first:] + runs[:first]:
            if turn:
                samples.append(await contender.run())
            elif not contender.anew:
                await contender.run()
    return runs


def row_of(cell: Cell, contender: Contender, samples: Sequence[Sample], **more: object) -> Row:
    """What is said of one contender in one cell; medians over its runs."""
    rates = sorted(sample.rate for sample in samples)
    every = [each for sample in samples for each in sample.latencies]
    late = [each for sample in samples for each in sample.late]
    cpu = statistics.median(sample.cpu_per_gib for sample in samples)
    quantiles = {f"p{q}_ms": _ms(every, q / 100) for q in (50, 95, 99)}
    return {
        **asdict(cell),
        "contender": contender.name,
        "kind": contender.kind,
        "tier": contender.tier,
        "path": ", ".join(sorted({each.path for each in samples} - {""})) or contender.path,
        "verified": contender.verified,
        "slots": contender.slots,
        "rounds": len(samples),
        "GB/s": _round(statistics.median(rates)),
        "spread": [_round(rates[0]), _round(rates[-1])],
        **quantiles,
        "cpu_s_per_GiB": _round(cpu) if any(sample.cpu for sample in samples) else None,
        "late_p99_ms": _ms(late, 0.99),
        "succeeded": sum(sample.succeeded for sample in samples),
        "asked": sum(sample.asked for sample in samples),
        "note": contender.note,
        **more,
    }


async def rows_of(cell: Cell, contenders: Sequence[Contender], rounds: int) -> list[Row]:
    """Run a cell: a row a contender."""
    return [row_of(cell, *run) for run in await alternate(contenders, rounds)]


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, by rank."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * q), len(ordered) - 1)]


def _ms(values: Sequence[float], q: float) -> float | None:
    return _round(quantile(values, q) * 1e3) if values else None


def _round(value: float) -> float:
    """Three digits are more than the noise leaves; small ones keep theirs."""
    return float(f"{value:.3g}") if abs(value) < 1 else round(value, 3)


def cpu_seconds() -> float:
    """User and system time so far, of this process and of children that have ended."""
    uses = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


@contextmanager
def timed(sample: Sample) -> Iterator[Sample]:
    """Fill in a sample's time and CPU."""
    cpu, started = cpu_seconds(), time.perf_counter()
    yield sample
    sample.seconds = time.perf_counter() - started
    sample.cpu = cpu_seconds() - cpu


@asynccontextmanager
async def watched(sample: Sample) -> AsyncIterator[Sample]:
    """Fill in how late a ticker on this loop is, too."""
    ticker = asyncio.ensure_future(_tick(sample.late, TICK_S))
    try:
        with timed(sample):
            yield sample
    finally:
        ticker.cancel()
        await asyncio.wait([ticker])


async def _tick(late: list[float], every: float) -> None:
    while True:
        due = time.perf_counter() + every
        await asyncio.sleep(every)
        late.append(time.perf_counter() - due)


async def ticks(seconds: float) -> list[float]:
    """How late a ticker of 1 ms is, each time, for so long. Seconds."""
    late: list[float] = []
    ticker = asyncio.ensure_future(_tick(late, 1e-3))
    await asyncio.sleep(seconds)
    ticker.cancel()
    await asyncio.wait([ticker])
    return late


async def drive(
    count: int, in_flight: int, sample: Sample, operation: Callable[[int], Awaitable[bool]]
) -> None:
    """Await an operation for each number, so many at a time, and note how long each takes."""
    numbers = iter(range(count))

    async def work() -> None:
        for i in numbers:
            started = time.perf_counter()
            succeeded = await operation(i)
            sample.latencies.append(time.perf_counter() - started)
            sample.succeeded += succeeded

    sample.asked += count
    await asyncio.gather(*(work() for _ in range(in_flight)))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what imports left behind out of collections, which stop the loop for milliseconds."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def emit(row: Row, out: Path | None) -> None:
    """Print a row, and add it to a file of results, as JSON."""
    text = json.dumps(row)
    print(text, flush=True)  # noqa: T201 - what a bench does
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")
