"""Devices, streams, events and memory of the simulated GPU."""

from __future__ import annotations

import collections
import ctypes
import mmap
import threading
import weakref
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from . import runtime

if TYPE_CHECKING:
    from types import TracebackType

__all__ = [
    "Device",
    "Event",
    "ExternalStream",
    "MemoryPointer",
    "PinnedMemoryPointer",
    "Stream",
    "alloc",
    "alloc_pinned_memory",
    "current_stream",
    "is_available",
    "runtime",
]

_NON_BLOCKING, _NO_TIMING, _BY_ADDRESS = 1, 2, 4
_GRAIN = 512  # pinned memory is handed out in these, so it may be more than was asked for
_current = threading.local()
_pinned: dict[int, list[mmap.mmap]] = collections.defaultdict(list)


def is_available() -> bool:
    """Whether there is a device."""
    return runtime.getDeviceCount() > 0


class _Context:
    """Something that is current within a `with`, and before that something else was."""

    def __init__(self) -> None:
        self._before: list[Any] = []

    def _change(self) -> Any:
        raise NotImplementedError

    def _restore(self, before: Any) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._before.append(self._change())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore(self._before.pop())


class Device(_Context):
    """A GPU."""

    def __init__(self, device: int) -> None:
        super().__init__()
        self.id = device

    def _change(self) -> int:
        before = runtime.getDevice()
        runtime.setDevice(self.id)
        return before

    def _restore(self, before: int) -> None:
        runtime.setDevice(before)


def current_stream() -> int:
    """The handle of this thread's current stream; each device has one."""
    return getattr(_current, f"on_{runtime.getDevice()}", 0)


class ExternalStream(_Context):
    """A stream that somebody else owns."""

    def __init__(self, ptr: int) -> None:
        super().__init__()
        self.ptr = ptr

    def synchronize(self) -> None:
        """Wait until it has done what it was given."""
        runtime.call("cudaStreamSynchronize", ctypes.c_void_p(self.ptr))

    def _change(self) -> int:
        before = current_stream()
        self._restore(self.ptr)
        return before

    def _restore(self, before: int) -> None:
        setattr(_current, f"on_{runtime.getDevice()}", before)


class Stream(ExternalStream):
    """A stream of its own on the current device, destroyed with the object."""

    def __init__(self, *, non_blocking: bool = False) -> None:
        handle = ctypes.c_void_p()
        flags = _NON_BLOCKING if non_blocking else 0
        runtime.call("cudaStreamCreateWithFlags", ctypes.byref(handle), flags)
        super().__init__(handle.value or 0)
        weakref.finalize(self, runtime.call, "cudaStreamDestroy", handle)


class Event:
    """An event on the current device."""

    def __init__(self, *, disable_timing: bool = False) -> None:
        handle = ctypes.c_void_p()
        flags = _NO_TIMING if disable_timing else 0
        runtime.call("cudaEventCreateWithFlags", ctypes.byref(handle), flags)
        self.ptr = handle.value or 0
        weakref.finalize(self, runtime.call, "cudaEventDestroy", handle)

    def record(self, stream: ExternalStream) -> None:
        """Mark how far a stream has been given work."""
        pointers = ctypes.c_void_p(self.ptr), ctypes.c_void_p(stream.ptr)
        runtime.call("cudaEventRecord", *pointers)

    def synchronize(self) -> None:
        """Wait until the stream has come there."""
        runtime.call("cudaEventSynchronize", ctypes.c_void_p(self.ptr))


class MemoryPointer:
    """GPU memory, freed with the object."""

    def __init__(self, address: ctypes.c_void_p) -> None:
        self.ptr = address.value or 0
        weakref.finalize(self, runtime.call, "simcuda_free_now", address)

    def copy_from_host_async(
        self, mem: int, size: int, stream: ExternalStream | None = None
    ) -> None:
        """Copy from an address of the host."""
        self._copy(self.ptr, mem, size, stream)

    def copy_to_host_async(self, mem: int, size: int, stream: ExternalStream | None = None) -> None:
        """Copy to an address of the host."""
        self._copy(mem, self.ptr, size, stream)

    @staticmethod
    def _copy(to: int, source: int, size: int, stream: ExternalStream | None) -> None:
        ends, nbytes = (ctypes.c_void_p(to), ctypes.c_void_p(source)), ctypes.c_size_t(size)
        queue = ctypes.c_void_p(current_stream() if stream is None else stream.ptr)
        runtime.call("cudaMemcpyAsync", *ends, nbytes, _BY_ADDRESS, queue)


def alloc(size: int) -> MemoryPointer:
    """Memory of the current device."""
    address = ctypes.c_void_p()
    runtime.call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(size))
    return MemoryPointer(address)


class PinnedMemoryPointer(np.ndarray[tuple[int], np.dtype[np.uint8]]):
    """Page-locked memory of the host, as bytes."""

    @property
    def ptr(self) -> int:
        """Its address."""
        return self.ctypes.data


def alloc_pinned_memory(size: int) -> PinnedMemoryPointer:
    """Take page-locked memory out of a pool. Once let go of, others may get it at any time."""
    nbytes = max(-(-size // _GRAIN), 1) * _GRAIN
    memory = _pinned[nbytes].pop() if _pinned[nbytes] else mmap.mmap(-1, nbytes)
    pointer = np.frombuffer(memory, np.uint8).view(PinnedMemoryPointer)
    address = ctypes.c_void_p(pointer.ptr)
    runtime.call("cudaHostRegister", address, ctypes.c_size_t(nbytes), 0)
    weakref.finalize(pointer, _put_back, memory, nbytes, address)
    return pointer


def _put_back(memory: mmap.mmap, nbytes: int, address: ctypes.c_void_p) -> None:
    """Unpin it, so that what still needs it is counted; that would die of memory unmapped."""
    runtime.call("simcuda_unpin", address)
    _pinned[nbytes].append(memory)
