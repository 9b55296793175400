"""Images through LLM: every form of them becomes the same image of the engine's request."""

from __future__ import annotations

import base64
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from PIL import Image

from gllm_client.batch import OpenAIItem
from gllm_client.local_answers import LocalAnswers
from gllm_engine import ImageMemory, ImageShare
from gllm_engine.engine import images as module
from gllm_engine.engine import llm as llm_module
from gllm_engine.engine.llm import LLM, LoadedPrompt, RequestFailed
from gllm_engine.images import ImageProcessor, PreparedImage
from gllm_engine.images.fetch import ImageSources
from gllm_engine.images.resize import PixelRange
from gllm_engine.images.spread import SpreadPool
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.sampling import InvalidField, SamplingParams
from gllm_engine.types import Request

PLACE = 0  # stands for an image here, as text MARK
MARK = "<|endoftext|>"
SHORT = SamplingParams(max_tokens=2, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


class Seen:
    """An LLM that makes tokens up, and the requests that its engine got."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.requests: list[Request] = []
        add = llm.engine.add

        def note(request: Request) -> None:
            self.requests.append(request)
            add(replace(request, images=()))  # the tiny model has no tower

        llm.engine.add = note  # type: ignore[method-assign]


@pytest.fixture
def seen(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    processor = ImageProcessor(PixelRange(28, 56 * 56, 112 * 112), PLACE, None, 1 << 20, 10**6)
    monkeypatch.setattr(module, "read_processor", lambda *args, **kwargs: processor)
    with LLM(str(tiny), device="none", max_model_len=256, num_pages=64) as llm:
        yield Seen(llm)


def picture(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (56, 56), colour)


def png(colour: str = "red") -> bytes:
    file = BytesIO()
    picture(colour).save(file, "PNG")
    return file.getvalue()


URL = "data:image/png;base64," + base64.b64encode(png()).decode()


def test_every_form_of_an_image(seen: Seen, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    forms = [png(), path, str(path), picture(), URL]
    outputs = seen.llm.generate(
        [{"prompt": f"Hi{MARK}", "images": [form]} for form in forms], SHORT
    )
    assert [output.error for output in outputs] == [None] * len(forms)
    assert len({request.images for request in seen.requests}) == 1
    (image,) = seen.requests[0].images
    assert (image.rows, image.columns, image.height, image.width) == (2, 2, 56, 56)
    assert image.pixels == b"\xff\0\0" * 56 * 56
    ids = seen.llm.tokenizer.encode("Hi")
    assert seen.requests[0].prompt == outputs[0].prompt_token_ids == ids + [PLACE] * 4
    assert outputs[0].prompt == f"Hi{MARK}"


def test_prompts_of_tokens_of_messages_and_without_places(seen: Seen) -> None:
    llm = seen.llm
    llm.generate({"prompt_token_ids": [5, PLACE, 6], "images": [png()]}, SHORT)
    assert seen.requests[-1].prompt == [5, *[PLACE] * 4, 6]
    llm.generate({"prompt": "Hi", "images": [png(), png("blue")]}, SHORT)
    assert seen.requests[-1].prompt == [PLACE] * 8 + llm.tokenizer.encode("Hi")
    parts = [
        {"type": "image_url", "image_url": {"url": URL}},
        {"type": "text", "text": "Hi"},
        {"type": "image", "image": picture("blue")},
    ]
    (output,) = llm.chat([{"role": "user", "content": parts}], SHORT)
    assert output.error is None
    assert [image.pixels[:3] for image in seen.requests[-1].images] == [b"\xff\0\0", b"\0\0\xff"]
    assert seen.requests[-1].prompt.count(PLACE) == 8


def test_the_n_sequences_share_the_images(seen: Seen) -> None:
    sampling = SamplingParams(n=3, max_tokens=1)
    seen.llm.generate({"prompt": "Hi", "images": [png()]}, sampling)
    assert len(seen.requests) == 3
    assert all(request.images is seen.requests[0].images for request in seen.requests)


def test_a_stream_takes_a_loaded_prompt(seen: Seen) -> None:
    loaded = seen.llm.load([5, PLACE], [png()])
    assert loaded.token_ids == [5, *[PLACE] * 4]
    for prompt in (loaded, {"prompt_token_ids": [5, PLACE], "images": [png()]}):
        assert len(list(seen.llm.stream(prompt, SHORT))) == 2
    assert seen.requests[0].images == seen.requests[1].images == loaded.images
    with pytest.raises(RequestFailed, match="^image: image 1: "):
        seen.llm.stream({"prompt": "a", "images": [b"\0"]}, SHORT)


def test_bad_images_fail_their_prompts_alone(seen: Seen, tmp_path: Path) -> None:
    bad: list[tuple[Any, str]] = [
        ({"prompt": "a", "images": [png(), png()[:50]]}, "image: image 2: "),
        ({"prompt": "a", "images": [tmp_path / "gone"]}, "image: image 1: it cannot be read ("),
        ({"prompt": "a", "images": [7]}, "image: image 1: 7 is no URL"),
        ({"prompt": f"a{MARK}", "images": [png(), png()]}, "image: the prompt has 1 placeholders"),
        ({"prompt": f"a{MARK}"}, "image: the prompt has 1 placeholders"),
        ({"prompt": "a", "images": [png()] * 65}, "image: 65 images given, at most 64"),
        ({"prompt": "a", "image": [png()]}, "prompt: unknown key 'image'; known are prompt, "),
        ({"images": [png()]}, "prompt: text or a list of token ids"),
    ]
    outputs = seen.llm.generate([*(prompt for prompt, _ in bad), "good"], SHORT)
    assert outputs[-1].error is None
    for output, (_, sentence) in zip(outputs, bad, strict=False):
        assert output.error is not None and output.error.startswith(sentence)
    assert len(seen.requests) == 1


def test_images_are_never_cut(seen: Seen) -> None:
    prompt = {"prompt": "a", "images": [png()]}
    cut = SamplingParams(max_tokens=1, truncate_prompt_tokens=4)
    (output,) = seen.llm.generate(prompt, cut)
    assert output.error is not None
    assert output.error.startswith("truncate_prompt_tokens: the prompt has 5 tokens and images")
    whole = SamplingParams(max_tokens=1, truncate_prompt_tokens=5)
    assert seen.llm.generate(prompt, whole)[0].error is None


def test_a_text_model_takes_no_images(tiny: Path) -> None:
    chat = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}]}]
    with LLM(str(tiny), device="none", max_model_len=64, num_pages=8) as llm:
        outputs = [*llm.generate({"prompt": "a", "images": [png()]}), *llm.chat(chat)]
        assert [output.error for output in outputs] == ["image: this model takes no images"] * 2
        assert llm.generate(f"a{MARK}", SHORT)[0].error is None


def test_the_commands_own_engine_answers_about_images(seen: Seen) -> None:
    """`gllm chat` and lines of `gllm batch`, OpenAI's among them."""
    source = LocalAnswers.__new__(LocalAnswers)
    source._llm = seen.llm
    source.model = "m"
    parts = [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "Hi"}]
    chat = [{"role": "user", "content": parts}]
    chunks = list(source.stream(chat, {"max_tokens": 2}))
    assert len(seen.requests[-1].images) == 1
    assert chunks[0].num_input_tokens == len(seen.requests[-1].prompt)
    list(source.stream(chat, {"max_tokens": 1, "n": 2}))
    assert seen.requests[-1].images == seen.requests[0].images
    body = {"messages": chat, "max_tokens": 2}
    line = OpenAIItem("a", "/v1/chat/completions", body)
    ((_, answer),) = source.answers([line], 1)
    assert isinstance(answer, dict) and answer["response"]["status_code"] == 200
    usage = answer["response"]["body"]["usage"]
    assert usage["prompt_tokens"] == len(seen.requests[-1].prompt)
    counted = source._tokenize(None, messages=chat)
    assert len(counted.token_ids) == usage["prompt_tokens"]


def test_a_text_in_a_message_is_never_a_path(seen: Seen, tmp_path: Path) -> None:
    """Messages may be a stranger's."""
    path = tmp_path / "a.png"
    path.write_bytes(png())
    for given, works in ((path, True), (str(path), False)):
        parts = [{"type": "image", "image": given}]
        (output,) = seen.llm.chat([{"role": "user", "content": parts}], SHORT)
        assert (output.error is None) == works
    assert output.error == "image: image 1: it is neither a file, nor its base64, nor a URL"


def test_few_prompts_are_loaded_ahead(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their pixels would not fit into memory together."""
    lock = threading.Lock()
    loaded = 0
    ahead = []
    prepare = ImageProcessor.prepare

    def counting(self: ImageProcessor, data: bytes, number: int, *more: Any) -> Any:
        nonlocal loaded
        with lock:
            loaded += 1
            ahead.append(loaded - len(seen.requests))
        return prepare(self, data, number, *more)

    monkeypatch.setattr(ImageProcessor, "prepare", counting)
    prompts = [{"prompt": "a", "images": [png()]} for _ in range(20)]
    outputs = seen.llm.generate(prompts, SHORT)
    assert [output.error for output in outputs] == [None] * 20
    assert loaded == 20
    assert max(ahead) <= llm_module.PROMPTS_AHEAD


def test_loaded_prompts_say_what_they_are() -> None:
    assert LoadedPrompt([1]).images == ()


def test_the_pixels_of_one_prompt_are_bounded(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the first image is slow."""
    loader = seen.llm.images
    monkeypatch.setitem(loader._preparing, "image", SpreadPool(4))
    prepare = ImageProcessor.prepare
    begun = threading.Semaphore(0)
    numbers = []

    def note(processor: ImageProcessor, data: bytes, number: int, *more: Any) -> PreparedImage:
        numbers.append(number)
        begun.release()
        if number == 1:
            for _ in range(4):
                assert begun.acquire(timeout=10)
        return prepare(processor, data, number, *more)

    monkeypatch.setattr(ImageProcessor, "prepare", note)
    with pytest.raises(InvalidField, match="more than the 10 tokens of prompt and output"):
        loader.load([png(f"#0000{i:02x}") for i in range(60)], 10)  # of 4 tokens each
    assert len(numbers) <= 4 + 3


def test_what_loading_leaves_counted_are_the_pixels(seen: Seen) -> None:
    memory = ImageMemory(1 << 30)
    share = ImageShare(memory)
    found = seen.llm.images.load([png(f"#0000{i:02x}") for i in range(9)], 1000, share=share)
    assert memory.held == sum(len(image.pixels) for image in found)
    share.close()
    assert memory.held == 0


def test_what_is_prepared_is_never_refused(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pixels are counted once, though others have taken all the room that was left."""
    sizes: list[int] = []
    reserve = ImageShare.reserve

    def note(share: ImageShare, size: int) -> None:
        if share is not whole:
            sizes.append(size)
        reserve(share, size)

    with monkeypatch.context() as patch:
        patch.setattr(ImageShare, "reserve", note)
        whole = ImageShare(ImageMemory(1 << 30))
        seen.llm.images.load([png("#000001")], 1000, share=whole)
    memory = ImageMemory(1 + sum(sizes))
    ImageShare(memory).reserve(1)
    share = ImageShare(memory)
    (image,) = seen.llm.images.load([png("#000001")], 1000, share=share)
    assert memory.held == 1 + len(image.pixels)
    share.close()
    assert memory.held == 1


def test_fetched_files_are_bounded(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = seen.llm.images
    monkeypatch.setitem(loader._fetching, "image", ThreadPoolExecutor(2))
    prepare = ImageProcessor.prepare
    fetched = itertools.count(1)
    done: list[int] = []
    most = []

    def fetch(*_: object) -> bytes:
        most.append(next(fetched) - len(done))
        return png()

    def note(processor: ImageProcessor, data: bytes, number: int, *more: Any) -> PreparedImage:
        found = prepare(processor, data, number, *more)
        done.append(number)
        return found

    monkeypatch.setattr(ImageSources, "read", fetch)
    monkeypatch.setattr(ImageProcessor, "prepare", note)
    assert len(loader.load([f"https://a/{i}" for i in range(60)], 1000)) == 60
    assert max(most) <= 2
