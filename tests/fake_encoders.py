"""Encoders without processes: images land when a test says so, in any order, late or never."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gllm_engine.types import ImagePixels
from gllm_engine.workers.encoders import EncoderStats, Landed, NotLanded


class FakeEncoders:
    """`write(place, image)`: puts an image into the landing, whose places are indices of tokens.

    `busy`: what encoders have, in the order of submission. `tokens_of`: how many an image takes.
    """

    def __init__(
        self,
        tokens: int,
        tokens_of: Callable[[ImagePixels], int],
        write: Callable[[int, ImagePixels], None],
    ) -> None:
        self._free = set(range(tokens))
        self._tokens_of = tokens_of
        self._write = write
        self._sizes: dict[int, int] = {}  # by place
        self._queue: list[ImagePixels] = []
        self._events: list[Landed | NotLanded] = []
        self.busy: dict[int, tuple[int, ImagePixels]] = {}  # place and image by number
        self.num_submitted = 0
        self.closed = False

    def submit(self, image: ImagePixels) -> None:
        self.num_submitted += 1
        self._queue.append(image)
        self._begin()

    def cancel(self, number: int) -> None:
        self._queue = [image for image in self._queue if image.number != number]
        if number in self.busy:
            self.release([self.busy.pop(number)[0]])

    def release(self, places: Iterable[int]) -> None:
        for place in places:
            self._free.update(range(place, place + self._sizes.pop(place)))
        self._begin()

    def poll(self) -> list[Landed | NotLanded]:
        events = self._events
        self._events = []
        return events

    def land(self, choice: int = 0) -> None:
        """One of those that encoders have, if there is any, is encoded."""
        if self.busy:
            number = list(self.busy)[choice % len(self.busy)]
            place, image = self.busy.pop(number)
            self._write(place, image)
            self._events.append(Landed(number, place))

    def fail(self, choice: int = 0) -> None:
        if self.busy:
            number = list(self.busy)[choice % len(self.busy)]
            place, _ = self.busy.pop(number)
            self.release([place])
            self._events.append(NotLanded(number, "every encoder that had it died"))

    @property
    def is_idle(self) -> bool:
        """Whether nobody holds a place or waits for one."""
        return not self._sizes and not self._queue

    def sockets(self) -> list[object]:
        return []

    def stats(self) -> EncoderStats:
        return EncoderStats(1, len(self._queue), len(self.busy), 2)

    def close(self) -> None:
        self.closed = True

    def _begin(self) -> None:
        while self._queue:
            tokens = self._tokens_of(self._queue[0])
            for place in sorted(self._free):
                wanted = set(range(place, place + tokens))
                if wanted <= self._free:
                    break
            else:
                return
            image = self._queue.pop(0)
            self._free -= wanted
            self._sizes[place] = tokens
            self.busy[image.number] = (place, image)
