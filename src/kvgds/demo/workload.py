"""What the demo serves: the prompts, their tokens, the keys of their blocks, the model's size.

Pure: no model, no I/O beyond reading two modules of the standard library as text. The
prompts form a tree, as they do in a server: all share the system prompt, those about one
document share that as well, and only the question at the end is each one's own.
"""

from __future__ import annotations

import asyncio.locks
import asyncio.queues
import hashlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED = 20_25
"""Seeds the weights, so that every process builds the same model."""

_SYSTEM = """\
You are a careful reviewer of asynchronous Python. You are given one module of a library and
a question about it. Read the module from its first line to its last before you answer. Quote
the lines that your answer rests on, and name the function they stand in. Say plainly when the
module does not hold the answer; never fill a gap with what such modules usually do. Keep the
answer under two hundred words, without greetings, and put the conclusion first. Cancellation,
ordering and fairness are part of every question, whether it names them or not.

The module:

"""

_QUESTIONS = (
    "Which call can wait for ever, and what would have to happen for it to wake?",
    "A waiter is cancelled just after it was woken. Who is woken in its place?",
    "In which order are waiters served, and which line guarantees that order?",
)


@dataclass(frozen=True, slots=True)
class Size:
    """How large the model and its prompts are.

    Attributes:
        layers: decoder layers.
        heads: query heads.
        kv_heads: heads of K and V, fewer than ``heads`` (grouped-query attention).
        head_dim: elements a head.
        block_tokens: tokens a block of the KV cache; also the prefill's chunk.
        document_chars: characters taken of each document.
        new_tokens: tokens generated for each prompt.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    document_chars: int
    new_tokens: int

    @property
    def row_bytes(self) -> int:
        """One layer's share of a block: K and V, float32. A multiple of a page."""
        return 2 * self.block_tokens * self.kv_heads * self.head_dim * 4

    @property
    def block_bytes(self) -> int:
        """One block over all layers."""
        return self.layers * self.row_bytes

    def blocks(self, prompt: Sequence[int]) -> int:
        """Blocks that a prompt and what is generated from it take."""
        return -(-(len(prompt) + self.new_tokens) // self.block_tokens)


SIZES = {
    "full": Size(8, 8, 4, 64, block_tokens=128, document_chars=1128, new_tokens=32),
    "small": Size(2, 4, 2, 16, block_tokens=16, document_chars=120, new_tokens=20),
}


def prompts(size: Size) -> tuple[list[list[int]], list[list[int]]]:
    """The prompts of the first process and those of the second, as tokens.

    A token is a byte of UTF-8: a tokenizer that needs no download.
    """
    first: list[list[int]] = []
    second: list[list[int]] = []
    for module in (asyncio.locks, asyncio.queues):
        document = inspect.getsource(module)[: size.document_chars]
        asked = [
            list(f"{_SYSTEM}{document}\n\nThe question: {question}\n".encode())
            for question in _QUESTIONS
        ]
        first += asked[:1]
        second += asked[1:]
    return first, second


class KeyChain:
    """Keys of a sequence's full blocks.

    A block's K and V depend on every token before it, so its key is a hash of its tokens
    and of its parent's key: equal keys mean equal prefixes.
    """

    def __init__(self, root: bytes, block_tokens: int) -> None:
        self._root = root
        self._block_tokens = block_tokens
        self.keys: list[bytes] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Add the keys of blocks that ``tokens``, the whole sequence, now fills."""
        width = self._block_tokens
        for start in range(len(self.keys) * width, len(tokens) - width + 1, width):
            parent = self.keys[-1] if self.keys else self._root
            text = parent + bytes(tokens[start : start + width])
            self.keys.append(hashlib.blake2b(text, digest_size=16).digest())
