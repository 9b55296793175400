"""The fields that chat and completion requests share: their types, and what they mean for Triton.

Every field is honoured, accepted because it changes nothing (_Accepted), or refused by name.
Ranges of sampling parameters are checked by the backend, whose sentences name the field too.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import msgspec

from gllm_client.openai_server.body import Json
from gllm_client.openai_server.errors import invalid
from gllm_client.openai_server.events import Tokens

MAX_TOP_LOGPROBS = 20
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
MAX_N = 64  # the backend's limit; checked here because every answer has a state of its own


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = False  # one more event, with the usage
    continuous_usage_stats: bool | None = False  # the usage so far in every event
    include_obfuscation: Literal[False] | None = False


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    schema: Json
    description: str | None = None
    strict: bool | None = None  # a schema is always enforced


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None


class _Accepted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields that clients send habitually and that change nothing here, at their only values."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    safety_identifier: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    service_tier: Any = None
    verbosity: Any = None
    use_beam_search: Literal[False] = False
    length_penalty: Annotated[float, msgspec.Meta(ge=1, le=1)] = 1.0
    spaces_between_special_tokens: Literal[True] = True


class Common(_Accepted, frozen=True, kw_only=True):
    """What chat and completion requests share."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    priority: int | None = None
    prompt_logprobs: int | None = None
    cache_salt: str | None = None
    prompt_cache_key: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: Json | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False


# Sent to Triton as they are.
_SAMPLING = (
    "n",
    "stop",
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "min_tokens",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "ignore_eos",
    "bad_words",
    "allowed_token_ids",
    "priority",
    "prompt_logprobs",
)


def check(asked: Common) -> None:
    """Raise ApiError for fields that contradict each other, and for too many answers."""
    if not 1 <= asked.n <= MAX_N:
        raise invalid("n", f"{asked.n} is outside [1, {MAX_N}]")
    if asked.stream_options is not None and not asked.stream:
        raise invalid("stream_options", "it goes with stream: true")
    if asked.prompt_logprobs is not None and asked.stream:
        raise invalid("prompt_logprobs", "it cannot go with stream: true")
    truncated = asked.truncate_prompt_tokens
    if truncated is not None and truncated != -1 and truncated < 1:
        raise invalid("truncate_prompt_tokens", f"{truncated} is neither -1 nor at least 1")


def sampling(asked: Common) -> Json:
    """Triton's sampling parameters, without the number of tokens and the form."""
    given = {name: getattr(asked, name) for name in _SAMPLING}
    given["cache_salt"] = asked.cache_salt
    if asked.prompt_cache_key is not None:  # prompts share cached pages only if both are equal
        given["cache_salt"] = json.dumps([asked.cache_salt, asked.prompt_cache_key])
    return {name: value for name, value in given.items() if value is not None}


def form(asked: Common) -> Json | None:
    """The structured outputs that the answer must keep to, in the form of Triton's parameter."""
    wanted = asked.response_format
    if wanted and wanted.json_schema and wanted.type != "json_schema":
        raise invalid("response_format.json_schema", "it goes with type json_schema")
    if wanted is None or wanted.type == "text":
        return asked.structured_outputs
    if asked.structured_outputs is not None:
        raise invalid("response_format", "it cannot go with structured_outputs")
    if wanted.type == "json_object":
        return {"json_object": True}
    if wanted.type == "structural_tag":
        problem = "structural_tag is not among text, json_object and json_schema"
        raise invalid("response_format.type", f"{problem}; structured_outputs takes it")
    if wanted.json_schema is None:
        raise invalid("response_format.json_schema", "it is required with type json_schema")
    return {"json": wanted.json_schema.schema}


class Usage:
    """What a request has consumed so far."""

    def __init__(self, num_prompt: int) -> None:
        self.num_prompt = num_prompt
        self.num_cached = 0
        self.num_completion = 0
        self.num_reasoning = 0

    def add(self, tokens: Tokens) -> None:
        self.num_completion += len(tokens.ids)
        self.num_reasoning += tokens.num_reasoning

    def show(self) -> Json:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_completion,
            "total_tokens": self.num_prompt + self.num_completion,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
            "completion_tokens_details": {"reasoning_tokens": self.num_reasoning},
        }
