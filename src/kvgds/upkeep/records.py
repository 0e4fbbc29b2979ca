"""What upkeep answers, as plain records. Pure."""

from __future__ import annotations

import fnmatch
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from kvgds.blocks import digest_of
from kvgds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Progress: TypeAlias = Callable[[str, int, int], None]  # what, done, total

_DIGITS = 8  # of a digest, at least, to name a namespace
_SHOWN = 10  # names in an error


def counted(count: int, one: str, many: str = "") -> str:
    """A number of things, for people: "1 block", "2 blocks"."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def quiet(what: str, done: int, total: int) -> None:
    """No progress."""


@dataclass(frozen=True, slots=True)
class NamespaceUse:
    """What one namespace has in a directory.

    Attributes:
        digest: its name on disk, 32 hex digits.
        fields: the fields of its :class:`~kvgds.blocks.Namespace`; empty if they are not known.
        blocks: how many blocks.
        nbytes: their payload.
        disk_bytes: what they take, stamps and padding included.
        sizes: payload bytes of one block, and how many have that size.
    """

    digest: str
    fields: dict[str, object]
    blocks: int
    nbytes: int
    disk_bytes: int
    sizes: dict[int, int]


@dataclass(slots=True)
class Use:
    """A namespace while its blocks are counted."""

    digest: bytes
    text: str
    sizes: Counter[int] = field(default_factory=Counter)
    disk_bytes: int = 0

    @classmethod
    def described(cls, digest: bytes, data: bytes) -> Use:
        """With the text in ``data``, if it is its own: by what that says blocks are dropped."""
        try:
            text = json.dumps(json.loads(data), sort_keys=True, separators=(",", ":"))
        except (ValueError, RecursionError):
            text = ""
        return cls(digest, text if digest_of(text.encode()) == digest else "")

    @property
    def fields(self) -> dict[str, object]:
        """What the text says; empty if that can't be understood."""
        try:
            found = json.loads(self.text)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def add(self, nbytes: int, disk_bytes: int, count: int = 1) -> None:
        """Count blocks of ``nbytes`` that take ``disk_bytes`` each."""
        self.sizes[nbytes] += count
        self.disk_bytes += disk_bytes * count

    def matches(self, wanted: str | None) -> bool:
        """Whether ``wanted`` names it: by its model, or by 8 or more digits of its digest.

        In a model's name ``*`` and ``?`` stand for any text and any character. None names all.
        """
        if wanted is None:
            return True
        if len(wanted) >= _DIGITS and self.digest.hex().startswith(wanted.lower()):
            return True
        return fnmatch.fnmatchcase(str(self.fields.get("model", "")), wanted)


def namespaces_of(uses: Iterable[Use]) -> tuple[NamespaceUse, ...]:
    """Those that have blocks, largest first."""
    found = [
        NamespaceUse(
            digest=use.digest.hex(),
            fields=use.fields,
            blocks=use.sizes.total(),
            nbytes=sum(nbytes * count for nbytes, count in use.sizes.items()),
            disk_bytes=use.disk_bytes,
            sizes=dict(sorted(use.sizes.items())),
        )
        for use in uses
        if use.sizes
    ]
    return tuple(sorted(found, key=lambda use: (-use.disk_bytes, use.digest)))


def no_match(wanted: str | None, uses: Iterable[Use]) -> ConfigError:
    """The error for a name that no namespace has; it tells those that there are."""
    names = {str(use.fields.get("model") or use.digest.hex()[:_DIGITS]) for use in uses}
    shown = ", ".join(sorted(names)[:_SHOWN])
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    there = f"names none of those that are there: {shown}{more}" if names else "there is none"
    return ConfigError("namespace", wanted, there)


@dataclass(frozen=True, slots=True)
class BlockEntry:
    """One block: its key and namespace as hex digits, its payload's bytes, where it lies."""

    key: str
    namespace: str
    nbytes: int
    place: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What a directory or a bucket holds.

    Attributes:
        namespaces: those asked for, largest first.
        entries: blocks of those, most recently used first (in a bucket: stored), as many as were
            asked for.
        allocated_bytes: what all its files of blocks take, free slots included.
        quarantined: places out of use, of all namespaces.
    """

    root: str
    layout: str
    namespaces: tuple[NamespaceUse, ...]
    entries: tuple[BlockEntry, ...]
    allocated_bytes: int
    quarantined: int


@dataclass(slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: ``"corrupt"``, ``"quarantined"``, ``"duplicate"``, ``"truncated"``, ``"orphan"``,
            ``"index"``, or ``"unread"``: the server did not give it, which proves nothing.
        place: where.
        text: what.
        repaired: whether it is no more.
    """

    kind: str
    place: str
    text: str
    repaired: bool = False


@dataclass(slots=True)
class Report:
    """What a check found.

    Attributes:
        blocks: blocks looked at; after a rebuild, those in the new index.
        nbytes: their payload.
        problems: what is wrong, or was.
        unproven: after a rebuild, whole stamps that were left out because they carry no
            checksum, so that nothing shows whether the payload behind them was written.
        kept_aside: after a rebuild, where the old index is.
    """

    root: str
    layout: str
    blocks: int = 0
    nbytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    unproven: int = 0
    kept_aside: str = ""

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong (any more)."""
        return all(problem.repaired for problem in self.problems)

    def add(self, kind: str, place: str, text: str, *, repaired: bool = False) -> Problem:
        """Note a problem."""
        problem = Problem(kind, place, text, repaired)
        self.problems.append(problem)
        return problem


@dataclass(slots=True)
class Retention:
    """What went and what stays; with a dry run, what would.

    Attributes:
        blocks: blocks dropped.
        nbytes: what they took, stamps and padding included.
        files: files, or objects, removed.
        freed_bytes: bytes given back to the file system, or bucket. In slabs the rest of
            ``nbytes`` becomes room for new blocks.
        kept_blocks: blocks that stay, of the namespaces asked for.
        kept_bytes: what those take.
        failed: objects of a bucket that could not be deleted.
        errors: of some of those, which and why.
    """

    root: str
    layout: str
    dry_run: bool
    blocks: int = 0
    nbytes: int = 0
    files: int = 0
    freed_bytes: int = 0
    kept_blocks: int = 0
    kept_bytes: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)
