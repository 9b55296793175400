"""Log probabilities of chat answers, in the form that OpenAI's APIs share. Pure."""

from __future__ import annotations

from typing import Any


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
