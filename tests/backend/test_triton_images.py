"""Images of Triton requests: what of them reaches the engine, and what is refused."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from clips import clip, url_of
from fake_triton import InferenceRequest, Record, TritonError
from front import IMAGE, PLACE, SEES, VIDEO, VIDEO_PLACE, HandClient, front_end, request, text
from PIL import Image

from gllm_backend.gllm import model as backend
from gllm_backend.gllm.model import TritonPythonModel
from gllm_engine import Finish, InvalidField, Request
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.images import ImageProcessor
from gllm_engine.images.fetch import ImageSources
from gllm_engine.images.video import VideoProcessor

LENGTH = Finish("length")
Front = tuple[TritonPythonModel, HandClient]


def png(width: int, height: int, colour: str = "red") -> bytes:
    file = BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


RED, WIDE = png(56, 56), png(84, 56, "blue")  # of 2 x 2 and 2 x 3 tokens
RED_URL = "data:image/png;base64," + base64.b64encode(RED).decode()
SLOW = "https://slow.example/a.png"
# Two moments of 10 x 14 embeddings: frames are enlarged.
FILM = clip(codec="mjpeg", container="avi")
FILM_URL = url_of(FILM)


@pytest.fixture
def front(tmp_path, server) -> Iterator[Front]:
    with front_end(tmp_path, model=SEES, allowed_media_hosts=["slow.example"]) as pair:
        yield pair


def submitted(front: Front, given: InferenceRequest) -> list[Request]:
    """What the engine gets of a request, when it has been answered."""
    model, client = front
    arrived = threading.Event()
    client.on_submit = arrived.set
    model.execute([given])
    assert arrived.wait(10), given.record.error and given.record.error.message()
    requests = list(client.submitted)
    client.say([request.id for request in requests], "!", LENGTH)
    given.record.wait()
    return requests


def left_bytes(model: TritonPythonModel) -> int:
    """Bytes of images that are still counted when no thread is busy with any."""
    for pool in model._with_images.values():
        pool.shutdown()
    return int(model.image_memory.held)


def refused(front: Front, given: InferenceRequest) -> str:
    model, client = front
    model.execute([given])
    error = given.record.wait().error
    assert error is not None and error.code() == TritonError.INVALID_ARG
    assert not client.submitted
    return error.message()


A, B, USER = [97], [98], list(b"<user>")
FOUR, SIX = [IMAGE] * 4, [IMAGE] * 6


def test_videos_reach_the_engine(front: Front) -> None:
    """As a tensor, and in messages with an image beside it; its moments follow each other."""
    film = {"type": "video_url", "video_url": {"url": FILM_URL}}
    cases = [
        (request(f"a{VIDEO_PLACE}b", video=text(FILM)), A, B),
        (request(None, messages=messages({"type": "video"}), video=text(FILM)), [*USER, 91], [93]),
        (request(None, messages=messages(film, part(RED_URL))), [*USER, 91], [93, 91, *FOUR, 93]),
    ]
    for given, before, after in cases:
        (sequence,) = submitted(front, given)
        front[1].submitted.clear()
        one, two = sequence.images[:2]
        size = one.rows * one.columns
        assert sequence.prompt == [*before, *[VIDEO] * (2 * size), *after]
        assert (one.first, one.time) == (len(before), None)
        assert (two.first, two.time) == (len(before) + size, 4)
        assert len(two.pixels) == 2 * 3 * two.height * two.width


def messages(*content: Any) -> np.ndarray:
    return text(json.dumps([{"role": "user", "content": list(content)}]))


def part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


GOOD: dict[str, tuple[InferenceRequest, list[int]]] = {
    "files": (request(f"a{PLACE}b{PLACE}", image=text(RED, WIDE)), A + FOUR + B + SIX),
    "base64": (request(f"a{PLACE}", image=text(base64.b64encode(RED))), A + FOUR),
    "a URL": (request(f"a{PLACE}", image=text(RED_URL)), A + FOUR),
    "no places": (request("a", image=text(RED, WIDE)), [91, *FOUR, 93, 91, *SIX, 93, *A]),
    "token ids": (
        request(None, input_ids=np.array([97, IMAGE, 98], np.int32), image=text(RED)),
        A + FOUR + B,
    ),
    "messages": (
        request(None, messages=messages({"type": "text", "text": "a"}, part(RED_URL))),
        USER + A + [91, *FOUR, 93],
    ),
    "messages and files": (
        request(None, messages=messages({"type": "image"}, part(RED_URL)), image=text(WIDE)),
        USER + [91, *SIX, 93, 91, *FOUR, 93],
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_images_reach_the_engine(front: Front, case: str) -> None:
    given, prompt = GOOD[case]
    (sequence,) = submitted(front, given)
    assert sequence.prompt == prompt
    rest = list(prompt)
    for image in sequence.images:
        assert (image.height, image.width) == (28 * image.rows, 28 * image.columns)
        assert len(image.pixels) == 3 * image.height * image.width
        places = slice(image.first, image.first + image.rows * image.columns)
        assert rest[places] == [IMAGE] * image.rows * image.columns
        rest[places] = [0] * image.rows * image.columns
    assert IMAGE not in rest


def test_an_image_is_decoded_once(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal ones, and for n answers."""
    decoded = []
    prepare = ImageProcessor.prepare

    def counting(self: ImageProcessor, data: bytes, number: int, *more: Any) -> Any:
        decoded.append(number)
        return prepare(self, data, number, *more)

    monkeypatch.setattr(ImageProcessor, "prepare", counting)
    images = text(RED, WIDE, RED)
    one, two = submitted(front, request("a", sampling={"n": 2}, image=images))
    assert sorted(decoded) == [1, 2]
    assert one.images == two.images
    assert one.images[0].pixels is two.images[2].pixels
    assert [image.digest for image in one.images].count(one.images[0].digest) == 2


def test_the_answer_counts_and_repeats_the_prompt(front: Front) -> None:
    given = request("a", image=text(RED), return_num_input_tokens=True)
    submitted(front, given)
    (response,) = given.record.data
    assert response.text() == "a!"
    assert response.tensors["num_input_tokens"].tolist() == [7]


BAD: dict[str, tuple[InferenceRequest, str]] = {
    "fewer places": (
        request(f"{PLACE}", image=text(RED, RED)),
        "image: the prompt has 1 placeholders (token 299) for 2 images",
    ),
    "places without images": (
        request(f"a{PLACE}"),
        "image: the prompt has 1 placeholders (token 299) for 0 images",
    ),
    "parts without images": (
        request(None, messages=messages({"type": "image"}, part(RED_URL))),
        "image: 0 images given, the messages have 1 places for them",
    ),
    "images without parts": (
        request(None, messages=messages(part(RED_URL)), image=text(RED)),
        "image: 1 images given, the messages have 0 places for them",
    ),
    "broken": (request("a", image=text(RED, RED[:40])), "image: image 2: "),
    "no image": (request("a", image=text(b"\0hello")), "image: image 1: "),
    "a number": (
        request(None, messages=messages(part(7))),  # type: ignore[arg-type]
        "image: image 1: 7 is ",
    ),
    "a film as an image": (request("a", image=text(clip())), "image: image 1: it is none of JPEG"),
    "an image as a film": (request("a", video=text(RED)), "video: video 1: it is none of MP4"),
    "a broken film": (request("a", video=text(FILM, FILM[:900])), "video: video 2: it is "),
    "many films": (request("a", video=text(*[FILM] * 5)), "video: 5 videos given, at most 4"),
    "films without parts": (
        request(None, messages=messages(part(RED_URL)), video=text(FILM)),
        "video: 1 videos given, the messages have 0 places for them",
    ),
    "an image's URL": (request("a", video=text(RED_URL)), "video: video 1: data:image/png;base64"),
    "a long film": (
        request("a", video=text(clip(frames=192, codec="mjpeg", container="avi"))),
        "video: video 1: its 16 frames of 392 x 280 pixels take 1120 tokens",
    ),
    "many": (request("a", image=text(*[RED] * 65)), "image: 65 images given, at most 64"),
    "large": (
        request("a", image=text(png(1400, 1400))),
        "prompt: its images take more than the 1000 tokens of prompt and output",
    ),
    "a file": (request("a", image=text("file:///etc/passwd")), "image: image 1: "),
    "cut": (
        request("aaaa", image=text(RED), sampling={"truncate_prompt_tokens": 5}),
        "truncate_prompt_tokens: the prompt has 10 tokens and images",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_images_are_refused(front: Front, case: str) -> None:
    given, sentence = BAD[case]
    assert refused(front, given).startswith(sentence)


@pytest.mark.parametrize(
    "given",
    [
        request("a", image=text(RED)),
        request(None, messages=messages(part(RED_URL))),
        request(None, messages=messages({"type": "image"}), operation=text("tokenize")),
    ],
)
def test_a_text_model_takes_no_images(tmp_path, server, given: InferenceRequest) -> None:
    with front_end(tmp_path) as front:
        assert refused(front, given) == "image: this model takes no images"


def test_other_models_for_images_take_no_videos(tmp_path, server) -> None:
    sees = tiny_config("KimiK25ForConditionalGeneration") | {"image_token_id": IMAGE}
    film = {"type": "video_url", "video_url": {"url": FILM_URL}}
    with front_end(tmp_path, model=sees) as front:
        for given in (request("a", video=text(FILM)), request(None, messages=messages(film))):
            assert refused(front, given) == "video: this model takes no videos"


def told(front: Front, given: InferenceRequest) -> Record:
    front[0].execute([given])
    record = given.record.wait()
    assert record.error is None
    return record


def test_places_are_tokenized_with_and_without_their_images(front: Front) -> None:
    """A server in front renders places alone, and sends the images with the tokens."""
    tokenize = {"operation": text("tokenize")}
    ids = [
        told(front, request(None, **tokenize, **given)).data[0].tensors["token_ids"].tolist()
        for given in (
            {"messages": messages({"type": "image"})},
            {"messages": messages({"type": "image"}), "image": text(RED)},
            {"messages": messages(part(RED_URL))},
        )
    ]
    assert ids == [USER + [91, *places, 93] for places in ([IMAGE], FOUR, FOUR)]


def test_a_model_tells_whether_it_takes_images(front: Front) -> None:
    record = told(front, request(None, operation=text("describe")))
    assert json.loads(record.text())["input_modalities"] == ["text", "image", "video"]


class Slow:
    """A server of images that does not answer before it is told to, or the request is over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = threading.Semaphore(0)
        self.answer = threading.Event()
        self.given_up = threading.Event()
        read = ImageSources.read

        def slowly(
            sources: ImageSources, source: Any, number: int, is_over: Any, reserve: Any
        ) -> bytes:
            if not str(source).startswith("https:"):
                return read(sources, source, number, is_over, reserve)
            self.asked.release()
            while not self.answer.wait(0.01):
                if is_over():
                    self.given_up.set()
                    break
            return RED

        monkeypatch.setattr(ImageSources, "read", slowly)


@pytest.fixture
def slow(front: Front, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    slow = Slow(monkeypatch)
    yield slow
    slow.answer.set()


def test_a_slow_server_delays_its_own_requests_alone(front: Front, slow: Slow) -> None:
    """However many wait for it."""
    model, client = front
    waiting = [request("a", image=text(f"{SLOW}?{i}")) for i in range(backend.WAITING_REQUESTS + 9)]
    model.execute(waiting)
    assert slow.asked.acquire(timeout=10)
    for given in (request("quick"), request("a", image=text(RED))):
        client.submitted.clear()
        (sequence,) = submitted(front, given)
        assert len(sequence.images) == ("image" in {tensor.name() for tensor in given.inputs()})
    client.submitted.clear()
    everyone = threading.Semaphore(0)
    client.on_submit = everyone.release
    slow.answer.set()
    for _ in waiting:
        assert everyone.acquire(timeout=10)
    client.say([sequence.id for sequence in client.submitted], "!", LENGTH)
    for given in waiting:
        given.record.wait()
    assert not left_bytes(model)


def test_videos_delay_no_image_and_end_with_their_requests(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, client = front
    begun = threading.Semaphore(0)
    ended = threading.Semaphore(0)

    def slowly(self: VideoProcessor, *given: Any) -> Any:
        *_, is_over, _ = given
        begun.release()
        while not is_over():
            time.sleep(0.01)
        ended.release()
        raise InvalidField("video", "nobody waits for it")

    monkeypatch.setattr(VideoProcessor, "prepare", slowly)
    waiting = [request("a", video=text(FILM)) for _ in range(backend.IMAGE_REQUESTS + 2)]
    model.execute(waiting)
    assert begun.acquire(timeout=10)
    (sequence,) = submitted(front, request("a", image=text(RED)))
    assert len(sequence.images) == 1
    for given in waiting:
        given.record.cancelled = True
    for given in waiting:
        error = given.record.wait().error
        assert error is not None and error.code() == TritonError.CANCELLED
    assert ended.acquire(timeout=10)


@pytest.mark.parametrize("slow_part", ["fetching", "decoding"])
def test_videos_delay_no_fetched_image(
    front: Front, monkeypatch: pytest.MonkeyPatch, slow_part: str
) -> None:
    """However many there are, and whatever it is that they wait for."""
    model, client = front
    begun = threading.Semaphore(0)
    is_done = threading.Event()

    def wait(*_: Any) -> Any:
        begun.release()
        is_done.wait(30)
        raise InvalidField("video", "it was slow")

    def read(sources: ImageSources, *_: Any) -> bytes:
        return RED if sources._kind == "image" else FILM if slow_part == "decoding" else wait()

    monkeypatch.setattr(ImageSources, "read", read)
    monkeypatch.setattr(VideoProcessor, "prepare", wait)
    films = [
        request("a", video=text(*[f"{SLOW}?{number}{part}" for part in "abcd"]))
        for number in range(backend.WAITING_REQUESTS + 2)
    ]
    model.execute(films)
    assert begun.acquire(timeout=10)
    try:
        (sequence,) = submitted(front, request("a", image=text(SLOW)))
        assert len(sequence.images) == 1
    finally:
        is_done.set()
    for given in films:
        assert given.record.wait().error is not None


def test_equal_urls_are_fetched_once(front: Front, slow: Slow) -> None:
    slow.answer.set()
    (sequence,) = submitted(front, request("a", image=text(SLOW, SLOW)))
    assert len(sequence.images) == 2
    assert slow.asked.acquire(blocking=False)
    assert not slow.asked.acquire(blocking=False)


def test_a_cancelled_request_stops_fetching(front: Front, slow: Slow) -> None:
    model, client = front
    given = request("a", image=text(SLOW))
    model.execute([given])
    assert slow.asked.acquire(timeout=10)
    given.record.cancelled = True
    error = given.record.wait().error
    assert error is not None and error.code() == TritonError.CANCELLED
    assert slow.given_up.wait(10)
    assert not client.submitted


def test_a_request_may_be_overdue_while_it_fetches(front: Front, slow: Slow) -> None:
    given = request("a", image=text(SLOW), parameters={"timeout": 50_000})
    front[0].execute([given])
    error = given.record.wait().error
    assert error is not None and error.message() == "timeout: 50000 microseconds are over"
    assert slow.given_up.wait(10)


ROOM = int(2**30 * 0.001)  # bytes, the least that image_memory_gib allows


@pytest.fixture
def full(tmp_path, server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    """A front end with ROOM, of which a request that goes on waiting has 40 %."""
    slow = Slow(monkeypatch)
    hosts = ["slow.example"]
    with front_end(tmp_path, model=SEES, allowed_media_hosts=hosts, image_memory_gib=0.001) as pair:
        waiting = request("a", image=text(f"{SLOW}?{'x' * int(0.4 * ROOM)}"))
        pair[0].execute([waiting])
        assert slow.asked.acquire(timeout=10)
        yield pair
        waiting.record.cancelled = True
        waiting.record.wait()
        assert not left_bytes(pair[0])


def unavailable(front: Front, given: InferenceRequest) -> str:
    """The refusal, when all threads of the request have ended."""
    held = front[0].image_memory.held
    front[0].execute([given])
    error = given.record.wait().error
    assert error is not None and error.code() == TritonError.UNAVAILABLE
    assert error.message().endswith("(image_memory_gib)")
    deadline = time.monotonic() + 10
    while front[0].image_memory.held != held and time.monotonic() < deadline:
        time.sleep(0.01)
    assert front[0].image_memory.held == held
    return error.message()


def test_images_that_wait_are_bounded(full: Front) -> None:
    """Their files, as given and while they are decoded and resized."""
    held = full[0].image_memory.held
    file = RED + bytes(int(0.7 * ROOM))
    assert unavailable(full, request("a", image=text(file))) == (
        f"the queue is full: {held} bytes of images are held, and with the {len(file)} of this "
        f"prompt they would be more than {ROOM} (image_memory_gib)"
    )
    small = png(140, 140)
    assert len(small) < 0.01 * ROOM
    assert len(submitted(full, request("a", image=text(small)))) == 1
    full[1].submitted.clear()
    for side, bytes_of_pixel in ((196, 13 + 10), (252, 13)):
        image = png(side, side)
        named = f"with the {bytes_of_pixel * side * side + len(image)} of this prompt"
        assert named in unavailable(full, request("a", image=text(image)))
    spelled = base64.b64encode(bytes(int(0.3 * ROOM)))  # as long again while it is decoded
    named = f"with the {2 * len(spelled)} of this prompt"
    assert named in unavailable(full, request("a", image=text(spelled)))
    assert not full[1].submitted
    assert len(submitted(full, request("a", image=text(small)))) == 1  # nothing is left of them


def test_files_that_are_fetched_and_videos_that_are_decoded_are_bounded(
    full: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(sources: ImageSources, source: Any, number: int, is_over: Any, reserve: Any) -> bytes:
        reserve(ROOM)
        raise AssertionError("there is no room")

    monkeypatch.setattr(ImageSources, "read", read)
    named = f"with the {ROOM + len(SLOW)} of this prompt"
    assert named in unavailable(full, request("a", image=text(SLOW)))
    assert named in unavailable(full, request("a", video=text(SLOW)))
    long = clip(frames=96, codec="mjpeg", container="avi")
    frames = 8 * 3 * 280 * 392
    assert 2 * frames > 0.6 * ROOM
    named = f"with the {2 * frames + 2 * len(long)} of this prompt"
    assert named in unavailable(full, request("a", video=text(long)))


def test_large_images_are_taken_alone(tmp_path, server) -> None:
    with front_end(tmp_path, model=SEES, image_memory_gib=0.001) as front:
        large = request("a", image=text(png(448, 448), png(448, 448, "blue")))
        assert 2 * 3 * 448 * 448 > ROOM
        assert len(submitted(front, large)[0].images) == 2
        assert not left_bytes(front[0])
