"""Where a pipeline is cut: what a layer, and the end of the model, cost on this device.

Measured on a decode step of made-up weights, so that the stages of a busy pipeline take the same
time. Knows nothing of plans.
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

# Sequences in the step that is measured, and the length of each.
_ROWS = 256
_CONTEXT = 512
_REPEATS = 5

_log = logging.getLogger(__name__)


def measure_partition(
    config: EngineConfig, arch: Model, ranks: RankGroups, dtype: torch.dtype
) -> tuple[int, ...]:
    """How many layers each stage is to have, on every rank the same. `dtype`: of the weights.

    Rank 0 measures; the others wait for it.
    """
    kinds = list(dict.fromkeys(arch.layers))
    costs = [0.0] * (len(kinds) + 1)
    if ranks.rank == 0:
        costs = _measure(config, arch, kinds, ranks, dtype)
        told = ", ".join(f"{1e6 * cost:.0f}" for cost in costs)
        _log.info("us of each kind of layer, and of logits and sampling: %s", told)
    *layers, tail = ranks.broadcast(costs)
    by_kind = dict(zip(kinds, layers, strict=True))
    return partition_layers([by_kind[layer] for layer in arch.layers], tail, ranks.mesh.pp)


@torch.inference_mode()
def _measure(
    config: EngineConfig, arch: Model, kinds: list[Layer], ranks: RankGroups, dtype: torch.dtype
) -> list[float]:
    """Seconds of one layer of each kind, and of logits and sampling; without other ranks."""
    rows = min(_ROWS, config.max_num_seqs)
    device = ranks.tensor.device
    costs = []
    tail = 0.0
    max_model_len = config.max_model_len or arch.max_len
    context = min(_CONTEXT, max_model_len)
    shard = Shard(0, 1, 0, ranks.mesh.tp, config.enable_expert_parallel)
    for kind in kinds:
        decoder = Decoder(
            replace(arch, layers=(kind,)),
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            shard=shard,
        )
        fill_randomly(decoder)
        page_size = config.page_size
        kv_dtype = cache_dtype(config, decoder)
        cache = decoder.new_cache(-(-context // page_size), page_size, kv_dtype)
        decoder.compile_kernels(page_size, kv_dtype)
        # All rows read, and write, the same pages: what they hold means nothing.
        table = torch.arange(len(cache[0]), device=device)[None]
        batch = made_up_step([(context, 1)] * rows, table, page_size)
        costs.append(min(times(partial(decoder.forward, batch, cache), device, _REPEATS)))
        hidden = decoder.forward(batch, cache)
        tail = _measure_tail(decoder, hidden)
    return [*costs, tail]


def _measure_tail(decoder: Decoder, hidden: Tensor) -> float:
    """Seconds of logits and plain sampling of every row."""
    slots = torch.arange(len(hidden), device=hidden.device)
    ones = torch.ones_like(slots)
    state = PlainSampling(ones.double(), ones, ones, ones, last_tokens=ones.clone())

    def tail() -> Tensor:
        return decoder.sample_plain(decoder.scores(hidden), slots, state)

    return min(times(tail, hidden.device, _REPEATS))
