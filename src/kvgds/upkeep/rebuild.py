"""A new index for a slab directory, from the stamps in its slabs. Needs the directory's lock."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from kvgds.blocks import NO_CHECKSUM, PAGE, Stamp, digest_of, image_bytes
from kvgds.tiers.directory import check_index, sync_folder
from kvgds.tiers.index import NEW_INDEX, Changes, connect
from kvgds.tiers.space import SLAB_NAME, SLOT_BITS, slots_in
from kvgds.upkeep.images import Row, Slab, arena_for, images, payload_fault, place_of
from kvgds.upkeep.slabs import writing

if TYPE_CHECKING:
    from kvgds.upkeep.records import Progress, Report

    Blocks = dict[tuple[bytes, bytes], Row]  # by namespace and key

_TICKS = 40  # an engine's clock: its number among those that opened the index, then a counter
_PROGRESS = 1024
_GENERATIONS = 1 << 62  # from there on an engine could not count on
_TEXT = re.compile(rb'\{"block_tokens":[^{}]{1,4096}\}')


def rebuild(root: Path, report: Report, progress: Progress) -> None:
    """Make a new index beside the old one, then put it in its place.

    What a rebuild can't tell from a block is a block that was evicted or deleted and not
    yet overwritten: it comes back. A key names its content, so that is never wrong bytes.
    """
    check_index(root)
    _remove_new(root)
    slabs = _slab_files(root, report)
    blocks = _stamped_blocks(slabs, report, progress)
    texts = _namespace_texts(root, {namespace for namespace, _ in blocks})
    new = root / NEW_INDEX[0]
    try:
        _write_index(new, slabs, blocks, texts)
        report.kept_aside = _swap(root, new)
    finally:
        _remove_new(root)
    report.blocks = len(blocks)
    report.nbytes = sum(row.nbytes for row in blocks.values())


def _remove_new(root: Path) -> None:
    for name in NEW_INDEX:
        (root / name).unlink(missing_ok=True)


def _slab_files(root: Path, report: Report) -> list[Slab]:
    """The slabs that lie there, by what their names say."""
    slabs: dict[int, Slab] = {}
    for name in sorted(os.listdir(root)):
        match = SLAB_NAME.fullmatch(name)
        if match is None:
            continue
        slab_id, slot_bytes = int(match[1]), int(match[2])
        slots = slots_in(root / name)
        if not slots or slab_id in slabs:
            report.add("orphan", name, "holds no slots of this directory; an engine removes it")
            continue
        slabs[slab_id] = Slab(slab_id, slot_bytes, slots, root / name)
    return list(slabs.values())


def _stamped_blocks(slabs: list[Slab], report: Report, progress: Progress) -> Blocks:
    """The latest whole block of each name."""
    blocks: Blocks = {}
    total = sum(slab.slots for slab in slabs)
    done = 0
    arena = arena_for(slabs)
    for slab in slabs:
        for place, image in images(slab, range(slab.slots), arena):
            row = _proven(slab, place, image, report)
            if row is not None and row.namespace is not None and row.key is not None:
                name = (row.namespace, row.key)
                blocks[name] = max(blocks.get(name, row), row, key=lambda row: row.generation)
            done += 1
            if done % _PROGRESS == 0 or done == total:
                progress("reading stamps", done, total)
    return blocks


def _proven(slab: Slab, place: int, image: memoryview | OSError, report: Report) -> Row | None:
    """The block in a slot, if stamp and payload show that it is whole."""
    slot = slab.id << SLOT_BITS | place
    if isinstance(image, OSError):
        report.add("corrupt", place_of(slot), f"it can't be read: {image.strerror}")
        return None
    stamp = Stamp.decode(image[:PAGE])
    if stamp is None:
        return None
    if stamp.algorithm == NO_CHECKSUM:
        report.unproven += 1
        return None
    fault = _fault(slab, stamp, image)
    if fault is not None:
        report.add("corrupt", place_of(slot), f"left out: {fault}", repaired=True)
        return None
    return Row(slot, stamp.namespace, stamp.key, stamp.generation, stamp.nbytes, stamp.algorithm)


def _fault(slab: Slab, stamp: Stamp, image: memoryview) -> str | None:
    """Why a block with a whole stamp can't be taken in, or None."""
    if image_bytes(stamp.nbytes) > slab.slot_bytes:
        return "the block is larger than its place"
    if stamp.generation >= _GENERATIONS:
        return f"no engine counts to generation {stamp.generation}"
    return payload_fault(stamp, image)


def _namespace_texts(root: Path, digests: set[bytes]) -> dict[bytes, str]:
    """What the old indexes, damaged as they may be, still tell of these namespaces."""
    texts: dict[bytes, str] = {}
    for name in sorted(os.listdir(root)):
        status = os.lstat(root / name)
        if not (name.startswith("index.db") and status.st_size and stat.S_ISREG(status.st_mode)):
            continue
        with (
            open(root / name, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            found = {digest_of(match[0]): match[0] for match in _TEXT.finditer(data)}
        texts |= {digest: found[digest].decode() for digest in digests & found.keys()}
    return texts


def _write_index(path: Path, slabs: list[Slab], blocks: Blocks, texts: dict[bytes, str]) -> None:
    """A new index. Engines count on from the generations that it holds."""
    latest = max((row.generation for row in blocks.values()), default=0)
    with contextlib.closing(connect(path)) as database:
        if os.geteuid() == 0:  # it is for whose the directory is
            folder = os.stat(path.parent)
            with contextlib.suppress(PermissionError):  # not all that is root may
                os.chown(path, folder.st_uid, folder.st_gid)
        database.execute("INSERT INTO meta VALUES ('opens', ?)", (latest >> _TICKS,))
        database.execute("INSERT INTO meta VALUES ('power', 0)")  # who knows what was promised
    with writing(path) as index:
        index.apply(Changes(add_slab=[(slab.id, slab.slot_bytes, slab.slots) for slab in slabs]))
        digests = {namespace for namespace, _ in blocks}
        numbers = {digest: index.namespace(digest, texts.get(digest, "")) for digest in digests}
        rows = [
            (row.slot, numbers[namespace], key, row.generation, row.nbytes, row.algorithm)
            for (namespace, key), row in blocks.items()
        ]
        index.apply(Changes(put=[(*row, row[3], 0) for row in rows]))
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _swap(root: Path, new: Path) -> str:
    """Put the new index in place; where the old one is now, or "".

    The old one goes first, and its log with it: alone it would be an older index, which does not
    know the latest slabs. Without any, an engine says what to do.
    """
    path = root / "index.db"
    asides = (root / f"index.db.damaged-{n}" for n in itertools.count(1))
    aside = next(aside for aside in asides if not os.path.lexists(aside))
    there = path.exists()
    if there:
        path.rename(aside)
    with contextlib.suppress(FileNotFoundError):
        os.rename(f"{path}-wal", f"{aside}-wal")
    Path(f"{path}-shm").unlink(missing_ok=True)
    new.replace(path)
    sync_folder(root)
    return str(aside) if there else ""
