"""What holds for every test: kvgds may not block the event loop, and GPU tests need a GPU.

Where there should be one, `KVGDS_REQUIRE_GPU=1` lets none of them be skipped. For those that want
one there are S3 servers, see tests/s3.py; a test shares `s3` and `moto_s3` with all others, each in
buckets of its own, and has `own_s3` for itself, to stop and kill it.

Time limits are in pyproject.toml, `[tool.pytest]`.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from blockbuster import BlockBuster, BlockBusterFunction

import gpus
from kvgds.transport.agent import Agent

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from s3 import JuiceServer, MotoServer

# Only a call with a frame of this package below it is an error: a test may block as it likes.
WATCHED = "kvgds"

# blockbuster knows time.sleep, locks, sockets, sqlite and half of os. These are what else kvgds may
# call that can wait for a disk. After `from os import fsync` it would go unseen: write os.fsync.
OPENS = ("builtins.open", "io.open", "os.open")
FILE_CALLS = (
    "os.fdatasync",
    "os.fsync",
    "os.ftruncate",
    "os.posix_fallocate",
    "os.pread",
    "os.preadv",
    "os.pwrite",
    "os.pwritev",
    "sqlite3.connect",
)


@pytest.fixture(scope="session")
def loop_guard() -> BlockBuster:
    """Everything that kvgds may not call on a thread that is running an event loop."""
    guard = BlockBuster(WATCHED)
    for name in OPENS:
        guard.functions[name] = BlockBusterFunction(
            None,
            name,
            scanned_modules=WATCHED,
            # An import reads files too, but once; blockbuster forgives it its own calls likewise.
            can_block_functions=[("<frozen importlib._bootstrap>", {"_find_and_load"})],
            # asyncio's subprocesses wrap pipes and open /dev/null; neither waits for a disk.
            can_block_predicate=lambda file, *_, **__: isinstance(file, int) or file == os.devnull,
        )
    for name in FILE_CALLS:
        guard.functions[name] = BlockBusterFunction(None, name, scanned_modules=WATCHED)
    # For microseconds, so that other threads get the interpreter lock from a loop that never waits.
    guard.functions["time.sleep"].can_block_in("kvgds/handover.py", "_look")
    # Every way into NIXL: each may take the agent's lock, and some hold the GIL.
    for name in ("__init__", *(name for name in vars(Agent) if not name.startswith("_"))):
        guard.functions[f"Agent.{name}"] = BlockBusterFunction(Agent, name, scanned_modules=WATCHED)
    return guard


@pytest.fixture(autouse=True)
def never_block_the_loop(loop_guard: BlockBuster) -> Iterator[None]:
    """Raise BlockingError where kvgds waits on the event loop's thread; other threads may wait."""
    loop_guard.activate()
    try:
        yield
    finally:
        loop_guard.deactivate()


@pytest.fixture(autouse=True)
def no_callback_raises(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What a callback of the event loop raises nobody awaits: the loop logs it, and goes on."""
    yield
    texts = [each.getMessage() for when in ("setup", "call") for each in caplog.get_records(when)]
    assert [text for text in texts if text.startswith("Exception in callback")] == []


@pytest.fixture
def hasty_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that others have locked is given up soon."""
    monkeypatch.setattr("kvgds.tiers.index.WAIT_S", 0.05)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JuiceServer]:
    """A server of S3 that checks signatures."""
    from s3 import JuiceServer  # noqa: PLC0415 - boto3 is slow to import, and few tests want it

    with JuiceServer(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def moto_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MotoServer]:
    """A server of S3 that knows all of its present API."""
    from s3 import MotoServer  # noqa: PLC0415 - as above

    with MotoServer(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture
def own_s3(tmp_path: Path) -> Iterator[JuiceServer]:
    """A server like `s3` that no other test uses."""
    from s3 import JuiceServer  # noqa: PLC0415 - as above

    with JuiceServer(tmp_path / "s3") as server:
        yield server


def pytest_configure() -> None:
    """Let interrupts reach the children that are to be interrupted: a shell's `&` ignores them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where the NVIDIA driver shows no device."""
    if Path("/dev/nvidiactl").exists():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where a GPU is required, a test of it that was skipped, for whatever reason, has failed."""
    report = yield
    required = os.environ.get("KVGDS_REQUIRE_GPU", "0") not in ("", "0")
    if required and report.skipped and item.get_closest_marker("gpu"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"KVGDS_REQUIRE_GPU is set, but: {why}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the tests of GPU memory ran on."""
    lines = gpus.summary()
    if lines:
        terminalreporter.section("GPU")
        for line in lines:
            terminalreporter.write_line(line)
