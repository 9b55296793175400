"""The models behind the server: every READY Triton model that answers the operation "describe".

Owns what is known of each, and keeps it in step with tritonserver, where models come and go.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from gllm_client import Chunk, Client, GenerateError
from gllm_client.openai_server.body import Json
from gllm_client.openai_server.errors import ApiError, from_triton, invalid
from gllm_client.openai_server.formats.choice import Format, choose
from gllm_client.openai_server.logprobs import finite
from gllm_client.openai_server.telemetry import current_trace
from gllm_client.protocol import shown

REFRESH_S = 10.0  # between two looks at the repository
MISS_S = 1.0  # the same after a request for an unknown model
DESCRIBE_TIMEOUT_S = 5.0


class ModelClient(Protocol):
    """What asks a model: a Client, or a batch's source of answers. The options are Client's."""

    def generate(self, prompt: str | None = None, **options: Any) -> Any: ...

    async def tokenize(self, prompt: str | None = None, **options: Any) -> Chunk: ...

    async def detokenize(self, token_ids: Sequence[int], **call: Any) -> str: ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model. `facts`: what its backend says of it, see the operation "describe"; chat_template
    is the source of all its chat templates together."""

    name: str
    facts: Json
    max_model_len: int  # tokens, of prompt and answer together
    created: int  # Unix time at which this server first saw it
    client: ModelClient
    format: Format  # how it writes thoughts and calls
    tenant: str = ""  # whose requests these are; see the sampling parameter
    malformed_calls: Counter[str] = field(default_factory=Counter)  # by tool format

    def count_malformed(self, number: int) -> None:
        """Count texts of an answer that looked like calls of tools and are none."""
        self.malformed_calls[self.format.tool_format] += number

    async def tokenize(self, request_id: str, **prompt: Any) -> tuple[list[int], str]:
        """The token ids of a prompt and its text; `prompt`: as to the client's tokenize."""
        with _api_errors():
            chunk = await self.client.tokenize(model=self.name, request_id=request_id, **prompt)
        return list(chunk.token_ids), chunk.text

    async def detokenize(self, ids: list[int], request_id: str, **how: str) -> str:
        """The text of tokens, special ones included; `how`: as to the client's detokenize."""
        call = {"model": self.name, "request_id": request_id} | how
        with _api_errors():
            text: str = await self.client.detokenize(ids, **call)
        return text

    async def generate(
        self, ids: list[int], sampling: Json, request_id: str, media: Json
    ) -> AsyncGenerator[Chunk, None]:
        """The answer to a prompt, in chunks. Closing the generator cancels the request.

        With `media` the first chunk tells the number of the prompt's tokens.
        """
        if self.tenant:
            sampling = sampling | {"tenant": self.tenant}
        is_scored = not sampling.keys().isdisjoint(("logprobs", "prompt_logprobs"))
        trace = current_trace()
        with _api_errors():
            chunks = self.client.generate(
                model=self.name,
                input_ids=ids,
                sampling=sampling,
                request_id=request_id,
                **media,
                return_num_input_tokens=bool(media),
                return_num_output_tokens=sampling.get("n", 1) > 1,
                return_stop_reason=True,
                return_num_cached_tokens=True,
                return_request_times=trace is not None,
            )
            if trace is not None:
                chunks = trace.watch(chunks, self.name, request_id)
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield finite(chunk) if is_scored else chunk


def readable(facts: Json) -> Json:
    """The answer to the operation "describe" as ServedModel's facts."""
    templates = facts.get("chat_template") or {}
    return facts | {"chat_template": "\n".join(templates.values())}


def unknown_model(name: str | None, have: Iterable[str]) -> ApiError:
    """The error of a request for a model that is none of `have`."""
    problem = f"{shown(name)} does not exist; the models are: {', '.join(have) or 'none'}"
    return ApiError(404, f"model: {problem}", "model", "model_not_found")


@contextmanager
def _api_errors() -> Iterator[None]:
    """Turn errors of the client into ApiError."""
    try:
        yield
    except GenerateError as error:
        raise from_triton(error) from None
    except ValueError as error:  # a value that a request cannot carry
        raise from_triton(GenerateError(str(error), "INVALID_ARGUMENT")) from None


class Models:
    """The models that tritonserver serves now. `formats`: names of a format's two parts, or None
    to choose by the model; see formats.choose."""

    def __init__(self, client: Client, *formats: str | None) -> None:
        self._client = client
        self._formats = formats
        self.known: dict[str, ServedModel] = {}  # of the last look, in order of their names
        self._answers = False  # any model, at the last look
        self._refreshed = 0.0  # when that look began
        self._lock = asyncio.Lock()

    async def all(self) -> list[ServedModel]:
        """All models, by name. Raises ApiError: 503 when tritonserver is away."""
        await self._look_for(None)
        return list(self.known.values())

    async def watch(self) -> None:
        """Look at the repository for ever."""
        while True:
            with suppress(GenerateError):  # tritonserver is away; requests and /health say so
                await self.refresh(REFRESH_S / 2)
            await asyncio.sleep(REFRESH_S)

    async def refresh(self, max_age: float = 0.0) -> None:
        """Look at the repository, unless a look began at most `max_age` seconds before this call.

        Raises GenerateError.
        """
        oldest = time.monotonic() - max_age
        async with self._lock:
            if self._refreshed > oldest:
                return
            begun = time.monotonic()
            entries = await self._client.index(DESCRIBE_TIMEOUT_S)
            names = sorted({entry["name"] for entry in entries if entry["state"] == "READY"})
            described = await asyncio.gather(*map(self._describe, names))
            found = dict(zip(names, described, strict=True))
            models = [self._updated(name, facts) for name, facts in found.items()]
            self.known = {model.name: model for model in models if model is not None}
            self._answers = any(facts is not None for facts in described)
            self._refreshed = begun

    def _updated(self, name: str, facts: Json | None) -> ServedModel | None:
        """A model as it is now; as it was, if it does not answer. None: it is none of ours."""
        known = self.known.get(name)
        if facts is None or (known and known.facts == facts):
            return known
        return ServedModel(
            name=name,
            facts=facts,
            max_model_len=facts["max_model_len"],
            created=known.created if known else int(time.time()),
            client=self._client,
            format=choose(facts, *self._formats),
            malformed_calls=known.malformed_calls if known else Counter(),
        )

    async def _describe(self, name: str) -> Json | None:
        try:
            facts: Json = await self._client.describe(model=name, timeout=DESCRIBE_TIMEOUT_S)
        except (GenerateError, ValueError):  # another backend's model, or it cannot answer now
            return None
        return readable(facts)

    async def is_healthy(self) -> bool:
        """Whether any model answers now."""
        try:
            await self.refresh()
        except GenerateError:
            return False
        return self._answers

    async def find(self, name: str | None) -> ServedModel:
        """The model of that name; None: the only one.

        Raises ApiError: 404, code model_not_found; 400 for None among several models; 503 when
        tritonserver is away.
        """
        await self._look_for(name)
        have = list(self.known)
        if name is None and len(have) == 1:
            return self.known[have[0]]
        if name in self.known:
            return self.known[name]
        if name is None:
            raise invalid("model", f"it is required; the models are: {', '.join(have) or 'none'}")
        raise unknown_model(name, have)

    async def _look_for(self, name: str | None) -> None:
        """Refresh if the model is unknown; None: if all are."""
        if self.known if name is None else name in self.known:
            return
        try:
            await self.refresh(MISS_S)
        except GenerateError as error:
            raise ApiError(503, str(error)) from None
