"""The CUDA runtime, as far as blocks need it: which GPU an address is on, and copies.

Called through ctypes: kvgds is no CUDA program, and a serving process has the runtime already.
Copies run on streams of kvgds's own and are watched through events; nothing here waits for the GPU,
save :meth:`Cuda.copy_now`, and copies whose event can't be recorded or asked for.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import threading
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvgds.errors import ConfigError, PathUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvgds.memory import Span

_NAMES = ("libcudart.so.12", "libcudart.so.13")
_PACKAGED = ("cuda_runtime/lib/libcudart.so.*", "cu13/lib/libcudart.so.*")
NOTHING = bytes(16)  # the checksum of work that makes none
NOT_READY = 600  # cudaErrorNotReady
_PORTABLE = 1
_NON_BLOCKING = 1
# The caller's per-thread default stream is another one in our threads. The default stream waits for
# those of all threads.
_LEGACY, _PER_THREAD = 1, 2
_NO_TIMING = 2
_DEFAULT_KIND = 4  # the runtime tells host from device by the address
_DEVICE_MEMORY = (2, 3)  # cudaMemoryTypeDevice, cudaMemoryTypeManaged
_BATCHES_FROM = 12080  # the first CUDA, runtime and driver, with cudaMemcpyBatchAsync
_NO_BATCHES = (36, 801)  # cudaErrorCallRequiresNewerDriver, cudaErrorNotSupported
_RELAXED = 2  # cudaStreamCaptureModeRelaxed
_IN_STREAM_ORDER = 1  # cudaMemcpySrcAccessOrderStream


class CudaError(Exception):
    """A call of the CUDA runtime failed."""


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("device", ctypes.c_int),
        ("device_pointer", ctypes.c_void_p),
        ("host_pointer", ctypes.c_void_p),
        ("spare", ctypes.c_long * 8),
    )


class _CopyAttributes(ctypes.Structure):
    _fields_ = (("order", ctypes.c_int), ("hints_and_flags", ctypes.c_int * 15))  # and more behind


class Cuda:
    """One CUDA runtime. Any thread may call any method."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        self._call("cudaGetDeviceCount", ctypes.byref(count))
        self.devices = count.value
        self._runtime = self._number("cudaRuntimeGetVersion")
        known = min(self._runtime, self._number("cudaDriverGetVersion"))
        self._batches = known >= _BATCHES_FROM and hasattr(library, "cudaMemcpyBatchAsync")
        self._streams: dict[int, ctypes.c_void_p] = {}
        self._lock = threading.Lock()
        self._thread = threading.local()

    @property
    def version(self) -> int:
        """Major version of the runtime: 12, 13."""
        return self._runtime // 1000

    def _number(self, name: str) -> int:
        said = ctypes.c_int()
        self._call(name, ctypes.byref(said))
        return said.value

    def _call(self, name: str, *arguments: Any) -> None:  # noqa: ANN401 - ctypes converts
        code = getattr(self._library, name)(*arguments)
        if code:
            raise CudaError(f"{name}: {self._library.cudaGetErrorString(code).decode()} ({code})")

    def device_of(self, address: int) -> int | None:
        """The GPU whose memory lies at an address; None: it is host memory."""
        found = _Attributes()
        self._call("cudaPointerGetAttributes", ctypes.byref(found), ctypes.c_void_p(address))
        return found.device if found.type in _DEVICE_MEMORY else None

    def enter(self, device: int) -> None:
        """Make a GPU current in this thread, which is one of kvgds's own.

        While any thread captures a CUDA graph, calls as plain as a look at an event fail in all
        others, and the capture with them, unless a thread says that it has no part in it.
        """
        self._call("cudaSetDevice", device)
        if not hasattr(self._thread, "entered"):
            mode = ctypes.byref(ctypes.c_int(_RELAXED))
            self._call("cudaThreadExchangeStreamCaptureMode", mode)
            self._thread.entered = True

    def pin(self, device: int, span: Span) -> None:
        """Page-lock host memory, so that copies to and from it run by themselves. Blocks."""
        self.enter(device)
        address, nbytes = ctypes.c_void_p(span.address), ctypes.c_size_t(span.nbytes)
        self._call("cudaHostRegister", address, nbytes, _PORTABLE)

    def unpin(self, device: int, span: Span) -> None:
        """Take :meth:`pin` back."""
        self.enter(device)
        self._call("cudaHostUnregister", ctypes.c_void_p(span.address))

    def allocate(self, device: int, nbytes: int) -> int:
        """Memory of a GPU, which becomes the current one: its address. Blocks."""
        address = ctypes.c_void_p()
        self.enter(device)
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return address.value or 0

    def free(self, device: int, address: int) -> None:
        """Free what :meth:`allocate` gave. Blocks."""
        self.enter(device)
        self._call("cudaFree", ctypes.c_void_p(address))

    def reached(self, device: int, stream: int) -> Copying:
        """Whether a stream has done all that it was given so far."""
        self.enter(device)
        given = Copying(self, self._event())
        self._call("cudaEventRecord", given.event, ctypes.c_void_p(stream))
        return given

    def copy(self, device: int, copies: Sequence[tuple[int, int, int]]) -> Copying:
        """Start copies (to, from, bytes) that don't depend on each other.

        Those of a scattered block are one call where CUDA has it: each call gives up the
        interpreter lock, and costs the driver as much as a small copy itself.
        """
        ours = ctypes.c_void_p(self.stream(device))
        copying = Copying(self, self._event())
        try:
            if len(copies) == 1 or not self._copy_at_once(copies, ours):
                for to, source, nbytes in copies:
                    ends = ctypes.c_void_p(to), ctypes.c_void_p(source)
                    size = ctypes.c_size_t(nbytes)
                    self._call("cudaMemcpyAsync", *ends, size, _DEFAULT_KIND, ours)
        except CudaError as error:  # those before it must not go on in memory that is given back
            copying.refused = str(error)  # itself it would hold on to all of this
        try:
            self._call("cudaEventRecord", copying.event, ours)
        except CudaError:
            self._call("cudaStreamSynchronize", ours)
            raise
        return copying

    def _copy_at_once(
        self, copies: Sequence[tuple[int, int, int]], stream: ctypes.c_void_p
    ) -> bool:
        """Start copies with one call. False: that can't be had; each of them is to be copied again.

        Which of them it does not like, or that it is the call itself, they then tell one by one.
        """
        if not self._batches:
            return False
        count = len(copies)
        # An array of ctypes would need a class for each count, which is left to the collector.
        columns = [array("Q", column) for column in zip(*copies, strict=True)]
        attributes, from_first = _CopyAttributes(order=_IN_STREAM_ORDER), ctypes.c_size_t(0)
        # From CUDA 13 on it doesn't tell which copy was wrong.
        told = (ctypes.byref(ctypes.c_size_t()),) if self.version < 13 else ()  # noqa: PLR2004
        code = self._library.cudaMemcpyBatchAsync(
            *(ctypes.c_void_p(column.buffer_info()[0]) for column in columns),
            ctypes.c_size_t(count),
            ctypes.byref(attributes),
            ctypes.byref(from_first),
            ctypes.c_size_t(1),
            *told,
            stream,
        )
        self._batches = code not in _NO_BATCHES
        return bool(code == 0)

    def copy_now(self, to: int, source: int, nbytes: int) -> None:
        """Copy, and wait for it."""
        ends = ctypes.c_void_p(to), ctypes.c_void_p(source)
        self._call("cudaMemcpy", *ends, ctypes.c_size_t(nbytes), _DEFAULT_KIND)

    def done(self, event: ctypes.c_void_p) -> bool:
        """Whether a stream has reached an event."""
        code = self._library.cudaEventQuery(event)
        if code not in (0, NOT_READY):  # what was begun must not go on in memory that is given back
            self._library.cudaEventSynchronize(event)
            raise CudaError(f"a copy failed: {self._library.cudaGetErrorString(code).decode()}")
        return bool(code == 0)

    def forget(self, event: ctypes.c_void_p) -> None:
        """Let go of an event, reached or not. A GPU that has failed keeps it."""
        self._library.cudaEventDestroy(event)

    def _event(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        self._call("cudaEventCreateWithFlags", ctypes.byref(event), _NO_TIMING)
        return event

    def stream(self, device: int) -> int:
        """The stream on which kvgds does its own work on a GPU, which becomes the current one."""
        self.enter(device)
        with self._lock:
            if device not in self._streams:
                made = ctypes.c_void_p()
                self._call("cudaStreamCreateWithFlags", ctypes.byref(made), _NON_BLOCKING)
                self._streams[device] = made
            return self._streams[device].value or 0


class Copying:
    """What a stream was given, copies perhaps, until it has done it.

    Attributes:
        event: what the stream comes to then, gone with this: who waits may give up.
        refused: why one was not started, told once those before it have ended.
    """

    def __init__(self, cuda: Cuda, event: ctypes.c_void_p) -> None:
        self._cuda = cuda
        self.event = event
        self.refused = ""

    def __del__(self) -> None:
        self._cuda.forget(self.event)

    @property
    def done(self) -> bool:
        """Whether they have ended.

        Raises:
            CudaError: they failed, or some were refused.
        """
        over = self._cuda.done(self.event)
        if over and self.refused:
            raise CudaError(self.refused)
        return over


class Copied:
    """Copies that ended before they could be asked for."""

    done = True


COPIED = Copied()


def stream_of(stream: Any) -> int:  # noqa: ANN401 - any library's
    """The handle of a CUDA stream of torch, CuPy or another library.

    Raises:
        ConfigError: it is none.
    """
    if hasattr(stream, "__cuda_stream__"):
        stream = stream.__cuda_stream__()[1]
    for name in ("cuda_stream", "ptr"):  # torch's, CuPy's
        stream = getattr(stream, name, stream)
    if type(stream) is not int or stream < 0:
        rule = "must be a stream of torch or CuPy, a cudaStream_t as an integer, or None"
        raise ConfigError("stream", stream, rule)
    return _LEGACY if stream == _PER_THREAD else stream


@functools.cache
def cuda() -> Cuda:
    """The CUDA runtime of this process, loaded if need be. Blocks the first time.

    Raises:
        PathUnavailable: there is none, or no GPU.
    """
    report = []
    for name in (*_NAMES, *packaged(*_PACKAGED)):
        try:
            return Cuda(ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL))
        except (OSError, CudaError) as error:
            report.append(str(error))
    raise PathUnavailable("GPU memory can't be used here: no CUDA runtime or no GPU", tuple(report))


def packaged(*patterns: str) -> list[str]:
    """NVIDIA's libraries that came as Python packages, where no loader looks for them."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec is not None else None
    found: list[str] = []
    for folder in folders or ():
        for pattern in patterns:
            found += map(str, sorted(Path(folder).glob(pattern)))
    return found
