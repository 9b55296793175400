"""Places images in a prompt: one placeholder token becomes the tokens that the model sees."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from gllm_engine.images.processor import ImageProcessor, PreparedImage
from gllm_engine.sampling import InvalidField
from gllm_engine.types import Image


def place(
    processor: ImageProcessor, ids: Sequence[int], images: Sequence[PreparedImage]
) -> tuple[list[int], tuple[Image, ...]]:
    """The prompt with the i-th placeholder token expanded for image i, and where the images are.

    Raises InvalidField if there is not one placeholder for each image.
    """
    marks = [at for at, token in enumerate(ids) if token == processor.placeholder]
    if len(marks) != len(images):
        raise InvalidField(
            "image",
            f"the prompt has {len(marks)} placeholders (token {processor.placeholder}) "
            f"for {len(images)} images",
        )
    expanded: list[int] = []
    placed = []
    start = 0
    for mark, image in zip(marks, images, strict=True):
        expanded += ids[start:mark]
        start = mark + 1
        placed.append(replace(image, first=len(expanded)))
        expanded += processor.tokens(image.rows, image.columns)
    expanded += ids[start:]
    return expanded, tuple(placed)
