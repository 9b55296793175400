"""Device state, batch building and sampling: turns a StepPlan into a StepResult."""

from gllm_engine.ops.jit_cache import cache_dirs
from gllm_engine.runner.kv_sizing import GpuMemory
from gllm_engine.runner.layer_move import LayerMove
from gllm_engine.runner.peak_memory import PeakMemory
from gllm_engine.runner.pp_partition import measure_partition
from gllm_engine.runner.runner import Runner, RunnerStep, default_threads
from gllm_engine.runner.slot_table import PlanError
from gllm_engine.runner.step_timer import RecordedRanks, StepTimers

__all__ = [
    "GpuMemory",
    "LayerMove",
    "PeakMemory",
    "RecordedRanks",
    "RunnerStep",
    "PlanError",
    "Runner",
    "StepTimers",
    "cache_dirs",
    "default_threads",
    "measure_partition",
]
