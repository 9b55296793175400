"""The messages between the engine and its front ends and workers, and their encoding.

Every message is two frames: one byte that names its type, and the struct in msgpack. Pickle is
never used. The first message of a front end or worker gives its protocol, a digest of all messages.
The engine refuses a different protocol. This module knows nothing of sockets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import msgspec

from gllm_engine.config import EngineConfig
from gllm_engine.types import (
    ImagePixels,
    LandingHandle,
    Message,
    ModelInfo,
    Outputs,
    RankSpans,
    Request,
    Stats,
    StepPlan,
    StepResult,
)


class Hello(Message, frozen=True):
    """Front end -> engine, first message. A repeated Hello drops the front end's sequences."""

    protocol: str
    pid: int


class Submit(Message, frozen=True):
    """Front end -> engine: new requests, with each image's pixels once, however many have it."""

    requests: list[Request]  # whose images have no pixels
    pixels: dict[bytes, bytes]  # by the image's digest

    @classmethod
    def of(cls, requests: list[Request]) -> Submit:
        pixels = {image.digest: image.pixels for each in requests for image in each.images}
        return cls([_with_pixels(each, dict.fromkeys(pixels, b"")) for each in requests], pixels)

    @property
    def size(self) -> int:
        """Bytes of pixels."""
        return sum(map(len, self.pixels.values()))

    def whole(self) -> list[Request]:
        """The requests; those with equal images share the pixels."""
        return [_with_pixels(each, self.pixels) for each in self.requests]


def _with_pixels(request: Request, pixels: dict[bytes, bytes]) -> Request:
    if not request.images:
        return request
    images = [
        msgspec.structs.replace(image, pixels=pixels.get(image.digest, b""))
        for image in request.images
    ]
    return msgspec.structs.replace(request, images=tuple(images))


class Received(Message, frozen=True):
    """Engine -> front end: the engine has read a Submit with so many bytes of pixels."""

    pixels: int


class Abort(Message, frozen=True):
    """Front end -> engine: end these sequences without further output."""

    ids: list[int]


class Goodbye(Message, frozen=True):
    """Front end -> engine, last message: drop all sequences of the front end."""


class Welcome(Message, frozen=True):
    """Engine -> front end: the model is loaded."""

    info: ModelInfo


class Refusal(Message, frozen=True):
    """Engine -> front end or worker: it may not attach, or it has sent an invalid message.

    An attached front end gets no further output for its sequences.
    """

    message: str


class Join(Message, frozen=True):
    """Worker or encoder -> engine, first message: its software, its model and a worker's place."""

    protocol: str
    software: str  # versions that must be equal on all ranks
    model: str  # digest of the model's configuration
    node: int
    nnodes: int
    local_rank: int  # of an encoder: its number among those that the engine has started
    local_size: int
    role: str = "worker"  # or "encoder"


class Assigned(Message, frozen=True):
    """Engine -> worker, once all workers have joined: the worker's rank and configuration."""

    rank: int
    config: EngineConfig
    store: str  # torch.distributed's store: a file, or HOST:PORT


class Ready(Message, frozen=True):
    """Worker -> engine: the worker has loaded its shard of the model."""

    num_pages: int
    num_snapshots: int
    num_layers: int
    landings: list[LandingHandle] = []  # one, of a rank of the first stage without a tower


class StageTime(Message, frozen=True):
    """Worker -> engine: what a step took on a stage that sends no result."""

    stage: int
    step: int
    seconds: float


class LoadLayers(Message, frozen=True):
    """Engine -> worker: load the layers that come with this cut, and go on with steps.

    What an earlier message of this kind has loaded is freed, unless a MoveLayers has followed it.
    """

    cut: tuple[int, ...]  # layers of each stage; empty: load nothing


class LayersLoaded(Message, frozen=True):
    """Worker -> engine: the answer to LoadLayers."""

    rank: int
    problem: str  # empty: none


class MoveLayers(Message, frozen=True):
    """Engine -> worker: compute the layers that are loaded from the next step on."""


class PutImages(Message, frozen=True):
    """Engine -> worker of the first stage: the images that the next plan encodes."""

    images: list[ImagePixels]


class ImagesFetched(Message, frozen=True):
    """Worker of the first stage -> engine: it has what a plan without rows fetches."""

    step: int


class StepFailed(Message, frozen=True):
    """Worker -> engine: the worker computed nothing of this step, and can continue."""

    rank: int
    step: int
    message: str


class Failed(Message, frozen=True):
    """Worker or encoder -> engine, last message: it cannot continue."""

    rank: int
    message: str


class Ping(Message, frozen=True):
    """Engine -> worker: an empty message, which only tests the connection."""


class PutEmbeddings(Message, frozen=True):
    """Engine -> worker of the first stage: embeddings that an encoder of another machine made."""

    place: int  # in the worker's landing
    embeddings: bytes


class EncoderAssigned(Message, frozen=True):
    """Engine -> encoder, which has joined."""

    config: EngineConfig
    dtype: str
    landings: list[LandingHandle]  # which it writes; none: it sends the embeddings to the engine


class EncoderReady(Message, frozen=True):
    """Encoder -> engine: the vision tower is loaded."""


class Encode(Message, frozen=True):
    """Engine -> encoder: images to encode at once, and where in the landings each one belongs."""

    images: list[ImagePixels]
    places: list[int]


class Encoded(Message, frozen=True):
    """Encoder -> engine: an image is in its place."""

    number: int
    embeddings: bytes = b""  # if the encoder has no landings


class NotEncoded(Message, frozen=True):
    """Encoder -> engine: the tower fails on this image."""

    number: int
    message: str


class Leave(Message, frozen=True):
    """Encoder -> engine: it ends soon and takes no more images. Engine -> encoder, the answer once
    it has the last one's: nothing follows, end.
    """


class AskSpans(Message, frozen=True):
    """Engine -> worker: send the timeline, after all earlier plans have been launched."""


_TYPES: tuple[type[msgspec.Struct], ...] = (
    # These three keep their places in every version, so that two different versions understand
    # each other's first message and refusal.
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
    AskSpans,
    RankSpans,
    StageTime,
    LoadLayers,
    LayersLoaded,
    MoveLayers,
    PutImages,
    Received,
    PutEmbeddings,
    ImagesFetched,
    EncoderAssigned,
    EncoderReady,
    Encode,
    Encoded,
    NotEncoded,
    Leave,
)
_TAGS: dict[type[msgspec.Struct], bytes] = {kind: bytes([i]) for i, kind in enumerate(_TYPES)}
_KINDS: dict[bytes, type[msgspec.Struct]] = {tag: kind for kind, tag in _TAGS.items()}
_DECODERS: dict[type[msgspec.Struct], msgspec.msgpack.Decoder[msgspec.Struct]] = {
    kind: msgspec.msgpack.Decoder(kind) for kind in _TYPES
}
_ENCODER = msgspec.msgpack.Encoder()


def describe(kinds: Iterable[type[msgspec.Struct]]) -> str:
    """Describe everything that determines the encoding of these structs and of structs inside them.

    The description has one line per struct and per field.
    """
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
    """The structs that a type contains, such as A and B of `dict[int, A] | list[B]`."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return [hint]
    return [kind for part in get_args(hint) for kind in _structs_in(part)]


# Changes with any message type. Both ends of a connection must have the same one.
PROTOCOL = hashlib.sha256(describe(_TYPES).encode()).hexdigest()[:12]


class NotAMessage(ValueError):
    """The frames are no message of this protocol. `kind`: the message type, if the tag is valid."""

    def __init__(self, problem: str, kind: type | None = None) -> None:
        super().__init__(f"not a message of protocol {PROTOCOL}: {problem}")
        self.kind = kind


def encode(message: msgspec.Struct) -> list[bytes]:
    """Encode a message as two frames."""
    return [_TAGS[type(message)], _ENCODER.encode(message)]


def decode(frames: Sequence[bytes]) -> msgspec.Struct:
    """Decode the two frames of a message. Raises NotAMessage for anything else."""
    kind = _KINDS.get(frames[0]) if len(frames) == 2 else None
    if kind is None:
        raise NotAMessage(f"{len(frames)} frames, the first of which names no type")
    try:
        return _DECODERS[kind].decode(frames[1])
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise NotAMessage(str(error), kind) from None
