"""A circuit breaker: after some failures in a row nobody asks any more, until a trial succeeds.

Pure: the clock is passed in. M. Nygard, "Release It!", 2007.
"""

from __future__ import annotations

import random

_FAILURES = 3
_PAUSE_S = (0.5, 30.0)  # before the first trial; at most


class Breaker:
    """Counts what fails and says for how long not to ask.

    Attributes:
        reason: what failed last, while it is open; "": it is closed.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._failures = 0
        self._pause_s = _PAUSE_S[0]

    def failure(self, reason: str) -> float | None:
        """Something failed. How long to wait for a trial, if that has opened it just now."""
        self._failures += 1
        if self.reason or self._failures < _FAILURES:
            return None
        return self.trip(reason)

    def trip(self, reason: str) -> float:
        """Open, or stay so: how long to wait for the next trial, in seconds."""
        self.reason = reason
        pause = self._pause_s
        self._pause_s = min(2 * pause, _PAUSE_S[1])
        return pause * random.uniform(0.75, 1.25)  # noqa: S311 - so that not all come at once

    def success(self) -> None:
        """Something that was asked has been answered."""
        self._failures = 0
        if not self.reason:
            self._pause_s = _PAUSE_S[0]

    def close(self) -> None:
        """A trial has succeeded: ask again. If that fails, the next trial is later."""
        self.reason = ""
        self._failures = 0
