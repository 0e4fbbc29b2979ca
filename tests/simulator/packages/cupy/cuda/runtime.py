"""Calls of the simulated CUDA runtime, by CuPy's names."""

from __future__ import annotations

import ctypes
from typing import Any

from simulator import CudaError, Simulator

_simulator = Simulator()


class CUDARuntimeError(RuntimeError):
    """A call failed."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def call(name: str, *arguments: Any) -> None:
    """Call it, and raise what it answers."""
    try:
        _simulator.call(name, *arguments)
    except CudaError as error:
        raise CUDARuntimeError(str(error), error.code) from error


def getDeviceCount() -> int:  # noqa: N802 - CuPy's name
    """How many devices there are."""
    count = ctypes.c_int()
    call("cudaGetDeviceCount", ctypes.byref(count))
    return count.value


def getDevice() -> int:  # noqa: N802 - CuPy's name
    """The current device of this thread."""
    return _simulator.device


def setDevice(device: int) -> None:  # noqa: N802 - CuPy's name
    """Make it another."""
    _simulator.device = device


def eventQuery(event: int) -> int:  # noqa: N802 - CuPy's name
    """The code of what is asked, success or not: this is the one call that raises nothing."""
    return int(_simulator.cudart.cudaEventQuery(ctypes.c_void_p(event)))
