"""gllm_engine: an LLM inference engine. The names below are public; everything else is internal.

Each name is imported on first use, so that front ends and scheduler tests do not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "config": ("PATH_KEYS", "ConfigError", "EngineConfig", "make_config", "read_config"),
    "sampling": (
        "InvalidField",
        "SamplingParams",
        "StructuredOutputs",
        "decode_json",
        "parse_sampling",
        "shorten",
    ),
    "sched.cost": ("CostModel", "Fit", "Work"),
    "sched.policy": ("POLICIES", "Budget", "Load", "Policy"),
    "sched.scheduler": ("Scheduler",),
    "sched.sequence": ("Sequence",),
    "arch": ("Model", "read_arch"),
    "types": (
        "Finish",
        "Image",
        "ModelInfo",
        "Outputs",
        "Request",
        "Stats",
        "StepPlan",
        "StepResult",
        "TenantStats",
        "TokenLogprobs",
    ),
    "os_process": ("discard", "end_with_parent", "owned_prefix", "pid_namespace", "remove_orphans"),
    "engine.attach": ("sweep",),
    "engine.client": ("EngineClient", "EngineError", "EngineUnavailable"),
    "text.completion": ("Completion", "Delta", "make_requests", "render_logprobs", "truncated"),
    "engine.core": ("IN_PROCESS", "Engine", "EngineBroken", "fill_caches"),
    "engine.check": ("CheckReport", "check_model"),
    "engine.image_memory": ("ImageMemory", "ImageShare"),
    "engine.images": ("ImageLoader",),
    "engine.llm": ("LLM", "CompletionOutput", "LoadedPrompt", "RequestFailed", "RequestOutput"),
    "text.description": ("describe_checkpoint",),
    "text.image_parts": ("Video", "not_taken", "take_media"),
    "text.tokenizer": ("TextError", "Tokenizer"),
    "model.tiny": ("write_tiny_model",),
    "timeline": ("Summary",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gllm_engine' has no attribute {name!r}")
    return getattr(import_module(f"gllm_engine.{_HOME[name]}"), name)
