"""One NIXL agent: its backends, what is registered with it, and requests under way.

The only code that calls NIXL. All methods of an agent run on the thread that made it. A request is
never released before it has ended: NIXL would free memory that storage still writes to.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from kvgds.errors import PathUnavailable
from kvgds.transport.contract import File

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvgds.memory import Region

    Descriptors = list[tuple[int, int, int]]
    """(address, bytes, device) in memory; (offset, bytes, descriptor) in a file."""

_FILE_BYTES = 1 << 46  # only a bound on offsets
_GPU_SETTINGS = {"GDS_MT": {"thread_count": "8"}, "GDS": {"batch_pool_size": "16"}}


def import_nixl() -> Any:  # noqa: ANN401 - nixl has no types
    """NIXL's Python API, silenced: it logs to stdout and changes logging for the process."""
    level, raising = os.environ.get("NIXL_LOG_LEVEL"), logging.raiseExceptions
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
    report = []
    try:
        for name in ("nixl_cu12", "nixl_cu13"):
            try:
                return importlib.import_module(f"{name}._api")
            except ImportError as error:
                report.append(f"{name}: {error}")
    finally:
        logging.raiseExceptions = raising
        if level is None:
            del os.environ["NIXL_LOG_LEVEL"]
    raise PathUnavailable("NIXL can't be loaded; pip install 'nixl-cu12>=1.5.1'", tuple(report))


_making_ring = threading.Lock()


def _rings() -> set[int]:
    """Descriptors of this process's io_uring rings."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "io_uring" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(int(name))
    return found


class Request:
    """What NIXL was asked to move: host memory, or one GPU's, to or from files."""

    __slots__ = ("done", "error", "handle")

    def __init__(self) -> None:
        self.handle: Any = None
        self.done = False
        self.error: Exception | None = None


class Agent:
    """A NIXL agent with its POSIX plugin, and one for GPU memory if ``gpu`` names it.

    Attributes:
        backend: the plugin for host memory and its queue, for example ``"POSIX/uring"``.
        ring: a descriptor that is readable while completions lie in its queue; None: there is none.

    Raises:
        PathUnavailable: NIXL or a plugin can't be used here.
    """

    def __init__(self, name: str, queues: Sequence[str], gpu: str) -> None:
        self._name = name
        self._gpu = gpu
        self.ring: int | None = None
        self._registered: dict[Region | File, list[tuple[str, Any]]] = {}
        self._nixl = import_nixl()
        self._agent, self.backend = self._make(queues)
        if gpu:
            self._make_gpu()

    def _make(self, queues: Sequence[str]) -> tuple[Any, str]:
        report = []
        sync = self._nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        for kind in queues:
            config = self._nixl.nixl_agent_config(
                enable_prog_thread=False, backends=[], sync_mode=sync
            )
            agent = self._nixl.nixl_agent(self._name, config)
            with _making_ring:
                before = _rings()
                try:
                    agent.create_backend("POSIX", {f"use_{kind}": "true", "ios_pool_size": "4096"})
                except Exception as error:  # noqa: BLE001 - nixl's errors share no base class
                    report.append(f"POSIX/{kind}: {error}")
                    continue
                made = _rings() - before
            self.ring = made.pop() if len(made) == 1 else None
            return agent, f"POSIX/{kind}"
        raise PathUnavailable("NIXL's POSIX plugin can't be used here", tuple(report))

    def _make_gpu(self) -> None:
        try:
            self._agent.create_backend(self._gpu, _GPU_SETTINGS[self._gpu])
        except Exception as error:  # noqa: BLE001 - nixl's errors share no base class
            raise PathUnavailable(
                f"NIXL's {self._gpu} plugin can't be used here", (str(error),)
            ) from None

    def register(self, thing: Region | File) -> None:
        """Tell NIXL of memory or a file, if it does not know it."""
        if thing in self._registered:
            return
        if isinstance(thing, File):
            entries, kind = [(0, _FILE_BYTES, thing.fd, "")], "FILE"
            backends = ["POSIX", self._gpu] if self._gpu else ["POSIX"]
        elif thing.device is None:
            entries, kind = [(span.address, span.nbytes, 0, "") for span in thing.spans], "DRAM"
            backends = ["POSIX"]
        else:
            device = thing.device
            entries = [(span.address, span.nbytes, device, "") for span in thing.spans]
            kind, backends = "VRAM", [self._gpu]
        done = self._registered[thing] = []
        try:
            for backend in backends:
                registered = self._agent.register_memory(entries, kind, [backend])
                done.append((backend, registered))
        except BaseException:
            self.forget(thing)
            raise

    def forget(self, thing: Region | File) -> None:
        """Deregister, if it was ever registered."""
        for backend, registered in self._registered.pop(thing, ()):
            self._agent.deregister_memory(registered, backends=[backend])

    def post(self, local: Descriptors, remote: Descriptors, *, write: bool, far: bool) -> Request:
        """Start moving between memory (``far``: a GPU's) and files, pair by pair."""
        agent, request = self._agent, Request()
        kind, backend = ("VRAM", self._gpu) if far else ("DRAM", "POSIX")
        try:
            request.handle = agent.initialize_xfer(
                "WRITE" if write else "READ",
                agent.get_xfer_descs(local, kind),
                agent.get_xfer_descs(remote, "FILE"),
                self._name,
                b"",
                [backend],
            )
            request.done = agent.transfer(request.handle) == "DONE"
        except Exception as error:  # noqa: BLE001 - nixl's errors share no base class
            request.done, request.error = True, error
        return request

    def check(self, request: Request) -> bool:
        """Whether a request has ended, well or not. Lets the POSIX plugin work, too."""
        if not request.done:
            try:
                request.done = self._agent.check_xfer_state(request.handle) == "DONE"
            except Exception as error:  # noqa: BLE001 - nixl's errors share no base class
                request.done, request.error = True, error
        return request.done

    def release(self, request: Request) -> None:
        """Let go of a request that has ended."""
        if request.handle is not None:
            self._agent.release_xfer_handle(request.handle)

    def close(self) -> None:
        """Forget everything; nothing is under way."""
        for thing in list(self._registered):
            self.forget(thing)
        self._agent = None

    def leak(self, requests: Sequence[Request]) -> None:
        """Keep for as long as the process lives what these requests may use. Any thread."""
        for thing in (self, self._agent, *(request.handle for request in requests)):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
