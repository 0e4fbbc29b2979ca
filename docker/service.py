"""An engine that is never idle, for Prometheus and Grafana to look at.

It plays an LLM server: requests of a few popular prompts and many rare ones load what is stored of
their prefix and store the rest, in GPU memory if there is a GPU. More than the directory holds, so
that it evicts. Settings are the engine's own, as ``KVGDS_*`` variables; metrics are on port 9400.
"""

# ruff: noqa: INP001 - a script, not a package
from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
from typing import Any

import prometheus_client
import torch

import kvgds

PORT = 9400
LOG = logging.getLogger(__name__)
LAYERS = 4
LAYER_BYTES = 256 << 10  # of one block
PROMPT_BLOCKS = 8
PROMPTS = 200
AT_ONCE = 4
PAUSE_S = 0.5


def _cache() -> list[Any]:
    """A paged KV cache: a place for each block of each request under way."""
    shape = (AT_ONCE * PROMPT_BLOCKS, LAYER_BYTES)
    if torch.cuda.is_available():
        return [torch.zeros(shape, dtype=torch.uint8, device="cuda") for _ in range(LAYERS)]
    nbytes = shape[0] * shape[1]
    return [
        torch.frombuffer(kvgds.aligned(nbytes), dtype=torch.uint8).reshape(shape)
        for _ in range(LAYERS)
    ]


async def _requests(engine: kvgds.Engine, cache: kvgds.Cache, first: int) -> None:
    """One request after the other, in the places from `first` on."""
    places = [cache.block(first + i) for i in range(PROMPT_BLOCKS)]
    while True:
        prompt = min(int(random.paretovariate(0.6)), PROMPTS)
        keys = [f"prompt {prompt}, block {i}".encode() for i in range(PROMPT_BLOCKS)]
        await engine.load_many(list(zip(keys, places, strict=True)))
        for outcome in await engine.store_many(list(zip(keys, places, strict=True))):
            if outcome.error is not None:
                LOG.warning("%s", outcome.error)
        await asyncio.sleep(PAUSE_S)


async def main() -> None:
    """Serve until SIGTERM."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None  # noqa: S101 - for the type checker
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    async with kvgds.open_engine(kvgds.load_config(None, os.environ)) as engine:
        print(*engine.plan, sep="\n", flush=True)  # noqa: T201 - how bytes move, for the container's log
        cache = engine.register_cache(_cache())
        server, thread = prometheus_client.start_http_server(PORT, registry=engine.metrics.registry)
        try:
            async with asyncio.TaskGroup() as requests:
                for i in range(AT_ONCE):
                    requests.create_task(_requests(engine, cache, i * PROMPT_BLOCKS))
        finally:
            server.shutdown()
            thread.join()
            await engine.deregister(cache)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    with contextlib.suppress(asyncio.CancelledError, KeyboardInterrupt):
        asyncio.run(main())
