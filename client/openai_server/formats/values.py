"""Arguments that are written as bare text: which JSON they are, by the tool's schema."""

from __future__ import annotations

import json
from typing import Any, NoReturn

_PYTHON = {"True": "true", "False": "false", "None": "null"}
_KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
_MAX_SCHEMAS = 200
Types = frozenset[str]  # names of JSON types; empty: any


def definition(schema: Any, name: str) -> Any:
    """The schema of the property `name`; {} if there is none."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    found = properties.get(name, {}) if isinstance(properties, dict) else {}
    if isinstance(found, dict) and isinstance(found.get("$ref"), str):
        return _follow(schema, found["$ref"]) or {}
    return found


def types_of(schema: Any, root: Any, budget: list[int] | None = None) -> Types:
    """The JSON types that a schema allows, as far as it is easily told.

    `budget`: how many more schemas are looked into; references could make them endless.
    """
    budget = budget or [_MAX_SCHEMAS]
    budget[0] -= 1
    if not isinstance(schema, dict) or budget[0] <= 0:
        return frozenset()
    if isinstance(schema.get("$ref"), str):
        return types_of(_follow(root, schema["$ref"]), root, budget)
    named = schema.get("type")
    if isinstance(named, str):
        return frozenset([named])
    if isinstance(named, list):
        return frozenset(name for name in named if isinstance(name, str))
    if chosen := choices(schema):
        return frozenset(map(_kind, chosen))
    for word in ("anyOf", "oneOf"):
        if parts := _list(schema.get(word)):
            found = [types_of(part, root, budget) for part in parts]
            return frozenset().union(*found) if all(found) else frozenset()
    for part in _list(schema.get("allOf")):
        if types := types_of(part, root, budget):
            return types
    return frozenset()


def choices(schema: Any) -> list[Any]:
    """The values that a schema lists; [] if it lists none."""
    if not isinstance(schema, dict):
        return []
    return [schema["const"]] if "const" in schema else _list(schema.get("enum"))


def to_json(text: str, types: Types) -> str:
    """The JSON of an argument; a text that is none of `types` is a string."""
    word = text.strip()
    if types:
        word = _PYTHON.get(word, word)
    try:
        kind = _kind(json.loads(word, parse_constant=_refuse))
    except (ValueError, RecursionError):
        kind = "string"
    wanted = not types or kind in types or "string" not in types
    if kind == "integer":
        wanted = wanted or "number" in types
    return word if wanted and kind != "string" else json_string(text)


def json_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def string_part(text: str) -> str:
    """A part of a string, as JSON writes it between the quotes."""
    return json_string(text)[1:-1]


def is_json(text: str, kind: type = object) -> bool:
    """Whether `text` is JSON, of a Python type."""
    try:
        return isinstance(json.loads(text), kind)
    except (ValueError, RecursionError):
        return False


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "object" if isinstance(value, dict) else "array")


def _follow(root: Any, reference: str) -> Any:
    """The schema at a reference such as #/$defs/Place; None if it is none of this schema's."""
    found = root
    for step in reference.removeprefix("#").split("/")[1:]:
        found = found.get(step) if isinstance(found, dict) else None
    return found if reference.startswith("#") else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)
