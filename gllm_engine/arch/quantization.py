"""Reads `quantization_config` of a config.json: the formats that it promises for matrices.

Which matrices have which format is not read here: the checkpoint's tensors tell it.
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
    Int8,
    Mxfp4,
    held,
    widened,
)
from gllm_engine.files import shown

_KEY = "quantization_config"
# What compressed-tensors calls its formats.
_FLOAT = "float-quantized"
_PACKED = "pack-quantized"
_UNPACKED = "int-quantized"
_MIXED = "mixed-precision"
_NAIVE = "naive-quantized"  # what older files call both that are not packed


def read_quantization(c: Fields) -> tuple[Format, ...]:
    """The formats in `quantization_config`; none if the key is absent.

    Raises ArchError for a method or format that is not supported.
    """
    q = c.child(_KEY)
    if not q.keys():
        return ()
    method = q.text("quant_method", "")
    if method not in _METHODS:
        raise ArchError(
            f"{q.name}: quant_method is {shown(repr(method))}; supported are {', '.join(_METHODS)}"
        )
    inner = q.child("quantization", _KEY)  # as older tools write it
    return tuple(dict.fromkeys(map(held, _METHODS[method](q if inner.empty else inner))))


def _fp8(q: Fields) -> tuple[Format]:
    q.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    q.choice("activation_scheme", ("dynamic", "static"), "dynamic")
    if (block := q.sizes("weight_block_size", 2)) is None:
        return (FP8_TENSOR,)
    return (replace(FP8_BLOCK, rows=block[0], columns=block[1]),)


def _compressed_tensors(q: Fields) -> tuple[Format, ...]:
    """A format for each group of modules; a scheme of activations only says when they round.

    There may be a scheme of the KV cache alone, which is not used.
    """
    if not q.child("transform_config").empty:
        raise ArchError(f"{q.name}: transform_config is not supported: inputs would be rotated")
    kind = q.choice("format", (_FLOAT, _PACKED, _UNPACKED, _MIXED, _NAIVE, "dense"), _FLOAT)
    groups = q.child("config_groups")
    each = [groups.child(name) for name in groups.keys()]
    found = tuple(_of_group(group, kind) for group in each if group.has("weights"))
    if not found and not q.has("kv_cache_scheme"):
        raise ArchError(f"{q.name}: config_groups has no group with weights")
    return found


def _of_group(group: Fields, kind: str) -> Format:
    """The format of a group's weights. `kind`: what the config says of all groups."""
    weights = group.child("weights")
    if kind in (_MIXED, _NAIVE):
        is_float = weights.choice("type", ("float", "int"), "int") == "float"
        kind = _FLOAT if is_float else _PACKED if kind == _MIXED else _UNPACKED
    form = group.choice("format", (_FLOAT, _PACKED, _UNPACKED), kind)
    if form == _PACKED:
        return _compressed_int(weights)
    if form == _UNPACKED:
        return _unpacked_int(weights, group.child("input_activations"))
    weights.require(num_bits=8, type="float", symmetric=True, dynamic=False)
    strategy = weights.choice("strategy", ("tensor", "channel", "block"), "tensor")
    if strategy == "block":
        rows, columns = weights.sizes("block_structure", 2) or (128, 128)
        return Fp8(rows, columns)
    return FP8_ROW if strategy == "channel" else FP8_TENSOR


def _compressed_int(weights: Fields) -> Format:
    weights.require(type="int", dynamic=False)
    order = weights.choice("actorder", ("static", "weight", "group", "dynamic"), "static")
    strategy = weights.choice("strategy", ("group", "channel"), "group")
    group = 0 if strategy == "channel" else _group(weights, "group_size")
    zeros = not weights.flag("symmetric", True)
    # "weight" is another name of "static", and "dynamic" of "group".
    reordered = order in ("group", "dynamic")
    return CompressedInt(group, _bits(weights, "num_bits"), zeros, reordered)


def _unpacked_int(weights: Fields, inputs: Fields) -> Format:
    """`inputs`: how the inputs of products are rounded. Here every row gets a scale of its own."""
    weights.require(num_bits=8, type="int", symmetric=True, dynamic=False)
    strategy = weights.choice("strategy", ("tensor", "channel"), "channel")
    kind = Int8(rows=int(strategy == "channel"))
    if inputs.empty:
        return widened(kind)
    inputs.require(num_bits=8, type="int")
    return kind


def _gptq(q: Fields) -> tuple[Format]:
    q.require(is_marlin_format=False, pack_dtype="int32")
    q.flag("lm_head")  # whether the output projection has the format too, which the files tell
    version = _version(q, "checkpoint_format", ("gptq", "gptq_v2"))
    _check_overrides(q)
    group = _group(q, "group_size")
    # Static groups are chosen before the columns are reordered, so they are whole.
    reordered = q.flag("desc_act") and not q.flag("static_groups") and group > 0
    bits = _bits(q, "bits")
    zeros = not q.flag("sym")
    return (Gptq(group, bits, zeros, reordered, less_one=version == "gptq"),)


def _check_overrides(q: Fields) -> None:
    """Rules for single modules may only leave modules plain, which the files tell."""
    rules = q.child("dynamic")
    for rule in rules.keys():
        if not rule.startswith("-:") and not rules.child(rule).empty:
            raise ArchError(
                f"{rules.name}: {shown(repr(rule))} changes the format of some modules, which is "
                'not supported; a rule that begins with "-:" leaves modules plain'
            )


def _awq(q: Fields) -> tuple[Format]:
    q.require(zero_point=True)
    _version(q, "version", ("gemm",))
    if q.text("backend", "auto") == "llm-awq":
        raise ArchError(f"{q.name}: backend is 'llm-awq', whose tensors are not supported")
    group = _group(q, "q_group_size" if q.has("q_group_size") else "group_size")
    bits = _bits(q, "w_bit" if q.has("w_bit") else "bits")
    if bits != 4:
        raise ArchError(f"{q.name}: bits is {bits}, but of AWQ only 4 is supported")
    return (Awq(group),)


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


def _modelopt(q: Fields) -> tuple[Format]:
    formats = {
        "FP8": FP8_TENSOR,
        "FP8_PER_CHANNEL_PER_TOKEN": FP8_ROW,
        "FP8_PB_WO": Fp8(128, 128),
    }
    return (formats[q.choice("quant_algo", tuple(formats))],)


_METHODS: dict[str, Callable[[Fields], tuple[Format, ...]]] = {
    "fp8": _fp8,
    "fbgemm_fp8": lambda _: (FP8_ROW,),  # with an upper bound of the inputs' scales
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "mxfp4": lambda _: (Mxfp4(),),  # with lists of plain modules, which the files tell
    "gptq": _gptq,
    "awq": _awq,
}
