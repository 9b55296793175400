"""Number formats of stored weights: the tensors that a weight is stored as, and their shapes.

A weight without a format is plain: one tensor of numbers. Only matrices of layers have formats.
Shapes follow from the shape of the weight, so that a shard's tensors have shapes too.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

Shapes = dict[str, tuple[int, ...]]  # weight name -> shape


class Cut(NamedTuple):
    """Where a part of a weight begins, in rows or columns of the whole weight, and their number."""

    first: int
    whole: int


@dataclass(frozen=True)
class Fp8:
    """float8_e4m3fn numbers: number [i, j] times scale [i // rows, j // columns] is the weight.

    `rows`, `columns`: the block that shares a scale; 0: all rows, all columns of the weight.
    `suffix`: the scales' name is the weight's name and this. `row_cut`, `column_cut`: the weight is
    a part of a larger one and ends inside a block; it begins at row (column) `first` of `whole` and
    is stored with the scales of all these rows (columns).
    """

    rows: int = 0
    columns: int = 0
    suffix: str = "_scale"
    row_cut: Cut | None = None
    column_cut: Cut | None = None

    def tensors(self, name: str, shape: tuple[int, ...]) -> Shapes:
        """Name -> shape of the tensors of the weight `name`: its numbers and its scales."""
        return {name: shape, name + self.suffix: self.grid(shape)}

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The shape of the scales of a matrix."""
        rows, columns = shape
        rows = rows if self.row_cut is None else self.row_cut.whole
        columns = columns if self.column_cut is None else self.column_cut.whole
        return -(-rows // (self.rows or rows)), -(-columns // (self.columns or columns))

    def cut(
        self, whole: tuple[int, ...], part: tuple[int, ...], start: Callable[[int, int], int]
    ) -> Fp8:
        """The format of a `part` of a weight, by their shapes.

        `start(whole, part)`: where the part begins along a dimension.
        """
        sizes = zip((self.rows, self.columns), whole, part, strict=True)
        cuts = [
            Cut(start(n, own), n) if block and own < n and own % block else None
            for block, n, own in sizes
        ]
        return replace(self, row_cut=cuts[0], column_cut=cuts[1])

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

    def cut(self: T, whole: Formatted, dim: int, start: Callable[[int, int], int]) -> T:
        """This part of `whole` with formats that tell where it ends inside blocks; see Fp8.cut."""
        if not self.formats:
            return self
        sizes = {format_name(name): shape for name, shape in self.shapes(dim).items()}
        wholes = {format_name(name): shape for name, shape in whole.shapes(dim).items()}
        formats = tuple((n, kind.cut(wholes[n], sizes[n], start)) for n, kind in self.formats)
        return replace(self, formats=formats)
