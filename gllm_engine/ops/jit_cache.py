"""Compiles attention kernels ahead of the first request, several at once; names their directories.

Knows the Batches of small steps. Planning attention for a Batch compiles the kernels it needs.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from gllm_engine.ops.batch import Batch, made_up_step

# Columns of the page table: a multiple of 16, like a real page table's, for pages of any size.
_MAX_PAGES = 1024

Attention = TypeVar("Attention")  # a layer's attention, as `plan` takes it

_log = logging.getLogger(__name__)


def compile_all(
    what: str, plan: Callable[[Batch, Attention], None], jobs: list[tuple[Batch, Attention]]
) -> None:
    """Call plan(batch, attention) for all jobs, each on its own thread.

    Compilers are processes, so all of them run at once; no two jobs may need the same kernel.
    `what`: a description for the log. Raises a job's exception after all jobs have ended.
    """
    _log.info(
        "%s: what is not in %s yet is compiled now, which takes minutes", what, cache_dirs()[0]
    )
    start = time.perf_counter()
    with ThreadPoolExecutor(len(jobs), "kernels") as pool:
        ended = [pool.submit(torch.inference_mode()(plan), *job) for job in jobs]
    for one in ended:
        one.result()
    _log.info("%s: ready after %.1f s", what, time.perf_counter() - start)


def tiny_chunk(start: int, page_size: int, device: torch.device) -> Batch:
    """A step of one prefill chunk: two tokens after a context of `start` tokens."""
    table = torch.zeros(1, _MAX_PAGES, dtype=torch.int64, device=device)
    return made_up_step([(start + 2, 2)], table, page_size).of_group(0)


def cache_dirs() -> tuple[Path, ...]:
    """Where FlashInfer and Triton keep compiled kernels; their environment variables apply."""
    home = str(Path.home())
    attention = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE", home)) / ".cache/flashinfer"
    ours = Path(os.environ.get("TRITON_HOME", home)) / ".triton/cache"
    return attention, Path(os.environ.get("TRITON_CACHE_DIR", ours))
