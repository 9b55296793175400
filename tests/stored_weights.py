"""How a checkpoint's tensor holds its weights, undone in the plainest way."""

from __future__ import annotations

from torch import Tensor

from gllm_engine.arch import Model
from gllm_engine.arch.names import checkpoint_tensors, expert_of, is_transposed, num_blocks


def weights_in(model: Model, name: str, stored: Tensor) -> dict[str, Tensor]:
    """Canonical name -> weight, for the weights that the tensor `name` holds."""
    parts = checkpoint_tensors(model)[name]
    blocks = num_blocks(model, parts)
    shapes = model.weights()
    of_all_experts = expert_of(parts[0]) is not None and expert_of(name) is None
    found = {}
    for i, stack in enumerate(stored if of_all_experts else [stored]):
        own = [part for part in parts if not of_all_experts or expert_of(part) == str(i)]
        rows = [shapes[part][0] for part in own]
        whole = stack.T if is_transposed(model, name) else stack
        whole = whole.reshape(sum(rows), *shapes[own[0]][1:])
        by_block = whole.unflatten(0, (blocks, -1)).split([count // blocks for count in rows], 1)
        found |= {part: rows.flatten(0, 1) for part, rows in zip(own, by_block, strict=True)}
    assert found.keys() == set(parts)
    return found
