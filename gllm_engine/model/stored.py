"""The tensors of a checkpoint's files: checks each one and finds the formats of the weights.

A weight's format is what the files hold: float8 numbers with a tensor of scales beside them, or
4-bit numbers and scales under other names. The config's quantization_config is only compared with
it. This module reads no data but scales of blocks that lie over several weights.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import gcd, prod
from pathlib import Path
from typing import NamedTuple

import torch

from gllm_engine.arch import LoadError
from gllm_engine.arch.checkpoint_files import incomplete
from gllm_engine.arch.formats import (
    FP8_BLOCK,
    FP8_ROW,
    FP8_TENSOR,
    INT4_GROUPS,
    INT_SCALES,
    CompressedInt,
    Format,
    Fp8,
    Gptq,
    Int8,
    Integers,
    Mxfp4,
    Widened,
    format_name,
    held,
    stored_kind,
    widened,
)
from gllm_engine.arch.model import EMBEDDING, HEAD, Model
from gllm_engine.arch.names import (
    checkpoint_layout,
    checkpoint_name,
    checkpoint_shapes,
    checkpoint_tensors,
    expert_of,
    is_cache_scale,
    is_left_over,
    num_blocks,
)
from gllm_engine.files import shown
from gllm_engine.model.expected import Expected, expected_beside
from gllm_engine.model.read import TensorSlice

_FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn}
_INT8 = {"I8": torch.int8}
_PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Dtypes of scales -> those of which every number is exactly a number of that dtype.
_EXACT = {
    "F16": {"F16": torch.float16},
    "BF16": {"BF16": torch.bfloat16},
    "F32": {
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E8M0": torch.float8_e8m0fnu,
    },
}
# After a weight's name: scales of its numbers; 4-bit numbers, with their dtypes. The first suffix
# follows the name of one tensor of all experts, which does not end in "weight".
_SCALE_SUFFIXES = ("_weight_scale", "_scale_inv", "_scale")
_INT32 = {"I32": torch.int32}
_PACKED = {
    "_blocks": {"U8": torch.uint8},  # MXFP4
    "_scales": {"U8": torch.uint8},
    "_packed": _INT32,  # whole numbers
    "_zero_point": _INT32,
    ".qweight": _INT32,
    ".qzeros": _INT32,
    ".g_idx": _INT32,
    "_g_idx": _INT32,
}
# In a module: what GPTQ and AWQ store in place of its weight, and beside it.
_OF_MODULE = ("qweight", "qzeros", "scales", "g_idx", "bias")
# Beside "NAME.weight", as "NAME.", or beside one tensor of all experts, as "TENSOR_": one scale for
# the inputs of products, or its upper bound, or what is subtracted from inputs in int8.
_INPUT_SCALES = ("input_scale", "activation_scale", "input_scale_ub", "input_zero_point")
# After the name of a weight of 4-bit numbers: its two sizes, which the config determines.
_SHAPE = "_shape"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's entry in the header of a file; `offset`: byte offset of its data in the file."""

    path: Path
    descriptor: int
    offset: int
    num_bytes: int
    dtype: str
    shape: list[int]


class Verified(NamedTuple):
    """A tensor that is read only to see that its numbers are right.

    `weight`: the canonical name of a weight that needs it.
    """

    weight: str
    tensor: TensorSlice
    expected: Expected


class StoredTensors:
    """Collects the tensors of all files; then checks them against the model.

    `shared`: names of tensors of scales, each of which so many weights share, one after the other.
    `tied`: the name of a stored output projection of a model whose output projection is the
    embedding. `verified`: tensors of GPTQ that are to be read before any weight, by their names.
    """

    def __init__(self, arch: Model, opened: ExitStack) -> None:
        """`arch`: without formats. `opened`: closes files."""
        self._opened = opened
        self._arch = arch
        self._shapes = checkpoint_shapes(arch)
        self._sizes = arch.weights()
        self._weights = checkpoint_tensors(arch)
        self._tied = checkpoint_name(arch, HEAD) if arch.tie else None
        self._stored: dict[str, StoredTensor] = {}
        self._quantized: set[str] = set()
        self._int8_names: set[str] = set()  # of the tensors with int8 numbers
        self._scale_dtypes: dict[str, str] = {}
        self._has_cache_scales = False
        self.shared: dict[str, int] = {}
        self.verified: dict[str, Verified] = {}
        self._integers_of: dict[str, Integers] = {}  # by the weight's checkpoint name

    @property
    def tied(self) -> str | None:
        return self._tied if self._tied in self._stored else None

    def add(self, name: str, stored: StoredTensor) -> None:
        """Record one tensor. Raises LoadError if the model has no place for it."""
        if is_left_over(self._arch, name):
            return
        if is_cache_scale(self._arch, name) and prod(stored.shape) == 1:
            self._has_cache_scales = True
            return
        if name in self._stored:
            raise LoadError(f"{stored.path}: tensor {name} is in the checkpoint twice")
        weights = (_weight_of(name), name)
        if name != self._tied and not any(weight in self._weights for weight in weights):
            raise _left_over(stored, name)
        self._stored[name] = stored

    def with_formats(self, path: Path) -> Model:
        """The model with the formats of the stored weights. `path`: the checkpoint's directory.

        Raises LoadError for scales of an unknown shape, and if the config promises another format.
        """
        promised = self._arch.quantization
        matrices = self._arch.matrices()
        formats: dict[str, Format] = {}
        told: dict[str, str] = {}
        for name, parts in self._weights.items():
            kind = self._format(name) if matrices.keys() >= {*parts} else None
            self._check_experts(name, kind, told)
            if kind is None:
                continue
            if isinstance(kind, Integers):
                self._integers_of[name] = kind
            kind = held(kind)
            if promised and not self._promises(kind):
                raise LoadError(
                    f"{self._numbers(name)[0].path}: tensor {name} is {kind}, but the config's "
                    f"quantization_config says {_told(promised)}"
                )
            if isinstance(kind, Fp8) and kind.columns:
                kind = self._within_weights(name, kind)
            formats |= dict.fromkeys(parts, kind)
        if promised and not formats:
            raise LoadError(
                f"{path}: the config's quantization_config says {_told(promised)}, but no weight "
                "is stored so"
            )
        arch = self._arch.with_formats(formats) if formats else self._arch
        plain = {
            str(kind): name for name, kind in arch.held_kinds().items() if isinstance(kind, Widened)
        }
        if plain:
            _log.warning(
                "%s: layers cannot compute with these weights as they are stored: %s",
                path,
                " and ".join(f"{kind} ({name})" for kind, name in sorted(plain.items())),
            )
        return arch

    def check(self, arch: Model, path: Path) -> dict[str, TensorSlice]:
        """The place of each tensor of `arch`, the model with formats, by checkpoint tensor name.

        Raises LoadError for a tensor that is missing or left over, or has a wrong shape, size or
        dtype.
        """
        wanted = checkpoint_shapes(arch)
        if self._tied is not None:  # may be stored, if equal to the embedding
            wanted[self._tied] = self._sizes[EMBEDDING]
            self._check_tied(arch)
        # All experts of a layer have one format, so this is not what each tensor's dtype says.
        self._quantized = {name for name in wanted if _scales_of(name) & wanted.keys()}
        self._scale_dtypes = _scale_dtypes(arch)
        found = {}
        for name, stored in self._stored.items():
            expected = self._expected(name)
            if expected is not None:
                weight = self._weights[_weight_of(name)][0]
                tensor = self._slice(name, stored, expected.shape)
                self.verified[name] = Verified(weight, tensor, expected)
            if name in wanted:
                found[name] = self._slice(name, stored, wanted[name])
            elif expected is None and not self._is_unused(name, stored):
                raise _left_over(stored, name)
        missing = [name for name in wanted if name not in found and name != self._tied]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise LoadError(f"{path}: tensor {missing[0]} is missing{more}")
        if any(name.endswith(_INPUT_SCALES) for name in self._stored):
            _log.info(
                "%s: scales of inputs are not used: every token gets a scale of its own", path
            )
        if self._has_cache_scales:
            _log.info(
                "%s: scales of a float8 KV cache are not used: K and V are stored as computed", path
            )
        return found

    def _check_tied(self, arch: Model) -> None:
        """Refuse a stored output projection that cannot be compared with the embedding."""
        if self.tied is not None and EMBEDDING in dict(arch.vocab_formats):
            raise LoadError(
                f"{self._stored[self.tied].path}: tensor {self.tied} is stored beside a quantised "
                "embedding, but the config says tie_word_embeddings=true"
            )

    def _format(self, name: str) -> Format | None:
        """The format of a matrix, by what is stored under its name; None: it is plain."""
        stored = self._stored.get(name)
        if stored is not None:
            if stored.dtype in _INT8:
                return self._int8(name, stored)
            return self._fp8(name, stored) if stored.dtype in _FLOAT8 else None
        if name + "_blocks" in self._stored:
            return Mxfp4()
        for kind in (CompressedInt, Gptq):
            if self._own_name(name, kind.numbers) in self._stored:
                return self._integers(name, kind)
        return None

    def _integers(self, name: str, kind: type[Integers]) -> Integers:
        """The format of a matrix of whole numbers, by its scales.

        `kind`: one of those that give its numbers the name that they have.
        """
        numbers = self._own_name(name, kind.numbers)
        path = self._stored[numbers].path
        if len(self._shapes[name]) != 2:
            raise LoadError(
                f"{path}: tensor {numbers} has whole numbers, which are not supported for one "
                "tensor of all experts"
            )
        promised = self._promised_integers(name, kind)
        if promised is None:
            raise LoadError(
                f"{path}: tensor {numbers} needs a quantization_config in the config that says "
                "whether it is of GPTQ or AWQ"
            )
        scales = self._own_name(name, kind.scales)
        if scales not in self._stored:
            raise LoadError(f"{path}: tensor {numbers} has no {scales} beside it")
        scale = self._stored[scales]
        if scale.dtype not in INT_SCALES:
            raise LoadError(
                f"{scale.path}: tensor {scales} has dtype {shown(scale.dtype)}; "
                f"supported: {', '.join(INT_SCALES)}"
            )
        if kind is CompressedInt:
            zeros = self._own_name(name, kind.zero_points) in self._stored
            order = self._own_name(name, kind.group_index) in self._stored
            promised = replace(promised, zeros=zeros, reordered=order)
        self._check_rows(name, scales, promised)
        group = self._group(name, scales, promised)
        return replace(promised, group=group, scale_dtype=scale.dtype)

    def _promised_integers(self, name: str, kind: type[Integers]) -> Integers | None:
        """What the config says of a matrix of whole numbers under the names of `kind`.

        The bits of those of compressed-tensors follow from the numbers in an int32.
        """
        stored = map(stored_kind, self._arch.quantization)
        promised = [k for k in stored if isinstance(k, Integers) and k.numbers == kind.numbers]
        if kind is not CompressedInt:
            return promised[0] if promised else None
        columns = self._matrix(name)[1]
        words = self._stored[self._own_name(name, kind.numbers)].shape[-1:]
        bits = 8 if words == [columns // 4] else 4
        fitting = [k for k in promised if k.bits == bits]
        # One group of all columns is one scale per row, if the config does not name it.
        named = (k for k in fitting if k.group == columns)
        return next(named, fitting[0] if fitting else CompressedInt(INT4_GROUPS[0], bits))

    def _check_rows(self, name: str, scales: str, kind: Integers) -> None:
        """Refuse a matrix of which an int32 has rows of several weights or heads, or too few."""
        parts = self._weights[name]
        blocks = num_blocks(self._arch, parts)
        for part in parts:
            rows = self._sizes[part][0] // blocks
            if rows % kind.row_unit:
                raise LoadError(
                    f"{self._stored[scales].path}: tensor {name} is {kind}, whose int32 have "
                    f"{kind.row_unit} rows each, but {part} has {rows} rows"
                    + (" of a head" if blocks > 1 else "")
                )

    def _group(self, name: str, scales: str, promised: Integers) -> int:
        """The columns of the matrix `name` that share a scale; 0: all."""
        shape = self._stored[scales].shape
        rows, columns = self._matrix(name)
        groups = 0
        if shape:
            groups = shape[0 if checkpoint_layout(self._arch, scales).transposed else -1]
        group = columns // groups if groups and columns % groups == 0 else 1
        if group == columns and promised.group != columns:
            group = 0
        if columns % INT4_GROUPS[0] or group % INT4_GROUPS[0]:
            raise LoadError(
                f"{self._stored[scales].path}: tensor {scales} has shape {shown(repr(shape))}; "
                f"supported for {name} {[rows, columns]} are one scale per row and one per group, "
                f"of a multiple of {INT4_GROUPS[0]} columns"
            )
        return group

    def _matrix(self, name: str) -> tuple[int, int]:
        """(rows, columns) of the weights that are stored as `name`, stacked."""
        parts = self._weights[name]
        rows = sum(self._sizes[part][0] for part in parts)
        return rows, self._sizes[parts[0]][1]

    def _own_name(self, name: str, own: str) -> str:
        """The checkpoint name of the tensor `own` of the module that has the weight `name`."""
        return checkpoint_name(self._arch, self._weights[name][0].removesuffix("weight") + own)

    def _numbers(self, name: str) -> list[StoredTensor]:
        """The tensors that may be the numbers of the weight `name`; of a right file one."""
        integers = (self._own_name(name, kind.numbers) for kind in (CompressedInt, Gptq))
        names = (name, name + "_blocks", *integers)
        return [self._stored[n] for n in names if n in self._stored]

    def _check_experts(self, name: str, kind: Format | None, told: dict[str, str]) -> None:
        """Refuse a weight of an expert that has another format than that of the expert before it.

        `told`: the formats of the weights of earlier experts, by format_name.
        """
        first = self._weights[name][0]
        numbers = self._numbers(name)
        if len(numbers) != 1 or expert_of(first) is None:
            return
        now = "plain" if kind is None else str(kind)
        before = told.setdefault(format_name(first), now)
        if before != now:
            raise LoadError(
                f"{numbers[0].path}: tensor {name} is {now}, but that of an earlier expert is "
                f"{before}; all experts of a layer need one format"
            )

    def _fp8(self, name: str, stored: StoredTensor) -> Fp8:
        """The format of a float8 matrix, or of one of each expert, by the shape of its scales."""
        scales = self._scales(name, stored)
        scale = self._stored[scales]
        suffix = scales.removeprefix(name)
        parts = self._weights[name]
        *lead, height, width = self._shapes[name]
        is_transposed = checkpoint_layout(self._arch, name).transposed
        rows, columns = (width, height) if is_transposed else (height, width)
        of_one = parts[: len(parts) // prod(lead)]  # expert
        promised = [k for k in self._arch.quantization if isinstance(k, Fp8) and k.columns]
        grids = {}
        for kind in promised or [FP8_BLOCK]:
            sizes = kind.grid((rows, columns))
            grids[kind] = [*lead, *(sizes[::-1] if is_transposed else sizes)]
        fitting = (kind for kind, sizes in grids.items() if sizes == scale.shape)
        block = next(fitting, next(iter(grids)))
        grid = grids[block]
        each = _without_ones(lead)
        # One block is one scale.
        is_grid = scale.shape == grid
        found = None if promised and is_grid else _without_ones(scale.shape)
        if found == [] and rows == 1 and self._promises(FP8_ROW):
            return replace(FP8_ROW, suffix=suffix)
        if found == []:
            self.shared[scales] = len(parts)
            return replace(FP8_TENSOR, suffix=suffix)
        if lead and found in (each, [*each, len(of_one)]):
            self.shared[scales] = len(of_one) if found == each else 1
            return replace(FP8_TENSOR, suffix=suffix)
        if is_grid:
            return replace(block, suffix=suffix)
        if found == [*each, *_without_ones([rows])]:
            return replace(FP8_ROW, suffix=suffix)
        per_expert = f"{[*lead, 1, 1]}, one per expert, " if lead else ""
        raise LoadError(
            f"{scale.path}: tensor {scales} has shape {shown(repr(scale.shape))}; supported for "
            f"{name} {[*lead, height, width]} are [], one scale, {per_expert}{[*lead, rows, 1]}, "
            f"one per row, and {grid}, one per block of {block.rows} x {block.columns}"
        )

    def _promises(self, kind: Format) -> bool:
        """Whether the config does. Of one row, a scale per row and one scale look alike."""
        return str(kind) in map(str, self._arch.quantization)

    def _int8(self, name: str, stored: StoredTensor) -> Format:
        """The format of an int8 matrix, by the shape of its scales."""
        if len(self._shapes[name]) != 2 or checkpoint_layout(self._arch, name).transposed:
            raise LoadError(
                f"{stored.path}: tensor {name} has dtype I8, which is supported only for a matrix "
                "[rows, columns]"
            )
        scales = self._scales(name, stored)
        scale = self._stored[scales]
        rows, columns = self._matrix(name)
        found = _without_ones(scale.shape)
        if found and found != [rows]:
            raise LoadError(
                f"{scale.path}: tensor {scales} has shape {shown(repr(scale.shape))}; supported "
                f"for {name} {[rows, columns]} are [], one scale, and {[rows, 1]}, one per row"
            )
        by_rows = bool(found) or rows == 1 and self._promises(Int8(rows=1))
        if not by_rows:
            self.shared[scales] = len(self._weights[name])
        self._int8_names.add(name)
        kind = Int8(rows=int(by_rows), suffix=scales.removeprefix(name))
        return kind if kind in self._arch.quantization else widened(kind)

    def _scales(self, name: str, stored: StoredTensor) -> str:
        """The name of the scales of a float8 or int8 tensor."""
        layout = checkpoint_layout(self._arch, name)
        of_scales = checkpoint_layout(self._arch, name + _SCALE_SUFFIXES[-1])
        if layout.interleaved or layout.transposed != of_scales.transposed:
            raise LoadError(
                f"{stored.path}: tensor {name} has dtype {stored.dtype}, which is not supported "
                "for a tensor that is stored transposed or interleaved"
            )
        suffixes = _SCALE_SUFFIXES[1:] if name.endswith("weight") else _SCALE_SUFFIXES
        names = [name + suffix for suffix in suffixes if name + suffix in self._stored]
        if len(names) != 1:
            problem = "several" if len(names) > 1 else "none"
            each = ", ".join(name + suffix for suffix in suffixes)
            raise LoadError(
                f"{stored.path}: tensor {name} has dtype {stored.dtype} and {problem} of {each}; "
                "one is needed"
            )
        return names[0]

    def _within_weights(self, name: str, kind: Fp8) -> Fp8:
        """The same format in smaller blocks, of which none lies over two of the weights that are
        stacked in the tensor `name`. Their scales are repeated in a file of its own.
        """
        shape = self._shapes[name]
        dim = len(shape) - 2  # of rows
        parts = self._weights[name]
        parts = parts[: len(parts) // prod(shape[:dim])]  # of one expert
        blocks = num_blocks(self._arch, parts)
        before_others = parts if blocks > 1 else parts[:-1]
        rows = gcd(kind.rows, *(self._sizes[part][0] // blocks for part in before_others))
        if rows == kind.rows:
            return kind
        dim += checkpoint_layout(self._arch, name).transposed
        own = name + kind.suffix
        stored = self._stored[own]
        self._slice(own, stored, tuple(stored.shape))  # it has its size
        data = bytearray(os.pread(stored.descriptor, stored.num_bytes, stored.offset))
        scales = torch.frombuffer(data, dtype=torch.uint8).view(*stored.shape, -1)
        scales = scales.repeat_interleave(kind.rows // rows, dim).narrow(
            dim, 0, -(-shape[dim] // rows)
        )
        file = self._opened.enter_context(open(os.memfd_create("scales"), "r+b", buffering=0))
        size = file.write(scales.numpy().tobytes())
        self._stored[own] = replace(
            stored, descriptor=file.fileno(), offset=0, num_bytes=size, shape=[*scales.shape[:-1]]
        )
        return replace(kind, rows=rows)

    def _slice(self, name: str, stored: StoredTensor, shape: tuple[int, ...]) -> TensorSlice:
        """The tensor's place. Raises LoadError for a wrong shape, size or dtype."""
        dtypes = _FLOAT8 if name in self._quantized else _PLAIN
        dtypes = _INT8 if name in self._int8_names else dtypes
        fits = stored.shape == list(shape)
        packed = [suffix for suffix in _PACKED if name.endswith(suffix)]
        if packed and name not in self._weights:
            dtypes = _PACKED[packed[0]]
        elif name not in self._weights and name != self._tied:
            dtypes = _EXACT[self._scale_dtypes.get(name, "F32")]
            fits = name in self.shared or _without_ones(stored.shape) == _without_ones(shape)
        if not fits:
            raise LoadError(
                f"{stored.path}: tensor {name} has shape {shown(repr(stored.shape))}, "
                f"the config asks for {list(shape)}"
            )
        if stored.dtype not in dtypes:
            raise LoadError(
                f"{stored.path}: tensor {name} has dtype {shown(stored.dtype)}; "
                f"supported: {', '.join(dtypes)}"
            )
        dtype = dtypes[stored.dtype]
        num_bytes = prod(stored.shape) * dtype.itemsize
        if stored.num_bytes != num_bytes:
            problem = f"tensor {name} has {stored.num_bytes} bytes, its shape {num_bytes}"
            raise incomplete(stored.path, problem)
        return TensorSlice(stored.path, stored.descriptor, stored.offset, dtype)

    def _is_unused(self, name: str, stored: StoredTensor) -> bool:
        """Whether a tensor that no weight needs belongs to a quantised weight."""
        weight = _weight_of(name)
        if name.endswith(_SHAPE):
            return weight + "_packed" in self._stored and stored.shape == [2]
        if not name.endswith(_INPUT_SCALES) or weight not in self._quantized:
            return False
        lead = self._shapes[weight][:-2]
        return _without_ones(stored.shape) in ([], _without_ones(lead))

    def _expected(self, name: str) -> Expected | None:
        """What must be in a tensor beside a weight of whole numbers; None: nothing certain."""
        weight = _weight_of(name)
        kind = self._integers_of.get(weight)
        if kind is None or name in self._weights:
            return None
        return expected_beside(kind, name.rsplit(".", 1)[1], *self._matrix(weight))


def _scale_dtypes(arch: Model) -> dict[str, str]:
    """Checkpoint name of the scales of whole numbers -> the dtype in which they are held.

    It is the same for all experts of a layer.
    """
    kinds = arch.integers_by_scales()
    return {
        name: kinds[format_name(parts[0])].scale_dtype
        for name, parts in checkpoint_tensors(arch).items()
        if format_name(parts[0]) in kinds
    }


def _left_over(stored: StoredTensor, name: str) -> LoadError:
    return LoadError(
        f"{stored.path}: tensor {shown(name)} is left over; the model has no place for it"
    )


def _told(formats: Sequence[Format]) -> str:
    return " and ".join(map(str, formats))


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _weight_of(name: str) -> str:
    """The name of the weight that a tensor of this name would hold scales of."""
    for suffix in (*_INPUT_SCALES, *_OF_MODULE):
        if name.endswith("." + suffix):
            return name.removesuffix(suffix) + "weight"
    for suffix in _INPUT_SCALES:
        if name.endswith("_" + suffix):
            return name.removesuffix("_" + suffix)
    for suffix in (*_SCALE_SUFFIXES, *_PACKED, _SHAPE):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def _scales_of(weight: str) -> set[str]:
    return {weight + suffix for suffix in _SCALE_SUFFIXES}
