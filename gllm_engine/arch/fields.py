"""Typed reading of config.json. Every error gives the key, its value and the allowed values.

This module knows JSON and nothing of models.
"""

from __future__ import annotations

import json
from typing import Any

from gllm_engine.files import shown

# Models have up to ten. Every sequence may forbid all of them, and their memory is reserved.
MAX_EOS_TOKEN_IDS = 256
_MAX_FLOAT32 = 3.4e38


class ArchError(ValueError):
    """A config that is not supported; the message is one sentence for the user."""


class LoadError(ValueError):
    """A checkpoint that does not match its config; the message names the file and the tensor."""


def _is_real(value: Any) -> bool:
    """Whether it is a number above 0 that a float32 can hold."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 < value <= _MAX_FLOAT32


class Fields:
    """A JSON object with a family's defaults for absent keys.

    A null key is absent and has no default. As a truth value it is false.
    """

    def __init__(self, values: dict[str, Any], name: str, defaults: dict[str, Any]) -> None:
        self.name = name
        self.defaults = defaults
        self._nulls = {k for k, v in values.items() if v is None}
        self._given = set(values) - self._nulls
        self._values = {k: v for k, v in (defaults | values).items() if v is not None}
        self._read: set[str] = set()

    @property
    def empty(self) -> bool:
        return not self._values

    def with_defaults(self, **values: Any) -> Fields:
        """A copy with values for keys that are absent or null."""
        copy = Fields(self._values, self.name, values)
        copy.defaults = self.defaults | values
        copy._nulls = self._nulls
        copy._read = self._read  # what is read of a copy is read
        return copy

    def child(
        self,
        *keys: str,
        defaults: dict[str, Any] | None = None,
        over: dict[str, Any] | None = None,
    ) -> Fields:
        """The object at the first of `keys` that is present and not empty, or an empty object.

        `defaults`: for its absent keys. `over`: overrides its keys.
        """
        for key in keys:
            if value := self._find(key):
                if not isinstance(value, dict):
                    raise self._wrong(key, value, "an object")
                return Fields(value | (over or {}), f"{self.name}: {key}", defaults or {})
        return Fields(over or {}, self.name, defaults or {})

    def has(self, key: str) -> bool:
        return self._find(key) is not None

    def truth(self, key: str) -> bool:
        """true or false, or a number, of which only 0 is false."""
        value = self._get(key, None)
        if not isinstance(value, (bool, int)):
            raise self._wrong(key, value, "true, false or a whole number")
        return bool(value)

    def choices(self, key: str, length: int, allowed: tuple[str, ...]) -> list[str] | None:
        """A list of `length` words out of `allowed`, or a string of letters out of it; None if the
        key is absent.
        """
        value = self._find(key)
        if value is None:
            return None
        words = list(value) if isinstance(value, (list, str)) else []
        if len(words) != length or any(word not in allowed for word in words):
            raise self._wrong(key, value, f"a list of {length} of {', '.join(allowed)}")
        return words

    def flags(self, key: str, length: int) -> list[bool] | None:
        """A list of `length` truth values, true and false or 1 and 0; None if the key is absent or
        the list empty.
        """
        value = self._find(key)
        if value is None or value == []:
            return None
        if (
            not isinstance(value, list)
            or len(value) != length
            or any(v not in (0, 1) for v in value)
        ):
            raise self._wrong(key, value, f"a list of {length} of 0 and 1")
        return [bool(v) for v in value]

    def count(self, key: str, default: int | None = None, most: int = 2**24, least: int = 1) -> int:
        """A whole number from `least` to `most`; layers and experts have a smaller `most`."""
        value = self._get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._wrong(key, value, f"a whole number from {least} to {most}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A number above 0 that a float32 can hold."""
        value = self._get(key, default)
        if not _is_real(value):
            raise self._wrong(key, value, "a number above 0")
        return float(value)

    def reals(self, key: str, length: int) -> tuple[float, ...]:
        """A list of `length` numbers above 0 that a float32 can hold."""
        value = self._get(key, None)
        if not isinstance(value, list) or len(value) != length or not all(map(_is_real, value)):
            raise self._wrong(key, value, f"a list of {length} numbers above 0")
        return tuple(float(number) for number in value)

    def optional_real(self, key: str) -> float | None:
        return self.real(key) if self.has(key) else None

    def real_or_zero(self, key: str) -> float | None:
        """As optional_real; 0 is None too, for a key that switches something on."""
        return None if self._find(key) == 0 else self.optional_real(key)

    def optional_count(self, key: str) -> int | None:
        return self.count(key) if self.has(key) else None

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key, default and key not in self._nulls)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """One of the words `allowed`."""
        value = self._get(key, default)
        if not isinstance(value, str) or value not in allowed:
            raise self._wrong(key, value, " or ".join(map(json.dumps, allowed)))
        return value

    def numbers(
        self, key: str, kind: str = "token id", most: int = MAX_EOS_TOKEN_IDS
    ) -> tuple[int, ...]:
        """One number from 0 on or a list of at most `most`; empty if absent.

        `kind`: what they number, for error messages.
        """
        value = self._find(key, [])
        numbers = value if isinstance(value, list) else [value]
        wrong = any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in numbers)
        if wrong or len(numbers) > most:
            raise self._wrong(key, value, f"a {kind} or a list of at most {most} of them")
        return tuple(dict.fromkeys(numbers))

    def sizes(self, key: str, length: int, most: int = 2**24) -> tuple[int, ...] | None:
        """A list of `length` whole numbers from 1 to `most`; None if the key is absent."""
        value = self._find(key)
        if value is None:
            return None
        is_list = isinstance(value, list) and len(value) == length
        if not is_list or any(type(n) is not int or not 1 <= n <= most for n in value):
            raise self._wrong(key, value, f"a list of {length} whole numbers from 1 to {most}")
        return tuple(value)

    def counts(
        self, key: str, length: int, default: int | None = None, most: int = 2**24
    ) -> tuple[int, ...]:
        """As sizes; one number is that of all."""
        listed = self.sizes(key, length, most) if isinstance(self._find(key), list) else None
        return listed or (self.count(key, default, most),) * length

    def keys(self) -> list[str]:
        """The keys that are present, sorted."""
        return sorted(self._values)

    def require(self, **expected: Any) -> None:
        """Raise ArchError if a key has another value than expected. Absent keys are allowed."""
        for key, allowed in expected.items():
            value = self._find(key, allowed)
            if value != allowed:
                raise self._wrong(key, value, json.dumps(allowed))

    def ignore(self, *keys: str) -> None:
        """Keys of published configs that have no effect in this family, whatever their values."""
        self._read.update(keys)

    def allow_only(self, keys: set[str]) -> None:
        """Raise ArchError for any other key, because it could change the model's arithmetic."""
        unknown = sorted(set(self._values) - keys)
        if unknown:
            raise ArchError(f"{self.name}: key {shown(repr(unknown[0]))} is not supported")

    def unread(self) -> dict[str, Any]:
        """The keys that were given and that nobody has read, with their values."""
        return {key: self._values[key] for key in sorted(self._given - self._read)}

    def _find(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return self._values.get(key, default)

    def _get(self, key: str, default: Any) -> Any:
        value = self._find(key, default)
        if value is None:
            raise ArchError(f"{self.name}: {key} is missing")
        return value

    def _wrong(self, key: str, value: Any, allowed: str) -> ArchError:
        return ArchError(
            f"{self.name}: {key} is {shown(repr(value))}, but only {allowed} is supported"
        )
