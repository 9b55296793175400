"""The messages on the engine's sockets, with front ends and with workers, and their bytes.

Every message is two frames: one byte that names its type, and msgpack of the struct. Nothing is
ever unpickled. Whoever says the first message names the protocol that it speaks, a digest of all
messages, and is refused by an engine with another one. Knows nothing of sockets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import msgspec

from gllm_engine.config import EngineConfig
from gllm_engine.types import ModelInfo, Outputs, Request, Stats, StepPlan, StepResult


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """Front end -> engine, first. Once more: what the front end has sent before is forgotten."""

    protocol: str
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
    """Engine -> front end or worker: it may not attach, or what it has sent makes no sense. To a
    front end that is attached: nothing more comes for its sequences.
    """

    message: str


class Join(msgspec.Struct, frozen=True, array_like=True):
    """Worker -> engine, first: what it is."""

    protocol: str
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


class StepFailed(msgspec.Struct, frozen=True, array_like=True):
    """Worker -> engine: it did nothing of this step, and can go on with the next."""

    rank: int
    step: int
    message: str


class Failed(msgspec.Struct, frozen=True, array_like=True):
    """Worker -> engine, last: it can go on no more."""

    rank: int
    message: str


class Ping(msgspec.Struct, frozen=True, array_like=True):
    """Engine -> worker: nothing; that it can be sent is what is wanted."""


_TYPES: tuple[type[msgspec.Struct], ...] = (
    # These three have the same places in every version: it is by them that two of different
    # versions find out that they are.
    Hello,
    Join,
    Refusal,
    Submit,
    Abort,
    Goodbye,
    Welcome,
    Outputs,
    Stats,
    Assigned,
    Ready,
    StepFailed,
    Failed,
    Ping,
    StepPlan,
    StepResult,
)
_TAGS: dict[type[msgspec.Struct], bytes] = {kind: bytes([i]) for i, kind in enumerate(_TYPES)}
_DECODERS: dict[bytes, msgspec.msgpack.Decoder[msgspec.Struct]] = {
    tag: msgspec.msgpack.Decoder(kind) for kind, tag in _TAGS.items()
}
_ENCODER = msgspec.msgpack.Encoder()


def describe(kinds: Iterable[type[msgspec.Struct]]) -> str:
    """All that the bytes of these structs depend on, and of those inside them: a line a field."""
    lines: list[str] = []
    left = list(kinds)
    described: set[type[msgspec.Struct]] = set()
    while left:
        kind = left.pop(0)
        if kind in described:
            continue
        described.add(kind)
        shape = kind.__struct_config__
        lines.append(f"{kind.__name__} {shape.array_like} {shape.omit_defaults} {shape.tag}")
        for field in msgspec.structs.fields(kind):
            default = (field.default, field.default_factory)
            lines.append(f"  {field.encode_name}: {field.type} = {default}")
            left += _structs_in(field.type)
    return "\n".join(lines)


def _structs_in(hint: Any) -> list[type[msgspec.Struct]]:
    """The structs that a type is made of, such as A and B of `dict[int, A] | list[B]`."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return [hint]
    return [kind for part in get_args(hint) for kind in _structs_in(part)]


# Changes with any message; both ends must agree.
PROTOCOL = hashlib.sha256(describe(_TYPES).encode()).hexdigest()[:12]


class NotAMessage(ValueError):
    """What came is no message of this protocol. `kind`: the type that it names, if it names one."""

    def __init__(self, problem: str, kind: type | None = None) -> None:
        super().__init__(f"not a message of protocol {PROTOCOL}: {problem}")
        self.kind = kind


def encode(message: msgspec.Struct) -> list[bytes]:
    """The two frames of a message."""
    return [_TAGS[type(message)], _ENCODER.encode(message)]


def decode(frames: Sequence[bytes]) -> msgspec.Struct:
    """The message of two frames. Raises NotAMessage for anything else."""
    decoder = _DECODERS.get(frames[0]) if len(frames) == 2 else None
    if decoder is None:
        raise NotAMessage(f"{len(frames)} frames, the first of which names no type")
    try:
        return decoder.decode(frames[1])
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise NotAMessage(str(error), decoder.type) from None
