"""ls, fsck and gc of buckets: sound and damaged, beside engines, and of servers that fail."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest

import buckets
from buckets import name_of, settings
from kvgds import (
    BlockCorrupt,
    ConfigError,
    EngineConfig,
    Namespace,
    ObjectTier,
    PathUnavailable,
    open_engine,
)
from kvgds.upkeep import fsck, gc, listing
from kvgds.upkeep.objects import Ages
from support import MIB, content, digest, image
from wire import Wire, reserve
from wirefaults import s3_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from kvgds.upkeep import Report
    from s3 import JuiceServer, S3Server
    from wirefaults import Request

PAGE = 4096
ONE = Namespace("first/model", revision="7")
TWO = Namespace("second/model")
SIZE = 3 * PAGE + 5
TAKES = 5 * PAGE
PREFIX = "team/kv/"
PLACES = ["", PREFIX]
SECRET = "kvgds-tests-secret"  # noqa: S105 - of the tests' servers


class Store:
    """A bucket of a server, and the settings to come to it."""

    def __init__(self, server: S3Server, prefix: str = "", **changes: Any) -> None:
        self.server = server
        self.bucket = server.make_bucket()
        self.prefix = prefix
        given = {"prefix": prefix, "retries": 0, "request_timeout_s": 5.0, **changes}
        self.tier = settings(server, self.bucket, **given)

    def put(self, key: bytes, nbytes: int = SIZE, space: Namespace = ONE, **changes: Any) -> str:
        name = name_of(key, space, self.prefix)
        whole = image(space, key, 0, content(key, nbytes), **changes)
        self.server.put(self.bucket, name, whole)
        return name.removeprefix(self.prefix)

    def fill(self, keys: Iterable[bytes], space: Namespace = ONE) -> list[str]:
        self.describe(space)
        return [self.put(key, space=space) for key in keys]

    def describe(self, space: Namespace, text: str | None = None) -> None:
        name = f"{self.prefix}{digest(space).hex()}/namespace.json"
        self.server.put(self.bucket, name, (space.text if text is None else text).encode())

    def raw(self, name: str, data: bytes = b"x") -> None:
        self.server.put(self.bucket, f"{self.prefix}{name}", data)

    def spoil(self, name: str, at: int = PAGE) -> None:
        buckets.spoil(self.server, self.bucket, f"{self.prefix}{name}", at)

    def names(self) -> list[str]:
        found = self.server.names(self.bucket)
        return [name.removeprefix(self.prefix) for name in found]

    def blocks(self) -> list[str]:
        return [name for name in self.names() if name.endswith(".kv") and name[32] == "/"]


@pytest.fixture(params=PLACES)
def store(request: pytest.FixtureRequest, s3: JuiceServer) -> Store:
    return Store(s3, request.param)


@pytest.fixture
def wired(s3: JuiceServer) -> Iterator[tuple[Store, Wire]]:
    """A bucket behind a wire."""
    with Wire(s3.host, s3.port) as wire:
        yield Store(s3, endpoint=wire.endpoint), wire


def keys(count: int, first: int = 0) -> list[bytes]:
    return [b"key-%d" % i for i in range(first, first + count)]


def found(report: Report) -> dict[str, str]:
    return {problem.place: problem.kind for problem in report.problems}


# --- listing ------------------------------------------------------------------------------------


def test_what_a_bucket_holds(store: Store) -> None:
    names = [*store.fill(keys(3)), store.put(b"big", 9 * PAGE)]
    store.fill(keys(2), TWO)
    store.raw("quarantine/what.was.wrong", bytes(100))
    store.raw("trial/0123456789abcdef")
    store.raw("others/picture.jpg")
    had = listing(store.tier, limit=2)
    assert (had.root, had.layout) == (f"s3://{store.bucket}/{store.prefix}", "objects")
    first, second = had.namespaces
    assert (first.fields["model"], first.digest) == ("first/model", digest(ONE).hex())
    assert (first.blocks, first.disk_bytes) == (4, 3 * TAKES + 10 * PAGE)
    assert first.sizes == {4 * PAGE: 3, 9 * PAGE: 1}
    assert (second.fields["model"], second.blocks) == ("second/model", 2)
    assert (had.allocated_bytes, had.quarantined) == (5 * TAKES + 10 * PAGE + 100, 1)
    latest = [(entry.key, entry.namespace, entry.nbytes) for entry in had.entries]
    assert latest == [(key.hex(), digest(TWO).hex(), SIZE) for key in (b"key-1", b"key-0")]
    (entry,) = listing(store.tier, namespace="first*", limit=1).entries
    assert (entry.place, entry.nbytes) == (names[-1], 9 * PAGE)


def test_an_empty_bucket(store: Store) -> None:
    had = listing(store.tier, limit=5)
    assert (had.namespaces, had.entries, had.allocated_bytes, had.quarantined) == ((), (), 0, 0)
    assert fsck(store.tier).clean
    assert gc(store.tier, keep_bytes=0).blocks == 0


@pytest.mark.parametrize("text", ["", "no JSON", "[" * 5000, "7", TWO.text])
def test_a_description_that_is_not_true_names_nothing(s3: JuiceServer, text: str) -> None:
    """By its name blocks are dropped: those of another namespace must not answer to it."""
    store = Store(s3)
    store.fill(keys(2))
    store.describe(ONE, text)
    (use,) = listing(store.tier).namespaces
    assert (use.fields, use.blocks) == ({}, 2)
    with pytest.raises(ConfigError, match=rf"there: {digest(ONE).hex()[:8]}$"):
        gc(store.tier, namespace="second/model")
    assert gc(store.tier, namespace=digest(ONE).hex()[:8]).blocks == 2


def test_what_an_engine_has_stored(s3: JuiceServer) -> None:
    store = Store(s3, PREFIX)
    config = EngineConfig(namespace=ONE, tiers=(store.tier,), bounce_bytes=MIB)

    async def run() -> None:
        async with open_engine(config) as engine:
            for key in keys(3):
                await engine.store(key, content(key, SIZE))

    asyncio.run(run())
    (use,) = listing(store.tier).namespaces
    assert (use.fields, use.blocks) == (json.loads(ONE.text), 3)
    report = fsck(store.tier)
    assert (report.blocks, report.nbytes, report.problems) == (3, 3 * SIZE, [])
    assert gc(store.tier, keep_bytes=TAKES).blocks == 2


# --- checking -----------------------------------------------------------------------------------


def test_each_fault_is_found_and_put_away(store: Store) -> None:
    names = store.fill(keys(8))
    store.spoil(names[0], PAGE + 7)
    store.spoil(names[1], 20)
    store.raw(names[2], b"")
    store.raw(names[3], b"short")
    store.raw(names[4], image(ONE, b"key-4", 0, content(b"key-4", SIZE)) + b"more")
    store.raw(names[5], image(ONE, b"other", 0, content(b"other", SIZE)))
    unproven = bytearray(image(ONE, b"key-6", 0, content(b"key-6", SIZE)))
    store.raw(names[6], without_checksum(unproven))
    report = fsck(store.tier)
    assert (report.blocks, report.nbytes, report.clean) == (8, SIZE, False)
    assert found(report) == dict.fromkeys(names[:7], "corrupt")
    said = {problem.place: problem.text for problem in report.problems}
    assert said[names[0]] == "the payload does not match its checksum"
    assert said[names[1]] == said[names[2]] == said[names[3]] == "there is no whole stamp"
    assert said[names[4]] == f"the object has {TAKES + 4:,} bytes, not {TAKES:,}"
    assert said[names[5]] == f"the stamp is of another block, {b'other'.hex()}"
    assert said[names[6]] == "there is no checksum, and no engine loads an object without one"
    assert store.blocks() == sorted(names)
    report = fsck(store.tier, repair=True)
    assert (report.clean, found(report)) == (True, dict.fromkeys(names[:7], "corrupt"))
    put_away = sorted(f"quarantine/{name.replace('/', '.')}" for name in names[:7])
    assert [name for name in store.names() if name.startswith("quarantine/")] == put_away
    assert store.blocks() == [names[7]]


def without_checksum(whole: bytearray) -> bytes:
    """The same block as an engine with verify="stamp" would write it into a directory."""
    import xxhash  # noqa: PLC0415 - of one test

    whole[10:12] = bytes(2)
    whole[48:64] = bytes(16)
    key_bytes = int.from_bytes(whole[12:16], "little")
    end = 64 + key_bytes
    whole[end : end + 8] = xxhash.xxh3_64_digest(whole[:end])
    return bytes(whole)


def test_what_was_put_away_is_told_and_removed_by_the_next_repair(store: Store) -> None:
    (name,) = store.fill([b"key"])
    store.spoil(name)
    fsck(store.tier, repair=True)
    put_away = f"quarantine/{name.replace('/', '.')}"
    assert found(fsck(store.tier)) == {put_away: "quarantined"}
    assert put_away in store.names()
    assert fsck(store.tier, repair=True).clean
    assert put_away not in store.names()
    assert fsck(store.tier).problems == []


def test_what_it_puts_away_stays_there(moto_s3: S3Server) -> None:
    """Although a later page of the listing shows it."""
    store = Store(moto_s3)
    (name,) = store.fill([b"key"])
    store.spoil(name)
    for i in range(1100):
        store.raw(f"others/{i:04}")
    report = fsck(store.tier, repair=True)
    assert found(report) == {name: "corrupt"}
    assert f"quarantine/{name.replace('/', '.')}" in store.names()


async def test_it_puts_away_as_an_engine_does(s3: JuiceServer) -> None:
    store, other = Store(s3), Store(s3)
    for each in (store, other):
        (name,) = each.fill([b"key"])
        each.spoil(name)
    config = EngineConfig(namespace=ONE, tiers=(store.tier,), bounce_bytes=MIB)
    async with open_engine(config) as engine:
        with pytest.raises(BlockCorrupt):
            await engine.load(b"key", bytearray(SIZE))
    await asyncio.to_thread(fsck, other.tier, repair=True)
    assert await asyncio.to_thread(store.names) == await asyncio.to_thread(other.names)


def test_what_does_not_belong_there_is_told(store: Store) -> None:
    """What others keep beside the blocks is nobody's business."""
    (name,) = store.fill([b"key"])
    space = digest(ONE).hex()
    wrong_fan = name.replace(f"/{name[33:35]}/", "/zz/")
    orphans = [f"{space}/notes.txt", f"{name}.bak", wrong_fan]
    for orphan in orphans:
        store.raw(orphan)
    store.raw("others/picture.jpg")
    store.raw("README")
    store.raw(f"{space}/ab/", b"")  # as a console makes a folder
    report = fsck(store.tier, repair=True)
    assert found(report) == dict.fromkeys(orphans, "orphan")
    assert not report.clean
    assert set(orphans) < set(store.names())


def test_a_young_trial_is_an_engine_s(s3: JuiceServer) -> None:
    store = Store(s3)
    store.raw("trial/0123456789abcdef")
    assert fsck(store.tier, repair=True).problems == []
    assert store.names() == ["trial/0123456789abcdef"]


def test_an_old_trial_is_removed(s3: JuiceServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(s3)
    store.raw("trial/0123456789abcdef")
    now = time_of(store)
    monkeypatch.setattr("time.time", lambda: now + 3601)
    assert found(fsck(store.tier)) == {"trial/0123456789abcdef": "orphan"}
    assert fsck(store.tier, repair=True).clean
    assert store.names() == []


def time_of(store: Store) -> float:
    """When the server stored the object that is there."""
    from kvgds.transport.bucket import Bucket  # noqa: PLC0415 - of one test

    (found,) = Bucket(store.tier).listing()
    return found.stored_at


def test_only_stamps(wired: tuple[Store, Wire]) -> None:
    """A page of each object comes, and what is wrong behind it stays unseen."""
    store, wire = wired
    names = store.fill(keys(3))
    store.spoil(names[0], PAGE + 7)
    store.spoil(names[1], 20)
    report = fsck(store.tier, stamps_only=True)
    assert (report.blocks, found(report)) == (3, {names[1]: "corrupt"})
    ranges = {request.headers.get("range") for request in wire.seen if request.method == "GET"}
    assert ranges == {None, "bytes=0-4095"}  # the listing has none


def test_a_large_object_is_read_in_pieces(wired: tuple[Store, Wire]) -> None:
    store, wire = wired
    name = store.put(b"large", 40 * MIB + 5)
    tracemalloc.start()
    try:
        report = fsck(store.tier)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (report.blocks, report.nbytes, report.problems) == (1, 40 * MIB + 5, [])
    assert wire.requests["GET"] == 12  # the listing, and eleven pieces
    assert most < 16 * MIB  # some pieces, not all of it
    store.spoil(name, 40 * MIB)
    assert found(fsck(store.tier)) == {name: "corrupt"}


def test_what_came_wrong_is_asked_for_again(wired: tuple[Store, Wire]) -> None:
    """A byte that was flipped on its way costs no block."""
    store, wire = wired
    names = store.fill(keys(3))
    wire.corrupt(PAGE + 9, target="*.kv", times=1)
    report = fsck(store.tier, repair=True)
    assert (report.blocks, report.problems) == (3, [])
    assert store.blocks() == sorted(names)


def test_what_is_not_answered_proves_nothing(wired: tuple[Store, Wire]) -> None:
    store, wire = wired
    names = store.fill(keys(3))
    wire.answer(s3_error(500, "InternalError"), target=f"*{names[1][-20:]}")
    report = fsck(store.tier, repair=True)
    assert (report.blocks, report.clean, found(report)) == (2, False, {names[1]: "unread"})
    assert "InternalError" in report.problems[0].text
    assert store.blocks() == sorted(names)


def test_a_block_that_has_just_gone_is_no_fault(wired: tuple[Store, Wire]) -> None:
    store, wire = wired
    names = store.fill(keys(3))
    wire.answer(s3_error(404, "NoSuchKey"), target=f"*{names[1][-20:]}")
    report = fsck(store.tier)
    assert (report.blocks, report.problems) == (2, [])


def test_a_server_that_fails_is_given_up(wired: tuple[Store, Wire]) -> None:
    store, wire = wired
    store.fill(keys(150))
    wire.answer(s3_error(500, "InternalError"), method="GET", target="*.kv")
    with pytest.raises(PathUnavailable, match="; given up after 0 blocks and 100 errors"):
        fsck(store.tier)


def test_options_that_fit_only_one_of_them(s3: JuiceServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rebuild=True: there is no index: each object describ"):
        fsck(Store(s3).tier, rebuild=True)
    with pytest.raises(ConfigError, match="stamps_only=True: is for buckets"):
        fsck(tmp_path, stamps_only=True)


# --- dropping -----------------------------------------------------------------------------------


def test_those_stored_first_go(store: Store) -> None:
    names = store.fill(keys(6))
    store.raw("others/picture.jpg", bytes(10 * TAKES))
    dry = gc(store.tier, keep_bytes=2 * TAKES, dry_run=True)
    assert (dry.blocks, dry.nbytes, dry.kept_blocks, dry.kept_bytes) == (
        4,
        4 * TAKES,
        2,
        2 * TAKES,
    )
    assert store.blocks() == sorted(names)
    done = gc(store.tier, keep_bytes=2 * TAKES + 1)
    assert (done.blocks, done.nbytes, done.files, done.freed_bytes) == (4, 4 * TAKES, 4, 4 * TAKES)
    assert (done.kept_blocks, done.kept_bytes, done.failed, done.errors) == (2, 2 * TAKES, 0, [])
    assert (done.root, done.layout) == (f"s3://{store.bucket}/{store.prefix}", "objects")
    assert store.blocks() == sorted(names[4:])
    assert "others/picture.jpg" in store.names()
    assert gc(store.tier, keep_bytes=2 * TAKES).blocks == 0


def test_old_ones_go(s3: JuiceServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(s3)
    (name,) = [store.put(b"key")]
    now = time_of(store)
    monkeypatch.setattr("time.time", lambda: now + 99)
    assert gc(store.tier, older_than_s=100.0).blocks == 0
    monkeypatch.setattr("time.time", lambda: now + 101)
    assert gc(store.tier, older_than_s=100.0, dry_run=True).blocks == 1
    assert store.blocks() == [name]
    assert gc(store.tier, older_than_s=100.0).blocks == 1
    assert store.blocks() == []


def test_only_a_namespace(store: Store) -> None:
    first, second = store.fill(keys(3)), store.fill(keys(3), TWO)
    done = gc(store.tier, namespace="first*", keep_bytes=TAKES)
    assert (done.blocks, done.kept_blocks, done.kept_bytes) == (2, 1, TAKES)
    assert store.blocks() == sorted([first[2], *second])
    done = gc(store.tier, namespace=digest(TWO).hex()[:10])
    assert (done.blocks, done.kept_blocks) == (3, 0)
    assert store.blocks() == [first[2]]
    with pytest.raises(ConfigError, match="names none of those that are there: first/model, seco"):
        gc(store.tier, namespace="third", keep_bytes=0)
    assert store.blocks() == [first[2]]


def test_what_can_not_be_deleted_is_counted(wired: tuple[Store, Wire]) -> None:
    store, wire = wired
    names = store.fill(keys(12))
    kept = names[5]
    wire.answer(s3_error(403, "AccessDenied"), method="DELETE", target=f"*{kept[-20:]}")
    done = gc(store.tier, keep_bytes=0)
    assert (done.blocks, done.failed, done.kept_blocks, done.kept_bytes) == (11, 1, 1, TAKES)
    (error,) = done.errors
    assert error.startswith(f"{kept}: ")
    assert "AccessDenied" in error
    assert store.blocks() == [kept]


def test_a_server_that_deletes_nothing_is_given_up(wired: tuple[Store, Wire]) -> None:
    store, wire = wired
    store.fill(keys(150))
    wire.answer(s3_error(403, "AccessDenied"), method="DELETE")
    with pytest.raises(ConfigError, match="given up after 100 errors; 0 blocks were dropped"):
        gc(store.tier, keep_bytes=0)


def test_several_are_deleted_at_once(wired: tuple[Store, Wire]) -> None:
    store, wire = wired
    store.fill(keys(8))
    wire.hold(method="DELETE")

    async def run() -> None:
        dropping = asyncio.create_task(asyncio.to_thread(gc, store.tier, keep_bytes=0))
        await asyncio.to_thread(wire.wait_held, 8)
        wire.ok()
        assert (await dropping).blocks == 8

    asyncio.run(run())


def test_more_than_a_page_of_the_listing(moto_s3: S3Server) -> None:
    """Blocks go while they are listed, and none is missed."""
    store = Store(moto_s3)
    store.describe(ONE)
    for i in range(1100):
        store.raw(name_of(b"%d" % i, ONE), b"")
    seen: list[tuple[str, int, int]] = []
    assert (
        listing(store.tier, progress=lambda *step: seen.append(step)).namespaces[0].blocks == 1100
    )
    assert {what for what, _, _ in seen} == {f"listing {digest(ONE).hex()[:8]}"}
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1:] == (256, 256)
    assert gc(store.tier, older_than_s=0.0).blocks == 1100
    assert store.blocks() == []


def test_ages_are_kept_in_bounded_memory() -> None:
    """Beyond so many moments they are told apart less well, and never too few bytes go."""
    exact, rough = Ages(), Ages(most=64)
    for i in range(1000):
        for ages in (exact, rough):
            ages.add(1000.0 + i, 10)
    last, excess = exact.beyond(2505)
    assert (last, excess) == (exact.of(1000.0 + 749), 5)
    last, excess = rough.beyond(2505)
    assert len({rough.of(1000.0 + i) for i in range(1000)}) <= 64
    step = 32  # s, of 64 ms times a power of two
    assert abs(last - rough.of(1000.0 + 749)) <= 1
    before = sum(10 for i in range(1000) if rough.of(1000.0 + i) < last)
    assert before + excess == 10_000 - 2505
    assert excess <= 10 * step * 2


# --- errors -------------------------------------------------------------------------------------


def call(tier: ObjectTier, what: str) -> None:
    if what == "ls":
        listing(tier)
    elif what == "fsck":
        fsck(tier, repair=True)
    else:
        gc(tier, keep_bytes=0)


@pytest.mark.parametrize("what", ["ls", "fsck", "gc"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"secret_key": "not-the-one"}, r"can't be used; see to secret_key: .*SignatureDoesNotMa"),
        ({"access_key": "nobody"}, r"can't be used; see to access_key and endpoint: .*InvalidAcc"),
        ({"bucket": "no-such-bucket"}, r"can't be used; make the bucket, or see to bucket, regi"),
    ],
)
def test_settings_that_are_wrong_are_told(
    s3: JuiceServer, what: str, changes: dict[str, str], says: str
) -> None:
    given: dict[str, Any] = {"bucket": s3.make_bucket(), "retries": 0, **changes}
    tier = settings(s3, **given)
    with pytest.raises(ConfigError, match=rf"bucket='{tier.bucket}': {says}") as caught:
        call(tier, what)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "not-the-one" not in str(caught.value)


@pytest.mark.parametrize("what", ["ls", "fsck", "gc"])
def test_nobody_there(s3: JuiceServer, what: str) -> None:
    with reserve() as held:
        endpoint = f"http://127.0.0.1:{held.getsockname()[1]}"
        tier = settings(s3, s3.make_bucket(), endpoint=endpoint, retries=0)
        says = r"^s3://.*/ does not answer as it should; start the server, or see to endpoint: "
        with pytest.raises(PathUnavailable, match=says):
            call(tier, what)


@pytest.mark.parametrize("what", ["ls", "fsck", "gc"])
def test_a_listing_that_breaks_off_is_an_error(wired: tuple[Store, Wire], what: str) -> None:
    """Not the end of what is there."""
    store, wire = wired
    store.fill(keys(3))

    def lists(request: Request) -> bool:
        return "list-type" in request.target

    wire.truncate(after=400, when=lists)
    with pytest.raises(PathUnavailable, match="does not answer as it should"):
        call(store.tier, what)
    assert len(store.blocks()) == 3
