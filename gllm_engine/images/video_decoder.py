"""The program that decodes a video, which is untrusted, in a process that may be killed.

    arguments    a Task, as JSON; the number of a socket, see Decoded
    its input    the file, which may be read at any place
    its output   a Decoded as JSON on a line, then uint8 [frames, height, width, 3]

A decoder is a large program in C, and a few bytes of a file may keep it busy for hours. So it has
a limit of memory here, its parent one of time, and it can open nothing. This is the only module
that imports PyAV; it uses Pillow to resize, as for images.
"""

from __future__ import annotations

import os
import resource
import sys
from typing import BinaryIO

import av
import av.subtitles.stream  # PyAV imports it when it opens a file, and nothing can be opened then
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from msgspec import json
from PIL import Image

from gllm_engine.images.resize import BICUBIC, MAX_ASPECT
from gllm_engine.images.video import CODECS, MAX_FRAMES, Decoded, Task
from gllm_engine.os_process import end_with_parent

THREADS = 4
MEMORY_LIMIT = 4 << 30  # bytes, with the libraries
PRIORITY = 10  # steps of the engine come first
DEFAULT_FPS = 24  # of a file that does not tell it
HEAD_BYTES = 1 << 20  # of a Decoded as JSON


class _Refused(Exception):
    """The message says why."""


def main() -> None:
    end_with_parent()
    task = json.decode(sys.argv[1], type=Task)
    os.nice(PRIORITY)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CPU, (THREADS * task.seconds,) * 2)
    # MEMORY_LIMIT does not count the output, which is a file in memory.
    resource.setrlimit(resource.RLIMIT_FSIZE, (HEAD_BYTES + task.most_bytes,) * 2)
    with open(0, "rb") as source, open(1, "wb") as output:
        _upright(Image.new("RGB", (1, 1)), 90, 1, 1)  # Pillow imports the rest of it now
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        try:
            _decode(task, source, output, int(sys.argv[2]))
        except _Refused as refusal:
            found = str(refusal)
        except MemoryError:  # FFmpeg's too
            found = f"it takes more than {MEMORY_LIMIT >> 30} GiB of memory to decode"
        except av.FFmpegError as error:
            found = f"it is a broken or truncated video ({error.strerror})"
        else:
            return
        output.seek(0)
        output.truncate()
        output.write(json.encode(Decoded(found)) + b"\n")


def _decode(task: Task, source: BinaryIO, output: BinaryIO, socket: int) -> None:
    with _opened(task, source) as container:
        total = _count(container, _stream(container, task))
    source.seek(0)
    with _opened(task, source) as container:
        stream = _stream(container, task)
        fps = float(stream.average_rate or DEFAULT_FPS)
        taken = task.rule.indices(total, fps)
        stream.codec_context.thread_count = THREADS
        stream.codec_context.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(task.max_pixels)}
        left = taken[::-1]
        image = None
        decoded = 0
        for number, frame in enumerate(container.decode(stream)):
            if not left:
                break
            decoded = number + 1
            if image is None:
                height, width = _size(task, len(taken), frame)
                head = Decoded("", height, width, taken, total, fps)
                output.write(json.encode(head) + b"\n")
                os.write(socket, b"%d" % head.bytes)
                os.read(socket, 1)
            if number == left[-1]:
                left.pop()
                image = _upright(frame.to_image(), frame.rotation, width, height)
                output.write(image)
        if image is None or left and decoded < total * 9 // 10:
            raise _Refused(f"it is broken, {decoded} of {total} frames can be decoded")
        # The last frame is there for a few that decoders leave out, and makes a pair of an odd one.
        for _ in range(len(left) + len(taken) % 2):
            output.write(image)


def _opened(task: Task, source: BinaryIO) -> InputContainer:
    # No format that refers to other files or addresses is tried.
    options = {"format_whitelist": task.container, "protocol_whitelist": "none"}
    opened: InputContainer = av.open(
        source,
        format=task.container.partition(",")[0],
        options=options,
        metadata_errors="replace",  # titles may be in any encoding
    )
    return opened


def _stream(container: InputContainer, task: Task) -> VideoStream:
    """The first stream of frames, whose decoder and size are allowed."""
    if not container.streams.video:
        raise _Refused("it has no stream of frames")
    stream = container.streams.video[0]
    codec = stream.codec_context and stream.codec_context.name  # None: FFmpeg has no decoder
    if codec not in CODECS:
        raise _Refused(f"its frames are {codec or 'unknown'}, not one of {', '.join(CODECS)}")
    _check_size(task, stream.width, stream.height)
    return stream


def _check_size(task: Task, width: int, height: int) -> None:
    if not 0 < width * height <= task.max_pixels:
        raise _Refused(
            f"a frame has {width} x {height} pixels, at most {task.max_pixels} are allowed"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _Refused(
            f"a frame has {width} x {height} pixels, one side is over {MAX_ASPECT} times the other"
        )


def _count(container: InputContainer, stream: VideoStream) -> int:
    """The number of frames to show. What a header says is not believed.

    MP4 and MOV may list frames that are not shown: a cut that keeps the file's frames. Only their
    index, which is of those shown and of those needed to decode them, tells what should be there.
    """
    there = total = 0
    for packet in container.demux(stream):
        there += packet.size > 0
        total += packet.size > 0 and not packet.is_discard
        if there > MAX_FRAMES:
            raise _Refused(f"it has more than {MAX_FRAMES} frames")
    is_mov = container.format.name.startswith("mov")
    listed = len(stream.index_entries) if is_mov else stream.frames
    if there < listed:
        raise _Refused(f"it is truncated, {there} of {listed} frames are there")
    if total < 2:
        raise _Refused(f"it has {total} frames, at least 2 are needed")
    return total


def _size(task: Task, number: int, frame: VideoFrame) -> tuple[int, int]:
    """Height and width of resized frames."""
    sides = (frame.height, frame.width)
    height, width = task.rule.size(number, *(sides if frame.rotation % 180 == 0 else sides[::-1]))
    tokens = (number + 1) // 2 * height * width // task.rule.factor**2
    if tokens > task.max_tokens:
        raise _Refused(
            f"its {number} frames of {width} x {height} pixels take {tokens} tokens, prompt and "
            f"output may have {task.max_tokens} (max_model_len)"
        )
    return height, width


def _upright(image: Image.Image, degrees: int, width: int, height: int) -> bytes:
    """A frame turned and resized, uint8 [height, width, 3]."""
    return image.rotate(degrees, expand=True).resize((width, height), BICUBIC).tobytes()


if __name__ == "__main__":
    main()
