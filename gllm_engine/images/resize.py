"""The size that a family gives to an image: arithmetic only, equal to that of transformers.

A rule turns the size of an image into a Fit. Its `largest` is the height and the width in pixels of
an image with the most embeddings, or a few more where the most make no rectangle.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, isqrt, sqrt

MAX_SIDE = 65_535  # pixels of an image before it is resized; the limit of JPEG
BICUBIC = 3  # Pillow's number
MAX_ASPECT = 200  # of the longer side to the shorter one


@dataclass(frozen=True)
class Fit:
    """Resize to `size`, then cut [top : top + height, left : left + width] out, all in pixels.

    Pixels outside the resized image are black.
    """

    size: tuple[int, int]  # height, width
    height: int
    width: int
    top: int = 0
    left: int = 0


@dataclass(frozen=True)
class PixelRange:
    """Sides are multiples of `factor`, with from `least` to `most` pixels (Qwen2-VL). These may be
    of all frames of a video together, whose number is rounded to pairs (Qwen3-VL).

    Rounding up enlarges a small image of an odd shape to more pixels than `least`, and even than
    `most` where that is less than twice as many.
    """

    factor: int
    least: int
    most: int

    def fit(self, height: int, width: int, frames: int = 1) -> Fit:
        sides = [round(side / self.factor) for side in (height, width)]
        pixels = sides[0] * sides[1] * self.factor**2 * (round(frames / 2) * 2 or 1)
        if pixels > self.most:
            scale = sqrt(frames * height * width / self.most)
            sides = [max(1, floor(side / scale / self.factor)) for side in (height, width)]
        elif pixels < self.least:
            scale = sqrt(self.least / (frames * height * width))
            sides = [ceil(side * scale / self.factor) for side in (height, width)]
        return _whole((sides[0] * self.factor, sides[1] * self.factor))

    def largest(self) -> tuple[int, int]:
        # One side of two embeddings, of a little over one before rounding, doubles the least.
        most = max(self.most // self.factor**2, 2 * self.least // self.factor**2 + 2)
        rows = isqrt(most)
        return rows * self.factor, ceil(most / rows) * self.factor


@dataclass(frozen=True)
class LongestEdge:
    """Neither side is longer than `edge` before both are rounded up to `factor` (Pixtral)."""

    factor: int
    edge: int

    def fit(self, height: int, width: int) -> Fit:
        ratio = max(1, height / self.edge, width / self.edge)
        return _whole((self._side(height, ratio), self._side(width, ratio)))

    def largest(self) -> tuple[int, int]:
        side = self._side(self.edge, 1)
        return side, side

    def _side(self, pixels: int, ratio: float) -> int:
        return _up(max(1, floor(pixels / ratio)), self.factor)


@dataclass(frozen=True)
class CenterCrop:
    """The shorter side becomes `edge`; of that, the middle is taken (CLIP, so LLaVA)."""

    factor: int
    edge: int
    side: int  # of the middle

    def fit(self, height: int, width: int) -> Fit:
        short = min(height, width)
        size = (int(self.edge * height / short), int(self.edge * width / short))
        top = (size[0] - self.side) // 2
        return Fit(size, self.side, self.side, top, (size[1] - self.side) // 2)

    def largest(self) -> tuple[int, int]:
        return self.side, self.side


@dataclass(frozen=True)
class Padded:
    """Never enlarged, at most `patches` and `side` a side, then padded to `factor` (Kimi K2.5)."""

    factor: int
    patch: int  # pixels of a patch's side
    patches: int
    side: int  # patches

    def fit(self, height: int, width: int) -> Fit:
        patches = max(1, height // self.patch) * max(1, width // self.patch)
        edge = self.side * self.patch
        scale = min(1, sqrt(self.patches / patches), edge / height, edge / width)
        size = (self._side(height, scale), self._side(width, scale))
        return Fit(size, _up(size[0], self.factor), _up(size[1], self.factor))

    def largest(self) -> tuple[int, int]:
        most = _up(self.side * self.patch, self.factor) // self.factor
        columns = most
        shapes = []
        for rows in range(1, most + 1):
            while columns > 1 and not self._may_be(rows, columns):
                columns -= 1
            shapes.append((rows, columns))
        rows, columns = max(shapes, key=lambda shape: shape[0] * shape[1])
        return rows * self.factor, columns * self.factor

    def _may_be(self, rows: int, columns: int) -> bool:
        """Whether an image may have so many embeddings.

        An image of h x w pixels has more than h / patch - 1 and w / patch - 1 whole patches, and is
        scaled by the square root of `patches` / its whole patches.
        """
        pixels = [(count - 1) * self.factor + 1 for count in (rows, columns)]
        part = [1 + 1 / max(1, side // self.patch) for side in pixels]
        return pixels[0] * pixels[1] <= self.patches * self.patch**2 * part[0] * part[1]

    def _side(self, pixels: int, scale: float) -> int:
        return min(max(1, int(pixels * scale)), self.side * self.patch)


Rule = PixelRange | LongestEdge | CenterCrop | Padded


def _whole(size: tuple[int, int]) -> Fit:
    return Fit(size, *size)


def _up(pixels: int, factor: int) -> int:
    return -(-pixels // factor) * factor
