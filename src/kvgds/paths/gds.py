"""Whether GPUDirect Storage is real here: found out by a child process before anyone relies on it.

``docs/gpu.md`` says what is proved. A driver that hangs or kills costs the child, not the engine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvgds.errors import PathUnavailable
from kvgds.memory.cufile import GPU_PACKAGES, CufileError, cufile
from kvgds.memory.device import cuda
from kvgds.paths.plan import trial_path

if TYPE_CHECKING:
    from kvgds.transport import Transport


@dataclass(frozen=True, slots=True)
class Gds:
    """What was found out.

    Attributes:
        path: ``"gds"``, ``"gds-compat"``, or "": neither.
        gather: a block whose fragments are no longer than this on average moves as one piece; 0:
            none does.
        evidence: what was seen to work.
        refused: why something better was not chosen.
    """

    path: str = ""
    gather: int = 0
    evidence: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def settle_gds(
    wanted: Literal["auto", "gds", "bounce"],
    root: Path,
    transport: Transport,
    *,
    allow_compat: bool,
    direct_io: bool,
    checksums: bool,
    gather_bytes: int,
    timeout_s: float,
) -> Gds:
    """Decide how GPU memory moves to files below ``root``, and open what that takes. Blocks.

    Raises:
        PathUnavailable: ``wanted`` is ``"gds"`` and it can't be had.
    """
    if wanted == "bounce":
        return Gds(refused=("gds: path='bounce' was asked for",))
    ways = [("gds", False), ("gds-compat", True)] if allow_compat else [("gds", False)]
    refused: tuple[str, ...] = ()
    job = {
        "root": os.fspath(root),
        "direct_io": direct_io,
        "checksums": checksums,
        "gather_bytes": gather_bytes,
        "measure_s": timeout_s / 4,
    }
    for name, compat in ways:
        try:
            gather, evidence = _prove({**job, "compat": compat}, timeout_s)
            _open_here(transport, compat=compat)
        except PathUnavailable as error:
            refused += tuple(f"{name}: {line}" for line in str(error).splitlines())
        else:
            return Gds(name, gather, evidence, refused)
    if wanted == "gds":
        text = "GPUDirect Storage can't be had here; mend what is named, or use path='auto'"
        raise PathUnavailable(text, refused)
    return Gds(refused=refused)


def _prove(job: dict[str, Any], timeout_s: float) -> tuple[int, tuple[str, ...]]:
    """Look, then let a child try; up to which size it is quicker to gather, and what it saw."""
    cuda()  # says what is missing, where something is
    cufile()
    if job["checksums"] and importlib.util.find_spec("cupy") is None:
        need = f"checksums on the GPU need CuPy: {GPU_PACKAGES}"
        raise PathUnavailable(f"{need}, or trade them away with verify='stamp'")
    path = trial_path(Path(job["root"]))
    try:
        said = _ask_child(json.dumps({**job, "path": os.fspath(path)}), timeout_s)
    finally:
        with contextlib.suppress(FileNotFoundError):  # the child was killed, else it is gone
            os.unlink(path)
    if said["refused"]:
        raise PathUnavailable(said["refused"])
    return said["gather"], tuple(said["evidence"])


def _ask_child(job: str, timeout_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="kvgds-") as folder:  # cuFile leaves a log where it is
        command = [sys.executable, "-m", "kvgds.paths.canary"]
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        try:
            done = subprocess.run(  # noqa: S603 - this interpreter, on a module of ours
                command,
                input=job,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": path},
            )
        except subprocess.TimeoutExpired:
            text = f"the trial did not end within {timeout_s:g} s (probe_timeout_s)"
            raise PathUnavailable(text) from None
        except OSError as error:
            raise PathUnavailable(f"the trial can't be started: {error}") from None
    lines = done.stdout.splitlines()
    try:
        said = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise PathUnavailable(f"the trial died ({done.returncode}): {last}") from None
    return said if isinstance(said, dict) else {}


def _open_here(transport: Transport, *, compat: bool) -> None:
    """Open the driver in this process, check that its mode is the one tried, add the plugin."""
    library = cufile()
    try:
        library.open(compat=compat)
        means = library.means()
    except CufileError as error:
        raise PathUnavailable(f"in this process: {error}") from None
    if not compat and (means.compat or not means.real):
        rule = "another library of this process opened cuFile first, in compatibility mode"
        raise PathUnavailable(f"{rule}; open the engine before it")
    transport.add_gpu()
