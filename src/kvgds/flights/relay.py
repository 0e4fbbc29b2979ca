"""Between the tiers of a stack: blocks taken on to the next tier, and back to the first.

What the first tier has and the next lacks is *owed*. It is carried there by way of the bounce
region, read and checked first, when the settings say: soon, at once because somebody waits for it,
or before it would be evicted. What was loaded from the next tier lies in the bounce region already,
and is stored into the first from there, after its reader has it.

Nothing here is remembered over a restart: the first tier knows what is owed. Belongs to the event
loop's thread.
"""

from __future__ import annotations

import errno
import logging
import random
from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

from kvgds.blocks import PAGE, image_bytes
from kvgds.errors import TransferError
from kvgds.paths import RELAY, Move
from kvgds.schedule import Priority
from kvgds.tiers.maps import KeyQueue

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from kvgds.blocks import BlockKey
    from kvgds.config import ObjectTier
    from kvgds.flights import Flights
    from kvgds.flights.batch import Flight
    from kvgds.schedule import Lane, Ticket
    from kvgds.tiers import Tier

_REFUSALS = 3  # uploads that fail in a row: then the first tier waits for none
_REFUSE_AT_ONCE = 32  # stores that wait for the next tier
_PAUSE_S = 1.0  # after a failure, before anything is carried on
_log = logging.getLogger("kvgds")


@dataclass(frozen=True, slots=True)
class RelayStatistics:
    """What goes on between the tiers of a stack, since the engine was opened.

    Attributes:
        owed: blocks that the first tier has and the next may lack.
        uploaded: blocks carried there, or found there.
        failed: attempts at that which ended in an error; all but those that could not read the
            block are repeated.
        promoted: blocks stored into the first tier since they were loaded from the next.
    """

    owed: int
    uploaded: int
    failed: int
    promoted: int


Done: TypeAlias = "Callable[[bool, Exception | None], None]"


class Relay:
    """Carries blocks between the two tiers of a stack; the first one's ``tiers.Backlog``.

    Args:
        flights: whom it works for.
        lane: of the scheduler, for what goes to the next tier.
        loads: the limits of the lane whose leases promotions go on with.
        bounce_bytes: the next tier's part of the bounce region; half may be lent to a promotion.
    """

    def __init__(
        self,
        flights: Flights,
        settings: ObjectTier,
        namespace: bytes,
        loop: asyncio.AbstractEventLoop,
        *,
        lane: str,
        loads: Lane,
        bounce_bytes: int,
    ) -> None:
        self.near: Tier
        self.far: Tier
        self.flights = flights
        self.namespace = namespace
        self.lane = lane
        self._loop = loop
        self._mode = settings.write
        self._most = settings.connections
        self._most_bytes = bounce_bytes
        # Of several promotions: they may hang with the first tier, and loads must go on.
        self._most_promoting = (loads.ops // 2, loads.bytes // 2)
        self._owed: KeyQueue[BlockKey, int] = KeyQueue()  # and their bytes
        self._urgent: OrderedDict[BlockKey, None] = OrderedDict()
        self._early: set[BlockKey] = set()  # asked for before they were heard of
        self._hopeless: set[BlockKey] = set()  # too large for the bounce region
        self._carrying: dict[BlockKey, _Upload] = {}
        self._promoting: dict[BlockKey, int] = {}
        self._deleting: dict[BlockKey, list[Done]] = {}  # and who is to be told
        self._waiting: dict[BlockKey, list[Flight]] = {}
        self._pause: asyncio.TimerHandle | None = None
        self._opened = self._closing = False
        self._refusals = 0  # uploads that failed since one went well
        self._uploaded = self._failed = self._promoted = 0

    def recover(self) -> None:
        """Both tiers are open: take up what is owed, as far as the bounce region can hold it.

        Runs in the executor, because it may be much.
        """
        for key, nbytes in self.near.owed():
            if image_bytes(nbytes) <= self._most_bytes:
                self._owed.append(key, nbytes)
            else:
                self._hopeless.add(key)

    def open(self) -> None:
        """Begin."""
        self._opened = True
        self._go_on()

    def close(self) -> None:
        """Begin nothing but what somebody waits for; the first tier remembers what is owed."""
        self._closing = True
        self._go_on()

    def stop(self) -> None:
        """Nothing is under way: let go of the loop's timer."""
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None

    @property
    def busy(self) -> bool:
        """Whether something is under way."""
        return bool(self._carrying or self._promoting or self._waiting or self._deleting)

    def statistics(self) -> RelayStatistics:
        """What is owed and was done."""
        owed = len(self._owed) + len(self._carrying)
        return RelayStatistics(owed, self._uploaded, self._failed, self._promoted)

    # --- the first tier's backlog -----------------------------------------------------

    @property
    def out(self) -> bool:
        """See ``tiers.Backlog``: it answers nothing, or takes nothing."""
        return bool(self.far.out) or self._refusals >= _REFUSALS

    def hasten(self, keys: Sequence[BlockKey]) -> None:
        """See ``tiers.Backlog``."""
        hopeless = [key for key in keys if key in self._hopeless]
        if hopeless:
            self._loop.call_soon(self.near.look_again, hopeless)
        for key in keys:
            if key in self._owed:
                self._urgent[key] = None
            elif key not in self._carrying:  # the tier has it, but its store has not been settled
                self._early.add(key)
        self._loop.call_soon(self._go_on)  # not now: the tier is in the middle of something

    # --- what the stack tells ---------------------------------------------------------

    def stored(self, move: Move) -> None:
        """The first tier has a new block."""
        key = move.key
        if len(self._owed) > self.near.statistics().blocks:
            self._forget_evicted()
        self._owed.append(key, move.nbytes)
        if key in self._early:
            self._early.discard(key)
            self._urgent[key] = None
        self._go_on()

    def _owe(self, key: BlockKey, nbytes: int) -> None:
        """What the next tier still lacks; what was stored meanwhile counts instead."""
        if key not in self._owed:
            self._owed.append(key, nbytes)

    def _forget_evicted(self) -> None:
        """A few at a time, because there may be very many: two for each that comes will do."""
        for _ in range(min(2, len(self._owed))):
            key = next(iter(self._owed))
            nbytes = self._owed.pop(key)
            if self.near.contains(key):
                self._owed.append(key, nbytes)
            else:
                self._give_up(key, None)

    def keeps(self, flight: Flight) -> bool:
        """Whether a store has to wait until the next tier has the block, too."""
        key = flight.key
        if self._mode != "through":
            return False
        if key in self._owed or key in self._carrying:
            self._waiting.setdefault(key, []).append(flight)
            self._expect(key)
        elif self.near.is_mirrored(key) or self.far.contains(key):
            return False
        else:  # others may have stored it there, and not have taken it on; or it was given up
            self._waiting.setdefault(key, []).append(flight)
            self.far.prefix([key], lambda there: self._looked(flight, there), lambda: True)
        return True

    def _expect(self, key: BlockKey) -> None:
        self._urgent[key] = None
        if self.far.out:
            self._loop.call_soon(self._refuse, key, self._out_error(key))
        self._go_on()

    def _looked(self, flight: Flight, there: int) -> None:
        key = flight.key
        waiting = self._waiting.get(key, [])
        if flight not in waiting:
            return
        if not there:
            self._owe(key, flight.leader.view.nbytes)
            self._expect(key)
            return
        waiting.remove(flight)
        if not waiting:
            del self._waiting[key]
        self.flights.mirrored(flight, None)

    def prefix(
        self, keys: Sequence[BlockKey], done: Callable[[int], None], wanted: Callable[[], bool]
    ) -> None:
        """See ``Tier.prefix``, of both tiers together."""
        near, far = self.near, self.far

        def beyond(count: int) -> None:
            lacking = [n for n in range(count, len(keys)) if not near.contains(keys[n])]
            if not lacking or far.out or not wanted():
                done(count if lacking else len(keys))
                return
            asked = [keys[n] for n in lacking]
            far.prefix(asked, lambda more: done([*lacking, len(keys)][more]), wanted)

        near.prefix(keys, beyond, wanted)

    def delete(self, key: BlockKey, done: Done) -> None:
        """Drop a block from both tiers, in this order with what is under way for it.

        What is being carried comes there first; nothing of the key is carried meanwhile.
        """
        asking = self._deleting.setdefault(key, [])
        asking.append(done)
        if len(asking) == 1:
            self._delete(key)

    def _delete(self, key: BlockKey) -> None:
        if key in self._carrying or key in self._promoting:
            return  # comes here again when that has ended
        near, far = self.near, self.far
        if far.out:  # from there it would come back
            error = OSError(errno.EHOSTDOWN, self._out_text())
            self._loop.call_soon(self._deleted, key, False, error)  # noqa: FBT003 - as above
            return
        owed = self._owed.pop(key) if key in self._owed else None
        self._refuse(key, TransferError("it was deleted meanwhile", direction="store", key=key))

        def gone(there: bool, error: Exception | None) -> None:  # noqa: FBT001 - the tier's contract
            if error is None:
                far.delete(key, lambda also, error: self._deleted(key, there or also, error))
                return
            if owed is not None:
                self._owe(key, owed)
            self._deleted(key, there, error)

        near.delete(key, gone)

    def _deleted(self, key: BlockKey, there: bool, error: Exception | None) -> None:  # noqa: FBT001 - as above
        self._deleting[key].pop(0)(there, error)
        if self._deleting[key]:  # one by one: a store may have come between two
            self._delete(key)
        else:
            del self._deleting[key]
        self._go_on()
        self.flights.wake_closer()

    def changed(self) -> None:
        """The next tier has gone out, or come back.

        While it is out nobody waits for it. Told are a few a turn: there may be thousands.
        """
        if not self._opened:
            return
        if self.far.out:
            for key in list(islice(self._waiting, _REFUSE_AT_ONCE)):
                self._refuse(key, self._out_error(key))
            if self._waiting:
                self._loop.call_soon(self.changed)
                return
        self.near.look_again()
        self._go_on()

    def _out_text(self) -> str:
        return f"{self.far.name} is left alone until it answers again: {self.far.out}"

    def _out_error(self, key: BlockKey) -> TransferError:
        return self._kept(key, self._out_text(), errno.EHOSTDOWN)

    def _kept(self, key: BlockKey, why: str, number: int | None) -> TransferError:
        text = f"{why}; {self.near.name} has the block"
        error = TransferError(text, direction="store", key=key, errno=number)
        error.kept_in = self.near.name
        return error

    def _refuse(self, key: BlockKey, error: Exception) -> None:
        self._urgent.pop(key, None)
        for flight in self._waiting.pop(key, ()):
            self.flights.mirrored(flight, error)

    # --- carrying ---------------------------------------------------------------------

    def _go_on(self) -> None:
        """Start to carry what should be, as far as that goes."""
        while len(self._carrying) < self._most and not self.far.out and self._pause is None:
            key = self._next()
            if key is None:
                return
            self._carry(key, self._owed.pop(key))

    def _next(self) -> BlockKey | None:
        later: list[BlockKey] = []  # once the delete, or the upload of another size, has ended
        while self._urgent:
            key = self._urgent.popitem(last=False)[0]
            if self._may_go(key):
                self._urgent.update(dict.fromkeys(later))
                return key
            if key in self._owed:
                later.append(key)
        self._urgent.update(dict.fromkeys(later))
        if self._closing or (self._mode == "demote" and not self._in_doubt):
            return None
        return next(filter(self._may_go, self._owed), None)

    @property
    def _in_doubt(self) -> bool:
        """Whether to find out, with one block, if the next tier takes them again.

        What the first tier does not wait for, it does not ask for either.
        """
        return bool(self._refusals and not self._carrying)

    def _may_go(self, key: BlockKey) -> bool:
        return key in self._owed and not (key in self._carrying or key in self._deleting)

    def _carry(self, key: BlockKey, nbytes: int) -> None:
        upload = _Upload(self, key, nbytes)
        self._carrying[key] = upload
        awaited = key in self._waiting
        upload.ticket = self.flights.scheduler.submit(
            upload,
            lane=self.lane,
            nbytes=nbytes,
            bounce_bytes=image_bytes(nbytes),
            priority=Priority.DEMAND if awaited else Priority.BACKGROUND,
            now=self._loop.time(),
        )
        self.flights.pump_soon()

    def carried(self, upload: _Upload, error: Exception | None, *, read: bool) -> None:
        """A block has come to the next tier, or not, or could not even be read."""
        key = upload.key
        self.flights.scheduler.finish(upload.ticket)
        del self._carrying[key]
        if not read:
            self._give_up(key, error)
        elif error is not None:
            self._not_carried(upload, error)
        else:
            self._uploaded += 1
            if self._refusals >= _REFUSALS:  # it takes blocks again
                self._loop.call_soon(self.near.look_again)
            self._refusals = 0
            self._arrived(upload)
        if key in self._deleting:
            self._delete(key)
        self._go_on()
        self.flights.wake_closer()

    def _give_up(self, key: BlockKey, error: Exception | None) -> None:
        """The first tier has it no more, or can't read it: then it is not to be spared."""
        if key in self._owed:  # it has another by now
            return
        self._failed += error is not None
        if isinstance(error, TransferError):
            self.near.look_again([key])
        text = f"{self.near.name} can't give it any more: {error or 'it was evicted, or deleted'}"
        self._refuse(key, TransferError(text, direction="store", key=key))

    def _arrived(self, upload: _Upload) -> None:
        """Tell the stores of this block; those of another size, stored meanwhile, wait on."""
        waiting = self._waiting.pop(upload.key, [])
        others = [each for each in waiting if each.leader.view.nbytes != upload.nbytes]
        if others and upload.key in self._owed:
            self._waiting[upload.key] = others
            self._urgent[upload.key] = None
        else:
            others = []
        for flight in waiting:
            if flight not in others:
                self.flights.mirrored(flight, None)

    def is_last(self, key: BlockKey) -> bool:
        """Whether the first tier has had no newer block of this key since it was read."""
        return key not in self._owed

    def _not_carried(self, upload: _Upload, error: Exception) -> None:
        self._failed += 1
        self._refusals += 1
        if self._refusals == _REFUSALS:
            self._loop.call_soon(self.near.look_again)
        number = error.errno if isinstance(error, TransferError) else None
        why = str(getattr(error, "reason", error))
        self._refuse(upload.key, self._kept(upload.key, why, number))
        self._owe(upload.key, upload.nbytes)
        if self._pause is None:
            pause = _PAUSE_S * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
            self._pause = self._loop.call_later(pause, self._paused)

    def _paused(self) -> None:
        self._pause = None
        self.near.look_again()
        self._go_on()

    # --- promoting --------------------------------------------------------------------

    def promote(self, ticket: Ticket[Any], loaded: Move) -> bool:
        """Store what was loaded into the first tier, too. Whether that now owns the lease."""
        key, nbytes = loaded.key, ticket.bounce_bytes
        known = key in self._promoting or key in self._deleting or self.near.contains(key)
        if self._closing or known or not self._may_promote(nbytes):
            return False
        self._promoting[key] = nbytes
        _Promotion(self, key, loaded.nbytes).start(ticket)
        return True

    def _may_promote(self, nbytes: int) -> bool:
        if not self._promoting:
            return nbytes <= self._most_bytes // 2
        ops, most = self._most_promoting
        return len(self._promoting) < ops and sum(self._promoting.values()) + nbytes <= most

    def promoted(self, key: BlockKey, ticket: Ticket[Any], *, well: bool) -> None:
        """A promotion has ended."""
        self.flights.scheduler.finish(ticket)
        del self._promoting[key]
        self._promoted += well
        if key in self._deleting:
            self._delete(key)
        self.flights.pump_soon()
        self.flights.wake_closer()


class _Carried:
    """A block in the bounce region. Told when it has its lease, and when one of its moves ended."""

    def __init__(self, relay: Relay, key: BlockKey, nbytes: int) -> None:
        self.relay = relay
        self.key = key
        self.nbytes = nbytes
        self.ticket: Ticket[Any]

    def _move(self, tier: Tier, *, write: bool) -> Move:
        ways, ticket = self.relay.flights.ways, self.ticket
        offset = (ticket.offset or 0) + PAGE
        return Move(
            namespace=self.relay.namespace,
            key=self.key,
            view=ways.region[offset : offset + self.nbytes],
            write=write,
            path=RELAY,
            full=tier.checked,
            ways=ways,
            ticket=ticket,
            owner=self,
            backend=tier.plan.backend,
        )


class _Upload(_Carried):
    """A block on its way to the next tier."""

    def start(self, ticket: Ticket[Any]) -> None:
        self.ticket = ticket
        self._read = self._move(self.relay.near, write=False)
        self._read.mirrored = True
        self.relay.near.load([self._read])

    def ended(self, move: Move) -> None:
        if move.status == "hit":
            self.relay.far.store([self._move(self.relay.far, write=True)])
            return
        if move.write and move.error is None and self.relay.is_last(self.key):
            self.relay.near.mirrored([self._read])
        self.relay.carried(self, move.error, read=move.write)


class _Promotion(_Carried):
    """A block that was loaded from the next tier, on its way into the first."""

    def start(self, ticket: Ticket[Any]) -> None:
        self.ticket = ticket
        move = self._move(self.relay.near, write=True)
        move.mirrored = True
        self.relay.near.store([move])

    def ended(self, move: Move) -> None:
        self.relay.promoted(self.key, self.ticket, well=move.status == "stored")
