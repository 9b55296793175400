"""Where a checkpoint tensor holds each of its weights, in numbers from its beginning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from math import prod

from gllm_engine.arch.checkpoint import Layout
from gllm_engine.arch.formats import Shapes
from gllm_engine.arch.model import Model
from gllm_engine.arch.names import (
    checkpoint_layout,
    checkpoint_tensors,
    expert_of,
    is_shared,
    num_blocks,
)


@dataclass(frozen=True)
class Place:
    """A matrix in a tensor holds a weight in columns `first`, `first + step`, `first + 2 * step`
    and so on.

    The matrix begins at number `offset` of the tensor, and its rows have `width` numbers. A row of
    it has `rows` rows of the weight [rows, columns] or, if `transposed`, a column of the weight;
    the column is in `blocks` equal parts, which are width // blocks numbers apart.
    """

    offset: int
    width: int
    first: int = 0
    step: int = 1
    rows: int = 1
    transposed: bool = False
    blocks: int = 1


def checkpoint_places(model: Model) -> dict[str, Place]:
    """Canonical weight name -> its place in the tensor that `checkpoint_tensors` gives."""
    shapes = model.weights()
    places: dict[str, Place] = {}
    for name, parts in checkpoint_tensors(model).items():
        if is_shared(name):
            places |= dict.fromkeys(parts, Place(0, 1))
            continue
        layout = checkpoint_layout(model, name)
        blocks = num_blocks(model, parts)
        if 1 < blocks <= shapes[parts[0]][0]:  # one scale of a whole weight has no blocks
            in_blocks = _in_columns if layout.transposed else _in_blocks
            places |= zip(parts, in_blocks(parts, shapes, blocks), strict=True)
            continue
        offset = 0
        for _, part in groupby(parts, expert_of):
            stacked = tuple(part)
            places |= zip(stacked, _stacked(stacked, shapes, layout, offset), strict=True)
            offset += sum(prod(shapes[weight]) for weight in stacked)
    return places


def _stacked(
    weights: tuple[str, ...], shapes: Shapes, layout: Layout, offset: int
) -> Iterator[Place]:
    """The places of weights that are stacked from number `offset` on."""
    count = len(weights)
    width = prod(shapes[weights[0]][1:])
    rows = sum(shapes[weight][0] for weight in weights)
    row = 0
    for i, weight in enumerate(weights):
        match layout:
            case Layout(transposed=True, interleaved=True):
                yield Place(offset, rows, i, count, transposed=True)
            case Layout(transposed=True):
                yield Place(offset, rows, row, transposed=True)
            case Layout(interleaved=True):
                yield Place(offset, count * width, i * width)
            case _:
                yield Place(offset + row * width, width)
        row += shapes[weight][0]


def _in_blocks(weights: tuple[str, ...], shapes: Shapes, blocks: int) -> Iterator[Place]:
    """The places of weights that take turns in equal parts, `blocks` times."""
    width = sum(prod(shapes[weight]) for weight in weights) // blocks
    first = 0
    for weight in weights:
        shape = shapes[weight]
        yield Place(0, width, first, rows=shape[0] // blocks)
        first += prod(shape) // blocks


def _in_columns(weights: tuple[str, ...], shapes: Shapes, blocks: int) -> Iterator[Place]:
    """As _in_blocks, of the transposed matrix."""
    width = sum(shapes[weight][0] for weight in weights)
    first = 0
    for weight in weights:
        yield Place(0, width, first, transposed=True, blocks=blocks)
        first += shapes[weight][0] // blocks
