"""What kernels that store into pages must know of a plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from gllm_engine.ops.protocol import AttentionPlan


@dataclass
class PagedPlan(AttentionPlan):
    """A plan of layers with pages. `keeps_kv`: whether `attend` reads K and V of the step, too."""

    cache_index: Tensor  # [tokens] cache place of what a token stores
    keeps_kv: bool = field(default=False, kw_only=True)
