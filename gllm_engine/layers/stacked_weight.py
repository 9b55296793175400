"""The memory of a weight that may be several stored weights, stacked along their rows.

One class for each format: it makes the value that operations take, and the views that a checkpoint
is loaded into.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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
from gllm_engine.layers.stored_integers import StoredIntegers, held_integers
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
_AT_ONCE = 1 << 24  # numbers, of which a copy in 32 bits is made


class Staged(NamedTuple):
    """Memory for weights in the form in which they are stored, if a layer holds another form.

    `views`: as of StackedWeight.views. `convert`: to be called when the views hold their numbers.
    """

    views: dict[str, Tensor]
    convert: Callable[[], None]


class Staging(NamedTuple):
    """A weight that is stored in another form than a layer holds.

    `held`: the weight's name, and the bytes that the layer holds. `make`: makes the memory for the
    stored form on a device.
    """

    held: dict[str, int]
    make: Callable[[torch.device], Staged]


def renamed(staging: Staging, rename: Callable[[dict[str, Any]], dict[str, Any]]) -> Staging:
    """`staging` with other names."""

    def make(device: torch.device) -> Staged:
        views, convert = staging.make(device)
        return Staged(rename(views), convert)

    return Staging(rename(staging.held), make)


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

    def stagings(self, expert: int | None = None) -> list[Staging]:
        """The weights that have no views, because they are stored in another form."""
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

    `dtype`: of plain weights. Raises ArchError if the weights differ in the format in which they
    are held.
    """
    by_name = dict(formats)
    matrices: _Matrices[Any] = _Matrices(
        sizes={name: shapes[name] for name in names},
        lead=() if num_experts is None else (num_experts,),
        kinds={name: by_name[name] for name in names if name in by_name},
        dtype=dtype,
        device=device,
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
    they are not plain. `dtype`: of plain numbers.
    """

    sizes: Shapes
    lead: tuple[int, ...]
    kinds: dict[str, K]
    dtype: torch.dtype
    device: torch.device

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stack."""
        return (*self.lead, sum(rows for rows, _ in self.sizes.values()), self.width)

    @property
    def width(self) -> int:
        (width,) = {width for _, width in self.sizes.values()}
        return width

    @property
    def rows(self) -> dict[str, slice]:
        """Name -> its rows of the stack."""
        return _ranges({name: rows for name, (rows, _) in self.sizes.items()})

    def empty(self, dtype: torch.dtype, *size: int) -> Tensor:
        """Memory for [size], or one for each expert."""
        return torch.empty((*self.lead, *size), dtype=dtype, device=self.device)


class _Plain:
    def __init__(self, matrices: _Matrices[Any]) -> None:
        self._rows = matrices.rows
        self.value: Tensor = matrices.empty(matrices.dtype, *matrices.shape[-2:])

    def views(self, expert: int | None = None) -> dict[str, Tensor]:
        whole = self.value if expert is None else self.value[expert]
        return {name: whole[rows] for name, rows in self._rows.items()}

    def stagings(self, expert: int | None = None) -> list[Staging]:
        del expert
        return []


class _Widened(_Plain):
    """Weights without a kind are stored plain too."""

    def __init__(self, matrices: _Matrices[Widened]) -> None:
        super().__init__(matrices)
        self._matrices = matrices

    def views(self, expert: int | None = None) -> dict[str, Tensor]:
        kinds = self._matrices.kinds
        return {name: view for name, view in super().views(expert).items() if name not in kinds}

    def stagings(self, expert: int | None = None) -> list[Staging]:
        whole = super().views(expert)
        return [
            Staging({name: whole[name].nbytes}, partial(self._stage, name, whole[name]))
            for name in self._matrices.kinds
        ]

    def _stage(self, name: str, into: Tensor, device: torch.device) -> Staged:
        kind = self._matrices.kinds[name].kind
        sizes = self._matrices.sizes
        if isinstance(kind, Integers):
            stored = StoredIntegers(name, sizes[name], kind, device)
            return Staged(stored.views, partial(stored.dequantize_into, into))
        stack = stack_weights([name], sizes, ((name, kind),), into.dtype, device)
        inner = [staging.make(device) for staging in stack.stagings()]
        views = stack.views()
        for staged in inner:
            views |= staged.views

        def convert() -> None:
            for staged in inner:
                staged.convert()
            assert not isinstance(stack.value, Tensor)
            for rows in _some_rows(into):
                into[rows] = dequantized(stack.value.rows(rows), into.dtype)

        return Staged(views, convert)


class _Converted(Generic[K]):
    """Weights whose stored form is converted: all of them are staged, and none has a view."""

    def __init__(self, matrices: _Matrices[K]) -> None:
        self._matrices = matrices
        self._rows = matrices.rows

    def views(self, expert: int | None = None) -> dict[str, Tensor]:
        del expert
        return {}


class _Rounded(_Converted[Rounded]):
    def __init__(self, matrices: _Matrices[Rounded]) -> None:
        super().__init__(matrices)
        rows, depth = matrices.shape[-2:]
        self.value = Fp8Weight(
            matrices.empty(torch.float8_e4m3fn, rows, depth),
            matrices.empty(torch.float32, rows, 1),
            rows_per_scale=1,
            columns_per_scale=depth,
        )

    def stagings(self, expert: int | None = None) -> list[Staging]:
        whole = self.value if expert is None else self.value[expert]
        stagings = []
        for name, rows in self._rows.items():
            numbers = whole.numbers[rows]
            scales = whole.scales[rows]
            held = {name: numbers.nbytes + scales.nbytes}
            stagings.append(Staging(held, partial(self._stage, name, numbers, scales)))
        return stagings

    def _stage(self, name: str, numbers: Tensor, scales: Tensor, device: torch.device) -> Staged:
        size = self._matrices.sizes[name]
        matrix = torch.empty(size, dtype=self._matrices.dtype, device=device)

        def convert() -> None:
            for rows in _some_rows(matrix):
                rounded, factors = quantize_fp8(matrix[rows], 1, 0)
                numbers[rows] = rounded
                scales[rows] = factors

        return Staged({name: matrix}, convert)


class _Packed(_Converted[K], ABC):
    """4-bit numbers, packed for kernels when they are loaded, with the scales of the checkpoint."""

    value: PackedWeight

    def stagings(self, expert: int | None = None) -> list[Staging]:
        whole = self.value if expert is None else self.value[expert]
        stagings = []
        for name, rows in self._rows.items():
            part = whole.rows(rows)
            stagings.append(Staging({name: part.nbytes}, partial(self._stage, name, part)))
        return stagings

    @abstractmethod
    def _stage(self, name: str, into: PackedWeight, device: torch.device) -> Staged:
        """Memory for the stored form of the weight `name`, which is converted to `into`."""


class _Integers(_Packed[Integers]):
    def __init__(self, matrices: _Matrices[Integers]) -> None:
        super().__init__(matrices)
        kinds = list(matrices.kinds.values())
        self.value = held_integers(kinds, matrices.shape, matrices.device)

    def _stage(self, name: str, into: PackedWeight, device: torch.device) -> Staged:
        matrices = self._matrices
        stored = StoredIntegers(name, matrices.sizes[name], matrices.kinds[name], device)
        return Staged(stored.views, partial(stored.pack_into, into))


class _Mxfp4(_Packed[Mxfp4]):
    def __init__(self, matrices: _Matrices[Mxfp4]) -> None:
        super().__init__(matrices)
        self.value = empty_packed(
            matrices.shape, Mxfp4.group, torch.uint8, is_float=True, device=matrices.device
        )

    def _stage(self, name: str, into: PackedWeight, device: torch.device) -> Staged:
        height, depth = self._matrices.sizes[name]
        numbers = torch.empty((height, depth // 2), dtype=torch.uint8, device=device)
        scales = torch.empty((height, depth // Mxfp4.group), dtype=torch.uint8, device=device)

        def convert() -> None:
            if height and int(scales.max()) > MAX_MXFP4_SCALE:
                raise ArchError(f"{name}: a scale is larger than 2^{MAX_MXFP4_SCALE - 127}")
            some = max(1, _AT_ONCE // depth)
            for at in range(0, height, some):
                rows = slice(at, at + some)
                into.rows(rows).copy_(pack(numbers[rows], scales[rows], is_float=True))

        blocks = numbers.unflatten(1, (-1, Mxfp4.group // 2))
        return Staged({name + "_blocks": blocks, name + "_scales": scales}, convert)


class _Fp8:
    """All weights have the same format; where they end inside blocks may differ."""

    def __init__(self, matrices: _Matrices[Fp8]) -> None:
        sizes = matrices.sizes
        kinds = matrices.kinds
        self._suffixes = {name: kind.suffix for name, kind in kinds.items()}
        rows, depth = matrices.shape[-2:]
        kind = next(iter(kinds.values()))
        # One scale for a whole weight is copied to all its rows.
        self._copies = not kind.rows
        grids = {name: kinds[name].grid(shape) for name, shape in sizes.items()}
        heights = {name: shape[0] for name, shape in sizes.items()}
        scale_heights = heights if self._copies else {name: grid[0] for name, grid in grids.items()}
        self._rows = matrices.rows
        self._scale_rows = _ranges(scale_heights)
        scales = (sum(scale_heights.values()), grids[next(iter(sizes))][1])
        self.value = Fp8Weight(
            matrices.empty(torch.float8_e4m3fn, rows, depth),
            matrices.empty(torch.float32, *scales),
            rows_per_scale=kind.rows or 1,
            columns_per_scale=kind.columns or depth,
            scale_row=_rows_of_scales(matrices) if kind.rows > 1 else None,
            first_column=kind.column_cut.first if kind.column_cut else 0,
        )

    def views(self, expert: int | None = None) -> dict[str, Tensor]:
        whole = self.value if expert is None else self.value[expert]
        views = {}
        for name, rows in self._rows.items():
            scales = whole.scales[self._scale_rows[name]]
            views[name] = whole.numbers[rows]
            views[name + self._suffixes[name]] = scales[:, None] if self._copies else scales
        return views

    def stagings(self, expert: int | None = None) -> list[Staging]:
        del expert
        return []


class _Int8:
    def __init__(self, matrices: _Matrices[Int8]) -> None:
        self._kinds = matrices.kinds
        self._rows = matrices.rows
        rows, depth = matrices.shape[-2:]
        self.value = Int8Weight(
            matrices.empty(torch.int8, rows, depth), matrices.empty(torch.float32, rows, 1)
        )

    def views(self, expert: int | None = None) -> dict[str, Tensor]:
        whole = self.value if expert is None else self.value[expert]
        views = {}
        for name, rows in self._rows.items():
            kind = self._kinds[name]
            views[name] = whole.numbers[rows]
            # One scale for a whole weight is copied to all its rows.
            scales = whole.scales[rows]
            views[name + kind.suffix] = scales if kind.rows else scales[:, None]
        return views

    def stagings(self, expert: int | None = None) -> list[Staging]:
        del expert
        return []


_STACKS: dict[type[Format], Callable[[_Matrices[Any]], StackedWeight]] = {
    Fp8: _Fp8,
    Int8: _Int8,
    Mxfp4: _Mxfp4,
    CompressedInt: _Integers,
    Gptq: _Integers,
    Awq: _Integers,
    Rounded: _Rounded,
}


def _rows_of_scales(matrices: _Matrices[Fp8]) -> Tensor | None:
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
    return rows.to(matrices.device)


def _some_rows(matrix: Tensor) -> list[slice]:
    """All rows, in parts of up to _AT_ONCE numbers, or of one row."""
    some = max(1, _AT_ONCE // matrix.shape[1])
    return [slice(at, at + some) for at in range(0, len(matrix), some)]


def _ranges(sizes: dict[str, int]) -> dict[str, slice]:
    edges = pairwise(accumulate(sizes.values(), initial=0))
    return {name: slice(*edge) for name, edge in zip(sizes, edges, strict=True)}
