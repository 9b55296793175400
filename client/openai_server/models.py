"""The models behind the server: every READY Triton model that answers the operation "describe".

Owns what is known of each, and keeps it in step with tritonserver, where models come and go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gllm_client import Client


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model. `facts`: what its backend says of it, see the operation "describe"."""

    name: str
    facts: dict[str, Any]
    max_model_len: int  # tokens, of prompt and answer together
    created: int  # Unix time at which this server first saw it
    client: Client
    format: Any = None  # formats.Format: how it writes thoughts and calls
