"""What kvgds finds on this machine: how bytes would move, what is missing, and what to do.

Everything is tried rather than guessed: NIXL's plugin is loaded, huge pages are asked for,
and in each directory and bucket an engine of its own, in a folder that goes away again, stores
blocks and loads them back. An engine that has the directory is not disturbed. Everything blocks.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import platform
import secrets
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvgds.blocks import PAGE, Namespace
from kvgds.config import EngineConfig, FileTier, ObjectTier
from kvgds.engine import open_engine
from kvgds.errors import ConfigError, KvgdsError, PathUnavailable, explain
from kvgds.memory import Arena
from kvgds.memory.cufile import GPU_PACKAGES
from kvgds.memory.device import cuda
from kvgds.paths import filesystem_of
from kvgds.tiers.directory import owner_of
from kvgds.tiers.space import room_on_disk
from kvgds.transport import NixlTransport, NotMoved
from kvgds.transport.bucket import Bucket, fix_of
from kvgds.upkeep import layout_of, listing
from kvgds.upkeep.objects import root_of
from kvgds.upkeep.records import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvgds.engine import Engine
    from kvgds.paths import PathPlan

_TRIAL_BYTES = (1 << 20, PAGE)  # by the direct path
_BOUNCED_BYTES = 10_001
_CAPACITY = 64 << 20
_ARENA = 8 << 20
_FOLDER = ".kvgds-doctor-"
_PREFIX = "kvgds-doctor/"
_STALE_S = 3600
_HUGE = "/sys/kernel/mm/transparent_hugepage/enabled"
_NIXL = ("nixl-cu12", "nixl-cu13")
_OBJ_FIX = "pip install nixl-cu12 instead of nixl-cu13, or leave it to obstore"
_GDS_FIXES = (
    ("CuPy", f"{GPU_PACKAGES}, or use verify='stamp'"),
    ("can't be loaded", GPU_PACKAGES),
    ("5001", "install nvidia-fs, or a kernel and driver with PCI peer-to-peer DMA"),
    ("5030", "in a container, mount /run/udev"),
    ("5033", "load the nvidia-fs module: modprobe nvidia-fs"),
    ("5036", "raise the GPU's BAR size, or register less memory"),
    (
        "backend error",
        "use a file system and disk that GPUDirect Storage supports: ext4, XFS, NVMe",
    ),
    ("probe_timeout_s", "see what hangs (dmesg), or raise probe_timeout_s"),
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A way that can't be gone: which, why, and what would open it."""

    what: str
    why: str
    fix: str


@dataclass(slots=True)
class Part:
    """One thing that was looked at.

    Attributes:
        ok: whether kvgds can do its work with it.
        used: whether it makes use of it.
        summary: what it is.
        evidence: what that rests on.
        refused: better ways that were tried, and why not those.
    """

    ok: bool = True
    used: bool = True
    summary: str = ""
    evidence: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)

    def fail(self, what: str, why: str, fix: str) -> None:
        """Note why it does not work."""
        self.ok = False
        self.summary = why
        self.refused.append(Refusal(what, why, fix))


@dataclass(slots=True)
class RootPart(Part):
    """A directory for blocks.

    Attributes:
        root: the directory.
        layout: what it holds, or would.
        in_use: another engine has it, so that nothing was written there.
        path: ``"direct"`` once blocks were stored and loaded, else "".
        backend: what moved them.
        direct_io: whether the page cache was bypassed.
        alignment: what memory has to be aligned to for that.
        gpu_path: how GPU memory moves there; "": there is no GPU.
        filesystem: type of the file system.
        free_bytes: free there.
    """

    root: str = ""
    layout: str = ""
    in_use: bool = False
    path: str = ""
    backend: str = ""
    direct_io: bool = False
    alignment: int = 0
    gpu_path: str = ""
    filesystem: str = ""
    free_bytes: int = 0


@dataclass(slots=True)
class BucketPart(Part):
    """A bucket for blocks.

    Attributes:
        bucket: the bucket, and where in it.
        backend: what moved blocks there and back; "": nothing did.
    """

    bucket: str = ""
    backend: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that was found."""

    ok: bool
    versions: dict[str, str]
    nixl: Part
    huge_pages: Part
    gpu: Part
    roots: tuple[RootPart, ...]
    buckets: tuple[BucketPart, ...] = ()


def diagnose(tiers: Sequence[FileTier | ObjectTier]) -> Diagnosis:
    """Look at this machine, and at the directories and buckets of these tiers."""
    nixl = _nixl()
    roots = tuple(_root(tier, works=nixl.ok) for tier in tiers if isinstance(tier, FileTier))
    buckets = tuple(_bucket(tier) for tier in tiers if isinstance(tier, ObjectTier))
    needed = bool(roots) or not buckets  # to a bucket there is another way
    ok = (nixl.ok or not needed) and all(part.ok for part in (*roots, *buckets))
    return Diagnosis(ok, versions(), nixl, _huge_pages(), _gpu(), roots, buckets)


def versions() -> dict[str, str]:
    """Versions of what matters; "" for what is not installed."""
    nixl = next(filter(None, map(version_of, _NIXL)), "")
    return {
        "kvgds": version_of("kvgds"),
        "nixl": nixl,
        "obstore": version_of("obstore"),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def version_of(package: str) -> str:
    """The version of a package; "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _nixl() -> Part:
    """Which queue NIXL's POSIX plugin gets, and why not a better one."""
    part = Part()
    for queue in ("uring", "aio"):
        transport = NixlTransport(queues=(queue,))
        try:
            transport.start()
        except PathUnavailable as error:
            why = "; ".join(error.report) or str(error)
            fix = _queue_fix(queue) if why.startswith("POSIX/") else str(error).partition("\n")[0]
            part.refused.append(Refusal(f"POSIX/{queue}", why, fix))
            continue
        transport.close().result()
        part.summary = transport.name
        part.evidence.append(f"an agent with {transport.name} was made")
        return part
    if not versions()["nixl"]:
        part.refused.clear()
        part.fail("NIXL", "NIXL is not installed", f"pip install {_NIXL[0]}")
    part.ok = False
    part.summary = part.summary or "NIXL's POSIX plugin can't be used"
    return part


def _queue_fix(queue: str) -> str:
    if queue == "aio":
        return "raise the limit: sysctl fs.aio-max-nr=1048576"
    if text_of("/proc/sys/kernel/io_uring_disabled") not in ("", "0"):
        return "allow it: sysctl kernel.io_uring_disabled=0"
    return "use Linux 5.13 or newer, and a container whose seccomp profile allows io_uring_setup"


def _huge_pages() -> Part:
    """Whether memory made by kvgds gets huge pages, from asking for some."""
    part = Part(summary="used")
    setting = text_of(_HUGE).partition("[")[2].partition("]")[0] or "absent"
    part.evidence.append(f"{_HUGE} says {setting}")
    arena = Arena(_ARENA)
    nbytes = _huge_bytes(arena.span.address)
    part.evidence.append(f"{nbytes >> 20} of {_ARENA >> 20} MiB came on huge pages")
    if nbytes < _ARENA // 2:
        fix = f"echo madvise > {_HUGE}" if setting in ("never", "absent") else "free some memory"
        why = "4 KiB pages make direct transfers slower"
        part.summary = "not used"
        part.refused.append(Refusal("huge pages", why, fix))
    return part


def _huge_bytes(address: int) -> int:
    """Bytes on huge pages in the mapping at an address."""
    inside = False
    for line in text_of("/proc/self/smaps").splitlines():
        first, _, rest = line.partition(" ")
        start, dash, end = first.partition("-")
        if dash:
            inside = int(start, 16) <= address < int(end, 16)
        elif inside and first == "AnonHugePages:":
            return min(int(rest.split()[0]) << 10, _ARENA)
    return 0


def _gpu() -> Part:
    """What there is of GPUs, and how their memory moves."""
    driver = text_of("/proc/driver/nvidia/version").partition("\n")[0]
    evidence = [f"driver: {driver}"] if driver else []
    try:
        devices = cuda().devices
    except PathUnavailable as error:
        reasons = error.report if driver else ()
        return Part(
            used=False, summary="none that CUDA answers for", evidence=[*evidence, *reasons]
        )
    return Part(summary=f"{devices} found", evidence=[*evidence, "the CUDA runtime answers"])


def text_of(path: str | Path) -> str:
    """What a file says; "" if it is not there."""
    try:
        return Path(path).read_text("utf-8", "replace").strip()
    except OSError:
        return ""


# --- directories --------------------------------------------------------------------------


def _root(tier: FileTier, *, works: bool) -> RootPart:
    part = RootPart(root=str(tier.root), layout=tier.layout)
    try:
        tier = _look(tier, part)
        if part.ok and not part.in_use and works:
            _try(tier, part)
    except KvgdsError as error:
        report = error.report if isinstance(error, PathUnavailable) else ()
        part.evidence += report
        part.fail("directory", *_why_and_fix(error))
    except OSError as error:
        part.fail("directory", explain(error), "make it a directory that you can write to")
    return part


def _why_and_fix(error: KvgdsError) -> tuple[str, str]:
    """A rule says what is wrong and then, behind a semicolon, what to do."""
    if not isinstance(error, ConfigError):
        return str(error).partition("\n")[0], "see what was tried"
    why, _, fix = error.rule.rpartition("; ")
    return why or fix, fix


def _there(path: Path) -> bool:
    """Whether something has this name. OSError: that can't be seen, as in a folder of others."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _look(tier: FileTier, part: RootPart) -> FileTier:
    """What can be seen without writing. The tier, with the layout that is really there."""
    place = tier.root if _there(tier.root) else tier.root.parent
    if not _there(place):
        raise ConfigError("root", str(tier.root), f"{place} does not exist; make it first")
    if not place.is_dir():
        raise ConfigError("root", str(tier.root), f"{place} is not a directory; make it one")
    part.free_bytes = room_on_disk(place)
    part.filesystem = filesystem_of(place)
    if place != tier.root:
        part.evidence.append("it does not exist yet; an engine makes it")
        return tier
    if not _there(tier.root / "kvgds.json"):
        part.evidence.append("it holds no blocks yet")
        return tier
    part.layout = layout_of(tier.root)
    owner = owner_of(tier.root) if part.layout == "slabs" else ""
    if owner:
        part.in_use = True
        part.summary = f"in use by process {owner}, so nothing was tried there"
    there = listing(tier.root)
    blocks = sum(use.blocks for use in there.namespaces)
    part.evidence.append(
        f"it holds {counted(blocks, 'block')} in {counted(len(there.namespaces), 'namespace')}"
    )
    if there.quarantined:
        places = counted(there.quarantined, "place")
        why = f"{places} out of use, because of wrong bytes that came back"
        part.refused.append(Refusal("quarantine", why, "kvgds fsck --repair"))
    return tier.model_copy(update={"layout": part.layout})


def _try(tier: FileTier, part: RootPart) -> None:
    """Store and load with an engine in a folder of its own on the same file system."""
    place = tier.root if tier.root.exists() else tier.root.parent
    for stale in place.glob(f"{_FOLDER}*"):
        if time.time() - stale.lstat().st_mtime > _STALE_S:
            shutil.rmtree(stale, ignore_errors=True)
    folder = place / f"{_FOLDER}{secrets.token_hex(8)}"
    trial = tier.model_copy(update={"root": folder, "capacity_bytes": _CAPACITY})
    folder.mkdir(mode=0o700)
    try:
        plan, *far = asyncio.run(_round_trips(trial))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    part.path, part.backend = plan.path, plan.backend
    part.direct_io, part.alignment = bool(plan.direct_io), plan.alignment
    part.summary = plan.how
    part.evidence += [line.replace(str(folder), part.root) for line in plan.evidence]
    sizes = ", ".join(f"{nbytes:,}" for nbytes in _TRIAL_BYTES)
    part.evidence.append(
        f"blocks of {sizes} bytes went direct, {_BOUNCED_BYTES:,} bounced, and back"
    )
    for line in plan.refused:
        what, _, why = line.partition(": ")
        fix = "use a local file system such as ext4 or XFS, or accept the page cache"
        part.refused.append(Refusal(what, why.replace(str(folder), part.root), fix))
    for gpu in far:
        _tell_gpu(gpu, part, str(folder))


def _tell_gpu(plan: PathPlan, part: RootPart, folder: str) -> None:
    """How GPU memory moves there, and what would let it move without a copy."""
    part.gpu_path = plan.path
    because = "; ".join(plan.evidence).replace(folder, part.root)
    part.evidence.append(f"GPU memory: {plan.path} via {plan.backend}, because {because}")
    for line in plan.refused:
        what, _, why = line.partition(": ")
        fix = next((fix for sign, fix in _GDS_FIXES if sign in why), "see docs/gpu.md")
        part.refused.append(Refusal(what, why.replace(folder, part.root), fix))


# --- buckets ------------------------------------------------------------------------------


def _bucket(tier: ObjectTier) -> BucketPart:
    """Store and load with an engine in a folder of its own, below the tier's prefix."""
    part = BucketPart(bucket=root_of(tier))
    folder = f"{_PREFIX}{secrets.token_hex(8)}/"
    try:
        trial = tier.model_copy(update={"prefix": f"{tier.prefix}{folder}"})
        bucket = Bucket(tier)
        try:
            # By itself, because of that obstore says best what is wrong.
            bucket.write(f"{folder}written", b"written")
            plan, *_ = asyncio.run(_round_trips(trial))
        finally:
            _clean(bucket, folder)
    except (KvgdsError, NotMoved) as error:
        report = error.report if isinstance(error, PathUnavailable) else ()
        told = "; ".join((str(error).partition("\n")[0], *report))
        part.fail(
            "bucket", told, _OBJ_FIX if "OBJ plugin" in told else fix_of(NotMoved(None, told))
        )
    else:
        _tell_bucket(plan, part)
    return part


def _clean(bucket: Bucket, folder: str) -> None:
    """Remove what this trial has left, and what others have that were killed."""
    for found in bucket.listing(_PREFIX):
        if found.name.startswith(folder) or time.time() - found.stored_at > _STALE_S:
            bucket.delete(found.name)


def _tell_bucket(plan: PathPlan, part: BucketPart) -> None:
    part.backend = plan.backend
    part.summary = plan.how
    part.evidence += plan.evidence
    sizes = ", ".join(f"{nbytes:,}" for nbytes in (*_TRIAL_BYTES, _BOUNCED_BYTES))
    part.evidence.append(f"blocks of {sizes} bytes went there and back")
    for line in plan.refused:
        what, _, why = line.partition(": ")
        part.refused.append(Refusal(what, why, _OBJ_FIX))


# --- round trips --------------------------------------------------------------------------


async def _round_trips(tier: FileTier | ObjectTier) -> tuple[PathPlan, ...]:
    config = EngineConfig(
        namespace=Namespace("kvgds-doctor"), tiers=(tier,), bounce_bytes=4 << 20, timeout_s=15
    )
    async with open_engine(config) as engine:
        for nbytes in _TRIAL_BYTES:
            arena = Arena(2 * nbytes)
            arena.bytes[:nbytes] = secrets.token_bytes(nbytes)
            memory = engine.register(arena.bytes)
            await _round_trip(engine, memory[:nbytes], memory[nbytes:])
            _compare(arena.bytes[:nbytes], arena.bytes[nbytes:])
        sent, got = secrets.token_bytes(_BOUNCED_BYTES), bytearray(_BOUNCED_BYTES)
        await _round_trip(engine, sent, got)
        _compare(sent, got)
        return engine.plan


async def _round_trip(engine: Engine, source: object, target: object) -> None:
    key = secrets.token_bytes(8)
    await engine.store(key, source)
    if not await engine.load(key, target):
        raise PathUnavailable("a block was not there after it had been stored")
    await engine.delete(key)


def _compare(sent: bytes | memoryview, got: bytearray | memoryview) -> None:
    if sent != got:
        raise PathUnavailable(f"{len(sent):,} bytes came back different from what was stored")
