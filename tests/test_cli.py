"""The command line: what it prints, its exit status, and that nobody ever sees a traceback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer
from typer.testing import CliRunner

from faults import read_only
from kvgds import EngineConfig, FileTier, Namespace, __version__, open_engine
from kvgds.arguments import parse_age, parse_size
from kvgds.cli import app, size_text
from kvgds.replay import key_of, namespace
from support import content, places, spoil, write_at

if TYPE_CHECKING:
    from collections.abc import Callable

    from typer.testing import Result

PAGE = 4096
SIZE = 3 * PAGE
ONE = Namespace("first/model")
LAYOUTS = ("slabs", "files")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line reads KVGDS_*; what the caller's environment has is not the subject."""
    for name in os.environ:
        if name.startswith("KVGDS_"):
            monkeypatch.delenv(name)


def config(root: Path, layout: str = "slabs", **tier: Any) -> EngineConfig:
    settings = {"root": root, "capacity_bytes": 8 << 20, "layout": layout, **tier}
    return EngineConfig(namespace=ONE, tiers=(FileTier(**settings),), bounce_bytes=4 << 20)


def fill(root: Path, count: int = 3, layout: str = "slabs") -> None:
    async def run() -> None:
        async with open_engine(config(root, layout)) as engine:
            for i in range(count):
                await engine.store(b"key-%d" % i, content(i, SIZE))

    asyncio.run(run())


def call(*arguments: object) -> Result:
    """Run a command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def found(*arguments: object, status: int = 0) -> dict[str, Any]:
    """What a command prints as JSON, and that this is all it prints."""
    result = call(*arguments, "--json")
    assert result.exit_code == status
    answer = json.loads(result.stdout)
    assert isinstance(answer, dict)
    return answer


def process(*arguments: object, **changes: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "kvgds", *map(str, arguments)],
        check=False,
        **{
            "capture_output": True,
            "text": True,
            "timeout": 50,
            "stdin": subprocess.DEVNULL,
            "env": {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            **changes,
        },
    )


# --- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64K", 64 << 10),
        ("64k", 64 << 10),
        ("64KiB", 64 << 10),
        ("64KB", 64 << 10),
        ("1.5M", 3 << 19),
        ("2G", 2 << 30),
        ("2 GiB", 2 << 30),
        ("1Ti", 1 << 40),
        ("1P", 1 << 50),
        ("17B", 17),
        ("9007199254740993", 9007199254740993),
        ("9223372036854775807", (1 << 63) - 1),
    ],
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "K", "1X", "-1", "1e3", "1KK", "one", "1 2", "1,000"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(
    "text", ["8192P", "9" * 19, "9" * 400, pytest.param("9" * 99_999 + "P", id="a long number")]
)
def test_what_is_larger_than_any_disk_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is too much") as caught:
        parse_size(text)
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize(
    "text",
    ["9" * 12 + "s", "999999w", "9" * 400 + "d", pytest.param("9" * 99_999 + "w", id="long")],
)
def test_what_is_longer_than_any_life_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is too long") as caught:
        parse_age(text)
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("7d", 604800), ("2W", 1209600)],
)
def test_ages_are_read(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "1y", "7days"])
def test_what_is_no_age_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no duration"):
        parse_age(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        (5 << 40, "5.0 TiB"),
        (1 << 60, "1,024.0 PiB"),
    ],
)
def test_sizes_are_written_for_people(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


def test_version_and_help() -> None:
    assert call("--version").stdout == f"kvgds {__version__}\n"
    for command in ("doctor", "ls", "fsck", "gc", "replay", "demo"):
        assert command in call("--help").stdout
        assert call(command, "--help").exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("ls",),
        ("ls", "here", "--limit", "-1"),
        ("ls", "here", "--frobnicate"),
        ("gc", "here"),
        ("gc", "here", "--keep-bytes", "much"),
        ("gc", "here", "--older-than", "long"),
        ("replay", "trace"),
        ("replay", "trace", "--root", "here", "--block-bytes", "4Q"),
        ("replay", "trace", "--root", "here", "--in-flight", "0"),
        ("ls", "here", "--limit", "9" * 20),
        pytest.param(("ls", "here", "--limit", "9" * 5000), id="ls, a limit of 5,000 digits"),
        ("gc", "here", "--keep-bytes", "9" * 400),
        ("gc", "here", "--older-than", "9" * 400 + "d"),
        ("replay", "trace", "--root", "here", "--limit", "9" * 20),
        ("replay", "trace", "--root", "here", "--in-flight", "9" * 20),
        ("replay", "trace", "--root", "here", "--block-bytes", "9" * 400),
        ("replay", "trace", "--root", "here", "--capacity", "9" * 400),
        ("replay", "trace", "--root", "here", "--block-bytes", "1000"),
    ],
)
def test_a_wrong_call_ends_with_2(arguments: tuple[str, ...]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == "" or not arguments
    assert "Traceback" not in result.output


# --- errors -----------------------------------------------------------------------------------


def a_file(root: Path) -> None:
    root.write_text("not a directory")


def no_parent(root: Path) -> None:
    """Nothing leads to the directory."""
    root.parent.rmdir()


def foreign(root: Path) -> None:
    root.mkdir()
    (root / "kvgds.json").write_text('{"format": 99}')


def garbage_index(root: Path) -> None:
    fill(root)
    (root / "index.db").write_bytes(os.urandom(100_000))


def foreign_index(root: Path) -> None:
    fill(root)
    for path in root.glob("index.db*"):
        path.unlink()
    (root / "index.db").symlink_to("/etc/hostname")


def loop(root: Path) -> None:
    root.symlink_to(root.name)


TROUBLES = (a_file, no_parent, foreign, garbage_index, foreign_index, loop)
COMMANDS: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "doctor": lambda root, _: ("doctor", "--root", root),
    "ls": lambda root, _: ("ls", root),
    "fsck": lambda root, _: ("fsck", root),
    "gc": lambda root, _: ("gc", root, "--keep-bytes", "0"),
    "replay": lambda root, trace: ("replay", trace, "--root", root, "--capacity", "1M"),
}


def arguments_of(command: str, root: Path, where: Path) -> tuple[object, ...]:
    trace = where / "trace"
    trace.write_text('{"hash_ids": [1, 2]}\n')
    return COMMANDS[command](root, trace)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_is_told_in_one_line(
    tmp_path: Path, trouble: Callable[[Path], None], command: str
) -> None:
    root = tmp_path / "above" / "kv"
    root.parent.mkdir()
    trouble(root)
    result = call(*arguments_of(command, root, tmp_path))
    assert result.exit_code == 1
    if command == "doctor" or (command == "fsck" and "index" in trouble.__name__):
        assert result.stderr == ""  # they tell what they found
        assert "broken" in result.stdout or "index" in result.stdout
    else:
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert str(root.parent) in line


@pytest.mark.parametrize(
    ("trouble", "command"), list(zip(TROUBLES, [*COMMANDS, "ls"], strict=True))
)
def test_no_user_sees_a_traceback(
    tmp_path: Path, trouble: Callable[[Path], None], command: str
) -> None:
    root = tmp_path / "above" / "kv"
    root.parent.mkdir()
    trouble(root)
    result = process(*arguments_of(command, root, tmp_path))
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    assert len(result.stderr.splitlines()) <= 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_directory_is_told_or_read(tmp_path: Path, command: str) -> None:
    root = tmp_path / "disk" / "kv"
    root.parent.mkdir()
    fill(root)
    with read_only(root.parent):
        result = call(*arguments_of(command, root, tmp_path))
    if command == "ls":
        assert result.exit_code == 0
        assert "first/model" in result.stdout
    elif command == "replay":
        assert (result.exit_code, "holds blocks of others" in result.stderr) == (1, True)
    else:
        assert result.exit_code == 1
        assert "Read-onlyfilesystem" in "".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("command", COMMANDS)
async def test_a_directory_in_use_is_told_or_read(tmp_path: Path, command: str) -> None:
    root = tmp_path / "kv"
    arguments = arguments_of(command, root, tmp_path)
    async with open_engine(config(root)) as engine:
        await engine.store(b"key", content(0, SIZE))
        files = sorted(root.iterdir())
        result = await asyncio.to_thread(process, *arguments)
        assert sorted(root.iterdir()) == files
        assert await engine.load(b"key", bytearray(SIZE))
    assert "Traceback" not in result.stdout + result.stderr
    if command in ("ls", "doctor"):
        assert (result.returncode, result.stderr) == (0, "")
        assert ("first/model" if command == "ls" else f"process {os.getpid()}") in result.stdout
    else:
        assert result.returncode == 1
        why = "blocks of others" if command == "replay" else f"in use by process {os.getpid()}"
        assert why in result.stderr
        assert len(result.stderr.splitlines()) == 1


TOML = """
path = "auto"
[namespace]
model = "some/model"
[[tiers]]
root = "{root}"
capacity_bytes = 1073741824
"""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("capacity_bytes", "capacity_byte", "capacity_byte"),
        ('path = "auto"', 'path = "warp"', "path"),
        ('path = "auto"', "bounce_bytes = -3", "bounce_bytes"),
        ("1073741824", '"1G"', "capacity_bytes"),
        ("model =", "modell =", "modell"),
        ("[[tiers]]", "[tiers]", "tiers"),
        ('path = "auto"', "path = ", "can't be read"),
        ("some/model", "", "namespace.model"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    file = tmp_path / "kvgds.toml"
    text = TOML.format(root=tmp_path / "kv")
    assert old in text
    file.write_text(text.replace(old, new))
    result = call("doctor", "--config", file)
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert says in line


def test_a_config_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = call("doctor", "--config", tmp_path / "none.toml")
    assert result.exit_code == 1
    assert "none.toml" in result.stderr


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_closed_pipe_ends_quietly(tmp_path: Path, more: tuple[str, ...]) -> None:
    fill(tmp_path / "kv", 200)
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"capture_output": False, "stdout": writing, "stderr": subprocess.PIPE}
    try:
        result = process("ls", tmp_path / "kv", "--limit", 200, *more, **streams)
    finally:
        os.close(writing)
    assert result.returncode != 0
    assert result.stderr == ""


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("gc", "--help")])
def test_an_output_that_is_full_is_told_before_any_command(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        streams = {"capture_output": False, "stdout": full, "stderr": subprocess.PIPE}
        result = process(*arguments, **streams)
    assert (result.returncode, result.stderr) == (1, "error: No space left on device\n")


def test_an_output_that_is_full_is_told(tmp_path: Path) -> None:
    fill(tmp_path / "kv", 200)
    with open("/dev/full", "w", encoding="utf-8") as full:
        streams = {"capture_output": False, "stdout": full, "stderr": subprocess.PIPE}
        result = process("ls", tmp_path / "kv", "--json", "--limit", 200, **streams)
    assert result.returncode == 1
    assert result.stderr.splitlines()[0] == "error: No space left on device"
    assert "Traceback" not in result.stderr


def test_names_that_are_not_utf_8_are_printed(tmp_path: Path) -> None:
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/k\xffv"))
    fill(root)
    assert process("ls", root).returncode == 0
    missing = process("ls", root / "more")
    assert (missing.returncode, len(missing.stderr.splitlines())) == (1, 1)


# --- doctor -----------------------------------------------------------------------------------


PART = {"ok", "used", "summary", "evidence", "refused"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_doctor_tells_how_bytes_move_and_leaves_nothing(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "kv"
    fill(root, 3, layout)
    files = sorted(path.name for path in root.rglob("*") if path.name != "tmp")
    answer = found("doctor", "--root", root)
    assert set(answer) == {"ok", "versions", "nixl", "huge_pages", "gpu", "roots", "buckets"}
    assert answer["ok"] is True
    assert set(answer["versions"]) == {"kvgds", "nixl", "obstore", "python", "kernel"}
    assert answer["versions"]["kernel"] == os.uname().release
    assert answer["nixl"]["summary"] in ("POSIX/uring", "POSIX/aio")
    for part in (answer["nixl"], answer["huge_pages"], answer["gpu"]):
        assert set(part) == PART
    assert ("bounce" in answer["gpu"]["summary"]) is answer["gpu"]["used"]
    (part,) = answer["roots"]
    assert set(part) == PART | {
        "root", "layout", "in_use", "path", "backend", "direct_io", "alignment",
        "gpu_path", "filesystem",
        "free_bytes",
    }  # fmt: skip
    assert (part["root"], part["layout"], part["in_use"]) == (str(root), layout, False)
    assert (part["path"], part["backend"]) == ("direct", answer["nixl"]["summary"])
    assert part["direct_io"] == (part["alignment"] == PAGE)
    assert part["free_bytes"] > 0
    assert any("holds 3 blocks in 1 namespace" in line for line in part["evidence"])
    in_tmp = any(line.startswith(f"{root / 'tmp'} is on") for line in part["evidence"])
    assert in_tmp == (layout == "files")  # it was the layout that is there which was tried
    assert any(f"{root}" in line and part["filesystem"] in line for line in part["evidence"])
    assert sorted(path.name for path in root.rglob("*") if path.name != "tmp") == files
    assert [path.name for path in tmp_path.iterdir()] == ["kv"]


def test_doctor_looks_beside_a_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    place = tmp_path / "of models: new ones"
    place.mkdir()
    (part,) = found("doctor", "--root", place / "kv")["roots"]
    assert part["ok"]
    assert part["path"] == "direct"
    assert part["summary"].startswith(f"host memory direct via {part['backend']}")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("doctor", "--root", "."), "POSIX"),
        (("gc", "."), "say what goes"),
        (("gc", "--help"), "Drop blocks"),
    ],
)
def test_a_screen_without_columns(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    """As some that start jobs have it: that is no width."""
    path = os.pathsep.join(filter(None, sys.path))
    environ = {**os.environ, "PYTHONPATH": path, "COLUMNS": "00" if "." in arguments else "0"}
    done = process(*arguments, env=environ, cwd=tmp_path)
    assert says in done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("ls", ""),
        ("gc", "", "--keep-bytes", "0"),
        ("doctor", "--root", ""),
        ("replay", "trace", "--root", ""),
        ("bench", "--root", ""),
        ("demo", "--root", ""),
    ],
)
def test_a_variable_that_is_not_set_names_no_directory(arguments: tuple[str, ...]) -> None:
    """Least of all this one."""
    result = call(*arguments)
    assert result.exit_code == 2
    assert "must be the path of a directory" in " ".join(result.stderr.split())


def test_doctor_refuses_a_variable_that_names_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tier whose name has a letter too few would not be looked at."""
    monkeypatch.setenv("KVGDS_TIER__0__ROOT", "/kv")
    done = process("doctor")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: KVGDS_TIER__0__ROOT='/kv': names no setting; those are ")


def test_doctor_says_one_thing_once(tmp_path: Path) -> None:
    result = call("doctor", "--root", tmp_path / "a" / "kv")
    assert result.exit_code == 1
    assert "".join(result.stdout.replace("│", " ").split()).count("doesnotexist") == 1
    (part,) = found("doctor", "--root", tmp_path / "a" / "kv", status=1)["roots"]
    assert part["refused"] == [
        {"what": "directory", "why": f"{tmp_path / 'a'} does not exist", "fix": "make it first"}
    ]


def test_doctor_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    for name, age in (("old", 7200), ("new", 60)):
        folder = tmp_path / f".kvgds-doctor-{name}"
        (folder / "sub").mkdir(parents=True)
        os.utime(folder, (0, time.time() - age))
    assert found("doctor", "--root", tmp_path)["ok"]
    assert [path.name for path in tmp_path.iterdir()] == [".kvgds-doctor-new"]


def test_doctor_without_a_directory_looks_at_the_machine() -> None:
    assert found("doctor")["roots"] == []
    assert "huge pages" in call("doctor").stdout


def test_doctor_tries_the_tiers_of_a_config_file(tmp_path: Path) -> None:
    file = tmp_path / "kvgds.toml"
    file.write_text(TOML.format(root=tmp_path / "kv") + 'direct_io = "never"\nlayout = "files"\n')
    (part,) = found("doctor", "--config", file)["roots"]
    assert (part["root"], part["layout"]) == (str(tmp_path / "kv"), "files")
    assert part["direct_io"] is False
    assert [way["what"] for way in part["refused"]] == ["O_DIRECT"]


@pytest.mark.parametrize("whole", [False, True])
def test_doctor_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, whole: bool
) -> None:
    monkeypatch.setenv("KVGDS_NAMESPACE__MODEL", "some/model")
    if whole:
        tier = f'{{root = "{tmp_path / "kv"}", capacity_bytes = 1_000_000}}'
        monkeypatch.setenv("KVGDS_TIERS", f"[{tier}]")
    else:
        monkeypatch.setenv("KVGDS_TIERS__0__ROOT", str(tmp_path / "kv"))
        monkeypatch.setenv("KVGDS_TIERS__0__CAPACITY_BYTES", "1000000")
    (part,) = found("doctor")["roots"]
    assert part["root"] == str(tmp_path / "kv")


def test_doctor_tells_of_quarantined_places(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(root)
    spoil(root, b"key-1", PAGE, ONE)

    async def meet() -> None:
        async with open_engine(config(root)) as engine:
            await engine.load_many([(b"key-1", bytearray(SIZE))])

    asyncio.run(meet())
    (part,) = found("doctor", "--root", root)["roots"]
    assert part["ok"]
    assert [way["what"] for way in part["refused"]] == ["quarantine"]
    assert "fsck --repair" in part["refused"][0]["fix"]


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        (a_file, "not a directory"),
        (no_parent, "above does not exist"),
        (foreign, "does not know it"),
        (garbage_index, "fsck --rebuild"),
    ],
)
def test_doctor_says_why_a_directory_cannot_be_used(
    tmp_path: Path, trouble: Callable[[Path], None], says: str
) -> None:
    root = tmp_path / "above" / "kv"
    root.parent.mkdir()
    trouble(root)
    answer = found("doctor", "--root", root, status=1)
    assert answer["ok"] is False
    (part,) = answer["roots"]
    assert part["ok"] is False
    assert says in json.dumps(part["refused"])
    assert all(way["fix"] for way in part["refused"])


@pytest.mark.parametrize("name", ["kv", "kv/below"])
def test_doctor_does_not_say_of_what_it_can_not_see_that_it_is_not_there(
    tmp_path: Path, name: str
) -> None:
    """A directory that may not be entered, as one of another user."""
    root = tmp_path / name
    fill(tmp_path / "kv")
    (tmp_path / "kv").chmod(0)
    user = [] if os.geteuid() else ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    arguments = [*user, sys.executable, "-m", "kvgds", "doctor", "--root", str(root), "--json"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        result = subprocess.run(
            arguments, check=False, capture_output=True, text=True, timeout=50, env=environ
        )
    finally:
        (tmp_path / "kv").chmod(0o700)
    assert result.returncode == 1
    (part,) = json.loads(result.stdout)["roots"]
    assert "Permission denied" in part["refused"][0]["why"]
    assert not any("exist" in line or "no blocks" in line for line in part["evidence"])


def without(calls: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process to which the kernel refuses these system calls, with EPERM."""
    program = f"""
        import ctypes, struct, sys
        numbers = [{calls}]
        code = [(0x20, 0, 0, 0)]
        for i, number in enumerate(numbers):
            code.append((0x15, len(numbers) - i, 0, number))
        code += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001)]
        filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
        whole = struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters))
        whole = ctypes.create_string_buffer(whole)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        assert libc.prctl(22, 2, whole) == 0
        from kvgds.cli import app
        app(sys.argv[1:])
    """
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers of system calls are those of x86-64")
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        check=False,
        text=True,
        timeout=50,
    )


IO_URING_SETUP, IO_SETUP = "425", "206"


def test_doctor_says_why_io_uring_is_refused(tmp_path: Path) -> None:
    result = without(IO_URING_SETUP, "doctor", "--json", "--root", tmp_path / "kv")
    assert (result.returncode, result.stderr) == (0, "")
    answer = json.loads(result.stdout)
    assert answer["nixl"]["summary"] == "POSIX/aio"
    (way,) = answer["nixl"]["refused"]
    assert way["what"] == "POSIX/uring"
    assert way["why"]
    assert "io_uring" in way["fix"]
    assert answer["roots"][0]["backend"] == "POSIX/aio"


def test_without_any_queue_nothing_works_and_all_say_so(tmp_path: Path) -> None:
    both = f"{IO_URING_SETUP}, {IO_SETUP}"
    result = without(both, "doctor", "--json", "--root", tmp_path / "kv")
    assert (result.returncode, result.stderr) == (1, "")
    answer = json.loads(result.stdout)
    assert (answer["ok"], answer["nixl"]["ok"]) == (False, False)
    assert [way["what"] for way in answer["nixl"]["refused"]] == ["POSIX/uring", "POSIX/aio"]
    replayed = without(both, *arguments_of("replay", tmp_path / "kv", tmp_path))
    assert replayed.returncode == 1
    (line,) = replayed.stderr.splitlines()
    assert line.startswith("error: ")
    assert "POSIX/uring" in line
    assert "POSIX/aio" in line


# --- ls, fsck, gc -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ls_prints_namespaces_and_blocks(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "kv"
    fill(root, 3, layout)
    answer = found("ls", root, "--limit", 2)
    assert set(answer) == {
        "root", "layout", "namespaces", "entries", "allocated_bytes", "quarantined",
    }  # fmt: skip
    (use,) = answer["namespaces"]
    assert set(use) == {"digest", "fields", "blocks", "nbytes", "disk_bytes", "sizes"}
    assert (use["fields"]["model"], use["blocks"], use["nbytes"]) == ("first/model", 3, 3 * SIZE)
    assert [set(entry) for entry in answer["entries"]] == [
        {"key", "namespace", "nbytes", "place"}
    ] * 2
    assert found("ls", root, "--namespace", "other/*")["namespaces"] == []
    text = call("ls", root, "--limit", 1).stdout
    assert "first/model" in text
    assert "36.0 KiB" in text
    assert answer["entries"][0]["key"] in text


def test_fsck_prints_what_it_found_and_mended(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(root)
    clean = call("fsck", root)
    assert (clean.exit_code, clean.stdout) == (0, "3 blocks (36.0 KiB) checked: clean\n")
    spoil(root, b"key-1", PAGE, ONE)
    answer = found("fsck", root, status=1)
    assert set(answer) == {
        "root", "layout", "blocks", "nbytes", "problems", "unproven", "kept_aside", "clean",
    }  # fmt: skip
    assert answer["clean"] is False
    assert [set(problem) for problem in answer["problems"]] == [
        {"kind", "place", "text", "repaired"}
    ]
    bad = call("fsck", root)
    assert bad.exit_code == 1
    assert "found: corrupt: slab 0 slot" in bad.stdout
    assert "1 problem left" in bad.stdout
    mended = call("fsck", root, "--repair")
    assert mended.exit_code == 0
    assert "repaired: corrupt" in mended.stdout
    assert call("fsck", root).stdout == "2 blocks (24.0 KiB) checked: clean\n"


def test_a_damaged_index_leads_to_rebuild_and_back(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(root)
    (root / "index.db").write_bytes(os.urandom(50_000))
    refused = process("ls", root)
    assert refused.returncode == 1
    assert "kvgds fsck --rebuild" in refused.stderr
    mended = process("fsck", root, "--rebuild")
    assert (mended.returncode, mended.stderr) == (0, "")
    assert f"the old index is {root}/index.db.damaged-1" in mended.stdout
    assert "3 blocks (36.0 KiB) in the new index: clean" in mended.stdout
    assert found("ls", root)["namespaces"][0]["blocks"] == 3


@pytest.mark.parametrize(
    "odd",
    [
        "UPDATE slab SET slot_bytes = 'many'",
        "UPDATE slab SET slots = -1",
        "UPDATE block SET key = 'text'",
        "UPDATE block SET nbytes = 'few'",
        "UPDATE namespace SET digest = 7",
    ],
)
def test_odd_values_in_the_index_lead_to_rebuild_too(tmp_path: Path, odd: str) -> None:
    root = tmp_path / "kv"
    fill(root, 1)
    with contextlib.closing(sqlite3.connect(root / "index.db")) as database, database:
        database.execute(odd)
    for arguments in (("ls", root, "--limit", 9), ("gc", root, "--keep-bytes", 0)):
        refused = call(*arguments)
        assert (refused.exit_code, refused.stdout) == (1, "")
        (line,) = refused.stderr.splitlines()
        assert "the index is damaged" in line
        assert "`kvgds fsck --rebuild` makes it anew" in line
    checked = call("fsck", root)
    assert (checked.exit_code, checked.stderr) == (1, "")
    assert "found: index: index.db: the index is damaged" in checked.stdout
    assert call("fsck", root, "--rebuild").exit_code == 0
    assert found("ls", root, "--limit", 9)["entries"][0]["key"] == b"key-0".hex()


def test_without_index_and_slabs_nothing_is_to_be_rebuilt(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(root)
    for path in (*root.glob("index.db*"), *root.glob("slab-*")):
        path.unlink()
    for text in (call("ls", root).stderr, call("fsck", root).stdout):
        assert "holds no blocks" in text
        assert "rebuild" not in text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gc_of_a_namespace_that_is_not_there(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "kv"
    fill(root, 1, layout)
    result = call("gc", root, "--namespace", "foo*")
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line == "error: namespace='foo*': names none of those that are there: first/model"
    assert "dropped 1 block (16.0 KiB)" in call("gc", root, "--namespace", "first*").stdout


def test_one_of_a_thing_is_told_in_the_singular(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(root, 1)
    assert call("fsck", root).stdout == "1 block (12.0 KiB) checked: clean\n"
    text = call("gc", root, "--keep-bytes", "1G").stdout
    assert "dropped 0 blocks (0 B), 0 files" in text
    assert "left: 1 block (16.0 KiB)" in text
    assert "holds 1 block in 1 namespace" in json.dumps(found("doctor", "--root", root))


def test_fsck_prints_at_most_a_screenful(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(root, 70)
    for place in places(root, ONE).values():
        write_at(place.path, place.offset, bytes(8))
    text = call("fsck", root).stdout
    assert len(text.splitlines()) == 52
    assert "and 20 more" in text
    assert len(found("fsck", root, status=1)["problems"]) == 70


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gc_prints_what_went(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "kv"
    fill(root, 3, layout)
    answer = found("gc", root, "--keep-bytes", "16K", "--dry-run")
    assert set(answer) == {
        "root", "layout", "dry_run", "blocks", "nbytes", "files", "freed_bytes", "kept_blocks",
        "kept_bytes", "failed", "errors",
    }  # fmt: skip
    assert (answer["blocks"], answer["kept_bytes"], answer["dry_run"]) == (2, 16384, True)
    assert (
        "would drop 2 blocks (32.0 KiB)"
        in call("gc", root, "--keep-bytes", "16K", "--dry-run").stdout
    )
    assert found("ls", root)["namespaces"][0]["blocks"] == 3
    assert "dropped 2 blocks (32.0 KiB)" in call("gc", root, "--keep-bytes", "16K").stdout
    assert found("ls", root)["namespaces"][0]["blocks"] == 1
    aged = call("gc", root, "--older-than", "7d")
    assert aged.exit_code == (2 if layout == "slabs" else 0)
    assert ("--older-than" in aged.stderr) == (layout == "slabs")
    assert ("order of use" in words_of(aged.stderr)) == (layout == "slabs")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gc_says_why_slabs_give_nothing_back(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "kv"
    fill(root, 3, layout)
    text = call("gc", root, "--keep-bytes", "16K").stdout
    assert ("a slab keeps its file while it holds a block" in text) == (layout == "slabs")
    assert "slab" not in call("gc", root, "--keep-bytes", "16K").stdout  # nothing was dropped


def test_an_option_that_does_not_fit_the_directory_is_a_wrong_call(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(root, 1, "files")
    result = call("fsck", root, "--rebuild")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--rebuild: there is no index" in words_of(result.stderr)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [("layout", "file", "'slabs' or 'files'"), ("capacity", "4K", "at least 69,632")],
)
def test_a_wrong_setting_of_a_replay_is_a_wrong_call(
    tmp_path: Path, trace: Path, option: str, value: str, says: str
) -> None:
    result = call("replay", trace, "--root", tmp_path / "kv", f"--{option}", value)
    assert (result.exit_code, result.stdout) == (2, "")
    text = words_of(result.stderr)
    assert f"Invalid value for --{option}: " in text
    assert says in text
    assert not (tmp_path / "kv").exists()


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    """Neither as markup nor as pictures."""
    fill(tmp_path / "[b]kv:a:", 1)
    assert "[b]kv:a:" in call("ls", tmp_path / "[b]kv:a:").stdout


def test_ls_says_that_no_namespace_matches(tmp_path: Path) -> None:
    fill(tmp_path / "kv", 1)
    result = call("ls", tmp_path / "kv", "--namespace", "nope")
    said = f"{tmp_path / 'kv'}: no namespace that has blocks matches 'nope'\n"
    assert (result.exit_code, result.stdout) == (0, said)


def test_a_rebuild_says_that_what_was_dropped_comes_back(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    fill(root, 3)
    assert call("gc", root, "--keep-bytes", "16K").exit_code == 0
    rebuilt = call("fsck", root, "--rebuild").stdout
    assert "blocks that were dropped, but not overwritten yet, are back too" in rebuilt
    assert "3 blocks (36.0 KiB) in the new index" in rebuilt
    assert "dropped" not in call("fsck", root).stdout
    assert "Brings back blocks that were dropped" in words_of(call("fsck", "--help").stdout)


# --- replay -----------------------------------------------------------------------------------


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    requests = [[*range(i % 5), *range(100 * i, 100 * i + 9)] for i in range(1, 40)]
    path.write_text("".join(json.dumps({"hash_ids": ids}) + "\n" for ids in requests))
    return path


def test_replay_prints_one_table(tmp_path: Path, trace: Path) -> None:
    arguments = (
        "replay",
        trace,
        "--root",
        tmp_path / "kv",
        "--block-bytes",
        "8K",
        "--capacity",
        "64M",
    )
    first = process(*arguments)
    assert (first.returncode, first.stderr) == (0, "")
    for word in ("hit rate", "evictions", "loaded", "stored", "verified", "store_many", "slabs:"):
        assert word in first.stdout
    answer = found(*arguments)
    assert set(answer) == {
        "requests", "asked", "hits", "misses", "hit_rate", "stored", "evictions", "bytes_loaded",
        "bytes_stored", "bytes_verified", "load_gb_s", "store_gb_s", "seconds", "prefix",
        "load_many", "store_many", "errors", "messages", "path",
    }  # fmt: skip
    assert (answer["requests"], answer["hit_rate"], answer["errors"]) == (39, 1.0, 0)
    assert set(answer["load_many"]) == {"calls", "p50_ms", "p95_ms", "p99_ms"}
    assert found(*arguments, "--limit", 3)["requests"] == 3


def test_a_replay_that_loads_nothing_tells_no_times(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text('{"hash_ids": [1]}\n')
    text = call("replay", trace, "--root", tmp_path / "kv", "--capacity", "64M").stdout
    rows = {cells[1].strip(): cells[2].strip() for line in text.splitlines()
            if len(cells := line.split("│")) == 4}  # fmt: skip
    assert (rows["load_many"], rows["loaded"]) == ("not called", "nothing")
    assert rows["store_many"].startswith("1 call, p50")
    assert rows["blocks asked"] == "1: 0 hits, 1 miss"


def test_an_empty_trace_is_an_error(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text("\n\n")
    result = call("replay", trace, "--root", tmp_path / "kv")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: trace='{trace}': is empty; it must hold a request a line\n"
    assert not (tmp_path / "kv").exists()


def test_help_says_what_a_trace_is_and_how_sizes_are_meant() -> None:
    text = words_of(call("replay", "--help").stdout)
    for words in ('{"hash_ids": [0, 1, 2]}', "--in-flight 1", "64K (64 KiB)"):
        assert words in text
    assert "(64K)]" not in text
    assert "those stored first. 100G is 100 GiB" in words_of(call("gc", "--help").stdout)
    assert "Not of slabs" in words_of(call("gc", "--help").stdout)
    assert "not with layout files" in words_of(call("fsck", "--help").stdout)


def words_of(text: str) -> str:
    """What a table says, however it is broken into lines."""
    return " ".join(text.replace("│", " ").split())


def test_a_wrong_byte_ends_a_replay_with_1(tmp_path: Path, trace: Path) -> None:
    root = tmp_path / "kv"
    settings = EngineConfig(
        namespace=namespace(8192), tiers=(FileTier(root=root, capacity_bytes=64 << 20),)
    )

    async def plant() -> None:
        async with open_engine(settings) as engine:
            await engine.store(key_of(0), bytes(8192))

    asyncio.run(plant())
    arguments = ("replay", trace, "--root", root, "--block-bytes", "8K", "--capacity", "64M")
    result = process(*arguments)
    assert result.returncode == 1
    assert "error: id 0: other bytes were loaded than were stored" in result.stderr
    assert "Traceback" not in result.stderr
    assert found(*arguments, status=1)["errors"] > 0


def test_a_bad_line_ends_a_replay_with_its_number(tmp_path: Path, trace: Path) -> None:
    with trace.open("a") as file:
        file.write("oops\n")
    result = process("replay", trace, "--root", tmp_path / "kv")
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert "line 40" in line
    assert not (tmp_path / "kv").exists()


# Runs before everything: sends the interrupt when a module is about to be imported.
EARLY = """
import os, signal, sys
def hook(event, arguments):
    if event == "import" and arguments[0] == os.environ["INTERRUPT_AT"]:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
"""
SCRIPT = """
import sys
from kvgds.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""
IMPORTS = ("kvgds.blocks", "numpy", "pydantic", "typer", "rich.table", "kvgds.doctor")


@pytest.fixture
def interrupted_at(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Gives the environment of a process that is interrupted at an import."""
    (tmp_path / "sitecustomize.py").write_text(EARLY)

    def environment(module: str) -> dict[str, str]:
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        return {**os.environ, "PYTHONPATH": path, "INTERRUPT_AT": module}

    return environment


@pytest.mark.parametrize("module", IMPORTS)
@pytest.mark.parametrize("way", ["module", "script"])
def test_an_interrupt_at_the_start_ends_quietly(
    tmp_path: Path, interrupted_at: Callable[..., dict[str, str]], way: str, module: str
) -> None:
    script = tmp_path / "kvgds"
    script.write_text(SCRIPT)
    how = ["-X", "faulthandler", "-m", "kvgds"] if way == "module" else [str(script)]
    result = subprocess.run(
        [sys.executable, *how, "doctor"],
        env=interrupted_at(module),
        capture_output=True,
        check=False,
        text=True,
        timeout=50,
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


@pytest.mark.parametrize("module", ["numpy", "kvgds.engine"])
def test_what_an_interrupt_does_to_another_program_is_its_own_business(
    interrupted_at: Callable[..., dict[str, str]], module: str
) -> None:
    program = """
        import signal
        try:
            import kvgds
        except KeyboardInterrupt:
            print("its own", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=interrupted_at(module),
        capture_output=True,
        check=False,
        text=True,
        timeout=50,
    )
    assert (result.stdout, result.stderr) == ("its own True\n", "")


def test_an_interrupt_that_is_ignored_stays_so(
    interrupted_at: Callable[..., dict[str, str]],
) -> None:
    """As of what a shell starts in the background."""
    result = process(
        "--version",
        env=interrupted_at("numpy"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"kvgds {__version__}\n"


def test_an_interrupted_replay_leaves_a_sound_directory(tmp_path: Path) -> None:
    trace = tmp_path / "long"
    with trace.open("w") as file:
        for i in range(20_000):
            file.write(json.dumps({"hash_ids": list(range(30 * i, 30 * i + 30))}) + "\n")
    root = tmp_path / "kv"
    arguments = (
        "replay",
        str(trace),
        "--root",
        str(root),
        "--block-bytes",
        "4K",
        "--capacity",
        "64M",
    )
    with subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-m", "kvgds", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        while not list(root.glob("slab-*")):
            assert child.poll() is None
        child.send_signal(signal.SIGINT)
        try:
            output, errors = child.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGABRT)  # its stacks, into the assertion below
            output, errors = child.communicate(timeout=10)
    assert child.returncode == 130, errors
    assert "Traceback" not in output + errors
    assert call("fsck", root).exit_code == 0
