"""Kernels compiled before they are needed: several at the same time, and where they are kept.

Knows what a step may hold, as a Batch; what is compiled for it is the planner's to know.
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

# Columns of the page table; like those of real ones, a multiple of 16.
_MAX_PAGES = 16

Attention = TypeVar("Attention")  # what a job plans attention for, beside the batch

_log = logging.getLogger(__name__)


def compile_all(
    what: str, plan: Callable[[Batch, Attention], None], jobs: list[tuple[Batch, Attention]]
) -> None:
    """plan(batch, attention) for all jobs, each on a thread of its own.

    Compilers are processes, so all run at the same time; no two jobs may need the same one. `what`:
    for the log. Raises what a job raises, once all have ended.
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
    """A step of one chunk: two tokens after `start` others of their sequence."""
    table = torch.zeros(1, _MAX_PAGES, dtype=torch.int64, device=device)
    return made_up_step([(start + 2, 2)], table, page_size)


def cache_dirs() -> tuple[Path, ...]:
    """Where FlashInfer and Triton keep what they have compiled; their variables say otherwise."""
    home = str(Path.home())
    attention = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE", home)) / ".cache/flashinfer"
    ours = Path(os.environ.get("TRITON_HOME", home)) / ".triton/cache"
    return attention, Path(os.environ.get("TRITON_CACHE_DIR", ours))
