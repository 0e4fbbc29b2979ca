"""Clients of S3 that the object tier is compared with, each as its users would write it, done well.

One client, made once; blocks come out of and go into memory that is there. Credentials come from
the environment. Imports nothing of kvgds, and a client's package only when that is used, for this
also runs as a process of its own, by another interpreter where packages don't go together:

    python bench/s3peers.py CLIENT ENDPOINT BUCKET REGION BLOCK COUNT

It takes turns by JSON lines on its standard input, and answers each with one: `{"op": "store" or
"load", "stem": ..., "in_flight": ...}`, `{"op": "ticks", "stem": ..., "seconds": ..., ...}`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import mmap
import os
import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    Drive = Callable[[threading.Event], Awaitable["Moved"]]


@dataclass(frozen=True)
class Where:
    """A bucket; who asks is in the environment."""

    endpoint: str
    bucket: str
    region: str


@dataclass
class Job:
    """A block to move: an object's name, and memory that holds or gets its bytes."""

    name: str
    memory: memoryview
    write: bool


@dataclass
class Moved:
    """What became of jobs."""

    succeeded: int = 0
    asked: int = 0
    latencies: list[float] = field(default_factory=list)

    def add(self, job: Job, nbytes: int, since: float) -> None:
        self.latencies.append(time.perf_counter() - since)
        self.asked += 1
        self.succeeded += nbytes == len(job.memory)


class Peer:
    """A client: moves one block, and drives so many of them at once."""

    threads = False

    def __init__(self, where: Where, in_flight: int) -> None:
        self.where, self.in_flight = where, in_flight
        self._pool = ThreadPoolExecutor(2 * in_flight) if self.threads else None

    async def open(self) -> None:
        """Make the client."""

    async def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def call(self, job: Job) -> Any:  # noqa: ANN401 - an int, or what gives one when awaited
        """Move one; how many bytes did."""
        raise NotImplementedError

    async def drive(self, jobs: Iterator[Job], in_flight: int) -> Moved:
        """Move all of them, so many at once, each its next one when it has done one."""
        moved = Moved()
        if self._pool is None:
            await asyncio.gather(*(self._task(jobs, moved) for _ in range(in_flight)))
            return moved
        loop, lock = asyncio.get_running_loop(), threading.Lock()
        futures = [
            loop.run_in_executor(self._pool, self._thread, jobs, moved, lock)
            for _ in range(in_flight)
        ]
        await asyncio.gather(*futures)
        return moved

    async def _task(self, jobs: Iterator[Job], moved: Moved) -> None:
        for job in jobs:
            since = time.perf_counter()
            moved.add(job, await self.call(job), since)

    def _thread(self, jobs: Iterator[Job], moved: Moved, lock: threading.Lock) -> None:
        while True:
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            since = time.perf_counter()
            nbytes = self.call(job)
            with lock:
                moved.add(job, nbytes, since)


class Obstore(Peer):
    """obstore's coroutines: one store, a PUT or a GET a block."""

    async def open(self) -> None:
        from obstore.store import S3Store  # noqa: PLC0415 - see the module's docstring

        self._store = S3Store(
            self.where.bucket,
            region=self.where.region,
            endpoint=self.where.endpoint,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )

    async def call(self, job: Job) -> int:
        nbytes = len(job.memory)
        if job.write:
            await self._store.put_async(job.name, job.memory, use_multipart=False)
            return nbytes
        found = await self._store.get_range_async(job.name, start=0, length=nbytes)
        job.memory[: len(found)] = memoryview(found).cast("B")
        return len(found)


class ObstoreThreads(Obstore):
    """obstore's blocking calls, on threads."""

    threads = True

    def call(self, job: Job) -> int:  # type: ignore[override]
        nbytes = len(job.memory)
        if job.write:
            self._store.put(job.name, job.memory, use_multipart=False)
            return nbytes
        found = self._store.get_range(job.name, start=0, length=nbytes)
        job.memory[: len(found)] = memoryview(found).cast("B")
        return len(found)


class Boto3(Peer):
    """boto3's blocking calls, on threads."""

    threads = True

    async def open(self) -> None:
        import boto3  # noqa: PLC0415 - see the module's docstring
        from botocore.config import Config  # noqa: PLC0415

        self._client = boto3.client(
            "s3",
            endpoint_url=self.where.endpoint,
            region_name=self.where.region,
            config=Config(**boto_settings(self.in_flight)),
        )

    async def close(self) -> None:
        await super().close()
        self._client.close()

    def call(self, job: Job) -> int:
        names = {"Bucket": self.where.bucket, "Key": job.name}
        nbytes = len(job.memory)
        if job.write:  # it takes bytes alone, so they are copied
            answer = self._client.put_object(Body=bytes(job.memory), **names)
            return nbytes if answer["ResponseMetadata"]["HTTPStatusCode"] == 200 else 0
        at = 0
        with self._client.get_object(**names)["Body"] as body:
            while at < nbytes and (got := body.readinto(job.memory[at:])):
                at += got
        return at


class Aiobotocore(Peer):
    """aiobotocore's coroutines: one session and one client for all."""

    async def open(self) -> None:
        from aiobotocore.config import AioConfig  # noqa: PLC0415 - see the module's docstring
        from aiobotocore.session import get_session  # noqa: PLC0415

        made = get_session().create_client(
            "s3",
            endpoint_url=self.where.endpoint,
            region_name=self.where.region,
            config=AioConfig(**boto_settings(self.in_flight)),
        )
        self._opened = AsyncExitStack()
        self._client = await self._opened.enter_async_context(made)

    async def close(self) -> None:
        await self._opened.aclose()

    async def call(self, job: Job) -> int:
        names = {"Bucket": self.where.bucket, "Key": job.name}
        if job.write:
            answer = await self._client.put_object(Body=bytes(job.memory), **names)
            return len(job.memory) if answer["ResponseMetadata"]["HTTPStatusCode"] == 200 else 0
        at = 0
        async with (await self._client.get_object(**names))["Body"] as body:
            async for piece in body.raw_stream.content.iter_any():
                job.memory[at : at + len(piece)] = piece
                at += len(piece)
        return at


class S3fs(Peer):
    """s3fs's coroutines, of fsspec's asynchronous kind."""

    async def open(self) -> None:
        from s3fs import S3FileSystem  # noqa: PLC0415 - see the module's docstring

        self._files = S3FileSystem(
            asynchronous=True,
            endpoint_url=self.where.endpoint,
            client_kwargs={"region_name": self.where.region},
            config_kwargs=boto_settings(self.in_flight),
            use_listings_cache=False,
        )
        self._session = await self._files.set_session()

    async def close(self) -> None:
        await self._session.close()

    async def call(self, job: Job) -> int:
        path, nbytes = f"{self.where.bucket}/{job.name}", len(job.memory)
        if job.write:
            await self._files._pipe_file(path, bytes(job.memory))  # noqa: SLF001 - fsspec's name for it
            return nbytes
        found = await self._files._cat_file(path, start=0, end=nbytes)  # noqa: SLF001 - as above
        job.memory[: len(found)] = found
        return len(found)


def boto_settings(in_flight: int) -> dict[str, Any]:
    """A connection for each in flight, in both directions; no checksums but those of signing."""
    return {
        "signature_version": "s3v4",
        "max_pool_connections": 2 * in_flight,
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "s3": {"addressing_style": "path"},
    }


PEERS: dict[str, type[Peer]] = {
    "obstore": Obstore,
    "obstore, threads": ObstoreThreads,
    "boto3, threads": Boto3,
    "aiobotocore": Aiobotocore,
    "s3fs": S3fs,
}


# --- jobs -----------------------------------------------------------------------------------


def blocks(memory: memoryview, block: int) -> list[memoryview]:
    """The memory in pieces of a block each."""
    return [memory[at : at + block] for at in range(0, len(memory), block)]


def jobs(stem: str, pieces: list[memoryview], *, write: bool) -> Iterator[Job]:
    """Each block once; names follow from the stem."""
    for n, piece in enumerate(pieces):
        yield Job(f"{stem}/{n}", piece, write)


def both_ways(
    peer: Peer, stem: str, fresh: str, pieces: list[memoryview], in_flight: int
) -> list[Drive]:
    """What keeps so many stores, of fresh names, and so many loads under way.

    Half of the memory is for each, and each has blocks of its own there.
    """
    half = len(pieces) // 2
    drives = []
    for first in range(min(in_flight, half)):
        stored = [(n, pieces[n]) for n in range(first, half, in_flight)]
        loaded = [(n, pieces[n]) for n in range(half + first, len(pieces), in_flight)]
        drives += [_drive(peer, f"{fresh}/{first}", stored, write=True)]
        drives += [_drive(peer, stem, loaded, write=False)]
    return drives


def _drive(peer: Peer, stem: str, mine: list[tuple[int, memoryview]], *, write: bool) -> Drive:
    def jobs_until(stop: threading.Event) -> Iterator[Job]:
        for turn, (n, piece) in enumerate(itertools.cycle(mine)):
            if stop.is_set():
                return
            yield Job(f"{stem}/{turn if write else n}", piece, write)

    return lambda stop: peer.drive(jobs_until(stop), 1)


async def ticks(seconds: float) -> list[float]:
    """How late a 1 ms ticker is, each time."""
    late, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        due = time.perf_counter() + 1e-3
        await asyncio.sleep(1e-3)
        late.append(time.perf_counter() - due)
    return late


async def ticks_beside(drives: list[Drive], seconds: float) -> tuple[list[float], list[Moved]]:
    """How late the ticker is while these go on."""
    stop = threading.Event()
    tasks = [asyncio.ensure_future(drive(stop)) for drive in drives]
    try:
        late = await ticks(seconds)
    finally:
        stop.set()
    return late, list(await asyncio.gather(*tasks))


# --- as a process of its own ----------------------------------------------------------------


def random_memory(nbytes: int) -> memoryview:
    """Page-aligned memory with bytes that don't compress, on huge pages where there are any."""
    whole = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole.madvise(mmap.MADV_HUGEPAGE)
    whole[:] = os.urandom(nbytes)
    return memoryview(whole)


class Served:
    """One client, asked over standard input."""

    def __init__(self, peer: Peer, block: int, count: int) -> None:
        self._peer = peer
        self._memory = random_memory(block * count)
        self._before = bytes(self._memory)
        self._pieces = blocks(self._memory, block)

    async def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["op"] == "ticks":
            return await self._ticks(asked)
        write = asked["op"] == "store"
        if not write:
            self._memory[:] = bytes(len(self._memory))
        usage, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        moved = await self._peer.drive(
            jobs(asked["stem"], self._pieces, write=write), asked["in_flight"]
        )
        seconds, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        if self._memory != self._before:
            raise RuntimeError("blocks came back different")
        return {
            "seconds": seconds,
            "cpu": used.ru_utime + used.ru_stime - usage.ru_utime - usage.ru_stime,
            "succeeded": moved.succeeded,
            "asked": moved.asked,
            "latencies": moved.latencies,
        }

    async def _ticks(self, asked: dict[str, Any]) -> dict[str, Any]:
        drives = both_ways(
            self._peer, asked["stem"], asked["fresh"], self._pieces, asked["in_flight"]
        )
        idle = await ticks(asked["seconds"])
        late, moved = await ticks_beside(drives, asked["seconds"])
        return {
            "idle": idle,
            "late": late,
            "succeeded": sum(m.succeeded for m in moved),
            "asked": sum(m.asked for m in moved),
        }


async def serve(name: str, where: Where, block: int, count: int) -> None:
    """Answer until there is no more to read."""
    peer = PEERS[name](where, 16)
    await peer.open()
    served = Served(peer, block, count)
    loop = asyncio.get_running_loop()
    print(json.dumps({"pid": os.getpid()}), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await served.answer(json.loads(line))), flush=True)
    await peer.close()


if __name__ == "__main__":
    client, endpoint, bucket, region, block, count = sys.argv[1:]
    asyncio.run(serve(client, Where(endpoint, bucket, region), int(block), int(count)))
