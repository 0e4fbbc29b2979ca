"""A tier's directory: made, marked with its layout, taken for one engine alone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from typing import TYPE_CHECKING

from kvgds.errors import BusyError, ConfigError

if TYPE_CHECKING:
    from pathlib import Path

_FORMAT = 1


def prepare_root(root: Path, layout: str) -> None:
    """Make the directory if need be, and make sure that it holds this layout. Blocks.

    Raises:
        ConfigError: it can't be made or written, is no directory, or has another layout.
    """
    marker = root / "kvgds.json"
    try:
        with contextlib.suppress(FileExistsError):
            root.mkdir(mode=0o700)
        if not root.is_dir():
            raise ConfigError("root", str(root), "is not a directory; name one or remove it")
        try:
            found = _read(marker)
        except FileNotFoundError:
            _mark(marker, layout)
            found = _read(marker)
    except FileNotFoundError:
        raise ConfigError("root", str(root), f"make its parent {root.parent} first") from None
    except (ValueError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("root", str(root), f"can't be used: {error}") from None
    if found != {"format": _FORMAT, "layout": layout}:
        raise ConfigError("root", str(root), f"holds {found}, not layout={layout!r}; use another")


def _read(marker: Path) -> object:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(marker, flags), encoding="utf-8") as file:
        return json.load(file)


def _mark(marker: Path, layout: str) -> None:
    """Make the marker, whole or not at all, unless somebody else just has."""
    temporary = marker.with_name(f".kvgds.json-{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            json.dump({"format": _FORMAT, "layout": layout}, file)
        _publish(temporary, marker)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _publish(temporary: Path, marker: Path) -> None:
    try:
        os.link(temporary, marker)
    except FileExistsError:
        return
    except OSError:  # no hard links here
        os.rename(temporary, marker)


def lock_root(root: Path) -> int:
    """Take the directory for this engine alone; the descriptor to close. Blocks.

    Raises:
        BusyError: another engine has it.
        ConfigError: it can't be written.
    """
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(root / "lock", flags, 0o600)
    except OSError as error:
        raise ConfigError("root", str(root), f"can't be written: {error}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        os.close(fd)
        raise BusyError(
            f"{root} is in use by process {owner or 'unknown'}; one engine a slab directory "
            "(layout='files' can be shared)"
        ) from None
    os.truncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)
    return fd
