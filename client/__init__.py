"""gllm_client: a typed client of a Triton server that runs gllm models, and the `gllm` command.

The names in `_PUBLIC` are public. Each is imported on first use, so that `gllm --help` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "protocol": ("Chunk", "GenerateError", "Output", "merge"),
    "client": ("Client", "SyncClient", "connect"),
    "http": ("HttpClient", "read_metrics"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gllm_client' has no attribute {name!r}")
    return getattr(import_module(f"gllm_client.{_HOME[name]}"), name)
