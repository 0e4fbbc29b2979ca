"""What is moved, and engines that move it."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import shutil
import tempfile
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvgds.bench.measure import Contender, Sample, drive, watched
from kvgds.blocks import PAGE, Namespace
from kvgds.config import EngineConfig, FileTier
from kvgds.engine import open_engine
from kvgds.memory import Arena
from kvgds.memory.device import cuda
from kvgds.replay import Pattern

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from kvgds.engine import Engine
    from kvgds.flights import Memory
    from kvgds.memory import Span
    from kvgds.paths import PathPlan

_ALIGNMENT = 2 << 20  # of GPU memory: no other has part in its pages


class _OnGpu:
    """Memory of a GPU as array libraries describe it."""

    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class Content:
    """Blocks to store, and room to load them into; every page of any block is another.

    Args:
        block: bytes, whole pages.
        gpu: the GPU that they lie on; None: in the host's memory.

    Attributes:
        source: the host's copy of all blocks, one behind the other.
        target: room for as much.
    """

    def __init__(self, block: int, count: int, gpu: int | None = None) -> None:
        self.block, self.count, self.gpu = block, count, gpu
        self._pattern = Pattern(block)
        self._arenas = {store: Arena(block * count) for store in (True, False)}
        self.source, self.target = self._arenas[True].bytes, self._arenas[False].bytes
        self._pattern.fill(range(count), self.source)
        self._allocated: dict[bool, int] = {}
        if gpu is not None:
            for store in (True, False):
                cuda().pin(gpu, self.near(store=store))
                self._allocated[store] = cuda().allocate(gpu, self.nbytes + _ALIGNMENT)
                self._copy(store=store, down=False)

    def close(self) -> None:
        """Give the GPU's memory back."""
        for store, address in self._allocated.items():
            cuda().free(self.gpu or 0, address)
            cuda().unpin(self.gpu or 0, self.near(store=store))
        self._allocated.clear()

    @property
    def nbytes(self) -> int:
        """Of all blocks."""
        return self.block * self.count

    def near(self, *, store: bool) -> Span:
        """Where the host's memory is."""
        return self._arenas[store].span

    def far(self, *, store: bool) -> int:
        """The address of the GPU's memory."""
        return -(-self._allocated[store] // _ALIGNMENT) * _ALIGNMENT

    def starts(self, i: int, fragments: int) -> range:
        """Where the fragments of one block begin in the host's memory; see :meth:`arrays`."""
        first, layer = i * (self.block // fragments), self.nbytes // fragments
        return range(first, first + self.nbytes, layer)

    def parts(self, i: int, fragments: int = 1, *, store: bool) -> list[memoryview]:
        """The host's memory of one block."""
        whole, nbytes = self.source if store else self.target, self.block // fragments
        return [whole[at : at + nbytes] for at in self.starts(i, fragments)]

    def arrays(self, fragments: int, *, store: bool) -> list[Any]:
        """The memory in layers, as a paged cache has it: each blocks x bytes of a fragment."""
        shape = (self.count, self.block // fragments)
        if self.gpu is None:
            flat = np.frombuffer(self.source if store else self.target, np.uint8)
            return list(flat.reshape(fragments, *shape))
        layer = self.nbytes // fragments
        first = self.far(store=store)
        return [_OnGpu(first + n * layer, shape) for n in range(fragments)]

    def judged(self, sample: Sample, *, store: bool, on_gpu: bool | None = None) -> Sample:
        """Of loads, only those of the right bytes have succeeded; clears the target.

        Args:
            sample: what was moved.
            store: which way.
            on_gpu: whether loads went to the GPU; None: if there is one.
        """
        if not store:
            on_gpu = self.gpu is not None if on_gpu is None else on_gpu
            sample.succeeded = min(sample.succeeded, self._right(on_gpu=on_gpu))
        return sample

    def _right(self, *, on_gpu: bool) -> int:
        """How many blocks lie right in the target, which is cleared for the next load."""
        if on_gpu:
            self._copy(store=False, down=True)
        wrong = self._pattern.differing(range(self.count), self.target)
        if on_gpu:
            self._copy(store=False, down=False)
        return self.count - len(wrong)

    def _copy(self, *, store: bool, down: bool) -> None:
        ends = self.near(store=store).address, self.far(store=store)
        to, source = ends if down else ends[::-1]
        cuda().copy_now(to, source, self.nbytes)


class Blocks:
    """The content's blocks, by one engine.

    Args:
        fragments: pieces that a block lies in, each in another layer of a paged cache.
        name: what the keys begin with.
    """

    def __init__(
        self, engine: Engine, content: Content, fragments: int = 1, name: str = ""
    ) -> None:
        self.engine, self.content, self.fragments = engine, content, fragments
        self.keys = [
            f"{name}{content.block}x{fragments}-{i}".encode() for i in range(content.count)
        ]
        self._caches = {
            store: engine.register_cache(content.arrays(fragments, store=store))
            for store in (True, False)
        }

    async def close(self) -> None:
        """Remove what is stored, and let the memory go."""
        await self.clear()
        for cache in self._caches.values():
            await self.engine.deregister(cache)

    async def clear(self, keys: Sequence[bytes] | None = None) -> None:
        """Remove what is stored under these keys; None: each block's own."""
        gone = self.keys if keys is None else keys
        await asyncio.gather(*(self.engine.delete(key) for key in gone))

    def memory(self, i: int, *, store: bool) -> Memory:
        """What is given to the engine for one block."""
        return self._caches[store].block(i)

    async def move_one(self, i: int, *, store: bool) -> bool:
        """Whether a block was written, or was there."""
        call = self.engine.store if store else self.engine.load
        return await call(self.keys[i], self.memory(i, store=store))

    async def move(self, in_flight: int, *, store: bool) -> Sample:
        """Move every block by a call of its own, so many at a time."""
        one = partial(self.move_one, store=store)
        sample = await self._run(self.content.count, in_flight, one, store=store)
        return self.content.judged(sample, store=store)

    async def move_batches(self, batch: int, *, store: bool) -> Sample:
        """Move them in calls of so many blocks, two calls at a time."""
        call = self.engine.store_many if store else self.engine.load_many
        count, moved = self.content.count, 0

        async def one(n: int) -> bool:
            nonlocal moved
            numbers = range(n * batch, min((n + 1) * batch, count))
            outcomes = await call([(self.keys[i], self.memory(i, store=store)) for i in numbers])
            moved += sum(each.status in ("stored", "hit") for each in outcomes)
            return True

        sample = await self._run(-(-count // batch), 2, one, store=store)
        sample.asked, sample.succeeded = count, moved
        return self.content.judged(sample, store=store)

    async def move_groups(
        self, groups: Sequence[Sequence[int]], in_flight: int, *, store: bool
    ) -> Sample:
        """Move groups of as many blocks, each under one key, so many groups at a time."""
        call = self.engine.store if store else self.engine.load
        keys = [f"{self.content.block}-{group}".encode() for group in groups]

        async def one(n: int) -> bool:
            return await call(keys[n], self._caches[store].block(*groups[n]))

        sample = await self._run(len(groups), in_flight, one, store=store, keys=keys)
        sample.asked *= len(groups[0])
        sample.succeeded *= len(groups[0])
        return self.content.judged(sample, store=store)

    async def _run(
        self,
        calls: int,
        in_flight: int,
        operation: Callable[[int], Any],
        *,
        store: bool,
        keys: Sequence[bytes] | None = None,
    ) -> Sample:
        if store:
            await self.clear(keys)
        sample = Sample(nbytes=self.content.nbytes)
        before = self._moved(store=store)
        async with watched(sample):
            await drive(calls, in_flight, sample, operation)
        if moved := {path for path, _ in self._moved(store=store) - before}:
            sample.path = " ".join([*sorted(moved), self._plan.backend])
        return sample

    def _moved(self, *, store: bool) -> set[tuple[str, float]]:
        """Each path by which blocks moved so far, one way, and the bytes."""
        said = (each for family in self.engine.metrics.collect() for each in family.samples)
        direction = "store" if store else "load"
        return {
            (each.labels["path"], each.value)
            for each in said
            if each.name == "kvgds_bytes_total"
            and each.value
            and each.labels["direction"] == direction
        }

    def contender(self, name: str, in_flight: int, *, store: bool) -> Contender:
        """This engine, one way."""
        return Contender(
            name=name,
            run=partial(self.move, in_flight, store=store),
            tier=self.tier.layout,
            path=self.path,
            verified=self.tier.verify == "full",
        )

    @property
    def tier(self) -> FileTier:
        """Where the engine keeps them; there are no other tiers."""
        (tier,) = self.engine.config.tiers
        if not isinstance(tier, FileTier):
            raise TypeError(tier)
        return tier

    @property
    def path(self) -> str:
        """How its bytes move, most of them."""
        return f"{self._plan.path} {self._plan.backend}"

    @property
    def _plan(self) -> PathPlan:
        memory = "host" if self.content.gpu is None else "gpu"
        return next(each for each in self.engine.plan if each.memory == memory)


@asynccontextmanager
async def opened(below: Path, **settings: Any) -> AsyncIterator[Engine]:  # noqa: ANN401 - of many kinds
    """An engine on a fresh directory, which goes with it.

    Args:
        below: where the directory is made.
        settings: EngineConfig's and FileTier's.
    """
    root = Path(tempfile.mkdtemp(dir=below))
    of_tier = {name: value for name, value in settings.items() if name in FileTier.model_fields}
    others = {name: value for name, value in settings.items() if name not in of_tier}
    tier = FileTier(root=root / "kv", **{"capacity_bytes": 4 << 30, **of_tier})
    config = EngineConfig(namespace=Namespace("kvgds-bench"), tiers=(tier,), **others)
    try:
        async with open_engine(config) as engine:
            yield engine
    finally:
        shutil.rmtree(root)


def cold(folder: Path) -> str | None:
    """Drop a tree's files from the page cache; what is to be said if more than 1 % stayed.

    What somebody has mapped stays, an index for example.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    every, kept = sum(path.stat().st_size for path in files), sum(map(_dropped, files))
    return f"{kept:,} bytes of {folder} stayed in the page cache" if kept > every / 100 else None


def _dropped(path: Path) -> int:
    """Bytes of a file that are in the page cache after it was told to drop them."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return _resident(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def _resident(fd: int, nbytes: int) -> int:
    """Bytes of a file's pages that are in memory."""
    if not nbytes:
        return 0
    with mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        there = (ctypes.c_ubyte * (-(-nbytes // PAGE)))()
        at = np.frombuffer(mapped, np.uint8)
        address = ctypes.c_void_p(at.ctypes.data)
        del at  # or the mapping could not be closed
        if ctypes.CDLL(None).mincore(address, ctypes.c_size_t(nbytes), there):
            raise OSError("mincore failed")
        return sum(page & 1 for page in there) * PAGE
