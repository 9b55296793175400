"""Which assembler Triton uses."""

from __future__ import annotations

from pathlib import Path

import pytest
import triton
from triton import knobs

from gllm_engine.ops.triton.ptxas import choose_ptxas


def test_kernels_are_assembled_by_that_of_cuda_12_9_or_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    with knobs.nvidia.scope():
        choose_ptxas()
        assert tuple(map(int, knobs.nvidia.ptxas.version.split("."))) >= (12, 9)


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    given = str(Path(triton.__file__).parent / "backends/nvidia/bin/ptxas")
    monkeypatch.setenv("TRITON_PTXAS_PATH", given)
    with knobs.nvidia.scope():
        del knobs.nvidia.ptxas
        choose_ptxas()
        assert knobs.nvidia.ptxas.path == given
