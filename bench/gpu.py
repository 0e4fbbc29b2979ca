"""What only GPU memory has: blocks cut into fragments, gathered or not, and decoding beside it all.

    python bench/gpu.py [--root DIR] [--rounds 5] [--only fragments,decode] [--gpu 0] [--quick]
                        [--out FILE]

Rates of stores and loads by each path, beside those of disk and copies alone, are for
`files.py --gpu`. `--gpu none` runs this on host memory, where there is no GPU to try it on: it says
nothing of GPUs, and each row says so.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvgds.bench import ending
from kvgds.bench.blocks import Blocks, Content, opened
from kvgds.bench.grid import Field, field_of
from kvgds.bench.machine import report
from kvgds.bench.measure import Contender, Sample, emit, quiet, rows_of, timed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from kvgds.bench.measure import Row

    Rows = AsyncIterator[Row]

KIB, MIB = 1 << 10, 1 << 20
HOST = "host memory: nothing here is about a GPU"


@dataclass
class Setup:
    """What is run, on which engines."""

    place: Field
    quick: bool

    @property
    def gpu(self) -> int | None:
        return self.place.gpu

    async def rows(self, cell: Any, contenders: list[Contender]) -> list[Row]:  # noqa: ANN401 - a Cell
        """Of all contenders; those without a GPU say so."""
        if self.gpu is None:
            contenders = [replace(each, note=HOST) for each in contenders]
        return await rows_of(cell, contenders, self.place.rounds)


# --- fragments ------------------------------------------------------------------------------


async def fragments(setup: Setup) -> Rows:
    """2 MiB blocks cut ever smaller, beside the same in one piece.

    Where a path gathers fragments on the GPU, the same without that stands beside it; the plan of
    the first says up to which size it does.
    """
    block, count, in_flight = (256 * KIB, 4, 4) if setup.quick else (2 * MIB, 128, 16)
    async with AsyncExitStack() as stack:
        engines = dict(setup.place.engines)
        for name, engine in setup.place.engines.items():
            if any(plan.path.startswith("gds") for plan in engine.plan):
                compat = engine.config.allow_compat
                plain = opened(setup.place.root, path="gds", allow_compat=compat, gather_bytes=0)
                engines[f"{name}, not gathered"] = await stack.enter_async_context(plain)
        movers = {}
        for cut in (1, 64) if setup.quick else (1, 16, 64, 512):
            for name, engine in engines.items():  # cuFile knows memory once: each has its own
                content = Content(block, count, setup.gpu)
                stack.callback(content.close)
                blocks = Blocks(engine, content, cut)
                stack.push_async_callback(blocks.close)
                movers[name, cut] = blocks
        for store in (True, False):
            way = "store" if store else "load"
            contenders = [
                blocks.contender(f"{name}, {cut} fragments", in_flight, store=store)
                for (name, cut), blocks in movers.items()
            ]
            for row in await setup.rows(
                setup.place.cell("fragments", block, in_flight, way), contenders
            ):
                yield row


# --- decoding -------------------------------------------------------------------------------


class Decode:
    """Steps that read many weights for few tokens, as an LLM's decoding does.

    On a GPU a step is a graph on a stream of its own, and its time is CUDA's: what the interpreter
    lock costs shows in the wall time alone.
    """

    def __init__(self, setup: Setup) -> None:
        on_gpu = setup.gpu is not None
        layers, width, self.steps = (2, 256, 20) if setup.quick or not on_gpu else (64, 4096, 1000)
        kind: dict[str, Any] = {"device": f"cuda:{setup.gpu}" if on_gpu else "cpu"}
        kind["dtype"] = torch.bfloat16 if on_gpu else torch.float32
        weights = (torch.randn(width, width, **kind) for _ in range(layers))
        self._weights = [weight / width**0.5 for weight in weights]
        self._tokens = torch.randn(width, 16, **kind)
        self.run = self._run_on_gpu if on_gpu else self._run_on_host
        if on_gpu:
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

    async def beside(self, blocks: Blocks | None, in_flight: int, *, store: bool) -> Sample:
        """The same steps, alone or while blocks move; latencies are the steps'."""
        sample, stop = Sample(), asyncio.Event()

        async def mover(first: int) -> None:
            i = first
            while blocks is not None and not stop.is_set():
                if store:
                    await blocks.engine.delete(blocks.keys[i])
                sample.asked += 1
                moved = await blocks.move_one(i, store=store)
                sample.succeeded += moved
                sample.nbytes += blocks.content.block
                i = (i + in_flight) % blocks.content.count

        with timed(sample):
            async with asyncio.TaskGroup() as moving:
                for n in range(in_flight):
                    moving.create_task(mover(n))
                sample.latencies = await asyncio.to_thread(self.run)
                stop.set()
        return sample


async def decode(setup: Setup) -> Rows:
    """How much slower a decoding step is while blocks are stored or loaded."""
    block, count, in_flight = (64 * KIB, 16, 4) if setup.quick else (9 * MIB // 4, 64, 16)
    steps = Decode(setup)
    async with AsyncExitStack() as stack:
        nothing = partial(steps.beside, None, in_flight, store=False)
        contenders = [Contender("decoding alone", nothing, kind="limit")]
        for name, engine in setup.place.engines.items():
            content = Content(block, count, setup.gpu)
            stack.callback(content.close)
            blocks = Blocks(engine, content)
            stack.push_async_callback(blocks.close)
            await blocks.move(in_flight, store=True)
            for store in (False, True):
                run = partial(steps.beside, blocks, in_flight, store=store)
                plain = blocks.contender(f"{name}, {'store' if store else 'load'}", 1, store=store)
                contenders.append(replace(plain, run=run))
        cell = setup.place.cell("decode", block, in_flight, "both")
        for row in await setup.rows(cell, contenders):
            yield row


SCENARIOS: dict[str, Callable[[Setup], Rows]] = {"fragments": fragments, "decode": decode}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=ending.directory, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=ending.count, default=5)
    parser.add_argument("--only", default=",".join(SCENARIOS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--gpu", default="0", help="its number, or none")
    parser.add_argument("--out", type=ending.output)
    chosen = parser.parse_args()
    if unknown := set(chosen.only.split(",")) - set(SCENARIOS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: choose from {', '.join(SCENARIOS)}")
    found = torch.cuda.device_count()
    if chosen.gpu not in ("none", *map(str, range(found))):
        torches = f"torch {torch.__version__} finds {found} GPUs"
        parser.error(f"--gpu {chosen.gpu}: {torches}; --gpu none only tries this out")
    return chosen


async def main() -> None:
    chosen = options()
    gpu = None if chosen.gpu == "none" else int(chosen.gpu)
    rounds = 1 if chosen.quick else chosen.rounds
    with tempfile.TemporaryDirectory(dir=chosen.root) as root, quiet():
        async with field_of(Path(root), gpu, rounds, 0) as place:
            emit({"machine": report(Path(root), place.plans)}, chosen.out)
            for name in chosen.only.split(","):
                async for row in SCENARIOS[name](Setup(place, chosen.quick)):
                    emit(row, chosen.out)


if __name__ == "__main__":
    ending.run(main())
