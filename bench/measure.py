"""What every benchmark here shares: alternating runs, medians, ratios, the machine's report.

Machines are shared and noisy, so contenders take turns within one process, and what is
reported is the median of each and the ratio of the medians, next to the number of
operations that succeeded.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from kvgds.memory.cufile import cufile

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from kvgds import PathPlan

Run = "Callable[[], Awaitable[Sample]]"


@dataclass
class Sample:
    """One run: what it moved, how long it took, what it cost, how much of it succeeded."""

    nbytes: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    asked: int = 0
    succeeded: int = 0
    latencies: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """GB/s."""
        return self.nbytes / self.seconds / 1e9

    @property
    def cpu_per_gib(self) -> float:
        """CPU-seconds of the whole process a GiB, kernel time included."""
        return self.cpu / (self.nbytes / 2**30)


def cpu_seconds() -> float:
    """User and system time of this process's threads so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def timed(sample: Sample) -> Iterator[Sample]:
    """Fill in a sample's time and CPU."""
    cpu, started = cpu_seconds(), time.perf_counter()
    yield sample
    sample.seconds = time.perf_counter() - started
    sample.cpu = cpu_seconds() - cpu


async def alternate(
    contenders: dict[str, Callable[[], Awaitable[Sample]]], rounds: int
) -> dict[str, list[Sample]]:
    """Let each contender run once a round, the order turning; a first round is thrown away."""
    names = list(contenders)
    runs: dict[str, list[Sample]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            sample = await contenders[name]()
            if turn:
                runs[name].append(sample)
    return runs


def quantile(values: list[float], q: float) -> float:
    """The q-quantile, by rank."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * q), len(ordered) - 1)]


def median(samples: list[Sample], what: str) -> float:
    """Median of one property over the runs."""
    return statistics.median(getattr(sample, what) for sample in samples)


def report_machine(root: Path) -> dict[str, object]:
    """What the numbers were taken on."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    below = [m for m in mounts if str(root.resolve()).startswith(m[1])]
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "filesystem": max(below, key=lambda m: len(m[1]))[2] if below else "unknown",
        "huge_pages": huge.read_text().strip() if huge.exists() else "none",
        "kvgds": version("kvgds"),
        "commit": _commit(),
        "command": " ".join(a for a in sys.argv if not a.startswith("/")),
        "gpu": "none" if not Path("/dev/nvidiactl").exists() else "there",
        "nixl": version("nixl-cu12"),
    }


_ASKED = "name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max"


def report_gpu(plans: Sequence[PathPlan]) -> dict[str, object]:
    """What the numbers were taken on, of a GPU, and how its memory moved."""
    import torch  # noqa: PLC0415 - what needs no GPU need not have it

    return {
        _ASKED: _command("nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "cufile": cufile().means().text if any("gds" in p.path for p in plans) else "not opened",
        "plans": [str(plan) for plan in plans],
    }


def _commit() -> str:
    """What was measured, if this is a checkout."""
    return _command("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")


def _command(*command: str) -> str:
    """What a command says."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def emit(row: dict[str, object], out: Path | None) -> None:
    """Print one result row, and add it to the results as a JSON line."""
    text = json.dumps(row)
    print(text, flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(text + "\n")
