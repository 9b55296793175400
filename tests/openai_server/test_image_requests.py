"""Images through the OpenAI server: what tritonserver gets of them, what the answers count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from scripted_triton import Asked, FakeModel, FakeTriton
from serving import Served, serve

from gllm_client.answers import RemoteAnswers
from gllm_client.batch import OpenAIItem

CHAT = "/v1/chat/completions"
ONE = "data:image/png;base64,b25l"
CLIP = "data:video/mp4;base64,b25l"
TWO = "https://example.org/two.jpg"


@pytest.fixture(scope="module")
def seeing() -> Iterator[Served]:
    with (
        FakeTriton(m=FakeModel(modalities=("text", "image", "video"))) as triton,
        serve(triton) as served,
    ):
        yield served


def user(*content: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def image(url: str, **more: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url} | more}


def generated(served: Served) -> Asked:
    return [asked for asked in served.model.asked if "operation" not in asked.inputs][-1]


LINES = "<|user|>\nWhich\n@\n@\nis red?\n<|assistant|>"


def test_a_chat(seeing: Served) -> None:
    """Triton gets the text with a place for each image, and the images once, in their order."""
    content = [text("Which"), image(ONE, detail="high"), image(TWO), text("is red?")]
    answer = seeing.post(CHAT, messages=user(*content)).json()
    asked = generated(seeing)
    assert asked.prompt == LINES
    assert asked.inputs["image"] == [ONE, TWO]
    assert "b25l" not in str([earlier.inputs.get("messages") for earlier in seeing.model.asked])
    assert answer["usage"]["prompt_tokens"] == len(LINES) + 18
    options = {"stream": True, "stream_options": {"include_usage": True}}
    last = list(seeing.sdk.chat.completions.create(model="m", messages=user(*content), **options))[
        -1
    ]
    assert last.usage.prompt_tokens == len(LINES) + 18


def test_tokens_are_counted_with_their_images(seeing: Served) -> None:
    content = [text("Which"), image(ONE), image(TWO), text("is red?")]
    counted = seeing.post("/tokenize", messages=user(*content)).json()["count"]
    assert counted == len(LINES) + 18
    source = {"type": "base64", "media_type": "image/png", "data": "b25l"}
    messages = user({"type": "image", "source": source})
    body = {"model": "m", "messages": messages}
    answer = seeing.post("/v1/messages/count_tokens", **body).json()
    assert answer["input_tokens"] == len("<|user|>\n\n<|assistant|>") + 10


def test_videos_go_apart_from_images(seeing: Served, served: Served) -> None:
    clip = {"type": "video_url", "video_url": {"url": CLIP}}
    content = [clip, image(ONE), text("Which?")]
    answer = seeing.post(CHAT, messages=user(*content)).json()
    asked = generated(seeing)
    assert (asked.inputs["image"], asked.inputs["video"]) == ([ONE], [CLIP])
    assert answer["usage"]["prompt_tokens"] == len(asked.prompt) + 18
    assert seeing.post("/tokenize", messages=user(clip)).json()["count"] == len(
        "<|user|>\n\n<|assistant|>" + 10 * "@"
    )
    *_, message = served.refused(CHAT, messages=user(clip))
    assert "this model takes no videos" in message


def test_anthropics_messages(seeing: Served) -> None:
    """A result of a tool may be an image; neighbouring blocks of text become one."""
    source = {"type": "base64", "media_type": "image/png", "data": "b25l"}
    shot = [text("screen:"), {"type": "image", "source": source}]
    call = {"type": "tool_use", "id": "t1", "name": "shoot", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": shot}
    url = {"type": "image", "source": {"type": "url", "url": TWO}}
    messages = [
        *user(text("a"), text("b"), url),
        {"role": "assistant", "content": [call]},
        *user(text("And"), result),
    ]
    answer = seeing.post("/v1/messages", model="m", max_tokens=5, messages=messages).json()
    asked = generated(seeing)
    start = "<|user|>\na\n\nb\n@\n<|assistant|>\n\n<|tool|>\nscreen:\n@\n<|user|>\nAnd\n"
    assert asked.prompt == start + "<|assistant|>"
    assert asked.inputs["image"] == [TWO, ONE]
    assert answer["usage"]["input_tokens"] == len(asked.prompt) + 18


def test_responses(seeing: Served) -> None:
    parts = [
        {"type": "input_text", "text": "What is it?"},
        {"type": "input_image", "image_url": ONE, "detail": "auto"},
    ]
    first = seeing.post("/v1/responses", input=[{"role": "user", "content": parts}]).json()
    assert generated(seeing).inputs["image"] == [ONE]
    assert first["usage"]["input_tokens"] == len(generated(seeing).prompt) + 9
    more = [{"role": "user", "content": [parts[1] | {"image_url": TWO}]}]
    seeing.post("/v1/responses", input=more, previous_response_id=first["id"])
    assert generated(seeing).inputs["image"] == [ONE, TWO]


def test_lines_of_a_batch(seeing: Served) -> None:
    body = {"messages": user(image(ONE), text("What is it?"))}
    with closing(RemoteAnswers(seeing.triton.address, None)) as source:
        ((_, answer),) = source.answers([OpenAIItem("a", CHAT, body)], 1)
    assert generated(seeing).inputs["image"] == [ONE]
    assert isinstance(answer, dict)
    told = answer["response"]["body"]
    assert told["usage"] == seeing.post(CHAT, **body).json()["usage"]


@pytest.mark.parametrize(
    ("part", "param", "words"),
    [
        ({"type": "image_url"}, "messages[0].content[1]", "None is no URL"),
        (image(""), "messages[0].content[1]", "'' is no URL"),
        ({"type": "image_url", "image_url": {"url": 7}}, "messages[0].content[1]", "7 is no URL"),
        (
            {"type": "video_url", "video_url": {}},
            "messages[0].content[1]",
            "None is no URL of the video",
        ),
        ({"type": "audio_url"}, "messages[0].content[1].type", "'audio_url' is not supported"),
    ],
)
def test_what_is_no_image(seeing: Served, part: dict[str, Any], param: str, words: str) -> None:
    status, given, message = seeing.refused(CHAT, messages=user(text("a"), part))
    assert (status, given) == (400, param)
    assert words in message


def test_images_are_never_cut(seeing: Served) -> None:
    refused = seeing.refused(CHAT, messages=user(image(ONE)), truncate_prompt_tokens=4)
    assert refused[:2] == (400, "truncate_prompt_tokens")
    assert (
        seeing.post(CHAT, messages=user(image(ONE)), truncate_prompt_tokens=-1).status_code == 200
    )


def test_what_the_backend_says_of_an_image(seeing: Served) -> None:
    seeing.model.refusal = "image: image 1: it is truncated"
    try:
        status, param, message = seeing.refused(CHAT, messages=user(image(ONE)))
    finally:
        seeing.model.refusal = None
    assert (status, message) == (400, "image: image 1: it is truncated")
    assert param == "image"


def test_models_say_whether_they_take_images(seeing: Served, served: Served) -> None:
    shown = [s.http.get("/v1/models/m").json()["input_modalities"] for s in (seeing, served)]
    assert shown == [["text", "image", "video"], ["text"]]
