"""gllm_client: a typed client of a Triton server that runs gllm models, and the `gllm` command.

These names are public. They are imported on first use, so that `gllm --help` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Chunk": "protocol",
    "GenerateError": "protocol",
    "Output": "protocol",
    "merge": "protocol",
    "Client": "client",
    "SyncClient": "client",
    "connect": "client",
    "HttpClient": "http",
    "read_metrics": "http",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gllm_client' has no attribute {name!r}")
    return getattr(import_module(f"gllm_client.{_HOME[name]}"), name)
