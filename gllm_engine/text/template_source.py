"""The source of a chat template: its Jinja environment, and the analysis of its syntax tree.

Only for the renderer process: a hostile template may take as long to parse as to render.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn, TypeGuard

import jinja2
from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Template:
    """One chat template. Its properties raise Jinja's errors for a source that cannot be parsed."""

    def __init__(self, source: str) -> None:
        self._source = source

    def render(self, variables: dict[str, Any]) -> str:
        """Render the template. It is a program and may raise any error."""
        return self._compiled.render(variables)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return _ENVIRONMENT.from_string(self._source)

    @cached_property
    def _tree(self) -> nodes.Template:
        return _ENVIRONMENT.parse(self._source)

    @cached_property
    def names(self) -> frozenset[str]:
        """All variables that the template reads, including those that it sets itself."""
        found = self._tree.find_all(nodes.Name)
        return frozenset(name.name for name in found if name.ctx == "load")

    @cached_property
    def variables(self) -> set[str]:
        """Variables that the template reads but does not set."""
        return find_undeclared_variables(self._tree)

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template loops over the content of messages, so content may be parts."""
        names = _ContentNames(self._tree)
        return any(names.is_content(loop.iter) for loop in self._tree.find_all(nodes.For))

    @cached_property
    def tells_strings(self) -> bool:
        """Whether the template tests for strings, so content may also be a string."""
        return any(test.name == "string" for test in self._tree.find_all(nodes.Test))


class _Generation(Extension):
    """{% generation %} marks the assistant's text for training. This tag renders only its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _dict(*args: Any, **values: Any) -> dict[Any, Any]:
    """Replaces `dict` in templates: a function has no methods that lead to other objects."""
    return dict(*args, **values)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter escapes it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> Environment:
    """The environment that templates are written for: transformers'. Tests compare the two."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    del environment.globals["lipsum"]
    environment.globals["dict"] = _dict
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.filters["tojson"] = _tojson
    return environment


_ENVIRONMENT = _environment()


class _ContentNames:
    """The variables of a template that hold conversations, messages and contents of messages.

    The search starts at `messages` and follows loops, assignments and macro calls. It ignores
    scopes: a name that holds content anywhere counts as content everywhere.
    """

    def __init__(self, tree: nodes.Template) -> None:
        self._conversations = {"messages"}
        self._messages: set[str] = set()
        self._contents: set[str] = set()
        loops = list(tree.find_all(nodes.For))
        assignments = list(_assignments(tree))
        grew = True
        while grew:
            grew = self._learn(loops, assignments)

    def is_content(self, value: nodes.Node) -> bool:
        """Whether an expression is the content of a message: a variable, or message.content."""
        return any(
            _is_name(source, self._contents)
            or (_is_content_of(source) and self._is_message(source.node))
            for source in _sources(value)
        )

    def _learn(self, loops: list[nodes.For], assignments: list[tuple[str, nodes.Node]]) -> bool:
        """Follow every loop and assignment once. Returns whether that added names."""
        before = len(self)
        for loop in loops:
            if isinstance(loop.target, nodes.Name) and self._is_conversation(loop.iter):
                self._messages.add(loop.target.name)
        for name, value in assignments:
            if self.is_content(value):
                self._contents.add(name)
            elif self._is_message(value):
                self._messages.add(name)
            elif self._is_conversation(value):
                self._conversations.add(name)
        return len(self) > before

    def __len__(self) -> int:
        return len(self._conversations) + len(self._messages) + len(self._contents)

    def _is_conversation(self, value: nodes.Node) -> bool:
        return any(_is_name(source, self._conversations) for source in _sources(value))

    def _is_message(self, value: nodes.Node) -> bool:
        """Whether an expression is a message: a variable, or messages[0]."""
        return any(
            _is_name(source, self._messages)
            or (_is_element(source) and self._is_conversation(source.node))
            for source in _sources(value)
        )


def _assignments(tree: nodes.Template) -> Iterator[tuple[str, nodes.Node]]:
    """Pairs of a variable and its assigned expression, from {% set %} and from macro calls."""
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name):
            yield assignment.target.name, assignment.node
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in macros:
            for parameter, value in zip(macros[call.node.name].args, call.args, strict=False):
                yield parameter.name, value


def _sources(value: nodes.Node | None) -> Iterator[nodes.Node]:
    """The expressions that a value comes from, without filters, slices and conditionals.

    message.get("content") is message["content"]."""
    if isinstance(value, nodes.Filter) or _is_slice(value):
        yield from _sources(value.node)
    elif isinstance(value, nodes.CondExpr):
        yield from _sources(value.expr1)
        yield from _sources(value.expr2)
    elif isinstance(value, nodes.Or):
        yield from _sources(value.left)
        yield from _sources(value.right)
    elif (
        isinstance(value, nodes.Call)
        and isinstance(value.node, nodes.Getattr)
        and value.node.attr == "get"
        and value.args
    ):
        yield nodes.Getitem(value.node.node, value.args[0], "load")
    elif value is not None:
        yield value


def _is_name(value: nodes.Node, names: set[str]) -> bool:
    return isinstance(value, nodes.Name) and value.name in names


def _is_slice(value: nodes.Node | None) -> TypeGuard[nodes.Getitem]:
    return isinstance(value, nodes.Getitem) and isinstance(value.arg, nodes.Slice)


def _is_element(value: nodes.Node) -> TypeGuard[nodes.Getitem]:
    """Whether an expression is like messages[0], and not like message["content"]."""
    return isinstance(value, nodes.Getitem) and _key(value) is None


def _is_content_of(value: nodes.Node) -> TypeGuard[nodes.Getattr | nodes.Getitem]:
    """Whether an expression is message.content or message["content"]."""
    return _key(value) == "content"


def _key(value: nodes.Node) -> str | None:
    """The key: "content" for message.content and message["content"]; None for any other."""
    if isinstance(value, nodes.Getattr):
        return value.attr
    if isinstance(value, nodes.Getitem) and isinstance(value.arg, nodes.Const):
        return value.arg.value if isinstance(value.arg.value, str) else None
    return None
