"""Builds the tensors of one forward pass from a plan and the slot table.

Owns the order of rows, tokens and logits in a step. Knows nothing of the model or of sampling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gllm_engine.ops import Batch, HostInts, Ops
from gllm_engine.runner.host_arrays import int_array, to_device
from gllm_engine.runner.slot_table import SlotTable, StepRows
from gllm_engine.types import Chunk, StepPlan


@dataclass(frozen=True)
class StepInputs:
    """A batch and the use of its logits: first the sampling rows, then scored prompt positions."""

    batch: Batch
    sampling_cpu: HostInts  # slots of the sampling rows, in the plan's order of rows
    sampling: Tensor  # the same slots on the device
    scored: list[Chunk]  # chunks with targets; every target has one logit row


def build_step(plan: StepPlan, table: SlotTable, rows: StepRows, ops: Ops) -> StepInputs:
    """Build the inputs of a step. `rows`: what SlotTable.begin returned for `plan`."""
    if plan.chunks:
        return _mixed(plan, table, rows, ops)
    (slots,) = to_device(table.device, rows.slots_cpu)
    batch = decode_batch(table, slots, rows.context_lens_cpu, ops)
    return StepInputs(batch, rows.slots_cpu, slots, [])


def decode_batch(table: SlotTable, slots: Tensor, context_lens_cpu: HostInts, ops: Ops) -> Batch:
    """The batch of one decode row for each of `slots`, whose lengths grow by 1.

    `context_lens_cpu` is the only input from the host, and only the batch holds it. So a CUDA graph
    of this function fits every decode step.
    """
    none = slots[:0]
    return _batch(table, ops, slots, (none, none, none), context_lens_cpu, [])


def _mixed(plan: StepPlan, table: SlotTable, rows: StepRows, ops: Ops) -> StepInputs:
    num_decode = len(plan.decode_slots)
    chunks = plan.chunks
    slots_cpu = rows.slots_cpu
    lens = [len(chunk.tokens) for chunk in chunks]
    ends = np.cumsum(lens, dtype=np.int64)
    starts = np.array([chunk.start for chunk in chunks], np.int64)
    known = int_array(*(chunk.tokens for chunk in chunks))
    samples = np.ones(len(slots_cpu), bool)
    samples[num_decode:] = [chunk.samples for chunk in chunks]
    sampling_rows = samples.nonzero()[0]
    lasts = np.arange(len(slots_cpu))  # [rows] index of each row's last token
    lasts[num_decode:] = num_decode - 1 + ends
    scored = [chunk for chunk in chunks if chunk.targets]
    scored_at = [
        num_decode + end - len(chunk.tokens) + np.arange(len(chunk.targets))
        for end, chunk in zip(ends, chunks, strict=True)
        if chunk.targets
    ]
    sampling_cpu = slots_cpu[sampling_rows]
    # `slots` comes first: the packed array starts aligned, and kernels are compiled for that.
    slots, sampling, starts_there, ends_there, known_there, logit_rows, logit_index = to_device(
        table.device,
        slots_cpu,
        sampling_cpu,
        starts,
        ends,
        known,
        sampling_rows,
        np.concatenate([lasts[sampling_rows], *scored_at]),
    )
    chunked = (starts_there, ends_there, known_there)
    batch = _batch(table, ops, slots, chunked, rows.context_lens_cpu, chunks)
    batch = replace(
        batch,
        logit_index=logit_index,
        logit_rows=None if scored else logit_rows,
        logit_rows_cpu=None if scored else sampling_rows,
    )
    return StepInputs(batch, sampling_cpu, sampling, scored)


def _rotary_positions(
    table: SlotTable, positions: Tensor, slots: Tensor, chunks: list[Chunk]
) -> Tensor | None:
    """Batch.rotary_positions of a step: of its decode rows, then of its chunks."""
    if table.rotary_offsets is None:
        return None
    num_decode = len(slots) - len(chunks)
    decoded, rest = positions.tensor_split([num_decode])
    decoded = decoded + table.rotary_offsets[slots[:num_decode]]
    if not any(chunk.rotary_positions for chunk in chunks):
        return torch.cat([decoded, rest]) if chunks else decoded
    parts = [
        np.frombuffer(chunk.rotary_positions, np.int32).reshape(3, -1)
        if chunk.rotary_positions
        else np.tile(np.arange(len(chunk.tokens), dtype=np.int32) + chunk.start, (3, 1))
        for chunk in chunks
    ]
    (there,) = to_device(table.device, np.concatenate(parts, 1).reshape(-1))
    return torch.cat([decoded.expand(3, -1), there.view(3, -1)], 1)


def _batch(
    table: SlotTable,
    ops: Ops,
    slots: Tensor,
    chunked: tuple[Tensor, Tensor, Tensor],
    context_lens_cpu: HostInts,
    chunks: list[Chunk],
) -> Batch:
    """The batch of `slots`: decode rows, then `chunks`; all its tokens need logits.

    `chunked`: starts, ends and tokens of the chunks, as in Ops.prepare_inputs. Records the step's
    tokens in table.cached_tokens.
    """
    chunk_lens = [len(chunk.tokens) for chunk in chunks]
    num_decode = len(slots) - len(chunks)
    tokens, positions, cache_index, context_lens = ops.prepare_inputs(
        table.page_table,
        table.page_size,
        table.lengths,
        table.last_tokens,
        slots,
        *chunked,
        max(chunk_lens, default=0),
    )
    table.cached_tokens.index_copy_(0, cache_index[table.whole], tokens)
    return Batch(
        tokens=tokens,
        positions=positions,
        cache_index=cache_index,
        page_table=table.page_table,
        slots=slots,
        context_lens=context_lens,
        context_lens_cpu=context_lens_cpu,
        query_lens=[1] * num_decode + chunk_lens,
        num_decode=num_decode,
        logit_index=None,
        rotary_positions=_rotary_positions(table, positions, slots, chunks),
    )
