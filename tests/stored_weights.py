"""How a checkpoint's tensor holds its weights, undone in the plainest way."""

from __future__ import annotations

from torch import Tensor

from gllm_engine.arch import Model
from gllm_engine.arch.names import checkpoint_tensors, is_transposed, num_blocks


def weights_in(model: Model, name: str, stored: Tensor) -> dict[str, Tensor]:
    """Canonical name -> weight, for the weights that the tensor `name` holds."""
    parts = checkpoint_tensors(model)[name]
    shapes = model.weights()
    rows = [shapes[part][0] for part in parts]
    if is_transposed(model, name):
        return dict(zip(parts, stored.T.split(rows), strict=True))
    stored = stored.reshape(sum(rows), *shapes[parts[0]][1:])
    blocks = num_blocks(model, parts)
    by_block = stored.unflatten(0, (blocks, -1)).split([count // blocks for count in rows], 1)
    return {part: rows.flatten(0, 1) for part, rows in zip(parts, by_block, strict=True)}
