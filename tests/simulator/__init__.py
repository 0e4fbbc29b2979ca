"""A simulated GPU: libcudart and libcufile in C, so that NIXL's real GDS plugins run without one.

What host code may not do with device memory kills it here too, and what would be undefined on a
GPU is an error or a counter. Streams and cuFile operations can be held, so no test needs to sleep.
In `packages` is a small CuPy for it, so that GPU checksums run too.

Never load it into a process that may have a real GPU: a library is known by its name alone, and the
first one that was loaded serves the whole process. So: a child process, started with `environment`.

What can be set from the environment, before the libraries are loaded:

- ``SIMCUDA_DEVICES`` (1; 0 means none, at most 8), ``SIMCUDA_VRAM_BYTES`` (1 GiB for each),
  ``SIMCUDA_STRICT_PINNED`` (1: asynchronous copies refuse host memory that is not page-locked),
  ``SIMCUDA_COPY_DELAY_US``, ``SIMCUDA_RUNTIME`` and ``SIMCUDA_DRIVER`` (12090, both versions),
  ``SIMCUDA_COPY_BATCH`` (an error that cudaMemcpyBatchAsync answers with).
- ``SIMCUDA_PATH``: what cuFile claims to be, ``nvfs`` (the default), ``p2pdma`` or ``compat``.
  ``CUFILE_ALLOW_COMPAT_MODE`` and ``CUFILE_FORCE_COMPAT_MODE`` are obeyed.
- ``SIMCUDA_DRIVER_OPEN`` (an error or ``hang``), ``SIMCUDA_HANDLE_REGISTER``,
  ``SIMCUDA_BUFFER_REGISTER`` (an error), ``SIMCUDA_BAR_BYTES`` (no more can be registered),
  ``SIMCUDA_BUFFER_BYTES`` (no more of it at once).
- ``SIMCUDA_READ``, ``SIMCUDA_WRITE``: ``what:value:skip:count`` as in `Simulator.fault`; several
  with commas.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

SOURCE = Path(__file__).parent
PACKAGES = SOURCE / "packages"
CUDART, CUFILE = "libcudart.so.12", "libcufile.so.0"
FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread")
ANSWER_S = 20.0
HANG = -1

Operation = Literal["read", "write"]
What = Literal["short", "error", "delay", "hold"]


class CudaError(Exception):
    """A call of the simulated CUDA runtime answered with `code`."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name} ({code})")
        self.code = code


@functools.cache
def build() -> Path:
    """Compile both libraries, once per process and its children; returns their folder."""
    made = os.environ.get("SIMCUDA_FOLDER")
    if made:
        return Path(made)
    folder = Path(tempfile.mkdtemp(prefix="simulator-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _compile(folder, CUDART, "cudart")
    _compile(folder, CUFILE, "cufile", f"-L{folder}", f"-l:{CUDART}")
    return folder


def _compile(folder: Path, name: str, source: str, *more: str) -> None:
    gcc = shutil.which("gcc")
    if gcc is None:
        raise RuntimeError("the simulator needs gcc")
    linking = (f"-Wl,-soname,{name}", f"-Wl,--version-script={SOURCE / source}.map")
    command = [gcc, *FLAGS, str(SOURCE / f"{source}.c"), *linking, *more, "-o", str(folder / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the simulator can't be built:\n{done.stderr}")


def environment(*, cupy: bool = True, **settings: object) -> dict[str, str]:
    """The environment of a child process that finds the simulator where it looks for CUDA and CuPy.

    Args:
        cupy: whether it finds one.
        settings: of the simulator, named in lower case and without ``SIMCUDA_``: ``devices=2``.
    """
    folder = str(build())
    given = {f"SIMCUDA_{name.upper()}": str(value) for name, value in settings.items()}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SIMCUDA_")}
    paths = {
        "LD_LIBRARY_PATH": _before("LD_LIBRARY_PATH", folder),
        "PYTHONPATH": _before("PYTHONPATH", *([str(PACKAGES)] if cupy else []), str(SOURCE.parent)),
    }
    return {**kept, **paths, "SIMCUDA_FOLDER": folder, **given}


def _before(name: str, *folders: str) -> str:
    behind = os.environ.get(name)
    return ":".join((*folders, behind) if behind else folders)


class Simulator:
    """Both libraries, loaded into this process, and what controls them.

    One per process is enough; several are the same machine. All methods may be called from any
    thread, and let others run while they wait.
    """

    def __init__(self) -> None:
        folder = build()
        self.cudart = _load(folder / CUDART, "simcuda_peek")
        self.cufile = _load(folder / CUFILE, "simcufile_fault")
        self.cudart.cudaGetErrorName.restype = ctypes.c_char_p
        for library, prefix in ((self.cudart, "simcuda"), (self.cufile, "simcufile")):
            getattr(library, f"{prefix}_counter_name").restype = ctypes.c_char_p
            getattr(library, f"{prefix}_counter").restype = ctypes.c_int64
        self._counters = {
            **_counters(self.cudart, "simcuda"),
            **_counters(self.cufile, "simcufile"),
        }
        errors = dict.fromkeys(("driver_open", "handle_register", "buffer_register"), 0)
        self._settings = {**errors, "buffer": 0, "bar": 0}

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of libcudart by name; raises CudaError for what is not success."""
        code = getattr(self.cudart, name)(*arguments)
        if code:
            raise CudaError(self.cudart.cudaGetErrorName(code).decode(), code)

    @property
    def device(self) -> int:
        """The current device of this thread."""
        device = ctypes.c_int()
        self.call("cudaGetDevice", ctypes.byref(device))
        return device.value

    @device.setter
    def device(self, device: int) -> None:
        self.call("cudaSetDevice", device)

    @contextmanager
    def on(self, device: int) -> Iterator[None]:
        """Make a device current for this thread, and then again the one that was."""
        before, self.device = self.device, device
        try:
            yield
        finally:
            self.device = before

    def allocate(self, nbytes: int, device: int = 0) -> Vram:
        """Allocate device memory."""
        return Vram(self, nbytes, device)

    # --- streams ------------------------------------------------------------------------------

    def stream(self, device: int = 0, *, blocking: bool = False) -> int:
        """A new stream's handle; a blocking one waits for the default stream and it for that."""
        handle = ctypes.c_void_p()
        with self.on(device):
            self.call("cudaStreamCreateWithFlags", ctypes.byref(handle), 0 if blocking else 1)
        return handle.value or 0

    def hold(self, stream: int | None = None) -> None:
        """Start nothing new on this stream (0: the default one), or on any that ever is."""
        if stream is None:
            self.cudart.simcuda_hold_all(1)
        else:
            self.call("simcuda_hold", ctypes.c_void_p(stream))

    def release(self, stream: int | None = None) -> None:
        """Let a stream go on, or all of them."""
        if stream is None:
            self.cudart.simcuda_hold_all(0)
        else:
            self.call("simcuda_release", ctypes.c_void_p(stream))

    def copy_delay(self, seconds: float) -> None:
        """Make every copy and every kernel take this much longer."""
        self.cudart.simcuda_set_copy_delay_us(ctypes.c_int64(int(seconds * 1e6)))

    def strict_pinned(self, *, strict: bool) -> None:
        """Whether asynchronous copies refuse host memory that is not page-locked."""
        self.cudart.simcuda_set_strict_pinned(int(strict))

    def refuse(self, function: str, error: int = 2, *, skip: int = 0, count: int = 1) -> None:
        """Let so many calls of a function of libcudart fail, behind the next `skip`; -1: for ever.

        Those that allocate, register, look up, create, record, copy and launch heed it; the last
        are one, ``simcuda_launch``.
        """
        numbers = ctypes.c_int(error), ctypes.c_int64(skip), ctypes.c_int64(count)
        self.call("simcuda_refuse", function.encode(), *numbers)

    def capture(self) -> None:
        """Be as if a thread captured a graph until `clear`, in CUDA's and torch's default mode.

        What others may not do then fails, and is one of ``broken_captures``.
        """
        self.cudart.simcuda_capture(1)

    # --- cuFile -------------------------------------------------------------------------------

    def driver_open(self, error: int = 0) -> None:
        """What cuFileDriverOpen answers from now on; HANG: nothing, until this is set again."""
        self._set("driver_open", error)

    def handle_register(self, error: int = 0) -> None:
        """What cuFileHandleRegister answers from now on."""
        self._set("handle_register", error)

    def buffer_register(self, error: int = 0) -> None:
        """What cuFileBufRegister answers from now on."""
        self._set("buffer_register", error)

    def bar(self, nbytes: int = 0) -> None:
        """How much device memory may be registered at a time; beyond it error 5036. 0: all."""
        self._set("bar", nbytes)

    def buffer(self, nbytes: int = 0) -> None:
        """How much device memory one registration may have; beyond it error 5036. 0: all."""
        self._set("buffer", nbytes)

    def _set(self, name: str, value: int) -> None:
        self._settings[name] = value
        *errors, buffer, bar = self._settings.values()
        limits = ctypes.c_size_t(buffer), ctypes.c_size_t(bar)
        self.cufile.simcufile_set(*map(ctypes.c_int, errors), *limits)

    def fault(
        self, operation: Operation, what: What, value: int = 0, *, skip: int = 0, count: int = -1
    ) -> None:
        """Do this to cuFile's reads or writes; of several, the oldest that applies.

        Args:
            operation: ``read`` or ``write``, in a batch or not.
            what: ``short``, ``error``, ``delay`` or ``hold``.
            value: of ``short``, how many bytes fewer; of ``error``, an errno (the call returns -1)
                or a cuFile error from 5001 (it returns minus that); of ``delay``, microseconds.
                What is on ``hold`` waits for `release_io` before it does anything.
            skip: let this many pass first.
            count: do it this often, then no more; -1 is for ever.
        """
        numbers = [ctypes.c_int64(number) for number in (value, skip, count)]
        if self.cufile.simcufile_fault(int(operation == "write"), what.encode(), *numbers):
            raise ValueError(f"not a fault, or too many: {what}")

    def release_io(self, error: int = 0) -> None:
        """Hold no operation any more: what is held runs now, or fails with `error`."""
        self.cufile.simcufile_release(ctypes.c_int64(error))

    def clear(self) -> None:
        """Be healthy again: nothing fails, is refused, held or slow, and no device is broken."""
        self.cufile.simcufile_clear()
        for name in self._settings:
            self._set(name, 0)
        self.copy_delay(0)
        self.cudart.simcuda_heal()
        self.release()

    # --- counters -----------------------------------------------------------------------------

    def counter(self, name: str) -> int:
        """How often something has happened, or how much of it there is now; see `counters`."""
        library, prefix, index = self._counters[name]
        return int(getattr(library, f"{prefix}_counter")(index))

    def counters(self) -> dict[str, int]:
        """All of them.

        Who uses CUDA and cuFile well leaves these at 0: ``freed_in_use``, ``unpinned_in_use``,
        ``deregistered_in_use``, ``freed_while_registered``, ``closed_while_registered``.
        """
        return {name: self.counter(name) for name in self._counters}

    def wait_counter(self, name: str, least: int, timeout_s: float = ANSWER_S) -> None:
        """Block until a counter has reached this.

        ``pending`` operations are queued on streams, ``waiting`` threads wait for one; ``held``
        cuFile operations and ``opens_waiting`` calls of cuFileDriverOpen hang.
        """
        library, prefix, index = self._counters[name]
        wait = getattr(library, f"{prefix}_wait_counter")
        if wait(index, ctypes.c_int64(least), ctypes.c_int64(int(timeout_s * 1e3))):
            raise TimeoutError(f"{name} is {self.counter(name)}, not {least}")


def _load(path: Path, ours: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    if not hasattr(library, ours):
        raise RuntimeError(f"this process has loaded the real {path.name}")
    return library


def _counters(library: ctypes.CDLL, prefix: str) -> dict[str, tuple[ctypes.CDLL, str, int]]:
    found: dict[str, tuple[ctypes.CDLL, str, int]] = {}
    while name := getattr(library, f"{prefix}_counter_name")(len(found)):
        found[name.decode()] = (library, prefix, len(found))
    return found


class Vram:
    """Device memory. The host can't touch its address; `read` and `write` copy."""

    def __init__(self, simulator: Simulator, nbytes: int, device: int) -> None:
        self.simulator, self.nbytes, self.device = simulator, nbytes, device
        self.stream: int | None = None
        """The stream on which it is written, for ``__cuda_array_interface__``; 1 is the default."""
        address = ctypes.c_void_p()
        with simulator.on(device):
            simulator.call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(nbytes))
        self.address = address.value or 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.free()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """As bytes; version 3 of the protocol."""
        return {
            "shape": (self.nbytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "version": 3,
            "stream": self.stream,
        }

    def free(self) -> None:
        """Free it; waits for all streams of the device, as CUDA does."""
        if self.address:
            self.simulator.call("cudaFree", ctypes.c_void_p(self.address))
        self.address = 0

    def write(self, data: bytes, offset: int = 0) -> None:
        """Copy bytes in, on the default stream, and wait for it."""
        self._copy(self.address + offset, data, len(data), 1)

    def read(self, nbytes: int | None = None, offset: int = 0) -> bytes:
        """Copy bytes out, on the default stream, and wait for it."""
        buffer = ctypes.create_string_buffer(nbytes or self.nbytes - offset)
        self._copy(buffer, self.address + offset, len(buffer), 2)
        return buffer.raw

    def _copy(self, to: Any, source: Any, nbytes: int, kind: int) -> None:
        ends = [ctypes.c_void_p(end) if isinstance(end, int) else end for end in (to, source)]
        with self.simulator.on(self.device):
            self.simulator.call("cudaMemcpy", *ends, ctypes.c_size_t(nbytes), kind)

    def peek(self, nbytes: int | None = None, offset: int = 0) -> bytes:
        """What is there at this moment, past every stream and every hold."""
        buffer = ctypes.create_string_buffer(nbytes or self.nbytes - offset)
        address = ctypes.c_void_p(self.address + offset)
        if self.simulator.cudart.simcuda_peek(buffer, address, ctypes.c_size_t(len(buffer))):
            raise IndexError("outside of the allocation")
        return buffer.raw
