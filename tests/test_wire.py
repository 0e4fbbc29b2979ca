"""The tests' S3 servers and the faulty wire to them do what the tests of object storage rely on."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from botocore.exceptions import ClientError, SSLError

from wire import HOST, Wire
from wirefaults import response, s3_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from s3 import JuiceServer, MotoServer, S3Server

WAIT_S = 10.0
SILENCE_S = 0.2  # after so long, nothing is coming
BODY = bytes(range(256)) * 800
WHOLE = response(200, BODY)
HEAD = len(WHOLE) - len(BODY)
GET = b"GET /some/thing HTTP/1.1\r\n\r\n"


class Heard(NamedTuple):
    """What a client received, and how that ended."""

    data: bytes
    end: str


def said(client: socket.socket, silence_s: float = WAIT_S) -> Heard:
    """Receive until the connection ends, or nothing more comes."""
    client.settimeout(silence_s)
    data = bytearray()
    try:
        while piece := client.recv(1 << 20):
            data += piece
    except ConnectionResetError:
        return Heard(bytes(data), "RST")
    except TimeoutError:
        return Heard(bytes(data), "silence")
    return Heard(bytes(data), "FIN")


def receive(client: socket.socket, nbytes: int) -> bytes:
    """Receive so much."""
    data = bytearray()
    while len(data) < nbytes and (piece := client.recv(nbytes - len(data))):
        data += piece
    return bytes(data)


def dial(wire: Wire) -> contextlib.closing[socket.socket]:
    return contextlib.closing(socket.create_connection((HOST, wire.port), WAIT_S))


def talk(wire: Wire, request: bytes = GET) -> Heard:
    """Send this, and that there is no more to come, on a connection of its own; hear the answer."""
    with dial(wire) as client:
        with contextlib.suppress(OSError):  # it may end before all is sent
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
        return said(client)


def upload(body: bytes, *headers: str, method: str = "PUT") -> bytes:
    lines = [f"{method} /some/thing HTTP/1.1", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def code(act: Callable[[], object]) -> tuple[int, str]:
    """The HTTP status and S3 code of the error that this gives."""
    with pytest.raises(ClientError) as caught:
        act()
    answer = caught.value.response
    return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]


@pytest.fixture
def far() -> Iterator[Wire]:
    """A server that answers everything with WHOLE."""
    with Wire(HOST, 1) as server:
        server.answer(WHOLE)
        yield server


@pytest.fixture
def wire(far: Wire) -> Iterator[Wire]:
    """A wire to that."""
    with Wire(HOST, far.port) as between:
        yield between


@pytest.fixture(params=["s3", "moto_s3"])
def server(request: pytest.FixtureRequest) -> S3Server:
    """Each of the servers."""
    chosen: S3Server = request.getfixturevalue(request.param)
    return chosen


# --- servers --------------------------------------------------------------------------------


def test_a_server_keeps_objects(server: S3Server) -> None:
    bucket, other = server.make_bucket(), server.make_bucket()
    assert server.objects(bucket) == {}
    server.put(bucket, "a/b", b"old")
    server.put(bucket, "a/b", BODY)
    server.put(bucket, "c", b"")
    server.put(other, "d", b"other")
    assert server.objects(bucket) == {"a/b": BODY, "c": b""}
    assert server.get(bucket, "a/b") == BODY
    server.delete(bucket, "a/b")
    server.delete(bucket, "a/b")
    assert server.get(bucket, "a/b") is None
    assert server.objects(bucket) == {"c": b""}
    assert server.objects(other) == {"d": b"other"}


def test_a_server_tells_errors_as_s3_does(server: S3Server) -> None:
    bucket = server.make_bucket()
    server.put(bucket, "a", BODY)
    with contextlib.closing(server.client()) as client:
        part = client.get_object(Bucket=bucket, Key="a", Range="bytes=1000-1999")
        assert part["ResponseMetadata"]["HTTPStatusCode"] == 206
        assert part["Body"].read() == BODY[1000:2000]
        beyond = f"bytes={len(BODY)}-"
        assert code(lambda: client.get_object(Bucket=bucket, Key="a", Range=beyond))[0] == 416
        assert code(lambda: client.get_object(Bucket=bucket, Key="b")) == (404, "NoSuchKey")
        assert code(lambda: client.get_object(Bucket="no-such", Key="b")) == (404, "NoSuchBucket")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"aws_secret_access_key": "wrong-secret"}, (403, "SignatureDoesNotMatch")),
        ({"aws_access_key_id": "nobody"}, (403, "InvalidAccessKeyId")),
    ],
    ids=["secret", "key"],
)
def test_wrong_credentials_are_forbidden(
    s3: JuiceServer, wrong: dict[str, str], expected: tuple[int, str]
) -> None:
    bucket = s3.make_bucket()
    s3.put(bucket, "a", b"kept")
    # Larger than what fits between them: the server answers before it has read it.
    body = bytes(8 << 20)
    with (
        Wire(s3.host, s3.port) as wire,
        contextlib.closing(s3.client(**wrong)) as direct,
        contextlib.closing(s3.client(endpoint_url=wire.endpoint, **wrong)) as through,
    ):
        for client in (direct, through):
            get = functools.partial(client.get_object, Bucket=bucket, Key="a")
            put = functools.partial(client.put_object, Bucket=bucket, Key="a", Body=body)
            assert (code(get), code(put)) == (expected, expected)
    assert s3.objects(bucket) == {"a": b"kept"}


def test_a_server_stops_and_starts_on_its_port(own_s3: JuiceServer) -> None:
    bucket = own_s3.make_bucket()
    own_s3.put(bucket, "a", BODY)
    for end, killed in ((own_s3.stop, False), (own_s3.kill, True)):
        end()
        end()
        assert not own_s3.running
        assert (own_s3.exit_code == -signal.SIGKILL) is killed
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, own_s3.port), WAIT_S)
        own_s3.start()
        own_s3.start()
        assert own_s3.objects(bucket) == {"a": BODY}


def test_moto_forgets_when_it_stops(moto_s3: MotoServer) -> None:
    bucket = moto_s3.make_bucket()
    moto_s3.stop()
    moto_s3.start()
    assert code(lambda: moto_s3.names(bucket)) == (404, "NoSuchBucket")


def test_a_server_outlives_the_thread_that_started_it(own_s3: JuiceServer) -> None:
    own_s3.stop()
    starter = threading.Thread(target=own_s3.start)
    starter.start()
    starter.join()
    assert own_s3.objects(own_s3.make_bucket()) == {}


OWNER = """
import sys, pathlib, s3
with s3.JuiceServer(pathlib.Path(sys.argv[1])) as server:
    print(server.pid, flush=True)
    sys.stdin.read()
"""


def test_a_server_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "s3")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:
        assert owner.stdout is not None
        ended = os.pidfd_open(int(owner.stdout.readline()))
        try:
            owner.kill()
            assert select.select([ended], [], [], WAIT_S)[0] == [ended]
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(ended, signal.SIGKILL)
            os.close(ended)


# --- the wire -------------------------------------------------------------------------------


def test_it_passes_everything_on(wire: Wire, far: Wire) -> None:
    with dial(wire) as client:
        for _ in range(3):
            client.sendall(upload(BODY, "x-some: thing") + GET)
            assert receive(client, 2 * len(WHOLE)) == WHOLE * 2
        assert (wire.connections, wire.open_connections) == (1, 1)
    assert wire.requests == far.requests == {"PUT": 3, "GET": 3}
    assert [request.headers for request in far.seen[:2]] == [
        {"content-length": str(len(BODY)), "x-some": "thing"},
        {},
    ]
    wire.wait_open_connections(0)


def test_boto3_works_through_it(server: S3Server) -> None:
    bucket = server.make_bucket()
    with (
        Wire(server.host, server.port) as wire,
        contextlib.closing(server.client(endpoint_url=wire.endpoint)) as client,
    ):
        client.put_object(Bucket=bucket, Key="a", Body=BODY)
        assert client.head_object(Bucket=bucket, Key="a")["ContentLength"] == len(BODY)
        assert client.get_object(Bucket=bucket, Key="a")["Body"].read() == BODY
        client.delete_object(Bucket=bucket, Key="a")
        assert wire.requests == {"PUT": 1, "HEAD": 1, "GET": 1, "DELETE": 1}
    assert server.objects(bucket) == {}


def test_refused(wire: Wire) -> None:
    with dial(wire) as idle:
        idle.sendall(GET)
        assert receive(idle, len(WHOLE)) == WHOLE
        wire.refuse()
        assert said(idle) == Heard(b"", "RST")
        with pytest.raises(ConnectionRefusedError):
            dial(wire)
    wire.ok()
    assert talk(wire).data == WHOLE
    assert wire.connections == 2


def test_dropped(wire: Wire) -> None:
    with dial(wire) as idle:
        idle.sendall(GET)
        assert receive(idle, len(WHOLE)) == WHOLE
        wire.drop()
        assert said(idle) == Heard(b"", "RST")
    assert talk(wire).data == WHOLE


def test_cut_in_the_response(wire: Wire) -> None:
    wire.reset()
    assert talk(wire) == Heard(b"", "RST")
    wire.reset(7)
    assert talk(wire) == Heard(WHOLE[:7], "RST")
    wire.reset(70_000, of="body")
    assert talk(wire) == Heard(WHOLE[: HEAD + 70_000], "RST")
    wire.truncate(70_000)
    assert talk(wire) == Heard(WHOLE[:70_000], "FIN")
    wire.truncate(of="body")
    assert talk(wire) == Heard(WHOLE[:HEAD], "FIN")
    wire.truncate(len(WHOLE) + 1)
    assert talk(wire, GET * 2) == Heard(WHOLE * 2, "FIN")


def test_cut_in_the_upload(s3: JuiceServer) -> None:
    bucket = s3.make_bucket()
    with Wire(s3.host, s3.port) as wire:
        for name, cut in (("a", wire.reset), ("b", wire.truncate)):
            wire.ok()
            target = presigned(s3, wire, "put_object", bucket, name)
            cut(50_000, of="upload")
            request = upload(BODY).replace(b"/some/thing", target.encode())
            request = request.replace(b"\r\n", f"\r\nhost: {HOST}:{wire.port}\r\n".encode(), 1)
            assert talk(wire, request).data == b""
            assert s3.objects(bucket) == {}
        wire.reset(len(BODY) + 1, of="upload")
        assert talk(wire, request).data.startswith(b"HTTP/1.1 200 OK\r\n")
    assert s3.objects(bucket) == {"b": BODY}


def presigned(server: S3Server, wire: Wire, call: str, bucket: str, name: str) -> str:
    """A target that needs no more signature."""
    with contextlib.closing(server.client(endpoint_url=wire.endpoint)) as client:
        url: str = client.generate_presigned_url(call, Params={"Bucket": bucket, "Key": name})
    return url.removeprefix(wire.endpoint)


def test_black_hole(wire: Wire, far: Wire) -> None:
    wire.hold()
    with dial(wire) as idle, dial(wire) as busy, dial(wire) as late:
        busy.sendall(GET)
        wire.wait_held(1)
        wire.black_hole()
        idle.sendall(upload(BODY))
        late.sendall(GET)
        wire.wait_requests(3)
        wire.ok()
        assert [said(client, SILENCE_S) for client in (idle, busy, late)] == [
            Heard(b"", "silence")
        ] * 3
        assert far.requests == {"GET": 1}
        assert wire.open_connections == 3
        busy.sendall(GET)
        assert said(busy, SILENCE_S) == Heard(b"", "silence")
    wire.drip(1000)
    with dial(wire) as client:
        client.sendall(GET)
        receive(client, 1)
        wire.black_hole()
        assert said(client, SILENCE_S).end == "silence"
    wire.ok()
    assert talk(wire).data == WHOLE


def test_delayed(wire: Wire) -> None:
    wire.delay(0.4)
    with contextlib.closing(http.client.HTTPConnection(HOST, wire.port, WAIT_S)) as client:
        begun = time.monotonic()
        client.request("GET", "/some/thing")
        assert client.getresponse().read() == BODY
        assert time.monotonic() - begun >= 0.4


def test_dripping(wire: Wire) -> None:
    wire.drip(100)
    with dial(wire) as client:
        begun = time.monotonic()
        client.sendall(GET)
        got = b"".join(client.recv(1) for _ in range(20))
        assert got == WHOLE[:20]
        assert 0.2 <= time.monotonic() - begun < WAIT_S
    wire.drip(100, of="body")
    with dial(wire) as client:
        begun = time.monotonic()
        client.sendall(GET)
        got = b"".join(client.recv(1) for _ in range(HEAD + 20))
        assert got == WHOLE[: HEAD + 20]
        assert 0.2 <= time.monotonic() - begun < HEAD / 100


@pytest.mark.parametrize("at", [0, 70_000, len(BODY) - 1])
def test_corrupted(wire: Wire, at: int) -> None:
    wire.corrupt(at)
    expected = bytearray(WHOLE)
    expected[HEAD + at] ^= 0xFF
    assert talk(wire) == Heard(bytes(expected), "FIN")


def test_chunked_and_endless_bodies(wire: Wire, far: Wire) -> None:
    start = b"HTTP/1.1 200 OK\r\n"
    chunked = (
        start + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\nz: 1\r\n\r\n"
    )
    far.answer(chunked)
    assert talk(wire, GET * 2) == Heard(chunked * 2, "FIN")
    wire.corrupt(4)
    assert talk(wire) == Heard(chunked.replace(b"defg", b"d\x9afg"), "FIN")
    far.answer(start + b"\r\nabcdefg", close=True)
    assert talk(wire, GET * 2) == Heard(start + b"\r\nabcd\x9afg", "FIN")


def test_answering(wire: Wire, far: Wire) -> None:
    error = s3_error(503, "SlowDown")
    wire.answer(error)
    chunks = b"PUT / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    assert talk(wire, upload(BODY) + chunks + GET) == Heard(error * 3, "FIN")
    expecting = upload(BODY, "expect: 100-continue")
    assert talk(wire, expecting).data == b"HTTP/1.1 100 Continue\r\n\r\n" + error
    head = error[: error.index(b"<?xml")]
    assert talk(wire, GET.replace(b"GET", b"HEAD")) == Heard(head, "FIN")
    short = response(206, b"abc", content_length=10, content_range="bytes 0-9/10")
    wire.answer(short, close=True)
    assert talk(wire, GET * 2) == Heard(short, "FIN")
    assert far.requests == {}
    assert wire.requests == {"PUT": 3, "GET": 2, "HEAD": 1}


def test_boto3_understands_the_error(s3: JuiceServer) -> None:
    with (
        Wire(s3.host, s3.port) as wire,
        contextlib.closing(s3.client(endpoint_url=wire.endpoint)) as client,
    ):
        wire.answer(s3_error(503, "SlowDown"))
        put = {"Bucket": "some", "Key": "a", "Body": BODY}
        assert code(lambda: client.put_object(**put)) == (503, "SlowDown")
        assert code(lambda: client.get_object(Bucket="some", Key="a")) == (503, "SlowDown")


def test_holding_what_has_been_done(s3: JuiceServer) -> None:
    bucket = s3.make_bucket()
    with (
        Wire(s3.host, s3.port) as wire,
        contextlib.closing(s3.client(endpoint_url=wire.endpoint)) as client,
    ):
        wire.hold(method="PUT")
        put = {"Bucket": bucket, "Key": "a", "Body": BODY}
        waiting = threading.Thread(target=client.put_object, kwargs=put)
        waiting.start()
        try:
            wire.wait_held(1)
            assert s3.objects(bucket) == {"a": BODY}
            assert client.get_object(Bucket=bucket, Key="a")["Body"].read() == BODY
            assert waiting.is_alive()
            with pytest.raises(TimeoutError, match="1 held"):
                wire.wait_held(2, timeout_s=0.01)
        finally:
            wire.ok()
            waiting.join()
        with pytest.raises(TimeoutError, match="0 held"):
            wire.wait_held(1, timeout_s=0.01)


def test_only_some_requests(wire: Wire) -> None:
    error = s3_error(404, "NoSuchKey")

    def answers(*requests: bytes) -> list[bool]:
        return [talk(wire, request).data == error for request in requests]

    put, other = upload(b""), GET.replace(b"thing", b"else")
    wire.answer(error, method="PUT")
    assert answers(put, GET, put) == [True, False, True]
    wire.answer(error, target="*/else")
    assert answers(GET, other) == [False, True]
    wire.answer(error, when=lambda request: "content-length" in request.headers)
    assert answers(GET, put) == [False, True]
    wire.answer(error, method="GET", times=2)
    assert answers(GET, put, GET, GET) == [True, False, True, False]


def test_an_answer_before_all_is_sent(s3: JuiceServer) -> None:
    body = bytes(16 << 20)
    with Wire(s3.host, s3.port) as wire:
        answer = talk(wire, upload(body, f"host: {HOST}:{wire.port}"))
    assert answer.data.startswith(b"HTTP/1.1 403 Forbidden\r\n")


def test_a_server_that_is_gone(own_s3: JuiceServer) -> None:
    with Wire(own_s3.host, own_s3.port) as wire:
        own_s3.stop()
        assert talk(wire) == Heard(b"", "RST")
        own_s3.start()
        assert talk(wire).data.startswith(b"HTTP/1.1 400 Bad Request: missing required Host header")


async def test_it_is_told_and_awaited_from_a_loop(wire: Wire) -> None:
    wire.black_hole()
    reader, writer = await asyncio.open_connection(HOST, wire.port)
    waiting = asyncio.create_task(asyncio.to_thread(wire.wait_requests, 1, "GET"))
    await asyncio.sleep(0)
    assert not waiting.done()
    writer.write(GET)
    await waiting
    wire.drop()
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()


def test_nothing_is_left(far: Wire) -> None:
    before = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as opened:
        with Wire(HOST, far.port) as wire, Wire(HOST, far.port, tls=True) as secret:
            clients = [
                opened.enter_context(dial(each)) for each in (wire, wire, wire, secret, secret)
            ]
            lost, held, *_ = clients
            wire.black_hole(method="GET")
            lost.sendall(GET)
            wire.wait_requests(1)
            wire.hold()
            held.sendall(upload(BODY))
            wire.wait_held(1)
            bundle = secret.ca_bundle
        assert not [client for client in clients if said(client).end == "silence"]
        assert said(held).data == b""
    far.wait_open_connections(0)
    assert (set(threading.enumerate()), set(os.listdir("/proc/self/fd"))) == before
    assert not Path(bundle).exists()
    with pytest.raises(ConnectionRefusedError):
        dial(wire)


# --- TLS ------------------------------------------------------------------------------------


def test_tls(s3: JuiceServer) -> None:
    bucket = s3.make_bucket()
    with (
        Wire(s3.host, s3.port, tls=True) as wire,
        contextlib.closing(s3.client(endpoint_url=wire.endpoint, verify=wire.ca_bundle)) as client,
        contextlib.closing(s3.client(endpoint_url=wire.endpoint, verify=None)) as stranger,
    ):
        client.put_object(Bucket=bucket, Key="a", Body=BODY)
        assert client.get_object(Bucket=bucket, Key="a")["Body"].read() == BODY
        with pytest.raises(SSLError, match="CERTIFICATE_VERIFY_FAILED"):
            stranger.get_object(Bucket=bucket, Key="a")
        assert wire.requests == {"PUT": 1, "GET": 1}


@pytest.mark.parametrize("name", [HOST, "localhost", "elsewhere"])
def test_its_certificate_is_for(far: Wire, name: str) -> None:
    with Wire(HOST, far.port, tls=True) as wire, dial(wire) as plain:
        context = ssl.create_default_context(cafile=wire.ca_bundle)
        if name == "elsewhere":
            with pytest.raises(ssl.SSLCertVerificationError):
                context.wrap_socket(plain, server_hostname=name)
            return
        with contextlib.closing(context.wrap_socket(plain, server_hostname=name)) as client:
            client.sendall(GET)
            assert receive(client, len(WHOLE)) == WHOLE
            wire.truncate(70_000)
            client.sendall(GET)
            assert said(client) == Heard(WHOLE[:70_000], "FIN")


def test_a_black_hole_says_no_hello(far: Wire) -> None:
    with Wire(HOST, far.port, tls=True) as wire, dial(wire) as plain:
        context = ssl.create_default_context(cafile=wire.ca_bundle)
        with contextlib.closing(context.wrap_socket(plain, server_hostname=HOST)) as met:
            wire.black_hole()
            met.sendall(GET)
            wire.wait_requests(1)
            assert said(met, SILENCE_S) == Heard(b"", "silence")
        with dial(wire) as late:
            late.settimeout(SILENCE_S)
            with pytest.raises(TimeoutError):
                context.wrap_socket(late, server_hostname=HOST)
