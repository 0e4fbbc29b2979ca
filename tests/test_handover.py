"""A loop that always has something to do, in turns too short for others to ask for the lock."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

import pytest
import uvloop

from kvgds import ConfigError, Outcome, open_engine
from kvgds.engine import Engine
from support import PAGE, aligned, config, content, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

SIZE = 4 * PAGE
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


@contextlib.asynccontextmanager
async def busy(turn_s: float) -> AsyncIterator[None]:
    """The loop has something ready whenever it looks."""

    async def spin() -> None:
        while True:
            until = time.perf_counter() + turn_s
            while time.perf_counter() < until:
                pass
            await asyncio.sleep(0)

    spinning = asyncio.ensure_future(spin())
    try:
        yield
    finally:
        spinning.cancel()


async def rested(engine: Engine) -> None:
    """What comes next begins with nobody looking."""
    await until(lambda: engine._handover._timer is None)  # noqa: SLF001 - it tells nobody


async def use(root: Path, layout: str, turn_s: float) -> None:
    """Everything that waits for other threads, from opening to closing."""
    keys = [b"%d" % n for n in range(16)]
    memory = aligned(2 * len(keys) * SIZE, b"".join(content(key, SIZE) for key in keys) * 2)
    settings = config(root, tier={"layout": layout}, timeout_s=5.0)
    async with busy(turn_s), asyncio.timeout(25), open_engine(settings) as engine:
        region = engine.register(memory)
        await rested(engine)
        here = [region[n * SIZE : (n + 1) * SIZE] for n in range(2 * len(keys))]
        stored = await engine.store_many(zip(keys, here, strict=False))
        assert stored == [Outcome(key, "stored") for key in keys]
        memory[len(keys) * SIZE :] = 0
        loaded = await engine.load_many(zip(keys, here[len(keys) :], strict=True))
        assert loaded == [Outcome(key, "hit") for key in keys]
        assert bytes(memory[: len(keys) * SIZE]) == bytes(memory[len(keys) * SIZE :])
        await rested(engine)
        assert await engine.prefix(keys) == len(keys)
        await rested(engine)
        assert await engine.delete(keys[3])
        await rested(engine)
        await engine.deregister(region)
        await rested(engine)


@pytest.mark.parametrize("layout", ["slabs", "files"])
async def test_an_engine_that_does_not_open_is_looked_after_no_more(
    tmp_path: Path, layout: str
) -> None:
    told: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv" / "kvgds.json").write_text("not ours")
    engine = Engine(config(tmp_path / "kv", tier={"layout": layout}))
    with pytest.raises(ConfigError):
        await engine.open()
    await rested(engine)
    assert told == []


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("layout", ["slabs", "files"])
@pytest.mark.parametrize("turn_s", [3e-4, 3e-3])
def test_other_threads_have_their_turn(
    tmp_path: Path, loop: str, layout: str, turn_s: float
) -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(use(tmp_path / "kv", layout, turn_s))
