"""What the machine can do without an engine: system calls on threads, NIXL alone, fio, copies."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from kvgds.bench.measure import Contender, Sample, timed
from kvgds.memory import region_of
from kvgds.memory.device import cuda
from kvgds.transport.agent import Agent
from kvgds.transport.contract import File
from kvgds.waits import outlast

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvgds.bench.blocks import Content
    from kvgds.memory.device import Copying
    from kvgds.transport.agent import Request

T = TypeVar("T")
_HUGE_PAGES = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Disk:
    """A preallocated file for all blocks of a content; it goes with :meth:`close`."""

    def __init__(self, path: Path, content: Content, *, direct: bool) -> None:
        self.path, self.content, self.direct = path, content, direct
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0), 0o600)
        os.posix_fallocate(self.fd, 0, content.nbytes)

    def close(self) -> None:
        """Remove the file."""
        os.close(self.fd)
        self.path.unlink()
        Path(f"{self.path}.fio").unlink(missing_ok=True)

    def move(self, i: int, *, store: bool) -> bool:
        """One block by one system call."""
        call = os.pwritev if store else os.preadv
        part = self.content.part(i, store=store)
        return call(self.fd, [part], i * self.content.block) == self.content.block


async def _on_thread(function: Callable[..., T], *given: Any, **settings: Any) -> T:  # noqa: ANN401 - its own
    """Call it on a thread. Cancelled, wait for its end: what it works with goes away after that."""
    call = partial(function, *given, **settings)
    return await outlast(asyncio.get_running_loop().run_in_executor(None, call))


def threads(disk: Disk, count: int, *, store: bool) -> Contender:
    """``preadv`` or ``pwritev`` on so many threads, from and to huge pages."""

    async def run() -> Sample:
        one = partial(disk.move, store=store)
        sample = await _on_thread(_by_threads, one, disk.content, count)
        return disk.content.judged(sample, store=store, on_gpu=False)

    name = f"{'pwritev' if store else 'preadv'}, {count} threads"
    return Contender(name, run, kind="limit", path="system calls")


def memory(content: Content, count: int) -> Contender:
    """Copies within the host's memory on so many threads."""

    def one(i: int) -> bool:
        np.copyto(
            np.frombuffer(content.part(i, store=False), np.uint8),
            np.frombuffer(content.part(i, store=True), np.uint8),
        )
        return True

    async def run() -> Sample:
        sample = await _on_thread(_by_threads, one, content, count)
        return content.judged(sample, store=False, on_gpu=False)

    return Contender(f"memcpy, {count} threads", run, kind="limit", path="memcpy")


def _by_threads(move: Callable[[int], bool], content: Content, count: int) -> Sample:
    """Move every block by a call that gives up the interpreter's lock."""
    numbers, lock = iter(range(content.count)), threading.Lock()
    sample = Sample(nbytes=content.nbytes, asked=content.count)
    moved: list[bool] = []

    def work() -> None:
        while True:
            with lock:
                i = next(numbers, None)
            if i is None:
                return
            started = time.perf_counter()
            moved.append(move(i))
            sample.latencies.append(time.perf_counter() - started)

    with ThreadPoolExecutor(count) as pool, timed(sample):
        for future in [pool.submit(work) for _ in range(count)]:
            future.result()
    sample.succeeded = sum(moved)
    return sample


class RawNixl:
    """NIXL's POSIX plugin in a bare loop: one row a request, so many requests at a time."""

    def __init__(self, disk: Disk, queue: str) -> None:
        self.disk, self.queue = disk, queue
        self._pool = ThreadPoolExecutor(1, f"raw-{queue}")  # an agent keeps to one thread
        self._file = File(disk.fd, direct=disk.direct)
        self._regions = {
            store: region_of(memory)
            for store, memory in ((True, disk.content.source), (False, disk.content.target))
        }
        self._agent: Agent = self._pool.submit(Agent, f"raw-{queue}", (queue,)).result()

    def contender(self, in_flight: int, *, store: bool) -> Contender:
        """This plugin, one way."""

        async def run() -> Sample:
            loop = asyncio.get_running_loop()
            sample = await loop.run_in_executor(
                self._pool, lambda: self._run(in_flight, store=store)
            )
            return self.disk.content.judged(sample, store=store, on_gpu=False)

        return Contender(
            f"NIXL POSIX/{self.queue} alone", run, kind="limit", path=f"POSIX/{self.queue}"
        )

    def close(self) -> None:
        """End the agent."""
        self._pool.submit(self._agent.close).result()
        self._pool.shutdown()

    def _run(self, in_flight: int, *, store: bool) -> Sample:
        content, agent, region = self.disk.content, self._agent, self._regions[store]
        agent.register(self._file, far=False)
        (span,), block = region.spans, content.block
        sample = Sample(nbytes=content.nbytes, asked=content.count)
        flying: list[tuple[float, Request]] = []
        waiting = list(range(content.count))[::-1]
        with timed(sample):
            while waiting or flying:
                while waiting and len(flying) < in_flight:
                    at, started = waiting.pop() * block, time.perf_counter()
                    local, remote = (span.address + at, block, 0), (at, block, self.disk.fd)
                    request = agent.post(
                        [local], [remote], write=store, far=False, direct=self.disk.direct
                    )
                    flying.append((started, request))
                ended = [each for each in flying if agent.check(each[1])]
                for started, request in ended:
                    agent.release(request)
                    sample.latencies.append(time.perf_counter() - started)
                    sample.succeeded += request.error is None
                flying = [each for each in flying if each not in ended]
        return sample


def fio(disk: Disk, queue: str, in_flight: int, *, store: bool) -> Contender | None:
    """Fio on a file as large; None: it is not installed. It checks no bytes.

    Args:
        disk: where.
        queue: what NIXL uses, ``"uring"`` or ``"aio"``: what is forbidden to it is to fio, too.
        in_flight: blocks at a time.
        store: which way.
    """
    program = shutil.which("fio")
    if program is None:
        return None
    command = [program, "--name=limit", f"--filename={disk.path}.fio", "--output-format=json"]
    command += [f"--direct={int(disk.direct)}", f"--bs={disk.content.block}", "--invalidate=0"]
    engine = "io_uring" if queue == "uring" else "libaio"
    command += [f"--iodepth={in_flight}", f"--size={disk.content.nbytes}", f"--ioengine={engine}"]
    command += ["--rw=write" if store else "--rw=read", "--mem=malloc", "--iomem_align=2m"]

    async def run() -> Sample:
        done = await _on_thread(
            subprocess.run, command, env=_HUGE_PAGES, capture_output=True, check=False, text=True
        )
        if done.returncode:
            raise OSError(f"fio: {done.stderr.strip().rpartition(chr(10))[2] or done.returncode}")
        return _of_fio(json.loads(done.stdout)["jobs"][0], disk.content, store=store)

    return Contender(f"fio {engine}", run, kind="limit", path=engine)


def _of_fio(job: dict[str, Any], content: Content, *, store: bool) -> Sample:
    way = job["write" if store else "read"]
    told = {float(q): ns / 1e9 for q, ns in way["clat_ns"].get("percentile", {}).items()}
    every = np.interp(np.arange(100) + 0.5, list(told), list(told.values())) if told else []
    return Sample(
        nbytes=way["io_bytes"],
        seconds=way["io_bytes"] / way["bw_bytes"] if way["bw_bytes"] else way["runtime"] / 1e3,
        cpu=(job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3,
        asked=content.count,
        succeeded=way["total_ios"] if not job["error"] else 0,
        latencies=[float(each) for each in every],  # as many of each as its quantiles say
    )


def copies(content: Content, in_flight: int, *, store: bool) -> Contender:
    """Copies between a GPU and page-locked memory of the host, so many blocks at a time."""
    device = content.gpu or 0
    near, far = content.near(store=True).address, content.far(store=store)
    to, source = (near, far) if store else (far, near)

    def run_now() -> Sample:
        sample = Sample(nbytes=content.nbytes, asked=content.count)
        flying: deque[tuple[float, Copying]] = deque()

        def land() -> None:
            started, copying = flying.popleft()
            while not copying.done:
                time.sleep(0)
            sample.latencies.append(time.perf_counter() - started)
            sample.succeeded += 1

        with timed(sample):
            for at in range(0, content.nbytes, content.block):
                if len(flying) == in_flight:
                    land()
                one = [(to + at, source + at, content.block)]
                flying.append((time.perf_counter(), cuda().copy(device, one)))
            while flying:
                land()
        return sample

    async def run() -> Sample:
        return content.judged(await _on_thread(run_now), store=store)

    return Contender("copy alone", run, kind="limit", path="cudaMemcpyAsync")
