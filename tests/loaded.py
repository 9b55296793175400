"""A decoder filled from a checkpoint, for tests that need no runner around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gllm_engine.model import Decoder, filling
from gllm_engine.spec import Model


def load_model(path: Path, spec: Model, **options: Any) -> Decoder:
    """`options` as Decoder's. Raises LoadError."""
    decoder = Decoder(spec, **options)
    with filling(decoder, path):
        return decoder
