"""Several engines and processes on one directory of files, some of which are killed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from faults import FaultyDisk
from kvgds import Namespace, TransferError
from kvgds.tiers.directory import prepare_root
from kvgds.tiers.ledger import Owner
from sharing import (
    HOUR,
    IMAGE,
    NBYTES,
    STRESS_CAPACITY,
    Process,
    get,
    is_late,
    leave,
    ledger,
    locked,
    make_old,
    opened,
    owner,
    path_of,
    process,
    put,
    taken,
    temporaries,
    there,
    write_ledger,
)
from support import NAMESPACE, PAGE, aligned, content, digest, until

if TYPE_CHECKING:
    from pathlib import Path


# --- engines --------------------------------------------------------------------------------


async def test_engines_see_each_others_blocks(tmp_path: Path) -> None:
    """What one stores, another loads, counts, does not write again, deletes."""
    root = tmp_path / "kv"
    async with opened(root) as one, opened(root) as two:
        await put(one, b"a", b"b")
        assert await two.prefix([b"a", b"b", b"c"]) == 2
        assert await there(two, [b"a", b"b", b"c"]) == [b"a", b"b"]
        moved = two.held.submitted
        assert not await two.store(b"a", content(b"a", NBYTES))
        assert two.held.submitted == moved
        assert await two.delete(b"a")
        assert not await one.delete(b"a")
        assert not await get(one, b"a")
        assert await one.prefix([b"a"]) == 0
        await put(one, b"a")  # not "present", though it once was
        assert await get(two, b"a")
        assert ledger(root) == taken(root) == 2 * IMAGE


async def test_two_stores_of_one_key_at_once(tmp_path: Path) -> None:
    """Both succeed, one finds the other's block, and it is counted once."""
    root = tmp_path / "kv"
    async with opened(root) as one, opened(root) as two:
        engines = (one, two)
        for engine in engines:
            engine.held.hold("landing")
        stores = [asyncio.ensure_future(e.store(b"key", content(b"key", NBYTES))) for e in engines]
        for engine in engines:
            await engine.held.wait_held("landing")
        assert ledger(root) == taken(root) == 2 * IMAGE
        for engine in engines:
            engine.held.release()
        assert sorted(await asyncio.gather(*stores)) == [False, True]
        assert ledger(root) == taken(root) == IMAGE
        assert temporaries(root) == []
        assert await get(one, b"key")


async def test_what_is_taken_back_was_present_for_nobody(tmp_path: Path) -> None:
    """A store that was late has a name for a moment, and another finds that just then."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root) as late, opened(root) as other:
            disk.hang("link")
            await is_late(disk, late.store(b"key", content(b"key", NBYTES)))
            with locked(root):  # so that it can't be taken back yet
                disk.release()
                await until(path_of(disk.backing / "kv", b"key").exists)
                storing = asyncio.ensure_future(other.store(b"key", content(b"key", NBYTES)))
                await until(lambda: bool(disk.seen("open", "kv/tmp/*")))  # its first name
            await storing
            await late.delete(b"x")  # comes after whatever was going on
            assert await get(other, b"key")
            assert ledger(root) == taken(root) == IMAGE


def relink(root: Path, name: str) -> None:
    """Give a block a temporary name again, as if its owner had linked it only just."""
    (root / "tmp" / f"{name}.{'0' * 16}.{IMAGE}").hardlink_to(path_of(root, b"key"))


async def test_what_was_present_is_not_taken_back(tmp_path: Path) -> None:
    """Its owner, who may have been late, finds its temporary gone."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        await put(engine, b"key")
        relink(root, owner(os.getpid()))
        assert not await engine.store(b"key", content(b"key", NBYTES))
        assert temporaries(root) == []
        assert ledger(root) == taken(root) == IMAGE


async def test_a_directory_can_be_made_by_many_at_once(tmp_path: Path) -> None:
    """Nobody reads a marker that another has only begun to write."""

    def make(n: int) -> None:
        prepare_root(tmp_path / str(n // 8), "files")

    with ThreadPoolExecutor(8) as threads:
        await asyncio.gather(
            *(asyncio.get_running_loop().run_in_executor(threads, make, n) for n in range(800))
        )
    assert os.listdir(tmp_path / "0") == ["kvgds.json"]


async def test_namespaces_share_the_room_but_no_block(tmp_path: Path) -> None:
    """Each loads its own; the oldest go first, whosever they are."""
    root = tmp_path / "kv"
    other = Namespace(model="test", revision="2")
    async with opened(root, other) as engine:
        assert await engine.store(b"key", content("other", NBYTES))
        await put(engine, b"young")
    make_old(path_of(root, b"key", other), HOUR)
    async with opened(root, capacity_bytes=4 * IMAGE) as engine:
        assert not await get(engine, b"key")
        await put(engine, b"key", b"more", b"most")
        assert engine.statistics().tiers[0].bytes_used == ledger(root) == taken(root)
    assert not path_of(root, b"key", other).exists()
    async with opened(root, other) as engine:
        assert await there(engine, [b"key", b"young"]) == [b"young"]


async def test_deleting(tmp_path: Path) -> None:
    """Gives the room back; a load under way ends well; closing waits for it."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        await put(engine, b"a", b"b")
        engine.held.hold("start", lambda transfer: not transfer.write)
        loading = asyncio.ensure_future(get(engine, b"a"))
        await engine.held.wait_held("start")
        assert await engine.delete(b"a")
        assert ledger(root) == taken(root) == IMAGE
        engine.held.release()
        assert await loading
        assert not await engine.delete(b"a")
        last = asyncio.ensure_future(engine.delete(b"b"))
        await asyncio.sleep(0)  # let it begin
        async with asyncio.timeout(5):
            await engine.aclose()
        assert await last
        assert ledger(root) == taken(root) == 0


async def test_prefix_counts_nothing_that_another_has_dropped(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv") as one, opened(tmp_path / "kv") as other:
        for key in (b"a", b"b", b"c"):
            await put(one, key)
        assert await one.prefix([b"a", b"b", b"c"]) == 3
        assert await other.delete(b"b")
        assert await one.prefix([b"a", b"b", b"c"]) == 1
        assert one.statistics().tiers[0].blocks == 2


async def test_deleting_what_has_only_just_been_linked(tmp_path: Path) -> None:
    """Its temporary name, which its owner would remove next, goes with it."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        await put(engine, b"key")
        relink(root, owner(os.getpid()))
        assert await engine.delete(b"key")
        assert ledger(root) == taken(root) == 0
        assert temporaries(root) == []


async def test_replacing_what_a_dead_owner_has_only_just_linked(tmp_path: Path) -> None:
    """By a block of another size: nobody else is to take its bytes off the ledger again."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        await put(engine, b"key", b"other")
        relink(root, owner(os.getpid(), start=1))
        assert await engine.store(b"key", bytes(PAGE))
        async with opened(root):  # sweeps
            assert temporaries(root) == []
            assert ledger(root) == taken(root) == IMAGE + 2 * PAGE


ROOM, MORE = 50, 200  # blocks; and how many that have gone may be remembered


def blocks_in(root: Path) -> int:
    return len(list(root.glob("*/*/*.kv")))


@pytest.mark.parametrize("act", ["load", "prefix", "store"])
async def test_what_others_evict_is_forgotten(tmp_path: Path, act: str) -> None:
    """By an engine that evicts nothing itself, too; and never a block that is there."""
    root, capacity = tmp_path / "kv", ROOM * 2 * PAGE
    memory = bytearray(PAGE)
    async with opened(root, capacity_bytes=capacity) as one, opened(root) as other:
        for n in range(8 * ROOM):
            key = b"%d" % n
            assert await (other if act == "store" else one).store(key, memory)
            if act == "load":
                assert await other.load(key, memory)
            elif act == "prefix":
                assert await other.prefix([key]) == 1
            else:  # in whose way it makes room
                assert await one.store(b"more %d" % n, memory)
        await other.delete(b"x")  # comes after whatever was going on
        there = blocks_in(root)
        assert there <= ROOM
        seen = other.statistics().tiers[0]
        assert seen.blocks <= there + MORE
        assert seen.evictions == 0
        if act != "store":
            assert there <= seen.blocks


@pytest.mark.parametrize(("op", "number"), [("opendir", errno.EIO), ("readdir", 0)])
async def test_a_look_that_sees_nothing_forgets_nothing(
    tmp_path: Path, op: Any, number: int
) -> None:
    """It fails, or gets an old listing, as network file systems give."""
    with FaultyDisk(tmp_path) as disk:
        async with opened(disk.backing / "kv") as one, opened(disk.root / "kv") as other:
            disk.fail(op, number)
            keys = [b"%d" % n for n in range(200)]
            for key in keys:
                assert await one.store(key, bytes(PAGE))
            with locked(disk.root / "kv"):
                stores = [asyncio.ensure_future(other.store(b"first", bytes(PAGE)))]
                await asyncio.sleep(0)  # its job waits for the ledger; the next is to look as well
                for key in keys:
                    assert await other.load(key, bytearray(PAGE))
                stores.append(asyncio.ensure_future(other.store(b"second", bytes(PAGE))))
                await asyncio.sleep(0)
            assert await asyncio.gather(*stores) == [True] * 2
            await other.delete(b"x")  # comes after whatever was going on
            assert disk.seen("opendir", f"*/{digest(NAMESPACE).hex()}/??")  # it has looked
            assert other.statistics().tiers[0].blocks == 202


# --- dead and living ------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [True, False])
async def test_only_what_is_stale_is_swept(tmp_path: Path, alone: bool) -> None:  # noqa: FBT001
    """Of the dead at once; of those who can't be looked at, after an hour; of the living never.

    Who is alone knows that nobody else lives.
    """
    root = tmp_path / "kv"
    async with contextlib.AsyncExitStack() as stack:
        async with opened(root) as engine:
            await put(engine, b"key")
            if not alone:
                await stack.enter_async_context(opened(root))
        zombie = stack.enter_context(subprocess.Popen(["true"]))  # noqa: S607
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        dead = [
            leave(root, owner(zombie.pid)),
            leave(root, owner(os.getpid(), start=1)),  # the number came again
        ]
        remote = [leave(root, owner(1, boot="0" * 32, start=1)) for _ in range(3)]
        stray = [leave(root, "stray", 0) for _ in range(2)]
        living = [leave(root, owner(os.getpid())), leave(root, owner(1))]
        relink(root, owner(os.getpid(), start=2))  # who died before it could unlink it
        write_ledger(root, 8 * IMAGE)
        for name in dead:
            make_old(root / "tmp" / name, HOUR / 2)
        for name in (*living, remote[0], stray[0]):
            make_old(root / "tmp" / name, 2 * HOUR)
        make_old(root / "tmp" / remote[2], -2 * HOUR)  # its host's clock was put right
        async with opened(root) as engine:
            left = [] if alone else [*living, remote[1]]
            assert temporaries(root) == sorted([*left, stray[1]])
            assert ledger(root) == taken(root) == (1 + len(left)) * IMAGE
            assert await get(engine, b"key")


async def test_what_another_host_has_swept_is_given_up_once(tmp_path: Path) -> None:
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root) as engine:
            await put(engine, b"key")
            gone = leave(root, owner(os.getpid(), start=1))
            write_ledger(root, 2 * IMAGE)
            disk.fail("unlink", errno.ENOENT, match=f"*/{gone}")  # here it stays: to be seen
            async with opened(root):
                assert ledger(root) == 2 * IMAGE
            disk.clear()
            async with opened(root):
                assert ledger(root) == taken(root) == IMAGE


@pytest.mark.skipif(os.geteuid() != 0, reason="name spaces of its own take root")
@pytest.mark.parametrize(
    ("space", "ours", "alike"),
    [
        (["--pid", "--fork", "--mount-proc"], False, True),
        (["--pid", "--fork"], False, False),  # /proc knows processes by other numbers
        (["--time", "--boottime", "100000", "--fork"], False, True),  # it tells other times
        (["--uts"], True, True),
    ],
)
def test_only_who_can_tell_is_asked_who_lives(
    space: list[str],
    ours: bool,  # noqa: FBT001
    alike: bool,  # noqa: FBT001
) -> None:
    program = "from kvgds.tiers.ledger import Owner; print(Owner.me().world, Owner.me().world)"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        ["unshare", *space, sys.executable, "-c", program],  # noqa: S607
        env=environ,
        capture_output=True,
        check=False,
        text=True,
    )
    if done.stderr.startswith("unshare: "):  # by privilege, kernel or its own version
        pytest.skip(done.stderr)
    one, another = done.stdout.split()
    assert (one == Owner.me().world) == ours
    assert (one == another) == alike


async def test_what_nfs_keeps_for_those_who_have_it_open(tmp_path: Path) -> None:
    """Under another name, and there it can't be removed: that stops no store."""
    with FaultyDisk(tmp_path) as disk:
        root = disk.root / "kv"
        async with opened(root, capacity_bytes=4 * IMAGE) as engine:
            await put(engine, b"a", b"b", b"c")
            for folder in ("tmp", "quarantine"):
                kept = root / folder / f".nfs{'0' * 24}"
                kept.write_bytes(bytes(PAGE))
                make_old(kept, 2 * HOUR)
            disk.fail("unlink", errno.EBUSY, match=".nfs*")
            await put(engine, b"d", b"e", b"f")
            assert await there(engine, [b"b", b"c", b"d", b"e", b"f"]) == [b"c", b"d", b"e", b"f"]
            assert ledger(root) == 4 * IMAGE


@pytest.mark.parametrize("memory", ["aligned", "unaligned"])
async def test_who_is_taken_for_dead_stores_again(tmp_path: Path, memory: str) -> None:
    """Another host goes by the clock, and that may have been put forward by an hour."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        held = aligned(IMAGE, 1)
        block = engine.register(held) if memory == "aligned" else bytes(held)
        engine.held.hold("landing")
        storing = asyncio.ensure_future(engine.store(b"key", block))
        await engine.held.wait_held("landing")
        (swept,) = temporaries(root)
        with locked(root):
            (root / "tmp" / swept).unlink()
            write_ledger(root, 0)
        engine.held.release()
        assert await storing
        got = bytearray(IMAGE)
        assert await engine.load(b"key", got)
        assert got == bytes(held)
        assert temporaries(root) == []
        assert ledger(root) == taken(root) == IMAGE + PAGE


async def test_who_loses_its_temporary_again_is_told(tmp_path: Path) -> None:
    """The second time it was no clock: a store does not go on for ever."""
    root = tmp_path / "kv"
    async with opened(root) as engine:
        engine.held.hold("landing")
        storing = asyncio.ensure_future(engine.store(b"key", bytes(NBYTES)))
        for _ in range(2):
            await engine.held.wait_held("landing")
            (lost,) = temporaries(root)
            (root / "tmp" / lost).unlink()
            engine.held.release()
            engine.held.hold("landing")
        with pytest.raises(TransferError) as raised:
            await storing
        assert raised.value.errno == errno.ENOENT


async def test_a_ledger_that_lies_is_put_right(tmp_path: Path) -> None:
    """At opening, or when there seems to be no room, or when it can't be read."""
    root = tmp_path / "kv"
    async with opened(root, capacity_bytes=8 * IMAGE) as engine:
        await put(engine, b"a")
        for wrong in (1 << 40, None, 9 * IMAGE):
            if wrong is None:
                (root / "ledger").write_text("garbage")
            else:
                write_ledger(root, wrong)
            await engine.delete(b"x")
            await put(engine, b"x")
            assert ledger(root) == taken(root) == 2 * IMAGE
        (root / "ledger").unlink()
        await put(engine, b"y")
        assert ledger(root) == taken(root) == 3 * IMAGE
        assert await get(engine, b"a")
        assert engine.statistics().tiers[0].evictions == 0
        write_ledger(root, 0)
    async with opened(root):
        assert ledger(root) == taken(root) == 3 * IMAGE


# --- processes ------------------------------------------------------------------------------


async def test_two_processes_share_a_directory(tmp_path: Path) -> None:
    """Each sees what the other stores, while both are open."""
    root = tmp_path / "kv"
    async with opened(root, capacity_bytes=1 << 30) as engine, process("holding", root, 7) as child:
        assert await child.line() == "held"
        keys = [b"held-7-%d" % n for n in range(3)]
        assert await engine.prefix(keys) == 0
        assert not await get(engine, keys[0])
        assert ledger(root) == 3 * IMAGE
        await put(engine, keys[1])
        assert await child.end() == ["stored", "present", "stored"]
        assert await there(engine, keys) == keys
        assert ledger(root) == taken(root) == 3 * IMAGE


async def test_killed_in_the_middle_of_stores(tmp_path: Path) -> None:
    """What it wrote is swept at the next opening, and given back; what neighbours write is not."""
    root = tmp_path / "kv"
    async with process("holding", root, 1) as neighbour, process("holding", root, 2) as child:
        assert await neighbour.line() == await child.line() == "held"
        assert len(temporaries(root)) == 6
        await child.kill()
        assert len(temporaries(root)) == 6
        async with opened(root, capacity_bytes=1 << 30) as engine:
            assert len(temporaries(root)) == 3
            assert ledger(root) == taken(root) == 3 * IMAGE
            assert await neighbour.end() == ["stored"] * 3
            assert await there(engine, [b"held-2-%d" % n for n in range(3)]) == []
            assert len(await there(engine, [b"held-1-%d" % n for n in range(3)])) == 3
            assert ledger(root) == taken(root) == 3 * IMAGE


async def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Whatever was acknowledged loads right, the rest loads right or not at all."""
    root, dice = tmp_path / "kv", random.Random(4)
    async with process("holding", root, 1) as neighbour:
        assert await neighbour.line() == "held"
        living = temporaries(root)
        for seed in range(10, 16):
            async with process("storing", root, seed) as child:
                acknowledged = [await child.line() for _ in range(dice.randint(1, 60))]
                acknowledged += await child.kill()
            async with opened(root, capacity_bytes=1 << 30) as engine:
                assert temporaries(root) == living
                assert ledger(root) == taken(root)
                told = [line.encode() for line in acknowledged]
                assert await there(engine, told) == told
                for n in range(len(told) + 16):
                    await get(engine, b"%d-%d" % (seed, n))
                assert engine.statistics().tiers[0].quarantined == 0
        assert await neighbour.end() == ["stored"] * 3


async def test_many_processes_in_little_room(tmp_path: Path) -> None:
    """Three of them store, load and delete; room is kept by all of them together, to the byte."""
    root = tmp_path / "kv"

    def check() -> None:
        with locked(root):
            assert taken(root, reserved=False) <= ledger(root) == taken(root) <= STRESS_CAPACITY

    async def follow(child: Process) -> dict[str, int]:
        while (line := await child.line()) == "step":
            await asyncio.to_thread(check)
        counts: dict[str, int] = json.loads(line)
        return counts

    async with contextlib.AsyncExitStack() as stack:
        children = [await stack.enter_async_context(process("mixing", root, n)) for n in range(3)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(follow(child)) for child in children]
        for child in children:
            await child.end()
    assert all(min(task.result().values()) > 0 for task in tasks)
    assert ledger(root) == taken(root) <= STRESS_CAPACITY
    assert temporaries(root) == []
    async with opened(root, capacity_bytes=STRESS_CAPACITY) as engine:
        assert engine.statistics().tiers[0].quarantined == 0
        assert ledger(root) == taken(root)
