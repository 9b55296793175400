"""A linear projection whose rows may be several weights (q, k, v; gate, up), as one GEMM."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from gllm_engine.arch.formats import Formats, Shapes
from gllm_engine.layers.platform import Platform
from gllm_engine.layers.stacked_weight import Views, stack_weights
from gllm_engine.ops import Norm, Rows, Weight


class Linear:
    """y = x W' + b for the projections `names`, stacked along the output dimension.

    `shapes` has "NAME.weight" [out, in] for every name, and "NAME.bias" [out] for all or none.
    `formats` has the format of each "NAME.weight" that is not plain. It is one product, or several
    if the weights differ in format.
    """

    def __init__(
        self,
        names: Sequence[str],
        shapes: Shapes,
        platform: Platform,
        formats: Formats = (),
    ) -> None:
        by_name = dict(formats)
        self._products: list[_Product] = []
        for _, some in groupby(names, lambda name: str(by_name.get(f"{name}.weight"))):
            self._products.append(_Product(list(some), shapes, platform, formats))
        self._ops = platform.ops

    @property
    def only_weight(self) -> Weight | None:
        """The weight, if one product takes x: `then` of the operation that makes x."""
        return self._products[0].weight if len(self._products) == 1 else None

    def __call__(self, x: Rows, norm: Norm | None = None) -> Tensor:
        """y, of norm(x) if `norm` is given."""
        parts = [self._ops.linear(x, each.weight, each.bias, norm) for each in self._products]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def add_to(self, total: Tensor | None, x: Rows) -> Tensor:
        """total + y, in the memory of `total`; None: y."""
        if total is None:
            return self(x)
        if len(self._products) > 1:
            return total.add_(self(x))
        (only,) = self._products
        return self._ops.add_linear(total, x, only.weight, only.bias)

    def gated(self, x: Tensor, norm: Norm | None, then: Weight | None) -> Rows:
        """silu(gate) * up, where [gate, up] = y. `then`: as Ops.activate."""
        if len(self._products) > 1:
            return self._ops.activate(self(x, norm), "silu", gated=True, then=then)
        (only,) = self._products
        return self._ops.gated_linear(x, only.weight, only.bias, norm, then)

    def weights(self) -> Views:
        """What the weights are loaded into."""
        views: Views = {}
        for product in self._products:
            views |= product.weights()
        return views


class _Product:
    """The part of a Linear whose weights have one format."""

    def __init__(
        self,
        names: list[str],
        shapes: Shapes,
        platform: Platform,
        formats: Formats,
    ) -> None:
        self._sizes = {name: shapes[f"{name}.weight"][0] for name in names}
        weights = [f"{name}.weight" for name in names]
        self._stack = stack_weights(weights, shapes, formats, platform)
        self.weight = self._stack.value
        self.bias: Tensor | None = None
        if f"{names[0]}.bias" in shapes:
            self.bias = platform.empty(sum(self._sizes.values()))

    def weights(self) -> Views:
        views = self._stack.views()
        if self.bias is not None:
            sizes = tuple(self._sizes.values())
            parts = zip(self._sizes, self.bias.split(sizes), strict=True)
            views |= {f"{name}.bias": part for name, part in parts}
        return views
