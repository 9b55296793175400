"""Resizes Pillow's images, with the help of idle threads.

Pillow resizes in two passes, one along the rows and one along the columns, and rounds to bytes
between them. A pass treats each row, or column, by itself, and lets other threads run meanwhile. So
threads that resize bands beside each other make, bit for bit, what Pillow makes of the whole.
"""

from __future__ import annotations

import PIL
from PIL.Image import Image, new

from gllm_engine.images.resize import BICUBIC
from gllm_engine.images.spread import SpreadPool

# The order of the passes is not documented. It is the one below in this version.
VERSION = "13.0.0"
BAND_PIXELS = 1 << 17  # the memory of a band stays in a processor's cache


def resized(image: Image, size: tuple[int, int], pool: SpreadPool | None) -> Image:
    """An RGB image, resized to `size`: width, height. In bands if threads of the pool are idle:
    their copies cost a fifth more.
    """
    few = image.width * image.height + size[0] * size[1] <= BAND_PIXELS
    if few or pool is None or pool.idle < 1 or PIL.__version__ != VERSION:
        return image.resize(size, BICUBIC)
    height_lost = image.height - size[1]
    columns_first = height_lost > max(0, 2 * (image.width - size[0]))
    for axis in (1, 0) if columns_first else (0, 1):
        image = _stretched(image, axis, size[axis], pool)
    return image


def _stretched(image: Image, axis: int, length: int, pool: SpreadPool) -> Image:
    """After one pass. `axis`: 0 makes rows of `length` pixels, 1 columns."""

    def size(along: int, across: int) -> tuple[int, int]:
        return (across, along) if axis else (along, across)

    before = image.size[axis]
    breadth = image.size[1 - axis]
    result = new("RGB", size(length, breadth))
    step = max(1, BAND_PIXELS // max(length, before))

    def resize(start: int) -> None:
        end = min(start + step, breadth)
        band = image.crop((*size(0, start), *size(before, end)))
        result.paste(band.resize(size(length, end - start), BICUBIC), size(0, start))

    pool.spread(resize, range(0, breadth, step))
    return result
