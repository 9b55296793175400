"""Inputs that all layers of one forward pass share, computed once per step."""

from __future__ import annotations

from collections.abc import Callable
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


# A call of a mixer, (context, *inputs, out=None) -> [tokens, width]; `out` receives the result.
Attend = Callable[..., Tensor]
CutPass = Callable[[int, Attend, tuple[Tensor, ...]], Tensor]


@dataclass(frozen=True)
class ForwardContext:
    """Filled by the decoder at the start of a forward pass, but for `chosen`.

    `cut`: None, except in a pass that is captured as CUDA graphs for any step of so many tokens. It
    takes the place of the call in `attend`, and returns the memory of the call's result. The plans
    of such a pass only store.
    """

    plans: dict[PlanKey, AttentionPlan] = field(default_factory=dict)
    rotary: dict[Rope, RotaryInputs] = field(default_factory=dict)
    # [tokens] float32
    query_scales: dict[QueryTemperature, Tensor] = field(default_factory=dict)
    chosen: ChosenTokens = field(default_factory=ChosenTokens)
    cut: CutPass | None = None

    def attend(self, width: int, call: Attend, *inputs: Tensor) -> Tensor:
        """call(self, *inputs), [tokens, width], in the dtype of the residual stream.

        `inputs`: [tokens, ...]. Only in such a call does a mixer read the cache, or use other
        tokens than a row's own. So the rest of a layer depends on the tokens' positions and places
        in the cache alone, and further rows with a place of their own do not disturb it.
        """
        return call(self, *inputs) if self.cut is None else self.cut(width, call, inputs)


@dataclass(frozen=True)
class LogitTokens:
    """The tokens of a step whose logits are needed.

    For all other tokens the last layer writes only K and V to the cache.
    """

    index: Tensor  # [n] indices of these tokens
    plans: dict[PlanKey, AttentionPlan]  # plans for these tokens only; empty if n is 0
