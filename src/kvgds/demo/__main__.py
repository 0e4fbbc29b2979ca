"""One of the demo's two processes: ``python -m kvgds.demo first ROOT REPORT ...``.

Started by :func:`kvgds.demo.run`. Prints its progress, a line ``WHAT DONE TOTAL`` each time,
and leaves a :class:`~kvgds.demo.report.Report` behind.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import kvgds
from kvgds.demo import model
from kvgds.demo.report import Report, Traffic
from kvgds.demo.serve import Offload, Server
from kvgds.demo.workload import SIZES, prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Do what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kvgds.demo", description=__doc__)
    parser.add_argument("which", choices=("first", "second"))
    parser.add_argument("root", type=Path, help="directory of the blocks")
    parser.add_argument("report", type=Path, help="file to write the results to")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--salt", type=bytes.fromhex, default=b"", help="parent of first blocks")
    parser.add_argument("--threads", type=int, default=1, help="threads of the model")
    parser.add_argument("--parent", type=int, default=0, help="process not to outlive")
    parser.add_argument("--tamper", action="store_true", help="flip a loaded byte")
    arguments = parser.parse_args()
    if arguments.parent and not _end_with(arguments.parent):
        return 1
    try:
        asyncio.run(_Process(arguments).run()).save(arguments.report)
    except kvgds.KvgdsError as error:
        print(error, file=sys.stderr)
        return 1
    except ExceptionGroup as group:
        ours, others = group.split(kvgds.KvgdsError)
        if others or not ours:
            raise
        print(*dict.fromkeys(map(str, _leaves(ours))), sep="\n", file=sys.stderr)
        return 1
    return 0


def _end_with(parent: int) -> bool:
    """Let the kernel kill this process when its parent ends, however that ends. False: it has."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


def _leaves(group: ExceptionGroup[kvgds.KvgdsError]) -> Iterator[kvgds.KvgdsError]:
    for error in group.exceptions:
        if isinstance(error, ExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


class _Process:
    """The server of one process and what it works with."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._size = SIZES[arguments.size]
        self._worker = ThreadPoolExecutor(
            1, "model", initializer=model.use_threads, initargs=(arguments.threads,)
        )
        self._decoder = model.Decoder(self._size, model.device())

    async def run(self) -> Report:
        """Serve, and where this is the second process, serve again without kvgds."""
        first, second = prompts(self._size)
        with self._worker:
            # The first steps of a process are slow, whoever runs them.
            await self._server("warm-up", first[:1]).serve_whole(first[:1])
            if self._arguments.which == "first":
                return await self._with_kvgds(first)
            report = await self._with_kvgds(second)
            report.plain.extend(await self._server("plain", first).serve_plain(first))
            report.plain.extend(await self._server("plain", second).serve_plain(second))
            report.whole_s.extend(await self._server("whole", second).serve_whole(second))
            return report

    async def _with_kvgds(self, batch: Sequence[list[int]]) -> Report:
        arguments, size = self._arguments, self._size
        pages = model.Pages(size, sum(size.blocks(prompt) for prompt in batch))
        server = self._server(arguments.which, batch)
        async with kvgds.open_engine(self._config()) as engine:
            offload = Offload(engine, pages, arguments.salt, arguments.tamper)
            replies = await server.serve_offloaded(batch, offload)
            plan = "\n".join(map(str, engine.plan))
        return Report(
            model=self._decoder.words,
            plan=plan,
            stored_keys=frozenset(offload.stored),
            stored=Traffic(len(offload.stored), offload.storing.seconds),
            loaded=Traffic(offload.loaded, offload.loading.seconds),
            failures=offload.failures,
            replies=replies,
        )

    def _config(self) -> kvgds.EngineConfig:
        return kvgds.EngineConfig(
            namespace=kvgds.Namespace(
                model=f"kvgds-demo-llama-{self._arguments.size}",
                dtype="float32",
                block_tokens=self._size.block_tokens,
            ),
            tiers=(kvgds.FileTier(root=self._arguments.root, capacity_bytes=512 << 20),),
        )

    def _server(self, what: str, batch: Sequence[list[int]]) -> Server:
        generated = 0 if what in ("warm-up", "whole") else self._size.new_tokens - 1
        total = sum(len(prompt) + generated for prompt in batch)
        return Server(self._decoder, self._size, self._worker, _progress(what, total))


def _progress(what: str, total: int) -> Callable[[int], None]:
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        print(what, done, total, flush=True)

    advance(0)
    return advance


if __name__ == "__main__":
    sys.exit(main())
