"""What is left free for a step is enough for any step."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from gllm_engine.arch import MAX_EOS_TOKEN_IDS, Shard, read_arch
from gllm_engine.config import EngineConfig
from gllm_engine.model import Decoder, fill_randomly
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.runner import Runner, kv_sizing, sampler
from gllm_engine.runner.kv_sizing import (
    _trial,
    costly_sampling,
    fitting_pages,
    fitting_snapshots,
)
from gllm_engine.runner.sampler import log_probabilities, sample
from gllm_engine.runner.sampling_state import SamplingState
from gllm_engine.runner.slot_table import SlotTable
from gllm_engine.sampling import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS, SamplingParams
from gllm_engine.types import Chunk, NewPages, NewSequence, StepPlan

VOCAB = 151_936


def test_the_trial_samples_in_every_way() -> None:
    rows, vocab = 5, 3000
    table = SlotTable(rows, 7, 1, 16, torch.device("cpu"))
    batch = costly_sampling(table, SamplingState(table, vocab))
    assert batch.has_random and batch.has_greedy and batch.has_min_p
    longest = MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS + MAX_EOS_TOKEN_IDS + 1
    assert [ids.shape for _, ids, _ in batch.added] == [(rows, length) for length in longest]
    assert [(len(part), ranked) for part, ranked in batch.truncations] == [(rows, vocab)]
    assert batch.masks is not None and len(batch.masks[0]) == rows
    penalties = batch.penalties
    assert penalties is not None and len(penalties.rows) == rows and penalties.has_repetition
    assert penalties.history.lens_cpu.tolist() == [7 * 16] * rows
    assert sample(torch.zeros(rows, vocab), batch).shape == (rows,)


def test_the_trial_counts_the_state_and_everything_a_request_may_want(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the GPU's allocator: it notes what is alive while the trial samples."""
    path = write_tiny_model(tmp_path, "Qwen3ForCausalLM")
    arch, device = read_arch(path), torch.device("cpu")
    config = EngineConfig(model=str(path), max_num_seqs=4, max_num_batched_tokens=64, page_size=16)
    decoder = Decoder(arch, dtype=torch.float32, device=device, max_model_len=64)
    fill_randomly(decoder)
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    states: list[weakref.ref[SamplingState]] = []
    scored: list[int] = []

    def make(table: SlotTable, vocab: int) -> SamplingState:
        state = SamplingState(table, vocab)
        states.append(weakref.ref(state))
        return state

    def note(logits: Tensor, tokens: Tensor, num_top: int) -> tuple[Tensor, ...]:
        assert states[0]() is not None and num_top == MAX_LOGPROBS
        scored.append(len(logits))
        return log_probabilities(logits, tokens, num_top)

    monkeypatch.setattr(kv_sizing, "SamplingState", make)
    monkeypatch.setattr(kv_sizing, "log_probabilities", note)
    with torch.inference_mode():
        _trial(config, decoder, 4)
    assert scored == [4, 64]  # the sampled tokens, and as many positions of prompts as fit
    monkeypatch.setattr(sampler, "MAX_SCORED_LOGITS", 9 * arch.vocab)
    states.clear()
    with torch.inference_mode():
        _trial(config, decoder, 4)
    assert scored[2:] == [4, 9]


def test_all_ranks_have_equally_many_snapshots(tmp_path: Path) -> None:
    """Also a stage that has only states, or only pages."""
    path = write_tiny_model(tmp_path, "Qwen3NextForCausalLM")
    arch, device = read_arch(path), torch.device("cpu")
    config = EngineConfig(model=str(path), max_num_seqs=4, max_num_batched_tokens=64)
    found = []
    for first, end in ((0, 2), (0, 1), (1, 2)):
        shard = Shard(first, end)
        decoder = Decoder(arch, dtype=torch.float32, device=device, max_model_len=64, shard=shard)
        assert fitting_pages(config, decoder, None) * 16 * max(
            1, decoder.page_bytes(1, torch.float32)
        ) in range(2**26, 2**30 + 1)
        found.append(fitting_snapshots(config, decoder, 10_000))
        assert decoder.new_states(3).flat.numel() == 3 * decoder.state_bytes
    assert len(set(found)) == 1
    memory = 10_000 * 16 * arch.kv_bytes_per_token(4)
    state = Decoder(arch, dtype=torch.float32, device=device, max_model_len=64).state_bytes
    assert 0 <= memory / 8 - found[0] * state < state
    given = replace(config, num_snapshots=7)
    assert fitting_snapshots(given, decoder, 10_000) == 7


@pytest.mark.gpu
def test_a_step_takes_no_more_than_the_trial(tmp_path: Path) -> None:
    """All sequences want penalties, a mask, the longest lists of biases and stops, log
    probabilities and a sort, of a large vocabulary."""
    rows, length, page_size = 1024, 8, 16
    path = write_tiny_model(tmp_path, "Qwen3ForCausalLM", vocab_size=VOCAB)
    arch, device = read_arch(path), torch.device("cuda")
    config = EngineConfig(
        model=str(path),
        max_num_seqs=rows,
        max_num_batched_tokens=rows * length,
        max_model_len=4096,
        num_pages=rows + 1,
        page_size=page_size,
        plans_in_flight=2,
        enforce_eager=True,
    )
    decoder = Decoder(arch, dtype=torch.bfloat16, device=device, max_model_len=4096)
    fill_randomly(decoder)
    decoder.compile_kernels(page_size, torch.bfloat16)
    with torch.inference_mode():
        allowed = _trial(config, decoder, 4096 // page_size)
    runner = Runner(config, arch, decoder)
    state = runner.sampling
    kept = sum(
        x.nbytes
        for owner in (runner.table, state, state.bias, state.stops)
        for x in vars(owner).values()
        if isinstance(x, torch.Tensor)
    )
    asked = SamplingParams(
        top_p=0.9,
        min_p=0.01,
        logprobs=20,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        repetition_penalty=1.2,
        logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0),
        stop_token_ids=tuple(range(MAX_STOP_TOKEN_IDS)),
        min_tokens=length,
    )
    slots = range(rows)
    plan = StepPlan(
        1,
        new=[NewSequence(slot, slot, length, asked) for slot in slots],
        new_pages=[NewPages(slot, 0, [slot]) for slot in slots],
        decode_slots=[],
        chunks=[Chunk(slot, 0, [slot] * length, True) for slot in slots],
        masks=dict.fromkeys(slots, b"\xff" * (VOCAB // 8)),
    )
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert len(runner.launch(plan).wait().tokens) == rows
    took = torch.cuda.max_memory_allocated() - before + kept
    assert 0.5 * allowed < took <= allowed, (took, allowed)
