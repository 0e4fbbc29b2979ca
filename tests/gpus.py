"""What the tests that need a GPU ran on: for pytest's summary, so that a green run says of what."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvgds import PathPlan

ASKED = "index,name,driver_version,memory.total"

_plans: dict[tuple[str, str], str] = {}


def saw(plans: Sequence[PathPlan], root: Path, verify: str) -> None:
    """Remember how GPU memory moved; the last of each path and kind of check is told."""
    for plan in plans:
        if plan.memory == "gpu":
            _plans[plan.path, verify] = str(plan).replace(str(root), "...")


def summary() -> list[str]:
    """GPUs, driver, CUDA, and each plan, which says by which means cuFile works."""
    if not _plans:
        return []
    lines = [*_devices(), f"CUDA: {', '.join(_runtimes()) or 'unknown'}"]
    for (_, verify), plan in sorted(_plans.items()):
        first, *more = plan.splitlines()
        lines += [f"verify={verify}, {first}", *more]
    return lines


def _devices() -> list[str]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ["GPU: nvidia-smi is missing", *_driver()]
    asked = [command, f"--query-gpu={ASKED}", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return [f"GPU ({ASKED}): {line}" for line in done.stdout.splitlines()] or _driver()


def _driver() -> list[str]:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text(encoding="utf-8").splitlines()[:1] if path.exists() else []


def _runtimes() -> list[str]:
    """The CUDA runtimes that this process has loaded."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    paths = {line.split()[-1] for line in maps.splitlines() if "libcudart" in line}
    return sorted(str(Path(path).resolve()) for path in paths)
