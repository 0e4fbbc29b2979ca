"""One timer for all deadlines: what ends in time hears nothing, what does not hears once."""

from __future__ import annotations

import asyncio

import pytest

from kvgds.deadlines import Deadlines


class Thing:
    """Something with a deadline, and whether it was told of it."""

    def __init__(self) -> None:
        self.left = 1
        self.told = asyncio.Event()


def made() -> Deadlines[Thing]:
    """Deadlines of the running loop."""
    return Deadlines(asyncio.get_running_loop(), lambda thing: thing.told.set())


def soon(seconds: float) -> float:
    """So many seconds from now, in the loop's time."""
    return asyncio.get_running_loop().time() + seconds


@pytest.mark.parametrize("order", [(3600.0, 1e-3, 2e-3), (1e-3, 2e-3, 3600.0)])
async def test_each_is_told_at_its_time(order: tuple[float, ...]) -> None:
    """Whatever the order they came in, and none before; a nearer one moves the timer forward."""
    loop, told = asyncio.get_running_loop(), list[tuple[float, float]]()

    def tell(thing: Thing) -> None:
        when = next(when for when, each in things.items() if each is thing)
        told.append((when, loop.time()))
        thing.told.set()

    deadlines, things = Deadlines(loop, tell), {when: Thing() for when in order}
    start = soon(0)
    for when, thing in things.items():
        deadlines.add(thing, start + when)
    for when in sorted(order)[:2]:
        await things[when].told.wait()
    assert [when for when, _ in told] == sorted(order)[:2]
    assert all(time >= start + when for when, time in told)
    deadlines.close()


async def test_what_has_ended_is_not_told() -> None:
    """Neither the first in line nor one behind it."""
    deadlines, things = made(), [Thing() for _ in range(3)]
    for i, thing in enumerate(things):
        deadlines.add(thing, soon(1e-3 * (i + 1)))
    for thing in things[:2]:
        thing.left = 0
        deadlines.ended()
    await things[2].told.wait()
    assert [thing.told.is_set() for thing in things] == [False, False, True]


@pytest.mark.parametrize("end", [pytest.param(i, id=f"every {i}") for i in (1, 2, 3)])
async def test_ended_ones_are_forgotten(end: int) -> None:
    """They would pile up until their deadline, half a minute later, and hold on to memory."""
    deadlines = made()
    things: list[Thing] = []
    for i in range(3000):
        things.append(Thing())
        deadlines.add(things[-1], soon(1000))
        if i % end == 0:
            things[i].left = 0
            deadlines.ended()
    alive = sum(thing.left for thing in things)
    assert alive <= len(deadlines) <= 2 * alive + 130
    deadlines.close()


async def test_closed_ones_are_told_nothing() -> None:
    """A closed engine's timer must not outlive it."""
    deadlines, thing, other = made(), Thing(), Thing()
    deadlines.add(thing, soon(1e-3))
    deadlines.close()
    made().add(other, soon(2e-3))
    await other.told.wait()
    assert not thing.told.is_set()
