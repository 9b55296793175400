"""Chooses how many layers each pipeline stage gets.

Measures the time of every kind of run of layers (see Model.runs: mostly of one layer), and of
logits and sampling, in a decode step with made-up weights on this device. The cut gives all stages
of a busy pipeline about the same time per step.
Knows nothing of plans.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gllm_engine.arch import Layer, Model, Shard
from gllm_engine.config import EngineConfig
from gllm_engine.model import Decoder, fill_randomly
from gllm_engine.ops import PlainSampling
from gllm_engine.ops.batch import made_up_step
from gllm_engine.ops.timing import times
from gllm_engine.parallel import RankGroups, partition_layers
from gllm_engine.runner.kv_sizing import cache_dtype

# Sequences in the measured step, tokens in each context, and measured runs.
_ROWS = 256
_CONTEXT = 512
_REPEATS = 5

_log = logging.getLogger(__name__)


def measure_partition(
    config: EngineConfig, arch: Model, ranks: RankGroups, dtype: torch.dtype
) -> tuple[int, ...]:
    """The number of layers of each stage, the same on every rank. `dtype`: of the weights.

    Rank 0 measures; the other ranks wait for its result.
    """
    runs = arch.runs()
    kinds = list(dict.fromkeys(runs))
    costs = [0.0] * (len(kinds) + 1)
    if ranks.rank == 0:
        costs = _measure(config, arch, kinds, ranks, dtype)
        told = ", ".join(f"{1e6 * cost:.0f}" for cost in costs)
        _log.info("us of each kind of layers, and of logits and sampling: %s", told)
    *measured, tail = ranks.broadcast(costs)
    by_kind = dict(zip(kinds, measured, strict=True))
    costs = [by_kind[run] for run in runs]
    return partition_layers(costs, tail, ranks.mesh.pp, [len(run) for run in runs])


@torch.inference_mode()
def _measure(
    config: EngineConfig,
    arch: Model,
    kinds: list[tuple[Layer, ...]],
    ranks: RankGroups,
    dtype: torch.dtype,
) -> list[float]:
    """Seconds of one run of each kind, then of logits and sampling; uses no other rank."""
    rows = min(_ROWS, config.max_num_seqs)
    device = ranks.tensor.device
    costs = []
    tail = 0.0
    max_model_len = config.max_model_len or arch.max_len
    context = min(_CONTEXT, max_model_len)
    for kind in kinds:
        shard = Shard(0, len(kind), 0, ranks.mesh.tp, config.enable_expert_parallel)
        decoder = Decoder(
            replace(arch, layers=kind),
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            shard=shard,
        )
        fill_randomly(decoder)
        page_size = config.page_size
        kv_dtype = cache_dtype(config, decoder)
        num_pages = -(-context // page_size)
        cache = decoder.new_cache(num_pages, page_size, kv_dtype, decoder.new_states(1))
        decoder.compile_kernels(page_size, kv_dtype)
        # All rows read and write the same pages: the contents do not matter here.
        table = torch.arange(num_pages, device=device)[None]
        batch = made_up_step([(context, 1)] * rows, table, page_size)
        costs.append(min(times(partial(decoder.forward, batch, cache), device, _REPEATS)))
        hidden = decoder.forward(batch, cache)
        tail = _measure_tail(decoder, hidden)
    return [*costs, tail]


def _measure_tail(decoder: Decoder, hidden: Tensor) -> float:
    """Seconds of logits and plain sampling of all rows of `hidden` [rows, dim]."""
    slots = torch.arange(len(hidden), device=hidden.device)
    ones = torch.ones_like(slots)
    state = PlainSampling(ones.double(), ones, ones, ones, last_tokens=ones.clone())

    def tail() -> Tensor:
        return decoder.sample_plain(decoder.scores(hidden), slots, state)

    return min(times(tail, hidden.device, _REPEATS))
