"""Blocks in GPU memory: their checksums, the same xxh3-128 as the host's, and copies of pieces.

Owns the compiled kernels (``kernels.cu``) and the memory of every launch until its event
has completed, whoever lets go of it before. The caller keeps the blocks' memory alive and as it
is for so long. Making :class:`Kernels` reads a file, compiles and waits, a second or so; a launch
waits for nothing but its own memory, which comes from CuPy's pools, and for what had begun if its
event can't be recorded; if it fails half-way, that is told once what had begun has run. One thread
at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections import deque
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import xxhash

from kvgds.errors import BusyError, ConfigError, PathUnavailable
from kvgds.memory.device import NOT_READY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

SOURCE = "kernels.cu"
SHORTEST = 241  # XXH3 hashes what is shorter in other ways; that is left to the host
DIGEST_BYTES = 16
LANES = 8
SUM_BYTES = 64  # a row: one sum for each lane
WORD_BYTES = 8
SPARE_ROWS = 64  # the chains read ahead, past the last

_KIB = 1024
_SUMS_THREADS = 64  # as in the kernels' launch bounds
_SUMS_ROWS = _SUMS_THREADS // 4
_DIGEST_THREADS = 32
_MOST_BLOCKS = 65535  # CUDA's limit on a grid's second axis
COPY_THREADS = 128
COPY_BYTES = 16 * _KIB  # of one thread block
COPY_UNIT = 16  # what addresses and sizes of copies are multiples of


T = TypeVar("T", bound="Launch")


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


def copy_grids(copies: NDArray[np.uint64]) -> list[tuple[int, tuple[int, int]]]:
    """The launches that a table of copies (to, from, bytes) takes: the first copy, and the grid.

    Raises:
        ConfigError: something is no multiple of :data:`COPY_UNIT`.
    """
    if (copies % np.uint64(COPY_UNIT)).any():
        raise ConfigError("copies", copies.tolist()[:3], f"must be multiples of {COPY_UNIT}")
    parts = [(i, copies[i : i + _MOST_BLOCKS, 2]) for i in range(0, len(copies), _MOST_BLOCKS)]
    return [(i, (-(-max(int(sizes.max()), 1) // COPY_BYTES), len(sizes))) for i, sizes in parts]


class Launch:
    """Kernels under way.

    Attributes:
        event: CuPy's event (``event.ptr`` for other libraries), recorded behind the kernels.
        memory: what they use besides the blocks.
        refused: why some were not launched, told once those before them have run.
    """

    def __init__(self, cupy: Any) -> None:  # noqa: ANN401 - CuPy has no types
        self.event = cupy.cuda.Event(disable_timing=True)
        self.memory: list[Any] = []
        self.refused = ""
        # Event.done takes an error for an event that is yet to come
        self._query: Callable[[int], int] = cupy.cuda.runtime.eventQuery

    @property
    def done(self) -> bool:
        """Whether they have run. Doesn't wait, unless that can't be asked.

        Raises:
            PathUnavailable: the GPU failed, they run no more; or some were refused.
        """
        over = self.over
        if over and self.refused:
            raise PathUnavailable(self.refused)
        return over

    @property
    def over(self) -> bool:
        """Whether nothing uses their memory any more; see :attr:`done`."""
        status = self._query(self.event.ptr)
        if status not in {0, NOT_READY}:
            with contextlib.suppress(Exception):  # CuPy's; of a GPU that is gone
                self.event.synchronize()
            raise PathUnavailable(f"the GPU failed before its kernels ran: CUDA error {status}")
        return bool(status == 0)


class Digests(Launch):
    """The checksums of one launch, there once it is done."""

    host: NDArray[np.uint8]

    def read(self) -> list[bytes]:
        """What ``xxhash.xxh3_128_digest`` says of each block, in the order of the launch.

        Raises:
            BusyError: the GPU has not come so far.
            PathUnavailable: it failed.
        """
        if not self.done:
            raise BusyError("these checksums are still being made; wait for their event first")
        whole = self.host.tobytes()
        return [whole[i : i + DIGEST_BYTES] for i in range(0, len(whole), DIGEST_BYTES)]


class Kernels:
    """Makes checksums and copies on one GPU. Needs CuPy.

    Sums take a 16th of the blocks' size in GPU memory until a launch is done.

    Raises:
        ImportError: there is no CuPy.
        PathUnavailable: a first checksum or copy came out wrong.
        Exception: CuPy's own, where the device or the compiler can't be had.
    """

    def __init__(self, device: int) -> None:
        import cupy  # noqa: PLC0415 - optional, and slow to import

        self.device = device
        self._cupy = cupy
        self._launched: deque[Launch] = deque()
        self._streams: dict[int, Any] = {}
        source = resources.files(__package__).joinpath(SOURCE).read_text()
        with cupy.cuda.Device(device):
            module = cupy.RawModule(code=source, options=("-std=c++14",))
            names = ("kvgds_sums", "kvgds_chain", "kvgds_digest")
            self._sums = [module.get_function(name) for name in names]
            self._copy = module.get_function("kvgds_copy")
            self._prove()

    def _prove(self) -> None:
        """Copy, make checksums and compare.

        It loads the kernels too, which else a launch waits for.
        """
        data = np.arange(5 * _KIB, dtype=np.uint16).view(np.uint8)
        stream = self._cupy.cuda.Stream(non_blocking=True)
        with stream:
            there = self._cupy.asarray(data)
            turned = self._cupy.empty(data.size, np.uint8)
        start, to = there.data.ptr, turned.data.ptr
        copying = self.copy([(to, start + 4096, 6144), (to + 6144, start, 4096)], stream.ptr)
        blocks = [[(start, 4096), (start + 4096, 6128)], [(to + 6144, 4096), (to, 6128)]]
        digests = self.checksums(blocks, stream.ptr)
        digests.event.synchronize()
        first, copied = digests.read()
        if first != xxhash.xxh3_128_digest(data.tobytes()[: 4096 + 6128]):
            raise PathUnavailable(f"GPU {self.device} makes checksums that are not xxhash's")
        if not copying.done or copied != first:
            raise PathUnavailable(f"GPU {self.device} copies other bytes than there are")

    def copy(self, copies: Sequence[tuple[int, int, int]], stream: int) -> Launch:
        """Start copies (to, from, bytes), which don't depend on each other, behind `stream`.

        Raises:
            ConfigError: something is no multiple of :data:`COPY_UNIT`.
        """
        table = np.array(copies, np.uint64).reshape(-1, 3)
        grids = copy_grids(table)
        with self._launching(Launch, stream) as (launch, queue):
            there = self._table(launch, table, queue)
            for first, grid in grids:
                self._copy(grid, (COPY_THREADS,), (there, np.uint32(first)))
        return launch

    def checksums(self, blocks: Sequence[Sequence[tuple[int, int]]], stream: int) -> Digests:
        """Start on blocks given as gather lists of (address, bytes), behind what is on `stream`.

        Args:
            blocks: fastest where 16 divides every address and size, and fragments hold whole KiB.
            stream: a ``cudaStream_t`` of this device; 0 is the default stream.

        Raises:
            ConfigError: a block is shorter than :data:`SHORTEST`, or there are none or too many.
        """
        plan = plan_of(blocks)
        with self._launching(Digests, stream) as (digests, queue):
            self._enqueue(plan, digests, queue)
        return digests

    @contextlib.contextmanager
    def _launching(self, kind: type[T], stream: int) -> Iterator[tuple[T, Any]]:
        """Make a stream the one that is given work; its memory is kept until that has run."""
        with self._cupy.cuda.Device(self.device), self._stream(stream) as queue:
            while self._launched and self._launched[0].over:  # this may fail: before all begins
                self._launched.popleft()
            launch = kind(self._cupy)
            try:
                yield launch, queue
            except Exception as error:  # noqa: BLE001 - told once nothing begun goes on any more
                launch.refused = str(error) or type(error).__name__
            try:
                launch.event.record(queue)
            except Exception:
                queue.synchronize()
                raise
            self._launched.append(launch)

    def _enqueue(self, plan: Plan, digests: Digests, queue: Any) -> None:  # noqa: ANN401 - CuPy has no types
        answer = self._pinned(digests, DIGEST_BYTES * plan.blocks)
        digests.host = np.frombuffer(answer, np.uint8, DIGEST_BYTES * plan.blocks)
        table = self._table(digests, plan.table, queue)
        sums = self._empty(digests, (plan.rows + SPARE_ROWS) * SUM_BYTES // WORD_BYTES)
        lanes = self._empty(digests, plan.blocks * LANES)
        out = self._empty(digests, DIGEST_BYTES * plan.blocks // WORD_BYTES)
        count = np.uint32(plan.blocks)
        arguments = (table, count, sums), (table, sums, lanes), (table, count, lanes, out)
        for kernel, grid, threads, given in zip(
            self._sums, plan.grids, THREADS, arguments, strict=True
        ):
            kernel(grid, (threads,), given)
        out.data.copy_to_host_async(answer.ptr, out.nbytes, queue)

    def _table(self, launch: Launch, table: NDArray[np.uint64], queue: Any) -> Any:  # noqa: ANN401 - see above
        """A table on its way to the GPU: where it will be."""
        said = self._pinned(launch, table.nbytes)
        np.frombuffer(said, np.uint64, table.size)[:] = table.ravel()
        there = self._empty(launch, table.size)
        there.data.copy_from_host_async(said.ptr, table.nbytes, queue)
        return there

    def _stream(self, stream: int) -> Any:  # noqa: ANN401 - CuPy has no types
        if stream not in self._streams:
            with warnings.catch_warnings():
                # CuPy 14 deprecates it, but what it offers instead may own the stream: there are
                # versions whose Stream.from_external() ends in the caller's stream destroyed.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._streams[stream] = self._cupy.cuda.ExternalStream(stream)
        return self._streams[stream]

    def _pinned(self, launch: Launch, nbytes: int) -> Any:  # noqa: ANN401 - CuPy has no types
        launch.memory.append(self._cupy.cuda.alloc_pinned_memory(nbytes))
        return launch.memory[-1]

    def _empty(self, launch: Launch, words: int) -> Any:  # noqa: ANN401 - CuPy has no types
        launch.memory.append(self._cupy.empty(words, np.uint64))
        return launch.memory[-1]
