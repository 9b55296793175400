"""The runner without a model: its pace."""

from __future__ import annotations

import pytest

from gllm_engine import ConfigError, EngineConfig, SamplingParams
from gllm_engine.engine import null_runner
from gllm_engine.engine.null_runner import NullRunner
from gllm_engine.types import StepPlan


class Clock:
    """A clock that stands still but for sleep."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_the_pace_is_kept_over_steps_that_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(null_runner, "time", clock)
    runner = NullRunner(50, EngineConfig(model=".", device="none", null_tokens_per_s=1000))
    runner._sampling = dict.fromkeys(range(20), SamplingParams())
    steps = [runner.launch(StepPlan(number, [], [], [*range(20)], [])) for number in range(3)]
    for number, step in enumerate(steps):
        tokens = step.wait().tokens
        assert len(tokens) == 20 and 0 <= min(tokens) <= max(tokens) < 50
        assert clock.now == pytest.approx(100 + 0.02 * (number + 1))
    clock.now += 5  # time without work is not made up for
    runner.launch(StepPlan(3, [], [], [0], [])).wait()
    assert clock.now == pytest.approx(105.061)


def test_a_wrong_pace_is_refused() -> None:
    with pytest.raises(ConfigError, match="null_tokens_per_s: 0 is outside"):
        EngineConfig(model=".", device="none", null_tokens_per_s=0)
    with pytest.raises(ConfigError, match="null_tokens_per_s: it is for device none, not cpu"):
        EngineConfig(model=".", device="cpu", null_tokens_per_s=1000)
