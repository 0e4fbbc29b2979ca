"""Slab directories: what they hold, whether it is whole, and mending what is not."""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from kvgds.blocks import PAGE
from kvgds.errors import ConfigError
from kvgds.memory import Arena
from kvgds.tiers.directory import check_index
from kvgds.tiers.index import (
    Changes,
    Index,
    Unusable,
    check_tables,
    connect,
    damaged,
    unusable,
)
from kvgds.tiers.space import (
    SLAB_NAME,
    SLOT_BITS,
    SLOT_MASK,
    open_slab,
    room_on_disk,
    slab_name,
    slabs_in,
)
from kvgds.upkeep.images import (
    WINDOW,
    Row,
    Slab,
    arena_for,
    images,
    place_of,
    read_fully,
    row_fault,
)
from kvgds.upkeep.records import BlockEntry, Listing, Problem, Report, Use, namespaces_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvgds.upkeep.records import Progress

_ROWS = 1024  # slots a batch
_EMPTY = "holds no blocks, neither an index nor slabs; the next engine starts anew"
_REBUILD = "`kvgds fsck --rebuild` makes it anew from the slabs"


@contextlib.contextmanager
def reading(root: Path) -> Iterator[sqlite3.Connection]:
    """The index of a slab directory, read-only; a live engine may be writing it.

    Raises:
        ConfigError: also from within, when a page that is needed turns out to be damaged.
    """
    path = root / "index.db"
    if not os.path.lexists(path):
        raise _without_index(root)
    check_index(root)
    # Without a log nobody has it open: then not even SQLite's own files need to be made.
    mode = "ro" if Path(f"{path}-wal").exists() else "ro&immutable=1"
    name = f"file:{quote(os.fsencode(path))}?mode={mode}"
    database = sqlite3.connect(name, uri=True, isolation_level=None)
    database.text_factory = _text
    try:
        database.execute("BEGIN")  # one snapshot for all that is read
        if not database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            raise _without_index(root)  # who has begun to make it, or died then, made no tables
        check_tables(path, database)
        yield database
    except sqlite3.DatabaseError as error:
        # A plain error is of the statement: what it names is not there.
        plain = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR
        if isinstance(error, sqlite3.OperationalError) and not plain:
            raise unusable(root, error) from None
        raise damaged(path, error) from None
    finally:
        database.close()


def _without_index(root: Path) -> ConfigError:
    if any(map(SLAB_NAME.fullmatch, os.listdir(root))):
        return ConfigError("root", str(root / "index.db"), f"the index is missing; {_REBUILD}")
    return ConfigError("root", str(root), _EMPTY)


def _text(data: bytes) -> str:
    """Text only describes, so what is no UTF-8 may say what it likes."""
    return data.decode("utf-8", "replace")


def uses_in(database: sqlite3.Connection) -> dict[int, Use]:
    """The namespaces that the index has, by number."""
    rows = database.execute("SELECT id, digest, text FROM namespace")
    return {number: Use(digest, text) for number, digest, text in rows}


def slab_listing(root: Path, namespace: str | None, limit: int) -> Listing:
    """What the index says that there is."""
    with reading(root) as database:
        there = uses_in(database)
        uses = {number: use for number, use in there.items() if use.matches(namespace)}
        query = (
            "SELECT namespace, nbytes, slab.slot_bytes, count(*) FROM block JOIN slab "
            "ON slab.id = block.slot >> ? WHERE key IS NOT NULL GROUP BY 1, 2, 3"
        )
        for number, *sizes in database.execute(query, (SLOT_BITS,)):
            if number in uses:
                uses[number].add(*sizes)
        allocated = database.execute("SELECT total(slot_bytes * slots) FROM slab").fetchone()[0]
        bad = database.execute("SELECT count(*) FROM block WHERE key IS NULL").fetchone()[0]
        entries = _entries(database, {number: use.digest for number, use in uses.items()}, limit)
    return Listing(str(root), "slabs", namespaces_of(uses.values()), entries, int(allocated), bad)


def _entries(
    database: sqlite3.Connection, digests: dict[int, bytes], limit: int
) -> tuple[BlockEntry, ...]:
    columns = "SELECT slot, namespace, key, nbytes FROM block"
    rows = database.execute(f"{columns} WHERE key IS NOT NULL ORDER BY used DESC") if limit else ()
    mine = (row for row in rows if row[1] in digests)
    return tuple(
        BlockEntry(key.hex(), digests[number].hex(), nbytes, place_of(slot))
        for slot, number, key, nbytes in itertools.islice(mine, min(limit, sys.maxsize))
    )


# --- checking -----------------------------------------------------------------------------


class _Found(NamedTuple):
    """What is to be mended, by slot, slab or path."""

    slabs: dict[int, Slab]
    gone: dict[int, Problem]  # rows that name no place, or repeat another
    bad: dict[int, Problem]  # places that hold something else than the index says
    cut: dict[int, Problem]  # slabs whose file is too short
    orphans: dict[Path, Problem]


def check_slabs(root: Path, report: Report, progress: Progress, *, repair: bool) -> None:
    """Check every block that the index names. Needs the directory's lock."""
    try:
        with reading(root) as database:
            for (line,) in database.execute("PRAGMA quick_check(1)"):
                if line != "ok":
                    raise damaged(root, line)
            found = _Found(indexed_slabs(root, database), {}, {}, {}, {})
            _look_at_files(root, report, found)
            _look_at_rows(database, report, found, progress)
    except Unusable:
        raise
    except ConfigError as error:
        report.add("index", "index.db", error.rule)
        return
    if repair:
        _repair(root, found, progress)


def indexed_slabs(root: Path, database: sqlite3.Connection) -> dict[int, Slab]:
    """The slabs that the index names.

    Raises:
        ConfigError: one lies there under another name, which says that its slots have another
            size. To take it for a slab that nobody knows would cost all of its blocks.
    """
    rows = database.execute("SELECT id, slot_bytes, slots FROM slab ORDER BY id").fetchall()
    there = slabs_in(root)
    slabs = {}
    for slab_id, slot_bytes, slots in rows:
        slab = Slab(slab_id, slot_bytes, slots, root / slab_name(slab_id, slot_bytes))
        if slab_id in there and not os.path.lexists(slab.path):
            raise damaged(root, f"{slab.path.name} is {there[slab_id]} by its name")
        slabs[slab_id] = slab
    return slabs


def _look_at_files(root: Path, report: Report, found: _Found) -> None:
    for slab in found.slabs.values():
        if slab.whole < slab.slots:
            text = f"has {slab.whole:,} of {slab.slots:,} slots"
            found.cut[slab.id] = report.add("truncated", slab.path.name, text)
    known = {slab.path.name for slab in found.slabs.values()}
    for name in sorted(os.listdir(root)):
        if SLAB_NAME.fullmatch(name) and name not in known:
            text = "the index does not know it; --repair removes it, --rebuild takes its blocks in"
            found.orphans[root / name] = report.add("orphan", name, text)


def _look_at_rows(
    database: sqlite3.Connection, report: Report, found: _Found, progress: Progress
) -> None:
    repeated = (
        "SELECT slot FROM (SELECT slot, row_number() OVER (PARTITION BY namespace, key "
        "ORDER BY generation DESC) AS nth FROM block WHERE key IS NOT NULL) WHERE nth > 1"
    )
    for (slot,) in database.execute(repeated):
        text = "a later generation of the same block is stored elsewhere"
        found.gone[slot] = report.add("duplicate", place_of(slot), text)
    total = database.execute("SELECT count(*) FROM block").fetchone()[0]
    query = (
        "SELECT slot, digest, key, generation, nbytes, algorithm "
        "FROM block LEFT JOIN namespace ON namespace.id = namespace ORDER BY slot"
    )
    arena = arena_for(found.slabs.values())
    done = 0
    for batch in _batches(map(Row._make, database.execute(query))):
        _check_rows(batch, report, found, arena)
        done += len(batch)
        progress("checking blocks", done, total)


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows of one slab, a bounded number at a time."""
    for _, mine in itertools.groupby(rows, lambda row: row.slot >> SLOT_BITS):
        while batch := list(itertools.islice(mine, _ROWS)):
            yield batch


def _check_rows(rows: list[Row], report: Report, found: _Found, arena: Arena) -> None:
    slab = found.slabs.get(rows[0].slot >> SLOT_BITS)
    whole = slab.whole if slab is not None else 0
    there: dict[int, Row] = {}
    for row in rows:
        if row.slot in found.gone:
            continue
        if slab is None or (row.slot & SLOT_MASK) >= slab.slots:
            text = "the index names a place that does not exist"
            found.gone[row.slot] = report.add("corrupt", place_of(row.slot), text)
        elif row.key is None:
            text = "out of use since what it gave back was wrong"
            found.bad[row.slot] = report.add("quarantined", place_of(row.slot), text)
        elif (row.slot & SLOT_MASK) >= whole:
            text = "the file ends before it"
            found.gone[row.slot] = report.add("corrupt", place_of(row.slot), text)
        else:
            there[row.slot & SLOT_MASK] = row
    if slab is None or not there:
        return
    for place, image in images(slab, list(there), arena):
        row = there[place]
        report.blocks += 1
        report.nbytes += row.nbytes
        if fault := row_fault(row, image):
            found.bad[row.slot] = report.add("corrupt", place_of(row.slot), fault)


# --- repairing ----------------------------------------------------------------------------


def writing(path: Path) -> contextlib.closing[Index]:
    """The index, to be changed by :meth:`~kvgds.tiers.index.Index.apply`. Needs the lock."""
    return contextlib.closing(Index(connect(path), _nothing, _nothing))


def _nothing(*_: object) -> None:
    """No event loop is told, for the index is used without its thread; and no slab is written."""


def _repair(root: Path, found: _Found, progress: Progress) -> None:
    """Mend: first never serve it again, then use its place again if that works."""
    with writing(root / "index.db") as index:
        index.apply(Changes(drop=list(found.gone), quarantine=list(found.bad)))
        for slab_id, problem in found.cut.items():
            _make_whole(found.slabs[slab_id], problem)
        index.apply(Changes(drop=_usable(found, progress)))
    for problem in found.gone.values():
        problem.repaired = True
    for path, problem in found.orphans.items():
        _remove(path, problem)


def _make_whole(slab: Slab, problem: Problem) -> None:
    """Give a slab that was cut its length again, unless that would fill the disk for nothing."""
    lacking = (slab.slots - slab.whole) * slab.slot_bytes
    room = room_on_disk(slab.path.parent)
    if lacking > room:
        problem.text += f"; to make it whole takes {lacking:,} bytes, {room:,} are free: free some,"
        problem.text += " or --rebuild takes it as it is"
        return
    try:
        fd, _ = open_slab(slab.path, slab.slots * slab.slot_bytes, direct=False)
    except ConfigError as error:
        problem.text += f"; {error.rule}"
        return
    os.close(fd)
    problem.repaired = True


def _remove(path: Path, problem: Problem) -> None:
    try:
        path.unlink()
    except OSError as error:
        problem.text += f"; it can't be removed: {error.strerror}"
    else:
        problem.repaired = True


def _usable(found: _Found, progress: Progress) -> list[int]:
    """The bad places that can be written and read back; the others stay in quarantine."""
    arena = Arena(2 * WINDOW)
    usable = []
    for done, (slot, problem) in enumerate(found.bad.items(), 1):
        why = _trial(found.slabs[slot >> SLOT_BITS], slot & SLOT_MASK, arena)
        if why is None:
            usable.append(slot)
            problem.repaired = True
        else:
            problem.text += f"; its place stays in quarantine: {why}"
        progress("trying bad places", done, len(found.bad))
    return usable


def _trial(slab: Slab, place: int, arena: Arena) -> str | None:
    """Why a slot can't be used, from writing and reading all of it; None if it can."""
    sent, got = arena.bytes[:WINDOW], arena.bytes[WINDOW:]
    sent[:] = os.urandom(PAGE) * (WINDOW // PAGE)
    begin, end = place * slab.slot_bytes, (place + 1) * slab.slot_bytes
    parts = [(offset, min(WINDOW, end - offset)) for offset in range(begin, end, WINDOW)]
    try:
        fd = os.open(slab.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            short = [n for offset, n in parts if os.pwritev(fd, [sent[:n]], offset) != n]
            os.fsync(fd)
            os.posix_fadvise(fd, begin, slab.slot_bytes, os.POSIX_FADV_DONTNEED)
            if short:
                return "a write was short"
            for offset, n in parts:
                if read_fully(fd, got[:n], offset) != n or got[:n] != sent[:n]:
                    return "it gives back other bytes than were written"
            os.pwritev(fd, [bytes(PAGE)], begin)  # no stamp: a rebuild finds nothing here
        finally:
            os.close(fd)
    except OSError as error:
        return str(error.strerror)
    return None
