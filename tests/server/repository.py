"""Models for a server to serve: tiny random checkpoints, as directories of a model repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gllm_engine import write_tiny_model

ENGINE = {"model": ".", "cpu_threads": 1, "num_pages": 2048, "max_model_len": 8192}


def write_model(repository: Path, name: str, front_ends: int, **engine: Any) -> Path:
    """A model of the gllm backend with a checkpoint of its own; returns its version directory.

    `engine`: keys of model.json, on top of ENGINE.
    """
    directory = repository / name / "1"
    write_tiny_model(directory, "Qwen3ForCausalLM", max_position_embeddings=8192)
    (directory / "model.json").write_text(json.dumps(ENGINE | engine))
    (repository / name / "config.pbtxt").write_text(
        f'backend: "gllm"\ninstance_group [{{ count: {front_ends} kind: KIND_MODEL }}]\n'
    )
    return directory
