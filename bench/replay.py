"""A trace of requests against tiers too small for it: what they still hit, and what that saves.

    python bench/replay.py TRACE [--root DIR] [--capacities 0.01,0.1,0.5] [--block-bytes 4096]
                           [--prefill 10000] [--token-bytes 70272] [--limit N] [--out FILE]

The trace is Mooncake's kind (`kvgds replay --help`). A tier's capacity is a share of all the blocks
that the trace names. Beside the hit rate stands that of LRU itself, which keeps as many blocks and
takes one request after another, as with `in_flight` 1. With 8 in flight, a prefix that two of them
share can't hit, for neither has stored it yet.

Blocks are small, so that a disk holds the trace. What a hit saves is reckoned for real ones: the
time to prefill its 512 tokens at `--prefill` tokens a second, less the time to load them at
`--token-bytes` a token and the rate at which blocks of 16 MiB load in this run. 70,272 bytes are
DeepSeek-R1's.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kvgds.arguments import parse_size
from kvgds.bench import ending
from kvgds.bench.blocks import Blocks, Content, opened
from kvgds.bench.grid import Field
from kvgds.bench.machine import report
from kvgds.bench.measure import Contender, Sample, emit, row_of, rows_of
from kvgds.blocks import PAGE
from kvgds.errors import ConfigError
from kvgds.replay import TOKENS, Latency, Settings, part_blocks, replay, requests_of
from kvgds.tiers.space import slot_bytes_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvgds.bench.measure import Row

MIB = 1 << 20
PROBED = 16 * MIB
IN_FLIGHT = (1, 8)
"""Requests at a time."""


def lru_hit_rate(trace: Path, limit: int | None, blocks: int) -> float:
    """Of blocks: the longest prefix of each request that LRU still has, if it keeps so many."""
    kept: OrderedDict[int, None] = OrderedDict()
    asked = hits = 0
    for ids in requests_of(trace, limit):
        n = next((n for n, each in enumerate(ids) if each not in kept), len(ids))
        asked, hits = asked + len(ids), hits + n
        for each in ids:
            kept[each] = None
            kept.move_to_end(each)
            if len(kept) > blocks:
                kept.popitem(last=False)
    return hits / asked


async def load_rate(root: Path, rounds: int, nbytes: int) -> tuple[list[Row], float]:
    """Rows for 16 MiB loads, and their GB/s."""
    async with opened(root) as engine:
        place = Field(root, None, rounds, nbytes, {"kvgds": engine})
        blocks = Blocks(engine, Content(PROBED, nbytes // PROBED))
        await blocks.move(16, store=True)
        cell = place.cell("load", PROBED, 16, "load")
        rows = await rows_of(cell, [blocks.contender("kvgds", 16, store=False)], rounds)
        return rows, rows[0]["GB/s"]


def shares(text: str) -> list[float]:
    with suppress(ValueError):
        found = [float(each) for each in text.split(",")]
        if all(0 < each <= 1 for each in found):
            return found
    raise argparse.ArgumentTypeError(f"{text} must be shares above 0, at most 1, as 0.01,0.5")


def rate(text: str) -> float:
    with suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"{text} must be a number above 0")


def multiple(unit: int) -> Callable[[str], int]:
    """What takes sizes that are multiples of another."""

    def size(text: str) -> int:
        try:
            nbytes = parse_size(text)
        except typer.BadParameter as error:
            raise argparse.ArgumentTypeError(error.message) from None
        if not nbytes or nbytes % unit:
            raise argparse.ArgumentTypeError(f"{text} must be a multiple of {unit:,} bytes")
        return nbytes

    return size


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--root", type=ending.directory, default=Path(tempfile.gettempdir()))
    parser.add_argument("--capacities", type=shares, default="0.01,0.1,0.5")
    parser.add_argument("--block-bytes", type=multiple(PAGE), default=PAGE)
    parser.add_argument("--prefill", type=rate, default=10_000)
    parser.add_argument("--token-bytes", type=ending.count, default=70_272)
    parser.add_argument("--limit", type=ending.count)
    parser.add_argument("--rounds", type=ending.count, default=5, help="of the loads of 16 MiB")
    parser.add_argument(
        "--probe-bytes", type=multiple(PROBED), default=512 * MIB, help="of each round"
    )
    parser.add_argument("--out", type=ending.output)
    chosen = parser.parse_args()
    try:
        # What it would refuse is told now, and not after the loads that are measured first.
        part_blocks(Settings(chosen.root, chosen.block_bytes, in_flight=max(IN_FLIGHT)))
        requests = list(requests_of(chosen.trace, chosen.limit))
    except ConfigError as error:
        parser.error(str(error))
    every = len({block for ids in requests for block in ids})
    if not every:
        parser.error(f"trace={str(chosen.trace)!r}: is empty, or none of its requests has a block")
    slot = slot_bytes_for(chosen.block_bytes)
    root = Path(tempfile.mkdtemp(dir=chosen.root))
    try:
        async with opened(root) as engine:
            place = Field(root, None, 1, 0, {"kvgds": engine})
            path = f"{engine.plan[0].path} {engine.plan[0].backend}"
            emit({"machine": report(root, engine.plan)}, chosen.out)
        rows, gb_s = await load_rate(root, chosen.rounds, chosen.probe_bytes)
        emit(rows[0], chosen.out)
        saved_s = TOKENS / chosen.prefill - TOKENS * chosen.token_bytes / (gb_s * 1e9)
        for share in chosen.capacities:
            for in_flight in IN_FLIGHT:
                blocks = max(1, int(every * share))
                folder = root / f"{share}-{in_flight}"
                settings = Settings(
                    folder, chosen.block_bytes, blocks * slot, in_flight, chosen.limit
                )
                done = await replay(chosen.trace, settings, lambda *_: None)
                shutil.rmtree(folder)
                moved = done.hits + done.stored
                sample = Sample(
                    nbytes=done.bytes_loaded + done.bytes_stored,
                    seconds=done.seconds,
                    asked=moved + done.errors,
                    succeeded=moved,
                )
                cell = place.cell("replay", chosen.block_bytes, in_flight, "both")
                contender = Contender("kvgds", tier="slabs", path=path, verified=True)
                row = row_of(
                    cell,
                    contender,
                    [sample],
                    trace=chosen.trace.name,
                    requests=done.requests,
                    capacity=share,
                    capacity_blocks=blocks,
                    hit_rate=done.hit_rate,
                    lru_hit_rate=round(lru_hit_rate(chosen.trace, chosen.limit, blocks), 4),
                    bytes_loaded=done.bytes_loaded,
                    bytes_stored=done.bytes_stored,
                    evictions=done.evictions,
                    prefill_tokens_per_s=chosen.prefill,
                    token_bytes=chosen.token_bytes,
                    ttft_saved_s=round(done.hits * saved_s / done.requests, 4),
                )
                emit(
                    row | _times("prefix", done.prefix) | _times("load_many", done.load_many),
                    chosen.out,
                )
    finally:
        shutil.rmtree(root)


def _times(name: str, of: Latency) -> dict[str, float]:
    return {f"{name}_p50_ms": of.p50_ms, f"{name}_p99_ms": of.p99_ms}


if __name__ == "__main__":
    ending.run(main())
