"""What tests of a tier with a next one share: an engine whose backlog is the test.

The backlog here is the engine's side of `tiers.Backlog`. It takes blocks on when the test says so,
by loading them as any caller would; where the next tier would be, there is nothing.
"""

# ruff: noqa: SLF001 - an engine's tier is not for a caller to see
from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from kvgds.testing import HeldTransport
from kvgds.tiers.files import Files
from kvgds.tiers.slabs import Slabs
from kvgds.transport import NixlTransport
from support import PAGE, Watched, check_directory, config, content

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence
    from pathlib import Path

    from kvgds import EngineConfig
    from kvgds.paths import Move

SIZE = 3 * PAGE
SLOT = PAGE + SIZE


class Backlog:
    """Remembers what it was asked for."""

    def __init__(self) -> None:
        self.out = False
        self.hastened: list[bytes] = []

    def hasten(self, keys: Sequence[bytes]) -> None:
        self.hastened += [key for key in keys if key not in self.hastened]


class _Marking:
    """Says of moves what the engine of a stack would say."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.marked: set[bytes] = set()  # what the next tier has
        self.taken: set[bytes] = set()  # what is loaded for it

    def load(self, moves: Sequence[Move]) -> None:
        self._mark(moves, self.taken)
        cast("Any", super()).load(moves)

    def store(self, moves: Sequence[Move]) -> None:
        self._mark(moves, self.marked)
        cast("Any", super()).store(moves)

    @staticmethod
    def _mark(moves: Iterable[Move], keys: set[bytes]) -> None:
        for move in moves:
            move.mirrored = move.key in keys


class MarkingSlabs(_Marking, Slabs):
    pass


class MarkingFiles(_Marking, Files):
    pass


class Stacked(Watched):
    """An engine whose tier has a next one, as far as the tier can tell."""

    def __init__(self, settings: EngineConfig) -> None:
        super().__init__(settings, HeldTransport(NixlTransport()))
        alone = cast("Any", self._tiers[0])
        self.backlog = Backlog()
        self._settle_all = alone._services.settle
        self._loads: dict[bytes, Move] = {}
        services = replace(alone._services, backlog=self.backlog, settle=self._settled)
        kind = MarkingFiles if isinstance(alone, Files) else MarkingSlabs
        self.tier = kind(settings.tiers[0], settings.namespace, services)
        self._tiers = (self.tier,)
        self._flights.set_tiers(self._tiers)

    def _settled(self, moves: Sequence[Move]) -> None:
        self._loads.update((move.key, move) for move in moves if move.status == "hit")
        self._settle_all(moves)

    async def fill(self, *keys: bytes, nbytes: int = SIZE) -> None:
        """Store the content of these keys, one after the other."""
        for key in keys:
            assert await self.store(key, content(key, nbytes))

    async def promote(self, *keys: bytes) -> None:
        """Store what the next tier has."""
        self.tier.marked.update(keys)
        await self.fill(*keys)
        self.tier.marked.difference_update(keys)

    async def bring(self, key: bytes, nbytes: int = SIZE) -> Move:
        """Load a block for the next tier: the move that brought it."""
        self.tier.taken.add(key)
        memory = bytearray(nbytes)
        assert await self.load(key, memory)
        assert memory == content(key, nbytes)
        self.tier.taken.discard(key)
        return self._loads[key]

    async def upload(self, *keys: bytes, nbytes: int = SIZE) -> None:
        """Let the next tier have these, all at once."""
        self.tier.mirrored([await self.bring(key, nbytes) for key in keys])

    def start(self, key: bytes, nbytes: int = SIZE) -> asyncio.Future[bool]:
        """Begin a store."""
        return asyncio.ensure_future(self.store(key, content(key, nbytes)))

    async def there(self, *keys: bytes) -> list[bytes]:
        """Those of the keys that are there; asking uses none."""
        return [key for key in keys if await self.prefix([key])]

    def owed(self) -> list[bytes]:
        """What the tier still owes, as its next opening would say. Once."""
        return [key for key, _ in self.tier.owed()]

    @property
    def evicted(self) -> tuple[int, int]:
        """Blocks evicted, and those of them that the next tier lacked."""
        tier = self.statistics().tiers[0]
        return tier.evictions, tier.dropped

    async def aclose(self) -> None:
        if isinstance(self.tier, Slabs):
            self._slabs = list(self.tier._slots.slabs.values())  # closing forgets them
        await super().aclose()

    def check(self) -> None:
        super().check()
        slots = cast("Any", self.tier)._slots
        owed = {slot for size in slots.sizes.values() for slot in size.owed}
        clean = {slot for size in slots.sizes.values() for slot in size.clean}
        assert not owed & clean
        assert len(owed) == sum(slab.owed for slab in self._slabs)


@contextlib.asynccontextmanager
async def stacked(root: Path, slots: int = 4, **changes: Any) -> AsyncIterator[Stacked]:
    """An engine on a directory of slabs with so many slots; checked as `support.opened` does."""
    capacity = slots * SLOT
    engine = Stacked(config(root, tier={"capacity_bytes": capacity}, **changes))
    await engine.open()
    try:
        yield engine
    finally:
        engine.held.release()
        await engine.aclose()
    engine.check()
    await asyncio.to_thread(check_directory, root, capacity)


@contextlib.asynccontextmanager
async def sharing(root: Path, slots: int = 64, **changes: Any) -> AsyncIterator[Stacked]:
    """An engine on a directory of files with room for so many blocks."""
    tier = {"layout": "files", "capacity_bytes": slots * SLOT}
    engine = Stacked(config(root, tier=tier, **changes))
    await engine.open()
    try:
        yield engine
    finally:
        engine.held.release()
        await engine.aclose()


def marks(root: Path) -> dict[bytes, int]:
    """What the index says of each block: whether the next tier has it."""
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database:
        return dict(database.execute("SELECT key, mirrored FROM block ORDER BY key"))
