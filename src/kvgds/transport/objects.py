"""Moves whole objects between memory and a bucket: the transport of an object tier.

One thread has all transfers and asks one *client* to carry them: NIXL's OBJ plugin, or obstore
where that can't be had. Neither can cancel a request, so memory is in use until it has ended.

The plugin tells nothing of an error but that there was one, and has written the server's answer
into the memory then. So of a failed transfer obstore is asked what is wrong. What may pass is
tried again, after a pause of random length; a transfer that nobody waits for is not.
"""

from __future__ import annotations

import ctypes
import errno
import heapq
import itertools
import os
import random
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from kvgds import environment
from kvgds.blocks import PAGE
from kvgds.errors import ClosedError, PathUnavailable
from kvgds.memory.copies import bytes_at
from kvgds.schedule import coalesce
from kvgds.threads import fill, starting
from kvgds.transport.agent import (
    ALL_MEMORY,
    NixlError,
    new_agent,
    new_backend,
    nixl,
    tell,
    untell,
)
from kvgds.transport.bucket import Bucket
from kvgds.transport.contract import LATER, NotMoved
from kvgds.transport.inbox import Inbox, all_of, copy_pause

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvgds.config import ObjectTier
    from kvgds.memory import Region
    from kvgds.transport.contract import File, Transfer

    Deliver = Callable[[list[Any]], None]

_LARGEST = 1 << 40
_DRAM, _OBJ = 0, 3
_READ, _WRITE = 0, 1
_PAUSE_S = (0.2e-3, 1e-3)  # between two looks at requests that tell nothing, younger and older
_YOUNG_S = 10e-3
_SWEEP_S = 50e-3  # between two looks for transfers that nobody waits for
_RETRY_S = 0.1
_LASTING = (errno.EACCES, errno.ENOENT, errno.ENODEV, errno.ERANGE)  # another try would end alike
# Retries are this module's; the SDK reads these when a client is made. Only the keys given count.
_SDK = {"AWS_RETRY_MODE": "standard", "AWS_MAX_ATTEMPTS": "1"}
_SDK_KEYS = {"AWS_EC2_METADATA_DISABLED": "true"}


class _Client(Protocol):
    """What carries requests. All of it is called by the transport's thread."""

    name: str

    def post(self, name: str, address: int, nbytes: int, *, write: bool) -> Any:  # noqa: ANN401
        """Begin to make an object of memory (``write``) or to bring one into it."""

    def check(self, request: Any) -> bool:  # noqa: ANN401 - what post gave
        """Whether it has ended; raises NixlError or NotMoved if badly, once."""

    def close(self) -> None:
        """Nothing is under way."""


class _Nixl:
    """NIXL's OBJ plugin."""

    name = "OBJ"

    def __init__(self, name: str, settings: ObjectTier) -> None:
        self._name = name.encode()
        self._prefix = settings.prefix
        self._library = nixl()
        self._ids = itertools.count(1)  # never again: the plugin knows each once
        self._agent = new_agent(self._name)
        try:
            with environment.changed(_SDK if settings.access_key is None else _SDK | _SDK_KEYS):
                self._options = new_backend(self._agent, "OBJ", _parameters(settings))
            self._memory = tell(self._agent, self._options, _DRAM, [ALL_MEMORY])
        except NixlError as error:
            self._library.call("destroy_agent", self._agent)
            text = "NIXL's OBJ plugin can't be used; nixl-cu12 has one that loads"
            raise PathUnavailable(text, (str(error),)) from None
        self._local = self._library.make("xfer_dlist", _DRAM)
        self._remote = self._library.make("xfer_dlist", _OBJ)

    def post(self, name: str, address: int, nbytes: int, *, write: bool) -> _Request:
        library, number = self._library, next(self._ids)
        key = (self._prefix + name).encode()
        request = _Request(tell(self._agent, self._options, _OBJ, [(0, nbytes, number)], key))
        for dlist, row in (
            (self._local, (address, nbytes, 0)),
            (self._remote, (0, nbytes, number)),
        ):
            library.held.nixl_capi_xfer_dlist_clear(dlist)
            library.held.nixl_capi_xfer_dlist_add_desc(dlist, *row)
        library.call(
            "create_xfer_req",
            self._agent,
            _WRITE if write else _READ,
            self._local,
            self._remote,
            self._name,
            ctypes.byref(request.handle),
            self._options,
        )
        request.status = library.free.nixl_capi_post_xfer_req(self._agent, request.handle, None)
        return request

    def check(self, request: _Request) -> bool:
        held = self._library.held
        if request.status > 0:
            request.status = held.nixl_capi_get_xfer_status(self._agent, request.handle)
        if request.status > 0:
            return False
        held.nixl_capi_release_xfer_req(self._agent, request.handle)
        held.nixl_capi_destroy_xfer_req(request.handle)
        untell(self._agent, self._options, request.listed)
        if request.status < 0:
            raise NixlError("get_xfer_status", request.status)
        return True

    def close(self) -> None:
        untell(self._agent, self._options, self._memory)
        self._library.call("destroy_agent", self._agent)


class _Request:
    """What NIXL was asked for."""

    __slots__ = ("handle", "listed", "status")

    def __init__(self, listed: ctypes.c_void_p) -> None:
        self.handle = ctypes.c_void_p()
        self.listed = listed
        self.status = 1


def _parameters(settings: ObjectTier) -> dict[str, str]:
    endpoint = settings.endpoint or ""
    scheme, _, host = endpoint.rpartition("://")
    keys = {
        "access_key": settings.access_key,
        "secret_key": settings.secret_key,
        "session_token": settings.session_token,
    }
    return {
        "bucket": settings.bucket,
        "region": settings.region,
        "scheme": scheme or "https",
        "use_virtual_addressing": "true" if settings.in_host else "false",
        "num_threads": str(settings.connections),
        "req_checksum": settings.checksums,
        "resp_checksum": settings.checksums,
        **({"endpoint_override": endpoint} if host else {}),
        **({"ca_bundle": os.fspath(settings.ca_bundle)} if settings.ca_bundle else {}),
        **{name: key.get_secret_value() for name, key in keys.items() if key is not None},
    }


class _Obstore:
    """obstore, whose calls block, on threads."""

    name = "obstore"

    def __init__(
        self, bucket: Bucket, pool: ThreadPoolExecutor, ring: Callable[[Future[None]], None]
    ) -> None:
        self._bucket = bucket
        self._pool = pool
        self._ring = ring

    def post(self, name: str, address: int, nbytes: int, *, write: bool) -> Future[None]:
        call = self._bucket.put if write else self._bucket.get
        request = self._pool.submit(call, name, address, nbytes)
        request.add_done_callback(self._ring)
        return request

    def check(self, request: Future[None]) -> bool:
        if not request.done():
            return False
        request.result()
        return True

    def close(self) -> None:
        """The pool is the transport's."""


class _Member:
    """A transfer on its way."""

    __slots__ = (
        "address", "asked", "deliver", "late", "nbytes", "request", "since", "transfer", "tries",
    )  # fmt: skip

    def __init__(self, transfer: Transfer, deliver: Deliver) -> None:
        self.transfer = transfer
        self.deliver = deliver
        self.address = 0
        self.nbytes = 0
        self.tries = 0
        self.request: Any = None
        self.asked = 0.0  # first
        self.late = False  # without an answer for longer than may be
        self.since = 0.0  # the last time


_numbers = itertools.count(1)


class ObjectTransport:
    """Carries objects to and from one bucket; see ``Transport``. A transfer's rows must join.

    Attributes:
        name: ``"OBJ"`` or ``"obstore"``, once started.
        refused: why not the other, if that was tried.
        bucket: for all that is no transfer; blocks.
    """

    def __init__(self, settings: ObjectTier) -> None:
        self.name = ""
        self.refused: tuple[str, ...] = ()
        self._tell: Callable[[float], None] = lambda _: None
        self.bucket: Bucket
        self._settings = settings
        self._inbox = Inbox()
        self._pool = ThreadPoolExecutor(2 * settings.connections, thread_name_prefix="kvgds-bucket")
        self._waiting: deque[_Member] = deque()
        self._copying: deque[_Member] = deque()
        self._flying: list[_Member] = []
        self._asking: list[_Member] = []  # of which obstore is being asked what went wrong
        self._pausing: list[tuple[float, int, _Member]] = []
        self._landing: deque[_Member] = deque()
        self._ended: list[_Member] = []
        self._copied_at = 0.0
        self._swept_at = 0.0
        self._closing = self._closed = False
        self._ready: Future[None] = Future()
        self._stopped: Future[None] = Future()
        self._client: _Client
        name = f"kvgds-objects-{next(_numbers)}"
        self._thread = threading.Thread(target=self._main, args=(name,), name=name, daemon=True)

    # --- called from other threads -------------------------------------------------

    def start(self) -> None:
        """Make the client. Blocks.

        Raises:
            PathUnavailable: the one that was asked for can't be had. ConfigError: the settings
                can't be used. CapacityError: the system allows no more threads.
        """
        self.bucket = Bucket(self._settings)
        fill(self._pool, 2 * self._settings.connections)
        with starting():
            self._thread.start()
        self._ready.result()

    def submit(self, transfers: Sequence[Transfer], deliver: Deliver) -> None:
        """See ``Transport``."""
        if self._closed:
            raise ClosedError("the transport is closed")
        self._inbox.put(partial(self._take, transfers, deliver))

    def run(self, function: Callable[[], Any]) -> Future[Any]:
        """Run what asks the bucket something, on a thread of those for that."""
        return self._pool.submit(function)

    def watch(self, tell: Callable[[float], None]) -> None:
        """Be told, on the transport's thread, of requests without an answer for longer than may be.

        Each is told of once: when it was made, by ``time.monotonic()``.
        """
        self._tell = tell

    def add_gpu(self) -> None:
        """See ``Transport``: there is none."""
        raise PathUnavailable("objects go by the network; GPU memory bounces")

    def detach(self, thing: File | Region) -> Future[None]:  # noqa: ARG002 - it knows of none
        """See ``Transport``."""
        # Not the one that says it has stopped: who waits may cancel it.
        return all_of([self._stopped] if self._closed else [])

    def close(self) -> Future[None]:
        """See ``Transport``."""
        self._closed = True
        if self._thread.ident is not None:
            self._inbox.put(self._stop)
        elif not self._stopped.done():  # never started
            self._finish()
        return self._stopped

    def abandon(self) -> None:
        """See ``Transport``."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

    # --- the thread ----------------------------------------------------------------

    def _main(self, name: str) -> None:
        try:
            self._client = self._choose(name)
        except Exception as error:  # noqa: BLE001 - it belongs to whoever opens the transport
            self._finish()
            self._ready.set_exception(error)
            return
        self.name = self._client.name
        self._ready.set_result(None)
        while not self._closing or self._working():
            self._inbox.wait(self._pause())
            while (call := self._inbox.take()) is not None:
                call()
            self._launch()
            self._poll()
            self._report()
        self._client.close()
        self._finish()

    def _finish(self) -> None:
        self._pool.shutdown(wait=False)
        self._inbox.close()
        self._stopped.set_result(None)

    def _choose(self, name: str) -> _Client:
        wanted = self._settings.backend
        try:
            if wanted != "obstore":
                return _Nixl(name, self._settings)
        except PathUnavailable as error:
            if wanted == "nixl":
                raise
            self.refused = (f"OBJ: {'; '.join((str(error).partition(chr(10))[0], *error.report))}",)
        return _Obstore(self.bucket, self._pool, self._ring)

    def _ring(self, _: Future[None]) -> None:
        self._inbox.put(lambda: None)  # only to wake the thread

    def _stop(self) -> None:
        self._closing = True

    def _take(self, transfers: Sequence[Transfer], deliver: Deliver) -> None:
        self._waiting.extend(_Member(transfer, deliver) for transfer in transfers)

    def _working(self) -> bool:
        return bool(
            self._waiting
            or self._copying
            or self._flying
            or self._asking
            or self._pausing
            or self._landing
        )

    def _pause(self) -> float | None:
        """How long to wait for news, in seconds; None: until there are some."""
        now = time.monotonic()
        pauses = [max(self._pausing[0][0] - now, 0.0)] if self._pausing else []
        if self._landing or self._copying:
            pauses.append(copy_pause(self._copied_at, len(self._landing) + len(self._copying)))
        if self._flying and self.name == _Nixl.name:
            young = now - self._flying[-1].since < _YOUNG_S
            pauses.append(_PAUSE_S[0] if young else _PAUSE_S[1])
        elif self._working():
            pauses.append(_SWEEP_S)
        return min(pauses, default=None)

    # --- launching -----------------------------------------------------------------

    def _launch(self) -> None:
        now = time.monotonic()
        while self._pausing and self._pausing[0][0] <= now:
            self._waiting.appendleft(heapq.heappop(self._pausing)[2])
        before = len(self._copying)
        for _ in range(before):
            self._begin(self._copying.popleft())
        left = len(self._copying)
        while self._waiting and len(self._flying) < self._settings.connections:
            self._begin(self._waiting.popleft())
        if not before == left == len(self._copying):
            self._copied_at = now

    def _begin(self, member: _Member) -> None:
        transfer = member.transfer
        try:
            if not member.tries:
                rows = transfer.begin()
                if rows is LATER:
                    self._copying.append(member)
                    return
                if not rows:
                    self._give_up(member, _unwanted())
                    return
                ((member.address, _, member.nbytes),) = coalesce(rows, _LARGEST)
            if not transfer.write:  # a short answer must leave no older stamp there, nor older end
                whole = bytes_at(member.address, member.nbytes)
                for part in (whole[:PAGE], whole[-PAGE:]):
                    part[:] = bytes(len(part))
            member.tries += 1
            member.since = time.monotonic()
            member.asked = member.asked or member.since
            member.request = self._client.post(
                transfer.place, member.address, member.nbytes, write=transfer.write
            )
        except Exception as error:  # noqa: BLE001 - it belongs to this transfer alone
            transfer.fail(error)
            self._ended.append(member)
            return
        self._flying.append(member)

    # --- landing -------------------------------------------------------------------

    def _poll(self) -> None:
        landing = list(self._landing)
        self._landing.clear()
        for member in landing:
            self._end(member)
        left = len(self._landing)
        flying, self._flying = self._flying, []
        for member in flying:
            try:
                if not self._client.check(member.request):
                    self._flying.append(member)
                    continue
            except Exception as error:  # noqa: BLE001 - it belongs to this transfer alone
                self._failed(member, error)
            else:
                self._end(member)
        now = time.monotonic()
        if not len(landing) == left == len(self._landing):
            self._copied_at = now
        if now - self._swept_at > _SWEEP_S:
            self._swept_at = now
            self._sweep(now)

    def _sweep(self, now: float) -> None:
        """See whether something hangs, and let go of what nobody waits for."""
        # NIXL gives a request up by itself: what counts is since when there is no good answer.
        unanswered = (*self._flying, *self._asking, *(entry[2] for entry in self._pausing))
        oldest = now - self._settings.request_timeout_s
        for member in unanswered:
            if member.late or member.asked >= oldest:
                continue
            member.late = True
            self._tell(member.asked)
        gone = [member for member in self._waiting if member.transfer.abandoned]
        late = [entry for entry in self._pausing if entry[2].transfer.abandoned]
        if gone or late:
            self._waiting = deque(m for m in self._waiting if not m.transfer.abandoned)
            self._pausing = [entry for entry in self._pausing if entry not in late]
            heapq.heapify(self._pausing)
            for member in (*gone, *(entry[2] for entry in late)):
                self._give_up(member, _unwanted())

    def _end(self, member: _Member) -> None:
        try:
            if member.transfer.end() is LATER:
                self._landing.append(member)
                return
        except Exception as error:  # noqa: BLE001 - it belongs to this transfer alone
            member.transfer.fail(error)
        self._ended.append(member)

    def _failed(self, member: _Member, error: Exception) -> None:
        if isinstance(error, NotMoved):  # obstore has tried again itself
            self._give_up(member, error)
            return
        self._asking.append(member)
        asking = self._pool.submit(self._diagnose, member, error)
        asking.add_done_callback(lambda ended: self._inbox.put(partial(self._asked, member, ended)))

    def _diagnose(self, member: _Member, error: Exception) -> NotMoved:
        """On a thread of the pool: what obstore says of the same object."""
        try:
            nbytes = self.bucket.size(member.transfer.place)
        except NotMoved as reason:
            return reason
        if member.transfer.write:
            return NotMoved(errno.EIO, f"{error}: the server took the request badly, or not at all")
        if nbytes is None:
            return NotMoved(errno.ENOENT, "there is no such object")
        number = errno.EIO if nbytes else errno.ERANGE
        return NotMoved(number, f"{error}, of an object that has {nbytes:,} bytes")

    def _asked(self, member: _Member, ended: Future[NotMoved]) -> None:
        self._asking.remove(member)
        reason = ended.exception() or ended.result()
        self._judge(member, reason if isinstance(reason, NotMoved) else NotMoved(None, str(reason)))

    def _judge(self, member: _Member, reason: NotMoved) -> None:
        """Try again what may pass, after a pause; else tell."""
        hopeless = reason.errno in _LASTING or member.tries > self._settings.retries
        if hopeless or member.transfer.abandoned:
            self._give_up(member, reason)
            return
        pause = _RETRY_S * 2 ** (member.tries - 1) * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
        due = time.monotonic() + pause
        heapq.heappush(self._pausing, (due, next(_numbers), member))

    def _give_up(self, member: _Member, reason: NotMoved) -> None:
        member.transfer.fail(reason)
        self._ended.append(member)

    def _report(self) -> None:
        ended, self._ended = self._ended, []
        groups: dict[Any, list[Transfer]] = {}
        for member in ended:
            groups.setdefault(member.deliver, []).append(member.transfer)
        for deliver, transfers in groups.items():
            deliver(transfers)


def _unwanted() -> NotMoved:
    """Why something was not sent: so it says nothing of the server."""
    return NotMoved(errno.ECANCELED, "nobody waits for it any more")
