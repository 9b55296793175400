"""Checks the images of a request, so that no front end can fail a step that others share."""

from __future__ import annotations

from gllm_engine.arch import Model
from gllm_engine.sampling import InvalidField
from gllm_engine.sched import DIGEST_SIZE, image_end
from gllm_engine.text.image_parts import not_taken
from gllm_engine.types import Image, Request

MAX_TIME = 2**31  # positions are int32; the scheduler knows how many there are


def check_images(request: Request, arch: Model) -> None:
    """Raise InvalidField for images that the model cannot take, or that do not fit the prompt."""
    if request.images and arch.vision is None:
        raise not_taken("image")
    end = 0
    for number, image in enumerate(request.images):
        problem = _problem(image, arch)
        if image.time is not None and not (
            number and image.first == end and 0 <= image.time < MAX_TIME
        ):
            problem = problem or (
                f"its time is {image.time}, but times from 0 to {MAX_TIME - 1} are for moments "
                "that follow another one"
            )
        last = image_end(image) - 1
        length = len(request.prompt)
        if problem is None and not end <= image.first <= last < length:
            span = f"tokens {image.first} to {last}"
            problem = f"it takes {span}, but only tokens {end} to {length - 1} are left"
        if problem is not None:
            raise InvalidField("image", f"number {number}: {problem}")
        end = last + 1


def _problem(image: Image, arch: Model) -> str | None:
    """What is wrong with an image by itself, as a sentence."""
    assert arch.vision is not None
    side = arch.vision.patch * arch.vision.merge
    shape = (image.height, image.width)
    grid = (image.rows, image.columns)
    if min(shape) < side or any(length % side for length in shape):
        return f"it has {shape} pixels, whole multiples of {side} are needed"
    frame = 3 * image.height * image.width
    if len(image.pixels) not in (frame, frame * max(1, arch.vision.frames)):
        return f"it has {len(image.pixels)} bytes, three for each of {shape} pixels are needed"
    if grid != arch.vision.grid(*shape):
        return f"it has {grid} rows and columns, {arch.vision.grid(*shape)} are needed"
    if image.stride < image.columns or arch.has_sections and image.stride > image.columns:
        return f"its rows are {image.stride} tokens apart, {image.columns} are needed"
    if len(image.digest) != DIGEST_SIZE:
        return f"its digest has {len(image.digest)} bytes, {DIGEST_SIZE} are needed"
    return None
