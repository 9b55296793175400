"""Layers move between the stages of a pipeline while it serves, and no answer changes."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moving import restless_layers, serve_until_moved
from traced import SOON_S, WAIT_S

from gllm_engine import LLM, EngineBroken, SamplingParams, wire, write_tiny_model
from gllm_engine.workers import stage_balance
from gllm_engine.workers.group import WorkerGroup
from gllm_engine.workers.stage_balance import (
    LEAST_STEPS,
    RETRY_WINDOWS,
    WINDOW_S,
    StageBalance,
)

pytestmark = pytest.mark.usefixtures("quick_starts")

NUM_LAYERS = 6
SMALL = {"device": "cpu", "cpu_threads": 1, "max_model_len": 512, "num_pages": 400}
PIPE = SMALL | {"pipeline_parallel_size": 2, "spare_layers": 2}
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
PROMPTS = [[3, 4, 5], [6, 7, 8, 9]]


class Pipeline:
    """Stages whose layers take `costs`, the last stage `tail` more, and their StageBalance."""

    def __init__(
        self,
        cut: tuple[int, ...],
        costs: list[float],
        tail: float = 0.0,
        spare: int = 64,
        runs: list[int] | None = None,
    ) -> None:
        self.costs = costs
        self.tail = tail
        self.ranks = len(cut)
        runs = runs or [1 for _ in costs]
        self.balance = StageBalance(cut, runs, spare, len(cut))

    def times(self) -> list[float]:
        found = []
        first = 0
        for number in self.balance.cut:
            found.append(sum(self.costs[first : first + number]))
            first += number
        found[-1] += self.tail
        return found

    def serve(self, seconds: float = 1.01 * WINDOW_S, steps: int = LEAST_STEPS) -> list[Any]:
        """The slowest stage computes for `seconds`. Returns the messages to the ranks."""
        told = []
        for _ in range(steps):
            times = self.times()
            for stage, took in enumerate(times):
                self.balance.observe(stage, took / max(times) * seconds / steps)
            told += [message for message in [self.balance.due()] if message is not None]
        return told

    def answer(self, problem: str = "") -> None:
        for rank in range(self.ranks):
            self.balance.loaded(rank, problem if rank == 1 else "")


def test_a_layer_moves_once_all_ranks_have_loaded_it() -> None:
    pipeline = Pipeline((5, 3), [1.0] * 8)
    assert pipeline.serve() == [wire.LoadLayers((4, 4))]
    assert pipeline.serve() == []
    pipeline.balance.loaded(0, "")
    assert pipeline.serve() == [] and pipeline.balance.cut == (5, 3)
    pipeline.balance.loaded(1, "")
    assert pipeline.serve(steps=1) == [wire.MoveLayers()] and pipeline.balance.cut == (4, 4)
    assert pipeline.serve() == []


@pytest.mark.parametrize(
    ("cut", "costs", "tail", "spare", "runs", "better"),
    [
        ((4, 4), [1.0] * 8, 0.9, 9, None, None),  # less than a layer's time
        ((4, 4), [1.0] * 8, 2.5, 9, None, (5, 3)),
        ((3, 5), [1.0] * 8, 0.0, 9, None, (4, 4)),
        ((5, 3), [1.0] * 8, 0.0, 0, None, None),  # no memory for it
        ((1, 1), [9.0, 1.0], 0.0, 9, None, None),  # a stage keeps a layer
        ((8, 4), [1.0] * 12, 6.0, 9, None, (9, 3)),  # what the last stage does beside its layers
        ((3, 3, 2), [1.0] * 8, 4.1, 9, None, (3, 4, 1)),  # where the difference is greatest
        ((6, 3), [1.0] * 9, 0.0, 9, [3, 3, 3], None),  # three layers move together, or none
        ((9, 3), [1.0] * 12, 0.0, 9, [3, 3, 3, 3], (6, 6)),
        ((3, 9), [1.0] * 12, 0.0, 2, [3, 3, 3, 3], None),
    ],
)
def test_the_slower_stage_gives_a_layer_away(
    cut: tuple[int, ...],
    costs: list[float],
    tail: float,
    spare: int,
    runs: list[int] | None,
    better: tuple[int, ...] | None,
) -> None:
    told = Pipeline(cut, costs, tail, spare, runs).serve()
    assert told == ([] if better is None else [wire.LoadLayers(better)])


def test_few_steps_or_a_short_time_tell_nothing() -> None:
    assert Pipeline((5, 3), [1.0] * 8).serve(0.9 * WINDOW_S, 10 * LEAST_STEPS) == []
    assert Pipeline((5, 3), [1.0] * 8).serve(10 * WINDOW_S, LEAST_STEPS - 1) == []


def test_a_rank_that_cannot_load_ends_all_moves() -> None:
    pipeline = Pipeline((6, 2), [1.0] * 8)
    assert pipeline.serve() == [wire.LoadLayers((5, 3))]
    pipeline.answer("OutOfMemoryError: no room")
    assert pipeline.serve() == [wire.LoadLayers(())]  # what is loaded is freed
    assert pipeline.serve() == [] and pipeline.balance.cut == (6, 2)


@given(st.data())
def test_moves_end_where_no_move_helps(data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.floats(0.5, 2), min_size=4, max_size=16))
    stages = data.draw(st.integers(2, 4))
    cut = [1] * stages
    for _ in range(len(costs) - stages):
        cut[data.draw(st.integers(0, stages - 1))] += 1
    is_even = data.draw(st.booleans())
    pipeline = Pipeline(
        tuple(cut), [1.0] * len(costs) if is_even else costs, data.draw(st.floats(0, 4))
    )
    worst = max(pipeline.times())
    for _ in range(4 * len(costs)):
        told = pipeline.serve()
        if not told:
            break
        pipeline.answer()
        assert pipeline.serve(steps=1) == [wire.MoveLayers()]
        assert sum(pipeline.balance.cut) == len(costs) and min(pipeline.balance.cut) > 0
    else:
        pytest.fail(f"layers move for ever: {pipeline.balance.cut}")
    assert not is_even or max(pipeline.times()) <= worst + 1e-9


def test_a_cut_that_was_left_may_be_right_again() -> None:
    pipeline = Pipeline((6, 6), [1.0] * 12)
    for tail, cut in [(3.0, (7, 5)), (0.0, (6, 6)), (3.0, (7, 5)), (0.0, (6, 6))]:
        assert pipeline.serve() == []
        pipeline.tail = tail
        assert pipeline.serve() == [wire.LoadLayers(cut)]
        pipeline.answer()
        assert pipeline.serve(steps=1) == [wire.MoveLayers()]


def test_a_layer_that_takes_too_long_comes_back_for_an_hour() -> None:
    pipeline = Pipeline((3, 2), [0.8, 0.8, 1.9, 1.0, 1.3])  # 3.5 and 2.3, then 1.6 and 4.2
    assert pipeline.serve() == [wire.LoadLayers((2, 3))]
    pipeline.answer()
    assert pipeline.serve(steps=1) == [wire.MoveLayers()]
    assert pipeline.serve() == [wire.LoadLayers((3, 2))]
    pipeline.answer()
    assert pipeline.serve(steps=1) == [wire.MoveLayers()]
    for _ in range(RETRY_WINDOWS - 1):
        assert pipeline.serve() == [] and pipeline.balance.cut == (3, 2)
    assert pipeline.serve() == [wire.LoadLayers((2, 3))]


def test_swings_of_the_load_rule_no_cut_out_for_ever() -> None:
    """Each swing is seen as a move that was wrong, if no quiet minute comes between."""
    pipeline = Pipeline((6, 6), [1.0] * 12)
    for tail, cut in [(3.0, (7, 5)), (0.0, (6, 6))]:
        pipeline.tail = tail
        assert pipeline.serve() == [wire.LoadLayers(cut)]
        pipeline.answer()
        assert pipeline.serve(steps=1) == [wire.MoveLayers()]
    pipeline.tail = 3.0
    quiet = 0
    while not pipeline.serve():
        quiet = quiet + 1
    assert 0 < quiet < RETRY_WINDOWS and pipeline.balance.due() is None
    pipeline.answer()
    assert pipeline.serve(steps=1) == [wire.MoveLayers()] and pipeline.balance.cut == (7, 5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    return write_tiny_model(path, "Qwen3ForCausalLM", seed=3, num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    with LLM(str(model), **SMALL) as llm:
        return tokens(llm)


def tokens(llm: LLM) -> list[list[int]]:
    found = llm.generate(PROMPTS, LONG)
    assert not any(output.error for output in found)
    return [output.outputs[0].token_ids for output in found]


def balance_of(llm: LLM) -> StageBalance:
    found = llm.engine._runner._balance  # type: ignore[attr-defined]
    assert isinstance(found, StageBalance)
    return found


def serve_until(llm: LLM, expected: list[list[int]], done: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not done():
        assert tokens(llm) == expected
        assert time.monotonic() < until


def test_a_bad_cut_gets_better(
    model: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    observe = StageBalance.observe
    stages = set()

    def observe_layers(balance: StageBalance, stage: int, seconds: float) -> None:
        """On a busy machine seconds tell little of layers."""
        assert seconds > 0
        stages.add(stage)
        observe(balance, stage, balance.cut[stage] / 1000)

    monkeypatch.setattr(StageBalance, "observe", observe_layers)
    monkeypatch.setattr(stage_balance, "WINDOW_S", 0.0)
    with LLM(str(model), assigned_layers="5,1", **PIPE) as llm:
        balance = balance_of(llm)
        assert balance.cut == (5, 1)
        serve_until(llm, expected, lambda: balance.cut == (3, 3))
        assert tokens(llm) == expected
        assert balance.cut == (3, 3) and stages == {0, 1}
        llm.engine.check_integrity()


def test_without_spare_layers_none_move(
    model: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_balance, "WINDOW_S", 0.0)
    config = PIPE | {"spare_layers": 0, "assigned_layers": "5,1"}
    with LLM(str(model), **config) as llm:
        assert tokens(llm) == expected
        assert balance_of(llm).cut == (5, 1) and balance_of(llm)._next is None


def test_a_new_checkpoint_in_place_of_the_old_one_is_not_mixed_with_it(
    model: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    other = write_tiny_model(
        tmp_path / "other", "Qwen3ForCausalLM", seed=4, num_hidden_layers=NUM_LAYERS
    )
    with restless_layers() as cuts, LLM(str(copy), **PIPE) as llm:
        (other / "model.safetensors").rename(copy / "model.safetensors")
        serve_until(llm, expected, lambda: len(set(cuts)) == 2)
        assert tokens(llm) == expected


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_the_cache_moves_as_it_is(model: Path, dtype: str) -> None:
    """Later turns are computed from what earlier ones have left in the cache."""
    turns = []
    for config in (SMALL, PIPE):
        with restless_layers() as cuts, LLM(str(model), **config, kv_cache_dtype=dtype) as llm:
            serve_until_moved(llm, cuts, lambda: llm.generate(PROMPTS, LONG))  # noqa: B023
            first = tokens(llm)
            again = llm.generate([PROMPTS[0] + first[0]], LONG)
            turns.append((first, again[0].outputs[0].token_ids))
            assert again[0].num_cached_tokens >= len(first[0]) - 16
    assert turns[0] == turns[1]


def test_layers_that_cannot_be_loaded_stay(
    model: Path,
    expected: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(stage_balance, "WINDOW_S", 0.0)
    copy = shutil.copytree(model, tmp_path / "model")
    with caplog.at_level(logging.WARNING), LLM(str(copy), assigned_layers="5,1", **PIPE) as llm:
        os.truncate(copy / "model.safetensors", 9000)
        serve_until(llm, expected, lambda: balance_of(llm)._limits == [5, 1])
        assert balance_of(llm).cut == (5, 1) and tokens(llm) == expected
    assert "layers do not move any more" in caplog.text and "model.safetensors" in caplog.text


@pytest.mark.parametrize(
    ("rank", "told", "is_held_up"),
    [(1, wire.MoveLayers, False), (0, wire.MoveLayers, True), (1, wire.LoadLayers, True)],
)
def test_a_rank_that_dies_in_the_middle_of_a_move_is_missed(
    model: Path,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    told: type[Any],
    is_held_up: bool,
) -> None:
    """It dies before it gets the message; or it has it and holds up its neighbour, which waits for
    the layers' K and V.
    """
    with restless_layers(), LLM(str(model), **PIPE) as llm:
        assert tokens(llm) == expected
        child = llm.engine._runner._meeting.children[rank]  # type: ignore[attr-defined]
        due = StageBalance.due
        result_of = WorkerGroup.result_of
        died: list[float] = []

        def die() -> None:
            child.kill()
            died.append(time.monotonic())

        def stop(balance: StageBalance) -> Any:
            message = due(balance)
            if isinstance(message, told) and not died:
                if is_held_up:
                    os.kill(child.pid, signal.SIGSTOP)
                    monkeypatch.setattr(WorkerGroup, "result_of", wait)
                else:
                    die()
            return message

        def wait(group: WorkerGroup, step: int) -> Any:
            """All ranks have the message, and the others go on."""
            if not died:
                die()
            return result_of(group, step)

        monkeypatch.setattr(StageBalance, "due", stop)
        with pytest.raises(EngineBroken, match=rf"worker {rank} \(node 0\) is lost"):
            while True:
                tokens(llm)
        assert time.monotonic() - died[0] < SOON_S
