"""However many ranks compute a prompt with images, the tokens are those of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pictured import compare, request, run

from gllm_engine import write_tiny_model
from gllm_engine.arch import read_arch
from gllm_engine.config import ConfigError, EngineConfig
from gllm_engine.engine.core import Engine
from gllm_engine.workers.build_runner import check_shards

pytestmark = pytest.mark.usefixtures("quick_starts")

DEEP = "Qwen3VLForConditionalGeneration"  # with what is added after the first two of three layers
SMALL = {
    "device": "cpu", "cpu_threads": 1, "max_model_len": 128, "page_size": 4, "num_pages": 80,
    "num_snapshots": 8,
}  # fmt: skip
TIGHT = {"max_num_batched_tokens": 16, "encoder_budget": 12, "image_cache_tokens": 20}


@pytest.mark.parametrize(
    ("family", "stages", "size"),
    [(DEEP, 2, 2), ("Qwen3_5ForConditionalGeneration", 2, 1)],
)
def test_ranks_agree(tmp_path: Path, family: str, stages: int, size: int) -> None:
    path = write_tiny_model(tmp_path, family, seed=4)
    vision = read_arch(path).vision
    assert vision is not None

    def outputs(**config: Any) -> Any:
        engine = Engine(EngineConfig(model=str(path), **SMALL, **config))
        try:
            asked = [
                request(vision, 5, ("a", 3, 4), 4),
                request(vision, ("c", 1, 2), 1, ("a", 3, 4), 2, ("d", 5, 2), 20),
                request(vision, 9),
            ]
            return run(engine, asked) + run(engine, [request(vision, 5, ("b", 3, 4), 4)])
        finally:
            engine.close()

    ranks = {"pipeline_parallel_size": stages, "tensor_parallel_size": size}
    compare(outputs(**TIGHT, **ranks), outputs())


def test_the_first_stage_has_the_layers_that_add_embeddings(tmp_path: Path) -> None:
    arch = read_arch(write_tiny_model(tmp_path, DEEP))
    assert [len(run) for run in arch.runs()] == [2, 1]
    check_shards(EngineConfig(model=".", pipeline_parallel_size=2, assigned_layers="2,1"), arch)
    with pytest.raises(ConfigError, match="stage begin with layer 1: .* in the first, so a stage"):
        check_shards(EngineConfig(model=".", pipeline_parallel_size=2, assigned_layers="1,2"), arch)
