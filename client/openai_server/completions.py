"""POST /v1/completions: text or tokens in, text out, several prompts in one request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from gllm_client import Chunk, Output
from gllm_client.openai_server import fields
from gllm_client.openai_server.body import Json
from gllm_client.openai_server.errors import invalid
from gllm_client.openai_server.events import Tokens
from gllm_client.openai_server.generation import (
    limit_tokens,
    stop_reason,
    truncate,
    with_defaults,
)
from gllm_client.openai_server.models import ServedModel
from gllm_client.openai_server.writer import Choice, Writer

MAX_CHOICES = 1024  # of all prompts of a request together
CONCURRENCY = 64  # prompts of one request that run at a time
DEFAULT_MAX_TOKENS = 16
Arrived = tuple[int, Chunk]  # the number of its prompt, and a chunk of its answer


class CompletionRequest(fields.Common, frozen=True, kw_only=True):
    """The body of a completion request."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool = False
    best_of: Literal[1] = 1
    add_special_tokens: bool = True


async def begin(asked: CompletionRequest, model: ServedModel, id: str) -> CompletionWriter:
    """Check the request and its prompts; the answer begins when it is written. Raises ApiError."""
    given = split_prompts(asked)
    _check(asked, len(given))
    # One after another: only a stub's own time can be won by asking for several at once.
    prompts = [await _prepare(asked, model, prompt, id) for prompt in given]
    sources = []
    for number, prompt in enumerate(prompts):
        name = f"{id}-{number}" if len(prompts) > 1 else id
        sources.append(model.generate(prompt.ids, _sampling(asked, model, prompt), name, {}))
    return CompletionWriter(asked, model, prompts, _merge(sources), id)


# ------------------------------------------------------------ from JSON to Triton's requests


def split_prompts(asked: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a request: texts or token ids."""
    given = asked.prompt
    if isinstance(given, str):
        return [given]
    kinds = {type(entry) for entry in given}
    if len(kinds) != 1:
        problem = "the list is empty" if not given else "a list of one kind of prompt is expected"
        raise invalid("prompt", problem)
    return [given] if kinds == {int} else given  # type: ignore[list-item,return-value]


def _check(asked: CompletionRequest, num_prompts: int) -> None:
    fields.check(asked)
    if num_prompts * asked.n > MAX_CHOICES:
        problem = f"{num_prompts} prompts with n={asked.n}, at most {MAX_CHOICES} answers together"
        raise invalid("prompt", problem)
    if asked.max_tokens == 0 and not asked.echo:
        raise invalid("max_tokens", "0 goes with echo: true only")
    if asked.logprobs is not None and not 0 <= asked.logprobs <= fields.MAX_TOP_LOGPROBS:
        raise invalid("logprobs", f"{asked.logprobs} is outside [0, {fields.MAX_TOP_LOGPROBS}]")


async def _prepare(
    asked: CompletionRequest, model: ServedModel, prompt: str | list[int], id: str
) -> _Prompt:
    """A prompt's tokens, and what an echo of it needs."""
    text = prompt if isinstance(prompt, str) else None
    if isinstance(prompt, str):
        special = asked.add_special_tokens
        ids, _ = await model.tokenize(id, prompt=prompt, add_special_tokens=special)
    else:
        ids = prompt
    if not ids:
        raise invalid("prompt", "the prompt is empty, at least one token is needed")
    if asked.truncate_prompt_tokens is not None:
        whole = len(ids)
        ids = truncate(model, ids, asked.truncate_prompt_tokens, _wanted(asked))
        text = text if len(ids) == whole else None
    first = ""
    if asked.echo:
        text = await model.detokenize(ids, id) if text is None else text
        first = await model.detokenize(ids[:1], id) if asked.logprobs is not None else ""
    return _Prompt(ids, text or "", first, [_Choice() for _ in range(asked.n)])


def _wanted(asked: CompletionRequest) -> int:
    return DEFAULT_MAX_TOKENS if asked.max_tokens is None else max(1, asked.max_tokens)


def _sampling(asked: CompletionRequest, model: ServedModel, prompt: _Prompt) -> Json:
    sampling = with_defaults(model, fields.sampling(asked))
    sampling["max_tokens"] = limit_tokens(model, len(prompt.ids), _wanted(asked))
    form = fields.form(asked)
    if form is not None:
        sampling["structured_outputs"] = form
    if asked.logprobs is not None:
        sampling["logprobs"] = asked.logprobs
        if asked.echo:
            sampling["prompt_logprobs"] = max(asked.logprobs, asked.prompt_logprobs or 0)
    return sampling


async def _merge(
    sources: list[AsyncGenerator[Chunk, None]],
) -> AsyncGenerator[Arrived, None]:
    """The chunks of several requests as they come, with the number of their request."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as source:
            async for chunk in source:
                yield 0, chunk
        return
    arrived: asyncio.Queue[tuple[int, Chunk | Exception | None]] = asyncio.Queue(len(sources))
    turn = asyncio.Semaphore(CONCURRENCY)

    async def pump(number: int, source: AsyncGenerator[Chunk, None]) -> None:
        end: Exception | None = None
        try:
            async with turn, aclosing(source):
                async for chunk in source:
                    await arrived.put((number, chunk))
        except Exception as error:
            end = error
        await arrived.put((number, end))

    tasks = [asyncio.create_task(pump(*numbered)) for numbered in enumerate(sources)]
    running = len(tasks)
    try:
        while running:
            number, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# ------------------------------------------------------------ from Triton's answers to JSON


class _Choice(Choice):
    """A choice of a completion. `logprobs` has the rows of _score."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.offset = 0  # characters of text before `logprobs`

    def take_table(self) -> Json:
        """The logprobs as the API's columns; the next ones begin behind them."""
        tokens = [entry["token"] for entry in self.logprobs]
        offsets = [*accumulate(map(len, tokens), initial=self.offset)]
        self.offset = offsets[-1]
        return {
            "tokens": tokens,
            "token_logprobs": [entry["logprob"] for entry in self.logprobs],
            "top_logprobs": [entry["top"] for entry in self.logprobs],
            "text_offset": offsets[:-1],
        }


@dataclass
class _Prompt:
    """One prompt of a request, and its choices."""

    ids: list[int]
    text: str  # for an echo
    first: str  # the text of its first token, for an echo with logprobs
    choices: list[_Choice]
    logprobs: list[Any] | None = None


class CompletionWriter(Writer[Arrived]):
    """Writes the answer to a completion request. A part: a response of Triton to one prompt."""

    def __init__(
        self,
        asked: CompletionRequest,
        model: ServedModel,
        prompts: list[_Prompt],
        chunks: AsyncGenerator[Arrived, None],
        id: str,
    ) -> None:
        about = {"id": f"cmpl-{id}", "model": model.name}
        kinds = ("text_completion", "text_completion")
        super().__init__(asked, about, kinds, sum(len(prompt.ids) for prompt in prompts), chunks)
        self._asked = asked
        self._prompts = prompts

    def _written(self) -> list[Json]:
        choices: list[Json] = []
        for prompt in self._prompts:
            for choice in prompt.choices:
                entry: Json = {"index": len(choices)} | self._shown(choice)
                if self._asked.prompt_logprobs is not None:
                    entry["prompt_logprobs"] = prompt.logprobs
                if self._asked.return_token_ids:
                    entry["prompt_token_ids"] = prompt.ids
                choices.append(entry)
        return choices

    def _take(self, arrived: Arrived) -> list[int]:
        """Returns the choices of the prompt that have something new."""
        number, chunk = arrived
        prompt = self._prompts[number]
        if not prompt.choices[0].started:
            self._usage.num_cached += chunk.num_cached_tokens or 0
        if chunk.prompt_logprobs is not None:
            prompt.logprobs = chunk.prompt_logprobs
        changed = []
        for index, output in enumerate(chunk.outputs):
            choice = prompt.choices[index]
            if choice.reason is None and (output.token_ids or output.text or output.finish_reason):
                self._feed(prompt, choice, output)
                changed.append(index)
        return changed

    def _numbered(self, arrived: Arrived) -> Iterator[tuple[int, Json]]:
        number, _ = arrived
        for index in self._take(arrived):
            choice = self._prompts[number].choices[index]
            yield number * self._asked.n + index, self._shown(choice)
            choice.text = []
            choice.logprobs = []
            choice.token_ids = []

    def _feed(self, prompt: _Prompt, choice: _Choice, output: Output) -> None:
        asked = self._asked
        if asked.echo and not choice.started:
            choice.text.append(prompt.text)
            if asked.logprobs is not None and prompt.logprobs is not None:
                pairs = zip(prompt.ids, prompt.logprobs, strict=True)
                choice.logprobs += [self._score(id, entry, prompt.first) for id, entry in pairs]
        choice.started = True
        choice.reason = output.finish_reason
        choice.stop_reason = stop_reason(output, asked.stop or ())
        if asked.max_tokens == 0:  # only the echo is asked for
            choice.reason = "length"
            return
        choice.text.append(output.text)
        choice.token_ids += output.token_ids
        self._usage.add(Tokens(output.token_ids))
        pairs = zip(output.token_ids, output.logprobs or (), strict=False)
        choice.logprobs += [self._score(id, entry) for id, entry in pairs]

    def _score(self, id: int, entry: Json | None, text: str = "") -> Json:
        """A token's row of the table; `entry` None: the prompt's first token, of text `text`."""
        if entry is None:
            return {"token": self._name(str(id), text), "logprob": None, "top": None}
        ranked = sorted(entry.items(), key=lambda item: item[1]["rank"], reverse=True)
        names = {key: self._name(key, about["decoded_token"]) for key, about in ranked}
        top = {names[key]: about["logprob"] for key, about in ranked}
        chosen = str(id)
        return {"token": names[chosen], "logprob": entry[chosen]["logprob"], "top": top}

    def _name(self, id: str, text: str) -> str:
        return f"token_id:{id}" if self._asked.return_tokens_as_token_ids else text

    def _shown(self, choice: _Choice) -> Json:
        scored = None if self._asked.logprobs is None else choice.take_table()
        return {"text": "".join(choice.text)} | self._beside(choice, scored)
