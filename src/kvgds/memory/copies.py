"""Copies within the host's memory, between gather lists of any cut."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_HELD_BYTES = 4 << 20
_WRITABLE = 0x200  # PyBUF_WRITE
_MOST_UNITS = 16  # of a piece: in more, smaller ones, it is copied no faster than by itself

# An array of ctypes would need a class for each size: slow to make, and left to the collector.
_view_of = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_view_of.restype = ctypes.py_object


def bytes_at(address: int, nbytes: int) -> memoryview:
    """The bytes at an address. Whoever calls this keeps the memory alive."""
    view: memoryview = _view_of(address, nbytes, _WRITABLE)
    return view


def _overlaps(
    source: Sequence[int], target: Sequence[int]
) -> Iterator[tuple[int, int, int, int, int]]:
    """Walk two gather lists of the same total, given their sizes, however they are cut.

    What both have in one piece: number and offset in the source, in the target, and bytes.
    """
    j = filled = 0
    for i, size in enumerate(source):
        done = 0
        while done < size:
            if filled == target[j]:
                j, filled = j + 1, 0
                continue
            n = min(size - done, target[j] - filled)
            yield i, done, j, filled, n
            done, filled = done + n, filled + n


def copy_pieces(source: Sequence[memoryview], target: Sequence[memoryview]) -> None:
    """Copy between two gather lists of the same total length, however they are cut."""
    for i, a, j, b, n in _overlaps([*map(len, source)], [*map(len, target)]):
        if n < _HELD_BYTES:
            target[j][b : b + n] = source[i][a : a + n]
        else:  # numpy gives up the interpreter lock, which a long copy must not keep
            np.copyto(
                np.frombuffer(target[j], np.uint8, n, b), np.frombuffer(source[i], np.uint8, n, a)
            )


def pairs(
    source: Sequence[tuple[int, int]], target: Sequence[tuple[int, int]]
) -> list[tuple[int, int, int]]:
    """Copies (to, from, bytes) between two gather lists of (address, bytes) of the same total."""
    sizes = ([n for _, n in source], [n for _, n in target])
    return [(target[j][0] + b, source[i][0] + a, n) for i, a, j, b, n in _overlaps(*sizes)]


class Units:
    """A paged cache as one array of equal units, so that numpy copies all of a block at once.

    To ask for a copy of 4 KiB takes Python twice as long as the copy. What lies between the
    cache's layers, other memory or none, is part of the array. So all that may be done with it is
    to take and to assign elements: where arrays share memory, numpy then copies what it assigns,
    or its numbers, but it would copy this one, and all of it back, in ``put``.
    """

    def __init__(
        self, starts: Sequence[int], step: int, nbytes: int, blocks: int, unit: int
    ) -> None:
        first = min(starts)
        span = max(starts) - first + (blocks - 1) * step + nbytes
        self._unit = np.dtype((np.void, unit))
        self._memory = np.frombuffer(bytes_at(first, span), self._unit)
        layers = (np.array(starts, np.uint64) - np.uint64(first)).astype(np.intp) // unit
        self._places = layers[:, None, None] + np.arange(nbytes // unit)
        self._step = step // unit

    @classmethod
    def of(
        cls, pieces: Sequence[tuple[int, int, int]], blocks: int, alignment: int
    ) -> Units | None:
        """Of a cache whose block ``i`` lies at each ``address + i * step``, ``nbytes`` long.

        None: its pieces are not alike, or of too many units. ``alignment`` divides all of them.
        """
        starts, steps, sizes = zip(*pieces, strict=True)
        if len({*steps}) > 1 or len({*sizes}) > 1 or sizes[0] > _MOST_UNITS * alignment:
            return None
        return cls(starts, steps[0], sizes[0], blocks, alignment)

    def copy(self, blocks: Sequence[int], payload: memoryview, *, write: bool) -> None:
        """Copy blocks into a payload (``write``) or out of it, layer by layer."""
        numbers = np.array(blocks, np.intp)[:, None] * self._step
        places = (self._places + numbers).ravel()
        units = np.frombuffer(payload, self._unit)
        if write:
            np.take(self._memory, places, 0, units, mode="clip")  # "raise" copies `out`
        else:
            self._memory[places] = units
