"""From results to plots, a page that puts them together, and tables.

    python bench/report.py RESULTS.jsonl ... [--out DIR] [--markdown]

Each run in the files, that is a machine's report and the rows below it, gets a section of its own:
`index.html`, one page with nothing to fetch, and its plots as SVG beside it. `--markdown` prints
tables instead.

A contender that did not do all it was asked is shown with its count, and is nobody's measure. What
is faster is so by more than the noise: the ranges of both over their runs don't overlap, and each
has three runs or more.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import sys
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from kvgds._starting import INTERRUPTED
from kvgds.bench.table import size_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from matplotlib.axes import Axes

    Row = dict[str, Any]

CELL = (
    *("scenario", "memory", "block", "fragments", "in_flight", "direction", "cache"),
    *("filesystem", "capacity"),
)
NEEDED = ("contender", "kind", "rounds", "GB/s", "spread", "succeeded", "asked")
COLUMNS = {
    "GB/s": "GB/s",
    "of limit": "of_limit",
    "of peer": "of_peer",
    "p50 ms": "p50_ms",
    "p95 ms": "p95_ms",
    "p99 ms": "p99_ms",
    "late ms": "late_p99_ms",
    "CPU s/GiB": "cpu_s_per_GiB",
    "verified": "verified",
    "tier": "tier",
    "path": "path",
}
"""Of every table; what else its rows say comes behind, and last how many blocks came right."""
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5539", "#5a189a")
LIMIT, OURS = "#8a8a8a", "#d55e00"
DASHES, MARKERS = ("-", "--", ":", "-."), (".", "s", "^", "x", "D")
LEAST = 3
"""Runs of which a range says something of the noise."""


class Unreadable(Exception):
    """A file of results that is none."""


@dataclass
class Run:
    """A machine, and what was measured on it."""

    source: str
    machine: dict[str, Any]
    rows: list[Row]

    def cells(self) -> Iterator[tuple[Row, list[Row]]]:
        """What rows have in common, and those rows."""
        keyed = [(tuple(row.get(name) for name in CELL), row) for row in self.rows]
        for key in dict.fromkeys(key for key, _ in keyed):
            cell = dict(zip(CELL, key, strict=True))
            yield cell, [row for other, row in keyed if other == key]


def read(path: Path) -> list[Run]:
    """The runs in a file.

    Raises:
        Unreadable: it is no file of results.
    """
    runs: list[Run] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise Unreadable(f"{where}: not JSON: {error}") from None
        if isinstance(row, dict) and "machine" in row:
            runs.append(Run(path.name, row["machine"], []))
            continue
        if not runs:
            raise Unreadable(f"{where}: a machine's report must come first")
        missing = [n for n in (*CELL[:-1], *NEEDED) if not isinstance(row, dict) or n not in row]
        if missing:
            raise Unreadable(f"{where}: no {', '.join(missing)} in this row")
        runs[-1].rows.append(row)
    if not runs:
        raise Unreadable(f"{path}: it is empty")
    return runs


# --- judging --------------------------------------------------------------------------------


def whole(row: Row) -> bool:
    """Whether everything succeeded."""
    return bool(row["succeeded"] == row["asked"] and row["asked"])


def best(rows: Iterable[Row], kind: str) -> Row | None:
    """The fastest of its kind, of those that did all they were asked."""
    return max(
        (row for row in rows if row["kind"] == kind and whole(row)),
        key=lambda row: row["GB/s"],
        default=None,
    )


def ratio(row: Row, base: Row | None) -> float | None:
    """Of medians."""
    return row["GB/s"] / base["GB/s"] if base is not None and base["GB/s"] else None


def faster(row: Row, other: Row) -> bool:
    """By more than the noise."""
    return judged(row) and judged(other) and bool(row["spread"][0] > other["spread"][1])


def judged(row: Row) -> bool:
    """Whether it has runs enough to tell what is noise."""
    return bool(row["rounds"] >= LEAST)


def lost(run: Run) -> list[str]:
    """Cells in which a peer is faster than every engine that does as it does, and by how much."""
    found = []
    for cell, rows in run.cells():
        if cell["scenario"] == "ticker":  # not about rates
            continue
        peer, ours = best(rows, "peer"), best(rows, "engine")
        if peer is not None and ours is not None and faster(peer, ours):
            times = peer["GB/s"] / ours["GB/s"]
            found.append(
                f"{cell_text(cell)}: {peer['contender']} {times:.2f} times {ours['contender']}"
            )
    return found


# --- words ----------------------------------------------------------------------------------


def cell_text(cell: Row) -> str:
    """What a cell is about."""
    way = f" {cell['direction']}" if cell["direction"] != cell["scenario"] else ""
    cut = f" of {cell['fragments']} fragments" if cell["fragments"] > 1 else ""
    share = f", capacity {cell['capacity']:.0%}" if cell["capacity"] else ""
    where = f"{cell['filesystem']}, {cell['cache']}".replace("tmpfs, tmpfs", "tmpfs")
    memory = "GPU memory, " if cell["memory"] == "gpu" else ""
    what = f"{memory}{size_text(cell['block'])}{cut}"
    return f"{cell['scenario']}{way}, {what}, {cell['in_flight']} in flight{share}, {where}"


def told(value: Any) -> str:  # noqa: ANN401 - of a row
    """Numbers with three digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " - ".join(map(told, value))
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: Sequence[Row]) -> list[list[str]]:
    """The head, then a line a contender."""
    usual = {*CELL, *NEEDED, *COLUMNS.values()}
    every = ((name, value) for row in rows for name, value in row.items() if name not in usual)
    others = dict.fromkeys(name for name, value in every if value is not None)
    peer = best(rows, "peer")
    lines = [["", *COLUMNS, *(name.replace("_", " ") for name in others), "ok"]]
    for row in rows:
        ours = row["kind"] == "engine"
        there = (each for each in rows if each.get("slots") in (None, row.get("slots")))
        ratios = {
            "of_limit": ratio(row, best(there, "limit")) if ours else None,
            "of_peer": ratio(row, peer) if ours else None,
        }
        cells = [told({**row, **ratios}.get(name)) for name in (*COLUMNS.values(), *others)]
        cells[0] += f" ({told(row['spread'])})"
        count = f"{row['succeeded']:,} of {row['asked']:,}" if row["asked"] else ""
        lines.append([row["contender"], *cells, told(row["asked"]) if whole(row) else count])
    return lines


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """The report, a line an entry."""
    flat = {key: value for key, value in machine.items() if not isinstance(value, dict | list)}
    lines = [f"{key.replace('_', ' ')}: {value}" for key, value in flat.items()]
    versions = machine.get("versions", {})
    return [*lines, "versions: " + ", ".join(f"{name} {text}" for name, text in versions.items())]


def markdown(runs: Sequence[Run]) -> str:
    """Tables to be pasted."""
    parts = []
    for run in runs:
        parts += [f"## {run.source}", "; ".join(machine_lines(run.machine))]
        for cell, rows in run.cells():
            head, *lines = table(rows)
            whole_table = [head, ["---"] * len(head), *lines]
            text = "\n".join(f"| {' | '.join(each)} |" for each in whole_table)
            parts += [f"**{cell_text(cell)}**", text]
        parts += [f"Faster than kvgds by more than noise: {text}" for text in lost(run)]
    return "\n\n".join(parts) + "\n"


# --- plots ----------------------------------------------------------------------------------


@dataclass
class Plot:
    """A figure and what it shows, in words too."""

    name: str
    title: str
    svg: str


def plots(run: Run) -> Iterator[Plot]:
    """Those that a run has rows for."""
    sized = [row for row in run.rows if row["scenario"] in ("store", "load", "peers")]
    first = next((row["contender"] for row in sized if row["kind"] == "engine"), None)
    # The same limits in a rival's slots would only hide the others.
    sized = [r for r in sized if r["kind"] != "limit" or r.get("slots") in (None, first)]
    ways = {(r["scenario"], r["direction"], r["in_flight"], r["cache"]) for r in sized}
    for scenario, way, in_flight, cache in sorted(ways):
        key = (scenario, way, in_flight, cache)
        mine = [
            row
            for row in sized
            if (row["scenario"], row["direction"], row["in_flight"], row["cache"]) == key
            and row["fragments"] == 1
        ]
        if len({row["block"] for row in mine}) > 1:
            kind = "against peers" if scenario == "peers" else "against the machine's limits"
            title = f"{way.capitalize()}s {kind}, {in_flight} in flight, {cache}"
            name = f"{scenario}-{way}-{in_flight}-{cache}".replace(", ", "-").replace(" ", "-")
            yield _by_size(name, title, mine)
    replays = [row for row in run.rows if row["scenario"] == "replay"]
    if replays:
        yield _replays(replays)


def _by_size(name: str, title: str, rows: Sequence[Row]) -> Plot:
    figure, (rates, times) = _figure(2)
    styles = _styles(rows)
    for contender, style in styles.items():
        mine = sorted((r for r in rows if r["contender"] == contender), key=lambda r: r["block"])
        sizes = [row["block"] for row in mine]
        middle = [row["GB/s"] for row in mine]
        low = [m - row["spread"][0] for m, row in zip(middle, mine, strict=True)]
        high = [row["spread"][1] - m for m, row in zip(middle, mine, strict=True)]
        label = contender if all(map(whole, mine)) else f"{contender} (not all succeeded)"
        rates.errorbar(sizes, middle, [low, high], label=label, capsize=2, **style)
        timed = [(row["block"], row["p99_ms"]) for row in mine if row["p99_ms"]]
        if timed:
            times.plot(*zip(*timed, strict=True), **style)
    for axes, label in ((rates, "GB/s"), (times, "p99 of one operation, ms")):
        _log_sizes(axes, sorted({row["block"] for row in rows}))
        axes.set_ylabel(label)
    rates.set_ylim(bottom=0)
    times.set_yscale("log")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return Plot(name, title, _svg(figure))


def _replays(rows: Sequence[Row]) -> Plot:
    figure, (axes,) = _figure(1)
    for in_flight, dashes in ((1, "-"), (8, ":")):
        mine = [row for row in rows if row["in_flight"] == in_flight]
        points = [(row["capacity"] * 100, row["hit_rate"] * 100) for row in mine]
        label = f"kvgds, {in_flight} in flight"
        axes.plot(*zip(*points, strict=True), dashes, color=OURS, marker="o", label=label)
    ideal = [(r["capacity"] * 100, r["lru_hit_rate"] * 100) for r in rows if r["in_flight"] == 1]
    axes.plot(*zip(*ideal, strict=True), "--", color=LIMIT, marker="x", label="LRU")
    axes.set_xlabel("capacity, % of the trace's footprint")
    axes.set_ylabel("hit rate, % of blocks")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return Plot("replay", "What tiers too small for a trace still hit", _svg(figure))


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Ours strong, limits grey, each peer a colour; no two alike, by dashes or markers."""
    looks = {
        "engine": cycle(product((2.0,), MARKERS, DASHES, (OURS,))),
        "limit": cycle(product((1.2,), MARKERS, DASHES[1:], (LIMIT,))),
        "peer": cycle(product((1.2,), MARKERS, DASHES, COLOURS[1:])),
    }
    names = ("linewidth", "marker", "linestyle", "color")
    kinds = {row["contender"]: row["kind"] for row in rows}
    return {
        contender: dict(zip(names, next(looks.get(kind, looks["peer"])), strict=True))
        for contender, kind in kinds.items()
    }


def _figure(columns: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(9 if columns > 1 else 5, 4.2), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(visible=True, axis="y", color="#dddddd", linewidth=0.6)
    return figure, axes


def _log_sizes(axes: Axes, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    shown = sizes if len(sizes) < 8 else sizes[::2]
    axes.set_xticks(shown, [size_text(each) for each in shown], rotation=45, fontsize=8)
    axes.minorticks_off()


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


# --- the page -------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
figure { margin: 1.5rem 0; background: #fff; border-radius: 6px; padding: .5rem; color: #222; }
figure svg { width: 100%; height: auto; }
figcaption { font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; white-space: nowrap; }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
tr.engine td:first-child { font-weight: 600; }
tr.failed td { color: #c1121f; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
"""


def page(runs: Sequence[Run], drawn: Sequence[Sequence[Plot]]) -> str:
    """Everything in one file."""
    say = html.escape
    parts = ["<!doctype html><html lang='en'><meta charset='utf-8'>"]
    parts += ["<meta name='viewport' content='width=device-width, initial-scale=1'>"]
    parts += [
        "<title>kvgds: benchmarks</title>",
        f"<style>{STYLE}</style>",
        "<h1>kvgds: benchmarks</h1>",
    ]
    for run, its_plots in zip(runs, drawn, strict=True):
        parts.append(f"<h2>{say(run.source)}</h2><p>")
        parts += [f"{say(line)}<br>" for line in machine_lines(run.machine)]
        parts.append("</p>")
        for plot in its_plots:
            image = plot.svg.replace("<svg", f"<svg role='img' aria-label='{say(plot.title)}'", 1)
            parts.append(f"<figure><figcaption>{say(plot.title)}</figcaption>{image}</figure>")
        if any(row["kind"] == "peer" and judged(row) for row in run.rows):
            worse = "".join(f"<li>{say(text)}</li>" for text in lost(run))
            parts.append("<h3>Where a peer is faster by more than noise than every engine</h3>")
            parts.append(f"<ul>{worse}</ul>" if worse else "<p>Nowhere.</p>")
        parts.append(f"<h3>All rows</h3><p>{say(_LEGEND)}</p>")
        parts += [_details(cell, rows) for cell, rows in run.cells()]
    return "".join(parts) + "</html>\n"


_LEGEND = (
    "Medians of the runs, and their range. of limit: of the fastest limit in the cell; of peer: of "
    "the fastest peer. p50, p95, p99: one block, ms. late: a ticker on the event loop, p99, ms. "
    "ok: blocks that came right, of those asked for. Empty: not measured."
)


def _details(cell: Row, rows: Sequence[Row]) -> str:
    say = html.escape
    names, *values = table(rows)
    head = "".join(f"<th>{say(name)}</th>" for name in names)
    lines = []
    for row, line in zip(rows, values, strict=True):
        marks = f"{row['kind']}{'' if whole(row) or not row['asked'] else ' failed'}"
        lines.append(
            f"<tr class='{say(marks)}'>{''.join(f'<td>{say(each)}</td>' for each in line)}</tr>"
        )
    body = f"<table><tr>{head}</tr>{''.join(lines)}</table>"
    summary = f"<summary>{say(cell_text(cell))}</summary>"
    return f"<details>{summary}<div class='scroll'>{body}</div></details>"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench-report"))
    parser.add_argument("--markdown", action="store_true")
    chosen = parser.parse_args()
    mpl.rcParams.update({"svg.hashsalt": "kvgds", "svg.fonttype": "none"})
    try:
        runs = [run for path in chosen.results for run in read(path)]
        if chosen.markdown:
            print(markdown(runs), end="")
        else:
            write(runs, chosen.out)
    except (OSError, UnicodeDecodeError, Unreadable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(runs: Sequence[Run], out: Path) -> None:
    """The page and its plots."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = [list(plots(run)) for run in runs]
    for n, its_plots in enumerate(drawn):
        for plot in its_plots:
            name = f"{n + 1}-{plot.name}.svg" if len(runs) > 1 else f"{plot.name}.svg"
            (out / name).write_text(plot.svg, "utf-8")
    (out / "index.html").write_text(page(runs, drawn), "utf-8")
    print(out / "index.html")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
