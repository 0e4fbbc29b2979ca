"""Starting threads, which the system may refuse: limits on processes count them, too.

Pools are filled when they are opened. `submit` of one that has to start a thread raises where it
can't, on the event loop perhaps, and one of its other threads may run the function nevertheless.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from kvgds.errors import CapacityError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import ThreadPoolExecutor


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Around what starts a thread.

    Raises:
        CapacityError: the system allows no more of them.
    """
    try:
        yield
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        advice = "raise the limit on processes (ulimit -u, or the pids limit of the container)"
        raise CapacityError(f"{error}: {advice}") from None


def fill(pool: ThreadPoolExecutor, count: int) -> None:
    """Start so many threads of a pool whose others are all busy; see :func:`starting`."""
    filled = threading.Event()
    try:
        for _ in range(count):
            with starting():
                pool.submit(filled.wait)
    finally:
        filled.set()
