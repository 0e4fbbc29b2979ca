"""Blocks under way: who waits for which, what shares one I/O, and whose memory it is meanwhile.

Owns the event loop's side of every operation, from admission to outcome; ``batch`` has what it
keeps of each. The scheduler says when a flight starts, the tier where its bytes lie. It does no I/O
and takes no lock: ended moves come back in groups.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import sys
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from kvgds.blocks import PAGE, Outcome, check_key, image_bytes
from kvgds.config import ObjectTier
from kvgds.deadlines import Deadlines
from kvgds.errors import (
    CapacityError,
    ClosedError,
    ConfigError,
    KvgdsError,
    TransferError,
    TransferTimeout,
    untraced,
)
from kvgds.flights.batch import Batch, Flight, Overdue, Waiter, listed, pairs
from kvgds.flights.relay import Relay
from kvgds.memory import Cache, Region, Territory, View
from kvgds.memory.copies import copy_pieces
from kvgds.metrics import Event, Metrics, Observer
from kvgds.paths import Move, Ways
from kvgds.schedule import Lane, Priority, Scheduler, Ticket
from kvgds.waits import until_done

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        Awaitable,
        Callable,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )
    from concurrent.futures import Future as ThreadFuture

    from kvgds.blocks import BlockKey
    from kvgds.config import EngineConfig
    from kvgds.handover import Handover
    from kvgds.tiers import Tier

__all__ = ["KEYS_AT_ONCE", "Batch", "Flights", "Memory", "listed", "pairs"]

Memory: TypeAlias = object
"""Memory of one block: a View (`cache.block(i)`, `region[a:b]`), a whole Region, or what
:meth:`~kvgds.Engine.register` takes, which then bounces. Loads need it writable."""

_log = logging.getLogger("kvgds")
_COPY_RETRY_S = 1e-3
_ADMIT_AT_ONCE = 32  # blocks, some 25 µs each
_SETTLE_AT_ONCE = 4
_LEAVE_AT_ONCE = 32
_FEW = 4
_DONE = object()
_PUMP_BYTES = 4 << 20
KEYS_AT_ONCE = 1024  # of a prefix, in one turn of the loop: some 0.4 ms
_COUNTED = ("hit", "miss", "stored", "present", "error", "cancelled", "joined")


class _Asked(NamedTuple):
    """How many of the first keys are there?"""

    keys: Sequence[BlockKey]
    done: Callable[[int], None]
    wanted: Callable[[], bool]


class Flights:
    """All operations of one engine.

    Attributes:
        tiers: in the order in which they are asked; set before anything comes in, like ``ways``.
        relay: what goes on between two tiers; None: there is one.
        counts: blocks that ended, by outcome, and those that joined another's I/O.
        closed: set once no new block may come in.
        quarantined: bytes of bounce memory that transfers past their deadline still own.
    """

    tiers: tuple[Tier, ...]
    ways: Ways

    def __init__(
        self,
        config: EngineConfig,
        metrics: Metrics,
        run: Callable[[Callable[[], Any], Callable[[ThreadFuture[Any]], None]], None],
        handover: Handover,
    ) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._metrics = metrics
        self._run = run
        self._handover = handover
        self._digest = config.namespace.digest
        lanes = _lanes(config)
        self.scheduler: Scheduler[Any] = Scheduler(lanes, bounce_bytes=config.bounce_bytes)
        self.relay = self._relay(config, lanes)
        self._flights: dict[tuple[BlockKey, bool], Flight] = {}
        self.running: set[Flight] = set()
        self.observers: dict[object, Observer] = {}  # by what stands for the call that named them
        self.counts = dict.fromkeys(_COUNTED, 0)
        self.quarantined = 0
        self.territory = Territory()
        self._sound: Region | None = None  # as was seen in this turn
        self.deadlines = Deadlines[Batch](self._loop, self._expire)
        self._late: deque[Iterator[None]] = deque()
        self.closed = False
        self._pumping = False
        self._ended: deque[Move] = deque()
        self._settling = False  # already, in this turn of the loop
        self._asked = 0  # prefixes that are being looked for
        self._idle: asyncio.Future[None] | None = None

    def set_tiers(self, tiers: tuple[Tier, ...]) -> None:
        """What blocks move to and from."""
        self.tiers = tiers
        if self.relay is not None:
            self.relay.near, self.relay.far = tiers

    def open(self) -> None:
        """The tiers are open, and the ways settled."""
        if self.relay is not None:
            self.relay.open()

    def close(self) -> None:
        """Take no new block."""
        self.closed = True
        if self.relay is not None:
            self.relay.close()

    def stop(self) -> None:
        """Nothing is under way: let go of the loop's timers."""
        self.deadlines.close()
        if self.relay is not None:
            self.relay.stop()

    def _relay(self, config: EngineConfig, lanes: Mapping[str, Lane]) -> Relay | None:
        last = config.tiers[-1]
        if len(config.tiers) == 1 or not isinstance(last, ObjectTier):
            return None
        return Relay(
            self,
            last,
            self._digest,
            self._loop,
            lane=_lane(1, write=True),
            loads=lanes[_lane(1, write=False)],
            bounce_bytes=config.bounce_bytes // 2,
        )

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        if self.relay is not None and self.relay.busy:
            return True
        idle = all(tier.idle() for tier in self.tiers)
        return bool(self.running or self.scheduler.queued or self._asked or not idle)

    async def drained(self, deadline: float) -> bool:
        """Wait until nothing is under way, cancelled or not; False if that takes longer."""
        while self.busy:
            self._idle = self._loop.create_future()
            if not await until_done(self._idle, deadline):
                return False
        return True

    # --- submitting -------------------------------------------------------------------

    def open_batch(
        self,
        blocks: int,
        priority: Priority,
        timeout_s: float | None,
        *,
        write: bool,
        each: bool = False,
        stream: object,
    ) -> Batch:
        """Begin a call of so many blocks: its deadline runs from now."""
        timeout = self.timeout_of(timeout_s)
        _check_priority(priority)
        batch = Batch(
            self._loop, self.deadlines, blocks, priority, write=write, each=each, stream=stream
        )
        if blocks:
            self.deadlines.add(batch, self._loop.time() + timeout)
        return batch

    def timeout_of(self, timeout_s: float | None) -> float:
        """Seconds that a call may take; the settings' where it names none."""
        if timeout_s is None:
            return self._config.timeout_s
        if type(timeout_s) is bool or not isinstance(timeout_s, float | int):
            raise ConfigError("timeout_s", timeout_s, "must be a number of seconds, or None")
        if not 0 < timeout_s <= sys.float_info.max:
            raise ConfigError("timeout_s", timeout_s, "must be above 0 and finite")
        return float(timeout_s)

    async def carry_out(self, batch: Batch, items: Sequence[tuple[BlockKey, Memory]]) -> None:
        """Admit all blocks, then wait."""
        self.take_in(batch, items)
        await self.ended(batch)

    async def ended(self, batch: Batch) -> None:
        """Wait for all blocks; cancelled: drop what is queued, wait for the rest."""
        try:
            while batch.left:
                await batch.news()
        except asyncio.CancelledError as cancelled:
            await self._call_off(batch, cancelled)
            raise

    def take_in(self, batch: Batch, items: Sequence[tuple[BlockKey, Memory]]) -> None:
        """Admit some of the blocks in each turn of the loop: others use it too.

        Not as outcomes are taken one by one: between two of them the caller may compute for long,
        and the deadline of all runs meanwhile.
        """
        stop = min(batch.admitted + _ADMIT_AT_ONCE, len(items))
        try:
            for index in range(batch.admitted, stop):
                self._admit(batch, index, *items[index])
        finally:
            self._sound = None
        self.pump_soon()
        batch.admitted = stop
        more = stop < len(items)
        batch.admission = self._loop.call_soon(self.take_in, batch, items) if more else None

    def _admit(self, batch: Batch, index: int, key: BlockKey, memory: Memory) -> None:
        """Take one block in; what is wrong with it becomes its outcome."""
        try:
            view = self._check(batch, key, memory)
            if batch.expired:
                raise self._late_error(key, write=batch.write)
            level = 0 if batch.write else self._level(key)
            if level is None:
                self._end_at_once(batch, index, Outcome(key, "miss"), view.nbytes)
                return
            waiter = Waiter(batch, index, view)
            view.claim(write=not batch.write)
            try:
                self.counts["joined"] += self._board(waiter, key, level)
            except BaseException:
                view.release(write=not batch.write)
                raise
            batch.waiters.append(waiter)
        except Exception as error:  # noqa: BLE001 - it belongs to this block alone
            self._end_at_once(batch, index, Outcome(key, "error", untraced(error)), 0)

    def _check(self, batch: Batch, key: BlockKey, memory: Memory) -> View:
        if self.closed:  # it may have begun between two blocks of a batch
            raise ClosedError("the engine is closed")
        check_key(key)
        view = self._view(memory)
        if view.region is not self._sound:  # once for those of a turn: a cache has many tensors
            self.territory.check(view.region)
            self._sound = view.region
        if not batch.write and view.region.readonly:
            raise ConfigError("memory", "read-only", "can't be loaded into; give writable memory")
        return view

    def _end_at_once(self, batch: Batch, index: int, outcome: Outcome, nbytes: int) -> None:
        self._count(batch, outcome, nbytes, "none", self.tiers[0].name)
        batch.settle(index, outcome)

    def _view(self, memory: Memory) -> View:
        if isinstance(memory, View):
            return memory
        if isinstance(memory, Cache):
            raise ConfigError("memory", "Cache", "give one block of it: cache.block(i)")
        region = memory if isinstance(memory, Region) else self.territory.borrow(memory)
        return region[:]

    def _level(self, key: BlockKey, above: int = -1) -> int | None:
        """The next tier to be asked for a block; None: it is nowhere, as far as that is known."""
        for level in range(above + 1, len(self.tiers)):
            tier = self.tiers[level]
            if level and tier.out:
                continue  # the tiers before it go on working
            if not tier.authoritative or tier.contains(key):
                return level
        return None

    def _board(self, waiter: Waiter, key: BlockKey, level: int) -> bool:
        """Join the flight of this block, or start one; whether it joined."""
        write = waiter.batch.write
        flight = self._flights.get((key, write))
        joins = flight is not None and flight.takes(waiter)
        if flight is None or not joins:
            flight = Flight(key, waiter, level=level, write=write)
            self._book(flight, self._loop.time())
            self._flights[key, write] = flight
        else:
            flight.waiters[waiter] = None
            if waiter.batch.priority < flight.priority:
                self._hasten(flight, waiter.batch.priority)
        waiter.flight = flight
        return joins

    def _hasten(self, flight: Flight, priority: Priority) -> None:
        """One more waits, who can't wait as long."""
        flight.priority = priority
        flight.ticket = self.scheduler.hasten(flight.ticket, priority, self._loop.time())
        if flight.move is not None:
            flight.move.urgent = flight.urgent

    def _book(self, flight: Flight, since: float) -> None:
        """Queue a flight for its tier."""
        view, plan = flight.leader.view, self.tiers[flight.level].plan
        flight.path = self.ways.path_for(view, plan)
        lease = image_bytes(view.nbytes) if flight.path.whole else PAGE
        needed = lease if self.relay is None else 2 * image_bytes(view.nbytes)
        if needed > self._config.bounce_bytes:
            rule = f"a block of {view.nbytes:,} bytes needs {needed:,}; raise it"
            if self.relay is None and self.ways.spares_bounce(view.region, plan):
                rule += ", or register page-aligned memory"
            raise ConfigError("bounce_bytes", self._config.bounce_bytes, rule)
        flight.ticket = self.scheduler.submit(
            flight,
            lane=_lane(flight.level, write=flight.write),
            nbytes=max(view.nbytes, lease),
            bounce_bytes=lease,
            priority=flight.priority,
            now=since,
        )

    def _close_boarding(self, flight: Flight) -> None:
        """Nobody may join this flight any more."""
        if self._flights.get((flight.key, flight.write)) is flight:
            del self._flights[flight.key, flight.write]

    # --- asking -----------------------------------------------------------------------

    def prefix(
        self, keys: Sequence[BlockKey], done: Callable[[int], None], wanted: Callable[[], bool]
    ) -> None:
        """How many of the first keys have their blocks in some tier; see ``Tier.prefix``.

        A long one is looked for in parts: others use the loop too.
        """
        self._asked += 1  # between two parts no tier is busy with it
        self._look(_Asked(keys, done, wanted), 0)
        if self._asked:
            self._handover.begin()

    def _look(self, asked: _Asked, start: int) -> None:
        part = asked.keys[start : start + KEYS_AT_ONCE]
        found = partial(self._found, asked, start, len(part))
        (self.relay or self.tiers[0]).prefix(part, found, asked.wanted)

    def _found(self, asked: _Asked, start: int, count: int, length: int) -> None:
        stop = start + count
        if length == count and stop < len(asked.keys) and asked.wanted():
            self._loop.call_soon(self._look, asked, stop)
            return
        self._asked -= 1
        asked.done(start + length)
        self.wake_closer()

    def delete(self, key: BlockKey, done: Callable[[bool, Exception | None], None]) -> None:
        """Drop a block from all tiers; see ``Tier.delete``."""
        self._handover.begin()

        def ended(there: bool, error: Exception | None) -> None:  # noqa: FBT001 - the tier's contract
            self._unlasting(key)
            done(there, error)

        self._unlasting(key)
        (self.relay or self.tiers[0]).delete(key, ended)

    def _unlasting(self, key: BlockKey) -> None:
        """What is loaded or stored just now may have been deleted meanwhile: it is not to be kept.

        Nor shared with who stores now, where it was stored before and has not been told yet.
        """
        self._outdate(key)
        for flight in self.running if self.relay else ():  # one tier promotes nothing
            if flight.key == key:
                flight.lasting = False
        stored = self._flights.get((key, True))
        if stored is not None and (stored.landed or stored.mirroring):
            self._close_boarding(stored)

    def _outdate(self, key: BlockKey) -> None:
        """A load under way may have looked before what is told now: who comes later shares none."""
        flight = self._flights.pop((key, False), None)
        if flight is not None:
            flight.lasting = False

    # --- pumping ----------------------------------------------------------------------

    def pump_soon(self) -> None:
        """Pump once for all that this turn of the loop asks; now, if that is a good load."""
        if self.scheduler.queued_bytes >= _PUMP_BYTES:
            self.pump()
        elif not self._pumping:
            self._pumping = True
            self._loop.call_soon(self.pump)

    def pump(self) -> None:
        """Start whatever may start."""
        self._pumping = False
        tickets = self.scheduler.take()
        if not tickets:
            return
        self._handover.begin()
        loads: list[list[Move]] = [[] for _ in self.tiers]
        stores: list[Move] = []
        errands: list[Ticket[Any]] = []
        for ticket in tickets:
            flight = ticket.op
            if not isinstance(flight, Flight):
                errands.append(ticket)
                continue
            move = self._make_move(flight, ticket)
            if flight.write:
                stores.append(move)
            else:
                loads[flight.level].append(move)
            self.running.add(flight)
        for tier, moves in zip(self.tiers, loads, strict=True):
            if moves:
                tier.load(moves)
        if stores:
            self.tiers[0].store(stores)
        for errand in errands:
            errand.op.start(errand)

    def _make_move(self, flight: Flight, ticket: Ticket[Flight]) -> Move:
        view, tier = flight.leader.view, self.tiers[flight.level]
        flight.move = Move(
            namespace=self._digest,
            key=flight.key,
            view=view,
            write=flight.write,
            path=flight.path,
            full=tier.checked,
            ways=self.ways,
            ticket=ticket,
            owner=flight,
            backend=tier.plan.backend,
            urgent=flight.urgent,
            stream=flight.leader.batch.stream,
        )
        return flight.move

    # --- settling ---------------------------------------------------------------------

    def settle(self, moves: Sequence[Move]) -> None:
        """Moves have ended: give back what they held and tell everybody who waits.

        A few in each turn of the loop: every one wakes a task, and others are waiting too.
        """
        self._ended.extend(moves)
        for move in moves:
            if isinstance(move.owner, Flight):
                move.owner.landed = True
        if not self._settling:
            self._settle_some()

    def _settle_some(self) -> None:
        self._settling = bool(self._ended)
        if not self._settling:
            return
        self._loop.call_soon(self._settle_some)
        for _ in range(min(_SETTLE_AT_ONCE, len(self._ended))):
            self._settle(self._ended.popleft())
        if self.scheduler.queued:
            self.pump_soon()
        self.wake_closer()

    def _settle(self, move: Move) -> None:
        flight: Any = move.owner
        move.owner = None  # who may hold the move: a cycle would wait for the collector
        if not isinstance(flight, Flight):
            flight.ended(move)
            return
        flight.landed = False
        relay = self.relay
        hit = move.status == "hit" and not move.abandoned
        promotes = hit and flight.level and flight.lasting
        if not (promotes and relay and relay.promote(flight.ticket, move)):
            self.scheduler.finish(flight.ticket)
        self.running.discard(flight)
        if flight.write:
            self._outdate(flight.key)
        if not (flight.write or hit or move.abandoned):
            if self._ask_next(flight, move.error):
                return
            move.error = flight.verdict(move.error)
        if relay and move.status == "stored":
            relay.stored(move)
        if relay and flight.write and move.status and not move.abandoned:
            self._free_overdue(flight)
            flight.mirroring = relay.keeps(flight)
        if not flight.mirroring:
            self._conclude(flight, move)

    def _conclude(self, flight: Flight, move: Move) -> None:
        self._close_boarding(flight)
        if move.abandoned:
            self.quarantined -= len(move.lease)
            self._free_overdue(flight)
            self._rebook(flight)
        elif move.status == "hit" and flight.waiters.keys() != {flight.leader}:
            self._copy(flight, move)
        else:
            self._tell(flight, move)

    def _ask_next(self, flight: Flight, error: Exception | None) -> bool:
        """Ask the next tier for a block that this one lacks, or has damaged. False: there is none.

        What was wrong here is told if the next one lacks it as well, or beside what is wrong there.
        """
        if isinstance(error, ConfigError):
            return False
        level = self._level(flight.key, flight.level)
        if level is None or not flight.waiters:
            return False
        self._free_overdue(flight)
        if flight.leader not in flight.waiters:
            self._close_boarding(flight)
            self._rebook(flight)
            return True
        flight.level, flight.move, flight.doubt = level, None, error
        self._book(flight, self._loop.time())
        return True

    def mirrored(self, flight: Flight, error: Exception | None) -> None:
        """What a store waited for has ended."""
        assert flight.move is not None  # noqa: S101 - it was stored
        flight.mirroring = False
        if error is not None:
            flight.move.error = error
        self._conclude(flight, flight.move)
        self.wake_closer()

    def wake_closer(self) -> None:
        """Something has ended: whoever waits for the end of everything may look again."""
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    @staticmethod
    def _free_overdue(flight: Flight) -> None:
        """Give a leader that passed its deadline its memory back."""
        leader = flight.leader
        if leader.overdue is not None:
            leader.view.release(write=not flight.write)
            leader.overdue.set()
            leader.overdue = None

    def _tell(self, flight: Flight, move: Move) -> None:
        """Tell all who wait. One block was written: of those who share a store, once."""
        self._free_overdue(flight)
        outcome = (
            Outcome(flight.key, move.status)
            if move.error is None
            else Outcome(flight.key, "error", untraced(move.error))
        )
        for waiter in flight.waiters:
            self._end(waiter, outcome, _path_of(outcome, move))
            if outcome.status == "stored":
                outcome = Outcome(flight.key, "present")
        flight.waiters.clear()

    def _end(self, waiter: Waiter, outcome: Outcome, path: str) -> None:
        flight = waiter.flight
        assert flight is not None  # noqa: S101 - only called for waiters without an outcome
        waiter.flight = None
        if waiter.overdue is None:
            waiter.view.release(write=not flight.write)
        tier = self.tiers[flight.level].name
        self._count(waiter.batch, outcome, waiter.view.nbytes, path, tier)
        waiter.batch.settle(waiter.index, outcome)

    def _rebook(self, flight: Flight) -> None:
        """Its first waiter gave up before it moved, others still want the block.

        They begin anew, from the first tier: who comes later may join them.
        """
        waiters, flight.waiters = flight.waiters, {}
        level = 0 if flight.write else self._level(flight.key)
        for waiter in waiters:
            if level is None:
                self._end(waiter, Outcome(flight.key, "miss"), "none")
                continue
            try:
                self._board(waiter, flight.key, level)
            except KvgdsError as error:
                self._end(waiter, Outcome(flight.key, "error", untraced(error)), "none")

    def _copy(self, flight: Flight, move: Move) -> None:
        """Give the others what the leader got, before it gets its memory back."""
        flight.copying = True
        self.running.add(flight)
        views = [waiter.view for waiter in flight.waiters if waiter is not flight.leader]

        def ended(future: ThreadFuture[None]) -> None:
            self.running.discard(flight)
            if error := future.exception():
                move.error = TransferError(str(error), **move.context)
            self._tell(flight, move)
            self.wake_closer()

        self._run(lambda: _copy_all(move.view, views), ended)

    def _count(self, batch: Batch, outcome: Outcome, nbytes: int, path: str, tier: str) -> None:
        status = outcome.status
        self.counts[status] += 1
        direction = "store" if batch.write else "load"
        seconds = time.monotonic() - batch.since
        self._metrics.count((direction, tier, path, status), nbytes, seconds)
        if self.observers:
            self._notify(Event(direction, outcome.key, nbytes, tier, path, status, seconds))

    def _notify(self, event: Event) -> None:
        self._sound = None  # who is told may do anything
        for number, observer in list(self.observers.items()):
            try:
                observer.settled(event)
            except BaseException as error:  # noqa: BLE001 - an observer's fault breaks no transfer
                self.observers.pop(number, None)  # it may have removed itself
                _log.exception("an observer raised and was removed")
                if isinstance(error, KeyboardInterrupt | SystemExit):  # for the program, not for us
                    self._loop.call_soon(_raise, error)

    # --- deadlines and cancellation -----------------------------------------------------

    def _expire(self, batch: Batch) -> None:
        """A batch's deadline has passed: nobody waits longer, whatever becomes of the I/O."""
        batch.expired = True
        if not self._late:
            self._loop.call_soon(self._end_some)
        self._late.append(self._end_late(batch))

    def _end_some(self) -> None:
        if not self._late:
            return
        self._loop.call_soon(self._end_some)
        for _ in range(_LEAVE_AT_ONCE):
            if self._late and next(self._late[0], _DONE) is _DONE:
                self._late.popleft()
        for tier in self.tiers:
            tier.expire()
        self.wake_closer()

    def _end_late(self, batch: Batch) -> Iterator[None]:
        """End a batch's waiters, one a step."""
        again = False
        for waiter in batch.waiters:
            flight = waiter.flight
            if flight is not None:
                # What has ended in time is told, however late the loop comes to it.
                again |= flight.landed or not self._give_up(waiter, flight)
                yield
        if again and batch.left:  # that, and what a reactor is copying just now, takes moments
            self.deadlines.add(batch, self._loop.time() + _COPY_RETRY_S)

    def _give_up(self, waiter: Waiter, flight: Flight) -> bool:
        """End one waiter with TransferTimeout. False: try again in a moment."""
        if self._leave_queue(waiter, flight):
            self._time_out(waiter, flight)
            return True
        if flight.copying:
            return False
        move = flight.move
        assert move is not None  # noqa: S101 - it has left the queue
        if waiter is flight.leader:
            if move.abandon():
                self._quarantine(flight, move)
            elif move.path.holds or waiter.view.region.device is not None:
                waiter.overdue = Overdue(self._loop.create_future())
            else:
                return False
        del flight.waiters[waiter]
        self._time_out(waiter, flight)
        if not flight.waiters and not move.abandoned:
            move.abandoned = True  # nobody is left to be told: publish nothing
            self._quarantine(flight, move)
        return True

    def _quarantine(self, flight: Flight, move: Move) -> None:
        """Nobody waits for this I/O, but it goes on: its lease is not free, nobody may join."""
        self.quarantined += len(move.lease)
        self._close_boarding(flight)

    def _time_out(self, waiter: Waiter, flight: Flight) -> None:
        path = flight.move.path.name if flight.move else ""
        kept_in = self.tiers[0].name if flight.mirroring else ""
        more = ""
        if waiter.overdue is not None:
            more = "; its memory is in use: await .settled"
        elif kept_in:
            more = f"; {kept_in} has the block"
        error = self._late_error(
            flight.key, write=flight.write, path=path, level=flight.level, more=more
        )
        error.settled, error.kept_in = waiter.overdue, kept_in
        self._end(waiter, Outcome(flight.key, "error", error), path or "none")

    def _late_error(
        self, key: BlockKey, *, write: bool, path: str = "", level: int = 0, more: str = ""
    ) -> TransferTimeout:
        return TransferTimeout(
            f"passed its deadline{more}",
            direction="store" if write else "load",
            key=key,
            path=path,
            backend=self.tiers[level].plan.backend,
            errno=errno.ETIMEDOUT,
        )

    def _leave_queue(self, waiter: Waiter, flight: Flight) -> bool:
        """Drop a waiter whose I/O has not started, or has ended here. False: it is under way."""
        if not flight.mirroring and flight.ticket.state != "queued":
            return False
        del flight.waiters[waiter]
        if waiter is flight.leader and not flight.mirroring:
            self._follow(flight)
        return True

    def _follow(self, flight: Flight) -> None:
        """The one whose memory was to move has left the queue: it is the next one's turn."""
        ticket, plan = flight.ticket, self.tiers[flight.level].plan
        while flight.waiters:
            flight.leader = waiter = next(iter(flight.waiters))
            path = self.ways.path_for(waiter.view, plan)
            if path.whole == flight.path.whole and ticket.state == "queued":
                flight.path = path
                return
            self.scheduler.cancel(ticket)
            try:
                self._book(flight, ticket.since)
            except KvgdsError as error:
                del flight.waiters[waiter]
                self._end(waiter, Outcome(flight.key, "error", untraced(error)), "none")
            else:
                self.pump_soon()
                return
        self.scheduler.cancel(ticket)
        self._close_boarding(flight)
        if self.scheduler.queued:
            self.pump_soon()

    async def _call_off(self, batch: Batch, cancelled: asyncio.CancelledError | None) -> None:
        """Drop what is queued and wait for the rest, however often the wait is cancelled."""
        again: asyncio.CancelledError | None = None
        batch.admit_no_more()
        for number, waiter in enumerate(batch.waiters, 1):
            flight = waiter.flight
            if flight is not None and self._leave_queue(waiter, flight):
                outcome = Outcome(flight.key, "cancelled", asyncio.CancelledError())
                self._end(waiter, outcome, "none")
            if not number % _LEAVE_AT_ONCE:
                again = await _cancelled(asyncio.sleep(0)) or again
        while batch.left:
            again = await _cancelled(batch.news()) or again  # the memory is still not the caller's
        late = [
            outcome.error
            for outcome in batch.outcomes
            if isinstance(outcome.error, TransferTimeout) and outcome.error.settled is not None
        ]
        try:
            if late:
                raise _joined(late) from again or cancelled
            if again:  # who only left a loop has not been told yet that it is cancelled
                raise again
        finally:
            del again  # it knows this frame

    async def each(
        self,
        items: Iterable[tuple[BlockKey, Memory]],
        priority: Priority,
        timeout_s: float | None,
        *,
        write: bool,
        stream: object,
    ) -> AsyncGenerator[Outcome, None]:
        """Carry out a call and give its outcomes as they come."""
        items = pairs(items)
        batch = self.open_batch(
            len(items), priority, timeout_s, write=write, each=True, stream=stream
        )
        arrivals: Any = batch.arrivals
        self.take_in(batch, items)
        try:
            while batch.left or arrivals:
                if not arrivals:
                    await batch.news()
                yield arrivals.popleft()
        except asyncio.CancelledError as cancelled:
            await self._call_off(batch, cancelled)
            raise
        except GeneratorExit:
            pass  # and not here: while it is handled it hides what the caller handles
        except BaseException:  # thrown into it
            await self._call_off(batch, None)
            raise
        else:
            return
        await self._call_off(batch, _left_for())


def _raise(error: BaseException) -> None:
    raise error


def _lane(level: int, *, write: bool) -> str:
    return f"{'store' if write else 'load'} {level}"


def _lanes(config: EngineConfig) -> dict[str, Lane]:
    """What may be under way.

    In a stack each tier has half of the bounce region. Stores that wait for room in the first can
    then keep no upload, which makes that room, from its lease; and a server that hangs leaves the
    first tier all that it needs. Nor may a direction fill a half with blocks that it can share.
    But of loads from the second two may: one of them may hang with the first, as a promotion.
    Elsewhere a few are under way even if they are large: two that storage has, and two staged.
    """
    lanes: dict[str, Lane] = {}
    for level, tier in enumerate(config.tiers):
        ops, most = config.inflight_ops, config.inflight_bytes
        if isinstance(tier, ObjectTier):
            ops = min(ops, 2 * tier.connections)
        for write in (False, True):
            least = min(_FEW, ops)
            if len(config.tiers) > 1 and (level or write):
                most, least = min(most, config.bounce_bytes // 4), 1 if write else min(2, ops)
            lanes[_lane(level, write=write)] = Lane(ops, most, part=level, least=least)
    return lanes


def _path_of(outcome: Outcome, move: Move) -> str:
    """How the block's bytes moved; "none" where none had to."""
    still = outcome.status in ("miss", "present") or isinstance(
        outcome.error, ConfigError | CapacityError
    )
    return "none" if still else move.path.name


async def _cancelled(wait: Awaitable[None]) -> asyncio.CancelledError | None:
    """The cancel that ended a wait, if one did: its message says whose it is."""
    try:
        await wait
    except asyncio.CancelledError as cancelled:
        return cancelled
    return None


def _left_for() -> asyncio.CancelledError | None:
    """The cancel that ended the caller's loop, if one did: an iterator only learns that it is left.

    Nor does Python chain that cancel to what leaving raises: told of nowhere, it would be lost.
    Its message says whose it is.
    """
    handled = sys.exception()
    return handled if isinstance(handled, asyncio.CancelledError) else None


def _joined(late: list[TransferTimeout]) -> TransferTimeout:
    """The one error of a cancelled call: all of its memory is free when this has settled.

    Not one of those, which the call keeps: raised, it would know the call, a cycle.
    """
    first, many = late[0], len(late) > 1
    text = f"{len(late)} blocks passed their deadline; their memory is in use: await .settled"
    error = TransferTimeout(
        text if many else first.reason,
        direction=first.direction,
        key=b"" if many else first.key,
        path=first.path,
        backend=first.backend,
        errno=first.errno,
    )
    waits: list[Any] = [each.settled for each in late]
    error.settled = Overdue(*(block for wait in waits for block in wait.blocks))
    return error


def _check_priority(priority: object) -> None:
    if not isinstance(priority, Priority):
        rule = "must be Priority.DEMAND, Priority.PREFETCH or Priority.BACKGROUND"
        raise ConfigError("priority", priority, rule)


def _copy_all(source: View, targets: list[View]) -> None:
    """Of host memory: loads into a GPU's share no I/O."""
    for target in targets:
        copy_pieces(source.pieces(), target.pieces())
