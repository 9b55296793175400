"""`gllm chat`: the history and the keys."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from gllm_client.chat import HINT, Chat, Message
from gllm_client.protocol import Chunk, GenerateError, Output


class Model:
    """Answers in two chunks; remembers what it was asked and which iterators were closed."""

    def __init__(self) -> None:
        self.asked: list[list[Message]] = []
        self.closed = 0

    def __call__(self, messages: list[Message]) -> Iterator[Chunk]:
        self.asked.append(messages)
        try:
            yield Chunk((Output("Well, "),))
            if messages[-1]["content"] == "interrupt":
                raise KeyboardInterrupt
            if messages[-1]["content"] == "refuse":
                raise GenerateError("too long")
            yield Chunk((Output("yes."),))
        finally:
            self.closed += 1


class Keyboard:
    def __init__(self, *keys: str | type[BaseException]) -> None:
        self._keys = [*keys, EOFError]

    def __call__(self, prompt: str) -> str:
        key = self._keys.pop(0)
        if not isinstance(key, str):
            raise key
        return key


def run(*keys: str | type[BaseException], system: str | None = None) -> tuple[Model, Chat, str]:
    model, written = Model(), []
    chat = Chat(model, system, write=written.append)
    chat.run(Keyboard(*keys))
    return model, chat, "".join(written)


def said(*contents: str) -> list[Message]:
    roles = ["user", "assistant"] * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def test_the_history_is_kept() -> None:
    model, chat, written = run("Hi", "  ", "And?", system="Be kind.")
    system = [{"role": "system", "content": "Be kind."}]
    assert model.asked == [system + said("Hi"), system + said("Hi", "Well, yes.", "And?")]
    assert chat.messages == system + said("Hi", "Well, yes.", "And?", "Well, yes.")
    assert written == f"{HINT}\nWell, yes.\nWell, yes.\n\n"


def test_ctrl_c_stops_the_answer_not_the_program() -> None:
    model, chat, written = run("interrupt", "Hi")
    assert chat.messages == said("interrupt", "Well, ", "Hi", "Well, yes.")
    assert "Well,  [stopped]\n" in written and model.closed == 2


def test_ctrl_c_at_the_prompt_says_how_to_leave() -> None:
    _, chat, written = run(KeyboardInterrupt, "Hi")
    assert written.count(HINT) == 2 and chat.messages == said("Hi", "Well, yes.")


def test_a_refused_question_is_forgotten() -> None:
    model, chat, written = run("refuse", "Hi")
    assert "[too long]\n" in written
    assert chat.messages == said("Hi", "Well, yes.") and model.closed == 2


def test_clear_forgets_all_but_the_system_message() -> None:
    _, chat, _ = run("Hi", "/clear", system="Be kind.")
    assert chat.messages == [{"role": "system", "content": "Be kind."}]


def test_images_go_with_the_next_question(tmp_path: Path) -> None:
    """A path alone is an image if it is one; terminals quote the paths that are dropped."""
    path = tmp_path / "a cat.png"
    path.write_bytes(b"cat")
    odd = tmp_path / "scan"
    odd.write_bytes(b"scan")
    keys = (f"'{path}'", f"/image {odd}", "What is it?", "And?", str(tmp_path / "no.png"))
    model, _, written = run(*keys, f"/image {tmp_path}/gone", "it's")
    urls = [
        f"data:{kind};base64,{base64.b64encode(content).decode()}"
        for kind, content in (("image/png", b"cat"), ("application/octet-stream", b"scan"))
    ]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    first = [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]
    assert model.asked[0] == first
    assert model.asked[1][0] == first[0]
    assert model.asked[1][-1] == {"role": "user", "content": "And?"}
    assert [asked[-1]["content"] for asked in model.asked[2:]] == [keys[-1], "it's"]
    assert "[a cat.png goes with the next question]\n[scan goes with" in written
    assert f"[{tmp_path}/gone: No such file or directory]\n" in written
    film = tmp_path / "a.mp4"
    film.write_bytes(b"film")
    model, _, _ = run(str(film), "And this?")
    assert model.asked[0][0]["content"][0] == {
        "type": "video_url",
        "video_url": {"url": "data:video/mp4;base64," + base64.b64encode(b"film").decode()},
    }
    cleared, _, _ = run(f"/image {odd}", "/clear", "Hi")
    assert cleared.asked == [said("Hi")]


def test_an_animated_gif_goes_as_a_video(tmp_path: Path) -> None:
    """One of a single frame is an image, as for the engine."""
    frames = [Image.effect_noise((90, 80), spread) for spread in (9, 40, 90)]
    own_colours = [frame.quantize(10 + 7 * i) for i, frame in enumerate(frames)]
    for number, options in enumerate(
        ({}, {"duration": 40, "transparency": 0}, {"comment": b"," * 300, "loop": 0}, {})
    ):
        frames = frames if number < 3 else own_colours
        for count, part in ((1, "image_url"), (2, "video_url"), (3, "video_url")):
            path = tmp_path / f"{count}.gif"
            rest = frames[1:count]
            frames[0].save(path, save_all=True, append_images=rest, **options)
            assert sent(path) == (part, path.read_bytes())
    cut = tmp_path / "cut.gif"
    for length in (6, 10, 11, 300, 3000):
        cut.write_bytes((tmp_path / "1.gif").read_bytes()[:length])
        assert sent(cut)[0] == "image_url"


def sent(path: Path) -> tuple[str, bytes]:
    """The kind of the part as which a GIF is sent, and its content."""
    model, _, _ = run(str(path), "What is it?")
    part = model.asked[0][0]["content"][0]
    head, _, content = part[part["type"]]["url"].partition(",")
    assert head == "data:image/gif;base64"
    return part["type"], base64.b64decode(content)


def test_kinds_of_files_are_known_on_every_machine() -> None:
    """Also without the files of an operating system, as in a small container."""
    program = (
        "import mimetypes; mimetypes.knownfiles.clear(); import gllm_client.chat; "
        "print(*(mimetypes.guess_type(name)[0] for name in ('a.mkv', 'a.webp')))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert found.stdout == b"video/x-matroska image/webp\n"
