"""Variables are set for as long as a library reads them, whoever else opens one meanwhile."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from kvgds import environment

NAME = "KVGDS_TEST_MODE"


def wrong(mode: str) -> int:
    """How often of many times a thread did not find what it had set."""
    count = 0
    for _ in range(2000):
        with environment.changed({NAME: mode}):
            os.sched_yield()  # lets go of the interpreter lock, as a library does that opens
            count += os.environ.get(NAME) != mode
    return count


def test_two_who_open_at_once_find_what_they_set_and_leave_nothing() -> None:
    os.environ.pop(NAME, None)
    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(wrong, "abcd")] == [0] * 4
    assert NAME not in os.environ


def test_what_was_set_is_set_again() -> None:
    with environment.changed({NAME: "before"}):
        pass
    assert NAME not in os.environ
    os.environ[NAME] = "before"
    try:
        with environment.changed({NAME: "now"}):
            assert os.environ[NAME] == "now"
        assert os.environ[NAME] == "before"
    finally:
        del os.environ[NAME]
