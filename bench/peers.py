"""What the engine is compared with: plain system calls in a thread pool, done well."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from measure import Sample, timed

from kvgds.memory import Arena

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Call = Callable[[int, list[memoryview], int], int]


class Pool:
    """preadv and pwritev on one preallocated file opened with O_DIRECT, huge-page memory."""

    def __init__(self, path: Path, block: int, count: int, threads: int) -> None:
        self._block, self._count, self._threads = block, count, threads
        self._arena = Arena(block * count)
        flags = os.O_RDWR | os.O_CREAT | os.O_DIRECT
        self._fd = os.open(path, flags, 0o600)
        os.posix_fallocate(self._fd, 0, block * count)

    def close(self) -> None:
        os.close(self._fd)

    async def store(self) -> Sample:
        return self.store_now()

    async def load(self) -> Sample:
        return self.load_now()

    def store_now(self) -> Sample:
        return self._run(os.pwritev)

    def load_now(self) -> Sample:
        return self._run(os.preadv)

    async def await_store(self) -> Sample:
        return await self._await(os.pwritev)

    async def await_load(self) -> Sample:
        return await self._await(os.preadv)

    async def _await(self, call: Call) -> Sample:
        """The same calls as an asyncio program makes them: by run_in_executor."""
        loop, numbers, moved = asyncio.get_running_loop(), iter(range(self._count)), []
        sample = Sample(nbytes=self._block * self._count, asked=self._count)

        async def work() -> None:
            for i in numbers:
                at = i * self._block
                part = [self._arena.bytes[at : at + self._block]]
                moved.append(await loop.run_in_executor(pool, call, self._fd, part, at))

        with ThreadPoolExecutor(self._threads) as pool, timed(sample):
            await asyncio.gather(*(work() for _ in range(self._threads)))
        sample.succeeded = sum(n == self._block for n in moved)
        return sample

    def _run(self, call: Call) -> Sample:
        block, memory, fd = self._block, self._arena.bytes, self._fd
        numbers = iter(range(self._count))
        lock, moved = threading.Lock(), []

        def work() -> None:
            while True:
                with lock:
                    i = next(numbers, None)
                if i is None:
                    return
                at = i * block
                moved.append(call(fd, [memory[at : at + block]], at))

        return _with_threads(work, self._threads, block, self._count, moved)


class FilePerBlock:
    """One file a block: open a temporary name, write, rename; the usual way."""

    def __init__(self, root: Path, block: int, count: int, threads: int, *, direct: bool) -> None:
        self._root, self._block, self._count = root, block, count
        self._threads, self._flags = threads, os.O_DIRECT if direct else 0
        self._arena = Arena(block * count)
        root.mkdir()

    async def store(self) -> Sample:
        for path in self._root.iterdir():
            path.unlink()
        numbers = iter(range(self._count))
        lock, moved = threading.Lock(), []

        def work() -> None:
            while True:
                with lock:
                    i = next(numbers, None)
                if i is None:
                    return
                moved.append(self._write(i))

        return _with_threads(work, self._threads, self._block, self._count, moved)

    def _write(self, i: int) -> int:
        temporary, final = f"{self._root}/{i}.tmp", f"{self._root}/{i}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | self._flags, 0o600)
        at = i * self._block
        moved = os.write(fd, self._arena.bytes[at : at + self._block])
        os.close(fd)
        os.rename(temporary, final)
        return moved


def _with_threads(
    work: Callable[[], None], threads: int, block: int, count: int, moved: list[int]
) -> Sample:
    sample = Sample(nbytes=block * count, asked=count)
    with ThreadPoolExecutor(threads) as pool, timed(sample):
        for future in [pool.submit(work) for _ in range(threads)]:
            future.result()
    sample.succeeded = sum(n == block for n in moved)
    return sample
