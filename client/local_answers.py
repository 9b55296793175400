"""An `AnswerSource` (answers.py) that runs an engine in this process.

Converts the offline API's deltas and outputs to Chunks, and handles Ctrl-C.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from gllm_client.batch import Failed, Item, Prompt
from gllm_client.protocol import Chunk, Output, merge
from gllm_client.signals import caught_signals
from gllm_engine import (
    LLM,
    EngineBroken,
    InvalidField,
    RequestFailed,
    parse_sampling,
    truncated,
)


class LocalAnswers:
    """An engine in this process. Only one thread may use it."""

    refusals: tuple[type[Exception], ...] = (InvalidField, RequestFailed)

    def __init__(self, config: dict[str, Any]) -> None:
        """`config`: fields of EngineConfig. Raises the errors of LLM."""
        self.model = Path(config["model"]).resolve().name
        self._llm = LLM(**config)

    def stream(self, prompt: Prompt, sampling: dict[str, Any], **template: Any) -> Iterator[Chunk]:
        params = parse_sampling(sampling)
        tokenizer = self._llm.tokenizer
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt)
        elif isinstance(prompt, tuple):
            ids = list(prompt)
        else:
            ids = tokenizer.chat(prompt, **template)
        ids = truncated(ids, params, self._llm.engine.info.max_model_len)
        if params.n == 1:
            deltas = self._llm.stream(ids, params)
            while (delta := _uninterrupted(deltas)) is not None:
                yield Chunk((_output(delta),), len(ids), delta.prompt_logprobs)
        else:
            (whole,) = self._llm.generate([ids], params)
            if whole.error is not None:
                raise RequestFailed(whole.error)
            yield Chunk(
                tuple(map(_output, whole.outputs)),
                len(ids),
                whole.prompt_logprobs,
                num_cached_tokens=whole.num_cached_tokens,
            )

    def answers(self, items: Iterable[Item], concurrency: int) -> Iterator[tuple[Item, Any]]:
        """See AnswerSource. Reading one stream advances all streams: they share every step."""
        waiting = iter(items)
        # For each running item: the item, its unread chunks, and its chunks read so far.
        running: deque[tuple[Item, Iterator[Chunk], list[Chunk]]] = deque()
        while True:
            for item in islice(waiting, concurrency - len(running)):
                running.append((item, self.stream(item.prompt, item.sampling, **item.template), []))
            if not running:
                return
            item, chunks, taken = running.popleft()
            try:
                chunk = next(chunks, None)
            except EngineBroken:
                raise
            except Exception as error:  # any error that an input line causes fails that line alone
                yield item, Failed(str(error) or type(error).__name__)
                continue
            if chunk is None:
                yield item, merge(taken)
            else:
                taken.append(chunk)
                running.append((item, chunks, taken))

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
