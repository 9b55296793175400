"""Inputs that all layers of one forward pass share, computed once per step."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from gllm_engine.arch.model import AttentionShape, LatentShape, QueryTemperature, RecurrentShape
from gllm_engine.arch.rope import Rope
from gllm_engine.ops import AttentionPlan, RotaryInputs

# Layers share an attention plan if they have the same cache group and attention shape.
PlanKey = tuple[int, AttentionShape | LatentShape | RecurrentShape]


@dataclass
class ChosenTokens:
    """What the last indexer so far has chosen, for the layers that have none of their own.

    `tokens`: from Ops.choose_tokens, for all tokens of the step.
    """

    tokens: Tensor | None = None


@dataclass(frozen=True)
class ForwardContext:
    """Filled by the decoder at the start of a forward pass, but for `chosen`."""

    plans: dict[PlanKey, AttentionPlan]
    rotary: dict[Rope, RotaryInputs]
    query_scales: dict[QueryTemperature, Tensor]  # [tokens] float32
    chosen: ChosenTokens = field(default_factory=ChosenTokens)


@dataclass(frozen=True)
class LogitTokens:
    """The tokens of a step whose logits are needed.

    For all other tokens the last layer writes only K and V to the cache.
    """

    index: Tensor  # [n] indices of these tokens
    plans: dict[PlanKey, AttentionPlan]  # plans for these tokens only; empty if n is 0
