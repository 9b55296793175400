"""JSON bodies: from bytes to a msgspec Struct. Every error names the field that is wrong. Pure."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from gllm_client.openai_server.errors import ApiError, invalid
from gllm_client.protocol import shorten, shown

T = TypeVar("T")
MAX_PROBLEM = 200  # characters

_PLACE = re.compile(r"(?s)(?P<problem>.*?)(?: - at `(?P<key>key in )?\$\.?(?P<path>.*)`)?")
_FIELD = re.compile(r"Object (?P<what>contains unknown|missing required) field `(?P<field>.*)`")
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}:,]', re.DOTALL)


def decode(body: bytes) -> dict[str, Any]:
    """A body's fields; null means not given. Raises ApiError for what is not one JSON object."""
    try:
        value = _load(body)
    except RecursionError:
        raise _unreadable(body, "nested too deeply") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise _unreadable(body, f"not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object")
    return {name: v for name, v in value.items() if v is not None}


def _load(text: bytes) -> Any:
    value = msgspec.json.decode(text)
    json.loads(text, object_pairs_hook=_once)
    return value


def _once(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {shown(name)} comes twice")


def _unreadable(body: bytes, problem: str) -> ApiError:
    """The error of a body that cannot be read; it names the field that spoils it, if one does."""
    names: set[bytes] = set()
    for name, value in _fields(body):
        try:
            _load(value)
            is_good = name not in names
        except (RecursionError, ValueError, msgspec.DecodeError):
            is_good = False
        if not is_good:
            return invalid(shorten(name.decode(errors="replace")), problem)
        names.add(name)
    return ApiError(400, f"the body: {problem}")


def _fields(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of an object, which need not be JSON themselves."""
    depth = 0
    name = b""
    last = b""
    start = 0
    for token in _TOKEN.finditer(body):
        mark = token[0]
        if depth == 1 and mark == b":":
            name = last[1:-1]
            start = token.end()
        elif depth == 1 and mark in b",}" and start:
            yield name, body[start : token.start()]
            start = 0
        depth += (mark in b"[{") - (mark in b"]}")
        last = mark


def convert(value: Any, kind: type[T], path: str = "") -> T:
    """A JSON value as a msgspec type; its error names the field: `path`, then what is below it."""
    try:
        return msgspec.convert(value, kind)
    except RecursionError:
        raise ApiError(400, f"{path or 'the body'}: nested too deeply", path or None) from None
    except msgspec.ValidationError as error:
        raise _explain(str(error), value, path) from None


def _explain(text: str, value: Any, path: str) -> ApiError:
    """The error of msgspec as ours: with the field's path and value."""
    match = _PLACE.fullmatch(text)
    assert match  # every part of the pattern is optional
    place = match["path"] or ""
    field = _FIELD.fullmatch(match["problem"])
    problem = match["problem"].replace("`", "")[:MAX_PROBLEM]  # it may hold the whole value
    if field:
        place = f"{place}.{field['field']}".removeprefix(".")
        problem = "unknown field" if "unknown" in field["what"] else "it is required"
    elif not match["key"]:
        for step in re.findall(r"[^.\[\]]+|\.\.\.", place):
            value = _below(value, step)
        problem = f"{shown(value)} is not valid ({problem[:1].lower()}{problem[1:]})"
    dot = "." if path and place and not place.startswith("[") else ""
    return invalid(f"{path}{dot}{place}", problem)


def _below(value: Any, step: str) -> Any:
    if isinstance(value, dict):
        return value.get(step)
    return value[int(step)] if isinstance(value, list) and step.isdecimal() else value
