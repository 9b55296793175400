"""Chooses the assembler with which Triton compiles kernels."""

from __future__ import annotations

import os

from triton import knobs


def choose_ptxas() -> None:
    """Use Triton's ptxas for Blackwell on every GPU, unless TRITON_PTXAS_PATH names another one.

    The one that Triton 3.6 uses for Hopper is of CUDA 12.8. It miscompiles `attend_latent`: if two
    operands of products take turns at one place of shared memory, it may read the descriptor of
    the second one from a register that is not written yet. That of CUDA 12.9 does not.
    """
    if not os.environ.get("TRITON_PTXAS_PATH") and hasattr(knobs.nvidia, "ptxas_blackwell"):
        knobs.nvidia.ptxas = knobs.nvidia.ptxas_blackwell.path
