"""Paged attention one number at a time, in float64: slow, and too simple to be wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gllm_engine.ops import Batch


def attention(
    q: Tensor,
    cache: Tensor,
    batch: Batch,
    window: int | None,
    chunked: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """q: [tokens, heads, head_dim]. Returns [tokens, heads * head_dim] in float64."""
    page_size, kv_heads = cache.shape[2], cache.shape[3]
    group = q.shape[1] // kv_heads
    out, token = torch.full(q.shape, math.nan, dtype=torch.float64), 0
    for row, num in enumerate(batch.query_lens):
        context = int(batch.context_lens[row])
        for position in range(context - num, context):
            first = 0 if window is None else max(0, position - window + 1)
            if chunked and window is not None:
                first = position - position % window
            for head in range(q.shape[1]):
                keys, values = [], []
                for p in range(first, position + 1):
                    page = int(batch.page_table[row, p // page_size])
                    keys.append(cache[page, 0, p % page_size, head // group].double())
                    values.append(cache[page, 1, p % page_size, head // group].double())
                scores = torch.stack([k @ q[token, head].double() for k in keys])
                scores = scores / math.sqrt(q.shape[2])
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head : head + 1].double()])
                weights = scores.softmax(0)[: len(values)]
                out[token, head] = sum(w * v for w, v in zip(weights, values, strict=True))
            token += 1
    return out.flatten(1)
