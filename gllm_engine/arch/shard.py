"""The shard of a model that one rank holds: consecutive layers, with a share of heads and channels.

A layer's shard is described by a Layer with smaller dimensions, so code that builds layers needs
no case for shards. The position of a shard's weight in the whole weight follows from their two
shapes. The outputs of all shards of a mixer or an ffn sum to the output of the whole one.

Heads are shared out evenly. The channels between the products of an ffn are, too, if its weights
can be cut there; else ranks hold whole groups of channels that share a scale, the first ranks one
more than the others: of 90 groups, 4 ranks hold 23, 23, 22 and 22.

Of the vocabulary all ranks have equal shares, but for the last one, whose share may be smaller: of
49,155 tokens, 4 ranks have 12,296, 12,296, 12,296 and 12,267.

A vision tower is whole on every rank that has the first layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm

from gllm_engine.arch.fields import ArchError
from gllm_engine.arch.formats import EXPERTS_APART, Formats, Shapes
from gllm_engine.arch.model import (
    EMBEDDING,
    HEAD,
    Dense,
    GatedDelta,
    Gqa,
    Layer,
    Mla,
    Model,
    Moe,
)
from gllm_engine.arch.vision import VISUAL

# Channels of which uneven shares may be multiples.
_UNITS = (32, 16, 8, 4, 2, 1)
# Tokens of which shares may be multiples. With 8, every row of 16-bit logits begins at a multiple
# of 16 bytes, which fast matrix products need.
_VOCAB_UNITS = (8, 4, 2, 1)


@dataclass(frozen=True)
class Shard:
    """Layers `first` .. `end` - 1, and of these layers the share of rank `rank` among `size`."""

    first: int
    end: int
    rank: int = 0
    size: int = 1
    experts_apart: bool = False  # expert parallel: a rank holds whole experts, not a slice of each

    def of(self, model: Model) -> tuple[Layer, ...]:
        """The layers that this rank computes. Raises ArchError if they cannot be shared out."""
        self.vocab_width(model.vocab)
        layers = model.layers[self.first : self.end]
        return tuple(self._layer(layer, model.dim) for layer in layers)

    def weights(self, model: Model) -> Shapes:
        """Canonical name -> shape of this rank's shard, for every weight that it holds."""
        part = replace(
            model,
            vocab=self.vocab_rows(model.vocab),
            layers=self.of(model),
            vocab_formats=self.vocab_formats(model),
        )
        last = self.end == len(model.layers)
        others: list[str] = []  # beginnings of names
        if self.first and not (last and model.tie):
            others.append(EMBEDDING.removesuffix("weight"))
        if self.first:
            others += ["model.embed_positions.", VISUAL]
        if not last:
            others += ["model.norm.", HEAD.removesuffix("weight")]
        shapes = part.weights(self.first)
        return {name: size for name, size in shapes.items() if not name.startswith(tuple(others))}

    def vocab_formats(self, model: Model) -> Formats:
        """The formats of this rank's share of the vocabulary's matrices."""
        whole = (model.vocab, model.dim)
        part = (self.vocab_rows(model.vocab), model.dim)
        return tuple(
            (name, kind.cut(name, whole, part, self.start)) for name, kind in model.vocab_formats
        )

    def vocab_width(self, vocab: int) -> int:
        """The tokens in a rank's share of the vocabulary; the last rank may have fewer.

        The share of rank r begins with token r * width. Raises ArchError for too many ranks.
        """
        if self.size == 1:
            return vocab
        widths = [-(-vocab // (self.size * unit)) * unit for unit in _VOCAB_UNITS]
        for width in widths:
            if (self.size - 1) * width < vocab:
                return width
        raise ArchError(self._too_many("vocab_size", vocab))

    def vocab_rows(self, vocab: int) -> int:
        """The tokens in this rank's share of the vocabulary."""
        width = self.vocab_width(vocab)
        return min(width, vocab - self.rank * width)

    def start(self, whole: int, part: int) -> int:
        """The offset of this rank's `part` numbers along a dimension of `whole` numbers.

        If `size` exceeds the number of parts, several ranks hold the same part, such as a K/V head.
        Of uneven parts, those of the first ranks are larger. No rank has none, so the number of
        larger parts that fill the whole does not divide `size`.
        """
        parts, rest = divmod(whole, part)
        if not rest and self.size % parts == 0:
            return self.rank * parts // self.size * part
        if part * self.size > whole:
            return self.rank * part
        return whole - (self.size - self.rank) * part

    def _layer(self, layer: Layer, dim: int) -> Layer:
        mixer = self._mixer(layer.mixer).cut(layer.mixer, dim, self.start)
        ffn = self._ffn(layer.ffn).cut(layer.ffn, dim, self.start)
        return replace(layer, mixer=mixer, ffn=ffn)

    def _mixer(self, mixer: Gqa | Mla | GatedDelta) -> Gqa | Mla | GatedDelta:
        if isinstance(mixer, GatedDelta):
            k_heads = self._divide("linear_num_key_heads", mixer.k_heads)
            v_heads = self._divide("linear_num_value_heads", mixer.v_heads)
            return replace(mixer, k_heads=k_heads, v_heads=v_heads)
        heads = self._divide("num_attention_heads", mixer.heads)
        if isinstance(mixer, Mla):  # every rank has both latents whole
            return replace(mixer, heads=heads, out_bias=mixer.out_bias and not self.rank)
        if mixer.kv_heads % self.size and self.size % mixer.kv_heads:
            raise ArchError(
                f"tensor_parallel_size: {self.size} ranks can neither share out the model's "
                f"{mixer.kv_heads} key/value heads evenly nor be shared out among them"
            )
        kv_heads = max(1, mixer.kv_heads // self.size)
        bias = mixer.out_bias and not self.rank  # outputs are summed over ranks
        return replace(mixer, heads=heads, kv_heads=kv_heads, out_bias=bias)

    def _ffn(self, ffn: Dense | Moe) -> Dense | Moe:
        if isinstance(ffn, Moe):
            of_shared = ffn.formats_within("shared_expert")
            shared = self._share("width of the shared expert", ffn.shared, of_shared)
            if self.experts_apart:
                count = self._divide("num_experts", ffn.num_experts)
                return replace(ffn, shared=shared, local_experts=(self.rank * count, count))
            of_experts = ffn.expert.formats
            hidden = self._share("moe_intermediate_size", ffn.hidden, of_experts, EXPERTS_APART)
            bias = ffn.out_bias and not self.rank
            return replace(ffn, shared=shared, hidden=hidden, out_bias=bias)
        hidden = self._share("intermediate_size", ffn.hidden, ffn.formats)
        return replace(ffn, hidden=hidden, out_bias=ffn.out_bias and not self.rank)

    def _share(self, what: str, whole: int, formats: Formats, else_told: str = "") -> int:
        """This rank's number of `whole` channels, by the formats of the weights that have them.

        `else_told`: after the reason for which they cannot be split, what helps.
        """
        if not whole or self.size == 1:
            return whole
        grains = [kind.grain for _, kind in formats]
        least = lcm(*(grain.least for grain in grains))
        best = lcm(*(grain.best for grain in grains))
        even, rest = divmod(whole, self.size)
        if not rest and even % best == 0:
            return even
        largest = {
            unit: -(-whole // (unit * self.size)) * unit
            for unit in _UNITS
            if unit % least == 0 and whole % unit == 0 and whole >= unit * self.size
        }
        if not largest:
            raise ArchError(self._too_many(what, whole, formats, least) + else_told)
        # Rounder shares are faster, but not if the largest one is much larger.
        unit = next(
            u for u in _UNITS if u in largest and 8 * largest[u] <= 9 * min(largest.values())
        )
        units, more = divmod(whole // unit, self.size)
        return (units + (self.rank < more)) * unit

    def _too_many(self, what: str, whole: int, formats: Formats = (), least: int = 1) -> str:
        told = (
            f"tensor_parallel_size: {self.size} ranks cannot each have some of the model's "
            f"{what}={whole}"
        )
        if least == 1:
            return told
        kind = next(kind for _, kind in formats if kind.grain.least == least)
        return f"{told}: parts of {least} are not split further, because the weights are {kind}"

    def _divide(self, what: str, number: int) -> int:
        if number % self.size:
            raise ArchError(
                f"tensor_parallel_size: {self.size} does not divide the model's {what}={number}"
            )
        return number // self.size
