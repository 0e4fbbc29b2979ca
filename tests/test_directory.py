"""Whose a directory is: forked children, a lock file that is removed, and pipes among the files."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import warnings
from typing import TYPE_CHECKING, Any

import pytest

import sharing
from faults import FaultyDisk, small_disk
from kvgds import BusyError, ConfigError, FileTier, open_engine
from kvgds.doctor import diagnose
from kvgds.paths import filesystem_of
from kvgds.tiers import locks
from kvgds.tiers.directory import lock_root, owner_of
from kvgds.tiers.ledger import Ledger
from kvgds.upkeep import fsck, gc, listing
from support import config, content, opened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@contextlib.contextmanager
def forked(act: Callable[[], object] = lambda: None) -> Iterator[None]:
    """With a child that shares all descriptors, has done something, and lives on until the end."""
    done, said = os.pipe()
    waits, goes = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: there are threads
        child = os.fork()
    if not child:
        status = 1
        try:
            act()
            os.write(said, b"x")
            os.close(goes)
            os.read(waits, 1)
            status = 0
        finally:
            os._exit(status)
    os.close(said)
    assert os.read(done, 1) == b"x"
    try:
        yield
    finally:
        for fd in (done, waits, goes):
            os.close(fd)
        assert os.waitpid(child, 0)[1] == 0


# --- forked children ------------------------------------------------------------------------


def test_a_forked_child_does_not_keep_the_lock_of_slabs(tmp_path: Path) -> None:
    """It may live as long as it likes: once the parent lets go, the directory is free."""
    fd = lock_root(tmp_path)
    with forked():
        locks.close(fd)
        locks.close(lock_root(tmp_path))
        assert owner_of(tmp_path) == ""


async def test_a_forked_child_does_not_keep_the_directory_of_an_engine(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    with contextlib.ExitStack() as stack:
        async with opened(root) as engine:
            await engine.store(b"a", content(b"a", 5000))
            stack.enter_context(forked())
        async with opened(root) as engine:
            assert await engine.load(b"a", bytearray(5000))


def test_a_forked_child_does_not_give_up_its_parents_lock(tmp_path: Path) -> None:
    """Not even if it closes what it thinks is its own."""
    fd = lock_root(tmp_path)
    with forked(lambda: locks.close(fd)):
        with pytest.raises(BusyError, match=f"process {os.getpid()}, this one"):
            lock_root(tmp_path)
        assert owner_of(tmp_path) == str(os.getpid())
    locks.close(fd)


async def test_a_forked_child_does_not_keep_a_directory_of_files_open(tmp_path: Path) -> None:
    """Whoever opens it next is alone, and so counts anew."""
    root = tmp_path / "kv"
    async with contextlib.AsyncExitStack() as stack:
        async with sharing.opened(root) as engine:
            await sharing.put(engine, b"a")
            stack.enter_context(forked())
        sharing.write_ledger(root, 1 << 20)
        async with sharing.opened(root) as engine:
            assert sharing.ledger(root) == sharing.IMAGE
            assert await sharing.get(engine, b"a")


def test_a_forked_child_does_not_keep_the_ledger(tmp_path: Path) -> None:
    root = os.open(tmp_path, os.O_RDONLY)
    with contextlib.ExitStack() as stack:
        with Ledger(root).held():
            stack.enter_context(forked())
        with open(tmp_path / "ledger", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(root)


# --- the lock file --------------------------------------------------------------------------


async def test_a_lock_file_that_is_removed_frees_nothing(tmp_path: Path) -> None:
    """A cleaner of old files may take it; the engine still has the directory."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        await engine.store(b"a", content(b"a", 5000))
        (root / "lock").unlink()
        with pytest.raises(BusyError, match="process unknown"):
            async with open_engine(config(root)):
                pass
        for act in (fsck, lambda root: fsck(root, rebuild=True)):
            with pytest.raises(BusyError):
                await asyncio.to_thread(act, root)
        tier = FileTier(root=root, capacity_bytes=1 << 20)
        (part,) = (await asyncio.to_thread(diagnose, [tier])).roots
        assert part.in_use
        assert await engine.load(b"a", bytearray(5000))
    async with opened(root) as engine:
        assert await engine.load(b"a", bytearray(5000))


def test_where_directories_have_no_lock_for_all_the_file_is_locked(tmp_path: Path) -> None:
    """As on network file systems, which keep the lock of a directory to one host."""
    with FaultyDisk(tmp_path) as disk:
        fd = lock_root(disk.root)
        with open(disk.root / "lock", "rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with pytest.raises(BusyError, match=f"process {os.getpid()}"):
            lock_root(disk.root)
        assert owner_of(disk.root) == str(os.getpid())
        locks.close(fd)
        assert owner_of(disk.root) == ""


# --- pipes ----------------------------------------------------------------------------------


async def open_and_close(root: Path) -> None:
    async with open_engine(config(root)):
        pass


ACTS: dict[str, Callable[[Path], Any]] = {
    "open": lambda root: asyncio.run(open_and_close(root)),
    "ls": listing,
    "fsck": fsck,
    "gc": lambda root: gc(root, keep_bytes=0),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", ["kvgds.json", "lock", "index.db", "index.db-wal"])
def test_a_pipe_is_told_and_not_waited_for(tmp_path: Path, name: str, act: str) -> None:
    root = tmp_path / "kv"
    asyncio.run(open_and_close(root))
    (root / name).unlink(missing_ok=True)
    os.mkfifo(root / name)
    if (name, act) == ("lock", "ls"):
        assert listing(root).namespaces == ()  # it needs no lock
        return
    if (name, act) in {("index.db", "fsck"), ("index.db-wal", "fsck")}:
        (problem,) = fsck(root).problems  # it reports on an index, whatever that is
        assert (problem.kind, f"{name} is no regular file" in problem.text) == ("index", True)
        return
    with pytest.raises(ConfigError, match=f"{name}'.*no regular file.*remove it"):
        ACTS[act](root)


async def test_a_path_that_is_too_long_for_the_index_says_so(tmp_path: Path) -> None:
    """SQLite, which says nothing of that, takes shorter ones than the system does."""
    for most, fits in ((504, True), (505, False)):
        left = most - len(os.fsencode(tmp_path)) - len("/index.db")
        above = tmp_path / ("a" * 99) / ("b" * 99)
        root = above / ("c" * 99) / ("d" * (left - 301))
        root.parent.mkdir(parents=True, exist_ok=True)
        assert len(os.fsencode(root / "index.db")) == most
        if fits:
            async with opened(root) as engine:
                assert await engine.store(b"key", bytes(100))
        else:
            with pytest.raises(ConfigError, match="takes paths of 504 bytes at most"):
                async with open_engine(config(root)):
                    pass


# --- what is mounted there ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "a b", "a\tb\n", "a\\040b", "a\rb\u00a0c", "a\udcffb"])
def test_what_is_mounted_is_known_whatever_its_name(tmp_path: Path, name: str) -> None:
    """Whether a directory is shared, and copies on write, is told by it."""
    outside = filesystem_of(tmp_path)
    with small_disk(tmp_path / name, 2 << 20, "ext4") as disk:
        assert filesystem_of(disk / "kv") == "ext4"
        with small_disk(disk, 1 << 20) as inner:
            assert filesystem_of(inner) == "tmpfs"
    assert filesystem_of(disk) == outside
