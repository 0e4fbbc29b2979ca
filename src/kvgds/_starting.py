"""A command that is interrupted while it starts ends at once, without a traceback.

Imported before all else, because what kvgds is built on takes a good part of a second to import.
In a process that is not the command line it does nothing: there an interrupt is the program's own
business. Runs on the main thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

INTERRUPTED = 128 + signal.SIGINT
"""Exit status of a program that was interrupted, as shells have it."""


def _is_command() -> bool:
    """Whether this process is ``kvgds`` or ``python -m kvgds``."""
    name = sys.argv[0] if sys.argv else ""
    if name == "-m":  # argv has no more yet: a package is imported before its __main__ is found
        return sys.orig_argv[-len(sys.argv)].removeprefix("-m") == "kvgds"
    return os.path.basename(name) == "kvgds"


_COMMAND = _is_command()


def end_at_once() -> None:
    """From now on an interrupt ends the process: nothing has begun, or all is done.

    An interrupt that is ignored, as by ``nohup``, stays so.
    """
    if _COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(ValueError):  # of another program's thread, whatever its name
            signal.signal(signal.SIGINT, _end)


def end_in_order() -> None:
    """From now on an interrupt is a KeyboardInterrupt, so that what was begun is cleaned up."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> None:
    os._exit(INTERRUPTED)


end_at_once()
