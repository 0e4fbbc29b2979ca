"""What the system forbids: system calls that fail from now on, in all threads of the process.

By seccomp, as Docker does it; for a child process, since nothing takes it back.
"""

import ctypes
import errno
import os
import platform
import struct

_ARM = platform.machine() == "aarch64"
CLONE, CLONE3 = 220 if _ARM else 56, 435
MADVISE = 233 if _ARM else 28
_SECCOMP = 277 if _ARM else 317
IO_SETUP, IO_URING_SETUP = 0 if _ARM else 206, 425
_libc = ctypes.CDLL(None, use_errno=True)


def forbid(*calls: int, error: int = errno.EPERM) -> None:
    """Let these system calls fail."""
    code = struct.pack("HBBI", 0x20, 0, 0, 0)  # which system call
    for number in calls:
        code += struct.pack("HBBI", 0x15, 0, 1, number)
        code += struct.pack("HBBI", 0x06, 0, 0, 0x00050000 | error)
    code += struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)  # any other may go
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    assert _libc.prctl(38, 1, 0, 0, 0) == 0
    filtering, all_threads = 1, 1
    done = _libc.syscall(_SECCOMP, filtering, all_threads, program)
    assert done == 0, os.strerror(ctypes.get_errno())


def forbid_threads() -> None:
    """Let no more threads or processes start, as at a limit on them."""
    forbid(CLONE, CLONE3, error=errno.EAGAIN)
