"""``kvgds demo``: a real decoder, two processes, and the check that nothing changed.

The first process serves prompts and stores each block of their KV cache as it fills. The
second, a new one, serves other prompts that share prefixes with those, loads what is stored,
computes the rest, and then serves everything again without kvgds, with transformers' own
cache. Tokens and logits must be equal, bit for bit.

This module runs in the parent, which needs neither torch nor transformers, on one thread.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvgds.demo.report import Report, differences
from kvgds.demo.workload import SIZES
from kvgds.errors import KvgdsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from kvgds.demo.report import Reply, Traffic
    from kvgds.demo.workload import Size

_DEADLINE_S = 300.0
# kvgds is in no package index: by its name pip would miss it.
_PACKAGES = "from your checkout, pip install -c constraints.txt '.[demo]'"

_STEPS = {
    "first": "first process: serve 2 prompts, store their blocks",
    "second": "new process: serve 4 prompts, load what they share",
    "plain": "the same 6 prompts without kvgds",
    "whole": "4 prompts without kvgds, each prefilled in one step",
}


def run(root: Path | None, console: Console, *, size: str = "full", tamper: bool = False) -> int:
    """Run the demo; return the exit status: 1 if anything differed.

    SIGINT, SIGTERM and SIGHUP end it, with 128 more than their number. Call it on the main thread.

    Args:
        root: directory for the blocks; a temporary one by default.
        console: where progress and results are printed.
        size: a name in ``SIZES``.
        tamper: change a byte of a loaded block; then the demo must fail.

    Raises:
        DemoError: it could not be run to its end.
    """
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        raise DemoError(f"kvgds demo needs {' and '.join(missing)}: {_PACKAGES}")
    ending = Ending()
    with ending.by_signals(), tempfile.TemporaryDirectory(prefix="kvgds-demo-") as scratch:
        processes = Processes(root or Path(scratch, "blocks"), Path(scratch), size, ending=ending)
        try:
            with _progress(console, processes):
                first = processes.run("first")
                second = processes.run("second", *(["--tamper"] if tamper else []))
        except DemoError:
            if not ending.status:
                raise
    if ending.status:
        return ending.status
    console.print(_table(first, second, SIZES[size]))
    return _verdict(console, first, second)


class DemoError(KvgdsError):
    """What it needs is not there, or one of its processes did not end well."""


class Ending:
    """What signals ask for: the process that runs is killed, and so is any that starts later.

    The demo then fails as if that process had died by itself. An exception out of a handler would
    come in the midst of anything, the removal of a directory too.

    Attributes:
        status: the exit status that a signal asks for; 0: none has come.
    """

    def __init__(self) -> None:
        self.status = 0
        self._child: subprocess.Popen[str] | None = None

    @contextmanager
    def by_signals(self) -> Iterator[None]:
        """Listen to them, but for those that this process is to ignore."""
        ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {each: signal.getsignal(each) for each in ends}
        heard = [each for each, handler in before.items() if handler is not signal.SIG_IGN]
        for each in heard:
            signal.signal(each, self._end)
        try:
            yield
        finally:
            for each in heard:
                signal.signal(each, before[each])

    def watch(self, child: subprocess.Popen[str]) -> None:
        """Kill this one from now on, and at once if a signal came while it was started."""
        self._child = child
        if self.status:
            child.kill()

    def _end(self, number: int, _: object) -> None:
        self.status = 128 + number
        if self._child is not None:
            self._child.kill()


@dataclass
class Processes:
    """Starts the demo's processes and collects what they report.

    Attributes:
        root: directory of the blocks.
        scratch: directory for reports.
        size: a name in ``SIZES``.
        salt: makes this run's block keys its own, so that it starts cold in any directory.
        threads: threads of the model, the same in both processes.
        ending: what may end them early.
    """

    root: Path
    scratch: Path
    size: str = "full"
    salt: str = field(default_factory=lambda: secrets.token_hex(16))
    threads: int = field(default_factory=lambda: min(len(os.sched_getaffinity(0)), 8))
    ending: Ending = field(default_factory=Ending)
    bars: Progress | None = None
    tasks: dict[str, TaskID] = field(default_factory=dict)

    def run(self, which: str, *options: str) -> Report:
        """Run one process to its end.

        Raises:
            DemoError: with what it said.
        """
        path = self.scratch / f"{which}.report"
        command = [sys.executable, "-m", "kvgds.demo", which, os.fspath(self.root), os.fspath(path)]
        command += ["--size", self.size, "--salt", self.salt, "--threads", str(self.threads)]
        command += ["--parent", str(os.getpid())]
        errors = self.scratch / f"{which}.stderr"
        with errors.open("wb") as stderr:
            status = self._watch([*command, *options], stderr.fileno())
        if status != 0:
            said = errors.read_text("utf-8", "replace").strip() or f"it ended with status {status}"
            raise DemoError(f"the {which} process failed: {said}")
        return Report.read(path)

    def _watch(self, command: list[str], stderr: int) -> int:
        settings = {
            # cuBLAS gives equal bits for equal inputs only with a workspace of a fixed size.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            # By default OpenMP's threads spin long for each other: on a machine with other work
            # they then take many times as long, and the engine's own threads are other work.
            "GOMP_SPINCOUNT": "1000",
            "HF_HUB_OFFLINE": "1",
        }
        with subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | settings,
        ) as child:
            self.ending.watch(child)
            killer = threading.Timer(_DEADLINE_S, child.kill)
            killer.start()
            try:
                for line in child.stdout or ():
                    self._show(line)
                return child.wait()
            finally:
                killer.cancel()
                child.kill()

    def _show(self, line: str) -> None:
        match line.split():
            case [what, done, total] if self.bars and what in self.tasks:
                task = self.tasks[what]
                self.bars.start_task(task)
                self.bars.update(task, completed=int(done), total=int(total), visible=True)


@contextmanager
def _progress(console: Console, processes: Processes) -> Iterator[None]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        processes.bars = bars
        for what, words in _STEPS.items():
            shown = what == "first"  # it pulses while the process loads its libraries
            processes.tasks[what] = bars.add_task(words, total=None, start=shown, visible=shown)
        yield


def _table(first: Report, second: Report, size: Size) -> Table:
    plain = second.plain[len(first.replies) :]
    cold, warm = _first_token_s(plain), _first_token_s(second.replies)
    whole = statistics.median(second.whole_s)
    block_mib = size.block_bytes / (1 << 20)
    table = Table(title="kvgds demo", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = (
        ("path", second.plan),
        ("model", f"{second.model}; blocks of {size.block_tokens} tokens, {block_mib:.3g} MiB"),
        ("stored, first process", _traffic(first.stored, size)),
        ("stored, new process", _traffic(second.stored, size)),
        ("loaded, new process", f"{_traffic(second.loaded, size)}; {_shared(first, second)}"),
        ("time to first token", f"{_ms(warm)} warm, {_ms(cold)} cold: {cold / warm:.1f} to 1"),
        ("", f"(medians of the same {len(plain)} prompts, arriving together; cold: no kvgds)"),
        ("", f"(cold with each prompt in one step: {_ms(whole)}, {whole / warm:.1f} to 1)"),
    )
    for name, text in rows:
        table.add_row(name, escape(text))
    return table


def _first_token_s(replies: Sequence[Reply]) -> float:
    return statistics.median(reply.first_token_s for reply in replies)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms"


def _traffic(traffic: Traffic, size: Size) -> str:
    if not traffic.blocks:
        return "nothing"
    nbytes = traffic.blocks * size.block_bytes
    rate = nbytes / traffic.seconds / 1e9
    return f"{traffic.blocks} blocks, {nbytes / (1 << 20):,.1f} MiB, {rate:.2f} GB/s"


def _shared(first: Report, second: Report) -> str:
    could = sum(_leading(reply.wanted, first.stored_keys) for reply in second.replies)
    used = sum(reply.loaded for reply in second.replies)
    return f"{used} of the {could} that the prompts share were used"


def _leading(keys: Sequence[bytes], stored: frozenset[bytes]) -> int:
    return next((n for n, key in enumerate(keys) if key not in stored), len(keys))


def _verdict(console: Console, first: Report, second: Report) -> int:
    """Say whether kvgds changed anything; return the exit status."""
    for failure in second.failures:
        console.print(f"a block did not load and was computed instead: {failure}", markup=False)
    served = [*first.replies, *second.replies]
    wrong = list(differences(served, second.plain))
    for line in wrong:
        console.print(line, markup=False)
    if wrong:
        return _fail(console, "kvgds changed what the model says")
    if not any(reply.loaded for reply in second.replies):
        return _fail(console, "the new process could use nothing of what the first stored")
    tokens = sum(len(reply.tokens) for reply in served)
    console.print(
        f"[green]equal[/green]: {tokens} tokens of {len(served)} prompts, and all their logits, "
        "are bit for bit those of a run without kvgds"
    )
    return 0


def _fail(console: Console, why: str) -> int:
    console.print(f"[red]failed[/red]: {escape(why)}")
    return 1
