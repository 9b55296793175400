"""JSON bodies: from bytes to a msgspec Struct. Every error names the field that is wrong. Pure."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from gllm_client.openai_server.errors import ApiError, invalid
from gllm_client.protocol import shorten, shown

T = TypeVar("T")
Json = dict[str, Any]  # an object
Body = bytes | Json  # of a request, or its fields
MAX_PROBLEM = 200  # characters

_PLACE = re.compile(r"(?s)(?P<problem>.*?)(?: - at `(?P<key>key in )?\$\.?(?P<path>.*)`)?")
_FIELD = re.compile(r"Object (?P<what>contains unknown|missing required) field `(?P<field>.*)`")
# A pair of surrogates, or one that may have none.
_SURROGATES = re.compile(
    rb"\\u(?:(?<!\\\\u)[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<half>[dD][89a-fA-F]))"
)
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}:,]', re.DOTALL)


def decode(body: Body) -> Json:
    """A body's fields; null means not given. Raises ApiError for what is not one JSON object."""
    try:
        value = parse(body) if isinstance(body, bytes) else body
    except RecursionError:
        raise _unreadable(body, "nested too deeply") from None
    except ValueError as error:
        raise _unreadable(body, f"not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object")
    return {name: v for name, v in value.items() if v is not None}


class RepeatedKey(ValueError):
    """An object in JSON has a key twice."""


def _once(pairs: list[tuple[str, Any]]) -> Json:
    values = dict(pairs)
    if len(values) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise RepeatedKey(f"key {shown(name)} comes twice")
    return values


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shorten(text)} is no finite number")
    return value


LENIENT = json.JSONDecoder(object_pairs_hook=_once)
_STRICT = json.JSONDecoder(object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite)


def parse(text: bytes) -> Any:
    """The value of JSON in UTF-8, without keys that come twice, numbers that no float can be, and
    halves of surrogate pairs. Raises ValueError, RecursionError.
    """
    value = _STRICT.decode(text.decode())
    if any(found["half"] for found in _SURROGATES.finditer(text)):
        json.dumps(value, ensure_ascii=False).encode()  # refuses halves
    return value


def _unreadable(body: Any, problem: str) -> ApiError:
    """The error of a body that cannot be read; it names the field that spoils it, if one does."""
    names: set[bytes] = set()
    for name, value in _fields(body):
        try:
            parse(value)
            is_good = name not in names
        except (RecursionError, ValueError):
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


def convert(value: Any, kind: type[T], path: str = "", strict: bool = True) -> T:
    """A JSON value as a msgspec type; its error names the field: `path`, then what is below it.

    Without `strict`, texts may stand for numbers.
    """
    try:
        return msgspec.convert(value, kind, strict=strict)
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
    elif not match["key"] and "..." not in place:  # msgspec does not tell which key it is
        for step in re.findall(r"[^.\[\]]+|\.\.\.", place):
            value = _below(value, step)
        problem = f"{shown(value)} is not valid ({problem[:1].lower()}{problem[1:]})"
    dot = "." if path and place and not place.startswith("[") else ""
    return invalid(f"{path}{dot}{place}", problem)


def _below(value: Any, step: str) -> Any:
    if isinstance(value, dict):
        return value.get(step)
    return value[int(step)] if isinstance(value, list) and step.isdecimal() else value
