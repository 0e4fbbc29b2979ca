"""The GPU's checksums are xxhash's, whatever the size, the cuts and the neighbours in a launch.

Without a GPU: no kernel has a barrier, so each one is called for every thread of its grid, forwards
and backwards, on the host's memory. Every load and store is checked against the memory that the
launch was given, and for its alignment. With a GPU: the same through CuPy. On the simulated GPU:
`simulator/checks_kernels.py`.
"""

from __future__ import annotations

import ctypes
import sys
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xxhash

from checksums import KIB, MIB, ChecksumContract, Gather, Memory, OnGpu, aligned
from kvgds.errors import BusyError, ConfigError
from kvgds.memory.device import packaged
from kvgds.memory.kernels import (
    COPY_THREADS,
    DIGEST_BYTES,
    LANES,
    SOURCE,
    SPARE_ROWS,
    SUM_BYTES,
    THREADS,
    Kernels,
    Plan,
    copy_grids,
    plan_of,
)
from simulator.kernels import Launch, Range, compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from checksums import Start

SPIN = """
extern "C" __global__ void spin(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""


class OnHost:
    """Runs a launch's kernels on the CPU, at once and twice: threads in either order."""

    def __init__(self) -> None:
        library = compiled(resources.files("kvgds.memory").joinpath(SOURCE).read_text())
        self._kernels = (library.run_kvgds_sums, library.run_kvgds_chain, library.run_kvgds_digest)
        self._copy = library.run_kvgds_copy
        self.loads = self.bytes_alone = 0

    def __call__(self, memory: Memory, /) -> Callable[[], list[bytes]]:
        forwards, backwards = (self._digests(memory, backwards=order) for order in (False, True))
        assert forwards == backwards
        return lambda: forwards

    def _digests(self, memory: Memory, *, backwards: bool) -> list[bytes]:
        gathers = memory.gathers(memory.words.ctypes.data)
        plan = plan_of(gathers)
        # what is not written stands out: garbage everywhere
        sums = aligned((plan.rows + SPARE_ROWS) * SUM_BYTES // 8, 0xA5A5A5A5A5A5A5A5)
        lanes = np.full(plan.blocks * LANES, 0x5A5A5A5A5A5A5A5A, np.uint64)
        out = np.full(plan.blocks * DIGEST_BYTES, 0xEE, np.uint8)
        self._run(plan, gathers, (sums, lanes, out), backwards=backwards)
        assert set(sums[-SPARE_ROWS * SUM_BYTES // 8 :].tolist()) == {0xA5A5A5A5A5A5A5A5}
        whole = out.tobytes()
        return [whole[i : i + DIGEST_BYTES] for i in range(0, len(whole), DIGEST_BYTES)]

    def _run(
        self,
        plan: Plan,
        gathers: Sequence[Gather],
        written: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
        *,
        backwards: bool,
    ) -> None:
        own = [(array.ctypes.data, array.nbytes) for array in (plan.table, *written)]
        ranges = _ranges([*own, *(fragment for gather in gathers for fragment in gather)])
        table, sums, lanes, out = (address for address, _ in own)
        given = (table, plan.blocks, sums), (table, sums, lanes), (table, plan.blocks, lanes, out)
        self.loads = self.bytes_alone = 0
        for kernel, arguments, grid, threads in zip(
            self._kernels, given, plan.grids, THREADS, strict=True
        ):
            launch = Launch(ranges, len(ranges), arguments, grid, threads, backwards)
            assert kernel(ctypes.byref(launch)) == 0
            self.loads += launch.loads
            self.bytes_alone += launch.bytes_alone

    def copy(
        self, table: NDArray[np.uint64], memory: Sequence[tuple[int, int]], *, backwards: bool
    ) -> None:
        """Copy as the table says, within this memory."""
        ranges = _ranges([(table.ctypes.data, table.nbytes), *memory])
        self.bytes_alone = 0
        for first, grid in copy_grids(table):
            arguments = (table.ctypes.data, first)
            launch = Launch(ranges, len(ranges), arguments, grid, COPY_THREADS, backwards)
            assert self._copy(ctypes.byref(launch)) == 0
            self.bytes_alone += launch.bytes_alone


def _ranges(given: Sequence[tuple[int, int]]) -> ctypes.Array[Range]:
    """What a launch was given, where it is: blocks may share memory, or lie side by side."""
    ranges: list[list[int]] = []
    for address, n in sorted(fragment for fragment in given if fragment[1]):
        if ranges and address <= ranges[-1][1]:
            ranges[-1][1] = max(ranges[-1][1], address + n)
        else:
            ranges.append([address, address + n])
    return (Range * len(ranges))(*(Range(begin, end, begin) for begin, end in ranges))


@pytest.fixture(scope="module")
def on_host() -> OnHost:
    """The kernels, compiled for the host."""
    return OnHost()


@pytest.fixture(scope="module", params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def start(request: pytest.FixtureRequest) -> Start:
    if request.param == "host":
        return OnHost()
    return OnGpu(request.getfixturevalue("cupy"))


class TestContract(ChecksumContract):
    pass


def test_pages_take_the_wide_loads(on_host: OnHost) -> None:
    memory = Memory(1, [[4096] * 160] * 3)
    assert on_host(memory)() == memory.expected()
    assert (on_host.loads > 0, on_host.bytes_alone) == (True, 0)
    shredded = Memory(2, [[16] * 500, [48] * 500])
    assert on_host(shredded)() == shredded.expected()
    assert on_host.bytes_alone == 0


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("sizes", [[16], [4096] * 7, [16384, 16400, 48, 0, 65536, 16368]])
def test_copies_write_what_they_should_and_nothing_else(
    on_host: OnHost, sizes: list[int], *, backwards: bool
) -> None:
    source, target = Memory(5, [sizes]), Memory(6, [list(reversed(sizes))])
    ends = [(memory.words.ctypes.data, memory.offsets[0]) for memory in (source, target)]
    (start, offsets), (to, places) = ends
    table = np.array(
        [
            (to + at, start + o, n)
            for (o, n), (at, _) in zip(offsets, reversed(places), strict=True)
        ],
        np.uint64,
    )
    expected = target.bytes.copy()
    for (o, n), (at, _) in zip(offsets, reversed(places), strict=True):
        expected[at : at + n] = source.bytes[o : o + n]
    on_host.copy(table, [(start, source.bytes.size), (to, target.bytes.size)], backwards=backwards)
    assert (expected == target.bytes).all()
    assert on_host.bytes_alone == 0


def test_more_copies_than_a_grid_has_rows(on_host: OnHost) -> None:
    count = 70_000
    source, target = aligned(2 * count), aligned(2 * count)
    source[:] = np.arange(2 * count)
    start, to = source.ctypes.data, target.ctypes.data
    table = np.array([(to + 16 * i, start + 16 * i, 16) for i in range(count)], np.uint64)
    assert [first for first, _ in copy_grids(table)] == [0, 65535]
    on_host.copy(table, [(start, source.nbytes), (to, target.nbytes)], backwards=False)
    assert (source == target).all()


@pytest.mark.parametrize("wrong", [(4096, 8192, 24), (4104, 8192, 16), (4096, 8193, 16)])
def test_what_the_kernel_does_not_copy(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="copies"):
        copy_grids(np.array([(4096, 8192, 16), wrong], np.uint64))


@pytest.mark.parametrize("blocks", [[], [[(4096, 240)]], [[(4096, 4096)], []]])
def test_what_the_host_has_to_hash(blocks: list[Gather]) -> None:
    with pytest.raises(ConfigError, match="blocks"):
        plan_of(blocks)


class Compiler:
    """NVIDIA's, by which CuPy makes kernels out of text; it needs no GPU."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)

    def knows(self, gpu: int) -> bool:
        """Whether it compiles for GPUs of this compute capability."""
        count = ctypes.c_int()
        self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._library.nvrtcGetSupportedArchs(numbers)
        return gpu in numbers

    def __call__(self, source: bytes, *options: bytes) -> tuple[int, str]:
        """Compile; the status and what was said of it."""
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        made = self._library.nvrtcCreateProgram(ctypes.byref(program), source, None, 0, None, None)
        assert made == 0
        given = (ctypes.c_char_p * len(options))(*options)
        status = self._library.nvrtcCompileProgram(program, len(options), given)
        self._library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        said = ctypes.create_string_buffer(size.value)
        self._library.nvrtcGetProgramLog(program, said)
        self._library.nvrtcDestroyProgram(ctypes.byref(program))
        return status, said.value.decode()


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    found = packaged("cuda_nvrtc/lib/libnvrtc.so.*", "cu13/lib/libnvrtc.so.*")
    if not found:
        pytest.skip("NVIDIA's compiler (nvidia-cuda-nvrtc-cu12) is not installed")
    return Compiler(found[0])


@pytest.mark.parametrize("gpu", [75, 80, 90, 100, 120])
def test_they_compile_for_a_gpu(compiler: Compiler, gpu: int) -> None:
    """All that a thread works with has a register: none is kept in memory, which takes long."""
    if not compiler.knows(gpu):
        pytest.skip("older than this GPU")
    source = resources.files("kvgds.memory").joinpath(SOURCE).read_bytes()
    options = ("-std=c++14", f"--gpu-architecture=sm_{gpu}", "--ptxas-options=-v")
    status, said = compiler(source, *map(str.encode, options))
    assert status == 0, said
    assert said.count("0 bytes stack frame, 0 bytes spill stores") == 4
    assert "warning" not in said


@pytest.fixture(scope="module")
def cupy() -> Iterator[Any]:
    module = pytest.importorskip("cupy")
    if not module.cuda.is_available():
        pytest.skip("no device for CuPy")
    yield module
    module.cuda.runtime.deviceSynchronize()


@pytest.mark.gpu
def test_unfinished_checksums_are_not_read(cupy: Any) -> None:
    kernels, stream = Kernels(0), cupy.cuda.Stream(non_blocking=True)
    memory = cupy.zeros(512 * MIB, np.uint8)
    cupy.cuda.Device(0).synchronize()
    digests = kernels.checksums([[(memory.data.ptr, memory.nbytes)]], stream.ptr)
    with pytest.raises(BusyError):  # 5 ms of chain lie before it
        digests.read()
    digests.event.synchronize()
    assert digests.read() == [xxhash.xxh3_128_digest(bytes(memory.nbytes))]


@pytest.mark.gpu
@pytest.mark.parametrize("fragment", [4 * KIB, 32 * KIB, 128 * KIB])
def test_how_fast_copies_are(cupy: Any, capsys: pytest.CaptureFixture[str], fragment: int) -> None:
    """Into one piece, the last fragment first; and right."""
    kernels, stream = Kernels(0), cupy.cuda.Stream(non_blocking=True)
    source = cupy.arange(16 * MIB // 8, dtype=np.uint64)
    target, count = cupy.zeros_like(source), 16 * MIB // fragment
    cupy.cuda.Device(0).synchronize()
    ends = [target.data.ptr, source.data.ptr + 16 * MIB - fragment]
    copies = [(ends[0] + i * fragment, ends[1] - i * fragment, fragment) for i in range(count)]
    times, spin = [], cupy.RawKernel(SPIN, "spin")
    for _ in range(12):
        start = cupy.cuda.Event()
        with stream:  # some 30 ms, in which Python launches all: its own time is not measured
            spin((1,), (1,), (np.int64(50_000_000),))
        start.record(stream)
        kernels.copy(copies, stream.ptr)
        stop = cupy.cuda.Event()
        stop.record(stream)
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop) * 1e3)
    expected = np.flip(source.get().reshape(count, -1), 0).ravel()
    assert (expected == target.get()).all()
    median = sorted(times)[len(times) // 2]
    with capsys.disabled():
        sys.stdout.write(
            f"\n16 MiB in pieces of {fragment >> 10} KiB: median {median:.0f} us, "
            f"{16 * MIB / median / 1e3:.0f} GB/s\n"
        )


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
    kernels, stream = Kernels(0), cupy.cuda.Stream(non_blocking=True)
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
        digests = kernels.checksums(gathers, stream.ptr)
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
