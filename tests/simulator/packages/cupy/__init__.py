"""A small CuPy on the simulated GPU: what kvgds uses of it, and no more.

Only children of the simulator find it (see `simulator.environment`). Kernels are compiled for the
host and run by the stream in its order. Stricter than CuPy, whose pools hand out again what was let
go of: here memory goes for good with its array, and the simulator counts what a queued copy or
kernel still needed.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.kernels import Launch, compiled

from . import cuda

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["RawModule", "asarray", "cuda", "empty", "ndarray"]


class ndarray:  # noqa: N801 - CuPy's name
    """An array in GPU memory."""

    def __init__(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.shape = (shape,) if isinstance(shape, int) else shape
        self.size = math.prod(self.shape)
        self.nbytes = self.size * self.dtype.itemsize
        self.data = cuda.alloc(self.nbytes)
        self.staged: cuda.PinnedMemoryPointer | None = None
        """Where its first content is copied from, on some stream at some time."""


def empty(shape: int | tuple[int, ...], dtype: DTypeLike) -> ndarray:
    """An array of garbage on the current device."""
    return ndarray(shape, dtype)


def asarray(a: NDArray[Any]) -> ndarray:
    """A copy, made on the current stream."""
    array = ndarray(a.shape, a.dtype)
    array.staged = cuda.alloc_pinned_memory(a.nbytes)
    array.staged[: a.nbytes] = np.frombuffer(a.tobytes(), np.uint8)
    array.data.copy_from_host_async(array.staged.ptr, a.nbytes)
    return array


class RawModule:
    """Kernels in CUDA C++."""

    def __init__(self, *, code: str, options: tuple[str, ...] = ()) -> None:
        self.options = options  # for another compiler
        self._library = compiled(code)

    def get_function(self, name: str) -> Kernel:
        """A kernel by name."""
        return Kernel(self._library[f"run_{name}"])


class Kernel:
    """A kernel, to be launched on the current stream."""

    def __init__(self, function: Any) -> None:
        self._function = ctypes.cast(function, ctypes.c_void_p)

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...]
    ) -> None:
        columns, rows = (*grid, 1)[:2]
        launch = Launch(grid=(columns, rows), threads=block[0])
        for i, argument in enumerate(args):
            launch.arguments[i] = _word(argument)
        stream = ctypes.c_void_p(cuda.current_stream())
        cuda.runtime.call("simcuda_launch", self._function, ctypes.byref(launch), stream)


def _word(argument: ndarray | np.generic) -> int:
    if isinstance(argument, ndarray):
        return argument.data.ptr
    return int.from_bytes(argument.tobytes(), "little")
