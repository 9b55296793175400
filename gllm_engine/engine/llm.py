"""The offline API: runs a model in this process and returns whole outputs or a stream.

Owns the mapping between prompts and sequences. Runs the engine on the caller's thread, so only
one thread at a time may use an LLM.
"""

from __future__ import annotations

import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from gllm_engine.config import make_config
from gllm_engine.engine.core import IN_PROCESS, Engine, EngineBroken
from gllm_engine.engine.images import ImageLoader, is_url, to_sources
from gllm_engine.images import Prepared
from gllm_engine.sampling import InvalidField, SamplingParams, parse_sampling
from gllm_engine.sched import Policy
from gllm_engine.text.chat_template import Message
from gllm_engine.text.completion import (
    Completion,
    Delta,
    Logprobs,
    make_requests,
    render_logprobs,
    truncated,
)
from gllm_engine.text.image_parts import Video, take_media
from gllm_engine.text.tokenizer import Tokenizer
from gllm_engine.types import Image, Outputs, Request

PROMPTS_AHEAD = 4  # whose images are loaded while earlier prompts run
PROMPT_KEYS = ("prompt", "prompt_token_ids", "images", "videos")


@dataclass(frozen=True)
class LoadedPrompt:
    """A prompt with all tokens of its images."""

    token_ids: list[int]
    images: tuple[Image, ...] = ()


# Text, token ids, or a dict with one of them as "prompt" or "prompt_token_ids", and "images": a
# list of file contents, paths, URLs and PIL images, so also "videos". Each has a placeholder in the
# prompt, or all of them come before a text without placeholders.
Prompt = str | list[int] | dict[str, Any] | LoadedPrompt


@dataclass
class CompletionOutput(Delta):
    """One of the n outputs of a prompt: the sum of its deltas. The fields are named as in vLLM."""

    index: int = 0

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = [*(self.logprobs or []), *delta.logprobs]
        self.cumulative_logprob = delta.cumulative_logprob
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason


@dataclass
class RequestOutput:
    """The result of one prompt. `error`: a sentence if this prompt failed; other prompts go on.

    `prompt`: None for a prompt of token ids. `prompt_logprobs`: one entry for each prompt token,
    None for the first token; None if not requested.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] | None = None
    num_cached_tokens: int = 0
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.error is not None or all(o.finish_reason is not None for o in self.outputs)


@dataclass
class _Opened:
    """A prompt that has its tokens, but for those of its images."""

    output: RequestOutput
    images: Sequence[Any] = ()  # as the caller gave them, not loaded yet
    placed: tuple[Image, ...] = ()
    loading: Future[list[Prepared]] | None = None
    requests: list[Request] | None = None  # once its images are placed; [] after an error


@dataclass
class _Sequence:
    """A live sequence, the output it fills and, for a stream, its unread deltas."""

    completion: Completion
    output: CompletionOutput
    parent: RequestOutput
    siblings: list[int]  # ids of all sequences of the parent, including this one
    deltas: deque[Delta] | None = None


class RequestFailed(RuntimeError):
    """A streamed request that the engine could not serve; the message says why."""


class LLM:
    """A model that generates text in this process."""

    def __init__(self, model: str, *, policy: Policy | None = None, **config: Any) -> None:
        """`config`: the fields of EngineConfig. `policy`: replaces the schedule policy that
        `config` names. Raises ConfigError and the errors of Engine.
        """
        self.config = make_config({"model": str(model)} | config)
        self.tokenizer = Tokenizer(self.config.tokenizer or self.config.model)
        self.images = ImageLoader(self.config, self.tokenizer)
        self._loaders = ThreadPoolExecutor(PROMPTS_AHEAD, "load")
        self.engine = Engine(self.config, policy=policy)
        self._ids = itertools.count()
        self._sequences: dict[int, _Sequence] = {}
        self._closed = False

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End all sequences; an open stream then raises EngineBroken. Idempotent."""
        self._closed = True
        self._sequences.clear()
        self._loaders.shutdown(wait=False, cancel_futures=True)
        self.images.close()
        self.engine.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Generate for all prompts together. Returns one output for each prompt, in order.

        `sampling_params`: one for all prompts, or one for each prompt. Raises EngineBroken when the
        engine cannot go on; make a new LLM then, and a new process after a GPU fault.
        """
        opened = [self._open(prompt) for prompt in _as_prompts(prompts)]
        return self._run(opened, sampling_params, use_tqdm)

    def _run(
        self,
        opened: list[_Opened],
        params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        """Fill the outputs of opened prompts."""
        outputs = [prompt.output for prompt in opened]
        params = params or SamplingParams()
        each = [params] * len(outputs) if isinstance(params, SamplingParams) else params
        if len(each) != len(outputs):
            raise ValueError(f"{len(each)} sampling_params for {len(outputs)} prompts")
        queue = deque(zip(opened, map(_checked, list(each)), strict=True))
        mine: set[int] = set()
        with tqdm(total=len(outputs), disable=not use_tqdm, unit="prompt") as bar:
            try:
                while queue or mine:
                    self._submit(queue, mine)
                    self._pump()
                    mine &= self._sequences.keys()
                    if use_tqdm:  # counting takes a fifth of a step of 1,000 sequences
                        bar.update(sum(output.finished for output in outputs) - bar.n)
            finally:
                self._abort(mine)
        return outputs

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation or several; outputs and errors as `generate`'s.

        Images are parts of type image_url, image or input_image, videos of type video_url or video,
        as clients of OpenAI's APIs and transformers write them. `tools`: functions that the model
        may call, as OpenAI's clients describe them. `chat_template_kwargs`: variables of the chat
        template, such as enable_thinking. Raises InvalidField for one of these two that the
        template does not take.
        """
        several = bool(messages) and not isinstance(messages[0], dict)
        conversations: Any = messages if several else [messages]

        def read(conversation: Any) -> tuple[list[int], Sequence[Any]]:
            text, images = take_media(conversation, self.images.texts)
            ids = self.tokenizer.chat(text, tools=tools, chat_template_kwargs=chat_template_kwargs)
            return ids, images

        opened = [self._opened(None, partial(read, each)) for each in conversations]
        return self._run(opened, sampling_params, use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[Delta]:
        """Yield the deltas of one output; closing the iterator ends the generation.

        Raises InvalidField, or RequestFailed (also for a full queue). Several streams and
        generate() calls may be interleaved.
        """
        params = _checked(sampling_params or SamplingParams())
        if params.n != 1:
            raise InvalidField("n", f"{params.n} outputs cannot be streamed, use generate()")
        opened = self._open(prompt)
        requests = self._split(opened, params)
        if opened.output.error is not None:
            raise RequestFailed(opened.output.error)
        return self._stream(opened.output, requests)

    def _stream(self, output: RequestOutput, requests: list[Request]) -> Iterator[Delta]:
        ids: set[int] = set()
        deltas = deque[Delta]()
        try:
            self._hand_over(output, requests, ids, deltas)
            while True:
                while not deltas:
                    self._pump()
                delta = deltas.popleft()
                if output.error is not None and not deltas:
                    raise RequestFailed(output.error)
                # All prompt logprobs are complete before the first token.
                delta.prompt_logprobs = output.prompt_logprobs
                output.prompt_logprobs = None
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._abort(ids & self._sequences.keys())

    # ------------------------------------------------------------ between prompts and sequences

    def load(self, ids: list[int], images: Sequence[Any]) -> LoadedPrompt:
        """A prompt of token ids, one placeholder for each image and Video, as `generate` and
        `stream` take it too. Raises InvalidField."""
        self.images.check(images)
        return LoadedPrompt(*self.images.place(ids, self._load(images)))

    def _load(self, images: Sequence[Any]) -> list[Prepared]:
        return self.images.load(to_sources(images), self.engine.info.max_model_len)

    def _open(self, prompt: Prompt) -> _Opened:
        if isinstance(prompt, LoadedPrompt):
            opened = self._opened(None, lambda: (prompt.token_ids, ()))
            opened.placed = prompt.images
            return opened
        given = prompt if isinstance(prompt, dict) else {"prompt": prompt}
        text = given.get("prompt")
        return self._opened(text if isinstance(text, str) else None, partial(self._read, given))

    def _read(self, prompt: dict[str, Any]) -> tuple[list[int], Sequence[Any]]:
        """Token ids of a prompt, and its images."""
        if unknown := sorted(set(prompt) - set(PROMPT_KEYS)):
            known = ", ".join(PROMPT_KEYS)
            raise InvalidField("prompt", f"unknown key {unknown[0]!r}; known are {known}")
        images = list(map(_as_path, prompt.get("images", ())))
        images += [Video(_as_path(video)) for video in prompt.get("videos", ())]
        text = prompt.get("prompt", prompt.get("prompt_token_ids"))
        if not isinstance(text, str):
            return _token_ids(text), images
        return self.tokenizer.encode(self.images.with_places(text, images)), images

    def _opened(
        self, text: str | None, read: Callable[[], tuple[list[int], Sequence[Any]]]
    ) -> _Opened:
        """A prompt with its token ids and images, or with an error for an invalid prompt."""
        opened = _Opened(RequestOutput(next(self._ids), text, []))
        try:
            ids, opened.images = read()
            opened.output.prompt_token_ids = ids
            self.images.check(opened.images)
        except InvalidField as error:
            if error.field in ("tools", "chat_template_kwargs"):  # arguments of the whole call
                raise
            opened.output.error = str(error)
        return opened

    def _split(self, opened: _Opened, params: SamplingParams) -> list[Request]:
        """The requests of a prompt, when its images are loaded; none if it has an error."""
        output = opened.output
        ids = output.prompt_token_ids
        images = opened.placed
        try:
            if output.error is None and not images:
                loaded = opened.loading.result() if opened.loading else self._load(opened.images)
                ids, images = self.images.place(ids, loaded)
            ids = truncated(ids, params, self.engine.info.max_model_len, bool(images))
        except InvalidField as error:
            output.error = str(error)
        if output.error is not None:
            return []
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None]
        output.prompt_token_ids = ids
        output.outputs = [CompletionOutput(index=index) for index in range(params.n)]
        return make_requests(self.tokenizer, ids, params, self._ids, images)

    def _submit(self, queue: deque[tuple[_Opened, SamplingParams]], mine: set[int]) -> None:
        """Hand over as many prompts as the engine's queue takes and as have their images."""
        while queue:
            for opened, _ in itertools.islice(queue, PROMPTS_AHEAD):
                if opened.images and opened.loading is None and opened.output.error is None:
                    opened.loading = self._loaders.submit(self._load, opened.images)
            opened, params = queue[0]
            if self._sequences and opened.loading is not None and not opened.loading.done():
                return
            if opened.requests is None:
                opened.requests = self._split(opened, params)
            if self._sequences and not self.engine.has_room(opened.requests):
                return  # if no sequence runs, room never comes: the engine refuses the requests
            queue.popleft()
            self._hand_over(opened.output, opened.requests, mine)
            opened.requests = opened.loading = None  # they hold the pixels

    def _hand_over(
        self,
        parent: RequestOutput,
        requests: list[Request],
        mine: set[int],
        deltas: deque[Delta] | None = None,
    ) -> None:
        """Add a prompt's sequences to the engine, which may refuse some of them."""
        siblings = [request.id for request in requests]
        mine.update(siblings)
        for request, output in zip(requests, parent.outputs, strict=True):
            text = Completion(self.tokenizer, request.prompt, request.sampling)
            self._sequences[request.id] = _Sequence(text, output, parent, siblings, deltas)
            self.engine.add(request)

    def _pump(self) -> None:
        """Run one engine step and distribute its outputs. Raises EngineBroken."""
        if self._closed:
            raise EngineBroken("this LLM was closed")
        outputs = self.engine.step().get(IN_PROCESS)
        if self.engine.broken is not None:
            raise EngineBroken(self.engine.broken)
        if outputs is None:
            return
        for id, entries in outputs.prompt_logprobs.items():
            sequence = self._sequences.get(id)
            if sequence is not None and sequence.parent.prompt_logprobs is not None:
                rendered = [render_logprobs(self.tokenizer, entry) for entry in entries]
                sequence.parent.prompt_logprobs += rendered
        for id, count in outputs.num_cached_tokens.items():
            sequence = self._sequences.get(id)
            if sequence is not None and sequence.output.index == 0:
                sequence.parent.num_cached_tokens = count
        for id, token in zip(outputs.ids, outputs.tokens, strict=True):
            self._feed(id, [token], outputs)
        for id in outputs.finished.keys() - outputs.ids:
            self._feed(id, [], outputs)

    def _feed(self, id: int, tokens: list[int], outputs: Outputs) -> None:
        sequence = self._sequences.get(id)
        if sequence is None:  # aborted while its token was in flight
            return
        finish = outputs.finished.get(id)
        entry = outputs.logprobs.get(id)
        delta = sequence.completion.feed(tokens, () if entry is None else (entry,), finish)
        assert delta is not None  # a finished sequence leaves the table
        sequence.output.add(delta)
        if sequence.deltas is not None:
            sequence.deltas.append(delta)
        parent = sequence.parent
        if finish is not None and finish.reason == "error" and parent.error is None:
            parent.error = finish.message
            self._abort(sequence.siblings)  # the prompt has failed, so their tokens are unused
        if sequence.completion.finished:
            self._sequences.pop(id, None)
        if sequence.completion.wants_abort:
            self.engine.abort(id)

    def _abort(self, ids: Iterable[int]) -> None:
        for id in ids:
            self.engine.abort(id)
            self._sequences.pop(id, None)


def _checked(params: SamplingParams) -> SamplingParams:
    """Validated parameters: a caller's struct may hold lists for tuples, or wrong types."""
    if not isinstance(params, SamplingParams):
        kind = type(params).__name__
        raise InvalidField("sampling_params", f"a SamplingParams is expected, got {kind}")
    return parse_sampling(msgspec.to_builtins(params))


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts. A sequence of whole numbers is a single prompt."""
    if isinstance(prompts, str | bytes | dict | LoadedPrompt):
        return [prompts]
    one = len(prompts) > 0 and all(isinstance(item, Integral) for item in prompts)
    listed: list[Any] = [prompts] if one else list(prompts)
    return listed


def _as_path(image: Any) -> Any:
    return Path(image) if isinstance(image, str) and not is_url(image) else image


def _token_ids(prompt: Any) -> list[int]:
    """The token ids of a prompt that is not text. Raises InvalidField unless all are integers."""
    expected = "text or a list of token ids (whole numbers) is expected"
    if isinstance(prompt, bytes):
        raise InvalidField("prompt", f"{expected}, got bytes")
    try:
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise InvalidField("prompt", f"{expected} ({error})") from None
