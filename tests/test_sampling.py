"""structured_outputs as clients write it."""

from __future__ import annotations

import json
import re

import pytest

from gllm_engine.sampling import InvalidField, StructuredOutputs, parse_sampling

# What a client of vLLM 0.24 sends: every field, whether it means anything or not.
VLLM_FIELDS = {
    "json": None, "regex": None, "choice": None, "grammar": None, "json_object": None,
    "disable_fallback": False, "disable_any_whitespace": False,
    "disable_additional_properties": False, "whitespace_pattern": None, "structural_tag": None,
    "_backend": None, "_backend_was_auto": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"choice": ["a"]}, {"choice": ("a",)}),
        ({"json": {"a": 1}, "disable_fallback": True}, {"json": '{"a": 1}'}),
        ({"json_object": True, "whitespace_pattern": " "}, {"json_object": True}),
        ({"json": "{}", "disable_any_whitespace": True}, {"json": "{}"}),
        ({"structural_tag": {"triggers": []}}, {"structural_tag": '{"triggers": []}'}),
        ({"regex": "a", "json_object": False}, {"regex": "a"}),
    ],
)
def test_other_fields_of_vllms_structured_outputs(given, expected) -> None:
    for written in (VLLM_FIELDS | given, json.dumps(VLLM_FIELDS | given)):
        sampling = parse_sampling({"structured_outputs": written})
        asked = sampling.structured_outputs
        assert asked is not None
        kept = {"whitespace_pattern", "disable_any_whitespace"} & given.keys()
        expected = expected | {field: given[field] for field in kept}
        assert asked == StructuredOutputs(**expected)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"_backend": "xgrammar"}, "_backend 'xgrammar' is not supported; leave it out"),
        ({"_backend_was_auto": True}, "_backend_was_auto True is not supported"),
        ({"disable_additional_properties": True}, "disable_additional_properties True is not"),
        ({"disable_any_whitespace": True}, "disable_any_whitespace goes with json or json_object"),
        ({"whitespace_pattern": " "}, "whitespace_pattern goes with json or json_object, not with"),
        ({"json_object": True}, "exactly one of json, regex, choice, grammar, json_object, struc"),
        ({"regex": None}, "got none"),
        ({"regex": None, "json_object": False}, "got none"),
        (
            {"regex": None, "json": "", "whitespace_pattern": "", "disable_any_whitespace": True},
            "exclude each other",
        ),
        ({"xml": True}, "unknown field xml"),
    ],
)
def test_fields_of_vllm_that_are_not_honoured_are_refused(given, sentence) -> None:
    asked = VLLM_FIELDS | {"regex": "a"} | given
    with pytest.raises(InvalidField, match=f"^structured_outputs: .*{re.escape(sentence)}"):
        parse_sampling({"structured_outputs": asked})
