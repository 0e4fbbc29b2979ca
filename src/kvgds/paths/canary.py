"""The trial of GPUDirect Storage: a process of its own, asked by ``gds``.

Reads one JSON object and prints one, on its last line: what it saw, and why not, if not.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import secrets
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from kvgds.blocks import PAGE
from kvgds.errors import PathUnavailable
from kvgds.memory import Arena, Span
from kvgds.memory.cufile import CufileError, cufile
from kvgds.memory.device import CudaError, cuda
from kvgds.transport import File
from kvgds.transport.agent import Agent, NixlError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvgds.memory.kernels import Kernels

_NBYTES = (1 << 20) + PAGE
_LOOK_S = 1e-3
_BLOCKS, _BLOCK_BYTES = 8, 512 << 10  # as many as the plugin has threads
_FRAGMENTS = tuple(PAGE << i for i in (5, 4, 3, 2, 0))
_ROUNDS = 3
_WORTH_IT = 0.9  # of the time: gathering takes some of the GPU's memory, and of its own time


class _Gpu:
    """Memory of the first GPU, as an agent wants to know it."""

    device = 0
    closed = False

    def __init__(self, address: int, nbytes: int) -> None:
        self.spans = (Span(address, nbytes),)
        self.address = address


def try_gds(job: dict[str, Any]) -> tuple[int, list[str]]:
    """Up to which size of fragments gathering is quicker, and what works.

    Raises the error of whoever said so where something doesn't.
    """
    library, compat = cufile(), job["compat"]
    library.open(compat=compat)
    means = library.means()
    if not compat and not means.real:
        raise PathUnavailable(f"cuFile opened, but only in {means.text}")
    seen = [f"cuFile works by {means.text}"]
    kernels, why = None, "gathering needs CuPy"
    if job["checksums"] or (job["gather_bytes"] and importlib.util.find_spec("cupy") is not None):
        from kvgds.memory.kernels import Kernels  # noqa: PLC0415 - only where CuPy is wanted

        try:
            kernels = Kernels(0)
        except Exception as error:
            if job["checksums"]:
                raise
            why = str(error)
    if job["checksums"]:
        seen.append("the GPU makes checksums that are xxhash's")
    agent = Agent("canary", ("uring", "aio"))
    agent.add_gpu()
    with ExitStack() as stack:
        fd = _file(job, stack)
        file = File(fd)
        stack.callback(agent.forget, file)
        agent.register(file, far=True)
        _round_trip(agent, fd)
        mode = "O_DIRECT" if job["direct_io"] else "page cache"
        size = f"{_NBYTES:,} bytes went from a GPU to a file in {job['root']} and back"
        seen.append(f"{size} ({mode})")
        if not job["gather_bytes"]:
            kernels, why = None, "gather_bytes=0 was asked for"
        if kernels is None:
            return 0, [*seen, f"scattered blocks go a fragment at a time: {why}"]
        gather, told = _measure(agent, kernels, fd, time.monotonic() + job["measure_s"])
    return gather, [*seen, told]


def _memory(agent: Agent, nbytes: int, stack: ExitStack) -> _Gpu:
    """Registered memory, until the stack ends."""
    runtime = cuda()
    address = runtime.allocate(0, nbytes)
    stack.callback(runtime.free, 0, address)
    gpu = _Gpu(address, nbytes)
    stack.callback(agent.forget, gpu)
    agent.register(gpu, far=True)
    return gpu


def _round_trip(agent: Agent, fd: int) -> None:
    runtime, data = cuda(), secrets.token_bytes(_NBYTES)
    arena = Arena(2 * _NBYTES)
    arena.bytes[:_NBYTES] = data
    host, back = arena.span.address, arena.span.address + _NBYTES
    with ExitStack() as stack:
        sender, receiver = (_memory(agent, _NBYTES, stack) for _ in range(2))
        runtime.copy_now(sender.address, host, _NBYTES)
        _move(agent, [(sender.address, 0, _NBYTES)], fd, write=True)
        if os.preadv(fd, [arena.bytes[_NBYTES:]], 0) != _NBYTES or arena.bytes[_NBYTES:] != data:
            raise PathUnavailable("the file holds other bytes than the GPU sent")
        arena.bytes[_NBYTES:] = bytes(_NBYTES)
        _move(agent, [(receiver.address, 0, _NBYTES)], fd, write=False)
        runtime.copy_now(back, receiver.address, _NBYTES)
        if arena.bytes[_NBYTES:] != data:
            raise PathUnavailable("the GPU received other bytes than the file holds")


def _file(job: dict[str, Any], stack: ExitStack) -> int:
    path = job["path"]
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(path, flags | (os.O_DIRECT if job["direct_io"] else 0), 0o600)
    stack.callback(os.unlink, path)
    stack.callback(os.close, fd)
    os.posix_fallocate(fd, 0, _NBYTES)
    return fd


class _Scattered:
    """Blocks in fragments, of one size at a time, by either way to a file and back."""

    def __init__(self, agent: Agent, kernels: Kernels, fd: int, stack: ExitStack) -> None:
        self._agent, self._kernels, self._fd = agent, kernels, fd
        self._stream = cuda().stream(0)
        self._blocks = _memory(agent, 2 * _BLOCKS * _BLOCK_BYTES, stack).address
        self._room = _memory(agent, _BLOCKS * _BLOCK_BYTES, stack).address

    def rows(self, nbytes: int) -> list[tuple[int, int, int]]:
        """Every fragment, each with a gap behind it: address, file offset, bytes."""
        every = range(0, _BLOCKS * _BLOCK_BYTES, nbytes)
        return [(self._blocks + 2 * at, at, nbytes) for at in every]

    def directly(self, nbytes: int, *, write: bool) -> None:
        """Move each fragment."""
        _move(self._agent, self.rows(nbytes), self._fd, write=write, pause=0.0)

    def gathered(self, nbytes: int, *, write: bool) -> None:
        """Move each block, by way of the staging buffer."""
        pairs = [(self._room + at, address) for address, at, _ in self.rows(nbytes)]
        wholes = range(0, _BLOCKS * _BLOCK_BYTES, _BLOCK_BYTES)
        rows = [(self._room + at, at, _BLOCK_BYTES) for at in wholes]
        if write:
            self._copy([(room, block, nbytes) for room, block in pairs])
        _move(self._agent, rows, self._fd, write=write, pause=0.0)
        if not write:
            self._copy([(block, room, nbytes) for room, block in pairs])

    def _copy(self, copies: list[tuple[int, int, int]]) -> None:
        launch = self._kernels.copy(copies, self._stream)
        while not launch.done:
            pass


def _measure(agent: Agent, kernels: Kernels, fd: int, until: float) -> tuple[int, str]:
    """From long fragments to shorter ones, until gathering them is quicker or time is up.

    Still shorter ones are then worth it as well.
    """
    most, seen = 0, []
    try:
        os.posix_fallocate(fd, 0, _BLOCKS * _BLOCK_BYTES)
        with ExitStack() as stack:
            scattered = _Scattered(agent, kernels, fd, stack)
            for nbytes in _FRAGMENTS:
                ways = (scattered.directly, scattered.gathered)
                times = _race(ways, nbytes, until)
                if times is None:
                    seen.append("then time was up (probe_timeout_s)")
                    break
                direct, gathered = times
                seen.append(f"{nbytes >> 10} KiB {direct * 1e3:.2f} and {gathered * 1e3:.2f}")
                if gathered <= _WORTH_IT * direct:
                    most = nbytes
                    break
    except PathUnavailable:  # storage fails: that is no question of fragments
        raise
    except Exception as error:  # noqa: BLE001 - no room on the GPU, for one: CuPy has its own errors
        seen.append(f"not measured: {error}")
    rule = "scattered blocks go a fragment at a time"
    if most:
        rule = f"blocks whose fragments are {most:,} bytes or less are gathered on the GPU"
    size = f"{_BLOCKS * _BLOCK_BYTES >> 20} MiB to the file and back"
    return most, f"{rule}; {size}, in ms by fragments and gathered: {', '.join(seen)}"


def _race(
    ways: tuple[Callable[..., None], ...], nbytes: int, until: float
) -> tuple[float, ...] | None:
    """What each way takes at best, there and back, in turns. None: there was no time for it."""
    best: dict[tuple[int, bool], float] = {}
    for _ in range(_ROUNDS):
        for i, way in enumerate(ways):
            for write in (True, False):
                started = time.monotonic()
                if started > until:
                    return None
                way(nbytes, write=write)
                took = time.monotonic() - started
                best[i, write] = min(took, best.get((i, write), took))
    return tuple(best[i, True] + best[i, False] for i in range(len(ways)))


def _move(
    agent: Agent,
    rows: list[tuple[int, int, int]],
    fd: int,
    *,
    write: bool,
    pause: float = _LOOK_S,
) -> None:
    """Move rows (address, file offset, bytes)."""
    local = [(address, nbytes, _Gpu.device) for address, _, nbytes in rows]
    remote = [(offset, nbytes, fd) for _, offset, nbytes in rows]
    request = agent.post(local, remote, write=write, far=True)
    while not agent.check(request):
        if pause:
            time.sleep(pause)
    agent.release(request)
    if request.error is not None:
        way = "to a file" if write else "from a file"
        raise PathUnavailable(f"NIXL moved nothing {way}: {request.error}")


def main() -> None:
    """Answer one question."""
    job = json.loads(sys.stdin.read())
    answer: dict[str, object] = {"gather": 0, "evidence": [], "refused": ""}
    try:
        answer["gather"], answer["evidence"] = try_gds(job)
    except (PathUnavailable, CufileError, CudaError, NixlError, ImportError, OSError) as error:
        answer["refused"] = str(error)
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    sys.stdout.flush()
    ctypes.CDLL(None)._exit(0)  # noqa: SLF001 - the C function: drivers may hang in their own exits


if __name__ == "__main__":
    main()
