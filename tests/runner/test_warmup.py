"""The first steps are of every kind, and nobody can tell afterwards that they were taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from drive import Drive, Job, greedy
from loaded import load_model

from gllm_engine.arch import Model, read_arch
from gllm_engine.config import EngineConfig
from gllm_engine.engine.core import Engine
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.runner import PlanError, Runner
from gllm_engine.runner.warmup import rows_to_try, tiny_plans
from gllm_engine.sampling import SamplingParams
from gllm_engine.types import Request, StepPlan


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), "Qwen3ForCausalLM", seed=3)


def make_runner(config: EngineConfig, arch: Model) -> Runner:
    path, cpu = Path(config.model), torch.device("cpu")
    decoder = load_model(path, arch, dtype=torch.float32, device=cpu, max_model_len=64)
    return Runner(config, arch, decoder)


def make_config(path: Path, page_size: int = 4, max_num_seqs: int = 4) -> EngineConfig:
    return EngineConfig(
        model=str(path),
        device="cpu",
        max_num_seqs=max_num_seqs,
        page_size=page_size,
        num_pages=96 // page_size,
        max_model_len=64,
    )


def warmed(config: EngineConfig, arch: Model) -> Runner:
    runner = make_runner(config, arch)
    for plan in tiny_plans(config.max_num_seqs, 2048, 64, config.page_size):
        result = runner.launch(plan).wait()
        assert len(result.tokens) == len(plan.decode_slots) + sum(c.samples for c in plan.chunks)
    return runner


def kind(plan: StepPlan) -> tuple[int, tuple[bool, ...]]:
    return len(plan.decode_slots), tuple(chunk.start > 0 for chunk in plan.chunks)


def test_every_kind_of_step_is_there() -> None:
    plans = list(tiny_plans(4, 2048, 64, 16))
    kinds = {kind(plan) for plan in plans if all(len(c.tokens) == 2 for c in plan.chunks)}
    fresh, later = (False,), (True,)
    alone = {(0, fresh), (0, later), (1, ()), (0, ())}
    assert kinds == alone | {(1, fresh), (1, later), (2, fresh), (3, fresh), (4, ())}
    assert {kind(plan) for plan in tiny_plans(1, 2048, 64, 16)} == alone
    sizes = [[len(c.tokens) for c in plan.chunks] for plan in plans[:-1]]
    assert sizes[-9:] == [[8], [16], [32], [64], *([64] * n for n in (2, 4, 4, 4, 4))]


@pytest.mark.parametrize("most", [1, 2, 7, 31, 100, 1000, 1023])
def test_numbers_of_rows_stand_for_all(most: int) -> None:
    """As far as a power of two, being 1, and being a multiple of 16 tell numbers apart."""

    def told_apart(n: int) -> tuple[int, bool, bool]:
        return (n - 1).bit_length(), n == 1, n % 16 == 0

    tried = rows_to_try(most)
    assert set(tried) <= set(range(1, most + 1)) and len(tried) <= 3 * most.bit_length()
    assert {told_apart(n) for n in tried} == {told_apart(n) for n in range(1, most + 1)}


@pytest.mark.parametrize(("max_rows", "max_tokens"), [(1, 3), (2, 3), (1024, 1024), (1024, 8192)])
@pytest.mark.parametrize("page_size", [1, 4, 256])
def test_limits_are_kept(max_rows: int, max_tokens: int, page_size: int) -> None:
    written = 0
    plans = list(tiny_plans(max_rows, max_tokens, 4, page_size))
    for plan in plans:
        slots = [*plan.decode_slots, *(chunk.slot for chunk in plan.chunks)]
        assert len(slots) <= max_rows and len(set(slots)) == len(slots)
        assert len(plan.decode_slots) + sum(len(c.tokens) for c in plan.chunks) <= max_tokens
        assert all(len(g.pages) * page_size < 4 + page_size for g in plan.new_pages)
        for chunk in plan.chunks:
            assert chunk.start <= written and chunk.start + len(chunk.tokens) <= 4
            written = max(written, chunk.start + len(chunk.tokens))
    assert [new.slot for new in plans[-1].new] == list(range(max_rows))
    assert not plans[-1].new_pages


def test_no_room_no_steps() -> None:
    assert not list(tiny_plans(4, 2, 64, 16)) and not list(tiny_plans(4, 64, 3, 16))


@pytest.mark.parametrize("max_num_seqs", [1, 4])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_slots_have_no_owner_afterwards(path: Path, page_size: int, max_num_seqs: int) -> None:
    config = make_config(path, page_size, max_num_seqs)
    runner = warmed(config, read_arch(path))
    fresh = make_runner(config, read_arch(path)).table
    for name in ("page_table", "lengths"):
        assert torch.equal(getattr(runner.table, name), getattr(fresh, name)), name
    for name in ("lengths_cpu", "num_pages_cpu"):
        assert (getattr(runner.table, name) == getattr(fresh, name)).all(), name
    assert not runner.sampling.min_len_cpu.any()
    with pytest.raises(PlanError, match="its pages hold 0"):
        runner.launch(StepPlan(1, [], [], [0], []))


@pytest.mark.parametrize("sampling", [greedy(), SamplingParams(temperature=1.0)])
def test_tokens_are_the_same_afterwards(path: Path, sampling: SamplingParams) -> None:
    config, arch = make_config(path), read_arch(path)
    jobs = [[Job(i, [7, 8, 9, 10, 11][i:], sampling, seed=i) for i in range(3)] for _ in range(2)]
    expected = Drive(make_runner(config, arch), 4).run(jobs[0], 8, chunk_len=2)
    assert Drive(warmed(config, arch), 4).run(jobs[1], 8, chunk_len=2) == expected


def test_the_prefix_cache_knows_nothing_of_it(path: Path) -> None:
    engine = Engine(make_config(path), warmed)
    engine.check_integrity()
    for _ in range(2):  # the same tokens as the first steps had
        engine.add(Request(1, [0] * 9, SamplingParams(max_tokens=1), seed=0))
        while engine.has_work:
            engine.step()
    assert engine.stats().prefix_hits == 8  # from the first of the two, none from before
    engine.check_integrity()
    engine.close()
