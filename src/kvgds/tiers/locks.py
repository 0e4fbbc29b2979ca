"""flock on files and directories, given up even if a child shares it.

A child that was forked has its parent's descriptors, and flock belongs to what they share: it would
outlive the parent's for as long as the child does. So `close` unlocks before it closes. And since a
parent may be killed, a forked child lets go at once of what it shares: there these descriptors
become others, of nothing, which may be closed like the first. Everything blocks.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time

from kvgds.errors import BusyError

_LOCK_S = 60.0
_LONG_S = 1.0
_log = logging.getLogger("kvgds")
_taken: set[int] = set()  # descriptors that this very process has locked


def _let_go() -> None:
    """In a child that was forked: the locks are its parent's alone."""
    with contextlib.suppress(OSError):  # none can be opened: the child keeps them, and won't unlock
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in _taken:
            os.dup2(nothing, fd, inheritable=False)
        os.close(nothing)
    _taken.clear()


os.register_at_fork(after_in_child=_let_go)


def lock_nowait(fd: int, kind: int) -> None:
    """Lock a file or directory; BlockingIOError if others have it."""
    _taken.add(fd)  # first: a child that is forked meanwhile lets go of it
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BaseException:
        _taken.discard(fd)
        raise


def is_ours(fd: int) -> bool:
    """Whether it is this process that has the file or directory locked, by another descriptor."""
    found = os.fstat(fd)
    for other in tuple(_taken):
        with contextlib.suppress(OSError):  # closed meanwhile, by another thread
            if os.path.samestat(found, os.fstat(other)):
                return True
    return False


def lock(fd: int, kind: int) -> None:
    """Lock a file; by asking again and again, because waiting in flock has no end.

    Who waits for long is told by the log: callers' deadlines may pass meanwhile, which say nothing.

    Raises:
        BusyError: somebody has had it for a minute.
    """
    began = time.monotonic()
    told = False
    pause = 50e-6
    while True:
        try:
            lock_nowait(fd, kind)
        except BlockingIOError:
            waited = time.monotonic() - began
            if waited > _LOCK_S:
                text = f"another process has had {_path(fd)} locked for {_LOCK_S:g} s"
                raise BusyError(text) from None
            if waited > _LONG_S and not told:
                told = True
                text = "another process has had %s locked for %g s: what stores or removes waits"
                _log.warning(text, _path(fd), _LONG_S)
            time.sleep(pause)
            pause = min(2 * pause, 2e-3)
        else:
            return


def _path(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


def close(fd: int) -> None:
    """Give up the lock, if this process took one, and close the descriptor."""
    try:
        if fd in _taken:
            _taken.remove(fd)
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)
