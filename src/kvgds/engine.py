"""The engine: opens, admits, pumps, drains, closes. The only place with awaitables.

Owns the event loop's side of everything: which blocks are asked for (batches of waiters),
which of them share one I/O (flights), what may start now (the scheduler), and who owns
which memory until when (claims). It does no I/O and takes no lock: tiers and transport
work on threads of their own and hand ended moves back in groups.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections import deque
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from kvgds.blocks import Outcome, check_key
from kvgds.errors import (
    ClosedError,
    ConfigError,
    KvgdsError,
    QueueFull,
    TransferError,
    TransferTimeout,
)
from kvgds.memory import Arena, Cache, Region, View, cache_of, copy_pieces, region_of
from kvgds.metrics import Event, Gauge, Metrics, Observer
from kvgds.paths import DIRECT, Bounce, Move, path_for
from kvgds.schedule import Lane, Priority, Scheduler, Ticket
from kvgds.tiers import Services, Tier, TierStatistics
from kvgds.tiers.files import Files
from kvgds.tiers.slabs import Slabs
from kvgds.transport import NixlTransport, Transport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Sequence
    from contextlib import AbstractAsyncContextManager

    from kvgds.blocks import BlockKey, Namespace
    from kvgds.config import EngineConfig, FileTier
    from kvgds.paths import PathPlan

T = TypeVar("T")
Memory = Any  # a View, a Region, or any object with a buffer
Items = "Iterable[tuple[BlockKey, Memory]]"

_log = logging.getLogger("kvgds")
_COPY_RETRY_S = 1e-3
_ADMIT_AT_ONCE = 32  # blocks, some 25 µs each
_PENDING = Outcome(b"", "pending")
_LAYOUTS: dict[str, Callable[[FileTier, Namespace, Services], Tier]] = {
    "slabs": Slabs,
    "files": Files,
}


@dataclass(frozen=True, slots=True)
class Statistics:
    """What an engine is doing, and has done since it was opened.

    Attributes:
        queued: blocks waiting to start.
        in_flight: blocks under way.
        hits: loads that found their block.
        misses: loads that did not.
        stored: blocks written.
        errors: blocks that ended in an error.
        joined: blocks that shared another's I/O instead of one of their own.
        quarantined_bytes: bounce memory still owned by transfers past their deadline.
        tiers: the tiers' own numbers.
    """

    queued: int
    in_flight: int
    hits: int
    misses: int
    stored: int
    errors: int
    joined: int
    quarantined_bytes: int
    tiers: tuple[TierStatistics, ...]


class _Settled:
    """Returns, to however many await it, once the memory is the caller's again."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._future: asyncio.Future[None] = loop.create_future()

    def __await__(self) -> Generator[Any, None, None]:
        return asyncio.shield(self._future).__await__()

    def set(self) -> None:
        self._future.set_result(None)


class _Batch:
    """One call's blocks; wakes its task once for all, or once for each group that ends."""

    __slots__ = (
        "arrivals",
        "expired",
        "left",
        "loop",
        "outcomes",
        "priority",
        "since",
        "timer",
        "waiter",
        "waiters",
        "write",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        blocks: int,
        priority: Priority,
        *,
        write: bool,
        each: bool,
    ) -> None:
        self.loop = loop
        self.write = write
        self.priority = priority
        self.since = loop.time()
        self.outcomes = [_PENDING] * blocks  # complete once nothing is left
        self.left = blocks
        self.waiters: list[_Waiter] = []
        self.arrivals: deque[Outcome] | None = deque() if each else None
        self.waiter: asyncio.Future[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.expired = False

    def settle(self, index: int, outcome: Outcome) -> None:
        self.outcomes[index] = outcome
        self.left -= 1
        if self.arrivals is not None:
            self.arrivals.append(outcome)
        elif self.left:
            return
        if not self.left and self.timer is not None:
            self.timer.cancel()
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def news(self) -> None:
        """Wait until something has ended that the task has not seen."""
        self.waiter = self.loop.create_future()
        try:
            await self.waiter
        finally:
            self.waiter = None


class _Waiter:
    """One block of one call."""

    __slots__ = ("batch", "flight", "index", "overdue", "view")

    def __init__(self, batch: _Batch, index: int, view: View) -> None:
        self.batch = batch
        self.index = index
        self.view = view
        self.flight: _Flight | None = None  # None once it has its outcome
        self.overdue: _Settled | None = None  # told of its deadline, memory still in use


class _Flight:
    """One I/O on one block, and everybody who waits for it."""

    __slots__ = ("copying", "key", "leader", "move", "ticket", "waiters", "write")

    def __init__(self, key: BlockKey, leader: _Waiter, *, write: bool) -> None:
        self.key = key
        self.write = write
        self.leader = leader  # whose memory moves, even if it waits no longer
        self.waiters = [leader]
        self.ticket: Ticket[_Flight]
        self.move: Move | None = None  # set when it starts
        self.copying = False

    def takes(self, waiter: _Waiter) -> bool:
        """Whether one more may share this I/O."""
        fits = self.leader.view.nbytes == waiter.view.nbytes
        return fits and bool(self.waiters) and not self.copying


class Operation:
    """A started operation. Await it, once: the memory is in use until then."""

    def __init__(self, run: Callable[[], Generator[Any, None, bool]]) -> None:
        self._run = run

    def __await__(self) -> Generator[Any, None, bool]:
        return self._run()


class Engine:
    """Moves KV blocks between registered memory and its tiers. Made by :func:`open_engine`.

    All methods belong to the event loop that opened the engine.

    Attributes:
        plan: per tier, how bytes move and why.
        metrics: ``metrics.registry`` is a Prometheus registry.
    """

    def __init__(self, config: EngineConfig, transport: Transport | None = None) -> None:
        self.config = config
        self.plan: tuple[PathPlan, ...] = ()
        self._loop = asyncio.get_running_loop()
        self._transport = transport or NixlTransport(config.transport_threads)
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="kvgds-files")
        self._digest = config.namespace.digest
        services = Services(self._transport, self._post, self._run, self._settle)
        self._tier: Tier = _LAYOUTS[config.tiers[0].layout](
            config.tiers[0], config.namespace, services
        )
        self._full = config.tiers[0].verify == "full"
        self._bounce: Bounce
        self._scheduler: Scheduler[_Flight]
        self._flights: dict[tuple[BlockKey, bool], _Flight] = {}
        self._running: set[_Flight] = set()
        self._observers: list[Observer] = []
        self._pumping = False
        self._closing: asyncio.Future[None] | None = None
        self._idle: asyncio.Future[None] | None = None
        self._counts = dict.fromkeys(("hit", "miss", "stored", "present", "error", "joined"), 0)
        self._quarantined = 0
        self.metrics = Metrics(self._gauges())

    # --- opening and closing ----------------------------------------------------------

    async def open(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Probe, recover and get ready. Called by :func:`open_engine`."""
        config = self.config
        self._scheduler = Scheduler(
            {
                "load": Lane(config.inflight_ops, config.inflight_bytes),
                "store": Lane(config.inflight_ops, config.inflight_bytes),
            },
            bounce_bytes=config.bounce_bytes,
        )
        starting = asyncio.ensure_future(self._in_thread(self._start, progress or _log_progress))
        try:
            self._bounce = await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._closing = asyncio.ensure_future(self._unopen(starting))
            await asyncio.shield(self._closing)
            raise
        except BaseException:
            self._executor.shutdown(wait=False)
            raise
        self.plan = (self._tier.plan,)

    async def _unopen(self, starting: asyncio.Future[Bounce]) -> None:
        """Opening was cancelled: let go of what its thread gets hold of."""
        await asyncio.wait({starting})
        if starting.exception() is None:
            await self._close()
        else:
            self._executor.shutdown(wait=False)

    def _start(self, progress: Callable[[str, int, int], None]) -> Bounce:
        start = getattr(self._transport, "start", None)
        if start is not None:
            start()
        try:
            arena = _arena(self.config.bounce_bytes)
            self._tier.open(progress)
        except BaseException:
            self._transport.close().result()
            raise
        return Bounce(arena, region_of(arena.bytes))

    async def aclose(self) -> None:
        """Finish what was asked for, then let go of everything. May be called again.

        Raises:
            TransferTimeout: transfers were still in flight after ``drain_timeout_s``. What
                they may touch is never freed; the directory stays locked until the
                process ends.
        """
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            deadline = self._loop.time() + self.config.drain_timeout_s
            if not await self._drained(deadline):
                self._transport.abandon()
                left, waited = len(self._running), self.config.drain_timeout_s
                raise TransferTimeout(f"{left} transfers in flight {waited} s after closing")
            await self._in_thread(self._tier.close)
            await asyncio.wrap_future(self._transport.close())
        finally:
            self._executor.shutdown(wait=False)

    async def _drained(self, deadline: float) -> bool:
        while self._running or self._scheduler.queued or not self._tier.idle():
            self._idle = self._loop.create_future()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._idle
            except TimeoutError:
                return False
            finally:
                self._idle = None
        return True

    def _in_thread(self, function: Callable[..., T], *args: object) -> Awaitable[T]:
        return self._loop.run_in_executor(self._executor, function, *args)

    def _post(self, function: Callable[..., None], *args: Any) -> None:  # noqa: ANN401 - any function's
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._posted, function, args)

    def _posted(self, function: Callable[..., None], args: tuple[Any, ...]) -> None:
        function(*args)
        self._wake_closer()  # a tier may have become idle without a move that settles

    def _run(self, function: Callable[[], Any], done: Callable[[ThreadFuture[Any]], None]) -> None:
        self._executor.submit(function).add_done_callback(lambda future: self._post(done, future))

    # --- memory -----------------------------------------------------------------------

    def register(self, buffer: object) -> Region:
        """Register one contiguous buffer, of torch, numpy, mmap, bytearray and the like.

        Page-aligned parts of it move without a copy, other parts through the bounce region.

        Raises:
            ConfigError: not contiguous, empty, GPU memory, or no buffer.
        """
        self._check_open()
        return region_of(buffer)

    def register_cache(self, layers: Sequence[object], block_axis: int = 0) -> Cache:
        """Register a paged KV cache: one or more tensors a layer, blocks along one axis.

        ``cache.block(i)`` is block ``i`` of every tensor, in the order given here.

        Raises:
            ConfigError: tensors that differ in their number of blocks, overlap, or are empty.
        """
        self._check_open()
        return cache_of(layers, block_axis)

    async def deregister(self, memory: Region | Cache) -> None:
        """Forget registered memory; it may be freed afterwards.

        Raises:
            BusyError: a transfer uses it.
        """
        region = memory.region if isinstance(memory, Cache) else memory
        region.retire()
        await asyncio.wrap_future(self._transport.detach(region))
        region.release()

    # --- public operations --------------------------------------------------------------

    async def store(
        self,
        key: BlockKey,
        memory: Memory,
        *,
        priority: Priority = Priority.BACKGROUND,
        timeout_s: float | None = None,
    ) -> bool:
        """Store one block; returns when it is down and visible.

        A key names its content: when a block of this size is there already, nothing moves.

        Returns:
            True if the block was written, False if it was there already.

        Raises:
            TransferError: the bytes did not arrive. TransferTimeout: not in time.
            StorageFull: no room. BusyError: a load into this memory is in flight.
        """
        batch = self._open_batch(1, priority, timeout_s, write=True)
        await self._carry_out(batch, [(key, memory)])
        return _value(batch.outcomes[0])

    async def load(
        self,
        key: BlockKey,
        memory: Memory,
        *,
        priority: Priority = Priority.DEMAND,
        timeout_s: float | None = None,
    ) -> bool:
        """Load one block into memory of its size.

        Returns:
            True, or False: a miss is an answer.

        Raises:
            BlockCorrupt: what is stored is provably wrong; it is quarantined.
            TransferError: the bytes did not arrive. TransferTimeout: not in time. The
                memory's content is then undefined.
            BusyError: another transfer uses this memory.
        """
        batch = self._open_batch(1, priority, timeout_s, write=False)
        await self._carry_out(batch, [(key, memory)])
        return _value(batch.outcomes[0])

    async def store_many(
        self,
        items: Iterable[tuple[BlockKey, Memory]],
        *,
        priority: Priority = Priority.BACKGROUND,
        timeout_s: float | None = None,
    ) -> list[Outcome]:
        """Store blocks; an outcome for each, in order. One bad block fails no other."""
        items = [(key, memory) for key, memory in items]
        batch = self._open_batch(len(items), priority, timeout_s, write=True)
        await self._carry_out(batch, items)
        return batch.outcomes

    async def load_many(
        self,
        items: Iterable[tuple[BlockKey, Memory]],
        *,
        priority: Priority = Priority.DEMAND,
        timeout_s: float | None = None,
    ) -> list[Outcome]:
        """Load blocks; an outcome for each, in order. One bad block fails no other."""
        items = [(key, memory) for key, memory in items]
        batch = self._open_batch(len(items), priority, timeout_s, write=False)
        await self._carry_out(batch, items)
        return batch.outcomes

    def store_each(
        self,
        items: Iterable[tuple[BlockKey, Memory]],
        *,
        priority: Priority = Priority.BACKGROUND,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Outcome]:
        """Store blocks; their outcomes as they end."""
        return self._each(items, priority, timeout_s, write=True)

    def load_each(
        self,
        items: Iterable[tuple[BlockKey, Memory]],
        *,
        priority: Priority = Priority.DEMAND,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Outcome]:
        """Load blocks; their outcomes as they end, to start computing early.

        Leaving the loop early cancels the rest: close the iterator (``aclosing``) and wait.
        """
        return self._each(items, priority, timeout_s, write=False)

    def store_nowait(
        self, key: BlockKey, memory: Memory, *, timeout_s: float | None = None
    ) -> Operation:
        """Start a store; await the result later. Raises QueueFull instead of queueing more."""
        return self._start_now(key, memory, Priority.BACKGROUND, timeout_s, write=True)

    def load_nowait(
        self, key: BlockKey, memory: Memory, *, timeout_s: float | None = None
    ) -> Operation:
        """Start a load; await the result later. Raises QueueFull instead of queueing more."""
        return self._start_now(key, memory, Priority.DEMAND, timeout_s, write=False)

    async def prefix(self, keys: Sequence[BlockKey]) -> int:
        """Length of the longest prefix of ``keys`` whose blocks are all stored."""
        self._check_open()
        for key in keys:
            check_key(key)
        future: asyncio.Future[int] = self._loop.create_future()

        def done(length: int) -> None:
            if not future.done():
                future.set_result(length)

        self._tier.prefix(keys, done)
        return await future

    async def delete(self, key: BlockKey) -> bool:
        """Drop a block; True if it was there. Returns when that survives the process's death."""
        self._check_open()
        check_key(key)
        future: asyncio.Future[bool] = self._loop.create_future()

        def done(there: bool, error: Exception | None) -> None:  # noqa: FBT001 - the tier's contract
            if future.done():
                return
            if error is None:
                future.set_result(there)
            else:
                future.set_exception(TransferError(f"delete: {error}", key=key))

        self._tier.delete(key, done)
        return await future

    def statistics(self) -> Statistics:
        """What the engine is doing and has done."""
        counts = self._counts
        return Statistics(
            queued=self._scheduler.queued,
            in_flight=self._scheduler.running,
            hits=counts["hit"],
            misses=counts["miss"],
            stored=counts["stored"],
            errors=counts["error"],
            joined=counts["joined"],
            quarantined_bytes=self._quarantined,
            tiers=(self._tier.statistics(),),
        )

    def observe(self, observer: Observer) -> None:
        """Tell an observer of every block that ends from now on."""
        self._observers.append(observer)

    # --- submitting -------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closing is not None:
            raise ClosedError("the engine is closed")
        if asyncio.get_running_loop() is not self._loop:
            raise ClosedError("the engine belongs to another event loop; open one for this loop")

    def _start_now(
        self,
        key: BlockKey,
        memory: Memory,
        priority: Priority,
        timeout_s: float | None,
        *,
        write: bool,
    ) -> Operation:
        self._check_open()
        if self._scheduler.queued >= self.config.queue_ops:
            raise QueueFull(f"{self._scheduler.queued} blocks are queued; await some first")
        batch = self._open_batch(1, priority, timeout_s, write=write)
        self._admit(batch, 0, key, memory)
        self._pump_soon()

        async def finish() -> bool:
            await self._carry_out(batch, [])
            return _value(batch.outcomes[0])

        return Operation(lambda: finish().__await__())

    def _open_batch(
        self,
        blocks: int,
        priority: Priority,
        timeout_s: float | None,
        *,
        write: bool,
        each: bool = False,
    ) -> _Batch:
        self._check_open()
        timeout = self.config.timeout_s if timeout_s is None else timeout_s
        if not timeout > 0:
            raise ConfigError("timeout_s", timeout_s, "must be above 0")
        batch = _Batch(self._loop, blocks, priority, write=write, each=each)
        if blocks:
            batch.timer = self._loop.call_at(batch.since + timeout, self._expire, batch)
        return batch

    async def _carry_out(self, batch: _Batch, items: Sequence[tuple[BlockKey, Memory]]) -> None:
        """Admit all blocks, then wait; cancelled: drop what is queued, wait for the rest."""
        admitted = 0
        try:
            for key, memory in items:
                self._admit(batch, admitted, key, memory)
                admitted += 1
                if not admitted % _ADMIT_AT_ONCE:
                    self._pump_soon()
                    await asyncio.sleep(0)  # others use this loop too
            self._pump_soon()
            while batch.left:
                await batch.news()
        except asyncio.CancelledError as cancelled:
            batch.left -= len(items) - admitted
            await self._call_off(batch, cancelled)
            raise

    def _admit(self, batch: _Batch, index: int, key: BlockKey, memory: Memory) -> None:
        """Take one block in; what is wrong with it becomes its outcome."""
        try:
            if batch.expired:
                raise TransferTimeout("passed its deadline", key=key)
            view = self._check(batch, key, memory)
            if not batch.write and self._tier.authoritative and not self._tier.contains(key):
                self._end_at_once(batch, index, Outcome(key, "miss"), view.nbytes)
                return
            waiter = _Waiter(batch, index, view)
            view.claim(write=not batch.write)
            try:
                self._board(waiter, key, batch.priority)
            except BaseException:
                view.release(write=not batch.write)
                raise
            batch.waiters.append(waiter)
        except Exception as error:  # noqa: BLE001 - it belongs to this block alone
            self._end_at_once(batch, index, Outcome(key, "error", error), 0)

    def _check(self, batch: _Batch, key: BlockKey, memory: Memory) -> View:
        if self._closing is not None:  # it may have begun between two blocks of a batch
            raise ClosedError("the engine is closed")
        check_key(key)
        view = self._view(memory)
        view.region.check()
        if not batch.write and view.region.readonly:
            raise ConfigError("memory", "read-only", "can't be loaded into; give writable memory")
        return view

    def _end_at_once(self, batch: _Batch, index: int, outcome: Outcome, nbytes: int) -> None:
        self._count(batch, outcome, nbytes, "none")
        batch.settle(index, outcome)

    @staticmethod
    def _view(memory: Memory) -> View:
        if isinstance(memory, View):
            return memory
        if isinstance(memory, Cache):
            raise ConfigError("memory", "Cache", "give one block of it: cache.block(i)")
        region = memory if isinstance(memory, Region) else region_of(memory, zero_copy=False)
        region.check()
        return region[:]

    def _board(self, waiter: _Waiter, key: BlockKey, priority: Priority) -> None:
        """Join the flight of this block, or start one."""
        write = waiter.batch.write
        flight = self._flights.get((key, write))
        if flight is None or not flight.takes(waiter):
            flight = self._book(waiter, key, priority)
        else:
            flight.waiters.append(waiter)
            self._counts["joined"] += 1
        waiter.flight = flight

    def _book(self, waiter: _Waiter, key: BlockKey, priority: Priority) -> _Flight:
        flight = _Flight(key, waiter, write=waiter.batch.write)
        nbytes = waiter.view.nbytes
        lease = path_for(waiter.view, self._tier.plan.alignment).lease_bytes(nbytes)
        if lease > self.config.bounce_bytes:
            rule = f"a block of {nbytes:,} bytes needs {lease:,}; raise it, or align the memory"
            raise ConfigError("bounce_bytes", self.config.bounce_bytes, rule)
        flight.ticket = self._scheduler.submit(
            flight,
            lane="store" if flight.write else "load",
            nbytes=nbytes,
            bounce_bytes=lease,
            priority=priority,
            now=self._loop.time(),
        )
        self._flights[key, flight.write] = flight
        return flight

    def _close_boarding(self, flight: _Flight) -> None:
        """Nobody may join this flight any more."""
        if self._flights.get((flight.key, flight.write)) is flight:
            del self._flights[flight.key, flight.write]

    # --- pumping ----------------------------------------------------------------------

    def _pump_soon(self) -> None:
        """Pump now if nothing is going on, else once for all that this turn of the loop asks."""
        if self._pumping:
            return
        if not self._running:
            self._pump()
        else:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        tickets = self._scheduler.take()
        if not tickets:
            return
        loads: list[Move] = []
        stores: list[Move] = []
        for ticket in tickets:
            flight = ticket.op
            move = self._make_move(flight, ticket)
            (stores if flight.write else loads).append(move)
            self._running.add(flight)
        if loads:
            self._tier.load(loads)
        if stores:
            self._tier.store(stores)

    def _make_move(self, flight: _Flight, ticket: Ticket[_Flight]) -> Move:
        view = flight.leader.view
        move = Move(
            namespace=self._digest,
            key=flight.key,
            view=view,
            write=flight.write,
            path=path_for(view, self._tier.plan.alignment),
            full=self._full,
            owner=flight,
            backend=self._tier.plan.backend,
        )
        move.lend(self._bounce, ticket.offset or 0)
        flight.move = move
        return move

    # --- settling ---------------------------------------------------------------------

    def _settle(self, moves: Sequence[Move]) -> None:
        """Moves have ended: give back what they held and tell everybody who waits."""
        for move in moves:
            flight: Any = move.owner
            self._scheduler.finish(flight.ticket)
            self._running.discard(flight)
            self._close_boarding(flight)
            others = [waiter for waiter in flight.waiters if waiter is not flight.leader]
            if move.abandoned:
                self._quarantined -= len(move.lease)
                self._free_overdue(flight)
                self._rebook(flight)
            elif others and move.status == "hit":
                self._copy(flight, move, others)
            else:
                self._tell(flight, move)
        if self._scheduler.queued:
            self._pump_soon()
        self._wake_closer()

    def _wake_closer(self) -> None:
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    @staticmethod
    def _free_overdue(flight: _Flight) -> None:
        """Give a leader that passed its deadline its memory back."""
        leader = flight.leader
        if leader.overdue is not None:
            leader.view.release(write=not flight.write)
            leader.overdue.set()

    def _tell(self, flight: _Flight, move: Move) -> None:
        self._free_overdue(flight)
        outcome = (
            Outcome(flight.key, move.status)
            if move.error is None
            else Outcome(flight.key, "error", move.error)
        )
        for waiter in flight.waiters:
            self._end(waiter, outcome, move.path.name)
        flight.waiters.clear()

    def _end(self, waiter: _Waiter, outcome: Outcome, path: str) -> None:
        flight = waiter.flight
        assert flight is not None  # noqa: S101 - only called for waiters without an outcome
        write = flight.write
        waiter.flight = None
        if waiter.overdue is None:
            waiter.view.release(write=not write)
        self._count(waiter.batch, outcome, waiter.view.nbytes, path)
        waiter.batch.settle(waiter.index, outcome)

    def _rebook(self, flight: _Flight) -> None:
        """Its first waiter gave up before it moved, others still want the block."""
        waiters, flight.waiters = flight.waiters, []
        for waiter in waiters:
            try:
                self._board(waiter, flight.key, Priority.DEMAND)
            except KvgdsError as error:
                self._end(waiter, Outcome(flight.key, "error", error), "none")

    def _copy(self, flight: _Flight, move: Move, others: list[_Waiter]) -> None:
        """Give the others what the leader got, before it gets its memory back."""
        flight.copying = True
        self._running.add(flight)
        views = [waiter.view for waiter in others]

        def ended(future: ThreadFuture[None]) -> None:
            self._running.discard(flight)
            if error := future.exception():
                move.error = TransferError(str(error), **move.context)
            self._tell(flight, move)
            self._wake_closer()

        self._run(lambda: _copy_all(move.view, views), ended)

    def _count(self, batch: _Batch, outcome: Outcome, nbytes: int, path: str) -> None:
        status, tier = outcome.status, self._tier.name
        self._counts[status] += 1
        direction = "store" if batch.write else "load"
        seconds = self._loop.time() - batch.since
        self.metrics.count((direction, tier, path, status), nbytes, seconds)
        if self._observers:
            self._notify(Event(direction, outcome.key, nbytes, tier, path, status, seconds))

    def _notify(self, event: Event) -> None:
        for observer in list(self._observers):
            try:
                observer.settled(event)
            except Exception:  # noqa: BLE001 - an observer's fault breaks no transfer
                self._observers.remove(observer)
                _log.exception("an observer raised and was removed")

    # --- deadlines and cancellation -----------------------------------------------------

    def _expire(self, batch: _Batch) -> None:
        """A batch's deadline has passed: nobody waits longer, whatever becomes of the I/O."""
        batch.expired = True
        again = False
        for waiter in batch.waiters:
            if waiter.flight is not None and not self._give_up(waiter, waiter.flight):
                again = True
        if again:  # a reactor is copying right now; that takes moments
            batch.timer = self._loop.call_later(_COPY_RETRY_S, self._expire, batch)
        self._tier.expire()
        self._wake_closer()

    def _give_up(self, waiter: _Waiter, flight: _Flight) -> bool:
        """End one waiter with TransferTimeout. False: try again in a moment."""
        if self._leave_queue(waiter, flight):
            self._time_out(waiter, flight, None)
            return True
        if flight.copying:
            return False
        move = flight.move
        assert move is not None  # noqa: S101 - it has left the queue
        if waiter is flight.leader:
            if move.abandon():
                self._quarantine(flight, move)
            elif move.path is DIRECT:
                waiter.overdue = _Settled(self._loop)
            else:
                return False
        flight.waiters.remove(waiter)
        self._time_out(waiter, flight, waiter.overdue)
        if not flight.waiters and not move.abandoned:
            move.abandoned = True  # nobody is left to be told: publish nothing
            self._quarantine(flight, move)
        return True

    def _quarantine(self, flight: _Flight, move: Move) -> None:
        """Nobody waits for this I/O, but it goes on: its lease is not free, nobody may join."""
        self._quarantined += len(move.lease)
        self._close_boarding(flight)

    def _time_out(self, waiter: _Waiter, flight: _Flight, settled: _Settled | None) -> None:
        path = flight.move.path.name if flight.move else "none"
        error = TransferTimeout(
            "passed its deadline",
            direction="store" if flight.write else "load",
            key=flight.key,
            path=path,
            backend=self._tier.plan.backend,
            errno=errno.ETIMEDOUT,
        )
        error.settled = settled
        self._end(waiter, Outcome(flight.key, "error", error), path)

    def _leave_queue(self, waiter: _Waiter, flight: _Flight) -> bool:
        """Drop a waiter whose I/O has not started. False: it has."""
        if flight.ticket.state != "queued":
            return False
        flight.waiters.remove(waiter)
        if waiter is flight.leader:
            self._scheduler.cancel(flight.ticket)
            self._close_boarding(flight)
            self._rebook(flight)
            if flight.waiters or self._scheduler.queued:
                self._pump_soon()
        return True

    async def _call_off(self, batch: _Batch, cancelled: BaseException) -> None:
        for waiter in batch.waiters:
            flight = waiter.flight
            if flight is not None and self._leave_queue(waiter, flight):
                outcome = Outcome(flight.key, "error", asyncio.CancelledError())
                self._end(waiter, outcome, "none")
        while batch.left:
            with contextlib.suppress(asyncio.CancelledError):  # again: still not ours to leave
                await batch.news()
        for outcome in batch.outcomes:
            error = outcome.error
            if isinstance(error, TransferTimeout) and error.settled is not None:
                raise error from cancelled

    async def _each(
        self,
        items: Iterable[tuple[BlockKey, Memory]],
        priority: Priority,
        timeout_s: float | None,
        *,
        write: bool,
    ) -> AsyncIterator[Outcome]:
        items = [(key, memory) for key, memory in items]
        batch = self._open_batch(len(items), priority, timeout_s, write=write, each=True)
        arrivals: Any = batch.arrivals
        admitted = 0
        try:
            while batch.left or arrivals:
                for key, memory in items[admitted : admitted + _ADMIT_AT_ONCE]:
                    self._admit(batch, admitted, key, memory)
                    admitted += 1
                self._pump_soon()
                if not arrivals:
                    await (batch.news() if admitted == len(items) else asyncio.sleep(0))
                while arrivals:
                    yield arrivals.popleft()
        except (asyncio.CancelledError, GeneratorExit) as gone:
            batch.left -= len(items) - admitted
            await self._call_off(batch, gone)
            raise

    def _gauges(self) -> list[Gauge]:
        def tier(name: str) -> Callable[[], float]:
            return lambda: float(getattr(self._tier.statistics(), name))

        return [
            Gauge("kvgds_queued", "blocks waiting to start", lambda: self._scheduler.queued),
            Gauge("kvgds_in_flight", "blocks under way", lambda: self._scheduler.running),
            Gauge("kvgds_blocks", "blocks that a load would find", tier("blocks")),
            Gauge("kvgds_used_bytes", "bytes of blocks, padding included", tier("bytes_used")),
            Gauge("kvgds_capacity_bytes", "limit on them", tier("capacity_bytes")),
            Gauge(
                "kvgds_evictions", "blocks dropped to make room", tier("evictions"), counter=True
            ),
            Gauge("kvgds_quarantined", "places out of use", tier("quarantined")),
            Gauge(
                "kvgds_quarantined_bounce_bytes",
                "bounce memory of late transfers",
                lambda: self._quarantined,
            ),
        ]


def open_engine(
    config: EngineConfig, *, progress: Callable[[str, int, int], None] | None = None
) -> AbstractAsyncContextManager[Engine]:
    """Open an engine, for ``async with`` to close.

    Args:
        config: the settings.
        progress: called with (what, done, total) while a large index is recovered, from
            another thread; logged by default.

    Raises:
        ConfigError: a directory can't be used as configured.
        BusyError: another engine has the directory.
        PathUnavailable: NIXL, or a path that was asked for, can't be had.
    """
    return _opened(config, progress)


@contextlib.asynccontextmanager
async def _opened(
    config: EngineConfig, progress: Callable[[str, int, int], None] | None
) -> AsyncIterator[Engine]:
    engine = Engine(config)
    await engine.open(progress)
    try:
        yield engine
    finally:
        await engine.aclose()


def _arena(nbytes: int) -> Arena:
    try:
        return Arena(nbytes)
    except (OSError, OverflowError) as error:
        rule = f"that much memory can't be had: {error}"
        raise ConfigError("bounce_bytes", nbytes, rule) from None


def _value(outcome: Outcome) -> bool:
    if outcome.error is not None:
        raise outcome.error
    return outcome.status in ("hit", "stored")


def _copy_all(source: View, targets: list[View]) -> None:
    pieces = source.pieces()
    for target in targets:
        copy_pieces(pieces, target.pieces())


def _log_progress(what: str, done: int, total: int) -> None:
    _log.info("%s: %d of %d", what, done, total)
