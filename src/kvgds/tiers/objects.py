"""An object a block, in a bucket that speaks S3 and that many machines share.

An object is a block's image as in a file, so any engine of the namespace can use it. Blocks are
always checked, whole, when they arrive: they have come a long way. What is there is known only by
asking; of what was seen there so much is remembered that most stores and look-ups need not ask.

A server that fails is left alone for a while: operations then end at once, with an error that
says so, and now and then one trial finds out whether it is back.

Belongs to the event loop's thread, but for what a method's docstring says.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import secrets
import time
from collections import Counter, deque
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from kvgds.blocks import PAGE, XXH3_128, Stamp, image_bytes, place_of
from kvgds.errors import (
    BlockCorrupt,
    ConfigError,
    PathUnavailable,
    TransferError,
    TransferTimeout,
)
from kvgds.memory import Arena, region_of
from kvgds.paths import PathPlan, checksum_of
from kvgds.tiers import Services, Tier, TierStatistics
from kvgds.tiers.breaker import Breaker
from kvgds.tiers.maps import KeyQueue
from kvgds.transport import File, NotMoved
from kvgds.transport.bucket import fix_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvgds.blocks import BlockKey, Namespace
    from kvgds.config import ObjectTier
    from kvgds.memory import Region
    from kvgds.paths import Move
    from kvgds.transport.contract import Rows
    from kvgds.transport.objects import ObjectTransport

_ANSWERS = (errno.ENOENT, errno.ERANGE)  # there is no such object, or it is empty
_REMEMBERED = 1 << 16  # blocks that were seen there
_BELIEVED_S = 600.0  # then somebody else may have deleted it
_LATELY_S = 10.0
_WRONG = (errno.EACCES, errno.ENODEV)  # settings, not weather
_log = logging.getLogger("kvgds")


class _Seen(NamedTuple):
    """An object that was seen there: bytes of the image, and when."""

    nbytes: int
    at: float


class _Turn(NamedTuple):
    """What changes an object, when it may."""

    begin: Callable[[], None]
    move: Move | None = None  # whose store it is


class Objects(Tier):
    """The tier of an :class:`~kvgds.config.ObjectTier`; see ``tiers.Tier``.

    Args:
        transport: carries objects, and knows the bucket.
        changed: is called when the tier goes out, or comes back; None: no tier stands in front,
            and it must answer when it opens.
    """

    authoritative = False
    checked = True

    def __init__(
        self,
        settings: ObjectTier,
        namespace: Namespace,
        services: Services,
        transport: ObjectTransport,
        changed: Callable[[], None] | None,
    ) -> None:
        self.name = f"objects:{settings.bucket}/{settings.prefix}"
        self._settings = settings
        self._namespace = namespace
        self._space = namespace.digest.hex()
        self._services = services
        self._transport = transport
        self._changed = changed
        self._breaker = Breaker()
        self._seen: KeyQueue[str, _Seen] = KeyQueue()
        self._seen_bytes = 0
        self._asking: Counter[str] = Counter()  # names about which an answer is on its way
        self._doubtful: set[str] = set()  # of those: changed here meanwhile
        self._turns: dict[str, deque[_Turn]] = {}  # names that something changes, and what waits
        self._missed: KeyQueue[str, float] = KeyQueue()  # when
        self._under_way = 0
        self._quarantined = 0
        self._described = False
        self._since: dict[Move, float] = {}  # when transfers under way were asked for
        self._answered_at = 0.0  # a trial, the last time
        self._closed = False

    # --- opening and closing ----------------------------------------------------------

    def open(self, progress: Callable[[str, int, int], None]) -> None:  # noqa: ARG002 - nothing takes long
        """Find out whether the bucket can be used; see ``Tier.open``.

        Raises:
            ConfigError: there is no such bucket, or it may not be used.
            PathUnavailable: it does not answer, or not as it should.
        """
        transport = self._transport
        transport.watch(partial(self._services.post, self._hangs))
        try:
            transport.bucket.check()
            evidence = self._round_trip()
        except NotMoved as error:
            if error.errno in _WRONG:
                rule = f"can't be used; {fix_of(error)}: {error}"
                raise ConfigError("bucket", self._settings.bucket, rule) from None
            if self._changed is None:
                text = f"{self.name} does not answer as it should; {fix_of(error)}"
                raise PathUnavailable(text, (str(error), *transport.refused)) from None
            self._services.post(self._go_out, str(error))
            evidence = f"it did not answer when it was opened: {error}"
        self.plan = PathPlan(
            tier=self.name,
            memory="host",
            path="bounce",
            backend=transport.name,
            direct_io=None,
            alignment=1,
            evidence=(evidence,),
            refused=transport.refused,
        )

    def _round_trip(self) -> str:
        """Send an object there and back, as blocks will go; what that showed."""
        bucket, arena = self._transport.bucket, Arena(2 * PAGE)
        region, data = region_of(arena.bytes), secrets.token_bytes(PAGE)
        name = f"trial/{secrets.token_hex(8)}"
        try:
            arena.bytes[:PAGE] = data
            try:
                self._carry(_Trial(region, name, write=True))
            except NotMoved:
                bucket.write(name, data)  # NIXL gives no reasons; this does, if it fails as well
                raise
            self._carry(_Trial(region, name, write=False))
        finally:
            self._transport.detach(region).result()
        if arena.bytes[PAGE:] != data:
            raise NotMoved(errno.EIO, "an object came back with other bytes")
        told = ["an object went there and back"]
        for what, act in (
            ("namespace.json could not be written", self._describe),
            ("it could not be deleted", partial(bucket.delete, name)),
        ):
            try:
                act()
            except NotMoved as error:
                told.append(f"{what}: {error}")
        return "; ".join(told)

    def _describe(self) -> None:
        """Say in the bucket what the namespace is, for `kvgds ls` and the like."""
        bucket, name = self._transport.bucket, f"{self._space}/namespace.json"
        if bucket.size(name) is None:
            bucket.write(name, self._namespace.text.encode())
        self._described = True

    def _carry(self, trial: _Trial) -> None:
        ended: Future[None] = Future()
        self._services.transport.submit([trial], lambda _: ended.set_result(None))
        ended.result()
        if trial.error is not None:
            raise trial.error

    def close(self) -> None:
        """See ``Tier.close``."""
        self._closed = True

    # --- asking -----------------------------------------------------------------------

    @property
    def out(self) -> str:
        """See ``Tier.out``."""
        return self._breaker.reason

    def contains(self, key: BlockKey) -> bool:
        """See ``Tier.contains``."""
        return self._seen_there(self._place(key)) is not None

    def prefix(
        self, keys: Sequence[BlockKey], done: Callable[[int], None], wanted: Callable[[], bool]
    ) -> None:
        """See ``Tier.prefix``: one look-up at first, then ever more at once."""
        self._look(keys, 0, 1, done, wanted)

    def _look(
        self,
        keys: Sequence[BlockKey],
        start: int,
        width: int,
        done: Callable[[int], None],
        wanted: Callable[[], bool],
    ) -> None:
        while start < len(keys) and self.contains(keys[start]):
            start += 1
        if start == len(keys) or self.out:
            done(start)
            return
        places = [self._place(key) for key in keys[start : start + width]]
        sizes: list[int | None] = [None] * len(places)
        left = len(places)

        def looked(n: int, ended: Future[int | None]) -> None:
            nonlocal left
            sizes[n] = None if ended.exception() else ended.result()
            left -= 1
            if left:
                return
            self._under_way -= 1
            for place, size in zip(places, sizes, strict=True):
                sure = self._answered(place)
                if size is not None and sure:
                    self._note(place, size)
                elif size is None and not self.out:
                    self._miss(place)
            there = next((n for n, size in enumerate(sizes) if size is None), len(sizes))
            if there < len(sizes) or not wanted():
                done(start + there)
            else:
                wider = min(4 * width, self._settings.connections)
                self._look(keys, start + there, wider, done, wanted)

        self._under_way += 1
        self._asking.update(places)
        for n, place in enumerate(places):
            self._ask(partial(self._transport.bucket.size, place), partial(looked, n))

    def _ask(self, call: Callable[[], Any], done: Callable[[Future[Any]], None]) -> None:
        """Ask the bucket something on a thread, then go on here.

        What has to wait for a thread until the bucket is left alone is not asked any more. Whether
        it answered is noted, whatever becomes of the answer.
        """
        since = time.monotonic()

        def ask() -> Any:  # noqa: ANN401 - what was asked for
            if self._breaker.reason:
                raise NotMoved(errno.EHOSTDOWN, f"it is left alone: {self._breaker.reason}")
            return call()

        def answered(ended: Future[Any]) -> None:
            self._heard(ended.exception(), since)
            done(ended)

        self._run(ask, answered)

    def _run(self, call: Callable[[], Any], done: Callable[[Future[Any]], None]) -> None:
        self._transport.run(call).add_done_callback(lambda ended: self._services.post(done, ended))

    def statistics(self) -> TierStatistics:
        """See ``Tier.statistics``: of blocks, those that were seen there; a bucket has no limit."""
        return TierStatistics(
            name=self.name,
            blocks=len(self._seen),
            bytes_used=self._seen_bytes,
            capacity_bytes=0,
            evictions=0,
            quarantined=self._quarantined,
            out=self.out,
        )

    def idle(self) -> bool:
        """See ``Tier.idle``."""
        return not self._under_way

    def _place(self, key: BlockKey) -> str:
        return place_of(self._space, key)

    def _outdate(self, place: str) -> None:
        """An object may have been changed here: what was seen of it, or is just now, is past."""
        self._forget(place)
        if place in self._asking:
            self._doubtful.add(place)

    def _answered(self, place: str) -> bool:
        """An answer about an object has come. Whether it still holds: nobody changed it here."""
        sure = place not in self._doubtful
        self._asking[place] -= 1
        if not self._asking[place]:
            del self._asking[place]
            self._doubtful.discard(place)
        return sure

    def _miss(self, place: str) -> None:
        """It was not there just now, so a store that follows soon need not look again."""
        self._forget(place)
        self._missed.append(place, _now())
        self._missed.keep(_REMEMBERED)

    def _missed_lately(self, place: str) -> bool:
        return place in self._missed and _now() - self._missed.pop(place) < _LATELY_S

    def _note(self, place: str, nbytes: int) -> None:
        self._forget(place)
        self._seen.append(place, _Seen(nbytes, _now()))
        self._seen_bytes += nbytes - sum(seen.nbytes for seen in self._seen.keep(_REMEMBERED))

    def _forget(self, place: str) -> None:
        if place in self._seen:
            self._seen_bytes -= self._seen.pop(place).nbytes

    def _seen_there(self, place: str) -> int | None:
        """Bytes of an object that was seen there lately; None: it was not, or others had time."""
        found = self._seen.get(place)
        return found.nbytes if found is not None and _now() - found.at < _BELIEVED_S else None

    # --- one after the other ----------------------------------------------------------

    def _in_turn(self, place: str, turn: _Turn) -> None:
        """Begin what may change an object once all that changes it has ended.

        What one finds out of it then still holds when it acts.
        """
        if place in self._turns:
            self._turns[place].append(turn)
        else:
            self._turns[place] = deque()
            turn.begin()

    def _next_turn(self, place: str) -> None:
        waiting = self._turns[place]
        if waiting:
            waiting.popleft().begin()
        else:
            del self._turns[place]

    # --- liveness ---------------------------------------------------------------------

    def _count(self, move: Move) -> None:
        """What an ended transfer says of the server; it has answered, if only too late."""
        error, since = move.error, self._since.pop(move)
        if error is None or isinstance(error, TransferTimeout | BlockCorrupt):
            self._heard(None, since)
        elif isinstance(error.__cause__, NotMoved):  # else it failed here: a GPU's copies do
            self._heard(error, since)

    def _heard(self, error: BaseException | None, since: float) -> None:
        """Count an answer or a failure, whoever waited. One that got no answer in time is enough.

        Args:
            error: what went wrong, if it was asked at all; None: it has answered.
            since: when it was asked: failures older than the last trial say nothing any more.
        """
        number = getattr(error, "errno", None)
        if error is None or number in _ANSWERS:
            self._breaker.success()
            return
        if number == errno.ECANCELED or since < self._answered_at:
            return
        reason = getattr(error, "reason", str(error))  # whichever block's operation it was
        if number == errno.ETIMEDOUT and not self.out:
            self._go_out(reason)
            return
        pause = self._breaker.failure(reason)
        if pause is not None:
            self._stay_out(pause)

    def _go_out(self, reason: str) -> None:
        self._stay_out(self._breaker.trip(reason))

    def _hangs(self, since: float) -> None:
        if not self.out and since > self._answered_at:
            self._go_out(f"a request got no answer for {self._settings.request_timeout_s:g} s")

    def _stay_out(self, pause: float) -> None:
        _log.warning("%s is left alone: %s", self.name, self._breaker.reason)
        self._try_later(pause)
        self._tell()

    def _try_later(self, pause: float) -> None:
        if not self._closed:
            asyncio.get_running_loop().call_later(pause, self._try)

    def _try(self) -> None:
        if not self._closed:
            self._run(self._check, self._tried)

    def _check(self) -> None:
        self._transport.bucket.check()
        if not self._described:  # the server was not there when this was opened
            with contextlib.suppress(NotMoved):  # blocks can do without
                self._describe()

    def _tried(self, ended: Future[None]) -> None:
        if self._closed:
            return
        error = ended.exception()
        if error is not None:
            self._try_later(self._breaker.trip(str(error)))
            return
        self._breaker.close()
        self._answered_at = time.monotonic()
        _log.warning("%s answers again", self.name)
        self._tell()

    def _tell(self) -> None:
        if self._changed is not None and not self._closed:
            self._changed()

    def _turned_away(self, moves: Sequence[Move]) -> bool:
        """End moves at once while nothing is to be asked."""
        out = self.out
        if out:
            for move in moves:
                text = f"{self.name} is left alone until it answers again: {out}"
                move.error = TransferError(text, errno=errno.EHOSTDOWN, **move.context)
            self._services.settle(moves)
        return bool(out)

    # --- loading ----------------------------------------------------------------------

    def load(self, moves: Sequence[Move]) -> None:
        """See ``Tier.load``."""
        if self._turned_away(moves):
            return
        for move in moves:
            move.place = self._place(move.key)
            self._asking[move.place] += 1
        self._under_way += len(moves)
        self._submit(moves, self._loaded)

    def _submit(self, moves: Sequence[Move], ended: Callable[[list[Move]], None]) -> None:
        self._since.update(dict.fromkeys(moves, time.monotonic()))
        self._services.transport.submit(moves, partial(self._services.post, ended))

    def _loaded(self, moves: list[Move]) -> None:
        ended = []
        for move in moves:
            self._count(move)
            sure = self._answered(move.place)
            if isinstance(move.error, TransferError) and move.error.errno == errno.ERANGE:
                move.error = move.corrupt("it is empty")
            if isinstance(move.error, BlockCorrupt):
                self._in_turn(move.place, _Turn(partial(self._doubt, move)))
                continue
            self._conclude(move, sure=sure)
            ended.append(move)
        self._end(ended)

    def _conclude(self, move: Move, *, sure: bool) -> None:
        """Say what became of a load."""
        error = move.error
        if error is None:
            move.status = "hit"
            if sure:
                self._note(move.place, image_bytes(move.nbytes))
        elif isinstance(error, TransferError) and error.errno == errno.ENOENT:
            move.error, move.status = None, "miss"
            self._miss(move.place)

    def _doubt(self, move: Move) -> None:
        self._ask(partial(self._judge, move), partial(self._judged, move))

    def _judge(self, move: Move) -> Exception | None:
        """On a thread: look whether the object is wrong, or only what has arrived of it.

        What is wrong is put away. None: it was. Only what may be the block is read whole.

        Raises:
            NotMoved: ENOENT: it was deleted meanwhile.
        """
        bucket, place = self._transport.bucket, move.place
        nbytes, stamp = bucket.size(place), Stamp.decode(bucket.read(place, 0, PAGE))
        mine = stamp is not None and (stamp.namespace, stamp.key) == (move.namespace, move.key)
        if stamp is not None and mine and nbytes == image_bytes(stamp.nbytes):
            if stamp.nbytes != move.nbytes:
                had = f"the block stored under this key has {stamp.nbytes} bytes"
                return ConfigError("memory", f"{move.nbytes} bytes", f"{had}; give memory of that")
            if _matches(stamp, bucket.read(place, 0, nbytes)):
                text = "what arrived is not what is stored, which is sound; try again"
                return TransferError(text, errno=errno.EIO, **move.context)
        if bucket.size(place) != nbytes:
            text = "others have changed it meanwhile; try again"
            return TransferError(text, errno=errno.EIO, **move.context)
        bucket.rename(place, f"quarantine/{place.replace('/', '.')}")
        return None

    def _judged(self, move: Move, ended: Future[Exception | None]) -> None:
        error = ended.exception()
        if isinstance(error, NotMoved) and error.errno == errno.ENOENT:
            move.error, move.status = None, "miss"
            self._miss(move.place)
        elif error is not None:  # it stays where it is, and will be found out again
            text = (
                f"what arrived is wrong ({move.error}), and what is stored can't be read: {error}"
            )
            move.error = TransferError(text, errno=errno.EIO, **move.context)
        elif (found := ended.result()) is not None:
            move.error = found
        else:
            self._quarantined += 1
            self._outdate(move.place)
        self._next_turn(move.place)
        self._end([move])

    def _end(self, moves: list[Move]) -> None:
        self._under_way -= len(moves)
        if moves:
            self._services.settle(moves)

    # --- storing, deleting ------------------------------------------------------------

    def store(self, moves: Sequence[Move]) -> None:
        """See ``Tier.store``."""
        if self._turned_away(moves):
            return
        self._under_way += len(moves)
        for move in moves:
            move.place = self._place(move.key)
            self._in_turn(move.place, _Turn(partial(self._store, move), move))

    def _store(self, move: Move) -> None:
        if self._seen_there(move.place) == image_bytes(move.nbytes):
            move.status = "present"
            self._stored([move])
        elif self._missed_lately(move.place):
            self._submit([move], self._written)
        else:
            self._ask(partial(self._transport.bucket.size, move.place), partial(self._asked, move))

    def _stored(self, moves: list[Move]) -> None:
        for move in moves:
            self._next_turn(move.place)
        self._end(moves)

    def _asked(self, move: Move, ended: Future[int | None]) -> None:
        """Store a block unless it is there: others may have been faster."""
        error = ended.exception()
        if move.abandoned:
            move.error = move.timeout()
        elif error is not None:
            move.fail(error)  # type: ignore[arg-type]  # no thread raises BaseException
        elif ended.result() == image_bytes(move.nbytes):
            move.status = "present"
            self._note(move.place, image_bytes(move.nbytes))
        else:
            self._submit([move], self._written)
            return
        self._stored([move])

    def _written(self, moves: list[Move]) -> None:
        for move in moves:
            self._count(move)
            self._outdate(move.place)  # if it failed, too: it may have come all the same
            if move.error is None:
                self._note(move.place, image_bytes(move.nbytes))
                if move.abandoned:  # it stays: others may have been told by now that it is there
                    move.error = move.timeout()
                else:
                    move.status = "stored"
        self._stored(moves)

    def expire(self) -> None:
        """See ``Tier.expire``: of what is under way, the transport takes care."""
        gone = []
        for place, waiting in self._turns.items():
            late = [turn.move for turn in waiting if turn.move and turn.move.abandoned]
            if late:
                self._turns[place] = deque(turn for turn in waiting if turn.move not in late)
                gone += late
        for move in gone:
            move.error = move.timeout()
        self._end(gone)

    def delete(self, key: BlockKey, done: Callable[[bool, Exception | None], None]) -> None:
        """See ``Tier.delete``."""
        if self.out:
            done(False, OSError(errno.EHOSTDOWN, f"{self.name} is left alone: {self.out}"))  # noqa: FBT003 - the callback's contract
            return
        place, bucket = self._place(key), self._transport.bucket

        def remove() -> bool:
            there = bucket.size(place) is not None
            if there:
                bucket.delete(place)
            return there

        def removed(ended: Future[bool]) -> None:
            self._under_way -= 1
            self._outdate(place)
            self._next_turn(place)
            error = ended.exception()
            there = error is None and ended.result()
            done(there, error if isinstance(error, Exception) else None)

        self._under_way += 1
        self._in_turn(place, _Turn(partial(self._ask, remove, removed)))


class _Trial:
    """A page that goes to the bucket, or comes back behind it; a ``transport.Transfer``."""

    file = File(-1)  # none
    urgent = False
    device = 0
    nbytes = PAGE
    abandoned = False

    def __init__(self, region: Region, place: str, *, write: bool) -> None:
        self.regions: Sequence[Region] = [region]
        self.place = place
        self.write = write
        self.device_rows: Rows = []
        self.error: Exception | None = None

    def begin(self) -> Rows:
        return [(self.regions[0].spans[0].address + (0 if self.write else PAGE), 0, PAGE)]

    def end(self) -> None:
        """It has arrived."""

    def fail(self, error: Exception) -> None:
        self.error = error


def _now() -> float:
    return asyncio.get_running_loop().time()


def _matches(stamp: Stamp, image: bytes) -> bool:
    """Whether a payload is the one that was stamped."""
    payload = memoryview(image)[PAGE : PAGE + stamp.nbytes]
    return stamp.algorithm == XXH3_128 and checksum_of([payload]) == stamp.checksum
