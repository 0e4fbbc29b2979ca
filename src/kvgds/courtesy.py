"""Courtesy with the interpreter lock: how a thread that works for the event loop shares it.

A thread that computes in Python keeps the event loop waiting until it lets go of the lock. But
once it has let go, a loop that is itself busy in Python gives the lock back only after 5 ms. So
threads let go often while that costs nothing, and when it turns out to cost a lot they keep the
lock for a while: a loop that is busy does not notice what it would lose.
"""

from __future__ import annotations

import ctypes
import time

_LONG_S = 1e-3  # a wait for the lock that tells of a busy loop
_BUSY_S = 50e-3  # for so long it is then taken to be busy
_let_go = ctypes.CDLL(None).sched_yield  # the foreign call releases the lock

_busy_until = 0.0


def loop_is_busy() -> bool:
    """Whether letting go of the lock has lately cost a lot."""
    return time.monotonic() < _busy_until


def waited(seconds: float) -> None:
    """Tell how much longer than its work a call took that lets go of the lock."""
    global _busy_until  # noqa: PLW0603 - the lock is the process's, and so is what is known of it
    if seconds > _LONG_S:
        _busy_until = time.monotonic() + _BUSY_S


def breathe() -> None:
    """Let others have the lock, unless that has lately cost a lot."""
    started = time.monotonic()
    if started >= _busy_until:
        _let_go()
        waited(time.monotonic() - started)
