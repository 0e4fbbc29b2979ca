"""What an engine counts, in its own Prometheus registry, and the observer's contract.

No global state: each engine has a registry of its own, to be served or merged as its
process likes. Every row names its path.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvgds.blocks import BlockKey

_SECONDS = (
    1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2,
    5e-2, 0.1, 0.25, 0.5, 1, 2.5, 10, 30,
)  # fmt: skip
_LABELS = ("direction", "tier", "path", "outcome")


@dataclass(frozen=True, slots=True)
class Event:
    """One block's operation has ended.

    Attributes:
        direction: ``"load"`` or ``"store"``.
        outcome: ``"hit"``, ``"miss"``, ``"stored"``, ``"present"``, ``"error"``, or
            ``"cancelled"``: its caller left while it was queued.
        path: ``"direct"``, ``"bounce"``, ``"gds"`` or ``"gds-compat"``; ``"none"`` where no byte
            had to move.
        seconds: from submission to now.
    """

    direction: str
    key: BlockKey
    nbytes: int
    tier: str
    path: str
    outcome: str
    seconds: float


class Observer(Protocol):
    """Is told of every block that ends, on the event loop's thread; must not block.

    One that raises is removed and logged; it never breaks a transfer.
    """

    def settled(self, event: Event) -> None:
        """A block's operation has ended."""


class _Row:
    """One combination of labels."""

    __slots__ = ("buckets", "nbytes", "seconds")

    def __init__(self) -> None:
        self.nbytes = 0
        self.seconds = 0.0
        self.buckets = [0] * (len(_SECONDS) + 1)


class Metrics:
    """Counters and histograms of one engine.

    Counting a block takes a fifth of what it takes through prometheus-client's own
    counters, so rows are plain numbers that become metrics when they are scraped.
    """

    def __init__(self, gauges: Callable[[], Iterable[Metric]]) -> None:
        self.registry = CollectorRegistry()
        self._gauges = gauges
        self._rows: dict[tuple[str, str, str, str], _Row] = {}
        self.registry.register(self)

    def count(self, labels: tuple[str, str, str, str], nbytes: int, seconds: float) -> None:
        """Add one ended block: direction, tier, path, outcome."""
        row = self._rows.get(labels)
        if row is None:
            row = self._rows[labels] = _Row()
        if labels[3] in ("hit", "stored"):
            row.nbytes += nbytes
        row.seconds += seconds
        row.buckets[bisect.bisect_left(_SECONDS, seconds)] += 1

    def collect(self) -> Iterator[Metric]:
        """All metrics as they are now; called by the registry."""
        ended = CounterMetricFamily("kvgds_operations", "blocks that ended", labels=_LABELS)
        moved = CounterMetricFamily("kvgds_bytes", "payload bytes moved", labels=_LABELS)
        taken = HistogramMetricFamily(
            "kvgds_operation_seconds", "from submission to end of one block", labels=_LABELS
        )
        for labels, row in list(self._rows.items()):
            ended.add_metric(labels, sum(row.buckets))
            moved.add_metric(labels, row.nbytes)
            counts = itertools.accumulate(row.buckets)
            bounds = [*map(str, _SECONDS), "+Inf"]
            taken.add_metric(labels, list(zip(bounds, counts, strict=True)), row.seconds)
        yield ended
        yield moved
        yield taken
        yield from self._gauges()
