"""A norm of the residual stream, described by a NormKind."""

from __future__ import annotations

from torch import Tensor

from gllm_engine.arch.model import NormKind, norm_weights
from gllm_engine.layers.platform import Platform
from gllm_engine.ops import Norm


class NormLayer:
    """Normalises the last dimension of [tokens, dim] and owns the norm's weights."""

    def __init__(self, kind: NormKind, eps: float, dim: int, platform: Platform) -> None:
        self._kind = kind
        self._eps = eps
        self._ops = platform.ops
        shapes = norm_weights("norm", dim, kind)
        tensors = {name: platform.empty(*shape) for name, shape in shapes.items()}
        self._gain = tensors["norm.weight"]
        self._bias = tensors.get("norm.bias")

    @property
    def fused(self) -> Norm | None:
        """The norm as an argument of a matrix product; None if products cannot compute it."""
        return (self._gain, self._eps) if self._kind == "rms" else None

    def input_of(self, x: Tensor) -> tuple[Tensor, Norm | None]:
        """The input of a matrix product of norm(x), and the norm that the product must compute."""
        return (self(x), None) if self.fused is None else (x, self.fused)

    def __call__(
        self, x: Tensor, add_to: Tensor | None = None, add_after: Tensor | None = None
    ) -> Tensor:
        """norm(x), [tokens, dim]; added to `add_to` in place, if given. `add_after`: [dim], is
        added to x itself afterwards.
        """
        if self._kind in ("rms", "rms_plus_one"):
            plus_one = self._kind == "rms_plus_one"
            return self._ops.rms_norm(x, self._gain, self._eps, add_to, plus_one, add_after)
        normed = self._ops.layer_norm(x, self._gain, self._bias, self._eps, add_after)
        return normed if add_to is None else add_to.add_(normed)

    def weights(self, name: str) -> dict[str, Tensor]:
        """The weights of the norm `name`."""
        gain = {f"{name}.weight": self._gain}
        return gain if self._bias is None else gain | {f"{name}.bias": self._bias}
