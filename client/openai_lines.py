"""The lines of OpenAI's batch files: what a request means to Triton, and how its answer is written.

Owns the bodies of /v1/chat/completions and /v1/completions as far as a batch can answer them: every
field is honoured or refused by name. Pure; knows neither files nor the source of answers. A chat
answer is the model's whole text: thoughts and calls of functions stay in it as they are.
"""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

from gllm_client.openai_server.errors import ApiError, invalid
from gllm_client.openai_server.logprobs import chat_logprob
from gllm_client.protocol import Chunk, Output, shorten, shown
from gllm_engine import SamplingParams

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
KEYS = ("custom_id", "method", "url", "body")
LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have
MAX_TOP_LOGPROBS = 20

# Fields that hold sampling parameters, or arguments of the chat template, under their own names.
_SAMPLING = frozenset(SamplingParams.__struct_fields__) - {"logprobs"}
_TEMPLATE = {
    "add_generation_prompt": bool,
    "continue_final_message": bool,
    "documents": list,
    "reasoning_effort": str,
}
# Fields with a meaning of their own, by URL.
_OF_CHAT = {
    "messages",
    "tools",
    "tool_choice",
    "chat_template_kwargs",
    "logprobs",
    "top_logprobs",
    "max_completion_tokens",
}
_OWN = {CHAT: _OF_CHAT | _TEMPLATE.keys(), COMPLETIONS: {"prompt", "logprobs"}}
_BOTH = {"model", "response_format", "prompt_cache_key"}
# Fields that change no answer.
_LABELS = {"user", "metadata", "safety_identifier"}
# Fields that a batch does not support, and their values that ask for what a batch does anyway.
_ONLY: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "include_reasoning": (True,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "spaces_between_special_tokens": (True,),
}
# The server's names of fields that have another name here.
_RENAMED = {"text_input": "prompt", "input_ids": "prompt"}
_NAMED = _SAMPLING | _OWN[CHAT] | _OWN[COMPLETIONS] | _BOTH | _RENAMED.keys()


class BadLine(ValueError):
    """An input line that is not a valid request; the message says why."""


def is_openai(line: dict[str, Any]) -> bool:
    """Whether an input line has OpenAI's form, even if it is not valid."""
    return not line.keys().isdisjoint(KEYS)


def item_fields(line: dict[str, Any]) -> dict[str, Any]:
    """The fields of the Item of an input line, all but its id.

    Raises BadLine for a line that is no request, ApiError for a body that is refused.
    """
    if unknown := sorted(line.keys() - set(KEYS)):
        raise BadLine(f"{shorten(unknown[0])}: unknown key; known are {', '.join(KEYS)}")
    if line.get("method") != "POST":
        raise BadLine(f"method: {shown(line.get('method'))} is not POST")
    url = line.get("url")
    if url not in (CHAT, COMPLETIONS):
        raise BadLine(f"url: {shown(url)} is not supported; {CHAT} and {COMPLETIONS} are")
    if not isinstance(line.get("body"), dict):
        raise BadLine("body: a JSON object is needed")
    body = {key: value for key, value in line["body"].items() if value is not None}
    _check_names(url, body)
    sampling = {key: body[key] for key in body if key in _SAMPLING}
    if "prompt_cache_key" in body:
        sampling.setdefault("cache_salt", body["prompt_cache_key"])
    if form := _form(_typed(body, "response_format", dict)):
        if "structured_outputs" in sampling:
            raise invalid("structured_outputs", "it excludes response_format")
        sampling["structured_outputs"] = form
    fields = {"url": url, "model": _typed(body, "model", str), "sampling": sampling}
    return fields | (_chat(body, sampling) if url == CHAT else _completion(body, sampling))


def _check_names(url: str, body: dict[str, Any]) -> None:
    known = _SAMPLING | _OWN[url] | _BOTH | _LABELS
    for key, value in body.items():
        if key in known or value in _ONLY.get(key, ()):
            continue
        with_value = f" ({shown(value)})" if key in _ONLY else ""
        raise invalid(shorten(key), f"not supported in a line of a batch{with_value}")


def _typed(body: dict[str, Any], key: str, kind: type) -> Any:
    """A field of the body, None if it is missing. Raises ApiError for one of another type."""
    value = body.get(key)
    if value is None or type(value) is kind:
        return value
    kinds = {str: "a string", int: "a whole number", bool: "true or false", list: "a list"}
    raise invalid(key, f"{kinds.get(kind, 'an object')} is expected, got {shown(value)}")


def _chat(body: dict[str, Any], sampling: dict[str, Any]) -> dict[str, Any]:
    """The prompt and the template's arguments; fills `sampling`."""
    messages = _typed(body, "messages", list)
    if not messages:
        raise invalid("messages", "at least one message is needed")
    limit = _typed(body, "max_completion_tokens", int)
    if limit is not None:
        if limit < 1:
            raise invalid("max_completion_tokens", f"{shown(limit)} is not at least 1")
        sampling["max_tokens"] = limit
    top = _typed(body, "top_logprobs", int)
    if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
        raise invalid("top_logprobs", f"{shown(top)} is outside [0, {MAX_TOP_LOGPROBS}]")
    if _typed(body, "logprobs", bool):
        sampling["logprobs"] = top or 0
    elif top:
        raise invalid("top_logprobs", "it needs logprobs: true")
    # Like OpenAI's, a chat answer without a limit goes on to the end of the model's length.
    return {"prompt": messages, "template": _template(body), "defaults": {"max_tokens": None}}


def _template(body: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the chat template."""
    template: dict[str, Any] = {}
    choice = body.get("tool_choice", "auto")
    if choice not in ("none", "auto"):
        problem = f"{shown(choice)} is not supported in a line of a batch; none and auto are"
        raise invalid("tool_choice", problem)
    tools = _typed(body, "tools", list)
    if tools and choice == "auto":
        template["tools"] = tools
    variables = dict(_typed(body, "chat_template_kwargs", dict) or {})
    for key, kind in _TEMPLATE.items():
        if (value := _typed(body, key, kind)) is None:
            continue
        if variables.setdefault(key, value) != value:
            raise invalid(key, "chat_template_kwargs has another value")
    if variables:
        template["chat_template_kwargs"] = variables
    return template


def _completion(body: dict[str, Any], sampling: dict[str, Any]) -> dict[str, Any]:
    """The prompt; fills `sampling`."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and all(type(id) is int for id in prompt):
        prompt = tuple(prompt)
    if not prompt or not isinstance(prompt, str | tuple):
        problem = "a line of a batch has one prompt, a text or a list of token ids"
        raise invalid("prompt", problem)
    count = _typed(body, "logprobs", int)
    if count is not None:
        sampling["logprobs"] = count
    return {"prompt": prompt}


def _form(response_format: dict[str, Any] | None) -> dict[str, Any] | None:
    """The structured outputs that a response_format asks for, None for free text."""
    given = {"type": "text"} if response_format is None else response_format
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "structural_tag":
        return {"structural_tag": {key: given[key] for key in given if key != "type"}}
    if kind != "json_schema":
        known = "text, json_object, json_schema and structural_tag"
        raise invalid("response_format.type", f"{shown(kind)} is not one of {known}")
    schema = given.get("json_schema")
    if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
        raise invalid("response_format.json_schema.schema", "a JSON schema is needed")
    return {"json": schema["schema"]}


# ---------------------------------------------------------------- output lines, without custom_id


def no_request(message: str) -> dict[str, Any]:
    """The output line of an input line that is no request."""
    return _line(None, {"code": "invalid_line", "message": message})


def refusal(error: ApiError) -> dict[str, Any]:
    """The output line of a request that was refused or has failed."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    told = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return _response(error.status, {"error": told})


def failure(message: str) -> dict[str, Any]:
    """The output line of a request that has failed with an engine's or a server's sentence.

    The sentence of a refusal begins with the name of the field.
    """
    name, separator, problem = message.partition(": ")
    if not separator or name not in _NAMED:
        return refusal(ApiError(500, message))
    param = _RENAMED.get(name, name)
    return refusal(ApiError(404 if param == "model" else 400, f"{param}: {problem}", param))


def answered(url: str, model: str, sampling: dict[str, Any], answer: Chunk) -> dict[str, Any]:
    """The output line of an answer. `sampling`: the parameters that it was asked with."""
    is_chat = url == CHAT
    choices = []
    for index, output in enumerate(answer.outputs):
        choice: dict[str, Any] = {"index": index, "logprobs": None}
        if is_chat:
            choice["message"] = {"role": "assistant", "content": output.text, "refusal": None}
        else:
            choice["text"] = output.text
        if output.logprobs is not None:
            render = _chat_logprobs if is_chat else _completion_logprobs
            choice["logprobs"] = render(output, int(sampling.get("logprobs") or 0))
        choice["finish_reason"] = output.finish_reason
        choices.append(choice)
    num_prompt = answer.num_input_tokens or 0
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid4().hex}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": answer.num_output_tokens,
            "total_tokens": num_prompt + answer.num_output_tokens,
        },
    }
    if answer.prompt_logprobs is not None:
        for place in (body,) if is_chat else choices:
            place["prompt_logprobs"] = finite(answer.prompt_logprobs)
    return _response(200, body)


def finite(entries: list[Any]) -> list[Any]:
    """Replace minus infinity in the log probabilities of all positions; None stays None."""
    return [
        entry and {id: t | {"logprob": max(t["logprob"], LEAST_LOGPROB)} for id, t in entry.items()}
        for entry in entries
    ]


def _response(status: int, body: dict[str, Any]) -> dict[str, Any]:
    request_id = f"req_{uuid4().hex}"
    return _line({"status_code": status, "request_id": request_id, "body": body}, None)


def _line(response: dict[str, Any] | None, error: dict[str, Any] | None) -> dict[str, Any]:
    return {"id": f"batch_req_{uuid4().hex}", "response": response, "error": error}


def _tokens(output: Output) -> list[tuple[int, dict[str, dict[str, Any]]]]:
    """Each token and the entries at its place, by token id."""
    places = zip(output.token_ids, finite(output.logprobs or []), strict=True)
    return [(id, {str(key): value for key, value in entry.items()}) for id, entry in places]


def _chat_logprobs(output: Output, num_top: int) -> dict[str, Any]:
    content = [chat_logprob(id, entry, num_top) for id, entry in _tokens(output)]
    return {"content": content, "refusal": None}


def _completion_logprobs(output: Output, num_top: int) -> dict[str, Any]:
    """The `num_top` likeliest tokens of each position, and the chosen one."""
    told: dict[str, Any] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    offset = 0
    for id, entry in _tokens(output):
        own = entry[str(id)]
        ranked = sorted(entry.values(), key=lambda each: each["rank"])
        likeliest = {each["decoded_token"]: each["logprob"] for each in ranked[:num_top]}
        told["tokens"].append(own["decoded_token"])
        told["token_logprobs"].append(own["logprob"])
        told["top_logprobs"].append({own["decoded_token"]: own["logprob"]} | likeliest)
        told["text_offset"].append(offset)
        offset += len(own["decoded_token"])
    return told
