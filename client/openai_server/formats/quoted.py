"""A Lark grammar of a text, made to one of the text as a JSON string holds it, between its quotes.

Owns the rewriting of terminals: a character that JSON escapes stands in them as its escape. Regular
expressions are read as Python reads them.
"""

from __future__ import annotations

import json
import re
import warnings

_PARTS = re.compile(
    r'"(?P<text>(?:[^"\\\n]|\\.)*)"(?P<range>\s*\.\.)?'
    r"|(?://|#)[^\n]*"
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

    The lexer never goes back: it takes a backslash for the next of the terminal that it is in, if
    that may hold one. So of all texts and regular expressions only one may hold escapes.
    """
    escaped: set[str] = set()

    def rewrite(part: re.Match[str]) -> str:
        new = _quoted(part)
        if new != part[0]:
            escaped.add(part[0])
        return new

    quoted = _PARTS.sub(rewrite, lark)
    if len(escaped) > 1:
        raise Unquotable(" and ".join(sorted(escaped)[:2]))
    return quoted


def _quoted(part: re.Match[str]) -> str:
    is_other = part["word"] not in (None, "ignore")
    if is_other or part["range"] or part["as"] or part["name"] in _UNSAFE:
        raise Unquotable(part[0])
    try:
        if part["text"] is not None:
            text = json.loads(part[0])
            return part[0] if _escape(text) == text else json.dumps(_escape(text))
        if part["regex"] is not None:
            return f"/{_quote_regex(part['regex'], part['flags'])}/{part['flags']}"
    except (ValueError, re.error, FutureWarning):
        raise Unquotable(part[0]) from None
    if part["name"] in _COMMON:
        return f"{part['name']}: /{_quote_regex(_COMMON[part['name']], '')}/"
    return part[0]


def _escape(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _quote_regex(regex: str, flags: str) -> str:
    mode = re.DOTALL if "s" in flags or "(?s" in regex else 0
    return "".join(_quote_atom(atom, mode) for atom in _ATOMS.finditer(regex))


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
