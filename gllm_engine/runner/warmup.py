"""Plans of tiny steps for a new runner, so that no request is the first to need a kernel.

Owns which kinds of step there are. The steps go the way of any other and leave nothing behind: at
the end no slot has an owner, and pages hold what nobody has been promised.
"""

from __future__ import annotations

from collections.abc import Iterator

from gllm_engine.sampling import SamplingParams
from gllm_engine.types import Chunk, NewPages, NewSequence, StepPlan

# Tokens of a chunk, and of the longest context.
_CHUNK = 2
_CONTEXT = 4


def tiny_plans(
    max_rows: int, max_tokens: int, max_context: int, page_size: int
) -> Iterator[StepPlan]:
    """Decode rows alone, chunks with and without a context, alone and beside decode rows; and of
    every size.

    None if a step of `max_tokens` or a sequence of `max_context` tokens has no room for that. All
    sequences share their pages, for what is computed means nothing; the first step writes what the
    others take for the context of a chunk.
    """
    if max_tokens <= _CHUNK or max_context < _CONTEXT:
        return

    def plan(
        num_decode: int, starts: list[int], length: int = _CHUNK, top_p: float = 1.0
    ) -> StepPlan:
        slots = range(num_decode + len(starts))
        pages = list(range(-(-max(length, _CONTEXT) // page_size)))
        sampling = SamplingParams(top_p=top_p)
        return StepPlan(
            0,
            new=[NewSequence(slot, 0, 0, sampling) for slot in slots],
            new_pages=[NewPages(slot, 0, pages) for slot in slots],
            decode_slots=list(range(num_decode)),
            chunks=[Chunk(num_decode + i, s, [0] * length, True) for i, s in enumerate(starts)],
        )

    yield plan(0, [0])
    yield plan(0, [_CHUNK])
    yield plan(0, [0], top_p=0.9)
    yield plan(1, [])
    yield plan(1, [], top_p=0.9)
    if max_rows > 1:
        yield plan(1, [_CHUNK])
        for num_decode in rows_to_try(min(max_rows - 1, max_tokens - _CHUNK)):
            yield plan(num_decode, [0])
        yield plan(max_rows, [])
    for num_tokens in tokens_to_try(max_tokens):
        length = min(num_tokens, max_context)
        yield plan(0, [0] * min(num_tokens // length, max_rows), length)
    unused = [NewSequence(slot, 0, 0, SamplingParams()) for slot in range(max_rows)]
    yield StepPlan(0, unused, [], [], [])


def tokens_to_try(most: int) -> list[int]:
    """Numbers of tokens up to `most` for which a product may be divided differently: every power of
    two, and the most.
    """
    return sorted({1 << i for i in range(3, most.bit_length())} | {most})


def rows_to_try(most: int) -> list[int]:
    """Numbers of rows up to `most` for which Triton may compile a kernel differently: one for each
    power of two that they are rounded up to, whether they are a multiple of 16 or not.
    """
    counts = set()
    power = 1
    while power < 2 * most:
        top = min(power, most)
        counts |= {n for n in (top, top - 1, top // 16 * 16) if n > power // 2}
        power *= 2
    return sorted(counts)
