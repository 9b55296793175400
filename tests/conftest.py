"""Shared by every test."""

from __future__ import annotations

import os
from importlib.util import find_spec

# Two cores: one thread of tensor work a process, or processes wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402 - it reads its variables when it is imported
from hypothesis import settings  # noqa: E402

settings.register_profile("busy machine", deadline=None)  # an example may wait for a processor
settings.load_profile("busy machine")

if not torch.cuda.is_available():  # then Triton's kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton") is not None:
        from quick_interpreter import quicken

        quicken()
