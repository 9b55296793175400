"""The commands' sources of answers: a server (`RemoteAnswers`) or an engine (local_answers.py).

Both yield Chunks, so `generate`, `chat` and `batch` work with either. Never imports the engine,
because that import takes seconds and a server needs none of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, Protocol

from gllm_client.batch import Failed, Item, Prompt
from gllm_client.client import connect
from gllm_client.protocol import Chunk, GenerateError, asks_for_one, merge, shown


class AnswerSource(Protocol):
    """Answers prompts. `refusals`: the errors that concern a single prompt."""

    model: str  # the name of the model that answers
    refusals: tuple[type[Exception], ...]

    def stream(self, prompt: Prompt, sampling: dict[str, Any], **template: Any) -> Iterator[Chunk]:
        """Stream one answer; closing the iterator cancels it.

        `template`: tools and chat_template_kwargs, only with chat messages.
        """

    def answers(self, items: Iterable[Item], concurrency: int) -> Iterator[tuple[Item, Any]]:
        """Yield items with their Chunk or Failed as they finish; runs `concurrency` at a time."""

    def close(self) -> None: ...


class RemoteAnswers:
    """A model behind a URL."""

    refusals: tuple[type[Exception], ...] = (GenerateError, ValueError)

    def __init__(self, url: str, model: str | None, timeout: float | None = None) -> None:
        """`model`: None if the server has only one. Raises GenerateError, ValueError."""
        self._client = connect(url)
        self._timeout = timeout
        self._is_only = model is None
        self.model = model or self._only_model(url)

    def _only_model(self, url: str) -> str:
        ready = sorted({e["name"] for e in self._client.index() if e["state"] == "READY"})
        if len(ready) != 1:
            have = ", ".join(ready) or "none"
            raise GenerateError(f"--model is needed to choose among the models at {url}: {have}")
        return ready[0]

    def stream(self, prompt: Prompt, sampling: dict[str, Any], **template: Any) -> Iterator[Chunk]:
        return self._ask(prompt, sampling, template, stream=asks_for_one(sampling))

    def _ask(
        self, prompt: Prompt, sampling: dict[str, Any], template: dict[str, Any], stream: bool
    ) -> Iterator[Chunk]:
        options: dict[str, Any] = template | {"sampling": sampling, "stream": stream}
        options["return_cumulative_logprob"] = sampling.get("logprobs") is not None
        kinds: dict[type, str] = {str: "prompt", list: "messages", tuple: "input_ids"}
        options[kinds[type(prompt)]] = prompt
        return self._client.generate(model=self.model, timeout=self._timeout, **options)

    def answers(self, items: Iterable[Item], concurrency: int) -> Iterator[tuple[Item, Any]]:
        """See AnswerSource. Raises GenerateError if the server is gone: no item has caused that."""
        pool = ThreadPoolExecutor(concurrency)
        waiting = iter(items)
        pending: set[Future[tuple[Item, Any]]] = set()
        try:
            while True:
                for item in islice(waiting, concurrency - len(pending)):
                    pending.add(pool.submit(self._answer, item))
                if not pending:
                    return
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                # Yield answers before errors: the server may have died after it sent them.
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, item: Item) -> tuple[Item, Any]:
        if self._is_only and item.model not in (None, self.model):
            problem = f"{shown(item.model)} is not here; --model {self.model} answers all lines"
            return item, Failed(f"model: {problem}, whatever model they name")
        try:
            return item, merge(self._ask(item.prompt, item.sampling, item.template, stream=False))
        except GenerateError as error:
            # One request alone may break the connection while the server still serves others.
            if error.status == "UNAVAILABLE" and not self._client.is_live():
                raise
            return item, Failed(str(error))
        except Exception as error:  # any error that an input line causes fails that line alone
            return item, Failed(str(error) or type(error).__name__)

    def close(self) -> None:
        self._client.close()
