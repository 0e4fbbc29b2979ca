"""A file tier in front of a bucket: what is where when, and what works when one of them fails."""

from __future__ import annotations

import asyncio
import errno
import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Literal

import pytest

import buckets
import support
from buckets import blocks, name_of, payload_of, settings
from kvgds import (
    BlockCorrupt,
    ConfigError,
    EngineConfig,
    FileTier,
    Namespace,
    ObjectTier,
    TransferError,
    TransferTimeout,
)
from kvgds.testing import TierContract, skip_time
from support import MIB, NAMESPACE, PAGE, Watched, content, image, opened, turns, until
from wire import Wire
from wirefaults import s3_error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from s3 import JuiceServer, S3Server

SIZE = 3 * PAGE
SLOT = PAGE + SIZE
Write = Literal["back", "through", "demote"]


class Place:
    """A directory and a bucket behind a wire."""

    def __init__(self, root: Path, server: S3Server, wire: Wire) -> None:
        self.root = root
        self.server = server
        self.wire = wire
        self.bucket = server.make_bucket()

    def opened(
        self,
        write: Write = "back",
        root: Path | None = None,
        patience_s: float = 5.0,  # a busy machine takes its time
        **changes: Any,
    ) -> Any:
        far = settings(
            self.server,
            self.bucket,
            endpoint=self.wire.endpoint,
            write=write,
            connect_timeout_s=patience_s,
            request_timeout_s=patience_s,
            retries=0,
        )
        given = {"timeout_s": 20.0, "drain_timeout_s": 20.0, **changes}
        return opened(root or self.root, objects=far, **given)

    def put(self, *keys: bytes) -> None:
        """Put blocks into the bucket as another machine would have."""
        for key in keys:
            buckets.put(self.server, self.bucket, key, content(key, SIZE))

    def there(self) -> dict[str, bytes]:
        """Payloads in the bucket, by name."""
        found = blocks(self.server, self.bucket)
        return {name: payload_of(whole) or b"" for name, whole in found.items()}

    async def wait_there(self, *keys: bytes) -> None:
        """Wait until the bucket has these blocks, and no others."""
        wanted = {name_of(key): content(key, SIZE) for key in keys}
        async with asyncio.timeout(20):
            while await asyncio.to_thread(self.there) != wanted:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0)


@pytest.fixture
def place(tmp_path: Path, s3: JuiceServer) -> Iterator[Place]:
    with Wire(s3.host, s3.port) as wire:
        yield Place(tmp_path / "kv", s3, wire)


async def fill(engine: Watched, *keys: bytes) -> None:
    for key in keys:
        assert await engine.store(key, content(key, SIZE))


async def load(engine: Watched, key: bytes) -> bytes | None:
    memory = bytearray(SIZE)
    return bytes(memory) if await engine.load(key, memory) else None


def relay(engine: Watched) -> tuple[int, int, int, int]:
    found = engine.statistics().relay
    assert found is not None
    return found.owed, found.uploaded, found.failed, found.promoted


KEYS = [b"%d" % i for i in range(10)]


# --- the contract -------------------------------------------------------------------------------


class Stack(TierContract):
    """What every tier must pass; side doors open the directory and the bucket."""

    layout = "slabs"
    write: Write = "back"

    @pytest.fixture(autouse=True)
    def _server(self, s3: JuiceServer) -> None:
        self.server = s3
        self.bucket = s3.make_bucket()

    def make_tiers(self, root: Path, **changes: Any) -> tuple[FileTier, ObjectTier]:
        given = {"root": root, "capacity_bytes": 16 << 20, "layout": self.layout, **changes}
        far = settings(self.server, self.bucket, prefix=root.name, write=self.write)
        return FileTier(**given), far

    def _far(self, root: Path, namespace: Namespace, key: bytes) -> str:
        return name_of(key, namespace, f"{root.name}/")

    def _near(self, root: Path, namespace: Namespace, key: bytes) -> Path:
        return root / name_of(key, namespace)

    def side_get(self, root: Path, namespace: Namespace, key: bytes) -> bytes | None:
        if self.layout == "slabs":
            found = support.stored(root, key, namespace)
        else:
            path = self._near(root, namespace, key)
            found = payload_of(path.read_bytes()) if path.exists() else None
        far = payload_of(self.server.get(self.bucket, self._far(root, namespace, key)))
        assert far in (None, found) or found is None
        return found if found is not None else far

    def side_set(self, root: Path, namespace: Namespace, key: bytes, payload: bytes) -> None:
        whole = image(namespace, key, 0, payload)
        self.server.put(self.bucket, self._far(root, namespace, key), whole)

    def side_spoil(self, root: Path, namespace: Namespace, key: bytes, at: int) -> None:
        if self.layout == "slabs":
            support.spoil(root, key, at, namespace)
        else:
            path = self._near(root, namespace, key)
            (byte,) = support.read_at(path, at, 1)
            support.write_at(path, at, bytes([byte ^ 0xFF]))
        far = self._far(root, namespace, key)
        if self.server.get(self.bucket, far) is not None:
            buckets.spoil(self.server, self.bucket, far, at)


class TestSlabsBack(Stack):
    """Blocks go on to the bucket in their own time."""


class TestSlabsThrough(Stack):
    """A store ends when the bucket has the block."""

    write = "through"


class TestSlabsDemote(Stack):
    """Blocks go on when the directory is full."""

    write = "demote"


class TestFilesThrough(Stack):
    """A directory that is shared."""

    layout = "files"
    write = "through"


# --- where blocks are ---------------------------------------------------------------------------


async def test_back_stores_at_once_and_uploads_later(place: Place) -> None:
    async with place.opened("back") as engine:
        place.wire.hold(method="PUT")
        await fill(engine, *KEYS)
        assert relay(engine)[:2] == (10, 0)
        place.wire.ok()
        await place.wait_there(*KEYS)
        await until(lambda: relay(engine) == (0, 10, 0, 0))


async def test_through_ends_when_both_have_it(place: Place) -> None:
    async with place.opened("through") as engine:
        place.wire.hold(method="PUT")
        storing = asyncio.ensure_future(engine.store(b"key", content(b"key", SIZE)))
        await asyncio.to_thread(place.wire.wait_held, 1)
        await turns()
        assert not storing.done()
        assert await load(engine, b"key") == content(b"key", SIZE)
        place.wire.ok()
        assert await storing
        assert await asyncio.to_thread(place.there) == {name_of(b"key"): content(b"key", SIZE)}


async def test_demote_uploads_what_would_be_evicted(place: Place) -> None:
    """Ten blocks in a directory for four: none is lost, none is uploaded before it has to go."""
    async with place.opened("demote", tier={"capacity_bytes": 4 * SLOT}) as engine:
        await fill(engine, *KEYS[:4])
        assert relay(engine)[:2] == (4, 0)
        await fill(engine, *KEYS[4:])
        near = engine.statistics().tiers[0]
        assert (near.evictions, near.dropped) == (6, 0)
        assert await engine.prefix(KEYS) == 10
        for key in KEYS:
            assert await load(engine, key) == content(key, SIZE)


async def test_a_hit_behind_is_promoted(place: Place, tmp_path: Path) -> None:
    """Another machine with a directory of its own: its second load asks nobody."""
    async with place.opened() as engine:
        await fill(engine, *KEYS)
        await until(lambda: relay(engine)[0] == 0)
    async with place.opened(root=tmp_path / "other") as engine:
        assert await engine.prefix([*KEYS, b"more"]) == 10
        outcomes = await engine.load_many([(key, bytearray(SIZE)) for key in [*KEYS, b"more"]])
        assert [outcome.status for outcome in outcomes] == ["hit"] * 10 + ["miss"]
        await until(lambda: relay(engine)[3] == 10)
        requests = len(place.wire.seen)
        for key in KEYS:
            assert await load(engine, key) == content(key, SIZE)
        assert len(place.wire.seen) == requests
        assert relay(engine) == (0, 0, 0, 10)  # what came from there is not owed


async def test_a_promoted_block_is_there_before_its_promotion(place: Place, tmp_path: Path) -> None:
    async with place.opened() as engine:
        await fill(engine, b"key")
        await until(lambda: relay(engine)[0] == 0)
    async with place.opened(root=tmp_path / "other") as engine:
        engine.held.hold("start", lambda transfer: transfer.write)
        assert await load(engine, b"key") == content(b"key", SIZE)
        await engine.held.wait_held("start")
        assert relay(engine)[3] == 0
        engine.held.release()
        await until(lambda: relay(engine)[3] == 1)


async def test_identical_loads_are_one_request(place: Place, tmp_path: Path) -> None:
    async with place.opened() as engine:
        await fill(engine, b"key")
        await until(lambda: relay(engine)[0] == 0)
    async with place.opened(root=tmp_path / "other") as engine:
        before = place.wire.requests["GET"]
        found = await asyncio.gather(*(load(engine, b"key") for _ in range(8)))
        assert found == [content(b"key", SIZE)] * 8
        assert place.wire.requests["GET"] == before + 1


async def test_what_another_has_stored_is_not_uploaded_again(place: Place, tmp_path: Path) -> None:
    async with place.opened("through") as engine:
        await fill(engine, b"key")
    async with place.opened("through", root=tmp_path / "other") as engine:
        before = place.wire.requests["PUT"]
        await fill(engine, b"key")
        assert place.wire.requests["PUT"] == before
        assert relay(engine)[:2] == (0, 1)


async def test_deleted_from_both(place: Place, tmp_path: Path) -> None:
    async with place.opened("through") as engine:
        await fill(engine, b"key")
        assert await engine.delete(b"key")
        assert await asyncio.to_thread(place.there) == {}
        assert await load(engine, b"key") is None
        assert not await engine.delete(b"key")
    async with place.opened(root=tmp_path / "other") as engine:
        assert await load(engine, b"key") is None


async def test_nothing_is_deleted_while_the_bucket_can_not_be_asked(place: Place) -> None:
    """Dropped from the directory alone it would come back; and one that is owed would be lost."""
    async with place.opened("back") as engine:
        place.wire.refuse()
        await fill(engine, b"key", *KEYS)
        await until(lambda: engine.statistics().tiers[1].out != "")
        with pytest.raises(TransferError, match="is left alone until it answers") as caught:
            await engine.delete(b"key")
        assert caught.value.errno == errno.EHOSTDOWN
        assert await load(engine, b"key") == content(b"key", SIZE)
        place.wire.ok()
        await until(lambda: engine.statistics().tiers[1].out == "")
        assert await engine.delete(b"key")


async def test_deleted_while_it_is_uploaded(place: Place) -> None:
    """Its upload ends after the delete: it is not there either."""
    async with place.opened("back") as engine:
        place.wire.hold(method="HEAD")
        await fill(engine, b"key")
        await asyncio.to_thread(place.wire.wait_held, 1)
        deleting = asyncio.ensure_future(engine.delete(b"key"))
        await turns()
        place.wire.ok()
        assert await deleting
        await until(lambda: not engine.busy())
        assert await asyncio.to_thread(place.there) == {}


# --- when one of them fails ---------------------------------------------------------------------


async def test_the_directory_works_on_without_the_bucket(place: Place) -> None:
    """Stores, loads, misses and evictions; what was not uploaded is, once it answers again."""
    async with place.opened("back", tier={"capacity_bytes": 16 * SLOT}) as engine:
        place.wire.refuse()
        await fill(engine, *KEYS)
        await until(lambda: engine.statistics().tiers[1].out != "")
        for key in KEYS:
            assert await load(engine, key) == content(key, SIZE)
        assert await load(engine, b"nowhere") is None
        assert await engine.prefix([*KEYS, b"nowhere"]) == 10
        await fill(engine, *(b"more %d" % i for i in range(10)))
        assert engine.statistics().tiers[0].dropped == 4
        place.wire.ok()
        await until(lambda: relay(engine)[0] == 0)
        there = await asyncio.to_thread(place.there)
        assert len(there) == 16


async def test_it_opens_without_the_bucket(place: Place) -> None:
    place.wire.refuse()
    async with place.opened("back") as engine:
        assert "did not answer when it was opened" in str(engine.plan[-1])
        await fill(engine, b"key")
        place.wire.ok()
        await place.wait_there(b"key")


async def test_through_says_that_only_the_directory_has_it(place: Place) -> None:
    async with place.opened("through") as engine:
        await fill(engine, b"key")
        place.wire.refuse()
        with pytest.raises(TransferError):
            await engine.store(b"new", content(b"new", SIZE))
        assert await load(engine, b"new") == content(b"new", SIZE)
        place.wire.ok()
        await place.wait_there(b"key", b"new")


async def test_a_hanging_upload_keeps_a_through_store_no_longer_than_its_deadline(
    place: Place,
) -> None:
    """Its memory is the caller's at once, cancelled as well."""
    async with place.opened("through", patience_s=0.5) as engine:
        place.wire.black_hole(method="PUT")
        data = bytearray(content(b"key", SIZE))
        storing = asyncio.ensure_future(engine.store(b"key", data, timeout_s=1e5))
        await asyncio.to_thread(place.wire.wait_requests, 3, "PUT")  # two were of opening
        skip_time(2e5)
        with pytest.raises(TransferTimeout) as caught:
            await storing
        assert caught.value.settled is None
        assert caught.value.kept_in == engine.statistics().tiers[0].name
        storing = asyncio.ensure_future(engine.store(b"key", data))
        await turns()
        storing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await storing
        place.wire.ok()
        place.wire.drop()


async def test_deleted_while_a_through_store_waits_for_its_turn(place: Place) -> None:
    """Its store ends, with an error that says so."""
    async with place.opened("through", patience_s=20) as engine:
        place.wire.hold(method="PUT")
        storing = [
            asyncio.ensure_future(engine.store(b"%d" % n, content(b"%d" % n, SIZE)))
            for n in range(20)  # more than there are connections
        ]
        await asyncio.to_thread(place.wire.wait_held, 16)
        await until(lambda: relay(engine)[0] == 20)
        assert await engine.delete(b"19")
        place.wire.ok()
        ended = await asyncio.gather(*storing, return_exceptions=True)
        assert ended[:19] == [True] * 19
        assert isinstance(ended[19], TransferError)
        assert "deleted" in str(ended[19])


async def test_closing_makes_room_for_stores_that_wait(place: Place) -> None:
    """A directory for two blocks, ten stores, and then it is closed: all are kept."""
    async with place.opened("demote", tier={"capacity_bytes": 2 * SLOT}) as engine:
        stores = [engine.store_nowait(key, content(key, SIZE)) for key in KEYS]
        closing = asyncio.ensure_future(engine.aclose())
        assert [await store for store in stores] == [True] * 10
        await closing
    async with place.opened("demote", tier={"capacity_bytes": 2 * SLOT}) as engine:
        assert await engine.prefix(KEYS) == 10


async def test_a_request_that_hangs_holds_up_the_backlog_no_longer_than_itself(
    place: Place,
) -> None:
    """A load that nobody answers: then nothing is uploaded, until it has ended."""
    async with place.opened("back", patience_s=0.5) as engine:
        await fill(engine, b"key")
        await until(lambda: relay(engine)[0] == 0)
        await asyncio.to_thread(place.server.put, place.bucket, name_of(b"far"), b"nothing")
        place.wire.drip(20, method="GET")
        loading = asyncio.ensure_future(load(engine, b"far"))
        await until(lambda: engine.statistics().tiers[1].out != "")
        await fill(engine, *KEYS)
        assert relay(engine)[0] == 10
        place.wire.ok()
        place.wire.drop()
        await asyncio.gather(loading, return_exceptions=True)
        await until(lambda: relay(engine)[0] == 0)


async def test_a_bucket_that_comes_after_the_engine_is_told_of_the_namespace(place: Place) -> None:
    """By its name `kvgds ls` and `kvgds gc` know the blocks."""
    place.wire.refuse()
    async with place.opened("back") as engine:
        (_, plan) = engine.plan
        assert "it did not answer when it was opened" in plan.evidence[0]
        await fill(engine, b"key")
        place.wire.ok()
        await until(lambda: relay(engine)[0] == 0)
    names = await asyncio.to_thread(place.server.names, place.bucket)
    assert f"{support.digest(support.NAMESPACE).hex()}/namespace.json" in names


async def test_a_store_that_does_not_get_through_is_told_where_the_block_is(place: Place) -> None:
    async with place.opened("through") as engine:
        place.wire.answer(s3_error(503, "SlowDown"), method="PUT")
        for key in KEYS:
            with pytest.raises(TransferError, match=f"{place.root} has the block") as caught:
                await engine.store(key, content(key, SIZE))
            assert (caught.value.key, caught.value.direction) == (key, "store")
            assert caught.value.kept_in == engine.statistics().tiers[0].name
            assert engine.near(key)
        place.wire.ok()


async def test_a_damaged_block_is_healed_from_the_bucket(place: Place) -> None:
    async with place.opened("through") as engine:
        await fill(engine, b"key")
    await asyncio.to_thread(support.spoil, place.root, b"key")
    async with place.opened() as engine:
        assert await load(engine, b"key") == content(b"key", SIZE)
        assert engine.statistics().tiers[0].quarantined == 1
        await until(lambda: relay(engine)[3] == 1)
    assert await asyncio.to_thread(support.stored, place.root, b"key") == content(b"key", SIZE)


async def test_a_damaged_block_that_nobody_has(place: Place) -> None:
    async with place.opened("back") as engine:
        place.wire.refuse()
        await fill(engine, b"key")
    await asyncio.to_thread(support.spoil, place.root, b"key")
    place.wire.ok()
    async with place.opened() as engine:
        with pytest.raises(BlockCorrupt):
            await load(engine, b"key")
        assert await load(engine, b"key") is None


async def test_a_damaged_block_whose_bucket_is_away_is_told_as_both(place: Place) -> None:
    """The bucket may have it yet: its error, and what was wrong with the file beside it."""
    async with place.opened("through") as engine:
        await fill(engine, b"key")
    await asyncio.to_thread(support.spoil, place.root, b"key")
    async with place.opened() as engine:
        place.wire.refuse()
        with pytest.raises(TransferError) as caught:
            await load(engine, b"key")
        (note,) = caught.value.__notes__
        assert "checksum" in note
        place.wire.ok()
        assert await load(engine, b"key") == content(b"key", SIZE)


async def test_closing_does_not_wait_for_the_backlog(place: Place) -> None:
    """What is owed is uploaded after the next opening."""
    async with place.opened("back") as engine:
        place.wire.refuse()
        await fill(engine, *KEYS)
    assert await asyncio.to_thread(place.there) == {}
    place.wire.ok()
    async with place.opened("back") as engine:
        await place.wait_there(*KEYS)
        await until(lambda: relay(engine)[0] == 0)


# --- crashes ------------------------------------------------------------------------------------

CHILD = """
import asyncio, json, sys
import kvgds
settings = json.loads(sys.argv[1])
async def main():
    config = kvgds.EngineConfig(
        namespace=kvgds.Namespace(**settings["namespace"]),
        tiers=[settings["near"], settings["far"]],
        bounce_bytes=2 << 20,
    )
    async with kvgds.open_engine(config) as engine:
        for n in range(200):
            key = b"%d" % n
            await engine.store(key, key * 4096)
            print(n, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.mark.parametrize("layout", ["slabs", "files"])
@pytest.mark.parametrize("write", ["back", "through"])
async def test_killed_at_any_time_nothing_acknowledged_is_lost(
    place: Place, layout: str, write: str
) -> None:
    """Killed while it stores and uploads: afterwards each stored block comes to the bucket."""
    near = {"root": str(place.root), "capacity_bytes": 64 << 20, "layout": layout}
    far = {
        "bucket": place.bucket,
        "endpoint": place.server.endpoint,
        "access_key": place.server.access_key,
        "secret_key": place.server.secret_key,
        "write": write,
    }
    given = {"near": near, "far": far, "namespace": {"model": "test", "revision": "1"}}
    done = -1
    for _ in range(2):
        command = [sys.executable, "-c", CHILD, json.dumps(given)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        with child.stdout:
            acknowledged = [int(await asyncio.to_thread(child.stdout.readline)) for _ in range(40)]
            child.send_signal(signal.SIGKILL)
            acknowledged += [int(line) for line in child.stdout.read().split()]
        child.wait()
        done = max(done, *acknowledged)
    tier = {"capacity_bytes": 64 << 20, "layout": layout}
    async with place.opened("back", tier=tier) as engine:
        await until(lambda: relay(engine)[0] == 0)
    found = await asyncio.to_thread(blocks, place.server, place.bucket)
    for n in range(done + 1):
        key = b"%d" % n
        assert payload_of(found[name_of(key)]) == key * 4096


# --- settings -----------------------------------------------------------------------------------


async def test_a_block_that_could_never_be_carried_on_is_refused(place: Place) -> None:
    """The way to the bucket is by the bounce region: what does not fit there twice can't go."""
    async with place.opened("back", bounce_bytes=2 * SLOT) as engine:
        await fill(engine, b"key")
        with pytest.raises(ConfigError, match="bounce_bytes"):
            await engine.store(b"big", bytes(2 * SIZE))


def test_demoting_needs_a_directory_of_ones_own(tmp_path: Path) -> None:
    near = FileTier(root=tmp_path, capacity_bytes=MIB, layout="files")
    with pytest.raises(ConfigError, match=r"ObjectTier.write='demote': needs layout='slabs'"):
        EngineConfig(namespace=NAMESPACE, tiers=(near, ObjectTier(bucket="kvgds", write="demote")))
