"""Killed at any point, any number of times: what was acknowledged is there, what is there is right.

This file is also the program that gets killed. Run by itself it reads jobs, a line each, and forks
a child for each; the child tells what it begins and what was acknowledged, until it dies. Forking a
process that has imported everything takes milliseconds, so there can be many rounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

import kvgds.tiers.slabs
from kvgds.testing import HeldTransport
from kvgds.tiers.index import Changes, Index, connect
from kvgds.transport import NixlTransport
from kvgds.transport.agent import nixl
from support import MIB, NAMESPACE, PAGE, Watched, config, content, digest, opened, put

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZES = (1, 3 * PAGE, 7 * PAGE + 11)
WORKERS = 6


# --- the program that gets killed -----------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Fuse:
    """Burns down by one each time a point is passed; at zero it kills the process."""

    def __init__(self, point: str, count: int) -> None:
        self.point = point
        self.left = count

    def __call__(self, point: str) -> None:
        if point == self.point:
            self.left -= 1
            if not self.left:
                die()


class Mortal(HeldTransport):
    """Dies around the delivery of a transfer."""

    def __init__(self, fuse: Fuse) -> None:
        super().__init__(NixlTransport())
        self.fuse = fuse

    def submit(self, transfers: Any, deliver: Any) -> None:
        self.fuse("submit")
        super().submit(transfers, deliver)
        self.fuse("submitted")

    def _landed(self, passages: Any) -> None:
        self.fuse("landed")
        super()._landed(passages)
        self.fuse("delivered")


def mortal_index(fuse: Fuse) -> type[Index]:
    """An index that dies around a commit."""

    class MortalIndex(Index):
        def apply(self, changes: Changes) -> None:
            fuse("apply")
            kinds = ("put", "drop", "add_slab", "drop_slab")
            named = [kind for kind in kinds if getattr(changes, kind)]
            for kind in named:
                fuse(f"before {kind}")
            super().apply(changes)
            for kind in named:
                fuse(f"after {kind}")
            fuse("applied")

        def _write(self, changes: Changes) -> None:
            super()._write(changes)
            fuse("written")

    return MortalIndex


@dataclass
class Job:
    """What a child is to do."""

    root: str
    seed: int = 0
    first: int = 0  # its keys are numbered from here
    capacity: int = 64 * MIB
    point: str = ""
    count: int = 0
    ops: int = 400


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def live(job: Job) -> None:
    """Store, replace, delete and load, several at a time, telling of each begin and end."""
    fuse = Fuse(job.point, job.count)
    vars(kvgds.tiers.slabs)["Index"] = mortal_index(fuse)
    if job.point == "call":  # any system call on the directory that Python knows of
        sys.addaudithook(lambda _, args: fuse("call") if job.root in str(args) else None)
    settings = config(Path(job.root), tier={"capacity_bytes": job.capacity}, bounce_bytes=MIB)
    engine = Watched(settings, Mortal(fuse))
    await engine.open()
    say("open")
    chance, numbers = random.Random(job.seed), iter(range(job.first, job.first + job.ops))

    async def worker() -> None:
        for number in numbers:
            await one(engine, chance, number)

    async with asyncio.TaskGroup() as group:
        for _ in range(WORKERS):
            group.create_task(worker())
    await engine.aclose()
    say("closed")


async def one(engine: Watched, chance: random.Random, number: int) -> None:
    size = chance.choice(SIZES)
    await do(engine, "store", number, size)
    match chance.randrange(8):
        case 0:
            await do(engine, "delete", number, 0)
        case 1:
            await do(engine, "store", number, chance.choice(SIZES))
        case 2 | 3:
            memory = bytearray(size)
            if await engine.load(b"%d" % number, memory) and memory != content(number, size):
                say("wrong", number)


async def do(engine: Watched, act: str, number: int, size: int) -> None:
    say("begin", act, number, size)
    key = b"%d" % number
    if act == "store":
        await engine.store(key, content(number, size))
    else:
        await engine.delete(key)
    say("end", act, number, size)


def nursery() -> None:
    """Read jobs; for each, fork a child and wait until it is dead."""
    nixl()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                asyncio.run(live(Job(**json.loads(line))))
            finally:
                os._exit(0)
        say("child", child)
        _, status = os.waitpid(child, 0)
        say("dead", status)


# --- the other side -------------------------------------------------------------------------------


@dataclass
class Truth:
    """What must be there, what may be, from what the child said."""

    surely: dict[int, int] = field(default_factory=dict)  # number: size
    perhaps: dict[int, set[int]] = field(default_factory=dict)  # 0: not there
    acknowledged: list[int] = field(default_factory=list)

    def hear(self, words: list[str]) -> None:
        if words[0] == "begin":
            number, size = int(words[2]), int(words[3])
            before = self.surely.pop(number, 0)
            self.perhaps.setdefault(number, {before}).add(size)
        elif words[0] == "end":
            number, size = int(words[2]), int(words[3])
            del self.perhaps[number]
            if size:
                self.surely[number] = size
                self.acknowledged.append(number)


class Nursery:
    """The program above, kept running for many rounds."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()

    def run(self, job: Job, truth: Truth, kill_after: int | None = None) -> int:
        """Let a child live until it dies, or kill it after so many acknowledgements; its status."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(vars(job)) + "\n")
        self._process.stdin.flush()
        child, ends = 0, 0
        for words in self._words():
            if words[0] == "dead":
                return int(words[1])
            if words[0] == "child":
                child = int(words[1])
            assert words[0] != "wrong", words
            truth.hear(words)
            ends += words[0] == "end"
            if ends == kill_after:
                os.kill(child, signal.SIGKILL)
                kill_after = None
        raise AssertionError("the nursery has died")

    def _words(self) -> Iterator[list[str]]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield line.split()


async def inspect(root: Path, truth: Truth, capacity: int, must: set[int]) -> None:
    """Open the directory again and compare everything in it; leaving `opened` looks for leaks."""
    async with opened(root, tier={"capacity_bytes": capacity}) as engine:
        memory = {number: bytearray(size) for number, size in truth.surely.items()}
        items = [(b"%d" % number, each) for number, each in memory.items()]
        for (number, each), outcome in zip(
            memory.items(), await engine.load_many(items), strict=True
        ):
            assert outcome.hit or (outcome.status == "miss" and number not in must), outcome
            assert not outcome.hit or each == content(number, len(each))
            if not outcome.hit:
                del truth.surely[number]
        for number, sizes in truth.perhaps.items():
            found = await sole_size(engine, number, sizes)
            assert found in sizes, (number, found, sizes)
            if found:
                truth.surely[number] = found
        truth.perhaps.clear()
        assert engine.statistics().tiers[0].quarantined == 0


async def sole_size(engine: Watched, number: int, sizes: set[int]) -> int:
    """Under which of these sizes a block loads, its bytes compared; 0 if it is not there."""
    key = b"%d" % number
    if not await engine.prefix([key]):
        return 0
    for size in sizes - {0}:
        memory = bytearray(size)
        with contextlib.suppress(kvgds.ConfigError):  # it has another size
            assert await engine.load(key, memory)
            assert memory == content(number, size)
            return size
    raise AssertionError(f"block {number} has none of the sizes {sizes}")


# --- the rounds -----------------------------------------------------------------------------------

POINTS = (
    "submit",
    "submitted",
    "landed",
    "delivered",
    "apply",
    "written",
    "applied",
    "before put",
    "after put",
    "before drop",
    "after drop",
    "before add_slab",
    "after add_slab",
)


def test_killed_between_write_publish_and_index(tmp_path: Path) -> None:
    """At every step of a store or a removal, early and late, all on one directory."""
    truth, first = Truth(), 0
    with Nursery() as nursery:
        for point in POINTS:
            for count in (1, 9) if "slab" not in point else (1,):
                job = Job(str(tmp_path / "kv"), seed=first, first=first, point=point, count=count)
                status = nursery.run(job, truth)
                assert status == signal.SIGKILL or "slab" in point
                first += job.ops
                asyncio.run(inspect(tmp_path / "kv", truth, job.capacity, must=set(truth.surely)))
    assert len(truth.surely) > 20


def test_killed_at_random(tmp_path: Path) -> None:
    """While six stores, loads and removals are going on; all on one directory."""
    truth, first, chance = Truth(), 0, random.Random(20)
    with Nursery() as nursery:
        for _ in range(20):
            job = Job(str(tmp_path / "kv"), seed=first, first=first)
            status = nursery.run(job, truth, kill_after=chance.randrange(1, 120))
            assert status == signal.SIGKILL
            first += job.ops
            asyncio.run(inspect(tmp_path / "kv", truth, job.capacity, must=set(truth.surely)))
    assert len(truth.surely) > 200


def test_killed_while_blocks_are_evicted(tmp_path: Path) -> None:
    """A small tier: old blocks go all the time, slabs change their size, the newest stay."""
    truth, first, chance = Truth(), 0, random.Random(21)
    points = ["after drop", "before drop", "after drop_slab", "before drop_slab", "landed", ""]
    with Nursery() as nursery:
        for _ in range(3):
            for point in points:
                job = Job(str(tmp_path / "kv"), seed=first, first=first, capacity=MIB)
                job.point, job.count = point, chance.randrange(1, 9)
                nursery.run(job, truth, kill_after=chance.randrange(60, 200))
                first += job.ops
                newest = set(truth.acknowledged[-4:]) & truth.surely.keys()
                asyncio.run(inspect(tmp_path / "kv", truth, MIB, must=newest))


def test_killed_at_every_call_of_the_first_opening(tmp_path: Path) -> None:
    """Wherever making a directory is cut short, the next opening makes it whole."""
    with Nursery() as nursery:
        for count in range(1, 100):
            root = tmp_path / f"{count}" / "kv"
            root.parent.mkdir()
            truth = Truth()
            job = Job(str(root), point="call", count=count, ops=6)
            status = nursery.run(job, truth)
            asyncio.run(inspect(root, truth, job.capacity, must=set(truth.surely)))
            if status == 0:
                break
        assert 10 < count < 99


def test_what_a_dead_process_left_lying_about(tmp_path: Path) -> None:
    """A slab that the index does not know yet: its file goes, and the name is free again."""
    truth = Truth()
    with Nursery() as nursery:
        job = Job(str(tmp_path / "kv"), point="before add_slab", count=1)
        assert nursery.run(job, truth) == signal.SIGKILL
    assert list((tmp_path / "kv").glob("slab-*"))
    asyncio.run(inspect(tmp_path / "kv", truth, job.capacity, must=set()))
    assert not list((tmp_path / "kv").glob("slab-*"))


# --- a large index ------------------------------------------------------------------------------

MILLION = 1_000_000


def build(root: Path, blocks: int) -> list[bytes]:
    """A directory with so many blocks in its index, and slabs that are all hole."""
    asyncio.run(open_and_close(root))
    names = np.random.default_rng(1).bytes(16 * blocks)
    keys = [names[i : i + 16] for i in range(0, len(names), 16)]
    slot_bytes = 2 * PAGE
    with contextlib.closing(connect(root / "index.db")) as database:
        (number,) = database.execute(
            "SELECT id FROM namespace WHERE digest = ?", (digest(NAMESPACE),)
        ).fetchone()
        database.execute("BEGIN")
        database.execute("INSERT INTO slab VALUES (0, ?, ?)", (slot_bytes, blocks))
        rows = ((i, number, key, i + 1, PAGE, 1, i + 1, 0) for i, key in enumerate(keys))
        database.executemany("INSERT INTO block VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
        database.execute("COMMIT")
    slab = root / f"slab-00000000-{slot_bytes}.kv"
    slab.touch(0o600)
    os.truncate(slab, blocks * slot_bytes)
    return keys


async def open_and_close(root: Path) -> None:
    async with opened(root):
        pass


def test_a_million_blocks(tmp_path: Path) -> None:
    """Recovered in seconds, with progress; a prefix of a thousand takes about a millisecond."""
    root = tmp_path / "kv"
    keys = build(root, MILLION)
    put(root, b"real", content("real", PAGE))
    asyncio.run(measure(root, keys))


async def measure(root: Path, keys: list[bytes]) -> None:
    heard: list[tuple[str, int, int]] = []
    settings = config(root, tier={"capacity_bytes": 1 << 40})
    started = time.perf_counter()
    async with kvgds.open_engine(settings, progress=lambda *line: heard.append(line)) as engine:
        opening = time.perf_counter() - started
        assert engine.statistics().tiers[0].blocks == MILLION + 1
        assert heard[-1][1:] == (MILLION + 1, MILLION + 1)
        assert len(heard) > 10
        asked, times = [*keys[500_000:501_000], b"not there"], []
        for _ in range(21):
            started = time.perf_counter()
            assert await engine.prefix(asked) == 1000
            times.append(time.perf_counter() - started)
        memory = bytearray(PAGE)
        assert await engine.load(b"real", memory)
        assert memory == content("real", PAGE)
    prefix = statistics.median(times)
    print(f"opened in {opening:.1f} s, prefix of 1,000 in {prefix * 1e3:.3f} ms")  # noqa: T201 - to be seen with -s
    assert opening < 30
    assert prefix < 20e-3


if __name__ == "__main__":
    nursery()
