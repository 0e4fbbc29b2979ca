"""The demo, at a small size: it passes, and it would fail if kvgds changed a single byte."""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from kvgds.demo import DemoError, Processes, model, run
from kvgds.demo.report import Reply, differences
from kvgds.demo.workload import SIZES, KeyChain, prompts
from support import heard

PAGE = 4096
SMALL = SIZES["small"]
# Two processes that each load torch and transformers, perhaps from a cold disk.
pytestmark = pytest.mark.timeout(240)


def shown(root: Path | None, *, tamper: bool = False) -> tuple[int, str]:
    """Exit status of the demo, and what it prints."""
    out = io.StringIO()
    status = run(root, Console(file=out, width=200), size="small", tamper=tamper)
    return status, out.getvalue()


def test_the_demo_passes_and_says_what_it_did(tmp_path: Path) -> None:
    root = tmp_path / "blocks"
    status, text = shown(root)
    assert status == 0, text
    could = len([key for prompt in prompts(SMALL)[1] for key in shared_keys(prompt)])
    assert f"{could} of the {could} that the prompts share were used" in text
    assert f"slabs:{root}: host memory direct via POSIX" in text
    assert "bit for bit" in text


def test_what_it_lacks_is_told_with_how_to_get_it() -> None:
    program = "import sys; sys.modules['transformers'] = None; from kvgds.cli import app; app()"
    done = subprocess.run(
        [sys.executable, "-c", program, "demo"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "200"},
        capture_output=True,
        check=False,
        text=True,
    )
    said = "from your checkout, pip install -c constraints.txt '.[demo]'"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: kvgds demo needs transformers: {said}\n"


def test_one_flipped_byte_of_a_loaded_block_fails_it() -> None:
    status, text = shown(None, tamper=True)
    assert status == 1, text
    assert "the logits of token 1 differ" in text
    assert "failed: kvgds changed what the model says" in text


def test_a_block_rotten_on_disk_is_computed_instead(tmp_path: Path) -> None:
    processes = Processes(tmp_path / "blocks", tmp_path, "small")
    first = processes.run("first")
    key = keys_of(prompts(SMALL)[1][0], bytes.fromhex(processes.salt))[3]
    assert key in first.stored_keys
    rot(tmp_path / "blocks", key)
    second = processes.run("second")
    assert any("checksum" in failure for failure in second.failures)
    assert [reply.loaded for reply in second.replies] == [3] * 4
    assert list(differences([*first.replies, *second.replies], second.plain)) == []


def test_an_unusable_directory_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DemoError, match=r"^the first process failed: ") as failed:
        shown(tmp_path / "file")
    assert "Traceback" not in str(failed.value)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_demo_that_is_ended_leaves_no_process(tmp_path: Path, how: signal.Signals) -> None:
    """Nor its temporary directory, if it could do anything about that."""
    root, scratch = tmp_path / "kv", tmp_path / "tmp"
    scratch.mkdir()
    path = os.pathsep.join(filter(None, sys.path))
    with contextlib.nullcontext() if how == signal.SIGKILL else heard(how):
        started = subprocess.Popen(
            [sys.executable, "-m", "kvgds", "demo", "--root", str(root)],
            env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(scratch)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    with started as parent:
        while not (root / "lock").exists():  # it has an engine open
            assert parent.poll() is None
        children = f"/proc/{parent.pid}/task/{parent.pid}/children"
        (child,) = map(int, Path(children).read_text().split())
        alive = os.pidfd_open(child)
        signal.pidfd_send_signal(alive, signal.SIGSTOP)  # it won't end because nobody listens
        try:
            parent.send_signal(how)
            output, _ = parent.communicate(timeout=60)
            patience_s = 30 if how == signal.SIGKILL else 0  # the kernel does it a little later
            assert select.select([alive], [], [], patience_s)[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(alive, signal.SIGKILL)
            os.close(alive)
    if how != signal.SIGKILL:
        assert parent.returncode == 128 + how, output
        assert list(scratch.iterdir()) == []
    assert "Traceback" not in output


def test_an_end_that_comes_before_the_first_process_is_not_lost() -> None:
    """Nor does it break off what is done just then."""

    class Screen(io.StringIO):
        written = 0

        def write(self, text: str) -> int:
            if not self.written:
                signal.raise_signal(signal.SIGTERM)
            self.written += 1
            return super().write(text)

    screen, unheard = Screen(), []
    before = signal.signal(signal.SIGTERM, lambda number, _: unheard.append(number))
    try:
        assert (
            run(None, Console(file=screen, force_terminal=True), size="small")
            == 128 + signal.SIGTERM
        )
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert unheard == [signal.SIGTERM]  # what was there before is back
    assert screen.written > 1
    assert "new process" not in screen.getvalue()  # it did not get that far
    assert "failed" not in screen.getvalue()


def keys_of(tokens: list[int], root: bytes = b"") -> list[bytes]:
    chain = KeyChain(root, SMALL.block_tokens)
    chain.extend(tokens)
    return chain.keys


def shared_keys(tokens: list[int]) -> list[bytes]:
    """Keys of the full blocks that a prompt has in common with one of the first process's."""
    first = {key for prompt in prompts(SMALL)[0] for key in keys_of(prompt)}
    return [key for key in keys_of(tokens) if key in first]


def rot(root: Path, key: bytes) -> None:
    """Flip a byte of the payload that is stored under ``key``."""
    for path in (path for path in root.rglob("*") if path.is_file()):
        data = path.read_bytes()
        place = data.find(key)
        while place >= 0:
            page = place // PAGE * PAGE
            if data[page : page + 8] == b"kvgdsblk":
                with path.open("r+b") as file:
                    os.pwrite(file.fileno(), bytes([data[page + PAGE + 99] ^ 1]), page + PAGE + 99)
                return
            place = data.find(key, place + 1)
    raise LookupError(key)


def test_keys_name_prefixes() -> None:
    tokens = list(b"system prompt of 32 bytes here..document")
    keys = keys_of(tokens)
    assert len(keys) == 2
    assert keys_of([*tokens[:32], *b"other"]) == keys
    changed = keys_of([tokens[0] ^ 1, *tokens[1:]])
    assert not set(changed) & set(keys)
    assert not set(keys_of(tokens, b"salt")) & set(keys)


def test_keys_grow_with_the_sequence() -> None:
    chain = KeyChain(b"", SMALL.block_tokens)
    tokens = list(range(50))
    for end in range(51):
        chain.extend(tokens[:end])
        assert chain.keys == keys_of(tokens[:end])


def test_differences_sees_tokens_logits_and_nan() -> None:
    logits = np.ones((2, 3), np.float32)
    plain = Reply([1, 2], logits, 0.0, 0, ())
    assert list(differences([plain], [plain])) == []
    other = Reply([1, 3], logits, 0.0, 0, ())
    assert list(differences([other], [plain])) == ["prompt 1: token 2 is 3, without kvgds 2"]
    close = logits.copy()
    close[1, 2] = np.nextafter(np.float32(1), np.float32(2))
    for wrong in (close, np.full_like(logits, np.nan)):
        reply = Reply([1, 2], wrong, 0.0, 0, ())
        first = int(np.isfinite(wrong).all()) + 1
        assert list(differences([reply], [plain])) == [
            f"prompt 1: the logits of token {first} differ"
        ]
    # Even where both runs give it, NaN is no proof of anything.
    reply = Reply([1, 2], np.full_like(logits, np.nan), 0.0, 0, ())
    assert len(list(differences([reply], [reply]))) == 1


def test_pages_in_any_order_give_the_bits_of_transformers_own_cache() -> None:
    decoder = model.Decoder(SMALL, torch.device("cpu"))
    tokens = prompts(SMALL)[0][0][: 3 * SMALL.block_tokens + 5]
    plain, paged = decoder.plain_cache(), model.PagedCache(model.Pages(SMALL, 6), [4, 0, 5, 2])
    for start in range(0, len(tokens), SMALL.block_tokens):
        chunk = tokens[start : start + SMALL.block_tokens]
        assert torch.equal(decoder.step(chunk, plain), decoder.step(chunk, paged))
    assert torch.equal(decoder.step([7], plain), decoder.step([7], paged))


def test_blocks_are_whole_pages_on_page_boundaries() -> None:
    for size in SIZES.values():
        assert size.row_bytes % PAGE == 0
    for layer in model.Pages(SMALL, 3).layers:
        assert layer.data_ptr() % PAGE == 0
        assert layer[0].nbytes == SMALL.row_bytes


def test_a_step_may_not_cross_the_end_of_a_block() -> None:
    decoder = model.Decoder(SMALL, torch.device("cpu"))
    cache = model.PagedCache(model.Pages(SMALL, 2), [0, 1])
    with pytest.raises(ValueError, match="crosses the end of block 0"):
        decoder.step(list(range(SMALL.block_tokens + 1)), cache)


def test_pages_run_out_loudly() -> None:
    pages = model.Pages(SMALL, 2)
    taken = pages.take(2)
    with pytest.raises(MemoryError, match="1 KV pages asked for, 0 free"):
        pages.take(1)
    pages.give_back(taken)
    assert sorted(pages.take(2)) == sorted(taken)
