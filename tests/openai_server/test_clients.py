"""LangChain's clients by their own code paths, in each of the three APIs that they speak.

The SDKs of OpenAI and Anthropic stand in the tests of each API.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel
from scripted_triton import Asked, FakeModel
from serving import Served

langchain_openai = pytest.importorskip("langchain_openai", reason="langchain is not installed")
langchain_anthropic = pytest.importorskip("langchain_anthropic", reason="langchain is missing")

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TEMPLATE = "<|role|> <tool_call> </think> enable_thinking"
Chat = Any  # a langchain BaseChatModel
# LangChain puts a parsed answer where the SDK's type has none.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")


class City(BaseModel):
    """A city."""

    city: str
    population: int


COLOGNE = City(city="Köln", population=1_000_000)


def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def answer(asked: Asked, choice: int) -> str:
    """A call of the function and after its result a sentence; a city where one is enforced."""
    if "population" in str(asked.sampling.get("structured_outputs")):
        return COLOGNE.model_dump_json()
    if "sunny in" in asked.prompt:
        return "It is sunny."
    return f"I look.\n{CALL}" if "<|tools|>" in asked.prompt else "Hello!"


def chat(served: Served, **options: Any) -> Chat:
    return langchain_openai.ChatOpenAI(
        model="m", base_url=f"{served.url}/v1", api_key="none", max_retries=0, **options
    )


def responses(served: Served) -> Chat:
    return chat(served, use_responses_api=True)


def messages(served: Served) -> Chat:
    return langchain_anthropic.ChatAnthropic(
        model="m", base_url=served.url, api_key="none", max_retries=0, max_tokens=100
    )


@pytest.fixture(params=[chat, responses, messages])
def langchain(served: Served, request: pytest.FixtureRequest) -> Chat:
    """A chat model before a model of Hermes' and Qwen's format."""
    served.triton.models["m"] = FakeModel(answer=answer, chat_template=TEMPLATE)
    make: Callable[[Served], Chat] = request.param
    return make(served)


def test_a_stream_equals_the_whole_answer(langchain: Chat) -> None:
    whole = langchain.invoke("Hi")
    assert whole.text == "Hello!" and whole.usage_metadata["output_tokens"] == len("Hello!")
    assert "".join(chunk.text for chunk in langchain.stream("Hi")) == "Hello!"


def test_a_conversation_with_a_tool(langchain: Chat) -> None:
    bound = langchain.bind_tools([weather])
    called = bound.invoke("Hi")
    (call,) = called.tool_calls
    assert (called.text.strip(), call["name"], call["args"]) == (
        "I look.",
        "weather",
        {"city": "Köln"},
    )
    first, *others = bound.stream("Hi")
    streamed = sum(others, first)
    assert [(made["name"], made["args"]) for made in streamed.tool_calls] == [
        ("weather", {"city": "Köln"})
    ]
    result = {"role": "tool", "tool_call_id": call["id"], "content": weather("Köln")}
    assert bound.invoke([("user", "Hi"), called, result]).text == "It is sunny."


def test_an_answer_of_a_type(langchain: Chat) -> None:
    assert langchain.with_structured_output(City, method="json_schema").invoke("Hi") == COLOGNE


def test_options_of_langchain(served: Served) -> None:
    made = chat(
        served,
        temperature=0,
        seed=3,
        logprobs=True,
        top_logprobs=2,
        verbosity="low",
        stream_usage=True,
    )
    assert made.invoke("Hi").response_metadata["logprobs"]["content"][0]["token"] == "H"
    assert [chunk.usage_metadata for chunk in made.stream("Hi") if chunk.usage_metadata]


def test_a_long_prompt_is_known_as_one(served: Served) -> None:
    """Agents shorten a conversation when they are told so in these words."""
    long = [("user", "x" * 5000)]
    for make in (chat, messages):
        with pytest.raises(Exception, match=r"prompt is too long: \d+ tokens > 4095") as failed:
            make(served).invoke(long)
        assert "ContextOverflow" in type(failed.value).__name__
