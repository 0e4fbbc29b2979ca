"""Real S3 servers for tests, each a process of its own, and a way into buckets that is not ours.

``JuiceServer`` is `juicefs gateway`: the S3 front end of MinIO (of February 2021) over a directory.
It checks signatures. What it does otherwise than S3 does now:

* It ignores conditions of a PUT (If-None-Match, If-Match: it overwrites) and additional checksums
  (x-amz-checksum-*); of Content-MD5 it takes care.
* DeleteObjects needs Content-MD5, which boto3 no longer sends, answers without naming the keys,
  and leaves empty folders in the listing, as `name/`. DeleteObject does none of that. obstore uses
  only the former, unless its setting `disable_bulk_delete` is true.
* Its buckets are directories: where `a/b` is an object, neither `a` nor `a/b/c` can be (500).
* A page of a listing has 4,500 names unless the caller wants fewer.

``MotoServer`` is moto's: Python, in memory, empty after each start. It checks no signatures, knows
conditions and checksums, and answers DeleteObjects as S3 does.

A server runs from ``start`` until ``stop`` or ``kill``, and starts again on the same port. That
port stays reserved, so that nobody else gets it meanwhile: who connects to a stopped server is
refused. The thread that starts a server reads its output until it ends; the kernel kills the server
with that thread, so none outlives the process that started it, whatever happens to that.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import uuid
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from wire import HOST, reserve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

START_S = 20.0
STOP_S = 10.0
JUICEFS = Path(sys.executable).with_name("juicefs")


class S3Server(ABC):
    """A server of S3 on `endpoint` that keeps what it needs in the directory `where`."""

    access_key = "kvgds-tests"
    secret_key = "kvgds-tests-secret"  # noqa: S105 - of a server that only tests can reach
    region = "us-east-1"
    host = HOST
    ready_when: ClassVar[str]  # what the line says that it writes when it can be used

    def __init__(self, where: Path) -> None:
        self._where = where

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opened:
            self._where.mkdir(parents=True, exist_ok=True)
            opened.callback(shutil.rmtree, self._where)
            self.port = opened.enter_context(reserve()).getsockname()[1]
            self.endpoint = f"http://{HOST}:{self.port}"
            self._prepare()
            opened.callback(self.stop)
            self.start()
            self._client = opened.enter_context(contextlib.closing(self.client()))
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()

    # --- the process ------------------------------------------------------------------------

    def start(self) -> None:
        """Start it, unless it runs, and wait until it can be used."""
        if self.running:
            return
        self.log: deque[str] = deque(maxlen=1000)
        self._ready: Future[subprocess.Popen[str]] = Future()
        self._thread = threading.Thread(target=self._attend, name="s3-server", daemon=True)
        self._thread.start()
        self._process = self._ready.result(START_S)

    def stop(self) -> None:
        """End it in order, if it runs; then connections to it are refused."""
        self._end(kill=False)

    def kill(self) -> None:
        """End it as it stands, if it runs."""
        self._end(kill=True)

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """How it ended when it was last started, None while it runs; -N: by signal N."""
        return self._process.returncode

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return hasattr(self, "_thread") and self._thread.is_alive()

    def _attend(self) -> None:
        """Start the server, and read what it writes until it ends."""
        try:
            command = ["setpriv", "--pdeathsig", "KILL", "--", *self._command()]
            with subprocess.Popen(
                command,
                env={**os.environ, "HOME": str(self._where), **self._settings()},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is for the tests; their teardown still needs it
            ) as process:
                self._read(process)
            if not self._ready.done():
                raise RuntimeError(f"{command} ended:\n{''.join(self.log)}")
        except Exception as error:  # noqa: BLE001 - for the one who waits in `start`
            self._ready.set_exception(error)

    def _read(self, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            self.log.append(line)
            if self.ready_when in line and not self._ready.done():
                self._ready.set_result(process)

    def _end(self, *, kill: bool) -> None:
        if not self.running:
            return
        process = self._process
        process.kill() if kill else process.terminate()
        self._thread.join(STOP_S)
        if self._thread.is_alive():
            process.kill()
            self._thread.join()
            raise TimeoutError(f"it had to be killed:\n{''.join(self.log)}")

    def _prepare(self) -> None:  # noqa: B027 - most need nothing
        """Do what has to be done once, before it is started."""

    def _settings(self) -> Mapping[str, str]:
        """Its environment, besides our own."""
        return {}

    @abstractmethod
    def _command(self) -> Sequence[str]:
        """What runs it."""

    # --- side doors -------------------------------------------------------------------------

    def client(self, **changes: Any) -> Any:
        """A boto3 client of it that tries once and waits 10 s; with other arguments. Close it.

        `config` is merged into ours. Through a wire: ``client(endpoint_url=wire.endpoint)``.
        """
        ours = Config(
            signature_version="s3v4",
            connect_timeout=10,
            read_timeout=10,
            retries={"mode": "standard", "total_max_attempts": 1},
            # Else it makes a checksum, and through TLS sends it in a trailer, which few understand.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"},
            proxies={},
        )
        arguments = {
            "endpoint_url": self.endpoint,
            "aws_access_key_id": self.access_key,
            "aws_secret_access_key": self.secret_key,
            "region_name": self.region,
        }
        arguments["config"] = ours.merge(changes.pop("config", None) or Config())
        return boto3.client("s3", **{**arguments, **changes})

    def make_bucket(self) -> str:
        """Make an empty bucket and return its name, which no other has."""
        name = f"kvgds-{uuid.uuid4().hex}"
        self._client.create_bucket(Bucket=name)
        return name

    def names(self, bucket: str) -> list[str]:
        """The names of all objects of a bucket, in the order of the listing."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def objects(self, bucket: str) -> dict[str, bytes]:
        """All objects of a bucket."""
        return {name: self._body(bucket, name) for name in self.names(bucket)}

    def get(self, bucket: str, name: str) -> bytes | None:
        """An object's content, None if there is no such object."""
        try:
            return self._body(bucket, name)
        except ClientError as error:
            if error.response["Error"]["Code"] != "NoSuchKey":
                raise
            return None

    def put(self, bucket: str, name: str, content: bytes) -> None:
        """Make an object, or replace it."""
        self._client.put_object(Bucket=bucket, Key=name, Body=content)

    def delete(self, bucket: str, name: str) -> None:
        """Delete an object; fine if there is none."""
        self._client.delete_object(Bucket=bucket, Key=name)

    def _body(self, bucket: str, name: str) -> bytes:
        content: bytes = self._client.get_object(Bucket=bucket, Key=name)["Body"].read()
        return content


class JuiceServer(S3Server):
    """MinIO's front end over a directory; what it stores outlives `stop` and `kill`."""

    ready_when = "IAM initialization complete"

    def _prepare(self) -> None:
        command = [str(JUICEFS), "--no-agent", "format", "--storage", "file", "--trash-days", "0"]
        made = subprocess.run(
            [*command, "--bucket", f"{self._where}/data/", self._meta(), "kvgds"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if made.returncode != 0:
            raise RuntimeError(made.stdout)

    def _meta(self) -> str:
        return f"sqlite3://{self._where}/meta.db"

    def _settings(self) -> Mapping[str, str]:
        return {"MINIO_ROOT_USER": self.access_key, "MINIO_ROOT_PASSWORD": self.secret_key}

    def _command(self) -> Sequence[str]:
        # Nothing that runs or reports by itself, no cache; ETags and metadata as S3 has them.
        return [
            *(str(JUICEFS), "--no-agent", "gateway"),
            *("--no-usage-report", "--no-bgjob", "--backup-meta", "0", "--metrics", f"{HOST}:0"),
            *("--cache-size", "0", "--attr-cache", "0", "--dir-entry-cache", "0"),
            *("--multi-buckets", "--keep-etag", "--object-meta"),
            *(self._meta(), f"{HOST}:{self.port}"),
        ]


class MotoServer(S3Server):
    """moto's fake of S3; `stop` and `kill` lose all that it has."""

    ready_when = "Running on"

    def _command(self) -> Sequence[str]:
        return [sys.executable, "-I", "-m", "moto.server", "-H", HOST, "-p", str(self.port)]
