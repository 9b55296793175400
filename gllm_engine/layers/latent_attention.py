"""Multi-head latent attention over the paged cache of latents, described by an Mla."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from gllm_engine.arch.formats import widened
from gllm_engine.arch.model import KV_UP, Indexer, Mla, Model
from gllm_engine.layers.forward_context import ForwardContext, LogitTokens, PlanKey
from gllm_engine.layers.indexer import TokenIndexer
from gllm_engine.layers.linear import Linear
from gllm_engine.layers.platform import Platform
from gllm_engine.layers.stacked_weight import Views, stack_weights
from gllm_engine.ops import (
    AttentionPlan,
    AttentionPlanner,
    Batch,
    IndexQueries,
    Norm,
    dequantized,
)


class MlaAttention:
    """Computes queries and a latent, stores the latent, attends to latents and projects.

        x -- q_a -- norm -- q_b -- rotate ---------\\
                                                    attend, with W_UK and W_UV -- o
        x -- kv_a -- norm, rotate -- cache --------/

    With an indexer, a query attends only to the tokens that the indexer chooses for it. That may be
    the indexer of an earlier layer.
    """

    def __init__(self, arch: Mla, group: int, model: Model, platform: Platform) -> None:
        """`group`: the cache group of the layer."""
        self._arch = arch
        self._group = group
        self.plan_key: PlanKey = (group, arch.attention)
        self._ops = platform.ops
        shapes = arch.shapes(model.dim)
        first = "self_attn.q_proj" if arch.q_rank is None else "self_attn.q_a_proj"
        down = [first, "self_attn.kv_a_proj_with_mqa"]
        self._down = Linear(down, shapes, platform, arch.formats)
        self._q_up: Linear | None = None
        if arch.q_rank is not None:
            q_up = ["self_attn.q_b_proj"]
            self._q_up = Linear(q_up, shapes, platform, arch.formats)
            self._q_gain = platform.empty(arch.q_rank)
        self._kv_gain = platform.empty(arch.kv_rank)
        # W_UK, then W_UV of each head. They are held plain, whatever their format.
        held = tuple((name, widened(kind)) for name, kind in arch.formats if name == KV_UP)
        self._kv_stack = stack_weights([KV_UP], shapes, held, platform)
        kv_up = dequantized(self._kv_stack.value, platform.dtype)
        self._kv_up = kv_up.unflatten(0, (arch.heads, arch.nope_dim + arch.v_dim))
        out = ["self_attn.o_proj"]
        self._out = Linear(out, shapes, platform, arch.formats)
        self._indexer: TokenIndexer | None = None
        if isinstance(arch.indexer, Indexer):
            self._indexer = TokenIndexer(arch.indexer, shapes, platform, arch.formats)

    def plan(
        self, planner: AttentionPlanner, batch: Batch, cache: tuple[Tensor, ...]
    ) -> AttentionPlan:
        """Plan a step for all layers with this `plan_key`. `batch`: from Batch.of_group."""
        return planner.plan_latent(batch, cache[0], self._arch.attention, self._group)

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None,
        context: ForwardContext,
        cache: tuple[Tensor, ...],
        logit_tokens: LogitTokens | None = None,
        total: Tensor | None = None,
    ) -> Tensor:
        """x: [tokens, dim]. cache: [num_pages, 1, page_size, 1, kv_rank + rope_dim]; of a layer
        with an indexer also [num_pages, 1, page_size, 1, indexer's dim].

        Returns [tokens, dim], or [n, dim] for the `logit_tokens`. If `total` is given, the result
        is added to it in place.
        """
        arch = self._arch
        if self._indexer is not None and norm is not None:
            x = self._ops.rms_norm(x, *norm)  # once for all products of x
            norm = None
        down = self._down(x, norm)
        q, latent = down.split((down.shape[1] - arch.latent_width, arch.latent_width), 1)
        plan = context.plans[self.plan_key]
        q, *of_indexer = self._queries(q, x)
        q = q.unflatten(1, (arch.heads, -1))
        gain: Norm = (self._kv_gain, arch.latent_eps)
        self._ops.store_latent(q, latent, gain, context.rotary[arch.rope], cache[0], plan)
        index: tuple[Tensor, ...] = ()
        if self._indexer is not None:
            index = self._indexer.store(context, cache[1], plan, *of_indexer)
        attend = partial(self._attend, cache, logit_tokens)
        values = context.attend(arch.heads * arch.v_dim, attend, q, *index)
        return self._out.add_to(total, values)

    def _attend(
        self,
        cache: tuple[Tensor, ...],
        logit_tokens: LogitTokens | None,
        context: ForwardContext,
        q: Tensor,
        *index: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """Choose tokens and attend. `index`: IndexQueries, if there is an indexer."""
        arch = self._arch
        ops = self._ops
        plan: AttentionPlan | None = context.plans[self.plan_key]
        tokens = None
        if logit_tokens is not None:
            tokens = logit_tokens.index
            plan = logit_tokens.plans.get(self.plan_key)
        if plan is None:
            return q.new_empty(0, arch.heads * arch.v_dim)
        if index:
            queries = IndexQueries(*index)
            context.chosen.tokens = ops.choose_tokens(queries, cache[1], plan, tokens)
        chosen = None if arch.indexer is None else context.chosen.tokens
        if not index and chosen is not None and tokens is not None:
            chosen = chosen[tokens]
        return ops.attend_latent(q, self._kv_up, cache[0], plan, tokens, chosen, out)

    def _queries(self, q: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """The queries of all heads, [tokens, heads * key_dim], and what the indexer stores. `q`:
        queries, or the latent that they are computed from.
        """
        if self._q_up is None:
            return (q,)
        norm: Norm = (self._q_gain, self._arch.latent_eps)
        if self._indexer is None:
            return (self._q_up(q, norm),)
        q = self._ops.rms_norm(q, *norm)
        return self._q_up(q), *self._indexer.project(x, q)

    def weights(self) -> Views:
        views = self._down.weights() | self._out.weights()
        if self._q_up is not None:
            views |= self._q_up.weights() | {"self_attn.q_a_layernorm.weight": self._q_gain}
        views["self_attn.kv_a_layernorm.weight"] = self._kv_gain
        if self._indexer is not None:
            views |= self._indexer.weights()
        return views | self._kv_stack.views()
