"""Weights of whole numbers in the forms in which checkpoints store them, made into held forms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from gllm_engine.arch.fields import ArchError
from gllm_engine.arch.formats import Awq, Gptq, Integers
from gllm_engine.ops import PackedWeight, empty_packed, pack_codes

SCALE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Bits of an int32 before number i of eight.
_AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
_AT_ONCE = 1 << 24  # numbers, of which copies in wide dtypes are made


class StoredIntegers:
    """Memory for the weight `name`, [rows, columns], as a checkpoint stores it.

    `views`: by the names of the stored tensors.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], kind: Integers, device: torch.device
    ) -> None:
        self._kind = kind
        self._columns = shape[1]
        self._module = name.removesuffix("weight")
        scales = self._module + kind.scales
        dtypes = {scales: SCALE_DTYPES[kind.scale_dtype]}
        self.views = {
            stored: torch.empty(size, dtype=dtypes.get(stored, torch.int32), device=device)
            for stored, size in kind.stored_tensors(name, shape).items()
        }

    def pack_into(self, held: PackedWeight) -> None:
        """Write the weight in the held form."""
        groups = self._groups()[:: held.group]
        zeros = self._zero_points()
        for rows in self._some_rows():
            scales = self._scales()[rows].index_select(1, groups).to(held.scales.dtype)
            some = None if zeros is None else zeros[rows].index_select(1, groups)
            held.rows(rows).copy_(pack_codes(self._codes(rows), scales, False, some))

    def dequantize_into(self, matrix: Tensor) -> None:
        """Write the weight as plain numbers, rounded once."""
        wide = torch.promote_types(matrix.dtype, torch.float32)
        groups = self._groups()
        zeros = self._zero_points()
        middle = 1 << (self._kind.bits - 1)
        for rows in self._some_rows():
            zero = middle if zeros is None else zeros[rows].index_select(1, groups).to(wide)
            scales = self._scales()[rows].index_select(1, groups).to(wide)
            matrix[rows] = ((self._codes(rows).to(wide) - zero) * scales).to(matrix.dtype)

    def _groups(self) -> Tensor:
        """[columns] the group of each column."""
        kind = self._kind
        scales = self._scales()
        if kind.reordered:
            return self.views[self._module + kind.group_index]
        first = kind.column_cut.first if kind.column_cut else 0
        whole = kind.column_cut.whole if kind.column_cut else self._columns
        columns = torch.arange(self._columns, device=scales.device)
        return (first + columns) // (kind.group or whole)

    def _scales(self) -> Tensor:
        """[rows, groups]"""
        return self.views[self._module + self._kind.scales]

    def _zero_points(self) -> Tensor | None:
        """[rows, groups] uint8; None: they are all the same."""
        kind = self._kind
        if not kind.zeros:
            return None
        words = self.views[self._module + kind.zero_points]
        if isinstance(kind, Gptq) and kind.less_one:
            # GPTQ subtracts 1 of each number of an int32 at once, with borrows: 0 becomes 15 and
            # takes 1 from the next number.
            words = words + sum(1 << shift for shift in self._shifts())
        return self._along_rows(words)

    def _codes(self, rows: slice) -> Tensor:
        """[some rows, columns] uint8, the numbers as they are stored."""
        words = self.views[self._module + self._kind.numbers]
        if self._kind.along_rows:
            unit = self._kind.in_word
            return self._along_rows(words[rows.start // unit : rows.stop // unit])
        return torch.stack(self._unpacked(words[rows]), -1).flatten(-2)

    def _along_rows(self, words: Tensor) -> Tensor:
        """[rows, n] uint8, of int32 [rows / in_word, n]."""
        return torch.stack(self._unpacked(words), 1).flatten(0, 1)

    def _unpacked(self, words: Tensor) -> list[Tensor]:
        mask = (1 << self._kind.bits) - 1
        return [(words >> shift & mask).to(torch.uint8) for shift in self._shifts()]

    def _shifts(self) -> tuple[int, ...]:
        """The bits of an int32 before each of its numbers."""
        if isinstance(self._kind, Awq):
            return _AWQ_SHIFTS
        return tuple(range(0, 32, self._kind.bits))

    def _some_rows(self) -> list[slice]:
        return some_rows(len(self._scales()), self._columns, self._kind.row_unit)


def some_rows(count: int, columns: int, unit: int = 1) -> list[slice]:
    """All `count` rows, in parts of a multiple of `unit` rows and up to _AT_ONCE numbers, or of
    `unit` rows.
    """
    step = max(1, _AT_ONCE // (unit * columns)) * unit
    return [slice(row, min(row + step, count)) for row in range(0, count, step)]


def held_integers(
    kinds: Sequence[Integers], shape: tuple[int, ...], device: torch.device
) -> PackedWeight:
    """Memory for weights [..., rows, columns], of several kinds that may differ in the dtype of
    scales, in the form that layers hold.

    Raises ArchError for a dtype of scales that this form cannot have.
    """
    group = kinds[0].held_group(shape[-1])
    dtypes = [SCALE_DTYPES[kind.scale_dtype] for kind in kinds]
    dtype = reduce(torch.promote_types, dtypes)
    if kinds[0].zeros and dtype.itemsize > 2:
        told = " and ".join(sorted({kind.scale_dtype for kind in kinds}))
        raise ArchError(
            f"weights that are {kinds[0]} have scales of {told}; beside zero points only scales of "
            "one 16-bit dtype are supported"
        )
    return empty_packed(shape, group, dtype, is_float=False, device=device, zeros=kinds[0].zeros)
