"""Rotary positions of a sequence with images (M-RoPE, Qwen2-VL, arXiv 2409.12191).

A position has three parts: time, row and column. They are the same in text, which goes on after the
largest part of an image's positions. Here an image of 2 rows and 3 columns begins at token 2:

    token     0  1 |  2  3  4  5  6  7 |  8  9
    time      0  1 |  2  2  2  2  2  2 |  5  6
    row       0  1 |  2  2  2  3  3  3 |  5  6
    column    0  1 |  2  3  4  2  3  4 |  5  6

A moment of a video with Image.time has the rows and columns of the video's first one, and that time
after it. (Some versions of transformers go on after the largest row or column, whatever the time.)
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from gllm_engine.types import Image


class RotaryPositions:
    """`offset`: what the positions of tokens after the prompt add to their index. It is above 0
    only if moments are further apart than their tokens."""

    def __init__(self, prompt_len: int, images: Iterable[Image]) -> None:
        """`images`: in order; rows follow each other without other tokens between."""
        parts = [np.zeros((3, 0), np.int64)]
        token = 0
        start = 0  # position
        self.offset = 0
        for image in images:
            parts.append(self._text(token, image.first))
            after = image.first + self.offset  # the position after all those before it
            if image.time is None:
                start = after
            time = image.time or 0
            grid = np.indices((1, image.rows, image.columns)).reshape(3, -1)
            parts.append(grid + [[start + time], [start], [start]])
            token = image.first + image.rows * image.columns
            after = max(after, start + max(time + 1, image.rows, image.columns))
            self.offset = after - token
        parts.append(self._text(token, prompt_len))
        self._of_prompt = np.concatenate(parts, 1).astype(np.int32)

    def _text(self, start: int, end: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        return np.tile(np.arange(start, end) + self.offset, (3, 1))

    def packed(self, start: int, end: int) -> bytes:
        """int32 [3, end - start]: those of tokens `start` .. `end` - 1."""
        known = self._of_prompt.shape[1]
        after = self._text(max(start, known), max(end, known)).astype(np.int32)
        packed: bytes = np.concatenate([self._of_prompt[:, start:end], after], 1).tobytes()
        return packed
