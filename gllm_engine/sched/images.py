"""The embeddings of images on the first pipeline stage: which are there, and which are made next.

Sequences with the same image and salt share its embeddings. They are needed until the last of the
image's tokens is computed, and are kept after that as long as there is room. This module knows
numbers and sizes only; the runner owns the embeddings.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from gllm_engine.config import EngineConfig
from gllm_engine.sched.pages import IntegrityError
from gllm_engine.sched.sequence import Sequence, image_end
from gllm_engine.types import Image, ImagePixels, ImageRun, StepPlan

_Key = tuple[str, bytes, int, int]


class _Held(NamedTuple):
    number: int  # the runner's name of the image
    tokens: int


class ImageCache:
    """The embeddings of config.image_cache_tokens tokens at most.

    A plan makes those of config.encoder_budget tokens at most, or of one larger image. A number is
    never used twice: an image that is encoded again gets another one. `has_sections`: see
    Rope.sections.
    """

    def __init__(self, config: EngineConfig, has_sections: bool = False) -> None:
        self.has_sections = has_sections
        self.most = config.largest_image
        self._capacity = config.image_cache_tokens
        self._budget = config.encoder_budget
        self._held: OrderedDict[_Key, _Held] = OrderedDict()  # the least recently used first
        self._size = 0
        self._next_number = 0
        self._forgotten: list[int] = []  # which no plan has told yet
        # Of the plan in the making.
        self.fresh: list[ImagePixels] = []
        self._used: set[_Key] = set()
        self._left = 0
        self._lacks_room = False

    def begin(self) -> None:
        """A plan begins."""
        self.fresh = []
        self._used.clear()
        self._left = self._budget
        self._lacks_room = False

    def finish(self, plan: StepPlan) -> None:
        """The plan will be run."""
        plan.forget.extend(self._forgotten)
        plan.encode.extend([image.number for image in self.fresh])
        self._forgotten.clear()

    def forget(self, lost: Iterable[StepPlan]) -> None:
        """Empty the cache; the next plan tells the runner, and what plans told that were `lost`."""
        self._forgotten += [held.number for held in self._held.values()]
        self._forgotten += [number for plan in lost for number in plan.forget]
        self._held.clear()
        self._size = 0

    def reach(self, sequence: Sequence, end: int, prefilling: Iterable[Sequence]) -> int:
        """Where a chunk of at most `end` tokens has to end: before the first image whose embeddings
        are not there and cannot be made in this plan.

        `prefilling`: the sequences that need the images that they are within.
        """
        start = sequence.planned
        for image in sequence.images:
            if start < image_end(image) and image.first < end:
                if not self._provide(_key(sequence, image), image, prefilling):
                    return max(start, image.first)
        return end

    def _provide(self, key: _Key, image: Image, prefilling: Iterable[Sequence]) -> bool:
        tokens = image.rows * image.columns
        if key in self._held:
            self._held.move_to_end(key)
        elif self._lacks_room or self.fresh and tokens > self._left:
            return False
        elif not self._make_room(tokens, prefilling):
            # Nor are other images encoded in this plan: they could take the room for ever.
            self._lacks_room = True
            return False
        else:
            self._held[key] = _Held(self._next_number, tokens)
            pixels = ImagePixels(self._next_number, image.height, image.width, image.pixels)
            self.fresh.append(pixels)
            self._next_number += 1
            self._size += tokens
            self._left -= tokens
        self._used.add(key)
        return True

    def _make_room(self, tokens: int, prefilling: Iterable[Sequence]) -> bool:
        """Drop embeddings that no sequence needs until there is room for `tokens` more."""
        needed = self._used | {
            _key(sequence, image)
            for sequence in prefilling
            for image in sequence.images
            if image.first < sequence.planned < image_end(image)
        }
        excess = self._size + tokens - self._capacity
        others = [key for key in self._held if key not in needed]
        if sum(self._held[key].tokens for key in others) < excess:
            return False
        for key in others:
            if excess <= 0:
                break
            held = self._held.pop(key)
            self._forgotten.append(held.number)
            self._size -= held.tokens
            excess -= held.tokens
        return True

    def runs(self, sequence: Sequence, start: int, end: int) -> list[ImageRun]:
        """The embeddings of tokens `start` .. `end` - 1, all of which are there."""
        found = []
        for image in sequence.images:
            columns = image.columns
            if image.stride == columns:  # as if all were in one row
                columns *= image.rows
            for row in range(image.rows * image.columns // columns):
                place = image.first + row * image.stride
                first = max(start, place)
                count = min(end, place + columns) - first
                if count > 0:
                    number = self._held[_key(sequence, image)].number
                    at = row * columns + first - place
                    found.append(ImageRun(number, at, first - start, count))
        return found

    def check_integrity(self) -> None:
        """Raise IntegrityError if the bookkeeping contradicts itself; the message says how."""
        size = sum(held.tokens for held in self._held.values())
        if size != self._size or size > self._capacity:
            raise IntegrityError(f"Embeddings of {size} tokens are held, {self._size} counted.")
        numbers = [held.number for held in self._held.values()] + self._forgotten
        if len(set(numbers)) < len(numbers):
            raise IntegrityError(f"An image is held twice, or held and forgotten: {numbers}.")


def _key(sequence: Sequence, image: Image) -> _Key:
    """With the size, which says how many embeddings there are, whatever the digest. Sequences with
    other salts share nothing, or response times would tell whose images are there.
    """
    return sequence.sampling.cache_salt, image.digest, image.height, image.width
