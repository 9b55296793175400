"""A Lark grammar of a text, made to one of the text as a JSON string holds it, between its quotes.

Owns the rewriting of terminals: a character that JSON escapes stands in them as its escape. Regular
expressions are read as Python reads them.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator

_PARTS = re.compile(
    r'"(?P<text>(?:[^"\\\n]|\\.)*)"(?P<range>\s*\.\.)?'
    r"|(?P<comment>(?://|#)[^\n]*)"
    r"|/(?P<regex>(?:[^/\\\n]|\\.)+)/(?P<flags>[a-z]*)"
    r"|%import\s+common\.(?P<name>\w+)[ \t]*(?P<as>->)?"
    r"|%(?P<word>\w+)"
)
# An escape, a set, the head of a group, or any other character of a regular expression.
_ATOMS = re.compile(
    r"(?P<escape>\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.))"
    r"|(?P<set>\[\^?\]?(?:[^]\\]|\\.)*\])"
    r"|(?P<group>\(\?P?<?[\w-]*[>:)]?)"
    r"|(?P<other>.)"
)
_ESCAPED = '"\\\n\r\t\b\f'
_PLAIN = r'[^"\\\x00-\x1F]'
_COMMON = {
    "LF": r"\n",
    "CR": r"\r",
    "NEWLINE": r"(\r?\n)+",
    "WS": r"[ \t\f\r\n]+",
    "WS_INLINE": r"[ \t]+",
}
_UNSAFE = ("ESCAPED_STRING", "SH_COMMENT", "CPP_COMMENT", "C_COMMENT", "SQL_COMMENT")


class Unquotable(ValueError):
    """A grammar with a part that cannot be rewritten; the message is the part."""


def quote(lark: str) -> str:
    """The grammar of the JSON. Raises Unquotable.

    The lexer never goes back: it takes a backslash for a part of the terminal that it is in, if
    that may hold one. So if a terminal may hold an escape after its first character, no other one
    may hold any.
    """
    is_open: dict[str, bool] = {}  # by the terminals that hold escapes

    def rewrite(part: re.Match[str]) -> str:
        regex = part["regex"] or _COMMON.get(part["name"] or "")
        if regex is not None:
            atoms = [_quote_atom(*found) for found in _atoms(regex, part["flags"] or "")]
            quoted = f"/{''.join(atoms)}/{part['flags'] or ''}"
            if quoted != part[0]:
                is_open[part[0]] = len(atoms) > 1
            return quoted if part["regex"] else f"{part['name']}: {quoted}"
        if part["text"] is None:
            return part[0]
        text = json.loads(part[0])
        if _escape(text) != text:
            is_open[part[0]] = _escape(text[1:]) != text[1:]
        return json.dumps(_escape(text))

    def checked(part: re.Match[str]) -> str:
        is_other = part["word"] not in (None, "ignore")
        if is_other or part["range"] or part["as"] or part["name"] in _UNSAFE:
            raise Unquotable(part[0])
        try:
            return rewrite(part)
        except (ValueError, re.error, FutureWarning):
            raise Unquotable(part[0]) from None

    quoted = _PARTS.sub(checked, lark)
    if len(is_open) > 1 and any(is_open.values()):
        raise Unquotable(" beside ".join(list(is_open)[:2]))
    return quoted


def _escape(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _atoms(regex: str, flags: str) -> Iterator[tuple[re.Match[str], int]]:
    mode = re.DOTALL if "s" in flags or "(?s" in regex else 0
    return ((atom, mode) for atom in _ATOMS.finditer(regex))


def _quote_atom(atom: re.Match[str], flags: int) -> str:
    text = atom[0]
    if atom["group"] or (atom["other"] and text not in ('"', ".")):
        return text
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # sets within sets, which Python has not
        accepts = re.compile(text, flags)
    found = [re.escape(_escape(char)) for char in _ESCAPED if accepts.fullmatch(char)]
    if not found:
        return text
    if atom["set"] or text == "." or text in (r"\s", r"\S", r"\D", r"\W"):
        inner = _PLAIN if text == "." else f"[{text}&&{_PLAIN}]"
        return f"(?:{'|'.join([inner, *found])})"
    return f"(?:{found[0]})"
