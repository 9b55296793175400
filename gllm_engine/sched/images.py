"""The embeddings of images on the first pipeline stage: which are there, and which are made next.

Sequences with the same image and salt share its embeddings. They are needed until the last of the
image's tokens is computed, and are kept after that as long as there is room. This module knows
numbers and sizes only; the runner owns the embeddings.

A plan encodes the images that its chunks need. Encoders encode images ahead of the plans, so with
them an image that is held is in one of three states:

    asked --landed()--> landed --finish()--> there
    (an encoder         (in the ranks'       (the ranks copy it before
     has it)             landing)             the plan's rows run)

What lies in the landing blocks room there until the plan that fetches it is done. Every plan
fetches all of it, so this room always comes back.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from gllm_engine.config import EngineConfig
from gllm_engine.sched.pages import IntegrityError
from gllm_engine.sched.sequence import Sequence, image_end
from gllm_engine.types import Image, ImagePixels, ImageRun, LandedImage, StepPlan

_Key = tuple[str, bytes, int, int]


class _Held(NamedTuple):
    number: int  # the runner's name of the image
    tokens: int


class ImageOrders(NamedTuple):
    """What encoders have to do."""

    encode: list[ImagePixels]  # these first ones first
    cancel: list[int]  # numbers of images that nobody needs any more
    release: list[int]  # places in the landing


class ImageCache:
    """The embeddings of config.image_cache_tokens tokens at most.

    A plan makes those of config.encoder_budget tokens at most, or of one larger image; encoders
    have those of config.landing_tokens tokens at most. A number is never used twice: an image that
    is encoded again gets another one. `num_positions`: that a rotary embedding with sections has,
    0: it has none. `is_ahead`: encoders encode.
    """

    def __init__(self, config: EngineConfig, num_positions: int = 0) -> None:
        self.num_positions = num_positions
        self.most = config.largest_image
        self.is_ahead = config.encoder_workers > 0
        self.num_encoded = 0
        self.num_hits = 0  # images of sequences that were not encoded for them
        self._capacity = config.image_cache_tokens
        self._budget = config.landing_tokens if self.is_ahead else config.encoder_budget
        self._held: OrderedDict[_Key, _Held] = OrderedDict()  # the least recently used first
        self._size = 0
        self._next_number = 0
        self._forgotten: list[int] = []  # which no plan has told yet
        self._unused: set[int] = set()  # numbers of images that no sequence has used yet
        self._users = Counter[_Key]()  # how many waiting or prefilling sequences have an image
        self._asked: dict[int, _Key] = {}  # by number
        self._landed: dict[int, LandedImage] = {}  # by number
        self._landing = 0  # tokens of what is asked, landed, or fetched by plans in flight
        self._orders = ImageOrders([], [], [])
        # Of the plan in the making.
        self.fresh: list[ImagePixels] = []
        self._used: set[_Key] = set()
        self._left = 0
        self._lacks_room = False

    # ------------------------------------------------------------ sequences come and go

    def join(self, sequence: Sequence) -> None:
        """A sequence begins to wait; it needs all its images."""
        self._users.update({_key(sequence, image) for image in sequence.images})

    def leave(self, sequence: Sequence) -> None:
        """A sequence waits and prefills no more."""
        for key in {_key(sequence, image) for image in sequence.images}:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                if key in self._held and self._held[key].number in self._asked:
                    self._orders.cancel.append(self._drop_asked(self._held[key].number))

    @property
    def num_waiting(self) -> int:
        """Images of waiting and prefilling sequences that encoders have yet to encode."""
        return sum(not self._is_there(key) for key in self._users) if self.is_ahead else 0

    # ------------------------------------------------------------ plan

    def begin(self) -> None:
        """A plan begins."""
        self.fresh = []
        self._used.clear()
        self._left = self._budget - self._landing
        self._lacks_room = False

    def finish(self, plan: StepPlan) -> None:
        """The plan will be run."""
        plan.forget.extend(self._forgotten)
        self._forgotten.clear()
        plan.encode.extend([image.number for image in self.fresh])
        self.num_encoded += len(self.fresh)
        plan.arrived.extend(self._landed.values())
        self._landed.clear()

    @property
    def has_landed(self) -> bool:
        """Whether there is something for the next plan to fetch."""
        return bool(self._landed)

    def done(self, plan: StepPlan) -> None:
        """The plan has run, or never will."""
        for image in plan.arrived:
            self._free(image)

    def forget(self, lost: Iterable[StepPlan]) -> None:
        """Empty the cache; the next plan tells the runner, and what plans told that were `lost`."""
        for number in list(self._asked):
            self._orders.cancel.append(self._drop_asked(number))
        for key in list(self._held):
            self._drop(key)
        for plan in lost:
            self._forgotten += plan.forget
            self.done(plan)

    def ask(self, needs: Iterable[tuple[Sequence, int]], prefilling: Iterable[Sequence]) -> None:
        """Have images encoded ahead, as many as there is room for.

        `needs`: sequences in the order of their turns, and their first tokens that need computing.
        An image that lacks room keeps those after it waiting: they could take the room for ever.
        """
        for sequence, start in needs:
            for image in sequence.images:
                if start < image_end(image):
                    if not self._provide(_key(sequence, image), image, prefilling):
                        return

    def reach(self, sequence: Sequence, end: int, prefilling: Iterable[Sequence]) -> int:
        """Where a chunk of at most `end` tokens has to end: before the first image whose embeddings
        are not there and cannot be made in this plan.

        `prefilling`: the sequences that need the images that they are within.
        """
        start = sequence.planned
        if self.is_ahead:
            return min(end, self.ready_len(sequence, start))
        for image in sequence.images:
            if start < image_end(image) and image.first < end:
                if not self._provide(_key(sequence, image), image, prefilling):
                    return max(start, image.first)
        return end

    def ready_len(self, sequence: Sequence, start: int) -> int:
        """The first token from `start` on whose image is not there; prefill_len if all are."""
        for image in sequence.images:
            if start < image_end(image) and not self._is_there(_key(sequence, image)):
                return max(start, image.first)
        return sequence.prefill_len

    def fits(self, sequence: Sequence) -> bool:
        """Whether all images of a sequence can be there at once."""
        sizes = {_key(sequence, image): image.rows * image.columns for image in sequence.images}
        return sum(sizes.values()) <= self._capacity

    @property
    def lacks_room(self) -> bool:
        """Whether an image of this plan, or the next to be asked for, waits until others go."""
        return self._lacks_room

    def _is_there(self, key: _Key) -> bool:
        return key in self._held and self._held[key].number not in self._asked

    def _provide(self, key: _Key, image: Image, prefilling: Iterable[Sequence]) -> bool:
        tokens = image.rows * image.columns
        if key in self._held:
            self._held.move_to_end(key)
        elif self._lacks_room or tokens > self._left and (self.fresh or self.is_ahead):
            return False
        elif not self._make_room(tokens, prefilling):
            # Nor are other images encoded in this plan: they could take the room for ever.
            self._lacks_room = True
            return False
        else:
            number = self._next_number
            self._held[key] = _Held(number, tokens)
            pixels = ImagePixels(number, image.height, image.width, image.pixels)
            if self.is_ahead:
                self._asked[number] = key
                self._landing += tokens
                self._orders.encode.append(pixels)
            else:
                self.fresh.append(pixels)
            self._unused.add(number)
            self._next_number += 1
            self._size += tokens
            self._left -= tokens
        self._used.add(key)
        return True

    def _make_room(self, tokens: int, prefilling: Iterable[Sequence]) -> bool:
        """Drop embeddings that no sequence needs until there is room for `tokens` more.

        What an encoder has stays: it is there soon, and can be dropped then.
        """
        needed = self._used | {
            _key(sequence, image)
            for sequence in prefilling
            for image in sequence.images
            if image.first < sequence.planned < image_end(image)
        }
        needed.update(self._asked.values())
        excess = self._size + tokens - self._capacity
        others = [key for key in self._held if key not in needed]
        if sum(self._held[key].tokens for key in others) < excess:
            return False
        for key in others:
            if excess <= 0:
                break
            excess -= self._held[key].tokens
            self._drop(key)
        return True

    def _drop(self, key: _Key) -> None:
        """Drop embeddings that are there or have landed."""
        held = self._held.pop(key)
        self._size -= held.tokens
        self._unused.discard(held.number)
        if held.number in self._landed:
            self._free(self._landed.pop(held.number))
        else:
            self._forgotten.append(held.number)

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
                    if not at:
                        self.num_hits += number not in self._unused
                        self._unused.discard(number)
        return found

    # ------------------------------------------------------------ encoders

    def take_orders(self) -> ImageOrders:
        """What encoders have to do since the last call."""
        orders = self._orders
        self._orders = ImageOrders([], [], [])
        return orders

    def landed(self, number: int, place: int) -> None:
        """An encoder has written an image to `place`."""
        key = self._asked.pop(number, None)
        if key is None:  # it was cancelled too late
            self._orders.release.append(place)
            return
        self._landed[number] = LandedImage(number, place, self._held[key].tokens)
        self.num_encoded += 1

    def not_landed(self, number: int) -> set[_Key]:
        """An image cannot be encoded. Returns its key, for `needs`; nothing if it was cancelled."""
        key = self._asked.get(number)
        if key is None:
            return set()
        self._drop_asked(number)
        return {key}

    @staticmethod
    def needs(sequence: Sequence, start: int, keys: set[_Key]) -> bool:
        """Whether tokens from `start` on have one of these images."""
        return any(
            start < image_end(image) and _key(sequence, image) in keys for image in sequence.images
        )

    def _free(self, image: LandedImage) -> None:
        self._orders.release.append(image.place)
        self._landing -= image.tokens

    def _drop_asked(self, number: int) -> int:
        held = self._held.pop(self._asked.pop(number))
        self._size -= held.tokens
        self._landing -= held.tokens
        self._unused.discard(number)
        return number

    # ------------------------------------------------------------ state

    def check_integrity(self, users: Iterable[Sequence], flights: Iterable[StepPlan]) -> None:
        """Raise IntegrityError if the bookkeeping contradicts itself; the message says how.

        `users`: the waiting and prefilling sequences. `flights`: the plans in flight.
        """
        size = sum(held.tokens for held in self._held.values())
        if size != self._size or size > self._capacity:
            raise IntegrityError(f"Embeddings of {size} tokens are held, {self._size} counted.")
        numbers = [held.number for held in self._held.values()] + self._forgotten
        if len(set(numbers)) < len(numbers):
            raise IntegrityError(f"An image is held twice, or held and forgotten: {numbers}.")
        sizes = {held.number: held.tokens for held in self._held.values()}
        states = [*self._asked, *self._landed]
        if len(set(states)) < len(states) or not sizes.keys() >= {*states, *self._unused}:
            raise IntegrityError(f"Images are asked for and landed, or not held: {states}.")
        landed = [*self._landed.values(), *[image for plan in flights for image in plan.arrived]]
        landing = sum([sizes[number] for number in self._asked] + [each.tokens for each in landed])
        if landing != self._landing or self.is_ahead and landing > self._budget:
            raise IntegrityError(f"Encoders have {landing} tokens, {self._landing} counted.")
        places = [image.place for image in landed]
        if len(set(places)) < len(places):
            raise IntegrityError(f"Two images are in one place: {places}.")
        counted = Counter[_Key]()
        for sequence in users:
            counted.update({_key(sequence, image) for image in sequence.images})
        if counted != self._users:
            raise IntegrityError("The sequences that need an image are miscounted.")


def _key(sequence: Sequence, image: Image) -> _Key:
    """With the size, which says how many embeddings there are, whatever the digest. Sequences with
    other salts share nothing, or response times would tell whose images are there.
    """
    return sequence.sampling.cache_salt, image.digest, image.height, image.width
