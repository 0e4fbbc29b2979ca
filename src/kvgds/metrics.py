"""What an engine counts, in its own Prometheus registry, and the observer's contract.

No global state: each engine has a registry of its own, to be served or merged as its
process likes. Every row names its path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvgds.blocks import BlockKey

_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1, 2.5, 10, 30)
_LABELS = ("direction", "tier", "path", "outcome")


@dataclass(frozen=True, slots=True)
class Event:
    """One block's operation has ended.

    Attributes:
        direction: ``"load"`` or ``"store"``.
        outcome: ``"hit"``, ``"miss"``, ``"stored"``, ``"present"``, or ``"error"``.
        path: ``"direct"`` or ``"bounce"``; ``"none"`` where no byte had to move.
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


@dataclass(frozen=True, slots=True)
class Gauge:
    """A number read when the registry is scraped."""

    name: str
    text: str
    read: Callable[[], float]
    counter: bool = False


class Metrics:
    """Counters and histograms of one engine."""

    def __init__(self, gauges: list[Gauge]) -> None:
        self.registry = CollectorRegistry()
        self._gauges = gauges
        self._ops = Counter("kvgds_operations", "blocks that ended", _LABELS, registry=self.registry)
        self._bytes = Counter("kvgds_bytes", "payload bytes moved", _LABELS, registry=self.registry)
        self._seconds = Histogram(
            "kvgds_operation_seconds",
            "submission to end of one block",
            _LABELS,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._rows: dict[tuple[str, str, str, str], tuple[Any, Any, Any]] = {}
        self.registry.register(self)  # type: ignore[arg-type]  # a collector by duck type

    def count(self, event: Event) -> None:
        """Add one ended block."""
        row = (event.direction, event.tier, event.path, event.outcome)
        found = self._rows.get(row)
        if found is None:
            found = (self._ops.labels(*row), self._bytes.labels(*row), self._seconds.labels(*row))
            self._rows[row] = found
        found[0].inc()
        if event.outcome in ("hit", "stored"):
            found[1].inc(event.nbytes)
        found[2].observe(event.seconds)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The gauges, read now; called by the registry."""
        for gauge in self._gauges:
            family = CounterMetricFamily if gauge.counter else GaugeMetricFamily
            yield family(gauge.name, gauge.text, value=gauge.read())
