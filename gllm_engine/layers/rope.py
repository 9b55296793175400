"""Rotary position embedding: the table of cosines and sines for a Rope.

Frequencies are computed in float32 with transformers' order of operations, so that the results
agree with the reference at distant positions too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gllm_engine.arch.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    YarnScaling,
)


class RopeTable:
    """cos and sin, [positions, dim / 2] in float32, for positions from 0 on.

    There are `max_model_len` positions; or `max_len`, the checkpoint's length, if that is more and
    the Rope has sections: the times of a video may go further than its tokens.
    """

    def __init__(
        self, rope: Rope, max_model_len: int, device: torch.device, max_len: int = 0
    ) -> None:
        length = max_model_len if rope.sections is None else max(max_model_len, max_len)
        frequencies, factor = _frequencies(rope, max_model_len)
        # Computed on the host, so that all devices have the same numbers.
        place = device if device.type == "meta" else frequencies.device
        positions = torch.arange(length, dtype=torch.float32, device=place)
        angles = torch.outer(positions, frequencies.to(place))
        self.cos = (angles.cos() * factor).to(device)
        self.sin = (angles.sin() * factor).to(device)
        self._axes = None if rope.sections is None else torch.tensor(rope.axes(), device=device)

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """cos, sin, and which row of them each token has, [tokens] int64.

        `positions`: [tokens] int64, or [3, tokens] for a Rope with sections.
        """
        if positions.dim() == 1:
            return self.cos, self.sin, positions
        assert self._axes is not None
        at = positions[self._axes].T
        rows = torch.arange(len(at), device=at.device)
        return self.cos.gather(0, at), self.sin.gather(0, at), rows


def _frequencies(rope: Rope, max_model_len: int) -> tuple[Tensor, float]:
    """Radians per position for each pair of channels, and a factor on cos and sin."""
    scaling = rope.scaling
    theta = rope.theta
    if isinstance(scaling, DynamicScaling):
        theta = _dynamic_theta(scaling, theta, rope.dim, max_model_len)
    powers = theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    plain = 1.0 / powers
    if scaling is None or isinstance(scaling, DynamicScaling):
        return plain, 1.0
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor, 1.0
    if isinstance(scaling, Llama3Scaling):
        return _llama3(scaling, plain), 1.0
    if isinstance(scaling, LongRopeScaling):
        factors = scaling.long if max_model_len > scaling.original_len else scaling.short
        return 1.0 / (torch.tensor(factors) * powers), scaling.attention_factor
    return _yarn(scaling, rope, powers), _yarn_attention_factor(scaling)


def _dynamic_theta(scaling: DynamicScaling, theta: float, dim: int, max_model_len: int) -> float:
    stretch = max(max_model_len, scaling.original_len) / scaling.original_len
    base = scaling.factor * stretch - (scaling.factor - 1)
    return theta * math.pow(base, dim / (dim - 2))


def _llama3(scaling: Llama3Scaling, plain: Tensor) -> Tensor:
    wavelength = 2 * math.pi / plain
    low = scaling.low_freq_factor
    high = scaling.high_freq_factor
    # 0 for wavelengths above original_len / low, 1 for those below original_len / high.
    turns = scaling.original_len / wavelength
    keep = ((turns - low) / (high - low)).clamp(0, 1) if low < high else (turns > low).float()
    return (1 - keep) * plain / scaling.factor + keep * plain


def _yarn(scaling: YarnScaling, rope: Rope, powers: Tensor) -> Tensor:
    def pair_that_turns(rotations: float) -> float:
        """The (fractional) channel pair that makes `rotations` turns over the original length."""
        wavelength = scaling.original_len / (rotations * 2 * math.pi)
        return rope.dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low = pair_that_turns(scaling.beta_fast)
    high = pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(rope.dim // 2, dtype=torch.float32)
    stretch = ((pairs - low) / (high - low)).clamp(0, 1)
    return stretch / (scaling.factor * powers) + (1 - stretch) / powers


def _yarn_attention_factor(scaling: YarnScaling) -> float:
    def scale(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        derived = scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    else:
        derived = scale(1.0)
    return derived * scaling.derived_times
