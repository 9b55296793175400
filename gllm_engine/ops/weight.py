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


Weight = Tensor | Fp8Weight


def dequantized(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A weight as a matrix of `dtype`; a plain weight is returned as it is."""
    return weight if isinstance(weight, Tensor) else weight.dequantized(dtype)


def quantize_fp8(matrix: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(numbers float8_e4m3fn, scales float32 [., .]) of a matrix, with a scale per block.

    `rows`, `columns`: of a block; 0: all. The largest number of a block becomes 448.
    """
    height, width = matrix.shape
    rows = rows or height
    columns = columns or width
    padded = F.pad(matrix.float(), (0, -width % columns, 0, -height % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / FP8_MAX
    numbers = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)
    return numbers[:height, :width].to(torch.float8_e4m3fn), scales
