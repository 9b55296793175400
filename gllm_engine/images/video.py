"""A model's video processor: from the bytes of a file to the moments that its vision tower takes.

A video is decoded by a process of its own, see video_decoder.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from socket import socketpair
from time import monotonic
from typing import BinaryIO

from msgspec import DecodeError, Struct, json

from gllm_engine.files import shown
from gllm_engine.images.video_rule import Spaced, Stamped
from gllm_engine.sampling import InvalidField
from gllm_engine.types import Image

LOOK_S = 0.1  # between two looks whether anybody still waits
MAX_FRAMES = 1 << 20  # of a file: ten hours at 29 a second
# FFmpeg's formats, by what is at a place of a file.
CONTAINERS = (
    (4, b"ftyp", "mov,mp4,m4a,3gp,3g2,mj2"),
    (0, b"\x1a\x45\xdf\xa3", "matroska,webm"),
    (8, b"AVI ", "avi"),
    (0, b"GIF8", "gif"),
)
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mjpeg", "gif")

Reserve = Callable[[int], None]


class Task(Struct, frozen=True):
    """Parent -> decoder: what to decode."""

    container: str  # one of CONTAINERS
    rule: Spaced | Stamped
    max_pixels: int  # of a frame before it is resized
    max_tokens: int  # of the frames that are taken
    seconds: int  # of the clock

    @property
    def most_bytes(self) -> int:
        """Of pixels of the frames that are taken."""
        return 2 * 3 * self.rule.factor**2 * self.max_tokens


class Decoded(Struct, frozen=True):
    """Decoder -> parent: what the pixels after it are, or a sentence that says why none are.

    Before, it tells how many bytes of pixels there will be, in digits by a socket, and waits until
    the parent closes it.
    """

    problem: str = ""
    height: int = 0
    width: int = 0
    taken: list[int] = []  # numbers of the frames
    total: int = 0  # frames of the file
    fps: float = 0.0

    @property
    def bytes(self) -> int:
        """Of pixels. An odd frame makes a pair with itself."""
        return 3 * self.height * self.width * (len(self.taken) + len(self.taken) % 2)


@dataclass(frozen=True)
class PreparedVideo:
    """Its places in a prompt, `first`, are 0 until it is placed."""

    moments: list[Image]
    seconds: list[float]  # of each moment, for a text before it; empty if there is none


@dataclass(frozen=True)
class VideoProcessor:
    """Threads may share it. A moment is two frames."""

    rule: Spaced | Stamped
    placeholder: int  # token id
    around: tuple[int, int]  # token ids before and after a moment that has a time as text
    max_bytes: int  # of a file
    max_pixels: int  # of a file's frames, before they are resized
    seconds: float  # that decoding may take

    def prepare(
        self,
        data: bytes,
        number: int = 1,
        max_tokens: int = 1 << 30,
        is_over: Callable[[], bool] = lambda: False,
        reserve: Reserve = lambda size: None,
    ) -> PreparedVideo:
        """Decode and resize a video file. Errors call it video `number`.

        `is_over`: whether nobody waits for it any more. `reserve`: gets the number of bytes of
        memory before they are taken, without the decoder's own. Raises what it raises, and
        InvalidField for what is no video, is broken, too large, takes too long to decode or more
        than `max_tokens`.
        """
        try:
            return self._prepare(data, max_tokens, is_over, reserve)
        except ValueError as error:
            raise InvalidField("video", f"video {number}: {error}") from None

    def _prepare(
        self, data: bytes, max_tokens: int, is_over: Callable[[], bool], reserve: Reserve
    ) -> PreparedVideo:
        if not can_decode():
            raise ValueError("videos need PyAV, which the extra 'video' of gllm-triton installs")
        if len(data) > self.max_bytes:
            raise ValueError(f"it has {len(data)} bytes, at most {self.max_bytes} are allowed")
        found = (name for at, mark, name in CONTAINERS if data.startswith(mark, at))
        container = next(found, None)
        if container is None:
            raise ValueError(
                f"it is none of MP4, MOV, WEBM, MKV, AVI and GIF, it begins with {shown(data[:16])}"
            )
        task = Task(container, self.rule, self.max_pixels, max_tokens, ceil(self.seconds))
        # Files in memory, so that neither process waits for the other to read or write.
        with _memory_file() as source, _memory_file() as output:
            reserve(len(data))
            source.write(data)
            source.seek(0)
            self._run(task, source, output, is_over, reserve)
            output.seek(0)
            try:
                decoded = json.decode(output.readline(), type=Decoded)
            except DecodeError as error:
                raise ValueError(f"the process that decodes it wrote no answer ({error})") from None
            if decoded.problem:
                raise ValueError(decoded.problem)
            size = os.fstat(output.fileno()).st_size - output.tell()
            if not decoded.total or not size or size != decoded.bytes:
                raise ValueError("the process that decodes it wrote no whole answer")
            return self._prepared(decoded, output)

    def _run(
        self,
        task: Task,
        source: BinaryIO,
        output: BinaryIO,
        is_over: Callable[[], bool],
        reserve: Reserve,
    ) -> None:
        socket, its = socketpair()
        socket.settimeout(LOOK_S)
        program = [sys.executable, "-m", "gllm_engine.images.video_decoder"]
        command = [*program, json.encode(task).decode(), str(its.fileno())]
        # Python imports from the working directory first, which may hold any code.
        home = Path(__file__).parents[2]
        deadline = monotonic() + self.seconds
        with (
            socket,
            its,
            subprocess.Popen(
                command, stdin=source, stdout=output, pass_fds=[its.fileno()], cwd=home
            ) as process,
        ):
            try:
                while process.poll() is None:
                    left = deadline - monotonic()
                    if left <= 0 or is_over():
                        raise ValueError(f"it takes longer to decode than {self.seconds:g} s")
                    with suppress(TimeoutError, subprocess.TimeoutExpired):
                        if socket.fileno() < 0:
                            process.wait(min(left, LOOK_S))
                        else:
                            told = int(socket.recv(20))
                            if not 0 < told <= task.most_bytes:
                                raise ValueError(f"its decoder tells of {told} bytes of frames")
                            reserve(2 * told)  # in `output`, then as moments
                            socket.close()
            finally:
                process.kill()
        if process.returncode:
            raise ValueError(f"its decoder ended with exit status {process.returncode}")

    def _prepared(self, decoded: Decoded, pixels: BinaryIO) -> PreparedVideo:
        rule = self.rule
        number = (len(decoded.taken) + 1) // 2
        times: list[int | None] = [None] * number
        seconds: list[float] = []
        if isinstance(rule, Spaced):
            times[1:] = rule.times(decoded.taken, decoded.total, decoded.fps)[1:]
        else:
            seconds = rule.seconds(decoded.taken, decoded.fps)
        size = 2 * 3 * decoded.height * decoded.width
        moments = [self._moment(decoded, pixels.read(size), time) for time in times]
        return PreparedVideo(moments, seconds)

    def _moment(self, decoded: Decoded, pixels: bytes, time: int | None) -> Image:
        header = f"video {decoded.height} {decoded.width} "
        digest = sha256(header.encode())
        digest.update(pixels)
        columns = decoded.width // self.rule.factor
        return Image(
            digest=digest.digest()[:16],
            first=0,
            rows=decoded.height // self.rule.factor,
            columns=columns,
            stride=columns,
            height=decoded.height,
            width=decoded.width,
            pixels=pixels,
            time=time,
        )


def can_decode() -> bool:
    """Whether the libraries that decode videos are installed."""
    return all(map(find_spec, ("av", "PIL")))


def _memory_file() -> BinaryIO:
    return os.fdopen(os.memfd_create("video"), "w+b")
