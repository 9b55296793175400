"""Device state, batch building and sampling: turns a StepPlan into a StepResult."""

from gllm_engine.ops.ahead import cache_dirs
from gllm_engine.runner.cut import measure_cut
from gllm_engine.runner.instant import InstantRunner
from gllm_engine.runner.runner import Launched, Runner, default_threads
from gllm_engine.runner.state import PlanError

__all__ = [
    "InstantRunner", "Launched", "PlanError", "Runner", "cache_dirs", "default_threads",
    "measure_cut",
]  # fmt: skip
