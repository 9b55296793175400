"""gllm_engine: an LLM inference engine. These names are public; everything else is internal.

They are imported on first use, so that a front end or a scheduler test never pays for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "ConfigError": "config",
    "EngineConfig": "config",
    "make_config": "config",
    "read_config": "config",
    "InvalidField": "sampling",
    "SamplingParams": "sampling",
    "StructuredOutputs": "sampling",
    "parse_sampling": "sampling",
    "Budget": "sched",
    "CostModel": "sched",
    "Fit": "sched",
    "POLICIES": "sched",
    "Policy": "sched",
    "Scheduler": "sched",
    "Sequence": "sched",
    "Work": "sched",
    "read_spec": "spec",
    "Finish": "types",
    "ModelInfo": "types",
    "Outputs": "types",
    "Request": "types",
    "Stats": "types",
    "StepPlan": "types",
    "StepResult": "types",
    "TokenLogprobs": "types",
    "CompletionOutput": "engine.llm",
    "Completion": "engine.completion",
    "Delta": "engine.completion",
    "make_requests": "engine.completion",
    "render_logprobs": "engine.completion",
    "Engine": "engine.core",
    "EngineBroken": "engine.core",
    "fill_caches": "engine.core",
    "EngineClient": "engine.client",
    "EngineError": "engine.client",
    "EngineUnavailable": "engine.client",
    "end_with_parent": "engine.attach",
    "LLM": "engine.llm",
    "RequestFailed": "engine.llm",
    "RequestOutput": "engine.llm",
    "TextError": "engine.text",
    "Tokenizer": "engine.text",
    "write_tiny_model": "model.tiny",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gllm_engine' has no attribute {name!r}")
    return getattr(import_module(f"gllm_engine.{_HOME[name]}"), name)
