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


@dataclass(frozen=True)
class Rows:
    """What the host knows of a step: whose rows it has and how long they are after it."""

    slots_cpu: np.ndarray[Any, Any]  # in the plan's order of rows
    query_lens: list[int]
    context_lens_cpu: list[int]


def count_rows(plan: StepPlan, state: State) -> Rows:
    """Count a step's tokens into the lengths that the host keeps of its slots.

    A plan has at least one row. Raises PlanError for a slot whose pages do not hold its tokens.
    """
    num_decode = len(plan.decode_slots)
    slots_cpu = np.array([*plan.decode_slots, *(chunk.slot for chunk in plan.chunks)], np.int64)
    query_lens = [1] * num_decode + [len(chunk.tokens) for chunk in plan.chunks]
    state.lengths_cpu[slots_cpu[num_decode:]] = [chunk.start for chunk in plan.chunks]
    contexts_cpu = state.lengths_cpu[slots_cpu] + query_lens
    state.check_room(slots_cpu, contexts_cpu)
    state.lengths_cpu[slots_cpu] = contexts_cpu
    return Rows(slots_cpu, query_lens, contexts_cpu.tolist())


def build_step(plan: StepPlan, state: State, rows: Rows) -> Step:
    """Lay out one step whose rows have been counted."""
    if plan.chunks:
        return _mixed(plan, state, rows)
    (slots,) = to_device(state.device, rows.slots_cpu)
    batch = decode_batch(state, slots, rows.context_lens_cpu)
    return Step(batch, rows.slots_cpu, slots, [])


def decode_batch(state: State, slots: Tensor, context_lens_cpu: list[int]) -> Batch:
    """One token for each of `slots`, counted into their lengths. Needs nothing from the host but
    `context_lens_cpu`, which only goes into the batch, so a graph of this fits any step.
    """
    positions = state.lengths[slots]
    context_lens = positions + 1
    state.lengths[slots] = context_lens
    return Batch(
        tokens=state.last_tokens[slots],
        positions=positions,
        cache_index=_cache_index(state, slots, positions),
        page_table=state.page_table,
        slots=slots,
        context_lens=context_lens,
        context_lens_cpu=context_lens_cpu,
        query_lens=[1] * len(slots),
        num_decode=len(slots),
        logit_index=None,
    )


def _mixed(plan: StepPlan, state: State, rows: Rows) -> Step:
    slots_cpu, query_lens = rows.slots_cpu, rows.query_lens
    num_decode, num_rows, num_tokens = len(plan.decode_slots), len(slots_cpu), sum(query_lens)
    lens_cpu = np.array(query_lens)
    starts = np.array([chunk.start for chunk in plan.chunks], np.int64)
    known = np.concatenate([np.asarray(chunk.tokens, np.int64) for chunk in plan.chunks])
    ends = lens_cpu.cumsum()
    sampling_rows = np.flatnonzero([True] * num_decode + [chunk.samples for chunk in plan.chunks])
    scored = [chunk for chunk in plan.chunks if chunk.targets]
    firsts = (ends - lens_cpu)[num_decode:]
    scored_at = [
        first + np.arange(len(chunk.targets))
        for first, chunk in zip(firsts, plan.chunks, strict=True)
    ]
    logit_at = np.concatenate([ends[sampling_rows] - 1, *scored_at])
    sampling_cpu = slots_cpu[sampling_rows]
    slots, lens, chunk_starts, known_ids, logit_index, sampling, logit_rows = to_device(
        *(state.device, slots_cpu, lens_cpu, starts, known, logit_at, sampling_cpu, sampling_rows)
    )
    state.lengths[slots[num_decode:]] = chunk_starts
    row_starts = state.lengths[slots]
    row_ids = torch.arange(num_rows, device=state.device)
    token_rows = row_ids.repeat_interleave(lens, output_size=num_tokens)
    # Token i of row r is at row_starts[r] + (i - tokens of the rows before r).
    shift = row_starts - (lens.cumsum(0) - lens)
    positions = torch.arange(num_tokens, device=state.device) + shift[token_rows]
    batch = Batch(
        tokens=torch.cat([state.last_tokens[slots[:num_decode]], known_ids]),
        positions=positions,
        cache_index=_cache_index(state, slots[token_rows], positions),
        page_table=state.page_table,
        slots=slots,
        context_lens=row_starts + lens,
        context_lens_cpu=rows.context_lens_cpu,
        query_lens=query_lens,
        num_decode=num_decode,
        logit_index=logit_index,
        logit_rows=None if scored else logit_rows,
        logit_rows_cpu=sampling_rows.tolist(),
    )
    state.lengths[slots] = batch.context_lens
    return Step(batch, sampling_cpu, sampling, scored)


def _cache_index(state: State, token_slots: Tensor, positions: Tensor) -> Tensor:
    pages = state.page_table[token_slots, positions // state.page_size]
    return pages * state.page_size + positions % state.page_size
