"""Waits that go on when they are cancelled: what follows must not begin before.

Only for what ends by itself. Cancelling every task of a loop, as ``asyncio.run`` does at its end,
cuts none of them short; so a task that waits like this is one that nobody can cancel.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")


async def until_done(future: asyncio.Future[Any], deadline: float | None = None) -> bool:
    """Wait for a future, and forget about cancels. False: it was not done by then.

    Args:
        future: ends by itself.
        deadline: in the loop's time; None: there is none.
    """
    await _waited(future, deadline)
    return future.done()


def to_the_end(run: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Future[T]:
    """Run what takes no notice of cancels once it has begun; cancelled before, it begins again."""
    whole: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    _begin(run, whole)
    return whole


def _begin(run: Callable[[], Coroutine[Any, Any, T]], whole: asyncio.Future[T]) -> None:
    begun = asyncio.Event()

    async def once() -> T:
        begun.set()
        return await run()

    task = whole.get_loop().create_task(once())
    task.add_done_callback(partial(_end, run, whole, begun))


def _end(
    run: Callable[[], Coroutine[Any, Any, T]],
    whole: asyncio.Future[T],
    begun: asyncio.Event,
    task: asyncio.Task[T],
) -> None:
    if task.cancelled():
        whole.cancel() if begun.is_set() else _begin(run, whole)
    elif (error := task.exception()) is not None:
        whole.set_exception(error)
    else:
        whole.set_result(task.result())


async def outlast(future: asyncio.Future[T]) -> T:
    """The result of a future. Cancelled, wait for its end, and be cancelled then."""
    gone = await _waited(future, None)
    result = future.result()
    if gone is None:
        return result
    try:
        raise gone
    finally:
        del gone  # it knows this frame


async def _waited(
    future: asyncio.Future[Any], deadline: float | None
) -> asyncio.CancelledError | None:
    """The last cancel that came meanwhile."""
    loop, gone = asyncio.get_running_loop(), None
    while not future.done():
        left = None if deadline is None else deadline - loop.time()
        if left is not None and left <= 0:
            break
        try:
            await asyncio.wait([future], timeout=left)
        except asyncio.CancelledError as cancelled:
            gone = cancelled
    try:
        return gone
    finally:
        del gone  # as above
