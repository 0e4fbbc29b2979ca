"""What a reactor is asked for, and how it waits: for that, or for a ring's completions."""

from __future__ import annotations

import os
import select
import time
from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_POLL_LEAST_S = 1e-3  # poll(2) counts in milliseconds
_COPY_S = (50e-6, 1e-3)  # between two looks at what GPUs do


class _Bell:
    """Ends a wait. It lasts as long as somebody has it, and so until whoever just rings it has."""

    fd = -1

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class Inbox:
    """A queue with one reader, which may wait for a descriptor as well. Any thread may put."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._bell: _Bell | None = _Bell()
        self._fd = self._bell.fd
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        self._waiting = False

    def put(self, item: object) -> None:
        """Leave something; wakes the reactor if it waits."""
        self._items.append(item)
        bell = self._bell  # the reader may close meanwhile
        if self._waiting and bell is not None:
            self._waiting = False
            os.eventfd_write(bell.fd, 1)

    def take(self) -> Any:  # noqa: ANN401 - transfers, or a call
        """The oldest item, or None."""
        return self._items.popleft() if self._items else None

    def watch(self, fd: int) -> None:
        """Let this descriptor end a wait too."""
        self._poll.register(fd, select.POLLIN)

    def wait(self, timeout_s: float | None) -> None:
        """Wait until there is something."""
        if timeout_s == 0.0:
            return
        if timeout_s is not None and timeout_s < _POLL_LEAST_S:
            time.sleep(timeout_s)
            return
        self._waiting = True
        if not self._items:
            ready = self._poll.poll(None if timeout_s is None else timeout_s * 1e3)
            if (self._fd, select.POLLIN) in ready:
                os.eventfd_read(self._fd)
        self._waiting = False

    def close(self) -> None:
        """Reader: wait no more. What is put from now on is left there."""
        self._bell = None


def copy_pause(since: float, count: int) -> float:
    """Seconds until the next look at so many copies of GPUs; the last began or ended at ``since``.

    Their streams may be busy for long: ever fewer looks, and those at many cost more.
    """
    least, most = _COPY_S
    return min(max((time.monotonic() - since) / 8, least), max(most, least * count))


def fulfil(function: Callable[[], None], future: Future[None]) -> None:
    """Do what was asked for, and tell whoever waits, unless that was given up before."""
    wanted = future.set_running_or_notify_cancel()
    try:
        function()
    except Exception as error:  # noqa: BLE001 - handed to whoever waits
        if wanted:
            future.set_exception(error)
    else:
        if wanted:
            future.set_result(None)


def all_of(futures: Sequence[Future[None]]) -> Future[None]:
    """A future that ends when all have; with the first error that there is."""
    whole: Future[None] = Future()
    _await_next(iter(futures), [], whole)
    return whole


def _await_next(
    left: Iterator[Future[None]],
    errors: list[BaseException],
    whole: Future[None],
    ended: Future[None] | None = None,
) -> None:
    if ended is not None and (error := ended.exception()):
        errors.append(error)
    one = next(left, None)
    if one is not None:
        one.add_done_callback(partial(_await_next, left, errors, whole))
    elif whole.set_running_or_notify_cancel():
        whole.set_exception(errors[0]) if errors else whole.set_result(None)
