"""How one block's bytes get from its view into an image on storage, and back.

``plan`` decides and reports, by trials with real reads and writes; ``gds`` and ``canary`` do so for
GPUDirect Storage; ``move`` is one block on its way; ``ways`` are what it may go by.
"""

from __future__ import annotations

from kvgds.paths.gds import Gds, settle_gds
from kvgds.paths.move import Move, Path, checksum_of
from kvgds.paths.plan import NO_ROOM, PathPlan, filesystem_of, try_directory
from kvgds.paths.ways import RELAY, Ways

__all__ = [
    "NO_ROOM",
    "RELAY",
    "Gds",
    "Move",
    "Path",
    "PathPlan",
    "Ways",
    "checksum_of",
    "filesystem_of",
    "settle_gds",
    "try_directory",
]
