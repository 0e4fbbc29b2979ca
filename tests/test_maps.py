"""The containers of the map of slots, against Python's own."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvgds.tiers.maps import KeyMap, KeyQueue, Links, Order, column
from kvgds.tiers.slots import Block, Slab, Slots
from kvgds.tiers.space import SLOT_BITS, slab_name
from kvgds.transport import File

if TYPE_CHECKING:
    from pathlib import Path

MOST = 8  # keys of a queue
SLABS, PLACES = 3, 4
SLOTS = [slab << SLOT_BITS | place for slab in range(SLABS) for place in range(PLACES)]


@given(st.lists(st.tuples(st.sampled_from(["append", "prepend", "other", "renew"]), st.integers())))
def test_an_order_is_a_list(steps: list[tuple[str, int]]) -> None:
    """Two orders over the same slots; a slot is in one of them or in none."""
    links = {slab: Links(column(PLACES), column(PLACES)) for slab in range(SLABS)}
    order, other = Order(links), Order(links)
    model: list[int] = []
    others: list[int] = []
    for step, number in steps:
        slot = SLOTS[number % len(SLOTS)]
        was = slot in model
        if step == "renew" and was:
            order.renew(slot)
            model.remove(slot)
            model.append(slot)
        elif was:
            order.remove(slot)
            model.remove(slot)
        elif slot in others:
            other.remove(slot)
            others.remove(slot)
        elif step == "append":
            order.append(slot)
            model.append(slot)
        elif step == "prepend":
            order.prepend(slot)
            model.insert(0, slot)
        else:
            other.append(slot)
            others.append(slot)
        assert (list(order), len(order), bool(order)) == (model, len(model), bool(model))
        assert list(other) == others
        if model:
            assert (order.first, order.last) == (model[0], model[-1])


@given(st.lists(st.tuples(st.binary(max_size=2), st.booleans())))
def test_a_map_of_keys_is_a_dict(steps: list[tuple[bytes, bool]]) -> None:
    keys, model = KeyMap[bytes](), dict[bytes, int]()
    for number, (key, adds) in enumerate(steps):
        if key in model and not adds:
            keys.remove(key)
            del model[key]
        elif key not in model and adds:
            keys.add(key, number)
            model[key] = number
        assert (key in keys) == (key in model)
        assert keys.get(key) == model.get(key)
        assert len(keys) == len(model)
    assert {key: keys[key] for key in model} == model


@given(st.lists(st.tuples(st.binary(max_size=2), st.booleans())))
def test_a_queue_of_keys_is_an_ordered_dict(steps: list[tuple[bytes, bool]]) -> None:
    queue, model = KeyQueue[bytes, int](), dict[bytes, int]()
    for number, (key, adds) in enumerate(steps):
        if adds:
            queue.append(key, number)
            model.pop(key, None)
            model[key] = number
        elif key in model:
            assert queue.pop(key) == model.pop(key)
        gone = [model.pop(oldest) for oldest in list(model)[:-MOST]]
        assert queue.keep(MOST) == gone
        assert (key in queue) == (key in model)
        assert queue.get(key) == model.get(key)
        assert (list(queue), len(queue)) == (list(model), len(model))
    assert [queue.pop(key) for key in model] == list(model.values())
    assert (list(queue), len(queue)) == ([], 0)


def test_a_long_queue_of_keys_moves_few_at_once() -> None:
    """Whatever comes or leaves: a single dict would now and then copy itself whole."""
    queue, most = KeyQueue[bytes, int](), 0
    keys = [b"%d" % number for number in range(30_000)]
    tracemalloc.start()
    try:
        for key in (*keys, *reversed(keys)):  # the second time each is there
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            queue.append(key, 1)
            most = max(most, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    assert most < 100_000  # of 30,000 keys in one dict: some 2,000,000
    assert list(queue) == keys[::-1]


def test_a_queue_of_keys_that_few_are_left_of_is_small() -> None:
    """Those that nobody takes, from among very many that came and went."""
    queue = KeyQueue[bytes, int]()
    keys = [b"%d" % number for number in range(65 * 1024)]
    tracemalloc.start()
    try:
        for key in keys:
            queue.append(key, 1)
        for number in range(64 * 1024):
            if number % 1024:
                queue.pop(keys[number])
        assert list(queue) == [*keys[: 64 * 1024 : 1024], *keys[64 * 1024 :]]
        before = tracemalloc.get_traced_memory()[0]
        for key in keys[: 64 * 1024 : 1024]:
            queue.pop(key)
        assert before - tracemalloc.get_traced_memory()[0] < 64 * 1000  # else 64 * 37,000
    finally:
        tracemalloc.stop()
    assert list(queue) == keys[64 * 1024 :]


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="there each dict is followed")
def test_the_collector_follows_no_block(tmp_path: Path) -> None:
    """A full run of it takes as long with a million blocks as with none."""
    slots, count = Slots(stacked=False), 5000
    size = slots.size_class(8192)
    slab = Slab(0, count, tmp_path / slab_name(0, 8192), File(0), size)
    slots.add_slab(slab)
    before = followed()
    for slot in slab.places():
        slots.put(b"%d" % slot, Block(slot, slot, 4096, slot), mirrored=False)
    for slot in slab.places():
        slots.touch(slot)
    slots.take_touched()
    assert followed() < before + 100


def followed() -> int:
    """How many references the collector looks at."""
    gc.collect()
    return sum(len(gc.get_referents(each)) for each in gc.get_objects())
