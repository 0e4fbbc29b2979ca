"""Replaying a trace: what it counts, that it checks every byte, and what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import random
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faults import FaultyDisk
from kvgds import ConfigError, EngineConfig, FileTier, Namespace, open_engine
from kvgds.replay import (
    Buffers,
    Pattern,
    Result,
    Run,
    Settings,
    key_of,
    namespace,
    part_blocks,
    replay,
    requests_of,
)
from support import spoil

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE = 4096
LAYOUTS = ("slabs", "files")
GIVEN = os.environ.get("KVGDS_TRACE")
TRACE = Path(GIVEN or Path(__file__).parents[2] / "shared/traces/conversation_trace.jsonl")


def made_up(requests: int, seed: int = 0) -> list[list[int]]:
    """Requests that share prefixes: each goes on from a part of an earlier one."""
    chance = random.Random(seed)
    fresh = iter(range(1 << 30))
    made: list[list[int]] = []
    for _ in range(requests):
        start = chance.choice(made)[: chance.randint(0, 40)] if made else []
        made.append([*start, *(next(fresh) for _ in range(chance.randint(0, 90)))])
    return made


def write(path: Path, requests: Sequence[Sequence[int]]) -> Path:
    """A trace in Mooncake's format."""
    lines = (
        json.dumps(
            {"timestamp": i, "input_length": 512 * len(ids), "output_length": 3, "hash_ids": ids}
        )
        for i, ids in enumerate(requests)
    )
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def run(trace: Path, root: Path, **changes: Any) -> Result:
    small = {"block_bytes": 2 * PAGE, "capacity_bytes": 256 << 20}
    return asyncio.run(replay(trace, Settings(root, **{**small, **changes}), lambda *_: None))


def expected_hits(requests: Sequence[Sequence[int]]) -> int:
    """Blocks that a store of all before can give, one request after the other."""
    stored: set[int] = set()
    hits = 0
    for ids in requests:
        hits += next((n for n, block in enumerate(ids) if block not in stored), len(ids))
        stored.update(ids)
    return hits


# --- the trace ------------------------------------------------------------------------------


def test_a_trace_gives_the_ids_of_its_requests(tmp_path: Path) -> None:
    requests = made_up(20)
    trace = write(tmp_path / "trace", requests)
    assert [list(ids) for ids in requests_of(trace)] == requests
    assert [list(ids) for ids in requests_of(trace, 7)] == requests[:7]
    trace.write_text(trace.read_text().replace("\n", "\n\n"))
    assert [list(ids) for ids in requests_of(trace, 7)] == requests[:7]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "is not JSON"),
        ("garbage", "is not JSON"),
        ("[1, 2]", "must be an object with a list `hash_ids`"),
        ('{"timestamp": 3}', "must be an object with a list `hash_ids`"),
        ('{"hash_ids": "1"}', "must be an object with a list `hash_ids`"),
        ('{"hash_ids": [1, "2"]}', "'2' is no id"),
        ('{"hash_ids": [1, -2]}', "-2 is no id"),
        ('{"hash_ids": [true]}', "True is no id"),
        ('{"hash_ids": [1.0]}', "1.0 is no id"),
        ('{"hash_ids": [9223372036854775808]}', "is no id"),
        pytest.param('{"hash_ids": [' + "9" * 400 + "]}", "is no id", id="400 digits"),
        pytest.param('{"hash_ids": [' + "9" * 5000 + "]}", "is not JSON", id="5,000 digits"),
        pytest.param('{"hash_ids": ["' + "x" * 9999 + '"]}', "is no id", id="a long text"),
        pytest.param(
            '{"hash_ids": [' + "[" * 500 + "]" * 500 + "]}", "is no id", id="nested a bit too much"
        ),
        pytest.param("[" * 100_000, "nested too deeply", id="lists without end"),
        pytest.param('{"a": ' * 100_000, "nested too deeply", id="objects without end"),
    ],
)
def test_a_bad_line_is_told_with_its_number_before_anything_is_stored(
    tmp_path: Path, line: str, says: str
) -> None:
    trace = write(tmp_path / "trace", made_up(6))
    lines = trace.read_text().splitlines()
    trace.write_text("\n".join([*lines[:4], line, *lines[4:]]))
    with pytest.raises(ConfigError, match=says) as caught:
        run(trace, tmp_path / "kv")
    assert f"{trace}, line 5" in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "kv").exists()


@pytest.mark.parametrize("what", ["missing", "directory", "binary", "pipe"])
def test_a_trace_that_cannot_be_read_is_told(tmp_path: Path, what: str) -> None:
    trace = tmp_path / "trace"
    if what == "directory":
        trace.mkdir()
    elif what == "binary":
        trace.write_bytes(b"\xff\xfe\x00")
    elif what == "pipe":
        os.mkfifo(trace)
    with pytest.raises(ConfigError, match="can't be read") as caught:
        run(trace, tmp_path / "kv")
    assert caught.value.field == "trace"


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_bytes": 0},
        {"block_bytes": 100},
        {"block_bytes": PAGE + 512},
        {"block_bytes": 1 << 50},
        {"in_flight": 0},
        {"capacity_bytes": 1},
        {"layout": "tape"},
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        run(write(tmp_path / "trace", [[1]]), tmp_path / "kv", **wrong)
    assert not (tmp_path / "kv").exists()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 1 << 14), st.integers(1, 4096))
def test_buffers_stay_within_bounds(pages: int, in_flight: int) -> None:
    size = pages * PAGE
    try:
        part = part_blocks(Settings(Path(), size, in_flight=in_flight))
    except ConfigError:
        return
    assert 1 <= part <= 64
    assert part == 1 or 2 * part * size * in_flight <= 512 << 20


# --- content --------------------------------------------------------------------------------


def filled(ids: Sequence[int], pages: int) -> tuple[Pattern, bytearray]:
    pattern, memory = Pattern(pages * PAGE), bytearray(len(ids) * pages * PAGE)
    pattern.fill(ids, memoryview(memory))
    return pattern, memory


def test_what_was_filled_is_right_and_is_cleared() -> None:
    ids = [0, 1, 2, 7, (1 << 63) - 1]
    pattern, memory = filled(ids, 3)
    assert pattern.differing(ids, memoryview(memory)) == []
    assert memory == bytes(len(memory))
    assert pattern.differing(ids, memoryview(memory)) == [0, 1, 2, 3, 4]
    assert memory == bytes(len(memory))  # so that it is no good content for a second look either


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5 * 3 * PAGE - 1), st.integers(1, 255))
def test_any_changed_byte_is_seen_in_its_block_alone(at: int, change: int) -> None:
    pattern, memory = filled([5, 6, 7, 8, 9], 3)
    memory[at] ^= change
    assert pattern.differing([5, 6, 7, 8, 9], memoryview(memory)) == [at // (3 * PAGE)]


def test_every_page_of_every_block_is_another() -> None:
    _, memory = filled(range(500), 4)
    assert len({bytes(page) for page in np.frombuffer(memory, np.uint8).reshape(-1, PAGE)}) == 2000


def test_content_is_the_same_in_every_run_and_place() -> None:
    _, first = filled([3, 4], 2)
    _, second = filled([4, 9], 2)
    assert first[2 * PAGE :] == second[: 2 * PAGE]


# --- replaying ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_request_at_a_time_hits_every_stored_prefix(tmp_path: Path, layout: str) -> None:
    requests = made_up(60)
    trace = write(tmp_path / "trace", requests)
    asked, hits = sum(map(len, requests)), expected_hits(requests)
    result = run(trace, tmp_path / "kv", in_flight=1, layout=layout)
    assert (result.requests, result.asked, result.hits) == (60, asked, hits)
    assert (result.misses, result.stored, result.errors) == (asked - hits, asked - hits, 0)
    assert result.hit_rate == pytest.approx(hits / asked, abs=1e-4)
    assert result.bytes_verified == result.bytes_loaded == hits * 2 * PAGE
    assert result.bytes_stored == (asked - hits) * 2 * PAGE
    assert (result.evictions, result.messages) == (0, ())
    assert f"{layout}:" in result.path
    assert result.prefix.calls == 60
    assert 0 < result.prefix.p50_ms <= result.prefix.p95_ms <= result.prefix.p99_ms
    assert min(result.load_many.p50_ms, result.store_many.p50_ms, result.load_gb_s) > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_run_finds_everything(tmp_path: Path, layout: str) -> None:
    requests = made_up(80)
    trace = write(tmp_path / "trace", requests)
    steps: list[tuple[str, int, int]] = []
    first = run(trace, tmp_path / "kv", layout=layout)
    chosen = Settings(tmp_path / "kv", 2 * PAGE, 256 << 20, layout=layout)
    second = asyncio.run(replay(trace, chosen, lambda *step: steps.append(step)))
    assert first.errors == second.errors == 0
    assert first.hits + first.misses == second.hits == second.asked
    assert (second.hit_rate, second.stored, second.misses) == (1.0, 0, 0)
    assert steps == [("requests", n, 80) for n in range(1, 81)]


def test_a_block_that_many_write_at_once_counts_once(tmp_path: Path) -> None:
    trace = write(tmp_path / "trace", [list(range(50))] * 8)
    result = run(trace, tmp_path / "kv", in_flight=8)
    assert (result.stored, result.bytes_stored) == (50, 50 * 2 * PAGE)
    assert (result.hits + result.misses, result.errors) == (400, 0)


def test_blocks_of_another_size_are_other_blocks(tmp_path: Path) -> None:
    trace = write(tmp_path / "trace", made_up(10))
    run(trace, tmp_path / "kv")
    result = run(trace, tmp_path / "kv", block_bytes=4 * PAGE, in_flight=1)
    assert (result.hits, result.errors) == (expected_hits(made_up(10)), 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_little_room_it_evicts_and_what_it_loads_is_right(tmp_path: Path, layout: str) -> None:
    requests = made_up(150)
    trace = write(tmp_path / "trace", requests)
    result = run(trace, tmp_path / "kv", capacity_bytes=2 << 20, layout=layout)
    assert result.evictions > 0
    assert result.errors == 0
    assert 0 < result.hits < expected_hits(requests)
    assert result.hits + result.misses == result.asked == sum(map(len, requests))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_directory_of_others_is_not_replayed_into(tmp_path: Path, layout: str) -> None:
    """It would evict what they stored; its own blocks of another size it may."""
    trace, root = write(tmp_path / "trace", made_up(3)), tmp_path / "kv"
    assert not run(trace, root, layout=layout).errors
    assert not run(trace, root, layout=layout, block_bytes=PAGE).errors
    tier = FileTier(root=root, capacity_bytes=256 << 20, layout=layout)  # type: ignore[arg-type]

    async def store() -> None:
        config = EngineConfig(namespace=Namespace("mine"), tiers=(tier,))
        async with open_engine(config) as engine:
            assert await engine.store(b"a", bytes(5))

    asyncio.run(store())
    for known in (True, False):  # then only that they are not its own
        with pytest.raises(ConfigError, match="holds blocks of others"):
            run(trace, root, layout=layout)
        if known and layout == "files":
            (root / Namespace("mine").digest.hex() / "namespace.json").unlink()
        elif known:
            with contextlib.closing(sqlite3.connect(root / "index.db")) as index, index:
                index.execute("UPDATE namespace SET text = '' WHERE text LIKE '%mine%'")


def test_only_so_many_requests_are_replayed(tmp_path: Path) -> None:
    trace = write(tmp_path / "trace", made_up(30))
    assert run(trace, tmp_path / "kv", limit=11).requests == 11


def engine_config(root: Path) -> EngineConfig:
    tier = FileTier(root=root, capacity_bytes=64 << 20)
    return EngineConfig(namespace=namespace(2 * PAGE), tiers=(tier,), bounce_bytes=8 << 20)


async def plant(root: Path, block: int, content: bytes) -> None:
    """Store content of our own under the key of an id, stamp and checksum sound."""
    async with open_engine(engine_config(root)) as engine:
        assert await engine.store(key_of(block), content)


@pytest.mark.parametrize("at", [0, PAGE + 17, 2 * PAGE - 1])
def test_a_wrong_byte_behind_a_sound_checksum_is_an_error(tmp_path: Path, at: int) -> None:
    trace = write(tmp_path / "trace", [[1, 2, 3]])
    _, content = filled([2], 2)
    asyncio.run(plant(tmp_path / "right", 2, bytes(content)))
    assert run(trace, tmp_path / "right", in_flight=1).errors == 0
    content[at] ^= 1
    asyncio.run(plant(tmp_path / "kv", 2, bytes(content)))
    run(trace, tmp_path / "kv", in_flight=1)  # the block is no prefix yet
    result = run(trace, tmp_path / "kv", in_flight=1)
    assert (result.errors, result.hits, result.misses) == (1, 2, 0)
    assert "id 2" in result.messages[0]


def test_a_block_that_is_corrupt_on_disk_is_an_error(tmp_path: Path) -> None:
    trace = write(tmp_path / "trace", [[1, 2, 3]])
    run(trace, tmp_path / "kv")
    spoil(tmp_path / "kv", key_of(2), PAGE + 5, namespace(2 * PAGE))
    result = run(trace, tmp_path / "kv")
    assert (result.errors, result.hits) == (1, 2)
    assert "load of id 2" in result.messages[0]
    assert "checksum" in result.messages[0]
    mended = run(trace, tmp_path / "kv")
    assert (mended.errors, mended.hits) == (0, 1)  # 2 is gone; the first run of ids is 1 alone
    assert run(trace, tmp_path / "kv").hits == 3


def test_blocks_that_can_not_be_stored_are_errors_each(tmp_path: Path) -> None:
    requests = [list(range(40)), list(range(40, 80))]
    with FaultyDisk(tmp_path) as disk:
        disk.fail("write", errno.EIO, match="slab-*")
        result = run(write(tmp_path / "trace", requests), disk.root / "kv")
    assert (result.errors, result.stored) == (80, 0)
    assert 0 < len(result.messages) < 80
    assert "Input/output error" in result.messages[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_capacity_that_holds_no_block_is_refused_at_once(tmp_path: Path, layout: str) -> None:
    trace, root = write(tmp_path / "trace", [[1]]), tmp_path / "kv"
    with pytest.raises(ConfigError, match="must be at least 12,288, which one block takes"):
        run(trace, root, capacity_bytes=3 * PAGE - 1, layout=layout)
    assert not root.exists()
    assert run(trace, root, capacity_bytes=3 * PAGE, layout=layout).stored == 1


async def test_blocks_that_went_before_they_were_loaded_are_misses_and_stored_again(
    tmp_path: Path,
) -> None:
    class Beaten(Run):
        """Somebody deletes blocks between this replay's look and its load."""

        async def load(self, ids: Sequence[int], offset: int) -> list[int]:
            for block in (2, 4):
                assert await engine.delete(key_of(block))
            return await super().load(ids, offset)

    ids = (1, 2, 3, 4, 5)
    async with open_engine(engine_config(tmp_path / "kv")) as engine:
        run = Beaten(engine, 2 * PAGE, 8, 1)
        await run.store(ids[:4], 0)
        await run.serve(ids, Buffers(0, 8 * 2 * PAGE))
        result = run.result(1.0)
        assert (result.asked, result.hits, result.misses, result.errors) == (5, 2, 3, 0)
        assert result.bytes_loaded == result.bytes_verified == 2 * 2 * PAGE
        assert await engine.prefix([key_of(block) for block in ids]) == 5


async def test_an_error_in_one_request_ends_the_replay_and_closes_the_engine(
    tmp_path: Path,
) -> None:
    def told(_what: str, done: int, _total: int) -> None:
        if done == 5:
            raise OSError("the terminal has gone")

    trace = write(tmp_path / "trace", made_up(40))
    with pytest.raises(OSError, match="the terminal has gone"):
        await replay(trace, Settings(tmp_path / "kv", 2 * PAGE, 64 << 20), told)
    async with open_engine(engine_config(tmp_path / "kv")) as engine:
        assert engine.statistics().tiers[0].blocks > 0


@pytest.mark.skipif(not TRACE.exists(), reason="the public trace is not here")
@pytest.mark.timeout(280)
def test_the_public_trace(tmp_path: Path) -> None:
    """All of it when it was asked for by name, else its beginning."""
    limit = None if GIVEN else 1500
    requests = [list(ids) for ids in requests_of(TRACE, limit)]
    result = run(TRACE, tmp_path / "kv", block_bytes=PAGE, capacity_bytes=1 << 30, limit=limit)
    assert (result.requests, result.asked) == (len(requests), sum(map(len, requests)))
    assert (result.errors, result.misses + result.hits) == (0, result.asked)
    # Requests under way at the same time can't use each other's blocks yet: a few hits fewer.
    assert 0.9 * expected_hits(requests) < result.hits <= expected_hits(requests)
