"""A bucket by way of obstore: what NIXL's OBJ plugin can't do, and all where it can't be had.

Every call blocks; any thread may make it. Errors are those of files: ``errno`` says which.
"""

from __future__ import annotations

import configparser
import errno
import os
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from kvgds.errors import ConfigError
from kvgds.memory.copies import bytes_at, copy_pieces
from kvgds.transport.contract import NotMoved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from obstore.store import ClientConfig, S3Config

    from kvgds.config import ObjectTier

T = TypeVar("T")

# Times, numbers and names of objects go too: what is said of one request holds for the next.
_NOISE = re.compile(
    r"Generic S3 error: |Error performing list request: |\?list-type\S*|(?<=\w)/\S*\.kv\b"
    r"| in [\d.]+[mµn]?s\b|, after \d+ retries|, max_retries: \d+|, retry_timeout: \S+ ?"
)
_CODE = re.compile(r"<Code>(\w+)</Code>")
_ERRNOS = (
    ("status code: 403", errno.EACCES),
    ("status code: 401", errno.EACCES),
    ("status code: 416", errno.ERANGE),
    ("NoSuchBucket", errno.ENODEV),
    ("kind: Timeout", errno.ETIMEDOUT),  # of obstore's own words about an error
    ("kind: ConnectionRefused", errno.ECONNREFUSED),
    ("kind: Connect,", errno.EHOSTUNREACH),
    ("error sending request", errno.ECONNRESET),
    ("body error", errno.ECONNRESET),
)
# What is wrong, where the first line only says that the request could not be sent.
_CAUSE = re.compile(
    r'(?:message|error): "([^"\\]+)"|(?:InvalidCertificate|InvalidMessage)\(\s*(\w+)'
)
_OF_THE_ENVIRONMENT = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_OTHER_ENDPOINTS = (
    "AWS_ENDPOINT",
    "AWS_ENDPOINT_OVERRIDE",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
)


_LOOK = "see to bucket, keys, region and endpoint"
_FIXES = (
    ("/latest/api/token", "give access_key and secret_key, or set what AWS's usual chain looks at"),
    ("SignatureDoesNotMatch", "see to secret_key"),
    ("InvalidAccessKeyId", "see to access_key and endpoint"),
    ("ExpiredToken", "get new keys"),
    ("RequestTimeTooSkewed", "set this machine's clock"),
    ("NoSuchBucket", "make the bucket, or see to bucket, region and endpoint"),
    ("UnknownIssuer", "name the authority of the server's certificate in ca_bundle"),
    ("InvalidContentType", "the server speaks no TLS there: endpoint must begin with http://"),
    ("AuthorizationHeaderMalformed", "see to region"),
    ("status code: 301", "see to region"),
    ("status code: 403", "see to the keys, and what those may do: list, get, put and delete"),
    ("Connection refused", "start the server, or see to endpoint"),
    ("failed to lookup", "see to endpoint"),
)


def fix_of(error: NotMoved) -> str:
    """What to do about what a server has answered, or has not."""
    text = str(error)
    found = next((fix for sign, fix in _FIXES if sign in text), "")
    return found or ("see whether the server is well" if error.errno == errno.ETIMEDOUT else _LOOK)


class Found(NamedTuple):
    """An object: its name without the tier's prefix, bytes, and when it was stored."""

    name: str
    nbytes: int
    stored_at: float


class Bucket:
    """The objects below a tier's prefix, by names that don't show it."""

    def __init__(self, settings: ObjectTier) -> None:
        self._store = _open(settings)

    def put(self, name: str, address: int, nbytes: int) -> None:
        """Make an object of memory; replaces what has the name.

        Raises:
            NotMoved: it is not there, or perhaps it is.
        """
        self.write(name, bytes_at(address, nbytes))

    def get(self, name: str, address: int, nbytes: int) -> None:
        """Bring an object's first bytes into memory. A shorter one leaves the rest as it is.

        Raises:
            NotMoved: ENOENT: there is none.
        """
        found = self._ask(lambda: self._store.get_range(name, start=0, length=nbytes))
        if len(found) > nbytes:  # obstore hands over whatever a server sends
            text = f"{len(found):,} bytes came where {nbytes:,} were asked for"
            raise NotMoved(errno.EIO, text)
        copy_pieces([memoryview(found).cast("B")], [bytes_at(address, len(found))])

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Make a small object. Raises NotMoved."""
        self._ask(lambda: self._store.put(name, data, use_multipart=False))

    def read(self, name: str, start: int, nbytes: int) -> bytes:
        """So many bytes of an object, or those that there are. Raises NotMoved."""
        try:
            return bytes(self._ask(lambda: self._store.get_range(name, start=start, length=nbytes)))
        except NotMoved as error:
            if error.errno == errno.ERANGE:  # it ends before that
                return b""
            raise

    def size(self, name: str) -> int | None:
        """Bytes of an object; None: there is none. Raises NotMoved."""
        try:
            return int(self._ask(lambda: self._store.head(name))["size"])
        except NotMoved as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def delete(self, name: str) -> None:
        """Remove an object, if it is there. Raises NotMoved."""
        try:
            self._ask(lambda: self._store.delete(name))
        except NotMoved as error:
            if error.errno != errno.ENOENT:
                raise

    def rename(self, name: str, other: str) -> None:
        """Give an object another name: a copy and a removal. Raises NotMoved."""
        self._ask(lambda: self._store.rename(name, other))

    def listing(self, below: str = "") -> Iterator[Found]:
        """All objects whose names begin so, a page at a time. Raises NotMoved."""
        pages = self._store.list(below or None)
        while page := self._ask(lambda: next(pages, None)):
            for each in page:
                yield Found(each["path"], each["size"], each["last_modified"].timestamp())

    def check(self) -> None:
        """Raise NotMoved unless the bucket is there and may be listed."""
        self._ask(lambda: next(self._store.list("none-of-this-name/"), None))

    def _ask(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except (BaseError, OSError) as error:
            raise _told(error) from None


def _told(error: Exception) -> NotMoved:
    """What went wrong, in one line: the first, without what the server wrote, but with its code.

    Servers repeat tokens in what they write.
    """
    whole = str(error)
    text = _NOISE.sub("", whole.partition("\n")[0].partition("<")[0]).strip(" :")
    if code := _CODE.search(whole):
        text = f"{text} ({code[1]})"
    elif "HTTP error" in text and (cause := _CAUSE.search(whole)):
        text = f"{text} ({cause[1] or cause[2]})"
    if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in whole:
        return NotMoved(errno.ENOENT, text)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return NotMoved(errno.EACCES, text)
    number = next((number for sign, number in _ERRNOS if sign in whole), errno.EIO)
    return NotMoved(number, text)


def _open(settings: ObjectTier) -> S3Store:
    endpoint = settings.endpoint
    if endpoint is None:
        _check_environment()
    elif settings.in_host:
        endpoint = endpoint.replace("://", f"://{settings.bucket}.", 1)
    configured: S3Config = {
        "region": settings.region,
        "virtual_hosted_style_request": settings.in_host,
        "disable_bulk_delete": True,  # not every server answers that as AWS does
        "skip_signature": False,
        "unsigned_payload": not (endpoint or "").startswith("http://"),  # TLS vouches for it
    }
    if endpoint is not None:
        configured["endpoint"] = endpoint
        configured["aws_endpoint_url_s3"] = endpoint  # else the variable goes before the settings
    client: ClientConfig = {
        "allow_http": (endpoint or "").startswith("http://"),
        "connect_timeout": timedelta(seconds=settings.connect_timeout_s),
        "timeout": timedelta(seconds=settings.request_timeout_s),
    }
    if settings.ca_bundle is not None:
        client["root_certificate"] = _authorities(settings.ca_bundle)
    try:
        return S3Store(
            settings.bucket,
            prefix=settings.prefix or None,
            config=configured,
            client_options=client,
            retry_config={
                "max_retries": settings.retries,
                "retry_timeout": timedelta(seconds=settings.request_timeout_s),
            },
            **_credentials(settings),
        )
    except (BaseError, ValueError, OSError) as error:
        rule = f"the bucket can't be used so: {str(error).partition(chr(10))[0]}"
        raise ConfigError("bucket", settings.bucket, rule) from None


def _check_environment() -> None:
    """Refuse variables that name another server than the settings: not all heed the same ones."""
    for name in filter(os.environ.get, _OTHER_ENDPOINTS):
        raise ConfigError("endpoint", ..., f"must be given where {name} is set; or unset that")


def _authorities(path: Path) -> bytes:
    """The certificates of the authorities to trust."""
    try:
        found = path.read_bytes()
    except OSError as error:
        raise ConfigError("ca_bundle", str(path), f"can't be read: {error.strerror}") from None
    if b"-----BEGIN CERTIFICATE-----" not in found:
        raise ConfigError("ca_bundle", str(path), "must be a PEM file of certificates")
    return found


def _credentials(settings: ObjectTier) -> dict[str, Any]:
    """Who asks: the settings' keys, or by AWS's chain, of which obstore lacks the shared file."""
    if settings.access_key is not None and settings.secret_key is not None:
        token = settings.session_token
        keys = {
            "access_key_id": settings.access_key.get_secret_value(),
            "secret_access_key": settings.secret_key.get_secret_value(),
            "token": token.get_secret_value() if token is not None else None,
            "expires_at": None,
        }
        return {"credential_provider": lambda: keys}
    if any(name in os.environ for name in _OF_THE_ENVIRONMENT) or _shared() is None:
        return {}
    return {"credential_provider": _shared}


def _shared() -> dict[str, Any] | None:
    """Keys of the profile in AWS's shared credentials file; None: there are none."""
    # Where nobody knows of a home, this names a file that there is not; Path's would raise.
    home = os.path.expanduser("~/.aws/credentials")
    path = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or home
    profiles = configparser.ConfigParser(interpolation=None)
    try:
        profiles.read(path, encoding="utf-8")
        profile = profiles[os.environ.get("AWS_PROFILE") or "default"]
        return {
            "access_key_id": profile["aws_access_key_id"],
            "secret_access_key": profile["aws_secret_access_key"],
            "token": profile.get("aws_session_token"),
            "expires_at": None,
        }
    except (OSError, KeyError, configparser.Error, UnicodeError):
        return None
