"""What is left free for a step is enough for any step."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from gllm_engine.arch import MAX_EOS_TOKEN_IDS, Model, Shard, make_arch, read_arch
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.config import ConfigError, EngineConfig
from gllm_engine.model import Decoder, VisionTower, fill_randomly
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.ops.kernels import EXPANDED_BYTES, PARTIALS_BYTES, SCORE_BYTES
from gllm_engine.runner import PeakMemory, Runner, kv_sizing, sampler
from gllm_engine.runner.kv_sizing import (
    GpuMemory,
    StepBytes,
    _trial,
    costly_sampling,
    fitting_pages,
    fitting_snapshots,
    image_bytes,
    measured_memory,
    step_bytes,
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
        trial = _trial(config, decoder, 4096 // page_size)
        allowed = trial.peak - trial.kept
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


# Heads for which a GPU has kernels of the expanded form.
LATENT = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "index_head_dim": 64}
KEPT = {
    "DeepseekV3ForCausalLM": EXPANDED_BYTES,
    "DeepseekV32ForCausalLM": EXPANDED_BYTES + SCORE_BYTES,
}


@pytest.mark.parametrize("family", KEPT)
@pytest.mark.parametrize("tokens", [8, 512])  # fewer and more than an indexer chooses
def test_what_a_step_keeps_is_known(family: str, tokens: int) -> None:
    """Whatever the contexts of the largest step; it is part of the peak, and counted only once."""
    arch, device = make_arch(tiny_config(family, **LATENT)), torch.device("meta")
    config = EngineConfig(model="/", max_num_seqs=4, max_num_batched_tokens=tokens, page_size=16)
    decoder = Decoder(arch, dtype=torch.bfloat16, device=device, max_model_len=1024)
    with torch.inference_mode():
        first, second = (step_bytes(config, decoder, 64) for _ in range(2))
    assert first.kept == PARTIALS_BYTES + KEPT[family]
    assert second.kept == 0
    assert first.peak - first.kept == pytest.approx(second.peak, abs=2**20)


def test_memory_in_use_is_not_left_free_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(
        make_arch(tiny_config("LlamaForCausalLM")),
        dtype=torch.float32,
        device=torch.device("meta"),
        max_model_len=64,
    )
    free = iter([900, 600])  # before and after the step that keeps 40
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), 1000))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(kv_sizing, "step_bytes", lambda *args: StepBytes(peak=100, kept=40))
    assert measured_memory(EngineConfig(model="/"), decoder, 4) == GpuMemory(1000, 400, 60)


def test_encoders_that_come_later_have_memory_for_their_contexts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the GPUs of the ranks whose landing they write."""

    def used(family: str, encodes: bool, shard: Shard | None = None) -> int:
        decoder = Decoder(
            make_arch(tiny_config(family)),
            dtype=torch.bfloat16,
            device=torch.device("meta"),
            max_model_len=64,
            encodes=encodes,
            shard=shard,
        )
        return measured_memory(EngineConfig(model="/", encoder_workers=3), decoder, 4).used

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (900, 1000))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(kv_sizing, "step_bytes", lambda *args: StepBytes(peak=100, kept=40))
    family = "Qwen3VLForConditionalGeneration"
    assert used(family, encodes=False) == 100 + 3 * (1 << 29)
    assert used(family, encodes=False, shard=Shard(2, 3)) == 100
    assert used(family, encodes=True) == used("LlamaForCausalLM", encodes=True) == 100


def test_spare_layers_have_memory_for_weights_pages_and_states() -> None:
    arch, device = make_arch(tiny_config("Qwen3NextForCausalLM")), torch.device("cpu")
    shard = Shard(0, 1)  # has states only; the layer that may come has pages
    decoder = Decoder(arch, dtype=torch.float32, device=device, max_model_len=64, shard=shard)
    layer = sum(size for name, size in decoder.weight_bytes().items() if "layers.0." in name)
    page = 16 * arch.kv_bytes_per_token(4)
    ids = 16 * 8  # of the tokens in a page
    config = EngineConfig(
        model="/", max_num_seqs=3, num_snapshots=5, pipeline_parallel_size=2, spare_layers=0
    )
    memory = GpuMemory(1 << 28, 1000, 2000)
    free = int(0.9 * (1 << 28)) - 3000
    states = (5 + 3 + 1) * decoder.state_bytes
    assert decoder.page_bytes(16, torch.float32) == 0 and states > 0
    assert fitting_pages(config, decoder, lambda: memory) == (free - states) // ids
    config = replace(config, spare_layers=2)
    room = free - 2 * states - 3 * layer
    assert fitting_pages(config, decoder, lambda: memory) == room // (ids + 2 * page)
    config = replace(config, spare_layers=50)
    with pytest.raises(ConfigError, match=r"\(max_num_seqs\) and 50 layers \(spare_layers\) \d"):
        fitting_pages(config, decoder, lambda: GpuMemory(30 * layer, 0, 0))


@pytest.mark.gpu
@pytest.mark.whole_gpu
@pytest.mark.parametrize("family", KEPT)
def test_a_second_trial_finds_the_same_memory(family: str) -> None:
    """The first one makes what steps keep: it is free no more, and is not asked for again."""
    arch, device = make_arch(tiny_config(family, **LATENT)), torch.device("cuda")
    config = EngineConfig(model="/", max_num_seqs=4, max_num_batched_tokens=512, page_size=16)
    decoder = Decoder(arch, dtype=torch.bfloat16, device=device, max_model_len=1024)
    fill_randomly(decoder)
    decoder.compile_kernels(16, torch.bfloat16)
    with torch.inference_mode():
        found = [measured_memory(config, decoder, 64) for _ in range(2)]
    first, second = (memory.used + memory.step for memory in found)
    assert abs(first - second) < 128 << 20, found


def test_images_have_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is kept of them, and for the largest one in the tower, in a step full of them."""
    arch = make_arch(tiny_config("Qwen3VLForConditionalGeneration", max_position_embeddings=32768))
    encode = kv_sizing.encode_blank
    peaks: list[int] = []

    def watched(tower: VisionTower, num_tokens: int, device: torch.device) -> None:
        assert num_tokens == 1024 * 16 ** len(peaks)
        with PeakMemory() as memory:
            encode(tower, num_tokens, device)
        peaks.append(memory.peak)

    def sized(model: Model, image_cache_tokens: int, encoders: int = 0) -> tuple[int, int]:
        config = EngineConfig(
            model="/",
            max_num_seqs=4,
            max_num_batched_tokens=64,
            encoder_budget=64,
            image_cache_tokens=image_cache_tokens,
            encoder_workers=encoders,
        )
        device = torch.device("meta")
        decoder = Decoder(
            model,
            dtype=torch.bfloat16,
            device=device,
            max_model_len=32768,
            encodes=not encoders,
        )
        return step_bytes(config, decoder, 2048).peak, image_bytes(config, decoder)

    monkeypatch.setattr(kv_sizing, "encode_blank", watched)
    text, none = sized(dataclasses.replace(arch, vision=None), 4096)
    small, kept = sized(arch, 4096)
    large, more = sized(arch, 65536)
    assert (none, kept, more) == (0, 4096 * 3 * 64 * 2, 65536 * 3 * 64 * 2)
    assert text <= small - kept <= large - more
    # An image of 16,384 embeddings, 65,536 patches, has no number for each pair of patches.
    assert 14 < peaks[1] / peaks[0] < 18
    # Two largest images in the landing, of 16,384 tokens each, and none in a tower.
    apart, landing = sized(arch, 65536, encoders=1)
    assert landing == more + 32768 * 3 * 64 * 2
    assert text <= apart - landing <= small - kept
    assert len(peaks) == 2
