"""A front end for tests: the real model.py with a byte tokenizer and an engine in our hands."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import fake_triton
import numpy as np

import gllm_engine
from gllm_backend.gllm.model import TritonPythonModel
from gllm_backend.gllm.request import OUTPUTS
from gllm_engine import EngineUnavailable, Finish, InvalidField, ModelInfo, Outputs, Request, Stats
from gllm_engine.arch.tiny import tiny_config

VOCAB = 300
BOS = 257
IMAGE = 299  # the placeholder of an image, in texts PLACE
PLACE = "<image>"
VIDEO = 298  # the same of a video
VIDEO_PLACE = "<video>"
# Of config.json of a model that takes images: a square of 28 pixels is a token.
SEES = tiny_config("Qwen2_5_VLForConditionalGeneration") | {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
}
SEES["vision_config"]["patch_size"] = 14


class ByteSpelling:
    """Token id = byte; 256 and above are special and have no text."""

    leading_spaces = 0

    def __init__(self) -> None:
        self._pieces = {i: bytes([i]) if i < 256 else b"" for i in range(VOCAB)}

    def pieces(self, skip_special_tokens: bool) -> dict[int, bytes]:
        return self._pieces

    def first_piece(self, token: int) -> bytes:
        return self._pieces[token]


class ByteTokenizer:
    """A tokenizer of bytes. Its chat template writes roles and tools into the text."""

    chat_template = None
    special_tokens = ("<s>",)
    adds_bos = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spelling = ByteSpelling()
        self.holding = threading.Event()  # a conversation is under way when it is set ...
        self.held = threading.Event()  # ... and goes on when this is
        self.held.set()

    def encode(
        self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> list[int]:
        ids: list[int] = []
        for piece in re.split(f"({PLACE}|{VIDEO_PLACE})", text):
            ids += {PLACE: [IMAGE], VIDEO_PLACE: [VIDEO]}.get(piece, list(piece.encode()))
        return [BOS] * (self.adds_bos and add_special_tokens) + ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        special = {} if skip_special_tokens else {BOS: b"<s>"}
        pieces = [special.get(id, self.spelling.first_piece(id)) for id in ids]
        return b"".join(pieces).decode("utf-8", "replace")

    def render(
        self,
        messages: Any,
        max_tokens: int | None = None,
        tools: Any = None,
        chat_template_kwargs: Any = None,
    ) -> str:
        if not isinstance(messages, list) or not messages:
            raise InvalidField("messages", "expected a non-empty list")
        self.holding.set()
        self.held.wait()
        given = [value for value in (tools, chat_template_kwargs) if value]
        text = "".join(f"<{m['role']}>{_content(m['content'])}" for m in messages)
        return text + "".join(map(json.dumps, given))

    def token_text(self, token: int) -> str:
        return {IMAGE: PLACE, VIDEO: VIDEO_PLACE}.get(token) or self.decode([token])

    def media_text(self, kind: str, placeholder: int) -> str:
        return f"[{self.token_text(placeholder)}]"

    def bad_words(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(word.encode()) for word in words)


def _content(content: Any) -> Any:
    return "".join(part["text"] for part in content) if isinstance(content, list) else content


class HandClient:
    """EngineClient's interface; the test plays the engine."""

    info = ModelInfo(
        vocab_size=VOCAB, max_model_len=1000, num_pages=10, page_size=16, eos_token_ids=(256,)
    )

    def __init__(
        self,
        config: Any,
        *,
        scope: str,
        instance: str,
        on_outputs: Callable[[Outputs], None],
        on_stats: Callable[[Stats], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.config, self.scope, self.instance = config, scope, instance
        self.on_outputs, self.on_stats, self.on_lost = on_outputs, on_stats, on_lost
        self.submitted: list[Request] = []
        self.aborted: list[int] = []
        self.unavailable: str | None = None
        self.failed_starts = 0
        self.on_submit: Callable[[], None] = lambda: None
        self.closed = False

    @property
    def trouble(self) -> str | None:
        return self.unavailable

    def submit(self, requests: list[Request]) -> None:
        if self.unavailable is not None:
            raise EngineUnavailable(self.unavailable)
        self.submitted += requests
        self.on_submit()

    def abort(self, ids: list[int]) -> None:
        self.aborted += ids

    def close(self) -> None:
        self.closed = True

    def say(self, ids: int | list[int], text: str = "", finish: Finish | None = None) -> None:
        """One step a byte of `text` for sequences that all say the same."""
        ids = [ids] if isinstance(ids, int) else ids
        steps = list(text.encode())
        for i, token in enumerate(steps):
            last = finish if i == len(steps) - 1 else None
            ended = dict.fromkeys(ids, last) if last else {}
            self.on_outputs(Outputs(ids, [token] * len(ids), finished=ended))
        if not steps and finish:
            self.on_outputs(Outputs([], [], finished=dict.fromkeys(ids, finish)))


@contextmanager
def front_end(
    tmp_path: Path,
    parameters: dict[str, str] | None = None,
    model: dict[str, Any] | None = None,
    **config: Any,
) -> Iterator[tuple[TritonPythonModel, HandClient]]:
    """A running model; finalized at the end unless the test did. `model`: of its config.json."""
    version = tmp_path / "1"
    version.mkdir(exist_ok=True)
    (version / "config.json").write_text(json.dumps({"architectures": ["Bytes"]} | (model or {})))
    generation = {"temperature": 0.5, "top_p": "high", "top_k": -7, "do_sample": True}
    (version / "generation_config.json").write_text(json.dumps(generation))
    (version / "model.json").write_text(json.dumps({"model": ".", "drain_timeout_s": 0} | config))
    given = {key: {"string_value": value} for key, value in (parameters or {}).items()}
    args = {
        "model_name": "m",
        "model_version": "1",
        "model_repository": str(tmp_path),
        "model_instance_name": "m_0_0",
        "model_config": json.dumps({"parameters": given}),
    }
    interval = sys.getswitchinterval()
    names = {
        "EngineClient": HandClient,
        "Tokenizer": ByteTokenizer,
        "end_with_parent": lambda: None,  # the parent is not a tritonserver here
    }
    with mock.patch.multiple(gllm_engine, create=True, **names):
        front = TritonPythonModel()
        front.initialize(args)
    try:
        yield front, front.client
    finally:
        if not front.client.closed:
            front.finalize()
        sys.setswitchinterval(interval)


def text(*values: str | bytes) -> np.ndarray:
    return np.array([v.encode() if isinstance(v, str) else v for v in values], np.object_)


def flag(value: bool) -> np.ndarray:
    return np.array([value])


def request(
    prompt: str | None = "Hi",
    *,
    stream: bool = False,
    sampling: dict[str, Any] | str | None = None,
    outputs: set[str] | None = None,
    request_id: str = "r1",
    parameters: dict[str, Any] | None = None,
    timeout: int = 0,
    **tensors: Any,
) -> fake_triton.InferenceRequest:
    """A request; keyword arguments are further tensors, booleans become BOOL [1]."""
    inputs: dict[str, np.ndarray] = {}
    if prompt is not None:
        inputs["text_input"] = text(prompt)
    if stream:
        inputs["stream"] = flag(True)
    if sampling is not None:
        given = sampling if isinstance(sampling, str) else json.dumps(sampling)
        inputs["sampling_parameters"] = text(given)
    for name, value in tensors.items():
        inputs[name] = flag(value) if isinstance(value, bool) else value
    return fake_triton.InferenceRequest(
        inputs,
        request_id=request_id,
        parameters=parameters,
        outputs=set(OUTPUTS) if outputs is None else outputs,
        timeout=timeout,
    )
