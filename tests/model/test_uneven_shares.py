"""Ranks whose shares of a feed-forward layer differ in size compute what one rank computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import block, compressed, mixed
from tiny_models import CPU, all_logits, load, some_tokens
from torch import Tensor

from gllm_engine.arch import ArchError, Moe, Shard, read_arch
from gllm_engine.model import Decoder, filling, open_checkpoint
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.ops import reference, select_ops
from gllm_engine.parallel import TensorParallel

MXFP4 = {"quant_method": "mxfp4"}
INT4 = compressed("group", num_bits=4, type="int", group_size=32) | {"format": "pack-quantized"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False}
GPTQ |= {"checkpoint_format": "gptq"}
MIXED = mixed(compressed("block", block_structure=[32, 32]), INT4)
MOE = {"moe_intermediate_size": 160}
# Family, what is different in its config, ranks, the channels of each.
CASES: list[tuple[str, dict[str, Any], list[int]]] = [
    ("GptOssForCausalLM", {"intermediate_size": 160} | {"quantization_config": MXFP4}, [96, 64]),
    (
        "GptOssForCausalLM",
        {"intermediate_size": 160, "quantization_config": MXFP4},
        [64, 32, 32, 32],
    ),
    ("Qwen3MoeForCausalLM", MOE | {"quantization_config": INT4}, [64, 32, 32, 32]),
    ("Qwen3MoeForCausalLM", MOE | {"quantization_config": MIXED}, [96, 64]),
    (
        "Qwen2MoeForCausalLM",
        MOE | {"shared_expert_intermediate_size": 96, "quantization_config": AWQ},
        [96, 64],
    ),
    ("LlamaForCausalLM", {"intermediate_size": 160, "quantization_config": AWQ}, [96, 64]),
    # 3 groups of 64 columns for 2 ranks: half a group is held with its own scales.
    ("LlamaForCausalLM", {"intermediate_size": 192, "quantization_config": GPTQ}, [96, 96]),
    ("LlamaForCausalLM", {"intermediate_size": 320, "quantization_config": GPTQ}, [160, 160]),
    (
        "LlamaForCausalLM",
        {"intermediate_size": 192, "quantization_config": GPTQ | {"desc_act": True}},
        [96, 96],
    ),
    # 11 blocks, as DeepSeek-V2-Lite's experts have; each rank has a whole number of quarters.
    (
        "Qwen3MoeForCausalLM",
        {"moe_intermediate_size": 1408} | {"quantization_config": block(128, 128)},
        [352] * 4,
    ),
    (
        "LlamaForCausalLM",
        {"intermediate_size": 1392, "quantization_config": block(128, 128)},
        [704, 688],
    ),
    # One block lies over queries, keys and values.
    ("Qwen3_5ForCausalLM", {"quantization_config": block(128, 128)}, [48, 48]),
    # Of 389 tokens 4 ranks have 104, 104, 104 and 77; 8 ranks have 52 each, but the last one 25.
    (
        "LlamaForCausalLM",
        {"intermediate_size": 98, "vocab_size": 389, "tie_word_embeddings": True},
        [26, 24, 24, 24],
    ),
    (
        "MixtralForCausalLM",
        {"intermediate_size": 100, "num_attention_heads": 8, "vocab_size": 389},
        [14, 14, 12, 12, 12, 12, 12, 12],
    ),
]


class Ranks:
    """The collectives of ranks that are threads: each rank's arguments, by its number."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.given: list[Tensor | None] = [None] * size

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self.given[rank] = x
        self.barrier.wait()
        everything = [part.clone() for part in self.given if part is not None]
        self.barrier.wait()
        return everything


class ThreadRank(TensorParallel):
    def __init__(self, rank: int, ranks: Ranks) -> None:
        super().__init__(rank, len(ranks.given), CPU, None, True)
        self._all = ranks

    def sum(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._all.exchange(self.rank, x)).sum(0))

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._all.exchange(self.rank, x), 1)


def on_all_ranks(path: Path, size: int, compute: Callable[[Decoder], Tensor]) -> list[Tensor]:
    ranks = Ranks(size)

    def run(rank: int) -> Tensor:
        arch = read_arch(path)
        with torch.inference_mode(), open_checkpoint(arch, path) as checkpoint:
            shard = Shard(0, len(arch.layers), rank, size)
            options = {"dtype": torch.float32, "device": CPU, "max_model_len": 64}
            decoder = Decoder(
                checkpoint.arch, shard=shard, ranks=ThreadRank(rank, ranks), **options
            )
            with filling(decoder, checkpoint, shows=False):
                pass
            return compute(decoder)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.mark.parametrize(("family", "over", "shares"), CASES)
def test_logits_are_those_of_one_rank(
    tmp_path: Path, family: str, over: dict[str, Any], shares: list[int]
) -> None:
    path = write_tiny_model(tmp_path, family, seed=3, num_hidden_layers=2, **over)
    arch = load(path).arch
    size = len(shares)
    ffns = [Shard(1, 2, rank, size).of(arch)[0].ffn for rank in range(size)]
    assert [ffn.hidden for ffn in ffns] == shares
    if isinstance(ffns[0], Moe) and ffns[0].shared:
        assert [ffn.shared for ffn in ffns] == [64, 32]
    tokens = some_tokens(24)
    expected = all_logits(load(path), tokens)
    assert expected.std() > 1
    for logits in on_all_ranks(path, size, lambda decoder: all_logits(decoder, tokens)):
        torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)


def test_gpt_oss_on_4_and_8_ranks(tmp_path: Path) -> None:
    arch = read_arch(write_tiny_model(tmp_path, "GptOssForCausalLM", quantization_config=MXFP4))
    arch = arch.quantized()
    wide = arch.each(ffn=lambda _, layer: replace(layer.ffn, hidden=2880))
    wide = wide.each(mixer=lambda _, layer: replace(layer.mixer, heads=64, kv_heads=8))
    for size, shares in ((2, [1440] * 2), (4, [736] * 2 + [704] * 2), (8, [384] * 2 + [352] * 6)):
        shards = [Shard(0, 2, rank, size) for rank in range(size)]
        assert [shard.of(wide)[0].ffn.hidden for shard in shards] == shares
        starts = [shard.start(2880, own) for shard, own in zip(shards, shares, strict=True)]
        assert starts == [sum(shares[:rank]) for rank in range(size)]


def test_more_ranks_than_groups(tmp_path: Path) -> None:
    path = write_tiny_model(
        tmp_path, "Qwen3MoeForCausalLM", quantization_config=INT4, moe_intermediate_size=96
    )
    with open_checkpoint(read_arch(path), path) as checkpoint, pytest.raises(ArchError) as caught:
        Shard(0, 2, 0, 4).of(checkpoint.arch)
    assert str(caught.value) == (
        "tensor_parallel_size: 4 ranks cannot each have some of the model's "
        "moe_intermediate_size=96: parts of 32 are not split further, because the weights are INT4 "
        "with a scale per 32 columns; "
        "experts are not split with enable_expert_parallel"
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "over", "shares"), [CASES[1], CASES[3], CASES[8], CASES[9]])
def test_partial_sums_on_a_gpu(
    tmp_path: Path,
    family: str,
    over: dict[str, Any],
    shares: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the kernels for few rows and for many. Experts round their inputs to float8, and the
    columns that share a scale are others on each rank.
    """
    # Ranks share its memory, and here is no group of ranks.
    ops = select_ops(torch.device("cuda"))
    monkeypatch.setattr(ops, "make_one_shot_allreduce", reference.make_one_shot_allreduce)
    path = write_tiny_model(tmp_path, family, seed=3, dtype="bfloat16", **over)
    size = len(shares)
    generator = torch.Generator("cuda").manual_seed(0)
    for rows in (1, 5, 300):
        x = torch.randn(rows, 64, dtype=torch.bfloat16, device="cuda", generator=generator)
        with torch.inference_mode():
            expected = ffn_output(path, Shard(0, 2), x)
            found = sum(ffn_output(path, Shard(0, 2, rank, size), x) for rank in range(size))
        assert isinstance(found, Tensor)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.15 * float(expected.std()))


def ffn_output(path: Path, shard: Shard, x: Tensor) -> Tensor:
    """What the last layer's feed-forward part adds to the stream, in float32."""
    arch = read_arch(path)
    ranks = TensorParallel(shard.rank, shard.size, x.device, None, True)
    options = {"dtype": x.dtype, "device": x.device, "max_model_len": 64}
    with open_checkpoint(arch, path) as checkpoint:
        decoder = Decoder(checkpoint.arch, shard=shard, ranks=ranks, **options)
        with filling(decoder, checkpoint, shows=False):
            pass
    return decoder._blocks[1]._ffn(x, None).float()
