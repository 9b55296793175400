"""The images and videos that come with a prompt: where its messages or its text have them.

A source is what a client gives for an image; engine/images.py reads it. Knows no tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from gllm_engine.sampling import InvalidField

MediaKind = Literal["image", "video"]
# Types of content parts: OpenAI's, vLLM's and transformers'.
TYPES: dict[str, MediaKind] = {
    "image_url": "image",
    "image": "image",
    "input_image": "image",
    "video_url": "video",
    "video": "video",
}


class Video(NamedTuple):
    """Of a video, what an image's source is by itself."""

    source: Any


def take_media(messages: Any, texts: Mapping[MediaKind, str]) -> tuple[Any, list[Any]]:
    """Messages whose images and videos only have their places, and the sources of these, in order.

    A source is None for an image that has none, and Video(None) for such a video. `texts`: what
    stands for one in a text, for templates that take no parts, by the kinds that the model takes.
    What is wrong with messages otherwise is left to the chat template. Raises InvalidField for
    kinds that it does not take.
    """
    sources: list[Any] = []

    def place(part: Any) -> Any:
        kind = TYPES.get(str(part.get("type"))) if isinstance(part, dict) else None
        if kind is None:
            return part
        if kind not in texts:
            raise not_taken(kind)
        source = _source(part, kind)
        sources.append(Video(source) if kind == "video" else source)
        return {"type": kind, "text": texts[kind]}

    if not isinstance(messages, list | tuple):
        return messages, sources
    return [
        message | {"content": list(map(place, message["content"]))}
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        else message
        for message in messages
    ], sources


def not_taken(kind: MediaKind) -> InvalidField:
    """The error of an image or a video for a model that takes none."""
    return InvalidField(kind, f"this model takes no {kind}s")


def _source(part: dict[str, Any], kind: str) -> Any:
    given = next((part[key] for key in (f"{kind}_url", kind, "url") if key in part), None)
    return given.get("url") if isinstance(given, dict) else given


def with_places(text: str, token: str, media_text: str, number: int) -> str:
    """A text with a place for each image: before it, unless it has places, each with `token`."""
    return text if token in text else media_text * number + text
