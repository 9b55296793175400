"""Where a pipeline is cut: what a layer, and the end of the model, cost on this device.

Measured on a decode step of made-up weights, so that the stages of a busy pipeline take the same
time. Knows nothing of plans.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gllm_engine.config import EngineConfig
from gllm_engine.dist import Ranks, cut_layers
from gllm_engine.model import make_dummy
from gllm_engine.ops.batch import Batch
from gllm_engine.runner.memory import cache_dtype
from gllm_engine.spec import Layer, Model, Share

# Sequences in the step that is measured, and the length of each.
_ROWS = 256
_CONTEXT = 512
_REPEATS = 5

_log = logging.getLogger(__name__)


def measure_cut(config: EngineConfig, spec: Model, ranks: Ranks, **options: Any) -> tuple[int, ...]:
    """How many layers each stage is to have, on every rank the same. `options`: as Decoder's.

    Rank 0 measures; the others wait for it.
    """
    kinds = list(dict.fromkeys(spec.layers))
    costs = [0.0] * (len(kinds) + 1)
    if ranks.rank == 0:
        share = Share(0, 1, 0, ranks.mesh.tp, config.enable_expert_parallel)
        costs = _measure(config, spec, kinds, options | {"share": share})
        told = ", ".join(f"{1e6 * cost:.0f}" for cost in costs)
        _log.info("us of each kind of layer, and of logits and sampling: %s", told)
    *layers, tail = ranks.from_first(costs)
    by_kind = dict(zip(kinds, layers, strict=True))
    return cut_layers([by_kind[layer] for layer in spec.layers], tail, ranks.mesh.pp)


@torch.inference_mode()
def _measure(
    config: EngineConfig, spec: Model, kinds: list[Layer], options: dict[str, Any]
) -> list[float]:
    """Seconds of one layer of each kind, and of logits and sampling; without other ranks."""
    rows = min(_ROWS, config.max_num_seqs)
    device, costs, tail = options["device"], [], 0.0
    context = min(_CONTEXT, options["max_model_len"])
    for kind in kinds:
        decoder = make_dummy(replace(spec, layers=(kind,)), **options)
        cache = decoder.new_cache(
            -(-context // config.page_size), config.page_size, cache_dtype(config, decoder)
        )
        if device.type == "cuda":
            decoder.prepare(config.page_size, cache_dtype(config, decoder))
        batch = _decode_rows(rows, context, cache[0].shape[0], device)
        costs.append(_seconds(lambda: decoder.forward(batch, cache), device))  # noqa: B023
        hidden = decoder.forward(batch, cache)
        state = [torch.ones(rows, dtype=torch.int64, device=device) for _ in range(5)]
        slots, state[0] = torch.arange(rows, device=device), state[0].double()
        tail = _seconds(lambda: decoder.sample(decoder.scores(hidden), slots, *state), device)  # noqa: B023
    return [*costs, tail]


def _decode_rows(rows: int, context: int, num_pages: int, device: torch.device) -> Batch:
    """All rows read, and write, the same pages: what they hold means nothing."""
    ones = torch.ones(rows, dtype=torch.int64, device=device)
    return Batch(
        tokens=ones,
        positions=ones * (context - 1),
        cache_index=ones * (context - 1),
        page_table=torch.arange(num_pages, device=device)[None],
        slots=ones * 0,
        context_lens=ones * context,
        context_lens_cpu=np.full(rows, context),
        query_lens=[1] * rows,
        num_decode=rows,
        logit_index=None,
    )


def _seconds(body: Callable[[], object], device: torch.device) -> float:
    """The least that `body` takes, on a GPU without the launches."""
    body()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            body()
        body = graph.replay
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        body()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
