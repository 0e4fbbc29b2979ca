"""Memory that blocks move in and out of: arenas, registered regions, views of one block.

Owns what is known about an address: how long it is good for, who uses it now, how it is
aligned. A :class:`Region` keeps the caller's buffer alive; a :class:`View` is the gather
list of one block inside it. Everything here runs on the event loop's thread and does no
I/O; :meth:`View.pieces` and :meth:`View.rows` are read by the transport's threads, for
regions that their claims keep open.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
import mmap
import operator
import re
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvgds import contention
from kvgds.blocks import PAGE
from kvgds.errors import BusyError, ClosedError, ConfigError, PathUnavailable
from kvgds.memory.copies import Units, bytes_at, copy_pieces
from kvgds.memory.device import CudaError, cuda

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_HUGE_PAGE = 2 << 20


class Span(NamedTuple):
    """A contiguous range of addresses."""

    address: int
    nbytes: int


class Arena:
    """Page-aligned, pre-touched host memory on huge pages where the kernel gives them.

    Private and anonymous on purpose: a shared mapping gets no huge pages, and on 4 KiB
    pages pinning alone costs a transfer some 70 µs a MiB.
    """

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, nbytes + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            self._map.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(self._map, np.uint8)
        start = -whole.ctypes.data % _HUGE_PAGE
        self.bytes = memoryview(self._map)[start : start + nbytes]
        self.span = Span(whole.ctypes.data + start, nbytes)
        whole[start : start + nbytes : PAGE] = 0


@dataclass(frozen=True, slots=True)
class _Strided:
    """What every array library can say about its memory."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    itemsize: int
    readonly: bool
    owner: Any  # keeps the memory alive, unless it is torch's
    device: int | None = None  # the GPU that it is on
    nbytes: int = field(init=False)  # from the first to behind the last element

    def __post_init__(self) -> None:
        reach = sum(
            (size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)
        )
        object.__setattr__(self, "nbytes", self.itemsize + reach)

    @property
    def movable(self) -> bool:
        """Whether the memory may go while the owner is kept: torch's storages can be resized."""
        return hasattr(self.owner, "untyped_storage")

    @property
    def moved(self) -> bool:
        """Whether torch has freed, moved or cut the memory."""
        tensor = self.owner
        if tensor.data_ptr() != self.address:
            return True
        first, there = tensor.storage_offset() * self.itemsize, tensor.untyped_storage().nbytes()
        return bool(there < first + self.nbytes)


def _describe(buffer: Any, field: str) -> _Strided:  # noqa: ANN401 - any array library's
    if hasattr(buffer, "data_ptr") and hasattr(buffer, "element_size"):
        strided = _describe_torch(buffer, field)
    elif hasattr(buffer, "__cuda_array_interface__"):
        strided = _describe_cuda(buffer)
    else:
        strided = _describe_host(buffer, field)
    if 0 in strided.shape:
        raise ConfigError(field, strided.shape, "is empty; give memory of at least one byte")
    if strided.movable and strided.moved:
        raise ConfigError(field, strided.shape, "its memory was freed; give a tensor that has some")
    if not strided.address:  # torch's fake tensors say that they are on the host
        raise ConfigError(field, strided.shape, "has no memory; give a tensor that is no fake")
    if any(s < 0 for s in strided.strides):
        raise ConfigError(field, strided.strides, "has negative strides; make it contiguous")
    return strided


def _describe_torch(tensor: Any, field: str) -> _Strided:  # noqa: ANN401 - torch is optional
    kind = tensor.device.type
    if kind not in ("cpu", "cuda"):
        rule = f"is on {tensor.device}; copy it to the host first"
        raise ConfigError(field, f"{tensor.dtype} tensor", rule)
    if str(tensor.layout) != "torch.strided" or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise ConfigError(field, kind, "must be a dense tensor")
    if tensor.is_conj() or tensor.is_neg():
        rule = "is conjugated or negated when it is read; give .resolve_conj().resolve_neg()"
        raise ConfigError(field, f"{tensor.dtype} tensor", rule)
    size = tensor.element_size()
    return _Strided(
        address=tensor.data_ptr(),
        shape=tuple(tensor.shape),
        strides=tuple(stride * size for stride in tensor.stride()),
        itemsize=size,
        readonly=False,
        owner=tensor,
        device=tensor.device.index if kind == "cuda" else None,
    )


def _describe_cuda(array: Any) -> _Strided:  # noqa: ANN401 - cupy's, or another's
    told = array.__cuda_array_interface__
    shape, itemsize = tuple(told["shape"]), np.dtype(told["typestr"]).itemsize
    address, readonly = told["data"]
    strides = told.get("strides")
    if strides is None:
        strides = [itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    try:
        device = cuda().device_of(address) if math.prod(shape) else 0
    except CudaError as error:
        raise PathUnavailable(f"GPU memory can't be used now: {error}") from None
    return _Strided(address, shape, tuple(strides), itemsize, bool(readonly), array, device)


def _describe_host(buffer: Any, field: str) -> _Strided:  # noqa: ANN401 - any buffer
    try:
        view = memoryview(buffer)
    except TypeError:
        rule = "must be a torch or numpy array, an mmap, or another object with a buffer"
        raise ConfigError(field, type(buffer).__name__, rule) from None
    except ValueError as error:
        raise ConfigError(field, type(buffer).__name__, f"can't be used: {error}") from None
    if "O" in view.format and "O" in re.sub(":[^:]*:", "", view.format):  # but a field's name
        raise ConfigError(field, type(buffer).__name__, "holds Python objects, not bytes")
    if view.ndim == 0 or view.shape is None or view.strides is None:
        raise ConfigError(field, type(buffer).__name__, "must have at least one axis")
    address = _address(view, field) if view.nbytes else 0
    return _Strided(address, view.shape, view.strides, view.itemsize, view.readonly, view)


def _address(view: memoryview, field: str) -> int:
    if view.c_contiguous:  # as bytes, for numpy knows not all that ctypes has
        return np.frombuffer(view, np.uint8).ctypes.data
    try:
        return np.asarray(view).ctypes.data
    except (TypeError, ValueError) as error:
        raise ConfigError(field, view.format, f"can't be used: {error}") from None


def _contiguous(strided: _Strided) -> bool:
    expected = strided.itemsize
    for size, stride in zip(reversed(strided.shape), reversed(strided.strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


class Claims:
    """Who uses which part of a region now: readers share, a writer is alone.

    All lists are sorted by start. No claim meets a writer's, so only the last of those that begin
    before the end of a range can reach into it. Readers may overlap; they are kept apart by size,
    so that one large claim does not make all small ones near it candidates.
    """

    def __init__(self) -> None:
        self._readers: dict[int, list[tuple[int, int]]] = {}  # by the bits of their size
        self._writers: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return sum(map(len, self._readers.values())) + len(self._writers)

    def add(self, start: int, stop: int, *, write: bool) -> None:
        """Claim ``[start, stop)``; raise BusyError if another's claim forbids it."""
        self.check(start, stop, write=write)
        if write:
            bisect.insort(self._writers, (start, stop))
        else:
            bisect.insort(self._readers.setdefault((stop - start).bit_length(), []), (start, stop))

    def check(self, start: int, stop: int, *, write: bool) -> None:
        """Raise BusyError if another's claim forbids one on ``[start, stop)``."""
        before = bisect.bisect_left(self._writers, (stop,))
        written = before and self._writers[before - 1][1] > start
        if written or (write and self._is_read(start, stop)):
            raise BusyError("this memory has a transfer in flight; await that first")

    def _is_read(self, start: int, stop: int) -> bool:
        for bits, claims in self._readers.items():
            for i in range(bisect.bisect_left(claims, (start - (1 << bits),)), len(claims)):
                begin, end = claims[i]
                if begin >= stop:
                    break
                if end > start:
                    return True
        return False

    def remove(self, start: int, stop: int, *, write: bool) -> None:
        """Give one claim back."""
        bits = (stop - start).bit_length()
        claims = self._writers if write else self._readers[bits]
        del claims[bisect.bisect_left(claims, (start, stop))]
        if not (claims or write):
            del self._readers[bits]


def _joined(spans: Iterable[Span]) -> list[tuple[int, int]]:
    """The same bytes as ranges (start, stop), in order and apart."""
    joined: list[tuple[int, int]] = []
    for start, nbytes in sorted(spans):
        before, end = joined[-1] if joined else (start, -1)
        if start <= end:
            joined[-1] = before, max(end, start + nbytes)
        else:
            joined.append((start, start + nbytes))
    return joined


class Region:
    """Memory that an engine may read and write, kept alive until it is deregistered.

    ``region[start:stop]`` is a view of that many bytes; the region itself stands for all
    of it. Page-aligned views move without a copy, others through the bounce region.

    Attributes:
        spans: the address ranges.
        nbytes: bytes of all spans.
        zero_copy: whether transfers may touch this memory directly; not if it is lent for one call.
        device: the GPU that it lies in; None: host memory.
        readonly: whether it may only be stored from.
    """

    def __init__(
        self, arrays: Sequence[_Strided], claims: Claims | None, *, zero_copy: bool
    ) -> None:
        self.spans = tuple(Span(array.address, array.nbytes) for array in arrays)
        self._joined = _joined(self.spans)
        self.nbytes = sum(span.nbytes for span in self.spans)
        self.readonly = any(array.readonly for array in arrays)
        self.zero_copy = zero_copy
        self.device = arrays[0].device
        self.claims = Claims() if claims is None else claims
        self._paged = claims is None  # its views claim blocks, by their numbers
        self.territory: Territory | None = None  # whose claims are heeded
        self.uses = 0  # of its views, now
        self.closed = False
        self._arrays = arrays
        self._movable = [array for array in arrays if array.movable]
        # Addresses in GPU memory mean nothing to the host.
        self.maps = tuple(bytes_at(*span) for span in self.spans if self.device is None)

    def __repr__(self) -> str:
        return f"<Region: {self.nbytes:,} bytes, {self._about()}>"

    def _about(self) -> str:
        """Which memory it is and what may be done with it, for people."""
        parts = ["host memory" if self.device is None else f"GPU {self.device}"]
        parts += ["read-only"] if self.readonly else []
        parts += ["deregistered"] if self.closed else []
        return ", ".join(parts)

    def __getitem__(self, part: slice) -> View:
        if self._paged:
            raise ConfigError("memory", "a cache's", "moves by the block: cache.block(i)")
        try:
            start, stop, step = part.indices(self.nbytes)
            within = part.stop is None or part.stop <= self.nbytes
        except (AttributeError, TypeError):
            raise ConfigError("index", part, "must be a slice: region[start:stop]") from None
        if step != 1 or start >= stop or not within:
            rule = f"must be a non-empty slice within {self.nbytes} bytes"
            raise ConfigError("index", part, rule)
        base = self.spans[0].address
        return FlatView(self, ((base + start, base + stop),), stop - start)

    def check(self) -> None:
        """Raise unless the memory is still what was registered."""
        if self.closed:
            raise ClosedError("this memory was deregistered; register it again")
        if not self.live:
            rule = "its memory was freed or moved; register it again"
            raise ConfigError("memory", "tensor", rule)

    @property
    def live(self) -> bool:
        """Whether it still stands for memory."""
        if self._movable and any(array.moved for array in self._movable):
            return False
        return not self.closed

    def meets(self, other: Region) -> bool:
        """Whether they share a byte, or one lies between two elements of the other."""
        few, many = sorted((self._joined, other._joined), key=len)
        for start, stop in few:
            i = bisect.bisect_right(many, start, key=operator.itemgetter(1))
            if i < len(many) and many[i][0] < stop:
                return True
        return False

    def retire(self) -> None:
        """Take no more transfers; raise BusyError while one uses the memory."""
        if self.uses:
            raise BusyError("this memory has transfers in flight; await them first")
        self.closed = True

    def release(self) -> None:
        """Let go of the memory, once nothing names it any more."""
        self._arrays = ()
        self._movable = []
        self.maps = ()


class View:
    """One block's memory: a gather list over a region. Cheap; made anew for each call."""

    __slots__ = ("_ranges", "nbytes", "region")

    def __init__(self, region: Region, ranges: Sequence[tuple[int, int]], nbytes: int) -> None:
        self.region = region
        self.nbytes = nbytes
        self._ranges = ranges  # what it claims: addresses, or in a cache, blocks

    def copy(self, payload: memoryview, *, write: bool) -> None:
        """Copy the host's memory into a payload of as many bytes (``write``), or out of it."""
        pieces, whole = self.pieces(), [payload]
        copy_pieces(*((pieces, whole) if write else (whole, pieces)))

    def pieces(self) -> list[memoryview]:
        """The extents' bytes, in order."""
        raise NotImplementedError

    def rows(self) -> list[tuple[int, int]]:
        """The extents in order, each its address and bytes."""
        raise NotImplementedError

    @property
    def alignment(self) -> int:
        """Largest power of two, up to a page, that divides every address and length."""
        raise NotImplementedError

    @property
    def fragments(self) -> int:
        """How many extents it has."""
        raise NotImplementedError

    def claim(self, *, write: bool) -> None:
        """Mark the memory as used by a transfer; raise BusyError if it already is."""
        claims, claimed = self.region.claims, 0
        try:
            for start, stop in self._ranges:
                claims.add(start, stop, write=write)
                claimed += 1
        except BusyError:
            for start, stop in self._ranges[:claimed]:
                claims.remove(start, stop, write=write)
            raise
        self.region.uses += 1

    def release(self, *, write: bool) -> None:
        """Take the mark back."""
        for start, stop in self._ranges:
            self.region.claims.remove(start, stop, write=write)
        self.region.uses -= 1
        if not (self.region.zero_copy or self.region.uses):
            self.region.release()  # it was lent; whoever looks at the view a moment longer


class FlatView(View):
    """One extent."""

    __slots__ = ()
    fragments = 1

    def pieces(self) -> list[memoryview]:
        """See ``View``."""
        start = self._ranges[0][0] - self.region.spans[0].address
        return [self.region.maps[0][start : start + self.nbytes]]

    def rows(self) -> list[tuple[int, int]]:
        """See ``View``."""
        return [(self._ranges[0][0], self.nbytes)]

    @property
    def alignment(self) -> int:
        """See ``View``."""
        merged = self._ranges[0][0] | self.nbytes | PAGE
        return merged & -merged


def _alignment(*numbers: int) -> int:
    merged = PAGE
    for number in numbers:
        merged |= number
    return merged & -merged


@dataclass(frozen=True, slots=True)
class _Layer:
    """Where one tensor keeps block ``i``: ``nbytes`` at each ``offset + i * step``."""

    offsets: tuple[int, ...]
    nbytes: int
    step: int
    blocks: int


class Cache:
    """A paged KV cache: layers of blocks. ``cache.block(i)`` gathers block ``i`` of every layer.

    ``cache.block(i, j)`` makes one of several: what has one key may be larger than a page.

    Attributes:
        blocks: how many blocks there are.
        block_bytes: payload of one block, over all layers.
    """

    def __init__(self, region: Region, layers: Sequence[_Layer]) -> None:
        self.region = region
        self.blocks = layers[0].blocks
        self.block_bytes = sum(layer.nbytes * len(layer.offsets) for layer in layers)
        self._extents = [
            (memory, offset, layer.step, layer.nbytes)
            for memory, layer in zip(region.maps, layers, strict=region.device is None)
            for offset in layer.offsets
        ]
        self._bases = [
            (span.address + offset, layer.step, layer.nbytes)
            for span, layer in zip(region.spans, layers, strict=True)
            for offset in layer.offsets
        ]
        self.alignment = _alignment(*itertools.chain.from_iterable(self._bases))
        self._dense = sum(step == nbytes for _, step, nbytes in self._bases)
        on_host = region.device is None
        self._units = Units.of(self._bases, self.blocks, self.alignment) if on_host else None

    def __repr__(self) -> str:
        size = f"{self.blocks:,} x {self.block_bytes:,} bytes in {len(self.region.spans)} layers"
        return f"<Cache: {size}, {self.region._about()}>"  # noqa: SLF001 - one module

    def block(self, index: int, *more: int) -> View:
        """The view of a block; with ``more``, of all of these as one, in this order.

        Those lie in it layer by layer, so that neighbours are one extent. Load it into as many.

        Raises:
            ConfigError: there is no such block, or one is named twice.
        """
        index = self._number(index)
        if not more:
            return PagedView(self, (index,), ((index, index + 1),))
        indices = [index, *map(self._number, more)]
        if len(set(indices)) < len(indices):
            raise ConfigError("block", indices, "must name each block once")
        return PagedView(self, indices, _runs(indices))

    def _number(self, index: int) -> int:
        try:
            index = operator.index(index)  # a narrow integer of numpy or torch would overflow
        except TypeError:
            rule = "must be an integer, or several: cache.block(7, 8)"
            raise ConfigError("block", index, rule) from None
        if not 0 <= index < self.blocks:
            raise ConfigError("block", index, f"must be 0 to {self.blocks - 1}")
        return index


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of numbers that follow each other: their starts and stops."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1] = runs[-1][0], index + 1
        else:
            runs.append((index, index + 1))
    return runs


class PagedView(View):
    """Some blocks of a cache, layer by layer."""

    __slots__ = ("_blocks", "_cache")

    def __init__(
        self, cache: Cache, blocks: Sequence[int], runs: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__(cache.region, runs, len(blocks) * cache.block_bytes)
        self._cache = cache
        self._blocks = blocks

    def copy(self, payload: memoryview, *, write: bool) -> None:
        """See ``View``."""
        units = self._cache._units  # noqa: SLF001 - one class in two parts
        if units is None or contention.busy():  # numpy gives up the interpreter lock
            super().copy(payload, write=write)
        else:
            units.copy(self._blocks, payload, write=write)

    def pieces(self) -> list[memoryview]:
        """See ``View``."""
        extents = self._cache._extents  # noqa: SLF001 - see copy
        if len(self._blocks) == 1:  # as nearly always, and quicker
            i = self._blocks[0]
            return [m[at + i * step : at + i * step + n] for m, at, step, n in extents]
        return [m[at : at + n] for m, *layer in extents for at, n in self._places(*layer)]

    def rows(self) -> list[tuple[int, int]]:
        """See ``View``."""
        bases = self._cache._bases  # noqa: SLF001 - see copy
        if len(self._blocks) == 1:  # see pieces
            i = self._blocks[0]
            return [(at + i * step, n) for at, step, n in bases]
        return [row for layer in bases for row in self._places(*layer)]

    def _places(self, base: int, step: int, nbytes: int) -> Iterator[tuple[int, int]]:
        for start, stop in self._ranges:
            if step == nbytes:
                yield base + start * step, (stop - start) * step
            else:
                yield from ((base + i * step, nbytes) for i in range(start, stop))

    @property
    def alignment(self) -> int:
        """See ``View``."""
        return self._cache.alignment

    @property
    def fragments(self) -> int:
        """See ``View``."""
        dense, every = self._cache._dense, len(self._cache._bases)  # noqa: SLF001 - see copy
        return dense * len(self._ranges) + (every - dense) * len(self._blocks)


class Territory:
    """All the memory that one engine was given, so that two names for one byte don't clash.

    Flat memory is claimed by address, however often it was registered. A block of a cache is
    claimed by its number, because it lies in hundreds of places; so the memory of a cache may
    have no other name.
    """

    def __init__(self) -> None:
        self._claims = Claims()
        self._flat: weakref.WeakSet[Region] = weakref.WeakSet()
        self._paged: weakref.WeakSet[Region] = weakref.WeakSet()

    def check(self, region: Region) -> None:
        """Raise unless the memory is still what was registered, and here."""
        if region.territory is not self:
            raise ConfigError("memory", "another engine's", "register it with this engine")
        region.check()

    def register(self, buffer: object) -> Region:
        """A region over one contiguous buffer; see :func:`region_of`."""
        region = self._here(region_of(buffer, self._claims))
        _check_apart("buffer", region, self._paged)
        if region.device is not None:  # cuFile knows an address once, and forgets it once
            there = [each for each in self._flat if each.live and each.device is not None]
            for other in there:
                if other.spans == region.spans:
                    return other
            _check_apart("buffer", region, there)
        self._flat.add(region)
        return region

    def register_cache(self, layers: Sequence[object], block_axis: int) -> Cache:
        """A paged cache; see :func:`cache_of`."""
        cache = cache_of(layers, block_axis)
        self._here(cache.region)
        _check_apart("layers", cache.region, (*self._flat, *self._paged))
        for start, nbytes in cache.region.spans:  # some of it may be lent for one operation
            self._claims.check(start, start + nbytes, write=True)
        self._paged.add(cache.region)
        return cache

    def _here(self, region: Region) -> Region:
        region.territory = self
        return region

    def borrow(self, buffer: object) -> Region:
        """A region for one operation on memory that nobody registered."""
        region = self._here(region_of(buffer, self._claims, zero_copy=False))
        _check_apart("memory", region, self._paged)
        return region


def _check_apart(field: str, region: Region, others: Iterable[Region]) -> None:
    for other in others:
        if region.meets(other) and other.live:
            rule = "is registered already: give cache.block(i), or region[a:b], or deregister it"
            raise ConfigError(field, f"{region.nbytes:,} bytes", rule)


def region_of(buffer: object, claims: Claims | None = None, *, zero_copy: bool = True) -> Region:
    """A region over one contiguous buffer.

    Raises:
        ConfigError: empty or non-contiguous memory, or no buffer at all.
    """
    strided = _describe(buffer, "buffer")
    if not _contiguous(strided):
        rule = "must be contiguous; pass a contiguous copy of it, or a cache to register_cache"
        raise ConfigError("buffer", strided.shape, rule)
    return Region([strided], Claims() if claims is None else claims, zero_copy=zero_copy)


def cache_of(layers: Sequence[object], block_axis: int) -> Cache:
    """A paged cache over per-layer tensors with the blocks along ``block_axis``.

    Raises:
        ConfigError: no layers, differing numbers of blocks, overlapping memory or no such axis.
    """
    if not layers:
        raise ConfigError("layers", [], "must hold at least one tensor")
    axis = _axis(block_axis)
    arrays = [_describe(layer, f"layers[{i}]") for i, layer in enumerate(layers)]
    geometry = [_layer(array, axis, f"layers[{i}]") for i, array in enumerate(arrays)]
    for i, layer in enumerate(geometry):
        if layer.blocks != geometry[0].blocks:
            rule = f"must have as many blocks as layers[0], {geometry[0].blocks}"
            raise ConfigError(f"layers[{i}]", layer.blocks, rule)
    _check_disjoint(arrays, geometry)
    if len({array.device for array in arrays}) > 1:
        raise ConfigError("layers", "tensors", "must all be on one device; register one cache each")
    return Cache(Region(arrays, None, zero_copy=True), geometry)


def _axis(block_axis: object) -> int:
    try:
        if not isinstance(block_axis, bool):  # True is meant as an answer, not as axis 1
            return operator.index(block_axis)  # type: ignore[arg-type]  # it is what is asked
    except TypeError:
        pass
    raise ConfigError("block_axis", block_axis, "must be an integer")


def _layer(array: _Strided, block_axis: int, field: str) -> _Layer:
    axes = len(array.shape)
    if not -axes <= block_axis < axes:
        raise ConfigError("block_axis", block_axis, f"must be an axis of {field}, {array.shape}")
    dims = list(zip(array.strides, array.shape, strict=True))
    step, blocks = dims.pop(block_axis % axes)
    reach = array.itemsize
    for stride, size in sorted([*dims, (step, blocks)]):
        if size > 1 and stride < reach:
            raise ConfigError(field, array.strides, "overlaps itself; give dense memory")
        reach += (size - 1) * stride
    run, dims = array.itemsize, sorted((d for d in dims if d[1] > 1), reverse=True)
    while dims and dims[-1][0] == run:
        run *= dims.pop()[1]
    offsets = [0]
    for stride, size in dims:
        offsets = [offset + i * stride for offset in offsets for i in range(size)]
    return _Layer(tuple(offsets), run, step, blocks)


def _check_disjoint(arrays: Sequence[_Strided], layers: Sequence[_Layer]) -> None:
    runs = sorted(
        (array.address + offset, i)
        for i, (array, layer) in enumerate(zip(arrays, layers, strict=True))
        for offset in layer.offsets
    )
    for band in _bands(runs, layers):
        if len(band) > 1 and not _interleaved(band, layers):
            low, high = min(i for _, i in band), max(i for _, i in band)
            raise ConfigError(f"layers[{high}]", "tensor", f"overlaps layers[{low}]")


def _bands(
    runs: Sequence[tuple[int, int]], layers: Sequence[_Layer]
) -> Iterator[list[tuple[int, int]]]:
    """Group runs, each one extent of every block of a layer, whose ranges meet."""
    band: list[tuple[int, int]] = []
    end = 0
    for start, i in runs:
        if band and start >= end:
            yield band
            band = []
        band.append((start, i))
        end = max(end, start + (layers[i].blocks - 1) * layers[i].step + layers[i].nbytes)
    yield band


def _interleaved(band: Sequence[tuple[int, int]], layers: Sequence[_Layer]) -> bool:
    """Whether runs whose ranges meet share no byte: of one step, side by side in each."""
    first, i = band[0]
    step = layers[i].step
    if layers[i].blocks == 1 or any(layers[i].step != step for _, i in band):
        return False
    parts = sorted(((start - first) % step, layers[i].nbytes) for start, i in band)
    ends = [*(start for start, _ in parts[1:]), parts[0][0] + step]
    return all(start + n <= end for (start, n), end in zip(parts, ends, strict=True))
