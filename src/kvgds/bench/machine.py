"""What numbers were taken on: a report that every file of results begins with."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from kvgds.doctor import text_of, version_of
from kvgds.memory.cufile import cufile
from kvgds.paths import filesystem_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvgds.paths import PathPlan

_HERE = os.fspath(Path(__file__).parent)
_PACKAGES = ("kvgds", "nixl-cu12", "nixl-cu13", "obstore", "numpy", "torch")
_PLACES = ("--root", "--out", "--peers", "--endpoint", "--bucket")
_GPU = "--query-gpu=name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max"


def report(root: Path, plans: Sequence[PathPlan] = ()) -> dict[str, Any]:
    """The machine, as far as it bears on blocks that go to a directory and come back.

    It is published: neither it nor the command that is told names a place of the user's.

    Args:
        root: the directory.
        plans: those of the engines that are measured.
    """
    cpu = [line for line in text_of("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    by_gds = any(plan.path.startswith("gds") for plan in plans)
    return {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "filesystem": filesystem_of(root),
        "disk": _disk(root),
        "huge_pages": text_of("/sys/kernel/mm/transparent_hugepage/enabled") or "none",
        "gpu": _said("nvidia-smi", _GPU, "--format=csv,noheader") or "none",
        "cufile": cufile().means().text if by_gds else "not opened",
        "versions": {name: text for name in _PACKAGES if (text := version_of(name))},
        "plan": list(dict.fromkeys(plan.how for plan in plans)),
        "command": _command(sys.argv),
        "commit": _commit(),
    }


def _disk(root: Path) -> str:
    """The block device below a directory, as the kernel names it."""
    number = os.stat(root).st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    try:
        name = device.resolve(strict=True).name
        whole = device if (device / "queue").exists() else device.resolve().parent
    except OSError:  # there is none, or a container does not show it
        return "none"
    spins = text_of(whole / "queue/rotational") == "1"
    model = text_of(whole / "device/model")  # a virtual disk has none, and its kind means nothing
    return f"{model}, {'rotating' if spins else 'solid state'}" if model else name


def _command(words: Sequence[str]) -> str:
    """A command without the options that name places, and of any other path only its last part."""
    told = []
    rest = iter(words)
    for word in rest:
        option, given, _ = word.partition("=")
        # argparse takes an option's beginning for it.
        if option.startswith("--") and any(each.startswith(option) for each in _PLACES):
            if not given:
                next(rest, None)
        else:
            told.append(PurePath(word).name)
    return " ".join(told)


def _commit() -> str:
    """That of kvgds. An installed copy may lie in a project that has commits of its own."""
    if not _said("git", "-C", _HERE, "ls-files", "machine.py"):
        return "unknown"
    return _said("git", "-C", _HERE, "describe", "--always", "--dirty") or "unknown"


def _said(*command: str) -> str:
    """What a command answers; nothing if there is none, or it fails."""
    with suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - ours
        return done.stdout.strip()
    return ""
