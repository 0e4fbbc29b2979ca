"""The command line on buckets: one line for what is wrong, nothing left, no secret told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

import buckets
from kvgds import Namespace
from kvgds.cli import app
from support import NAMESPACE, PAGE, content
from wire import Wire, reserve
from wirefaults import s3_error

if TYPE_CHECKING:
    from collections.abc import Callable
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

    def reach(self, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
        """Words that name the bucket without the file; keys then come from AWS's variables."""
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", self.server.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", self.server.secret_key)
        self.keys = {}
        return f"s3://{self.bucket}", "--endpoint", self.endpoint

    def doctor(self, *words: str, status: int = 0, env: Any = None) -> Any:
        """What doctor finds out about a bucket."""
        words = words or ("--config", str(self.file))
        result = self.run("doctor", "--json", *words, env=env)
        assert (result.exit_code, result.stderr) == (status, "")
        answer = json.loads(result.stdout)
        (part,) = answer["buckets"]
        assert answer["ok"] == part["ok"] == (status == 0)
        return part

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
    assert f"{where}/: 8.0 KiB" in result.stdout
    empty = shell.run("ls", f"{where}/elsewhere", "--endpoint", shell.endpoint, env=chain)
    assert "no blocks; if engines use a prefix, name that as well" in " ".join(empty.stdout.split())


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


# --- doctor -------------------------------------------------------------------------------------


def test_doctor_stores_and_loads_and_leaves_nothing(shell: Shell) -> None:
    result = shell.run("doctor", "--config", str(shell.file), "--json")
    assert result.exit_code == 0, result.output
    (part,) = json.loads(result.stdout)["buckets"]
    assert (part["ok"], part["backend"]) == (True, "OBJ")
    assert part["evidence"][-1].endswith("went there and back")
    assert shell.server.names(shell.bucket) == []


def test_doctor_takes_a_bucket_by_its_name(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    where, *reach = shell.reach(monkeypatch)
    part = shell.doctor("--root", f"{where}/team", *reach)
    assert part["bucket"] == f"{where}/team/"
    assert shell.server.names(shell.bucket) == []
    result = shell.run("doctor", "--endpoint", shell.endpoint)
    assert result.exit_code == 2
    assert "are for s3://" in flat(result.stderr)


def test_doctor_looks_at_a_bucket_once(shell: Shell) -> None:
    where = f"s3://{shell.bucket}"
    result = shell.run("doctor", "--json", "--config", str(shell.file), "--root", where)
    assert len(json.loads(result.stdout)["buckets"]) == 1


def test_doctor_says_why_it_is_not_nixl(shell: Shell, tmp_path: Path) -> None:
    """NIXL finds none of its plugins: a bucket alone does without."""
    environment = {
        **os.environ,
        **shell.keys,
        "NIXL_PLUGIN_DIR": str(tmp_path / "none"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", "kvgds", "doctor", "--json", "--config", str(shell.file)]
    for backend, works in (("auto", True), ("nixl", False)):
        done = subprocess.run(
            command,
            env={**environment, "KVGDS_TIERS__0__BACKEND": backend},
            capture_output=True,
            check=False,
            text=True,
            timeout=50,
        )
        assert (done.returncode, done.stderr) == (0 if works else 1, "")
        answer = json.loads(done.stdout)
        (part,) = answer["buckets"]
        assert (answer["ok"], part["ok"]) == (works, works)
        assert part["backend"] == ("obstore" if works else "")
        (way,) = part["refused"]
        assert "OBJ plugin can't be used" in way["why"]
        assert way["fix"] == "pip install nixl-cu12 instead of nixl-cu13, or leave it to obstore"
        assert shell.server.names(shell.bucket) == []


DENIED = "see to the keys, and what those may do: list, get, put and delete"
FAULTS: dict[str, tuple[Callable[[Wire], None], str]] = {
    "nobody": (Wire.refuse, "start the server, or see to endpoint"),
    "403": (lambda wire: wire.answer(s3_error(403, "AccessDenied")), DENIED),
    "no PUT": (lambda wire: wire.answer(s3_error(403, "AccessDenied"), method="PUT"), DENIED),
    "no GET": (lambda wire: wire.answer(s3_error(403, "AccessDenied"), target="*.kv*"), DENIED),
    "no bucket": (
        lambda wire: wire.answer(s3_error(404, "NoSuchBucket")),
        "make the bucket, or see to bucket, region and endpoint",
    ),
    "clock": (
        lambda wire: wire.answer(s3_error(403, "RequestTimeTooSkewed")),
        "set this machine's clock",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("backend", ["nixl", "obstore"])
def test_doctor_says_what_is_wrong_and_leaves_nothing(
    s3: JuiceServer, tmp_path: Path, backend: str, fault: str
) -> None:
    strike, fix = FAULTS[fault]
    with Wire(s3.host, s3.port) as wire:
        shell = Shell(s3, tmp_path, wire.endpoint)
        strike(wire)
        part = shell.doctor(status=1, env={"KVGDS_TIERS__0__BACKEND": backend})
        wire.ok()
    (way,) = part["refused"]
    assert way["fix"] == fix
    assert way["why"] == part["summary"]
    assert s3.names(shell.bucket) == []


def test_doctor_clears_away_what_a_killed_one_left(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("kvgds-doctor/0123456789abcdef/one.kv", "mine/two"):
        shell.server.put(shell.bucket, name, b"x")
    shell.doctor()
    assert len(shell.server.names(shell.bucket)) == 2
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 3700)
    shell.doctor()
    assert shell.server.names(shell.bucket) == ["mine/two"]


# --- how a bucket is come to --------------------------------------------------------------------


def test_the_endpoint_of_aws_s_variables(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    where, *_ = shell.reach(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", shell.endpoint)
    assert shell.run("ls", where).exit_code == 0
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert shell.run("ls", where).exit_code == 1
    assert shell.run("ls", where, "--endpoint", shell.endpoint).exit_code == 0


@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_the_region_of_aws_s_variables(
    s3: JuiceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "eu-north-1")
    with Wire(s3.host, s3.port) as wire:
        where, *reach = Shell(s3, tmp_path, wire.endpoint).reach(monkeypatch)
        for more in ((), ("--region", "eu-west-3")):
            CliRunner().invoke(app, ["ls", where, *reach, *more])
        regions = [request.headers["authorization"].split("/")[2] for request in wire.seen]
    assert (regions[0], regions[-1]) == ("eu-north-1", "eu-west-3")


def test_an_option_goes_before_the_file(shell: Shell) -> None:
    """Without what the file says for TLS, which is not used then."""
    text = shell.file.read_text().replace(shell.endpoint, "https://127.0.0.1:9")
    shell.file.write_text(text + "ca_bundle = '/etc/ca.pem'\n")
    assert shell.call("ls", "--endpoint", shell.endpoint)["layout"] == "objects"


def test_no_keys_at_all(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked last is the machine that this one may run on."""
    where, *reach = shell.reach(monkeypatch)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with reserve() as held:
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{held.getsockname()[1]}")
        result = shell.run("ls", where, *reach)
    assert result.exit_code == 1
    said = "give access_key and secret_key, or set what AWS's usual chain looks at: "
    assert said in result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="to be another user takes root")
def test_a_user_without_a_home() -> None:
    """Whom no list of users knows, as in a container: there is no file of keys to look at."""
    kept = "+dac_override,+dac_read_search"
    user = ["setpriv", "--reuid=54321", f"--inh-caps={kept}", f"--ambient-caps={kept}"]
    environ = {name: text for name, text in os.environ.items() if not name.startswith("AWS_")}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with reserve() as held:
        nobody = f"http://127.0.0.1:{held.getsockname()[1]}"
        command = [sys.executable, "-m", "kvgds", "ls", "s3://bucket", "--endpoint", nobody]
        done = subprocess.run(
            [*user, "--clear-groups", "env", "-u", "HOME", *command],
            env={**environ, "AWS_METADATA_ENDPOINT": nobody},
            capture_output=True,
            check=False,
            text=True,
            timeout=50,
        )
    if done.stderr.startswith("setpriv: "):  # who has not all that root may have
        pytest.skip(done.stderr)
    assert done.returncode == 1
    assert done.stderr.startswith("error: s3://bucket/ does not answer as it should; give access_")


def test_an_authority_that_nobody_knows(
    s3: JuiceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Wire(s3.host, s3.port, tls=True) as wire:
        shell = Shell(s3, tmp_path, wire.endpoint)
        where, *reach = shell.reach(monkeypatch)
        result = shell.run("ls", where, *reach)
        assert result.exit_code == 1
        assert "name the authority of the server's certificate in ca_bundle: " in result.stderr
        assert shell.run("ls", where, *reach, "--ca-bundle", wire.ca_bundle).exit_code == 0


def test_gc_tells_what_it_could_not_delete(s3: JuiceServer, tmp_path: Path) -> None:
    with Wire(s3.host, s3.port) as wire:
        shell = Shell(s3, tmp_path, wire.endpoint)
        for key in (b"a", b"b", b"c"):
            shell.put(key)
        kept = buckets.name_of(b"b")
        wire.answer(s3_error(403, "AccessDenied"), method="DELETE", target=f"*{kept[-20:]}")
        where = f"s3://{shell.bucket}"
        result = shell.run("gc", where, "--config", str(shell.file), "--keep-bytes", "0")
    assert result.exit_code == 1
    assert "dropped 2 blocks" in result.stdout
    assert "could not be dropped: 1 block" in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {kept}: ")
    assert "AccessDenied" in line


@pytest.mark.parametrize(
    "words",
    [
        ("ls", "s3://me:SeCrEt@kvgds/"),
        ("ls", "s3://kvgds", "--endpoint", "http://me:SeCrEt@host"),
        ("doctor", "--root", "s3://me:SeCrEt@kvgds"),
    ],
)
def test_a_secret_where_none_belongs_is_not_repeated(shell: Shell, words: tuple[str, ...]) -> None:
    result = shell.run(*words, env=dict.fromkeys(shell.keys))
    assert result.exit_code == 2
    assert "SeCrEt" not in result.output


# --- errors -------------------------------------------------------------------------------------


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
        (("doctor", "--root", "s3://K"), "value for --root: must be a bucket's name"),
    ],
)
def test_wrong_calls(shell: Shell, words: tuple[str, ...], says: str) -> None:
    result = shell.run(*words, env=dict.fromkeys(shell.keys))
    assert result.exit_code == 2
    assert says in flat(result.stderr)


def test_a_bucket_that_the_settings_do_not_name(shell: Shell) -> None:
    result = shell.run("ls", "s3://another", "--config", str(shell.file))
    assert (result.exit_code, "has no tier in the bucket" in result.stderr) == (1, True)
