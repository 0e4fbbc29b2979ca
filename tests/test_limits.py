"""What the system refuses or lacks: the error says so and what to do, and nothing hangs.

Each in a process of its own, since none of that can be taken back.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from faults import small_disk

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
        timeout=50,
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


# --- what NIXL needs, and what it doesn't ---------------------------------------------------------

LACKING = """
def lowest():
    os.close(free := os.dup(1))
    return free

async def main():
    said = set()
    before = lowest()
    for _ in range(3):
        try:
            async with open_engine(config(sys.argv[1])):
                print("opened")
        except kvgds.PathUnavailable as error:
            said.add(str(error).partition("\\n")[0])
    print(*said)
    names = [thread.name for thread in threading.enumerate()]
    print(lowest() - before, [name for name in names if "nixl" in name])

asyncio.run(main())
"""
NO_PROC = ("unshare", "--mount", "sh", "-c", 'umount -l /proc && exec "$@"', "sh")
NO_OVERRIDE = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")  # root reads what it may
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="a mount table of its own takes root")


def closed_home(where: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """How to run what has a home that it may not read."""
    home = where / "home"
    home.mkdir(mode=0)
    return NO_OVERRIDE if os.geteuid() == 0 else (), {"HOME": str(home)}


def test_a_plugin_that_is_not_there(tmp_path: Path) -> None:
    """However often opening fails, nothing of it stays open."""
    said, left = run(LACKING, tmp_path / "kv", NIXL_PLUGIN_DIR="/nowhere")
    assert "POSIX plugin can't be used" in said
    assert left == "0 []"


def test_a_home_that_can_not_be_read(tmp_path: Path) -> None:
    """NIXL then makes no agent, and doesn't say why."""
    before, environ = closed_home(tmp_path)
    said, left = run(LACKING, tmp_path / "kv", before=before, **environ)
    assert "let HOME name a folder" in said
    assert left == "0 []"
    doctor = (
        "from kvgds.doctor import diagnose; print([part.fix for part in diagnose(()).nixl.refused])"
    )
    (fixes,) = run(doctor, before=before, **environ)
    assert fixes.count("let HOME name a folder") == 2


@root_only
def test_without_proc(tmp_path: Path) -> None:
    """There NIXL's queue is found, and the owner of a file."""
    said, left = run(LACKING, tmp_path / "kv", before=NO_PROC)
    assert "mount /proc" in said
    assert left == "0 []"


ADVISED = """
async def main():
    forbid(MADVISE, error=errno.EINVAL)
    async with open_engine(config(sys.argv[1])) as engine:
        view = bytearray(8192)
        print(await engine.store(b"a", b"x" * 8192), await engine.load(b"a", view))
        print(view == b"x" * 8192)

asyncio.run(main())
"""


def test_a_kernel_without_huge_pages(tmp_path: Path) -> None:
    """They are asked for, and not needed."""
    assert run(ADVISED, tmp_path / "kv") == ["True True", "True"]


# --- forks ----------------------------------------------------------------------------------------

FORKED = """
settings = config(sys.argv[1])
loop = asyncio.new_event_loop()
context = open_engine(settings)
engine = loop.run_until_complete(context.__aenter__())
loop.run_until_complete(engine.store(b"a", b"x" * 8192))
waits, alive = os.pipe()
print(os.getpid(), flush=True)
if os.fork():
    os._exit(0)
os.close(alive)
os.read(waits, 1)  # until the parent is dead

async def use():
    view = bytearray(8192)
    calls = [engine.store(b"b", view), engine.load(b"a", view), engine.load_many([(b"a", view)]),
             engine.prefix([b"a"]), engine.delete(b"a"), engine.aclose(),
             context.__aexit__(None, None, None)]
    for call in calls:
        try:
            print("no error:", await call)
        except kvgds.ClosedError as error:
            print(error)
    async with open_engine(settings) as another:
        print(await another.load(b"a", view), view == b"x" * 8192)

loop.run_until_complete(use())
"""


def test_an_engine_in_a_forked_child(tmp_path: Path) -> None:
    """Every call says why it can't go on, at once; and the parent's lock has died with it."""
    parent, *said, found = run(FORKED, tmp_path / "kv")
    assert said == [f"the engine was opened by process {parent}; open one after the fork"] * 7
    assert found == "True True"


# --- a disk that copies what is overwritten ------------------------------------------------------

COPYING = """
from support import content

async def main():
    async with open_engine(config(sys.argv[1], tier={"capacity_bytes": 40 << 20})) as engine:
        stored = wrong = 0
        for i in range(1500):
            try:
                stored += await engine.store(b"%d" % i, content(i, 65536))
            except kvgds.StorageFull:
                pass
        for i in range(1500):
            memory = bytearray(65536)
            wrong += await engine.load(b"%d" % i, memory) and memory != content(i, 65536)
        print(stored > 400, wrong)

asyncio.run(main())
"""


def test_a_full_disk_that_copies_what_is_overwritten(tmp_path: Path) -> None:
    """As btrfs does: refused, and no page that can't be written kills the process."""
    with small_disk(tmp_path, 120 << 20, "btrfs") as disk:
        assert run(COPYING, disk / "kv") == ["True 0"]
