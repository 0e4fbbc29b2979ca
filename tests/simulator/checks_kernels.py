"""GPU checksums on the simulated GPU: right, in the order of their stream, and on its memory only.

Run by test_simulator.py in a process of its own, with two devices. The kernels are the real ones,
compiled for the host; CuPy is the small one of `packages`.
"""

from __future__ import annotations

import ctypes
import gc
import random
import time
from typing import TYPE_CHECKING, Any

import cupy
import pytest
import xxhash
from cupy.cuda.runtime import CUDARuntimeError

from checksums import ChecksumContract, OnGpu
from kvgds.errors import BusyError, PathUnavailable
from kvgds.memory.device import CudaError, cuda
from kvgds.memory.kernels import Kernels
from simulator import Simulator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from checksums import Start
    from kvgds.memory.kernels import Digests
    from simulator import Vram

    Filled = Callable[..., Vram]

SIZE, BIG = 5000, 100_000
ON_DEVICE = 3


@pytest.fixture(scope="module")
def start() -> Start:
    return OnGpu(cupy)


class TestContract(ChecksumContract):
    pass


@pytest.fixture
def machine() -> Iterator[Simulator]:
    """Healthy before and after."""
    simulator = Simulator()
    simulator.clear()
    simulator.strict_pinned(strict=True)
    yield simulator
    simulator.clear()


@pytest.fixture
def gpu(machine: Simulator) -> Iterator[Simulator]:
    """The machine, on which nothing is freed or unpinned in use."""
    before = too_early(machine)
    yield machine
    assert before == too_early(machine)


@pytest.fixture
def filled(machine: Simulator) -> Iterator[Filled]:
    """Makes memory; freed when nothing is held any more, which else it would wait for."""
    made: list[Vram] = []

    def fill(name: str, device: int = 0, nbytes: int = SIZE) -> Vram:
        made.append(machine.allocate(nbytes, device))
        made[-1].write(content(name, nbytes))
        return made[-1]

    yield fill
    machine.clear()
    for vram in made:
        vram.free()


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(0)


def too_early(gpu: Simulator) -> tuple[int, int]:
    return gpu.counter("freed_in_use"), gpu.counter("unpinned_in_use")


def content(name: str, nbytes: int = SIZE) -> bytes:
    return random.Random(name).randbytes(nbytes)


def digest(name: str, nbytes: int = SIZE) -> list[bytes]:
    return [xxhash.xxh3_128_digest(content(name, nbytes))]


def new_stream(device: int = 0) -> Any:
    """One of its own, destroyed with the object."""
    with cupy.cuda.Device(device):
        return cupy.cuda.Stream(non_blocking=True)


def block(vram: Vram) -> list[list[tuple[int, int]]]:
    return [[(vram.address, vram.nbytes)]]


def copy_async(gpu: Simulator, to: Vram, source: Vram, stream: int) -> None:
    ends = ctypes.c_void_p(to.address), ctypes.c_void_p(source.address)
    gpu.call("cudaMemcpyAsync", *ends, ctypes.c_size_t(SIZE), ON_DEVICE, ctypes.c_void_p(stream))


def read(digests: Digests) -> list[bytes]:
    digests.event.synchronize()
    return digests.read()


@pytest.mark.parametrize("own", [True, False])
def test_they_come_in_the_order_of_their_stream(
    gpu: Simulator, filled: Filled, kernels: Kernels, *, own: bool
) -> None:
    """Of what copies before them have written, and those after them have not."""
    queue = new_stream() if own else cupy.cuda.ExternalStream(0)
    stream = queue.ptr
    target, new, newer = filled("old"), filled("new"), filled("newer")
    gpu.hold(stream)
    copy_async(gpu, target, new, stream)
    digests = kernels.checksums(block(target), stream)
    copy_async(gpu, target, newer, stream)
    gpu.release(stream)
    assert read(digests) == digest("new")


def test_what_a_held_stream_owes_is_not_read(
    gpu: Simulator, filled: Filled, kernels: Kernels
) -> None:
    held, free, vram = new_stream(), new_stream(), filled("held")
    gpu.hold(held.ptr)
    late, early = (kernels.checksums(block(vram), stream.ptr) for stream in (held, free))
    assert read(early) == digest("held")
    assert not late.done
    with pytest.raises(BusyError):
        late.read()
    gpu.release(held.ptr)
    assert read(late) == digest("held")


def test_kernels_of_several_streams_run_beside_each_other(
    gpu: Simulator, filled: Filled, kernels: Kernels
) -> None:
    streams, names = [new_stream() for _ in range(3)], [str(i) for i in range(30)]
    blocks = [block(filled(name, nbytes=BIG)) for name in names]
    gpu.hold()
    launched = [kernels.checksums(one, streams[i % 3].ptr) for i, one in enumerate(blocks)]
    gpu.release()
    assert [read(digests) for digests in launched] == [digest(name, BIG) for name in names]


def test_kernels_take_their_time(gpu: Simulator, filled: Filled, kernels: Kernels) -> None:
    """Three of them between two copies, each with a delay."""
    vram, before = filled("slow"), gpu.counter("launches")
    gpu.copy_delay(0.01)
    began = time.monotonic()
    assert read(kernels.checksums(block(vram), 0)) == digest("slow")
    assert time.monotonic() - began >= 5 * 0.01
    assert before + 3 == gpu.counter("launches")


def test_copies_come_in_the_order_of_their_stream(
    gpu: Simulator, filled: Filled, kernels: Kernels
) -> None:
    """Many at once, each with its own place; then checksums of what they have written."""
    source, target, queue = filled("s", nbytes=BIG), filled("t", nbytes=BIG), new_stream()
    newer = filled("newer")
    pages = range(0, 96 * 1024, 4096)
    gpu.hold(queue.ptr)
    copy_async(gpu, source, newer, queue.ptr)
    copies = [(target.address + at, source.address + at, 4096) for at in reversed(pages)]
    launch = kernels.copy(copies, queue.ptr)
    digests = kernels.checksums([[(target.address, 4096)]], queue.ptr)
    early = launch.done
    gpu.release(queue.ptr)
    assert read(digests) == [xxhash.xxh3_128_digest(content("newer")[:4096])]
    assert (early, launch.done) == (False, True)
    whole = content("newer") + content("s", BIG)[SIZE : 96 * 1024] + content("t", BIG)[96 * 1024 :]
    assert target.read() == whole


def test_each_device_has_its_own(gpu: Simulator, filled: Filled, kernels: Kernels) -> None:
    held, free = new_stream(0), new_stream(1)
    gpu.hold(held.ptr)
    here = kernels.checksums(block(filled("here")), held.ptr)
    there = Kernels(1).checksums(block(filled("there", 1)), free.ptr)
    assert read(there) == digest("there")
    assert not here.done
    gpu.release(held.ptr)
    assert read(here) == digest("here")


@pytest.mark.parametrize("wrong", ["freed", "past the end", "another GPU's", "the host's"])
def test_memory_that_is_not_its_own_breaks_a_device(
    gpu: Simulator, filled: Filled, kernels: Kernels, wrong: str
) -> None:
    here, there, freed, host = filled("here"), filled("there", 1), filled("freed"), bytearray(SIZE)
    address = {
        "freed": freed.address,
        "past the end": here.address + 1,
        "another GPU's": there.address,
        "the host's": ctypes.addressof(ctypes.c_char.from_buffer(host)),
    }[wrong]
    freed.free()
    stream = new_stream()
    gpu.hold(stream.ptr)
    digests = kernels.checksums([[(address, SIZE)]], stream.ptr)
    copy_async(gpu, here, filled("never"), stream.ptr)
    gpu.release(stream.ptr)
    with pytest.raises(CUDARuntimeError, match="IllegalAddress"):
        digests.event.synchronize()
    with pytest.raises(PathUnavailable, match="CUDA error 700"):
        digests.read()
    with pytest.raises(PathUnavailable, match="CUDA error 700"):
        kernels.checksums(block(here), 0)
    assert there.read() == content("there")  # the other device is well
    gpu.clear()
    assert read(kernels.checksums(block(here), 0)) == digest("here")


def test_a_launch_keeps_its_memory_whoever_lets_go(
    gpu: Simulator, filled: Filled, kernels: Kernels
) -> None:
    """The fixture sees whether any went too early; here, that it goes at all."""
    stream, vram, live = new_stream(), filled("kept"), []
    for _ in range(3):
        gpu.hold(stream.ptr)
        for _ in range(3):
            digests = kernels.checksums(block(vram), stream.ptr)
            gc.collect()
        gpu.release(stream.ptr)
        assert read(digests) == digest("kept")
        live.append(gpu.counter("live_allocations"))
    assert live[1:] == live[:1] * 2


def begin(kernels: Kernels, what: str, vram: Vram, stream: int) -> Any:
    """A checksum, or copies by kernels or copy engine."""
    if what == "sum":
        return kernels.checksums(block(vram), stream)
    copies = [(vram.address + 2048 + i, vram.address + i, 1024) for i in (0, 1024)]
    return kernels.copy(copies, stream) if what == "copy" else cuda().copy(0, copies)


@pytest.mark.parametrize("what", ["copy", "sum", "copy engine"])
def test_what_is_refused_half_way_is_told_once_the_rest_has_ended(
    gpu: Simulator, filled: Filled, kernels: Kernels, what: str
) -> None:
    """That uses memory which is given back then. Nobody waits for it, so that others go on."""
    vram, own = filled("refused"), new_stream()
    stream = cuda().stream(0) if what == "copy engine" else own.ptr
    gpu.hold(stream)
    gpu.refuse("simcuda_launch", skip=what == "sum")
    if what == "copy engine":
        gpu.refuse("cudaMemcpyBatchAsync")
        gpu.refuse("cudaMemcpyAsync", skip=1)
    begun = begin(kernels, what, vram, stream)
    gc.collect()
    assert not begun.done
    assert gpu.counter("pending")
    gpu.release(stream)
    gpu.call("cudaStreamSynchronize", ctypes.c_void_p(stream))
    for _ in range(2):
        with pytest.raises((PathUnavailable, CudaError), match=r"out of memory|Allocation"):
            _ = begun.done
    gpu.clear()
    well = filled("well")
    assert read(kernels.checksums(block(well), own.ptr)) == digest("well")


@pytest.mark.parametrize("function", ["cudaEventCreateWithFlags", "cudaEventRecord"])
@pytest.mark.parametrize("what", ["copy", "sum", "copy engine"])
def test_what_can_not_be_watched_has_ended(
    gpu: Simulator, filled: Filled, kernels: Kernels, what: str, function: str
) -> None:
    """It is told as failed, and what it used may be given back; its own lives, the fixture sees."""
    vram, stream = filled("failed"), new_stream()
    gpu.copy_delay(0.02)
    gpu.refuse(function)
    with pytest.raises((CUDARuntimeError, CudaError)):
        begin(kernels, what, vram, stream.ptr)
    assert gpu.counter("pending") == 0
    assert read(kernels.checksums(block(vram), stream.ptr))


@pytest.mark.parametrize("what", ["copy", "sum", "copy engine"])
def test_what_can_not_be_asked_for_has_ended(
    gpu: Simulator, filled: Filled, kernels: Kernels, what: str
) -> None:
    """It is told as failed, and what it used may be given back."""
    vram, stream = filled("unasked"), new_stream()
    gpu.copy_delay(0.02)
    begun = begin(kernels, what, vram, stream.ptr)
    gpu.refuse("cudaEventQuery")
    with pytest.raises((PathUnavailable, CudaError)):
        _ = begun.done
    assert gpu.counter("pending") == 0


@pytest.mark.parametrize("what", ["copy", "sum"])
def test_a_launch_that_can_not_be_asked_for_keeps_the_next_from_beginning(
    gpu: Simulator, filled: Filled, kernels: Kernels, what: str
) -> None:
    """The next is told as failed, so its blocks are given back: nothing may go on in them."""
    vram, stream = filled("next"), new_stream()
    gpu.copy_delay(0.02)
    begin(kernels, what, vram, stream.ptr)
    gpu.refuse("cudaEventQuery")
    with pytest.raises(PathUnavailable):
        begin(kernels, what, vram, stream.ptr)
    assert gpu.counter("pending") == 0


def test_what_goes_too_early_is_told(machine: Simulator, filled: Filled) -> None:
    """What kernels are given, and the host's side of two copies."""
    freed, unpinned = too_early(machine)
    gone, stream, vram = Kernels(0), new_stream(), filled("gone")
    machine.hold(stream.ptr)
    event = gone.checksums(block(vram), stream.ptr).event
    del gone
    gc.collect()
    machine.release(stream.ptr)
    event.synchronize()
    assert too_early(machine) == (freed + 4, unpinned + 2)
