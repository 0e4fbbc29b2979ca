"""What an engine is doing and has done: for its user, and for whoever scrapes its metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from kvgds.flights import Flights
    from kvgds.flights.relay import RelayStatistics
    from kvgds.tiers import TierStatistics


@dataclass(frozen=True, slots=True)
class Statistics:
    """What an engine is doing, and has done since it was opened.

    Attributes:
        queued: blocks waiting to start, and uploads whose turn has come; ``relay.owed`` has all.
        in_flight: blocks under way, likewise.
        hits: loads that found their block.
        misses: loads that did not.
        stored: blocks written.
        errors: blocks that ended in an error.
        cancelled: blocks whose caller left while they were queued.
        joined: blocks that shared another's I/O instead of one of their own. Such a load is a
            hit too; such a store is not counted in ``stored``.
        quarantined_bytes: bounce memory still owned by transfers past their deadline.
        tiers: the tiers' own numbers.
        relay: what goes on between two tiers; None: there is one.
    """

    queued: int
    in_flight: int
    hits: int
    misses: int
    stored: int
    errors: int
    cancelled: int
    joined: int
    quarantined_bytes: int
    tiers: tuple[TierStatistics, ...]
    relay: RelayStatistics | None = None


def statistics_of(flights: Flights) -> Statistics:
    """What an engine is doing and has done."""
    counts, relay = flights.counts, flights.relay
    return Statistics(
        queued=flights.scheduler.queued,
        in_flight=flights.scheduler.running,
        hits=counts["hit"],
        misses=counts["miss"],
        stored=counts["stored"],
        errors=counts["error"],
        cancelled=counts["cancelled"],
        joined=counts["joined"],
        quarantined_bytes=flights.quarantined,
        tiers=tuple(tier.statistics() for tier in flights.tiers),
        relay=None if relay is None else relay.statistics(),
    )


_ENGINE = (
    ("kvgds_queued", "queued", "blocks waiting to start"),
    ("kvgds_in_flight", "in_flight", "blocks under way"),
    ("kvgds_quarantined_bounce_bytes", "quarantined_bytes", "bounce memory of late transfers"),
)
_TIERS = (
    ("kvgds_blocks", "blocks", "blocks that a load would find; of a bucket: that were seen there"),
    ("kvgds_used_bytes", "bytes_used", "bytes of blocks, padding included"),
    ("kvgds_capacity_bytes", "capacity_bytes", "limit on them; 0: a bucket, which has none"),
    ("kvgds_evictions", "evictions", "blocks dropped to make room"),
    ("kvgds_dropped", "dropped", "those of them that the next tier lacked"),
    ("kvgds_quarantined", "quarantined", "places out of use"),
    ("kvgds_out", "out", "1: the tier does not answer and is left alone"),
)
_RELAY = (
    ("kvgds_owed", "owed", "blocks that the next tier lacks"),
    ("kvgds_uploaded", "uploaded", "blocks taken there"),
    ("kvgds_upload_failures", "failed", "attempts at that which failed"),
    ("kvgds_promoted", "promoted", "blocks taken back"),
)
_COUNTERS = ("evictions", "dropped", "uploaded", "failed", "promoted")


def gauges_of(found: Statistics) -> Iterator[Metric]:
    """The same for Prometheus, by tier where there may be several."""
    for name, field, text in _ENGINE:
        yield GaugeMetricFamily(name, text, value=getattr(found, field))
    for name, field, text in _TIERS:
        metric = _family(field)(name, text, labels=("tier",))
        for tier in found.tiers:
            value = getattr(tier, field)
            metric.add_metric((tier.name,), value != "" if isinstance(value, str) else value)
        yield metric
    if found.relay is not None:
        for name, field, text in _RELAY:
            yield _family(field)(name, text, value=getattr(found.relay, field))


def _family(field: str) -> type[CounterMetricFamily | GaugeMetricFamily]:
    return CounterMetricFamily if field in _COUNTERS else GaugeMetricFamily
