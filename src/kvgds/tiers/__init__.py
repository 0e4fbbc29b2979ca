"""Where blocks lie: the contract that every tier fulfils, and what an engine lends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from concurrent.futures import Future

    from kvgds.blocks import BlockKey
    from kvgds.paths import Move, PathPlan
    from kvgds.transport import Transport


class Backlog(Protocol):
    """Takes blocks on to the next tier of a stack. Belongs to the event loop's thread.

    Attributes:
        out: the next tier doesn't answer: nobody should wait for it.
    """

    @property
    def out(self) -> bool:
        """See above."""

    def hasten(self, keys: Sequence[BlockKey]) -> None:
        """These are about to be evicted, and the next tier lacks them: take them next.

        May be called again with the same keys.
        """


@dataclass(frozen=True, slots=True)
class Services:
    """What an engine lends its tiers.

    Attributes:
        transport: moves the bytes.
        post: runs a function on the event loop's thread; any thread may call it.
        run: runs a function in the engine's small executor, then ``done`` on the event
            loop's thread with the ended future. For file-system calls.
        settle: hands moves back to the engine, each once; on the event loop's thread.
        backlog: what takes this tier's blocks to the next one; None: it stands alone.
    """

    transport: Transport
    post: Callable[..., None]
    run: Callable[[Callable[[], Any], Callable[[Future[Any]], None]], None]
    settle: Callable[[Sequence[Move]], None]
    backlog: Backlog | None = None


@dataclass(frozen=True, slots=True)
class TierStatistics:
    """What a tier holds and has done since it was opened.

    Attributes:
        name: for example ``"slabs:/nvme/kv"``.
        blocks: blocks that a load would find, of this engine's namespace; of a bucket or with
            ``layout="files"`` those that were seen there.
        bytes_used: bytes of blocks, stamps and padding included, of all namespaces; of a bucket
            those that were seen there.
        capacity_bytes: the limit on them; 0: a bucket, which has none.
        evictions: blocks dropped to make room.
        quarantined: places taken out of use because what they gave back was wrong.
        dropped: blocks evicted before the next tier had them.
        out: why it answers nothing at present; "": it does.
    """

    name: str
    blocks: int
    bytes_used: int
    capacity_bytes: int
    evictions: int
    quarantined: int
    dropped: int = 0
    out: str = ""


class Tier(Protocol):
    """Keeps blocks. Every method but open and close runs on the event loop's thread.

    Preconditions, kept by the engine: a move's view is claimed and its lease lent; keys
    are well-formed; after ``close`` nothing is asked any more.

    The implementation settles every move that it was given exactly once, with ``status``
    or ``error`` set; a block is visible only when it is whole; a move that is abandoned is
    not published; it never blocks the loop. A subclass may leave out what has a body here, if it
    always answers, is never the first tier of a stack, or lets nobody wait for the next one.

    Attributes:
        authoritative: whether ``contains`` is the whole truth. False where others may store
            blocks too: then a load is tried even if ``contains`` says no.
        checked: whether payloads get a checksum that each load compares.
    """

    name: str
    plan: PathPlan
    authoritative: bool
    checked: bool

    @property
    def out(self) -> str:
        """Why nothing should be asked of it at present; "": it answers."""
        return ""

    def open(self, progress: Callable[[str, int, int], None]) -> None:
        """Make ready what lies there. Blocks: runs in the executor."""

    def load(self, moves: Sequence[Move]) -> None:
        """Bring blocks into their views: status ``"hit"`` or ``"miss"``, or an error."""

    def store(self, moves: Sequence[Move]) -> None:
        """Take blocks from their views: status ``"stored"`` or ``"present"``, or an error."""

    def expire(self) -> None:
        """Some moves were abandoned: settle those that have not been begun."""

    def contains(self, key: BlockKey) -> bool:
        """Whether a load would find the block, as far as is known without looking."""

    def prefix(
        self, keys: Sequence[BlockKey], done: Callable[[int], None], wanted: Callable[[], bool]
    ) -> None:
        """Tell on the loop, at once or later, how many of the first keys have their blocks.

        Once nobody waits for that, which `wanted` says, it looks no further and may tell less.
        """

    def delete(self, key: BlockKey, done: Callable[[bool, Exception | None], None]) -> None:
        """Drop a block, then tell on the loop whether it was there, once that is durable."""

    def owed(self) -> Iterable[tuple[BlockKey, int]]:
        """Keys and payload bytes of blocks that the next tier may lack, least recent first.

        Called once, after open. It may give some that the next tier has.
        """
        return ()

    def mirrored(self, moves: Sequence[Move]) -> None:  # noqa: ARG002 - there is no next tier
        """The next tier has the blocks that these loads, which have ended, brought it.

        They are evicted rather than others from now on. That is noted on a best-effort basis:
        a crash may forget it, so that they are owed again.
        """
        return

    def is_mirrored(self, key: BlockKey) -> bool:  # noqa: ARG002 - none is known
        """Whether the next tier has the block, as far as is known without looking."""
        return False

    def look_again(self, given_up: Sequence[BlockKey] = ()) -> None:  # noqa: ARG002 - nobody waits
        """Those who wait for room look again: the backlog's ``out`` has changed, perhaps.

        Args:
            given_up: blocks that won't be taken until the tier is opened again: they may be
                evicted as if the next tier had them.
        """
        return

    def statistics(self) -> TierStatistics:
        """What it holds and has done."""

    def idle(self) -> bool:
        """Whether nothing is under way."""

    def close(self) -> None:
        """Let go of everything. Blocks: runs in the executor, when idle."""
