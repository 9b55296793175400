"""The messages that processes and packages exchange. Docstrings name the sender and receiver.

This module has no behaviour. Every message crosses a socket as msgpack, so it holds only numbers,
strings, bytes, tuples and the like. The module never imports torch.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from gllm_engine.sampling import SamplingParams

# The kind of an error; the backend maps it to a Triton status.
Status = Literal["invalid", "unavailable", "internal", "cancelled", "deadline"]
# "stop": end-of-sequence, stop token or stop string; "length": max_tokens or the model's length.
Reason = Literal["stop", "length", "abort", "error"]


class Message(msgspec.Struct, frozen=True, array_like=True):
    """A message, or a part of one: the values of its fields, in their order."""


class ModelInfo(msgspec.Struct, frozen=True):
    """Facts about the model for front ends; the engine fills it when it is ready."""

    vocab_size: int
    max_model_len: int  # tokens, prompt and output together
    num_pages: int
    page_size: int  # tokens
    eos_token_ids: tuple[int, ...]


# ---------------------------------------------------------------- front end <-> engine


class Image(Message, frozen=True):
    """A picture in a prompt, as the model's vision tower takes it. Filled by the front end.

    A video is one of these for each moment, which has as many frames as the tower's patches. The
    tower makes `rows` x `columns` embeddings of it. The one of row r and column c replaces that
    of the prompt's token first + r * stride + c; tokens between two rows are ordinary ones.
    """

    digest: bytes  # 16 bytes, of the pixels and of all that changes their embeddings
    first: int  # index in the prompt
    rows: int
    columns: int
    stride: int  # at least `columns`
    height: int  # pixels
    width: int
    pixels: bytes  # uint8 [frames, height, width, 3]; a picture has one frame
    # For a moment that follows the one before it in the prompt, with nothing between, and whose
    # rotary positions begin where those of the video's first moment do: by how much its position of
    # time is larger. None: its positions follow those of the token before it.
    time: int | None = None


class Request(Message, frozen=True):
    """Front end -> engine: one sequence to generate. A request with n > 1 becomes n of these."""

    id: int  # front end: unique among its live sequences
    prompt: list[int]  # at least one token id
    sampling: SamplingParams
    seed: int  # front end: resolved (never None), different for each of the n sequences
    bad_words: tuple[tuple[int, ...], ...] = ()  # front end: sampling.bad_words as token ids
    images: tuple[Image, ...] = ()  # in the order of the prompt; they do not overlap


class TokenLogprobs(Message, frozen=True):
    """Log probabilities at one position. Entry 0 is the actual token, then the top tokens."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]  # 1 is the most likely


class Finish(Message, frozen=True):
    """Why a sequence ended. `stop_token`: the id of the token that ended it, if a token did."""

    reason: Reason
    stop_token: int | None = None
    status: Status | None = None  # set when reason is "error" or "abort"
    message: str = ""  # set with status: one sentence for the user


class Outputs(Message, frozen=True):
    """Engine -> front end: the outputs of one step for the sequences of that front end.

    Sequence `ids[i]` got token `tokens[i]`; a step gives a sequence at most one token. A sequence
    in `finished` gets no further output. It may be in `finished` without a token (error, abort).
    """

    ids: list[int]
    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = {}  # by sequence id, when requested
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}  # positions from 1 on, when requested
    finished: dict[int, Finish] = {}
    # Prompt tokens served from the prefix cache, with a sequence's first token, unless they are 0.
    num_cached_tokens: dict[int, int] = {}
    # When a sequence left the queue, with its first token: seconds of the monotonic clock, which
    # the engine shares with its front ends.
    admitted_at: dict[int, float] = {}


class TenantStats(Message, frozen=True):
    """Part of Stats: gauges now, counters since the engine started, of one or more tenants."""

    running: int = 0
    waiting: int = 0
    prefill_tokens: int = 0  # computed in chunks, so without prefix hits
    decode_tokens: int = 0  # computed in decode rows


class Stats(Message, frozen=True):
    """Engine -> one front end: gauges now, counters since the engine started."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0  # share of pages in use by live sequences, 0..1
    prefix_queries: int = 0  # prompt tokens looked up
    prefix_hits: int = 0  # prompt tokens that were not computed
    prefix_stored: int = 0  # prompt tokens whose K and V were found, with or without a state
    # Prompts that began from a copied state, by the place of the copy; see sched/snapshots.py.
    prompt_snapshot_hits: int = 0
    branch_snapshot_hits: int = 0
    answer_snapshot_hits: int = 0
    preemptions: int = 0
    steps: int = 0
    waiting_tokens: int = 0  # prefill backlog of waiting sequences
    images_encoded: int = 0
    image_hits: int = 0  # images of sequences whose embeddings were there, or made for another
    images_waiting: int = 0  # which encoders have yet to encode
    encoders: int = 0  # that take images now
    stuck_encoders: int = 0  # that were killed and do not end
    # By name, for tenants that the configuration names; all others are one, named "other".
    tenants: dict[str, TenantStats] = {}


# ---------------------------------------------------------------- scheduler <-> runner


NO_SNAPSHOT = -1


class NewSequence(Message, frozen=True):
    """Scheduler -> runner: a slot gets a new owner (also after a preemption)."""

    slot: int
    seed: int
    prompt_len: int
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()  # empty unless min_tokens forbids these ids
    snapshot: int = NO_SNAPSHOT  # from which the slot's state starts; without one, from zeros
    # What rotary positions after the prompt add to positions, for a model with Rope.sections.
    rotary_offset: int = 0


class ImagePixels(Message, frozen=True):
    """Engine -> runner of the first stage: an image that the next plan encodes."""

    number: int  # of the image at the runner
    height: int
    width: int
    pixels: bytes  # uint8 [frames, height, width, 3]


class SharedGpuMemory(Message, frozen=True):
    """What another process opens memory of a GPU with: CUDA's handle of the allocation that it is
    part of, and where in it the memory begins.
    """

    device: int
    handle: bytes
    offset: int
    num_bytes: int


class LandingHandle(Message, frozen=True):
    """Rank -> encoder: memory of the rank into which encoders write embeddings; see Landing.

    It holds `tokens` tokens of `numbers` numbers each.
    """

    tokens: int
    numbers: int
    dtype: str
    itemsize: int  # bytes of a number
    memory: str | SharedGpuMemory  # str: path of a file in the host's memory


class ImageRun(Message, frozen=True):
    """Scheduler -> runner: `count` tokens of a chunk whose embeddings are those of an image."""

    image: int  # its number
    first: int  # index of the first one's embedding, in rows of the image
    offset: int  # of the first token in the chunk
    count: int


class LandedImage(Message, frozen=True):
    """Scheduler -> runner: an image that an encoder has written into the landing of the rank."""

    number: int  # of the image
    place: int  # in the landing, which nobody overwrites before the plan is done
    tokens: int


class Chunk(Message, frozen=True):
    """Scheduler -> runner: known tokens of one sequence to compute, from position `start` on.

    `samples`: the chunk ends at the last known token, so the next token is sampled after it.
    `targets`: the prompt tokens that follow the chunk's positions, if their log probabilities are
    requested; empty otherwise. The runner returns one entry for each target.
    """

    slot: int
    start: int
    tokens: list[int]
    samples: bool
    targets: list[int] = []
    # int32 [3, tokens], rotary positions of time, row and column, if the model has Rope.sections
    # and the sequence images; else empty: they are the positions.
    rotary_positions: bytes = b""
    images: list[ImageRun] = []


class NewPages(Message, frozen=True):
    """Scheduler -> runner: put `pages` into a slot's page table from index `first` on.

    `group`: the cache group whose table it is. Entries before the group's window are never read.
    """

    slot: int
    first: int
    pages: list[int]
    group: int = 0


class StepPlan(Message, frozen=True):
    """Scheduler -> runner: one step, as a change of the state that the runner keeps for each slot.

    The runner first copies the states of slots to `snapshots`. Then it applies `new` (which empties
    the slot's page tables, sets its length to 0 and its state to a snapshot), then `new_pages`. The
    rows of the batch are `decode_slots`, then `chunks`. A decode row computes the token that the
    runner sampled last for its slot, which the host may not know yet. The token's position is the
    slot's length. Each row then adds its token count to that length.
    """

    step: int
    new: list[NewSequence]
    new_pages: list[NewPages]
    decode_slots: list[int]
    chunks: list[Chunk]
    # Allowed next tokens by slot: one bit per token id, least significant bit first.
    masks: dict[int, bytes] = {}
    # (slot, snapshot): states of layers that keep one per sequence, at the slot's length.
    snapshots: list[tuple[int, int]] = []
    # Numbers of images: the first stage drops the embeddings of `forget`, then makes those of
    # `encode`, whose pixels it has, before its rows run. Both may name what a failed step has lost.
    forget: list[int] = []
    encode: list[int] = []
    # Which the first stage copies from its landing before its rows run. Such a plan may be without
    # rows.
    arrived: list[LandedImage] = []


class StepResult(Message, frozen=True):
    """Runner -> scheduler. `tokens`: one token per sampling row, in the plan's order of rows."""

    step: int
    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = {}  # by slot, when requested
    # By slot: one entry per entry of the chunk's `targets`.
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    seconds: float = 0.0  # duration of the step on its slowest stage; 0: not measured


# ---------------------------------------------------------------- timeline


class Span(Message, frozen=True, gc=False):
    """What one process did from `begin` to `end`, nanoseconds of its host's monotonic clock.

    `track`: the thread that did it, or "device". Spans of a track nest or follow each other.
    `work`: of a step on the device, the numbers of sched.cost.Work in their order; else empty.
    """

    track: Literal["host", "results", "device"]
    name: str
    step: int  # -1: of no step
    begin: int
    end: int
    work: tuple[int, ...] = ()


class RankSpans(Message, frozen=True):
    """Worker -> engine: the timeline of one rank.

    `wall_ns`: what the rank's host adds to its monotonic clock to tell the time of day.
    `complete_from`: spans that ended before this time may be missing.
    """

    rank: int
    wall_ns: int
    complete_from: int
    spans: list[Span]
