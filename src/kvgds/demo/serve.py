"""A small LLM server: one asyncio loop, one model thread, prompts served at the same time.

With an :class:`Offload` it restores the stored prefix of each prompt before it computes the
rest, and stores each block as soon as it is full. Without one it is plain transformers.

Everything here runs on the event loop, but for the steps of the model, which the one thread
of the executor runs one after the other.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch

from kvgds.demo.model import Decoder, PagedCache, Pages
from kvgds.demo.report import Reply
from kvgds.demo.workload import KeyChain

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
    from concurrent.futures import Executor

    from transformers.cache_utils import Cache

    import kvgds
    from kvgds.demo.workload import Size

T = TypeVar("T")


class BusyClock:
    """Seconds during which at least one transfer was under way."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._running = 0
        self._since = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time inside."""
        if self._running == 0:
            self._since = time.perf_counter()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if self._running == 0:
                self.seconds += time.perf_counter() - self._since


@dataclass
class Offload:
    """The paged cache of this process and the engine behind it.

    Attributes:
        engine: where blocks go.
        pages: the paged KV memory.
        root: parent key of every first block; runs with other roots share no blocks.
        tamper: flip a byte of the first block loaded, to prove that the check notices.
        stored: keys acknowledged.
        loaded: number of blocks loaded.
        failures: why blocks that should have loaded did not.
    """

    engine: kvgds.Engine
    pages: Pages
    root: bytes
    tamper: bool = False
    stored: set[bytes] = field(default_factory=set)
    loaded: int = 0
    failures: list[str] = field(default_factory=list)
    storing: BusyClock = field(default_factory=BusyClock)
    loading: BusyClock = field(default_factory=BusyClock)

    def __post_init__(self) -> None:
        """Register the pages."""
        self._cache = self.engine.register_cache(self.pages.layers, block_axis=0)

    async def restore(self, keys: Sequence[bytes], table: Sequence[int]) -> int:
        """Load the longest stored prefix of ``keys``; return how many blocks of it are there.

        A block that fails to load costs only time: it and those after it are computed.
        """
        with self.loading.running():
            stored = await self.engine.prefix(keys)
            there = await self._load(list(zip(keys[:stored], table, strict=False)))
        self.loaded += len(there)
        if there and self.tamper:
            self._flip(table[0])
        return next((n for n, key in enumerate(keys) if key not in there), len(keys))

    async def _load(self, wanted: Sequence[tuple[bytes, int]]) -> set[bytes]:
        there: set[bytes] = set()
        views = [(key, self._cache.block(page)) for key, page in wanted]
        async for outcome in self.engine.load_each(views):
            if outcome.hit:
                there.add(outcome.key)
                continue
            self.failures.append(str(outcome.error or "gone since it was looked up"))
            settled = getattr(outcome.error, "settled", None)
            if settled is not None:
                await settled  # only then is the page ours to compute into
        return there

    async def keep(self, key: bytes, page: int) -> None:
        """Store the block that ``page`` holds."""
        with self.storing.running():
            await self.engine.store(key, self._cache.block(page))
        self.stored.add(key)

    def _flip(self, page: int) -> None:
        self.tamper = False
        # The byte of the sign and the exponent, where no rounding can hide the change.
        self.pages.layers[0][page].view(torch.uint8).view(-1)[3] ^= 0xFF


@dataclass
class _Request:
    """A prompt on its way.

    Attributes:
        tokens: the prompt, then what was generated.
        cache: where its K and V are.
        width: tokens a block.
        started: when it arrived.
        fed: tokens whose K and V are in the cache.
        loaded: blocks that came from the engine.
        wanted: keys of the blocks that could have.
        on_full: told the number of each block that fills up.
    """

    tokens: list[int]
    cache: Cache
    width: int
    started: float = field(default_factory=time.perf_counter)
    fed: int = 0
    loaded: int = 0
    wanted: Sequence[bytes] = ()
    on_full: Callable[[int], None] | None = None

    def note_fed(self, count: int) -> None:
        """``count`` more tokens are in the cache."""
        self.fed += count
        if self.on_full and self.fed % self.width == 0:
            self.on_full(self.fed // self.width - 1)


class Server:
    """Serves prompts from one model thread."""

    def __init__(
        self,
        decoder: Decoder,
        size: Size,
        worker: Executor,
        advance: Callable[[int], None],
    ) -> None:
        """``advance`` is told of every token fed or loaded."""
        self._decoder = decoder
        self._size = size
        self._worker = worker
        self._advance = advance
        # First come, first served, a whole prefill or one new token at a time: prompts that
        # arrive together all get their first token before any gets its second.
        self._turn = asyncio.Lock()

    async def serve_plain(self, prompts: Sequence[list[int]]) -> list[Reply]:
        """Serve ``prompts``, which arrive together, without kvgds."""
        return await _together(self._plain(prompt) for prompt in prompts)

    async def serve_offloaded(self, prompts: Sequence[list[int]], offload: Offload) -> list[Reply]:
        """Serve ``prompts``, which arrive together, with kvgds."""
        return await _together(self._offloaded(prompt, offload) for prompt in prompts)

    async def serve_whole(self, prompts: Sequence[list[int]]) -> list[float]:
        """Seconds to the first token without kvgds, each prompt prefilled in one step."""
        return await _together(self._whole(prompt) for prompt in prompts)

    async def _whole(self, prompt: list[int]) -> float:
        started = time.perf_counter()
        await self._step(prompt, self._decoder.plain_cache())
        return time.perf_counter() - started

    async def _plain(self, prompt: list[int]) -> Reply:
        cache = self._decoder.plain_cache()
        return await self._generate(_Request(list(prompt), cache, self._size.block_tokens))

    async def _offloaded(self, prompt: list[int], offload: Offload) -> Reply:
        table = offload.pages.take(self._size.blocks(prompt))
        cache = PagedCache(offload.pages, table)
        request = _Request(list(prompt), cache, self._size.block_tokens)
        try:
            async with asyncio.TaskGroup() as stores:
                await self._restore(request, cache, offload, stores)
                return await self._generate(request)
        finally:
            # Not before: the group has waited for every store out of these pages.
            offload.pages.give_back(table)

    async def _restore(
        self, request: _Request, cache: PagedCache, offload: Offload, stores: asyncio.TaskGroup
    ) -> None:
        """Load the stored prefix, and see to it that every block computed is stored."""
        chain = KeyChain(offload.root, request.width)
        chain.extend(request.tokens)
        # The last token is always computed: its logits choose the first new one.
        request.wanted = chain.keys[: (len(request.tokens) - 1) // request.width]

        def store(block: int) -> None:
            chain.extend(request.tokens)
            stores.create_task(offload.keep(chain.keys[block], cache.table[block]))

        request.on_full = store
        request.loaded = await offload.restore(request.wanted, cache.table)
        request.fed = cache.length = request.loaded * request.width
        self._advance(request.fed)

    async def _generate(self, request: _Request) -> Reply:
        tokens = request.tokens
        async with self._turn:
            every = [await self._prefill(request)]
        tokens.append(int(every[0].argmax()))
        first_token_s = time.perf_counter() - request.started
        while len(every) < self._size.new_tokens:
            async with self._turn:
                every.append(await self._step(tokens[-1:], request.cache))
            request.note_fed(1)
            tokens.append(int(every[-1].argmax()))
        new, logits = tokens[-self._size.new_tokens :], torch.stack(every).numpy()
        return Reply(new, logits, first_token_s, request.loaded, request.wanted)

    async def _prefill(self, request: _Request) -> torch.Tensor:
        """Compute what was not loaded, a block at a time; return the last logits."""
        while True:
            chunk = request.tokens[request.fed : request.fed + request.width]
            logits = await self._step(chunk, request.cache)
            request.note_fed(len(chunk))
            if request.fed == len(request.tokens):
                return logits

    async def _step(self, tokens: Sequence[int], cache: Cache) -> torch.Tensor:
        loop = asyncio.get_running_loop()
        logits = await loop.run_in_executor(self._worker, self._decoder.step, tokens, cache)
        self._advance(len(tokens))
        return logits


async def _together(serving: Iterable[Coroutine[None, None, T]]) -> list[T]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in serving]
    return [task.result() for task in tasks]
