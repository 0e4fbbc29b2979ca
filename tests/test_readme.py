"""What the README shows does what it says."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest

import kvgds
from kvgds import FileTier, load_config
from kvgds.testing import skip_time
from support import PAGE, aligned, opened, turns, until

README = Path(__file__).parents[1] / "README.md"


def block(language: str) -> str:
    """The README's only code block in a language, as it is."""
    fenced = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    (text,) = fenced.findall(README.read_text("utf-8"))
    assert isinstance(text, str)
    return text


def test_the_example_runs_as_it_is(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block("python")],
        cwd=tmp_path,
        capture_output=True,
        check=False,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "host memory direct" in done.stdout
    assert done.stdout.endswith("b'hash of 16 tokens' hit\nb'hash of 32 tokens' hit\n")
    assert list(tmp_path.iterdir()) == []


async def test_a_request_that_was_cancelled_ends_so_once_its_memory_is_free(tmp_path: Path) -> None:
    """With what the cancel said: a cancel scope of anyio knows its own by that."""
    request = f"async def request(engine, key, memory):\n{textwrap.indent(block('py'), '    ')}"
    names: dict[str, Any] = {"asyncio": asyncio, "kvgds": kvgds}
    exec(request, names)  # noqa: S102 - it is the README's
    async with opened(tmp_path / "kv", timeout_s=100.0) as engine:
        assert await engine.store(b"a", bytes(PAGE))
        engine.held.hold("landing")
        memory = engine.register(aligned(PAGE))
        task = asyncio.ensure_future(names["request"](engine, b"a", memory))
        await engine.held.wait_held("landing")
        task.cancel("over")
        await turns()
        skip_time(100.0)
        await until(lambda: engine.statistics().errors == 1)
        await turns()
        assert not task.done()
        engine.held.release()
        with pytest.raises(asyncio.CancelledError, match=r"^over$"):
            await task
        await engine.deregister(memory)


LEAVING = """
import contextlib
async def leave(engine: kvgds.Engine) -> None:
    async with contextlib.aclosing(engine.load_each([])) as arrivals:
        async for outcome in arrivals:
            print(outcome.ok)
"""


def tiers() -> str:
    """The README's settings of two tiers, as arguments of a call."""
    (text,) = re.findall(
        r"^```\n(tiers=.*?)^```$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    return f"kvgds.EngineConfig(namespace=kvgds.Namespace('m'), {text})\n"


def test_the_example_is_typed_for_whoever_uses_no_plugin(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(block("python") + LEAVING + tiers())
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "example.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_the_settings_are_settings(tmp_path: Path) -> None:
    (tmp_path / "kvgds.toml").write_text(block("toml"))
    environ = {"KVGDS_TIMEOUT_S": "5", "KVGDS_TIERS__0__ROOT": "/other"}
    config = load_config(tmp_path / "kvgds.toml", environ)
    tier = config.tiers[0]
    assert isinstance(tier, FileTier)
    assert (config.timeout_s, str(tier.root)) == (5, "/other")
    assert tier.capacity_bytes == 1 << 40


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\]\((\S+)\)", README.read_text("utf-8")))))
def test_links_lead_somewhere_in_a_source_distribution_too(name: str) -> None:
    assert (README.parent / name).exists()
    project = tomllib.loads((README.parent / "pyproject.toml").read_text("utf-8"))
    shipped = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert any(f"/{name}/".startswith(f"{each}/") for each in shipped)
