"""The small routes: health, models, metrics, version, tokens, and what is refused by name."""

from __future__ import annotations

import asyncio
import os
import urllib.request
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from gllm_client.openai_server.body import convert
from gllm_client.openai_server.chat import ChatRequest, to_conversation
from gllm_client.openai_server.errors import ApiError
from gllm_client.openai_server.generation import render
from gllm_client.openai_server.models import ServedModel
from gllm_client.openai_server.routing import (
    JsonResponse,
    find_model,
    read_body,
    request_id,
)

router = APIRouter()

METRICS_TIMEOUT_S = 5.0
MALFORMED_CALLS = "gllm:malformed_tool_calls_total"
_ABOUT_MALFORMED = "Texts of answers that looked like calls of tools and are none."

_REFUSED = {
    "/v1/embeddings": "embeddings are not available: the models here generate text",
    "/v1/load_lora_adapter": "LoRA adapters are not supported",
    "/v1/unload_lora_adapter": "LoRA adapters are not supported",
    "/v1/chat/completions/batch": "batches are not served here; gllm batch answers files",
    "/v1/batches": "batches are not served here; gllm batch answers files",
    "/v1/files": "files are not stored here",
    "/v1/audio/speech": "audio is not supported",
    "/v1/audio/transcriptions": "audio is not supported",
    "/v1/audio/translations": "audio is not supported",
    "/v1/images/generations": "images are not supported",
    "/v1/moderations": "moderation is not supported",
    "/v1/score": "scores are not available: the models here generate text",
    "/v1/rerank": "ranking is not available: the models here generate text",
    "/pooling": "pooling is not available: the models here generate text",
    "/classify": "classification is not available: the models here generate text",
}


async def _refuse(request: Request) -> Response:
    path = request.url.path
    raise ApiError(501, f"{path}: {_REFUSED[path]}", code="not_implemented")


for _path in _REFUSED:
    router.add_api_route(_path, _refuse, methods=["POST"])


@router.get("/health")
async def health(request: Request) -> Response:
    """200 if a model answers now and this server is not about to stop, else 503."""
    if not await request.app.state.models.is_healthy():
        raise ApiError(503, "no model answers")
    return Response()


@router.get("/version")
async def show_version(request: Request) -> Response:
    """The version of this server."""
    return JsonResponse({"version": version("gllm-triton")})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """tritonserver's metrics page, with --metrics-url, and this server's own metrics."""
    url = request.app.state.options.metrics_url
    try:
        page = b"" if url is None else await asyncio.to_thread(_fetch, url)
    except OSError as error:
        raise ApiError(503, f"metrics: {url} cannot be read ({error})") from None
    own = _own_metrics(request.app.state.models.known.values())
    return Response(page + own.encode(), media_type="text/plain; version=0.0.4")


def _own_metrics(models: Iterable[ServedModel]) -> str:
    """What this server counts itself, in Prometheus' text format."""
    lines = [f"# HELP {MALFORMED_CALLS} {_ABOUT_MALFORMED}", f"# TYPE {MALFORMED_CALLS} counter"]
    for model in models:
        model.count_malformed(0)  # shown from the start
        name = model.name.replace("\\", "\\\\").replace('"', '\\"')
        for format, number in model.malformed_calls.items():
            labels = f'model="{name}",format="{format}",process="{os.getpid()}"'
            lines.append(f"{MALFORMED_CALLS}{{{labels}}} {number}")
    return "\n".join([*lines, ""])


def _fetch(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=METRICS_TIMEOUT_S) as answer:
        page: bytes = answer.read()
    return page


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """All models."""
    models = await request.app.state.models.all()
    return JsonResponse({"object": "list", "data": [_shown(model) for model in models]})


@router.get("/v1/models/{name:path}")
async def show_model(request: Request, name: str) -> Response:
    """One model."""
    return JsonResponse(_shown(await find_model(request, name)))


def _shown(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "gllm-triton",
        "root": model.name,
        "max_model_len": model.max_model_len,
        "input_modalities": model.facts.get("input_modalities", ["text"]),
    }


class TextToTokenize(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of /tokenize with `prompt`; with `messages` it is a chat request."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True


class TokensToDetokenize(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of /detokenize."""

    tokens: list[int]
    model: str | None = None


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """The tokens of a text, or of a conversation as the model would read it."""
    body: dict[str, Any] = await read_body(request, dict)
    strings = convert(body.pop("return_token_strs", False), bool, "return_token_strs")
    if "messages" in body:
        chat = convert(body, ChatRequest)
        model = await find_model(request, chat.model)
        conversation = to_conversation(chat, model)
        ids, _, _ = await render(model, conversation, request_id(request), with_media=True)
    else:
        asked = convert(body, TextToTokenize)
        model = await find_model(request, asked.model)
        special = asked.add_special_tokens
        ids, _ = await model.tokenize(
            request_id(request), prompt=asked.prompt, add_special_tokens=special
        )
    answer = {"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids}
    if strings:
        texts = await model.detokenize(ids, request_id(request), operation="token_texts")
        answer["token_strs"] = msgspec.json.decode(texts)
    return JsonResponse(answer)


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """The text of tokens, special ones included."""
    asked = await read_body(request, TokensToDetokenize)
    model = await find_model(request, asked.model)
    return JsonResponse({"prompt": await model.detokenize(asked.tokens, request_id(request))})
