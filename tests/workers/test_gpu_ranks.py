"""Ranks on two GPUs: the one-shot sum against plain sums, and whole models against one rank."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import run

import pytest
import torch

from gllm_engine import LLM, SamplingParams, write_tiny_model
from gllm_engine.ops import reference
from gllm_engine.parallel import Mesh, join_ranks, talk_through

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed"),
]
DIM = 5120
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 5,
    "vocab_size": 8192,
}
PROMPTS = [f"Number {i} says hello. " * (1 + 5 * i) for i in range(12)]
CONFIG = {"num_pages": 1000, "max_num_seqs": 16, "max_num_batched_tokens": 256}
WAYS = {
    "tensor": {"tensor_parallel_size": 2},
    "tensor, eager": {"tensor_parallel_size": 2, "enforce_eager": True},
    "pipeline": {"pipeline_parallel_size": 2},
    "pipeline, layers move": {"pipeline_parallel_size": 2, "spare_layers": 1},
    "experts": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
}


def test_one_shot_sum(tmp_path: Path) -> None:
    """In graphs too, and ranks get the same bits."""
    processes = [sys.executable, __file__, str(tmp_path / "store")]
    done = run(processes, timeout=100, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("way", WAYS)
def test_one_rank_and_two_choose_the_same(way: str, tmp_path: Path) -> None:
    from moving import restless_layers, serve_until_moved  # a process runs this file too

    family = "Qwen3MoeForCausalLM" if way == "experts" else "Qwen3ForCausalLM"
    model = write_tiny_model(tmp_path, family, dtype="float32", **SHAPE)
    asked = [
        SamplingParams(max_tokens=24, ignore_eos=True, temperature=i % 3 and 0.7, seed=i)
        for i in range(len(PROMPTS))
    ]
    asked[1] = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0, presence_penalty=0.5)
    texts = []
    for config in ({}, WAYS[way]):
        # Each move captures graphs.
        with restless_layers(4) as left, LLM(str(model), dtype="float32", **CONFIG | config) as llm:

            def serve() -> None:
                answers = llm.generate(PROMPTS, asked)  # noqa: B023
                texts.append([list(answer.outputs[0].token_ids) for answer in answers])

            serve_until_moved(llm, left, serve)
            llm.engine.check_integrity()
    assert all(text == texts[0] for text in texts[1:])


@pytest.mark.parametrize("way", ["tensor, eager", "pipeline"])
def test_a_timeline(way: str, tmp_path: Path) -> None:
    """The clocks of both devices are the host's: a stage receives what the other has computed."""
    from trace_checks import CLOCKS_US, read_trace, tracks  # a process runs this file too

    model = write_tiny_model(tmp_path / "model", "Qwen3ForCausalLM", **SHAPE)
    path = tmp_path / "out.json"
    asked = SamplingParams(max_tokens=64, ignore_eos=True)
    with LLM(str(model), **CONFIG, **WAYS[way], timeline=str(path)) as llm:
        for _ in range(10):
            llm.generate(PROMPTS, asked)
    trace = read_trace(path)
    first, second = trace["otherData"]["summary"]["shares"]
    if way == "tensor, eager":
        assert first["communication"] > 0 and second["communication"] > 0
        return
    assert first["bubble"] > 0
    found = tracks(trace)
    ends = {e["args"]["step"]: e["ts"] + e["dur"] for e in found["rank 0, stage 0", "device"]}
    received = [e for e in found["rank 1, stage 1", "device"] if e["name"] == "receive"]
    assert len(received) > 100
    for event in received:
        if event["args"]["step"]:
            assert event["ts"] + event["dur"] >= ends[event["args"]["step"]] - CLOCKS_US


@pytest.mark.parametrize("way", ["tensor", "experts", "pipeline, layers move"])
def test_in_bfloat16_the_chances_are_close(way: str, tmp_path: Path) -> None:
    from moving import restless_layers  # a process runs this file too

    family = "Qwen3MoeForCausalLM" if way == "experts" else "Qwen3ForCausalLM"
    # All experts: of few a rounding could choose others.
    more = {"num_experts_per_tok": 8, "num_experts": 8} if way == "experts" else {}
    model = write_tiny_model(tmp_path, family, dtype="bfloat16", **SHAPE, **more)
    asked = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0, logprobs=0)
    scored = []
    for config in ({}, WAYS[way]):
        with restless_layers(4), LLM(str(model), dtype="bfloat16", **CONFIG | config) as llm:
            answers = llm.generate(PROMPTS, asked)
            scored.append([list(a.outputs[0].token_ids) for a in answers])
            scored.append(
                [
                    [
                        entry[id]["logprob"]
                        for id, entry in zip(one.token_ids, one.logprobs, strict=True)
                    ]
                    for one in (answer.outputs[0] for answer in answers)
                ]
            )
    off = [
        abs(a - b)
        for ids, values, ids2, values2 in zip(*scored, strict=True)
        for i, (a, b) in enumerate(zip(values, values2, strict=True))
        if ids[: i + 1] == ids2[: i + 1]
    ]
    assert len(off) >= 24 and sum(off) / len(off) < 0.05, (len(off), off)


def _sum_as(rank: int, store: str) -> None:
    from gllm_engine.ops.triton import make_one_shot_allreduce

    talk_through("127.0.0.1")
    device = torch.device("cuda", rank)
    place = torch.distributed.FileStore(store, 2)
    tensor = join_ranks(Mesh(1, 2), rank, 2, place, device).tensor
    summing = make_one_shot_allreduce(tensor, DIM, torch.bfloat16)
    assert summing is not None and not summing.takes(torch.empty(65, DIM))
    gain = torch.rand(DIM, generator=torch.Generator().manual_seed(5)).bfloat16().to(device)
    for turn, rows in enumerate((1, 64, 5, 33, 1, 64)):
        generator = torch.Generator().manual_seed(turn)
        parts = torch.randn(2, rows, DIM, generator=generator).bfloat16().to(device)
        before = torch.randn(rows, DIM, generator=generator).bfloat16().to(device)
        total = before.clone()
        normed = summing(parts[rank], total, (gain, 1e-6) if turn % 2 else None)
        assert torch.equal(total, (parts.float().sum(0) + before.float()).bfloat16())
        assert (normed is None) == (turn % 2 == 0)
        if normed is not None:
            torch.testing.assert_close(normed, reference.rms_norm(total, gain, 1e-6))
    _replay(summing, rank, device)


def _replay(summing, rank: int, device: torch.device) -> None:
    """Two sums a graph, many replays: one that overtakes another would be seen."""
    part = torch.full((8, DIM), float(rank + 1), device=device).bfloat16()
    total = torch.zeros(8, DIM, device=device).bfloat16()
    summing(part, total, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total.zero_()
        summing(part, total, None)
        part.add_(total, alpha=1 / 64).clamp_(max=4)
        total.zero_()
        summing(part, total, None)
    for _ in range(300):
        graph.replay()
    torch.cuda.synchronize(device)
    assert torch.equal(total, torch.full_like(total, 8))


if __name__ == "__main__":
    torch.multiprocessing.spawn(_sum_as, (sys.argv[1],), nprocs=2)
