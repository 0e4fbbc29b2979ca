"""The object tier against other clients of S3, its cost to the event loop, and a stack of tiers.

    python bench/objects.py [--root DIR] [--rounds 5] [--only objects,ticker,stack] [--quick]
                            [--peers DIR] [--out FILE]
                            [--server juicefs|memory | --endpoint URL --bucket NAME]

One JSON line a contender; speeds are medians of runs that alternate. `--quick` is one round of few
blocks, to see that it runs. It starts a server of its own: `juicefs gateway` below the root, or one
that has all in memory and costs little, s3memory.py. To an `--endpoint`, keys come from the
environment (AWS_ACCESS_KEY_ID ...), and all that is made in the bucket is removed.

aiobotocore and s3fs want a botocore of their own, so each runs in another process, of the
environment that `python bench/peers.py aws` has made.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

import boto3
from obstore.store import S3Store
from peers import FOLDER, PACKAGES, Process, started
from s3peers import PEERS, Job, Peer, Where, blocks, both_ways, jobs, ticks_beside
from s3server import KEYS, Server, server

import kvgds
from kvgds.bench import ending
from kvgds.bench.machine import report
from kvgds.bench.measure import (
    Cell,
    Contender,
    Sample,
    alternate,
    emit,
    quantile,
    quiet,
    row_of,
    ticks,
    timed,
)
from kvgds.memory import Arena

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from kvgds.bench.measure import Row

    Rows = AsyncIterator[Row]
    Run = Callable[[], Awaitable[Sample]]

MIB = 1 << 20
IN_FLIGHT = 16
UNASKED = "kvgds, nixl, without HEAD"


@dataclass
class Setup:
    """What is run, and where.

    Attributes:
        prefix: what all names in the bucket begin with.
        kind: of server.
        served: the server, if it is ours.
        aws: an interpreter that has aiobotocore and s3fs; None: they are left out.
    """

    root: Path
    rounds: int
    quick: bool
    where: Where
    prefix: str
    kind: str
    served: Server | None
    aws: Path | None
    janitor: Janitor = field(init=False)

    def __post_init__(self) -> None:
        self.janitor = Janitor(self.where, self.prefix)

    def few(self, count: int) -> int:
        """So many; a quick run does with less."""
        return 4 if self.quick else count

    @property
    def tick_s(self) -> float:
        """How long a ticker runs."""
        return 0.1 if self.quick else 1.0

    def server_cpu(self) -> float:
        return self.served.cpu_seconds() if self.served is not None else 0.0

    def cell(self, scenario: str, block: int, in_flight: int, direction: str) -> Cell:
        """What its contenders have in common."""
        return Cell(
            scenario=scenario,
            memory="host",
            block=block,
            fragments=1,
            in_flight=in_flight,
            direction=direction,
            cache=self.kind,
            filesystem="s3",
        )


class Janitor:
    """Removes what runs have left in the bucket, between them."""

    def __init__(self, where: Where, prefix: str) -> None:
        self._store = S3Store(
            where.bucket,
            region=where.region,
            endpoint=where.endpoint,
            virtual_hosted_style_request=False,
            disable_bulk_delete=True,
            client_options={"allow_http": True},
        )
        self._prefix = prefix

    def names(self, below: str = "") -> list[str]:
        return [each["path"] for page in self._store.list(self._prefix + below) for each in page]

    async def clear(self, below: str) -> None:
        names = await asyncio.to_thread(self.names, below)
        for start in range(0, len(names), IN_FLIGHT):
            some = names[start : start + IN_FLIGHT]
            await asyncio.gather(*(self._store.delete_async(name) for name in some))


# --- memory ---------------------------------------------------------------------------------


class Memory:
    """Page-aligned memory on huge pages, with blocks that don't compress."""

    def __init__(self, block: int, count: int) -> None:
        self.block, self.count = block, count
        self.arena = Arena(block * count)
        self.arena.bytes[:] = self._before = secrets.token_bytes(block * count)
        self.pieces = blocks(self.arena.bytes, block)

    def clear(self) -> None:
        self.arena.bytes[:] = bytes(len(self._before))

    def check(self) -> None:
        """Raise unless everything is as it was made."""
        if self.arena.bytes != self._before:
            raise RuntimeError(f"{self.block:,}-byte blocks came back different")


# --- kvgds ----------------------------------------------------------------------------------


def settings(setup: Setup, name: str, **changes: Any) -> kvgds.ObjectTier:  # noqa: ANN401 - any setting
    return kvgds.ObjectTier(
        bucket=setup.where.bucket,
        endpoint=setup.where.endpoint,
        region=setup.where.region,
        prefix=f"{setup.prefix}{name}",
        access_key=os.environ["AWS_ACCESS_KEY_ID"],
        secret_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        session_token=os.environ.get("AWS_SESSION_TOKEN"),
        connections=IN_FLIGHT,
        addressing="path",
        **changes,
    )


def config(*tiers: kvgds.FileTier | kvgds.ObjectTier) -> kvgds.EngineConfig:
    """An engine's settings with which 16 blocks of 8 MiB may be in flight in each direction."""
    return kvgds.EngineConfig(
        namespace=kvgds.Namespace(model="bench"),
        tiers=tiers,
        inflight_bytes=256 * MIB,
        bounce_bytes=512 * MIB,
    )


class Own(Peer):
    """kvgds, driven as the others are: a name is a key."""

    def __init__(self, engine: kvgds.Engine, memory: Memory) -> None:
        self.engine, self._pool = engine, None
        region, size = engine.register(memory.arena.bytes), memory.block
        views = [region[n * size : (n + 1) * size] for n in range(memory.count)]
        self._views = {id(p): view for p, view in zip(memory.pieces, views, strict=True)}

    @property
    def tier(self) -> str:
        """Where blocks lie, the first tier first."""
        return ", ".join(getattr(each, "layout", "bucket") for each in self.engine.config.tiers)

    @property
    def path(self) -> str:
        """How bytes move to each of its tiers."""
        plans = [plan for plan in self.engine.plan if plan.memory == "host"]
        return ", ".join(f"{plan.path} {plan.backend}" for plan in plans)

    def view(self, piece: memoryview) -> kvgds.View:
        return self._views[id(piece)]

    async def call(self, job: Job) -> int:
        move = self.engine.store if job.write else self.engine.load
        moved = await move(job.name.encode(), self.view(job.memory))
        return len(job.memory) if moved else 0

    async def miss(self, names: list[str]) -> None:
        """Look for blocks that are not there: for 10 s it then stores them without another look."""
        await asyncio.gather(*(self.engine.prefix([name.encode()]) for name in names))

    async def remove(self, names: list[str]) -> None:
        await asyncio.gather(*(self.engine.delete(name.encode()) for name in names))


async def own_peers(
    setup: Setup, memory: Memory, stack: AsyncExitStack, *, unasked: bool
) -> dict[str, Peer]:
    """An engine for each backend, and one whose stores come after a miss."""
    found: dict[str, Peer] = {}
    for name in ("kvgds, nixl", "kvgds, obstore", *((UNASKED,) if unasked else ())):
        backend = name.split(", ")[1]
        tier = settings(setup, name.replace(",", "").replace(" ", "-"), backend=backend)
        engine = await stack.enter_async_context(kvgds.open_engine(config(tier)))
        found[name] = Own(engine, memory)
    return found


# --- contenders -----------------------------------------------------------------------------


@dataclass
class Contenders:
    """All that take turns with one memory, and the CPU time that their runs took of the server."""

    setup: Setup
    memory: Memory
    peers: dict[str, Peer] = field(default_factory=dict)
    children: dict[str, Child] = field(default_factory=dict)
    served: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    turn: int = 0

    @property
    def names(self) -> list[str]:
        return [*self.peers, *self.children]

    def stem(self, name: str, what: str) -> str:
        """What a contender's names begin with."""
        return f"{self.setup.prefix}{name.replace(', ', '-').replace(' ', '-')}/{what}"

    def run(self, name: str, *, write: bool) -> Run:
        """Store all blocks under fresh names, or load those that `prepare` stored."""

        async def store() -> Sample:
            self.turn += 1
            stem = self.stem(name, f"fresh-{self.turn}")
            names = [job.name for job in jobs(stem, self.memory.pieces, write=True)]
            peer = self.peers.get(name)
            if name == UNASKED and isinstance(peer, Own):
                await peer.miss(names)
            sample = await self._served(name, stem, write=True)
            await self.clear(name, stem, names)
            return sample

        async def load() -> Sample:
            return await self._served(name, self.stem(name, "there"), write=False)

        return store if write else load

    async def clear(self, name: str, stem: str, names: list[str]) -> None:
        """Remove what a run stored. kvgds makes names of its own, of keys."""
        peer = self.peers.get(name)
        if isinstance(peer, Own):
            await peer.remove(names)
        else:
            await self.setup.janitor.clear(stem.removeprefix(self.setup.prefix))

    async def prepare(self) -> None:
        """Store what will be loaded."""
        for name in self.names:
            await self._served(name, self.stem(name, "there"), write=True)
        self.served.clear()

    async def _served(self, name: str, stem: str, *, write: bool) -> Sample:
        before = self.setup.server_cpu()
        if name in self.children:
            sample = await self.children[name].move(stem, write=write)
        else:
            sample = await move(self.peers[name], self.memory, stem, write=write)
        self.served[name].append((self.setup.server_cpu() - before) / (sample.nbytes / 2**30))
        return sample


async def move(peer: Peer, memory: Memory, stem: str, *, write: bool) -> Sample:
    """Move every block once, 16 at a time."""
    sample = Sample(nbytes=memory.block * memory.count)
    if not write:
        memory.clear()
    with timed(sample):
        moved = await peer.drive(jobs(stem, memory.pieces, write=write), IN_FLIGHT)
    memory.check()
    sample.asked, sample.succeeded = moved.asked, moved.succeeded
    sample.latencies = moved.latencies
    return sample


class Child:
    """A client in a process of its own."""

    def __init__(self, process: Process, block: int, count: int) -> None:
        self._process = process
        self._nbytes = block * count

    async def ask(self, **asked: object) -> dict[str, Any]:
        return await self._process.ask(json.dumps(asked))

    async def move(self, stem: str, *, write: bool) -> Sample:
        op = "store" if write else "load"
        return Sample(nbytes=self._nbytes, **await self.ask(op=op, stem=stem, in_flight=IN_FLIGHT))


@asynccontextmanager
async def child(
    setup: Setup, python: Path, client: str, block: int, count: int
) -> AsyncIterator[Child]:
    where = setup.where
    place = (where.endpoint, where.bucket, where.region, str(block), str(count))
    script = str(Path(__file__).with_name("s3peers.py"))
    async with started(client, str(python), script, client, *place) as process:
        await process.ask(None)
        yield Child(process, block, count)


@asynccontextmanager
async def contenders(
    setup: Setup, block: int, count: int, *, unasked: bool = False
) -> AsyncIterator[Contenders]:
    """Kvgds and the others on the same memory, and what they will load."""
    async with AsyncExitStack() as stack:
        memory = Memory(block, count)
        found = Contenders(setup, memory)
        found.peers |= await own_peers(setup, memory, stack, unasked=unasked)
        for name in ("obstore", "obstore, threads", "boto3, threads"):
            peer = PEERS[name](setup.where, IN_FLIGHT)
            await peer.open()
            stack.push_async_callback(peer.close)
            found.peers[name] = peer
        for name in ("aiobotocore", "s3fs") if setup.aws is not None else ():
            made = child(setup, setup.aws, name, block, count)
            found.children[name] = await stack.enter_async_context(made)
        await found.prepare()
        yield found


# --- scenarios ------------------------------------------------------------------------------


def contender(name: str, peer: Peer | None) -> Contender:
    """Of ours, each verifies what it loads; of the others, none."""
    if not isinstance(peer, Own):
        return Contender(name, kind="peer")
    return Contender(name, tier=peer.tier, path=peer.path, verified=True)


async def objects(setup: Setup) -> Rows:
    """1 and 8 MiB blocks, 16 in flight, stores and loads, checked when they arrive."""
    for block, whole in ((MIB, 128), (8 * MIB, 32)):
        async with contenders(setup, block, setup.few(whole), unasked=True) as all_of_them:
            for write in (True, False):
                all_of_them.served.clear()
                entries = [
                    replace(
                        contender(name, all_of_them.peers.get(name)),
                        run=all_of_them.run(name, write=write),
                    )
                    for name in all_of_them.names
                    if write or name != UNASKED
                ]
                cell = setup.cell("objects", block, IN_FLIGHT, "store" if write else "load")
                for each, samples in await alternate(entries, setup.rounds):
                    served = all_of_them.served[each.name][1:]
                    spent = round(statistics.median(served), 3) if setup.served else None
                    yield row_of(cell, each, samples, server_cpu_s_per_GiB=spent)
        await setup.janitor.clear("")


async def ticker(setup: Setup) -> Rows:
    """How much later a 1 ms ticker is while 16 blocks are stored and 16 loaded at any time.

    "elsewhere": a process of its own moves them, by obstore, and the loop here has nothing to do:
    what the server and a machine with few cores do to any ticker.
    """
    for block, most in ((MIB, 128), (8 * MIB, 32)):
        count = 2 * setup.few(most // 2)
        async with AsyncExitStack() as stack:
            there = await stack.enter_async_context(contenders(setup, block, count))
            python = Path(sys.executable)
            made = child(setup, python, "obstore", block, count)
            elsewhere = await stack.enter_async_context(made)
            await elsewhere.move(there.stem("elsewhere", "there"), write=True)
            ran: dict[str, list[Sample]] = defaultdict(list)
            idle: dict[str, list[list[float]]] = defaultdict(list)
            for turn in range(setup.rounds + 1):
                names = ["elsewhere", *there.names]
                at = turn % len(names)
                for name in names[at:] + names[:at]:
                    before, late, *counts = await _tick(there, elsewhere, name, f"ticks-{turn}")
                    if turn:
                        idle[name].append(before)
                        moved = {"succeeded": counts[0], "asked": counts[1]}
                        nbytes = counts[0] * block
                        sample = Sample(nbytes, setup.tick_s, late=late, **moved)
                        ran[name].append(sample)
            for name, samples in ran.items():
                before = statistics.median(quantile(run, 0.99) for run in idle[name])
                runs = [quantile(sample.late, 0.99) for sample in samples]
                worst = [max(sample.late) for sample in samples]
                yield row_of(
                    setup.cell("ticker", block, 2 * IN_FLIGHT, "both"),
                    contender(name, there.peers.get(name)),
                    samples,
                    idle_p99_ms=round(before * 1e3, 3),
                    p99_more_ms=round((statistics.median(runs) - before) * 1e3, 3),
                    p99_more_spread_ms=[round((f(runs) - before) * 1e3, 3) for f in (min, max)],
                    worst_ms=round(statistics.median(worst) * 1e3, 3),
                )
        await setup.janitor.clear("")


async def _tick(
    there: Contenders, elsewhere: Child, name: str, turn: str
) -> tuple[list[float], list[float], int, int]:
    """How late the ticker is idle, and beside one contender; blocks moved, and asked for."""
    setup, stem, fresh = there.setup, there.stem(name, "there"), there.stem(name, turn)
    stored: list[str] = []
    asked = {"op": "ticks", "stem": stem, "fresh": fresh}
    more = {"seconds": setup.tick_s, "in_flight": IN_FLIGHT}
    if name in there.children:
        answer = await there.children[name].ask(**asked, **more)
        ran = (answer["idle"], answer["late"], answer["succeeded"], answer["asked"])
    elif name == "elsewhere":
        asking = asyncio.ensure_future(elsewhere.ask(**asked, **more))
        idle = await ticks(setup.tick_s)  # the other process is idle for as long
        late = await ticks(setup.tick_s)
        answer = await asking
        ran = (idle, late, answer["succeeded"], answer["asked"])
    else:
        idle = await ticks(setup.tick_s)
        peer, pieces = there.peers[name], there.memory.pieces
        drives = both_ways(peer, stem, fresh, pieces, IN_FLIGHT)
        late, moved = await ticks_beside(drives, setup.tick_s)
        ran = (idle, late, sum(m.succeeded for m in moved), sum(m.asked for m in moved))
        stores = enumerate(moved[::2])
        stored = [f"{fresh}/{first}/{n}" for first, m in stores for n in range(m.asked)]
    await there.clear(name, fresh, stored)
    return ran


# --- a stack --------------------------------------------------------------------------------


async def stack(setup: Setup) -> Rows:
    """A FileTier in front: stores, the way of the backlog into the bucket, promotions."""
    for block, whole in ((MIB, 128), (8 * MIB, 32)):
        memory = Memory(block, setup.few(whole))
        async for row in _stores(setup, memory):
            yield row
        async for row in _promotions(setup, memory):
            yield row
        await setup.janitor.clear("")


def _file_tier(setup: Setup, stack: AsyncExitStack) -> kvgds.FileTier:
    root = Path(tempfile.mkdtemp(dir=setup.root))
    stack.callback(shutil.rmtree, root)
    return kvgds.FileTier(root=root / "kv", capacity_bytes=2 << 30)


async def _stores(setup: Setup, memory: Memory) -> Rows:
    """Stores acknowledged by the file tier alone and by the stack, and its backlog's way."""
    async with AsyncExitStack() as opening:
        tiers: dict[str, tuple[Any, ...]] = {
            "file tier alone": (_file_tier(setup, opening),),
            "object tier alone": (settings(setup, "alone"),),
            "stack, back": (_file_tier(setup, opening), settings(setup, "stack")),
        }
        peers = {}
        for name, these in tiers.items():
            peers[name] = Own(
                await opening.enter_async_context(kvgds.open_engine(config(*these))), memory
            )
        drains: list[Sample] = []
        turns = iter(range(1 << 30))

        def run(name: str) -> Run:
            async def store() -> Sample:
                stem, engine = f"{name} {next(turns)}", peers[name].engine
                sample = await move(peers[name], memory, stem, write=True)
                if name == "stack, back":
                    drains.append(await _drained(engine, memory.block))
                each = jobs(stem, memory.pieces, write=True)
                await peers[name].remove([job.name for job in each])
                return sample

            return store

        own = {
            name: replace(contender(f"kvgds, {name}", peer), run=run(name))
            for name, peer in peers.items()
        }
        runs = await alternate(list(own.values()), setup.rounds)
        taken = dict(zip(own, (samples for _, samples in runs), strict=True))
    acknowledged = setup.cell("stack: stores acknowledged", memory.block, IN_FLIGHT, "store")
    carried = setup.cell("stack: into the bucket", memory.block, IN_FLIGHT, "store")
    alone = own["object tier alone"]
    for name in ("file tier alone", "stack, back"):
        yield row_of(acknowledged, own[name], taken[name])
    yield row_of(carried, alone, taken["object tier alone"])
    yield row_of(carried, replace(alone, name="kvgds, backlog"), drains[1:])


async def _drained(engine: kvgds.Engine, block: int) -> Sample:
    """Wait until the bucket has everything: the backlog that there was, and how long it took."""
    owed, failed = _relay(engine).owed, _relay(engine).failed
    sample = Sample(nbytes=owed * block, asked=owed)
    with timed(sample):
        while _relay(engine).owed:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(1e-3)
    sample.succeeded = owed - (_relay(engine).failed - failed)
    return sample


def _relay(engine: kvgds.Engine) -> Any:  # noqa: ANN401 - its class is not exported
    return engine.statistics().relay


async def _promotions(setup: Setup, memory: Memory) -> Rows:
    """One load at a time of what only the bucket has: until it is there, and until it is kept."""
    count = min(memory.count, 32)
    keys = [f"promoted {n}".encode() for n in range(count)]
    usable: dict[str, list[list[float]]] = defaultdict(list)
    kept: list[list[float]] = []
    async with kvgds.open_engine(config(settings(setup, "promoted"))) as alone:
        peer = Own(alone, memory)
        owners = {"object tier alone": peer}
        views = [peer.view(piece) for piece in memory.pieces]
        for key, view in zip(keys, views, strict=False):
            await alone.store(key, view)
        for _ in range(setup.rounds + 1):
            times = await _loads(alone, keys, views, promotes=False)
            usable["object tier alone"].append(times[0])
            async with AsyncExitStack() as opening:
                tiers = (_file_tier(setup, opening), settings(setup, "promoted"))
                engine = await opening.enter_async_context(kvgds.open_engine(config(*tiers)))
                other = owners["stack"] = owners["stack, again"] = Own(engine, memory)
                theirs = [other.view(piece) for piece in memory.pieces]
                memory.clear()
                first = await _loads(engine, keys, theirs, promotes=True)
                usable["stack"].append(first[0])
                kept.append(first[1])
                again = await _loads(engine, keys, theirs, promotes=False)
                usable["stack, again"].append(again[0])
                succeeded = _relay(engine).promoted
    cell = setup.cell("stack: promotion", memory.block, 1, "load")
    for name, runs in usable.items():
        more: dict[str, object] = {}
        if name == "stack":
            ended = statistics.median(quantile(r, 0.5) for r in kept[1:])
            both = zip(runs[1:], kept[1:], strict=True)
            more = {
                "promoted_p50_ms": round(ended * 1e3, 3),
                "usable_before_promoted": round(statistics.median(p50_of(*b) for b in both), 3),
                "promoted": succeeded,
            }
        samples = [
            Sample(memory.block * len(run), sum(run), 0.0, len(run), len(run), latencies=run)
            for run in runs[1:]
        ]
        yield row_of(cell, contender(f"kvgds, {name}", owners[name]), samples, **more)


def p50_of(usable: list[float], kept: list[float]) -> float:
    """Of how much of the time until a block is kept it could not be used yet."""
    return statistics.median(u / k for u, k in zip(usable, kept, strict=True))


async def _loads(
    engine: kvgds.Engine, keys: list[bytes], views: list[kvgds.View], *, promotes: bool
) -> tuple[list[float], list[float]]:
    """Of each load: seconds until it returned, and until its promotion had ended."""
    usable, kept = [], []
    for key, view in zip(keys, views, strict=False):
        promoted = _relay(engine).promoted if promotes else 0
        started = time.perf_counter()
        if not await engine.load(key, view):
            raise RuntimeError(f"{key!r} was not there")
        usable.append(time.perf_counter() - started)
        while promotes and _relay(engine).promoted == promoted:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0)
        kept.append(time.perf_counter() - started)
    return usable, kept


SCENARIOS = {"objects": objects, "ticker": ticker, "stack": stack}


# --- running --------------------------------------------------------------------------------


def make_bucket(where: Where) -> None:
    client = boto3.client("s3", endpoint_url=where.endpoint, region_name=where.region)
    client.create_bucket(Bucket=where.bucket)
    client.close()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=ending.directory, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=ending.count, default=5)
    parser.add_argument("--only", default=",".join(SCENARIOS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peers", type=Path, default=FOLDER)
    parser.add_argument("--server", choices=("juicefs", "memory"), default="juicefs")
    parser.add_argument("--endpoint")
    parser.add_argument("--bucket")
    parser.add_argument("--region", default=os.environ.get("AWS_REGION", "us-east-1"))
    parser.add_argument("--out", type=ending.output)
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(SCENARIOS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: choose from {', '.join(SCENARIOS)}")
    if options.bucket and not options.endpoint:
        parser.error("--bucket: is for an --endpoint; a server of its own has one of its own")
    if options.endpoint and not os.environ.get("AWS_ACCESS_KEY_ID"):
        parser.error("--endpoint: give its keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    python = (options.peers / "aws/bin/python").absolute()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.root)))
        served = None
        if not options.endpoint:
            os.environ.pop("AWS_SESSION_TOKEN", None)
            os.environ.update(KEYS)
            served = stack.enter_context(server(options.server, root / "server"))
        endpoint = served.endpoint if served else options.endpoint
        where = Where(endpoint, options.bucket or "kvgds-bench", options.region)
        if served:
            make_bucket(where)
        setup = Setup(
            root=root,
            rounds=1 if options.quick else options.rounds,
            quick=options.quick,
            where=where,
            prefix=f"bench-{secrets.token_hex(4)}/",
            kind=options.server if served else "given",
            served=served,
            aws=python if python.exists() else None,
        )
        stack.enter_context(quiet())
        machine = report(root)
        left_out = "left out: python bench/peers.py aws"
        machine["aws"] = PACKAGES["aws"].requirements[0] if setup.aws else left_out
        emit({"machine": machine}, options.out)
        try:
            for name in options.only.split(","):
                async for row in SCENARIOS[name](setup):
                    emit(row, options.out)
        finally:
            await setup.janitor.clear("")


if __name__ == "__main__":
    ending.run(main())
