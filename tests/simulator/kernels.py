"""Compiles CUDA kernels for the host, where every load and store of theirs is checked.

``kernels.cpp`` says how they run; it knows those of kvgds by name. Host memory or the simulated
GPU's: a launch says what may be touched and where it really is.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent
# What CUDA says in `#pragma unroll`, gcc says otherwise.
FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-std=c++14")
MOST_ARGUMENTS = 4


class Range(ctypes.Structure):
    """Addresses that a kernel may touch, and where the first of them really is."""

    _fields_ = (("begin", ctypes.c_uint64), ("end", ctypes.c_uint64), ("bytes", ctypes.c_uint64))


class Launch(ctypes.Structure):
    """As in ``kernels.h``."""

    _fields_ = (
        ("ranges", ctypes.POINTER(Range)),
        ("count", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * MOST_ARGUMENTS),
        ("grid", ctypes.c_uint32 * 2),
        ("threads", ctypes.c_uint32),
        ("backwards", ctypes.c_uint32),
        ("loads", ctypes.c_uint64),
        ("bytes_alone", ctypes.c_uint64),
    )


@functools.cache
def compiled(code: str) -> ctypes.CDLL:
    """The kernels of a CUDA source, each a function ``run_`` and its name.

    Takes seconds; once for all processes that share the simulator.
    """
    shared = os.environ.get("SIMCUDA_FOLDER")
    if shared is None:
        with tempfile.TemporaryDirectory(prefix="kernels-") as name:
            return ctypes.CDLL(str(_compile(code, Path(name))))
    library = Path(shared) / f"kernels-{hashlib.sha256(code.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=shared) as name:
            _compile(code, Path(name)).rename(library)
    return ctypes.CDLL(str(library))


def _compile(code: str, folder: Path) -> Path:
    gcc = shutil.which("g++")
    if gcc is None:
        raise RuntimeError("kernels for the host need g++")
    (folder / "kernels.cu").write_text(code, encoding="utf-8")
    library = folder / "kernels.so"
    build = (f'-DKERNELS="{folder / "kernels.cu"}"', "-shared", "-fPIC", "-o", str(library))
    command = [gcc, *FLAGS, *build, str(SOURCE / "kernels.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the kernels can't be compiled:\n{done.stderr}")
    return library
