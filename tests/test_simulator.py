"""The simulated GPU does what a GPU would, and NIXL's real GDS plugins run on it.

Nothing of it is loaded here: this process may have a real GPU. The checks of tests/simulator run in
processes of their own, many in each.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from simulator import build, environment

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKS = Path(__file__).parent / "simulator"
# Those of dozens of engines, each with a trial in a process of its own, take a minute together.
PARTS = {"checks_direct": 3, "checks_gather": 3, "checks_gpu": 3}

# Opens an engine with the settings given as JSON, and prints how GPU memory moves, or why not.
PLAN = """
import asyncio, json, os, sys, tempfile
import kvgds
async def main():
    settings = json.loads(sys.argv[1])
    tier = kvgds.FileTier(root=tempfile.mkdtemp() + "/kv", capacity_bytes=1 << 24,
                          verify=settings.pop("verify", "stamp"))
    config = kvgds.EngineConfig(namespace=kvgds.Namespace(model="m"), tiers=(tier,),
                                bounce_bytes=1 << 20, **settings)
    try:
        async with kvgds.open_engine(config) as engine:
            for plan in engine.plan[1:]:
                print(plan.path, plan.backend, *plan.evidence, *plan.refused, sep="; ")
            print("cufile" in open("/proc/self/maps").read())
        left = [name for name in os.listdir(tier.root) if name.startswith(".")]
        assert not left, left
    except kvgds.KvgdsError as error:
        print(type(error).__name__, str(error).replace("\\n", "; "))
asyncio.run(main())
"""

# Prints what cuFileDriverOpen answers, and who it says it is.
OPEN = """
import ctypes
from simulator import Simulator
class Status(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int), ("cuda", ctypes.c_int)]
cufile = Simulator().cufile
cufile.cuFileDriverOpen.restype = Status
code = cufile.cuFileDriverOpen().code
properties = (ctypes.c_uint * 14)()
cufile.cuFileDriverGetProperties(properties)
print(code, properties[0] > 0, *(bit for bit in range(32) if properties[6] >> bit & 1))
"""
COUNT = """
import ctypes
from simulator import Simulator
number = ctypes.c_int(7)
print(Simulator().cudart.cudaGetDeviceCount(ctypes.byref(number)), number.value)
"""

# Copies scattered pages out of a GPU in reverse order, twice; prints by which calls, and if right.
COPY = """
import time
from kvgds.memory import Arena
from kvgds.memory.device import cuda
from simulator import Simulator
arena, gpu, runtime = Arena(64 << 12), Simulator(), cuda()
runtime.pin(0, arena.span)
vram, data = gpu.allocate(64 << 12), bytes(n % 251 for n in range(64 << 12))
vram.write(data)
for _ in range(2):
    arena.bytes[:] = bytes(64 << 12)
    ends = [((63 - i) << 12, i << 12) for i in range(64)]
    copies = [(arena.span.address + to, vram.address + at, 1 << 12) for to, at in ends]
    copying = runtime.copy(0, copies)
    while not copying.done:
        time.sleep(0)
    pages = [data[i << 12 : (i + 1) << 12] for i in range(64)]
    assert arena.bytes == b"".join(reversed(pages))
print(gpu.counter("copy_batches"), gpu.counter("async_copies"))
"""

SLOW: dict[str, Any] = {"read": "delay:400", "write": "delay:400"}  # so gathering is quicker

# Prints whether a stream can be had, when the first can't be made.
STREAM = """
from kvgds.memory.device import CudaError, cuda
from simulator import Simulator
gpu, runtime = Simulator(), cuda()
gpu.refuse("cudaStreamCreateWithFlags")
try:
    runtime.stream(0)
except CudaError:
    print(runtime.stream(0) > 2, gpu.counter("live_streams"))
"""

# Closes an engine on a GPU that gives nothing back any more; prints what that says and leaves.
CLOSE = """
import asyncio, logging, sys, tempfile, threading
import kvgds
from simulator import Simulator
from simulator.checks_engine import Rows
async def main():
    gpu = Simulator()
    tier = kvgds.FileTier(root=tempfile.mkdtemp() + "/kv", capacity_bytes=1 << 24, verify="stamp")
    config = kvgds.EngineConfig(namespace=kvgds.Namespace(model="m"), tiers=(tier,), path="gds",
                                bounce_bytes=1 << 20, gather_bytes=1 << 20)
    async with kvgds.open_engine(config) as engine:
        for i in range(2):  # on each GPU a block in two pieces
            layers = [Rows(gpu.allocate(8192, i), 2) for _ in range(2)]
            assert await engine.store(b"%d" % i, engine.register_cache(layers).block(0))
        assert await engine.store(b"bounces", gpu.allocate(100))
        gpu.refuse("cudaFree", 700, count=-1)
        gpu.refuse("cudaHostUnregister", 700, count=-1)
logging.basicConfig(stream=sys.stdout, format="%(message)s")
asyncio.run(main())
left = [each for each in threading.enumerate() if each.name.startswith("kvgds")]
for each in left:
    each.join(5)
print([each.name for each in left if each.is_alive()])
"""

# Stores a scattered block when no thread can be started any more, twice; prints what comes of it.
NO_THREAD = """
import asyncio, tempfile
import kvgds
from forbidding import forbid_threads
from simulator import Simulator
from simulator.checks_engine import Rows
async def main():
    gpu = Simulator()
    tier = kvgds.FileTier(root=tempfile.mkdtemp() + "/kv", capacity_bytes=1 << 24)
    config = kvgds.EngineConfig(namespace=kvgds.Namespace(model="m"), tiers=(tier,), path="gds",
                                bounce_bytes=1 << 20, gather_bytes=1 << 20, timeout_s=5)
    async with kvgds.open_engine(config) as engine:
        flat = engine.register(gpu.allocate(4096))
        assert await engine.store(b"flat", flat)  # the kernels are made
        block = engine.register_cache([Rows(gpu.allocate(8192), 2) for _ in range(2)]).block(0)
        forbid_threads()
        for _ in range(2):
            try:
                await engine.store(b"k", block)
            except kvgds.TransferError as error:
                print(error)
asyncio.run(main())
"""

# Moves blocks of the second GPU by a path; prints how many have a context then.
SECOND = """
import asyncio, sys, tempfile
import kvgds
from simulator import Simulator
from simulator.checks_engine import Rows
async def main():
    gpu = Simulator()
    gpu.device = 1
    tier = kvgds.FileTier(root=tempfile.mkdtemp() + "/kv", capacity_bytes=1 << 24)
    config = kvgds.EngineConfig(namespace=kvgds.Namespace(model="m"), tiers=(tier,),
                                path=sys.argv[1], bounce_bytes=1 << 20, gather_bytes=1 << 20)
    async with kvgds.open_engine(config) as engine:
        layers = [Rows(gpu.allocate(8192, 1), 2) for _ in range(2)]
        blocks = engine.register_cache(layers).block(0), gpu.allocate(8192, 1)
        for i, block in enumerate(blocks):
            assert await engine.store(b"%d" % i, block)
            assert await engine.load(b"%d" % i, block)
    print(gpu.counter("contexts"))
asyncio.run(main())
"""

# Lets an agent have part of what another lets go of just then; prints how often that fails.
HANDOVER = """
import threading
from simulator import Simulator
from kvgds.memory import Span
from kvgds.memory.cufile import CufileError, cufile
from kvgds.transport.agent import Agent, NixlError
PIECE, PIECES = 1 << 16, 256
vram, lost = Simulator().allocate(PIECE * PIECES), 0
class Part:
    device = 0
    def __init__(self, first):
        self.spans = [Span(vram.address + i * PIECE, PIECE) for i in range(first, PIECES)]
def take(part):
    global lost
    while True:
        try:
            return other.register(part, far=True)
        except NixlError:  # not yet
            continue
        except CufileError:
            lost += 1
            return
one, other = Agent("one", ("aio",)), Agent("other", ("aio",))
one.add_gpu()
other.add_gpu()
for _ in range(50):
    whole, part = Part(0), Part(PIECES - 1)
    one.register(whole, far=True)
    taking = threading.Thread(target=take, args=(part,))
    taking.start()
    one.forget(whole)
    taking.join()
    lost += cufile().takes(part.spans[0])
    other.forget(part)
print(lost)
"""


def run(*arguments: str, cupy: bool = True, **settings: object) -> str:
    """What a child says that runs on the simulator; its failure is ours."""
    env = {"NIXL_LOG_LEVEL": "FATAL", **environment(cupy=cupy, **settings)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout


def parts() -> Iterator[Any]:
    for file in sorted(CHECKS.glob("checks_*.py")):
        count = PARTS.get(file.stem, 1)
        for part in range(count):
            yield pytest.param(file, f"{part}/{count}", id=f"{file.stem}-{part}")


@pytest.mark.timeout(150)  # each takes 20 s where nothing else runs
@pytest.mark.parametrize(("file", "part"), list(parts()))
def test_checks(file: Path, part: str) -> None:
    hung = "faulthandler_timeout=60"  # a thread that waits in C hears no signal
    options = ("-q", "-p", "no:cacheprovider", "-p", "simulator.part", "--noconftest", "-o", hung)
    run("-m", "pytest", *options, "--part", part, str(file), devices=2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "0 True 4"),
        ({"path": "p2pdma"}, "0 False 11"),
        ({"path": "compat"}, "0 False"),
        ({"driver_open": 5033}, "5033 False"),
    ],
)
def test_the_environment_says_what_cufile_is(settings: dict[str, Any], expected: str) -> None:
    assert expected == run("-c", OPEN, **settings).strip()


@pytest.mark.parametrize(("path", "expected"), [("nvfs", "0 True 4"), ("compat", "5001 False")])
def test_without_compatibility_mode_only_the_real_thing_opens(
    monkeypatch: pytest.MonkeyPatch, path: str, expected: str
) -> None:
    monkeypatch.setenv("CUFILE_ALLOW_COMPAT_MODE", "false")
    assert expected == run("-c", OPEN, path=path).strip()


@pytest.mark.parametrize(("devices", "expected"), [(0, "100 0"), (3, "0 3")])
def test_the_environment_says_how_many_devices(devices: int, expected: str) -> None:
    assert expected == run("-c", COUNT, devices=devices).strip()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "2 0"),
        ({"runtime": 13000, "driver": 13000}, "2 0"),  # where the call has an argument less
        ({"runtime": 12040}, "0 128"),
        ({"driver": 12040}, "0 128"),
        ({"copy_batch": 801}, "0 128"),
        ({"copy_batch": 36}, "0 128"),
        ({"copy_batch": 1}, "0 128"),  # whatever it is that it doesn't like
    ],
)
def test_pieces_are_copied_by_one_call_where_cuda_has_it(
    settings: dict[str, Any], expected: str
) -> None:
    assert expected == run("-c", COPY, **settings).strip()


def test_a_stream_that_could_not_be_made_is_not_the_default_stream() -> None:
    """On which copies would wait for what others compute, and that for them."""
    assert run("-c", STREAM).strip() == "True 1"


def test_who_gets_what_another_engine_lets_go_of_has_it() -> None:
    """Not while cuFile still knows of the other's: that would go with the other."""
    assert run("-c", HANDOVER).strip() == "0"


def test_a_gpu_that_has_failed_keeps_no_engine_open() -> None:
    """It gives nothing back, and says so each time."""
    *told, threads = run("-c", CLOSE, devices=2, **SLOW).splitlines()
    assert threads == "[]"
    assert [line.rpartition(": ")[0] for line in told] == [
        "GPU 0 keeps its staging memory until this process ends: cudaFree",
        "GPU 1 keeps its staging memory until this process ends: cudaFree",
        "the bounce region stays page-locked: cudaHostUnregister",
    ]


def test_without_a_thread_for_staging_memory_each_block_is_told() -> None:
    """At once: none waits for what nobody makes."""
    said = "store of block 6b: can't start new thread"
    assert run("-c", NO_THREAD, **SLOW).splitlines() == [said, said]


@pytest.mark.parametrize("path", ["gds", "bounce"])
def test_no_gpu_but_those_of_blocks_is_used(path: str) -> None:
    """A context takes hundreds of MiB of a GPU, which may be another process's."""
    assert run("-c", SECOND, path, devices=2, **SLOW).strip() == "1"


REFUSED = "GPUDirect Storage can't be had here"
ONE_BY_ONE = "scattered blocks go a fragment at a time"
TIME_UP = "then time was up (probe_timeout_s)"


@pytest.mark.parametrize(
    ("settings", "machine", "path", "why"),
    [
        ({}, {}, "gds", "cuFile works by nvidia-fs"),
        ({}, {"path": "p2pdma"}, "gds", "cuFile works by PCI peer-to-peer"),
        ({}, {"path": "compat"}, "bounce", "gds: cuFileDriverOpen: cuFile error 5001"),
        ({}, {"driver_open": 5033}, "bounce", "gds: cuFileDriverOpen: cuFile error 5033"),
        ({}, {"driver_open": "hang"}, "bounce", "gds: the trial did not end within 3 s"),
        ({}, {"write": "hold:0:0:-1"}, "bounce", "gds: the trial did not end within 3 s"),
        ({}, {"handle_register": 5008}, "bounce", "gds: register_mem: backend error"),
        ({}, {"buffer_register": 5036}, "bounce", "gds: cuFileBufRegister: cuFile error 5036"),
        ({}, {"write": "short:100:0:-1"}, "bounce", "gds: NIXL moved nothing to a file"),
        ({}, {"read": "error:5:0:-1"}, "bounce", "gds: NIXL moved nothing from a file"),
        ({"verify": "full"}, {}, "gds", "the GPU makes checksums that are xxhash's"),
        ({"verify": "full"}, {"cupy": False}, "bounce", "gds: checksums on the GPU need CuPy"),
        ({"path": "bounce"}, {}, "bounce", "gds: path='bounce' was asked for"),
        ({"path": "gds"}, {}, "gds", "1,052,672 bytes went from a GPU to a file"),
        ({"path": "gds"}, {"cupy": False}, "gds", f"{ONE_BY_ONE}: gathering needs CuPy"),
        ({"path": "gds", "gather_bytes": 0}, {}, "gds", f"{ONE_BY_ONE}: gather_bytes=0 was"),
        ({"path": "gds"}, {"write": "delay:1000"}, "gds", " bytes or less are gathered on the GPU"),
        ({"path": "gds"}, {"bar_bytes": 4 << 20}, "gds", "not measured: cuFileBufRegister"),
        ({"path": "gds"}, {"vram_bytes": 6 << 20}, "gds", "not measured: cudaMalloc"),
        ({"path": "gds"}, {"write": "delay:900000"}, "gds", f"gathered: {TIME_UP}"),
        ({"path": "gds"}, {"path": "compat"}, "PathUnavailable", REFUSED),
        ({"path": "gds"}, {"buffer_register": 5036}, "PathUnavailable", "BAR is too small"),
        ({"path": "gds"}, {"devices": 0}, "PathUnavailable", "no CUDA runtime or no GPU"),
        ({"path": "gds", "allow_compat": True}, {}, "gds", "nvidia-fs"),
        ({"path": "gds", "allow_compat": True}, {"path": "compat"}, "gds-compat", "5001"),
        ({"path": "gds", "allow_compat": True}, {"driver_open": 5033}, "PathUnavailable", REFUSED),
    ],
)
def test_how_gpu_memory_moves(
    settings: dict[str, object], machine: dict[str, Any], path: str, why: str
) -> None:
    """Whatever is wrong with GPUDirect Storage is found out at open, named, and never used."""
    timeouts_s = [3.0] * ("within 3 s" in why) + [8.0] * (TIME_UP in why) + [20.0]
    settings = {"probe_timeout_s": timeouts_s[0]} | settings
    said, _, cufile = run("-c", PLAN, json.dumps(settings), **machine).strip().partition("\n")
    assert said.split(";")[0].split()[0] == path
    assert why in said
    if settings.get("path") == "bounce":
        assert cufile == "False"  # not even loaded


def test_it_is_not_loaded_here() -> None:
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert str(build()) not in maps


@pytest.mark.parametrize(
    ("machine", "path", "fix"),
    [
        ({}, "gds", ""),
        ({"path": "compat"}, "bounce", "install nvidia-fs"),
        ({"buffer_register": 5036}, "bounce", "raise the GPU's BAR size"),
        ({"cupy": False}, "bounce", "-c constraints.txt '.[cu12]'"),
        ({"devices": 0}, "", ""),
    ],
)
def test_the_doctor_says_how_gpu_memory_moves(
    tmp_path: Path, machine: dict[str, Any], path: str, fix: str
) -> None:
    said = run("-m", "kvgds", "doctor", "--json", "--root", str(tmp_path), **machine)
    answer = json.loads(said)
    (root,) = answer["roots"]
    assert root["gpu_path"] == path
    assert answer["gpu"]["used"] == bool(path)
    fixes = [refused["fix"] for refused in root["refused"] if refused["what"] == "gds"]
    assert len(fixes) == bool(fix)
    assert all(fix in each for each in fixes)
    assert str(tmp_path) in " ".join(root["evidence"])
