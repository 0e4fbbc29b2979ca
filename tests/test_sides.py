"""How much of what waits storage is given at once, one way and beside the other."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

import pytest

from kvgds import Priority, contention
from kvgds.engine import Engine, running
from kvgds.memory import Arena, region_of
from kvgds.testing import PlainTransfer
from kvgds.transport import File, NixlTransport
from kvgds.transport.agent import POOL_ROWS
from kvgds.transport.sides import BLOCK_ROWS, GROUP_ROWS, Flight, Member, Side, sides
from support import MIB, PAGE, config, until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

REGION = region_of(Arena(MIB).bytes)
LONG_AGO_S = 1.0


@pytest.fixture(autouse=True)
async def _idle() -> None:
    """While the interpreter lock is wanted, flights are as large as may be."""
    await until(lambda: not contention.busy())


def queue(side: Side, count: int, nbytes: int = MIB, rows: int = 0) -> None:
    """Stage transfers."""
    for _ in range(count):
        transfer = PlainTransfer(File(-1), [REGION], [(0, 0, nbytes)], write=False)
        side.queue(Member(transfer, lambda _: None, side))
        side.staged.append(side.waiting.pop())
        side.staged[-1].rows = [(0, 0, 1)] * rows
        side.staged_bytes += nbytes


def leave(side: Side) -> list[Flight]:
    """Let storage have what it may."""
    flights = []
    while side.staged and side.open():
        flights.append(side.board())
        flights[-1].since = time.monotonic()
        side.depart(flights[-1])
    return flights


def land(side: Side, flights: list[Flight], ago_s: float = 0.0) -> None:
    for flight in flights:
        side.land(flight, time.monotonic() - ago_s)


@pytest.mark.parametrize(("count", "flying"), [(1, 1), (2, 2), (4, 2), (16, 8), (64, 32)])
def test_half_of_what_there_is_waits_unless_that_is_little(count: int, flying: int) -> None:
    side = Side()
    queue(side, count)
    flights = leave(side)
    assert side.flying_bytes == flying * MIB
    assert max(flight.nbytes for flight in flights) <= 4 * MIB
    land(side, flights)
    assert (side.flying_bytes, side.flying_rows) == (0, 0)


def test_of_each_memory_a_flight() -> None:
    """Those of others keep their turn."""
    side = Side()
    for gpu in (None, 1, 0, 1, None):
        queue(side, 1, PAGE)
        if gpu is not None:
            transfer = cast("PlainTransfer", side.staged[-1].transfer)
            transfer.device, transfer.device_rows = gpu, [(0, 0, PAGE)]
    flights = [[each.gpu for each in flight.members] for flight in leave(side)]
    assert flights == [[None, None], [1, 1], [0]]
    assert (side.staged_bytes, side.queued_bytes, side.flying_bytes) == (0, 0, 5 * PAGE)


def test_storage_has_no_less_while_the_loop_has_some_of_it() -> None:
    side = Side()
    queue(side, 16)
    for _ in range(100):
        flights = leave(side)
        assert side.flying_bytes == 8 * MIB
        land(side, flights)
        leave(side)
        assert side.flying_bytes == 8 * MIB
        land(side, list(side.flights))
        queue(side, 16)  # those that have landed come again


def test_what_there_was_is_forgotten_when_there_is_less() -> None:
    side = Side()
    queue(side, 64)
    while side.staged:
        land(side, leave(side))
    assert side.window() > 8 * MIB
    for _ in range(50):
        queue(side, 4)
        while side.staged:
            land(side, leave(side))
    assert side.window() == 2 * MIB


def test_of_slow_storage_depth_counts() -> None:
    side = Side()
    queue(side, 1)
    (flight,) = leave(side)
    flight.since -= 5e-3
    land(side, [flight])
    queue(side, 8)
    leave(side)
    assert side.flying_bytes == 8 * MIB


def test_nixl_has_room_for_all_rows_that_may_be_in_flight() -> None:
    """Each side has one fewer than closes it, and then the flight with the most."""
    flying = 0
    for side in sides(1)[0]:
        while side.has_rows():
            queue(side, 1, rows=1)
            flight = side.board()
            side.depart(flight)
        land(side, [flight])
        queue(side, GROUP_ROWS - 1, 1, rows=1)
        queue(side, 1, 1, rows=BLOCK_ROWS)
        side.depart(side.board())
        flying += side.flying_rows
    assert 3 * BLOCK_ROWS < flying <= POOL_ROWS


def test_no_flight_leaves_that_nixl_has_no_rows_for() -> None:
    """Few bytes may be of very many rows: then the next waits, though there is a window for it."""
    side = Side()
    queue(side, 2, rows=BLOCK_ROWS)
    for _ in range(2):
        flights = leave(side)
        assert [flight.rows for flight in flights] == [BLOCK_ROWS]
        land(side, flights)


@pytest.mark.parametrize("which", [0, 1], ids=["loads", "stores"])
@pytest.mark.parametrize(("loads", "flying"), [(0, 16), (1, 4), (10, 8), (80, 16)])
def test_others_have_no_more_there_than_loads_that_somebody_waits_for(
    loads: int, which: int, flying: int
) -> None:
    """But a flight, and no more than half of what there is of them."""
    ((first, *others),) = sides(1)
    side = others[which]
    queue(first, loads)
    queue(side, 32)
    leave(first)
    leave(side)
    assert side.flying_bytes == flying * MIB


def test_stores_make_way_for_no_loads_that_nobody_waits_for() -> None:
    ((_, loads, stores),) = sides(1)
    queue(loads, 1)
    queue(stores, 32)
    leave(loads)
    leave(stores)
    assert stores.flying_bytes == 16 * MIB


@pytest.mark.parametrize(("loads", "flying"), [(1, 2), (10, 4)])
def test_lanes_share_what_stores_may_have_beside_loads_of_one(loads: int, flying: int) -> None:
    (first, *near), (_, *far) = sides(2)
    queue(first, loads)
    leave(first)
    for side in (*near, *far):
        queue(side, 32)
        leave(side)
        assert side.flying_bytes == flying * MIB


def contended(loads: int) -> list[int]:
    """The flights of 64 stores beside so many loads, while the lock is wanted."""
    while True:
        ((first, _, side),) = sides(1)
        queue(first, loads)
        queue(side, 64)
        contention.waited(1.0)
        leave(first)
        flights = leave(side)
        if contention.busy():  # for 50 ms, which a busy machine may take
            return [flight.nbytes for flight in flights]


def test_while_the_lock_is_wanted_all_goes_at_once_but_beside_loads() -> None:
    assert contended(loads=0) == [32 * MIB] * 2
    assert contended(loads=1) == [4 * MIB]


def test_who_has_loaded_is_given_a_moment_to_load_again() -> None:
    ((first, _, side),) = sides(1)
    queue(first, 1)
    queue(side, 16)
    flights = leave(first)
    land(first, flights)
    first.landed_at += LONG_AGO_S  # a machine may be so busy that the moment passes
    leave(side)
    assert side.flying_bytes == 4 * MIB
    first.landed_at -= 2 * LONG_AGO_S
    leave(side)
    assert side.flying_bytes >= 8 * MIB


class Listening(NixlTransport):
    """Keeps what it was told of transfers."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[bytes, bool, bool]] = []

    def submit(self, transfers: Sequence[Any], deliver: Callable[[list[Any]], None]) -> None:
        self.told += [(each.key, each.write, each.urgent) for each in transfers]
        super().submit(transfers, deliver)


@pytest.mark.parametrize("layout", ["slabs", "files"])
async def test_it_is_told_what_somebody_waits_for(tmp_path: Path, layout: str) -> None:
    transport = Listening()
    engine = Engine(config(tmp_path / "kv", tier={"layout": layout}), transport)
    async with running(engine):
        memory = bytearray(9000)
        await engine.store(b"a", memory)
        await engine.load(b"a", memory)
        for priority in (Priority.PREFETCH, Priority.BACKGROUND):
            await engine.load(b"a", memory, priority=priority)
    told = [(True, False), (False, True), (False, False), (False, False)]
    assert transport.told == [(b"a", *each) for each in told]


def test_loads_that_somebody_comes_to_wait_for_change_sides() -> None:
    """Those that wait, and those that are staged, but not what is in flight."""
    (whole,) = sides(1)
    first, loads, _ = whole
    queue(loads, 6)
    flying, staged, waiting = loads.staged.popleft(), loads.staged[1], loads.staged.pop()
    for member in (flying, staged, waiting):
        cast("Any", member.transfer).urgent = True
    loads.waiting.append(waiting)
    loads.queued_bytes, loads.staged_bytes = 5 * MIB, 4 * MIB
    flight = Flight()
    flight.add(flying)
    loads.depart(flight)
    whole.hasten()
    assert (list(first.staged), list(first.waiting)) == ([staged], [waiting])
    assert (first.queued_bytes, first.staged_bytes) == (2 * MIB, MIB)
    assert (loads.queued_bytes, loads.staged_bytes) == (3 * MIB, 3 * MIB)
    assert [each.side for each in (flying, staged, waiting)] == [loads, first, first]
    for member in loads.staged:
        cast("Any", member.transfer).urgent = True
    whole.hasten()
    assert first.window() == 5 * MIB // 2  # half of what there is now
    land(loads, [flight])


def test_a_load_that_hangs_holds_up_no_store() -> None:
    ((first, _, side),) = sides(1)
    queue(first, 1)
    (flight,) = leave(first)
    flight.since -= LONG_AGO_S
    first.give_up(time.monotonic())
    queue(side, 16)
    leave(side)
    assert side.flying_bytes == 8 * MIB
    land(first, [flight], ago_s=LONG_AGO_S / 2)
    assert first.flying_bytes == 0
