"""Every transport against the contract, and the POSIX one against a disk that fails."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import mmap
import os
import queue
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from faults import FaultyDisk, fill_up, small_disk
from forbidding import IO_SETUP, IO_URING_SETUP
from kvgds.memory import Arena, region_of
from kvgds.testing import Bench, HeldTransport, PlainTransfer, TransportContract
from kvgds.transport import File, NixlTransport
from kvgds.transport.inbox import Inbox
from support import Copying

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType

    from kvgds.transport import Later, Transport
    from kvgds.transport.contract import Rows

PAGE = 4096


def started(**settings: object) -> NixlTransport:
    transport = NixlTransport(**settings)  # type: ignore[arg-type]  # only tests are this lax
    transport.start()
    return transport


class TestUring(TransportContract):
    def make_transport(self) -> Transport:
        return started(queues=("uring",))


class TestAio(TransportContract):
    def make_transport(self) -> Transport:
        return started(queues=("aio",))


class TestThreeLanes(TransportContract):
    def make_transport(self) -> Transport:
        return started(lanes=3)


class TestHeld(TransportContract):
    def make_transport(self) -> Transport:
        return HeldTransport(started())


# --- a disk that fails --------------------------------------------------------------------------


def blocks(file: File, bench: Bench, count: int, *, write: bool) -> list[PlainTransfer]:
    """Neighbours in memory and file, which travel together."""
    return [
        PlainTransfer(file, [bench.region], [(bench.base + i * PAGE, i * PAGE, PAGE)], write=write)
        for i in range(count)
    ]


@pytest.fixture(params=["uring", "aio"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(started(queues=(request.param,)))
    yield bench
    bench.transport.close().result(20)


@contextlib.contextmanager
def opened_on(disk: FaultyDisk, name: str = "file") -> Iterator[File]:
    fd = os.open(disk.root / name, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        yield File(fd)
    finally:
        with contextlib.suppress(ConnectionError, OSError):  # of a disk that is gone
            os.close(fd)


def test_one_unreadable_page_among_64(tmp_path: Path, bench: Bench) -> None:
    """EIO for one row, and only its transfer fails, with EIO, though all were one request."""
    with FaultyDisk(tmp_path) as disk, opened_on(disk) as file:
        data = os.urandom(64 * PAGE)
        (disk.backing / "file").write_bytes(data)
        disk.fail("read", errno.EIO, offset=40 * PAGE, length=PAGE)
        transfers = blocks(file, bench, 64, write=False)
        bench.run(*transfers)
        failed = [i for i, transfer in enumerate(transfers) if transfer.error]
        assert failed == [40]
        assert getattr(transfers[40].error, "errno", None) == errno.EIO
        assert bench.arena.bytes[: 40 * PAGE] == data[: 40 * PAGE]
        assert bench.arena.bytes[41 * PAGE : 64 * PAGE] == data[41 * PAGE :]
        disk.clear()
        bench.run(*blocks(file, bench, 64, write=False))
        assert bench.arena.bytes[: 64 * PAGE] == data


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_one_unwritable_page_among_64(tmp_path: Path, bench: Bench, number: int) -> None:
    with FaultyDisk(tmp_path) as disk, opened_on(disk) as file:
        bench.arena.bytes[: 64 * PAGE] = data = os.urandom(64 * PAGE)
        disk.fail("write", number, offset=9 * PAGE, length=PAGE)
        transfers = blocks(file, bench, 64, write=True)
        bench.run(*transfers)
        failed = [i for i, transfer in enumerate(transfers) if transfer.error]
        assert failed == [9]
        assert getattr(transfers[9].error, "errno", None) == number
        written = (disk.backing / "file").read_bytes()
        assert written[: 9 * PAGE] == data[: 9 * PAGE]
        assert written[10 * PAGE :] == data[10 * PAGE :]


def test_reads_and_writes_that_fall_short(tmp_path: Path, bench: Bench) -> None:
    """Half a page is no page: EIO, never a success with stale bytes in the rest."""
    with FaultyDisk(tmp_path) as disk, opened_on(disk) as file:
        (disk.backing / "file").write_bytes(bytes(PAGE))
        for op, write in (("read", False), ("write", True)):
            disk.short(op, 512)  # type: ignore[arg-type]  # one of the two that it takes
            (transfer,) = blocks(file, bench, 1, write=write)
            bench.run(transfer)
            assert transfer.calls == ["begin", "fail"]
            assert getattr(transfer.error, "errno", None) == errno.EIO
            disk.clear()


def test_a_write_that_half_fits_tells_of_the_full_disk(tmp_path: Path, bench: Bench) -> None:
    with small_disk(tmp_path, 4 << 20) as disk, (disk / "file").open("w+b") as written:
        fill_up(disk / "fill")
        os.truncate(disk / "fill", (disk / "fill").stat().st_size - 20 * PAGE)
        rows = [(bench.base, 0, 64 * PAGE)]
        transfer = PlainTransfer(File(written.fileno()), [bench.region], rows, write=True)
        bench.run(transfer)
        assert getattr(transfer.error, "errno", None) == errno.ENOSPC
        assert 0 < written.seek(0, os.SEEK_END) < 64 * PAGE


@pytest.mark.parametrize("write", [False, True])
def test_what_fails_once_is_tried_once_more(tmp_path: Path, bench: Bench, write: bool) -> None:  # noqa: FBT001
    """A plain call on the same range succeeds right after: so does NIXL's second try."""
    with FaultyDisk(tmp_path) as disk, opened_on(disk) as file:
        data = os.urandom(PAGE)
        (disk.backing / "file").write_bytes(bytes(PAGE) if write else data)
        bench.arena.bytes[:PAGE] = data if write else bytes(PAGE)
        disk.fail("write" if write else "read", errno.EIO, count=1)
        (transfer,) = blocks(file, bench, 1, write=write)
        bench.run(transfer)
        assert transfer.calls == ["begin", "end"]
        assert bench.arena.bytes[:PAGE] == (disk.backing / "file").read_bytes() == data


def test_what_fails_twice_has_failed(tmp_path: Path, bench: Bench) -> None:
    """Even if plain calls succeed each time: nothing is tried for ever."""
    with FaultyDisk(tmp_path) as disk, opened_on(disk) as file:
        (disk.backing / "file").write_bytes(bytes(PAGE))
        disk.fail("read", errno.EIO, count=1)
        disk.fail("read", errno.EIO, skip=1, count=1)  # of those that the first rule lets pass
        (transfer,) = blocks(file, bench, 1, write=False)
        bench.run(transfer)
        assert transfer.calls == ["begin", "fail"]
        assert "plain call" in str(transfer.error)
        assert len(disk.seen("read")) == 4


def test_what_lies_in_gpu_memory_is_not_tried_again(tmp_path: Path, bench: Bench) -> None:
    """There is no GPU here, so its rows can't move, whatever a plain call says."""
    with FaultyDisk(tmp_path) as disk, opened_on(disk) as file:
        (disk.backing / "file").write_bytes(bytes(2 * PAGE))
        (transfer,) = blocks(file, bench, 1, write=False)
        transfer.device_rows = [(0, PAGE, PAGE)]
        bench.run(transfer)
        assert transfer.calls == ["begin", "fail"]
        assert "plain call" in str(transfer.error)
        assert len(disk.seen("read")) == 3  # NIXL's of the host's row, and a plain one of each


@contextlib.contextmanager
def stuck_and_free(where: Path, nbytes: int) -> Iterator[tuple[FaultyDisk, File, File]]:
    """Two files of so many bytes; reads of the first hang."""
    with (
        FaultyDisk(where) as disk,
        opened_on(disk, "stuck") as stuck,
        opened_on(disk, "free") as free,
    ):
        for name in ("stuck", "free"):
            (disk.backing / name).write_bytes(bytes(nbytes))
        disk.hang("read", match="stuck")
        yield disk, stuck, free


def test_a_file_that_hangs_holds_up_no_other(tmp_path: Path, bench: Bench) -> None:
    """The oldest transfer is stuck; those after it, to another file, are found all the same."""
    with stuck_and_free(tmp_path, 64 * PAGE) as (disk, stuck, free):
        held = blocks(stuck, bench, 2, write=False)
        bench.transport.submit(held, bench.desk.put)
        disk.wait_waiting(1)
        for _ in range(5):
            bench.run(*blocks(free, bench, 3, write=False))
        assert [transfer.calls for transfer in held] == [["begin"]] * 2
        closing = bench.transport.close()
        assert not closing.done()
        disk.release()
        bench.wait(held)
        closing.result(20)


def test_what_hangs_closes_no_window(tmp_path: Path, bench: Bench) -> None:
    """More hangs than a lane has in flight at most; those to another file go all the same."""
    mib = 1 << 20
    with stuck_and_free(tmp_path, 12 * mib) as (disk, stuck, free):

        def loads(file: File, start: int, nbytes: int) -> list[PlainTransfer]:
            rows = [
                [(bench.base + i * nbytes, i * nbytes, nbytes)] for i in range(start, start + 3)
            ]
            return [PlainTransfer(file, [bench.region], row, write=False) for row in rows]

        held = loads(stuck, 0, 4 * mib)
        bench.transport.submit(held, bench.desk.put)
        disk.wait_waiting(1)
        for _ in range(3):
            bench.run(*loads(free, 12, mib))
        assert [transfer.calls for transfer in held] == [["begin"]] * 3
        disk.release()
        bench.wait(held)


def test_what_hangs_hides_no_other_while_stores_go_on(tmp_path: Path, bench: Bench) -> None:
    """Something moves all the time then; those behind it are found all the same."""
    with stuck_and_free(tmp_path, 2 * PAGE) as (disk, stuck, free):
        held = blocks(stuck, bench, 1, write=False)
        bench.transport.submit(held, bench.desk.put)
        disk.wait_waiting(1)
        arrived: list[list[PlainTransfer]] = []
        behind = blocks(free, bench, 1, write=False)
        bench.transport.submit(behind, arrived.append)
        for _ in range(2000):
            bench.run(blocks(free, bench, 2, write=True)[1])
            if arrived:
                break
        assert arrived == [behind]
        disk.release()
        bench.wait(held)


class Noted(PlainTransfer):
    """Notes when it begins among others."""

    def __init__(self, begun: list[PlainTransfer], *what: Any, write: bool) -> None:
        super().__init__(*what, write=write)
        self._begun = begun

    def begin(self) -> Rows | Later | None:
        self._begun.append(self)
        return super().begin()


def test_what_somebody_waits_for_goes_first(tmp_path: Path, bench: Bench) -> None:
    """Though it came last, behind stores and other loads."""
    with FaultyDisk(tmp_path) as disk, opened_on(disk) as file:
        (disk.backing / "file").write_bytes(bytes(3 * PAGE))
        begun: list[PlainTransfer] = []
        rows = [[(bench.base + i * PAGE, i * PAGE, PAGE)] for i in range(3)]
        store = Noted(begun, file, [bench.region], rows[0], write=True)
        load, wanted = (Noted(begun, file, [bench.region], row, write=False) for row in rows[1:])
        wanted.urgent = True
        bench.run(store, load, wanted)
        assert begun == [wanted, load, store]


class Staged(PlainTransfer):
    """Tells when it is ready to go."""

    def __init__(self, *what: Any, write: bool) -> None:
        super().__init__(*what, write=write)
        self.begun = threading.Event()

    def begin(self) -> Rows | Later | None:
        self.begun.set()
        return super().begin()


def test_what_somebody_comes_to_wait_for_goes_first(tmp_path: Path, bench: Bench) -> None:
    """Four flights hang, behind which small transfers wait, but for 0.2 s alone."""
    with FaultyDisk(tmp_path) as disk, opened_on(disk) as file:
        (disk.backing / "file").write_bytes(bytes(6 * PAGE))
        in_time = False
        while not in_time:
            disk.hang("read", offset=0, length=5 * PAGE)
            *flying, late, _ = blocks(file, bench, 6, write=False)
            for count, transfer in enumerate(flying, 1):
                bench.transport.submit([transfer], bench.desk.put)
                disk.wait_waiting(count)
            row = (bench.base + 5 * PAGE, 5 * PAGE, PAGE)
            wanted = Staged(file, [bench.region], [row], write=False)
            bench.transport.submit([late, wanted], bench.desk.put)
            assert wanted.begun.wait(20)
            wanted.urgent = True
            while not in_time and disk.waiting() == 4:  # five: it went with what hangs, too soon
                in_time = "end" in wanted.calls
            disk.clear()
            bench.wait([*flying, late, wanted])


def test_a_busy_stream_is_looked_at_ever_less_often(tmp_path: Path, bench: Bench) -> None:
    """Each look costs CPU, which others want."""
    with (tmp_path / "file").open("wb") as opened:
        row = (bench.base, 0, PAGE)
        transfer = Copying(File(opened.fileno()), [bench.region], [row], write=True)
        bench.run(transfer)
        transfer.check()
        bench.transport.detach(transfer.file).result(20)


def test_a_wedged_transport_can_be_left_behind(tmp_path: Path) -> None:
    """What a transfer may still touch is kept for good: what lands late lands in live memory."""
    bench = Bench(started())
    with FaultyDisk(tmp_path) as disk, opened_on(disk) as file:
        (disk.backing / "file").write_bytes(b"x" * PAGE)
        disk.hang("read")
        (transfer,) = blocks(file, bench, 1, write=False)
        bench.transport.submit([transfer], bench.desk.put)
        disk.wait_waiting(1)
        bench.transport.abandon()
        disk.release()
        bench.wait([transfer])
        assert bench.arena.bytes[:PAGE] == b"x" * PAGE
    bench.transport.close().result(20)


def test_a_disk_that_vanishes(tmp_path: Path, bench: Bench) -> None:
    """Everything fails, each with an errno, and the transport still closes."""
    with FaultyDisk(tmp_path) as disk, opened_on(disk) as file:
        (disk.backing / "file").write_bytes(bytes(8 * PAGE))
        disk.hang("read")
        transfers = blocks(file, bench, 8, write=False)
        bench.transport.submit(transfers, bench.desk.put)
        disk.wait_waiting(1)
        disk.vanish()
        bench.wait(transfers)
        assert all(getattr(transfer.error, "errno", None) for transfer in transfers)
        bench.transport.detach(file).result(20)


class Unwanted(PlainTransfer):
    """One whose caller has left while it waited."""

    def begin(self) -> None:
        super().begin()


def test_memory_that_was_let_go_meanwhile_is_let_go(tmp_path: Path, bench: Bench) -> None:
    """A lane that registered it again would keep it, and GPU memory pinned, until it closes."""
    (tmp_path / "file").write_bytes(bytes(PAGE))
    with (tmp_path / "file").open("rb") as opened:
        arena = Arena(PAGE)
        region = region_of(arena.bytes)
        region.retire()
        row = (arena.span.address, 0, PAGE)
        bench.run(Unwanted(File(opened.fileno()), [region], [row], write=False))
        gone = weakref.ref(region)
        del region
        gc.collect()
        assert gone() is None


def test_a_row_longer_than_one_call_moves(tmp_path: Path) -> None:
    """Linux moves 2 GiB less a page at a time; here most of it is a hole."""
    nbytes = (2 << 30) + PAGE
    transport, desk = started(), queue.SimpleQueue[list[PlainTransfer]]()
    with mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        region = region_of(memory)
        with (tmp_path / "file").open("wb+") as opened:
            opened.truncate(nbytes)
            opened.seek(nbytes - 4)
            opened.write(b"last")
            opened.flush()
            row = (region.spans[0].address, 0, nbytes)
            transfer = PlainTransfer(File(opened.fileno()), [region], [row], write=False)
            transport.submit([transfer], desk.put)
            assert desk.get(timeout=50) == [transfer]
            assert transfer.calls == ["begin", "end"]
            assert memory[-4:] == b"last"
        transport.close().result(20)
        region.retire()
        region.release()
        del region, transfer
        gc.collect()


# --- starting -------------------------------------------------------------------------------------


FORBIDDING = """
import sys
import kvgds.transport
from forbidding import forbid
from kvgds.errors import PathUnavailable

forbid(*map(int, sys.argv[1:]))
transport = kvgds.transport.NixlTransport()
try:
    transport.start()
except PathUnavailable as error:
    print(len(error.report), *error.report)
else:
    print(transport.name)
    transport.close().result(20)
"""


@pytest.mark.parametrize(
    ("forbidden", "expected"),
    [
        ([IO_URING_SETUP], "POSIX/aio"),
        ([IO_URING_SETUP, IO_SETUP], "2 POSIX/uring: "),
        ([], "POSIX/uring"),
    ],
    ids=["no io_uring", "neither", "all"],
)
def test_queues_that_a_container_forbids(forbidden: list[int], expected: str) -> None:
    """As Docker does it, by seccomp: the next queue is taken, or the error tells of each."""
    done = subprocess.run(
        [sys.executable, "-c", FORBIDDING, *map(str, forbidden)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(expected), done


async def test_held_transfers_are_let_go_one_by_one(tmp_path: Path) -> None:
    """The tests' own tool: what it holds is really held, where it says."""
    held = HeldTransport(await asyncio.to_thread(started))
    bench = Bench(held)
    with contextlib.closing(FileOf(tmp_path / "file", os.urandom(4 * PAGE))) as file:
        held.hold("start", lambda transfer: not transfer.write)
        reads, writes = blocks(file, bench, 4, write=False), blocks(file, bench, 1, write=True)
        held.submit([*reads, *writes], bench.desk.put)
        await held.wait_held("start", 4)
        await asyncio.to_thread(bench.wait, writes)
        assert [transfer.calls for transfer in reads] == [[]] * 4
        held.hold("landing")
        held.step("start", 3)
        await held.wait_held("landing", 3)
        assert [transfer.calls for transfer in reads] == [["begin"]] * 3 + [[]]
        held.step("landing", 1)
        await asyncio.to_thread(bench.wait, reads[:1])
        assert (held.held("start"), held.held("landing")) == (1, 2)
        closing = held.close()
        assert not closing.done()
        held.release()
        await asyncio.to_thread(bench.wait, reads[1:])
        await asyncio.wrap_future(closing)
        assert (held.submitted, held.delivered) == (5, 5)


class FileOf(File):
    """A file of these bytes."""

    __slots__ = ()

    def __init__(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)
        super().__init__(os.open(path, os.O_RDWR))

    def close(self) -> None:
        os.close(self.fd)


# --- inbox --------------------------------------------------------------------------------------


def test_who_rings_while_the_reader_closes_rings_nobody_else() -> None:
    """Its descriptor's number may be another's by then. One who puts is stopped just before."""
    inbox, about_to, closed = Inbox(), threading.Event(), threading.Event()
    last = max(line for *_, line in Inbox.put.__code__.co_lines() if line)

    def stop(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code is Inbox.put.__code__ and event == "line" and frame.f_lineno == last:
            about_to.set()
            closed.wait()
        return stop

    def put() -> None:
        sys.settrace(stop)
        inbox.put("late")

    def read() -> None:
        inbox.wait(None)
        inbox.close()

    wake = os.eventfd(0)
    inbox.watch(wake)
    with ThreadPoolExecutor(2) as threads:
        reading = threads.submit(read)
        while not inbox._waiting:  # noqa: SLF001 - a thread in poll() tells nobody
            os.sched_yield()
        putting = threads.submit(put)
        about_to.wait()
        os.eventfd_write(wake, 1)
        reading.result()
        others = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(8)]
        closed.set()
        putting.result()
    for fd in others:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
    for fd in (wake, *others):
        os.close(fd)
