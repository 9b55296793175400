"""What is measured for the cut of a pipeline, and the cut that follows, with made-up times."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gllm_engine.arch import Model, read_arch
from gllm_engine.config import EngineConfig
from gllm_engine.model import Decoder, LayerCache
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.ops import reference
from gllm_engine.parallel import Mesh, Pipe, RankGroups, TensorParallel
from gllm_engine.runner import measure_partition, pp_partition

CPU = torch.device("cpu")
ROWS = 8  # with logits
# Layers alike and tied; a window every other layer; dense, then experts; layers with states; runs
# of several layers.
FAMILIES = {
    "Qwen3ForCausalLM": {"tie_word_embeddings": True},
    "GptOssForCausalLM": {},
    "DeepseekV3ForCausalLM": {},
    "Qwen3NextForCausalLM": {},
    "GlmMoeDsaForCausalLM": {"num_hidden_layers": 4, "indexer_types": ["full", "shared"] * 2},
}


class Alone(RankGroups):
    """The first of so many ranks, without the others."""

    def broadcast(self, numbers: list[float]) -> list[float]:
        return numbers


def ranks_of(pp: int = 1, tp: int = 1, device: torch.device = CPU) -> RankGroups:
    tensor = TensorParallel(0, tp, device, None, same_node=True)
    return Alone(Mesh(pp, tp), 0, tensor, Pipe(), leads_node=True, neighbours={})


def made(directory: Path, family: str, **over: Any) -> tuple[EngineConfig, Model]:
    arch = read_arch(write_tiny_model(directory, family, seed=3, **over))
    return EngineConfig(model=str(directory), device="cpu", max_num_seqs=ROWS), arch


class Watched(Decoder):
    """Its cache is NaN at first. `alive`: those whose memory is not free again."""

    alive: ClassVar[weakref.WeakSet[Decoder]] = weakref.WeakSet()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.alive.add(self)

    def new_cache(self, *args: Any, **options: Any) -> list[LayerCache]:
        cache = super().new_cache(*args, **options)
        for part in chain.from_iterable(cache):
            part.fill_(torch.nan)
        return cache


class Clock:
    """Takes the place of `times`: runs what is measured once, and makes up how long it takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, layers: float, end: float) -> None:
        self.results: list[Tensor] = []
        self._seconds = {2 * ROWS: layers, ROWS: end}
        monkeypatch.setattr(pp_partition, "times", self)
        monkeypatch.setattr(pp_partition, "Decoder", Watched)

    def __call__(self, run: Callable[[], Tensor], device: torch.device, count: int) -> list[float]:
        assert device == CPU and len(Watched.alive) == 1
        result = run()
        self.results.append(result)
        seconds = self._seconds[len(result)]
        return [2 * seconds, *[seconds] * (count - 1)]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_each_kind_of_layers(
    family: str, tp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then one of these that samples a token for half of its rows. No rank but the first is
    needed, and no two rows are alike.
    """
    config, arch = made(tmp_path, family, **FAMILIES[family])
    kinds = len(set(arch.runs()))
    assert kinds == {"Qwen3ForCausalLM": 1}.get(family, 2)
    clock = Clock(monkeypatch, layers=3.0, end=2.0)
    costs = pp_partition._measure(config, arch, ranks_of(tp=tp), torch.float32)
    assert costs == [3.0] * len(arch.runs()) + [-1.0]
    assert len(clock.results) == 2 * kinds and not Watched.alive
    for stream, tokens in zip(clock.results[::2], clock.results[1::2], strict=True):
        assert stream.shape == (2 * ROWS, arch.dim) and stream.isfinite().all()
        assert len(stream.unique(dim=0)) == 2 * ROWS
        assert tokens.shape == (ROWS,) and 0 <= min(tokens) <= max(tokens) < arch.vocab


def test_all_experts_are_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the tokens of many requests; a few experts' weights would take less time to read."""
    config, arch = made(tmp_path, "Qwen3MoeForCausalLM", num_experts=8, num_experts_per_tok=2)
    route = reference.route
    chosen: set[int] = set()

    def watched(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        weights, experts = route(*args, **options)
        chosen.update(experts.unique().tolist())
        return weights, experts

    monkeypatch.setattr(reference, "route", watched)
    Clock(monkeypatch, 1.0, 1.0)
    pp_partition._measure(config, arch, ranks_of(), torch.float32)
    assert chosen == set(range(8))


def test_rows_have_caches_of_their_own_as_far_as_memory_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, arch = made(tmp_path, "Qwen3NextForCausalLM")
    context = min(512, arch.max_len)
    seen = []

    def times(run: Any, *_: object) -> list[float]:
        if isinstance(run, partial):
            batch, cache = run.args
            seen.append((len(batch.page_table[0]), len(batch.slots.unique()), len(cache[0][0])))
            assert batch.context_lens_cpu.tolist() == [context] * 2 * ROWS
            assert batch.num_decode == 2 * ROWS  # the only steps for CUDA graphs
        return [1.0]

    monkeypatch.setattr(pp_partition, "times", times)
    pages = -(-context // config.page_size)
    for limit, slots in ((1 << 30, 2 * ROWS), (1, 1)):
        monkeypatch.setattr(pp_partition, "_CACHE_BYTES", limit)
        pp_partition._measure(config, arch, ranks_of(), torch.float32)
        with_states, with_pages = seen
        assert with_states == (slots, slots, slots)
        assert with_pages == (slots, slots, slots * pages)
        seen.clear()


@pytest.mark.parametrize(
    ("layers", "end", "stages", "cut"),
    [
        (1.0, 1.0, 2, (4, 4)),
        (1.0, 1.9, 2, (4, 4)),
        (1.0, 2.1, 2, (5, 3)),  # so much dearer than a layer, the end takes the place of one
        (1.0, 9.0, 2, (7, 1)),
        (1.0, 0.5, 2, (4, 4)),
        (1.0, 0.5, 3, (2, 3, 3)),  # the half of a layer that is saved belongs to the last stage
        (1.0, 2.5, 3, (3, 3, 2)),
        (1.0, 1e-6, 7, (1, 1, 1, 1, 1, 1, 2)),
    ],
)
def test_the_cut_of_eight_layers(
    layers: float,
    end: float,
    stages: int,
    cut: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`end`: of the step of one layer, the logits and the sampling."""
    config, arch = made(tmp_path, "Qwen3ForCausalLM", num_hidden_layers=8)
    Clock(monkeypatch, layers, end)
    assert measure_partition(config, arch, ranks_of(stages), torch.float32) == cut


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_the_steps_are_captured(family: str, tmp_path: Path) -> None:
    config, arch = made(tmp_path, family, **FAMILIES[family])
    ranks = ranks_of(device=torch.device("cuda"))
    *costs, tail = pp_partition._measure(config, arch, ranks, torch.bfloat16)
    assert len(costs) == len(arch.runs())
    assert min(costs) > 0 and costs[-1] + tail > 0
