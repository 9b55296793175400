"""The engine on a GPU: graphs, overlap and the CPU's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gllm_engine import LLM, SamplingParams

pytestmark = pytest.mark.gpu
SHAKESPEARE = str(Path(__file__).parents[2] / "model_repository/shakespeare/1")
PROMPTS = [
    "ROMEO:\n", "First Citizen:\nBefore we proceed", "O", "KING HENRY:\nOnce more unto the breach",
    "The quality of mercy is not", "HAMLET:\nTo be", "JULIET:\n", "Now is the winter of our",
]  # fmt: skip
LENGTHS = [90, 64, 33, 120, 17, 5, 77, 50]
SMALL = {"max_model_len": 512, "num_pages": 2000, "max_num_seqs": 12}


def generate(sampling: list[SamplingParams], **config: Any) -> list[list[int]]:
    with LLM(SHAKESPEARE, **{**SMALL, **config}) as llm:
        outputs = llm.generate(PROMPTS, sampling)
        llm.engine.check_integrity()
    return [output.outputs[0].token_ids for output in outputs]


def params(**more: Any) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=n, ignore_eos=True, seed=n, **more) for n in LENGTHS]


def agreement(a: list[list[int]], b: list[list[int]]) -> float:
    """Share of tokens before the first difference."""
    same = 0
    for left, right in zip(a, b, strict=True):
        differ = [i for i, (x, y) in enumerate(zip(left, right, strict=True)) if x != y]
        same += differ[0] if differ else len(left)
    return same / sum(map(len, a))


@pytest.fixture(scope="module")
def cpu() -> list[list[int]]:
    return generate(params(temperature=0), device="cpu", dtype="float32")


def test_greedy_tokens_are_the_cpus(cpu: list[list[int]]) -> None:
    assert generate(params(temperature=0), dtype="float32") == cpu


def test_greedy_tokens_in_bfloat16(cpu: list[list[int]]) -> None:
    """Rounding decides where two tokens are about as likely; mostly they are not."""
    share = agreement(cpu, generate(params(temperature=0), dtype="bfloat16"))
    print(f"bfloat16 agrees with the CPU's float32 on {share:.1%} of the tokens")
    assert share > 0.4


def test_greedy_tokens_over_a_float8_cache() -> None:
    """Without FlashInfer's kernels as on the CPU; with them, a prompt attends to unrounded K, V."""
    float8 = {"kv_cache_dtype": "fp8"}
    expected = generate(params(temperature=0), device="cpu", dtype="float32", **float8)
    for dtype, least in (("float32", 0.7), ("bfloat16", 0.3)):
        found = generate(params(temperature=0), dtype=dtype, **float8)
        share = agreement(expected, found)
        print(f"{dtype} with a float8 cache agrees with the CPU on {share:.1%} of the tokens")
        assert share > least


SAMPLINGS = {
    "greedy": {"temperature": 0},
    "random": {"temperature": 1.0},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "penalties": {"temperature": 1.0, "presence_penalty": 0.5, "min_tokens": 3},
}


@pytest.mark.parametrize("cache", ["auto", "fp8"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_graphs_overlap_and_chunks_change_nothing(sampling: str, cache: str) -> None:
    wanted, config = params(**SAMPLINGS[sampling]), {"kv_cache_dtype": cache}
    plain = generate(wanted, enforce_eager=True, plans_in_flight=1, **config)
    assert generate(wanted, plans_in_flight=1, **config) == plain
    assert generate(wanted, **config) == plain
    assert generate(wanted, plans_in_flight=3, **config) == plain


def test_a_float8_cache_has_twice_the_pages() -> None:
    config = {"num_pages": None, "kv_cache_gib": 0.1, "dtype": "bfloat16"}
    with LLM(SHAKESPEARE, **SMALL | config) as llm:
        plain = llm.engine.info.num_pages
    with LLM(SHAKESPEARE, **SMALL | config, kv_cache_dtype="fp8") as llm:
        assert llm.engine.info.num_pages in (2 * plain, 2 * plain + 1)


def test_logprobs_come_with_graphs() -> None:
    with LLM(SHAKESPEARE, **SMALL) as llm:
        (output,) = llm.generate(
            "ROMEO:\n", SamplingParams(max_tokens=9, temperature=0, logprobs=2)
        )
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None and len(logprobs) == 9


def test_nothing_leaks_when_requests_are_dropped() -> None:
    with LLM(SHAKESPEARE, **SMALL) as llm:
        for round in range(20):
            streams = [llm.stream(p, s) for p, s in zip(PROMPTS, params(), strict=True)]
            for number, stream in enumerate(streams):
                next(stream)
                if (number + round) % 5 == 0:
                    stream.close()
            for stream in streams:
                list(stream)
        llm.engine.check_integrity()
        assert not llm.engine.has_work
        assert llm.engine.stats().kv_usage == 0
