"""Number formats of stored weights: the tensors that a weight is stored as, and their shapes.

A weight without a format is plain: one tensor of numbers. Only matrices have formats.
Shapes follow from the shape of the weight, so that a shard's tensors have shapes too.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import gcd
from typing import ClassVar, NamedTuple, TypeVar

from gllm_engine.arch.fields import ArchError

Shapes = dict[str, tuple[int, ...]]  # weight name -> shape


class Grain(NamedTuple):
    """Of how many rows or columns a part of a weight has a multiple: always of `least`, and of
    `best` if kernels are to be fast. Both are powers of two.
    """

    best: int = 1
    least: int = 1


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

    def cut(self, name: str, whole: Size, part: Size, start: Start) -> Format:
        """The format of a `part` of the weight `name`, by their shapes: the same, if parts have
        scales of their own.

        Raises ArchError if the weight cannot be cut there.
        """
        del name, whole, part, start
        return self

    @property
    def grain(self) -> Grain:
        """Of parts, along a dimension that is not cut between heads. torch's kernels for 8 bits
        want sizes that are multiples of 16.
        """
        return Grain(best=16)

    @property
    def bits(self) -> int:
        """The bits of a stored number."""
        return 8

    # The same for a weight that a layer holds plain: only what is stored matters then.

    def stored_tensors(self, name: str, shape: Size) -> Shapes:
        """As `tensors`."""
        return self.tensors(name, shape)

    def stored_cut(self, name: str, whole: Size, part: Size, start: Start) -> Format:
        """As `cut`."""
        return self.cut(name, whole, part, start)

    @property
    def stored_unit(self) -> int:
        """The rows or columns, a power of two, of which a part has a multiple."""
        return 1


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
        cuts: list[Cut | None] = []
        for block, size, own in zip((self.rows, self.columns), whole, part, strict=True):
            first = start(size, own)
            inside = block > 0 and own < size and (first % block > 0 or own % block > 0)
            cuts.append(Cut(first, size) if inside else None)
        return replace(self, row_cut=cuts[0], column_cut=cuts[1])

    @property
    def grain(self) -> Grain:
        """See Format.grain. If scales belong to columns, a turn of a kernel has 16 columns of one
        scale or 32.
        """
        if not self.columns:
            return super().grain
        return Grain(gcd(32, self.rows, self.columns), gcd(16, self.rows, self.columns))

    def __str__(self) -> str:
        if self.columns:
            return f"FP8 in blocks of {self.rows} x {self.columns}"
        return "FP8 with a scale per row" if self.rows else "FP8 with one scale"


@dataclass(frozen=True)
class Int8(Format):
    """int8 numbers, not packed: number [i, j] times the scale of row i is the weight.

    Products round their inputs to int8 too. `rows`: 1, or 0 if all rows share a scale. `suffix`: as
    of Fp8.
    """

    rows: int = 1
    suffix: str = "_scale"

    def tensors(self, name: str, shape: Size) -> Shapes:
        """See Format.tensors: numbers and scales."""
        return {name: shape, name + self.suffix: self.grid(shape)}

    def grid(self, shape: Size) -> tuple[int, int]:
        """The shape of the scales of a matrix."""
        return (shape[0] if self.rows else 1, 1)

    def __str__(self) -> str:
        return "unpacked INT8 with " + ("a scale per row" if self.rows else "one scale")


@dataclass(frozen=True)
class Mxfp4(Format):
    """4-bit floating-point numbers (e2m1); the scale of 32 numbers of a row is a power of two.

    As in gpt-oss: 16 bytes hold 32 numbers, the first of each two in the low bits, and a byte s
    holds the scale 2^(s - 127).
    """

    group: ClassVar[int] = 32

    @property
    def bits(self) -> int:
        """See Format.bits."""
        return 4

    def tensors(self, name: str, shape: Size) -> Shapes:
        """See Format.tensors: numbers and scales."""
        rows, columns = shape
        if columns % self.group:
            raise ArchError(f"{name} has {columns} columns, so it cannot be {self}")
        scales = (rows, columns // self.group)
        return {name + "_blocks": (*scales, self.group // 2), name + "_scales": scales}

    def cut(self, name: str, whole: Size, part: Size, start: Start) -> Mxfp4:
        """See Format.cut: not within a group."""
        del start
        if part[1] < whole[1] and part[1] % self.group:
            raise ArchError(_splits(f"{whole[1]} columns", name, part[1], self))
        return self

    @property
    def grain(self) -> Grain:
        """See Format.grain: whole groups."""
        return Grain(self.group, self.group)

    @property
    def stored_unit(self) -> int:
        """See Format.stored_unit: a group."""
        return self.group

    def __str__(self) -> str:
        return f"MXFP4 with a scale per {self.group} columns"


@dataclass(frozen=True)
class Integers(Format):
    """Whole numbers: (number - zero point) * scale is the weight.

    `group` numbers of a row share a scale and a zero point; 0: all numbers of a row. `bits`: of a
    number and of a zero point. Without `zeros` every zero point is 2^(bits - 1), and none is
    stored. `scale_dtype`: as safetensors calls it. `reordered`: column j is in group g_idx[j],
    which is stored too; else in group j // group. `column_cut`: the weight is a part of a larger
    one and ends inside a group; see Fp8.

    An int32 holds 32 / bits numbers, the first in its low bits unless a kind says otherwise. Zero
    points are so packed along the rows.
    """

    group: int
    bits: int = 4
    zeros: bool = False
    reordered: bool = False
    scale_dtype: str = "F16"
    column_cut: Cut | None = None

    # What follows the names of a weight's module: here, of GPTQ and AWQ.
    numbers: ClassVar[str] = "qweight"
    scales: ClassVar[str] = "scales"
    zero_points: ClassVar[str] = "qzeros"
    group_index: ClassVar[str] = "g_idx"
    label: ClassVar[str] = ""  # what these numbers are called
    along_rows: ClassVar[bool] = False  # numbers of a column are packed, not of a row

    def tensors(self, name: str, shape: Size) -> Shapes:
        """See Format.tensors: numbers, scales, and what else is stored."""
        if not self.held_group(shape[1]):
            raise ArchError(f"{name} has {shape[1]} columns, so it cannot be {self}")
        return self.stored_tensors(name, shape)

    def stored_tensors(self, name: str, shape: Size) -> Shapes:
        """See Format.stored_tensors."""
        rows, columns = shape
        whole = columns if self.column_cut is None else self.column_cut.whole
        if whole % (self.group or whole) or columns % self.column_unit:
            raise ArchError(f"{name} has {columns} columns, so it cannot be {self}")
        if rows % self.row_unit:
            raise ArchError(f"{name} has {rows} rows, so it cannot be {self}")
        module = name.removesuffix("weight")
        groups = whole // (self.group or whole)
        packed = (
            (rows // self.in_word, columns) if self.along_rows else (rows, columns // self.in_word)
        )
        found: Shapes = {module + self.numbers: packed, module + self.scales: (rows, groups)}
        if self.zeros:
            found[module + self.zero_points] = (rows // self.in_word, groups)
        if self.reordered:
            found[module + self.group_index] = (columns,)
        return found

    def cut(self: P, name: str, whole: Size, part: Size, start: Start) -> P:
        """See Format.cut: rows not within an int32, columns not within INT4_GROUPS."""
        if part[1] < whole[1] and not self.held_group(part[1]):
            raise ArchError(_splits(f"{whole[1]} columns", name, part[1], self))
        return self.stored_cut(name, whole, part, start)

    def stored_cut(self: P, name: str, whole: Size, part: Size, start: Start) -> P:
        """See Format.stored_cut: not within an int32."""
        if part[0] < whole[0] and part[0] % self.row_unit:
            raise ArchError(_splits(f"{whole[0]} rows", name, part[0], self))
        if part[1] == whole[1]:
            return self
        if part[1] % self.column_unit:
            raise ArchError(_splits(f"{whole[1]} columns", name, part[1], self))
        first = start(whole[1], part[1])
        whole_groups = self.group > 0 and first % self.group == part[1] % self.group == 0
        if whole_groups and not self.reordered:
            return self
        return replace(self, column_cut=Cut(first, whole[1]))

    @property
    def grain(self) -> Grain:
        """See Format.grain: what a layer can hold with a scale of its own."""
        least = max(INT4_GROUPS[0], self.row_unit)
        return Grain(least, least)

    @property
    def stored_unit(self) -> int:
        """See Format.stored_unit: the numbers of an int32."""
        return max(self.row_unit, self.column_unit)

    def held_group(self, columns: int) -> int:
        """The most columns that share a scale when a layer holds the weight; 0: there is no way."""
        shared = gcd(self.group or columns, columns)
        return max((group for group in INT4_GROUPS if shared % group == 0), default=0)

    @property
    def in_word(self) -> int:
        """The numbers that an int32 holds."""
        return 32 // self.bits

    @property
    def row_unit(self) -> int:
        """The rows of whole int32."""
        return self.in_word if self.along_rows or self.zeros else 1

    @property
    def column_unit(self) -> int:
        """The columns of whole int32."""
        return 1 if self.along_rows else self.in_word

    def __str__(self) -> str:
        per = f"{self.group} columns" if self.group else "row"
        factors = "a scale and a zero point" if self.zeros else "a scale"
        order = ", in groups of any columns" if self.reordered else ""
        return f"{self.label}INT{self.bits} with {factors} per {per}{order}"


@dataclass(frozen=True)
class CompressedInt(Integers):
    """As compressed-tensors packs whole numbers."""

    scale_dtype: str = "BF16"

    numbers = "weight_packed"
    scales = "weight_scale"
    zero_points = "weight_zero_point"
    group_index = "weight_g_idx"


@dataclass(frozen=True)
class Gptq(Integers):
    """As GPTQ stores whole numbers; every matrix is stored transposed.

    `less_one`: a stored zero point is one less, as in checkpoint_format "gptq".
    """

    less_one: bool = True

    label = "GPTQ "


@dataclass(frozen=True)
class Awq(Integers):
    """As AWQ stores whole numbers, version "gemm"; every matrix is stored transposed.

    An int32 holds numbers and zero points 0, 2, 4, 6, 1, 3, 5, 7 of 8 rows, in this order.
    """

    zeros: bool = True

    label = "AWQ "
    along_rows = True


EXPERTS_APART = "; experts are not split with enable_expert_parallel"


def _splits(what: str, name: str, part: int, kind: Format) -> str:
    told = (
        f"tensor_parallel_size: {what} of {name} would be split into parts of {part}, but they are "
        f"{kind}"
    )
    return told + EXPERTS_APART if ".experts." in name else told


@dataclass(frozen=True)
class Rounded(Format):
    """Stored plain, and held as FP8_ROW: rounded when it is loaded.

    A part of a weight is rounded by itself, so its scales are not those of the whole.
    """

    def tensors(self, name: str, shape: Size) -> Shapes:
        """See Format.tensors: the weight itself."""
        return {name: shape}

    def __str__(self) -> str:
        return "FP8, rounded when loaded"


@dataclass(frozen=True)
class Widened(Format):
    """Stored as `kind`, and held plain: multiplied by its scales when it is loaded."""

    kind: Format

    @property
    def bits(self) -> int:
        """See Format.bits."""
        return self.kind.bits

    def tensors(self, name: str, shape: Size) -> Shapes:
        """See Format.tensors."""
        return self.kind.stored_tensors(name, shape)

    def cut(self, name: str, whole: Size, part: Size, start: Start) -> Widened:
        """See Format.cut."""
        return Widened(self.kind.stored_cut(name, whole, part, start))

    @property
    def grain(self) -> Grain:
        """See Format.grain: what can be cut, a layer can hold."""
        return Grain(self.kind.stored_unit, self.kind.stored_unit)

    def __str__(self) -> str:
        return f"{self.kind}, held plain"


def widened(kind: Format) -> Widened:
    """The format of a weight that is stored as `kind` and held plain."""
    return kind if isinstance(kind, Widened) else Widened(kind)


def held_in(name: str, kind: Format) -> Format:
    """The format that a layer has for its weight `name`: experts have no kernels for Int8."""
    return widened(kind) if isinstance(kind, Int8) and ".experts." in name else kind


def held(kind: Format) -> Format:
    """The format that layers have for a weight that is stored as `kind`.

    They hold INT4 in groups of adjacent columns; all other whole numbers are held plain.
    """
    is_packed = isinstance(kind, Integers) and kind.bits == 4 and not kind.reordered
    return kind if is_packed or not isinstance(kind, Integers) else widened(kind)


def stored_kind(kind: Format) -> Format:
    """The format of a weight as it is stored, however it is held."""
    return kind.kind if isinstance(kind, Widened) else kind


P = TypeVar("P", bound=Integers)
T = TypeVar("T", bound="Formatted")
FP8_TENSOR = Fp8()
FP8_ROW = Fp8(rows=1)
FP8_BLOCK = Fp8(128, 128, "_scale_inv")

INT4_GROUPS = (32, 64, 128)  # columns of a scale that a layer can hold
INT_SCALES = ("BF16", "F16", "F32")  # dtypes of scales

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

    def widened(self: T) -> T:
        """A copy whose weights are held plain."""
        return replace(self, formats=tuple((name, widened(kind)) for name, kind in self.formats))

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
