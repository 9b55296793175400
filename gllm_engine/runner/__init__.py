"""Device state, batch building and sampling: turns a StepPlan into a StepResult."""

from gllm_engine.ops.jit_cache import cache_dirs
from gllm_engine.runner.host_arrays import pixels_of
from gllm_engine.runner.kv_sizing import GpuMemory, encode_blank
from gllm_engine.runner.landing import Landing, dtype_of
from gllm_engine.runner.layer_move import LayerMove
from gllm_engine.runner.peak_memory import PeakMemory
from gllm_engine.runner.pp_partition import measure_partition
from gllm_engine.runner.runner import Runner, RunnerStep, default_threads
from gllm_engine.runner.slot_table import PlanError
from gllm_engine.runner.step_timer import RecordedRanks, StepTimers

__all__ = [
    "GpuMemory",
    "Landing",
    "LayerMove",
    "PeakMemory",
    "RecordedRanks",
    "RunnerStep",
    "PlanError",
    "Runner",
    "StepTimers",
    "cache_dirs",
    "default_threads",
    "dtype_of",
    "encode_blank",
    "measure_partition",
    "pixels_of",
]
