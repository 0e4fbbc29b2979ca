"""Rows as a table for people."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from rich.markup import escape

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from kvgds.bench.measure import Row

_HEADER = ("GB/s", "range", "of limit", "p50", "p99 ms", "late ms", "CPU s/GiB", "ok")
_WIDTHS = (7, 16, 8, 7, 7, 7, 9, 14)
_FOOT = """
of limit: of the fastest of the rows below, up to the next engine's, or of a GPU's copies; p50,
p99: one block, ms; late: a ticker on the event loop, p99; ok: blocks that came right, of those
asked for. Medians of runs and their range."""


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Print a machine's report and its rows, cell by cell."""
    report, *measured = rows
    machine = report["machine"]
    for name in ("cpu", "cores", "kernel", "filesystem", "disk", "gpu", "huge_pages"):
        console.print(f"{name.replace('_', ' ')}: {escape(str(machine[name]))}")
    for plan in machine["plan"]:
        console.print(escape(plan))
    for cell, there in itertools.groupby(measured, _cell):
        console.print(f"\n[bold]{escape(cell)}[/bold]\n{'':27}{_line(_HEADER)}")
        for line in _lines(list(there)):
            console.print(line)
    console.print(_FOOT)


def _cell(row: Row) -> str:
    what = f"{row['memory']} memory, {row['scenario']}"
    cut = f" of {row['fragments']} fragments" if row["fragments"] > 1 else ""
    size = size_text(row["block"])
    where = f", {row['in_flight']} in flight, {row['cache']}" if row["scenario"] != "copy" else ""
    return f"{what} of {size} blocks{cut}{where}"


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    bounds = [row for row in rows if row["kind"] == "limit" and row["succeeded"] == row["asked"]]
    for row in rows:
        ours = row["kind"] == "engine"
        mine = [each["GB/s"] for each in bounds if each["slots"] in (None, row["slots"])]
        limit = max(mine, default=0.0)
        name = f"  {escape(row['contender']):<25}"
        cells = (
            _number(row["GB/s"]),
            " - ".join(map(_number, row["spread"])),
            f"{row['GB/s'] / limit:.2f}" if ours and limit else "",
            _number(row["p50_ms"]),
            _number(row["p99_ms"]),
            _number(row["late_p99_ms"]),
            _number(row["cpu_s_per_GiB"]),
            f"{row['succeeded']:,} of {row['asked']:,}" if row["asked"] else "",
        )
        line = f"{f'[green]{name}[/green]' if ours else name}{_line(cells)}"
        yield f"[red]{line}[/red]" if row["succeeded"] < row["asked"] else line


def _line(cells: Sequence[str]) -> str:
    return "".join(f" {cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


def _number(value: Any) -> str:  # noqa: ANN401 - or nothing
    """Three digits."""
    if not value:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"  # noqa: PLR2004 - digits


def size_text(nbytes: int) -> str:
    """64 KiB, 2.25 MiB."""
    unit, name = (1 << 20, "MiB") if nbytes >= 1 << 20 else (1 << 10, "KiB")
    return f"{nbytes / unit:g} {name}"
