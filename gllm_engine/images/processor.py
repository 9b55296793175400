"""A model's image processor: from the bytes of a file to the pixels that its vision tower takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

from gllm_engine.images.resize import MAX_ASPECT, Rule
from gllm_engine.images.spread import SpreadPool
from gllm_engine.images.video import Reserve, VideoProcessor
from gllm_engine.sampling import InvalidField
from gllm_engine.types import Image

# Of a resized pixel at most: 4 in Pillow's image, then 3 twice, in pieces and joined.
RESIZED_BYTES = 10
PreparedImage = Image  # its place in a prompt, `first`, is 0 until it is placed


@dataclass(frozen=True)
class ImageProcessor:
    """Threads may share it.

    An embedding stands for `rule.factor` x `rule.factor` pixels. `breaks`: the tokens after each
    row of embeddings and after the last one, for families that have them.
    """

    rule: Rule
    placeholder: int  # token id
    breaks: tuple[int, int] | None
    max_bytes: int  # of a file
    max_pixels: int  # of a file's image, before it is resized
    videos: VideoProcessor | None = None  # None: the family takes none, or not here

    def prepare(
        self,
        data: bytes,
        number: int = 1,
        pool: SpreadPool | None = None,
        reserve: Reserve = lambda size: None,
    ) -> PreparedImage:
        """Decode and resize an image file. Errors call it image `number`.

        `pool`: whose idle threads help. `reserve`: gets the number of bytes of memory before they
        are taken. Raises what it raises, and InvalidField for what is no image, is broken,
        animated, too large or too narrow.
        """
        try:
            from gllm_engine.images.decode import decode
            from gllm_engine.images.pixels import resized
        except ModuleNotFoundError:
            raise InvalidField(
                "image", "images need Pillow, which the extra 'images' of gllm-triton installs"
            ) from None
        image = decode(data, self.max_bytes, self.max_pixels, number, reserve)
        size = f"image {number}: it has {image.width} x {image.height} pixels"
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise InvalidField("image", f"{size}, one side is over {MAX_ASPECT} times the other")
        fit = self.rule.fit(image.height, image.width)
        rows = fit.height // self.rule.factor
        columns = fit.width // self.rule.factor
        if rows * columns > self.max_tokens:
            raise InvalidField(
                "image",
                f"{size}, which take {rows} x {columns} tokens, at most {self.max_tokens} are "
                "allowed",
            )
        reserve(RESIZED_BYTES * fit.size[0] * fit.size[1])
        image = resized(image, fit.size[::-1], pool)
        if fit.size != (fit.height, fit.width):
            image = image.crop((fit.left, fit.top, fit.left + fit.width, fit.top + fit.height))
        pixels = image.tobytes()
        header = f"{type(self.rule).__name__} {fit.height} {fit.width} "
        digest = sha256(header.encode())  # processors have instructions for it
        digest.update(pixels)
        return PreparedImage(
            digest=digest.digest()[:16],
            first=0,
            rows=rows,
            columns=columns,
            stride=columns + (self.breaks is not None),
            height=fit.height,
            width=fit.width,
            pixels=pixels,
        )

    def tokens(self, rows: int, columns: int) -> list[int]:
        """What a prompt has for an image of `rows` x `columns` embeddings."""
        row = [self.placeholder] * columns
        if self.breaks is None:
            return row * rows
        return [*[*row, self.breaks[0]] * (rows - 1), *row, self.breaks[1]]

    @cached_property
    def max_tokens(self) -> int:
        """The most placeholder tokens, so embeddings, of an image."""
        height, width = self.rule.largest()
        return height * width // self.rule.factor**2
