"""One NIXL agent: its backends, what is registered with it, and requests under way.

For files and GPU memory; ``objects`` calls NIXL for buckets. All methods of an agent run on the
thread that made it. A request is never released before it has ended: NIXL would free memory that
storage still writes to.

It calls the C interface that lies in NIXL's wheels, and that its Rust bindings are made of. The
Python bindings give up the interpreter lock in nearly every call, and while the event loop runs
Python each time costs milliseconds to get it back. Here it is given up where a call may take long,
and only there.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools
import itertools
import os
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvgds import contention, environment
from kvgds.errors import PathUnavailable
from kvgds.memory import Span
from kvgds.memory.cufile import CufileError, cufile
from kvgds.memory.device import cuda
from kvgds.transport.contract import File

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvgds.transport.contract import Memory

    Descriptors = list[tuple[int, int, int]]
    """(address, bytes, device) in memory; (offset, bytes, descriptor) in a file."""

POOL_ROWS = 65536
"""I/Os that an agent may have in flight: the most that NIXL takes. What is posted beyond fails, but
some of it has begun then, and goes on in memory that is taken to be free."""

_LIBRARY = "libnixl_capi.so"
_LEVEL = "NIXL_LOG_LEVEL"
_FILE_BYTES = 1 << 46  # only a bound on offsets
# The plugins for host memory do nothing with it, so one note does for all. NIXL looks no further
# than the range that begins last before an address: with one for each region, those that overlap,
# or whose memory is gone, would hide others.
ALL_MEMORY = (1 << 12, (1 << 56) - (1 << 12), 0)
_LEAST_PIECE = 16 << 20  # of GPU memory; what cuFile moves at a time
GPU_PLUGIN, _GPU_SETTINGS = "GDS_MT", {"thread_count": "8"}
_DRAM, _VRAM, _FILE = 0, 1, 4
_READ, _WRITE = 0, 1
_STRICT = 1
_STATUS = {
    -1: "invalid parameter",
    -2: "backend error",
    -3: "invalid state",
    -4: "exception",
    -5: "no telemetry",
    -6: "not supported",
}


class NixlError(Exception):
    """NIXL refused or failed a call; it says no more than its status."""

    def __init__(self, call: str, status: int) -> None:
        super().__init__(f"{call}: {_STATUS.get(status, status)}")


class _Config(ctypes.Structure):
    _fields_ = (
        ("progress_thread", ctypes.c_bool),
        ("listen_thread", ctypes.c_bool),
        ("listen_port", ctypes.c_int),
        ("sync", ctypes.c_int),
        ("workers", ctypes.c_uint),
        ("progress_delay_us", ctypes.c_uint64),
        ("listen_delay_us", ctypes.c_uint64),
        ("telemetry", ctypes.c_bool),
    )


class _Nixl:
    """NIXL's C interface. Calls of ``held`` keep the interpreter lock, those of ``free`` don't."""

    def __init__(self, path: str) -> None:
        self.free = ctypes.CDLL(path)
        self.held = ctypes.PyDLL(path)
        if self.held.nixl_capi_is_stub():
            raise OSError(f"{path} is a stub")
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
        for library in (self.free, self.held):
            library.nixl_capi_xfer_dlist_add_desc.argtypes = (pointer, size, size, number)
            library.nixl_capi_reg_dlist_add_desc.argtypes = (
                pointer, size, size, number, pointer, size,
            )  # fmt: skip

    def call(self, name: str, *arguments: Any) -> None:  # noqa: ANN401 - ctypes converts
        """Call something that may take long."""
        _check(name, getattr(self.free, f"nixl_capi_{name}")(*arguments))

    def make(self, what: str, *arguments: Any) -> ctypes.c_void_p:  # noqa: ANN401 - see call
        """Call something that gives a handle."""
        handle = ctypes.c_void_p()
        self.call(f"create_{what}", *arguments, ctypes.byref(handle))
        return handle


def _check(name: str, status: int) -> None:
    if status:
        raise NixlError(name, status)


@functools.cache
def nixl() -> _Nixl:
    """NIXL, loaded once; it reads NIXL_LOG_LEVEL then, and is silent unless that asks for more.

    Raises:
        PathUnavailable: it is not installed, or can't be loaded.
    """
    report = []
    with environment.changed({_LEVEL: os.environ.get(_LEVEL, "FATAL")}):
        for path in _candidates():
            try:
                return _Nixl(path)
            except OSError as error:
                report.append(str(error))
    raise PathUnavailable("NIXL can't be loaded; pip install 'nixl-cu12>=1.5.1'", tuple(report))


def _candidates() -> Iterator[str]:
    """Where its library may be: in the wheels, or where the system's loader looks.

    The build for the CUDA runtime of this process comes first: its plugins need just that one.
    """
    names = ["nixl_cu12", "nixl_cu13"]
    with contextlib.suppress(PathUnavailable):
        names.sort(key=f"nixl_cu{cuda().version}".__ne__)
    for name in names:
        spec = find_spec(name)
        if spec is not None and spec.origin is not None:
            libraries = Path(spec.origin).parent.parent / f".{name}.mesonpy.libs"
            yield os.fspath(libraries / _LIBRARY)
    yield _LIBRARY


def new_agent(name: bytes) -> ctypes.c_void_p:
    """An agent without a backend, safe for several threads. Raises PathUnavailable."""
    config = _Config(sync=_STRICT, workers=1, listen_delay_us=100_000)
    try:
        return nixl().make("configured_agent", name, ctypes.byref(config))
    except NixlError as error:  # it looks for its settings there, and can't start if it may not
        text = "NIXL can't make an agent; let HOME name a folder that this user may read"
        raise PathUnavailable(text, (str(error),)) from None


def new_backend(agent: ctypes.c_void_p, plugin: str, settings: dict[str, str]) -> ctypes.c_void_p:
    """Make a backend; the options that name it in a call. Raises NixlError."""
    library = nixl()
    parameters = library.make("params")
    for key, value in settings.items():
        library.call("params_add", parameters, key.encode(), value.encode())
    try:
        backend = library.make("backend", agent, plugin.encode(), parameters)
    finally:
        library.call("destroy_params", parameters)
    options = library.make("opt_args")
    library.call("opt_args_add_backend", options, backend)
    return options


def tell(
    agent: ctypes.c_void_p,
    options: ctypes.c_void_p,
    kind: int,
    entries: Descriptors,
    key: bytes | None = None,
) -> ctypes.c_void_p:
    """Register memory, files, or an object by its key. The list by which ``untell`` undoes that."""
    library = nixl()
    listed = library.make("reg_dlist", kind)
    for entry in entries:
        library.call("reg_dlist_add_desc", listed, *entry, key, len(key or b""))
    try:
        library.call("register_mem", agent, listed, options)
    except NixlError:
        library.call("destroy_reg_dlist", listed)
        raise
    return listed


def untell(agent: ctypes.c_void_p, options: ctypes.c_void_p, listed: ctypes.c_void_p) -> None:
    """Take back what an agent was told."""
    nixl().call("deregister_mem", agent, listed, options)
    nixl().call("destroy_reg_dlist", listed)


_claims: dict[Span, Agent] = {}  # who has told cuFile of memory: it is told once in a process
_claiming = threading.Lock()


def _claim(memory: Memory, agent: Agent) -> None:
    with _claiming:
        others = [span for span, owner in _claims.items() if owner is not agent]
        if any(_meets(span, others) for span in memory.spans):
            text = "another engine of this process has this GPU memory; let one have it at a time"
            raise NixlError(f"register_mem: {text}", -3)
        _claims.update(dict.fromkeys(memory.spans, agent))


def _meets(span: Span, others: Sequence[Span]) -> bool:
    """Whether a range shares a byte with one of several."""
    start, stop = span.address, span.address + span.nbytes
    return any(address < stop and start < address + nbytes for address, nbytes in others)


def _disclaim(memory: Memory, agent: Agent) -> None:
    with _claiming:
        for span in memory.spans:
            if _claims.get(span) is agent:
                del _claims[span]


def _pieces(spans: Sequence[Span]) -> list[Span]:
    """The largest pieces that cuFile takes of the longest of them; the spans, if none is smaller.

    Cut where all the GPU's pages end, so that no two pieces need one. What cuFile refuses although
    it would take the longest alone is too much together; then pieces are no help.
    """
    longest = max(spans, key=lambda span: span.nbytes)
    most = 1 << longest.nbytes.bit_length()
    alone = cufile().takes(longest)
    while most > _LEAST_PIECE and not alone:
        most //= 2
        if cufile().takes(Span(longest.address, min(most, longest.nbytes))):
            return [piece for span in spans for piece in _cut(span, most)]
    return list(spans)


def _cut(span: Span, nbytes: int) -> Iterator[Span]:
    """Pieces that end at multiples of so many bytes."""
    address, end = span.address, span.address + span.nbytes
    while address < end:
        stop = min(end, (address // nbytes + 1) * nbytes)
        yield Span(address, stop - address)
        address = stop


def _split(
    local: Descriptors, remote: Descriptors, cuts: Sequence[int]
) -> tuple[Descriptors, Descriptors]:
    """The same, with no part of it across a cut in memory."""
    here: Descriptors = []
    there: Descriptors = []
    for (address, nbytes, device), (offset, _, fd) in zip(local, remote, strict=True):
        inner = cuts[
            bisect.bisect_right(cuts, address) : bisect.bisect_left(cuts, address + nbytes)
        ]
        for start, stop in itertools.pairwise([address, *inner, address + nbytes]):
            here.append((start, stop - start, device))
            there.append((offset + start - address, stop - start, fd))
    return here, there


_making_ring = threading.Lock()


def _rings() -> set[int]:
    """Descriptors of this process's io_uring rings."""
    found = set()
    try:
        names = os.listdir("/proc/self/fd")
    except OSError as error:
        advice = "mount /proc, or raise the limit on open files (ulimit -n)"
        raise PathUnavailable(f"NIXL's queue can't be found; {advice}", (str(error),)) from None
    for name in names:
        with contextlib.suppress(OSError):
            if "io_uring" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(int(name))
    return found


class Request:
    """What NIXL was asked to move: host memory, or one GPU's, to or from files."""

    __slots__ = ("direct", "done", "error", "handle")

    def __init__(self, *, direct: bool) -> None:
        self.handle = ctypes.c_void_p()
        self.direct = direct
        self.done = False
        self.error: Exception | None = None


class _Lists:
    """The descriptor lists of one kind of memory and of files, used again for each request."""

    def __init__(self, library: _Nixl, kind: int, options: ctypes.c_void_p) -> None:
        self.local = library.make("xfer_dlist", kind)
        self.remote = library.make("xfer_dlist", _FILE)
        self.options = options


class Agent:
    """A NIXL agent with its POSIX plugin, and one for GPU memory if that is added.

    Attributes:
        backend: the plugin for host memory and its queue, for example ``"POSIX/uring"``.
        ring: a descriptor that is readable while completions lie in its queue; None: there is none.

    Raises:
        PathUnavailable: NIXL or a plugin can't be used here.
    """

    def __init__(self, name: str, queues: Sequence[str]) -> None:
        self._name = name.encode()
        self._nixl = nixl()
        self.ring: int | None = None
        self._numbers: dict[int, ctypes.c_void_p] = {}  # of files, told to the POSIX plugin
        self._far: dict[Memory | File, ctypes.c_void_p] = {}  # told to the one for GPU memory
        self._cuts: dict[Memory, list[int]] = {}  # where GPU memory was cut to be registered
        self._agent, posix, self.backend = self._make(queues)
        self._posix = _Lists(self._nixl, _DRAM, posix)
        self._gpu: _Lists | None = None
        self._memory = self._tell(self._posix, _DRAM, [ALL_MEMORY])

    def _make(self, queues: Sequence[str]) -> tuple[ctypes.c_void_p, ctypes.c_void_p, str]:
        report = []
        for kind in queues:
            agent = new_agent(self._name)
            settings = {f"use_{kind}": "true", "ios_pool_size": str(POOL_ROWS)}
            try:
                with _making_ring:
                    before = _rings()
                    options = new_backend(agent, "POSIX", settings)
                    made = _rings() - before
            except (NixlError, PathUnavailable) as error:
                self._nixl.call("destroy_agent", agent)
                if isinstance(error, PathUnavailable):
                    raise
                report.append(f"POSIX/{kind}: {error}")
                continue
            self.ring = made.pop() if len(made) == 1 else None
            return agent, options, f"POSIX/{kind}"
        raise PathUnavailable("NIXL's POSIX plugin can't be used here", tuple(report))

    def add_gpu(self) -> None:
        """Add the plugin for GPU memory. Blocks as long as its driver takes to open.

        Raises:
            PathUnavailable: it can't be used here.
        """
        try:
            options = new_backend(self._agent, GPU_PLUGIN, _GPU_SETTINGS)
        except NixlError as error:
            text = f"NIXL's {GPU_PLUGIN} plugin can't be used here"
            raise PathUnavailable(text, (str(error),)) from None
        self._gpu = _Lists(self._nixl, _VRAM, options)

    def register(self, thing: Memory | File, *, far: bool) -> None:
        """Tell NIXL's plugin for host memory (``far``: for GPU memory) of GPU memory or a file.

        That for host memory keeps a file's number alone, and uses whatever has the number until a
        transfer has ended. So it is told of each number once: to tell it of files that come and go
        takes more calls than to move them.

        Raises:
            NixlError: it won't have it. CufileError: NIXL took it, but cuFile has refused it.
        """
        if not far:
            if isinstance(thing, File) and thing.fd not in self._numbers:
                self._numbers[thing.fd] = self._tell(
                    self._posix, _FILE, [(0, _FILE_BYTES, thing.fd)]
                )
        elif thing in self._far:
            return
        elif isinstance(thing, File):
            self._far[thing] = self._tell(self._gpu, _FILE, [(0, _FILE_BYTES, thing.fd)])
            thing.attached = True
        else:
            self._register_gpu(thing)

    def _tell(self, lists: _Lists | None, kind: int, entries: Descriptors) -> ctypes.c_void_p:
        """The list by which ``_untell`` takes it back."""
        if lists is None:
            raise NixlError("register_mem: no backend for GPU memory", -6)
        return tell(self._agent, lists.options, kind, entries)

    def _untell(self, lists: _Lists | None, listed: ctypes.c_void_p) -> None:
        if lists is not None:  # or nothing could be told
            untell(self._agent, lists.options, listed)

    def _register_gpu(self, memory: Memory) -> None:
        """Whole if cuFile takes it so, else in pieces."""
        _claim(memory, self)
        spans = memory.spans
        try:
            try:
                self._insist(memory, spans)
            except CufileError:
                self.forget(memory)
                pieces = _pieces(spans)
                if len(pieces) == len(spans):
                    raise
                _claim(memory, self)
                self._insist(memory, pieces)
                starts = {span.address for span in spans}
                self._cuts[memory] = [each.address for each in pieces if each.address not in starts]
        except (NixlError, CufileError):
            self.forget(memory)
            raise

    def _insist(self, memory: Memory, pieces: Sequence[Span]) -> None:
        """NIXL goes on when cuFile refuses memory, and its transfers then take another path."""
        device = memory.device or 0
        entries = [(*piece, device) for piece in pieces]
        self._far[memory] = self._tell(self._gpu, _VRAM, entries)
        for piece in pieces:
            cufile().registered(piece)

    def forget(self, thing: Memory | File) -> None:
        """Take back what the plugin for GPU memory was told of it, if it ever was."""
        listed = self._far.pop(thing, None)
        if listed is not None:
            self._untell(self._gpu, listed)
            if isinstance(thing, File):
                thing.attached = False
        if not isinstance(thing, File):
            self._cuts.pop(thing, None)
            _disclaim(thing, self)  # last: until then cuFile knows of it

    def post(
        self,
        local: Descriptors,
        remote: Descriptors,
        *,
        write: bool,
        far: bool,
        direct: bool = False,
    ) -> Request:
        """Start moving between memory (``far``: a GPU's) and files, pair by pair.

        ``direct``: all of those are open with O_DIRECT.
        """
        lists = self._gpu if far else self._posix
        if far and self._cuts:
            local, remote = _split(local, remote, sorted(itertools.chain(*self._cuts.values())))
        request = Request(direct=direct and not far)
        held = self._nixl.held
        try:
            if lists is None:
                raise NixlError("no backend for GPU memory", -6)
            for listed, rows in ((lists.local, local), (lists.remote, remote)):
                held.nixl_capi_xfer_dlist_clear(listed)
                for row in rows:
                    held.nixl_capi_xfer_dlist_add_desc(listed, *row)
            _check(
                "create_xfer_req",
                held.nixl_capi_create_xfer_req(
                    self._agent,
                    _WRITE if write else _READ,
                    lists.local,
                    lists.remote,
                    self._name,
                    ctypes.byref(request.handle),
                    lists.options,
                ),
            )
            self._ask(request, "post_xfer_req", self._agent, request.handle, None)
            if request.error is not None:  # some of it may have begun: never let go of it
                request.handle = ctypes.c_void_p()
        except NixlError as error:
            request.done, request.error = True, error
        return request

    def check(self, request: Request) -> bool:
        """Whether a request has ended, well or not. Lets the POSIX plugin work, too."""
        if not request.done:
            self._ask(request, "get_xfer_status", self._agent, request.handle)
        return request.done

    def _ask(self, request: Request, name: str, *arguments: ctypes.c_void_p | None) -> None:
        """Make one of the calls in which requests go on, and note whether this one has ended.

        Storage without a page cache takes and gives back requests in no time, so that a call that
        took long has waited for the lock; it is not given up then.
        """
        quick = request.direct and self.ring is not None
        held = quick and contention.busy()
        library, started = self._nixl.held if held else self._nixl.free, time.monotonic()
        status = getattr(library, f"nixl_capi_{name}")(*arguments)
        if quick and not held:
            contention.waited(time.monotonic() - started)
        if status <= 0:  # else it is under way
            request.done = True
            request.error = NixlError(name, status) if status else None

    def release(self, request: Request) -> None:
        """Let go of a request that has ended."""
        if request.handle:
            self._nixl.held.nixl_capi_release_xfer_req(self._agent, request.handle)
            self._nixl.held.nixl_capi_destroy_xfer_req(request.handle)

    def close(self) -> None:
        """Forget everything; nothing is under way."""
        for thing in list(self._far):
            self.forget(thing)
        for listed in (self._memory, *self._numbers.values()):
            self._untell(self._posix, listed)
        self._nixl.call("destroy_agent", self._agent)
