"""The parser of JSON: what it takes is what others read too, without what they differ in."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_client.openai_server.body import RepeatedKey, parse

VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(VALUES, st.booleans())
def test_what_is_json_is_read(value: Any, is_ascii: bool) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii)
    if "Infinity" in text and any(map(math.isinf, numbers(value))):
        with pytest.raises(ValueError, match="no finite number"):
            parse(text.encode())
    else:
        assert parse(text.encode()) == value


def numbers(value: Any) -> list[float]:
    if isinstance(value, list | dict):
        parts = value.values() if isinstance(value, dict) else value
        return [number for part in parts for number in numbers(part)]
    return [value] if isinstance(value, float) else []


@given(st.binary(max_size=20) | st.text('{}[]",:\\ud8c01eE.-+ \n\ttrufalsn\0', max_size=20))
def test_any_bytes_are_read_or_refused_as_msgspec_does(text: bytes | str) -> None:
    """But for keys that come twice."""
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    try:
        expected = msgspec.json.decode(raw)
    except (msgspec.DecodeError, ValueError):
        with pytest.raises(ValueError):
            parse(raw)
        return
    try:
        assert parse(raw) == expected
    except RepeatedKey:
        assert raw.count(b"{")


@pytest.mark.parametrize(
    "text",
    [b'"\\ud800"', b'["\\uDBFF\\u0041"]', b'{"\\udfff": 1}', b'"\xed\xa0\x80"', b"\xef\xbb\xbf1"]
    + [b'"\\\\ud83d\\ude00"', b'"\\ude00\\ud83d"', b'"\\ud83d\\ud83d\\ude00"']
    + [b"NaN", b"[-Infinity]", b"1e400", b'{"a": 1, "a": 1}', b'[{"b": {"a": 1, "a": 2}}]', b"01"]
    + [b"9" * 5000, b'"\n"', b"1 2", b""],
)
def test_what_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):
        parse(text)


def test_pairs_of_surrogates_are_one_character() -> None:
    assert parse(b'"\\\\\\ud83d\\uDE00"') == "\\\U0001f600"
    assert parse(b'["\\ud83d\\ude00", "\\\\ud800"]') == ["\U0001f600", "\\ud800"]
