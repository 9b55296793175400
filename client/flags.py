"""Makes command-line flags from configuration structs, so that a field is defined in one place.

Owns the conversion of a flag's text to the field's type. A flag's help text is the comment of its
field in the source code. Knows no field by name.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from gllm_client.protocol import shown


class UsageError(Exception):
    """The command line is wrong; the message is one sentence."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error as UsageError and refuses abbreviated flags."""

    def __init__(self, **options: Any) -> None:
        defaults: dict[str, Any] = {
            "allow_abbrev": False,
            "formatter_class": argparse.RawDescriptionHelpFormatter,
        }
        super().__init__(**defaults | options)

    def error(self, message: str) -> Any:
        raise UsageError(f"{message} (see {self.prog} --help)")


def dashed(arguments: list[str]) -> list[str]:
    """Replace `_` by `-` in flags (`--max_num_seqs=8`). Arguments after `--` do not change."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return [_dash(argument) for argument in arguments[:end]] + arguments[end:]


def add_struct(
    parser: argparse.ArgumentParser, title: str, struct: Any, skip: tuple[str, ...]
) -> None:
    """Add a flag for every field of `struct` except those in `skip`, in their own help group."""
    group = parser.add_argument_group(title)
    for name, options in _flags(struct).items():
        if name not in skip:
            group.add_argument(f"--{name.replace('_', '-')}", **options)


@cache
def _flags(struct: Any) -> dict[str, dict[str, Any]]:
    """What argparse is told, by field. Made once: many commands take the same structs."""
    comments = field_comments(struct)
    hints = get_type_hints(struct)
    flags = {}
    for field in msgspec.structs.fields(struct):
        options: dict[str, Any] = {"metavar": _metavar(hints[field.name])}
        words = [comments.get(field.name, "")]
        if hints[field.name] is bool:
            options |= {"nargs": "?", "const": "true"}
        elif get_origin(hints[field.name]) is tuple:
            options |= {"action": "append"}
            words.append("the flag may be repeated")
        if "default:" not in words[0] and not field.required:
            words.append(f"default: {_default(field)}")
        flags[field.name] = options | {
            "dest": _dest(struct, field.name),
            "default": argparse.SUPPRESS,
            "help": "; ".join(word for word in words if word).replace("%", "%%"),
        }
    return flags


def struct_texts(options: argparse.Namespace, struct: Any) -> dict[str, Any]:
    """The given fields, as text (a list of texts for a repeatable field)."""
    given = vars(options)
    names = [name for name in struct.__struct_fields__ if _dest(struct, name) in given]
    return {name: given[_dest(struct, name)] for name in names}


def struct_values(options: argparse.Namespace, struct: Any) -> dict[str, Any]:
    """The given fields, converted to their types. Raises UsageError, which names the flag."""
    values = {}
    hints = get_type_hints(struct, include_extras=True)
    for name, text in struct_texts(options, struct).items():
        try:
            values[name] = _convert(text, hints[name])
        except ValueError as error:
            flag = name.replace("_", "-")
            problem = str(error).replace("`", "")
            raise UsageError(f"--{flag}: {shown(text)}: {problem}") from None
    return values


def _convert(text: str, hint: Any) -> Any:
    if get_origin(hint) is dict:
        return msgspec.json.decode(text, type=hint)
    value = msgspec.convert(text, hint, strict=False)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a finite number is expected")
    return value


def field_comments(struct: Any) -> dict[str, str]:
    """The source comment of every field: the lines above the field, then the one beside it."""
    comments: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(struct).splitlines():
        if match := re.fullmatch(r"    # (.*)", line):
            above.append(match[1])
            continue
        if match := re.fullmatch(r"    (\w+): .*?(?:  # (.*))?", line):
            comments[match[1]] = " ".join([*above, match[2] or ""]).strip()
        above = []
    return comments


def _dash(argument: str) -> str:
    name, separator, value = argument.partition("=")
    return name.replace("_", "-") + separator + value if name.startswith("--") else argument


def _dest(struct: Any, name: str) -> str:
    return f"{struct.__name__}.{name}"


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, get_args(hint))) + "}"
    if get_origin(hint) is tuple:
        return _metavar(get_args(hint)[0])
    members = [member for member in get_args(hint) if member is not type(None)]
    if len(members) == 1:
        return _metavar(members[0])
    names = {int: "INT", float: "FLOAT", bool: "BOOL", str: "TEXT"}
    return names.get(hint, "JSON")


def _default(field: Any) -> str:
    default = field.default
    if default is msgspec.NODEFAULT:
        default = field.default_factory()
    if isinstance(default, bool):
        return str(default).lower()
    return "none" if default in (None, "", ()) or default == {} else str(default)
