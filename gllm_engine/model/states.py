"""The states of sequences, in layers that keep one per sequence and not K and V per token.

Knows the layout of a state in memory; not which row belongs to which sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from gllm_engine.arch.model import Layer
from gllm_engine.ops import RecurrentState

_ALIGNMENT = 16  # bytes, of each part of a state


class States:
    """The states of all layers that keep one per sequence.

    `flat`: [rows, bytes], so that one copy moves the state of a sequence. `layers`: index of the
    layer -> its part of every row.
    """

    def __init__(
        self, layers: Sequence[Layer], rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`dtype`: of the convolution's inputs."""
        parts = _state_parts(layers, dtype)
        width = bytes_of_states(layers, dtype)
        self.flat = torch.zeros(rows, width, dtype=torch.uint8, device=device)
        views: dict[int, list[Tensor]] = {}
        columns = self.flat.split([part.num_bytes for part in parts], 1)
        for part, padded in zip(parts, columns, strict=True):
            used = padded[:, : prod(part.shape) * part.dtype.itemsize]
            views.setdefault(part.layer, []).append(used.view(part.dtype).unflatten(1, part.shape))
        self.layers = {i: RecurrentState(conv, matrix) for i, (matrix, conv) in views.items()}

    def copy(self, source: int, target: int) -> None:
        """Copy the state in a row to another row."""
        self.flat[target].copy_(self.flat[source])

    def free(self) -> None:
        """Give the memory back, once nothing else refers to `layers`."""
        self.layers.clear()
        self.flat = self.flat.new_empty(0, 0)

    def clear(self, row: int) -> None:
        """Set a row to zero."""
        self.flat[row].zero_()


class _StatePart(NamedTuple):
    """A tensor in the state of a layer."""

    layer: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """In a row, with padding."""
        return -(-prod(self.shape) * self.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _state_parts(layers: Sequence[Layer], dtype: torch.dtype) -> list[_StatePart]:
    """The matrices of the layers, in float32, and the convolution's inputs in `dtype`."""
    return [
        _StatePart(i, kind, shape)
        for i, layer in enumerate(layers)
        for kind, shape in zip((torch.float32, dtype), layer.mixer.state_shapes, strict=False)
    ]


def bytes_of_states(layers: Sequence[Layer], dtype: torch.dtype) -> int:
    """Bytes of a row of States."""
    return sum(part.num_bytes for part in _state_parts(layers, dtype))
