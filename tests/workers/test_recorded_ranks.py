"""The timelines of real ranks on the CPU, as whoever looks for lost time finds them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from trace_checks import covered, read_trace, tracks

from gllm_engine import LLM, SamplingParams, write_tiny_model
from gllm_engine.timeline import activity

SMALL = {"device": "cpu", "cpu_threads": 1, "max_model_len": 256, "num_pages": 200}
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
PROMPTS = ["the quick brown fox jumps over the lazy dog"] * 6
RANK_HOST = {activity.PREPARE, activity.LAUNCH, activity.SEND, activity.AWAIT_PLAN}
WAYS: dict[str, dict[str, Any]] = {
    "pp2": {"pipeline_parallel_size": 2, "assigned_layers": "1,4"},
    "tp2": {"tensor_parallel_size": 2},
}


def recorded(way: str, folder: Path) -> tuple[dict[str, Any], tuple[float, float], Any, int]:
    """The trace of a group of ranks, the period of its second work, that period's summary, and
    how many tokens are computed after the first step, which has all prompts of the first work.
    """
    model = write_tiny_model(folder / "model", "Qwen3ForCausalLM", seed=3, num_hidden_layers=5)
    path = folder / "out.json"
    with LLM(str(model), **SMALL, **WAYS[way], timeline=str(path)) as llm:
        llm.generate(PROMPTS, GREEDY)
        begin = time.monotonic_ns()
        outputs = llm.generate([f"{i} {prompt}" for i, prompt in enumerate(PROMPTS)], GREEDY)
        end = time.monotonic_ns()
        summary = llm.engine.timeline().summary((begin, end))
        again = llm.generate(PROMPTS, GREEDY)  # a group that was asked goes on
    trace = read_trace(path)
    origin = trace["otherData"]["begin_ns"]
    later = [*outputs, *again]
    prompts = sum(len(one.prompt_token_ids) - one.num_cached_tokens for one in later)
    # The last token of each output is sampled, not computed.
    computed = prompts + 3 * len(PROMPTS) * (GREEDY.max_tokens - 1)
    return trace, ((begin - origin) / 1000, (end - origin) / 1000), summary, computed


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks(way: str, tmp_path: Path) -> None:
    trace, period, summary, computed = recorded(way, tmp_path)
    found = tracks(trace)
    last = f"rank 1, stage {1 if way == 'pp2' else 0}"
    processes = ["engine", "rank 0, stage 0", last]
    assert list(summary.hosts) == processes
    for process in processes:
        events = found[process, "host"]
        assert covered(events, *period) > 0.95, process
        assert sum(summary.hosts[process].values()) > 0.95
    for rank, process in zip(summary.shares, processes[1:], strict=True):
        names = {event["name"] for event in found[process, "device"]}
        assert activity.COMPUTE in names and (activity.COLLECTIVE in names) == (way == "tp2")
        assert RANK_HOST <= {event["name"] for event in found[process, "host"]}
        assert {event["name"] for event in found[process, "results"]} == {activity.AWAIT_DEVICE}
        assert rank.busy > 0 and rank.steps >= 15  # the other rank may end its last step later
    stages = trace["otherData"]["steps"]
    assert len(stages) == (2 if way == "pp2" else 1)
    works = [[work for work, _ in steps] for steps in stages]
    assert works[0] in (works[-1], works[-1][:-1])  # the last rank alone is waited for
    decodes = len(PROMPTS) if way == "tp2" else len(PROMPTS) // 2
    assert sum(tokens for tokens, *_ in works[-1]) == computed - decodes * (len(stages) - 1)
    assert all(seconds > 0 for steps in stages for _, seconds in steps)
    first, second = summary.shares
    if way == "tp2":
        assert first.bubble == second.bubble == 0
        assert min(first.communication, second.communication) > 0
    else:  # four layers and the sampling against one layer
        assert first.bubble > second.bubble and second.busy > first.busy
        assert first.communication == 0 < second.communication
        received = [e for e in found[last, "device"] if e["name"] == activity.RECEIVE]
        assert {e["args"]["step"] for e in received} == {
            e["args"]["step"] for e in found[processes[1], "device"]
        }
    assert activity.SAMPLE in {event["name"] for event in found[last, "device"]}
