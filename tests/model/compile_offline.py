"""Compiles, without a GPU, every Triton kernel that the steps of models launch on a Hopper GPU.

`python compile_offline.py MODEL...`: directories of checkpoints, of which only config.json is read.
Tensors are on the meta device: nothing is computed, and true sizes cost no memory. FlashInfer is
replaced. Prints a line for each kernel: its name, warps, bytes of shared memory, and bytes of stack
per thread, where the compiler puts what registers do not hold. Fails with the error of Triton's
compiler or of ptxas, and if a kernel converts float16 to bfloat16, as Triton does with float8.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from unittest.mock import MagicMock

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED_BYTES = 232_448  # that Hopper gives to one program
SLOW_CONVERSION = "cvt.bf16.f16"  # takes eight times as long as others
META = torch.device("meta")
PAGE = 16
SLOTS = 256
CACHE_DTYPES = (torch.bfloat16, torch.float8_e4m3fn)  # of the models in turn


class Hopper:
    """As much of a driver as Triton's compiler needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        del device
        return 0


def pretend(kernels: dict[str, Any]) -> None:
    """Let this process believe that it has a Hopper GPU. Puts compiled kernels into `kernels`."""
    driver.set_active(Hopper())
    compile_and_launch = JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> Any:
        kernel = compile_and_launch(self, *args, **options | {"warmup": True})
        kernels[kernel.hash] = kernel
        return kernel

    JITFunction.run = compile_only
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: MagicMock(multi_processor_count=132)
    torch.cuda.Event = MagicMock
    for name in ("empty", "tensor"):  # there is no pinned memory without a GPU
        make = getattr(torch, name)
        setattr(torch, name, lambda *a, pin_memory=False, make=make, **o: make(*a, **o))
    Tensor.pin_memory = lambda self: self

    def attend(q: Tensor, *_: Any, **__: Any) -> tuple[None, Tensor]:
        return None, torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)

    wrapper = MagicMock(_pin_memory_int_workspace_buffer=torch.empty(0), run=attend)
    sys.modules["flashinfer"] = MagicMock(
        BatchPrefillWithPagedKVCacheWrapper=lambda *_, **__: wrapper,
        BatchPrefillWithRaggedKVCacheWrapper=lambda *_, **__: wrapper,
    )


def make_steps() -> list[Any]:
    """Decode steps of one row and of few; a step with rows of all kinds."""
    from tiny_models import make_batch

    def row(start: int, count: int) -> dict[str, Any]:
        return {"tokens": [0] * count, "start": start, "pages": list(range(64))}

    steps = [make_batch([row(100, 1)] * count, PAGE) for count in (1, 5)]
    steps.append(make_batch([row(100, 1), row(100, 170), row(0, 600)], PAGE))
    return [
        replace(step, **{k: v.to(META) for k, v in vars(step).items() if isinstance(v, Tensor)})
        for step in steps
    ]


def run_steps(model: Path, cache_dtype: torch.dtype) -> None:
    from gllm_engine.arch import read_arch
    from gllm_engine.model import Decoder, decoder
    from gllm_engine.ops import PlainSampling, flashinfer

    decoder.select_ops = lambda _: flashinfer
    arch = read_arch(model).quantized()
    made = Decoder(arch, dtype=torch.bfloat16, device=META, max_model_len=1024)
    numbers = torch.empty(SLOTS, dtype=torch.int64, device=META)
    state = PlainSampling(numbers.double(), numbers, numbers, numbers, numbers)
    cache = made.new_cache(64, PAGE, cache_dtype, made.new_states(SLOTS))
    for step in make_steps():
        scores = made.scores(made.forward(step, cache))
        made.sample_plain(scores, numbers[: len(scores)], state)


def stack_bytes(kernel: Any) -> int:
    with NamedTemporaryFile() as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"STACK:(\d+)", told)
    return int(found)


def main(models: list[str]) -> None:
    kernels: dict[str, Any] = {}
    pretend(kernels)
    for i, model in enumerate(models):
        try:
            run_steps(Path(model), CACHE_DTYPES[i % 2])
        except Exception as error:
            raise RuntimeError(f"{model}: {error}") from error
    for kernel in sorted(kernels.values(), key=lambda kernel: str(kernel.metadata.name)):
        shared = kernel.metadata.shared
        print(kernel.metadata.name, kernel.metadata.num_warps, shared, stack_bytes(kernel))
        if shared > SHARED_BYTES:
            raise RuntimeError(f"{kernel.metadata.name} takes {shared} bytes of shared memory")
        if SLOW_CONVERSION in kernel.asm["ptx"]:
            raise RuntimeError(f"{kernel.metadata.name} has {SLOW_CONVERSION}; see from_float8")


if __name__ == "__main__":
    main(sys.argv[1:])
