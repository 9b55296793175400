"""The memory of a weight that may be several stored weights, stacked along their rows.

One class for each format: it makes the value that operations take, and the views that a checkpoint
is loaded into.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from gllm_engine.arch.fields import ArchError
from gllm_engine.arch.formats import Formats, Fp8, Shapes
from gllm_engine.ops import Fp8Weight, Weight


class StackedWeight(Protocol):
    """A weight [rows, width], or one for each of several experts, [experts, rows, width]."""

    @property
    def value(self) -> Weight:
        """What operations take; its tensors stay the same while they are loaded."""
        ...

    def views(self, expert: int | None = None) -> dict[str, Tensor]:
        """Name -> view to load each stored tensor into; of one expert, if there are several.

        A view may have one more leading dimension than the stored tensor, for copies of it.
        """
        ...


def stack_weights(
    names: Sequence[str],
    shapes: Shapes,
    formats: Formats,
    dtype: torch.dtype,
    device: torch.device,
    num_experts: int | None = None,
) -> StackedWeight:
    """Uninitialised memory for the weights `names`, whose shapes are in `shapes`.

    `dtype`: of plain weights. Raises ArchError if the weights differ in format.
    """
    by_name = dict(formats)
    kind = by_name.get(names[0])
    for name in names:
        if by_name.get(name) != kind:
            raise ArchError(
                f"{names[0]} is {kind or 'plain'}, but {name} is {by_name.get(name) or 'plain'}; "
                "they are one product, which needs one format"
            )
    sizes = {name: shapes[name] for name in names}
    lead = () if num_experts is None else (num_experts,)
    if kind is None:
        return _Plain(sizes, lead, dtype, device)
    return _Fp8(sizes, lead, kind, device)


class _Plain:
    def __init__(
        self, sizes: Shapes, lead: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._rows = _ranges({name: rows for name, (rows, _) in sizes.items()})
        shape = (*lead, *_stacked(sizes))
        self.value: Tensor = torch.empty(shape, dtype=dtype, device=device)

    def views(self, expert: int | None = None) -> dict[str, Tensor]:
        whole = self.value if expert is None else self.value[expert]
        return {name: whole[rows] for name, rows in self._rows.items()}


class _Fp8:
    def __init__(
        self, sizes: Shapes, lead: tuple[int, ...], kind: Fp8, device: torch.device
    ) -> None:
        self._suffix = kind.suffix
        rows, depth = _stacked(sizes)
        # One scale for a whole weight is copied to all its rows.
        self._copies = not kind.rows
        grids = {n: (shape if self._copies else kind.grid(shape)) for n, shape in sizes.items()}
        self._rows = _ranges({name: shape[0] for name, shape in sizes.items()})
        self._scale_rows = _ranges({name: grid[0] for name, grid in grids.items()})
        num_scales = sum(grid[0] for grid in grids.values())
        columns = kind.grid((rows, depth))[1]
        scale_row = None
        *firsts, _ = sizes.values()
        if kind.rows > 1 and any(height % kind.rows for height, _ in firsts):
            scale_row = _rows_of_scales(sizes, kind).to(device)
        self.value = Fp8Weight(
            torch.empty((*lead, rows, depth), dtype=torch.float8_e4m3fn, device=device),
            torch.empty((*lead, num_scales, columns), dtype=torch.float32, device=device),
            rows_per_scale=kind.rows or 1,
            columns_per_scale=kind.columns or depth,
            scale_row=scale_row,
        )

    def views(self, expert: int | None = None) -> dict[str, Tensor]:
        whole = self.value if expert is None else self.value[expert]
        views = {}
        for name, rows in self._rows.items():
            scales = whole.scales[self._scale_rows[name]]
            views[name] = whole.numbers[rows]
            views[name + self._suffix] = scales[:, None] if self._copies else scales
        return views


def _rows_of_scales(sizes: Shapes, kind: Fp8) -> Tensor:
    """The row in the stacked scales of each row of the stacked weights."""
    first = 0
    parts = []
    for shape in sizes.values():
        parts.append(torch.arange(shape[0]) // kind.rows + first)
        first += kind.grid(shape)[0]
    return torch.cat(parts)


def _stacked(sizes: Shapes) -> tuple[int, int]:
    """The shape of all matrices, stacked along their rows."""
    (depth,) = {shape[1] for shape in sizes.values()}
    return sum(shape[0] for shape in sizes.values()), depth


def _ranges(sizes: dict[str, int]) -> dict[str, slice]:
    edges = pairwise(accumulate(sizes.values(), initial=0))
    return {name: slice(*edge) for name, edge in zip(sizes, edges, strict=True)}
