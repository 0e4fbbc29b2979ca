"""Cells of the grid: engines and the machine's limits, for one size of blocks at a time."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kvgds.bench import limits
from kvgds.bench.blocks import Blocks, Content, opened
from kvgds.bench.measure import Cell, Contender, Sample, rows_of, ticks, timed
from kvgds.errors import PathUnavailable
from kvgds.paths import filesystem_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from kvgds.bench.measure import Row
    from kvgds.engine import Engine
    from kvgds.paths import PathPlan


@dataclass
class Field:
    """Where contenders meet: a directory, the engines on it, and how often each runs.

    Attributes:
        gpu: whose memory is measured; None: the host's.
        rounds: that count.
        nbytes: of all blocks of a run, if they are not very small.
        engines: by their names in results.
    """

    root: Path
    gpu: int | None
    rounds: int
    nbytes: int
    engines: dict[str, Engine] = field(default_factory=dict)

    @property
    def plans(self) -> list[PathPlan]:
        """How the engines' bytes move."""
        return [plan for engine in self.engines.values() for plan in engine.plan]

    @property
    def direct(self) -> bool:
        """Whether files are opened with O_DIRECT, as the first engine's are."""
        return bool(self.plans[0].direct_io)

    @property
    def queue(self) -> str:
        """What NIXL's POSIX plugin uses here: ``uring``, ``aio``."""
        return self.plans[0].backend.partition("/")[2]

    def cell(
        self, scenario: str, block: int, in_flight: int, direction: str, fragments: int = 1
    ) -> Cell:
        """What its contenders have in common."""
        return Cell(
            scenario=scenario,
            memory="host" if self.gpu is None else "gpu",
            block=block,
            fragments=fragments,
            in_flight=in_flight,
            direction=direction,
            cache="O_DIRECT" if self.direct else "page cache, warm",
            filesystem=filesystem_of(self.root),
        )

    def count(self, block: int, in_flight: int) -> int:
        """Blocks of a run; few of small ones, which else would take long."""
        return max(2, min(self.nbytes // block, 128 * in_flight))


@asynccontextmanager
async def field_of(root: Path, gpu: int | None, rounds: int, nbytes: int) -> AsyncIterator[Field]:
    """Open the engines that there can be: first the one that users get, and then its rivals.

    Of host memory that is the same without checksums, of a GPU's each other path.

    Args:
        root: a directory; theirs are made in it.
        gpu: see :class:`Field`.
        rounds: see :class:`Field`.
        nbytes: see :class:`Field`.

    Raises:
        PathUnavailable: no NIXL, or no such GPU.
    """
    place = Field(root, gpu, rounds, nbytes)
    async with AsyncExitStack() as stack:

        async def add(name: str, **settings: Any) -> str:  # noqa: ANN401 - of many kinds
            given = {"capacity_bytes": max(4 << 30, 4 * nbytes), **settings}
            engine = await stack.enter_async_context(opened(root, **given))
            place.engines[name] = engine
            return next((plan.path for plan in engine.plan if plan.memory == "gpu"), "none")

        way = await add("kvgds")
        if gpu is None:
            await add("kvgds, no checksum", verify="stamp")
        elif way == "none":
            raise PathUnavailable("there is no GPU here", place.plans[0].refused)
        elif way != "bounce":
            await add("kvgds, bounce", path="bounce")
        else:
            with suppress(PathUnavailable):  # the plan says why
                await add("kvgds, gds-compat", path="gds", allow_compat=True)
        yield place


async def moves(
    place: Field,
    block: int,
    in_flight: int,
    fragments: int = 1,
) -> AsyncIterator[Row]:
    """Stores and then loads of blocks of one size, beside what the disk and the copy alone take.

    Args:
        place: where.
        block: bytes.
        in_flight: blocks at a time.
        fragments: pieces that a block lies in.
    """
    content = Content(block, place.count(block, in_flight), place.gpu)
    try:
        blocks = {name: Blocks(each, content, fragments) for name, each in place.engines.items()}
        for store in (True, False):
            for each in blocks.values():
                await each.move(in_flight, store=True)
            with ExitStack() as stack:
                contenders: list[Contender] = []
                for name, each in blocks.items():
                    disk = limits.Disk.slots(each, direct=place.direct)
                    stack.callback(disk.close)
                    raw = limits.RawNixl(disk, place.queue)
                    stack.callback(raw.close)
                    there = [
                        each.contender(name, in_flight, store=store),
                        limits.threads(disk, in_flight, store=store),
                        raw.contender(in_flight, store=store),
                        limits.fio(disk, place.queue, in_flight, store=store),
                    ]
                    contenders += [replace(one, slots=name) for one in there if one is not None]
                if place.gpu is not None:
                    contenders.append(limits.copies(content, in_flight, store=store))
                direction = "store" if store else "load"
                cell = place.cell(direction, block, in_flight, direction, fragments)
                for row in await rows_of(cell, contenders, place.rounds):
                    yield row
        for each in blocks.values():
            await each.close()
    finally:
        content.close()


async def copies(place: Field, block: int) -> list[Row]:
    """What this machine's memory takes, on one thread and on as many as it has cores."""
    content = Content(block, place.count(block, 1))
    cell = place.cell("copy", block, 1, "copy")
    cell = replace(cell, memory="host", cache="memory", filesystem="none")
    counts = sorted({1, len(os.sched_getaffinity(0))})
    return await rows_of(cell, [limits.memory(content, n) for n in counts], place.rounds)


async def ticker(place: Field, block: int, in_flight: int, seconds: float) -> list[Row]:
    """How late a 1 ms ticker is on an idle loop, and with blocks under way both ways."""
    content = Content(block, 2 * in_flight)
    blocks = Blocks(place.engines["kvgds"], content)
    await blocks.move(in_flight, store=True)

    async def idle() -> Sample:
        sample = Sample()
        with timed(sample):
            sample.late = await ticks(seconds)
        return sample

    async def busy() -> Sample:
        sample, stop = Sample(), asyncio.Event()
        async with asyncio.TaskGroup() as movers:
            for i in range(in_flight):
                movers.create_task(_to_and_fro(blocks, i, stop, sample))
            with timed(sample):
                sample.late = await ticks(seconds)
            stop.set()
        return sample

    cell = place.cell("ticker", block, 2 * in_flight, "both")
    loaded = replace(blocks.contender("kvgds", in_flight, store=True), run=busy)
    rows = await rows_of(cell, [Contender("idle loop", idle, kind="limit"), loaded], place.rounds)
    await blocks.close()
    return rows


async def _to_and_fro(blocks: Blocks, i: int, stop: asyncio.Event, sample: Sample) -> None:
    """Load one block, and remove and store another, over and over."""
    other = i + blocks.content.count // 2

    async def store() -> bool:
        await blocks.engine.delete(blocks.keys[other])
        return await blocks.move_one(other, store=True)

    while not stop.is_set():
        moved = await asyncio.gather(store(), blocks.move_one(i, store=False))
        sample.asked += len(moved)
        sample.succeeded += sum(moved)
        sample.nbytes += sum(moved) * blocks.content.block
