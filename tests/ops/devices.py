"""Where the tests of kernels run: on a GPU, or by Triton's interpreter on a CPU."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

INTERPRETED = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1")),
]
