"""A bucket by way of obstore: whom it asks, and what it says of what goes wrong."""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING, Any

import pytest

from buckets import settings
from kvgds import ConfigError
from kvgds.blocks import PAGE
from kvgds.memory import Arena
from kvgds.transport import NotMoved
from kvgds.transport.bucket import Bucket
from wire import Wire, reserve
from wirefaults import response

if TYPE_CHECKING:
    from s3 import JuiceServer

OTHER_SERVERS = (
    "AWS_ENDPOINT",
    "AWS_ENDPOINT_OVERRIDE",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
)
DATE = "Wed, 21 Oct 2015 07:28:00 GMT"
TOKEN = "a-token-that-nobody-may-see"  # noqa: S105 - of nothing


def quick(server: JuiceServer, **changes: Any) -> Bucket:
    given = {"bucket": "kvgds", "retries": 0, "connect_timeout_s": 1.0, "request_timeout_s": 1.0}
    return Bucket(settings(server, **{**given, **changes}))


def failure(bucket: Bucket) -> NotMoved:
    with pytest.raises(NotMoved) as caught:
        bucket.check()
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", OTHER_SERVERS)
def test_no_variable_leads_to_another_server(
    s3: JuiceServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What the settings say goes: else it and NIXL would ask two servers."""
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    quick(s3, bucket=s3.make_bucket()).check()


@pytest.mark.parametrize("name", OTHER_SERVERS)
def test_where_a_variable_names_a_server_the_settings_must(
    s3: JuiceServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, s3.endpoint)
    with pytest.raises(ConfigError, match=f"^endpoint: must be given where {name} is set"):
        quick(s3, endpoint=None)


def test_requests_are_signed_whatever_a_variable_says(
    s3: JuiceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    quick(s3, bucket=s3.make_bucket()).check()


def test_a_part_of_an_object(s3: JuiceServer) -> None:
    bucket = quick(s3, bucket=s3.make_bucket())
    bucket.write("a/b", b"0123456789")
    assert bucket.read("a/b", 0, 10) == b"0123456789"
    assert bucket.read("a/b", 2, 3) == b"234"
    assert bucket.read("a/b", 8, 100) == b"89"
    assert bucket.read("a/b", 10, 100) == b""


def test_an_answer_longer_than_asked_for_overruns_nothing(s3: JuiceServer) -> None:
    """All that came is handed over, though the head says less."""
    arena = Arena(4 * PAGE)
    with Wire(s3.host, s3.port) as wire:
        head = {"content_range": f"bytes 0-{PAGE - 1}/{PAGE}", "etag": "a", "last_modified": DATE}
        wire.answer(response(206, b"E" * 3 * PAGE, **head), method="GET")
        with pytest.raises(NotMoved, match="12,288 bytes came where 4,096 were asked for"):
            quick(s3, endpoint=wire.endpoint).get("name", arena.span.address, PAGE)
    assert bytes(arena.bytes[PAGE:]) == bytes(3 * PAGE)


# --- what went wrong ----------------------------------------------------------------------------


def test_nobody_there(s3: JuiceServer) -> None:
    with reserve() as held:
        error = failure(quick(s3, endpoint=f"http://127.0.0.1:{held.getsockname()[1]}"))
    assert error.errno == errno.ECONNREFUSED
    said = r"Error performing GET http://127.0.0.1:\d+/kvgds - HTTP error: error sending req"
    assert re.match(rf"{said}uest \(Connection refused\)$", str(error))


def test_a_host_without_an_address(s3: JuiceServer) -> None:
    error = failure(quick(s3, endpoint="http://no-such-host.invalid"))
    assert error.errno == errno.EHOSTUNREACH


def test_no_answer(s3: JuiceServer) -> None:
    with Wire(s3.host, s3.port) as wire:
        wire.black_hole()
        assert failure(quick(s3, endpoint=wire.endpoint)).errno == errno.ETIMEDOUT


def test_a_connection_that_breaks(s3: JuiceServer) -> None:
    with Wire(s3.host, s3.port) as wire:
        wire.reset(after=10)
        error = failure(quick(s3, endpoint=wire.endpoint))
        assert error.errno == errno.ECONNRESET


def test_an_authority_that_is_not_known(s3: JuiceServer) -> None:
    with Wire(s3.host, s3.port, tls=True) as wire:
        error = failure(quick(s3, endpoint=wire.endpoint))
    assert error.errno == errno.EHOSTUNREACH
    assert "(UnknownIssuer)" in str(error)


def test_no_word_of_the_server_is_repeated_but_its_code(s3: JuiceServer) -> None:
    """Some answer a token that they don't like with that token."""
    body = f"<Error><Code>InvalidToken</Code><Token-0>{TOKEN}</Token-0></Error>"
    with Wire(s3.host, s3.port) as wire:
        wire.answer(response(403, body.encode(), content_type="application/xml"))
        error = failure(quick(s3, endpoint=wire.endpoint, session_token=TOKEN))
    assert error.errno == errno.EACCES
    assert "(InvalidToken)" in str(error)
    assert TOKEN not in str(error)
