"""What others move blocks to files with, each as its own code calls it.

Runs as a process of its own, in an environment that `peers.py` made, and imports nothing of kvgds:

    python bench/filepeers.py PEER VARIANT FOLDER BLOCK COUNT IN_FLIGHT

It says in a line of JSON what it is, or why it can't be had here, and then takes turns: for each
line on its standard input, `store` or `load`, it moves all blocks once and answers with a line. A
store has succeeded if a file as long as the block is there afterwards, a load if its bytes are
right.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import itertools
import json
import mmap
import os
import resource
import select
import shutil
import socket
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

PAGE = 4096
TICK_S = 5e-3


class Memory:
    """Blocks to store and room to load them into, on huge pages where there are any."""

    def __init__(self, block: int, count: int) -> None:
        self.block, self.count = block, count
        self.whole = _huge(2 * block * count)
        self.source, self.target = self.whole[: block * count], self.whole[block * count :]
        self.source[:] = os.urandom(block * count)

    def part(self, i: int, *, store: bool) -> memoryview:
        """One block."""
        whole = self.source if store else self.target
        return whole[i * self.block : (i + 1) * self.block]

    def right(self) -> int:
        """How many blocks were loaded as they are; then clears them."""
        pairs = ((self.part(i, store=True), self.part(i, store=False)) for i in range(self.count))
        right = sum(bytes(stored) == bytes(loaded) for stored, loaded in pairs)
        self.target[:] = bytes(len(self.target))
        return right


def _huge(nbytes: int) -> memoryview:
    whole = mmap.mmap(-1, nbytes + (2 << 20), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole.madvise(mmap.MADV_HUGEPAGE)
    start = -_address(memoryview(whole)) % (2 << 20)
    part = memoryview(whole)[start : start + nbytes]
    part[::PAGE] = bytes(len(part[::PAGE]))
    return part


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Peer:
    """One of them: made anew for each process.

    Attributes:
        package: whose version it is.
        cache: what is between it and storage.
        verifies: whether it checks what it loads.
        variants: ways in which it can work.
    """

    package = ""
    cache = "page cache"
    verifies = False
    variants: tuple[str, ...] = ("",)

    def __init__(self, folder: Path, memory: Memory, in_flight: int, variant: str) -> None:
        self.folder, self.memory, self.in_flight = folder, memory, in_flight
        self.variant = variant
        self.latencies: list[float] = []
        self.late: list[float] = []
        self.errors = 0
        if variant == "O_DIRECT":
            self.cache = "O_DIRECT"
        self.open()

    def open(self) -> None:
        """Import what it needs, which is in its own environment alone, and get ready."""

    def run(self, *, store: bool) -> None:
        """Move every block, so many at a time."""
        raise NotImplementedError

    def clear(self) -> None:
        """Remove every block."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def stored(self) -> int:
        """How many blocks there are files of."""
        files = (path for path in self.folder.rglob("*") if path.is_file())
        long = sum(path.stat().st_size >= self.memory.block for path in files)
        return min(self.memory.count, long)

    def close(self) -> None:
        """End."""


class Threaded(Peer):
    """Blocking calls, each on a thread of a pool."""

    def __init__(self, folder: Path, memory: Memory, in_flight: int, variant: str) -> None:
        self._pool = ThreadPoolExecutor(in_flight)
        self._lock = threading.Lock()
        super().__init__(folder, memory, in_flight, variant)

    def one(self, i: int, *, store: bool) -> None:
        """Move a block; raises if it was not."""
        raise NotImplementedError

    def run(self, *, store: bool) -> None:
        numbers = iter(range(self.memory.count))

        def work() -> None:
            while True:
                with self._lock:
                    i = next(numbers, None)
                if i is None:
                    return
                started = time.perf_counter()
                try:
                    self.one(i, store=store)
                except Exception:  # noqa: BLE001 - counted, whatever it is
                    self.errors += 1
                self.latencies.append(time.perf_counter() - started)

        for future in [self._pool.submit(work) for _ in range(self.in_flight)]:
            future.result()


class Vllm(Threaded):
    """vLLM's tier of files: its C extension, a temporary file renamed, a call a block."""

    package = "vllm"
    variants = ("O_DIRECT", "page cache")

    def open(self) -> None:
        import torch  # noqa: F401, PLC0415 - whose libraries the extension is linked with

        # The package itself wants a GPU when it is imported; of it this is all that is used.
        found = importlib.util.find_spec("vllm")
        folder = Path(next(iter(found.submodule_search_locations or ()))) if found else Path()
        file = str(folder / "fs_io_C.abi3.so")
        spec = importlib.util.spec_from_file_location("vllm.fs_io_C", file)
        if spec is None or spec.loader is None:
            raise ImportError(file)
        io = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(io)
        # In 0.33.0 each call gives None back once too often. Before Python 3.12, which has stopped
        # counting, the process ends when that has gone to the last.
        self._kept = [None] * 5_000_000
        self._io = io

    def one(self, i: int, *, store: bool) -> None:
        path, direct = str(self.folder / f"{i}.bin"), self.variant == "O_DIRECT"
        part = self.memory.part(i, store=store)
        if store:
            temporary = f"{path}_{threading.get_ident()}.tmp"
            self._io.batch_store_block([temporary], [path], [part], direct)
        else:
            self._io.batch_load_block([path], [part], direct)


class Lifeboat(Threaded):
    """Lifeboat Cache's tier of files with its store's BLAKE3 in front of each block."""

    package = "lifeboatcache"
    verifies = True

    def open(self) -> None:
        from lifeboat_cache.core.hashing import DIGEST_SIZE, content_hash  # noqa: PLC0415
        from lifeboat_cache.storage.filesystem import FilesystemTier  # noqa: PLC0415

        self._hash, self._digest = content_hash, DIGEST_SIZE
        self._tier = FilesystemTier("bench", str(self.folder), min_free_gb=0.0)
        self._tier.align_skip = DIGEST_SIZE

    def one(self, i: int, *, store: bool) -> None:
        part = self.memory.part(i, store=store)
        if store:
            self._tier.put(f"block-{i}", self._hash(part, parallel=False) + bytes(part))
            return
        digest = self._tier.get_into(f"block-{i}", part, self._digest)
        if digest != self._hash(part, parallel=False):
            raise ValueError(i)

    def clear(self) -> None:
        for i in range(self.memory.count):
            self._tier.delete(f"block-{i}")

    def close(self) -> None:
        self._tier.close()


class Lmcache(Peer):
    """LMCache's adapters, asked as its own benchmark asks them: a task a block, told by eventfd."""

    package = "lmcache"
    variants = ("page cache", "O_DIRECT")

    def open(self) -> None:
        import torch  # noqa: PLC0415 - see open
        from lmcache.v1.distributed.api import ObjectKey  # noqa: PLC0415
        from lmcache.v1.memory_management import (  # noqa: PLC0415
            MemoryFormat,
            MemoryObjMetadata,
            TensorMemoryObj,
        )

        self._adapter = self._open()
        count, block = self.memory.count, self.memory.block
        self._keys = [
            ObjectKey(chunk_hash=i.to_bytes(16, "big"), model_name="bench", kv_rank=i)
            for i in range(count)
        ]

        def objects(whole: memoryview) -> list[Any]:
            flat = torch.frombuffer(whole, dtype=torch.uint8)
            return [
                TensorMemoryObj(
                    raw_data=flat[i * block : (i + 1) * block],
                    metadata=MemoryObjMetadata(
                        shape=torch.Size([block]),
                        dtype=torch.uint8,
                        address=i * block,
                        phy_size=block,
                        fmt=MemoryFormat.KV_2LTD,
                        ref_count=1,
                    ),
                    parent_allocator=None,
                )
                for i in range(count)
            ]

        self._objects = {True: objects(self.memory.source), False: objects(self.memory.target)}

    def _open(self) -> Any:  # noqa: ANN401 - its classes have no types
        from lmcache.v1.distributed.l2_adapters import fs_l2_adapter as fs  # noqa: PLC0415

        settings = {"base_path": str(self.folder), "use_odirect": self.variant == "O_DIRECT"}
        return fs.FSL2Adapter(fs.FSL2AdapterConfig.from_dict(settings))

    def run(self, *, store: bool) -> None:
        adapter, objects = self._adapter, self._objects[store]
        told = adapter.get_store_event_fd() if store else adapter.get_load_event_fd()
        poller = select.poll()
        poller.register(told, select.POLLIN)
        numbers = iter(range(self.memory.count))
        flying: dict[int, float] = {}
        while True:
            for i in itertools.islice(numbers, self.in_flight - len(flying)):
                started = time.perf_counter()
                if store:
                    task = adapter.submit_store_task([self._keys[i]], [objects[i]])
                else:
                    task = adapter.submit_load_task([self._keys[i]], [objects[i]])
                flying[task] = started
            if not flying:
                return
            if not poller.poll(30_000):
                self.errors += len(flying)
                return
            with contextlib.suppress(BlockingIOError):
                os.read(told, 8)
            ended = self._ended(flying, store=store)
            for task in ended:
                self.latencies.append(time.perf_counter() - flying.pop(task))

    def _ended(self, flying: dict[int, float], *, store: bool) -> list[int]:
        if not store:
            return [t for t in flying if self._adapter.query_load_result(t) is not None]
        done = self._adapter.pop_completed_store_tasks()
        self.errors += sum(not each.is_successful() for each in done.values())
        return list(done)

    def clear(self) -> None:
        self._adapter.delete(self._keys)

    def close(self) -> None:
        self._adapter.close()


class LmcacheNative(Lmcache):
    """The one in C++, with as many threads as it takes if not told otherwise, and with 16."""

    variants = ("page cache", "page cache, 16 threads", "O_DIRECT")

    def _open(self) -> Any:  # noqa: ANN401 - as above
        from lmcache.lmcache_fs import LMCacheFSClient  # noqa: PLC0415
        from lmcache.v1.distributed.l2_adapters.native_connector_l2_adapter import (  # noqa: PLC0415
            NativeConnectorL2Adapter,
        )

        threads, direct = (16 if "16" in self.variant else 4), self.variant == "O_DIRECT"
        client = LMCacheFSClient(str(self.folder), threads, "", direct, 0)
        return NativeConnectorL2Adapter(client, pad_buffers_to_alignment=direct)


class Aiofiles(Peer):
    """What a plain async program does: a temporary file, written and renamed."""

    package = "aiofiles"

    def run(self, *, store: bool) -> None:
        asyncio.run(self._run(store=store))

    async def _run(self, *, store: bool) -> None:
        numbers = iter(range(self.memory.count))

        async def work() -> None:
            for i in numbers:
                started = time.perf_counter()
                try:
                    await self._one(i, store=store)
                except OSError:
                    self.errors += 1
                self.latencies.append(time.perf_counter() - started)

        async def tick() -> None:
            while True:
                due = time.perf_counter() + TICK_S
                await asyncio.sleep(TICK_S)
                self.late.append(time.perf_counter() - due)

        ticker = asyncio.ensure_future(tick())
        await asyncio.gather(*(work() for _ in range(self.in_flight)))
        ticker.cancel()

    async def _one(self, i: int, *, store: bool) -> None:
        import aiofiles  # noqa: PLC0415 - see open
        import aiofiles.os  # noqa: PLC0415

        path, part = self.folder / f"{i}.bin", self.memory.part(i, store=store)
        if not store:
            async with aiofiles.open(path, "rb", buffering=0) as file:
                await file.readinto(part)
            return
        async with aiofiles.open(f"{path}.tmp", "wb", buffering=0) as file:
            await file.write(part)
        await aiofiles.os.replace(f"{path}.tmp", path)


class Kvcr(Peer):
    """NVIDIA's KV Cache Runner with its tier of one file, by NIXL's POSIX plugin.

    Nothing can be stored into the file: a block is put into a pool of memory, and goes there when
    the pool is wanted for another. So the pool is as small as operations are in flight, and a run
    of stores ends when as many more have pushed the last blocks out. It tells nobody what has
    ended, and is asked every millisecond.
    """

    package = "kvcr"
    variants = ("O_DIRECT",)

    def open(self) -> None:
        os.environ.setdefault("UCX_TLS", "self,sm,tcp")
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        import kvcr  # noqa: F401, PLC0415 - see open

        self._loop = asyncio.new_event_loop()
        self._pool = _huge(self.in_flight * self.memory.block)
        self.clear()

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    _runner: Any = None

    def clear(self) -> None:
        """What lies in the file only this process's memory knows; both are begun anew."""
        self.close()
        super().clear()
        self._runner = self._start()

    def run(self, *, store: bool) -> None:
        self._loop.run_until_complete(self._run(store=store))

    async def _run(self, *, store: bool) -> None:
        count = self.memory.count
        numbers = iter(range(count))
        waiting: dict[int, asyncio.Future[bool]] = {}

        async def one(i: int, key: int) -> None:
            call = self._runner.deposit if store else self._runner.deliver
            owner = self._runner.config.nixl_agent_name
            element = i if store else count + i
            handle = call({_kvcr_key(key): [self._reference(owner, element)]})
            done = waiting[handle] = self._loop.create_future()
            self.errors += not await done

        async def work() -> None:
            for i in numbers:
                started = time.perf_counter()
                await one(i, i)
                self.latencies.append(time.perf_counter() - started)

        async def poll() -> None:
            while True:
                await asyncio.sleep(1e-3)
                for handle, results in self._runner.poll_completed():
                    waiting.pop(handle).set_result(all(r.success for r in results.values()))

        polling = asyncio.ensure_future(poll())
        await asyncio.gather(*(work() for _ in range(self.in_flight)))
        if store:
            for i in range(self.in_flight):
                await one(i, count + i)
            while self.stored() < count:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(1e-3)
        polling.cancel()

    def stored(self) -> int:
        from kvcr.types import CacheTier  # noqa: PLC0415 - see open

        keys = [_kvcr_key(i) for i in range(self.memory.count)]
        return sum(tier is CacheTier.G3 for _, tier in self._runner.query(keys))

    @staticmethod
    def _reference(owner: str, element: int) -> Any:  # noqa: ANN401 - its classes have no types
        from kvcr.types import MemoryRef  # noqa: PLC0415 - see open

        return MemoryRef(end_point_name=owner, element_index=element)

    def _start(self) -> Any:  # noqa: ANN401 - as above
        from kvcr import KVCR, KVCRBindings  # noqa: PLC0415 - see open
        from kvcr.config import (  # noqa: PLC0415
            G3Options,
            KVCRBackendConfigs,
            KVCRConfig,
            LocalDramOptions,
        )
        from kvcr.policy import G3FIFOPolicy  # noqa: PLC0415
        from kvcr.types import RegionDescriptor  # noqa: PLC0415

        block, memory = self.memory.block, self.memory
        region = RegionDescriptor(addr=_address(memory.whole), size=block, count=2 * memory.count)
        config = KVCRConfig(
            nixl_agent_name=f"kvcr-{uuid.uuid4()}",
            pool_layouts=[("", block)],
            operation_timeout_ms=30_000,  # its own, 1 s, is for operations that are alone
            abandon_timeout_ms=60_000,
            nixl_listen_port=_free_port(),
        )
        bindings = KVCRBindings(
            request_pin=lambda _: 0,
            poll_pin_results=list,
            release_pin=lambda _: True,
            policy=G3FIFOPolicy(),
        )
        backends = KVCRBackendConfigs(
            framework_regions=[region],
            local_dram=LocalDramOptions(pools=[("", _address(self._pool), len(self._pool))]),
            g3=G3Options(
                paths=(self.folder / "g3",),
                capacity_bytes_per_file=(memory.count + 2 * self.in_flight) * block,
                backend="POSIX",
            ),
        )
        return KVCR(config, bindings, backends)


def _kvcr_key(i: int) -> bytes:
    return i.to_bytes(32, "big")


def _free_port() -> int:
    """NIXL listens; what it listens for is not wanted here."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


class Kvikio(Threaded):
    """KvikIO, a file a block; it has threads of its own for each call."""

    package = "kvikio-cu12"

    def open(self) -> None:
        import kvikio  # noqa: PLC0415 - see open
        import numpy as np  # noqa: PLC0415

        self._open = kvikio.CuFile
        self._array = lambda part: np.frombuffer(part, np.uint8)

    def one(self, i: int, *, store: bool) -> None:
        path, part = self.folder / f"{i}.bin", self._array(self.memory.part(i, store=store))
        if not store:
            with self._open(path, "r") as file:
                file.read(part)
            return
        with self._open(f"{path}.tmp", "w") as file:
            file.write(part)
        Path(f"{path}.tmp").replace(path)


PEERS: dict[str, type[Peer]] = {
    "vllm": Vllm,
    "lmcache-fs": Lmcache,
    "lmcache-fs_native": LmcacheNative,
    "lifeboat": Lifeboat,
    "kvcr": Kvcr,
    "aiofiles": Aiofiles,
    "kvikio": Kvikio,
}


def _turn(peer: Peer, *, store: bool) -> dict[str, Any]:
    if store:
        peer.clear()
    peer.latencies, peer.late, peer.errors = [], [], 0
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    peer.run(store=store)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    memory = peer.memory
    return {
        "nbytes": memory.block * memory.count,
        "seconds": seconds,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "asked": memory.count,
        "succeeded": peer.stored() if store else min(memory.right(), memory.count - peer.errors),
        "latencies": peer.latencies,
        "late": peer.late,
    }


def main() -> None:
    """Answer until there is no more to read."""
    name, variant, folder, block, count, in_flight = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints
    kind = PEERS[name]
    try:
        peer = kind(Path(folder), Memory(int(block), int(count)), int(in_flight), variant)
        said = {"cache": peer.cache, "verifies": kind.verifies, "version": version(kind.package)}
    except Exception as error:  # noqa: BLE001 - whatever keeps it from running here
        answers.write(json.dumps({"unavailable": f"{type(error).__name__}: {error}"}) + "\n")
        return
    answers.write(json.dumps(said) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(_turn(peer, store=line.strip() == "store")) + "\n")
    peer.close()


if __name__ == "__main__":
    main()
