"""Where a pipeline is cut: what a layer, and the end of the model, cost on this device.

Measured on a decode step of made-up weights, so that the stages of a busy pipeline take the same
time. Knows nothing of plans.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from gllm_engine.arch import Layer, Model, Shard
from gllm_engine.config import EngineConfig
from gllm_engine.model import make_dummy
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
    config: EngineConfig, arch: Model, ranks: RankGroups, **options: Any
) -> tuple[int, ...]:
    """How many layers each stage is to have, on every rank the same. `options`: as Decoder's.

    Rank 0 measures; the others wait for it.
    """
    kinds = list(dict.fromkeys(arch.layers))
    costs = [0.0] * (len(kinds) + 1)
    if ranks.rank == 0:
        shard = Shard(0, 1, 0, ranks.mesh.tp, config.enable_expert_parallel)
        costs = _measure(config, arch, kinds, options | {"shard": shard})
        told = ", ".join(f"{1e6 * cost:.0f}" for cost in costs)
        _log.info("us of each kind of layer, and of logits and sampling: %s", told)
    *layers, tail = ranks.from_first(costs)
    by_kind = dict(zip(kinds, layers, strict=True))
    return partition_layers([by_kind[layer] for layer in arch.layers], tail, ranks.mesh.pp)


@torch.inference_mode()
def _measure(
    config: EngineConfig, arch: Model, kinds: list[Layer], options: dict[str, Any]
) -> list[float]:
    """Seconds of one layer of each kind, and of logits and sampling; without other ranks."""
    rows = min(_ROWS, config.max_num_seqs)
    device, costs, tail = options["device"], [], 0.0
    context = min(_CONTEXT, options["max_model_len"])
    for kind in kinds:
        decoder = make_dummy(replace(arch, layers=(kind,)), **options)
        page_size, dtype = config.page_size, cache_dtype(config, decoder)
        cache = decoder.new_cache(-(-context // page_size), page_size, dtype)
        if device.type == "cuda":
            decoder.prepare(page_size, dtype)
        # All rows read, and write, the same pages: what they hold means nothing.
        table = torch.arange(len(cache[0]), device=device)[None]
        batch = made_up_step([(context, 1)] * rows, table, page_size)
        costs.append(min(times(lambda: decoder.forward(batch, cache), device, _REPEATS)))  # noqa: B023
        hidden = decoder.forward(batch, cache)
        state = [torch.ones(rows, dtype=torch.int64, device=device) for _ in range(5)]
        slots, state[0] = torch.arange(rows, device=device), state[0].double()
        sampling = times(
            lambda: decoder.sample_plain(decoder.scores(hidden), slots, *state),  # noqa: B023
            *(device, _REPEATS),
        )
        tail = min(sampling)
    return [*costs, tail]
