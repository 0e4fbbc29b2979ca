"""What tests of object tiers share: settings, and side doors into a bucket by boto3 and hashlib."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from kvgds import ObjectTier
from support import NAMESPACE, PAGE, digest, image

if TYPE_CHECKING:
    from kvgds import Namespace
    from s3 import S3Server


def settings(server: S3Server, bucket: str, **changes: Any) -> ObjectTier:
    """An object tier in a bucket, with these changes."""
    given = {
        "bucket": bucket,
        "endpoint": server.endpoint,
        "region": server.region,
        "access_key": server.access_key,
        "secret_key": server.secret_key,
    }
    return ObjectTier(**{**given, **changes})


def name_of(key: bytes, namespace: Namespace = NAMESPACE, prefix: str = "") -> str:
    """The name of a block's object, as docs/format.md says."""
    name = hashlib.blake2b(key, digest_size=20).hexdigest()
    return f"{prefix}{digest(namespace).hex()}/{name[:2]}/{name}.kv"


def payload_of(found: bytes | None) -> bytes | None:
    """The payload in an object."""
    return None if found is None else found[PAGE : PAGE + int.from_bytes(found[40:48], "little")]


def blocks(server: S3Server, bucket: str) -> dict[str, bytes]:
    """Name and image of each block in a bucket, but for what was put away."""
    names = server.names(bucket)
    there = [name for name in names if name.endswith(".kv") and "quarantine/" not in name]
    found = {name: server.get(bucket, name) for name in there}
    return {name: whole for name, whole in found.items() if whole is not None}


def put(
    server: S3Server, bucket: str, key: bytes, payload: bytes, namespace: Namespace = NAMESPACE
) -> None:
    """Put a block there as the tier would have."""
    server.put(bucket, name_of(key, namespace), image(namespace, key, 0, payload))


def spoil(server: S3Server, bucket: str, name: str, at: int = PAGE) -> None:
    """Flip the bits of one byte of an object."""
    content = bytearray(server.get(bucket, name) or b"")
    content[at] ^= 0xFF
    server.put(bucket, name, bytes(content))
