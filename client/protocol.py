"""Generate requests and answers, independent of the transport.

Owns the names of the input and output tensors and the meaning of their values. Knows nothing of
sockets: the gRPC and HTTP clients encode the result of `request_inputs`, and pass the decoded
output tensors to `to_chunk`.
"""

from __future__ import annotations

import base64
import json
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
from msgspec.structs import replace

# An input tensor's value, of type BYTES, BOOL, INT32 (a list) or BYTES (a list).
Value = str | bool | list[int] | list[str]
Inputs = dict[str, Value]  # by name
MediaSource = str | bytes | os.PathLike[str]
Chunks = TypeVar("Chunks")
Self = TypeVar("Self", bound="BlockingAsking")

MAX_TIMEOUT_S = 1e6  # eleven days; sockets and gRPC can both count them
_INT32 = range(-(2**31), 2**31)


class GenerateError(RuntimeError):
    """A request failed. `status`: the gRPC status name, None if the transport has none."""

    def __init__(self, message: str, status: str | None = None) -> None:
        super().__init__(message)
        self.status = status


class Output(msgspec.Struct, frozen=True):
    """One of a request's n answers, or the new part of it in a chunk."""

    text: str = ""
    finish_reason: str | None = None  # "stop", "length"; None before the end of the answer
    token_ids: tuple[int, ...] = ()
    # For each token: {token id: {"logprob", "rank", "decoded_token"}}; None if not requested.
    logprobs: list[dict[str, Any]] | None = None
    cumulative_logprob: float | None = None  # of all tokens so far
    num_tokens: int = 0
    # The stop string that ended the answer, or the id of the stop token that did, as text.
    stop_reason: str | None = None


class Chunk(msgspec.Struct, frozen=True):
    """One response: a whole answer, or the next part of a streamed answer."""

    outputs: tuple[Output, ...]  # the n answers, in order
    num_input_tokens: int | None = None
    prompt_logprobs: list[Any] | None = None
    request_id: str = ""
    num_cached_tokens: int | None = None  # of the prompt, for the first answer; None: not told yet
    # Seconds in the queue, in prefill and in decode, as the engine measured them; None before the
    # end of all answers, or if not requested.
    request_times: tuple[float, ...] | None = None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def stop_reason(self) -> str | None:
        return self.outputs[0].stop_reason

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> list[dict[str, Any]] | None:
        return self.outputs[0].logprobs

    @property
    def cumulative_logprob(self) -> float | None:
        return self.outputs[0].cumulative_logprob

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all n answers together."""
        return sum(output.num_tokens for output in self.outputs)


def request_inputs(
    prompt: str | None = None,
    *,
    messages: Sequence[Mapping[str, Any]] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    input_ids: Sequence[int] | None = None,
    add_special_tokens: bool | None = None,
    images: Sequence[MediaSource] = (),
    videos: Sequence[MediaSource] = (),
    stream: bool = True,
    sampling: Any = None,
    exclude_input_in_output: bool = True,
    return_finish_reason: bool = True,
    return_num_input_tokens: bool = True,
    return_num_output_tokens: bool = True,
    return_token_ids: bool = True,
    return_logprobs: bool | None = None,
    return_cumulative_logprob: bool = False,
    return_stop_reason: bool = False,
    return_num_cached_tokens: bool = False,
    return_request_times: bool = False,
    **sampling_fields: Any,
) -> Inputs:
    """The input tensors of one request, by name. These are the options of every `generate`.

    Exactly one of `prompt` (text), `messages` (for the model's chat template) and `input_ids`.
    `tools` (functions that the model may call) and `chat_template_kwargs` (variables of the chat
    template, such as enable_thinking) go with `messages`. `add_special_tokens`: whether the
    tokenizer adds special tokens, such as a bos token; default: to `prompt` only. `images`: of each
    image the bytes of a file, its path here, its content in base64, or a URL that the server reads;
    see docs/images.md. `videos`: the same. `sampling`: a mapping or a SamplingParams; single fields
    may also be given by keyword (`max_tokens=20, stop=["\\n"]`). `return_logprobs`: default: when
    `logprobs` is among the sampling parameters.
    Raises ValueError when the options contradict each other or a request cannot carry them; the
    server checks their values.
    """
    inputs = _prompt(prompt, messages, input_ids)
    inputs |= _prompt_options(tools, chat_template_kwargs, add_special_tokens)
    parameters = _sampling(sampling, sampling_fields)
    if not asks_for_one(parameters) and return_token_ids and not return_num_output_tokens:
        raise ValueError("n > 1 with return_token_ids needs return_num_output_tokens as well")
    flags = {
        "return_finish_reason": return_finish_reason,
        "return_num_input_tokens": return_num_input_tokens,
        "return_num_output_tokens": return_num_output_tokens,
        "return_token_ids": return_token_ids,
        "return_logprobs": _wants_logprobs(return_logprobs, parameters),
        "return_cumulative_logprob": return_cumulative_logprob,
        "return_stop_reason": return_stop_reason,
        "return_num_cached_tokens": return_num_cached_tokens,
        "return_request_times": return_request_times,
    }
    inputs |= {name: True for name, wanted in flags.items() if wanted}
    if stream or exclude_input_in_output:
        inputs["exclude_input_in_output"] = exclude_input_in_output
    inputs["stream"] = stream
    if parameters:
        inputs["sampling_parameters"] = _to_json("sampling_parameters", parameters)
    return inputs | _media(images, videos)


def _media(images: Sequence[MediaSource], videos: Sequence[MediaSource]) -> Inputs:
    given = {"image": images, "video": videos}
    return {name: list(map(_base64, sources)) for name, sources in given.items() if sources}


def _base64(source: MediaSource) -> str:
    if isinstance(source, str):
        return source
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    return base64.b64encode(content).decode("ascii")


def tokenize_inputs(
    prompt: str | None = None,
    *,
    messages: Sequence[Mapping[str, Any]] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    input_ids: Sequence[int] | None = None,
    add_special_tokens: bool | None = None,
    images: Sequence[MediaSource] = (),
    videos: Sequence[MediaSource] = (),
) -> Inputs:
    """The input tensors of a request to tokenize; the options are those of `request_inputs`."""
    inputs = {"operation": "tokenize"} | _prompt(prompt, messages, input_ids)
    return (
        inputs
        | _prompt_options(tools, chat_template_kwargs, add_special_tokens)
        | _media(images, videos)
    )


def detokenize_inputs(token_ids: Sequence[int], operation: str = "detokenize") -> Inputs:
    """The input tensors of a request for the text of tokens, or of each ("token_texts"). Raises
    ValueError.
    """
    return {"operation": operation, "input_ids": _token_ids(token_ids)}


def _prompt_options(tools: Any, template: Any, add_special_tokens: bool | None) -> Inputs:
    inputs: Inputs = {}
    for name, value in {"tools": tools, "chat_template_kwargs": template}.items():
        if value is not None:
            inputs[name] = _to_json(name, value)
    if add_special_tokens is not None:
        inputs["add_special_tokens"] = bool(add_special_tokens)
    return inputs


def _prompt(
    prompt: str | None,
    messages: Sequence[Mapping[str, Any]] | None,
    input_ids: Sequence[int] | None,
) -> Inputs:
    prompts: Inputs = {}
    if prompt is not None:
        if not isinstance(prompt, str):
            raise ValueError(f"prompt: text is expected, got {type(prompt).__name__}")
        prompts["text_input"] = prompt
    if messages is not None:
        if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
            raise ValueError(f"messages: a list is expected, got {type(messages).__name__}")
        prompts["messages"] = _to_json("messages", list(messages))
    if input_ids is not None:
        prompts["input_ids"] = _token_ids(input_ids)
    if len(prompts) != 1:
        given = " and ".join(prompts) or "none"
        raise ValueError(f"exactly one of prompt, messages and input_ids is needed, got {given}")
    return prompts


def _token_ids(input_ids: Any) -> list[int]:
    try:
        ids = [operator.index(token) for token in input_ids]
    except TypeError as error:
        raise ValueError(f"input_ids: whole numbers are expected ({error})") from None
    for extreme in (min(ids), max(ids)) if ids else ():
        if extreme not in _INT32:
            raise ValueError(f"input_ids: {shown(extreme)} does not fit INT32")
    return ids


def _to_json(name: str, value: Any) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        raise ValueError(f"{name}: nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: cannot be said in JSON ({error})") from None


def shorten(text: str) -> str:
    """At most 60 characters of a user's text, for an error message."""
    return text if len(text) <= 60 else text[:57] + "..."


def shown(value: Any) -> str:
    """A user's value for an error message."""
    try:
        return shorten(repr(value))
    except (ValueError, RecursionError):  # too many digits, or nested too deeply
        return f"this {type(value).__name__}"


def check_timeout(timeout: Any) -> float | None:
    """A timeout in seconds, or None for no limit. Raises ValueError for an invalid timeout."""
    if timeout is None:
        return None
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not number or not 0 < timeout <= MAX_TIMEOUT_S:
        limits = f"above 0 and at most {MAX_TIMEOUT_S:.0f} (None: no limit)"
        raise ValueError(f"timeout: {shown(timeout)} is not a number of seconds {limits}")
    return float(timeout)


def asks_for_one(parameters: Mapping[str, Any]) -> bool:
    """Whether n is 1. False for an invalid n, which the server then refuses."""
    return parameters.get("n") in (None, 1, "1")


def _sampling(sampling: Any, fields: dict[str, Any]) -> dict[str, Any]:
    given = {} if sampling is None else _plain("sampling", sampling)
    if not isinstance(given, dict):
        raise ValueError(f"sampling: a mapping is expected, got {type(sampling).__name__}")
    if twice := sorted(set(given) & set(fields)):
        raise ValueError(f"{twice[0]}: given both in sampling and by keyword")
    return given | {name: _plain(name, value) for name, value in fields.items()}


def _wants_logprobs(flag: bool | None, parameters: Mapping[str, Any]) -> bool:
    has_number = parameters.get("logprobs") is not None
    if flag and not has_number:
        raise ValueError("return_logprobs: logprobs, how many for each token, is needed as well")
    return has_number if flag is None else flag


def _plain(name: str, value: Any) -> Any:
    try:
        return msgspec.to_builtins(value)
    except RecursionError:
        raise ValueError(f"{name}: nested too deeply") from None
    except TypeError as error:
        raise ValueError(f"{name}: cannot be said in JSON ({error})") from None


def to_chunk(tensors: Mapping[str, Sequence[Any]], request_id: str = "") -> Chunk:
    """Make a chunk from output tensors by name. BYTES values are str; missing tensors: defaults.

    `token_ids` holds the tokens of all n answers one after another; `num_output_tokens` says how
    many belong to each.
    """

    texts = tensors.get("text_output", ())
    unknown = (None,) * len(texts)
    columns = [tensors.get(name) or unknown for name in _COLUMNS]
    ids = tuple(tensors.get("token_ids", ()))
    outputs = []
    start = 0
    for text, reason, logprobs, cumulative, count, stop in zip(texts, *columns, strict=True):
        end = len(ids) if count is None or len(texts) == 1 else start + count
        outputs.append(
            Output(
                text,
                None if reason == "None" else reason,
                ids[start:end],
                None if logprobs is None else json.loads(logprobs),
                cumulative,
                count or 0,
                None if stop == "None" else stop,
            )
        )
        start = end
    (num_input,) = tensors.get("num_input_tokens") or (None,)
    (num_cached,) = tensors.get("num_cached_tokens") or (None,)
    (scored,) = tensors.get("prompt_logprobs") or (None,)
    prompt_logprobs = None if scored is None else json.loads(scored)
    times = tensors.get("request_times")
    return Chunk(
        tuple(outputs),
        num_input,
        prompt_logprobs,
        request_id,
        num_cached,
        None if times is None else tuple(times),
    )


# Tensors with a value for each answer.
_COLUMNS = ("finish_reason", "logprobs", "cumulative_logprob", "num_output_tokens", "stop_reason")


def merge(chunks: Iterable[Chunk]) -> Chunk:
    """Join the chunks of an answer to one chunk. Raises GenerateError if there is no chunk."""
    whole: Chunk | None = None
    for chunk in chunks:
        whole = _join_chunks(whole, chunk) if whole else chunk
    if whole is None:
        raise GenerateError("the answer ended before it began")
    return whole


def _join_chunks(a: Chunk, b: Chunk) -> Chunk:
    outputs = tuple(_join(x, y) for x, y in zip(a.outputs, b.outputs, strict=True))
    return Chunk(
        outputs,
        _latest(a.num_input_tokens, b.num_input_tokens),
        _latest(a.prompt_logprobs, b.prompt_logprobs),
        a.request_id,
        _latest(a.num_cached_tokens, b.num_cached_tokens),
        _latest(a.request_times, b.request_times),
    )


def _join(a: Output, b: Output) -> Output:
    return replace(
        b,
        text=a.text + b.text,
        finish_reason=_latest(a.finish_reason, b.finish_reason),
        token_ids=a.token_ids + b.token_ids,
        logprobs=a.logprobs if b.logprobs is None else (a.logprobs or []) + b.logprobs,
        cumulative_logprob=_latest(a.cumulative_logprob, b.cumulative_logprob),
        num_tokens=a.num_tokens + b.num_tokens,
        stop_reason=_latest(a.stop_reason, b.stop_reason),
    )


def _latest(old: Any, new: Any) -> Any:
    return old if new is None else new


DESCRIBE: Inputs = {"operation": "describe"}


def to_description(chunk: Chunk) -> dict[str, Any]:
    """The model's facts in the answer to DESCRIBE."""
    facts: dict[str, Any] = json.loads(chunk.text)
    return facts


class Asking(ABC, Generic[Chunks]):
    """The base of all clients. `Chunks`: the type that `generate` returns, an (async) iterator."""

    _model: str | None  # the default model of calls that name none

    def generate(
        self,
        prompt: str | None = None,
        *,
        model: str | None = None,
        timeout: float | None = None,
        request_id: str = "",
        **options: Any,
    ) -> Chunks:
        """Stream an answer in chunks. Closing the iterator, or cancelling the task that iterates,
        cancels the request.

        `options` are those of `request_inputs`. `timeout`: seconds for the whole answer, at most
        MAX_TIMEOUT_S; None: no limit. Raises ValueError at once for options that contradict each
        other or cannot be sent, or when neither the call nor the client names a model; the
        iterator raises GenerateError.
        """
        return self._send(request_inputs(prompt, **options), model, timeout, request_id)

    def _send(
        self,
        inputs: Inputs,
        model: str | None = None,
        timeout: float | None = None,
        request_id: str = "",
    ) -> Chunks:
        timeout = check_timeout(timeout)
        model = model or self._model
        if not model:
            raise ValueError("model: none given, neither to the client nor to the call")
        return self._stream(model, inputs, request_id, timeout)

    @abstractmethod
    def _stream(self, model: str, inputs: Inputs, request_id: str, timeout: float | None) -> Chunks:
        """Send a request, return its chunks. Raises ValueError for inputs it cannot encode."""


class BlockingAsking(Asking[Iterator[Chunk]]):
    """The base of the blocking clients."""

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close all connections; running requests are cancelled."""

    def complete(self, prompt: str | None = None, **options: Any) -> Chunk:
        """The whole answer as one chunk; options as `generate`'s."""
        return merge(self.generate(prompt, **{"stream": False} | options))

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        model: str | None = None,
        timeout: float | None = None,
        request_id: str = "",
        **options: Any,
    ) -> Chunk:
        """A prompt's tokens, which may be more than the model takes, as a chunk.

        Its token_ids, num_input_tokens and text (of `messages`: what the chat template writes) are
        set. `options` are those of `tokenize_inputs`.
        """
        return merge(self._send(tokenize_inputs(prompt, **options), model, timeout, request_id))

    def detokenize(
        self, token_ids: Sequence[int], *, operation: str = "detokenize", **call: Any
    ) -> str:
        """The text of tokens, special tokens included; with "token_texts" a JSON list of the text
        of each. `call`: model, timeout and request_id.
        """
        return merge(self._send(detokenize_inputs(token_ids, operation), **call)).text

    def describe(self, **call: Any) -> dict[str, Any]:
        """Facts of a model: see docs/requests.md. `call`: model, timeout and request_id."""
        return to_description(merge(self._send(DESCRIBE, **call)))
