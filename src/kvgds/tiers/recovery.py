"""What an engine finds in a directory of slabs, and makes of it.

The rows of the index become the map of slots; slab files that were cut or lost are made whole,
without the blocks that they held; what a death left lying about is removed. Whatever it decides is
committed before it returns, so that a later opening decides no other way.

Blocks: runs in the executor, before the index's thread starts and anything else uses the map.
"""

from __future__ import annotations

import itertools
import logging
import os
from typing import TYPE_CHECKING

from kvgds.blocks import NO_CHECKSUM
from kvgds.errors import ConfigError
from kvgds.tiers.index import NEW_INDEX, Changes, damaged
from kvgds.tiers.slots import Block, Slab
from kvgds.tiers.space import (
    SLAB_NAME,
    SLOT_BITS,
    SLOT_MASK,
    later_slabs,
    open_slab,
    remove_slab,
    slab_name,
    slabs_in,
)
from kvgds.transport import File

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvgds.config import FileTier
    from kvgds.tiers.index import Index, Row
    from kvgds.tiers.slots import Slots

    Progress = Callable[[str, int, int], None]

_log = logging.getLogger("kvgds")


class Recovery:
    """One opening of a directory.

    Args:
        folder: a descriptor of the directory.
        namespace: the number of the one whose blocks are served.
        direct: whether slab files are opened with O_DIRECT.
    """

    def __init__(
        self,
        settings: FileTier,
        index: Index,
        slots: Slots,
        *,
        folder: int,
        namespace: int,
        direct: bool,
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._index = index
        self._slots = slots
        self._namespace = namespace
        self._direct = direct
        self._usable: dict[int, int] = {}  # by slab: how many slots have kept their bytes

    def run(self, progress: Progress) -> None:
        """Fill the map.

        Raises:
            ConfigError: among others, if the index holds what no engine wrote.
        """
        try:
            self._slots.clock = itertools.count((self._index.count_open() << 40) + 1)
            self._open_slabs()
            self._load_blocks(progress)
            self._sweep()
            self._shrink()
        except (TypeError, ValueError, OverflowError) as error:
            if isinstance(error, ConfigError):
                raise
            raise damaged(self._settings.root / "index.db", error) from None

    def _open_slabs(self) -> None:
        there, known = slabs_in(self._settings.root), self._index.slabs()
        strangers = there.keys() - {slab_id for slab_id, _, _ in known}
        self._look_at_later(later_slabs(self._settings.root, there, (slab[0] for slab in known)))
        for slab_id, slot_bytes, slots in known:
            if slab_id not in there and strangers:  # to be swept as orphans, with all their blocks
                why = f"slab {slab_id} is gone, and it does not know slab {min(strangers)}"
                raise damaged(self._settings.root / "index.db", why)
            path = self._settings.root / slab_name(slab_id, slot_bytes)
            if slab_id in there and not os.path.lexists(path):
                rule = (
                    f"is {there[slab_id]} by its name; `kvgds fsck --rebuild` makes the index anew"
                )
                raise ConfigError("root", str(path), rule)
            fd, whole = open_slab(path, slot_bytes * slots, direct=self._direct)
            size = self._slots.size_class(slot_bytes)
            self._slots.add_slab(Slab(slab_id, slots, path, File(fd, direct=self._direct), size))
            self._usable[slab_id] = whole // slot_bytes

    def _look_at_later(self, later: list[int]) -> None:
        """An older index is no surprise after a loss of power, unless it was to outlive that."""
        root = self._settings.root
        if len(later) > 1:
            why = f"it does not know {len(later)} slabs, from {min(later)} to {max(later)}"
            if self._index.outlasts_power():
                raise damaged(root / "index.db", why)
            _log.warning("%s: the index is older than the slabs: %s; they are removed", root, why)

    def _load_blocks(self, progress: Progress) -> None:
        total, done = self._index.count(), 0
        wrong: list[int] = []
        for chunk in self._index.blocks():
            wrong += (slot for slot in map(self._adopt, chunk) if slot is not None)
            done += len(chunk)
            progress("recovering the index", done, total)
        self._index.apply(Changes(drop=wrong))
        for slab in self._slots.slabs.values():
            slab.find_free()
            self._slots.open_slab(slab)

    def _adopt(self, row: Row) -> int | None:
        """Take one row of the index; the slot whose row must go, if one must.

        Blocks of other namespaces wait for eviction. What this engine may not serve, and what
        has been replaced, goes at once: it would come back when the later one is deleted.
        """
        slot, namespace, key, generation, nbytes, algorithm, mirrored = row
        slots = self._slots
        if slot & SLOT_MASK >= self._usable.get(slot >> SLOT_BITS, 0):
            return slot
        if key is None:
            slots.quarantine(slot)
            return None
        used_at = len(slots.keys)  # rows come in order of use
        if namespace != self._namespace:
            slots.put_foreign(slot, used_at, mirrored=bool(mirrored))
            return None
        rival = slots.find(key)
        unchecked = algorithm == NO_CHECKSUM and self._settings.verify == "full"
        if unchecked or (rival is not None and rival.generation > generation):
            return slot
        gone = None if rival is None else slots.forget(rival.slot).slot
        slots.put(key, Block(slot, generation, nbytes, used_at), mirrored=bool(mirrored))
        return gone

    def _sweep(self) -> None:
        """Remove what was cut short: temporaries, and slab files that the index does not know."""
        known = {slab.path.name for slab in self._slots.slabs.values()}
        for name in os.listdir(self._settings.root):
            stray = name.startswith((".trial-", ".kvgds.json-")) or name in NEW_INDEX
            if stray or (SLAB_NAME.fullmatch(name) and name not in known):
                os.unlink(self._settings.root / name)

    def _shrink(self) -> None:
        """Give up slabs until the capacity, which may be less than last time, holds."""
        while self._slots.slab_bytes > self._settings.capacity_bytes:
            slab = self._slots.least_wanted_slab(None, spare=True)
            slab = slab or self._slots.least_wanted_slab(None, spare=False)
            if slab is None:  # pragma: no cover - nothing is in flight at open
                return
            self._slots.shut_slab(slab)
            self._slots.empty_slab(slab, slab.places())
            self._slots.remove_slab(slab)
            self._index.apply(Changes(drop_slab=[slab.id]))
            remove_slab(self._folder, slab.path.name, slab.file.fd)
