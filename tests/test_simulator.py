"""The simulated GPU does what a GPU would, and NIXL's real GDS plugins run on it.

Nothing of it is loaded here: this process may have a real GPU. The checks of tests/simulator run in
processes of their own, many in each.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from simulator import build, environment

CHECKS = Path(__file__).parent / "simulator"

# Prints what cuFileDriverOpen answers, and who it says it is.
OPEN = """
import ctypes
from simulator import Simulator
class Status(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int), ("cuda", ctypes.c_int)]
cufile = Simulator().cufile
cufile.cuFileDriverOpen.restype = Status
code = cufile.cuFileDriverOpen().code
properties = (ctypes.c_uint * 14)()
cufile.cuFileDriverGetProperties(properties)
print(code, properties[0] > 0, *(bit for bit in range(32) if properties[6] >> bit & 1))
"""
COUNT = """
import ctypes
from simulator import Simulator
number = ctypes.c_int(7)
print(Simulator().cudart.cudaGetDeviceCount(ctypes.byref(number)), number.value)
"""


def run(*arguments: str, **settings: object) -> str:
    """What a child says that runs on the simulator; its failure is ours."""
    env = {"NIXL_LOG_LEVEL": "FATAL", **environment(**settings)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout


@pytest.mark.parametrize("file", sorted(CHECKS.glob("checks_*.py")), ids=lambda path: path.stem)
def test_checks(file: Path) -> None:
    hung = "faulthandler_timeout=20"  # a thread that waits in C hears no signal
    options = ("-q", "-p", "no:cacheprovider", "--noconftest", "-o", hung)
    run("-m", "pytest", *options, str(file), devices=2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "0 True 4"),
        ({"path": "p2pdma"}, "0 False 11"),
        ({"path": "compat"}, "0 False"),
        ({"driver_open": 5033}, "5033 False"),
    ],
)
def test_the_environment_says_what_cufile_is(settings: dict[str, str], expected: str) -> None:
    assert expected == run("-c", OPEN, **settings).strip()


@pytest.mark.parametrize(("path", "expected"), [("nvfs", "0 True 4"), ("compat", "5001 False")])
def test_without_compatibility_mode_only_the_real_thing_opens(
    monkeypatch: pytest.MonkeyPatch, path: str, expected: str
) -> None:
    monkeypatch.setenv("CUFILE_ALLOW_COMPAT_MODE", "false")
    assert expected == run("-c", OPEN, path=path).strip()


@pytest.mark.parametrize(("devices", "expected"), [(0, "100 0"), (3, "0 3")])
def test_the_environment_says_how_many_devices(devices: int, expected: str) -> None:
    assert expected == run("-c", COUNT, devices=devices).strip()


def test_it_is_not_loaded_here() -> None:
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert str(build()) not in maps


@pytest.mark.parametrize(("devices", "expected"), [(0, "none that CUDA answers"), (2, "2 found")])
def test_the_doctor_says_how_their_memory_moves(devices: int, expected: str) -> None:
    assert expected in run("-m", "kvgds", "doctor", devices=devices)
