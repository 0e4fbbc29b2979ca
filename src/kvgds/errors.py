"""Every exception that kvgds raises, by whose fault it is.

::

    KvgdsError
    ├── ConfigError          (ValueError)   a setting or an argument is wrong
    ├── PathUnavailable                     the path asked for can't be had
    ├── TransferError        (OSError)      bytes did not move
    │   └── TransferTimeout  (TimeoutError)
    ├── BlockCorrupt                        stored bytes are provably wrong
    ├── CapacityError
    │   ├── QueueFull
    │   └── StorageFull
    ├── BusyError                           still in use, may not be freed or opened twice
    └── ClosedError                         closed, or of another event loop or process
"""

from __future__ import annotations

import os
from errno import EHOSTDOWN
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

E = TypeVar("E", bound=BaseException)


def untraced(error: E) -> E:
    """An error that is kept, and its causes, without the frames that they came through.

    Those know the caller's memory, and the error itself: a cycle, left to the garbage collector.
    What nobody raises on purpose keeps its traceback, for whoever has to find the fault.
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) or type(link).__module__.startswith("kvgds."):
            link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def explain(error: OSError) -> str:
    """What went wrong, and with which file, in words."""
    text = error.strerror or str(error)
    return f"{error.filename}: {text}" if error.filename else text


class KvgdsError(Exception):
    """Root of everything that kvgds raises on purpose. Can be pickled, for other processes."""

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self).items() if name != "settled"}
        return _restored, (type(self), self.args, state, getattr(self, "errno", None))


def _restored(
    kind: type[KvgdsError], args: tuple[object, ...], state: dict[str, object], errno: int | None
) -> KvgdsError:
    error = kind.__new__(kind)
    error.args = args
    vars(error).update(state)
    if isinstance(error, OSError):  # which keeps its number elsewhere
        error.errno = errno
    return error


def _shown(value: object) -> str:
    try:
        return repr(value)
    except Exception:  # noqa: BLE001 - anybody's; and Python's, of integers with too many digits
        return f"<{type(value).__name__}>"


class ConfigError(KvgdsError, ValueError):
    """A setting or an argument is wrong.

    Attributes:
        field: name of the setting or argument.
        value: what was given; ``...`` where nothing was.
        rule: what it has to be, in words that say what to do.
    """

    def __init__(self, field: str, value: object, rule: str) -> None:
        given = "" if value is ... else f"={_shown(value)}"
        super().__init__(f"{field}{given}: {rule}")
        self.field = field
        self.value = value
        self.rule = rule

    def __reduce__(self) -> tuple[Any, ...]:
        """With the value in words: what is wrong may be anything."""
        kind, (cls, args, state, number) = super().__reduce__()
        return kind, (cls, args, {**state, "value": _shown(self.value)}, number)


class PathUnavailable(KvgdsError):
    """The path that was asked for can't be had here.

    Attributes:
        report: what was tried and what each trial found, one line each.
    """

    def __init__(self, message: str, report: tuple[str, ...] = ()) -> None:
        super().__init__("\n".join((message, *report)))
        self.report = report


class TransferError(KvgdsError, OSError):
    """Bytes did not move; the destination is to be treated as dirty.

    A missing block is not an error (a load answers ``False``), and provably wrong
    stored bytes are :class:`BlockCorrupt`.

    Attributes:
        direction: ``"load"``, ``"store"``, ``"delete"`` or ``"prefix"``; "" of a close.
        key: the block's key; ``b""`` where it is not of one block.
        path: ``"direct"``, ``"bounce"``, ``"gds"`` or ``"gds-compat"``; "" where no byte had to
            move.
        backend: the transport that failed, for example ``"POSIX/uring"``.
        reason: what went wrong, without which block's operation it was.
        errno: the system's error number where it could be found out, else ``None``.
        kept_in: of a store with ``write="through"`` that came only as far as the first tier:
            that tier's name, which serves the block and goes on trying; else "".
    """

    kept_in: str = ""

    def __init__(
        self,
        message: str,
        *,
        direction: str = "",
        key: bytes = b"",
        path: str = "",
        backend: str = "",
        errno: int | None = None,
    ) -> None:
        where = f"{direction} of block {key.hex()[:32]}: " if key else ""
        # For a deadline the system's words would be of a connection that timed out, and for a tier
        # that is left alone of a host of which nothing is known.
        own = isinstance(self, TransferTimeout) or errno == EHOSTDOWN
        words = os.strerror(errno) if errno and not own else ""
        why = f" ({words})" if words and words not in message else ""
        self.reason = f"{message}{why}"
        super().__init__(f"{where}{self.reason}")
        self.direction = direction
        self.key = key
        self.path = path
        self.backend = backend
        self.errno = errno


class Settled(Protocol):
    """The end of a use of memory. However many may await it, or be called back."""

    def __await__(self) -> Generator[Any, None, None]:
        """Return once the memory is the caller's again. A cancel ends the wait, not the use."""

    def add_done_callback(self, callback: Callable[[Settled], object]) -> None:
        """Have a function called then, by the event loop: no cancel reaches that."""


class TransferTimeout(TransferError, TimeoutError):
    """The operation passed its deadline.

    A delete may still happen. A store's block may be there: where ``kept_in`` says so; with
    ``layout="files"``, if only its acknowledgement was missing; in a bucket, where it may also
    appear later, whole.

    Attributes:
        settled: ``None`` where the caller's memory is free already (the transfer was
            queued, waited for a GPU's stream, or ran through the bounce region). On a
            direct transfer and on a GPU's copy, which nothing can stop, something to
            await, or to be called back by: see :class:`Settled`. Until then operations
            on that memory raise :class:`BusyError`.
    """

    settled: Settled | None = None


class BlockCorrupt(KvgdsError):
    """What is stored under the key is provably not what was stored there.

    The block is gone, its place is quarantined, and the destination of the load is to be
    treated as dirty. Loading the key again is a miss.

    Attributes:
        key: the block's key.
        reason: which check failed.
        place: where the bytes lie, for example ``"slab 3 slot 17"``.
    """

    def __init__(self, key: bytes, reason: str, place: str) -> None:
        super().__init__(f"block {key.hex()[:32]} at {place}: {reason}")
        self.key = key
        self.reason = reason
        self.place = place


class CapacityError(KvgdsError):
    """Something bounded is full; raised as such where the system allows no more threads."""


class QueueFull(CapacityError):
    """A ``*_nowait`` call found the queue at its limit. Awaiting calls wait instead."""


class StorageFull(CapacityError):
    """No room for the block: nothing may be evicted, or the disk is full."""


class BusyError(KvgdsError):
    """In use by another: memory with a transfer in flight, or a directory.

    A slab directory belongs to one engine; of one of files, somebody has had the ledger locked for
    a minute. Also an operation that another task awaits.
    """


class ClosedError(KvgdsError):
    """The engine is closed, or the memory was deregistered.

    Also what an engine answers on another event loop, or in a forked child.
    """
