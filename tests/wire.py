"""A TCP proxy for HTTP that misbehaves on command, between a client under test and a real server.

``with Wire(server.host, server.port) as wire:`` listens on ``wire.endpoint``. It passes requests on
and responses back, except what a fault strikes:

* One fault holds at a time, from the moment the call returns; the next call replaces it, ``ok``
  ends it. All requests on all connections meet it, or those that `Which` names.
* A request keeps the fault that it met when its head was there. Only ``refuse``, ``drop`` and a
  ``black_hole`` for all requests also strike what is under way.
* Unless its docstring says otherwise, the server has done what it was asked when a fault strikes:
  it is the response that suffers.

It runs on a thread and an event loop of its own. Its methods may be called from any thread and take
well under a millisecond, but for ``wait_x``: from a test's loop, ``await asyncio.to_thread(...)``.
A request gets a connection of its own to the server; if that refuses or resets it, so does the
wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
import struct
import tempfile
import threading
from collections import Counter
from concurrent.futures import Future
from typing import TYPE_CHECKING, Self, Unpack

import trustme

from wirefaults import (
    PIECE,
    UNTIL_CLOSED,
    Answer,
    BlackHole,
    Corrupt,
    Cut,
    Delay,
    Drip,
    EndError,
    Fault,
    Hold,
    Part,
    Request,
    Rule,
    Which,
    body_of,
    chain,
    framing_of,
    parse,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from wirefaults import Pieces

HOST = "127.0.0.1"
CALL_S = 10.0
WAIT_S = 10.0
CLOSE_S = 1.0
LIMIT = 1 << 20  # of a head; and how much of a body the wire takes in before it passes it on
RST = struct.pack("ii", 1, 0)  # lingering for no time: close() resets


def reserve() -> socket.socket:
    """Take a free port of the loopback: others may listen on it, by its number, none by chance."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((HOST, 0))
    return held


# --- connections ----------------------------------------------------------------------------


class _Connection:
    """One client's; lives as long as its task."""

    def __init__(self, wire: Wire, peer: socket.socket) -> None:
        self._wire = wire
        self._peer = peer
        self._exchange: asyncio.Task[None] | None = None
        self.reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None
        self.task = asyncio.get_running_loop().create_task(self._live())

    def lose(self) -> None:
        """Let what is under way fall into the black hole, and with it the connection."""
        if self._exchange is not None:
            self._exchange.cancel()

    def reset(self) -> None:
        """End with a RST; nothing that the client has not got yet will come."""
        self._linger_not()
        self.task.cancel()

    def _linger_not(self) -> None:
        with contextlib.suppress(OSError):  # asyncio may have seen it end, and closed it
            self._peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)

    async def _live(self) -> None:
        try:
            if self._wire.swallows_hellos():
                await self._swallow_hello()
            await self._open()
            while True:
                await self._serve()
        except EndError as end:
            await self._end(reset=end.reset)
        except OSError:
            await self._end(reset=True)
        except asyncio.IncompleteReadError:
            await self._end(reset=False)

    def close(self) -> None:
        """Give up the socket; called when the task has ended, or was cancelled before it began."""
        self._writer.transport.abort() if self._writer is not None else self._peer.close()

    async def _end(self, *, reset: bool) -> None:
        if reset:
            self._linger_not()
        elif self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    async def _swallow_hello(self) -> None:
        loop = asyncio.get_running_loop()
        while await loop.sock_recv(self._peer, PIECE):
            pass
        raise EndError(reset=False)

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        self.reader = asyncio.StreamReader(LIMIT)
        context = self._wire.tls_context
        transport, protocol = await loop.connect_accepted_socket(
            lambda: asyncio.StreamReaderProtocol(self.reader),
            self._peer,
            ssl=context,
            ssl_shutdown_timeout=None if context is None else CLOSE_S,
        )
        self._writer = asyncio.StreamWriter(transport, protocol, self.reader, loop)
        # So that `drain` waits until what was written is out; of nothing, TLS would wait for ever.
        transport.set_write_buffer_limits(high=0 if context is None else 1, low=0)

    async def send(self, data: bytes) -> None:
        assert self._writer is not None
        self._writer.write(data)
        await self._writer.drain()

    async def _serve(self) -> None:
        """Take one request and do what becomes of it."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        (method, target, _), headers = parse(head)
        request = Request(method, target, headers)
        fault = self._wire.meet(request)
        body = body_of(self.reader, framing_of(headers, 0))
        if isinstance(fault, BlackHole):
            await self._swallow()
        elif isinstance(fault, Answer):
            await self._answer(request, body, fault)
        else:
            self._exchange = asyncio.create_task(self._pass_on(head, request, body, fault))
            await self._finish(self._exchange)
            self._exchange = None

    async def _finish(self, exchange: asyncio.Task[None]) -> None:
        try:
            await asyncio.wait({exchange})
        finally:
            await _cancel(exchange)
        if exchange.cancelled():
            await self._swallow()
        exchange.result()

    async def _swallow(self) -> None:
        while await self.reader.read(PIECE):
            pass
        raise EndError(reset=False)

    async def _answer(self, request: Request, body: Pieces, fault: Answer) -> None:
        if request.headers.get("expect", "").lower() == "100-continue":
            await self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        async for _ in body:
            pass
        head, end, content = fault.raw.partition(b"\r\n\r\n")
        await self.send(head + end + (b"" if request.method == "HEAD" else content))
        if fault.close:
            raise EndError(reset=False)

    async def _pass_on(self, head: bytes, request: Request, body: Pieces, fault: Fault) -> None:
        """Have the server answer one request."""
        reader, writer = await asyncio.open_connection(*self._wire.target, limit=LIMIT)
        upload = asyncio.create_task(_upload(writer, chain(head, body), fault))
        download = asyncio.create_task(self._download(reader, request, fault))
        try:
            done, _ = await asyncio.wait({upload, download}, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            writer.transport.abort()  # first: what is awaited here may be cancelled once more
            await _cancel(upload, download)

    async def _download(self, reader: asyncio.StreamReader, request: Request, fault: Fault) -> None:
        while (head := await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1].startswith(b"1"):
            await self.send(head)
        (_, status, _), headers = parse(head)
        empty = request.method == "HEAD" or status in ("204", "304")
        framing = 0 if empty else framing_of(headers, UNTIL_CLOSED)
        await fault.download(self.send, chain(head, body_of(reader, framing)))
        if framing == UNTIL_CLOSED or headers.get("connection", "").lower() == "close":
            raise EndError(reset=False)


async def _upload(writer: asyncio.StreamWriter, pieces: Pieces, fault: Fault) -> None:
    async def send(data: bytes) -> None:
        writer.write(data)
        await writer.drain()

    await fault.upload(send, pieces)


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@functools.cache
def _authority() -> trustme.CA:
    return trustme.CA()


# --- the wire -------------------------------------------------------------------------------


class Wire:
    """A proxy on `endpoint` for the server at this address; with `tls`, TLS towards the client.

    Its certificate is for 127.0.0.1 and localhost, of an authority whose own is in `ca_bundle`.
    """

    def __init__(self, host: str, port: int, *, tls: bool = False) -> None:
        self.target = (host, port)
        self.tls_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if tls else None
        self._changed = threading.Condition()
        self._rule = Rule(Fault(), {})
        self._links: dict[asyncio.Task[None], _Connection] = {}
        self._listener: socket.socket | None = None
        self._connections = 0
        self._held = 0
        self._seen: list[Request] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opened:
            self.port: int = opened.enter_context(reserve()).getsockname()[1]
            if self.tls_context is not None:
                _authority().issue_cert(HOST, "localhost").configure_cert(self.tls_context)
                file = opened.enter_context(tempfile.NamedTemporaryFile(suffix=".pem"))
                file.write(_authority().cert_pem.bytes())
                file.flush()
                self.ca_bundle = file.name
            started: Future[None] = Future()
            thread = threading.Thread(target=lambda: asyncio.run(self._run(started)), name="wire")
            thread.start()
            opened.callback(thread.join)
            started.result(CALL_S)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._do(self._stopping.set)
        self._opened.close()

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"{'http' if self.tls_context is None else 'https'}://{HOST}:{self.port}"

    # --- faults -----------------------------------------------------------------------------

    def ok(self) -> None:
        """Pass everything on again, what is held as well."""
        self._do(self._set, Rule(Fault(), {}))

    def refuse(self) -> None:
        """Refuse connections, as if no server were there, and reset those that are open."""
        self._do(self._refuse)

    def drop(self) -> None:
        """Reset the connections that are open; new ones and the fault are as before."""
        self._do(self._drop)

    def reset(self, after: int = 0, *, of: Part = "response", **which: Unpack[Which]) -> None:
        """Let these bytes through, then reset (RST).

        Of an upload, the server then gets no more than that: what it was asked is not done.
        """
        self._strike(Cut(after, of, reset=True), which)

    def truncate(self, after: int = 0, *, of: Part = "response", **which: Unpack[Which]) -> None:
        """Let these bytes through, then close in order (FIN). Of an upload: as for `reset`."""
        self._strike(Cut(after, of, reset=False), which)

    def black_hole(self, **which: Unpack[Which]) -> None:
        """Accept and read, but pass nothing on and never answer; connections stay open.

        A connection that lost a request or response stays lost; TLS doesn't even say hello.
        """
        self._strike(BlackHole(), which)

    def delay(self, seconds: float, **which: Unpack[Which]) -> None:
        """Let responses come so much later."""
        self._strike(Delay(seconds), which)

    def drip(
        self, bytes_per_second: float, *, of: Part = "response", **which: Unpack[Which]
    ) -> None:
        """Let responses, or their bodies, come byte by byte, each after its share of time."""
        self._strike(Drip(bytes_per_second, of), which)

    def corrupt(self, at: int = 0, **which: Unpack[Which]) -> None:
        """Flip the bits of this byte of responses' bodies."""
        self._strike(Corrupt(at), which)

    def answer(self, raw: bytes, *, close: bool = False, **which: Unpack[Which]) -> None:
        """Take requests in, pass nothing on, and answer with this; then `close` in order.

        See `response` and `s3_error` in wirefaults. HEAD gets only the head of it. A client that is
        not told `connection="close"` may send its next request before it sees that.
        """
        self._strike(Answer(raw, close), which)

    def hold(self, **which: Unpack[Which]) -> None:
        """Hold responses until `ok` or the next fault; see `wait_held`."""
        self._do(lambda: self._set(Rule(Hold(self._arrived), which)))

    # --- what has come ----------------------------------------------------------------------

    @property
    def connections(self) -> int:
        """How many have been accepted."""
        with self._changed:
            return self._connections

    @property
    def open_connections(self) -> int:
        """How many are open."""
        with self._changed:
            return len(self._links)

    @property
    def requests(self) -> Counter[str]:
        """How many requests have come, by method."""
        return Counter(request.method for request in self.seen)

    @property
    def seen(self) -> list[Request]:
        """The requests that have come, oldest first, whatever became of them."""
        with self._changed:
            return list(self._seen)

    def wait_requests(self, count: int, method: str | None = None) -> None:
        """Block this thread until so many requests, of this method, have come since the start."""
        self._wait(lambda: sum(method in (None, each.method) for each in self._seen) >= count)

    def wait_held(self, count: int, timeout_s: float = WAIT_S) -> None:
        """Block this thread until at least so many responses are held."""
        self._wait(lambda: self._held >= count, timeout_s)

    def wait_open_connections(self, count: int) -> None:
        """Block this thread until exactly so many connections are open."""
        self._wait(lambda: len(self._links) == count)

    def _wait(self, there: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
        with self._changed:
            if not self._changed.wait_for(there, timeout_s):
                links = f"{len(self._links)} of {self._connections} connections are open"
                raise TimeoutError(f"{links}, {self._held} held, seen: {self._seen}")

    # --- on the wire's thread ---------------------------------------------------------------

    def meet(self, request: Request) -> Fault:
        """Count a request; the fault that strikes it."""
        with self._changed:
            self._seen.append(request)
            self._changed.notify_all()
        return self._rule.fault if self._rule.strikes(request) else Fault()

    def swallows_hellos(self) -> bool:
        """Whether a client that wants TLS is to wait for ever."""
        swallows = self._rule.for_all and isinstance(self._rule.fault, BlackHole)
        return swallows and self.tls_context is not None

    async def _run(self, started: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        try:
            self._listen()
        except OSError as error:
            started.set_exception(error)
            return
        started.set_result(None)
        await self._stopping.wait()
        self._deafen()
        await _cancel(*self._links)

    def _do(self, act: Callable[..., object], *arguments: object) -> None:
        """Have it done on the wire's thread, and wait for that."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                act(*arguments)
                done.set_result(None)
            except BaseException as error:  # noqa: BLE001 - for the one who waits
                done.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        done.result(CALL_S)

    def _strike(self, fault: Fault, which: Which) -> None:
        self._do(self._set, Rule(fault, which))

    def _set(self, rule: Rule) -> None:
        before, self._rule = self._rule.fault, rule
        if isinstance(rule.fault, BlackHole) and rule.for_all:
            for connection in self._links.values():
                connection.lose()
        elif isinstance(before, Hold):
            before.released.set()
        self._listen()

    def _refuse(self) -> None:
        self._set(Rule(Fault(), {}))
        self._deafen()
        self._drop()

    def _drop(self) -> None:
        for connection in self._links.values():
            connection.reset()

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = socket.create_server((HOST, self.port), backlog=1024)
            self._listener.settimeout(0)
            self._loop.add_reader(self._listener, self._accept, self._listener)

    def _deafen(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self, listener: socket.socket) -> None:
        try:
            peer, _ = listener.accept()
        except OSError:  # it has gone already
            return
        peer.settimeout(0)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio misses accepted ones
        connection = _Connection(self, peer)
        with self._changed:
            self._connections += 1
            self._links[connection.task] = connection
            self._changed.notify_all()
        connection.task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._links[task].close()
        self._loop.call_soon(self._closed, task)  # asyncio closes sockets in the loop's next turn

    def _closed(self, task: asyncio.Task[None]) -> None:
        with self._changed:
            del self._links[task]
            self._changed.notify_all()

    def _arrived(self, count: int) -> None:
        with self._changed:
            self._held += count
            self._changed.notify_all()
