"""For tests: a transport that can be held, and what every transport and tier must pass.

Public, so that other transports and tiers can be checked too. :class:`HeldTransport` wraps
a real transport and stops transfers at chosen stages, so that deadlines and cancels can be
tried at exactly those. The contracts are plain classes for pytest: subclass one, give its
hooks, and run the subclass (:class:`TierContract` with pytest-asyncio in auto mode). What
they write and read to check the code under test goes by plain system calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np

from kvgds.blocks import PAGE, Namespace
from kvgds.config import EngineConfig, ObjectTier
from kvgds.engine import Engine
from kvgds.errors import BlockCorrupt, ClosedError, StorageFull, TransferTimeout
from kvgds.memory import Arena, region_of
from kvgds.transport import LATER, File, NixlTransport
from kvgds.transport.objects import ObjectTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path

    from kvgds.config import FileTier
    from kvgds.memory import Region
    from kvgds.transport import Later, Transfer, Transport
    from kvgds.transport.contract import Rows

__all__ = [
    "Bench",
    "FileTierContract",
    "HeldTransport",
    "PlainTransfer",
    "Stage",
    "TierContract",
    "TransportContract",
    "skip_time",
]

Stage: TypeAlias = Literal["start", "landing"]
"""Where a transfer can be held: before it begins, or with its bytes moved but not reported."""

_WAIT_S = 20.0
_LATER_S = 1e-4
_LATE_S = 1000.0


def skip_time(seconds: float) -> None:
    """Put the running event loop's clock forward: what was due by then is due now.

    Of asyncio's own loops: uvloop's timers go by a clock that nobody can put forward.
    """
    loop = asyncio.get_running_loop()
    before = loop.time
    vars(loop)["time"] = lambda: before() + seconds


class _Passage:
    """One transfer on its way through a held transport; ends when it is let go."""

    def __init__(self, transfer: Transfer, deliver: Callable[[list[Any]], None]) -> None:
        self.transfer = transfer
        self.deliver = deliver
        self._moved = False
        self._error: Exception | None = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever it doesn't do itself
        return getattr(self.transfer, name)

    def end(self) -> None:
        self._moved = True

    def fail(self, error: Exception) -> None:
        self._error = error

    def finish(self) -> None:
        """Tell the transfer what became of it."""
        if self._error is not None:
            self.transfer.fail(self._error)
        elif self._moved:
            try:
                while self.transfer.end() is LATER:
                    time.sleep(_LATER_S)
            except Exception as error:  # noqa: BLE001 - the transport's contract
                self.transfer.fail(error)


class _Gate:
    """Keeps the passages that are held at one stage."""

    def __init__(self) -> None:
        self.which: Callable[[Transfer], bool] | None = None  # None: holds nothing
        self.held: list[_Passage] = []

    def sift(self, passages: Sequence[_Passage]) -> list[_Passage]:
        """Hold some of these; the others."""
        which = self.which
        if which is None:
            return list(passages)
        caught = [passage for passage in passages if which(passage.transfer)]
        self.held += caught
        return [passage for passage in passages if passage not in caught]


class HeldTransport:
    """A transport that lets a test hold transfers, and let them go, at chosen stages.

    Transfers that are not held go straight through. Held transfers count as in flight:
    closing waits for them.

    Attributes:
        submitted: transfers that ever came in.
        delivered: transfers handed back.
    """

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.name = inner.name
        self.submitted = 0
        self.delivered = 0
        self._gates: dict[Stage, _Gate] = {"start": _Gate(), "landing": _Gate()}
        self._lock = threading.Lock()
        self._watchers: list[tuple[Stage, int, Future[None]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="held")
        self._closed = False
        self._ended: Future[None] = Future()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - what only some transports have
        return getattr(self.inner, name)

    # --- the test's side --------------------------------------------------------------

    def hold(self, stage: Stage, which: Callable[[Transfer], bool] = lambda _: True) -> None:
        """Hold what comes to ``stage`` from now on, if ``which`` says so."""
        with self._lock:
            self._gates[stage].which = which

    def step(self, stage: Stage, count: int | None = None) -> None:
        """Let go the oldest ``count`` transfers held at ``stage``, or all; go on holding others."""
        with self._lock:
            held = self._gates[stage].held
            free = held[:count]
            del held[:count]
        if stage == "start":
            self._go(free)
        elif free:
            self._thread.submit(self._finish, free)

    def release(self) -> None:
        """Hold nothing more, and let everything go."""
        with self._lock:
            for gate in self._gates.values():
                gate.which = None
        self.step("start")
        self.step("landing")

    def held(self, stage: Stage) -> int:
        """How many transfers are held at ``stage`` now."""
        return len(self._gates[stage].held)

    async def wait_held(self, stage: Stage, count: int = 1) -> None:
        """Wait until at least ``count`` transfers are held at ``stage``."""
        future: Future[None] = Future()
        with self._lock:
            self._watchers.append((stage, count, future))
            self._notify()
        async with asyncio.timeout(_WAIT_S):
            await asyncio.wrap_future(future)

    def _notify(self) -> None:
        for watcher in list(self._watchers):
            stage, count, future = watcher
            if len(self._gates[stage].held) >= count:
                self._watchers.remove(watcher)
                if future.set_running_or_notify_cancel():
                    future.set_result(None)

    # --- the transport's contract -----------------------------------------------------

    def start(self) -> None:
        """See ``transport.Transport``."""
        self.inner.start()
        self.name = self.inner.name

    def submit(self, transfers: Sequence[Transfer], deliver: Callable[[list[Any]], None]) -> None:
        """See ``transport.Transport``."""
        with self._lock:
            if self._closed:
                raise ClosedError("the transport is closed")
            self.submitted += len(transfers)
            free = self._gates["start"].sift([_Passage(each, deliver) for each in transfers])
            self._notify()
        self._go(free)

    def _go(self, passages: list[_Passage]) -> None:
        if passages:
            self.inner.submit(cast("list[Transfer]", passages), self._landed)

    def _landed(self, passages: list[_Passage]) -> None:
        with self._lock:
            free = self._gates["landing"].sift(passages)
            self._notify()
        self._finish(free)

    def _finish(self, passages: list[_Passage]) -> None:
        groups: dict[Any, list[Transfer]] = {}
        for passage in passages:
            passage.finish()
            groups.setdefault(passage.deliver, []).append(passage.transfer)
        for deliver, transfers in groups.items():
            deliver(transfers)
        with self._lock:
            self.delivered += len(passages)
            last = self._closed and bool(passages) and self.delivered == self.submitted
        if last:
            self._close_inner()

    def add_gpu(self) -> None:
        """See ``transport.Transport``."""
        self.inner.add_gpu()

    def detach(self, thing: File | Region) -> Future[None]:
        """See ``transport.Transport``."""
        return self.inner.detach(thing)

    def close(self) -> Future[None]:
        """See ``transport.Transport``."""
        with self._lock:
            idle = not self._closed and self.delivered == self.submitted
            self._closed = True
        if idle:
            self._close_inner()
        return self._ended

    def _close_inner(self) -> None:
        self._thread.shutdown(wait=False)
        self.inner.close().add_done_callback(lambda _: self._ended.set_result(None))

    def abandon(self) -> None:
        """See ``transport.Transport``."""
        self.inner.abandon()


# --- transports -----------------------------------------------------------------------------


class PlainTransfer:
    """A transfer of given rows that notes what the transport does with it.

    Attributes:
        calls: the names of the methods that were called, in order.
        threads: the threads that called them.
        error: what ``fail`` was given.
    """

    def __init__(
        self,
        file: File,
        regions: Sequence[Region],
        rows: Sequence[tuple[int, int, int]],
        *,
        write: bool,
        place: str = "",
    ) -> None:
        self.file = file
        self.regions = regions
        self.write = write
        self.nbytes = sum(nbytes for _, _, nbytes in rows)
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.error: Exception | None = None
        self.urgent = False
        self.device = 0
        self.device_rows: Rows = []
        self.place = place
        self.abandoned = False
        self._rows: Rows = list(rows)

    def _note(self, call: str) -> None:
        self.calls.append(call)
        self.threads.add(threading.get_ident())

    def begin(self) -> Rows | Later | None:
        """See ``transport.Transfer``."""
        self._note("begin")
        return self._rows

    def end(self) -> None:
        """See ``transport.Transfer``."""
        self._note("end")

    def fail(self, error: Exception) -> None:
        """See ``transport.Transfer``."""
        self._note("fail")
        self.error = error


class _Unwanted(PlainTransfer):
    def begin(self) -> None:
        super().begin()


class _BadBeginning(PlainTransfer):
    def begin(self) -> None:
        super().begin()
        raise LookupError("no beginning")


class _BadEnd(PlainTransfer):
    def end(self) -> None:
        super().end()
        raise LookupError("no end")


class Bench:
    """A transport, memory, and a place where delivered transfers arrive."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.arena = Arena(16 << 20)
        self.region = region_of(self.arena.bytes)
        self.base = self.arena.span.address
        self.desk: queue.SimpleQueue[list[PlainTransfer]] = queue.SimpleQueue()

    def run(self, *transfers: PlainTransfer) -> None:
        """Submit transfers together and wait until each has been delivered once."""
        self.transport.submit(transfers, self.desk.put)
        self.wait(transfers)

    def wait(self, transfers: Sequence[PlainTransfer]) -> None:
        """Wait until these, and no others, have been delivered, each once."""
        arrived: list[PlainTransfer] = []
        while len(arrived) < len(transfers):
            arrived += self.desk.get(timeout=_WAIT_S)
        assert sorted(map(id, arrived)) == sorted(map(id, transfers))
        here = threading.get_ident()
        assert not any(here in transfer.threads for transfer in arrived)


@contextlib.contextmanager
def _file(path: Path, flags: int = os.O_RDWR) -> Iterator[File]:
    fd = os.open(path, flags | os.O_CREAT, 0o600)
    try:
        yield File(fd)
    finally:
        os.close(fd)


class TransportContract:
    """What every transport must pass. Hook: :meth:`make_transport`."""

    def make_transport(self) -> Transport:
        """A transport that has been started."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _bench(self) -> Iterator[Bench]:
        bench = Bench(self.make_transport())
        try:
            yield bench
        finally:
            bench.transport.close().result(_WAIT_S)

    def test_bytes_reach_the_file(self, tmp_path: Path) -> None:
        """Written rows are found in the file by a plain read, at their offsets, and no others."""
        with self._bench() as bench, _file(tmp_path / "file") as file:
            data = os.urandom(3 * PAGE)
            bench.arena.bytes[: 3 * PAGE] = data
            rows = [(bench.base + 2 * PAGE, PAGE, PAGE), (bench.base, 3 * PAGE, 2 * PAGE)]
            transfer = PlainTransfer(file, [bench.region], rows, write=True)
            bench.run(transfer)
            assert transfer.calls == ["begin", "end"]
            expected = bytes(PAGE) + data[2 * PAGE :] + bytes(PAGE) + data[: 2 * PAGE]
            assert os.pread(file.fd, 1 << 20, 0) == expected

    def test_bytes_reach_the_memory(self, tmp_path: Path) -> None:
        """Read rows are what a plain write put there, and the memory around them is untouched."""
        with self._bench() as bench, _file(tmp_path / "file") as file:
            data = os.urandom(3 * PAGE)
            os.pwrite(file.fd, data, 0)
            rows = [(bench.base + PAGE, 2 * PAGE, PAGE)]
            transfer = PlainTransfer(file, [bench.region], rows, write=False)
            bench.run(transfer)
            assert transfer.calls == ["begin", "end"]
            expected = bytes(PAGE) + data[2 * PAGE :] + bytes(PAGE)
            assert bytes(bench.arena.bytes[: 3 * PAGE]) == expected

    def test_hundreds_of_rows_in_one_transfer(self, tmp_path: Path) -> None:
        """A block scattered over many layers moves whole, both ways."""
        count = 300
        order = np.random.default_rng(7).permutation(count).tolist()
        with self._bench() as bench, _file(tmp_path / "file") as file:
            data = os.urandom(count * PAGE)
            bench.arena.bytes[: count * PAGE] = data
            rows = [(bench.base + i * PAGE, j * PAGE, PAGE) for j, i in enumerate(order)]
            bench.run(PlainTransfer(file, [bench.region], rows, write=True))
            pages = [data[i * PAGE : (i + 1) * PAGE] for i in order]
            assert os.pread(file.fd, count * PAGE, 0) == b"".join(pages)
            bench.arena.bytes[: count * PAGE] = bytes(count * PAGE)
            bench.run(PlainTransfer(file, [bench.region], rows, write=False))
            assert bench.arena.bytes[: count * PAGE] == data

    def test_tens_of_thousands_of_rows_at_once(self, tmp_path: Path) -> None:
        """Blocks of hundreds of small fragments, more I/Os than a queue has places for."""
        blocks, rows, size = 64, 512, 64
        with self._bench() as bench, _file(tmp_path / "file") as file:
            data = os.urandom(blocks * rows * size)
            os.pwrite(file.fd, data, 0)
            everything = [
                PlainTransfer(
                    file,
                    [bench.region],
                    [
                        (bench.base + (j * blocks + i) * size, (i * rows + j) * size, size)
                        for j in range(rows)
                    ],
                    write=False,
                )
                for i in range(blocks)
            ]
            bench.run(*everything)
            assert all(transfer.calls == ["begin", "end"] for transfer in everything)
            there = np.frombuffer(data, np.uint8).reshape(blocks, rows, size)
            got = np.frombuffer(bench.arena.bytes[: len(data)], np.uint8)
            assert (got.reshape(rows, blocks, size) == there.swapaxes(0, 1)).all()

    def test_more_bytes_than_one_group(self, tmp_path: Path) -> None:
        """Sixteen megabytes submitted at once arrive, however they are grouped."""
        mib = 1 << 20
        with self._bench() as bench, _file(tmp_path / "file") as file:
            data = os.urandom(16 * mib)
            bench.arena.bytes[:] = data
            everything = [
                PlainTransfer(
                    file, [bench.region], [(bench.base + i * mib, i * mib, mib)], write=True
                )
                for i in range(16)
            ]
            bench.run(*everything)
            assert all(transfer.calls == ["begin", "end"] for transfer in everything)
            assert os.pread(file.fd, 16 * mib, 0) == data

    def test_reads_and_writes_mixed(self, tmp_path: Path) -> None:
        """Neighbours in the queue that go opposite ways don't disturb each other."""
        half = 40
        with self._bench() as bench, _file(tmp_path / "file") as file:
            data = os.urandom(2 * half * PAGE)
            bench.arena.bytes[: half * PAGE] = data[: half * PAGE]
            os.pwrite(file.fd, data[half * PAGE :], half * PAGE)
            transfers = [
                PlainTransfer(
                    file,
                    [bench.region],
                    [(bench.base + i * PAGE, i * PAGE, PAGE)],
                    write=i < half,
                )
                for k in range(half)
                for i in (k, k + half)
            ]
            bench.run(*transfers)
            assert os.pread(file.fd, 2 * half * PAGE, 0) == data
            assert bench.arena.bytes[: 2 * half * PAGE] == data

    def test_one_of_64_fails_alone(self, tmp_path: Path) -> None:
        """A read past the end of the file fails with EIO; its 63 neighbours arrive."""
        with self._bench() as bench, _file(tmp_path / "file") as file:
            data = os.urandom(64 * PAGE)
            os.pwrite(file.fd, data, 0)
            offsets = [i * PAGE if i != 17 else 64 * PAGE for i in range(64)]
            transfers = [
                PlainTransfer(
                    file, [bench.region], [(bench.base + i * PAGE, offset, PAGE)], write=False
                )
                for i, offset in enumerate(offsets)
            ]
            bench.run(*transfers)
            bad = transfers.pop(17)
            assert bad.calls == ["begin", "fail"]
            assert getattr(bad.error, "errno", None) == errno.EIO
            assert all(transfer.calls == ["begin", "end"] for transfer in transfers)
            good = [bench.arena.bytes[i * PAGE : (i + 1) * PAGE] for i in range(64) if i != 17]
            assert b"".join(good) == data[: 17 * PAGE] + data[18 * PAGE :]

    def test_write_to_a_read_only_descriptor_fails_with_its_errno(self, tmp_path: Path) -> None:
        """The errno is the system's, not a guess; a write next to it goes through."""
        (tmp_path / "file").write_bytes(bytes(PAGE))
        with (
            self._bench() as bench,
            _file(tmp_path / "file", os.O_RDONLY) as closed,
            _file(tmp_path / "other") as file,
        ):
            rows = [(bench.base, 0, PAGE)]
            bad = PlainTransfer(closed, [bench.region], rows, write=True)
            good = PlainTransfer(file, [bench.region], rows, write=True)
            bench.run(bad, good)
            assert (bad.calls, good.calls) == (["begin", "fail"], ["begin", "end"])
            assert getattr(bad.error, "errno", None) == errno.EBADF

    def test_transfers_that_stop_themselves(self, tmp_path: Path) -> None:
        """Not wanted any more, no beginning, no end: each is delivered, its neighbour arrives."""
        with self._bench() as bench, _file(tmp_path / "file") as file:
            rows = [(bench.base, 0, PAGE)]
            kinds = (_Unwanted, _BadBeginning, _BadEnd, PlainTransfer)
            transfers = [kind(file, [bench.region], rows, write=True) for kind in kinds]
            bench.run(*transfers)
            assert [transfer.calls for transfer in transfers] == [
                ["begin"],
                ["begin", "fail"],
                ["begin", "end", "fail"],
                ["begin", "end"],
            ]
            assert all(type(transfer.error) is LookupError for transfer in transfers[1:3])

    def test_a_descriptor_number_used_again_means_the_new_file(self, tmp_path: Path) -> None:
        """Detached before it is closed, a file is never confused with the next of its number."""
        (tmp_path / "one").write_bytes(b"1" * PAGE)
        (tmp_path / "two").write_bytes(b"2" * PAGE)
        with self._bench() as bench:
            numbers = set()
            for name in ("one", "two", "one"):
                with _file(tmp_path / name) as file:
                    numbers.add(file.fd)
                    rows = [(bench.base, 0, PAGE)]
                    bench.run(PlainTransfer(file, [bench.region], rows, write=False))
                    assert bench.arena.bytes[:PAGE] == (tmp_path / name).read_bytes()
                    bench.transport.detach(file).result(_WAIT_S)
            assert len(numbers) == 1

    def test_memory_detached_and_used_again(self, tmp_path: Path) -> None:
        """A region that was forgotten is simply attached anew."""
        with self._bench() as bench, _file(tmp_path / "file") as file:
            os.pwrite(file.fd, b"x" * PAGE, 0)
            for _ in range(2):
                bench.run(PlainTransfer(file, [bench.region], [(bench.base, 0, PAGE)], write=False))
                bench.transport.detach(bench.region).result(_WAIT_S)
                assert bench.arena.bytes[:PAGE] == b"x" * PAGE
                bench.arena.bytes[:PAGE] = bytes(PAGE)

    def test_closing_finishes_what_was_submitted(self, tmp_path: Path) -> None:
        """All of two hundred transfers are delivered, then the transport refuses more."""
        with self._bench() as bench, _file(tmp_path / "file") as file:
            transfers = [
                PlainTransfer(file, [bench.region], [(bench.base, i * PAGE, PAGE)], write=True)
                for i in range(200)
            ]
            bench.transport.submit(transfers, bench.desk.put)
            bench.transport.close().result(_WAIT_S)
            bench.wait(transfers)
            assert os.fstat(file.fd).st_size == 200 * PAGE
            try:
                bench.transport.submit(transfers, bench.desk.put)
            except ClosedError:
                pass
            else:
                raise AssertionError("a closed transport took a transfer")
            bench.transport.detach(bench.region).result(_WAIT_S)


# --- tiers ----------------------------------------------------------------------------------


class TierContract:
    """What every tier, and every stack of tiers, must pass, seen through an engine.

    Hooks: :meth:`make_tiers`, and three side doors into what no engine has open; they use none
    of the code under test. What one root names, a directory or objects, is apart from another's.
    """

    namespace = Namespace(model="contract")
    sizes = (1, PAGE - 1, PAGE, PAGE + 1, 300_001)
    late_stores_appear = False
    """Whether a store that was down when its deadline passed stays: others may know of it."""

    def make_tiers(self, root: Path, **changes: Any) -> tuple[FileTier | ObjectTier, ...]:  # noqa: ANN401 - any field's
        """Settings of what is under test, the first tier with these fields changed."""
        raise NotImplementedError

    def side_get(self, root: Path, namespace: Namespace, key: bytes) -> bytes | None:
        """The payload stored under a key, or None."""
        raise NotImplementedError

    def side_set(self, root: Path, namespace: Namespace, key: bytes, payload: bytes) -> None:
        """Put a block there as the tier would have."""
        raise NotImplementedError

    def side_spoil(self, root: Path, namespace: Namespace, key: bytes, at: int) -> None:
        """Flip the bits of one byte of a block's stored image, or of all that there are.

        The payload begins at 4,096.
        """
        raise NotImplementedError

    @contextlib.asynccontextmanager
    async def _opened(
        self,
        root: Path,
        namespace: Namespace | None = None,
        **changes: Any,  # noqa: ANN401 - see the hook
    ) -> AsyncIterator[tuple[Engine, HeldTransport]]:
        config = EngineConfig(
            namespace=namespace or self.namespace,
            tiers=await asyncio.to_thread(self.make_tiers, root, **changes),
            bounce_bytes=4 << 20,
            timeout_s=_WAIT_S,
        )
        files, objects, last = HeldTransport(NixlTransport()), None, config.tiers[-1]
        if isinstance(last, ObjectTier):
            objects = HeldTransport(ObjectTransport(last))
        engine = Engine(config, files, cast("ObjectTransport | None", objects))
        await engine.open()
        first = files if objects is None or len(config.tiers) > 1 else objects
        try:
            yield engine, first
        finally:
            first.release()
            await engine.aclose()

    async def _get(self, root: Path, key: bytes) -> bytes | None:
        return await asyncio.to_thread(self.side_get, root, self.namespace, key)

    async def _spoil(self, root: Path, key: bytes, at: int) -> None:
        await asyncio.to_thread(self.side_spoil, root, self.namespace, key, at)

    @staticmethod
    def _payload(key: bytes, nbytes: int) -> bytes:
        return np.random.default_rng(list(key)).bytes(nbytes)

    @staticmethod
    async def _load(engine: Engine, key: bytes, nbytes: int) -> bytes | None:
        memory = bytearray(b"\xee" * nbytes)
        if await engine.load(key, memory):
            return bytes(memory)
        assert memory == b"\xee" * nbytes, "a miss touched the memory"
        return None

    async def test_stored_blocks_are_where_they_should_be(self, tmp_path: Path) -> None:
        """What was stored, from aligned memory or not, lies in the directory byte for byte."""
        root = tmp_path / "kv"
        aligned = Arena(4 * PAGE)
        aligned.bytes[:] = self._payload(b"aligned", 4 * PAGE)
        async with self._opened(root) as (engine, _):
            assert await engine.store(b"aligned", engine.register(aligned.bytes))
            for nbytes in self.sizes:
                key = b"%d" % nbytes
                assert await engine.store(key, self._payload(key, nbytes))
        assert await self._get(root, b"aligned") == bytes(aligned.bytes)
        for nbytes in self.sizes:
            key = b"%d" % nbytes
            assert await self._get(root, key) == self._payload(key, nbytes)
        assert await self._get(root, b"never stored") is None

    async def test_blocks_put_by_hand_are_loaded(self, tmp_path: Path) -> None:
        """The format is what the document says, not only what the code does."""
        root = tmp_path / "kv"
        async with self._opened(root) as (engine, _):
            await engine.store(b"other", bytes(1))
        for nbytes in self.sizes:
            key = b"%d" % nbytes
            payload = self._payload(key, nbytes)
            await asyncio.to_thread(self.side_set, root, self.namespace, key, payload)
        async with self._opened(root) as (engine, _):
            for nbytes in self.sizes:
                key = b"%d" % nbytes
                assert await self._load(engine, key, nbytes) == self._payload(key, nbytes)
            assert await self._load(engine, b"other", 1) == bytes(1)

    async def test_a_miss_is_an_answer(self, tmp_path: Path) -> None:
        """Nothing there: False, memory as it was."""
        async with self._opened(tmp_path / "kv") as (engine, _):
            assert await self._load(engine, b"absent", PAGE) is None
            assert await engine.prefix([b"absent"]) == 0
            assert not await engine.delete(b"absent")

    async def test_a_block_that_is_there_is_not_written_again(self, tmp_path: Path) -> None:
        """The second store moves nothing and says so, before and after a restart."""
        root = tmp_path / "kv"
        async with self._opened(root) as (engine, _):
            assert await engine.store(b"key", self._payload(b"key", PAGE))
        async with self._opened(root) as (engine, transport):
            before = transport.submitted
            assert not await engine.store(b"key", self._payload(b"key", PAGE))
            assert transport.submitted == before
            assert await self._load(engine, b"key", PAGE) == self._payload(b"key", PAGE)

    async def test_deleted_blocks_stay_deleted(self, tmp_path: Path) -> None:
        """After a restart too; storing the key anew works."""
        root = tmp_path / "kv"
        async with self._opened(root) as (engine, _):
            for key in (b"a", b"b"):
                await engine.store(key, self._payload(key, PAGE))
            assert await engine.delete(b"a")
            assert await self._load(engine, b"a", PAGE) is None
        assert await self._get(root, b"a") is None
        async with self._opened(root) as (engine, _):
            assert await engine.prefix([b"b", b"a"]) == 1
            assert await engine.store(b"a", self._payload(b"again", PAGE))
            assert await self._load(engine, b"a", PAGE) == self._payload(b"again", PAGE)

    async def test_spoiled_blocks_are_found_out(self, tmp_path: Path) -> None:
        """A flipped bit anywhere is BlockCorrupt, then a miss, for good; neighbours load."""
        root = tmp_path / "kv"
        keys = [b"stamp", b"first", b"last", b"sound"]
        nbytes = 3 * PAGE + 5
        async with self._opened(root) as (engine, _):
            for key in keys:
                await engine.store(key, self._payload(key, nbytes))
        for key, at in ((b"stamp", 20), (b"first", PAGE), (b"last", PAGE + nbytes - 1)):
            await self._spoil(root, key, at)
        async with self._opened(root) as (engine, _):
            memory = [bytearray(nbytes) for _ in keys]
            outcomes = await engine.load_many(zip(keys, memory, strict=True))
            assert [type(outcome.error) for outcome in outcomes] == [BlockCorrupt] * 3 + [
                type(None)
            ]
            assert memory[3] == self._payload(b"sound", nbytes)
            assert await engine.prefix(keys) == 0
            assert engine.statistics().tiers[0].blocks == 1
            assert engine.statistics().tiers[0].quarantined == 3
        async with self._opened(root) as (engine, _):
            assert [await self._load(engine, key, nbytes) for key in keys[:3]] == [None] * 3
            for key in keys[:3]:
                assert await engine.store(key, self._payload(key, nbytes))
                assert await self._load(engine, key, nbytes) == self._payload(key, nbytes)

    async def test_namespaces_never_mix(self, tmp_path: Path) -> None:
        """Two namespaces that differ in one field use one key for different blocks."""
        root = tmp_path / "kv"
        changed = {
            "model": "other",
            "revision": "other",
            "layout": "HND",
            "dtype": "float16",
            "block_tokens": 32,
            "rank": 1,
            "world": 3,
        }
        base: dict[str, Any] = {"model": "contract", "world": 2}
        names = [Namespace(**base), *(Namespace(**{**base, f: v}) for f, v in changed.items())]
        for number, namespace in enumerate(names):
            async with self._opened(root, namespace) as (engine, _):
                assert await self._load(engine, b"key", PAGE) is None
                assert await engine.store(b"key", self._payload(b"%d" % number, PAGE))
        for number, namespace in enumerate(names):
            async with self._opened(root, namespace) as (engine, _):
                assert await self._load(engine, b"key", PAGE) == self._payload(b"%d" % number, PAGE)
                assert engine.statistics().tiers[0].blocks == 1

    async def test_a_store_past_its_deadline_is_not_published(self, tmp_path: Path) -> None:
        """Held before it began, or with its bytes down: nothing of it is ever seen, or all."""
        appears = self.late_stores_appear
        root = tmp_path / "kv"
        stages: tuple[Stage, ...] = ("start", "landing")
        async with self._opened(root) as (engine, transport):
            for stage in stages:
                transport.hold(stage)
                store = engine.store(stage.encode(), bytes(PAGE + 1), timeout_s=_LATE_S)
                storing = asyncio.ensure_future(store)
                await transport.wait_held(stage)
                skip_time(_LATE_S)
                try:
                    await storing
                except TransferTimeout:
                    pass
                else:
                    raise AssertionError("a held store was acknowledged")
                transport.release()
                while engine.statistics().in_flight:  # noqa: ASYNC110 - nobody is told of its end
                    await asyncio.sleep(0)
            assert await engine.store(b"sound", bytes(PAGE + 1))
            assert [await engine.prefix([key]) for key in (b"start", b"landing", b"sound")] == [
                0,
                int(appears),
                1,
            ]
        late = bytes(PAGE + 1) if appears else None
        assert [await self._get(root, key) for key in (b"start", b"landing")] == [None, late]
        async with self._opened(root) as (engine, _):
            assert await engine.prefix([b"landing"]) == int(appears)


class FileTierContract(TierContract):
    """What every file tier that stands alone must pass besides: it has a capacity."""

    async def test_a_miss_moves_nothing(self, tmp_path: Path) -> None:
        """What is not there is known without a transfer."""
        async with self._opened(tmp_path / "kv") as (engine, transport):
            assert await self._load(engine, b"absent", PAGE) is None
            assert transport.submitted == 0

    async def test_verify_stamp_checks_only_the_stamp(self, tmp_path: Path) -> None:
        """Asked not to check payloads, it doesn't; a wrong stamp it still finds."""
        root = tmp_path / "kv"
        async with self._opened(root, verify="stamp") as (engine, _):
            for key in (b"payload", b"stamp"):
                await engine.store(key, self._payload(key, PAGE))
        await self._spoil(root, b"payload", PAGE)
        await self._spoil(root, b"stamp", 20)
        async with self._opened(root, verify="stamp") as (engine, _):
            loaded = await self._load(engine, b"payload", PAGE)
            assert loaded is not None
            assert loaded[1:] == self._payload(b"payload", PAGE)[1:]
            (outcome,) = await engine.load_many([(b"stamp", bytearray(PAGE))])
            assert type(outcome.error) is BlockCorrupt

    async def test_unchecked_blocks_are_not_trusted_when_all_must_be_checked(
        self, tmp_path: Path
    ) -> None:
        """What was stored without a checksum is a miss under verify="full"."""
        root = tmp_path / "kv"
        async with self._opened(root, verify="stamp") as (engine, _):
            await engine.store(b"key", self._payload(b"key", PAGE))
        async with self._opened(root) as (engine, _):
            assert await self._load(engine, b"key", PAGE) is None
            assert await engine.store(b"key", self._payload(b"key", PAGE))
            assert await self._load(engine, b"key", PAGE) == self._payload(b"key", PAGE)
        async with self._opened(root, verify="stamp") as (engine, _):
            assert await self._load(engine, b"key", PAGE) == self._payload(b"key", PAGE)
            assert await engine.delete(b"key")
            assert await self._load(engine, b"key", PAGE) is None

    async def test_capacity_holds_and_the_least_recently_used_go(self, tmp_path: Path) -> None:
        """Three times the capacity is stored: the limit holds, the block in use stays."""
        root, nbytes = tmp_path / "kv", 15 * PAGE
        capacity = 32 * 16 * PAGE
        keys = [b"%d" % i for i in range(96)]
        async with self._opened(root, capacity_bytes=capacity) as (engine, _):
            await engine.store(b"in use", self._payload(b"in use", nbytes))
            for key in keys:
                await engine.store(key, self._payload(key, nbytes))
                assert await engine.load(b"in use", bytearray(nbytes))
                assert engine.statistics().tiers[0].bytes_used <= capacity
            there = [key for key in keys if await engine.prefix([key])]
            assert len(there) >= 16
            assert there == keys[-len(there) :]
            assert engine.statistics().tiers[0].evictions == len(keys) - len(there)
            for key in there:
                assert await self._load(engine, key, nbytes) == self._payload(key, nbytes)
        assert await asyncio.to_thread(_bytes_below, root) <= capacity + (1 << 20)

    async def test_a_block_in_flight_is_not_evicted(self, tmp_path: Path) -> None:
        """However much is stored while a load has moved its bytes, they stay right."""
        nbytes = 15 * PAGE
        async with self._opened(tmp_path / "kv", capacity_bytes=8 * 16 * PAGE) as (
            engine,
            transport,
        ):
            await engine.store(b"old", self._payload(b"old", nbytes))
            transport.hold("start", lambda transfer: not transfer.write)
            loading = asyncio.ensure_future(self._load(engine, b"old", nbytes))
            await transport.wait_held("start")
            for i in range(40):
                await engine.store(b"%d" % i, self._payload(b"%d" % i, nbytes))
            transport.release()
            assert await loading == self._payload(b"old", nbytes)

    async def test_too_big_for_the_tier(self, tmp_path: Path) -> None:
        """A block that never fits is refused; nothing is evicted for it."""
        async with self._opened(tmp_path / "kv", capacity_bytes=64 * PAGE) as (engine, _):
            await engine.store(b"small", bytes(PAGE))
            (outcome,) = await engine.store_many([(b"big", bytes(64 * PAGE))])
            assert type(outcome.error) is StorageFull
            assert await self._load(engine, b"small", PAGE) == bytes(PAGE)
            assert engine.statistics().tiers[0].evictions == 0


def _bytes_below(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
