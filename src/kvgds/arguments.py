"""What the command line understands: sizes, ages, and where blocks are."""

from __future__ import annotations

import os
import re
import reprlib
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvgds.config import ObjectTier, load_config, variables
from kvgds.errors import ConfigError
from kvgds.upkeep.retention import LONGEST_S

if TYPE_CHECKING:
    from kvgds.config import FileTier

MOST = (1 << 63) - 1  # bytes, or things to count
UNITS = "KMGTP"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:i?B?)", re.IGNORECASE)
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SCHEME = "s3://"
_OF_AWS = {  # what its own tools take from variables, beside the keys; of two the later counts
    "AWS_ENDPOINT_URL": "endpoint",
    "AWS_ENDPOINT_URL_S3": "endpoint",
    "AWS_DEFAULT_REGION": "region",
    "AWS_REGION": "region",
}


def parse_size(text: str | int) -> int:
    """Bytes from 4096, 64K, 1.5G, 1Ti or 10MB; all units are powers of 1,024.

    Raises:
        typer.BadParameter: it is no size.
    """
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        shown = reprlib.repr(text)
        raise typer.BadParameter(f"{shown} is no size; give bytes, or for example 64K, 1.5G, 1Ti")
    unit = match[2].upper()
    nbytes = Decimal(match[1]) * 1024 ** (UNITS.index(unit) + 1 if unit else 0)
    if nbytes > MOST:
        raise typer.BadParameter(f"{reprlib.repr(text)} is too much; less than 8192P can be")
    return int(nbytes)


def parse_age(text: str) -> float:
    """Seconds from 90s, 30m, 12h, 7d or 2w.

    Raises:
        typer.BadParameter: it is no duration.
    """
    match = _AGE.fullmatch(text.strip())
    shown = reprlib.repr(text)
    if match is None:
        raise typer.BadParameter(f"{shown} is no duration; give for example 90s, 30m, 12h or 7d")
    seconds = float(match[1]) * _SECONDS[match[2].lower()]
    if seconds > LONGEST_S:
        raise typer.BadParameter(f"{shown} is too long; at most {LONGEST_S} seconds can be")
    return seconds


def parse_directory(text: str | Path) -> Path:
    """A path. Not of an empty text, which a variable that is not set leaves: that is ``.`` to Path.

    Raises:
        typer.BadParameter: it is empty.
    """
    if not str(text):
        raise typer.BadParameter("must be the path of a directory")
    return Path(text)


def configured(path: Path | None) -> tuple[FileTier | ObjectTier, ...]:
    """The tiers of a file of settings and of ``KVGDS_*`` variables; none if there are neither.

    Raises:
        ConfigError: a setting is wrong.
    """
    given = variables(os.environ)
    if path is None and not any(steps[0] == "tiers" for steps in given):
        return ()
    return load_config(path, os.environ).tiers


def place(
    text: str, config: Path | None, endpoint: str | None, region: str | None, ca_bundle: Path | None
) -> Path | ObjectTier:
    """Where blocks are: a directory, or ``s3://BUCKET/PREFIX``.

    Of a bucket that is among the settings, those count, its keys too. Of another, endpoint and
    region are those of the variables that AWS's own tools heed, too.

    Raises:
        ConfigError: a setting is wrong.
        typer.BadParameter: an empty path, or options that don't go together.
    """
    options = {"endpoint": endpoint, "region": region, "ca_bundle": ca_bundle}
    changes: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if not text.startswith(_SCHEME):
        if changes or config is not None:
            raise typer.BadParameter("--config, --endpoint, --region and --ca-bundle are for s3://")
        return parse_directory(text)
    bucket, _, prefix = text.removeprefix(_SCHEME).partition("/")
    for tier in configured(config):
        if isinstance(tier, ObjectTier) and tier.bucket == bucket:
            given = dict(tier)
            if changes.get("endpoint", "").startswith("http://"):
                given["ca_bundle"] = None
            break
    else:
        if config is not None:
            raise ConfigError("config", os.fspath(config), f"has no tier in the bucket {bucket!r}")
        aws = {_OF_AWS[name]: os.environ[name] for name in filter(os.environ.get, _OF_AWS)}
        given = {"bucket": bucket, **aws}
    if prefix:
        given["prefix"] = prefix
    return ObjectTier(**given | changes)
