"""A grammar in the making, in llguidance's Lark.

A part is a text that stands in a rule. Free text, thoughts among it, has no special tokens: marks
that are special tokens of the model stand in a grammar by their ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gllm_client.openai_server.errors import invalid

TEXT = "GLLM_TEXT"
_FORM = "structured_outputs.json"
GAP = "GLLM_GAP?"  # between thoughts and what follows them
_TERMINALS = [f"{TEXT}: /(.|\\n)*/", "GLLM_GAP: /[ \\n]{1,4}/"]
# Between the tokens of JSON; bounded, because small models then write blanks without end.
_WHITESPACE = r"\n?[ \t]{0,16}"
_START = re.compile(r'"(?:[^"\\\n]|\\.)*"|(?://|#)[^\n]*|/(?:[^/\\\n]|\\.)+/|(\bstart\b)')
_ANCHORS = re.compile(r"(\^?)((?:\\.|[^\\])*?)(\$?)", re.DOTALL)
_REGEX = re.compile(r"\\.|/|\n", re.DOTALL)
# As in the engine, the classes of a regular expression are ASCII.
_CLASSES = {
    "/": r"\/",
    "\n": r"\n",
    r"\d": "[0-9]",
    r"\D": "[^0-9]",
    r"\w": "[0-9a-zA-Z_]",
    r"\W": "[^0-9a-zA-Z_]",
    r"\s": r"[ \t\n\r\f\v]",
    r"\S": r"[^ \t\n\r\f\v]",
}


class Grammar:
    """`special_tokens`: the ids of the model's, by their texts."""

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        self._special = special_tokens
        self._rules = list(_TERMINALS)
        self._heads: dict[str, str] = {}
        words = sorted(special_tokens, key=len, reverse=True)
        self._tokens = re.compile("(" + ("|".join(map(re.escape, words)) or "(?!)") + ")")

    def finish(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._rules])

    def add(self, rules: str) -> None:
        self._rules.append(rules)

    def rule(self, body: str, options: str = "") -> str:
        name = f"gllm_{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def nested(self, lark: str) -> str:
        """A grammar with names and ignored text of its own."""
        return self.rule(f"%lark {{\n{lark}\n}}")

    def either(self, parts: Sequence[str]) -> str:
        return self.rule(" | ".join(parts))

    def text(self, text: str) -> str:
        """Exactly this text, in which special tokens are tokens."""
        parts = [part for part in self._tokens.split(text) if part]
        return " ".join(map(self._literal, parts)) or '""'

    def until(self, end: str) -> str:
        """Any text before `end`, and `end`."""
        head = self._tokens.split(end)[0]
        rest = end[len(head) :]
        if not head:
            return f"{TEXT} {self.text(end)}"
        if end not in self._heads:
            terminal = f"GLLM_{len(self._rules)}"
            self.add(f"{terminal}: {TEXT} {json.dumps(head)}")
            # Where a token follows, it tells the last `head` from those before.
            self._heads[end] = terminal if rest else self.rule(terminal, "[lazy]")
        return f"{self._heads[end]} {self.text(rest)}"

    def matching(self, pattern: str, end: str) -> str:
        """A text in which a JSON schema's `pattern` is found, and the first `end` after it."""
        anchors = _ANCHORS.fullmatch(pattern)
        if anchors is None:
            raise invalid("tools", f"the pattern {pattern[:200]!r} ends within an escape")
        begins, regex, ends = anchors.groups()
        head = self._tokens.split(end)[0]
        rest = end[len(head) :]
        mark = json.dumps(head)
        text = f"{'' if begins else TEXT} {regex_part(f'({regex})')} {'' if ends else TEXT} {mark}"
        if not rest:  # where a token follows, it tells the last `head` from those before
            text = rf"({text}) & ~({TEXT} {mark} /(.|\n)+/)"
        name = f"GLLM_{len(self._rules)}"
        self.add(f"{name}: {text}")
        return f"{name} {self.text(rest)}"

    def json(self, schema: Any, strict: bool = True, field: str = "tools", **options: Any) -> str:
        """JSON that keeps to `schema`, of a request's `field`. Without `strict`, unknown keywords
        are ignored.
        """
        if not isinstance(schema, dict):
            schema = {"anyOf": [schema]} if isinstance(schema, bool) else {}
        own = schema.get("x-guidance", {})
        if not isinstance(own, dict):
            raise invalid(field, "x-guidance in the schema is not an object")
        defaults = {"whitespace_pattern": _WHITESPACE, "lenient": not strict}
        return "%json " + json.dumps(schema | {"x-guidance": defaults | own | options})

    def form(self, form: Mapping[str, Any]) -> str | None:
        """A form of the sampling parameter structured_outputs; None if a part cannot say it."""
        if form.get("json") is not None or form.get("json_object"):
            schema = form.get("json") or {"type": "object"}
            options: dict[str, Any] = {}
            if form.get("disable_any_whitespace"):
                options = {"whitespace_flexible": False, "whitespace_pattern": None}
            elif form.get("whitespace_pattern") is not None:
                options = {"whitespace_pattern": form["whitespace_pattern"]}
            return self.json(_loaded(schema), field=_FORM, **options)
        if form.get("choice") is not None:
            return self.either([json.dumps(choice) for choice in form["choice"]])
        if form.get("regex"):
            return regex_part(form["regex"])
        lark = form.get("grammar")
        if lark is None or "::=" in lark:
            return None
        self.add(_START.sub(lambda found: "gllm_form" if found[1] else found[0], lark))
        return "gllm_form"

    def _literal(self, part: str) -> str:
        id = self._special.get(part)
        return json.dumps(part) if id is None else f"<[{id}]>"


def regex_part(regex: str) -> str:
    """A regular expression as Lark writes it."""
    return f"/{_REGEX.sub(lambda found: _CLASSES.get(found[0], found[0]), regex)}/"


def _loaded(schema: Any) -> Any:
    try:
        return json.loads(schema) if isinstance(schema, str) else schema
    except (ValueError, RecursionError) as error:
        raise invalid(_FORM, f"is not JSON ({error})") from None
