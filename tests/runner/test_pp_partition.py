"""What is measured for the cut of a pipeline, with made-up times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gllm_engine.arch import read_arch
from gllm_engine.config import EngineConfig
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.parallel import Mesh, Pipe, RankGroups, TensorParallel
from gllm_engine.runner import pp_partition


@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "GptOssForCausalLM"])
def test_the_end_of_the_model_costs_what_it_adds_to_the_last_layer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of whole layers take 5, 6, ... seconds; one with the end of the model a second less
    than the layer before it, whose other tokens it does not compute.
    """
    arch = read_arch(write_tiny_model(tmp_path, name, seed=3))
    cpu = torch.device("cpu")
    ranks = RankGroups(
        Mesh(), 0, TensorParallel(0, 1, cpu, None, same_node=True), Pipe(), leads_node=True
    )
    kinds = list(dict.fromkeys(arch.runs()))
    rows: list[int] = []

    def times(run: Callable[[], object], *_: object) -> list[float]:
        result = run()
        assert isinstance(result, torch.Tensor)
        rows.append(len(result))
        full = 4.0 + sum(count > 9 for count in rows)
        return [full + 7, full - (len(result) == 9), full + 1]

    monkeypatch.setattr(pp_partition, "times", times)
    config = EngineConfig(model=str(tmp_path), device="cpu", max_num_seqs=8)
    costs = pp_partition._measure(config, arch, kinds, ranks, torch.float32)
    assert costs == [5.0 + i for i in range(len(kinds))] + [-1.0]
    assert sorted(rows) == [9] + [16] * len(kinds)  # 8 decode rows, and a chunk of 8 tokens
