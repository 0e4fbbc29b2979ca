"""The report of results: who is compared with whom, and what may not be hidden."""

from __future__ import annotations

import html.parser
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPORT = Path(__file__).parents[1] / "bench" / "report.py"
MACHINE = {"machine": {"cpu": "one <cpu>", "filesystem": "ext4", "versions": {"kvgds": "0.1.0"}}}


def row(contender: str, kind: str, rate: float, **more: Any) -> dict[str, Any]:
    found = {
        "scenario": "load",
        "memory": "host",
        "block": 1 << 20,
        "fragments": 1,
        "in_flight": 16,
        "direction": "load",
        "cache": "O_DIRECT",
        "filesystem": "ext4",
        "contender": contender,
        "kind": kind,
        "verified": kind == "engine",
        "rounds": 5,
        "GB/s": rate,
        "spread": [rate * 0.95, rate * 1.05],
        "p50_ms": 1.5,
        "p99_ms": 3.25,
        "late_p99_ms": None,
        "cpu_s_per_GiB": 0.2,
        "succeeded": 64,
        "asked": 64,
    }
    return found | more


def reported(
    tmp_path: Path, lines: list[Any], *options: str, out: str = "out"
) -> subprocess.CompletedProcess[str]:
    results = tmp_path / "some.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    results.write_text("\n".join(texts), "utf-8")
    command = [sys.executable, "-W", "error", str(REPORT), str(results), *options]
    command += ["--out", str(tmp_path / out)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)


def page_of(tmp_path: Path) -> str:
    return (tmp_path / "out" / "index.html").read_text("utf-8")


def cells_of(markdown: str, contender: str) -> list[str]:
    """The line of a contender: GB/s, of the limit, of the best peer, ..., how many succeeded."""
    (line,) = [each for each in markdown.splitlines() if each.startswith(f"| {contender} |")]
    return [each.strip() for each in line.split("|")[2:-1]]


def test_ratios_are_to_the_best_that_did_all_it_was_asked(tmp_path: Path) -> None:
    rows = [
        row("kvgds", "engine", 3.0),
        row("disk", "limit", 4.0),
        row("slow disk", "limit", 2.0),
        row("peer", "peer", 2.0),
        row("liar", "peer", 199.0, succeeded=0),
    ]
    done = reported(tmp_path, [MACHINE, *rows], "--markdown")
    assert (done.returncode, done.stderr) == (0, "")
    assert cells_of(done.stdout, "kvgds")[:3] == ["3 (2.85 - 3.15)", "0.75", "1.5"]
    assert cells_of(done.stdout, "kvgds")[-1] == "64"
    assert cells_of(done.stdout, "liar")[-1] == "0 of 64"
    assert "Faster than kvgds" not in done.stdout


def test_a_ratio_is_to_what_was_measured_in_the_same_slots(tmp_path: Path) -> None:
    rows = [
        row("kvgds", "engine", 3.0, slots="kvgds"),
        row("disk", "limit", 4.0, slots="kvgds"),
        row("rival", "engine", 3.0, slots="rival"),
        row("other disk", "limit", 6.0, slots="rival"),
        row("copies", "limit", 5.0),
    ]
    for limits, kvgds, rival in ((rows[:4], "0.75", "0.5"), (rows, "0.6", "0.5")):
        done = reported(tmp_path, [MACHINE, *limits], "--markdown")
        assert [cells_of(done.stdout, name)[1] for name in ("kvgds", "rival")] == [kvgds, rival]


def test_what_only_some_rows_tell_is_told(tmp_path: Path) -> None:
    replay = row(
        "kvgds", "engine", 3.0, scenario="replay", hit_rate=0.278, p99_more_spread_ms=[1, 2]
    )
    limit = row("LRU", "limit", 0.0, scenario="replay", trace=None, path="none")
    done = reported(tmp_path, [MACHINE, replay, limit, row("other", "engine", 1.0)], "--markdown")
    head = next(line for line in done.stdout.splitlines() if "hit rate" in line)
    assert head.endswith("| tier | path | hit rate | p99 more spread ms | ok |")
    assert cells_of(done.stdout, "kvgds")[-4:] == ["", "0.278", "1 - 2", "64"]
    assert cells_of(done.stdout, "LRU")[-4:] == ["none", "", "", "64"]
    assert len(cells_of(done.stdout, "other")) == len(cells_of(done.stdout, "LRU")) - 2
    reported(tmp_path, [MACHINE, replay])
    assert "<th>hit rate</th>" in page_of(tmp_path)


@pytest.mark.parametrize(
    ("rate", "rounds", "is_told"), [(3.2, 5, False), (3.5, 3, True), (3.5, 2, False)]
)
def test_a_peer_is_faster_only_beyond_the_noise(
    tmp_path: Path, rate: float, rounds: int, *, is_told: bool
) -> None:
    rows = [row("kvgds", "engine", 3.0), row("peer", "peer", rate, rounds=rounds)]
    done = reported(tmp_path, [MACHINE, *rows], "--markdown")
    assert ("Faster than kvgds by more than noise: load, 1 MiB" in done.stdout) is is_told


def test_what_may_not_be_compared_is_not(tmp_path: Path) -> None:
    rows = [
        row("kvgds", "engine", 3.0),
        row("peer", "peer", 9.0, cache="page cache, warm"),
        row("disk", "limit", 9.0, in_flight=1),
    ]
    other = {"machine": MACHINE["machine"] | {"cpu": "another"}}
    done = reported(tmp_path, [MACHINE, *rows, other, row("fast", "limit", 99.0)], "--markdown")
    assert cells_of(done.stdout, "kvgds")[1:3] == ["", ""]
    assert done.stdout.count("## some.jsonl") == 2


def test_no_two_lines_of_a_plot_look_alike() -> None:
    rows = [row(f"{kind} {n}", kind, 3.0) for kind in ("engine", "limit", "peer") for n in range(9)]
    styles = runpy.run_path(str(REPORT))["_styles"](rows)
    assert len({tuple(style.values()) for style in styles.values()}) == len(rows)


@pytest.mark.parametrize("out", ["some.jsonl", "some.jsonl/out"])
def test_a_place_where_no_report_can_be_is_told_in_one_line(tmp_path: Path, out: str) -> None:
    rows = [MACHINE, row("kvgds", "engine", 3.0)]
    done = reported(tmp_path, rows, out=out)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_report_that_is_interrupted_ends_without_a_traceback(tmp_path: Path) -> None:
    pipe = tmp_path / "results"
    os.mkfifo(pipe)
    command = [sys.executable, str(REPORT), str(pipe)]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process,
        pipe.open("w"),  # which waits until it reads
    ):
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=40)
    assert (process.returncode, errors) == (130, "")


class Checked(html.parser.HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, _: Any) -> None:
        if tag not in ("meta", "br", "html"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "html":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_holds_everything_and_is_the_same_each_time(tmp_path: Path) -> None:
    sizes = [1 << 16, 1 << 20]
    rows = [
        row(n, k, 3.0, block=b) for b in sizes for n, k in (("kvgds", "engine"), ("<b>", "peer"))
    ]
    replay = row("kvgds", "engine", 0.1, scenario="replay", direction="both", in_flight=1)
    replays = [
        replay | {"capacity": share, "hit_rate": share / 2, "lru_hit_rate": share}
        for share in (0.1, 0.5)
    ]
    pages = []
    for _ in range(2):
        done = reported(tmp_path, [MACHINE, *rows, *replays])
        assert (done.returncode, done.stderr) == (0, "")
        pages.append((tmp_path / "out/index.html").read_text("utf-8"))
    assert pages[0] == pages[1]
    checked = Checked()
    checked.feed(pages[0])
    assert checked.open == []
    text = "".join(checked.text)
    assert "<b>" in text
    assert "cpu: one <cpu>" in text
    assert not re.search(r"""(src|href)=["']?http|url\(http|<script""", pages[0])
    names = {path.name for path in (tmp_path / "out").glob("*.svg")}
    assert names == {"load-load-16-O_DIRECT.svg", "replay.svg"}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "some.jsonl: it is empty"),
        ([row("kvgds", "engine", 1.0)], "line 1: a machine's report must come first"),
        ([MACHINE, "{"], "line 2: not JSON"),
        ([MACHINE, {"scenario": "load"}], "line 2: no memory, block"),
        ([MACHINE, "3"], "line 2: no scenario, memory"),
    ],
)
def test_what_is_no_file_of_results_is_refused_in_one_line(
    tmp_path: Path, lines: list[Any], said: str
) -> None:
    done = reported(tmp_path, lines)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
