"""Triton's interpreter without a third of its work, which changes nothing.

For each launch of a kernel it replaces the functions of Triton's language by its own. Then it does
so again for each call of a function in the kernel, where they have been replaced already, and each
time it looks through all names of the language for those functions.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

from triton import language
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
_LANGUAGE = SimpleNamespace(__globals__={"tl": language, "core": language.core})
_builtins: dict[Any, list[tuple[str, Any]]] = {}  # of a module or a class: their names


class _Once(interpreter._LangPatchScope):
    """What a launch has replaced, until it ends."""

    is_open = False

    def restore(self) -> None:
        super().restore()
        _Once.is_open = False


def _patch_once(fn: Any) -> Any:
    del fn
    if _Once.is_open:
        return interpreter._LangPatchScope()  # nothing is to be restored
    _Once.is_open = True
    scope = _Once()
    scope._changes = _patch_lang(_LANGUAGE)._changes
    return scope


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    if package not in _builtins:
        members = inspect.getmembers(package)
        _builtins[package] = [each for each in members if language.core.is_builtin(each[1])]
    for name, member in _builtins[package]:
        interpreter._patch_attr(package, name, member, builder, scope)


def quicken() -> None:
    """Of this process. A kernel does not launch another one, and threads do not share kernels."""
    interpreter._patch_lang = _patch_once
    interpreter._patch_builtin = _patch_builtin
