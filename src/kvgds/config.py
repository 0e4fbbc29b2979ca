"""Settings: frozen, checked when made, units in their names, secrets out of ``repr``.

Pure. A wrong setting raises :class:`~kvgds.errors.ConfigError`, which names the field,
the value and the rule, before anything is opened.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kvgds.blocks import PAGE, Namespace
from kvgds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic_core import ErrorDetails

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_MOST = (1 << 63) - 1  # bytes of a file, and what TOML takes for an integer
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
            recently used go first.
        layout: ``"slabs"``: preallocated files for one engine alone. ``"files"``: a file a
            block, for directories that several processes or hosts share.
        verify: ``"full"`` checks stamp and payload checksum on every load, ``"stamp"`` only
            the stamp, and then stores write no checksum.
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
        path = os.fspath(root) if isinstance(root, str | os.PathLike) else None
        if not isinstance(path, str) or not path:
            raise ValueError("must be the path of a directory")
        if "\0" in path:
            raise ValueError("must be the path of a directory, without a NUL in it")
        return Path(path)


class EngineConfig(_Settings):
    """All of an engine's settings.

    Attributes:
        namespace: what the blocks belong to; blocks of different namespaces never mix.
        tiers: where blocks go: one FileTier, in a tuple or list.
        path: for GPU memory; aligned host memory always goes direct. ``"auto"``: GPUDirect Storage
            if it is proved at open, else the bounce region; ``"gds"``: PathUnavailable if not.
        allow_compat: with ``path="gds"``: cuFile's compatibility mode will do, named gds-compat.
        bounce_bytes: budget of the bounce region, padding included.
        gather_bytes: memory of each GPU that scattered blocks lie in, beside `bounce_bytes`: they
            go through it where GPUDirect Storage is quicker with few large pieces. Taken when it
            is first needed. 0: never.
        timeout_s: deadline of an operation that names none.
        drain_timeout_s: how long closing waits for what is in flight.
        probe_timeout_s: how long the trial of GPUDirect Storage may take, at open.
        queue_ops: operations that may be queued before ``*_nowait`` raises QueueFull.
        inflight_ops: blocks that may be in flight, per tier and direction.
        inflight_bytes: bytes that may be in flight, per tier and direction.
        transport_threads: NIXL agents, each with a thread of its own.
    """

    namespace: Namespace
    tiers: tuple[FileTier, ...]
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

    @model_validator(mode="after")
    def _compat(self) -> Self:
        if self.allow_compat and self.path != "gds":
            rule = "means something with path='gds' only; leave one of them out"
            raise ConfigError("EngineConfig.allow_compat", self.allow_compat, rule)
        return self

    @field_validator("tiers", mode="before")
    @classmethod
    def _tiers(cls, tiers: object) -> object:
        if not isinstance(tiers, list | tuple) or len(tiers) != 1:
            raise ValueError("must be a tuple or list of exactly one FileTier")
        return tuple(tiers)


_SETTINGS: dict[tuple[str, ...], object] = {
    **{(name,): each.annotation for name, each in EngineConfig.model_fields.items()},
    **{("namespace", name): kind for name, kind in get_type_hints(Namespace).items()},
    ("tiers", "0"): FileTier,
    **{("tiers", "0", name): each.annotation for name, each in FileTier.model_fields.items()},
}
"""What a variable may set, and of which type that is."""


def load_config(path: Path | None, environ: Mapping[str, str]) -> EngineConfig:
    """Settings from a TOML file, overridden by ``KVGDS_*`` variables.

    ``KVGDS_TIMEOUT_S=5`` sets ``timeout_s``; ``KVGDS_NAMESPACE__MODEL`` sets
    ``namespace.model``; ``KVGDS_TIERS__0__ROOT`` the tier's root. The value of a text is
    taken as it is, but may be in quotes as in TOML; others are written as in TOML.

    Raises:
        ConfigError: a file that can't be read, an unknown key, a wrong value.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read(path)
    given: dict[tuple[str, ...], str] = {}
    for name, text in sorted(environ.items()):
        if name.startswith("KVGDS_") and name not in _OF_THE_TESTS:
            steps = _steps(name, text)
            _set(tree, steps, _value(steps, text), name)
            given[steps] = name
    try:
        return _from_tree(tree)
    except ConfigError as error:
        raise _by_variable(error, given) from None


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
    if steps[0] == "tiers" and steps[1] != "0":
        raise ConfigError(name, text, "there is exactly one tier; name it by KVGDS_TIERS__0__")
    beside = [_variable(other) for other in _SETTINGS if other[:-1] == steps[:-1]]
    shown = ", ".join(beside or map(_variable, _SETTINGS))
    raise ConfigError(name, text, f"names no setting; those are {shown}")


def _variable(steps: tuple[str, ...]) -> str:
    return f"KVGDS_{'__'.join(steps).upper()}"


def _value(steps: tuple[str, ...], text: str) -> object:
    """What a variable says: a text may look like a number or a date, and stays one."""
    found = _scalar(text)
    kind = _SETTINGS[steps]
    is_text = kind in (str, Path) or get_origin(kind) is Literal
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
            raise ConfigError(name, value, "lies in what is set to be no table")
        if isinstance(node, list) and not node:
            node.append({})
        index: Any = 0 if isinstance(node, list) else step
        if not following:
            node[index] = value
        elif isinstance(node, dict):
            node.setdefault(index, [] if following == "0" else {})
        node = node[index]


def _from_tree(tree: dict[str, Any]) -> EngineConfig:
    namespace, tiers = tree.pop("namespace", None), tree.pop("tiers", None)
    if not isinstance(namespace, dict):
        raise ConfigError("namespace", namespace, "must be a table with at least `model`")
    if not isinstance(tiers, list) or [type(tier) for tier in tiers] != [dict]:
        raise ConfigError("tiers", tiers, "must be an array of exactly one table, with `root`")
    name, (tier,) = _namespace(namespace), tiers
    return EngineConfig(namespace=name, tiers=(FileTier(**tier),), **tree)


def _namespace(table: dict[str, Any]) -> Namespace:
    names = [field.name for field in fields(Namespace)]
    for name in (name for name in table if name not in names):
        rule = f"is no setting; those are {', '.join(names)}"
        raise ConfigError(f"namespace.{name}", table[name], rule)
    if "model" not in table:
        raise ConfigError("namespace.model", ..., "must be given")
    return Namespace(**table)


def _by_variable(error: ConfigError, given: Mapping[tuple[str, ...], str]) -> ConfigError:
    """The error by the name of the variable that the value came from, if it came from one."""
    field = error.field.replace("FileTier", "tiers.0").removeprefix("EngineConfig.")
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
        return ConfigError(field, first["input"], f"is no setting; those are {names}")
    return ConfigError(field, _shown(first["input"]), _rule(field, first))


def _rule(field: str, error: ErrorDetails) -> str:
    if error["type"] == "bool_type":
        return "must be true or false"
    if error["type"] == "int_type" and field.endswith("_bytes"):
        return "must be a number of bytes: an integer, without a unit"
    return error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


def _shown(value: object) -> object:
    """What to say of a value: Python refuses to write an integer of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > _MOST.bit_length() + 1:
        return f"an integer of {value.bit_length():,} bits"
    return value
