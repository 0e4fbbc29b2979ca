"""The GPU's checksums are xxhash's, whatever the size, the cuts and the neighbours in a launch.

Without a GPU: no kernel has a barrier, so a C++ shim calls each one for every thread of its grid,
forwards or backwards, on the host's memory. It checks every load of the kernels against the
memory that they were given, and the alignment of it. With a GPU: the same through CuPy.
"""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
import sys
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgds.errors import BusyError, ConfigError
from kvgds.memory.kernels import (
    DIGEST_BYTES,
    LANES,
    SHORTEST,
    SOURCE,
    SPARE_ROWS,
    SUM_BYTES,
    THREADS,
    Checksums,
    plan_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

KIB = 1024
MIB = 1 << 20
SPIN = """
extern "C" __global__ void spin(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""
SHIM = """
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
struct Place { unsigned x, y; };
static Place blockIdx, blockDim, threadIdx;
struct ulonglong2 { unsigned long long x, y; };

static const uint64_t* ranges;  // begin, end, begin, end, ... ascending
static uint64_t range_words;
static uint64_t loads, bytes_alone;  // all loads, and those of a single byte

static void check(const void* pointer, uint64_t size) {
    uint64_t at = (uint64_t)pointer;
    const uint64_t* stop = ranges + range_words;
    const uint64_t* after = std::upper_bound(ranges, stop, at);
    bool inside = (after - ranges) % 2 == 1 && at + size <= *after;
    if (!inside || at % size) {  // to go on might never end
        std::fprintf(stderr, "a load of %llu at %#llx\\n", (unsigned long long)size,
                     (unsigned long long)at);
        std::abort();
    }
    loads++;
    bytes_alone += size == 1;
}
template <class T> static T loaded(const T* pointer) {
    check(pointer, sizeof(T));
    return *pointer;
}
template <class T> static T __ldcs(const T* pointer) { return loaded(pointer); }
template <class T> static T __ldcg(const T* pointer) { return loaded(pointer); }
template <class T> static T __ldg(const T* pointer);
#include KERNELS
template <class T> static T __ldg(const T* pointer) {
    uint64_t at = (uint64_t)pointer;
    uint64_t secret = at - (uint64_t)SECRET, start = at - (uint64_t)START;
    if (secret <= sizeof SECRET - sizeof(T) || start <= sizeof START - sizeof(T)) return *pointer;
    return loaded(pointer);
}
template <class F>
static void grid(const unsigned* size, unsigned threads, int backwards, F kernel) {
    uint64_t all = (uint64_t)size[0] * size[1] * threads;
    blockDim = {threads, 1};
    for (uint64_t i = 0; i < all; i++) {
        uint64_t n = backwards ? all - 1 - i : i;
        threadIdx = {(unsigned)(n % threads), 0};
        blockIdx = {(unsigned)(n / threads % size[0]), (unsigned)(n / threads / size[0])};
        kernel();
    }
}
extern "C" void run(const uint64_t* valid, uint64_t words, const unsigned* grids,
                    const unsigned* threads, int backwards, const u64* table, u32 blocks,
                    u64* sums, u64* lanes, unsigned char* digests, uint64_t* seen) {
    ranges = valid;
    range_words = words;
    loads = bytes_alone = 0;
    ulonglong2* pairs = reinterpret_cast<ulonglong2*>(sums);
    grid(grids, threads[0], backwards, [&] { kvgds_sums(table, blocks, pairs); });
    grid(grids + 2, threads[1], backwards, [&] { kvgds_chain(table, sums, lanes); });
    grid(grids + 4, threads[2], backwards, [&] { kvgds_digest(table, blocks, lanes, digests); });
    seen[0] = loads;
    seen[1] = bytes_alone;
}
"""

EDGES = [
    *(241, 255, 256, 257, 271, 272, 511, 512, 513, 1007, 1008, 1009, 1023, 1024, 1025, 1039, 1040),
    *(k * KIB + d for k in (2, 3, 4, 31, 32, 33, 34, 64, 65, 66, 128) for d in (-64, -16, -1)),
    *(k * KIB + d for k in (2, 3, 4, 31, 32, 33, 34, 64, 65, 66, 128) for d in (0, 1, 16, 63, 64)),
    *(4096 * k for k in (5, 7, 81)),
    *(2 * MIB - 64, 2 * MIB, 2 * MIB + 64),
]

Gather = list[tuple[int, int]]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    """The kernels, compiled for the host."""
    return Shim(tmp_path_factory.mktemp("shim"))


class Shim:
    """Runs a launch's kernels on the CPU."""

    def __init__(self, folder: Path) -> None:
        (folder / "shim.cpp").write_text(SHIM)
        # what CUDA says in `#pragma unroll`, gcc says otherwise
        flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-std=c++14"]
        with resources.as_file(resources.files("kvgds.memory").joinpath(SOURCE)) as source:
            build = [f'-DKERNELS="{source}"', "-shared", "-fPIC", "-o", "shim.so", "shim.cpp"]
            gcc = shutil.which("g++") or "c++"
            subprocess.run([gcc, *flags, *build], cwd=folder, check=True)
        self._run = ctypes.CDLL(str(folder / "shim.so")).run
        self.loads = self.bytes_alone = 0

    def digests(self, blocks: Sequence[Gather], *, backwards: bool = False) -> list[bytes]:
        plan = plan_of(blocks)
        table = plan.table
        # what is not written stands out: garbage everywhere
        sums = _aligned((plan.rows + SPARE_ROWS) * SUM_BYTES // 8, 0xA5A5A5A5A5A5A5A5)
        lanes = np.full(plan.blocks * LANES, 0x5A5A5A5A5A5A5A5A, np.uint64)
        out = np.full(plan.blocks * DIGEST_BYTES + 1, 0xEE, np.uint8)
        given = [(a, n) for gather in blocks for a, n in gather if n]
        given += [(a.ctypes.data, a.nbytes) for a in (table, sums, lanes)]
        # blocks may share memory or lie side by side: one range of what touches
        ranges: list[list[int]] = []
        for address, n in sorted(given):
            if ranges and address <= ranges[-1][1]:
                ranges[-1][1] = max(ranges[-1][1], address + n)
            else:
                ranges.append([address, address + n])
        valid = np.array(ranges, np.uint64).ravel()
        seen = np.zeros(2, np.uint64)
        self._run(
            valid.ctypes,
            ctypes.c_uint64(valid.size),
            np.array(plan.grids, np.uint32).ctypes,
            np.array(THREADS, np.uint32).ctypes,
            ctypes.c_int(backwards),
            table.ctypes,
            ctypes.c_uint32(plan.blocks),
            *(a.ctypes for a in (sums, lanes, out, seen)),
        )
        assert out[-1] == 0xEE
        assert set(sums[-SPARE_ROWS * SUM_BYTES // 8 :].tolist()) == {0xA5A5A5A5A5A5A5A5}
        self.loads, self.bytes_alone = (int(n) for n in seen)
        whole = out[:-1].tobytes()
        return [whole[i : i + DIGEST_BYTES] for i in range(0, len(whole), DIGEST_BYTES)]


def _aligned(words: int, fill: int = 0) -> NDArray[np.uint64]:
    whole = np.full(words + 2, fill, np.uint64)
    start = -whole.ctypes.data % 16 // 8
    return whole[start : start + words]


class Memory:
    """Blocks of random bytes, cut up and scattered over one array in any order, with gaps."""

    def __init__(self, seed: int, blocks: Sequence[Sequence[int]], shift: int = 0) -> None:
        rng = random.Random(seed)
        cuts = [(i, j, n) for i, block in enumerate(blocks) for j, n in enumerate(block)]
        rng.shuffle(cuts)
        places, end = {}, 0
        for i, j, n in cuts:
            places[i, j] = end
            end += -(-n // 16) * 16 + 16 * rng.randrange(1, 4)
        self.words = _aligned((end + shift) // 8 + 2)
        self.bytes = self.words.view(np.uint8)
        self.bytes[:] = np.frombuffer(rng.randbytes(self.bytes.size), np.uint8)
        self.offsets = [
            [(places[i, j] + shift, n) for j, n in enumerate(block)]
            for i, block in enumerate(blocks)
        ]

    def gathers(self, base: int | None = None) -> list[Gather]:
        start = self.words.ctypes.data if base is None else base
        return [[(start + offset, n) for offset, n in block] for block in self.offsets]

    def expected(self) -> list[bytes]:
        return [
            xxhash.xxh3_128_digest(b"".join(self.bytes[o : o + n].tobytes() for o, n in block))
            for block in self.offsets
        ]


def _cut(rng: random.Random, nbytes: int, unit: int, most: int) -> list[int]:
    """Lengths that add up to nbytes; all but the last are multiples of unit."""
    lengths: list[int] = []
    while nbytes:
        n = min(nbytes, unit * rng.randrange(1, max(2, most // unit + 1)))
        lengths.append(n)
        nbytes -= n
    return lengths


@pytest.mark.parametrize("nbytes", EDGES)
def test_every_edge(shim: Shim, nbytes: int) -> None:
    memory = Memory(nbytes, [[nbytes]])
    assert shim.digests(memory.gathers()) == memory.expected()


@pytest.mark.parametrize("nbytes", [n for n in EDGES if n < MIB])
def test_every_edge_in_shreds(shim: Shim, nbytes: int) -> None:
    rng = random.Random(nbytes)
    memory = Memory(nbytes, [_cut(rng, nbytes, 16, most) for most in (16, 48, 400, 5000)])
    assert shim.digests(memory.gathers(), backwards=True) == memory.expected()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(SHORTEST, 70 * KIB), min_size=1, max_size=40),
    unit=st.sampled_from([1, 8, 16, 64, 1024, 4096]),
    most=st.sampled_from([64, 1000, 4096, 40000]),
    shift=st.sampled_from([0, 0, 8, 1]),
    backwards=st.booleans(),
)
def test_any_blocks_of_any_cut(
    shim: Shim, *, seed: int, sizes: list[int], unit: int, most: int, shift: int, backwards: bool
) -> None:
    rng = random.Random(seed)
    whole = unit if unit >= 16 and rng.random() < 0.5 else 1
    sizes = [max(-(-SHORTEST // whole) * whole, n // whole * whole) for n in sizes]
    memory = Memory(seed, [_cut(rng, n, unit, most) for n in sizes], shift)
    assert shim.digests(memory.gathers(), backwards=backwards) == memory.expected()


def test_pages_take_the_wide_loads(shim: Shim) -> None:
    memory = Memory(1, [[4096] * 160] * 3)
    assert shim.digests(memory.gathers()) == memory.expected()
    assert shim.bytes_alone == 0
    shredded = Memory(2, [[16] * 500, [48] * 500])
    assert shim.digests(shredded.gathers()) == shredded.expected()
    assert shim.bytes_alone == 0


def test_empty_fragments_and_one_memory_twice(shim: Shim) -> None:
    memory = Memory(3, [[4096, 2048]])
    (gather,) = memory.gathers()
    odd = [(0, 0), gather[0], (gather[0][0], 0), gather[1], (16, 0)]
    assert shim.digests([gather, odd, gather]) == memory.expected() * 3


def test_one_bit_anywhere_changes_the_digest(shim: Shim) -> None:
    memory = Memory(4, [[1024, 16, 3056, 80]])
    whole = shim.digests(memory.gathers())
    for offset, n in memory.offsets[0]:
        for at in (offset, offset + n // 2, offset + n - 1):
            memory.bytes[at] ^= 1
            assert shim.digests(memory.gathers()) == memory.expected() != whole
            memory.bytes[at] ^= 1


@pytest.mark.parametrize("blocks", [[], [[(4096, 240)]], [[(4096, 4096)], []]])
def test_what_the_host_has_to_hash(blocks: list[Gather]) -> None:
    with pytest.raises(ConfigError, match="blocks"):
        plan_of(blocks)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no CUDA compiler")
def test_it_compiles_for_a_gpu(tmp_path: Path) -> None:
    compiler = shutil.which("nvcc") or ""
    with resources.as_file(resources.files("kvgds.memory").joinpath(SOURCE)) as source:
        done = subprocess.run(
            [
                compiler,
                *["-std=c++14", "-arch=sm_80", "-cubin", "-Xptxas", "-v", "-o"],
                tmp_path / "out",
                source,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("0 bytes stack frame, 0 bytes spill stores") == 3


@pytest.fixture
def cupy() -> Iterator[Any]:
    module = pytest.importorskip("cupy")
    if not module.cuda.is_available():
        pytest.skip("no device for CuPy")
    yield module
    module.cuda.runtime.deviceSynchronize()


@pytest.mark.gpu
@pytest.mark.timeout(240)
def test_on_a_gpu(cupy: Any) -> None:
    checksums, stream = Checksums(0), cupy.cuda.Stream(non_blocking=True)
    rng = random.Random(5)
    memories = [Memory(n, [[n]]) for n in EDGES]
    for seed in range(40):
        sizes = [rng.randrange(SHORTEST, 300 * KIB) for _ in range(rng.randrange(1, 40))]
        unit = rng.choice([1, 16, 64, 1024, 4096])
        cut = [_cut(rng, n, unit, rng.choice([64, 1000, 40000, MIB])) for n in sizes]
        memories.append(Memory(seed, cut, rng.choice([0, 0, 1])))
    with stream:
        copies = [cupy.asarray(memory.bytes) for memory in memories]
    launched = [
        checksums.launch(memory.gathers(copy.data.ptr), stream.ptr)
        for memory, copy in zip(memories, copies, strict=True)
    ]
    launched[-1].event.synchronize()
    assert [digests.read() for digests in launched] == [m.expected() for m in memories]


@pytest.mark.gpu
def test_unfinished_checksums_are_not_read(cupy: Any) -> None:
    checksums, stream = Checksums(0), cupy.cuda.Stream(non_blocking=True)
    memory = cupy.zeros(512 * MIB, np.uint8)
    cupy.cuda.Device(0).synchronize()
    digests = checksums.launch([[(memory.data.ptr, memory.nbytes)]], stream.ptr)
    with pytest.raises(BusyError):  # 5 ms of chain lie before it
        digests.read()
    digests.event.synchronize()
    assert digests.read() == [xxhash.xxh3_128_digest(bytes(memory.nbytes))]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("blocks", "nbytes", "fragment"),
    [
        (1, 2 * MIB, 2 * MIB),
        (64, 2 * MIB, 2 * MIB),
        (64, 2 * MIB, 4096),
        (256, 2 * MIB, 64 * KIB),
        (1, 64 * MIB, 2 * MIB),
        (32, 64 * MIB, 2 * MIB),
    ],
)
def test_how_fast(
    cupy: Any, capsys: pytest.CaptureFixture[str], blocks: int, nbytes: int, fragment: int
) -> None:
    checksums, stream = Checksums(0), cupy.cuda.Stream(non_blocking=True)
    memory = cupy.zeros(blocks * nbytes, np.uint8)
    cupy.cuda.Device(0).synchronize()
    gathers = [
        [(memory.data.ptr + i * nbytes + at, fragment) for at in range(0, nbytes, fragment)]
        for i in range(blocks)
    ]
    times, spin = [], cupy.RawKernel(SPIN, "spin")
    for _ in range(12):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        with stream:  # some 30 ms, in which Python launches all: its own time is not measured
            spin((1,), (1,), (np.int64(50_000_000),))
        start.record(stream)
        digests = checksums.launch(gathers, stream.ptr)
        stop.record(stream)
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop) * 1e3)
        assert len(digests.read()) == blocks
    best, median = min(times), sorted(times)[len(times) // 2]
    with capsys.disabled():
        sys.stdout.write(
            f"\n{blocks} x {nbytes >> 10} KiB in pieces of {fragment >> 10} KiB: median "
            f"{median:.0f} us, least {best:.0f} us, {blocks * nbytes / median / 1e3:.0f} GB/s\n"
        )
