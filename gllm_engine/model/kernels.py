"""Which kernels compute the layers of a model, on each kind of device.

The choice is that of `ops`; this module only asks for the kernels of every kind of layer.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch

from gllm_engine.arch.formats import Format, Fp8, Int8, Rounded, Widened
from gllm_engine.arch.model import Dense, EarlierIndexer, GatedDelta, Gqa, Layer, Mla, Moe
from gllm_engine.ops.kernels import (
    DeviceKind,
    attention_kernels,
    fp8_product_kernels,
    int8_product_kernels,
    latent_kernels,
    packed_product_kernels,
    product_kernels,
)


@dataclass(frozen=True)
class KernelUse:
    """The kernels of one kind of part, which `layers` layers have, by DeviceKind or "cpu"."""

    part: str
    layers: int
    kernels: dict[str, str]


@dataclass(frozen=True)
class _Dtypes:
    model: torch.dtype
    cache: torch.dtype


def kernels_of(
    layers: Sequence[Layer],
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    head: Format | None = None,
) -> list[KernelUse]:
    """The kernels of all parts of `layers`, and of matrix products last, for each format.

    `dtype`: of the weights on a GPU; `cache_dtype`: of K and V there. `head`: the format of the
    output projection; None: it is plain.
    """
    dtypes = _Dtypes(dtype, cache_dtype)
    counts = Counter(part for layer in layers for part in (layer.mixer, layer.ffn))
    uses = []
    for part, count in counts.items():
        name, kernels = _PARTS[type(part)]
        if kernels is not None:
            uses.append(KernelUse(name(part), count, _by_device(partial(kernels, part, dtypes))))
    formats = [_formats(layer) for layer in layers]
    layers_of = Counter(label for each in formats for label in each)
    products: list[tuple[str, int, Format | None]] = [
        ("products with plain matrices", len(layers), None)
    ]
    for label, kind in sorted(ChainMap(*formats).items()):
        products.append((f"products with {label}", layers_of[label], kind))
    if head is not None:
        products.append((f"output projection, {head}", 1, head))
    for what, count, own in products:
        uses.append(KernelUse(what, count, _by_device(partial(_of_format, own, dtype))))
    return uses


def _by_device(kernels: Callable[[DeviceKind], str]) -> dict[str, str]:
    return {device: kernels(device) for device in get_args(DeviceKind)} | {"cpu": "plain torch"}


def _formats(layer: Layer) -> dict[str, Format]:
    """The formats of a layer's matrices by what they are called, wherever a shard ends inside
    blocks. The matrices of experts are no products of their own.
    """
    formats = (*layer.mixer.formats, *layer.ffn.formats)
    return {str(kind): kind for name, kind in formats if ".experts." not in name}


def _of_format(kind: Format | None, dtype: torch.dtype, device: DeviceKind) -> str:
    """The kernels of products with weights of this format; None: with plain ones."""
    match kind:
        case Fp8() if kind.columns:
            return fp8_product_kernels(device, dtype, (kind.rows, kind.columns))
        case Fp8() | Rounded():
            return fp8_product_kernels(device, dtype, None)
        case Int8():
            return int8_product_kernels(device, dtype)
        case Widened() | None:
            return product_kernels(device, dtype)
    return packed_product_kernels(device)


def _heads(arch: Gqa) -> str:
    window = "" if arch.window is None else f", window {arch.window}"
    return f"attention, {arch.heads}/{arch.kv_heads} heads of {arch.head_dim}{window}"


def _latents(arch: Mla) -> str:
    chosen = ""
    if arch.indexer is not None:
        whose = "an earlier layer's" if isinstance(arch.indexer, EarlierIndexer) else "own"
        chosen = f", {whose} choice of {arch.indexer.top_k} tokens"
    return f"latent attention, {arch.heads} heads, latents of {arch.latent_width}{chosen}"


def _states(arch: GatedDelta) -> str:
    return f"gated delta rule, {arch.k_heads}/{arch.v_heads} heads of {arch.k_dim}/{arch.v_dim}"


def _experts(arch: Moe) -> str:
    return f"{len(arch.experts)} experts of {arch.hidden}, {arch.routing.top_k} a token"


def _of_heads(arch: Gqa, dtypes: _Dtypes, device: DeviceKind) -> str:
    return attention_kernels(device, arch.head_dim, dtypes.model, dtypes.cache)


def _of_latents(arch: Mla, dtypes: _Dtypes, device: DeviceKind) -> str:
    shape = arch.attention
    return latent_kernels(device, shape.key_dim, shape.value_dim, dtypes.model)


def _own(arch: object, dtypes: _Dtypes, device: DeviceKind) -> str:
    """For all shapes and dtypes."""
    del arch, dtypes, device
    return "Triton"


# Type of a part -> its name, and its kernels; None: only matrix products.
_PARTS: dict[
    type, tuple[Callable[[Any], str], Callable[[Any, _Dtypes, DeviceKind], str] | None]
] = {
    Gqa: (_heads, _of_heads),
    Mla: (_latents, _of_latents),
    GatedDelta: (_states, _own),
    Moe: (_experts, _own),
    Dense: (str, None),
}
