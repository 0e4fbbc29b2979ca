"""ls, fsck and gc: on both layouts, on sound and on damaged directories, beside engines."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from faults import FaultyDisk, fill_up, small_disk
from kvgds import (
    BlockCorrupt,
    BusyError,
    ConfigError,
    EngineConfig,
    FileTier,
    Namespace,
    open_engine,
)
from kvgds.upkeep import fsck, gc, layout_of, listing
from kvgds.upkeep.images import WINDOW, Slab, arena_for
from sharing import leave, locked, make_old, owner, temporaries
from support import SLOT_BITS, content, digest, image, places, read_at, spoil, until, write_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvgds.upkeep import Report

PAGE = 4096
ONE = Namespace("first/model", revision="7")
TWO = Namespace("second/model")
LAYOUTS = ("slabs", "files")
SIZE = 3 * PAGE + 5
TAKES = 5 * PAGE  # on disk: a stamp, and the payload padded


def config(root: Path, layout: str, namespace: Namespace = ONE, **tier: Any) -> EngineConfig:
    settings = {"root": root, "capacity_bytes": 8 << 20, "layout": layout, **tier}
    return EngineConfig(
        namespace=namespace, tiers=(FileTier(**settings),), bounce_bytes=8 << 20, timeout_s=20.0
    )


def fill(settings: EngineConfig, keys: Iterable[bytes], nbytes: int = SIZE) -> None:
    """Store blocks with the content of their keys, in this order of use."""

    async def run() -> None:
        async with open_engine(settings) as engine:
            for key in keys:
                assert await engine.store(key, content(key, nbytes))

    asyncio.run(run())


def loads(settings: EngineConfig, keys: Iterable[bytes], nbytes: int = SIZE) -> list[bytes]:
    """Which keys can be loaded; those must be right."""

    async def run() -> list[bytes]:
        found = []
        async with open_engine(settings) as engine:
            for key in keys:
                memory = bytearray(nbytes)
                if await engine.load(key, memory):
                    assert memory == content(key, nbytes)
                    found.append(key)
        return found

    return asyncio.run(run())


def keys(count: int, first: int = 0) -> list[bytes]:
    return [b"key-%d" % i for i in range(first, first + count)]


def file_of(root: Path, key: bytes, namespace: Namespace = ONE) -> Path:
    """A block's file in the files layout."""
    name = blake2b(key, digest_size=20).hexdigest()
    return root / digest(namespace).hex() / name[:2] / f"{name}.kv"


def spoil_block(root: Path, layout: str, key: bytes, at: int) -> None:
    if layout == "slabs":
        spoil(root, key, at, ONE)
        return
    path = file_of(root, key)
    (byte,) = read_at(path, at, 1)
    status = path.stat()
    write_at(path, at, bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def sql(root: Path, statement: str, *values: object) -> list[Any]:
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database, database:
        return database.execute(statement, values).fetchall()


def kinds(report: Report) -> list[str]:
    return sorted(problem.kind for problem in report.problems)


def ledger_is_right(root: Path) -> bool:
    """Whether the count of bytes is that of the files there."""
    stored = [path for path in root.glob("*/*/*.kv") if len(path.parent.parent.name) == 32]
    stored += (root / "quarantine").iterdir()
    return int((root / "ledger").read_text()) == sum(path.stat().st_size for path in stored)


# --- ls -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ls_counts_blocks_and_bytes_of_each_namespace(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "kv"
    fill(config(root, layout), keys(3), 3 * PAGE)
    fill(config(root, layout), keys(2, 3), PAGE)
    fill(config(root, layout, TWO), keys(1), 2 * PAGE)
    found = listing(root)
    assert (found.layout, found.quarantined, found.entries) == (layout, 0, ())
    first, second = found.namespaces
    assert first.digest == digest(ONE).hex()
    assert (first.fields["model"], first.fields["revision"]) == ("first/model", "7")
    assert (first.blocks, first.nbytes) == (5, 11 * PAGE)
    assert first.disk_bytes == 3 * 4 * PAGE + 2 * 2 * PAGE
    assert first.sizes == {PAGE: 2, 3 * PAGE: 3}
    assert (second.fields["model"], second.blocks, second.disk_bytes) == (
        "second/model",
        1,
        3 * PAGE,
    )
    assert found.allocated_bytes >= first.disk_bytes + second.disk_bytes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("wanted", "models"),
    [
        ("first/model", ["first/model"]),
        ("*/model", ["first/model", "second/model"]),
        ("first", []),
        (digest(TWO).hex()[:8], ["second/model"]),
        (digest(TWO).hex().upper(), ["second/model"]),
        (digest(TWO).hex()[:7], []),
    ],
)
def test_ls_shows_the_namespaces_asked_for(
    tmp_path: Path, layout: str, wanted: str, models: list[str]
) -> None:
    root = tmp_path / "kv"
    fill(config(root, layout), keys(2))
    fill(config(root, layout, TWO), keys(1))
    found = listing(root, namespace=wanted, limit=9)
    assert [use.fields["model"] for use in found.namespaces] == models
    assert len(found.entries) == sum(use.blocks for use in found.namespaces)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ls_names_the_blocks_used_last(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "kv"
    fill(config(root, layout), keys(5))
    if layout == "files":
        for age, key in enumerate(reversed(keys(5))):
            os.utime(file_of(root, key), (0, 1_000_000 - age))
    entries = listing(root, limit=3).entries
    assert [bytes.fromhex(entry.key) for entry in entries] == [b"key-4", b"key-3", b"key-2"]
    assert {(entry.nbytes, entry.namespace) for entry in entries} == {(SIZE, digest(ONE).hex())}


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_ls_sees_what_a_running_engine_has_stored(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "kv"
    async with open_engine(config(root, layout)) as engine:
        for count in (1, 2):
            await engine.store(b"key-%d" % count, content(count, SIZE))
            found = await asyncio.to_thread(listing, root, limit=9)
            assert [use.blocks for use in found.namespaces] == [count]
            assert len(found.entries) == count
        assert await engine.load(b"key-1", bytearray(SIZE))


def nothing(root: Path) -> None:
    """The directory is not made at all."""


def a_file(root: Path) -> None:
    root.write_bytes(b"")


def foreign(root: Path) -> None:
    root.mkdir()
    (root / "notes.txt").write_text("mine")


def other_marker(root: Path) -> None:
    root.mkdir()
    (root / "kvgds.json").write_text('{"format": 9, "layout": "slabs"}')


def no_json(root: Path) -> None:
    root.mkdir()
    (root / "kvgds.json").write_bytes(b"\xff\xfe{")


def a_list(root: Path) -> None:
    root.mkdir()
    (root / "kvgds.json").write_text('["slabs"]')


def a_link(root: Path) -> None:
    root.mkdir()
    (root / "there").write_text('{"format": 1, "layout": "slabs"}')
    (root / "kvgds.json").symlink_to("there")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (nothing, "does not exist"),
        (a_file, "is not a directory"),
        (foreign, "no kvgds.json"),
        (other_marker, "does not know it"),
        (no_json, "can't be read"),
        (a_list, "does not know it"),
        (a_link, "can't be read"),
    ],
)
@pytest.mark.parametrize("act", [listing, fsck, lambda root: gc(root, keep_bytes=0)])
def test_what_is_no_directory_of_blocks_is_refused_and_left_alone(
    tmp_path: Path, make: Callable[[Path], None], says: str, act: Callable[[Path], Any]
) -> None:
    root = tmp_path / "kv"
    make(root)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=says):
        act(root)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_path_with_odd_characters_is_read(tmp_path: Path) -> None:
    root = tmp_path / "a?b#c%20d e"
    fill(config(root, "slabs"), keys(2))
    assert listing(root).namespaces[0].blocks == 2


# --- fsck: what it finds and mends ------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sound_directory_is_clean_and_stays_as_it_is(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "kv"
    fill(config(root, layout), keys(4))
    fill(config(root, layout), keys(2, 4), 70_000)
    fill(config(root, layout, TWO, verify="stamp"), keys(3))
    told: list[tuple[str, int, int]] = []
    for repair in (False, True):
        report = fsck(root, repair=repair, progress=lambda *step: told.append(step))
        assert report.clean
        assert not report.problems
        assert (report.blocks, report.nbytes) == (9, 7 * SIZE + 2 * 70_000)
    assert told
    assert all(0 < done <= total for _, done, total in told)
    assert told[-1][1] == told[-1][2]
    assert loads(config(root, layout), keys(4)) == keys(4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("at", "says"),
    [
        (0, "no whole stamp"),
        (70, "no whole stamp"),
        (PAGE, "does not match its checksum"),
        (PAGE + SIZE - 1, "does not match its checksum"),
    ],
)
def test_a_changed_byte_is_found_and_its_block_dropped(
    tmp_path: Path, layout: str, at: int, says: str
) -> None:
    root = tmp_path / "kv"
    fill(config(root, layout), keys(5))
    spoil_block(root, layout, b"key-2", at)
    report = fsck(root)
    assert kinds(report) == ["corrupt"]
    assert says in report.problems[0].text
    assert not report.clean
    assert fsck(root).problems == report.problems  # looking changes nothing
    assert [problem.repaired for problem in fsck(root, repair=True).problems] == [True]
    assert not fsck(root).problems
    others = [key for key in keys(5) if key != b"key-2"]
    assert loads(config(root, layout), keys(5)) == others
    fill(config(root, layout), [b"key-2"])
    assert loads(config(root, layout), keys(5)) == keys(5)
    if layout == "files":
        assert ledger_is_right(root)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_larger_than_one_read_is_checked_to_its_end(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "kv"
    nbytes = (5 << 20) + 3
    fill(config(root, layout, capacity_bytes=64 << 20), keys(2), nbytes)
    assert fsck(root).nbytes == 2 * nbytes
    assert fsck(root).clean
    spoil_block(root, layout, b"key-1", PAGE + nbytes - 1)
    assert kinds(fsck(root)) == ["corrupt"]
    assert fsck(root, repair=True).clean
    assert fsck(root).blocks == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quarantined_places_are_told_and_used_again_after_a_repair(
    tmp_path: Path, layout: str
) -> None:
    root = tmp_path / "kv"
    settings = config(root, layout, capacity_bytes=4 * TAKES)
    fill(settings, keys(4))
    spoil_block(root, layout, b"key-1", PAGE + 9)
    with pytest.raises(BlockCorrupt):
        loads(settings, [b"key-1"])
    assert listing(root).quarantined == 1
    report = fsck(root)
    assert (kinds(report), report.clean, report.blocks) == (["quarantined"], False, 3)
    assert fsck(root, repair=True).clean
    assert listing(root).quarantined == 0
    assert not fsck(root).problems
    fill(settings, [b"new"])
    assert loads(settings, [*keys(4), b"new"]) == [b"key-0", b"key-2", b"key-3", b"new"]


def test_a_place_that_cannot_be_read_leaves_its_neighbours_and_stays_in_quarantine(
    tmp_path: Path,
) -> None:
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        fill(config(root, "slabs"), keys(5))
        place = places(root, ONE)[b"key-3"]
        disk.fail("read", match=place.path.name, offset=place.offset, length=TAKES)
        report = fsck(root, repair=True)
        assert kinds(report) == ["corrupt"]
        assert "Input/output error" in report.problems[0].text
        assert "stays in quarantine" in report.problems[0].text
        assert not report.clean
        assert report.blocks == 5
        disk.clear()
        assert listing(root).quarantined == 1
        assert fsck(root, repair=True).clean
        assert loads(config(root, "slabs"), keys(5)) == [*keys(3), b"key-4"]


def test_a_place_that_keeps_what_it_had_stays_in_quarantine(tmp_path: Path) -> None:
    """The disk says that it has written, and has not."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        fill(config(root, "slabs"), keys(3))
        spoil(root, b"key-1", PAGE, ONE)
        disk.drop("write", match="slab-*")
        report = fsck(root, repair=True)
        assert "gives back other bytes" in report.problems[0].text
        assert not report.clean
        assert listing(root).quarantined == 1


def test_fsck_and_gc_leave_a_slab_directory_to_its_engine(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_engine(config(root, "slabs")) as engine:
            for key in keys(3):
                await engine.store(key, content(key, SIZE))
            for act in (
                lambda: fsck(root),
                lambda: fsck(root, repair=True),
                lambda: fsck(root, rebuild=True),
                lambda: gc(root, keep_bytes=0),
            ):
                with pytest.raises(BusyError, match=f"process {os.getpid()}"):
                    await asyncio.to_thread(act)
            assert (
                await asyncio.to_thread(lambda: gc(root, keep_bytes=0, dry_run=True))
            ).blocks == 3
            assert await engine.load(b"key-0", bytearray(SIZE))

    root = tmp_path / "kv"
    asyncio.run(run())
    assert loads(config(root, "slabs"), keys(3)) == keys(3)


# --- fsck: slabs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("UPDATE block SET generation = generation + 1 WHERE slot = ?", "another generation"),
        ("UPDATE block SET nbytes = nbytes + 1 WHERE slot = ?", "another generation"),
        ("UPDATE block SET nbytes = 1000000 WHERE slot = ?", "more than its place has"),
        ("UPDATE block SET algorithm = 0 WHERE slot = ?", "another generation"),
        ("UPDATE block SET key = x'00' WHERE slot = ?", "the stamp is of another block"),
        ("UPDATE block SET namespace = 77 WHERE slot = ?", "the stamp is of another block"),
    ],
)
def test_an_index_that_lies_about_a_block_is_found_out(
    tmp_path: Path, change: str, says: str
) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(3))
    sql(root, change, places(root, ONE)[b"key-1"].slot)
    report = fsck(root)
    assert kinds(report) == ["corrupt"]
    assert says in report.problems[0].text
    assert fsck(root, repair=True).clean
    assert not fsck(root).problems
    assert loads(config(root, "slabs"), keys(3)) == [b"key-0", b"key-2"]


@pytest.mark.parametrize("slot", [77 << SLOT_BITS, 1 << 20])
def test_an_index_entry_for_a_place_that_is_not_there_is_dropped(tmp_path: Path, slot: int) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(2))
    sql(root, "UPDATE block SET slot = ? WHERE key = ?", slot, b"key-1")
    sql(root, "INSERT INTO block VALUES (?, 1, NULL, 1, 1, 1, 1, 0)", slot + 1)
    assert kinds(fsck(root)) == ["corrupt", "corrupt"]
    assert fsck(root, repair=True).clean
    assert not fsck(root).problems
    assert sql(root, "SELECT key FROM block") == [(b"key-0",)]


def test_of_two_entries_for_one_block_the_later_stays(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(3))
    old, new = places(root, ONE)[b"key-0"], places(root, ONE)[b"key-1"]
    payload = content(b"key-0", SIZE)
    later = sql(root, "SELECT max(generation) + 1 FROM block")[0][0]
    write_at(new.path, new.offset, image(ONE, b"key-0", later, payload))
    sql(root, "UPDATE block SET key = ?, generation = ? WHERE slot = ?", b"key-0", later, new.slot)
    report = fsck(root)
    assert kinds(report) == ["duplicate"]
    assert report.problems[0].place.endswith(f"slot {old.slot & 0xFFFFFFFF}")
    assert fsck(root, repair=True).clean
    assert not fsck(root).problems
    assert sql(root, "SELECT slot FROM block WHERE key = ?", b"key-0") == [(new.slot,)]
    assert loads(config(root, "slabs"), keys(3)) == [b"key-0", b"key-2"]


@pytest.mark.parametrize("rest", [0, 1, 2])
def test_a_slab_that_was_cut_keeps_the_blocks_that_are_whole(tmp_path: Path, rest: int) -> None:
    root = tmp_path / "kv"
    settings = config(root, "slabs", capacity_bytes=64 * 4 * TAKES)  # four blocks a slab
    fill(settings, keys(6))
    by_slab: dict[Path, list[bytes]] = {}
    for key, place in sorted(places(root, ONE).items()):
        by_slab.setdefault(place.path, []).append(key)
    path, mine = max(by_slab.items(), key=lambda item: len(item[1]))
    assert len(mine) == 4
    os.truncate(path, rest * TAKES + (100 if rest else 0))
    if not rest:
        path.unlink()
    report = fsck(root)
    assert kinds(report) == ["corrupt"] * (4 - rest) + ["truncated"]
    assert fsck(root, repair=True).clean
    assert not fsck(root).problems
    assert path.stat().st_size == 4 * TAKES
    there = [key for key in keys(6) if key not in mine]
    kept = [key for key, place in places(root, ONE).items() if place.path == path]
    assert len(kept) == rest
    assert loads(settings, keys(6)) == sorted([*there, *kept])


def test_a_slab_that_the_index_does_not_know_is_found_and_removed(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(2))
    orphan = root / "slab-00000099-8192.kv"
    orphan.write_bytes(bytes(8192))
    (root / "slab-notes.txt").write_text("mine")
    assert kinds(fsck(root)) == ["orphan"]
    assert orphan.exists()
    assert fsck(root, repair=True).clean
    assert not orphan.exists()
    assert (root / "slab-notes.txt").exists()
    assert not fsck(root).problems


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def torn(path: Path) -> None:
    """The first page stays, so that SQLite opens it and finds the damage only later."""
    with path.open("r+b") as file:
        file.seek(PAGE)
        file.write(os.urandom(path.stat().st_size - PAGE))


def of_another(path: Path) -> None:
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE recipes (name TEXT)")


def torn_aside(path: Path) -> None:
    """A page that reading the blocks needs not: of the index on namespaces."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        (size,) = database.execute("PRAGMA page_size").fetchone()
        query = "SELECT rootpage FROM sqlite_schema WHERE type = 'index' AND tbl_name = 'namespace'"
        (page,) = database.execute(query).fetchone()
    write_at(path, (page - 1) * size, os.urandom(size))


def lost(path: Path) -> None:
    path.unlink()


DAMAGES = (garbage, emptied, cut, torn, torn_aside, of_another, lost)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_told_with_what_to_do(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(300), 100)
    damage(root / "index.db")
    slabs = sorted(root.glob("slab-*"))
    for repair in (False, True):
        report = fsck(root, repair=repair)
        assert (kinds(report), report.clean) == (["index"], False)
        assert "--rebuild" in report.problems[0].text
    if damage is not torn_aside:
        with pytest.raises(ConfigError, match="--rebuild"):
            gc(root, keep_bytes=0)
    assert sorted(root.glob("slab-*")) == slabs


# What no engine writes, by the row that it is written to. SQLite keeps it all.
ODD = (
    "UPDATE slab SET slot_bytes = 'many'",
    "UPDATE slab SET slot_bytes = 0",
    "UPDATE slab SET slot_bytes = -20480",
    "UPDATE slab SET slot_bytes = 20481",
    "UPDATE slab SET slot_bytes = 20480.5",
    "UPDATE slab SET slot_bytes = 1 << 62",
    "UPDATE slab SET slots = x'07'",
    "UPDATE slab SET slots = 0",
    "UPDATE slab SET slots = -1",
    "UPDATE slab SET slots = 1 << 62",
    "UPDATE slab SET slots = 1e300",
    "UPDATE slab SET id = -1",
    "UPDATE slab SET id = 1 << 40",
    "UPDATE block SET slot = -1 WHERE key = ?",
    "UPDATE block SET namespace = 'ours' WHERE key = ?",
    "UPDATE block SET key = 'text' WHERE key = ?",
    "UPDATE block SET key = 7 WHERE key = ?",
    "UPDATE block SET key = x'' WHERE key = ?",
    "UPDATE block SET key = zeroblob(1025) WHERE key = ?",
    "UPDATE block SET generation = 'last' WHERE key = ?",
    "UPDATE block SET generation = -1 WHERE key = ?",
    "UPDATE block SET nbytes = 'few' WHERE key = ?",
    "UPDATE block SET nbytes = -1 WHERE key = ?",
    "UPDATE block SET nbytes = 1e300 WHERE key = ?",
    "UPDATE block SET algorithm = 'best' WHERE key = ?",
    "UPDATE block SET used = 'just now' WHERE key = ?",
    "UPDATE namespace SET digest = 'text'",
    "UPDATE namespace SET digest = 7",
    "UPDATE namespace SET digest = x'00'",
    "UPDATE namespace SET text = x'00'",
    "UPDATE meta SET value = 'often' WHERE name = 'opens'",
    "UPDATE meta SET value = -1 WHERE name = 'opens'",
    "UPDATE meta SET value = 1 << 23 WHERE name = 'opens'",
    "INSERT OR REPLACE INTO meta VALUES ('power', 'abc')",
    "INSERT OR REPLACE INTO meta VALUES ('power', 2)",
    "ALTER TABLE block DROP COLUMN generation",
    "ALTER TABLE block RENAME COLUMN used TO unused",
    "DROP TABLE meta",
)
ACTS: dict[str, Callable[[Path], Any]] = {
    "ls": lambda root: listing(root, limit=9),
    "gc": lambda root: gc(root, keep_bytes=0),
    "gc --dry-run": lambda root: gc(root, namespace="*", dry_run=True),
    "fsck": fsck,
    "fsck --rebuild": lambda root: fsck(root, rebuild=True),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_index_with_odd_values_is_damaged_and_is_made_anew(tmp_path: Path, odd: str) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(3))
    sql(root, odd, *[b"key-1"] * odd.count("?"))
    slabs = sorted(root.glob("slab-*"))
    for act in ("ls", "gc", "gc --dry-run"):
        with pytest.raises(ConfigError, match=r"index.*fsck --rebuild"):
            ACTS[act](root)
    with pytest.raises(ConfigError, match=r"index.*fsck --rebuild"):  # an engine, too
        loads(config(root, "slabs"), keys(3))
    for repair in (False, True):
        report = fsck(root, repair=repair)
        assert (kinds(report), report.clean) == (["index"], False)
        assert "fsck --rebuild" in report.problems[0].text
    assert sorted(root.glob("slab-*")) == slabs
    assert (fsck(root, rebuild=True).blocks, fsck(root).problems) == (3, [])
    assert listing(root).namespaces[0].blocks == 3
    assert loads(config(root, "slabs"), keys(3)) == keys(3)


def test_a_slab_that_the_index_calls_by_another_number_is_not_swept(tmp_path: Path) -> None:
    """To an engine it looks like one that was cut short while it was made."""
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(3))
    slabs = sorted(root.glob("slab-*"))
    sql(root, "UPDATE slab SET id = id + 7")
    with pytest.raises(ConfigError, match=r"slab 7 is gone.*fsck --rebuild"):
        loads(config(root, "slabs"), keys(3))
    assert sorted(root.glob("slab-*")) == slabs
    assert fsck(root, rebuild=True).blocks == 3
    assert loads(config(root, "slabs"), keys(3)) == keys(3)


def test_a_rebuild_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    """And what a death has left of one goes when an engine opens."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        fill(config(root, "slabs"), keys(3))
        before = sorted(os.listdir(root))
        disk.fail("rename")
        with pytest.raises(OSError, match="Input/output error"):
            fsck(root, rebuild=True)
        disk.clear()
        assert sorted(os.listdir(root)) == before
        for name in ("index.db.new", "index.db.new-wal", "index.db.new-shm"):
            (root / name).write_bytes(b"x")
        assert loads(config(root, "slabs"), keys(3)) == keys(3)
        assert sorted(os.listdir(root)) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files for others")
def test_a_rebuilt_index_is_whose_the_directory_is(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(3))
    for path in (root, *root.iterdir()):
        os.chown(path, 65534, 65534)
    fsck(root, rebuild=True)
    assert {path.stat().st_uid for path in root.iterdir()} == {65534}


@pytest.mark.parametrize("slabs", [False, True])
@pytest.mark.parametrize("act", [listing, lambda root: gc(root, keep_bytes=0)])
def test_an_index_without_tables_is_none(tmp_path: Path, act: Any, slabs: bool) -> None:  # noqa: FBT001
    """An engine makes it just now, or has died when it began to."""
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(3))
    (root / "index.db").write_bytes(b"")
    if not slabs:
        for path in root.glob("slab-*"):
            path.unlink()
    said = "the index is missing" if slabs else "holds no blocks"
    with pytest.raises(ConfigError, match=said):
        act(root)
    (problem,) = fsck(root).problems
    assert said in problem.text


@pytest.mark.parametrize("slot_bytes", [TAKES + PAGE, 1 << 40])
def test_a_slab_of_another_size_by_its_name_is_no_orphan(tmp_path: Path, slot_bytes: int) -> None:
    """It is the index that is wrong: a repair that removed the file would lose all blocks."""
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(3))
    sql(root, "UPDATE slab SET slot_bytes = ?", slot_bytes)
    report = fsck(root, repair=True)
    assert kinds(report) == ["index"]
    assert "fsck --rebuild" in report.problems[0].text
    with pytest.raises(ConfigError, match="fsck --rebuild"):
        gc(root, keep_bytes=0)
    assert (fsck(root, rebuild=True).blocks, fsck(root).problems) == (3, [])
    assert loads(config(root, "slabs"), keys(3)) == keys(3)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("\udcff", id="no UTF-8"),
        pytest.param("[" * 100_000, id="lists without end"),
        pytest.param("9" * 5000, id="digits without end"),
        pytest.param('["a"]', id="no object"),
    ],
)
def test_a_namespace_that_is_described_oddly_is_listed_without_its_name(
    tmp_path: Path, text: str
) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(2))
    raw = text.encode("utf-8", "surrogateescape")
    sql(root, "UPDATE namespace SET text = CAST(? AS TEXT)", raw)
    (use,) = listing(root).namespaces
    assert (use.fields, use.blocks) == ({}, 2)
    assert fsck(root).clean
    assert fsck(root, rebuild=True).blocks == 2


def test_an_index_of_a_later_format_is_left_to_a_later_kvgds(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(1))
    sql(root, "ALTER TABLE block RENAME TO moved")
    sql(root, "PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="use a newer kvgds"):
        listing(root)
    assert "rebuild" not in fsck(root).problems[0].text


def test_a_check_takes_no_more_memory_than_a_slab_can_hold(tmp_path: Path) -> None:
    """However large the index says that slots are, once the slab's file is lost as well."""
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(2))
    for slab in root.glob("slab-*"):
        slab.unlink()
    sql(root, "UPDATE slab SET slot_bytes = 1 << 60, slots = 4")
    assert kinds(fsck(root)) == ["corrupt", "corrupt", "truncated"]


def test_memory_for_a_slot_is_that_of_the_largest_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "slab"
    path.touch()
    os.truncate(path, 8 << 20)
    for slot_bytes, nbytes in ((PAGE, WINDOW), (8 << 20, 8 << 20), (1 << 40, WINDOW)):
        assert len(arena_for([Slab(0, slot_bytes, 4, path)]).bytes) == nbytes
    os.truncate(path, 1 << 43)
    with pytest.raises(ConfigError, match="slot_bytes"):
        arena_for([Slab(0, 1 << 43, 1, path)])


def test_a_repair_fills_no_disk(tmp_path: Path) -> None:
    """A slab is made whole again only where there is room; its blocks stay."""
    with small_disk(tmp_path / "disk", 32 << 20) as disk:
        root = disk / "kv"
        fill(config(root, "slabs"), keys(3))
        (slots,) = sql(root, "SELECT slots FROM slab")
        sql(root, "UPDATE slab SET slots = 1 << 32")
        report = fsck(root, repair=True)
        assert (kinds(report), report.clean) == (["truncated"], False)
        assert "free some, or --rebuild" in report.problems[0].text
        assert fsck(root, rebuild=True).blocks == 3
        assert sql(root, "SELECT slots FROM slab") == [slots]
        assert loads(config(root, "slabs"), keys(3)) == keys(3)


@pytest.mark.parametrize("planted", ["link", "directory"])
def test_a_repair_goes_on_past_what_is_no_slab(tmp_path: Path, planted: str) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(2))
    (slab,) = root.glob("slab-*")
    slab.unlink()
    if planted == "link":
        slab.symlink_to("nowhere")
    else:
        slab.mkdir()
    (root / "slab-00000099-8192.kv").touch()
    report = fsck(root, repair=True)
    left = [problem for problem in report.problems if not problem.repaired]
    assert [problem.kind for problem in left] == ["truncated"]
    assert "a slab can't be opened" in left[0].text


def test_a_repair_goes_on_past_what_it_cannot_remove(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(2))
    (root / "slab-00000098-8192.kv").mkdir()
    (root / "slab-00000099-8192.kv").touch()
    first, second = fsck(root, repair=True).problems
    assert (first.repaired, second.repaired) == (False, True)
    assert "can't be removed: Is a directory" in first.text


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_marker_that_is_nested_deeply_is_told(tmp_path: Path, layout: str, act: str) -> None:
    root = tmp_path / "kv"
    fill(config(root, layout), keys(1))
    for text, says in (("[" * 100_000, "can't be read"), ("[" * 500 + "]" * 500, "not know it")):
        (root / "kvgds.json").write_text(text)
        with pytest.raises(ConfigError, match=says) as caught:
            ACTS[act](root)
        assert len(str(caught.value)) < 500


# --- fsck --rebuild ---------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_rebuild_brings_every_block_back(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(300), 100)
    fill(config(root, "slabs"), keys(5, 300))
    fill(config(root, "slabs", TWO), keys(4), 50_000)
    damage(root / "index.db")
    old = (root / "index.db").read_bytes() if (root / "index.db").exists() else None
    report = fsck(root, rebuild=True)
    assert report.clean
    assert (report.blocks, report.unproven) == (309, 0)
    assert report.nbytes == 300 * 100 + 5 * SIZE + 4 * 50_000
    if old is None:
        assert report.kept_aside == ""
    else:
        assert report.kept_aside == str(root / "index.db.damaged-1")
        assert (root / "index.db.damaged-1").read_bytes() == old
    assert not fsck(root).problems
    assert loads(config(root, "slabs"), keys(300), 100) == keys(300)
    assert loads(config(root, "slabs"), keys(5, 300)) == keys(5, 300)
    assert loads(config(root, "slabs", TWO), keys(4), 50_000) == keys(4)


def test_a_rebuild_keeps_every_old_index_and_the_names_of_namespaces(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(2))
    fill(config(root, "slabs", TWO), keys(1))
    for number in (1, 2):
        report = fsck(root, rebuild=True)
        assert report.kept_aside.endswith(f"damaged-{number}")
        models = [use.fields["model"] for use in listing(root).namespaces]
        assert models == ["first/model", "second/model"]
    assert sql(root, "SELECT text FROM namespace ORDER BY id")[0] in ((ONE.text,), (TWO.text,))


def test_opening_names_a_namespace_that_a_rebuild_could_not(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(2))
    fill(config(root, "slabs", TWO), keys(1))
    (root / "index.db").unlink()
    fsck(root, rebuild=True)
    assert sql(root, "SELECT text FROM namespace") == [("",), ("",)]
    assert loads(config(root, "slabs"), keys(2)) == keys(2)
    assert sorted(sql(root, "SELECT text FROM namespace")) == [("",), (ONE.text,)]


def test_opening_slabs_without_their_index_makes_none(tmp_path: Path) -> None:
    """What is refused is left as it is, so that fsck sees what is wrong with it."""
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(2))
    (root / "index.db").unlink()
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"the index of the slabs beside it is lost.*--rebuild"
        ):
            fill(config(root, "slabs"), keys(2))
    assert not list(root.glob("index.db*"))
    with pytest.raises(ConfigError, match="the index is missing"):
        listing(root)
    assert fsck(root, rebuild=True).blocks == 2
    assert loads(config(root, "slabs"), keys(2)) == keys(2)


def test_a_rebuild_after_a_kill_has_every_acknowledged_block(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    program = f"""
        import asyncio, os, signal
        from test_upkeep import *
        from pathlib import Path

        async def run():
            async with open_engine(config(Path({str(root)!r}), "slabs")) as engine:
                for key in keys(40):
                    await engine.store(key, content(key, SIZE))
                os.kill(os.getpid(), signal.SIGKILL)

        asyncio.run(run())
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    assert child.returncode == -signal.SIGKILL
    wal = root / "index.db-wal"
    assert wal.stat().st_size > 0
    garbage(root / "index.db")
    assert fsck(root, rebuild=True).blocks == 40
    assert not wal.exists()
    assert (root / "index.db.damaged-1-wal").stat().st_size > 0
    assert loads(config(root, "slabs"), keys(40)) == keys(40)


@pytest.mark.parametrize("pages", [(3, 9), (3, 9, 3)], ids=["last", "first"])
def test_the_later_of_two_stamps_for_one_block_wins_a_rebuild(
    tmp_path: Path, pages: tuple[int, ...]
) -> None:
    """Whether it lies behind the other or before it."""
    root = tmp_path / "kv"
    for count in pages:  # other memory: stored anew, elsewhere
        fill(config(root, "slabs"), [b"same"], count * PAGE)
    (root / "index.db").unlink()
    assert fsck(root, rebuild=True).blocks == 1
    assert loads(config(root, "slabs"), [b"same"], pages[-1] * PAGE) == [b"same"]
    before = sql(root, "SELECT max(generation) FROM block")[0][0]
    fill(config(root, "slabs"), [b"more"])
    assert sql(root, "SELECT generation > ? FROM block WHERE key = ?", before, b"more") == [(1,)]


def test_a_rebuild_that_was_killed_can_be_done_again(tmp_path: Path) -> None:
    """What it had begun to write is not gone on with."""
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(3))
    shutil.copy(root / "index.db", root / "index.db.new")
    sql(root, "DELETE FROM block")
    assert fsck(root, rebuild=True).blocks == 3
    assert loads(config(root, "slabs"), keys(3)) == keys(3)
    assert not (root / "index.db.new").exists()


def test_a_rebuild_takes_only_what_is_proven_whole(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(3))
    fill(config(root, "slabs", TWO, verify="stamp"), keys(2))
    spoil(root, b"key-1", PAGE + 1, ONE)
    spoil(root, b"key-2", 3, ONE)
    (root / "index.db").unlink()
    report = fsck(root, rebuild=True)
    assert (report.blocks, report.unproven) == (1, 2)
    assert kinds(report) == ["corrupt"]
    assert report.clean
    assert loads(config(root, "slabs"), keys(3)) == [b"key-0"]
    assert not fsck(root).problems


def test_a_rebuild_goes_on_past_what_is_no_old_index(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(2))
    (root / "index.db.old").mkdir()
    (root / "index.db.older").symlink_to("nowhere")
    (root / "index.db.damaged-1").symlink_to("nowhere")
    (root / "index.db.oldest").write_text('{"block_tokens":' + "[" * 4000 + "}")
    report = fsck(root, rebuild=True)
    assert (report.blocks, report.kept_aside) == (2, str(root / "index.db.damaged-2"))
    assert [use.fields["model"] for use in listing(root).namespaces] == ["first/model"]


def test_a_rebuild_in_the_place_of_a_directory_says_what_to_remove(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(2))
    (root / "index.db").unlink()
    (root / "index.db").mkdir()
    with pytest.raises(ConfigError, match="remove it"):
        fsck(root, rebuild=True)


@pytest.mark.parametrize("generation", [1 << 62, (1 << 64) - 1])
def test_a_rebuild_leaves_out_what_no_engine_can_count_on_from(
    tmp_path: Path, generation: int
) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(2))
    place = places(root, ONE)[b"key-1"]
    payload = content(b"key-1", SIZE)
    write_at(place.path, place.offset, image(ONE, b"key-1", generation, payload))
    report = fsck(root, rebuild=True)
    assert (kinds(report), report.blocks) == (["corrupt"], 1)
    assert str(generation) in report.problems[0].text
    assert loads(config(root, "slabs"), keys(2)) == [b"key-0"]


@pytest.mark.parametrize("act", [partial(fsck, rebuild=True), partial(gc, keep_bytes=0)])
def test_a_full_disk_is_told(tmp_path: Path, act: Callable[[Path], object]) -> None:
    """With its place, and what to do."""
    with small_disk(tmp_path, 16 << 20) as disk:
        root = disk / "kv"
        fill(config(root, "slabs", capacity_bytes=4 << 20), keys(3))
        fill_up(disk / "rest")
        with pytest.raises(ConfigError, match=rf"^root='{root}': can't be used.*free some MiB$"):
            act(root)


def later(root: Path, durable: str) -> None:
    """Three slabs more, as if the index had not outlasted a loss of power, and the slabs had."""
    older = (root / "index.db").read_bytes()
    for n in range(3):
        fill(config(root, "slabs", durable=durable), [b"later %d" % n], (n + 2) * SIZE)
    (root / "index.db").write_bytes(older)


WHY = "does not know 3 slabs, from 1 to 3"


def test_an_index_that_can_not_be_older_than_the_slabs(tmp_path: Path) -> None:
    """It outlasts a loss of power: an engine refuses it, and a rebuild takes all blocks in."""
    root = tmp_path / "kv"
    fill(config(root, "slabs", durable="power"), keys(2))
    later(root, "power")
    before = sorted(root.glob("slab-*"))
    for durable in ("power", "process"):
        with pytest.raises(ConfigError, match=f"{WHY}.*--rebuild"):
            fill(config(root, "slabs", durable=durable), [])
        assert sorted(root.glob("slab-*")) == before
    assert fsck(root, rebuild=True).blocks == 5


@pytest.mark.parametrize("before", ["never", "once", "rebuilt"])
@pytest.mark.parametrize("durable", ["power", "process"])
def test_an_index_may_be_older_than_the_slabs(
    tmp_path: Path, before: str, durable: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of an engine that does not outlast a loss of power: whatever was before, and comes then."""
    root = tmp_path / "kv"
    if before == "once":
        fill(config(root, "slabs", durable="power"), [])
    fill(config(root, "slabs"), keys(2))
    if before == "rebuilt":
        fsck(root, rebuild=True)
    later(root, "process")
    settings = config(root, "slabs", durable=durable)
    assert loads(settings, keys(2)) == keys(2)
    assert len(list(root.glob("slab-*"))) == 1
    assert [WHY in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("dies_at", ["index.db", "index.db-wal", "index.db.new"])
def test_a_rebuild_that_is_cut_off_leaves_no_older_index(
    tmp_path: Path, dies_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index that is there afterwards is the old one with its log, the new one, or none."""
    live, root = tmp_path / "live", tmp_path / "kv"
    fill(config(live, "slabs"), keys(2))

    async def copy_with_a_log() -> None:
        async with open_engine(config(live, "slabs")) as engine:
            for key in keys(7, 2):
                assert await engine.store(key, content(key, SIZE))
            await asyncio.to_thread(shutil.copytree, live, root)

    asyncio.run(copy_with_a_log())

    class DeadError(Exception):
        """As if the process had been killed."""

    rename = os.rename

    def mortal(source: Any, target: Any, **options: Any) -> None:
        if os.fspath(source).endswith(dies_at):
            raise DeadError
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", mortal)
    monkeypatch.setattr(os, "replace", mortal)
    with pytest.raises(DeadError):
        fsck(root, rebuild=True)
    monkeypatch.undo()
    if not (root / "index.db").exists():
        with pytest.raises(ConfigError, match="--rebuild"):
            fill(config(root, "slabs"), [])
        fsck(root, rebuild=True)
    assert loads(config(root, "slabs"), keys(9)) == keys(9)


def test_a_rebuild_skips_files_that_only_look_like_slabs(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(2))
    (real,) = {place.path for place in places(root, ONE).values()}
    (root / "slab-00000500-100.kv").write_bytes(bytes(300))
    (root / "slab-00000501-0.kv").write_bytes(bytes(300))
    (root / "slab-00000502-8192.kv").write_bytes(b"")
    (root / "slab-00000503-8192.kv").symlink_to(real)
    report = fsck(root, rebuild=True)
    assert kinds(report) == ["orphan"] * 4
    assert report.blocks == 2
    assert loads(config(root, "slabs"), keys(2)) == keys(2)


# --- fsck: files ------------------------------------------------------------------------------


def renamed(path: Path) -> None:
    other = path.parent.parent / "00" / ("0" * 40 + ".kv")
    other.parent.mkdir(exist_ok=True)
    path.rename(other)


def shortened(path: Path) -> None:
    os.truncate(path, path.stat().st_size - PAGE)


def lengthened(path: Path) -> None:
    os.truncate(path, path.stat().st_size + PAGE)


def of_another_namespace(path: Path) -> None:
    path.write_bytes(image(TWO, b"key-1", 1, content(b"key-1", SIZE)))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (renamed, "of another block"),
        (of_another_namespace, "of another block"),
        (shortened, "bytes, not"),
        (lengthened, "bytes, not"),
        (emptied, "no whole stamp"),
    ],
)
def test_a_file_that_is_not_its_block_is_found_and_removed(
    tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    root = tmp_path / "kv"
    fill(config(root, "files"), keys(3))
    path = file_of(root, b"key-1")
    before = path.stat().st_size
    damage(path)
    report = fsck(root)
    assert kinds(report) == ["corrupt"]
    assert says in report.problems[0].text
    assert fsck(root, repair=True).clean
    assert not fsck(root).problems
    assert loads(config(root, "files"), keys(3)) == [b"key-0", b"key-2"]
    assert ledger_is_right(root)
    assert before == TAKES


def test_what_others_put_among_the_blocks_is_told_but_not_removed(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(config(root, "files"), keys(1))
    folder = file_of(root, b"key-0").parent
    (folder / "notes.txt").write_text("mine")
    link = folder / ("f" * 40 + ".kv")
    link.symlink_to(file_of(root, b"key-0"))
    os.mkfifo(folder / ("e" * 40 + ".kv"))
    report = fsck(root, repair=True)
    assert kinds(report) == ["orphan"] * 3
    assert not report.clean
    assert (folder / "notes.txt").exists()
    assert link.is_symlink()


def test_only_temporaries_of_the_dead_are_removed(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(config(root, "files"), keys(1))
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        gone = owner(child.pid)
        assert child.wait() == 0
    dead = leave(root, gone, TAKES)
    others = [leave(root, owner(os.getpid()), TAKES), leave(root, owner(1, boot="9" * 32), TAKES)]
    count = int((root / "ledger").read_text())
    (root / "ledger").write_text(f"{count + 3 * TAKES:020}\n")
    report = fsck(root, repair=True)
    assert [problem.place for problem in report.problems] == [f"tmp/{dead}"]
    assert report.clean
    assert temporaries(root) == sorted(others)
    assert int((root / "ledger").read_text()) == count + 2 * TAKES


def test_a_temporary_that_is_a_block_by_now_frees_nothing(tmp_path: Path) -> None:
    """Its owner has died between giving it that name and taking the first away."""
    root = tmp_path / "kv"
    fill(config(root, "files"), keys(1))
    dead = root / "tmp" / leave(root, owner(os.getpid(), start=1), TAKES)
    dead.unlink()
    dead.hardlink_to(file_of(root, b"key-0"))
    assert kinds(fsck(root, repair=True)) == ["orphan"]
    assert temporaries(root) == []
    assert ledger_is_right(root)


async def test_gc_leaves_what_was_used_or_replaced_meanwhile(tmp_path: Path) -> None:
    """After it was chosen, and before the ledger's lock was to be had."""
    root = tmp_path / "kv"
    await asyncio.to_thread(fill, config(root, "files"), keys(3))
    used, replaced, _ = files = [file_of(root, key) for key in keys(3)]
    for path in files:
        make_old(path, 3600.0)
    ledger = root / "ledger"
    with locked(root):
        dropping = asyncio.ensure_future(asyncio.to_thread(gc, root, older_than_s=60.0))
        opened = Path("/proc/self/fd")
        await until(lambda: [*map(os.path.realpath, opened.iterdir())].count(str(ledger)) == 2)
        used.touch()
        shutil.copy2(replaced, tmp_path / "other")
        (tmp_path / "other").replace(replaced)
    done = await dropping
    assert (done.blocks, done.kept_blocks) == (1, 2)
    assert [path for path in files if path.exists()] == [used, replaced]
    assert ledger_is_right(root)


@pytest.mark.parametrize("act", [partial(fsck, repair=True), partial(gc, keep_bytes=0)])
def test_a_count_that_is_lost_is_not_made_up(tmp_path: Path, act: Any) -> None:
    """One too low would let the directory grow beyond its capacity; the next engine counts anew."""
    root = tmp_path / "kv"
    fill(config(root, "files"), keys(2))
    spoil_block(root, "files", b"key-0", PAGE)
    (root / "ledger").write_bytes(b"")
    act(root)
    assert not file_of(root, b"key-0").exists()
    assert (root / "ledger").read_bytes() == b""
    loads(config(root, "files"), keys(2))
    assert ledger_is_right(root)


def test_what_an_engine_has_just_evicted_is_no_failure_of_gc(tmp_path: Path) -> None:
    """On another host, of whose removal this one's cache does not know yet; it has counted that."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        fill(config(root, "files"), keys(3))
        disk.fail("unlink", errno.ENOENT, match="*.kv", count=1)  # here it stays: to be seen
        assert gc(root, keep_bytes=0).failed == 0
        left = sum(path.stat().st_size for path in root.rglob("*.kv"))
        assert int((root / "ledger").read_text()) == left == TAKES


async def test_fsck_of_files_works_beside_a_running_engine(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    async with open_engine(config(root, "files")) as engine:
        for key in keys(20):
            await engine.store(key, content(key, SIZE))
        await asyncio.to_thread(spoil_block, root, "files", b"key-7", PAGE)
        report, _ = await asyncio.gather(
            asyncio.to_thread(lambda: fsck(root, repair=True)),
            engine.store_many([(key, content(key, SIZE)) for key in keys(20, 20)]),
        )
        assert kinds(report) == ["corrupt"]
        assert report.clean
        assert not await engine.load(b"key-7", bytearray(SIZE))
        for key in (*keys(7), *keys(32, 8)):
            memory = bytearray(SIZE)
            assert await engine.load(key, memory)
            assert memory == content(key, SIZE)


def test_a_directory_of_files_has_no_index_to_rebuild(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(config(root, "files"), keys(1))
    with pytest.raises(ConfigError, match="--repair"):
        fsck(root, rebuild=True)


@pytest.mark.parametrize("name", ["tmp", "quarantine", "ledger"])
def test_what_is_in_the_way_among_the_blocks_is_named(tmp_path: Path, name: str) -> None:
    """A file instead of a directory, and the other way round."""
    root = tmp_path / "kv"
    fill(config(root, "files"), keys(2))
    place = root / name
    if place.is_dir():
        place.rmdir()
        place.touch()
    else:
        place.unlink()
        place.mkdir()
    for act in (ACTS["gc"],) if name == "ledger" else (ACTS["ls"], fsck):
        with pytest.raises(ConfigError, match=f"{place}.*directory"):
            act(root)
    assert file_of(root, b"key-0").exists()


def test_a_description_that_is_nested_deeply_leaves_the_digest_too(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(config(root, "files"), keys(1))
    (root / digest(ONE).hex() / "namespace.json").write_text("[" * 100_000)
    (use,) = listing(root, namespace=digest(ONE).hex()).namespaces
    assert (use.fields, use.blocks) == ({}, 1)


@pytest.mark.parametrize("said", [b"\xff{", TWO.text.encode()], ids=["damaged", "of another"])
def test_a_description_that_is_not_its_own_leaves_the_digest_to_name_a_namespace(
    tmp_path: Path, said: bytes
) -> None:
    root = tmp_path / "kv"
    fill(config(root, "files"), keys(1))
    (root / digest(ONE).hex() / "namespace.json").write_bytes(said)
    (use,) = listing(root).namespaces
    assert (use.fields, use.blocks) == ({}, 1)
    assert listing(root, namespace=digest(ONE).hex()[:8]).namespaces == (use,)
    assert listing(root, namespace="first/model").namespaces == ()


# --- gc ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dry_run", [True, False])
def test_gc_keeps_the_blocks_used_last(tmp_path: Path, layout: str, *, dry_run: bool) -> None:
    root = tmp_path / "kv"
    settings = config(root, layout)
    fill(settings, keys(6))
    loads(settings, [b"key-0"])
    if layout == "files":  # where a use within a minute of the last is not noted
        for age, key in enumerate([b"key-0", *reversed(keys(5, 1))]):
            os.utime(file_of(root, key), (0, 1_000_000 - age))
    done = gc(root, keep_bytes=3 * TAKES + 1, dry_run=dry_run)
    assert (done.blocks, done.nbytes) == (3, 3 * TAKES)
    assert (done.kept_blocks, done.kept_bytes) == (3, 3 * TAKES)
    kept = keys(6) if dry_run else [b"key-0", b"key-4", b"key-5"]
    assert sum(use.blocks for use in listing(root).namespaces) == len(kept)
    assert not fsck(root).problems
    assert loads(settings, keys(6)) == kept
    if layout == "files":
        assert ledger_is_right(root)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gc_drops_whole_namespaces_and_their_files(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "kv"
    fill(config(root, layout), keys(3))
    fill(config(root, layout, TWO), keys(4), 50_000)
    allocated = listing(root).allocated_bytes
    done = gc(root, namespace="second/*")
    assert (done.blocks, done.kept_blocks) == (4, 0)
    assert done.files > 0
    assert listing(root).allocated_bytes == allocated - done.freed_bytes
    assert [use.fields["model"] for use in listing(root).namespaces] == ["first/model"]
    assert not fsck(root).problems
    assert loads(config(root, layout), keys(3)) == keys(3)
    assert loads(config(root, layout, TWO), keys(4), 50_000) == []
    with pytest.raises(ConfigError, match="namespace='nobody': names none of"):
        gc(root, namespace="nobody")


def test_gc_that_is_cut_off_can_be_done_again(tmp_path: Path) -> None:
    """A slab can't be removed. An engine that is to outlast a loss of power opens, too."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        settings = config(root, "slabs", durable="power")
        fill(settings, keys(6), 100_000)  # a slab each
        slabs = sorted(path.name for path in root.glob("slab-*"))
        for n, name in enumerate(slabs[1:4]):
            disk.fail("unlink", errno.EPERM, match=name)
            with pytest.raises(PermissionError):
                gc(root, namespace="first/*")
            disk.clear()
            left = sorted(path.name for path in root.glob("slab-*"))
            assert left == slabs[n + 1 :]  # what the last has left is removed first
        assert loads(settings, keys(6), 100_000) == keys(6, 4)[:2]
        gc(root, namespace="first/*")
        assert loads(settings, keys(6), 100_000) == []


def test_gc_removes_what_deaths_have_left_as_an_engine_would(tmp_path: Path) -> None:
    """Two, and then none more: of slabs later than all that it knows an engine takes one alone."""
    root = tmp_path / "kv"
    settings = config(root, "slabs", durable="power")
    fill(settings, keys(5), 100_000)  # a slab each
    sql(root, "DELETE FROM slab WHERE id < 2")
    sql(root, "DELETE FROM block WHERE slot < ?", 2 << SLOT_BITS)
    gc(root, namespace="first/*")
    assert list(root.glob("slab-*")) == []
    assert loads(settings, keys(5), 100_000) == []


def test_gc_leaves_a_slab_alone_that_an_engine_would_not_remove(tmp_path: Path) -> None:
    """The index does not know it, and knows another that is gone: it is an old one."""
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(5), 100_000)  # a slab each
    slabs = sorted(root.glob("slab-*"))
    sql(root, "DELETE FROM slab WHERE id = 3")
    sql(root, "DELETE FROM block WHERE slot >> ? = 3", SLOT_BITS)
    slabs[2].unlink()
    gc(root, namespace="first/*")
    assert list(root.glob("slab-*")) == [slabs[3]]
    assert fsck(root, rebuild=True).blocks == 1


def test_gc_leaves_slabs_alone_that_are_later_than_the_index(tmp_path: Path) -> None:
    """More than a death leaves: their blocks are no waste, but what a rebuild takes in."""
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(5), 100_000)  # a slab each
    slabs = sorted(root.glob("slab-*"))
    sql(root, "DELETE FROM slab WHERE id >= 3")
    sql(root, "DELETE FROM block WHERE slot >> ? >= 3", SLOT_BITS)
    gc(root, namespace="first/*")
    assert sorted(root.glob("slab-*")) == slabs[3:]
    assert fsck(root, rebuild=True).blocks == 2


def test_a_check_that_can_not_read_the_index_has_found_nothing(tmp_path: Path) -> None:
    """That is an error: what it holds may well be sound."""
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(3))
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database:
        database.execute("PRAGMA locking_mode=EXCLUSIVE")
        database.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ConfigError, match="can't be used: database is locked"):
            fsck(root)
    assert not fsck(root).problems


def test_gc_counts_a_block_that_was_linked_only_just_once(tmp_path: Path) -> None:
    """Its owner has died before it took the temporary name away."""
    root = tmp_path / "kv"
    fill(config(root, "files"), keys(2))
    for key in keys(2):
        (root / "tmp" / f"{key.decode()}.{TAKES}").hardlink_to(file_of(root, key))
    done = gc(root, keep_bytes=TAKES)
    assert (done.blocks, done.freed_bytes) == (1, TAKES)
    assert ledger_is_right(root)
    assert len(list((root / "tmp").iterdir())) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gc_of_one_namespace_counts_and_drops_only_its_blocks(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "kv"
    fill(config(root, layout), keys(3))
    fill(config(root, layout, TWO), keys(3))
    done = gc(root, namespace=digest(TWO).hex()[:12], keep_bytes=TAKES)
    assert (done.blocks, done.kept_blocks, done.kept_bytes) == (2, 1, TAKES)
    assert loads(config(root, layout), keys(3)) == keys(3)
    assert len(loads(config(root, layout, TWO), keys(3))) == 1


def test_gc_by_age_goes_by_the_last_use(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(config(root, "files"), keys(4))
    now = time.time()
    for days, key in enumerate(keys(4)):
        os.utime(file_of(root, key), (now, now - days * 86400))
    done = gc(root, older_than_s=1.5 * 86400)
    assert (done.blocks, done.kept_blocks) == (2, 2)
    assert loads(config(root, "files"), keys(4)) == keys(2)
    assert ledger_is_right(root)


def test_gc_by_size_heeds_no_age(tmp_path: Path) -> None:
    """Not even of a file that says it is from before 1970."""
    root = tmp_path / "kv"
    fill(config(root, "files"), keys(2))
    os.utime(file_of(root, b"key-0"), (0, -86400))
    done = gc(root, keep_bytes=2 * TAKES)
    assert (done.blocks, done.kept_blocks) == (0, 2)
    assert loads(config(root, "files"), keys(2)) == keys(2)


def test_gc_leaves_a_slab_that_has_a_quarantined_place(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    settings = config(root, "slabs", capacity_bytes=64 * 4 * TAKES)
    fill(settings, keys(8))
    spoil(root, b"key-0", PAGE, ONE)
    with pytest.raises(BlockCorrupt):
        loads(settings, [b"key-0"])
    done = gc(root, keep_bytes=0)
    assert (done.blocks, done.files) == (7, 1)
    assert listing(root).quarantined == 1
    assert len(list(root.glob("slab-*"))) == 1


@pytest.mark.parametrize("dry_run", [True, False])
def test_gc_of_slabs_by_age_is_refused(tmp_path: Path, *, dry_run: bool) -> None:
    root = tmp_path / "kv"
    fill(config(root, "slabs"), keys(2))
    with pytest.raises(ConfigError, match="--keep-bytes"):
        gc(root, older_than_s=1.0, dry_run=dry_run)
    assert loads(config(root, "slabs"), keys(2)) == keys(2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gc_wants_to_be_told_what_goes(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "kv"
    fill(config(root, layout), keys(2))
    with pytest.raises(ConfigError, match="say what goes"):
        gc(root)
    assert loads(config(root, layout), keys(2)) == keys(2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "wrong",
    [
        {"keep_bytes": -1},
        {"keep_bytes": 1.5},
        {"keep_bytes": "1G"},
        {"keep_bytes": True},
        {"older_than_s": -1.0},
        {"older_than_s": float("inf")},
        {"older_than_s": float("nan")},
        {"older_than_s": "7d"},
        {"older_than_s": 1e300},
    ],
)
def test_gc_refuses_numbers_that_can_not_be(
    tmp_path: Path, layout: str, wrong: dict[str, Any]
) -> None:
    root = tmp_path / "kv"
    fill(config(root, layout), keys(1))
    with pytest.raises(ConfigError) as caught:
        gc(root, **wrong)
    assert [caught.value.field] == list(wrong)
    assert listing(root).namespaces[0].blocks == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ls_refuses_a_number_that_can_not_be(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "kv"
    fill(config(root, layout), keys(2))
    for wrong in (-1, 1.5, None, "1", True):
        with pytest.raises(ConfigError, match="limit"):
            listing(root, limit=wrong)  # type: ignore[arg-type]
    assert len(listing(root, limit=10**30).entries) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_is_told_from_the_marker(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "kv"
    fill(config(root, layout), [])
    assert layout_of(root) == layout
    assert json.loads((root / "kvgds.json").read_text())["layout"] == layout
    assert listing(root).namespaces == ()
    assert not fsck(root).problems
