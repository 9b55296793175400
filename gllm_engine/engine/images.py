"""The images of a model's prompts, for front ends: from their sources to their places.

Reads and prepares them on threads of its own. Fetching waits for others' servers and preparing
computes, so each has its threads, and a slow server delays no image of another kind.
"""

from __future__ import annotations

import os
import re
from base64 import b64decode
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

from gllm_engine.config import EngineConfig
from gllm_engine.images import PreparedImage, place, read_processor
from gllm_engine.images.fetch import ImageSources
from gllm_engine.sampling import InvalidField, shown
from gllm_engine.text.image_parts import no_images, with_places
from gllm_engine.text.tokenizer import Tokenizer
from gllm_engine.types import Image

FETCH_THREADS = 32
PREPARE_THREADS = min(8, os.cpu_count() or 1)
# No image file begins so.
_BASE64 = re.compile(rb"[A-Za-z0-9+/\s]{16}|[A-Za-z0-9+/\s]*=*\s*$")
Source = bytes | str  # a file, its base64, or a URL


def is_url(source: Source) -> bool:
    """Whether a source is a text that is no base64."""
    return isinstance(source, str) and ":" in source[:8]


def to_source(number: int, image: Any) -> Any:
    """What a Python caller gives as image `number`: a Path becomes the file's content, an image of
    Pillow a PNG file. A text is never a path here, because messages may be a stranger's. Raises
    InvalidField for a file that cannot be read."""
    try:
        if type(image).__module__.startswith("PIL."):
            file = BytesIO()
            image.save(file, "PNG", compress_level=1)
            return file.getvalue()
        return Path(image).read_bytes() if isinstance(image, os.PathLike) else image
    except (OSError, ValueError) as error:
        raise InvalidField("image", f"image {number}: it cannot be read ({error})") from None


def _is_remote(source: Source) -> bool:
    return isinstance(source, str) and source[:4].lower() == "http"


def _from_base64(source: Source, number: int) -> bytes:
    """The file whose base64 a source is; a file, which begins otherwise, as it is."""
    if isinstance(source, bytes) and not _BASE64.match(source):
        return source
    try:
        text = source.encode() if isinstance(source, str) else source
        return b64decode(b"".join(text.split()), validate=True)
    except ValueError:
        problem = "neither an image file, nor its base64, nor a URL"
        raise InvalidField("image", f"image {number}: it is {problem}") from None


class ImageLoader:
    """Threads may share it; their images take turns.

    `text`: what stands for an image in a text; None if the model takes no images.
    """

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer) -> None:
        """Raises ConfigError or ArchError."""
        self._processor = read_processor(
            Path(config.model),
            config.image_max_pixels,
            max_mib=config.max_image_mib,
            max_megapixels=config.max_image_megapixels,
            tokenizer=Path(config.tokenizer) if config.tokenizer else None,
        )
        self._max_images = config.max_images
        self._sources = ImageSources(
            config.allowed_media_hosts,
            config.allowed_media_directory,
            max_mib=config.max_image_mib,
            timeout_s=config.media_timeout_s,
        )
        self._token = ""
        self.text: str | None = None
        if self._processor is not None:
            self._token = tokenizer.token_text(self._processor.placeholder)
            self.text = tokenizer.image_text(self._processor.placeholder)
        self._fetching = ThreadPoolExecutor(FETCH_THREADS, "fetch")
        self._preparing = ThreadPoolExecutor(PREPARE_THREADS, "prepare")

    def with_places(self, text: str, num_images: int) -> str:
        """A text with a place for each image: before it, unless it has places."""
        return with_places(text, self._token, self.text or "", num_images)

    def waits(self, sources: Sequence[Source]) -> bool:
        """Whether loading them waits for another server."""
        return any(map(_is_remote, sources))

    def load(
        self,
        sources: Sequence[Source],
        max_tokens: int,
        is_over: Callable[[], bool] = lambda: False,
        count_bytes: Callable[[int], None] = lambda size: None,
    ) -> list[PreparedImage]:
        """The images of one prompt, equal sources only once. Blocks the caller's thread.

        `is_over`: whether nobody waits for them any more; then fetching stops. `count_bytes`: gets
        the number of bytes of each image's pixels, and may raise to refuse them. Raises
        InvalidField that names the first image with a problem, and for images of more than
        `max_tokens`.
        """
        numbers: dict[Source, int] = {}
        for number, source in enumerate(sources, 1):
            if not isinstance(source, bytes | str):
                raise InvalidField("image", f"image {number}: {shown(source)} is no URL or base64")
            numbers.setdefault(source, number)

        sizes: list[int] = []  # tokens of the images that are prepared, which bound their pixels

        def check() -> None:
            if is_over():
                raise InvalidField("image", "the request is over")
            if sum(sizes) > max_tokens:
                problem = f"its images take more than the {max_tokens} tokens of prompt and output"
                raise InvalidField("prompt", f"{problem} (max_model_len)")

        def prepare(source: Source, content: bytes | None = None) -> PreparedImage:
            check()
            assert self._processor is not None
            content = self._read(source, numbers[source]) if content is None else content
            image = self._processor.prepare(content, numbers[source])
            sizes.append(image.rows * image.columns)
            count_bytes(len(image.pixels))
            check()
            return image

        def fetch(source: Source) -> PreparedImage:
            # The thread waits, so that there are never more files than threads.
            content = self._read(source, numbers[source], is_over)
            return self._preparing.submit(prepare, source, content).result()

        futures = {
            source: self._fetching.submit(fetch, source)
            if _is_remote(source)
            else self._preparing.submit(prepare, source)
            for source in numbers
        }
        try:
            prepared = {source: future.result() for source, future in futures.items()}
        finally:
            for future in futures.values():
                future.cancel()
        return [prepared[source] for source in sources]

    def _read(
        self, source: Source, number: int, is_over: Callable[[], bool] = lambda: False
    ) -> bytes:
        if isinstance(source, str) and is_url(source):
            return self._sources.read(source, number, is_over)
        return _from_base64(source, number)

    def place(
        self, ids: list[int], images: Sequence[PreparedImage]
    ) -> tuple[list[int], tuple[Image, ...]]:
        """The prompt with all tokens of its images, and where they are. Raises InvalidField."""
        if self._processor is None or not (images or self._processor.placeholder in ids):
            return ids, ()
        return place(self._processor, ids, images)

    def check(self, num_images: int) -> None:
        """Raise InvalidField for more images than a prompt may have."""
        if num_images and self.text is None:
            raise no_images()
        if num_images > self._max_images:
            problem = f"{num_images} images given, at most {self._max_images} (max_images)"
            raise InvalidField("image", problem)

    def close(self) -> None:
        """End the threads, those that fetch once their server has answered or its time is over."""
        for pool in (self._fetching, self._preparing):
            pool.shutdown(wait=False, cancel_futures=True)
