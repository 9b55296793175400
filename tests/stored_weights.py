"""How a checkpoint's tensor holds its weights, undone in the plainest way."""

from __future__ import annotations

from torch import Tensor

from gllm_engine.arch import Model
from gllm_engine.arch.names import checkpoint_layout, checkpoint_tensors, expert_of, num_blocks


def weights_in(model: Model, name: str, stored: Tensor) -> dict[str, Tensor]:
    """Canonical name -> weight, for the weights that the tensor `name` holds."""
    parts = checkpoint_tensors(model)[name]
    experts = list(dict.fromkeys(expert_of(part) for part in parts))
    if len(experts) == 1:
        return _weights_in(model, name, parts, stored)
    found: dict[str, Tensor] = {}
    for expert, matrix in zip(experts, stored, strict=True):
        own = tuple(part for part in parts if expert_of(part) == expert)
        found |= _weights_in(model, name, own, matrix)
    return found


def _weights_in(
    model: Model, name: str, parts: tuple[str, ...], stored: Tensor
) -> dict[str, Tensor]:
    shapes = model.weights()
    rows = [shapes[part][0] for part in parts]
    layout = checkpoint_layout(model, name)
    if layout.transposed:
        stored = stored.T
    if layout.interleaved:
        return {part: stored[i :: len(parts)] for i, part in enumerate(parts)}
    stored = stored.reshape(sum(rows), *shapes[parts[0]][1:])
    blocks = num_blocks(model, parts)
    by_block = stored.unflatten(0, (blocks, -1)).split([count // blocks for count in rows], 1)
    return {part: rows.flatten(0, 1) for part, rows in zip(parts, by_block, strict=True)}
