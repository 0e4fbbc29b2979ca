"""What holds of checksums made on a GPU, or by its kernels: they are xxhash's, of any blocks.

Subclass the contract beside a fixture `start` (of the module: hypothesis asks for many) and run it.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgds.memory.kernels import SHORTEST, Kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

KIB, MIB = 1024, 1 << 20
EDGES = [
    *(241, 255, 256, 257, 271, 272, 511, 512, 513, 1007, 1008, 1009, 1023, 1024, 1025, 1039, 1040),
    *(k * KIB + d for k in (2, 3, 4, 31, 32, 33, 34, 64, 65, 66, 128) for d in (-64, -16, -1)),
    *(k * KIB + d for k in (2, 3, 4, 31, 32, 33, 34, 64, 65, 66, 128) for d in (0, 1, 16, 63, 64)),
    *(4096 * k for k in (5, 7, 81)),
    *(2 * MIB - 64, 2 * MIB, 2 * MIB + 64),
]

Gather = list[tuple[int, int]]


class Memory:
    """Blocks of random bytes, cut up and scattered over one array in any order, with gaps."""

    def __init__(self, seed: int, blocks: Sequence[Sequence[int]], shift: int = 0) -> None:
        rng = random.Random(seed)
        cuts = [(i, j, n) for i, block in enumerate(blocks) for j, n in enumerate(block)]
        rng.shuffle(cuts)
        places, end = {}, 0
        for i, j, n in cuts:
            places[i, j] = end
            end += -(-n // 16) * 16 + 16 * rng.randrange(1, 4)
        self.words = aligned((end + shift) // 8 + 2)
        self.bytes = self.words.view(np.uint8)
        self.bytes[:] = np.frombuffer(rng.randbytes(self.bytes.size), np.uint8)
        self.offsets = [
            [(places[i, j] + shift, n) for j, n in enumerate(block)]
            for i, block in enumerate(blocks)
        ]

    def gathers(self, base: int) -> list[Gather]:
        """Where the blocks lie in an array at this address; what is empty lies anywhere."""
        return [[(base + o if n else o, n) for o, n in block] for block in self.offsets]

    def expected(self) -> list[bytes]:
        return [
            xxhash.xxh3_128_digest(b"".join(self.bytes[o : o + n].tobytes() for o, n in block))
            for block in self.offsets
        ]


def aligned(words: int, fill: int = 0) -> NDArray[np.uint64]:
    whole = np.full(words + 2, fill, np.uint64)
    start = -whole.ctypes.data % 16 // 8
    return whole[start : start + words]


def cut(rng: random.Random, nbytes: int, unit: int, most: int) -> list[int]:
    """Lengths that add up to nbytes; all but the last are multiples of unit."""
    lengths: list[int] = []
    while nbytes:
        n = min(nbytes, unit * rng.randrange(1, max(2, most // unit + 1)))
        lengths.append(n)
        nbytes -= n
    return lengths


def check(start: Start, memories: dict[int, Memory]) -> None:
    """All are started before the first is read."""
    started = {key: start(memory) for key, memory in memories.items()}
    expected = {key: memory.expected() for key, memory in memories.items()}
    assert expected == {key: read() for key, read in started.items()}


class Start(Protocol):
    """Starts on the blocks of a memory as it is now; what it returns waits and reads."""

    def __call__(self, memory: Memory, /) -> Callable[[], list[bytes]]: ...


class OnGpu:
    """On a GPU, real or simulated, with a copy of the memory."""

    def __init__(self, cupy: Any) -> None:
        self.cupy, self.kernels = cupy, Kernels(0)
        self.stream = cupy.cuda.Stream(non_blocking=True)

    def __call__(self, memory: Memory, /) -> Callable[[], list[bytes]]:
        with self.stream:
            copy = self.cupy.asarray(memory.bytes)
        digests = self.kernels.checksums(memory.gathers(copy.data.ptr), self.stream.ptr)

        def read() -> list[bytes]:
            digests.event.synchronize()
            assert copy.nbytes == memory.bytes.nbytes  # and so it lived until here
            return digests.read()

        return read


class ChecksumContract:
    """Digests of blocks in any memory."""

    def test_every_edge(self, start: Start) -> None:
        check(start, {n: Memory(n, [[n]]) for n in EDGES})

    def test_every_edge_in_shreds(self, start: Start) -> None:
        rng, sizes = random.Random(1), [n for n in EDGES if n < MIB]
        check(
            start,
            {n: Memory(n, [cut(rng, n, 16, most) for most in (16, 48, 400, 5000)]) for n in sizes},
        )

    @settings(max_examples=150, deadline=None)
    @given(
        seed=st.integers(0, 2**32),
        sizes=st.lists(st.integers(SHORTEST, 70 * KIB), min_size=1, max_size=40),
        unit=st.sampled_from([1, 8, 16, 64, 1024, 4096]),
        most=st.sampled_from([64, 1000, 4096, 40000]),
        shift=st.sampled_from([0, 0, 8, 1]),
    )
    def test_any_blocks_of_any_cut(
        self, start: Start, *, seed: int, sizes: list[int], unit: int, most: int, shift: int
    ) -> None:
        rng = random.Random(seed)
        whole = unit if unit >= 16 and rng.random() < 0.5 else 1
        sizes = [max(-(-SHORTEST // whole) * whole, n // whole * whole) for n in sizes]
        memory = Memory(seed, [cut(rng, n, unit, most) for n in sizes], shift)
        assert start(memory)() == memory.expected()

    def test_empty_fragments_and_one_memory_twice(self, start: Start) -> None:
        memory = Memory(3, [[4096, 2048]])
        (gather,) = memory.offsets
        memory.offsets = [gather, [(0, 0), gather[0], (8, 0), gather[1], (16, 0)], gather]
        assert start(memory)() == [memory.expected()[0]] * 3

    def test_one_bit_anywhere_changes_the_digest(self, start: Start) -> None:
        memory = Memory(4, [[1024, 16, 3056, 80]])
        whole = start(memory)()
        for offset, n in memory.offsets[0]:
            for at in (offset, offset + n // 2, offset + n - 1):
                memory.bytes[at] ^= 1
                assert start(memory)() == memory.expected() != whole
                memory.bytes[at] ^= 1
