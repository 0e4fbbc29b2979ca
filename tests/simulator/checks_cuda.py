"""CUDA as it is simulated: run by test_simulator.py in a process of its own, with two devices."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from simulator import CudaError, Simulator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from simulator import Vram

SIZE = 1 << 20
TO_DEVICE, TO_HOST, ON_DEVICE = 1, 2, 3
INVALID_VALUE, INVALID_DEVICE, INVALID_HANDLE = 1, 101, 400
NOT_READY, NOT_PINNED = 600, 713
CONTEXT_MISMATCH, BAD_RANGE = 5015, 5014

TOUCH = """
import ctypes, resource, sys
from simulator import Simulator
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
vram = Simulator().allocate(4096)
vram.write(b"x" * 4096)
assert vram.read() == b"x" * 4096
print("touching", flush=True)
if sys.argv[1] == "read":
    ctypes.string_at(vram.address, 1)
else:
    ctypes.memset(vram.address, 0, 1)
"""


class Status(ctypes.Structure):
    """What cuFile's calls return."""

    _fields_ = (("code", ctypes.c_int), ("cuda", ctypes.c_int))


class Attributes(ctypes.Structure):
    """cudaPointerAttributes of CUDA 12."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("device", ctypes.c_int),
        ("device_pointer", ctypes.c_void_p),
        ("host_pointer", ctypes.c_void_p),
    )


@pytest.fixture
def gpu() -> Iterator[Simulator]:
    simulator = Simulator()
    simulator.device = 0
    yield simulator
    simulator.clear()
    assert simulator.counter("live_allocations") == 0


class Pinned:
    """Page-locked host memory, freed on exit."""

    def __init__(self, gpu: Simulator, nbytes: int = SIZE) -> None:
        self.gpu = gpu
        self.memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes = (ctypes.c_char * nbytes).from_buffer(self.memory)
        self.address = ctypes.addressof(self.bytes)
        pointer = ctypes.c_void_p(self.address)
        gpu.call("cudaHostRegister", pointer, ctypes.c_size_t(nbytes), 0)

    def free(self) -> None:
        self.gpu.call("cudaHostUnregister", ctypes.c_void_p(self.address))


@pytest.fixture
def pinned(gpu: Simulator) -> Iterator[Pinned]:
    memory = Pinned(gpu)
    yield memory
    memory.free()


@pytest.fixture
def vram(gpu: Simulator) -> Iterator[Vram]:
    with gpu.allocate(SIZE) as memory:
        yield memory


def copy_async(  # noqa: PLR0917 - as CUDA has them
    gpu: Simulator, to: int, source: int, nbytes: int, kind: int, stream: int
) -> None:
    ends = ctypes.c_void_p(to), ctypes.c_void_p(source)
    gpu.call("cudaMemcpyAsync", *ends, ctypes.c_size_t(nbytes), kind, ctypes.c_void_p(stream))


@contextlib.contextmanager
def streams(gpu: Simulator, count: int, *, blocking: bool = False) -> Iterator[list[int]]:
    made = [gpu.stream(blocking=blocking) for _ in range(count)]
    yield made
    for stream in made:
        gpu.call("cudaStreamDestroy", ctypes.c_void_p(stream))


@contextlib.contextmanager
def event(gpu: Simulator) -> Iterator[ctypes.c_void_p]:
    handle = ctypes.c_void_p()
    gpu.call("cudaEventCreateWithFlags", ctypes.byref(handle), 2)
    yield handle
    gpu.call("cudaEventDestroy", handle)


def code_of(gpu: Simulator, name: str, *arguments: Any) -> int:
    try:
        gpu.call(name, *arguments)
    except CudaError as error:
        return error.code
    return 0


def query(gpu: Simulator, stream: int) -> int:
    return code_of(gpu, "cudaStreamQuery", ctypes.c_void_p(stream))


def synchronize(gpu: Simulator, stream: int) -> None:
    gpu.call("cudaStreamSynchronize", ctypes.c_void_p(stream))


# --- memory ---------------------------------------------------------------------------------------


def copy_batch(gpu: Simulator, copies: list[tuple[int, int, int]], stream: int) -> None:
    columns = [(ctypes.c_uint64 * len(copies))(*column) for column in zip(*copies, strict=True)]
    numbers, failed = (ctypes.c_int * 16)(1), ctypes.c_size_t(99)
    first, count, one = ctypes.c_size_t(0), ctypes.c_size_t(len(copies)), ctypes.c_size_t(1)
    ends = (*columns, count, numbers, ctypes.byref(first), one, ctypes.byref(failed))
    try:
        gpu.call("cudaMemcpyBatchAsync", *ends, ctypes.c_void_p(stream))
    finally:
        assert failed.value in {99, len(copies) - 2}


def test_copies_of_a_batch_come_last_first(gpu: Simulator, pinned: Pinned, vram: Vram) -> None:
    """And not on the default stream, nor past the end; what was begun before that runs."""
    vram.write(bytes(range(200)))
    copies = [(pinned.address, vram.address + i, 8) for i in (0, 50, 100)]
    with streams(gpu, 1) as (stream,):
        copy_batch(gpu, copies, stream)
        gpu.call("cudaStreamSynchronize", ctypes.c_void_p(stream))
        assert pinned.memory[:8] == bytes(range(8))
        wrong = [copies[0], (pinned.address, vram.address + SIZE - 4, 8), copies[2]]
        for refused, on in ((copies, 0), (wrong, stream)):
            with pytest.raises(CudaError) as caught:
                copy_batch(gpu, refused, on)
            assert caught.value.code == INVALID_VALUE
        gpu.call("cudaStreamSynchronize", ctypes.c_void_p(stream))
        assert pinned.memory[:8] == bytes(range(100, 108))


@pytest.mark.parametrize("how", ["read", "write"])
def test_the_host_cannot_touch_device_memory(how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOUCH, how], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("touching\n", -signal.SIGSEGV), done.stderr


def test_bytes_come_back_from_where_they_were_put(gpu: Simulator) -> None:
    with gpu.allocate(SIZE) as one, gpu.allocate(SIZE, device=1) as other:
        one.write(b"1" * SIZE)
        other.write(b"2" * SIZE)
        one.write(b"mark", 100)
        assert one.read(6, 99) == b"1mark1"
        assert other.read() == b"2" * SIZE
        ends = (ctypes.c_void_p(other.address), ctypes.c_void_p(one.address))
        gpu.call("cudaMemcpy", *ends, ctypes.c_size_t(SIZE), ON_DEVICE)
        assert one.read() == other.read()


@pytest.mark.parametrize(("offset", "nbytes"), [(1, SIZE), (SIZE, 1), (-1, 2)])
def test_a_copy_may_not_leave_the_allocation(
    gpu: Simulator, vram: Vram, offset: int, nbytes: int
) -> None:
    host = ctypes.create_string_buffer(nbytes)
    ends = (host, ctypes.c_void_p(vram.address + offset))
    assert code_of(gpu, "cudaMemcpy", *ends, ctypes.c_size_t(nbytes), TO_HOST) == INVALID_VALUE


def test_a_freed_address_stays_dead(gpu: Simulator) -> None:
    gone = gpu.allocate(SIZE)
    address = gone.address
    gone.free()
    with gpu.allocate(SIZE) as fresh:
        assert address != fresh.address
        ends = (ctypes.create_string_buffer(1), ctypes.c_void_p(address))
        assert code_of(gpu, "cudaMemcpy", *ends, ctypes.c_size_t(1), TO_HOST) == INVALID_VALUE


def test_the_direction_must_be_right(gpu: Simulator, vram: Vram) -> None:
    ends = (ctypes.c_void_p(vram.address), ctypes.create_string_buffer(1))
    assert code_of(gpu, "cudaMemcpy", *ends, ctypes.c_size_t(1), TO_HOST) == INVALID_VALUE
    assert code_of(gpu, "cudaMemcpy", *ends, ctypes.c_size_t(1), TO_DEVICE) == 0


def test_pointers_tell_what_they_are(gpu: Simulator, pinned: Pinned) -> None:
    with gpu.allocate(SIZE, device=1) as vram:
        plain = ctypes.create_string_buffer(1)
        expected = {vram.address + 5: (2, 1), pinned.address + 5: (1, 0)}
        for address, answer in {**expected, ctypes.addressof(plain): (0, -2)}.items():
            found = Attributes()
            gpu.call("cudaPointerGetAttributes", ctypes.byref(found), ctypes.c_void_p(address))
            assert answer == (found.type, found.device)


def test_memory_runs_out_and_comes_back(gpu: Simulator) -> None:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with gpu.allocate(SIZE), pytest.raises(CudaError, match="MemoryAllocation"):
        gpu.allocate(1 << 40)
    gpu.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    assert 1 << 30 == total.value == free.value


def test_it_is_an_array_of_bytes(vram: Vram) -> None:
    view = vram.__cuda_array_interface__
    assert (3, (SIZE,), (vram.address, False)) == (view["version"], view["shape"], view["data"])


# --- devices --------------------------------------------------------------------------------------


def test_two_devices_that_are_current_per_thread(gpu: Simulator) -> None:
    seen: list[int] = []
    count, name = ctypes.c_int(), ctypes.create_string_buffer(16)
    gpu.call("cudaGetDeviceCount", ctypes.byref(count))
    gpu.device = 1
    other = threading.Thread(target=lambda: seen.append(gpu.device))
    other.start()
    other.join()
    gpu.call("cudaDeviceGetPCIBusId", name, len(name), 1)
    assert (count.value, gpu.device, seen, name.value) == (2, 1, [0], b"0000:11:00.0")
    assert code_of(gpu, "cudaSetDevice", 2) == INVALID_DEVICE
    assert gpu.cudart.cudaGetLastError() == INVALID_DEVICE
    assert gpu.cudart.cudaGetLastError() == 0


def test_cufile_registers_only_on_the_current_device(gpu: Simulator) -> None:
    register = gpu.cufile.cuFileBufRegister
    register.restype = gpu.cufile.cuFileDriverOpen.restype = Status
    gpu.cufile.cuFileBufDeregister.restype = Status
    gpu.cufile.cuFileDriverOpen()
    with gpu.allocate(SIZE, device=1) as vram:
        address = ctypes.c_void_p(vram.address)
        assert register(address, ctypes.c_size_t(SIZE), 0).code == CONTEXT_MISMATCH
        gpu.device = 1
        assert register(address, ctypes.c_size_t(SIZE + 1), 0).code == BAD_RANGE
        assert register(address, ctypes.c_size_t(SIZE), 0).code == 0
        assert gpu.cufile.cuFileBufDeregister(address).code == 0
    gpu.cufile.cuFileDriverClose_v2()


# --- streams --------------------------------------------------------------------------------------


def test_a_held_stream_does_nothing_and_then_all_of_it_in_order(
    gpu: Simulator, vram: Vram, pinned: Pinned
) -> None:
    vram.write(bytes(SIZE))
    pinned.memory[:2] = b"ab"
    with streams(gpu, 2) as (held, free):
        gpu.hold(held)
        copy_async(gpu, vram.address, pinned.address, 1, TO_DEVICE, held)
        copy_async(gpu, vram.address + 1, vram.address, 1, ON_DEVICE, held)
        copy_async(gpu, vram.address, pinned.address + 1, 1, TO_DEVICE, held)
        copy_async(gpu, vram.address + 2, pinned.address + 1, 1, TO_DEVICE, free)
        synchronize(gpu, free)
        assert (query(gpu, held), vram.peek(3)) == (NOT_READY, b"\0\0b")
        gpu.release(held)
        synchronize(gpu, held)
        assert (query(gpu, held), vram.peek(3)) == (0, b"bab")


def test_whoever_synchronizes_waits(gpu: Simulator, vram: Vram, pinned: Pinned) -> None:
    vram.write(bytes(SIZE))
    pinned.memory[:1] = b"x"
    seen: list[bytes] = []
    with streams(gpu, 1) as (stream,):

        def wait() -> None:
            synchronize(gpu, stream)
            seen.append(vram.peek(1))

        gpu.hold()
        copy_async(gpu, vram.address, pinned.address, 1, TO_DEVICE, stream)
        waiter = threading.Thread(target=wait)
        waiter.start()
        gpu.wait_counter("waiting", 1)
        seen.append(b"held")
        gpu.release()
        waiter.join()
    assert seen == [b"held", b"x"]


def test_an_event_completes_when_its_stream_gets_there(
    gpu: Simulator, vram: Vram, pinned: Pinned
) -> None:
    with streams(gpu, 1) as (stream,), event(gpu) as done:
        assert code_of(gpu, "cudaEventQuery", done) == 0
        gpu.hold(stream)
        copy_async(gpu, vram.address, pinned.address, SIZE, TO_DEVICE, stream)
        gpu.call("cudaEventRecord", done, ctypes.c_void_p(stream))
        assert code_of(gpu, "cudaEventQuery", done) == NOT_READY
        gpu.release(stream)
        gpu.call("cudaEventSynchronize", done)
        assert code_of(gpu, "cudaEventQuery", done) == 0


def test_a_stream_waits_for_an_event_of_another(gpu: Simulator, vram: Vram, pinned: Pinned) -> None:
    """Without the wait the second stream would copy what the first has not yet written."""
    pinned.memory[:4] = b"new "
    for wait, expected in ((False, b"old "), (True, b"new ")):
        vram.write(b"old ")
        with streams(gpu, 2) as (first, second), event(gpu) as written:
            gpu.hold(first)
            copy_async(gpu, vram.address, pinned.address, 4, TO_DEVICE, first)
            gpu.call("cudaEventRecord", written, ctypes.c_void_p(first))
            if wait:
                gpu.call("cudaStreamWaitEvent", ctypes.c_void_p(second), written, 0)
            copy_async(gpu, vram.address + 8, vram.address, 4, ON_DEVICE, second)
            if not wait:
                synchronize(gpu, second)
            gpu.release(first)
            synchronize(gpu, second)
            assert expected == vram.peek(4, 8)
            synchronize(gpu, first)


def test_an_event_belongs_to_one_device(gpu: Simulator) -> None:
    stream = gpu.stream(device=1)
    with event(gpu) as here:
        assert code_of(gpu, "cudaEventRecord", here, ctypes.c_void_p(stream)) == INVALID_HANDLE
    gpu.call("cudaStreamDestroy", ctypes.c_void_p(stream))
    assert query(gpu, stream) == INVALID_HANDLE


@pytest.mark.parametrize("blocking", [True, False])
def test_the_default_stream_waits_for_blocking_streams_only(
    gpu: Simulator, vram: Vram, pinned: Pinned, *, blocking: bool
) -> None:
    vram.write(b"ab")
    with streams(gpu, 1, blocking=blocking) as (stream,):
        gpu.hold(stream)
        copy_async(gpu, vram.address, vram.address + 1, 1, ON_DEVICE, stream)
        copy_async(gpu, pinned.address, vram.address, 1, TO_HOST, 0)
        if not blocking:
            synchronize(gpu, 0)
        assert (NOT_READY if blocking else 0) == query(gpu, 0)
        gpu.release(stream)
        synchronize(gpu, 0)
        assert (b"b" if blocking else b"a") == pinned.memory[:1]
        gpu.hold(0)
        copy_async(gpu, vram.address, vram.address, 1, ON_DEVICE, 0)
        copy_async(gpu, vram.address, vram.address, 1, ON_DEVICE, stream)
        if not blocking:
            synchronize(gpu, stream)
        assert (NOT_READY if blocking else 0) == query(gpu, stream)
        gpu.release(0)
        synchronize(gpu, stream)


def test_rows_of_a_copy_keep_their_pitches(gpu: Simulator, vram: Vram, pinned: Pinned) -> None:
    pinned.memory[:9] = b"ab.cd.ef."
    vram.write(b"-" * 12)
    ends = (vram.address, 4, pinned.address, 3, 2, 3)
    arguments = [ctypes.c_size_t(number) for number in ends]
    gpu.call("cudaMemcpy2DAsync", *arguments, TO_DEVICE, ctypes.c_void_p(0))
    synchronize(gpu, 0)
    assert vram.read(12) == b"ab--cd--ef--"


def test_pageable_memory_is_counted_or_refused(gpu: Simulator, vram: Vram) -> None:
    host = ctypes.create_string_buffer(b"pageable")
    before = gpu.counter("unpinned_copies")
    copy_async(gpu, vram.address, ctypes.addressof(host), 8, TO_DEVICE, 0)
    assert vram.peek(8) == b"pageable"
    assert before + 1 == gpu.counter("unpinned_copies")
    gpu.strict_pinned(strict=True)
    with pytest.raises(CudaError) as refusal:
        copy_async(gpu, vram.address, ctypes.addressof(host), 8, TO_DEVICE, 0)
    gpu.strict_pinned(strict=False)
    assert refusal.value.code == NOT_PINNED
    assert before + 1 == gpu.counter("unpinned_copies")


def test_unpinning_under_a_copy_is_told(gpu: Simulator, vram: Vram) -> None:
    before = gpu.counter("unpinned_in_use")
    with streams(gpu, 1) as (stream,):
        memory = Pinned(gpu)
        gpu.hold(stream)
        copy_async(gpu, vram.address, memory.address, SIZE, TO_DEVICE, stream)
        memory.free()
        gpu.release(stream)
        synchronize(gpu, stream)
    assert before + 1 == gpu.counter("unpinned_in_use")
