"""Which frames of a video a family takes, when they are, and their size: arithmetic only.

Equal to that of transformers and of the families' own code, which take 2 frames a second and bound
all frames together. transformers does that if told to: do_sample_frames, cap_pixels_per_frame.
"""

from __future__ import annotations

from struct import pack, unpack

from msgspec import Struct

from gllm_engine.images.resize import PixelRange


class _Rule(Struct, frozen=True, tag=True):
    factor: int  # pixels of an embedding's side
    least: int  # pixels
    most: int
    frame_most: int  # pixels of a frame, whatever the others
    fps: float  # frames to take of a second
    min_frames: int
    max_frames: int


class Spaced(_Rule, frozen=True, tag=True):
    """Frames are told apart by their rotary positions of time (Qwen2.5-VL, arXiv 2502.13923).

    `least` and `most` are of a frame. `cap`: of all frames, 0: none.
    """

    cap: int
    positions_per_s: int

    def indices(self, total: int, fps: float) -> list[int]:
        """Numbers of the frames to take, of `total`, at least 2, with `fps` a second.

        transformers' arithmetic in float32 may take one more, behind the video's end.
        """
        wanted = min(max(total / fps * self.fps, self.min_frames), self.max_frames, total)
        number = int(wanted) // 2 * 2
        return [i * total // number for i in range(number)]

    def size(self, number: int, height: int, width: int) -> tuple[int, int]:
        """Height and width to which `number` frames are resized, in pixels."""
        most = self.most
        if self.cap:
            most = max(min(most, self.cap * 2 // number), int(self.least * 1.05))
        fit = PixelRange(self.factor, self.least, min(most, self.frame_most)).fit
        return fit(height, width).size

    def times(self, taken: list[int], total: int, fps: float) -> list[int]:
        """For each pair of frames, how far its rotary position of time is after the first's."""
        interval = _float32(self.positions_per_s * (2 / (len(taken) / total * fps)))
        return [int(_float32(i * interval)) for i in range(len(taken) // 2)]


class Stamped(_Rule, frozen=True, tag=True):
    """A text before each pair of frames tells their time (Qwen3-VL, arXiv 2511.21631).

    `least` and `most` are of all frames. `cap`: of a frame, and then `most` is shared evenly; 0:
    none.
    """

    cap: int

    def indices(self, total: int, fps: float) -> list[int]:
        """As Spaced.indices."""
        number = min(max(int(total / fps * self.fps), self.min_frames), self.max_frames, total)
        step = (total - 1) / max(1, number - 1)
        return [round(i * step) for i in range(number)]

    def size(self, number: int, height: int, width: int) -> tuple[int, int]:
        """As Spaced.size."""
        most = self.most
        if self.cap:
            most = max(min(self.cap, most // number), int(self.least * 1.05)) * number
        scale = max(1, self.factor / height, self.factor / width)
        fit = PixelRange(self.factor, self.least, min(most, self.frame_most * number)).fit
        return fit(int(height * scale), int(width * scale), number).size

    def seconds(self, taken: list[int], fps: float) -> list[float]:
        """The time of each pair of frames; an odd last frame is a pair."""
        times = [index / fps for index in taken]
        lasts = times[1::2] + times[-1:]
        return [(first + last) / 2 for first, last in zip(times[::2], lasts, strict=False)]


def _float32(number: float) -> float:
    (rounded,) = unpack("f", pack("f", number))
    return float(rounded)
