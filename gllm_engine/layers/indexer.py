"""The indexer of sparse attention, described by an Indexer: which tokens a query attends to.

Every rank has the indexer whole, so all ranks choose the same tokens.
"""

from __future__ import annotations

from torch import Tensor

from gllm_engine.arch.formats import Formats, Shapes
from gllm_engine.arch.model import Indexer
from gllm_engine.layers.forward_context import ForwardContext
from gllm_engine.layers.linear import Linear
from gllm_engine.layers.platform import Platform
from gllm_engine.layers.stacked_weight import Views
from gllm_engine.ops import AttentionPlan, IndexQueries


class TokenIndexer:
    """Computes queries, weights and a key of each token, and stores the key.

        q latent -- wq_b -- rotate ---------------\\
        x -- weights_proj ------------------------- score -- choose
        x -- wk -- layer norm, rotate -- cache ----/
    """

    def __init__(
        self,
        arch: Indexer,
        shapes: Shapes,
        platform: Platform,
        formats: Formats,
    ) -> None:
        """`shapes`, `formats`: of the weights of the mixer."""
        self._arch = arch
        self._ops = platform.ops
        common = (shapes, platform, formats)
        self._q = Linear(["self_attn.indexer.wq_b"], *common)
        self._k = Linear(["self_attn.indexer.wk"], *common)
        self._weights = Linear(["self_attn.indexer.weights_proj"], *common)
        self._gain = platform.empty(arch.dim)
        self._bias = platform.empty(arch.dim)

    def project(self, x: Tensor, q_latent: Tensor) -> tuple[Tensor, ...]:
        """The inputs of `store` for x [tokens, dim] and q_latent [tokens, q_rank], both normed."""
        return self._q(q_latent), self._k(x), self._weights(x)

    def store(
        self,
        context: ForwardContext,
        cache: Tensor,
        plan: AttentionPlan,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
    ) -> IndexQueries:
        """q: [tokens, heads * dim]; k: [tokens, dim]; weights: [tokens, heads]. cache: [num_pages,
        1, page_size, 1, dim]; receives the keys.
        """
        arch = self._arch
        q = self._ops.store_index_key(
            q.unflatten(1, (arch.heads, arch.dim)),
            k,
            (self._gain, self._bias, arch.eps),
            context.rotary[arch.rope],
            cache,
            plan,
        )
        return IndexQueries(q, weights)

    def weights(self) -> Views:
        norm = "self_attn.indexer.k_norm"
        views = self._q.weights() | self._k.weights() | self._weights.weights()
        return views | {f"{norm}.weight": self._gain, f"{norm}.bias": self._bias}
