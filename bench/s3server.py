"""The S3 servers of the benches.

`juicefs`: its gateway, the front end of MinIO over a directory. `memory`: s3memory.py.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST = "127.0.0.1"
READY = "IAM initialization complete"
JUICEFS = Path(sys.executable).with_name("juicefs")
KEYS = {"AWS_ACCESS_KEY_ID": "kvgds-bench", "AWS_SECRET_ACCESS_KEY": "kvgds-bench-secret"}


class Server:
    """One that runs."""

    def __init__(self, endpoint: str, pid: int) -> None:
        self.endpoint = endpoint
        self._stat = Path(f"/proc/{pid}/stat")

    def cpu_seconds(self) -> float:
        """What its threads have used so far."""
        fields = self._stat.read_text("utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def server(kind: str, where: Path) -> Iterator[Server]:
    """Run one on a fresh directory, which goes with it."""
    where.mkdir()
    with _juicefs(where) if kind == "juicefs" else _memory() as started:
        yield started
    shutil.rmtree(where)


@contextmanager
def _juicefs(where: Path) -> Iterator[Server]:
    meta = f"sqlite3://{where}/meta.db"
    environ = {
        **os.environ,
        "HOME": str(where),
        "MINIO_ROOT_USER": KEYS["AWS_ACCESS_KEY_ID"],
        "MINIO_ROOT_PASSWORD": KEYS["AWS_SECRET_ACCESS_KEY"],
    }
    made = [str(JUICEFS), "--no-agent", "format", "--storage", "file", "--trash-days", "0"]
    made += ["--bucket", f"{where}/data/", meta, "kvgds"]
    subprocess.run(made, env=environ, capture_output=True, check=True, process_group=0)
    port = _free_port()
    command = [str(JUICEFS), "--no-agent", "gateway"]
    command += ["--no-usage-report", "--backup-meta", "0", "--metrics", f"{HOST}:0"]
    command += ["--cache-size", "0", "--multi-buckets", "--keep-etag", "--object-meta"]
    with _process([*command, meta, f"{HOST}:{port}"], environ) as process:
        _await_ready(process)
        reader = threading.Thread(target=_read_all, args=(process,), daemon=True)
        reader.start()
        yield Server(f"http://{HOST}:{port}", process.pid)
    reader.join()


@contextmanager
def _memory() -> Iterator[Server]:
    script = str(Path(__file__).with_name("s3memory.py"))
    with _process([sys.executable, script], dict(os.environ)) as process:
        port = int(process.stdout.readline()) if process.stdout else 0
        yield Server(f"http://{HOST}:{port}", process.pid)


@contextmanager
def _process(command: list[str], environ: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run this until the end, ours in any case. Ctrl-C, at which it is still needed, leaves it."""
    with subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "--", *command],  # noqa: S607 - wherever that is
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _await_ready(process: subprocess.Popen[str]) -> None:
    said = []
    for line in process.stdout or ():
        said.append(line)
        if READY in line:
            return
    raise RuntimeError(f"the server ended:\n{''.join(said)}")


def _read_all(process: subprocess.Popen[str]) -> None:
    """Its pipe must not fill up."""
    for _ in process.stdout or ():
        pass


def _free_port() -> int:
    with socket.socket() as held:
        held.bind((HOST, 0))
        return int(held.getsockname()[1])
