"""What the system refuses or lacks: the error says so and what to do, and nothing hangs.

Each in a process of its own, since none of that can be taken back.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import asyncio, errno, os, resource, sys, threading
import kvgds
from forbidding import *
from kvgds import open_engine
from kvgds.engine import Engine, running
from kvgds.transport import NixlTransport
from support import config, until

def opened_files():
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sorted(os.readlink(link) for link in links if os.path.lexists(link))
"""


def run(
    program: str, *arguments: object, before: tuple[str, ...] = (), **environ: str
) -> list[str]:
    """What a program says, line by line."""
    done = subprocess.run(
        [*before, sys.executable, "-c", BEGIN + program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environ},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# --- threads ------------------------------------------------------------------------------------

SHARED = """
async def main():
    tier = {"layout": sys.argv[2]}
    async with open_engine(config(sys.argv[1], tier=tier, timeout_s=10.0)) as engine:
        await engine.store(b"a", b"x" * 8192)
        forbid_threads()
        print(*await asyncio.gather(*(engine.prefix([b"a"]) for _ in range(9))))
        views = [bytearray(8192) for _ in range(4)]
        outcomes = await engine.load_many([(b"a", view) for view in views])
        print([outcome.status for outcome in outcomes])
        print(all(view == b"x" * 8192 for view in views), await engine.store(b"b", bytes(99999)))

asyncio.run(main())
"""


@pytest.mark.parametrize("layout", ["slabs", "files"])
def test_no_operation_needs_a_thread_that_is_not_there(tmp_path: Path, layout: str) -> None:
    """Those who share a load get their copies, a store its slab, others what they ask for."""
    hits = ["hit"] * 4
    assert run(SHARED, tmp_path / "kv", layout) == ["1 1 1 1 1 1 1 1 1", str(hits), "True True"]


REFUSED = """
class Limited(NixlTransport):
    def start(self):
        if sys.argv[2] == "lane":
            forbid_threads()
        super().start()
        if sys.argv[2] == "index":
            forbid_threads()

async def main():
    before = opened_files()
    engine = Engine(config(sys.argv[1]), Limited(2))
    if sys.argv[2] == "first":
        forbid_threads()
    try:
        async with running(engine):
            print("opened")
    except kvgds.CapacityError as error:
        print(error)
    gone = opened_files()
    print([name for name in gone if gone.count(name) > before.count(name)])

asyncio.run(main())
"""


@pytest.mark.parametrize("which", ["first", "lane", "index"])
def test_an_engine_that_may_start_no_more_threads(tmp_path: Path, which: str) -> None:
    """Whichever thread is one too many, opening says what to do, and leaves nothing open."""
    said, left = run(REFUSED, tmp_path / "kv", which)
    assert "raise the limit on processes" in said
    assert left == "[]"
