"""An `AnswerSource` (answers.py) that runs an engine in this process.

Converts the offline API's deltas and outputs to Chunks, and handles Ctrl-C.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from gllm_client.answers import AnswerSource, SourceLost
from gllm_client.batch import Prompt
from gllm_client.openai_server.body import Json
from gllm_client.protocol import Chunk, GenerateError, Output
from gllm_client.signals import caught_signals
from gllm_engine import (
    LLM,
    EngineBroken,
    InvalidField,
    LoadedPrompt,
    RequestFailed,
    Video,
    describe_checkpoint,
    parse_sampling,
    take_media,
    truncated,
)

T = TypeVar("T")


class LocalAnswers(AnswerSource):
    """An engine in this process. Only one thread may use it."""

    refusals: tuple[type[Exception], ...] = (InvalidField, RequestFailed)

    def __init__(self, config: Json) -> None:
        """`config`: fields of EngineConfig. Raises the errors of LLM."""
        self.model = Path(config["model"]).resolve().name
        self._llm = LLM(**config)

    def stream(
        self, prompt: Prompt | LoadedPrompt, sampling: Json, **template: Any
    ) -> Iterator[Chunk]:
        params = parse_sampling(sampling)
        loaded = prompt if isinstance(prompt, LoadedPrompt) else self._load(prompt, **template)
        limit = self._llm.engine.info.max_model_len
        ids = truncated(loaded.token_ids, params, limit, bool(loaded.images))
        loaded = replace(loaded, token_ids=ids)
        if params.n == 1:
            deltas = self._llm.stream(loaded, params)
            while (delta := _uninterrupted(deltas)) is not None:
                yield Chunk((_output(delta),), len(ids), delta.prompt_logprobs)
        else:
            (whole,) = self._llm.generate(loaded, params)
            if whole.error is not None:
                raise RequestFailed(whole.error)
            yield Chunk(
                tuple(map(_output, whole.outputs)),
                len(ids),
                whole.prompt_logprobs,
                num_cached_tokens=whole.num_cached_tokens,
            )

    def _load(
        self,
        prompt: Prompt,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        **template: Any,
    ) -> LoadedPrompt:
        """`images` and `videos`: of a prompt of token ids. Any thread."""
        tokenizer = self._llm.tokenizer
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt)
        elif isinstance(prompt, tuple):
            ids = list(prompt)
        else:
            messages, images = take_media(prompt, self._llm.images.texts)
            ids = tokenizer.chat(messages, **template)
        loaded: LoadedPrompt = self._llm.load(ids, [*images, *map(Video, videos)])
        return loaded

    async def _chunks(
        self, prompt: Any, sampling: Json, options: Json
    ) -> AsyncGenerator[Chunk, None]:
        # On a thread, because steps of the engine must not wait for images.
        loaded = await asyncio.to_thread(self._load, prompt, **options)
        async for chunk in super()._chunks(loaded, sampling, {}):
            yield chunk

    async def _call(self, work: Callable[..., T], *args: Any, **options: Any) -> T:
        """See AnswerSource. Reading one stream advances all streams: they share every step."""
        await asyncio.sleep(0)
        try:
            return work(*args, **options)
        except EngineBroken as error:
            raise SourceLost(str(error)) from None
        except RequestFailed as error:
            raise GenerateError(str(error)) from None

    def _ask(self, prompt: Prompt, sampling: Json, options: Json) -> Iterator[Chunk]:
        return self.stream(prompt, sampling, **options)

    def _tokenize(
        self,
        prompt: str | None,
        *,
        messages: Any = None,
        add_special_tokens: bool = True,
        model: str = "",
        request_id: str = "",
        **template: Any,
    ) -> Chunk:
        limit = self._llm.engine.info.max_model_len
        images: list[Any] = []
        if prompt is None:
            add_special_tokens = False
            messages, images = take_media(messages, self._llm.images.texts)
            prompt = self._llm.tokenizer.render(messages, limit, **template)
        ids = self._llm.tokenizer.encode(prompt, add_special_tokens, limit)
        if any(image not in (None, Video(None)) for image in images):
            ids = self._llm.load(ids, images).token_ids
        return Chunk((Output(prompt, token_ids=tuple(ids)),))

    def _detokenize(self, token_ids: Sequence[int], **call: Any) -> str:
        text: str = self._llm.tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    def _facts(self) -> Json:
        path = Path(self._llm.config.model)
        modalities = self._llm.images.modalities
        facts: Json = describe_checkpoint(path, self._llm.tokenizer, modalities)
        return facts | {"max_model_len": self._llm.engine.info.max_model_len}

    def close(self) -> None:
        self._llm.close()


def _output(part: Any) -> Output:
    """Convert a Delta or a CompletionOutput of LLM."""
    return Output(
        text=part.text,
        finish_reason=part.finish_reason,
        token_ids=tuple(part.token_ids),
        logprobs=part.logprobs,
        cumulative_logprob=part.cumulative_logprob,
        num_tokens=len(part.token_ids),
        stop_reason=None if part.stop_reason is None else str(part.stop_reason),
    )


def _uninterrupted(deltas: Iterator[Any]) -> Any:
    """The next delta or None. Ctrl-C takes effect after the engine's step is complete."""
    with caught_signals(signal.SIGINT) as caught:
        delta = next(deltas, None)
    if caught.count:
        raise KeyboardInterrupt
    return delta
