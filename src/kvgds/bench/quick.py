"""What ``kvgds bench`` runs: this machine's paths beside its limits, in less than a minute."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvgds.bench.grid import copies, field_of, moves, ticker
from kvgds.bench.machine import report
from kvgds.bench.measure import quiet
from kvgds.blocks import PAGE
from kvgds.errors import PathUnavailable
from kvgds.memory.device import cuda

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from kvgds.bench.measure import Row

    Told = Callable[[str, int, int], None]

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
        nbytes: of all blocks of a run; sizes of which it is less than two are left out.
        rounds: that count.
        sizes: of blocks, and how many are in flight of each.
        tick_s: how long a ticker runs.
    """

    nbytes: int = 256 * MIB
    rounds: int = 3
    sizes: Sequence[tuple[int, int]] = ((4 * KIB, 1), (64 * KIB, 16), (MIB, 16), (16 * MIB, 16))
    tick_s: float = 0.5


def gpus() -> range:
    """The GPUs that CUDA can use here. Blocks while it is loaded."""
    try:
        return range(cuda().devices)
    except PathUnavailable:
        return range(0)


def first_gpu() -> int | None:
    """The GPU to measure; None: there is none. Blocks while CUDA is loaded."""
    return next(iter(gpus()), None)


async def quick(below: Path, gpu: int | None, scale: Scale, told: Told) -> AsyncIterator[Row]:
    """The machine's report, and then rows.

    Args:
        below: directory for the files, which are removed.
        gpu: whose memory is measured after the host's; None: of none.
        scale: how much.
        told: what is measured now, how many cells are done, and of how many.

    Raises:
        PathUnavailable: no NIXL, or no such GPU.
    """
    root = Path(tempfile.mkdtemp(prefix="kvgds-bench-", dir=below))
    sizes = [size for size in scale.sizes if 2 * size[0] <= scale.nbytes]
    steps = [(memory, size) for memory in dict.fromkeys((None, gpu)) for size in sizes]
    try:
        async with AsyncExitStack() as stack:
            places = {}
            for memory in dict.fromkeys((None, gpu)):
                opening = field_of(root, memory, scale.rounds, scale.nbytes)
                places[memory] = await stack.enter_async_context(opening)
            yield {
                "machine": report(root, [plan for each in places.values() for plan in each.plans])
            }
            stack.enter_context(quiet())
            for row in await copies(places[None], min(MIB, scale.nbytes // 2 // PAGE * PAGE)):
                yield row
            for n, (memory, (block, in_flight)) in enumerate(steps):
                told("measuring", n, len(steps) + 1)
                async for row in moves(places[memory], block, in_flight):
                    yield row
            told("measuring", len(steps), len(steps) + 1)
            for row in await ticker(places[None], MIB, 16, scale.tick_s):
                yield row
            told("measuring", len(steps) + 1, len(steps) + 1)
    finally:
        shutil.rmtree(root)
