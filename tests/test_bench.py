"""The benches run, on few blocks: whoever needs a number should not have to mend them first."""

from __future__ import annotations

import asyncio
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from rich.console import Console

from kvgds.bench import ending, limits
from kvgds.bench.blocks import Content
from kvgds.bench.machine import report
from kvgds.bench.measure import Contender, Sample, alternate
from kvgds.bench.table import print_rows
from kvgds.blocks import PAGE
from simulator import environment
from support import heard

if TYPE_CHECKING:
    from kvgds.bench.measure import Row

BENCH = Path(__file__).parents[1] / "bench"
PACKAGE = Path(__file__).parents[1] / "src" / "kvgds"
SCENARIOS = {
    "files.py": {
        *("copy", "store", "load", "batch", "pages", "mixed", "burst", "evict", "ticker", "busy"),
        "prefix",
        "peers",
    },
    "gpu.py": {"fragments", "decode"},
    "objects.py": {
        *("objects", "stack: stores acknowledged", "stack: into the bucket", "stack: promotion"),
    },
}
NO_PEERS = "peers: none is here; python bench/peers.py makes them\n"
FIELDS = {
    *("scenario", "memory", "block", "fragments", "in_flight", "direction", "cache", "filesystem"),
    *("contender", "kind", "tier", "path", "verified", "slots", "rounds", "GB/s", "spread"),
    *("p50_ms", "p95_ms", "p99_ms", "cpu_s_per_GiB", "late_p99_ms", "succeeded", "asked", "note"),
}


def rows_of(
    folder: Path, *command: str, env: dict[str, str] | None = None, told: str = ""
) -> list[dict[str, Any]]:
    """What a bench says of this machine, and then its rows; its failure is ours."""
    out, root = folder / "out.jsonl", folder / "root"
    root.mkdir()
    whole = [sys.executable, "-W", "error", *command, "--root", str(root), "--out", str(out)]
    done = subprocess.run(whole, capture_output=True, text=True, check=False, timeout=50, env=env)
    assert (done.returncode, done.stderr) == (0, told)
    assert list(root.iterdir()) == []  # what it took of the disk, it gives back
    rows: list[dict[str, Any]] = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert "cpu" in rows[0]["machine"]
    assert all(set(row) >= FIELDS for row in rows[1:])
    assert [row["asked"] for row in rows[1:]] == [row["succeeded"] for row in rows[1:]]
    assert any(row["asked"] for row in rows[1:])
    return rows


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("files.py", ("--peers", "/nonexistent")),
        ("gpu.py", ("--gpu", "none")),
        (
            "objects.py",
            ("--server", "memory", "--only", "objects,stack", "--peers", "/nonexistent"),
        ),
    ],
)
def test_all_that_is_asked_for_succeeds(
    tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    told = NO_PEERS if name == "files.py" else ""
    _, *rows = rows_of(tmp_path, str(BENCH / name), "--quick", *options, told=told)
    assert {row["scenario"] for row in rows} == SCENARIOS[name]
    if name == "gpu.py":  # nobody shall take this for what a GPU does
        assert all("nothing here is about a GPU" in row["note"] for row in rows)
    if name == "objects.py":  # of which each tells by what ways its engine's bytes went
        ways = {row["contender"]: (row["tier"], row["path"]) for row in rows}
        assert ways["kvgds, obstore"] == ("bucket", "bounce obstore")
        assert ways["kvgds, stack"][0] == "slabs, bucket"
        assert ways["kvgds, stack"][1].startswith("direct POSIX/")
        assert ways["kvgds, stack"][1].endswith(", bounce OBJ")
    evictions = {row["contender"]: row["evictions"] for row in rows if "evictions" in row}
    if name == "files.py":  # what a plan says of most blocks is not what became of these
        sizes = [row for row in rows if row["scenario"] in ("store", "load")]
        taken = {(row["fragments"], row["path"].split()[0]) for row in sizes if row["tier"]}
        assert taken == {(1, "direct"), (64, "bounce")}
        assert evictions["kvgds, with room"] == 0 < evictions["kvgds, full"]


def test_the_command_measures_this_machine(tmp_path: Path) -> None:
    options = ("--rounds", "1", "--bytes", "1000001", "--json")  # no pages
    _, *rows = rows_of(tmp_path, "-m", "kvgds", "bench", *options)
    assert {row["scenario"] for row in rows} == {"copy", "store", "load", "ticker"}
    assert {row["kind"] for row in rows} == {"engine", "limit"}
    ours = [row for row in rows if row["contender"] == "kvgds"]
    assert all(row["path"].startswith("direct POSIX/") and row["verified"] for row in ours)
    assert all(row["late_p99_ms"] is not None for row in ours if row["scenario"] == "ticker")
    moved = [row for row in rows if row["scenario"] in ("store", "load")]
    for engine in ("kvgds", "kvgds, no checksum"):  # each beside what its own slots take
        there = [row for row in moved if row["slots"] == engine]
        assert {row["kind"] for row in there} == {"engine", "limit"}
        assert {row["contender"] for row in there if row["kind"] == "engine"} == {engine}


async def test_only_who_has_something_to_warm_up_runs_once_more() -> None:
    ran: list[str] = []

    def contender(name: str, *, anew: bool) -> Contender:
        async def run() -> Sample:
            ran.append(name)
            return Sample(asked=len(ran))

        return Contender(name, run, anew=anew)

    both = [contender("kept", anew=False), contender("anew", anew=True)]
    runs = await alternate(both, 3)
    assert ran == ["kept", "anew", "kept", "kept", "anew", "anew", "kept"]
    assert [[sample.asked for sample in samples] for _, samples in runs] == [[3, 4, 7], [2, 5, 6]]


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not here")
@pytest.mark.parametrize("in_flight", [1, 16])
def test_fio_goes_through_all_slabs(tmp_path: Path, in_flight: int) -> None:
    """Else it would measure one part of a disk, over and over."""
    paths = [tmp_path / f"{n}: slab" for n in range(4)]
    for path in paths:
        path.write_bytes(bytes(16 * PAGE + PAGE // 2))
    disk = limits.Disk(Content(PAGE, 60), paths, direct=False)
    try:
        contender = limits.fio(disk, "aio", in_flight, store=True)
        assert contender is not None
        sample = asyncio.run(cast("Any", contender.run()))
    finally:
        disk.close()
    assert (sample.asked, sample.succeeded) == (60, 60)
    for path in paths:
        data = path.read_bytes()
        assert len(data) == 16 * PAGE + PAGE // 2
        assert sum(any(data[at : at + PAGE]) for at in range(0, 16 * PAGE, PAGE)) >= 14


def test_a_table_tells_of_the_limit_in_the_same_slots() -> None:
    names = (("fast", 8.0, "a"), ("engine", 2.0, "b"), ("slow", 4.0, "b"))
    cell: dict[str, Any] = {"scenario": "load", "memory": "host", "cache": "O_DIRECT"}
    cell |= {"block": 1 << 20, "fragments": 1, "in_flight": 16, "succeeded": 1, "asked": 1}
    cell |= dict.fromkeys(("p50_ms", "p99_ms", "late_p99_ms", "cpu_s_per_GiB"), 1.0)
    rows: list[Row] = [
        {**cell, "contender": name, "kind": "engine" if name == "engine" else "limit"}
        | {"GB/s": rate, "spread": [rate, rate], "slots": slots}
        for name, rate, slots in names
    ]
    machine = dict.fromkeys(
        ("cpu", "cores", "kernel", "filesystem", "disk", "gpu", "huge_pages"), ""
    )
    out = io.StringIO()
    print_rows([{"machine": {**machine, "plan": []}}, *rows], Console(file=out, width=200))
    (line,) = [line for line in out.getvalue().splitlines() if line.startswith("  engine")]
    assert line.split()[5] == "0.50"


@pytest.mark.parametrize(
    ("machine", "path"),
    [
        ({}, "gds GDS_MT"),
        ({"driver_open": 5033}, "bounce POSIX/"),
    ],
)
def test_the_command_measures_gpu_memory(
    tmp_path: Path, machine: dict[str, Any], path: str
) -> None:
    """On a simulated GPU: whichever path it has is in every row, beside the copies' own rate."""
    env = {"NIXL_LOG_LEVEL": "FATAL", **environment(**machine)}
    options = ("--rounds", "1", "--bytes", "128K", "--json", "--gpu", "0")
    _, *rows = rows_of(tmp_path, "-m", "kvgds", "bench", *options, env=env)
    ours = [row for row in rows if row["contender"] == "kvgds" and row["memory"] == "gpu"]
    assert {row["scenario"] for row in ours} == {"store", "load"}
    assert all(row["path"].startswith(path) and row["verified"] for row in ours)
    copies = [row for row in rows if row["contender"] == "copy alone"]
    assert {row["direction"] for row in copies} == {"store", "load"}


def test_a_replay_hits_what_lru_would(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    requests = [[n % 7, 100 + n % 5, 200 + n] for n in range(60)]
    trace.write_text("".join(f'{{"hash_ids": {ids}}}\n' for ids in requests), "utf-8")
    options = ("--capacities", "0.5,1", "--rounds", "1", "--probe-bytes", "32M")
    _, probe, *rows = rows_of(tmp_path, str(BENCH / "replay.py"), str(trace), *options)
    assert probe["scenario"] == "load"
    alone = {row["capacity"]: row for row in rows if row["in_flight"] == 1}
    assert alone[1.0]["hit_rate"] == alone[1.0]["lru_hit_rate"] > 0.3
    assert abs(alone[0.5]["hit_rate"] - alone[0.5]["lru_hit_rate"]) < 0.1


def test_a_tier_for_a_trace_of_few_blocks_keeps_one(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"hash_ids": [1]}\n' * 3)
    options = ("--capacities", "0.01", "--rounds", "1", "--probe-bytes", "32M")
    _, _, row, _ = rows_of(tmp_path, str(BENCH / "replay.py"), str(trace), *options)
    assert (row["capacity_blocks"], row["hit_rate"]) == (1, row["lru_hit_rate"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("bench/files.py --root scratch --rounds 7 --out a/b.jsonl", "files.py --rounds 7"),
        ("/home/me/replay.py traces/of/us.jsonl --limit 9", "replay.py us.jsonl --limit 9"),
        ("files.py --roo=x --ou y --only sizes,models", "files.py --only sizes,models"),
        ("kvgds bench --json --bytes=1M --root ..", "kvgds bench --json --bytes=1M"),
        (
            "objects.py --endpoint http://me:9000 --bucket mine --peers ../p --quick",
            "objects.py --quick",
        ),
    ],
)
def test_results_name_no_place_of_whoever_took_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, told: str
) -> None:
    monkeypatch.setattr(sys, "argv", words.split())
    assert report(tmp_path)["command"] == told


COMMIT = """
from pathlib import Path
from kvgds.bench.machine import report
print(report(Path())["commit"])
"""


def test_results_name_no_commit_of_a_project_that_kvgds_is_installed_in(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "site" / "kvgds")
    (tmp_path / ".gitignore").write_text("/site/\n")
    git = ("git", "-C", tmp_path, "-c", "user.name=me", "-c", "user.email=me@example.com")
    for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "theirs")):
        subprocess.run([*git, *words], check=True)
    command = [sys.executable, "-c", COMMIT]
    env = {**os.environ, "PYTHONPATH": os.fspath(tmp_path / "site")}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, check=True, text=True
    )
    assert done.stdout == "unknown\n"


# In a peer's environment: a package that writes nothing, loads wrong bytes, or dies.
BAD = """
import sys
import time
sys.path.insert(0, {bench!r})
import filepeers


class Bad(filepeers.Threaded):
    package = "pytest"

    def one(self, i, *, store):
        path = self.folder / str(i)
        if {dies}:
            import os
            os._exit(3)
        if store and i:
            path.write_bytes(self.memory.part(i, store=True))
        elif not store and path.exists():
            self.memory.part(i, store=False)[:] = path.read_bytes()
            self.memory.part(1, store=False)[7:8] = b"!"


filepeers.PEERS["bad"] = Bad
filepeers.main()
"""


async def bad_peer(tmp_path: Path, *, dies: bool) -> list[tuple[int, int]]:
    """How many of 4 blocks it is said to have stored, and loaded."""
    started = runpy.run_path(str(BENCH / "peers.py"))["started"]
    script, folder = tmp_path / "bad.py", tmp_path / "blocks"
    script.write_text(BAD.format(bench=str(BENCH), dies=dies), "utf-8")
    folder.mkdir()
    found = []
    command = (sys.executable, str(script), "bad", "", str(folder), "8192", "4", "2")
    async with started("bad", *command) as process:
        assert "version" in await process.ask(None)
        for way in ("store", "load"):
            sample = await process.move(way)
            found.append((sample.succeeded, sample.asked))
    return found


async def test_a_peer_gets_no_credit_for_what_it_did_not_do(tmp_path: Path) -> None:
    # Of four blocks one is never written, and of those that load one has other bytes.
    assert await bad_peer(tmp_path, dies=False) == [(3, 4), (2, 4)]


async def test_a_peer_that_dies_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="bad ended instead of answering"):
        await bad_peer(tmp_path, dies=True)


def test_a_package_that_there_is_not_is_refused() -> None:
    command = [sys.executable, str(BENCH / "peers.py"), "nope"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 2
    assert "error: nope: choose from vllm, lmcache" in done.stderr


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_that_there_is_not_is_refused(name: str) -> None:
    command = [sys.executable, str(BENCH / name), "--only", "nope"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{name}: error: --only: nope: choose from " in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        *(
            ((name, "--root", "nowhere"), "argument --root: nowhere must be a directory")
            for name in SCENARIOS
        ),
        *(
            ((*words, option, value), f"argument {option}: {says}")
            for words in (("replay.py", "trace"), *((name,) for name in SCENARIOS))
            for option, value, says in (
                ("--rounds", "0", "0 must be a whole number, at least 1"),
                ("--out", "nowhere/out", "nowhere must be a directory; make it first"),
                ("--out", ".", ". is a directory; name a file in it"),
            )
        ),
        *(
            (("replay.py", "trace", option, value), f"argument {option}: {says}")
            for option, value, says in (
                ("--limit", "0", "0 must be a whole number"),
                ("--token-bytes", "x", "x must be a whole number"),
                ("--capacities", "abc", "abc must be shares above 0"),
                ("--capacities", "0.5,0", "0.5,0 must be shares above 0"),
                ("--prefill", "0", "0 must be a number above 0"),
                ("--probe-bytes", "1M", "1M must be a multiple of 16,777,216 bytes"),
                ("--block-bytes", "0", "0 must be a multiple of 4,096 bytes"),
                ("--block-bytes", "x", "'x' is no size"),
            )
        ),
        (("replay.py", "trace", "--block-bytes", "1T"), "need more than half of the memory"),
        (("files.py", "--gpu", "64"), "--gpu 64: there are "),
        (("gpu.py", "--gpu", "64"), "--gpu 64: torch "),
        (("objects.py", "--bucket", "mine"), "--bucket: is for an --endpoint"),
        (("replay.py", "idle"), "trace='idle': is empty, or none of its requests has a block"),
        (("replay.py", "nowhere"), "trace='nowhere': can't be read: "),
        (("replay.py", "trace", "--root", "trace"), "trace must be a directory; make it first"),
        (("replay.py", "trace"), "trace='trace, line 1': is not JSON: "),
    ],
)
def test_what_a_bench_can_not_use_is_a_wrong_call(
    tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    (tmp_path / "trace").write_text("no trace")
    (tmp_path / "idle").write_text('{"hash_ids": []}')
    command = [sys.executable, str(BENCH / words[0]), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("files.py", ("--only", "loop")),
        ("gpu.py", ("--gpu", "none", "--only", "decode")),
        ("objects.py", ("--server", "memory", "--peers", "/nonexistent")),
        ("replay.py", ("trace", "--rounds", "100")),
    ],
)
def test_a_script_that_is_ended_leaves_nothing(
    tmp_path: Path, name: str, options: tuple[str, ...], number: signal.Signals
) -> None:
    """Neither on the disk nor on the screen. Ctrl-C is for its processes, too."""
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "trace").write_text('{"hash_ids": [1, 2]}\n')
    with subprocess.Popen(
        [sys.executable, str(BENCH / name), *options, "--root", str(root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        end = os.killpg if number == signal.SIGINT else os.kill
        end(process.pid, number)
        _, errors = process.communicate(timeout=40)
    assert (process.returncode, errors) == (128 + number, "")
    assert list(root.iterdir()) == []


# In Python's place: writes down what it is asked to run, and fails at the tests or at the bench.
STUB = """#!/bin/sh
echo "$KVGDS_REQUIRE_GPU $*" >> "{asked}"
case "$*" in *{fails}*) exit 1;; esac
"""


@pytest.mark.parametrize("fails", ["pytest", "gpu.py", "nothing"])
def test_one_command_runs_tests_and_bench_whatever_fails(tmp_path: Path, fails: str) -> None:
    python, results = tmp_path / "python", tmp_path / "a folder" / "results"
    asked = tmp_path / "asked"
    python.write_text(STUB.format(fails=fails, asked=asked))
    python.chmod(0o700)
    command = ["bash", str(BENCH / "run_gpu.sh"), str(results), "--rounds", "7"]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHON": str(python), "KVGDS_REQUIRE_GPU": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (fails != "nothing"), done.stderr
    _, tests, *benches = asked.read_text("utf-8").splitlines()
    assert tests == "1 -m pytest -m gpu"
    first, *files = benches
    assert first.startswith(f" bench/gpu.py --root {results}")
    for bench, what in zip(files, ("models,depths", "sizes"), strict=True):
        assert bench.startswith(f" bench/files.py --gpu 0 --only {what} --root ")
    assert all(bench.endswith("--rounds 7") for bench in benches)
    assert {path.name for path in results.iterdir()} == {"machine.txt", "tests.txt", "bench.txt"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--bytes", "4K"), "at least 8K"),
        (("--bytes", "100P"), "free; give it"),
        (("--root", "nowhere"), "must be a directory; make it first"),
    ],
)
def test_what_can_not_be_measured_is_told_in_one_line(
    tmp_path: Path, options: tuple[str, ...], says: str
) -> None:
    """And leaves no file of results, which would be in the way of the next."""
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "kvgds", "bench", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_bench_that_is_ended_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "kvgds", "bench", "--root", str(tmp_path)]
    with heard(number):
        started = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
    with started as process:
        deadline = time.monotonic() + 20
        while not list(tmp_path.rglob("slab-*")):
            assert time.monotonic() < deadline
        process.send_signal(number)
        process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_a_bench_that_is_to_outlast_its_terminal_does() -> None:
    ended = []

    async def bench() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.01)  # the loop hears of a signal in its next turn
        ended.append("in order")

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ending.run(bench())
    finally:
        signal.signal(signal.SIGHUP, before)
    assert ended == ["in order"]
