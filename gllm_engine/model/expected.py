"""Tensors that GPTQ stores beside every weight: what their numbers must be.

Most say what the config says too, so that nothing is computed with them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gllm_engine.arch.formats import Gptq, Integers

_CONFIG = "but the config's quantization_config says"


class Expected(NamedTuple):
    """The shape of a tensor and a test of its numbers. `otherwise`: what it has if they fail it."""

    shape: tuple[int, ...]
    is_right: Callable[[Tensor], bool]
    otherwise: str


def expected_beside(kind: Integers, own: str, rows: int, columns: int) -> Expected | None:
    """What must be in the tensor `own` of a module whose weight [rows, columns] is `kind`.

    None: there is no such tensor, or any numbers are right.
    """
    group = kind.group or columns
    groups = columns // group
    if own == "bias":
        return Expected(
            (rows,),
            partial(_are_all, 0),
            "a bias that is not zero, and the model has no place for it",
        )
    if own == kind.group_index and kind.reordered:
        return Expected((columns,), partial(_are_below, groups), "numbers that are no group's")
    if own == kind.group_index:
        return Expected(
            (columns,),
            partial(_are_in_order, group),
            f"columns in groups out of order, {_CONFIG} desc_act: false",
        )
    if own == kind.zero_points and isinstance(kind, Gptq) and not kind.zeros:
        middle = 1 << (kind.bits - 1)
        word = sum((middle - kind.less_one) << shift for shift in range(0, 32, kind.bits))
        return Expected(
            (groups, rows // kind.in_word),
            partial(_are_all, word),
            f"zero points other than {middle}, {_CONFIG} sym: true",
        )
    return None


def _are_all(number: int, found: Tensor) -> bool:
    """Whether all are `number`, or for int32 the same 32 bits."""
    return bool((found == torch.tensor(number).to(found.dtype)).all())


def _are_in_order(group: int, found: Tensor) -> bool:
    return torch.equal(found, torch.arange(len(found)).to(found.dtype) // group)


def _are_below(groups: int, found: Tensor) -> bool:
    return bool(((found >= 0) & (found < groups)).all())
