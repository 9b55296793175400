"""Rotary position embedding (RoPE) as data, read from a Hugging Face config.

This module owns the variants of RoPE scaling. It has no tensors; layers/rope.py computes the
frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gllm_engine.arch.fields import ArchError, Fields


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every frequency is divided by `factor` (kaiokendev, 2023)."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """NTK-aware scaling of theta (bloc97, emozilla, 2023).

    The published form changes theta as a sequence grows, so keys cached early would not match keys
    computed later. Here theta is fixed for the engine's max_model_len. So a prompt gives the same
    result in chunks, from the prefix cache and as a whole.
    """

    factor: float
    original_len: int  # tokens; theta is not scaled up to this length


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: low frequencies are divided by `factor`, high ones kept, with a ramp between.

    Llama 4 Scout has equal factors, and so no ramp.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_len: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN, arXiv 2309.00071. `attention_factor` multiplies cos and sin."""

    factor: float
    original_len: int
    attention_factor: float | None  # None: derived from factor, mscale and mscale_all_dim
    mscale: float | None
    mscale_all_dim: float | None
    beta_fast: float
    beta_slow: float
    truncate: bool  # round the ramp's ends to whole dimensions
    derived_times: float = 1.0  # factor of an attention_factor that is derived


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE, arXiv 2402.13753: each frequency is divided by a factor of its own.

    transformers uses `long` factors for sequences longer than `original_len`. Here the engine's
    max_model_len decides, for the reason that DynamicScaling gives.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_len: int  # tokens
    attention_factor: float  # multiplies cos and sin


_SHARE = "partial_rotary_factor"
_KEYS = {
    *("rope_type", "type", "rope_theta", _SHARE, "factor"),
    *("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    *("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"),
    "finetuned",  # in early YaRN checkpoints; has no effect
}

# For families whose positions have sections.
SECTION_KEYS = ("mrope_section", "mrope_interleaved")

# As the authors of YaRN and other engines write it; transformers knows these keys only as unknown.
_YARN_KEYS = {"attn_factor", "extrapolation_factor", "apply_yarn_scaling"}

Scaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True)
class Rope:
    """Rotates the first `dim` channels of a head.

    Channel pairs are (i, i + dim/2), or (2i, 2i + 1) if `interleaved`.

    `sections`: how many pairs turn with the time, the row and the column of a token (M-RoPE, arXiv
    2409.12191), which differ in images; None: all turn with one position.
    """

    dim: int
    theta: float
    interleaved: bool = False
    scaling: Scaling | None = None
    sections: tuple[int, int, int] | None = None
    sections_interleaved: bool = False

    def axes(self) -> list[int]:
        """Of each channel pair, in order of frequency: 0 (time), 1 (row) or 2 (column).

        Sections follow each other. If interleaved, pairs take turns as long as their section has
        pairs left, and time has the rest.
        """
        assert self.sections is not None
        if not self.sections_interleaved:
            return [axis for axis, count in enumerate(self.sections) for _ in range(count)]
        return [i % 3 if i < 3 * self.sections[i % 3] else 0 for i in range(self.dim // 2)]


def rope_object(config: Fields) -> Fields:
    return config.child("rope_scaling", "rope_parameters")


def read_rope(
    config: Fields,
    head_dim: int,
    other_keys: tuple[str, ...] = (),
    theta: float | None = None,
    rotated_share: float | None = None,
    rope: Fields | None = None,
) -> Rope:
    """Read `rope_parameters`, or the older `rope_theta` + `rope_scaling`.

    A key inside the object overrides the same key beside it, as in transformers. `other_keys`: keys
    that the caller reads. `theta`, `rotated_share`: for a config that names them in its own way,
    the values of rope_theta and partial_rotary_factor if the object does not have them. `rope`: the
    object, if it is another one. Raises ArchError for an unknown RoPE type, and for a share of the
    channels if the family has no default of it: transformers rotates all channels then.
    """
    rope = rope or rope_object(config)
    theta = rope.real("rope_theta", theta or config.real("rope_theta", 10_000.0))
    share = rope.real(_SHARE, rotated_share or config.real(_SHARE, 1.0))
    dim = head_dim * share
    if dim % 2 or dim > head_dim:
        raise ArchError(
            f"{config.name}: {_SHARE}={share} of head_dim={head_dim} is {dim} "
            f"channels; a whole even number from 2 to {head_dim} is needed"
        )
    if share != 1 and not rotated_share and _SHARE not in config.defaults:
        raise ArchError(f"{config.name}: {_SHARE} is {share}, but only 1 is supported")
    scaling = _read_scaling(config, rope, int(dim), other_keys)
    if isinstance(scaling, DynamicScaling) and dim < 4:
        raise ArchError(f"{rope.name}: dynamic RoPE scaling needs 4 channels, there are {dim:g}")
    if isinstance(scaling, YarnScaling) and theta <= 1:
        raise ArchError(f"{config.name}: rope_theta is {theta}, but YaRN needs more than 1")
    sections = _read_sections(rope, int(dim))
    is_mixed = rope.flag("mrope_interleaved")
    return Rope(int(dim), theta, False, scaling, sections, is_mixed and sections is not None)


def _read_sections(rope: Fields, dim: int) -> tuple[int, int, int] | None:
    sizes = rope.sizes("mrope_section", 3)
    if sizes is None:
        return None
    if sum(sizes) != dim // 2:
        raise ArchError(
            f"{rope.name}: mrope_section is {list(sizes)}, but its sum must be {dim // 2}, the "
            "pairs of rotated channels"
        )
    time, rows, columns = sizes
    return time, rows, columns


def read_layer_ropes(config: Fields, head_dim: int) -> tuple[Rope, Rope]:
    """The RoPE of layers with full attention, and that of layers with sliding attention.

    In the older form `rope_scaling` is that of full attention, and `rope_local_base_freq`, if
    present, the theta of sliding attention.
    """
    both = config.child("rope_parameters")
    both.allow_only({"full_attention", "sliding_attention"})
    full = both.child("full_attention")
    sliding = both.child("sliding_attention")
    if both.empty:
        full = config.child("rope_scaling")
        if full.has("type"):  # transformers would ignore it without the newer name
            full.text("rope_type")
    else:
        config.require(rope_scaling=None)
    for rope in (full, sliding):
        rope.require(truncate=True)  # transformers does not read it here
    local = config.optional_real("rope_local_base_freq")
    return (
        read_rope(config, head_dim, rope=full),
        read_rope(config, head_dim, theta=local, rope=sliding),
    )


def read_alpha_rope(config: Fields, head_dim: int) -> Rope:
    """As read_rope, for Hunyuan's `alpha`: theta is multiplied by alpha ** (dim / (dim - 2)).

    Its configs say type "dynamic", but the result depends on no length, and no other key matters.
    """
    rope = rope_object(config)
    alpha = rope.optional_real("alpha")
    if alpha is None or head_dim < 4:
        return read_rope(config, head_dim)
    rope.allow_only(_KEYS | {"alpha"})
    rope.require(type="dynamic", rope_type="dynamic")
    theta = rope.real("rope_theta", config.real("rope_theta", 10_000.0))
    return Rope(head_dim, theta * alpha ** (head_dim / (head_dim - 2)))


def _read_scaling(
    config: Fields, rope: Fields, dim: int, other_keys: tuple[str, ...]
) -> Scaling | None:
    max_len = config.count("max_position_embeddings")
    kind = rope.text("rope_type", rope.text("type", "default"))
    # Early checkpoints of Phi-3 have the other names.
    if kind in ("longrope", "su") or kind == "yarn" and rope.has("short_factor"):
        return _read_longrope(config, rope, dim, max_len)
    if kind == "mrope" and rope.has("mrope_section"):
        kind = "default"
    if kind not in ("default", "linear", "dynamic", "llama3", "yarn"):
        raise ArchError(
            f"{rope.name}: RoPE type {kind!r} is not supported; "
            "supported are default, linear, dynamic, llama3, yarn, longrope"
        )
    rope.allow_only({*_KEYS, *other_keys, *(_YARN_KEYS if kind == "yarn" else ())})
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(rope.real("factor"))
    if kind == "dynamic":
        return DynamicScaling(rope.real("factor"), max_len)
    original = rope.count("original_max_position_embeddings", max_len)
    if kind == "llama3":
        low = rope.real("low_freq_factor")
        high = rope.real("high_freq_factor")
        if low > high:
            raise ArchError(
                f"{rope.name}: low_freq_factor is {low}, but only at most "
                f"high_freq_factor={high} is supported"
            )
        return Llama3Scaling(rope.real("factor"), low, high, original)
    return _read_yarn(rope, max_len, original)


def _read_yarn(rope: Fields, max_len: int, original: int) -> YarnScaling:
    rope.require(extrapolation_factor=1)
    attention = rope.optional_real("attention_factor")
    times = rope.real("attn_factor", 1.0)
    if attention is not None and times != 1:
        raise ArchError(
            f"{rope.name}: attn_factor is {times}, but beside attention_factor only 1 is supported"
        )
    if not rope.flag("apply_yarn_scaling", True):  # nothing is derived
        attention = attention or times
    return YarnScaling(
        factor=rope.real("factor", max_len / original),
        original_len=original,
        attention_factor=attention,
        mscale=rope.real_or_zero("mscale"),
        mscale_all_dim=rope.real_or_zero("mscale_all_dim"),
        beta_fast=rope.real("beta_fast", 32.0),
        beta_slow=rope.real("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        derived_times=times,
    )


def _read_longrope(config: Fields, rope: Fields, dim: int, max_len: int) -> LongRopeScaling:
    rope.allow_only(_KEYS | {"short_factor", "long_factor"})
    key = "original_max_position_embeddings"
    original = config.count(key, rope.count(key, max_len))
    factor = rope.real("factor", max_len / original)
    attention = 1.0
    if factor > 1:
        if original < 2:
            raise ArchError(f"{rope.name}: {key} is {original}, but LongRoPE needs 2 or more")
        attention = math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeScaling(
        short=rope.reals("short_factor", dim // 2),
        long=rope.reals("long_factor", dim // 2),
        original_len=original,
        attention_factor=rope.real("attention_factor", attention),
    )
