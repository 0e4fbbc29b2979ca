"""The decoder and its paged KV cache.

The decoder is the Llama architecture of Hugging Face transformers, untouched, with seeded
random weights. Only where it keeps K and V is ours: :class:`PagedCache` hands each layer's
``update`` to pages of :class:`Pages`, the memory that the engine stores from and loads into.

Invariant: a step never crosses the end of a block. Prefill runs in chunks of one block, so
every matrix product has the same shape whether the blocks before it were computed here or
loaded, and equal inputs give equal bits.

Everything here runs on the server's one model thread, but for taking and giving back pages,
which the event loop does.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache

from kvgds.demo.workload import SEED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvgds.demo.workload import Size

VOCABULARY = 256
"""A token is a byte."""


def device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def use_threads(threads: int) -> None:
    """Fix what could make equal inputs give different bits."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(mode=True)


class Decoder:
    """Llama with seeded weights, and one way to run it: a step."""

    def __init__(self, size: Size, where: torch.device) -> None:
        hidden = size.heads * size.head_dim
        self.config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            max_position_embeddings=1 << 14,
            # Wide enough that tokens vary: a model that repeats itself could hide an error.
            initializer_range=0.1,
            attn_implementation="sdpa",
        )
        torch.manual_seed(SEED)
        self._model = LlamaForCausalLM(self.config).eval().to(where)
        self._where = where

    @property
    def words(self) -> str:
        """What it is, for people."""
        millions = sum(weight.numel() for weight in self._model.parameters()) / 1e6
        layers = self.config.num_hidden_layers
        return f"Llama, {layers} layers, {millions:.1f} M float32 weights, on {self._where.type}"

    def plain_cache(self) -> DynamicCache:
        """A cache of transformers' own, for runs without kvgds."""
        return DynamicCache(config=self.config)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], cache: Cache) -> torch.Tensor:
        """Feed ``tokens``; return the logits of the last one, on the CPU."""
        ids = torch.tensor([tokens], device=self._where)
        output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if isinstance(cache, PagedCache):
            cache.length += len(tokens)
        logits: torch.Tensor = output.logits[0, -1].cpu()
        return logits


class Pages:
    """The paged KV memory: for each layer a tensor (pages, 2, tokens, kv heads, head dim).

    It is host memory; a decoder on a GPU copies from and to it.
    """

    def __init__(self, size: Size, pages: int) -> None:
        shape = torch.Size((pages, 2, size.block_tokens, size.kv_heads, size.head_dim))
        self.block_tokens = size.block_tokens
        self.layers = [_on_a_page(shape) for _ in range(size.layers)]
        self._free = list(range(pages))

    def take(self, count: int) -> list[int]:
        """Page numbers that are the caller's until given back."""
        if count > len(self._free):
            raise MemoryError(f"{count} KV pages asked for, {len(self._free)} free")
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def give_back(self, table: Sequence[int]) -> None:
        """Let others have the pages."""
        self._free += table


def _on_a_page(shape: torch.Size) -> torch.Tensor:
    # torch aligns to 64 bytes. Memory of our own starts on a page, and a block's row is
    # whole pages, so the engine moves it without a copy.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, shape.numel() * torch.float32.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)


def _for_attention(half: torch.Tensor, tokens: int) -> torch.Tensor:
    """K or V of a sequence's pages as (1, kv heads, tokens, head dim)."""
    # Contiguous, as transformers' own cache gives it: the same strides, the same kernels.
    return half.flatten(0, 1)[:tokens].transpose(0, 1)[None].contiguous()


class PagedCache(Cache):
    """One sequence's K and V, kept in pages.

    Attributes:
        table: the page of each block, in the order of the sequence.
        length: tokens whose K and V are there.
    """

    def __init__(self, pages: Pages, table: list[int]) -> None:
        super().__init__(layers=[])
        self.pages = pages
        self.table = table
        self.length = 0
        self._index = torch.tensor(table)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_args: Any,  # noqa: ANN401 - transformers' signature
        **_kwargs: Any,  # noqa: ANN401 - transformers' signature
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new K and V into the current page; return those of the whole sequence."""
        block, start = divmod(self.length, self.pages.block_tokens)
        stop = start + key_states.shape[-2]
        if stop > self.pages.block_tokens:
            raise ValueError(f"a step of {stop - start} tokens crosses the end of block {block}")
        layer = self.pages.layers[layer_idx]
        page = layer[self.table[block]]
        page[0, start:stop] = key_states[0].transpose(0, 1)
        page[1, start:stop] = value_states[0].transpose(0, 1)
        chosen = layer.index_select(0, self._index[: block + 1])
        tokens = block * self.pages.block_tokens + stop
        keys, values = (_for_attention(chosen[:, half], tokens) for half in (0, 1))
        return keys.to(key_states.device), values.to(key_states.device)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - transformers' signature
        """Tokens cached; in all layers the same, because it moves only after a step."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        """Length and offset of what the next step attends to."""
        return self.length + query_length, 0
