from __future__ import annotations

import os
import random
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from drive import Drive, Job, greedy
from loaded import load_model

from gllm_engine.arch import read_arch
from gllm_engine.config import ConfigError, EngineConfig
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.runner import PlanError, Runner, default_threads
from gllm_engine.runner.kv_sizing import cache_dtype
from gllm_engine.sampling import SamplingParams
from gllm_engine.types import Chunk, NewPages, NewSequence, StepPlan

PAGE_SIZE = 4
FAMILIES = ["LlamaForCausalLM", "Qwen3ForCausalLM"]


@pytest.fixture(scope="module", params=FAMILIES)
def path(request, tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), request.param, seed=3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", seed=1)


def make_runner(path: Path, **over: object) -> Runner:
    values = {"max_num_seqs": 8, "page_size": PAGE_SIZE, "num_pages": 200, "max_model_len": 96}
    config = EngineConfig(model=str(path), **{**values, **over})
    arch = read_arch(path)
    cpu = torch.device("cpu")
    length = config.max_model_len or arch.max_len
    decoder = load_model(path, arch, dtype=torch.float32, device=cpu, max_model_len=length)
    return Runner(config, arch, decoder)


def prompts(lens: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(384) for _ in range(n)] for n in lens]


def jobs_for(lens: list[int], sampling: SamplingParams) -> list[Job]:
    return [Job(i, p, sampling, seed=100 + i) for i, p in enumerate(prompts(lens))]


def transformers_logits(path: Path, tokens: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def test_greedy_equals_transformers(path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    jobs = jobs_for([1, 5, 18, 33], greedy())
    outputs = Drive(make_runner(path), PAGE_SIZE).run(jobs, 20, chunk_len=7)
    for job, output in zip(jobs, outputs, strict=True):
        tokens = torch.tensor([job.prompt])
        expected = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=20,
            min_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert output == expected[0, len(job.prompt) :].tolist()


@pytest.mark.parametrize("sampling", [greedy(), SamplingParams(temperature=1.0, top_p=0.95)])
def test_chunks_pages_depth_and_company_do_not_change_tokens(path, sampling):
    lens = [2, 9, 30, 17]
    expected = [
        Drive(make_runner(path), PAGE_SIZE).run([job], 12)[0] for job in jobs_for(lens, sampling)
    ]
    for chunk_len, depth, pages in ((1000, 1, None), (5, 1, 7), (1, 2, 8), (4, 3, None)):
        drive = Drive(make_runner(path), PAGE_SIZE, pages)
        assert drive.run(jobs_for(lens, sampling), 12, chunk_len, depth) == expected


def test_every_parameter_together_is_independent_of_depth_and_resumption(llama):
    """A sequence that is preempted after any number of tokens goes on as if it had not been."""
    sampling = SamplingParams(
        temperature=0.8,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        presence_penalty=0.5,
        frequency_penalty=0.4,
        repetition_penalty=1.2,
        logit_bias={5: 3.0, 6: -100.0},
        min_tokens=6,
        max_tokens=None,
        stop_token_ids=(9, 10),
    )
    runner = make_runner(llama)
    drive = Drive(runner, PAGE_SIZE, 1)
    whole = drive.run(jobs_for([3, 11], sampling), 14)
    assert drive.run(jobs_for([3, 11], sampling), 14, chunk_len=2, depth=2) == whole
    for cut in (1, 5, 13):
        resumed = jobs_for([3, 11], sampling)
        again = [
            Job(5 + i, job.prompt, sampling, job.seed, output=whole[i][:cut])
            for i, job in enumerate(resumed)
        ]
        assert drive.run(again, 14 - cut, chunk_len=4) == whole


def test_a_slot_keeps_nothing_of_its_previous_owner(llama):
    loud = SamplingParams(
        temperature=2.0,
        top_k=3,
        min_p=0.3,
        presence_penalty=2.0,
        repetition_penalty=3.0,
        logit_bias=dict.fromkeys(range(30), 50.0),
        min_tokens=50,
        max_tokens=None,
        stop_token_ids=tuple(range(40, 60)),
        logprobs=3,
    )
    quiet = [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, presence_penalty=0.1),
        SamplingParams(temperature=1.0, logit_bias={3: 1.0}),
        SamplingParams(temperature=1.0, min_tokens=2),
        greedy(repetition_penalty=1.3),
    ]

    def jobs() -> list[Job]:
        return [Job(i, [7 * i + 1, 2, 3], one, seed=i) for i, one in enumerate(quiet)]

    expected = Drive(make_runner(llama), PAGE_SIZE).run(jobs(), 10)
    drive = Drive(make_runner(llama), PAGE_SIZE)
    drive.run([Job(i, [9] * 20, loud, seed=77) for i in range(len(quiet))], 25)
    after = jobs()
    assert drive.run(after, 10) == expected
    assert not any(job.logprobs for job in after)


def test_penalties_count_prompt_and_output_apart(llama):
    """A prompt token leads by 1: presence leaves it until it is output, repetition does not."""
    prompt = [11, 12, 13, 14]
    logits = transformers_logits(llama, prompt)[-1]
    lead = {11: (logits.max() - logits[11]).item() + 1}

    def first(**penalties: float) -> int:
        job = Job(0, prompt, greedy(logit_bias=lead, **penalties))
        return Drive(make_runner(llama), PAGE_SIZE).run([job], 1)[0][0]

    assert logits.argmax() != 11 and logits.max() > 0
    assert first() == first(presence_penalty=2.0, frequency_penalty=2.0) == 11
    assert first(repetition_penalty=50.0) == logits.argmax()
    # The same context, its last token now output: the other penalties reach that token alone.
    for penalty in ("presence_penalty", "frequency_penalty"):
        lead = {14: (logits.max() - logits[14]).item() + 1}
        job = Job(0, prompt[:3], greedy(logit_bias=lead, **{penalty: 2.0}), output=[14])
        (output,) = Drive(make_runner(llama), PAGE_SIZE).run([job], 1)
        assert first() == 14 and output[1] == logits.argmax()


def test_a_frequency_penalty_bans_each_sampled_token_in_turn(llama):
    sampling = greedy(frequency_penalty=2.0, logit_bias=dict.fromkeys(range(1, 9), 30.0))
    job = Job(0, [1, 2, 3], sampling)
    (output,) = Drive(make_runner(llama), PAGE_SIZE).run([job], 80, depth=2)
    counts = [output.count(i) for i in range(1, 9)]
    assert max(counts) - min(counts) <= 10 and sum(counts) == 80
    assert len(set(output)) == 8


def test_min_tokens_forbids_eos_until_reached(llama):
    eos = read_arch(llama).eos_token_ids[0]
    sampling = greedy(logit_bias={eos: 100.0}, min_tokens=5, max_tokens=None)
    job = Job(0, [4, 5], sampling, eos=(eos,))
    (output,) = Drive(make_runner(llama), PAGE_SIZE).run([job], 8)
    assert eos not in output[:5] and output[5:] == [eos] * 3


@pytest.mark.parametrize("chunk_len", [1000, 6, 1])
def test_prompt_logprobs_equal_a_whole_forward(path, chunk_len):
    (prompt,) = prompts([23])
    job = Job(2, prompt, SamplingParams(temperature=1.0, prompt_logprobs=4))
    other = Job(0, prompt[:9], SamplingParams(prompt_logprobs=0))
    drive = Drive(make_runner(path), PAGE_SIZE, 3)
    drive.run([other, job], 3, chunk_len)
    expected = transformers_logits(path, prompt).log_softmax(-1)
    assert len(job.prompt_logprobs) == len(prompt) - 1
    for position, entry in enumerate(job.prompt_logprobs):
        scores = expected[position]
        assert entry.token_ids[0] == prompt[position + 1]
        assert entry.token_ids[1:] == scores.topk(4).indices.tolist()
        assert entry.ranks == [int((scores > scores[entry.token_ids[0]]).sum()) + 1, 1, 2, 3, 4]
        close = torch.tensor(entry.logprobs)
        torch.testing.assert_close(close, scores[entry.token_ids], atol=1e-4, rtol=1e-4)
    assert [entry.token_ids for entry in other.prompt_logprobs] == [[t] for t in prompt[1:9]]


def test_prompt_logprobs_are_the_same_in_slices(llama, monkeypatch):
    sampling = SamplingParams(prompt_logprobs=2)
    whole, sliced = (Job(0, prompts([23])[0], sampling) for _ in range(2))
    Drive(make_runner(llama), PAGE_SIZE).run([whole], 1)
    monkeypatch.setattr("gllm_engine.runner.sampler.MAX_SCORED_LOGITS", 5 * 384)
    Drive(make_runner(llama), PAGE_SIZE).run([sliced], 1)
    assert [e.token_ids for e in whole.prompt_logprobs] == [
        e.token_ids for e in sliced.prompt_logprobs
    ]


def test_logprobs_are_of_the_raw_logits(path):
    """Neither the temperature nor a bias shows in them; each row gets as many as it asked for."""
    (prompt,) = prompts([12])
    jobs = [
        Job(0, prompt, SamplingParams(temperature=3.0, logit_bias={8: 9.0}, logprobs=5), seed=1),
        Job(1, prompt, SamplingParams(temperature=0.5, logprobs=0), seed=2),
        Job(2, prompt, greedy(), seed=3),
    ]
    Drive(make_runner(path), PAGE_SIZE).run(jobs, 6, depth=2)
    assert [len(job.logprobs) for job in jobs] == [6, 6, 0]
    for job, num_top in zip(jobs[:2], (5, 0), strict=True):
        expected = transformers_logits(path, prompt + job.output).log_softmax(-1)
        for i, entry in enumerate(job.logprobs):
            scores = expected[len(prompt) - 1 + i]
            assert entry.token_ids == [job.output[i], *scores.topk(num_top).indices.tolist()]
            close = torch.tensor(entry.logprobs)
            torch.testing.assert_close(close, scores[entry.token_ids], atol=1e-4, rtol=1e-4)


def test_a_mask_rules_its_slot_only(llama):
    runner = make_runner(llama)
    allowed = bytearray(48)
    allowed[300 // 8] = 1 << (300 % 8)
    new = [NewSequence(s, s, 2, SamplingParams()) for s in (1, 3)]
    new_pages = [NewPages(1, 0, [5]), NewPages(3, 0, [6])]
    chunks = [Chunk(1, 0, [1, 2], True), Chunk(3, 0, [1, 2], True)]
    result = runner.launch(StepPlan(1, new, new_pages, [], chunks, {3: bytes(allowed)})).wait()
    free = runner.launch(StepPlan(2, new, new_pages, [], chunks)).wait()
    assert result.tokens == [free.tokens[0], 300] and free.tokens[1] != 300
    for mask, problem in ((b"", "allows no token"), (bytes(48), "allows no token")):
        with pytest.raises(PlanError, match=problem):
            runner.launch(StepPlan(3, [], [], [1, 3], [], {1: mask}))


def test_a_mask_for_a_slot_that_samples_nothing_is_an_error(llama):
    runner = make_runner(llama)
    new, new_pages = [NewSequence(1, 0, 1, SamplingParams())], [NewPages(1, 0, [0])]
    with pytest.raises(PlanError, match="slot 2: a token mask"):
        runner.launch(StepPlan(1, new, new_pages, [], [Chunk(1, 0, [4], True)], {2: b"\xff"}))


def test_a_plan_without_sampling_rows(llama):
    runner = make_runner(llama)
    (prompt,) = prompts([10])
    new, new_pages = [NewSequence(0, 0, 10, greedy())], [NewPages(0, 0, [4, 2, 0])]
    first = runner.launch(StepPlan(1, new, new_pages, [], [Chunk(0, 0, prompt[:6], False)])).wait()
    assert (first.step, first.tokens, first.logprobs, first.prompt_logprobs) == (1, [], {}, {})
    second = runner.launch(StepPlan(2, [], [], [], [Chunk(0, 6, prompt[6:], True)])).wait()
    expected = transformers_logits(llama, prompt)[-1].argmax().item()
    assert second.tokens == [expected]
    assert runner.launch(StepPlan(3, [], [], [], [])).wait().tokens == []


def test_a_chunk_may_begin_in_pages_another_sequence_wrote(llama):
    """A prefix hit: the shared pages come with NewPages, the first chunk starts behind them."""
    runner = make_runner(llama)
    (prompt,) = prompts([14])
    sampling = greedy()
    new, new_pages = [NewSequence(0, 0, 14, sampling)], [NewPages(0, 0, [9, 3, 7, 1])]
    first = runner.launch(StepPlan(1, new, new_pages, [], [Chunk(0, 0, prompt, True)])).wait()
    new, new_pages = [NewSequence(5, 0, 14, sampling)], [NewPages(5, 0, [9, 3, 7, 20])]
    second = runner.launch(
        StepPlan(2, new, new_pages, [0], [Chunk(5, 12, prompt[12:], True)])
    ).wait()
    assert second.tokens[1] == first.tokens[0]
    third = runner.launch(StepPlan(3, [], [], [5, 0], [])).wait()
    assert third.tokens[0] == second.tokens[0]


def test_penalties_see_a_prefix_that_another_sequence_computed(llama):
    """In the same step too; and what the pages' owners before had in them is not seen."""
    prompt = prompts([14])[0]
    # So that a token of the prefix is chosen, unless it is known to be in the prompt.
    likely = dict.fromkeys(prompt[:12], 40.0)
    sampling = greedy(repetition_penalty=100.0, logit_bias=likely)
    (alone,) = Drive(make_runner(llama), PAGE_SIZE).run([Job(0, prompt, sampling)], 3)
    (free,) = Drive(make_runner(llama), PAGE_SIZE).run(
        [Job(0, prompt, greedy(logit_bias=likely))], 3
    )
    assert set(free) <= set(prompt[:12]) and not set(alone) & set(prompt[:12])
    runner = make_runner(llama)
    Drive(runner, PAGE_SIZE).run([Job(7, [5] * 60, greedy())], 20)
    new = [NewSequence(0, 0, 14, greedy()), NewSequence(5, 0, 14, sampling)]
    new_pages = [NewPages(0, 0, [9, 3, 7, 1]), NewPages(5, 0, [9, 3, 7, 20, 21])]
    chunks = [Chunk(0, 0, prompt, True), Chunk(5, 12, prompt[12:], True)]
    found = [runner.launch(StepPlan(1, new, new_pages, [], chunks)).wait().tokens[1]]
    for step in (2, 3):
        found += runner.launch(StepPlan(step, [], [], [5], [])).wait().tokens
    assert found == alone


def test_penalties_keep_no_memory(llama):
    """Whoever asks for them: the runner's tensors are as large as at the start."""

    def sizes(runner: Runner) -> dict[str, int]:
        owners = (runner.table, runner.sampling)
        tensors = [(name, x) for owner in owners for name, x in vars(owner).items()]
        return {name: x.nbytes for name, x in tensors if isinstance(x, torch.Tensor)}

    runner = make_runner(llama)
    before = sizes(runner)
    assert before["cached_tokens"] == 200 * PAGE_SIZE * 8
    sampling = SamplingParams(presence_penalty=0.1, repetition_penalty=1.1)
    Drive(runner, PAGE_SIZE).run(jobs_for([9] * 8, sampling), 12)
    assert sizes(runner) == before


def test_plans_that_overrun_their_pages_are_refused(llama):
    runner = make_runner(llama)
    new = [NewSequence(0, 0, 3, greedy())]
    with pytest.raises(PlanError, match="slot 0: 5 tokens, its pages hold 4"):
        runner.launch(StepPlan(1, new, [NewPages(0, 0, [1])], [], [Chunk(0, 0, [1] * 5, True)]))
    with pytest.raises(
        PlanError, match="slot 0: 1 pages at index 2 of group 0, it has 0 of at most 24"
    ):
        runner.launch(StepPlan(1, new, [NewPages(0, 2, [1])], [], []))
    with pytest.raises(PlanError, match="25 pages at index 0"):
        runner.launch(StepPlan(1, new, [NewPages(0, 0, list(range(25)))], [], []))


def test_the_cache_fills_kv_cache_gib_and_no_more(llama):
    per_token = read_arch(llama).kv_bytes_per_token(4)
    gib = 2000 * PAGE_SIZE * per_token / 2**30
    assert make_runner(llama, num_pages=None, kv_cache_gib=gib).num_pages == 2000
    small = make_runner(llama, num_pages=None, kv_cache_gib=0.001, max_model_len=90000)
    assert small.num_pages == 2**30 // 1000 // (PAGE_SIZE * per_token)
    assert make_runner(llama, num_pages=3).num_pages == 3


def test_a_float8_cache_has_a_byte_a_number(llama):
    """So a quarter of float32's bytes, and four times its pages."""
    gib = 2000 * PAGE_SIZE * read_arch(llama).kv_bytes_per_token(4) / 2**30
    runner = make_runner(llama, num_pages=None, kv_cache_gib=gib, kv_cache_dtype="fp8")
    assert runner.num_pages == 8000
    tensors = list(chain.from_iterable(runner.cache))
    assert {tensor.dtype for tensor in tensors} == {torch.float8_e4m3fn}
    assert sum(tensor.nbytes for tensor in tensors) <= gib * 2**30


def test_cpu_threads_is_honoured(llama):
    before = torch.get_num_threads()
    try:
        make_runner(llama, cpu_threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("told", ["3", " 3 ", "3,2"])
def test_threads_are_those_that_the_environment_allows(llama, monkeypatch, told: str) -> None:
    """Also of each rank: many engines side by side must not take all cores each."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    assert default_threads() == default_threads(4) == 3
    before = torch.get_num_threads()
    try:
        make_runner(llama)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("told", ["", "0", "-2", "many"])
def test_without_it_all_cores_but_one_are_shared(monkeypatch, told: str) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    assert [default_threads(n) for n in (1, 4, 99)] == [15, 3, 1]


def test_seeds_beyond_64_bits_wrap(llama):
    outputs = [
        Drive(make_runner(llama), PAGE_SIZE).run([Job(0, [1, 2], SamplingParams(), seed=seed)], 5)
        for seed in (7, 7 + 2**64, 7 - 2**64, 8)
    ]
    assert outputs[0] == outputs[1] == outputs[2] != outputs[3]


def test_float8_is_refused_where_the_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda"))
    config = EngineConfig(model=".", kv_cache_dtype="fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match="kv_cache_dtype: fp8 needs .* 8.9 .* has 8.0"):
        cache_dtype(config, decoder)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert cache_dtype(config, decoder) == torch.float8_e4m3fn
