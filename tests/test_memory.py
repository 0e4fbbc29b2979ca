"""Memory of every kind: moved right, or refused with a reason; never a wrong byte.

Caches are checked against numpy's own indexing, which knows nothing of gather lists.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import ctypes
import itertools
import mmap
import subprocess
import sys
import warnings
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import support
from kvgds import (
    BlockCorrupt,
    BusyError,
    Cache,
    ClosedError,
    ConfigError,
    TransferTimeout,
    open_engine,
)
from kvgds.memory import Arena, Claims, cache_of, region_of
from kvgds.memory.copies import bytes_at, copy_pieces
from support import PAGE, Watched, aligned, content, opened, unaligned

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvgds import View

SIZE = 3 * PAGE
MAPPED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

KINDS: dict[str, Callable[[], Any]] = {
    "bytearray": partial(bytearray, SIZE),
    "memoryview": lambda: memoryview(bytearray(SIZE + 7))[3 : SIZE + 3],
    "mmap": lambda: mmap.mmap(-1, SIZE, MAPPED),
    "array": lambda: array.array("d", bytes(SIZE)),
    "ctypes": ctypes.c_uint16 * (SIZE // 2),
    "numpy": lambda: np.zeros((3, PAGE // 2), np.float16),
    "numpy, page-aligned": lambda: aligned(SIZE).reshape(3, -1),
    "numpy, part": lambda: np.zeros((8, PAGE), np.uint8)[2:5],
    "numpy, records": lambda: np.zeros(SIZE // 8, [("a", "i4"), ("b", "f4")]),
    "torch": lambda: torch.zeros(3, PAGE // 4),
    "torch, bfloat16": lambda: torch.zeros(2, 3, PAGE // 4, dtype=torch.bfloat16),
    "torch, part": lambda: torch.zeros(8, PAGE, dtype=torch.uint8)[2:5],
    "torch, of numpy": lambda: torch.from_numpy(aligned(SIZE)),
    "torch, parameter": lambda: torch.nn.Parameter(torch.zeros(SIZE // 4)),
}


def raw(memory: Any) -> bytes:
    """The bytes of any of the above, as its own library says."""
    if isinstance(memory, torch.Tensor):
        return memory.detach().view(torch.uint8).numpy().tobytes()
    return memoryview(memory).tobytes()


def fill(memory: Any, data: bytes) -> None:
    if isinstance(memory, torch.Tensor):
        memory.detach().view(torch.uint8).numpy().reshape(-1)[:] = np.frombuffer(data, np.uint8)
    else:
        np.frombuffer(memory, np.uint8)[:] = np.frombuffer(data, np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("registered", [True, False], ids=["registered", "as it is"])
async def test_every_kind_of_memory(tmp_path: Path, kind: str, *, registered: bool) -> None:
    """Stored from it, loaded into another of its kind, both ways compared by its own library."""
    async with opened(tmp_path / "kv") as engine:
        source, target = KINDS[kind](), KINDS[kind]()
        fill(source, content(kind, SIZE))
        give = engine.register if registered else lambda memory: memory
        assert await engine.store(b"a", give(source))
        assert await engine.load(b"a", give(target))
        assert raw(target) == raw(source) == content(kind, SIZE)


async def test_parts_of_a_region(tmp_path: Path) -> None:
    """Whatever part is loaded into, aligned or not, its surroundings stay as they were."""
    async with opened(tmp_path / "kv") as engine:
        buffer = aligned(4 * PAGE)
        region = engine.register(buffer)
        bounds = (0, 1, 511, 512, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 4 * PAGE)
        for start, stop in itertools.combinations(bounds, 2):
            data = content((start, stop), stop - start)
            key = b"%d-%d" % (start, stop)
            assert await engine.store(key, data)
            buffer[:] = 0xEE
            assert await engine.load(key, region[start:stop])
            expected = np.full(4 * PAGE, 0xEE, np.uint8)
            expected[start:stop] = np.frombuffer(data, np.uint8)
            assert (buffer == expected).all(), (start, stop)


class Bits(ctypes.Structure):
    """Of a format that numpy doesn't know."""

    _fields_ = (("a", ctypes.c_int, 3), ("b", ctypes.c_int, 5))


class Holder(ctypes.Structure):
    """Of a Python object."""

    _fields_ = (("n", ctypes.c_int), ("o", ctypes.py_object))


def fake() -> torch.Tensor:
    """As torch.compile traces with: it says that it is on the host, and has no memory."""
    with FakeTensorMode():
        return torch.zeros(8)


@pytest.mark.parametrize(
    "memory",
    [
        (Bits * 1000)(),
        (ctypes.c_void_p * 500)(),
        (ctypes.c_wchar * 1000)(),
        (ctypes.c_longdouble * 250)(),
        np.zeros(1000, [("O", np.int32)]),
    ],
    ids=["bits", "pointers", "text", "long double", "a field called O"],
)
async def test_memory_of_any_format(tmp_path: Path, memory: Any) -> None:
    """Bytes are bytes."""
    whole = memoryview(memory).cast("B")
    expected = content(b"a", len(whole))
    async with opened(tmp_path / "kv") as engine:
        await engine.store(b"a", expected)
        for each in (memory, engine.register(memory)):
            whole[:] = bytes(len(whole))
            assert await engine.load(b"a", each)
            assert whole == expected


def nested() -> torch.Tensor:
    """A tensor of tensors that differ in length, of the kind that says it is strided."""
    with warnings.catch_warnings(action="ignore"):
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


USELESS: dict[str, Any] = {
    "ctypes, every other": memoryview((ctypes.c_void_p * 8)())[::2],
    "ctypes, objects": (ctypes.py_object * 8)(),
    "ctypes, objects in a structure": (Holder * 8)(),
    "numpy, objects": np.zeros(8, object),
    "numpy, objects in fields": np.zeros(8, [("n", int), ("o", object, (2,))]),
    "torch, fake": fake(),
    "bytearray of nothing": bytearray(),
    "bytes of nothing": b"",
    "numpy, no rows": np.zeros((0, 4)),
    "torch, no columns": torch.zeros(4, 0),
    "numpy, scalar": np.float64(1),
    "numpy, no axes": np.array(1.0),
    "numpy, every other": np.zeros(100)[::2],
    "numpy, transposed": np.zeros((8, 8)).T[1:],
    "numpy, backwards": np.zeros(100)[::-1],
    "numpy, Fortran": np.asfortranarray(np.zeros((4, 4))),
    "numpy, dates": np.zeros(3, "datetime64[s]"),
    "torch, transposed": torch.zeros(8, 8).t(),
    "torch, columns": torch.zeros(8, 8)[:, :3],
    "torch, expanded": torch.zeros(1).expand(5),
    "torch, without memory": torch.zeros(8, device="meta"),
    "torch, sparse": torch.zeros(8).to_sparse(),
    "torch, nested": nested(),
    "torch, conjugated": torch.zeros(4, dtype=torch.complex64).conj(),
    "torch, negated": torch.zeros(1, dtype=torch.complex64).conj().imag,
    "list": [1, 2, 3],
    "text": "text",
    "number": 7,
    "None": None,
}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("kind", USELESS)
async def test_memory_that_can_not_be_used(tmp_path: Path, kind: str) -> None:
    """A ConfigError that says what is wrong, whether it is registered first or not."""
    memory = USELESS[kind]
    async with opened(tmp_path / "kv") as engine:
        await engine.store(b"a", bytes(8))
        with pytest.raises(ConfigError):
            engine.register(memory)
        for act in (engine.store, engine.load):
            with pytest.raises(ConfigError):
                await act(b"a", memory)


@pytest.mark.parametrize(
    "memory",
    [
        b"x" * SIZE,
        memoryview(bytearray(SIZE)).toreadonly(),
        np.frombuffer(b"x" * SIZE, np.uint8),
    ],
    ids=["bytes", "memoryview", "numpy"],
)
async def test_read_only_memory_is_only_stored_from(tmp_path: Path, memory: Any) -> None:
    async with opened(tmp_path / "kv") as engine:
        for each in (memory, engine.register(memory)):
            await engine.store(b"a", each)
            with pytest.raises(ConfigError, match="read-only"):
                await engine.load(b"a", each)
        back = bytearray(SIZE)
        assert await engine.load(b"a", back)
        assert back == bytes(memory)


@pytest.mark.parametrize("part", [slice(0, 0), slice(9, 3), slice(SIZE, None), slice(0, 9, 2)])
async def test_a_part_that_is_none(tmp_path: Path, part: slice) -> None:
    async with opened(tmp_path / "kv") as engine:
        region = engine.register(bytearray(SIZE))
        with pytest.raises(ConfigError, match=r"^index=slice"):
            region[part]


# --- whose memory it is -------------------------------------------------------------------------


def halves(engine: Watched) -> list[tuple[Any, Any, Any]]:
    """Ways to name two overlapping parts and one that touches neither, of one memory."""
    buffer, other = aligned(4 * PAGE), unaligned(4 * PAGE)
    region, second = engine.register(buffer), engine.register(other)
    again = engine.register(buffer)
    return [
        (region[: 2 * PAGE], region[PAGE : 3 * PAGE], region[3 * PAGE :]),
        (second[: 2 * PAGE], second[2 * PAGE - 1 : 4 * PAGE - 1], second[4 * PAGE - 1 :]),
        (region[: 2 * PAGE], again[PAGE : 3 * PAGE], again[3 * PAGE :]),
        (region[: 2 * PAGE], buffer[PAGE : 3 * PAGE], buffer[3 * PAGE :]),
        (other[: 2 * PAGE], other[PAGE : 3 * PAGE], other[3 * PAGE :]),
        (buffer[PAGE : 3 * PAGE], region[: 2 * PAGE], region[3 * PAGE :]),
    ]


async def test_overlapping_memory_has_one_writer(tmp_path: Path) -> None:
    """While a load is in flight, its memory answers BusyError, however it is named."""
    async with opened(tmp_path / "kv") as engine:
        for key, nbytes in ((b"a", 2 * PAGE), (b"b", 2 * PAGE), (b"c", PAGE), (b"d", 1)):
            await engine.store(key, content(key, nbytes))
        for one, two, three in halves(engine):
            engine.held.hold("landing")
            loading = asyncio.ensure_future(engine.load(b"a", one))
            await engine.held.wait_held("landing")
            engine.held.hold("landing", lambda _: False)
            for act in (engine.load, engine.store):
                with pytest.raises(BusyError):
                    await act(b"b", two)
            nbytes = three.nbytes
            assert await engine.load(b"c" if nbytes == PAGE else b"d", three)
            engine.held.release()
            assert await loading
            assert await engine.load(b"b", two)


async def test_overlapping_memory_may_be_read_together(tmp_path: Path) -> None:
    """Several stores from one memory go on at once; a load into it has to wait for them."""
    async with opened(tmp_path / "kv") as engine:
        await engine.store(b"a", bytes(2 * PAGE))
        for number, (one, two, three) in enumerate(halves(engine)):
            engine.held.hold("landing")
            storing = [
                asyncio.ensure_future(engine.store(b"%d %d" % (number, i), each))
                for i, each in enumerate((one, two))
            ]
            await engine.held.wait_held("landing", 2)
            for each in (one, two):
                with pytest.raises(BusyError):
                    await engine.load(b"a", each)
            engine.held.release()
            assert await asyncio.gather(*storing) == [True, True]
            assert await engine.store(b"%d 3" % number, three)


async def test_a_cache_and_other_names_for_its_memory(tmp_path: Path) -> None:
    """Blocks of a cache are claimed as blocks, so its memory can't be used by other names."""
    async with opened(tmp_path / "kv") as engine:
        pool = aligned(8 * PAGE).reshape(4, 2 * PAGE)
        cache = engine.register_cache([pool])
        await engine.store(b"a", bytes(PAGE))
        for refused in (
            lambda: engine.register(pool),
            lambda: engine.register(pool[1]),
            lambda: engine.register_cache([pool[2:]]),
        ):
            with pytest.raises(ConfigError, match="registered"):
                refused()
        with pytest.raises(ConfigError, match=r"registered already: give cache\.block\(i\)"):
            await engine.load(b"a", pool[0, :PAGE])
        await engine.deregister(cache)
        assert await engine.load(b"a", pool[0, :PAGE])
        region = engine.register(pool[1])
        with pytest.raises(ConfigError, match="registered"):
            engine.register_cache([pool])
        await engine.deregister(region)
        engine.register_cache([pool])


async def test_memory_belongs_to_the_engine_that_it_was_registered_with(tmp_path: Path) -> None:
    """Another knows nothing of what is in flight there, nor when it is let go."""
    async with opened(tmp_path / "one") as one, opened(tmp_path / "two") as two:
        region, cache = one.register(aligned(PAGE)), one.register_cache([np.zeros((2, PAGE))])
        for view in (region, region[:8], cache.block(0)):
            for act in (two.store, two.load):
                with pytest.raises(ConfigError, match="register it with this engine"):
                    await act(b"a", view)
        for memory in (region, cache):
            with pytest.raises(ConfigError, match="deregister it there"):
                await two.deregister(memory)
            await one.deregister(memory)


async def test_a_cache_moves_by_the_block_alone(tmp_path: Path) -> None:
    """By address it would be claimed beside its blocks, not against them."""
    async with opened(tmp_path / "kv") as engine:
        cache = engine.register_cache([aligned(8 * PAGE).reshape(8, PAGE)])
        with pytest.raises(ConfigError, match=r"cache.block\(i\)"):
            cache.region[:PAGE]
        with pytest.raises(ConfigError, match=r"cache.block\(i\)"):
            await engine.store(b"a", cache.region)


async def test_memory_that_a_load_has_becomes_no_cache(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv") as engine:
        pool = aligned(8 * PAGE)
        await engine.store(b"a", bytes(PAGE))
        engine.held.hold("landing")
        loading = asyncio.ensure_future(engine.load(b"a", pool[PAGE : 2 * PAGE]))
        await engine.held.wait_held("landing")
        with pytest.raises(BusyError):
            engine.register_cache([pool.reshape(8, PAGE)])
        engine.held.release()
        assert await loading
        engine.register_cache([pool.reshape(8, PAGE)])


async def test_a_part_of_registered_memory_hides_nothing_of_it(tmp_path: Path) -> None:
    """Nor does memory that was registered and has gone."""
    async with opened(tmp_path / "kv") as engine:
        pool = torch.zeros(64 * PAGE, dtype=torch.uint8)
        skip = -pool.data_ptr() % PAGE
        aligned_pool = pool[skip : skip + 60 * PAGE]
        whole = engine.register(aligned_pool)
        inner = engine.register(aligned_pool[16 * PAGE : 24 * PAGE])
        for number, region in enumerate((whole, inner, whole)):
            key = b"%d" % number
            await engine.store(key, region[4 * PAGE : 6 * PAGE])
            await engine.store(key + b"+", whole[40 * PAGE : 44 * PAGE])
            assert await engine.load(key + b"+", whole[40 * PAGE : 44 * PAGE])
        await engine.deregister(inner)
        assert await engine.load(b"0+", whole[40 * PAGE : 44 * PAGE])
        pool.untyped_storage().resize_(0)
        fresh = aligned(96 * PAGE)
        assert await engine.load(b"0+", engine.register(fresh)[40 * PAGE : 44 * PAGE])


async def test_blocks_of_a_cache_are_claimed_one_by_one(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv") as engine:
        cache = engine.register_cache([aligned(8 * PAGE).reshape(4, -1) for _ in range(3)])
        for key in (b"a", b"b"):
            await engine.store(key, bytes(cache.block_bytes))
        engine.held.hold("landing")
        loading = asyncio.ensure_future(engine.load(b"a", cache.block(1)))
        await engine.held.wait_held("landing")
        engine.held.hold("landing", lambda _: False)
        with pytest.raises(BusyError):
            await engine.load(b"b", cache.block(1))
        with pytest.raises(BusyError):
            await engine.deregister(cache)
        assert await engine.load(b"b", cache.block(0))
        assert await engine.load(b"b", cache.block(2))
        engine.held.release()
        assert await loading


async def test_several_blocks_are_claimed_together_or_not_at_all(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv") as engine:
        cache = engine.register_cache([aligned(16 * PAGE).reshape(8, -1) for _ in range(3)])
        await engine.store(b"a", bytes(2 * cache.block_bytes))
        await engine.store(b"b", bytes(cache.block_bytes))
        engine.held.hold("landing")
        loading = asyncio.ensure_future(engine.load(b"a", cache.block(5, 1)))
        await engine.held.wait_held("landing")
        engine.held.hold("landing", lambda _: False)
        for taken in ((1, 0), (0, 1), (2, 3, 5)):
            with pytest.raises(BusyError):
                await engine.store(b"c", cache.block(*taken))
        for free in (0, 2, 3):
            assert await engine.load(b"b", cache.block(free))
        engine.held.release()
        assert await loading
        assert await engine.load(b"a", cache.block(1, 5))


async def test_deregistered_memory_is_refused(tmp_path: Path) -> None:
    """And it is free: its owner may resize or close it."""
    async with opened(tmp_path / "kv") as engine:
        plain, mapped = bytearray(SIZE), mmap.mmap(-1, SIZE, MAPPED)
        regions = [engine.register(plain), engine.register(mapped)]
        for region in regions:
            assert await engine.store(b"%d" % id(region), region)
        with pytest.raises(BufferError):
            plain.append(1)
        with pytest.raises(BufferError):
            mapped.close()
        for region in regions:
            view = region[:PAGE]
            await engine.deregister(region)
            for gone in (region, view):
                with pytest.raises(ClosedError):
                    await engine.store(b"b", gone)
        plain.append(1)
        mapped.close()


@pytest.mark.parametrize("layout", ["slabs", "files"])
async def test_memory_is_free_as_soon_as_a_call_ends(tmp_path: Path, layout: str) -> None:
    """Not a moment later: its owner may resize or close it, though threads know of the call yet."""
    async with opened(tmp_path / "kv", tier={"layout": layout}) as engine:
        for i in range(20):
            memory, mapped = bytearray(SIZE), mmap.mmap(-1, SIZE, MAPPED)
            assert await engine.store(b"%d" % i, memory)
            memory.append(1)
            assert await engine.load(b"%d" % i, mapped)
            mapped.close()
            sharing = [bytearray(SIZE) for _ in range(3)]
            for outcome in await engine.load_many([(b"%d" % i, each) for each in sharing]):
                assert outcome.hit
            for each in sharing:
                each.append(1)
            task = asyncio.ensure_future(engine.store(b"%d-" % i, cancelled := bytearray(SIZE)))
            await support.turns(i)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            cancelled.append(1)
            with contextlib.suppress(TransferTimeout):
                await engine.load(b"%d" % i, late := bytearray(SIZE), timeout_s=1e-9)
            late.append(1)


@pytest.mark.parametrize("layout", ["slabs", "files"])
async def test_a_cache_that_nobody_names_is_free(tmp_path: Path, layout: str) -> None:
    """Though nothing is stored after it: what has to be committed is not kept until then."""
    settings = support.config(tmp_path / "kv", tier={"layout": layout})
    async with open_engine(settings) as engine:  # a watched one keeps what it has seen
        layers = [aligned(4 * PAGE).reshape(4, -1)]
        cache = engine.register_cache(layers)
        assert await engine.store(b"a", cache.block(1))
        gone = weakref.ref(cache.region)
        del cache
        await support.until(lambda: gone() is None)
        assert await engine.store(b"b", engine.register_cache(layers).block(1))


async def test_a_tensor_whose_memory_was_freed_or_moved(tmp_path: Path) -> None:
    """PyTorch can take memory away from under a tensor; that is found out before any I/O."""
    async with opened(tmp_path / "kv") as engine:
        freed, moved, cached = (torch.zeros(SIZE, dtype=torch.uint8) for _ in range(3))
        views: list[Any] = [engine.register(freed), engine.register(moved)]
        views.append(engine.register_cache([cached.view(3, -1)]).block(0))
        assert await engine.store(b"a", views[0])
        for tensor in (freed, cached):
            tensor.untyped_storage().resize_(0)
        moved.data = torch.ones(SIZE, dtype=torch.uint8)
        before = engine.held.submitted
        for view in views:
            for act in (engine.load, engine.store):
                with pytest.raises(ConfigError, match=r"^memory=.*freed or moved"):
                    await act(b"a", view)
        assert engine.held.submitted == before


async def test_memory_that_another_engine_knows(tmp_path: Path) -> None:
    """Neither would see what the other does with it."""
    async with opened(tmp_path / "kv") as engine, opened(tmp_path / "other") as other:
        region = other.register(aligned(SIZE))
        layer = other.register_cache([aligned(SIZE).reshape(1, SIZE)]).block(0)
        for memory in (region, region[:PAGE], layer):
            for act in (engine.load, engine.store):
                with pytest.raises(ConfigError, match=r"^memory=.another engine's"):
                    await act(b"a", memory)


class Counted:
    """A tensor that counts how often it is asked where its memory is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)

    def data_ptr(self) -> int:
        self.asked += 1
        return self.tensor.data_ptr()


async def test_a_cache_of_many_tensors_is_asked_once_for_many_blocks(tmp_path: Path) -> None:
    """Each is asked where its memory is: 160 of them for each block would keep the loop."""
    async with opened(tmp_path / "kv") as engine:
        tensor = Counted(torch.zeros(64, PAGE, dtype=torch.uint8))
        cache = engine.register_cache([tensor])
        tensor.asked = 0
        outcomes = await engine.load_many([(b"%d" % i, cache.block(i)) for i in range(64)])
        assert {outcome.status for outcome in outcomes} == {"miss"}
        assert tensor.asked == 2  # in each turn of the loop
        assert await engine.store(b"a", bytes(PAGE))
        assert not await engine.load_nowait(b"b", bytearray(PAGE))
        assert tensor.asked == 2  # other memory, which does not meet it
        for expected in (3, 4):
            assert not await engine.load_nowait(b"c", cache.block(0))
            assert tensor.asked == expected
        tensor.untyped_storage().resize_(0)
        with pytest.raises(ConfigError, match="freed or moved"):
            await engine.load_nowait(b"c", cache.block(0))


RANGES = st.sets(st.integers(0, 40), min_size=2, max_size=9).map(
    lambda ends: list(zip(sorted(ends)[::2], sorted(ends)[1::2], strict=False))
)


async def test_memory_that_an_observer_takes_away_is_used_no_more(tmp_path: Path) -> None:
    """Who is told of the first block of a call, which is a miss."""
    async with opened(tmp_path / "kv") as engine:
        cache = engine.register_cache([np.zeros((2, PAGE), np.uint8)])
        assert await engine.store(b"1", bytes(PAGE))

        class Taking:
            def settled(self, event: object) -> None:  # noqa: ARG002 - it is not asked
                stop()
                with contextlib.suppress(StopIteration):
                    engine.deregister(cache).send(None)

        stop = engine.observe(Taking())
        first, second = await engine.load_many([(b"%d" % i, cache.block(i)) for i in range(2)])
        assert first.status == "miss"
        assert isinstance(second.error, ClosedError)


@given(RANGES, RANGES)
def test_regions_meet_where_their_bytes_do(
    one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    """Each of several ranges."""
    memory = np.zeros((1, 41), np.uint8)
    a, b = (cache_of([memory[:, i:j] for i, j in each], 0).region for each in (one, other))
    shared = {i for each in one for i in range(*each)} & {i for each in other for i in range(*each)}
    assert a.meets(b) == b.meets(a) == bool(shared)


def test_regions_meet_between_the_elements_of_layers() -> None:
    """Layers side by side, block by block, are one range, and so is what lies between."""
    memory = np.zeros((3, 4, PAGE), np.uint8)
    cache = cache_of([memory[:, 1], memory[:, 0]], 0)
    assert cache.region.meets(region_of(memory[1, 3]))
    assert not cache.region.meets(region_of(memory[2, 2]))


async def test_memory_of_another_size_is_told_by_the_name_of_the_argument(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv") as engine:
        assert await engine.store(b"a", bytes(SIZE))
        with pytest.raises(ConfigError) as caught:
            await engine.load(b"a", memory=bytearray(10))
    assert (caught.value.field, caught.value.value) == ("memory", "10 bytes")


async def test_registered_memory_says_what_it_is(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv") as engine:
        region, fixed = engine.register(bytearray(SIZE)), engine.register(bytes(10))
        cache = engine.register_cache([torch.zeros(3, PAGE) for _ in range(2)])
        assert repr(region) == "<Region: 12,288 bytes, host memory>"
        assert repr(fixed) == "<Region: 10 bytes, host memory, read-only>"
        assert repr(cache) == "<Cache: 3 x 32,768 bytes in 2 layers, host memory>"
        await engine.deregister(cache)
        assert repr(cache) == "<Cache: 3 x 32,768 bytes in 2 layers, host memory, deregistered>"


@pytest.mark.parametrize("left", [0, SIZE // 2])
async def test_a_tensor_that_has_no_memory_any_more(tmp_path: Path, left: int) -> None:
    """As FSDP leaves them: refused, whatever it is handed to."""
    tensor = torch.zeros(SIZE, dtype=torch.uint8)
    tensor.untyped_storage().resize_(left)
    async with opened(tmp_path / "kv") as engine:
        for act in (engine.register, lambda tensor: engine.register_cache([tensor])):
            with pytest.raises(ConfigError, match="freed"):
                act(tensor)
        with pytest.raises(ConfigError, match="freed"):
            await engine.store(b"a", tensor)


async def test_python_objects_are_no_bytes(tmp_path: Path) -> None:
    """A load would overwrite the pointers to them."""
    async with opened(tmp_path / "kv") as engine:
        with pytest.raises(ConfigError, match="objects"):
            engine.register(np.array([None, "x"], dtype=object))


@pytest.mark.parametrize("part", [3, "x", slice(0, 2 * SIZE), slice(0.5, 2.5), slice(2, 2)])
async def test_parts_that_are_none(tmp_path: Path, part: Any) -> None:
    """Neither clamped nor guessed."""
    async with opened(tmp_path / "kv") as engine:
        with pytest.raises(ConfigError, match="slice"):
            engine.register(bytearray(SIZE))[part]


# --- caches -------------------------------------------------------------------------------------

BLOCKS, TOKENS, HEADS, WIDTH = 6, 4, 2, 256  # a block of one layer is 4 KiB of float16, or 8
SHAPE = (TOKENS, HEADS, WIDTH)


def values(*shape: int) -> np.ndarray[Any, np.dtype[np.float16]]:
    """Page-aligned memory of that shape, no two elements near each other alike."""
    nbytes = 2 * int(np.prod(shape))
    memory = aligned(-(-nbytes // PAGE) * PAGE)[:nbytes]
    memory[:] = np.frombuffer(content(shape, nbytes), np.uint8)
    return memory.view(np.float16).reshape(shape)


LAYOUTS: dict[str, tuple[Callable[[], list[Any]], int]] = {
    "K and V in two tensors": (lambda: [values(BLOCKS, *SHAPE) for _ in range(6)], 0),
    "K and V in one tensor, before the blocks": (
        lambda: [values(2, BLOCKS, *SHAPE) for _ in range(3)],
        1,
    ),
    "K and V in one tensor, behind the blocks": (
        lambda: [values(BLOCKS, 2, *SHAPE) for _ in range(3)],
        0,
    ),
    "all layers in one tensor": (lambda: [values(3, 2, BLOCKS, *SHAPE)], 2),
    "layers side by side in each block": (
        lambda: [*np.moveaxis(values(BLOCKS, 3, *SHAPE), 1, 0)],
        0,
    ),
    "layers of different width": (
        lambda: [values(BLOCKS, TOKENS, 512), values(BLOCKS, TOKENS, 1536)],
        0,
    ),
    "heads outside of the blocks": (lambda: [values(HEADS, BLOCKS, TOKENS, WIDTH)], 1),
    "blocks inside of the tokens": (lambda: [values(TOKENS, BLOCKS, HEADS * WIDTH * 4)], 1),
    "unaligned": (lambda: [values(BLOCKS, 1000)[:, 1:501], values(BLOCKS, 3)], 0),
    "counted from the end": (lambda: [values(2, BLOCKS, 4096)], -2),
    "permuted": (lambda: [values(BLOCKS, HEADS, TOKENS, WIDTH).transpose(0, 2, 1, 3)], 0),
    "one element a row": (lambda: [values(5, 3, BLOCKS)], 2),
}


def block_of(layers: list[Any], axis: int, index: int) -> list[np.ndarray[Any, Any]]:
    """A block's part of each layer, by numpy's indexing."""
    return [np.take(np.asarray(layer), index, axis) for layer in layers]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("out", "into"), [((1,), (4,)), ((1, 2, 0), (4, 0, 3))], ids=["one", "several"]
)
async def test_caches_of_every_layout(
    tmp_path: Path, layout: str, out: tuple[int, ...], into: tuple[int, ...]
) -> None:
    """Blocks of one cache are stored as one and loaded into those of another, nowhere else."""
    make, axis = LAYOUTS[layout]
    async with opened(tmp_path / "kv") as engine:
        source, target = make(), make()
        for layer in target:
            layer[...] = np.roll(layer, 1)
        before = [np.array(layer) for layer in target]
        ours, theirs = engine.register_cache(source, axis), engine.register_cache(target, axis)
        assert (ours.blocks, theirs.blocks) == (BLOCKS, BLOCKS)
        whole = sum(part.nbytes for part in block_of(source, axis, 1))
        assert ours.block_bytes == whole
        assert ours.block(*out).nbytes == len(out) * whole
        assert await engine.store(b"a", ours.block(*out))
        assert await engine.load(b"a", theirs.block(*into))
        came = dict(zip(into, out, strict=True))
        for i in range(BLOCKS):
            expected = block_of(source, axis, came[i]) if i in came else block_of(before, axis, i)
            for part, wanted in zip(block_of(target, axis, i), expected, strict=True):
                assert part.tobytes() == wanted.tobytes(), (layout, i)
        with pytest.raises(ConfigError, match="give memory of that size"):
            await engine.load(b"a", theirs.block(0, 1))


async def test_a_cache_of_torch_tensors(tmp_path: Path) -> None:
    """As an LLM server has it: bfloat16, two tensors a layer, all blocks moved at once."""
    async with opened(tmp_path / "kv") as engine:
        pairs = [torch.randn(2, 8, 16, 2, 64).bfloat16() for _ in range(4)]
        layers = [half for pair in pairs for half in pair]
        expected = [layer.clone() for layer in layers]
        cache = engine.register_cache(layers)
        items = [(b"%d" % i, cache.block(i)) for i in range(cache.blocks)]
        assert {outcome.status for outcome in await engine.store_many(items)} == {"stored"}
        for layer in layers:
            layer.zero_()
        mirrored = [(b"%d" % i, cache.block(7 - i)) for i in range(cache.blocks)]
        assert all(outcome.hit for outcome in await engine.load_many(mirrored))
        for layer, wanted in zip(layers, expected, strict=True):
            assert torch.equal(layer.flip(0), wanted)


@pytest.mark.parametrize("number", [np.int8, np.int16, np.uint8, torch.tensor])
@pytest.mark.parametrize("width", [PAGE, PAGE + 8])
async def test_block_numbers_of_other_libraries(tmp_path: Path, number: Any, width: int) -> None:
    """They come from block tables: narrow integers, whose products would wrap around."""
    memory = aligned(100 * width).reshape(100, width)
    memory[:] = np.arange(100)[:, None]
    async with opened(tmp_path / "kv") as engine:
        cache = engine.register_cache([memory])
        for i in (0, 20, 99):
            assert await engine.store(b"%d" % i, cache.block(number(i)))
            back = bytearray(width)
            assert await engine.load(b"%d" % i, back)
            assert set(back) == {i}
        for wrong in (1.5, "3", None):
            with pytest.raises(ConfigError, match="integer"):
                cache.block(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["K and V in two tensors", "unaligned"])
async def test_no_layer_escapes_the_checksum(tmp_path: Path, layout: str) -> None:
    """The first and the last byte of each part of a block, one block a byte."""
    make, axis = LAYOUTS[layout]
    root = tmp_path / "kv"
    async with opened(root) as engine:
        cache = engine.register_cache(make(), axis)
        sizes = [nbytes for _, nbytes in cache.block(0).rows()]
        ends = [0, *itertools.accumulate(sizes)]
        spots = sorted({*ends[:-1], *(end - 1 for end in ends[1:])})
        for at in spots:
            assert await engine.store(b"%d" % at, cache.block(0))
            await asyncio.to_thread(support.spoil, root, b"%d" % at, PAGE + at)
        for at in spots:
            with pytest.raises(BlockCorrupt, match="checksum"):
                await engine.load(b"%d" % at, cache.block(1))


@pytest.mark.parametrize(
    ("layers", "axis", "field"),
    [
        ([], 0, "layers"),
        ([values(4, 8), values(5, 8)], 0, "layers[1]"),
        ([values(4, 8)], 2, "block_axis"),
        ([values(4, 8)], -3, "block_axis"),
        ([values(4, 8)], "0", "block_axis"),
        ([values(4, 8)], 0.0, "block_axis"),
        ([values(4, 8)], None, "block_axis"),
        ([values(4, 8)], True, "block_axis"),
        ([values(4, 8)], np.array([0, 1]), "block_axis"),
        ([np.zeros((0, 8))], 0, "layers[0]"),
        ([torch.zeros(1, 8).expand(4, 8)], 0, "layers[0]"),
        ([torch.zeros(4, 8, device="meta")], 0, "layers[0]"),
        ([torch.zeros(64).as_strided((4, 8), (4, 1))], 0, "layers[0]"),
        (["text"], 0, "layers[0]"),
    ],
)
async def test_caches_that_can_not_be(
    tmp_path: Path, layers: list[Any], axis: Any, field: str
) -> None:
    async with opened(tmp_path / "kv") as engine:
        with pytest.raises(ConfigError) as caught:
            engine.register_cache(layers, axis)
        assert caught.value.field == field


async def test_an_axis_may_be_any_integer(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv") as engine:
        for axis in (np.int8(1), torch.tensor(-1)):
            assert engine.register_cache([values(4, 8)], axis).blocks == 8  # type: ignore[arg-type]


async def test_layers_that_overlap(tmp_path: Path) -> None:
    """The same tensor twice, or two that share some bytes of a block, or of the next one."""
    pool = values(4, 64)
    places = np.lib.stride_tricks.as_strided
    async with opened(tmp_path / "kv") as engine:
        for layers in (
            [places(pool, (4, 8), (32, 2)), places(pool[0, 8:], (4, 8), (48, 2))],
            [pool, pool],
            [pool[:, :40], pool[:, 39:]],
            [pool, pool[1:3]],
            [pool[:3], pool[1:]],
            [pool[:3, :8], places(pool[0, 56:], (3, 16), (128, 2))],
        ):
            with pytest.raises(ConfigError, match=r"overlap|blocks"):
                engine.register_cache(layers)
        cache = engine.register_cache([pool[:, :40], pool[:, 40:]])
        for index in (-1, 4):
            for indices in ((index,), (0, index)):
                with pytest.raises(ConfigError, match="0 to 3"):
                    cache.block(*indices)
        with pytest.raises(ConfigError, match="each block once"):
            cache.block(1, 2, 1)
        with pytest.raises(ConfigError, match=r"cache.block\(7, 8\)"):
            cache.block([1, 2])  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="block"):
            await engine.store(b"a", cache)


@st.composite
def caches(draw: st.DrawFn) -> tuple[list[np.ndarray[Any, Any]], int]:
    """Layers of any shape, order of axes and cut, all in one memory, and the block axis."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    count, blocks = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    axis = draw(st.integers(0, len(shape)))
    shape.insert(axis, blocks)
    order = draw(st.permutations(range(len(shape) + 1)))
    everything = np.arange(count * int(np.prod(shape)), dtype=np.int32)
    whole = everything.reshape([[count, *shape][i] for i in order])
    return [*whole.transpose(np.argsort(order))], axis


@settings(deadline=None, max_examples=300)
@given(caches())
def test_gather_lists_are_what_numpy_says(case: tuple[list[np.ndarray[Any, Any]], int]) -> None:
    """A block's pieces and rows are its elements, each once, in the order they lie in memory."""
    layers, axis = case
    cache: Cache = cache_of(layers, axis)
    seen = []
    for index in range(cache.blocks):
        view = cache.block(index)
        parts = [np.sort(part, axis=None) for part in block_of(layers, axis, index)]
        expected = np.concatenate(parts).tobytes()
        assert gathered(view) == [expected] * 3
        seen += view.rows()
    touched = sorted(seen)
    for (address, nbytes), (following, _) in itertools.pairwise(touched):
        assert address + nbytes <= following
    assert sum(nbytes for _, nbytes in touched) == sum(layer.nbytes for layer in layers)


@settings(deadline=None, max_examples=300)
@given(caches(), st.data())
def test_several_blocks_lie_layer_by_layer(
    case: tuple[list[np.ndarray[Any, Any]], int], data: st.DataObject
) -> None:
    """And what follows each other in memory is one extent."""
    cache = cache_of(*case)
    indices = data.draw(
        st.lists(st.integers(0, cache.blocks - 1), min_size=2, unique=True)
        if cache.blocks > 1
        else st.just([0])
    )
    view = cache.block(*indices)
    extents = list(zip(*(cache.block(i).rows() for i in indices), strict=True))
    expected = b"".join(bytes(bytes_at(*row)) for extent in extents for row in extent)
    assert gathered(view) == [expected] * 3
    assert view.nbytes == len(expected)
    apart = sum(
        1 + sum(address + nbytes != to for (address, nbytes), (to, _) in itertools.pairwise(extent))
        for extent in extents
    )
    assert view.fragments == len(view.rows()) == apart


@settings(deadline=None, max_examples=300)
@given(caches(), st.data())
def test_what_is_copied_into_blocks_goes_nowhere_else(
    case: tuple[list[np.ndarray[Any, Any]], int], data: st.DataObject
) -> None:
    layers, cache = case[0], cache_of(*case)
    numbers = st.lists(st.integers(0, cache.blocks - 1), min_size=1, unique=True)
    view = cache.block(*data.draw(numbers))
    before = [layer.tobytes() for layer in layers]
    turned = bytes(255 - byte for byte in gathered(view)[0])
    view.copy(memoryview(turned), write=False)
    assert gathered(view) == [turned] * 3
    after = [layer.tobytes() for layer in layers]
    pairs = zip(b"".join(before), b"".join(after), strict=True)
    assert sum(one != other for one, other in pairs) == view.nbytes


AMONG_OTHERS = """
import ctypes, mmap
import numpy as np
from kvgds.memory import cache_of

PAGE, LAYER = 4096, 16 * 4096
memory = np.frombuffer(mmap.mmap(-1, 4 * LAYER), np.uint8)
layers = [memory[start : start + LAYER].reshape(16, PAGE) for start in (0, 3 * LAYER)]
payload = memory[LAYER + PAGE : LAYER + 3 * PAGE]
payload[:] = np.arange(2 * PAGE) % 251
wanted = payload.copy()
none_here = memory.ctypes.data + LAYER + 3 * PAGE
protect = ctypes.CDLL(None, use_errno=True).mprotect
assert protect(ctypes.c_void_p(none_here), ctypes.c_size_t(PAGE), 0) == 0
cache = cache_of(layers, 0)
cache.block(5).copy(memoryview(payload), write=False)
assert np.array_equal(np.concatenate([layer[5] for layer in layers]), wanted)
assert not any(layer[i].any() for layer in layers for i in range(16) if i != 5)
payload[:] = 0
cache.block(5).copy(memoryview(payload), write=True)
assert np.array_equal(payload, wanted)
"""


def test_nothing_between_the_layers_of_a_cache_is_touched() -> None:
    """Not even where the payload itself lies there: the process would end for it."""
    done = subprocess.run(
        [sys.executable, "-c", AMONG_OTHERS], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def gathered(view: View) -> list[bytes]:
    """The block's bytes, by each of the ways in which they can be had."""
    rows = b"".join(bytes(bytes_at(address, nbytes)) for address, nbytes in view.rows())
    payload = bytearray(view.nbytes)
    view.copy(memoryview(payload), write=True)
    return [b"".join(map(bytes, view.pieces())), rows, bytes(payload)]


# --- the parts ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(1, 12)), max_size=40))
def test_claims_against_a_list(steps: list[tuple[bool, int, int]]) -> None:
    """Readers share, a writer is alone: compared with looking at every claim there is."""
    claims = Claims()
    held: list[tuple[int, int, bool]] = []
    for step, (write, start, nbytes) in enumerate(steps):
        stop = start + nbytes
        if step % 3 == 2 and held:
            begin, end, how = held.pop(step % len(held))
            claims.remove(begin, end, write=how)
            continue
        free = not any(b < stop and start < e and (how or write) for b, e, how in held)
        if free:
            claims.add(start, stop, write=write)
            held.append((start, stop, write))
        else:
            with pytest.raises(BusyError):
                claims.add(start, stop, write=write)
        assert len(claims) == len(held)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1), st.lists(st.integers(1, 9), min_size=1))
def test_pieces_are_copied_however_they_are_cut(left: list[int], right: list[int]) -> None:
    total = min(sum(left), sum(right))
    data, target = content("pieces", total), bytearray(total)

    def cut(buffer: Any, sizes: list[int]) -> list[memoryview]:
        ends = [*itertools.takewhile(lambda end: end < total, itertools.accumulate(sizes)), total]
        return [memoryview(buffer)[a:b] for a, b in itertools.pairwise([0, *ends])]

    copy_pieces(cut(data, left), cut(target, right))
    assert target == data


def test_an_arena_is_aligned_and_as_big_as_asked() -> None:
    for nbytes in (1, PAGE, 5 * PAGE + 1):
        arena = Arena(nbytes)
        assert arena.span.address % PAGE == 0
        assert arena.span.nbytes == len(arena.bytes) == nbytes
        arena.bytes[-1] = 7
        assert bytes(bytes_at(arena.span.address + nbytes - 1, 1)) == b"\7"
