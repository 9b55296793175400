"""Reads `quantization_config` of a config.json: the format that it promises for a model's matrices.

Which matrices have the format is not read here: the checkpoint's tensors tell it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gllm_engine.arch.fields import ArchError, Fields
from gllm_engine.arch.formats import (
    FP8_BLOCK,
    FP8_ROW,
    FP8_TENSOR,
    INT4_GROUPS,
    Format,
    Fp8,
    Int4,
    Mxfp4,
)
from gllm_engine.files import shown

_KEY = "quantization_config"


def read_quantization(c: Fields) -> Format | None:
    """The format in `quantization_config`; None if the key is absent.

    Raises ArchError for a method or format that is not supported.
    """
    q = c.child(_KEY)
    if not q.keys():
        return None
    method = q.text("quant_method", "")
    if method not in _METHODS:
        raise ArchError(
            f"{q.name}: quant_method is {shown(repr(method))}; supported are {', '.join(_METHODS)}"
        )
    return _METHODS[method](q)


def _fp8(q: Fields) -> Fp8:
    q.require(fmt="e4m3")
    q.choice("activation_scheme", ("dynamic", "static"), "dynamic")
    if (block := q.sizes("weight_block_size", 2)) is None:
        return FP8_TENSOR
    return replace(FP8_BLOCK, rows=block[0], columns=block[1])


def _fbgemm(q: Fields) -> Fp8:
    del q  # an upper bound of the inputs' scales
    return FP8_ROW


def _mxfp4(q: Fields) -> Mxfp4:
    del q  # lists of modules that are plain, which the files tell
    return Mxfp4()


def _compressed_tensors(q: Fields) -> Format:
    """One group of layers with weights of one format; a scheme of activations only says when they
    round.
    """
    packed = "pack-quantized"
    kind = q.choice("format", ("float-quantized", packed), "float-quantized")
    groups = q.child("config_groups")
    names = groups.keys()
    if len(names) != 1:
        raise ArchError(f"{q.name}: config_groups has {len(names)} groups; 1 is supported")
    weights = groups.child(names[0]).child("weights")
    if kind == packed:
        return _int4(weights)
    weights.require(num_bits=8, type="float", symmetric=True, dynamic=False)
    strategy = weights.choice("strategy", ("tensor", "channel", "block"), "tensor")
    if strategy == "block":
        rows, columns = weights.sizes("block_structure", 2) or (128, 128)
        return Fp8(rows, columns)
    return FP8_ROW if strategy == "channel" else FP8_TENSOR


def _int4(weights: Fields) -> Int4:
    weights.require(num_bits=4, type="int", symmetric=True, dynamic=False, strategy="group")
    weights.choice("actorder", ("static", "weight"), "static")  # others reorder columns
    group = weights.count("group_size")
    if group not in INT4_GROUPS:
        allowed = ", ".join(map(str, INT4_GROUPS))
        raise ArchError(f"{weights.name}: group_size is {group}; supported are {allowed}")
    return Int4(group)


def _modelopt(q: Fields) -> Fp8:
    formats = {
        "FP8": FP8_TENSOR,
        "FP8_PER_CHANNEL_PER_TOKEN": FP8_ROW,
        "FP8_PB_WO": Fp8(128, 128),
    }
    return formats[q.choice("quant_algo", tuple(formats))]


_METHODS: dict[str, Callable[[Fields], Format]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
}
