"""Looking after a directory or bucket of blocks: what it holds, whether it is whole, what may go.

Owns what ``kvgds ls``, ``fsck`` and ``gc`` do, without a terminal: results are records,
progress is a callable. Everything blocks, so nothing here belongs on an event loop.

Nothing is changed in a slab directory without its lock, nor in one of files without that of
its ledger. Listing takes none, so that it works beside a live engine. A bucket has no lock.
"""

from __future__ import annotations

import contextlib
import os
import reprlib
import sqlite3
import stat
from typing import TYPE_CHECKING

from kvgds.config import ObjectTier
from kvgds.errors import ConfigError
from kvgds.tiers import locks
from kvgds.tiers.directory import MARKERS, lock_root, read_marker
from kvgds.tiers.index import unusable
from kvgds.upkeep.files import check_files, file_listing, gc_files
from kvgds.upkeep.objects import check_objects, gc_objects, object_listing, root_of
from kvgds.upkeep.rebuild import rebuild as rebuild_index
from kvgds.upkeep.records import (
    BlockEntry,
    Listing,
    NamespaceUse,
    Problem,
    Report,
    Retention,
    quiet,
)
from kvgds.upkeep.retention import Rule, gc_slabs
from kvgds.upkeep.slabs import check_slabs, slab_listing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvgds.upkeep.records import Progress

_REBUILD_RULE = "there is no index: each {} describes itself; use --repair"

__all__ = [
    "BlockEntry",
    "Listing",
    "NamespaceUse",
    "Problem",
    "Report",
    "Retention",
    "fsck",
    "gc",
    "layout_of",
    "listing",
]


def layout_of(root: Path) -> str:
    """The layout of a directory, from its marker; changes nothing.

    Raises:
        ConfigError: it is no directory, or not one of kvgds.
    """
    found = _marker(root)
    for layout, marker in MARKERS.items():
        if found == marker:
            return layout
    rule = f"holds {reprlib.repr(found)}; this kvgds does not know it"
    raise ConfigError("root", str(root), rule)


def _marker(root: Path) -> object:
    try:
        if not stat.S_ISDIR(os.stat(root).st_mode):
            raise ConfigError("root", str(root), "is not a directory")
        return read_marker(root)
    except FileNotFoundError as error:
        missing = os.fspath(error.filename) == os.fspath(root)
        rule = "does not exist" if missing else "is no kvgds directory (it has no kvgds.json)"
        raise ConfigError("root", str(root), rule) from None
    except OSError as error:
        raise ConfigError("root", str(root), f"can't be read: {error}") from None


def listing(
    root: Path | ObjectTier,
    *,
    namespace: str | None = None,
    limit: int = 0,
    progress: Progress = quiet,
) -> Listing:
    """What a directory or bucket holds, also beside a live engine.

    Args:
        root: the directory, or the settings of the bucket.
        namespace: only these; see :meth:`~kvgds.upkeep.records.Use.matches`.
        limit: most blocks listed one by one.
        progress: called with (what, done, total), of a bucket.

    Raises:
        ConfigError: not a directory of kvgds, or its index can't be read; or no bucket that may
            be used so.
        PathUnavailable: the bucket's server does not answer.
    """
    if type(limit) is not int or limit < 0:
        raise ConfigError("limit", limit, "must be a number of blocks, at least 0")
    if isinstance(root, ObjectTier):
        return object_listing(root, namespace, limit, progress)
    if layout_of(root) == "files":
        return file_listing(root, namespace, limit)
    return slab_listing(root, namespace, limit)


def fsck(
    root: Path | ObjectTier,
    *,
    repair: bool = False,
    rebuild: bool = False,
    stamps_only: bool = False,
    progress: Progress = quiet,
) -> Report:
    """Read every block and check it against its stamp, its checksum and the index.

    Args:
        root: the directory, or the settings of the bucket.
        repair: drop what is wrong from the index, and take places out of quarantine that
            can be written and read back. In a bucket: put what is wrong away in ``quarantine/``,
            and remove what lay there and what engines have left of their trials.
        rebuild: make a new index from the stamps in the slabs. Blocks that were evicted
            or deleted, but not yet overwritten, come back.
        stamps_only: of a bucket: read only the stamps, not the payloads.
        progress: called with (what, done, total).

    With layout ``"files"`` other processes may use the directory meanwhile, and a repair
    removes what is wrong; a bucket may be in use, too. With slabs no engine may.

    Raises:
        BusyError: an engine has the directory.
        ConfigError: not a directory of kvgds, or its index can't be used just now; or no bucket
            that may be used so.
        PathUnavailable: the bucket's server does not answer.
    """
    if isinstance(root, ObjectTier):
        if rebuild:
            raise ConfigError("rebuild", rebuild, _REBUILD_RULE.format("object"))
        report = Report(root_of(root), "objects")
        check_objects(root, report, progress, repair=repair, stamps_only=stamps_only)
        return report
    if stamps_only:
        rule = "is for buckets: of a directory everything is read"
        raise ConfigError("stamps_only", stamps_only, rule)
    report = Report(str(root), layout_of(root))
    if report.layout == "files":
        if rebuild:
            raise ConfigError("rebuild", rebuild, _REBUILD_RULE.format("file"))
        check_files(root, report, progress, repair=repair)
        return report
    with _slabs(root):
        if rebuild:
            rebuild_index(root, report, progress)
        else:
            check_slabs(root, report, progress, repair=repair)
    return report


def gc(
    root: Path | ObjectTier,
    *,
    keep_bytes: int | None = None,
    older_than_s: float | None = None,
    namespace: str | None = None,
    dry_run: bool = False,
    progress: Progress = quiet,
) -> Retention:
    """Drop blocks: the least recently used beyond a number of bytes, old ones, or namespaces.

    A bucket does not know when blocks were used: there those go that were stored first.

    Args:
        root: the directory, or the settings of the bucket.
        keep_bytes: most bytes that stay, stamps and padding included.
        older_than_s: blocks not used for this long go; not with layout ``"slabs"``.
        namespace: only look at these (see :meth:`~kvgds.upkeep.records.Use.matches`). Without
            ``keep_bytes`` and ``older_than_s`` all of their blocks go.
        dry_run: change nothing; works beside a live engine.
        progress: called with (what, done, total), of a bucket.

    Raises:
        BusyError: an engine has the directory.
        ConfigError: not a directory of kvgds, nothing says what is to go, or no namespace is
            named so; or no bucket that may be used so.
        PathUnavailable: the bucket's server does not answer.
    """
    rule = Rule(keep_bytes, older_than_s, namespace)
    rule.check()
    if isinstance(root, ObjectTier):
        done = Retention(root_of(root), "objects", dry_run)
        gc_objects(root, rule, done, progress)
        return done
    done = Retention(str(root), layout_of(root), dry_run)
    if done.layout == "files":
        gc_files(root, rule, done)
        return done
    with _slabs(root, alone=not dry_run):
        gc_slabs(root, rule, done)
    return done


@contextlib.contextmanager
def _slabs(root: Path, *, alone: bool = True) -> Iterator[None]:
    """A slab directory, taken if need be; what SQLite says told as an error of kvgds."""
    with contextlib.ExitStack() as stack:
        if alone:
            stack.callback(locks.close, lock_root(root))
        try:
            yield
        except sqlite3.Error as error:
            raise unusable(root, error) from None
