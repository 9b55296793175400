"""Chooses how many layers each pipeline stage gets.

Measures, with made-up weights on this device, the time of every kind of run of layers (see
Model.runs: mostly of one layer), and what the end of the model adds to the last run. The cut gives
all stages of a busy pipeline about the same time per step.

Half of the rows of the measured step need logits, because the steps of a busy pipeline have chunks
of prompts too. The end adds logits and sampling of that half; but the last layer leaves out most of
its work for the other half, so that the end may also take time away. All rows are decode rows: no
other step fits in a CUDA graph, and without one the host's launches would take longer than small
layers do.
Knows nothing of plans.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from gllm_engine.arch import Model, Shard
from gllm_engine.config import EngineConfig
from gllm_engine.model import Decoder, LayerCache, fill_randomly
from gllm_engine.ops import Batch, PlainSampling
from gllm_engine.ops.batch import made_up_step
from gllm_engine.ops.timing import times
from gllm_engine.parallel import RankGroups, partition_layers
from gllm_engine.runner.kv_sizing import cache_dtype

# Most rows with logits in the measured step, tokens in each context, and measured runs.
_ROWS = 256
_CONTEXT = 512
_REPEATS = 5
# Most bytes of the rows' caches, of which rows share one if there are too few: many times what a
# GPU's own caches hold, so that attention reads memory, as it does when serving.
_CACHE_BYTES = 1 << 30

_log = logging.getLogger(__name__)


def measure_partition(
    config: EngineConfig, arch: Model, ranks: RankGroups, dtype: torch.dtype
) -> tuple[int, ...]:
    """The number of layers of each stage, the same on every rank. `dtype`: of the weights.

    Rank 0 measures, without the other ranks, which wait for its result.
    """
    runs = arch.runs()
    costs = [0.0] * (len(runs) + 1)
    if ranks.rank == 0:
        costs = _measure(config, arch, ranks, dtype)
    *costs, tail = ranks.broadcast(costs)
    return partition_layers(costs, tail, ranks.mesh.pp, [len(run) for run in runs])


def _measure(
    config: EngineConfig, arch: Model, ranks: RankGroups, dtype: torch.dtype
) -> list[float]:
    """Seconds of each run, then those that the end of the model adds to the last one. They may be
    below 0, but their sum with the last run's is not.
    """
    runs = arch.runs()
    measured = {
        run: _seconds(config, replace(arch, layers=run, vision=None), ranks, dtype)
        for run in dict.fromkeys(runs)
    }
    torch.cuda.empty_cache()
    last, with_end = measured[runs[-1]]
    tail = with_end - last
    told = ", ".join(f"{1e6 * seconds:.0f}" for seconds, _ in measured.values())
    _log.info("us of each kind of layers: %s; the model's end adds %.0f", told, 1e6 * tail)
    return [*(measured[run][0] for run in runs), tail]


@torch.inference_mode()
def _seconds(
    config: EngineConfig, run: Model, ranks: RankGroups, dtype: torch.dtype
) -> tuple[float, float]:
    """Seconds of a model's layers, and of these and its end. The memory for it is free again."""
    device = ranks.tensor.device
    max_model_len = config.max_model_len or run.max_len
    shard = Shard(0, len(run.layers), 0, ranks.mesh.tp, config.enable_expert_parallel)
    decoder = Decoder(
        run,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        shard=shard,
        encodes=False,
    )
    fill_randomly(decoder)
    rows = min(_ROWS, config.max_num_seqs)
    page_size = config.page_size
    kv_dtype = cache_dtype(config, decoder)
    context = min(_CONTEXT, max_model_len)
    num_pages = -(-context // page_size)
    row_bytes = num_pages * decoder.page_bytes(page_size, kv_dtype) + decoder.state_bytes
    slots = max(1, min(2 * rows, _CACHE_BYTES // row_bytes))
    states = decoder.new_states(slots)
    cache = decoder.new_cache(slots * num_pages, page_size, kv_dtype, states)
    for part in chain.from_iterable(cache):
        part.zero_()  # NaN in old memory would spoil the choice of experts
    table = torch.arange(slots * num_pages, device=device).view(slots, -1)
    batch = made_up_step([(context, 1)] * 2 * rows, table, page_size)
    # Equal tokens would all choose the same experts.
    tokens = torch.arange(2 * rows, device=device) % shard.vocab_rows(run.vocab)
    batch = replace(batch, tokens=tokens)
    seconds = min(times(partial(decoder.forward, batch, cache), device, _REPEATS))
    return seconds, _seconds_with_end(decoder, batch, cache)


def _seconds_with_end(decoder: Decoder, batch: Batch, cache: list[LayerCache]) -> float:
    """Seconds of a step that samples a token, plainly, for the first half of its rows."""
    rows = torch.arange(len(batch.slots) // 2, device=decoder.device)
    batch = replace(batch, logit_index=rows, logit_rows=rows, logit_rows_cpu=np.arange(len(rows)))
    ones = torch.ones_like(rows)
    state = PlainSampling(ones.double(), ones, ones, ones, last_tokens=ones.clone())

    def step() -> Tensor:
        return decoder.sample_plain(decoder.scores(decoder.forward(batch, cache)), rows, state)

    return min(times(step, decoder.device, _REPEATS))
