"""Ranks that share a model's layers go on with the same tokens, even if they would choose others.

Two processes on the CPU. The second one is made to disagree: it has other seeds, or samples another
token than it should. Without the first one's word each would go on with a text of its own.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest
import torch
from torch import Tensor

from gllm_engine.ops import PlainSampling, reference
from gllm_engine.parallel import Mesh, RankGroups, join_ranks, talk_through

ROWS, VOCAB = 12, 5987
WIDTH = 3000  # of the logits of each rank
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two ranks have sampled."""
    from patience import SCRIPT_S

    from gllm_engine.model.tiny import write_tiny_model

    folder = tmp_path_factory.mktemp("ranks")
    write_tiny_model(folder / "model", "LlamaForCausalLM", seed=1)
    ranks = [
        Popen([sys.executable, __file__, str(rank), str(folder)], stderr=PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=SCRIPT_S)
            assert rank.returncode == 0, errors[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def plain_case(rank: int) -> tuple[Tensor, Tensor, PlainSampling]:
    """Scores, then what sample_plain takes; the last rows are greedy. `rank`: whose seeds."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(ROWS, VOCAB, generator=generator) * 3
    slots = torch.randperm(ROWS, generator=generator)
    temperature = torch.ones(ROWS).double()
    temperature[slots[8:]] = 0
    seeds = torch.arange(ROWS) + 1000 * rank
    prompt_lens, lengths = torch.zeros(ROWS).long(), torch.full((ROWS,), 5)
    last_tokens = torch.zeros(ROWS).long()
    return scores, slots, PlainSampling(temperature, seeds, prompt_lens, lengths, last_tokens)


def alone(rank: int) -> list[int]:
    return reference.sample_plain(*plain_case(rank)).tolist()


def test_the_case_is_one_in_which_ranks_disagree() -> None:
    assert sum(a != b for a, b in zip(alone(0), alone(1), strict=True)) == 8


def test_plain_sampling_gives_the_first_ranks_tokens(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["reference"] == [alone(0), alone(0)]  # what was returned, and remembered


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
def test_the_kernel_gives_all_ranks_the_same_tokens(found: list[dict[str, Any]]) -> None:
    assert found[0]["kernel, agreeing"] == found[1]["kernel, agreeing"] == [alone(0), alone(0)]
    tokens, remembered = found[0]["kernel"]
    assert found[1]["kernel"] == [tokens, remembered] and tokens == remembered
    assert all(0 <= token < VOCAB for token in tokens)
    assert tokens[8:] == alone(0)[8:]
    # What one of them would choose; what neither has marked is the most likely token.
    likely = plain_case(0)[0].argmax(-1).tolist()
    choices = list(zip(alone(0), alone(1), likely, strict=True))
    assert all(token in choice for token, choice in zip(tokens, choices, strict=True))


def test_runners_go_on_with_the_first_ranks_tokens(found: list[dict[str, Any]]) -> None:
    assert found[0]["runner"] == found[1]["runner"]
    # The second rank's own would have been the next token of the vocabulary, from the first on.
    assert found[0]["runner"] == found[0]["runner, agreeing"]


def _as_rank(rank: int, folder: str) -> None:
    from gllm_engine.ops import triton

    talk_through("127.0.0.1")
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    store.set_timeout(timedelta(minutes=5))
    ranks = join_ranks(Mesh(1, 2), rank, 2, store, torch.device("cpu"))
    ways: dict[str, Any] = {"reference": (reference.sample_plain, rank)}
    if INTERPRETED:
        ways |= {
            "kernel, agreeing": (triton.sample_plain, 0),
            "kernel": (triton.sample_plain, rank),
        }
    found: dict[str, Any] = {}
    for name, (sample_plain, whose) in ways.items():
        scores, slots, state = plain_case(whose)
        # What follows the vocabulary would be chosen if it were read.
        whole = torch.nn.functional.pad(scores, (0, 2 * WIDTH - VOCAB), value=1e4)
        share = whole.chunk(2, 1)[rank].contiguous()
        tokens = sample_plain(share, slots, state, ranks=ranks.tensor, vocab=VOCAB)
        found[name] = [tokens.tolist(), state.last_tokens[slots].tolist()]
    found["runner, agreeing"] = _drive(ranks, folder)
    if rank == 1:
        from gllm_engine.runner import runner

        real = runner.sample
        runner.sample = lambda logits, batch: (real(logits, batch) + 1) % 384
    found["runner"] = _drive(ranks, folder)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # gloo's threads can abort a process whose interpreter ends before them


def _drive(ranks: RankGroups, folder: str) -> list[list[int]]:
    from drive import Drive, Job

    from gllm_engine.arch import read_arch
    from gllm_engine.config import EngineConfig
    from gllm_engine.sampling import SamplingParams
    from gllm_engine.workers.build_runner import load_runner

    path = Path(folder, "model")
    config = EngineConfig(
        model=str(path),
        device="cpu",
        cpu_threads=1,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        page_size=4,
        num_pages=60,
        max_model_len=64,
        tensor_parallel_size=2,
    )
    runner = load_runner(config, read_arch(path), torch.device("cpu"), ranks)
    sampling = SamplingParams(top_k=30, repetition_penalty=1.2)
    jobs = [Job(i, [5 * i + 1, 2, 3], sampling, seed=i) for i in range(3)]
    return Drive(runner, 4).run(jobs, 8, depth=2)


if __name__ == "__main__":
    _as_rank(int(sys.argv[1]), sys.argv[2])
