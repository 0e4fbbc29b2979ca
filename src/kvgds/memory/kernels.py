"""Checksums of blocks in GPU memory, made there: the same xxh3-128 as the host's.

Owns the compiled kernels (``kernels.cu``) and the memory of every launch until its event
has completed, whoever lets go of it before. The caller keeps the blocks' memory alive and as it
is for so long. Making :class:`Checksums` reads a file, compiles and waits, a second or so; a launch
waits for nothing but its own memory, which comes from CuPy's pools. One thread at a time.
"""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from kvgds.errors import BusyError, ConfigError, PathUnavailable
from kvgds.memory.device import NOT_READY

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

SOURCE = "kernels.cu"
SHORTEST = 241  # XXH3 hashes what is shorter in other ways; that is left to the host
DIGEST_BYTES = 16
LANES = 8
SUM_BYTES = 64  # a row: one sum for each lane
SPARE_ROWS = 64  # the chains read ahead, past the last

_KIB = 1024
_SUMS_THREADS = 64  # as in the kernels' launch bounds
_SUMS_ROWS = _SUMS_THREADS // 4
_DIGEST_THREADS = 32
_MOST_BLOCKS = 65535  # CUDA's limit on a grid's second axis


class Plan(NamedTuple):
    """What the kernels are told of the blocks of one launch.

    Attributes:
        table: blocks and fragments, as ``kernels.cu`` describes them.
        blocks: how many blocks.
        rows: sums of all blocks, one a KiB.
        widest: rows of the longest block.
    """

    table: NDArray[np.uint64]
    blocks: int
    rows: int
    widest: int

    @property
    def grids(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """How many thread blocks each of the three kernels takes."""
        sums = -(-self.widest // _SUMS_ROWS)
        return (sums, self.blocks), (self.blocks, 1), (-(-self.blocks // _DIGEST_THREADS), 1)


THREADS = (_SUMS_THREADS, LANES, _DIGEST_THREADS)


def plan_of(blocks: Sequence[Sequence[tuple[int, int]]]) -> Plan:
    """Lay out gather lists of (address, bytes) for the kernels.

    Raises:
        ConfigError: a block is too short, or there are none or too many.
    """
    if not 0 < len(blocks) <= _MOST_BLOCKS:
        raise ConfigError("blocks", len(blocks), f"must be 1 to {_MOST_BLOCKS} blocks")
    counts = np.fromiter(map(len, blocks), np.uint64, len(blocks))
    stops = np.cumsum(counts)
    flat = itertools.chain.from_iterable(itertools.chain.from_iterable(blocks))
    fragments = np.fromiter(flat, np.uint64, 2 * int(stops[-1])).reshape(-1, 2)
    ends = np.concatenate([np.zeros(1, np.uint64), np.cumsum(fragments[:, 1])])
    firsts = stops - counts
    nbytes = ends[stops] - ends[firsts]
    if int(nbytes.min()) < SHORTEST:
        raise ConfigError("blocks", int(nbytes.min()), f"must be at least {SHORTEST} bytes each")
    rows = (nbytes - np.uint64(1)) // np.uint64(_KIB) + np.uint64(1)
    within = ends[1:] - np.repeat(ends[firsts], counts.astype(np.intp))
    bases = fragments[:, 0] - (within - fragments[:, 1])  # mod 2^64, undone by adding a place
    table = np.concatenate(
        [
            np.column_stack([firsts, counts, nbytes, np.cumsum(rows) - rows]).ravel(),
            np.column_stack([bases, within]).ravel(),
        ]
    )
    return Plan(table, len(blocks), int(rows.sum()), int(rows.max()))


class Digests:
    """The checksums of one launch: there once its event has completed.

    Attributes:
        event: CuPy's event (``event.ptr`` for other libraries), recorded behind the kernels.
    """

    def __init__(
        self,
        event: Any,  # noqa: ANN401 - CuPy has no types
        host: NDArray[np.uint8],
        memory: tuple[Any, ...],
        query: Callable[[int], int],
    ) -> None:
        self.event = event
        self._query = query  # Event.done takes an error for an event that is yet to come
        self._host = host
        self._memory = memory

    @property
    def done(self) -> bool:
        """Whether they can be read. Doesn't wait.

        Raises:
            PathUnavailable: the GPU failed; they will never be there.
        """
        status = self._query(self.event.ptr)
        if status not in {0, NOT_READY}:
            raise PathUnavailable(
                f"the GPU failed before it had the checksums: CUDA error {status}"
            )
        return bool(status == 0)

    def read(self) -> list[bytes]:
        """What ``xxhash.xxh3_128_digest`` says of each block, in the order of the launch.

        Raises:
            BusyError: the GPU has not come so far.
            PathUnavailable: it failed.
        """
        if not self.done:
            raise BusyError("these checksums are still being made; wait for their event first")
        whole = self._host.tobytes()
        return [whole[i : i + DIGEST_BYTES] for i in range(0, len(whole), DIGEST_BYTES)]


class Checksums:
    """Makes checksums on one GPU. Needs CuPy.

    Sums take a 16th of the blocks' size in GPU memory until a launch is done.

    Raises:
        ImportError: there is no CuPy.
        PathUnavailable: a first checksum came out wrong.
        Exception: CuPy's own, where the device or the compiler can't be had.
    """

    def __init__(self, device: int) -> None:
        import cupy  # noqa: PLC0415 - optional, and slow to import

        self.device = device
        self._cupy = cupy
        self._launched: deque[Digests] = deque()
        self._streams: dict[int, Any] = {}
        source = resources.files(__package__).joinpath(SOURCE).read_text()
        with cupy.cuda.Device(device):
            module = cupy.RawModule(code=source, options=("-std=c++14",))
            names = ("kvgds_sums", "kvgds_chain", "kvgds_digest")
            self._kernels = [module.get_function(name) for name in names]
            self._prove()

    def _prove(self) -> None:
        """Make a checksum and compare. It loads the kernels too, which else a launch waits for."""
        data = np.arange(5 * _KIB, dtype=np.uint16).view(np.uint8)
        stream = self._cupy.cuda.Stream(non_blocking=True)
        with stream:
            copy = self._cupy.asarray(data)
        digests = self.launch([[(copy.data.ptr, 4096), (copy.data.ptr + 4096, 6128)]], stream.ptr)
        digests.event.synchronize()
        if digests.read() != [xxhash.xxh3_128_digest(data.tobytes()[: 4096 + 6128])]:
            raise PathUnavailable(f"GPU {self.device} makes checksums that are not xxhash's")

    def launch(self, blocks: Sequence[Sequence[tuple[int, int]]], stream: int) -> Digests:
        """Start on blocks given as gather lists of (address, bytes), behind what is on `stream`.

        Args:
            blocks: fastest where 16 divides every address and size, and fragments hold whole KiB.
            stream: a ``cudaStream_t`` of this device; 0 is the default stream.

        Raises:
            ConfigError: a block is shorter than :data:`SHORTEST`, or there are none or too many.
        """
        plan = plan_of(blocks)
        with self._cupy.cuda.Device(self.device), self._stream(stream) as queue:
            digests = self._enqueue(plan, queue)
        while self._launched and self._launched[0].done:
            self._launched.popleft()
        self._launched.append(digests)
        return digests

    def _enqueue(self, plan: Plan, queue: Any) -> Digests:  # noqa: ANN401 - CuPy has no types
        cupy = self._cupy
        said, answer = self._pinned(plan.table.nbytes), self._pinned(DIGEST_BYTES * plan.blocks)
        np.frombuffer(said, np.uint64, plan.table.size)[:] = plan.table
        host = np.frombuffer(answer, np.uint8, DIGEST_BYTES * plan.blocks)
        table = cupy.empty(plan.table.size, np.uint64)
        sums = cupy.empty((plan.rows + SPARE_ROWS) * SUM_BYTES, np.uint8)
        lanes = cupy.empty(plan.blocks * LANES, np.uint64)
        out = cupy.empty(host.nbytes, np.uint8)
        digests = Digests(
            cupy.cuda.Event(disable_timing=True),
            host,
            (said, answer, table, sums, lanes, out),
            cupy.cuda.runtime.eventQuery,
        )
        table.data.copy_from_host_async(said.ptr, plan.table.nbytes, queue)
        count = np.uint32(plan.blocks)
        arguments = (table, count, sums), (table, sums, lanes), (table, count, lanes, out)
        for kernel, grid, threads, given in zip(
            self._kernels, plan.grids, THREADS, arguments, strict=True
        ):
            kernel(grid, (threads,), given)
        out.data.copy_to_host_async(answer.ptr, host.nbytes, queue)
        digests.event.record(queue)
        return digests

    def _stream(self, stream: int) -> Any:  # noqa: ANN401 - CuPy has no types
        if stream not in self._streams:
            with warnings.catch_warnings():
                # CuPy 14 deprecates it, but what it offers instead may own the stream: there are
                # versions whose Stream.from_external() ends in the caller's stream destroyed.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._streams[stream] = self._cupy.cuda.ExternalStream(stream)
        return self._streams[stream]

    def _pinned(self, nbytes: int) -> Any:  # noqa: ANN401 - CuPy has no types
        return self._cupy.cuda.alloc_pinned_memory(nbytes)
