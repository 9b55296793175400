"""A matrix with a row for each token: the embedding, or the output projection."""

from __future__ import annotations

from torch import Tensor

from gllm_engine.arch.formats import Formats, Shapes
from gllm_engine.layers.platform import Platform
from gllm_engine.layers.stacked_weight import Views, stack_weights

_UNUSED = "unused."  # the name of the rows past the vocabulary begins so


class VocabularyMatrix:
    """The weight `name`, [width, dim], of which a rank's tokens have the first rows.

    Every rank has `width` rows; those past the vocabulary are zero.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        width: int,
        formats: Formats,
        platform: Platform,
    ) -> None:
        """`shape`: of the rows of tokens. `formats`: as of stack_weights."""
        rows, dim = shape
        shapes: Shapes = {name: shape}
        if width > rows:
            unused = _UNUSED + "weight"
            shapes[unused] = (width - rows, dim)
            formats += tuple((unused, kind) for own, kind in formats if own == name)
        self._stack = stack_weights(list(shapes), shapes, formats, platform)
        self.value = self._stack.value
        if width > rows:
            value = self.value
            tensors = [value] if isinstance(value, Tensor) else [value.numbers, value.scales]
            for tensor in tensors:
                tensor.zero_()

    def weights(self) -> Views:
        """What the matrix is loaded into."""
        views = self._stack.views()
        return {name: view for name, view in views.items() if not name.startswith(_UNUSED)}
