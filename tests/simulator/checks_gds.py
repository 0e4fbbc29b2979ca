"""NIXL's real GDS plugins on the simulated GPU: run by test_simulator.py in a process of its own.

Where a plugin does something surprising, a check says so: kvgds has to live with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import itertools
import mmap
import os
import random
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from simulator import HANG, Simulator

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from simulator import Vram

PAGE = 4096
SIZE = 1 << 20
BLOCK = 64 << 10
DRIVER_ERROR, UNSUPPORTED_FILE, PINNING_FAILED = 5033, 5008, 5036
SETTINGS = {"GDS_MT": {"thread_count": "4"}, "GDS": {"batch_pool_size": "2"}}

nixl = importlib.import_module("nixl_cu12._api")
errors = importlib.import_module("nixl_cu12._bindings")
names = (f"agent-{number}" for number in itertools.count())


class Piece(NamedTuple):
    """Part of a transfer: memory on one side, the file on the other."""

    address: int
    offset: int
    nbytes: int
    device: int = 0


class Gds:
    """An agent with POSIX and one GDS plugin."""

    def __init__(self, plugin: str) -> None:
        sync = nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        config = nixl.nixl_agent_config(enable_prog_thread=False, backends=[], sync_mode=sync)
        self.name, self.plugin = next(names), plugin
        self.agent = nixl.nixl_agent(self.name, config)
        self.agent.create_backend("POSIX", {"use_aio": "true", "ios_pool_size": "64"})
        self.agent.create_backend(plugin, SETTINGS[plugin])
        self.registered: list[tuple[Any, str]] = []

    def register(self, kind: str, entry: tuple[int, int, int, str], backend: str = "") -> None:
        """Register memory or a file, with the GDS plugin unless another is named."""
        backend = backend or self.plugin
        self.registered.append((self.agent.register_memory([entry], kind, [backend]), backend))

    def add(self, fd: int, *memory: Vram) -> None:
        """Register a file and device memory."""
        self.register("FILE", (0, 1 << 40, fd, ""))
        for vram in memory:
            self.register("VRAM", (vram.address, vram.nbytes, vram.device, ""))

    def begin(self, op: str, pieces: list[Piece], fd: int, *, kind: str = "VRAM") -> Any:
        """Post a transfer."""
        local = [(piece.address, piece.nbytes, piece.device) for piece in pieces]
        remote = [(piece.offset, piece.nbytes, fd) for piece in pieces]
        backend = self.plugin if kind == "VRAM" else "POSIX"
        handle = self.agent.initialize_xfer(
            op,
            self.agent.get_xfer_descs(local, kind),
            self.agent.get_xfer_descs(remote, "FILE"),
            self.name,
            backends=[backend],
        )
        self.agent.transfer(handle)
        return handle

    def end(self, handle: Any) -> str:
        """How a transfer ends, spinning until it does."""
        try:
            while (state := self.agent.check_xfer_state(handle)) == "PROC":
                os.sched_yield()
        except errors.nixlBackendError:
            state = "ERR"
        self.agent.release_xfer_handle(handle)
        return str(state)

    def move(self, op: str, pieces: list[Piece], fd: int, *, kind: str = "VRAM") -> str:
        return self.end(self.begin(op, pieces, fd, kind=kind))

    def forget(self) -> None:
        """Deregister everything."""
        while self.registered:
            registered, backend = self.registered.pop()
            self.agent.deregister_memory(registered, backends=[backend])


@pytest.fixture
def gpu() -> Iterator[Simulator]:
    simulator = Simulator()
    yield simulator
    simulator.clear()
    left = {name: simulator.counter(name) for name in ("live_allocations", "live_buffers", "held")}
    assert dict.fromkeys(left, 0) == left
    assert simulator.counter("deregistered_in_use") == 0


@pytest.fixture
def vram(gpu: Simulator) -> Iterator[Vram]:
    with gpu.allocate(SIZE) as memory:
        yield memory


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    yield opened
    os.close(opened)


@pytest.fixture(params=["GDS_MT", "GDS"])
def gds(request: pytest.FixtureRequest, gpu: Simulator, vram: Vram, fd: int) -> Iterator[Gds]:
    """An agent that knows `vram` and `fd`, and is gone before they are."""
    opened = Gds(request.param)
    opened.add(fd, vram)
    yield opened
    gpu.clear()
    opened.forget()


def content(seed: int, nbytes: int = SIZE) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def written(fd: int) -> bytes:
    with open(f"/proc/self/fd/{fd}", "rb") as file:
        return file.read()


def fill(fd: int, data: bytes) -> None:
    with open(f"/proc/self/fd/{fd}", "wb") as file:
        file.write(data)


def whole(vram: Vram) -> list[Piece]:
    """All of it, in blocks whose order in the file is reversed."""
    count = vram.nbytes // BLOCK
    ends = range(count - 1, -1, -1)
    return [
        Piece(vram.address + place * BLOCK, end * BLOCK, BLOCK, vram.device)
        for place, end in enumerate(ends)
    ]


def reversed_blocks(data: bytes) -> bytes:
    blocks = [data[start : start + BLOCK] for start in range(0, len(data), BLOCK)]
    return b"".join(reversed(blocks))


# --- what works -----------------------------------------------------------------------------------


def test_bytes_go_to_the_file_and_back(gpu: Simulator, gds: Gds, vram: Vram, fd: int) -> None:
    data, before = content(1), gpu.counters()
    vram.write(data)
    assert gds.move("WRITE", whole(vram), fd) == "DONE"
    assert reversed_blocks(data) == written(fd)
    vram.write(bytes(SIZE))
    assert gds.move("READ", whole(vram), fd) == "DONE"
    assert data == vram.read()
    moved = {name: count - before[name] for name, count in gpu.counters().items()}
    assert (moved["bytes_written"], moved["bytes_read"], moved["bounced"]) == (SIZE, SIZE, 0)


def test_posix_moves_host_memory_in_the_same_agent(gds: Gds, vram: Vram, fd: int) -> None:
    data = content(2)
    vram.write(data)
    assert gds.move("WRITE", whole(vram), fd) == "DONE"
    host = mmap.mmap(-1, SIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(host))
    gds.register("FILE", (0, 1 << 40, fd, ""), "POSIX")
    gds.register("DRAM", (address, SIZE, 0, ""), "POSIX")
    assert gds.move("READ", [Piece(address, 0, SIZE)], fd, kind="DRAM") == "DONE"
    assert reversed_blocks(data) == host[:]
    host[:] = data
    assert gds.move("WRITE", [Piece(address, 0, SIZE)], fd, kind="DRAM") == "DONE"
    assert gds.move("READ", [Piece(vram.address, 0, SIZE)], fd) == "DONE"
    assert data == vram.read()
    gds.forget()


def test_nothing_need_be_aligned(gpu: Simulator, gds: Gds, vram: Vram, fd: int) -> None:
    """What O_DIRECT would refuse is bounced."""
    before, data = gpu.counter("unaligned"), content(3)
    vram.write(data)
    assert gds.move("WRITE", [Piece(vram.address + 1, 3, 5000)], fd) == "DONE"
    assert b"\0\0\0" + data[1:5001] == written(fd)
    assert before + 1 == gpu.counter("unaligned")


def test_each_device_has_its_own_memory(gpu: Simulator, gds: Gds, vram: Vram, fd: int) -> None:
    """Registering memory leaves its device current for the thread that did it."""
    gpu.device = 0
    one, other = content(4), content(5)
    with gpu.allocate(SIZE, device=1) as second:
        vram.write(one)
        second.write(other)
        gds.register("VRAM", (second.address, SIZE, 1, ""))
        assert gpu.device == 1
        gpu.device = 0
        pieces = [Piece(vram.address, 0, SIZE), Piece(second.address, SIZE, SIZE, 1)]
        assert [gds.move("WRITE", [piece], fd) for piece in pieces] == ["DONE"] * 2
        assert one + other == written(fd)
        swapped = [Piece(vram.address, SIZE, SIZE), Piece(second.address, 0, SIZE, 1)]
        assert [gds.move("READ", [piece], fd) for piece in swapped] == ["DONE"] * 2
        assert other + one == vram.read() + second.read()
        gds.forget()


def test_cufile_does_not_wait_for_streams(gpu: Simulator, gds: Gds, vram: Vram, fd: int) -> None:
    """What a stream has yet to write is not in the file: whoever stores must wait for it first."""
    vram.write(b"old" + bytes(SIZE - 3))
    source = content(6)
    with gpu.allocate(SIZE) as late:
        late.write(source)
        gpu.hold()
        ends = ctypes.c_void_p(vram.address), ctypes.c_void_p(late.address)
        gpu.call("cudaMemcpyAsync", *ends, ctypes.c_size_t(SIZE), 3, ctypes.c_void_p(0))
        assert gds.move("WRITE", [Piece(vram.address, 0, SIZE)], fd) == "DONE"
        gpu.release()
    assert written(fd)[:3] == b"old"
    assert source == vram.read()


# --- what fails -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "value"), [("READ", errno.EIO), ("WRITE", UNSUPPORTED_FILE)])
def test_an_error(gpu: Simulator, gds: Gds, vram: Vram, fd: int, *, op: str, value: int) -> None:
    """GDS calls it done: it looks at no result."""
    old, new = content(7, 3 * PAGE), bytes(3 * PAGE)
    fill(fd, new if op == "READ" else old)
    vram.write(old if op == "READ" else new)
    gpu.fault("read" if op == "READ" else "write", "error", value, skip=1, count=1)
    pieces = [Piece(vram.address + start, start, PAGE) for start in (0, PAGE, 2 * PAGE)]
    states = [gds.move(op, [piece], fd) for piece in pieces]
    assert states == ["DONE", "ERR" if gds.plugin == "GDS_MT" else "DONE", "DONE"]
    there = vram.read(3 * PAGE) if op == "READ" else written(fd)
    assert new[:PAGE] + old[PAGE : 2 * PAGE] + new[2 * PAGE :] == there


@pytest.mark.parametrize("op", ["READ", "WRITE"])
def test_short(gpu: Simulator, gds: Gds, vram: Vram, fd: int, op: str) -> None:
    """GDS calls it done."""
    old, new = content(8, PAGE), bytes(PAGE)
    fill(fd, new if op == "READ" else old)
    vram.write(old if op == "READ" else new)
    gpu.fault("read" if op == "READ" else "write", "short", 100, count=1)
    state = gds.move(op, [Piece(vram.address, 0, PAGE)], fd)
    assert state == ("ERR" if gds.plugin == "GDS_MT" else "DONE")
    there = vram.read(PAGE) if op == "READ" else written(fd)
    assert new[:-100] + old[-100:] == there


def test_past_the_end_of_the_file(gds: Gds, vram: Vram, fd: int) -> None:
    """GDS calls it done."""
    data = content(9, PAGE + 100)
    fill(fd, data)
    vram.write(bytes(SIZE))
    state = gds.move("READ", [Piece(vram.address, 0, 2 * PAGE)], fd)
    assert state == ("ERR" if gds.plugin == "GDS_MT" else "DONE")
    assert data + bytes(PAGE - 100) == vram.read(2 * PAGE)


def test_a_read_only_file(gds: Gds, vram: Vram, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "read-only", os.O_RDONLY | os.O_CREAT)
    gds.register("FILE", (0, 1 << 40, fd, ""))
    with (
        pytest.raises(errors.nixlBackendError) if gds.plugin == "GDS" else contextlib.nullcontext()
    ):
        assert gds.move("WRITE", [Piece(vram.address, 0, PAGE)], fd) == "ERR"
    gds.forget()
    os.close(fd)


def test_a_file_that_cufile_refuses(gpu: Simulator, gds: Gds, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "refused", os.O_RDWR | os.O_CREAT)
    gpu.handle_register(UNSUPPORTED_FILE)
    with pytest.raises(errors.nixlBackendError):
        gds.register("FILE", (0, 1 << 40, fd, ""))
    gpu.handle_register()
    gds.register("FILE", (0, 1 << 40, fd, ""))
    gds.forget()
    os.close(fd)


def test_memory_that_cufile_refuses(gpu: Simulator, gds: Gds, fd: int) -> None:
    """NIXL registers it all the same; cuFile then bounces."""
    data, before = content(10), gpu.counters()
    gpu.bar(SIZE + BLOCK)
    with gpu.allocate(SIZE) as second:
        second.write(data)
        gds.register("VRAM", (second.address, SIZE, 0, ""))
        assert before["live_buffers"] == gpu.counter("live_buffers")
        assert gds.move("WRITE", [Piece(second.address, 0, SIZE)], fd) == "DONE"
        assert data == written(fd)
        assert before["bounced"] + 1 == gpu.counter("bounced")
        gds.forget()


def test_memory_of_no_device(gds: Gds, vram: Vram) -> None:
    with pytest.raises(errors.nixlBackendError):
        gds.register("VRAM", (vram.address, SIZE, 7, ""))


def test_what_is_held_ends_when_it_is_released(
    gpu: Simulator, gds: Gds, vram: Vram, fd: int
) -> None:
    """GDS_MT says that it is in progress; GDS would block whoever asks."""
    data, states = content(11), []
    fill(fd, data)
    vram.write(bytes(SIZE))
    gpu.fault("read", "hold")
    handle = gds.begin("READ", [Piece(vram.address, 0, SIZE)], fd)
    gpu.wait_counter("held", 1)
    if gds.plugin == "GDS_MT":
        states.append(gds.agent.check_xfer_state(handle))
    assert bytes(SIZE) == vram.peek()
    gpu.release_io()
    states.append(gds.end(handle))
    assert states == (["PROC", "DONE"] if gds.plugin == "GDS_MT" else ["DONE"])
    assert data == vram.read()


def test_what_is_held_can_fail(gpu: Simulator, gds: Gds, vram: Vram, fd: int) -> None:
    gpu.fault("write", "hold")
    handle = gds.begin("WRITE", [Piece(vram.address, 0, SIZE)], fd)
    gpu.wait_counter("held", 1)
    gpu.release_io(errno.ENOSPC)
    assert gds.end(handle) == ("ERR" if gds.plugin == "GDS_MT" else "DONE")
    assert written(fd) == b""


def test_more_transfers_than_batches(gpu: Simulator, gds: Gds, vram: Vram, fd: int) -> None:
    """GDS refuses what its pool has no batch for, and takes it when there is one again."""
    piece = [Piece(vram.address, 0, PAGE)]
    gpu.fault("write", "hold")
    handles = [gds.begin("WRITE", piece, fd) for _ in range(2)]
    gpu.wait_counter("held", 2)
    if gds.plugin == "GDS":
        with pytest.raises(errors.nixlBackendError):
            gds.begin("WRITE", piece, fd)
    gpu.release_io()
    assert [gds.end(handle) for handle in handles] == ["DONE"] * 2
    assert gds.move("WRITE", piece, fd) == "DONE"


def test_going_in_the_wrong_order_is_told(gpu: Simulator, gds: Gds, tmp_path: Path) -> None:
    names = ("freed_while_registered", "closed_while_registered")
    before = [gpu.counter(name) for name in names]
    fd = os.open(tmp_path / "closed", os.O_RDWR | os.O_CREAT)
    with gpu.allocate(SIZE) as memory:
        gds.add(fd, memory)
    os.close(fd)
    gds.forget()
    assert [gpu.counter(name) for name in names] == [count + 1 for count in before]


@pytest.mark.parametrize("plugin", SETTINGS)
def test_a_driver_that_does_not_open(gpu: Simulator, plugin: str) -> None:
    gpu.driver_open(DRIVER_ERROR)
    with pytest.raises(errors.nixlBackendError):
        Gds(plugin)


@pytest.mark.parametrize("plugin", SETTINGS)
def test_a_driver_that_hangs(gpu: Simulator, plugin: str) -> None:
    """So does create_backend; other threads run meanwhile."""
    gpu.driver_open(HANG)
    made: list[Gds] = []
    opening = threading.Thread(target=lambda: made.append(Gds(plugin)))
    opening.start()
    gpu.wait_counter("opens_waiting", 1)
    assert opening.is_alive()
    assert not made
    gpu.driver_open()
    opening.join()
    assert [plugin] == [gds.plugin for gds in made]
