"""Lines for `gllm batch` that no model can answer, and what is to be said of each.

Every door (an engine in the process, a server over gRPC and over HTTP) is tried with all of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gllm_client.__main__ import main

LONG = "9" * 400


def line(**fields: Any) -> str:
    return json.dumps({"prompt": "Once"} | fields)


def sampled(**fields: Any) -> str:
    return line(sampling_parameters=fields)


def of_number(name: str, text: str) -> str:
    """A sampling parameter as a number that Python's json would not write so."""
    return f'{{"prompt": "Once", "sampling_parameters": {{"{name}": {text}}}}}'


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


# An input line, and a part of its error.
ODD_LINES = [
    ("not JSON", "not valid JSON"),
    ("[1, 2]", "a JSON object is expected"),
    ("null", "a JSON object is expected"),
    ("\udcff\udcfe", "not valid JSON"),  # bytes that are not UTF-8
    (nested(100_000), "nested too deeply"),
    (f'{{"id": {"9" * 5000}, "prompt": "Once"}}', "not valid JSON"),
    ('{"prompt": "Once", "prompt": "Once"}', "comes twice"),
    (line(id=None), "id: null is not"),
    (line(id=1.5), "id: 1.5 is not"),
    (line(id=["a"]), "id: a list or an object is not"),
    (line(id="good 0"), "is the id of line 1 already"),
    (line(prompts="Once"), "prompts: unknown key"),
    (line(messages=[]), "exactly one of prompt and messages"),
    (line(sampling_parameters=[]), "sampling_parameters: a JSON object"),
    (line(prompt=5), "a string is expected"),
    (line(prompt=None), "a string is expected"),
    (line(prompt=""), "empty"),
    (line(prompt="\ud800"), ""),
    ('{"prompt": "\udced\udca0\udc80"}', ""),  # half of a surrogate pair as three bytes
    (line(prompt="long " * 20_000), "more than|limited to|token"),
    ('{"messages": "hello"}', "a string is expected (or messages: a list)"),
    ('{"messages": []}', "messages: "),
    ('{"messages": [1]}', "messages: message 0 is not an object"),
    ('{"messages": [{"role": "user", "content": 5}]}', "messages: message 0 has no content"),
    ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
    (f'{{"messages": {nested(900)}}}', "messages: "),
    (line(tools=[]), "tools: it is for the chat template"),
    ('{"messages": [], "tools": 5}', "tools: a list is expected"),
    (sampled(temprature=1), "temprature: unknown"),
    (sampled(n="abc"), "n: 'abc' is not valid"),
    (sampled(n=[1]), "n: [1] is not valid"),
    (sampled(n=65), "n: 65 is outside [1, 64]"),
    (sampled(n=True), "n: True is not valid"),
    (of_number("n", LONG), "n: 9999"),
    (of_number("n", "1e400"), "n: inf is not valid"),
    (of_number("n", "NaN"), "n: nan is not valid"),
    (of_number("max_tokens", "-" + LONG), "max_tokens: -999"),
    (of_number("max_tokens", "1.5"), "max_tokens: 1.5 is not valid"),
    (of_number("seed", LONG), "seed: 9999"),
    (of_number("temperature", "1e999"), "temperature: inf is outside"),
    (of_number("temperature", "-Infinity"), "temperature: -inf is outside"),
    (of_number("temperature", "NaN"), "temperature: nan is outside"),
    (of_number("temperature", LONG), "temperature: 9999"),
    (of_number("temperature", "true"), "temperature: True is not valid"),
    (sampled(temperature="Infinity"), "temperature: inf is outside"),
    (sampled(seed=LONG), "seed: 9999"),
    (sampled(temperature={}), "temperature: {} is not valid"),
    (of_number("stop_token_ids", f"[{LONG}]"), "stop_token_ids: token"),
    (of_number("stop_token_ids", "[true]"), "stop_token_ids: [True] is not valid"),
    (of_number("logit_bias", f'{{"{LONG}": 1}}'), "logit_bias: token"),
    (of_number("logit_bias", '{"5": 1e999}'), "logit_bias: inf for token 5"),
    (of_number("stop", nested(900)), "stop: "),
    (sampled(stop=["\ud800"]), "surrogate"),
    (sampled(bad_words="\ud800"), "surrogate"),
    (sampled(cache_salt="\ud800"), "surrogate"),
    (sampled(cache_salt=7), "cache_salt: 7 is not valid"),
    (of_number("structured_outputs", f'{{"json": {nested(900)}}}'), "structured_outputs: "),
    (sampled(structured_outputs={"regex": "("}), "structured_outputs: "),
    (sampled(structured_outputs={"regex": "\ud800"}), "surrogate"),
]


def check_odd_lines(directory: Path, *source: str) -> None:
    """Run `gllm batch` on good lines with all odd ones between; then again, with nothing to do."""
    good = [json.dumps({"id": f"good {i}", "prompt": "Once"}) for i in range(3)]
    lines = [good[0], *(text for text, _ in ODD_LINES), *good[1:]]
    (directory / "in").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    command = ["batch", str(directory / "in"), str(directory / "out"), *source, "--max-tokens=4"]
    assert main(command) == 1
    written = (directory / "out").read_text("ascii").splitlines()
    found = {answer["id"]: answer for answer in map(json.loads, written)}
    assert len(written) == len(found) == len(lines)
    for i in range(3):
        assert found[f"good {i}"]["num_output_tokens"] > 0
    for number, (text, part) in enumerate(ODD_LINES, 2):
        error = found[number]["error"]
        assert any(each in error for each in part.split("|")), (text[:100], error)
        assert len(error) < 1200 and "Traceback" not in error, (text[:100], error)
    assert main(command) == 0
    assert (directory / "out").read_text("ascii").splitlines() == written
