"""Which slot of which slab holds which block, in memory.

Owns the map and its accounts. A slot is in one place: free, lent to a store, used by a block, on
its way out until that is committed, or in quarantine. One that is being loaded is not free before
the last load of it has ended. Nothing here waits, and nothing is durable: ``supply`` and ``slabs``
see to it that the index knows of a change before a slot is used again. A slab may have a million
slots: no call on the loop looks at all of them.

A used slot is either *owed* to the next tier of a stack, or *clean*: that has the block, has given
it up, or is not for it to have. In a tier that stands alone all are clean.

Belongs to the event loop's thread; while the directory is opened, to the executor's.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvgds.tiers.maps import KeyMap, Links, Order, column
from kvgds.tiers.space import SLOT_BITS, SLOT_MASK

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from kvgds.blocks import BlockKey
    from kvgds.paths import Move
    from kvgds.transport import File

_used_at = attrgetter("used_at")

# What a slot is, in a slab's ``states``.
_UNUSED, _OWED, _GIVEN_UP, _MIRRORED, _QUARANTINED = range(5)


class Block(NamedTuple):
    """A block that a load would find."""

    slot: int
    generation: int
    nbytes: int
    used_at: int


class Forgotten(NamedTuple):
    """A block that is invisible, but still in the index."""

    slot: int
    key: BlockKey | None = None
    used_at: int = 0
    state: int = _MIRRORED  # as far as there is a next tier
    foreign: bool = False  # of another namespace, whose engines find it


class SizeClass:
    """The slots of one size."""

    def __init__(self, slot_bytes: int, links: dict[int, Links]) -> None:
        self.slot_bytes = slot_bytes
        self.slots = 0
        self.free = 0
        self.open: OrderedDict[Slab, None] = OrderedDict()  # where those are; next last
        self.clean = Order(links)  # least recently used first
        self.owed = Order(links)  # likewise
        self.going = 0  # slots whose removal is being committed
        self.pending = 0  # those, and slots being written
        self.waiting: deque[Move] = deque()  # stores without a slot yet

    @property
    def used(self) -> int:
        """How many slots hold blocks."""
        return len(self.clean) + len(self.owed)


class Slab:
    """One slab file, and what its slots are used for."""

    def __init__(self, slab_id: int, slots: int, path: Path, file: File, size: SizeClass) -> None:
        self.id = slab_id
        self.slots = slots
        self.path = path
        self.file = file
        self.size = size
        self.fresh = self.places()  # free slots that were never used, lent in order
        self.free: deque[int] = deque()  # the others, next last
        self.shut = True  # stores can have none of its slots
        self.indexed = True  # else what is in it is on its way out
        self.lost: OSError | None = None  # why no store is safe there; the index's thread finds out
        self.used = 0  # slots of blocks
        self.busy = 0  # slots being written, or waiting for a commit
        self.owed = 0  # slots whose blocks the next tier lacks
        self.quarantined = 0
        self.used_at = 0  # when one of its blocks was last stored or loaded, by the clock
        self.states = bytearray(slots)
        self.keys = np.empty(slots, object)
        self.generations = column(slots)
        self.nbytes = column(slots)
        self.uses = column(slots)
        self.links = Links(column(slots), column(slots))

    def places(self) -> range:
        """The numbers of its slots."""
        base = self.id << SLOT_BITS
        return range(base, base + self.slots)

    def lend(self) -> int:
        """One of its free slots."""
        if not self.fresh:
            return self.free.pop()
        slot, self.fresh = self.fresh[0], self.fresh[1:]
        return slot

    def count_free(self) -> int:
        """How many of its slots are free."""
        return len(self.fresh) + len(self.free)

    def find_free(self) -> None:
        """See which slots are free, once the states are known. Looks at all of them."""
        used = len(self.states.rstrip(bytes([_UNUSED])))
        places = self.places()
        self.fresh = places[used:]
        self.free.extend(places[n] for n in reversed(range(used)) if self.states[n] == _UNUSED)

    def owing(self, wanted: int) -> list[BlockKey]:
        """Some keys of blocks that the next tier lacks."""
        keys: list[BlockKey] = []
        place = self.states.find(_OWED)
        while place >= 0 and len(keys) < wanted:
            keys.append(self.keys[place])
            place = self.states.find(_OWED, place + 1)
        return keys


class Slots:
    """The map.

    Args:
        stacked: whether there is a next tier.

    Attributes:
        keys: the slots of what a load would find.
        slabs: by id.
        sizes: the size classes, by bytes a slot.
        clock: numbers uses and generations; later is larger.
        touched: uses that the index does not know of, by slot.
        holds: loads in flight, by slot.
        orphans: slots to be freed when their last hold ends.
        unwanted: slots of what no load is to find, replaced for example: their rows could not be
            removed, and would be found after a restart.
        bytes_used: of slots that blocks use, those of other namespaces included.
        dropped: blocks evicted before the next tier had them.
    """

    def __init__(self, *, stacked: bool) -> None:
        self._stacked = stacked
        self.keys: KeyMap[BlockKey] = KeyMap()
        self.slabs: dict[int, Slab] = {}
        self._links: dict[int, Links] = {}
        self.sizes: dict[int, SizeClass] = {}
        self.clock = itertools.count(1)
        self.touched: dict[int, int] = {}
        self.holds: dict[int, int] = {}
        self.orphans: set[int] = set()
        self.unwanted: set[int] = set()
        self.bytes_used = 0
        self.slab_bytes = 0
        self.evictions = 0
        self.dropped = 0
        self.quarantined = 0

    # --- slabs ------------------------------------------------------------------------

    def size_class(self, slot_bytes: int) -> SizeClass:
        """The class of slots of this size."""
        size = self.sizes.get(slot_bytes)
        if size is None:
            size = self.sizes[slot_bytes] = SizeClass(slot_bytes, self._links)
        return size

    def add_slab(self, slab: Slab) -> None:
        """Know a slab; stores can't have its slots yet."""
        self.slabs[slab.id] = slab
        self._links[slab.id] = slab.links
        slab.size.slots += slab.slots
        self.slab_bytes += slab.slots * slab.size.slot_bytes

    def open_slab(self, slab: Slab) -> None:
        """Let stores have the slab's free slots, after those of the slabs that are open."""
        slab.shut = False
        if free := slab.count_free():
            slab.size.free += free
            slab.size.open[slab] = None
            slab.size.open.move_to_end(slab, last=False)

    def shut_slab(self, slab: Slab) -> None:
        """Let stores have none of the slab's slots any more; its blocks load on."""
        slab.shut = True
        if slab in slab.size.open:
            del slab.size.open[slab]
            slab.size.free -= slab.count_free()

    def empty_slab(self, slab: Slab, places: range) -> None:
        """Forget the blocks in some places of a slab that is shut."""
        used = (_OWED, _GIVEN_UP, _MIRRORED)
        gone = [self.forget(slot) for slot in places if slab.states[slot & SLOT_MASK] in used]
        self.count_evicted(gone)

    def remove_slab(self, slab: Slab) -> None:
        """Know a slab no more that is shut, and empty."""
        self.quarantined -= slab.quarantined
        slab.size.slots -= slab.slots
        del self.slabs[slab.id], self._links[slab.id]
        self.slab_bytes -= slab.slots * slab.size.slot_bytes

    def least_wanted_slab(self, other_than: SizeClass | None, *, spare: bool) -> Slab | None:
        """The slab of another class that was not used for longest, and that nobody uses now.

        To spare means, here and below, that nothing which the next tier lacks may go.
        """
        slabs = [slab for slab in self._idle_slabs(spare=spare) if slab.size is not other_than]
        return min(slabs, key=_used_at, default=None)

    def older_slab(self, size: SizeClass, *, spare: bool) -> Slab | None:
        """Another class's slab, if all of it is older than anything of this class."""
        if not size.used or self.slab_bytes == size.slots * size.slot_bytes:  # there is no other
            return None
        slab = self.least_wanted_slab(size, spare=spare)
        return slab if slab is not None and self._older(slab, size) else None

    def _older(self, slab: Slab, size: SizeClass) -> bool:
        oldest = (next(iter(order)) for order in (size.clean, size.owed) if order)
        return slab.used_at <= min(self.used_at(slot) for slot in oldest)

    def used_at(self, slot: int) -> int:
        """When a block was last used, by the clock."""
        return self.slabs[slot >> SLOT_BITS].uses[slot & SLOT_MASK]

    def owing_slab(self, size: SizeClass) -> Slab | None:
        """The slab that this class would be given next if its blocks were not owed."""
        slabs = [slab for slab in self.slabs.values() if slab.owed and slab.size is not size]
        slab = min(slabs, key=_used_at, default=None)
        return slab if slab is None or not size.used or self._older(slab, size) else None

    def abandon_slab(self, slab: Slab) -> None:
        """Store no more into a slab that is lost; its blocks load until it is given up."""
        self.shut_slab(slab)
        self.condemn(slab, slab.count_free())
        slab.fresh = range(0)
        slab.free.clear()

    def lost_slab(self, *, spare: bool) -> Slab | None:
        """A slab that is lost, if nobody uses it now."""
        return next((slab for slab in self._idle_slabs(spare=spare) if slab.lost), None)

    def _idle_slabs(self, *, spare: bool) -> Iterator[Slab]:
        held = self._held_slabs()
        for slab in self.slabs.values():
            if not slab.busy and slab.id not in held and not (spare and slab.owed):
                yield slab

    def is_idle(self, slab: Slab) -> bool:
        """Whether nobody uses a slab now."""
        return not slab.busy and slab.id not in self._held_slabs()

    def _held_slabs(self) -> set[int]:
        return {slot >> SLOT_BITS for slot in self.holds}

    # --- slots ------------------------------------------------------------------------

    def take(self, move: Move, size: SizeClass) -> None:
        """Lend a free slot of this class to a store."""
        slab = next(reversed(size.open))
        _aim(move, slab, slab.lend(), next(self.clock))
        size.free -= 1
        if not slab.count_free():
            del size.open[slab]
        slab.busy += 1
        size.pending += 1

    def hold(self, move: Move, slot: int) -> None:
        """Begin a load of a block."""
        slab = self.slabs[slot >> SLOT_BITS]
        _aim(move, slab, slot, slab.generations[slot & SLOT_MASK])
        self.holds[slot] = self.holds.get(slot, 0) + 1
        if not move.mirrored:
            self._touch(slab, slot)

    def unhold(self, slot: int) -> None:
        """A load has ended."""
        left = self.holds.pop(slot) - 1
        if left:
            self.holds[slot] = left
        elif slot in self.orphans:
            self.orphans.discard(slot)
            self.free(slot)

    def pend(self, slot: int, step: int) -> None:
        """Count a slot that waits for a commit (1), or does no longer (-1)."""
        slab = self.slabs[slot >> SLOT_BITS]
        slab.busy += step
        slab.size.pending += step

    def free(self, slot: int, *, last: bool = False) -> None:
        """Make a slot free, to be used next or last of all."""
        if slot in self.holds:
            self.orphans.add(slot)
            return
        slab = self.slabs[slot >> SLOT_BITS]
        if slab.lost:
            self.condemn(slab)
            return
        (slab.free.appendleft if last else slab.free.append)(slot)
        if not slab.shut:
            slab.size.free += 1
            slab.size.open[slab] = None
            if last:
                slab.size.open.move_to_end(slab, last=False)

    def condemn(self, slab: Slab, slots: int = 1) -> None:
        """Count slots that are out of use for good."""
        slab.quarantined += slots
        self.quarantined += slots

    def quarantine(self, slot: int) -> None:
        """Take a slot out of use, for good; its block, if it has one, is forgotten."""
        slab, place = self.slabs[slot >> SLOT_BITS], slot & SLOT_MASK
        if slab.states[place] != _UNUSED:
            self.forget(slot)
        slab.states[place] = _QUARANTINED
        self.condemn(slab)

    def victims(self, size: SizeClass, wanted: int, forced: int) -> list[int]:
        """The slots of the least recently used blocks that nobody is loading, clean ones first.

        Of those that are owed no more than it takes to have ``forced``.
        """
        slots = self._unheld(size.clean, wanted)
        if len(slots) < forced:  # so all that is clean is among them, or held
            slots += self._unheld(size.owed, forced - len(slots))
        return slots

    def _unheld(self, recent_last: Iterable[int], wanted: int) -> list[int]:
        some = itertools.islice(recent_last, wanted + len(self.holds))
        return [slot for slot in some if slot not in self.holds][:wanted]

    def owed(self, size: SizeClass, wanted: int) -> list[BlockKey]:
        """The least recently used blocks that the next tier lacks."""
        return [self._key(slot) for slot in itertools.islice(size.owed, wanted)]

    def all_owed(self) -> list[tuple[BlockKey, int]]:
        """Keys and bytes of all blocks that the next tier lacks, least recently used first."""
        orders = [size.owed for size in self.sizes.values()]
        slots = sorted(itertools.chain(*orders), key=self.used_at)
        return [(self._key(slot), self.block(slot).nbytes) for slot in slots]

    def _key(self, slot: int) -> BlockKey:
        key: BlockKey = self.slabs[slot >> SLOT_BITS].keys[slot & SLOT_MASK]
        return key

    # --- blocks -----------------------------------------------------------------------

    def find(self, key: BlockKey) -> Block | None:
        """The block that a load would find."""
        slot = self.keys.get(key)
        return None if slot is None else self.block(slot)

    def nbytes(self, slot: int) -> int:
        """The size of a block."""
        return self.slabs[slot >> SLOT_BITS].nbytes[slot & SLOT_MASK]

    def block(self, slot: int) -> Block:
        """The block in a slot."""
        slab, place = self.slabs[slot >> SLOT_BITS], slot & SLOT_MASK
        return Block(slot, slab.generations[place], slab.nbytes[place], slab.uses[place])

    def put(self, key: BlockKey, block: Block, *, mirrored: bool) -> None:
        """Make a block visible: the most recently used."""
        slot, generation, nbytes, used_at = block
        slab, place = self.slabs[slot >> SLOT_BITS], slot & SLOT_MASK
        self.keys.add(key, slot)
        slab.keys[place] = key
        slab.generations[place] = generation
        slab.nbytes[place] = nbytes
        slab.used_at = used_at
        self._use(slab, place, used_at, _MIRRORED if mirrored or not self._stacked else _OWED)
        self._order(slab, place).append(slot)

    def put_foreign(self, slot: int, used_at: int, *, mirrored: bool) -> None:
        """Keep the slot of another namespace's block, which can only be evicted.

        Nobody here uploads it: it is not spared, but counted.
        """
        slab, place = self.slabs[slot >> SLOT_BITS], slot & SLOT_MASK
        slab.used_at = used_at
        self._use(slab, place, used_at, _MIRRORED if mirrored or not self._stacked else _GIVEN_UP)
        slab.size.clean.append(slot)

    def _use(self, slab: Slab, place: int, used_at: int, state: int) -> None:
        slab.uses[place] = used_at
        slab.states[place] = state
        slab.used += 1
        slab.owed += state == _OWED
        self.bytes_used += slab.size.slot_bytes

    def _order(self, slab: Slab, place: int) -> Order:
        return slab.size.owed if slab.states[place] == _OWED else slab.size.clean

    def clear(self, key: BlockKey, *, mirrored: bool) -> bool:
        """A block is not owed any more: the next tier has it, or has given it up.

        Among the clean ones it is the first to go if it was not used for longest, else the last.

        Returns:
            Whether that is news.
        """
        slot, _, _, used_at = self.block(self.keys[key])
        slab, place = self.slabs[slot >> SLOT_BITS], slot & SLOT_MASK
        state, clean = _MIRRORED if mirrored else _GIVEN_UP, slab.size.clean
        if slab.states[place] >= state:
            return False
        if slab.states[place] == _OWED:
            slab.owed -= 1
            slab.size.owed.remove(slot)
            coldest = clean and used_at < self.used_at(clean.first)
            (clean.prepend if coldest else clean.append)(slot)
        slab.states[place] = state
        return True

    def is_mirrored(self, key: BlockKey) -> bool:
        """Whether the next tier has a block, and has not only given it up."""
        slot = self.keys.get(key)
        return slot is not None and (
            self.slabs[slot >> SLOT_BITS].states[slot & SLOT_MASK] == _MIRRORED
        )

    def count_evicted(self, gone: Sequence[Forgotten], step: int = 1) -> None:
        """Blocks were evicted (1), or are back after all (-1)."""
        self.evictions += step * len(gone)
        self.dropped += step * sum(block.state != _MIRRORED for block in gone)

    def touch(self, slot: int) -> None:
        """A block is used now."""
        self._touch(self.slabs[slot >> SLOT_BITS], slot)

    def _touch(self, slab: Slab, slot: int) -> None:
        place, size = slot & SLOT_MASK, slab.size
        slab.used_at = slab.uses[place] = self.touched[slot] = next(self.clock)
        (size.owed if slab.states[place] == _OWED else size.clean).renew(slot)

    def take_touched(self) -> dict[int, int]:
        """The uses that the index is to be told of now."""
        touched, self.touched = self.touched, {}
        return touched

    def forget(self, slot: int) -> Forgotten:
        """Make a block invisible; its slot is not free yet."""
        slab, place = self.slabs[slot >> SLOT_BITS], slot & SLOT_MASK
        self._order(slab, place).remove(slot)
        key, state = slab.keys[place], slab.states[place]
        slab.used -= 1
        slab.owed -= state == _OWED
        slab.states[place], slab.keys[place] = _UNUSED, None
        self.bytes_used -= slab.size.slot_bytes
        self.touched.pop(slot, None)
        if key is None:
            foreign = slot not in self.unwanted
            self.unwanted.discard(slot)
            return Forgotten(slot, state=state, foreign=foreign)
        self.keys.remove(key)
        return Forgotten(slot, key, slab.uses[place], state)

    def discard(self, slot: int) -> Forgotten:
        """Forget a block that its user has done with.

        Its slab, if empty now, may go first. But not the only one with room for the next store.
        """
        slab, gone = self.slabs[slot >> SLOT_BITS], self.forget(slot)
        if not slab.used and any(other is not slab for other in slab.size.open):
            slab.used_at = 0
        return gone

    def remember(self, gone: Forgotten) -> None:
        """The index still names a block, so its slot is not free: go on with it, used long ago."""
        slot, key, used_at, state, foreign = gone
        slab, place = self.slabs[slot >> SLOT_BITS], slot & SLOT_MASK
        if not foreign and (key is None or key in self.keys):  # stored again meanwhile
            key, state = None, _MIRRORED
            self.unwanted.add(slot)
        slab.used_at = max(slab.used_at, used_at)
        self._use(slab, place, used_at, state)
        self._order(slab, place).prepend(slot)
        if key is not None:
            slab.keys[place] = key
            self.keys.add(key, slot)


def _aim(move: Move, slab: Slab, slot: int, generation: int) -> None:
    place = slot & SLOT_MASK
    move.file = slab.file
    move.offset = place * slab.size.slot_bytes
    move.generation = generation
    move.place = f"slab {slab.id} slot {place}"
    move.slot = slot
