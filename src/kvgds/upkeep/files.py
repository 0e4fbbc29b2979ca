"""Directories of the files layout: what they hold, whether it is whole, what may go.

Other processes may use the directory meanwhile: files come and go, and whatever is removed
is removed under the ledger's lock, if it still is what was looked at.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import time
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from kvgds.blocks import PAGE, XXH3_128, Stamp, image_bytes
from kvgds.errors import ConfigError
from kvgds.memory import Arena
from kvgds.tiers.debts import unmark
from kvgds.tiers.folders import Folders, entries_of, files_in, status, subfolders
from kvgds.tiers.ledger import Ledger, Owner, forget_temporary, reserved_by
from kvgds.tiers.room import NAME, SPACE, blocks_in
from kvgds.upkeep.images import MISMATCH, WINDOW, read_fully, stamp_fault
from kvgds.upkeep.records import BlockEntry, Listing, Use, namespaces_of, no_match

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from kvgds.upkeep.records import Problem, Progress, Report, Retention
    from kvgds.upkeep.retention import Rule

_BATCH = 256  # removals under one lock


class _Seen(NamedTuple):
    """A file that was looked at, to be sorted by its last use."""

    used_ns: int
    path: str
    nbytes: int
    inode: int


@contextlib.contextmanager
def _opened(root: Path) -> Iterator[int]:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    except OSError as error:
        if not isinstance(error.filename, str):
            raise
        # What was opened by its name below the root is told by its whole name.
        place = os.fspath(root / error.filename)
        raise ConfigError("root", place, f"can't be used: {error.strerror}") from None
    finally:
        os.close(fd)


def _spaces(root: int) -> list[Use]:
    """The namespaces that have a folder."""
    names = sorted(filter(SPACE.fullmatch, subfolders("", root)))
    return [Use.described(bytes.fromhex(name), _description(root, name)) for name in names]


def _description(root: int, space: str) -> bytes:
    try:
        fd, _ = Folders(root).open(f"{space}/namespace.json", 0)
        with open(fd, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _blocks(root: int, use: Use) -> Iterator[_Seen]:
    """The blocks of one namespace, in no order."""
    for path, found in blocks_in(use.digest.hex(), root):
        yield _Seen(found.st_mtime_ns, path, found.st_size, found.st_ino)


# --- listing ------------------------------------------------------------------------------


def file_listing(path: Path, namespace: str | None, limit: int) -> Listing:
    """What lies there. Payloads are counted with their padding: only stamps know better."""
    with _opened(path) as root:
        bad = [found.st_size for _, found in files_in("quarantine", root)]
        allocated = sum(bad) + sum(reserved_by(name) for name, _ in files_in("tmp", root))
        uses = _spaces(root)
        latest: list[_Seen] = []
        for use in uses:
            listed = limit and use.matches(namespace)
            for seen in _blocks(root, use):
                allocated += seen.nbytes
                use.add(max(seen.nbytes - PAGE, 0), seen.nbytes)
                if listed:
                    push = heapq.heappush if len(latest) < limit else heapq.heappushpop
                    push(latest, seen)
        entries = [_entry(root, seen) for seen in sorted(latest, reverse=True)]
    return Listing(
        root=str(path),
        layout="files",
        namespaces=namespaces_of(use for use in uses if use.matches(namespace)),
        entries=tuple(entry for entry in entries if entry is not None),
        allocated_bytes=allocated,
        quarantined=len(bad),
    )


def _entry(root: int, seen: _Seen) -> BlockEntry | None:
    try:
        fd, _ = Folders(root).open(seen.path, 0)
    except OSError:
        return None
    try:
        stamp = Stamp.decode(os.pread(fd, PAGE, 0))
    finally:
        os.close(fd)
    if stamp is None:
        return None
    return BlockEntry(stamp.key.hex(), stamp.namespace.hex(), stamp.nbytes, seen.path)


# --- checking -----------------------------------------------------------------------------


def check_files(path: Path, report: Report, progress: Progress, *, repair: bool) -> None:
    """Check every block's file, and look for what does not belong there."""
    with _opened(path) as root:
        bad: list[tuple[_Seen, Problem]] = []
        arena = Arena(WINDOW)
        for use in _spaces(root):
            fans = list(subfolders(use.digest.hex(), root))
            for done, fan in enumerate(fans, 1):
                bad += _check_fan(root, f"{use.digest.hex()}/{fan}", report, arena)
                progress(f"checking {use.digest.hex()[:8]}", done, len(fans))
        bad += _set_aside(root, report)
        bad += _left_behind(root, report)
        if repair:
            _remove_bad(root, bad)


def _check_fan(
    root: int, folder: str, report: Report, arena: Arena
) -> Iterator[tuple[_Seen, Problem]]:
    for entry in entries_of(folder, root):
        path = f"{folder}/{entry.name}"
        if not NAME.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
            report.add("orphan", path, "is no block; nothing of kvgds put it there: remove it")
            continue
        found: os.stat_result | None
        try:
            found, fault = _look(root, path, report, arena)
        except FileNotFoundError:
            continue  # another process has just removed it
        except OSError as error:
            found, fault = status(path, root), f"it can't be read: {error.strerror}"
        if fault is not None and found is not None:
            seen = _Seen(found.st_mtime_ns, path, found.st_size, found.st_ino)
            yield seen, report.add("corrupt", path, fault)


def _look(root: int, path: str, report: Report, arena: Arena) -> tuple[os.stat_result, str | None]:
    """Check one file: its status, and what is wrong with it."""
    folders = Folders(root)
    try:
        fd, found = folders.open(path, os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd, found = folders.open(path, 0)
    try:
        fault, nbytes = _file_fault(fd, path, found.st_size, arena)
    finally:
        os.close(fd)
    report.blocks += 1
    report.nbytes += nbytes
    return found, fault


def _file_fault(fd: int, path: str, size: int, arena: Arena) -> tuple[str | None, int]:
    """What is wrong with an open file, and its payload's bytes."""
    page = arena.bytes[:PAGE]
    stamp = Stamp.decode(page) if read_fully(fd, page, 0) == PAGE else None
    if stamp is None:
        return "there is no whole stamp", 0
    if fault := stamp_fault(stamp, path, size, "file"):
        return fault, 0
    digest = _digest(fd, stamp.nbytes, arena)
    if digest is None:
        return "the file ends before its block does", 0
    wrong = stamp.algorithm == XXH3_128 and digest != stamp.checksum
    return (MISMATCH if wrong else None), stamp.nbytes


def _digest(fd: int, nbytes: int, arena: Arena) -> bytes | None:
    """xxh3-128 of a file's payload, read in bounded memory; None if the file is too short."""
    state = xxhash.xxh3_128()
    for start in range(0, nbytes, WINDOW):
        into = arena.bytes[: min(WINDOW, image_bytes(nbytes - start) - PAGE)]
        if read_fully(fd, into, PAGE + start) < len(into):
            return None
        state.update(into[: nbytes - start])
    return state.digest()


def _set_aside(root: int, report: Report) -> Iterator[tuple[_Seen, Problem]]:
    for name, found in files_in("quarantine", root):
        path = f"quarantine/{name}"
        problem = report.add("quarantined", path, "set aside because what it held was wrong")
        yield _Seen(0, path, found.st_size, found.st_ino), problem


def _left_behind(root: int, report: Report) -> Iterator[tuple[_Seen, Problem]]:
    me = Owner.me()
    now = time.time()
    for name, found in files_in("tmp", root):
        if me.may_remove(name, now - found.st_mtime):
            reserved = reserved_by(name) if found.st_nlink == 1 else 0
            problem = report.add("orphan", f"tmp/{name}", "left by a process that died")
            yield _Seen(0, f"tmp/{name}", reserved, found.st_ino), problem


def _remove_bad(root: int, bad: Sequence[tuple[_Seen, Problem]]) -> None:
    gone = _remove(root, [seen for seen, _ in bad])
    for seen, problem in bad:
        problem.repaired = seen in gone


def _remove(root: int, files: Sequence[_Seen]) -> set[_Seen]:
    """Remove files unless they have changed or been used since; those that went."""
    gone: set[_Seen] = set()
    ledger = Ledger(root)
    for start in range(0, len(files), _BATCH):
        with ledger.held():
            freed = 0
            for seen in files[start : start + _BATCH]:
                found = status(seen.path, root)
                if found is not None:
                    used = seen.used_ns and found.st_mtime_ns != seen.used_ns
                    if found.st_ino != seen.inode or used:
                        continue
                    if found.st_nlink > 1 and not seen.path.startswith("tmp/"):  # linked only just
                        forget_temporary(found.st_ino, root)
                    with contextlib.suppress(FileNotFoundError):  # by another, who has counted it
                        os.unlink(seen.path, dir_fd=root)
                        freed += seen.nbytes
                    unmark(seen.path, root)
                gone.add(seen)
            if ledger.sound:  # else whoever uses it next counts anew
                ledger.add(-freed)
    return gone


# --- dropping -----------------------------------------------------------------------------


def gc_files(path: Path, rule: Rule, done: Retention) -> None:
    """Remove blocks that are too old or too many."""
    with _opened(path) as root:
        there = _spaces(root)
        uses = [use for use in there if use.matches(rule.namespace)]
        if rule.namespace is not None and not uses:
            raise no_match(rule.namespace, there)
        blocks = sorted(seen for use in uses for seen in _blocks(root, use))
        done.kept_blocks, done.kept_bytes = len(blocks), sum(seen.nbytes for seen in blocks)
        chosen = _choose(blocks, rule, done.kept_bytes)
        gone = set(chosen) if done.dry_run else _remove(root, chosen)
    done.blocks = done.files = len(gone)
    done.nbytes = done.freed_bytes = sum(seen.nbytes for seen in gone)
    done.kept_blocks -= done.blocks
    done.kept_bytes -= done.nbytes


def _choose(blocks: Sequence[_Seen], rule: Rule, total: int) -> list[_Seen]:
    """Which go, least recently used first."""
    before_ns = rule.before * 1e9
    chosen = []
    for seen in blocks:
        too_many = rule.keep_bytes is not None and total > rule.keep_bytes
        if not (too_many or seen.used_ns < before_ns):
            break
        chosen.append(seen)
        total -= seen.nbytes
    return chosen
