"""Conversations with tools by the real SDK, with a model that writes each format."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scripted_triton import Asked, FakeModel
from serving import Served
from written_turns import FORMATS, REASONING, SCHEMA, SPECIAL, Turn, write

CALLS: list[tuple[str, dict[str, Any]]] = [
    ("get_weather", {"text": "Köln", "count": 1}),
    ("get_weather", {"text": 'a "b"', "count": 2}),
]
FUNCTION: Any = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}


class Agent(FakeModel):
    """Calls a tool, and tells what it has got."""

    def __init__(self, name: str) -> None:
        super().__init__(answer=self.speak, tokens_per_chunk=2)
        self.name = name

    def speak(self, asked: Asked, choice: int) -> str:
        results = asked.prompt.split("<|tool|>\n")[1:]
        told = " and ".join(result.split("\n")[0] for result in results)
        return write(self.name, Turn("hm", told) if results else Turn("hm", "", CALLS))

    def facts(self) -> dict[str, Any]:
        names = SPECIAL.get(self.name, ["<|im_end|>"])
        return super().facts() | {"special_tokens": dict.fromkeys(names, 7)}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_tool_is_called_and_its_results_are_told(
    served: Served, name: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = (name, REASONING.get(name, "think"))
    monkeypatch.setattr(served.app.state.models, "_formats", formats)
    served.triton.models["m"] = Agent(name)
    messages: list[Any] = [{"role": "user", "content": "Is it warm?"}]
    message = answered(served, messages, stream)
    assert message["reasoning"] == "hm" and not message["content"]
    calls = message["tool_calls"]
    made = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
    assert made == CALLS
    assert len({call["id"] for call in calls}) == 2
    messages.append(message)
    for call, degrees in zip(calls, ("20", "30"), strict=True):
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": degrees})
    message = answered(served, messages, stream)
    assert (message["content"], message["tool_calls"]) == ("20 and 30", None)


def answered(served: Served, messages: list[Any], stream: bool) -> dict[str, Any]:
    """The model's message, as the SDK has it."""
    asked: dict[str, Any] = {"model": "m", "messages": messages, "tools": [FUNCTION]}
    if not stream:
        answer = served.sdk.chat.completions.create(**asked)
        return answer.choices[0].message.model_dump() | {"role": "assistant"}
    with served.sdk.chat.completions.stream(**asked) as events:
        for _ in events:
            continue
        final = events.get_final_completion().choices[0].message.model_dump()
    for call in final["tool_calls"] or ():
        call["function"].pop("parsed_arguments", None)
    final.pop("parsed", None)
    return final
