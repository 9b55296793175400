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
BAND = 64  # rows or columns: their memory stays in a processor's cache


def resized(image: Image, size: tuple[int, int], pool: SpreadPool | None) -> Image:
    """An RGB image, resized to `size`: width, height. In bands if threads of the pool are idle:
    their copies cost a fifth more.
    """
    if pool is None or pool.idle < 1 or PIL.__version__ != VERSION:
        return image.resize(size, BICUBIC)
    columns_first = image.height - size[1] > max(0, 2 * (image.width - size[0]))
    for axis in (1, 0) if columns_first else (0, 1):
        image = _stretched(image, axis, size[axis], pool)
    return image


def _stretched(image: Image, axis: int, length: int, pool: SpreadPool) -> Image:
    """After one pass. `axis`: 0 makes rows of `length` pixels, 1 columns."""
    result = new("RGB", (image.width, length) if axis else (length, image.height))

    def resize(start: int) -> None:
        first = (start, 0) if axis else (0, start)
        # What is outside of the image is black, and gets into no row or column of the result.
        last = (start + BAND, image.height) if axis else (image.width, start + BAND)
        band = image.crop((*first, *last))
        result.paste(band.resize((BAND, length) if axis else (length, BAND), BICUBIC), first)

    pool.spread(resize, range(0, image.size[1 - axis], BAND))
    return result
