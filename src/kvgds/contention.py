"""What is known of the wait for the interpreter lock, which is the process's, and so is this.

While the event loop is busy in Python, a thread that has given up the lock gets it back only after
`sys.getswitchinterval()`, 5 ms by default, or when the loop waits by itself. Work that takes less
is then better done without giving it up. Any thread may call these.
"""

from __future__ import annotations

import time

_LONG_S = 3e-3  # shorter waits come from the system's own scheduling, too
_BUSY_S = 50e-3  # for so long it is then taken to be busy
_busy_until = 0.0


def waited(seconds: float) -> None:
    """Taking the lock back took this long."""
    global _busy_until  # noqa: PLW0603 - see the module's docstring
    if seconds > _LONG_S:
        _busy_until = time.monotonic() + _BUSY_S


def busy() -> bool:
    """Whether giving up the lock costs more than short work."""
    return time.monotonic() < _busy_until
