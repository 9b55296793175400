"""What a pipeline stage's steps cost, by steps that were measured, as those in a timeline.

The file of `offline --timeline` or `serve --timeline` has the work and the time of every step of
every rank. This module knows neither schedulers nor simulated time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from operator import mul
from typing import Any, NamedTuple

import numpy as np

from gllm_engine import Work

Cost = Callable[[Work], float]  # seconds

_ROUNDS = 5
# A step that took more than so many times what is predicted counts as one that took that long.
_MOST_DELAY = 3.0
_KNEES = (0.0, *(2.0 ** (i / 2) for i in range(27)))  # tokens
# A larger knee must reduce the error by this share. Steps that are all larger tell nothing of it.
_LEAST_GAIN = 0.01

_CLOCKS_S = 1e-4  # how far the clocks of two stages may be apart


class Step(NamedTuple):
    work: Work
    seconds: float


def fit_cost(steps: Sequence[Step]) -> Cost:
    """The cost of a stage's step: linear in its work, but for two knees in the number of tokens.

    Reading all weights takes as long for one token as for many, so up to the first knee they cost
    nothing. Up to the second one they cost more, as each has weights of its own, those of experts.

    Raises ValueError if there is no step.
    """
    if not steps:
        raise ValueError("there are no measured steps")
    knees = 0.0, 0.0
    least, factors = _fit(steps, knees)
    for which in (0, 1):
        for knee in _KNEES:
            tried = (knee, knees[1]) if which == 0 else (knees[0], knee)
            error, found = _fit(steps, tried)
            if error < least * (1 - _LEAST_GAIN):
                least, factors, knees = error, found, tried
    return lambda work: sum(map(mul, factors, _parts(work, knees)))


def _parts(work: Work, knees: tuple[float, float]) -> tuple[float, ...]:
    """What a step's time is a sum of. Steps with prompts are launched in another way."""
    first, second = knees
    tokens = work.tokens
    has_prompts = tokens > work.sequences
    return 1.0, has_prompts, max(first, tokens), min(second, tokens), *work[1:]


def _fit(steps: Sequence[Step], knees: tuple[float, float]) -> tuple[float, list[float]]:
    """Least squares of errors relative to the prediction, with no factor below 0.

    Relative to what was measured, delayed steps would count for less than quick ones, and the
    mean would be too small. Returns the error and the factors of `_parts`.
    """
    rows = np.array([_parts(step.work, knees) for step in steps], float)
    scale = np.maximum(rows.max(0), 1.0)
    rows /= scale
    seconds = np.array([step.seconds for step in steps])
    unit = seconds
    for _ in range(_ROUNDS):
        found = np.zeros(len(scale))
        kept = np.arange(len(scale))
        part = np.full(len(scale), -1.0)
        while part.min() < 0:
            part = np.linalg.lstsq(rows[:, kept] / unit[:, None], seconds / unit, rcond=None)[0]
            found[:] = 0.0
            found[kept] = part
            kept = np.delete(kept, part.argmin())
        unit = np.maximum(rows @ found, seconds / _MOST_DELAY)
    error = float((((seconds - rows @ found) / unit) ** 2).sum())
    return error, (found / scale).tolist()


def read_timeline(trace: dict[str, Any]) -> list[list[Step]]:
    """The steps of each stage in a Chrome trace.

    A step's time on a stage begins when the engine has planned the step, the stage has ended the
    step before, and its input is there. So what a host does in between counts.

    Raises KeyError if the trace has other events than a timeline.
    """
    stages: dict[int, int] = {}
    devices = set()
    works: dict[int, Work] = {}
    planned: dict[int, float] = {}
    times: defaultdict[int, dict[int, tuple[float, float]]] = defaultdict(dict)
    for event in trace["traceEvents"]:
        args = event.get("args", {})
        name = event["name"]
        if name == "process_name":
            stages[event["pid"]] = int(args["name"].partition(", stage ")[2] or -1)
        elif name == "thread_name" and args["name"] == "device":
            devices.add(event["tid"])
        elif name == "dispatch":
            planned[args["step"]] = event["ts"] / 1e6
        elif event["tid"] in devices and name in ("compute", "sample"):
            step = args["step"]
            begin = event["ts"] / 1e6
            end = begin + event["dur"] / 1e6
            of_stage = times[stages[event["pid"]]]
            known = of_stage.get(step, (begin, end))
            of_stage[step] = min(begin, known[0]), max(end, known[1])
            if "tokens" in args:
                works[step] = Work(*(args[name] for name in Work._fields))
    found = []
    for stage, of_stage in sorted(times.items()):
        before = times[(stage or len(times)) - 1]  # of the first stage, which gets tokens, the last
        steps = []
        for step, (begin, end) in of_stage.items():
            if step - 1 in of_stage and step in works and step in planned:
                inputs = [before[s][1] for s in range(step - len(times), step + 1) if s in before]
                known = [each for each in inputs if each < begin + _CLOCKS_S]
                since = max(planned[step], of_stage[step - 1][1], *known)
                steps.append(Step(works[step], max(end - since, end - begin)))
        found.append(steps)
    return found
