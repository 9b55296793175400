"""Translates GBNF, the grammars of llama.cpp and xgrammar (`root ::= ...`), to Lark grammars.

Owns the syntax of GBNF and the choice of lexemes. GBNF matches single characters, but llguidance
first splits the text into lexemes and makes every lexeme as long as possible. With `word "x"` and a
lexeme for `word ::= [a-z]+`, the x would always be part of the word, and no text would ever be
complete. So a grammar without recursion becomes one lexeme, and in any other grammar every lexeme
is a single character. The exception is a repetition of a large character set ([^"]*, [a-z]+),
because token masks for single characters would take milliseconds. It becomes a lexeme, as long as
possible, together with the literal or set that follows.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

# Sets with more characters than hexadecimal digits make masks of single characters slow.
MAX_NARROW = 22
# A bounded repetition of more characters than this is a lexeme too.
MAX_SHORT = 8
MAX_DEPTH = 100  # of parentheses

_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
_TOKEN = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)
    | (?P<rule>[\w-]+)\s*::=
    | (?P<name>[\w-]+)
    | "(?P<literal>(?:[^"\\\n]|\\.)*)"
    | \[(?P<chars>(?:[^]\\\n]|\\.)*)\]
    | (?P<repeat>[*+?]|\{\s*\d*\s*(?:,\s*\d*\s*)?\})
    | (?P<mark>[()|.])""",
    re.VERBOSE,
)
_CHAR = re.compile(
    r"\\(?:x(?P<x>[0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})|U(?P<U>[0-9a-fA-F]{8})|(?P<other>.))|(.)",
    re.DOTALL,
)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"} | {char: char for char in "\"'\\[]-^/"}
_LIMITS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class GbnfError(ValueError):
    """A grammar that is not GBNF; the message names the line."""


@dataclass(frozen=True)
class Literal:
    text: str


@dataclass(frozen=True)
class Chars:
    """One character of a set."""

    regex: str
    narrow: bool  # the set has few characters


@dataclass(frozen=True)
class Ref:
    name: str


@dataclass(frozen=True)
class Sequence:
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    node: Node
    low: int
    high: int | None  # None: any number of times


Node = Literal | Chars | Ref | Sequence | Choice | Repeat


def is_gbnf(grammar: str) -> bool:
    """Whether a line begins with `name ::=`, which never occurs in a Lark grammar."""
    return _RULE.search(grammar) is not None


def gbnf_to_lark(grammar: str) -> str:
    """Translate a GBNF grammar to llguidance's Lark. Raises GbnfError."""
    rules = _Parser(grammar).rules()
    if "root" not in rules:
        raise GbnfError("it has no rule named root, where a text begins")
    for name, node in rules.items():
        for ref in _refs(node):
            if ref not in rules:
                raise GbnfError(f"rule {name} uses {ref}, which is not defined")
    return _Writer(rules).write()


class _Parser:
    """Reads a grammar token by token. A rule ends where the next `name ::=` begins."""

    def __init__(self, grammar: str) -> None:
        self._tokens = list(_scan(grammar))  # (kind, text, line), the last of kind "end"
        self._at = 0

    def rules(self) -> dict[str, Node]:
        rules: dict[str, Node] = {}
        while self._kind != "end":
            kind, name, line = self._tokens[self._at]
            if kind != "rule":
                raise GbnfError(f"line {line}: expected `name ::=`, got {name!r}")
            if name in rules:
                raise GbnfError(f"line {line}: rule {name} is defined twice")
            self._at += 1
            rules[name] = self._choice(0)
        return rules

    @property
    def _kind(self) -> str:
        return self._tokens[self._at][0]

    def _choice(self, depth: int) -> Node:
        nodes = [self._sequence(depth)]
        while self._kind == "|":
            self._at += 1
            nodes.append(self._sequence(depth))
        return nodes[0] if len(nodes) == 1 else Choice(tuple(nodes))

    def _sequence(self, depth: int) -> Node:
        nodes: list[Node] = []
        while self._kind not in ("rule", "end", "|", ")"):
            node = self._item(depth)
            while self._kind == "repeat":
                _, text, line = self._tokens[self._at]
                node = Repeat(node, *_limits(text, line))
                self._at += 1
            nodes.append(node)
        if depth == 0 and self._kind == ")":
            raise GbnfError(f"line {self._tokens[self._at][2]}: nothing is open for this ')'")
        return nodes[0] if len(nodes) == 1 else Sequence(tuple(nodes))

    def _item(self, depth: int) -> Node:
        kind, text, line = self._tokens[self._at]
        self._at += 1
        if kind == "(":
            return self._group(depth + 1, line)
        if kind == "name":
            return Ref(text)
        if kind == "literal":
            return Literal("".join(char for char, _ in _chars(text, line)))
        if kind == "chars":
            return _char_set(text, line)
        if kind == ".":
            return Chars("/(?s:.)/", narrow=False)
        raise GbnfError(f"line {line}: {text!r} has nothing to repeat")

    def _group(self, depth: int, line: int) -> Node:
        if depth > MAX_DEPTH:
            raise GbnfError(f"line {line}: more than {MAX_DEPTH} parentheses are open")
        node = self._choice(depth)
        if self._kind != ")":
            raise GbnfError(f"line {line}: a '(' is never closed")
        self._at += 1
        return node


def _scan(grammar: str) -> Iterator[tuple[str, str, int]]:
    at = 0
    line = 1
    while at < len(grammar):
        match = _TOKEN.match(grammar, at)
        if match is None:
            raise GbnfError(f"line {line}: cannot read {grammar[at : at + 20]!r}")
        kind = match.lastgroup
        assert kind is not None
        text = match[kind]
        if kind != "space":
            yield (text if kind == "mark" else kind), text, line
        line += match[0].count("\n")
        at = match.end()
    yield "end", "the end", line


def _chars(text: str, line: int) -> Iterator[tuple[str, bool]]:
    """Yield the characters of a literal or a set, with True for an escaped character."""
    for match in _CHAR.finditer(text):
        kind = match.lastgroup
        if kind is None:
            yield match[0], False
        elif kind == "other":
            if match["other"] not in _ESCAPES:
                raise GbnfError(f"line {line}: unknown escape {match[0]!r}")
            yield _ESCAPES[match["other"]], True
        else:
            code = int(match[kind], 16)
            if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
                raise GbnfError(f"line {line}: {match[0]} is no character")
            yield chr(code), True


def _char_set(text: str, line: int) -> Chars:
    chars = list(_chars(text, line))
    negated = chars[:1] == [("^", False)]
    chars = chars[negated:]
    if not chars:
        raise GbnfError(f"line {line}: the set [{text}] is empty")
    ranges: list[tuple[int, int]] = []
    at = 0
    while at < len(chars):
        low = high = ord(chars[at][0])
        if at + 2 < len(chars) and chars[at + 1] == ("-", False):
            high = ord(chars[at + 2][0])
            at += 2
        if high < low:
            raise GbnfError(f"line {line}: a range of [{text}] ends before it begins")
        ranges.append((low, high))
        at += 1
    regex = "".join(rf"\x{{{low:x}}}-\x{{{high:x}}}" for low, high in ranges)
    narrow = not negated and sum(high - low + 1 for low, high in ranges) <= MAX_NARROW
    return Chars(f"/[{'^' if negated else ''}{regex}]/", narrow)


def _limits(text: str, line: int) -> tuple[int, int | None]:
    if text in _LIMITS:
        return _LIMITS[text]
    low, comma, high = (part.strip() for part in text[1:-1].partition(","))
    if not low and not high:
        raise GbnfError(f"line {line}: {text} says no number of times")
    if not comma:
        return int(low), int(low)
    limits = int(low or 0), int(high) if high else None
    if limits[1] is not None and limits[1] < limits[0]:
        raise GbnfError(f"line {line}: {text} ends before it begins")
    return limits


def _refs(node: Node) -> Iterator[str]:
    if isinstance(node, Ref):
        yield node.name
    elif isinstance(node, Repeat):
        yield from _refs(node.node)
    elif isinstance(node, (Sequence, Choice)):
        for part in node.nodes:
            yield from _refs(part)


class _Writer:
    """Writes every rule that root needs as a Lark rule, a lexeme, or both."""

    def __init__(self, rules: dict[str, Node]) -> None:
        self._rules = rules
        self._numbers = {name: number for number, name in enumerate(rules)}
        self._regular: set[str] = set()  # rules without recursion
        self._narrow: set[str] = set()  # rules without recursion whose character sets are small
        for name in _without_recursion(rules):  # a rule comes after the rules that it uses
            self._regular.add(name)
            if self._is_narrow(rules[name]):
                self._narrow.add(name)
        self._lines: dict[str, str] = {}  # Lark name -> definition
        self._due: list[str] = []  # Lark names of rules to be written

    def write(self) -> str:
        start = self._name("root", "R" if "root" in self._regular else "r")
        names = {str(number): name for name, number in self._numbers.items()}
        while self._due:
            lark_name = self._due.pop()
            node = self._rules[names[lark_name[1:]]]
            self._lines[lark_name] = self._write(node, lexeme=lark_name[0] == "R")
        lines = [f"start: {start}"]
        lines += [f"{name}: {body}" for name, body in self._lines.items()]
        return "\n".join(lines)

    def _name(self, rule: str, prefix: str) -> str:
        """A rule's name in Lark. A name in upper case is a lexeme."""
        name = f"{prefix}{self._numbers[rule]}"
        if name not in self._lines:
            self._lines[name] = ""
            self._due.append(name)
        return name

    def _is_narrow(self, node: Node) -> bool:
        """Whether all character sets of a node without recursion are small."""
        if isinstance(node, Chars):
            return node.narrow
        if isinstance(node, Ref):
            return node.name in self._narrow
        if isinstance(node, Repeat):
            return self._is_narrow(node.node)
        return isinstance(node, Literal) or all(map(self._is_narrow, node.nodes))

    def _is_long(self, node: Node) -> bool:
        """Whether a node without recursion is a long repetition of a large character set."""
        if not isinstance(node, Repeat) or not self._regular.issuperset(_refs(node)):
            return False
        return (node.high is None or node.high > MAX_SHORT) and not self._is_narrow(node)

    def _write(self, node: Node, lexeme: bool) -> str:
        if isinstance(node, Chars):
            return node.regex
        if isinstance(node, Ref):
            return self._name(node.name, "R" if lexeme else "r")
        if isinstance(node, Literal):
            parts = [node.text] if lexeme else node.text
            return " ".join(json.dumps(part) for part in parts) or '""'
        if isinstance(node, Choice):
            return f"({' | '.join(self._write(part, lexeme) for part in node.nodes)})"
        if isinstance(node, Repeat):
            if not lexeme and self._is_long(node):
                return self._long(node)
            times = f"{{{node.low},{'' if node.high is None else node.high}}}"
            return f"({self._write(node.node, lexeme)}){times}"
        if lexeme:
            return " ".join(self._write(part, lexeme) for part in node.nodes) or '""'
        return self._write_sequence(node)

    def _write_sequence(self, sequence: Sequence) -> str:
        """Write a sequence as a rule. A long repetition and the next literal or set: one lexeme."""
        written: list[str] = []
        nodes = list(sequence.nodes)
        while nodes:
            node = nodes.pop(0)
            if self._is_long(node) and nodes and isinstance(nodes[0], (Literal, Chars)):
                written.append(self._new_lexeme(Sequence((node, nodes.pop(0)))))
            else:
                written.append(self._write(node, lexeme=False))
        return " ".join(written) or '""'

    def _long(self, node: Repeat) -> str:
        lexeme = self._new_lexeme(Repeat(node.node, max(1, node.low), node.high))
        return lexeme if node.low else f"{lexeme}?"

    def _new_lexeme(self, node: Node) -> str:
        body = self._write(node, lexeme=True)
        name = f"L{len(self._lines)}"
        self._lines[name] = body
        return name


def _without_recursion(rules: dict[str, Node]) -> Iterator[str]:
    """The rules that use no recursive rule; a rule comes after the rules that it uses."""
    users = defaultdict(list)
    missing: dict[str, int] = {}
    for name, node in rules.items():
        used = set(_refs(node))
        missing[name] = len(used)
        for ref in used:
            users[ref].append(name)
    ready = [name for name, count in missing.items() if count == 0]
    while ready:
        name = ready.pop()
        yield name
        for user in users[name]:
            missing[user] -= 1
            if missing[user] == 0:
                ready.append(user)
