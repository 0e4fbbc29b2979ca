"""The only user of NIXL: moves rows of bytes between memory and files.

``contract`` says what a transport and a transfer promise each other; ``agent`` calls NIXL for
files, ``objects`` for buckets; ``reactor`` is the thread that drives an agent, ``sides`` how much
it lets storage have at once, and ``inbox`` how it is asked and how it waits. Every NIXL call on an
agent runs on its lane's thread.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

from kvgds.errors import ClosedError
from kvgds.transport.contract import LATER, File, Later, NotMoved, Transfer, Transport
from kvgds.transport.inbox import all_of
from kvgds.transport.reactor import Lane
from kvgds.transport.sides import GROUP_ROWS, sides

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from kvgds.memory import Region

__all__ = ["LATER", "File", "Later", "NixlTransport", "NotMoved", "Transfer", "Transport"]

_ids = itertools.count(1)
_DETACHED = all_of([])


class NixlTransport:
    """NIXL's POSIX plugin, one reactor thread for each of ``lanes`` agents."""

    def __init__(self, lanes: int = 1, queues: Sequence[str] = ("uring", "aio")) -> None:
        number = next(_ids)
        self._lanes = [
            Lane(f"nixl-{number}-{i}", queues, own) for i, own in enumerate(sides(lanes))
        ]
        self._closed = False
        self.name = ""

    def start(self) -> None:
        """Make the agents; blocks for some hundred milliseconds the first time.

        Raises:
            PathUnavailable: NIXL or its plugin can't be loaded.
            CapacityError: the system allows no more threads.
        """
        for lane in self._lanes:
            lane.start()
        for lane in self._lanes:
            lane.ready.result()
        self.name = self._lanes[0].backend

    def add_gpu(self) -> None:
        """Add NIXL's plugin for GPU memory to one agent; blocks while its driver opens.

        One alone, because cuFile knows each file and each address once in a process.

        Raises:
            PathUnavailable: it can't be used here.
        """
        self._lanes[0].call(self._lanes[0].add_gpu).result()

    def submit(self, transfers: Sequence[Transfer], deliver: Callable[[list[Any]], None]) -> None:
        """See :class:`Transport`."""
        if self._closed:
            raise ClosedError("the transport is closed")
        if len(self._lanes) == 1:
            self._lanes[0].submit(transfers, deliver)
            return
        near = [each for each in transfers if not _uses_gpu(each)]
        if len(near) < len(transfers):
            self._lanes[0].submit([each for each in transfers if _uses_gpu(each)], deliver)
        loads = [lane.load for lane in self._lanes]
        for start in range(0, len(near), GROUP_ROWS // 4):
            part = near[start : start + GROUP_ROWS // 4]
            lightest = loads.index(min(loads))
            loads[lightest] += sum(each.nbytes for each in part)
            self._lanes[lightest].submit(part, deliver)

    def detach(self, thing: File | Region) -> Future[None]:
        """See :class:`Transport`."""
        if isinstance(thing, File) and not thing.attached:
            return _DETACHED
        if self._closed:  # a lane that ends forgets everything
            return all_of([lane.stopped for lane in self._lanes])
        return all_of([lane.call(partial(lane.forget, thing)) for lane in self._lanes])

    def close(self) -> Future[None]:
        """See :class:`Transport`."""
        self._closed = True
        return all_of([lane.close() for lane in self._lanes])

    def abandon(self) -> None:
        """See :class:`Transport`."""
        for lane in self._lanes:
            lane.leak()


def _uses_gpu(transfer: Transfer) -> bool:
    """Whether storage uses a GPU's memory itself."""
    return any(region.device is not None for region in transfer.regions)
