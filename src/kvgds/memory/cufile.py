"""cuFile, as far as one must ask it oneself: what it is, and whether it has registered memory.

NIXL's plugins do the transfers. Loading the library costs some milliseconds, opening its driver up
to seconds. Opening reads the environment and prints, and may hang with a broken driver.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvgds import environment
from kvgds.errors import PathUnavailable
from kvgds.memory.device import cuda, packaged

if TYPE_CHECKING:
    from kvgds.memory import Span

GPU_PACKAGES = "from your checkout, pip install -c constraints.txt '.[cu12]' (or cu13)"
"""How to get CuPy and cuFile. kvgds is in no package index: by its name pip would miss it."""

_NAME = "libcufile.so.0"
_COMPAT = "CUFILE_ALLOW_COMPAT_MODE"
_ALREADY_REGISTERED = 5023
_P2PDMA = 11  # bits of what the driver says of itself
_COMPAT_ALLOWED = 1
_TEXT = {
    5001: "the driver does not open: no GPUDirect Storage here, and compatibility mode is off",
    5008: "the file system or device is not supported",
    5030: "internal error; in a container, mount /run/udev",
    5033: "the driver does not open: CUDA or nvidia-fs does not answer",
    5036: "GPU memory can't be pinned: the BAR is too small",
}


class CufileError(Exception):
    """A call of cuFile failed."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call}: cuFile error {code}, {_TEXT.get(code, 'see cufile.h')}")
        self.code = code


class _Status(ctypes.Structure):
    _fields_ = (("code", ctypes.c_int), ("cuda", ctypes.c_int))


class _Properties(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint),
        ("minor", ctypes.c_uint),
        ("poll_bytes", ctypes.c_size_t),
        ("direct_bytes", ctypes.c_size_t),
        ("status", ctypes.c_uint),
        ("control", ctypes.c_uint),
        ("spare", ctypes.c_uint * 16),
    )


@dataclass(frozen=True, slots=True)
class Means:
    """How an opened cuFile moves bytes.

    Attributes:
        text: for people.
        real: whether by GPUDirect Storage; False: by compatibility mode alone.
        compat: whether compatibility mode may serve what GPUDirect Storage can't.
    """

    text: str
    real: bool
    compat: bool


class Cufile:
    """The library. Any thread may call any method."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("DriverOpen", "DriverGetProperties", "BufRegister", "BufDeregister"):
            getattr(library, f"cuFile{name}").restype = _Status

    def open(self, *, compat: bool) -> None:
        """Open the driver in this mode, unless this process has it open already. Blocks."""
        with environment.changed({_COMPAT: "true" if compat else "false"}):
            self._call("DriverOpen")

    def means(self) -> Means:
        """What the opened driver says of itself."""
        said = _Properties()
        self._call("DriverGetProperties", ctypes.byref(said))
        peer = bool(said.status >> _P2PDMA & 1)
        nvfs = bool(said.major or said.minor)
        text = f"nvidia-fs {said.major}.{said.minor}" if nvfs else "compatibility mode"
        return Means(
            text="PCI peer-to-peer" if peer else text,
            real=peer or nvfs,
            compat=bool(said.control >> _COMPAT_ALLOWED & 1),
        )

    def registered(self, span: Span) -> None:
        """Raise CufileError unless this memory is registered: who asks again is told so."""
        code = self._try(span)
        if code != _ALREADY_REGISTERED:
            raise CufileError("cuFileBufRegister", code)

    def takes(self, span: Span) -> bool:
        """Whether this memory could be registered."""
        return self._try(span) == 0

    def _try(self, span: Span) -> int:
        """What cuFile says of a registration, which is taken back."""
        address = ctypes.c_void_p(span.address)
        status = self._library.cuFileBufRegister(address, ctypes.c_size_t(span.nbytes), 0)
        if status.code == 0:
            self._call("BufDeregister", address)
        return int(status.code)

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, f"cuFile{name}")(*arguments)
        if status.code:
            raise CufileError(f"cuFile{name}", status.code)


@functools.cache
def cufile() -> Cufile:
    """The library, loaded if need be, behind the CUDA runtime that it needs.

    Raises:
        PathUnavailable: there is no CUDA runtime, no GPU, or no cuFile.
    """
    cuda()
    report = []
    for name in (_NAME, *packaged(f"cufile/lib/{_NAME}", f"cu13/lib/{_NAME}")):
        try:
            return Cufile(ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL))
        except OSError as error:
            report.append(str(error))
    raise PathUnavailable(f"{_NAME} can't be loaded; {GPU_PACKAGES}", tuple(report))
