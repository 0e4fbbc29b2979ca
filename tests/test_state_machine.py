"""The engine against a dict: calls in any order, restarts, evictions, corruption, cancels.

The dict knows what was stored under each key last. What the engine gives back must be that, to the
byte; what it does not give back must have been evicted, and counted; and in a tier of one size of
block, what was evicted was used no later than anything that is still there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import buckets
import support
from kvgds import BlockCorrupt, ConfigError, TransferTimeout
from kvgds.flights.batch import Flight
from support import PAGE, Watched, aligned, content, opened, unaligned

if TYPE_CHECKING:
    from kvgds import Statistics, TierStatistics
    from kvgds.testing import HeldTransport, Stage
    from s3 import JuiceServer, S3Server

KEYS = st.sampled_from([b"%d" % i for i in range(14)])
MANY = st.lists(KEYS, max_size=8, unique=True)
STAGES: st.SearchStrategy[Stage] = st.sampled_from(["start", "landing"])
SOON_S = 0.005


class Known(NamedTuple):
    """What was stored under a key last, and when it was used last."""

    version: int
    nbytes: int
    used: int


class Machine(RuleBasedStateMachine):
    """One directory, and the engine that has it open now."""

    sizes: tuple[int, ...]
    capacity: int
    quarantine = 2  # blocks that may be spoiled
    late_stores_appear = False  # see TierContract

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name) / "kv"
        self.known: dict[bytes, Known] = {}
        self.ticks = itertools.count()
        self.versions = itertools.count()
        self.corrupted = 0
        self.engine: Watched
        self.stack: contextlib.AsyncExitStack
        self.runner.run(self.open())

    async def open(self) -> None:
        self.stack = contextlib.AsyncExitStack()
        self.engine = await self.stack.enter_async_context(self.context())
        self.counts = {"hits": 0, "misses": 0, "stored": 0, "errors": 0}
        self.evicted = 0

    def context(self) -> contextlib.AbstractAsyncContextManager[Watched]:
        """The engine, to be opened."""
        tier = {"capacity_bytes": self.capacity}
        return opened(self.root, tier=tier, inflight_ops=2, bounce_bytes=64 * PAGE)

    def held(self) -> HeldTransport:
        """What carries the blocks that are to be held."""
        return self.engine.held

    def spoil(self, key: bytes, at: int) -> None:
        """Flip a byte of wherever a block lies."""
        support.spoil(self.root, key, at)

    def teardown(self) -> None:
        self.runner.run(self.stack.aclose())
        self.runner.close()
        self.folder.cleanup()

    # --- what the dict knows ----------------------------------------------------------

    def version(self, key: bytes) -> int:  # noqa: ARG002 - each store may have other bytes
        """What the next store of a key is."""
        return next(self.versions)

    def bytes_of(self, key: bytes) -> bytes:
        known = self.known[key]
        return content((key, known.version), known.nbytes)

    def memory(self, nbytes: int, data: bytes | int = 0, *, direct: bool) -> Any:
        buffer = (aligned if direct else unaligned)(nbytes, data)
        return buffer, self.engine.register(buffer) if direct else buffer

    async def forget_evicted(self, again: int = 0) -> None:
        """What is known but not there must have been evicted; `again`: how many came back since."""
        gone = [key for key in self.known if not await self.engine.prefix([key])]
        evictions = self.engine.statistics().tiers[0].evictions
        assert len(gone) <= evictions - self.evicted <= len(gone) + again
        self.evicted = evictions
        lost = [self.known.pop(key).used for key in gone]
        if len(self.sizes) == 1 and lost and self.known:
            assert max(lost) <= min(known.used for known in self.known.values())

    # --- rules ------------------------------------------------------------------------

    @rule(key=KEYS, size=st.integers(0, 2), direct=st.booleans())
    def store(self, key: bytes, size: int, *, direct: bool) -> None:
        self.runner.run(self._store([key], self.sizes[size % len(self.sizes)], direct=direct))

    @rule(keys=MANY, size=st.integers(0, 2), direct=st.booleans())
    def store_many(self, keys: list[bytes], size: int, *, direct: bool) -> None:
        self.runner.run(self._store(keys, self.sizes[size % len(self.sizes)], direct=direct))

    async def _store(self, keys: list[bytes], nbytes: int, *, direct: bool) -> None:
        again = 0
        versions = {key: self.version(key) for key in keys}
        items = [
            (key, self.memory(nbytes, content((key, version), nbytes), direct=direct)[1])
            for key, version in versions.items()
        ]
        outcomes = await self.engine.store_many(items)
        used = next(self.ticks)
        for key, outcome in zip(keys, outcomes, strict=True):
            if outcome.status == "present":
                assert self.known[key].nbytes == nbytes
                self.known[key] = self.known[key]._replace(used=used)
            else:
                assert outcome.status == "stored", outcome
                again += key in self.known
                self.known[key] = Known(versions[key], nbytes, used)
                self.counts["stored"] += 1
        await self.forget_evicted(again)

    @rule(keys=MANY, direct=st.booleans(), each=st.booleans())
    def load_many(self, keys: list[bytes], *, direct: bool, each: bool) -> None:
        self.runner.run(self._load(keys, direct=direct, each=each))

    @rule(key=KEYS, direct=st.booleans())
    def load(self, key: bytes, *, direct: bool) -> None:
        self.runner.run(self._load([key], direct=direct, each=False))

    async def _load(self, keys: list[bytes], *, direct: bool, each: bool) -> None:
        sizes = [self.known[key].nbytes if key in self.known else PAGE for key in keys]
        memory = {
            key: self.memory(size, 0xEE, direct=direct)
            for key, size in zip(keys, sizes, strict=True)
        }
        items = [(key, view) for key, (_, view) in memory.items()]
        if each:
            outcomes = [outcome async for outcome in self.engine.load_each(items)]
        else:
            outcomes = await self.engine.load_many(items)
        assert sorted(outcome.key for outcome in outcomes) == sorted(keys)
        used = next(self.ticks)
        for key, status in [(outcome.key, outcome.status) for outcome in outcomes]:
            buffer, _ = memory[key]
            if key in self.known:
                assert status == "hit"
                assert buffer.tobytes() == self.bytes_of(key)
                self.known[key] = self.known[key]._replace(used=used)
                self.counts["hits"] += 1
            else:
                assert status == "miss"
                assert (buffer == 0xEE).all()
                self.counts["misses"] += 1

    @rule(keys=st.lists(KEYS, max_size=10))
    def prefix(self, keys: list[bytes]) -> None:
        expected = len(list(itertools.takewhile(self.known.__contains__, keys)))
        assert self.runner.run(self.engine.prefix(keys)) == expected

    @rule(key=KEYS)
    def delete(self, key: bytes) -> None:
        there = self.runner.run(self.engine.delete(key))
        assert there == (self.known.pop(key, None) is not None)

    @rule()
    def restart(self) -> None:
        self.runner.run(self._restart())

    async def _restart(self) -> None:
        await self.stack.aclose()
        await self.open()

    @rule(key=KEYS)
    def load_into_the_wrong_size(self, key: bytes) -> None:
        if key in self.known:
            self.runner.run(self._wrong_size(key))

    async def _wrong_size(self, key: bytes) -> None:
        with pytest.raises(ConfigError):
            await self.engine.load(key, bytearray(self.known[key].nbytes + 1))
        self.counts["errors"] += 1

    @rule(key=KEYS, at=st.integers(0, 2 * PAGE))
    def corrupt(self, key: bytes, at: int) -> None:
        if key in self.known and self.corrupted < self.quarantine:
            self.runner.run(self._corrupt(key, at))

    async def _corrupt(self, key: bytes, at: int) -> None:
        nbytes = self.known.pop(key).nbytes
        stamp = 64 + len(key) + 8  # what of the stamp's page is more than padding
        place = PAGE + at % nbytes if at >= PAGE else at % stamp
        await asyncio.to_thread(self.spoil, key, place)
        with pytest.raises(BlockCorrupt):
            await self.engine.load(key, bytearray(nbytes))
        self.counts["errors"] += 1
        self.corrupted += 1

    @rule(key=KEYS, stage=STAGES, direct=st.booleans(), late=st.booleans())
    def give_up_a_load(self, key: bytes, stage: Stage, *, direct: bool, late: bool) -> None:
        if key in self.known:
            self.runner.run(self._give_up_a_load(key, stage, direct=direct, late=late))

    async def _give_up_a_load(self, key: bytes, stage: Stage, *, direct: bool, late: bool) -> None:
        buffer, view = self.memory(self.known[key].nbytes, direct=direct)
        self.known[key] = self.known[key]._replace(used=next(self.ticks))
        if await self.given_up(self.engine.load, key, view, stage, buffer, late=late):
            self.counts["errors"] += 1
        else:
            assert buffer.tobytes() == self.bytes_of(key)
            self.counts["hits"] += 1

    @rule(key=KEYS, stage=STAGES, direct=st.booleans(), late=st.booleans())
    def give_up_a_store(self, key: bytes, stage: Stage, *, direct: bool, late: bool) -> None:
        if key not in self.known:
            self.runner.run(self._give_up_a_store(key, stage, direct=direct, late=late))

    async def _give_up_a_store(self, key: bytes, stage: Stage, *, direct: bool, late: bool) -> None:
        version, nbytes = self.version(key), self.sizes[0]
        data = content((key, version), nbytes)
        buffer, view = self.memory(nbytes, data, direct=direct)
        if await self.given_up(self.engine.store, key, view, stage, buffer, late=late):
            self.counts["errors"] += 1
            if await self.engine.prefix([key]):
                assert self.late_stores_appear
                self.known[key] = Known(version, nbytes, next(self.ticks))
        else:
            self.known[key] = Known(version, nbytes, next(self.ticks))
            self.counts["stored"] += 1
        await self.forget_evicted()

    async def given_up(
        self, act: Any, key: bytes, view: Any, stage: Stage, buffer: Any, *, late: bool
    ) -> bool:
        """Cancel it while it is held at `stage`, or let its deadline pass; whether it failed."""
        held = self.held()
        held.hold(stage, lambda transfer: isinstance(getattr(transfer, "owner", None), Flight))
        task = asyncio.ensure_future(act(key, view, timeout_s=SOON_S if late else None))
        if not late:
            await held.wait_held(stage)
            task.cancel()
            await support.turns()
            held.release()
        end: object
        (end,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(end, asyncio.CancelledError):
            return False
        assert isinstance(end, TransferTimeout)
        if end.settled is None:
            buffer[:] = 0x55  # it is ours, and stays as it is
        held.release()
        if end.settled is not None:
            await end.settled
        await support.until(lambda: not self.engine.busy())
        assert end.settled is not None or (buffer == 0x55).all()
        return True

    # --- invariants -------------------------------------------------------------------

    @invariant()
    def the_numbers_add_up(self) -> None:
        now, tier = self.engine.statistics(), self.engine.statistics().tiers[0]
        assert {name: getattr(now, name) for name in self.counts} == self.counts
        assert now.quarantined_bytes == 0
        self.check_tier(now, tier)

    def check_tier(self, now: Statistics, tier: TierStatistics) -> None:
        """The numbers of the tier that was asked first."""
        assert (now.queued, now.in_flight) == (0, 0)
        assert tier.blocks == len(self.known)
        # A slab that changes hands takes its quarantine with it.
        lowest = self.corrupted if len(self.sizes) == 1 else 0
        assert lowest <= tier.quarantined <= self.corrupted
        assert tier.bytes_used <= self.capacity

    @invariant()
    def the_capacity_holds_on_disk(self) -> None:
        held = 0
        for path in self.root.glob("slab-*"):
            with contextlib.suppress(FileNotFoundError):  # given up at this very moment
                held += path.stat().st_size
        assert held <= self.capacity


class OneSize(Machine):
    sizes = (3 * PAGE,)
    capacity = 10 * 4 * PAGE


class ManySizes(Machine):
    sizes = (PAGE, 5 * PAGE + 3, 40 * PAGE)
    capacity = 220 * PAGE


class InBucket(Machine):
    """Objects: nothing is evicted, and of what is there so much is known as was seen."""

    late_stores_appear = True
    sizes: tuple[int, ...] = (PAGE, 5 * PAGE + 3)
    capacity = 0
    server: S3Server

    def __init__(self) -> None:
        self.bucket = self.server.make_bucket()
        super().__init__()

    def context(self) -> contextlib.AbstractAsyncContextManager[Watched]:
        objects = buckets.settings(self.server, self.bucket)
        return opened(None, objects=objects, inflight_ops=2, bounce_bytes=64 * PAGE)

    def held(self) -> HeldTransport:
        assert self.engine.held_objects is not None
        return self.engine.held_objects

    def spoil(self, key: bytes, at: int) -> None:
        buckets.spoil(self.server, self.bucket, buckets.name_of(key), at)

    async def forget_evicted(self, again: int = 0) -> None:  # noqa: ARG002 - nothing is
        assert [key for key in self.known if not await self.engine.prefix([key])] == []

    def check_tier(self, now: Statistics, tier: TierStatistics) -> None:
        assert (now.queued, now.in_flight) == (0, 0)
        assert tier.blocks <= len(self.known)
        assert tier.evictions == 0


class Stacked(InBucket):
    """A directory for few blocks in front of a bucket: nothing is ever lost."""

    capacity = 5 * 4 * PAGE
    sizes = (3 * PAGE,)
    write: Literal["back", "through", "demote"] = "back"

    def context(self) -> contextlib.AbstractAsyncContextManager[Watched]:
        objects = buckets.settings(self.server, self.bucket, write=self.write)
        tier = {"capacity_bytes": self.capacity}
        return opened(self.root, tier=tier, objects=objects, bounce_bytes=64 * PAGE)

    def __init__(self) -> None:
        self.deletes = Counter[bytes]()
        super().__init__()

    def version(self, key: bytes) -> int:
        """A key names its content, but for what was deleted in between."""
        return self.deletes[key]

    @rule(key=KEYS)
    def delete(self, key: bytes) -> None:
        super().delete(key)
        self.deletes[key] += 1

    def near(self, key: bytes) -> bool:
        return self.engine.near(key)

    def held(self) -> HeldTransport:
        return self.engine.held

    @rule(key=KEYS, stage=STAGES, direct=st.booleans(), late=st.booleans())
    def give_up_a_load(self, key: bytes, stage: Stage, *, direct: bool, late: bool) -> None:
        if key in self.known and self.near(key):
            super().give_up_a_load(key, stage, direct=direct, late=late)

    def spoil(self, key: bytes, at: int) -> None:
        """Wherever it is; uploads have ended."""
        if key in support.places(self.root):
            support.spoil(self.root, key, at)
        if self.server.get(self.bucket, buckets.name_of(key)) is not None:
            super().spoil(key, at)

    async def _corrupt(self, key: bytes, at: int) -> None:
        await support.until(lambda: not self.engine.busy())
        await super()._corrupt(key, at)

    def check_tier(self, now: Statistics, tier: TierStatistics) -> None:
        assert tier.blocks <= min(len(self.known), 5)
        assert tier.dropped == 0
        assert now.relay is not None
        assert now.relay.failed == 0


class StackedThrough(Stacked):
    write = "through"


class StackedDemote(Stacked):
    write = "demote"


@pytest.mark.parametrize("machine", [OneSize, ManySizes])
def test_the_engine_against_a_dict(machine: type[Machine]) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=25, stateful_step_count=40, deadline=None)
    )


@pytest.mark.parametrize("machine", [InBucket, Stacked, StackedThrough, StackedDemote])
def test_the_engine_with_a_bucket_against_a_dict(machine: type[InBucket], s3: JuiceServer) -> None:
    run_state_machine_as_test(
        type(machine.__name__, (machine,), {"server": s3}),
        settings=settings(max_examples=8, stateful_step_count=30, deadline=None),
    )
