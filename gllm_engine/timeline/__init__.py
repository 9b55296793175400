"""A timeline: what each rank's host and device did in each step, as a trace and as shares of time.

It is off by default. Knows nothing of models, sockets or tensors.
"""

from gllm_engine.timeline import activity
from gllm_engine.timeline.recorder import OFF, NoRecorder, Recorder
from gllm_engine.timeline.shares import Summary
from gllm_engine.timeline.trace import Timeline, check_writable

__all__ = [
    "OFF",
    "NoRecorder",
    "Recorder",
    "Summary",
    "Timeline",
    "activity",
    "check_writable",
]
