"""The images and videos of a model's prompts, for front ends: from sources to places.

Reads and prepares them on threads of its own. Fetching waits for others' servers and preparing
computes, so each has its threads. Videos take longer than images, so they have others: an image
waits for no video, and one that is given whole waits for no server.
"""

from __future__ import annotations

import os
import re
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from gllm_engine.config import EngineConfig
from gllm_engine.engine.image_memory import ImageMemory, ImageShare
from gllm_engine.images import Prepared, PreparedVideo, can_decode, place, read_processor
from gllm_engine.images.fetch import ImageSources
from gllm_engine.images.spread import SpreadPool
from gllm_engine.sampling import InvalidField, shown
from gllm_engine.text.image_parts import MediaKind, Video, not_taken, with_places
from gllm_engine.text.tokenizer import Tokenizer
from gllm_engine.types import Image

FETCH_THREADS = 32
PREPARE_THREADS = min(8, os.cpu_count() or 1)
# No image or video file begins so.
_BASE64 = re.compile(rb"[A-Za-z0-9+/\s]{16}|[A-Za-z0-9+/\s]*=*\s*$")
Source = bytes | str | Video  # a file, its base64, or a URL; of an image unless it is a Video


def is_url(source: Source) -> bool:
    """Whether a source is a text that is no base64."""
    return isinstance(source, str) and ":" in source[:8]


def to_sources(media: Sequence[Any]) -> list[Any]:
    """What a Python caller gives as images and Videos: a Path becomes the file's content, an image
    of Pillow a PNG file. A text is never a path here, because messages may be a stranger's. Raises
    InvalidField for a file that cannot be read."""
    found: list[Any] = []
    for given, kind, number in _numbered(media):
        inner = _inner(given)
        try:
            if type(inner).__module__.startswith("PIL."):
                file = BytesIO()
                inner.save(file, "PNG", compress_level=1)
                inner = file.getvalue()
            elif isinstance(inner, os.PathLike):
                inner = Path(inner).read_bytes()
        except (OSError, ValueError) as error:
            raise InvalidField(kind, f"{kind} {number}: it cannot be read ({error})") from None
        found.append(Video(inner) if kind == "video" else inner)
    return found


def _numbered(media: Sequence[Any]) -> Iterator[tuple[Any, MediaKind, int]]:
    """Images and Videos, each with its number among those of its kind."""
    counts = Counter[MediaKind]()
    for each in media:
        kind = _kind(each)
        counts[kind] += 1
        yield each, kind, counts[kind]


def _different(sources: Sequence[Any]) -> dict[Source, int]:
    """Different sources, with the number of the first one. Raises InvalidField."""
    numbers: dict[Source, int] = {}
    for source, kind, number in _numbered(sources):
        if not isinstance(_inner(source), bytes | str):
            problem = f"{shown(_inner(source))} is no URL or base64"
            raise InvalidField(kind, f"{kind} {number}: {problem}")
        numbers.setdefault(source, number)
    return numbers


def _kind(source: Any) -> MediaKind:
    return "video" if isinstance(source, Video) else "image"


def _inner(source: Any) -> Any:
    return source.source if isinstance(source, Video) else source


def _is_remote(source: Any) -> bool:
    given = _inner(source)
    return isinstance(given, str) and given[:4].lower() == "http"


class ImageLoader:
    """Threads may share it; their images take turns.

    `texts`: what stands for an image or a video in a text, by the kinds that the model takes.
    """

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer) -> None:
        """Raises ConfigError or ArchError."""
        self._processor = read_processor(config)
        self._most = {"image": config.max_images, "video": config.max_videos}
        self._sources = {kind: ImageSources(config, kind) for kind in self._most}
        self._encode = partial(tokenizer.encode, add_special_tokens=False)
        self._tokens: dict[MediaKind, str] = {}  # the placeholders' texts
        self.texts: dict[MediaKind, str] = {}
        self._placeholders: dict[MediaKind, int] = {}
        if self._processor is not None:
            self._placeholders["image"] = self._processor.placeholder
            if self._processor.videos is not None:
                self._placeholders["video"] = self._processor.videos.placeholder
        for kind, placeholder in self._placeholders.items():
            self._tokens[kind] = tokenizer.token_text(placeholder)
            self.texts[kind] = tokenizer.media_text(kind, placeholder)
        self._fetching = {
            kind: ThreadPoolExecutor(FETCH_THREADS, f"fetch-{kind}") for kind in self._sources
        }
        self._preparing = {
            kind: SpreadPool(PREPARE_THREADS, f"prepare-{kind}") for kind in self._sources
        }

    @property
    def modalities(self) -> list[str]:
        """What a prompt may be made of here: text, image, video."""
        return ["text", *(kind for kind in self.texts if kind == "image" or can_decode())]

    def with_places(self, text: str, sources: Sequence[Any]) -> str:
        """A text with a place for each image: before it, unless it has places. So for videos."""
        kinds = list(map(_kind, sources))
        for kind in reversed(self.texts):
            text = with_places(text, self._tokens[kind], self.texts[kind], kinds.count(kind))
        return text

    def awaited(self, sources: Sequence[Source]) -> str | None:
        """The slowest of what loading them waits for: "video", another "server", or None."""
        if any(isinstance(source, Video) for source in sources):
            return "video"
        return "server" if any(map(_is_remote, sources)) else None

    def load(
        self,
        sources: Sequence[Source],
        max_tokens: int,
        is_over: Callable[[], bool] = lambda: False,
        share: ImageShare | None = None,
    ) -> list[Prepared]:
        """The images and videos of one prompt, equal sources only once. Blocks the caller's thread.

        `is_over`: whether nobody waits for them any more; then fetching stops. `share`: counts the
        memory that they take, and keeps their pixels. Raises InvalidField that names the first
        image with a problem, and for images of more than `max_tokens`; EngineUnavailable.
        """
        numbers = _different(sources)
        share = share or ImageShare(ImageMemory())
        sizes: list[int] = []  # tokens of the images that are prepared, which bound their pixels

        def check() -> None:
            if is_over():
                raise InvalidField("image", "the request is over")
            if sum(sizes) > max_tokens:
                problem = f"its images take more than the {max_tokens} tokens of prompt and output"
                raise InvalidField("prompt", f"{problem} (max_model_len)")

        def prepare(source: Source, content: bytes, part: ImageShare) -> Prepared:
            check()
            number = numbers[source]
            assert self._processor is not None
            if isinstance(source, Video):
                videos = self._processor.videos
                assert videos is not None
                return videos.prepare(content, number, max_tokens, is_over, part.reserve)
            return self._processor.prepare(content, number, self._preparing["image"], part.reserve)

        def read(source: Source) -> Prepared:
            with closing(ImageShare(share.memory, share)) as part:
                content = self._read(source, numbers[source], is_over, part.reserve)
                if _is_remote(source):
                    # The thread waits, so that there are never more files than threads.
                    pool = self._preparing[_kind(source)]
                    prepared: Prepared = pool.submit(prepare, source, content, part).result()
                else:
                    prepared = prepare(source, content, part)
                images = prepared.moments if isinstance(prepared, PreparedVideo) else [prepared]
                # They are counted already, so what is prepared is not refused.
                part.close(kept=sum(len(image.pixels) for image in images))
            sizes.append(sum(image.rows * image.columns for image in images))
            check()
            return prepared

        futures = {}
        for source in numbers:
            pools = self._fetching if _is_remote(source) else self._preparing
            futures[source] = pools[_kind(source)].submit(read, source)
        try:
            prepared = {source: future.result() for source, future in futures.items()}
        finally:
            for future in futures.values():
                future.cancel()
        return [prepared[source] for source in sources]

    def _read(
        self,
        source: Source,
        number: int,
        is_over: Callable[[], bool],
        reserve: Callable[[int], None],
    ) -> bytes:
        """The file at a URL or in base64, or the file that a source is: it begins otherwise."""
        given = _inner(source)
        kind = _kind(source)
        if is_url(given):
            return self._sources[kind].read(given, number, is_over, reserve)
        if isinstance(given, bytes) and not _BASE64.match(given):
            return given
        reserve(len(given))
        try:
            text = given.encode() if isinstance(given, str) else given
            return b64decode(b"".join(text.split()), validate=True)
        except ValueError:
            problem = "it is neither a file, nor its base64, nor a URL"
            raise InvalidField(kind, f"{kind} {number}: {problem}") from None

    def place(
        self, ids: list[int], media: Sequence[Prepared]
    ) -> tuple[list[int], tuple[Image, ...]]:
        """The prompt with all tokens of its images and videos, and where they are. Raises
        InvalidField.
        """
        has_places = any(placeholder in ids for placeholder in self._placeholders.values())
        if self._processor is None or not (media or has_places):
            return ids, ()
        return place(self._processor, ids, media, self._encode)

    def check(self, sources: Sequence[Any]) -> None:
        """Raise InvalidField for more images or videos than a prompt may have."""
        for kind, number in Counter(map(_kind, sources)).items():
            if kind not in self.texts:
                raise not_taken(kind)
            if number > self._most[kind]:
                problem = f"{number} {kind}s given, at most {self._most[kind]} (max_{kind}s)"
                raise InvalidField(kind, problem)

    def close(self) -> None:
        """End the threads, those that fetch once their server has answered or its time is over."""
        for pool in (*self._fetching.values(), *self._preparing.values()):
            pool.shutdown(wait=False, cancel_futures=True)
