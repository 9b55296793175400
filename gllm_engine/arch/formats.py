"""Number formats of stored weights: the tensors that a weight is stored as, and their shapes.

A weight without a format is plain: one tensor of numbers. Only matrices of layers have formats.
Shapes follow from the shape of the weight, so that a shard's tensors have shapes too.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

Shapes = dict[str, tuple[int, ...]]  # weight name -> shape


@dataclass(frozen=True)
class Fp8:
    """float8_e4m3fn numbers: number [i, j] times scale [i // rows, j // columns] is the weight.

    `rows`, `columns`: the block that shares a scale; 0: all rows, all columns of the weight.
    `suffix`: the scales' name is the weight's name and this.
    """

    rows: int = 0
    columns: int = 0
    suffix: str = "_scale"

    def tensors(self, name: str, shape: tuple[int, ...]) -> Shapes:
        """Name -> shape of the tensors of the weight `name`: its numbers and its scales."""
        return {name: shape, name + self.suffix: self.grid(shape)}

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The shape of the scales of a matrix."""
        rows, columns = shape
        return -(-rows // (self.rows or rows)), -(-columns // (self.columns or columns))

    def __str__(self) -> str:
        if self.columns:
            return f"FP8 in blocks of {self.rows} x {self.columns}"
        return "FP8 with a scale per row" if self.rows else "FP8 with one scale"


T = TypeVar("T", bound="Formatted")
FP8_TENSOR = Fp8()
FP8_ROW = Fp8(rows=1)
FP8_BLOCK = Fp8(128, 128, "_scale_inv")

# Weight name -> format, sorted; a weight of every expert of a layer has one name. Plain weights are
# not listed.
Formats = tuple[tuple[str, Fp8], ...]


def format_name(weight: str) -> str:
    """A weight's name in Formats: without the number of an expert."""
    return re.sub(r"\.experts\.\d+\.", ".experts.", weight)


def stored(shapes: Shapes, formats: Formats) -> Shapes:
    """Name -> shape of the tensors that weights of these shapes are stored as."""
    by_name = dict(formats)
    tensors: Shapes = {}
    for name, shape in shapes.items():
        kind = by_name.get(format_name(name))
        tensors |= {name: shape} if kind is None else kind.tensors(name, shape)
    return tensors


@dataclass(frozen=True)
class Formatted(ABC):
    """A part of a layer: named weights, and their formats."""

    formats: Formats = field(default=(), kw_only=True)

    @abstractmethod
    def shapes(self, dim: int) -> Shapes:
        """Name -> shape of each weight. `dim`: the width of the residual stream."""

    def weights(self, dim: int) -> Shapes:
        """Name -> shape of each tensor that the weights are stored as."""
        return stored(self.shapes(dim), self.formats) if self.formats else self.shapes(dim)

    def with_formats(self: T, formats: Mapping[str, Fp8], dim: int) -> T:
        """A copy with the `formats` of its own weights, by their names in Formats."""
        names = sorted({format_name(name) for name in self.shapes(dim)})
        return replace(self, formats=tuple((n, formats[n]) for n in names if n in formats))
