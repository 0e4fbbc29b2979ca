"""Settings: frozen, checked when made, units in their names, secrets out of ``repr``.

Pure. A wrong setting raises :class:`~kvgds.errors.ConfigError`, which names the field,
the value and the rule, before anything is opened.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Self,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from kvgds.blocks import PAGE, Namespace
from kvgds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic_core import ErrorDetails

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
UpToAnHour = Annotated[float, Field(gt=0, le=3600)]
_MOST = (1 << 63) - 1  # bytes of a file, and what TOML takes for an integer
_SECRET_NAME = re.compile("key|secret|token|password", re.IGNORECASE)
_ENDPOINT = re.compile(r"https?://(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(?::([0-9]{1,5}))?")
_HOST_NUMBER = re.compile(r"(\[.*|[0-9.]+)(:[0-9]+)?")
_BUCKET = re.compile(r"(?!.*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_KEY = re.compile(r"[!-~]+")
_PREFIX_BYTES = 512
_LAST_PORT = 65535
_PREFIX = re.compile(r"([A-Za-z0-9!_.*'()=@-]+/)*")
_OF_THE_TESTS = ("KVGDS_REQUIRE_GPU", "KVGDS_TRACE")  # of the test suite: no settings


class _Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True
    )

    def __init__(self, /, **values: Any) -> None:  # noqa: ANN401 - pydantic's own signature
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _config_error(type(self), error) from None


class FileTier(_Settings):
    """Blocks as files under one directory.

    Attributes:
        root: the directory; made if it is missing (its parent must exist), mode 0700.
        capacity_bytes: most bytes of blocks kept, stamps and padding included; the least
            recently used go first, at opening too if it is less than it was.
        layout: ``"slabs"``: preallocated files for one engine alone. ``"files"``: a file a
            block, for directories that several processes or hosts share.
        verify: ``"full"`` checks stamp and payload checksum on every load, ``"stamp"`` only
            the stamp, and then stores write no checksum. Blocks without one are a miss under
            ``"full"``: slabs drop them at opening, with ``"files"`` `prefix` still counts them.
        direct_io: ``"auto"`` uses O_DIRECT if a trial at open shows that it works,
            ``"require"`` raises PathUnavailable if not, ``"never"`` goes through the page cache.
        durable: what an acknowledged store survives: the death of the ``"process"``, or loss
            of ``"power"`` as well (fsync before each acknowledgement).
    """

    root: Path
    capacity_bytes: Annotated[int, Field(ge=2 * PAGE, le=_MOST)]
    layout: Literal["slabs", "files"] = "slabs"
    verify: Literal["full", "stamp"] = "full"
    direct_io: Literal["auto", "require", "never"] = "auto"
    durable: Literal["process", "power"] = "process"

    @field_validator("root", mode="before")
    @classmethod
    def _path(cls, root: object) -> object:
        return _path_of(root, "a directory")


def _path_of(given: object, what: str) -> Path:
    path = os.fspath(given) if isinstance(given, str | os.PathLike) else None
    if not isinstance(path, str) or not path:
        raise ValueError(f"must be the path of {what}")
    if "\0" in path:
        raise ValueError(f"must be the path of {what}, without a NUL in it")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        text = f"must be the path of {what}, in {error.encoding}, as all names of files here"
        raise ValueError(text) from None
    return Path(path)


class ObjectTier(_Settings):
    """Blocks as objects in a bucket that speaks S3.

    Attributes:
        bucket: the bucket; it must be there.
        endpoint: ``"https://host:port"`` of the server; None: AWS's own, of the region.
        region: the bucket's region; servers other than AWS take any.
        prefix: what the names of all objects begin with; it ends with a ``/``, given or not.
        access_key: with ``secret_key`` and perhaps ``session_token``; None: AWS's usual chain, see
            docs/objects.md.
        addressing: whether the bucket is named in the ``"path"`` or in the host (``"virtual"``);
            ``"auto"``: in the host at AWS unless it has dots, in the path elsewhere.
        ca_bundle: PEM file of the authorities that the server's certificate may come from.
        checksums: whether the server gets checksums with requests only where they are
            ``"required"``, which every server understands, or wherever they are ``"supported"``.
        backend: what moves the bytes: NIXL's OBJ plugin (``"nixl"``), ``"obstore"``, or
            ``"auto"``: the first that works.
        write: behind a FileTier, when blocks are written here: ``"back"``: after they were stored;
            ``"through"``: a store ends when they are here too; ``"demote"``: when they would be
            evicted from the FileTier.
        connections: requests at once, and as many again for looking things up.
        connect_timeout_s: longest wait for a connection, where the backend can be told.
        request_timeout_s: longest wait for one answer; what takes longer counts as a failure.
        retries: how often a failed request is tried again.
    """

    bucket: str
    endpoint: str | None = None
    region: str = "us-east-1"
    prefix: str = ""
    access_key: SecretStr | None = None
    secret_key: SecretStr | None = None
    session_token: SecretStr | None = None
    addressing: Literal["auto", "path", "virtual"] = "auto"
    ca_bundle: Path | None = None
    checksums: Literal["required", "supported"] = "required"
    backend: Literal["auto", "nixl", "obstore"] = "auto"
    write: Literal["back", "through", "demote"] = "back"
    connections: Annotated[int, Field(ge=1, le=256)] = 16
    connect_timeout_s: UpToAnHour = 3.0
    request_timeout_s: UpToAnHour = 10.0
    retries: Annotated[int, Field(ge=0, le=10)] = 2

    @field_validator("bucket")
    @classmethod
    def _bucket(cls, bucket: str) -> str:
        if not _BUCKET.fullmatch(bucket) or _HOST_NUMBER.fullmatch(bucket):
            raise ValueError("must be a bucket's name: 3 to 63 of a-z, 0-9, '.' and '-'")
        return bucket

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
        found = _ENDPOINT.fullmatch(endpoint.rstrip("/"))
        if found is None or not 0 < int(found[1] or 1) <= _LAST_PORT:
            raise ValueError("must be http:// or https://, a host and perhaps a port, no more")
        return endpoint.rstrip("/")

    @field_validator("region")
    @classmethod
    def _region(cls, region: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9-]+", region):
            raise ValueError("must be a region's name: letters, digits and '-'")
        return region

    @field_validator("access_key", "secret_key", "session_token")
    @classmethod
    def _key(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and not _KEY.fullmatch(key.get_secret_value()):
            raise ValueError("must be neither empty nor with spaces or ends of lines in it")
        return key

    @field_validator("prefix")
    @classmethod
    def _prefix(cls, prefix: str) -> str:
        prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        if not _PREFIX.fullmatch(prefix) or len(prefix) > _PREFIX_BYTES or "./" in prefix:
            rule = "must be names of letters, digits and !_.*'()=@- with / in between, none with"
            raise ValueError(f"{rule} a '.' at its end, of {_PREFIX_BYTES} bytes at most")
        return prefix

    @field_validator("ca_bundle", mode="before")
    @classmethod
    def _ca_bundle(cls, path: object) -> object:
        return None if path is None else _path_of(path, "a PEM file")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.access_key is None) != (self.secret_key is None):
            raise ConfigError("ObjectTier.secret_key", ..., "give both keys, or none of them")
        if self.session_token is not None and self.access_key is None:
            raise ConfigError("ObjectTier.session_token", ..., "belongs to keys; give those too")
        if self.ca_bundle is not None and (self.endpoint or "https").startswith("http://"):
            rule = "is of use with https only; change the endpoint"
            raise ConfigError("ObjectTier.ca_bundle", str(self.ca_bundle), rule)
        host = (self.endpoint or "").rpartition("://")[2]
        if self.addressing == "virtual" and _HOST_NUMBER.fullmatch(host):
            rule = "needs an endpoint with a name, not a number; use 'path'"
            raise ConfigError("ObjectTier.addressing", "virtual", rule)
        return self

    @property
    def in_host(self) -> bool:
        """Whether requests name the bucket in the host."""
        if self.addressing == "auto":
            return self.endpoint is None and "." not in self.bucket  # see certificates: *.host
        return self.addressing == "virtual"


class EngineConfig(_Settings):
    """All of an engine's settings.

    Attributes:
        namespace: what the blocks belong to; blocks of different namespaces never mix.
        tiers: where blocks go, in a tuple: a FileTier, an ObjectTier, or a FileTier and behind it
            an ObjectTier.
        path: for GPU memory; it changes nothing for the host's. ``"auto"``: GPUDirect Storage if it
            is proved at open, else the bounce region; ``"gds"``: PathUnavailable if not;
            ``"bounce"``: without a trial.
        allow_compat: with ``path="gds"``: cuFile's compatibility mode will do, named gds-compat.
        bounce_bytes: budget of the bounce region, padding included. A block that bounces has to fit
            into it; with two tiers every block, twice.
        gather_bytes: memory of each GPU that scattered blocks lie in, beside `bounce_bytes`: they
            go through it where GPUDirect Storage is quicker with few large pieces. Taken when it
            is first needed. 0: never, and scattered blocks of the host's memory that could move
            without a copy do.
        timeout_s: deadline of an operation that names none.
        drain_timeout_s: how long closing waits for what is in flight.
        probe_timeout_s: how long the trial of GPUDirect Storage may take, at open.
        queue_ops: blocks that may be queued before ``*_nowait`` raises QueueFull.
        inflight_ops: blocks that may be in flight, per tier and direction; of a bucket no more than
            twice its ``connections``.
        inflight_bytes: bytes that may be in flight, per tier and direction; four blocks may be,
            whatever their size. With two tiers, but for loads from the first, no more than a
            quarter of `bounce_bytes`, and whatever their size one store, or two loads.
        transport_threads: NIXL agents, each with a thread of its own.
    """

    namespace: Namespace
    tiers: tuple[FileTier | ObjectTier, ...]
    path: Literal["auto", "gds", "bounce"] = "auto"
    allow_compat: bool = False
    bounce_bytes: Annotated[int, Field(ge=2 * PAGE, le=_MOST)] = 256 << 20
    gather_bytes: Annotated[int, Field(ge=0, le=_MOST)] = 32 << 20
    timeout_s: Positive = 30.0
    drain_timeout_s: Positive = 60.0
    probe_timeout_s: Positive = 60.0
    queue_ops: Annotated[int, Field(ge=1, le=_MOST)] = 4096
    inflight_ops: Annotated[int, Field(ge=1, le=_MOST)] = 256
    inflight_bytes: Annotated[int, Field(ge=PAGE, le=_MOST)] = 64 << 20
    transport_threads: Annotated[int, Field(ge=1, le=64)] = 1

    @field_validator("tiers", mode="before")
    @classmethod
    def _tiers(cls, tiers: object) -> object:
        found = list(tiers) if isinstance(tiers, list | tuple) else []
        if not found or not all(isinstance(each, FileTier | ObjectTier | dict) for each in found):
            raise ValueError(_TIERS_RULE)
        return tuple(_tier(each) if isinstance(each, dict) else each for each in found)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.allow_compat and self.path != "gds":
            rule = "means something with path='gds' only; leave one of them out"
            raise ConfigError("EngineConfig.allow_compat", self.allow_compat, rule)
        kinds = [type(tier) for tier in self.tiers]
        if kinds not in ([FileTier], [ObjectTier], [FileTier, ObjectTier]):
            raise ConfigError("EngineConfig.tiers", [kind.__name__ for kind in kinds], _TIERS_RULE)
        first, last = self.tiers[0], self.tiers[-1]
        if isinstance(first, ObjectTier) and self.path == "gds":
            rule = "objects go by the bounce region; use path='auto', or a FileTier in front"
            raise ConfigError("EngineConfig.path", self.path, rule)
        demote = isinstance(last, ObjectTier) and last.write == "demote"
        if demote and isinstance(first, FileTier) and first.layout != "slabs":
            rule = "needs layout='slabs': in a shared directory others evict; use 'back'"
            raise ConfigError("ObjectTier.write", "demote", rule)
        return self


_TIERS_RULE = "must be a FileTier, an ObjectTier, or a FileTier and then an ObjectTier, in a tuple"


def _tier(table: dict[str, Any]) -> FileTier | ObjectTier:
    """A tier from its settings: those of an ObjectTier name a bucket, or should."""
    only_of_objects = ObjectTier.model_fields.keys() & table.keys()
    if "bucket" in table or ("root" not in table and only_of_objects):
        return ObjectTier(**table)
    return FileTier(**table)


_SETTINGS: dict[tuple[str, ...], object] = {
    **{(name,): each.annotation for name, each in EngineConfig.model_fields.items()},
    **{("namespace", name): kind for name, kind in get_type_hints(Namespace).items()},
    **{("tiers", str(n)): ObjectTier if n else FileTier for n in range(2)},
    **{
        ("tiers", str(n), name): each.annotation
        for n in range(2)
        for kind in (ObjectTier, *(() if n else (FileTier,)))
        for name, each in kind.model_fields.items()
    },
}
"""What a variable may set, and of which type that is."""


def load_config(path: Path | None, environ: Mapping[str, str]) -> EngineConfig:
    """Settings from a TOML file, overridden by ``KVGDS_*`` variables.

    ``KVGDS_TIMEOUT_S=5`` sets ``timeout_s``; ``KVGDS_NAMESPACE__MODEL`` sets
    ``namespace.model``; ``KVGDS_TIERS__0__ROOT`` the tier's root. The value of a text is
    taken as it is, but may be in quotes as in TOML; others are written as in TOML. A tier with
    a ``bucket`` is an ObjectTier.

    Raises:
        ConfigError: a file that can't be read, an unknown key, a wrong value.
    """
    tree = {} if path is None else _read(path)
    given = variables(environ)
    for steps, name in given.items():
        _set(tree, steps, _value(steps, environ[name]), name)
    tiers = tree.get("tiers")
    last = len(tiers) - 1 if isinstance(tiers, list) else 0
    try:
        return _from_tree(tree)
    except ConfigError as error:
        raise _by_variable(error, given, last) from None


def variables(environ: Mapping[str, str]) -> dict[tuple[str, ...], str]:
    """The ``KVGDS_*`` variables there are, by the way to the setting that each names.

    Raises:
        ConfigError: one names none.
    """
    names = [name for name in sorted(environ) if name.startswith("KVGDS_")]
    return {_steps(name, environ[name]): name for name in names if name not in _OF_THE_TESTS}


def _read(path: Path) -> dict[str, Any]:
    try:
        return _parsed(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:  # among the latter what is no UTF-8, and what no TOML
        raise ConfigError("config", os.fspath(path), f"can't be read: {error}") from None
    except RecursionError:
        raise ConfigError("config", os.fspath(path), "is nested too deeply") from None
    except TypeError:
        raise ConfigError("config", path, "must be the path of a TOML file") from None


def _parsed(text: str) -> dict[str, Any]:
    """TOML, whose integers have 64 bits: Python takes longer ones, but may refuse to write them."""
    tree = tomllib.loads(text)
    if any(abs(number) > _MOST + 1 for number in _integers(tree)):
        raise ValueError("an integer has more than 64 bits")
    return tree


def _integers(node: object) -> Iterator[int]:
    if isinstance(node, int):
        yield node
    elif isinstance(node, dict | list):
        for each in node.values() if isinstance(node, dict) else node:
            yield from _integers(each)


def _steps(name: str, text: str) -> tuple[str, ...]:
    """The way to the setting that a variable names."""
    steps = tuple(name.removeprefix("KVGDS_").lower().split("__"))
    if steps in _SETTINGS:
        return steps
    text = "***" if _SECRET_NAME.search(name) else text
    if steps[0] == "tiers" and steps[1:2] not in (("0",), ("1",)):
        raise ConfigError(name, text, "tiers are named by KVGDS_TIERS__0__ and KVGDS_TIERS__1__")
    beside = [_variable(other) for other in _SETTINGS if other[:-1] == steps[:-1]]
    shown = ", ".join(beside or map(_variable, _SETTINGS))
    raise ConfigError(name, text, f"names no setting; those are {shown}")


def _variable(steps: tuple[str, ...]) -> str:
    return f"KVGDS_{'__'.join(steps).upper()}"


def _value(steps: tuple[str, ...], text: str) -> object:
    """What a variable says: a text may look like a number or a date, and stays one."""
    found = _scalar(text)
    kind = _SETTINGS[steps]
    is_text = get_origin(kind) is Literal or {str, Path, SecretStr} & {kind, *get_args(kind)}
    return found if isinstance(found, str) or not is_text else text


def _scalar(text: str) -> object:
    try:
        found = _parsed(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return found["value"] if len(found) == 1 else text  # several lines are no value


def _set(tree: dict[str, Any], steps: tuple[str, ...], value: object, name: str) -> None:
    node: Any = tree
    for step, following in zip(steps, (*steps[1:], ""), strict=True):
        if not isinstance(node, dict | list):
            raise ConfigError(name, _shown(value, name), "lies in what is set to be no table")
        index: Any = step
        if isinstance(node, list):
            index = int(step)
            node += [{} for _ in range(index + 1 - len(node))]
        if not following:
            node[index] = value
        elif isinstance(node, dict):
            node.setdefault(index, [] if index == "tiers" else {})
        node = node[index]


def _from_tree(tree: dict[str, Any]) -> EngineConfig:
    namespace, tiers = tree.pop("namespace", None), tree.pop("tiers", None)
    if namespace is None:
        rule = "must be given: KVGDS_NAMESPACE__MODEL, or [namespace] with `model` in a file"
        raise ConfigError("namespace.model", ..., rule)
    if not isinstance(namespace, dict):
        raise ConfigError("namespace", _shown(namespace), "must be a table with at least `model`")
    if tiers is None:
        rule = (
            "must be given: KVGDS_TIERS__0__ROOT or KVGDS_TIERS__0__BUCKET, or [[tiers]] in a file"
        )
        raise ConfigError("tiers", ..., rule)
    if not isinstance(tiers, list) or {type(tier) for tier in tiers} != {dict}:
        rule = "must be an array of one or two tables, with `root` or `bucket`"
        # What is in them may be secret.
        kinds = [type(tier).__name__ for tier in tiers] if isinstance(tiers, list) else None
        raise ConfigError("tiers", kinds or _shown(tiers), rule)
    return EngineConfig(namespace=_namespace(namespace), tiers=tuple(tiers), **tree)


def _namespace(table: dict[str, Any]) -> Namespace:
    names = [field.name for field in fields(Namespace)]
    for name in (name for name in table if name not in names):
        rule = f"is no setting; those are {', '.join(names)}"
        raise ConfigError(f"namespace.{name}", _shown(table[name], name), rule)
    for name, value in table.items():
        if isinstance(value, dict | list):
            raise ConfigError(f"namespace.{name}", _shown(value), "must be no table, nor an array")
    if "model" not in table:
        raise ConfigError("namespace.model", ..., "must be given")
    return Namespace(**table)


def _by_variable(
    error: ConfigError, given: Mapping[tuple[str, ...], str], last: int
) -> ConfigError:
    """The error by the name of the variable that the value came from, if it came from one."""
    field = error.field.removeprefix("EngineConfig.")
    field = field.replace("FileTier", "tiers.0").replace("ObjectTier", f"tiers.{last}")
    steps = tuple(field.split("."))
    for n in range(len(steps), 0, -1):  # a variable may hold the whole table that it is in
        if steps[:n] in given:
            within = ".".join((given[steps[:n]], *steps[n:]))
            return ConfigError(within, error.value, error.rule)
    return error


def _config_error(model: type[_Settings], error: ValidationError) -> ConfigError:
    """The first of its errors; a misspelt setting goes before the one that is then missing."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    within = first.get("ctx", {}).get("error")
    if isinstance(within, ConfigError):  # of a tier that was given as a table
        return within
    field = ".".join((model.__name__, *map(str, first["loc"])))
    if first["type"] == "missing":
        return ConfigError(field, ..., "must be given")
    if first["type"] == "extra_forbidden":
        names = ", ".join(model.model_fields)
        return ConfigError(
            field, _shown(first["input"], field), f"is no setting; those are {names}"
        )
    return ConfigError(field, _shown(first["input"], field), _rule(field, first))


def _rule(field: str, error: ErrorDetails) -> str:
    if error["type"] == "bool_type":
        return "must be true or false"
    if error["type"] == "int_type" and field.endswith("_bytes"):
        return "must be a number of bytes: an integer, without a unit"
    return error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


def _shown(value: object, field: str = "") -> object:
    """What to say of a value: no secret, nor an integer of so many digits that Python refuses."""
    name = field.rpartition(".")[2]
    if _SECRET_NAME.search(name) or (name == "endpoint" and "@" in str(value)):
        return ...
    if isinstance(value, int) and value.bit_length() > _MOST.bit_length() + 1:
        return f"an integer of {value.bit_length():,} bits"
    if isinstance(value, dict):
        shown = {name: _shown(each, name) for name, each in value.items()}
        return {name: "***" if each is ... else each for name, each in shown.items()}
    if isinstance(value, list | tuple):
        return type(value)(_shown(each) for each in value)
    return value
