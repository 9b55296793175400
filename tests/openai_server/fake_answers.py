"""Answers made by hand, and a server whose generation they replace."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import strategies as st
from patience import SOON_S

from gllm_client.openai_server import generation
from gllm_client.openai_server.app import make_app
from gllm_client.openai_server.conversation import Conversation
from gllm_client.openai_server.errors import ApiError
from gllm_client.openai_server.events import (
    CallArguments,
    CallBegin,
    End,
    Event,
    Reasoning,
    Text,
    Tokens,
)
from gllm_client.openai_server.models import ServedModel
from gllm_client.openai_server.options import Options

NUM_PROMPT = 100
NUM_CACHED = 64
Batches = Sequence[Sequence[Event] | ApiError]
# The chat template of a model that can think; only the names in it count.
FACTS = {"chat_template": "{{ enable_thinking }} {{ reasoning_effort }}"}
_UNUSED: Any = None  # what a replaced generation does not touch
MODEL = ServedModel("m", FACTS, 4096, 0, client=_UNUSED, format=_UNUSED)


class FakeAnswer:
    """Yields batches of events; an ApiError among them is raised. `forever`: then never ends."""

    def __init__(self, batches: Batches, forever: bool = False) -> None:
        self.num_prompt_tokens = NUM_PROMPT
        self.num_cached_tokens = NUM_CACHED
        self.closed = threading.Event()
        self._batches = batches
        self._forever = forever

    async def batches(self) -> AsyncIterator[list[tuple[int, Event]]]:
        for batch in self._batches:
            if isinstance(batch, ApiError):
                raise batch
            yield [(0, event) for event in batch]
        if self._forever:
            await asyncio.Event().wait()

    async def aclose(self) -> None:
        self.closed.set()


class Scripted:
    """A server whose every answer is `batches`; `asked`: the conversations that it was given."""

    def __init__(self, app: Any, url: str) -> None:
        self.app = app
        self.url = url
        self.batches: Batches = ()
        self.forever = False
        self.asked: list[Conversation] = []
        self.answers: list[FakeAnswer] = []

    def begin(self, patch: pytest.MonkeyPatch) -> Scripted:
        """Replace the generation for one test."""
        patch.setattr(generation, "answer", self.answer)
        patch.setattr(generation, "count_tokens", self.count_tokens)
        self.batches = [[Tokens((1, 2)), Text("Hel")], [Text("lo"), End("stop")]]
        self.forever = False
        self.asked.clear()
        self.answers.clear()
        return self

    async def answer(self, model: ServedModel, asked: Conversation, request_id: str) -> Any:
        self.asked.append(asked)
        self.answers.append(FakeAnswer(self.batches, self.forever))
        return self.answers[-1]

    async def count_tokens(self, model: ServedModel, asked: Conversation) -> int:
        self.asked.append(asked)
        return NUM_PROMPT

    async def find(self, name: str | None) -> ServedModel:
        if name not in (None, "m"):
            raise ApiError(404, f"there is no model {name}", "model", "model_not_found")
        return MODEL

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=headers, trust_env=False)


@contextmanager
def scripted() -> Iterator[Scripted]:
    """A server on a real socket of this process."""
    app = make_app(Options())
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    limit = time.monotonic() + SOON_S
    while not server.started and time.monotonic() < limit:
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    script = Scripted(app, f"http://127.0.0.1:{port}")
    app.state.models = script
    try:
        yield script
    finally:
        server.should_exit = True
        thread.join(SOON_S)


def logprob(token: int, text: str) -> dict[str, Any]:
    entry = {"logprob": -0.5, "rank": 1, "decoded_token": text}
    return {str(token): entry, "0": {"logprob": -1.5, "rank": 2, "decoded_token": "x"}}


_PIECES = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=4)
_NAMES = st.sampled_from(["f", "patch", "box__inner", "unknown"])
_ARGUMENTS = st.sampled_from(['{"input": "a\\n\\u00e9b"}', "{}", '{"a": [1, {"b": "c"}]}'])


@st.composite
def event_sequences(draw: st.DrawFn) -> list[Event]:
    """What a model may write: text, thoughts and calls in any order, then the end."""
    events: list[Event] = []
    num_calls = 0
    for kind in draw(st.lists(st.sampled_from(["text", "thoughts", "call", "tokens"]), max_size=8)):
        if kind == "text":
            events += [Text(piece) for piece in draw(_PIECES)]
        elif kind == "thoughts":
            events += [Reasoning(piece) for piece in draw(_PIECES)]
        elif kind == "tokens":
            ids = tuple(range(1, 1 + draw(st.integers(1, 3))))
            logprobs = [logprob(id, "t") for id in ids] if draw(st.booleans()) else None
            events.append(Tokens(ids, logprobs, draw(st.integers(0, len(ids)))))
        else:
            events.append(CallBegin(num_calls, f"call_{num_calls}", draw(_NAMES)))
            text = draw(_ARGUMENTS)
            cuts = sorted(draw(st.sets(st.integers(1, len(text) - 1), max_size=3)))
            bounds = [0, *cuts, len(text)]
            for start, stop in zip(bounds, bounds[1:], strict=False):
                events.append(CallArguments(num_calls, text[start:stop]))
            num_calls += 1
    events.append(End(draw(st.sampled_from(["stop", "length"]))))
    return events


@st.composite
def in_batches(draw: st.DrawFn, events: list[Event]) -> list[list[Event]]:
    """The events, cut into Triton responses at random."""
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(events) - 1)), max_size=4)))
    bounds = [0, *cuts, len(events)]
    pairs = zip(bounds, bounds[1:], strict=False)
    return [events[start:stop] for start, stop in pairs if start < stop]
