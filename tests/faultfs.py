"""A pass-through FUSE file system that misbehaves on command: the server process behind ``faults.FaultyDisk``.

Speaks the kernel's FUSE protocol on ``/dev/fuse`` directly, so it needs root, a kernel with FUSE and nothing else.
One thread serves both the kernel and the control socket: a rule that was acknowledged holds for every later request.

Invariants
----------
* This process is the only holder of its ``/dev/fuse`` descriptor. When it ends, in whatever way, the kernel fails
  every request in flight: nobody stays hung.
* It never touches its own mount while the connection is alive.
* It ends with the process that started it, and never holds a request of a process that is being killed.
"""

import ctypes
import errno
import fnmatch
import heapq
import itertools
import json
import os
import resource
import selectors
import socket
import stat
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_IO = 1 << 20
TICK_S = 0.1
JOURNAL_LENGTH = 1 << 16
MNT_DETACH = 2
MS_NOSUID_NODEV = 2 | 4
PF_EXITING = 0x4
SIGKILL_PENDING = 1 << 8

INIT, INTERRUPT, FORGET, BATCH_FORGET = 26, 36, 2, 42
# ASYNC_READ, ATOMIC_O_TRUNC, BIG_WRITES, ASYNC_DIO, PARALLEL_DIROPS, MAX_PAGES. No lock flags: the kernel keeps the
# locks. No WRITEBACK_CACHE: a write() reaches this process before it returns.
INIT_FLAGS = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 15 | 1 << 18 | 1 << 22

IN_HEADER = struct.Struct("<IIQQIIII")  # length, opcode, unique, node, uid, gid, pid, padding
OUT_HEADER = struct.Struct("<IiQ")  # length, -errno, unique
ATTR = struct.Struct("<6Q10I")
SETATTR_IN = struct.Struct("<II6Q8I")
IO_IN = struct.Struct("<QQIIQII")  # handle, offset, size, io flags, lock owner, open flags, padding
FALLOCATE_IN = struct.Struct("<QQQII")  # handle, offset, length, mode, padding
DIRENT = struct.Struct("<QQII")

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

Reply = bytes | None


@dataclass
class Request:
    """One request of the kernel, with what rules look at already read out of it."""

    unique: int
    opcode: int
    op: str
    node: int
    pid: int
    body: bytes
    paths: tuple[str, ...] = ()
    offset: int = 0
    length: int = 0
    flags: int = 0

    def unpack(self, layout: str) -> tuple[int, ...]:
        """Read the fixed part of the body."""
        return struct.unpack_from("<" + layout, self.body)

    def names(self, skip: int) -> list[str]:
        """Read the NUL-terminated names that follow `skip` bytes of fixed part."""
        return [os.fsdecode(name) for name in self.body[skip:].split(b"\0")[:-1]]


@dataclass
class Rule:
    """What to do to which requests. `skip` matches pass first; after `count` more the rule is spent."""

    action: str
    op: str
    value: float = 0
    match: str = "*"
    offset: int = 0
    length: int | None = None
    count: int | None = None
    skip: int = 0
    direct: bool | None = None

    def applies(self, request: Request) -> bool:
        """Whether the rule strikes this request; counts it if so."""
        if self.count == 0 or not self._matches(request):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.count is not None:
            self.count -= 1
        return True

    def _matches(self, request: Request) -> bool:
        if self.op != request.op or not any(self._names(path) for path in request.paths):
            return False
        if self.direct is not None and self.direct != bool(request.flags & os.O_DIRECT):
            return False
        end = float("inf") if self.length is None else self.offset + self.length
        return request.offset < end and self.offset < request.offset + max(request.length, 1)

    def _names(self, path: str) -> bool:
        return fnmatch.fnmatchcase(path, self.match) or fnmatch.fnmatchcase(
            path.rpartition("/")[2], self.match
        )


class Nodes:
    """The kernel's node numbers and the backing inodes behind them, each held by an O_PATH descriptor.

    Descriptors, not paths, so that renamed and unlinked files stay what they are.
    """

    ROOT = 1

    def __init__(self, backing: str) -> None:
        self._backing = backing
        self._fds = {self.ROOT: os.open(backing, os.O_PATH | os.O_DIRECTORY)}
        self._lookups = {self.ROOT: 1}
        self._numbers: dict[tuple[int, int], int] = {}
        self._counter = itertools.count(self.ROOT + 1)

    def fd(self, node: int) -> int:
        """The O_PATH descriptor: good for *at calls and fstat."""
        return self._fds[node]

    def link(self, node: int) -> str:
        """A path that opens the inode itself, whatever it is called now."""
        return f"/proc/self/fd/{self._fds[node]}"

    def path(self, node: int) -> str:
        """The inode's present (or last) path below the root."""
        now = str(Path(self.link(node)).readlink())
        return os.path.relpath(now.removesuffix(" (deleted)"), self._backing)

    def lookup(self, parent: int, name: str) -> bytes:
        """Number the inode called `name`, and answer with a fuse_entry_out."""
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self._fds[parent])
        found = os.fstat(fd)
        number = self._numbers.get((found.st_dev, found.st_ino))
        if number is None:
            number = self._numbers[found.st_dev, found.st_ino] = next(self._counter)
            self._fds[number], self._lookups[number] = fd, 0
        else:
            os.close(fd)
        self._lookups[number] += 1
        return struct.pack("<4Q2I", number, 0, 0, 0, 0, 0) + attributes(found)

    def forget(self, node: int, lookups: int) -> None:
        """Drop references the kernel no longer holds."""
        self._lookups[node] -= lookups
        if self._lookups[node] > 0 or node == self.ROOT:
            return
        fd = self._fds.pop(node)
        found = os.fstat(fd)
        del self._numbers[found.st_dev, found.st_ino], self._lookups[node]
        os.close(fd)


class Operations:
    """The pass-through itself: what each request does to the backing directory when no rule strikes."""

    def __init__(self, backing: str) -> None:
        self.nodes = Nodes(backing)
        self._listings: dict[int, list[tuple[str, int, int]]] = {}
        self._counter = itertools.count(1)

    def describe(self, request: Request) -> None:
        """Fill in what rules look at."""
        if request.op in ("read", "write"):
            _, request.offset, request.length, _, _, request.flags, _ = IO_IN.unpack_from(
                request.body
            )
        elif request.op == "fallocate":
            _, request.offset, request.length, _, _ = FALLOCATE_IN.unpack_from(request.body)
        elif request.op == "setattr" and request.unpack("I")[0] & 8:
            request.op = "truncate"
        elif request.op in ("open", "create"):
            request.flags = request.unpack("I")[0]
        request.paths = tuple(self._paths(request))

    def _paths(self, request: Request) -> Iterator[str]:
        if request.opcode not in NAMED:
            yield self.nodes.path(request.node)
            return
        parents = [request.node, request.node]
        if request.op == "rename":
            parents[1] = request.unpack("Q")[0]
        names = request.names(NAMED[request.opcode])[: 2 if request.op == "rename" else 1]
        for parent, name in zip(parents, names, strict=False):
            yield os.path.normpath(f"{self.nodes.path(parent)}/{name}")

    def lookup(self, request: Request) -> Reply:
        return self.nodes.lookup(request.node, request.names(0)[0])

    def getattr(self, request: Request) -> Reply:
        return self._attributes(request.node)

    def setattr(self, request: Request) -> Reply:
        valid, _, handle, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = (
            SETATTR_IN.unpack_from(request.body)
        )
        link = self.nodes.link(request.node)
        if valid & 1:
            Path(link).chmod(stat.S_IMODE(mode))
        if valid & 6:
            os.chown(link, uid if valid & 2 else -1, gid if valid & 4 else -1)
        if valid & 8:
            os.truncate(handle if valid & 64 else link, size)
        if valid & 48:
            now, old = time.time_ns(), os.fstat(self.nodes.fd(request.node))
            wanted = [
                now if valid & now_bit else s * 10**9 + ns if valid & bit else kept
                for bit, now_bit, s, ns, kept in (
                    (16, 128, atime, atime_ns, old.st_atime_ns),
                    (32, 256, mtime, mtime_ns, old.st_mtime_ns),
                )
            ]
            os.utime(link, ns=(wanted[0], wanted[1]))
        return self._attributes(request.node)

    def _attributes(self, node: int) -> bytes:
        return struct.pack("<QII", 0, 0, 0) + attributes(os.fstat(self.nodes.fd(node)))

    def mkdir(self, request: Request) -> Reply:
        name = request.names(8)[0]
        os.mkdir(name, request.unpack("I")[0], dir_fd=self.nodes.fd(request.node))
        return self.nodes.lookup(request.node, name)

    def unlink(self, request: Request) -> Reply:
        os.unlink(request.names(0)[0], dir_fd=self.nodes.fd(request.node))
        return b""

    def rmdir(self, request: Request) -> Reply:
        os.rmdir(request.names(0)[0], dir_fd=self.nodes.fd(request.node))
        return b""

    def rename(self, request: Request) -> Reply:
        return self._rename(request, 0, request.names(8))

    def rename2(self, request: Request) -> Reply:
        return self._rename(request, request.unpack("QI")[1], request.names(16))

    def _rename(self, request: Request, flags: int, names: list[str]) -> Reply:
        source, target = self.nodes.fd(request.node), self.nodes.fd(request.unpack("Q")[0])
        check(libc.renameat2(source, os.fsencode(names[0]), target, os.fsencode(names[1]), flags))
        return b""

    def link(self, request: Request) -> Reply:
        name = request.names(8)[0]
        old = self.nodes.link(request.unpack("Q")[0])
        os.link(old, name, dst_dir_fd=self.nodes.fd(request.node), follow_symlinks=True)
        return self.nodes.lookup(request.node, name)

    def open(self, request: Request) -> Reply:
        handle = os.open(
            self.nodes.link(request.node), backing_flags(request.flags) & ~(os.O_CREAT | os.O_EXCL)
        )
        return struct.pack("<QII", handle, 0, 0)

    def create(self, request: Request) -> Reply:
        name, mode = request.names(16)[0], request.unpack("II")[1]
        flags = backing_flags(request.flags) | os.O_CREAT | os.O_NOFOLLOW
        handle = os.open(name, flags, mode, dir_fd=self.nodes.fd(request.node))
        return self.nodes.lookup(request.node, name) + struct.pack("<QII", handle, 0, 0)

    def read(self, request: Request) -> Reply:
        return os.pread(request.unpack("Q")[0], request.length, request.offset)

    def write(self, request: Request) -> Reply:
        data = memoryview(request.body)[IO_IN.size :][: request.length]
        return struct.pack("<II", os.pwrite(request.unpack("Q")[0], data, request.offset), 0)

    def fallocate(self, request: Request) -> Reply:
        handle, offset, length, mode, _ = FALLOCATE_IN.unpack_from(request.body)
        check(libc.fallocate(handle, mode, offset, length))
        return b""

    def fsync(self, request: Request) -> Reply:
        handle, flags = request.unpack("QI")
        (os.fdatasync if flags & 1 else os.fsync)(handle)
        return b""

    def flush(self, _: Request) -> Reply:
        return b""

    def release(self, request: Request) -> Reply:
        os.close(request.unpack("Q")[0])
        return b""

    def statfs(self, request: Request) -> Reply:
        found = os.fstatvfs(self.nodes.fd(request.node))
        counts = (found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree)
        return struct.pack(
            "<5Q10I", *counts, found.f_bsize, found.f_namemax, found.f_frsize, *[0] * 7
        )

    def opendir(self, _: Request) -> Reply:
        return struct.pack("<QII", next(self._counter), 0, 0)

    def readdir(self, request: Request) -> Reply:
        handle, offset, size = request.unpack("QQI")
        if offset == 0:
            self._listings[handle] = self._list(request.node)
        out = b""
        for position, (name, inode, kind) in enumerate(self._listings[handle][offset:], offset + 1):
            raw = os.fsencode(name)
            entry = DIRENT.pack(inode, position, len(raw), kind) + raw
            entry += bytes(-len(entry) % 8)
            if len(out) + len(entry) > size:
                break
            out += entry
        return out

    def _list(self, node: int) -> list[tuple[str, int, int]]:
        own = os.fstat(self.nodes.fd(node)).st_ino
        listing = [(".", own, stat.S_IFDIR >> 12), ("..", own, stat.S_IFDIR >> 12)]
        with os.scandir(self.nodes.link(node)) as entries:
            for entry in entries:
                mode = entry.stat(follow_symlinks=False).st_mode
                listing.append((entry.name, entry.inode(), stat.S_IFMT(mode) >> 12))
        return listing

    def releasedir(self, request: Request) -> Reply:
        self._listings.pop(request.unpack("Q")[0], None)
        return b""

    def fsyncdir(self, request: Request) -> Reply:
        handle = os.open(self.nodes.link(request.node), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        return b""

    def forget(self, request: Request) -> Reply:
        self.nodes.forget(request.node, request.unpack("Q")[0])
        return None

    def batch_forget(self, request: Request) -> Reply:
        for index in range(request.unpack("I")[0]):
            self.nodes.forget(*struct.unpack_from("<QQ", request.body, 8 + 16 * index))
        return None


Handler = Callable[[Operations, Request], Reply]
OPERATIONS: dict[int, tuple[str, Handler]] = {
    1: ("lookup", Operations.lookup),
    FORGET: ("forget", Operations.forget),
    3: ("getattr", Operations.getattr),
    4: ("setattr", Operations.setattr),
    9: ("mkdir", Operations.mkdir),
    10: ("unlink", Operations.unlink),
    11: ("rmdir", Operations.rmdir),
    12: ("rename", Operations.rename),
    13: ("link", Operations.link),
    14: ("open", Operations.open),
    15: ("read", Operations.read),
    16: ("write", Operations.write),
    17: ("statfs", Operations.statfs),
    18: ("release", Operations.release),
    20: ("fsync", Operations.fsync),
    25: ("flush", Operations.flush),
    27: ("opendir", Operations.opendir),
    28: ("readdir", Operations.readdir),
    29: ("releasedir", Operations.releasedir),
    30: ("fsyncdir", Operations.fsyncdir),
    35: ("create", Operations.create),
    BATCH_FORGET: ("batch_forget", Operations.batch_forget),
    43: ("fallocate", Operations.fallocate),
    45: ("rename", Operations.rename2),
}
# Requests that carry a name below their node, and the bytes before it.
NAMED = {1: 0, 9: 8, 10: 0, 11: 0, 12: 8, 13: 8, 35: 16, 45: 16}
# Not worth a journal line: the kernel asks these when it likes.
UNRECORDED = frozenset({"lookup", "getattr", "statfs", "forget", "batch_forget"})


class Server:
    """The loop: kernel requests through the rules, control commands, held and delayed requests."""

    def __init__(self, fuse: int, control: socket.socket, backing: str) -> None:
        self._fuse = fuse
        self._control = control
        self._commands = control.makefile("rb")
        self._owner = os.getppid()
        self._operations = Operations(backing)
        self._buffer = bytearray(MAX_IO + (1 << 16))
        self._rules: list[Rule] = []
        self._held: list[tuple[int, Request]] = []
        self._delayed: list[tuple[float, int, Request]] = []
        self._journal: deque[tuple[str, str, int, int]] = deque(maxlen=JOURNAL_LENGTH)

    def run(self) -> None:
        """Serve until told to stop, unmounted, or the owner is gone."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._fuse, selectors.EVENT_READ, self._receive)
            selector.register(self._control, selectors.EVENT_READ, self._obey)
            while not dying(self._owner):
                for key, _ in selector.select(self._timeout()):
                    if not key.data():
                        return
                self._perform_due()
                self._free_the_dying()

    def _timeout(self) -> float:
        if not self._delayed:
            return TICK_S
        return min(TICK_S, max(0.0, self._delayed[0][0] - time.monotonic()))

    def _receive(self) -> bool:
        """Take one request from the kernel; False when the file system is unmounted."""
        try:
            size = os.readv(self._fuse, [self._buffer])
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.ENOENT, errno.EINTR)
        _, opcode, unique, node, _, _, pid, _ = IN_HEADER.unpack_from(self._buffer)
        body = bytes(memoryview(self._buffer)[IN_HEADER.size : size])
        if opcode == INIT:
            self._reply(unique, 0, init_reply(body))
        elif opcode in OPERATIONS:
            self._admit(Request(unique, opcode, OPERATIONS[opcode][0], node, pid, body))
        elif opcode != INTERRUPT:
            self._reply(unique, errno.ENOSYS)
        return True

    def _admit(self, request: Request) -> None:
        """Let the first rule that applies decide, the oldest first."""
        if request.opcode in (FORGET, BATCH_FORGET):
            self._perform(request)
            return
        self._operations.describe(request)
        if request.op not in UNRECORDED:
            self._journal.append((request.op, request.paths[-1], request.offset, request.length))
        rule = next((rule for rule in self._rules if rule.applies(request)), None)
        if rule is None:
            self._perform(request)
        elif rule.action == "fail":
            self._reply(request.unique, int(rule.value))
        elif rule.action == "hang":
            self._held.append((process_of(request.pid), request))
        elif rule.action == "delay":
            heapq.heappush(self._delayed, (time.monotonic() + rule.value, request.unique, request))
        elif rule.action == "short":
            request.length = min(request.length, int(rule.value))
            self._perform(request)
        elif rule.action == "drop":
            self._reply(request.unique, 0, struct.pack("<II", request.length, 0))

    def _perform(self, request: Request) -> None:
        try:
            reply = OPERATIONS[request.opcode][1](self._operations, request)
        except OSError as error:
            self._reply(request.unique, error.errno or errno.EIO)
        else:
            if reply is not None:
                self._reply(request.unique, 0, reply)

    def _reply(self, unique: int, error: int, payload: bytes = b"") -> None:
        header = OUT_HEADER.pack(OUT_HEADER.size + len(payload), -error, unique)
        try:
            os.writev(self._fuse, [header, payload])
        except OSError as gone:
            if gone.errno not in (errno.ENOENT, errno.ENODEV):  # interrupted or unmounted meanwhile
                raise

    def _perform_due(self) -> None:
        while self._delayed and self._delayed[0][0] <= time.monotonic():
            self._perform(heapq.heappop(self._delayed)[2])

    def _free_the_dying(self) -> None:
        """A killed process can't end before its requests do."""
        for entry in [entry for entry in self._held if dying(entry[0])]:
            self._held.remove(entry)
            self._reply(entry[1].unique, errno.EINTR)

    def _obey(self) -> bool:
        """Carry out one command of the test; False when it has hung up."""
        line = self._commands.readline()
        if not line:
            return False
        command = json.loads(line)
        answer = getattr(self, f"_do_{command.pop('do')}")(**command)
        self._control.sendall(json.dumps(answer).encode() + b"\n")
        return True

    def _do_rule(self, **rule: Any) -> None:
        self._rules.append(Rule(**rule))

    def _do_waiting(self) -> int:
        return len(self._held)

    def _do_journal(self) -> list[tuple[str, str, int, int]]:
        return list(self._journal)

    def _do_release(self, error: int) -> None:
        self._rules = [rule for rule in self._rules if rule.action != "hang"]
        held, self._held = self._held, []
        for _, request in held:
            if error:
                self._reply(request.unique, error)
            else:
                self._perform(request)

    def _do_clear(self) -> None:
        self._rules.clear()
        self._do_release(0)
        while self._delayed:
            self._perform(heapq.heappop(self._delayed)[2])


def attributes(found: os.stat_result) -> bytes:
    """A stat result as a fuse_attr."""
    times = [found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns]
    seconds, rest = [ns // 10**9 for ns in times], [ns % 10**9 for ns in times]
    links = 0 if sys.argv[4:] == ["no links"] else found.st_nlink
    owner = (found.st_mode, links, found.st_uid, found.st_gid, found.st_rdev)
    return ATTR.pack(
        found.st_ino, found.st_size, found.st_blocks, *seconds, *rest, *owner, found.st_blksize, 0
    )


def init_reply(body: bytes) -> bytes:
    """A fuse_init_out: no bound on requests in the background, or held ones would keep the others from us."""
    readahead, offered = struct.unpack_from("<8xII", body)
    flags = offered & INIT_FLAGS
    return struct.pack(
        "<IIIIHHIIHH8I",
        7,
        31,
        readahead,
        flags,
        65535,
        65535,
        MAX_IO,
        1,
        MAX_IO // 4096,
        0,
        *[0] * 8,
    )


def backing_flags(flags: int) -> int:
    """Open flags for the backing file: our buffers are not aligned, and the kernel has resolved O_APPEND."""
    return flags & ~(os.O_DIRECT | os.O_APPEND | os.O_NOFOLLOW)


def check(result: int) -> None:
    """Raise what a C call left in errno."""
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def process_of(thread: int) -> int:
    """The process a thread belongs to; 0 where the thread has ended already, which async I/O outlives."""
    try:
        status = Path(f"/proc/{thread}/status").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("Tgid:"))


def dying(pid: int) -> bool:
    """Whether a process is gone, exiting, or about to. Process 0, the kernel or an unknown one, never is."""
    if pid == 0:
        return False
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return True
    return bool(int(fields[6]) & PF_EXITING or int(fields[28]) & SIGKILL_PENDING)


def mount(root: str) -> int:
    """Mount at `root`; the returned descriptor is the connection."""
    if not Path("/dev/fuse").exists():
        os.mknod("/dev/fuse", 0o600 | stat.S_IFCHR, os.makedev(10, 229))
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    check(
        libc.mount(
            b"faultfs", os.fsencode(root), b"fuse.faultfs", MS_NOSUID_NODEV, options.encode()
        )
    )
    return fuse


def main(root: str, backing: str, control_fd: str) -> None:
    """Mount, say so, serve; end the connection before the mount, so that nothing can wait for us."""
    control = socket.socket(fileno=int(control_fd))
    os.umask(0)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        fuse = mount(root)
    except OSError as error:
        control.sendall(json.dumps({"error": str(error)}).encode() + b"\n")
        return
    control.sendall(b"{}\n")
    try:
        Server(fuse, control, backing).run()
    finally:
        os.close(fuse)
        libc.umount2(os.fsencode(root), MNT_DETACH)


if __name__ == "__main__":
    main(*sys.argv[1:4])
