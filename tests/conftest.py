"""Shared by every test."""

from __future__ import annotations

import os

# Two cores: one thread of tensor work a process, or processes wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
