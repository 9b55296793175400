"""A mixture of experts as data: how its router chooses and weighs, how its experts activate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Routing:
    """Chooses `top_k` experts from a token's logits, one for each expert.

    scores = softmax(logits) or sigmoid(logits). A choice is a logit or, if `biased`, score + bias.
    The experts of the largest choices are chosen; of equal ones the expert of lower index. A weight
    is the score of a chosen expert, without the bias; then come `renorm` and `scale`.

    Softmax with `renorm` equals the softmax over only the chosen logits.
    """

    top_k: int
    renorm: bool  # divide the weights by max(their sum + sum_eps, least_sum)
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    biased: bool = False
    # Equal groups of consecutive experts, of which `kept_groups` may be chosen from: those of the
    # largest choice or, if `biased`, of the largest sum of two choices.
    groups: int = 1
    kept_groups: int = 1
    sum_eps: float = 0.0
    least_sum: float = 0.0
    scale: float = 1.0  # factor of all weights


@dataclass(frozen=True)
class Clamp:
    """(up + 1) * gate * sigmoid(slope * gate), with gate at most `limit`, up in -limit .. limit."""

    limit: float
    slope: float
