"""What a start on a GPU leaves for requests to compile: nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from every_expert import usual_heads

from gllm_engine import LLM, SamplingParams, write_tiny_model

pytestmark = pytest.mark.gpu
SHAKESPEARE = Path(__file__).parents[2] / "model_repository/shakespeare/1"
# Triton compiles for each page size, so no other test has left kernels for these in this process.
PAGE_SIZE = {False: 64, True: 128}
SAMPLINGS = [
    SamplingParams(max_tokens=40, ignore_eos=True, temperature=0),
    SamplingParams(max_tokens=20, ignore_eos=True, seed=1),
    SamplingParams(max_tokens=30, ignore_eos=True, seed=2, top_k=7),
    SamplingParams(max_tokens=10, ignore_eos=True, seed=3, top_p=0.9, repetition_penalty=1.2),
    SamplingParams(max_tokens=10, ignore_eos=True, temperature=0, logprobs=2, prompt_logprobs=1),
]


@pytest.mark.parametrize("kind", ["attention", "experts", "states"])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_no_request_compiles(
    enforce_eager: bool, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from flashinfer.prefill import get_batch_prefill_module

    config = {"max_num_seqs": 7, "max_num_batched_tokens": 96, "num_pages": 100}
    config |= {"page_size": PAGE_SIZE[enforce_eager], "enforce_eager": enforce_eager}
    compiled: list[str] = []
    model = SHAKESPEARE
    if kind == "experts":  # so many are chosen in no other test
        over = {"head_dim": 64, "num_experts_per_tok": 6 + enforce_eager}
        model = write_tiny_model(tmp_path, "Qwen3MoeForCausalLM", **over)
    elif kind == "states":  # no other test has values of this size
        family = "Qwen3_5ForCausalLM"
        over = usual_heads(family) | {"linear_value_head_dim": 40 + enforce_eager}
        model = write_tiny_model(tmp_path, family, **over)
    with LLM(str(model), **config) as llm:
        modules = get_batch_prefill_module.cache_info().misses
        monkeypatch.setattr(
            triton.knobs.runtime, "jit_cache_hook", lambda **call: compiled.append(call["repr"])
        )
        prompts = [[5] * n for n in (1, 3, 17, 64, 90, 150, 200, 33, 8, 250)]  # more than a step's
        sampling = [SAMPLINGS[i % len(SAMPLINGS)] for i in range(len(prompts))]
        for output in llm.generate(prompts, sampling):
            assert output.error is None
        llm.engine.check_integrity()
        assert get_batch_prefill_module.cache_info().misses == modules
    assert compiled == []


def test_caches_are_filled_from_a_config_alone(tmp_path: Path) -> None:
    model, triton = tmp_path / "model", tmp_path / "triton"
    model.mkdir()
    shutil.copy(SHAKESPEARE / "config.json", model)
    command = [sys.executable, "-m", "gllm_client", "warmup", str(model), "--max-num-seqs=8"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(triton)}
    filled = []
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        filled.append({file.relative_to(triton) for file in triton.rglob("*")})
    assert filled[0] == filled[1]
    kernels = {file.name.split(".")[0] for file in filled[0] if file.suffix == ".cubin"}
    assert {
        "_rms_norm",
        "_gemv",
        "_rotate_and_store",
        "_list_pages",
        "_decode_attention",
        "_look",
    } <= kernels
    attention, ours = done.stdout.splitlines()
    assert "/flashinfer  " in attention and ours.startswith(f"{triton}  ")
