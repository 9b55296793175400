"""Where a checkpoint tensor holds each of its weights, in numbers from its beginning."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from math import prod

from gllm_engine.arch.model import Model, Shapes
from gllm_engine.arch.names import checkpoint_tensors, expert_of, is_transposed, num_blocks


@dataclass(frozen=True)
class Place:
    """A matrix in a tensor holds a weight in columns `first`, `first + step`, `first + 2 * step`
    and so on.

    The matrix begins at number `offset` of the tensor, and its rows have `width` numbers. It has
    the rows of the weight [rows, columns] or, if `transposed`, the columns of the weight as rows.
    `rows`: so many rows of the weight are one row of the matrix.
    """

    offset: int
    width: int
    first: int = 0
    step: int = 1
    transposed: bool = False
    rows: int = 1


def checkpoint_places(model: Model) -> dict[str, Place]:
    """Canonical weight name -> its place in the tensor that `checkpoint_tensors` gives."""
    shapes = model.weights()
    places = {}
    for name, parts in checkpoint_tensors(model).items():
        transposed = is_transposed(model, name)
        blocks = num_blocks(model, parts)
        offset = 0
        for _, part in groupby(parts, expert_of):
            stacked = {weight: shapes[weight] for weight in part}
            if transposed:
                places |= _transposed(stacked, blocks, offset)
            else:
                places |= _stacked(stacked, blocks, offset)
            offset += sum(map(prod, stacked.values()))
    return places


def _stacked(shapes: Shapes, blocks: int, offset: int) -> dict[str, Place]:
    """The places of weights of these shapes, in `blocks` blocks from number `offset` on."""
    places = {}
    block = sum(map(prod, shapes.values())) // blocks
    first = 0
    for name, shape in shapes.items():
        columns = prod(shape[1:])
        if blocks == 1:
            places[name] = Place(offset + first, columns)
        else:
            places[name] = Place(offset, block, first, rows=shape[0] // blocks)
        first += prod(shape) // blocks
    return places


def _transposed(shapes: Shapes, blocks: int, offset: int) -> dict[str, Place]:
    """As _stacked, of a transposed matrix. A block has one row of each weight."""
    places = {}
    width = sum(rows for rows, _ in shapes.values())
    first = 0
    for name, (rows, _) in shapes.items():
        assert blocks in (1, rows)
        step = 1 if blocks == 1 else len(shapes)
        places[name] = Place(offset, width, first, step, transposed=True)
        first += rows if blocks == 1 else 1
    return places
