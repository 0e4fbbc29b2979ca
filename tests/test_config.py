"""Settings: what is wrong is named with field, value and rule, before anything is opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from kvgds import ConfigError, EngineConfig, FileTier, Namespace, ObjectTier, load_config

TIER = FileTier(root=Path("kv"), capacity_bytes=1 << 20)
BASE: dict[str, Any] = {"namespace": Namespace(model="m"), "tiers": (TIER,)}


def only_file_tier(config: EngineConfig) -> FileTier:
    (tier,) = config.tiers
    assert isinstance(tier, FileTier)
    return tier


def test_defaults_are_valid_and_frozen() -> None:
    config = EngineConfig(**BASE)
    assert config.path == "auto"
    assert (TIER.layout, TIER.verify, TIER.direct_io, TIER.durable) == (
        "slabs",
        "full",
        "auto",
        "process",
    )
    with pytest.raises(ValueError, match="frozen"):
        config.timeout_s = 5.0  # type: ignore[misc]


def test_a_root_may_be_text() -> None:
    assert FileTier(root="/kv", capacity_bytes=1 << 20).root == Path("/kv")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("capacity_bytes", 0),
        ("capacity_bytes", 8191),
        ("capacity_bytes", -1),
        ("capacity_bytes", 1e9),
        ("capacity_bytes", "1 GiB"),
        ("capacity_bytes", True),
        ("root", ""),
        ("root", 7),
        ("root", None),
        ("root", b"kv"),
        ("root", "/kv\0more"),
        ("root", "/kv\ud800"),
        ("capacity_bytes", 1 << 63),
        ("layout", "slab"),
        ("verify", True),
        ("direct_io", "yes"),
        ("durable", ""),
        ("capacity", 1 << 20),
    ],
)
def test_tiers_that_can_not_be(field: str, value: Any) -> None:
    values = {"root": Path("kv"), "capacity_bytes": 1 << 20, field: value}
    with pytest.raises(ConfigError) as caught:
        FileTier(**values)
    error = caught.value
    assert field in error.field or field in error.rule
    assert error.rule
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("namespace", "m"),
        ("tiers", ()),
        ("tiers", (TIER, TIER)),
        ("tiers", TIER),
        ("path", "GDS"),
        ("bounce_bytes", 4096),
        ("gather_bytes", -1),
        ("bounce_bytes", 1.5),
        ("bounce_bytes", 1 << 63),
        ("queue_ops", 1 << 63),
        ("inflight_ops", 1 << 63),
        ("inflight_bytes", 1 << 63),
        ("timeout_s", 0.0),
        ("timeout_s", -1.0),
        ("timeout_s", float("inf")),
        ("timeout_s", float("nan")),
        ("timeout_s", "5"),
        ("drain_timeout_s", 0),
        ("queue_ops", 0),
        ("inflight_ops", 0),
        ("inflight_bytes", 1),
        ("transport_threads", 0),
        ("transport_threads", 65),
        ("timeout", 5.0),
    ],
)
def test_engines_that_can_not_be(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{**BASE, field: value})
    assert field in caught.value.field or field in caught.value.rule
    assert caught.value.rule


def test_an_integer_that_python_does_not_write_is_told_by_its_bits() -> None:
    for huge in (1 << 20_000, -(1 << 20_000)):
        for field in ("bounce_bytes", "queue_ops", "transport_threads"):
            with pytest.raises(ConfigError, match="integer of 20,001 bits"):
                EngineConfig(**{**BASE, field: huge})
        with pytest.raises(ConfigError, match="integer of 20,001 bits"):
            FileTier(root=Path("kv"), capacity_bytes=huge)


def test_tiers_may_be_a_list() -> None:
    assert EngineConfig(**{**BASE, "tiers": [TIER]}).tiers == (TIER,)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"tiers": (TIER,)}, "EngineConfig.namespace: must be given"),
        ({**BASE, "tiers": ()}, "EngineConfig.tiers=(): must be a FileTier, an"),
        ({**BASE, "tiers": 7}, "EngineConfig.tiers=7: must be a FileTier, an"),
        ({**BASE, "tiers": [7]}, "EngineConfig.tiers=[7]: must be a FileTier, an"),
        ({**BASE, "timeout": 5}, "EngineConfig.timeout=5: is no setting; those are namespace, "),
        ({**BASE, "timeout_s": 0}, "EngineConfig.timeout_s=0: must be greater than 0"),
        (
            {**BASE, "tiers": [{"root": "/kv", "capacity": 1}]},
            "FileTier.capacity=1: is no setting; those are root, capacity_bytes, ",
        ),
    ],
)
def test_what_is_wrong_is_one_clear_sentence(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**values)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"root": "/kv"}, "FileTier.capacity_bytes: must be given"),
        ({"root": "", "capacity_bytes": 8192}, "FileTier.root='': must be the path of a directory"),
        ({"root": "/kv", "capacity": 8192}, "FileTier.capacity=8192: is no setting; those are "),
    ],
)
def test_what_is_wrong_with_a_tier_too(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FileTier(**values)
    assert str(caught.value).startswith(says)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="namespace"):
        EngineConfig(tiers=(TIER,))  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="root"):
        FileTier(capacity_bytes=1 << 20)  # type: ignore[call-arg]


# --- files and the environment ----------------------------------------------------------------

TEXT = """
timeout_s = 5
bounce_bytes = 1048576

[namespace]
model = "Qwen/Qwen3-8B"
block_tokens = 32

[[tiers]]
root = "/nvme/kv"
capacity_bytes = 1_073_741_824
verify = "stamp"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "kvgds.toml"
    path.write_text(text, "utf-8")
    return path


def test_a_file(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, TEXT), {})
    assert config.namespace == Namespace(model="Qwen/Qwen3-8B", block_tokens=32)
    assert config.timeout_s == 5
    assert config.tiers[0] == FileTier(
        root=Path("/nvme/kv"), capacity_bytes=1 << 30, verify="stamp"
    )


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    environ = {
        "KVGDS_TIMEOUT_S": "7.5",
        "KVGDS_NAMESPACE__RANK": "1",
        "KVGDS_NAMESPACE__WORLD": "2",
        "KVGDS_TIERS__0__ROOT": "/other",
        "KVGDS_PATH": "bounce",
        "HOME": "/nowhere",
        "XKVGDS_TIMEOUT_S": "9",
    }
    config = load_config(written(tmp_path, TEXT), environ)
    assert (config.timeout_s, config.path) == (7.5, "bounce")
    assert (config.namespace.rank, config.namespace.world) == (1, 2)
    assert only_file_tier(config).root == Path("/other")
    assert only_file_tier(config).verify == "stamp"


def test_the_environment_alone() -> None:
    environ = {
        "KVGDS_NAMESPACE__MODEL": "m",
        "KVGDS_TIERS__0__ROOT": "/kv",
        "KVGDS_TIERS__0__CAPACITY_BYTES": "1048576",
    }
    assert only_file_tier(load_config(None, environ)).capacity_bytes == 1 << 20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KVGDS_TIMEOUT", "5"),
        ("KVGDS_TIMEOUT_S", "soon"),
        ("KVGDS_TIMEOUT_S__X", "5"),
        ("KVGDS_TIERS__1__ROOT", "/kv"),
        ("KVGDS_TIERS__7__ROOT", "/kv"),
        ("KVGDS_TIERS__X__ROOT", "/kv"),
        ("KVGDS_TIERS__0", "/kv"),
        ("KVGDS_TIERS__0__NOTHING", "1"),
        ("KVGDS_NAMESPACE__NOTHING", "1"),
        ("KVGDS_NAMESPACE", "m"),
        ("KVGDS_", "1"),
        ("KVGDS___", "1"),
        ("KVGDS_TIERS__²__ROOT", "/kv"),
        pytest.param("KVGDS_TIERS__" + "9" * 5000 + "__ROOT", "/kv", id="a number without end"),
        pytest.param("KVGDS_TIMEOUT_S", "9" * 5000, id="digits without end"),
        pytest.param("KVGDS_TIMEOUT_S", "[" * 5000, id="brackets without end"),
        pytest.param("KVGDS_QUEUE_OPS", "0x" + "f" * 5000, id="hex digits without end"),
        pytest.param("KVGDS_NAMESPACE__RANK", "0x" + "f" * 5000, id="a rank without end"),
        pytest.param("KVGDS_NAMESPACE__BLOCK_TOKENS", "0x" + "f" * 5000, id="tokens without end"),
        ("KVGDS_TIMEOUT_S", "5\nqueue_ops = 1"),
        ("KVGDS_TIERS__0__ROOT", '"/kv\\u0000"'),
        ("KVGDS_TIERS", "{0 = 1}"),
        ("KVGDS_TIERS__", "1"),
        ("KVGDS_TIERS", "[[]]"),
    ],
)
def test_variables_that_name_nothing(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(ConfigError):
        load_config(written(tmp_path, TEXT), {name: value})


VARIABLES = {
    "KVGDS_NAMESPACE__MODEL": "m",
    "KVGDS_TIERS__0__ROOT": "/kv",
    "KVGDS_TIERS__0__CAPACITY_BYTES": "1048576",
}


@pytest.mark.parametrize(
    "text",
    ["2024", "12345678901234567890", "1979-05-27", "true", "0x10", "1e3", "[1]", "nan", "#1"],
)
def test_a_text_may_look_like_something_else(text: str) -> None:
    changed = {f"KVGDS_NAMESPACE__{name}": text for name in ("MODEL", "REVISION", "DTYPE")}
    config = load_config(None, VARIABLES | changed | {"KVGDS_TIERS__0__ROOT": text})
    namespace = config.namespace
    assert (namespace.model, namespace.revision, namespace.dtype) == (text, text, text)
    assert only_file_tier(config).root == Path(text)


def test_a_text_may_be_in_quotes() -> None:
    """As those of files of variables, some of whose readers leave them where they are."""
    changed = {"KVGDS_TIERS__0__ROOT": '"/other"', "KVGDS_PATH": "'bounce'"}
    config = load_config(None, VARIABLES | changed)
    assert (only_file_tier(config).root, config.path) == (Path("/other"), "bounce")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("KVGDS_TIMOUT_S", "5", "KVGDS_TIMOUT_S='5': names no setting; those are KVGDS_NAMESPACE,"),
        ("KVGDS_TIMEOUT_S", "soon", "KVGDS_TIMEOUT_S='soon': must be a valid number"),
        ("KVGDS_TIMEOUT_S", "0", "KVGDS_TIMEOUT_S=0: must be greater than 0"),
        ("KVGDS_PATH", "warp", "KVGDS_PATH='warp': must be 'auto', "),
        ("KVGDS_ALLOW_COMPAT", "True", "KVGDS_ALLOW_COMPAT='True': must be true or false"),
        ("KVGDS_ALLOW_COMPAT", "true", "KVGDS_ALLOW_COMPAT=True: means something with path='gds'"),
        ("KVGDS_BOUNCE_BYTES", "64M", "KVGDS_BOUNCE_BYTES='64M': must be a number of bytes"),
        ("KVGDS_NAMESPACE", "m", "KVGDS_NAMESPACE='m': must be a table"),
        ("KVGDS_NAMESPACE__RANK", "one", "KVGDS_NAMESPACE__RANK='one': must be an int"),
        (
            "KVGDS_NAMESPACE__MODLE",
            "m",
            "KVGDS_NAMESPACE__MODLE='m': names no setting; those are KVGDS_NAMESPACE__MODEL,",
        ),
        (
            "KVGDS_TIERS__0__LAYOUT",
            "slab",
            "KVGDS_TIERS__0__LAYOUT='slab': must be 'slabs' or 'files'",
        ),
        ("KVGDS_TIERS__1__ROOT", "/kv", "KVGDS_TIERS__1__ROOT='/kv': names no setting; those are "),
        ("KVGDS_TIERS__2__ROOT", "/kv", "KVGDS_TIERS__2__ROOT='/kv': tiers are named by KVGDS_TI"),
        (
            "KVGDS_TIERS__0__CAPACITY_BYTES",
            "100G",
            "KVGDS_TIERS__0__CAPACITY_BYTES='100G': must be a number of bytes",
        ),
        ("KVGDS_TIERS", "[{root = ''}]", "KVGDS_TIERS.0.root='': must be the path"),
    ],
)
def test_a_wrong_value_is_told_by_its_variable(
    tmp_path: Path, name: str, text: str, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, TEXT), {name: text})
    assert str(caught.value).startswith(says)


def test_what_a_file_says_is_told_by_its_own_name(tmp_path: Path) -> None:
    file = written(tmp_path, TEXT.replace("1_073_741_824", "'100G'"))
    with pytest.raises(ConfigError, match=r"^FileTier.capacity_bytes='100G': must be a number of"):
        load_config(file, {"KVGDS_TIERS__0__ROOT": "/other"})


def test_two_file_tiers_make_no_stack(tmp_path: Path) -> None:
    more = "\n[[tiers]]\nroot = '/more'\ncapacity_bytes = 8192"
    with pytest.raises(ConfigError, match=r"tiers=.*'FileTier'\]: must be a FileTier, an Obj"):
        load_config(written(tmp_path, TEXT + more), {})


@pytest.mark.parametrize("name", ["KVGDS_REQUIRE_GPU", "KVGDS_TRACE"])
def test_the_variables_of_the_test_suite_are_no_settings(name: str) -> None:
    assert load_config(None, VARIABLES | {name: "1"}) == load_config(None, VARIABLES)


@pytest.mark.parametrize(
    "text",
    [
        "timeout_s = ",
        "timeout_s = 5",
        "tiers = 5\n[namespace]\nmodel = 'm'",
        "tiers = [5]\n[namespace]\nmodel = 'm'",
        "namespace = 5\n[[tiers]]\nroot = '/kv'",
        "[namespace]\n[[tiers]]\nroot = '/kv'\ncapacity_bytes = 1048576",
        "[namespace]\nmodle = 'm'\n[[tiers]]\nroot = '/kv'\ncapacity_bytes = 1048576",
        TEXT + "\nnothing = 1",
        "nothing = 1" + TEXT,
        pytest.param("queue_ops = " + "9" * 5000 + TEXT, id="digits without end"),
        pytest.param("queue_ops = 0x" + "f" * 5000 + TEXT, id="hex digits without end"),
        pytest.param("queue_ops = " + "[" * 5000 + TEXT, id="brackets without end"),
        "queue_ops = 1979-05-27" + TEXT,
        "[[namespace]]\nmodel = 'm'",
    ],
)
def test_files_that_can_not_be(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_config(written(tmp_path, text), {})


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "binary"):
        with pytest.raises(ConfigError, match="can't be read"):
            load_config(path, {})


@pytest.mark.parametrize("path", [7, b"kvgds.toml", "kvgds\0.toml"])
def test_what_is_no_path_of_a_file(path: Any) -> None:
    with pytest.raises(ConfigError, match="config"):
        load_config(path, {})


def test_the_path_of_a_file_may_be_text(tmp_path: Path) -> None:
    assert load_config(str(written(tmp_path, TEXT)), {}).timeout_s == 5  # type: ignore[arg-type]


def test_the_library_reads_no_environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVGDS_TIMEOUT_S", "1")
    assert EngineConfig(**BASE).timeout_s == 30
    assert os.environ["KVGDS_TIMEOUT_S"] == "1"


# --- object tiers -----------------------------------------------------------------------------

SECRET = "SeCrEt/of+nobody"  # noqa: S105 - of nothing
FAR = ObjectTier(bucket="kvgds")
BUCKET_RULE = "must be a bucket's name: 3 to 63 of a-z, 0-9, '.' and '-'"
ENDPOINT_RULE = "must be http:// or https://, a host and perhaps a port, no more"
PREFIX_RULE = "must be names of letters, digits and !_.*'()=@- with / in between, none with a '.' "
KEY_RULE = "must be neither empty nor with spaces or ends of lines in it"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"bucket": ""}, f"bucket='': {BUCKET_RULE}"),
        ({"bucket": 7}, "bucket=7: must be a valid string"),
        ({"bucket": "KV"}, f"bucket='KV': {BUCKET_RULE}"),
        ({"bucket": "kvgds\n"}, f"bucket='kvgds\\n': {BUCKET_RULE}"),
        ({"bucket": "kv..gds"}, f"bucket='kv..gds': {BUCKET_RULE}"),
        ({"bucket": "10.0.0.1"}, f"bucket='10.0.0.1': {BUCKET_RULE}"),
        ({"endpoint": ""}, f"endpoint='': {ENDPOINT_RULE}"),
        ({"endpoint": "localhost:9000"}, f"endpoint='localhost:9000': {ENDPOINT_RULE}"),
        ({"endpoint": "http://h/path"}, f"endpoint='http://h/path': {ENDPOINT_RULE}"),
        ({"endpoint": "http://h:0"}, f"endpoint='http://h:0': {ENDPOINT_RULE}"),
        ({"endpoint": "http://h:65536"}, f"endpoint='http://h:65536': {ENDPOINT_RULE}"),
        ({"endpoint": "http://h\n"}, f"endpoint='http://h\\n': {ENDPOINT_RULE}"),
        ({"endpoint": f"http://me:{SECRET}@h"}, f"endpoint: {ENDPOINT_RULE}"),
        ({"region": ""}, "region='': must be a region's name: letters, digits and '-'"),
        ({"region": "us east"}, "region='us east': must be a region's name: letters, digits and"),
        ({"prefix": "a b"}, f"prefix='a b': {PREFIX_RULE}"),
        ({"prefix": "a//b"}, f"prefix='a//b': {PREFIX_RULE}"),
        ({"prefix": "../up"}, f"prefix='../up': {PREFIX_RULE}"),
        ({"prefix": "long" * 200}, f"prefix='{'long' * 200}': {PREFIX_RULE}"),
        ({"access_key": SECRET}, "secret_key: give both keys, or none of them"),
        ({"secret_key": SECRET}, "secret_key: give both keys, or none of them"),
        ({"session_token": SECRET}, "session_token: belongs to keys; give those too"),
        ({"access_key": "", "secret_key": SECRET}, f"access_key: {KEY_RULE}"),
        ({"access_key": "me", "secret_key": f"{SECRET}\n"}, f"secret_key: {KEY_RULE}"),
        ({"access_key": "me", "secret_key": 7}, "secret_key: must be a valid string"),
        ({"access_key": [SECRET], "secret_key": SECRET}, "access_key: must be a valid string"),
        ({"secret": SECRET}, "secret: is no setting; those are bucket, endpoint, region, prefix,"),
        ({"root": "/kv"}, "root='/kv': is no setting; those are bucket, endpoint, region, prefix,"),
        ({"addressing": "dns"}, "addressing='dns': must be 'auto', 'path' or 'virtual'"),
        (
            {"addressing": "virtual", "endpoint": "http://127.0.0.1:9000"},
            "addressing='virtual': needs an endpoint with a name, not a number; use 'path'",
        ),
        (
            {"addressing": "virtual", "endpoint": "http://[::1]:9000"},
            "addressing='virtual': needs an endpoint with a name, not a number; use 'path'",
        ),
        ({"ca_bundle": ""}, "ca_bundle='': must be the path of a PEM file"),
        ({"ca_bundle": 7}, "ca_bundle=7: must be the path of a PEM file"),
        ({"ca_bundle": "/ca\0"}, "ca_bundle='/ca\\x00': must be the path of a PEM file, without a"),
        ({"ca_bundle": "/\ud800"}, "ca_bundle='/\\ud800': must be the path of a PEM file, in "),
        (
            {"ca_bundle": "/ca.pem", "endpoint": "http://h"},
            "ca_bundle='/ca.pem': is of use with https only; change the endpoint",
        ),
        ({"checksums": "none"}, "checksums='none': must be 'required' or 'supported'"),
        ({"backend": "boto3"}, "backend='boto3': must be 'auto', 'nixl' or 'obstore'"),
        ({"write": "sync"}, "write='sync': must be 'back', 'through' or 'demote'"),
        ({"connections": 0}, "connections=0: must be greater than or equal to 1"),
        ({"connections": 257}, "connections=257: must be less than or equal to 256"),
        ({"connections": True}, "connections=True: must be a valid integer"),
        ({"retries": -1}, "retries=-1: must be greater than or equal to 0"),
        ({"connect_timeout_s": 0.0}, "connect_timeout_s=0.0: must be greater than 0"),
        ({"request_timeout_s": 1e300}, "request_timeout_s=1e+300: must be less than or equal to"),
        ({"request_timeout_s": float("nan")}, "request_timeout_s=nan: must be "),
    ],
)
def test_object_tiers_that_can_not_be(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ObjectTier(**{"bucket": "kvgds", **values})
    assert str(caught.value).startswith(f"ObjectTier.{says}")
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value) + repr(caught.value.value)


def test_what_an_object_tier_makes_of_its_settings() -> None:
    given: dict[str, Any] = {"endpoint": "https://[::1]:9000/", "prefix": "/a/b", "ca_bundle": "ca"}
    tier = ObjectTier(bucket="kvgds", **given)
    assert (tier.endpoint, tier.prefix, tier.ca_bundle) == (
        "https://[::1]:9000",
        "a/b/",
        Path("ca"),
    )


@pytest.mark.parametrize(
    ("values", "in_host"),
    [
        ({}, True),
        ({"bucket": "with.dots"}, False),  # no certificate of `*.host` is for such a name
        ({"endpoint": "https://host"}, False),
        ({"endpoint": "https://host", "addressing": "virtual"}, True),
        ({"addressing": "path"}, False),
    ],
)
def test_how_a_bucket_is_named(values: dict[str, Any], in_host: bool) -> None:  # noqa: FBT001 - a parameter of pytest's
    assert ObjectTier(**{"bucket": "kvgds", **values}).in_host == in_host


@pytest.mark.parametrize(
    ("tiers", "says"),
    [
        ((FAR, TIER), r"tiers=\['ObjectTier', 'FileTier'\]: must be a FileTier, an ObjectTier, or"),
        (
            (FAR, FAR),
            r"tiers=\['ObjectTier', 'ObjectTier'\]: must be a FileTier, an ObjectTier, or",
        ),
        ((TIER, FAR, FAR), r"tiers=\['FileTier', 'ObjectTier', 'ObjectTier'\]: must be"),
    ],
)
def test_stacks_that_can_not_be(tiers: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EngineConfig(**{**BASE, "tiers": tiers})


def test_objects_go_by_the_bounce_region() -> None:
    with pytest.raises(ConfigError, match=r"path='gds': objects go by the bounce region; use "):
        EngineConfig(**{**BASE, "tiers": (FAR,), "path": "gds"})
    assert EngineConfig(**{**BASE, "tiers": (TIER, FAR), "path": "gds"}).path == "gds"


# --- secrets ----------------------------------------------------------------------------------


def test_no_secret_is_shown() -> None:
    key = SecretStr(SECRET)
    tier = ObjectTier(bucket="kvgds", access_key=key, secret_key=key, session_token=key)
    config = EngineConfig(**{**BASE, "tiers": (TIER, tier)})
    for each in (tier, config):
        shown = (
            repr(each),
            str(each),
            f"{each}",
            str(each.model_dump()),
            str(each.model_dump(mode="json")),
            each.model_dump_json(),
        )
        assert not [text for text in shown if SECRET in text]
    assert tier.secret_key is not None
    assert tier.secret_key.get_secret_value() == SECRET


TWO_TIERS = f"""
[namespace]
model = "m"

[[tiers]]
root = "/nvme/kv"
capacity_bytes = 1_048_576

[[tiers]]
bucket = "kvgds"
endpoint = "https://minio.internal:9000"
prefix = "team"
access_key = "me"
secret_key = "{SECRET}"
ca_bundle = "/etc/ca.pem"
write = "through"
"""


def far_of(config: EngineConfig) -> ObjectTier:
    tier = config.tiers[-1]
    assert isinstance(tier, ObjectTier)
    return tier


def secret_of(config: EngineConfig) -> str | None:
    key = far_of(config).secret_key
    return None if key is None else key.get_secret_value()


def test_a_file_of_two_tiers(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, TWO_TIERS), {})
    near, far = config.tiers
    assert near == FileTier(root=Path("/nvme/kv"), capacity_bytes=1 << 20)
    assert far == ObjectTier(
        bucket="kvgds",
        endpoint="https://minio.internal:9000",
        prefix="team/",
        access_key=SecretStr("me"),
        secret_key=SecretStr(SECRET),
        ca_bundle=Path("/etc/ca.pem"),
        write="through",
    )


@pytest.mark.parametrize("quote", ["", '"', "'"])
@pytest.mark.parametrize("secret", [SECRET, "2024", "0x10", "true", "1979-05-27", "a#b", "=="])
def test_secrets_may_come_by_variables(tmp_path: Path, secret: str, quote: str) -> None:
    environ = {
        "KVGDS_TIERS__1__SECRET_KEY": f"{quote}{secret}{quote}",
        "KVGDS_TIERS__1__SESSION_TOKEN": f"{quote}{secret}{quote}",
        "KVGDS_TIERS__1__CA_BUNDLE": f"{quote}/ca/2024{quote}",
        "KVGDS_TIERS__1__CONNECTIONS": "4",
    }
    config = load_config(written(tmp_path, TWO_TIERS), environ)
    assert secret_of(config) == secret
    assert (far_of(config).connections, far_of(config).ca_bundle) == (4, Path("/ca/2024"))


def test_variables_alone_make_a_stack() -> None:
    environ = {"KVGDS_TIERS__1__BUCKET": "kvgds", "KVGDS_TIERS__1__WRITE": "demote"}
    config = load_config(None, VARIABLES | environ)
    assert [type(tier) for tier in config.tiers] == [FileTier, ObjectTier]
    alone = {"KVGDS_NAMESPACE__MODEL": "m", "KVGDS_TIERS__0__BUCKET": "kvgds"}
    assert load_config(None, alone).tiers == (FAR,)


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"KVGDS_TIERS__1__SECRET_KEY": SECRET}, "ObjectTier.bucket: must be given"),
        ({"KVGDS_TIERS__0__SECRET_KEY": SECRET}, "KVGDS_TIERS__0__SECRET_KEY: is no setting; th"),
        ({"KVGDS_TIERS__1__SECRT_KEY": SECRET}, "KVGDS_TIERS__1__SECRT_KEY='***': names no sett"),
        ({"KVGDS_TIERS__2__SECRET_KEY": SECRET}, "KVGDS_TIERS__2__SECRET_KEY='***': tiers are "),
        ({"KVGDS_ACCESS_KEY": SECRET}, "KVGDS_ACCESS_KEY='***': names no setting; those are "),
        ({"KVGDS_TIERS__0__SECRET_KEY__X": SECRET}, "KVGDS_TIERS__0__SECRET_KEY__X='***': names"),
        (
            {"KVGDS_TIERS__1__BUCKET": "kvgds", "KVGDS_TIERS__1__SECRET_KEY": SECRET},
            "KVGDS_TIERS__1__SECRET_KEY: give both keys, or none of them",
        ),
        (
            {"KVGDS_TIERS__1__BUCKET": "kvgds", "KVGDS_TIERS__1__SECRET_KEY": f"{SECRET} "},
            f"KVGDS_TIERS__1__SECRET_KEY: {KEY_RULE}",
        ),
        (
            {
                "KVGDS_TIERS__1__BUCKET": "kvgds",
                "KVGDS_TIERS__1__ENDPOINT": f"http://me:{SECRET}@host",
            },
            f"KVGDS_TIERS__1__ENDPOINT: {ENDPOINT_RULE}",
        ),
        ({"KVGDS_TIERS__1": SECRET}, "tiers=['dict', 'str']: must be an array of one or two"),
        (
            {"KVGDS_TIERS__1": "'x'", "KVGDS_TIERS__1__SECRET_KEY": SECRET},
            "KVGDS_TIERS__1__SECRET_KEY: lies in what is set to be no table",
        ),
        (
            {"KVGDS_TIERS__1": f"{{bucket = 'kvgds', secret_key = '{SECRET}'}}"},
            "KVGDS_TIERS__1.secret_key: give both keys, or none of them",
        ),
    ],
)
def test_what_is_wrong_with_a_bucket_s_variables(environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, VARIABLES | environ)
    assert str(caught.value).startswith(says)
    assert SECRET not in str(caught.value) + repr(caught.value.value)


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({}, "namespace.model: must be given: KVGDS_NAMESPACE__MODEL, or "),
        ({"KVGDS_TIERS__0__ROOT": "/kv"}, "namespace.model: must be given: KVGDS_NAMESPACE__MODEL"),
        ({"KVGDS_NAMESPACE__MODEL": "m"}, "tiers: must be given: KVGDS_TIERS__0__ROOT or KVGDS_T"),
    ],
)
def test_variables_that_are_not_all(environ: dict[str, str], says: str) -> None:
    """Name the ones that are missing."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, environ)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"[{{bucket = 'kvgds', secret_key = '{SECRET}'}}]", "KVGDS_TIERS.0.secret_key: give both"),
        (
            f"{{bucket = 'kvgds', secret_key = '{SECRET}'}}",
            "KVGDS_TIERS={'bucket': 'kvgds', 'secret_key': '***'}: must be an array of one or two",
        ),
    ],
)
def test_a_variable_that_holds_all_tiers_is_told_by_its_name(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"KVGDS_NAMESPACE__MODEL": "m", "KVGDS_TIERS": text})
    assert str(caught.value).startswith(says)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        TWO_TIERS.replace('access_key = "me"\n', ""),
        TWO_TIERS.replace('"me"', "7"),
        TWO_TIERS.replace('bucket = "kvgds"\n', ""),
        TWO_TIERS + "nothing = 1",
        f"secret_key = '{SECRET}'" + TWO_TIERS,
        TWO_TIERS.replace("[namespace]", f"[namespace]\nsecret_key = '{SECRET}'"),
        f"namespace.model = {{secret_key = '{SECRET}'}}\n[[tiers]]\nbucket = 'kvgds'",
        f"[[namespace]]\nmodel = 'm'\nsecret_key = '{SECRET}'\n[[tiers]]\nbucket = 'kvgds'",
        f"timeout_s = {{secret_key = '{SECRET}'}}" + TWO_TIERS,
        f"[namespace]\nmodel = 'm'\n[tiers]\nbucket = 'kvgds'\nsecret_key = '{SECRET}'",
        TWO_TIERS.replace('"kvgds"', f"{{secret_key = '{SECRET}'}}"),
        TWO_TIERS.replace(f'"{SECRET}"', f'"{SECRET}'),
    ],
)
def test_an_error_of_a_file_shows_no_secret(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text), {})
    assert SECRET not in str(caught.value) + repr(caught.value.value)
    assert "\n" not in str(caught.value)
