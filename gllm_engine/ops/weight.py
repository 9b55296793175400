"""A matrix for products, as a value with a format. A plain weight is its tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_MAX = 448.0  # the largest number of float8_e4m3fn, which has no infinity


@dataclass(frozen=True)
class Fp8Weight:
    """float8_e4m3fn numbers [..., width, depth] times float32 scales [..., rows, columns].

    Number [i, j] is multiplied by scale [row, (first_column + j) // columns_per_scale].
    `scale_row`: [width] int64, the row of each i; None: i // rows_per_scale. A part of a weight, or
    of weights stacked along the width, that does not begin with a block, needs `scale_row` or
    `first_column`, the columns of the first block before the part.
    """

    numbers: Tensor
    scales: Tensor
    rows_per_scale: int
    columns_per_scale: int
    scale_row: Tensor | None = None
    first_column: int = 0

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Fp8Weight:
        """The i-th matrix of a stack [n, width, depth]."""
        return replace(self, numbers=self.numbers[i], scales=self.scales[i])

    @property
    def shape(self) -> torch.Size:
        return self.numbers.shape

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix in `dtype`, rounded once: products with scales are float32 or wider."""
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


# The values of e2m1, by code.
_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
_LEAST_EXPONENT = 127  # a byte s of scales is 2^(s - 127)


@dataclass(frozen=True)
class PackedWeight:
    """4-bit numbers, two in a byte, the first one in its low bits.

    `numbers`: uint8 [..., width, depth / 2]. `scales`: [..., width, depth / group], the factors of
    `group` numbers of a row. If `is_float`, a code is e2m1, and a scale a uint8 s for 2^(s - 127).
    Else a code is the number plus 8, and a scale is a floating-point number.
    """

    numbers: Tensor
    scales: Tensor
    is_float: bool

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> PackedWeight:
        """The i-th matrix of a stack [n, width, depth]."""
        return replace(self, numbers=self.numbers[i], scales=self.scales[i])

    @property
    def shape(self) -> torch.Size:
        *lead, half = self.numbers.shape
        return torch.Size((*lead, 2 * half))

    @property
    def group(self) -> int:
        return self.shape[-1] // self.scales.shape[-1]

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix in `dtype`, rounded once: products with scales are float32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)
        codes = torch.stack((self.numbers & 15, self.numbers >> 4), -1)
        codes = codes.view(*self.scales.shape, self.group).int()
        if self.is_float:
            table = torch.tensor(_E2M1, dtype=wide, device=codes.device)
            values = table.index_select(0, codes.flatten()).view(codes.shape)
            scaled = torch.ldexp(values, self.scales.int()[..., None] - _LEAST_EXPONENT)
        else:
            scaled = (codes - 8).to(wide) * self.scales.to(wide)[..., None]
        return scaled.flatten(-2).to(dtype)


Weight = Tensor | Fp8Weight | PackedWeight


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


def quantize_mxfp4(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(numbers uint8 [..., columns / 2], scales uint8 [..., columns / 32]); see PackedWeight."""
    groups = matrix.float().unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1).clamp(min=2.0**-100)
    exponents = largest.log2().floor() - 2  # the largest number of a group is 4 to 8; 6 is held
    table = torch.tensor(_E2M1[:8], device=matrix.device)
    distances = (groups / exponents.exp2()[..., None]).abs()[..., None] - table
    codes = distances.abs().argmin(-1) + 8 * (groups < 0)
    return _pack(codes), (exponents + _LEAST_EXPONENT).to(torch.uint8)


def quantize_int4(matrix: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(numbers uint8 [..., columns / 2], scales bfloat16 [..., columns / group]); see PackedWeight.

    The largest number of a group becomes 7 or -7.
    """
    groups = matrix.float().unflatten(-1, (-1, group))
    scales = (groups.abs().amax(-1) / 7).clamp(min=2.0**-100).bfloat16()
    codes = (groups / scales.float()[..., None]).round().clamp(-8, 7) + 8
    return _pack(codes), scales


def _pack(codes: Tensor) -> Tensor:
    """[..., groups, group] numbers below 16 as bytes, [..., groups * group / 2]."""
    pairs = codes.to(torch.uint8).flatten(-2).unflatten(-1, (-1, 2))
    packed: Tensor = pairs[..., 0] | (pairs[..., 1] << 4)
    return packed
