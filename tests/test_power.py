"""What durable="power" promises, on a real file system that loses what was not synced."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from faults import PowerDisk
from kvgds import KvgdsError, open_engine
from kvgds.upkeep import fsck, gc
from support import PAGE, config, content

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZE, COUNT = 3 * PAGE, 40
KEYS = [b"%d" % i for i in range(COUNT)]
POWER = {"durable": "power"}


async def held(root: Path, **tier: Any) -> int:
    """How many of the blocks load; those that do are right."""
    memory = [bytearray(SIZE) for _ in KEYS]
    async with open_engine(config(root, tier=tier)) as engine:
        outcomes = await engine.load_many(zip(KEYS, memory, strict=True))
    for outcome, block in zip(outcomes, memory, strict=True):
        assert outcome.hit or outcome.status == "miss"
        assert not outcome.hit or block == content(outcome.key, SIZE)
    return sum(outcome.hit for outcome in outcomes)


async def fill(root: Path, then: Callable[[], None], **tier: Any) -> None:
    """Store all blocks; what happens before the engine is closed may keep it from closing well."""
    with contextlib.suppress(KvgdsError, OSError, sqlite3.Error):
        async with open_engine(config(root, tier=tier)) as engine:
            outcomes = await engine.store_many([(key, content(key, SIZE)) for key in KEYS])
            assert [outcome.status for outcome in outcomes] == ["stored"] * COUNT
            await asyncio.to_thread(then)


@pytest.mark.parametrize("layout", ["slabs", "files"])
async def test_what_was_acknowledged_is_there_after_the_first_power_loss(
    tmp_path: Path, layout: str
) -> None:
    """In a directory that was made a moment before."""
    with PowerDisk(tmp_path) as disk:
        root = disk.root / "kv"
        await fill(root, disk.cut, layout=layout, **POWER)
        await asyncio.to_thread(disk.restore)
        assert await held(root, layout=layout, **POWER) == COUNT


def sync_another(disk: PowerDisk) -> None:
    """What any program may do: then names that were changed before are on the disk as well."""
    fd = os.open(disk.root / "other", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"x")
    os.fsync(fd)
    os.close(fd)


@pytest.mark.parametrize("whoever", ["fsck", "rebuild", "gc", "engine"])
async def test_whoever_comes_next_keeps_what_was_acknowledged(tmp_path: Path, whoever: str) -> None:
    """The blocks are in SQLite's log alone, as if the engine had been killed."""
    with PowerDisk(tmp_path) as disk:
        live, root = disk.root / "live", disk.root / "kv"

        def copy() -> None:
            shutil.copytree(live, root)
            os.sync()

        await fill(live, copy, **POWER)
        if whoever == "engine":
            assert await held(root) == COUNT
        else:
            acts: dict[str, Callable[[], object]] = {
                "fsck": partial(fsck, root, repair=True),
                "rebuild": partial(fsck, root, rebuild=True),
                "gc": partial(gc, root, keep_bytes=1 << 30),
            }
            await asyncio.to_thread(acts[whoever])
        await asyncio.to_thread(sync_another, disk)
        disk.cut()
        await asyncio.to_thread(disk.restore)
        assert await held(root, **POWER) == COUNT
