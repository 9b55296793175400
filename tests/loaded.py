"""A decoder filled from a checkpoint, for tests that need no runner around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gllm_engine.arch import Model
from gllm_engine.model import Decoder, filling, open_checkpoint


def load_model(path: Path, arch: Model, **options: Any) -> Decoder:
    """`options` as Decoder's. Raises LoadError."""
    with open_checkpoint(arch, path) as checkpoint:
        decoder = Decoder(checkpoint.arch, **options)
        with filling(decoder, checkpoint):
            return decoder
