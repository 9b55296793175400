"""Parses and checks a Triton request; an error is one sentence that names the wrong field.

Owns the input tensors and request parameters. Only reads Triton's request object. Must not know of
tokenizers, the engine or how responses are sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from msgspec import ValidationError, convert
from msgspec.structs import replace

from gllm_engine import (
    InvalidField,
    SamplingParams,
    Video,
    decode_json,
    not_taken,
    parse_sampling,
    shorten,
    take_media,
)

Array = np.ndarray[Any, Any]

# Name -> (Triton type, dims).
OUTPUTS: dict[str, tuple[str, list[int]]] = {
    "text_output": ("TYPE_STRING", [-1]),
    "finish_reason": ("TYPE_STRING", [-1]),
    "cumulative_logprob": ("TYPE_FP32", [-1]),
    "logprobs": ("TYPE_STRING", [-1]),
    "num_input_tokens": ("TYPE_UINT32", [1]),
    "num_output_tokens": ("TYPE_UINT32", [-1]),
    "token_ids": ("TYPE_INT32", [-1]),
    "prompt_logprobs": ("TYPE_STRING", [1]),
    "stop_reason": ("TYPE_STRING", [-1]),
    "num_cached_tokens": ("TYPE_UINT32", [1]),
    "request_times": ("TYPE_FP32", [3]),
}
# text_output is always built, prompt_logprobs if a sampling parameter requests them. All other
# outputs have a return_NAME flag.
_FLAGGED = [name for name in OUTPUTS if name not in ("text_output", "prompt_logprobs")]
# All inputs are optional for Triton, so that our own error names a missing input.
INPUTS: dict[str, tuple[str, list[int]]] = {
    "operation": ("TYPE_STRING", [1]),
    "text_input": ("TYPE_STRING", [1]),
    "input_ids": ("TYPE_INT32", [-1]),
    "messages": ("TYPE_STRING", [1]),
    "tools": ("TYPE_STRING", [1]),
    "chat_template_kwargs": ("TYPE_STRING", [1]),
    "add_special_tokens": ("TYPE_BOOL", [1]),
    "image": ("TYPE_STRING", [-1]),
    "video": ("TYPE_STRING", [-1]),
    "stream": ("TYPE_BOOL", [1]),
    "sampling_parameters": ("TYPE_STRING", [1]),
    "exclude_input_in_output": ("TYPE_BOOL", [1]),
    **{f"return_{name}": ("TYPE_BOOL", [1]) for name in _FLAGGED},
}
# Includes stop strings and grammars. Each of the n sequences has a copy, so 64 MiB at most.
MAX_PARAMETERS_LEN = 1 << 20  # characters of JSON
MAX_TIMEOUT_US = 2**63 - 1
PROMPTS = ("text_input", "input_ids", "messages")
MEDIA = ("image", "video")
# Inputs for the chat template, beside the messages.
TEMPLATE_INPUTS = ("tools", "chat_template_kwargs")
# The inputs of each operation, beside its name.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "generate": tuple(INPUTS),
    "tokenize": (*PROMPTS, *TEMPLATE_INPUTS, "add_special_tokens", *MEDIA),
    "detokenize": ("input_ids",),
    "token_texts": ("input_ids",),
    "describe": (),
}
_DTYPES = {"TYPE_STRING": np.object_, "TYPE_BOOL": np.bool_, "TYPE_INT32": np.int32}
_URLS = (b"data:", b"http:", b"https:", b"file:")
_TYPE_NAMES = {"TYPE_STRING": "BYTES", "TYPE_BOOL": "BOOL", "TYPE_INT32": "INT32"}


@dataclass(frozen=True)
class ParsedRequest:
    """A valid request. Filled by `parse_request`."""

    operation: str  # one of OPERATIONS; the fields from `stream` on are of generate alone
    outputs: frozenset[str]  # names in OUTPUTS to build
    timeout_us: int | None
    kind: str = ""  # one of PROMPTS; "" without a prompt
    # by kind: text, an array of token ids, or messages as unchecked JSON without their images
    prompt: Any = None
    template: dict[str, Any] = field(default_factory=dict)  # TEMPLATE_INPUTS, as unchecked JSON
    add_special_tokens: bool = True  # such as a bos token
    # of the prompt, in the order of each kind: files, their base64, or URLs, of videos as Video; ()
    # to tokenize places alone
    images: tuple[Any, ...] = ()
    stream: bool = False
    prepend_prompt: bool = False  # the answer begins with the prompt's text
    sampling: SamplingParams = SamplingParams()
    show_logprobs: bool = False  # false: logprobs are computed only for cumulative_logprob


def parse_request(request: Any, texts: Mapping[str, str] | None = None) -> ParsedRequest:
    """Read and check a whole Triton InferenceRequest.

    `texts`: what stands for an image or a video in a text, by the kinds that the model takes; none
    by default. Raises InvalidField, which names the first invalid field.
    """
    tensors = {tensor.name(): _array(tensor) for tensor in request.inputs()}
    for kind in MEDIA:  # clients of the vLLM backend send it without any
        if kind in tensors and not tensors[kind].size:
            del tensors[kind]
    operation = _operation(tensors)
    kind, prompt = _prompt(tensors, operation)
    prompt, images = _media(tensors, operation, prompt, texts or {})
    template = _template(tensors, kind)
    special = _special_tokens(tensors, kind)
    parameters = _parameters(request)
    timeout_us = _timeout(request, parameters.pop("timeout", None))
    if operation != "generate":
        for name in parameters:
            raise InvalidField(shorten(name), f"{operation} takes no sampling parameters")
        outputs = frozenset(request.requested_output_names())
        return ParsedRequest(
            operation, outputs, timeout_us, kind, prompt, template, special, images
        )
    sampling = _sampling(tensors, parameters)
    stream = bool(_flag(tensors, "stream"))
    exclude = _flag(tensors, "exclude_input_in_output")
    if stream and exclude is False:
        what = "When streaming, `exclude_input_in_output` = False is not allowed."
        raise VllmError("exclude_input_in_output", f"Error generating stream: {what}")
    if exclude is None:  # by default, only an unstreamed text prompt is repeated in the answer
        exclude = stream or kind != "text_input"
    outputs = _outputs(tensors, set(request.requested_output_names()), sampling)
    show_logprobs = sampling.logprobs is not None
    if "cumulative_logprob" in outputs and not show_logprobs:
        sampling = replace(sampling, logprobs=0)
    return ParsedRequest(
        operation,
        outputs,
        timeout_us,
        kind,
        prompt,
        template,
        special,
        images,
        stream=stream,
        prepend_prompt=not exclude,
        sampling=sampling,
        show_logprobs=show_logprobs,
    )


class VllmError(InvalidField):
    """A refusal with the exact text of the vLLM backend, because its clients compare the text."""

    def __init__(self, field: str, sentence: str) -> None:
        ValueError.__init__(self, sentence)
        self.field = field


def _array(tensor: Any) -> Array:
    name = tensor.name()
    if name not in INPUTS:
        raise InvalidField(name, f"unknown input; known are {', '.join(INPUTS)}")
    kind, dims = INPUTS[name]
    array: Array = tensor.as_numpy()
    if array.dtype != _DTYPES[kind]:
        raise InvalidField(name, f"data type {array.dtype} given, {_TYPE_NAMES[kind]} expected")
    if array.ndim != 1 or (dims == [1] and array.size != 1):
        what = f"shape {list(array.shape)} given, {dims} expected"
        if name in PROMPTS and name != "input_ids":
            what += " (a request carries exactly one prompt)"
        raise InvalidField(name, what)
    return array


def _text(tensors: Mapping[str, Array], name: str) -> str:
    value: str | bytes = tensors[name][0]
    if isinstance(value, str):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        problem = f"not valid UTF-8 (byte 0x{byte:02x} at offset {error.start})"
        raise InvalidField(name, problem) from None


def _flag(tensors: Mapping[str, Array], name: str) -> bool | None:
    return bool(tensors[name][0]) if name in tensors else None


def _operation(tensors: Mapping[str, Array]) -> str:
    """The operation, "generate" by default. Raises InvalidField for an input that does not go with
    it."""
    operation = _text(tensors, "operation") if "operation" in tensors else "generate"
    if operation not in OPERATIONS:
        known = ", ".join(OPERATIONS)
        raise InvalidField("operation", f"{shorten(operation)!r} is unknown; known are {known}")
    taken = ("operation", *OPERATIONS[operation])
    for name in tensors:
        if name not in taken:
            takes = ", ".join(OPERATIONS[operation]) or "no other input"
            raise InvalidField(name, f"it does not go with {operation}, which takes {takes}")
    return operation


def _prompt(tensors: Mapping[str, Array], operation: str) -> tuple[str, Any]:
    if operation == "describe":
        return "", None
    if operation in ("detokenize", "token_texts"):
        if "input_ids" not in tensors:
            raise InvalidField("input_ids", f"missing, it holds the token ids for {operation}")
        return "input_ids", tensors["input_ids"]
    given = [name for name in PROMPTS if name in tensors]
    if not given:
        raise InvalidField("text_input", "no prompt; give text_input, input_ids or messages")
    if len(given) > 1:
        what = f"a request carries exactly one prompt, this one has {' and '.join(given)}"
        raise InvalidField(given[1], what)
    if given == ["input_ids"]:
        if not tensors["input_ids"].size:
            raise InvalidField("input_ids", "the prompt is empty, at least one token is needed")
        return given[0], tensors["input_ids"]
    text = _text(tensors, given[0])
    if not text:
        raise InvalidField(given[0], "the prompt is empty, at least one character is needed")
    return given[0], text if given == ["text_input"] else _json("messages", text)


def _media(
    tensors: Mapping[str, Array], operation: str, prompt: Any, texts: Mapping[str, str]
) -> tuple[Any, tuple[Any, ...]]:
    """The prompt without its images and videos, and these. Those of the inputs `image` and `video`
    take the places of messages that have none, in order."""
    given = {kind: [_source(value) for value in tensors.get(kind, ())] for kind in MEDIA}
    for kind, values in given.items():
        if values and kind not in texts:
            raise not_taken(kind)
    given["video"] = list(map(Video, given["video"]))
    if "messages" not in tensors:
        return prompt, (*given["image"], *given["video"])
    prompt, found = take_media(prompt, texts)
    places = {"image": found.count(None), "video": found.count(Video(None))}
    if operation == "tokenize" and not any(given.values()) and sum(places.values()) == len(found):
        return prompt, ()
    for kind, values in given.items():
        if len(values) != places[kind]:
            problem = (
                f"{len(values)} {kind}s given, the messages have {places[kind]} places for them"
            )
            raise InvalidField(kind, f"{problem} (parts without one of their own)")
    waiting = {None: iter(given["image"]), Video(None): iter(given["video"])}
    return prompt, tuple(
        next(waiting[each]) if each in (None, Video(None)) else each for each in found
    )


def _source(value: bytes | str) -> bytes | str:
    is_url = isinstance(value, bytes) and value.startswith(_URLS)
    return value.decode("latin-1") if is_url else value  # type: ignore[union-attr]


def _template(tensors: Mapping[str, Array], kind: str) -> dict[str, Any]:
    given = [name for name in TEMPLATE_INPUTS if name in tensors]
    if given and kind != "messages":
        problem = f"it is for the chat template, so it goes with messages and not with {kind}"
        raise InvalidField(given[0], problem)
    return {name: _json(name, _text(tensors, name)) for name in given}


def _special_tokens(tensors: Mapping[str, Array], kind: str) -> bool:
    """Whether special tokens are added to the prompt. Chat templates write their own."""
    given = _flag(tensors, "add_special_tokens")
    if given is not None and kind == "input_ids":
        raise InvalidField("add_special_tokens", "it is for prompts of text, not for input_ids")
    return kind == "text_input" if given is None else given


def _json(name: str, text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise InvalidField(name, f"key {shorten(twice)!r} is given twice")
        return values

    return decode_json(name, text, once)


def _parameters(request: Any) -> dict[str, Any]:
    _check_len("parameters", request.parameters())
    # Keys that begin with triton_ are Triton's own, not sampling parameters. So is the "id" of a
    # generate body: Triton makes it the request's id and passes it on as a parameter too.
    parameters = _json("parameters", request.parameters() or "{}")
    own = {key for key in parameters if key.startswith("triton_")}
    if parameters.get("id") == request.request_id():
        own.add("id")
    return {key: value for key, value in parameters.items() if key not in own}


def _check_len(name: str, text: str) -> None:
    if len(text) > MAX_PARAMETERS_LEN:
        problem = f"{len(text)} characters given, at most {MAX_PARAMETERS_LEN}"
        raise InvalidField(name, problem)


def _timeout(request: Any, parameter: Any) -> int | None:
    """The smaller of gRPC's timeout and the parameter, in microseconds; 0 means no timeout."""
    given = [_microseconds(value) for value in (parameter, request.timeout()) if value is not None]
    return min((value for value in given if value), default=None)


def _microseconds(value: Any) -> int:
    try:
        number: int = convert(value, int, strict=False)
    except (ValidationError, OverflowError):
        number = -1
    if not 0 <= number <= MAX_TIMEOUT_US:
        what = "a whole number of microseconds from 0, for none, to 2**63 - 1"
        raise InvalidField("timeout", f"{shorten(repr(value))} is not valid ({what})")
    return number


def _sampling(tensors: Mapping[str, Array], parameters: dict[str, Any]) -> SamplingParams:
    """Sampling parameters from the tensor and the request. If both have a key, the tensor's counts.

    The vLLM backend does the same, and its clients send the same values in both.
    """
    values = dict(parameters)
    if "sampling_parameters" in tensors:
        text = _text(tensors, "sampling_parameters")
        _check_len("sampling_parameters", text)
        given = _json("sampling_parameters", text)
        if not isinstance(given, dict):
            raise InvalidField("sampling_parameters", "a JSON object is expected")
        values |= given
    if values.pop("lora_name", None) is not None:
        raise VllmError("lora_name", "LoRA feature is not enabled.")
    # Triton's OpenAI front end of 2025 and before sends these two with every request.
    if values.get("best_of") == 1:
        del values["best_of"]
    if values.get("logprobs") is False:
        del values["logprobs"]
    return parse_sampling(values)


def _outputs(
    tensors: Mapping[str, Array], requested: set[str], sampling: SamplingParams
) -> frozenset[str]:
    """The outputs to build: those with a return flag, or those that the client named.

    If a client names no output, Triton requests all of them, so that counts as no name.
    """
    named = requested < set(OUTPUTS)
    wanted = {"text_output"}
    for name in _FLAGGED:
        flag = _flag(tensors, f"return_{name}")
        if flag or (flag is None and named):
            wanted.add(name)
    if sampling.prompt_logprobs is not None or named:
        wanted.add("prompt_logprobs")
    return frozenset(wanted & requested)
