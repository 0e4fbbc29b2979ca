"""What a block is called, and the stamp that lies in front of its stored bytes.

Pure: no I/O, no threads. A stored block is an *image*: one page of stamp, then the
payload, padded to the page. The stamp names the block and carries the payload's
checksum, so that whoever finds an image can tell whose it is and whether it is whole.
``docs/format.md`` describes the bytes.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from typing import NamedTuple, TypeAlias

import xxhash

from kvgds.errors import ConfigError

PAGE = 4096
"""Alignment of everything that may meet direct I/O: slots, leases, lengths. Bytes."""

MAX_KEY_BYTES = 1024

BlockKey: TypeAlias = bytes
"""Names a block's content, 1 to 1,024 bytes: for example a hash of its token prefix."""

NO_CHECKSUM = 0
XXH3_128 = 1

_HEADER = struct.Struct("<8sHHI16sQQ16s")  # magic, version, algorithm, key bytes, …
_MAGIC = b"kvgdsblk"
_VERSION = 1


def padded(nbytes: int) -> int:
    """``nbytes`` rounded up to a whole page."""
    return -(-nbytes // PAGE) * PAGE


def check_key(key: object) -> None:
    """Raise ConfigError unless ``key`` can name a block."""
    if type(key) is not bytes:
        raise ConfigError("key", key, "must be bytes, for example a hash of the token prefix")
    if not 0 < len(key) <= MAX_KEY_BYTES:
        raise ConfigError("key", key[:16], f"must have 1 to {MAX_KEY_BYTES} bytes")


def place_of(space: str, key: BlockKey) -> str:
    """Where a block lies that has a file or an object of its own: spread over 256 folders.

    Args:
        space: digest of its namespace, in hexadecimal.
        key: its key, which only the stamp holds: it may be anything.
    """
    name = hashlib.blake2b(key, digest_size=20).hexdigest()
    return f"{space}/{name[:2]}/{name}.kv"


@dataclass(frozen=True, slots=True)
class Namespace:
    """All that must agree before one process may use another's blocks.

    Attributes:
        model: name of the model, for example ``"Qwen/Qwen3-8B"``.
        revision: revision of its weights.
        layout: order of a block's axes, for example ``"NHD"``.
        dtype: element type of the KV cache, for example ``"bfloat16"``.
        block_tokens: tokens a block.
        rank: which share of the model this process holds.
        world: how many shares there are.
    """

    model: str
    revision: str = "main"
    layout: str = "NHD"
    dtype: str = "bfloat16"
    block_tokens: int = 16
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        for name in ("model", "revision", "layout", "dtype"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ConfigError(f"namespace.{name}", value, "must be a non-empty string")
        for name, least in (("block_tokens", 1), ("rank", 0), ("world", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"namespace.{name}", value, f"must be an int >= {least}")
        if self.rank >= self.world:
            raise ConfigError("namespace.rank", self.rank, f"must be below world={self.world}")

    @property
    def text(self) -> str:
        """All fields as canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> bytes:
        """16 bytes that differ when any field differs."""
        return digest_of(self.text.encode())


def digest_of(text: bytes) -> bytes:
    """The digest of the namespace that has this text."""
    return hashlib.blake2b(text, digest_size=16).digest()


class Stamp(NamedTuple):
    """What stands in front of a stored payload."""

    namespace: bytes
    key: BlockKey
    generation: int
    nbytes: int
    algorithm: int
    checksum: bytes

    def encode(self) -> bytes:
        """The stamp as it is written; the rest of its page is zero."""
        head = _HEADER.pack(
            _MAGIC,
            _VERSION,
            self.algorithm,
            len(self.key),
            self.namespace,
            self.generation,
            self.nbytes,
            self.checksum,
        )
        body = head + self.key
        return body + xxhash.xxh3_64_digest(body)

    @classmethod
    def decode(cls, page: bytes | memoryview) -> Stamp | None:
        """The stamp at the start of ``page``, or None if there is no whole one."""
        if len(page) < _HEADER.size:
            return None
        magic, version, algorithm, key_bytes, namespace, generation, nbytes, checksum = (
            _HEADER.unpack_from(page)
        )
        if magic != _MAGIC or version != _VERSION or not 0 < key_bytes <= MAX_KEY_BYTES:
            return None
        end = _HEADER.size + key_bytes
        body = bytes(page[: end + 8])
        if xxhash.xxh3_64_digest(body[:end]) != body[end:]:
            return None
        return cls(namespace, body[_HEADER.size : end], generation, nbytes, algorithm, checksum)


def image_bytes(nbytes: int) -> int:
    """Bytes that a block of ``nbytes`` takes where it is stored, stamp and pad included."""
    return PAGE + padded(nbytes)


class Outcome(NamedTuple):
    """How one block of a batch fared.

    Attributes:
        key: the block's key.
        status: ``"hit"`` or ``"miss"`` for loads, ``"stored"`` or ``"present"`` (it was
            there already, nothing moved) for stores, ``"error"`` for either. In metrics also
            ``"cancelled"``.
        error: the exception, when ``status`` is ``"error"``.
    """

    key: BlockKey
    status: str
    error: BaseException | None = None

    @property
    def hit(self) -> bool:
        """True if the block was loaded."""
        return self.status == "hit"

    @property
    def ok(self) -> bool:
        """True unless there was an error; a miss is an answer."""
        return self.error is None
