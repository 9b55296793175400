"""Images through the real tritonserver: every way in gives the answer of the engine in process."""

from __future__ import annotations

import json
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from asking import GrpcStream, ask, generate, generate_stream, joined, sampled, text_of
from clips import clip
from clips import url_of as film_url
from live import Server, wait_for
from patience import SOON_S
from PIL import Image
from serving import Served, serve
from tritonclient.utils import InferenceServerException

from gllm_client import Chunk, GenerateError, connect
from gllm_engine import LLM, RequestOutput, SamplingParams, write_tiny_model

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

MODEL = "sees"
ENGINE = {"model": ".", "cpu_threads": 1, "num_pages": 512, "max_model_len": 2048}
MEDIA = {"allowed_media_hosts": ["127.0.0.1"], "max_images": 4, "media_timeout_s": 60}
QUESTION = "What is the capital?"
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
FLAGS = {"exclude_input_in_output": True, "return_token_ids": True, "return_num_input_tokens": True}
PAGE = 16


def file_of(seed: int, kind: str, **options: Any) -> bytes:
    """A picture of coarse noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).resize((160, 120)).save(file, kind, **options)
    return file.getvalue()


FILES = {"png": file_of(1, "PNG"), "jpeg": file_of(1, "JPEG", quality=90)}
OTHER = file_of(2, "PNG")
BROKEN = FILES["png"][:60]


def base64(file: bytes) -> str:
    return b64encode(file).decode()


def url_of(file: bytes) -> str:
    return f"data:image/{'png' if file[1:4] == b'PNG' else 'jpeg'};base64,{base64(file)}"


def messages_with(*sources: str | None) -> list[dict[str, Any]]:
    """A question about images; None is a place for one of the tensor `image`."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": source}} if source else {"type": "image"}
        for source in sources
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


# ---------------------------------------------------------------- the server, and what it must say


class Answer(NamedTuple):
    text: str
    token_ids: list[int] | None  # None where they are not told
    num_input_tokens: int


class Sees(NamedTuple):
    server: Server
    openai: Served
    offline: LLM
    placeholder: int

    def ids(self) -> list[int]:
        return [*self.offline.tokenizer.encode(QUESTION), self.placeholder]

    def expected(self, form: str, file: bytes) -> Answer:
        """The answer of the engine in process to a form of prompt."""
        sampling = SamplingParams(**GREEDY)
        if form == "messages":
            (output,) = self.offline.chat(messages_with(url_of(file)), sampling)
        else:
            prompt = {"prompt": QUESTION} if form == "text" else {"prompt_token_ids": self.ids()}
            (output,) = self.offline.generate({**prompt, "images": [file]}, sampling)
        return of_output(output)


def of_output(output: RequestOutput) -> Answer:
    assert output.error is None
    (one,) = output.outputs
    return Answer(one.text, list(one.token_ids), len(output.prompt_token_ids))


@pytest.fixture(scope="module")
def sees(
    tmp_path_factory: pytest.TempPathFactory, serve_for: Callable[[ExitStack], Any]
) -> Iterator[Sees]:
    """Whatever these tests send, no process dies or is added, and nothing stays in use."""
    repository = tmp_path_factory.mktemp("images")
    checkpoint = repository / MODEL / "1"
    write_tiny_model(checkpoint, "Qwen2_5_VLForConditionalGeneration", seed=3)
    (checkpoint / "model.json").write_text(json.dumps(ENGINE | MEDIA))
    (repository / MODEL / "config.pbtxt").write_text(
        'backend: "gllm"\ninstance_group [{ count: 1 kind: KIND_MODEL }]\n'
    )
    placeholder = json.loads((checkpoint / "config.json").read_text())["image_token_id"]
    with ExitStack() as stack:
        server = serve_for(stack)(repository)
        triton: Any = SimpleNamespace(address=server.grpc)
        openai = stack.enter_context(serve(triton))
        offline = stack.enter_context(LLM(**ENGINE | {"model": str(checkpoint)}))
        before = server.family()
        yield Sees(server, openai, offline, placeholder)
        server.wait_idle(MODEL)
        assert server.family() == before


# ---------------------------------------------------------------- ways in


def plain(sees: Sees, way: Callable[..., Any], tensors: dict[str, Any]) -> Answer:
    responses = way(sees.server, tensors | FLAGS | sampled(**GREEDY), MODEL)
    counts = joined(responses, "num_input_tokens")
    return Answer(text_of(responses), joined(responses, "token_ids"), counts[0])


def client(sees: Sees, scheme: str, prompt: str | None = None, **options: Any) -> Answer:
    with connect(f"{scheme}://{sees.server.address(scheme)}", MODEL) as connection:
        chunk: Chunk = connection.complete(prompt, sampling=GREEDY, **options)
    assert chunk.num_input_tokens is not None
    return Answer(chunk.text, list(chunk.token_ids), chunk.num_input_tokens)


def generate_whole(server: Server, body: Any, model: str) -> Any:
    """As /generate_stream, in one event."""
    return generate_stream(server, body | {"stream": False}, model)


def chat_completion(sees: Sees, file: bytes) -> Answer:
    body: Any = {"messages": messages_with(url_of(file)), "ignore_eos": True, "max_tokens": 8}
    answer = sees.openai.post("/v1/chat/completions", model=MODEL, temperature=0, **body).json()
    text = answer["choices"][0]["message"]["content"]
    return Answer(text, None, answer["usage"]["prompt_tokens"])


def response(sees: Sees, file: bytes) -> Answer:
    parts = [
        {"type": "input_image", "image_url": url_of(file)},
        {"type": "input_text", "text": QUESTION},
    ]
    turns = [{"role": "user", "content": parts}]
    more = {"temperature": 0, "max_output_tokens": 16, "store": False}
    answer = sees.openai.post("/v1/responses", model=MODEL, input=turns, **more).json()
    (item,) = answer["output"]
    return Answer(item["content"][0]["text"], None, answer["usage"]["input_tokens"])


def anthropic(sees: Sees, file: bytes) -> Answer:
    kind = url_of(file)[5:].partition(";")[0]
    source = {"type": "base64", "media_type": kind, "data": base64(file)}
    content = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
    body: Any = {"messages": [{"role": "user", "content": content}], "max_tokens": 8}
    answer = sees.openai.post("/v1/messages", model=MODEL, temperature=0, **body).json()
    (block,) = answer["content"]
    usage = answer["usage"]
    count = usage["input_tokens"] + usage.get("cache_read_input_tokens", 0)
    return Answer(block["text"], None, count)


def as_json(messages: list[dict[str, Any]]) -> str:
    return json.dumps(messages)


# Name -> the form of the prompt, and how a file is sent with it.
WAYS: dict[str, tuple[str, Callable[[Sees, bytes], Answer]]] = {
    "gRPC, a file with text": (
        "text",
        lambda sees, file: plain(sees, ask, {"text_input": QUESTION, "image": file}),
    ),
    "gRPC, base64 with token ids": (
        "ids",
        lambda sees, file: plain(sees, ask, {"input_ids": sees.ids(), "image": base64(file)}),
    ),
    "gRPC, a data URL with text": (
        "text",
        lambda sees, file: plain(sees, ask, {"text_input": QUESTION, "image": url_of(file)}),
    ),
    "gRPC, a file in the place of messages": (
        "messages",
        lambda sees, file: plain(
            sees, ask, {"messages": as_json(messages_with(None)), "image": file}
        ),
    ),
    "gRPC, messages": (
        "messages",
        lambda sees, file: plain(sees, ask, {"messages": as_json(messages_with(url_of(file)))}),
    ),
    "generate, base64 with text": (
        "text",
        lambda sees, file: plain(
            sees, generate_whole, {"text_input": QUESTION, "image": base64(file)}
        ),
    ),
    "generate, a list with token ids": (
        "ids",
        lambda sees, file: plain(
            sees, generate_whole, {"input_ids": sees.ids(), "image": [base64(file)]}
        ),
    ),
    "generate_stream, messages": (
        "messages",
        lambda sees, file: plain(
            sees,
            generate_stream,
            {"messages": as_json(messages_with(url_of(file))), "stream": True},
        ),
    ),
    "gRPC client, text": (
        "text",
        lambda sees, file: client(sees, "grpc", QUESTION, images=[file]),
    ),
    "gRPC client, messages": (
        "messages",
        lambda sees, file: client(sees, "grpc", messages=messages_with(None), images=[file]),
    ),
    "HTTP client, token ids": (
        "ids",
        lambda sees, file: client(sees, "http", input_ids=sees.ids(), images=[url_of(file)]),
    ),
    "chat/completions": ("messages", chat_completion),
    "responses": ("messages", response),
    "messages": ("messages", anthropic),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("way", WAYS)
def test_an_image_is_seen(sees: Sees, way: str, kind: str) -> None:
    form, send = WAYS[way]
    expected = sees.expected(form, FILES[kind])
    found = send(sees, FILES[kind])
    assert found.num_input_tokens == expected.num_input_tokens
    if found.token_ids is not None:
        assert found == expected
    else:  # these APIs have no ignore_eos, and the least of an answer to responses is longer
        assert found.text.startswith(expected.text) or expected.text.startswith(found.text)


FILM = clip()
FILM_MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "video_url", "video_url": {"url": film_url(FILM)}},
            {"type": "image_url", "image_url": {"url": url_of(OTHER)}},
            {"type": "text", "text": QUESTION},
        ],
    }
]


def test_a_video_is_seen(sees: Sees) -> None:
    """By every door, as by the engine in process; another one is seen otherwise."""
    greedy = SamplingParams(**GREEDY)
    (output,) = sees.offline.generate([{"prompt": QUESTION, "videos": [FILM]}], greedy)
    expected = of_output(output)
    assert expected.num_input_tokens > 40  # moments of 24 embeddings
    assert plain(sees, ask, {"text_input": QUESTION, "video": FILM}) == expected
    body = {"text_input": QUESTION, "video": [film_url(FILM)]}
    assert plain(sees, generate_whole, body) == expected
    assert client(sees, "grpc", QUESTION, videos=[FILM]) == expected
    assert client(sees, "http", QUESTION, videos=[FILM]) == expected
    (other,) = sees.offline.generate([{"prompt": QUESTION, "videos": [clip(seed=1)]}], greedy)
    assert of_output(other) != expected


def test_a_video_beside_an_image_is_seen(sees: Sees) -> None:
    (output,) = sees.offline.chat(FILM_MESSAGES, SamplingParams(**GREEDY))
    expected = of_output(output)
    assert plain(sees, ask, {"messages": as_json(FILM_MESSAGES)}) == expected
    body: Any = {"messages": FILM_MESSAGES, "ignore_eos": True, "max_tokens": 8}
    answer = sees.openai.post("/v1/chat/completions", model=MODEL, temperature=0, **body).json()
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert answer["usage"]["prompt_tokens"] == expected.num_input_tokens


def test_another_picture_is_another_prefix(sees: Sees) -> None:
    """Equal text over equal pictures shares its pages; over different ones nothing behind them."""

    def cached(image: bytes, question: str = QUESTION) -> int:
        asked = {"text_input": question, "image": image, "return_num_cached_tokens": True}
        responses = ask(sees.server, asked | FLAGS | sampled(**GREEDY), MODEL)
        return int(joined(responses, "num_cached_tokens")[0])

    first, second = file_of(11, "PNG"), file_of(12, "PNG")
    length = sees.expected("text", first).num_input_tokens
    assert cached(first) < PAGE  # what comes before a picture is less than a page
    assert cached(second) < PAGE
    for image in (first, second):
        assert length - 2 * PAGE < cached(image) < length
    assert cached(first, "Another question, which is longer.") >= length // PAGE * PAGE - 2 * PAGE
    assert sees.expected("text", first).text != sees.expected("text", second).text


def test_text_needs_no_image(sees: Sees) -> None:
    (output,) = sees.offline.chat(messages_with(), SamplingParams(**GREEDY))
    found = plain(sees, ask, {"messages": as_json(messages_with())})
    assert found == of_output(output)
    assert client(sees, "http", messages=messages_with()) == found


def test_several_images_and_answers(sees: Sees) -> None:
    images = [FILES["png"], OTHER]
    prompt = {"prompt": QUESTION, "images": images}
    (expected,) = sees.offline.generate([prompt], SamplingParams(**GREEDY))
    tensors = {"text_input": QUESTION, "image": images} | FLAGS
    responses = ask(sees.server, tensors | sampled(n=2, **GREEDY), MODEL)
    assert joined(responses, "text_output") == [expected.outputs[0].text] * 2
    assert joined(responses, "num_input_tokens") == [len(expected.prompt_token_ids)]


def test_a_model_says_that_it_takes_images(sees: Sees) -> None:
    with sees.server.client(MODEL) as asked:
        assert asked.describe()["input_modalities"] == ["text", "image", "video"]
    told = sees.openai.http.get(f"/v1/models/{MODEL}").json()
    assert told["input_modalities"] == ["text", "image", "video"]


# ---------------------------------------------------------------- bad images


def part(url: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


TWO_PLACES = "<|image_pad|> or <|image_pad|>"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "broken": ({"text_input": "a", "image": base64(BROKEN)}, "image: image 1: it is a broken or"),
    "the second one": (
        {"text_input": "a", "image": [base64(OTHER), base64(BROKEN)]},
        "image: image 2: it is a broken or truncated PNG file",
    ),
    "no image": ({"text_input": "a", "image": base64(b"hello" * 9)}, "image: image 1: it is none"),
    "no base64": ({"text_input": "a", "image": "A" * 33}, "image: image 1: it is neither a"),
    "too few": (
        {"text_input": TWO_PLACES, "image": base64(OTHER)},
        "image: the prompt has 2 placeholders (token 4) for 1 images",
    ),
    "none": ({"text_input": TWO_PLACES}, "image: the prompt has 2 placeholders (token 4) for 0"),
    "too many": (
        {"text_input": "a", "image": [base64(OTHER)] * 5},
        "image: 5 images given, at most 4 (max_images)",
    ),
    "no place in messages": (
        {"messages": as_json(messages_with(url_of(OTHER))), "image": base64(OTHER)},
        "image: 1 images given, the messages have 0 places for them",
    ),
    "parts of text alone": (
        {"messages": as_json(messages_with()), "image": base64(OTHER)},
        "image: 1 images given, the messages have 0 places for them",
    ),
    "another host": (
        {"messages": as_json(part("http://localhost/a.png"))},
        "image: image 1: http://localhost/a.png is not at one of allowed_media_hosts",
    ),
    "a file": (
        {"text_input": "a", "image": "file:///etc/passwd"},
        "image: image 1: files are not allowed without allowed_media_directory",
    ),
    "half a video": (
        {"text_input": "a", "video": film_url(FILM[: len(FILM) // 2])},
        "video: video 1: it is a broken or truncated video",
    ),
    "a video of an image": (
        {"text_input": "a", "video": [film_url(FILM), base64(OTHER)]},
        "video: video 2: it is none of MP4",
    ),
    "a number": ({"messages": as_json(part(7))}, "image: image 1: 7 is no URL or base64"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_image_is_refused(sees: Sees, case: str) -> None:
    """The same over gRPC and HTTP; the next request is answered."""
    tensors, sentence = BAD[case]
    tensors = tensors | sampled(**GREEDY)
    stream = GrpcStream(sees.server, with_status=True)
    try:
        stream.send(tensors, MODEL)
        with pytest.raises(InferenceServerException) as error:
            stream.take()
    finally:
        stream.close(cancel=True)
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert error.value.message().startswith(sentence)
    status, answer = generate(sees.server, tensors, MODEL)
    assert (status, answer["error"]) == (400, error.value.message())
    assert plain(sees, ask, {"text_input": "a", "image": OTHER}).text


def test_bad_images_over_openai(sees: Sees) -> None:
    for source, sentence in {
        url_of(BROKEN): "image: image 1: it is a broken or truncated PNG file",
        "http://localhost/a.png": "image: image 1: http://localhost/a.png is not at one of",
        "data:image/png,AAAA": "image: image 1: data:image/png is not data:image/...;base64",
    }.items():
        body: Any = {"model": MODEL, "messages": messages_with(source)}
        status, param, message = sees.openai.refused("/v1/chat/completions", **body)
        assert (status, param) == (400, "image")
        assert message.startswith(sentence)
    assert chat_completion(sees, OTHER).text


def test_one_bad_image_costs_no_other_request(sees: Sees) -> None:
    expected = sees.expected("text", OTHER)
    with GrpcStream(sees.server) as bad, GrpcStream(sees.server) as good:
        for _ in range(20):
            bad.send({"text_input": "a", "image": BROKEN}, MODEL)
            good.send({"text_input": QUESTION, "image": OTHER} | FLAGS | sampled(**GREEDY), MODEL)
        for _ in range(20):
            with pytest.raises(InferenceServerException, match="broken or truncated"):
                bad.take()
            assert good.take().text == expected.text


# ---------------------------------------------------------------- images from other servers


class Host:
    """A web server of one picture, which it sends once `answer` is set."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.answer = threading.Event()
        self.left = threading.Semaphore(0)  # a client has gone away

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked.release()
        handler.connection.settimeout(0.02)
        while not self.answer.is_set():
            try:
                if not handler.connection.recv(1):
                    self.left.release()
                    return
            except TimeoutError:
                continue
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(OTHER)))
        handler.end_headers()
        handler.wfile.write(OTHER)


@contextmanager
def hosting() -> Iterator[tuple[Host, str]]:
    host = Host()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host.serve(self)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield host, f"http://127.0.0.1:{server.server_port}/a.png"
        finally:
            host.answer.set()
            server.shutdown()
            thread.join()


def test_an_image_comes_from_an_allowed_host(sees: Sees) -> None:
    with hosting() as (host, url):
        host.answer.set()
        expected = sees.expected("text", OTHER)
        assert plain(sees, ask, {"text_input": QUESTION, "image": [url]}) == expected
        asked = client(sees, "http", messages=messages_with(url))
        assert asked == sees.expected("messages", OTHER)


def test_a_slow_host_holds_nobody_up_and_is_left_by_who_cancels(sees: Sees) -> None:
    """More requests than are fetched at a time: each ends at once, and frees its place."""
    before = sees.server.metric("request_cancellations_total", MODEL)
    with hosting() as (host, url):
        streams = [GrpcStream(sees.server) for _ in range(3)]
        for stream in streams:
            for i in range(15):
                stream.send({"text_input": "a", "image": f"{url}?{i}"}, MODEL)
        assert host.asked.acquire(timeout=SOON_S)
        for source in (OTHER, url_of(OTHER)):  # while they wait
            answer = plain(sees, ask, {"text_input": QUESTION, "image": source})
            assert answer == sees.expected("text", OTHER)
        for stream in streams:
            stream.close(cancel=True)
        assert host.left.acquire(timeout=SOON_S)
        wait_for(
            lambda: sees.server.metric("request_cancellations_total", MODEL) == before + 45,
            "all are cancelled",
            SOON_S,
        )
        sees.server.wait_idle(MODEL, SOON_S)
        late = GrpcStream(sees.server)
        late.send({"text_input": QUESTION, "image": url} | FLAGS | sampled(**GREEDY), MODEL)
        host.answer.set()
        assert late.take(SOON_S).text == sees.expected("text", OTHER).text
        late.close()


def test_a_timeout_ends_a_fetch(sees: Sees) -> None:
    with hosting() as (host, url):
        status, answer = generate(
            sees.server, {"text_input": "a", "image": url, "timeout": 100_000}, MODEL
        )
        assert status >= 400 and answer["error"] == "timeout: 100000 microseconds are over"
        assert host.asked.acquire(timeout=SOON_S) and host.left.acquire(timeout=SOON_S)


def test_a_client_that_gives_up_frees_its_place(sees: Sees) -> None:
    with hosting() as (host, url), sees.server.client(MODEL) as asked:
        with pytest.raises(GenerateError, match="no whole answer within the timeout"):
            asked.complete("a", images=[url], timeout=0.3)
        assert host.asked.acquire(timeout=SOON_S) and host.left.acquire(timeout=SOON_S)
