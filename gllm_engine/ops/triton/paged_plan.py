"""What kernels that store into pages share."""

from __future__ import annotations

from dataclasses import dataclass, field

import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.protocol import AttentionPlan


@dataclass
class PagedPlan(AttentionPlan):
    """A plan of layers with pages. `keeps_kv`: whether `attend` reads K and V of the step, too."""

    cache_index: Tensor  # [tokens] cache place of what a token stores
    keeps_kv: bool = field(default=False, kw_only=True)


@triton.jit
def stored(x, kind: tl.constexpr):
    """x as a cache of `kind` holds it. float8_e4m3fn has no infinity: 448 is its largest number."""
    if kind == tl.float8e4nv:
        x = tl.clamp(x.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(kind)
