"""The decoder that interprets a spec, and how checkpoints get into and out of it."""

from __future__ import annotations

from gllm_engine.model.decoder import Decoder
from gllm_engine.model.load import LoadError, load_model, make_dummy

__all__ = ["Decoder", "LoadError", "load_model", "make_dummy"]
