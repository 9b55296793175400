"""Images of a conversation, from the parts that clients send to what chat templates write."""

from __future__ import annotations

from typing import Any

import pytest

from gllm_engine.sampling import InvalidField
from gllm_engine.text.chat_template import ChatTemplate, check_messages
from gllm_engine.text.image_parts import Video, take_media, with_places
from gllm_engine.text.template_renderer import Renderer, Unusable
from gllm_engine.text.tokenizer import Tokenizer

PAD = "<|pad|>"
TEXTS: Any = {"image": PAD}
TEXT = {"type": "text", "text": "Which?"}


def user(*content: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


# As Qwen's and Kimi's (by a macro and get), LLaVA's (images first) and text models' write them.
BY_TYPE = """\
{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}
{%- if part.type == 'image' or 'image' in part %}<s><|pad|></s>{% elif 'text' in part %}
{{- part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"""
BY_GET = """\
{% macro content(message) %}{% set c = message.get('content') %}{% for part in c %}
{%- if part['type'] == 'image' %}<s><|pad|></s>{% else %}{{ part['text'] }}{% endif %}
{%- endfor %}{% endmacro %}{% for message in messages %}{{ content(message) }}{% endfor %}"""
FIRST = """\
{% for message in messages %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') %}<|pad|>{% endfor %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}
{%- endfor %}{% endfor %}"""
STRINGS = "{% for message in messages %}[{{ message.content }}]{% endfor %}"


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (BY_TYPE, "Which?<s><|pad|></s>Which?<s><|pad|></s>"),
        (BY_GET, "Which?<s><|pad|></s>Which?<s><|pad|></s>"),
        (FIRST, "<|pad|><|pad|>Which?Which?"),
        (STRINGS, "[Which?\n<|pad|>\nWhich?\n<|pad|>]"),
    ],
)
def test_templates_write_images_in_their_order(template: str, written: str) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://a/b.png", "detail": "low"}}
    messages, sources = take_media(user(TEXT, image, TEXT, {"type": "image"}), TEXTS)
    renderer = Renderer({"default": template}, {}, 1 << 30)
    assert renderer.render(check_messages(messages), None, {}) == written
    assert sources == ["https://a/b.png", None]


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image_url", "image_url": {"url": "a"}}, "a"),
        ({"type": "image_url", "image_url": "a"}, "a"),
        ({"type": "input_image", "image_url": "a", "detail": "auto"}, "a"),
        ({"type": "image", "image": b"a"}, b"a"),
        ({"type": "image", "url": "a"}, "a"),
        ({"type": "image"}, None),
    ],
)
def test_sources(part: dict[str, Any], source: Any) -> None:
    given = user(TEXT, part)
    messages, sources = take_media(given, TEXTS)
    assert sources == [source]
    assert messages == user(TEXT, {"type": "image", "text": PAD})
    assert given == user(TEXT, part)  # the caller's messages stay as they are
    with pytest.raises(InvalidField, match="^image: this model takes no images$"):
        take_media(given, {})


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "video_url", "video_url": {"url": "a"}}, "a"),
        ({"type": "video", "video": b"a"}, b"a"),
        ({"type": "video"}, None),
    ],
)
def test_videos_are_told_from_images(part: dict[str, Any], source: Any) -> None:
    given = user({"type": "image", "image": "b"}, part)
    texts: Any = {"image": PAD, "video": "<|video|>"}
    messages, sources = take_media(given, texts)
    assert sources == ["b", Video(source)]
    assert messages[0]["content"][1] == {"type": "video", "text": "<|video|>"}
    with pytest.raises(InvalidField, match="^video: this model takes no videos$"):
        take_media(given, TEXTS)


@pytest.mark.parametrize("messages", [None, [], [1], [{}], user(TEXT, 1), user({"type": []})])
def test_other_messages_are_left_to_the_template(messages: Any) -> None:
    assert take_media(messages, {}) == (messages, [])


def test_an_image_is_no_message_to_go_on_with() -> None:
    renderer = Renderer({"default": BY_TYPE}, {}, 1 << 30)
    messages = check_messages(take_media(user(TEXT, {"type": "image"}), TEXTS)[0])
    with pytest.raises(Unusable, match="ends with an image"):
        renderer.render(messages, None, {"continue_final_message": True})


def test_places_come_before_a_text_that_has_none() -> None:
    assert with_places("Which?", PAD, f"<s>{PAD}</s>", 2) == f"<s>{PAD}</s>" * 2 + "Which?"
    assert with_places(f"a {PAD}", PAD, f"<s>{PAD}</s>", 1) == f"a {PAD}"
    assert with_places("Which?", "", "", 0) == "Which?"  # a model that takes no images


@pytest.mark.parametrize(
    ("template", "text"),
    [(BY_TYPE, "<s>{}</s>"), (STRINGS, "{}"), (FIRST, "{}"), (None, "{}"), ("{{ 1 / 0 }}", "{}")],
)
def test_what_stands_for_an_image(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, template: str | None, text: str
) -> None:
    """What the chat template writes between two texts; else, as without one, the token alone."""
    token, id = next(iter(tokenizer.special_tokens.items()))
    own = template and ChatTemplate({"default": template.replace(PAD, token)}, {})
    monkeypatch.setattr(tokenizer, "chat_template", own)
    assert tokenizer.media_text("image", id) == text.format(token)
