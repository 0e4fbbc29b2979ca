"""What the engine's tests share: engines that are checked when they close, memory, and side doors.

The side doors look into a slab directory by plain SQL and system calls. They use none of the
code under test, so that they can tell on it.
"""

# ruff: noqa: SLF001 - whether all that was lent came back is not for a caller to see
from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import mmap
import os
import signal
import sqlite3
import struct
import time
from dataclasses import asdict
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import xxhash

from kvgds import Cache, EngineConfig, FileTier, Namespace, ObjectTier, Region
from kvgds.engine import Engine
from kvgds.testing import HeldTransport, PlainTransfer
from kvgds.transport import LATER, NixlTransport
from kvgds.transport.objects import ObjectTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from kvgds.transport import Later
    from kvgds.transport.contract import Rows

PAGE = 4096
MIB = 1 << 20
NAMESPACE = Namespace(model="test", revision="1")
SLOT_BITS = 32
_TURNS, _PAUSE_S = 100, 1e-3


# --- transports -----------------------------------------------------------------------------


class Copying(PlainTransfer):
    """A transfer that a GPU's stream keeps from beginning for 0.2 s."""

    def begin(self) -> Rows | Later | None:
        rows = super().begin()
        self.due = getattr(self, "due", time.monotonic() + 0.2)
        return rows if time.monotonic() > self.due else LATER

    def check(self) -> None:
        """It has moved, and was looked at ever less often: every 0.1 ms would be 1,000 times."""
        looks = self.calls.count("begin")
        assert self.calls == ["begin"] * looks + ["end"]
        assert looks < 400


# --- engines --------------------------------------------------------------------------------


def config(
    root: Path | None,
    *,
    tier: dict[str, Any] | None = None,
    objects: ObjectTier | None = None,
    **changes: Any,
) -> EngineConfig:
    """Settings of a small engine, with these changes: of a directory, a bucket, or both."""
    tiers: list[FileTier | ObjectTier] = []
    if root is not None:
        tiers.append(FileTier(**{"root": root, "capacity_bytes": 16 * MIB, **(tier or {})}))
    if objects is not None:
        tiers.append(objects)
    small = {
        "namespace": NAMESPACE,
        "bounce_bytes": 2 * MIB,
        "timeout_s": 1e5,
        "drain_timeout_s": 10.0,
    }
    return EngineConfig(**{**small, "tiers": tiers, **changes})


class Watched(Engine):
    """An engine that remembers whose memory it was given, for `check`."""

    def __init__(self, settings: EngineConfig, transport: HeldTransport) -> None:
        last, self.held_objects = settings.tiers[-1], None
        if isinstance(last, ObjectTier):
            self.held_objects = HeldTransport(ObjectTransport(last))
        super().__init__(settings, transport, cast("Any", self.held_objects))
        self.held = transport
        self.regions: list[Region] = []

    def register(self, buffer: object) -> Region:
        region = super().register(buffer)
        self.regions.append(region)
        return region

    def register_cache(self, layers: Any, block_axis: int = 0) -> Cache:
        cache = super().register_cache(layers, block_axis)
        self.regions.append(cache.region)
        return cache

    def tier_idle(self) -> bool:
        return self._tiers[0].idle()

    async def close_tier(self) -> None:
        """What closing leaves undone when a transfer is wedged."""
        await asyncio.to_thread(self._tiers[0].close)

    def near(self, key: bytes) -> bool:
        """Whether the first tier has a block."""
        return self._tiers[0].contains(key)

    def hold_first(self) -> list[bytes]:
        """Hold the next transfer at its start, and no other; the keys of all, as they start."""
        order: list[bytes] = []

        def is_first(transfer: Any) -> bool:
            order.append(transfer.key)
            return len(order) == 1

        self.held.hold("start", is_first)
        return order

    def key_in_shut_slab(self, place: int) -> bytes:
        """Whose block is in this place of the slab that is given up just now."""
        slabs = cast("Any", self._tiers[0])._slots.slabs.values()
        key: bytes = next(slab.keys[place] for slab in slabs if slab.shut)
        return key

    def busy(self) -> bool:
        return self._flights.busy

    def deadlines(self) -> int:
        """How many are kept, those of calls that have ended included."""
        return len(self._flights.deadlines)

    def check(self) -> None:
        """Everything that was lent has come back, and every slot is somewhere."""
        flights = self._flights
        scheduler = flights.scheduler
        assert (scheduler.queued, scheduler.running, scheduler.queued_bytes) == (0, 0, 0)
        assert scheduler.free_bounce == self.config.bounce_bytes // PAGE * PAGE
        assert not flights._flights
        assert not flights.running
        assert flights.quarantined == 0
        assert len(flights.territory._claims) == 0
        assert [region.uses for region in self.regions] == [0] * len(self.regions)
        assert flights.relay is None or not flights.relay.busy
        assert all(tier.idle() for tier in self._tiers)
        first = self.config.tiers[0]
        if isinstance(first, FileTier) and first.layout == "slabs":
            self._check_slots(cast("Any", self._tiers[0])._slots, first.capacity_bytes)

    @staticmethod
    def _check_slots(slots: Any, capacity: int) -> None:
        sizes = slots.sizes.values()
        assert not any(size.waiting or size.going or size.pending for size in sizes)
        assert not slots.holds
        assert not slots.orphans
        used = [slot for size in sizes for slot in (*size.clean, *size.owed)]
        assert len(used) == sum(size.used for size in sizes)
        free = [slot for size in sizes for slab in size.open for slot in (*slab.fresh, *slab.free)]
        assert len(free) == sum(size.free for size in sizes)
        assert len({*used, *free}) == len(used) + len(free)
        keys = [key for part in slots.keys._parts for key in part]
        assert {slots.keys[key] for key in keys} <= set(used)
        assert len(keys) == len(slots.keys)
        assert slots.bytes_used == sum(size.used * size.slot_bytes for size in sizes)
        assert slots.slab_bytes == sum(size.slots * size.slot_bytes for size in sizes)
        assert slots.slab_bytes <= capacity
        lost = sum(size.slots for size in sizes) - len(used) - len(free)
        assert lost == slots.quarantined


@contextlib.asynccontextmanager
async def opened(root: Path | None, *, lanes: int = 1, **changes: Any) -> AsyncIterator[Watched]:
    """An engine on `root` whose transport can be held; checked, drained and checked on disk."""
    settings = config(root, **changes)
    engine = Watched(settings, HeldTransport(NixlTransport(lanes)))
    await engine.open()
    try:
        yield engine
    finally:
        engine.held.release()
        if engine.held_objects is not None:
            engine.held_objects.release()
        await engine.aclose()
    engine.check()
    first = settings.tiers[0]
    if isinstance(first, FileTier) and first.layout == "slabs":
        await asyncio.to_thread(check_directory, first.root, first.capacity_bytes)


@contextlib.contextmanager
def heard(number: signal.Signals) -> Iterator[None]:
    """Who is started meanwhile hears a signal, though we may have been started to ignore it."""
    before = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, before)


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop go on until the condition holds.

    Turn by turn at first. Then with pauses: a loop that never waits keeps the interpreter lock from
    all other threads for 5 ms each time they want it, wires to servers among them.
    """
    async with asyncio.timeout(20):
        for turn in itertools.count():
            if condition():
                return
            await asyncio.sleep(0 if turn < _TURNS else _PAUSE_S)


async def turns(count: int = 10) -> None:
    """Let the event loop take some turns, so that whatever can go on does."""
    for _ in range(count):
        await asyncio.sleep(0)


@contextlib.contextmanager
def index_held(root: Path) -> Iterator[None]:
    """A slab directory's index that another program has locked meanwhile."""
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database:
        database.execute("BEGIN IMMEDIATE")
        yield
        database.rollback()


@contextlib.contextmanager
def rows_kept(root: Path, table: str = "block") -> Iterator[None]:
    """A slab directory's index from which none of these can be removed meanwhile: "no"."""
    stay = f"CREATE TRIGGER stay BEFORE DELETE ON {table} BEGIN SELECT raise(ABORT, 'no'); END"
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database:
        database.execute(stay)
        yield
        database.execute("DROP TRIGGER stay")


# --- memory ---------------------------------------------------------------------------------


def content(name: object, nbytes: int) -> bytes:
    """Bytes that belong to a name."""
    return np.random.default_rng(list(repr(name).encode())).bytes(nbytes)


def aligned(nbytes: int, fill: bytes | int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Page-aligned memory that moves without a copy once it is registered."""
    memory = np.frombuffer(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    memory[:] = fill if isinstance(fill, int) else np.frombuffer(fill, np.uint8)
    return memory


def unaligned(nbytes: int, fill: bytes | int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Memory that has to go through the bounce region."""
    memory = aligned(-(-(nbytes + 1) // PAGE) * PAGE)[1 : nbytes + 1]
    memory[:] = fill if isinstance(fill, int) else np.frombuffer(fill, np.uint8)
    return memory


# --- side doors -----------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a block lies, from the index alone."""

    path: Path
    offset: int  # of its image
    nbytes: int
    slot: int
    generation: int


def digest(namespace: Namespace) -> bytes:
    """A namespace's 16 bytes, as docs/format.md has them."""
    text = json.dumps(asdict(namespace), sort_keys=True, separators=(",", ":"))
    return blake2b(text.encode(), digest_size=16).digest()


def places(root: Path, namespace: Namespace = NAMESPACE) -> dict[bytes, Place]:
    """Every block of the namespace that the index names."""
    found = {}
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database:
        sizes = dict(database.execute("SELECT id, slot_bytes FROM slab"))
        query = (
            "SELECT key, slot, nbytes, generation FROM block "
            "JOIN namespace ON namespace.id = block.namespace "
            "WHERE digest = ? AND key IS NOT NULL ORDER BY generation"
        )
        for key, slot, nbytes, generation in database.execute(query, (digest(namespace),)):
            slab, place = slot >> SLOT_BITS, slot & ((1 << SLOT_BITS) - 1)
            path = root / f"slab-{slab:08d}-{sizes[slab]}.kv"
            found[key] = Place(path, place * sizes[slab], nbytes, slot, generation)
    return found


def stored(root: Path, key: bytes, namespace: Namespace = NAMESPACE) -> bytes | None:
    """A block's payload, by plain reads."""
    place = places(root, namespace).get(key)
    return None if place is None else read_at(place.path, place.offset + PAGE, place.nbytes)


def read_at(path: Path, offset: int, nbytes: int) -> bytes:
    """Bytes of a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, nbytes, offset)
    finally:
        os.close(fd)


def write_at(path: Path, offset: int, data: bytes) -> None:
    """Change bytes of a file, down to the disk, so that direct reads see them."""
    fd = os.open(path, os.O_RDWR)
    try:
        assert os.pwrite(fd, data, offset) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)


def spoil(root: Path, key: bytes, at: int = PAGE, namespace: Namespace = NAMESPACE) -> None:
    """Flip the bits of one byte of a block's image."""
    place = places(root, namespace)[key]
    (byte,) = read_at(place.path, place.offset + at, 1)
    write_at(place.path, place.offset + at, bytes([byte ^ 0xFF]))


def image(namespace: Namespace, key: bytes, generation: int, payload: bytes) -> bytes:
    """A stored block, made by hand as docs/format.md says."""
    checksum = xxhash.xxh3_128_digest(payload)
    head = struct.pack(
        "<8sHHI16sQQ16s",
        b"kvgdsblk", 1, 1, len(key), digest(namespace), generation, len(payload), checksum,
    )  # fmt: skip
    stamp = head + key + xxhash.xxh3_64_digest(head + key)
    padding = -len(payload) % PAGE
    return stamp + bytes(PAGE - len(stamp)) + payload + bytes(padding)


def put(root: Path, key: bytes, payload: bytes, namespace: Namespace = NAMESPACE) -> None:
    """Put a block into a directory of slabs, in a slab of its own."""
    whole = image(namespace, key, 7, payload)
    step = max(PAGE, 1 << max(len(whole).bit_length() - 7, 0))
    slot_bytes = -(-len(whole) // step) * step
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database, database:
        (slab,) = database.execute("SELECT coalesce(max(id), -1) + 1 FROM slab").fetchone()
        (number,) = database.execute(
            "SELECT id FROM namespace WHERE digest = ?", (digest(namespace),)
        ).fetchone()
        database.execute("INSERT INTO slab VALUES (?, ?, 1)", (slab, slot_bytes))
        row = (slab << SLOT_BITS, number, key, 7, len(payload), 1, 7, 0)
        database.execute("INSERT INTO block VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
    path = root / f"slab-{slab:08d}-{slot_bytes}.kv"
    path.write_bytes(whole + bytes(slot_bytes - len(whole)))


def check_directory(root: Path, capacity: int) -> None:
    """The directory holds what the index says and nothing else, whole, private, within bounds."""
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        slabs = database.execute("SELECT id, slot_bytes, slots FROM slab").fetchall()
        slots = [slot for (slot,) in database.execute("SELECT slot FROM block")]
    files = {f"slab-{slab:08d}-{size}.kv": size * count for slab, size, count in slabs}
    room = {slab: count for slab, _, count in slabs}
    on_disk = {path.name: path.stat() for path in root.iterdir()}
    names = {name for name in on_disk if name.startswith("slab-")}
    assert names == set(files)
    assert all(on_disk[name].st_size == files[name] for name in names)
    assert sum(files.values()) <= capacity
    assert set(on_disk) - names <= {
        "kvgds.json",
        "lock",
        "index.db",
        "index.db-wal",
        "index.db-shm",
    }
    assert {oct(status.st_mode & 0o777) for status in on_disk.values()} == {"0o600"}
    wild = [
        slot
        for slot in slots
        if slot & ((1 << SLOT_BITS) - 1) >= room.get(slot >> SLOT_BITS, 1 << 31)
    ]
    assert not wild
