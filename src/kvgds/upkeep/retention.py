"""Dropping blocks that are not worth their place any more."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, NamedTuple

from kvgds.errors import ConfigError
from kvgds.tiers.index import Changes
from kvgds.tiers.space import SLOT_BITS, later_slabs, slabs_in
from kvgds.upkeep.records import Retention, no_match
from kvgds.upkeep.slabs import indexed_slabs, reading, uses_in, writing

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path


LONGEST_S = 10**10
"""Oldest age that can be asked for, in seconds: some 300 years."""


class Rule(NamedTuple):
    """What may stay.

    Attributes:
        keep_bytes: most bytes, stamps and padding included; the least recently used go, or of
            a bucket those stored first.
        older_than_s: blocks not used for this long go (layout "files"), or stored before that
            (a bucket).
        namespace: only look at these namespaces; alone, all of their blocks go.
    """

    keep_bytes: int | None = None
    older_than_s: float | None = None
    namespace: str | None = None

    @property
    def before(self) -> float:
        """What was last used before this goes however much room there is, seconds since 1970."""
        if self.older_than_s is not None:
            return time.time() - self.older_than_s
        return math.inf if self.keep_bytes is None else -math.inf

    def check(self) -> None:
        """Raise ConfigError unless it says what goes, in numbers that can be."""
        if self == Rule():
            rule = "say what goes: --keep-bytes, --older-than or --namespace"
            raise ConfigError("gc", "nothing", rule)
        size, age = self.keep_bytes, self.older_than_s
        if size is not None and (type(size) is not int or size < 0):
            raise ConfigError("keep_bytes", size, "must be a number of bytes, at least 0")
        if age is not None and (type(age) not in (int, float) or not 0 <= age <= LONGEST_S):
            raise ConfigError("older_than_s", age, f"must be 0 to {LONGEST_S:,} seconds")


def gc_slabs(root: Path, rule: Rule, done: Retention) -> None:
    """Drop blocks from the index, and the slabs that hold none any more. Needs the lock.

    A slab's file is removed only after its removal from the index is committed: an engine
    removes files that the index does not know. One by one: of more than a death can have left an
    engine concludes that the index is old.
    """
    if rule.older_than_s is not None:
        text = "slabs only know the order of use, not its time; use --keep-bytes"
        raise ConfigError("older_than", f"{rule.older_than_s:g} s", text)
    with reading(root) as database:
        slots = _choose(database, rule, done)
        drop = set(slots)
        emptied = _emptied(database, drop)
        slabs = [slab for slab in indexed_slabs(root, database).values() if slab.id in emptied]
    done.files = len(slabs)
    done.freed_bytes = sum(slab.slots * slab.slot_bytes for slab in slabs)
    if done.dry_run or not drop:
        return
    with writing(root / "index.db") as index:
        index.apply(Changes(drop=[slot for slot in slots if slot >> SLOT_BITS not in emptied]))
        _sweep(root, {slab_id for slab_id, _, _ in index.slabs()})
        for slab in slabs:
            index.apply(Changes(drop_slab=[slab.id]))
            slab.path.unlink(missing_ok=True)


def _sweep(root: Path, known: set[int]) -> None:
    """Remove the slabs that deaths have left, as the next engine would, and no others.

    Another death would make them too many for it.
    """
    there = slabs_in(root)
    if known <= there.keys() and len(later_slabs(root, there, known)) <= 1:
        for number in there.keys() - known:
            (root / there[number]).unlink()


def _choose(database: sqlite3.Connection, rule: Rule, done: Retention) -> list[int]:
    there = uses_in(database)
    mine = {number for number, use in there.items() if use.matches(rule.namespace)}
    if rule.namespace is not None and not mine:
        raise no_match(rule.namespace, there.values())
    query = (
        "SELECT slot, namespace, slot_bytes FROM block JOIN slab ON slab.id = block.slot >> ? "
        "WHERE key IS NOT NULL ORDER BY used"
    )
    rows = [row for row in database.execute(query, (SLOT_BITS,)) if row[1] in mine]
    done.kept_blocks, done.kept_bytes = len(rows), sum(row[2] for row in rows)
    slots = []
    for slot, _, slot_bytes in rows:
        if done.kept_bytes <= (rule.keep_bytes or 0):
            break
        slots.append(slot)
        done.kept_blocks -= 1
        done.kept_bytes -= slot_bytes
        done.blocks += 1
        done.nbytes += slot_bytes
    return slots


def _emptied(database: sqlite3.Connection, drop: set[int]) -> set[int]:
    """Slabs that would have no row left; one with a quarantined slot stays, to remember that."""
    emptied = {slot >> SLOT_BITS for slot in drop}
    for (slot,) in database.execute("SELECT slot FROM block"):
        if slot not in drop:
            emptied.discard(slot >> SLOT_BITS)
    return emptied
