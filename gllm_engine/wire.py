"""The messages on the engine's sockets, with front ends and with workers, and their bytes.

Every message is two frames: one byte that names its type, and msgpack of the struct. Nothing is
ever unpickled. Knows nothing of sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from gllm_engine.config import EngineConfig
from gllm_engine.types import ModelInfo, Outputs, Request, Stats, StepPlan, StepResult

PROTOCOL = 1  # changes with any message; both ends must agree


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """Front end -> engine, first."""

    protocol: int
    pid: int


class Submit(msgspec.Struct, frozen=True, array_like=True):
    """Front end -> engine."""

    requests: list[Request]


class Abort(msgspec.Struct, frozen=True, array_like=True):
    """Front end -> engine: these sequences are of no interest any more; no output is owed."""

    ids: list[int]


class Goodbye(msgspec.Struct, frozen=True, array_like=True):
    """Front end -> engine, last: all its sequences are dropped."""


class Welcome(msgspec.Struct, frozen=True, array_like=True):
    """Engine -> front end: the model is loaded."""

    info: ModelInfo


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """Engine -> front end or worker: it may not attach."""

    message: str


class Join(msgspec.Struct, frozen=True, array_like=True):
    """Worker -> engine, first: what it is."""

    protocol: int
    software: str  # versions of what must be the same on every rank
    model: str  # digest of the model's configuration
    node: int
    nnodes: int
    local_rank: int
    local_size: int


class Assigned(msgspec.Struct, frozen=True, array_like=True):
    """Engine -> worker, when all have come: what it is to be."""

    rank: int
    config: EngineConfig
    store: str  # where torch.distributed's ranks meet: a file, or HOST:PORT


class Ready(msgspec.Struct, frozen=True, array_like=True):
    """Worker -> engine: it has its share of the model."""

    num_pages: int


class Failed(msgspec.Struct, frozen=True, array_like=True):
    """Worker -> engine, last: it can go on no more."""

    rank: int
    message: str


class Ping(msgspec.Struct, frozen=True, array_like=True):
    """Engine -> worker: nothing; that it can be sent is what is wanted."""


_TYPES = (
    *(Hello, Submit, Abort, Goodbye, Welcome, Refusal, Outputs, Stats),
    *(Join, Assigned, Ready, Failed, Ping, StepPlan, StepResult),
)
_TAGS = {kind: bytes([i]) for i, kind in enumerate(_TYPES)}
_DECODERS = {bytes([i]): msgspec.msgpack.Decoder(kind) for i, kind in enumerate(_TYPES)}
_ENCODER = msgspec.msgpack.Encoder()


def encode(message: Any) -> list[bytes]:
    """The two frames of a message."""
    return [_TAGS[type(message)], _ENCODER.encode(message)]


def decode(frames: Sequence[bytes]) -> Any:
    """The message of two frames. Raises ValueError for anything else."""
    tag, body = frames
    try:
        return _DECODERS[tag].decode(body)
    except (KeyError, msgspec.DecodeError) as error:
        raise ValueError(f"not a message of this protocol: {error}") from None
