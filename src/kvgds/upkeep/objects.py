"""Buckets: what they hold, whether it is whole, what may go.

Engines may use the bucket meanwhile: objects come and go. Everything is done in pages of the
server's listing, in memory that does not grow with it; requests for single objects go several at
once, on threads. What a server does not answer proves nothing about an object.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from kvgds.blocks import NO_CHECKSUM, PAGE, Stamp
from kvgds.errors import ConfigError, KvgdsError, PathUnavailable
from kvgds.transport import NotMoved
from kvgds.transport.bucket import Bucket, Found, fix_of
from kvgds.upkeep.images import MISMATCH, WINDOW, stamp_fault
from kvgds.upkeep.records import BlockEntry, Listing, Use, namespaces_of, no_match

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvgds.config import ObjectTier
    from kvgds.upkeep.records import Progress, Report, Retention
    from kvgds.upkeep.retention import Rule

_NAME = re.compile(r"([0-9a-f]{32})/(([0-9a-f]{2})/\3[0-9a-f]{38}\.kv|namespace\.json)")
_FOLDER = re.compile(r"[0-9a-f]{32}(/[0-9a-f]{2})?")
_OURS = re.compile(r"[0-9a-f]{32}/.")
_FANS = 256
_AT_ONCE = 8  # requests
_BATCH = 256  # objects that are looked at, or deleted, before more are listed
_DESCRIPTION = 1 << 16  # bytes of a namespace.json that are read
_STALE_S = 3600  # a trial ends long before that
_ENOUGH = 100  # failures after which nothing more is tried
_TOLD = 10  # failures that are told
_TIMES = 1 << 16  # moments that are told apart


def root_of(settings: ObjectTier) -> str:
    """What to call a bucket, and where in it."""
    return f"s3://{settings.bucket}/{settings.prefix}"


@contextlib.contextmanager
def asking(settings: ObjectTier) -> Iterator[Bucket]:
    """The bucket, what it can't do told as an error of kvgds.

    Raises:
        ConfigError: there is none, or it may not be used.
        PathUnavailable: it does not answer, or not as it should.
    """
    try:
        yield Bucket(settings)
    except NotMoved as error:
        raise _told(settings, error) from None


def _told(settings: ObjectTier, error: NotMoved, done: str = "") -> KvgdsError:
    if error.errno in (errno.EACCES, errno.ENODEV):
        rule = f"can't be used; {fix_of(error)}: {error}{done}"
        return ConfigError("bucket", settings.bucket, rule)
    text = f"{root_of(settings)} does not answer as it should; {fix_of(error)}: {error}{done}"
    return PathUnavailable(text)


class _Spaces:
    """The namespaces of a bucket, as its listing shows them."""

    def __init__(self, bucket: Bucket, wanted: str | None) -> None:
        self._bucket = bucket
        self._wanted = wanted
        self.found: dict[str, Use] = {}
        self._chosen: set[str] = set()

    def chosen(self, name: str) -> Use | None:
        """The namespace of an object, if it is one of those wanted."""
        space = name[: name.index("/")]
        if space not in self.found:
            use = Use.described(bytes.fromhex(space), self._description(space))
            self.found[space] = use
            if use.matches(self._wanted):
                self._chosen.add(space)
        return self.found[space] if space in self._chosen else None

    def check(self) -> None:
        """Raise ConfigError if none is named so."""
        if self._wanted is not None and not self._chosen:
            raise no_match(self._wanted, self.found.values())

    def _description(self, space: str) -> bytes:
        try:
            return self._bucket.read(f"{space}/namespace.json", 0, _DESCRIPTION)
        except NotMoved as error:
            if error.errno != errno.ENOENT:
                raise
            return b""


def _objects(bucket: Bucket, what: str, progress: Progress) -> Iterator[Found]:
    """All objects. Names are spread evenly, and listed in order: that shows how far it is."""
    for found in bucket.listing():
        if _NAME.fullmatch(found.name) and found.name.endswith(".kv"):
            progress(f"{what} {found.name[:8]}", int(found.name[33:35], 16) + 1, _FANS)
        yield found


def _blocks(
    bucket: Bucket, spaces: _Spaces, what: str, progress: Progress
) -> Iterator[tuple[Use, Found]]:
    """The blocks of the namespaces that are wanted."""
    for found in _objects(bucket, what, progress):
        if _NAME.fullmatch(found.name):
            use = spaces.chosen(found.name)
            if use is not None and found.name.endswith(".kv"):
                yield use, found


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="kvgds-upkeep")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


# --- listing ------------------------------------------------------------------------------


def object_listing(
    settings: ObjectTier, namespace: str | None, limit: int, progress: Progress
) -> Listing:
    """What lies there. Payloads are counted with their padding: only stamps know better."""
    allocated = bad = 0
    latest: list[tuple[float, str]] = []
    with asking(settings) as bucket, _threads() as pool:
        spaces = _Spaces(bucket, namespace)
        for found in _objects(bucket, "listing", progress):
            if found.name.startswith("quarantine/"):
                allocated, bad = allocated + found.nbytes, bad + 1
            if not _NAME.fullmatch(found.name):
                continue
            use = spaces.chosen(found.name)
            if not found.name.endswith(".kv"):
                continue
            allocated += found.nbytes
            if use is None:
                continue
            use.add(max(found.nbytes - PAGE, 0), found.nbytes)
            if limit:
                push = heapq.heappush if len(latest) < limit else heapq.heappushpop
                push(latest, (found.stored_at, found.name))
        names = [name for _, name in sorted(latest, reverse=True)]
        entries = list(pool.map(partial(_entry, bucket), names))
    return Listing(
        root=root_of(settings),
        layout="objects",
        namespaces=namespaces_of(spaces.found.values()),
        entries=tuple(entry for entry in entries if entry is not None),
        allocated_bytes=allocated,
        quarantined=bad,
    )


def _entry(bucket: Bucket, name: str) -> BlockEntry | None:
    try:
        stamp = Stamp.decode(bucket.read(name, 0, PAGE))
    except NotMoved as error:
        if error.errno != errno.ENOENT:
            raise
        return None
    if stamp is None:
        return None
    return BlockEntry(stamp.key.hex(), stamp.namespace.hex(), stamp.nbytes, name)


# --- checking -----------------------------------------------------------------------------


class _Verdict(NamedTuple):
    """What was found out about one object; kind "": nothing is wrong with it."""

    kind: str = ""
    text: str = ""
    repaired: bool = False
    blocks: int = 0
    nbytes: int = 0
    error: NotMoved | None = None


class _Inspector:
    """Looks at objects, on several threads, and mends what it finds."""

    def __init__(self, bucket: Bucket, *, repair: bool, stamps_only: bool) -> None:
        self._bucket = bucket
        self._repair = repair
        self._stamps_only = stamps_only
        self._put_away: set[str] = set()
        self._stale_at = time.time() - _STALE_S

    def look(self, found: Found) -> _Verdict:
        """See what an object is, and whether it is as it should be."""
        try:
            return self._look(found)
        except NotMoved as error:
            if error.errno == errno.ENOENT:  # it has just gone
                return _Verdict()
            return _Verdict("unread", f"could not be read or mended: {error}", error=error)

    def _look(self, found: Found) -> _Verdict:
        name = found.name
        if name.startswith("quarantine/") and name not in self._put_away:
            text = "set aside because what it held was wrong"
            return _Verdict("quarantined", text, self._remove(name))
        if name.startswith("trial/") and found.stored_at < self._stale_at:
            text = "left by an engine that tried the bucket"
            return _Verdict("orphan", text, self._remove(name))
        if _NAME.fullmatch(name):
            return self._look_at_block(found) if name.endswith(".kv") else _Verdict()
        marks_folder = _FOLDER.fullmatch(name) and not found.nbytes  # as consoles make
        if _OURS.match(name) and not marks_folder:
            return _Verdict("orphan", "is no block; nothing of kvgds put it there: remove it")
        return _Verdict()

    def _remove(self, name: str) -> bool:
        if self._repair:
            self._bucket.delete(name)
        return self._repair

    def _look_at_block(self, found: Found) -> _Verdict:
        name = found.name
        fault, nbytes = self._fault(name, found.nbytes)
        if fault is not None:  # on its way, perhaps; or it was replaced meanwhile
            size = self._bucket.size(name)
            if size is None:
                return _Verdict()
            fault, nbytes = self._fault(name, size)
        if fault is None:
            return _Verdict(blocks=1, nbytes=nbytes)
        if self._repair:
            other = f"quarantine/{name.replace('/', '.')}"
            self._put_away.add(other)
            self._bucket.rename(name, other)
            fault += f"; it is {other} now"
        return _Verdict("corrupt", fault, self._repair, blocks=1)

    def _fault(self, name: str, size: int) -> tuple[str | None, int]:
        """What is wrong with an object of so many bytes, and its payload's bytes."""
        head = self._bucket.read(name, 0, PAGE if self._stamps_only else PAGE + WINDOW)
        stamp = Stamp.decode(head[:PAGE])
        if stamp is None:
            return "there is no whole stamp", 0
        fault = stamp_fault(stamp, name, size, "object")
        if fault is None and stamp.algorithm == NO_CHECKSUM:
            fault = "there is no checksum, and no engine loads an object without one"
        if fault is None and not self._stamps_only:
            wrong = self._digest(name, memoryview(head)[PAGE:], stamp) != stamp.checksum
            fault = MISMATCH if wrong else None
        return fault, 0 if fault else stamp.nbytes

    def _digest(self, name: str, first: memoryview, stamp: Stamp) -> bytes:
        """xxh3-128 of the payload that begins so, the rest read in bounded memory."""
        state = xxhash.xxh3_128(first[: stamp.nbytes])
        for start in range(WINDOW, stamp.nbytes, WINDOW):
            nbytes = min(WINDOW, stamp.nbytes - start)
            state.update(self._bucket.read(name, PAGE + start, nbytes))
        return state.digest()


def check_objects(
    settings: ObjectTier, report: Report, progress: Progress, *, repair: bool, stamps_only: bool
) -> None:
    """Check every object that is a block, and look for what does not belong there."""
    failed = 0
    with asking(settings) as bucket, _threads() as pool:
        inspector = _Inspector(bucket, repair=repair, stamps_only=stamps_only)
        for batch in _batches(_objects(bucket, "checking", progress)):
            for found, verdict in zip(batch, pool.map(inspector.look, batch), strict=True):
                report.blocks += verdict.blocks
                report.nbytes += verdict.nbytes
                if verdict.kind:
                    report.add(verdict.kind, found.name, verdict.text, repaired=verdict.repaired)
                if verdict.error is not None:
                    failed += 1
                    if failed >= _ENOUGH:
                        done = f"; given up after {report.blocks:,} blocks and {failed} errors"
                        raise _told(settings, verdict.error, done)


def _batches(found: Iterable[Found]) -> Iterator[list[Found]]:
    left = iter(found)
    while batch := list(itertools.islice(left, _BATCH)):
        yield batch


# --- dropping -----------------------------------------------------------------------------


class Ages:
    """Bytes by the time at which they were stored, in bounded memory.

    Beyond so many different times, those that are close to each other count as one.
    """

    def __init__(self, most: int = _TIMES) -> None:
        self._most = most
        self._step_ms = 1
        self._bytes: dict[int, int] = {}

    def add(self, stored_at: float, nbytes: int) -> None:
        """Count a block."""
        at = self.of(stored_at)
        self._bytes[at] = self._bytes.get(at, 0) + nbytes
        while len(self._bytes) > self._most:
            before, self._bytes = self._bytes, {}
            self._step_ms *= 2
            for at, count in before.items():
                self._bytes[at // 2] = self._bytes.get(at // 2, 0) + count

    def of(self, stored_at: float) -> int:
        """What stands for a time; larger is later."""
        return int(stored_at * 1000) // self._step_ms

    def beyond(self, keep_bytes: int) -> tuple[int, int]:
        """What must go: all before a time, and so many bytes of that time."""
        excess = sum(self._bytes.values()) - keep_bytes
        for at in sorted(self._bytes):
            if self._bytes[at] > excess:
                return at, max(excess, 0)
            excess -= self._bytes[at]
        return self.of(time.time()) + 1, 0


def gc_objects(settings: ObjectTier, rule: Rule, done: Retention, progress: Progress) -> None:
    """Remove blocks that are too old or too many."""
    with asking(settings) as bucket, _threads() as pool:
        spaces = _Spaces(bucket, rule.namespace)
        goes = _choice(bucket, spaces, rule, progress)
        blocks = (found for _, found in _blocks(bucket, spaces, "dropping", progress))
        for batch in _batches(blocks):
            chosen = [found for found in batch if goes(found)]
            done.kept_blocks += len(batch) - len(chosen)
            done.kept_bytes += sum(found.nbytes for found in batch)
            done.kept_bytes -= sum(found.nbytes for found in chosen)
            _drop(settings, bucket, pool, chosen, done)
        spaces.check()
    done.files, done.freed_bytes = done.blocks, done.nbytes


def _choice(
    bucket: Bucket, spaces: _Spaces, rule: Rule, progress: Progress
) -> Callable[[Found], bool]:
    """What tells, of each block once, whether it goes."""
    before, ages = rule.before, Ages()
    if rule.keep_bytes is not None:
        for _, found in _blocks(bucket, spaces, "listing", progress):
            ages.add(found.stored_at, found.nbytes)
    last, excess = ages.beyond(rule.keep_bytes) if rule.keep_bytes is not None else (-1, 0)

    def goes(found: Found) -> bool:
        nonlocal excess
        at = ages.of(found.stored_at)
        too_many = at < last or (at == last and excess > 0)
        if at == last:
            excess -= found.nbytes
        return too_many or found.stored_at < before

    return goes


def _drop(
    settings: ObjectTier,
    bucket: Bucket,
    pool: ThreadPoolExecutor,
    chosen: list[Found],
    done: Retention,
) -> None:
    """Delete objects, some at once; each that can't be is counted."""

    def delete(found: Found) -> NotMoved | None:
        try:
            if not done.dry_run:
                bucket.delete(found.name)
        except NotMoved as error:
            return error
        return None

    for found, error in zip(chosen, pool.map(delete, chosen), strict=True):
        if error is None:
            done.blocks += 1
            done.nbytes += found.nbytes
            continue
        done.failed += 1
        done.kept_blocks += 1
        done.kept_bytes += found.nbytes
        if len(done.errors) < _TOLD:
            done.errors.append(f"{found.name}: {error}")
        if done.failed >= _ENOUGH:
            rest = f"; given up after {done.failed} errors; {done.blocks:,} blocks were dropped"
            raise _told(settings, error, rest)
