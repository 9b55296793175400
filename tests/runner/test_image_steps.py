"""Steps of sequences with images: rotary positions, and pieces beside steps that have none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from pictured import compare, request, run
from taped_graphs import tape_graphs

from gllm_engine.arch import Model, read_arch
from gllm_engine.config import EngineConfig
from gllm_engine.engine.core import Engine
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.ops import reference
from gllm_engine.runner import Runner
from gllm_engine.runner.batch import build_step, decode_batch
from gllm_engine.runner.graph_pool import GraphPool
from gllm_engine.runner.slot_table import SlotTable
from gllm_engine.runner.step_pieces import StepPieces
from gllm_engine.sampling import SamplingParams
from gllm_engine.types import Chunk, NewPages, NewSequence, StepPlan
from gllm_engine.workers.build_runner import load_runner

CPU = torch.device("cpu")
PAGES = 80
PAGE_SIZE = 4


@torch.inference_mode()
def in_pieces(config: EngineConfig, arch: Model) -> Runner:
    runner = load_runner(replace(config, num_pages=PAGES + 1), arch, CPU)
    runner.num_pages = PAGES  # and a spare one, as on a GPU
    runner._pieces = StepPieces(runner.decoder, runner.cache, 64, PAGES * PAGE_SIZE)
    runner._pieces.capture(GraphPool(CPU))
    return runner


@pytest.mark.parametrize(
    "family", ["Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"]
)
def test_pieces_take_the_steps_without_images(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a step may decode sequences that began with an image."""
    taped = tape_graphs(monkeypatch)
    path = write_tiny_model(tmp_path, family, seed=6)
    vision = read_arch(path).vision
    assert vision is not None
    outputs = []
    for make in (None, in_pieces):
        engine = Engine(
            EngineConfig(
                model=str(path),
                device="cpu",
                cpu_threads=1,
                max_model_len=128,
                page_size=PAGE_SIZE,
                num_pages=PAGES,
                max_num_batched_tokens=24,
            ),
            make,
        )
        asked = [request(vision, 5, ("a", 3, 4), 4), request(vision, 40), request(vision, 31)]
        outputs.append(run(engine, asked))
        engine.close()
    assert sum(graph.replays for graph in taped.made) > 2
    compare(outputs[1], outputs[0])


def test_rotary_positions_of_a_step() -> None:
    table = SlotTable(3, 4, 12, PAGE_SIZE, CPU, has_sections=True)
    packed = torch.tensor([[3, 4], [5, 6], [7, 8]], dtype=torch.int32).numpy().tobytes()
    new = [
        NewSequence(slot, 0, 3, SamplingParams(), rotary_offset=offset)
        for slot, offset in enumerate([-2, 0, 0])
    ]
    pages = [NewPages(slot, 0, [slot, slot + 3]) for slot in range(3)]
    chunks = [Chunk(0, 0, [9, 9, 9], True), Chunk(1, 0, [9], True), Chunk(2, 0, [9], False)]
    plan = StepPlan(1, new, pages, [], chunks)
    rows = table.begin(plan)
    assert rows is not None
    assert build_step(plan, table, rows, reference).batch.rotation.tolist() == [0, 1, 2, 0, 0]
    chunks = [Chunk(2, 1, [9, 9], True, rotary_positions=packed), Chunk(1, 1, [9], True)]
    plan = StepPlan(2, [], [], [0], chunks)
    rows = table.begin(plan)
    assert rows is not None
    batch = build_step(plan, table, rows, reference).batch
    assert batch.positions.tolist() == [3, 1, 2, 1]
    assert batch.rotation.tolist() == [[1, 3, 4, 1], [1, 5, 6, 1], [1, 7, 8, 1]]
    slots = torch.tensor([1, 0])
    assert decode_batch(table, slots, rows.context_lens_cpu, reference).rotation.tolist() == [2, 2]
    plan = StepPlan(3, [], [], [0], [Chunk(2, 3, [9], True)])
    rows = table.begin(plan)
    assert rows is not None
    assert build_step(plan, table, rows, reference).batch.rotation.tolist() == [3, 3]
    plan = StepPlan(4, new[1:2], [NewPages(1, 0, [5])], [], [Chunk(1, 0, [9], True)])
    rows = table.begin(plan)
    assert table.rotary_offsets is not None and table.rotary_offsets.tolist() == [-2, 0, 0]
    text = SlotTable(3, 4, 12, PAGE_SIZE, CPU)
    assert decode_batch(text, slots, rows.context_lens_cpu, reference).rotary_positions is None
