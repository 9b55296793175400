"""Where the commands get answers from: an engine in this process, or a server.

Both give Chunks, so that `generate`, `chat` and `batch` do not know which it is.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from gllm_client.batch import Failed, Item
from gllm_client.client import connect
from gllm_client.protocol import Chunk, GenerateError, Output, merge
from gllm_engine import LLM, InvalidField, RequestFailed, parse_sampling

Prompt = str | list[dict[str, Any]]  # text, or chat messages


class Source(Protocol):
    """Answers to prompts; `refusals` are the errors that concern one prompt alone."""

    refusals: tuple[type[Exception], ...]

    def stream(self, prompt: Prompt, sampling: dict[str, Any]) -> Iterator[Chunk]:
        """One answer as it comes; closing the iterator ends it."""

    def answers(self, items: Iterable[Item], concurrency: int) -> Iterator[tuple[Item, Any]]:
        """Each item with its Chunk, or Failed; as they finish, `concurrency` at a time."""

    def close(self) -> None: ...


class Remote:
    """A model behind a URL."""

    refusals = (GenerateError,)

    def __init__(self, url: str, model: str | None, timeout: float | None = None) -> None:
        """`model`: None for the only one that the server has. Raises GenerateError, ValueError."""
        self._client = connect(url)
        self._timeout = timeout
        self._model = model or self._only_model(url)

    def _only_model(self, url: str) -> str:
        ready = sorted({e["name"] for e in self._client.index() if e["state"] == "READY"})
        if len(ready) != 1:
            have = ", ".join(ready) or "none"
            raise GenerateError(f"--model is needed to choose among the models at {url}: {have}")
        return ready[0]

    def stream(self, prompt: Prompt, sampling: dict[str, Any]) -> Iterator[Chunk]:
        streamed = int(sampling.get("n", 1)) == 1
        return self._ask(prompt, sampling, stream=streamed)

    def _ask(self, prompt: Prompt, sampling: dict[str, Any], stream: bool) -> Iterator[Chunk]:
        kind = "prompt" if isinstance(prompt, str) else "messages"
        options: dict[str, Any] = {kind: prompt}
        return self._client.generate(
            model=self._model,
            sampling=sampling,
            stream=stream,
            timeout=self._timeout,
            **options,
        )

    def answers(self, items: Iterable[Item], concurrency: int) -> Iterator[tuple[Item, Any]]:
        """As Source's. Raises GenerateError once the server is gone: no item is to blame."""
        pool = ThreadPoolExecutor(concurrency)
        pending: set[Future[tuple[Item, Any]]] = set()
        try:
            for item in items:
                pending.add(pool.submit(self._answer, item))
                if len(pending) == concurrency:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, item: Item) -> tuple[Item, Any]:
        try:
            return item, merge(self._ask(item.prompt, item.sampling, stream=False))
        except GenerateError as error:
            if error.status == "UNAVAILABLE":
                raise
            return item, Failed(str(error))

    def close(self) -> None:
        self._client.close()


@dataclass
class _Running:
    item: Item
    chunks: Iterator[Chunk]
    taken: list[Chunk]


class Local:
    """An engine in this process. One thread may use it."""

    refusals = (InvalidField, RequestFailed)

    def __init__(self, config: dict[str, Any]) -> None:
        """`config`: fields of EngineConfig. Raises what LLM raises."""
        self._llm = LLM(**config)

    def stream(self, prompt: Prompt, sampling: dict[str, Any]) -> Iterator[Chunk]:
        params = parse_sampling(sampling)
        tokenizer = self._llm.tokenizer
        encode = tokenizer.encode if isinstance(prompt, str) else tokenizer.chat
        ids = encode(prompt)
        if params.n == 1:
            deltas = self._llm.stream(ids, params)
            while (delta := _uninterrupted(deltas)) is not None:
                yield Chunk((_output(delta),), num_input_tokens=len(ids))
        else:
            (whole,) = self._llm.generate([ids], params)
            if whole.error is not None:
                raise RequestFailed(whole.error)
            yield Chunk(tuple(map(_output, whole.outputs)), num_input_tokens=len(ids))

    def answers(self, items: Iterable[Item], concurrency: int) -> Iterator[tuple[Item, Any]]:
        """As Source's. Taking a delta of one stream advances them all, as they share each step."""
        waiting = iter(items)
        running: deque[_Running] = deque()
        while True:
            while len(running) < concurrency and (item := next(waiting, None)) is not None:
                running.append(_Running(item, self.stream(item.prompt, item.sampling), []))
            if not running:
                return
            turn = running.popleft()
            try:
                chunk = next(turn.chunks, None)
            except self.refusals as error:
                yield turn.item, Failed(str(error))
                continue
            if chunk is None:
                yield turn.item, merge(turn.taken)
            else:
                turn.taken.append(chunk)
                running.append(turn)

    def close(self) -> None:
        self._llm.close()


def _output(part: Any) -> Output:
    """From what LLM calls a delta or an output."""
    return Output(
        text=part.text,
        finish_reason=part.finish_reason,
        token_ids=tuple(part.token_ids),
        logprobs=part.logprobs,
        cumulative_logprob=part.cumulative_logprob,
        num_tokens=len(part.token_ids),
    )


def _uninterrupted(deltas: Iterator[Any]) -> Any:
    """The next delta or None; Ctrl-C waits until the engine's step is whole."""
    with _deferred_interrupt():
        return next(deltas, None)


@contextmanager
def _deferred_interrupt() -> Iterator[None]:
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt
