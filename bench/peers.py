"""Other projects to compare with: each from its published package, in an environment of its own.

    python bench/peers.py [NAME ...] [--into DIR]

makes them, by default all, in `.peers` of the checkout, where the benches find them. It tells of
each whether it could be had, and leaves out what needs a GPU where there is none. They take some
8 GB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvgds.bench.measure import Sample

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

FOLDER = Path(__file__).parents[1] / ".peers"
ANSWER_S = 120  # for one turn, imports too; then it hangs


@dataclass(frozen=True)
class Package:
    """What is installed.

    Attributes:
        requirements: in the order of the calls of pip.
        alone: packages installed without what they ask for, as much of which is never used here.
        gpu: whether it can't do without one.
    """

    requirements: tuple[tuple[str, ...], ...]
    alone: tuple[str, ...] = ()
    gpu: bool = False


# LMCache's adapters for files import much of it, and that needs these.
_LMCACHE = (
    *("aiofiles", "aiohttp", "blake3", "cachetools", "cryptography", "fastapi", "httpx", "msgspec"),
    *(
        "numba",
        "numpy<=2.2.6",
        "nvtx",
        "opentelemetry-api",
        "opentelemetry-sdk",
        "prometheus_client",
    ),
    *(
        "psutil",
        "py-cpuinfo",
        "pyyaml",
        "pyzmq",
        "redis",
        "requests",
        "safetensors",
        "sortedcontainers",
    ),
)
PACKAGES = {
    # Its extension for files is linked with torch's CUDA build, whether there is a GPU or not.
    "vllm": Package((("torch==2.14.1", "numpy"),), alone=("vllm==0.33.0",)),
    "lmcache": Package((("torch==2.13.0",), _LMCACHE), alone=("lmcache==0.5.6",)),
    "lifeboat": Package((("lifeboatcache==0.1.11", "blake3==1.0.11"),)),
    # NIXL's builds for both CUDA versions come with it, and the wrong one would be chosen.
    "kvcr": Package(
        (("torch==2.13.0", "msgspec>=0.21", "numpy", "pyzmq>=25"),),
        alone=("kvcr==0.1.1", "nixl==1.5.0", "nixl-cu12==1.5.0"),
    ),
    "aiofiles": Package((("aiofiles==25.1.0",),)),
    "kvikio": Package((("kvikio-cu12==26.10.0",),), gpu=True),
    "aws": Package((("aiobotocore==3.10.0", "s3fs==2026.9.0"),)),
}


def make(venv: Path, package: Package) -> None:
    """Make an environment with a package.

    Raises:
        CalledProcessError: it can't be had.
    """
    pip = (str(venv / "bin/python"), "-m", "pip", "install", "--quiet")
    calls: list[tuple[str, ...]] = [(sys.executable, "-m", "venv", str(venv))]
    calls += [(*pip, *each) for each in package.requirements]
    calls += [(*pip, "--no-deps", *package.alone)] if package.alone else []
    for call in calls:
        subprocess.run(call, check=True, capture_output=True, text=True)


def install(name: str, into: Path) -> str:
    """Make an environment, unless it is there; what is to be told of it."""
    package, venv = PACKAGES[name], into / name
    if package.gpu and not Path("/dev/nvidiactl").exists():
        return "left out: there is no GPU"
    if (venv / "made").exists():
        return "is there"
    shutil.rmtree(venv, ignore_errors=True)
    try:
        make(venv, package)
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:]
        return f"failed: {' '.join(last) or error}"
    (venv / "made").touch()  # last, so that what was cut off is made again
    return "made"


def python_of(package: str, folder: Path) -> Path | None:
    """The interpreter of an environment that was made."""
    venv = folder / package
    return venv / "bin/python" if (venv / "made").exists() else None


class Process:
    """One that answers: a line of JSON for each line it is given."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process

    async def ask(self, line: str | None) -> dict[str, Any]:
        """Its answer.

        Raises:
            RuntimeError: it ended, or hangs.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("no pipes")
        if line is not None:
            stdin.write(line.encode() + b"\n")
        try:
            async with asyncio.timeout(ANSWER_S):
                answer = await stdout.readline()
        except TimeoutError:
            raise RuntimeError(f"{self.name} has not answered for {ANSWER_S} s") from None
        if not answer:
            raise RuntimeError(f"{self.name} ended instead of answering; see what it said above")
        found: dict[str, Any] = json.loads(answer)
        return found

    async def move(self, way: str) -> Sample:
        """Let it ``store`` or ``load`` all blocks."""
        return Sample(**await self.ask(way))


@asynccontextmanager
async def started(name: str, *command: str) -> AsyncIterator[Process]:
    """A process that dies with this one, which is the only one that Ctrl-C reaches."""
    process = await asyncio.create_subprocess_exec(
        *("setpriv", "--pdeathsig", "KILL", "--", *command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        limit=1 << 26,
        process_group=0,
    )
    try:
        yield Process(name, process)
    finally:
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(20):
                await process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--into", type=Path, default=FOLDER)
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.names) - set(PACKAGES):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(PACKAGES)}")
    failed = False
    for name in chosen.names or PACKAGES:
        said = install(name, chosen.into.absolute())
        failed |= said.startswith("failed")
        print(f"{name}: {said}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
