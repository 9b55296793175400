"""Every field that the SDKs' types have is honoured, accepted without effect, or refused by name.

A new field of an SDK fails here until it is decided.
"""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from fake_answers import MODEL
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from gllm_client.openai_server import chat, messages_request, responses_request
from gllm_client.openai_server.body import convert
from gllm_client.openai_server.chat import ChatRequest
from gllm_client.openai_server.completions import CompletionRequest
from gllm_client.openai_server.errors import ApiError
from gllm_client.openai_server.messages_request import MessagesRequest
from gllm_client.openai_server.responses_request import ResponsesRequest

USER = [{"role": "user", "content": "Hi"}]


def words(text: str) -> set[str]:
    return set(text.split())


SDK = {
    "chat": [
        chat_create_params.CompletionCreateParamsNonStreaming,
        chat_create_params.CompletionCreateParamsStreaming,
    ],
    "completions": [
        completion_create_params.CompletionCreateParamsNonStreaming,
        completion_create_params.CompletionCreateParamsStreaming,
    ],
    "responses": [
        response_create_params.ResponseCreateParamsNonStreaming,
        response_create_params.ResponseCreateParamsStreaming,
    ],
    "messages": [
        message_create_params.MessageCreateParamsNonStreaming,
        message_create_params.MessageCreateParamsStreaming,
        message_count_tokens_params.MessageCountTokensParams,
    ],
}
BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "chat": (ChatRequest, {"messages": USER}),
    "completions": (CompletionRequest, {"prompt": "Hi"}),
    "responses": (ResponsesRequest, {"input": "Hi"}),
    "messages": (MessagesRequest, {"model": "m", "messages": USER}),
}
# They have an effect; of modalities and best_of only the one value that is no other's.
HONOURED = {
    "chat": words(
        "frequency_penalty logit_bias logprobs max_completion_tokens max_tokens messages modalities"
        " model n parallel_tool_calls presence_penalty prompt_cache_key reasoning_effort"
        " response_format seed stop stream stream_options temperature tool_choice tools"
        " top_logprobs top_p"
    ),
    "completions": words(
        "best_of echo frequency_penalty logit_bias logprobs max_tokens model n presence_penalty"
        " prompt seed stop stream stream_options temperature top_p"
    ),
    "responses": words(
        "include input instructions max_output_tokens metadata model parallel_tool_calls"
        " previous_response_id prompt_cache_key reasoning store stream temperature text"
        " tool_choice tools top_logprobs top_p truncation"
    ),
    "messages": words(
        "max_tokens messages model output_config stop_sequences stream system temperature thinking"
        " tool_choice tools top_k top_p"
    ),
}
# They ask for nothing that an answer could show.
ACCEPTED = {
    "chat": words(
        "metadata prompt_cache_options prompt_cache_retention safety_identifier service_tier store"
        " user verbosity"
    ),
    "completions": {"user"},
    "responses": words(
        "max_tool_calls prompt_cache_options prompt_cache_retention safety_identifier service_tier"
        " stream_options user"
    ),
    "messages": words(
        "cache_control diagnostics inference_geo metadata service_tier speed user_profile_id"
        " workspace_id"
    ),
}
REFUSED = {
    "chat": words("audio function_call functions moderation prediction web_search_options"),
    "completions": {"suffix"},
    "responses": words(
        "access_programs background background_options context_management conversation image"
        " moderation prompt"
    ),
    "messages": {"container"},
}
OWN_TYPES = {"background": True}  # of refused fields, whose type is known here


@pytest.mark.parametrize("api", SDK)
def test_every_field_is_decided(api: str) -> None:
    fields = {name for params in SDK[api] for name in get_type_hints(params)}
    decided = [HONOURED[api], ACCEPTED[api], REFUSED[api]]
    assert set().union(*decided) >= fields, "these fields are new: decide them"
    assert sum(map(len, decided)) == len(set().union(*decided)), "a field is decided twice"
    known = set(BODIES[api][0].__struct_fields__)
    assert HONOURED[api] | ACCEPTED[api] <= known


@pytest.mark.parametrize(("api", "field"), [(api, field) for api in SDK for field in REFUSED[api]])
def test_a_refused_field_is_named(api: str, field: str) -> None:
    kind, body = BODIES[api]
    with pytest.raises(ApiError) as caught:
        asked = convert(body | {field: OWN_TYPES.get(field, {"x": 1})}, kind)
        if api == "responses":
            responses_request.to_conversation(asked, MODEL, [])
        else:
            messages_request.to_conversation(asked, MODEL)
    assert (caught.value.status, caught.value.param) == (400, field)


VALUES: dict[str, Any] = {"store": True, "max_tool_calls": 3, "service_tier": "auto"}


@pytest.mark.parametrize("api", ["chat", "responses", "messages"])
def test_an_accepted_field_changes_nothing(api: str) -> None:
    kind, body = BODIES[api]
    more = {"stream": True} | {field: VALUES.get(field, {"a": "b"}) for field in ACCEPTED[api]}
    mean = {
        "chat": lambda asked: chat.to_conversation(asked, MODEL),
        "responses": lambda asked: responses_request.to_conversation(asked, MODEL, []),
        "messages": lambda asked: messages_request.to_conversation(asked, MODEL),
    }[api]
    assert mean(convert(body | more, kind)) == mean(convert(body, kind))
