"""The commands' sources of answers: a server (`RemoteAnswers`) or an engine (local_answers.py).

Both yield Chunks, so `generate`, `chat` and `batch` work with either. Never imports the engine,
because that import takes seconds and a server needs none of it.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from gllm_client import openai_lines
from gllm_client.batch import Answer, AnyItem, Failed, Item, OpenAIItem, Prompt
from gllm_client.client import connect
from gllm_client.openai_server.body import Json
from gllm_client.openai_server.errors import as_api_error, from_triton
from gllm_client.openai_server.formats.choice import choose
from gllm_client.openai_server.models import ServedModel, readable, unknown_model
from gllm_client.protocol import Chunk, GenerateError, asks_for_one, merge

T = TypeVar("T")


class SourceLost(RuntimeError):
    """No further answer can come from this source."""


class AnswerSource(ABC):
    """Answers prompts. For a batch it is also the client that asks the OpenAI server's model.

    `refusals`: the errors that concern a single prompt.
    """

    model: str  # the name of the model that answers
    refusals: tuple[type[Exception], ...]
    takes_any_model = True  # whatever model an item names
    _known: ServedModel | None = None

    @abstractmethod
    def stream(self, prompt: Prompt, sampling: Json, **template: Any) -> Iterator[Chunk]:
        """Stream one answer; closing the iterator cancels it.

        `template`: tools and chat_template_kwargs, only with chat messages.
        """

    @abstractmethod
    def close(self) -> None: ...

    def answers(self, items: Iterable[AnyItem], concurrency: int) -> Iterator[tuple[Any, Any]]:
        """Yield items with their answers as they finish; runs `concurrency` at a time.

        Raises SourceLost: no item has caused that.
        """
        loop = asyncio.new_event_loop()
        loop.set_default_executor(ThreadPoolExecutor(concurrency))
        waiting = iter(items)
        pending: set[asyncio.Task[tuple[AnyItem, Answer]]] = set()
        try:
            while True:
                for item in islice(waiting, concurrency - len(pending)):
                    pending.add(loop.create_task(self._answer(item)))
                if not pending:
                    return
                first = asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                done, pending = loop.run_until_complete(first)
                # Answers come before errors: the source may have been lost after it gave them.
                for task in sorted(done, key=lambda task: task.exception() is not None):
                    yield task.result()
        finally:
            loop.run_until_complete(_cancel(pending))
            loop.close()

    async def _answer(self, item: AnyItem) -> tuple[AnyItem, Answer]:
        try:
            if isinstance(item, Item):
                chunks = self._chunks(item.prompt, item.sampling, item.template)
                return item, merge([chunk async for chunk in chunks])
            return item, await self._answer_body(item)
        except SourceLost:
            raise
        except Exception as error:  # any error that an input line causes fails that line alone
            is_openai = isinstance(item, OpenAIItem)
            line = openai_lines.refusal(as_api_error(error)) if is_openai else None
            return item, Failed(str(error) or type(error).__name__, line)

    async def _answer_body(self, item: OpenAIItem) -> Json:
        sampling = dict(item.sampling)
        tenant = sampling.pop("tenant", "")
        asked = openai_lines.read_body(item.url, item.body, sampling)
        if not self.takes_any_model and asked.model not in (None, self.model):
            raise unknown_model(asked.model, [self.model])
        model = replace(await self._served(), tenant=tenant)
        return await openai_lines.answer(item.url, asked, model)

    async def _served(self) -> ServedModel:
        if self._known is None:
            try:
                facts = readable(await self._call(self._facts))
            except GenerateError as error:
                raise from_triton(error) from None
            format = choose(facts, None, None)
            self._known = ServedModel(self.model, facts, facts["max_model_len"], 0, self, format)
        return self._known

    async def _chunks(
        self, prompt: Prompt, sampling: Json, options: Json
    ) -> AsyncGenerator[Chunk, None]:
        chunks = self._ask(prompt, sampling, options)
        while (chunk := await self._call(next, chunks, None)) is not None:
            yield chunk

    # What a ServedModel asks for.

    def generate(self, prompt: str | None = None, **options: Any) -> AsyncGenerator[Chunk, None]:
        del options["model"]
        ids = tuple(options.pop("input_ids"))
        return self._chunks(ids, options.pop("sampling"), options)

    async def tokenize(self, prompt: str | None = None, **options: Any) -> Chunk:
        return await self._call(self._tokenize, prompt, **options)

    async def detokenize(self, token_ids: Sequence[int], **call: Any) -> str:
        return await self._call(self._detokenize, token_ids, **call)

    # Blocking calls of the source.

    @abstractmethod
    async def _call(self, work: Callable[..., T], *args: Any, **options: Any) -> T:
        """What `work` returns, while other calls have their turns. Raises SourceLost."""

    @abstractmethod
    def _ask(self, prompt: Prompt, sampling: Json, options: Json) -> Iterator[Chunk]:
        """Like `stream`, for a whole answer; `options`: those of Client.generate."""

    @abstractmethod
    def _tokenize(self, prompt: str | None, **options: Any) -> Chunk: ...

    @abstractmethod
    def _detokenize(self, token_ids: Sequence[int], **call: Any) -> str: ...

    @abstractmethod
    def _facts(self) -> Json: ...


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class RemoteAnswers(AnswerSource):
    """A model behind a URL."""

    refusals: tuple[type[Exception], ...] = (GenerateError, ValueError)

    def __init__(self, url: str, model: str | None, timeout: float | None = None) -> None:
        """`model`: None if the server has only one. Raises GenerateError, ValueError."""
        self._client = connect(url)
        self._timeout = timeout
        self.takes_any_model = model is not None
        self.model = model or self._only_model(url)

    def _only_model(self, url: str) -> str:
        ready = sorted({e["name"] for e in self._client.index() if e["state"] == "READY"})
        if len(ready) != 1:
            have = ", ".join(ready) or "none"
            raise GenerateError(f"--model is needed to choose among the models at {url}: {have}")
        return ready[0]

    def stream(self, prompt: Prompt, sampling: Json, **template: Any) -> Iterator[Chunk]:
        return self._ask(prompt, sampling, template | {"stream": asks_for_one(sampling)})

    def _ask(self, prompt: Prompt, sampling: Json, options: Json) -> Iterator[Chunk]:
        options = {"stream": False} | options | {"sampling": sampling}
        options["return_cumulative_logprob"] = sampling.get("logprobs") is not None
        kinds: dict[type, str] = {str: "prompt", list: "messages", tuple: "input_ids"}
        options[kinds[type(prompt)]] = prompt
        return self._client.generate(model=self.model, timeout=self._timeout, **options)

    async def _call(self, work: Callable[..., T], *args: Any, **options: Any) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(None, partial(work, *args, **options))
        except GenerateError as error:
            # One request alone may break the connection while the server still serves others.
            if error.status == "UNAVAILABLE" and not self._client.is_live():
                raise SourceLost(str(error)) from None
            raise

    def _tokenize(self, prompt: str | None, **options: Any) -> Chunk:
        return self._client.tokenize(prompt, timeout=self._timeout, **options)

    def _detokenize(self, token_ids: Sequence[int], **call: Any) -> str:
        return self._client.detokenize(token_ids, timeout=self._timeout, **call)

    def _facts(self) -> Json:
        return self._client.describe(model=self.model, timeout=self._timeout)

    def close(self) -> None:
        self._client.close()
