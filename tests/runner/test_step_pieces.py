"""Steps with chunks in pieces: the same tokens, logits and pages as launched one by one."""

from __future__ import annotations

import dataclasses
import random
from bisect import bisect_left
from pathlib import Path
from typing import Any

import pytest
import torch
from drive import Drive, Job, greedy
from every_expert import every_expert, usual_heads
from loaded import load_model
from msgspec.structs import replace
from taped_graphs import TapedGraph, tape_graphs

from gllm_engine.arch import FAMILIES, Model, Shard, make_arch, read_arch
from gllm_engine.arch.tiny import tiny_config
from gllm_engine.config import EngineConfig
from gllm_engine.model import Attend, Decoder, LayerCache, fill_randomly
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.ops import RecurrentState
from gllm_engine.ops.batch import made_up_step
from gllm_engine.runner import Runner, step_pieces
from gllm_engine.runner.graph_pool import GraphPool
from gllm_engine.runner.kv_sizing import piece_bytes, step_bytes
from gllm_engine.runner.step_pieces import StepPieces, most_tokens, token_counts

PAGE_SIZE = 4
NUM_PAGES = 500
CONFIG = EngineConfig(
    model="/",
    max_num_seqs=8,
    max_num_batched_tokens=96,
    page_size=PAGE_SIZE,
    num_pages=NUM_PAGES,
    max_model_len=128,
)
WINDOWS = {
    "num_hidden_layers": 4,
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 1,
}
MODELS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("Qwen3ForCausalLM", {"num_hidden_layers": 4}),
    ("Qwen3MoeForCausalLM", {"num_hidden_layers": 3}),
    ("Qwen2ForCausalLM", WINDOWS),
]


@pytest.mark.parametrize("most", [1, 15, 16, 17, 64, 65, 333, 1024, 4096])
def test_few_tokens_of_a_step_are_padding(most: int) -> None:
    counts = token_counts(most)
    assert counts == sorted(set(counts)) and counts[-1] == most
    for tokens in range(64, most + 1):
        size = counts[bisect_left(counts, tokens)]
        assert size - tokens < size / 9, (tokens, size)
    assert len(counts) <= 51


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> type[TapedGraph]:
    return tape_graphs(monkeypatch)


@torch.inference_mode()
def empty_runner(path: Path) -> Runner:
    """On a CPU, with zeros in all pages."""
    cpu = torch.device("cpu")
    decoder = load_model(path, read_arch(path), dtype=torch.float32, device=cpu, max_model_len=128)
    runner = Runner(replace(CONFIG, num_pages=NUM_PAGES + 1), decoder.arch, decoder)
    runner.num_pages = NUM_PAGES  # and a spare one, as on a GPU
    for parts in runner.cache:
        for part in parts:
            part.zero_()
    for spare in spare_pages(runner):
        spare.fill_(1)
    return runner


def spare_pages(runner: Runner) -> list[torch.Tensor]:
    """[planes, page_size, heads, channels] of each part of a layer in the pieces."""
    in_trunk = runner.cache[: runner.decoder.num_trunk_layers]
    paged = [parts for parts in in_trunk if not isinstance(parts, RecurrentState)]
    return [part[NUM_PAGES] for parts in paged for part in parts]


@torch.inference_mode()
def in_pieces(runner: Runner, max_tokens: int = 96) -> Runner:
    spare = runner.num_pages * PAGE_SIZE
    runner._pieces = StepPieces(runner.decoder, runner.cache, max_tokens, spare)
    runner._pieces.capture(GraphPool(runner.device))
    for pieces in runner._pieces._of_count:
        pieces.calls[:] = [
            dataclasses.replace(one, call=in_place(one.call)) for one in pieces.calls
        ]
    return runner


def in_place(call: Attend) -> Attend:
    """`call`, checked to return the memory that it is given, without a further copy."""

    def checked(*inputs: Any, out: torch.Tensor) -> torch.Tensor:
        result = call(*inputs, out=out)
        assert result.shape == out.shape and result.data_ptr() == out.data_ptr()
        return result

    return checked


def jobs(seed: int = 0) -> list[Job]:
    rng = random.Random(seed)
    wanted = [{}, {"logprobs": 3}, {"prompt_logprobs": 2, "logprobs": 1}, {"presence_penalty": 0.5}]
    return [
        Job(i, [rng.randrange(3, 384) for _ in range(n)], greedy(**wanted[i % 4]), seed=i)
        for i, n in enumerate([1, 5, 18, 33, 9])
    ]


def runs(runner: Runner, page_size: int = PAGE_SIZE) -> list[list[Job]]:
    """Chunks of several lengths beside decode rows, behind contexts and not, ahead of results."""
    found = []
    for turn, (chunk_len, depth) in enumerate([(1000, 1), (7, 2), (16, 1), (3, 3)]):
        some = jobs(turn)
        Drive(runner, page_size, turn).run(some, 6, chunk_len, depth)
        found.append(some)
    return found


def check_same(found: list[list[Job]], expected: list[list[Job]], off: float) -> None:
    for job, other in zip(sum(found, []), sum(expected, []), strict=True):
        assert job.output == other.output
        for kind in ("logprobs", "prompt_logprobs"):
            for entry, wanted in zip(getattr(job, kind), getattr(other, kind), strict=True):
                assert entry.logprobs == pytest.approx(wanted.logprobs, abs=off)


def check_same_pages(found: Runner, expected: Runner, off: float) -> None:
    """So padding wrote to no page and to no state. What graphs of decode steps write for their own
    padding, a spare page and slot, is left out.
    """
    for parts, wanted in zip(found.cache, expected.cache, strict=True):
        rows = CONFIG.max_num_seqs if isinstance(parts, RecurrentState) else found.num_pages
        for part, other in zip(parts, wanted, strict=True):
            torch.testing.assert_close(part[:rows], other[:rows], atol=off, rtol=off)


@pytest.mark.parametrize(("family", "more"), MODELS)
def test_pieces_compute_what_a_step_does(
    family: str, more: dict[str, Any], tmp_path: Path, taped: type[TapedGraph]
) -> None:
    path = write_tiny_model(tmp_path, family, **every_expert(family), **more)
    expected, found = empty_runner(path), in_pieces(empty_runner(path))
    check_same(runs(found), runs(expected), 1e-4)
    check_same_pages(found, expected, 1e-3)
    for spare, untouched in zip(spare_pages(found), spare_pages(expected), strict=True):
        assert (untouched == 1).all() and (spare[:, 1:] == 1).all() and (spare[:, 0] != 1).all()
    num_pieces = 1 + found.decoder.num_trunk_layers
    assert len(taped.made) == num_pieces * len(token_counts(96))
    replays = [graph.replays for graph in taped.made]
    assert sum(replays) > num_pieces * 10
    assert replays == [n for n in replays[::num_pieces] for _ in range(num_pieces)]


def test_a_long_step_is_launched_one_by_one(tmp_path: Path, taped: type[TapedGraph]) -> None:
    path = write_tiny_model(tmp_path, "Qwen3ForCausalLM")
    runner = in_pieces(empty_runner(path), 32)
    total = 0
    for length in (33, 32, 17, 40, 16):
        Drive(runner, PAGE_SIZE).run([Job(0, list(range(3, 3 + length)), greedy())], 1)
        total += 2 * (length <= 32)
        assert sum(graph.replays for graph in taped.made) == total


@pytest.mark.parametrize(("first", "end"), [(0, 2), (2, 4), (1, 2), (3, 4)])
@torch.inference_mode()
def test_pieces_of_a_stage(first: int, end: int, taped: type[TapedGraph]) -> None:
    """Only the last stage has its last layer after the pieces. A stage may have nothing else."""
    arch = make_arch(tiny_config("Qwen3ForCausalLM", num_hidden_layers=4))
    decoder = Decoder(
        arch,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_model_len=64,
        shard=Shard(first, end),
    )
    fill_randomly(decoder)
    cache, plain = (decoder.new_cache(31, PAGE_SIZE) for _ in range(2))
    for (pages,) in (*cache, *plain):
        pages.zero_()
    assert most_tokens(replace(CONFIG, enforce_eager=True), decoder) == 0
    if first == 3:
        assert most_tokens(CONFIG, decoder) == 0
        return
    pieces = StepPieces(decoder, cache, most_tokens(CONFIG, decoder), 30 * PAGE_SIZE)
    pieces.capture(GraphPool(decoder.device))
    assert len(taped.made) == len(token_counts(96)) * (1 + end - first - (end == 4))
    table = torch.arange(30).view(3, 10)
    for rows in ([(9, 9), (31, 31), (1, 1)], [(20, 11), (33, 2)]):
        batch = made_up_step(rows, table, PAGE_SIZE, torch.tensor([3, 1]))
        x = None
        if not decoder.is_first:
            x = torch.randn(len(batch.tokens), arch.dim)
        expected = decoder.forward(batch, plain, None if x is None else x.clone())
        found = decoder.forward(batch, cache, x, pieces)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        for (pages,), (wanted,) in zip(cache, plain, strict=True):
            torch.testing.assert_close(pages[:30], wanted[:30], atol=1e-4, rtol=1e-4)


def test_ranks_of_a_stage_have_the_same_pieces() -> None:
    """Else one would sum padding that another has not. Also with uneven shares of experts."""
    arch = make_arch(tiny_config("Qwen3MoeForCausalLM", num_attention_heads=6, hidden_size=1536))
    config = replace(CONFIG, max_num_batched_tokens=8192)
    most = []
    for size in (1, 2, 2, 2):
        for rank in range(size):
            shard = Shard(0, 2, rank, size, experts_apart=True)
            decoder = meta_decoder(arch, shard)
            most.append(most_tokens(config, decoder))
    assert set(most) == {4096}  # so small a model is slow to launch
    big = make_arch(tiny_config("Qwen3ForCausalLM", hidden_size=8192, intermediate_size=28672))
    found = [most_tokens(config, meta_decoder(big, Shard(0, 2, 0, size))) for size in (1, 2)]
    assert 100 < found[0] and found[1] == pytest.approx(2 * found[0], abs=1)


def meta_decoder(arch: Model, shard: Shard | None = None) -> Decoder:
    device = torch.device("meta")
    return Decoder(arch, dtype=torch.bfloat16, device=device, max_model_len=64, shard=shard)


@torch.inference_mode()
def test_memory_is_counted() -> None:
    """The buffers of pieces, and the most that one of them takes, beside what other steps take."""
    config = replace(CONFIG, max_num_batched_tokens=8192)
    arch = make_arch(tiny_config("Qwen3ForCausalLM"))
    decoder = meta_decoder(arch)
    eager, whole = (
        step_bytes(replace(config, enforce_eager=is_eager), meta_decoder(arch), 8).peak
        for is_eager in (True, False)
    )
    pieces = StepPieces(decoder, [], 4096, spare=0)
    mixer, ffn = decoder.layers[0].mixer, decoder.layers[0].ffn
    widths = decoder.arch.dim + mixer.attended_width  # kept
    widths += 2 * ffn.hidden + ffn.hidden  # of the ffn, at least
    least = 4096 * 2 * widths + pieces.graph_bytes
    assert least <= whole - eager <= 2 * least


GPU_MODELS: list[tuple[str, dict[str, Any]]] = [
    ("Qwen3ForCausalLM", {"num_hidden_layers": 3}),
    ("Qwen3MoeForCausalLM", {"num_hidden_layers": 3}),
    ("Qwen2ForCausalLM", {**WINDOWS, "sliding_window": 40}),
    ("GptOssForCausalLM", {}),
    ("Gemma2ForCausalLM", {}),
    ("Cohere2ForCausalLM", {}),
    ("DeepseekV3ForCausalLM", {}),
    ("DeepseekV32ForCausalLM", {}),
    ("Qwen3_5ForCausalLM", {}),
]


@torch.inference_mode()
def gpu_runner(tmp_path: Path, family: str, more: dict[str, Any]) -> Runner:
    """With zeros in all pages."""
    over = usual_heads(family) | every_expert(family) | more
    path = write_tiny_model(tmp_path, family, **over)
    device = torch.device("cuda")
    arch = read_arch(path)
    decoder = load_model(path, arch, dtype=torch.bfloat16, device=device, max_model_len=128)
    runner = Runner(replace(CONFIG, page_size=16), arch, decoder)
    for parts in runner.cache:
        for part in parts:
            part.zero_()
    return runner


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "more"), GPU_MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_gpus_pieces_compute_what_a_step_does(
    family: str,
    more: dict[str, Any],
    padded: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, if a step has no padding; with padding the library may choose other kernels."""
    if not padded:
        monkeypatch.setattr(step_pieces, "token_counts", lambda most: list(range(1, most + 1)))
    called: list[int] = []
    call = StepPieces.__call__

    def counted(pieces: StepPieces, x: torch.Tensor, *step: Any) -> Any:
        called.append(len(x))
        return call(pieces, x, *step)

    monkeypatch.setattr(StepPieces, "__call__", counted)
    found = gpu_runner(tmp_path / "a", family, more)
    expected = gpu_runner(tmp_path / "b", family, more)
    expected._pieces = None
    called.clear()
    ours, theirs = runs(found, 16), runs(expected, 16)
    assert len(called) > 10 and max(called) > 60
    if padded:
        check_close(ours, theirs)
        return
    check_same(ours, theirs, 0.0)
    check_same_pages(found, expected, 0.0)


def check_close(found: list[list[Job]], expected: list[list[Job]]) -> None:
    """The log probabilities of tokens after equal ones are close."""
    offs = []
    for job, other in zip(sum(found, []), sum(expected, []), strict=True):
        for i, (entry, wanted) in enumerate(zip(job.logprobs, other.logprobs, strict=True)):
            if job.output[: i + 1] == other.output[: i + 1]:
                offs.append(abs(entry.logprobs[0] - wanted.logprobs[0]))
    print(f"{len(offs)} log probabilities differ by {max(offs):.4f} at most")
    assert len(offs) > 20 and max(offs) < 0.25 and sum(offs) / len(offs) < 0.05


@pytest.mark.gpu
@torch.inference_mode()
def test_a_gpus_pieces_take_no_more_memory_than_is_counted() -> None:
    """Of a model with the layers of Qwen3-0.6B, but 4 of them."""
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    config = replace(CONFIG, max_num_batched_tokens=8192, page_size=16)
    device = torch.device("cuda")
    arch = make_arch(tiny_config("Qwen3ForCausalLM", **shape))
    decoder = Decoder(arch, dtype=torch.bfloat16, device=device, max_model_len=128)
    fill_randomly(decoder)
    cache = decoder.new_cache(4, 16)
    counted = piece_bytes(config, decoder, cache)
    workspace = 64 << 20  # of cuBLAS in the stream of captures: in the reserve for all graphs
    # Other processes may take memory of this GPU meanwhile; what all attempts tell is ours.
    attempts = [taken_by_pieces(config, decoder, cache) for _ in range(4)]
    print([f"{took >> 20} MiB, {held >> 20} of tensors" for took, held in attempts])
    assert min(took for took, _ in attempts) <= counted + workspace
    assert all(0.3 * counted < held <= counted + workspace for _, held in attempts)


def taken_by_pieces(
    config: EngineConfig, decoder: Decoder, cache: list[LayerCache]
) -> tuple[int, int]:
    """Bytes that the GPU has less, and those of them that hold tensors of this process."""
    free = free_memory()
    reserved = torch.cuda.memory_reserved()
    pieces = StepPieces(decoder, cache, most_tokens(config, decoder), spare=0)
    pieces.capture(GraphPool(decoder.device))
    return free - free_memory(), torch.cuda.memory_reserved() - reserved


def free_memory() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
