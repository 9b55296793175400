"""What all layers of one forward pass share: computed once a step, not once a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gllm_engine.arch.model import AttentionShape
from gllm_engine.arch.rope import Rope
from gllm_engine.ops import AttentionPlan, RotaryInputs


@dataclass(frozen=True)
class ForwardContext:
    """Filled by the decoder at the start of a forward pass."""

    plans: dict[AttentionShape, AttentionPlan]
    rotary: dict[Rope, RotaryInputs]


@dataclass(frozen=True)
class LogitTokens:
    """The tokens of a step whose result somebody looks at. The others still leave K and V in the
    cache, and in the last layer nothing else.
    """

    index: Tensor  # [n] which tokens
    plans: dict[AttentionShape, AttentionPlan]  # for these alone; empty if n is 0
