"""The slab tier's durable index: which slot holds which block, in SQLite.

Owns the database and one thread. Changes that arrive while a commit runs are committed
together by the next one; whoever asked for them is told after that commit, through one
call for the whole group. Statements are built for many rows at a time, because each step
of SQLite lets go of the interpreter lock, and taking it back can cost milliseconds.
"""

from __future__ import annotations

import json
import os
import queue
import sqlite3
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from kvgds.blocks import MAX_KEY_BYTES, PAGE
from kvgds.errors import ConfigError
from kvgds.paths import filesystem_of
from kvgds.tiers.space import COPIES_ON_WRITE, RESERVE, SLOT_BITS, SLOT_MASK, room_on_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

# slot, namespace, key, generation, bytes, algorithm, mirrored
Row: TypeAlias = tuple[int, int, bytes | None, int, int, int, int]

NEW_INDEX = ("index.db.new", "index.db.new-wal", "index.db.new-shm")
"""Files of an index that is to take the place of a damaged one."""

_FORMAT = 2  # 1 lacks `mirrored`
_APPLICATION = 0x6B766764
_LOG_BYTES = 4 << 20  # of SQLite's log, which keeps its size; more for as long as somebody reads
_TELL_AT_ONCE = 16  # who asked for a commit; a flight of stores, or one delete
_PATH_BYTES = 504  # of SQLite's database, which leaves room for the names of its other files
_ROWS = 512  # rows a statement; SQLite's limit is 32,766 parameters
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE namespace (id INTEGER PRIMARY KEY, digest BLOB UNIQUE NOT NULL, text TEXT NOT NULL);
CREATE TABLE slab (id INTEGER PRIMARY KEY, slot_bytes INTEGER NOT NULL, slots INTEGER NOT NULL);
CREATE TABLE block (
    slot INTEGER PRIMARY KEY,
    namespace INTEGER NOT NULL,
    key BLOB,                       -- NULL: quarantined
    generation INTEGER NOT NULL,
    nbytes INTEGER NOT NULL,
    algorithm INTEGER NOT NULL,
    used INTEGER NOT NULL,          -- larger is later
    mirrored INTEGER NOT NULL DEFAULT 0
);
"""
_UPGRADE = "ALTER TABLE block ADD COLUMN mirrored INTEGER NOT NULL DEFAULT 0"

# Finds what no engine writes, a table each. SQLite takes any value in any column, so that without a
# look at the types a text may turn up wherever a number is counted on.
_ODD = {
    "meta": "SELECT 1 FROM meta WHERE name IN ('opens', 'power') AND (typeof(value) != 'integer' "
    "OR value NOT BETWEEN 0 AND CASE name WHEN 'power' THEN 1 ELSE :opens END)",
    "namespace": "SELECT 1 FROM namespace "
    "WHERE typeof(digest) != 'blob' OR length(digest) != 16 OR typeof(text) != 'text'",
    "slab": "SELECT 1 FROM slab "
    "WHERE typeof(slot_bytes) != 'integer' OR typeof(slots) != 'integer' "
    "OR id NOT BETWEEN 0 AND :slab OR slot_bytes < :page OR slot_bytes % :page "
    "OR slots NOT BETWEEN 1 AND :slots OR slots > :bytes / slot_bytes",
    "block": "SELECT 1 FROM block "
    "WHERE typeof(namespace) != 'integer' OR typeof(key) NOT IN ('blob', 'null') "
    "OR length(key) NOT BETWEEN 1 AND :key OR typeof(generation) != 'integer' "
    "OR typeof(nbytes) != 'integer' OR typeof(algorithm) != 'integer' "
    "OR typeof(used) != 'integer' OR slot < 0 OR generation < 0 OR nbytes < 0 "
    "OR {mirrored} NOT IN (0, 1)",
}
_LIMITS = {
    "opens": (1 << 23) - 2,  # a generation is the number of the next opening, and 40 bits
    "page": PAGE,
    "slab": 10**8 - 1,  # a file's name has eight digits for it
    "slots": 1 << SLOT_BITS,
    "bytes": (1 << 63) - 1,
    "key": MAX_KEY_BYTES,
}


@dataclass(slots=True)
class Changes:
    """What one commit is to change; the parts apply in the order of the fields.

    Attributes:
        drop: slots whose blocks go.
        touch: slot to its new ``used``.
        quarantine: slots that must never be used again.
        mirrored: slots whose blocks the next tier has.
        put: rows of the block table.
        add_slab: (id, slot_bytes, slots).
        drop_slab: id; its blocks go too, those in quarantine included.
    """

    drop: list[int] = field(default_factory=list)
    touch: dict[int, int] = field(default_factory=dict)
    quarantine: list[int] = field(default_factory=list)
    mirrored: list[int] = field(default_factory=list)
    put: list[tuple[int, int, bytes, int, int, int, int, int]] = field(default_factory=list)
    add_slab: list[tuple[int, int, int]] = field(default_factory=list)
    drop_slab: list[int] = field(default_factory=list)

    @property
    def one_statement(self) -> bool:
        """Whether they are only a few blocks that were stored."""
        return 0 < len(self.put) <= _ROWS and self == Changes(put=self.put)

    def merge(self, other: Changes) -> None:
        """Add another's changes; no slot is both dropped by one and put by the other."""
        self.drop += other.drop
        self.touch |= other.touch
        self.quarantine += other.quarantine
        self.mirrored += other.mirrored
        self.put += other.put
        self.add_slab += other.add_slab
        self.drop_slab += other.drop_slab


WAIT_S = 5.0  # for another program, a backup perhaps, that has the database locked
Done: TypeAlias = "Callable[[Exception | None], None]"


def connect(path: Path, *, power: bool = False, new: bool = True) -> sqlite3.Connection:
    """Open the database, making it if there is none and ``new`` allows that.

    Raises:
        ConfigError: it is damaged, of another program, or of a newer format.
    """
    if new or os.path.lexists(path):
        _make_private(path)
    else:
        raise _lost(path)
    # Not shared where that takes a mapped file whose pages are copied when they are written:
    # without room for a copy the kernel kills the process.
    alone = filesystem_of(path.parent) in COPIES_ON_WRITE
    database = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
    try:
        database.execute(f"PRAGMA locking_mode={'EXCLUSIVE' if alone else 'NORMAL'}")
        application = database.execute("PRAGMA application_id").fetchone()[0]
        tables = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if tables and application != _APPLICATION:
            raise ConfigError("root", str(path), "is not an index of kvgds; use another directory")
        if not tables and not new:
            raise _lost(path)
        if tables:
            check_tables(path, database)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute(f"PRAGMA journal_size_limit={_LOG_BYTES}")
        database.execute("PRAGMA synchronous=FULL")
        if not tables:
            database.executescript(
                f"BEGIN; PRAGMA application_id={_APPLICATION}; PRAGMA user_version={_FORMAT};"
                f"{_SCHEMA} COMMIT;"
            )
        elif _version(database) < _FORMAT:
            database.executescript(f"BEGIN; {_UPGRADE}; PRAGMA user_version={_FORMAT}; COMMIT;")
        database.execute(f"PRAGMA synchronous={_syncs(database, power=power)}")
    except sqlite3.DatabaseError as error:
        database.close()
        if isinstance(error, sqlite3.OperationalError):
            raise
        raise damaged(path, error) from None
    except ConfigError:
        database.close()
        raise
    return database


def _lost(path: Path) -> ConfigError:
    rule = "the index of the slabs beside it is lost; `kvgds fsck --rebuild` makes it anew"
    return ConfigError("root", str(path), rule)


def _syncs(database: sqlite3.Connection, *, power: bool) -> str:
    """How often SQLite has to sync: before each commit, or around copies of its log, or never.

    Without any sync it may remove a log before what it copies from it is down. So where an engine
    has ever promised to outlast a loss of power, what it left is kept by all who come after.
    """
    return "FULL" if power else "OFF" if _power(database) is None else "NORMAL"


def _power(database: sqlite3.Connection) -> int | None:
    """Whether the last engine promised to outlast a loss of power; None: none ever has."""
    row = database.execute("SELECT value FROM meta WHERE name = 'power'").fetchone()
    return None if row is None else int(row[0])


def check_tables(path: Path, database: sqlite3.Connection) -> None:
    """Raise ConfigError unless it is an index, and holds what an engine may have written."""
    version = _version(database)
    if version > _FORMAT:
        raise ConfigError("root", str(path), f"has format {version}; use a newer kvgds")
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_schema")}
    if not tables.issuperset(_ODD):
        raise damaged(path, "tables are missing")
    try:
        mirrored = "mirrored" if version >= _FORMAT else "0"
        queries = {name: query.format(mirrored=mirrored) for name, query in _ODD.items()}
        odd = [name for name in queries if database.execute(queries[name], _LIMITS).fetchone()]
    except sqlite3.OperationalError as error:
        if "no such column" not in str(error):
            raise
        raise damaged(path, error) from None
    if odd:
        raise damaged(path, f"what it says of a {odd[0]} can't be")


def _version(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])


def damaged(path: Path, why: object) -> ConfigError:
    """The error for an index that holds what no engine wrote."""
    rule = f"the index is damaged ({why}); `kvgds fsck --rebuild` makes it anew"
    return ConfigError("root", str(path), rule)


class Unusable(ConfigError):
    """It can't be used just now, which says nothing of what it holds."""


def unusable(root: Path, error: Exception) -> Unusable:
    """The error for a directory of slabs whose index, or a file of it, can't be used just now."""
    rule = f"can't be used: {error}"
    if isinstance(error, sqlite3.Error) and "locked" in str(error):
        rule += ": another program has the index, as an engine does for itself on btrfs"
    elif isinstance(error, sqlite3.Error) and len(os.fsencode(root / "index.db")) > _PATH_BYTES:
        rule += f"; SQLite takes paths of {_PATH_BYTES} bytes at most: use a shorter one"
    elif isinstance(error, sqlite3.Error) and room_on_disk(root) < RESERVE:
        rule += "; the index needs room on the disk: free some MiB"
    return Unusable("root", str(root), rule)


def _make_private(path: Path) -> None:
    """See to it that SQLite, which follows links and asks the umask, finds a file of ours."""
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(path, flags, 0o600))
    except OSError as error:
        raise ConfigError("root", str(path), f"the index can't be opened: {error}") from None


class Index:
    """Commits changes in groups. Made in any thread; ``commit`` may be called from any.

    Args:
        database: from :func:`connect`; the index's thread owns it from ``start`` on.
        post: runs a function on the event loop's thread.
        sync: called before a commit that puts blocks; makes their payloads durable.
    """

    def __init__(
        self, database: sqlite3.Connection, post: Callable[..., None], sync: Callable[[], None]
    ) -> None:
        self._database = database
        self._post = post
        self._sync = sync
        self._inbox: queue.SimpleQueue[tuple[Changes, Any] | None] = queue.SimpleQueue()
        self._told: deque[tuple[Done, Exception | None]] = deque()
        self._telling = False
        self._thread = threading.Thread(target=self._main, name="kvgds-index", daemon=True)

    # --- before start ---------------------------------------------------------------

    def namespace(self, digest: bytes, text: str) -> int:
        """The namespace's number."""
        query = (
            "INSERT INTO namespace (digest, text) VALUES (?, ?) ON CONFLICT (digest) "
            "DO UPDATE SET text = max(text, excluded.text) RETURNING id"  # '' after a rebuild
        )
        return int(self._database.execute(query, (digest, text)).fetchone()[0])

    def count_open(self) -> int:
        """How many times the index has been opened, this one included."""
        query = (
            "INSERT INTO meta VALUES ('opens', 1) "
            "ON CONFLICT DO UPDATE SET value = value + 1 RETURNING value"
        )
        return int(self._database.execute(query).fetchone()[0])

    def outlasts_power(self) -> bool:
        """Whether what the last engine committed is there even after a loss of power."""
        return bool(_power(self._database))

    def promise(self, *, power: bool) -> None:
        """Note what this engine promises. Durable before anything that rests on it."""
        if self.outlasts_power() == power:
            return
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.execute("INSERT OR REPLACE INTO meta VALUES ('power', ?)", (int(power),))
        self._database.execute(f"PRAGMA synchronous={_syncs(self._database, power=power)}")

    def slabs(self) -> list[tuple[int, int, int]]:
        """All slabs: id, slot bytes, slots."""
        return self._database.execute("SELECT id, slot_bytes, slots FROM slab").fetchall()

    def blocks(self) -> Iterator[list[Row]]:
        """All blocks, least recently used first, in chunks."""
        query = (
            "SELECT slot, namespace, key, generation, nbytes, algorithm, mirrored "
            "FROM block ORDER BY used"
        )
        cursor = self._database.execute(query)
        while chunk := cursor.fetchmany(20_000):
            yield chunk

    def count(self) -> int:
        """How many blocks there are."""
        return int(self._database.execute("SELECT count(*) FROM block").fetchone()[0])

    def apply(self, changes: Changes) -> None:
        """Commit at once, in the calling thread."""
        if changes.put:
            self._sync()
        if changes.one_statement:  # a transaction by itself, and a third of the calls
            self._write(changes)
            return
        self._database.execute("BEGIN IMMEDIATE")
        try:
            self._write(changes)
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    # --- afterwards -----------------------------------------------------------------

    def commit(self, changes: Changes, done: Done) -> None:
        """Commit soon; then call ``done`` on the loop with None or what went wrong."""
        self._inbox.put((changes, done))

    def close(self) -> None:
        """Commit what was asked for, then close the database. Blocks."""
        if self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join()
        self._database.close()

    def _main(self) -> None:
        while self._serve():  # which lets go of what was asked for: the next may never come
            pass

    def _serve(self) -> bool:
        """Commit what has been asked for meanwhile. False: that was the last."""
        items = [self._inbox.get()]
        while not self._inbox.empty():  # nobody else takes anything out
            items.append(self._inbox.get())
        group = [item for item in items if item is not None]
        if group:
            self._commit(group)
        return len(group) == len(items)

    def _commit(self, group: list[tuple[Changes, Any]]) -> None:
        merged = Changes()
        for changes, _ in group:
            merged.merge(changes)
        error: Exception | None = None
        try:
            self.apply(merged)
        except Exception as cause:  # noqa: BLE001 - handed to whoever waits
            error = cause
        self._post(self._tell, [(done, error) for _, done in group])

    def _tell(self, group: Sequence[tuple[Done, Exception | None]]) -> None:
        """On the loop: tell who asked, in the order in which they did, some each turn."""
        self._told.extend(group)
        if not self._telling:
            self._tell_some()

    def _tell_some(self) -> None:
        self._telling = len(self._told) > _TELL_AT_ONCE
        if self._telling:
            self._post(self._tell_some)
        for _ in range(min(_TELL_AT_ONCE, len(self._told))):
            done, error = self._told.popleft()
            done(error)

    def _write(self, changes: Changes) -> None:
        execute = self._database.execute
        for part in _chunks(changes.drop):
            execute(f"DELETE FROM block WHERE slot IN ({_marks(part)})", part)
        if changes.touch:
            execute(
                "UPDATE block SET used = new.value FROM json_each(?) AS new "
                "WHERE block.slot = CAST(new.key AS INTEGER)",
                (json.dumps(changes.touch),),
            )
        for part in _chunks(changes.quarantine):
            execute(f"UPDATE block SET key = NULL WHERE slot IN ({_marks(part)})", part)
        for part in _chunks(changes.mirrored):
            execute(f"UPDATE block SET mirrored = 1 WHERE slot IN ({_marks(part)})", part)
        for rows in _chunks(changes.put):
            values = ",".join(["(?,?,?,?,?,?,?,?)"] * len(rows))
            flat = [value for row in rows for value in row]
            execute(f"INSERT OR REPLACE INTO block VALUES {values}", flat)
        for slab in changes.add_slab:
            execute("INSERT INTO slab VALUES (?,?,?)", slab)
        for slab_id in changes.drop_slab:
            first = slab_id << SLOT_BITS
            execute("DELETE FROM block WHERE slot BETWEEN ? AND ?", (first, first | SLOT_MASK))
            execute("DELETE FROM slab WHERE id=?", (slab_id,))


def _marks(part: Sequence[object]) -> str:
    return ",".join("?" * len(part))


def _chunks(rows: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(rows), _ROWS):
        yield rows[start : start + _ROWS]
