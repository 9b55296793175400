"""The parts of an answer, in the order in which a model writes them.

One choice of a request is a sequence of events that ends with End. `formats` makes them from the
model's text; chat, responses and messages turn them into what their API sends. Both sides depend on
this module alone.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Text(msgspec.Struct, frozen=True):
    """The next part of the visible answer; never empty."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """The next part of the model's thoughts; never empty."""

    text: str


class CallBegin(msgspec.Struct, frozen=True):
    """A call of a function begins. `index`: 0 for the first call of the choice."""

    index: int
    id: str  # unique in the conversation: the model's own id, else one made by the parser
    name: str


class CallArguments(msgspec.Struct, frozen=True):
    """The next part of a call's arguments; all parts together are one JSON object."""

    index: int
    text: str


class Tokens(msgspec.Struct, frozen=True):
    """Tokens that the model has written, as Triton's outputs tell them.

    Comes before the events that these tokens complete; a token's text may come later.
    `logprobs`: one {token id: {logprob, rank, decoded_token}} for each token, if requested.
    `num_reasoning`: how many of these tokens belong to the thoughts.
    """

    ids: tuple[int, ...]
    logprobs: list[dict[str, Any]] | None = None
    num_reasoning: int = 0


class End(msgspec.Struct, frozen=True):
    """The choice has ended. `reason`: "stop" or "length", as Triton's finish_reason."""

    reason: str
    stop_reason: str | int | None = None  # the stop string or the stop token's id


Event = Text | Reasoning | CallBegin | CallArguments | Tokens | End
