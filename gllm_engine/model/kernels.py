"""Which kernels compute the layers of a model, on each kind of device.

The choice is that of `ops`; this module only asks for the kernels of every kind of layer.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

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

Part = Gqa | Mla | GatedDelta | Moe


@dataclass(frozen=True)
class KernelUse:
    """The kernels of a part of the model, which `layers` layers have, by kind of device: hopper,
    gpu (any other GPU), cpu.
    """

    part: str
    layers: int
    kernels: dict[str, str]


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
    counts = Counter(part for layer in layers for part in (layer.mixer, layer.ffn))
    uses = []
    for part, count in counts.items():
        if not isinstance(part, Dense):  # which has only matrix products
            kernels = partial(_of_part, part, dtype, cache_dtype)
            uses.append(KernelUse(_name(part), count, _by_device(kernels)))
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


def _name(part: Part) -> str:
    match part:
        case Gqa():
            window = "" if part.window is None else f", window {part.window}"
            return f"attention, {part.heads}/{part.kv_heads} heads of {part.head_dim}{window}"
        case Mla():
            chosen = ""
            if part.indexer is not None:
                whose = "an earlier layer's" if isinstance(part.indexer, EarlierIndexer) else "own"
                chosen = f", {whose} choice of {part.indexer.top_k} tokens"
            latents = f"{part.heads} heads, latents of {part.latent_width}"
            return f"latent attention, {latents}{chosen}"
        case GatedDelta():
            heads = f"{part.k_heads}/{part.v_heads} heads of {part.k_dim}/{part.v_dim}"
            return f"gated delta rule, {heads}"
        case Moe():
            return f"{len(part.experts)} experts of {part.hidden}, {part.routing.top_k} a token"


def _of_part(part: Part, dtype: torch.dtype, cache_dtype: torch.dtype, device: DeviceKind) -> str:
    match part:
        case Gqa():
            return attention_kernels(device, part.attention, dtype, cache_dtype)
        case Mla():
            shape = part.attention
            return latent_kernels(device, shape.key_dim, shape.value_dim, dtype)
    return "Triton"  # for all shapes and dtypes
