"""Shared by every test."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

# Two cores: one thread of tensor work a process, or processes wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402 - it reads its variables when it is imported
from hypothesis import settings  # noqa: E402

settings.register_profile("busy machine", deadline=None)  # an example may wait for a processor
settings.load_profile("busy machine")

if not torch.cuda.is_available():  # then Triton's kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton") is not None:
        from quick_interpreter import quicken

        quicken()


@pytest.fixture(autouse=True)
def gpus_of_a_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that measures all memory of a GPU runs while no other process of pytest runs one on a
    GPU. It holds the gate while it waits, so that no other test begins meanwhile.
    """
    marks = {mark.name for mark in request.node.iter_markers()}
    if "gpu" not in marks:
        yield
        return
    directory = Path(tempfile.gettempdir())
    names = [f"gllm-tests-{os.getuid()}-{name}" for name in ("gate", "gpus")]
    with (directory / names[0]).open("w") as gate, (directory / names[1]).open("w") as gpus:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(gpus, fcntl.LOCK_EX if "whole_gpu" in marks else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield
