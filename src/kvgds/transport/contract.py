"""What a transport is asked for, and what it asks of a transfer."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from kvgds.memory import Region, Span
    from kvgds.schedule import Row

    Rows = list[Row]


class File:
    """An open file that transfers may name. Detach it before closing the descriptor.

    Attributes:
        direct: whether it was opened with O_DIRECT.
        attached: whether NIXL keeps more of it than its number, until it is detached.
    """

    __slots__ = ("attached", "direct", "fd")

    def __init__(self, fd: int, *, direct: bool = False) -> None:
        self.fd = fd
        self.direct = direct
        self.attached = False


class Memory(Protocol):
    """Ranges of one kind of memory: a region, or a buffer of our own."""

    @property
    def spans(self) -> Sequence[Span]:
        """The ranges."""

    @property
    def device(self) -> int | None:
        """The GPU that they lie in; None: host memory."""

    @property
    def closed(self) -> bool:
        """Whether it may not be registered, because it is wanted no more, or not there yet."""


class Later(enum.Enum):
    """The answer of a transfer that is not ready to go on."""

    LATER = enum.auto()


LATER: Final = Later.LATER


class Transfer(Protocol):
    """One block on its way. Every method runs on a reactor thread.

    The transport calls ``begin`` until it answers, moves the rows, then calls ``end`` until
    that answers (or ``fail`` once, if they did not move), and then delivers the transfer.
    """

    write: bool  # from memory to the file or object
    file: File
    place: str  # for objects: the object's name; else, words for where it lies
    nbytes: int
    device: int  # whose memory device_rows name

    @property
    def urgent(self) -> bool:
        """Whether somebody stands still until it is done; that may come to be so."""

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for it any more."""

    @property
    def regions(self) -> Sequence[Memory]:
        """What its rows lie in."""

    @property
    def device_rows(self) -> Rows:
        """Once ``begin`` has answered: what moves between the file and GPU memory."""

    def begin(self) -> Rows | Later | None:
        """The rows of host memory to move: address, file offset, bytes.

        None: not wanted any more. LATER: copies are under way; ask again in a moment.
        """

    def end(self) -> Later | None:
        """All rows have moved. LATER: copies are under way; ask again in a moment."""

    def fail(self, error: Exception) -> None:
        """The rows have not moved; the memory is dirty, but nothing touches it any more."""


class NotMoved(Exception):
    """A transfer failed: errno, if it can be known, and why.

    Where NIXL fails, which tells no errno, they are those of a plain call on the same rows.
    """

    def __init__(self, number: int | None, text: str) -> None:
        super().__init__(text)
        self.errno = number


class Transport(Protocol):
    """Moves transfers. Any thread may call any method.

    Preconditions: the memory of a transfer's rows lies in its regions, and its file is
    open. The implementation delivers every submitted transfer exactly once, on a thread
    of its own, and never touches its memory afterwards.
    """

    name: str

    def start(self) -> None:
        """Get ready; blocks. Raises PathUnavailable or CapacityError if it can't."""

    def submit(self, transfers: Sequence[Transfer], deliver: Callable[[list[Any]], None]) -> None:
        """Queue transfers; never blocks. Raises ClosedError after :meth:`close`."""

    def add_gpu(self) -> None:
        """Add NIXL's plugin for GPU memory; blocks. Raises PathUnavailable if it can't be used."""

    def detach(self, thing: File | Region) -> Future[None]:
        """Forget a file or region that no transfer uses any more."""

    def close(self) -> Future[None]:
        """Take no more, finish what was submitted, then let go of everything."""

    def abandon(self) -> None:
        """Leak whatever a wedged transfer still uses, instead of freeing it under it."""
