"""Sampling parameters: whatever a user gives, a sentence names the field and its limit."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest

from gllm_engine import InvalidField, SamplingParams, StructuredOutputs, parse_sampling

NAN, INF = float("nan"), float("inf")
HINTS = get_type_hints(SamplingParams)
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]
LONG = "9" * 400


def refused(field: str, value: Any) -> str:
    with pytest.raises(InvalidField) as caught:
        parse_sampling({field: value})
    assert caught.value.field == field
    message = str(caught.value)
    assert message.startswith(f"{field}: ") and len(message) < 250
    return message


def fields_of(*types: type) -> list[str]:
    return [name for name, hint in HINTS.items() if {*types} & {hint, *get_args(hint)}]


@pytest.mark.parametrize(
    "field", [f for f in fields_of(int, float) if HINTS[f] != dict[int, float]]
)
def test_every_number_has_a_range(field: str) -> None:
    wrong = [NAN, INF, -INF, 10**400, -(10**400), 10**5000, LONG, "9" * 5000, "1e999", "-1e999"]
    wrong += ["Infinity", "-inf", "nan", "", " 5", "1_0", "0x10", "five", {}, [[5]], DEEP, b"5"]
    if HINTS[field] == tuple[int, ...]:  # their range is the vocabulary, which others know
        wrong = [NAN, INF, "nan", "five", [True], [1.5], [None], [DEEP], {}]
    for value in [*wrong, True, False, "true"]:
        refused(field, value)


def test_numbers_may_be_text() -> None:
    given = {"max_tokens": "5", "temperature": "0", "seed": "1e3", "top_k": 5.0, "n": "2"}
    assert parse_sampling(given) == SamplingParams(
        max_tokens=5, temperature=0.0, seed=1000, top_k=5, n=2
    )


@pytest.mark.parametrize("field", fields_of(bool))
def test_flags_are_true_or_false(field: str) -> None:
    for value in (2, -1, 0.5, NAN, "perhaps", LONG, [True]):
        refused(field, value)


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("logit_bias", {"5": NAN}, "nan for token 5 is outside [-100, 100]"),
        ("logit_bias", {"5": "1e999"}, "not valid"),
        ("logit_bias", {"5": True}, "not valid"),
        ("logit_bias", {LONG: 101}, "is outside [-100, 100]"),
        ("logit_bias", {"five": 1}, "not valid"),
        ("logit_bias", "{", "not valid JSON"),
        ("stop_token_ids", "[" * 100_000, "nested too deeply"),
        ("stop", DEEP, "not valid"),
        ("stop", ["a", "\ud800"], "half of a surrogate pair"),
        ("bad_words", "\udfff", "half of a surrogate pair"),
        ("cache_salt", "\ud800", "half of a surrogate pair"),
        ("structured_outputs", {"json": DEEP}, "nested too deeply"),
        ("structured_outputs", {"regex": "\ud800"}, "half of a surrogate pair"),
        ("structured_outputs", '{"choice": ["\\ud800"]}', "half of a surrogate pair"),
        ("max_tokens", 0, "max_tokens: 0 is outside [1, 2**62]"),
    ],
)
def test_odd_values_are_refused_in_a_sentence(field: str, value: Any, part: str) -> None:
    assert part in refused(field, value)


def test_what_python_constructs_has_ranges_too() -> None:
    for field in ("seed", "max_tokens", "temperature", "n"):
        with pytest.raises(InvalidField, match=f"{field}: this int is outside"):
            SamplingParams(**{field: 10**5000})
    with pytest.raises(InvalidField, match="exactly one of"):
        SamplingParams(structured_outputs=StructuredOutputs())
