"""What a decoder asks of a layer's first half, whatever it caches."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from gllm_engine.layers.forward_context import ForwardContext, LogitTokens, PlanKey
from gllm_engine.layers.stacked_weight import Views
from gllm_engine.ops import AttentionPlan, AttentionPlanner, Batch, Norm


class Mixer(Protocol):
    """Attention of some kind. `cache`: of the layer, the parts of pages or of states that its
    description names.
    """

    plan_key: PlanKey

    def plan(self, planner: AttentionPlanner, batch: Batch, cache: Any) -> AttentionPlan:
        """Plan a step for all layers with this `plan_key`. `batch`: from Batch.of_group."""
        ...

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None,
        context: ForwardContext,
        cache: Any,
        logit_tokens: LogitTokens | None = None,
        total: Tensor | None = None,
    ) -> Tensor:
        """[tokens, dim] to [tokens, dim], or to [n, dim] for the `logit_tokens`; the result is
        added to `total`, in place, if given.
        """
        ...

    def weights(self) -> Views:
        """What the weights are loaded into."""
        ...
