"""Machines that share a bucket: processes with a directory, names and keys of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from buckets import blocks, name_of, payload_of
from support import content
from wire import Wire

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from s3 import JuiceServer, MotoServer, S3Server

SIZE = 9000
KEYS = ["a", "b", "c"]
PROGRAM = """
import asyncio, json, sys
import kvgds

settings = json.loads(sys.argv[1])

async def main():
    config = kvgds.EngineConfig(
        namespace=kvgds.Namespace("test", "1"), tiers=settings["tiers"], bounce_bytes=2 << 20
    )
    async with kvgds.open_engine(config) as engine:
        for key, text in settings["stores"].items():
            await engine.store(key.encode(), bytes.fromhex(text))
        found = {}
        for key in settings["loads"]:
            memory = bytearray(settings["size"])
            found[key] = memory.hex() if await engine.load(key.encode(), memory) else None
    print(json.dumps(found))

asyncio.run(main())
"""


class Machine:
    """Runs engines with a bucket behind a wire, and a directory in front of it unless told not."""

    def __init__(self, server: S3Server, wire: Wire, root: Path | None) -> None:
        self.server = server
        self.wire = wire
        self.root = root

    def run(
        self,
        bucket: str,
        *,
        stores: list[str] | None = None,
        loads: list[str] | None = None,
        before: tuple[str, ...] = (),
        environ: dict[str, str] | None = None,
        **changes: Any,
    ) -> dict[str, bytes | None]:
        """What an engine of its own found that stored and loaded these keys."""
        far = {
            "bucket": bucket,
            "endpoint": self.wire.endpoint,
            "access_key": self.server.access_key,
            "secret_key": self.server.secret_key,
            "retries": 0,
            **changes,
        }
        near = {"root": str(self.root), "capacity_bytes": 16 << 20}
        settings = {
            "tiers": [far] if self.root is None else [near, far | {"write": "through"}],
            "stores": {key: content(key.encode(), SIZE).hex() for key in stores or ()},
            "loads": loads or [],
            "size": SIZE,
        }
        clean = {name: text for name, text in os.environ.items() if not name.startswith("AWS_")}
        ended = subprocess.run(
            [*before, sys.executable, "-c", PROGRAM, json.dumps(settings)],
            env=clean | {"HOME": "/nowhere"} | (environ or {}),
            stdout=subprocess.PIPE,
            text=True,
            timeout=50,
            check=True,
        )
        found = json.loads(ended.stdout)
        return {key: text if text is None else bytes.fromhex(text) for key, text in found.items()}


def contents(*keys: str) -> dict[str, bytes]:
    return {key: content(key.encode(), SIZE) for key in keys}


def names(*keys: str) -> dict[str, bytes]:
    return {name_of(key.encode()): content(key.encode(), SIZE) for key in keys}


def there(server: S3Server, bucket: str) -> dict[str, bytes | None]:
    return {name: payload_of(whole) for name, whole in blocks(server, bucket).items()}


@pytest.fixture
def wire(s3: JuiceServer) -> Iterator[Wire]:
    with Wire(s3.host, s3.port) as wire:
        yield wire


@pytest.fixture(params=["nixl", "obstore"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_two_machines_see_each_others_blocks(s3: JuiceServer, wire: Wire, tmp_path: Path) -> None:
    bucket = s3.make_bucket()
    one, other = (Machine(s3, wire, tmp_path / name) for name in ("one", "other"))
    assert one.run(bucket, stores=["a", "b"]) == {}
    assert other.run(bucket, stores=["c"], loads=["a", "d"]) == contents("a") | {"d": None}
    assert one.run(bucket, loads=KEYS) == contents(*KEYS)
    wire.refuse()  # what they have of each other they keep
    assert one.run(bucket, loads=KEYS) == contents(*KEYS)
    assert other.run(bucket, loads=["a", "b"]) == contents("a") | {"b": None}


# --- who asks whom ------------------------------------------------------------------------------


def test_a_session_token_goes_along(moto_s3: MotoServer, backend: str) -> None:
    """Moto takes any; what counts is what each request says."""
    token = "the-token"  # noqa: S105 - of nobody
    with Wire(moto_s3.host, moto_s3.port) as wire:
        bucket = moto_s3.make_bucket()
        machine = Machine(moto_s3, wire, None)
        machine.run(bucket, stores=["a"], backend=backend, session_token=token)
        assert {r.headers.get("x-amz-security-token") for r in wire.seen} == {token}
        assert there(moto_s3, bucket) == names("a")


def test_keys_of_the_settings_go_before_the_environments(
    s3: JuiceServer, wire: Wire, backend: str
) -> None:
    environ = {
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_SESSION_TOKEN": "none",
    }
    bucket = s3.make_bucket()
    Machine(s3, wire, None).run(bucket, stores=["a"], backend=backend, environ=environ)
    assert there(s3, bucket) == names("a")


@pytest.mark.parametrize("where", ["environment", "file"])
def test_keys_by_the_usual_chain(
    s3: JuiceServer, wire: Wire, tmp_path: Path, backend: str, where: str
) -> None:
    path = tmp_path / "credentials"
    keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
    lines = [f"{name.lower()} = {text}" for name, text in keys.items()]
    path.write_text("\n".join(["[other]", "region = x", "[default]", *lines]))
    environ = keys if where == "environment" else {"AWS_SHARED_CREDENTIALS_FILE": str(path)}
    bucket = s3.make_bucket()
    Machine(s3, wire, None).run(
        bucket, stores=["a"], backend=backend, environ=environ, access_key=None, secret_key=None
    )
    assert there(s3, bucket) == names("a")


@pytest.mark.skipif(os.geteuid() != 0, reason="names of its own take root")
def test_the_bucket_in_the_hosts_name(moto_s3: MotoServer, tmp_path: Path, backend: str) -> None:
    bucket = moto_s3.make_bucket()
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {bucket}.localhost\n")
    bind = 'mount --bind "$0" /etc/hosts && exec "$@"'
    with Wire(moto_s3.host, moto_s3.port) as wire:
        found = Machine(moto_s3, wire, None).run(
            bucket,
            stores=["a"],
            loads=["a"],
            before=("unshare", "--mount", "sh", "-c", bind, str(hosts)),
            backend=backend,
            endpoint=wire.endpoint.replace("127.0.0.1", "localhost"),
            addressing="virtual",
        )
        assert found == contents("a")
        assert {r.headers["host"] for r in wire.seen} == {f"{bucket}.localhost:{wire.port}"}
        assert not any(bucket in r.target for r in wire.seen)
        assert there(moto_s3, bucket) == names("a")
