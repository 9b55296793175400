"""The parameters of attention plans, as data. Layers with equal parameters share a plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionShape:
    """Of softmax attention over K and V in pages."""

    heads: int  # of queries
    kv_heads: int
    head_dim: int
    window: int | None  # a token sees itself and the window - 1 tokens before it; None: all before
    scale: float | None = None  # factor of the scores; None: head_dim ** -0.5
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    # A token at position p sees itself and all tokens before it from p // window * window on.
    chunked: bool = False


@dataclass(frozen=True)
class LatentShape:
    """Of latent attention. A head's key is [W_UK latent, rotated key of all heads], and its value
    is W_UV latent.
    """

    heads: int
    key_dim: int  # channels of a query and of a key: nope_dim + rope_dim
    value_dim: int
    scale: float  # of the scores
    width: int  # of what the cache holds of a token
    top_k: int | None = None  # tokens that an indexer chooses; None: there is no indexer
