"""The images that come with a prompt: where its messages or its text have them.

A source is what a client gives for an image; engine/images.py reads it. Knows no tokens.
"""

from __future__ import annotations

from typing import Any

from gllm_engine.sampling import InvalidField

KINDS = ("image_url", "image", "input_image")  # of content parts: OpenAI's and transformers'


def take_images(messages: Any, image_text: str | None) -> tuple[Any, list[Any]]:
    """Messages whose images only have their places, and the sources of the images, in order.

    A source is None for a part that has none. `image_text`: what stands for an image in a text,
    for templates that take no parts; None: the model takes no images. What is wrong with messages
    otherwise is left to the chat template. Raises InvalidField for images that it does not take.
    """
    sources: list[Any] = []

    def place(part: Any) -> Any:
        if not isinstance(part, dict) or part.get("type") not in KINDS:
            return part
        if image_text is None:
            raise no_images()
        sources.append(_source(part))
        return {"type": "image", "text": image_text}

    if not isinstance(messages, list | tuple):
        return messages, sources
    return [
        message | {"content": list(map(place, message["content"]))}
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        else message
        for message in messages
    ], sources


def no_images() -> InvalidField:
    """The error of an image for a model that reads text alone."""
    return InvalidField("image", "this model takes no images")


def _source(part: dict[str, Any]) -> Any:
    given = next((part[key] for key in ("image_url", "image", "url") if key in part), None)
    return given.get("url") if isinstance(given, dict) else given


def with_places(text: str, token: str, image_text: str, num_images: int) -> str:
    """A text with a place for each image: before it, unless it has places, each with `token`."""
    return text if token in text else image_text * num_images + text
