"""What a reactor is asked for, and how it waits: for that, or for a ring's completions."""

from __future__ import annotations

import os
import select
import time
from collections import deque
from typing import Any

_POLL_LEAST_S = 1e-3  # poll(2) counts in milliseconds


class Inbox:
    """A queue with one reader, which may wait for a descriptor as well. Any thread may put."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._bell, select.POLLIN)
        self._waiting = False

    def put(self, item: object) -> None:
        """Leave something; wakes the reactor if it waits."""
        self._items.append(item)
        if self._waiting:
            self._waiting = False
            os.eventfd_write(self._bell, 1)

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
            if (self._bell, select.POLLIN) in ready:
                os.eventfd_read(self._bell)
        self._waiting = False

    def close(self) -> None:
        """Let go of the bell; nothing may be put any more."""
        os.close(self._bell)
