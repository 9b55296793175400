"""Plans of tiny steps for a new runner, so that no request has to wait while a kernel compiles.

Owns the list of the kinds of step. A runner executes these plans like any others. Afterwards all
slots are empty, and no later step reads what the pages hold.
"""

from __future__ import annotations

from collections.abc import Iterator

from gllm_engine.sampling import SamplingParams
from gllm_engine.types import Chunk, NewPages, NewSequence, StepPlan

# Tokens of a prefill chunk, and of the longest context.
_CHUNK = 2
_CONTEXT = 4


def tiny_plans(
    max_rows: int, max_tokens: int, max_context: int, page_size: int, num_groups: int = 1
) -> Iterator[StepPlan]:
    """Plans of decode rows alone, of prefill chunks with and without a context, and of both; then
    plans of all row counts and token counts for which kernels may differ.

    Yields nothing if a step of `max_tokens` or a sequence of `max_context` tokens is too short for
    them. All sequences and groups share the same pages, because the results do not matter. The
    first step writes the context that the later chunks read.
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
            new_pages=[NewPages(s, 0, pages, group) for s in slots for group in range(num_groups)],
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
    """Token counts up to `most` for which a product may be tiled differently: the powers of two
    from 8 on, and `most`.
    """
    return sorted({1 << i for i in range(3, most.bit_length())} | {most})


def rows_to_try(most: int) -> list[int]:
    """Row counts up to `most` for which Triton may compile different kernels: for each power of two
    that counts are rounded up to, a multiple of 16 and a count that is none.
    """
    counts = set()
    power = 1
    while power < 2 * most:
        top = min(power, most)
        counts |= {n for n in (top, top - 1, top // 16 * 16) if n > power // 2}
        power *= 2
    return sorted(counts)
