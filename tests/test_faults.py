"""The faulty file systems are faulty in the way they say, as NIXL meets it, and sound otherwise."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest

os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")  # read when NIXL's library is loaded

from nixl_cu12._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t
from nixl_cu12._bindings import nixlBackendError

from faults import FaultyDisk, read_only, small_disk

BLOCK = 64 * 1024
SLOTS = 16
DEADLINE_S = 5.0
TESTS = Path(__file__).parent


def eventually(condition: Callable[[], bool]) -> bool:
    """Poll until the condition holds; False if it doesn't in time."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


class Mover:
    """A NIXL agent, memory of SLOTS blocks, and one thread that posts: io_uring cancels what a thread leaves behind."""

    def __init__(self, queue: str) -> None:
        config = nixl_agent_config(
            backends=[], sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        )
        self.agent = nixl_agent(queue, config)
        self.agent.create_backend("POSIX", {queue: "true", "ios_pool_size": "64"})
        self.thread = ThreadPoolExecutor(1)
        self.memory = mmap.mmap(-1, SLOTS * BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.agent.register_memory(
            [(self.address, SLOTS * BLOCK, 0, "")], "DRAM", backends=["POSIX"]
        )
        self.handles: list[Any] = []
        self.files: list[tuple[int, Any]] = []

    def open(self, path: Path, size: int = SLOTS * BLOCK) -> int:
        """Open a file of that size with O_DIRECT and register it."""
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        if size:
            os.posix_fallocate(file, 0, size)
        self.files.append(
            (file, self.agent.register_memory([(0, 1 << 40, file, "")], "FILE", backends=["POSIX"]))
        )
        return file

    def post(self, direction: str, file: int, slots: range, at: int = 0) -> Any:
        """Start one transfer of several descriptors, on the thread; answers with the handle's future."""
        memory = [(self.address + slot * BLOCK, BLOCK, 0) for slot in slots]
        extents = [(at + slot * BLOCK, BLOCK, file) for slot in slots]
        handle = self.agent.initialize_xfer(
            direction,
            self.agent.get_xfer_descs(memory, "DRAM"),
            self.agent.get_xfer_descs(extents, "FILE"),
            self.agent.name,
            b"",
            ["POSIX"],
        )
        self.handles.append(handle)
        return self.thread.submit(self._transfer, handle)

    def _transfer(self, handle: Any) -> Any:
        self.agent.transfer(handle)
        return handle

    def state(self, handle: Any) -> str:
        return str(self.agent.check_xfer_state(handle))

    def wait(self, handle: Any) -> None:
        """Poll until the transfer is done; raises what NIXL raises."""
        assert eventually(lambda: self.state(handle) == "DONE")

    def move(self, direction: str, file: int, slots: range) -> None:
        self.wait(self.post(direction, file, slots).result(DEADLINE_S))

    def fill(self, seed: bytes) -> bytes:
        """Fill the memory with a pattern of its own for every slot."""
        pattern = b"".join(
            (seed + bytes([slot]) + b"?" * 7)[:8] * (BLOCK // 8) for slot in range(SLOTS)
        )
        self.memory[:] = pattern
        return pattern

    def close(self) -> None:
        """Drain, then let go: a handle released in flight is a use after free."""
        self.thread.shutdown()
        for handle in self.handles:
            eventually(lambda handle=handle: self._ended(handle))  # type: ignore[misc]
            self.agent.release_xfer_handle(handle)
        for file, registered in self.files:
            self.agent.deregister_memory(registered, backends=["POSIX"])
            with contextlib.suppress(OSError):  # closed all the same on a disk that vanished
                os.close(file)

    def _ended(self, handle: Any) -> bool:
        try:
            return self.state(handle) == "DONE"
        except nixlBackendError:
            return True


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultyDisk]:
    """A healthy FaultyDisk."""
    with FaultyDisk(tmp_path) as disk:
        yield disk


@pytest.fixture(params=["use_uring", "use_aio"])
def bare_mover(request: pytest.FixtureRequest) -> Iterator[Mover]:
    """NIXL with each of its kernel queues, on whatever disk."""
    try:
        mover = Mover(request.param)
    except nixlBackendError:
        pytest.skip(f"NIXL's POSIX plugin has no {request.param} here")
    yield mover
    mover.close()


@pytest.fixture
def mover(bare_mover: Mover, disk: FaultyDisk) -> Iterator[Mover]:
    """NIXL on the FaultyDisk; the disk is healthy again before transfers are drained."""
    yield bare_mover
    disk.clear()


ALL = range(SLOTS)
FEW = range(4)


def test_bytes_make_the_round_trip(disk: FaultyDisk, mover: Mover) -> None:
    """With no rule, what NIXL writes is in the backing file and comes back."""
    file = mover.open(disk.root / "a.slab")
    pattern = mover.fill(b"trip")
    mover.move("WRITE", file, ALL)
    mover.fill(b"else")
    mover.move("READ", file, ALL)

    assert pattern == mover.memory[:]
    assert pattern == (disk.backing / "a.slab").read_bytes()


@pytest.mark.parametrize("direction", ["READ", "WRITE"])
def test_an_error_reaches_check_xfer_state(disk: FaultyDisk, mover: Mover, direction: str) -> None:
    """EIO is an exception on the transfer that met it, for as long as the rule stands."""
    bad, good = mover.open(disk.root / "bad.slab"), mover.open(disk.root / "good.slab")
    disk.fail("read", match="bad.*")
    disk.fail("write", match="bad.*")

    with pytest.raises(nixlBackendError):
        mover.move(direction, bad, FEW)
    mover.move(direction, good, FEW)
    disk.clear()
    mover.move(direction, bad, FEW)


def test_an_error_strikes_only_its_range(disk: FaultyDisk, mover: Mover) -> None:
    """A bad sector leaves its neighbours alone."""
    file = mover.open(disk.root / "a.slab")
    disk.fail("read", offset=2 * BLOCK + 4096, length=4096)

    mover.move("READ", file, range(2))
    mover.move("READ", file, range(3, 6))
    with pytest.raises(nixlBackendError):
        mover.move("READ", file, range(2, 3))


@pytest.mark.parametrize("direction", ["READ", "WRITE"])
def test_a_hung_transfer_is_in_progress_until_released(
    disk: FaultyDisk, mover: Mover, direction: str
) -> None:
    """Within the file and with O_DIRECT the post returns at once, and more can be posted; all wait for the disk."""
    file = mover.open(disk.root / "a.slab")
    disk.hang("read")
    disk.hang("write")
    first = mover.post(direction, file, range(4)).result(DEADLINE_S)
    second = mover.post(direction, file, range(4, 8)).result(DEADLINE_S)
    disk.wait_waiting(8)

    assert (mover.state(first), mover.state(second)) == ("PROC", "PROC")
    disk.release()
    mover.wait(first)
    mover.wait(second)
    assert disk.waiting() == 0


def test_a_write_past_the_end_blocks_the_post(disk: FaultyDisk, mover: Mover) -> None:
    """The kernel can't extend a FUSE file asynchronously: the posting thread is held with the write."""
    file = mover.open(disk.root / "a.slab", size=0)
    disk.hang("write")
    posting = mover.post("WRITE", file, FEW)
    disk.wait_waiting(1)

    with pytest.raises(TimeoutError):
        posting.result(0.2)
    disk.release()
    mover.wait(posting.result(DEADLINE_S))


def test_a_held_transfer_can_end_in_an_error(disk: FaultyDisk, mover: Mover) -> None:
    """A disk that was silent for long may fail in the end."""
    file = mover.open(disk.root / "a.slab")
    disk.hang("read", count=2)
    handle = mover.post("READ", file, range(2)).result(DEADLINE_S)
    disk.wait_waiting(2)

    disk.release(errno.EIO)
    with pytest.raises(nixlBackendError):
        mover.wait(handle)


def test_a_vanished_disk_fails_what_it_held(disk: FaultyDisk, mover: Mover) -> None:
    """Unplugged: transfers in flight and all that follow are errors."""
    file = mover.open(disk.root / "a.slab")
    disk.hang("read")
    handle = mover.post("READ", file, FEW).result(DEADLINE_S)
    disk.wait_waiting(len(FEW))
    disk.vanish()

    with pytest.raises(nixlBackendError):
        mover.wait(handle)
    with pytest.raises(nixlBackendError):
        mover.move("WRITE", file, FEW)


@pytest.mark.parametrize("op", ["read", "write"])
def test_a_short_transfer_is_an_error(
    disk: FaultyDisk, mover: Mover, op: Literal["read", "write"]
) -> None:
    """NIXL takes fewer bytes than asked for a failure."""
    file = mover.open(disk.root / "a.slab")
    disk.short(op, 4096)

    with pytest.raises(nixlBackendError):
        mover.move(op.upper(), file, FEW)


def test_a_dropped_write_is_done_and_not_there(disk: FaultyDisk, mover: Mover) -> None:
    """A disk that lies: the write is acknowledged, the old bytes stay."""
    file = mover.open(disk.root / "a.slab")
    mover.fill(b"new")
    disk.drop("write", offset=BLOCK, length=1)
    mover.move("WRITE", file, range(2))

    assert (
        mover.memory[:BLOCK] + bytes(BLOCK) == (disk.backing / "a.slab").read_bytes()[: 2 * BLOCK]
    )


def test_a_delayed_read_takes_its_time(disk: FaultyDisk, mover: Mover) -> None:
    """A slow disk answers late, and right."""
    file = mover.open(disk.root / "a.slab")
    disk.delay("read", 0.1)
    started = time.monotonic()
    mover.move("READ", file, FEW)

    assert time.monotonic() - started >= 0.1


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_small_disk_runs_full(
    tmp_path: Path, bare_mover: Mover, kind: Literal["tmpfs", "ext4"]
) -> None:
    """ENOSPC, for NIXL and for plain writes; freed space can be used again."""
    with small_disk(tmp_path, 4 << 20, kind) as root:
        (root / "filler").write_bytes(bytes(7 << 19))
        file = bare_mover.open(root / "a.slab", size=0)
        with pytest.raises(nixlBackendError):
            bare_mover.move("WRITE", file, ALL)
        with pytest.raises(OSError, match="No space left"):
            (root / "b").write_bytes(bytes(1 << 20))

        (root / "filler").unlink()
        (root / "b").unlink()
        bare_mover.move("WRITE", file, ALL)


def test_a_small_disk_below_a_faulty_one(tmp_path: Path) -> None:
    """Faults of the backing file system come through."""
    with small_disk(tmp_path, 1 << 20) as small, FaultyDisk(tmp_path, backing=small) as disk:
        with pytest.raises(OSError, match="No space left"):
            (disk.root / "a").write_bytes(bytes(2 << 20))
        assert (small / "a").stat().st_size == 1 << 20


def test_read_only_refuses_writes_and_ends(tmp_path: Path) -> None:
    """EROFS for root as well, for new files and old, until the block is left."""
    (tmp_path / "old").write_bytes(b"old")
    with read_only(tmp_path):
        for name in ("old", "new"):
            with pytest.raises(OSError, match="Read-only"):
                (tmp_path / name).write_bytes(b"new")
        assert (tmp_path / "old").read_bytes() == b"old"
    (tmp_path / "old").write_bytes(b"new")


def test_rules_count_and_skip_and_match(disk: FaultyDisk) -> None:
    """A rule strikes what it names, after `skip`, `count` times."""
    disk.fail("unlink", errno.EACCES, match="deep/*.tmp", skip=1, count=1)
    (disk.root / "deep").mkdir()
    outcomes = []
    for name in ("deep/0.tmp", "0.tmp", "deep/1.tmp", "deep/2.tmp"):
        (disk.root / name).touch()
        try:
            (disk.root / name).unlink()
        except PermissionError:
            outcomes.append(name)

    assert outcomes == ["deep/1.tmp"]


def test_direct_io_can_be_refused_alone(disk: FaultyDisk) -> None:
    """A file system that takes no O_DIRECT, at open."""
    disk.fail("open", errno.EINVAL, direct=True)
    disk.fail("create", errno.EINVAL, direct=True)
    os.close(os.open(disk.root / "a", os.O_RDWR | os.O_CREAT))

    for flags in (os.O_RDWR, os.O_RDWR | os.O_CREAT):
        with pytest.raises(OSError, match="Invalid argument"):
            os.open(disk.root / ("b" if flags & os.O_CREAT else "a"), flags | os.O_DIRECT)


def test_requests_are_seen_in_order(disk: FaultyDisk) -> None:
    """Enough to check that a file was down before it got its name."""
    with (disk.root / "a.tmp").open("wb") as file:
        file.write(b"block")
        file.flush()
        os.fsync(file.fileno())
    (disk.root / "a.tmp").rename(disk.root / "a")

    steps = [
        (seen.op, seen.path, seen.length)
        for seen in disk.seen()
        if seen.op in ("write", "fsync", "rename")
    ]
    assert steps == [("write", "a.tmp", 5), ("fsync", "a.tmp", 0), ("rename", "a", 0)]
    assert disk.seen("write", match="*.tmp")[0].offset == 0


def test_sqlite_in_wal_mode(disk: FaultyDisk) -> None:
    """WAL, its shared memory map and its locks work; a failing disk is an error, and is got over."""
    one, two = (sqlite3.connect(disk.root / "index.db", timeout=0.05) for _ in range(2))
    assert one.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
    one.execute("CREATE TABLE slot (key TEXT)")
    for key in range(100):
        with one:
            one.execute("INSERT INTO slot VALUES (?)", [f"{key}" * 100])
    assert two.execute("SELECT count(*) FROM slot").fetchone() == (100,)
    other = "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute('SELECT count(*) FROM slot').fetchone())"
    assert _python("-c", other, str(disk.root / "index.db")).split() == ["100"]

    one.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        two.execute("BEGIN IMMEDIATE")
    one.rollback()

    disk.fail("write", match="*-wal")
    with pytest.raises(sqlite3.OperationalError, match="disk I/O error"), two:
        two.execute("DELETE FROM slot")
    disk.clear()
    one.close()
    two.close()
    again = sqlite3.connect(disk.root / "index.db")
    assert again.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert again.execute("SELECT count(*) FROM slot").fetchone() == (100,)
    again.close()


def _python(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True
    ).stdout


def test_flock_excludes(disk: FaultyDisk) -> None:
    """Between open files and between processes."""
    path = disk.root / "lock"
    other = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with path.open("w") as one, path.open("w") as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(subprocess.CalledProcessError):
            _python("-c", other, str(path))
        fcntl.flock(one, fcntl.LOCK_UN)
        _python("-c", other, str(path))


def test_a_shared_map_reaches_the_backing(tmp_path: Path) -> None:
    """Written through mmap, there when the disk is gone."""
    with FaultyDisk(tmp_path) as disk, (disk.root / "a").open("w+b") as file:
        file.truncate(8192)
        with mmap.mmap(file.fileno(), 8192) as view:
            view[4096:4100] = b"page"
    assert (tmp_path / "backing" / "a").read_bytes()[4096:4100] == b"page"


def test_files_live_on_without_their_names(disk: FaultyDisk) -> None:
    """Renamed over, unlinked, and listed like anywhere else."""
    (disk.root / "d").mkdir()
    (disk.root / "a").write_bytes(b"old")
    (disk.root / "b").write_bytes(b"new")
    with (disk.root / "a").open("rb") as old, (disk.root / "b").open("rb") as new:
        (disk.root / "b").rename(disk.root / "d" / "a")
        (disk.root / "d" / "a").replace(disk.root / "a")
        assert (old.read(), new.read()) == (b"old", b"new")
        (disk.root / "a").unlink()
        assert os.fstat(new.fileno()).st_nlink == 0
        assert os.pread(new.fileno(), 3, 0) == b"new"
    assert [path.name for path in disk.root.iterdir()] == ["d"]
    (disk.root / "d").rmdir()
    (disk.root / "e").touch()
    with pytest.raises(FileExistsError):
        (disk.root / "e").touch(exist_ok=False)


def test_leaving_frees_who_is_held(tmp_path: Path) -> None:
    """A test that fails while its disk hangs leaves no thread, no mount and no server."""
    done = threading.Event()

    def read() -> None:
        with contextlib.suppress(
            OSError
        ):  # the bytes come, but the disk may be gone before the close
            (left.root / "a").read_bytes()
        done.set()

    with pytest.raises(ZeroDivisionError), FaultyDisk(tmp_path) as left:
        (left.root / "a").write_bytes(b"held")
        left.hang("read")
        threading.Thread(target=read, daemon=True).start()
        left.wait_waiting(1)
        raise ZeroDivisionError

    assert done.wait(DEADLINE_S)
    assert not os.path.ismount(left.root)
    assert not mounted(tmp_path)


def mounted(where: Path) -> bool:
    """Whether anything is mounted below `where`."""
    return str(where) in Path("/proc/self/mountinfo").read_text()


HUNG_READER = """
import os, sys, threading
file = os.open(sys.argv[1], os.O_RDONLY)
threading.Thread(target=os.pread, args=(file, 1, 0)).start()
os.pread(file, 1, 4096)
"""


def test_a_killed_process_is_let_go(disk: FaultyDisk) -> None:
    """While the disk hangs on: a test may kill the process that waits for it."""
    (disk.root / "a").write_bytes(bytes(8192))
    disk.hang("read")
    with subprocess.Popen([sys.executable, "-c", HUNG_READER, str(disk.root / "a")]) as reader:
        disk.wait_waiting(1)
        reader.kill()
        assert reader.wait(DEADLINE_S) == -signal.SIGKILL
    assert eventually(lambda: disk.waiting() == 0)


HUNG_OWNER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_faults import BLOCK, FEW, FaultyDisk, Mover
with FaultyDisk(Path(sys.argv[1])) as disk:
    mover = Mover(sys.argv[3])
    file = mover.open(disk.root / "a.slab")
    disk.hang("read")
    mover.post("READ", file, FEW).result()
    disk.wait_waiting(len(FEW))
    print("hung", flush=True)
    open(disk.root / "a.slab", "rb").read()
"""


@pytest.mark.parametrize("queue", ["use_uring", "use_aio"])
def test_a_killed_owner_leaves_nothing(tmp_path: Path, queue: str) -> None:
    """Not even with NIXL transfers in flight, for which a dying process waits."""
    arguments = [sys.executable, "-c", HUNG_OWNER, str(tmp_path), str(TESTS), queue]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        if owner.stdout.readline() != "hung\n":
            pytest.skip(f"NIXL's POSIX plugin has no {queue} here, or nothing can be mounted")
        assert mounted(tmp_path)
        owner.kill()
        assert owner.wait(DEADLINE_S) == -signal.SIGKILL
    assert eventually(lambda: not mounted(tmp_path))
