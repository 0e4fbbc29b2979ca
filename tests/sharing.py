"""What tests of the files layout share: engines, side doors, and processes on one directory.

The side doors look into the directory by plain system calls; they use none of the code under
test, so that they can tell on it. Run as a program, this file is one of the processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import random
import signal
import sys
import time
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvgds import EngineConfig, FileTier, Namespace, TransferTimeout
from kvgds.engine import Engine
from kvgds.testing import HeldTransport, skip_time
from kvgds.transport import NixlTransport
from support import NAMESPACE, PAGE, content, digest, read_at, write_at

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence

    from faults import FaultyDisk

NBYTES = 15 * PAGE - 100
IMAGE = 16 * PAGE  # what a block of NBYTES takes
HOUR = 3600.0


# --- engines --------------------------------------------------------------------------------


def settings(root: Path, **changes: Any) -> FileTier:
    """Settings of a files tier, with these changes."""
    return FileTier(**{"root": root, "capacity_bytes": 64 * IMAGE, "layout": "files", **changes})


ENGINES: list[Sharer] = []  # that are open in this process


class Sharer(Engine):
    """An engine whose transfers can be held."""

    def __init__(self, config: EngineConfig) -> None:
        self.held = HeldTransport(NixlTransport())
        super().__init__(config, self.held)


@contextlib.asynccontextmanager
async def opened(
    root: Path, namespace: Namespace = NAMESPACE, **changes: Any
) -> AsyncIterator[Sharer]:
    """An engine on `root`; when the last one closes, no file is left open."""
    tier = settings(root, **changes)
    config = EngineConfig(
        namespace=namespace, tiers=(tier,), bounce_bytes=4 << 20, timeout_s=20, drain_timeout_s=20
    )
    engine = Sharer(config)
    await engine.open()
    ENGINES.append(engine)
    try:
        yield engine
    finally:
        engine.held.release()
        await engine.aclose()
        ENGINES.remove(engine)
    assert ENGINES or not open_files(root)


def open_files(root: Path) -> list[str]:
    """Blocks, whole or not, that this process has open."""
    found = []
    folders = (root / "tmp", root / digest(NAMESPACE).hex())
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = Path(os.readlink(f"/proc/self/fd/{fd}"))
            if any(target.is_relative_to(folder) for folder in folders):
                found.append(str(target))
    return found


async def put(engine: Engine, *keys: bytes) -> None:
    """Store the content of these keys, one after the other."""
    for key in keys:
        assert await engine.store(key, bytearray(content(key, NBYTES)))


async def get(engine: Engine, key: bytes, nbytes: int = NBYTES) -> bool:
    """Load a block; it is right or not there."""
    memory = bytearray(nbytes)
    hit = await engine.load(key, memory)
    assert not hit or memory == content(key, nbytes)
    return hit


async def is_late(disk: FaultyDisk, storing: Awaitable[bool]) -> None:
    """Let a store's deadline pass once it has come to where the disk hangs."""
    task = asyncio.ensure_future(storing)
    await asyncio.to_thread(disk.wait_waiting, 1)
    skip_time(HOUR)
    (error,) = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(error, TransferTimeout)


async def there(engine: Engine, keys: Sequence[bytes]) -> list[bytes]:
    """Those of the keys that load."""
    return [key for key in keys if await get(engine, key)]


async def failure(engine: Engine, key: bytes, nbytes: int = NBYTES) -> BaseException | None:
    """What a load fails with."""
    (outcome,) = await engine.load_many([(key, bytearray(nbytes))])
    return outcome.error


# --- side doors -----------------------------------------------------------------------------


def path_of(root: Path, key: bytes, namespace: Namespace = NAMESPACE) -> Path:
    """Where a block has to lie."""
    name = blake2b(key, digest_size=20).hexdigest()
    return root / digest(namespace).hex() / name[:2] / f"{name}.kv"


def temporaries(root: Path) -> list[str]:
    """Names of what is being written; not the trial of an engine that opens just now."""
    return sorted(name for name in os.listdir(root / "tmp") if not name.startswith("."))


def ledger(root: Path) -> int:
    """What the processes agree that they use."""
    return int((root / "ledger").read_text())


def write_ledger(root: Path, nbytes: int) -> None:
    """Let them all be wrong about it."""
    (root / "ledger").write_text(f"{nbytes:020d}\n")


def taken(root: Path, *, reserved: bool = True) -> int:
    """Bytes on disk of blocks and quarantined files; and what temporaries reserve, or take."""
    sizes = {}
    for name in temporaries(root):
        with contextlib.suppress(FileNotFoundError):
            status = (root / "tmp" / name).stat()
            sizes[status.st_ino] = int(name.rpartition(".")[2]) if reserved else status.st_size
    for path in [*root.glob("*/*/*.kv"), *root.glob("quarantine/*")]:
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            sizes.setdefault(status.st_ino, status.st_size)
    return sum(sizes.values())


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """With the ledger locked: nobody reserves or removes anything meanwhile."""
    fd = os.open(root / "ledger", os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def make_old(path: Path, seconds: float) -> None:
    """Let a file have been used so long ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def owner(pid: int, *, boot: str = "", start: int = 0) -> str:
    """How a process begins the names of its temporaries; of this boot if none is given."""
    boot = boot or Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    stat = Path(f"/proc/{pid}/stat")
    begun = start or int(stat.read_text().rpartition(")")[2].split()[19])
    spaces = [Path(f"/proc/self/ns/{kind}") for kind in ("pid", "time")]
    numbers = "".join(str(space.stat().st_ino) for space in spaces if space.exists())
    return f"{boot}.{numbers}.{pid}.{begun}"


def leave(root: Path, name: str, nbytes: int = IMAGE) -> str:
    """Put a temporary there, as its owner would have."""
    whole = f"{name}.{random.randbytes(8).hex()}.{nbytes}"
    (root / "tmp" / whole).write_bytes(bytes(100))
    return whole


def flip(path: Path, at: int) -> None:
    """Flip the bits of one byte."""
    (byte,) = read_at(path, at, 1)
    write_at(path, at, bytes([byte ^ 0xFF]))


# --- processes ------------------------------------------------------------------------------


class Process:
    """This file as a program, sharing the directory; its lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, role: str, root: Path, seed: int) -> Process:
        pipe = asyncio.subprocess.PIPE
        arguments = [__file__, role, os.fspath(root), str(seed)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdin=pipe, stdout=pipe
        )
        return cls(process)

    async def line(self) -> str:
        """Its next line; empty at its end."""
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode().strip()

    async def end(self) -> list[str]:
        """Let it go on to its end; its last lines."""
        out, _ = await self._process.communicate(b"\n")
        assert self._process.returncode == 0
        return out.decode().split()

    async def kill(self) -> list[str]:
        """Kill it as it stands; the lines it still got out."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        out, _ = await self._process.communicate()
        return out.decode().split()


@contextlib.asynccontextmanager
async def process(role: str, root: Path, seed: int = 0) -> AsyncIterator[Process]:
    """A process that doesn't outlive the test."""
    child = await Process.start(role, root, seed)
    try:
        yield child
    finally:
        await child.kill()


def say(line: object) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def act_storing(root: Path, seed: int) -> None:
    """Store for ever, eight at a time, and tell what has been acknowledged."""
    async with opened(root, capacity_bytes=1 << 30) as engine:
        for start in range(0, 1 << 20, 8):
            keys = [b"%d-%d" % (seed, n) for n in range(start, start + 8)]
            async for outcome in engine.store_each([(k, content(k, NBYTES)) for k in keys]):
                assert outcome.status == "stored"
                say(outcome.key.decode())


async def act_holding(root: Path, seed: int) -> None:
    """Be in the middle of three stores until told to go on."""
    async with opened(root, capacity_bytes=1 << 30) as engine:
        engine.held.hold("landing")
        keys = [b"held-%d-%d" % (seed, n) for n in range(3)]
        blocks = [(key, content(key, NBYTES)) for key in keys]
        storing = asyncio.ensure_future(engine.store_many(blocks, timeout_s=600))
        await engine.held.wait_held("landing", 3)
        say("held")
        await asyncio.to_thread(sys.stdin.readline)
        engine.held.release()
        for outcome in await storing:
            say(outcome.status)


STRESS_CAPACITY = 12 * IMAGE


async def act_mixing(root: Path, seed: int) -> None:
    """Store, load and delete at random; whatever hits is right, and nothing fails."""
    dice = random.Random(seed)
    sizes = {b"%d" % n: 1 + n * 1237 % NBYTES for n in range(48)}
    counts = dict.fromkeys(("stored", "present", "hit", "miss"), 0)
    async with opened(root, capacity_bytes=STRESS_CAPACITY) as engine:
        for step in range(150):
            keys = dice.sample(sorted(sizes), dice.randint(1, 4))
            memory = [bytearray(sizes[key]) for key in keys]
            if dice.random() < 0.1:
                await engine.delete(keys[0])
                outcomes = []
            elif dice.random() < 0.5:
                outcomes = await engine.store_many(
                    [(key, content(key, sizes[key])) for key in keys]
                )
            else:
                outcomes = await engine.load_many(list(zip(keys, memory, strict=True)))
                for outcome, got in zip(outcomes, memory, strict=True):
                    assert not outcome.hit or got == content(outcome.key, len(got))
            for outcome in outcomes:
                assert outcome.error is None, outcome.error
                counts[outcome.status] += 1
            if step % 5 == 0:
                say("step")
    say(json.dumps(counts))


if __name__ == "__main__":
    act = {"storing": act_storing, "holding": act_holding, "mixing": act_mixing}[sys.argv[1]]
    asyncio.run(act(Path(sys.argv[2]), int(sys.argv[3])))
