"""From a plan and the runner's state to the tensors of one forward pass.

Owns the order of rows, tokens and logits in a step. Knows nothing of the model or of sampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gllm_engine.ops.batch import Batch
from gllm_engine.runner.state import State, to_device
from gllm_engine.types import Chunk, StepPlan


@dataclass(frozen=True)
class Step:
    """A batch and what its logits are for: the sampling rows', then those of prompt positions."""

    batch: Batch
    sampling_cpu: np.ndarray[Any, Any]  # slots, in the plan's order of rows
    sampling: Tensor  # the same on the device
    scored: list[Chunk]  # chunks with targets: one logit row for each target


def build_step(plan: StepPlan, state: State) -> Step:
    """Lay out one step and count its tokens into the slots' lengths.

    A plan has at least one row. Raises PlanError for a slot whose pages do not hold its tokens.
    """
    num_decode = len(plan.decode_slots)
    slots_cpu = np.array([*plan.decode_slots, *(chunk.slot for chunk in plan.chunks)], np.int64)
    query_lens = [1] * num_decode + [len(chunk.tokens) for chunk in plan.chunks]
    starts = np.array([chunk.start for chunk in plan.chunks], np.int64)
    state.lengths_cpu[slots_cpu[num_decode:]] = starts
    contexts_cpu = state.lengths_cpu[slots_cpu] + query_lens
    state.check_room(slots_cpu, contexts_cpu)
    state.lengths_cpu[slots_cpu] = contexts_cpu
    if plan.chunks:
        return _mixed(plan, state, slots_cpu, query_lens, starts)
    (slots,) = to_device(state.device, slots_cpu)
    positions = state.lengths[slots]
    batch = Batch(
        tokens=state.last_tokens[slots],
        positions=positions,
        cache_index=_cache_index(state, slots, positions),
        page_table=_page_table(state, slots_cpu, slots),
        context_lens=positions + 1,
        query_lens=query_lens,
        num_decode=num_decode,
        logit_index=torch.arange(num_decode, device=state.device),
    )
    state.lengths[slots] = batch.context_lens
    return Step(batch, slots_cpu, slots, [])


def _mixed(
    plan: StepPlan,
    state: State,
    slots_cpu: np.ndarray[Any, Any],
    query_lens: list[int],
    starts: np.ndarray[Any, Any],
) -> Step:
    num_decode, num_rows, num_tokens = len(plan.decode_slots), len(slots_cpu), sum(query_lens)
    lens_cpu = np.array(query_lens)
    known = np.concatenate([np.asarray(chunk.tokens, np.int64) for chunk in plan.chunks])
    ends = lens_cpu.cumsum()
    samples = np.array([True] * num_decode + [chunk.samples for chunk in plan.chunks])
    scored = [chunk for chunk in plan.chunks if chunk.targets]
    firsts = (ends - lens_cpu)[num_decode:]
    scored_at = [
        first + np.arange(len(chunk.targets))
        for first, chunk in zip(firsts, plan.chunks, strict=True)
    ]
    logit_at = np.concatenate([ends[samples] - 1, *scored_at])
    sampling_cpu = slots_cpu[samples]
    slots, lens, chunk_starts, known_ids, logit_index, sampling = to_device(
        state.device, slots_cpu, lens_cpu, starts, known, logit_at, sampling_cpu
    )
    state.lengths[slots[num_decode:]] = chunk_starts
    row_starts = state.lengths[slots]
    rows = torch.arange(num_rows, device=state.device)
    token_rows = rows.repeat_interleave(lens, output_size=num_tokens)
    # Token i of row r is at row_starts[r] + (i - tokens of the rows before r).
    shift = row_starts - (lens.cumsum(0) - lens)
    positions = torch.arange(num_tokens, device=state.device) + shift[token_rows]
    batch = Batch(
        tokens=torch.cat([state.last_tokens[slots[:num_decode]], known_ids]),
        positions=positions,
        cache_index=_cache_index(state, slots[token_rows], positions),
        page_table=_page_table(state, slots_cpu, slots),
        context_lens=row_starts + lens,
        query_lens=query_lens,
        num_decode=num_decode,
        logit_index=logit_index,
    )
    state.lengths[slots] = batch.context_lens
    return Step(batch, sampling_cpu, sampling, scored)


def _cache_index(state: State, token_slots: Tensor, positions: Tensor) -> Tensor:
    pages = state.page_table[token_slots, positions // state.page_size]
    return pages * state.page_size + positions % state.page_size


def _page_table(state: State, slots_cpu: np.ndarray[Any, Any], slots: Tensor) -> Tensor:
    """[rows, pages], as narrow as the longest context allows; lengths_cpu has counted the step."""
    num_pages = -(-int(state.lengths_cpu[slots_cpu].max()) // state.page_size)
    return state.page_table[:, :num_pages].index_select(0, slots)
