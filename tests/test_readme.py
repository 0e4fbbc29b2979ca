"""What the README shows does what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvgds import FileTier, load_config

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


LEAVING = """
import contextlib
async def leave(engine: kvgds.Engine) -> None:
    async with contextlib.aclosing(engine.load_each([])) as arrivals:
        async for outcome in arrivals:
            print(outcome.ok)
"""


def test_the_example_is_typed_for_whoever_uses_no_plugin(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(block("python") + LEAVING)
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
def test_links_lead_somewhere(name: str) -> None:
    assert (README.parent / name).exists()
