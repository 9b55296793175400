"""The memory of a weight that may be several stored weights, stacked along their rows.

One class for each format: it makes the value that operations take, and the views that a checkpoint
is loaded into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from gllm_engine.arch.fields import ArchError
from gllm_engine.arch.formats import (
    Awq,
    CompressedInt,
    Format,
    Formats,
    Fp8,
    Gptq,
    Int8,
    Integers,
    Mxfp4,
    Rounded,
    Shapes,
    Widened,
)
from gllm_engine.layers.platform import Platform
from gllm_engine.layers.stored_integers import StoredIntegers, held_integers, some_rows
from gllm_engine.ops import (
    MAX_MXFP4_SCALE,
    Fp8Weight,
    Int8Weight,
    PackedWeight,
    Weight,
    dequantized,
    empty_packed,
    pack,
    quantize_fp8,
)

K = TypeVar("K", bound=Format)


class Staged(NamedTuple):
    """Memory for a weight in the form in which it is stored, if a layer holds another form.

    `views`: name -> view to load each stored tensor into. `convert`: to be called when the views
    hold their numbers.
    """

    views: dict[str, Tensor]
    convert: Callable[[], None]


class Staging(NamedTuple):
    """What a layer holds of a weight that is stored in another form.

    `nbytes`: of what it holds. `make`: makes the memory for the stored form of the weight, by the
    weight's name.
    """

    nbytes: int
    make: Callable[[str], Staged]


# Name -> view to load a stored tensor into; or weight name -> Staging. A view may have one more
# leading dimension than the stored tensor, for copies of it.
Views = dict[str, Tensor | Staging]


class StackedWeight(Protocol):
    """A weight [rows, width], or one for each of several experts, [experts, rows, width]."""

    @property
    def value(self) -> Weight:
        """What operations take; its tensors stay the same while they are loaded."""
        ...

    def views(self, expert: int | None = None) -> Views:
        """What the weights are loaded into; of one expert, if there are several."""
        ...


def stack_weights(
    names: Sequence[str],
    shapes: Shapes,
    formats: Formats,
    platform: Platform,
    num_experts: int | None = None,
) -> StackedWeight:
    """Uninitialised memory for the weights `names`, whose shapes are in `shapes`.

    Raises ArchError if the weights differ in the format in which they are held.
    """
    by_name = dict(formats)
    matrices: _Matrices[Any] = _Matrices(
        sizes={name: shapes[name] for name in names},
        lead=() if num_experts is None else (num_experts,),
        kinds={name: by_name[name] for name in names if name in by_name},
        platform=platform,
    )
    if not matrices.kinds:
        return _Plain(matrices)
    if all(isinstance(kind, Widened) for kind in matrices.kinds.values()):
        return _Widened(matrices)
    told = [str(by_name.get(name, "plain")) for name in names]
    for name, label in zip(names, told, strict=True):
        if label != told[0]:
            raise ArchError(
                f"{names[0]} is {told[0]}, but {name} is {label}; "
                "they are one product, which needs one format"
            )
    return _STACKS[type(by_name[names[0]])](matrices)


@dataclass(frozen=True)
class _Matrices(Generic[K]):
    """Matrices that are stacked along their rows, in their order, once or for each of several
    experts.

    `sizes`: name -> (rows, width). `lead`: (number of experts,) or (). `kinds`: name -> format, if
    they are not plain.
    """

    sizes: Shapes
    lead: tuple[int, ...]
    kinds: dict[str, K]
    platform: Platform

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stack."""
        (width,) = {width for _, width in self.sizes.values()}
        return (*self.lead, sum(rows for rows, _ in self.sizes.values()), width)

    @property
    def rows(self) -> dict[str, slice]:
        """Name -> its rows of the stack."""
        return _ranges({name: rows for name, (rows, _) in self.sizes.items()})

    def empty(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """As Platform.empty, for each expert."""
        return self.platform.empty(*self.lead, *size, dtype=dtype)


class _Plain:
    def __init__(self, matrices: _Matrices[Any]) -> None:
        self._rows = matrices.rows
        self.value: Tensor = matrices.platform.empty(*matrices.shape)

    def views(self, expert: int | None = None) -> Views:
        whole = self.value if expert is None else self.value[expert]
        return {name: whole[rows] for name, rows in self._rows.items()}


class _Widened(_Plain):
    """Weights without a kind are stored plain too."""

    def __init__(self, matrices: _Matrices[Widened]) -> None:
        super().__init__(matrices)
        self._matrices = matrices

    def views(self, expert: int | None = None) -> Views:
        views = super().views(expert)
        for name, kind in self._matrices.kinds.items():
            into = views[name]
            assert isinstance(into, Tensor)
            stage = partial(_stage_widened, kind.kind, into, self._matrices.platform)
            views[name] = Staging(into.nbytes, stage)
        return views


def _stage_widened(kind: Format, into: Tensor, platform: Platform, name: str) -> Staged:
    if isinstance(kind, Integers):
        stored = StoredIntegers(name, into.shape, kind, platform.device)
        return Staged(stored.views, partial(stored.dequantize_into, into))
    stack = stack_weights([name], {name: into.shape}, ((name, kind),), platform)
    views: dict[str, Tensor] = {}
    conversions = []
    for part, view in stack.views().items():
        if isinstance(view, Tensor):
            views[part] = view
        else:
            staged = view.make(part)
            views |= staged.views
            conversions.append(staged.convert)

    def convert() -> None:
        for convert_part in conversions:
            convert_part()
        assert not isinstance(stack.value, Tensor)
        for rows in some_rows(*into.shape):
            into[rows] = dequantized(stack.value.rows(rows), into.dtype)

    return Staged(views, convert)


class _Converted:
    """Weights whose stored form is converted to the one that is held.

    `stage`: makes the memory for the stored form of a weight, by its kind, the part of `value` that
    it is converted to, and its name.
    """

    def __init__(
        self,
        matrices: _Matrices[Any],
        value: Fp8Weight | PackedWeight,
        stage: Callable[[Any, Any, Platform, str], Staged],
    ) -> None:
        self.value = value
        self._matrices = matrices
        self._stage = stage

    def views(self, expert: int | None = None) -> Views:
        whole = self.value if expert is None else self.value[expert]
        views: Views = {}
        for name, rows in self._matrices.rows.items():
            part = whole.rows(rows)
            kind = self._matrices.kinds[name]
            stage = partial(self._stage, kind, part, self._matrices.platform)
            views[name] = Staging(part.nbytes, stage)
        return views


def _rounded(matrices: _Matrices[Rounded]) -> StackedWeight:
    rows, depth = matrices.shape[-2:]
    numbers = matrices.empty(rows, depth, dtype=torch.float8_e4m3fn)
    scales = matrices.empty(rows, 1, dtype=torch.float32)
    return _Converted(matrices, Fp8Weight(numbers, scales, 1, depth), _stage_rounded)


def _stage_rounded(kind: Rounded, into: Fp8Weight, platform: Platform, name: str) -> Staged:
    del kind
    matrix = platform.empty(*into.shape)

    def convert() -> None:
        for rows in some_rows(*matrix.shape):
            rounded, factors = quantize_fp8(matrix[rows], 1, 0)
            into.numbers[rows] = rounded
            into.scales[rows] = factors

    return Staged({name: matrix}, convert)


def _integers(matrices: _Matrices[Integers]) -> StackedWeight:
    kinds = list(matrices.kinds.values())
    value = held_integers(kinds, matrices.shape, matrices.platform.device)
    return _Converted(matrices, value, _stage_integers)


def _stage_integers(kind: Integers, into: PackedWeight, platform: Platform, name: str) -> Staged:
    stored = StoredIntegers(name, into.shape, kind, platform.device)
    return Staged(stored.views, partial(stored.pack_into, into))


def _mxfp4(matrices: _Matrices[Mxfp4]) -> StackedWeight:
    """4-bit numbers, packed for kernels when they are loaded, with the scales of the checkpoint."""
    value = empty_packed(
        matrices.shape, Mxfp4.group, torch.uint8, is_float=True, device=matrices.platform.device
    )
    return _Converted(matrices, value, _stage_mxfp4)


def _stage_mxfp4(kind: Mxfp4, into: PackedWeight, platform: Platform, name: str) -> Staged:
    views = {
        stored: platform.empty(*size, dtype=torch.uint8)
        for stored, size in kind.tensors(name, into.shape).items()
    }
    blocks, scales = views.values()
    numbers = blocks.flatten(1)

    def convert() -> None:
        if len(into) and int(scales.max()) > MAX_MXFP4_SCALE:
            raise ArchError(f"{name}: a scale is larger than 2^{MAX_MXFP4_SCALE - 127}")
        for rows in some_rows(*into.shape):
            into.rows(rows).copy_(pack(numbers[rows], scales[rows], is_float=True))

    return Staged(views, convert)


class _Scaled:
    """8-bit numbers and scales. All weights have the same format; where they end inside blocks may
    differ.
    """

    value: Fp8Weight | Int8Weight

    def __init__(self, matrices: _Matrices[Fp8 | Int8]) -> None:
        kinds = matrices.kinds
        self._kinds = kinds
        rows, depth = matrices.shape[-2:]
        kind = next(iter(kinds.values()))
        # One scale for a whole weight is copied to all its rows.
        self._copies = not kind.rows
        grids = {name: kinds[name].grid(shape) for name, shape in matrices.sizes.items()}
        heights = {name: grid[0] for name, grid in grids.items()}
        self._rows = matrices.rows
        self._scale_rows = matrices.rows if self._copies else _ranges(heights)
        height = rows if self._copies else sum(heights.values())
        scales = matrices.empty(height, next(iter(grids.values()))[1], dtype=torch.float32)
        if isinstance(kind, Int8):
            self.value = Int8Weight(matrices.empty(rows, depth, dtype=torch.int8), scales)
            return
        self.value = Fp8Weight(
            matrices.empty(rows, depth, dtype=torch.float8_e4m3fn),
            scales,
            rows_per_scale=kind.rows or 1,
            columns_per_scale=kind.columns or depth,
            scale_row=_rows_of_scales(matrices) if kind.rows > 1 else None,
            first_column=kind.column_cut.first if kind.column_cut else 0,
        )

    def views(self, expert: int | None = None) -> Views:
        whole = self.value if expert is None else self.value[expert]
        views: Views = {}
        for name, rows in self._rows.items():
            scales = whole.scales[self._scale_rows[name]]
            views[name] = whole.numbers[rows]
            views[name + self._kinds[name].suffix] = scales[:, None] if self._copies else scales
        return views


_STACKS: dict[type[Format], Callable[[_Matrices[Any]], StackedWeight]] = {
    Fp8: _Scaled,
    Int8: _Scaled,
    Mxfp4: _mxfp4,
    CompressedInt: _integers,
    Gptq: _integers,
    Awq: _integers,
    Rounded: _rounded,
}


def _rows_of_scales(matrices: _Matrices[Any]) -> Tensor | None:
    """The row in the stacked scales of each row of the stacked weights, in blocks.

    None: each block of rows has the next row of scales.
    """
    first = 0
    parts = []
    for name, shape in matrices.sizes.items():
        kind = matrices.kinds[name]
        before = kind.row_cut.first if kind.row_cut else 0
        parts.append((torch.arange(shape[0]) + before) // kind.rows + first)
        first += kind.grid(shape)[0]
    rows = torch.cat(parts)
    if torch.equal(rows, torch.arange(len(rows)) // kind.rows):
        return None
    return rows.to(matrices.platform.device)


def _ranges(sizes: dict[str, int]) -> dict[str, slice]:
    edges = pairwise(accumulate(sizes.values(), initial=0))
    return {name: slice(*edge) for name, edge in zip(sizes, edges, strict=True)}
