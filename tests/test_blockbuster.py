"""The guard in conftest.py: kvgds code that would stop the event loop fails its test."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from blockbuster import BlockingError

import kvgds

if TYPE_CHECKING:
    from collections.abc import Callable


def planted(call: str, define: str = "def") -> Callable[[], Any]:
    """Compile a function that makes `call` and belongs, by its file name, to kvgds."""
    source = f"""
import asyncio, os, sqlite3, threading, time
from kvgds.transport.agent import Agent
{define} function():
    return {call}
"""
    names: dict[str, Any] = {}
    filename = Path(kvgds.__file__).with_name("planted.py")
    exec(compile(source, filename, "exec"), names)  # noqa: S102  the source is a few lines up
    function: Callable[[], Any] = names["function"]
    return function


@pytest.mark.parametrize(
    "call",
    [
        "time.sleep(0)",
        "threading.Event().wait(0.01)",
        "open(os.__file__)",
        "os.open('/', os.O_RDONLY)",
        "os.fsync(0)",
        "os.pread(0, 1, 0)",
        "sqlite3.connect(':memory:')",
        "Agent('planted', ('uring',), '')",
        "Agent.check(None, None)",
    ],
)
async def test_kvgds_may_not_block_the_loop(call: str) -> None:
    with pytest.raises(BlockingError):
        planted(call)()


async def test_kvgds_may_block_another_thread() -> None:
    await asyncio.to_thread(planted("time.sleep(0)"))


def test_kvgds_may_block_where_no_loop_runs() -> None:
    planted("time.sleep(0)")()


async def test_a_test_may_block_the_loop() -> None:
    time.sleep(0)


async def test_kvgds_may_start_a_process() -> None:
    call = "await asyncio.create_subprocess_exec('true', stdin=-3, stdout=-1)"
    process = await planted(call, define="async def")()
    assert await process.wait() == 0
