"""Places images and videos in a prompt: a placeholder token becomes the tokens that the model sees.

A video becomes those of its moments. Where times are texts, each moment has its time before it, and
the tokens around it that the placeholder has in chat templates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from gllm_engine.images.processor import ImageProcessor, PreparedImage
from gllm_engine.images.video import PreparedVideo
from gllm_engine.sampling import InvalidField
from gllm_engine.types import Image

Prepared = PreparedImage | PreparedVideo


class _Prompt:
    """A prompt that grows."""

    def __init__(self, processor: ImageProcessor) -> None:
        self.ids: list[int] = []
        self.placed: list[Image] = []
        self._processor = processor

    def add_image(self, image: PreparedImage) -> None:
        self.placed.append(replace(image, first=len(self.ids)))
        self.ids += self._processor.tokens(image.rows, image.columns)

    def add_video(self, video: PreparedVideo, encode: Callable[[str], list[int]]) -> None:
        assert self._processor.videos is not None
        before, after = self._processor.videos.around
        for index, moment in enumerate(video.moments):
            if video.seconds:
                self.ids += [*encode(f"<{video.seconds[index]:.1f} seconds>"), before]
            self.placed.append(replace(moment, first=len(self.ids)))
            self.ids += [self._processor.videos.placeholder] * (moment.rows * moment.columns)
            if video.seconds:
                self.ids.append(after)


def place(
    processor: ImageProcessor,
    ids: Sequence[int],
    media: Sequence[Prepared],
    encode: Callable[[str], list[int]] = lambda text: [],
) -> tuple[list[int], tuple[Image, ...]]:
    """The prompt with the i-th placeholder of images expanded for image i, so also for videos, and
    where the images and moments are.

    `encode`: the tokens of a text. Raises InvalidField if there is not one placeholder for each.
    """
    images = [each for each in media if isinstance(each, Image)]
    videos = [each for each in media if isinstance(each, PreparedVideo)]
    marks = _marks(ids, processor.placeholder, "image", len(images))
    starts: dict[int, Prepared] = dict(zip(marks, images, strict=True))
    if processor.videos is not None:
        marks = _marks(ids, processor.videos.placeholder, "video", len(videos))
        starts |= zip(marks, videos, strict=True)
    prompt = _Prompt(processor)
    start = 0
    for mark, each in sorted(starts.items()):
        prompt.ids += ids[start:mark]
        start = mark + 1
        if isinstance(each, Image):
            prompt.add_image(each)
            continue
        assert processor.videos is not None
        around = (*prompt.ids[-1:], *ids[start : start + 1])
        if each.seconds and around == processor.videos.around:  # its moments have their own
            prompt.ids.pop()
            start += 1
        prompt.add_video(each, encode)
    prompt.ids += ids[start:]
    return prompt.ids, tuple(prompt.placed)


def _marks(ids: Sequence[int], placeholder: int, kind: str, number: int) -> list[int]:
    """Where the placeholders of a kind are, of which there must be `number`."""
    marks = [at for at, token in enumerate(ids) if token == placeholder]
    if len(marks) != number:
        raise InvalidField(
            kind,
            f"the prompt has {len(marks)} placeholders (token {placeholder}) for {number} {kind}s",
        )
    return marks
