"""The command line. Reads arguments and prints; what there is to do is done elsewhere.

Results go to standard output, errors and progress to standard error. Exit status 1: it did
not work, or a check found something; 2: it was called wrongly; 130: it was interrupted. What
can be expected to go wrong is one line that starts with ``error:``; a wrong call is told by
typer, in a box below the usage. A traceback is a bug.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import os
import re
import shutil
import sqlite3
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

from kvgds._starting import INTERRUPTED, end_at_once, end_in_order
from kvgds.arguments import (
    MOST,
    UNITS,
    configured,
    parse_age,
    parse_directory,
    parse_size,
    place,
)
from kvgds.errors import ConfigError, KvgdsError, explain
from kvgds.upkeep.records import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvgds.bench.measure import Row
    from kvgds.config import ObjectTier
    from kvgds.doctor import Diagnosis, Part
    from kvgds.replay import Latency, Result
    from kvgds.upkeep import Listing, Report, Retention

_SHOWN = 50  # problems printed one by one; --json has all
_LEAST_BENCH = 8 << 10  # two of its smallest blocks
_BENCH_ROOM = 512 << 20  # slabs are made whole


class _Group(TyperGroup):
    """Commands whose expected errors are told in one line."""

    def main(self, *args: Any, **settings: Any) -> Any:  # noqa: ANN401 - typer's own signature
        """Run what the command line says, its --help and --version too."""
        try:  # typer itself ends quietly when whoever read the output has gone
            return super().main(*args, **settings)
        except (KvgdsError, OSError, sqlite3.Error) as error:
            typer.echo(f"error: {_told(error)}", err=True)
            raise SystemExit(1) from None


def _told(error: Exception) -> str:
    if type(error).__module__ == "builtins" and isinstance(error, OSError):
        return explain(error)
    return "; ".join(line.strip() for line in str(error).splitlines())


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="kvgds moves the KV cache of LLM servers between memory and storage.",
)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    if not os.environ.get("COLUMNS", "80").strip("0"):
        del os.environ["COLUMNS"]  # of 0, as some schedulers of jobs have it, nothing is printed
    try:
        end_in_order()
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        end_at_once()


# --- arguments ----------------------------------------------------------------------------


@contextmanager
def _options(**names: str) -> Iterator[None]:
    """Tell a wrong setting that an option gave as a wrong call, by the option's name."""
    try:
        yield
    except ConfigError as error:
        option = names.get(re.sub("^(File|Object)Tier[.]", "", error.field))
        if option is None:
            raise
        raise typer.BadParameter(error.rule, param_hint=option) from None


Where = Annotated[
    str, typer.Argument(help="Directory of blocks, or s3://BUCKET/PREFIX.", show_default=False)
]
Config = Annotated[
    Path | None, typer.Option(help="TOML file with the bucket's settings; KVGDS_* count too.")
]
Endpoint = Annotated[str | None, typer.Option(help="The bucket's server, if it is not AWS.")]
Region = Annotated[str | None, typer.Option(help="The bucket's region.")]
CaBundle = Annotated[Path | None, typer.Option(help="PEM file of authorities to trust.")]


def _size(*names: str, help: str) -> Any:  # noqa: A002, ANN401 - typer's own
    """An option that is a size; what it is if it is not given, its help says."""
    return typer.Option(*names, parser=parse_size, metavar="SIZE", show_default=False, help=help)


def _directory(help: str) -> Any:  # noqa: A002, ANN401 - see _size
    """An option that is the path of a directory."""
    return typer.Option(parser=parse_directory, metavar="PATH", help=help)


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Named = Annotated[
    str | None,
    typer.Option(
        help="Only this namespace: its model (* and ? work), or 8 or more digits of its digest."
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from kvgds import __version__

        typer.echo(f"kvgds {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and end."
        ),
    ] = False,
) -> None:
    """Options of every command."""


# --- printing -----------------------------------------------------------------------------


def size_text(nbytes: int) -> str:
    """A size for people."""
    power = min((int(nbytes).bit_length() - 1) // 10, len(UNITS)) if nbytes else 0
    if not power:
        return f"{nbytes:,} B"
    return f"{nbytes / (1 << 10 * power):,.1f} {UNITS[power - 1]}iB"


def _print_json(found: object) -> None:
    typer.echo(json.dumps(found, indent=2))


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, emoji=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), title_justify="left", show_header=bool(columns))
    for column in columns or ("", ""):
        table.add_column(column, overflow="fold", justify="left")
    return table


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Bars on standard error, if that is a terminal."""
    console = Console(stderr=True, emoji=False)
    if not console.is_terminal:
        yield lambda *_: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=console, transient=True)
    tasks: dict[str, Any] = {}

    def told(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)

    with bars:
        yield told


# --- doctor -------------------------------------------------------------------------------


@app.command()
def doctor(
    *,
    root: Annotated[
        str | None, typer.Option(help="Look at this directory, or s3://BUCKET/PREFIX, as well.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file; KVGDS_* override it.")] = None,
    endpoint: Endpoint = None,
    region: Region = None,
    ca_bundle: CaBundle = None,
    as_json: AsJson = False,
) -> None:
    """Say how bytes would move on this machine, what is missing, and how to get it."""
    from kvgds.config import FileTier, ObjectTier
    from kvgds.doctor import diagnose

    tiers = list(configured(config))
    is_bucket = root is not None and root.startswith("s3://")
    has_bucket = any(isinstance(tier, ObjectTier) for tier in tiers)
    settings = config if is_bucket and has_bucket else None
    where = _place(
        os.curdir if root is None else root, settings, endpoint, region, ca_bundle, name="--root"
    )
    if root is not None:
        here = (
            where if isinstance(where, ObjectTier) else FileTier(root=where, capacity_bytes=1 << 30)
        )
        tiers += [here] if here not in tiers else []
    found = diagnose(tiers)
    if as_json:
        _print_json(dataclasses.asdict(found))
    else:
        _print_diagnosis(found)
    raise typer.Exit(0 if found.ok else 1)


def _place(
    where: str,
    config: Path | None,
    endpoint: str | None,
    region: str | None,
    ca_bundle: Path | None,
    *,
    name: str = "WHERE",
) -> Path | ObjectTier:
    names = {"bucket": name, "prefix": name, "endpoint": "--endpoint", "region": "--region"}
    with _options(**names, ca_bundle="--ca-bundle"):
        return place(where, config, endpoint, region, ca_bundle)


def _print_diagnosis(found: Diagnosis) -> None:
    versions = ", ".join(f"{name} {text or 'missing'}" for name, text in found.versions.items())
    table = _table(versions, "", "", "")
    table.show_header = False
    for name, part in (
        ("NIXL", found.nixl),
        ("huge pages", found.huge_pages),
        ("GPU", found.gpu),
        *((root.root, root) for root in found.roots),
        *((bucket.bucket, bucket) for bucket in found.buckets),
    ):
        table.add_row(escape(name), _state(part), escape(_part_text(part)))
    _console().print(table)


def _state(part: Part) -> str:
    if not part.ok:
        return "[red]broken[/red]"
    if not part.used:
        return "not used"
    return "[yellow]could be better[/yellow]" if part.refused else "[green]ok[/green]"


def _part_text(part: Part) -> str:
    lines = [part.summary]
    lines += [f"because {line}" for line in part.evidence]
    for way in part.refused:
        lines += [f"not {way.what}: {way.why}"] if way.why != part.summary else []
        lines += [f"  to change that: {way.fix}"] if way.fix != way.why else []
    return "\n".join(lines)


# --- ls, fsck, gc ---------------------------------------------------------------------------


@app.command("ls")
def list_blocks(
    where: Where,
    *,
    as_json: AsJson = False,
    limit: Annotated[
        int,
        typer.Option(
            min=0,
            max=MOST,
            help="Also list so many blocks, latest used (in a bucket: stored) first.",
        ),
    ] = 0,
    namespace: Named = None,
    config: Config = None,
    endpoint: Endpoint = None,
    region: Region = None,
    ca_bundle: CaBundle = None,
) -> None:
    """List what a directory or bucket holds; also beside running engines."""
    from kvgds.upkeep import listing

    root = _place(where, config, endpoint, region, ca_bundle)
    with _progress() as told:
        found = listing(root, namespace=namespace, limit=limit, progress=told)
    if as_json:
        _print_json(dataclasses.asdict(found))
    elif namespace is not None and not found.namespaces:
        typer.echo(f"{found.root}: no namespace that has blocks matches {namespace!r}")
    else:
        _print_listing(found)


def _print_listing(found: Listing) -> None:
    size = size_text(found.allocated_bytes)
    title = f"{found.root}: layout {found.layout}, {size} allocated"
    bucket = found.layout == "objects"
    if bucket:
        title = f"{found.root}: {size}"
    if bucket and not found.namespaces:
        title += ", no blocks; if engines use a prefix, name that as well"
    if found.quarantined:
        title += f", {counted(found.quarantined, 'place')} in quarantine (kvgds fsck --repair)"
    taken = "stored" if bucket else "on disk"
    table = _table(title, "namespace", "digest", "blocks", "payload", taken, "block sizes")
    for use in found.namespaces:
        sizes = [f"{size_text(nbytes)} x {count:,}" for nbytes, count in use.sizes.items()]
        table.add_row(
            escape(_named(use.fields)),
            use.digest[:8],
            f"{use.blocks:,}",
            size_text(use.nbytes),
            size_text(use.disk_bytes),
            "\n".join(sizes),
        )
    console = _console()
    console.print(table)
    if not found.entries:
        return
    table = _table("blocks", "key", "namespace", "bytes", "place")
    for entry in found.entries:
        table.add_row(entry.key, entry.namespace[:8], f"{entry.nbytes:,}", entry.place)
    console.print(table)


def _named(fields: dict[str, object]) -> str:
    if not fields:
        return "(not known)"
    about = fields.get
    return (
        f"{about('model')} @ {about('revision')}, {about('layout')} {about('dtype')}, "
        f"{about('block_tokens')} tokens, rank {about('rank')} of {about('world')}"
    )


@app.command()
def fsck(
    where: Where,
    *,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Drop what is wrong; in a bucket, put it into quarantine/."),
    ] = False,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="Make a new index from the stamps in the slabs (not with layout files); the old "
            "one is kept aside. Brings back blocks that were dropped (gc, eviction, delete) if "
            "nothing has overwritten them yet; leaves out those without a checksum.",
        ),
    ] = False,
    stamps_only: Annotated[
        bool, typer.Option("--stamps-only", help="Of a bucket: read no payloads.")
    ] = False,
    as_json: AsJson = False,
    config: Config = None,
    endpoint: Endpoint = None,
    region: Region = None,
    ca_bundle: CaBundle = None,
) -> None:
    """Read every block and check it. No engine may have a directory of slabs meanwhile."""
    from kvgds.upkeep import fsck as check

    root = _place(where, config, endpoint, region, ca_bundle)
    names = {"rebuild": "--rebuild", "stamps_only": "--stamps-only"}
    with _options(**names), _progress() as told:
        report = check(root, repair=repair, rebuild=rebuild, stamps_only=stamps_only, progress=told)
    if as_json:
        _print_json({**dataclasses.asdict(report), "clean": report.clean})
    else:
        _print_report(report, rebuilt=rebuild)
    raise typer.Exit(0 if report.clean else 1)


def _print_report(report: Report, *, rebuilt: bool) -> None:
    for problem in report.problems[:_SHOWN]:
        fate = "repaired" if problem.repaired else "found"
        typer.echo(f"{fate}: {problem.kind}: {problem.place}: {problem.text}")
    if len(report.problems) > _SHOWN:
        typer.echo(f"and {len(report.problems) - _SHOWN:,} more; --json has all")
    if report.unproven:
        blocks = counted(report.unproven, "block")
        typer.echo(f"left out, for want of a checksum that proves them: {blocks}")
    if report.kept_aside:
        typer.echo(f"the old index is {report.kept_aside}")
    if rebuilt:
        typer.echo("blocks that were dropped, but not overwritten yet, are back too")
    left = sum(not problem.repaired for problem in report.problems)
    done = "in the new index" if rebuilt else "checked"
    verdict = f"{counted(left, 'problem')} left" if left else "clean"
    blocks = counted(report.blocks, "block")
    typer.echo(f"{blocks} ({size_text(report.nbytes)}) {done}: {verdict}")


@app.command()
def gc(
    where: Where,
    *,
    older_than: Annotated[
        float | None,
        typer.Option(
            parser=parse_age,
            metavar="AGE",
            help="Drop what was not used for this long, for example 12h or 7d; of a bucket, what "
            "was stored before that. Not of slabs, which know no times.",
        ),
    ] = None,
    keep_bytes: Annotated[
        int | None,
        _size(
            help="Drop the least recently used blocks beyond this size, of a bucket those stored "
            "first. 100G is 100 GiB."
        ),
    ] = None,
    namespace: Named = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
    config: Config = None,
    endpoint: Endpoint = None,
    region: Region = None,
    ca_bundle: CaBundle = None,
) -> None:
    """Drop blocks: old ones, those beyond a size, or whole namespaces.

    No engine may have a directory of slabs meanwhile, but for --dry-run.
    """
    from kvgds.upkeep import gc as collect

    if older_than is None and keep_bytes is None and namespace is None:
        raise typer.BadParameter("say what goes: --keep-bytes, --older-than or --namespace")
    root = _place(where, config, endpoint, region, ca_bundle)
    with _options(older_than="--older-than"), _progress() as told:
        done = collect(
            root,
            keep_bytes=keep_bytes,
            older_than_s=older_than,
            namespace=namespace,
            dry_run=dry_run,
            progress=told,
        )
    if as_json:
        _print_json(dataclasses.asdict(done))
    else:
        _print_retention(done)
    for message in done.errors:
        typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1 if done.failed else 0)


def _print_retention(done: Retention) -> None:
    what = "object" if done.layout == "objects" else "file"
    verb = "would drop" if done.dry_run else "dropped"
    typer.echo(
        f"{verb} {counted(done.blocks, 'block')} ({size_text(done.nbytes)}), "
        f"{counted(done.files, what)} ({size_text(done.freed_bytes)} given back); "
        f"left: {counted(done.kept_blocks, 'block')} ({size_text(done.kept_bytes)})"
    )
    if done.failed:
        typer.echo(f"could not be dropped: {counted(done.failed, 'block')}")
    if done.layout == "slabs" and done.blocks:
        typer.echo("a slab keeps its file while it holds a block; new blocks use its free slots")


# --- replay, bench and demo -----------------------------------------------------------------


@app.command()
def replay(
    trace: Annotated[Path, typer.Argument(help="File of requests, JSON lines.")],
    *,
    root: Annotated[Path, _directory("Directory for the blocks.")],
    limit: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Only the first so many requests.")
    ] = None,
    block_bytes: Annotated[
        int, _size(help="Size of a block, whole pages; 64K (64 KiB) if not given.")
    ] = 64 << 10,
    capacity: Annotated[int, _size(help="Most bytes of blocks kept; 2G (2 GiB) if not given.")] = 2
    << 30,
    in_flight: Annotated[int, typer.Option(min=1, max=MOST, help="Requests at a time.")] = 8,
    layout: Annotated[str, typer.Option(help="slabs or files.")] = "slabs",
    as_json: AsJson = False,
) -> None:
    """Replay a trace: load what is stored of each request, check every byte, store the rest.

    A trace has a JSON object a line, a request each, with the ids of the
    blocks of its prompt in order: {"hash_ids": [0, 1, 2]}. Equal ids are
    equal blocks, and an id stands for all before it too. Mooncake's traces
    are such files; other fields are ignored.

    A prefix that two requests share while both are in flight can't hit,
    because neither has stored it yet. With --in-flight 1 every prefix that
    was stored before hits.
    """
    from kvgds.replay import Settings
    from kvgds.replay import replay as run

    settings = Settings(root, block_bytes, capacity, in_flight, limit, layout)
    names = {"block_bytes": "--block-bytes", "capacity_bytes": "--capacity", "layout": "--layout"}
    with _options(**names), _progress() as told:
        result = asyncio.run(run(trace, settings, told))
    if as_json:
        _print_json(dataclasses.asdict(result))
    else:
        _print_result(result)
    for message in result.messages:
        typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1 if result.errors else 0)


def _print_result(result: Result) -> None:
    table = _table("replay")
    table.add_row("path", escape(result.path))
    table.add_row("requests", f"{result.requests:,} in {result.seconds:,.1f} s")
    hits, misses = counted(result.hits, "hit"), counted(result.misses, "miss", "misses")
    table.add_row("blocks asked", f"{result.asked:,}: {hits}, {misses}")
    evictions = counted(result.evictions, "eviction")
    table.add_row("hit rate", f"{result.hit_rate:.1%} of blocks; {evictions}")
    table.add_row("loaded", _rate(result.bytes_loaded, result.load_gb_s))
    table.add_row("stored", _rate(result.bytes_stored, result.store_gb_s))
    table.add_row("verified", f"{result.bytes_verified:,} bytes")
    for name in ("prefix", "load_many", "store_many"):
        table.add_row(name, _times(getattr(result, name)))
    table.add_row("errors", f"{result.errors:,}")
    _console().print(table)


def _rate(nbytes: int, gb_s: float) -> str:
    return f"{size_text(nbytes)}, {gb_s} GB/s" if nbytes else "nothing"


def _times(of: Latency) -> str:
    if not of.calls:
        return "not called"
    spread = f"{of.p50_ms:.3f} / {of.p95_ms:.3f} / {of.p99_ms:.3f} ms"
    return f"{counted(of.calls, 'call')}, p50 / p95 / p99: {spread}"


@app.command()
def bench(
    *,
    root: Annotated[
        Path, _directory("Directory on the disk to measure, which gets its room back.")
    ] = Path(),
    gpu: Annotated[
        int | None, typer.Option(min=0, max=63, help="This GPU; the first one if not given.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Runs of each contender.")] = 3,
    nbytes: Annotated[
        int,
        _size(
            "--bytes",
            help="What a run moves at most, and twice the largest block: 256M (256 MiB) if not"
            " given. Takes some five times as much of the disk.",
        ),
    ] = 256 << 20,
    out: Annotated[
        Path | None, typer.Option(help="Write the results here too, a new file of JSON lines.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine's paths beside what its disk and memory can do, in about a minute.

    Contenders take turns; what is told are medians of their runs, and the
    range. A load is ok if its bytes were right, whoever made it.
    """
    if not root.is_dir():
        raise ConfigError("--root", str(root), "must be a directory; make it first")
    if nbytes < _LEAST_BENCH:
        raise typer.BadParameter("--bytes: at least 8K, two of the smallest blocks")
    free, needed = shutil.disk_usage(root).free, 5 * nbytes + _BENCH_ROOM
    if free < needed:
        rule = f"has {size_text(free)} free; give it {size_text(needed)}, or less --bytes"
        raise ConfigError("--root", str(root), rule)
    from kvgds.bench import ending
    from kvgds.bench.quick import Scale, first_gpu, quick
    from kvgds.bench.table import print_rows

    rows: list[Row] = []

    async def run(keep: Callable[[str], object]) -> None:
        chosen = first_gpu() if gpu is None else gpu
        with _progress() as told:
            async for row in quick(root, chosen, Scale(nbytes, rounds), told):
                rows.append(row)
                keep(f"{json.dumps(row)}\n")

    with _kept(out) as keep:
        ending.run(run(keep))
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row))
    else:
        print_rows(rows, _console())


@app.command()
def demo(
    root: Annotated[Path | None, _directory("Directory for the blocks.")] = None,
) -> None:
    """Serve prompts with a small random model, exit, and go on from its blocks in a new process."""
    from kvgds.demo import run

    raise typer.Exit(run(root, Console()))


@contextmanager
def _kept(out: Path | None) -> Iterator[Callable[[str], object]]:
    """What adds to a file that is not there yet. One to which nothing was added is removed."""
    if out is None:
        yield lambda _: None
        return
    with open(out, "x", encoding="utf-8", buffering=1) as file:
        try:
            yield file.write
        finally:
            if not file.tell():
                out.unlink()
