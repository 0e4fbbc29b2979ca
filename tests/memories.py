"""What the tests of GPU memory are written over: torch's, on the host or a GPU, and CuPy's.

A kind makes memory from bytes and reads it back as bytes by its own library, which knows nothing
of kvgds, and can keep the machine busy. The host's is there to prove the tests themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pytest
import torch

import gpus
from kvgds import EngineConfig, FileTier, PathUnavailable
from kvgds.engine import Engine
from kvgds.testing import HeldTransport
from kvgds.transport import NixlTransport
from support import MIB, NAMESPACE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from contextlib import AbstractAsyncContextManager, AbstractContextManager
    from pathlib import Path

GPU_PAGE = 64 << 10  # what a GPU maps and cuFile pins at a time
SPIN_CYCLES = 3_000_000_000  # between one and three seconds
SPIN = """
extern "C" __global__ void spin(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""

_sleep: Any = torch.cuda._sleep  # noqa: SLF001 - the spin kernel of torch's own tests


class Kind(Protocol):
    """A kind of memory, and the path that it is to take."""

    memory: str
    """As plans name it."""
    devices: int

    def opened(self, root: Path, **tier: Any) -> AbstractAsyncContextManager[Engine]:
        """An engine whose plan this is; a skip where it can't be had."""

    def make(self, data: bytes, device: int = 0, shape: tuple[int, ...] | None = None) -> Any:
        """Page-aligned memory with these bytes in it; with a shape, of elements of two bytes."""

    def part(self, memory: Any, start: int, stop: int) -> Any:
        """Some of it, as an array of its own."""

    def write(self, memory: Any, data: bytes) -> None:
        """Change all of it."""

    def read(self, memory: Any) -> bytes:
        """All of it."""

    def stream(self) -> Any:
        """A stream of the first device, apart from the default one."""

    def copy(self, to: Any, source: Any, stream: Any) -> None:
        """Queue a copy on a stream."""

    def occupied(self, engine: Engine, key: bytes, stream: Any) -> AbstractContextManager[None]:
        """Keep a stream busy, so that a block which waits for it takes more than a second.

        Where there are no streams, the engine's move of this block alone is held.
        """


@contextlib.asynccontextmanager
async def engine_of(engine: Engine) -> AsyncIterator[Engine]:
    """An engine, open; a skip with the reason where its path can't be had."""
    tier = engine.config.tiers[0]
    assert isinstance(tier, FileTier)
    await asyncio.to_thread(tier.root.parent.mkdir, exist_ok=True)
    try:
        await engine.open()
    except PathUnavailable as error:
        pytest.skip(str(error))
    try:
        gpus.saw(engine.plan, tier.root, tier.verify)
        yield engine
    finally:
        await engine.aclose()


def settings(root: Path, path: str = "auto", **tier: Any) -> EngineConfig:
    """A small engine; `gds` is the real thing, or else cuFile's compatibility mode."""
    found: dict[str, Any] = {"path": path, "allow_compat": path == "gds"}
    tiers = (FileTier(root=root, capacity_bytes=64 * MIB, **tier),)
    return EngineConfig(namespace=NAMESPACE, tiers=tiers, bounce_bytes=16 * MIB, **found)


class _Torch:
    """What torch can do wherever its memory is."""

    def _where(self, device: int) -> str:
        raise NotImplementedError

    def make(
        self, data: bytes, device: int = 0, shape: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        where = self._where(device)
        whole = torch.zeros(len(data) + 2 * GPU_PAGE, dtype=torch.uint8, device=where)
        start = -whole.data_ptr() % GPU_PAGE
        tensor = whole[start : start + len(data)]
        self.write(tensor, data)
        return tensor if shape is None else tensor.view(torch.bfloat16).view(shape)

    def part(self, memory: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return memory[start:stop]

    def write(self, memory: torch.Tensor, data: bytes) -> None:
        memory.view(-1).view(torch.uint8).copy_(
            torch.frombuffer(bytearray(data), dtype=torch.uint8)
        )

    def read(self, memory: torch.Tensor) -> bytes:
        return memory.view(-1).view(torch.uint8).cpu().numpy().tobytes()


class Host(_Torch):
    """Torch on the host, always there."""

    memory = "host"
    devices = 1

    def __init__(self, **changes: Any) -> None:
        self._changes = changes  # of the engine's settings

    @contextlib.asynccontextmanager
    async def opened(self, root: Path, **tier: Any) -> AsyncIterator[Engine]:
        held = HeldTransport(NixlTransport())
        self._held = held
        changed = settings(root, "bounce", **tier).model_copy(update=self._changes)
        async with engine_of(Engine(changed, held)) as engine:
            yield engine

    def _where(self, device: int) -> str:  # noqa: ARG002 - there is one
        return "cpu"

    def stream(self) -> None:
        return None

    def copy(self, to: torch.Tensor, source: torch.Tensor, stream: None) -> None:  # noqa: ARG002
        to.copy_(source)

    @contextlib.contextmanager
    def occupied(self, engine: Engine, key: bytes, stream: None) -> Iterator[None]:  # noqa: ARG002
        def ours(transfer: Any) -> bool:
            return bool(transfer.key == key)

        self._held.hold("landing", ours)
        yield
        self._held.release()


class TorchGpu(_Torch):
    """Torch's memory on GPUs."""

    memory = "gpu"

    def __init__(self, path: str) -> None:
        if not torch.cuda.is_available():
            pytest.skip(f"torch {torch.__version__} finds no GPU that it can use")
        self._path = path
        self.devices = min(torch.cuda.device_count(), 2)

    def opened(self, root: Path, **tier: Any) -> AbstractAsyncContextManager[Engine]:
        return engine_of(Engine(settings(root, self._path, **tier)))

    def _where(self, device: int) -> str:
        return f"cuda:{device}"

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(0)  # type: ignore[no-untyped-call]

    def copy(self, to: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)

    @contextlib.contextmanager
    def occupied(self, engine: Engine, key: bytes, stream: Any) -> Iterator[None]:  # noqa: ARG002
        with torch.cuda.stream(stream):
            _sleep(SPIN_CYCLES)
        yield


class CupyGpu:
    """CuPy's memory on GPUs."""

    memory = "gpu"

    def __init__(self, path: str) -> None:
        self._cupy: Any = pytest.importorskip("cupy")
        if not self._cupy.cuda.is_available():
            pytest.skip("CuPy finds no GPU that it can use")
        self._path = path
        self._spin = self._cupy.RawKernel(SPIN, "spin")
        self.devices = min(self._cupy.cuda.runtime.getDeviceCount(), 2)

    def opened(self, root: Path, **tier: Any) -> AbstractAsyncContextManager[Engine]:
        return engine_of(Engine(settings(root, self._path, **tier)))

    def make(self, data: bytes, device: int = 0, shape: tuple[int, ...] | None = None) -> Any:
        with self._cupy.cuda.Device(device):
            whole = self._cupy.zeros(len(data) + 2 * GPU_PAGE, np.uint8)
            start = -whole.data.ptr % GPU_PAGE
            array = whole[start : start + len(data)]
            self.write(array, data)
            return array if shape is None else array.view(np.float16).reshape(shape)

    def part(self, memory: Any, start: int, stop: int) -> Any:
        return memory[start:stop]

    def write(self, memory: Any, data: bytes) -> None:
        with memory.device:
            memory.reshape(-1).view(np.uint8).set(np.frombuffer(data, np.uint8))

    def read(self, memory: Any) -> bytes:
        with memory.device:
            return bytes(memory.reshape(-1).view(np.uint8).get().tobytes())

    def stream(self) -> Any:
        with self._cupy.cuda.Device(0):
            return self._cupy.cuda.Stream(non_blocking=True)

    def copy(self, to: Any, source: Any, stream: Any) -> None:
        to.data.copy_from_device_async(source.data, to.nbytes, stream)

    @contextlib.contextmanager
    def occupied(self, engine: Engine, key: bytes, stream: Any) -> Iterator[None]:  # noqa: ARG002
        with self._cupy.cuda.Device(0), stream:
            self._spin((1,), (1,), (np.int64(SPIN_CYCLES),))
        yield
