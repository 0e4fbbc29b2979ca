"""Variables that libraries read when they are loaded or opened: set for so long, one at a time.

The environment is the process's: of two who change it at once, the later would put back for good
what the other has set. So whoever loads or opens such a library waits for the other. Any thread
may call this.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_changing = threading.Lock()


@contextlib.contextmanager
def changed(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables, and afterwards put back what they were. Blocks while another has set some."""
    with _changing:
        before = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
