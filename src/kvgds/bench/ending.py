"""How a bench is started, and how it ends: for the command line, and for scripts."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
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


def run(bench: Coroutine[Any, Any, None]) -> None:
    """Run it on an event loop of its own. SIGINT and SIGTERM cancel it, so that it cleans up.

    Raises:
        SystemExit: it was cancelled.
    """

    async def cancellable() -> None:
        task = asyncio.ensure_future(bench)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await task

    try:
        asyncio.run(cancellable())
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except asyncio.CancelledError:
        raise SystemExit(128 + signal.SIGTERM) from None
