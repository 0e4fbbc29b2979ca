"""How a bench is started, and how it ends: for the command line, and for scripts."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvgds._starting import INTERRUPTED

if TYPE_CHECKING:
    from collections.abc import Coroutine


def directory(text: str) -> Path:
    """The value of an option: a directory to make others in.

    Raises:
        ArgumentTypeError: there is none, or it can't be written to.
    """
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text} must be a directory; make it first")
    if not os.access(text, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text} can't be written to")
    return Path(text)


def output(text: str) -> Path:
    """The value of an option: a file that results are added to.

    Raises:
        ArgumentTypeError: it can't be one.
    """
    if os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text} is a directory; name a file in it")
    if not os.path.exists(text):
        directory(os.path.dirname(text) or os.curdir)
    elif not os.access(text, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} can't be written to")
    return Path(text)


def count(text: str) -> int:
    """The value of an option: so many.

    Raises:
        ArgumentTypeError: it is no whole number, or less than 1.
    """
    with suppress(ValueError):
        if (number := int(text)) > 0:
            return number
    raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least 1")


def run(bench: Coroutine[Any, Any, None]) -> None:
    """Run it on an event loop of its own.

    SIGINT, SIGTERM and the end of its terminal cancel it, so that it cleans up; not what this
    process is to ignore, as ``nohup`` has it.

    Raises:
        SystemExit: it was cancelled.
    """
    status = INTERRUPTED

    async def cancellable() -> None:
        task = asyncio.ensure_future(bench)

        def end(number: int) -> None:
            nonlocal status
            status = 128 + number
            task.cancel()

        for each in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(each) is not signal.SIG_IGN:
                asyncio.get_running_loop().add_signal_handler(each, end, each)
        await task

    try:
        asyncio.run(cancellable())
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise SystemExit(status) from None
