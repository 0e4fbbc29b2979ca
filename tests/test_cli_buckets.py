"""The command line on buckets: one line for what is wrong, nothing left, no secret told."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

import buckets
from kvgds import Namespace
from kvgds.cli import app
from support import NAMESPACE, PAGE, content
from wire import Wire

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result

    from s3 import JuiceServer

OTHER = Namespace(model="other")


def flat(text: str) -> str:
    """Without the lines of boxes and tables."""
    return " ".join(text.replace("│", " ").split())


class Shell:
    """Runs kvgds with a bucket's settings in a file and its keys in variables."""

    def __init__(self, server: JuiceServer, folder: Path, endpoint: str | None = None) -> None:
        self.server = server
        self.bucket = server.make_bucket()
        self.endpoint = endpoint or server.endpoint
        self.file = folder / "kvgds.toml"
        self.file.write_text(
            "[namespace]\nmodel = 'm'\n[[tiers]]\n"
            f"bucket = '{self.bucket}'\nendpoint = '{self.endpoint}'\nretries = 0\n"
        )
        self.keys = {
            "KVGDS_TIERS__0__ACCESS_KEY": server.access_key,
            "KVGDS_TIERS__0__SECRET_KEY": server.secret_key,
        }

    def put(self, key: bytes, namespace: Namespace = NAMESPACE) -> None:
        buckets.put(self.server, self.bucket, key, content(key, PAGE), namespace)

    def run(self, *words: str, env: dict[str, str | None] | None = None) -> Result:
        given = {**self.keys, **(env or {})}
        result = CliRunner().invoke(app, words, env=given, prog_name="kvgds")
        assert "Traceback" not in result.output
        assert self.server.secret_key not in result.output
        return result

    def call(self, command: str, *words: str, status: int = 0) -> Any:
        where = f"s3://{self.bucket}"
        result = self.run(command, where, "--config", str(self.file), "--json", *words)
        assert result.exit_code == status, result.output
        return json.loads(result.stdout)


@pytest.fixture
def shell(s3: JuiceServer, tmp_path: Path) -> Shell:
    return Shell(s3, tmp_path)


def test_ls(shell: Shell) -> None:
    for key, namespace in ((b"a", NAMESPACE), (b"b", NAMESPACE), (b"c", OTHER)):
        shell.put(key, namespace)
    found = shell.call("ls", "--limit", "5")
    assert (found["root"], found["layout"]) == (f"s3://{shell.bucket}/", "objects")
    assert sorted(use["blocks"] for use in found["namespaces"]) == [1, 2]
    assert {entry["key"] for entry in found["entries"]} == {b"a".hex(), b"b".hex(), b"c".hex()}


def test_ls_by_the_usual_chain(shell: Shell) -> None:
    """Without a file of settings: keys from AWS's variables, the rest by options."""
    shell.put(b"a")
    chain = {
        "AWS_ACCESS_KEY_ID": shell.server.access_key,
        "AWS_SECRET_ACCESS_KEY": shell.server.secret_key,
        **dict.fromkeys(shell.keys),
    }
    where = f"s3://{shell.bucket}"
    result = shell.run(
        "ls", where, "--endpoint", shell.endpoint, "--region", "us-east-1", env=chain
    )
    assert result.exit_code == 0, result.output
    assert "layout objects" in result.stdout


def test_fsck_finds_and_puts_away(shell: Shell) -> None:
    shell.put(b"a")
    shell.put(b"b")
    name = buckets.name_of(b"b")
    buckets.spoil(shell.server, shell.bucket, name)
    report = shell.call("fsck", status=1)
    assert [(each["kind"], each["place"]) for each in report["problems"]] == [("corrupt", name)]
    assert shell.call("fsck", "--stamps-only")["clean"]
    assert shell.call("fsck", "--repair")["clean"]
    assert list(buckets.blocks(shell.server, shell.bucket)) == [buckets.name_of(b"a")]


def test_gc_by_size(shell: Shell) -> None:
    for n in range(5):
        shell.put(b"%d" % n)
    size = str(2 * 2 * PAGE)
    would = shell.call("gc", "--keep-bytes", size, "--dry-run")
    assert (would["blocks"], would["kept_blocks"]) == (3, 2)
    assert len(buckets.blocks(shell.server, shell.bucket)) == 5
    assert shell.call("gc", "--keep-bytes", size)["blocks"] == 3
    assert len(buckets.blocks(shell.server, shell.bucket)) == 2


def test_gc_by_age_and_namespace(shell: Shell) -> None:
    shell.put(b"a")
    shell.put(b"b", OTHER)
    assert shell.call("gc", "--older-than", "1h")["blocks"] == 0
    digest = OTHER.digest.hex()
    assert shell.call("gc", "--older-than", "0s", "--namespace", digest)["blocks"] == 1
    assert list(buckets.blocks(shell.server, shell.bucket)) == [buckets.name_of(b"a")]


def test_doctor_stores_and_loads_and_leaves_nothing(shell: Shell) -> None:
    result = shell.run("doctor", "--config", str(shell.file), "--json")
    assert result.exit_code == 0, result.output
    (part,) = json.loads(result.stdout)["buckets"]
    assert (part["ok"], part["backend"]) == (True, "OBJ")
    assert part["evidence"][-1].endswith("went there and back")
    assert shell.server.names(shell.bucket) == []


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"KVGDS_TIERS__0__SECRET_KEY": "not-the-one"}, "see to secret_key"),
        ({"KVGDS_TIERS__0__ACCESS_KEY": "nobody"}, "see to access_key"),
    ],
)
@pytest.mark.parametrize("command", ["ls", "fsck", "gc", "doctor"])
def test_keys_that_are_wrong(shell: Shell, command: str, keys: Any, says: str) -> None:
    where = [] if command == "doctor" else [f"s3://{shell.bucket}"]
    more = ["--keep-bytes", "0"] if command == "gc" else []
    result = shell.run(command, *where, "--config", str(shell.file), *more, env=keys)
    assert result.exit_code == 1
    assert says in flat(result.output)
    if command != "doctor":
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_nobody_there(s3: JuiceServer, tmp_path: Path) -> None:
    with Wire(s3.host, s3.port) as wire:
        shell = Shell(s3, tmp_path, wire.endpoint)
        wire.refuse()
        result = shell.run("ls", f"s3://{shell.bucket}", "--config", str(shell.file))
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert "start the server" in result.stderr
        assert shell.run("doctor", "--config", str(shell.file)).exit_code == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("ls", "/nowhere", "--endpoint", "http://h"), "are for s3://"),
        (("ls", "s3://K"), "must be a bucket's name"),
        (("ls", "s3://kvgds", "--endpoint", "h"), "must be http:// or https://"),
        (("fsck", "s3://kvgds", "--rebuild"), "each object describes itself"),
    ],
)
def test_wrong_calls(shell: Shell, words: tuple[str, ...], says: str) -> None:
    result = shell.run(*words, env=dict.fromkeys(shell.keys))
    assert result.exit_code == 2
    assert says in flat(result.stderr)


def test_a_bucket_that_the_settings_do_not_name(shell: Shell) -> None:
    result = shell.run("ls", "s3://another", "--config", str(shell.file))
    assert (result.exit_code, "has no tier in the bucket" in result.stderr) == (1, True)
