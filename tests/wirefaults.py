"""What ``wire.Wire`` can do to a request or response, and as much of HTTP/1.1 as that takes.

Messages are streams of pieces: first the head, then the body as it comes. A fault passes pieces on to whom they are
for, changed or late, or ends the connection.
"""

from __future__ import annotations

import asyncio
import fnmatch
import http
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    Send = Callable[[bytes], Awaitable[None]]
    Pieces = AsyncIterator[tuple[bytes, bool]]  # bytes, and whether they are of the body

PIECE = 1 << 16
CHUNKED, UNTIL_CLOSED = -1, -2

Part = Literal["response", "body", "upload"]
"""What a number of bytes counts: of the response, of its body only, or of the request's body."""


def response(status: int, body: bytes = b"", **headers: object) -> bytes:
    """A response for `answer`; of a header's name, `_` is a hyphen, and Content-Length may lie."""
    fields: dict[str, object] = {"content-length": len(body)}
    fields |= {name.replace("_", "-").lower(): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def s3_error(status: int, code: str) -> bytes:
    """S3's error response for `answer`, for instance of 503 and "SlowDown"."""
    text = f"<Error><Code>{code}</Code><Message>made by the test</Message></Error>"
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()
    return response(status, body, content_type="application/xml")


class Request(NamedTuple):
    """The head of a request; the names of its headers are in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]


class Which(TypedDict, total=False):
    """Which requests a fault strikes; without any of these, all."""

    method: str
    target: str
    """Shell pattern for path and query."""
    when: Callable[[Request], bool]
    """Called on the wire's thread."""
    times: int
    """Strike this often, then no more."""


def parse(head: bytes) -> tuple[list[str], dict[str, str]]:
    """The words of a head's first line, and its headers."""
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return first.split(" ", 2), {name.lower(): value.strip() for name, _, value in pairs}


def framing_of(headers: Mapping[str, str], otherwise: int) -> int:
    if headers.get("transfer-encoding", "").lower().endswith("chunked"):
        return CHUNKED
    return int(headers.get("content-length", otherwise))


async def body_of(reader: asyncio.StreamReader, framing: int) -> Pieces:
    if framing != CHUNKED:
        async for data in _stretch(reader, framing):
            yield data, True
        return
    size = 1
    while size > 0:
        line = await reader.readuntil(b"\r\n")
        yield line, False
        size = int(line.partition(b";")[0], 16)
        async for data in _stretch(reader, size):
            yield data, True
        if size > 0:
            yield await reader.readexactly(2), False
    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
        yield line, False
    yield line, False


async def _stretch(reader: asyncio.StreamReader, nbytes: int) -> AsyncIterator[bytes]:
    left = nbytes
    while left != 0:
        data = await reader.read(min(PIECE, left) if left > 0 else PIECE)
        if not data and left > 0:
            raise asyncio.IncompleteReadError(b"", left)
        if not data:
            return
        yield data
        left -= len(data) if left > 0 else 0


async def chain(head: bytes, body: Pieces) -> Pieces:
    yield head, False
    async for piece in body:
        yield piece


# --- faults ---------------------------------------------------------------------------------


class EndError(Exception):
    """This connection to the client shall end now."""

    def __init__(self, *, reset: bool) -> None:
        super().__init__()
        self.reset = reset


class Fault:
    """None at all: passes everything on."""

    async def upload(self, send: Send, pieces: Pieces) -> None:
        """Pass a request's body on to the server."""
        async for data, _ in pieces:
            await send(data)

    async def download(self, send: Send, pieces: Pieces) -> None:
        """Pass a response on to the client."""
        async for data, _ in pieces:
            await send(data)


@dataclass(frozen=True)
class Cut(Fault):
    after: int
    part: Part
    reset: bool

    async def upload(self, send: Send, pieces: Pieces) -> None:
        if self.part == "upload":
            await self._until(send, pieces)
        await super().upload(send, pieces)

    async def download(self, send: Send, pieces: Pieces) -> None:
        if self.part != "upload":
            await self._until(send, pieces)
        await super().download(send, pieces)

    async def _until(self, send: Send, pieces: Pieces) -> None:
        left = self.after
        async for data, payload in pieces:
            counts = payload or self.part == "response"
            if counts and len(data) >= left:
                await send(data[:left])
                raise EndError(reset=self.reset)
            await send(data)
            left -= len(data) if counts else 0
        if left == 0:
            raise EndError(reset=self.reset)


@dataclass(frozen=True)
class Delay(Fault):
    seconds: float

    async def download(self, send: Send, pieces: Pieces) -> None:
        await asyncio.sleep(self.seconds)
        await super().download(send, pieces)


@dataclass(frozen=True)
class Drip(Fault):
    bytes_per_second: float
    part: Part

    async def download(self, send: Send, pieces: Pieces) -> None:
        async for data, payload in pieces:
            if payload or self.part == "response":
                for at in range(len(data)):
                    await asyncio.sleep(1 / self.bytes_per_second)
                    await send(data[at : at + 1])
            else:
                await send(data)


@dataclass(frozen=True)
class Corrupt(Fault):
    at: int

    async def download(self, send: Send, pieces: Pieces) -> None:
        left = self.at
        async for data, payload in pieces:
            if payload and 0 <= left < len(data):
                flipped = bytes([data[left] ^ 0xFF])
                await send(data[:left] + flipped + data[left + 1 :])
            else:
                await send(data)
            left -= len(data) if payload else 0


@dataclass(frozen=True)
class Hold(Fault):
    arrived: Callable[[int], None]
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def download(self, send: Send, pieces: Pieces) -> None:
        self.arrived(1)
        try:
            await self.released.wait()
        finally:
            self.arrived(-1)
        await super().download(send, pieces)


@dataclass(frozen=True)
class Answer(Fault):
    raw: bytes
    close: bool


class BlackHole(Fault):
    pass


class Rule:
    """A fault, and which requests it strikes."""

    def __init__(self, fault: Fault, which: Which) -> None:
        self.fault = fault
        self.for_all = not which
        self._which = which
        self._left = which.get("times", -1)

    def strikes(self, request: Request) -> bool:
        which = self._which
        when = which.get("when")
        applies = (
            self._left != 0
            and which.get("method", request.method) == request.method
            and fnmatch.fnmatchcase(request.target, which.get("target", "*"))
            and (when is None or when(request))
        )
        self._left -= applies
        return applies
