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
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from kvgds.bench.measure import Contender, Sample, timed
from kvgds.blocks import PAGE, Stamp
from kvgds.memory import Arena, region_of
from kvgds.memory.device import cuda
from kvgds.tiers.space import slab_name, slabs_in, slot_bytes_for
from kvgds.transport.agent import Agent
from kvgds.transport.contract import File
from kvgds.waits import outlast

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kvgds.bench.blocks import Blocks, Content
    from kvgds.memory.device import Copying
    from kvgds.transport.agent import Request

T = TypeVar("T")
_HUGE_PAGES = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Disk:
    """Where blocks lie for those who only call the system.

    Args:
        content: the blocks.
        files: with the size and room for as many blocks as they all have.
        direct: whether to open them with O_DIRECT.
        fragments: pieces that a block lies in in memory.

    Attributes:
        places: of each block, a descriptor and an offset.
    """

    def __init__(
        self, content: Content, files: Sequence[Path], *, direct: bool, fragments: int = 1
    ) -> None:
        self.content, self.files = content, files
        self.direct, self.fragments = direct, fragments
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        self.fds = [os.open(path, flags) for path in files]
        self.places = [(self.fds[0], i * content.block) for i in range(content.count)]

    @classmethod
    def new(cls, path: Path, content: Content, *, direct: bool) -> Disk:
        """A preallocated file, which is the caller's to remove."""
        with path.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, content.nbytes)
        return cls(content, [path], direct=direct)

    @classmethod
    def slots(cls, blocks: Blocks, *, direct: bool) -> Disk:
        """Where an engine has stored them: one part of a disk may take half of what another does.

        What is stored there once the engine has stored them anew may come in another's place.
        """
        content, root = blocks.content, blocks.tier.root
        step = slot_bytes_for(content.block)
        slabs = sorted(slabs_in(root).items())
        paths = [root / name for number, name in slabs if name == slab_name(number, step)]
        disk = cls(content, paths, direct=direct, fragments=blocks.fragments)
        page = Arena(PAGE).bytes
        latest: dict[bytes, tuple[int, int, int]] = {}
        for fd in disk.fds:  # not by the index, which btrfs leaves to the engine alone
            for at in range(0, os.fstat(fd).st_size // step * step, step):
                os.preadv(fd, [page], at)
                stamp = Stamp.decode(page)
                if stamp is not None and (stamp.generation,) > latest.get(stamp.key, ()):
                    latest[stamp.key] = stamp.generation, fd, at + PAGE
        disk.places = [latest[key][1:] for key in blocks.keys]
        return disk

    def close(self) -> None:
        """Close the files."""
        for fd in self.fds:
            os.close(fd)

    def move(self, i: int, *, store: bool) -> bool:
        """One block by one system call."""
        fd, offset = self.places[i]
        call, parts = os.pwritev if store else os.preadv, self.content.parts
        return call(fd, parts(i, self.fragments, store=store), offset) == self.content.block


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
            np.frombuffer(content.parts(i, store=False)[0], np.uint8),
            np.frombuffer(content.parts(i, store=True)[0], np.uint8),
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
    """NIXL's POSIX plugin in a bare loop: one block a request, so many requests at a time."""

    def __init__(self, disk: Disk, queue: str) -> None:
        self._disk = disk
        self._queue = queue
        self._pool = ThreadPoolExecutor(1, f"raw-{queue}")  # an agent keeps to one thread
        self._files = [File(fd, direct=disk.direct) for fd in disk.fds]
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
            return self._disk.content.judged(sample, store=store, on_gpu=False)

        return Contender(
            f"NIXL POSIX/{self._queue} alone", run, kind="limit", path=f"POSIX/{self._queue}"
        )

    def close(self) -> None:
        """End the agent."""
        self._pool.submit(self._agent.close).result()
        self._pool.shutdown()

    def _run(self, in_flight: int, *, store: bool) -> Sample:
        content, agent, region = self._disk.content, self._agent, self._regions[store]
        for file in self._files:
            agent.register(file, far=False)
        (span,), nbytes = region.spans, content.block // self._disk.fragments
        sample = Sample(nbytes=content.nbytes, asked=content.count)
        flying: list[tuple[float, Request]] = []
        waiting = list(range(content.count))[::-1]
        with timed(sample):
            while waiting or flying:
                while waiting and len(flying) < in_flight:
                    i, started = waiting.pop(), time.perf_counter()
                    fd, offset = self._disk.places[i]
                    starts = content.starts(i, self._disk.fragments)
                    local = [(span.address + at, nbytes, 0) for at in starts]
                    remote = [(offset + n * nbytes, nbytes, fd) for n in range(len(starts))]
                    request = agent.post(
                        local, remote, write=store, far=False, direct=self._disk.direct
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
    """Fio in the same files; None: it is not installed. It checks no bytes.

    Args:
        disk: where.
        queue: what NIXL uses, ``"uring"`` or ``"aio"``: what is forbidden to it is to fio, too.
        in_flight: blocks at a time.
        store: which way.
    """
    program = shutil.which("fio")
    if program is None:
        return None
    names = ":".join(os.fspath(path).replace(":", r"\:") for path in disk.files)
    block, nbytes = disk.content.block, disk.content.nbytes
    each = min(path.stat().st_size for path in disk.files) // block * block
    command = [program, "--name=limit", f"--filename={names}", "--output-format=json"]
    command += ["--allow_file_create=0", "--fallocate=none", "--file_service_type=roundrobin"]
    command += [f"--filesize={each}", f"--io_size={nbytes}", f"--bs={block}", "--invalidate=0"]
    engine = "io_uring" if queue == "uring" else "libaio"
    command += [f"--ioengine={engine}", f"--iodepth={in_flight}", f"--direct={int(disk.direct)}"]
    command += ["--mem=malloc", "--iomem_align=2m"]
    command += ["--rw=write"] if store else ["--rw=read", "--zero_buffers"]

    async def run() -> Sample:
        done = await _on_thread(
            subprocess.run, command, env=_HUGE_PAGES, capture_output=True, check=False, text=True
        )
        if done.returncode:
            raise OSError(f"fio: {done.stderr.strip().rpartition(chr(10))[2] or done.returncode}")
        return _of_fio(json.loads(done.stdout)["jobs"][0], disk.content, store=store)

    return Contender(f"fio {engine}", run, kind="limit", path=engine, anew=True)


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
