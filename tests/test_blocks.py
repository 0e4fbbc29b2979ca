"""Names and stamps: nothing that is not a whole stamp of ours is taken for one."""

from __future__ import annotations

import struct
from dataclasses import fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from kvgds import ConfigError, Namespace, Outcome
from kvgds.blocks import PAGE, XXH3_128, Stamp, check_key, image_bytes, padded

KEYS = st.binary(min_size=1, max_size=1024)
STAMPS = st.builds(
    Stamp,
    namespace=st.binary(min_size=16, max_size=16),
    key=KEYS,
    generation=st.integers(0, (1 << 64) - 1),
    nbytes=st.integers(0, (1 << 64) - 1),
    algorithm=st.integers(0, 3),
    checksum=st.binary(min_size=16, max_size=16),
)


@given(STAMPS)
def test_a_stamp_comes_back_as_it_was(stamp: Stamp) -> None:
    page = stamp.encode().ljust(PAGE, b"\0")
    assert len(page) == PAGE
    assert Stamp.decode(page) == stamp
    assert Stamp.decode(memoryview(page)) == stamp


def test_the_fields_of_a_stamp_lie_where_the_document_says() -> None:
    text = (Path(__file__).parents[1] / "docs" / "format.md").read_text("utf-8")
    table = text.partition("### Stamp")[2].partition("A stamp whose")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line[:3].strip("| ")]
    lies = {name.split(":")[0].split(",")[0].strip(): (at, size) for at, size, name in rows[2:]}
    stamp = Stamp(b"n" * 16, b"key", 7, 4097, XXH3_128, b"c" * 16)
    page, at = stamp.encode(), {}
    for name, (offset, size) in lies.items():
        if offset.strip().isdigit() and size.strip().isdigit():
            at[name] = page[int(offset) : int(offset) + int(size)]
    assert (at["namespace"], at["checksum of the payload"]) == (b"n" * 16, b"c" * 16)
    numbers = [at[name] for name in ("length of the key", "generation", "length of the payload")]
    assert [int.from_bytes(number, "little") for number in numbers] == [3, 7, 4097]
    assert page[int(lies["key"][0]) :][:3] == b"key"


def test_the_bytes_of_a_stamp_are_those_of_the_document() -> None:
    """docs/format.md, written out by hand: if this fails, the format has changed."""
    body = b"kvgdsblk" + struct.pack("<HHI", 1, 1, 3) + b"N" * 16
    body += struct.pack("<QQ", 7, 5) + b"C" * 16 + b"key"
    expected = body + struct.pack(">Q", xxhash.xxh3_64_intdigest(body))
    assert Stamp(b"N" * 16, b"key", 7, 5, XXH3_128, b"C" * 16).encode() == expected


@given(STAMPS, st.data())
def test_no_bit_of_a_stamp_can_change(stamp: Stamp, data: st.DataObject) -> None:
    whole = bytearray(stamp.encode())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    assert Stamp.decode(bytes(whole).ljust(PAGE, b"\0")) is None


@given(STAMPS, st.data())
def test_half_a_stamp_is_none(stamp: Stamp, data: st.DataObject) -> None:
    whole = stamp.encode()
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    assert Stamp.decode(cut) is None
    if cut.ljust(len(whole), b"\0") != whole:
        assert Stamp.decode(cut.ljust(PAGE, b"\0")) is None


@given(st.binary(max_size=PAGE))
@example(bytes(PAGE))
@example(b"kvgdsblk" + bytes(PAGE))
@example(b"kvgdsblk\1\0\1\0\xff\xff\xff\xff" + bytes(PAGE))
def test_other_bytes_are_no_stamp(page: bytes) -> None:
    assert Stamp.decode(page) is None


@given(st.integers(0, 1 << 50))
def test_padding(nbytes: int) -> None:
    assert nbytes <= padded(nbytes) < nbytes + PAGE
    assert padded(nbytes) % PAGE == 0
    assert image_bytes(nbytes) == PAGE + padded(nbytes)


@given(KEYS)
def test_keys(key: bytes) -> None:
    check_key(key)
    for wrong in (b"", b"x" * 1025, bytearray(key), memoryview(key), "text", None):
        with pytest.raises(ConfigError, match="key"):
            check_key(wrong)


# --- namespaces -----------------------------------------------------------------------------------

BASE = Namespace(model="m", world=8)
OTHER: dict[str, Any] = {
    "model": "n",
    "revision": "other",
    "layout": "HND",
    "dtype": "float8",
    "block_tokens": 17,
    "rank": 1,
    "world": 9,
}


def test_every_field_of_a_namespace_counts() -> None:
    """A field that is added later must be added here too."""
    assert set(OTHER) == {field.name for field in fields(Namespace)}
    digests = {
        BASE.digest,
        *(replace(BASE, **{name: value}).digest for name, value in OTHER.items()),
    }
    assert len(digests) == len(OTHER) + 1
    assert {len(digest) for digest in digests} == {16}


def test_a_digest_is_that_of_the_document() -> None:
    text = (
        '{"block_tokens":16,"dtype":"bfloat16","layout":"NHD","model":"m","rank":0,'
        '"revision":"main","world":8}'
    )
    assert BASE.text == text
    assert BASE.digest == blake2b(text.encode(), digest_size=16).digest()


@given(st.text(min_size=1), st.text(min_size=1))
def test_fields_do_not_run_into_each_other(one: str, two: str) -> None:
    moved = Namespace(model=one + two, revision="x" + two)
    kept = Namespace(model=one, revision=two + "x" + two)
    assert moved.digest != kept.digest


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""),
        ("model", None),
        ("revision", b"main"),
        ("layout", ""),
        ("dtype", 16),
        ("block_tokens", 0),
        ("block_tokens", 16.0),
        ("block_tokens", True),
        ("rank", -1),
        ("rank", 8),
        ("world", 0),
        ("world", "8"),
    ],
)
def test_namespaces_that_can_not_be(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(BASE, **{field: value})
    assert caught.value.field in (f"namespace.{field}", "namespace.rank")
    assert caught.value.rule


def test_outcomes() -> None:
    assert Outcome(b"k", "hit").hit
    assert not Outcome(b"k", "miss").hit
    assert [Outcome(b"k", status).ok for status in ("hit", "miss", "stored", "present")] == [
        True
    ] * 4
    assert not Outcome(b"k", "error", ConfigError("a", 1, "b")).ok
