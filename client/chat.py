"""`gllm chat`: a conversation at the terminal.

Owns the history and the handling of keys. The caller passes the source of answers, the input and
the output.
"""

from __future__ import annotations

import base64
import mimetypes
import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from gllm_client.protocol import Chunk, GenerateError

Message = dict[str, Any]
# Takes a conversation, yields the chunks of the next message. Closing the iterator cancels it.
Answer = Callable[[list[Message]], Iterator[Chunk]]

# Python knows these from files that not every machine has.
mimetypes.add_type("video/x-matroska", ".mkv")
mimetypes.add_type("image/webp", ".webp")

HINT = (
    "Ctrl-C stops an answer, /clear forgets the conversation, Ctrl-D leaves; "
    "/image PATH, or the path of an image or a video alone, goes with the next question."
)


class Chat:
    """A conversation. `refusals`: errors that fail one question but not the conversation."""

    def __init__(
        self,
        answer: Answer,
        system: str | None = None,
        refusals: tuple[type[Exception], ...] = (GenerateError,),
        write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
    ) -> None:
        self._answer = answer
        self._refusals = refusals
        self._write = write
        self._start: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._start)
        self._images: list[Message] = []  # content parts for the next question

    def run(self, read: Callable[[str], str]) -> None:
        """Read questions and write answers until the input ends."""
        self._write(f"{HINT}\n")
        while True:
            try:
                line = read("> ").strip()
            except KeyboardInterrupt:
                self._write(f"\n{HINT}\n")
                continue
            except EOFError:
                self._write("\n")
                return
            if line == "/clear":
                self.messages = list(self._start)
                self._images = []
            elif path := _image_path(line):
                self.attach(path)
            elif line:
                self.ask(line)

    def attach(self, path: Path) -> None:
        """Send an image or a video file with the next question."""
        try:
            content = path.read_bytes()
        except OSError as error:
            self._write(f"[{path}: {error.strerror}]\n")
            return
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        url = {"url": f"data:{kind};base64,{base64.b64encode(content).decode()}"}
        is_video = kind.startswith("video/") or _is_animated(content)
        part = "video_url" if is_video else "image_url"
        self._images.append({"type": part, part: url})
        self._write(f"[{path.name} goes with the next question]\n")

    def ask(self, question: str) -> None:
        """Ask one question and write its answer as it arrives. The history keeps the text of a
        stopped answer, and drops a refused question."""
        parts = [*self._images, {"type": "text", "text": question}]
        self.messages.append({"role": "user", "content": parts if self._images else question})
        self._images = []
        text = ""
        chunks = self._answer(list(self.messages))
        try:
            for chunk in chunks:
                text += chunk.text
                self._write(chunk.text)
        except KeyboardInterrupt:
            self._write(" [stopped]")
        except self._refusals as error:
            self.messages.pop()
            self._write(f"[{error}]\n")
            return
        finally:
            chunks.close()  # type: ignore[attr-defined]  # a generator: this cancels
        self._write("\n")
        self.messages.append({"role": "assistant", "content": text})


def _is_animated(file: bytes) -> bool:
    """Whether it is a GIF of several frames."""
    num_frames = 0
    at = 10
    with suppress(IndexError):  # it is truncated, which the engine tells
        at += 3 + _table_size(file[at])
        while file.startswith(b"GIF8") and file[at] in b",!":
            if file[at] == ord(","):
                num_frames += 1
                at += 9 + _table_size(file[at + 9])  # with the byte before its pixels
            at += 2  # what is next is a list of blocks, each with its size before it, 0 ends it
            while file[at]:
                at += 1 + file[at]
            at += 1
    return num_frames > 1


def _table_size(flags: int) -> int:
    """Bytes of the colours of a GIF, or of one of its frames."""
    return 6 << (flags & 7) if flags & 128 else 0


def _image_path(line: str) -> Path | None:
    """The path in a line that is one: /image PATH, or that of a file as terminals paste it."""
    command, _, rest = line.partition(" ")
    try:
        words = shlex.split(rest if command == "/image" else line)
    except ValueError:  # a quote without its end
        return None
    if len(words) != 1:
        return None
    path = Path(words[0]).expanduser()
    is_image = (mimetypes.guess_type(path)[0] or "").startswith(("image/", "video/"))
    return path if command == "/image" or (is_image and path.is_file()) else None
