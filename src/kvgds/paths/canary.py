"""The trial of GPUDirect Storage: a process of its own, asked by ``gds``.

Reads one JSON object and prints one, on its last line: what it saw, and why not, if not.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import sys
import time
from contextlib import ExitStack
from typing import Any

from kvgds.blocks import PAGE
from kvgds.errors import PathUnavailable
from kvgds.memory import Arena, Span
from kvgds.memory.cufile import CufileError, cufile
from kvgds.memory.device import CudaError, cuda
from kvgds.transport import File
from kvgds.transport.agent import Agent, NixlError

_NBYTES = (1 << 20) + PAGE
_LOOK_S = 1e-3


class _Gpu:
    """Memory of the first GPU, as an agent wants to know it."""

    device = 0

    def __init__(self, address: int, nbytes: int) -> None:
        self.spans = (Span(address, nbytes),)
        self.address = address


def try_gds(job: dict[str, Any]) -> list[str]:
    """What works, in order; where something doesn't, an error of whoever said so."""
    library, compat = cufile(), job["compat"]
    library.open(compat=compat)
    means = library.means()
    if not compat and not means.real:
        raise PathUnavailable(f"cuFile opened, but only in {means.text}")
    seen = [f"cuFile works by {means.text}"]
    if job["checksums"]:
        from kvgds.memory.kernels import Checksums  # noqa: PLC0415 - only where CuPy is wanted

        Checksums(0)
        seen.append("the GPU makes checksums that are xxhash's")
    agent = Agent("canary", ("uring", "aio"))
    agent.add_gpu(job["plugin"])
    _round_trip(agent, job)
    mode = "O_DIRECT" if job["direct_io"] else "page cache"
    seen.append(f"{_NBYTES:,} bytes went from a GPU to a file in {job['root']} and back ({mode})")
    return seen


def _round_trip(agent: Agent, job: dict[str, Any]) -> None:
    runtime, data = cuda(), secrets.token_bytes(_NBYTES)
    arena = Arena(2 * _NBYTES)
    arena.bytes[:_NBYTES] = data
    host, back = arena.span.address, arena.span.address + _NBYTES
    with ExitStack() as stack:
        fd = _file(job, stack)
        file = File(fd)
        memory = []
        for _ in range(2):
            address = runtime.allocate(_NBYTES)
            stack.callback(runtime.free, address)
            memory.append(_Gpu(address, _NBYTES))
        sender, receiver = memory
        runtime.copy_now([(sender.address, host, _NBYTES)])
        for gpu in memory:
            stack.callback(agent.forget, gpu)
            agent.register(gpu, far=True)
        stack.callback(agent.forget, file)
        agent.register(file, far=True)
        _move(agent, sender, fd, write=True)
        if os.preadv(fd, [arena.bytes[_NBYTES:]], 0) != _NBYTES or arena.bytes[_NBYTES:] != data:
            raise PathUnavailable("the file holds other bytes than the GPU sent")
        arena.bytes[_NBYTES:] = bytes(_NBYTES)
        _move(agent, receiver, fd, write=False)
        runtime.copy_now([(back, receiver.address, _NBYTES)])
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


def _move(agent: Agent, gpu: _Gpu, fd: int, *, write: bool) -> None:
    request = agent.post(
        [(gpu.address, _NBYTES, gpu.device)], [(0, _NBYTES, fd)], write=write, far=True
    )
    while not agent.check(request):
        time.sleep(_LOOK_S)
    agent.release(request)
    if request.error is not None:
        way = "to a file" if write else "from a file"
        raise PathUnavailable(f"NIXL moved nothing {way}: {request.error}")


def main() -> None:
    """Answer one question."""
    job = json.loads(sys.stdin.read())
    answer: dict[str, object] = {"evidence": [], "refused": ""}
    try:
        answer["evidence"] = try_gds(job)
    except (PathUnavailable, CufileError, CudaError, NixlError, ImportError, OSError) as error:
        answer["refused"] = str(error)
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    sys.stdout.flush()
    ctypes.CDLL(None)._exit(0)  # noqa: SLF001 - the C function: drivers may hang in their own exits


if __name__ == "__main__":
    main()
