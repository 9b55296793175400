"""Log probabilities in the forms that OpenAI's APIs share. Pure."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from gllm_client.protocol import Chunk, Output

LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have


def chat_logprob(
    id: int, entry: dict[str, dict[str, Any]], top: int, named: bool = False
) -> dict[str, Any]:
    """The object of a token, with the `top` likeliest tokens at its place.

    `entry`: {token id: {logprob, rank, decoded_token}}. `named`: tokens are told as token_id:ID.
    """
    ranked = sorted(entry.items(), key=lambda item: item[1]["rank"])
    chosen = _scored(str(id), entry[str(id)], named)
    return chosen | {"top_logprobs": [_scored(*item, named) for item in ranked[:top]]}


def _scored(id: str, about: dict[str, Any], named: bool) -> dict[str, Any]:
    token = f"token_id:{id}" if named else about["decoded_token"]
    text = about["decoded_token"].encode("utf-8", "replace")
    return {"token": token, "logprob": about["logprob"], "bytes": list(text)}


def finite(chunk: Chunk) -> Chunk:
    """The chunk with log probabilities that JSON can say, and token ids as its keys."""
    outputs = [_finite_output(output) for output in chunk.outputs]
    scored = chunk.prompt_logprobs and _finite(chunk.prompt_logprobs)
    return replace(chunk, outputs=tuple(outputs), prompt_logprobs=scored)


def _finite_output(output: Output) -> Output:
    cumulative = output.cumulative_logprob
    return replace(
        output,
        logprobs=output.logprobs and _finite(output.logprobs),
        cumulative_logprob=None if cumulative is None else max(cumulative, LEAST_LOGPROB),
    )


def _finite(entries: list[Any]) -> list[Any]:
    return [
        entry
        and {
            str(id): about | {"logprob": max(about["logprob"], LEAST_LOGPROB)}
            for id, about in entry.items()
        }
        for entry in entries
    ]
