"""The messages that processes and packages exchange. Frozen; each field says who fills it.

Owns no behaviour. Everything here crosses a socket as msgpack, so it holds plain numbers, strings,
bytes and tuples; it never imports torch.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from gllm_engine.sampling import SamplingParams

# How an error is to be reported; the backend maps each to a Triton status.
Status = Literal["invalid", "unavailable", "internal", "cancelled", "deadline"]
# "stop": end-of-sequence, stop token or stop string; "length": max_tokens or the model's length.
Reason = Literal["stop", "length", "abort", "error"]


class ModelInfo(msgspec.Struct, frozen=True):
    """What a front end must know of the model; the engine fills it once it is ready."""

    vocab_size: int
    max_model_len: int  # tokens, prompt and output together
    num_pages: int
    page_size: int  # tokens
    eos_token_ids: tuple[int, ...]


# ---------------------------------------------------------------- front end <-> engine


class Request(msgspec.Struct, frozen=True, array_like=True):
    """Front end -> engine: one sequence to generate. A request with n > 1 becomes n of these."""

    id: int  # front end: unique among its live sequences
    prompt: list[int]  # token ids, at least one
    sampling: SamplingParams
    seed: int  # front end: resolved (never None), different for each of the n sequences
    bad_words: tuple[tuple[int, ...], ...] = ()  # front end: sampling.bad_words as token ids


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position. Entry 0 is the actual token, the rest the top ones."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]  # 1 is the most likely


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """Why a sequence ended. `stop_token`: the token id that ended it, when one did."""

    reason: Reason
    stop_token: int | None = None
    status: Status | None = None  # set when reason is "error" or "abort"
    message: str = ""  # set with status: one sentence for the user
    num_cached_tokens: int = 0  # prompt tokens served from the prefix cache


class Outputs(msgspec.Struct, frozen=True, array_like=True):
    """Engine -> front end: what one step made for the sequences of that front end.

    `ids[i]` got token `tokens[i]`; at most one token a sequence a step. A sequence in `finished`
    gets nothing more. A sequence may be in `finished` without a token (error, abort).
    """

    ids: list[int]
    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = {}  # by sequence id, when asked for
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}  # prompt positions 1.., when asked for
    finished: dict[int, Finish] = {}


class Stats(msgspec.Struct, frozen=True, array_like=True):
    """Engine -> one front end: gauges now, counters since the engine started."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0  # share of pages in use by live sequences, 0..1
    prefix_queries: int = 0  # prompt tokens looked up
    prefix_hits: int = 0  # prompt tokens found
    preemptions: int = 0
    steps: int = 0
    waiting_tokens: int = 0  # to be computed before those that wait can go on


# ---------------------------------------------------------------- scheduler <-> runner


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """Scheduler -> runner: a slot gets a new owner (also after a preemption)."""

    slot: int
    seed: int
    prompt_len: int
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()  # filled only when min_tokens forbids them, else empty


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Scheduler -> runner: known tokens of one sequence to compute, positions start.. onward.

    `samples`: the chunk ends at the last known token, so the next token is sampled after it.
    `wants_prompt_logprobs`: return log probabilities of the tokens after each position of the
    chunk that are still prompt (`targets`: the token after each position; empty if not wanted).
    """

    slot: int
    start: int
    tokens: list[int]
    samples: bool
    targets: list[int] = []


class NewPages(msgspec.Struct, frozen=True, array_like=True):
    """Scheduler -> runner: `pages` are appended to a slot's page table at index `first`."""

    slot: int
    first: int
    pages: list[int]


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """Scheduler -> runner: one step, as a diff against the state the runner keeps for each slot.

    Apply `new` first (it empties the slot's page table and sets its length to 0), then `new_pages`.
    Rows of the batch are `decode_slots`, then `chunks`. A decode row computes one token: the one
    the runner sampled last for that slot (which the host may not know yet), at position = the
    length the runner keeps. Each row then adds its token count to that length.
    """

    step: int
    new: list[NewSequence]
    new_pages: list[NewPages]
    decode_slots: list[int]
    chunks: list[Chunk]
    # Allowed next tokens by slot, one bit a token id, least significant bit first. Rare.
    masks: dict[int, bytes] = {}


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """Runner -> scheduler. `tokens`: one for each sampling row, in the plan's order of rows."""

    step: int
    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = {}  # by slot, for rows whose sampling asks
    # By slot: one entry for each entry of the chunk's `targets`.
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    seconds: float = 0.0  # that the step took on the stage which replies; 0: not measured
