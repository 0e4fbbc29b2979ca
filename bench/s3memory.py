"""As much of S3 as the benches ask for, in memory and at little cost: what is left is the clients'.

    python bench/s3memory.py

Writes the port that it listens on, on the loopback, and serves until it is killed. A thread a
connection; no signatures, no checksums, no copies. Says nothing of how a real server does.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections import defaultdict
from urllib.parse import parse_qs, unquote, urlsplit

HEAD_BYTES = 1 << 16
DATE = "Mon, 01 Jan 2024 00:00:00 GMT"
ISO = "2024-01-01T00:00:00.000Z"
ETAG = '"0123456789abcdef0123456789abcdef"'
MISSING = b"<Error><Code>NoSuchKey</Code><Message>none</Message></Error>"


class Store:
    """Objects by name. Memory of what is removed or replaced is used again: it has its pages."""

    def __init__(self) -> None:
        self.objects: dict[str, bytearray] = {}
        self._spare: dict[int, list[bytearray]] = defaultdict(list)

    def room(self, nbytes: int) -> bytearray:
        try:
            return self._spare[nbytes].pop()
        except IndexError:
            return bytearray(nbytes)

    def put(self, name: str, content: bytearray) -> None:
        self.remove(name)
        self.objects[name] = content

    def remove(self, name: str) -> None:
        content = self.objects.pop(name, None)
        if content is not None:
            self._spare[len(content)].append(content)


class Connection:
    """Answers what comes over one connection."""

    def __init__(self, store: Store, connected: socket.socket) -> None:
        self._store, self._socket = store, connected
        self._buffer = bytearray(HEAD_BYTES)
        self._filled = 0

    def serve(self) -> None:
        with self._socket:
            try:
                while (head := self._head()) is not None:
                    self._answer(*head)
            except ConnectionError:
                return

    def _head(self) -> tuple[str, str, dict[str, str]] | None:
        while (end := self._buffer.find(b"\r\n\r\n", 0, self._filled)) < 0:
            got = self._socket.recv_into(memoryview(self._buffer)[self._filled :])
            if not got:
                return None
            self._filled += got
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        self._drop(end + 4)
        method, target, _ = first.split(" ")
        pairs = (line.partition(":") for line in lines)
        return method, target, {name.lower(): value.strip() for name, _, value in pairs}

    def _drop(self, nbytes: int) -> None:
        self._buffer[: self._filled - nbytes] = self._buffer[nbytes : self._filled]
        self._filled -= nbytes

    def _body(self, headers: dict[str, str]) -> bytearray:
        nbytes = int(headers.get("content-length", 0))
        if headers.get("expect", "").lower() == "100-continue":
            self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self._store.room(nbytes)
        have = min(self._filled, nbytes)
        body[:have] = self._buffer[:have]
        self._drop(have)
        with memoryview(body) as rest:
            while have < nbytes:
                got = self._socket.recv_into(rest[have:])
                if not got:
                    raise ConnectionError
                have += got
        return body

    def _answer(self, method: str, target: str, headers: dict[str, str]) -> None:
        body, parts = self._body(headers), urlsplit(target)
        name = unquote(parts.path).strip("/").partition("/")[2]
        if method == "PUT":
            if name:
                self._store.put(name, body)
            self._say("200 OK", b"")
        elif method == "DELETE":
            self._store.remove(name)
            self._say("204 No Content", b"")
        elif not name:
            self._list(parse_qs(parts.query).get("prefix", [""])[0])
        else:
            self._get(self._store.objects.get(name), headers, bodyless=method == "HEAD")

    def _get(self, content: bytearray | None, headers: dict[str, str], *, bodyless: bool) -> None:
        if content is None:
            self._say("404 Not Found", MISSING, bodyless=bodyless)
            return
        view, more, status = memoryview(content), "", "200 OK"
        if "range" in headers:
            first, _, last = headers["range"].removeprefix("bytes=").partition("-")
            stop = min(int(last) + 1, len(content))
            more = f"Content-Range: bytes {first}-{stop - 1}/{len(content)}\r\n"
            view, status = view[int(first) : stop], "206 Partial Content"
        self._say(status, view, more, bodyless=bodyless)

    def _list(self, prefix: str) -> None:
        found = sorted(name for name in list(self._store.objects) if name.startswith(prefix))
        listed = "".join(
            f"<Contents><Key>{name}</Key><LastModified>{ISO}</LastModified>"
            f"<ETag>{ETAG}</ETag><Size>1</Size></Contents>"
            for name in found
        )
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{listed}</ListBucketResult>"
        self._say("200 OK", text.encode())

    def _say(
        self, status: str, body: bytes | memoryview, more: str = "", *, bodyless: bool = False
    ) -> None:
        head = f"HTTP/1.1 {status}\r\nLast-Modified: {DATE}\r\nETag: {ETAG}\r\n{more}"
        head += "" if status.startswith("204") else f"Content-Length: {len(body)}\r\n"
        self._socket.sendall(head.encode() + b"\r\n")
        if not bodyless and len(body):
            self._socket.sendall(body)


def main() -> None:
    store = Store()
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listening:
        print(listening.getsockname()[1], flush=True)
        while True:
            connected, _ = listening.accept()
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(store, connected)
            threading.Thread(target=connection.serve, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
