"""A matrix for products, as a value with a format. A plain weight is its tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_MAX = 448.0  # the largest number of float8_e4m3fn, which has no infinity
W = TypeVar("W", bound="_Quantized")


@dataclass(frozen=True)
class _Quantized(ABC):
    """A matrix, or a stack of matrices [n, width, depth], whose numbers have scales."""

    numbers: Tensor
    scales: Tensor

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self: W, i: int) -> W:
        """The i-th matrix of a stack."""
        return self._each(lambda tensor: tensor[i])

    def rows(self: W, rows: slice) -> W:
        """Some rows of each matrix, in the same memory."""
        return self._each(lambda tensor: tensor[..., rows, :])

    def _each(self: W, part: Callable[[Tensor], Tensor]) -> W:
        return replace(self, numbers=part(self.numbers), scales=part(self.scales))

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + self.scales.nbytes

    @property
    def shape(self) -> torch.Size:
        return self.numbers.shape

    @abstractmethod
    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix in `dtype`, rounded once: products with scales are float32 or wider."""


@dataclass(frozen=True)
class Int8Weight(_Quantized):
    """int8 numbers [..., width, depth] times float32 scales [..., width, 1]."""

    # As of an Fp8Weight.
    rows_per_scale: ClassVar[int] = 1
    scale_row: ClassVar[Tensor | None] = None
    first_column: ClassVar[int] = 0

    @property
    def columns_per_scale(self) -> int:
        return self.numbers.shape[-1]

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        return (self.numbers.to(wide) * self.scales.to(wide)).to(dtype)


@dataclass(frozen=True)
class Fp8Weight(_Quantized):
    """float8_e4m3fn numbers [..., width, depth] times float32 scales [..., rows, columns].

    Number [i, j] is multiplied by scale [row, (first_column + j) // columns_per_scale].
    `scale_row`: [width] int64, the row of each i; None: i // rows_per_scale. A part of a weight, or
    of weights stacked along the width, that does not begin with a block, needs `scale_row` or
    `first_column`, the columns of the first block before the part.
    """

    rows_per_scale: int
    columns_per_scale: int
    scale_row: Tensor | None = None
    first_column: int = 0

    def rows(self, rows: slice) -> Fp8Weight:
        """Some rows of each matrix, in the same memory, with all scales if these are of blocks."""
        if self.rows_per_scale == 1 and self.scale_row is None:
            return super().rows(rows)
        index = self.scale_row
        if index is None:
            every = torch.arange(self.shape[-2], device=self.numbers.device)
            index = every // self.rows_per_scale
        return replace(self, numbers=self.numbers[..., rows, :], scale_row=index[rows])

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        width, depth = self.shape[-2:]
        wide = torch.promote_types(dtype, torch.float32)
        scales = self.scales.to(wide)
        if self.scale_row is None:
            scales = scales.repeat_interleave(self.rows_per_scale, -2)[..., :width, :]
        else:
            scales = scales.index_select(-2, self.scale_row)
        scales = scales.repeat_interleave(self.columns_per_scale, -1)
        scales = scales[..., self.first_column : self.first_column + depth]
        return (self.numbers.to(wide) * scales).to(dtype)


@dataclass(frozen=True)
class RoundedRows:
    """Rows [rows, dim] for a product, rounded to float8_e4m3fn or int8: numbers [padded, dim] times
    float32 scales [padded, groups], of which each one belongs to equally many columns, the last one
    to fewer.

    Rows from `rows` on are zeros. `dtype`: of the rows before, and so of the product.
    """

    numbers: Tensor
    scales: Tensor
    rows: int
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.rows

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.rows, self.numbers.shape[1]))

    @property
    def device(self) -> torch.device:
        return self.numbers.device


# The values of e2m1, by code.
_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
_LEAST_EXPONENT = 127  # a byte s of scales is 2^(s - 127)
# A scale of e2m1 numbers, as a byte; so a kernel multiplies a bfloat16 number only once.
MAX_MXFP4_SCALE = 160
RUN = 128  # columns of a row whose numbers are packed together
RUN_WORDS = RUN // 4
SCALE_BYTES = 4  # of a row's scales that are contiguous
# Of the four numbers in a word: the places of the code's first bit and of its three other ones. A
# kernel gets a bfloat16 number by shifts and masks. For e2m1 it wants the sign in bit 15 and the
# other bits in bits 8 to 6, and these places need the fewest shifts; else it wants bits 3 to 0.
E2M1_PLACES = ((15, 6), (12, 3), (14, 0), (13, 9))
INT4_PLACES = ((3, 0), (7, 4), (11, 8), (15, 12))


@dataclass(frozen=True)
class PackedWeight(_Quantized):
    """4-bit numbers [..., width, depth], of which `group` in a row share a scale.

    `numbers`: int16 [..., width, words]. A word has four numbers: word j of 32 words has numbers j,
    32 + j, 64 + j and 96 + j of a run of 128 numbers, so that a kernel gets four matrices of 32
    neighbouring columns each from a tile of words. A last, shorter run has 32 words too.

    `scales`: [..., n, width, m], where m scales of a row are 4 bytes: the scale of group g of row i
    is [g // m, i, g % m]. If `is_float`, a number's code is e2m1, and a scale a uint8 s for
    2^(s - 127). Else a code is a whole number, and a scale is a floating-point number; the weight
    is (code - zero point) * scale. Numbers and scales past the end are zero.

    `zeros`: whether groups have zero points, from 0 to 15; else they all are 8. A group has 4 bytes
    then, its scale and its zero point in a 16-bit dtype: [g, i] are those of group g of row i.
    """

    depth: int
    group: int
    is_float: bool
    zeros: bool = False

    def copy_(self, other: PackedWeight) -> None:
        """Take the numbers of a weight with the same shape and kind."""
        self.numbers.copy_(other.numbers)
        self.scales.copy_(other.scales)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.numbers.shape[:-1], self.depth))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        codes = self._codes().unflatten(-1, (-1, self.group))
        scales, zeros = self._factors()
        if self.is_float:
            table = torch.tensor(_E2M1, dtype=wide, device=codes.device)
            values = table.index_select(0, codes.flatten()).view(codes.shape)
            scaled = torch.ldexp(values, scales.int() - _LEAST_EXPONENT)
        else:
            scaled = (codes - zeros.int()).to(wide) * scales.to(wide)
        return scaled.flatten(-2).to(dtype)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """The scales and the zero points of groups, each [..., width, groups, 1]."""
        groups = self.depth // self.group
        factors = self.scales.movedim(-3, -2)
        if self.zeros:
            return factors[..., :groups, :1], factors[..., :groups, 1:]
        scales = factors.flatten(-2)[..., :groups, None]
        return scales, torch.full_like(scales, 8)

    def _codes(self) -> Tensor:
        """The codes of the numbers: int32 [..., width, depth]."""
        words = self.numbers.int().unflatten(-1, (-1, RUN_WORDS))
        parts = [(words >> h & 1) << 3 | words >> i & 7 for h, i in _places(self.is_float)]
        return torch.stack(parts, -2).flatten(-3)[..., : self.depth]


def _places(is_float: bool) -> tuple[tuple[int, int], ...]:
    return E2M1_PLACES if is_float else INT4_PLACES


def empty_packed(
    shape: tuple[int, ...],
    group: int,
    scale_dtype: torch.dtype,
    is_float: bool,
    device: torch.device,
    zeros: bool = False,
) -> PackedWeight:
    """Memory for a PackedWeight [..., width, depth]; its scales are zero."""
    *lead, width, depth = shape
    runs = -(-depth // RUN)
    some = SCALE_BYTES // scale_dtype.itemsize
    parts = -(-runs * RUN // (group if zeros else group * some))
    return PackedWeight(
        torch.empty((*lead, width, runs * RUN_WORDS), dtype=torch.int16, device=device),
        torch.zeros((*lead, parts, width, some), dtype=scale_dtype, device=device),
        depth,
        group,
        is_float,
        zeros,
    )


def pack(numbers: Tensor, scales: Tensor, is_float: bool) -> PackedWeight:
    """The PackedWeight [..., width, depth] of what checkpoints hold.

    `numbers`: uint8 [..., width, depth / 2], two codes in a byte, the first one in its low bits.
    `scales`: [..., width, depth / group].
    """
    codes = torch.stack((numbers & 15, numbers >> 4), -1).flatten(-2)
    return pack_codes(codes, scales, is_float)


def pack_codes(
    codes: Tensor, scales: Tensor, is_float: bool, zeros: Tensor | None = None
) -> PackedWeight:
    """The PackedWeight of codes below 16, uint8 [..., width, depth].

    `scales`, and uint8 `zeros`: [..., width, depth / group], for groups that divide 128 or that 128
    divides.
    """
    depth = codes.shape[-1]
    group = depth // scales.shape[-1]
    if group > RUN:
        scales = scales.repeat_interleave(group // RUN, -1)
        zeros = None if zeros is None else zeros.repeat_interleave(group // RUN, -1)
        group = RUN
    packed = empty_packed(
        tuple(codes.shape), group, scales.dtype, is_float, codes.device, zeros=zeros is not None
    )
    runs = F.pad(codes, (0, -depth % RUN), value=0 if is_float else 8)
    parts = runs.int().unflatten(-1, (-1, 4, RUN_WORDS)).unbind(-2)
    words = torch.zeros_like(parts[0])
    for part, (first, others) in zip(parts, _places(is_float), strict=True):
        words |= (part >> 3 << first) | ((part & 7) << others)
    packed.numbers.copy_(words.flatten(-2))
    count, _, some = packed.scales.shape[-3:]
    if zeros is None:
        padded = F.pad(scales, (0, count * some - scales.shape[-1]))
        factors = padded.unflatten(-1, (count, some))
    else:
        factors = torch.stack((scales, zeros.to(scales.dtype)), -1)
        factors = F.pad(factors, (0, 0, 0, count - scales.shape[-1]))
    packed.scales.copy_(factors.movedim(-2, -3))
    return packed


Weight = Tensor | Fp8Weight | Int8Weight | PackedWeight
# The rows that a product takes.
Rows = Tensor | RoundedRows


def dequantized(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A weight as a matrix of `dtype`; a plain weight is returned as it is."""
    return weight if isinstance(weight, Tensor) else weight.dequantized(dtype)


def quantize_fp8(matrix: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(numbers float8_e4m3fn, scales float32) of matrices [..., ., .], with a scale per block.

    `rows`, `columns`: of a block; 0: all. The largest number of a block becomes 448.
    """
    height, width = matrix.shape[-2:]
    rows = rows or height
    columns = columns or width
    padded = F.pad(matrix.float(), (0, -width % columns, 0, -height % rows))
    blocks = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    scales = blocks.abs().amax((-3, -1)).clamp(min=1e-12) / FP8_MAX
    numbers = (blocks / scales[..., None, :, None]).flatten(-2).flatten(-3, -2)
    return numbers[..., :height, :width].to(torch.float8_e4m3fn), scales


def quantize_int8(matrix: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(numbers int8, scales float32 [height, 1] or [1, 1]) of a matrix [height, width].

    `rows`: that share a scale: 1, or 0 for all. The largest number of a scale becomes 127.
    """
    wide = matrix.float()
    largest = wide.abs().amax(1, keepdim=True) if rows else wide.abs().amax().reshape(1, 1)
    scales = largest.clamp(min=1e-12) / 127
    return (wide / scales).round().to(torch.int8), scales


def quantize_mxfp4(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(numbers uint8 [..., columns / 2], scales uint8 [..., columns / 32]); see `pack`."""
    groups = matrix.float().unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1).clamp(min=2.0**-100)
    exponents = largest.log2().floor() - 2  # the largest number of a group is 4 to 8; 6 is held
    table = torch.tensor(_E2M1[:8], device=matrix.device)
    distances = (groups / exponents.exp2()[..., None]).abs()[..., None] - table
    codes = distances.abs().argmin(-1) + 8 * (groups < 0)
    return _bytes(codes), (exponents + _LEAST_EXPONENT).to(torch.uint8)


def quantize_int4(matrix: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(numbers uint8 [..., columns / 2], scales bfloat16 [..., columns / group]); see `pack`.

    The largest number of a group becomes 7 or -7.
    """
    groups = matrix.float().unflatten(-1, (-1, group))
    scales = (groups.abs().amax(-1) / 7).clamp(min=2.0**-100).bfloat16()
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7) + 8
    return _bytes(codes), scales


def _bytes(codes: Tensor) -> Tensor:
    """[..., groups, group] numbers below 16 as bytes, [..., groups * group / 2]."""
    pairs = codes.to(torch.uint8).flatten(-2).unflatten(-1, (-1, 2))
    packed: Tensor = pairs[..., 0] | (pairs[..., 1] << 4)
    return packed
