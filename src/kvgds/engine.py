"""The engine: opens, admits, drains, closes. The public face.

Everything here runs on the event loop that opened the engine, save what it starts and closes on a
thread of its executor. What is under way is the business of ``flights``; tiers and transport do the
I/O on threads of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections import deque
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from errno import ETIMEDOUT
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from kvgds.blocks import Outcome, check_key
from kvgds.config import EngineConfig, FileTier, ObjectTier
from kvgds.errors import (
    CapacityError,
    ClosedError,
    ConfigError,
    QueueFull,
    TransferError,
    TransferTimeout,
)
from kvgds.flights import KEYS_AT_ONCE, Batch, Flights, Memory, listed, pairs
from kvgds.handover import Handover
from kvgds.memory import Arena, Cache, Region
from kvgds.metrics import Metrics, Observer
from kvgds.paths import Gds, Ways, settle_gds
from kvgds.schedule import Priority
from kvgds.statistics import Statistics, gauges_of, statistics_of
from kvgds.threads import fill, starting
from kvgds.tiers import Services, Tier
from kvgds.tiers.files import Files
from kvgds.tiers.objects import Objects
from kvgds.tiers.slabs import Slabs
from kvgds.transport import NixlTransport, Transport
from kvgds.transport.inbox import fulfil
from kvgds.transport.objects import ObjectTransport
from kvgds.waits import outlast, to_the_end, until_done

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Awaitable,
        Callable,
        Generator,
        Iterable,
        Sequence,
    )
    from contextlib import AbstractAsyncContextManager

    from kvgds.blocks import BlockKey, Namespace
    from kvgds.paths import PathPlan

T = TypeVar("T")

_log = logging.getLogger("kvgds")
_FILE_THREADS = 2
_LET_GO_S = 1.0  # for GPUs at least, where all else has taken its time
_LAYOUTS: dict[str, Callable[[FileTier, Namespace, Services], Tier]] = {
    "slabs": Slabs,
    "files": Files,
}


class Operation:
    """A started operation. It ends whether awaited or not; the memory is in use until then.

    One task at a time may await it (another gets BusyError), also again after it has ended. To
    cancel that task is to cancel the operation: a block that waits is dropped, one under way ends.
    """

    def __init__(self, run: Callable[[], Awaitable[bool]]) -> None:
        self._run = run

    def __await__(self) -> Generator[Any, None, bool]:
        return self._run().__await__()


class Engine:
    """Moves KV blocks between registered memory and its tiers. Made by :func:`open_engine`.

    All methods belong to the event loop that opened the engine; those that begin something
    raise ClosedError anywhere else, in a forked child, too.

    Attributes:
        plan: per tier, how bytes move and why.
        metrics: ``metrics.registry`` is a Prometheus registry.
    """

    def __init__(
        self,
        config: EngineConfig,
        transport: Transport | None = None,
        objects: ObjectTransport | None = None,
    ) -> None:
        self.config = config
        self.plan: tuple[PathPlan, ...] = ()
        self._loop = _running_loop()
        self._process = os.getpid()
        self._posts: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._woken = False
        self._executor = ThreadPoolExecutor(_FILE_THREADS, thread_name_prefix="kvgds-files")
        # Of memory, which never waits: not behind files, which may.
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="kvgds-copies")
        self.metrics = Metrics(lambda: gauges_of(self.statistics()))
        # Nothing is known of tiers that are not open.
        self._handover = Handover(self._loop, lambda: bool(self.plan) and self._flights.busy)
        run = partial(self._run, self._copier)
        self._flights = Flights(config, self.metrics, run, self._handover)
        self._transports: list[Transport] = []
        self._tiers = tuple(self._make_tier(tier, transport, objects) for tier in config.tiers)
        self._flights.set_tiers(self._tiers)
        self._closing: asyncio.Future[None] | None = None

    def _make_tier(
        self,
        settings: FileTier | ObjectTier,
        transport: Transport | None,
        objects: ObjectTransport | None,
    ) -> Tier:
        config, relay = self.config, self._flights.relay
        run = partial(self._run, self._executor)
        if isinstance(settings, FileTier):
            mover = transport or NixlTransport(config.transport_threads)
            services = Services(mover, self._post, run, self._flights.settle, relay)
            self._transports.append(mover)
            return _LAYOUTS[settings.layout](settings, config.namespace, services)
        carrier = objects or ObjectTransport(settings)
        services = Services(carrier, self._post, run, self._flights.settle)
        self._transports.append(carrier)
        changed = relay.changed if relay is not None else None
        return Objects(settings, config.namespace, services, carrier, changed)

    def __repr__(self) -> str:
        state = "open" if self._closing is None else "closed"
        return f"<Engine {state} {', '.join(tier.name for tier in self._tiers)}>"

    # --- opening and closing ----------------------------------------------------------

    async def open(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Probe, recover and get ready. Called by :func:`open_engine`."""
        told = progress or logged_progress()
        try:
            with starting():
                opening = self._in_thread(self._start, told)
        except CapacityError:
            for transport in self._transports:  # not started: that is over at once
                transport.close()
            raise
        try:
            with self._handover.waiting():
                self._flights.ways = await asyncio.shield(opening)
        except asyncio.CancelledError:
            self._closing = to_the_end(lambda: self._unopen(opening))
            await outlast(self._closing)
            raise
        except BaseException:
            self._end_threads()
            raise
        self.plan = self._flights.ways.plans
        self._flights.open()

    async def _unopen(self, opening: asyncio.Future[Ways]) -> None:
        """Opening was cancelled: let go of what its thread gets hold of."""
        with self._handover.waiting():
            await until_done(opening)
        if opening.exception() is None:
            self._flights.ways = opening.result()
            await self._close()
        else:
            self._end_threads()

    def _start(self, progress: Callable[[str, int, int], None]) -> Ways:
        with contextlib.ExitStack() as stack:
            for transport in self._transports:
                stack.callback(_closed, transport)
            fill(self._executor, _FILE_THREADS - 1)  # this one is there
            fill(self._copier, 1)
            for transport in self._transports:
                transport.start()
            ways = Ways(_arena(self.config.bounce_bytes))
            for tier in self._tiers:
                tier.open(progress)
                stack.callback(tier.close)
            self._settle(ways)
            if self._flights.relay is not None:
                self._flights.relay.recover()
            stack.pop_all()
        return ways

    def _settle(self, ways: Ways) -> None:
        """Decide how memory moves to each tier, a GPU's too."""
        for settings, tier, transport in zip(
            self.config.tiers, self._tiers, self._transports, strict=True
        ):
            gds = Gds(refused=("GPUDirect Storage: objects go by the network",))
            if isinstance(settings, FileTier):
                gds = settle_gds(
                    self.config.path,
                    settings.root,
                    transport,
                    allow_compat=self.config.allow_compat,
                    direct_io=bool(tier.plan.direct_io),
                    checksums=tier.checked,
                    gather_bytes=self.config.gather_bytes,
                    timeout_s=self.config.probe_timeout_s,
                )
            ways.choose(tier.plan, gds, self.config.gather_bytes)

    async def aclose(self) -> None:
        """Finish what was asked for, then let go of everything. May be called again.

        Raises:
            TransferTimeout: transfers were still in flight after ``drain_timeout_s``. What
                they may touch is never freed; the directory stays locked until the
                process ends.
            ClosedError: called on another event loop, or in a forked child; nothing is closed.
        """
        await asyncio.shield(self.begin_closing())

    def begin_closing(self) -> asyncio.Future[None]:
        """Take nothing more; ends when :meth:`aclose` would, and can't be cancelled."""
        self._check_loop()
        if self._closing is None:
            self._flights.close()
            self._closing = to_the_end(self._close)
        return self._closing

    async def _close(self) -> None:
        try:
            with self._handover.waiting():
                await self._drain_and_close()
        finally:
            self._handover.close()

    async def _drain_and_close(self) -> None:
        """Waits for futures alone, and goes on when it is cancelled, as every task may be."""
        deadline = self._loop.time() + self.config.drain_timeout_s
        if not await self._flights.drained(deadline):
            for transport in self._transports:
                transport.abandon()
            left, waited = self._flights.scheduler.running, self.config.drain_timeout_s
            raise TransferTimeout(f"{left} transfers in flight {waited} s after closing")
        self._flights.stop()
        try:
            for tier in reversed(self._tiers):  # who tells the first that it may go on, goes first
                await self._to_its_end(self._in_thread(tier.close))
        finally:
            for transport in self._transports:
                await self._to_its_end(asyncio.wrap_future(transport.close()))
            await self._let_go_of_gpus(deadline)
            del self._flights.ways  # and the bounce region with it, whoever keeps the engine
            self._end_threads()

    async def _let_go_of_gpus(self, deadline: float) -> None:
        """Free what the engine has of GPUs: page-locked and staging memory.

        CUDA waits then for all that they were given, by whomever, and that may never end. So it is
        done on a thread that no process waits for at its end.
        """
        ended = ThreadFuture[None]()
        let_go = partial(fulfil, self._flights.ways.close, ended)
        try:
            threading.Thread(target=let_go, name="kvgds-closing", daemon=True).start()
        except RuntimeError:  # the system allows no more of them
            self._executor.submit(let_go)
        step = asyncio.wrap_future(ended)
        if await until_done(step, max(deadline, self._loop.time() + _LET_GO_S)):
            step.result()
            return
        step.cancel()  # nobody is told any more
        _log.warning(
            "a GPU has not ended what it was given %g s after closing: until it has, staging and "
            "page-locked memory stay",
            self.config.drain_timeout_s,
        )

    def _end_threads(self) -> None:
        for executor in (self._executor, self._copier):
            executor.shutdown(wait=False)

    @staticmethod
    async def _to_its_end(step: asyncio.Future[T]) -> T:
        await until_done(step)
        return step.result()

    def _in_thread(self, function: Callable[..., T], *args: object) -> asyncio.Future[T]:
        return self._loop.run_in_executor(self._executor, function, *args)

    def _post(self, function: Callable[..., None], *args: Any) -> None:  # noqa: ANN401 - any function's
        """Run a function on the loop. One wake-up does for all that the loop has not seen yet."""
        self._posts.append((function, args))
        if not self._woken:
            self._wake()

    def _wake(self) -> None:
        self._woken = True
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._run_posts)

    def _run_posts(self) -> None:
        self._woken = False  # first: what is posted from now on may be too late for this turn
        self._handover.news = True
        try:
            for _ in range(len(self._posts)):
                function, args = self._posts.popleft()
                function(*args)
        except BaseException:
            self._wake()  # the others' turn still comes
            raise
        self._flights.wake_closer()  # a tier may have become idle without a move that settles

    def _run(
        self,
        executor: ThreadPoolExecutor,
        function: Callable[[], Any],
        done: Callable[[ThreadFuture[Any]], None],
    ) -> None:
        executor.submit(function).add_done_callback(lambda future: self._post(done, future))

    # --- memory -----------------------------------------------------------------------

    def register(self, buffer: object) -> Region:
        """Register one contiguous buffer, of torch, numpy, mmap, bytearray and the like.

        Page-aligned parts of it move without a copy, other parts through the bounce region. GPU
        memory that is registered already gives the same region again.

        Raises:
            ConfigError: not contiguous, empty, part of a cache or of other registered GPU memory,
                or no buffer.
            PathUnavailable: it says that it is GPU memory, but there is no CUDA, or it fails.
        """
        self._check_open()
        return self._flights.territory.register(buffer)

    def register_cache(self, layers: Iterable[object], block_axis: int = 0) -> Cache:
        """Register a paged KV cache: one or more tensors a layer, blocks along one axis.

        ``cache.block(i)`` is block ``i`` of every tensor, in the order given here.

        Raises:
            ConfigError: one tensor instead of a list of them, tensors that differ in their
                number of blocks or their device, overlap, are empty, or are registered already,
                or no such axis.
            BusyError: a transfer uses some of it.
            PathUnavailable: as :meth:`register`.
        """
        self._check_open()
        return self._flights.territory.register_cache(_list_of(layers), block_axis)

    async def deregister(self, memory: Region | Cache) -> None:
        """Forget registered memory; it may be freed afterwards.

        Raises:
            BusyError: a transfer uses it.
            ConfigError: it is neither a region nor a cache, or another engine's.
            ClosedError: called on another event loop, or in a forked child.
        """
        self._check_loop()
        region: object = memory.region if isinstance(memory, Cache) else memory
        if not isinstance(region, Region):
            rule = "must be what register or register_cache gave"
            raise ConfigError("memory", type(memory).__name__, rule)
        if region.territory is not self._flights.territory:
            raise ConfigError("memory", "another engine's", "deregister it there")
        region.retire()
        detached = [asyncio.wrap_future(each.detach(region)) for each in self._transports]
        await outlast(to_the_end(partial(self._let_go, region, detached)))

    async def _let_go(self, region: Region, detached: Sequence[asyncio.Future[None]]) -> None:
        with self._handover.waiting():
            for step in detached:
                await self._to_its_end(step)
        region.release()

    # --- public operations --------------------------------------------------------------

    async def store(
        self,
        key: BlockKey,
        memory: Memory,
        *,
        priority: Priority = Priority.BACKGROUND,
        timeout_s: float | None = None,
        stream: object = None,
    ) -> bool:
        """Store one block; returns when it is down and visible.

        A key names its content: when a block of this size is there already, nothing moves.

        Args:
            key: names the block, 1 to 1,024 bytes.
            memory: where it lies.
            priority: who waits for it.
            timeout_s: from the call to the answer; the settings' if None.
            stream: GPU memory is taken after all that this stream was given; None: the default
                stream. Of torch, CuPy, or a ``cudaStream_t`` as an integer.

        Returns:
            True if the block was written, False if it was there already, or another store
            of it that was under way wrote it.

        Raises:
            TransferError: the bytes did not arrive. TransferTimeout: not in time.
            StorageFull: no room.
            BusyError: a load into this memory is in flight, or others keep the directory locked.
            ConfigError: an argument can't be, or the block does not fit into ``bounce_bytes``.
            ClosedError: the engine or memory is closed.
        """
        batch = self._open_batch(1, priority, timeout_s, stream, write=True)
        await self._flights.carry_out(batch, [(key, memory)])
        return _value(batch.outcomes.pop())

    async def load(
        self,
        key: BlockKey,
        memory: Memory,
        *,
        priority: Priority = Priority.DEMAND,
        timeout_s: float | None = None,
        stream: object = None,
    ) -> bool:
        """Load one block into memory of its size.

        Args:
            key: names the block.
            memory: where it shall lie.
            priority: who waits for it.
            timeout_s: from the call to the answer; the settings' if None.
            stream: GPU memory is not touched before this stream has done all that it was given;
                None: the default stream. Afterwards every stream may use it.

        Returns:
            True, or False: a miss is an answer.

        Raises:
            BlockCorrupt: what is stored is provably wrong; it is quarantined.
            TransferError: the bytes did not arrive. TransferTimeout: not in time. The
                memory's content is then undefined.
            BusyError: another transfer uses this memory.
            ConfigError: an argument can't be, the block does not fit into ``bounce_bytes``, or it
                has another size than the memory, which is then undefined, too.
            ClosedError: the engine or memory is closed.
        """
        batch = self._open_batch(1, priority, timeout_s, stream, write=False)
        await self._flights.carry_out(batch, [(key, memory)])
        return _value(batch.outcomes.pop())

    async def store_many(
        self,
        items: Iterable[tuple[BlockKey, Memory]],
        *,
        priority: Priority = Priority.BACKGROUND,
        timeout_s: float | None = None,
        stream: object = None,
    ) -> list[Outcome]:
        """Store blocks; an outcome for each, in order. One bad block fails no other.

        Raises:
            ConfigError: an argument can't be; what is wrong with one block is in its outcome.
            ClosedError: the engine is closed.
            TransferTimeout: the call was cancelled, and memory of it is in use past its deadline.
        """
        items = pairs(items)
        batch = self._open_batch(len(items), priority, timeout_s, stream, write=True)
        await self._flights.carry_out(batch, items)
        return batch.outcomes

    async def load_many(
        self,
        items: Iterable[tuple[BlockKey, Memory]],
        *,
        priority: Priority = Priority.DEMAND,
        timeout_s: float | None = None,
        stream: object = None,
    ) -> list[Outcome]:
        """Load blocks; an outcome for each, in order. One bad block fails no other.

        Raises: as :meth:`store_many`.
        """
        items = pairs(items)
        batch = self._open_batch(len(items), priority, timeout_s, stream, write=False)
        await self._flights.carry_out(batch, items)
        return batch.outcomes

    def store_each(
        self,
        items: Iterable[tuple[BlockKey, Memory]],
        *,
        priority: Priority = Priority.BACKGROUND,
        timeout_s: float | None = None,
        stream: object = None,
    ) -> AsyncGenerator[Outcome, None]:
        """Store blocks; their outcomes as they end, in any order: see :meth:`load_each`."""
        self._check_open()
        return self._flights.each(items, priority, timeout_s, write=True, stream=stream)

    def load_each(
        self,
        items: Iterable[tuple[BlockKey, Memory]],
        *,
        priority: Priority = Priority.DEMAND,
        timeout_s: float | None = None,
        stream: object = None,
    ) -> AsyncGenerator[Outcome, None]:
        """Load blocks; their outcomes as they end, to start computing early.

        All are asked for when the first is awaited, however long the caller takes between two.
        They come in any order. Only the key tells which block it was: of a key that is given twice,
        the one that came first in the call may well be the one that ends last.

        Leaving the loop early cancels the rest: close the iterator (``aclosing``) and wait.

        Raises: as :meth:`store_many`; but for ClosedError once the first is awaited, or the
            iterator is closed.
        """
        self._check_open()
        return self._flights.each(items, priority, timeout_s, write=False, stream=stream)

    def store_nowait(
        self,
        key: BlockKey,
        memory: Memory,
        *,
        timeout_s: float | None = None,
        stream: object = None,
    ) -> Operation:
        """Start a store; await the result later. Raises QueueFull instead of queueing more."""
        return self._start_now(key, memory, Priority.BACKGROUND, timeout_s, stream, write=True)

    def load_nowait(
        self,
        key: BlockKey,
        memory: Memory,
        *,
        timeout_s: float | None = None,
        stream: object = None,
    ) -> Operation:
        """Start a load; await the result later. Raises QueueFull instead of queueing more."""
        return self._start_now(key, memory, Priority.DEMAND, timeout_s, stream, write=False)

    async def prefix(self, keys: Iterable[BlockKey], *, timeout_s: float | None = None) -> int:
        """Length of the longest prefix of ``keys`` whose blocks are all stored.

        Eviction does not count that as a use of them.

        Raises:
            ConfigError: a key or the timeout can't be. ClosedError: the engine is closed.
            TransferTimeout: no answer in time.
        """
        self._check_open()
        deadline = self._loop.time() + self._flights.timeout_of(timeout_s)
        asked = listed("keys", keys, "must be a list of keys")
        for start in range(0, len(asked), KEYS_AT_ONCE):
            if start:  # others use the loop too, and may close the engine
                await asyncio.sleep(0)
                self._check_open()
                if self._loop.time() >= deadline:
                    raise _late_prefix()
            for key in asked[start : start + KEYS_AT_ONCE]:
                check_key(key)
        answer: asyncio.Future[int] = self._loop.create_future()

        def done(length: int) -> None:
            if not answer.done():
                answer.set_result(length)

        self._flights.prefix(asked, done, lambda: not answer.done())
        return await _in_time(answer, deadline - self._loop.time(), _late_prefix())

    async def delete(self, key: BlockKey, *, timeout_s: float | None = None) -> bool:
        """Drop a block; True if it was there. Returns when that survives the process's death.

        Raises:
            ConfigError: the key or the timeout can't be. ClosedError: the engine is closed.
            TransferError: the block could not be dropped, or not from every tier; ask again.
            TransferTimeout: no answer in time; the block may still be dropped, as after a cancel.
        """
        self._check_open()
        timeout = self._flights.timeout_of(timeout_s)
        check_key(key)
        answer: asyncio.Future[bool | tuple[str, int | None]] = self._loop.create_future()

        def done(there: bool, error: Exception | None) -> None:  # noqa: FBT001 - the tier's contract
            if answer.done():
                return
            if error is None:
                answer.set_result(there)
            else:  # in words: the frames that an error goes through know what it came in
                text = getattr(error, "strerror", None) or str(error)  # an OSError's has its number
                answer.set_result((text, getattr(error, "errno", None)))

        self._flights.delete(key, done)
        text = "passed its deadline; it may still happen"
        found = await _in_time(
            answer, timeout, TransferTimeout(text, direction="delete", key=key, errno=ETIMEDOUT)
        )
        if isinstance(found, bool):
            return found
        text, number = found
        raise TransferError(text, direction="delete", key=key, errno=number)

    def statistics(self) -> Statistics:
        """What the engine is doing and has done."""
        return statistics_of(self._flights)

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Tell an observer of every block that ends from now on; call what this returns to stop.

        Raises:
            ConfigError: it has no ``settled`` to call.
        """
        if not callable(getattr(observer, "settled", None)):
            raise ConfigError("observer", observer, "must have a method settled(event)")
        observers, number = self._flights.observers, object()
        observers[number] = observer

        def stop() -> None:
            observers.pop(number, None)  # it may have raised

        return stop

    # --- submitting -------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closing is not None:
            raise ClosedError("the engine is closed")
        self._check_loop()

    def _check_loop(self) -> None:
        if os.getpid() != self._process:  # its threads stayed there
            text = f"the engine was opened by process {self._process}; open one after the fork"
            raise ClosedError(text)
        if _running_loop() is not self._loop:
            raise ClosedError("the engine belongs to another event loop; open one for this loop")

    def _start_now(
        self,
        key: BlockKey,
        memory: Memory,
        priority: Priority,
        timeout_s: float | None,
        stream: object,
        *,
        write: bool,
    ) -> Operation:
        self._check_open()
        if self._flights.scheduler.queued >= self.config.queue_ops:
            self._flights.pump()  # what only waits for this turn of the loop to end is no queue
        if self._flights.scheduler.queued >= self.config.queue_ops:
            raise QueueFull(f"{self._flights.scheduler.queued} blocks are queued; await some first")
        batch = self._open_batch(1, priority, timeout_s, stream, write=write)
        self._flights.take_in(batch, [(key, memory)])

        async def finish() -> bool:
            self._check_loop()
            await self._flights.ended(batch)
            return _value(batch.outcomes[0])

        return Operation(finish)

    def _open_batch(
        self,
        blocks: int,
        priority: Priority,
        timeout_s: float | None,
        stream: object,
        *,
        write: bool,
    ) -> Batch:
        self._check_open()
        return self._flights.open_batch(blocks, priority, timeout_s, write=write, stream=stream)


def open_engine(
    config: EngineConfig, *, progress: Callable[[str, int, int], None] | None = None
) -> AbstractAsyncContextManager[Engine]:
    """Open an engine, for ``async with`` to close: it ends once that is done, cancelled or not.

    Args:
        config: the settings.
        progress: called with (what, done, total) while a large index is recovered, from
            another thread; logged by default.

    Raises:
        ConfigError: this is no configuration, or a directory can't be used as configured.
        ClosedError: no event loop of asyncio runs here.
        BusyError: another engine has the directory, or keeps it locked.
        PathUnavailable: NIXL, or a path that was asked for, can't be had, or a bucket that stands
            alone does not answer.
        CapacityError: the system allows no more threads.
        TransferTimeout: when it is left, see :meth:`Engine.aclose`.
    """
    if not isinstance(config, EngineConfig):
        raise ConfigError("config", type(config).__name__, "must be an EngineConfig")
    if progress is not None and not callable(progress):
        raise ConfigError("progress", type(progress).__name__, "must be callable, or None")
    return _opened(config, progress)


@contextlib.asynccontextmanager
async def _opened(
    config: EngineConfig, progress: Callable[[str, int, int], None] | None
) -> AsyncIterator[Engine]:
    async with running(Engine(config), progress) as engine:
        yield engine


@contextlib.asynccontextmanager
async def running(
    engine: Engine, progress: Callable[[str, int, int], None] | None = None
) -> AsyncIterator[Engine]:
    """Open an engine, and close it again."""
    await engine.open(progress)
    try:
        yield engine
    finally:
        await outlast(engine.begin_closing())


def _closed(transport: Transport) -> None:
    transport.close().result()


def _running_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        rule = "an engine belongs to the event loop that opens it; call it from a task there"
        raise ClosedError(f"no event loop runs here: {rule}") from None


def aligned(nbytes: int) -> memoryview:
    """Page-aligned memory, on huge pages where the kernel gives them.

    Once registered it moves without a copy. It is zeroed, and freed with the last view of it:
    ``numpy.frombuffer`` and ``torch.frombuffer`` make arrays of it that keep it alive.

    Raises:
        ConfigError: that much memory can't be had.
    """
    if type(nbytes) is not int or nbytes < 1:
        raise ConfigError("nbytes", nbytes, "must be a number of bytes, at least 1")
    return _arena(nbytes, "nbytes").bytes


def _arena(nbytes: int, field: str = "bounce_bytes") -> Arena:
    try:
        return Arena(nbytes)
    except (OSError, OverflowError) as error:
        rule = f"that much memory can't be had: {error}"
        raise ConfigError(field, nbytes, rule) from None


def _list_of(layers: Iterable[object]) -> list[object]:
    rule = "must be a list of tensors; for a single one give [tensor]"
    if hasattr(layers, "shape"):  # a tensor has one
        raise ConfigError("layers", type(layers).__name__, rule)
    return listed("layers", layers, rule)


def _value(outcome: Outcome) -> bool:
    if outcome.error is None:
        return outcome.status in ("hit", "stored")
    try:
        raise outcome.error
    finally:
        del outcome  # an error knows the frames that it goes through: it must not be in one


async def _in_time(answer: asyncio.Future[T], timeout_s: float, late: TransferTimeout) -> T:
    if answer.done():  # without a timer: the index of slabs answers at once
        return answer.result()
    try:
        # Not asyncio.timeout: its error would know the task, which may keep the error.
        await asyncio.wait([answer], timeout=timeout_s)
        if not answer.done():
            raise late
        return answer.result()
    finally:
        answer.cancel()  # nobody wants it any more
        del late  # as in _value


def _late_prefix() -> TransferTimeout:
    return TransferTimeout("prefix passed its deadline", direction="prefix", errno=ETIMEDOUT)


def logged_progress(clock: Callable[[], float] = time.monotonic) -> Callable[..., None]:
    """Log progress only when it takes more than a second, then after twice as long each time."""
    since = clock()
    wait_s = 1.0

    def told(what: str, done: int, total: int) -> None:
        nonlocal wait_s
        passed = clock() - since
        if passed > wait_s:
            wait_s = 2 * passed
            _log.info("%s: %d of %d", what, done, total)

    return told
