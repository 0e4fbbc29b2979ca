"""kvgds moves the KV cache of LLM servers between memory and storage, through NVIDIA NIXL."""

from __future__ import annotations

from kvgds import _starting  # noqa: F401 - before all that takes long to import
from kvgds.blocks import BlockKey, Namespace, Outcome
from kvgds.config import EngineConfig, FileTier, ObjectTier, load_config
from kvgds.engine import Engine, Operation, aligned, open_engine
from kvgds.errors import (
    BlockCorrupt,
    BusyError,
    CapacityError,
    ClosedError,
    ConfigError,
    KvgdsError,
    PathUnavailable,
    QueueFull,
    Settled,
    StorageFull,
    TransferError,
    TransferTimeout,
)
from kvgds.flights import Memory
from kvgds.flights.relay import RelayStatistics
from kvgds.memory import Cache, Region, View
from kvgds.metrics import Event, Metrics, Observer
from kvgds.paths import PathPlan
from kvgds.schedule import Priority
from kvgds.statistics import Statistics
from kvgds.tiers import TierStatistics

__version__ = "0.1.0"

__all__ = [
    "BlockCorrupt",
    "BlockKey",
    "BusyError",
    "Cache",
    "CapacityError",
    "ClosedError",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "Event",
    "FileTier",
    "KvgdsError",
    "Memory",
    "Metrics",
    "Namespace",
    "ObjectTier",
    "Observer",
    "Operation",
    "Outcome",
    "PathPlan",
    "PathUnavailable",
    "Priority",
    "QueueFull",
    "Region",
    "RelayStatistics",
    "Settled",
    "Statistics",
    "StorageFull",
    "TierStatistics",
    "TransferError",
    "TransferTimeout",
    "View",
    "aligned",
    "load_config",
    "open_engine",
]
