"""The benches run, on few blocks: whoever needs a number should not have to mend them first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
SCENARIOS = {
    "engine.py": {"disk", "small", "loop", "busy", "latency", "prefix"},
    "gpu.py": {"paths", "fragments", "decode"},
    "objects.py": {"objects", "stack"},  # its ticker takes as long again
}


def rows_of(name: str, folder: Path, *options: str) -> list[dict[str, Any]]:
    """What a bench says of this machine, and then its rows; its failure is ours."""
    out, root = folder / "out.jsonl", folder / "root"
    root.mkdir()
    command = [sys.executable, "-W", "error", str(BENCH / name), "--quick", *options]
    command += ["--root", str(root), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == out.read_text("utf-8")
    assert list(root.iterdir()) == []  # what it took of the disk, it gives back
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("engine.py", ()),
        ("gpu.py", ("--device", "cpu")),
        ("objects.py", ("--server", "memory", "--only", "objects,stack")),
    ],
)
def test_all_that_is_asked_for_succeeds(
    tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    machine, *rows = rows_of(name, tmp_path, *options)
    assert "cpu" in machine["machine"]
    assert {row["scenario"] for row in rows} == SCENARIOS[name]
    moved = [row for row in rows if "asked" in row]
    assert len(moved) > len(rows) // 2
    assert [row["asked"] for row in moved] == [row["succeeded"] for row in moved]
    if name == "gpu.py":  # nobody shall take this for what a GPU does
        assert set(machine["refused"]) == {"bounce", "gds-compat", "gds"}
        assert {row["device"] for row in rows} == {"cpu"}
        assert all("nothing here is about a GPU" in row["note"] for row in rows)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_that_there_is_not_is_refused(name: str) -> None:
    command = [sys.executable, str(BENCH / name), "--only", "nope"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{name}: error: --only: nope: choose from " in done.stderr


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
    _, tests, bench = asked.read_text("utf-8").splitlines()
    assert tests == "1 -m pytest -m gpu"
    assert bench.startswith(f" bench/gpu.py --root {results}")
    assert bench.endswith("--rounds 7")
    assert {path.name for path in results.iterdir()} == {"machine.txt", "tests.txt", "bench.txt"}
