"""The routing of one token in plain Python, straight from the definition."""

from __future__ import annotations

import math

from gllm_engine.routing import Routing


def route(logits: list[float], routing: Routing, bias: list[float] | None) -> dict[int, float]:
    """Expert -> weight, largest choice first."""
    if routing.scoring == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        total = sum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    choices = scores
    if bias is not None:
        choices = [score + extra for score, extra in zip(scores, bias, strict=True)]
    size = len(logits) // routing.groups
    groups = [list(range(at, at + size)) for at in range(0, len(logits), size)]
    best = 1 if bias is None else 2

    def rank(group: list[int]) -> float:
        return sum(sorted((choices[e] for e in group), reverse=True)[:best])

    kept = sorted(groups, key=rank, reverse=True)[: routing.kept_groups]
    experts = sorted((e for group in kept for e in group), key=lambda e: (-choices[e], e))
    chosen = experts[: routing.top_k]
    divisor = 1.0
    if routing.renorm:
        divisor = max(sum(scores[e] for e in chosen) + routing.sum_eps, routing.least_sum)
    return {e: scores[e] / divisor * routing.scale for e in chosen}
