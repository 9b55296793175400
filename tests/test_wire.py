"""Messages between processes."""

from __future__ import annotations

from msgspec.structs import replace

from gllm_engine import wire
from gllm_engine.sampling import SamplingParams
from gllm_engine.types import Image, Request


def test_the_pixels_of_an_image_are_sent_once() -> None:
    """Not for each of the n sequences of a request, nor for each place in its prompt."""
    pixels = bytes(3 * 200 * 200)
    image = Image(b"a" * 16, 0, 2, 2, 2, 200, 200, pixels)
    images = (image, replace(image, first=4))
    requests = [Request(id, [7] * 8, SamplingParams(n=64), 0, images=images) for id in range(64)]
    requests.append(Request(64, [1], SamplingParams(), 0))
    frames = wire.encode(wire.Submit.of(requests))
    assert sum(map(len, frames)) < 1.2 * len(pixels)
    message = wire.decode(frames)
    assert isinstance(message, wire.Submit)
    found = message.whole()
    assert found == requests
    assert len({id(image.pixels) for each in found for image in each.images}) == 1
    assert requests[0].images == images
