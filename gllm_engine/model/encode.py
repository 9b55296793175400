"""Writes weights in the formats of quantised checkpoints, as the tools that make these do."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from gllm_engine.arch.formats import Awq, Format, Fp8, Gptq, Int8, Integers, Mxfp4, format_name
from gllm_engine.arch.layout import Place, checkpoint_places
from gllm_engine.arch.model import Model
from gllm_engine.arch.names import (
    checkpoint_layout,
    checkpoint_name,
    checkpoint_shapes,
    checkpoint_tensors,
)
from gllm_engine.ops import quantize_fp8, quantize_int8, quantize_mxfp4

_SCALE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def in_formats(arch: Model, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Checkpoint tensors in the formats of `arch`; of plain weights, in `dtype`.

    `tensors`: the checkpoint's, all plain.
    """
    kinds = arch.stored_kinds()
    names = checkpoint_tensors(arch)
    weights = checkpoint_tensors(arch.with_formats({}))
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        kind = kinds.get(format_name(weights[name][0])) if name in weights else None
        if isinstance(kind, Fp8):
            transposed = checkpoint_layout(arch, name).transposed
            matrix = tensor.mT if transposed else tensor
            numbers, scales = quantize_fp8(matrix, kind.rows, kind.columns)
            result[name] = numbers.mT.contiguous() if transposed else numbers
            result[name + kind.suffix] = scales.mT.contiguous() if transposed else scales
        elif isinstance(kind, Int8):
            result[name], result[name + kind.suffix] = quantize_int8(tensor, kind.rows)
        elif name in names:
            result[name] = tensor.to(dtype)
    result |= _packed(arch, tensors, kinds)
    for kind in set(kinds.values()):
        if isinstance(kind, Gptq):
            result |= _beside_gptq(result, kind)
    return result


def stored_weight(tensor: Tensor, place: Place, shape: tuple[int, ...]) -> Tensor:
    """The view of the weight of shape `shape` that is at `place` in a checkpoint tensor; it has the
    weight's numbers in their order, but not its shape.
    """
    at = place.offset + place.first
    if place.transposed:
        blocks = (place.blocks, shape[0] // place.blocks, prod(shape[1:]))
        strides = (place.width // place.blocks, place.step, place.width)
        return tensor.as_strided(blocks, strides, at)
    size = (shape[0] // place.rows, place.rows * prod(shape[1:]))
    return tensor.as_strided(size, (place.width, place.step), at)


def _packed(arch: Model, tensors: dict[str, Tensor], kinds: dict[str, Format]) -> dict[str, Tensor]:
    """The checkpoint tensors of the weights that `arch` has as packed numbers.

    `kinds`: Model.stored_kinds.
    """
    plain = arch.with_formats({})
    plain_shapes = plain.weights()
    plain_places = checkpoint_places(plain)
    sizes = checkpoint_shapes(arch)
    shapes = arch.weights()
    places = checkpoint_places(arch)
    result: dict[str, Tensor] = {}
    for name, parts in checkpoint_tensors(plain).items():
        for part in parts if name not in sizes else ():
            matrix = stored_weight(tensors[name], plain_places[part], plain_shapes[part])
            matrix = matrix.reshape(plain_shapes[part])
            for own, numbers in _encoded(part, matrix, kinds[format_name(part)]).items():
                stored = checkpoint_name(arch, own)
                if stored not in result:
                    result[stored] = torch.empty(sizes[stored], dtype=numbers.dtype)
                view = stored_weight(result[stored], places[own], shapes[own])
                view.copy_(numbers.reshape(view.shape))
    return result


def _encoded(weight: str, matrix: Tensor, kind: Format) -> dict[str, Tensor]:
    """Name -> tensor that a weight is stored as, with the shapes of Format.tensors."""
    if isinstance(kind, Mxfp4):
        numbers, scales = quantize_mxfp4(matrix)
        return {weight + "_blocks": numbers, weight + "_scales": scales}
    assert isinstance(kind, Integers)
    module = weight.removesuffix("weight")
    groups = torch.arange(matrix.shape[1]) // (kind.group or matrix.shape[1])
    if kind.reordered:  # the same for all weights, as of those that are stored in one tensor
        groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))]
    codes, scales, zeros = _quantize(matrix, groups, kind)
    along = 0 if kind.along_rows else 1
    tensors = {module + kind.numbers: _words(codes, kind, along), module + kind.scales: scales}
    if kind.zeros:
        words = _words(zeros, kind, 0)
        if isinstance(kind, Gptq) and kind.less_one:
            words -= sum(1 << shift for shift in range(0, 32, kind.bits))
        tensors[module + kind.zero_points] = words
    if kind.reordered:
        tensors[module + kind.group_index] = groups.int()
    return tensors


def _quantize(matrix: Tensor, groups: Tensor, kind: Integers) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [rows, columns], scales [rows, n], zero points [rows, n]); `groups`: of each column.

    If zero points are stored, the range of a group is from its least number or 0 to its largest or
    0; else the range is symmetric.
    """
    count = int(groups.max()) + 1
    most = (1 << kind.bits) - 1
    middle = 1 << (kind.bits - 1)
    parts = [matrix[:, groups == group] for group in range(count)]
    low = torch.stack([part.amin(1) for part in parts], 1).clamp(max=0)
    high = torch.stack([part.amax(1) for part in parts], 1).clamp(min=0)
    if not kind.zeros:
        high = torch.maximum(high, -low) / (middle - 1) * most
        low = torch.zeros_like(low)
    scales = ((high - low) / most).clamp(min=2.0**-14).to(_SCALE_DTYPES[kind.scale_dtype])
    zeros = (-low / scales.float()).round().clamp(0, most).int() if kind.zeros else None
    if zeros is None:
        zeros = torch.full(scales.shape, middle, dtype=torch.int32)
    codes = (matrix / scales.float()[:, groups]).round().int() + zeros[:, groups]
    return codes.clamp(0, most), scales, zeros


def _words(codes: Tensor, kind: Integers, dim: int) -> Tensor:
    """int32, each of which holds several codes along a dimension."""
    order = _AWQ_ORDER if isinstance(kind, Awq) else range(kind.in_word)
    parts = codes.unflatten(dim, (-1, kind.in_word)).long()
    words = sum(parts.select(dim + 1, n) << (kind.bits * i) for i, n in enumerate(order))
    assert isinstance(words, Tensor)
    return words.int()


def _beside_gptq(tensors: dict[str, Tensor], kind: Gptq) -> dict[str, Tensor]:
    """What GPTQ stores beside every weight, though it says what the config says."""
    found = {}
    word = sum((1 << (kind.bits - 1)) - kind.less_one << shift for shift in range(0, 32, kind.bits))
    for name, numbers in tensors.items():
        if name.endswith("." + kind.numbers):
            module = name.removesuffix(kind.numbers)
            columns = len(numbers) * kind.in_word
            groups, rows = tensors[module + kind.scales].shape
            if not kind.reordered:
                order = torch.arange(columns, dtype=torch.int32) // (columns // groups)
                found[module + kind.group_index] = order
            if not kind.zeros:
                words = torch.full((groups, rows // kind.in_word), word).int()
                found[module + kind.zero_points] = words
    return found
