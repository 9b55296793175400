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

from gllm_engine.arch.fields import ArchError

Shapes = dict[str, tuple[int, ...]]  # weight name -> shape


class Cut(NamedTuple):
    """Where a part of a weight begins, in rows or columns of the whole weight, and their number."""

    first: int
    whole: int


# Where a part of `part` numbers begins along a dimension of `whole` numbers: start(whole, part).
Start = Callable[[int, int], int]
Size = tuple[int, ...]


class Format(ABC):
    """How a matrix is stored in a checkpoint, and held by a layer."""

    @abstractmethod
    def tensors(self, name: str, shape: Size) -> Shapes:
        """Name -> shape of the checkpoint tensors of the weight `name`."""

    @abstractmethod
    def cut(self, name: str, whole: Size, part: Size, start: Start) -> Format:
        """The format of a `part` of the weight `name`, by their shapes.

        Raises ArchError if the weight cannot be cut there.
        """


@dataclass(frozen=True)
class Fp8(Format):
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

    def tensors(self, name: str, shape: Size) -> Shapes:
        """See Format.tensors: numbers and scales."""
        return {name: shape, name + self.suffix: self.grid(shape)}

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The shape of the scales of a matrix."""
        rows, columns = shape
        rows = rows if self.row_cut is None else self.row_cut.whole
        columns = columns if self.column_cut is None else self.column_cut.whole
        return -(-rows // (self.rows or rows)), -(-columns // (self.columns or columns))

    def cut(self, name: str, whole: Size, part: Size, start: Start) -> Fp8:
        """See Format.cut: any part."""
        del name
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


class _Packed(Format):
    """4-bit numbers, of which `group` in a row share a scale."""

    group: int

    def cut(self: P, name: str, whole: Size, part: Size, start: Start) -> P:
        """See Format.cut: not within a group."""
        del start
        if part[1] < whole[1] and part[1] % self.group:
            raise ArchError(
                f"tensor_parallel_size: {whole[1]} columns of {name} would be split into parts of "
                f"{part[1]}, but they are {self}; experts are not split with "
                "enable_expert_parallel"
            )
        return self

    def _grid(self, name: str, shape: Size) -> tuple[int, int]:
        """The shape of the scales of a matrix."""
        rows, columns = shape
        if columns % self.group:
            raise ArchError(f"{name} has {columns} columns, so it cannot be {self}")
        return rows, columns // self.group


@dataclass(frozen=True)
class Mxfp4(_Packed):
    """4-bit floating-point numbers (e2m1); the scale of 32 numbers is a power of two.

    As in gpt-oss: 16 bytes hold 32 numbers, the first of each two in the low bits, and a byte s
    holds the scale 2^(s - 127).
    """

    group: int = field(default=32, init=False)

    def tensors(self, name: str, shape: Size) -> Shapes:
        """See Format.tensors: numbers and scales."""
        scales = self._grid(name, shape)
        return {name + "_blocks": (*scales, self.group // 2), name + "_scales": scales}

    def __str__(self) -> str:
        return f"MXFP4 with a scale per {self.group} columns"


@dataclass(frozen=True)
class Int4(_Packed):
    """Whole numbers from -8 to 7.

    As compressed-tensors packs them: an int32 holds 8 numbers plus 8, the first in the low bits.
    """

    group: int
    scale_dtype: str = "BF16"  # as safetensors calls it

    def tensors(self, name: str, shape: Size) -> Shapes:
        """See Format.tensors: numbers and scales."""
        rows, columns = shape
        scales = self._grid(name, shape)
        return {name + "_packed": (rows, columns // 8), name + "_scale": scales}

    def __str__(self) -> str:
        return f"INT4 with a scale per {self.group} columns"


@dataclass(frozen=True)
class Rounded(Format):
    """Stored plain, and held as FP8_ROW: rounded when it is loaded.

    A part of a weight is rounded by itself, so its scales are not those of the whole.
    """

    def tensors(self, name: str, shape: Size) -> Shapes:
        """See Format.tensors: the weight itself."""
        return {name: shape}

    def cut(self, name: str, whole: Size, part: Size, start: Start) -> Rounded:
        """See Format.cut: any part."""
        del name, whole, part, start
        return self

    def __str__(self) -> str:
        return "FP8, rounded when loaded"


@dataclass(frozen=True)
class Widened(Format):
    """Stored as `kind`, and held plain: multiplied by its scales when it is loaded."""

    kind: Format

    def tensors(self, name: str, shape: Size) -> Shapes:
        """See Format.tensors."""
        return self.kind.tensors(name, shape)

    def cut(self, name: str, whole: Size, part: Size, start: Start) -> Widened:
        """See Format.cut."""
        return Widened(self.kind.cut(name, whole, part, start))

    def __str__(self) -> str:
        return f"{self.kind}, held plain"


def widened(kind: Format) -> Widened:
    """The format of a weight that is stored as `kind` and held plain."""
    return kind if isinstance(kind, Widened) else Widened(kind)


P = TypeVar("P", bound=_Packed)
T = TypeVar("T", bound="Formatted")
FP8_TENSOR = Fp8()
FP8_ROW = Fp8(rows=1)
FP8_BLOCK = Fp8(128, 128, "_scale_inv")

INT4_GROUPS = (32, 64, 128)  # supported
INT4_SCALES = ("BF16", "F16", "F32")  # their dtypes

# Weight name -> format, sorted; a weight of every expert of a layer has one name. Plain weights are
# not listed.
Formats = tuple[tuple[str, Format], ...]


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

    def with_formats(self: T, formats: Mapping[str, Format], dim: int) -> T:
        """A copy with the `formats` of its own weights, by their names in Formats."""
        names = sorted({format_name(name) for name in self.shapes(dim)})
        return replace(self, formats=tuple((n, formats[n]) for n in names if n in formats))

    def held(self: T, change: Callable[[Format], Format]) -> T:
        """A copy with other formats for those that it has."""
        return replace(self, formats=tuple((name, change(kind)) for name, kind in self.formats))

    def cut(self: T, whole: Formatted, dim: int, start: Start) -> T:
        """This part of `whole` with formats that tell where it ends inside blocks.

        See Format.cut.
        """
        if not self.formats:
            return self
        sizes = {format_name(name): shape for name, shape in self.shapes(dim).items()}
        wholes = {format_name(name): shape for name, shape in whole.shapes(dim).items()}
        formats = tuple((n, kind.cut(n, wholes[n], sizes[n], start)) for n, kind in self.formats)
        return replace(self, formats=formats)
