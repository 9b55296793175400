"""Checkpoints of GPTQ, AWQ and compressed-tensors INT4: logits are those of transformers for the
exact numbers that are stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import check, compressed, write
from safetensors.torch import load_file

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
GPTQ |= {"checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def int4(strategy: str = "group", **more: Any) -> dict[str, Any]:
    config = compressed(strategy, **({"num_bits": 4, "type": "int", "group_size": 32} | more))
    return config | {"format": "pack-quantized"}


CONFIGS = {
    "gptq": GPTQ,
    "gptq asymmetric": GPTQ | {"sym": False},
    "gptq v2": GPTQ | {"checkpoint_format": "gptq_v2"},
    "gptq v2 asymmetric": GPTQ | {"checkpoint_format": "gptq_v2", "sym": False},
    "gptq per row": GPTQ | {"group_size": -1, "sym": False, "desc_act": True},
    "gptq reordered": GPTQ | {"desc_act": True, "sym": False},
    "gptq static groups": GPTQ | {"desc_act": True, "static_groups": True},
    "gptq int8": GPTQ | {"bits": 8, "sym": False},
    "awq": AWQ,
    "awq per row": AWQ | {"group_size": -1},
    "compressed asymmetric": int4(symmetric=False),
    "compressed per row": int4("channel", group_size=None),
    "compressed per row asymmetric": int4("channel", group_size=None, symmetric=False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_format(tmp_path: Path, name: str) -> None:
    model = write(tmp_path / "model", "Qwen3ForCausalLM", CONFIGS[name])
    stored = load_file(model / "model.safetensors")
    numbers = [name for name in stored if name.endswith((".qweight", "_packed"))]
    assert len(numbers) == 14 and {stored[name].dtype for name in numbers} == {torch.int32}
    check(model)
