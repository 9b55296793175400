"""The checkpoint tensors of a model: their names, shapes and layouts, and the weights they hold.

This module knows names only; model/load.py reads the data.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from itertools import product
from typing import NamedTuple

from gllm_engine.arch.checkpoint import Layout, Names
from gllm_engine.arch.model import GatedDelta, Gqa, Model
from gllm_engine.arch.vision import VISUAL

_GPTQ = (".qweight", ".qzeros", ".scales")  # of GPTQ and AWQ; transposed in all checkpoints
# RoPE tables in old checkpoints. They are ignored, because the config determines them.
_ROPE_TABLES = re.compile(r"(^|\.)rotary_(pos_)?emb\.(inv_freq|cos_cached|sin_cached)$")
# Of compressed-tensors, in newer and older files, and of modelopt.
_CACHE_SCALES = re.compile(
    r"self_attn\.(([qkv]|kv)_scale|[kv]_proj\.output_(scale|zero_point)"
    r"|q_proj\.q_scale|k_proj\.k_scale|v_proj\.v_scale)"
)
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LAYERS = "model.layers."
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_INDEXER = "self_attn.indexer."


def checkpoint_name(model: Model, canonical: str) -> str:
    """The name of the checkpoint tensor that holds a weight."""
    if model.vision is not None and canonical.startswith(VISUAL):
        return _name(model.vision.names, canonical)
    return _name(model.names, canonical)


def _name(names: Names, canonical: str) -> str:
    variants = (variant.renames for variant in names.variants if variant.applies)
    for renames in (names.renames, *variants):
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
    model = replace(model, names=_as_stored(model.names, used))
    if model.vision is None:
        return model
    return replace(model, vision=replace(model.vision, names=_as_stored(model.vision.names, used)))


def _as_stored(names: Names, used: Collection[str]) -> Names:
    variants = tuple(
        replace(variant, applies=any(re.search(variant.mark, name) for name in used))
        for variant in names.variants
    )
    return replace(names, variants=variants)


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
    multi-token prediction or for images that the model does not take, or of an indexer that an
    earlier layer's replaces.

    Names may have any of the prefixes that checkpoints of the family have.
    """
    patterns = _patterns(model.names)
    if _ROPE_TABLES.search(name) or (patterns.unused and patterns.unused.match(name)):
        return True
    unused = patterns.tower
    if model.vision is not None:
        own = model.vision.names.unused
        unused = None if own is None else re.compile(own)
    if unused and unused.match(name):
        return True
    layer = patterns.layer.match(name)
    if layer is None:
        return False
    number = int(layer["number"])
    if number >= len(model.layers):
        return number < len(model.layers) + model.extra_layers
    return layer["rest"].startswith(_INDEXER) and model.layers[number].needs_earlier


def has_tower(model: Model, stored: Collection[str]) -> bool:
    """Whether a checkpoint with the tensors `stored` has any of a vision tower."""
    tower = _patterns(model.names).tower
    return tower is None or any(map(tower.match, stored))


def is_cache_scale(model: Model, name: str) -> bool:
    """Whether a checkpoint tensor is a scale for K, V or queries in float8, which layers do not
    use.
    """
    layer = _patterns(model.names).layer.match(name)
    return layer is not None and _CACHE_SCALES.fullmatch(layer["rest"]) is not None


class _Patterns(NamedTuple):
    """`layer`: of all names in a layer, with the groups `number` and `rest`. `unused`, `tower`: see
    Names.
    """

    layer: re.Pattern[str]
    unused: re.Pattern[str] | None
    tower: re.Pattern[str] | None


@cache
def _patterns(names: Names) -> _Patterns:
    """For all prefixes that the variants of the names give."""
    layers = set()
    for applies in product((False, True), repeat=len(names.variants)):
        pairs = zip(names.variants, applies, strict=True)
        variants = tuple(replace(variant, applies=flag) for variant, flag in pairs)
        layers.add(_name(replace(names, variants=variants), _LAYERS))
    layer = re.compile(rf"(?:{_any_of(layers)})(?P<number>\d+)\.(?P<rest>.*)")
    # Beside the layers, or outside of the models that they are in.
    outer = {prefix[: at.end()] for prefix in layers for at in re.finditer(r"\.", prefix[:-1])}
    both = (names.unused, names.tower)
    unused, tower = (
        None if what is None else re.compile(rf"(?:{_any_of(outer)}|)(?:{what})") for what in both
    )
    return _Patterns(layer, unused, tower)


def _any_of(prefixes: set[str]) -> str:
    return "|".join(map(re.escape, sorted(prefixes)))
