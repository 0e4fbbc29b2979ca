"""The tests of a real GPU, on the simulated one: they must be right before they meet the other.

What needs CuPy, checksums by way of GPUDirect Storage, is skipped here.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING, Any

import pytest

import test_gpu
from kvgds.engine import Engine
from memories import Kind, engine_of, settings
from simulator import Simulator, Vram

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

# Collected here, with the fixture of this file.
globals().update(
    {
        name: value
        for name, value in vars(test_gpu).items()
        if name.startswith("test_") and "kind" in value.__annotations__
    }
)


class Array:
    """Part of simulated GPU memory, as an array library has it."""

    def __init__(
        self, vram: Vram, start: int, shape: tuple[int, ...], typestr: str = "|u1"
    ) -> None:
        self.vram, self.start = vram, start
        self.__cuda_array_interface__ = {
            **vram.__cuda_array_interface__,
            "shape": shape,
            "typestr": typestr,
            "data": (vram.address + start, False),
        }


class SimulatedGpu:
    """Simulated GPU memory."""

    memory = "gpu"
    devices = 2

    def __init__(self, path: str) -> None:
        self.simulator = Simulator()
        self._path = path

    def opened(self, root: Path, **tier: Any) -> AbstractAsyncContextManager[Engine]:
        return engine_of(Engine(settings(root, self._path, **tier)))

    def make(self, data: bytes, device: int = 0, shape: tuple[int, ...] | None = None) -> Array:
        vram = self.simulator.allocate(len(data), device)
        vram.write(data)
        typestr = "|u1" if shape is None else "<u2"
        return Array(vram, 0, (len(data),) if shape is None else shape, typestr)

    def part(self, memory: Array, start: int, stop: int) -> Array:
        return Array(memory.vram, memory.start + start, (stop - start,))

    def write(self, memory: Array, data: bytes) -> None:
        memory.vram.write(data, memory.start)

    def read(self, memory: Array) -> bytes:
        return memory.vram.read()

    def stream(self) -> int:
        return self.simulator.stream()

    def copy(self, to: Array, source: Array, stream: int) -> None:
        ends = ctypes.c_void_p(to.vram.address), ctypes.c_void_p(source.vram.address)
        size, kind = ctypes.c_size_t(source.vram.nbytes), 3
        self.simulator.call("cudaMemcpyAsync", *ends, size, kind, ctypes.c_void_p(stream))

    @contextlib.contextmanager
    def occupied(self, engine: Engine, key: bytes, stream: int) -> Iterator[None]:  # noqa: ARG002
        self.simulator.hold(stream)
        yield
        self.simulator.release(stream)


@pytest.fixture(params=["bounce", "gds"])
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    """The machine, and the path."""
    kind = SimulatedGpu(request.param)
    kind.simulator.clear()
    yield kind
    kind.simulator.clear()
