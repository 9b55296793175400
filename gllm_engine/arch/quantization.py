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
    Awq,
    CompressedInt,
    Format,
    Fp8,
    Gptq,
    Integers,
    Mxfp4,
    widened,
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
    q.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
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
    if not q.child("transform_config").empty:
        raise ArchError(f"{q.name}: transform_config is not supported: inputs would be rotated")
    packed = "pack-quantized"
    kind = q.choice("format", ("float-quantized", packed), "float-quantized")
    groups = q.child("config_groups")
    names = groups.keys()
    if len(names) != 1:
        raise ArchError(f"{q.name}: config_groups has {len(names)} groups; 1 is supported")
    weights = groups.child(names[0]).child("weights")
    if kind == packed:
        return _compressed_int(weights)
    weights.require(num_bits=8, type="float", symmetric=True, dynamic=False)
    strategy = weights.choice("strategy", ("tensor", "channel", "block"), "tensor")
    if strategy == "block":
        rows, columns = weights.sizes("block_structure", 2) or (128, 128)
        return Fp8(rows, columns)
    return FP8_ROW if strategy == "channel" else FP8_TENSOR


def _compressed_int(weights: Fields) -> Format:
    weights.require(type="int", dynamic=False)
    weights.choice("actorder", ("static", "weight"), "static")  # others reorder columns
    strategy = weights.choice("strategy", ("group", "channel"), "group")
    group = 0 if strategy == "channel" else _group(weights, "group_size")
    zeros = not weights.flag("symmetric", True)
    return _held(CompressedInt(group, _bits(weights, "num_bits"), zeros))


def _gptq(q: Fields) -> Format:
    q.require(is_marlin_format=False, pack_dtype="int32", lm_head=False)
    version = _version(q, "checkpoint_format", ("gptq", "gptq_v2"))
    _check_overrides(q)
    group = _group(q, "group_size")
    # Static groups are chosen before the columns are reordered, so they are whole.
    reordered = q.flag("desc_act") and not q.flag("static_groups") and group > 0
    return _held(
        Gptq(
            group,
            _bits(q, "bits"),
            zeros=not q.flag("sym"),
            reordered=reordered,
            less_one=version == "gptq",
        )
    )


def _check_overrides(q: Fields) -> None:
    """Rules for single modules may only leave modules plain, which the files tell."""
    rules = q.child("dynamic")
    for rule in rules.keys():
        if not rule.startswith("-:") and not rules.child(rule).empty:
            raise ArchError(
                f"{rules.name}: {shown(repr(rule))} changes the format of some modules, which is "
                'not supported; a rule that begins with "-:" leaves modules plain'
            )


def _awq(q: Fields) -> Format:
    q.require(zero_point=True)
    _version(q, "version", ("gemm",))
    if q.text("backend", "auto") == "llm-awq":
        raise ArchError(f"{q.name}: backend is 'llm-awq', whose tensors are not supported")
    group = _group(q, "q_group_size" if q.has("q_group_size") else "group_size")
    bits = _bits(q, "w_bit" if q.has("w_bit") else "bits")
    if bits != 4:
        raise ArchError(f"{q.name}: bits is {bits}, but of AWQ only 4 is supported")
    return Awq(group)


def _version(q: Fields, key: str, allowed: tuple[str, ...]) -> str:
    """The form of the tensors, which newer tools write as `format`; the first one if absent."""
    key = key if q.has(key) else "format"
    version = q.text(key, allowed[0]).lower()
    if version not in allowed:
        raise ArchError(
            f"{q.name}: {key} is {shown(repr(version))}; supported are {', '.join(allowed)}"
        )
    return version


def _bits(c: Fields, key: str) -> int:
    bits = c.count(key)
    if bits not in (4, 8):
        raise ArchError(f"{c.name}: {key} is {bits}; supported are 4 and 8")
    return bits


def _group(c: Fields, key: str) -> int:
    """The columns that share a scale; 0: all columns, which is -1 in configs."""
    group = c.count(key, least=-1)
    if group == -1:
        return 0
    if not group or group % INT4_GROUPS[0]:
        raise ArchError(
            f"{c.name}: {key} is {group}; supported are multiples of {INT4_GROUPS[0]}, and -1, one "
            "group of all columns"
        )
    return group


def _held(kind: Integers) -> Format:
    """Layers hold INT4 in groups of adjacent columns; all other whole numbers are held plain."""
    return kind if kind.bits == 4 and not kind.reordered else widened(kind)


def _modelopt(q: Fields) -> Fp8:
    formats = {
        "FP8": FP8_TENSOR,
        "FP8_PER_CHANNEL_PER_TOKEN": FP8_ROW,
        "FP8_PB_WO": Fp8(128, 128),
    }
    if not q.child("quantization").empty:  # as older tools write it
        q = q.child("quantization")
    return formats[q.choice("quant_algo", tuple(formats))]


_METHODS: dict[str, Callable[[Fields], Format]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
}
