"""Sampling parameters: every field, its range and its default, validated once on arrival.

This module owns the validation of a request's parameters and its error messages. It knows nothing
of tokens, text or tensors.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import msgspec

MAX_LOGPROBS = 20
MAX_N = 64
MAX_STOPS = 64
MAX_TENANT_CHARS = 128
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_ALLOWED_TOKEN_IDS = 16384
MAX_CHOICES = 1024  # compiling 10,000 choices takes seconds
UNBOUNDED = 2**62


class InvalidField(ValueError):
    """An invalid request field; the message names the field and its limit."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class StructuredOutputs(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """The form that the output must have. Exactly one of the first six fields is set.

    The two white space fields are allowed only with `json` or `json_object`.
    """

    json: str | None = None  # a JSON schema, as JSON text
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None  # Lark, or GBNF (root ::= ...)
    json_object: bool = False  # any JSON object
    structural_tag: str | None = None  # JSON text: {"structures": [...], "triggers": [...]}
    whitespace_pattern: str | None = None  # regex for white space between JSON tokens
    disable_any_whitespace: bool = False


FORMS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


class SamplingParams(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """How tokens are chosen and when generation stops. Defaults are those of vLLM.

    `max_tokens` None: up to the model's length. `temperature` 0: greedy. `top_k` 0 or -1: off.
    `seed` None: a random seed. `priority`: lower values are served sooner. `cache_salt`: prompts
    with different salts never share prefix-cache pages. `tenant`: in whose turn the request is
    served; turns are fair between tenants. `allowed_token_ids` (): all.
    `truncate_prompt_tokens`: only the prompt's last tokens are read, at most this many; -1: as many
    as leave room for `max_tokens` tokens of output (1 if that is None).
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True  # false is refused
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    truncate_prompt_tokens: int | None = None
    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        for field in ("stop", "bad_words"):  # Python callers may give one string or a list
            value = getattr(self, field)
            strings = (value,) if isinstance(value, str) else tuple(value)
            msgspec.structs.force_setattr(self, field, strings)
        for field, (low, high) in _RANGES.items():
            value = getattr(self, field)
            if value is not None and not low <= value <= high:
                limit = "2**62" if high == UNBOUNDED else high
                raise InvalidField(field, f"{shown(value)} is outside [{low}, {limit}]")
        for field, most in _MOST.items():
            values = getattr(self, field)
            if len(values) > most:
                raise InvalidField(field, f"{len(values)} entries given, at most {most}")
            if "" in values:
                raise InvalidField(field, "an empty string is not allowed")
        if len(self.tenant) > MAX_TENANT_CHARS:
            problem = f"{len(self.tenant)} characters given, at most {MAX_TENANT_CHARS}"
            raise InvalidField("tenant", problem)
        for field in ("top_p", "repetition_penalty"):
            if getattr(self, field) == 0:
                raise InvalidField(field, "0 is not allowed, it must be greater than 0")
        if self.truncate_prompt_tokens == 0:
            raise InvalidField("truncate_prompt_tokens", "0 is not allowed, it leaves no prompt")
        if not self.spaces_between_special_tokens:
            raise InvalidField(
                "spaces_between_special_tokens",
                "false is not supported; text is spelled as the tokenizer spells it",
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidField(
                "min_tokens", f"{self.min_tokens} is greater than max_tokens={self.max_tokens}"
            )
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                problem = f"{bias} for token {shown(token)} is outside [-100, 100]"
                raise InvalidField("logit_bias", problem)
        if self.structured_outputs is not None:
            _check_structured(self.structured_outputs)


def _check_structured(asked: StructuredOutputs) -> None:
    given = [form for form in FORMS if getattr(asked, form) not in (None, False)]
    if len(given) != 1:
        problem = f"exactly one of {', '.join(FORMS)} is needed, got {given or 'none'}"
        raise InvalidField("structured_outputs", problem)
    if asked.choice == ():
        raise InvalidField("structured_outputs", "choice is empty")
    num_choices = len(asked.choice or ())
    if num_choices > MAX_CHOICES:
        problem = f"choice has {num_choices} entries, at most {MAX_CHOICES} are allowed"
        raise InvalidField("structured_outputs", problem)
    for field in ("whitespace_pattern", "disable_any_whitespace"):
        if getattr(asked, field) and given[0] not in ("json", "json_object"):
            problem = f"{field} goes with json or json_object, not with {given[0]}"
            raise InvalidField("structured_outputs", problem)
    if asked.whitespace_pattern is not None and asked.disable_any_whitespace:
        problem = "whitespace_pattern and disable_any_whitespace exclude each other"
        raise InvalidField("structured_outputs", problem)


_MOST = {
    "stop": MAX_STOPS,
    "bad_words": MAX_STOPS,
    "stop_token_ids": MAX_STOP_TOKEN_IDS,
    "logit_bias": MAX_LOGIT_BIAS,
    "allowed_token_ids": MAX_ALLOWED_TOKEN_IDS,
}

# Fields whose value may be JSON text.
_IN_JSON = ("stop_token_ids", "allowed_token_ids", "logit_bias", "structured_outputs")

# Inclusive bounds. NaN compares false with both bounds, so it is refused too.
_RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (1, UNBOUNDED),
    "min_tokens": (0, UNBOUNDED),
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, UNBOUNDED),
    "min_p": (0.0, 1.0),
    "seed": (-(2**63), 2**63 - 1),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.0, 100.0),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "n": (1, MAX_N),
    "truncate_prompt_tokens": (-1, UNBOUNDED),
    "priority": (-(2**31), 2**31 - 1),
}


def parse_sampling(values: dict[str, Any]) -> SamplingParams:
    """Build SamplingParams from loosely typed values (JSON, request parameters).

    Numbers and booleans may be strings ("temperature": "0"). Lists may be one string or JSON text.
    None (JSON null) is a value for fields that allow None (max_tokens: no limit); for other fields
    it means "not given". Raises InvalidField, which names the field, for an unknown key, a wrong
    type or a value out of range.
    """
    known = SamplingParams.__struct_fields__
    converted: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            problem = f"unknown sampling parameter; known are {', '.join(known)}"
            raise InvalidField(shorten(key), problem)
        if value is None and key not in _NULLABLE:  # JSON null means "not given"
            continue
        converted[key] = _coerce(key, value)
    return SamplingParams(**converted)


def _coerce(key: str, value: Any) -> Any:
    try:
        converted = msgspec.convert(_loosen(key, value), _HINTS[key], strict=False)
        msgspec.json.encode(converted)  # the engine gets UTF-8; raises for a lone surrogate
        return converted
    except InvalidField:
        raise
    except RecursionError:
        raise InvalidField(key, "nested too deeply") from None
    except UnicodeEncodeError:
        raise InvalidField(key, "contains half of a surrogate pair") from None
    except (ValueError, OverflowError) as error:
        problem = str(error).replace("`", "").rstrip(".")
        raise InvalidField(key, f"{shown(value)} is not valid ({problem})") from None


def _loosen(key: str, value: Any) -> Any:
    """Undo loose typing: JSON in a string, one value for a list, a whole number as a float."""
    if isinstance(value, bool) and key not in _BOOLEANS:
        raise InvalidField(key, f"{value} is not valid (expected a number, got a boolean)")
    if key in ("stop", "bad_words") and isinstance(value, str):
        return [value]
    if key in _IN_JSON and isinstance(value, str):
        value = decode_json(key, value)
    if key in ("stop_token_ids", "allowed_token_ids") and isinstance(value, int):
        value = [value]
    if key == "allowed_token_ids" and value == []:
        raise InvalidField(key, "the list is empty, at least one token must be allowed")
    if key == "structured_outputs" and isinstance(value, dict):
        return _loosen_structured(value)
    if (
        isinstance(value, float)
        and key in _INTEGERS
        and math.isfinite(value)
        and value == int(value)
    ):
        return int(value)
    return value


def _loosen_structured(given: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not null, without vLLM's fields that have no meaning here.

    vLLM's clients send all of vLLM's fields, so these are accepted at their default values.
    """
    fields = {field: value for field, value in given.items() if value is not None}
    fields.pop("disable_fallback", None)  # there is only one compiler
    for field in ("disable_additional_properties", "_backend", "_backend_was_auto"):
        value = fields.pop(field, False)
        if value is not False:
            problem = f"{field} {shown(value)} is not supported; leave it out"
            raise InvalidField("structured_outputs", problem)
    for field in ("json", "structural_tag"):
        if not isinstance(fields.get(field, ""), str):
            fields[field] = json.dumps(fields[field])
    return fields


def decode_json(
    field: str, text: str, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Decode JSON text. `make_object(pairs)` makes its objects; without it they are dicts.

    Raises InvalidField if the text is not JSON, is nested too deeply, has an integer with more
    digits than Python accepts, or has half of a surrogate pair, which UTF-8 cannot encode.
    """
    try:
        value = json.loads(text, object_pairs_hook=make_object)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except InvalidField:
        raise
    except RecursionError:
        raise InvalidField(field, "nested too deeply") from None
    except UnicodeEncodeError:
        raise InvalidField(field, "contains half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise InvalidField(field, f"not valid JSON ({error})") from None
    except ValueError:
        limit = sys.get_int_max_str_digits()
        raise InvalidField(field, f"a number has more than {limit} digits") from None
    return value


def shorten(text: str) -> str:
    """The first 60 characters of a user's value, for an error message."""
    return text if len(text) <= 60 else text[:57] + "..."


def shown(value: Any) -> str:
    """The beginning of any value's repr, for an error message."""
    try:
        return shorten(repr(value))
    except (ValueError, RecursionError):  # too many digits, or nested too deeply
        return f"this {type(value).__name__}"


_HINTS = get_type_hints(SamplingParams)
_NULLABLE = {name for name, hint in _HINTS.items() if type(None) in get_args(hint)}
_BOOLEANS = {name for name, hint in _HINTS.items() if hint is bool}
_INTEGERS = {name for name, hint in _HINTS.items() if hint in (int, int | None)}
