"""The checkpoint tensors of a model: their names, shapes and layouts, and the weights they hold.

This module knows names only; model/load.py reads the data.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from gllm_engine.arch.checkpoint import Layout
from gllm_engine.arch.model import GatedDelta, Gqa, Model

_GPTQ = (".qweight", ".qzeros", ".scales")  # of GPTQ and AWQ; transposed in all checkpoints
# RoPE tables in old checkpoints. They are ignored, because the config determines them.
_ROPE_TABLES = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.(inv_freq|cos_cached|sin_cached)"
)
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def checkpoint_name(model: Model, canonical: str) -> str:
    """The name of the checkpoint tensor that holds a weight."""
    variants = (variant.renames for variant in model.names.variants if variant.applies)
    for renames in (model.names.renames, *variants):
        for old, new in renames:
            canonical = _renamed(canonical, old, new)
    return canonical


def _renamed(name: str, old: str, new: str) -> str:
    before, number, after = old.partition("*")
    if number:
        return re.sub(rf"{re.escape(before)}\d+{re.escape(after)}", new, name)
    return name.replace(old, new)


def checkpoint_layout(model: Model, name: str) -> Layout:
    """The layout of a checkpoint tensor."""
    found = (layout for pattern, layout in model.names.layouts if re.search(pattern, name))
    layout = next(found, Layout())
    return replace(layout, transposed=True) if name.endswith(_GPTQ) else layout


def is_shared(name: str) -> bool:
    """Whether all weights that are stored in one tensor share the tensor `name` beside it: the
    groups of their columns.
    """
    return name.endswith("g_idx")


def expert_of(name: str) -> str | None:
    """The number of the expert that has the weight or tensor `name`; None: it is no expert's."""
    expert = _EXPERT.search(name)
    return None if expert is None else expert[1]


def checkpoint_tensors(model: Model) -> dict[str, tuple[str, ...]]:
    """Checkpoint tensor name -> the canonical weights it holds, in the order of the stack."""
    tensors: dict[str, tuple[str, ...]] = {}
    for weight in model.weights():
        name = checkpoint_name(model, weight)
        tensors[name] = (*tensors.get(name, ()), weight)
    return tensors


def with_stored_names(model: Model, stored: Collection[str]) -> Model:
    """The model with the variants of its names that a checkpoint with the tensors `stored` has."""
    used = [name for name in stored if not is_left_over(model, name)]
    variants = tuple(
        replace(variant, applies=any(re.search(variant.mark, name) for name in used))
        for variant in model.names.variants
    )
    return replace(model, names=replace(model.names, variants=variants))


def num_blocks(model: Model, weights: tuple[str, ...]) -> int:
    """The number of blocks of a checkpoint tensor that holds `weights`: each block has so many
    equal parts of each of them, in their order. 1: the weights are stacked whole.
    """
    layer = _LAYER.match(weights[0])
    if layer is None or not checkpoint_layout(model, checkpoint_name(model, weights[0])).by_head:
        return 1
    mixer = model.layers[int(layer[1])].mixer
    if isinstance(mixer, GatedDelta):
        return mixer.k_heads
    assert isinstance(mixer, Gqa)
    return mixer.heads


def checkpoint_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Checkpoint tensor name -> its shape."""
    shapes = model.weights()
    found = {}
    for name, parts in checkpoint_tensors(model).items():
        stacked = parts[:1] if is_shared(name) else parts
        rows = sum(shapes[part][0] for part in stacked)
        count = len({expert_of(part) for part in stacked})
        shape = (rows // count, *shapes[parts[0]][1:])
        layout = checkpoint_layout(model, name)
        if layout.transposed:
            shape = shape[::-1]
        if layout.as_row:
            shape = (1, *shape)
        of_all_experts = expert_of(parts[0]) is not None and expert_of(name) is None
        found[name] = (count, *shape) if of_all_experts else shape
    return found


def is_left_over(model: Model, name: str) -> bool:
    """Whether a checkpoint tensor is ignored: the config determines its values, or it is only for
    multi-token prediction or for images.
    """
    unused = model.names.unused
    if _ROPE_TABLES.fullmatch(name) or (unused is not None and re.match(unused, name)):
        return True
    layer = _LAYER.match(name)
    return layer is not None and 0 <= int(layer[1]) - len(model.layers) < model.extra_layers
