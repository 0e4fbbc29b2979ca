"""The GPU's checksums are xxhash's, whatever the size, the cuts and the neighbours in a launch.

Without a GPU: no kernel has a barrier, so each one is called for every thread of its grid, forwards
and backwards, on the host's memory. Every load and store is checked against the memory that the
launch was given, and for its alignment. With a GPU: the same through CuPy. On the simulated GPU:
`simulator/checks_kernels.py`.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xxhash

from checksums import KIB, MIB, ChecksumContract, Gather, Memory, OnGpu, aligned
from kvgds.errors import BusyError, ConfigError
from kvgds.memory.kernels import (
    DIGEST_BYTES,
    LANES,
    SOURCE,
    SPARE_ROWS,
    SUM_BYTES,
    THREADS,
    Checksums,
    Plan,
    plan_of,
)
from simulator.kernels import Launch, Range, compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

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


@pytest.fixture(scope="module")
def cupy() -> Iterator[Any]:
    module = pytest.importorskip("cupy")
    if not module.cuda.is_available():
        pytest.skip("no device for CuPy")
    yield module
    module.cuda.runtime.deviceSynchronize()


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
